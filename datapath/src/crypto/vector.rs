//! AES-GCM by our own kernels (the crate `postern-espgcm`), with the packets of many SAs in one call.
//!
//! A batch is served in groups: packets are taken in until the group is full, and the places of their keys found; then the
//! keys that were not there are expanded together, and the kernel gets the group. Where a key has no place that no other
//! one of the group needs (five in one set of the cache), the group ends sooner.
//!
//! Expanding a key together with others costs about what it takes to fetch an expanded one from memory, so few are
//! kept: as many as the second-level cache has room for. What a packet costs is then the same with a million SAs as with some
//! thousands, and a thousandth of the memory.

use arrayvec::ArrayVec;
use postern_contract::settings::Backend;
use postern_espgcm::{EspPacket, Kernel, Key, Level, SHORT, Verdict, Wanted};

use super::aead::Gcm;
use super::cache::{KeyCache, Serial};
use super::{ESP_HEADER, Layout, Reserved, TRAILER};

/// Packets that a kernel gets at once.
const GROUP: usize = 32;

/// Packets of a group between which there is time for something else.
const STEP: usize = 8;

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

/// Packets that the kernel gets together.
pub(super) struct Group<'p> {
    packets: ArrayVec<EspPacket<'p>, GROUP>,
    /// Keys that are to be expanded before.
    wanted: ArrayVec<Wanted<'p>, GROUP>,
    /// Whether one of them is for long texts.
    whole: bool,
    /// The key of the packet before, its place, and the longest text that it serves: packets of one SA often come one
    /// behind the other.
    last: (Serial, usize, usize),
}

impl Group<'_> {
    /// Without packets.
    pub(super) fn new() -> Self {
        Self { packets: ArrayVec::new(), wanted: ArrayVec::new(), whole: false, last: (Serial::NONE, 0, 0) }
    }
}

impl Vector {
    pub(super) fn new(kernel: Kernel, slots: usize) -> Option<Self> {
        Some(Self { kernel, keys: KeyCache::new(slots.min(SLOTS), GROUP)? })
    }

    pub(super) fn name(&self) -> &'static str {
        self.kernel.level().name()
    }

    pub(super) fn forget(&mut self, serial: Serial) {
        self.keys.forget(serial);
    }

    pub(super) fn forget_all(&mut self) {
        self.keys.forget_all();
    }

    pub(super) fn expanded(&self) -> usize {
        self.keys.len()
    }

    /// Takes in a packet to be sealed with its number. `done` gets the verdicts of packets that were taken in before, in
    /// their order, when they make room.
    #[expect(clippy::inline_always, reason = "each packet passes, and nothing of it is to go through memory")]
    #[inline(always)]
    pub(super) fn seal<'p>(
        &mut self,
        group: &mut Group<'p>,
        key: Gcm<'p>,
        number: &Reserved,
        esn: bool,
        packet: &'p mut [u8],
        done: impl FnMut(Verdict),
    ) {
        let fits = sealable(packet.len());
        // The number is what seals; the kernel takes it from where it stands in the packet.
        if let Some((_, rest)) = packet.split_first_chunk_mut::<4>()
            && let Some((place, rest)) = rest.split_first_chunk_mut::<4>()
            && let Some(iv) = rest.first_chunk_mut::<8>()
        {
            *place = number.low().to_be_bytes();
            *iv = number.value().to_be_bytes();
        }
        let high = esn.then(|| number.high());
        self.take_in(group, key, high, packet, fits, Kernel::seal_esp, done);
    }

    /// Takes in a packet to be opened; `high` is the high half of an extended number, `done` as in [`Self::seal`].
    #[expect(clippy::inline_always, reason = "as for `seal`")]
    #[inline(always)]
    pub(super) fn open<'p>(
        &mut self,
        group: &mut Group<'p>,
        key: Gcm<'p>,
        high: Option<u32>,
        packet: &'p mut [u8],
        done: impl FnMut(Verdict),
    ) {
        let fits = openable(packet.len());
        self.take_in(group, key, high, packet, fits, Kernel::open_esp, done);
    }

    /// Seals what was taken in; calls `meanwhile` every [`STEP`] packets.
    #[inline]
    pub(super) fn finish_sealing(
        &mut self,
        group: &mut Group<'_>,
        meanwhile: impl FnMut(),
        done: impl FnMut(Verdict),
    ) {
        self.run(group, STEP, Kernel::seal_esp, meanwhile, done);
    }

    /// Opens what was taken in.
    #[inline]
    pub(super) fn finish_opening(&mut self, group: &mut Group<'_>, done: impl FnMut(Verdict)) {
        self.run(group, GROUP, Kernel::open_esp, || {}, done);
    }

    #[expect(
        clippy::inline_always,
        clippy::too_many_arguments,
        reason = "two callers, and each packet passes"
    )]
    #[inline(always)]
    fn take_in<'p>(
        &mut self,
        group: &mut Group<'p>,
        key: Gcm<'p>,
        high: Option<u32>,
        bytes: &'p mut [u8],
        fits: bool,
        call: fn(Kernel, &[Key], &mut [EspPacket<'_>]),
        mut done: impl FnMut(Verdict),
    ) {
        if group.packets.is_full() {
            self.run(group, GROUP, call, || {}, &mut done);
        }
        let Gcm { serial, salt, .. } = key;
        let text = bytes.len().saturating_sub(AROUND);
        let (same, place, longest) = group.last;
        let place = if same == serial && text <= longest {
            Some(place)
        } else {
            match self.place(group, &key, text) {
                None => {
                    self.run(group, GROUP, call, || {}, &mut done);
                    self.place(group, &key, text)
                }
                place => place,
            }
        };
        let verdict = if fits && place.is_some() { Verdict::Pending } else { Verdict::Refused };
        let key = place.unwrap_or(usize::MAX);
        // Not `Err`: there is room.
        let _ = group.packets.try_push(EspPacket { key, salt, high, bytes, verdict });
    }

    /// The place of a key, which is expanded there at the latest before the kernel is called. `None` if the place is that of
    /// another one in the group.
    #[inline]
    fn place<'p>(&mut self, group: &mut Group<'p>, key: &Gcm<'p>, text: usize) -> Option<usize> {
        let Self { kernel, keys } = self;
        let Group { packets, wanted, whole, last } = group;
        let busy = |place| packets.iter().any(|packet| packet.key == place);
        let (place, there) = keys.claim(key.serial, |there| kernel.is_enough(there, text), busy)?;
        if !there {
            // Not `Err`: no packet asks for two.
            let _ = wanted.try_push(Wanted { place, key: key.key });
            *whole |= text > SHORT;
        }
        *last = (key.serial, place, text.max(SHORT));
        Some(place)
    }

    /// Gives a group to the kernel, so many packets at a time, and empties it.
    #[inline(never)]
    fn run(
        &mut self,
        group: &mut Group<'_>,
        step: usize,
        call: fn(Kernel, &[Key], &mut [EspPacket<'_>]),
        mut meanwhile: impl FnMut(),
        mut done: impl FnMut(Verdict),
    ) {
        let Group { packets, wanted, whole, last } = group;
        if !wanted.is_empty() {
            self.kernel.expand_into(self.keys.places(), wanted, *whole);
            wanted.clear();
            *whole = false;
        }
        for packets in packets.chunks_mut(step) {
            meanwhile();
            call(self.kernel, self.keys.places(), packets);
        }
        packets.iter().for_each(|packet| done(packet.verdict));
        packets.clear();
        *last = (Serial::NONE, 0, 0);
        self.keys.next_batch();
    }
}

/// Bytes around the text of AES-GCM.
const AROUND: usize = ESP_HEADER + 8 + 16;

/// Whether a packet of AES-GCM has a length that can be sealed.
fn sealable(len: usize) -> bool {
    let Layout { block, .. } = Layout::GCM;
    len.checked_sub(AROUND).is_some_and(|text| text >= TRAILER && text.is_multiple_of(block.into()))
}

/// Whether a packet of AES-GCM has a length that can be opened.
fn openable(len: usize) -> bool {
    len >= AROUND + TRAILER
}
