//! The vectors on plain integers, of two or four blocks: the kernels on every machine and under Miri, slowly. Tables
//! are looked up with secret indices, so this is for tests and nothing else.

#![expect(clippy::undocumented_unsafe_blocks, reason = "said once, above the impl")]
#![expect(clippy::indexing_slicing, reason = "for tests; all indices are taken modulo the lengths")]

use crate::lanes::Lanes;

/// `N` blocks, each as a little-endian number.
#[derive(Clone, Copy)]
pub(crate) struct Soft<const N: usize>([u128; N]);

/// The AES S-box, computed as FIPS 197 section 5.1.1 defines it.
const SBOX: [u8; 256] = {
    let mut table = [0u8; 256];
    // `power` and `inverse` run through all non-zero elements: the powers of 3 and of its inverse.
    let (mut power, mut inverse) = (1u8, 1u8);
    loop {
        power ^= double(power);
        inverse ^= inverse << 1;
        inverse ^= inverse << 2;
        inverse ^= inverse << 4;
        if inverse & 0x80 != 0 {
            inverse ^= 0x09;
        }
        let b = inverse;
        let rotated = b.rotate_left(1) ^ b.rotate_left(2) ^ b.rotate_left(3) ^ b.rotate_left(4);
        table[power as usize] = b ^ rotated ^ 0x63;
        if power == 1 {
            break;
        }
    }
    table[0] = 0x63;
    table
};

/// Times x in the field of FIPS 197 section 4.2.
const fn double(byte: u8) -> u8 {
    (byte << 1) ^ (if byte & 0x80 == 0 { 0 } else { 0x1b })
}

/// ShiftRows and SubBytes.
fn shifted(state: [u8; 16]) -> [u8; 16] {
    core::array::from_fn(|at| SBOX[usize::from(state[(at + 4 * (at % 4)) % 16])])
}

fn round(state: u128, key: u128, mix: bool) -> u128 {
    let state = shifted(state.to_le_bytes());
    let mixed = core::array::from_fn(|at| {
        let column = at / 4 * 4;
        let row = |ahead: usize| state[column + (at + ahead) % 4];
        if mix { double(row(0)) ^ double(row(1)) ^ row(1) ^ row(2) ^ row(3) } else { row(0) }
    });
    u128::from_le_bytes(mixed) ^ key
}

fn clmul(a: u64, b: u64) -> u128 {
    (0..64).filter(|bit| b >> bit & 1 == 1).fold(0, |sum, bit| sum ^ u128::from(a) << bit)
}

fn low(block: u128) -> u64 {
    u64::try_from(block & u128::from(u64::MAX)).unwrap_or_default()
}

impl<const N: usize> Soft<N> {
    fn each(self, other: Self, f: impl Fn(u128, u128) -> u128) -> Self {
        Self(core::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

// JUSTIFICATION: pointers are what the kernels are to be tested with.
// SAFETY: each method reads or writes what the trait says, block by block.
unsafe impl<const N: usize> Lanes for Soft<N> {
    const BLOCKS: usize = N;
    // One of each kind, so that both ways through the kernel are tested.
    const MANY: bool = N == 4;
    const EXACT: bool = N == 4;

    unsafe fn zero() -> Self {
        Self([0; N])
    }

    unsafe fn splat(block: u128) -> Self {
        Self([block; N])
    }

    unsafe fn block(block: u128) -> Self {
        unsafe { Self::place(block, 0) }
    }

    unsafe fn place(block: u128, lane: usize) -> Self {
        Self(core::array::from_fn(|at| if at == lane { block } else { 0 }))
    }

    unsafe fn load(from: *const u8) -> Self {
        unsafe { Self::load_part(from, 16 * N) }
    }

    unsafe fn store(self, to: *mut u8) {
        unsafe { self.store_part(to, 16 * N) }
    }

    unsafe fn load_block(from: *const u8) -> Self {
        unsafe { Self::load_part(from, 16) }
    }

    unsafe fn store_block(self, to: *mut u8) {
        unsafe { self.store_part(to, 16) }
    }

    unsafe fn load_part(from: *const u8, bytes: usize) -> Self {
        let bytes = if Self::EXACT { bytes } else { bytes.next_multiple_of(16) };
        let mut lanes = [[0u8; 16]; N];
        unsafe { core::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr().cast(), bytes) };
        Self(lanes.map(u128::from_le_bytes))
    }

    unsafe fn store_part(self, to: *mut u8, bytes: usize) {
        let bytes = if Self::EXACT { bytes } else { bytes.next_multiple_of(16) };
        let lanes = self.0.map(u128::to_le_bytes);
        unsafe { core::ptr::copy_nonoverlapping(lanes.as_ptr().cast(), to, bytes) };
    }

    unsafe fn keep(self, bytes: usize) -> Self {
        let mut lanes = self.0.map(u128::to_le_bytes);
        lanes.as_flattened_mut()[bytes..].fill(0);
        Self(lanes.map(u128::from_le_bytes))
    }

    unsafe fn without_first(self) -> Self {
        Self(core::array::from_fn(|lane| if lane == 0 { 0 } else { self.0[lane] }))
    }

    unsafe fn gather(from: [*const u8; 4]) -> Self {
        Self(core::array::from_fn(|lane| unsafe {
            u128::from_le(from[lane].cast::<u128>().read_unaligned())
        }))
    }

    unsafe fn scatter(self, to: [*mut u8; 4]) {
        for (lane, to) in self.0.into_iter().zip(to) {
            unsafe { to.cast::<u128>().write_unaligned(lane.to_le()) };
        }
    }

    unsafe fn broadcast(from: *const u8) -> Self {
        unsafe { Self([u128::from_le(from.cast::<u128>().read_unaligned()); N]) }
    }

    unsafe fn broadcast_half(from: *const u8) -> Self {
        unsafe { Self([u128::from(u64::from_le(from.cast::<u64>().read_unaligned())); N]) }
    }

    unsafe fn xor(self, other: Self) -> Self {
        self.each(other, |a, b| a ^ b)
    }

    unsafe fn add(self, other: Self) -> Self {
        let word = |block: u128, at: u32| (block >> (32 * at)) & 0xffff_ffff;
        self.each(other, |a, b| {
            (0..4).fold(0, |sum, at| sum | ((word(a, at) + word(b, at)) & 0xffff_ffff) << (32 * at))
        })
    }

    unsafe fn aesenc(self, key: Self) -> Self {
        self.each(key, |state, key| round(state, key, true))
    }

    unsafe fn aesenclast(self, key: Self) -> Self {
        self.each(key, |state, key| round(state, key, false))
    }

    unsafe fn clmul_low(self, other: Self) -> Self {
        self.each(other, |a, b| clmul(low(a), low(b)))
    }

    unsafe fn clmul_high(self, other: Self) -> Self {
        self.each(other, |a, b| clmul(low(a >> 64), low(b >> 64)))
    }

    unsafe fn clmul_low_high(self, other: Self) -> Self {
        self.each(other, |a, b| clmul(low(a), low(b >> 64)))
    }

    unsafe fn clmul_high_low(self, other: Self) -> Self {
        self.each(other, |a, b| clmul(low(a >> 64), low(b)))
    }

    unsafe fn swap_halves(self) -> Self {
        self.each(self, |a, _| a.rotate_left(64))
    }

    unsafe fn low_halves(self, other: Self) -> Self {
        self.each(other, |a, b| u128::from(low(a)) | u128::from(low(b)) << 64)
    }

    unsafe fn double(self) -> Self {
        self.each(self, |a, _| {
            a << 1 ^ if a >> 127 == 1 { 0xc200_0000_0000_0000_0000_0000_0000_0001 } else { 0 }
        })
    }

    unsafe fn transpose(rows: [Self; 4]) -> [Self; 4] {
        core::array::from_fn(|row| Self(core::array::from_fn(|lane| rows[lane].0[row % N])))
    }

    unsafe fn swap_bytes(self) -> Self {
        self.each(self, |a, _| a.swap_bytes())
    }

    unsafe fn fold(self) -> Self {
        Self([self.0.into_iter().fold(0, |sum, lane| sum ^ lane); N])
    }

    unsafe fn next_round_key<const ROTATE: bool>(base: Self, last: Self, rcon: u8) -> Self {
        base.each(last, |base, last| {
            let bytes = last.to_le_bytes();
            let turn = usize::from(ROTATE);
            let word: [u8; 4] = core::array::from_fn(|at| SBOX[usize::from(bytes[12 + (at + turn) % 4])]);
            let word = u128::from(u32::from_le_bytes(word) ^ u32::from(rcon));
            let base = base ^ base << 32;
            let base = base ^ base << 64;
            base ^ word ^ word << 32 ^ word << 64 ^ word << 96
        })
    }

    unsafe fn first_is_zero(self) -> bool {
        self.0[0] == 0
    }
}
