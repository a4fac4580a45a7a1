//! What moves leave behind (OPS-4): a library that gives an expanded key by value wipes it where it ends up, but not where
//! it was before.

use core::hint::black_box;

/// Bytes below the caller that are overwritten: several times what expanding a key and moving it takes.
const BELOW: usize = 16 << 10;

/// Does `work`, and overwrites the part of the stack that it stood on.
pub(crate) fn wiped<T>(work: impl FnOnce() -> T) -> T {
    // Neither is inlined, so both stand on the same part.
    let result = apart(work);
    overwrite();
    result
}

#[inline(never)]
fn apart<T>(work: impl FnOnce() -> T) -> T {
    work()
}

#[inline(never)]
fn overwrite() {
    black_box(&mut [0_u8; BELOW]);
}
