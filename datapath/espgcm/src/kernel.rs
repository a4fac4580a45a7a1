//! AES-GCM over one ESP packet, encryption and hash in one pass.
//!
//! Positions are the blocks in the order in which the counter and the hash take them:
//!
//! ```text
//! position     0            1 … n           n + 1
//! counter      1 (tag)      2 … n + 1       -
//! hash         AAD          ciphertext      lengths
//! in memory    ESP header   text
//! ```
//!
//! So position 0 lies in memory right before position 1, with the 16 bytes of SPI, sequence number and IV; a vector
//! holds as many positions as it has blocks, and the vectors of key stream, memory and hash are the same ones. Lane 0 of
//! the first vector needs a hand: its key stream is kept for the tag and its memory stays as it is; that the AAD is hashed
//! in place of the header is seen to by the hash to begin with, which has the sum of the two.
//!
//! All vectors but about the last [`CHUNK`] go through [`bulk`] in whole chunks, with the hash of a chunk between the
//! rounds of the cipher; the rest, where there may be a part of a block and the lengths, through [`last`]. In `bulk` each
//! lane keeps a hash of its own: with L lanes, lane l has the sum of the blocks l, l + L, l + 2L …, times H^L for each
//! step, which `last` brings together by multiplying lane l with H^(m - l), m being the number of positions left.

use crate::key::{BLOCK, CHUNK, Layout, Sum};
use crate::lanes::{Lanes, ask_for};

/// One packet.
pub(crate) struct Job {
    /// The expanded key.
    pub(crate) key: *const u8,
    /// Its number of rounds: 10, 12 or 14.
    pub(crate) rounds: u8,
    /// The ESP header, text, and tag.
    pub(crate) packet: *mut u8,
    /// Bytes of text between 16 bytes of header and 16 of tag.
    pub(crate) text: usize,
    /// Nonce and the counter 1, the first byte lowest.
    pub(crate) counter: u128,
    /// What makes the AAD's block of the packet's first 16 bytes: their sum.
    pub(crate) mixed: u128,
    /// Lengths of AAD and text in bits.
    pub(crate) lengths: u128,
    /// Where the packet behind this one begins, whose memory is asked for meanwhile: it may be in another processor's cache.
    /// Any address will do.
    pub(crate) behind: *const u8,
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// What is added to the counter for each lane. The counter's last byte is the highest one of a little-endian word.
static LANES: [[u32; 4]; 4] = [[0, 0, 0, 0], [0, 0, 0, 1 << 24], [0, 0, 0, 2 << 24], [0, 0, 0, 3 << 24]];

/// The counter blocks.
///
/// They are kept as they go into the cipher and counted in their last byte; where that would overflow, once in 256
/// blocks, they are made anew.
pub(crate) struct Counter<V> {
    /// Of the next vector.
    next: V,
    /// From vector to vector.
    step: V,
    /// The counter of lane 0 of `next`.
    number: u32,
    /// With counter 1.
    first: u128,
}

impl<V: Lanes> Counter<V> {
    #[inline(always)]
    pub(crate) unsafe fn new(first: u128) -> Self {
        let step: [u32; 4] = if V::BLOCKS == 2 { [0, 0, 0, 2 << 24] } else { [0, 0, 0, 4 << 24] };
        // SAFETY: the caller's; LANES has four blocks, no vector more.
        unsafe {
            let next = V::splat(first).add(V::load((&raw const LANES).cast()));
            Self { next, step: V::broadcast((&raw const step).cast()), number: 1, first }
        }
    }

    /// The blocks of the next `C` vectors.
    #[inline(always)]
    pub(crate) unsafe fn take<const C: usize>(&mut self) -> [V; C] {
        // SAFETY: the caller's.
        unsafe {
            let mut blocks = [V::zero(); C];
            if usize::from(self.number.to_le_bytes()[0]) + C * V::BLOCKS > 256 {
                for block in &mut blocks {
                    *block = Self::vector(self.first, self.number);
                    self.number += if V::BLOCKS == 2 { 2 } else { 4 };
                }
                self.next = Self::vector(self.first, self.number);
            } else {
                for block in &mut blocks {
                    *block = self.next;
                    self.next = self.next.add(self.step);
                    self.number += if V::BLOCKS == 2 { 2 } else { 4 };
                }
            }
            blocks
        }
    }

    /// The vector that begins with `number`.
    ///
    /// Without `self`, whose address would keep all of it in memory.
    #[cold]
    unsafe fn vector(first: u128, number: u32) -> V {
        let mut lanes = [first.to_le_bytes(); 4];
        for (lane, number) in lanes.iter_mut().zip(number..) {
            if let Some(last) = lane.last_chunk_mut() {
                *last = number.to_be_bytes();
            }
        }
        // SAFETY: the caller's; four blocks, no vector more.
        unsafe { V::load((&raw const lanes).cast()) }
    }
}

/// The key, with its layout.
struct Reader<V> {
    key: *const u8,
    /// The first round key.
    rounds: *const u8,
    /// 10, 12 or 14.
    number: u8,
    /// What [`Self::round`] gives, if the registers are `MANY`.
    kept: [V; 11],
    /// What [`Self::stride`] gives, if the registers are `MANY`.
    strides: [(V, V); CHUNK],
}

impl<V: Lanes> Reader<V> {
    #[inline(always)]
    unsafe fn new(job: &Job) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let mut reader = Self {
                key: job.key,
                rounds: job.key.add(Layout::<V>::round(job.rounds.into(), 0)),
                number: job.rounds,
                kept: [V::zero(); 11],
                strides: [(V::zero(), V::zero()); CHUNK],
            };
            if V::MANY {
                for round in 0..reader.kept.len() {
                    let loaded = reader.load_round(round);
                    if let Some(place) = reader.kept.get_mut(round) {
                        *place = loaded;
                    }
                }
            }
            reader
        }
    }

    /// Loads what whole chunks need.
    #[inline(always)]
    unsafe fn prepare_chunks(&mut self) {
        if V::MANY {
            for at in 0..CHUNK {
                // SAFETY: the caller's.
                let stride = unsafe { self.load_stride(at) };
                if let Some(place) = self.strides.get_mut(at) {
                    *place = stride;
                }
            }
        }
    }

    /// A round key in every lane: 0 is the first one, 1 to 10 are the ten last. The others are [`Self::early`].
    #[inline(always)]
    unsafe fn round(&self, round: usize) -> V {
        match self.kept.get(round) {
            Some(kept) if V::MANY => *kept,
            // SAFETY: the caller's.
            _ => unsafe { self.load_round(round) },
        }
    }

    #[inline(always)]
    unsafe fn load_round(&self, round: usize) -> V {
        // SAFETY: the caller's; both within the key.
        unsafe {
            let at = if round == 0 {
                self.rounds
            } else {
                self.key.add(Layout::<V>::ROUNDS_END - BLOCK * (11 - round))
            };
            V::broadcast(at)
        }
    }

    /// The key of a round that shorter keys have not, from 1 on.
    #[inline(always)]
    unsafe fn early(&self, round: u8) -> V {
        // SAFETY: the caller's; `round` is below `number`, so within the key.
        unsafe { V::broadcast(self.rounds.add(BLOCK * usize::from(round))) }
    }

    /// The power by which vector `at` of a chunk is multiplied, in every lane, and the sum of its halves. The chunk is
    /// prepared for.
    #[inline(always)]
    unsafe fn stride(&self, at: usize) -> (V, V) {
        match self.strides.get(at) {
            Some(stride) if V::MANY => *stride,
            // SAFETY: the caller's.
            _ => unsafe { self.load_stride(at) },
        }
    }

    #[inline(always)]
    unsafe fn load_stride(&self, at: usize) -> (V, V) {
        // SAFETY: the caller's; `at` is below CHUNK.
        unsafe {
            let power = V::broadcast(self.key.add(Layout::<V>::power(V::BLOCKS * (CHUNK - at))));
            (power, V::broadcast_half(self.key.add(Layout::<V>::HALVES_AT + 8 * at)))
        }
    }

    /// H^n, H^(n-1) and so on.
    #[inline(always)]
    unsafe fn powers(&self, n: usize) -> V {
        // SAFETY: the caller's; `n` is from 1 to POWERS, and behind H^1 there is room for the vector's rest.
        unsafe { V::load(self.key.add(Layout::<V>::power(n))) }
    }
}

/// What goes from chunk to chunk.
struct State<V> {
    counter: Counter<V>,
    /// The next vector in memory.
    at: *mut u8,
    /// The same place in the packet behind.
    behind: *const u8,
    /// The hash, by lane. At first it has in lane 0 what makes the AAD's block of the header's bytes.
    hash: V,
    /// Lane 0: the cipher of counter 1, for the tag.
    tag: V,
    /// What the last whole chunk was sealed to, if the registers are `MANY`: to load what was stored a moment ago costs
    /// more where it crosses cache lines.
    sealed: [V; CHUNK],
}

impl<V: Lanes> State<V> {
    #[inline(always)]
    unsafe fn new(job: &Job) -> Self {
        // SAFETY: the caller's.
        unsafe {
            Self {
                counter: Counter::new(job.counter),
                at: job.packet,
                behind: job.behind,
                hash: V::block(job.mixed).swap_bytes(),
                tag: V::zero(),
                sealed: [V::zero(); CHUNK],
            }
        }
    }

    /// Asks for the next so many bytes of the packet behind.
    #[inline(always)]
    fn ask_behind(&mut self, bytes: usize) {
        for offset in (0..bytes).step_by(LINE) {
            ask_for(self.behind.wrapping_add(offset));
        }
        self.behind = self.behind.wrapping_add(bytes);
    }

    /// Keeps lane 0 of the first vector's key stream, and makes of the rest what is added to memory.
    #[inline(always)]
    unsafe fn keep_tag(&mut self, stream: &mut V) {
        self.tag = *stream;
        // SAFETY: the caller's.
        *stream = unsafe { stream.without_first() };
    }
}

/// The hash of a whole chunk, in steps between the rounds of the cipher.
struct Hasher<V> {
    from: *const u8,
    /// What is at `from`, if it is at hand.
    sealed: Option<[V; CHUNK]>,
    hash: V,
    sum: Option<Sum<V>>,
}

impl<V: Lanes> Between<V> for Hasher<V> {
    /// Vector by vector in the odd rounds, then the reduction.
    #[inline(always)]
    unsafe fn step(&mut self, key: &Reader<V>, round: usize) {
        // SAFETY: the caller's: a whole chunk is at `from`.
        unsafe {
            let at = round / HASH_EVERY;
            if round % HASH_EVERY == 1 % HASH_EVERY && at < CHUNK {
                let block = match self.sealed {
                    Some(sealed) => sealed.get(at).copied(),
                    None => None,
                };
                let block = match block {
                    Some(block) => block,
                    None => V::load(self.from.add(BLOCK * V::BLOCKS * at)),
                };
                let mut block = block.swap_bytes();
                if at == 0 {
                    block = block.xor(self.hash);
                }
                let (power, halves) = key.stride(at);
                let product = Sum::unsettled(block, power, halves);
                let sum = match self.sum {
                    Some(sum) => sum.plus(product),
                    None => product,
                };
                self.sum = Some(sum);
            } else if round == CHUNK * HASH_EVERY
                && let Some(sum) = self.sum
            {
                self.hash = sum.settle().reduce();
            }
        }
    }
}

/// Rounds from one vector of the hash to the next.
const HASH_EVERY: usize = if CHUNK <= 4 { 2 } else { 1 };

/// Work between the rounds of the cipher. No closure: one that is not inlined would not have the instructions of its caller,
/// and nothing can make sure that one is.
trait Between<V> {
    /// In round 1 to 9, before the last one.
    unsafe fn step(&mut self, key: &Reader<V>, round: usize);
}

/// Nothing to do.
struct Nothing;

impl<V: Lanes> Between<V> for Nothing {
    #[inline(always)]
    unsafe fn step(&mut self, _: &Reader<V>, _: usize) {}
}

/// The key stream of the next `C` vectors, with other work between the rounds. What longer keys have more comes first: behind a branch the compiler would move all that work.
#[inline(always)]
unsafe fn stream<V: Lanes, const C: usize>(
    key: &Reader<V>,
    counter: &mut Counter<V>,
    between: &mut impl Between<V>,
) -> [V; C] {
    // SAFETY: the caller's.
    unsafe {
        let mut states: [V; C] = counter.take();
        let round_key = key.round(0);
        for state in &mut states {
            *state = state.xor(round_key);
        }
        for longer in [12, 14] {
            if key.number >= longer {
                for round in [longer - 11, longer - 10] {
                    let round_key = key.early(round);
                    for state in &mut states {
                        *state = state.aesenc(round_key);
                    }
                }
            }
        }
        for round in 1..10 {
            let round_key = key.round(round);
            for state in &mut states {
                *state = state.aesenc(round_key);
            }
            between.step(key, round);
        }
        let round_key = key.round(10);
        for state in &mut states {
            *state = state.aesenclast(round_key);
        }
        states
    }
}

/// Seals or opens one whole chunk. When sealing, the chunk before is hashed meanwhile, if there is one.
#[inline(always)]
unsafe fn bulk<V: Lanes, const SEAL: bool, const FIRST: bool>(key: &Reader<V>, state: &mut State<V>) {
    let width = BLOCK * V::BLOCKS;
    // SAFETY: the caller's: a whole chunk of the packet is left at `state.at`.
    unsafe {
        let at = state.at;
        state.ask_behind(width * CHUNK);
        let mut hasher = hasher::<V, SEAL>(state);
        let mut streams: [V; CHUNK] = if SEAL && FIRST {
            stream(key, &mut state.counter, &mut Nothing)
        } else {
            stream(key, &mut state.counter, &mut hasher)
        };
        state.hash = hasher.hash;
        if FIRST && let Some(stream) = streams.first_mut() {
            state.keep_tag(stream);
        }
        for (index, stream) in streams.into_iter().enumerate() {
            let to = at.add(width * index);
            let out = V::load(to.cast_const()).xor(stream);
            out.store(to);
            if SEAL && let Some(sealed) = state.sealed.get_mut(index) {
                *sealed = out;
            }
        }
        state.at = at.add(width * CHUNK);
    }
}

/// For the chunk at hand, or when sealing for the one before.
#[inline(always)]
unsafe fn hasher<V: Lanes, const SEAL: bool>(state: &State<V>) -> Hasher<V> {
    let back = if SEAL { BLOCK * V::BLOCKS * CHUNK } else { 0 };
    let sealed = if SEAL && V::MANY { Some(state.sealed) } else { None };
    Hasher { from: state.at.wrapping_sub(back).cast_const(), sealed, hash: state.hash, sum: None }
}

/// The hash of the last `C` vectors.
struct Tail<V, const SEAL: bool, const FIRST: bool, const C: usize> {
    texts: [V; C],
    /// Of the chunk before, when sealing.
    hasher: Hasher<V>,
    /// The block of lengths where it stands in the last vector.
    lengths: V,
    /// Bytes of text in the last vector.
    left: usize,
    /// Blocks that are left, with the lengths.
    positions: usize,
    total: Option<Sum<V>>,
}

impl<V: Lanes, const SEAL: bool, const FIRST: bool, const C: usize> Tail<V, SEAL, FIRST, C> {
    /// Hashes vector `index` of ciphertext; if it is the last and not `whole`, what is in it behind the text is not zero.
    #[inline(always)]
    unsafe fn add(&mut self, key: &Reader<V>, index: usize, text: V, whole: bool) {
        // SAFETY: the caller's.
        unsafe {
            let text = if index + 1 == C && !whole { text.keep(self.left) } else { text };
            let mut turned = text.swap_bytes();
            if index == 0 {
                turned = turned.xor(self.hasher.hash);
            }
            if index + 1 == C {
                turned = turned.xor(self.lengths);
            }
            self.add_product(Sum::of(turned, key.powers(self.positions - V::BLOCKS * index)));
        }
    }

    #[inline(always)]
    unsafe fn add_product(&mut self, product: Sum<V>) {
        self.total = Some(match self.total {
            // SAFETY: the caller's.
            Some(total) => unsafe { total.plus(product) },
            None => product,
        });
    }
}

impl<V: Lanes, const SEAL: bool, const FIRST: bool, const C: usize> Between<V> for Tail<V, SEAL, FIRST, C> {
    /// When sealing the chunk before, if there is one; when opening what is there already.
    #[inline(always)]
    unsafe fn step(&mut self, key: &Reader<V>, round: usize) {
        // SAFETY: the caller's.
        unsafe {
            if SEAL && !FIRST {
                self.hasher.step(key, round);
            }
            if !SEAL && let Some(text) = self.texts.get(round - 1) {
                self.add(key, round - 1, *text, V::EXACT);
            }
        }
    }
}

/// Seals or opens the last `C` vectors with text, and hashes the lengths; `bytes` are left in memory, the ESP header
/// included if it is among them. Gives what [`crypt`] gives.
#[inline(always)]
unsafe fn last<V: Lanes, const SEAL: bool, const FIRST: bool, const C: usize>(
    key: &Reader<V>,
    state: &mut State<V>,
    job: &Job,
    bytes: usize,
) -> V {
    let width = BLOCK * V::BLOCKS;
    // Bytes and blocks of text in the last vector: at least one, at most all.
    let left = bytes.saturating_sub(width * (C - 1)).min(width);
    let blocks = left.div_ceil(BLOCK);
    let positions = V::BLOCKS * (C - 1) + blocks + 1;
    // SAFETY: the caller's. All vectors but the last are whole. Of the last, `blocks` blocks are text but for at most 15
    // bytes, which are the tag's.
    unsafe {
        let at = state.at;
        if !FIRST {
            state.ask_behind(width * C);
        }
        let mut texts = [V::zero(); C];
        for (index, text) in texts.iter_mut().enumerate() {
            let from = at.add(width * index).cast_const();
            *text = if index + 1 < C { V::load(from) } else { V::load_part(from, left) };
        }
        // The tag has to outlive a store that ends in it.
        let end = at.add(bytes);
        let tag = V::load_block(end.cast_const());

        // Behind the text, if there is a lane for it.
        let lengths = V::place(job.lengths, blocks);
        let hasher = hasher::<V, SEAL>(state);
        let mut tail = Tail::<V, SEAL, FIRST, C> { texts, hasher, lengths, left, positions, total: None };
        let mut streams: [V; C] = stream(key, &mut state.counter, &mut tail);
        if FIRST && let Some(stream) = streams.first_mut() {
            state.keep_tag(stream);
        }
        for (index, (stream, text)) in streams.into_iter().zip(texts).enumerate() {
            let to = at.add(width * index);
            let out = text.xor(stream);
            if index + 1 < C {
                out.store(to);
            } else {
                out.store_part(to, left);
            }
            if SEAL {
                tail.add(key, index, out, false);
            }
        }
        if blocks == V::BLOCKS {
            tail.add_product(Sum::of(V::place(job.lengths, 0), key.powers(1)));
        }
        let computed = match tail.total {
            Some(total) => total.reduce().fold().swap_bytes().xor(state.tag),
            None => V::zero(),
        };
        if SEAL {
            computed
        } else {
            if !V::EXACT {
                tag.store_block(end);
            }
            computed.xor(tag)
        }
    }
}

/// Seals or opens one packet. When sealing, lane 0 of the answer is the tag, which is not written yet; when opening,
/// lane 0 is zero if and only if the tag is right.
///
/// # Safety
/// The processor has the instructions of `V`. `job.key` is a key expanded for `V` with `job.rounds` rounds; `job.packet`
/// points to `32 + job.text` bytes that nobody else uses.
#[inline(always)]
pub(crate) unsafe fn crypt<V: Lanes, const SEAL: bool>(job: &Job) -> V {
    let width = BLOCK * V::BLOCKS;
    let chunk = width * CHUNK;
    // What may be left to `last`: a chunk, and what is not enough to be left alone.
    let most = chunk + BLOCK * (Layout::<V>::LEFT - 1);
    // Header and text.
    let mut bytes = BLOCK + job.text;
    // SAFETY: the caller's. While there is more than a chunk, a chunk of it is whole.
    unsafe {
        let mut key = Reader::<V>::new(job);
        let mut state = State::<V>::new(job);
        if bytes <= most {
            return match bytes.div_ceil(width) {
                1 => last::<V, SEAL, true, 1>(&key, &mut state, job, bytes),
                2 => last::<V, SEAL, true, 2>(&key, &mut state, job, bytes),
                3 => last::<V, SEAL, true, 3>(&key, &mut state, job, bytes),
                5 if V::BLOCKS > 2 => last::<V, SEAL, true, 5>(&key, &mut state, job, bytes),
                _ => last::<V, SEAL, true, 4>(&key, &mut state, job, bytes),
            };
        }
        key.prepare_chunks();
        bulk::<V, SEAL, true>(&key, &mut state);
        bytes -= chunk;
        while bytes > most {
            bulk::<V, SEAL, false>(&key, &mut state);
            bytes -= chunk;
        }
        match bytes.div_ceil(width) {
            1 => last::<V, SEAL, false, 1>(&key, &mut state, job, bytes),
            2 => last::<V, SEAL, false, 2>(&key, &mut state, job, bytes),
            3 => last::<V, SEAL, false, 3>(&key, &mut state, job, bytes),
            5 if V::BLOCKS > 2 => last::<V, SEAL, false, 5>(&key, &mut state, job, bytes),
            _ => last::<V, SEAL, false, 4>(&key, &mut state, job, bytes),
        }
    }
}

/// The block of the lengths of AAD and text, which GHASH has in bits (NIST SP 800-38D section 7.1).
#[inline(always)]
pub(crate) fn lengths(aad_len: u8, text: usize) -> u128 {
    u128::from(aad_len) << 67 | (text as u128) << 3
}
