//! What else on this machine touches the packets: the kernel's own forwarding, and programs that have the ports of IKE.

use std::collections::{BTreeMap, BTreeSet};

use super::{Finding, Machine, ok, warn};

impl Machine {
    pub(super) fn forwarding(&self) -> Vec<Finding> {
        let on = |path: &str| self.read(path).map(|value| value != "0");
        let mut findings = Vec::new();
        for (family, path, key) in [
            ("IPv4", "/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
            ("IPv6", "/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
        ] {
            findings.push(match on(path) {
                Some(true) => ok(
                    "forwarding",
                    format!("{family}: the kernel forwards what no policy takes, tunnels aside"),
                ),
                Some(false) => ok(
                    "forwarding",
                    format!(
                        "{family}: off in the kernel; tunnels work, bypassed traffic is not forwarded ({key})"
                    ),
                ),
                None => warn(
                    "forwarding",
                    format!("{family} is not there"),
                    format!("needed only for {family} tunnels"),
                ),
            });
        }
        if self.read("/proc/sys/net/ipv4/conf/all/rp_filter").as_deref() == Some("1") {
            findings.push(warn(
                "rp_filter",
                "strict: answers to bypassed traffic that return another way are dropped by the kernel",
                "sysctl -w net.ipv4.conf.all.rp_filter=2, if such traffic is bypassed",
            ));
        }
        findings
    }

    /// Who else has the ports of IKE.
    pub(super) fn ports(&self) -> Vec<Finding> {
        let mut taken: BTreeMap<u16, BTreeSet<String>> = BTreeMap::new();
        for table in ["/proc/net/udp", "/proc/net/udp6"] {
            for (port, inode) in udp_sockets(&self.read(table).unwrap_or_default()) {
                if matches!(port, 500 | 4500) {
                    taken
                        .entry(port)
                        .or_default()
                        .insert(self.owner(&inode).unwrap_or_else(|| "another program".to_owned()));
                }
            }
        }
        taken.retain(|_, owners| {
            owners.retain(|owner| !owner.starts_with("postern-"));
            !owners.is_empty()
        });
        if taken.is_empty() {
            return vec![ok("IKE ports", "UDP 500 and 4500 are free")];
        }
        let finding = |(port, owners): (u16, BTreeSet<String>)| {
            let owners = owners.into_iter().collect::<Vec<_>>().join(", ");
            warn(
                "IKE ports",
                format!("UDP {port} is used by {owners}: ESP-in-UDP and IKE of the two would mix"),
                "stop that program (for strongSwan: systemctl disable --now strongswan strongswan-starter), or run it in a namespace of its own",
            )
        };
        taken.into_iter().map(finding).collect()
    }

    /// Name and process id of the program that holds the socket.
    fn owner(&self, inode: &str) -> Option<String> {
        let wanted = format!("socket:[{inode}]");
        let pids =
            self.list("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        for pid in pids {
            let holds =
                |fd: &String| self.link(&format!("/proc/{pid}/fd/{fd}")).is_some_and(|link| link == wanted);
            if self.list(&format!("/proc/{pid}/fd")).iter().any(holds) {
                let name = self.read(&format!("/proc/{pid}/comm")).unwrap_or_default();
                return Some(format!("{name} (pid {pid})"));
            }
        }
        None
    }
}

/// Local port and inode of each socket in `/proc/net/udp`.
fn udp_sockets(table: &str) -> Vec<(u16, String)> {
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, port) = fields.get(1)?.rsplit_once(':')?;
        Some((u16::from_str_radix(port, 16).ok()?, (*fields.get(9)?).to_owned()))
    };
    table.lines().skip(1).filter_map(socket).collect()
}
