//! The usual packet's way through the outbound stages.
//!
//! Usual is TCP or UDP over IPv4 without options, whole, no SYN, and forwarded; under a plain SA whose peer is on IPv4
//! and which is not near a limit. What is not usual in any way is left as it was to the stages, which know all cases;
//! what is usual gets the same headers that they would have written.
//!
//! Packets behind one that is not usual get their numbers and headers later, in turn with the others: numbers that leave
//! in another order than their own are lost to a peer with a small replay window.

use std::net::IpAddr;

use postern_contract::sa::{DfPolicy, DscpPolicy};
use postern_wire::flow::Flow;
use postern_wire::ids::Protocol;
use postern_wire::{checksum, esp, ip4, udp};

use super::{Came, Inner, Next, OUTER_TTL, OutboundBatch, RESERVE_LOW, path_mtu};
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
const ECN: u8 = 0b11;

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
    let OutboundBatch { frames, usual, sas, routes, numbers, at, next, .. } = batch;
    let mut left = 0;
    let mut plan = None;
    for (frame, place) in frames.iter_mut().zip(usual) {
        let fitting = place.as_ref().and_then(|usual| {
            if several {
                prefetch_key(core, usual.sa);
            }
            if !current(plan.as_ref(), usual.sa) {
                plan = far(core, usual.sa).and_then(|()| Plan::of(core, usual.sa));
            }
            plan.as_ref().filter(|plan| plan.fits(frame, usual)).map(|plan| (usual, plan))
        });
        let (mut number, mut offset) = (None, 0);
        if let Some((usual, plan)) = fitting {
            sas.push(usual.sa);
            routes.push(plan.route);
            next.push(Next::Ready);
            // Behind a packet that is not usual it has to wait for its number.
            if left == 0 {
                number = plan.write(core, frame, usual);
                offset = plan.at;
            }
        } else {
            *place = None;
            left += 1;
            sas.push(NO_LINK);
            routes.push(Route::Unreachable);
            next.push(Next::Continue);
        }
        numbers.push(number);
        at.push(offset);
    }
    for _ in 0..batch.frames.len() {
        batch.flows.push(None);
        batch.ah_numbers.push(None);
    }
    left
}

/// Numbers and headers for the usual packets that had to wait: in turn with the others.
pub(super) struct Waiting(Option<Plan>);

impl Waiting {
    /// None yet.
    pub(super) const NONE: Self = Self(None);

    /// The packet's number and where its ESP header is.
    pub(super) fn write(
        &mut self,
        core: &mut Core,
        frame: &mut Frame,
        usual: &Usual,
    ) -> Option<(Reserved, u16)> {
        if !current(self.0.as_ref(), usual.sa) {
            self.0 = Plan::of(core, usual.sa);
        }
        let plan = self.0.as_ref()?;
        Some((plan.write(core, frame, usual)?, plan.at))
    }
}

fn current(plan: Option<&Plan>, sa: u32) -> bool {
    plan.is_some_and(|plan| plan.sa == sa)
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

/// Whether the SA is so far from all its limits that no packet of this batch comes near.
fn far(core: &Core, sa: u32) -> Option<()> {
    let state = core.outbound.get(sa)?;
    (state.sequence.remaining() > RESERVE_LOW && !state.stopped && !state.config.is_metered()).then_some(())
}

/// Bytes of the longest headers: IPv4, UDP, ESP without IV.
const LONGEST: usize = ip4::MIN_LEN + udp::LEN + esp::HEADER_LEN;
/// The shortest.
const SHORTEST: usize = ip4::MIN_LEN + esp::HEADER_LEN;

/// What the usual packets of one SA have in common.
struct Plan {
    sa: u32,
    route: Route,
    /// Headers in which TOS, lengths, identification, flags, checksum and number are zero.
    template: [u8; LONGEST],
    /// Of the outer IPv4 header.
    sum: u64,
    /// Offset of the ESP header.
    at: u16,
    /// Bytes before the inner packet.
    front: usize,
    block: usize,
    icv_len: usize,
    /// Bytes of the largest outer packet.
    limit: usize,
    /// The bits of the inner TOS that are copied, and those that are set.
    tos: (u8, u8),
    df: DfPolicy,
}

impl Plan {
    /// `None` if packets of the SA are not usual.
    fn of(core: &mut Core, sa: u32) -> Option<Self> {
        let peer = core.outbound.peer(sa)?;
        let state = core.outbound.get(sa)?;
        let config = &*state.config;
        let (SaKey::Esp(key), IpAddr::V4(source), IpAddr::V4(destination)) =
            (&config.key, config.local, peer)
        else {
            return None;
        };
        let route = core.fib.lookup(peer);
        if !config.is_plain() || !matches!(route, Route::Via { .. }) {
            return None;
        }
        let layout = key.layout();
        let mut template = [0; LONGEST];
        let protocol = if config.encap.is_some() { Protocol::UDP } else { Protocol::ESP };
        let header = ip4::Header {
            source,
            destination,
            protocol,
            ttl: OUTER_TTL,
            tos: 0,
            id: 0,
            dont_fragment: false,
        };
        header.emit(&mut template, 0)?;
        header::put(&mut template, 2, [0; 2]);
        header::put(&mut template, 10, [0; 2]);
        let sum = checksum::sum(template.first_chunk::<{ ip4::MIN_LEN }>()?);
        let mut at = ip4::MIN_LEN;
        if let Some(encap) = config.encap {
            udp::Header {
                source_port: encap.local_port,
                destination_port: state.peer_port,
                length: 0,
                checksum: 0,
            }
            .emit(template.get_mut(at..)?)?;
            at += udp::LEN;
        }
        header::put(&mut template, at, config.spi.on_wire.0.to_be_bytes());
        let ecn = if config.path.ecn { ECN } else { 0 };
        Some(Self {
            sa,
            route,
            template,
            sum,
            at: u16::try_from(at).ok()?,
            front: at + esp::HEADER_LEN + usize::from(layout.iv_len),
            block: usize::from(layout.block),
            icv_len: usize::from(layout.icv_len),
            limit: path_mtu(state, route),
            tos: match config.path.dscp {
                DscpPolicy::Copy => (!ECN | ecn, 0),
                DscpPolicy::Fixed(dscp) => (ecn, dscp << 2),
            },
            df: config.path.df,
        })
    }

    /// Padding and the two bytes behind it.
    #[inline]
    fn trailer(&self, total: usize) -> usize {
        usize::from(esp::padding(total, self.block)) + esp::TRAILER_LEN
    }

    #[inline]
    fn fits(&self, frame: &Frame, usual: &Usual) -> bool {
        let total = usize::from(usual.total);
        let back = self.trailer(total) + self.icv_len;
        self.front + total + back <= self.limit && self.front <= frame.headroom() && back <= frame.tailroom()
    }

    /// Gives a packet that fits a number, headers and trailer.
    #[inline]
    fn write(&self, core: &mut Core, frame: &mut Frame, usual: &Usual) -> Option<Reserved> {
        let state = core.outbound.get_mut(self.sa)?;
        let number = state.sequence.reserve().ok()?;
        state.traffic = state.traffic.with(u64::from(usual.total));
        state.last_used = core.now;
        let total = usize::from(usual.total);
        let trailer = self.trailer(total);
        frame.truncate(total);
        frame.grow_front(self.front)?;
        frame.grow_back(trailer + self.icv_len)?;
        let (head, inner) = core.arena.bytes_mut(frame).split_at_mut_checked(self.front)?;
        ip4::decrement_ttl(inner)?;
        esp::write_trailer(inner.get_mut(total..total + trailer)?, Protocol::IPV4)?;
        let outer = self.front + inner.len();
        if let Some(head) = head.first_chunk_mut::<LONGEST>() {
            // Without UDP, what is written behind is the IV's place.
            *head = self.template;
        } else {
            *head.first_chunk_mut::<SHORTEST>()? = *self.template.first_chunk()?;
        }
        if usize::from(self.at) > ip4::MIN_LEN {
            let length = u16::try_from(outer - ip4::MIN_LEN).ok()?;
            header::put(head, ip4::MIN_LEN + 4, length.to_be_bytes());
        }
        self.vary(head.first_chunk_mut()?, outer, &number, usual.inner)?;
        Some(number)
    }

    /// What the outer IPv4 header of one packet has of its own.
    #[inline]
    fn vary(
        &self,
        head: &mut [u8; ip4::MIN_LEN],
        outer: usize,
        number: &Reserved,
        inner: Inner,
    ) -> Option<()> {
        let dont_fragment = match self.df {
            DfPolicy::Copy => inner.dont_fragment,
            DfPolicy::Set => true,
            DfPolicy::Clear => false,
        };
        // RFC 6864: an atomic datagram's ID has no meaning; others need one that does not come back soon.
        let (id, flags) =
            if dont_fragment { (0, 0x4000) } else { (u16::try_from(number.low() & 0xffff).ok()?, 0) };
        let tos = inner.tos & self.tos.0 | self.tos.1;
        let len = u16::try_from(outer).ok()?;
        let varying = u64::from(tos) + u64::from(len) + u64::from(id) + u64::from(flags);
        let check = checksum::finish(self.sum + varying);
        let ([l0, l1], [i0, i1]) = (len.to_be_bytes(), id.to_be_bytes());
        let ([f0, f1], [c0, c1]) = (u16::to_be_bytes(flags), check.to_be_bytes());
        (head[1], head[2], head[3]) = (tos, l0, l1);
        (head[4], head[5], head[6], head[7]) = (i0, i1, f0, f1);
        (head[10], head[11]) = (c0, c1);
        Some(())
    }
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
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use postern_contract::request::Operation;
    use postern_contract::sa::{
        Action, DfPolicy, Direction, DscpPolicy, Encryption, Integrity, IpsecProtocol, KeyOrigin, Lifetime,
        Limits, Mode, PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite, UdpEncap,
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
            origin: KeyOrigin::Negotiated,
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
    pub(crate) fn packets(count: u64) -> impl Iterator<Item = Vec<u8>> {
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
