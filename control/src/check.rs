//! The preflight check (OPS-1): what this machine has and lacks for Postern, in plain words and with the remedy.
//!
//! Reads `/proc`, `/sys` and `/boot` under a root that tests can replace, opens one AF_XDP socket, and asks `ethtool` and
//! `gzip` where they are installed. Changes nothing, and needs no daemon.

mod interface;
mod kernel;
mod network;
mod processor;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use postern_contract::settings::DatapathSettings;
use serde::{Deserialize, Serialize};

use self::kernel::{IPC_LOCK, af_xdp, memory_lock, wakeup};
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
}
