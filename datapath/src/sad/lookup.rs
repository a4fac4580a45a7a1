//! From (protocol, SPI) to the SA: one array access, because inbound SPIs are ours to choose (DESIGN decision 4).
//!
//! Control gives the SPIs of different SAs different low bits, so that nearly all sit alone in their slot. What does
//! not (keys from a file, SAs taken over from another gateway, more SAs than slots) is found in a hash map.

use hashbrown::HashMap;
use postern_contract::sa::IpsecProtocol;
use postern_wire::ids::Spi;

use crate::prefetch::{self, Table};

/// Which worker has an object, and at which index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle(u32);

impl Handle {
    /// Largest number of workers.
    pub const MAX_WORKERS: usize = 255;
    /// Largest index.
    pub const MAX_INDEX: u32 = (1 << 24) - 1;
    const NONE: u32 = u32::MAX;
    /// Of something that has no place yet.
    pub const NOWHERE: Self = Self(Self::NONE);

    /// `None` where a part is too large.
    pub fn new(worker: u8, index: u32) -> Option<Self> {
        (usize::from(worker) < Self::MAX_WORKERS && index <= Self::MAX_INDEX)
            .then(|| Self(u32::from(worker) << 24 | index))
    }

    /// The worker.
    pub const fn worker(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// The index in that worker's table.
    pub const fn index(self) -> u32 {
        self.0 & Self::MAX_INDEX
    }
}

/// One slot. An empty slot has the SPI 0, which no packet is looked up with.
#[derive(Clone, Copy)]
#[repr(align(8))]
struct Slot {
    spi: u32,
    handle: u32,
}

const EMPTY: Slot = Slot { spi: 0, handle: Handle::NONE };

/// SPI table of one worker; knows the SAs of all workers. ESP has the slots, AH (rare) the map.
pub struct SpiTable {
    slots: Table<Slot>,
    /// Slots that are not empty.
    used: usize,
    overflow: HashMap<(u8, u32), u32>,
}

const fn protocol_key(protocol: IpsecProtocol) -> u8 {
    match protocol {
        IpsecProtocol::Esp => 50,
        IpsecProtocol::Ah => 51,
    }
}

impl SpiTable {
    /// A table of `slots` slots, a power of two.
    pub fn new(slots: u32) -> Self {
        let count = slots.next_power_of_two().max(64) as usize;
        let mut slots = prefetch::table(count);
        slots.resize(count, EMPTY);
        Self { slots, used: 0, overflow: HashMap::new() }
    }

    /// Whether no SPI leads anywhere.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.used == 0 && self.overflow.is_empty()
    }

    /// Asks for the memory that [`Self::get`] looks at for an ESP packet.
    #[inline]
    pub fn prefetch(&self, spi: Spi) {
        if let Some(slot) = self.slots.get(self.slot(spi)) {
            prefetch::object(slot);
        }
    }

    #[inline]
    fn slot(&self, spi: Spi) -> usize {
        // The length is a power of two, so this is a mask; it keeps the index in range by itself.
        spi.0 as usize & (self.slots.len() - 1)
    }

    /// Who has the SA of `spi`.
    #[inline]
    pub fn get(&self, protocol: IpsecProtocol, spi: Spi) -> Option<Handle> {
        if protocol == IpsecProtocol::Esp
            && let Some(slot) = self.slots.get(self.slot(spi))
            && slot.spi == spi.0
            && slot.handle != Handle::NONE
        {
            return Some(Handle(slot.handle));
        }
        if self.overflow.is_empty() {
            return None;
        }
        self.overflow.get(&(protocol_key(protocol), spi.0)).map(|handle| Handle(*handle))
    }

    /// Enters `spi`; replaces what it led to.
    pub fn insert(&mut self, protocol: IpsecProtocol, spi: Spi, handle: Handle) {
        let at = self.slot(spi);
        if protocol == IpsecProtocol::Esp
            && let Some(slot) = self.slots.get_mut(at)
            && (slot.handle == Handle::NONE || slot.spi == spi.0)
        {
            self.used += usize::from(slot.handle == Handle::NONE);
            *slot = Slot { spi: spi.0, handle: handle.0 };
            // An older entry of the same SPI may have been displaced into the map earlier.
            self.overflow.remove(&(protocol_key(protocol), spi.0));
            return;
        }
        self.overflow.insert((protocol_key(protocol), spi.0), handle.0);
    }

    /// Forgets `spi`.
    pub fn remove(&mut self, protocol: IpsecProtocol, spi: Spi) {
        let at = self.slot(spi);
        if protocol == IpsecProtocol::Esp
            && let Some(slot) = self.slots.get_mut(at)
            && slot.spi == spi.0
        {
            self.used -= usize::from(slot.handle != Handle::NONE);
            *slot = EMPTY;
        }
        self.overflow.remove(&(protocol_key(protocol), spi.0));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap as Model;

    use proptest::prelude::*;

    use super::*;

    fn protocol() -> impl Strategy<Value = IpsecProtocol> {
        prop_oneof![Just(IpsecProtocol::Esp), Just(IpsecProtocol::Ah)]
    }

    #[test]
    fn handles_keep_both_parts() {
        let handle = Handle::new(254, Handle::MAX_INDEX).unwrap();
        assert_eq!((handle.worker(), handle.index()), (254, Handle::MAX_INDEX));
        assert!(Handle::new(255, 0).is_none());
        assert!(Handle::new(0, Handle::MAX_INDEX + 1).is_none());
    }

    proptest! {
        /// MOB-2, DP-2: a packet finds its SA by SPI, whatever shares the slot.
        #[test]
        fn mob_2_agrees_with_a_map(
            operations in prop::collection::vec((protocol(), 256u32..1024, prop::option::of(0u32..1000)), 1..200)
        ) {
            let mut table = SpiTable::new(64);
            let mut model = Model::new();
            for (protocol, spi, value) in operations {
                if let Some(index) = value {
                    let handle = Handle::new(0, index).unwrap();
                    table.insert(protocol, Spi(spi), handle);
                    model.insert((protocol, spi), handle);
                } else {
                    table.remove(protocol, Spi(spi));
                    model.remove(&(protocol, spi));
                }
                prop_assert_eq!(table.is_empty(), model.is_empty());
                for spi in 256..1024 {
                    for protocol in [IpsecProtocol::Esp, IpsecProtocol::Ah] {
                        prop_assert_eq!(table.get(protocol, Spi(spi)), model.get(&(protocol, spi)).copied());
                    }
                }
            }
        }
    }
}
