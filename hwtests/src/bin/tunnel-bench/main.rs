//! The tunnel bench: Postern, strongSwan with its ESP in user space, and wireguard-go, each as both gateways between two
//! hosts on this machine: datagrams, TCP, and what they cost.
#![forbid(unsafe_code)]

mod datagrams;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use postern_hwtests::config::ike::Link;
use postern_hwtests::load::compare::cpu;
use postern_hwtests::node::write_private;
use postern_hwtests::party::{Make, Party};
use postern_hwtests::peer::Version;
use postern_hwtests::process::{Background, run, share_like_ours, wait_for};
use postern_hwtests::stage::{postern, swan};
use postern_hwtests::topology::{Family, Kind, Topology, inside, inside_net};
use postern_hwtests::traffic::{IperfServer, Ping};
use serde_json::{Value, json};

/// Compares tunnels over veth: h1 - gateway - gateway - h2, the same software as both gateways, everything on this machine.
///
/// Datagrams of 64 bytes (with their IP header) are offered at several rates; the best that arrives counts, and the CPU time
/// of both gateways' processes a packet then. TCP is one stream of iperf3. Rounds take turns. Needs root, iperf3,
/// wireguard-go and wg (those that are missing are left out, and said), and a release build.
#[derive(Parser)]
#[command(name = "postern-tunnel-bench")]
struct Arguments {
    /// Rounds of each
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of each measurement of TCP; datagrams take a second for each rate
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Who takes part: postern, strongswan, wireguard-go
    #[arg(long, value_delimiter = ',', default_value = "postern,strongswan,wireguard-go")]
    who: Vec<String>,
    /// Where results go besides, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Datagrams a second that are offered.
const OFFERED: [u32; 5] = [30_000, 60_000, 120_000, 240_000, 480_000];

/// What holds the tunnel at both ends.
enum Ends {
    Ike { _left: Box<Party>, _right: Box<Party> },
    WireGuard { _left: Background, _right: Background },
}

struct Contestant {
    name: String,
    // What runs in the namespaces ends before they go.
    _ends: Ends,
    server: IperfServer,
    topology: Topology,
    rates: Vec<f64>,
    costs: Vec<f64>,
    tcp: Vec<f64>,
    tcp_costs: Vec<f64>,
}

impl Contestant {
    fn start(name: &str) -> Result<Self> {
        let topology = Topology::build(Kind::Pair)?;
        let ends = match name {
            "postern" => negotiated(&topology, &postern())?,
            "strongswan" => negotiated(&topology, &swan(Version::V5))?,
            _ => wireguard(&topology)?,
        };
        for gateway in ["g1", "g2"] {
            topology.ns(gateway)?.pids().into_iter().try_for_each(share_like_ours)?;
        }
        let far = inside(Family::V4, 2, 10);
        Ping::default().all(topology.ns("h1")?, far)?;
        let server = IperfServer::start(topology.ns("h2")?, far, topology.dir())?;
        Ok(Self {
            name: name.to_owned(),
            _ends: ends,
            server,
            topology,
            rates: Vec::new(),
            costs: Vec::new(),
            tcp: Vec::new(),
            tcp_costs: Vec::new(),
        })
    }

    /// CPU time of everything in both gateways, in seconds.
    fn used(&self) -> Result<f64> {
        let mut sum = 0.0;
        for gateway in ["g1", "g2"] {
            for pid in self.topology.ns(gateway)?.pids() {
                sum += cpu(u32::try_from(pid)?)?;
            }
        }
        Ok(sum)
    }

    fn round(&mut self, seconds: u32) -> Result<()> {
        let (h1, h2) = (self.topology.ns("h1")?, self.topology.ns("h2")?);
        let (mut best, mut cost) = (0.0, 0.0);
        for offered in OFFERED {
            let before = self.used()?;
            let arrived =
                datagrams::send(h1, h2, inside(Family::V4, 2, 10), offered, Duration::from_secs(1))?;
            let used = self.used()? - before;
            if arrived.rate > best {
                (best, cost) = (arrived.rate, used * 1e6 / arrived.packets.max(1.0));
            }
            // Far beyond what it can: more only starves it.
            if arrived.rate < f64::from(offered) / 3.0 {
                break;
            }
        }
        let before = self.used()?;
        let tcp = self.server.tcp(h1, seconds)?;
        let used = self.used()? - before;
        let segments = tcp.bits_per_second * f64::from(seconds) / 8.0 / 1400.0;
        self.rates.push(best);
        self.costs.push(cost);
        self.tcp.push(tcp.bits_per_second);
        self.tcp_costs.push(used * 1e6 / segments);
        println!(
            "{:13} {:7.1} kpps ({cost:.2} µs CPU a packet), TCP {:.2} Gb/s",
            self.name,
            best / 1e3,
            tcp.bits_per_second / 1e9
        );
        Ok(())
    }
}

fn negotiated(topology: &Topology, make: &Make) -> Result<Ends> {
    let nets = (inside_net(Family::V4, 1), inside_net(Family::V4, 2));
    let link = Link::new("net", topology.outer(Family::V4), nets);
    let left = Party::start(make, topology.ns("g1")?, "left", topology.dir())?;
    let right = Party::start(make, topology.ns("g2")?, "right", topology.dir())?;
    left.load(vec![link.left()], vec![])?;
    right.load(vec![link.right()], vec![])?;
    left.initiate("net")?;
    left.settled("net")?;
    right.settled("net")?;
    Ok(Ends::Ike { _left: Box::new(left), _right: Box::new(right) })
}

/// wireguard-go at both ends, with keys of `wg genkey`.
fn wireguard(topology: &Topology) -> Result<Ends> {
    let (left, right) = topology.outer(Family::V4);
    let mut keys = Vec::new();
    for _ in 0..2 {
        let private = run(std::process::Command::new("wg").arg("genkey"))?.trim().to_owned();
        let file = topology.dir().join(format!("key{}", keys.len()));
        write_private(&file, &private)?;
        // wg reads the private key from its standard input.
        let public =
            std::process::Command::new("wg").arg("pubkey").stdin(std::fs::File::open(&file)?).output()?;
        keys.push((file, String::from_utf8(public.stdout)?.trim().to_owned()));
    }
    let [(own_left, left_public), (own_right, right_public)] = keys.as_slice() else {
        anyhow::bail!("two keys");
    };
    let one = |role: &str, own: &PathBuf, peer: &str, to: IpAddr, net: &str| -> Result<Background> {
        let namespace = topology.ns(role)?;
        // Its control socket is named by the interface alone, in one directory for all namespaces.
        let device = format!("pt-{role}");
        let mut command = namespace.command("wireguard-go");
        command.args(["-f", &device]).env("LOG_LEVEL", "error");
        let process = Background::start(&mut command, &topology.dir().join(format!("{role}.log")))?;
        wait_for("wireguard-go", Duration::from_secs(5), || {
            Ok(namespace.sh(&format!("wg show {device}")).is_ok().then_some(()))
        })?;
        let own = own.display();
        namespace.sh(&format!(
            "wg set {device} listen-port 51820 private-key {own} peer {peer} allowed-ips {net} endpoint {to}:51820"
        ))?;
        namespace.sh(&format!("ip link set {device} mtu 1420 up"))?;
        namespace.sh(&format!("ip route add {net} dev {device}"))?;
        namespace.sh("sysctl -qw net.ipv4.ip_forward=1")?;
        Ok(process)
    };
    let nets = (inside_net(Family::V4, 1), inside_net(Family::V4, 2));
    Ok(Ends::WireGuard {
        _left: one("g1", own_left, right_public, right, &nets.1)?,
        _right: one("g2", own_right, left_public, left, &nets.0)?,
    })
}

fn summary(values: &[f64]) -> (f64, f64, f64) {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    (at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut contestants = Vec::new();
    for name in &arguments.who {
        match Contestant::start(name) {
            Ok(contestant) => contestants.push(contestant),
            Err(error) if name == "postern" => return Err(error),
            Err(error) => eprintln!("{name}: not compared: {error:#}"),
        }
    }
    for _ in 0..arguments.rounds {
        for contestant in &mut contestants {
            contestant.round(arguments.seconds)?;
        }
    }
    let first = contestants.first().context("nobody takes part")?;
    let (ours_rate, ours_tcp) = (summary(&first.rates).0, summary(&first.tcp).0);
    let mut rows: Vec<Value> = Vec::new();
    println!("\nmedian (least - most), times the first one's");
    for Contestant { name, rates, costs, tcp, tcp_costs, .. } in &contestants {
        let (rate, rate_least, rate_most) = summary(rates);
        let (bits, bits_least, bits_most) = summary(tcp);
        let (cost, tcp_cost) = (summary(costs).0, summary(tcp_costs).0);
        println!(
            "{name:13} 64 B: {:7.1} kpps ({:.1} - {:.1}) {:5.2}, {cost:6.2} µs a packet;  TCP: {:5.2} Gb/s ({:.2} - {:.2}) {:5.2}, {tcp_cost:6.2} µs for 1,400 B",
            rate / 1e3,
            rate_least / 1e3,
            rate_most / 1e3,
            rate / ours_rate,
            bits / 1e9,
            bits_least / 1e9,
            bits_most / 1e9,
            bits / ours_tcp,
        );
        rows.push(json!({
            "name": name, "pps": rate, "pps_least": rate_least, "pps_most": rate_most, "cpu_us": cost,
            "tcp_bps": bits, "tcp_least": bits_least, "tcp_most": bits_most, "tcp_cpu_us": tcp_cost,
        }));
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}
