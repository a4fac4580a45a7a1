//! The usual packet's way through the outbound stages.
//!
//! Usual is TCP or UDP over IPv4 without options, whole, no SYN, and forwarded; under a plain SA whose peer is on IPv4
//! and which is not near a limit. What is not usual in any way is left as it was to the stages, which know all cases;
//! what is usual gets the same headers that they would have written.
//!
//! [`run`] changes nothing. Numbers are taken by [`write`], in turn with the packets that are not usual: numbers that
//! leave in another order than their own are lost to a peer with a small replay window.

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
use crate::prefetch;
use crate::sad::config::SaKey;
use crate::sad::lookup::Handle;
use crate::sad::runtime::NO_LINK;
use crate::spd::{Spd, Verdict};

/// IPv4 header and ports.
const HEAD: usize = ip4::MIN_LEN + 4;
/// Where the flags of a TCP segment are.
const TCP_FLAGS: usize = ip4::MIN_LEN + 13;
const SYN: u8 = 0b10;

/// What is known of a usual packet.
#[derive(Clone, Copy)]
pub(super) struct Usual {
    key: Key,
    inner: Inner,
    total: u16,
    sa: u32,
}

/// Fills the columns, of what is usual and of what is not. Gives the number of packets that are left to the stages.
pub(super) fn run(core: &mut Core, batch: &mut OutboundBatch) -> usize {
    for (frame, cleartext) in batch.frames.iter().zip(&batch.cleartexts) {
        let forwarded = cleartext.came == Came::Forwarded;
        let usual = if forwarded { read(core.arena.bytes(frame)) } else { None };
        if let Some(usual) = &usual {
            core.flows.prefetch(usual.key);
        }
        batch.usual.push(usual);
    }
    let mut several = false;
    let mut first = NO_LINK;
    for (frame, place) in batch.frames.iter().zip(&mut batch.usual) {
        let Some(usual) = place else { continue };
        if let Some(sa) = find(core, frame, usual.key) {
            usual.sa = sa;
            core.outbound.prefetch(sa);
            several |= first != NO_LINK && first != sa;
            first = sa;
        } else {
            *place = None;
        }
    }
    if several {
        warm(core, batch);
    }
    let mut left = 0;
    for (frame, place) in batch.frames.iter().zip(&mut batch.usual) {
        let route = place.and_then(|usual| route(core, frame, &usual));
        if several && let Some(usual) = place {
            prefetch_key(core, usual.sa);
        }
        if route.is_none() {
            *place = None;
            left += 1;
        }
        batch.sas.push(place.map_or(NO_LINK, |usual| usual.sa));
        batch.routes.push(route.unwrap_or(Route::Unreachable));
        batch.next.push(if route.is_some() { Next::Ready } else { Next::Continue });
        batch.flows.push(None);
        batch.numbers.push(None);
        batch.ah_numbers.push(None);
        batch.at.push(0);
    }
    left
}

/// The SA of a flow, if it is one of this worker's.
#[inline]
fn find(core: &mut Core, frame: &Frame, key: Key) -> Option<u32> {
    core.flows.get(key).or_else(|| {
        let sa = look_up(&core.spd, core.id, core.arena.bytes(frame))?;
        core.flows.put(key, sa);
        Some(sa)
    })
}

/// Asks for all that the batch's SAs will be asked, one thing of all of them after the other.
fn warm(core: &Core, batch: &OutboundBatch) {
    let sas = || batch.usual.iter().flatten().map(|usual| usual.sa);
    for state in sas().filter_map(|sa| core.outbound.get(sa)) {
        prefetch::object(&*state.config);
    }
    for sa in sas() {
        if let Some((state, peer)) = core.outbound.get(sa).zip(core.outbound.peer(sa)) {
            core.fib.prefetch(peer);
            if let SaKey::Esp(key) = &state.config.key {
                core.crypto.prefetch_place(key);
            }
        }
    }
}

fn prefetch_key(core: &Core, sa: u32) {
    if let Some(SaKey::Esp(key)) = core.outbound.get(sa).map(|state| &state.config.key) {
        core.crypto.prefetch(key);
    }
}

/// The way of a packet, if it is still usual when its SA is known.
#[inline]
fn route(core: &mut Core, frame: &Frame, usual: &Usual) -> Option<Route> {
    let peer = core.outbound.peer(usual.sa).filter(IpAddr::is_ipv4)?;
    let state = core.outbound.get(usual.sa)?;
    let config = &*state.config;
    let SaKey::Esp(key) = &config.key else { return None };
    // So far from the limit that no packet of this batch comes near.
    if state.sequence.remaining() <= RESERVE_LOW || state.stopped || !config.is_plain() || config.is_metered()
    {
        return None;
    }
    let layout = key.layout();
    let total = usize::from(usual.total);
    let at = ip4::MIN_LEN + if config.encap.is_some() { udp::LEN } else { 0 };
    let front = at + esp::HEADER_LEN + usize::from(layout.iv_len);
    let back = usize::from(esp::padding(total, usize::from(layout.block)))
        + esp::TRAILER_LEN
        + usize::from(layout.icv_len);
    let route = core.fib.lookup(peer);
    let fits = matches!(route, Route::Via { .. })
        && front + total + back <= path_mtu(state, route)
        && front <= frame.headroom()
        && back <= frame.tailroom();
    fits.then_some(route)
}

/// Gives the packet a number and its headers: the number, and where the ESP header is.
#[inline]
pub(super) fn write(core: &mut Core, frame: &mut Frame, sa: u32, usual: &Usual) -> Option<(Reserved, u16)> {
    let peer = core.outbound.peer(sa)?;
    let state = core.outbound.get_mut(sa)?;
    let number = state.sequence.reserve().ok()?;
    state.traffic = state.traffic.with(u64::from(usual.total));
    state.last_used = core.now;
    frame.truncate(usize::from(usual.total));
    let headers = Headers { state, peer, bundle: None, number: &number };
    // It has room, as `route` saw.
    let at = headers.write_plain(&core.arena, frame, usual.inner, true)?;
    Some((number, at))
}

/// A packet that may be usual; its SA is not known yet.
#[inline]
fn read(packet: &[u8]) -> Option<Usual> {
    let head = packet.first_chunk::<HEAD>()?;
    let [0x45, tos, t0, t1, _, _, f0, f1, ttl, protocol, _, _, s @ .., d0, d1, d2, d3, p0, p1, p2, p3] =
        *head
    else {
        return None;
    };
    let total_len = u16::from_be_bytes([t0, t1]);
    let total = usize::from(total_len);
    // RFC 791 section 3.1: DF, then More Fragments and the offset.
    let fragment = u16::from_be_bytes([f0, f1]);
    if total < HEAD || total > packet.len() || fragment.trailing_zeros() < 14 || ttl <= 1 {
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
    Some(Usual { key, inner, total: total_len, sa: NO_LINK })
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
    use crate::testbed::{INSIDE, Layout, Testbed};

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
            assert!(sent > 300, "{sent}");
            for reason in postern_contract::counters::DropReason::ALL {
                assert_eq!(quick.drops(*reason), long.drops(*reason), "{reason:?}");
            }
            assert_eq!(quick.balance(), long.balance());
        }
    }

    /// DP-4: packets leave in the order of their numbers, whichever way they took; a peer's window may be as small as 32.
    #[test]
    fn dp_4_numbers_leave_in_order() {
        let (_state, mut bed) = bed(true, None, PathPolicy::default());
        let mut last = 0;
        for batch in packets(1000).collect::<Vec<_>>().chunks(64) {
            for packet in batch {
                bed.push(INSIDE, packet);
            }
            for sent in bed.departed().0 {
                let number = esp::Header::parse(&sent[20..]).unwrap().sequence;
                assert!(number > last, "{number} after {last}");
                last = number;
            }
        }
        assert!(last > 200, "{last}");
    }
}
