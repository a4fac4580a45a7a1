//! Expanded AEAD keys of the SAs that a worker had packets for last.
//!
//! An expanded key takes most of what an SA would need (ring's 544 bytes, the vector kernels' 640), and expanding one
//! costs more than fetching it from memory ahead of time. So SAs keep their raw keys, and each worker keeps a bounded
//! number of expanded ones.
//!
//! A key is found by its [`Serial`], which no other key of the process ever has: what the cache holds can be of an SA
//! that is gone, but never of another one. The cache is set-associative. In a set the oldest entry makes room, so that
//! a hit writes nothing.
//!
//! Where keys are needed by batches ([`KeyCache::claim`]), only some of those that are missing are kept, by chance: the
//! others are expanded into a small room for passing keys, which the next batch needs again. What is needed often comes to
//! stay; where there are far more keys than places, memory is not written that only a later key would overwrite. After a
//! batch in which no key was here, only some of the next one are looked for at all, until one is.
//!
//! All memory is taken in [`KeyCache::new`]. What is forgotten, makes room or is dropped is overwritten: with zeros, or
//! with the schedule of a key of zeros (OPS-4).

use core::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use postern_espgcm::Key;
use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};

use crate::prefetch::{self, Table};

/// Entries of a set: their serials are half a cache line.
const WAYS: usize = 4;

/// One of 2 to this power of the missing keys of batches is kept.
const KEPT: u32 = 4;

/// So many keys of a batch are missing, and none is here: then the next batch's will not be here either.
const TELLING: u32 = 8;

/// One of so many is looked for then.
const PROBED: u32 = 256;

/// Tells expanded keys apart; no two keys of the process have the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial(u64);

impl Serial {
    /// Of what is no key.
    pub(super) const NONE: Self = Self(0);

    /// In two halves.
    pub(super) fn halves(self) -> [u32; 2] {
        let low = u32::try_from(self.0 & u64::from(u32::MAX)).unwrap_or_default();
        [u32::try_from(self.0 >> 32).unwrap_or_default(), low]
    }

    /// Of its halves.
    #[inline]
    pub(super) fn of_halves([high, low]: [u32; 2]) -> Self {
        Self(u64::from(high) << 32 | u64::from(low))
    }

    /// One that was never given before. At a key a nanosecond the 64 bits last for 584 years.
    pub(super) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A library's expanded key.
pub(super) trait Expanded: Sized {
    /// What is written over keys. `None` when the library gives none, which does not happen.
    fn blank() -> Option<Self>;

    /// Overwrites the key with `blank`.
    fn wipe(&mut self, blank: &Self);

    /// The same before another key is expanded in its place: what that does not overwrite by itself.
    fn make_room(&mut self, blank: &Self);
}

impl Expanded for LessSafeKey {
    /// The largest schedule there is, so that it covers every other.
    fn blank() -> Option<Self> {
        UnboundKey::new(&AES_256_GCM, &[0; 32]).ok().map(Self::new)
    }

    /// ring does not wipe its keys, so another one is written over them.
    fn wipe(&mut self, blank: &Self) {
        self.clone_from(blank);
        // Without this the compiler may drop the write as dead.
        black_box(self);
    }

    /// The new schedule alone would leave the rest of one that was longer.
    fn make_room(&mut self, blank: &Self) {
        self.wipe(blank);
    }
}

impl Expanded for Key {
    fn blank() -> Option<Self> {
        Some(Self::blank())
    }

    fn wipe(&mut self, _: &Self) {
        self.wipe();
    }

    /// Expanding overwrites all of a key. Until then it is none that is enough for anything.
    fn make_room(&mut self, _: &Self) {
        self.retire();
    }
}

/// A worker's expanded keys of one library.
pub(super) struct KeyCache<K: Expanded> {
    /// Their number is a power of two.
    sets: Table<Set>,
    /// By set: the entry that makes room next.
    oldest: Box<[u8]>,
    /// The entries of the first set, of the second, and so on; behind them those of passing keys.
    keys: Table<K>,
    /// Of the passing keys.
    passing: Box<[Serial]>,
    /// Passing keys of this batch.
    passed: usize,
    /// Of chance.
    dice: u64,
    /// What is known of the keys that batches need.
    luck: Luck,
    /// What is written over keys.
    blank: K,
}

/// Whether keys that batches need tend to be here.
#[derive(Clone, Copy, Default)]
struct Luck {
    /// Not one of the last ones was.
    out: bool,
    /// Keys of this batch that were here, and those that were not, nor was there an empty place.
    found: u32,
    missing: u32,
    /// Keys that were not looked for since one was.
    skipped: u32,
}

impl Luck {
    /// Whether to look for the next key.
    #[inline]
    fn tries(&mut self) -> bool {
        if !self.out {
            return true;
        }
        self.skipped = (self.skipped + 1) % PROBED;
        self.skipped == 0
    }

    /// Between two batches.
    #[inline]
    fn next_batch(&mut self) {
        if self.found > 0 {
            self.out = false;
        } else if self.missing >= TELLING {
            self.out = true;
        }
        (self.found, self.missing) = (0, 0);
    }
}

#[derive(Clone, Copy)]
#[repr(align(32))]
struct Set([Serial; WAYS]);

impl<K: Expanded> KeyCache<K> {
    /// With room for at least `slots` keys, and `passing` more of a batch. `None` when there is no blank key.
    pub(super) fn new(slots: usize, passing: usize) -> Option<Self> {
        let sets = slots.div_ceil(WAYS).next_power_of_two();
        let mut keys = prefetch::table(sets * WAYS + passing);
        for _ in 0..sets * WAYS + passing {
            keys.push(K::blank()?);
        }
        let mut serials = prefetch::table(sets);
        serials.resize(sets, Set([Serial::NONE; WAYS]));
        Some(Self {
            sets: serials,
            oldest: vec![0; sets].into(),
            keys,
            passing: vec![Serial::NONE; passing].into(),
            passed: 0,
            dice: 1,
            luck: Luck::default(),
            blank: K::blank()?,
        })
    }

    /// The key of `serial`, expanded by `expand` if it is not here. `None` when that fails.
    #[inline]
    pub(super) fn get(&mut self, serial: Serial, expand: impl FnOnce(&mut K) -> Option<()>) -> Option<&K> {
        let slot = match self.find(serial) {
            Some(slot) => slot,
            None => self.admit(serial, expand)?,
        };
        self.keys.get(slot)
    }

    /// Where the key of `serial` stands, and whether it is there and `enough`; if not, the place is its own now and whatever
    /// is there has to be overwritten with it before any key is used. `None`, and nothing changed, if the place that it would
    /// get is `busy`.
    #[inline]
    pub(super) fn claim(
        &mut self,
        serial: Serial,
        enough: impl FnOnce(&K) -> bool,
        busy: impl Fn(usize) -> bool,
    ) -> Option<(usize, bool)> {
        if !self.luck.tries()
            && let Some(slot) = self.pass(serial)
        {
            return Some((slot, false));
        }
        self.claim_looked_for(serial, enough, busy)
    }

    #[inline(never)]
    fn claim_looked_for(
        &mut self,
        serial: Serial,
        enough: impl FnOnce(&K) -> bool,
        busy: impl Fn(usize) -> bool,
    ) -> Option<(usize, bool)> {
        if let Some(slot) = self.find(serial) {
            self.luck.found += 1;
            return Some((slot, self.keys.get(slot).is_some_and(enough)));
        }
        if self.is_full(serial) {
            self.luck.missing += 1;
            if !self.is_kept()
                && let Some(slot) = self.pass(serial)
            {
                return Some((slot, false));
            }
            if self.victim(serial).is_none_or(busy) {
                return None;
            }
        }
        Some((self.evict(serial)?, false))
    }

    /// From now on the passing keys make room for others.
    #[inline]
    pub(super) fn next_batch(&mut self) {
        self.passed = 0;
        self.luck.next_batch();
    }

    /// Whether the set of `serial` has no empty entry.
    fn is_full(&self, serial: Serial) -> bool {
        self.sets.get(self.set_of(serial)).is_some_and(|set| !set.0.contains(&Serial::NONE))
    }

    /// Whether the next key that is missing is one to be kept.
    #[inline]
    fn is_kept(&mut self) -> bool {
        // Knuth's generator; the high bits are the good ones.
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.dice >> (64 - KEPT) == 0
    }

    /// A place among the passing keys, if there is one left.
    #[inline]
    fn pass(&mut self, serial: Serial) -> Option<usize> {
        let place = self.passing.get_mut(self.passed)?;
        *place = serial;
        self.passed += 1;
        Some(self.sets.len() * WAYS + self.passed - 1)
    }

    /// All places, for what was claimed.
    pub(super) fn places(&mut self) -> &mut [K] {
        &mut self.keys
    }

    /// Wipes the key of `serial`, if it is here.
    pub(super) fn forget(&mut self, serial: Serial) {
        if let Some(slot) = self.find(serial) {
            self.set_serial(slot, Serial::NONE);
            if let Some(key) = self.keys.get_mut(slot) {
                key.wipe(&self.blank);
            }
        }
        self.forget_passing(|there| there == serial);
    }

    /// Wipes passing keys.
    fn forget_passing(&mut self, which: impl Fn(Serial) -> bool) {
        let keys = self.keys.iter_mut().skip(self.sets.len() * WAYS);
        for (there, key) in self.passing.iter_mut().zip(keys).filter(|(there, _)| which(**there)) {
            *there = Serial::NONE;
            key.wipe(&self.blank);
        }
    }

    /// Wipes all keys.
    pub(super) fn forget_all(&mut self) {
        for (set, serials) in self.sets.iter_mut().enumerate() {
            for (way, serial) in
                serials.0.iter_mut().enumerate().filter(|(_, serial)| **serial != Serial::NONE)
            {
                *serial = Serial::NONE;
                if let Some(key) = self.keys.get_mut(set * WAYS + way) {
                    key.wipe(&self.blank);
                }
            }
        }
        self.forget_passing(|there| there != Serial::NONE);
    }

    /// Number of keys.
    pub(super) fn len(&self) -> usize {
        let kept = self.sets.iter().flat_map(|set| &set.0);
        kept.chain(&self.passing).filter(|serial| **serial != Serial::NONE).count()
    }

    fn set_of(&self, serial: Serial) -> usize {
        // Serials count up, so their low bits spread neighbours over all sets. A mask: `sets` is a power of two.
        usize::try_from(serial.0 & (self.sets.len() as u64 - 1)).unwrap_or_default()
    }

    #[inline]
    fn find(&self, serial: Serial) -> Option<usize> {
        let set = self.set_of(serial);
        // All at once: which one it is cannot be foreseen.
        let hits = self
            .sets
            .get(set)?
            .0
            .iter()
            .zip([1, 2, 4, 8])
            .fold(0_u32, |hits, (there, bit)| hits | if *there == serial { bit } else { 0 });
        if hits == 0 {
            return None;
        }
        Some(set * WAYS + usize::try_from(hits.trailing_zeros()).ok()?)
    }

    /// Expands a key in the place of the oldest of its set.
    #[cold]
    fn admit(&mut self, serial: Serial, expand: impl FnOnce(&mut K) -> Option<()>) -> Option<usize> {
        let slot = self.evict(serial)?;
        let place = self.keys.get_mut(slot)?;
        if expand(place).is_none() {
            place.wipe(&self.blank);
            self.set_serial(slot, Serial::NONE);
            return None;
        }
        Some(slot)
    }

    /// The place of the oldest of the set of `serial`.
    fn victim(&self, serial: Serial) -> Option<usize> {
        let set = self.set_of(serial);
        Some(set * WAYS + usize::from(*self.oldest.get(set)?) % WAYS)
    }

    /// Gives an empty place of a set to `serial`, or that of the oldest.
    #[inline]
    fn evict(&mut self, serial: Serial) -> Option<usize> {
        let set = self.set_of(serial);
        let empty = self.sets.get(set)?.0.iter().position(|there| *there == Serial::NONE);
        let way = if let Some(empty) = empty {
            empty
        } else {
            let oldest = self.oldest.get_mut(set)?;
            let way = usize::from(*oldest) % WAYS;
            *oldest = oldest.wrapping_add(1);
            way
        };
        let slot = set * WAYS + way;
        self.set_serial(slot, serial);
        self.keys.get_mut(slot)?.make_room(&self.blank);
        Some(slot)
    }

    #[inline]
    fn set_serial(&mut self, slot: usize, serial: Serial) {
        let set = self.sets.get_mut(slot / WAYS);
        if let Some(place) = set.and_then(|set| set.0.get_mut(slot % WAYS)) {
            *place = serial;
        }
    }
}

impl<K: Expanded> Drop for KeyCache<K> {
    fn drop(&mut self) {
        for key in &mut self.keys {
            key.wipe(&self.blank);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ring::aead::{AES_128_GCM, Aad, Algorithm, CHACHA20_POLY1305, Nonce};

    use super::*;

    /// The transforms that ring serves.
    const ALGORITHMS: [&Algorithm; 3] = [&AES_128_GCM, &AES_256_GCM, &CHACHA20_POLY1305];

    /// The key of the number: another one for every number, and of another transform for neighbours.
    fn key(number: u64) -> LessSafeKey {
        let algorithm = ALGORITHMS[usize::try_from(number % 3).unwrap()];
        let mut bytes = vec![0xc3; algorithm.key_len()];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        LessSafeKey::new(UnboundKey::new(algorithm, &bytes).unwrap())
    }

    /// Expands it.
    fn put(number: u64) -> impl FnOnce(&mut LessSafeKey) -> Option<()> {
        move |place| {
            *place = key(number);
            Some(())
        }
    }

    /// What tells keys apart.
    fn tag(key: &LessSafeKey) -> [u8; 16] {
        let nonce = Nonce::assume_unique_for_key([1; 12]);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut []).unwrap();
        tag.as_ref().try_into().unwrap()
    }

    fn holds(cache: &KeyCache<LessSafeKey>, number: u64) -> bool {
        cache.keys.iter().any(|there| tag(there) == tag(&key(number)))
    }

    fn blanks(cache: &KeyCache<LessSafeKey>) -> usize {
        cache.keys.iter().filter(|there| tag(there) == tag(&cache.blank)).count()
    }

    /// The schedule that is written over the others is the longest.
    #[test]
    fn ops_4_blank_covers_every_key() {
        let cache = KeyCache::<LessSafeKey>::new(1, 0).unwrap();
        assert_eq!(cache.blank.algorithm().key_len(), 32);
        assert_eq!(size_of::<LessSafeKey>(), 544, "the figure in the module's doc");
        assert_eq!(blanks(&cache), WAYS);
    }

    #[test]
    fn serials_differ() {
        let (first, second) = (Serial::next(), Serial::next());
        assert!(first != second && first != Serial::NONE);
    }

    /// A hit expands nothing; the fifth key of a set takes the place of the first, which is gone then.
    #[test]
    fn ops_4_eviction() {
        let mut cache = KeyCache::new(WAYS, 0).unwrap();
        let get = |cache: &mut KeyCache<LessSafeKey>, number| {
            let mut expanded = false;
            let expand = |place: &mut LessSafeKey| {
                expanded = true;
                put(number)(place)
            };
            assert_eq!(tag(cache.get(Serial(number), expand).unwrap()), tag(&key(number)));
            expanded
        };
        for number in [1, 2, 3, 4] {
            assert!(get(&mut cache, number));
        }
        for number in [4, 1, 2, 3] {
            assert!(!get(&mut cache, number));
        }
        assert!(get(&mut cache, 5));
        assert!(!holds(&cache, 1) && holds(&cache, 2) && holds(&cache, 5));
        assert!(!get(&mut cache, 2) && get(&mut cache, 1));
        assert!(!holds(&cache, 2), "the oldest, though it was used last");
    }

    /// OPS-4: what is forgotten is overwritten, and nothing else is.
    #[test]
    fn ops_4_forget() {
        let mut cache = KeyCache::new(64, 0).unwrap();
        for number in 1..=32 {
            cache.get(Serial(number), put(number)).unwrap();
        }
        cache.forget(Serial(7));
        cache.forget(Serial(7));
        cache.forget(Serial(1000));
        assert!(!holds(&cache, 7) && holds(&cache, 6));
        assert_eq!(blanks(&cache), 64 - 31);
        let again = cache.get(Serial(7), put(7)).unwrap();
        assert_eq!(tag(again), tag(&key(7)));
    }

    /// A key that cannot be expanded leaves everything as it was.
    #[test]
    fn nothing_is_admitted_for_no_key() {
        let mut cache = KeyCache::new(WAYS, 0).unwrap();
        assert!(cache.get(Serial(1), |_| None).is_none());
        assert_eq!(blanks(&cache), WAYS);
        assert!(cache.get(Serial(1), put(1)).is_some());
    }

    /// Claims the keys of a batch and puts those that are not there in their places, as the users of batches do; tells how
    /// many were there.
    fn batch(cache: &mut KeyCache<LessSafeKey>, numbers: &[u64]) -> usize {
        let mut there = 0;
        let mut places = Vec::new();
        for number in numbers {
            let claim = |cache: &mut KeyCache<LessSafeKey>, places: &[(u64, usize)]| {
                cache.claim(Serial(*number), |_| true, |slot| places.iter().any(|(_, place)| *place == slot))
            };
            let claimed = claim(cache, &places).or_else(|| {
                end(cache, &mut places);
                claim(cache, &places)
            });
            let (slot, found) = claimed.expect("in an empty batch no place is busy");
            if !found {
                cache.places()[slot] = key(*number);
            }
            there += usize::from(found);
            places.push((*number, slot));
        }
        end(cache, &mut places);
        there
    }

    /// Each key of a batch is in its place when all are.
    fn end(cache: &mut KeyCache<LessSafeKey>, places: &mut Vec<(u64, usize)>) {
        for (number, slot) in places.drain(..) {
            assert_eq!(tag(&cache.places()[slot]), tag(&key(number)));
        }
        cache.next_batch();
    }

    /// Keys of which there are far too many are hardly looked for; when few are needed again, all of them are soon there.
    #[test]
    fn dp_3_luck_comes_back() {
        let mut cache = KeyCache::new(64, 32).unwrap();
        let few: Vec<u64> = (1..=32).collect();
        batch(&mut cache, &few);
        assert_eq!(batch(&mut cache, &few), 32);
        let mut many = 1000..;
        for _ in 0..20 {
            batch(&mut cache, &many.by_ref().take(32).collect::<Vec<_>>());
        }
        assert!(cache.luck.out);
        assert!((1..2000).any(|_| batch(&mut cache, &few) == 32));
    }

    proptest! {
        /// DP-3, OPS-4: whatever batches need, every packet's key is in its place when the batch is served, and what was
        /// forgotten is nowhere.
        #[test]
        fn dp_3_batches_get_their_own_keys(
            slots in 1usize..20,
            batches in prop::collection::vec((prop::collection::vec(1u64..60, 1..16), 1u64..60), 1..20),
        ) {
            let mut cache = KeyCache::new(slots, 16).unwrap();
            for (numbers, forgotten) in batches {
                batch(&mut cache, &numbers);
                cache.forget(Serial(forgotten));
                prop_assert!(!holds(&cache, forgotten));
            }
            cache.forget_all();
            prop_assert_eq!(blanks(&cache), cache.keys.len());
        }

        /// DP-3, OPS-4: with many keys and few slots, a serial is served its own key and no other, and one that was
        /// forgotten or had to make room is in no slot.
        #[test]
        fn dp_3_a_serial_gets_its_own_key(
            slots in 1usize..20,
            steps in prop::collection::vec((1u64..100, prop::bool::weighted(0.2)), 1..200),
        ) {
            let mut cache = KeyCache::new(slots, 0).unwrap();
            for (number, forget) in steps {
                if forget && number % 8 == 0 {
                    cache.forget_all();
                    prop_assert_eq!(blanks(&cache), cache.keys.len());
                } else if forget {
                    cache.forget(Serial(number));
                    prop_assert!(!holds(&cache, number));
                } else {
                    let got = cache.get(Serial(number), put(number)).unwrap();
                    prop_assert_eq!(tag(got), tag(&key(number)));
                }
                prop_assert_eq!(cache.len() + blanks(&cache), cache.keys.len());
            }
        }
    }
}
