//! The outbound SAs of the flows that a worker saw last, so that not every packet is looked up in the SPD.
//!
//! A table in front of [`Spd`](crate::spd::Spd). Every change of a policy makes all of it worthless
//! at once, by a number that entries have in common; so it never knows anything that the SPD does not.
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
    /// Source address.
    pub source: u32,
    /// Destination address.
    pub destination: u32,
    /// Both ports.
    pub ports: u32,
    /// TCP or UDP; others are not told from TCP.
    pub protocol: Protocol,
}

/// The flows of a cache line: the one that was entered last, and those before it. A line is small for the sake of what
/// there is to fetch, and of the page tables.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line {
    sources: [u32; PLACES],
    destinations: [u32; PLACES],
    ports: [u32; PLACES],
    tags: [Tag; PLACES],
}

/// Flows of a line.
const PLACES: usize = 4;

/// From the top: 7 bits of the policies that the flow was found by (0 for none), one of the protocol, and the index of the SA,
/// of which a handle has 24 bits.
#[derive(Clone, Copy, Debug)]
struct Tag(u32);

impl Tag {
    const SA: u32 = Handle::MAX_INDEX;
    const UDP: u32 = 1 << 24;
    const EPOCH: u32 = 25;
    const LAST_EPOCH: u32 = u32::MAX >> Self::EPOCH;

    /// Without an SA.
    #[inline]
    fn new(epoch: u32, protocol: Protocol) -> Self {
        Self(epoch << Self::EPOCH | if protocol == Protocol::UDP { Self::UDP } else { 0 })
    }
}

const EMPTY: Line =
    Line { sources: [0; PLACES], destinations: [0; PLACES], ports: [0; PLACES], tags: [Tag(0); PLACES] };

const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    /// The SA of a flow, if it is in the line.
    #[inline]
    fn find(&self, key: Key, epoch: u32) -> Option<u32> {
        let Self { sources, destinations, ports, tags } = self;
        let Key { source, destination, ports: both, protocol } = key;
        let wanted = Tag::new(epoch, protocol).0;
        // All places and all of each at once, in vectors: none is likelier to be it than another.
        let mut differences = tags.map(|Tag(tag)| (tag ^ wanted) & !Tag::SA);
        for (words, word) in [(sources, source), (destinations, destination), (ports, both)] {
            for (difference, there) in differences.iter_mut().zip(words) {
                *difference |= *there ^ word;
            }
        }
        let hits = differences.map(|difference| if difference == 0 { u32::MAX } else { 0 });
        let hits = hits.iter().zip([1, 2, 4, 8]).fold(0_u32, |hits, (hit, bit)| hits | hit & bit);
        let place = usize::try_from(hits.trailing_zeros()).unwrap_or(PLACES);
        tags.get(place).map(|Tag(tag)| *tag & Tag::SA)
    }

    /// Whether all of its flows are known by these policies.
    #[inline]
    fn is_full(&self, epoch: u32) -> bool {
        self.tags.iter().all(|Tag(tag)| *tag >> Tag::EPOCH == epoch)
    }
}

/// Flows and their SAs.
#[derive(Debug)]
pub struct Flows {
    /// Their number is a power of two.
    lines: Table<Line>,
    epoch: u32,
    /// Whether any flow is known by the policies as they are.
    used: bool,
}

impl Flows {
    /// With places for at least twice so many flows.
    pub fn new(flows: usize) -> Self {
        let lines = (flows * 2 / PLACES).next_power_of_two().max(2);
        let mut table = prefetch::table(lines);
        table.resize(lines, EMPTY);
        Self { lines: table, epoch: 1, used: false }
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
            enter(&mut line.sources, key.source);
            enter(&mut line.destinations, key.destination);
            enter(&mut line.ports, key.ports);
            enter(&mut line.tags, Tag(Tag::new(epoch, key.protocol).0 | sa & Tag::SA));
        }
    }

    /// A policy changed.
    pub fn forget(&mut self) {
        if !self.used {
            return;
        }
        if self.epoch == Tag::LAST_EPOCH {
            // Entries of the last round's epochs would come to life again.
            self.lines.fill(EMPTY);
            self.epoch = 0;
        }
        self.epoch += 1;
        self.used = false;
    }

    #[inline]
    fn index(&self, key: Key) -> u32 {
        // Fibonacci hashing of everything that tells flows apart. A mask: the number of lines is a power of two. The bits that
        // tell neighbours apart are the high ones of the words, and would not reach all of the product's.
        let low = u64::from(key.source.swap_bytes()) << 32 | u64::from(key.destination.swap_bytes());
        let high = u64::from(key.ports) << 8 | u64::from(key.protocol.0);
        let hash = (low ^ high.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
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
    places.rotate_right(1);
    if let Some(first) = places.first_mut() {
        *first = word;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        let [source, destination, ports] = [number, number ^ 0x0a00_0001, number].map(u32::swap_bytes);
        Key { source, destination, ports, protocol: Protocol::UDP }
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
            Key { source: 1, ..last },
            Key { destination: 1, ..last },
        ] {
            assert_eq!(flows.get(other), None);
        }
        flows.forget();
        assert!((0..10 * FLOWS).all(|number| flows.get(key(number)).is_none()));
    }

    /// After all numbers were used nothing from before is believed; none is used up where there is nothing to forget.
    #[test]
    fn epochs_wrap() {
        let mut flows = Flows::new(4);
        (0..1000).for_each(|_| flows.forget());
        assert_eq!(flows.epoch, 1);
        for epoch in (2..=Tag::LAST_EPOCH).chain(1..=3) {
            flows.put(key(1), 1);
            assert_eq!(flows.get(key(1)), Some(1));
            flows.forget();
            assert_eq!((flows.get(key(1)), flows.epoch), (None, epoch));
        }
    }
}
