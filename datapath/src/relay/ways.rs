//! The usual translations, ready to be written: IPv4, ESP, no UDP on either side.
//!
//! One cache line holds all that a packet of one direction needs and its counters; one more leads there. What is in
//! the way of a translation (another sender, a TTL that ran out) is not told apart here: the caller goes the long way
//! then, which finds the reason.

use std::net::{IpAddr, Ipv4Addr};

use postern_contract::relay::Partition;
use postern_wire::{checksum, ip4};

use crate::fib::ExitName;
use crate::prefetch::{self, Table};

/// No translation.
pub const NONE: u32 = u32::MAX;

/// Bytes of an IPv4 header without options and the SPI behind it: all that a translation reads and writes.
pub const HEAD: usize = ip4::MIN_LEN + 4;

/// What a packet is found by: SPI and the relay's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// Of an ESP packet over IPv4.
    #[inline]
    pub const fn new(spi: u32, relay: u32) -> Self {
        Self((spi as u64) << 32 | relay as u64)
    }
}

/// One direction of an entry.
#[derive(Debug)]
#[repr(align(64))]
pub struct Way {
    key: Key,
    packets: u64,
    bytes: u64,
    /// How packets to `new_peer` left last.
    pub exit: ExitName,
    /// Where packets must come from.
    peer: u32,
    /// What follows the checksum from then on, as it stands in the packet: source, destination, SPI.
    new: [u8; 12],
    /// What the new addresses and the TTL less one change in the sum under the header's checksum.
    change: u16,
}

impl Way {
    /// The new destination.
    #[inline]
    pub const fn destination(&self) -> Ipv4Addr {
        let [_, _, _, _, a, b, c, d, ..] = self.new;
        Ipv4Addr::new(a, b, c, d)
    }

    /// Whether a packet comes from where it should and may go on.
    #[inline]
    pub fn fits(&self, head: &[u8; HEAD]) -> bool {
        let [_, _, _, _, _, _, _, _, ttl, _, _, _, s0, s1, s2, s3, ..] = *head;
        u32::from_be_bytes([s0, s1, s2, s3]) == self.peer && ttl > 1
    }

    /// Translates a packet of `len` bytes that fits.
    #[inline]
    pub fn translate(&mut self, head: &mut [u8; HEAD], len: usize) {
        let [_, _, _, _, _, _, _, _, ttl, _, c0, c1, rest @ ..] = head;
        *ttl = ttl.wrapping_sub(1);
        // RFC 1624 section 3, equation 3, for all words that change at once.
        let check = checksum::finish(u64::from(!u16::from_be_bytes([*c0, *c1])) + u64::from(self.change));
        [*c0, *c1] = check.to_be_bytes();
        *rest = self.new;
        self.packets += 1;
        self.bytes += len as u64;
    }
}

const _: () = assert!(size_of::<Way>() == 64);

/// All usual translations of one worker.
#[derive(Debug)]
pub struct Ways {
    all: Table<Way>,
    free: Vec<u32>,
    slots: Slots,
}

impl Default for Ways {
    fn default() -> Self {
        Self { all: prefetch::table(0), free: Vec::new(), slots: Slots::default() }
    }
}

impl Ways {
    /// Adds the translation of packets that look like `from` to `to`, if it is a usual one. The keys of translations
    /// differ.
    pub fn put(&mut self, from: &Partition, to: &Partition) -> Option<u32> {
        let v4 = |address| match address {
            IpAddr::V4(address) => Some(Ipv4Addr::to_bits(address)),
            IpAddr::V6(_) => None,
        };
        let unusual = [from, to].iter().any(|side| side.ah.is_some() || side.encap.is_some());
        let (old, new) = from.esp.zip(to.esp).filter(|_| !unusual)?;
        let (relay, peer) = (v4(from.relay)?, v4(from.peer)?);
        let (new_relay, new_peer) = (v4(to.relay)?, v4(to.peer)?);
        let ttl = u64::from(!0x0100_u16);
        let change = [!relay, !peer, new_relay, new_peer].iter().map(|word| u64::from(*word)).sum::<u64>();
        let mut written = [0; 12];
        let words = [new_relay, new_peer, new.from_relay.0];
        for (place, word) in written.as_chunks_mut().0.iter_mut().zip(words) {
            *place = word.to_be_bytes();
        }
        let way = Way {
            key: Key::new(old.to_relay.0, relay),
            peer,
            new: written,
            change: checksum::fold(change + ttl),
            exit: ExitName::NONE,
            packets: 0,
            bytes: 0,
        };
        let key = way.key;
        let index = if let Some(index) = self.free.pop() {
            *self.all.get_mut(usize::try_from(index).ok()?)? = way;
            index
        } else {
            let index = u32::try_from(self.all.len()).ok().filter(|index| *index != NONE)?;
            if self.all.len() == self.all.capacity() {
                // On huge pages, which a vector that grows by itself would not get.
                let mut larger = prefetch::table((self.all.len() * 2).max(64));
                larger.append(&mut self.all);
                self.all = larger;
            }
            self.all.push(way);
            index
        };
        self.slots.insert(key, index);
        Some(index)
    }

    /// Takes a translation out and gives what it counted: packets and bytes.
    pub fn take(&mut self, index: u32) -> (u64, u64) {
        let Some(way) = self.way_mut(index) else { return (0, 0) };
        let (key, counted) = (way.key, (way.packets, way.bytes));
        // A key that another translation took over in the meantime stays with that one.
        if self.slots.find(key) == Some(index) {
            self.slots.remove(key);
            self.free.push(index);
        }
        counted
    }

    /// What a translation counted: packets and bytes.
    pub fn counted(&self, index: u32) -> (u64, u64) {
        let way = usize::try_from(index).ok().and_then(|index| self.all.get(index));
        way.map_or((0, 0), |way| (way.packets, way.bytes))
    }

    /// Asks for the memory that [`Self::find`] looks at.
    #[inline]
    pub fn prefetch(&self, key: Key) {
        if let Some(slot) = self.slots.slots.get(self.slots.home(key)) {
            prefetch::object(slot);
        }
    }

    /// Where the translation is, and asks for its memory.
    #[inline]
    pub fn find(&self, key: Key) -> Option<u32> {
        let index = self.slots.find(key)?;
        if let Some(way) = usize::try_from(index).ok().and_then(|index| self.all.get(index)) {
            prefetch::object(way);
        }
        Some(index)
    }

    /// The translation at an index.
    #[inline]
    pub fn get_mut(&mut self, index: u32) -> Option<&mut Way> {
        self.way_mut(index)
    }

    #[inline]
    fn way_mut(&mut self, index: u32) -> Option<&mut Way> {
        usize::try_from(index).ok().and_then(|index| self.all.get_mut(index))
    }
}

/// Open addressing with linear probing, at most half full: hash maps have no way to ask for a place in advance.
#[derive(Debug)]
struct Slots {
    /// A power of two of them.
    slots: Table<Slot>,
    used: usize,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(16))]
struct Slot {
    key: Key,
    /// [`NONE`]: empty.
    way: u32,
}

const EMPTY: Slot = Slot { key: Key(0), way: NONE };

impl Default for Slots {
    fn default() -> Self {
        Self { slots: Slots::of(64), used: 0 }
    }
}

impl Slots {
    /// So many that are empty.
    fn of(count: usize) -> Table<Slot> {
        let mut slots = prefetch::table(count);
        slots.resize(count, EMPTY);
        slots
    }

    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    /// The place of a key that no other one took. The relay chooses its SPIs itself and counts up: neighbours get
    /// different places (Fibonacci hashing).
    #[inline]
    fn home(&self, key: Key) -> usize {
        let hash = key.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(hash).unwrap_or_default() & self.mask()
    }

    /// Where the key is, or the empty slot where it would be.
    #[inline]
    fn place(&self, key: Key) -> usize {
        let mut at = self.home(key);
        // Ends: at least half of the slots are empty.
        while let Some(slot) = self.slots.get(at)
            && slot.way != NONE
            && slot.key != key
        {
            at = (at + 1) & self.mask();
        }
        at
    }

    #[inline]
    fn find(&self, key: Key) -> Option<u32> {
        self.slots.get(self.place(key)).map(|slot| slot.way).filter(|way| *way != NONE)
    }

    fn insert(&mut self, key: Key, way: u32) {
        if (self.used + 1) * 2 > self.slots.len() {
            let count = self.slots.len() * 2;
            for slot in std::mem::replace(&mut self.slots, Self::of(count)) {
                if slot.way != NONE {
                    self.set(self.place(slot.key), slot);
                }
            }
        }
        let at = self.place(key);
        self.used += usize::from(self.slots.get(at).is_some_and(|slot| slot.way == NONE));
        self.set(at, Slot { key, way });
    }

    /// Takes a key out and closes the gap, so that no search ends too early.
    fn remove(&mut self, key: Key) -> bool {
        let mut gap = self.place(key);
        if self.slots.get(gap).is_none_or(|slot| slot.way == NONE) {
            return false;
        }
        self.used -= 1;
        let mut at = gap;
        loop {
            at = (at + 1) & self.mask();
            let Some(slot) = self.slots.get(at).copied().filter(|slot| slot.way != NONE) else { break };
            // It may move to the gap if that is not before its home: distances count around the table's end.
            let (from_home, from_gap) =
                (at.wrapping_sub(self.home(slot.key)) & self.mask(), at.wrapping_sub(gap) & self.mask());
            if from_home >= from_gap {
                self.set(gap, slot);
                gap = at;
            }
        }
        self.set(gap, EMPTY);
        true
    }

    fn set(&mut self, at: usize, slot: Slot) {
        if let Some(place) = self.slots.get_mut(at) {
            *place = slot;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use postern_contract::relay::SpiPair;
    use postern_wire::ids::{Protocol, Spi};
    use proptest::prelude::*;

    use super::*;

    fn side(relay: u32, peer: u32, to_relay: u32, from_relay: u32) -> Partition {
        Partition {
            relay: Ipv4Addr::from_bits(relay).into(),
            peer: Ipv4Addr::from_bits(peer).into(),
            encap: None,
            esp: Some(SpiPair { to_relay: Spi(to_relay), from_relay: Spi(from_relay) }),
            ah: None,
        }
    }

    proptest! {
        /// RLY-1: what one step writes is what the single changes of a header write, and a wrong checksum stays wrong.
        #[test]
        fn rly_1_translates_as_single_changes_do(
            addresses in any::<[u32; 4]>(),
            ttl in any::<u8>(),
            tos in any::<u8>(),
            payload in 8_usize..100,
            damage in any::<u16>(),
        ) {
            let [relay, peer, new_relay, new_peer] = addresses;
            let mut ways = Ways::default();
            let way = ways.put(&side(relay, peer, 7, 8), &side(new_relay, new_peer, 9, 10)).unwrap();
            let mut packet = vec![0xa5; 20 + payload];
            let (source, destination) = (Ipv4Addr::from_bits(peer), Ipv4Addr::from_bits(relay));
            let header =
                ip4::Header { source, destination, protocol: Protocol::ESP, ttl, tos, id: 3, dont_fragment: true };
            header.emit(&mut packet, payload).unwrap();
            packet[20..24].copy_from_slice(&7_u32.to_be_bytes());
            packet[10] ^= damage.to_be_bytes()[0];
            packet[11] ^= damage.to_be_bytes()[1];
            let mut expected = packet.clone();
            let key = Key::new(7, relay);
            prop_assert_eq!(ways.find(key), Some(way));
            let found = ways.get_mut(way).unwrap();
            let fits = found.fits(packet.first_chunk().unwrap());
            prop_assert_eq!(fits, ttl > 1);
            if !fits {
                return Ok(());
            }
            found.translate(packet.first_chunk_mut().unwrap(), 20 + payload);
            let done = found.destination();
            ip4::decrement_ttl(&mut expected).unwrap();
            let (source, destination) = (Ipv4Addr::from_bits(new_relay), Ipv4Addr::from_bits(new_peer));
            ip4::set_addresses(&mut expected, source, destination).unwrap();
            expected[20..24].copy_from_slice(&10_u32.to_be_bytes());
            prop_assert_eq!(done, destination);
            prop_assert_eq!(packet, expected);
            prop_assert_eq!(ways.take(way), (1, 20 + payload as u64));
            prop_assert_eq!(ways.find(key), None);
        }

        /// The table finds what a map finds, whatever shares places and however it grows.
        #[test]
        fn slots_agree_with_a_map(steps in prop::collection::vec((0_u32..200, any::<bool>(), 0_u32..4), 1..600)) {
            let mut slots = Slots::default();
            let mut model: HashMap<u64, u32> = HashMap::new();
            for (step, (spi, add, relay)) in (0_u32..).zip(steps) {
                // Multiples of a large power of two share their homes.
                let key = Key::new(spi << 22, relay);
                if add {
                    slots.insert(key, step);
                    model.insert(key.0, step);
                } else {
                    prop_assert_eq!(slots.remove(key), model.remove(&key.0).is_some());
                }
                prop_assert_eq!(slots.used, model.len());
                for (key, way) in &model {
                    prop_assert_eq!(slots.find(Key(*key)), Some(*way));
                }
                prop_assert_eq!(slots.find(key), model.get(&key.0).copied());
            }
        }
    }

    /// RLY-1: a packet that comes from elsewhere is left alone; what is not usual has no place here.
    #[test]
    fn rly_1_only_what_is_usual() {
        let mut ways = Ways::default();
        let (from, to) = (side(1, 2, 3, 4), side(5, 6, 7, 8));
        let way = ways.put(&from, &to).unwrap();
        assert!(!ways.get_mut(way).unwrap().fits(&[0x45; HEAD]));
        assert!(ways.get_mut(9).is_none());
        assert_eq!(ways.put(&Partition { ah: from.esp, ..from }, &to), None);
        assert_eq!(ways.put(&Partition { relay: "::1".parse().unwrap(), ..from }, &to), None);
    }
}
