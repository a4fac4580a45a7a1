//! The outbound SAs of the flows that a worker saw last, so that not every packet is looked up in the SPD.
//!
//! A table in front of [`Spd`](crate::spd::Spd). Every change of a policy makes all of it worthless
//! at once, by a number that entries have in common; so it never knows anything that the SPD does not.

use crate::prefetch;
use crate::sad::lookup::Handle;

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
    source: u32,
    destination: u32,
    ports: u32,
    /// The protocol above the index of the SA, of which a handle has 24 bits.
    sa: u32,
    /// Of the policies that it was found by; 0 for none.
    epoch: u32,
}

const EMPTY: Place = Place { source: 0, destination: 0, ports: 0, sa: 0, epoch: 0 };

/// A cache line: the flow that was entered last, and those before it.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line([Place; 3]);

const _: () = assert!(size_of::<Line>() == 64);

impl Place {
    fn new(key: Key, sa: u32, epoch: u32) -> Self {
        let Key { source, destination, ports, protocol } = key;
        Self { source, destination, ports, sa: u32::from(protocol) << 24 | sa & Handle::MAX_INDEX, epoch }
    }

    #[inline]
    fn is_of(&self, key: Key, epoch: u32) -> bool {
        // All at once: none of these is likelier to differ than another.
        let difference = self.source ^ key.source
            | self.destination ^ key.destination
            | self.ports ^ key.ports
            | self.sa >> 24 ^ u32::from(key.protocol)
            | self.epoch ^ epoch;
        difference == 0
    }
}

/// Flows and their SAs.
#[derive(Debug)]
pub struct Flows {
    /// Their number is a power of two.
    lines: Box<[Line]>,
    epoch: u32,
}

impl Flows {
    /// With places for at least three times so many flows.
    pub fn new(lines: usize) -> Self {
        let lines = lines.next_power_of_two();
        let mut table = prefetch::table(lines);
        table.resize(lines, Line([EMPTY; 3]));
        Self { lines: table.into(), epoch: 1 }
    }

    /// Asks for the memory of a flow.
    #[inline]
    pub fn prefetch(&self, key: Key) {
        if let Some(line) = self.lines.get(self.index(key)) {
            prefetch::object(line);
        }
    }

    /// The index of the flow's SA, if it is known.
    #[inline]
    pub fn get(&self, key: Key) -> Option<u32> {
        let Line(places) = self.lines.get(self.index(key))?;
        let place = places.iter().find(|place| place.is_of(key, self.epoch))?;
        Some(place.sa & Handle::MAX_INDEX)
    }

    /// Remembers the flow's SA.
    pub fn put(&mut self, key: Key, sa: u32) {
        let (index, epoch) = (self.index(key), self.epoch);
        if let Some(Line([first, second, third])) = self.lines.get_mut(index) {
            (*second, *third) = (*first, *second);
            *first = Place::new(key, sa, epoch);
        }
    }

    /// A policy changed.
    pub fn forget(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            // Entries of the last round's epochs would come to life again.
            *self = Self::new(self.lines.len());
        }
    }

    #[inline]
    fn index(&self, key: Key) -> usize {
        // Fibonacci hashing of everything that tells flows apart. A mask: the number of lines is a power of two.
        let low = u64::from(key.source) << 32 | u64::from(key.destination);
        let high = u64::from(key.ports) << 8 | u64::from(key.protocol);
        let hash = (low ^ high.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        usize::try_from(hash).unwrap_or_default() & (self.lines.len() - 1)
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
        const LINES: usize = 1024;
        let mut flows = Flows::new(LINES);
        for number in 0..10_000 {
            assert_eq!(flows.get(key(number)), None);
            flows.put(key(number), number + 7);
            assert_eq!(flows.get(key(number)), Some(number + 7));
        }
        let known = (0..10_000).filter(|number| flows.get(key(*number)).is_some()).count();
        assert!(known > 2 * LINES && known <= 3 * LINES, "{known}");
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
