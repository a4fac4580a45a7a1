//! The routes that a worker asked for last: nearly every packet goes where one shortly before it went.
//!
//! A small direct-mapped table in front of the [`Fib`]. It is emptied whenever the view is replaced, so it never knows
//! anything that the view does not; an address that is not in it costs the lookup and one cache line more.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Fib, Route, spread};

/// Places of the table, a power of two: 64 KiB with one cache line each.
const PLACES: usize = 1024;

/// One place; to each its cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Place(Option<(IpAddr, Route)>);

const _: () = assert!(size_of::<Place>() == 64);

/// One worker's view of routes and neighbours.
#[derive(Debug)]
pub struct CachedFib {
    fib: Arc<Fib>,
    places: Box<[Place]>,
}

impl CachedFib {
    /// Nothing asked for yet.
    pub fn new(fib: Arc<Fib>) -> Self {
        Self { fib, places: vec![Place(None); PLACES].into() }
    }

    /// Where a packet to `destination` goes: [`Fib::lookup`].
    #[inline]
    pub fn lookup(&mut self, destination: IpAddr) -> Route {
        let index = usize::try_from(spread(destination)).unwrap_or_default() & (PLACES - 1);
        let Some(place) = self.places.get_mut(index) else { return self.fib.lookup(destination) };
        if let Some((known, route)) = place.0
            && known == destination
        {
            return route;
        }
        let route = self.fib.lookup(destination);
        place.0 = Some((destination, route));
        route
    }

    /// The view itself.
    pub fn view(&self) -> &Fib {
        &self.fib
    }

    /// Another view from now on; gives the old one back.
    pub fn replace(&mut self, fib: Arc<Fib>) -> Arc<Fib> {
        self.places.fill(Place(None));
        std::mem::replace(&mut self.fib, fib)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fib::PortIndex;
    use postern_wire::ether::Mac;

    fn view(gateway: u8) -> Arc<Fib> {
        let hop = IpAddr::from([192, 0, 2, gateway]);
        Fib::fixed()
            .port(PortIndex(0), Mac([2, 0, 0, 0, 0, 1]), 1500, &[IpAddr::from([192, 0, 2, 1])])
            .route("10.0.0.0/9".parse().unwrap(), PortIndex(0), Some(hop))
            .unreachable("10.3.0.0/16".parse().unwrap())
            .neighbour(PortIndex(0), hop, Mac([2, 0, 0, 0, 0, gateway]))
            .build()
    }

    proptest! {
        /// Whatever was asked before, the answer is the view's; after a new view, the new one's.
        #[test]
        fn answers_as_the_view_does(
            asked in prop::collection::vec(prop_oneof![any::<u32>(), 0x0a00_0000_u32..0x0a04_0000], 1..3000),
            again in any::<u16>(),
        ) {
            let (first, second) = (view(7), view(9));
            let mut cached = CachedFib::new(Arc::clone(&first));
            for address in &asked {
                let address = IpAddr::from(address.to_be_bytes());
                prop_assert_eq!(cached.lookup(address), first.lookup(address));
                prop_assert_eq!(cached.lookup(address), first.lookup(address));
            }
            prop_assert!(Arc::ptr_eq(&cached.replace(Arc::clone(&second)), &first));
            let address = asked[usize::from(again) % asked.len()];
            for address in asked.iter().chain(Some(&address)) {
                let address = IpAddr::from(address.to_be_bytes());
                prop_assert_eq!(cached.lookup(address), second.lookup(address));
            }
        }
    }
}
