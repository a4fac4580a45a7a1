//! DP-5 and MOB-2 over real wires: packet sizes, and peers that move.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use postern_hwtests::capture::{Capture, fields, frames};
use postern_hwtests::config::{AES128GCM, Encap};
use postern_hwtests::oracle::Oracle;
use postern_hwtests::packet::{ETHERNET, fix_ip_checksum};
use postern_hwtests::process::wait_for;
use postern_hwtests::topology::{Family, Kind, Segment, Topology, gateway_config, inside};
use postern_hwtests::traffic::{IperfServer, Ping};
use serde_json::Value;

/// DP-5: a packet that does not fit is refused with ICMP that names the size that fits, and that size does fit;
/// TCP gets its MSS clamped and flows.
fn sizes(outer: Family, inner: Family) -> Result<()> {
    let mut topology = Topology::build(Kind::Pair)?;
    let pair = topology.tunnel(0, Some(AES128GCM), None, outer, inner)?;
    let (mut left, right) = (pair.left(), pair.right());
    left.mtu = Some(1400);
    topology.start_node("g1", gateway_config(vec![left]))?;
    topology.start_node("g2", gateway_config(vec![right]))?;
    topology.check(|topology| {
        let (host, to) = (topology.ns("h1")?, inside(inner, 2, 10));
        Ping::default().all(host, to)?;
        // TCP first: afterwards the host knows the path's MTU from ICMP.
        let syns =
            Capture::start(topology.ns("h2")?, "eth0", "tcp or ip6", &topology.dir().join("syn.pcap"))?;
        IperfServer::start(topology.ns("h2")?, to, topology.dir())?.tcp_bytes(host, 1_000_000)?;
        let from = inside(inner, 1, 10);
        let filter =
            format!("tcp.flags.syn == 1 && {} == {from}", if from.is_ipv4() { "ip.src" } else { "ipv6.src" });
        let clamped = fields(&syns.finish()?, &filter, &["tcp.options.mss_val"])?;
        ensure!(!clamped.is_empty(), "no SYN captured");
        let (headers, smallest) = if inner == Family::V4 { (40, 28) } else { (60, 48) };
        for mss in clamped.iter().flatten() {
            let mss: u16 = mss.parse()?;
            // RFC 4303: SPI, sequence number, IV, padding to 4, pad length, next header and ICV are 34 to 37 bytes.
            let overhead = if outer == Family::V4 { 20 + 34 } else { 40 + 34 };
            ensure!(mss + headers <= 1400 - overhead && mss + headers > 1400 - overhead - 8, "MSS {mss}");
        }
        let big = Ping { count: 2, size: 1440, prohibit_fragmentation: true };
        let (pings, text) = big.run(host, to)?;
        ensure!(pings.received == 0, "1440 bytes fit into 1400: {text}");
        let mtu = told_mtu(&text).with_context(|| format!("no ICMP about the size: {text}"))?;
        ensure!(topology.node("g1")?.drops("too_big")? >= 1, "too_big was not counted");
        let fits = Ping { count: 3, size: mtu - smallest, prohibit_fragmentation: true };
        fits.all(host, to).with_context(|| format!("{mtu} bytes, which ICMP said would fit"))?;
        ensure!((1300..1400).contains(&mtu), "an MTU of {mtu} was told");
        Ok(())
    })
}

/// `Frag needed and DF set (mtu = 1346)` or `Packet too big: mtu=1326`.
fn told_mtu(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("mtu")?;
    let digits: String =
        rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// DP-5: IPv4 in IPv4.
#[test]
fn dp_5_sizes_4_in_4() -> Result<()> {
    sizes(Family::V4, Family::V4)
}

/// DP-5: IPv6 in IPv6.
#[test]
fn dp_5_sizes_6_in_6() -> Result<()> {
    sizes(Family::V6, Family::V6)
}

/// DP-5: both mixtures.
#[test]
fn dp_5_sizes_mixed() -> Result<()> {
    sizes(Family::V4, Family::V6)?;
    sizes(Family::V6, Family::V4)
}

/// Where g2's SAs have their peer: address and port.
fn peer_of(topology: &Topology) -> Result<Vec<String>> {
    let table = topology.node("g2")?.json(&["sa"])?;
    let text = |row: &Value, key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let peers: Vec<_> = table
        .as_array()
        .context("`postern sa` gives no list")?
        .iter()
        .map(|row| (text(row, "remote"), text(row, "encap")))
        .map(|(remote, ports)| format!("{remote}:{}", ports.rsplit(':').next().unwrap_or_default()))
        .collect();
    ensure!(peers.len() == 2, "not two SAs: {table}");
    Ok(peers)
}

/// The router shows g1 under another address and port: a NAT, stateless, so that the change takes effect at once.
fn translate(topology: &Topology, shown: IpAddr, port: u16) -> Result<()> {
    let router = topology.ns("router")?;
    let (hidden, _) = topology.outer(Family::V4);
    router.sh("nft flush ruleset")?;
    router.sh("nft add table ip nat")?;
    router.sh("nft add chain ip nat out { type filter hook postrouting priority 0 ; }")?;
    router.sh("nft add chain ip nat back { type filter hook prerouting priority -300 ; }")?;
    let out =
        format!("oifname right ip saddr {hidden} udp sport 4500 ip saddr set {shown} udp sport set {port}");
    let back =
        format!("iifname right ip daddr {shown} udp dport {port} ip daddr set {hidden} udp dport set 4500");
    router.sh(&format!("nft add rule ip nat out {out}"))?;
    router.sh(&format!("nft add rule ip nat back {back}"))?;
    router.sh(&format!("ip addr replace {shown}/24 dev right"))?;
    Ok(())
}

/// MOB-2: the terminal's outer address and port change under its traffic (a NAT in the path): the gateway follows the
/// newest authentic packet at once. A replayed and a forged packet from elsewhere move nothing and are counted.
#[test]
fn mob_2_follow_the_newest_authentic_packet() -> Result<()> {
    let mut topology = Topology::build(Kind::Routed)?;
    let mut pair = topology.tunnel(0, Some(AES128GCM), None, Family::V4, Family::V4)?;
    pair.natt = true;
    pair.follow_peer = Some(true);
    let (first, second) = (Segment::Right.address(Family::V4, 77), Segment::Right.address(Family::V4, 78));
    translate(&topology, first, 5000)?;
    let mut right = pair.right();
    right.remote = first;
    right.encap = Some(Encap { local_port: 4500, remote_port: 5000 });
    topology.start_node("g1", gateway_config(vec![pair.left()]))?;
    topology.start_node("g2", gateway_config(vec![right]))?;
    topology.check(|topology| {
        let (host, to) = (topology.ns("h1")?, inside(Family::V4, 2, 10));
        Ping::default().all(host, to)?;
        ensure!(
            peer_of(topology)? == [format!("{first}:5000"), format!("{first}:5000")],
            "{:?}",
            peer_of(topology)?
        );
        // The move, under a connection that stays.
        let wire = topology.ns("wire")?;
        let capture = Capture::start(wire, "g2", "udp dst port 4500", &topology.dir().join("moved.pcap"))?;
        translate(topology, second, 6000)?;
        wait_for("the gateway to follow", Duration::from_secs(10), || {
            Ping { count: 1, ..Ping::default() }.run(host, to)?;
            Ok(peer_of(topology)?.iter().all(|peer| *peer == format!("{second}:6000")).then_some(()))
        })?;
        Ping::default().all(host, to).context("after the move")?;
        let frames = frames(&capture.finish()?)?;
        let Some(last) = frames.last() else { bail!("nothing captured") };

        // An authentic packet again, and a fresh-looking one without a right ICV, both from a third place.
        let node = topology.node("g2")?;
        let before = (node.drops("replay_duplicate")?, node.drops("bad_icv")?);
        let mut replayed = last.clone();
        let third = "198.51.100.79".parse::<std::net::Ipv4Addr>()?.octets();
        if let Some(source) = replayed.get_mut(ETHERNET + 12..ETHERNET + 16) {
            source.copy_from_slice(&third);
        }
        if let Some(packet) = replayed.get_mut(ETHERNET..) {
            fix_ip_checksum(packet);
        }
        let mut forged = replayed.clone();
        // The low byte but one of the sequence number: 256 ahead.
        if let Some(byte) = forged.get_mut(ETHERNET + 20 + 8 + 6) {
            *byte = byte.wrapping_add(1);
        }
        let mut oracle = Oracle::start_in(wire)?;
        oracle.send("g2", &replayed)?;
        oracle.send("g2", &forged)?;
        wait_for("both to be counted", Duration::from_secs(3), || {
            let now = (node.drops("replay_duplicate")?, node.drops("bad_icv")?);
            Ok((now == (before.0 + 1, before.1 + 1)).then_some(()))
        })?;
        ensure!(
            peer_of(topology)?.iter().all(|peer| *peer == format!("{second}:6000")),
            "a forged packet moved it"
        );
        Ping::default().all(host, to).context("after forged and replayed packets")
    })
}
