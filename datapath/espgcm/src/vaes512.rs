//! Four blocks a vector: VAES and VPCLMULQDQ on the 512-bit registers of AVX-512 (Intel Ice Lake, AMD Zen 4).

#![expect(clippy::undocumented_unsafe_blocks, reason = "each is one instruction: said once, above the impl")]
#![allow(clippy::wildcard_imports, reason = "every name is Intel's and begins with _mm")]

use core::arch::x86_64::*;

use crate::lanes::{Lanes, halves};

/// Four blocks.
#[derive(Clone, Copy)]
pub(crate) struct Quad(__m512i);

/// Selects the first `bytes` bytes.
#[inline(always)]
fn bytes_mask(bytes: usize) -> __mmask64 {
    // At most 64, which is no shift.
    if bytes >= 64 { !0 } else { !(!0 << bytes) }
}

// JUSTIFICATION: the instructions of the kernel are to be had in no other way.
// SAFETY: each method reads or writes what the trait says: 64 bytes, the blocks asked for, 16, or 8 (words that a mask
// leaves out are not touched); that the processor has the instructions is the caller's to see to.
unsafe impl Lanes for Quad {
    const BLOCKS: usize = 4;
    const MANY: bool = true;
    const EXACT: bool = true;

    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm512_setzero_si512()) }
    }

    #[inline(always)]
    unsafe fn splat(block: u128) -> Self {
        unsafe { Self(_mm512_broadcast_i32x4(halves(block))) }
    }

    #[inline(always)]
    unsafe fn block(block: u128) -> Self {
        unsafe { Self(_mm512_zextsi128_si512(halves(block))) }
    }

    #[inline(always)]
    unsafe fn place(block: u128, lane: usize) -> Self {
        // Behind the last lane nothing is left of it.
        let [words, ..] = (0x03_u32 << (2 * lane)).to_le_bytes();
        unsafe { Self(_mm512_maskz_mov_epi64(words, Self::splat(block).0)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        unsafe { Self(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn load_block(from: *const u8) -> Self {
        unsafe { Self(_mm512_zextsi128_si512(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store_block(self, to: *mut u8) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_castsi512_si128(self.0)) }
    }

    #[inline(always)]
    unsafe fn load_part(from: *const u8, bytes: usize) -> Self {
        unsafe { Self(_mm512_maskz_loadu_epi8(bytes_mask(bytes), from.cast())) }
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut u8, bytes: usize) {
        unsafe { _mm512_mask_storeu_epi8(to.cast(), bytes_mask(bytes), self.0) }
    }

    #[inline(always)]
    unsafe fn keep(self, bytes: usize) -> Self {
        unsafe { Self(_mm512_maskz_mov_epi8(bytes_mask(bytes), self.0)) }
    }

    #[inline(always)]
    unsafe fn without_first(self) -> Self {
        unsafe { Self(_mm512_maskz_mov_epi64(0xfc, self.0)) }
    }

    #[inline(always)]
    unsafe fn gather(from: [*const u8; 4]) -> Self {
        unsafe {
            let [a, b, c, d] = from.map(|from| _mm_loadu_si128(from.cast()));
            let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
            let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(c), d);
            Self(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high))
        }
    }

    #[inline(always)]
    unsafe fn scatter(self, to: [*mut u8; 4]) {
        unsafe {
            _mm_storeu_si128(to[0].cast(), _mm512_castsi512_si128(self.0));
            _mm_storeu_si128(to[1].cast(), _mm512_extracti32x4_epi32::<1>(self.0));
            _mm_storeu_si128(to[2].cast(), _mm512_extracti32x4_epi32::<2>(self.0));
            _mm_storeu_si128(to[3].cast(), _mm512_extracti32x4_epi32::<3>(self.0));
        }
    }

    #[inline(always)]
    unsafe fn broadcast(from: *const u8) -> Self {
        unsafe { Self(_mm512_broadcast_i32x4(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn broadcast_half(from: *const u8) -> Self {
        unsafe { Self(_mm512_set1_epi64(from.cast::<i64>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        unsafe { Self(_mm512_xor_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Self(_mm512_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn aesenc(self, key: Self) -> Self {
        unsafe { Self(_mm512_aesenc_epi128(self.0, key.0)) }
    }

    #[inline(always)]
    unsafe fn aesenclast(self, key: Self) -> Self {
        unsafe { Self(_mm512_aesenclast_epi128(self.0, key.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_low(self, other: Self) -> Self {
        unsafe { Self(_mm512_clmulepi64_epi128::<0x00>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_high(self, other: Self) -> Self {
        unsafe { Self(_mm512_clmulepi64_epi128::<0x11>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_low_high(self, other: Self) -> Self {
        unsafe { Self(_mm512_clmulepi64_epi128::<0x10>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn clmul_high_low(self, other: Self) -> Self {
        unsafe { Self(_mm512_clmulepi64_epi128::<0x01>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn swap_halves(self) -> Self {
        unsafe { Self(_mm512_shuffle_epi32::<0x4e>(self.0)) }
    }

    #[inline(always)]
    unsafe fn low_halves(self, other: Self) -> Self {
        unsafe { Self(_mm512_unpacklo_epi64(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn double(self) -> Self {
        unsafe {
            let carries = _mm512_bslli_epi128::<8>(_mm512_srli_epi64::<63>(self.0));
            let moved = _mm512_or_si512(_mm512_slli_epi64::<1>(self.0), carries);
            let top = _mm512_srai_epi32::<31>(_mm512_shuffle_epi32::<0xff>(self.0));
            let polynomial = _mm_set_epi64x(0xc200_0000_0000_0000_u64.cast_signed(), 1);
            let back = _mm512_and_si512(top, _mm512_broadcast_i32x4(polynomial));
            Self(_mm512_xor_si512(moved, back))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [Self; 4]) -> [Self; 4] {
        unsafe {
            let [a, b, c, d] = rows;
            // Lanes 0 and 1 of two rows, and lanes 2 and 3.
            let [ab, cd] = [(a, b), (c, d)].map(|(a, b)| {
                (_mm512_shuffle_i64x2::<0x44>(a.0, b.0), _mm512_shuffle_i64x2::<0xee>(a.0, b.0))
            });
            [
                Self(_mm512_shuffle_i64x2::<0x88>(ab.0, cd.0)),
                Self(_mm512_shuffle_i64x2::<0xdd>(ab.0, cd.0)),
                Self(_mm512_shuffle_i64x2::<0x88>(ab.1, cd.1)),
                Self(_mm512_shuffle_i64x2::<0xdd>(ab.1, cd.1)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn swap_bytes(self) -> Self {
        unsafe {
            let order = _mm_set_epi64x(0x0001_0203_0405_0607, 0x0809_0a0b_0c0d_0e0f);
            Self(_mm512_shuffle_epi8(self.0, _mm512_broadcast_i32x4(order)))
        }
    }

    #[inline(always)]
    unsafe fn fold(self) -> Self {
        unsafe {
            let half =
                _mm256_xor_si256(_mm512_castsi512_si256(self.0), _mm512_extracti64x4_epi64::<1>(self.0));
            let sum = _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
            Self(_mm512_castsi128_si512(sum))
        }
    }

    #[inline(always)]
    unsafe fn next_round_key<const ROTATE: bool>(base: Self, last: Self, rcon: u8) -> Self {
        unsafe {
            // The last word in every column, which makes ShiftRows no change.
            let order = if ROTATE { 0x0c0f_0e0d } else { 0x0f0e_0d0c };
            let last = _mm512_shuffle_epi8(last.0, _mm512_set1_epi32(order));
            let word = _mm512_aesenclast_epi128(last, _mm512_set1_epi32(i32::from(rcon)));
            let base = _mm512_xor_si512(base.0, _mm512_bslli_epi128::<4>(base.0));
            let base = _mm512_xor_si512(base, _mm512_bslli_epi128::<8>(base));
            Self(_mm512_xor_si512(base, word))
        }
    }

    #[inline(always)]
    unsafe fn first_is_zero(self) -> bool {
        unsafe {
            let first = _mm512_castsi512_si128(self.0);
            _mm_testz_si128(first, first) != 0
        }
    }
}
