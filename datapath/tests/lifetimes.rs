//! Soft and hard limits in packets, bytes and seconds, both directions (DP-4).
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
use postern_contract::Generation;
use postern_contract::counters::DropReason;
use postern_contract::event::{Event, LimitKind};
use postern_contract::request::Operation;
use postern_contract::sa::{Lifetime, Limits, SaId};

fn packets(count: u64) -> Limits {
    Limits { packets: Some(count), ..Limits::default() }
}

fn bytes(count: u64) -> Limits {
    Limits { bytes: Some(count), ..Limits::default() }
}

fn seconds(count: u64) -> Limits {
    Limits { seconds: Some(count), ..Limits::default() }
}

/// A pair in which only one SA of one side has limits.
fn pair(limited: (SaId, bool), soft: Limits, hard: Limits) -> Pair {
    let (id, on_a) = limited;
    Pair::with(Suites::Gcm128, Options::default(), |operations, a| {
        if a == on_a {
            sa(operations, id).lifetime = Lifetime { soft, hard };
        }
    })
}

fn packet() -> Vec<u8> {
    datagram(false, true, &[7; 72])
}

const LEN: u64 = 100;

fn soft(sa: SaId, kind: LimitKind) -> Event {
    Event::SoftLimit { sa, kind }
}

fn hard(sa: SaId, kind: LimitKind) -> Event {
    Event::HardLimit { sa, kind }
}

/// DP-4: limits of an outbound SA in packets and bytes: one event each, the packet that would exceed the hard limit and
/// all after it are counted as `lifetime_expired`.
#[test]
fn dp_4_outbound_counts() {
    let cases = [
        (packets(2), packets(4), LimitKind::Packets),
        (bytes(2 * LEN), bytes(4 * LEN), LimitKind::Bytes),
        (bytes(LEN + 1), bytes(5 * LEN - 1), LimitKind::Bytes),
    ];
    for (soft_limit, hard_limit, kind) in cases {
        let mut pair = pair((A_OUT, true), soft_limit, hard_limit);
        assert_eq!(pair.a_to_b(&packet()).len(), 1);
        assert_eq!(pair.a.events(), []);
        assert_eq!(pair.a_to_b(&packet()).len(), 1);
        assert_eq!(pair.a.events(), [soft(A_OUT, kind)]);
        assert_eq!(pair.a_to_b(&packet()).len(), 1);
        assert_eq!(pair.a_to_b(&packet()).len(), 1);
        assert_eq!(pair.a.events(), []);
        for _ in 0..3 {
            assert!(pair.protect(&packet()).is_empty());
        }
        assert_eq!(pair.a.events(), [hard(A_OUT, kind)], "once");
        dropped(&pair.a, DropReason::LifetimeExpired, 3);
        let report = pair.a.publisher.sa(A_OUT).unwrap();
        assert!(report.stopped);
        assert_eq!((report.counters.packets, report.counters.bytes), (4, 4 * LEN));
        assert_eq!(report.counters.drops, [(DropReason::LifetimeExpired, 3)]);
    }
}

/// DP-4: the same of an inbound SA; its bytes are those of the protected payload.
#[test]
fn dp_4_inbound_counts() {
    for (soft_limit, hard_limit, kind) in
        [(packets(2), packets(4), LimitKind::Packets), (bytes(2 * LEN - 2), bytes(4 * LEN), LimitKind::Bytes)]
    {
        let mut pair = pair((A_IN, false), soft_limit, hard_limit);
        for _ in 0..4 {
            assert_eq!(pair.a_to_b(&packet()).len(), 1);
        }
        assert_eq!(pair.b.events(), [soft(A_IN, kind)]);
        for _ in 0..3 {
            assert!(pair.a_to_b(&packet()).is_empty());
        }
        assert_eq!(pair.b.events(), [hard(A_IN, kind)]);
        dropped(&pair.b, DropReason::LifetimeExpired, 3);
        assert!(pair.b.publisher.sa(A_IN).unwrap().stopped);
    }
}

/// DP-4: forged packets use up nothing.
#[test]
fn dp_4_forged_packets_do_not_count() {
    let mut pair = pair((A_IN, false), Limits::default(), packets(1));
    let sealed = pair.protect(&packet()).remove(0);
    let mut forged = sealed.clone();
    *forged.last_mut().unwrap() ^= 1;
    for _ in 0..5 {
        assert!(pair.open_b(&forged).is_empty());
    }
    assert_eq!(pair.open_b(&sealed).len(), 1);
    dropped(&pair.b, DropReason::BadIcv, 5);
    assert_eq!(pair.b.events(), []);
}

/// DP-4: limits in seconds, counted from the installation, of both directions, without a packet.
#[test]
fn dp_4_seconds() {
    for (limited, id) in [((A_OUT, true), A_OUT), ((A_IN, false), A_IN)] {
        let mut pair = pair(limited, seconds(10), seconds(20));
        let on_a = limited.1;
        let advance = |pair: &mut Pair, by| {
            let bed = if on_a { &mut pair.a } else { &mut pair.b };
            bed.advance(Duration::from_secs(by));
            bed.events()
        };
        assert_eq!(advance(&mut pair, 9), []);
        assert_eq!(advance(&mut pair, 1), [soft(id, LimitKind::Seconds)]);
        assert_eq!(pair.a_to_b(&packet()).len(), 1);
        assert_eq!(advance(&mut pair, 9), []);
        assert_eq!(pair.a_to_b(&packet()).len(), 1);
        assert_eq!(advance(&mut pair, 1), [hard(id, LimitKind::Seconds)]);
        assert!(pair.a_to_b(&packet()).is_empty());
        assert_eq!(advance(&mut pair, 100), []);
        dropped(if on_a { &pair.a } else { &pair.b }, DropReason::LifetimeExpired, 1);
    }
}

/// DP-4: other limits in seconds for an installed SA count from its installation, and the old ones are void.
#[test]
fn dp_4_replaced_seconds() {
    let mut pair = pair((A_OUT, true), seconds(10), seconds(20));
    pair.a.advance(Duration::from_secs(5));
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    let config = sa(&mut operations, A_OUT);
    config.generation = Generation(2);
    config.lifetime = Lifetime { soft: seconds(40), hard: seconds(50) };
    operations.retain(|operation| matches!(operation, Operation::InstallSa(config) if config.id == A_OUT));
    install(&mut pair.a, operations);
    pair.a.advance(Duration::from_secs(34));
    assert_eq!(pair.a.events(), []);
    pair.a.advance(Duration::from_secs(1));
    assert_eq!(pair.a.events(), [soft(A_OUT, LimitKind::Seconds)]);
    assert_eq!(pair.a_to_b(&packet()).len(), 1);
    pair.a.advance(Duration::from_secs(10));
    assert_eq!(pair.a.events(), [hard(A_OUT, LimitKind::Seconds)]);
    assert!(pair.protect(&packet()).is_empty());
    dropped(&pair.a, DropReason::LifetimeExpired, 1);
}

/// DP-4: an SA that was removed has no limits left, also when another one takes its id.
#[test]
fn dp_4_limits_end_with_the_sa() {
    let mut pair = pair((A_OUT, true), seconds(10), seconds(20));
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    operations.insert(0, Operation::RemoveSa(A_OUT));
    operations.insert(0, Operation::RemoveSa(A_IN));
    for result in pair.a.apply(operations) {
        result.unwrap();
    }
    pair.a.advance(Duration::from_mins(1));
    assert_eq!(pair.a.events(), []);
    assert_eq!(pair.a_to_b(&packet()).len(), 1);
    pair.clean();
}
