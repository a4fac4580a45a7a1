//! The networks that tests, demo and lab use, with addresses that are the same everywhere.
//!
//! ```text
//! pair     h1 ── g1 ──[left]── g2 ── h2                        two gateways on one segment
//! relay    h1 ── g1 ──[left]── relay ──[right]── g2 ── h2      a relay between them
//! routed   h1 ── g1 ──[left]── router ──[right]── g2 ── h2     an ordinary router (kernel) between them
//! roam     client ═══ access ──[left]── g2 ── h2               a client with three networks; the first is behind a NAT
//! ```
//!
//! Every name is a namespace; the segments are bridges in a namespace of their own called `wire`, where packets
//! between gateways can be captured. All interfaces have an IPv4 and an IPv6 address, but for the client's networks, which
//! have IPv4 only. Only router and access forward.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::config::{Config, Interface, Pair, Relay, Suite, Tunnel};
use crate::netns::{Netns, janitor, scratch_dir, unique_prefix};
use crate::node::Node;
use crate::veth::{End, Wire, address, plug, route, segment};

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Two gateways on one segment.
    Pair,
    /// A relay between two gateways.
    Relay,
    /// A router between two gateways.
    Routed,
    /// A client that moves between networks.
    Roam,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pair, Self::Relay, Self::Routed, Self::Roam];

    /// Name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Relay => "relay",
            Self::Routed => "routed",
            Self::Roam => "roam",
        }
    }

    /// One line for people.
    pub const fn help(self) -> &'static str {
        match self {
            Self::Pair => "h1 - g1 -[left]- g2 - h2: two gateways on one segment",
            Self::Relay => "h1 - g1 -[left]- relay -[right]- g2 - h2: a blind relay between two gateways",
            Self::Routed => {
                "h1 - g1 -[left]- router -[right]- g2 - h2: an ordinary router between two gateways"
            }
            Self::Roam => {
                "client = access -[left]- g2 - h2: a client with three networks, the first behind a NAT"
            }
        }
    }

    /// The namespaces.
    pub const fn roles(self) -> &'static [&'static str] {
        match self {
            Self::Pair => &["h1", "g1", "wire", "g2", "h2"],
            Self::Relay => &["h1", "g1", "wire", "relay", "g2", "h2"],
            Self::Routed => &["h1", "g1", "wire", "router", "g2", "h2"],
            Self::Roam => &["client", "access", "wire", "g2", "h2"],
        }
    }

    /// What stands between the two segments.
    const fn middle(self) -> Option<&'static str> {
        match self {
            Self::Pair | Self::Roam => None,
            Self::Relay => Some("relay"),
            Self::Routed => Some("router"),
        }
    }
}

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    const fn pick<T: Copy>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    /// `IPv4` or `IPv6`.
    pub const fn name(self) -> &'static str {
        self.pick("IPv4", "IPv6")
    }
}

/// A segment between gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Where g1 is.
    Left,
    /// Where g2 is, unless there is only one.
    Right,
}

impl Segment {
    /// Name of the bridge.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
        }
    }

    /// The address with this last number on the segment.
    pub fn address(self, family: Family, host: u8) -> IpAddr {
        let net = u16::from(self == Self::Right) + 1;
        match (family, self) {
            (Family::V4, Self::Left) => IpAddr::from([192, 0, 2, host]),
            (Family::V4, Self::Right) => IpAddr::from([198, 51, 100, host]),
            (Family::V6, _) => IpAddr::from([0x2001, 0xdb8, net, 0, 0, 0, 0, u16::from(host)]),
        }
    }

    /// The segment's network.
    pub fn net(self, family: Family) -> String {
        format!("{}/{}", self.address(family, 0), family.pick(24, 64))
    }
}

/// The inside address with this last number behind gateway 1 or 2.
pub fn inside(family: Family, gateway: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, gateway, 0, host]),
        Family::V6 => IpAddr::from([0xfd00, u16::from(gateway), 0, 0, 0, 0, 0, u16::from(host)]),
    }
}

/// The network behind gateway 1 or 2.
pub fn inside_net(family: Family, gateway: u8) -> String {
    format!("{}/{}", inside(family, gateway, 0), family.pick(24, 64))
}

/// Network number `number` (from 0) of those that [`Topology::more_networks`] adds behind g2.
pub fn more_net(family: Family, number: u8) -> String {
    format!("{}/{}", more_inside(family, number, 0), family.pick(24, 64))
}

/// An address in it; the host's ends with 10.
pub fn more_inside(family: Family, number: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 100, number, host]),
        Family::V6 => IpAddr::from([0xfd00, 0x100, u16::from(number), 0, 0, 0, 0, u16::from(host)]),
    }
}

/// The client's address in its network `number` (0 to 2; 0 is behind a NAT).
pub fn roaming(number: u8) -> IpAddr {
    IpAddr::from([172, 16 + number, 0, 10])
}

/// Where the relay translates (`datapath.relay`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayPath {
    /// In the XDP program.
    Xdp,
    /// In the workers.
    Worker,
}

impl RelayPath {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Xdp, Self::Worker];

    /// As the configuration has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Worker => "worker",
        }
    }
}

/// A standing network and the nodes in it.
#[derive(Debug)]
pub struct Topology {
    kind: Kind,
    dir: PathBuf,
    keep: bool,
    path: Option<RelayPath>,
    // Nodes end before their namespaces go.
    nodes: BTreeMap<String, Node>,
    namespaces: BTreeMap<&'static str, Netns>,
}

impl Topology {
    /// Builds it for this process, after tidying up behind dead ones. Removed on drop.
    pub fn build(kind: Kind) -> Result<Self> {
        Self::build_with(kind, Wire::default())
    }

    /// [`Topology::build`] with other wires between gateways and segments.
    pub fn build_with(kind: Kind, wire: Wire) -> Result<Self> {
        janitor();
        let prefix = unique_prefix();
        Self::build_named(kind, wire, &prefix, scratch_dir(&prefix)?)
    }

    /// Builds it under names and in a directory of the caller's choice.
    pub fn build_named(kind: Kind, wire: Wire, prefix: &str, dir: PathBuf) -> Result<Self> {
        let mut topology =
            Self { kind, dir, keep: false, path: None, nodes: BTreeMap::new(), namespaces: BTreeMap::new() };
        for role in kind.roles() {
            topology.namespaces.insert(role, Netns::create(prefix, role)?);
        }
        topology.lay_wires(wire)?;
        Ok(topology)
    }

    /// Has the relay translate on this path from its next start on, and gives it wires that allow it.
    pub fn translate(&mut self, path: RelayPath) -> Result<()> {
        self.configure(path);
        if path == RelayPath::Xdp { self.take_frames_from_xdp() } else { Ok(()) }
    }

    /// Configures the relay for this path from its next start on.
    pub fn configure(&mut self, path: RelayPath) {
        self.path = Some(path);
    }

    /// Has the relay's wires take frames from XDP, as a network card does: a veth does while its other end has GRO.
    pub fn take_frames_from_xdp(&self) -> Result<()> {
        for port in ["middle-left", "middle-right"] {
            self.ns("wire")?.sh(&format!("ethtool -K {port} gro on"))?;
        }
        Ok(())
    }

    fn lay_wires(&self, wire: Wire) -> Result<()> {
        let roam = self.kind == Kind::Roam;
        for (number, host, gateway) in [(1, "h1", "g1"), (2, "h2", "g2")].into_iter().skip(usize::from(roam))
        {
            let host = End { namespace: self.ns(host)?, interface: "eth0" };
            let gateway = End { namespace: self.ns(gateway)?, interface: "inside" };
            wire.connect(host, gateway)?;
            for family in Family::ALL {
                let prefix = family.pick(24, 64);
                address(host, inside(family, number, 10), prefix)?;
                address(gateway, inside(family, number, 1), prefix)?;
                route(host.namespace, "default", inside(family, number, 1))?;
            }
        }
        let segments = self.ns("wire")?;
        segment(segments, "left")?;
        let far = if let Some(middle) = self.kind.middle() {
            segment(segments, "right")?;
            for (at, port) in [(Segment::Left, "middle-left"), (Segment::Right, "middle-right")] {
                let end = End { namespace: self.ns(middle)?, interface: at.name() };
                plug(wire, end, segments, at.name(), port)?;
                for family in Family::ALL {
                    address(end, at.address(family, 10), family.pick(24, 64))?;
                }
            }
            Segment::Right
        } else {
            Segment::Left
        };
        if roam {
            self.lay_roaming_wires(wire)?;
        }
        for (gateway, at, host) in
            [("g1", Segment::Left, 1), ("g2", far, 2)].into_iter().skip(usize::from(roam))
        {
            let end = End { namespace: self.ns(gateway)?, interface: "outside" };
            plug(wire, end, segments, at.name(), gateway)?;
            for family in Family::ALL {
                address(end, at.address(family, host), family.pick(24, 64))?;
            }
        }
        if roam {
            route(self.ns("g2")?, "172.16.0.0/12", Segment::Left.address(Family::V4, 254))?;
        }
        if self.kind == Kind::Routed {
            self.ns("router")?.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
            for family in Family::ALL {
                route(self.ns("g1")?, &Segment::Right.net(family), Segment::Left.address(family, 10))?;
                route(self.ns("g2")?, &Segment::Left.net(family), Segment::Right.address(family, 10))?;
            }
        }
        Ok(())
    }

    /// Between the client and the segment. The client prefers its first network, then its second.
    fn lay_roaming_wires(&self, wire: Wire) -> Result<()> {
        let (client, access) = (self.ns("client")?, self.ns("access")?);
        let wan = End { namespace: access, interface: "wan" };
        plug(wire, wan, self.ns("wire")?, "left", "access")?;
        address(wan, Segment::Left.address(Family::V4, 254), 24)?;
        for number in 0..3 {
            let (up, down) = (format!("up{number}"), format!("down{number}"));
            let near = End { namespace: client, interface: &up };
            let far = End { namespace: access, interface: &down };
            wire.connect(near, far)?;
            let gateway = IpAddr::from([172, 16 + number, 0, 254]);
            address(near, roaming(number), 24)?;
            address(far, gateway, 24)?;
            let metric = u32::from(number) * 100 + 100;
            client.sh(&format!("ip route add default via {gateway} dev {up} metric {metric}"))?;
        }
        access.sh("sysctl -qw net.ipv4.ip_forward=1")?;
        access.sh("nft add table ip nat")?;
        access.sh("nft add chain ip nat post { type nat hook postrouting priority srcnat ; }")?;
        // The ports are others outside, as behind a NAT with several clients.
        access.sh("nft add rule ip nat post ip saddr 172.16.0.0/24 oifname wan meta l4proto udp masquerade to :20000-30000")?;
        access.sh("nft add rule ip nat post ip saddr 172.16.0.0/24 oifname wan masquerade")?;
        Ok(())
    }

    /// Which network it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Directory for files: nodes, captures, logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A namespace by its role.
    pub fn ns(&self, role: &str) -> Result<&Netns> {
        self.namespaces.get(role).with_context(|| format!("{} has no {role}", self.kind.name()))
    }

    /// Outer addresses of g1 and g2.
    pub fn outer(&self, family: Family) -> (IpAddr, IpAddr) {
        let far = if self.kind.middle().is_none() { Segment::Left } else { Segment::Right };
        (Segment::Left.address(family, 1), far.address(family, 2))
    }

    /// Puts `count` more networks behind g2, all on h2's interface: so many tunnels find room in one topology.
    pub fn more_networks(&self, family: Family, count: u8) -> Result<()> {
        let gateway = End { namespace: self.ns("g2")?, interface: "inside" };
        let host = End { namespace: self.ns("h2")?, interface: "eth0" };
        for number in 0..count {
            address(gateway, more_inside(family, number, 1), family.pick(24, 64))?;
            address(host, more_inside(family, number, 10), family.pick(24, 64))?;
        }
        Ok(())
    }

    /// A tunnel between g1's network and one of [`Topology::more_networks`].
    pub fn tunnel_to_more(
        &self,
        number: u8,
        esp: Option<Suite>,
        ah: Option<Suite>,
        outer: Family,
        inner: Family,
    ) -> Result<Pair> {
        let nets = (inside_net(inner, 1), more_net(inner, number));
        Pair::new(u32::from(number), esp, ah, self.outer(outer), (&nets.0, &nets.1))
    }

    /// A tunnel between the networks of both gateways (tunnel mode).
    pub fn tunnel(
        &self,
        number: u32,
        esp: Option<Suite>,
        ah: Option<Suite>,
        outer: Family,
        inner: Family,
    ) -> Result<Pair> {
        let nets = (inside_net(inner, 1), inside_net(inner, 2));
        Pair::new(number, esp, ah, self.outer(outer), (&nets.0, &nets.1))
    }

    /// Starts g1 and g2, and the relay where there is one, with these tunnels.
    pub fn start(&mut self, pairs: &[Pair]) -> Result<()> {
        let (mut left, mut right, mut relays) = (Vec::new(), Vec::new(), Vec::new());
        for pair in pairs {
            if self.kind == Kind::Relay {
                let family = if pair.outer.0.is_ipv4() { Family::V4 } else { Family::V6 };
                let relay = (Segment::Left.address(family, 10), Segment::Right.address(family, 10));
                let (a, b, entry) = pair.through_relay(relay.0, relay.1);
                left.push(a);
                right.push(b);
                relays.push(entry);
            } else {
                left.push(pair.left());
                right.push(pair.right());
            }
        }
        if self.kind == Kind::Relay {
            self.start_node("relay", relay_config(relays))?;
        }
        self.start_node("g1", gateway_config(left))?;
        self.start_node("g2", gateway_config(right))
    }

    /// Starts one node.
    pub fn start_node(&mut self, role: &str, mut config: Config) -> Result<()> {
        // One that is there already ends first: the new one takes its sockets.
        drop(self.nodes.remove(role));
        if role == "relay" && config.datapath.relay.is_none() {
            config.datapath.relay = self.path.map(RelayPath::name);
        }
        let node = Node::start(self.ns(role)?, role, &self.dir, config)?;
        self.nodes.insert(role.to_owned(), node);
        Ok(())
    }

    /// Stops one node in good order.
    pub fn stop_node(&mut self, role: &str) -> Result<()> {
        let node = self.nodes.remove(role).with_context(|| format!("{role} runs no Postern"))?;
        drop(node);
        Ok(())
    }

    /// A running node.
    pub fn node(&self, role: &str) -> Result<&Node> {
        self.nodes.get(role).with_context(|| format!("{role} runs no Postern"))
    }

    /// The same, to start and stop its parts.
    pub fn node_mut(&mut self, role: &str) -> Result<&mut Node> {
        self.nodes.get_mut(role).with_context(|| format!("{role} runs no Postern"))
    }

    /// Runs `body`; when it fails, the tables and the logs of all nodes go to standard error.
    pub fn check(&mut self, body: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        body(self).inspect_err(|_| eprintln!("{}", self.report()))
    }

    /// Tables and logs of all nodes.
    pub fn report(&self) -> String {
        let mut text = String::from("state of the nodes when it failed:\n");
        for node in self.nodes.values() {
            for table in ["status", "sa", "relay", "drops"] {
                let shown = node.cli(&[table]).unwrap_or_else(|error| format!("{error:#}\n"));
                text.extend([node.name(), " ", table, ":\n", &shown]);
            }
            text += &node.log();
        }
        text
    }

    /// Leaves everything standing when this value is gone (the lab).
    pub fn leave(mut self) {
        self.keep = true;
        std::mem::take(&mut self.nodes).into_values().for_each(Node::leave);
        self.namespaces.values_mut().for_each(Netns::leave);
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        if !self.keep {
            self.nodes.clear();
            self.namespaces.clear();
            // Files that are left are the janitor's.
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// Configuration of a gateway with these tunnels.
pub fn gateway_config(tunnels: Vec<Tunnel>) -> Config {
    let mut config = Config { tunnels, ..Config::default() };
    for (name, role) in [("inside", "inside"), ("outside", "outside")] {
        config.datapath.interfaces.push(Interface { name: name.to_owned(), role, port: "xsk" });
    }
    config
}

/// Configuration of a host that is no appliance: its own traffic through a TUN device, IPsec through sockets.
pub fn host_config(tunnels: Vec<Tunnel>) -> Config {
    let mut config = Config { tunnels, ..Config::default() };
    for (name, role, port) in [("pt0", "inside", "tun"), ("sockets", "outside", "socket")] {
        config.datapath.interfaces.push(Interface { name: name.to_owned(), role, port });
    }
    config
}

/// Configuration of a relay with these entries.
pub fn relay_config(relays: Vec<Relay>) -> Config {
    let mut config = Config { relays, ..Config::default() };
    for name in ["left", "right"] {
        config.datapath.interfaces.push(Interface { name: name.to_owned(), role: "outside", port: "xsk" });
    }
    config
}
