//! Inbound stages: lookup (SPI) → precheck (ESN, replay, read only) → open (batch) → accept (replay again, newest
//! source, limits) → decap (trailer, ECN, selectors) → deliver.
//!
//! Route, authenticate, believe (DESIGN decision 2): nothing before `accept` changes state, and `accept` sees only
//! packets whose ICV was right.

pub mod quick;

use std::net::IpAddr;

use arrayvec::ArrayVec;
use itertools::izip;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::sa::{IpsecProtocol, Mode};
use postern_wire::flow::Flow;
use postern_wire::ids::{Protocol, Spi};
use postern_wire::steer::{Class, Classified};
use postern_wire::{ah, esp, udp};

use crate::command::Table;
use crate::core::Core;
use crate::crypto::{Engine, OpenOp, Outcome};
use crate::fanout::{self, Incoming, Job};
use crate::fib::PortIndex;
use crate::forward;
use crate::frame::{Arena, BATCH, Frame};
use crate::handoff::Parcel;
use crate::header;
use crate::prefetch;
use crate::relay;
use crate::sad::config::SaKey;
use crate::sad::lifetime::LifetimeEvent;
use crate::sad::replay::{Newest, ReplayError};
use crate::sad::runtime::{Inbound, NO_LINK};

/// IPsec headers that one packet may carry: AH and ESP under it.
const MAX_DEPTH: u8 = 2;

/// Bytes of an IPv4 header without options.
const PLAIN_AT: u16 = 20;

/// What is known of a packet from its headers alone.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Where it came in.
    pub port: PortIndex,
    /// Offset of the ESP or AH header from the IP header.
    pub transport: u16,
    /// ESP or AH.
    pub protocol: IpsecProtocol,
    /// In UDP (RFC 3948).
    pub encapsulated: bool,
    /// Index of the AH SA that already authenticated it; [`NO_LINK`] if none did.
    pub under: u32,
    /// IPsec headers already taken off.
    pub depth: u8,
    /// The sender on the wire; behind a relay the IP header is rewritten before it is believed.
    pub source: IpAddr,
}

impl Arrival {
    /// From the common parser's result, for a `packet` that begins with its IP header.
    pub fn new(port: PortIndex, classified: Classified, packet: &[u8]) -> Option<Self> {
        let (protocol, encapsulated) = match classified.class {
            Class::Esp => (IpsecProtocol::Esp, false),
            Class::EspInUdp => (IpsecProtocol::Esp, true),
            Class::Ah => (IpsecProtocol::Ah, false),
            _ => return None,
        };
        let transport = classified.transport.checked_sub(classified.network)?;
        let source = header::source(packet)?;
        Some(Self { port, transport, protocol, encapsulated, under: NO_LINK, depth: 0, source })
    }

    /// Of a packet of ESP over IPv4 without options and without UDP, whose IP header says no other.
    pub fn plain(port: PortIndex, packet: &[u8]) -> Option<Self> {
        let [.., a, b, c, d] = *packet.first_chunk::<16>()?;
        Some(Self::plain_from(port, u32::from_be_bytes([a, b, c, d])))
    }

    /// The same, from `source`.
    fn plain_from(port: PortIndex, source: u32) -> Self {
        Self {
            port,
            transport: PLAIN_AT,
            protocol: IpsecProtocol::Esp,
            encapsulated: false,
            under: NO_LINK,
            depth: 0,
            source: std::net::Ipv4Addr::from_bits(source).into(),
        }
    }

    fn at(&self) -> usize {
        usize::from(self.transport)
    }

    /// Length of the IP header with its options or extension headers.
    fn ip_len(&self) -> usize {
        self.at().saturating_sub(if self.encapsulated { udp::LEN } else { 0 })
    }
}

/// Where a packet goes after a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// To the next stage.
    Continue,
    /// Out, counted on the port.
    Drop(DropReason),
    /// Out, counted on the port and on the SA.
    DropOfSa(DropReason),
    /// To the worker that owns the SA.
    HandOff(u8),
    /// To be opened by another worker, perhaps.
    Fan,
    /// No SA has the SPI: to the translation table.
    Relay,
    /// AH was taken off and ESP is under it: once more from the start.
    Again,
}

/// Packets in the inbound stages (the usual ones are in [`quick::QuickBatch`]); columns of equal length from `lookup` on, before that the first two.
#[derive(Default)]
pub struct InboundBatch {
    frames: ArrayVec<Frame, BATCH>,
    arrivals: ArrayVec<Arrival, BATCH>,
    sas: ArrayVec<u32, BATCH>,
    sequences: ArrayVec<u64, BATCH>,
    /// What was inside, once it is out.
    flows: ArrayVec<Option<Flow>, BATCH>,
    next: ArrayVec<Next, BATCH>,
}

impl InboundBatch {
    /// Room left.
    pub fn remaining(&self) -> usize {
        self.frames.remaining_capacity()
    }

    /// Whether it holds no packet.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a packet, whose frame begins with the IP header and ends with the IP packet. Gives it back when full.
    pub fn push(&mut self, frame: Frame, arrival: Arrival) -> Result<(), Frame> {
        self.frames.try_push(frame).map_err(arrayvec::CapacityError::element)?;
        self.arrivals.push(arrival);
        Ok(())
    }
}

/// Takes a batch through all stages and leaves it empty.
pub fn run(core: &mut Core, batch: &mut InboundBatch) {
    lookup(core, batch);
    precheck(core, batch);
    spread(core, batch);
    open(core, batch);
    verify(core, batch);
    accept(core, batch);
    decap(core, batch);
    dispatch(core, batch);
}

/// Goes on with packets that were opened elsewhere, as if it had been here (DP-8).
pub(crate) fn resume(core: &mut Core, batch: &mut InboundBatch, job: &mut Job) {
    let Job { runs, inbound: packets, .. } = job;
    for packet in packets.drain(..) {
        let place = fanout::place(runs, core, packet.run());
        let next = match packet.outcome() {
            _ if place.sa.is_none() => Next::Drop(DropReason::SaGone),
            Outcome::Opened => Next::Continue,
            Outcome::BadIcv | Outcome::Pending => Next::DropOfSa(DropReason::BadIcv),
            Outcome::BadLength => Next::DropOfSa(DropReason::BadLength),
        };
        let Incoming { frame, arrival, sequence, .. } = packet;
        batch.frames.push(frame);
        batch.arrivals.push(arrival);
        batch.sas.push(place.sa.unwrap_or(NO_LINK));
        batch.sequences.push(sequence);
        batch.flows.push(None);
        batch.next.push(next);
    }
    if batch.is_empty() {
        return;
    }
    accept(core, batch);
    decap(core, batch);
    dispatch(core, batch);
}

/// Leaves to other workers what is to be opened there.
fn spread(core: &Core, batch: &mut InboundBatch) {
    if !core.fan.wants() {
        return;
    }
    let going = |arrival: &Arrival, next: &Next| {
        *next == Next::Continue && arrival.protocol == IpsecProtocol::Esp && arrival.under == NO_LINK
    };
    let packets = izip!(&batch.arrivals, &batch.sas, &batch.next, &batch.frames);
    let packets = packets.filter(|(arrival, _, next, _)| going(arrival, next));
    let elephant = core.fan.elephant(packets.map(|(_, sa, _, frame)| (*sa, frame.len())), fanout::WORTH);
    let mut last = (NO_LINK, false);
    for (arrival, sa, next) in izip!(&batch.arrivals, &batch.sas, &mut batch.next) {
        if !going(arrival, next) {
            continue;
        }
        if last.0 != *sa {
            let takes = core.inbound.get(*sa).is_some_and(|state| {
                core.fan.takes(Table::Inbound, *sa, &state.config, elephant == Some(*sa))
            });
            last = (*sa, takes);
        }
        if last.1 {
            *next = Next::Fan;
        }
    }
}

/// Finds the SA by protocol and SPI.
fn lookup(core: &Core, batch: &mut InboundBatch) {
    for (frame, arrival) in izip!(&batch.frames, &batch.arrivals) {
        let packet = core.arena.bytes(frame).get(arrival.at()..).unwrap_or_default();
        let found = spi_and_sequence(arrival.protocol, packet);
        let next = match found.map(|(spi, _)| core.spis.get(arrival.protocol, spi)) {
            Some(Some(handle)) if handle.worker() == core.id => {
                batch.sas.push(handle.index());
                core.inbound.prefetch(handle.index());
                Next::Continue
            }
            Some(Some(handle)) if arrival.depth == 0 => Next::HandOff(handle.worker()),
            // A bundle's SAs share a worker, so this AH is not the one that the ESP SA wants.
            Some(Some(_)) => Next::Drop(DropReason::BundleMissing),
            Some(None) if arrival.depth == 0 && !core.relays.is_empty() => Next::Relay,
            Some(None) => Next::Drop(DropReason::UnknownSpi),
            None => Next::Drop(DropReason::Malformed),
        };
        if next != Next::Continue {
            batch.sas.push(NO_LINK);
        }
        batch.sequences.push(found.map_or(0, |(_, low)| u64::from(low)));
        batch.flows.push(None);
        batch.next.push(next);
    }
}

fn spi_and_sequence(protocol: IpsecProtocol, packet: &[u8]) -> Option<(Spi, u32)> {
    match protocol {
        IpsecProtocol::Esp => esp::Header::parse(packet).map(|header| (header.spi, header.sequence)),
        IpsecProtocol::Ah => ah::Header::parse(packet).ok().map(|header| (header.spi, header.sequence)),
    }
}

/// Refuses early what the window would refuse anyway, before any cryptography is spent on it (RFC 4303 section 3.4.3).
fn precheck(core: &Core, batch: &mut InboundBatch) {
    warm(core, batch);
    for (arrival, sa, sequence, next) in
        izip!(&batch.arrivals, &batch.sas, &mut batch.sequences, &mut batch.next)
    {
        if *next != Next::Continue {
            continue;
        }
        let Some(state) = core.inbound.get(*sa) else {
            *next = Next::Drop(DropReason::UnknownSpi);
            continue;
        };
        if state.stopped {
            *next = Next::DropOfSa(DropReason::LifetimeExpired);
            continue;
        }
        // No AH SA verified the packet and none had to, or the one that the bundle names did.
        let bundled = if state.config.is_plain() || !state.config.is_bundled() {
            arrival.under == NO_LINK
        } else {
            let rest = core.inbound.rest(*sa);
            rest.is_some_and(|rest| arrival.under == rest.bundle && rest.bundle != NO_LINK)
        };
        if !bundled {
            *next = Next::DropOfSa(DropReason::BundleMissing);
            continue;
        }
        let low = u32::try_from(*sequence).unwrap_or_default();
        *sequence = state.window.recover(low);
        if let Err(error) = state.window.precheck(*sequence) {
            *next = Next::DropOfSa(replay_reason(error));
        }
    }
}

/// Asks for what the batch's SAs have elsewhere, if they are several; a single one is in the cache.
fn warm(core: &Core, batch: &InboundBatch) {
    if batch.sas.windows(2).all(|pair| pair.first() == pair.last()) {
        return;
    }
    for state in batch.sas.iter().filter_map(|sa| core.inbound.get(*sa)) {
        prefetch::object(&*state.config);
        state.window.prefetch();
    }
}

const fn replay_reason(error: ReplayError) -> DropReason {
    match error {
        ReplayError::Zero => DropReason::ReplayZero,
        ReplayError::TooOld => DropReason::ReplayTooOld,
        ReplayError::Duplicate => DropReason::ReplayDuplicate,
    }
}

/// Checks the ICV and decrypts, all ESP packets of the batch at once.
fn open(core: &mut Core, batch: &mut InboundBatch) {
    let Core { arena, inbound, crypto, .. } = core;
    let mut ops = ArrayVec::<OpenOp<'_>, BATCH>::new();
    for (frame, arrival, sa, sequence, next) in
        izip!(&mut batch.frames, &batch.arrivals, &batch.sas, &batch.sequences, &mut batch.next)
    {
        if *next != Next::Continue || arrival.protocol != IpsecProtocol::Esp {
            continue;
        }
        let packet = arena.bytes_mut(frame).get_mut(arrival.at()..).unwrap_or_default();
        let config = match inbound.get(*sa) {
            Some(state) => &state.config,
            None => continue,
        };
        let SaKey::Esp(key) = &config.key else { continue };
        if config.spi.is_translated() {
            header::put(packet, 0, config.spi.authenticated.0.to_be_bytes());
        }
        ops.push(OpenOp {
            key: key.into(),
            sequence: *sequence,
            esn: config.esn,
            packet,
            outcome: Outcome::Pending,
        });
    }
    crypto.open(&mut ops);
    let outcomes: ArrayVec<Outcome, BATCH> = ops.iter().map(|op| op.outcome).collect();
    drop(ops);
    let opened = izip!(&batch.arrivals, &mut batch.next)
        .filter(|(arrival, next)| **next == Next::Continue && arrival.protocol == IpsecProtocol::Esp);
    for ((_, next), outcome) in opened.zip(outcomes) {
        match outcome {
            Outcome::Opened => {}
            Outcome::BadIcv | Outcome::Pending => *next = Next::DropOfSa(DropReason::BadIcv),
            Outcome::BadLength => *next = Next::DropOfSa(DropReason::BadLength),
        }
    }
}

/// Checks the ICV of AH packets.
fn verify(core: &mut Core, batch: &mut InboundBatch) {
    let Core { arena, inbound, spis, crypto, id, .. } = core;
    // RLY-3: the SPI that the far end wrote into an ESP header below, where a relay translates it.
    let below = |spi: Spi| {
        let handle = spis.get(IpsecProtocol::Esp, spi).filter(|handle| handle.worker() == *id)?;
        let config = &inbound.get(handle.index())?.config;
        config.spi.is_translated().then_some(config.spi.authenticated)
    };
    for (frame, arrival, sa, sequence, next) in
        izip!(&mut batch.frames, &batch.arrivals, &batch.sas, &batch.sequences, &mut batch.next)
    {
        if *next != Next::Continue || arrival.protocol != IpsecProtocol::Ah {
            continue;
        }
        let Some(state) = inbound.get(*sa) else { continue };
        if let Err(reason) = verify_ah(arena, crypto, frame, arrival.at(), state, *sequence, below) {
            *next = Next::DropOfSa(reason);
        }
    }
}

/// RFC 4302 section 3.4.4. The packet is muted in place, checked, and its IP header restored. `below` tells what the
/// ICV covers in place of the SPI of an ESP header behind AH.
fn verify_ah(
    arena: &Arena,
    crypto: &mut Engine,
    frame: &mut Frame,
    at: usize,
    state: &Inbound,
    sequence: u64,
    below: impl Fn(Spi) -> Option<Spi>,
) -> Result<(), DropReason> {
    let config = &state.config;
    let SaKey::Ah(key) = &config.key else { return Err(DropReason::BadIcv) };
    let v6 = config.remote.is_ipv6();
    let bytes = arena.bytes_mut(frame);
    let (ip, rest) = bytes.split_at_mut_checked(at).ok_or(DropReason::Malformed)?;
    let parsed = ah::Header::parse(rest).map_err(|_| DropReason::Malformed)?;
    if parsed.len() != ah::header_len(usize::from(key.icv_len()), v6) {
        return Err(DropReason::BadLength);
    }
    let esp = (parsed.next_header == Protocol::ESP)
        .then(|| esp::Header::parse(rest.get(parsed.len()..)?).map(|esp| (parsed.len(), esp.spi)))
        .flatten();
    let swapped = esp.and_then(|(offset, on_wire)| Some((offset, on_wire, below(on_wire)?)));
    if let Some((offset, _, authenticated)) = swapped {
        header::put(rest, offset, authenticated.0.to_be_bytes());
    }
    let mut saved = header::Saved::take(ip).ok_or(DropReason::TooManyExtensionHeaders)?;
    if config.spi.is_translated() {
        header::put(rest, 4, config.spi.authenticated.0.to_be_bytes());
    }
    if let Some((local, remote)) = config.authenticated() {
        header::set_addresses(ip, remote, local).ok_or(DropReason::Malformed)?;
        // On the wire the addresses were others, so this header is the one that the rest of the walk should see.
        saved = header::Saved::take(ip).ok_or(DropReason::TooManyExtensionHeaders)?;
    }
    let muted = if v6 { ah::mute_v6(ip, at) } else { ah::mute_v4(ip) };
    muted.ok_or(DropReason::BadIcv)?;
    let high = u32::try_from(sequence >> 32).unwrap_or_default().to_be_bytes();
    let len = frame.len();
    if config.esn {
        frame.grow_back(high.len()).ok_or(DropReason::BadLength)?;
        header::put(arena.bytes_mut(frame), len, high);
    }
    let right = key.verify(crypto, arena.bytes_mut(frame), at + ah::FIXED_LEN);
    frame.truncate(len);
    saved.restore(arena.bytes_mut(frame));
    if let Some((offset, on_wire, _)) = swapped {
        // The ESP SA is found by what is on the wire.
        header::put(arena.bytes_mut(frame), at + offset, on_wire.0.to_be_bytes());
    }
    if right { Ok(()) } else { Err(DropReason::BadIcv) }
}

/// Moves the window, and the tunnel if the packet is the newest and came from elsewhere (MOB-2).
fn accept(core: &mut Core, batch: &mut InboundBatch) {
    for (frame, arrival, sa, sequence, next) in
        izip!(&batch.frames, &batch.arrivals, &batch.sas, &batch.sequences, &mut batch.next)
    {
        if *next != Next::Continue {
            continue;
        }
        let Some(state) = core.inbound.get_mut(*sa) else { continue };
        let newest = match state.window.accept(*sequence) {
            Ok(Newest(newest)) => newest,
            Err(error) => {
                *next = Next::DropOfSa(replay_reason(error));
                continue;
            }
        };
        state.last_used = core.now;
        if newest && state.config.follow_peer && arrival.encapsulated == state.config.encap.is_some() {
            let packet = core.arena.bytes(frame);
            let known = state.peer_port;
            let port = if arrival.encapsulated {
                header::get_u16(packet, arrival.ip_len()).unwrap_or(known)
            } else {
                0
            };
            if core.inbound.peer(*sa) != Some(arrival.source) || port != known {
                follow(core, *sa, arrival.source, port);
            }
        }
    }
}

/// MOB-2: "the newest authenticated packet" tells where the peer is; the pair's packets go there from now on.
#[cold]
fn follow(core: &mut Core, sa: u32, source: IpAddr, port: u16) {
    let Some(state) = core.inbound.get(sa) else { return };
    // An SA of one family cannot follow to the other: its outer header would change its length and its sockets.
    if source.is_ipv4() != state.config.remote.is_ipv4() {
        return;
    }
    let id = state.config.id;
    let Some((pair, bundle)) = core.inbound.rest(sa).map(|rest| (rest.pair, rest.bundle)) else { return };
    core.inbound.move_peer(sa, source, Some(port));
    core.inbound.move_peer(bundle, source, None);
    core.outbound.move_peer(pair, source, Some(port));
    if let Some(under) = core.outbound.get(pair).map(|outbound| outbound.bundle) {
        core.outbound.move_peer(under, source, None);
    }
    let encapsulated = core.inbound.get(sa).is_some_and(|state| state.config.encap.is_some());
    core.event(Event::NewPath { sa: id, remote: source, port: encapsulated.then_some(port) });
}

/// Takes the IPsec headers off.
fn decap(core: &mut Core, batch: &mut InboundBatch) {
    for (frame, arrival, sa, flow, next) in
        izip!(&mut batch.frames, &mut batch.arrivals, &batch.sas, &mut batch.flows, &mut batch.next)
    {
        if *next != Next::Continue {
            continue;
        }
        let Some(state) = core.inbound.get_mut(*sa) else { continue };
        let payload = match find_payload(core.arena.bytes(frame), arrival, &state.config.key) {
            Ok(payload) => payload,
            Err(reason) => {
                *next = Next::DropOfSa(reason);
                continue;
            }
        };
        if state.config.is_metered() {
            if count(core, *sa, payload.len as u64).is_err() {
                *next = Next::DropOfSa(DropReason::LifetimeExpired);
                continue;
            }
        } else {
            state.traffic = state.traffic.with(payload.len as u64);
        }
        let Some(state) = core.inbound.get(*sa) else { continue };
        match strip(&core.arena, frame, arrival, state, payload) {
            Ok(Stripped::Inner(inner)) => *flow = Some(inner),
            Ok(Stripped::EspBelow) => {
                arrival.under = *sa;
                arrival.depth += 1;
                *next = if arrival.depth < MAX_DEPTH {
                    Next::Again
                } else {
                    Next::DropOfSa(DropReason::NestedTooDeep)
                };
            }
            Err(reason) => *next = Next::DropOfSa(reason),
        }
    }
}

/// Counts a packet against the limits of its SA (DP-4); an error where it may not pass.
fn count(core: &mut Core, sa: u32, bytes: u64) -> Result<(), Expired> {
    let Some((state, rest)) = core.inbound.both_mut(sa) else { return Ok(()) };
    if state.stopped {
        // By a packet before it in the same batch.
        return Err(Expired);
    }
    let traffic = state.traffic.with(bytes);
    let event = rest.account(traffic);
    let id = state.config.id;
    let Some(LifetimeEvent::Hard(kind)) = event else {
        state.traffic = traffic;
        if let Some(LifetimeEvent::Soft(kind)) = event {
            core.event(Event::SoftLimit { sa: id, kind });
        }
        return Ok(());
    };
    state.stopped = true;
    core.event(Event::HardLimit { sa: id, kind });
    Err(Expired)
}

/// A hard limit was reached.
struct Expired;

/// What an IPsec header had in it.
#[derive(Clone, Copy)]
struct Payload {
    at: usize,
    len: usize,
    next_header: Protocol,
    outer_tos: u8,
}

/// Finds what was protected in a packet whose ICV was right.
fn find_payload(packet: &[u8], arrival: &Arrival, key: &SaKey) -> Result<Payload, DropReason> {
    let outer_tos = header::tos(packet).ok_or(DropReason::Malformed)?;
    let payload = match key {
        SaKey::Esp(key) => {
            let layout = key.layout();
            let at = arrival.at() + esp::HEADER_LEN + usize::from(layout.iv_len);
            let end = packet.len().checked_sub(usize::from(layout.icv_len));
            let plaintext = end.and_then(|end| packet.get(at..end)).ok_or(DropReason::BadLength)?;
            let trailer = esp::trailer(plaintext).map_err(|_| DropReason::BadPadding)?;
            Payload { at, len: trailer.payload_len, next_header: trailer.next_header, outer_tos }
        }
        SaKey::Ah(_) => {
            let header = packet.get(arrival.at()..).unwrap_or_default();
            let parsed = ah::Header::parse(header).map_err(|_| DropReason::Malformed)?;
            let at = arrival.at() + parsed.len();
            let len = packet.len().saturating_sub(at);
            Payload { at, len, next_header: parsed.next_header, outer_tos }
        }
    };
    // RFC 4303 section 2.6: a dummy packet MUST be discarded without prejudice. It came this far to be the MOB-3 update.
    if payload.next_header == Protocol::NONE { Err(DropReason::Dummy) } else { Ok(payload) }
}

enum Stripped {
    /// The frame holds the inner packet.
    Inner(Flow),
    /// The frame holds the packet without AH; ESP comes next.
    EspBelow,
}

/// Removes one IPsec header; afterwards the frame begins with an IP header again.
fn strip(
    arena: &Arena,
    frame: &mut Frame,
    arrival: &mut Arrival,
    state: &Inbound,
    payload: Payload,
) -> Result<Stripped, DropReason> {
    let config = &state.config;
    let Payload { at, len, next_header, outer_tos } = payload;
    if config.protocol() == IpsecProtocol::Ah && next_header == Protocol::ESP {
        arrival.transport = to_transport(arena, frame, arrival, at, len, next_header)?;
        arrival.protocol = IpsecProtocol::Esp;
        arrival.encapsulated = false;
        return Ok(Stripped::EspBelow);
    }
    if config.mode == Mode::Tunnel {
        to_inner(arena, frame, at, len, next_header, outer_tos)?;
    } else {
        let ip_len = to_transport(arena, frame, arrival, at, len, next_header)?;
        fix_transport(arena, frame, state, usize::from(ip_len), arrival.encapsulated)?;
    }
    check_inner(arena, frame, state).map(Stripped::Inner)
}

/// Tunnel mode: what was protected is an IP packet (RFC 4301 section 5.1.2).
fn to_inner(
    arena: &Arena,
    frame: &mut Frame,
    payload_at: usize,
    payload_len: usize,
    next_header: Protocol,
    outer_tos: u8,
) -> Result<(), DropReason> {
    let version = match next_header {
        Protocol::IPV4 => 4,
        Protocol::IPV6 => 6,
        _ => return Err(DropReason::BadNextHeader),
    };
    frame.shrink_front(payload_at).ok_or(DropReason::BadLength)?;
    frame.truncate(payload_len);
    let inner = arena.bytes_mut(frame);
    if inner.first().is_none_or(|first| first >> 4 != version) {
        return Err(DropReason::BadInner);
    }
    let inner_tos = header::tos(inner).ok_or(DropReason::BadInner)?;
    let tos = combine_ecn(outer_tos, inner_tos).ok_or(DropReason::EcnNotEctMarked)?;
    if tos != inner_tos {
        header::set_tos(inner, tos).ok_or(DropReason::BadInner)?;
    }
    Ok(())
}

/// The traffic class that the inner packet is forwarded with: RFC 6040 section 4.2, figure 4. `None`: drop it.
fn combine_ecn(outer: u8, inner: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0b00;
    const ECT_1: u8 = 0b01;
    const ECT_0: u8 = 0b10;
    const CE: u8 = 0b11;
    match (inner & CE, outer & CE) {
        (NOT_ECT, CE) => None,
        (_, CE) => Some(inner | CE),
        (ECT_0, ECT_1) => Some((inner & !CE) | ECT_1),
        _ => Some(inner),
    }
}

/// Transport mode: the IP header moves up to what was protected. Gives the header's length.
fn to_transport(
    arena: &Arena,
    frame: &mut Frame,
    arrival: &Arrival,
    payload_at: usize,
    payload_len: usize,
    next_header: Protocol,
) -> Result<u16, DropReason> {
    let ip_len = arrival.ip_len();
    let start = payload_at.checked_sub(ip_len).ok_or(DropReason::Malformed)?;
    // Before the trailer goes: the walk along IPv6 extension headers wants the packet as long as it says it is.
    let next_header_at = header::next_header_at(arena.bytes(frame)).ok_or(DropReason::Malformed)?;
    frame.truncate(payload_at + payload_len);
    let bytes = arena.bytes_mut(frame);
    if ip_len > bytes.len() || payload_at > bytes.len() {
        return Err(DropReason::Malformed);
    }
    bytes.copy_within(..ip_len, start);
    frame.shrink_front(start).ok_or(DropReason::Malformed)?;
    let bytes = arena.bytes_mut(frame);
    header::set_payload(bytes, next_header_at, next_header).ok_or(DropReason::BadInner)?;
    u16::try_from(ip_len).map_err(|_| DropReason::Malformed)
}

/// Behind a relay the peer computed the upper layer's checksum over other addresses than those on the wire (RLY-2),
/// behind a NAT over addresses that we may not know (RFC 3948 section 3.1.2): the packet is authentic, so the
/// checksum is made anew.
fn fix_transport(
    arena: &Arena,
    frame: &mut Frame,
    state: &Inbound,
    ip_len: usize,
    encapsulated: bool,
) -> Result<(), DropReason> {
    let packet = arena.bytes_mut(frame);
    if let Some((_, remote)) = state.config.authenticated() {
        header::set_addresses(packet, remote, state.config.local).ok_or(DropReason::BadInner)?;
    } else if !encapsulated {
        return Ok(());
    }
    header::renew_upper_checksum(packet, ip_len);
    Ok(())
}

/// RFC 4301 section 5.2, step 4: the packet must be one that this SA was made for.
fn check_inner(arena: &Arena, frame: &mut Frame, state: &Inbound) -> Result<Flow, DropReason> {
    let flow = Flow::parse(arena.bytes(frame)).map_err(|_| DropReason::BadInner)?;
    // What follows the packet is traffic flow confidentiality padding (RFC 4303 section 2.7).
    frame.truncate(usize::from(flow.total_len));
    if !state.config.admits(&flow) {
        return Err(DropReason::SelectorMismatch);
    }
    Ok(flow)
}

/// Sends every packet where its column says, and empties the batch.
fn dispatch(core: &mut Core, batch: &mut InboundBatch) {
    let mut again = InboundBatch::default();
    let mut relayed = ArrayVec::<(Frame, Arrival), BATCH>::new();
    for (index, frame) in batch.frames.drain(..).enumerate() {
        let (Some(arrival), Some(sa), Some(flow), Some(next)) =
            (batch.arrivals.get(index), batch.sas.get(index), batch.flows.get(index), batch.next.get(index))
        else {
            // Not reached: the columns are of equal length.
            core.pool.give(frame);
            continue;
        };
        match next {
            Next::Continue => {
                let Some(flow) = flow else {
                    core.discard(frame, arrival.port, DropReason::BadInner);
                    continue;
                };
                let mss = core.inbound.get(*sa).is_some_and(|state| state.config.path.mss_clamp);
                forward::deliver(core, frame, arrival.port, flow, mss.then_some(*sa));
            }
            Next::Drop(reason) => core.discard(frame, arrival.port, *reason),
            Next::DropOfSa(reason) => core.discard_of_sa(frame, arrival.port, *reason, Table::Inbound, *sa),
            Next::HandOff(worker) => {
                core.hand_off(*worker, arrival.port, Parcel::Inbound { frame, port: arrival.port });
            }
            Next::Fan => {
                let sequence = batch.sequences.get(index).copied().unwrap_or_default();
                let packet = Incoming::new(frame, *arrival, sequence);
                let config = core.inbound.get(*sa).map(|state| &state.config);
                if let Err(frame) = core.fan.put_inbound(packet, *sa, config) {
                    core.discard_of_sa(frame, arrival.port, fanout::FULL, Table::Inbound, *sa);
                }
            }
            // As many as the batch at the most.
            Next::Relay => relayed.push((frame, *arrival)),
            Next::Again => {
                if let Err(frame) = again.push(frame, *arrival) {
                    core.discard(frame, arrival.port, DropReason::NoFrame);
                }
            }
        }
    }
    batch.arrivals.clear();
    batch.sas.clear();
    batch.sequences.clear();
    batch.flows.clear();
    batch.next.clear();
    fanout::hand_out(core);
    if !relayed.is_empty() {
        relay::run(core, &mut relayed);
    }
    if !again.is_empty() {
        run(core, &mut again);
    }
}
