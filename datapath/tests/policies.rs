//! The outbound SPD in the walk: protect, bypass, discard, and what has no SA (DP-3, DP-6, MOB-1).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use std::time::Duration;

use common::*;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::request::Operation;
use postern_contract::sa::{Action, Direction, Policy, PolicyId, SaConfig, SaId, Selector};
use postern_contract::{Generation, Translation};
use postern_datapath::testbed::INSIDE;
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{esp, ip4};

fn policy(id: u64, priority: u32, selectors: Vec<Selector>, action: Action) -> Operation {
    Operation::InstallPolicy(Policy {
        id: PolicyId(id),
        generation: Generation(1),
        priority,
        selectors,
        action,
    })
}

fn everything(action: Action, id: u64, priority: u32) -> Operation {
    policy(id, priority, vec![selector("10.1.0.0/24", "0.0.0.0/0")], action)
}

fn to(destination: &str, port: u16) -> Vec<u8> {
    udp4("10.1.0.2", destination, 1000, port, b"policy")
}

/// RFC 4301 section 4.4.1: the first policy in order decides; where none matches, the packet goes nowhere.
#[test]
fn dp_6_verdicts() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let mut expect = |packet: &[u8], reason| {
        let before = pair.a.drops(reason);
        assert_eq!(pair.a.from_inside(packet), (vec![], vec![]));
        assert_eq!(pair.a.drops(reason), before + 1, "{}", reason.label());
    };
    expect(&to("203.0.113.1", 1), DropReason::NoPolicy);
    expect(&udp4("10.1.9.2", "10.2.0.2", 1, 1, b"source"), DropReason::NoPolicy);
    expect(&udp6("fd01::2", "fd02::2", 1, 1, b"family"), DropReason::NoPolicy);
    install(&mut pair.a, vec![everything(Action::Discard, 7, 500)]);
    let mut expect = |packet: &[u8], reason| {
        let before = pair.a.drops(reason);
        assert_eq!(pair.a.from_inside(packet), (vec![], vec![]));
        assert_eq!(pair.a.drops(reason), before + 1, "{}", reason.label());
    };
    expect(&to("203.0.113.1", 1), DropReason::PolicyDiscard);
    assert_eq!(pair.protect(&to("10.2.0.2", 1)).len(), 1, "the tunnel's policy comes first");
    install(&mut pair.a, vec![everything(Action::Discard, 6, 50)]);
    assert!(pair.protect(&to("10.2.0.2", 1)).is_empty());
    install(&mut pair.a, vec![everything(Action::Bypass, 5, 50)]);
    let packet = to("203.0.113.1", 1);
    assert_eq!(pair.a.from_inside(&packet).0, [routed(&packet, 1)], "of equal priority the lower id");
    install(&mut pair.a, vec![Operation::RemovePolicy(PolicyId(5)), Operation::RemovePolicy(PolicyId(6))]);
    assert_eq!(pair.protect(&to("10.2.0.2", 1)).len(), 1);
    conserved(&pair.a);
}

/// RFC 4301 section 4.4.1: policies of one protocol and some ports; fragments that hide theirs.
#[test]
fn dp_6_ports() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let ports = |protocol, local, remote| Selector {
        protocol: Some(protocol),
        local_ports: local,
        remote_ports: remote,
        ..selector("10.1.0.0/24", "10.2.0.0/24")
    };
    let any = 0..=u16::MAX;
    install(
        &mut pair.a,
        vec![
            policy(11, 10, vec![ports(Protocol::UDP, any.clone(), 53..=53)], Action::Discard),
            policy(
                12,
                11,
                vec![ports(Protocol::UDP, 4000..=4999, 80..=81), ports(Protocol::TCP, any.clone(), 22..=22)],
                Action::Bypass,
            ),
            // ICMP echo requests, RFC 4301 section 4.4.1.1: type in the high byte.
            policy(13, 12, vec![ports(Protocol::ICMP, 0x0800..=0x08ff, any)], Action::Discard),
        ],
    );
    let esp = |pair: &mut Pair, packet: &[u8]| {
        let out = pair.a.from_inside(packet).0;
        out.first().map(|packet| packet[9] == Protocol::ESP.0)
    };
    assert_eq!(esp(&mut pair, &to("10.2.0.2", 53)), None);
    assert_eq!(esp(&mut pair, &to("10.2.0.2", 54)), Some(true));
    for (sport, dport, protected) in
        [(4000, 80, false), (4999, 81, false), (3999, 80, true), (5000, 81, true), (4500, 82, true)]
    {
        let packet = udp4("10.1.0.2", "10.2.0.2", sport, dport, b"x");
        assert_eq!(esp(&mut pair, &packet), Some(protected), "{sport} {dport}");
    }
    let mut tcp = to("10.2.0.2", 22);
    ip4::set_protocol(&mut tcp, Protocol::TCP).unwrap();
    assert_eq!(esp(&mut pair, &tcp), Some(false));
    for (kind, protected) in [(8, None), (0, Some(true)), (3, Some(true))] {
        let packet =
            ip_packet(ip("10.1.0.2"), ip("10.2.0.2"), Protocol::ICMP, 0, &[kind, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(esp(&mut pair, &packet), protected, "type {kind}");
    }
    // A later fragment to port 53: its port cannot be known, so only policies for all ports match.
    let mut later = to("10.2.0.2", 53);
    ip4::set_fragment(&mut later, None, 64, false).unwrap();
    assert_eq!(esp(&mut pair, &later), Some(true));
    assert_eq!(pair.a.drops(DropReason::PolicyDiscard), 2);
    conserved(&pair.a);
}

/// DP-6: a policy without an SA drops the packet and asks for one, but not without end.
#[test]
fn dp_6_acquire() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    install(&mut pair.a, vec![everything(Action::Protect(None), 7, 500)]);
    let packet = to("203.0.113.1", 443);
    assert_eq!(pair.a.from_inside(&packet), (vec![], vec![]));
    dropped(&pair.a, DropReason::NoSa, 1);
    let acquire = Event::Acquire {
        policy: PolicyId(7),
        source: ip("10.1.0.2"),
        destination: ip("203.0.113.1"),
        protocol: Protocol::UDP,
        ports: (1000, 443),
    };
    assert_eq!(pair.a.events(), [acquire]);
    // A flood of them: the events are limited per second, the drops are all counted, and what is lost is counted too.
    for _ in 0..1500 {
        pair.a.push(INSIDE, &packet);
    }
    pair.a.settle();
    dropped(&pair.a, DropReason::NoSa, 1501);
    assert_eq!(pair.a.events().len(), 999);
    assert_eq!(pair.a.workers.borrow()[0].core.cells.lost_events.get(), 501);
    pair.a.advance(Duration::from_secs(1));
    pair.a.from_inside(&packet);
    assert_eq!(pair.a.events().len(), 1);
}

/// An outbound SA of A's with its own keys and SPI.
fn other_sa(id: u64, spi: u32, seed: u8) -> Operation {
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    let config = sa(&mut operations, A_OUT);
    (config.id, config.spi, config.pair) = (SaId(id), Translation::same(Spi(spi)), None);
    config.suite = Suites::Gcm128.suite(seed);
    operations.remove(1)
}

fn spi(pair: &mut Pair, packet: &[u8]) -> Option<u32> {
    let out = pair.a.from_inside(packet).0;
    out.first().map(|packet| esp::Header::parse(&packet[20..]).unwrap().spi.0)
}

/// MOB-1: the SA is found by the inner address: the most specific policy that control put first.
#[test]
fn mob_1_by_inner_address() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    install(
        &mut pair.a,
        vec![
            other_sa(20, 0x5020, 0x77),
            policy(20, 50, vec![selector("10.1.0.0/24", "10.2.0.9/32")], Action::Protect(Some(SaId(20)))),
        ],
    );
    assert_eq!(spi(&mut pair, &to("10.2.0.9", 1)), Some(0x5020));
    assert_eq!(spi(&mut pair, &to("10.2.0.8", 1)), Some(SPI_AB.0));
}

/// A policy follows its SA: named before it is there, removed and installed again, replaced by another one.
#[test]
fn mob_1_policy_follows_its_sa() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let packet = to("10.3.0.1", 1);
    let protect = |generation, id| {
        Operation::InstallPolicy(Policy {
            id: PolicyId(30),
            generation: Generation(generation),
            priority: 1,
            selectors: vec![selector("10.1.0.0/24", "10.3.0.0/16")],
            action: Action::Protect(Some(SaId(id))),
        })
    };
    install(&mut pair.a, vec![protect(1, 30)]);
    assert_eq!(spi(&mut pair, &packet), None);
    dropped(&pair.a, DropReason::NoSa, 1);
    assert_eq!(pair.a.events().len(), 1);
    install(&mut pair.a, vec![other_sa(30, 0x5030, 0x71)]);
    assert_eq!(spi(&mut pair, &packet), Some(0x5030));
    // Rekey: the new SA, then the policy, then the old one goes.
    install(&mut pair.a, vec![other_sa(31, 0x5031, 0x72), protect(2, 31)]);
    assert_eq!(spi(&mut pair, &packet), Some(0x5031));
    install(&mut pair.a, vec![Operation::RemoveSa(SaId(30))]);
    assert_eq!(spi(&mut pair, &packet), Some(0x5031));
    install(&mut pair.a, vec![Operation::RemoveSa(SaId(31))]);
    assert_eq!(spi(&mut pair, &packet), None);
    dropped(&pair.a, DropReason::NoSa, 2);
    // An SA that takes the freed place is not the policy's.
    install(&mut pair.a, vec![other_sa(32, 0x5032, 0x73)]);
    assert_eq!(spi(&mut pair, &packet), None);
    install(&mut pair.a, vec![other_sa(31, 0x5033, 0x74)]);
    assert_eq!(spi(&mut pair, &packet), Some(0x5033));
}

/// An inbound SA never becomes a policy's, also when the policy named it first: its place in the table of outbound SAs
/// is another SA's.
#[test]
fn dp_6_inbound_sa_protects_nothing() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let selectors = vec![selector("10.1.0.0/24", "10.3.0.0/16")];
    install(&mut pair.a, vec![policy(40, 1, selectors.clone(), Action::Protect(Some(SaId(40))))]);
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    let config: &mut SaConfig = sa(&mut operations, A_IN);
    assert_eq!(config.direction, Direction::Inbound);
    (config.id, config.spi, config.pair) = (SaId(40), Translation::same(Spi(0x5040)), None);
    operations.truncate(1);
    install(&mut pair.a, operations);
    assert_eq!(spi(&mut pair, &to("10.3.0.1", 1)), None);
    dropped(&pair.a, DropReason::NoSa, 1);
    let refused = pair.a.apply(vec![policy(41, 1, selectors, Action::Protect(Some(SaId(40))))]);
    assert!(refused[0].is_err());
}

/// DP-6: packets of the node itself are under the same policies.
#[test]
fn dp_6_own_packets() {
    use postern_contract::sa::Mode;
    let mut pair = Pair::new(Suites::Gcm128, Options { mode: Mode::Transport, ..Options::default() });
    let packet = udp4("192.0.2.1", "203.0.113.5", 1, 2, b"own");
    assert!(pair.a.from_host(&packet).is_empty());
    dropped(&pair.a, DropReason::NoPolicy, 1);
    install(
        &mut pair.a,
        vec![policy(50, 1, vec![selector("192.0.2.1/32", "203.0.113.0/24")], Action::Bypass)],
    );
    // Not forwarded but sent: its TTL is as it was, also if it is 1.
    for packet in [routed(&packet, 63), packet] {
        assert_eq!(pair.a.from_host(&packet), [packet]);
    }
}
