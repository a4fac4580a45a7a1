//! The demo with static keys: two gateways and a blind relay between them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, frames};
use postern_hwtests::config::{AES128GCM, Pair, RELAY_SPI_OFFSET};
use postern_hwtests::oracle::hex;
use postern_hwtests::packet::{ETHERNET, outer_header};
use postern_hwtests::topology::{Family, Kind, Topology, inside};
use postern_hwtests::traffic::{IperfServer, Ping};
use postern_hwtests::veth::Wire;

use crate::{proof, step};

/// One run of it.
pub fn round(outer: Family, inner: Family, keep: bool) -> Result<()> {
    let mut topology = if keep {
        let dir = PathBuf::from("/run/postern-lab/relay");
        std::fs::create_dir_all(&dir)?;
        Topology::build_named(Kind::Relay, Wire::default(), "lab-relay", dir)?
    } else {
        Topology::build(Kind::Relay)?
    };
    let pair = topology.tunnel(0, Some(AES128GCM), None, outer, inner)?;
    topology.start(std::slice::from_ref(&pair))?;
    step("network", &format!("{}; each a network namespace", Kind::Relay.help()));
    let mut outcome = topology.check(|topology| traffic(topology, inner));
    if outcome.is_ok() {
        outcome =
            topology.check(|topology| tables(topology).and_then(|()| before_and_after(topology, &pair)));
    }
    if outcome.is_ok() {
        outcome = topology.check(|topology| proofs(topology));
    }
    if keep {
        println!("\nLeft standing: `hwtests/lab show relay`, `hwtests/lab down relay`.");
        topology.leave();
    }
    outcome
}

/// Captures of both sides of the relay are under way while hosts talk.
fn traffic(topology: &Topology, inner: Family) -> Result<()> {
    let (near, far) = (topology.ns("h1")?, topology.ns("h2")?);
    let (from, to) = (inside(inner, 1, 10), inside(inner, 2, 10));
    let ping = Ping { count: 20, ..Ping::default() };
    let wire = topology.ns("wire")?;
    let left = Capture::start(wire, "g1", "ip or ip6", &topology.dir().join("left.pcap"))?;
    let right = Capture::start(wire, "g2", "ip or ip6", &topology.dir().join("right.pcap"))?;
    ping.all(near, to)?;
    ping.all(far, from)?;
    step("ping", &format!("{from} and {to} answer each other, 20 of 20 both ways"));
    left.finish()?;
    right.finish()?;
    let server = IperfServer::start(far, to, topology.dir())?;
    let (forth, back) = (server.tcp(near, 3)?, server.tcp_reverse(near, 3)?);
    for (name, result) in [("h1 to h2", forth), ("h2 to h1", back)] {
        let rate = result.bits_per_second / 1e6;
        step("iperf3", &format!("TCP {name}: {rate:.0} Mb/s, {} retransmitted segments", result.retransmits));
        ensure!(rate > 1.0, "hardly anything came through");
    }
    Ok(())
}

fn tables(topology: &Topology) -> Result<()> {
    for (role, table) in [("g1", "sa"), ("relay", "relay"), ("g2", "sa"), ("relay", "status")] {
        step(role, &format!("postern {table}"));
        print!("{}", topology.node(role)?.cli(&[table])?);
    }
    for role in ["g1", "relay", "g2"] {
        step(role, "postern drops");
        print!("{}", topology.node(role)?.cli(&["drops"])?);
    }
    Ok(())
}

/// One ESP packet as it was on a wire.
struct Seen {
    source: IpAddr,
    destination: IpAddr,
    spi: u32,
    length: usize,
    ciphertext: Vec<u8>,
}

/// ESP packets of a capture by direction (towards g2 or not) and sequence number.
fn esp_packets(file: &Path, towards_g2: [u32; 2]) -> Result<BTreeMap<(bool, u32), Seen>> {
    let mut packets = BTreeMap::new();
    for frame in frames(file)? {
        let packet = frame.get(ETHERNET..).unwrap_or_default();
        let Some(header) = outer_header(packet) else { continue };
        let Some((head, ciphertext)) = packet.get(header.size..).and_then(|rest| rest.split_at_checked(8))
        else {
            continue;
        };
        if header.protocol != 50 {
            continue;
        }
        let number = |at: usize| -> Option<u32> { Some(u32::from_be_bytes(*head.get(at..)?.first_chunk()?)) };
        let (spi, sequence) = number(0).zip(number(4)).context("a truncated ESP packet")?;
        let seen = Seen {
            source: header.source,
            destination: header.destination,
            spi,
            length: packet.len(),
            ciphertext: ciphertext.to_vec(),
        };
        packets.insert((towards_g2.contains(&spi), sequence), seen);
    }
    Ok(packets)
}

/// RLY-1, RLY-2: the same packet left and right of the relay.
fn before_and_after(topology: &Topology, pair: &Pair) -> Result<()> {
    let towards_g2 = [pair.spis.0 + RELAY_SPI_OFFSET, pair.spis.0];
    let left = esp_packets(&topology.dir().join("left.pcap"), towards_g2)?;
    let right = esp_packets(&topology.dir().join("right.pcap"), towards_g2)?;
    let mut compared = 0;
    for (way, name) in [(true, "from h1 to h2"), (false, "from h2 to h1")] {
        let mut shown = false;
        for ((_, sequence), before) in left.iter().filter(|((towards, _), _)| *towards == way) {
            let Some(after) = right.get(&(way, *sequence)) else { continue };
            ensure!(before.spi != after.spi, "the relay left the SPI {:#010x} as it was", before.spi);
            let kept = (before.source, before.destination) == (after.source, after.destination);
            ensure!(!kept, "the relay left the outer addresses as they were");
            ensure!(before.length == after.length, "{} bytes became {}", before.length, after.length);
            ensure!(before.ciphertext == after.ciphertext, "the relay changed what is encrypted");
            compared += 1;
            if !shown {
                shown = true;
                step(
                    "translation",
                    &format!("packet {sequence} {name}, captured on both sides of the relay"),
                );
                for (side, seen) in [("left ", before), ("right", after)] {
                    let Seen { source, destination, spi, length, ciphertext } = seen;
                    let start = hex(ciphertext.get(..16).unwrap_or(ciphertext));
                    println!(
                        "  {side}  {source} > {destination}  SPI {spi:#010x}  {length} bytes  {start}..."
                    );
                }
            }
        }
        ensure!(shown, "no packet {name} was seen on both sides of the relay");
    }
    println!("  {compared} packets compared: other addresses, other SPI, same length, same ciphertext");
    Ok(())
}

fn proofs(topology: &Topology) -> Result<()> {
    step("proof", "frames through AF_XDP sockets, and packets that the kernel forwarded");
    for (role, interfaces) in
        [("g1", ["inside", "outside"]), ("relay", ["left", "right"]), ("g2", ["inside", "outside"])]
    {
        proof(topology.node(role)?, topology.ns(role)?, interfaces)?;
    }
    Ok(())
}
