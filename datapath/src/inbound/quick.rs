//! The usual packet out of its ESP, in one pass.
//!
//! Usual is TCP or UDP over IPv4 without options and whole, in a plain SA over IPv4, neither packet marked by ECN. What
//! is not usual in any way, or not in order, is left as it was to `decap`, which knows all cases and all complaints.

use std::net::{IpAddr, Ipv4Addr};

use postern_wire::flow::{Flow, Fragment};
use postern_wire::ids::Protocol;
use postern_wire::{esp, ip4};

use super::Arrival;
use crate::frame::{Arena, Frame};
use crate::sad::config::SaKey;
use crate::sad::runtime::Inbound;

/// IPv4 header and ports.
const HEAD: usize = ip4::MIN_LEN + 4;
const ECN: u8 = 0b11;

/// Leaves the inner packet in the frame. Gives what policies ask about it, and the bytes that were protected.
#[inline]
pub(super) fn strip(
    arena: &Arena,
    frame: &mut Frame,
    arrival: &Arrival,
    state: &Inbound,
) -> Option<(Flow, usize)> {
    let config = &*state.config;
    let SaKey::Esp(key) = &config.key else { return None };
    if !config.is_plain() || config.is_metered() {
        return None;
    }
    let layout = key.layout();
    let packet = arena.bytes(frame);
    let [first, outer_tos] = *packet.first_chunk()?;
    let at = arrival.at() + esp::HEADER_LEN + usize::from(layout.iv_len);
    let end = packet.len().checked_sub(usize::from(layout.icv_len))?;
    let trailer = esp::trailer(packet.get(at..end)?).ok()?;
    let len = trailer.payload_len;
    let (flow, total) = read(packet.get(at..at.checked_add(len)?)?)?;
    let marked = (outer_tos | flow.tos) & ECN != 0;
    if first >> 4 != 4 || trailer.next_header != Protocol::IPV4 || marked || !config.admits(&flow) {
        return None;
    }
    frame.shrink_front(at)?;
    frame.truncate(total);
    Some((flow, len))
}

/// As [`Flow::parse`] reads it, if it is usual.
#[inline]
fn read(packet: &[u8]) -> Option<(Flow, usize)> {
    let head = packet.first_chunk::<HEAD>()?;
    let [0x45, tos, t0, t1, _, _, f0, f1, ttl, protocol, _, _, s @ .., d0, d1, d2, d3, p0, p1, q0, q1] =
        *head
    else {
        return None;
    };
    let total_len = u16::from_be_bytes([t0, t1]);
    let total = usize::from(total_len);
    // RFC 791 section 3.1: DF, then More Fragments and the offset.
    let fragment = u16::from_be_bytes([f0, f1]);
    let protocol = Protocol(protocol);
    let usual = matches!(protocol, Protocol::TCP | Protocol::UDP) && fragment.trailing_zeros() >= 14;
    if !usual || total < HEAD || total > packet.len() {
        return None;
    }
    let flow = Flow {
        source: IpAddr::V4(Ipv4Addr::from(s)),
        destination: IpAddr::V4(Ipv4Addr::new(d0, d1, d2, d3)),
        protocol,
        source_port: u16::from_be_bytes([p0, p1]),
        destination_port: u16::from_be_bytes([q0, q1]),
        ports_known: true,
        header_len: 20,
        next_header_at: 9,
        total_len,
        tos,
        ttl,
        dont_fragment: fragment & 0x4000 != 0,
        fragment: Fragment::No,
    };
    Some((flow, total))
}

#[cfg(test)]
mod tests {
    use arrayvec::ArrayVec;
    use postern_contract::counters::DropReason;
    use postern_contract::request::Operation;
    use postern_contract::sa::{
        Direction, Encryption, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Limits, Mode, PathPolicy,
        SaConfig, SaId, Selector, Suite, UdpEncap,
    };
    use postern_contract::secret::Secret;
    use postern_contract::settings::Backend;
    use postern_contract::{Generation, Translation};
    use postern_wire::ids::Spi;
    use postern_wire::udp;
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::crypto::{Engine, EspKey, SealOp, SealOutcome, SequenceCounter};
    use crate::outbound::quick::tests::packets;
    use crate::testbed::{Layout, Testbed};

    const NATT: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4501 };

    fn suite() -> Suite {
        Suite {
            encryption: Encryption::AesGcm16,
            encryption_key: Secret::new(vec![7; 20]),
            integrity: Integrity::None,
            integrity_key: Secret::empty(),
        }
    }

    /// A gateway whose SA has a limit, far away, so that it is not a usual one; or has none.
    fn bed(usual: bool, encap: Option<UdpEncap>) -> (TempDir, Testbed) {
        let state = tempfile::tempdir().unwrap();
        let layout = Layout { inside: vec!["10.2.0.1/16".parse().unwrap()], ..Layout::default() };
        let inside_hosts = (0..3).map(|n| Ipv4Addr::new(10, 2, 0, n).into()).collect();
        let mut bed = Testbed::new(&Layout { inside_hosts, ..layout }, state.path()).unwrap();
        let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap().into();
        let far = Limits { packets: Some(1 << 40), ..Limits::default() };
        let sa = SaConfig {
            id: SaId(1),
            generation: Generation(1),
            direction: Direction::Inbound,
            protocol: IpsecProtocol::Esp,
            mode: Mode::Tunnel,
            spi: Translation::same(Spi(0x1001)),
            local: Translation::same("192.0.2.1".parse().unwrap()),
            remote: Translation::same("198.51.100.1".parse().unwrap()),
            encap,
            suite: suite(),
            esn: true,
            replay_window: 64,
            sequence: 0,
            selectors: vec![Selector {
                local: net("10.2.0.0/31"),
                remote: net("10.1.0.0/24"),
                protocol: None,
                local_ports: 0..=60_000,
                remote_ports: 0..=u16::MAX,
            }],
            lifetime: if usual { Lifetime::default() } else { Lifetime { hard: far, ..Lifetime::default() } },
            path: PathPolicy::default(),
            follow_peer: true,
            pair: None,
            bundle: None,
            origin: KeyOrigin::Negotiated,
            worker: None,
        };
        bed.apply(vec![Operation::InstallSa(Box::new(sa))])
            .into_iter()
            .for_each(|done| assert!(done.is_ok()));
        (state, bed)
    }

    /// An authentic ESP packet with `inner` and TFC padding in it.
    fn seal(
        engine: &mut Engine,
        sequence: &mut SequenceCounter,
        encap: bool,
        outer_tos: u8,
        next_header: Protocol,
        inner: &[u8],
        tfc: usize,
    ) -> Vec<u8> {
        let key = EspKey::new(&suite()).unwrap();
        let at = ip4::MIN_LEN + if encap { udp::LEN } else { 0 };
        let payload = inner.len() + tfc;
        let trailer = usize::from(esp::padding(payload, 4)) + esp::TRAILER_LEN;
        let mut packet = vec![0; at + 16 + payload + trailer + 16];
        let len = packet.len();
        packet[at + 16..at + 16 + inner.len()].copy_from_slice(inner);
        esp::write_trailer(&mut packet[at + 16 + payload..len - 16], next_header).unwrap();
        esp::Header { spi: Spi(0x1001), sequence: 0 }.emit(&mut packet[at..]).unwrap();
        let mut ops = ArrayVec::<_, 1>::new();
        let sequence = sequence.reserve().unwrap();
        ops.push(SealOp { key: &key, sequence, esn: true, packet: &mut packet[at..] });
        assert_eq!(engine.seal(ops).as_slice(), [SealOutcome::Sealed]);
        if encap {
            let length = u16::try_from(len - ip4::MIN_LEN).unwrap();
            let header = udp::Header { source_port: 4501, destination_port: 4500, length, checksum: 0 };
            header.emit(&mut packet[ip4::MIN_LEN..]).unwrap();
        }
        let header = ip4::Header {
            source: Ipv4Addr::new(198, 51, 100, 1),
            destination: Ipv4Addr::new(192, 0, 2, 1),
            protocol: if encap { Protocol::UDP } else { Protocol::ESP },
            ttl: 64,
            tos: outer_tos,
            id: 0,
            dont_fragment: false,
        };
        header.emit(&mut packet, len - ip4::MIN_LEN).unwrap();
        packet
    }

    /// DP-5: what comes out the short way is what comes out the long way, and is counted alike.
    #[test]
    fn dp_5_both_ways_give_the_same() {
        let mut engine = Engine::select(Backend::Auto, 4).unwrap();
        for encap in [None, Some(NATT)] {
            let ((_one, mut quick), (_other, mut long)) = (bed(true, encap), bed(false, encap));
            let mut sequence = SequenceCounter::new(1, u64::MAX, true);
            let mut delivered = 0;
            for (number, inner) in packets(1500).enumerate() {
                let next_header = [Protocol::IPV4, Protocol::IPV6, Protocol::NONE, Protocol::UDP];
                let next_header = next_header[if number % 7 == 0 { number % 4 } else { 0 }];
                let (tos, tfc) = ([0, 1, 2, 3][number % 4], [0, 0, 3, 40][number % 3]);
                let mut packet =
                    seal(&mut engine, &mut sequence, encap.is_some(), tos, next_header, &inner, tfc);
                if number % 11 == 0 {
                    let at = packet.len() - 1 - number % 30;
                    packet[at] ^= 4;
                }
                // Every fifth once more: a replay.
                for _ in 0..if number % 5 == 0 { 2 } else { 1 } {
                    let left = quick.from_outside(&packet);
                    assert_eq!(left, long.from_outside(&packet), "{number}: {inner:02x?}");
                    delivered += left.1.len();
                }
            }
            assert!(delivered > 80, "{delivered}");
            for reason in DropReason::ALL {
                assert_eq!(quick.drops(*reason), long.drops(*reason), "{reason:?}");
            }
            assert!(quick.drops(DropReason::BadIcv) > 0 && quick.drops(DropReason::ReplayDuplicate) > 0);
            assert_eq!(quick.balance(), long.balance());
            let carried = |bed: &Testbed| bed.workers.borrow()[0].core.inbound.get(0).map(|sa| sa.traffic);
            assert_eq!(carried(&quick), carried(&long));
        }
    }

    proptest! {
        /// DP-5: what is read in a few steps is what the parser reads.
        #[test]
        fn dp_5_the_short_way_agrees(
            mut packet in prop::collection::vec(any::<u8>(), 20..80),
            protocol in prop::sample::select(vec![6_u8, 17, 50, 1]),
            fragment in prop::sample::select(vec![0_u16, 0x4000, 0x2000, 1, 0x8000]),
            total in 0_u16..90,
            version in prop::sample::select(vec![0x45_u8, 0x45, 0x46, 0x60]),
        ) {
            packet[0] = version;
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            packet[6..8].copy_from_slice(&fragment.to_be_bytes());
            packet[9] = protocol;
            if let Some((flow, total)) = read(&packet) {
                prop_assert_eq!(Flow::parse(&packet), Ok(flow));
                prop_assert_eq!(total, usize::from(flow.total_len));
            }
        }
    }
}
