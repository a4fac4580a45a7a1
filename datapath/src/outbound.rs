//! Outbound stages: parse → select (SPD, inner address) → fit (path MTU, MSS) → number (the only source of sequence
//! numbers) → encap (into the headroom) → seal (batch) → finish (AH, translation, UDP checksum) → dispatch.

mod encap;
pub mod quick;

use arrayvec::ArrayVec;
use itertools::izip;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::sa::{IpsecProtocol, Mode};
use postern_wire::flow::{Flow, Fragment};
use postern_wire::ids::Protocol;

pub use self::encap::max_inner;
use self::encap::{ah_len, encap, sign_ah, to_wire};
use crate::command::{Returned, Table};
use crate::core::Core;
use crate::crypto::{ReserveError, Reserved, SealOp, SealOutcome};
use crate::egress;
use crate::fanout::{self, Job, Outgoing};
use crate::fib::{PortIndex, Route};
use crate::forward::{self, Complaint, Origin};
use crate::frame::{BATCH, Frame};
use crate::handoff::Parcel;
use crate::header;
use crate::prefetch;
use crate::sad::config::SaKey;
use crate::sad::lifetime::LifetimeEvent;
use crate::sad::runtime::{NO_LINK, Outbound};
use crate::spd::Verdict;

/// Packets that a batch can grow to by fragmentation.
const GROWN: usize = 2 * BATCH;
/// With fewer reserved numbers left than this an SA asks for more: at 4 Mpps an eighth of a second of warning.
pub const RESERVE_LOW: u64 = 1 << 19;
/// Path MTU where neither a route nor the configuration tells one.
const DEFAULT_MTU: usize = 1500;

/// How a cleartext packet came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// From another host; this node is a router to it.
    Forwarded,
    /// From this host.
    Host,
    /// The datapath made it (an ICMP error).
    Own,
}

/// What is known of a cleartext packet before it is parsed.
#[derive(Clone, Copy, Debug)]
pub struct Cleartext {
    /// Where it came in.
    pub port: PortIndex,
    /// From whom.
    pub came: Came,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Continue,
    Drop(DropReason),
    DropOfSa(DropReason),
    HandOff(u8),
    /// To be sealed by another worker, perhaps.
    Fan,
    /// In the clear, by the routes.
    Bypass,
}

/// Packets in the outbound stages (the usual ones are in [`quick::QuickBatch`]); columns of equal length from `parse` on,
/// before that the first two.
#[derive(Default)]
pub struct OutboundBatch {
    frames: ArrayVec<Frame, GROWN>,
    cleartexts: ArrayVec<Cleartext, GROWN>,
    flows: ArrayVec<Option<Flow>, GROWN>,
    sas: ArrayVec<u32, GROWN>,
    routes: ArrayVec<Route, GROWN>,
    numbers: ArrayVec<Option<Reserved>, GROWN>,
    ah_numbers: ArrayVec<Option<Reserved>, GROWN>,
    /// Offset of the ESP header, or of the AH header of an SA without ESP.
    at: ArrayVec<u16, GROWN>,
    next: ArrayVec<Next, GROWN>,
}

impl OutboundBatch {
    /// Whether it holds no packet.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Room for packets that come in; the rest is for fragments.
    pub fn remaining(&self) -> usize {
        BATCH.saturating_sub(self.frames.len())
    }

    /// Adds a packet, whose frame begins with the IP header. Gives it back when full.
    pub fn push(&mut self, frame: Frame, cleartext: Cleartext) -> Result<(), Frame> {
        if self.remaining() == 0 {
            return Err(frame);
        }
        self.frames.try_push(frame).map_err(arrayvec::CapacityError::element)?;
        self.cleartexts.push(cleartext);
        Ok(())
    }

    /// Adds a packet in the middle of the stages.
    fn add(
        &mut self,
        frame: Frame,
        cleartext: Cleartext,
        flow: Option<Flow>,
        sa: u32,
        route: Route,
    ) -> Result<(), Frame> {
        self.frames.try_push(frame).map_err(arrayvec::CapacityError::element)?;
        self.cleartexts.push(cleartext);
        self.flows.push(flow);
        self.sas.push(sa);
        self.routes.push(route);
        self.numbers.push(None);
        self.ah_numbers.push(None);
        self.at.push(0);
        self.next.push(Next::Continue);
        Ok(())
    }
}

/// Takes a batch through all stages and leaves it empty.
pub fn run(core: &mut Core, batch: &mut OutboundBatch) {
    parse(core, batch);
    select(core, batch);
    fit(core, batch);
    number(core, batch);
    encap(core, batch);
    spread(core, batch);
    seal(core, batch);
    finish(core, batch);
    dispatch(core, batch);
}

/// Leaves to other workers what is to be sealed there (DP-8).
fn spread(core: &Core, batch: &mut OutboundBatch) {
    if !core.fan.wants() {
        return;
    }
    let going = |number: &Option<Reserved>, next: Next| next == Next::Continue && number.is_some();
    let packets = izip!(&batch.sas, &batch.numbers, &batch.next, &batch.frames);
    let packets = packets.filter(|(_, number, next, _)| going(number, **next));
    let elephant = core.fan.elephant(packets.map(|(sa, _, _, frame)| (*sa, frame.len())), fanout::WORTH);
    let mut last = (NO_LINK, false);
    for (sa, number, next) in izip!(&batch.sas, &batch.numbers, &mut batch.next) {
        if !going(number, *next) {
            continue;
        }
        if last.0 != *sa {
            let takes = core.outbound.get(*sa).is_some_and(|state| {
                core.fan.takes(Table::Outbound, *sa, &state.config, elephant == Some(*sa))
            });
            last = (*sa, takes);
        }
        if last.1 {
            *next = Next::Fan;
        }
    }
}

/// Goes on with packets that were sealed elsewhere.
pub(crate) fn resume(core: &mut Core, job: &mut Job) {
    let Job { runs, outbound: packets, .. } = job;
    for packet in packets.drain(..) {
        let place = fanout::place(runs, core, packet.run());
        let (sealed, from) = (packet.is_sealed(), packet.from);
        let (mut frame, at) = (packet.frame, usize::from(packet.at));
        let Some(sa) = place.sa else {
            core.discard(frame, from, DropReason::SaGone);
            continue;
        };
        if !sealed {
            core.discard_of_sa(frame, from, DropReason::BadLength, Table::Outbound, sa);
            continue;
        }
        let written = core
            .outbound
            .get(sa)
            .zip(core.outbound.peer(sa))
            .and_then(|(state, peer)| to_wire(core.arena.bytes_mut(&mut frame), &state.config, peer, at));
        match written {
            Some(()) => transmit(core, frame, from, sa, place.route),
            None => core.discard_of_sa(frame, from, DropReason::EgressMtu, Table::Outbound, sa),
        }
    }
}

/// Reads the headers that policies ask about.
fn parse(core: &mut Core, batch: &mut OutboundBatch) {
    for frame in &mut batch.frames {
        let packet = core.arena.bytes(frame);
        let (flow, next) = match Flow::parse(packet) {
            // RFC 1812 section 5.2.2: a router must drop a datagram whose header checksum is wrong.
            Ok(parsed) if parsed.source.is_ipv4() && !header::checksum_ok(packet) => {
                (None, Next::Drop(DropReason::BadIpChecksum))
            }
            Ok(parsed) => {
                frame.truncate(usize::from(parsed.total_len));
                (Some(parsed), Next::Continue)
            }
            Err(_) => (None, Next::Drop(DropReason::Malformed)),
        };
        batch.flows.push(flow);
        batch.next.push(next);
        batch.sas.push(NO_LINK);
        batch.routes.push(Route::Unreachable);
        batch.numbers.push(None);
        batch.ah_numbers.push(None);
        batch.at.push(0);
    }
}

/// Finds the policy and its SA (MOB-1: by inner addresses, never by outer ones).
fn select(core: &mut Core, batch: &mut OutboundBatch) {
    for (flow, cleartext, sa, next) in izip!(&batch.flows, &batch.cleartexts, &mut batch.sas, &mut batch.next)
    {
        let Some(flow) = flow else { continue };
        *next = match core.spd.lookup(flow) {
            Verdict::Protect(_, Some(handle)) if handle.worker() == core.id => {
                *sa = handle.index();
                core.outbound.prefetch(*sa);
                Next::Continue
            }
            Verdict::Protect(_, Some(handle)) => Next::HandOff(handle.worker()),
            Verdict::Protect(policy, None) => {
                core.acquire(Event::Acquire {
                    policy,
                    source: flow.source,
                    destination: flow.destination,
                    protocol: flow.protocol,
                    ports: (flow.source_port, flow.destination_port),
                });
                Next::Drop(DropReason::NoSa)
            }
            Verdict::Bypass => Next::Bypass,
            Verdict::Discard => Next::Drop(DropReason::PolicyDiscard),
            // An ICMP error of our own goes by the routes where no policy takes it.
            Verdict::None if cleartext.came == Came::Own => Next::Bypass,
            Verdict::None => Next::Drop(DropReason::NoPolicy),
        };
    }
}

/// Makes packets fit the path: clamps the MSS, fragments what may be, and complains about the rest (RFC 4301 section 8).
fn fit(core: &mut Core, batch: &mut OutboundBatch) {
    for state in batch.sas.iter().filter_map(|sa| core.outbound.get(*sa)) {
        prefetch::object(&*state.config);
    }
    let arrived = batch.frames.len();
    for index in 0..arrived {
        let (Some(Next::Continue), Some(Some(flow)), Some(sa), Some(cleartext), Some(frame)) = (
            batch.next.get(index),
            batch.flows.get(index),
            batch.sas.get(index),
            batch.cleartexts.get(index),
            batch.frames.get_mut(index),
        ) else {
            continue;
        };
        let (sa, cleartext) = (*sa, *cleartext);
        let Some((state, peer)) = core.outbound.get(sa).zip(core.outbound.peer(sa)) else {
            set(&mut batch.next, index, Next::Drop(DropReason::SaMissing));
            continue;
        };
        if state.config.mode == Mode::Transport && flow.fragment != Fragment::No {
            // RFC 4303 section 3.1.1: transport mode is applied to whole IP datagrams only.
            set(&mut batch.next, index, Next::DropOfSa(DropReason::Fragment));
            continue;
        }
        let route = core.fib.lookup(peer);
        set(&mut batch.routes, index, route);
        let limit = max_inner(core, state, path_mtu(state, route), usize::from(flow.header_len));
        let (clamp, tunnel) = (state.config.path.mss_clamp, state.config.mode == Mode::Tunnel);
        if clamp && flow.protocol == Protocol::TCP && flow.fragment == Fragment::No {
            header::clamp_mss(core.arena.bytes_mut(frame), usize::from(flow.header_len), limit);
        }
        if cleartext.came == Came::Forwarded && tunnel && flow.ttl <= 1 {
            forward::complain(core, frame, cleartext.port, Origin::Inside, Complaint::TimeExceeded);
            set(&mut batch.next, index, Next::DropOfSa(DropReason::TtlExpired));
            continue;
        }
        if frame.len() <= limit {
            continue;
        }
        if flow.dont_fragment {
            forward::complain(core, frame, cleartext.port, Origin::Inside, Complaint::TooBig(limit));
            set(&mut batch.next, index, Next::DropOfSa(DropReason::TooBig));
        } else if tunnel {
            fragment(core, batch, index, sa, cleartext, route, limit);
        }
        // Transport mode: the protected packet is fragmented instead, when it is sent.
    }
}

fn set<T, const N: usize>(column: &mut ArrayVec<T, N>, index: usize, value: T) {
    if let Some(place) = column.get_mut(index) {
        *place = value;
    }
}

/// Fragments an inner packet before it is protected, so that the peer's gateway need not reassemble. The last
/// fragment keeps the place, the others join the batch. What cannot be cut or has no room is dropped.
fn fragment(
    core: &mut Core,
    batch: &mut OutboundBatch,
    index: usize,
    sa: u32,
    cleartext: Cleartext,
    route: Route,
    limit: usize,
) {
    loop {
        let Some(frame) = batch.frames.get_mut(index) else { return };
        let piece = match forward::split(core, frame, limit) {
            Ok(Some(piece)) => piece,
            Ok(None) => {
                let flow = Flow::parse(core.arena.bytes(frame)).ok();
                return set(&mut batch.flows, index, flow);
            }
            Err(reason) => return set(&mut batch.next, index, Next::DropOfSa(reason)),
        };
        let flow = Flow::parse(core.arena.bytes(&piece)).ok();
        if let Err(piece) = batch.add(piece, cleartext, flow, sa, route) {
            core.discard_of_sa(piece, cleartext.port, DropReason::NoFrame, Table::Outbound, sa);
            return set(&mut batch.next, index, Next::DropOfSa(DropReason::NoFrame));
        }
    }
}

fn path_mtu(state: &Outbound, route: Route) -> usize {
    let mtu = match route {
        Route::Via { mtu, .. } => usize::from(mtu),
        _ => DEFAULT_MTU,
    };
    state.config.path.mtu.map_or(mtu, |limit| mtu.min(usize::from(limit)))
}

/// Takes a sequence number from the SA, and one from the AH SA of its bundle, in the order in which packets leave.
fn number(core: &mut Core, batch: &mut OutboundBatch) {
    let columns =
        izip!(&mut batch.frames, &batch.sas, &mut batch.numbers, &mut batch.ah_numbers, &mut batch.next);
    for (frame, sa, number, ah_number, next) in columns {
        if *next != Next::Continue {
            continue;
        }
        let bytes = frame.len() as u64;
        let (bundle, bundled) =
            core.outbound.get(*sa).map_or((NO_LINK, false), |sa| (sa.bundle, sa.config.is_bundled()));
        if bundled && bundle == NO_LINK {
            *next = Next::DropOfSa(DropReason::BundleMissing);
            continue;
        }
        let drawn = draw(core, *sa, bytes).and_then(|drawn| {
            *number = Some(drawn);
            if bundle != NO_LINK {
                *ah_number = Some(draw(core, bundle, bytes)?);
            }
            Ok(())
        });
        if let Err(reason) = drawn {
            *next = Next::DropOfSa(reason);
        }
    }
}

/// Draws one number from an SA, within its limits (DP-4).
#[inline]
fn draw(core: &mut Core, sa: u32, bytes: u64) -> Result<Reserved, DropReason> {
    let now = core.now;
    let state = core.outbound.get_mut(sa).ok_or(DropReason::SaMissing)?;
    let room = state.sequence.remaining();
    if !state.stopped && !state.config.is_metered() && (room > RESERVE_LOW || state.reserving && room > 0) {
        state.traffic = state.traffic.with(bytes);
        state.last_used = now;
        return state.sequence.reserve().map_err(|_| DropReason::SequenceNotReserved);
    }
    draw_with_care(core, sa, bytes)
}

/// The same, where a limit is near or there are limits to be counted against.
fn draw_with_care(core: &mut Core, sa: u32, bytes: u64) -> Result<Reserved, DropReason> {
    let now = core.now;
    let (state, rest) = core.outbound.both_mut(sa).ok_or(DropReason::SaMissing)?;
    if state.stopped {
        let exhausted = state.sequence.last() >= state.sequence.limit();
        return Err(if exhausted { DropReason::SequenceExhausted } else { DropReason::LifetimeExpired });
    }
    let id = state.config.id;
    let traffic = state.traffic.with(bytes);
    let event = if state.config.is_metered() { rest.account(traffic) } else { None };
    let drawn = match event {
        Some(LifetimeEvent::Hard(_)) => {
            state.stopped = true;
            Err(DropReason::LifetimeExpired)
        }
        _ => state.sequence.reserve().map_err(|error| match error {
            ReserveError::Exhausted => DropReason::SequenceExhausted,
            ReserveError::NotReserved => DropReason::SequenceNotReserved,
        }),
    };
    if drawn.is_ok() {
        state.traffic = traffic;
        state.last_used = now;
    }
    let exhausted = matches!(drawn, Err(DropReason::SequenceExhausted)) && !state.stopped;
    if exhausted {
        state.stopped = true;
    }
    let wants_more = !state.reserving
        && state.sequence.remaining() < RESERVE_LOW
        && state.sequence.ceiling() <= state.sequence.limit();
    if wants_more {
        state.reserving = true;
        let (last, ceiling) = (state.sequence.last(), state.sequence.ceiling());
        core.send(Returned::Reserve { index: sa, id, last, ceiling });
    }
    match event {
        Some(LifetimeEvent::Soft(kind)) => core.event(Event::SoftLimit { sa: id, kind }),
        Some(LifetimeEvent::Hard(kind)) => core.event(Event::HardLimit { sa: id, kind }),
        None => {}
    }
    if exhausted {
        core.event(Event::SequenceExhausted { sa: id });
    }
    drawn
}

/// Encrypts and authenticates, all ESP packets of the batch at once.
fn seal(core: &mut Core, batch: &mut OutboundBatch) {
    let Core { arena, outbound, crypto, .. } = core;
    let mut ops = ArrayVec::<SealOp<'_>, GROWN>::new();
    let columns = izip!(&mut batch.frames, &batch.sas, &batch.at, &mut batch.numbers, &mut batch.next);
    for (frame, sa, at, number, next) in columns {
        if *next != Next::Continue {
            continue;
        }
        let Some(state) = outbound.get(*sa) else { continue };
        let SaKey::Esp(key) = &state.config.key else { continue };
        let Some(sequence) = number.take() else { continue };
        let packet = arena.bytes_mut(frame).get_mut(usize::from(*at)..).unwrap_or_default();
        ops.push(SealOp { key: key.into(), sequence, esn: state.config.esn, packet });
    }
    let outcomes = crypto.seal(ops);
    let sealed = izip!(&batch.sas, &mut batch.next).filter(|(sa, next)| {
        let esp = outbound.get(**sa).is_some_and(|state| state.config.protocol() == IpsecProtocol::Esp);
        **next == Next::Continue && esp
    });
    for ((_, next), outcome) in sealed.zip(outcomes) {
        if outcome != SealOutcome::Sealed {
            *next = Next::DropOfSa(DropReason::BadLength);
        }
    }
}

/// Computes the ICV of AH, puts the values on the wire in place of the authenticated ones, and the UDP checksum.
fn finish(core: &mut Core, batch: &mut OutboundBatch) {
    let Core { arena, outbound, crypto, .. } = core;
    let columns = izip!(
        &mut batch.frames,
        &batch.sas,
        &batch.at,
        &mut batch.numbers,
        &mut batch.ah_numbers,
        &mut batch.next
    );
    for (frame, sa, at, number, ah_number, next) in columns {
        if *next != Next::Continue {
            continue;
        }
        let (Some(state), Some(peer)) = (outbound.get(*sa), outbound.peer(*sa)) else { continue };
        let config = &*state.config;
        if config.is_plain() && (config.encap.is_none() || peer.is_ipv4()) {
            continue;
        }
        let bundle = outbound.get(state.bundle).map(|bundle| &*bundle.config);
        let ah = match &config.key {
            SaKey::Ah(_) => Some(config).zip(number.take()),
            SaKey::Esp(_) => bundle.zip(ah_number.take()),
        };
        let v6 = config.remote.is_ipv6();
        let at = usize::from(*at);
        let done = match ah {
            Some((ah_config, number)) => {
                let ah_at = if config.protocol() == IpsecProtocol::Ah {
                    at
                } else {
                    at - ah_len(ah_config, v6).min(at)
                };
                sign_ah(arena, crypto, frame, ah_at, ah_config, number)
            }
            None => Some(()),
        }
        .and_then(|()| to_wire(arena.bytes_mut(frame), config, peer, at));
        if done.is_none() {
            *next = Next::DropOfSa(DropReason::EgressMtu);
        }
    }
}

/// Sends every packet where its column says, and empties the batch.
fn dispatch(core: &mut Core, batch: &mut OutboundBatch) {
    let columns = izip!(
        batch.frames.drain(..),
        &batch.cleartexts,
        &batch.flows,
        &batch.sas,
        &batch.routes,
        &batch.at,
        &mut batch.numbers,
        &batch.next
    );
    for (frame, cleartext, flow, sa, route, at, number, next) in columns {
        let port = cleartext.port;
        match (next, flow) {
            (Next::Fan, _) => {
                let packet = Outgoing::new(frame, port, *at, number.take());
                let config = core.outbound.get(*sa).map(|state| &state.config);
                if let Err(frame) = core.fan.put_outbound(packet, *sa, config, *route) {
                    core.discard_of_sa(frame, port, fanout::FULL, Table::Outbound, *sa);
                }
            }
            (Next::Continue, _) => transmit(core, frame, port, *sa, *route),
            (Next::Bypass, Some(flow)) => {
                let hop = cleartext.came == Came::Forwarded;
                forward::route(core, frame, port, flow, Origin::Inside, hop);
            }
            (Next::Bypass, None) => core.discard(frame, port, DropReason::Malformed),
            (Next::Drop(reason), _) => core.discard(frame, port, *reason),
            (Next::DropOfSa(reason), _) => core.discard_of_sa(frame, port, *reason, Table::Outbound, *sa),
            (Next::HandOff(worker), _) => {
                core.hand_off(*worker, port, Parcel::Outbound { frame, port, came: cleartext.came });
            }
        }
    }
    batch.cleartexts.clear();
    batch.flows.clear();
    batch.sas.clear();
    batch.routes.clear();
    batch.numbers.clear();
    batch.ah_numbers.clear();
    batch.at.clear();
    batch.next.clear();
    fanout::hand_out(core);
}

/// Sends a protected packet; in transport mode it may have to be fragmented now.
fn transmit(core: &mut Core, frame: Frame, from: PortIndex, sa: u32, route: Route) {
    if let Some(port) = core.socket_port {
        return egress::enqueue(core, frame, from, port);
    }
    if let Route::Via { mtu, .. } = route
        && frame.len() > usize::from(mtu)
        && Flow::parse(core.arena.bytes(&frame)).is_ok_and(|flow| !flow.dont_fragment)
    {
        return forward::send_in_pieces(core, frame, from, usize::from(mtu), route);
    }
    if matches!(route, Route::Local | Route::Kernel { .. }) {
        // The peer's address is not reached through any of our interfaces: not a packet for the TUN device.
        return core.discard_of_sa(frame, from, DropReason::NoRoute, Table::Outbound, sa);
    }
    egress::send(core, frame, from, route);
}
