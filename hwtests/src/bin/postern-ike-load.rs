//! The load generator: many IKE clients in one process against any IKE gateway.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use postern_hwtests::load::Plan;
use postern_hwtests::load::compare::{compare, cpu, resident};
use postern_hwtests::load::udp::{Crowd, Task};

/// Brings up many IKE SAs with a CHILD_SA each at one gateway and reports handshakes a second, set-up times and the
/// gateway's CPU time.
///
/// Every client has an identity of its own, client0@load and so on, an outer address of its own, and traffic selectors from
/// an address of its own in 172.16.0.0/12 to --network. The gateway is gateway.load to them. Run it in a network namespace
/// where nothing else has UDP ports 500 and 4500 and where the clients' outer addresses are local: ip route add local
/// RANGE dev lo. Packets for the CHILD_SAs are not made. The SAs stay up at the gateway when it ends.
#[derive(Parser)]
#[command(name = "postern-ike-load")]
struct Arguments {
    /// Address of the gateway.
    #[arg(long, required_unless_present = "compare")]
    target: Option<IpAddr>,
    /// Make namespaces with Postern and then with strongSwan as the gateway, and bring --count clients up at the first and
    /// --fewer at the second, by X25519, P-256 and MODP-2048 (or those of --groups). Needs root.
    #[arg(long)]
    compare: bool,
    /// With --compare: clients at strongSwan.
    #[arg(long, default_value_t = 300)]
    fewer: u32,
    /// With --compare: key exchanges.
    #[arg(long, value_delimiter = ',', default_value = "x25519,ecp256,modp2048")]
    groups: Vec<String>,
    /// Address of the first client; the others have those after it.
    #[arg(long, default_value = "10.128.0.1")]
    local: Ipv4Addr,
    /// Clients.
    #[arg(long, default_value_t = 1000)]
    count: u32,
    /// Clients that are brought up at a time. Gateways may ask for cookies or refuse more than they allow half-open.
    #[arg(long, default_value_t = 32)]
    in_flight: u32,
    /// Key exchange, in strongSwan's words.
    #[arg(long, default_value = "x25519")]
    group: String,
    /// Encryption and pseudorandom function of the IKE SA, in strongSwan's words.
    #[arg(long, default_value = "aes128gcm16-prfsha256")]
    ike: String,
    /// Algorithms of the CHILD_SA.
    #[arg(long, default_value = "aes128gcm16")]
    esp: String,
    /// Shared secret.
    #[arg(long, default_value = "load")]
    psk: String,
    /// Network behind the gateway.
    #[arg(long, default_value = "10.99.0.0/16")]
    network: String,
    /// Process of the gateway (or several), whose CPU time is reported.
    #[arg(long)]
    pid: Vec<u32>,
    /// Seconds after which what is not up has failed.
    #[arg(long, default_value_t = 600)]
    limit: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.compare {
        let groups: Vec<&str> = arguments.groups.iter().map(String::as_str).collect();
        compare(&groups, arguments.count, arguments.fewer, arguments.in_flight.max(1))?;
        return Ok(());
    }
    let target = arguments.target.context("--target is missing")?;
    let ike = format!("{}-{}", arguments.ike, arguments.group);
    let plan = Plan::new(target, &arguments.network, &ike, &arguments.esp, &arguments.psk)?;
    let task = Task {
        first: arguments.local,
        count: arguments.count,
        in_flight: arguments.in_flight.max(1),
        limit: Duration::from_secs(arguments.limit),
    };
    let measured = |measure: fn(u32) -> Result<f64>| -> Result<f64> {
        arguments.pid.iter().map(|pid| measure(*pid)).sum()
    };
    let before = (measured(cpu)?, measured(resident)?);
    let outcome = Crowd::open()?.run(&plan, &task)?;
    let up = u32::try_from(outcome.times.len())?;
    println!(
        "{up} of {} up in {:.2} s: {:.0} handshakes a second; set-up time p50 {:.2} ms, p99 {:.2} ms; {} requests sent again",
        task.count,
        outcome.took.as_secs_f64(),
        outcome.rate(),
        outcome.quantile((1, 2)).as_secs_f64() * 1e3,
        outcome.quantile((99, 100)).as_secs_f64() * 1e3,
        outcome.retransmitted,
    );
    if !arguments.pid.is_empty() && up > 0 {
        let used = measured(cpu)? - before.0;
        let grown = measured(resident)? - before.1;
        println!(
            "gateway: {used:.2} s of CPU, {:.3} ms a handshake; resident set {:.2} KiB an IKE SA",
            used * 1e3 / f64::from(up),
            grown / f64::from(up),
        );
    }
    for failure in &outcome.failures {
        println!("failed: {failure}");
    }
    ensure!(outcome.failed == 0, "{} clients did not come up", outcome.failed);
    Ok(())
}
