//! The packet memory as the kernel knows it ([`Umem`]), and the book of chunks that the kernel holds ([`Ledger`]).

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::frame::{Arena, FRAME_SIZE, Frame};

/// An [`Arena`] that AF_XDP sockets share. A clone is another handle on the same.
///
/// The first socket registers the memory; each later one, of whatever interface and queue, binds to it with `XDP_SHARED_UMEM`
/// and brings its own fill and completion ring. The kernel gives all sockets of one registration the same modes, so an
/// interface without zero-copy among others with it makes a second registration of the same memory: an address means the same
/// chunk in both, and frames pass between the sockets of both without being copied.
#[derive(Clone, Debug)]
pub struct Umem {
    arena: Arena,
    members: Arc<Mutex<Vec<Member>>>,
}

#[derive(Debug)]
struct Member {
    socket: Weak<OwnedFd>,
    interface: u32,
    queue: u32,
    zero_copy: bool,
    need_wakeup: bool,
}

impl Umem {
    /// The arena as packet memory; registered with the kernel when the first socket is bound.
    pub fn new(arena: Arena) -> Self {
        Self { arena, members: Arc::default() }
    }

    /// The memory.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// A bound socket of these modes, whose registration a new one can share.
    pub(super) fn member(&self, zero_copy: bool, need_wakeup: bool) -> Option<Arc<OwnedFd>> {
        self.living()
            .iter()
            .filter(|member| (member.zero_copy, member.need_wakeup) == (zero_copy, need_wakeup))
            .find_map(|member| member.socket.upgrade())
    }

    /// Whether one of the sockets is bound to this queue of the interface with this index.
    pub(super) fn holds(&self, interface: u32, queue: u32) -> bool {
        self.living().iter().any(|member| (member.interface, member.queue) == (interface, queue))
    }

    /// Makes a bound socket known.
    pub(super) fn join(
        &self,
        socket: &Arc<OwnedFd>,
        (interface, queue): (u32, u32),
        zero_copy: bool,
        need_wakeup: bool,
    ) {
        self.living().push(Member {
            socket: Arc::downgrade(socket),
            interface,
            queue,
            zero_copy,
            need_wakeup,
        });
    }

    fn living(&self) -> MutexGuard<'_, Vec<Member>> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|member| member.socket.strong_count() > 0);
        members
    }
}

/// The chunks that one socket has lent to the kernel in one direction. The only place where a [`Frame`] becomes an address and
/// an address a `Frame`: an address of the kernel's that was not lent here makes none, whatever the reason.
#[derive(Debug)]
pub(super) struct Ledger {
    arena: Arena,
    lent: Box<[u64]>,
    count: usize,
}

impl Ledger {
    /// An empty book.
    pub(super) fn new(arena: Arena) -> Self {
        let words = usize::try_from(arena.frames().div_ceil(u64::BITS)).unwrap_or(usize::MAX);
        Self { arena, lent: vec![0; words].into_boxed_slice(), count: 0 }
    }

    /// Lends the frame's chunk; the address of the packet in it. A frame of another arena is handed back.
    pub(super) fn lend(&mut self, frame: Frame) -> Result<u64, Frame> {
        if !self.arena.owns(&frame) {
            return Err(frame);
        }
        let start = u64::try_from(frame.headroom()).unwrap_or(0);
        let chunk = frame.into_chunk();
        // A frame of the arena always has a bit.
        if let Some((word, bit)) = self.bit(chunk) {
            *word |= bit;
            self.count += 1;
        }
        Ok(u64::from(chunk) * CHUNK + start)
    }

    /// Takes the chunk of an address back, with a packet of `len` bytes at that address. `None` if the chunk was not lent, or
    /// if the packet would not lie within it; then it stays lent.
    pub(super) fn reclaim(&mut self, address: u64, len: u32) -> Option<Frame> {
        let chunk = u32::try_from(address / CHUNK).ok()?;
        let (start, len) = (usize::try_from(address % CHUNK).ok()?, usize::try_from(len).ok()?);
        if start.checked_add(len)? > FRAME_SIZE {
            return None;
        }
        let (word, bit) = self.bit(chunk)?;
        if *word & bit == 0 {
            return None;
        }
        *word &= !bit;
        self.count -= 1;
        // JUSTIFICATION: the kernel's rings carry addresses; see `Arena::frame_of_chunk`.
        // SAFETY: the chunk's bit was set, which only `lend` does, having consumed its frame; it is cleared now, so this
        // frame is not made a second time.
        unsafe { self.arena.frame_of_chunk(chunk, start, len) }
    }

    /// Takes back one chunk of those lent, whichever.
    pub(super) fn reclaim_any(&mut self) -> Option<Frame> {
        let (at, word) = self.lent.iter().enumerate().find(|(_, word)| **word != 0)?;
        let chunk = u64::try_from(at).ok()? * u64::from(u64::BITS) + u64::from(word.trailing_zeros());
        self.reclaim(chunk * CHUNK, 0)
    }

    /// How many chunks are lent.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    fn bit(&mut self, chunk: u32) -> Option<(&mut u64, u64)> {
        let word = self.lent.get_mut(usize::try_from(chunk / u64::BITS).ok()?)?;
        Some((word, 1 << (chunk % u64::BITS)))
    }
}

const CHUNK: u64 = FRAME_SIZE as u64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::HEADROOM;

    #[test]
    fn a_chunk_comes_back_once_and_with_the_kernels_place() {
        let (arena, mut frames) = Arena::new(100, false).unwrap();
        let mut ledger = Ledger::new(arena.clone());
        let mut frame = frames.swap_remove(70);
        frame.grow_back(60).unwrap();
        frame.grow_front(14).unwrap();
        let address = ledger.lend(frame).unwrap();
        assert_eq!(address, 70 * 4096 + u64::try_from(HEADROOM).unwrap() - 14);
        assert_eq!(ledger.count(), 1);
        assert!(ledger.reclaim(address + CHUNK, 0).is_none(), "a neighbour that was not lent");
        assert!(ledger.reclaim(70 * CHUNK + 4000, 97).is_none(), "over the chunk's end");
        let frame = ledger.reclaim(70 * CHUNK + 300, 64).unwrap();
        assert_eq!((frame.headroom(), frame.len(), arena.bytes(&frame).len()), (300, 64, 64));
        assert!(ledger.reclaim(address, 0).is_none(), "twice");
        assert_eq!(ledger.count(), 0);
    }

    #[test]
    fn a_foreign_frame_is_not_lent() {
        let (arena, _frames) = Arena::new(1, false).unwrap();
        let (_other, mut others) = Arena::new(1, false).unwrap();
        let mut ledger = Ledger::new(arena);
        assert!(ledger.lend(others.pop().unwrap()).is_err());
        assert_eq!(ledger.count(), 0);
    }

    #[test]
    fn everything_lent_can_be_taken_back() {
        let (arena, frames) = Arena::new(130, false).unwrap();
        let mut ledger = Ledger::new(arena);
        for frame in frames {
            ledger.lend(frame).unwrap();
        }
        let mut chunks: Vec<u32> =
            std::iter::from_fn(|| ledger.reclaim_any()).map(Frame::into_chunk).collect();
        chunks.sort_unstable();
        assert_eq!(chunks, (0..130).collect::<Vec<_>>());
        assert_eq!(ledger.count(), 0);
    }

    proptest! {
        /// No descriptor of the kernel's, right or wrong, makes a second frame of a chunk or one outside the arena.
        #[test]
        fn any_descriptor_makes_each_chunk_once(
            descriptors in prop::collection::vec((prop_oneof![any::<u64>(), 0..10 * CHUNK], 0..5000_u32), 0..100),
        ) {
            let (arena, frames) = Arena::new(8, false).unwrap();
            let mut ledger = Ledger::new(arena.clone());
            let mut out = Vec::new();
            for frame in frames {
                ledger.lend(frame).unwrap();
            }
            for (address, len) in descriptors {
                if let Some(frame) = ledger.reclaim(address, len) {
                    prop_assert_eq!(arena.bytes(&frame).len(), usize::try_from(len).unwrap());
                    out.push(frame.into_chunk());
                }
            }
            prop_assert_eq!(out.len() + ledger.count(), 8);
            out.sort_unstable();
            out.dedup();
            prop_assert_eq!(out.len() + ledger.count(), 8);
        }
    }
}
