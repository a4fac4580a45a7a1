//! Sequence numbers: the only source of ESP and AH sequence numbers, and through them of nonces (DESIGN decision 6).
//!
//! A worker owns the [`SequenceCounter`] of each outbound SA. [`SequenceCounter::reserve`] gives every number at
//! most once, as a [`Reserved`] that nobody can copy and that sealing consumes; so one number cannot seal twice.
//!
//! The counter never gives a number at or above its *ceiling*. The ceiling is made durable before it is raised
//! (DESIGN decision 8); a datapath that comes back starts at the last durable ceiling and so repeats nothing.

/// The counter of one outbound SA.
#[derive(Debug)]
pub struct SequenceCounter {
    /// The number that `reserve` gives next.
    next: u64,
    /// First number that is *not* reserved durably.
    ceiling: u64,
    /// Last number of the sequence space.
    limit: u64,
}

/// A sequence number that nobody else has. Neither `Clone` nor `Copy`.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a number that is not used is lost"]
pub struct Reserved(u64);

/// Why there is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// DP-4: the sequence space is used up; the SA must not send any more (RFC 4303 section 3.3.3).
    #[error("the sequence numbers of the SA are used up")]
    Exhausted,
    /// The numbers up to the ceiling are used up; it has to be raised first.
    #[error("no more sequence numbers are reserved; the ceiling has to be raised")]
    NotReserved,
}

impl SequenceCounter {
    /// A counter that gives `next`, `next + 1`, … below `ceiling`. RFC 4303 section 3.3.3: "the first packet sent
    /// using a given SA will contain a sequence number of 1", so a `next` of 0 is taken as 1.
    ///
    /// The last number is 2^32 - 1, with `esn` 2^64 - 2: the ceiling is exclusive and cannot pass 2^64 - 1.
    pub fn new(next: u64, ceiling: u64, esn: bool) -> Self {
        let limit = if esn { u64::MAX - 1 } else { u64::from(u32::MAX) };
        Self { next: next.max(1), ceiling, limit }
    }

    /// Takes the next number out of the counter.
    pub fn reserve(&mut self) -> Result<Reserved, ReserveError> {
        if self.next > self.limit {
            return Err(ReserveError::Exhausted);
        }
        if self.next >= self.ceiling {
            return Err(ReserveError::NotReserved);
        }
        let reserved = Reserved(self.next);
        // Cannot overflow: `next` is at most `limit`, which is below `u64::MAX`.
        self.next = self.next.saturating_add(1);
        Ok(reserved)
    }

    /// Raises the ceiling to `ceiling`, which the caller has made durable; never lowers it.
    pub fn raise(&mut self, ceiling: u64) {
        self.ceiling = self.ceiling.max(ceiling);
    }

    /// The number given last, or 0 (respectively the one before the first `next`) if there was none.
    pub fn last(&self) -> u64 {
        self.next.saturating_sub(1)
    }

    /// The first number that is not reserved durably.
    pub fn ceiling(&self) -> u64 {
        self.ceiling
    }

    /// The last number of the sequence space.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How many numbers `reserve` can still give before the ceiling has to be raised.
    pub fn remaining(&self) -> u64 {
        self.ceiling.min(self.limit.saturating_add(1)).saturating_sub(self.next)
    }
}

impl Reserved {
    /// The full 64-bit number.
    pub fn value(&self) -> u64 {
        self.0
    }

    /// The 32 bits that the packet carries.
    pub fn low(&self) -> u32 {
        let [.., a, b, c, d] = self.0.to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    /// The 32 bits that only the ICV covers (ESN, RFC 4303 section 2.2.1).
    pub fn high(&self) -> u32 {
        high(self.0)
    }
}

/// The upper 32 bits of a sequence number.
pub(super) fn high(sequence: u64) -> u32 {
    let [a, b, c, d, ..] = sequence.to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn starts_at_one_and_counts() {
        let mut counter = SequenceCounter::new(0, 4, false);
        assert_eq!((counter.last(), counter.remaining()), (0, 3));
        let given: Vec<u64> = core::iter::from_fn(|| counter.reserve().ok()).map(|r| r.value()).collect();
        assert_eq!(given, [1, 2, 3]);
        assert_eq!((counter.last(), counter.remaining()), (3, 0));
        assert_eq!(counter.reserve(), Err(ReserveError::NotReserved));
        counter.raise(2);
        assert_eq!(counter.ceiling(), 4, "a ceiling is never lowered");
        counter.raise(5);
        assert_eq!(counter.reserve().unwrap().value(), 4);
    }

    /// DP-4: without ESN the last number is exactly 2^32 - 1, whatever the ceiling says.
    #[test]
    fn dp_4_exhaustion_without_esn_is_exact() {
        let mut counter = SequenceCounter::new(u64::from(u32::MAX) - 1, u64::MAX, false);
        assert_eq!(counter.remaining(), 2);
        assert_eq!(counter.reserve().unwrap().low(), u32::MAX - 1);
        let last = counter.reserve().unwrap();
        assert_eq!((last.value(), last.low(), last.high()), (0xffff_ffff, u32::MAX, 0));
        assert_eq!(counter.reserve(), Err(ReserveError::Exhausted));
        counter.raise(u64::MAX);
        assert_eq!(counter.reserve(), Err(ReserveError::Exhausted));
        assert_eq!((counter.last(), counter.remaining()), (0xffff_ffff, 0));
    }

    /// DP-4: with ESN the counter passes 2^32 and ends before it would wrap.
    #[test]
    fn dp_4_exhaustion_with_esn_is_exact() {
        let mut counter = SequenceCounter::new(0xffff_ffff, u64::MAX, true);
        assert_eq!(counter.reserve().unwrap().high(), 0);
        let over = counter.reserve().unwrap();
        assert_eq!((over.value(), over.low(), over.high()), (0x1_0000_0000, 0, 1));

        let mut counter = SequenceCounter::new(u64::MAX - 2, u64::MAX, true);
        assert_eq!(counter.remaining(), 2);
        assert_eq!(counter.reserve().unwrap().value(), u64::MAX - 2);
        assert_eq!(counter.reserve().unwrap().value(), u64::MAX - 1);
        for _ in 0..3 {
            assert_eq!(counter.reserve(), Err(ReserveError::Exhausted));
        }
        assert_eq!(counter.last(), u64::MAX - 1);
        let mut counter = SequenceCounter::new(u64::MAX, u64::MAX, true);
        assert_eq!(counter.reserve(), Err(ReserveError::Exhausted));
    }

    proptest! {
        /// Whatever is asked in whatever order: numbers only grow and never reach the highest ceiling.
        #[test]
        fn numbers_only_grow(
            next in prop_oneof![0_u64..10, 0xffff_fff0_u64..0x1_0000_0010, u64::MAX - 10..=u64::MAX],
            raises in prop::collection::vec((0_u64..40, 0_u64..8), 0..20),
            esn in any::<bool>(),
        ) {
            let mut counter = SequenceCounter::new(next, next, esn);
            let (mut previous, mut highest) = (None, next);
            for (by, times) in raises {
                let ceiling = next.saturating_add(by);
                counter.raise(ceiling);
                highest = highest.max(ceiling);
                for _ in 0..times {
                    let remaining = counter.remaining();
                    let Ok(reserved) = counter.reserve() else {
                        prop_assert_eq!(remaining, 0);
                        continue;
                    };
                    prop_assert!(remaining > 0);
                    prop_assert!(reserved.value() >= 1 && reserved.value() < highest);
                    prop_assert!(esn || reserved.high() == 0);
                    prop_assert!(previous < Some(reserved.value()));
                    prop_assert_eq!(counter.last(), reserved.value());
                    previous = Some(reserved.value());
                }
            }
        }
    }
}
