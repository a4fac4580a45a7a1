//! RLY-1 to RLY-4, RLY-7, RLY-11 over real wires, translated by workers and in the XDP program.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use postern_hwtests::capture::{Capture, fields};
use postern_hwtests::config::{AES128GCM, AH_SUITES, Encap, Pair, Suite};
use postern_hwtests::memory;
use postern_hwtests::node::Node;
use postern_hwtests::oracle::hex;
use postern_hwtests::topology::{
    Family, Kind, RelayPath, Segment, Topology, gateway_config, inside, relay_config,
};
use postern_hwtests::traffic::{IperfServer, Ping};

fn ah_sha256() -> Option<Suite> {
    AH_SUITES.into_iter().find(|suite| suite.name == "sha256")
}

/// On both paths: ping, TCP and a comparison of all packets on both sides of the relay: no byte more, other SPIs.
fn through_relay(outer: Family, inner: Family, esp: Option<Suite>, ah: Option<Suite>) -> Result<()> {
    RelayPath::ALL.into_iter().try_for_each(|path| through_relay_on(path, outer, inner, esp, ah))
}

fn through_relay_on(
    path: RelayPath,
    outer: Family,
    inner: Family,
    esp: Option<Suite>,
    ah: Option<Suite>,
) -> Result<()> {
    let mut topology = Topology::build(Kind::Relay)?;
    topology.translate(path)?;
    let pair = topology.tunnel(0, esp, ah, outer, inner)?;
    topology.start(&[pair])?;
    topology.check(|topology| {
        let (near, to) = (topology.ns("h1")?, inside(inner, 2, 10));
        Ping::default().all(near, to)?;
        let wire = topology.ns("wire")?;
        let left = Capture::start(wire, "g1", "ip or ip6", &topology.dir().join("left.pcap"))?;
        let right = Capture::start(wire, "g2", "ip or ip6", &topology.dir().join("right.pcap"))?;
        Ping { count: 10, ..Ping::default() }.all(near, to)?;
        let server = IperfServer::start(topology.ns("h2")?, to, topology.dir())?;
        server.tcp_bytes(near, 500_000)?;
        let (left, right) = (left.finish()?, right.finish()?);
        let compared = compare(&left, &right, esp.is_some(), ah.is_some())?;
        ensure!(compared > 100, "only {compared} packets seen on both sides");
        let relay = topology.node("relay")?;
        ensure!(relay.frames("left")?.0 > 100 && relay.frames("right")?.1 > 100, "not through the relay");
        took(relay, path, 100)?;
        accounts(relay, esp.is_some() && ah.is_some())
    })
}

/// Whether the relay translated on this path, and next to nothing on the other.
fn took(relay: &Node, path: RelayPath, least: u64) -> Result<()> {
    let in_xdp = relay.verdict("relayed")?;
    let by_workers = relay.verdict("esp")? + relay.verdict("ah")? + relay.verdict("esp_in_udp")?;
    match path {
        // Until the neighbours are known the workers have the packets.
        RelayPath::Xdp => ensure!(in_xdp > least && by_workers < 30, "in XDP {in_xdp}, workers {by_workers}"),
        RelayPath::Worker => {
            ensure!(in_xdp == 0 && by_workers > least, "in XDP {in_xdp}, workers {by_workers}");
        }
    }
    Ok(())
}

/// DP-6: what the entry, the ports and the program counted is the same traffic, on whichever path it went, and nothing was
/// dropped.
fn accounts(relay: &Node, bundle: bool) -> Result<()> {
    let entry = relay.json(&["relay"])?;
    let count = |name: &str| -> Result<u64> {
        let mut all = 0;
        postern_hwtests::node::each_object(&entry, &mut |object| {
            all += object.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        });
        ensure!(all > 0, "{name} is 0: {entry}");
        Ok(all)
    };
    let packets = count("to_gateway_packets")? + count("to_client_packets")?;
    let bytes = count("to_gateway_bytes")? + count("to_client_bytes")?;
    ensure!(bytes > packets * if bundle { 100 } else { 60 }, "{packets} packets have {bytes} bytes");
    let (left, right) = (relay.frames("left")?, relay.frames("right")?);
    let (received, transmitted) = (left.0 + right.0, left.1 + right.1);
    // A straggler may come between one question and the next.
    for (name, other) in [("received", received), ("transmitted", transmitted)] {
        ensure!(other.abs_diff(packets) < 20, "the entry counted {packets}, the ports {name} {other}");
    }
    Ok(())
}

/// Packets seen on both sides, told by their sequence numbers and direction, that kept their length and changed every
/// visible SPI (RLY-1, RLY-3).
fn compare(left: &std::path::Path, right: &std::path::Path, esp: bool, ah: bool) -> Result<usize> {
    let protocol = if ah { "ah" } else { "esp" };
    let names = [&format!("{protocol}.sequence"), "eth.dst", "frame.len", "esp.spi", "ah.spi"];
    let read = |file: &std::path::Path| -> Result<HashMap<String, Vec<Vec<String>>>> {
        let mut packets: HashMap<String, Vec<Vec<String>>> = HashMap::new();
        for row in fields(file, protocol, &names)? {
            packets.entry(row.first().cloned().unwrap_or_default()).or_default().push(row);
        }
        Ok(packets)
    };
    let (left, right) = (read(left)?, read(right)?);
    let mut compared = 0;
    for (sequence, rows) in &left {
        let Some(others) = right.get(sequence) else { continue };
        let sorted = |rows: &[Vec<String>], column: usize| -> Vec<String> {
            let mut values: Vec<_> = rows.iter().filter_map(|row| row.get(column).cloned()).collect();
            values.sort();
            values
        };
        // Both directions may have the same number: lengths as a set, SPIs all different.
        if rows.len() != others.len() {
            continue;
        }
        ensure!(sorted(rows, 2) == sorted(others, 2), "lengths differ: {rows:?} {others:?}");
        for (column, present) in [(3, esp), (4, ah)] {
            let (mine, theirs) = (sorted(rows, column), sorted(others, column));
            ensure!(!present || mine.iter().all(|spi| !spi.is_empty()), "no SPI: {rows:?}");
            ensure!(
                !present || mine.iter().all(|spi| !theirs.contains(spi)),
                "SPI kept: {rows:?} {others:?}"
            );
        }
        compared += rows.len();
    }
    Ok(compared)
}

/// RLY-1, RLY-2: ESP, IPv4.
#[test]
fn rly_1_esp_4_in_4() -> Result<()> {
    through_relay(Family::V4, Family::V4, Some(AES128GCM), None)
}

/// RLY-1, RLY-2: ESP, IPv6.
#[test]
fn rly_1_esp_6_in_6() -> Result<()> {
    through_relay(Family::V6, Family::V6, Some(AES128GCM), None)
}

/// RLY-1: ESP, mixed both ways.
#[test]
fn rly_1_esp_mixed() -> Result<()> {
    through_relay(Family::V4, Family::V6, Some(AES128GCM), None)?;
    through_relay(Family::V6, Family::V4, Some(AES128GCM), None)
}

/// RLY-2: AH, whose ICV covers SPI and outer addresses: the client computes it over the gateway-side values.
#[test]
fn rly_2_ah() -> Result<()> {
    for family in Family::ALL {
        through_relay(family, family, None, ah_sha256())?;
    }
    Ok(())
}

/// RLY-3: ESP under AH; both SPIs are visible and both are translated.
#[test]
fn rly_3_bundle() -> Result<()> {
    for family in Family::ALL {
        through_relay(family, family, Some(AES128GCM), ah_sha256())?;
    }
    Ok(())
}

/// RLY-11: UDP encapsulation between client and relay only; the gateway sees plain ESP.
#[test]
fn rly_11_encapsulation_on_one_side() -> Result<()> {
    for family in Family::ALL {
        let mut topology = Topology::build(Kind::Relay)?;
        // Packets change their length, so the workers have them even where XDP may.
        topology.translate(RelayPath::Xdp)?;
        let pair = topology.tunnel(0, Some(AES128GCM), None, family, family)?;
        let at = (Segment::Left.address(family, 10), Segment::Right.address(family, 10));
        let (mut client, gateway, mut entry) = pair.through_relay(at.0, at.1);
        let encap = Some(Encap { local_port: 4500, remote_port: 4500 });
        client.encap = encap;
        entry.client.encap = encap;
        topology.start_node("relay", relay_config(vec![entry]))?;
        topology.start_node("g1", gateway_config(vec![client]))?;
        topology.start_node("g2", gateway_config(vec![gateway]))?;
        topology.check(|topology| {
            let wire = topology.ns("wire")?;
            let left = Capture::start(wire, "g1", "udp port 4500", &topology.dir().join("left.pcap"))?;
            let right = Capture::start(wire, "g2", "udp port 4500", &topology.dir().join("right.pcap"))?;
            Ping::default().all(topology.ns("h1")?, inside(family, 2, 10))?;
            let server = IperfServer::start(topology.ns("h2")?, inside(family, 2, 10), topology.dir())?;
            server.tcp_bytes(topology.ns("h1")?, 500_000)?;
            ensure!(fields(&left.finish()?, "udpencap", &["udp.port"])?.len() > 10, "nothing encapsulated");
            ensure!(
                fields(&right.finish()?, "udp", &["udp.port"])?.is_empty(),
                "encapsulated on the gateway's side"
            );
            took(topology.node("relay")?, RelayPath::Worker, 100)
        })?;
    }
    Ok(())
}

/// RLY-1, RLY-2: ESP in UDP on both sides keeps its length, so it is translated on both paths.
#[test]
fn rly_1_encapsulated_on_both_sides() -> Result<()> {
    for (path, family) in RelayPath::ALL.into_iter().flat_map(|path| Family::ALL.map(|family| (path, family)))
    {
        let mut topology = Topology::build(Kind::Relay)?;
        topology.translate(path)?;
        let pair = topology.tunnel(0, Some(AES128GCM), None, family, family)?;
        let at = (Segment::Left.address(family, 10), Segment::Right.address(family, 10));
        let (mut client, mut gateway, mut entry) = pair.through_relay(at.0, at.1);
        let encap = Some(Encap { local_port: 4500, remote_port: 4500 });
        (client.encap, gateway.encap) = (encap, encap);
        (entry.client.encap, entry.gateway.encap) = (encap, encap);
        topology.start_node("relay", relay_config(vec![entry]))?;
        topology.start_node("g1", gateway_config(vec![client]))?;
        topology.start_node("g2", gateway_config(vec![gateway]))?;
        topology.check(|topology| {
            let to = inside(family, 2, 10);
            Ping::default().all(topology.ns("h1")?, to)?;
            let server = IperfServer::start(topology.ns("h2")?, to, topology.dir())?;
            server.tcp_bytes(topology.ns("h1")?, 500_000)?;
            took(topology.node("relay")?, path, 100)?;
            accounts(topology.node("relay")?, false)
        })?;
    }
    Ok(())
}

/// RLY-1: while the other end of a wire takes no frames from XDP the workers have the packets, and from then on that it
/// does XDP has them, without a restart; none is lost.
#[test]
fn rly_1_falls_back_where_xdp_cannot_send() -> Result<()> {
    let mut topology = Topology::build(Kind::Relay)?;
    topology.configure(RelayPath::Xdp);
    let pair = topology.tunnel(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    topology.start(&[pair])?;
    topology.check(|topology| {
        let (to, ping) = (inside(Family::V4, 2, 10), Ping { count: 30, ..Ping::default() });
        Ping::default().all(topology.ns("h1")?, to)?;
        ping.all(topology.ns("h1")?, to)?;
        ensure!(topology.node("relay")?.verdict("relayed")? == 0, "sent into a wire that takes nothing");
        topology.take_frames_from_xdp()?;
        let mut tries = 0;
        while topology.node("relay")?.verdict("relayed")? == 0 {
            tries += 1;
            ensure!(tries < 30, "XDP does not take over");
            std::thread::sleep(std::time::Duration::from_millis(200));
            Ping { count: 1, ..Ping::default() }.all(topology.ns("h1")?, to)?;
        }
        ping.all(topology.ns("h1")?, to)?;
        accounts(topology.node("relay")?, false)
    })
}

/// RLY-4, DP-6: a packet with a right SPI from a wrong address goes nowhere and is counted.
#[test]
fn rly_4_wrong_peer_is_counted() -> Result<()> {
    RelayPath::ALL.into_iter().try_for_each(wrong_peer_is_counted)
}

fn wrong_peer_is_counted(path: RelayPath) -> Result<()> {
    let mut topology = Topology::build(Kind::Relay)?;
    topology.translate(path)?;
    let pair = topology.tunnel(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    let at = (Segment::Left.address(Family::V4, 10), Segment::Right.address(Family::V4, 10));
    let (client, gateway, mut entry) = pair.through_relay(at.0, at.1);
    // The relay expects the client elsewhere.
    entry.client.peer = Segment::Left.address(Family::V4, 77);
    topology.start_node("relay", relay_config(vec![entry]))?;
    topology.start_node("g1", gateway_config(vec![client]))?;
    topology.start_node("g2", gateway_config(vec![gateway]))?;
    topology.check(|topology| {
        let (pings, _) =
            Ping { count: 5, ..Ping::default() }.run(topology.ns("h1")?, inside(Family::V4, 2, 10))?;
        ensure!(pings.received == 0, "{pings:?}");
        let drops = topology.node("relay")?.drops("relay_wrong_peer")?;
        ensure!(drops >= 5, "relay_wrong_peer is {drops}");
        Ok(())
    })
}

/// RLY-7: neither the memory of the relay's processes nor its files hold a key of the SAs that go through it. The
/// same search finds them in the gateway's datapath, so it would find them in the relay.
#[test]
fn rly_7_relay_holds_no_key() -> Result<()> {
    RelayPath::ALL.into_iter().try_for_each(relay_holds_no_key)
}

fn relay_holds_no_key(path: RelayPath) -> Result<()> {
    let mut topology = Topology::build(Kind::Relay)?;
    topology.translate(path)?;
    let pair = topology.tunnel(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    topology.start(std::slice::from_ref(&pair))?;
    topology.check(|topology| {
        let to = inside(Family::V4, 2, 10);
        Ping::default().all(topology.ns("h1")?, to)?;
        IperfServer::start(topology.ns("h2")?, to, topology.dir())?.tcp_bytes(topology.ns("h1")?, 500_000)?;
        let needles = needles(&pair);
        let relay = topology.node("relay")?;
        for pid in [relay.control_pid()?, relay.datapath_pid()?] {
            let found = memory::search(pid, &needles)?;
            ensure!(found.is_empty(), "process {pid} of the relay holds {found:?}");
        }
        let gateway = topology.node("g2")?;
        let found = memory::search(gateway.datapath_pid()?, &needles)?;
        ensure!(!found.is_empty(), "the search finds no key even where there must be one");
        for file in memory::files(relay.dir())? {
            let bytes = std::fs::read(&file)?;
            let held = needles.iter().any(|(_, needle)| memory::contains(&bytes, needle));
            ensure!(!held, "{} holds a key", file.display());
        }
        Ok(())
    })
}

/// Keys as bytes and as the configuration writes them.
fn needles(pair: &Pair) -> Vec<(String, Vec<u8>)> {
    let keys = pair.keys.iter().flatten().filter(|key| !key.is_empty());
    keys.zip(0..)
        .flat_map(|(key, number)| {
            // Without the salt: backends keep it apart.
            let proper = key.get(..16).unwrap_or(key).to_vec();
            let text = hex(&proper).into_bytes();
            [(format!("key {number}"), proper), (format!("key {number} as text"), text)]
        })
        .collect()
}
