//! A port without a device, for tests and benches: a [`MemoryHandle`] gives it packets and takes those it transmitted.
//!
//! Buffers are kept and used again, so that after the first round neither side allocates. The lock between port and handle is
//! free of contention in a bench, where both are used by one thread; no other port has one.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrayvec::ArrayVec;

use super::{LinkKind, Port, PortStats};
use crate::frame::{Arena, BATCH, Frame, MAX_RECEIVE, Pool};

/// The worker's side.
#[derive(Debug)]
pub struct MemoryPort {
    link: LinkKind,
    state: Arc<Mutex<State>>,
    stats: PortStats,
}

/// The other side; a clone is another handle on the same port.
#[derive(Clone, Debug)]
pub struct MemoryHandle(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    arriving: VecDeque<Vec<u8>>,
    departed: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    repeated: Vec<Vec<u8>>,
    next_repeated: usize,
    room: Option<usize>,
    discard: bool,
    transmitted: u64,
    transmitted_bytes: u64,
}

impl MemoryPort {
    /// A port, and the handle that is its wire.
    pub fn new(link: LinkKind) -> (Self, MemoryHandle) {
        let state = Arc::new(Mutex::new(State::default()));
        (Self { link, state: Arc::clone(&state), stats: PortStats::default() }, MemoryHandle(state))
    }
}

impl MemoryHandle {
    /// Queues a packet for the port to receive.
    pub fn push(&self, packet: &[u8]) {
        let mut state = self.lock();
        let mut buffer = state.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        state.arriving.push_back(buffer);
    }

    /// From now on, whenever nothing is queued, the port receives full batches of these packets, in turn and without end. An
    /// empty list ends that.
    pub fn repeat(&self, packets: Vec<Vec<u8>>) {
        let mut state = self.lock();
        state.repeated = packets;
        state.next_repeated = 0;
    }

    /// The oldest packet transmitted and not yet taken.
    pub fn pop(&self) -> Option<Vec<u8>> {
        self.lock().departed.pop_front()
    }

    /// All packets transmitted and not yet taken, oldest first.
    pub fn take_all(&self) -> Vec<Vec<u8>> {
        self.lock().departed.drain(..).collect()
    }

    /// With `true`, transmitted packets are counted and not kept: for benches.
    pub fn discard(&self, on: bool) {
        self.lock().discard = on;
    }

    /// Room for so many more frames to transmit, as if the ring were that full; `None` for no limit.
    pub fn set_room(&self, room: Option<usize>) {
        self.lock().room = room;
    }

    /// Packets queued that the port has not received yet.
    pub fn waiting(&self) -> usize {
        self.lock().arriving.len()
    }

    /// Packets and bytes transmitted since the port was made.
    pub fn transmitted(&self) -> (u64, u64) {
        let state = self.lock();
        (state.transmitted, state.transmitted_bytes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

/// A thread that panicked in a test leaves the queues as whole as they were.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port for MemoryPort {
    fn receive(&mut self, arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        let mut state = lock(&self.state);
        for _ in 0..out.remaining_capacity() {
            if let Some(packet) = state.arriving.pop_front() {
                self.stats.receive(arena, pool, out, &packet);
                state.spare.push(packet);
            } else if let Some(packet) = state.repeated.get(state.next_repeated) {
                self.stats.receive(arena, pool, out, packet);
                state.next_repeated = (state.next_repeated + 1) % state.repeated.len();
            } else {
                return;
            }
        }
    }

    fn transmit(&mut self, arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let mut state = lock(&self.state);
        let count = frames.len().min(state.room.unwrap_or(BATCH));
        for frame in frames.drain(..count) {
            let packet = arena.bytes(&frame);
            state.transmitted += 1;
            state.transmitted_bytes += u64::try_from(packet.len()).unwrap_or(u64::MAX);
            if !state.discard {
                let mut buffer = state.spare.pop().unwrap_or_default();
                buffer.clear();
                buffer.extend_from_slice(packet);
                state.departed.push_back(buffer);
            }
            pool.give(frame);
        }
        if let Some(room) = &mut state.room {
            *room -= count;
        }
        count
    }

    fn flush(&mut self, _arena: &Arena, _pool: &mut Pool) {}

    fn drain(&mut self, _arena: &Arena, _pool: &mut Pool) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn link(&self) -> LinkKind {
        self.link
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }

    fn stats(&self) -> PortStats {
        self.stats
    }
}

impl PortStats {
    /// Copies a packet into a frame of the pool, or counts why not.
    fn receive(&mut self, arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>, packet: &[u8]) {
        if packet.len() > MAX_RECEIVE {
            self.too_big += 1;
            return;
        }
        let Some(mut frame) = pool.take() else {
            self.no_frame += 1;
            return;
        };
        if frame.grow_back(packet.len()).is_some() {
            arena.bytes_mut(&mut frame).copy_from_slice(packet);
        }
        out.extend(Some(frame));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world() -> (Arena, Pool, MemoryPort, MemoryHandle) {
        let (arena, frames) = Arena::new(128, false).unwrap();
        let pool = Pool::split(frames, 1).pop().unwrap();
        let (port, handle) = MemoryPort::new(LinkKind::Ethernet);
        (arena, pool, port, handle)
    }

    #[test]
    fn packets_pass_in_order_and_frames_return() {
        let (arena, mut pool, mut port, handle) = world();
        for n in 0..100_u8 {
            handle.push(&[n; 60]);
        }
        let mut batch = ArrayVec::new();
        let mut expected = 0..100_u8;
        while handle.waiting() > 0 {
            port.receive(&arena, &mut pool, &mut batch);
            assert_eq!(port.transmit(&arena, &mut pool, &mut batch), 64.min(expected.len()));
            assert!(batch.is_empty());
            for packet in handle.take_all() {
                assert_eq!(packet, [expected.next().unwrap(); 60]);
            }
        }
        assert_eq!(expected.next(), None);
        assert_eq!(handle.transmitted(), (100, 6000));
        assert_eq!(pool.available(), 128);
    }

    #[test]
    fn a_full_ring_leaves_the_rest_to_the_caller() {
        let (arena, mut pool, mut port, handle) = world();
        (0..10).for_each(|n| handle.push(&[n]));
        handle.set_room(Some(4));
        let mut batch = ArrayVec::new();
        port.receive(&arena, &mut pool, &mut batch);
        assert_eq!(port.transmit(&arena, &mut pool, &mut batch), 4);
        assert_eq!(port.transmit(&arena, &mut pool, &mut batch), 0);
        assert_eq!(arena.bytes(&batch[0]), &[4]);
        assert_eq!(batch.len(), 6);
    }

    /// DP-6: a packet for which there is no frame, or that fits none, is counted.
    #[test]
    fn dp_6_refusals_are_counted() {
        let (arena, mut pool, mut port, handle) = world();
        let mut held: Vec<Frame> = std::iter::from_fn(|| pool.take()).collect();
        let mut batch = ArrayVec::new();
        handle.push(&[0; 60]);
        port.receive(&arena, &mut pool, &mut batch);
        pool.give(held.pop().unwrap());
        handle.push(&[0; MAX_RECEIVE + 1]);
        handle.push(&[0; MAX_RECEIVE]);
        port.receive(&arena, &mut pool, &mut batch);
        assert_eq!(port.stats(), PortStats { no_frame: 1, too_big: 1, ..PortStats::default() });
        assert_eq!(batch[0].len(), MAX_RECEIVE);
    }

    #[test]
    fn repeated_packets_fill_every_batch() {
        let (arena, mut pool, mut port, handle) = world();
        handle.discard(true);
        handle.repeat(vec![vec![1], vec![2], vec![3]]);
        handle.push(&[0]);
        let mut batch = ArrayVec::new();
        let mut seen = Vec::new();
        for _ in 0..3 {
            port.receive(&arena, &mut pool, &mut batch);
            assert!(batch.is_full());
            seen.extend(batch.iter().map(|frame| arena.bytes(frame)[0]));
            port.transmit(&arena, &mut pool, &mut batch);
        }
        assert_eq!(seen[..8], [0, 1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(handle.transmitted().0, 3 * 64);
        assert_eq!(handle.pop(), None);
        handle.repeat(Vec::new());
        port.receive(&arena, &mut pool, &mut batch);
        assert!(batch.is_empty());
    }
}
