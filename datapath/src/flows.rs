//! The outbound SAs of the flows that a worker saw last, so that not every packet is looked up in the SPD.
//!
//! A table in front of [`Spd`](crate::spd::Spd). Every change of a policy makes all of it worthless
//! at once, by a number that entries have in common; so it never knows anything that the SPD does not.
//!
//! A flow is in the line of its hash, or if that was full in the one beside it. Without the second one, of as many flows as
//! there are lines every 24th would be in a line with too many, and asking the policies costs a dozen times as much as
//! asking here.

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
    /// TCP or UDP.
    pub protocol: u8,
}

/// The flows of a cache line: the one that was entered last, and those before it.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line {
    addresses: [u64; PLACES],
    ports: [u32; PLACES],
    /// The protocol above the index of the SA, of which a handle has 24 bits.
    sas: [u32; PLACES],
    /// Of the policies that they were found by; 0 for none.
    epochs: [u32; PLACES],
}

/// Flows of a line.
const PLACES: usize = 3;

const EMPTY: Line =
    Line { addresses: [0; PLACES], ports: [0; PLACES], sas: [0; PLACES], epochs: [0; PLACES] };

const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    /// The SA of a flow, if it is in the line.
    #[inline]
    fn find(&self, key: Key, epoch: u32) -> Option<u32> {
        let Self { addresses, ports, sas, epochs } = self;
        for (((addresses, ports), sa), of) in addresses.iter().zip(ports).zip(sas).zip(epochs) {
            // All at once: none of these is likelier to differ than another.
            let others = *ports ^ key.ports | *sa >> 24 ^ u32::from(key.protocol) | *of ^ epoch;
            if *addresses ^ key.addresses | u64::from(others) == 0 {
                return Some(*sa & Handle::MAX_INDEX);
            }
        }
        None
    }

    /// Whether all of its flows are known by these policies.
    #[inline]
    fn is_full(&self, epoch: u32) -> bool {
        self.epochs.iter().all(|of| *of == epoch)
    }
}

/// Flows and their SAs.
#[derive(Debug)]
pub struct Flows {
    /// Their number is a power of two.
    lines: Table<Line>,
    epoch: u32,
}

impl Flows {
    /// With places for at least three times so many flows.
    pub fn new(lines: usize) -> Self {
        let lines = lines.next_power_of_two().max(2);
        let mut table = prefetch::table(lines);
        table.resize(lines, EMPTY);
        Self { lines: table, epoch: 1 }
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
        let Key { addresses, ports, protocol } = key;
        let is_full = |at: usize| self.lines.get(at).is_none_or(|line| line.is_full(epoch));
        let home = index as usize;
        let at = if is_full(home) && !is_full(beside(index)) { beside(index) } else { home };
        if let Some(line) = self.lines.get_mut(at) {
            enter(&mut line.addresses, addresses);
            enter(&mut line.ports, ports);
            enter(&mut line.sas, u32::from(protocol) << 24 | sa & Handle::MAX_INDEX);
            enter(&mut line.epochs, epoch);
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
    fn index(&self, key: Key) -> u32 {
        // Fibonacci hashing of everything that tells flows apart. A mask: the number of lines is a power of two. The bits that
        // tell neighbours apart are the high ones of the words, and would not reach all of the product's.
        let high = u64::from(key.ports) << 8 | u64::from(key.protocol);
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

/// Puts a word before the others; the last one falls out.
fn enter<T: Copy>(places: &mut [T; PLACES], word: T) {
    let [first, second, third] = places;
    (*second, *third) = (*first, *second);
    *first = word;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        let addresses = u64::from(number) << 32 | u64::from(number ^ 0x0a00_0001);
        Key { addresses: addresses.swap_bytes(), ports: number.swap_bytes(), protocol: 17 }
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
            Key { addresses: 1, ..key(9999) },
            Key { addresses: 1 << 32, ..key(9999) },
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
