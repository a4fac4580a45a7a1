//! Addresses for clients (RFC 7296 section 2.19; MOB-6: "the same identity gets the same address").
//!
//! An address that is given back stays reserved for the identity that had it, until every other address of the pool is
//! taken; then the one that was given back longest ago goes to somebody else. Leasing and releasing are O(1), amortised,
//! and memory grows with the addresses that were ever used, not with the size of the range.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::HashMap;

/// A range of addresses of one family.
#[derive(Debug)]
pub struct Pool {
    first: IpAddr,
    /// Number of addresses - 1.
    span: u64,
    /// All offsets from here on were never chosen here; single ones may have been asked for.
    fresh: Option<u64>,
    /// Addresses in use and reserved ones, by offset.
    entries: HashMap<u64, Entry>,
    identities: HashMap<Arc<[u8]>, u64>,
    /// Offsets that were given back, longest ago first, each with the stamp of its entry at that time; another stamp now
    /// means that it was leased again since.
    idle: VecDeque<(u64, u32)>,
    idle_count: usize,
    stamp: u32,
}

/// All addresses are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all addresses of the pool are in use")]
pub struct PoolFull;

/// What a client may have that holds an address of the pool already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// The same address once more: its old IKE SA is about to be replaced.
    Same,
    /// Another one: two devices with one identity. Unless it asks for the very address that it holds.
    Another,
}

impl Pool {
    /// The addresses from `first` to `last`; of the same family and in order, or there is no pool.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        let span = match (first, last) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u64::from(b.to_bits().checked_sub(a.to_bits())?),
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                u64::try_from(b.to_bits().checked_sub(a.to_bits())?).unwrap_or(u64::MAX)
            }
            _ => return None,
        };
        Some(Self {
            first,
            span,
            fresh: Some(0),
            entries: HashMap::new(),
            identities: HashMap::new(),
            idle: VecDeque::new(),
            idle_count: 0,
            stamp: 0,
        })
    }

    /// Whether the pool has addresses of this one's family.
    pub fn is_v4(&self) -> bool {
        self.first.is_ipv4()
    }

    /// Whether `address` belongs to the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.offset(address).is_some()
    }

    /// Number of addresses that are in use.
    pub fn in_use(&self) -> usize {
        self.entries.len() - self.idle_count
    }

    /// Number of addresses; at most 2^64 - 1.
    pub fn size(&self) -> u64 {
        self.span.saturating_add(1)
    }

    /// An address for `identity`: the one it had before; else the `requested` one, if nobody has it; else any.
    ///
    /// Each lease is to be given back by one [`release`](Self::release).
    pub fn lease(
        &mut self,
        identity: &[u8],
        requested: Option<IpAddr>,
        again: Again,
    ) -> Result<IpAddr, PoolFull> {
        let requested = requested.and_then(|address| self.offset(address));
        let known = self.identities.get(identity).copied();
        if let Some(offset) = known
            && let Some(entry) = self.entries.get_mut(&offset)
        {
            if entry.holders == 0 {
                self.idle_count -= 1;
            }
            if entry.holders == 0 || again == Again::Same || requested == Some(offset) {
                entry.holders += 1;
                entry.stamp = next_stamp(&mut self.stamp);
                return Ok(self.address(offset));
            }
        }
        let offset = requested
            .filter(|offset| !self.entries.contains_key(offset))
            .or_else(|| self.never_used())
            .or_else(|| self.longest_idle())
            .ok_or(PoolFull)?;
        let stamp = next_stamp(&mut self.stamp);
        // Of several addresses with one identity only the first is reserved for it.
        let identity = known.is_none().then(|| Arc::from(identity));
        if let Some(identity) = &identity {
            self.identities.insert(Arc::clone(identity), offset);
        }
        self.entries.insert(offset, Entry { identity, holders: 1, stamp });
        Ok(self.address(offset))
    }

    /// Gives a lease back.
    pub fn release(&mut self, address: IpAddr) {
        let Some(offset) = self.offset(address) else { return };
        let Some(entry) = self.entries.get_mut(&offset).filter(|entry| entry.holders > 0) else { return };
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        self.idle_count += 1;
        self.idle.push_back((offset, entry.stamp));
        if self.idle.len() > 2 * self.idle_count + 64 {
            let entries = &self.entries;
            self.idle.retain(|(offset, stamp)| {
                entries.get(offset).is_some_and(|entry| entry.holders == 0 && entry.stamp == *stamp)
            });
        }
    }

    /// An address that nobody ever had.
    fn never_used(&mut self) -> Option<u64> {
        loop {
            let offset = self.fresh?;
            self.fresh = offset.checked_add(1).filter(|&next| next <= self.span);
            if !self.entries.contains_key(&offset) {
                return Some(offset);
            }
        }
    }

    /// Takes the reservation that is the oldest.
    fn longest_idle(&mut self) -> Option<u64> {
        while let Some((offset, stamp)) = self.idle.pop_front() {
            let Some(entry) = self.entries.get(&offset) else { continue };
            if entry.holders == 0 && entry.stamp == stamp {
                if let Some(entry) = self.entries.remove(&offset)
                    && let Some(identity) = entry.identity
                {
                    self.identities.remove(&identity);
                }
                self.idle_count -= 1;
                return Some(offset);
            }
        }
        None
    }

    fn offset(&self, address: IpAddr) -> Option<u64> {
        let offset = match (self.first, address) {
            (IpAddr::V4(first), IpAddr::V4(address)) => {
                u64::from(address.to_bits().checked_sub(first.to_bits())?)
            }
            (IpAddr::V6(first), IpAddr::V6(address)) => {
                u64::try_from(address.to_bits().checked_sub(first.to_bits())?).ok()?
            }
            _ => return None,
        };
        (offset <= self.span).then_some(offset)
    }

    fn address(&self, offset: u64) -> IpAddr {
        match self.first {
            // An offset is at most the span, so neither sum can wrap.
            IpAddr::V4(first) => {
                let offset = u32::try_from(offset).unwrap_or_default();
                Ipv4Addr::from_bits(first.to_bits().wrapping_add(offset)).into()
            }
            IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits().wrapping_add(u128::from(offset))).into(),
        }
    }
}

/// An address that is in use or reserved.
#[derive(Debug)]
struct Entry {
    /// Whom it is reserved for.
    identity: Option<Arc<[u8]>>,
    /// Number of leases; 0: reserved only.
    holders: u32,
    /// Changes with every lease.
    stamp: u32,
}

fn next_stamp(stamp: &mut u32) -> u32 {
    *stamp = stamp.wrapping_add(1);
    *stamp
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn pool(last: u8) -> Pool {
        Pool::new(address(1), address(last)).unwrap()
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 3, 0, last])
    }

    /// MOB-6: whoever comes back gets what it had, while others come and go.
    #[test]
    fn mob_6_the_same_identity_gets_the_same_address() {
        let mut pool = pool(10);
        let joe = pool.lease(b"joe", None, Again::Another).unwrap();
        let ann = pool.lease(b"ann", None, Again::Another).unwrap();
        assert_eq!((joe, ann), (address(1), address(2)));
        pool.release(joe);
        assert_eq!(pool.lease(b"eve", None, Again::Another), Ok(address(3)));
        assert_eq!(pool.lease(b"joe", Some(address(9)), Again::Another), Ok(joe));
        assert_eq!(pool.in_use(), 3);
    }

    #[test]
    fn full_then_the_longest_unused_reservation_goes() {
        let mut pool = pool(2);
        let a = pool.lease(b"a", None, Again::Another).unwrap();
        let b = pool.lease(b"b", None, Again::Another).unwrap();
        assert_eq!(pool.lease(b"c", None, Again::Another), Err(PoolFull));
        pool.release(b);
        pool.release(a);
        assert_eq!(pool.lease(b"c", None, Again::Another), Ok(b));
        assert_eq!(pool.lease(b"b", None, Again::Another), Ok(a));
        assert_eq!(pool.lease(b"a", None, Again::Another), Err(PoolFull));
    }

    #[test]
    fn a_requested_address_is_given_if_it_is_nobodys() {
        let mut pool = pool(10);
        assert_eq!(pool.lease(b"a", Some(address(1)), Again::Another), Ok(address(1)));
        assert_eq!(pool.lease(b"b", Some(address(1)), Again::Another), Ok(address(2)));
        assert_eq!(pool.lease(b"c", Some(address(4)), Again::Another), Ok(address(4)));
        assert_eq!(pool.lease(b"d", Some(address(11)), Again::Another), Ok(address(3)));
        assert_eq!(pool.lease(b"e", Some("::1".parse().unwrap()), Again::Another), Ok(address(5)));
    }

    #[test]
    fn an_identity_that_is_here_already() {
        let mut pool = pool(10);
        assert_eq!(pool.lease(b"a", None, Again::Another), Ok(address(1)));
        assert_eq!(pool.lease(b"a", None, Again::Same), Ok(address(1)));
        assert_eq!(pool.lease(b"a", Some(address(1)), Again::Another), Ok(address(1)));
        assert_eq!(pool.lease(b"a", None, Again::Another), Ok(address(2)));
        for _ in 0..3 {
            assert_eq!(pool.in_use(), 2);
            pool.release(address(1));
        }
        assert_eq!(pool.in_use(), 1);
        pool.release(address(1));
        assert_eq!(pool.in_use(), 1);
    }

    #[test]
    fn families_and_bounds() {
        assert!(Pool::new(address(2), address(1)).is_none());
        assert!(Pool::new(address(2), "::".parse().unwrap()).is_none());
        let all = Pool::new("::".parse().unwrap(), "ffff::".parse().unwrap()).unwrap();
        assert_eq!(all.size(), u64::MAX);
        let mut one = Pool::new("fd00::ffff".parse().unwrap(), "fd00::ffff".parse().unwrap()).unwrap();
        assert_eq!(one.lease(b"a", None, Again::Another), Ok("fd00::ffff".parse().unwrap()));
        assert_eq!(one.lease(b"b", None, Again::Another), Err(PoolFull));
    }

    /// Coming and going for a long time leaves nothing behind.
    #[test]
    fn the_list_of_idle_addresses_stays_short() {
        let mut pool = pool(200);
        for _ in 0..10_000 {
            let address = pool.lease(b"joe", None, Again::Another).unwrap();
            pool.release(address);
        }
        assert!(pool.idle.len() < 100, "{}", pool.idle.len());
        assert_eq!((pool.entries.len(), pool.identities.len(), pool.in_use()), (1, 1, 0));
    }

    proptest! {
        /// No address has two identities at a time, and none is lost.
        #[test]
        fn no_address_has_two_holders(ops in prop::collection::vec((0..12_u8, any::<bool>(), 0..12_u8), 1..300)) {
            let mut pool = pool(8);
            let mut held: Vec<(u8, IpAddr)> = Vec::new();
            for (who, lease, wish) in ops {
                if lease {
                    if let Ok(address) = pool.lease(&[who], Some(address(wish)), Again::Another) {
                        prop_assert!(held.iter().all(|&(other, taken)| taken != address || other == who));
                        held.push((who, address));
                    } else {
                        let taken: HashSet<IpAddr> = held.iter().map(|&(_, address)| address).collect();
                        prop_assert_eq!(taken.len(), 8);
                    }
                } else if let Some(index) = held.iter().position(|&(other, _)| other == who) {
                    pool.release(held.swap_remove(index).1);
                }
                let taken: HashSet<IpAddr> = held.iter().map(|&(_, address)| address).collect();
                prop_assert_eq!(pool.in_use(), taken.len());
            }
        }
    }
}
