//! The usual packet's way through the outbound stages, in columns of its own.
//!
//! Usual is TCP or UDP over IPv4 without options, whole, no SYN, and forwarded; under a plain SA of this worker whose
//! peer is on IPv4 behind a neighbour that is known (see [`Template`](crate::sad::runtime::Template)) and which is not
//! near a limit. What is not usual in any way is left as it was to the stages, which know all cases; what is usual gets
//! the same headers that they would have written.
//!
//! The batch of what is not usual is walked after this one and gets its numbers then: numbers that leave in another
//! order than their own are lost to a peer with a small replay window.

use arrayvec::ArrayVec;
use postern_contract::counters::DropReason;
use postern_wire::flow::Flow;
use postern_wire::ids::{PORT_IKE, PORT_NATT, Protocol};
use postern_wire::{checksum, esp, ether, ip4};

use super::{Came, Cleartext, OutboundBatch, RESERVE_LOW};
use crate::command::Table;
use crate::core::Core;
use crate::crypto::{Reserved, SealOp, SealOutcome};
use crate::egress;
use crate::fanout;
use crate::fib::{CachedFib, Exit, PortIndex};
use crate::flows::{Flows, Key};
use crate::frame::{BATCH, Frame};
use crate::header;
use crate::prefetch;
use crate::sad::lookup::Handle;
use crate::sad::runtime::{HEAD, NO_LINK, Outbound, Rest, Stencil, Template, Traffic, Varying};
use crate::sad::slab::Slab;
use crate::spd::{Spd, Verdict};

/// Bytes of headers with the ports: Ethernet, IPv4, ports.
const PORTS: usize = ether::LEN + ip4::MIN_LEN + 4;
/// The same with the flags of TCP.
const FLAGS: usize = ether::LEN + ip4::MIN_LEN + 14;
const SYN: u8 = 0b10;
#[expect(clippy::cast_possible_truncation, reason = "14 fits")]
const LINK: u16 = ether::LEN as u16;

/// What is known of a packet that may be usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usual {
    key: Key,
    total: u16,
    tos: u8,
    dont_fragment: bool,
}

/// One packet of the batch. Packets stay where they are from stage to stage: what every stage needs of one lies on one
/// cache line, and is not moved.
struct Packet {
    frame: Frame,
    usual: Usual,
    /// Where its flow is looked up.
    line: u32,
    sa: u32,
    /// Where it leaves; no port as long as it has no number and no headers.
    out: PortIndex,
    /// Offset of the ESP header in the frame.
    at: u16,
}

const _: () = assert!(size_of::<Packet>() <= 64);

/// So many packets before their SAs are needed, these are looked for, and their memory asked for: what was asked for is there
/// by then, and no more than the processor fetches at once is asked for in one go.
const AHEAD: usize = 8;

/// Packets that go through the stages together. While those of one part are sealed, which asks for no other memory, that of
/// the next part's SAs arrives.
const PART: usize = 32;

/// No SA has this index, nor is there nothing known yet: the packet is left to the stages.
const LONG: u32 = NO_LINK - 1;

/// No port has this number.
const NOWHERE: PortIndex = PortIndex(u16::MAX);

/// Packets of one port that may be usual. Their frames begin and end with the IP packet.
#[derive(Default)]
pub struct QuickBatch {
    packets: ArrayVec<Packet, BATCH>,
}

impl QuickBatch {
    /// Whether it holds no packet.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

/// Takes the Ethernet frames with what may be usual out of `frames` into the batch, and asks for the memory in which
/// their SAs are looked up.
pub fn take(core: &Core, batch: &mut QuickBatch, frames: &mut ArrayVec<Frame, BATCH>) {
    let mut others = ArrayVec::new();
    for mut frame in frames.drain(..) {
        if let Some(usual) = read(core.arena.bytes(&frame))
            && !batch.packets.is_full()
        {
            // `read` saw that it has so many bytes.
            let _ = frame.cut(LINK, usual.total);
            let line = core.flows.prefetch(usual.key);
            batch.packets.push(Packet { frame, usual, line, sa: NO_LINK, out: NOWHERE, at: 0 });
        } else {
            others.push(frame);
        }
    }
    std::mem::swap(frames, &mut others);
}

/// Reads the headers of an Ethernet frame with a packet that may be usual.
#[inline]
fn read(frame: &[u8]) -> Option<Usual> {
    let head = frame.first_chunk::<PORTS>()?;
    #[rustfmt::skip]
    let [
        _, _, _, _, _, _, _, _, _, _, _, _, k0, k1,
        v, tos, t0, t1, _, _, f0, f1, ttl, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3,
        p0, p1, p2, p3,
    ] = *head;
    // IPv4, and a header without options.
    if u32::from_be_bytes([k0, k1, v, 0]) != 0x0800_4500 {
        return None;
    }
    let total = u16::from_be_bytes([t0, t1]);
    let len = usize::from(total);
    // RFC 791 section 3.1: DF, then More Fragments and the offset.
    let fragment = u16::from_be_bytes([f0, f1]);
    if fragment & 0x3fff != 0 || ttl <= 1 || len + ether::LEN > frame.len() {
        return None;
    }
    match Protocol(protocol) {
        Protocol::UDP if len >= ip4::MIN_LEN + 8 => {
            // To the walk these are like any others, but not to the parser.
            if matches!(u16::from_be_bytes([p2, p3]), PORT_IKE | PORT_NATT) {
                return None;
            }
        }
        // A SYN's MSS may have to be clamped.
        Protocol::TCP if len + ether::LEN >= FLAGS && frame.first_chunk::<FLAGS>()?[FLAGS - 1] & SYN == 0 => {
        }
        _ => return None,
    }
    // RFC 1812 section 5.2.2: a router must drop a datagram whose header checksum is wrong.
    let ip = frame.get(ether::LEN..)?.first_chunk::<{ ip4::MIN_LEN }>()?;
    if !checksum::is_right(ip) {
        return None;
    }
    let key = Key {
        addresses: u64::from_le_bytes([s0, s1, s2, s3, d0, d1, d2, d3]),
        ports: u32::from_le_bytes([p0, p1, p2, p3]),
        protocol: Protocol(protocol),
    };
    Some(Usual { key, total, tos, dont_fragment: fragment & 0x4000 != 0 })
}

/// Takes a batch from `port` through all stages and leaves it empty; what is not usual goes to the end of `long`.
pub fn run(core: &mut Core, batch: &mut QuickBatch, port: PortIndex, long: &mut OutboundBatch) {
    if core.fan.wants() {
        select(core, &mut batch.packets);
        spread(core, batch, port);
    }
    let mut outcomes = ArrayVec::<_, BATCH>::new();
    let mut packets = batch.packets.as_mut_slice();
    while !packets.is_empty() {
        let (now, next) = packets.split_at_mut(PART.min(packets.len()));
        let numbers = encap(core, now);
        let ahead = PART.min(next.len());
        outcomes.extend(seal(core, now, numbers, next.get_mut(..ahead).unwrap_or_default()));
        packets = next;
    }
    let mut outcomes = outcomes.iter();
    for Packet { frame, sa, out, .. } in batch.packets.drain(..) {
        if out == NOWHERE {
            leave(core, long, frame, port);
        } else if sa != NO_LINK && outcomes.next() == Some(&SealOutcome::Sealed) {
            egress::enqueue(core, frame, port, out);
        } else {
            core.discard_of_sa(frame, port, DropReason::BadLength, Table::Outbound, sa);
        }
    }
}

/// Leaves to other workers what is to be written and sealed there (DP-8).
fn spread(core: &mut Core, batch: &mut QuickBatch, port: PortIndex) {
    let found = batch.packets.iter().filter(|packet| packet.sa != NO_LINK);
    let elephant = core.fan.elephant(found.map(|packet| (packet.sa, packet.usual.total.into())), 0);
    let Core { outbound, fib, resolver, now, fan, .. } = core;
    let mut taken = 0;
    for run in batch.packets.chunk_by_mut(|a, b| a.sa == b.sa) {
        let Some(sa) = run.first().map(|packet| packet.sa) else { continue };
        let Some(state) = outbound
            .get_mut(sa)
            .filter(|state| fan.takes(Table::Outbound, sa, &state.config, elephant == Some(sa)))
        else {
            continue;
        };
        let mut lane = Lane::of(state, fib);
        for Packet { frame, usual, sa: chosen, out, at, .. } in run {
            if let Some(lane) = &mut lane
                && let Some(number) = lane.number(frame, usual.total)
            {
                *out = lane.exit.tell(resolver, *now);
                *at = fan.number_plain(number, sa, lane.state, lane.exit);
                taken += 1;
            } else {
                // It does not overtake the others of its SA: the long way asks `takes` too.
                *chosen = LONG;
            }
        }
        if let Some(lane) = lane {
            lane.account(*now);
        }
    }
    if taken == 0 {
        return;
    }
    // Moved only now: see `egress::put_part`.
    let mut kept = ArrayVec::new();
    for packet in batch.packets.drain(..) {
        if packet.out == NOWHERE {
            kept.push(packet);
            continue;
        }
        let Packet { frame, usual: Usual { total, tos, dont_fragment, .. }, sa, at: run, .. } = packet;
        if let Err(frame) = core.fan.put_plain(frame, port, Shape { total, tos, dont_fragment }, run) {
            core.discard_of_sa(frame, port, fanout::FULL, Table::Outbound, sa);
        }
    }
    batch.packets = kept;
    fanout::hand_out(core);
}

/// Leaves a packet to the stages.
#[cold]
fn leave(core: &mut Core, long: &mut OutboundBatch, frame: Frame, port: PortIndex) {
    if let Err(frame) = long.push(frame, Cleartext { port, came: Came::Forwarded }) {
        core.discard(frame, port, DropReason::NoFrame);
    }
}

/// Finds the SAs of packets that have none yet, and asks for their memory.
#[inline]
fn select(core: &mut Core, packets: &mut [Packet]) {
    seek(&core.flows, &core.outbound, packets);
    for Packet { frame, usual, sa, .. } in packets.iter_mut().filter(|packet| packet.sa == NO_LINK) {
        *sa = look_up(core, frame, usual.key).unwrap_or(NO_LINK);
        core.outbound.prefetch(*sa);
    }
}

/// The same of those whose flows are known.
#[inline]
fn seek(flows: &Flows, outbound: &Slab<Outbound, Rest>, packets: &mut [Packet]) {
    // Packets of one flow often come one behind the other.
    let mut last = None;
    for Packet { usual, line, sa, .. } in packets.iter_mut().filter(|packet| packet.sa == NO_LINK) {
        *sa = match last {
            Some((key, sa)) if key == usual.key => sa,
            _ => {
                let found = flows.get_at(*line, usual.key).unwrap_or(NO_LINK);
                outbound.prefetch(found);
                found
            }
        };
        last = Some((usual.key, *sa));
    }
}

/// The SA that the policies give the packet, if it is one of this worker's; it is remembered.
#[cold]
fn look_up(core: &mut Core, frame: &Frame, key: Key) -> Option<u32> {
    let sa = policy(&core.spd, core.id, core.arena.bytes(frame))?;
    core.flows.put(key, sa);
    Some(sa)
}

fn policy(spd: &Spd<Handle>, worker: u8, packet: &[u8]) -> Option<u32> {
    let flow = Flow::parse(packet).ok()?;
    match spd.lookup(&flow) {
        Verdict::Protect(_, Some(handle)) if handle.worker() == worker => Some(handle.index()),
        _ => None,
    }
}

/// Gives the packets that are usual headers and trailers, and the numbers that they get, in their order; the others are
/// left as they were.
fn encap(core: &mut Core, packets: &mut [Packet]) -> ArrayVec<Reserved, PART> {
    let mut numbers = ArrayVec::new();
    let (mut now, mut next) = packets.split_at_mut(AHEAD.min(packets.len()));
    select(core, now);
    while !now.is_empty() {
        let (soon, later) = next.split_at_mut(AHEAD.min(next.len()));
        select(core, soon);
        write_all(core, now, &mut numbers);
        (now, next) = (soon, later);
    }
    numbers
}

/// The same of packets whose SAs are known.
#[inline]
fn write_all(core: &mut Core, packets: &mut [Packet], numbers: &mut ArrayVec<Reserved, PART>) {
    let Core { arena, outbound, fib, resolver, now, .. } = core;
    // Where headers and trailers go. Frames begin alike in their pages, so that few of them are in the first-level cache
    // together.
    for Packet { frame, .. } in packets.iter() {
        let bytes = arena.bytes(frame);
        prefetch::before(bytes);
        prefetch::behind(bytes);
    }
    for run in packets.chunk_by_mut(|a, b| a.sa == b.sa) {
        let state = run.first().and_then(|packet| outbound.get_mut(packet.sa));
        let Some(mut lane) = state.and_then(|state| Lane::of(state, fib)) else { continue };
        let stencil = lane.state.template.stencil();
        for Packet { frame, usual, out, at, .. } in run {
            let Usual { total, tos, dont_fragment, .. } = *usual;
            let Some(number) = lane.number(frame, total) else { continue };
            let shape = Shape { total, tos, dont_fragment };
            write(&lane.state.template, &stencil, &lane.exit.link, shape, &number, arena.bytes_mut(frame));
            (*out, *at) = (lane.exit.port, lane.at);
            numbers.push(number);
        }
        if lane.packets > 0 {
            lane.exit.tell(resolver, *now);
            lane.account(*now);
        }
    }
}

/// What packets of one SA that follow each other have in common.
struct Lane<'a> {
    state: &'a mut Outbound,
    exit: &'a mut Exit,
    /// Bytes of link and outer headers and IV.
    front: usize,
    /// Bytes of the largest IP packet.
    mtu: usize,
    /// Offset of the ESP header in the frame.
    at: u16,
    packets: u64,
    /// Of inner packets.
    bytes: u64,
}

impl<'a> Lane<'a> {
    /// `None` if the SA has no usual packets, or is so near to one of its limits that packets of this batch may reach it.
    #[expect(clippy::inline_always, reason = "two callers, and packets of many SAs are alone in it")]
    #[inline(always)]
    fn of(state: &'a mut Outbound, fib: &'a mut CachedFib) -> Option<Self> {
        let template = &mut state.template;
        if state.sequence.remaining() <= RESERVE_LOW || state.stopped || !template.is.usable() {
            return None;
        }
        let peer = template.peer();
        let exit = fib.exit_of(&mut template.exit, peer).filter(|exit| exit.ethernet)?;
        let at = LINK + template.at();
        let front = usize::from(at) + esp::HEADER_LEN + usize::from(template.iv_len);
        let mtu = usize::from(exit.mtu.min(template.mtu));
        Some(Self { state, exit, front, mtu, at, packets: 0, bytes: 0 })
    }

    /// The number of a packet of `total` bytes, and in its frame the room for headers, trailer and ICV; `None`, and the frame
    /// as it was, if it is not usual.
    #[expect(clippy::inline_always, reason = "two callers, and each packet passes")]
    #[inline(always)]
    fn number(&mut self, frame: &mut Frame, total: u16) -> Option<Reserved> {
        let Self { state, front, mtu, packets, bytes, .. } = self;
        let template = &state.template;
        let back = trailer(template, total.into()) + usize::from(template.icv_len);
        if *front - ether::LEN + usize::from(total) + back > *mtu {
            return None;
        }
        frame.grow(*front, back)?;
        let Ok(number) = state.sequence.reserve() else {
            // Not reached: there are numbers.
            let _ = frame.cut(u16::try_from(*front).ok()?, total);
            return None;
        };
        *packets += 1;
        *bytes += u64::from(total);
        Some(number)
    }

    /// Notes what went through it.
    fn account(self, now: u32) {
        if self.packets > 0 {
            let Traffic { packets, bytes } = self.state.traffic;
            self.state.traffic = Traffic { packets: packets + self.packets, bytes: bytes + self.bytes };
            self.state.last_used = now;
        }
    }
}

/// Bytes of padding and trailer behind so many.
#[expect(clippy::inline_always, reason = "two callers, and each packet passes")]
#[inline(always)]
fn trailer(template: &Template, total: usize) -> usize {
    let pad = (total + esp::TRAILER_LEN).wrapping_neg() & usize::from(template.block_mask);
    pad + esp::TRAILER_LEN
}

/// What the headers of a packet depend on, besides its SA.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// Bytes of the inner packet.
    pub total: u16,
    /// Its TOS.
    pub tos: u8,
    /// Its DF.
    pub dont_fragment: bool,
}

/// Writes headers and trailer into the room that [`number`] made.
#[expect(clippy::inline_always, reason = "two callers, and each packet passes")]
#[inline(always)]
pub(crate) fn write(
    template: &Template,
    stencil: &Stencil,
    exit: &[u8; ether::LEN],
    shape: Shape,
    number: &Reserved,
    bytes: &mut [u8],
) {
    let total = usize::from(shape.total);
    let trailer = trailer(template, total);
    let front = usize::from(template.at()) + esp::HEADER_LEN + usize::from(template.iv_len);
    let outer = front + total + trailer + usize::from(template.icv_len);
    let front = ether::LEN + front;
    // Not `None`: there is room for trailer and ICV, which are longer than a word.
    if let Some(end) = bytes.get_mut(front + total..) {
        let pad = u8::try_from(trailer - esp::TRAILER_LEN).unwrap_or(u8::MAX);
        match (end.first_chunk_mut(), esp::trailer_word(pad, Protocol::IPV4)) {
            (Some(end), Some(word)) => *end = word,
            _ => _ = end.get_mut(..trailer).and_then(|end| esp::write_trailer(end, Protocol::IPV4)),
        }
    }
    if let Some(inner) = bytes.get_mut(front..).and_then(<[u8]>::first_chunk_mut) {
        header::forward(inner);
    }
    if let Some((link, rest)) = bytes.split_first_chunk_mut::<{ ether::LEN }>()
        && let Some(head) = rest.first_chunk_mut::<HEAD>()
    {
        *link = *exit;
        let [.., n0, n1] = number.low().to_be_bytes();
        let (id, total) = (u16::from_be_bytes([n0, n1]), u16::try_from(outer).unwrap_or_default());
        // What is written behind the SPI is the place of number and IV: see `Template`.
        let Shape { tos, dont_fragment, .. } = shape;
        stencil.write(head, Varying { tos, dont_fragment, id, total });
    }
}

/// Encrypts and authenticates the packets that have a number, with those numbers; the outcomes are in the same order. Meanwhile
/// the memory of the SAs of `next` is asked for.
fn seal<'a>(
    core: &'a mut Core,
    packets: &'a mut [Packet],
    numbers: ArrayVec<Reserved, PART>,
    next: &mut [Packet],
) -> ArrayVec<SealOutcome, PART> {
    let Core { arena, outbound, crypto, flows, .. } = core;
    let mut sealing = crypto.sealing();
    let mut last = (NO_LINK, None);
    let ready = packets.iter_mut().filter(|packet| packet.out != NOWHERE);
    for (Packet { frame, sa, at, .. }, sequence) in ready.zip(numbers) {
        if last.0 != *sa {
            let of_sa = |state: &'a Outbound| Some((state.esp_key()?, state.template.is.esn()));
            last = (*sa, outbound.get(*sa).and_then(of_sa));
        }
        let packet = arena.bytes_mut(frame).get_mut(usize::from(*at)..);
        let Some(((key, esn), packet)) = last.1.zip(packet) else {
            // Not reached: each packet got its number from an SA that has a key, and has room for the header. One that
            // came here would have no outcome, and not be sent.
            *sa = NO_LINK;
            continue;
        };
        sealing.push(SealOp { key, sequence, esn, packet });
    }
    let mut next = next.chunks_mut(AHEAD);
    sealing.finish_while(|| seek(flows, outbound, next.next().unwrap_or_default()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;

    use postern_contract::request::Operation;
    use postern_contract::sa::{
        Action, DfPolicy, Direction, DscpPolicy, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin,
        Lifetime, Limits, Mode, PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite, UdpEncap,
    };
    use postern_contract::secret::Secret;
    use postern_contract::{Generation, Translation};
    use postern_wire::ids::Spi;
    use postern_wire::steer::{Class, Link, classify};
    use proptest::prelude::*;
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
            fan_out: FanOut::ByLoad,
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

    proptest! {
        /// DP-1, DP-5: what is read in a few steps is what the parsers read.
        #[test]
        fn dp_5_headers_are_read_alike(
            mut frame in prop::collection::vec(any::<u8>(), 14..90),
            protocol in prop::sample::select(vec![6_u8, 17, 50, 1]),
            fragment in prop::sample::select(vec![0_u16, 0x4000, 0x2000, 1, 0x8000]),
            total in prop::option::of(0_u16..90),
            port in prop::sample::select(vec![500_u16, 4500, 53, 80]),
            version in prop::sample::select(vec![0x45_u8, 0x45, 0x45, 0x46, 0x60]),
            ttl in 0_u8..4,
            right in prop::bool::weighted(0.9),
        ) {
            frame[12..14].copy_from_slice(&[8, 0]);
            if frame.len() >= 48 {
                let total = total.unwrap_or(u16::try_from(frame.len() - 14).unwrap());
                frame[14] = version;
                frame[16..18].copy_from_slice(&total.to_be_bytes());
                frame[20..22].copy_from_slice(&fragment.to_be_bytes());
                (frame[22], frame[23]) = (ttl, protocol);
                frame[36..38].copy_from_slice(&port.to_be_bytes());
                frame[24..26].fill(0);
                if right {
                    let check = checksum::finish(checksum::sum(&frame[14..34]));
                    frame[24..26].copy_from_slice(&check.to_be_bytes());
                }
            }
            if let Some(usual) = read(&frame) {
                let packet = &frame[14..];
                prop_assert_eq!(classify(&frame.as_slice(), Link::Ethernet).class, Class::Ip);
                prop_assert!(crate::header::checksum_ok(packet));
                let flow = Flow::parse(packet).unwrap();
                let ports = [flow.source_port.to_be_bytes(), flow.destination_port.to_be_bytes()].concat();
                let key = Key {
                    addresses: u64::from_le_bytes(packet[12..20].try_into().unwrap()),
                    ports: u32::from_le_bytes(ports.try_into().unwrap()),
                    protocol: flow.protocol,
                };
                let expected =
                    Usual { key, total: flow.total_len, tos: flow.tos, dont_fragment: flow.dont_fragment };
                prop_assert_eq!(usual, expected);
                prop_assert!(flow.ttl > 1 && flow.ports_known && flow.header_len == 20);
                prop_assert!(flow.protocol == Protocol::UDP || packet[33] & SYN == 0);
            }
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
