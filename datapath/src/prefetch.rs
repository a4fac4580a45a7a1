//! Asks the processor for memory before it is needed, so that a batch waits for all its cache misses at once.
//!
//! With `frame`, `port::xsk` and the cipher's kernel this is one of the few places of the datapath that use `unsafe`.

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
