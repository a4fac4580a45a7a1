//! Packets against an independent implementation (scapy, `hwtests/oracle/oracle.py`) and tshark, over real wires.
//!
//! One gateway has a tunnel for every suite, with and without ESN and UDP encapsulation. A host sends through each:
//! the oracle opens what comes out and, given the same IV and sequence number, makes the very same bytes; tshark says
//! where it can that the ICV is good. Then the oracle's packets come in, and the host gets what was in them. Transport mode
//! and more combinations are in `oracle_memory.rs`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, EspSa, fields_with_keys, frames};
use postern_hwtests::config::{AES128GCM, AH_SPI_OFFSET, AH_SUITES, ESP_SUITES, Pair, Suite};
use postern_hwtests::oracle::{Oracle, hex};
use postern_hwtests::packet::{
    ETHERNET, ethernet, forwarded, ip_header, mac, outer_header, send_datagram, udp,
};
use postern_hwtests::topology::{Family, Kind, Topology, gateway_config, inside, more_inside, more_net};
use postern_hwtests::traffic::Ping;

/// One tunnel under test.
struct Case {
    pair: Pair,
    esn: bool,
    /// The far host.
    to: IpAddr,
    /// The first sequence number in either direction.
    first: u64,
}

impl Case {
    fn describe(&self) -> String {
        let Pair { esp, ah, mode, natt, .. } = &self.pair;
        let name = |suite: &Option<Suite>| suite.map_or("none", |suite| suite.name);
        format!("ESP {}, AH {}, {mode} mode, natt {natt}, ESN {}", name(esp), name(ah), self.esn)
    }

    /// The SPI that comes first in the packet.
    fn outermost_spi(&self) -> u32 {
        self.pair.spis.0 + if self.pair.ah.is_some() { AH_SPI_OFFSET } else { 0 }
    }
}

const PORT: u16 = 7777;
/// Datagrams through every tunnel.
const COUNT: u64 = 3;

/// Data of datagram `number`: all sizes modulo the block size of a cipher occur.
fn data(case: usize, number: u64) -> Vec<u8> {
    let size = 1 + (case * 37 + usize::try_from(number).unwrap_or(0) * 5) % 1200;
    vec![u8::try_from(case % 251).unwrap_or(0); size]
}

fn cases(topology: &Topology, outer: Family, inner: Family) -> Result<Vec<Case>> {
    let esp = || ESP_SUITES.into_iter().map(|suite| (Some(suite), None));
    let ah = || AH_SUITES.into_iter().map(|suite| (None, Some(suite)));
    let bundle = || AH_SUITES.into_iter().map(|suite| (Some(AES128GCM), Some(suite)));
    let mut wanted: Vec<(Option<Suite>, Option<Suite>, bool, bool)> = Vec::new();
    for esn in [false, true] {
        wanted.extend(esp().flat_map(|(esp, ah)| [(esp, ah, esn, false), (esp, ah, esn, true)]));
        wanted.extend(ah().chain(bundle()).map(|(esp, ah)| (esp, ah, esn, false)));
    }
    let mut cases = Vec::new();
    for (number, (esp, ah, esn, natt)) in (0_u8..).zip(wanted) {
        let to = more_inside(inner, number, 10);
        let mut pair = topology.tunnel_to_more(number, esp, ah, outer, inner)?;
        (pair.natt, pair.esn) = (natt, Some(esn));
        // ESN: the second datagram's number is the last of the low half (RFC 4303 section 2.2.1).
        let first = if esn { u64::from(u32::MAX) - 1 } else { 1 };
        cases.push(Case { pair, esn, to, first });
    }
    Ok(cases)
}

/// A gateway with all cases, and a host behind it; on the other side there is nobody but the oracle.
fn compare(outer: Family, inner: Family) -> Result<()> {
    let mut topology = Topology::build(Kind::Pair)?;
    let cases = cases(&topology, outer, inner)?;
    let (_, peer) = topology.outer(outer);
    let gateway = topology.ns("g1")?;
    let tunnels = cases.iter().map(|case| {
        let mut tunnel = case.pair.left();
        tunnel.out.begin_at(case.first);
        tunnel.inbound.begin_at(case.first - 1);
        tunnel
    });
    let config = gateway_config(tunnels.collect());
    // Both neighbours are known before the first datagram.
    Ping::default().all(gateway, peer)?;
    Ping::default().all(gateway, inside(inner, 1, 10))?;
    topology.start_node("g1", config)?;
    topology.check(|topology| {
        let mut oracle = Oracle::start_in(topology.ns("wire")?)?;
        made_by_postern(topology, &cases, &mut oracle, inner)?;
        made_by_the_oracle(topology, &cases, &mut oracle, outer, inner)
    })
}

/// DP-3: what Postern makes.
fn made_by_postern(topology: &Topology, cases: &[Case], oracle: &mut Oracle, inner: Family) -> Result<()> {
    let (wire, host) = (topology.ns("wire")?, topology.ns("h1")?);
    let sealed = Capture::start(wire, "g1", "ip or ip6", &topology.dir().join("protected.pcap"))?;
    let clear =
        Capture::start(host, "eth0", &format!("udp port {PORT}"), &topology.dir().join("clear.pcap"))?;
    for (index, case) in cases.iter().enumerate() {
        for number in 0..COUNT {
            send_datagram(host, (inside(inner, 1, 10), PORT), (case.to, PORT), &data(index, number))?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let (sealed, clear) = (sealed.finish()?, clear.finish()?);
    let mut by_destination: HashMap<IpAddr, Vec<Vec<u8>>> = HashMap::new();
    for packet in frames(&clear)?.iter().filter_map(|frame| frame.get(ETHERNET..)) {
        by_destination
            .entry(outer_header(packet).context("no IP packet")?.destination)
            .or_default()
            .push(packet.to_vec());
    }
    let mut by_spi: HashMap<u32, Vec<Vec<u8>>> = HashMap::new();
    for packet in frames(&sealed)?.iter().filter_map(|frame| frame.get(ETHERNET..)) {
        if let Some(spi) = spi_of(packet) {
            by_spi.entry(spi).or_default().push(packet.to_vec());
        }
    }
    for case in cases {
        let sa = case.pair.oracle_sa(true, case.esn).context("no algorithms")?;
        let sent = by_destination.get(&case.to).map(Vec::as_slice).unwrap_or_default();
        let made = by_spi.get(&case.outermost_spi()).map(Vec::as_slice).unwrap_or_default();
        let (sent_count, made_count) = (sent.len(), made.len());
        ensure!(
            sent_count == 3 && made_count == 3,
            "{}: {sent_count} sent, {made_count} seen",
            case.describe()
        );
        for (sequence, (sent, made)) in (case.first..).zip(sent.iter().zip(made)) {
            let shown = || format!("{}, sequence number {sequence}:\n{}", case.describe(), hex(made));
            let opened = oracle.open(&sa, sequence, made).with_context(shown)?;
            let expected = forwarded(sent);
            ensure!(opened == expected, "{}\nopens to\n{}\nnot\n{}", shown(), hex(&opened), hex(&expected));
            // And made again from the same parts it is the same, byte for byte.
            let again = oracle.rebuild(&sa, sequence, &expected, made).with_context(shown)?;
            ensure!(again == *made, "{}\nscapy makes\n{}", shown(), hex(&again));
        }
    }
    checked_by_tshark(cases, &sealed)
}

/// tshark 4.0 knows neither ESN nor every suite; where it knows, it must find every ICV good.
fn checked_by_tshark(cases: &[Case], sealed: &std::path::Path) -> Result<()> {
    let (mut keys, mut expected) = (Vec::new(), Vec::new());
    for case in cases.iter().filter(|case| !case.esn && case.pair.ah.is_none()) {
        let Some((encryption, authentication)) = case.pair.esp.and_then(|suite| suite.tshark) else {
            continue;
        };
        let [key, integrity_key, _] = case.pair.keys.first().context("no keys")?;
        keys.push(EspSa {
            v6: case.pair.outer.0.is_ipv6(),
            spi: case.pair.spis.0,
            encryption,
            key: hex(key),
            authentication,
            authentication_key: hex(integrity_key),
        });
        expected.push(case);
    }
    // The far kernel has no ESP and answers with ICMP that quotes the packets.
    let rows = fields_with_keys(
        sealed,
        &keys,
        "esp && !icmp && !icmpv6",
        &["esp.spi", "esp.icv_good", "esp.icv_bad"],
    )?;
    for case in expected {
        let spi = format!("{:#010x}", case.pair.spis.0);
        let verdicts: Vec<_> = rows.iter().filter(|row| row.first() == Some(&spi)).collect();
        let good = verdicts.iter().filter(|row| row.get(1).is_some_and(|good| good == "1" || good == "True"));
        ensure!(good.count() == 3, "{}: tshark says {verdicts:?}", case.describe());
    }
    Ok(())
}

/// DP-3, DP-4: what the oracle makes.
fn made_by_the_oracle(
    topology: &Topology,
    cases: &[Case],
    oracle: &mut Oracle,
    outer: Family,
    inner: Family,
) -> Result<()> {
    let (_, peer) = topology.outer(outer);
    let near = inside(inner, 1, 10);
    let to = mac(topology.ns("g1")?, "outside")?;
    let from = mac(topology.ns("g2")?, "outside")?;
    let filter = format!("udp port {PORT}");
    let clear = Capture::start(topology.ns("h1")?, "eth0", &filter, &topology.dir().join("opened.pcap"))?;
    let mut expected: HashMap<IpAddr, Vec<Vec<u8>>> = HashMap::new();
    for (index, case) in cases.iter().enumerate() {
        let sa = case.pair.oracle_sa(false, case.esn).context("no algorithms")?;
        let header = ip_header(peer, topology.outer(outer).0, 50, 0)?;
        for number in 0..COUNT {
            let packet = udp((case.to, PORT), (near, PORT), &data(index, number))?;
            let sealed = oracle.seal(&sa, case.first + number, &packet, &header, (4500, 4500))?;
            oracle.send("g1", &ethernet(to, from, &sealed))?;
            expected.entry(case.to).or_default().push(forwarded(&packet));
        }
    }
    let mut received: HashMap<IpAddr, Vec<Vec<u8>>> = HashMap::new();
    for packet in frames(&clear.finish()?)?.iter().filter_map(|frame| frame.get(ETHERNET..)) {
        received
            .entry(outer_header(packet).context("no IP packet")?.source)
            .or_default()
            .push(packet.to_vec());
    }
    for case in cases {
        let (expected, received) = (expected.get(&case.to), received.get(&case.to));
        let shown = |packets: Option<&Vec<Vec<u8>>>| {
            packets.into_iter().flatten().map(|packet| hex(packet)).collect::<Vec<_>>().join("\n")
        };
        let (wanted, got) = (shown(expected), shown(received));
        ensure!(expected == received, "{}: the host got\n{got}\nnot\n{wanted}", case.describe());
    }
    Ok(())
}

/// The SPI of an ESP, AH or encapsulated ESP packet.
fn spi_of(packet: &[u8]) -> Option<u32> {
    let header = outer_header(packet)?;
    let at = match header.protocol {
        50 => header.size,
        51 => header.size + 4,
        17 if packet.get(header.size + 2..header.size + 4)? == 4500_u16.to_be_bytes() => header.size + 8,
        _ => return None,
    };
    Some(u32::from_be_bytes(*packet.get(at..)?.first_chunk()?))
}

/// DP-3, DP-4: tunnel mode, IPv4 in IPv4.
#[test]
fn dp_3_oracle_tunnel_4_in_4() -> Result<()> {
    compare(Family::V4, Family::V4)
}

/// DP-3, DP-4: tunnel mode, IPv6 in IPv6.
#[test]
fn dp_3_oracle_tunnel_6_in_6() -> Result<()> {
    compare(Family::V6, Family::V6)
}

/// DP-3, DP-4: tunnel mode, IPv6 in IPv4.
#[test]
fn dp_3_oracle_tunnel_6_in_4() -> Result<()> {
    compare(Family::V4, Family::V6)
}

/// DP-3, DP-4: tunnel mode, IPv4 in IPv6.
#[test]
fn dp_3_oracle_tunnel_4_in_6() -> Result<()> {
    compare(Family::V6, Family::V4)
}

/// The oracle itself: opens what it sealed and refuses what was changed.
#[test]
fn the_oracle_agrees_with_itself() -> Result<()> {
    let mut oracle = Oracle::start()?;
    let nets = (more_net(Family::V4, 0), more_net(Family::V4, 1));
    let ends: (IpAddr, IpAddr) = ("192.0.2.1".parse()?, "192.0.2.2".parse()?);
    let hosts = (more_inside(Family::V4, 0, 1), more_inside(Family::V4, 1, 1));
    let packet = udp((hosts.0, 1), (hosts.1, 2), b"hello")?;
    for suite in ESP_SUITES {
        let pair = Pair::new(0, Some(suite), None, ends, (&nets.0, &nets.1))?;
        let sa = pair.oracle_sa(true, true).context("no algorithms")?;
        let mut sealed = oracle.seal(&sa, 1 << 32, &packet, &ip_header(ends.0, ends.1, 50, 0)?, (0, 0))?;
        ensure!(oracle.open(&sa, 1 << 32, &sealed)? == packet, "{}", suite.name);
        ensure!(oracle.open(&sa, 1, &sealed).is_err(), "{}: the high half is not covered", suite.name);
        if let Some(byte) = sealed.last_mut() {
            *byte ^= 1;
        }
        ensure!(oracle.open(&sa, 1 << 32, &sealed).is_err(), "{}: a forged packet opens", suite.name);
    }
    Ok(())
}
