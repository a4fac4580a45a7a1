//! The routes that a worker asked for last: nearly every packet goes where one shortly before it went.
//!
//! A table in front of the [`Fib`], which never knows anything that the view does not. Many destinations have few
//! routes, so an IPv4 destination takes 16 bytes here, and its route stands elsewhere.
//!
//! Beside each route stands an [`Exit`]: the same, ready to be written in front of a packet. Who sends to one
//! destination again and again keeps the [`ExitName`] and does not ask for the destination any more.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use postern_wire::ether;
use postern_wire::ids::EtherType;

use super::{Fib, Neighbour, PortIndex, Resolver, Route, spread};
use crate::port::LinkKind;
use crate::prefetch::{self, Table};

/// Places of the tables of IPv6 destinations and of routes, a power of two: 64 KiB each, with one cache line each.
const PLACES: usize = 1024;

/// An IPv6 destination.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Place(Option<(IpAddr, Route)>);

const _: () = assert!(size_of::<Place>() == 64);

/// Names a route of the cache, and where it stands: no other route has or had the name.
///
/// A number in halves, so that it fits where there is no room for 8 bytes in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitName([u32; 2]);

impl ExitName {
    /// Of no route.
    pub const NONE: Self = Self([u32::MAX; 2]);

    /// The `version`th name, of a route that stands at `at`, below [`PLACES`].
    #[expect(clippy::cast_possible_truncation, reason = "in halves")]
    const fn new(version: u64, at: usize) -> Self {
        let number = version * PLACES as u64 + at as u64;
        Self([(number >> 32) as u32, number as u32])
    }

    /// Where the route stands: below [`PLACES`], a power of two.
    #[inline]
    const fn at(self) -> usize {
        let Self([_, low]) = self;
        low as usize & (PLACES - 1)
    }
}

/// An IPv4 destination.
#[derive(Clone, Copy, Debug)]
#[repr(align(16))]
struct Known {
    destination: Ipv4Addr,
    /// Its route, if that still has the name.
    name: ExitName,
}

const _: () = assert!(size_of::<Known>() == 16);

/// A route and its name.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Named {
    name: ExitName,
    route: Route,
}

const _: () = assert!(size_of::<Named>() == 64);

const NO_ROUTE: Named = Named { name: ExitName::NONE, route: Route::Unreachable };

/// A route out of one of the datapath's ports to a neighbour that is known, as IPv4 packets take it.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Exit {
    name: ExitName,
    /// The neighbour, of whose use the kernel is told.
    pub next_hop: IpAddr,
    /// Second at which it was told of last, as far as it is known here.
    pub told: u32,
    /// The port.
    pub port: PortIndex,
    /// Bytes of the largest IP packet; 0 of what is no exit.
    pub mtu: u16,
    /// Whether `link` is to be written.
    pub ethernet: bool,
    /// The link header of an IPv4 packet.
    pub link: [u8; ether::LEN],
}

const _: () = assert!(size_of::<Exit>() == 64);

impl Exit {
    /// Tells the kernel, once a second at the most, that the neighbour is used; gives the port.
    #[inline]
    pub fn tell(&mut self, resolver: &mut Resolver, now: u32) -> PortIndex {
        if self.told != now {
            self.tell_again(resolver, now);
        }
        self.port
    }

    #[cold]
    fn tell_again(&mut self, resolver: &mut Resolver, now: u32) {
        self.told = now;
        resolver.touch(self.port, self.next_hop, now);
    }
}

const NO_EXIT: Exit = Exit {
    name: ExitName::NONE,
    next_hop: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    told: 0,
    port: PortIndex(u16::MAX),
    mtu: 0,
    ethernet: false,
    link: [0; ether::LEN],
};

/// One worker's view of routes and neighbours.
#[derive(Debug)]
pub struct CachedFib {
    fib: Arc<Fib>,
    places: Box<[Place]>,
    /// Their number is a power of two.
    known: Table<Known>,
    routes: Box<[Named]>,
    /// Of the routes at the same places, with the same names.
    exits: Box<[Exit; PLACES]>,
    /// By port.
    links: Box<[LinkKind]>,
    /// What an exit was asked for last: packets to one destination often come one behind the other.
    latest: Known,
    /// Of the last name given.
    version: u64,
}

impl CachedFib {
    /// Nothing asked for yet; room for at least so many IPv4 destinations. `links` tells what the frames of each port
    /// begin with.
    #[expect(clippy::large_stack_arrays, reason = "once, at start")]
    pub fn new(fib: Arc<Fib>, links: Box<[LinkKind]>, destinations: usize) -> Self {
        let nothing = Known { destination: Ipv4Addr::UNSPECIFIED, name: ExitName::NONE };
        let destinations = destinations.next_power_of_two();
        let mut known = prefetch::table(destinations);
        known.resize(destinations, nothing);
        Self {
            fib,
            places: vec![Place(None); PLACES].into(),
            known,
            routes: vec![NO_ROUTE; PLACES].into(),
            exits: Box::new([NO_EXIT; PLACES]),
            links,
            latest: nothing,
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
            && let Some(there) = self.routes.get(known.name.at())
            && there.name == known.name
        {
            return there.route;
        }
        self.learn(address).0
    }

    /// The exit of that name, if there still is one.
    #[inline]
    pub fn exit(&mut self, name: ExitName) -> Option<&mut Exit> {
        self.exits.get_mut(name.at()).filter(|exit| exit.name == name && exit.mtu > 0)
    }

    /// The exit to `destination`, which was `name` when it was asked for last; `name` is what it is now.
    #[inline]
    pub fn exit_of(&mut self, name: &mut ExitName, destination: Ipv4Addr) -> Option<&mut Exit> {
        if self.exit(*name).is_none() {
            *name = self.exit_to(destination)?;
        }
        self.exits.get_mut(name.at())
    }

    /// The name of the exit to `destination`, if packets to it leave through one.
    #[inline]
    pub fn exit_to(&mut self, destination: Ipv4Addr) -> Option<ExitName> {
        self.exit_towards(destination).map(|exit| exit.name)
    }

    /// The exit to `destination`, if packets to it leave through one.
    #[inline]
    pub fn exit_towards(&mut self, destination: Ipv4Addr) -> Option<&mut Exit> {
        if self.latest.destination != destination {
            let known = self.known.get(place(IpAddr::V4(destination), self.known.len()));
            let known = known.filter(|known| known.destination == destination);
            self.latest = Known { destination, name: known.map_or(ExitName::NONE, |known| known.name) };
        }
        let name = self.latest.name;
        if self.exits.get(name.at()).is_none_or(|exit| exit.name != name || name == ExitName::NONE) {
            self.latest.name = self.learn(destination).1;
        }
        self.exit(self.latest.name)
    }

    #[cold]
    fn learn(&mut self, address: Ipv4Addr) -> (Route, ExitName) {
        let destination = IpAddr::V4(address);
        let route = self.fib.lookup(destination);
        let at = match route {
            Route::Via { next_hop, .. } => place(next_hop, PLACES),
            _ => place(destination, PLACES),
        };
        let index = place(destination, self.known.len());
        let (Some(known), Some(there), Some(exit)) =
            (self.known.get_mut(index), self.routes.get_mut(at), self.exits.get_mut(at))
        else {
            return (route, ExitName::NONE);
        };
        if there.name == ExitName::NONE || there.route != route {
            self.version += 1;
            *there = Named { name: ExitName::new(self.version, at), route };
            *exit = make_exit(there.name, route, &self.links).unwrap_or(Exit { name: there.name, ..NO_EXIT });
        }
        *known = Known { destination: address, name: there.name };
        (route, there.name)
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
        self.exits.fill(NO_EXIT);
        std::mem::replace(&mut self.fib, fib)
    }
}

/// The exit that a route is, if it is one.
fn make_exit(name: ExitName, route: Route, links: &[LinkKind]) -> Option<Exit> {
    let Route::Via { port, next_hop, mtu, source_mac: source, neighbour: Neighbour::Known(destination) } =
        route
    else {
        return None;
    };
    let ethernet = *links.get(usize::from(port.0))? == LinkKind::Ethernet;
    let mut link = [0; ether::LEN];
    ether::Header { destination, source, ethertype: EtherType::IPV4 }.emit(&mut link)?;
    Some(Exit { name, next_hop, told: 0, port, mtu, ethernet, link })
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
            let mut cached = CachedFib::new(Arc::clone(&first), Box::new([LinkKind::Ethernet]), 256);
            let mut names = Vec::new();
            for address in &asked {
                let destination = Ipv4Addr::from(*address);
                let address = IpAddr::V4(destination);
                if address.is_ipv4() && names.len() % 2 == 0 {
                    prop_assert_eq!(cached.lookup(address), first.lookup(address));
                }
                let name = cached.exit_to(destination);
                same_exit(name.and_then(|name| cached.exit(name).copied()), first.lookup(address))?;
                names.push((address, name));
                prop_assert_eq!(cached.lookup(address), first.lookup(address));
            }
            // A name leads to its own exit for as long as it leads anywhere.
            for (address, name) in &names {
                if let Some(exit) = name.and_then(|name| cached.exit(name).copied()) {
                    same_exit(Some(exit), first.lookup(*address))?;
                }
            }
            prop_assert!(Arc::ptr_eq(&cached.replace(Arc::clone(&second)), &first));
            let address = asked[usize::from(again) % asked.len()];
            for address in asked.iter().chain(Some(&address)) {
                let address = IpAddr::from(address.to_be_bytes());
                prop_assert_eq!(cached.lookup(address), second.lookup(address));
            }
            for (_, name) in names {
                prop_assert!(name.is_none_or(|name| cached.exit(name).is_none()), "of the view before");
            }
        }
    }

    /// The exit, or that there is none, is what the route says.
    fn same_exit(exit: Option<Exit>, route: Route) -> Result<(), TestCaseError> {
        let expected = match route {
            Route::Via { port, next_hop, mtu, source_mac, neighbour: Neighbour::Known(mac) } => {
                let link = [&mac.0[..], &source_mac.0, &[8, 0]].concat();
                Some((port, next_hop, mtu, link))
            }
            _ => None,
        };
        let found = exit.map(|exit| (exit.port, exit.next_hop, exit.mtu, exit.link.to_vec()));
        prop_assert_eq!(found, expected);
        Ok(())
    }
}
