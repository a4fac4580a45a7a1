//! The usual ESP packet's way through the inbound stages, in columns of its own.
//!
//! Usual is ESP over IPv4, in UDP or not, without options and whole; for a plain SA of this worker (see
//! [`Expected`](crate::sad::runtime::Expected)), or for a relay entry; with TCP or UDP over IPv4 in it, no SYN, that
//! leaves through a port where its neighbour is known, and with neither packet marked by ECN. What is not usual in any
//! way, or not in order, is left as it was to the stages, which know all cases and all complaints: before decryption in
//! their batch, which is walked after this one, and after it in the packet's turn, so that packets of one tunnel stay in
//! order.

use arrayvec::ArrayVec;
use postern_contract::counters::DropReason;
use postern_contract::sa::IpsecProtocol;
use postern_wire::ids::{PORT_NATT, Protocol, Spi};
use postern_wire::{checksum, esp, ether, ip4, udp};

use super::{Arrival, InboundBatch, Next, decap, dispatch, follow, replay_reason};
use crate::command::Table;
use crate::core::Core;
use crate::crypto::{OpenOp, Outcome};
use crate::egress;
use crate::fanout;
use crate::fib::{CachedFib, Exit, PortIndex};
use crate::frame::{BATCH, Frame};
use crate::header;
use crate::relay;
use crate::sad::lookup::Handle;
use crate::sad::replay::Newest;
use crate::sad::runtime::{Expected, Inbound, NO_LINK};

/// Bytes of headers up to the sequence number: Ethernet, IPv4, ESP.
const PLAIN: usize = ether::LEN + ip4::MIN_LEN + esp::HEADER_LEN;
/// The same in UDP.
const ENCAPSULATED: usize = PLAIN + udp::LEN;
/// Bytes of an inner packet that are looked at: IPv4 header and ports.
const INNER: usize = ip4::MIN_LEN + 4;
/// The same with the flags of TCP.
const INNER_TCP: usize = ip4::MIN_LEN + 14;
const SYN: u8 = 0b10;
const ECN: u8 = 0b11;

/// What is known of a packet from its outer headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    spi: u32,
    sequence: u32,
    source: u32,
    destination: u32,
    /// Bytes of the IP packet.
    total: u16,
    /// Source port of UDP; 0 without.
    port: u16,
    /// Offset of the ESP header from the IP header.
    pub(crate) at: u8,
    pub(crate) tos: u8,
}

/// One packet of the batch. Packets stay where they are from stage to stage: what every stage needs of one lies on one
/// cache line, and is not moved.
struct Packet {
    frame: Frame,
    head: Head,
    fate: Fate,
    /// Of the SA or of the translation.
    place: u32,
    /// With its high half.
    sequence: u64,
}

const _: () = assert!(size_of::<Packet>() <= 64);

/// A packet's SA is looked for so many packets behind it: what was asked for is there by then, and the SA's own memory is
/// asked for while further packets are read.
const BEHIND: usize = 8;

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is opened.
    Open,
    /// It is translated.
    Relay,
    /// It is left to the stages.
    Long,
    /// It is dropped, and counted on the SA.
    Drop(DropReason),
}

/// Packets of one port that may be usual. Their frames begin and end with the IP packet, and have room for a link header
/// in front.
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

#[expect(clippy::cast_possible_truncation, reason = "14 fits")]
const LINK: u16 = ether::LEN as u16;

/// Takes the Ethernet frames with what may be usual out of `frames` into the batch, and asks for the memory in which
/// their SAs are looked up.
pub fn take(core: &Core, batch: &mut QuickBatch, frames: &mut ArrayVec<Frame, BATCH>) {
    let (lookup, relays) = (!core.spis.is_empty(), !core.relays.is_empty());
    let mut others = ArrayVec::new();
    for frame in frames.drain(..) {
        if let Some(head) = read(core.arena.bytes(&frame))
            && !batch.packets.is_full()
        {
            if lookup {
                core.spis.prefetch(Spi(head.spi));
            }
            if relays {
                relay::prefetch(&core.relays, head.spi, head.destination);
            }
            batch.packets.push(Packet { frame, head, fate: Fate::Long, place: 0, sequence: 0 });
            // In its place: see `egress::put_part`. `read` saw that it has so many bytes.
            let _ = batch.packets.last_mut().and_then(|packet| packet.frame.cut(LINK, head.total));
            let behind = batch.packets.len().checked_sub(BEHIND);
            if let Some(packet) = behind.and_then(|at| batch.packets.get_mut(at)) {
                seek(core, packet, lookup, relays);
            }
        } else {
            others.push(frame);
        }
    }
    std::mem::swap(frames, &mut others);
}

/// Reads the headers of an Ethernet frame with a usual packet, as [`classify`](postern_wire::steer::classify) and the
/// worker's checks read them.
#[inline]
fn read(frame: &[u8]) -> Option<Head> {
    let head = frame.first_chunk::<PLAIN>()?;
    #[rustfmt::skip]
    let [
        _, _, _, _, _, _, _, _, _, _, _, _, k0, k1,
        v, tos, t0, t1, _, _, f0, f1, _, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3,
        i0, i1, i2, i3, n0, n1, n2, n3,
    ] = *head;
    // IPv4, and a header without options.
    if u32::from_be_bytes([k0, k1, v, 0]) != 0x0800_4500 {
        return None;
    }
    let total = u16::from_be_bytes([t0, t1]);
    let len = usize::from(total);
    // RFC 791 section 3.1: More Fragments and the offset.
    let fragment = u16::from_be_bytes([f0, f1]) & 0x3fff;
    if fragment != 0 || len + ether::LEN > frame.len() {
        return None;
    }
    let ip = frame.get(ether::LEN..)?.first_chunk::<{ ip4::MIN_LEN }>()?;
    if !checksum::is_right(ip) {
        return None;
    }
    let plain = Head {
        spi: u32::from_be_bytes([i0, i1, i2, i3]),
        sequence: u32::from_be_bytes([n0, n1, n2, n3]),
        source: u32::from_be_bytes([s0, s1, s2, s3]),
        destination: u32::from_be_bytes([d0, d1, d2, d3]),
        total,
        port: 0,
        at: IP,
        tos,
    };
    match Protocol(protocol) {
        Protocol::ESP if len >= ip4::MIN_LEN + esp::HEADER_LEN => Some(plain),
        Protocol::UDP => encapsulated(frame, plain),
        _ => None,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "20 and 28 fit")]
const IP: u8 = ip4::MIN_LEN as u8;
#[expect(clippy::cast_possible_truncation, reason = "20 and 28 fit")]
const IP_UDP: u8 = (ip4::MIN_LEN + udp::LEN) as u8;

/// The same of ESP in UDP: where `plain` has SPI and number there are ports and lengths.
#[inline]
fn encapsulated(frame: &[u8], plain: Head) -> Option<Head> {
    let [i0, i1, i2, i3, n0, n1, n2, n3] =
        *frame.first_chunk::<ENCAPSULATED>()?.last_chunk::<{ esp::HEADER_LEN }>()?;
    let [p0, p1, q0, q1] = plain.spi.to_be_bytes();
    let [l0, l1, _, _] = plain.sequence.to_be_bytes();
    let length = u16::from_be_bytes([l0, l1]);
    let whole = usize::from(length) + ip4::MIN_LEN == usize::from(plain.total);
    let spi = u32::from_be_bytes([i0, i1, i2, i3]);
    // RFC 3948 section 2.2: zero is IKE's marker.
    let esp = spi != 0 && usize::from(length) >= udp::LEN + esp::HEADER_LEN;
    (u16::from_be_bytes([q0, q1]) == PORT_NATT && whole && esp).then_some(Head {
        spi,
        sequence: u32::from_be_bytes([n0, n1, n2, n3]),
        port: u16::from_be_bytes([p0, p1]),
        at: IP_UDP,
        ..plain
    })
}

impl Head {
    fn arrival(&self, port: PortIndex) -> Arrival {
        Arrival {
            transport: self.at.into(),
            encapsulated: self.encapsulated(),
            ..Arrival::plain_from(port, self.source)
        }
    }

    #[inline]
    fn encapsulated(&self) -> bool {
        self.at > IP
    }
}

/// Takes a batch from `port` through all stages and leaves it empty; what is not usual goes to the end of `long`.
pub fn run(core: &mut Core, batch: &mut QuickBatch, port: PortIndex, long: &mut InboundBatch) {
    lookup(core, batch);
    let outcomes = if batch.packets.iter().any(|packet| packet.fate == Fate::Open) {
        warm(core, batch);
        if core.fan.wants() {
            precheck(core, batch);
            spread(core, batch, port);
        }
        open(core, batch)
    } else {
        ArrayVec::new()
    };
    deliver(core, batch, &outcomes, port, long);
}

/// Finds what [`take`] did not.
fn lookup(core: &Core, batch: &mut QuickBatch) {
    let (lookup, relays) = (!core.spis.is_empty(), !core.relays.is_empty());
    for packet in batch.packets.iter_mut().filter(|packet| packet.fate == Fate::Long) {
        seek(core, packet, lookup, relays);
    }
}

/// Finds the SA or the translation of a packet, in the tables that are not empty.
#[inline]
fn seek(core: &Core, packet: &mut Packet, lookup: bool, relays: bool) {
    let found = if lookup { find(core, packet) } else { None };
    if found.is_none() && relays && !packet.head.encapsulated() {
        packet.fate = Fate::Relay;
        packet.place = relay::find(&core.relays, packet.head.spi, packet.head.destination);
    }
}

/// Finds the SA of a packet; if it is this worker's, the packet is opened, and the SA's memory asked for.
#[inline]
fn find(core: &Core, packet: &mut Packet) -> Option<Handle> {
    let handle = core.spis.get(IpsecProtocol::Esp, Spi(packet.head.spi))?;
    if handle.worker() == core.id {
        core.inbound.prefetch(handle.index());
        (packet.fate, packet.place) = (Fate::Open, handle.index());
    }
    Some(handle)
}

/// As the stage of the same name.
fn precheck(core: &Core, batch: &mut QuickBatch) {
    for packet in batch.packets.iter_mut().filter(|packet| packet.fate == Fate::Open) {
        examine(core.inbound.get(packet.place), packet);
    }
}

/// Gives a packet the number that it is opened with, or takes it out of those that are.
#[expect(clippy::inline_always, reason = "two callers, and each packet passes")]
#[inline(always)]
fn examine(state: Option<&Inbound>, packet: &mut Packet) {
    let Some(state) = state.filter(|state| state.expected.is.usable() && !state.stopped) else {
        packet.fate = Fate::Long;
        return;
    };
    packet.sequence = state.window.recover(packet.head.sequence);
    if let Err(error) = state.window.precheck(packet.sequence) {
        packet.fate = Fate::Drop(replay_reason(error));
    }
}

/// Asks for what the batch's SAs have elsewhere, if they are several; a single one is in the cache.
fn warm(core: &Core, batch: &QuickBatch) {
    let ours = || batch.packets.iter().filter(|packet| packet.fate == Fate::Open).map(|packet| packet.place);
    let first = ours().next();
    if ours().all(|place| Some(place) == first) {
        return;
    }
    for state in ours().filter_map(|place| core.inbound.get(place)) {
        state.window.prefetch();
    }
}

/// As the stages `precheck` and `open`; an outcome for each packet that is opened.
fn open(core: &mut Core, batch: &mut QuickBatch) -> ArrayVec<Outcome, BATCH> {
    let Core { arena, inbound, crypto, .. } = core;
    // Packets of one SA often come one behind the other.
    let mut last = (NO_LINK, None);
    let mut opening = crypto.opening();
    for packet in batch.packets.iter_mut().filter(|packet| packet.fate == Fate::Open) {
        if last.0 != packet.place {
            last = (packet.place, inbound.get(packet.place));
        }
        let state = last.1;
        examine(state, packet);
        let Packet { frame, head, fate: fate @ Fate::Open, sequence, .. } = packet else { continue };
        let bytes = arena.bytes_mut(frame).get_mut(usize::from(head.at)..);
        let found = state.and_then(|state| Some((state.esp_key()?, state.expected.is.esn()))).zip(bytes);
        let Some(((key, esn), packet)) = found else {
            *fate = Fate::Long;
            continue;
        };
        opening.push(OpenOp { key, sequence: *sequence, esn, packet, outcome: Outcome::Pending });
    }
    opening.finish()
}

/// Accept, decap, translate and deliver, each packet in its turn.
fn deliver(
    core: &mut Core,
    batch: &mut QuickBatch,
    outcomes: &[Outcome],
    port: PortIndex,
    long: &mut InboundBatch,
) {
    let mut outcomes = outcomes.iter();
    for Packet { frame, head, fate, place, sequence } in batch.packets.drain(..) {
        let reason = match fate {
            Fate::Relay => {
                relay::run_quick(core, frame, place, port);
                continue;
            }
            Fate::Open => match outcomes.next() {
                Some(Outcome::Opened) => {
                    arrive(core, frame, &head, place, sequence, port);
                    continue;
                }
                Some(Outcome::BadLength) => DropReason::BadLength,
                Some(Outcome::BadIcv | Outcome::Pending) | None => DropReason::BadIcv,
            },
            Fate::Long => {
                leave(core, long, frame, &head, port);
                continue;
            }
            Fate::Drop(reason) => reason,
        };
        core.discard_of_sa(frame, port, reason, Table::Inbound, place);
    }
}

/// The stages of a packet that was opened.
#[inline]
fn arrive(core: &mut Core, mut frame: Frame, head: &Head, sa: u32, sequence: u64, from: PortIndex) {
    let Core { arena, inbound, fib, egress, resolver, now, .. } = &mut *core;
    let accepted = match inbound.get_mut(sa) {
        Some(state) => accept(state, head, sequence, *now).map(|place| (state, place)),
        None => Err(DropReason::UnknownSpi),
    };
    match accepted {
        Ok((state, Place::Same)) => {
            let bytes = arena.bytes_mut(&mut frame);
            let Some((bare, exit)) = strip(bytes, head.at, head.tos, &state.expected, fib) else {
                return unusual(core, frame, head, sa, sequence, from);
            };
            state.traffic = state.traffic.with(u64::from(bare.payload));
            match egress.room(exit.tell(resolver, *now)) {
                Ok(room) => egress::put_part(room, frame, from, bare.front, bare.total + LINK),
                Err(reason) => core.discard(frame, from, reason),
            }
        }
        Ok((_, Place::Other)) => {
            move_peer(core, head, sa);
            unusual(core, frame, head, sa, sequence, from);
        }
        Err(reason) => core.discard_of_sa(frame, from, reason, Table::Inbound, sa),
    }
}

/// Leaves to other workers what is to be opened there (DP-8).
fn spread(core: &mut Core, batch: &mut QuickBatch, port: PortIndex) {
    if !core.fan.wants() {
        return;
    }
    let ours = batch.packets.iter().filter(|packet| packet.fate == Fate::Open);
    let elephant =
        core.fan.elephant(ours.map(|packet| (packet.place, packet.head.total.into())), fanout::WORTH);
    let mut kept = ArrayVec::new();
    let mut last = None;
    for packet in batch.packets.drain(..) {
        let sa = packet.place;
        if packet.fate != Fate::Open {
            kept.push(packet);
            continue;
        }
        let takes = match last {
            Some((same, takes)) if same == sa => takes,
            _ => core
                .inbound
                .get(sa)
                .is_some_and(|state| core.fan.takes(Table::Inbound, sa, &state.config, elephant == Some(sa))),
        };
        last = Some((sa, takes));
        if !takes {
            kept.push(packet);
            continue;
        }
        let Packet { frame, head, sequence, .. } = packet;
        let Core { inbound, fan, .. } = core;
        if let Err(frame) = fan.put_sealed(frame, port, head, sequence, sa, inbound.get(sa)) {
            core.discard_of_sa(frame, port, fanout::FULL, Table::Inbound, sa);
        }
    }
    batch.packets = kept;
    fanout::hand_out(core);
}

/// Goes on with a packet that another worker opened, and took out of its ESP if it is usual.
#[inline]
pub(crate) fn resume(
    core: &mut Core,
    frame: Frame,
    head: &Head,
    sa: u32,
    sequence: u64,
    bare: Option<&Bare>,
) {
    let from = PortIndex(u16::try_from(frame.note()).unwrap_or(u16::MAX));
    let now = core.now;
    let accepted = match core.inbound.get_mut(sa) {
        Some(state) => accept(state, head, sequence, now),
        None => Err(DropReason::UnknownSpi),
    };
    match accepted {
        Ok(Place::Same) => {}
        Ok(Place::Other) => move_peer(core, head, sa),
        Err(reason) => return core.discard_of_sa(frame, from, reason, Table::Inbound, sa),
    }
    let Some(Bare { front, total, payload, out }) = bare.copied() else {
        return unusual(core, frame, head, sa, sequence, from);
    };
    if let Some(state) = core.inbound.get_mut(sa) {
        state.traffic = state.traffic.with(u64::from(payload));
    }
    match core.egress.room(out) {
        Ok(room) => egress::put_part(room, frame, from, front, total + LINK),
        Err(reason) => core.discard(frame, from, reason),
    }
}

/// Leaves a packet to the stages.
#[cold]
fn leave(core: &mut Core, long: &mut InboundBatch, frame: Frame, head: &Head, port: PortIndex) {
    if let Err(frame) = long.push(frame, head.arrival(port)) {
        core.discard(frame, port, DropReason::NoFrame);
    }
}

/// Where an SA's peer was seen.
enum Place {
    /// Where it was, or where it is not followed to.
    Same,
    /// Elsewhere (MOB-2).
    Other,
}

/// As the stage of the same name.
#[inline]
fn accept(state: &mut Inbound, head: &Head, sequence: u64, now: u32) -> Result<Place, DropReason> {
    let Newest(newest) = state.window.accept(sequence).map_err(replay_reason)?;
    state.last_used = now;
    let expected = &state.expected;
    let moved = newest
        && expected.is.follow()
        && expected.is.encapsulated() == head.encapsulated()
        && (expected.peer != head.source || state.peer_port != head.port);
    Ok(if moved { Place::Other } else { Place::Same })
}

/// The peer is where this packet came from.
#[cold]
fn move_peer(core: &mut Core, head: &Head, sa: u32) {
    follow(core, sa, std::net::Ipv4Addr::from_bits(head.source).into(), head.port);
}

/// A packet with its link header in the place of the ESP header's end.
#[derive(Clone, Copy)]
pub(crate) struct Bare {
    /// Bytes before its link header.
    pub front: u16,
    /// Bytes behind it.
    pub total: u16,
    /// Bytes in the tunnel.
    pub payload: u16,
    /// Where it leaves.
    pub out: PortIndex,
}

/// Makes an opened packet ready to be sent, from its IP header to the ICV's end; `None`, and the packet as it was, if it
/// is not usual.
#[expect(clippy::inline_always, reason = "two callers, and each packet passes")]
#[inline(always)]
pub(crate) fn strip<'a>(
    bytes: &mut [u8],
    at: u8,
    tos: u8,
    expected: &Expected,
    fib: &'a mut CachedFib,
) -> Option<(Bare, &'a mut Exit)> {
    let at = usize::from(at) + usize::from(expected.front);
    let end = bytes.len().saturating_sub(usize::from(expected.icv_len));
    let plaintext = bytes.get(at..end)?;
    let trailer = esp::trailer(plaintext).ok().filter(|trailer| trailer.next_header == Protocol::IPV4)?;
    let payload = trailer.payload_len;
    let inner = Inner::read(plaintext.get(..payload)?)?;
    let marked = (tos | inner.tos) & ECN != 0;
    if marked || !expected.selector.admits(inner.source, inner.destination, inner.protocol) {
        return None;
    }
    let destination = std::net::Ipv4Addr::from_bits(inner.destination.0);
    let exit = fib.exit_towards(destination)?;
    if inner.total > exit.mtu || !exit.ethernet {
        return None;
    }
    // The link header takes the place of the ESP header's end: ESP header and IV have 16 bytes and more, or the IP header
    // is before them. It and the inner packet, which `Inner::read` saw to be there, lie within `bytes`.
    let front = at.checked_sub(ether::LEN)?;
    let (link, rest) = bytes.get_mut(front..)?.split_first_chunk_mut()?;
    header::forward(rest.first_chunk_mut()?);
    *link = exit.link;
    let (front, payload) = (u16::try_from(front).ok()?, u16::try_from(payload).ok()?);
    Some((Bare { front, total: inner.total, payload, out: exit.port }, exit))
}

/// The stages behind `accept`, for one packet in its turn.
#[cold]
fn unusual(core: &mut Core, frame: Frame, head: &Head, sa: u32, sequence: u64, port: PortIndex) {
    let mut one = InboundBatch::default();
    one.frames.push(frame);
    one.arrivals.push(head.arrival(port));
    one.sas.push(sa);
    one.sequences.push(sequence);
    one.flows.push(None);
    one.next.push(Next::Continue);
    decap(core, &mut one);
    dispatch(core, &mut one);
}

/// What is asked of an inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inner {
    source: (u32, u16),
    destination: (u32, u16),
    protocol: Protocol,
    total: u16,
    tos: u8,
}

impl Inner {
    /// As [`Flow::parse`](postern_wire::flow::Flow::parse) reads it, if it is usual and may go on.
    #[inline]
    fn read(packet: &[u8]) -> Option<Self> {
        let head = packet.first_chunk::<INNER>()?;
        let [
            0x45,
            tos,
            t0,
            t1,
            _,
            _,
            f0,
            f1,
            ttl,
            protocol,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
            p0,
            p1,
            q0,
            q1,
        ] = *head
        else {
            return None;
        };
        let total = u16::from_be_bytes([t0, t1]);
        let len = usize::from(total);
        // RFC 791 section 3.1: More Fragments and the offset.
        let fragment = u16::from_be_bytes([f0, f1]) & 0x3fff;
        if fragment != 0 || len < INNER || len > packet.len() || ttl <= 1 {
            return None;
        }
        let protocol = Protocol(protocol);
        match protocol {
            Protocol::UDP => {}
            // A SYN's MSS may have to be clamped.
            Protocol::TCP
                if len >= INNER_TCP && packet.first_chunk::<INNER_TCP>()?[INNER_TCP - 1] & SYN == 0 => {}
            _ => return None,
        }
        Some(Self {
            source: (u32::from_be_bytes([s0, s1, s2, s3]), u16::from_be_bytes([p0, p1])),
            destination: (u32::from_be_bytes([d0, d1, d2, d3]), u16::from_be_bytes([q0, q1])),
            protocol,
            total,
            tos,
        })
    }
}

#[cfg(test)]
mod tests {
    use arrayvec::ArrayVec;
    use postern_contract::counters::DropReason;
    use postern_contract::request::Operation;
    use postern_contract::sa::{
        Direction, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Limits, Mode,
        PathPolicy, SaConfig, SaId, Selector, Suite, UdpEncap,
    };
    use postern_contract::secret::Secret;
    use postern_contract::settings::Backend;
    use postern_contract::{Generation, Translation};
    use postern_wire::ids::Spi;
    use postern_wire::udp;
    use proptest::prelude::*;
    use tempfile::TempDir;

    use std::net::{IpAddr, Ipv4Addr};

    use postern_wire::flow::{Flow, Fragment};
    use postern_wire::steer::{Link, classify};

    use super::*;
    use crate::crypto::{Engine, EspKey, SealOp, SealOutcome, SequenceCounter};
    use crate::frame::Arena;
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
            fan_out: FanOut::ByLoad,
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
        ops.push(SealOp { key: (&key).into(), sequence, esn: true, packet: &mut packet[at..] });
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

    fn v4(address: IpAddr) -> u32 {
        let IpAddr::V4(address) = address else { panic!("{address}") };
        address.to_bits()
    }

    proptest! {
        /// DP-1: what is read in a few steps is what the XDP program's parser and the worker's checks make of it.
        #[test]
        fn dp_1_outer_headers_are_read_alike(
            mut frame in prop::collection::vec(any::<u8>(), 14..90),
            protocol in prop::sample::select(vec![50_u8, 17, 17, 51, 6]),
            fragment in prop::sample::select(vec![0_u16, 0x4000, 0x2000, 1, 0x8000]),
            total in prop::option::of(0_u16..90),
            udp_length in prop::option::of(0_u16..70),
            port in prop::sample::select(vec![500_u16, 4500, 4500, 53]),
            version in prop::sample::select(vec![0x45_u8, 0x45, 0x45, 0x46, 0x60]),
            marker in any::<bool>(),
            right in prop::bool::weighted(0.9),
        ) {
            frame[12..14].copy_from_slice(&[8, 0]);
            if frame.len() >= 50 {
                let total = total.unwrap_or(u16::try_from(frame.len() - 14).unwrap());
                frame[14] = version;
                frame[16..18].copy_from_slice(&total.to_be_bytes());
                frame[20..22].copy_from_slice(&fragment.to_be_bytes());
                frame[23] = protocol;
                frame[24..26].fill(0);
                if right {
                    let check = checksum::finish(checksum::sum(&frame[14..34]));
                    frame[24..26].copy_from_slice(&check.to_be_bytes());
                }
                if protocol == 17 {
                    frame[36..38].copy_from_slice(&port.to_be_bytes());
                    let length = udp_length.unwrap_or(total.saturating_sub(20));
                    frame[38..40].copy_from_slice(&length.to_be_bytes());
                    if marker {
                        frame[42..46].fill(0);
                    }
                }
            }
            let classified = classify(&frame.as_slice(), Link::Ethernet);
            let (arena, mut frames) = Arena::new(1, false).unwrap();
            let mut there = frames.pop().unwrap();
            there.grow_back(frame.len()).unwrap();
            arena.bytes_mut(&mut there).copy_from_slice(&frame);
            let arrived = crate::worker::arrive(&arena, &mut there, PortIndex(3), classified);
            if let Some(head) = read(&frame) {
                let arrival = arrived.unwrap();
                prop_assert_eq!(format!("{arrival:?}"), format!("{:?}", head.arrival(PortIndex(3))));
                prop_assert_eq!(there.len(), usize::from(head.total));
                let packet = arena.bytes(&there);
                let esp = esp::Header::parse(&packet[usize::from(head.at)..]).unwrap();
                prop_assert_eq!((esp.spi.0, esp.sequence), (head.spi, head.sequence));
                let destination = v4(crate::header::destination(packet).unwrap());
                prop_assert_eq!((destination, head.tos), (head.destination, packet[1]));
                let port = u16::from_be_bytes([packet[20], packet[21]]);
                prop_assert_eq!(head.port, if head.encapsulated() { port } else { 0 });
            } else {
                // All that is left out: other versions, options, and what no one takes.
                let usual = frame.len() >= ENCAPSULATED && frame[14] == 0x45 && protocol != 51;
                prop_assert!(!usual || arrived.is_err(), "{arrived:?}");
            }
        }

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
            if let Some(inner) = Inner::read(&packet) {
                let flow = Flow::parse(&packet).unwrap();
                let expected = Inner {
                    source: (v4(flow.source), flow.source_port),
                    destination: (v4(flow.destination), flow.destination_port),
                    protocol: flow.protocol,
                    total: flow.total_len,
                    tos: flow.tos,
                };
                prop_assert_eq!(inner, expected);
                prop_assert!(flow.ports_known && flow.fragment == Fragment::No && flow.ttl > 1);
            }
        }
    }
}
