//! The routes that a worker asked for last: nearly every packet goes where one shortly before it went.
//!
//! A table in front of the [`Fib`], which never knows anything that the view does not. Many destinations have few
//! routes, so an IPv4 destination takes 16 bytes here, and its route stands elsewhere.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use super::{Fib, Route, spread};
use crate::prefetch;

/// Places of the tables of IPv6 destinations and of routes, a power of two: 64 KiB each, with one cache line each.
const PLACES: usize = 1024;

/// An IPv6 destination.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Place(Option<(IpAddr, Route)>);

const _: () = assert!(size_of::<Place>() == 64);

/// An IPv4 destination.
#[derive(Clone, Copy, Debug)]
struct Known {
    destination: Ipv4Addr,
    /// Where the route stands.
    at: u32,
    /// The version that it had; another one is another route.
    version: u64,
}

const _: () = assert!(size_of::<Known>() == 16);

/// A route, and a number that no other has or had.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Versioned {
    /// 0: none.
    version: u64,
    route: Route,
}

const _: () = assert!(size_of::<Versioned>() == 64);

const NO_ROUTE: Versioned = Versioned { version: 0, route: Route::Unreachable };

/// One worker's view of routes and neighbours.
#[derive(Debug)]
pub struct CachedFib {
    fib: Arc<Fib>,
    places: Box<[Place]>,
    /// Their number is a power of two.
    known: Box<[Known]>,
    routes: Box<[Versioned]>,
    /// The last one given.
    version: u64,
}

impl CachedFib {
    /// Nothing asked for yet; room for at least so many IPv4 destinations.
    pub fn new(fib: Arc<Fib>, destinations: usize) -> Self {
        // No route has this version.
        let nothing = Known { destination: Ipv4Addr::UNSPECIFIED, at: 0, version: u64::MAX };
        Self {
            fib,
            places: vec![Place(None); PLACES].into(),
            known: vec![nothing; destinations.next_power_of_two()].into(),
            routes: vec![NO_ROUTE; PLACES].into(),
            version: 0,
        }
    }

    /// Asks for the memory of a destination.
    #[inline]
    pub fn prefetch(&self, destination: IpAddr) {
        if let Some(known) = self.known.get(place(destination, self.known.len())) {
            prefetch::object(known);
        }
    }

    /// Where a packet to `destination` goes: [`Fib::lookup`].
    #[inline]
    pub fn lookup(&mut self, destination: IpAddr) -> Route {
        let IpAddr::V4(address) = destination else { return self.lookup_v6(destination) };
        if let Some(known) = self.known.get(place(destination, self.known.len()))
            && known.destination == address
            && let Some(there) = self.routes.get(known.at as usize)
            && there.version == known.version
        {
            return there.route;
        }
        self.learn(address)
    }

    #[cold]
    fn learn(&mut self, address: Ipv4Addr) -> Route {
        let destination = IpAddr::V4(address);
        let route = self.fib.lookup(destination);
        let at = match route {
            Route::Via { next_hop, .. } => place(next_hop, PLACES),
            _ => place(destination, PLACES),
        };
        let index = place(destination, self.known.len());
        if let (Some(known), Some(there), Ok(at)) =
            (self.known.get_mut(index), self.routes.get_mut(at), u32::try_from(at))
        {
            if there.version == 0 || there.route != route {
                self.version += 1;
                *there = Versioned { version: self.version, route };
            }
            *known = Known { destination: address, at, version: there.version };
        }
        route
    }

    fn lookup_v6(&mut self, destination: IpAddr) -> Route {
        let Some(place) = self.places.get_mut(place(destination, PLACES)) else {
            return self.fib.lookup(destination);
        };
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
        self.routes.fill(NO_ROUTE);
        std::mem::replace(&mut self.fib, fib)
    }
}

/// Of so many places, a power of two.
#[inline]
fn place(address: IpAddr, places: usize) -> usize {
    usize::try_from(spread(address)).unwrap_or_default() & (places - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fib::PortIndex;
    use postern_wire::ether::Mac;

    /// With one gateway, and with hosts on the link, more than there is room for.
    fn view(gateway: u8) -> Arc<Fib> {
        let hop = IpAddr::from([192, 0, 2, gateway]);
        Fib::fixed()
            .port(PortIndex(0), Mac([2, 0, 0, 0, 0, 1]), 1500, &[IpAddr::from([192, 0, 2, 1])])
            .route("10.0.0.0/9".parse().unwrap(), PortIndex(0), Some(hop))
            .route("10.2.0.0/16".parse().unwrap(), PortIndex(0), None)
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
            let mut cached = CachedFib::new(Arc::clone(&first), 256);
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
