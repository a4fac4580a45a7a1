//! Asks the processor for memory before it is needed, so that a batch waits for all its cache misses at once; and makes
//! room for tables on huge pages, because what misses the translation buffer as well is not fetched ahead for long.
//!
//! With `frame`, `port::xsk` and the cipher's kernel this is one of the few places of the datapath that use `unsafe`.

use core::alloc::Layout;
use core::ptr::NonNull;

use allocator_api2::alloc::{AllocError, Allocator, Global};
use allocator_api2::vec::Vec;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for the lines that an object stands on.
#[inline]
pub fn object<T>(place: &T) {
    let first = core::ptr::from_ref(place).cast::<i8>();
    for offset in (0..size_of::<T>()).step_by(LINE) {
        line(first.wrapping_add(offset));
    }
    // What does not begin with a line may end in one more.
    if size_of::<T>() > align_of::<T>() && align_of::<T>() < LINE {
        line(first.wrapping_add(size_of::<T>() - 1));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn line(at: *const i8) {
    // JUSTIFICATION: stable Rust has no safe way to prefetch.
    // SAFETY: a prefetch changes nothing that a program can see and never faults, whatever the address; SSE, which has the
    // instruction, is part of every x86-64 processor.
    unsafe { core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at) }
}

#[cfg(not(target_arch = "x86_64"))]
fn line(_at: *const i8) {}

/// Asks for the lines of a list.
#[inline]
pub fn list<T>(list: &[T]) {
    let first = list.as_ptr().cast::<i8>();
    let skipped = first.addr() % LINE;
    for offset in (0..size_of_val(list) + skipped).step_by(LINE) {
        line(first.wrapping_sub(skipped).wrapping_add(offset));
    }
}

/// Asks for lines that will be written, so that no other processor keeps a copy.
#[inline]
pub fn to_write<T>(list: &mut [T]) {
    room_for(list.as_ptr(), list.len());
}

/// The same of the line right before `bytes`.
#[inline]
pub fn before(bytes: &[u8]) {
    own(bytes.as_ptr().wrapping_sub(LINE / 2));
}

/// The same of the line right behind `bytes`.
#[inline]
pub fn behind(bytes: &[u8]) {
    own(bytes.as_ptr().wrapping_add(bytes.len()));
}

/// The same of the room for so many, from `first`.
#[inline]
pub fn room_for<T>(first: *const T, count: usize) {
    let first = first.cast::<u8>();
    let skipped = first.addr() % LINE;
    for offset in (0..count * size_of::<T>() + skipped).step_by(LINE) {
        own(first.wrapping_sub(skipped).wrapping_add(offset));
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
fn own(at: *const u8) {
    // JUSTIFICATION: stable Rust has no way to prefetch for writing; the intrinsic leaves that out unless the build is for
    // processors that have it for sure.
    // SAFETY: a prefetch changes nothing that a program can see and never faults, whatever the address; processors without
    // this one do nothing instead.
    unsafe {
        core::arch::asm!("prefetchw [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
fn own(_at: *const u8) {}

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// A table that everything a packet needs is looked up in: on transparent huge pages where the kernel has some, all but the
/// rest behind the last whole one. What stands on small pages instead is looked for in page tables first, and a prefetch waits
/// for that.
pub type Table<T> = Vec<T, HugePages>;

/// Empty, with room for `capacity` entries.
pub fn table<T>(capacity: usize) -> Table<T> {
    Vec::with_capacity_in(capacity, HugePages)
}

/// Where tables are allocated.
#[derive(Clone, Copy, Debug, Default)]
pub struct HugePages;

impl HugePages {
    /// What is asked of the global allocator: what has room for a huge page begins with one.
    fn widened(layout: Layout) -> Result<Layout, AllocError> {
        let align = if layout.size() < HUGE_PAGE { 1 } else { HUGE_PAGE };
        layout.align_to(align).map_err(|_| AllocError)
    }
}

// JUSTIFICATION: stable Rust's vectors begin where the global allocator likes, and so stand on small pages with up to 2 MiB.
// SAFETY: memory is the global allocator's, asked for and given back with the same layout, which is of the same size as the
// caller's and aligned at least as much. It stays where it is as long as that allocator lets it, whichever copy of this one
// is asked.
unsafe impl Allocator for HugePages {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let memory = Global.allocate(Self::widened(layout)?)?;
        let whole = layout.size() / HUGE_PAGE * HUGE_PAGE;
        if whole > 0 {
            // JUSTIFICATION: there is no safe wrapper.
            // SAFETY: the range is what was just allocated, and this advice changes no byte of it. A kernel that refuses it
            // leaves small pages.
            let _ = unsafe {
                rustix::mm::madvise(memory.as_ptr().cast(), whole, rustix::mm::Advice::LinuxHugepage)
            };
        }
        Ok(memory)
    }

    unsafe fn deallocate(&self, memory: NonNull<u8>, layout: Layout) {
        if let Ok(layout) = Self::widened(layout) {
            // SAFETY: the caller's; `allocate` asked with this layout.
            unsafe { Global.deallocate(memory, layout) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the kernel says to it, a table is an empty vector with room, which begins with a page if it has room for one.
    #[test]
    fn tables_have_room() {
        for capacity in [0, 1, 100, 1 << 20] {
            let mut table = table::<u64>(capacity);
            assert!(table.is_empty() && table.capacity() >= capacity);
            assert!(capacity < HUGE_PAGE / 8 || table.as_ptr().addr().is_multiple_of(HUGE_PAGE));
            table.resize(capacity, 7);
            assert!(table.iter().all(|entry| *entry == 7));
        }
    }
}
