//! Where contestants stand: a gateway between two wires, and the far ends of both in one namespace.
//!
//! ```text
//! far: lan0 ══ inside :gateway: outside ══ wan0 :far
//! ```

use std::net::IpAddr;

use anyhow::Result;
use postern_hwtests::netns::Netns;
use postern_hwtests::packet::mac;
use postern_hwtests::veth::{End, Wire, address, route};

/// The gateway's addresses, the peer's outside, and the networks.
pub const INSIDE: [u8; 4] = [10, 1, 0, 1];
pub const OUTSIDE: [u8; 4] = [192, 0, 2, 1];
pub const PEER: [u8; 4] = [192, 0, 2, 2];
pub const NEAR_HOST: [u8; 4] = [10, 1, 0, 10];
pub const FAR_HOST: [u8; 4] = [10, 2, 0, 10];

/// A link-layer address that no interface has: the stack at the far ends leaves such frames alone.
pub const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

/// One end of a wire, as the generator needs to know it.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    /// Number of the far end's interface.
    pub ifindex: u32,
    /// Link-layer address of the gateway's interface.
    pub gateway: [u8; 6],
}

pub struct Wires {
    pub gateway: Netns,
    pub far: Netns,
    pub lan: Port,
    pub wan: Port,
}

impl Wires {
    pub fn lay(prefix: &str, name: &str) -> Result<Self> {
        let gateway = Netns::create(prefix, &format!("{name}-gw"))?;
        let far = Netns::create(prefix, &format!("{name}-far"))?;
        for namespace in [&gateway, &far] {
            // Nothing but what is measured is on the wires.
            namespace.sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1")?;
        }
        let mut ports = Vec::new();
        for (near, other, own) in [("inside", "lan0", INSIDE), ("outside", "wan0", OUTSIDE)] {
            let end = End { namespace: &gateway, interface: near };
            Wire::default().connect(end, End { namespace: &far, interface: other })?;
            address(end, IpAddr::from(own), 24)?;
            let ifindex = far.sh(&format!("cat /sys/class/net/{other}/ifindex"))?.trim().parse()?;
            ports.push(Port { ifindex, gateway: mac(&gateway, near)? });
        }
        let nobody = NOBODY.map(|byte| format!("{byte:02x}")).join(":");
        for (host, near) in [(NEAR_HOST, "inside"), (PEER, "outside")] {
            let host = IpAddr::from(host);
            gateway.sh(&format!("ip neigh add {host} lladdr {nobody} dev {near} nud permanent"))?;
        }
        route(&gateway, "10.2.0.0/24", IpAddr::from(PEER))?;
        let [lan, wan] = ports.try_into().map_err(|_| anyhow::anyhow!("two ports"))?;
        Ok(Self { gateway, far, lan, wan })
    }
}
