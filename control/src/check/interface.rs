//! The interfaces: what the driver of each can do, and what stands in the workers' way there.

use std::process::Command;

use postern_contract::settings::{DatapathSettings, InterfaceSettings, PortKind, XdpMode};

use super::{Finding, Machine, fail, ok, warn};

/// Largest MTU that fits a frame beside its headroom when XDP runs in the driver.
const XDP_MTU: u64 = 3498;

/// Drivers known to run XDP themselves; those with `true` have AF_XDP zero-copy (kernel 6.18's sources).
const DRIVERS: &[(&str, bool)] = &[
    ("bnxt_en", false),
    ("ena", false),
    ("gve", true),
    ("hv_netvsc", false),
    ("i40e", true),
    ("ice", true),
    ("idpf", true),
    ("igb", true),
    ("igc", true),
    ("ixgbe", true),
    ("ixgbevf", false),
    ("mana", false),
    ("mlx4_en", false),
    ("mlx5_core", true),
    ("mvneta", false),
    ("nfp", true),
    ("qede", false),
    ("sfc", false),
    ("stmmac", true),
    ("tap", false),
    ("tun", false),
    ("veth", false),
    ("virtio_net", true),
    ("vmxnet3", false),
];

impl Machine {
    pub(super) fn interface(
        &self,
        interface: &InterfaceSettings,
        settings: &DatapathSettings,
    ) -> Vec<Finding> {
        let name = &interface.name;
        match interface.port {
            PortKind::Tun if self.path("/dev/net/tun").exists() => {
                return vec![ok(name, "a TUN device, made by the datapath")];
            }
            PortKind::Tun => {
                return vec![fail(
                    name,
                    "/dev/net/tun is not there",
                    "modprobe tun, or give the container the device",
                )];
            }
            PortKind::Socket => return vec![ok(name, "raw and UDP sockets")],
            PortKind::Xsk => {}
        }
        let base = format!("/sys/class/net/{name}");
        if !self.path(&base).exists() {
            let others: Vec<_> =
                self.list("/sys/class/net").into_iter().filter(|other| other != "lo").collect();
            return vec![fail(
                name,
                "there is no such interface",
                format!("interfaces here: {}", others.join(", ")),
            )];
        }
        let mut findings = Vec::new();
        if self.read(&format!("{base}/operstate")).as_deref() == Some("down") {
            findings.push(warn(name, "the interface is down", format!("ip link set {name} up")));
        }
        let features = ethtool(&["-i", name]);
        let driver = self.link(&format!("{base}/device/driver")).or_else(|| {
            let info = features.as_deref()?;
            info.lines().find_map(|line| line.strip_prefix("driver: ")).map(str::to_owned)
        });
        findings.push(driver_finding(interface, driver.as_deref()));
        findings.extend(self.far_workers(name, settings));
        findings.extend(self.busy_poll(name, driver.as_deref(), settings));

        let queues =
            self.list(&format!("{base}/queues")).iter().filter(|queue| queue.starts_with("rx-")).count();
        let workers = settings.workers();
        findings.push(match queues.cmp(&workers) {
            core::cmp::Ordering::Equal => ok(name, format!("{queues} receive queues for {workers} workers")),
            core::cmp::Ordering::Less => warn(
                name,
                format!("{queues} receive queues for {workers} workers: some have nothing to receive"),
                format!("ethtool -L {name} combined {workers}, or fewer datapath.cores"),
            ),
            core::cmp::Ordering::Greater => warn(
                name,
                format!("{queues} receive queues for {workers} workers: a worker serves several"),
                format!("ethtool -L {name} combined {workers}, or more datapath.cores"),
            ),
        });
        let mtu =
            self.read(&format!("{base}/mtu")).and_then(|mtu| mtu.parse::<u64>().ok()).unwrap_or_default();
        if mtu > XDP_MTU {
            findings.push(warn(
                name,
                format!("MTU {mtu} does not fit a frame; the driver may refuse the XDP program"),
                format!("ip link set {name} mtu {XDP_MTU} or less"),
            ));
        }
        if driver.as_deref() == Some("veth") {
            findings.push(self.veth_peer(name, &base));
        }
        if let Some(text) = ethtool(&["-k", name])
            && text.lines().any(|line| line.trim().starts_with("large-receive-offload: on"))
        {
            findings.push(warn(
                name,
                "large receive offload joins packets before XDP sees them",
                format!("ethtool -K {name} lro off"),
            ));
        }
        findings
    }

    /// Workers that are on another memory node than the interface.
    fn far_workers(&self, name: &str, settings: &DatapathSettings) -> Option<Finding> {
        let node = self.read(&format!("/sys/class/net/{name}/device/numa_node"))?.parse::<u32>().ok()?;
        let far: Vec<_> = settings
            .cores
            .iter()
            .filter(|core| self.node(**core).is_some_and(|other| other != node))
            .collect();
        if far.is_empty() {
            return None;
        }
        let near = self.read(&format!("/sys/devices/system/node/node{node}/cpulist"));
        Some(warn(
            name,
            format!(
                "it is on memory node {node}, the workers' processors {far:?} are not: packets cross between nodes"
            ),
            format!("name processors of that node with datapath.cores: {}", near.unwrap_or_default()),
        ))
    }

    /// What busy polling needs of an interface.
    fn busy_poll(&self, name: &str, driver: Option<&str>, settings: &DatapathSettings) -> Option<Finding> {
        if settings.busy_poll_us == 0 {
            return None;
        }
        if driver == Some("veth") {
            return Some(warn(
                name,
                "busy polling: a veth tells Linux 6.14 and later of no receive loop to run, so busy_poll_us does nothing",
                "datapath.busy_poll_us = 0, or a card",
            ));
        }
        let base = format!("/sys/class/net/{name}");
        let set = |file: &str| self.read(&format!("{base}/{file}")).is_some_and(|value| value != "0");
        Some(if set("napi_defer_hard_irqs") && set("gro_flush_timeout") {
            ok(name, format!("busy polling for {} µs, interrupts put off meanwhile", settings.busy_poll_us))
        } else {
            warn(
                name,
                "busy polling: interrupts are not put off, so they and the worker run the receive loop in turns",
                format!("echo 2 > {base}/napi_defer_hard_irqs; echo 200000 > {base}/gro_flush_timeout"),
            )
        })
    }

    /// A veth peer that leaves checksums to a device that does not exist hands us frames with unfinished ones.
    fn veth_peer(&self, name: &str, base: &str) -> Finding {
        let advice = "in the namespace of the other end: ethtool -K PEER tx off".to_owned();
        let index = self.read(&format!("{base}/iflink"));
        let here = self.list("/sys/class/net").into_iter().find(|other| {
            other != name && self.read(&format!("/sys/class/net/{other}/ifindex")) == index && index.is_some()
        });
        let peer = here.filter(|peer| {
            self.read(&format!("/sys/class/net/{peer}/iflink")) == self.read(&format!("{base}/ifindex"))
        });
        let Some(peer) = peer else {
            return warn(
                name,
                "a veth whose other end is in another namespace: packets of programs there may come with unfinished checksums",
                advice,
            );
        };
        match ethtool(&["-k", &peer]) {
            None => warn(
                name,
                format!("the other end {peer} cannot be asked for its offloads without ethtool"),
                advice,
            ),
            Some(text) if text.lines().any(|line| line.trim() == "tx-checksumming: off") => {
                ok(name, format!("the other end {peer} finishes its checksums"))
            }
            Some(_) => warn(
                name,
                format!(
                    "the other end {peer} leaves checksums unfinished: packets of programs there are protected with wrong ones"
                ),
                format!("ethtool -K {peer} tx off"),
            ),
        }
    }
}

fn driver_finding(interface: &InterfaceSettings, driver: Option<&str>) -> Finding {
    let name = &interface.name;
    let Some(driver) = driver else {
        return warn(
            name,
            "its driver is unknown: XDP may only run in the network stack (slow)",
            "install ethtool and check again",
        );
    };
    match DRIVERS.iter().find(|(known, _)| *known == driver) {
        Some((_, true)) if interface.zero_copy => {
            ok(name, format!("driver {driver}: XDP in the driver, zero-copy"))
        }
        Some((_, true)) => warn(
            name,
            format!("driver {driver} has zero-copy, and the configuration turns it off"),
            "zero_copy = true in its section",
        ),
        Some((_, false)) => ok(name, format!("driver {driver}: XDP in the driver, frames are copied")),
        None if interface.xdp == XdpMode::Native => fail(
            name,
            format!("driver {driver} is not known to run XDP, and xdp = \"native\" demands it"),
            "xdp = \"auto\", or another card",
        ),
        None => warn(
            name,
            format!("driver {driver} is not known to run XDP: the network stack will do it (slow)"),
            "use a card whose driver has it, such as ice, i40e, ixgbe, igc or mlx5",
        ),
    }
}

/// What `ethtool` says; `None` where it is not installed or knows nothing.
fn ethtool(arguments: &[&str]) -> Option<String> {
    let output = Command::new("ethtool").args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
