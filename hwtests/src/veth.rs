//! Wires between namespaces: veth pairs and the segments (bridges) in between.

use std::net::IpAddr;
use std::process::Command;

use anyhow::Result;

use crate::netns::Netns;
use crate::process::run;

/// One end of a wire.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Where it lies.
    pub namespace: &'a Netns,
    /// Name of the interface.
    pub interface: &'a str,
}

/// A pair of interfaces and how they are made.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// MTU of both ends.
    pub mtu: u16,
    /// Receive and transmit queues of both ends.
    pub queues: u8,
}

impl Default for Wire {
    fn default() -> Self {
        Self { mtu: 1500, queues: 1 }
    }
}

impl Wire {
    /// Connects the two ends and sets them up, without addresses.
    ///
    /// Checksum offload is switched off on both: over veth it means that checksums are left unfinished, which an
    /// AF_XDP socket at the other end would see. Segmentation offload goes with it.
    pub fn connect(self, a: End<'_>, b: End<'_>) -> Result<()> {
        let (mtu, queues) = (self.mtu.to_string(), self.queues.to_string());
        let mut command = Command::new("ip");
        command.args(["link", "add", a.interface, "netns", a.namespace.name(), "mtu", &mtu]);
        command.args(["numrxqueues", &queues, "numtxqueues", &queues, "type", "veth"]);
        command.args(["peer", "name", b.interface, "netns", b.namespace.name(), "mtu", &mtu]);
        command.args(["numrxqueues", &queues, "numtxqueues", &queues]);
        run(&mut command)?;
        for end in [a, b] {
            end.namespace.sh(&format!("ethtool -K {} tx off", end.interface))?;
            end.namespace.sh(&format!("ip link set {} up", end.interface))?;
        }
        Ok(())
    }
}

/// A bridge in `namespace`: a network segment on which packets between two gateways can be captured.
///
/// A capture on a gateway's own interface sees nothing: XDP takes frames before the capture, and an AF_XDP socket
/// sends them behind it.
pub fn segment(namespace: &Netns, name: &str) -> Result<()> {
    namespace.sh(&format!("ip link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
    // The bridge itself takes no part in the traffic.
    namespace.sh(&format!("sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1"))?;
    namespace.sh(&format!("ip link set {name} up"))?;
    Ok(())
}

/// Connects `end` to the segment `bridge`; the segment's side of the wire gets the name `port`.
pub fn plug(wire: Wire, end: End<'_>, namespace: &Netns, bridge: &str, port: &str) -> Result<()> {
    wire.connect(end, End { namespace, interface: port })?;
    namespace.sh(&format!("sysctl -qw net.ipv6.conf.{port}.disable_ipv6=1"))?;
    namespace.sh(&format!("ip link set {port} master {bridge}"))?;
    Ok(())
}

/// Gives an interface an address, usable at once.
pub fn address(end: End<'_>, address: IpAddr, prefix: u8) -> Result<()> {
    let nodad = if address.is_ipv6() { " nodad" } else { "" };
    end.namespace.sh(&format!("ip addr add {address}/{prefix} dev {}{nodad}", end.interface))?;
    Ok(())
}

/// Adds a route.
pub fn route(namespace: &Netns, to: &str, via: IpAddr) -> Result<()> {
    let family = if via.is_ipv6() { "-6" } else { "-4" };
    namespace.sh(&format!("ip {family} route add {to} via {via}"))?;
    Ok(())
}
