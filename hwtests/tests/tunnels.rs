//! DP-3 over real wires: every suite, mode, pair of families and encapsulation carries ping and TCP both ways.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::{AES128GCM, AH_SUITES, ESP_SUITES, Pair, Policy, Suite};
use postern_hwtests::netns::Netns;
use postern_hwtests::topology::{Family, Kind, Topology, gateway_config, host_config, more_inside};
use postern_hwtests::traffic::{IperfServer, Ping, STRAGGLERS};
use postern_hwtests::veth::Wire;
use serde_json::Value;

/// ESP and AH algorithms that go together.
type Combination = (Option<Suite>, Option<Suite>);

/// Every ESP suite, every AH suite, and two bundles.
fn combinations() -> Vec<Combination> {
    let esp = ESP_SUITES.into_iter().map(|suite| (Some(suite), None));
    let ah = AH_SUITES.into_iter().map(|suite| (None, Some(suite)));
    let find = |name: &str| AH_SUITES.into_iter().find(|suite| suite.name == name);
    let bundles =
        [(Some(AES128GCM), find("sha256")), (ESP_SUITES.into_iter().next_back(), find("aes128gmac"))];
    esp.chain(ah).chain(bundles).collect()
}

fn describe(pair: &Pair) -> String {
    let name = |suite: Option<Suite>| suite.map_or("none", |suite| suite.name);
    format!("ESP {}, AH {}, {} mode, natt {}", name(pair.esp), name(pair.ah), pair.mode, pair.natt)
}

/// A topology with one tunnel for each of `combinations`, all used at once and each tried.
fn carry(
    outer: Family,
    inner: Family,
    combinations: &[Combination],
    adjust: impl Fn(&mut Pair),
) -> Result<()> {
    let mut topology = Topology::build(Kind::Pair)?;
    topology.more_networks(inner, u8::try_from(combinations.len())?)?;
    let mut pairs = Vec::new();
    for (number, (esp, ah)) in (0..).zip(combinations) {
        let mut pair = topology.tunnel_to_more(number, *esp, *ah, outer, inner)?;
        adjust(&mut pair);
        pairs.push(pair);
    }
    topology.start(&pairs)?;
    topology.check(|topology| {
        let host = topology.ns("h1")?;
        for (number, pair) in (0..).zip(&pairs) {
            let to = more_inside(inner, number, 10);
            let shown = || describe(pair);
            Ping { count: 3, ..Ping::default() }.all(host, to).with_context(shown)?;
            let server = IperfServer::start(topology.ns("h2")?, to, topology.dir()).with_context(shown)?;
            server.tcp_bytes(host, 1_000_000).with_context(shown)?;
        }
        Ok(())
    })
}

/// DP-3, DP-1: tunnel mode, IPv4 in IPv4.
#[test]
fn dp_3_every_suite_4_in_4() -> Result<()> {
    carry(Family::V4, Family::V4, &combinations(), |_| {})
}

/// DP-3, DP-1: tunnel mode, IPv6 in IPv6.
#[test]
fn dp_3_every_suite_6_in_6() -> Result<()> {
    carry(Family::V6, Family::V6, &combinations(), |_| {})
}

/// DP-3: tunnel mode, IPv6 in IPv4.
#[test]
fn dp_3_every_suite_6_in_4() -> Result<()> {
    carry(Family::V4, Family::V6, &combinations(), |_| {})
}

/// DP-3: tunnel mode, IPv4 in IPv6.
#[test]
fn dp_3_every_suite_4_in_6() -> Result<()> {
    carry(Family::V6, Family::V4, &combinations(), |_| {})
}

/// DP-1, DP-3: ESP in UDP on port 4500 (RFC 3948), over both families; DP-4: with and without ESN.
#[test]
fn dp_3_udp_encapsulation() -> Result<()> {
    let some: Vec<Combination> = ESP_SUITES.into_iter().step_by(3).map(|suite| (Some(suite), None)).collect();
    for (outer, inner, esn) in [(Family::V4, Family::V4, true), (Family::V6, Family::V4, false)] {
        carry(outer, inner, &some, |pair| {
            pair.natt = true;
            pair.esn = Some(esn);
        })?;
    }
    Ok(())
}

/// DP-3: transport mode between two hosts, whose own traffic goes through a TUN device and whose IPsec through sockets.
#[test]
fn dp_3_transport_mode_between_hosts() -> Result<()> {
    let combinations = combinations();
    for family in Family::ALL {
        let mut topology = Topology::build(Kind::Pair)?;
        let ends = topology.outer(family);
        // The two hosts have one address each: one combination after the other.
        for (number, (esp, ah)) in (0..).zip(combinations.iter().step_by(4)) {
            let mut pair = Pair::new(number, *esp, *ah, ends, (&ends.0.to_string(), &ends.1.to_string()))?;
            pair.mode = "transport";
            pair.natt = ah.is_none() && number % 2 == 1;
            topology.start_node("g1", host_config(vec![pair.left()]))?;
            topology.start_node("g2", host_config(vec![pair.right()]))?;
            topology.check(|topology| {
                // What is for the peer goes into the TUN device, except what the datapath itself sends.
                into_the_device(topology.ns("g1")?, ends.0, ends.1)?;
                into_the_device(topology.ns("g2")?, ends.1, ends.0)?;
                let shown = || describe(&pair);
                Ping { count: 3, ..Ping::default() }.all(topology.ns("g1")?, ends.1).with_context(shown)?;
                let server = IperfServer::start(topology.ns("g2")?, ends.1, topology.dir())?;
                server.tcp_bytes(topology.ns("g1")?, 500_000).with_context(shown)?;
                ensure!(
                    topology.node("g1")?.frames("sockets")?.1 > 100,
                    "no packets left through the sockets"
                );
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn into_the_device(namespace: &Netns, own: IpAddr, peer: IpAddr) -> Result<()> {
    let ip = if own.is_ipv4() { "ip -4" } else { "ip -6" };
    namespace.sh(&format!("{ip} route replace {peer} dev pt0 src {own} table 100"))?;
    if namespace.sh(&format!("{ip} rule show pref 20"))?.is_empty() {
        // Packets of raw sockets that bring their own header have protocol 255 in the kernel's eyes.
        namespace.sh(&format!("{ip} rule add pref 10 ipproto 255 lookup main"))?;
        namespace.sh(&format!("{ip} rule add pref 20 to {peer} lookup 100"))?;
    }
    Ok(())
}

/// DP-2: two pinned workers with a queue of each interface each. Packets arrive on either queue and reach the worker that
/// owns the SA.
#[test]
fn dp_2_two_workers() -> Result<()> {
    let mut topology = Topology::build_with(Kind::Pair, Wire { queues: 2, ..Wire::default() })?;
    topology.more_networks(Family::V4, 8)?;
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for number in 0..8 {
        let pair = topology.tunnel_to_more(number, Some(AES128GCM), None, Family::V4, Family::V4)?;
        left.push(pair.left());
        right.push(pair.right());
    }
    for (role, tunnels) in [("g1", left), ("g2", right)] {
        let mut config = gateway_config(tunnels);
        config.datapath.cores = vec![0, 1];
        topology.start_node(role, config)?;
    }
    topology.check(|topology| {
        let host = topology.ns("h1")?;
        for number in 0..8 {
            let to = more_inside(Family::V4, number, 10);
            Ping::default().all(host, to)?;
            let server = IperfServer::start(topology.ns("h2")?, to, topology.dir())?;
            server.tcp_bytes(host, 2_000_000)?;
        }
        for role in ["g1", "g2"] {
            let status = topology.node(role)?.json(&["status"])?;
            let workers =
                status.pointer("/datapath/workers").and_then(Value::as_array).context("no workers")?;
            ensure!(workers.len() == 2, "{} workers", workers.len());
            for worker in workers {
                let owns = worker.get("outbound_sas").and_then(Value::as_u64);
                ensure!(owns.is_some_and(|sas| sas > 0), "{role}: a worker owns no SA: {worker}");
            }
            // TCP goes on through a few drops; many would mean that packets do not find their worker.
            for reason in ["handoff_full", "transmit_full", "no_frame", "sa_missing", "bad_icv"] {
                let drops = topology.node(role)?.drops(reason)?;
                ensure!(drops < 50, "{role}: {reason} is {drops}");
            }
        }
        Ok(())
    })
}

/// DP-2: the kernel's interface as the configuration wants it: called in every turn, or polled busily. Traffic passes, and
/// `status` shows what was asked for; each worker's memory is on its processor's node.
#[test]
fn dp_2_sockets_as_configured() -> Result<()> {
    for (need_wakeup, busy_poll_us, shown) in [
        (Some(false), None, "copy, no need_wakeup"),
        (None, Some(20), "copy, busy poll"),
        (Some(false), Some(20), "copy, no need_wakeup, busy poll"),
    ] {
        let mut topology = Topology::build(Kind::Pair)?;
        topology.more_networks(Family::V4, 1)?;
        let pair = topology.tunnel_to_more(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
        for (role, tunnel) in [("g1", pair.left()), ("g2", pair.right())] {
            let mut config = gateway_config(vec![tunnel]);
            config.datapath.cores = vec![0];
            (config.datapath.need_wakeup, config.datapath.busy_poll_us) = (need_wakeup, busy_poll_us);
            topology.start_node(role, config)?;
        }
        topology.check(|topology| {
            let (host, to) = (topology.ns("h1")?, more_inside(Family::V4, 0, 10));
            Ping::default().all(host, to)?;
            IperfServer::start(topology.ns("h2")?, to, topology.dir())?.tcp_bytes(host, 2_000_000)?;
            for role in ["g1", "g2"] {
                let status = topology.node(role)?.cli(&["status"])?;
                ensure!(status.contains(shown), "{role}: {shown:?} is not in\n{status}");
                let log = topology.node(role)?.log();
                let node = std::path::Path::new("/sys/devices/system/node").exists();
                ensure!(!node || log.contains("the worker's memory is on its processor's node"), "{log}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// DP-6: what a policy discards, and what no policy covers, does not pass, and the first is counted.
#[test]
fn dp_6_policies() -> Result<()> {
    let mut topology = Topology::build(Kind::Pair)?;
    topology.more_networks(Family::V4, 2)?;
    let pair = topology.tunnel_to_more(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    let mut config = gateway_config(vec![pair.left()]);
    config.policies.push(Policy {
        name: "no-second-network".to_owned(),
        priority: 10,
        action: "discard",
        local: vec!["0.0.0.0/0".to_owned()],
        remote: vec!["10.100.1.0/24".to_owned()],
    });
    topology.start_node("g1", config)?;
    topology.start_node("g2", gateway_config(vec![pair.right()]))?;
    topology.check(|topology| {
        let host = topology.ns("h1")?;
        Ping::default().all(host, more_inside(Family::V4, 0, 10))?;
        let (pings, _) = Ping { count: 3, ..Ping::default() }.run(host, more_inside(Family::V4, 1, 10))?;
        ensure!(pings.received == 0, "{pings:?}");
        let drops = topology.node("g1")?.drops("policy_discard")?;
        let sent = u64::from(3 + STRAGGLERS);
        ensure!(drops == sent, "policy_discard is {drops}, not {sent}");
        Ok(())
    })
}
