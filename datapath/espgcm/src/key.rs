//! Expanded keys: the round keys of AES and the powers of the hash key of GHASH.
//!
//! The layout is the kernels': they read a key through a pointer, with the offsets of [`Layout`]. What a packet of 64
//! bytes needs is close together, so that a key that is in no cache costs few lines: with two blocks a vector and AES-128
//! the round keys and the six lowest powers take five lines.
//!
//! In GHASH the bits of a block count from the other end. As usual, blocks are turned byte by byte, and the hash key is
//! multiplied by x^-1 beforehand, so that the product of a block and a power needs no shift (Gueron and Kounavis,
//! "Intel Carry-Less Multiplication Instruction and its Usage for Computing the GCM Mode", 2010). What is stored of the
//! n-th power H^n is H^n x^-1; [`multiply`] of two such is such a one again.

#![expect(clippy::cast_ptr_alignment, reason = "words are read and written unaligned")]

use core::marker::PhantomData;

use zeroize::Zeroize;

use crate::lanes::Lanes;

/// Vectors that a kernel works on at the same time.
pub(crate) const CHUNK: usize = 4;

/// Bytes of a block.
pub(crate) const BLOCK: usize = 16;

/// Where things are in a key for vectors of type `V`.
pub(crate) struct Layout<V>(PhantomData<V>);

impl<V: Lanes> Layout<V> {
    /// Text that [`crate::kernel`] leaves to the end at least, in blocks: with the lengths behind it, every lane has a
    /// block that its hash goes with.
    pub(crate) const LEFT: usize = V::BLOCKS - 1;

    /// One for each block of a chunk, and for the blocks that may be left besides a chunk: `LEFT - 1`, and the lengths.
    pub(crate) const POWERS: usize = CHUNK * V::BLOCKS + Self::LEFT;

    /// End of the round keys; the last one is right before it, whatever the key's length.
    pub(crate) const ROUNDS_END: usize = 15 * BLOCK;

    /// The powers of the hash key, the highest first. Behind the first power are `BLOCKS - 1` blocks that are only ever
    /// multiplied with zero.
    pub(crate) const POWERS_AT: usize = Self::ROUNDS_END;

    /// Number of rounds, one byte, in the first of the blocks that do not count.
    pub(crate) const NUMBER_AT: usize = Self::POWERS_AT + BLOCK * Self::POWERS;

    /// The sums of the two halves, 8 bytes each, of the powers that whole chunks are multiplied by: H^(4 L), H^(3 L) …
    /// with L blocks a vector.
    pub(crate) const HALVES_AT: usize = Self::NUMBER_AT + BLOCK * (V::BLOCKS - 1);

    /// Bytes in use.
    pub(crate) const END: usize = Self::HALVES_AT + 8 * CHUNK;

    /// Offset of power `n`, 1 to `POWERS`.
    pub(crate) const fn power(n: usize) -> usize {
        Self::NUMBER_AT - BLOCK * n
    }

    /// Offset of the round key before round `round` of `rounds`.
    pub(crate) const fn round(rounds: usize, round: usize) -> usize {
        Self::ROUNDS_END - BLOCK * (rounds + 1 - round)
    }
}

/// Bytes of the largest layout, four blocks a vector.
const SIZE: usize = 640;

/// An expanded AES-GCM key. Wiped when it is dropped; shows nothing.
#[repr(C, align(64))]
pub struct Key {
    bytes: [u8; SIZE],
}

/// AES has no such key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an AES key has 16, 24 or 32 bytes, not {0}")]
pub struct KeyLength(pub usize);

impl Key {
    /// No key: all zeros. A packet given to it is refused.
    pub const fn blank() -> Self {
        Self { bytes: [0; SIZE] }
    }

    /// Overwrites the key with zeros.
    pub fn wipe(&mut self) {
        self.bytes.zeroize();
    }

    /// Whether all of it is zero.
    pub fn is_blank(&self) -> bool {
        self.bytes.iter().all(|byte| *byte == 0)
    }

    /// Asks the processor to fetch the lines that the kernels read first.
    #[inline]
    pub fn prefetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for line in self.bytes.chunks(64).skip(1).take(6) {
            // JUSTIFICATION: the instruction is to be had in no other way.
            // SAFETY: a hint, which needs nothing but SSE, a part of x86-64.
            unsafe {
                core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast());
            }
        }
    }

    /// Where the kernels read.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }

    /// Number of rounds for vectors of type `V`: 10, 12 or 14, or 0 of a blank key.
    #[inline(always)]
    pub(crate) fn rounds<V: Lanes>(&self) -> u8 {
        self.bytes.get(Layout::<V>::NUMBER_AT).copied().unwrap_or(0)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.wipe();
    }
}

impl core::fmt::Debug for Key {
    /// Without the key.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// The constants of the key schedule (FIPS 197 section 5.2).
const RCON: [u8; 10] = [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1b, 0x36];

/// Expands `key` into `into`.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn expand<V: Lanes>(key: &[u8], into: &mut Key) -> Result<(), KeyLength> {
    const {
        assert!(Layout::<V>::END <= SIZE);
    }
    // What a longer key left, too.
    into.bytes = [0; SIZE];
    let to = into.bytes.as_mut_ptr();
    // JUSTIFICATION: the vectors load and store through pointers.
    // SAFETY: V's instructions are there (the caller). Reads of `key` are within the length matched; writes to `to` are
    // at the layout's offsets, which end at `END`, at most the size of `bytes`, as asserted above.
    unsafe {
        let rounds = match key.len() {
            16 => expand_128::<V>(key.as_ptr(), to),
            24 => expand_192::<V>(key.as_ptr(), to),
            32 => expand_256::<V>(key.as_ptr(), to),
            other => return Err(KeyLength(other)),
        };
        to.add(Layout::<V>::NUMBER_AT).write(match rounds {
            10 => 10,
            12 => 12,
            _ => 14,
        });
        powers::<V>(rounds, to);
    }
    Ok(())
}

#[inline(always)]
unsafe fn expand_128<V: Lanes>(key: *const u8, to: *mut u8) -> usize {
    // SAFETY: as for the caller.
    unsafe {
        let at = |round| to.add(Layout::<V>::round(10, round));
        let mut last = V::load_block(key);
        last.store_block(at(0));
        for (round, rcon) in (1..).zip(RCON) {
            last = V::next_round_key::<true>(last, last, rcon);
            last.store_block(at(round));
        }
    }
    10
}

/// Word by word in memory: 192 bits fit no vector of 128, and few SAs have such keys.
#[inline(always)]
unsafe fn expand_192<V: Lanes>(key: *const u8, to: *mut u8) -> usize {
    // SAFETY: as for the caller; the words 0 to 51 are the 13 round keys.
    unsafe {
        let start = to.add(Layout::<V>::round(12, 0));
        let word = |index: usize| start.add(4 * index).cast::<u32>();
        core::ptr::copy_nonoverlapping(key, start, 24);
        for (step, rcon) in (1..9).zip(RCON) {
            let first = 6 * step;
            // The last four words before `first`; of these the last one counts.
            let last = V::load_block(word(first - 4).cast());
            let mut added = [0u8; BLOCK];
            V::next_round_key::<true>(V::zero(), last, rcon).store_block(added.as_mut_ptr());
            let [a0, a1, a2, a3, ..] = added;
            added.zeroize();
            let mut sum = u32::from_ne_bytes([a0, a1, a2, a3]);
            for index in first..(first + 6).min(52) {
                sum ^= word(index - 6).read_unaligned();
                word(index).write_unaligned(sum);
            }
        }
    }
    12
}

#[inline(always)]
unsafe fn expand_256<V: Lanes>(key: *const u8, to: *mut u8) -> usize {
    // SAFETY: as for the caller.
    unsafe {
        let at = |round| to.add(Layout::<V>::round(14, round));
        let mut even = V::load_block(key);
        let mut odd = V::load_block(key.add(BLOCK));
        even.store_block(at(0));
        odd.store_block(at(1));
        for (step, rcon) in (1..8).zip(RCON) {
            even = V::next_round_key::<true>(even, odd, rcon);
            even.store_block(at(2 * step));
            if step < 7 {
                odd = V::next_round_key::<false>(odd, even, 0);
                odd.store_block(at(2 * step + 1));
            }
        }
    }
    14
}

/// Computes the powers of the hash key from the round keys.
#[inline(always)]
unsafe fn powers<V: Lanes>(rounds: usize, to: *mut u8) {
    // SAFETY: as for the caller.
    unsafe {
        let round = |round| V::broadcast(to.add(Layout::<V>::round(rounds, round)).cast_const());
        let mut state = round(0);
        for at in 1..rounds {
            state = state.aesenc(round(at));
        }
        let mut block = [0u8; BLOCK];
        state.aesenclast(round(rounds)).store_block(block.as_mut_ptr());
        let hash = u128::from_be_bytes(block);
        // Times x^-1: all bits move up by one, and what falls out comes back as the polynomial. No branch on the key.
        let carry = 0u128.wrapping_sub(hash >> 127);
        let mut first = (hash << 1 ^ carry & 0xc200_0000_0000_0000_0000_0000_0000_0001).to_le_bytes();

        // Power n stands `n` blocks before the end.
        let end = to.add(Layout::<V>::NUMBER_AT);
        let h1 = V::broadcast(first.as_ptr());
        h1.store_block(end.sub(BLOCK));
        let mut power = h1;
        for n in 2..=V::BLOCKS {
            power = multiply(power, h1);
            power.store_block(end.sub(BLOCK * n));
        }
        // A whole vector of powers at a time; `power` is H^BLOCKS in all lanes.
        let mut vector = V::load(end.sub(BLOCK * V::BLOCKS).cast_const());
        for step in 2..=CHUNK {
            vector = multiply(vector, power);
            vector.store(end.sub(BLOCK * V::BLOCKS * step));
        }
        // The rest are less than a vector: all lanes but the first.
        let mut rest = [0u8; 4 * BLOCK];
        multiply(vector, power).store(rest.as_mut_ptr());
        let highest = to.add(Layout::<V>::power(Layout::<V>::POWERS));
        core::ptr::copy_nonoverlapping(rest.as_ptr().add(BLOCK), highest, BLOCK * Layout::<V>::LEFT);
        rest.zeroize();
        for index in 0..CHUNK {
            let power = to.add(Layout::<V>::power(V::BLOCKS * (CHUNK - index))).cast::<u64>();
            let sum = power.read_unaligned() ^ power.add(1).read_unaligned();
            to.add(Layout::<V>::HALVES_AT + 8 * index).cast::<u64>().write_unaligned(sum);
        }
        block.zeroize();
        first.zeroize();
    }
}

/// A sum of products before reduction: bits 0 to 127, 128 to 255, and 64 to 191.
#[derive(Clone, Copy)]
pub(crate) struct Sum<V> {
    low: V,
    high: V,
    middle: V,
}

impl<V: Lanes> Sum<V> {
    /// The products of the lanes of `block` and `power`.
    ///
    /// # Safety
    /// The processor has the instructions of `V`.
    #[inline(always)]
    pub(crate) unsafe fn of(block: V, power: V) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self {
                low: block.clmul_low(power),
                high: block.clmul_high(power),
                middle: block.clmul_low_high(power).xor(block.clmul_high_low(power)),
            }
        }
    }

    /// The same with three multiplications in place of four (Karatsuba's trick) for who has `halves`, the sums of the halves
    /// of each power: `middle` has the two others in it as well, until [`Self::settle`] takes them out.
    ///
    /// # Safety
    /// As for `of`.
    #[inline(always)]
    pub(crate) unsafe fn unsettled(block: V, power: V, halves: V) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self {
                low: block.clmul_low(power),
                high: block.clmul_high(power),
                middle: block.xor(block.swap_halves()).clmul_low(halves),
            }
        }
    }

    /// The sum that a sum of [`Self::unsettled`] ones stands for.
    ///
    /// # Safety
    /// As for `of`.
    #[inline(always)]
    pub(crate) unsafe fn settle(self) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let Self { low, high, middle } = self;
            Self { low, high, middle: middle.xor(low).xor(high) }
        }
    }

    /// The sum of both.
    ///
    /// # Safety
    /// As for `of`.
    #[inline(always)]
    pub(crate) unsafe fn plus(self, other: Self) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self {
                low: self.low.xor(other.low),
                high: self.high.xor(other.high),
                middle: self.middle.xor(other.middle),
            }
        }
    }

    /// The field element of each lane.
    ///
    /// # Safety
    /// As for `of`.
    #[inline(always)]
    pub(crate) unsafe fn reduce(self) -> V {
        static POLYNOMIAL: u64 = 0xc200_0000_0000_0000;
        // SAFETY: the caller's.
        unsafe {
            let polynomial = V::broadcast_half((&raw const POLYNOMIAL).cast());
            let Self { low, high, middle } = self;
            // 64 bits at a time from the low end: bits 0 to 63, then 64 to 127.
            let middle = middle.xor(low.swap_halves()).xor(low.clmul_low(polynomial));
            high.xor(middle.swap_halves()).xor(middle.clmul_low(polynomial))
        }
    }
}

/// The product of each lane.
#[inline(always)]
unsafe fn multiply<V: Lanes>(a: V, b: V) -> V {
    // SAFETY: the caller's.
    unsafe { Sum::of(a, b).reduce() }
}
