//! The FIB against the kernel: real routes, links and neighbours in network namespaces. Needs root.
//!
//! `near` is followed, `far` answers ARP and ND; they are joined by the veth pair `n0`-`f0`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, which clippy does not take for tests"
)]

#[allow(dead_code, reason = "shared with other tests")]
#[path = "netns/mod.rs"]
mod netns;

use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use netns::Netns;
use postern_datapath::fib::{Fib, Follower, Neighbour, PortIndex, Route};
use postern_wire::ether::Mac;

const PORT: PortIndex = PortIndex(1);

/// A follower in a namespace, and what it published last.
struct Followed {
    follower: Follower,
    views: Receiver<Arc<Fib>>,
    fib: Arc<Fib>,
}

impl Followed {
    fn new(netns: &Netns) -> Self {
        let ifindex = netns.exec("cat /sys/class/net/n0/ifindex").trim().parse().unwrap();
        let (sender, views) = channel();
        let follower = netns.within(|| {
            Follower::spawn(vec![(ifindex, PORT)], move |fib| {
                let _ = sender.send(fib);
            })
            .unwrap()
        });
        let fib = views.try_recv().unwrap();
        Self { follower, views, fib }
    }

    /// Waits until the view is as it should be.
    fn until(&mut self, what: &str, holds: impl Fn(&Fib) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !holds(&self.fib) {
            let left = end.saturating_duration_since(Instant::now());
            let next = self.views.recv_timeout(left);
            assert!(next.is_ok(), "in 20 s not seen: {what}");
            self.fib = next.unwrap();
        }
    }

    fn until_route(&mut self, destination: &str, expected: impl Fn(Route) -> bool) {
        self.until(destination, |fib| expected(fib.lookup(ip(destination))));
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac_of(netns: &Netns, interface: &str) -> Mac {
    let text = netns.exec(&format!("cat /sys/class/net/{interface}/address"));
    let bytes: Vec<_> = text.trim().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
    Mac(bytes.try_into().unwrap())
}

/// The two namespaces, with addresses and nothing resolved.
fn joined() -> (Netns, Netns) {
    let (near, far) = (Netns::new("near"), Netns::new("far"));
    near.ip(&format!("link add name n0 type veth peer name f0 netns {}", far.name()));
    for (side, interface, last) in [(&near, "n0", 1), (&far, "f0", 2)] {
        side.ip(&format!("addr add 10.77.0.{last}/24 dev {interface}"));
        side.ip(&format!("addr add 2001:db8:77::{last}/64 dev {interface} nodad"));
        side.ip(&format!("link set {interface} up"));
    }
    (near, far)
}

fn goes_via(route: Route, hop: &str) -> bool {
    matches!(route, Route::Via { port: PORT, next_hop, .. } if next_hop == ip(hop))
}

#[test]
fn routes_come_and_go() {
    let (near, _far) = joined();
    near.ip("link add d0 type veth peer name d1");
    near.ip("link set d0 up");
    let mut followed = Followed::new(&near);
    let fib = Arc::clone(&followed.fib);
    assert_eq!(fib.lookup(ip("10.77.0.1")), Route::Local);
    assert_eq!(fib.lookup(ip("127.0.0.9")), Route::Local);
    assert_eq!(fib.lookup(ip("2001:db8:77::1")), Route::Local);
    assert_eq!(fib.lookup(ip("10.77.0.255")), Route::Unreachable);
    assert_eq!(fib.lookup(ip("198.51.100.1")), Route::Unreachable);
    assert_eq!(fib.address_of(PORT, false), Some(ip("10.77.0.1")));
    assert_eq!(fib.address_of(PORT, true), Some(ip("2001:db8:77::1")));
    assert!(fib.local_addresses().contains(&ip("::1")));
    let source_mac = mac_of(&near, "n0");
    assert_eq!(
        fib.lookup(ip("10.77.0.9")),
        Route::Via {
            port: PORT,
            next_hop: ip("10.77.0.9"),
            mtu: 1500,
            source_mac,
            neighbour: Neighbour::Unresolved
        }
    );

    near.ip("route add 198.51.100.0/24 via 10.77.0.2 mtu 1300");
    followed.until_route("198.51.100.1", |route| {
        goes_via(route, "10.77.0.2") && matches!(route, Route::Via { mtu: 1300, .. })
    });
    near.ip("route add blackhole 198.51.100.128/25");
    followed.until_route("198.51.100.129", |route| route == Route::Unreachable);
    near.ip("route del 198.51.100.0/24");
    followed.until_route("198.51.100.1", |route| route == Route::Unreachable);

    near.ip("route add default via 10.77.0.3 metric 200");
    followed.until_route("203.0.113.1", |route| goes_via(route, "10.77.0.3"));
    near.ip("route add default via 10.77.0.4 metric 100");
    followed.until_route("203.0.113.1", |route| goes_via(route, "10.77.0.4"));
    near.ip("route replace default via 10.77.0.5 metric 100");
    followed.until_route("203.0.113.1", |route| goes_via(route, "10.77.0.5"));

    near.ip("route add 172.16.0.0/12 dev d0");
    followed.until_route("172.16.0.1", |route| matches!(route, Route::Kernel { .. }));
    near.ip("-6 route add 2001:db8:88::/48 via 2001:db8:77::2");
    followed.until_route("2001:db8:88::1", |route| goes_via(route, "2001:db8:77::2"));
    near.ip("route add 100.64.0.0/10 via inet6 2001:db8:77::2");
    followed.until_route("100.64.0.1", |route| goes_via(route, "2001:db8:77::2"));
    near.ip("route add 192.0.2.0/24 nexthop via 10.77.0.6 weight 1 nexthop via 10.77.0.7 weight 1");
    let over = |fib: &Fib, hop: &str| {
        (0..=255_u8).filter(|last| goes_via(fib.lookup(IpAddr::from([192, 0, 2, *last])), hop)).count()
    };
    followed.until("multipath", |fib| over(fib, "10.77.0.6") > 60 && over(fib, "10.77.0.7") > 60);
    near.ip("-6 route add 2001:db8:99::/48 nexthop via 2001:db8:77::6 nexthop via 2001:db8:77::7");
    followed.until_route("2001:db8:99::1", |route| {
        goes_via(route, "2001:db8:77::6") || goes_via(route, "2001:db8:77::7")
    });
    // Not followed: other tables.
    near.ip("route add 203.0.113.0/24 via 10.77.0.8 table 77");
    near.ip("route add 203.0.114.0/24 via 10.77.0.8");
    followed.until_route("203.0.114.1", |route| goes_via(route, "10.77.0.8"));
    assert!(goes_via(followed.fib.lookup(ip("203.0.113.1")), "10.77.0.5"));
}

/// ARP and ND are the kernel's: it resolves what a worker asks for, without a packet of its own to send.
#[test]
fn neighbours_are_resolved() {
    let (near, far) = joined();
    let mut followed = Followed::new(&near);
    let expected = mac_of(&far, "f0");
    let resolver = followed.follower.resolver();
    for address in ["10.77.0.2", "2001:db8:77::2"] {
        let is = |neighbour| move |route| matches!(route, Route::Via { neighbour: found, .. } if found == neighbour);
        assert!(is(Neighbour::Unresolved)(followed.fib.lookup(ip(address))), "{address}");
        resolver.resolve(PORT, ip(address));
        followed.until_route(address, is(Neighbour::Known(expected)));
        near.ip(&format!("neigh del {address} dev n0"));
        followed.until_route(address, is(Neighbour::Unresolved));
    }
    // Nobody there: the kernel gives up, and the next packet asks again.
    resolver.resolve(PORT, ip("10.77.0.99"));
    let failed = || near.exec("ip neigh show 10.77.0.99").contains("FAILED");
    wait_until("the kernel gives up", failed);
    far.ip("addr add 10.77.0.99/24 dev f0");
    resolver.resolve(PORT, ip("10.77.0.99"));
    followed.until_route(
        "10.77.0.99",
        |route| matches!(route, Route::Via { neighbour: Neighbour::Known(mac), .. } if mac == expected),
    );
}

/// The kernel sees none of the traffic, so it is told which neighbours are in use; permanent ones stay so.
#[test]
fn used_neighbours_stay_fresh() {
    let (near, far) = joined();
    near.exec("sysctl -qw net.ipv4.neigh.n0.delay_first_probe_time=1");
    let mut followed = Followed::new(&near);
    let mac = mac_of(&far, "f0");
    near.ip(&format!("neigh replace 10.77.0.2 lladdr {mac} dev n0 nud stale"));
    near.ip(&format!("neigh replace 10.77.0.3 lladdr {mac} dev n0 nud permanent"));
    for address in ["10.77.0.2", "10.77.0.3"] {
        followed.until_route(
            address,
            |route| matches!(route, Route::Via { neighbour: Neighbour::Known(found), .. } if found == mac),
        );
    }
    let mut resolver = followed.follower.resolver();
    resolver.touch(PORT, ip("10.77.0.3"), 1);
    resolver.resolve(PORT, ip("10.77.0.3"));
    resolver.touch(PORT, ip("10.77.0.2"), 1);
    wait_until("the stale neighbour is checked", || {
        near.exec("ip neigh show 10.77.0.2").contains("REACHABLE")
    });
    assert!(near.exec("ip neigh show 10.77.0.3").contains("PERMANENT"));
}

/// DP-5: a change of the MTU counts at once; a link that goes down takes its routes along and brings some back.
#[test]
fn dp_5_links_change() {
    let (near, _far) = joined();
    let mut followed = Followed::new(&near);
    near.ip("link set n0 mtu 1380");
    followed.until_route("10.77.0.2", |route| matches!(route, Route::Via { mtu: 1380, .. }));
    assert_eq!(followed.fib.mtu_of(PORT), Some(1380));
    near.ip("link set n0 address 02:00:00:00:77:01");
    let new = Mac([2, 0, 0, 0, 0x77, 1]);
    followed.until_route(
        "10.77.0.2",
        |route| matches!(route, Route::Via { source_mac, .. } if source_mac == new),
    );
    near.ip("link set n0 down");
    followed.until_route("10.77.0.2", |route| route == Route::Unreachable);
    near.ip("link set n0 up");
    followed.until_route("10.77.0.2", |route| goes_via(route, "10.77.0.2"));
    near.ip("addr add 10.78.0.1/24 dev n0");
    followed.until_route("10.78.0.1", |route| route == Route::Local);
    near.ip("addr del 10.77.0.1/24 dev n0");
    followed.until("another address", |fib| fib.address_of(PORT, false) == Some(ip("10.78.0.1")));
    near.ip("link del n0");
    followed.until_route("10.78.0.2", |route| route == Route::Unreachable);
    followed.until("no address", |fib| fib.address_of(PORT, false).is_none());
}

/// A burst larger than any socket buffer ends in the right view, whether or not notifications were lost.
#[test]
fn bursts_settle() {
    let (near, _far) = joined();
    let mut followed = Followed::new(&near);
    let mut batch = String::new();
    for n in 0..20_000_u32 {
        let [_, _, high, low] = n.to_be_bytes();
        writeln!(batch, "route add 20.{high}.{low}.0/24 via 10.77.0.2").unwrap();
    }
    let path = std::env::temp_dir().join(format!("postern-fib-{}", std::process::id()));
    std::fs::write(&path, batch).unwrap();
    near.ip(&format!("-batch {}", path.display()));
    std::fs::remove_file(&path).unwrap();
    followed.until("the last of many routes", |fib| goes_via(fib.lookup(ip("20.78.31.1")), "10.77.0.2"));
    let missing = (0..20_000_u32).map(|n| IpAddr::from((0x1400_0001 + (n << 8)).to_be_bytes()));
    assert_eq!(missing.filter(|address| !goes_via(followed.fib.lookup(*address), "10.77.0.2")).count(), 0);
    near.ip("link set n0 mtu 1400");
    followed.until_route("20.0.0.1", |route| matches!(route, Route::Via { mtu: 1400, .. }));
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "in 20 s not seen: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
