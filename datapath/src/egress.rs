//! The last stages: route → rewrite → transmit.
//!
//! A packet whose neighbour is not known yet waits a moment for the kernel's answer (RFC 1122 section 2.3.2.2: "the link
//! layer SHOULD save (rather than discard) at least one (the latest) packet"), and is counted if none comes.

use arrayvec::ArrayVec;
use postern_contract::counters::DropReason;
use postern_wire::ether;
use postern_wire::ids::EtherType;

use crate::core::Core;
use crate::fib::{Neighbour, PortIndex, Route};
use crate::frame::{BATCH, Frame};
use crate::handoff::Parcel;
use crate::port::{LinkKind, Port};

/// Frames that wait for one port within a turn. A batch can become more frames than it was (fragments), and all ports
/// may lead to one.
const QUEUE: usize = 8 * BATCH;

/// Frames ready to be sent, by port. Each remembers where it came in, for the counters.
pub struct Egress {
    queues: Box<[Vec<(Frame, PortIndex)>]>,
}

impl Egress {
    /// Queues for `ports` ports; they never grow.
    pub fn new(ports: usize) -> Self {
        Self { queues: (0..ports).map(|_| Vec::with_capacity(QUEUE)).collect() }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queues.iter().all(Vec::is_empty)
    }
}

/// Sends a packet that begins with its IP header along `route`. `from` is the port where it came in.
pub fn send(core: &mut Core, mut frame: Frame, from: PortIndex, route: Route) {
    let (port, next_hop, mtu, source, neighbour) = match route {
        Route::Via { port, next_hop, mtu, source_mac, neighbour } => {
            (port, next_hop, mtu, source_mac, neighbour)
        }
        Route::Local | Route::Kernel { .. } => match core.host_port {
            Some(port) => return enqueue(core, frame, from, port),
            None => return core.discard(frame, from, DropReason::NoRoute),
        },
        Route::Unreachable => return core.discard(frame, from, DropReason::NoRoute),
    };
    if frame.len() > usize::from(mtu) {
        return core.discard(frame, from, DropReason::EgressMtu);
    }
    let ethernet = core.ports.get(usize::from(port.0)).is_some_and(|info| info.link == LinkKind::Ethernet);
    if ethernet {
        let Neighbour::Known(destination) = neighbour else {
            core.resolver.resolve(port, next_hop);
            return park(core, frame, from);
        };
        core.resolver.touch(port, next_hop, core.now);
        let version = core.arena.bytes(&frame).first().map_or(0, |byte| byte >> 4);
        let ethertype = if version == 6 { EtherType::IPV6 } else { EtherType::IPV4 };
        let header = ether::Header { destination, source, ethertype };
        let written =
            frame.grow_front(ether::LEN).and_then(|()| header.emit(core.arena.bytes_mut(&mut frame)));
        if written.is_none() {
            return core.discard(frame, from, DropReason::Malformed);
        }
    }
    enqueue(core, frame, from, port);
}

/// A packet that waits for its neighbour.
#[derive(Debug)]
pub struct Parked {
    frame: Frame,
    from: PortIndex,
    /// Second after which it is dropped.
    until: u32,
}

/// Packets of one worker that wait for neighbours.
pub type Parking = ArrayVec<Parked, BATCH>;
/// Seconds that a packet waits at least; the kernel asks a neighbour three times, once a second.
const PATIENCE: u32 = 2;

fn park(core: &mut Core, frame: Frame, from: PortIndex) {
    let parked = Parked { frame, from, until: core.now.saturating_add(PATIENCE) };
    if let Err(full) = core.parking.try_push(parked) {
        let Parked { frame, from, .. } = full.element();
        core.discard(frame, from, DropReason::NeighbourUnresolved);
    }
}

/// Tries the waiting packets again after routes and neighbours changed.
pub fn unpark(core: &mut Core) {
    for Parked { frame, from, until } in std::mem::take(&mut core.parking) {
        let Some(destination) = crate::header::destination(core.arena.bytes(&frame)) else {
            core.discard(frame, from, DropReason::Malformed);
            continue;
        };
        let route = core.fib.lookup(destination);
        let before = core.parking.len();
        send(core, frame, from, route);
        // Parked once more: it waits no longer than it would have.
        if let Some(parked) = core.parking.get_mut(before) {
            parked.until = until;
        }
    }
}

/// Drops the packets that have waited too long.
pub fn evict(core: &mut Core) {
    let now = core.now;
    let mut kept = Parking::new();
    for parked in std::mem::take(&mut core.parking) {
        if parked.until < now {
            core.discard(parked.frame, parked.from, DropReason::NeighbourUnresolved);
        } else {
            kept.push(parked);
        }
    }
    core.parking = kept;
}

/// Puts a frame with its link header into the queue of `port`.
pub fn enqueue(core: &mut Core, frame: Frame, from: PortIndex, port: PortIndex) {
    match core.egress.queues.get_mut(usize::from(port.0)) {
        Some(queue) if queue.len() < QUEUE => queue.push((frame, from)),
        Some(_) => core.discard(frame, from, DropReason::TransmitFull),
        None => core.discard(frame, from, DropReason::NoRoute),
    }
}

/// Gives all queues to the ports. A port of which this worker has no queue is served by the worker that has one.
pub fn flush(core: &mut Core, ports: &mut [Option<Box<dyn Port>>], server_of: &[u8]) {
    for (index, port) in ports.iter_mut().enumerate() {
        let Some(queue) = core.egress.queues.get_mut(index) else { continue };
        if queue.is_empty() {
            continue;
        }
        let mut queue = std::mem::take(queue);
        let out = PortIndex(u16::try_from(index).unwrap_or(u16::MAX));
        if let Some(port) = port {
            transmit(core, port.as_mut(), out, &mut queue);
        } else {
            let server = server_of.get(index).copied().unwrap_or(u8::MAX);
            for (frame, from) in queue.drain(..) {
                core.hand_off(server, from, Parcel::Transmit { frame, port: out, from });
            }
        }
        if let Some(place) = core.egress.queues.get_mut(index) {
            *place = queue;
        }
    }
}

fn transmit(core: &mut Core, port: &mut dyn Port, out: PortIndex, queue: &mut Vec<(Frame, PortIndex)>) {
    let mut waiting = queue.drain(..);
    loop {
        let mut frames = ArrayVec::<Frame, BATCH>::new();
        let mut origins = ArrayVec::<PortIndex, BATCH>::new();
        let mut bytes = 0u64;
        for (frame, from) in waiting.by_ref().take(BATCH) {
            bytes += frame.len() as u64;
            frames.push(frame);
            origins.push(from);
        }
        if frames.is_empty() {
            return;
        }
        let sent = port.transmit(&core.arena, &mut core.pool, &mut frames);
        for (frame, from) in frames.drain(..).zip(origins.into_iter().skip(sent)) {
            bytes -= frame.len() as u64;
            core.discard(frame, from, DropReason::TransmitFull);
        }
        if let Some(cells) = core.cells.ports.get(usize::from(out.0)) {
            cells.transmitted.add(sent as u64);
            cells.transmitted_bytes.add(bytes);
        }
    }
}
