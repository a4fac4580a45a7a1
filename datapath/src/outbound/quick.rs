//! The usual packet's way through the outbound stages, in one pass.
//!
//! Usual is TCP or UDP over IPv4 without options, whole, no SYN, and forwarded; under a plain SA whose peer is on IPv4
//! and which is not near a limit. What is not usual in any way is left as it was to the stages, which know all cases;
//! what is usual leaves here with the same headers that they would have written.

use std::net::IpAddr;

use postern_wire::flow::Flow;
use postern_wire::ids::Protocol;
use postern_wire::{esp, ip4, udp};

use super::{Came, Headers, Inner, Next, OutboundBatch, RESERVE_LOW, path_mtu};
use crate::core::Core;
use crate::crypto::Reserved;
use crate::fib::Route;
use crate::flows::Key;
use crate::frame::Frame;
use crate::header;
use crate::sad::config::SaKey;
use crate::sad::lookup::Handle;
use crate::sad::runtime::NO_LINK;
use crate::spd::{Spd, Verdict};

/// IPv4 header and ports.
const HEAD: usize = ip4::MIN_LEN + 4;
/// Where the flags of a TCP segment are.
const TCP_FLAGS: usize = ip4::MIN_LEN + 13;
const SYN: u8 = 0b10;

/// What the later stages need.
struct Ready {
    sa: u32,
    route: Route,
    number: Reserved,
    at: u16,
}

/// Fills the columns, of what is usual and of what is not. Gives the number of packets that are left to the stages.
pub(super) fn run(core: &mut Core, batch: &mut OutboundBatch) -> usize {
    let mut left = 0;
    for (frame, cleartext) in batch.frames.iter_mut().zip(&batch.cleartexts) {
        let ready = if cleartext.came == Came::Forwarded { attempt(core, frame) } else { None };
        left += usize::from(ready.is_none());
        match ready {
            Some(Ready { sa, route, number, at }) => {
                batch.sas.push(sa);
                batch.routes.push(route);
                batch.numbers.push(Some(number));
                batch.at.push(at);
                batch.next.push(Next::Ready);
            }
            None => {
                batch.sas.push(NO_LINK);
                batch.routes.push(Route::Unreachable);
                batch.numbers.push(None);
                batch.at.push(0);
                batch.next.push(Next::Continue);
            }
        }
        batch.flows.push(None);
        batch.ah_numbers.push(None);
    }
    left
}

/// `None`, and nothing changed, if the packet is not a usual one.
#[inline]
fn attempt(core: &mut Core, frame: &mut Frame) -> Option<Ready> {
    let packet = core.arena.bytes(frame);
    let (key, inner, total) = read(packet)?;
    let sa = match core.flows.get(key) {
        Some(sa) => sa,
        None => {
            let sa = look_up(&core.spd, core.id, packet)?;
            core.flows.put(key, sa);
            sa
        }
    };
    let peer = core.outbound.peer(sa).filter(IpAddr::is_ipv4)?;
    let state = core.outbound.get_mut(sa)?;
    let config = &*state.config;
    let SaKey::Esp(esp_key) = &config.key else { return None };
    let room = state.sequence.remaining();
    let near = room <= RESERVE_LOW && !(state.reserving && room > 0);
    if near || state.stopped || !config.is_plain() || config.is_metered() {
        return None;
    }
    let layout = esp_key.layout();
    let at = ip4::MIN_LEN + if config.encap.is_some() { udp::LEN } else { 0 };
    let front = at + esp::HEADER_LEN + usize::from(layout.iv_len);
    let back = usize::from(esp::padding(total, usize::from(layout.block)))
        + esp::TRAILER_LEN
        + usize::from(layout.icv_len);
    let route = core.fib.lookup(peer);
    if !matches!(route, Route::Via { .. })
        || front + total + back > path_mtu(state, route)
        || front > frame.headroom()
        || back > frame.tailroom()
    {
        return None;
    }
    let number = state.sequence.reserve().ok()?;
    state.traffic = state.traffic.with(total as u64);
    state.last_used = core.now;
    frame.truncate(total);
    let headers = Headers { state, peer, bundle: None, number: &number };
    // It has room, as was seen above.
    let at = headers.write_plain(&core.arena, frame, inner, true)?;
    Some(Ready { sa, route, number, at })
}

/// What a usual packet is found by, what its outer header takes over, and its length.
#[inline]
fn read(packet: &[u8]) -> Option<(Key, Inner, usize)> {
    let head = packet.first_chunk::<HEAD>()?;
    let [0x45, tos, t0, t1, _, _, f0, f1, ttl, protocol, _, _, s @ .., d0, d1, d2, d3, p0, p1, p2, p3] =
        *head
    else {
        return None;
    };
    let total = usize::from(u16::from_be_bytes([t0, t1]));
    // RFC 791 section 3.1: DF, then More Fragments and the offset.
    let fragment = u16::from_be_bytes([f0, f1]);
    if total < HEAD || total > packet.len() || fragment & 0x3fff != 0 || ttl <= 1 {
        return None;
    }
    match Protocol(protocol) {
        Protocol::UDP => {}
        // A SYN's MSS may have to be clamped.
        Protocol::TCP if total > TCP_FLAGS && packet.get(TCP_FLAGS)? & SYN == 0 => {}
        _ => return None,
    }
    if !header::checksum_ok(packet) {
        return None;
    }
    let key = Key {
        source: u32::from_be_bytes(s),
        destination: u32::from_be_bytes([d0, d1, d2, d3]),
        ports: u32::from_be_bytes([p0, p1, p2, p3]),
        protocol,
    };
    let inner = Inner { v6: false, tos, dont_fragment: fragment & 0x4000 != 0 };
    Some((key, inner, total))
}

/// The SA that the policies give the packet, if it is one of this worker's.
fn look_up(spd: &Spd<Handle>, worker: u8, packet: &[u8]) -> Option<u32> {
    let flow = Flow::parse(packet).ok()?;
    match spd.lookup(&flow) {
        Verdict::Protect(_, Some(handle)) if handle.worker() == worker => Some(handle.index()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use postern_contract::request::Operation;
    use postern_contract::sa::{
        Action, DfPolicy, Direction, DscpPolicy, Encryption, Integrity, IpsecProtocol, Lifetime, Limits,
        Mode, PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite, UdpEncap,
    };
    use postern_contract::secret::Secret;
    use postern_contract::{Generation, Translation};
    use postern_wire::ids::Spi;
    use tempfile::TempDir;

    use super::*;
    use crate::testbed::{Layout, Testbed};

    /// A gateway whose SA has a limit, far away, so that it is not a usual one; or has none.
    fn bed(usual: bool, encap: Option<UdpEncap>, path: PathPolicy) -> (TempDir, Testbed) {
        let state = tempfile::tempdir().unwrap();
        let mut bed = Testbed::new(&Layout::default(), state.path()).unwrap();
        let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap().into();
        let selectors = || {
            vec![Selector {
                local: net("10.1.0.0/24"),
                remote: net("10.2.0.0/16"),
                protocol: None,
                local_ports: 0..=u16::MAX,
                remote_ports: 0..=60_000,
            }]
        };
        let far = Limits { packets: Some(1 << 40), ..Limits::default() };
        let suite = Suite {
            encryption: Encryption::AesGcm16,
            encryption_key: Secret::new(vec![7; 20]),
            integrity: Integrity::None,
            integrity_key: Secret::empty(),
        };
        let sa = SaConfig {
            id: SaId(1),
            generation: Generation(1),
            direction: Direction::Outbound,
            protocol: IpsecProtocol::Esp,
            mode: Mode::Tunnel,
            spi: Translation::same(Spi(0x1001)),
            local: Translation::same("192.0.2.1".parse().unwrap()),
            remote: Translation::same("198.51.100.1".parse().unwrap()),
            encap,
            suite,
            esn: true,
            replay_window: 0,
            sequence: 1,
            selectors: selectors(),
            lifetime: if usual { Lifetime::default() } else { Lifetime { hard: far, ..Lifetime::default() } },
            path,
            follow_peer: false,
            pair: None,
            bundle: None,
            static_keys: false,
            worker: None,
        };
        let policy = Policy {
            id: PolicyId(1),
            generation: Generation(1),
            priority: 1,
            selectors: selectors(),
            action: Action::Protect(Some(SaId(1))),
        };
        for done in bed.apply(vec![Operation::InstallSa(Box::new(sa)), Operation::InstallPolicy(policy)]) {
            done.unwrap();
        }
        (state, bed)
    }

    /// Packets of all kinds near what is usual, the same in each run.
    fn packets(count: u64) -> impl Iterator<Item = Vec<u8>> {
        let mut state = 1_u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % below
        };
        (0..count).map(move |_| {
            let sizes = [20, 23, 24, 33, 34, 64, 576, 1400, 1438, 1439, 1440, 1446, 1447, 1500];
            let size = sizes[random(sizes.len())];
            let mut packet: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let header = ip4::Header {
                source: Ipv4Addr::new(10, 1, 0, 2),
                destination: Ipv4Addr::new(10, 2, 0, u8::try_from(random(3)).unwrap()),
                protocol: [Protocol::TCP, Protocol::UDP, Protocol::ICMP][random(3)],
                ttl: [0, 1, 2, 64][random(4)],
                tos: u8::try_from(random(256)).unwrap(),
                id: 9,
                dont_fragment: random(2) == 0,
            };
            header.emit(&mut packet, size - 20).unwrap();
            if let Some(ports) = packet.get_mut(20..24) {
                ports.copy_from_slice(&[1, 2, [3, 255][random(2)], 4]);
            }
            match random(8) {
                0 => packet[10] ^= 1,
                1 => ip4::set_fragment(&mut packet, None, 8 * random(2), true).unwrap(),
                2 => packet.extend([0xa5; 7]),
                _ => {}
            }
            packet
        })
    }

    /// DP-5: whatever is asked of the SA, what goes the short way leaves as what goes the long way, and is counted alike.
    #[test]
    fn dp_5_both_ways_write_the_same() {
        let encap = UdpEncap { local_port: 4500, remote_port: 4501 };
        let fixed = PathPolicy {
            df: DfPolicy::Set,
            dscp: DscpPolicy::Fixed(46),
            ecn: false,
            mtu: Some(1400),
            mss_clamp: false,
        };
        let clear = PathPolicy { df: DfPolicy::Clear, ..PathPolicy::default() };
        for (encap, path) in [(None, PathPolicy::default()), (Some(encap), fixed), (None, clear)] {
            let ((_one, mut quick), (_other, mut long)) = (bed(true, encap, path), bed(false, encap, path));
            let mut sent = 0;
            for packet in packets(1500) {
                let left = quick.from_inside(&packet);
                assert_eq!(left, long.from_inside(&packet), "{packet:02x?}");
                sent += left.0.len();
            }
            assert!(sent > 400, "{sent}");
            for reason in postern_contract::counters::DropReason::ALL {
                assert_eq!(quick.drops(*reason), long.drops(*reason), "{reason:?}");
            }
            assert_eq!(quick.balance(), long.balance());
        }
    }
}
