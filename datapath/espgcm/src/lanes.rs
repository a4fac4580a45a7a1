//! A vector of AES blocks, as wide as the processor has it: what the kernels are written in.
//!
//! Contract: block 0 is lane 0, at the lowest address. The methods are `unsafe` because an implementation may need
//! instructions that a processor lacks, and because some read or write through a pointer; they have no other conditions.
//! They are `inline(always)`, so that they become part of the function that enables the instructions (`#[target_feature]`
//! cannot stand on a method of a safe trait).

/// One vector.
///
/// # Safety
/// `load*` read and `store*` write exactly the bytes that their documentation names.
// JUSTIFICATION: the kernels' bounds checks count on it.
pub(crate) unsafe trait Lanes: Copy {
    /// Blocks in a vector.
    const BLOCKS: usize;

    /// Whether there are registers enough to keep the round keys in while the packet is worked on.
    const MANY: bool;

    /// Whether `load_part` and `store_part` touch the bytes asked for and no others.
    const EXACT: bool;

    /// All bits zero.
    unsafe fn zero() -> Self;

    /// `block`, whose first byte is the lowest, in every lane.
    unsafe fn splat(block: u128) -> Self;

    /// `block` in lane 0, zeros in the others.
    unsafe fn block(block: u128) -> Self;

    /// `block` in lane `lane`, zeros in the others; zeros in all when there is no such lane.
    unsafe fn place(block: u128, lane: usize) -> Self;

    /// The `16 * BLOCKS` bytes at `from`.
    unsafe fn load(from: *const u8) -> Self;

    /// Writes `16 * BLOCKS` bytes to `to`.
    unsafe fn store(self, to: *mut u8);

    /// The 16 bytes at `from`, zeros behind them.
    unsafe fn load_block(from: *const u8) -> Self;

    /// Writes lane 0 to `to`.
    unsafe fn store_block(self, to: *mut u8);

    /// The `bytes` bytes at `from`, at most a vector; behind them up to the end of the block anything, then zeros. All
    /// bytes of that block are read unless `EXACT`.
    unsafe fn load_part(from: *const u8, bytes: usize) -> Self;

    /// Writes the first `bytes` bytes to `to`, at most a vector. All bytes of their last block are written unless
    /// `EXACT`.
    unsafe fn store_part(self, to: *mut u8, bytes: usize);

    /// The first `bytes` bytes, at most a vector, and zeros behind them.
    unsafe fn keep(self, bytes: usize) -> Self;

    /// Zeros in lane 0.
    unsafe fn without_first(self) -> Self;

    /// The 16 bytes at each pointer in the lane of its index; of pointers without a lane nothing.
    unsafe fn gather(from: [*const u8; 4]) -> Self;

    /// Writes each lane to the pointer of its index.
    unsafe fn scatter(self, to: [*mut u8; 4]);

    /// The 16 bytes at `from` in every lane.
    unsafe fn broadcast(from: *const u8) -> Self;

    /// The 8 bytes at `from` in the low half of every lane; the high halves are anything.
    unsafe fn broadcast_half(from: *const u8) -> Self;

    /// Bitwise.
    unsafe fn xor(self, other: Self) -> Self;

    /// Adds the 32-bit words, as they lie in little-endian memory.
    unsafe fn add(self, other: Self) -> Self;

    /// One round of AES encryption: ShiftRows, SubBytes, MixColumns, AddRoundKey.
    unsafe fn aesenc(self, key: Self) -> Self;

    /// The last round, which has no MixColumns.
    unsafe fn aesenclast(self, key: Self) -> Self;

    /// The carry-less product of the low halves of each lane.
    unsafe fn clmul_low(self, other: Self) -> Self;

    /// The carry-less product of the high halves of each lane.
    unsafe fn clmul_high(self, other: Self) -> Self;

    /// The carry-less product of the low halves of `self` and the high ones of `other`.
    unsafe fn clmul_low_high(self, other: Self) -> Self;

    /// The carry-less product of the high halves of `self` and the low ones of `other`.
    unsafe fn clmul_high_low(self, other: Self) -> Self;

    /// Exchanges the halves of each lane.
    unsafe fn swap_halves(self) -> Self;

    /// The low half of each lane of `self`, with the low half of `other` above it.
    unsafe fn low_halves(self, other: Self) -> Self;

    /// Each lane times x in the field of GHASH, its bytes reversed: all bits one up, and what falls out comes back as the
    /// polynomial. In constant time.
    unsafe fn double(self) -> Self;

    /// Lane n of row m becomes lane m of row n, for as many rows as there are lanes; what the other rows become is
    /// anything.
    unsafe fn transpose(rows: [Self; 4]) -> [Self; 4];

    /// Reverses the bytes of each lane.
    unsafe fn swap_bytes(self) -> Self;

    /// Lane 0 is the sum of all lanes; the others are anything.
    unsafe fn fold(self) -> Self;

    /// In each lane the round key that follows `last`, `base` being the one a key's length before it (FIPS 197 section
    /// 5.2): every word is the sum of the words of `base` up to it and SubWord of the last word of `last`, before that
    /// rotated if `ROTATE`, with `rcon` added.
    unsafe fn next_round_key<const ROTATE: bool>(base: Self, last: Self, rcon: u8) -> Self;

    /// Whether lane 0 is zero, in constant time.
    unsafe fn first_is_zero(self) -> bool;
}

/// Asks for the line at `at`, to be read and written soon. Any address will do.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
pub(crate) fn ask_for(at: *const u8) {
    // JUSTIFICATION: stable Rust has no way to prefetch for writing.
    // SAFETY: a prefetch changes nothing that a program can see and never faults, whatever the address; processors without
    // this one do nothing instead.
    unsafe {
        core::arch::asm!("prefetchw [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
pub(crate) fn ask_for(_at: *const u8) {}

/// A block in a register of its own.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn halves(block: u128) -> core::arch::x86_64::__m128i {
    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "bits, in two halves")]
    let (low, high) = (block as u64 as i64, (block >> 64) as u64 as i64);
    // JUSTIFICATION: by way of memory the block would have to wait for two stores.
    // SAFETY: needs SSE2, a part of x86-64.
    unsafe { core::arch::x86_64::_mm_set_epi64x(high, low) }
}
