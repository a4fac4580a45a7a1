//! DP-2: under traffic a worker asks the kernel for nothing but to send and to receive.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::AES128GCM;
use postern_hwtests::topology::{Family, Kind, Topology, gateway_config, inside};
use postern_hwtests::traffic::Stream;

/// How long a worker is looked at.
const SECONDS: u64 = 3;

/// Thread of the first worker of a datapath.
fn worker(pid: i32) -> Result<String> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.trim() == "worker-0" {
            let name = task.file_name().context("a task has a number")?;
            return Ok(name.to_string_lossy().into_owned());
        }
    }
    anyhow::bail!("no worker in {pid}")
}

/// System calls of a thread, by name, as strace counts them.
fn calls(thread: &str) -> Result<BTreeMap<String, u64>> {
    // strace lets go of the thread and writes its table when it is interrupted.
    let output = Command::new("timeout")
        .args(["--signal=INT", &SECONDS.to_string(), "strace", "-c", "-U", "name,calls", "-p", thread])
        .output()
        .context("strace (Debian: strace)")?;
    let table = String::from_utf8_lossy(&output.stderr);
    let mut found = BTreeMap::new();
    for line in table.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(Ok(count))) = (words.next(), words.next().map(str::parse))
            && name != "total"
        {
            found.insert(name.to_owned(), count);
        }
    }
    ensure!(!found.is_empty(), "strace counted nothing: {table}");
    Ok(found)
}

/// DP-2: `sendto` and `recvfrom` kick the rings, once a second the kernel is asked what it dropped, and the main thread, which
/// asks how far windows are, is woken; nothing else: no clock, no lock, no memory.
#[test]
fn dp_2_worker_only_kicks_rings() -> Result<()> {
    let mut topology = Topology::build(Kind::Pair)?;
    let pair = topology.tunnel(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    for (role, tunnel) in [("g1", pair.left()), ("g2", pair.right())] {
        let mut config = gateway_config(vec![tunnel]);
        // One that sleeps when packets are far apart calls `poll`, and the bell's `read`, for each of them.
        config.datapath.idle = Some("spin");
        topology.start_node(role, config)?;
    }
    topology.check(|topology| {
        let to = inside(Family::V4, 2, 10);
        let stream = Stream::start(topology.ns("h1")?, topology.ns("h2")?, to, 5000, 200)?;
        std::thread::sleep(Duration::from_secs(1));
        for role in ["g1", "g2"] {
            let thread = worker(topology.node(role)?.datapath_pid()?)?;
            let found = calls(&thread)?;
            println!("{role}: {found:?} in {SECONDS} s");
            for (name, count) in &found {
                let allowed = match name.as_str() {
                    "sendto" | "recvfrom" => u64::MAX,
                    // Statistics of two sockets; the main thread's bell.
                    "getsockopt" | "write" => 2 * (SECONDS + 1),
                    _ => 0,
                };
                ensure!(*count <= allowed, "{role}: {count} times {name}; all calls: {found:?}");
            }
            ensure!(found.get("sendto").is_some_and(|count| *count > 500), "{role} sent nothing: {found:?}");
        }
        let tally = stream.finish()?;
        ensure!(tally.sent > 1000, "{} datagrams", tally.sent);
        Ok(())
    })
}
