//! The outbound SAs of the flows that a worker saw last, so that not every packet is looked up in the SPD.
//!
//! A table in front of [`Spd`](crate::spd::Spd). Every change of a policy makes all of it worthless
//! at once, by a number that entries have in common; so it never knows anything that the SPD does not. The number comes again
//! after 127 changes. Until then each of them wipes a part of the table, so that no packet waits for all of it.
//!
//! A flow is in the line of its hash, or if that was full in the one beside it: without that, of two flows a line every
//! twentieth would be in one with too many, and asking the policies costs a dozen times as much as asking here.

use postern_wire::ids::Protocol;

use crate::prefetch::{self, Table};
use crate::sad::lookup::Handle;

/// An IPv4 flow with ports, in words as a little-endian processor reads them from the packet: they are compared, and mean
/// nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Source and destination address.
    pub addresses: u64,
    /// Both ports.
    pub ports: u32,
    /// TCP or UDP; others are not told from TCP.
    pub protocol: Protocol,
}

/// A flow and its SA.
#[derive(Clone, Copy, Debug)]
struct Place {
    addresses: u64,
    /// The ports in the lower half. In the upper one, from the top: 7 bits of the policies that the flow was found by (0 for
    /// none), one of the protocol, and the index of the SA, of which a handle has 24 bits.
    rest: u64,
}

impl Place {
    const EMPTY: Self = Self { addresses: 0, rest: 0 };
    const SA: u64 = (Handle::MAX_INDEX as u64) << 32;
    const UDP: u64 = 1 << 56;
    const EPOCH: u32 = 57;
    const LAST_EPOCH: u64 = u64::MAX >> Self::EPOCH;

    /// Of the SA 0.
    #[inline]
    fn new(key: Key, epoch: u64) -> Self {
        let udp = if key.protocol == Protocol::UDP { Self::UDP } else { 0 };
        Self { addresses: key.addresses, rest: epoch << Self::EPOCH | udp | u64::from(key.ports) }
    }

    /// The SA.
    #[inline]
    fn sa(self) -> u32 {
        u32::try_from((self.rest & Self::SA) >> 32).unwrap_or_default()
    }

    #[inline]
    fn epoch(self) -> u64 {
        self.rest >> Self::EPOCH
    }
}

/// Changes in which all lines are wiped.
const PARTS: usize = 126;

const _: () = assert!(PARTS as u64 + 1 == Place::LAST_EPOCH);

/// The flows of a cache line: the one that was entered last, and those before it. A flow is small for the sake of what there
/// is to fetch, and of the page tables.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line([Place; 4]);

const EMPTY: Line = Line([Place::EMPTY; 4]);

const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    /// The SA of a flow, if it is in the line.
    #[inline]
    fn find(&self, key: Key, epoch: u64) -> Option<u32> {
        let Self(places) = self;
        let wanted = Place::new(key, epoch);
        // All places and all of each: which one it is cannot be foreseen.
        let mut hits = 0_u32;
        for (place, bit) in places.iter().zip([1, 2, 4, 8]) {
            let difference = place.addresses ^ wanted.addresses | (place.rest ^ wanted.rest) & !Place::SA;
            hits |= if difference == 0 { bit } else { 0 };
        }
        let place = usize::try_from(hits.trailing_zeros()).ok()?;
        places.get(place).map(|place| place.sa())
    }

    /// Whether all of its flows are known by these policies.
    #[inline]
    fn is_full(&self, epoch: u64) -> bool {
        self.0.iter().all(|place| place.epoch() == epoch)
    }
}

/// Flows and their SAs.
#[derive(Debug)]
pub struct Flows {
    /// Their number is a power of two.
    lines: Table<Line>,
    epoch: u64,
    /// Whether any flow is known by the policies as they are.
    used: bool,
    /// Where the next change goes on to wipe.
    wiped: usize,
}

impl Flows {
    /// With places for at least twice so many flows.
    pub fn new(flows: usize) -> Self {
        let lines = (flows / 2).next_power_of_two().max(2);
        let mut table = prefetch::table(lines);
        table.resize(lines, EMPTY);
        Self { lines: table, epoch: 1, used: false, wiped: 0 }
    }

    /// Asks for the memory of a flow; tells where that is.
    #[inline]
    pub fn prefetch(&self, key: Key) -> u32 {
        let index = self.index(key);
        if let Some(line) = self.lines.get(index as usize) {
            prefetch::object(line);
        }
        index
    }

    /// The index of the flow's SA, if it is known.
    #[inline]
    pub fn get(&self, key: Key) -> Option<u32> {
        self.get_at(self.index(key), key)
    }

    /// The same of a flow of which [`Self::prefetch`] told where it is.
    #[inline]
    pub fn get_at(&self, index: u32, key: Key) -> Option<u32> {
        let line = self.lines.get(index as usize)?;
        line.find(key, self.epoch).or_else(|| self.get_beside(index, key))
    }

    #[cold]
    fn get_beside(&self, index: u32, key: Key) -> Option<u32> {
        let full = self.lines.get(index as usize)?.is_full(self.epoch);
        self.lines.get(beside(index)).filter(|_| full)?.find(key, self.epoch)
    }

    /// Remembers the flow's SA.
    pub fn put(&mut self, key: Key, sa: u32) {
        let (index, epoch) = (self.index(key), self.epoch);
        let is_full = |at: usize| self.lines.get(at).is_none_or(|line| line.is_full(epoch));
        let home = index as usize;
        let at = if is_full(home) && !is_full(beside(index)) { beside(index) } else { home };
        if let Some(line) = self.lines.get_mut(at) {
            self.used = true;
            line.0.rotate_right(1);
            if let Some(place) = line.0.first_mut() {
                *place = Place::new(key, epoch);
                place.rest |= u64::from(sa) << 32 & Place::SA;
            }
        }
    }

    /// A policy changed.
    pub fn forget(&mut self) {
        if !self.used {
            return;
        }
        // All lines within one change less than it takes for an epoch to come again: what was entered in a line right after it
        // was wiped is gone by then.
        let part = self.lines.len().div_ceil(PARTS);
        let end = (self.wiped + part).min(self.lines.len());
        if let Some(lines) = self.lines.get_mut(self.wiped..end) {
            lines.fill(EMPTY);
        }
        self.wiped = if end == self.lines.len() { 0 } else { end };
        self.epoch = self.epoch % Place::LAST_EPOCH + 1;
        self.used = false;
    }

    #[inline]
    fn index(&self, key: Key) -> u32 {
        // Fibonacci hashing of everything that tells flows apart. A mask: the number of lines is a power of two. The bits that
        // tell neighbours apart are the high ones of the words, and would not reach all of the product's.
        let high = u64::from(key.ports) << 8 | u64::from(key.protocol.0);
        let hash =
            (key.addresses.swap_bytes() ^ high.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let mask = u64::try_from(self.lines.len()).unwrap_or_default().wrapping_sub(1);
        u32::try_from(hash & mask).unwrap_or_default()
    }
}

/// The other line of a pair.
const fn beside(index: u32) -> usize {
    index as usize ^ 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        let addresses = u64::from(number) << 32 | u64::from(number ^ 0x0a00_0001);
        Key { addresses: addresses.swap_bytes(), ports: number.swap_bytes(), protocol: Protocol::UDP }
    }

    /// Of as many flows as there is room for by the promise, hardly one is missing; of many more, the lines are full.
    #[test]
    fn knows_what_it_was_told_and_forgets_it_all() {
        const FLOWS: u32 = 4096;
        let mut flows = Flows::new(FLOWS as usize);
        let known =
            |flows: &Flows, count| (0..count).filter(|number| flows.get(key(*number)).is_some()).count();
        for number in 0..10 * FLOWS {
            assert_eq!(flows.get(key(number)), None);
            flows.put(key(number), number + 7);
            assert_eq!(flows.get(key(number)), Some(number + 7));
            if number == FLOWS {
                let known = known(&flows, FLOWS);
                assert!(known > 4080, "{known}");
            }
        }
        let known = known(&flows, 10 * FLOWS);
        assert!(known > 8000 && known <= 8192, "{known}");
        let last = key(10 * FLOWS - 1);
        for other in [
            Key { ports: 1, ..last },
            Key { protocol: Protocol::TCP, ..last },
            Key { addresses: 1, ..last },
            Key { addresses: 1 << 32, ..last },
        ] {
            assert_eq!(flows.get(other), None);
        }
        flows.forget();
        assert!((0..10 * FLOWS).all(|number| flows.get(key(number)).is_none()));
    }

    /// DP-2: after all numbers were used nothing from before is believed, wherever in the table and whenever it was entered; none
    /// is used up where there is nothing to forget.
    #[test]
    fn dp_2_epochs_come_again() {
        for flows in [4, 100, 250, 252, 254, 1000] {
            let mut flows = Flows::new(flows);
            (0..1000).for_each(|_| flows.forget());
            assert_eq!(flows.epoch, 1);
            for change in 0..4 * Place::LAST_EPOCH {
                // A few at a time, others each time, so that lines keep what was entered long ago.
                for n in 0..3 {
                    let key = key(u32::try_from(change * 3 + n).unwrap() % 700);
                    assert_eq!(flows.get(key), None, "{change}");
                    flows.put(key, 1);
                    assert_eq!(flows.get(key), Some(1));
                }
                assert_eq!(flows.epoch, change % Place::LAST_EPOCH + 1);
                flows.forget();
                assert!((0..700).all(|number| flows.get(key(number)).is_none()), "{change}");
            }
        }
    }
}
