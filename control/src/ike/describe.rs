//! A negotiated CHILD_SA in the contract's terms: two SAs that name each other, and selectors.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use postern_contract::Generation;
use postern_contract::Translation;
use postern_contract::sa::{
    AddressRange, Direction, Encryption, Integrity, IpsecProtocol, KeyOrigin, Mode, SaConfig, SaId, Selector,
    Suite, UdpEncap,
};
use postern_contract::secret::Secret;
use postern_ike::config::{self, Connection};
use postern_ike::message::TrafficSelector;
use postern_ike::message::registry::{EncrId, IntegId, ProtocolId};
use postern_ike::output::{ChildSa, Origin};
use postern_wire::ids::{Protocol, Spi};

use crate::config::ike::ChildSettings;
use crate::desired::NEGOTIATED;

/// Selectors of one CHILD_SA in the datapath. Traffic selectors of both sides are combined, so a peer could ask for many.
const SELECTORS: usize = 256;

/// The datapath ends an SA by itself this long after IKE should have, so that one whose IKE SA died with a control
/// process does not live for ever.
const OVER_TIME: Duration = Duration::from_mins(1);

/// Names the two SAs of one CHILD_SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairId(u64);

impl PairId {
    /// From a random number.
    pub const fn new(random: u64) -> Self {
        Self((random | NEGOTIATED) & !1)
    }

    /// The pair that a negotiated SA is of.
    pub const fn of(sa: SaId) -> Self {
        Self(sa.0 & !1)
    }

    /// The SA of one direction.
    pub const fn sa(self, direction: Direction) -> SaId {
        match direction {
            Direction::Inbound => SaId(self.0),
            Direction::Outbound => SaId(self.0 | 1),
        }
    }
}

/// Both SAs, the inbound one first. The error is for people.
pub fn describe(
    pair: PairId,
    generation: Generation,
    child: &ChildSa,
    settings: &ChildSettings,
) -> Result<[SaConfig; 2], String> {
    let selectors = selectors(&child.local_ts, &child.remote_ts)?;
    let esp = match child.protocol {
        ProtocolId::ESP => true,
        ProtocolId::AH if child.encap.is_none() => false,
        ProtocolId::AH => return Err("AH cannot be encapsulated in UDP".to_owned()),
        other => return Err(format!("the datapath has no protocol {other:?}")),
    };
    let configured = child.connection.children.get(child.child);
    let life = configured.and_then(|child| child.life);
    let mut lifetime = settings.limits;
    lifetime.hard.seconds = life.map(|life| life.saturating_add(OVER_TIME).as_secs());
    let sa = |direction, spi, keys, selectors| {
        let inbound = direction == Direction::Inbound;
        let (id, other) = match direction {
            Direction::Inbound => (Direction::Inbound, Direction::Outbound),
            Direction::Outbound => (Direction::Outbound, Direction::Inbound),
        };
        Ok::<_, String>(SaConfig {
            id: pair.sa(id),
            generation,
            direction,
            protocol: if esp { IpsecProtocol::Esp } else { IpsecProtocol::Ah },
            mode: match child.mode {
                config::Mode::Tunnel => Mode::Tunnel,
                config::Mode::Transport => Mode::Transport,
            },
            spi: Translation::same(Spi(spi)),
            local: Translation::same(child.local),
            remote: Translation::same(child.remote),
            encap: child.encap.map(|(local_port, remote_port)| UdpEncap { local_port, remote_port }),
            suite: suite(child, keys)?,
            esn: child.esn,
            replay_window: if inbound { settings.replay_window } else { 0 },
            sequence: u64::from(!inbound),
            selectors,
            lifetime,
            path: settings.path,
            // AH covers the addresses: behind another one the packet would not have verified.
            follow_peer: inbound && esp && settings.follow_peer,
            pair: Some(pair.sa(other)),
            bundle: None,
            origin: match child.origin {
                Origin::Negotiated => KeyOrigin::Negotiated,
                Origin::Saved => KeyOrigin::Saved,
                Origin::Restored => KeyOrigin::Restored,
            },
            worker: settings.worker,
            fan_out: settings.fan_out,
        })
    };
    Ok([
        sa(Direction::Inbound, child.spi_in, &child.keys_in, selectors)?,
        // What an outbound SA may carry is checked by its policy.
        sa(Direction::Outbound, child.spi_out, &child.keys_out, Vec::new())?,
    ])
}

fn suite(child: &ChildSa, keys: &(postern_ike::Secret, postern_ike::Secret)) -> Result<Suite, String> {
    let key = |secret: &postern_ike::Secret| Secret::new(secret.expose());
    let (encryption_key, integrity_key) = keys;
    let (encryption, integrity) = transforms(child.protocol, child.encr, child.integ)
        .ok_or_else(|| format!("the datapath cannot do {:?} with {:?}", child.encr, child.integ))?;
    Ok(Suite {
        encryption,
        encryption_key: key(encryption_key),
        integrity,
        integrity_key: key(integrity_key),
    })
}

fn transforms(protocol: ProtocolId, encr: EncrId, integ: IntegId) -> Option<(Encryption, Integrity)> {
    let encryption = match encr {
        _ if protocol == ProtocolId::AH => Encryption::Null,
        EncrId::NULL => Encryption::Null,
        EncrId::AES_CBC => Encryption::AesCbc,
        EncrId::AES_GCM_16 => Encryption::AesGcm16,
        EncrId::CHACHA20_POLY1305 => Encryption::ChaCha20Poly1305,
        EncrId::NULL_AUTH_AES_GMAC => Encryption::NullAuthAesGmac,
        _ => return None,
    };
    let integrity = match integ {
        IntegId::NONE => Integrity::None,
        IntegId::HMAC_SHA1_96 => Integrity::HmacSha1_96,
        IntegId::HMAC_SHA2_256_128 => Integrity::HmacSha2_256_128,
        IntegId::HMAC_SHA2_384_192 => Integrity::HmacSha2_384_192,
        IntegId::HMAC_SHA2_512_256 => Integrity::HmacSha2_512_256,
        _ => return None,
    };
    Some((encryption, integrity))
}

/// Every pair of traffic selectors of both sides that can match a packet (RFC 7296 section 2.9: a packet fits if it
/// fits one of each side). The error is for people.
pub fn selectors(local: &[TrafficSelector], remote: &[TrafficSelector]) -> Result<Vec<Selector>, String> {
    let mut all = Vec::new();
    for local in local {
        for remote in remote {
            let protocol = match (local.protocol, remote.protocol) {
                (0, other) | (other, 0) => other,
                (one, other) if one == other => one,
                _ => continue,
            };
            if local.start.is_ipv4() != remote.start.is_ipv4() {
                continue;
            }
            // "Opaque" ports (section 3.13.1) match packets that hide theirs. There is no such selector in the datapath.
            if local.ports.is_empty() || remote.ports.is_empty() {
                continue;
            }
            if all.len() == SELECTORS {
                return Err(format!("its traffic selectors give more than {SELECTORS} pairs"));
            }
            all.push(Selector {
                local: AddressRange { start: local.start, end: local.end },
                remote: AddressRange { start: remote.start, end: remote.end },
                protocol: (protocol != 0).then_some(Protocol(protocol)),
                local_ports: local.ports.clone(),
                remote_ports: remote.ports.clone(),
            });
        }
    }
    if all.is_empty() {
        return Err("no traffic selector of this side fits one of the peer's side".to_owned());
    }
    Ok(all)
}

/// What traffic is to be waited for on behalf of a child as it is configured: its selectors with dynamic ones resolved
/// to the outer addresses, as far as these are known.
pub fn trap_selectors(
    connection: &Connection,
    child: &config::Child,
    source: impl FnOnce(IpAddr) -> Option<IpAddr>,
) -> Result<Vec<Selector>, String> {
    let remote = connection.remote.ok_or("the peer's address is not configured (`remote`)")?;
    // A virtual address is not known before it is assigned.
    let virtual_address = connection.request_address != (false, false);
    let local = match connection.local.iter().find(|local| local.is_ipv4() == remote.is_ipv4()) {
        _ if virtual_address => None,
        Some(local) => Some(*local),
        None => source(remote),
    };
    let resolve =
        |selectors: &[config::Selector], address: Option<IpAddr>| -> Result<Vec<TrafficSelector>, String> {
            selectors
                .iter()
                .map(|selector| match selector {
                    config::Selector::Fixed(selector) => Ok(selector.clone()),
                    config::Selector::Dynamic { protocol, ports } => {
                        let address = address.ok_or("the address of a dynamic selector is not known yet")?;
                        let (protocol, ports) = (*protocol, ports.clone());
                        Ok(TrafficSelector { start: address, end: address, protocol, ports })
                    }
                })
                .collect()
        };
    selectors(&resolve(&child.local_ts, local)?, &resolve(&child.remote_ts, Some(remote))?)
}

/// How the children of a connection are named where tunnels are named.
pub fn tunnel_name(connection: &str, child: &Arc<str>) -> String {
    format!("{connection}/{child}")
}

/// Its algorithms, as the configuration writes them.
pub fn suite_words(child: &ChildSa) -> String {
    let bits = |secret: &postern_ike::Secret, salt: usize| secret.len().saturating_sub(salt) * 8;
    let (key, _) = &child.keys_in;
    let encryption = match child.encr {
        _ if child.protocol == ProtocolId::AH => "ah".to_owned(),
        EncrId::NULL => "null".to_owned(),
        EncrId::AES_CBC => format!("aes{}", bits(key, 0)),
        EncrId::AES_GCM_16 => format!("aes{}gcm16", bits(key, 4)),
        EncrId::NULL_AUTH_AES_GMAC => format!("aes{}gmac", bits(key, 4)),
        EncrId::CHACHA20_POLY1305 => "chacha20poly1305".to_owned(),
        other => format!("{other:?}"),
    };
    let integrity = match child.integ {
        IntegId::NONE => "",
        IntegId::HMAC_SHA1_96 => "-sha1",
        IntegId::HMAC_SHA2_256_128 => "-sha256",
        IntegId::HMAC_SHA2_384_192 => "-sha384",
        IntegId::HMAC_SHA2_512_256 => "-sha512",
        _ => "-?",
    };
    format!("{encryption}{integrity}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(net: &str, protocol: u8, ports: std::ops::RangeInclusive<u16>) -> TrafficSelector {
        TrafficSelector::new(net.parse().unwrap(), protocol, ports)
    }

    /// RFC 7296 section 2.9: a packet fits if it fits one selector of each side, so selectors are combined; those that no
    /// packet fits are left out, and a peer cannot ask for any number of them.
    #[test]
    fn ike_1_selectors_are_combined() {
        const ANY: std::ops::RangeInclusive<u16> = 0..=u16::MAX;
        let local = [selector("10.1.0.0/24", 0, ANY), selector("fd00:1::/64", 6, ANY)];
        let remote = [
            selector("10.2.0.0/24", 6, 80..=80),
            selector("10.2.1.0/24", 17, ANY),
            selector("fd00:2::/64", 17, ANY),
        ];
        let found = selectors(&local, &remote).unwrap();
        let shown: Vec<_> = found
            .iter()
            .map(|s| (s.remote.start.to_string(), s.protocol.map(|p| p.0), s.remote_ports.clone()))
            .collect();
        let expected = [("10.2.0.0".to_owned(), Some(6), 80..=80), ("10.2.1.0".to_owned(), Some(17), ANY)];
        assert_eq!(shown, expected);
        assert!(selectors(&local[1..], &remote).is_err(), "TCP on one side, UDP on the other");
        let opaque = core::ops::RangeInclusive::new(u16::MAX, 0);
        assert!(selectors(&local, &[selector("10.2.0.0/24", 6, opaque)]).is_err());
        let many = vec![selector("10.1.0.0/24", 0, ANY); 17];
        assert!(selectors(&many, &many).unwrap_err().contains("256"));
    }

    /// The two SAs of a pair name each other, and nothing that is configured has such an id.
    #[test]
    fn dp_7_pairs_of_ids() {
        for random in [0, 1, u64::MAX, 0x1234_5678_9abc_def1] {
            let pair = PairId::new(random);
            let both = [Direction::Inbound, Direction::Outbound].map(|direction| pair.sa(direction));
            assert_ne!(both[0], both[1]);
            for sa in both {
                assert_eq!(PairId::of(sa), pair);
                assert!(crate::desired::is_negotiated(sa.0));
            }
        }
    }
}
