//! Routes and neighbours, followed from the kernel by netlink.
//!
//! Workers look at an immutable [`Fib`]; the [`Follower`]'s thread publishes a new one whenever something changed.
//! The kernel keeps doing ARP and ND: a worker that meets a neighbour without a link-layer address asks the kernel
//! through its [`Resolver`], and tells it of those it uses, because the kernel sees none of that traffic and would
//! let them grow stale.
//!
//! What is followed: the tables `local` and `main`, in this order, each by longest prefix and lowest metric; policy
//! routing (`ip rule`), VRFs, routes by TOS or by source and routes with an encapsulation are not. A route over
//! an interface that is not the datapath's is [`Route::Kernel`].
//!
//! Links, addresses and neighbours are patched from notifications. Routes are read again instead, a few milliseconds
//! after the last change and no more than a quarter of the time: notifications do not tell which of several routes to
//! one prefix was replaced.

mod cache;
mod follow;

use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use postern_wire::ether::Mac;
use prefix_trie::PrefixMap;

pub use cache::{CachedFib, Exit, ExitName};
pub use follow::{FollowError, Follower, Resolver};

/// Number of an interface of the datapath, the same on all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortIndex(pub u16);

/// What is known of a next hop's link-layer address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    /// It can be sent to. All zero on interfaces that have no link-layer addresses (TUN).
    Known(Mac),
    /// [`Resolver::resolve`] asks the kernel for it.
    Unresolved,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To this host.
    Local,
    /// Out of one of the datapath's interfaces.
    Via {
        /// The interface.
        port: PortIndex,
        /// The gateway, or the destination itself if it is on the link.
        next_hop: IpAddr,
        /// Largest IP packet in bytes: of the interface, or of the route if that is less.
        mtu: u16,
        /// The interface's link-layer address.
        source_mac: Mac,
        /// The next hop's.
        neighbour: Neighbour,
    },
    /// Out of an interface that is not the datapath's.
    Kernel {
        /// The kernel's number of the interface.
        ifindex: u32,
    },
    /// No route, or one that says so; also multicast, broadcast and IPv6 link-local destinations, which are not
    /// forwarded.
    Unreachable,
}

/// An immutable view of all routes and neighbours.
#[derive(Clone, Debug, Default)]
pub struct Fib {
    routes: Arc<Routes>,
    neighbours: Arc<HashMap<(PortIndex, IpAddr), Mac>>,
    /// By port index.
    ports: Arc<Vec<PortState>>,
    local_addresses: Arc<Vec<IpAddr>>,
}

const NO_MAC: Mac = Mac([0; 6]);

/// One of the datapath's interfaces; those that the kernel does not have (yet) are [`PortState::ABSENT`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct PortState {
    mac: Mac,
    mtu: u16,
    /// Whether neighbours on it have link-layer addresses to be resolved.
    resolves: bool,
    addresses: Vec<IpAddr>,
}

impl PortState {
    const ABSENT: Self = Self { mac: NO_MAC, mtu: 0, resolves: true, addresses: Vec::new() };
}

/// Both tables. The number beside a target is the route's metric.
#[derive(Debug, Default)]
struct Routes {
    local_v4: PrefixMap<Ipv4Net, (u32, Target)>,
    local_v6: PrefixMap<Ipv6Net, (u32, Target)>,
    main_v4: PrefixMap<Ipv4Net, (u32, Target)>,
    main_v6: PrefixMap<Ipv6Net, (u32, Target)>,
    /// Hops of multipath routes, each as often as its weight says.
    multipath: Vec<Box<[Target]>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Local,
    Unreachable,
    Kernel(u32),
    /// `mtu` 0 is the interface's.
    Hop {
        port: PortIndex,
        gateway: Option<IpAddr>,
        mtu: u16,
    },
    /// Index into [`Routes::multipath`].
    Multipath(u32),
}

/// Which of the kernel's two tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    Local,
    Main,
}

impl Routes {
    /// Enters a route; of several to the same prefix the lowest metric stays, and of equal metrics the first.
    fn insert(&mut self, table: Table, net: IpNet, metric: u32, target: Target) {
        fn keep<P: prefix_trie::Prefix>(map: &mut PrefixMap<P, (u32, Target)>, net: P, new: (u32, Target)) {
            match map.get_mut(&net) {
                Some(old) if old.0 <= new.0 => {}
                Some(old) => *old = new,
                None => {
                    map.insert(net, new);
                }
            }
        }
        match (table, net.trunc()) {
            (Table::Local, IpNet::V4(net)) => keep(&mut self.local_v4, net, (metric, target)),
            (Table::Local, IpNet::V6(net)) => keep(&mut self.local_v6, net, (metric, target)),
            (Table::Main, IpNet::V4(net)) => keep(&mut self.main_v4, net, (metric, target)),
            (Table::Main, IpNet::V6(net)) => keep(&mut self.main_v6, net, (metric, target)),
        }
    }

    fn find(&self, destination: IpAddr) -> Option<Target> {
        let found = match destination {
            IpAddr::V4(address) => {
                let host = Ipv4Net::from(address);
                self.local_v4.get_lpm(&host).or_else(|| self.main_v4.get_lpm(&host)).map(|(_, value)| value)
            }
            IpAddr::V6(address) => {
                let host = Ipv6Net::from(address);
                self.local_v6.get_lpm(&host).or_else(|| self.main_v6.get_lpm(&host)).map(|(_, value)| value)
            }
        };
        match *found? {
            (_, Target::Multipath(index)) => {
                let hops = self.multipath.get(usize::try_from(index).ok()?)?;
                let count = u64::try_from(hops.len()).ok().filter(|count| *count != 0)?;
                hops.get(usize::try_from(spread(destination) % count).ok()?).copied()
            }
            (_, target) => Some(target),
        }
    }
}

impl Fib {
    /// Nothing is reachable.
    pub fn empty() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A view that is made by hand, for tests and benches.
    pub fn fixed() -> Builder {
        Builder::default()
    }

    /// Where a packet to `destination` goes.
    pub fn lookup(&self, destination: IpAddr) -> Route {
        if is_not_forwarded(destination) {
            return Route::Unreachable;
        }
        match self.routes.find(destination) {
            Some(Target::Local) => Route::Local,
            Some(Target::Kernel(ifindex)) => Route::Kernel { ifindex },
            Some(Target::Hop { port, gateway, mtu }) => self.via(port, gateway.unwrap_or(destination), mtu),
            None | Some(Target::Unreachable | Target::Multipath(_)) => Route::Unreachable,
        }
    }

    fn via(&self, port: PortIndex, next_hop: IpAddr, mtu: u16) -> Route {
        let Some(state) = self.ports.get(usize::from(port.0)) else { return Route::Unreachable };
        let neighbour = if state.resolves {
            self.neighbours.get(&(port, next_hop)).map_or(Neighbour::Unresolved, |mac| Neighbour::Known(*mac))
        } else {
            Neighbour::Known(NO_MAC)
        };
        let mtu = if mtu == 0 { state.mtu } else { mtu.min(state.mtu) };
        Route::Via { port, next_hop, mtu, source_mac: state.mac, neighbour }
    }

    /// All addresses of this host, on whatever interface: what XDP leaves to the kernel.
    pub fn local_addresses(&self) -> &[IpAddr] {
        &self.local_addresses
    }

    /// An address of the interface, as the source of ICMP errors; a link-local one only if there is no other.
    pub fn address_of(&self, port: PortIndex, v6: bool) -> Option<IpAddr> {
        let state = self.ports.get(usize::from(port.0))?;
        let mut found = state.addresses.iter().copied().filter(|address| address.is_ipv6() == v6);
        let first = found.next()?;
        if !is_link_local(first) {
            return Some(first);
        }
        Some(found.find(|address| !is_link_local(*address)).unwrap_or(first))
    }

    /// MTU of the interface in bytes.
    pub fn mtu_of(&self, port: PortIndex) -> Option<u16> {
        self.ports.get(usize::from(port.0)).map(|state| state.mtu)
    }
}

/// Makes a [`Fib`] by hand.
#[derive(Debug, Default)]
pub struct Builder {
    routes: Routes,
    neighbours: HashMap<(PortIndex, IpAddr), Mac>,
    ports: Vec<PortState>,
    local_addresses: Vec<IpAddr>,
}

impl Builder {
    /// An Ethernet interface with its own addresses, which become [`Route::Local`].
    #[must_use]
    pub fn port(mut self, port: PortIndex, mac: Mac, mtu: u16, addresses: &[IpAddr]) -> Self {
        let index = usize::from(port.0);
        if self.ports.len() <= index {
            self.ports.resize(index + 1, PortState::ABSENT);
        }
        if let Some(state) = self.ports.get_mut(index) {
            *state = PortState { mac, mtu, resolves: true, addresses: addresses.to_vec() };
        }
        for address in addresses {
            self.routes.insert(Table::Local, IpNet::from(*address), 0, Target::Local);
            self.local_addresses.push(*address);
        }
        self
    }

    /// An interface without link-layer addresses, such as a TUN device.
    #[must_use]
    pub fn point_to_point(mut self, port: PortIndex, mtu: u16, addresses: &[IpAddr]) -> Self {
        self = self.port(port, NO_MAC, mtu, addresses);
        if let Some(state) = self.ports.get_mut(usize::from(port.0)) {
            state.resolves = false;
        }
        self
    }

    /// A route out of `port`, through `gateway` or on the link.
    #[must_use]
    pub fn route(mut self, net: IpNet, port: PortIndex, gateway: Option<IpAddr>) -> Self {
        self.routes.insert(Table::Main, net, 0, Target::Hop { port, gateway, mtu: 0 });
        self
    }

    /// A route out of an interface that is not the datapath's.
    #[must_use]
    pub fn kernel(mut self, net: IpNet, ifindex: u32) -> Self {
        self.routes.insert(Table::Main, net, 0, Target::Kernel(ifindex));
        self
    }

    /// A prefix that is not reachable.
    #[must_use]
    pub fn unreachable(mut self, net: IpNet) -> Self {
        self.routes.insert(Table::Main, net, 0, Target::Unreachable);
        self
    }

    /// A resolved neighbour.
    #[must_use]
    pub fn neighbour(mut self, port: PortIndex, address: IpAddr, mac: Mac) -> Self {
        self.neighbours.insert((port, address), mac);
        self
    }

    /// The finished view.
    pub fn build(self) -> Arc<Fib> {
        let Self { routes, neighbours, ports, local_addresses } = self;
        Arc::new(Fib {
            routes: Arc::new(routes),
            neighbours: Arc::new(neighbours),
            ports: Arc::new(ports),
            local_addresses: Arc::new(local_addresses),
        })
    }
}

/// RFC 4291 section 2.5.6: "Routers must not forward any packets with Link-Local source or destination addresses to
/// other links."
fn is_not_forwarded(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(address) => address.is_multicast() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_multicast() || address.is_unicast_link_local(),
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// A number that is the same for a destination and well spread over many (Fibonacci hashing).
fn spread(destination: IpAddr) -> u64 {
    let bits = match destination {
        IpAddr::V4(address) => u64::from(address.to_bits()),
        IpAddr::V6(address) => {
            let [a, b] = [address.to_bits() >> 64, address.to_bits()].map(|half| {
                let [low @ .., _, _, _, _, _, _, _, _] = half.to_le_bytes();
                u64::from_le_bytes(low)
            });
            a.rotate_left(23) ^ b
        }
    };
    bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const OUT: PortIndex = PortIndex(0);
    const IN: PortIndex = PortIndex(1);
    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const PEER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn example() -> Arc<Fib> {
        Fib::fixed()
            .port(OUT, MAC, 1500, &[ip("fe80::1"), ip("192.0.2.1"), ip("2001:db8::1")])
            .point_to_point(IN, 1400, &[ip("10.0.0.1")])
            .route(net("192.0.2.0/24"), OUT, None)
            .route(net("0.0.0.0/0"), OUT, Some(ip("192.0.2.254")))
            .route(net("10.0.0.0/8"), IN, None)
            .route(net("2001:db8::/64"), OUT, None)
            .kernel(net("172.16.0.0/12"), 7)
            .unreachable(net("10.9.0.0/16"))
            .neighbour(OUT, ip("192.0.2.254"), PEER)
            .build()
    }

    #[test]
    fn lookup_by_longest_prefix() {
        let fib = example();
        let via = |port, next_hop: &str, mtu, source_mac, neighbour| Route::Via {
            port,
            next_hop: ip(next_hop),
            mtu,
            source_mac,
            neighbour,
        };
        assert_eq!(fib.lookup(ip("8.8.8.8")), via(OUT, "192.0.2.254", 1500, MAC, Neighbour::Known(PEER)));
        assert_eq!(fib.lookup(ip("192.0.2.9")), via(OUT, "192.0.2.9", 1500, MAC, Neighbour::Unresolved));
        assert_eq!(fib.lookup(ip("10.1.1.1")), via(IN, "10.1.1.1", 1400, NO_MAC, Neighbour::Known(NO_MAC)));
        assert_eq!(fib.lookup(ip("192.0.2.1")), Route::Local);
        assert_eq!(fib.lookup(ip("10.9.1.1")), Route::Unreachable);
        assert_eq!(fib.lookup(ip("172.16.0.1")), Route::Kernel { ifindex: 7 });
        assert_eq!(fib.lookup(ip("2001:db8:1::1")), Route::Unreachable);
        assert_eq!(fib.lookup(ip("2001:db8::9")), via(OUT, "2001:db8::9", 1500, MAC, Neighbour::Unresolved));
        for never in ["224.0.0.1", "255.255.255.255", "ff02::1", "fe80::2"] {
            assert_eq!(fib.lookup(ip(never)), Route::Unreachable);
        }
        assert_eq!(Fib::empty().lookup(ip("10.0.0.1")), Route::Unreachable);
    }

    /// DP-5: ICMP errors want a source address of the interface.
    #[test]
    fn dp_5_addresses_of_ports() {
        let fib = example();
        assert_eq!(fib.address_of(OUT, true), Some(ip("2001:db8::1")));
        assert_eq!(fib.address_of(OUT, false), Some(ip("192.0.2.1")));
        assert_eq!(fib.address_of(IN, true), None);
        assert_eq!(fib.address_of(PortIndex(9), false), None);
        assert_eq!(fib.mtu_of(IN), Some(1400));
        assert_eq!(fib.local_addresses().len(), 4);
    }

    /// The local table comes first even where the main table knows a longer prefix; metrics decide within a table.
    #[test]
    fn tables_and_metrics() {
        let mut routes = Routes::default();
        let kernel = Target::Kernel;
        routes.insert(Table::Main, net("10.0.0.0/24"), 100, kernel(1));
        routes.insert(Table::Main, net("10.0.0.0/24"), 50, kernel(2));
        routes.insert(Table::Main, net("10.0.0.0/24"), 50, kernel(3));
        routes.insert(Table::Main, net("127.0.0.1/32"), 0, kernel(4));
        routes.insert(Table::Local, net("127.0.0.0/8"), 0, Target::Local);
        assert_eq!(routes.find(ip("10.0.0.1")), Some(kernel(2)));
        assert_eq!(routes.find(ip("127.0.0.1")), Some(Target::Local));
        assert_eq!(routes.find(ip("::1")), None);
    }

    /// A destination keeps its hop, and destinations spread over the hops by weight.
    #[test]
    fn multipath() {
        let mut routes = Routes::default();
        routes.multipath.push([1, 1, 1, 2].map(Target::Kernel).into());
        routes.insert(Table::Main, net("0.0.0.0/0"), 0, Target::Multipath(0));
        routes.insert(Table::Main, net("::/0"), 0, Target::Multipath(0));
        let mut seen = HashSet::new();
        let mut second = 0;
        for n in 0..1000_u32 {
            let destination = IpAddr::from((0x0a00_0000 + n).to_be_bytes());
            let target = routes.find(destination);
            assert_eq!(target, routes.find(destination));
            second += u32::from(target == Some(Target::Kernel(2)));
            seen.insert(
                routes.find(IpAddr::from((u128::from(n) << 64).to_be_bytes())) == Some(Target::Kernel(2)),
            );
        }
        assert!((150..350).contains(&second), "{second}");
        assert_eq!(seen.len(), 2);
    }
}
