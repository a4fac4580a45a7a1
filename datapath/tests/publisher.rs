//! What control may do to installed SAs, policies and entries, and what it does to packets (DP-7, DESIGN decisions 3 and 8).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use common::*;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::request::{Cursor, Done, Operation, Refusal, SaReport};
use postern_contract::sa::{
    Action, Direction, DscpPolicy, IpsecProtocol, Policy, PolicyId, SaConfig, SaId, UdpEncap,
};
use postern_contract::secret::Secret;
use postern_contract::{Generation, Translation};
use postern_wire::esp;
use postern_wire::ids::{Protocol, Spi};

fn packet() -> Vec<u8> {
    datagram(false, true, b"published")
}

/// One operation, with what became of it.
fn apply(bed: &mut postern_datapath::testbed::Testbed, operation: Operation) -> Result<Done, Refusal> {
    bed.apply(vec![operation]).remove(0)
}

/// The description of one of A's SAs, changed.
fn changed(options: &Options, id: SaId, edit: impl Fn(&mut SaConfig)) -> Operation {
    let mut operations = side(Suites::Gcm128, options, true);
    let found =
        operations.iter().position(|operation| matches!(operation, Operation::InstallSa(c) if c.id == id));
    let config = sa(&mut operations, id);
    config.generation = Generation(2);
    edit(config);
    operations.swap_remove(found.unwrap())
}

/// One change of a description.
type Edit = fn(&mut SaConfig);

/// DP-7: whatever is said twice takes effect once; what is older is refused.
#[test]
fn dp_7_idempotent() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let before = pair.protect(&packet()).remove(0);
    let results = pair.a.apply(side(Suites::Gcm128, &Options::default(), true));
    assert_eq!(results, [Ok(Done::Already), Ok(Done::Already), Ok(Done::Already)]);
    let older = changed(&Options::default(), A_OUT, |config| config.generation = Generation(0));
    assert_eq!(apply(&mut pair.a, older), Err(Refusal::Stale(Generation(1))));
    let mut policy = side(Suites::Gcm128, &Options::default(), true).remove(2);
    if let Operation::InstallPolicy(policy) = &mut policy {
        policy.generation = Generation(0);
    }
    assert_eq!(apply(&mut pair.a, policy), Err(Refusal::Stale(Generation(1))));
    let after = pair.protect(&packet()).remove(0);
    assert_eq!(
        esp::Header::parse(&before[20..]).unwrap().sequence + 1,
        esp::Header::parse(&after[20..]).unwrap().sequence
    );
    for _ in 0..2 {
        assert_eq!(apply(&mut pair.a, Operation::RemoveSa(SaId(999))), Ok(Done::Already));
        assert_eq!(apply(&mut pair.a, Operation::RemovePolicy(PolicyId(999))), Ok(Done::Already));
        assert_eq!(apply(&mut pair.a, Operation::RemoveRelay(RelayId(999))), Ok(Done::Already));
    }
    assert_eq!(apply(&mut pair.a, Operation::RemoveSa(A_IN)), Ok(Done::Applied));
    assert_eq!(apply(&mut pair.a, Operation::RemoveSa(A_IN)), Ok(Done::Already));
    assert_eq!(pair.a.publisher.counts(), (1, 1, 0));
}

/// DESIGN decision 3: another configuration half leaves window, numbers and counters as they are.
#[test]
fn dp_7_replacing_keeps_the_runtime_half() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let back = datagram(false, false, b"back");
    let sealed: Vec<_> = (0..5).map(|_| pair.protect_b(&back).remove(0)).collect();
    for packet in &sealed[..4] {
        assert_eq!(pair.open_a(packet).len(), 1);
    }
    for _ in 0..3 {
        pair.protect(&packet());
    }
    let options = Options::default();
    for id in [A_IN, A_OUT] {
        let operation = changed(&options, id, |config| {
            config.path.dscp = DscpPolicy::Fixed(10);
            config.path.mss_clamp = false;
        });
        assert_eq!(apply(&mut pair.a, operation), Ok(Done::Applied));
    }
    for packet in &sealed[..4] {
        assert!(pair.open_a(packet).is_empty());
    }
    dropped(&pair.a, DropReason::ReplayDuplicate, 4);
    assert_eq!(pair.open_a(&sealed[4]).len(), 1);
    let next = pair.protect(&packet()).remove(0);
    assert_eq!(esp::Header::parse(&next[20..]).unwrap().sequence, 4);
    assert_eq!(next[1], 10 << 2, "the new configuration is in use");
    let (inbound, outbound) = (pair.a.publisher.sa(A_IN).unwrap(), pair.a.publisher.sa(A_OUT).unwrap());
    assert_eq!((inbound.counters.packets, outbound.counters.packets), (5, 4));
    assert_eq!((inbound.generation, outbound.generation), (Generation(2), Generation(2)));
}

/// OPS-4: what a worker expanded of a key is gone from it with the SA, and with the configuration that held the key.
#[test]
fn ops_4_expanded_keys_go_with_their_sas() {
    let expanded = |pair: &Pair| pair.a.workers.borrow()[0].core.crypto.expanded();
    for suite in [Suites::Gcm128, Suites::AhGmac] {
        let options = Options::default();
        let mut pair = Pair::new(suite, options.clone());
        assert_eq!(expanded(&pair), 0);
        let sealed = pair.protect_b(&datagram(false, false, b"back")).remove(0);
        assert_eq!(pair.open_a(&sealed).len(), 1);
        pair.protect(&packet());
        assert_eq!(expanded(&pair), 2);
        let mut operations = side(suite, &options, true);
        sa(&mut operations, A_OUT).generation = Generation(2);
        for done in pair.a.apply(operations) {
            done.unwrap();
        }
        assert_eq!(expanded(&pair), 1, "{suite:?}: the replaced configuration had a key of its own");
        pair.protect(&packet());
        assert_eq!(expanded(&pair), 2);
        for (id, left) in [(A_IN, 1), (A_OUT, 0)] {
            assert_eq!(apply(&mut pair.a, Operation::RemoveSa(id)), Ok(Done::Applied));
            assert_eq!(expanded(&pair), left, "{suite:?}");
        }
    }
}

/// DESIGN decision 3: a move by control: the next packet goes to the new address, from the new address and port.
#[test]
fn mob_1_move_by_control() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    pair.protect(&packet());
    let operation = changed(&Options::default(), A_OUT, |config| {
        config.local = Translation::same(ip("203.0.113.4"));
        config.remote = Translation::same(ip("203.0.113.5"));
        config.encap = Some(UdpEncap { local_port: 4500, remote_port: 999 });
    });
    install(&mut pair.a, vec![operation]);
    let moved = pair.protect(&packet()).remove(0);
    sound(&moved);
    assert_eq!(moved[12..20], [203, 0, 113, 4, 203, 0, 113, 5]);
    let ports = postern_wire::udp::Header::parse(&moved[20..]).unwrap();
    assert_eq!((ports.source_port, ports.destination_port), (4500, 999));
    assert_eq!(esp::Header::parse(&moved[28..]).unwrap().sequence, 2);
    // To the other family as well.
    let operation = changed(&Options::default(), A_OUT, |config| {
        config.generation = Generation(3);
        config.local = Translation::same(outer(true).0);
        config.remote = Translation::same(outer(true).1);
    });
    install(&mut pair.a, vec![operation]);
    let moved = pair.protect(&packet()).remove(0);
    assert_eq!((moved[0] >> 4, moved[6]), (6, Protocol::ESP.0));
    assert_eq!(esp::Header::parse(&moved[40..]).unwrap().sequence, 3);
    assert_eq!(pair.open_b(&moved).len(), 1);
}

/// An installed SA cannot become another one.
#[test]
fn dp_7_immutable() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let cases: [(&str, SaId, Edit); 6] = [
        ("spi", A_IN, |config| config.spi = Translation::same(Spi(0x9009))),
        ("keys", A_OUT, |config| config.suite = Suites::Gcm128.suite(0x99)),
        ("esn", A_OUT, |config| config.esn = false),
        ("replay_window", A_IN, |config| config.replay_window = 64),
        ("direction", A_OUT, |config| config.direction = Direction::Inbound),
        ("bundle", A_OUT, |config| config.bundle = Some(SaId(70))),
    ];
    for (field, id, edit) in cases {
        let result = apply(&mut pair.a, changed(&Options::default(), id, edit));
        assert_eq!(result, Err(Refusal::Immutable(field.to_owned())), "{field}");
    }
    assert_eq!(pair.a_to_b(&packet()).len(), 1);
}

/// What a description may not say, each named.
#[test]
fn dp_7_refused_descriptions() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let cases: [(&str, SaId, Edit); 15] = [
        ("spi", A_IN, |config| config.spi = Translation::same(Spi(255))),
        ("spi", A_OUT, |config| config.spi.authenticated = Spi(0)),
        ("family", A_IN, |config| config.remote = Translation::same(ip("2001:db8::1"))),
        ("family", A_IN, |config| config.remote.authenticated = ip("2001:db8::1")),
        ("family", A_OUT, |config| {
            config.remote.authenticated = ip("2001:db8::1");
            config.local.authenticated = ip("2001:db8::2");
        }),
        ("replay_window", A_IN, |config| config.replay_window = 63),
        ("replay_window", A_IN, |config| config.replay_window = 4160),
        ("replay_window", A_IN, |config| config.replay_window = 100),
        ("sequence", A_OUT, |config| config.sequence = 0),
        ("sequence", A_OUT, |config| (config.esn, config.sequence) = (false, 1 << 32)),
        ("selectors", A_IN, |config| config.selectors[0].local.start = ip("10.9.0.0")),
        ("selectors", A_IN, |config| config.selectors[0].local = range("fd00::/64")),
        ("path.mtu", A_OUT, |config| config.path.mtu = Some(200)),
        ("path.dscp", A_OUT, |config| config.path.dscp = DscpPolicy::Fixed(64)),
        ("worker", A_OUT, |config| config.worker = Some(1)),
    ];
    for (field, id, edit) in cases {
        let operation = changed(&Options::default(), id, |config| {
            (config.id, config.pair) = (SaId(50), None);
            config.spi = Translation::same(Spi(0x5050));
            if config.direction == Direction::Outbound {
                config.suite = Suites::Gcm128.suite(0x55);
            }
            edit(config);
        });
        match apply(&mut pair.a, operation) {
            Err(Refusal::Invalid(text)) => assert!(text.contains(field), "{field}: {text}"),
            other => panic!("{field}: {other:?}"),
        }
    }
    let operation = changed(&Options::default(), A_OUT, |config| {
        config.id = SaId(50);
        config.suite.encryption_key = Secret::new(vec![1; 19]);
    });
    assert!(matches!(apply(&mut pair.a, operation), Err(Refusal::Suite(_))));
    let ah = |edit: Edit| {
        let mut operations = side(Suites::AhSha256, &Options::default(), true);
        let config = sa(&mut operations, A_IN);
        (config.id, config.spi) = (SaId(51), Translation::same(Spi(0x5051)));
        edit(config);
        operations.remove(0)
    };
    let encapsulated = ah(|config| config.encap = Some(UdpEncap { local_port: 4500, remote_port: 4500 }));
    assert!(
        matches!(apply(&mut pair.a, encapsulated), Err(Refusal::Invalid(text)) if text.contains("encap"))
    );
    let nested = ah(|config| config.bundle = Some(A_IN));
    assert!(matches!(apply(&mut pair.a, nested), Err(Refusal::Invalid(text)) if text.contains("bundle")));
    // A bundle whose AH SA is not there, or of the other direction.
    for bundle in [SaId(60), A_OUT] {
        let operation = changed(&Options::default(), A_IN, |config| {
            (config.id, config.spi, config.bundle) = (SaId(52), Translation::same(Spi(0x5052)), Some(bundle));
        });
        assert!(
            matches!(apply(&mut pair.a, operation), Err(Refusal::Invalid(text)) if text.contains("bundle"))
        );
    }
    assert_eq!(pair.a.publisher.counts(), (2, 1, 0));
}

/// Inbound SPIs are unique per protocol, and so are the keys of outbound SAs: with the same keys two would use the same
/// nonces.
#[test]
fn dp_4_keys_and_spis_are_unique() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let twin = |id, new, spi| {
        changed(&Options::default(), id, move |config: &mut SaConfig| {
            (config.id, config.pair, config.spi) = (SaId(new), None, Translation::same(Spi(spi)));
        })
    };
    assert_eq!(apply(&mut pair.a, twin(A_IN, 60, SPI_BA.0)), Err(Refusal::SpiTaken(SPI_BA)));
    assert_eq!(
        apply(&mut pair.a, twin(A_IN, 60, 0x6060)),
        Ok(Done::Applied),
        "the same keys inbound are no danger"
    );
    assert!(
        matches!(apply(&mut pair.a, twin(A_OUT, 61, 0x6061)), Err(Refusal::Invalid(text)) if text.contains("keys"))
    );
    // Both in one message.
    let fresh = |new| {
        changed(&Options::default(), A_OUT, move |config: &mut SaConfig| {
            (config.id, config.pair, config.suite) = (SaId(new), None, Suites::Gcm128.suite(0x66));
        })
    };
    let results = pair.a.apply(vec![fresh(62), fresh(63)]);
    assert!(matches!(&results[..], [Ok(Done::Applied), Err(Refusal::Invalid(_))]), "{results:?}");
    // Once it is gone its keys may come back, and go on where they ended.
    install(&mut pair.a, vec![Operation::RemoveSa(SaId(62))]);
    assert_eq!(apply(&mut pair.a, fresh(63)), Ok(Done::Applied));
    // An AH SA may have the SPI of an ESP SA.
    let mut operations = side(Suites::AhSha1, &Options::default(), true);
    let config = sa(&mut operations, A_IN);
    (config.id, config.pair) = (SaId(64), None);
    assert_eq!(config.protocol, IpsecProtocol::Ah);
    assert_eq!(apply(&mut pair.a, operations.remove(0)), Ok(Done::Applied));
}

/// A removed SA takes nothing more, and the next one in its place begins afresh.
#[test]
fn dp_6_reused_place_is_clean() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let back = datagram(false, false, b"back");
    let first = pair.protect_b(&back).remove(0);
    assert_eq!(pair.open_a(&first).len(), 1);
    assert!(pair.open_a(&first).is_empty());
    assert_eq!(pair.a.publisher.sa(A_IN).unwrap().counters.drops, [(DropReason::ReplayDuplicate, 1)]);
    install(&mut pair.a, vec![Operation::RemoveSa(A_IN)]);
    let second = pair.protect_b(&back).remove(0);
    assert!(pair.open_a(&second).is_empty());
    assert_eq!(pair.a.drops(DropReason::UnknownSpi), 1);
    // Another SA takes its place in the table: another SPI, another window, no counters.
    let operation = changed(&Options::default(), A_IN, |config| {
        (config.id, config.spi) = (SaId(80), Translation::same(Spi(0x8080)));
    });
    install(&mut pair.a, vec![operation]);
    let report: SaReport = pair.a.publisher.sa(SaId(80)).unwrap();
    assert_eq!(report.counters, postern_contract::counters::SaCounters::default());
    assert!(pair.open_a(&second).is_empty());
    let mut renamed = first.clone();
    renamed[20..24].copy_from_slice(&0x8080u32.to_be_bytes());
    assert!(pair.open_a(&renamed).is_empty());
    assert_eq!(pair.a.publisher.sa(SaId(80)).unwrap().counters.drops, [(DropReason::BadIcv, 1)]);
    assert!(pair.a.publisher.sa(A_IN).is_none());
    conserved(&pair.a);
}

/// DP-3: the two SAs of a bundle find each other whatever the order in which they come and go.
#[test]
fn dp_3_bundles_come_and_go() {
    let options = Options { bundle: true, ..Options::default() };
    let mut pair = Pair::new(Suites::Gcm128, options.clone());
    assert_eq!(pair.a_to_b(&packet()).len(), 1);
    let ah = |id| {
        let mut operations = side(Suites::Gcm128, &options, true);
        let found = operations
            .iter()
            .position(|operation| matches!(operation, Operation::InstallSa(c) if c.id == id));
        operations.remove(found.unwrap())
    };
    install(&mut pair.a, vec![Operation::RemoveSa(A_AH_OUT)]);
    assert!(pair.protect(&packet()).is_empty());
    dropped(&pair.a, DropReason::BundleMissing, 1);
    // Another AH SA in the freed place is not the bundle's.
    let mut operations = side(Suites::AhSha1, &Options::default(), true);
    let config = sa(&mut operations, A_OUT);
    (config.id, config.pair, config.suite) = (SaId(90), None, Suites::AhSha1.suite(0x90));
    install(&mut pair.a, vec![operations.remove(1)]);
    assert!(pair.protect(&packet()).is_empty());
    dropped(&pair.a, DropReason::BundleMissing, 2);
    install(&mut pair.a, vec![ah(A_AH_OUT)]);
    assert_eq!(pair.a_to_b(&packet()).len(), 1);

    // A rekeyed ESP SA shares the AH SA for a while; both feel its end, both its return.
    let rekeyed = changed(&options, A_IN, |config| {
        (config.id, config.spi, config.pair) = (SaId(91), Translation::same(Spi(0x9191)), None);
    });
    install(&mut pair.a, vec![rekeyed]);
    let back = datagram(false, false, b"back");
    let sealed: Vec<_> = (0..4).map(|_| pair.protect_b(&back).remove(0)).collect();
    assert_eq!(pair.open_a(&sealed[0]).len(), 1);
    install(&mut pair.a, vec![Operation::RemoveSa(SaId(91)), Operation::RemoveSa(A_AH_IN)]);
    assert!(pair.open_a(&sealed[1]).is_empty());
    let bare = ip_packet(outer(false).1, outer(false).0, Protocol::ESP, 0, &sealed[2][48..]);
    assert!(pair.open_a(&bare).is_empty());
    assert_eq!((pair.a.drops(DropReason::UnknownSpi), pair.a.drops(DropReason::BundleMissing)), (1, 3));
    install(&mut pair.a, vec![ah(A_AH_IN)]);
    assert_eq!(pair.open_a(&sealed[3]).len(), 1);
    conserved(&pair.a);
}

/// MOB-2: a pair is one only while both name each other.
#[test]
fn mob_2_pairs_come_and_go() {
    let options = Options { follow: true, ..Options::default() };
    let mut pair = Pair::new(Suites::Gcm128, options.clone());
    let elsewhere = ip("203.0.113.50");
    let from_elsewhere = |pair: &mut Pair| {
        let sealed = pair.protect_b(&datagram(false, false, b"x")).remove(0);
        let mut moved = sealed;
        postern_datapath::header::set_addresses(&mut moved, elsewhere, outer(false).0).unwrap();
        assert_eq!(pair.open_a(&moved).len(), 1);
    };
    let goes_to =
        |pair: &mut Pair| postern_datapath::header::destination(&pair.protect(&packet())[0]).unwrap();
    // The outbound SA turns to another partner: its old one moves it no more.
    let turned = changed(&options, A_OUT, |config| config.pair = Some(SaId(77)));
    install(&mut pair.a, vec![turned]);
    from_elsewhere(&mut pair);
    assert_eq!(goes_to(&mut pair), outer(false).1);
    assert_eq!(pair.a.events(), [Event::NewPath { sa: A_IN, remote: elsewhere, port: None }]);
    // The new partner comes and does.
    let partner = changed(&options, A_IN, |config| {
        (config.id, config.spi, config.pair) = (SaId(77), Translation::same(Spi(0x7777)), Some(A_OUT));
    });
    install(&mut pair.a, vec![partner]);
    let mut sealed = pair.protect_b(&datagram(false, false, b"x")).remove(0);
    sealed[20..24].copy_from_slice(&0x7777u32.to_be_bytes());
    assert!(pair.open_a(&sealed).is_empty(), "the ICV covers the SPI");
    assert_eq!(goes_to(&mut pair), outer(false).1);
    install(&mut pair.a, vec![Operation::RemoveSa(SaId(77))]);
    assert_eq!(goes_to(&mut pair), outer(false).1);
}

/// DP-7: the whole inventory, page by page, in order, each thing once.
#[test]
fn dp_7_inventory_pages() {
    const COUNT: u64 = 1100;
    let mut pair = Pair::with(Suites::Gcm128, Options { workers: 2, ..Options::default() }, |_, _| {});
    let mut operations =
        vec![Operation::RemoveSa(A_IN), Operation::RemoveSa(A_OUT), Operation::RemovePolicy(POLICY)];
    for n in 0..COUNT {
        let low = u32::try_from(n).unwrap();
        let operation = changed(&Options::default(), if n % 2 == 0 { A_IN } else { A_OUT }, |config| {
            (config.id, config.pair) = (SaId(n * 3), None);
            config.spi = Translation::same(Spi(0x10_0000 + low));
            let mut key = vec![0; 20];
            key[..4].copy_from_slice(&low.to_be_bytes());
            config.suite.encryption_key = Secret::new(key);
        });
        operations.push(operation);
        operations.push(Operation::InstallPolicy(Policy {
            id: PolicyId(n * 5),
            generation: Generation(1),
            priority: 1,
            selectors: vec![selector("10.1.0.0/24", "10.9.0.0/16")],
            action: Action::Discard,
        }));
        let partition = |address: &str, to_relay| Partition {
            relay: ip(address),
            peer: ip("203.0.113.1"),
            encap: None,
            esp: Some(SpiPair { to_relay: Spi(to_relay), from_relay: Spi(0x30_0000) }),
            ah: None,
        };
        operations.push(Operation::InstallRelay(RelayEntry {
            id: RelayId(n * 7),
            generation: Generation(1),
            client: partition("192.0.2.10", 0x20_0000 + low),
            gateway: partition("198.51.100.10", 0x20_0000 + low),
        }));
    }
    install(&mut pair.a, operations);
    assert_eq!(pair.a.publisher.counts(), (COUNT, COUNT, COUNT));
    let (mut sas, mut policies, mut relays, mut pages) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut after: Option<Cursor> = None;
    loop {
        let page = pair.a.publisher.page(after);
        sas.extend(page.sas.iter().map(|report| report.id.0));
        policies.extend(page.policies.iter().map(|policy| policy.id.0));
        relays.extend(page.relays.iter().map(|report| report.entry.id.0));
        pages += 1;
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert!(pages < 40);
    assert_eq!(sas, (0..COUNT).map(|n| n * 3).collect::<Vec<_>>());
    assert_eq!(policies, (0..COUNT).map(|n| n * 5).collect::<Vec<_>>());
    assert_eq!(relays, (0..COUNT).map(|n| n * 7).collect::<Vec<_>>());
    // All of it goes again, and nothing stays behind in a worker.
    let all = (0..COUNT).flat_map(|n| {
        [
            Operation::RemoveSa(SaId(n * 3)),
            Operation::RemovePolicy(PolicyId(n * 5)),
            Operation::RemoveRelay(RelayId(n * 7)),
        ]
    });
    install(&mut pair.a, all.collect());
    assert_eq!(pair.a.publisher.counts(), (0, 0, 0));
    for worker in pair.a.workers.borrow().iter() {
        let core = &worker.core;
        assert_eq!(
            (core.inbound.len(), core.outbound.len(), core.relays.len(), core.spd.len()),
            (0, 0, 0, 0)
        );
    }
}

/// What XDP is told of policies: each prefix as often as policies name it, for it to count, and their ends.
#[test]
fn dp_1_prefixes_to_steer() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap();
    let changes = pair.a.publisher.steer_changes();
    assert_eq!((changes.added, changes.removed), (vec![net("10.2.0.0/24")], vec![]));
    let policy = |id, action| {
        Operation::InstallPolicy(Policy {
            id: PolicyId(id),
            generation: Generation(1),
            priority: 1,
            selectors: vec![selector("10.1.0.0/24", "10.2.0.0/24"), selector("10.1.0.0/24", "10.4.0.0/16")],
            action,
        })
    };
    install(&mut pair.a, vec![policy(5, Action::Discard)]);
    assert_eq!(pair.a.publisher.steer_changes().added, [net("10.2.0.0/24"), net("10.4.0.0/16")]);
    install(&mut pair.a, vec![Operation::RemovePolicy(POLICY)]);
    assert_eq!(pair.a.publisher.steer_changes().removed, [net("10.2.0.0/24")]);
    install(
        &mut pair.a,
        vec![
            Operation::RemovePolicy(PolicyId(5)),
            policy(6, Action::Protect(None)),
            policy(7, Action::Bypass),
        ],
    );
    assert_eq!(pair.a.publisher.steer_changes(), postern_datapath::publish::SteerChanges::default());
    install(&mut pair.a, vec![Operation::RemovePolicy(PolicyId(6))]);
    let removed = pair.a.publisher.steer_changes().removed;
    assert_eq!(removed.len(), 2);
}
