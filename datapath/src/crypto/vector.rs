//! AES-GCM by our own kernels (the crate `postern-espgcm`), with the packets of many SAs in one call.
//!
//! A batch is served in groups: first the keys of all packets of a group are found, and those that were not there expanded
//! together; then the kernel gets the group. A key whose place another one of the same group needed meanwhile (five in one
//! set of the cache) is expanded again, for its packets alone.
//!
//! Expanding a key together with others costs about what it takes to fetch an expanded one from memory, so few are
//! kept: as many as the second-level cache has room for. What a packet costs is then the same with a million SAs as with some
//! thousands, and a thousandth of the memory.

use arrayvec::ArrayVec;
use postern_contract::settings::Backend;
use postern_espgcm::{Aad, Kernel, Key, Level, Packet, SHORT, Verdict, Wanted};

use super::aead::Gcm;
use super::cache::KeyCache;
use super::{ESP_HEADER, Layout, OpenOp, Outcome, SealOp, SealOutcome, TRAILER, sequence};

/// Packets that a kernel gets at once.
const GROUP: usize = 32;

/// Expanded keys that are kept: 640 KiB.
const SLOTS: usize = 1024;

/// A kernel that this processor can run, and what is expanded of its keys.
pub(super) struct Vector {
    kernel: Kernel,
    keys: KeyCache<Key>,
}

/// Levels of a backend, the best first.
pub(super) fn levels(backend: Backend) -> &'static [Level] {
    match backend {
        Backend::Auto => &[Level::Vaes512, Level::Vaes256],
        Backend::Vaes512 => &[Level::Vaes512],
        Backend::Vaes256 => &[Level::Vaes256],
        Backend::Ring => &[],
    }
}

/// What both directions know of a packet before the kernel gets it.
trait Operation {
    fn key(&self) -> Option<Gcm<'_>>;
    /// The high half of an extended number.
    fn high(&self) -> Option<u32>;
    fn packet(&mut self) -> &mut [u8];
    fn len(&self) -> usize;
}

impl Operation for SealOp<'_> {
    #[inline]
    fn key(&self) -> Option<Gcm<'_>> {
        self.key.gcm()
    }

    #[inline]
    fn high(&self) -> Option<u32> {
        self.esn.then(|| self.sequence.high())
    }

    #[inline]
    fn packet(&mut self) -> &mut [u8] {
        self.packet
    }

    #[inline]
    fn len(&self) -> usize {
        self.packet.len()
    }
}

impl Operation for OpenOp<'_> {
    #[inline]
    fn key(&self) -> Option<Gcm<'_>> {
        self.key.gcm()
    }

    #[inline]
    fn high(&self) -> Option<u32> {
        self.esn.then(|| sequence::high(self.sequence))
    }

    #[inline]
    fn packet(&mut self) -> &mut [u8] {
        self.packet
    }

    #[inline]
    fn len(&self) -> usize {
        self.packet.len()
    }
}

impl Vector {
    pub(super) fn new(kernel: Kernel, slots: usize) -> Option<Self> {
        Some(Self { kernel, keys: KeyCache::new(slots.min(SLOTS), GROUP)? })
    }

    pub(super) fn name(&self) -> &'static str {
        self.kernel.level().name()
    }

    pub(super) fn forget(&mut self, serial: super::Serial) {
        self.keys.forget(serial);
    }

    pub(super) fn forget_all(&mut self) {
        self.keys.forget_all();
    }

    pub(super) fn expanded(&self) -> usize {
        self.keys.len()
    }

    /// Seals packets with keys of AES-GCM; the outcomes are in the same order.
    pub(super) fn seal<const N: usize>(
        &mut self,
        ops: &mut [SealOp<'_>],
        outcomes: &mut ArrayVec<SealOutcome, N>,
    ) {
        for group in ops.chunks_mut(GROUP) {
            for op in group.iter_mut() {
                // The number is what seals; the kernel takes it from where it stands in the packet.
                let (low, iv) = (op.sequence.low().to_be_bytes(), op.sequence.value().to_be_bytes());
                if let Some((_, rest)) = op.packet.split_first_chunk_mut::<4>()
                    && let Some((number, rest)) = rest.split_first_chunk_mut::<4>()
                    && let Some(place) = rest.first_chunk_mut::<8>()
                {
                    *number = low;
                    *place = iv;
                }
            }
            let verdicts = self.run(group, Layout::sealable, Kernel::seal);
            outcomes.extend(verdicts.iter().map(|verdict| match verdict {
                Verdict::Done => SealOutcome::Sealed,
                _ => SealOutcome::BadLength,
            }));
        }
    }

    /// Opens the pending ones of packets with keys of AES-GCM.
    pub(super) fn open(&mut self, ops: &mut [OpenOp<'_>]) {
        for pending in
            ops.chunk_by_mut(|a, b| (a.outcome == Outcome::Pending) == (b.outcome == Outcome::Pending))
        {
            if pending.first().is_some_and(|op| op.outcome != Outcome::Pending) {
                continue;
            }
            for group in pending.chunks_mut(GROUP) {
                let verdicts = self.run(group, Layout::openable, Kernel::open);
                for (op, verdict) in group.iter_mut().zip(verdicts) {
                    op.outcome = match verdict {
                        Verdict::Done => Outcome::Opened,
                        Verdict::BadTag => Outcome::BadIcv,
                        Verdict::Refused | Verdict::Pending => Outcome::BadLength,
                    };
                }
            }
        }
    }

    /// Where the keys of a group stand expanded; those that were not are now.
    #[inline]
    fn find<O: Operation>(&mut self, group: &[O]) -> ArrayVec<Option<usize>, GROUP> {
        let mut slots = ArrayVec::new();
        let kernel = self.kernel;
        self.keys.next_batch();
        let mut wanted: ArrayVec<Wanted<'_>, GROUP> = ArrayVec::new();
        // Packets of one SA often come one behind the other.
        let mut last = None;
        let mut whole = false;
        for op in group {
            let Some(Gcm { serial, key, salt: _ }) = op.key() else {
                slots.push(None);
                continue;
            };
            let text = op.len().saturating_sub(Layout::AROUND);
            whole |= text > SHORT;
            if let Some((same, slot, longest)) = last
                && same == serial
                && text <= longest
            {
                slots.push(Some(slot));
                continue;
            }
            let claimed = self.keys.claim(serial, |there| kernel.is_enough(there, text));
            if let Some((place, false)) = claimed {
                wanted.push(Wanted { place, key });
            }
            last = claimed.map(|(slot, _)| (serial, slot, text.max(SHORT)));
            slots.push(claimed.map(|(slot, _)| slot));
        }
        if !wanted.is_empty() {
            kernel.expand_into(self.keys.places(), &wanted, whole);
        }
        slots
    }

    /// Gives a group to the kernel. The verdicts are in the same order; a packet of a wrong length stays `Pending`.
    #[inline]
    fn run<O: Operation>(
        &mut self,
        group: &mut [O],
        fits: fn(usize) -> bool,
        mut call: impl FnMut(Kernel, &mut [Packet<'_>]),
    ) -> ArrayVec<Verdict, GROUP> {
        let kernel = self.kernel;
        let slots = self.find(group);
        let mut verdicts: ArrayVec<Verdict, GROUP> = ArrayVec::new();
        let mut packets: ArrayVec<Packet<'_>, GROUP> = ArrayVec::new();
        let mut evicted = false;
        for (op, slot) in group.iter_mut().zip(&slots) {
            let found = op.key().and_then(|key| {
                let expanded = self.keys.at((*slot)?, key.serial);
                Some((expanded, key.salt))
            });
            let high = op.high();
            let verdict = match found {
                Some((Some(key), salt)) if fits(op.packet().len()) => {
                    packets.extend(packet(key, salt, high, op.packet()));
                    Verdict::Done
                }
                Some((None, _)) => {
                    evicted = true;
                    Verdict::Pending
                }
                _ => Verdict::Refused,
            };
            verdicts.push(verdict);
        }
        call(kernel, &mut packets);
        let mut done = packets.iter().map(|packet| packet.verdict);
        for verdict in verdicts.iter_mut().filter(|verdict| **verdict == Verdict::Done) {
            *verdict = done.next().unwrap_or(Verdict::Refused);
        }
        drop(packets);
        if evicted {
            self.again(group, &mut verdicts, fits, call);
        }
        verdicts
    }

    /// One by one what is still pending because its key had to make room.
    #[cold]
    fn again<O: Operation>(
        &mut self,
        group: &mut [O],
        verdicts: &mut [Verdict],
        fits: fn(usize) -> bool,
        mut call: impl FnMut(Kernel, &mut [Packet<'_>]),
    ) {
        for (op, verdict) in
            group.iter_mut().zip(verdicts).filter(|(_, verdict)| **verdict == Verdict::Pending)
        {
            *verdict = Verdict::Refused;
            let found = op.key().and_then(|key| {
                let kernel = self.kernel;
                let expand = |place: &mut Key| kernel.expand(key.key, place).ok();
                Some((self.keys.get(key.serial, expand)?, key.salt))
            });
            let high = op.high();
            if let Some((key, salt)) = found
                && fits(op.packet().len())
                && let Some(packet) = packet(key, salt, high, op.packet())
            {
                let mut one = [packet];
                call(self.kernel, &mut one);
                let [packet] = one;
                *verdict = packet.verdict;
            }
        }
    }
}

/// A packet as the kernel takes it. RFC 4106 section 4: the nonce is the salt followed by the IV.
#[inline]
fn packet<'p>(key: &'p Key, salt: [u8; 4], high: Option<u32>, bytes: &'p mut [u8]) -> Option<Packet<'p>> {
    let (spi, rest) = bytes.split_first_chunk::<4>()?;
    let (low, rest) = rest.split_first_chunk::<4>()?;
    let [i0, i1, i2, i3, i4, i5, i6, i7] = *rest.first_chunk::<8>()?;
    let [s0, s1, s2, s3] = salt;
    let nonce = [s0, s1, s2, s3, i0, i1, i2, i3, i4, i5, i6, i7];
    let aad = Aad::esp(*spi, high, *low);
    Some(Packet { key, nonce, aad, bytes, verdict: Verdict::Pending })
}

impl Layout {
    /// Bytes around the text of AES-GCM.
    const AROUND: usize = ESP_HEADER + 8 + 16;

    /// Whether a packet of AES-GCM has a length that can be sealed.
    fn sealable(len: usize) -> bool {
        len.checked_sub(Self::AROUND).is_some_and(|text| text >= TRAILER && text % 4 == 0)
    }

    /// Whether a packet of AES-GCM has a length that can be opened.
    fn openable(len: usize) -> bool {
        len >= Self::AROUND + TRAILER
    }
}
