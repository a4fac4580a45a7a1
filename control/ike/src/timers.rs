//! Timers of many SAs in one hierarchical wheel: setting, cancelling and firing cost the same with ten as with a
//! million of them.
//!
//! A tick is a millisecond. Seven levels of 64 slots: a timer lies in the level of the highest six bits in which its tick
//! differs from the wheel's, and moves down as the wheel turns, at most six times. [`Timers::next`] is therefore a time at
//! which something is to be done, either a timer or such a move; a timer never fires early, and at most one tick late.
//!
//! Nothing depends on the order of a hash table: the same calls fire the same timers in the same order.

use core::hash::Hash;
use core::time::Duration;
use std::time::Instant;

use hashbrown::HashMap;

/// A wheel of timers, each with a key. A key has one timer.
#[derive(Debug)]
pub struct Timers<K> {
    /// When tick 0 was; known once the first timer is set.
    origin: Option<Instant>,
    /// All ticks before this one are done.
    tick: u64,
    levels: [Level; LEVELS],
    entries: Vec<Entry<K>>,
    /// Head of the list of unused entries.
    free: u32,
    keys: HashMap<K, u32>,
}

impl<K: Copy + Eq + Hash> Default for Timers<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Copy + Eq + Hash> Timers<K> {
    /// A wheel without timers.
    pub fn new() -> Self {
        Self {
            origin: None,
            tick: 0,
            levels: [const { Level { occupied: 0, lists: [List { head: NIL, tail: NIL }; SLOTS] } }; LEVELS],
            entries: Vec::new(),
            free: NIL,
            keys: HashMap::new(),
        }
    }

    /// Number of timers that are set.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether none is set.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Sets the timer of `key` to `at`, whether or not it was set before. If `at` has passed, it fires at once.
    pub fn set(&mut self, now: Instant, key: K, at: Instant) {
        let origin = *self.origin.get_or_insert(now);
        if self.keys.is_empty() {
            self.tick = self.tick.max(whole_ticks(origin, now));
        }
        let due = ticks_up(origin, at).max(self.tick).min(LAST_TICK);
        match self.keys.get(&key).copied() {
            Some(index) => {
                if self.entry(index).is_some_and(|entry| entry.due == due) {
                    return;
                }
                self.unlink(index);
                self.link(index, due);
            }
            None => {
                if let Some(index) = self.take_entry(key, due) {
                    self.keys.insert(key, index);
                    self.link(index, due);
                }
            }
        }
    }

    /// Cancels the timer of `key`. Whether it was set.
    pub fn cancel(&mut self, key: &K) -> bool {
        let Some(index) = self.keys.remove(key) else { return false };
        self.unlink(index);
        self.give_entry(index);
        true
    }

    /// When [`expire`](Self::expire) is to be called next, if any timer is set.
    pub fn next(&self) -> Option<Instant> {
        let (level, slot) = self.first_slot()?;
        self.origin?.checked_add(Duration::from_millis(slot_start(self.tick, level, slot)))
    }

    /// A timer whose time has come, which is no longer set. To be called until there is none.
    pub fn expire(&mut self, now: Instant) -> Option<K> {
        let now = whole_ticks(self.origin?, now);
        loop {
            let Some((level, slot)) = self.first_slot() else {
                self.tick = self.tick.max(now);
                return None;
            };
            let start = slot_start(self.tick, level, slot);
            if start > now {
                // No slot begins between here and `now`, so no timer changes its place by this step.
                self.tick = self.tick.max(now);
                return None;
            }
            self.tick = start;
            let index = self.list(level, slot)?.head;
            if level == 0 {
                let key = self.entry(index)?.key;
                self.cancel(&key);
                return Some(key);
            }
            self.move_down(level, slot);
        }
    }

    /// Distributes a slot that the wheel has reached over the levels below.
    fn move_down(&mut self, level: usize, slot: usize) {
        let Some(list) = self.list_mut(level, slot) else { return };
        let mut index = list.head;
        *list = List { head: NIL, tail: NIL };
        if let Some(level) = self.levels.get_mut(level) {
            level.occupied &= !(1 << slot);
        }
        while let Some(entry) = self.entry(index) {
            let (next, due) = (entry.next, entry.due);
            self.link(index, due);
            index = next;
        }
    }

    /// The occupied slot that begins first: of the lowest occupied level the lowest, because everything in a level comes
    /// before everything in the one above.
    fn first_slot(&self) -> Option<(usize, usize)> {
        self.levels.iter().enumerate().find(|(_, level)| level.occupied != 0).map(|(index, level)| {
            (index, usize::try_from(level.occupied.trailing_zeros()).unwrap_or_default())
        })
    }

    fn link(&mut self, index: u32, due: u64) {
        let (level, slot) = place(self.tick, due);
        let Some(tail) = self.list(level, slot).map(|list| list.tail) else { return };
        if let Some(entry) = self.entry_mut(index) {
            *entry =
                Entry { key: entry.key, due, level: small(level), slot: small(slot), prev: tail, next: NIL };
        }
        if let Some(last) = self.entry_mut(tail) {
            last.next = index;
        }
        if let Some(list) = self.list_mut(level, slot) {
            list.tail = index;
            if tail == NIL {
                list.head = index;
            }
        }
        if let Some(level) = self.levels.get_mut(level) {
            level.occupied |= 1 << slot;
        }
    }

    fn unlink(&mut self, index: u32) {
        let Some(entry) = self.entry(index) else { return };
        let (level, slot) = (usize::from(entry.level), usize::from(entry.slot));
        let (prev, next) = (entry.prev, entry.next);
        if let Some(entry) = self.entry_mut(prev) {
            entry.next = next;
        }
        if let Some(entry) = self.entry_mut(next) {
            entry.prev = prev;
        }
        let Some(list) = self.list_mut(level, slot) else { return };
        if list.head == index {
            list.head = next;
        }
        if list.tail == index {
            list.tail = prev;
        }
        if list.head == NIL
            && let Some(level) = self.levels.get_mut(level)
        {
            level.occupied &= !(1 << slot);
        }
    }

    /// An entry for `key`, not yet in a list. `None` only with 2^32 - 1 timers.
    fn take_entry(&mut self, key: K, due: u64) -> Option<u32> {
        let fresh = Entry { key, due, level: 0, slot: 0, prev: NIL, next: NIL };
        let index = self.free;
        if let Some(entry) = self.entry_mut(index) {
            let next = entry.next;
            *entry = fresh;
            self.free = next;
            return Some(index);
        }
        let index = u32::try_from(self.entries.len()).ok().filter(|&index| index != NIL)?;
        self.entries.push(fresh);
        Some(index)
    }

    fn give_entry(&mut self, index: u32) {
        let free = self.free;
        if let Some(entry) = self.entry_mut(index) {
            entry.next = free;
            self.free = index;
        }
    }

    fn entry(&self, index: u32) -> Option<&Entry<K>> {
        self.entries.get(usize::try_from(index).ok()?)
    }

    fn entry_mut(&mut self, index: u32) -> Option<&mut Entry<K>> {
        self.entries.get_mut(usize::try_from(index).ok()?)
    }

    fn list(&self, level: usize, slot: usize) -> Option<&List> {
        self.levels.get(level)?.lists.get(slot)
    }

    fn list_mut(&mut self, level: usize, slot: usize) -> Option<&mut List> {
        self.levels.get_mut(level)?.lists.get_mut(slot)
    }
}

/// A timer in the list of its slot, or an unused entry in the list of those.
#[derive(Debug)]
struct Entry<K> {
    key: K,
    due: u64,
    prev: u32,
    next: u32,
    level: u8,
    slot: u8,
}

#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
}

#[derive(Debug)]
struct Level {
    /// One bit a slot.
    occupied: u64,
    lists: [List; SLOTS],
}

const LEVELS: usize = 7;
const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
/// No entry.
const NIL: u32 = u32::MAX;
/// 139 years.
const LAST_TICK: u64 = (1 << 42) - 1;

/// Where a timer lies while the wheel is at `tick`, with `tick <= due`.
fn place(tick: u64, due: u64) -> (usize, usize) {
    let level = (u64::BITS - 1).saturating_sub((tick ^ due).leading_zeros()) / BITS;
    let slot = (due >> (level * BITS)) & 63;
    (usize::try_from(level).unwrap_or_default(), usize::try_from(slot).unwrap_or_default())
}

/// First tick of a slot.
fn slot_start(tick: u64, level: usize, slot: usize) -> u64 {
    let shift = u32::try_from(level).unwrap_or_default() * BITS;
    let above = tick >> (shift + BITS) << (shift + BITS);
    // At level 0 a slot may be the current one; above it is later than the current one.
    above | (u64::try_from(slot).unwrap_or_default() << shift)
}

fn whole_ticks(origin: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(origin).as_millis()).unwrap_or(LAST_TICK).min(LAST_TICK)
}

/// Rounded up, so that nothing fires early.
fn ticks_up(origin: Instant, at: Instant) -> u64 {
    let nanoseconds = at.saturating_duration_since(origin).as_nanos();
    u64::try_from(nanoseconds.div_ceil(1_000_000)).unwrap_or(LAST_TICK)
}

/// A level or slot, below 64.
fn small(value: usize) -> u8 {
    u8::try_from(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn drain(timers: &mut Timers<u32>, now: Instant) -> Vec<u32> {
        core::iter::from_fn(|| timers.expire(now)).collect()
    }

    #[test]
    fn fires_at_its_time_and_not_before() {
        let start = Instant::now();
        let mut timers = Timers::new();
        for (key, after) in [(1, 0), (2, 5), (3, 64), (4, 4_096), (5, 86_400_000), (6, 31_536_000_000)] {
            timers.set(start, key, start + Duration::from_millis(after));
        }
        let mut now = start;
        let mut fired = Vec::new();
        let mut wakes = 0;
        while let Some(next) = timers.next() {
            assert!(next >= now);
            now = next;
            wakes += 1;
            fired.extend(drain(&mut timers, now).into_iter().map(|key| (key, (now - start).as_millis())));
        }
        assert_eq!(fired, [(1, 0), (2, 5), (3, 64), (4, 4_096), (5, 86_400_000), (6, 31_536_000_000)]);
        assert!(wakes < 30, "{wakes}");
        assert!(timers.is_empty());
    }

    #[test]
    fn a_set_timer_is_moved_and_cancelled() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut timers = Timers::new();
        timers.set(start, 1, at(10));
        timers.set(start, 1, at(20));
        timers.set(start, 2, at(10));
        assert!(timers.cancel(&2));
        assert!(!timers.cancel(&2));
        assert!(drain(&mut timers, at(15)).is_empty());
        assert_eq!(drain(&mut timers, at(20)), [1]);
        assert_eq!(timers.next(), None);
        // After a long sleep the wheel goes on from where it is told that it is.
        timers.set(at(10_000_000), 3, at(1));
        assert_eq!(drain(&mut timers, at(10_000_000)), [3]);
    }

    #[test]
    fn fractions_of_a_tick_are_rounded_up() {
        let start = Instant::now();
        let mut timers = Timers::new();
        timers.set(start, 1, start + Duration::from_micros(1_500));
        assert!(drain(&mut timers, start + Duration::from_micros(1_900)).is_empty());
        assert_eq!(timers.next(), Some(start + Duration::from_millis(2)));
        assert_eq!(drain(&mut timers, start + Duration::from_millis(2)), [1]);
    }

    #[test]
    fn entries_are_used_again() {
        let start = Instant::now();
        let mut timers = Timers::new();
        for round in 0..1_000_u64 {
            for key in 0..10_u32 {
                timers.set(start, key, start + Duration::from_millis(round * 7 + u64::from(key)));
            }
            for key in 0..10_u32 {
                assert!(timers.cancel(&key));
            }
        }
        assert_eq!(timers.entries.len(), 10);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Set(u32, u64),
        Cancel(u32),
        Sleep(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let span = prop_oneof![0..100_u64, 0..10_000_u64, 0..100_000_000_u64];
        prop_oneof![
            4 => (0..40_u32, span.clone()).prop_map(|(key, after)| Op::Set(key, after)),
            1 => (0..40_u32).prop_map(Op::Cancel),
            2 => span.prop_map(Op::Sleep),
        ]
    }

    proptest! {
        /// Against a sorted map: the same timers fire by the same time, in the order of their times.
        #[test]
        fn behaves_as_a_sorted_map(ops in prop::collection::vec(op(), 1..200)) {
            let start = Instant::now();
            let at = |ms| start + Duration::from_millis(ms);
            let mut now = 0;
            let mut timers = Timers::new();
            let mut model = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Set(key, after) => {
                        timers.set(at(now), key, at(now + after));
                        model.insert(key, now + after);
                    }
                    Op::Cancel(key) => {
                        prop_assert_eq!(timers.cancel(&key), model.remove(&key).is_some());
                    }
                    Op::Sleep(span) => {
                        now += span;
                        let fired = drain(&mut timers, at(now));
                        let times: Vec<u64> = fired.iter().map(|key| model.remove(key).unwrap()).collect();
                        prop_assert!(times.is_sorted(), "{times:?}");
                        prop_assert!(times.iter().all(|&time| time <= now));
                        prop_assert!(model.values().all(|&time| time > now));
                    }
                }
                prop_assert_eq!(timers.len(), model.len());
                prop_assert_eq!(timers.next().is_some(), !model.is_empty());
                if let (Some(next), Some(first)) = (timers.next(), model.values().min()) {
                    prop_assert!(next <= at(*first));
                }
            }
        }
    }
}
