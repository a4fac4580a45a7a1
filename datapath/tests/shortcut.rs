//! The relay in the XDP program: byte for byte what a worker does, in the kernel as in user space (RLY-1 to RLY-3), and what
//! it leaves to the worker.
//!
//! The tests with the kernel need root (CAP_BPF, CAP_NET_ADMIN) and fail without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;

use aya::maps::{Array, DevMap, HashMap as BpfHashMap, PerCpuArray};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use postern_contract::Generation;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::request::Operation;
use postern_contract::sa::UdpEncap;
use postern_datapath::fib::{Fib, PortIndex};
use postern_datapath::relay::express::{Change, Express, Key};
use postern_datapath::steer::OBJECT;
use postern_datapath::testbed::{self, INSIDE, Layout, NEIGHBOUR_MAC, OUTSIDE, OUTSIDE_MAC, Testbed};
use postern_steer_maps::{Hop, Relay, RelayKey, Settings, Traffic, name};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::steer::{Classified, Link, classify};
use postern_wire::translate::{Address, Kind, Place};
use postern_wire::{ip4, ip6, udp};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tempfile::TempDir;

const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// What an entry is like.
#[derive(Clone, Copy, Debug)]
struct Shape {
    v6: bool,
    esp: bool,
    ah: bool,
    /// UDP encapsulation towards the client and towards the gateway.
    encap: [bool; 2],
    /// The gateway is on the inside, so that packets leave by the other port.
    across: bool,
}

impl Shape {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for bits in 0..8 {
            let [v6, across, both] = [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
            let plain = Self { v6, across, esp: true, ah: false, encap: [both; 2] };
            all.push(plain);
            all.push(Self { ah: true, encap: [false; 2], esp: both, ..plain });
        }
        all
    }

    fn encap(self, side: usize) -> Option<UdpEncap> {
        let ports = [
            UdpEncap { local_port: 4500, remote_port: 61_234 },
            UdpEncap { local_port: 4500, remote_port: 4500 },
        ];
        self.encap[side].then_some(ports[side])
    }

    fn entry(self, spis: [u32; 8]) -> RelayEntry {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let addresses = if self.v6 {
            [
                "2001:db8::1",
                "2001:db8:77::5",
                "fd01::1",
                if self.across { "fd01::2" } else { "2001:db8:88::6" },
            ]
        } else {
            ["192.0.2.1", "203.0.113.5", "10.1.0.1", if self.across { "10.1.0.2" } else { "198.51.100.6" }]
        };
        let [relay_c, peer_c, relay_g, peer_g] = addresses.map(ip);
        let pair =
            |at: usize| SpiPair { to_relay: Spi(spis[at] | 0x100), from_relay: Spi(spis[at + 1] | 0x100) };
        let partition = |relay, peer, side: usize| Partition {
            relay,
            peer,
            encap: self.encap(side),
            esp: self.esp.then(|| pair(side * 4)),
            ah: self.ah.then(|| pair(side * 4 + 2)),
        };
        RelayEntry {
            id: RelayId(1),
            generation: Generation(1),
            client: partition(relay_c, peer_c, 0),
            gateway: partition(relay_g, peer_g, 1),
        }
    }
}

/// A packet that an entry's client or gateway sends.
fn packet(from: &Partition, ttl: u8, body: &[u8]) -> Vec<u8> {
    let esp = from.esp.map(|pair| [&pair.to_relay.0.to_be_bytes()[..], &[0, 0, 0, 9], body].concat());
    let (protocol, upper) = match (from.ah, from.encap) {
        (Some(pair), _) => {
            let (next, below) = esp.map_or((4, body.to_vec()), |esp| (50, esp));
            let head = [next, 4, 0, 0];
            (
                Protocol::AH,
                [&head[..], &pair.to_relay.0.to_be_bytes(), &[0, 0, 0, 7], &[0xcc; 12], &below].concat(),
            )
        }
        (None, None) => (Protocol::ESP, esp.unwrap()),
        (None, Some(encap)) => {
            let mut datagram = [&[0; 8][..], &esp.unwrap()].concat();
            let header = udp::Header {
                source_port: encap.remote_port,
                destination_port: encap.local_port,
                length: u16::try_from(datagram.len()).unwrap(),
                checksum: 0,
            };
            header.emit(&mut datagram).unwrap();
            let check = match (from.peer, from.relay) {
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    udp::checksum_v6(source, destination, &datagram)
                }
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    udp::checksum_v4(source, destination, &datagram)
                }
                _ => unreachable!(),
            };
            datagram[6..8].copy_from_slice(&check.to_be_bytes());
            (Protocol::UDP, datagram)
        }
    };
    match (from.peer, from.relay) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = [vec![0; 20], upper.clone()].concat();
            let header =
                ip4::Header { source, destination, protocol, ttl, tos: 0x2e, id: 77, dont_fragment: true };
            header.emit(&mut packet, upper.len()).unwrap();
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = [vec![0; 40], upper.clone()].concat();
            let header = ip6::Header {
                source,
                destination,
                next_header: protocol,
                hop_limit: ttl,
                traffic_class: 0x2e,
                flow_label: 0x12345,
            };
            header.emit(&mut packet, upper.len()).unwrap();
            packet
        }
        _ => unreachable!(),
    }
}

/// The maps of the program, with the steps that it takes over them.
#[derive(Default)]
struct Model {
    v4: HashMap<RelayKey<[u8; 4]>, Relay<[u8; 4]>>,
    v6: HashMap<RelayKey<[u8; 16]>, Relay<[u8; 16]>>,
    hops: HashMap<u32, Hop>,
}

impl Model {
    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::PutV4(key, value) => drop(self.v4.insert(key, value)),
                Change::PutV6(key, value) => drop(self.v6.insert(key, value)),
                Change::Take(Key::V4(key)) => assert!(self.v4.remove(&key).is_some(), "taken twice"),
                Change::Take(Key::V6(key)) => assert!(self.v6.remove(&key).is_some(), "taken twice"),
                Change::Hop(index, hop) => {
                    let used = self
                        .v4
                        .values()
                        .map(|value| value.hop)
                        .chain(self.v6.values().map(|value| value.hop));
                    assert!(!used.into_iter().any(|hop| hop == index), "a hop in use was changed");
                    self.hops.insert(index, hop);
                }
                Change::Clear(slot) => {
                    let slots = self
                        .v4
                        .values()
                        .map(|value| value.slot)
                        .chain(self.v6.values().map(|value| value.slot));
                    assert!(!slots.into_iter().any(|used| used == slot), "a slot in use was cleared");
                }
            }
        }
    }

    /// Translates a frame; says by which port it leaves and where it was counted.
    fn run(&self, frame: &mut [u8]) -> Option<(u32, u32)> {
        let found = classify(&*frame, Link::Ethernet);
        if found.v6 { self.step(&self.v6, frame, found) } else { self.step(&self.v4, frame, found) }
    }

    fn step<A: Address + Hash>(
        &self,
        table: &HashMap<RelayKey<A>, Relay<A>>,
        frame: &mut [u8],
        found: Classified,
    ) -> Option<(u32, u32)> {
        let kind = Kind::of(found.class)?;
        let Place { destination, spi, length } = Place::<A>::of(frame, &found, kind)?;
        let relay = table.get(&RelayKey { destination, spi, kind: kind as u32 })?;
        let hop = self.hops[&relay.hop];
        if u32::from(length) > hop.mtu {
            return None;
        }
        let before = frame.to_vec();
        if relay.rule.apply(frame, kind).is_none() {
            assert_eq!(frame, before, "refused, but changed");
            return None;
        }
        frame[..6].copy_from_slice(&hop.destination);
        frame[6..12].copy_from_slice(&hop.source);
        Some((hop.port, relay.slot))
    }
}

fn express(entry: &RelayEntry, fib: &Fib) -> (Express, Vec<Change>) {
    let mut express = Express::new(4);
    assert!(express.set_usable([OUTSIDE, INSIDE].into()));
    let changes = express.put(entry, fib, 1);
    (express, changes)
}

/// What is done to a packet on its way.
#[derive(Clone, Debug)]
enum Damage {
    None,
    /// A byte, counted from the IP header, is another one.
    Byte(usize, u8),
    /// The same, and the IPv4 header's checksum is right again.
    Header(usize, u8),
    /// Ethernet padding.
    Padding(usize),
    /// The last bytes are missing.
    Cut(usize),
    /// The UDP checksum is missing.
    NoChecksum,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => Just(Damage::None),
        4 => (0usize..90, any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        4 => (0usize..20, any::<u8>()).prop_map(|(at, byte)| Damage::Header(at, byte)),
        1 => (1usize..20).prop_map(Damage::Padding),
        1 => (1usize..20).prop_map(Damage::Cut),
        1 => Just(Damage::NoChecksum),
    ]
}

fn damaged(mut packet: Vec<u8>, damage: &Damage) -> Vec<u8> {
    match damage {
        Damage::None => {}
        Damage::Byte(at, byte) | Damage::Header(at, byte) => {
            if let Some(place) = packet.get_mut(*at) {
                *place = *byte;
            }
        }
        Damage::Padding(count) => packet.extend(vec![0xee; *count]),
        Damage::Cut(count) => packet.truncate(packet.len() - count),
        Damage::NoChecksum => {
            let at = if packet[0] >> 4 == 6 { 40 } else { 20 };
            packet[at + 6..at + 8].fill(0);
        }
    }
    if matches!(damage, Damage::Header(..)) && packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let check = postern_wire::checksum::finish(postern_wire::checksum::sum(&packet[..20]));
        packet[10..12].copy_from_slice(&check.to_be_bytes());
    }
    packet
}

fn cases() -> impl Strategy<Value = (Shape, [u32; 8], bool, u8, Vec<u8>, Damage)> {
    (
        prop::sample::select(Shape::all()),
        any::<[u32; 8]>(),
        any::<bool>(),
        prop_oneof![3 => Just(64u8), 1 => any::<u8>()],
        prop::collection::vec(any::<u8>(), 30..120),
        damage(),
    )
}

fn distinct(spis: &[u32; 8]) -> bool {
    let mut spis = spis.map(|spi| spi | 0x100);
    spis.sort_unstable();
    spis.windows(2).all(|pair| pair[0] != pair[1])
}

struct Case {
    entry: RelayEntry,
    packet: Vec<u8>,
}

fn case(shape: Shape, spis: [u32; 8], back: bool, ttl: u8, body: &[u8], damage: &Damage) -> Case {
    let entry = shape.entry(spis);
    let from = if back { &entry.gateway } else { &entry.client };
    let packet = damaged(packet(from, ttl, body), damage);
    Case { entry, packet }
}

/// RLY-1, RLY-2, RLY-3: whatever the short cut translates leaves the worker as the same bytes by the same port, is counted
/// the same, and is no packet that the worker drops; what is usual, it translates.
#[test]
fn rly_1_short_cut_and_worker_do_the_same() {
    let mut runner = TestRunner::new(Config { cases: 1500, ..Config::default() });
    let done = RefCell::new(HashMap::<(bool, bool, bool), u32>::new());
    let layout = Layout::default();
    let state = TempDir::new().unwrap();
    let worker = RefCell::new(Testbed::new(&layout, state.path()).unwrap());
    let generation = RefCell::new(1);
    runner
        .run(&cases(), |(shape, spis, back, ttl, body, damage)| {
            prop_assume!(distinct(&spis));
            let Case { mut entry, packet } = case(shape, spis, back, ttl, &body, &damage);
            *generation.borrow_mut() += 1;
            entry.generation = Generation(*generation.borrow());
            let mut model = Model::default();
            let (short_cut, changes) = express(&entry, &testbed::fib(&layout));
            model.apply(changes);
            prop_assert_eq!(short_cut.placed(), 1);

            let mut frame = testbed::frame(OUTSIDE_MAC, &packet);
            let went = model.run(&mut frame);
            let usual = matches!(damage, Damage::None) && ttl > 1;
            prop_assert!(went.is_some() || !usual, "the worker has to do what is usual: {packet:x?}");
            let Some((port, slot)) = went else { return Ok(()) };
            *done.borrow_mut().entry((shape.v6, shape.ah, shape.encap[0])).or_default() += 1;

            let mut worker = worker.borrow_mut();
            let (before, balance) = (worker.all_drops(), worker.balance());
            prop_assert!(worker.apply(vec![Operation::InstallRelay(entry)]).iter().all(Result::is_ok));
            worker.push(OUTSIDE, &packet);
            worker.settle();
            let (outside, inside) = (worker.outside[0].take_all(), worker.inside[0].take_all());
            prop_assert_eq!(worker.all_drops(), before);
            prop_assert_eq!(worker.balance().0, balance.0 + 1);
            let (expected_outside, expected_inside) =
                if port == 0 { (vec![frame], vec![]) } else { (vec![], vec![frame]) };
            prop_assert_eq!(outside, expected_outside);
            prop_assert_eq!(inside, expected_inside);
            let direction = usize::from(back);
            prop_assert_eq!(Some(slot), short_cut.slots(entry.id).map(|slots| slots[direction]));
            Ok(())
        })
        .unwrap();
    // AH alone and bundles count together; they are not encapsulated.
    let done = done.into_inner();
    for v6 in [false, true] {
        for (ah, encap) in [(false, false), (false, true), (true, false)] {
            let count = done.get(&(v6, ah, encap)).copied().unwrap_or(0);
            assert!(count > 50, "v6 {v6}, AH {ah}, encapsulated {encap}: {count} packets");
        }
    }
}

/// The program in the kernel, attached to nothing.
struct Program(Ebpf);

impl Program {
    fn load() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test loads an XDP program: run it as root");
        let mut loader = EbpfLoader::new();
        for map in [name::RELAY_V4, name::RELAY_V6, name::RELAY_TRAFFIC] {
            loader.map_max_entries(map, 8);
        }
        let mut ebpf = loader.load(OBJECT).expect("maps");
        xdp(&mut ebpf).load().expect("the verifier refuses the program");
        let mut program = Self(ebpf);
        let settings = Settings { flags: Settings::OUTSIDE | Settings::RELAY, ..Settings::default() };
        let mut map: Array<_, Settings> = program.0.map_mut(name::SETTINGS).unwrap().try_into().unwrap();
        map.set(0, settings, 0).unwrap();
        let mut ports: DevMap<_> = program.0.map_mut(name::RELAY_PORTS).unwrap().try_into().unwrap();
        // Nothing is sent in a test run: any interface will do.
        ports.set(1, 1, None, 0).unwrap();
        program
    }

    fn put(&mut self, model: &Model) {
        let mut v4: BpfHashMap<_, RelayKey<[u8; 4]>, Relay<[u8; 4]>> =
            self.0.map_mut(name::RELAY_V4).unwrap().try_into().unwrap();
        let old: Vec<_> = v4.keys().map(Result::unwrap).collect();
        for key in &old {
            v4.remove(key).unwrap();
        }
        model.v4.iter().for_each(|(key, value)| v4.insert(key, value, 0).unwrap());
        let mut v6: BpfHashMap<_, RelayKey<[u8; 16]>, Relay<[u8; 16]>> =
            self.0.map_mut(name::RELAY_V6).unwrap().try_into().unwrap();
        let old: Vec<_> = v6.keys().map(Result::unwrap).collect();
        for key in &old {
            v6.remove(key).unwrap();
        }
        model.v6.iter().for_each(|(key, value)| v6.insert(key, value, 0).unwrap());
        let mut hops: Array<_, Hop> = self.0.map_mut(name::RELAY_HOPS).unwrap().try_into().unwrap();
        model.hops.iter().for_each(|(index, hop)| hops.set(*index, hop, 0).unwrap());
    }

    fn run(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut out = vec![0xa5; frame.len() + 64];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let result = xdp(&mut self.0).test_run(options).expect("BPF_PROG_TEST_RUN");
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        (result.return_value, out)
    }

    fn traffic(&self, map: &str, index: u32) -> Traffic {
        let map: PerCpuArray<_, Traffic> = self.0.map(map).unwrap().try_into().unwrap();
        let values = map.get(&index, 0).unwrap();
        values.iter().fold(Traffic::default(), |sum, one| Traffic {
            packets: sum.packets + one.packets,
            bytes: sum.bytes + one.bytes,
        })
    }
}

fn xdp(ebpf: &mut Ebpf) -> &mut Xdp {
    ebpf.program_mut(name::PROGRAM).unwrap().try_into().unwrap()
}

/// RLY-1, RLY-2, RLY-3: the program in the kernel translates what user space's run of the same code translates, writes the
/// same bytes and counts them; all else it leaves as it was.
#[test]
fn rly_1_program_translates_as_user_space_does() {
    let program = RefCell::new(Program::load());
    let mut runner = TestRunner::new(Config { cases: 3000, ..Config::default() });
    let fib = testbed::fib(&Layout::default());
    let done = RefCell::new(0);
    runner
        .run(&cases(), |(shape, spis, back, ttl, body, damage)| {
            prop_assume!(distinct(&spis));
            let Case { entry, packet } = case(shape, spis, back, ttl, &body, &damage);
            let mut program = program.borrow_mut();
            let mut model = Model::default();
            model.apply(express(&entry, &fib).1);
            program.put(&model);
            let frame = testbed::frame(OUTSIDE_MAC, &packet);
            // The kernel takes no shorter frame in a test run.
            prop_assume!(frame.len() >= 14);
            let mut expected = frame.clone();
            let went = model.run(&mut expected);
            let slot = went.map_or(0, |(_, slot)| slot);
            let before = (
                program.traffic(name::RELAY_TRAFFIC, slot),
                program.traffic(name::RELAY_SENT, 0),
                program.traffic(name::RELAY_SENT, 1),
            );
            let (action, out) = program.run(&frame);
            let after = (
                program.traffic(name::RELAY_TRAFFIC, slot),
                program.traffic(name::RELAY_SENT, 0),
                program.traffic(name::RELAY_SENT, 1),
            );
            prop_assert_eq!(&out, &expected);
            match went {
                None => {
                    prop_assert!(action != XDP_TX && action != XDP_REDIRECT, "action {}", action);
                    prop_assert_eq!(before, after);
                }
                Some((port, _)) => {
                    *done.borrow_mut() += 1;
                    prop_assert_eq!(action, if port == 0 { XDP_TX } else { XDP_REDIRECT });
                    let bytes = frame.len() as u64;
                    let one = |before: Traffic, bytes| Traffic {
                        packets: before.packets + 1,
                        bytes: before.bytes + bytes,
                    };
                    let sent = if port == 0 {
                        (one(before.1, bytes), before.2)
                    } else {
                        (before.1, one(before.2, bytes))
                    };
                    prop_assert_eq!(after, (one(before.0, bytes - 14), sent.0, sent.1));
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(done.into_inner() > 1000);
}

/// RLY-11: what would change its length is no short cut's; the worker keeps the entry.
#[test]
fn rly_11_one_sided_encapsulation_stays_with_the_worker() {
    let shape = Shape { v6: false, esp: true, ah: false, encap: [true, false], across: false };
    let (express, changes) =
        express(&shape.entry([1, 2, 3, 4, 5, 6, 7, 8]), &testbed::fib(&Layout::default()));
    assert_eq!((express.placed(), changes), (0, Vec::new()));
}

/// RLY-1: a packet that is larger than the next link takes is the worker's.
#[test]
fn rly_1_too_big_is_the_workers() {
    let shape = Shape { v6: false, esp: true, ah: false, encap: [false; 2], across: true };
    let entry = shape.entry([1, 2, 3, 4, 5, 6, 7, 8].map(|spi| spi << 9));
    let mut model = Model::default();
    model.apply(express(&entry, &testbed::fib(&Layout::default())).1);
    let mut program = Program::load();
    program.put(&model);
    for (length, goes) in [(1500, true), (1501, false)] {
        let frame = testbed::frame(OUTSIDE_MAC, &packet(&entry.client, 64, &vec![7; length - 28]));
        assert_eq!(program.run(&frame).0 == XDP_REDIRECT, goes, "{length} bytes");
        assert_eq!(model.run(&mut frame.clone()).is_some(), goes);
    }
}

/// RLY-1: without a neighbour, or where the port takes no frames from XDP, an entry is the workers', and comes back.
#[test]
fn rly_1_follows_routes_and_ports() {
    let shape = Shape { v6: true, esp: true, ah: false, encap: [false; 2], across: true };
    let entry = shape.entry([1, 2, 3, 4, 5, 6, 7, 8].map(|spi| spi << 9));
    let known = testbed::fib(&Layout::default());
    let mut model = Model::default();
    let (mut express, changes) = express(&entry, &known);
    model.apply(changes);
    assert_eq!((model.v6.len(), express.placed()), (2, 1));

    let unknown = testbed::fib(&Layout { inside_hosts: Vec::new(), ..Layout::default() });
    model.apply(express.refresh(&unknown, 2));
    assert_eq!((model.v6.len(), express.placed()), (1, 0), "only the way to the gateway is closed");
    assert!(express.refresh(&unknown, 2).is_empty());
    model.apply(express.refresh(&known, 3));
    assert_eq!((model.v6.len(), express.placed()), (2, 1));

    assert!(express.set_usable([OUTSIDE].into()));
    model.apply(express.refresh(&known, 4));
    assert_eq!(model.v6.len(), 1);
    assert!(express.set_usable([OUTSIDE, INSIDE].into()));
    model.apply(express.refresh(&known, 5));
    assert_eq!(model.v6.len(), 2);

    // The gateway moves behind the default route (RLY-10): one hop serves both ways then.
    let moved = RelayEntry {
        gateway: Partition { peer: "2001:db8:9::9".parse().unwrap(), ..entry.gateway },
        ..entry
    };
    let slots = express.slots(entry.id);
    model.apply(express.put(&moved, &known, 6));
    assert_eq!((model.v6.len(), express.slots(entry.id)), (2, slots), "counting goes on");
    let hops: Vec<_> = model.v6.values().map(|value| model.hops[&value.hop]).collect();
    assert_eq!(hops[0], hops[1]);
    assert_eq!((hops[0].destination, hops[0].source, hops[0].port), (NEIGHBOUR_MAC.0, OUTSIDE_MAC.0, 0));
    model.apply(express.remove(entry.id, 7));
    assert!(model.v6.is_empty() && express.hops().count() == 0);
}

/// RLY-1: entries that the program has no room for wait until others have gone and rested.
#[test]
fn rly_1_more_entries_than_room() {
    let shape = Shape { v6: false, esp: true, ah: false, encap: [false; 2], across: false };
    let fib = testbed::fib(&Layout::default());
    let entry = |id: u32| {
        let spis = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| (id * 8 + at) << 9);
        RelayEntry { id: RelayId(id.into()), ..shape.entry(spis) }
    };
    let mut express = Express::new(2);
    express.set_usable([OUTSIDE].into());
    let mut model = Model::default();
    for id in 1..=3 {
        model.apply(express.put(&entry(id), &fib, 1));
    }
    assert_eq!((model.v4.len(), express.placed(), express.slots(RelayId(3))), (4, 2, None));
    model.apply(express.remove(RelayId(1), 2));
    model.apply(express.tick(&fib, 3));
    assert_eq!(express.placed(), 1, "indices rest before they are used again");
    model.apply(express.tick(&fib, 4));
    assert_eq!((model.v4.len(), express.placed()), (4, 2));
    assert!(express.slots(RelayId(3)).is_some());
}

/// RLY-1, RLY-10: whatever entries come, go, move and take each other's SPIs, and whatever routes and ports do meanwhile, the
/// program has what it should and nothing else.
#[test]
fn rly_1_the_program_has_what_it_should() {
    let steps = prop::collection::vec((0u64..5, prop::option::of((0u32..6, 0usize..16)), 0u8..8), 1..40);
    let known = testbed::fib(&Layout::default());
    let unknown = testbed::fib(&Layout { inside_hosts: Vec::new(), ..Layout::default() });
    let mut runner = TestRunner::new(Config { cases: 400, ..Config::default() });
    runner
        .run(&steps, |steps| {
            let mut express = Express::new(4);
            let mut usable: Vec<PortIndex> = vec![OUTSIDE, INSIDE];
            express.set_usable(usable.iter().copied().collect());
            let mut model = Model::default();
            let mut entries: HashMap<RelayId, RelayEntry> = HashMap::new();
            let mut fib = &known;
            let mut touched = std::collections::BTreeSet::new();
            for (now, (id, wanted, other)) in (1u32..).zip(steps) {
                let id = RelayId(id);
                let new = wanted.map(|(spis, shape)| {
                    let spis = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| (spis * 8 + at + 1) << 9);
                    RelayEntry { id, ..Shape::all()[shape].entry(spis) }
                });
                // The publisher lets no SPI have two owners.
                let spis = |entry: &RelayEntry| {
                    [entry.client.ah.or(entry.client.esp), entry.gateway.ah.or(entry.gateway.esp)]
                };
                if new.is_none_or(|new| {
                    entries.values().all(|entry| entry.id == id || spis(entry)[0] != spis(&new)[0])
                }) {
                    match new {
                        Some(new) => drop(entries.insert(id, new)),
                        None => drop(entries.remove(&id)),
                    }
                    touched.insert(id);
                }
                match other {
                    0 => fib = &unknown,
                    1 => fib = &known,
                    2 => usable = vec![OUTSIDE],
                    3 => usable = vec![OUTSIDE, INSIDE],
                    // Several changes at once, told in the order of their ids.
                    4 | 5 => continue,
                    _ => {}
                }
                for id in std::mem::take(&mut touched) {
                    model.apply(match entries.get(&id) {
                        Some(entry) => express.put(entry, fib, now),
                        None => express.remove(id, now),
                    });
                }
                express.set_usable(usable.iter().copied().collect());
                model.apply(express.refresh(fib, now));
                model.apply(express.tick(fib, now));

                let mut expected = 0;
                for entry in entries.values() {
                    let Some(slots) = express.slots(entry.id) else { continue };
                    let mut alone = Model::default();
                    let mut one = Express::new(1);
                    one.set_usable(usable.iter().copied().collect());
                    alone.apply(one.put(entry, fib, 1));
                    expected += alone.v4.len() + alone.v6.len();
                    let own = one.slots(entry.id).unwrap();
                    let same = |a: u32, b: u32| {
                        own.iter().position(|slot| *slot == a) == slots.iter().position(|slot| *slot == b)
                    };
                    for (key, value) in &alone.v4 {
                        let there = model.v4.get(key).expect("missing");
                        prop_assert_eq!(there.rule, value.rule);
                        prop_assert_eq!(model.hops[&there.hop], alone.hops[&value.hop]);
                        prop_assert!(same(value.slot, there.slot));
                    }
                    for (key, value) in &alone.v6 {
                        let there = model.v6.get(key).expect("missing");
                        prop_assert_eq!(there.rule, value.rule);
                        prop_assert_eq!(model.hops[&there.hop], alone.hops[&value.hop]);
                        prop_assert!(same(value.slot, there.slot));
                    }
                }
                prop_assert_eq!(model.v4.len() + model.v6.len(), expected, "left over");
            }
            Ok(())
        })
        .unwrap();
}
