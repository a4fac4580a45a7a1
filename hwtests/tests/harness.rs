//! The harness itself, where no Postern is needed: what it measures and tidies is right.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use postern_hwtests::capture::{Capture, fields};
use postern_hwtests::config::ike::Link;
use postern_hwtests::flood::Flood;
use postern_hwtests::impair::{BadNetwork, Impairment};
use postern_hwtests::netns;
use postern_hwtests::packet::mac;
use postern_hwtests::peer::{Options, Peer, Version};
use postern_hwtests::topology::{Family, Kind, Topology, inside, inside_net, roaming};
use postern_hwtests::traffic::{IperfServer, Ping, Stream};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

/// Hosts reach their gateway, gateways each other, and nothing crosses a gateway without its datapath (DP-1).
#[test]
fn wires_carry_and_gateways_do_not_forward() -> Result<()> {
    let topology = Topology::build(Kind::Relay)?;
    for family in Family::ALL {
        Ping::default().all(topology.ns("h1")?, inside(family, 1, 1))?;
        let relay = postern_hwtests::topology::Segment::Left.address(family, 10);
        Ping::default().all(topology.ns("g1")?, relay)?;
        let (pings, _) =
            Ping { count: 2, ..Ping::default() }.run(topology.ns("h1")?, inside(family, 2, 10))?;
        ensure!(pings.received == 0, "a packet crossed without a datapath");
    }
    Ok(())
}

/// A stream counts what is lost exactly, iperf3 and captures work, and all is gone afterwards.
#[test]
fn measurements_and_tidying() -> Result<()> {
    let topology = Topology::build(Kind::Routed)?;
    let (g1, g2) = (topology.ns("g1")?, topology.ns("g2")?);
    let (_, far) = topology.outer(Family::V4);
    Ping::default().all(g1, far)?;
    let capture = Capture::start(topology.ns("wire")?, "g1", "udp", &topology.dir().join("c.pcap"))?;
    let stream = Stream::start(g1, g2, far, 500, 100)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    let tally = stream.finish()?;
    ensure!(tally.lost() == 0 && tally.sent > 150 && tally.duplicates == 0, "{tally:?}");
    let seen = fields(&capture.finish()?, "udp", &["ip.src", "udp.length"])?;
    ensure!(seen.len() == usize::try_from(tally.sent)?, "{} captured, {tally:?}", seen.len());
    let iperf = IperfServer::start(g2, far, topology.dir())?.tcp(g1, 1)?;
    ensure!(iperf.bits_per_second > 1e6, "{iperf:?}");

    // Every fourth datagram goes: the count says so.
    topology.ns("router")?.sh("nft add table ip t")?;
    topology.ns("router")?.sh("nft add chain ip t c { type filter hook forward priority 0 ; }")?;
    topology.ns("router")?.sh("nft add rule ip t c udp length 108 numgen inc mod 4 == 0 drop")?;
    let stream = Stream::start(g1, g2, far, 500, 100)?;
    std::thread::sleep(std::time::Duration::from_millis(400));
    let tally = stream.finish()?;
    ensure!(tally.lost() == tally.sent.div_ceil(4), "{tally:?}");

    let (dir, name) = (topology.dir().to_owned(), g1.name().to_owned());
    drop(topology);
    ensure!(!dir.exists() && !netns::list("pt").contains(&name), "{name} is still there");
    Ok(())
}

/// Two strongSwans of each version agree, carry a ping, and the keys can be read (groundwork of DP-3 and IKE-5).
#[test]
fn strongswan_peers() -> Result<()> {
    for version in Version::ALL {
        let topology = Topology::build(Kind::Pair)?;
        let nets = (inside_net(Family::V4, 1), inside_net(Family::V4, 2));
        let link = Link::new("net", topology.outer(Family::V4), nets);
        let options = Options { log: "chd = 4".to_owned(), ..Options::new(version) };
        let a = Peer::start(topology.ns("g1")?, "swan-a", topology.dir(), &options)?;
        let b = Peer::start(topology.ns("g2")?, "swan-b", topology.dir(), &options)?;
        a.load(&[link.left()], &[])?;
        b.load(&[link.right()], &[])?;
        a.initiate("net", "net")?;
        let keys = a.child_keys("net")?;
        ensure!(
            keys.initiator.0.len() == 20 && keys.responder.0.len() == 20 && keys.initiator != keys.responder,
            "{keys:?}"
        );
        Ping::default().all(topology.ns("h1")?, inside(Family::V4, 2, 10)).with_context(|| b.log())?;
        let sa = b.settled("net")?;
        let encap = version == Version::V5;
        ensure!(!sa.initiator && sa.children.iter().all(|child| child.encap == encap), "{sa:?}");
        b.kill()?;
    }
    Ok(())
}

/// The bad network loses, doubles and delays IKE in the announced proportions, and nothing else.
#[test]
fn bad_network() -> Result<()> {
    let topology = Topology::build(Kind::Pair)?;
    let (wire, g1, g2) = (topology.ns("wire")?, topology.ns("g1")?, topology.ns("g2")?);
    let (near, far) = topology.outer(Family::V4);
    let late = Duration::from_millis(20);
    let bad = Impairment { loss: 20, duplicate: 10, reorder: 10, late, seed: 1, ..Impairment::default() };
    let network = BadNetwork::insert(wire, "left", "g2", bad)?;
    Ping { count: 50, ..Ping::default() }.all(g1, far)?;
    let receiver = g2.enter(|| Ok(UdpSocket::bind((far, 500))?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
    set_socket_recv_buffer_size_force(&receiver, 4 << 20)?;
    let sender = g1.enter(|| Ok(UdpSocket::bind((near, 500))?))?;
    let (mut order, mut datagram) = (Vec::new(), [0; 8]);
    for number in 0..500_u64 {
        sender.send_to(&number.to_be_bytes(), (far, 500))?;
        std::thread::sleep(Duration::from_millis(1));
    }
    while receiver.recv(&mut datagram).is_ok() {
        order.push(u64::from_be_bytes(datagram));
    }
    let mut fresh = order.clone();
    fresh.sort_unstable();
    fresh.dedup();
    let (kept, doubled) = (fresh.len(), order.len() - fresh.len());
    ensure!((340..460).contains(&kept) && (10..100).contains(&doubled), "{kept} came, {doubled} twice");
    ensure!(!order.is_sorted(), "nothing was overtaken");
    network.finish()
}

/// The client's networks reach the gateway, the first with another address and other ports than its own.
#[test]
fn roaming_client() -> Result<()> {
    let topology = Topology::build(Kind::Roam)?;
    let (client, gateway) = (topology.ns("client")?, topology.ns("g2")?);
    let (_, home) = topology.outer(Family::V4);
    let listener = gateway.enter(|| Ok(UdpSocket::bind((home, 4500))?))?;
    listener.set_read_timeout(Some(Duration::from_secs(1)))?;
    for number in 0..3 {
        let sender = client.enter(|| Ok(UdpSocket::bind((roaming(number), 4500))?))?;
        sender.send_to(b"x", (home, 4500))?;
        let (_, source) = listener.recv_from(&mut [0; 8])?;
        let same = source.ip() == roaming(number) && source.port() == 4500;
        ensure!(same == (number != 0), "network {number}: from {source}");
        listener.send_to(b"y", source)?;
        sender.set_read_timeout(Some(Duration::from_secs(1)))?;
        sender.recv(&mut [0; 8])?;
    }
    Ping::default().all(topology.ns("h2")?, home)
}

/// The flood keeps its pace, and a strongSwan answers it as it does requests.
#[test]
fn floods() -> Result<()> {
    let topology = Topology::build(Kind::Pair)?;
    let (g1, g2) = (topology.ns("g1")?, topology.ns("g2")?);
    let (near, IpAddr::V4(far)) = topology.outer(Family::V4) else { bail!("no IPv4") };
    let swan = Peer::start(g2, "swan", topology.dir(), &Options::new(Version::V5))?;
    let nets = (inside_net(Family::V4, 1), inside_net(Family::V4, 2));
    let mut open = Link::new("net", (near, far.into()), nets).right();
    open.remote = None;
    swan.load(&[open], &[])?;
    g2.sh("ip route add 198.18.0.0/15 via 192.0.2.1")?;
    let capture = Capture::start(topology.ns("wire")?, "g2", "udp port 500", &topology.dir().join("f.pcap"))?;
    let flood = Flood::start(topology.ns("wire")?, "left", far, mac(g2, "outside")?, 1000)?;
    std::thread::sleep(Duration::from_secs(1));
    let flooded = flood.finish()?;
    ensure!((800.0..1100.0).contains(&flooded.rate()), "{flooded:?}");
    let answers = fields(&capture.finish()?, "isakmp.flag_r == 1", &["isakmp.nextpayload"])?;
    ensure!(answers.len() > 10, "{} answers to {flooded:?}; {g1:?}", answers.len());
    Ok(())
}
