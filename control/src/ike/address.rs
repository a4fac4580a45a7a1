//! This machine's addresses: followed by netlink (MOB-3, RFC 4555), and the virtual ones that a gateway assigned (RFC 7296
//! section 2.19) set and taken away, with the routes that lead what is behind the gateway into its tunnel.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::thread::Builder;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use postern_ike::message::TrafficSelector;
use postern_ike::output::{ChildId, ChildSa, SaId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc::UnboundedSender;

/// Multicast groups of rtnetlink: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR and
/// RTNLGRP_IPV6_ROUTE. A new route can make another address the one that packets leave from.
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// Changes come in bursts: an address, its routes, its link. This long after the last one they are told together.
const QUIET: Duration = Duration::from_millis(50);

/// But no later than this after the first.
const AT_MOST: u32 = 20;

/// How often the thread looks whether anybody still listens.
const ROUND: Duration = Duration::from_secs(1);

/// Follows addresses and routes in a thread of its own, in the network namespace of the caller. After each change all
/// usable addresses are sent to `changes`, the same ones too; the thread ends when that is closed.
pub fn follow(changes: UnboundedSender<Vec<IpAddr>>) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    Builder::new().name("addresses".to_owned()).spawn(move || {
        let mut buffer = Vec::with_capacity(1 << 16);
        while !changes.is_closed() {
            if !readable(&socket, ROUND) {
                continue;
            }
            for _ in 0..AT_MOST {
                // What was lost for want of room (ENOBUFS) is a change like any other.
                while drain(&socket, &mut buffer) {}
                if !readable(&socket, QUIET) {
                    break;
                }
            }
            match usable() {
                Ok(addresses) => {
                    if changes.send(addresses).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!("this machine's addresses cannot be read: {error}"),
            }
        }
    })?;
    Ok(())
}

fn readable(socket: &Socket, timeout: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(1),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0)
}

fn drain(socket: &Socket, buffer: &mut Vec<u8>) -> bool {
    buffer.clear();
    match socket.recv(buffer, libc::MSG_DONTWAIT) {
        Ok(length) => length > 0,
        Err(error) => error.raw_os_error() == Some(libc::ENOBUFS),
    }
}

/// Addresses that a peer could reach: of interfaces that are up, neither loopback nor link-local.
pub fn usable() -> io::Result<Vec<IpAddr>> {
    let mut found = BTreeSet::new();
    for interface in getifaddrs()? {
        let up = interface.flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING);
        let Some(address) = interface.address.filter(|_| up) else { continue };
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let v6 = address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
        let reachable = |address: &IpAddr| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        };
        found.extend(v4.or(v6).filter(reachable));
    }
    Ok(found.into_iter().collect())
}

/// Virtual addresses on an interface. Several IKE SAs may have the same one, while one takes over from another.
#[derive(Debug)]
pub struct VirtualAddresses {
    interface: String,
    held: HashMap<SaId, Vec<IpAddr>>,
    routes: HashMap<ChildId, Vec<Route>>,
}

/// A network, and the virtual address that packets to it leave from.
type Route = (IpNet, IpAddr);

impl VirtualAddresses {
    /// On the interface of this name.
    pub fn new(interface: String) -> Self {
        Self { interface, held: HashMap::new(), routes: HashMap::new() }
    }

    /// Whether an address is a virtual one, which no peer can reach.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.held.values().flatten().any(|held| *held == address)
    }

    /// Sets the addresses of an IKE SA. The error names the first that could not be set.
    pub fn add(&mut self, sa: SaId, addresses: &[IpAddr]) -> Result<(), String> {
        let mut problem = None;
        for address in addresses {
            let new = !self.contains(*address);
            self.held.entry(sa).or_default().push(*address);
            if new && let Err(error) = change(&self.interface, *address, true) {
                problem.get_or_insert(format!("{address} cannot be set on {}: {error}", self.interface));
            }
        }
        problem.map_or(Ok(()), Err)
    }

    /// Takes the addresses of an IKE SA away, but for those that another one has too.
    pub fn remove(&mut self, sa: SaId) {
        for address in self.held.remove(&sa).unwrap_or_default() {
            if !self.contains(address)
                && let Err(error) = change(&self.interface, address, false)
            {
                tracing::warn!("{address} cannot be removed from {}: {error}", self.interface);
            }
        }
    }

    /// A rekey put another IKE SA in the place of one.
    pub fn rename(&mut self, old: SaId, new: SaId) {
        if let Some(addresses) = self.held.remove(&old) {
            self.held.entry(new).or_default().extend(addresses);
        }
    }

    /// Routes what is behind the peer into the interface, for a child whose own side is a virtual address. On loopback
    /// there is nothing to route into. A network that holds the peer's own address would swallow the tunnel itself:
    /// such a route is left to the operator, who may have more than one routing table.
    pub fn route(&mut self, child: &ChildSa) {
        if self.interface == "lo" {
            return;
        }
        let own = child.local_ts.iter().filter(|selector| selector.start == selector.end);
        let own: Vec<IpAddr> = own.map(|selector| selector.start).filter(|own| self.contains(*own)).collect();
        let mut routes = Vec::new();
        for net in child.remote_ts.iter().flat_map(networks) {
            let Some(source) = own.iter().find(|own| own.is_ipv4() == net.addr().is_ipv4()) else { continue };
            if net.contains(&child.remote) {
                tracing::warn!("{net} holds the peer's address {}: set the route yourself", child.remote);
                continue;
            }
            let route = (net, *source);
            if !self.routes.values().flatten().any(|other| *other == route)
                && let Err(error) = change_route(&self.interface, route, true)
            {
                tracing::warn!("{net} cannot be routed into {}: {error}", self.interface);
            }
            routes.push(route);
        }
        if !routes.is_empty() {
            self.routes.insert(child.id, routes);
        }
    }

    /// Takes away the routes of a child that no other one has.
    pub fn unroute(&mut self, child: ChildId) {
        for route in self.routes.remove(&child).unwrap_or_default() {
            if !self.routes.values().flatten().any(|other| *other == route) {
                // Those of an address that is gone are gone already.
                let _ = change_route(&self.interface, route, false);
            }
        }
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        for child in self.routes.keys().copied().collect::<Vec<_>>() {
            self.unroute(child);
        }
        for sa in self.held.keys().copied().collect::<Vec<_>>() {
            self.remove(sa);
        }
    }
}

/// Sets an address on an interface, or removes it; an address that is (or is not) there already is no error.
fn change(interface: &str, address: IpAddr, add: bool) -> io::Result<()> {
    let mut message = AddressMessage::default();
    message.header.index = if_nametoindex(interface)?;
    message.header.scope = AddressScope::Universe;
    (message.header.family, message.header.prefix_len) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.attributes.push(AddressAttribute::Address(address));
    match address {
        IpAddr::V4(_) => message.attributes.push(AddressAttribute::Local(address)),
        // The gateway vouches for it: no duplicate address detection.
        IpAddr::V6(_) => message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad)),
    }
    let (payload, flags) = if add {
        (RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    } else {
        (RouteNetlinkMessage::DelAddress(message), 0)
    };
    match request(payload, flags) {
        Err(error) if !add && error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        result => result,
    }
}

/// The networks that a selector's addresses are made of.
fn networks(selector: &TrafficSelector) -> Vec<IpNet> {
    match (selector.start, selector.end) {
        (IpAddr::V4(start), IpAddr::V4(end)) => Ipv4Subnets::new(start, end, 0).map(IpNet::V4).collect(),
        (IpAddr::V6(start), IpAddr::V6(end)) => Ipv6Subnets::new(start, end, 0).map(IpNet::V6).collect(),
        _ => Vec::new(),
    }
}

/// Sets a route into an interface, or removes it.
fn change_route(interface: &str, (net, source): Route, add: bool) -> io::Result<()> {
    let mut message = RouteMessage::default();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Link;
    message.header.kind = RouteType::Unicast;
    message.header.destination_prefix_length = net.prefix_len();
    let address = |address: IpAddr| match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    };
    message.header.address_family = match net {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.attributes.push(RouteAttribute::Destination(address(net.network())));
    message.attributes.push(RouteAttribute::Oif(if_nametoindex(interface)?));
    message.attributes.push(RouteAttribute::PrefSource(address(source)));
    if add {
        request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    } else {
        request(RouteNetlinkMessage::DelRoute(message), 0)
    }
}

/// Sends a request and waits for its acknowledgement, which the kernel gives before the send returns.
fn request(payload: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(payload));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    if !readable(&socket, ROUND) {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut buffer = Vec::with_capacity(4096);
    socket.recv(&mut buffer, libc::MSG_DONTWAIT)?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MOB-3, IKE-3: virtual addresses come and go, one that two IKE SAs have with the last; a change is noticed. Needs a
    /// network namespace, so it is run by hand or by `hwtests`: this process may not change the machine it runs on.
    #[test]
    fn mob_3_addresses_come_and_go() {
        if std::env::var_os("POSTERN_TEST_NAMESPACE").is_none() {
            return;
        }
        let (sender, mut changes) = tokio::sync::mpsc::unbounded_channel();
        follow(sender).unwrap();
        let address: IpAddr = "192.0.2.77".parse().unwrap();
        let v6: IpAddr = "2001:db8::77".parse().unwrap();
        let mut addresses = VirtualAddresses::new("lo".to_owned());
        addresses.add(SaId(1), &[address, v6]).unwrap();
        addresses.add(SaId(2), &[address]).unwrap();
        let there = |address| usable().unwrap().contains(&address);
        assert!(there(address) && there(v6));
        assert!(changes.blocking_recv().unwrap().contains(&address));
        addresses.rename(SaId(2), SaId(3));
        addresses.remove(SaId(1));
        assert!(there(address) && !there(v6));
        addresses.remove(SaId(3));
        assert!(!there(address));
        assert!(addresses.add(SaId(4), &[address]).is_ok());
        addresses.clear();
        assert!(!there(address));
        let mut nowhere = VirtualAddresses::new("no-such-interface".to_owned());
        assert!(nowhere.add(SaId(1), &[address]).unwrap_err().contains("no-such-interface"));
    }
}
