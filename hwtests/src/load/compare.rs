//! The same crowd of clients at Postern and at strongSwan, one after the other on this machine: handshakes a second,
//! set-up times, CPU time and memory of each, and the ratio.
//!
//! Both have one connection for all clients, by shared secret, and install what is negotiated into their ESP in user
//! space. strongSwan's (kernel-libipsec) goes through a list of all its SAs for each new one, so that it is given fewer
//! clients, and it writes no log.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::udp::{Crowd, Outcome, Task};
use super::{CLIENT_IDS, GATEWAY_ID, INSIDE, Plan};
use crate::config::ike::{Auth, Child, Connection};
use crate::netns::Netns;
use crate::party::{Make, Party};
use crate::peer::{Options, Version};
use crate::stage::postern;
use crate::topology::{Family, Kind, Topology};

/// Where the clients' outer addresses begin; g2 has all of them.
const FIRST: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);
const OUTER: &str = "10.128.0.0/12";
/// Behind g1, which has an address in it: strongSwan installs no route without one.
const NETWORK: &str = "10.1.0.0/24";
const ESP: &str = "aes128gcm16";
const SECRET: &str = "load";

/// Clock ticks of user and system time in `/proc`; the kernel shows 100 of them a second on every architecture.
const TICKS_A_SECOND: f64 = 100.0;

/// CPU time that a process has used, in seconds.
pub fn cpu(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("there is no process {pid}"))?;
    // The second field is the name in parentheses, which may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("/proc has another format")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u32>);
    let ticks = ticks.sum::<Result<u32, _>>()?;
    Ok(f64::from(ticks) / TICKS_A_SECOND)
}

/// Resident set of a process, in KiB.
pub fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// What one gateway did.
#[derive(Clone, Debug)]
pub struct Row {
    /// Postern or strongSwan.
    pub gateway: &'static str,
    /// Key exchange.
    pub group: String,
    /// What the clients saw.
    pub outcome: Outcome,
    /// The gateway's CPU time, milliseconds a handshake.
    pub cpu_ms: f64,
    /// Growth of its resident set, bytes an IKE SA with a child.
    pub bytes: f64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gateway, group, outcome, cpu_ms, bytes } = self;
        let ms = |share| outcome.quantile(share).as_secs_f64() * 1e3;
        write!(
            f,
            "{gateway:11} {group:9} {:6} up, {:3} failed, {:5.0} handshakes/s ({:.0} a core of its CPU time), p50 {:.2} ms, \
             p99 {:.2} ms, {cpu_ms:.3} ms CPU each, {bytes:.0} bytes each",
            outcome.times.len(),
            outcome.failed,
            outcome.rate(),
            1e3 / cpu_ms,
            ms((1, 2)),
            ms((99, 100)),
        )
    }
}

/// Brings up `count` clients at Postern and `fewer` at strongSwan 5.9.8 with each key exchange, and prints as it goes.
pub fn compare(groups: &[&str], count: u32, fewer: u32, in_flight: u32) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for group in groups {
        let task = Task { first: FIRST, count, in_flight, limit: Duration::from_mins(20) };
        let own = one("Postern", group, &task)?;
        println!("{own}");
        let other = one("strongSwan", group, &Task { count: fewer, ..task })?;
        println!("{other}");
        println!("{group}: strongSwan uses {:.2} times Postern's CPU time", other.cpu_ms / own.cpu_ms);
        rows.extend([own, other]);
    }
    Ok(rows)
}

fn one(gateway: &'static str, group: &str, task: &Task) -> Result<Row> {
    let topology = Topology::build(Kind::Pair)?;
    let (IpAddr::V4(at), IpAddr::V4(crowd)) = topology.outer(Family::V4) else {
        anyhow::bail!("not IPv4");
    };
    let (g1, g2) = (topology.ns("g1")?, topology.ns("g2")?);
    g1.sh(&format!("ip route add {OUTER} via {crowd}"))?;
    g2.sh(&format!("ip route add local {OUTER} dev lo"))?;
    let make = if gateway == "Postern" { gateway_postern(task.count) } else { gateway_swan() };
    let party = Party::start(&make, g1, "gateway", topology.dir())?;
    let ike = format!("aes128gcm16-prfsha256-{group}");
    party.load(vec![connection(at, &ike)], vec![])?;
    let plan = Plan::new(at.into(), NETWORK, &ike, ESP, SECRET)?;
    let pid = match &party {
        Party::Postern { node, .. } => u32::try_from(node.control_pid()?)?,
        Party::Swan(_) => daemon(g1)?,
    };
    let before = (cpu(pid)?, resident(pid)?);
    let outcome = g2.enter(|| Crowd::open()?.run(&plan, task))?;
    let (used, grown) = (cpu(pid)? - before.0, resident(pid)? - before.1);
    let up = u32::try_from(outcome.times.len())?;
    ensure!(up > 0, "no client came up at {gateway}: {:?}", outcome.failures);
    let each = f64::from(up);
    Ok(Row {
        gateway,
        group: group.to_owned(),
        outcome,
        cpu_ms: used * 1e3 / each,
        bytes: grown * 1024.0 / each,
    })
}

fn gateway_postern(count: u32) -> Make {
    let mut make = postern();
    if let Make::Postern(config) = &mut make {
        config.datapath.sa_slots = Some((2 * count).next_power_of_two().max(1 << 16));
    }
    make
}

fn gateway_swan() -> Make {
    Make::Swan(Options {
        charon: "ikesa_table_size = 16384\n  ikesa_table_segments = 16\n  cookie_threshold = 0\n  block_threshold = 0"
            .to_owned(),
        log: "default = -1".to_owned(),
        ..Options::new(Version::V5)
    })
}

/// The gateway's view of all clients.
fn connection(at: Ipv4Addr, ike: &str) -> Connection {
    let auth = |id: &str| Auth {
        method: "psk",
        id: Some(id.to_owned()),
        secret: Some(SECRET.to_owned()),
        ..Auth::default()
    };
    let child = Child {
        name: "load".to_owned(),
        local_net: vec![NETWORK.to_owned()],
        remote_net: vec![INSIDE.to_string()],
        esp: vec![ESP.to_owned()],
        ..Child::default()
    };
    Connection {
        name: "load".to_owned(),
        local: vec![at.into()],
        proposals: vec![ike.to_owned()],
        local_auth: auth(GATEWAY_ID),
        remote_auth: auth(CLIENT_IDS),
        mobike: Some(false),
        children: vec![child],
        ..Connection::default()
    }
}

/// strongSwan's process in a namespace.
fn daemon(namespace: &Netns) -> Result<u32> {
    let is_charon = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("charon"))
    };
    let mut pids = namespace.pids().into_iter().filter_map(|pid| u32::try_from(pid).ok());
    pids.rfind(is_charon).context("no charon in the namespace")
}
