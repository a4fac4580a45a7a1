//! The harness itself, where no Postern is needed: what it measures and tidies is right.

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, fields};
use postern_hwtests::config::ike::Link;
use postern_hwtests::netns;
use postern_hwtests::peer::{Options, Peer, Version};
use postern_hwtests::topology::{Family, Kind, Topology, inside, inside_net};
use postern_hwtests::traffic::{IperfServer, Ping, Stream};

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
