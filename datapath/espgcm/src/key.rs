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

    /// Powers of a key that is not whole: its lowest ones.
    pub(crate) const FEW: usize = 8;

    /// Number of rounds, one byte, in the first of the blocks that do not count; behind it another, 1 if all powers are
    /// there.
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

/// Bytes of the longest text that keys which are not whole can be used for: with the AAD and the lengths, 8 blocks.
pub const SHORT: usize = 6 * BLOCK;

/// Bytes of the largest layout, four blocks a vector.
const SIZE: usize = 640;

/// Where the layouts have the number of rounds.
#[cfg(target_arch = "x86_64")]
const NUMBERS_AT: [usize; 2] =
    [Layout::<crate::vaes256::Pair>::NUMBER_AT, Layout::<crate::vaes512::Quad>::NUMBER_AT];
#[cfg(not(target_arch = "x86_64"))]
const NUMBERS_AT: [usize; 0] = [];

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

    /// Makes it a key that every kernel refuses, at less cost than [`Self::wipe`], which leaves nothing of it.
    #[inline]
    pub fn retire(&mut self) {
        for at in NUMBERS_AT {
            if let Some(place) = self.bytes.get_mut(at..at + 2) {
                place.fill(0);
            }
        }
    }

    /// Overwrites the key with zeros.
    pub fn wipe(&mut self) {
        self.bytes.zeroize();
    }

    /// Whether all of it is zero.
    pub fn is_blank(&self) -> bool {
        self.bytes.iter().all(|byte| *byte == 0)
    }

    /// Where the kernels read.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }

    /// Whether it can be used, by a kernel with vectors of type `V`, for a text of so many bytes.
    #[inline(always)]
    pub(crate) fn is_enough<V: Lanes>(&self, text: usize) -> bool {
        text <= SHORT || self.bytes.get(Layout::<V>::NUMBER_AT + 1) == Some(&1)
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

/// Blocks of a key. Here and below they are gone through one by one, by macros: what a loop goes through stays in memory,
/// and is written twice.
const BLOCKS: usize = SIZE / BLOCK;

/// Index of the first round key of a key with so many rounds.
const fn first(rounds: usize) -> usize {
    14 - rounds
}

/// Groups of keys, one a lane, that are expanded together.
pub(crate) const GROUPS: usize = 8;

/// Keys that are expanded together, one a lane.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    /// 16 bytes each for 10 rounds, 24 for 12 and 32 for 14.
    pub(crate) keys: [*const u8; 4],
    /// Where they go: `SIZE` bytes each.
    pub(crate) to: [*mut u8; 4],
}

/// Expands keys, in each group as many as a vector has blocks: where one key waits for itself round after round, four
/// take hardly longer. First come the round keys of all groups, then the powers, so that groups wait side by side.
/// Whatever was in `to` is overwritten; unless `whole`, only the powers that short texts need are worth something. If two lanes have one place, the later lane's key is there in the end.
///
/// # Safety
/// The processor has the instructions of `V`. The first `V::BLOCKS` pointers of each group's `keys` are to keys of that
/// length, those of `to` to the `SIZE` bytes of a [`Key`] that nobody else uses.
#[inline(always)]
pub(crate) unsafe fn expand<V: Lanes, const ROUNDS: usize>(groups: &[Group], whole: bool) {
    const {
        assert!(Layout::<V>::END <= SIZE && matches!(ROUNDS, 10 | 12 | 14));
        // Where the round keys end, at the last block of a group of four, the powers begin.
        assert!(Layout::<V>::POWERS_AT == 15 * BLOCK);
    }
    // JUSTIFICATION: the vectors load and store through pointers.
    // SAFETY: V's instructions and the pointers are the caller's. All vectors written lie within SIZE bytes.
    unsafe {
        let mut hashes = [V::zero(); GROUPS];
        for (group, hash) in groups.iter().zip(&mut hashes) {
            let mut blocks = [V::zero(); BLOCKS];
            match ROUNDS {
                10 => schedule_128(group.keys, &mut blocks),
                12 => schedule_192(group.keys, &mut blocks),
                _ => schedule_256(group.keys, &mut blocks),
            }
            *hash = hash_key::<V, ROUNDS>(&blocks);
            store::<V>(&blocks, 0, group.to);
            store::<V>(&blocks, 1, group.to);
            store::<V>(&blocks, 2, group.to);
            store::<V>(&blocks, 3, group.to);
        }
        for (group, hash) in groups.iter().zip(hashes) {
            if whole || Layout::<V>::POWERS <= Layout::<V>::FEW + 1 {
                let mut blocks = [V::zero(); BLOCKS];
                powers::<V, true>(hash, &mut blocks);
                set(&mut blocks, Layout::<V>::NUMBER_AT / BLOCK, V::splat(ROUNDS as u128 | 1 << 8));
                get(&blocks, 15).scatter(group.to.map(|to| to.wrapping_add(15 * BLOCK)));
                store::<V>(&blocks, 4, group.to);
                store::<V>(&blocks, 5, group.to);
                store::<V>(&blocks, 6, group.to);
                store::<V>(&blocks, 7, group.to);
                store::<V>(&blocks, 8, group.to);
                store::<V>(&blocks, 9, group.to);
            } else {
                let mut blocks = [V::zero(); BLOCKS];
                powers::<V, false>(hash, &mut blocks);
                set(&mut blocks, Layout::<V>::NUMBER_AT / BLOCK, V::splat(ROUNDS as u128));
                store::<V>(&blocks, 6, group.to);
                store::<V>(&blocks, 7, group.to);
                store::<V>(&blocks, 8, group.to);
            }
        }
    }
}

/// Writes four blocks of each lane: those from `4 * index` on.
#[inline(always)]
unsafe fn store<V: Lanes>(blocks: &[V; BLOCKS], index: usize, to: [*mut u8; 4]) {
    // SAFETY: as for the caller.
    unsafe {
        let [a, b, c, d] = [0, 1, 2, 3].map(|at| get(blocks, 4 * index + at));
        let at = to.map(|to| to.wrapping_add(4 * BLOCK * index));
        let [first, second, third, fourth] = V::transpose([a, b, c, d]);
        first.store(at[0]);
        second.store(at[1]);
        if V::BLOCKS == 2 {
            let [first, second, ..] = V::transpose([c, d, c, d]);
            first.store(at[0].add(2 * BLOCK));
            second.store(at[1].add(2 * BLOCK));
        } else {
            third.store(at[2]);
            fourth.store(at[3]);
        }
    }
}

/// The block at `index`.
#[inline(always)]
unsafe fn get<V: Lanes>(blocks: &[V; BLOCKS], index: usize) -> V {
    match blocks.get(index) {
        Some(block) => *block,
        // SAFETY: as for the caller.
        None => unsafe { V::zero() },
    }
}

/// Sets the block at `index`.
#[inline(always)]
fn set<V: Lanes>(blocks: &mut [V; BLOCKS], index: usize, block: V) {
    if let Some(place) = blocks.get_mut(index) {
        *place = block;
    }
}

#[inline(always)]
unsafe fn schedule_128<V: Lanes>(keys: [*const u8; 4], blocks: &mut [V; BLOCKS]) {
    // SAFETY: as for the caller.
    unsafe {
        let mut last = V::gather(keys);
        set(blocks, first(10), last);
        macro_rules! rounds {
            ($($round:literal)+) => { $(
                last = V::next_round_key::<true>(last, last, RCON[$round - 1]);
                set(blocks, first(10) + $round, last);
            )+ };
        }
        rounds!(1 2 3 4 5 6 7 8 9 10);
    }
}

/// Word by word in memory: 192 bits fit no vector of 128, and few SAs have such keys.
#[inline(always)]
unsafe fn schedule_192<V: Lanes>(keys: [*const u8; 4], blocks: &mut [V; BLOCKS]) {
    let mut words = [[0u32; 52]; 4];
    // SAFETY: as for the caller; the words 0 to 51 are the 13 round keys.
    unsafe {
        for (words, key) in words.iter_mut().zip(keys).take(V::BLOCKS) {
            let start = words.as_mut_ptr();
            core::ptr::copy_nonoverlapping(key, start.cast(), 24);
            for (step, rcon) in (1..9).zip(RCON) {
                let first = 6 * step;
                // The last four words before `first`; of these the last one counts.
                let last = V::load_block(start.add(first - 4).cast::<u8>().cast_const());
                let mut added = [0u8; BLOCK];
                V::next_round_key::<true>(V::zero(), last, rcon).store_block(added.as_mut_ptr());
                let [a0, a1, a2, a3, ..] = added;
                added.zeroize();
                let mut sum = u32::from_ne_bytes([a0, a1, a2, a3]);
                for index in first..(first + 6).min(52) {
                    sum ^= start.add(index - 6).read();
                    start.add(index).write(sum);
                }
            }
        }
        let [a, b, c, d] = &words;
        macro_rules! rounds {
            ($($round:literal)+) => { $(
                let at = |words: &[u32; 52]| words.as_ptr().add(4 * $round).cast::<u8>();
                set(blocks, first(12) + $round, V::gather([at(a), at(b), at(c), at(d)]));
            )+ };
        }
        rounds!(0 1 2 3 4 5 6 7 8 9 10 11 12);
    }
    words.zeroize();
}

#[inline(always)]
unsafe fn schedule_256<V: Lanes>(keys: [*const u8; 4], blocks: &mut [V; BLOCKS]) {
    // SAFETY: as for the caller; keys of 32 bytes have a second block.
    unsafe {
        let mut even = V::gather(keys);
        let mut odd = V::gather(keys.map(|key| key.wrapping_add(BLOCK)));
        set(blocks, first(14), even);
        set(blocks, first(14) + 1, odd);
        macro_rules! steps {
            ($($step:literal)+) => { $(
                even = V::next_round_key::<true>(even, odd, RCON[$step - 1]);
                set(blocks, 2 * $step, even);
                if $step < 7 {
                    odd = V::next_round_key::<false>(odd, even, 0);
                    set(blocks, 2 * $step + 1, odd);
                }
            )+ };
        }
        steps!(1 2 3 4 5 6 7);
    }
}

/// The hash key, by the round keys.
#[inline(always)]
unsafe fn hash_key<V: Lanes, const ROUNDS: usize>(blocks: &[V; BLOCKS]) -> V {
    // SAFETY: as for the caller.
    unsafe {
        let mut state = get(blocks, first(ROUNDS));
        macro_rules! rounds {
            ($($round:literal)+) => { $(
                if $round < ROUNDS {
                    state = state.aesenc(get(blocks, first(ROUNDS) + $round));
                }
            )+ };
        }
        rounds!(1 2 3 4 5 6 7 8 9 10 11 12 13);
        state.aesenclast(get(blocks, first(ROUNDS) + ROUNDS)).swap_bytes()
    }
}

/// The powers of the hash key, and the sums of halves; or the few powers.
#[inline(always)]
unsafe fn powers<V: Lanes, const ALL: bool>(hash: V, blocks: &mut [V; BLOCKS]) {
    // SAFETY: as for the caller.
    unsafe {
        let index = |n: usize| Layout::<V>::power(n) / BLOCK;
        set(blocks, index(1), hash.double());
        // From the middle, so that few have to wait for each other.
        macro_rules! powers {
            ($($n:literal)+) => { $(
                if $n <= Layout::<V>::POWERS && (ALL || $n <= Layout::<V>::FEW) {
                    let half = get(blocks, index($n / 2));
                    let power =
                        if $n % 2 == 0 { square(half) } else { multiply(half, get(blocks, index($n - $n / 2))) };
                    set(blocks, index($n), power);
                }
            )+ };
        }
        const { assert!(Layout::<V>::POWERS <= 19) };
        powers!(2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19);
        if !ALL {
            return;
        }
        let sum = |at: usize| {
            let power = get(blocks, index(V::BLOCKS * (CHUNK - at)));
            power.xor(power.swap_halves())
        };
        let (low, high) = (sum(0).low_halves(sum(1)), sum(2).low_halves(sum(3)));
        set(blocks, Layout::<V>::HALVES_AT / BLOCK, low);
        set(blocks, Layout::<V>::HALVES_AT / BLOCK + 1, high);
    }
}

/// A sum of products before reduction: bits 0 to 127, 128 to 255, and 64 to 191.
#[derive(Clone, Copy)]
pub(crate) struct Sum<V> {
    pub(crate) low: V,
    pub(crate) high: V,
    pub(crate) middle: V,
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

/// The square of each lane: what is between the halves comes twice, and so not at all.
#[inline(always)]
unsafe fn square<V: Lanes>(a: V) -> V {
    // SAFETY: the caller's.
    unsafe { Sum { low: a.clmul_low(a), high: a.clmul_high(a), middle: V::zero() }.reduce() }
}

/// The product of each lane.
#[inline(always)]
unsafe fn multiply<V: Lanes>(a: V, b: V) -> V {
    // SAFETY: the caller's.
    unsafe { Sum::of(a, b).reduce() }
}
