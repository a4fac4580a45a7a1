//! Packet memory: one [`Arena`] of equal chunks, a move-only [`Frame`] for each of them, and the [`Pool`] of those not in use.
//!
//! Contract:
//! - A chunk has exactly one `Frame`, made when its arena is made. A `Frame` is neither `Clone` nor `Copy`, so whoever holds it
//!   owns the chunk: a worker, a hand-off ring, a pool, or (through the ledger of `port::xsk`) the kernel.
//! - Always `start + len <= FRAME_SIZE`; every method that moves either keeps it so, or changes nothing and returns `None`.
//!   Therefore [`Arena::bytes`] and [`Arena::bytes_mut`] cannot fail, with one exception: a frame of another arena has no
//!   bytes here, and reads as an empty packet, which every parser drops as a runt.
//! - Dropping a `Frame` loses its chunk until the arena is unmapped. Frames go back with [`Pool::give`].
//!
//! This file and `port::xsk` are the only places of the datapath that use `unsafe`.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes of a chunk.
pub const FRAME_SIZE: usize = 4096;
/// Where a received or fresh packet begins in its chunk: room for the headers that are put before it.
/// It equals the kernel's `XDP_PACKET_HEADROOM`, so that all ports agree.
pub const HEADROOM: usize = 256;
/// Most frames handled at once.
pub const BATCH: usize = 64;

/// The largest packet that a port can receive into a frame.
pub const MAX_RECEIVE: usize = FRAME_SIZE - HEADROOM;

/// The right to one chunk of an [`Arena`], and where in it the packet lies.
///
/// Two words, which compilers keep in registers; of five fields, each written by itself and then moved as one, every
/// move had to wait for memory.
#[must_use = "a dropped frame loses its chunk: give it back to the pool"]
pub struct Frame {
    /// The arena in the upper half, the chunk in the lower.
    place: u64,
    /// From the top: 32 bits that are left to whoever holds the frame, 16 of the length, 16 of the start.
    span: u64,
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Frame(chunk {} of arena {}, {} bytes at {})",
            self.chunk(),
            self.arena(),
            self.len(),
            self.headroom()
        )
    }
}

#[expect(clippy::cast_possible_truncation, reason = "parts of words, which is what is asked for")]
const fn low_u16(word: u64) -> u16 {
    word as u16
}

#[expect(clippy::cast_possible_truncation, reason = "parts of words, which is what is asked for")]
const fn low_u32(word: u64) -> u32 {
    word as u32
}

impl Frame {
    const fn new(arena: u32, chunk: u32) -> Self {
        Self { place: (arena as u64) << 32 | chunk as u64, span: HEADROOM as u64 }
    }

    #[inline]
    const fn arena(&self) -> u32 {
        low_u32(self.place >> 32)
    }

    #[inline]
    const fn chunk(&self) -> u32 {
        low_u32(self.place)
    }

    #[inline]
    const fn put(&mut self, start: u16, len: u16) {
        self.span = self.span >> 32 << 32 | (len as u64) << 16 | start as u64;
    }

    /// What was noted with [`Self::set_note`] last.
    #[inline]
    pub(crate) fn note(&self) -> u32 {
        low_u32(self.span >> 32)
    }

    /// Keeps a number for whoever holds the frame; it means nothing to the frame.
    #[inline]
    pub(crate) fn set_note(&mut self, note: u32) {
        self.span = u64::from(note) << 32 | u64::from(low_u32(self.span));
    }

    /// Bytes of the packet.
    #[inline]
    pub fn len(&self) -> usize {
        usize::from(low_u16(self.span >> 16))
    }

    /// Whether the packet has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the chunk before the packet.
    #[inline]
    pub fn headroom(&self) -> usize {
        usize::from(low_u16(self.span))
    }

    /// Bytes of the chunk behind the packet.
    #[inline]
    pub fn tailroom(&self) -> usize {
        FRAME_SIZE - self.headroom() - self.len()
    }

    /// Puts `n` bytes of headroom before the packet; their content is what was there. `None` if there is not so much.
    #[inline]
    pub fn grow_front(&mut self, n: usize) -> Option<()> {
        self.set(self.headroom().checked_sub(n)?, self.len().checked_add(n)?)
    }

    /// Takes `n` bytes off the packet's front. `None` if it has not so many.
    #[inline]
    pub fn shrink_front(&mut self, n: usize) -> Option<()> {
        self.set(self.headroom().checked_add(n)?, self.len().checked_sub(n)?)
    }

    /// Puts `n` bytes of tailroom behind the packet; their content is what was there. `None` if there is not so much.
    #[inline]
    pub fn grow_back(&mut self, n: usize) -> Option<()> {
        self.set(self.headroom(), self.len().checked_add(n)?)
    }

    /// Cuts the packet to `len` bytes; a packet that is not longer stays as it is.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        if len < self.len()
            && let Ok(len) = u16::try_from(len)
        {
            self.put(low_u16(self.span), len);
        }
    }

    /// Leaves `len` bytes of the packet, those behind the first `front`. `None` if it has not so many.
    #[inline]
    pub fn cut(&mut self, front: u16, len: u16) -> Option<()> {
        if usize::from(front) + usize::from(len) > self.len() {
            return None;
        }
        // What lay within the packet lies within the chunk; so this does not wrap.
        self.put(low_u16(self.span).wrapping_add(front), len);
        Some(())
    }

    /// Says where the packet lies. `None`, and nothing changed, if that is not within the chunk.
    #[inline]
    pub(crate) fn set(&mut self, start: usize, len: usize) -> Option<()> {
        if start.checked_add(len)? > FRAME_SIZE {
            return None;
        }
        self.put(u16::try_from(start).ok()?, u16::try_from(len).ok()?);
        Some(())
    }

    /// Makes the frame an empty packet with the usual headroom.
    #[inline]
    fn reset(&mut self) {
        self.put(HEADROOM_U16, 0);
    }

    /// Gives up the right to the chunk and tells its number; the way back is [`Arena::frame_of_chunk`].
    pub(crate) fn into_chunk(self) -> u32 {
        self.chunk()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "256 fits")]
const HEADROOM_U16: u16 = HEADROOM as u16;
const _: () = assert!(HEADROOM < FRAME_SIZE && FRAME_SIZE <= u16::MAX as usize);
// Moved in two registers.
const _: () = assert!(size_of::<Frame>() == 16);

/// One mapping cut into chunks of [`FRAME_SIZE`]; a clone is another handle on the same.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Mapping>);

impl Arena {
    /// Maps `frames` chunks, present in memory and left out of core dumps, and makes the one `Frame` of each. With `huge`,
    /// huge pages are used where the machine has so many of them reserved, otherwise transparent ones as far as the kernel
    /// has some at hand.
    pub fn new(frames: u32, huge: bool) -> io::Result<(Self, Vec<Frame>)> {
        let id = NEXT_ARENA
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |id| id.checked_add(1))
            .map_err(|_| io::Error::other("no arena identifier is left"))?;
        let mapping = Mapping::new(id, frames, huge)?;
        let all = (0..frames).map(|chunk| Frame::new(id, chunk)).collect();
        Ok((Self(Arc::new(mapping)), all))
    }

    /// The packet's bytes.
    #[inline]
    pub fn bytes<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        let Some(first) = self.first_byte(frame) else { return &[] };
        // JUSTIFICATION: frames refer to their chunk by number, so that they can be 16 bytes, cross threads and be handed to
        // the kernel; a borrow checked by the compiler would tie every frame to one owner of the whole mapping.
        // SAFETY: `first_byte` proved the frame ours, so its chunk is below `frames`, and start + len <= FRAME_SIZE: the
        // range lies within one chunk of the mapping, which lives as long as `self` and was zeroed by the kernel. The chunk's
        // only frame is borrowed for 'a, so no `&mut` to these bytes exists.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), frame.len()) }
    }

    /// The packet's bytes, to be changed.
    #[inline]
    pub fn bytes_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        let Some(first) = self.first_byte(frame) else { return &mut [] };
        // JUSTIFICATION: as in `bytes`.
        // SAFETY: as in `bytes`; and the chunk's only frame is borrowed exclusively for 'a, so no other reference to these
        // bytes exists. Frames of other chunks lie in other bytes, so several may be borrowed at once.
        unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), frame.len()) }
    }

    /// Whether the frame belongs to this arena.
    #[inline]
    pub fn owns(&self, frame: &Frame) -> bool {
        frame.arena() == self.0.id
    }

    /// Number of chunks.
    pub fn frames(&self) -> u32 {
        self.0.frames
    }

    /// Whether the arena stands on reserved huge pages.
    pub fn is_huge(&self) -> bool {
        self.0.huge
    }

    /// The first byte of the mapping, for registration with the kernel.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.0.base
    }

    /// Bytes of all chunks.
    pub(crate) fn size(&self) -> usize {
        self.0.chunks_len()
    }

    /// Makes the frame of a chunk again. `None` if the place is outside the chunk or the chunk outside the arena.
    ///
    /// # Safety
    /// The chunk's frame must have been given up with [`Frame::into_chunk`], and not been made again since.
    // JUSTIFICATION: the kernel's rings carry addresses, not Rust values; a frame has to end before it goes there and begin
    // again when it comes back. `port::xsk::Ledger` is the only caller.
    pub(crate) unsafe fn frame_of_chunk(&self, chunk: u32, start: usize, len: usize) -> Option<Frame> {
        if chunk >= self.0.frames {
            return None;
        }
        let mut frame = Frame::new(self.0.id, chunk);
        frame.set(start, len)?;
        Some(frame)
    }

    #[inline]
    fn first_byte(&self, frame: &Frame) -> Option<NonNull<u8>> {
        if !self.owns(frame) {
            return None;
        }
        let offset = usize::try_from(frame.chunk()).ok()? * FRAME_SIZE + frame.headroom();
        // JUSTIFICATION: the address of a chunk, see `bytes`.
        // SAFETY: frames of this arena have chunk < frames and start <= FRAME_SIZE: the offset is at most the mapping's
        // length, which fits in isize because the kernel mapped it.
        Some(unsafe { self.0.base.add(offset) })
    }
}

static NEXT_ARENA: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
struct Mapping {
    id: u32,
    frames: u32,
    huge: bool,
    /// The first chunk.
    base: NonNull<u8>,
    /// Start and length of the mapping.
    start: NonNull<u8>,
    mapped: usize,
}

// JUSTIFICATION: workers on several threads share one arena.
// SAFETY: the pointer is to memory mapped for all threads of the process. The mapping's fields are never changed after it
// was made, and the memory behind the pointer is reached only through frames, each of which has one owner.
unsafe impl Send for Mapping {}
// JUSTIFICATION: as for Send.
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

/// Granularity of the usual huge page.
const HUGE_PAGE: usize = 2 << 20;

impl Mapping {
    fn new(id: u32, frames: u32, huge: bool) -> io::Result<Self> {
        let chunks = usize::try_from(frames)
            .ok()
            .and_then(|frames| frames.checked_mul(FRAME_SIZE))
            .filter(|len| *len > 0)
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "an arena needs at least one frame")
            })?;
        let whole = chunks.next_multiple_of(HUGE_PAGE);
        if !huge {
            let base = map(chunks, MapFlags::POPULATE)?;
            return Ok(Self { id, frames, huge, base, start: base, mapped: chunks });
        }
        if let Ok(base) = map(whole, MapFlags::POPULATE | MapFlags::HUGETLB) {
            return Ok(Self { id, frames, huge, base, start: base, mapped: whole });
        }
        // Not present yet: pages that are there already stay small. One huge page more, so that the first chunk can begin
        // with one.
        let mapped = whole + HUGE_PAGE;
        let start = map(mapped, MapFlags::empty())?;
        let skipped = start.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // JUSTIFICATION: the address of the first huge page of the mapping.
        // SAFETY: `skipped` is at most HUGE_PAGE, by which the mapping is longer than `whole`.
        let base = unsafe { start.add(skipped) };
        for advice in [Advice::LinuxHugepage, Advice::LinuxPopulateWrite] {
            // JUSTIFICATION: there is no safe wrapper.
            // SAFETY: the range lies within the mapping just made, whose pages are zero before and after. A kernel that
            // refuses leaves small pages, or pages that come with the first packet.
            let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), whole, advice) };
        }
        Ok(Self { id, frames, huge: false, base, start, mapped })
    }

    /// `frames * FRAME_SIZE`: no more than `mapped`, so it does not wrap.
    fn chunks_len(&self) -> usize {
        usize::try_from(self.frames).map_or(self.mapped, |frames| frames * FRAME_SIZE)
    }
}

/// Maps `len` bytes of zeroes; with `POPULATE` present at once, so that no packet waits for a page.
fn map(len: usize, extra: MapFlags) -> io::Result<NonNull<u8>> {
    let flags = MapFlags::PRIVATE | extra;
    // JUSTIFICATION: UMEM must be whole pages that never move; the allocator gives no such promise.
    // SAFETY: an anonymous mapping at an address of the kernel's choice replaces no existing one.
    let base = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)
    }?;
    // Packets in clear text have no place in a core dump. A kernel that refuses is no reason not to start.
    // JUSTIFICATION: there is no safe wrapper.
    // SAFETY: the range is the mapping just made, and this advice changes no byte of it.
    let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxDontDump) };
    NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("the kernel mapped address zero"))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // JUSTIFICATION: the counterpart of `map`.
        // SAFETY: start and length are those of `map`; slices into the mapping borrow an Arena, and none is left. Pages that
        // are registered with the kernel stay with it until it lets go of them.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

/// A worker's free frames: the last one given is the first one taken, as it is the likeliest to be in the cache.
///
/// Frames migrate when one worker receives and another transmits. So what a pool has too much of goes, in batches, to a queue
/// shared by all workers, and what it lacks comes from there; neither locks nor allocates.
#[derive(Debug)]
pub struct Pool {
    local: ArrayVec<Frame, LOCAL>,
    shared: Arc<Shared>,
}

/// Frames that a pool keeps for itself before it spills.
const LOCAL: usize = 4 * BATCH;

#[derive(Debug)]
struct Shared {
    batches: ArrayQueue<ArrayVec<Frame, BATCH>>,
    frames: AtomicUsize,
}

impl Pool {
    /// Divides the frames among so many workers (at least one): each gets the same share, up to a limit; the rest is shared.
    pub fn split(frames: Vec<Frame>, workers: usize) -> Vec<Self> {
        let workers = workers.max(1);
        // Room for every frame, in spilled batches (full) and those made here (full but one).
        let capacity = frames.len() / BATCH + 1;
        let shared = Arc::new(Shared { batches: ArrayQueue::new(capacity), frames: AtomicUsize::new(0) });
        let share = (frames.len() / workers).min(LOCAL / 2);
        let mut frames = frames.into_iter();
        let mut pools: Vec<Self> = (0..workers)
            .map(|_| Self { local: frames.by_ref().take(share).collect(), shared: Arc::clone(&shared) })
            .collect();
        // Too few for a batch: they go to the first workers, one each, rather than wait for one to run dry.
        if frames.len() < workers && share < LOCAL / 2 {
            for (pool, frame) in pools.iter_mut().zip(frames) {
                pool.give(frame);
            }
            return pools;
        }
        loop {
            let batch: ArrayVec<Frame, BATCH> = frames.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return pools;
            }
            shared.put(batch);
        }
    }

    /// A frame with the usual headroom and no bytes; `None` if none is free.
    #[inline]
    pub fn take(&mut self) -> Option<Frame> {
        if self.local.is_empty() {
            self.refill()?;
        }
        let mut frame = self.local.pop()?;
        frame.reset();
        Some(frame)
    }

    #[cold]
    fn refill(&mut self) -> Option<()> {
        self.local.extend(self.shared.take()?);
        Some(())
    }

    /// Gives a frame back.
    #[inline]
    pub fn give(&mut self, frame: Frame) {
        if let Err(full) = self.local.try_push(frame) {
            self.spill(full.element());
        }
    }

    #[cold]
    fn spill(&mut self, frame: Frame) {
        // The oldest go: they are the coldest.
        let spilled: ArrayVec<Frame, BATCH> = self.local.drain(..BATCH).collect();
        self.shared.put(spilled);
        self.local.extend(Some(frame));
    }

    /// How many frames this pool could take now: its own and those shared. Exact while no other worker gives or takes.
    pub fn available(&self) -> usize {
        self.local.len() + self.shared.frames.load(Ordering::Relaxed)
    }

    /// How many frames this pool has for itself, out of reach of the others.
    pub fn local(&self) -> usize {
        self.local.len()
    }
}

impl Shared {
    fn put(&self, batch: ArrayVec<Frame, BATCH>) {
        let count = batch.len();
        // Counted before they can be taken, so that the count never goes below zero.
        self.frames.fetch_add(count, Ordering::Relaxed);
        // The queue holds all batches that the frames of `split` can fill; only frames that came from elsewhere do not fit,
        // and those are left to the mapping.
        if self.batches.push(batch).is_err() {
            self.frames.fetch_sub(count, Ordering::Relaxed);
        }
    }

    fn take(&self) -> Option<ArrayVec<Frame, BATCH>> {
        let batch = self.batches.pop()?;
        self.frames.fetch_sub(batch.len(), Ordering::Relaxed);
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn arena(frames: u32) -> (Arena, Vec<Frame>) {
        Arena::new(frames, false).unwrap()
    }

    #[test]
    fn chunks_do_not_overlap() {
        let (arena, mut frames) = arena(8);
        for (n, frame) in frames.iter_mut().enumerate() {
            frame.set(0, FRAME_SIZE).unwrap();
            arena.bytes_mut(frame).fill(u8::try_from(n).unwrap());
        }
        for (n, frame) in frames.iter().enumerate() {
            assert!(arena.bytes(frame).iter().all(|byte| usize::from(*byte) == n));
        }
    }

    #[test]
    fn several_frames_are_written_at_once() {
        let (arena, frames) = arena(2);
        let [mut a, mut b]: [Frame; 2] = frames.try_into().unwrap();
        a.grow_back(4).unwrap();
        b.grow_back(4).unwrap();
        let (x, y) = (arena.bytes_mut(&mut a), arena.bytes_mut(&mut b));
        x.fill(1);
        y.fill(2);
        assert_eq!((x, y), (&mut [1; 4][..], &mut [2; 4][..]));
    }

    #[test]
    fn a_foreign_frame_has_no_bytes() {
        let (ours, _) = arena(1);
        let (_, mut theirs) = arena(1);
        theirs[0].grow_back(100).unwrap();
        assert!(!ours.owns(&theirs[0]));
        assert_eq!(ours.bytes(&theirs[0]), &[] as &[u8]);
        assert_eq!(ours.bytes_mut(&mut theirs[0]), &mut [] as &mut [u8]);
    }

    #[test]
    fn headers_are_put_before_the_packet_without_moving_it() {
        let (arena, mut frames) = arena(1);
        let frame = &mut frames[0];
        frame.grow_back(3).unwrap();
        arena.bytes_mut(frame).copy_from_slice(b"abc");
        let payload = arena.bytes(frame).as_ptr();
        frame.grow_front(HEADROOM).unwrap();
        arena.bytes_mut(frame)[..HEADROOM].fill(b'-');
        assert_eq!(frame.grow_front(1), None);
        assert_eq!(arena.bytes(frame)[HEADROOM..].as_ptr(), payload);
        frame.shrink_front(HEADROOM).unwrap();
        assert_eq!(arena.bytes(frame), b"abc");
    }

    #[test]
    fn an_arena_without_huge_pages_falls_back() {
        let (arena, mut frames) = Arena::new(3, true).unwrap();
        assert_eq!((arena.frames(), arena.size(), frames.len()), (3, 3 * FRAME_SIZE, 3));
        frames[2].set(0, FRAME_SIZE).unwrap();
        arena.bytes_mut(&mut frames[2]).fill(1);
        assert!(Arena::new(0, false).is_err());
        // Its first chunk begins with a page, of whatever size there is one; and it is unmapped where it was mapped.
        assert!(arena.base().as_ptr().addr().is_multiple_of(HUGE_PAGE));
    }

    #[test]
    fn pools_return_what_they_were_given() {
        for count in [1, 7, 64, 65, 1000] {
            for workers in [0, 1, 2, 3] {
                let (_arena, frames) = arena(count);
                let mut pools = Pool::split(frames, workers);
                assert_eq!(pools.len(), workers.max(1));
                let mut seen = HashSet::new();
                for pool in &mut pools {
                    let expected = pool.available();
                    let before = seen.len();
                    while let Some(frame) = pool.take() {
                        assert_eq!((frame.headroom(), frame.len()), (HEADROOM, 0));
                        assert!(seen.insert(frame.into_chunk()));
                    }
                    assert_eq!(seen.len() - before, expected);
                }
                assert_eq!(seen.len(), usize::try_from(count).unwrap());
            }
        }
    }

    /// DP-2: frames that pile up at one worker, because it transmits what another received, come back to that one.
    #[test]
    fn dp_2_frames_balance_out_between_workers() {
        let (_arena, frames) = arena(1024);
        let mut pools = Pool::split(frames, 2);
        let mut second = pools.pop().unwrap();
        let mut first = pools.pop().unwrap();
        for _ in 0..100_000 {
            second.give(first.take().unwrap());
        }
        assert_eq!(first.available() + second.local(), 1024);
        assert!(second.local() <= LOCAL);
    }

    /// DP-2: no frame is lost or doubled while workers give and take at the same time.
    #[test]
    fn dp_2_concurrent_workers_keep_every_frame() {
        let (arena, frames) = arena(2048);
        let pools = Pool::split(frames, 4);
        let pools: Vec<Pool> = std::thread::scope(|scope| {
            let handles: Vec<_> = pools
                .into_iter()
                .enumerate()
                .map(|(worker, mut pool)| {
                    let arena = arena.clone();
                    let mark = u8::try_from(worker).unwrap();
                    scope.spawn(move || {
                        for round in 0..2000_usize {
                            let mut held: Vec<Frame> = std::iter::from_fn(|| pool.take())
                                .take(1 + (round * 7 + worker) % 300)
                                .collect();
                            for frame in &mut held {
                                frame.set(0, 8).unwrap();
                                arena.bytes_mut(frame).fill(mark);
                            }
                            for frame in held {
                                assert_eq!(arena.bytes(&frame), &[mark; 8]);
                                pool.give(frame);
                            }
                        }
                        pool
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        });
        let local: usize = pools.iter().map(Pool::local).sum();
        assert_eq!(local + pools[0].available() - pools[0].local(), 2048);
    }

    proptest! {
        /// Whatever is asked of a frame, it stays within its chunk, and a refusal changes nothing.
        #[test]
        fn a_frame_stays_in_its_chunk(steps in prop::collection::vec((0..6_u8, 0..5000_usize), 0..50)) {
            let (arena, mut frames) = arena(1);
            let frame = &mut frames[0];
            for (step, n) in steps {
                let before = (frame.headroom(), frame.len());
                let done = match step {
                    0 => frame.grow_front(n),
                    1 => frame.shrink_front(n),
                    2 => frame.grow_back(n),
                    3 => { frame.truncate(n); Some(()) }
                    4 => {
                        let (front, len) = (u16::try_from(n / 8).unwrap(), u16::try_from(n).unwrap());
                        let done = frame.cut(front, len);
                        let expected = (before.0 + n / 8, n);
                        prop_assert_eq!(done.is_some(), n + n / 8 <= before.1);
                        prop_assert!(done.is_none() || expected == (frame.headroom(), frame.len()));
                        done
                    }
                    _ => frame.set(n, n / 2),
                };
                if done.is_none() {
                    prop_assert_eq!(before, (frame.headroom(), frame.len()));
                }
                prop_assert_eq!(frame.headroom() + frame.len() + frame.tailroom(), FRAME_SIZE);
                prop_assert_eq!(arena.bytes(frame).len(), frame.len());
            }
        }
    }
}
