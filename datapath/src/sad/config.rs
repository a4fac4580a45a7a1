//! The configuration half of an SA: immutable, shared with the main thread, replaced as a whole (DESIGN decision 3).

use std::net::IpAddr;

use postern_contract::request::Refusal;
use postern_contract::sa::{
    AddressRange, Direction, DscpPolicy, IpsecProtocol, Lifetime, Limits, Mode, PathPolicy, SaConfig, SaId,
    Selector, UdpEncap,
};
use postern_contract::{Generation, Translation};
use postern_wire::ids::{Protocol, Spi};

use crate::crypto::{AhKey, EspKey, fingerprint, key_check};

/// Expanded keys of one SA.
#[derive(Debug)]
pub enum SaKey {
    /// ESP.
    Esp(EspKey),
    /// AH.
    Ah(AhKey),
}

/// What every packet of an SA needs to know and none changes.
///
/// A million of these exist, so what only some SAs have is boxed or packed.
#[derive(Debug)]
pub struct SaShared {
    /// Expanded keys.
    pub key: SaKey,
    /// Control's name for the SA.
    pub id: SaId,
    /// State of the description.
    pub generation: Generation,
    /// SPIs.
    pub spi: Translation<Spi>,
    /// This node's address on the wire.
    pub local: IpAddr,
    /// The peer's address on the wire, as installed.
    pub remote: IpAddr,
    /// What the ICV covers in their place, behind a relay (RLY-2).
    pub authenticated: Option<Box<(IpAddr, IpAddr)>>,
    /// UDP encapsulation, as installed.
    pub encap: Option<UdpEncap>,
    /// Traffic selectors.
    pub selectors: Box<[Selector]>,
    /// Limits, if there are any.
    pub lifetime: Option<Box<Lifetime>>,
    /// Sizes and header fields.
    pub path: PathPolicy,
    /// Inbound or outbound.
    pub direction: Direction,
    /// ESP or AH.
    pub protocol: IpsecProtocol,
    /// Tunnel or transport.
    pub mode: Mode,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// MOB-2.
    pub follow_peer: bool,
    /// Whether the other SA of a bundle must be applied or must have been verified.
    pub bundled: bool,
    /// The reservation of sequence numbers outlives the SA.
    pub static_keys: bool,
    /// Size of the anti-replay window.
    pub replay_window: u16,
    /// The SA of the other direction.
    pub pair: Option<SaId>,
    /// The other SA of the bundle.
    pub bundle: Option<SaId>,
    /// Tells keys apart without showing them.
    pub key_check: [u8; 8],
    /// Names the keys in the ledger of reserved sequence numbers.
    pub fingerprint: [u8; 16],
}

impl SaShared {
    /// Checks `config` and expands its keys.
    ///
    /// # Errors
    /// [`Refusal::Suite`] or [`Refusal::Invalid`], naming the field and what is allowed.
    pub fn build(config: &SaConfig) -> Result<Self, Refusal> {
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
            suite,
            esn,
            replay_window,
            sequence,
            selectors,
            lifetime,
            path,
            follow_peer,
            pair,
            bundle,
            static_keys,
            worker: _,
        } = config;
        suite.validate(*protocol)?;
        let invalid = |text: &str| Err(Refusal::Invalid(text.to_owned()));
        if !spi.on_wire.is_usable() || !spi.authenticated.is_usable() {
            return invalid("spi: 0 to 255 are reserved (RFC 4303 section 2.1)");
        }
        if local.on_wire.is_ipv4() != remote.on_wire.is_ipv4()
            || local.authenticated.is_ipv4() != remote.authenticated.is_ipv4()
        {
            return invalid("local and remote must be of one address family");
        }
        if local.on_wire.is_ipv4() != local.authenticated.is_ipv4() {
            return invalid("local and remote: a relay swaps addresses, so both its sides are of one family");
        }
        if *protocol == IpsecProtocol::Ah {
            if encap.is_some() {
                return invalid("encap: AH cannot be encapsulated in UDP (RFC 3948)");
            }
            if bundle.is_some() {
                return invalid("bundle: named by the ESP SA, not by the AH SA");
            }
        }
        if encap.is_some() && bundle.is_some() {
            return invalid("encap: an SA bundle has AH outside, which cannot be encapsulated in UDP");
        }
        match direction {
            Direction::Inbound => {
                let size = usize::from(*replay_window);
                if size != 0 && (!(64..=4096).contains(&size) || size % 64 != 0) {
                    return invalid("replay_window: 0, or 64 to 4096 in multiples of 64");
                }
            }
            Direction::Outbound if *sequence == 0 => {
                return invalid("sequence: an outbound SA begins at 1 or above");
            }
            Direction::Outbound => {}
        }
        if !esn && *sequence > u64::from(u32::MAX) {
            return invalid("sequence: above 2^32 - 1 without extended sequence numbers");
        }
        for Selector { local, remote, protocol: _, local_ports, remote_ports } in selectors {
            if !local.is_valid() || !remote.is_valid() || local.start.is_ipv4() != remote.start.is_ipv4() {
                return invalid("selectors: each range needs start <= end, and local and remote one family");
            }
            if local_ports.is_empty() || remote_ports.is_empty() {
                return invalid("selectors: a port range must not be empty");
            }
        }
        if let Some(mtu) = path.mtu
            && mtu < 296
        {
            return invalid("path.mtu: at least 296 bytes, below which no useful inner packet fits");
        }
        if let DscpPolicy::Fixed(64..) = path.dscp {
            return invalid("path.dscp: 0 to 63");
        }
        let key = match protocol {
            IpsecProtocol::Esp => SaKey::Esp(EspKey::new(suite)?),
            IpsecProtocol::Ah => SaKey::Ah(AhKey::new(suite)?),
        };
        let unlimited = Limits::default();
        Ok(Self {
            key,
            id: *id,
            generation: *generation,
            spi: *spi,
            local: local.on_wire,
            remote: remote.on_wire,
            authenticated: (local.is_translated() || remote.is_translated())
                .then(|| Box::new((local.authenticated, remote.authenticated))),
            encap: *encap,
            selectors: selectors.clone().into_boxed_slice(),
            lifetime: (lifetime.soft != unlimited || lifetime.hard != unlimited).then(|| Box::new(*lifetime)),
            path: *path,
            direction: *direction,
            protocol: *protocol,
            mode: *mode,
            esn: *esn,
            follow_peer: *follow_peer,
            bundled: bundle.is_some(),
            static_keys: *static_keys,
            replay_window: *replay_window,
            pair: *pair,
            bundle: *bundle,
            key_check: key_check(suite),
            fingerprint: fingerprint(suite),
        })
    }

    /// The IP protocol number of the SA.
    pub const fn ip_protocol(&self) -> Protocol {
        match self.protocol {
            IpsecProtocol::Esp => Protocol::ESP,
            IpsecProtocol::Ah => Protocol::AH,
        }
    }

    /// Which field of `other` differs though an installed SA cannot change it; `None` if `other` may replace this.
    pub fn immutable_difference(&self, other: &Self) -> Option<&'static str> {
        let differences = [
            (self.direction != other.direction, "direction"),
            (self.protocol != other.protocol, "protocol"),
            (self.spi.on_wire != other.spi.on_wire, "spi"),
            (self.key_check != other.key_check, "keys"),
            (self.esn != other.esn, "esn"),
            (self.replay_window != other.replay_window, "replay_window"),
        ];
        differences.into_iter().find_map(|(differs, name)| differs.then_some(name))
    }

    /// The addresses that an ICV covers: (this node's, the peer's), where the peer is now at `remote`.
    pub fn authenticated_addresses(&self, remote: IpAddr) -> (IpAddr, IpAddr) {
        self.authenticated.as_deref().map_or((self.local, remote), |addresses| *addresses)
    }

    /// `Translation` of both addresses as installed, for reports.
    pub fn translations(&self) -> (Translation<IpAddr>, Translation<IpAddr>) {
        let (local, remote) = self.authenticated_addresses(self.remote);
        (
            Translation { on_wire: self.local, authenticated: local },
            Translation { on_wire: self.remote, authenticated: remote },
        )
    }
}

/// A range that holds exactly `address`.
pub const fn host_range(address: IpAddr) -> AddressRange {
    AddressRange { start: address, end: address }
}
