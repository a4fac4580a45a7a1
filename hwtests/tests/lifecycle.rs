//! DP-7 and DESIGN decision 8: processes die and come back; traffic, SAs and sequence numbers do as they must.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, fields};
use postern_hwtests::config::AES128GCM;
use postern_hwtests::process::{is_alive, wait_for};
use postern_hwtests::topology::{Family, Kind, Topology, inside};
use postern_hwtests::traffic::{IperfServer, Ping, Stream};
use serde_json::Value;

fn one_tunnel() -> Result<Topology> {
    let mut topology = Topology::build(Kind::Pair)?;
    let pair = topology.tunnel(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    topology.start(&[pair])?;
    Ok(topology)
}

/// DP-4: the windows of a datapath that came back begin at what its predecessor promised, so that nothing is taken twice;
/// replies with lower numbers are dropped as replayed, at most twice of what came in a second.
fn pass_promises(topology: &Topology) -> Result<()> {
    let h1 = topology.ns("h1")?;
    wait_for("a reply beyond the promise", Duration::from_secs(10), || {
        let (pings, _) = Ping { count: 20, ..Ping::default() }.run(h1, inside(Family::V4, 2, 10))?;
        Ok((pings.received > 0).then_some(()))
    })
}

/// Every SA's id, SPI and packets, in the order of the table.
fn sas(topology: &Topology, role: &str) -> Result<Vec<(String, String, u64)>> {
    let table = topology.node(role)?.json(&["sa"])?;
    let rows = table.as_array().context("`postern sa` gives no list")?;
    let text = |row: &Value, key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let packets = |row: &Value| row.get("packets").and_then(Value::as_u64).unwrap_or_default();
    Ok(rows.iter().map(|row| (text(row, "id"), text(row, "spi"), packets(row))).collect())
}

/// DP-7: control is killed under a counted stream and under iperf3: no packet is lost; the next control reports the
/// same SAs, and their counters go on.
#[test]
fn dp_7_control_killed() -> Result<()> {
    one_tunnel()?.check(|topology| {
        let (near, far) = (topology.ns("h1")?, topology.ns("h2")?);
        let to = inside(Family::V4, 2, 10);
        Ping::default().all(near, to)?;
        let server = IperfServer::start(far, to, topology.dir())?;
        let stream = Stream::start(near, far, to, 500, 200)?;
        let (before, datapath) = (sas(topology, "g1")?, topology.node("g1")?.datapath_pid()?);
        ensure!(before.len() == 2, "{before:?}");
        topology.node_mut("g1")?.kill_control()?;
        topology.node_mut("g2")?.kill_control()?;
        // While control is away everything goes on.
        let iperf = server.udp(topology.ns("h1")?, 2, "2M")?;
        ensure!(iperf.lost_percent == 0.0, "iperf3 lost packets without control: {iperf:?}");
        topology.node_mut("g1")?.start_control()?;
        topology.node_mut("g2")?.start_control()?;
        std::thread::sleep(Duration::from_millis(500));
        let tally = stream.finish()?;
        ensure!(tally.lost() == 0 && tally.sent > 700, "{tally:?}");
        let after = sas(topology, "g1")?;
        ensure!(topology.node("g1")?.datapath_pid()? == datapath, "the datapath is another process");
        let names = |sas: &[(String, String, u64)]| {
            sas.iter().map(|(id, spi, _)| (id.clone(), spi.clone())).collect::<Vec<_>>()
        };
        ensure!(names(&before) == names(&after), "SAs changed: {before:?} {after:?}");
        let grew = before.iter().zip(&after).any(|(before, after)| after.2 >= before.2 + tally.sent);
        let shrank = before.iter().zip(&after).any(|(before, after)| after.2 < before.2);
        ensure!(grew && !shrank, "counters did not go on: {before:?} {after:?}");
        Ok(())
    })
}

/// DP-4, DP-7, decision 8: the datapath is killed twice under traffic; control brings it back with its SAs, and no
/// sequence number is seen twice on the wire.
#[test]
fn dp_4_datapath_killed_never_repeats_a_sequence_number() -> Result<()> {
    one_tunnel()?.check(|topology| {
        let to = inside(Family::V4, 2, 10);
        Ping::default().all(topology.ns("h1")?, to)?;
        let file = topology.dir().join("killed.pcap");
        let capture = Capture::start(topology.ns("wire")?, "g1", "ip proto 50", &file)?;
        let stream = Stream::start(topology.ns("h1")?, topology.ns("h2")?, to, 1000, 100)?;
        // Until the windows were looked at.
        std::thread::sleep(Duration::from_secs(2));
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(600));
            let old = topology.node_mut("g1")?.kill_datapath()?;
            topology.node("g1")?.wait_for_another_datapath(old)?;
        }
        std::thread::sleep(Duration::from_millis(600));
        let tally = stream.finish()?;
        // How long it was away depends on the machine; that it came back twice does not.
        ensure!(tally.duplicates == 0 && tally.received > 600, "{tally:?}");
        pass_promises(topology)?;
        let drops = topology.node("g1")?.json(&["drops"])?.to_string();
        ensure!(drops.contains("replay_"), "no window was kept: {drops}");
        Ping::default().all(topology.ns("h1")?, to).context("after the datapath came back")?;
        let mut seen = HashSet::new();
        let rows = fields(&capture.finish()?, "esp", &["ip.src", "esp.spi", "esp.sequence"])?;
        ensure!(rows.len() > 600, "only {} packets captured", rows.len());
        for row in rows {
            ensure!(!row.iter().any(String::is_empty), "tshark read no sequence number: {row:?}");
            ensure!(seen.insert(row.clone()), "sent twice: {row:?}");
        }
        Ok(())
    })
}

/// DP-1: a clean stop takes the XDP program off; after a crash of everything the next start takes over.
#[test]
fn dp_1_detach_and_take_over() -> Result<()> {
    one_tunnel()?.check(|topology| {
        let to = inside(Family::V4, 2, 10);
        let xdp = |topology: &Topology| -> Result<bool> {
            Ok(topology.ns("g1")?.sh("ip -details link show outside")?.contains("prog/xdp"))
        };
        Ping::default().all(topology.ns("h1")?, to)?;
        ensure!(xdp(topology)?, "no XDP program while running");
        // A crash of both: control first, so that nothing brings the datapath back.
        topology.node_mut("g1")?.kill_control()?;
        let old = topology.node_mut("g1")?.kill_datapath()?;
        std::thread::sleep(Duration::from_millis(200));
        ensure!(!is_alive(old), "the datapath lives on");
        topology.node_mut("g1")?.start_control()?;
        pass_promises(topology)?;
        Ping::default().all(topology.ns("h1")?, to).context("after the crash")?;
        topology.stop_node("g1")?;
        ensure!(!xdp(topology)?, "the XDP program stayed after a clean stop");
        Ok(())
    })
}
