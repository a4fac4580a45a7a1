//! The demo with IKEv2: what is negotiated, the traffic through it, and new keys under traffic.

use std::time::Instant;

use anyhow::Result;
use postern_hwtests::party::Party;
use postern_hwtests::peer::Version;
use postern_hwtests::stage::{Stage, postern, swan};
use postern_hwtests::topology::Kind;
use postern_hwtests::traffic::{IperfServer, Ping};

use crate::{Peer, proof, step};

const NAME: &str = "demo";

/// One run of it.
pub fn round(peer: Peer) -> Result<()> {
    let (other, who) = match peer {
        Peer::Postern => (postern(), "Postern".to_owned()),
        Peer::Strongswan => (swan(Version::V5), format!("strongSwan {}", Version::V5.name())),
        Peer::Strongswan6 => (swan(Version::V6), format!("strongSwan {}", Version::V6.name())),
    };
    let stage = Stage::pair(&postern(), &other)?;
    step("network", &format!("{}; each a network namespace", Kind::Pair.help()));
    println!("  left: Postern; right: {who}");
    stage.check(|stage| {
        stage.load(&stage.link(NAME))?;
        let start = Instant::now();
        stage.establish(NAME, true)?;
        step("IKEv2", &format!("established after {} ms", start.elapsed().as_millis()));
        show(stage)?;
        traffic(stage)?;
        rekeys(stage)?;
        step("log", "postern log");
        print!("{}", stage.left.node()?.cli(&["log"])?);
        step("proof", "frames through AF_XDP sockets, and packets that the kernel forwarded");
        for (party, role) in [(&stage.left, "g1"), (&stage.right, "g2")] {
            if let Party::Postern { node, .. } = party {
                proof(node, stage.topology().ns(role)?, ["inside", "outside"])?;
            }
        }
        stage.close(NAME, true)?;
        step("IKEv2", "closed; neither side has anything left");
        Ok(())
    })
}

fn show(stage: &Stage) -> Result<()> {
    println!("  left, postern connections:");
    print!("{}", stage.left.node()?.cli(&["connections"])?);
    match &stage.right {
        Party::Postern { node, .. } => {
            print!("  right, postern connections:\n{}", node.cli(&["connections"])?);
        }
        Party::Swan(peer) => print!("  right, swanctl --list-sas:\n{}", peer.show()),
    }
    Ok(())
}

fn traffic(stage: &Stage) -> Result<()> {
    let (h1, near, h2, far) = stage.hosts()?;
    let ping = Ping { count: 20, ..Ping::default() };
    ping.all(h1, far)?;
    ping.all(h2, near)?;
    step("ping", &format!("{near} and {far} answer each other, 20 of 20 both ways"));
    let server = IperfServer::start(h1, near, stage.topology().dir())?;
    for (name, result) in [("h2 to h1", server.tcp(h2, 3)?), ("h1 to h2", server.tcp_reverse(h2, 3)?)] {
        let rate = result.bits_per_second / 1e6;
        step("iperf3", &format!("TCP {name}: {rate:.0} Mb/s, {} retransmitted segments", result.retransmits));
        anyhow::ensure!(rate > 1.0, "hardly anything came through");
    }
    Ok(())
}

/// IKE-1: by either side, with every datagram counted.
fn rekeys(stage: &Stage) -> Result<()> {
    stage.without_loss(|| {
        for from_left in [true, false] {
            let before = stage.agreed(NAME)?;
            stage.initiator(from_left).rekey_child(NAME)?;
            let now = stage.agreed_where(NAME, "new keys of ESP", |now| now.spi_in != before.spi_in)?;
            stage.initiator(from_left).rekey_ike(NAME)?;
            stage.agreed_where(NAME, "new keys of IKE", |now| now.ike != before.ike)?;
            let who = if from_left { "left" } else { "right" };
            println!("  rekeyed by the {who} side: SPI {:08x} became {:08x}", before.spi_in, now.spi_in);
        }
        Ok(())
    })?;
    step(
        "rekey",
        "child and IKE SA, by either side, under traffic: not one of the counted datagrams was lost",
    );
    Ok(())
}
