//! One pinned worker: quiesce → receive → parse → inbound | outbound | relay → transmit, run to completion (DP-2).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
use hdrhistogram::Histogram;
use postern_contract::counters::DropReason;
use postern_contract::settings::Idle;
use postern_wire::ids::Protocol;
use postern_wire::steer::{Class, Classified, Link, classify};
use postern_wire::{esp, ip4, udp};
use rustix::event::{PollFd, PollFlags, poll};

use crate::command::{Command, Returned, SaSnapshot, Table};
use crate::core::{ACQUIRES_PER_SECOND, Core, ICMP_PER_SECOND};
use crate::egress;
use crate::fanout;
use crate::fib::PortIndex;
use crate::frame::{Arena, BATCH, Frame};
use crate::handoff::Parcel;
use crate::inbound::{self, Arrival, InboundBatch};
use crate::outbound::{self, Came, Cleartext, OutboundBatch};
use crate::port::{LinkKind, Port, PortStats};
use crate::sad::lookup::Handle;

/// Returned objects that wait for the main thread: more than the commands that can be under way and the events of a
/// busy second.
pub const OUTBOX: usize = 1 << 16;
/// Batches of commands that wait for a worker.
pub const COMMANDS: usize = 256;
/// Batches of commands that a worker applies in one turn, so that installing a million SAs does not stop traffic.
const COMMANDS_PER_TURN: usize = 4;
/// Turns without work after which a worker sleeps.
const SPINS: u32 = 256;
/// One turn in this many is timed.
const SAMPLE: u64 = 32;
/// The longest sleep, after which the clock is looked at.
const NAP: Duration = Duration::from_millis(500);

/// The one clock of the process; nanoseconds since the start.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts counting.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since the start.
    pub fn now(self) -> Duration {
        self.0.elapsed()
    }
}

/// What turns need besides the tables.
pub struct Worker {
    /// Tables, frames and counters.
    pub core: Core,
    ports: Box<[Option<Box<dyn Port>>]>,
    /// By port: the worker that has a queue of it.
    server_of: Box<[u8]>,
    commands: Arc<ArrayQueue<Vec<Command>>>,
    inbound: InboundBatch,
    outbound: OutboundBatch,
    quick_inbound: inbound::quick::QuickBatch,
    quick_outbound: outbound::quick::QuickBatch,
    /// By port: its refusals that are counted already.
    refusals: Box<[PortStats]>,
    latency: Histogram<u64>,
    turns: u64,
}

impl Worker {
    /// A worker over its queues of the ports (`None` where it has none).
    pub fn new(
        core: Core,
        ports: Vec<Option<Box<dyn Port>>>,
        server_of: Vec<u8>,
        commands: Arc<ArrayQueue<Vec<Command>>>,
    ) -> Result<Self, hdrhistogram::CreationError> {
        Ok(Self {
            core,
            refusals: vec![PortStats::default(); ports.len()].into(),
            ports: ports.into(),
            server_of: server_of.into(),
            commands,
            inbound: InboundBatch::default(),
            outbound: OutboundBatch::default(),
            quick_inbound: inbound::quick::QuickBatch::default(),
            quick_outbound: outbound::quick::QuickBatch::default(),
            // Two significant digits up to a minute; larger values are saturated.
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 2)?,
            turns: 0,
        })
    }

    /// The whole walk, once. `now` is the time since the start of the datapath. Says whether there was work.
    pub fn turn(&mut self, now: Duration) -> bool {
        self.tick(now);
        let mut busy = self.quiesce();
        busy |= fanout::begin(&mut self.core, now);
        let (mut received, mut full) = self.open_parcels();
        for index in 0..self.ports.len() {
            if !self.core.fan.has_room() {
                // What is out comes first; packets wait in the ring.
                full = true;
                break;
            }
            let mut frames = ArrayVec::new();
            self.receive(index, &mut frames);
            if frames.is_empty() {
                continue;
            }
            received = true;
            full |= frames.is_full();
            let port = PortIndex(u16::try_from(index).unwrap_or(u16::MAX));
            self.parse(port, frames);
            self.walk_from(port);
        }
        busy |= received | fanout::share(&mut self.core, full, received);
        if !self.core.own.is_empty() {
            self.walk();
        }
        egress::flush(&mut self.core, &mut self.ports, &self.server_of);
        let Core { arena, pool, .. } = &mut self.core;
        for port in self.ports.iter_mut().flatten() {
            port.flush(arena, pool);
        }
        self.count_refusals();
        if busy {
            self.core.cells.busy_turns.add(1);
        }
        busy
    }

    /// Turns until `stop`, sleeping when there is nothing to do, and gives all frames back to the pool.
    pub fn run(&mut self, clock: Clock, idle: Idle, stop: &AtomicBool) {
        let mut quiet = 0;
        while !stop.load(Ordering::Relaxed) {
            let start = clock.now();
            if self.turn(start) {
                quiet = 0;
                self.turns += 1;
                if self.turns.is_multiple_of(SAMPLE) {
                    let spent = clock.now().saturating_sub(start).as_nanos();
                    self.latency.saturating_record(u64::try_from(spent).unwrap_or(u64::MAX));
                }
                continue;
            }
            quiet += 1;
            if quiet >= SPINS && idle == Idle::Poll {
                self.sleep(stop);
            } else {
                std::hint::spin_loop();
            }
        }
        fanout::leave(&mut self.core);
        egress::flush(&mut self.core, &mut self.ports, &self.server_of);
        let Core { arena, pool, .. } = &mut self.core;
        for port in self.ports.iter_mut().flatten() {
            port.drain(arena, pool);
        }
        self.count_refusals();
    }

    fn sleep(&self, stop: &AtomicBool) {
        let Some(inbox) = self.core.inboxes.get(usize::from(self.core.id)) else { return };
        let bell = inbox.bell();
        bell.lie_down();
        // A port with work left in the kernel is asked again soon instead.
        if self.ports.iter().flatten().any(|port| port.busy()) {
            bell.get_up();
            return;
        }
        let nothing = self.commands.is_empty() && inbox.is_empty() && self.core.fan.may_sleep();
        if nothing && !stop.load(Ordering::Relaxed) {
            let mut fds = ArrayVec::<PollFd<'_>, 64>::new();
            fds.push(PollFd::new(bell.as_ref(), PollFlags::IN));
            let ports = self.ports.iter().flatten().filter_map(|port| port.wait_fd());
            fds.extend(
                ports.take(fds.remaining_capacity()).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
            );
            let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::from(NAP.subsec_nanos()) };
            // An error is a signal or nothing that sleeping longer would mend; the next turn looks at everything.
            let _ = poll(&mut fds, Some(&timeout));
        }
        bell.get_up();
    }

    /// Frames that ports refused by themselves: they are counted as dropped but never as received, or as transmitted as
    /// well.
    pub fn refused(&self) -> u64 {
        self.refusals.iter().map(PortStats::total).sum()
    }

    /// Counts what the ports refused by themselves under the reasons that everything else is counted under.
    fn count_refusals(&mut self) {
        for ((port, seen), cells) in self.ports.iter().zip(&mut self.refusals).zip(&*self.core.cells.ports) {
            let Some(port) = port else { continue };
            let now = port.stats();
            if now == *seen {
                continue;
            }
            let PortStats {
                no_frame,
                too_big,
                not_ours,
                keepalive,
                malformed_received,
                malformed,
                refused,
                receive_ring_full,
                fill_ring_empty,
                bad_descriptor,
            } = now;
            let counts = [
                (DropReason::NoFrame, no_frame - seen.no_frame),
                (DropReason::EgressMtu, too_big - seen.too_big),
                (DropReason::NotForUs, not_ours - seen.not_ours),
                (DropReason::NattKeepalive, keepalive - seen.keepalive),
                (DropReason::Malformed, malformed_received - seen.malformed_received),
                (DropReason::Malformed, malformed - seen.malformed),
                (DropReason::TransmitRefused, refused - seen.refused),
                (DropReason::ReceiveRingFull, receive_ring_full - seen.receive_ring_full),
                (DropReason::FillRingEmpty, fill_ring_empty - seen.fill_ring_empty),
                (DropReason::BadDescriptor, bad_descriptor - seen.bad_descriptor),
            ];
            for (reason, count) in counts {
                cells.drop_many(reason, count);
            }
            *seen = now;
        }
    }

    /// Once a second: what is counted by the second.
    fn tick(&mut self, now: Duration) {
        // Second 0 means "never" in the tables.
        let second = u32::try_from(now.as_secs()).unwrap_or(u32::MAX).saturating_add(1);
        if second != self.core.now {
            self.core.now = second;
            self.core.icmp_tokens = ICMP_PER_SECOND;
            egress::evict(&mut self.core);
            self.core.acquire_tokens = ACQUIRES_PER_SECOND;
            self.core.cells.free_frames.set(self.core.pool.available() as u64);
            for port in self.ports.iter_mut().flatten() {
                port.ask_kernel();
            }
        }
    }

    /// Applies commands: between turns no stage holds anything of the tables.
    fn quiesce(&mut self) -> bool {
        let mut busy = false;
        for _ in 0..COMMANDS_PER_TURN {
            let Some(mut batch) = self.commands.pop() else { break };
            busy = true;
            for command in &mut batch {
                apply(&mut self.core, &self.latency, command);
            }
            // The vector goes back with what the worker only had to look at: nothing is freed here.
            self.core.send(Returned::Commands(batch));
            self.core.cells.commands.fetch_add(1, Ordering::Release);
        }
        if busy {
            self.core.cells.inbound.set(self.core.inbound.len() as u64);
            self.core.cells.outbound.set(self.core.outbound.len() as u64);
        }
        busy
    }

    /// Takes what other workers left here. Says whether that was anything, and whether it was a whole batch.
    fn open_parcels(&mut self) -> (bool, bool) {
        if !self.core.fan.has_room() {
            return (false, false);
        }
        let mut opened = false;
        while self.inbound.remaining() > 0 && self.outbound.remaining() > 0 {
            // The list itself is shared by all workers: a clone would make its count go to and fro between them.
            let parcel =
                self.core.inboxes.get(usize::from(self.core.id)).and_then(crate::handoff::Inbox::pop);
            let Some(parcel) = parcel else { break };
            opened = true;
            match parcel {
                Parcel::Inbound { mut frame, port } => {
                    let classified = classify(&self.core.arena.bytes(&frame), Link::Ip);
                    match arrive(&self.core.arena, &mut frame, port, classified) {
                        Ok(arrival) => {
                            if let Err(frame) = self.inbound.push(frame, arrival) {
                                self.core.discard(frame, port, DropReason::HandoffFull);
                            }
                        }
                        Err(reason) => self.core.discard(frame, port, reason),
                    }
                }
                Parcel::Outbound { frame, port, came } => {
                    if let Err(frame) = self.outbound.push(frame, Cleartext { port, came }) {
                        self.core.discard(frame, port, DropReason::HandoffFull);
                    }
                }
                Parcel::Transmit { frame, port, from } => {
                    egress::enqueue(&mut self.core, frame, from, port);
                }
            }
        }
        let full = self.inbound.remaining() == 0 || self.outbound.remaining() == 0;
        self.walk();
        (opened, full)
    }

    fn receive(&mut self, index: usize, frames: &mut ArrayVec<Frame, BATCH>) {
        let Some(Some(port)) = self.ports.get_mut(index) else { return };
        let Core { arena, pool, cells, .. } = &mut self.core;
        port.receive(arena, pool, frames);
        if let Some(cells) = cells.ports.get(index)
            && !frames.is_empty()
        {
            cells.received.add(frames.len() as u64);
            cells.received_bytes.add(frames.iter().map(|frame| frame.len() as u64).sum());
        }
    }

    /// Sorts the frames of one port into the batches, by the parser that the XDP program runs as well (DP-1).
    fn parse(&mut self, port: PortIndex, mut frames: ArrayVec<Frame, BATCH>) {
        let Some(info) = self.core.ports.get(usize::from(port.0)) else { return };
        let (role, host) = (info.role, info.host);
        let link = match info.link {
            LinkKind::Ethernet => Link::Ethernet,
            LinkKind::Ip => Link::Ip,
        };
        // Where all outer packets leave through a socket there is no short way.
        if link == Link::Ethernet && self.core.socket_port.is_none() {
            if role.is_outside() {
                inbound::quick::take(&self.core, &mut self.quick_inbound, &mut frames);
            }
            if role.is_inside() && !host && !frames.is_empty() {
                outbound::quick::take(&self.core, &mut self.quick_outbound, &mut frames);
            }
        }
        for mut frame in frames {
            let packet = self.core.arena.bytes(&frame);
            let usual = if link == Link::Ethernet { classify_usual(packet) } else { None };
            let classified = usual.unwrap_or_else(|| classify(&packet, link));
            let refused = match classified.class {
                Class::Esp | Class::EspInUdp | Class::Ah if role.is_outside() => {
                    match arrive(&self.core.arena, &mut frame, port, classified) {
                        Ok(arrival) => match self.inbound.push(frame, arrival) {
                            Ok(()) => continue,
                            Err(returned) => {
                                frame = returned;
                                DropReason::NoFrame
                            }
                        },
                        Err(reason) => reason,
                    }
                }
                Class::NattKeepalive if role.is_outside() => DropReason::NattKeepalive,
                Class::IpsecFragment if role.is_outside() => DropReason::Fragment,
                // To a host behind us a datagram on port 4500 may carry anything: what is sound as an IP packet is left to
                // the outbound stages, which look at nothing else.
                Class::Malformed if !role.is_inside() || !agrees(&self.core.arena, &frame, classified) => {
                    DropReason::Malformed
                }
                Class::TooManyExtensionHeaders => DropReason::TooManyExtensionHeaders,
                Class::NotIp => DropReason::NotForUs,
                _ if role.is_inside() => {
                    let came = if host { Came::Host } else { Came::Forwarded };
                    match frame.shrink_front(usize::from(classified.network)) {
                        Some(()) => match self.outbound.push(frame, Cleartext { port, came }) {
                            Ok(()) => continue,
                            Err(returned) => {
                                frame = returned;
                                DropReason::NoFrame
                            }
                        },
                        None => DropReason::Malformed,
                    }
                }
                _ => DropReason::NotForUs,
            };
            self.core.discard(frame, port, refused);
        }
    }

    /// All stages over what the batches of packets from one port hold; what is usual comes first.
    fn walk_from(&mut self, port: PortIndex) {
        if !self.quick_inbound.is_empty() {
            inbound::quick::run(&mut self.core, &mut self.quick_inbound, port, &mut self.inbound);
        }
        if !self.quick_outbound.is_empty() {
            outbound::quick::run(&mut self.core, &mut self.quick_outbound, port, &mut self.outbound);
        }
        self.walk();
    }

    /// All stages over what the batches of what is not usual hold.
    fn walk(&mut self) {
        if !self.inbound.is_empty() {
            inbound::run(&mut self.core, &mut self.inbound);
        }
        if !self.core.own.is_empty() {
            let mut own = std::mem::take(&mut self.core.own);
            outbound::run(&mut self.core, &mut own);
            self.core.own = own;
        }
        if !self.outbound.is_empty() {
            outbound::run(&mut self.core, &mut self.outbound);
        }
    }
}

/// [`classify`] of what most frames are, in a few steps: whole IPv4 packets without options over Ethernet that are
/// neither AH nor UDP to ports that mean something here. `None` of all others.
#[inline]
fn classify_usual(frame: &[u8]) -> Option<Classified> {
    const IKE: u16 = 500;
    const NATT: u16 = 4500;
    const NETWORK: u16 = 14;
    const TRANSPORT: u16 = 34;
    // With as much of the transport header as tells UDP's destination.
    let head = frame.first_chunk::<{ TRANSPORT as usize + 4 }>()?;
    let [
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        0x08,
        0x00,
        0x45,
        _,
        t0,
        t1,
        _,
        _,
        f0,
        f1,
        _,
        protocol,
        ..,
        p0,
        p1,
    ] = *head
    else {
        return None;
    };
    let total = usize::from(u16::from_be_bytes([t0, t1]));
    // RFC 791 section 3.1: More Fragments and the offset.
    let whole = u16::from_be_bytes([f0, f1]).trailing_zeros() >= 14;
    let protocol = Protocol(protocol);
    let (class, least) = match protocol {
        Protocol::ESP => (Class::Esp, ip4::MIN_LEN + esp::HEADER_LEN),
        Protocol::AH => return None,
        Protocol::UDP if matches!(u16::from_be_bytes([p0, p1]), IKE | NATT) => return None,
        Protocol::UDP => (Class::Ip, ip4::MIN_LEN + udp::LEN),
        _ => (Class::Ip, ip4::MIN_LEN),
    };
    (whole && total >= least && total + usize::from(NETWORK) <= frame.len()).then_some(Classified {
        class,
        v6: false,
        later_fragment: false,
        network: NETWORK,
        transport: TRANSPORT,
        protocol,
    })
}

/// Whether the IP version is the one that the link header tells.
fn agrees(arena: &Arena, frame: &Frame, classified: Classified) -> bool {
    let packet = arena.bytes(frame).get(usize::from(classified.network)..).unwrap_or_default();
    crate::header::is_v6(packet) == Some(classified.v6)
}

/// Checks an IPsec packet's outer header and cuts its frame to the IP packet: no link header in front, no Ethernet
/// padding behind.
#[inline]
pub fn arrive(
    arena: &Arena,
    frame: &mut Frame,
    port: PortIndex,
    classified: Classified,
) -> Result<Arrival, DropReason> {
    let network = usize::from(classified.network);
    frame.shrink_front(network).ok_or(DropReason::Malformed)?;
    let packet = arena.bytes(frame);
    if let Some([0x45, _, high, low, ..]) = packet.first_chunk::<{ ip4::MIN_LEN }>()
        && classified.class == Class::Esp
    {
        // The same in fewer steps: `classify` saw that the packet ends inside the frame.
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        if !crate::header::checksum_ok(packet) {
            return Err(DropReason::BadIpChecksum);
        }
        let arrival = Arrival::new(port, classified, packet).ok_or(DropReason::Malformed)?;
        frame.truncate(len);
        return Ok(arrival);
    }
    let len = crate::header::total_len(packet).ok_or(DropReason::Malformed)?;
    if len > packet.len() {
        return Err(DropReason::Malformed);
    }
    // RFC 1122 section 3.2.1.2: "A host MUST verify the IP header checksum on every received datagram".
    if !classified.v6 && !crate::header::checksum_ok(packet) {
        return Err(DropReason::BadIpChecksum);
    }
    let arrival = Arrival::new(port, classified, packet).ok_or(DropReason::Malformed)?;
    if arrival.encapsulated {
        // Bytes between the end of the datagram and that of the packet belong to neither ESP nor UDP.
        let at = usize::from(arrival.transport);
        if crate::header::get_u16(packet, at - 4).map(usize::from) != Some(len + udp::LEN - at) {
            return Err(DropReason::Malformed);
        }
    }
    frame.truncate(len);
    Ok(arrival)
}

/// One command. What is only looked at stays in it.
fn apply(core: &mut Core, latency: &Histogram<u64>, command: &mut Command) {
    match command {
        Command::PutPolicy(policy, handle) => {
            core.flows.forget();
            return core.spd.insert(policy, *handle);
        }
        Command::ReportSas(places) => return report(core, places),
        _ => {}
    }
    match std::mem::replace(command, Command::Applied) {
        Command::Applied | Command::PutPolicy(..) | Command::ReportSas(_) => {}
        Command::PutInbound(index, sa, rest) => {
            core.fan.note(&sa.config);
            core.sa_drops.forget(Table::Inbound, index);
            if let Some(old) = core.inbound.install(index, sa, rest) {
                fanout::forget(core, &old.0.config);
                core.send(Returned::Inbound(index, Box::new(old)));
            }
        }
        Command::PutOutbound(index, sa, rest) => {
            core.fan.note(&sa.config);
            core.sa_drops.forget(Table::Outbound, index);
            if let Some(old) = core.outbound.install(index, sa, rest) {
                fanout::forget(core, &old.0.config);
                core.send(Returned::Outbound(index, Box::new(old)));
            }
        }
        Command::Reconfigure { table, index, config, move_peer } => {
            let now = core.now;
            core.fan.note(&config);
            let old = match table {
                Table::Inbound => core.inbound.reconfigure(index, config, move_peer, now),
                Table::Outbound => core.outbound.reconfigure(index, config, move_peer, now),
            };
            if let Some(old) = old {
                fanout::forget(core, &old);
                core.send(Returned::Config(old));
            }
        }
        Command::Take(Table::Inbound, index) => {
            if let Some(sa) = core.inbound.remove(index) {
                fanout::forget(core, &sa.0.config);
                core.send(Returned::Inbound(index, Box::new(sa)));
            }
        }
        Command::Take(Table::Outbound, index) => {
            if let Some(sa) = core.outbound.remove(index) {
                fanout::forget(core, &sa.0.config);
                core.send(Returned::Outbound(index, Box::new(sa)));
            }
        }
        Command::Link { table: Table::Inbound, index, pair, bundle } => {
            if let Some((_, rest)) = core.inbound.both_mut(index) {
                (rest.pair, rest.bundle) = (pair, bundle);
            }
        }
        Command::Link { table: Table::Outbound, index, pair: _, bundle } => {
            if let Some(sa) = core.outbound.get_mut(index) {
                sa.bundle = bundle;
            }
        }
        Command::Route(protocol, spi, Some(handle)) => core.spis.insert(protocol, spi, handle),
        Command::Route(protocol, spi, None) => core.spis.remove(protocol, spi),
        Command::Raise { index, id, ceiling } => {
            if let Some(sa) = core.outbound.get_mut(index).filter(|sa| sa.config.id == id) {
                sa.sequence.raise(ceiling);
                sa.reserving = false;
            }
        }
        Command::Stop(Table::Inbound, index, id) => {
            if let Some(sa) = core.inbound.get_mut(index).filter(|sa| sa.config.id == id) {
                sa.stopped = true;
            }
        }
        Command::Stop(Table::Outbound, index, id) => {
            if let Some(sa) = core.outbound.get_mut(index).filter(|sa| sa.config.id == id) {
                sa.stopped = true;
            }
        }
        Command::SetPolicyHandle(policy, handle) => {
            core.flows.forget();
            core.spd.set_handle(policy, handle);
        }
        Command::RemovePolicy(policy) => {
            core.flows.forget();
            core.spd.remove(policy);
        }
        Command::PutRelay(entry) => {
            if let Some(old) = core.relays.put(entry) {
                core.send(Returned::Relay(old));
            }
        }
        Command::RemoveRelay(id) => {
            if let Some(old) = core.relays.remove(id) {
                core.send(Returned::Relay(old));
            }
        }
        Command::Fib(fib) => {
            let old = core.fib.replace(fib);
            core.send(Returned::Fib(old));
            egress::unpark(core);
        }
        Command::ReportTops(mut tops) => {
            tops.retain_mut(|(id, index, top)| match core.inbound.get(*index) {
                Some(sa) if sa.config.id == *id => {
                    *top = sa.window.top();
                    true
                }
                _ => false,
            });
            core.send(Returned::Tops(tops));
        }
        Command::ReportRelays => core.send(Returned::Relays(core.relays.counters())),
        Command::ReportLatency => core.send(Returned::Latency(Box::new(latency.clone()))),
    }
}

/// Reports SAs; those that are gone by now are left out.
fn report(core: &Core, places: &[(Table, u32)]) {
    let idle = |last: u32| (last > 0).then(|| u64::from(core.now.saturating_sub(last)));
    let snapshot = |(table, index): &(Table, u32)| {
        let (config, traffic, sequence, peer, port, last_used, stopped) = match table {
            Table::Inbound => {
                let (sa, peer) = core.inbound.get(*index).zip(core.inbound.peer(*index))?;
                (&sa.config, sa.traffic, sa.window.top(), peer, sa.peer_port, sa.last_used, sa.stopped)
            }
            Table::Outbound => {
                let (sa, peer) = core.outbound.get(*index).zip(core.outbound.peer(*index))?;
                (&sa.config, sa.traffic, sa.sequence.last(), peer, sa.peer_port, sa.last_used, sa.stopped)
            }
        };
        Some(SaSnapshot {
            config: Arc::clone(config),
            packets: traffic.packets,
            bytes: traffic.bytes,
            sequence,
            peer: (peer, port),
            idle_seconds: idle(last_used),
            stopped,
            drops: core.sa_drops.of(*table, *index),
        })
    };
    core.send(Returned::Sas(places.iter().filter_map(snapshot).collect()));
}

/// Which worker a new SA goes to when nothing ties it to one: by its pair, so that both directions meet.
pub fn place(anchor: u64, workers: usize) -> u8 {
    // A multiplication spreads ids that differ in their low bits only (Fibonacci hashing).
    let hash = anchor.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let worker = usize::try_from(hash).unwrap_or_default() % workers.clamp(1, Handle::MAX_WORKERS);
    u8::try_from(worker).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// DP-1: what is classified in a few steps is classified as the XDP program does.
        #[test]
        fn dp_1_the_short_way_agrees(
            mut frame in prop::collection::vec(any::<u8>(), 14..80),
            protocol in prop::sample::select(vec![50_u8, 51, 17, 6, 1]),
            fragment in prop::sample::select(vec![0_u16, 0x4000, 0x2000, 1, 0x8000]),
            total in 0_u16..70,
            port in prop::sample::select(vec![500_u16, 4500, 53, 0x01f4 << 4]),
            version in prop::sample::select(vec![0x45_u8, 0x45, 0x46, 0x60]),
        ) {
            frame[12..14].copy_from_slice(&[8, 0]);
            if frame.len() >= 38 {
                frame[14] = version;
                frame[16..18].copy_from_slice(&total.to_be_bytes());
                frame[20..22].copy_from_slice(&fragment.to_be_bytes());
                frame[23] = protocol;
                frame[36..38].copy_from_slice(&port.to_be_bytes());
            }
            if let Some(usual) = classify_usual(&frame) {
                prop_assert_eq!(usual, classify(&frame.as_slice(), Link::Ethernet));
            }
        }
    }

    /// And it does so for what it is there for.
    #[test]
    fn dp_1_the_short_way_is_used() {
        let mut frame = [0_u8; 60];
        (frame[12], frame[14], frame[17], frame[23]) = (8, 0x45, 46, 50);
        assert_eq!(classify_usual(&frame).map(|found| found.class), Some(Class::Esp));
        frame[23] = 6;
        assert_eq!(classify_usual(&frame).map(|found| found.class), Some(Class::Ip));
        assert_eq!(classify_usual(&frame[..59]), None);
    }
}
