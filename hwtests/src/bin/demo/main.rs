//! The demo: two networks, a gateway before each, and traffic through the tunnel between them.
//!
//! The gateways negotiate with IKEv2, Postern with Postern or with strongSwan; with `--static` they have static keys and a
//! blind relay stands between them. Run by `hwtests/demo`, which builds everything first. Ends with a verdict, and with a
//! code other than 0 unless every claim was seen to be true.

mod fixed;
mod negotiated;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use postern_hwtests::netns::Netns;
use postern_hwtests::node::Node;
use postern_hwtests::process::indent;
use postern_hwtests::topology::Family;

#[derive(Parser)]
#[command(name = "hwtests/demo", about = "Traffic through two gateways, in network namespaces")]
struct Arguments {
    /// What the second gateway is.
    #[arg(long, value_enum, default_value = "postern", conflicts_with = "fixed")]
    peer: Peer,
    /// Static keys instead of IKEv2, and a blind relay between the gateways.
    #[arg(long = "static")]
    fixed: bool,
    /// IPv6 inside IPv6 (without this: IPv4 inside IPv4).
    #[arg(long, requires = "fixed")]
    v6: bool,
    /// IPv6 inside IPv4, then IPv4 inside IPv6.
    #[arg(long, requires = "fixed", conflicts_with = "v6")]
    mixed: bool,
    /// Leave the network standing at the end, as `hwtests/lab up relay` would have built it.
    #[arg(long, requires = "fixed", conflicts_with = "mixed")]
    keep: bool,
}

/// The second gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// Postern.
    Postern,
    /// Debian 12's strongSwan, 5.9.8: ESP in UDP.
    Strongswan,
    /// Debian 13's strongSwan, 6.0.1 (needs `hwtests/setup --test`): raw ESP.
    Strongswan6,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let start = Instant::now();
    if let Err(error) = run(&arguments) {
        eprintln!("\n{error:#}\n\nVERDICT: FAILED");
        return ExitCode::FAILURE;
    }
    println!("\nVERDICT: all of it works ({:.0} s).", start.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}

fn run(arguments: &Arguments) -> Result<()> {
    if !arguments.fixed {
        println!("\n=== IKEv2 with PSK, ESP with AES-128-GCM, about 15 seconds ===");
        return negotiated::round(arguments.peer);
    }
    let rounds: &[(Family, Family)] = match (arguments.v6, arguments.mixed) {
        (true, _) => &[(Family::V6, Family::V6)],
        (_, true) => &[(Family::V4, Family::V6), (Family::V6, Family::V4)],
        _ => &[(Family::V4, Family::V4)],
    };
    for (outer, inner) in rounds {
        println!(
            "\n=== {} inside {}, ESP with AES-128-GCM, about 15 seconds ===",
            inner.name(),
            outer.name()
        );
        fixed::round(*outer, *inner, arguments.keep)?;
    }
    Ok(())
}

fn step(name: &str, text: &str) {
    println!("\n[{name}] {text}");
}

/// DP-1: the traffic crossed XDP, AF_XDP sockets and workers, and no kernel forwarded any of it.
fn proof(node: &Node, namespace: &Netns, interfaces: [&str; 2]) -> Result<()> {
    let (name, mut line) = (node.name(), String::new());
    for interface in interfaces {
        let (received, transmitted) = node.frames(interface)?;
        line = format!("{line}{interface} {received} in, {transmitted} out; ");
        ensure!(received > 1000 && transmitted > 1000, "{name}: hardly a frame crossed {interface}: {line}");
        let link = namespace.sh(&format!("ip -details link show {interface}"))?;
        ensure!(link.contains("xdp"), "{name}: no XDP program on {interface}:\n{}", indent(&link));
    }
    let forwarded = kernel_forwarded(&namespace.sh("cat /proc/net/snmp /proc/net/snmp6")?);
    let switch = namespace.sh("sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding")?;
    let switch: Vec<_> = switch.split_whitespace().collect();
    println!("  {name:6} {line}kernel {forwarded}, forwarding switches {}", switch.join(" "));
    ensure!(forwarded == 0 && switch == ["0", "0"], "{name}: the kernel forwards");
    Ok(())
}

/// IPv4 and IPv6 packets that the kernel of a namespace forwarded, from /proc/net/snmp and snmp6.
fn kernel_forwarded(text: &str) -> u64 {
    let mut rows = text.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, values) = (rows.next().unwrap_or_default(), rows.next().unwrap_or_default());
    let v4 = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "ForwDatagrams");
    let v6 = text.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"));
    let number = |text: &str| text.trim().parse::<u64>().unwrap_or(0);
    v4.map_or(0, |(_, value)| number(value)) + v6.map_or(0, number)
}
