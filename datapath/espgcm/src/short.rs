//! AES-GCM over short ESP packets, two at a time.
//!
//! One short packet leaves most of the processor idle: its rounds wait for each other, and then its hash for the last of them.
//! Two go through side by side; and as only packets of the same length are taken together, what depends on the length is
//! worked out once. Positions are those of [`crate::kernel`].

use crate::kernel::{Counter, lengths};
use crate::key::{BLOCK, Layout, Sum};
use crate::lanes::Lanes;

/// Packets that go together.
pub(crate) const TOGETHER: usize = 2;

/// Vectors of header and text that a short packet has at most.
pub(crate) const MOST: usize = 4;

/// What packets that go together have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alike {
    /// Rounds of the keys: 10, 12 or 14.
    pub(crate) rounds: u8,
    /// Bytes of the AAD.
    pub(crate) aad_len: u8,
    /// Bytes of text between 16 bytes of header and 16 of tag.
    pub(crate) text: usize,
}

impl Alike {
    /// Vectors of header and text.
    #[inline(always)]
    pub(crate) fn vectors<V: Lanes>(self) -> usize {
        (BLOCK + self.text).div_ceil(BLOCK * V::BLOCKS)
    }
}

/// One packet.
#[derive(Clone, Copy)]
pub(crate) struct Short<V, const C: usize> {
    key: *const u8,
    packet: *mut u8,
    /// Header and text.
    texts: [V; C],
    /// The counter blocks, which become the key stream.
    streams: [V; C],
    /// The hash to begin with, as in [`crate::kernel`].
    hash: V,
    total: Sum<V>,
}

impl<V: Lanes, const C: usize> Short<V, C> {
    /// None.
    ///
    /// # Safety
    /// The processor has the instructions of `V`.
    #[inline(always)]
    pub(crate) unsafe fn none() -> Self {
        // SAFETY: the caller's.
        unsafe {
            let zero = V::zero();
            Self {
                key: core::ptr::null(),
                packet: core::ptr::null_mut(),
                texts: [zero; C],
                streams: [zero; C],
                hash: zero,
                total: Sum { low: zero, high: zero, middle: zero },
            }
        }
    }

    /// A packet, with the fields of a [`crate::kernel::Job`].
    ///
    /// # Safety
    /// As for `none`.
    #[inline(always)]
    pub(crate) unsafe fn new(key: *const u8, packet: *mut u8, counter: u128, mixed: u128) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let streams = Counter::<V>::new(counter).take();
            Self { key, packet, streams, hash: V::block(mixed).swap_bytes(), ..Self::none() }
        }
    }

    /// One round of the cipher, with the round key at `at` in the key.
    #[inline(always)]
    unsafe fn round(&mut self, at: usize) {
        // SAFETY: the caller's.
        unsafe {
            let round_key = V::broadcast(self.key.add(at));
            for stream in &mut self.streams {
                *stream = stream.aesenc(round_key);
            }
        }
    }

    /// The sum of the products of the ciphertext, of whose last vector `left` bytes are text, and of the lengths where they
    /// stand in that vector; `positions` blocks in all.
    #[inline(always)]
    unsafe fn hash(&mut self, left: usize, positions: usize, lengths: V) {
        // SAFETY: the caller's; powers from `positions` on are within the key.
        unsafe {
            for (index, text) in self.texts.iter().enumerate() {
                let text = if index + 1 == C { text.keep(left) } else { *text };
                let mut turned = text.swap_bytes();
                if index == 0 {
                    turned = turned.xor(self.hash);
                }
                if index + 1 == C {
                    turned = turned.xor(lengths);
                }
                let power = V::load(self.key.add(Layout::<V>::power(positions - V::BLOCKS * index)));
                let product = Sum::of(turned, power);
                self.total = if index == 0 { product } else { self.total.plus(product) };
            }
        }
    }
}

/// Seals or opens packets of `C` vectors; the answers are those of [`crate::kernel::crypt`].
///
/// # Safety
/// The processor has the instructions of `V`, whose loads and stores are `EXACT`. Each key is one expanded for `V` with
/// `alike.rounds` rounds and powers enough for the text; each packet has `32 + alike.text` bytes that nobody else uses, and
/// `alike.vectors()` is `C`.
#[inline(always)]
pub(crate) unsafe fn crypt_together<V: Lanes, const SEAL: bool, const C: usize>(
    alike: Alike,
    all: &mut [Short<V, C>; TOGETHER],
) -> [V; TOGETHER] {
    let Alike { rounds, aad_len, text } = alike;
    let width = BLOCK * V::BLOCKS;
    let left = BLOCK + text - width * (C - 1);
    let blocks = left.div_ceil(BLOCK);
    let positions = V::BLOCKS * (C - 1) + blocks + 1;
    let first = Layout::<V>::round(rounds.into(), 0);
    // SAFETY: the caller's. Header and text end `left` bytes behind the begin of the last vector; the tag is behind them.
    unsafe {
        let lengths_behind = V::place(lengths(aad_len, text), blocks);
        for short in all.iter_mut() {
            for (index, text) in short.texts.iter_mut().enumerate() {
                let from = short.packet.add(width * index).cast_const();
                *text = if index + 1 < C { V::load(from) } else { V::load_part(from, left) };
            }
            if !SEAL {
                short.hash(left, positions, lengths_behind);
            }
        }

        for short in all.iter_mut() {
            let round_key = V::broadcast(short.key.add(first));
            for stream in &mut short.streams {
                *stream = stream.xor(round_key);
            }
        }
        for longer in [12, 14] {
            if rounds >= longer {
                for round in [longer - 11, longer - 10] {
                    for short in all.iter_mut() {
                        short.round(first + BLOCK * usize::from(round));
                    }
                }
            }
        }
        for round in 1..10 {
            for short in all.iter_mut() {
                short.round(Layout::<V>::ROUNDS_END - BLOCK * (11 - round));
            }
        }

        let mut answers = [V::zero(); TOGETHER];
        for (short, answer) in all.iter_mut().zip(&mut answers) {
            let round_key = V::broadcast(short.key.add(Layout::<V>::ROUNDS_END - BLOCK));
            for stream in &mut short.streams {
                *stream = stream.aesenclast(round_key);
            }
            if let Some(stream) = short.streams.first_mut() {
                *answer = *stream;
                *stream = stream.without_first();
            }
            if !SEAL {
                *answer = answer.xor(V::load_block(short.packet.add(BLOCK + text).cast_const()));
            }
            for (index, (text, stream)) in short.texts.iter_mut().zip(short.streams).enumerate() {
                let to = short.packet.add(width * index);
                *text = text.xor(stream);
                if index + 1 < C {
                    text.store(to);
                } else {
                    text.store_part(to, left);
                }
            }
        }

        for (short, answer) in all.iter_mut().zip(&mut answers) {
            if SEAL {
                short.hash(left, positions, lengths_behind);
            }
            if blocks == V::BLOCKS {
                let power = V::load(short.key.add(Layout::<V>::power(1)));
                short.total = short.total.plus(Sum::of(V::place(lengths(aad_len, text), 0), power));
            }
            *answer = short.total.reduce().fold().swap_bytes().xor(*answer);
        }
        answers
    }
}
