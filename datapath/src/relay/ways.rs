//! The usual translations, ready to be written: IPv4, ESP, no UDP on either side.
//!
//! One cache line holds all that a packet of one direction needs and its counters; one more leads there. What is in
//! the way of a translation (another sender, a TTL that ran out) is not told apart here: the caller goes the long way
//! then, which finds the reason.

use std::net::{IpAddr, Ipv4Addr};

use postern_contract::relay::Partition;
use postern_wire::{checksum, ip4};

use crate::prefetch;

/// No translation.
pub const NONE: u32 = u32::MAX;

/// What a packet is found by: SPI and the relay's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// Of an IPv4 packet whose ESP header is at `at`.
    #[inline]
    pub fn of(packet: &[u8], at: usize) -> Option<Self> {
        let head = packet.first_chunk::<{ ip4::MIN_LEN }>()?;
        let [first, .., a, b, c, d] = *head;
        let spi = packet.get(at..)?.first_chunk().map(|spi| u32::from_be_bytes(*spi))?;
        (first >> 4 == 4).then_some(Self::new(spi, u32::from_be_bytes([a, b, c, d])))
    }

    fn new(spi: u32, relay: u32) -> Self {
        Self(u64::from(spi) << 32 | u64::from(relay))
    }
}

/// One direction of an entry.
#[derive(Debug)]
#[repr(align(64))]
struct Way {
    key: Key,
    /// Where packets must come from.
    peer: u32,
    new_spi: u32,
    new_relay: u32,
    new_peer: u32,
    /// What the new addresses and the TTL less one change in the sum under the header's checksum.
    change: u64,
    packets: u64,
    bytes: u64,
}

const _: () = assert!(size_of::<Way>() == 64);

/// All usual translations of one worker.
#[derive(Debug, Default)]
pub struct Ways {
    all: Vec<Way>,
    free: Vec<u32>,
    slots: Slots,
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
        let way = Way {
            key: Key::new(old.to_relay.0, relay),
            peer,
            new_spi: new.from_relay.0,
            new_relay,
            new_peer,
            change: u64::from(checksum::fold(change + ttl)),
            packets: 0,
            bytes: 0,
        };
        let key = way.key;
        let index = if let Some(index) = self.free.pop() {
            *self.all.get_mut(usize::try_from(index).ok()?)? = way;
            index
        } else {
            let index = u32::try_from(self.all.len()).ok().filter(|index| *index != NONE)?;
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

    /// Translates a packet whose ESP header is at `at`, and tells its new destination. `None`, and the packet as it
    /// was, if it does not come from where it should or may not go on.
    #[inline]
    pub fn translate(&mut self, index: u32, packet: &mut [u8], at: usize) -> Option<Ipv4Addr> {
        let len = packet.len() as u64;
        let way = self.way_mut(index)?;
        let (head, rest) = packet.split_first_chunk_mut::<{ ip4::MIN_LEN }>()?;
        let spi = rest.get_mut(at.checked_sub(ip4::MIN_LEN)?..)?.first_chunk_mut::<4>()?;
        let [_, _, _, _, _, _, _, _, ttl, _, c0, c1, source @ .., _, _, _, _] = head;
        if u32::from_be_bytes(*source) != way.peer || *ttl <= 1 {
            return None;
        }
        *ttl -= 1;
        // RFC 1624 section 3, equation 3, for all words that change at once.
        let check = checksum::finish(u64::from(!u16::from_be_bytes([*c0, *c1])) + way.change);
        [*c0, *c1] = check.to_be_bytes();
        *source = way.new_relay.to_be_bytes();
        *head.last_chunk_mut()? = way.new_peer.to_be_bytes();
        *spi = way.new_spi.to_be_bytes();
        way.packets += 1;
        way.bytes += len;
        Some(Ipv4Addr::from_bits(way.new_peer))
    }

    fn way_mut(&mut self, index: u32) -> Option<&mut Way> {
        usize::try_from(index).ok().and_then(|index| self.all.get_mut(index))
    }
}

/// Open addressing with linear probing, at most half full: hash maps have no way to ask for a place in advance.
#[derive(Debug)]
struct Slots {
    /// A power of two of them.
    slots: Box<[Slot]>,
    used: usize,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    key: Key,
    /// [`NONE`]: empty.
    way: u32,
}

const EMPTY: Slot = Slot { key: Key(0), way: NONE };

impl Default for Slots {
    fn default() -> Self {
        Self { slots: vec![EMPTY; 64].into(), used: 0 }
    }
}

impl Slots {
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
            let larger = vec![EMPTY; self.slots.len() * 2].into();
            for slot in std::mem::replace(&mut self.slots, larger) {
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
            prop_assert_eq!(ways.find(Key::of(&packet, 20).unwrap()), Some(way));
            let before = packet.clone();
            let done = ways.translate(way, &mut packet, 20);
            if ttl <= 1 {
                prop_assert_eq!(done, None);
                prop_assert_eq!(packet, before);
                return Ok(());
            }
            ip4::decrement_ttl(&mut expected).unwrap();
            let (source, destination) = (Ipv4Addr::from_bits(new_relay), Ipv4Addr::from_bits(new_peer));
            ip4::set_addresses(&mut expected, source, destination).unwrap();
            expected[20..24].copy_from_slice(&10_u32.to_be_bytes());
            prop_assert_eq!(done, Some(destination));
            prop_assert_eq!(packet, expected);
            prop_assert_eq!(ways.take(way), (1, 20 + payload as u64));
            prop_assert_eq!(ways.find(Key::of(&before, 20).unwrap()), None);
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
        let mut packet = vec![0x45; 40];
        assert_eq!(ways.translate(way, &mut packet, 20), None);
        assert_eq!(packet, [0x45; 40]);
        assert_eq!(ways.translate(way, &mut packet, 4), None);
        assert_eq!(ways.translate(9, &mut packet, 20), None);
        assert_eq!(Key::of(&packet, 37), None);
        assert_eq!(ways.put(&Partition { ah: from.esp, ..from }, &to), None);
        assert_eq!(ways.put(&Partition { relay: "::1".parse().unwrap(), ..from }, &to), None);
    }
}
