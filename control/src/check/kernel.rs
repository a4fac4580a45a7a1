//! What the kernel can do, and what it lets this process do.

use std::collections::BTreeSet;
use std::process::Command;

use postern_contract::settings::{DatapathSettings, PortKind};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, getrlimit};

use super::{Finding, Level, Machine, fail, ok, warn};

/// Bytes of a frame of the datapath's memory.
const FRAME: u64 = 4096;

/// Capabilities by their numbers in `linux/capability.h`.
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
pub(super) const IPC_LOCK: u32 = 14;
const SYS_ADMIN: u32 = 21;
const BPF: u32 = 39;

fn uses_xsk(settings: &DatapathSettings) -> bool {
    settings.interfaces.iter().any(|interface| interface.port == PortKind::Xsk)
}

pub(super) fn af_xdp(settings: &DatapathSettings) -> Finding {
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

pub(super) fn wakeup(settings: &DatapathSettings) -> Option<Finding> {
    (uses_xsk(settings) && !settings.need_wakeup).then(|| {
        warn(
            "need_wakeup",
            "off: the kernel is called in every turn that has something for it, asked for or not",
            "leave datapath.need_wakeup out, unless a driver forgets to ask",
        )
    })
}

pub(super) fn memory_lock(settings: &DatapathSettings, exempt: bool) -> Finding {
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

impl Machine {
    pub(super) fn kernel(&self, settings: &DatapathSettings) -> Vec<Finding> {
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

    pub(super) fn has_capability(&self, number: u32) -> bool {
        self.capability_mask() >> number & 1 == 1
    }

    pub(super) fn capabilities(&self) -> Finding {
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

    pub(super) fn huge_pages(&self, settings: &DatapathSettings) -> Finding {
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
}
