//! The blind relay between a client that knows of it and a gateway that does not (RLY-1 to RLY-4, RLY-7, RLY-11).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use std::net::IpAddr;

use common::*;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::relay::{Partition, RelayEntry, RelayError, RelayId, SpiPair};
use postern_contract::request::{Done, Operation, Refusal};
use postern_contract::sa::{DfPolicy, Mode, SaId, UdpEncap};
use postern_contract::{Generation, Translation};
use postern_datapath::testbed::{Layout, Testbed};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{ah, esp, ip4, ip6, udp};
use tempfile::TempDir;

const NATT: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4500 };
/// SPIs between client and relay; those between relay and gateway are `SPI_AB` and its like.
const CLIENT_AB: Spi = Spi(0x7001);
const CLIENT_BA: Spi = Spi(0x7002);
const CLIENT_AH_AB: Spi = Spi(0x7003);
const CLIENT_AH_BA: Spi = Spi(0x7004);

/// What a chain of client, relay and gateway is like.
#[derive(Clone, Copy, Debug)]
struct Chain {
    suite: Suites,
    v6: bool,
    mode: Mode,
    bundle: bool,
    client_encap: Option<UdpEncap>,
    gateway_encap: Option<UdpEncap>,
    df: DfPolicy,
    mtu: u16,
}

const PLAIN: Chain = Chain {
    suite: Suites::Gcm128,
    v6: false,
    mode: Mode::Tunnel,
    bundle: false,
    client_encap: None,
    gateway_encap: None,
    df: DfPolicy::Copy,
    mtu: 1500,
};

/// The relay's addresses towards client and gateway.
fn relay_addresses(v6: bool) -> (IpAddr, IpAddr) {
    if v6 { (ip("2001:db8::10"), ip("2001:db8:1::10")) } else { (ip("192.0.2.10"), ip("198.51.100.10")) }
}

impl Chain {
    fn entry(&self) -> RelayEntry {
        let (client, gateway) = outer(self.v6);
        let (to_client, to_gateway) = relay_addresses(self.v6);
        let esp = !self.suite.is_ah();
        let ah = self.suite.is_ah() || self.bundle;
        let pair = |to_relay, from_relay| SpiPair { to_relay, from_relay };
        // An AH SA alone has the SPIs of the pair, that of a bundle others.
        let (client_ah, gateway_ah) = if self.bundle {
            (pair(CLIENT_AH_AB, CLIENT_AH_BA), pair(AH_SPI_BA, AH_SPI_AB))
        } else {
            (pair(CLIENT_AB, CLIENT_BA), pair(SPI_BA, SPI_AB))
        };
        RelayEntry {
            id: RelayId(1),
            generation: Generation(1),
            client: Partition {
                relay: to_client,
                peer: client,
                encap: self.client_encap,
                esp: esp.then_some(pair(CLIENT_AB, CLIENT_BA)),
                ah: ah.then_some(client_ah),
            },
            gateway: Partition {
                relay: to_gateway,
                peer: gateway,
                encap: self.gateway_encap,
                esp: esp.then_some(pair(SPI_BA, SPI_AB)),
                ah: ah.then_some(gateway_ah),
            },
        }
    }
}

struct World {
    chain: Chain,
    pair: Pair,
    relay: Testbed,
    _state: TempDir,
}

impl World {
    fn new(chain: Chain) -> Self {
        let options = Options {
            outer_v6: chain.v6,
            inner_v6: chain.v6,
            mode: chain.mode,
            bundle: chain.bundle,
            mtu: chain.mtu,
            ..Options::default()
        };
        let (client, gateway) = outer(chain.v6);
        let (to_client, to_gateway) = relay_addresses(chain.v6);
        let pair = Pair::with(chain.suite, options, |operations, is_client| {
            for operation in operations.iter_mut() {
                match operation {
                    Operation::InstallSa(config) if is_client => {
                        let authenticated = config.spi.authenticated;
                        let on_wire = match authenticated {
                            SPI_AB => CLIENT_AB,
                            SPI_BA => CLIENT_BA,
                            AH_SPI_AB => CLIENT_AH_AB,
                            _ => CLIENT_AH_BA,
                        };
                        config.spi = Translation { on_wire, authenticated };
                        config.local = Translation { on_wire: client, authenticated: to_gateway };
                        config.remote = Translation { on_wire: to_client, authenticated: gateway };
                        config.encap = chain.client_encap;
                        config.path.df = chain.df;
                    }
                    // To the gateway the relay is the client, in every respect.
                    Operation::InstallSa(config) => {
                        config.remote = Translation::same(to_gateway);
                        config.encap = chain.gateway_encap;
                        if chain.mode == Mode::Transport {
                            config.selectors[0].remote.start = to_gateway;
                            config.selectors[0].remote.end = to_gateway;
                        }
                    }
                    Operation::InstallPolicy(policy) if !is_client && chain.mode == Mode::Transport => {
                        policy.selectors[0].remote.start = to_gateway;
                        policy.selectors[0].remote.end = to_gateway;
                    }
                    _ => {}
                }
            }
        });
        let state = TempDir::new().unwrap();
        let layout = Layout {
            outside: vec![
                ("192.0.2.10/24".parse().unwrap(), ip("192.0.2.254")),
                ("2001:db8::10/64".parse().unwrap(), ip("2001:db8::fe")),
            ],
            mtu: chain.mtu,
            ..Layout::default()
        };
        let mut relay = Testbed::new(&layout, state.path()).unwrap();
        install(&mut relay, vec![Operation::InstallRelay(chain.entry())]);
        Self { chain, pair, relay, _state: state }
    }

    fn through(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        let (outside, inside) = self.relay.from_outside(packet);
        assert!(inside.is_empty(), "a relay has no inside");
        outside
    }

    /// The packet that the client's host (or the client) sends, and as it arrives; the same for the way back.
    fn packets(&self, to_gateway: bool, payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
        if self.chain.mode == Mode::Tunnel {
            let packet = datagram(self.chain.v6, to_gateway, payload);
            let arrives = routed(&packet, 2);
            return (packet, arrives);
        }
        let udp = if self.chain.v6 { udp6 } else { udp4 };
        let (client, gateway) = outer(self.chain.v6);
        let (_, surrogate) = relay_addresses(self.chain.v6);
        let [client, gateway, surrogate] = [client, gateway, surrogate].map(|address| address.to_string());
        // In transport mode the relay is a router on the packet's own way.
        if to_gateway {
            (udp(&client, &gateway, 5, 6, payload), routed(&udp(&surrogate, &gateway, 5, 6, payload), 1))
        } else {
            (udp(&gateway, &surrogate, 6, 5, payload), routed(&udp(&gateway, &client, 6, 5, payload), 1))
        }
    }
}

/// Bytes that UDP encapsulation adds.
fn overhead(encap: Option<UdpEncap>) -> usize {
    if encap.is_some() { udp::LEN } else { 0 }
}

/// The outermost IPsec header's SPI, and that of ESP under AH; checks the lengths on the way.
fn spis(packet: &[u8]) -> (Spi, Option<Spi>) {
    sound(packet);
    let (protocol, rest) = if packet[0] >> 4 == 4 {
        let view = ip4::View::parse(packet).unwrap();
        (view.protocol(), view.payload())
    } else {
        let view = ip6::View::parse(packet).unwrap();
        (view.next_header(), view.payload())
    };
    match protocol {
        Protocol::UDP => {
            assert_eq!(usize::from(udp::Header::parse(rest).unwrap().length), rest.len());
            (esp::Header::parse(&rest[udp::LEN..]).unwrap().spi, None)
        }
        Protocol::ESP => (esp::Header::parse(rest).unwrap().spi, None),
        _ => {
            let header = ah::Header::parse(rest).unwrap();
            let below =
                esp::Header::parse(&rest[header.len()..]).filter(|_| header.next_header == Protocol::ESP);
            (header.spi, below.map(|below| below.spi))
        }
    }
}

fn addresses(packet: &[u8]) -> (IpAddr, IpAddr) {
    use postern_datapath::header;
    (header::source(packet).unwrap(), header::destination(packet).unwrap())
}

/// Both ways through the relay, with what each side may see.
fn exchange(chain: Chain) {
    let mut world = World::new(chain);
    let (client, gateway) = outer(chain.v6);
    let (to_client, to_gateway) = relay_addresses(chain.v6);
    let expected = |ah, esp| match (chain.bundle, chain.suite.is_ah()) {
        (true, _) => (ah, Some(esp)),
        (false, _) => (esp, None),
    };
    for size in [0, 1, 50, 1000] {
        let name = format!("{chain:?} {size}");
        let (sent, arrives) = world.packets(true, &vec![9; size]);
        let before = world.pair.protect(&sent).remove(0);
        assert_eq!(addresses(&before), (client, to_client), "{name}");
        assert_eq!(spis(&before), expected(CLIENT_AH_AB, CLIENT_AB), "{name}");
        let after = world.through(&before);
        assert_eq!(after.len(), 1, "{name}");
        assert_eq!(addresses(&after[0]), (to_gateway, gateway), "{name}");
        assert_eq!(spis(&after[0]), expected(AH_SPI_AB, SPI_AB), "{name}");
        let grown = after[0].len() + overhead(chain.client_encap);
        assert_eq!(grown, before.len() + overhead(chain.gateway_encap), "RLY-1: not a byte more, {name}");
        assert_eq!(world.pair.open_b(&after[0]), [arrives], "{name}");

        let (sent, arrives) = world.packets(false, &vec![8; size]);
        let before = world.pair.protect_b(&sent).remove(0);
        assert_eq!(addresses(&before), (gateway, to_gateway), "{name}");
        let after = world.through(&before).remove(0);
        assert_eq!(addresses(&after), (to_client, client), "{name}");
        assert_eq!(spis(&after), expected(CLIENT_AH_BA, CLIENT_BA), "{name}");
        assert_eq!(world.pair.open_a(&after), [arrives], "{name}");
    }
    world.pair.clean();
    dropped(&world.relay, DropReason::Malformed, 0);
    assert_eq!(world.relay.publisher.counts(), (0, 0, 1), "RLY-7: the relay has no SA and no policy");
    let page = world.relay.publisher.page(Some(postern_contract::request::Cursor::Relay(None)));
    let counters = &page.relays[0].counters;
    assert_eq!((counters.to_gateway_packets, counters.to_client_packets, counters.wrong_peer), (4, 4, 0));
}

/// RLY-1, RLY-2, RLY-3: ESP, AH, and ESP under AH; tunnel and transport mode; both families.
#[test]
fn rly_1_to_3_every_protocol() {
    for v6 in [false, true] {
        for mode in [Mode::Tunnel, Mode::Transport] {
            for suite in ALL_SUITES {
                exchange(Chain { suite, v6, mode, ..PLAIN });
            }
            for suite in [Suites::Gcm128, Suites::CbcSha1, Suites::NullSha256] {
                exchange(Chain { suite, v6, mode, bundle: true, ..PLAIN });
            }
        }
    }
}

/// RLY-11: UDP encapsulation on one side only, on both, and with other ports.
#[test]
fn rly_11_encapsulation_per_side() {
    let nat = UdpEncap { local_port: 4500, remote_port: 40_000 };
    for v6 in [false, true] {
        for mode in [Mode::Tunnel, Mode::Transport] {
            for (client_encap, gateway_encap) in
                [(Some(NATT), None), (None, Some(NATT)), (Some(NATT), Some(NATT))]
            {
                exchange(Chain { v6, mode, client_encap, gateway_encap, ..PLAIN });
            }
        }
    }
    // A NAT between client and relay: the relay sees another port than the client uses.
    let mut world = World::new(Chain { client_encap: Some(NATT), ..PLAIN });
    let mut entry = PLAIN.entry();
    entry.generation = Generation(2);
    entry.client.encap = Some(nat);
    install(&mut world.relay, vec![Operation::InstallRelay(entry)]);
    let (sent, arrives) = world.packets(true, b"nat");
    let mut before = world.pair.protect(&sent).remove(0);
    before[20..22].copy_from_slice(&40_000u16.to_be_bytes());
    let after = world.through(&before).remove(0);
    assert_eq!(world.pair.open_b(&after), [arrives]);
    let (sent, _) = world.packets(false, b"nat");
    let before = world.pair.protect_b(&sent).remove(0);
    let after = world.through(&before).remove(0);
    let ports = udp::Header::parse(&after[20..]).unwrap();
    assert_eq!((ports.source_port, ports.destination_port), (4500, 40_000));
}

/// RLY-1: an SPI alone opens nothing: address, port and encapsulation must be the partition's.
#[test]
fn rly_1_wrong_peer() {
    let mut world = World::new(Chain { client_encap: Some(NATT), ..PLAIN });
    let (sent, _) = world.packets(true, b"x");
    let good = world.pair.protect(&sent).remove(0);
    let (client, _) = outer(false);
    let (to_client, to_gateway) = relay_addresses(false);
    let datagram = |from: u16, to| in_udp(from, to, &good[28..]);
    let from = |source, payload: &[u8]| ip_packet(source, to_client, Protocol::UDP, 0, payload);
    for (packet, reason) in [
        (from(ip("192.0.2.3"), &datagram(4500, 4500)), DropReason::RelayWrongPeer),
        (from(client, &datagram(4501, 4500)), DropReason::RelayWrongPeer),
        (ip_packet(client, to_client, Protocol::ESP, 0, &good[28..]), DropReason::WrongEncapsulation),
        // The right SPI at the relay's other address, and the gateway's SPI at this one.
        (ip_packet(client, to_gateway, Protocol::UDP, 0, &datagram(4500, 4500)), DropReason::UnknownSpi),
    ] {
        let before = world.relay.drops(reason);
        assert!(world.through(&packet).is_empty(), "{}", reason.label());
        assert_eq!(world.relay.drops(reason), before + 1, "{}", reason.label());
    }
    conserved(&world.relay);
    let page = world.relay.publisher.page(Some(postern_contract::request::Cursor::Relay(None)));
    assert_eq!(page.relays[0].counters.wrong_peer, 2);
    assert_eq!(page.relays[0].counters.to_gateway_packets, 0);
    assert_eq!(world.through(&good).len(), 1);
}

/// RLY-3: a bundle's entry takes bundles only, with both SPIs, and an entry for AH takes no ESP under it.
#[test]
fn rly_3_bundles_are_whole() {
    let mut world = World::new(Chain { bundle: true, ..PLAIN });
    let (sent, _) = world.packets(true, b"x");
    let good = world.pair.protect(&sent).remove(0);
    let (client, _) = outer(false);
    let (to_client, _) = relay_addresses(false);
    let refused = |world: &mut World, packet: &[u8], reason: DropReason| {
        let before = world.relay.drops(reason);
        assert!(world.through(packet).is_empty());
        assert_eq!(world.relay.drops(reason), before + 1, "{}", reason.label());
        conserved(&world.relay);
    };
    // The ESP packet alone, another ESP SPI, AH without ESP under it, AH with nothing under it.
    refused(&mut world, &ip_packet(client, to_client, Protocol::ESP, 0, &good[48..]), DropReason::UnknownSpi);
    let mut other = good.clone();
    other[51] ^= 1;
    refused(&mut world, &other, DropReason::UnknownSpi);
    let mut without = good.clone();
    without[20] = 17;
    refused(&mut world, &without, DropReason::BundleMissing);
    let mut cut = good.clone();
    cut.truncate(48);
    ip4::set_total_len(&mut cut, 48).unwrap();
    refused(&mut world, &cut, DropReason::Malformed);
    assert_eq!(world.through(&good).len(), 1);

    let mut world = World::new(Chain { suite: Suites::AhSha256, ..PLAIN });
    let (sent, _) = world.packets(true, b"x");
    let mut with = world.pair.protect(&sent).remove(0);
    with[20] = 50;
    refused(&mut world, &with, DropReason::BundleMissing);
}

/// RLY-2: "the ICV covers the SPI (ESP) or SPI and addresses (AH)": without the client's part in it the gateway refuses.
#[test]
fn rly_2_translation_needs_the_client() {
    for suite in [Suites::Gcm128, Suites::AhSha256] {
        let mut world = World::new(Chain { suite, ..PLAIN });
        let mut operations = Vec::new();
        for id in [A_OUT, A_IN] {
            operations.push(Operation::RemoveSa(id));
        }
        install(&mut world.pair.a, operations);
        let options = Options::default();
        let mut operations = side(suite, &options, true);
        let (to_client, _) = relay_addresses(false);
        for (id, spi) in [(A_OUT, CLIENT_AB), (A_IN, CLIENT_BA)] {
            let config = sa(&mut operations, id);
            config.spi = Translation::same(spi);
            config.remote = Translation::same(to_client);
        }
        operations.truncate(2);
        install(&mut world.pair.a, operations);
        let (sent, _) = world.packets(true, b"x");
        let before = world.pair.protect(&sent).remove(0);
        let after = world.through(&before).remove(0);
        assert!(world.pair.open_b(&after).is_empty());
        dropped(&world.pair.b, DropReason::BadIcv, 1);
    }
}

/// RLY-1: a hop is a hop: the TTL goes down, and a packet whose TTL runs out ends here.
#[test]
fn rly_1_ttl() {
    for v6 in [false, true] {
        let mut world = World::new(Chain { v6, ..PLAIN });
        let (sent, _) = world.packets(true, b"x");
        let before = world.pair.protect(&sent).remove(0);
        let at = if v6 { 7 } else { 8 };
        let after = world.through(&before).remove(0);
        assert_eq!(after[at], before[at] - 1);
        let last = routed(&before, 63);
        assert!(world.through(&last).is_empty());
        dropped(&world.relay, DropReason::TtlExpired, 1);
    }
}

/// RLY-11: what encapsulation makes too large for the next link is fragmented if it may be, else counted.
#[test]
fn rly_11_encapsulation_may_not_fit() {
    for (df, v6, pieces) in [(DfPolicy::Clear, false, 2), (DfPolicy::Set, false, 0), (DfPolicy::Set, true, 0)]
    {
        let mut world = World::new(Chain { gateway_encap: Some(NATT), df, v6, mtu: 1400, ..PLAIN });
        // The largest inner packet that fits without encapsulation.
        let headers = if v6 { 40 + 34 + 48 } else { 20 + 34 + 28 };
        let (sent, _) = world.packets(true, &vec![1; 1400 - headers - 2]);
        let before = world.pair.protect(&sent).remove(0);
        assert!(before.len() > 1392, "{}", before.len());
        let after = world.through(&before);
        assert_eq!(after.len(), pieces);
        dropped(&world.relay, DropReason::EgressMtu, u64::from(pieces == 0));
        if pieces == 2 {
            let mut joined = after[0].clone();
            joined.extend(&after[1][20..]);
            let len = joined.len();
            ip4::set_total_len(&mut joined, len).unwrap();
            ip4::set_fragment(&mut joined, None, 0, false).unwrap();
            assert_eq!(world.pair.open_b(&joined).len(), 1);
        }
    }
}

/// RLY-4: entries come, change and go; counters go on.
#[test]
fn rly_4_entries() {
    let mut world = World::new(PLAIN);
    let apply = |world: &mut World, operation| world.relay.apply(vec![operation]).remove(0);
    let entry = PLAIN.entry();
    assert_eq!(apply(&mut world, Operation::InstallRelay(entry)), Ok(Done::Already));
    let stale = RelayEntry { generation: Generation(0), ..entry };
    assert_eq!(apply(&mut world, Operation::InstallRelay(stale)), Err(Refusal::Stale(Generation(1))));
    let (sent, _) = world.packets(true, b"x");
    let packet = world.pair.protect(&sent).remove(0);
    assert_eq!(world.through(&packet).len(), 1);
    // Another client-side SPI: the old one leads nowhere.
    let mut moved = RelayEntry { generation: Generation(2), ..entry };
    moved.client.esp = Some(SpiPair { to_relay: Spi(0x7777), from_relay: CLIENT_BA });
    assert_eq!(apply(&mut world, Operation::InstallRelay(moved)), Ok(Done::Applied));
    assert!(world.through(&packet).is_empty());
    dropped(&world.relay, DropReason::UnknownSpi, 1);
    let mut renamed = packet.clone();
    renamed[20..24].copy_from_slice(&0x7777u32.to_be_bytes());
    assert_eq!(world.through(&renamed).len(), 1);
    let page = world.relay.publisher.page(Some(postern_contract::request::Cursor::Relay(None)));
    assert_eq!(page.relays[0].counters.to_gateway_packets, 2);
    // A second entry at the same address must have other SPIs, on both sides.
    let second = |client: u32, gateway: u32| {
        let mut entry = RelayEntry { id: RelayId(2), ..entry };
        entry.client.esp = Some(SpiPair { to_relay: Spi(client), from_relay: CLIENT_BA });
        entry.gateway.esp = Some(SpiPair { to_relay: Spi(gateway), from_relay: SPI_AB });
        Operation::InstallRelay(entry)
    };
    assert_eq!(apply(&mut world, second(0x7777, 0x8002)), Err(Refusal::SpiTaken(Spi(0x7777))));
    assert_eq!(apply(&mut world, second(0x8001, SPI_BA.0)), Err(Refusal::SpiTaken(SPI_BA)));
    assert_eq!(apply(&mut world, second(0x8001, 0x8002)), Ok(Done::Applied));
    assert_eq!(apply(&mut world, Operation::RemoveRelay(RelayId(1))), Ok(Done::Applied));
    assert_eq!(apply(&mut world, Operation::RemoveRelay(RelayId(1))), Ok(Done::Already));
    assert!(world.through(&renamed).is_empty());
    assert_eq!(world.relay.publisher.counts(), (0, 0, 1));
    renamed[20..24].copy_from_slice(&0x8001u32.to_be_bytes());
    assert_eq!(world.through(&renamed).len(), 1, "the second entry stands");
    // Both partitions at one address need SPIs of their own too.
    let mut one_armed = RelayEntry { id: RelayId(3), ..entry };
    one_armed.gateway.relay = one_armed.client.relay;
    one_armed.gateway.esp = one_armed.client.esp;
    assert_eq!(apply(&mut world, Operation::InstallRelay(one_armed)), Err(Refusal::SpiTaken(CLIENT_AB)));
    let mut family = RelayEntry { id: RelayId(3), ..entry };
    family.gateway.peer = ip("2001:db8::1");
    assert_eq!(apply(&mut world, Operation::InstallRelay(family)), Err(Refusal::Relay(RelayError::Family)));
    conserved(&world.relay);
}

/// RLY-9: one address on both sides, sessions told apart by SPI.
#[test]
fn rly_9_one_shared_address() {
    let mut world = World::new(PLAIN);
    let shared = ip("192.0.2.10");
    let mut entry = PLAIN.entry();
    (entry.generation, entry.gateway.relay) = (Generation(2), shared);
    install(&mut world.relay, vec![Operation::InstallRelay(entry)]);
    let (sent, arrives) = world.packets(true, b"x");
    let before = world.pair.protect(&sent).remove(0);
    let after = world.through(&before).remove(0);
    assert_eq!(addresses(&after).0, shared);
    assert_eq!(world.pair.open_b(&after), [arrives]);
}

/// RLY-1: a node can be gateway and relay at once, as long as an SPI means one thing.
#[test]
fn rly_1_relay_and_gateway_in_one() {
    let mut world = World::new(PLAIN);
    let mut operations = side(Suites::Gcm256, &Options::default(), false);
    sa(&mut operations, A_IN).spi = Translation::same(CLIENT_AB);
    let mut results = world.relay.apply(operations);
    assert_eq!(results.remove(0), Err(Refusal::SpiTaken(CLIENT_AB)));
    let mut operations = side(Suites::Gcm256, &Options::default(), false);
    (sa(&mut operations, A_IN).spi, sa(&mut operations, A_IN).id) = (Translation::same(Spi(0x6001)), SaId(9));
    operations.truncate(1);
    install(&mut world.relay, operations);
    let mut entry = RelayEntry { id: RelayId(2), ..PLAIN.entry() };
    entry.client.esp = Some(SpiPair { to_relay: Spi(0x6001), from_relay: CLIENT_BA });
    entry.gateway.esp = Some(SpiPair { to_relay: Spi(0x6002), from_relay: SPI_AB });
    let result = world.relay.apply(vec![Operation::InstallRelay(entry)]).remove(0);
    assert_eq!(result, Err(Refusal::SpiTaken(Spi(0x6001))));
    let (sent, _) = world.packets(true, b"x");
    let packet = world.pair.protect(&sent).remove(0);
    assert_eq!(world.through(&packet).len(), 1);
}

/// MOB-2 behind a relay: what the client follows is the relay's address on the wire, never the gateway's.
#[test]
fn mob_2_the_relay_moves() {
    for (suite, bundle) in [(Suites::Gcm128, false), (Suites::AhSha256, false), (Suites::Gcm128, true)] {
        let mut world = World::new(Chain { suite, bundle, ..PLAIN });
        let mut operations = Vec::new();
        for id in [A_IN, A_AH_IN] {
            let mut all = side(suite, &Options { bundle: true, ..Options::default() }, true);
            if id == A_AH_IN && !bundle {
                continue;
            }
            let report = world.pair.a.publisher.sa(id).unwrap();
            let mut config = std::mem::replace(sa(&mut all, id), *dummy());
            (config.generation, config.follow_peer) = (Generation(2), true);
            (config.spi, config.local, config.remote) = (report.spi, report.local, report.remote);
            config.bundle = config.bundle.filter(|_| bundle);
            operations.push(Operation::InstallSa(Box::new(config)));
        }
        install(&mut world.pair.a, operations);
        // From where the client expects it: nothing moves.
        let (sent, arrives) = world.packets(false, b"x");
        let through = |world: &mut World, sent: &[u8]| {
            let before = world.pair.protect_b(sent).remove(0);
            world.through(&before).remove(0)
        };
        let after = through(&mut world, &sent);
        assert_eq!(world.pair.open_a(&after), std::slice::from_ref(&arrives));
        assert_eq!(world.pair.a.events(), [], "{suite:?} {bundle}");
        // The relay has another address from now on.
        let mut after = through(&mut world, &sent);
        let (to, from) =
            (ip4::View::parse(&after).unwrap().destination(), std::net::Ipv4Addr::new(192, 0, 2, 99));
        ip4::set_addresses(&mut after, from, to).unwrap();
        assert_eq!(world.pair.open_a(&after), [arrives], "{suite:?} {bundle}");
        let events = world.pair.a.events();
        assert!(events.contains(&Event::NewPath { sa: A_IN, remote: from.into(), port: None }), "{events:?}");
        let (sent, _) = world.packets(true, b"x");
        let out = world.pair.protect(&sent).remove(0);
        assert_eq!(addresses(&out), (outer(false).0, from.into()));
        assert_eq!(spis(&out).0, if bundle { CLIENT_AH_AB } else { CLIENT_AB });
    }
}

/// Something to leave in the place of a configuration that was taken.
fn dummy() -> Box<postern_contract::sa::SaConfig> {
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    match operations.remove(0) {
        Operation::InstallSa(config) => config,
        other => panic!("{other:?}"),
    }
}
