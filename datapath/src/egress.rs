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

/// Frames that wait for one port within a turn, in batches as ports take them. A batch can become more frames than it
/// was (fragments), and all ports may lead to one.
const BATCHES: usize = 8;

/// Frames ready to be sent, by port. Each remembers where it came in, for the counters.
pub struct Egress {
    queues: Box<[Queue]>,
}

/// Of one port.
struct Queue {
    batches: Box<[ArrayVec<Frame, BATCH>; BATCHES]>,
    /// The batch that is being filled; those before it are full, those behind it empty.
    filling: usize,
}

impl Egress {
    /// Queues for `ports` ports; they never grow.
    pub fn new(ports: usize) -> Self {
        let queue = || Queue { batches: Box::new(std::array::from_fn(|_| ArrayVec::new())), filling: 0 };
        Self { queues: (0..ports).map(|_| queue()).collect() }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        let first = |queue: &Queue| queue.batches.first().is_none_or(ArrayVec::is_empty);
        self.queues.iter().all(first)
    }

    /// A batch of `port` with room for one frame more, or why there is none. Only frames with their link header and with
    /// [`Frame::set_note`] of the port where they came in are for it: see [`put`].
    #[inline]
    pub fn room(&mut self, port: PortIndex) -> Result<&mut ArrayVec<Frame, BATCH>, DropReason> {
        let queue = self.queues.get_mut(usize::from(port.0)).ok_or(DropReason::NoRoute)?;
        if queue.batches.get(queue.filling).is_none_or(ArrayVec::is_full) {
            // Not further than past the last one: flushing begins anew.
            queue.filling = (queue.filling + 1).min(BATCHES);
        }
        queue.batches.get_mut(queue.filling).ok_or(DropReason::TransmitFull)
    }
}

/// Puts a frame with its link header, which came in on `from`, where there is [`Egress::room`].
#[inline]
pub fn put(room: &mut ArrayVec<Frame, BATCH>, mut frame: Frame, from: PortIndex) {
    frame.set_note(from.0.into());
    // Not `Err`: there is room.
    let _ = room.try_push(frame);
}

/// The same with `len` bytes of the frame, those behind the first `front`.
#[inline]
pub fn put_part(room: &mut ArrayVec<Frame, BATCH>, mut frame: Frame, from: PortIndex, front: u16, len: u16) {
    // The caller has seen that it has so many.
    let _ = frame.cut(front, len);
    put(room, frame, from);
}

/// Where a frame that was queued came in.
fn origin(frame: &Frame) -> PortIndex {
    PortIndex(u16::try_from(frame.note()).unwrap_or(u16::MAX))
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
#[inline]
pub fn enqueue(core: &mut Core, frame: Frame, from: PortIndex, port: PortIndex) {
    match core.egress.room(port) {
        Ok(room) => put(room, frame, from),
        Err(reason) => core.discard(frame, from, reason),
    }
}

/// Gives all queues to the ports. A port of which this worker has no queue is served by the worker that has one.
pub fn flush(core: &mut Core, ports: &mut [Option<Box<dyn Port>>], server_of: &[u8]) {
    let Core { arena, pool, egress, cells, inboxes, .. } = core;
    for (index, (port, queue)) in ports.iter_mut().zip(&mut egress.queues).enumerate() {
        let out = PortIndex(u16::try_from(index).unwrap_or(u16::MAX));
        for frames in queue.batches.iter_mut().take(queue.filling + 1) {
            if frames.is_empty() {
                continue;
            }
            if let Some(port) = port {
                let mut bytes: u64 = frames.iter().map(|frame| frame.len() as u64).sum();
                let sent = port.transmit(arena, pool, frames);
                for frame in frames.drain(..) {
                    bytes -= frame.len() as u64;
                    cells.count_drop(origin(&frame), DropReason::TransmitFull);
                    pool.give(frame);
                }
                if let Some(cells) = cells.ports.get(index) {
                    cells.transmitted.add(sent as u64);
                    cells.transmitted_bytes.add(bytes);
                }
            } else {
                let server = server_of.get(index).copied().unwrap_or(u8::MAX);
                for frame in frames.drain(..) {
                    let from = origin(&frame);
                    let parcel = Parcel::Transmit { frame, port: out, from };
                    if let Err((parcel, reason)) = crate::core::hand_off(cells, inboxes, server, parcel) {
                        cells.count_drop(from, reason);
                        pool.give(parcel.into_frame());
                    }
                }
            }
        }
        queue.filling = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Arena;
    use crate::testbed::{INSIDE, Layout, OUTSIDE, Testbed};

    /// DP-6: a queue takes what it has room for, tells of the rest, and remembers where each frame came in.
    #[test]
    fn dp_6_a_full_queue_says_so() {
        const PORT: PortIndex = PortIndex(1);
        let (_arena, frames) = Arena::new(u32::try_from(BATCHES * BATCH).unwrap(), false).unwrap();
        let mut egress = Egress::new(2);
        assert!(egress.is_empty());
        for (frame, from) in frames.into_iter().zip(0..) {
            put(egress.room(PORT).unwrap(), frame, PortIndex(from));
        }
        for _ in 0..3 {
            assert_eq!(egress.room(PORT).err(), Some(DropReason::TransmitFull));
        }
        assert_eq!(egress.room(PortIndex(2)).err(), Some(DropReason::NoRoute));
        assert!(egress.room(PortIndex(0)).unwrap().is_empty() && !egress.is_empty());
        let waiting = egress.queues[1].batches.iter().take(egress.queues[1].filling + 1).flatten();
        assert!(waiting.map(origin).eq((0..).map(PortIndex).take(BATCHES * BATCH)));
    }

    /// DP-6: all that a full queue took is given to the port, and the next turn begins with an empty one.
    #[test]
    fn dp_6_a_full_queue_is_flushed() {
        let state = tempfile::tempdir().unwrap();
        let mut bed = Testbed::new(&Layout::default(), state.path()).unwrap();
        for round in 1..3 {
            for _ in 0..BATCHES * BATCH + 88 {
                let core = &mut bed.workers.borrow_mut()[0].core;
                let frame = core.pool.take().unwrap();
                enqueue(core, frame, INSIDE, OUTSIDE);
            }
            assert_eq!(bed.drops(DropReason::TransmitFull), 88 * round);
            assert_eq!(bed.departed().0.len(), BATCHES * BATCH);
            assert_eq!(bed.missing_frames(), 0);
        }
    }
}
