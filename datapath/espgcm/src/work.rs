//! A batch of packets: which of them the kernels take, and what becomes of each.

use crate::kernel::{Job, crypt, lengths};
use crate::key::Key;
use crate::lanes::Lanes;
use crate::short::{Alike, MOST, Short, TOGETHER, crypt_together};
use crate::{Aad, EspPacket, HEADER, LONGEST, Packet, TAG, Verdict};

/// What the kernels need to know of a packet.
pub(crate) trait Input {
    /// Its key, which may be one of `keys`.
    fn key<'k>(&'k self, keys: &'k [Key]) -> Option<&'k Key>;

    /// What its nonce and AAD are, if it has a header.
    fn head(&self) -> Option<Head>;

    /// Bytes of its AAD.
    fn aad_len(&self) -> u8;

    fn bytes(&mut self) -> &mut [u8];

    fn verdict(&mut self) -> &mut Verdict;
}

/// Nonce and AAD, with first bytes lowest.
pub(crate) struct Head {
    /// The nonce, without a counter.
    nonce: u128,
    /// The AAD's block, with the header's added to it.
    mixed: u128,
    /// Bytes of the AAD.
    aad_len: u8,
}

/// The header in two words, the first byte lowest.
#[inline(always)]
fn words(bytes: &[u8]) -> Option<[u64; 2]> {
    let ([first, second, ..], _) = bytes.first_chunk::<HEADER>()?.as_chunks::<8>() else { return None };
    Some([u64::from_le_bytes(*first), u64::from_le_bytes(*second)])
}

const fn block(low: u64, high: u64) -> u128 {
    low as u128 | (high as u128) << 64
}

impl Input for EspPacket<'_> {
    #[inline(always)]
    fn key<'k>(&'k self, keys: &'k [Key]) -> Option<&'k Key> {
        keys.get(self.key)
    }

    #[inline(always)]
    fn head(&self) -> Option<Head> {
        let [spi_and_number, iv] = words(self.bytes)?;
        let salt = u32::from_le_bytes(self.salt);
        let nonce = block(u64::from(salt) | iv << 32, iv >> 32);
        let (mixed, aad_len) = match self.high {
            // SPI and number stand where they are in the AAD.
            None => (block(0, iv), 8),
            Some(high) => {
                let (high, number) = (u64::from(high.swap_bytes()), spi_and_number >> 32);
                (block((high ^ number) << 32, iv ^ number), 12)
            }
        };
        Some(Head { nonce, mixed, aad_len })
    }

    #[inline(always)]
    fn aad_len(&self) -> u8 {
        if self.high.is_some() { 12 } else { 8 }
    }

    #[inline(always)]
    fn bytes(&mut self) -> &mut [u8] {
        self.bytes
    }

    #[inline(always)]
    fn verdict(&mut self) -> &mut Verdict {
        &mut self.verdict
    }
}

impl Input for Packet<'_> {
    #[inline(always)]
    fn key<'k>(&'k self, _: &'k [Key]) -> Option<&'k Key> {
        Some(self.key)
    }

    #[inline(always)]
    fn head(&self) -> Option<Head> {
        let [first, second] = words(self.bytes)?;
        let [n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11] = self.nonce;
        let nonce = block(
            u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]),
            u64::from(u32::from_le_bytes([n8, n9, n10, n11])),
        );
        let Aad { block: aad, len: aad_len } = self.aad;
        Some(Head { nonce, mixed: u128::from_le_bytes(aad) ^ block(first, second), aad_len })
    }

    #[inline(always)]
    fn aad_len(&self) -> u8 {
        self.aad.len
    }

    #[inline(always)]
    fn bytes(&mut self) -> &mut [u8] {
        self.bytes
    }

    #[inline(always)]
    fn verdict(&mut self) -> &mut Verdict {
        &mut self.verdict
    }
}

/// The job of a packet, if its length can be one and its key is one.
#[inline(always)]
fn job<V: Lanes, P: Input>(keys: &[Key], packet: &mut P, behind: *const u8) -> Option<Job> {
    let Head { nonce, mixed, aad_len } = packet.head()?;
    let len = packet.bytes().len();
    let text = len.checked_sub(HEADER + TAG).filter(|_| len <= LONGEST)?;
    let key = packet.key(keys)?;
    let rounds = key.rounds::<V>();
    if !matches!(rounds, 10 | 12 | 14) || !key.is_enough::<V>(text) {
        return None;
    }
    Some(Job {
        key: key.as_ptr(),
        rounds,
        text,
        counter: counter(nonce),
        mixed,
        lengths: lengths(aad_len, text),
        packet: packet.bytes().as_mut_ptr(),
        behind,
    })
}

/// Seals or opens every pending packet.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn work<V: Lanes, P: Input, const SEAL: bool>(keys: &[Key], packets: &mut [P]) {
    let mut at = 0;
    while let Some(left) = packets.get_mut(at..).filter(|left| !left.is_empty()) {
        if let Some(group) = left.first_chunk_mut::<TOGETHER>()
            && let Some((alike, keys)) = alike::<V, P>(keys, group)
        {
            at += TOGETHER;
            // SAFETY: the instructions are there; the rest `alike` saw to.
            unsafe {
                match alike.vectors::<V>() {
                    1 => together::<V, P, SEAL, 1>(alike, keys, group),
                    2 => together::<V, P, SEAL, 2>(alike, keys, group),
                    3 => together::<V, P, SEAL, 3>(alike, keys, group),
                    _ => together::<V, P, SEAL, MOST>(alike, keys, group),
                }
            }
            continue;
        }
        at += 1;
        let Some((packet, rest)) = left.split_first_mut() else { break };
        let behind = match rest.first_mut() {
            Some(next) => next.bytes().as_ptr(),
            // What is at hand costs nothing to ask for.
            None => packet.bytes().as_ptr(),
        };
        if *packet.verdict() != Verdict::Pending {
            continue;
        }
        *packet.verdict() = Verdict::Refused;
        let Some(job) = job::<V, P>(keys, packet, behind) else { continue };
        // JUSTIFICATION: the kernel works on pointers.
        // SAFETY: the instructions are there. `job` has the length of the slice, which is borrowed for as long as this
        // takes; the key knows its rounds; the tag's 16 bytes stand behind header and text.
        unsafe {
            let answer: V = crypt::<V, SEAL>(&job);
            settle::<V, P, SEAL>(packet, answer);
        }
    }
}

/// Writes the tag, or judges by it.
///
/// # Safety
/// The processor has the instructions of `V`; the packet has a tag, and `answer` is what the kernel gave for it.
#[inline(always)]
unsafe fn settle<V: Lanes, P: Input, const SEAL: bool>(packet: &mut P, answer: V) {
    let bytes = packet.bytes();
    // SAFETY: the caller's.
    let right = unsafe {
        if SEAL {
            answer.store_block(bytes.as_mut_ptr().add(bytes.len() - TAG));
        }
        SEAL || answer.first_is_zero()
    };
    *packet.verdict() = if right { Verdict::Done } else { wipe_text(packet.bytes()) };
}

/// What packets have in common, if they can be worked on together, and their keys.
#[inline(always)]
fn alike<V: Lanes, P: Input>(
    keys: &[Key],
    group: &mut [P; TOGETHER],
) -> Option<(Alike, [*const u8; TOGETHER])> {
    let [first, ..] = group;
    let alike = Alike {
        rounds: first.key(keys)?.rounds::<V>(),
        aad_len: first.aad_len(),
        text: first.bytes().len().checked_sub(HEADER + TAG)?,
    };
    // Where there are few registers they would wait for memory instead of each other.
    if !V::MANY || alike.vectors::<V>() > MOST || !matches!(alike.rounds, 10 | 12 | 14) {
        return None;
    }
    let mut places = [core::ptr::null(); TOGETHER];
    for (packet, place) in group.iter_mut().zip(&mut places) {
        let text = packet.bytes().len().checked_sub(HEADER + TAG)?;
        if *packet.verdict() != Verdict::Pending || text != alike.text || packet.aad_len() != alike.aad_len {
            return None;
        }
        let key = packet.key(keys).filter(|key| key.is_enough::<V>(text))?;
        if key.rounds::<V>() != alike.rounds {
            return None;
        }
        *place = key.as_ptr();
    }
    Some((alike, places))
}

/// Seals or opens packets of `C` vectors.
///
/// # Safety
/// The processor has the instructions of `V`; `alike` and `keys` are what [`alike`] gave for the group.
#[inline(always)]
unsafe fn together<V: Lanes, P: Input, const SEAL: bool, const C: usize>(
    alike: Alike,
    keys: [*const u8; TOGETHER],
    group: &mut [P; TOGETHER],
) {
    // SAFETY: the caller's. The packets are borrowed for as long as this takes.
    unsafe {
        let mut all = [Short::<V, C>::none(); TOGETHER];
        for ((packet, key), place) in group.iter_mut().zip(keys).zip(&mut all) {
            // Each has a header.
            let Head { nonce, mixed, .. } = packet.head().unwrap_or(Head { nonce: 0, mixed: 0, aad_len: 0 });
            *place = Short::new(key, packet.bytes().as_mut_ptr(), counter(nonce), mixed);
        }
        let answers = crypt_together::<V, SEAL, C>(alike, &mut all);
        for (packet, answer) in group.iter_mut().zip(answers) {
            settle::<V, P, SEAL>(packet, answer);
        }
    }
}

/// The first counter block of a nonce (NIST SP 800-38D section 7.1, step 2).
#[inline(always)]
const fn counter(nonce: u128) -> u128 {
    nonce | 1 << 120
}

/// No plaintext of a packet whose tag is wrong is left.
#[cold]
fn wipe_text(bytes: &mut [u8]) -> Verdict {
    let end = bytes.len().saturating_sub(TAG);
    if let Some(text) = bytes.get_mut(HEADER..end) {
        text.fill(0);
    }
    Verdict::BadTag
}
