//! One of the four rings that a socket shares with the kernel: this side is the [`Producer`] of two and the [`Consumer`] of two.
//!
//! Contract: the two indices run freely through all of `u32` and are masked only to find a slot, so no index, not even a wrong
//! one of the kernel's, leads outside the ring. A producer writes slots, then publishes them with one `Release` store; the
//! consumer's `Acquire` load makes them visible; the same the other way for slots given back (Documentation/networking/af_xdp).
//! The other side's index is read only when what is known of it does not suffice, as the read costs a cache line.

use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::xdp::{XdpDesc, XdpRingOffset};

/// What a ring's slots hold: plain numbers of which every bit pattern is valid.
///
/// # Safety
/// The implementor is `repr(C)` or a primitive, has no padding, and no invalid bit pattern.
// JUSTIFICATION: the slots are written by the kernel, so the type must not be able to be wrong.
pub(super) unsafe trait Slot: Copy {}
// SAFETY: a primitive number.
unsafe impl Slot for u64 {}
// SAFETY: repr(C) of u64, u32 and a transparent u32 whose unknown bits are kept.
unsafe impl Slot for XdpDesc {}

/// The memory of one ring.
#[derive(Debug)]
struct Ring<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: Option<NonNull<AtomicU32>>,
    slots: NonNull<T>,
    size: u32,
    mapped: Option<(NonNull<u8>, usize)>,
}

// JUSTIFICATION: a socket, and its rings with it, is made by one thread and moved to its worker.
// SAFETY: the pointers are to memory mapped for all threads; a ring has one owner and everything that changes it takes `&mut`.
unsafe impl<T: Slot> Send for Ring<T> {}

impl<T: Slot> Ring<T> {
    /// Maps the ring of `size` slots (a power of two) that the kernel made for the socket.
    fn map(fd: BorrowedFd<'_>, size: u32, offsets: XdpRingOffset, page: u64) -> io::Result<Self> {
        let offset = |value: u64| usize::try_from(value).map_err(|_| wrong("an offset that is no address"));
        let slots = usize::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two())
            .and_then(|size| size.checked_mul(size_of::<T>()))
            .ok_or_else(|| wrong("a ring size that is no power of two"))?;
        let (producer, consumer, desc) =
            (offset(offsets.producer)?, offset(offsets.consumer)?, offset(offsets.desc)?);
        let flags = offsets.flags.map(offset).transpose()?;
        let len = desc.checked_add(slots).ok_or_else(|| wrong("an offset that is no address"))?;
        let indices = [producer, consumer, flags.unwrap_or(0)];
        if indices.iter().any(|at| at % align_of::<AtomicU32>() != 0 || at.saturating_add(4) > len)
            || desc % align_of::<T>() != 0
        {
            return Err(wrong("ring offsets outside the ring or out of alignment"));
        }
        // JUSTIFICATION: the only way to reach the rings; no wrapper types the kernel's layout.
        // SAFETY: a new mapping at an address of the kernel's choice replaces no existing one.
        let base = unsafe {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED | MapFlags::POPULATE, fd, page)
        }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| wrong("mapped at address zero"))?;
        // JUSTIFICATION: as above.
        // SAFETY: all offsets were checked to lie within `len` and to be aligned for what is there (the mapping itself is
        // aligned to a page).
        let ring = unsafe {
            Self {
                producer: base.add(producer).cast(),
                consumer: base.add(consumer).cast(),
                flags: flags.map(|flags| base.add(flags).cast()),
                slots: base.add(desc).cast(),
                size,
                mapped: Some((base, len)),
            }
        };
        Ok(ring)
    }

    fn producer(&self) -> &AtomicU32 {
        // JUSTIFICATION: an index shared with the kernel.
        // SAFETY: the pointer was checked in `map` and lives as long as the ring; both sides use atomics on it.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // JUSTIFICATION: as above.
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    /// Whether the kernel asked to be woken for this ring. A kernel too old to say always is.
    fn needs_wakeup(&self) -> bool {
        let Some(flags) = self.flags else { return true };
        // JUSTIFICATION: as above.
        // SAFETY: as above.
        let flags = unsafe { flags.as_ref() };
        flags.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    fn slot(&self, index: u32) -> NonNull<T> {
        // A masked u32 always fits; zero is a slot too.
        let at = usize::try_from(index & (self.size - 1)).unwrap_or(0);
        // JUSTIFICATION: an index proven by its mask; a slice would claim slots that the kernel is writing.
        // SAFETY: size is a power of two, so the masked index is below it, and `slots` has `size` elements.
        unsafe { self.slots.add(at) }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        if let Some((base, len)) = self.mapped {
            // JUSTIFICATION: the counterpart of `map`.
            // SAFETY: base and length are the mapping's, and every reference into it borrowed the ring.
            let _ = unsafe { rustix::mm::munmap(base.as_ptr().cast(), len) };
        }
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's ring: {what}"))
}

/// The filling side of a ring whose consumer is the kernel.
#[derive(Debug)]
pub(super) struct Producer<T: Slot> {
    ring: Ring<T>,
    next: u32,
    consumed: u32,
    _slots: PhantomData<T>,
}

impl<T: Slot> Producer<T> {
    /// Maps the ring; see [`Ring::map`].
    pub(super) fn map(fd: BorrowedFd<'_>, size: u32, offsets: XdpRingOffset, page: u64) -> io::Result<Self> {
        Ok(Self::new(Ring::map(fd, size, offsets, page)?))
    }

    fn new(ring: Ring<T>) -> Self {
        let (next, consumed) =
            (ring.producer().load(Ordering::Relaxed), ring.consumer().load(Ordering::Acquire));
        Self { ring, next, consumed, _slots: PhantomData }
    }

    /// Free slots. Looks at the kernel's index only if fewer than `want` are known to be free.
    pub(super) fn free(&mut self, want: u32) -> u32 {
        let known = self.known_free();
        if known >= want {
            return known;
        }
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.known_free()
    }

    fn known_free(&self) -> u32 {
        self.ring.size.saturating_sub(self.next.wrapping_sub(self.consumed))
    }

    /// Writes the next slot; `false`, and nothing written, if the ring is full. The kernel sees it after [`Producer::submit`].
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.free(1) == 0 {
            return false;
        }
        // JUSTIFICATION: see `Ring::slot`.
        // SAFETY: the slot is within the ring, and not the kernel's: it consumed what was there (Acquire in `free`) and does
        // not look at it again before `submit`.
        unsafe { self.ring.slot(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Shows the kernel all slots written so far.
    pub(super) fn submit(&mut self) {
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// Slots submitted that the kernel has not consumed.
    pub(super) fn pending(&self) -> u32 {
        self.next.wrapping_sub(self.ring.consumer().load(Ordering::Relaxed)).min(self.ring.size)
    }

    /// Whether the kernel asked to be woken for this ring.
    pub(super) fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// The emptying side of a ring whose producer is the kernel.
#[derive(Debug)]
pub(super) struct Consumer<T: Slot> {
    ring: Ring<T>,
    next: u32,
    produced: u32,
    _slots: PhantomData<T>,
}

impl<T: Slot> Consumer<T> {
    /// Maps the ring; see [`Ring::map`].
    pub(super) fn map(fd: BorrowedFd<'_>, size: u32, offsets: XdpRingOffset, page: u64) -> io::Result<Self> {
        Ok(Self::new(Ring::map(fd, size, offsets, page)?))
    }

    fn new(ring: Ring<T>) -> Self {
        let (produced, next) =
            (ring.producer().load(Ordering::Acquire), ring.consumer().load(Ordering::Relaxed));
        Self { ring, next, produced, _slots: PhantomData }
    }

    /// Reads the next slot, if there is one. The kernel gets the slot back with [`Consumer::release`].
    pub(super) fn pop(&mut self) -> Option<T> {
        if self.next == self.produced {
            self.produced = self.ring.producer().load(Ordering::Acquire);
        }
        // More than a ringful is an index that cannot be: nothing is believed then.
        if !(1..=self.ring.size).contains(&self.produced.wrapping_sub(self.next)) {
            return None;
        }
        // JUSTIFICATION: see `Ring::slot`.
        // SAFETY: the slot is within the ring, was written before the kernel's Release store of the index that `Acquire`
        // read above, and is not written again before `release`. Every bit pattern of a Slot is valid.
        let value = unsafe { self.ring.slot(self.next).read() };
        self.next = self.next.wrapping_add(1);
        Some(value)
    }

    /// Gives the kernel all slots read so far.
    pub(super) fn release(&mut self) {
        self.ring.consumer().store(self.next, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// A ring in ordinary memory, so that both of its sides can be ours.
    struct Memory {
        indices: [AtomicU32; 3],
        slots: Vec<u64>,
    }

    impl Memory {
        fn new(size: usize, first: u32) -> Self {
            let indices = [AtomicU32::new(first), AtomicU32::new(first), AtomicU32::new(0)];
            Self { indices, slots: vec![0xa5a5_a5a5_a5a5_a5a5; size] }
        }

        fn ring(&mut self) -> Ring<u64> {
            Ring {
                producer: NonNull::from(&self.indices[0]),
                consumer: NonNull::from(&self.indices[1]),
                flags: Some(NonNull::from(&self.indices[2])),
                slots: NonNull::new(self.slots.as_mut_ptr()).unwrap(),
                size: u32::try_from(self.slots.len()).unwrap(),
                mapped: None,
            }
        }
    }

    #[test]
    fn the_kernel_sees_only_what_was_submitted() {
        let mut memory = Memory::new(4, 0);
        let (mut producer, mut consumer) = (Producer::new(memory.ring()), Consumer::new(memory.ring()));
        assert!(producer.push(1));
        assert_eq!(consumer.pop(), None);
        producer.submit();
        assert_eq!(producer.pending(), 1);
        assert_eq!(consumer.pop(), Some(1));
        assert_eq!(producer.pending(), 1);
        consumer.release();
        assert_eq!(producer.pending(), 0);
    }

    #[test]
    fn wakeups_are_the_kernels_wish() {
        let mut memory = Memory::new(4, 0);
        let producer = Producer::new(memory.ring());
        assert!(!producer.needs_wakeup());
        memory.indices[2].store(1, Ordering::Relaxed);
        assert!(producer.needs_wakeup());
    }

    #[test]
    fn impossible_indices_are_not_believed() {
        let mut memory = Memory::new(4, 0);
        memory.indices[0].store(100, Ordering::Relaxed);
        let mut consumer = Consumer::new(memory.ring());
        assert_eq!(consumer.pop(), None);
        let mut producer = Producer::new(memory.ring());
        assert_eq!(producer.free(1), 0);
        assert!(!producer.push(1));
    }

    /// DP-2: two threads, one on each side, lose and reorder nothing.
    #[test]
    fn dp_2_both_sides_at_once() {
        let mut memory = Memory::new(64, u32::MAX - 1000);
        let (mut producer, mut consumer) = (Producer::new(memory.ring()), Consumer::new(memory.ring()));
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for value in 0..50_000 {
                    while !producer.push(value) {
                        producer.submit();
                        std::thread::yield_now();
                    }
                    if value % 7 == 0 {
                        producer.submit();
                    }
                }
                producer.submit();
            });
            let mut expected = 0;
            while expected < 50_000 {
                match consumer.pop() {
                    Some(value) => {
                        assert_eq!(value, expected);
                        expected += 1;
                    }
                    None => std::thread::yield_now(),
                }
                consumer.release();
            }
        });
    }

    proptest! {
        /// The ring against a queue, from any index on, so that the wrap of the indices is met.
        #[test]
        fn a_ring_is_a_bounded_queue(
            first in prop_oneof![any::<u32>(), u32::MAX - 20..=u32::MAX],
            steps in prop::collection::vec(0..4_u8, 0..200),
        ) {
            let mut memory = Memory::new(8, first);
            let (mut producer, mut consumer) = (Producer::new(memory.ring()), Consumer::new(memory.ring()));
            let (mut written, mut visible, mut unreleased) = (VecDeque::new(), VecDeque::new(), 0);
            for (value, step) in (0_u64..).zip(steps) {
                match step {
                    0 => {
                        let room = written.len() + visible.len() + unreleased < 8;
                        prop_assert_eq!(producer.push(value), room);
                        if room { written.push_back(value); }
                    }
                    1 => { producer.submit(); visible.append(&mut written); }
                    2 => {
                        let expected = visible.pop_front();
                        prop_assert_eq!(consumer.pop(), expected);
                        if expected.is_some() { unreleased += 1; }
                    }
                    _ => { consumer.release(); unreleased = 0; }
                }
            }
        }
    }
}
