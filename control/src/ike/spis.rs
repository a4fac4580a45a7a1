//! Inbound SPIs, which are ours to choose (DESIGN decision 4): the low bits of each name a slot of the datapath's table,
//! so that a lookup is one array access; the upper bits are random, so that an old packet rarely finds a new SA.

use std::collections::HashSet;

use postern_ike::Random;

/// SPIs 0 to 255 are reserved (RFC 4303 section 2.1).
const RESERVED: u32 = 255;

/// Random attempts before the slots are searched one by one.
const ATTEMPTS: usize = 8;

/// Which SPIs are in use.
#[derive(Debug)]
pub struct Spis {
    /// The SPI in each slot, 0 if it is free.
    slots: Box<[u32]>,
    free: usize,
    /// SPIs whose slot another one has.
    more: HashSet<u32>,
}

impl Spis {
    /// For a table of `slots` slots (`datapath.sa_slots`).
    pub fn new(slots: u32) -> Self {
        let slots = usize::try_from(slots.next_power_of_two().max(64)).unwrap_or(64);
        Self { slots: vec![0; slots].into(), free: slots, more: HashSet::new() }
    }

    fn slot(&mut self, spi: u32) -> Option<&mut u32> {
        // The length is a power of two.
        let index = usize::try_from(spi).unwrap_or_default() & (self.slots.len() - 1);
        self.slots.get_mut(index)
    }

    /// Whether `spi` is in use.
    pub fn is_taken(&mut self, spi: u32) -> bool {
        self.more.contains(&spi) || self.slot(spi).is_some_and(|slot| *slot == spi)
    }

    /// Marks an SPI as used that was not chosen here.
    pub fn reserve(&mut self, spi: u32) {
        match self.slot(spi) {
            Some(slot) if *slot == 0 => {
                *slot = spi;
                self.free -= 1;
            }
            Some(slot) if *slot == spi => {}
            _ => {
                self.more.insert(spi);
            }
        }
    }

    /// An SPI that is not in use, alone in its slot as long as there are free ones.
    pub fn allocate(&mut self, random: &mut dyn Random) -> u32 {
        loop {
            let mut spi = random.u32();
            for _ in 0..ATTEMPTS {
                if self.slot(spi).is_some_and(|slot| *slot == 0) {
                    break;
                }
                spi = random.u32();
            }
            if self.free > 0 && self.slot(spi).is_some_and(|slot| *slot != 0) {
                spi = self.search(spi);
            }
            if spi > RESERVED && !self.is_taken(spi) {
                self.reserve(spi);
                return spi;
            }
        }
    }

    /// `spi` with the low bits of the next free slot.
    fn search(&self, spi: u32) -> u32 {
        let mask = self.slots.len() - 1;
        let from = usize::try_from(spi).unwrap_or_default() & mask;
        let free = (0..self.slots.len()).map(|step| (from + step) & mask);
        let found = free.into_iter().find(|index| self.slots.get(*index) == Some(&0)).unwrap_or(from);
        let low = |index: usize| u32::try_from(index).unwrap_or_default();
        spi & !low(mask) | low(found)
    }

    /// The SPI is free again.
    pub fn release(&mut self, spi: u32) {
        if self.more.remove(&spi) {
            return;
        }
        if let Some(slot) = self.slot(spi).filter(|slot| **slot == spi && spi != 0) {
            *slot = 0;
            self.free += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ike::jobs::System;

    /// DP-2: as many SPIs as there are slots have a slot each; what was reserved is not given out.
    #[test]
    fn dp_2_each_spi_has_its_slot() {
        let mut spis = Spis::new(1 << 10);
        let mut random = System::default();
        spis.reserve(0x1000);
        spis.reserve(0x1400); // The same slot.
        let all: HashSet<u32> = (0..1023).map(|_| spis.allocate(&mut random)).collect();
        assert_eq!(all.len(), 1023);
        assert!(!all.contains(&0x1000) && !all.contains(&0x1400));
        let slots: HashSet<u32> = all.iter().map(|spi| spi & 1023).collect();
        assert_eq!(slots.len(), 1023);
        assert_eq!(spis.free, 0);
        let more: HashSet<u32> = (0..3000).map(|_| spis.allocate(&mut random)).collect();
        assert_eq!(more.len(), 3000, "more SAs than slots have SPIs too");
        assert!(more.is_disjoint(&all));
    }

    proptest! {
        /// DP-2: never 0 to 255, never twice while in use.
        #[test]
        fn dp_2_agrees_with_a_set(steps in proptest::collection::vec(any::<(bool, prop::sample::Index)>(), 1..400)) {
            let mut spis = Spis::new(64);
            let mut model: HashSet<u32> = HashSet::new();
            let mut random = System::default();
            for (take, which) in steps {
                if take || model.is_empty() {
                    let spi = spis.allocate(&mut random);
                    prop_assert!(spi > RESERVED);
                    prop_assert!(model.insert(spi));
                } else {
                    let mut all: Vec<u32> = model.iter().copied().collect();
                    all.sort_unstable();
                    let spi = *which.get(&all);
                    model.remove(&spi);
                    spis.release(spi);
                    prop_assert!(!spis.is_taken(spi));
                }
                prop_assert!(model.iter().all(|spi| spis.is_taken(*spi)));
            }
        }
    }
}
