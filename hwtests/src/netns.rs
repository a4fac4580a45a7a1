//! Network namespaces with names of their own, removed on drop with every process that runs in them.
//!
//! A test's namespace is called `pt<pid>.<start time>-<number>-<role>`: pid and start time name the owning process
//! for good, so [`janitor`] knows what a killed owner left behind. The lab's are called `lab-<topology>-<role>`
//! and stay until the lab is told otherwise.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{end_all, is_alive, run, start_time};

const RUN_DIR: &str = "/run/netns";

/// One network namespace with its loopback up.
#[derive(Debug)]
pub struct Netns {
    name: String,
    keep: bool,
}

/// Prefix for the names of one topology of this process: no other process and no other call gets the same.
pub fn unique_prefix() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let started = i32::try_from(pid).ok().and_then(start_time).unwrap_or_default();
    format!("pt{pid}.{started}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Netns {
    /// Makes the namespace `<prefix>-<role>`.
    pub fn create(prefix: &str, role: &str) -> Result<Self> {
        let name = format!("{prefix}-{role}");
        let made = run(Command::new("ip").args(["netns", "add", &name]));
        made.context("cannot make a network namespace (this needs root)")?;
        let namespace = Self { name, keep: false };
        namespace.sh("ip link set lo up")?;
        // No forwarding unless a topology says so: what crosses a gateway crosses its datapath. No waiting for
        // duplicate address detection. Answers to large pings and to many closed ports are not rationed.
        for setting in [
            "net.ipv4.ip_forward=0",
            "net.ipv6.conf.all.forwarding=0",
            "net.ipv6.conf.all.accept_dad=0",
            "net.ipv6.conf.default.accept_dad=0",
            "net.ipv6.conf.default.accept_ra=0",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
            "net.ipv4.icmp_ratelimit=0",
            "net.ipv6.icmp.ratelimit=0",
        ] {
            namespace.sh(&format!("sysctl -qw {setting}"))?;
        }
        Ok(namespace)
    }

    /// A namespace that exists already and is not this value's to remove.
    pub fn existing(name: &str) -> Result<Self> {
        if !Path::new(RUN_DIR).join(name).exists() {
            bail!("there is no network namespace {name}");
        }
        Ok(Self { name: name.to_owned(), keep: true })
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a command written in one line inside, words separated by single spaces.
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut words = line.split(' ');
        let program = words.next().unwrap_or_default();
        run(self.command(program).args(words))
    }

    /// Calls `body` on a thread of its own inside: sockets made there belong to the namespace for good.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = std::fs::File::open(Path::new(RUN_DIR).join(&self.name))?;
        let inside = move || {
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))?;
            body()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .map_err(|_| anyhow!("the thread in {} panicked", self.name))?
    }

    /// Processes that run inside.
    pub fn pids(&self) -> Vec<i32> {
        pids_in(&self.name)
    }

    /// Leaves the namespace standing when this value is dropped.
    pub fn leave(&mut self) {
        self.keep = true;
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.keep {
            remove(&self.name);
        }
    }
}

/// Ends every process in the namespace `name` and removes it.
pub fn remove(name: &str) {
    end_all(&pids_in(name), Duration::from_secs(2));
    if let Err(error) = run(Command::new("ip").args(["netns", "del", name])) {
        eprintln!("cannot remove the namespace {name}: {error:#}");
    }
}

/// Names of all namespaces that begin with `prefix`.
pub fn list(prefix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(RUN_DIR).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    names
}

/// Removes the namespaces and directories of test processes that no longer live; gives their number.
pub fn janitor() -> usize {
    let mut removed = 0;
    for name in list("pt").into_iter().filter(|name| is_orphan(name)) {
        remove(&name);
        removed += 1;
    }
    let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    for entry in entries {
        if entry.file_name().to_str().is_some_and(is_orphan) {
            // Another process may be tidying at the same time.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    removed
}

/// Directory for the files of the topology with this prefix: short, since Unix socket paths end at 108 bytes.
pub fn scratch_dir(prefix: &str) -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(prefix);
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

/// Whether `name` is one of [`unique_prefix`]'s and its process is gone.
fn is_orphan(name: &str) -> bool {
    let Some((owner, _)) = name.strip_prefix("pt").and_then(|rest| rest.split_once('-')) else {
        return false;
    };
    let Some((pid, started)) = owner.split_once('.') else { return false };
    let (Ok(pid), Ok(started)) = (pid.parse::<i32>(), started.parse::<u64>()) else { return false };
    !is_alive(pid) || start_time(pid) != Some(started)
}

fn pids_in(name: &str) -> Vec<i32> {
    let listed = run(Command::new("ip").args(["netns", "pids", name])).unwrap_or_default();
    listed.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_owners_are_orphans() {
        assert!(!is_orphan(&format!("{}-g1", unique_prefix())));
        assert!(is_orphan(&format!("pt{}.1-0-g1", std::process::id())));
        assert!(!is_orphan("lab-relay-g1") && !is_orphan("ptarmigan") && !is_orphan("pt12-3"));
    }
}
