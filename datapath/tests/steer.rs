//! The compiled XDP program in the running kernel: its verdict on each kind of packet (DP-1), and how it is attached,
//! detached and taken over.
//!
//! These tests need root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN for namespaces) and fail without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, PerCpuArray, XskMap};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use postern_contract::settings::{FragmentPolicy, InterfaceSettings, PortKind, Role, XdpMode};
use postern_datapath::steer::{OBJECT, Steer, SteerError};
use postern_steer_maps::{Prefix, Settings, VERDICT_COUNT, VERDICTS, name};
use postern_wire::ids::Protocol;
use postern_wire::steer::{Class, Link, classify};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 7);
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 9);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const PEER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn need_root() {
    let uid = rustix::process::geteuid();
    assert!(
        uid.is_root(),
        "this test loads XDP programs and makes network namespaces: run it as root, not as uid {uid:?}"
    );
}

// Frames, written out byte by byte: not with the code under test.

fn ether(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [&MAC[..], &[2, 0, 0, 0, 0, 2], &ether_type.to_be_bytes(), payload].concat()
}

fn ip4_from(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    ether(0x0800, &packet)
}

fn ip4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    ip4_from(PEER, GATEWAY, protocol, 0x4000, payload)
}

fn ip6_from(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    ether(0x86dd, &packet)
}

fn ip6(next: u8, payload: &[u8]) -> Vec<u8> {
    ip6_from(PEER6, GATEWAY6, next, payload)
}

/// A packet with `count` extension headers of 8 bytes (hop-by-hop, destination options, routing); the last names `next`.
fn chain(count: usize, next: u8, payload: &[u8]) -> Vec<u8> {
    let kinds = [0, 60, 43, 60, 60, 60, 60, 60, 60];
    let mut bytes = Vec::new();
    for index in 0..count {
        bytes.extend([if index + 1 == count { next } else { kinds[index + 1] }, 0, 1, 4, 0, 0, 0, 0]);
    }
    bytes.extend(payload);
    ip6(if count == 0 { next } else { kinds[0] }, &bytes)
}

fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    [&[0x11, 0x94][..], &port.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload].concat()
}

/// SPI 0x100, sequence number 1, some ciphertext.
fn esp() -> Vec<u8> {
    [&[0, 0, 1, 0, 0, 0, 0, 1][..], &[0xa5; 32]].concat()
}

/// Next header 4, 4 words of AH more than 2, SPI, sequence number, ICV.
fn ah() -> Vec<u8> {
    [&[4, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1][..], &[0xa5; 12], &[0x45; 20]].concat()
}

/// The program in the kernel, attached to nothing.
struct Program(Ebpf);

impl Program {
    fn load() -> Self {
        need_root();
        let mut ebpf = EbpfLoader::new().load(OBJECT).expect("maps");
        xdp(&mut ebpf).load().expect("the verifier refuses the program");
        Self(ebpf)
    }

    fn settings(&mut self, flags: u32) -> &mut Self {
        self.set(Settings { flags, ..Settings::default() })
    }

    fn set(&mut self, settings: Settings) -> &mut Self {
        let mut map: Array<_, Settings> = self.0.map_mut(name::SETTINGS).unwrap().try_into().unwrap();
        map.set(0, settings, 0).unwrap();
        self
    }

    /// A socket for queue 0: not bound, which the test run does not get to see.
    fn socket(&mut self) -> rustix::fd::OwnedFd {
        let family = rustix::net::AddressFamily::from_raw(44);
        let socket = rustix::net::socket(family, rustix::net::SocketType::RAW, None).expect("AF_XDP socket");
        let mut map: XskMap<_> = self.0.map_mut(name::SOCKETS).unwrap().try_into().unwrap();
        map.set(0, socket.as_fd(), 0).unwrap();
        socket
    }

    fn local(&mut self, address: Ipv4Addr) {
        let mut map: HashMap<_, [u8; 4], u32> = self.0.map_mut(name::LOCAL_V4).unwrap().try_into().unwrap();
        map.insert(address.octets(), 1, 0).unwrap();
    }

    fn prefix(&mut self, map: &str, address: Ipv4Addr, length: u32, flags: u32) {
        let mut map: LpmTrie<_, [u8; 4], Prefix> = self.0.map_mut(map).unwrap().try_into().unwrap();
        map.insert(&Key::new(length, address.octets()), Prefix { flags }, 0).unwrap();
    }

    fn prefix6(&mut self, map: &str, address: Ipv6Addr, length: u32, flags: u32) {
        let mut map: LpmTrie<_, [u8; 16], Prefix> = self.0.map_mut(map).unwrap().try_into().unwrap();
        map.insert(&Key::new(length, address.octets()), Prefix { flags }, 0).unwrap();
    }

    fn counters(&self) -> Vec<u64> {
        let map: PerCpuArray<_, u64> = self.0.map(name::COUNTERS).unwrap().try_into().unwrap();
        (0..VERDICT_COUNT).map(|index| map.get(&index, 0).unwrap().iter().sum()).collect()
    }

    /// The action on a frame, and the one counter that it moved.
    fn run(&mut self, frame: &[u8]) -> (u32, &'static str) {
        let before = self.counters();
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        let action = xdp(&mut self.0).test_run(options).expect("BPF_PROG_TEST_RUN").return_value;
        let after = self.counters();
        let moved: Vec<_> = (0..after.len()).filter(|index| after[*index] != before[*index]).collect();
        assert_eq!(moved.len(), 1, "counters moved: {moved:?}");
        assert_eq!(after[moved[0]], before[moved[0]] + 1);
        (action, VERDICTS[moved[0]])
    }
}

fn xdp(ebpf: &mut Ebpf) -> &mut Xdp {
    ebpf.program_mut(name::PROGRAM).unwrap().try_into().unwrap()
}

/// DP-1: the outside. IPsec goes to the socket, the keepalive is dropped, everything else is the kernel's.
#[test]
fn dp_1_outside_verdicts() {
    let mut program = Program::load();
    program.settings(Settings::OUTSIDE);
    let _socket = program.socket();

    let fragment = |protocol, offset, payload: &[u8]| ip4_from(PEER, GATEWAY, protocol, offset, payload);
    let options = |frame: Vec<u8>| {
        // 8 bytes of No Operation between header and payload.
        let mut frame = frame;
        frame[14] = 0x47;
        let total = u16::from_be_bytes([frame[16], frame[17]]) + 8;
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        frame.splice(34..34, [1; 8]);
        frame
    };
    let fragment6 = |next: u8, offset: u16, payload: &[u8]| {
        ip6(44, &[&[next, 0][..], &offset.to_be_bytes(), &[0, 0, 0, 1], payload].concat())
    };
    let ike = [[0; 4].as_slice(), &[0x11; 28]].concat();
    let long = [&[50, 255][..], &[0; 2046]].concat();
    let mut long = ip6(60, &[long, [&[50, 0][..], &[0; 6]].concat(), esp()].concat());
    long[54] = 60;

    for (what, frame, action, verdict) in [
        ("ESP", ip4(50, &esp()), XDP_REDIRECT, "esp"),
        ("ESP behind options", options(ip4(50, &esp())), XDP_REDIRECT, "esp"),
        ("ESP over IPv6", ip6(50, &esp()), XDP_REDIRECT, "esp"),
        ("ESP behind extension headers", chain(3, 50, &esp()), XDP_REDIRECT, "esp"),
        ("ESP behind 8 extension headers", chain(8, 50, &esp()), XDP_REDIRECT, "esp"),
        ("ESP behind 9 extension headers", chain(9, 50, &esp()), XDP_PASS, "extension_headers_passed"),
        ("ESP behind 2,056 bytes of them", long, XDP_PASS, "extension_headers_passed"),
        ("AH", ip4(51, &ah()), XDP_REDIRECT, "ah"),
        ("AH over IPv6", ip6(51, &ah()), XDP_REDIRECT, "ah"),
        ("ESP in UDP", ip4(17, &udp(4500, &esp())), XDP_REDIRECT, "esp_in_udp"),
        ("ESP in UDP over IPv6", ip6(17, &udp(4500, &esp())), XDP_REDIRECT, "esp_in_udp"),
        ("NAT-keepalive", ip4(17, &udp(4500, &[0xff])), XDP_DROP, "keepalive_dropped"),
        ("NAT-keepalive over IPv6", ip6(17, &udp(4500, &[0xff])), XDP_DROP, "keepalive_dropped"),
        ("one other byte", ip4(17, &udp(4500, &[0xfe])), XDP_PASS, "malformed_passed"),
        ("IKE", ip4(17, &udp(500, &ike[4..])), XDP_PASS, "ike_passed"),
        ("IKE on 4500", ip4(17, &udp(4500, &ike)), XDP_PASS, "ike_passed"),
        ("IKE over IPv6", ip6(17, &udp(4500, &ike)), XDP_PASS, "ike_passed"),
        ("first fragment of ESP", fragment(50, 0x2000, &esp()), XDP_PASS, "fragment_passed"),
        ("later fragment of ESP", fragment(50, 0x0010, &esp()), XDP_PASS, "fragment_passed"),
        ("fragment of AH", fragment(51, 0x2010, &ah()), XDP_PASS, "fragment_passed"),
        ("first of ESP in UDP", fragment(17, 0x2000, &udp(4500, &esp())), XDP_PASS, "fragment_passed"),
        ("later of UDP", fragment(17, 0x0010, &udp(4500, &esp())), XDP_PASS, "passed"),
        ("IPv6 first of ESP", fragment6(50, 1, &esp()), XDP_PASS, "fragment_passed"),
        ("IPv6 later of ESP", fragment6(50, 0x0100, &esp()), XDP_PASS, "fragment_passed"),
        ("IPv6 later of options", fragment6(60, 0x0100, &[50; 16]), XDP_PASS, "passed"),
        ("TCP", ip4(6, &[0; 20]), XDP_PASS, "passed"),
        ("DNS", ip4(17, &udp(53, &[0xff])), XDP_PASS, "passed"),
        ("ICMP", ip4(1, &[8, 0, 0, 0, 0, 0, 0, 0]), XDP_PASS, "passed"),
        ("neighbour solicitation", ip6(58, &[135; 24]), XDP_PASS, "passed"),
        ("ARP", ether(0x0806, &[0; 28]), XDP_PASS, "not_ip_passed"),
        ("VLAN", ether(0x8100, &ip4(50, &esp())), XDP_PASS, "not_ip_passed"),
        ("runt", ether(0x0800, &[0x45, 0, 0]), XDP_PASS, "malformed_passed"),
        ("no payload", ether(0x86dd, &[]), XDP_PASS, "malformed_passed"),
        ("ESP of 7 bytes", ip4(50, &esp()[..7]), XDP_PASS, "malformed_passed"),
        ("cut off", ip4(50, &esp())[..60].to_vec(), XDP_PASS, "malformed_passed"),
        ("with Ethernet padding", [ip4(50, &esp()), vec![0; 9]].concat(), XDP_REDIRECT, "esp"),
    ] {
        assert_eq!(program.run(&frame), (action, verdict), "{what}");
    }

    program.settings(Settings::OUTSIDE | Settings::DROP_FRAGMENTS);
    assert_eq!(program.run(&fragment(50, 0x2000, &esp())), (XDP_DROP, "fragment_dropped"));
    assert_eq!(program.run(&fragment6(50, 1, &esp())), (XDP_DROP, "fragment_dropped"));
    assert_eq!(program.run(&fragment(17, 0x0010, &udp(4500, &esp()))), (XDP_PASS, "passed"));

    program.settings(0);
    assert_eq!(program.run(&ip4(50, &esp())), (XDP_PASS, "passed"), "neither inside nor outside");
}

/// DP-1: while a queue has no socket, everything is the kernel's.
#[test]
fn dp_1_no_socket_passes() {
    let mut program = Program::load();
    program.settings(Settings::OUTSIDE);
    assert_eq!(program.run(&ip4(50, &esp())), (XDP_PASS, "no_socket"));
    let socket = program.socket();
    assert_eq!(program.run(&ip4(50, &esp())), (XDP_REDIRECT, "esp"));
    drop(socket);
    // The kernel removes the entry when the last reference to the socket is gone, shortly after its close.
    let gone = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        program.run(&ip4(50, &esp())) == (XDP_PASS, "no_socket")
    });
    assert!(gone, "the closed socket is still in the map");
}

/// DP-1: extension headers do not carry a packet past a policy.
#[test]
fn dp_1_many_extension_headers_do_not_evade_a_policy() {
    let mut program = Program::load();
    program.settings(Settings::INSIDE);
    let packet = chain(9, 6, &[0; 20]);
    assert_eq!(program.run(&packet), (XDP_PASS, "extension_headers_passed"));
    program.prefix6(name::DESTINATIONS_V6, Ipv6Addr::UNSPECIFIED, 0, Prefix::PROTECT);
    assert_eq!(program.run(&packet), (XDP_DROP, "protected_dropped"));
    let _socket = program.socket();
    assert_eq!(program.run(&packet), (XDP_REDIRECT, "protected"));
}

/// DP-1: with the local addresses known, IPsec for others is left to the kernel, which forwards it.
#[test]
fn dp_1_foreign_ipsec_passes() {
    let mut program = Program::load();
    program.settings(Settings::OUTSIDE | Settings::LOCAL_ONLY);
    let _socket = program.socket();
    assert_eq!(program.run(&ip4(50, &esp())), (XDP_PASS, "foreign_passed"));
    assert_eq!(program.run(&ip4(17, &udp(4500, &[0xff]))), (XDP_PASS, "foreign_passed"));
    assert_eq!(program.run(&ip6(51, &ah())), (XDP_PASS, "foreign_passed"));
    assert_eq!(program.run(&ip4(6, &[0; 20])), (XDP_PASS, "passed"));
    program.local(GATEWAY);
    assert_eq!(program.run(&ip4(50, &esp())), (XDP_REDIRECT, "esp"));
    assert_eq!(program.run(&ip4(17, &udp(4500, &[0xff]))), (XDP_DROP, "keepalive_dropped"));
}

/// DP-1: the inside. What a policy protects goes to the socket; the longest prefix decides.
#[test]
fn dp_1_inside_verdicts() {
    let mut program = Program::load();
    program.settings(Settings::INSIDE);
    let _socket = program.socket();
    let tcp = |from, to| ip4_from(from, to, 6, 0, &[0; 20]);
    let passed = (XDP_PASS, "passed");
    let protected = (XDP_REDIRECT, "protected");

    assert_eq!(program.run(&tcp(HOST, REMOTE)), passed, "no policy");
    program.prefix(name::DESTINATIONS_V4, Ipv4Addr::new(10, 2, 0, 0), 16, Prefix::PROTECT);
    assert_eq!(program.run(&tcp(HOST, REMOTE)), protected);
    assert_eq!(program.run(&tcp(HOST, Ipv4Addr::new(10, 3, 0, 1))), passed, "another network");
    assert_eq!(
        program.run(&ip4_from(HOST, REMOTE, 50, 0, &esp())),
        protected,
        "a host's own ESP is a packet too"
    );
    assert_eq!(program.run(&ip4_from(HOST, REMOTE, 6, 0x2010, &[0; 16])), protected, "fragments too");

    program.prefix(name::DESTINATIONS_V4, Ipv4Addr::new(10, 2, 5, 0), 24, Prefix::PASS.flags);
    assert_eq!(program.run(&tcp(HOST, Ipv4Addr::new(10, 2, 5, 1))), passed, "an exception");

    let checked = Prefix::PROTECT | Prefix::CHECK_SOURCE;
    program.prefix(name::DESTINATIONS_V4, Ipv4Addr::new(10, 4, 0, 0), 16, checked);
    let checked = Ipv4Addr::new(10, 4, 0, 1);
    assert_eq!(program.run(&tcp(HOST, checked)), passed, "source not protected");
    program.prefix(name::SOURCES_V4, Ipv4Addr::new(10, 1, 0, 0), 24, Prefix::PROTECT);
    assert_eq!(program.run(&tcp(HOST, checked)), protected);
    assert_eq!(program.run(&tcp(Ipv4Addr::new(10, 9, 0, 1), checked)), passed);

    program.prefix(name::DESTINATIONS_V4, Ipv4Addr::UNSPECIFIED, 0, Prefix::PROTECT);
    assert_eq!(program.run(&tcp(HOST, Ipv4Addr::new(203, 0, 113, 1))), protected, "0.0.0.0/0");
    for kernel in [[224, 0, 0, 5], [239, 1, 1, 1], [255, 255, 255, 255], [169, 254, 0, 1]] {
        assert_eq!(program.run(&tcp(HOST, kernel.into())), passed, "{kernel:?}");
    }
    let mut broadcast = tcp(HOST, REMOTE);
    broadcast[..6].fill(0xff);
    assert_eq!(program.run(&broadcast), passed, "link-layer broadcast");
    program.local(REMOTE);
    assert_eq!(program.run(&tcp(HOST, REMOTE)), passed, "this host's own address");

    let mac = Settings { flags: Settings::INSIDE | Settings::CHECK_MAC, mac: MAC, ..Settings::default() };
    let other = Ipv4Addr::new(10, 2, 0, 10);
    program.set(mac);
    assert_eq!(program.run(&tcp(HOST, other)), protected);
    program.set(Settings { mac: [2, 0, 0, 0, 0, 9], ..mac });
    assert_eq!(program.run(&tcp(HOST, other)), passed, "another station's frame");
}

/// DP-1: the inside for IPv6; neighbour discovery stays the kernel's even under ::/0.
#[test]
fn dp_1_inside_verdicts_v6() {
    let mut program = Program::load();
    program.settings(Settings::INSIDE);
    let _socket = program.socket();
    let host = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 7);
    let remote = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 9);
    let tcp = |to| ip6_from(host, to, 6, &[0; 20]);
    let passed = (XDP_PASS, "passed");
    let protected = (XDP_REDIRECT, "protected");

    assert_eq!(program.run(&tcp(remote)), passed);
    let checked = Prefix::PROTECT | Prefix::CHECK_SOURCE;
    program.prefix6(name::DESTINATIONS_V6, Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 0), 32, checked);
    assert_eq!(program.run(&tcp(remote)), passed);
    program.prefix6(name::SOURCES_V6, Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0), 32, Prefix::PROTECT);
    assert_eq!(program.run(&tcp(remote)), protected);
    program.prefix6(name::DESTINATIONS_V6, Ipv6Addr::UNSPECIFIED, 0, Prefix::PROTECT);
    assert_eq!(program.run(&tcp(PEER6)), protected);
    for kernel in ["ff02::1", "ff02::1:ff00:1", "fe80::1"] {
        assert_eq!(program.run(&tcp(kernel.parse().unwrap())), passed, "{kernel}");
    }
}

/// DP-1: an interface with both roles looks for IPsec first, then for what policies protect.
#[test]
fn dp_1_both_roles() {
    let mut program = Program::load();
    program.settings(Settings::OUTSIDE | Settings::INSIDE | Settings::LOCAL_ONLY);
    let _socket = program.socket();
    program.local(GATEWAY);
    program.prefix(name::DESTINATIONS_V4, Ipv4Addr::new(10, 2, 0, 0), 16, Prefix::PROTECT);
    assert_eq!(program.run(&ip4(50, &esp())), (XDP_REDIRECT, "esp"));
    assert_eq!(program.run(&ip4_from(HOST, REMOTE, 6, 0, &[0; 20])), (XDP_REDIRECT, "protected"));
    assert_eq!(program.run(&ip4_from(HOST, REMOTE, 50, 0, &esp())), (XDP_REDIRECT, "protected"));
    assert_eq!(program.run(&ip4_from(HOST, PEER, 50, 0, &esp())), (XDP_PASS, "passed"));
}

/// DP-1: the one parser gives the same answer in the kernel as in the workers, on whatever bytes.
#[test]
fn dp_1_program_agrees_with_classify() {
    let mut program = Program::load();
    program.settings(Settings::OUTSIDE);
    let _socket = program.socket();
    let seeds = [
        ip4(50, &esp()),
        ip4(51, &ah()),
        ip4(17, &udp(4500, &esp())),
        ip4(17, &udp(4500, &[0xff])),
        ip4(17, &udp(500, &[0; 28])),
        ip6(50, &esp()),
        ip6(17, &udp(4500, &esp())),
        ip6(
            0,
            &[&[60, 0, 1, 4, 0, 0, 0, 0, 44, 0, 1, 4, 0, 0, 0, 0, 50, 0, 0, 1, 0, 0, 0, 1][..], &esp()]
                .concat(),
        ),
    ];
    let frames = (
        prop::sample::select(seeds.to_vec()),
        prop::collection::vec((0usize..90, any::<u8>()), 0..6),
        14usize..140,
    )
        .prop_map(|(mut frame, changes, length)| {
            for (at, byte) in changes {
                if let Some(cell) = frame.get_mut(at) {
                    *cell = byte;
                }
            }
            frame.truncate(length);
            frame
        });
    let program = std::cell::RefCell::new(program);
    let mut runner = TestRunner::new(Config { failure_persistence: None, cases: 4000, ..Config::default() });
    runner
        .run(&frames, |frame| {
            let class = classify(frame.as_slice(), Link::Ethernet).class;
            let group = frame[0] & 1 == 1;
            let expected = match class {
                Class::NotIp => "not_ip_passed",
                Class::Malformed => "malformed_passed",
                Class::TooManyExtensionHeaders => "extension_headers_passed",
                _ if group => "passed",
                Class::Esp => "esp",
                Class::EspInUdp => "esp_in_udp",
                Class::Ah => "ah",
                Class::NattKeepalive => "keepalive_dropped",
                Class::Ike => "ike_passed",
                Class::IpsecFragment => "fragment_passed",
                Class::Ip => "passed",
            };
            prop_assert_eq!(program.borrow_mut().run(&frame).1, expected);
            Ok(())
        })
        .unwrap();
}

/// A pair of network namespaces joined by a veth pair, `out0` in this thread's and `peer0` in the other; gone when
/// dropped, also by a panic.
struct Wire {
    here: String,
    there: String,
}

const OUT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

impl Wire {
    /// Moves this thread into the first namespace.
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        need_root();
        let unique = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let wire = Self { here: format!("pt-steer-{unique}-a"), there: format!("pt-steer-{unique}-b") };
        let Self { here, there } = &wire;
        ip(&format!("netns add {here}"));
        ip(&format!("netns add {there}"));
        ip(&format!("-n {here} link add out0 type veth peer name peer0 netns {there}"));
        ip(&format!("-n {here} addr add {OUT}/24 dev out0"));
        ip(&format!("-n {there} addr add {FAR}/24 dev peer0"));
        for (namespace, device) in [(here, "out0"), (there, "peer0")] {
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} link set {device} up"));
        }
        enter(here);
        wire
    }

    /// Runs `f` in the other namespace.
    fn there<T>(&self, f: impl FnOnce() -> T) -> T {
        enter(&self.there);
        let value = f();
        enter(&self.here);
        value
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for namespace in [&self.here, &self.there] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

fn ip(arguments: &str) {
    let output =
        Command::new("ip").args(arguments.split(' ')).output().expect("the command ip (package iproute2)");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Only this thread moves.
fn enter(namespace: &str) {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(file.as_fd(), kind).expect("setns");
}

/// What the kernel says of the interface.
fn link(device: &str) -> String {
    let output = Command::new("ip").args(["-d", "link", "show", device]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn outside(xdp: XdpMode) -> InterfaceSettings {
    InterfaceSettings {
        name: "out0".to_owned(),
        role: Role::Outside,
        port: PortKind::Xsk,
        xdp,
        zero_copy: false,
        mtu: None,
    }
}

fn counter(steer: &Steer, verdict: &str) -> u64 {
    steer.counters().unwrap().into_iter().find(|(name, _)| name == verdict).unwrap().1
}

/// DP-1: attached natively to a veth, without a socket the packets are counted and reach the kernel's own sockets;
/// keepalives do not; dropping the `Steer` detaches.
#[test]
fn dp_1_attached_natively_passes_without_socket_and_detaches() {
    let wire = Wire::new();
    let receiver = UdpSocket::bind((OUT, 4500)).unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();

    let mut steer = Steer::attach(&outside(XdpMode::Auto), FragmentPolicy::Kernel, None).unwrap();
    assert_eq!(steer.mode(), "native");
    assert!(link("out0").contains("prog/xdp id"), "{}", link("out0"));
    steer.set_local(&[IpAddr::V4(OUT)]).unwrap();

    let sender = wire.there(|| UdpSocket::bind((FAR, 4500)).unwrap());
    let mut buffer = [0; 100];
    sender.send_to(&esp(), (OUT, 4500)).unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), esp().len());
    sender.send_to(&[0xff], (OUT, 4500)).unwrap();
    sender.send_to(&[0, 0, 0, 0, 1, 2, 3, 4], (OUT, 4500)).unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), 8, "the keepalive before it was dropped");
    assert_eq!(counter(&steer, "no_socket"), 1);
    assert_eq!(counter(&steer, "keepalive_dropped"), 1);
    assert_eq!(counter(&steer, "ike_passed"), 1);
    assert!(counter(&steer, "not_ip_passed") > 0, "ARP");

    // Another address of this host is not the one that IPsec is steered for.
    steer.set_local(&[IpAddr::V4(GATEWAY), IpAddr::V6(GATEWAY6)]).unwrap();
    sender.send_to(&esp(), (OUT, 4500)).unwrap();
    assert_eq!(receiver.recv(&mut buffer).unwrap(), esp().len());
    assert_eq!(counter(&steer, "foreign_passed"), 1);

    drop(steer);
    assert!(!link("out0").contains("prog/xdp"), "{}", link("out0"));
}

/// DP-1: generic mode where it is asked for, and prefixes added and removed while attached.
#[test]
fn dp_1_attached_generically_and_prefixes_follow() {
    let wire = Wire::new();
    let settings = InterfaceSettings { role: Role::Inside, ..outside(XdpMode::Generic) };
    let mut steer = Steer::attach(&settings, FragmentPolicy::Drop, None).unwrap();
    assert_eq!((steer.mode(), steer.interface()), ("generic", "out0"));
    let receiver = UdpSocket::bind((OUT, 5000)).unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let sender = wire.there(|| UdpSocket::bind((FAR, 5000)).unwrap());
    receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    // What a policy protects must not get to the kernel, which would forward it in the clear.
    let dropped = |steer: &Steer| {
        let before = counter(steer, "protected_dropped");
        sender.send_to(b"inside", (OUT, 5000)).unwrap();
        let arrived = receiver.recv(&mut [0; 100]).is_ok();
        let dropped = counter(steer, "protected_dropped") - before;
        assert_eq!(dropped == 1, !arrived);
        dropped
    };
    let protected = "192.0.2.0/25".parse().unwrap();
    let elsewhere = "203.0.113.0/24".parse().unwrap();
    assert_eq!(dropped(&steer), 0);
    steer.protect(protected, Some(elsewhere)).unwrap();
    assert_eq!(dropped(&steer), 0, "from elsewhere only");
    steer.protect(protected, None).unwrap();
    assert_eq!(dropped(&steer), 1);
    steer.unprotect(protected, None).unwrap();
    assert_eq!(dropped(&steer), 0);
    steer.protect(protected, Some("192.0.2.2/32".parse().unwrap())).unwrap();
    assert_eq!(dropped(&steer), 1);
    steer.set_local(&[IpAddr::V4(OUT)]).unwrap();
    assert_eq!(dropped(&steer), 0, "this host's own address");
}

/// An interface that another program has is left alone, with an error that names the program and the way out.
#[test]
fn occupied_interface_is_named() {
    let _wire = Wire::new();
    let mut other = EbpfLoader::new().load(OBJECT).unwrap();
    let program = xdp(&mut other);
    program.load().unwrap();
    program.attach("out0", aya::programs::XdpMode::Driver).unwrap();
    let id = program.info().unwrap().id();
    let error = Steer::attach(&outside(XdpMode::Auto), FragmentPolicy::Kernel, None).unwrap_err();
    assert!(matches!(&error, SteerError::Occupied { id: found, .. } if *found == id), "{error}");
    let text = error.to_string();
    assert!(text.contains(&id.to_string()) && text.contains("ip link set dev out0 xdp off"), "{text}");

    let missing = InterfaceSettings { name: "nowhere0".to_owned(), ..outside(XdpMode::Auto) };
    let error = Steer::attach(&missing, FragmentPolicy::Kernel, None).unwrap_err();
    assert!(matches!(error, SteerError::NoInterface { .. }), "{error}");
}

/// A process that holds the program is killed; the next one takes the interface over at once.
#[test]
fn killed_process_leaves_the_interface_free() {
    const HOLD: &str = "POSTERN_STEER_TEST_HOLD";
    if std::env::var_os(HOLD).is_some() {
        // The process to be killed: started below, in the namespace.
        let _steer = Steer::attach(&outside(XdpMode::Auto), FragmentPolicy::Kernel, None).unwrap();
        println!("attached");
        std::thread::sleep(Duration::from_mins(1));
        return;
    }
    let _wire = Wire::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed_process_leaves_the_interface_free", "--nocapture"])
        .env(HOLD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let attached = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .any(|line| line.is_ok_and(|line| line.contains("attached")));
    assert!(attached, "the child did not attach");
    assert!(link("out0").contains("prog/xdp"), "{}", link("out0"));

    child.kill().unwrap();
    // Not waited for: the predecessor may still be dying when the next one starts.
    let steer = Steer::attach(&outside(XdpMode::Native), FragmentPolicy::Kernel, None).unwrap();
    child.wait().unwrap();
    assert_eq!(steer.mode(), "native");
    assert!(link("out0").contains("prog/xdp"), "{}", link("out0"));
    drop(steer);
    assert!(!link("out0").contains("prog/xdp"), "{}", link("out0"));
}

/// The hand-written numbers above are those of the registry.
#[test]
fn protocol_numbers() {
    assert_eq!([Protocol::ESP.0, Protocol::AH.0, Protocol::UDP.0], [50, 51, 17]);
}
