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
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::numa::Placement;

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

    /// Both at once. `None`, and nothing changed, if there is not so much of one.
    #[inline]
    pub fn grow(&mut self, front: usize, back: usize) -> Option<()> {
        if front > self.headroom() || back > self.tailroom() {
            return None;
        }
        // Neither part of the word wraps: the packet stays within the chunk.
        self.span = self.span.wrapping_add(((front + back) as u64) << 16).wrapping_sub(front as u64);
        Some(())
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
    /// huge pages are used where the machine has so many of them reserved; otherwise, and without it, transparent ones as
    /// far as the kernel has some at hand: each frame is a page of its own, and a batch of them misses the translation
    /// buffer as often as it has frames.
    pub fn new(frames: u32, huge: bool) -> io::Result<(Self, Vec<Frame>)> {
        Self::placed(frames, huge, &Placement::anywhere(1))
    }

    /// The same, shared out among the workers' memory nodes: each group of workers has a part as large as its number of
    /// workers is, on its own node as far as that has room.
    pub fn placed(frames: u32, huge: bool, placement: &Placement) -> io::Result<(Self, Vec<Frame>)> {
        let id = NEXT_ARENA
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |id| id.checked_add(1))
            .map_err(|_| io::Error::other("no arena identifier is left"))?;
        let mapping = Mapping::new(id, frames, huge, placement)?;
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

    /// For each group of workers the first chunk behind its own.
    fn ends(&self) -> &[u32] {
        &self.0.ends
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
    /// By group of workers: the first chunk behind its own.
    ends: Box<[u32]>,
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
#[expect(clippy::cast_possible_truncation, reason = "512 fits")]
const CHUNKS_OF_HUGE_PAGE: u32 = (HUGE_PAGE / FRAME_SIZE) as u32;

impl Mapping {
    fn new(id: u32, frames: u32, huge: bool, placement: &Placement) -> io::Result<Self> {
        let mapping = Self::map(id, frames, huge, placement)?;
        let mut first = 0;
        for (group, end) in mapping.ends.iter().enumerate() {
            placement.near_group(group, || mapping.touch(first..*end));
            first = *end;
        }
        Ok(mapping)
    }

    fn map(id: u32, frames: u32, huge: bool, placement: &Placement) -> io::Result<Self> {
        let chunks = usize::try_from(frames)
            .ok()
            .and_then(|frames| frames.checked_mul(FRAME_SIZE))
            .filter(|len| *len > 0)
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "an arena needs at least one frame")
            })?;
        let ends = ends(frames, huge || chunks >= HUGE_PAGE, placement);
        let whole = chunks.next_multiple_of(HUGE_PAGE);
        if !huge && chunks < HUGE_PAGE {
            let base = map(chunks, MapFlags::empty())?;
            return Ok(Self { id, frames, huge, ends, base, start: base, mapped: chunks });
        }
        if huge && let Ok(base) = map(whole, MapFlags::HUGETLB) {
            return Ok(Self { id, frames, huge, ends, base, start: base, mapped: whole });
        }
        // One huge page more, so that the first chunk can begin with one.
        let mapped = whole + HUGE_PAGE;
        let start = map(mapped, MapFlags::empty())?;
        let skipped = start.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // JUSTIFICATION: the address of the first huge page of the mapping.
        // SAFETY: `skipped` is at most HUGE_PAGE, by which the mapping is longer than `whole`.
        let base = unsafe { start.add(skipped) };
        // JUSTIFICATION: there is no safe wrapper.
        // SAFETY: the range lies within the mapping just made, and this advice changes no byte of it. A kernel that refuses
        // leaves small pages.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), whole, Advice::LinuxHugepage) };
        Ok(Self { id, frames, huge: false, ends, base, start, mapped })
    }

    /// Makes the pages of these chunks present, on the node of the processor that this runs on.
    fn touch(&self, chunks: Range<u32>) {
        let bytes =
            |chunk: u32| usize::try_from(chunk).map_or(0, |chunk| chunk * FRAME_SIZE).min(self.mapped);
        let (from, to) = (bytes(chunks.start), bytes(chunks.end));
        if from >= to {
            return;
        }
        // JUSTIFICATION: there is no safe wrapper.
        // SAFETY: the range lies within the mapping, whose pages are zero before and after, and which nobody else has yet. A
        // kernel before 5.14 refuses; then the pages come with the registration or the first packet.
        let _ = unsafe {
            rustix::mm::madvise(
                self.base.as_ptr().wrapping_add(from).cast(),
                to - from,
                Advice::LinuxPopulateWrite,
            )
        };
    }

    /// `frames * FRAME_SIZE`: no more than `mapped`, so it does not wrap.
    fn chunks_len(&self) -> usize {
        usize::try_from(self.frames).map_or(self.mapped, |frames| frames * FRAME_SIZE)
    }
}

/// Shares chunks out among groups by their numbers of workers; a huge page belongs to one group alone.
fn ends(frames: u32, huge: bool, placement: &Placement) -> Box<[u32]> {
    let unit = if huge { CHUNKS_OF_HUGE_PAGE } else { 1 };
    let end = |group: usize| {
        let before = u64::try_from(placement.workers_before(group + 1)).unwrap_or(u64::MAX);
        let workers = u64::try_from(placement.workers()).unwrap_or(u64::MAX);
        let end = u32::try_from(u64::from(frames).saturating_mul(before) / workers).unwrap_or(frames);
        if before == workers { frames } else { end - end % unit }
    };
    (0..placement.groups()).map(end).collect()
}

/// Maps `len` bytes of zeroes, none present yet.
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
/// shared by all workers of the frames' memory node, and what it lacks comes from its own node's first; neither locks nor
/// allocates.
#[derive(Debug)]
pub struct Pool {
    local: ArrayVec<Frame, LOCAL>,
    /// By group of workers: what is on its way to that group's queue, less than a batch.
    leaving: Box<[ArrayVec<Frame, BATCH>]>,
    group: usize,
    shared: Arc<[Shared]>,
}

/// Frames that a pool keeps for itself before it spills.
const LOCAL: usize = 4 * BATCH;

/// Of one group of workers, or of all.
#[derive(Debug)]
struct Shared {
    /// The first chunk behind the group's own.
    end: u32,
    batches: ArrayQueue<ArrayVec<Frame, BATCH>>,
    frames: AtomicUsize,
}

impl Pool {
    /// Divides the frames among so many workers (at least one): each gets the same share, up to a limit; the rest is shared.
    pub fn split(frames: Vec<Frame>, workers: usize) -> Vec<Self> {
        Self::split_by(frames, &Placement::anywhere(workers), &[u32::MAX])
    }

    /// Divides all frames of `arena` that are given among its workers, each group's among its own.
    pub fn split_placed(frames: Vec<Frame>, arena: &Arena, placement: &Placement) -> Vec<Self> {
        Self::split_by(frames, placement, arena.ends())
    }

    /// `ends`: for each group the first chunk behind its own.
    fn split_by(frames: Vec<Frame>, placement: &Placement, ends: &[u32]) -> Vec<Self> {
        let mut own: Vec<Vec<Frame>> = (0..placement.groups()).map(|_| Vec::new()).collect();
        for frame in frames {
            let group = group_of(ends.iter().copied(), frame.chunk()).min(own.len() - 1);
            if let Some(own) = own.get_mut(group) {
                own.push(frame);
            }
        }
        // Room for every frame, in spilled batches (full) and those made here (full but one).
        let shared = |(group, frames): (usize, &Vec<Frame>)| Shared {
            end: ends.get(group).copied().unwrap_or(u32::MAX),
            batches: ArrayQueue::new(frames.len() / BATCH + 1),
            frames: AtomicUsize::new(0),
        };
        let shared: Arc<[Shared]> = own.iter().enumerate().map(shared).collect();
        let empty = |worker| Self {
            local: ArrayVec::new(),
            leaving: shared.iter().map(|_| ArrayVec::new()).collect(),
            group: placement.group_of(worker),
            shared: Arc::clone(&shared),
        };
        let mut pools: Vec<Self> = (0..placement.workers()).map(empty).collect();
        for (group, frames) in own.into_iter().enumerate() {
            let members = pools.iter_mut().filter(|pool| pool.group == group);
            share_out(frames, members.collect(), shared.get(group));
        }
        pools
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
        let Self { local, leaving, group, shared } = self;
        let others = (0..shared.len()).filter(|other| other != group);
        for group in std::iter::once(*group).chain(others) {
            if let Some(leaving) = leaving.get_mut(group).filter(|leaving| !leaving.is_empty()) {
                local.extend(leaving.drain(..));
                return Some(());
            }
            if let Some(batch) = shared.get(group).and_then(Shared::take) {
                local.extend(batch);
                return Some(());
            }
        }
        None
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
        self.local.extend(Some(frame));
        if let [shared] = &*self.shared {
            return shared.put(spilled);
        }
        for frame in spilled {
            let group = group_of(self.shared.iter().map(|shared| shared.end), frame.chunk());
            let group = group.min(self.shared.len() - 1);
            let (Some(leaving), Some(shared)) = (self.leaving.get_mut(group), self.shared.get(group)) else {
                continue;
            };
            leaving.extend(Some(frame));
            if leaving.is_full() {
                shared.put(std::mem::take(leaving));
            }
        }
    }

    /// How many frames this pool could take now: its own and those shared. Exact while no other worker gives or takes.
    pub fn available(&self) -> usize {
        let shared = self.shared.iter().map(|shared| shared.frames.load(Ordering::Relaxed));
        self.local() + shared.sum::<usize>()
    }

    /// How many frames this pool has for itself, out of reach of the others.
    pub fn local(&self) -> usize {
        self.local.len() + self.leaving.iter().map(ArrayVec::len).sum::<usize>()
    }
}

/// The group whose chunks this is among; behind the last one, the number of groups.
fn group_of(ends: impl Iterator<Item = u32>, chunk: u32) -> usize {
    ends.take_while(|end| chunk >= *end).count()
}

/// Gives each pool of a group the same share of its frames, up to a limit, and the rest to what they share.
fn share_out(frames: Vec<Frame>, mut pools: Vec<&mut Pool>, shared: Option<&Shared>) {
    let share = (frames.len() / pools.len().max(1)).min(LOCAL / 2);
    let mut frames = frames.into_iter();
    for pool in &mut pools {
        pool.local.extend(frames.by_ref().take(share));
    }
    // Too few for a batch: they go to the first workers, one each, rather than wait for one to run dry.
    if frames.len() < pools.len() && share < LOCAL / 2 {
        for (pool, frame) in pools.iter_mut().zip(frames) {
            pool.give(frame);
        }
        return;
    }
    loop {
        let batch: ArrayVec<Frame, BATCH> = frames.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return;
        }
        if let Some(shared) = shared {
            shared.put(batch);
        }
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

    /// DP-2: each memory node's workers have frames of their own node, in proportion to their number, and whole huge pages.
    #[test]
    fn dp_2_each_node_has_its_part() {
        // Three workers on node 0, one on node 1; that the processors are not there is no matter.
        let placement = Placement::with_nodes(&[0, 1, 4, 2], |core| Some(u32::from(core / 4)));
        for (frames, huge, end) in
            [(4096, false, 3072), (4096, true, 3072), (500, false, 375), (1000, true, 512)]
        {
            let (arena, all) = Arena::placed(frames, huge, &placement).unwrap();
            assert_eq!(arena.ends(), [end, frames]);
            let mut pools = Pool::split_placed(all, &arena, &placement);
            assert_eq!(
                pools.iter().map(Pool::available).max(),
                Some(
                    usize::try_from(frames).unwrap() - pools.iter().map(Pool::local).sum::<usize>()
                        + pools.iter().map(Pool::local).max().unwrap()
                )
            );
            let mut first = |worker: usize, count: usize| -> Vec<u32> {
                let pool = &mut pools[worker];
                std::iter::from_fn(|| pool.take()).take(count).map(Frame::into_chunk).collect()
            };
            assert!(first(2, 120).iter().all(|chunk| *chunk >= end));
            for worker in [0, 1, 3] {
                assert!(first(worker, 120).iter().all(|chunk| *chunk < end), "{worker} {frames} {huge}");
            }
        }
    }

    /// DP-2: frames that went to another node's worker come home, and none is out of reach of a worker in need.
    #[test]
    fn dp_2_frames_come_home_to_their_node() {
        let placement = Placement::with_nodes(&[0, 1], |core| Some(core.into()));
        let (arena, all) = Arena::placed(2048, false, &placement).unwrap();
        let mut pools = Pool::split_placed(all, &arena, &placement);
        let (mut second, mut first) = (pools.pop().unwrap(), pools.pop().unwrap());
        let mut foreign = 0;
        for _ in 0..100_000 {
            let frame = first.take().unwrap();
            foreign += u32::from(frame.chunk() >= 1024);
            second.give(frame);
        }
        assert_eq!(foreign, 0, "all of what the first one took came back to it");
        assert_eq!(
            first.available() + second.available()
                - first.shared.iter().map(|shared| shared.frames.load(Ordering::Relaxed)).sum::<usize>(),
            2048
        );
        let mut all: Vec<u32> = std::iter::from_fn(|| second.take()).map(Frame::into_chunk).collect();
        assert!(all.iter().any(|chunk| *chunk < 1024), "in need it takes the other's");
        all.extend(std::iter::from_fn(|| first.take()).map(Frame::into_chunk));
        all.sort_unstable();
        assert_eq!(all, (0..2048).collect::<Vec<_>>());
    }

    /// DP-2: pages are on the node of the processor that they are for, as the kernel tells it.
    #[test]
    fn dp_2_pages_are_where_they_were_asked_for() {
        let core = u16::try_from(rustix::thread::sched_getcpu()).unwrap();
        let placement = Placement::of_cores(&[core]);
        let Some(node) = placement.node_of(0) else {
            eprintln!("not checked: this kernel knows no memory nodes");
            return;
        };
        for huge in [false, true] {
            let (arena, _frames) = Arena::placed(1024, huge, &placement).unwrap();
            let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
            // A mapping of the kernel's may begin before ours: the last one that begins no later.
            let line = maps.lines().filter_map(|line| {
                let (start, rest) = line.split_once(' ')?;
                Some((usize::from_str_radix(start, 16).ok()?, rest))
            });
            let ours = line.filter(|(start, _)| *start <= arena.base().as_ptr().addr()).max().unwrap().1;
            let counts: Vec<(u32, usize)> = ours
                .split_whitespace()
                .filter_map(|word| word.strip_prefix('N')?.split_once('='))
                .map(|(node, pages)| (node.parse().unwrap(), pages.parse().unwrap()))
                .collect();
            assert!(
                counts.iter().map(|(_, pages)| pages).sum::<usize>() * HUGE_PAGE >= 1024 * FRAME_SIZE,
                "{ours}"
            );
            assert!(counts.iter().all(|(at, _)| *at == node), "{ours}");
        }
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
