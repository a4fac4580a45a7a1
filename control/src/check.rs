//! The preflight check (OPS-1): what this machine has and lacks for Postern, in plain words and with the remedy.
//!
//! Reads `/proc`, `/sys` and `/boot` under a root that tests can replace, opens one AF_XDP socket, and asks `ethtool` and
//! `gzip` where they are installed. Changes nothing, and needs no daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use postern_contract::settings::{Backend, DatapathSettings, InterfaceSettings, PortKind, XdpMode};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use crate::datapath::launch::find_program;

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but worse than it could, or something should be looked at.
    Warn,
    /// It cannot work.
    Fail,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How serious it is.
    pub level: Level,
    /// What was looked at.
    pub subject: String,
    /// What was found.
    pub text: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Bytes of a frame of the datapath's memory.
const FRAME: u64 = 4096;

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

/// Looks at the whole machine. `own` is the program that asks, beside which the datapath's is looked for.
pub fn run(settings: &DatapathSettings, datapath_program: Option<&Path>, own: &Path) -> Vec<Finding> {
    let machine = Machine { root: PathBuf::from("/") };
    let mut findings = Vec::new();
    findings.push(program(find_program(datapath_program, own)));
    findings.extend(machine.kernel(settings));
    findings.push(af_xdp(settings));
    findings.push(machine.capabilities());
    findings.push(memory_lock(settings, machine.has_capability(IPC_LOCK)));
    findings.push(machine.huge_pages(settings));
    findings.push(machine.processor());
    findings.push(machine.crypto(settings.crypto.backend));
    findings.extend(machine.cores(settings));
    findings.extend(machine.nodes(settings));
    findings.extend(wakeup(settings));
    for interface in &settings.interfaces {
        findings.extend(machine.interface(interface, settings));
    }
    if settings.interfaces.is_empty() {
        findings.push(warn(
            "interfaces",
            "none is configured, so the datapath has no packets to work on",
            "add [[datapath.interface]] sections with `name` and `role`",
        ));
    }
    findings.extend(machine.forwarding());
    findings.extend(machine.ports());
    findings
}

/// The worst level among `findings`.
pub fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

/// The findings as text for people.
pub fn show(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.subject.chars().count()).max().unwrap_or_default();
    let line = |Finding { level, subject, text, fix }: &Finding| {
        let word = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let fix = fix.as_ref().map_or_else(String::new, |fix| format!("      {:width$}  -> {fix}\n", ""));
        format!("{word}  {subject:width$}  {text}\n{fix}")
    };
    let lines: Vec<String> = findings.iter().map(line).collect();
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    format!(
        "{}{} ok, {} warn, {} fail\n",
        lines.concat(),
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    )
}

fn ok(subject: impl Into<String>, text: impl Into<String>) -> Finding {
    Finding { level: Level::Ok, subject: subject.into(), text: text.into(), fix: None }
}

fn warn(subject: impl Into<String>, text: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { level: Level::Warn, subject: subject.into(), text: text.into(), fix: Some(fix.into()) }
}

fn fail(subject: impl Into<String>, text: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { level: Level::Fail, subject: subject.into(), text: text.into(), fix: Some(fix.into()) }
}

fn program(found: Option<PathBuf>) -> Finding {
    match found {
        Some(path) if path.exists() => ok("program", format!("the datapath is {}", path.display())),
        Some(path) => {
            fail("program", format!("{} does not exist", path.display()), "set control.datapath_program")
        }
        None => warn(
            "program",
            "postern-datapath is neither beside this program nor in PATH",
            "install it, or name it with control.datapath_program",
        ),
    }
}

fn uses_xsk(settings: &DatapathSettings) -> bool {
    settings.interfaces.iter().any(|interface| interface.port == PortKind::Xsk)
}

fn af_xdp(settings: &DatapathSettings) -> Finding {
    let socket = rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None);
    match socket {
        Ok(_) => ok("AF_XDP", "the kernel opens AF_XDP sockets"),
        Err(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) => {
            warn("AF_XDP", "cannot be tried without CAP_NET_RAW", "run this check as root")
        }
        Err(error) if uses_xsk(settings) => fail(
            "AF_XDP",
            format!("the kernel opens no AF_XDP socket ({error})"),
            "use a kernel with CONFIG_XDP_SOCKETS=y, or port = \"tun\" and \"socket\" (slow)",
        ),
        Err(error) => ok(
            "AF_XDP",
            format!("the kernel opens no AF_XDP socket ({error}), and no interface asks for one"),
        ),
    }
}

fn wakeup(settings: &DatapathSettings) -> Option<Finding> {
    (uses_xsk(settings) && !settings.need_wakeup).then(|| {
        warn(
            "need_wakeup",
            "off: the kernel is called in every turn that has something for it, asked for or not",
            "leave datapath.need_wakeup out, unless a driver forgets to ask",
        )
    })
}

fn memory_lock(settings: &DatapathSettings, exempt: bool) -> Finding {
    let needed = u64::from(settings.frames) * FRAME;
    match getrlimit(Resource::Memlock).current {
        None => ok("memlock", "memory may be locked without limit"),
        Some(limit) if limit >= needed => ok("memlock", format!("{} KiB may be locked", limit / 1024)),
        Some(_) if exempt => ok("memlock", "limited, but CAP_IPC_LOCK lifts the limit"),
        Some(limit) => fail(
            "memlock",
            format!(
                "{} KiB may be locked, {} frames need {} KiB",
                limit / 1024,
                settings.frames,
                needed / 1024
            ),
            "set `LimitMEMLOCK=infinity` in the service, or `ulimit -l unlimited` before the start",
        ),
    }
}

/// Capabilities by their numbers in `linux/capability.h`.
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const IPC_LOCK: u32 = 14;
const SYS_ADMIN: u32 = 21;
const BPF: u32 = 39;

/// Where the files are.
struct Machine {
    root: PathBuf,
}

impl Machine {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    /// Names in a directory, sorted.
    fn list(&self, path: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The last component of the symbolic link.
    fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        target.file_name().and_then(|name| name.to_str()).map(str::to_owned)
    }

    fn kernel(&self, settings: &DatapathSettings) -> Vec<Finding> {
        let release = self.read("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers =
            release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        let mut findings = vec![if version >= (5, 11) {
            ok("kernel", format!("Linux {release}"))
        } else {
            fail(
                "kernel",
                format!("Linux {release} is too old"),
                "use Linux 5.11 or later (Debian 12 has 6.1)",
            )
        }];
        let Some(options) = self.kernel_options(&release) else {
            findings.push(warn(
                "kernel options",
                "neither /boot/config-* nor /proc/config.gz can be read",
                "compare by hand: CONFIG_BPF_SYSCALL, CONFIG_BPF_JIT, CONFIG_XDP_SOCKETS",
            ));
            return findings;
        };
        let xsk = uses_xsk(settings);
        let tun = settings.interfaces.iter().any(|interface| interface.port == PortKind::Tun);
        let wanted = [
            ("CONFIG_BPF_SYSCALL", xsk, Level::Fail, "XDP programs cannot be loaded"),
            ("CONFIG_XDP_SOCKETS", xsk, Level::Fail, "frames cannot reach the workers"),
            ("CONFIG_BPF_JIT", xsk, Level::Warn, "the XDP program is interpreted, which is slow"),
            ("CONFIG_TUN", tun, Level::Fail, "a TUN device cannot be made"),
            (
                "CONFIG_NET_RX_BUSY_POLL",
                xsk && settings.busy_poll_us > 0,
                Level::Fail,
                "busy polling is refused",
            ),
            ("CONFIG_HUGETLBFS", settings.huge_pages, Level::Warn, "there are no huge pages"),
        ];
        let missing: Vec<_> =
            wanted.iter().filter(|(name, used, ..)| *used && !options.contains(*name)).collect();
        for (name, _, level, consequence) in &missing {
            findings.push(Finding {
                level: *level,
                subject: "kernel options".to_owned(),
                text: format!("{name} is off: {consequence}"),
                fix: Some("use a distribution's kernel or build one with it".to_owned()),
            });
        }
        if missing.is_empty() {
            findings.push(ok("kernel options", "everything that is needed is built in or a module"));
        }
        findings
    }

    /// The options that are built in or modules.
    fn kernel_options(&self, release: &str) -> Option<BTreeSet<String>> {
        let text = self.read(&format!("/boot/config-{release}")).or_else(|| {
            let packed = self.path("/proc/config.gz");
            let output = Command::new("gzip").arg("-dc").arg(packed).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        })?;
        let on = |line: &str| {
            let (name, value) = line.split_once('=')?;
            matches!(value, "y" | "m").then(|| name.to_owned())
        };
        Some(text.lines().filter_map(on).collect())
    }

    fn capability_mask(&self) -> u64 {
        let status = self.read("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
    }

    fn has_capability(&self, number: u32) -> bool {
        self.capability_mask() >> number & 1 == 1
    }

    fn capabilities(&self) -> Finding {
        let mut missing = Vec::new();
        for (name, number) in [("CAP_NET_ADMIN", NET_ADMIN), ("CAP_NET_RAW", NET_RAW)] {
            if !self.has_capability(number) {
                missing.push(name);
            }
        }
        if !self.has_capability(BPF) && !self.has_capability(SYS_ADMIN) {
            missing.push("CAP_BPF");
        }
        if missing.is_empty() {
            return ok("capabilities", "CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF are there");
        }
        fail(
            "capabilities",
            format!("this process lacks {}", missing.join(", ")),
            "run as root, or give the service AmbientCapabilities= with these",
        )
    }

    fn huge_pages(&self, settings: &DatapathSettings) -> Finding {
        let info = self.read("/proc/meminfo").unwrap_or_default();
        let value = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let size = value("Hugepagesize:").unwrap_or(2048) * 1024;
        let free = value("HugePages_Free:").unwrap_or_default();
        let needed = (u64::from(settings.frames) * FRAME).div_ceil(size.max(1));
        if free >= needed {
            ok("huge pages", format!("{free} free, {needed} needed"))
        } else if settings.huge_pages {
            warn(
                "huge pages",
                format!("{free} free, {needed} needed: ordinary pages will be used"),
                format!("sysctl -w vm.nr_hugepages={needed}, at boot through /etc/sysctl.d"),
            )
        } else {
            ok("huge pages", format!("{free} free, and datapath.huge_pages does not ask for any"))
        }
    }

    /// What the processor says of itself, in `/proc/cpuinfo`'s words.
    fn processor_flags(&self) -> BTreeSet<String> {
        let info = self.read("/proc/cpuinfo").unwrap_or_default();
        let flags = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
        let flags = flags.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags);
        flags.split_whitespace().map(str::to_owned).collect()
    }

    /// What AES-GCM will be computed with; `backend` may ask for what is not there.
    fn crypto(&self, backend: Backend) -> Finding {
        let flags = self.processor_flags();
        let lacks = |extra: &[&str]| {
            let needed = ["avx2", "aes", "pclmulqdq", "vaes", "vpclmulqdq"].iter().chain(extra);
            needed.filter(|flag| !flags.contains(**flag)).map(|flag| flag.to_uppercase()).collect::<Vec<_>>()
        };
        let (narrow, wide) = (lacks(&[]), lacks(&["avx512f", "avx512bw", "avx512vl"]));
        let best = match (wide.is_empty(), narrow.is_empty()) {
            (true, _) => "vaes512",
            (_, true) => "vaes256",
            _ => "ring",
        };
        let missing = match backend {
            Backend::Auto => {
                return ok(
                    "crypto",
                    format!("crypto.backend = \"auto\": {best}, once it passes its self-test"),
                );
            }
            Backend::Vaes512 => wide,
            Backend::Vaes256 => narrow,
            Backend::Ring => Vec::new(),
        };
        let name = backend.name();
        if !missing.is_empty() {
            return fail(
                "crypto",
                format!("crypto.backend = \"{name}\", but the processor lacks {}", missing.join(", ")),
                format!("take \"auto\" (here: {best})"),
            );
        }
        if name != best {
            return warn(
                "crypto",
                format!("crypto.backend = \"{name}\", but {best} would be faster here"),
                "take \"auto\" unless this is a test",
            );
        }
        ok("crypto", format!("crypto.backend = \"{name}\""))
    }

    fn processor(&self) -> Finding {
        let flags = self.processor_flags();
        let has = |wanted: &[&str]| wanted.iter().all(|flag| flags.contains(*flag));
        if has(&["aes", "vaes", "vpclmulqdq", "avx512f", "avx512bw", "avx512vl"]) {
            ok("processor", "AES instructions on 512-bit vectors (VAES, AVX-512)")
        } else if has(&["aes", "vaes", "vpclmulqdq", "avx2"]) {
            ok("processor", "AES instructions on 256-bit vectors (VAES, AVX2); AVX-512 would be faster still")
        } else if has(&["aes", "pclmulqdq"]) || has(&["aes", "pmull"]) {
            ok("processor", "AES instructions, one block at a time")
        } else {
            warn(
                "processor",
                "no AES instructions: AES-GCM will be slow",
                "turn AES-NI on in the firmware or hypervisor, or use esp = \"chacha20poly1305\"",
            )
        }
    }

    fn cores(&self, settings: &DatapathSettings) -> Vec<Finding> {
        let online = ranges(&self.read("/sys/devices/system/cpu/online").unwrap_or_default());
        let isolated = ranges(&self.read("/sys/devices/system/cpu/isolated").unwrap_or_default());
        let absent: Vec<_> = settings.cores.iter().filter(|core| !online.contains(core)).collect();
        if !absent.is_empty() {
            let last = online.last().copied().unwrap_or_default();
            return vec![fail(
                "cores",
                format!("datapath.cores names {absent:?}, online are 0 to {last}"),
                "name cores that exist",
            )];
        }
        if settings.cores.is_empty() {
            return vec![warn(
                "cores",
                "one worker, not pinned",
                "name the workers' processors with datapath.cores",
            )];
        }
        let shared = settings.cores.iter().filter(|core| !isolated.contains(core)).count();
        if shared > 0 && online.len() > 1 {
            let list = settings.cores.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
            return vec![warn(
                "cores",
                format!(
                    "{} workers, {shared} of them on cores that other programs use too",
                    settings.workers()
                ),
                format!(
                    "for steady latency boot with isolcpus={list} and keep interrupts of other devices away"
                ),
            )];
        }
        vec![ok("cores", format!("{} workers, each with a core of its own", settings.workers()))]
    }

    /// The memory node of a processor.
    fn node(&self, core: u16) -> Option<u32> {
        let entries = self.list(&format!("/sys/devices/system/cpu/cpu{core}"));
        entries.iter().filter_map(|name| name.strip_prefix("node")?.parse().ok()).min()
    }

    /// On which memory nodes the workers and what they need are.
    fn nodes(&self, settings: &DatapathSettings) -> Option<Finding> {
        let nodes: BTreeSet<u32> = settings.cores.iter().filter_map(|core| self.node(*core)).collect();
        let all = self.list("/sys/devices/system/node");
        let all = all.iter().filter_map(|name| name.strip_prefix("node")?.parse::<u32>().ok()).count();
        let list = nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        if nodes.is_empty() {
            return None;
        }
        Some(if settings.numa_local {
            ok(
                "memory nodes",
                format!("the workers are on node {list} of {all}, each one's memory on its own"),
            )
        } else if all > 1 {
            warn(
                "memory nodes",
                format!("the workers are on node {list} of {all}, their memory wherever the kernel puts it"),
                "leave datapath.numa_local out",
            )
        } else {
            ok("memory nodes", "one, so datapath.numa_local says nothing")
        })
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

    fn interface(&self, interface: &InterfaceSettings, settings: &DatapathSettings) -> Vec<Finding> {
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

    fn forwarding(&self) -> Vec<Finding> {
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
    fn ports(&self) -> Vec<Finding> {
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

/// `0-3,8` as a set.
fn ranges(text: &str) -> BTreeSet<u16> {
    let part = |part: &str| {
        let (start, end) = part.split_once('-').unwrap_or((part, part));
        Some(start.trim().parse::<u16>().ok()?..=end.trim().parse::<u16>().ok()?)
    };
    text.split(',').filter_map(part).flatten().collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> DatapathSettings {
        crate::config::parse("t", text, &crate::config::NoKeyFiles).unwrap().datapath
    }

    /// OPS-1: a made-up machine, and what is said about it.
    #[test]
    fn ops_1_findings_of_a_poor_machine() {
        let root = std::env::temp_dir().join(format!("pt-control-check-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "5.4.0-test"),
            (
                "boot/config-5.4.0-test",
                "CONFIG_BPF_SYSCALL=y\nCONFIG_BPF_JIT=m\n# CONFIG_XDP_SOCKETS is not set\n",
            ),
            ("proc/self/status", "Name:\tx\nCapEff:\t0000000000001000\n"),
            ("proc/meminfo", "HugePages_Free:        3\nHugepagesize:       2048 kB\n"),
            ("proc/cpuinfo", "processor: 0\nflags\t\t: fpu sse2\n"),
            ("sys/devices/system/cpu/online", "0-3"),
            ("sys/devices/system/cpu/cpu1/node0/x", ""),
            ("sys/devices/system/cpu/cpu7/node1/x", ""),
            ("sys/devices/system/node/node0/cpulist", "0-3"),
            ("sys/devices/system/node/node1/cpulist", "4-7"),
            ("sys/class/net/eth0/device/numa_node", "1"),
            ("sys/class/net/eth0/napi_defer_hard_irqs", "0"),
            ("sys/class/net/eth0/gro_flush_timeout", "200000"),
            ("sys/class/net/eth0/operstate", "down"),
            ("sys/class/net/eth0/mtu", "9000"),
            ("sys/class/net/eth0/queues/rx-0/x", ""),
            ("sys/class/net/eth0/queues/tx-0/x", ""),
            (
                "proc/net/udp",
                "  sl  local_address rem_address\n 1: 00000000:1194 00000000:0000 07 0:0 00:0 0 0 0 4711 2\n",
            ),
            ("proc/77/comm", "charon"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(root.join("proc/77/fd")).unwrap();
        std::os::unix::fs::symlink("socket:[4711]", root.join("proc/77/fd/3")).unwrap();
        let machine = Machine { root: root.clone() };
        let settings = settings(
            "[datapath]\nhuge_pages = true\nneed_wakeup = false\nbusy_poll_us = 20\nnuma_local = false\ncores = [1, 7]\ncrypto.backend = \"vaes256\"\n[[datapath.interface]]\nname = \"eth0\"\nrole = \"outside\"\n",
        );
        let mut findings = machine.kernel(&settings);
        findings.push(machine.capabilities());
        findings.push(machine.huge_pages(&settings));
        findings.push(machine.processor());
        findings.push(machine.crypto(settings.crypto.backend));
        findings.extend(machine.cores(&settings));
        findings.extend(machine.nodes(&settings));
        findings.extend(wakeup(&settings));
        findings.extend(machine.interface(&settings.interfaces[0], &settings));
        findings.extend(machine.ports());
        let text = show(&findings);
        for expected in [
            "FAIL  kernel          Linux 5.4.0-test is too old",
            "FAIL  kernel options  CONFIG_XDP_SOCKETS is off",
            "FAIL  capabilities    this process lacks CAP_NET_RAW, CAP_BPF",
            "warn  huge pages      3 free, 16 needed",
            "warn  processor       no AES instructions",
            "FAIL  crypto          crypto.backend = \"vaes256\", but the processor lacks AVX2, AES, PCLMULQDQ, VAES, VPCLMULQDQ",
            "take \"auto\" (here: ring)",
            "FAIL  cores           datapath.cores names [7], online are 0 to 3",
            "FAIL  kernel options  CONFIG_NET_RX_BUSY_POLL is off: busy polling is refused",
            "warn  memory nodes    the workers are on node 0, 1 of 2, their memory wherever the kernel puts it",
            "warn  need_wakeup     off",
            "warn  eth0            it is on memory node 1, the workers' processors [1] are not",
            "processors of that node with datapath.cores: 4-7",
            "warn  eth0            busy polling: interrupts are not put off",
            "warn  eth0            the interface is down",
            "warn  eth0            1 receive queues for 2 workers",
            "warn  eth0            MTU 9000",
            "warn  IKE ports       UDP 4500 is used by charon (pid 77)",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
        assert_eq!(worst(&findings), Level::Fail);
        assert!(!text.contains("CONFIG_BPF_JIT"));
        fs::remove_dir_all(&root).unwrap();
    }

    /// OPS-1: this machine, whatever it is: every finding has words, and what is wrong has a remedy.
    #[test]
    fn ops_1_findings_have_remedies() {
        let settings = settings("[[datapath.interface]]\nname = \"lo\"\nrole = \"both\"\n");
        let findings = run(&settings, None, Path::new("/nowhere/postern"));
        assert!(findings.len() > 8);
        for finding in &findings {
            assert!(!finding.text.is_empty() && !finding.subject.is_empty());
            assert_eq!(finding.level == Level::Ok, finding.fix.is_none(), "{finding:?}");
        }
    }

    /// OPS-1, DP-3: what the configuration asks AES-GCM to be computed with, on processors of three kinds.
    #[test]
    fn ops_1_crypto_backends() {
        let root = std::env::temp_dir().join(format!("postern-check-crypto-{}", std::process::id()));
        fs::create_dir_all(root.join("proc")).unwrap();
        let machine = Machine { root: root.clone() };
        let found = |flags: &str, backend| {
            fs::write(root.join("proc/cpuinfo"), format!("processor : 0\nflags : {flags}\n")).unwrap();
            let Finding { level, text, .. } = machine.crypto(backend);
            (level, text)
        };
        let narrow = "aes avx2 pclmulqdq vaes vpclmulqdq";
        let wide = "aes avx2 pclmulqdq vaes vpclmulqdq avx512f avx512bw avx512vl";
        for (flags, best) in
            [("aes pclmulqdq", "auto\": ring"), (narrow, "auto\": vaes256"), (wide, "auto\": vaes512")]
        {
            let (level, text) = found(flags, Backend::Auto);
            assert!(level == Level::Ok && text.contains(best), "{text}");
        }
        let (level, text) = found(narrow, Backend::Vaes512);
        assert!(level == Level::Fail && text.ends_with("lacks AVX512F, AVX512BW, AVX512VL"), "{text}");
        assert_eq!(found(narrow, Backend::Vaes256).0, Level::Ok);
        assert_eq!(found(wide, Backend::Vaes512).0, Level::Ok);
        assert_eq!(found(wide, Backend::Ring).0, Level::Warn);
        assert_eq!(found("aes", Backend::Ring).0, Level::Ok);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(ranges("0-2,5").into_iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
        assert!(ranges("").is_empty());
    }
}
