//! The outbound SAs of the flows that a worker saw last, so that not every packet is looked up in the SPD.
//!
//! A table in front of [`Spd`](crate::spd::Spd). Every change of a policy makes all of it worthless
//! at once, by a number that entries have in common; so it never knows anything that the SPD does not.

use crate::prefetch;

/// An IPv4 flow with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Source address.
    pub source: u32,
    /// Destination address.
    pub destination: u32,
    /// Both ports, as they stand in the packet.
    pub ports: u32,
    /// TCP or UDP.
    pub protocol: u8,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    key: Key,
    sa: u32,
    /// Of the policies that it was found by; 0 for none.
    epoch: u32,
}

const EMPTY: Place = Place { key: Key { source: 0, destination: 0, ports: 0, protocol: 0 }, sa: 0, epoch: 0 };

/// A cache line: the flow that was entered last, and the one before it.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Pair([Place; 2]);

const _: () = assert!(size_of::<Pair>() == 64);

/// Flows and their SAs.
#[derive(Debug)]
pub struct Flows {
    /// Their number is a power of two.
    pairs: Box<[Pair]>,
    epoch: u32,
}

impl Flows {
    /// With at least so many pairs of places.
    pub fn new(pairs: usize) -> Self {
        let pairs = pairs.next_power_of_two();
        let mut table = prefetch::table(pairs);
        table.resize(pairs, Pair([EMPTY; 2]));
        Self { pairs: table.into(), epoch: 1 }
    }

    /// Asks for the memory of a flow.
    #[inline]
    pub fn prefetch(&self, key: Key) {
        if let Some(pair) = self.pairs.get(self.index(key)) {
            prefetch::object(pair);
        }
    }

    /// The index of the flow's SA, if it is known.
    #[inline]
    pub fn get(&self, key: Key) -> Option<u32> {
        let Pair(places) = self.pairs.get(self.index(key))?;
        let mut places = places.iter();
        places.find(|place| place.key == key && place.epoch == self.epoch).map(|place| place.sa)
    }

    /// Remembers the flow's SA.
    pub fn put(&mut self, key: Key, sa: u32) {
        let (index, epoch) = (self.index(key), self.epoch);
        if let Some(Pair([first, second])) = self.pairs.get_mut(index) {
            *second = *first;
            *first = Place { key, sa, epoch };
        }
    }

    /// A policy changed.
    pub fn forget(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            // Entries of the last round's epochs would come to life again.
            *self = Self::new(self.pairs.len());
        }
    }

    #[inline]
    fn index(&self, key: Key) -> usize {
        // Fibonacci hashing of everything that tells flows apart. A mask: the number of pairs is a power of two.
        let low = u64::from(key.source) << 32 | u64::from(key.destination);
        let high = u64::from(key.ports) << 8 | u64::from(key.protocol);
        let hash = (low ^ high.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        usize::try_from(hash).unwrap_or_default() & (self.pairs.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        Key { source: number, destination: number ^ 0x0a00_0001, ports: number << 16, protocol: 17 }
    }

    #[test]
    fn knows_what_it_was_told_and_forgets_it_all() {
        const PAIRS: usize = 1024;
        let mut flows = Flows::new(PAIRS);
        for number in 0..10_000 {
            assert_eq!(flows.get(key(number)), None);
            flows.put(key(number), number + 7);
            assert_eq!(flows.get(key(number)), Some(number + 7));
        }
        let known = (0..10_000).filter(|number| flows.get(key(*number)).is_some()).count();
        assert!(known > PAIRS && known <= 2 * PAIRS, "{known}");
        for other in [
            Key { ports: 1, ..key(9999) },
            Key { protocol: 6, ..key(9999) },
            Key { source: 1, ..key(9999) },
            Key { destination: 1, ..key(9999) },
        ] {
            assert_eq!(flows.get(other), None);
        }
        flows.forget();
        assert!((0..10_000).all(|number| flows.get(key(number)).is_none()));
    }

    /// After all numbers were used nothing from before is believed.
    #[test]
    fn epochs_wrap() {
        let mut flows = Flows { epoch: u32::MAX, ..Flows::new(4) };
        flows.put(key(1), 1);
        flows.forget();
        assert_eq!((flows.get(key(1)), flows.epoch), (None, 1));
    }
}
