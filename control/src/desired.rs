//! What the datapath should hold, in the contract's terms: made from a [`Config`], compared with an inventory by
//! [`crate::datapath::reconcile`].
//!
//! Ids are digests of what makes an object what it is (an SA: tunnel, direction, protocol, SPI and keys), so that they are
//! the same after a restart of control and others when the keys change. Their highest bit is clear; objects that were
//! negotiated (`ike::datapath`) have it set, so that after a restart either side of control knows its own.

use core::net::IpAddr;
use std::collections::BTreeMap;

use postern_contract::relay::{RelayEntry, RelayId};
use postern_contract::sa::{
    Action, Direction, IpsecProtocol, KeyOrigin, Mode, Policy, PolicyId, SaConfig, SaId, Suite, UdpEncap,
};
use postern_contract::{Generation, Translation};
use postern_wire::ids::Spi;

use crate::config::{Config, Half, Keyed, PlainPolicy, Relay, Tunnel};
use crate::digest;

/// The bit that the ids of negotiated SAs and policies have set.
pub const NEGOTIATED: u64 = 1 << 63;

/// Whether an SA or a policy of this id was negotiated, not configured.
pub const fn is_negotiated(id: u64) -> bool {
    id & NEGOTIATED != 0
}

/// An id of what is configured.
fn configured(parts: &[&[u8]]) -> u64 {
    digest::short(parts) & !NEGOTIATED
}

/// Everything that should be installed. Holds keys.
#[derive(Debug, Default)]
pub struct Desired {
    /// SAs.
    pub sas: BTreeMap<SaId, WantedSa>,
    /// Policies, those of tunnels included.
    pub policies: BTreeMap<PolicyId, WantedPolicy>,
    /// Translation entries.
    pub relays: BTreeMap<RelayId, WantedRelay>,
    /// The tunnels in the order of the file.
    pub tunnels: Vec<TunnelSummary>,
}

/// An SA and where it comes from.
#[derive(Debug)]
pub struct WantedSa {
    /// Name of the tunnel.
    pub tunnel: String,
    /// Its algorithms as the file writes them.
    pub suite: String,
    /// Its description; the generation is given by [`crate::state::Generations`].
    pub config: SaConfig,
}

/// A policy and where it comes from.
#[derive(Debug)]
pub struct WantedPolicy {
    /// Name of the tunnel or of the `[[policy]]`.
    pub name: String,
    /// Its description.
    pub policy: Policy,
}

/// A translation entry and where it comes from.
#[derive(Debug)]
pub struct WantedRelay {
    /// Name of the `[[relay]]`.
    pub name: String,
    /// Its description.
    pub entry: RelayEntry,
}

/// One tunnel without its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelSummary {
    /// Its name.
    pub name: String,
    /// Tunnel or transport.
    pub mode: Mode,
    /// Its algorithms as the file writes them.
    pub suite: String,
    /// Its SAs.
    pub sas: Vec<SaId>,
    /// Its policy.
    pub policy: PolicyId,
}

/// The desired state without its keys, for showing.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    /// SAs.
    pub sas: BTreeMap<SaId, SaOutline>,
    /// Names and descriptions of policies.
    pub policies: BTreeMap<PolicyId, (String, Policy)>,
    /// Names and descriptions of translation entries.
    pub relays: BTreeMap<RelayId, (String, RelayEntry)>,
    /// The tunnels in the order of the file.
    pub tunnels: Vec<TunnelSummary>,
}

/// An SA without its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaOutline {
    /// Name of the tunnel.
    pub tunnel: String,
    /// Its algorithms as the file writes them.
    pub suite: String,
    /// Inbound or outbound.
    pub direction: Direction,
    /// ESP or AH.
    pub protocol: IpsecProtocol,
    /// Tunnel or transport.
    pub mode: Mode,
    /// The SPI.
    pub spi: Translation<Spi>,
    /// This node's outer address.
    pub local: Translation<IpAddr>,
    /// The peer's outer address.
    pub remote: Translation<IpAddr>,
    /// UDP encapsulation.
    pub encap: Option<UdpEncap>,
    /// Extended sequence numbers.
    pub esn: bool,
    /// Anti-replay window in packets.
    pub replay_window: u16,
    /// State of the description.
    pub generation: Generation,
}

impl Outline {
    /// Adds `other`.
    pub fn extend(&mut self, other: Self) {
        let Self { sas, policies, relays, tunnels } = other;
        self.sas.extend(sas);
        self.policies.extend(policies);
        self.relays.extend(relays);
        self.tunnels.extend(tunnels);
    }
}

impl SaOutline {
    /// `config` without its keys.
    pub const fn new(tunnel: String, suite: String, config: &SaConfig) -> Self {
        Self {
            tunnel,
            suite,
            direction: config.direction,
            protocol: config.protocol,
            mode: config.mode,
            spi: config.spi,
            local: config.local,
            remote: config.remote,
            encap: config.encap,
            esn: config.esn,
            replay_window: config.replay_window,
            generation: config.generation,
        }
    }
}

impl Desired {
    /// What may be shown of it.
    pub fn outline(&self) -> Outline {
        let Self { sas, policies, relays, tunnels } = self;
        let outline = |WantedSa { tunnel, suite, config }: &WantedSa| {
            SaOutline::new(tunnel.clone(), suite.clone(), config)
        };
        Outline {
            sas: sas.iter().map(|(id, wanted)| (*id, outline(wanted))).collect(),
            policies: policies.iter().map(|(id, p)| (*id, (p.name.clone(), p.policy.clone()))).collect(),
            relays: relays.iter().map(|(id, relay)| (*id, (relay.name.clone(), relay.entry))).collect(),
            tunnels: tunnels.clone(),
        }
    }

    /// The inbound SPIs that are taken: of SAs, and of relay entries.
    pub fn inbound_spis(&self) -> Vec<u32> {
        let sas = self.sas.values().filter(|wanted| wanted.config.direction == Direction::Inbound);
        let sas = sas.map(|wanted| wanted.config.spi.on_wire.0);
        let relays = self.relays.values().flat_map(|relay| [relay.entry.client, relay.entry.gateway]);
        let relays = relays.flat_map(|side| [side.esp, side.ah]).flatten().map(|pair| pair.to_relay.0);
        sas.chain(relays).collect()
    }

    /// Takes over the keys of `config`.
    pub fn new(config: Config) -> Self {
        let Config {
            datapath: _,
            control: _,
            tunnels,
            policies,
            relays,
            ike: _,
            recovery: _,
            holds_keys: _,
            warnings: _,
        } = config;
        let mut desired = Self::default();
        for tunnel in tunnels {
            desired.add_tunnel(tunnel);
        }
        for PlainPolicy { name, priority, action, selectors } in policies {
            let id = PolicyId(configured(&[b"policy", name.as_bytes()]));
            let policy = Policy { id, generation: Generation(0), priority, selectors, action };
            desired.policies.insert(id, WantedPolicy { name, policy });
        }
        for Relay { name, client, gateway } in relays {
            let id = RelayId(digest::short(&[b"relay", name.as_bytes()]));
            let entry = RelayEntry { id, generation: Generation(0), client, gateway };
            desired.relays.insert(id, WantedRelay { name, entry });
        }
        desired
    }

    fn add_tunnel(&mut self, tunnel: Tunnel) {
        let names = [tunnel.esp.map(|esp| esp.keyword()), tunnel.ah.map(|ah| ah.keyword.to_owned())];
        let ids = |half: &Half, direction| {
            [(IpsecProtocol::Esp, &half.esp), (IpsecProtocol::Ah, &half.ah)].map(|(protocol, keyed)| {
                keyed.as_ref().map(|keyed| sa_id(&tunnel.name, direction, protocol, keyed))
            })
        };
        let out_ids = ids(&tunnel.outbound, Direction::Outbound);
        let in_ids = ids(&tunnel.inbound, Direction::Inbound);
        let Tunnel {
            name,
            mode,
            esp: _,
            ah: _,
            local,
            remote,
            outbound,
            inbound,
            selectors,
            encap,
            esn,
            replay_window,
            follow_peer,
            path,
            lifetime,
            priority,
            worker,
            fan_out,
        } = tunnel;
        let mut all = Vec::new();
        for (direction, half, own, other) in
            [(Direction::Outbound, outbound, out_ids, in_ids), (Direction::Inbound, inbound, in_ids, out_ids)]
        {
            let bundled = own.iter().all(Option::is_some);
            let [_, ah_id] = own;
            let Half { esp, ah } = half;
            let parts = [(IpsecProtocol::Esp, esp), (IpsecProtocol::Ah, ah)];
            for (((protocol, keyed), id), (pair, suite_name)) in
                parts.into_iter().zip(own).zip(other.into_iter().zip(&names))
            {
                let (Some(Keyed { spi, suite, sequence }), Some(id)) = (keyed, id) else { continue };
                // RFC 4301 section 4.3: in a bundle AH protects the ESP packet as it travels, header in place.
                let outer_ah = bundled && protocol == IpsecProtocol::Ah;
                let config = SaConfig {
                    id,
                    generation: Generation(0),
                    direction,
                    protocol,
                    mode: if outer_ah { Mode::Transport } else { mode },
                    spi,
                    local,
                    remote,
                    encap,
                    suite,
                    esn,
                    replay_window: if direction == Direction::Inbound { replay_window } else { 0 },
                    sequence,
                    selectors: if outer_ah { Vec::new() } else { selectors.clone() },
                    lifetime,
                    path,
                    // AH covers the addresses: behind another one the packet would not have verified.
                    follow_peer: follow_peer
                        && protocol == IpsecProtocol::Esp
                        && !bundled
                        && direction == Direction::Inbound,
                    pair,
                    bundle: ah_id.filter(|_| bundled && protocol == IpsecProtocol::Esp),
                    origin: KeyOrigin::Static,
                    worker,
                    fan_out,
                };
                let suite = suite_name.clone().unwrap_or_default();
                self.sas.insert(id, WantedSa { tunnel: name.clone(), suite, config });
                all.push(id);
            }
        }
        let [esp_out, ah_out] = out_ids;
        let id = PolicyId(configured(&[b"tunnel", name.as_bytes()]));
        let action = Action::Protect(esp_out.or(ah_out));
        let policy = Policy { id, generation: Generation(0), priority, selectors, action };
        self.policies.insert(id, WantedPolicy { name: name.clone(), policy });
        let suite = names.into_iter().flatten().collect::<Vec<_>>().join(" + ah ");
        self.tunnels.push(TunnelSummary { name, mode, suite, sas: all, policy: id });
    }
}

fn sa_id(tunnel: &str, direction: Direction, protocol: IpsecProtocol, keyed: &Keyed) -> SaId {
    let Suite { encryption: _, encryption_key, integrity: _, integrity_key } = &keyed.suite;
    let direction: &[u8] = match direction {
        Direction::Inbound => b"in",
        Direction::Outbound => b"out",
    };
    let protocol: &[u8] = match protocol {
        IpsecProtocol::Esp => b"esp",
        IpsecProtocol::Ah => b"ah",
    };
    let keys = digest::sha256(&[
        format!("{:?} {:?}", keyed.suite.encryption, keyed.suite.integrity).as_bytes(),
        encryption_key.expose(),
        integrity_key.expose(),
    ]);
    SaId(configured(&[
        b"sa",
        tunnel.as_bytes(),
        direction,
        protocol,
        &keyed.spi.on_wire.0.to_be_bytes(),
        &keyed.spi.authenticated.0.to_be_bytes(),
        &keys,
    ]))
}

/// A second copy of `config`, keys included, for sending it.
pub(crate) fn duplicate(config: &SaConfig) -> SaConfig {
    let SaConfig {
        id,
        generation,
        direction,
        protocol,
        mode,
        spi,
        local,
        remote,
        encap,
        suite: Suite { encryption, encryption_key, integrity, integrity_key },
        esn,
        replay_window,
        sequence,
        selectors,
        lifetime,
        path,
        follow_peer,
        pair,
        bundle,
        origin,
        worker,
        fan_out,
    } = config;
    SaConfig {
        id: *id,
        generation: *generation,
        direction: *direction,
        protocol: *protocol,
        mode: *mode,
        spi: *spi,
        local: *local,
        remote: *remote,
        encap: *encap,
        suite: Suite {
            encryption: *encryption,
            encryption_key: encryption_key.duplicate(),
            integrity: *integrity,
            integrity_key: integrity_key.duplicate(),
        },
        esn: *esn,
        replay_window: *replay_window,
        sequence: *sequence,
        selectors: selectors.clone(),
        lifetime: *lifetime,
        path: *path,
        follow_peer: *follow_peer,
        pair: *pair,
        bundle: *bundle,
        origin: *origin,
        worker: *worker,
        fan_out: *fan_out,
    }
}
