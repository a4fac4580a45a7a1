//! Two blocks a vector: VAES and VPCLMULQDQ on the 256-bit registers of AVX2 (AMD Zen 3, Intel Alder Lake).

#![expect(clippy::undocumented_unsafe_blocks, reason = "each is one instruction: said once, above the impl")]
#![allow(clippy::wildcard_imports, reason = "every name is Intel's and begins with _mm")]

use core::arch::x86_64::*;

use crate::lanes::{Lanes, halves};

/// Ones, then zeros: a load at an offset makes a mask.
static MASK: [[u8; 32]; 2] = [[0xff; 32], [0; 32]];

/// Two blocks.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256i);

// JUSTIFICATION: the instructions of the kernel are to be had in no other way.
// SAFETY: each method reads or writes what the trait says: 32 bytes, 16, or 8; that the processor has the
// instructions is the caller's to see to.
unsafe impl Lanes for Pair {
    const BLOCKS: usize = 2;
    const MANY: bool = false;
    const EXACT: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm256_setzero_si256()) }
    }

    #[inline(always)]
    unsafe fn splat(block: u128) -> Self {
        unsafe { Self(_mm256_broadcastsi128_si256(halves(block))) }
    }

    #[inline(always)]
    unsafe fn block(block: u128) -> Self {
        unsafe { Self(_mm256_zextsi128_si256(halves(block))) }
    }

    #[inline(always)]
    unsafe fn place(block: u128, lane: usize) -> Self {
        unsafe {
            let [low, high] = [0, 1].map(|at| i64::from(lane == at).wrapping_neg());
            let chosen = _mm256_set_epi64x(high, high, low, low);
            Self(_mm256_and_si256(Self::splat(block).0, chosen))
        }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        unsafe { Self(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn load_block(from: *const u8) -> Self {
        unsafe { Self(_mm256_zextsi128_si256(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store_block(self, to: *mut u8) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(self.0)) }
    }

    #[inline(always)]
    unsafe fn load_part(from: *const u8, bytes: usize) -> Self {
        match bytes {
            0 => unsafe { Self::zero() },
            1..=16 => unsafe { Self::load_block(from) },
            _ => unsafe { Self::load(from) },
        }
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut u8, bytes: usize) {
        match bytes {
            0 => {}
            1..=16 => unsafe { self.store_block(to) },
            _ => unsafe { self.store(to) },
        }
    }

    #[inline(always)]
    unsafe fn keep(self, bytes: usize) -> Self {
        unsafe {
            let mask = (&raw const MASK).cast::<u8>().add(32 - bytes);
            Self(_mm256_and_si256(self.0, Self::load(mask).0))
        }
    }

    #[inline(always)]
    unsafe fn without_first(self) -> Self {
        unsafe { Self(_mm256_blend_epi32::<0xf0>(_mm256_setzero_si256(), self.0)) }
    }

    #[inline(always)]
    unsafe fn gather(from: [*const u8; 4]) -> Self {
        unsafe {
            let [a, b, _, _] = from;
            let low = _mm256_castsi128_si256(_mm_loadu_si128(a.cast()));
            Self(_mm256_inserti128_si256::<1>(low, _mm_loadu_si128(b.cast())))
        }
    }

    #[inline(always)]
    unsafe fn scatter(self, to: [*mut u8; 4]) {
        unsafe {
            _mm_storeu_si128(to[0].cast(), _mm256_castsi256_si128(self.0));
            _mm_storeu_si128(to[1].cast(), _mm256_extracti128_si256::<1>(self.0));
        }
    }

    #[inline(always)]
    unsafe fn broadcast(from: *const u8) -> Self {
        unsafe { Self(_mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn broadcast_half(from: *const u8) -> Self {
        unsafe { Self(_mm256_set1_epi64x(from.cast::<i64>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        unsafe { Self(_mm256_xor_si256(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Self(_mm256_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn aesenc(self, key: Self) -> Self {
        unsafe { Self(_mm256_aesenc_epi128(self.0, key.0)) }
    }

    #[inline(always)]
    unsafe fn aesenclast(self, key: Self) -> Self {
        unsafe { Self(_mm256_aesenclast_epi128(self.0, key.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_low(self, other: Self) -> Self {
        unsafe { Self(_mm256_clmulepi64_epi128::<0x00>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_high(self, other: Self) -> Self {
        unsafe { Self(_mm256_clmulepi64_epi128::<0x11>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_low_high(self, other: Self) -> Self {
        unsafe { Self(_mm256_clmulepi64_epi128::<0x10>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_high_low(self, other: Self) -> Self {
        unsafe { Self(_mm256_clmulepi64_epi128::<0x01>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn swap_halves(self) -> Self {
        unsafe { Self(_mm256_shuffle_epi32::<0x4e>(self.0)) }
    }

    #[inline(always)]
    unsafe fn low_halves(self, other: Self) -> Self {
        unsafe { Self(_mm256_unpacklo_epi64(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn double(self) -> Self {
        unsafe {
            let carries = _mm256_slli_si256::<8>(_mm256_srli_epi64::<63>(self.0));
            let moved = _mm256_or_si256(_mm256_slli_epi64::<1>(self.0), carries);
            let top = _mm256_srai_epi32::<31>(_mm256_shuffle_epi32::<0xff>(self.0));
            let polynomial = _mm_set_epi64x(0xc200_0000_0000_0000_u64.cast_signed(), 1);
            let back = _mm256_and_si256(top, _mm256_broadcastsi128_si256(polynomial));
            Self(_mm256_xor_si256(moved, back))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [Self; 4]) -> [Self; 4] {
        unsafe {
            let [a, b, ..] = rows;
            let first = Self(_mm256_permute2x128_si256::<0x20>(a.0, b.0));
            let second = Self(_mm256_permute2x128_si256::<0x31>(a.0, b.0));
            [first, second, second, second]
        }
    }

    #[inline(always)]
    unsafe fn swap_bytes(self) -> Self {
        unsafe {
            let order = _mm_set_epi64x(0x0001_0203_0405_0607, 0x0809_0a0b_0c0d_0e0f);
            Self(_mm256_shuffle_epi8(self.0, _mm256_broadcastsi128_si256(order)))
        }
    }

    #[inline(always)]
    unsafe fn fold(self) -> Self {
        unsafe {
            let sum = _mm_xor_si128(_mm256_castsi256_si128(self.0), _mm256_extracti128_si256::<1>(self.0));
            Self(_mm256_castsi128_si256(sum))
        }
    }

    #[inline(always)]
    unsafe fn next_round_key<const ROTATE: bool>(base: Self, last: Self, rcon: u8) -> Self {
        unsafe {
            // The last word in every column, which makes ShiftRows no change.
            let order = if ROTATE { 0x0c0f_0e0d } else { 0x0f0e_0d0c };
            let last = _mm256_shuffle_epi8(last.0, _mm256_set1_epi32(order));
            let word = _mm256_aesenclast_epi128(last, _mm256_set1_epi32(i32::from(rcon)));
            let base = _mm256_xor_si256(base.0, _mm256_slli_si256::<4>(base.0));
            let base = _mm256_xor_si256(base, _mm256_slli_si256::<8>(base));
            Self(_mm256_xor_si256(base, word))
        }
    }

    #[inline(always)]
    unsafe fn first_is_zero(self) -> bool {
        unsafe {
            let first = _mm256_castsi256_si128(self.0);
            _mm_testz_si128(first, first) != 0
        }
    }
}
