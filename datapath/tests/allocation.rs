//! DP-2: in steady state nothing on the packet's way allocates, whatever becomes of the packet.
//!
//! The memory port's buffers and the tables' own pages are there after a warm-up; allocations are counted on this thread.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use allocation_counter::{AllocationInfo, measure};
use arrayvec::ArrayVec;
use common::*;
use postern_contract::Generation;
use postern_contract::counters::DropReason;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::request::Operation;
use postern_contract::sa::{FanOut, Mode};
use postern_datapath::crypto::{
    Engine, EspKey, Layout, OpenOp, Outcome, SealOp, SealOutcome, SequenceCounter,
};
use postern_datapath::fanout::PATIENCE;
use postern_datapath::testbed::{INSIDE_MAC, OUTSIDE_MAC, Testbed, frame};
use postern_wire::ids::{Protocol, Spi};

/// Turns all workers so often and counts what they allocate.
fn turns(bed: &Testbed, count: usize) -> AllocationInfo {
    let now = *bed.now.borrow();
    let mut workers = bed.workers.borrow_mut();
    measure(|| {
        for _ in 0..count {
            for worker in workers.iter_mut() {
                worker.turn(now);
            }
        }
    })
}

fn transmitted(bed: &Testbed) -> u64 {
    let handles = bed.outside.iter().chain(&bed.inside).chain(&bed.host);
    handles.map(|handle| handle.transmitted().0).sum()
}

/// After a warm-up, turns over these packets allocate nothing; gives how many packets were transmitted meanwhile.
#[track_caller]
fn steady(bed: &Testbed, what: &str) -> u64 {
    for handle in bed.outside.iter().chain(&bed.inside).chain(&bed.host) {
        handle.discard(true);
    }
    turns(bed, 20);
    let before = (transmitted(bed), bed.all_drops());
    let info = turns(bed, 20);
    let after = (transmitted(bed), bed.all_drops());
    assert!(after != before, "{what}: nothing happened");
    assert_eq!((info.count_total, info.bytes_total), (0, 0), "{what}");
    after.0 - before.0
}

/// Frames of 64 packets per turn, made by `packet`.
fn frames(mac: postern_wire::ether::Mac, count: usize, mut packet: impl FnMut() -> Vec<u8>) -> Vec<Vec<u8>> {
    (0..count).map(|_| frame(mac, &packet())).collect()
}

/// DP-2: outbound and inbound, every suite, with bundle and in transport mode.
#[test]
fn dp_2_protect_and_open() {
    for suite in ALL_SUITES {
        for (bundle, mode) in [(false, Mode::Tunnel), (false, Mode::Transport), (true, Mode::Tunnel)] {
            if bundle && suite.is_ah() {
                continue;
            }
            let name = format!("{suite:?} {bundle} {mode:?}");
            let mut pair = Pair::new(suite, Options { bundle, mode, ..Options::default() });
            let packet = match mode {
                Mode::Tunnel => datagram(false, true, &[1; 200]),
                Mode::Transport => udp4("192.0.2.1", "198.51.100.1", 1, 2, &[1; 200]),
            };
            let sealed = frames(OUTSIDE_MAC, 40 * 64, || pair.protect(&packet).remove(0));
            if mode == Mode::Tunnel {
                pair.a.inside[0].repeat(frames(INSIDE_MAC, 3, || packet.clone()));
            } else {
                pair.a.host[0].repeat(vec![packet.clone()]);
            }
            assert_eq!(steady(&pair.a, &format!("seal {name}")), 20 * 64);
            pair.b.outside[0].repeat(sealed);
            assert_eq!(steady(&pair.b, &format!("open {name}")), 20 * 64);
            assert_eq!(pair.a.all_drops() + pair.b.all_drops(), 0);
        }
    }
}

/// DP-2: packets that are dropped, each for its reason.
#[test]
fn dp_2_drops() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let packet = datagram(false, true, &[1; 200]);
    let sealed = pair.protect(&packet).remove(0);
    let mut forged = pair.protect(&packet).remove(0);
    *forged.last_mut().unwrap() ^= 1;
    let mut unknown = sealed.clone();
    unknown[20] ^= 0x40;
    let mut fragment = sealed.clone();
    postern_wire::ip4::set_fragment(&mut fragment, None, 64, true).unwrap();
    let cases = [
        (sealed, DropReason::ReplayDuplicate),
        (forged, DropReason::BadIcv),
        (unknown, DropReason::UnknownSpi),
        (fragment, DropReason::Fragment),
        (vec![0x45; 30], DropReason::Malformed),
    ];
    for (packet, reason) in cases {
        pair.b.outside[0].repeat(vec![frame(OUTSIDE_MAC, &packet)]);
        let before = pair.b.drops(reason);
        steady(&pair.b, reason.label());
        assert!(pair.b.drops(reason) > before + 1000, "{}", reason.label());
    }
    pair.b.outside[0].repeat(Vec::new());
    for (packet, reason) in [
        (udp4("10.1.0.2", "172.16.0.1", 1, 2, b"x"), DropReason::NoPolicy),
        (routed(&packet, 63), DropReason::TtlExpired),
        (datagram(false, true, &[0; 1472]), DropReason::TooBig),
    ] {
        pair.a.inside[0].repeat(vec![frame(INSIDE_MAC, &packet)]);
        let before = pair.a.drops(reason);
        steady(&pair.a, reason.label());
        assert!(pair.a.drops(reason) > before + 1000, "{}", reason.label());
    }
}

/// DP-2: fragments, of inner packets and of outer ones.
#[test]
fn dp_2_fragments() {
    let pair = Pair::new(Suites::Gcm128, Options::default());
    let mut packet = datagram(false, true, &[1; 1472]);
    packet[6] = 0;
    packet[10..12].fill(0);
    let check = postern_wire::checksum::finish(postern_wire::checksum::sum(&packet[..20]));
    packet[10..12].copy_from_slice(&check.to_be_bytes());
    pair.a.inside[0].repeat(vec![frame(INSIDE_MAC, &packet)]);
    assert_eq!(steady(&pair.a, "fragments"), 2 * 20 * 64);
}

/// DP-2: translation by the relay.
#[test]
fn dp_2_relay() {
    let pair = Pair::new(Suites::Gcm128, Options::default());
    let mut relay = pair.b;
    let partition = |relay: &str, peer: &str, to_relay, from_relay| Partition {
        relay: ip(relay),
        peer: ip(peer),
        encap: None,
        esp: Some(SpiPair { to_relay: Spi(to_relay), from_relay: Spi(from_relay) }),
        ah: None,
    };
    install(
        &mut relay,
        vec![Operation::InstallRelay(RelayEntry {
            id: RelayId(1),
            generation: Generation(1),
            client: partition("198.51.100.1", "192.0.2.1", 0x5001, 0x5002),
            gateway: partition("198.51.100.1", "203.0.113.1", 0x5003, 0x5004),
        })],
    );
    let mut payload = vec![0x77; 100];
    payload[..4].copy_from_slice(&0x5001u32.to_be_bytes());
    let packet = ip_packet(ip("192.0.2.1"), ip("198.51.100.1"), Protocol::ESP, 0, &payload);
    relay.outside[0].repeat(vec![frame(OUTSIDE_MAC, &packet)]);
    assert_eq!(steady(&relay, "relay"), 20 * 64);
}

/// DP-2: between workers.
#[test]
fn dp_2_hand_off() {
    let pair = Pair::with(Suites::Gcm128, Options { workers: 2, ..Options::default() }, |operations, _| {
        for id in [A_IN, A_OUT] {
            sa(operations, id).worker = Some(1);
        }
    });
    pair.a.inside[0].repeat(vec![frame(INSIDE_MAC, &datagram(false, true, &[1; 100]))]);
    assert_eq!(steady(&pair.a, "hand-off"), 20 * 64);
    let handed = pair.a.workers.borrow()[0].core.cells.handed_off.get();
    assert_eq!(handed, 40 * 64);
}

/// DP-2: more SAs than a worker keeps expanded keys of: each packet finds its key gone and expands it.
#[test]
fn dp_2_keys_that_make_room() {
    let mut engine = Engine::select(postern_datapath::testbed::backend(), 16).unwrap();
    for suite in ALL_SUITES.into_iter().filter(|suite| !suite.is_ah()) {
        let keys: Vec<EspKey> = (0..128).map(|seed| EspKey::new(&suite.suite(seed)).unwrap()).collect();
        let Layout { iv_len, icv_len, .. } = keys[0].layout();
        let mut packet = vec![0x5a; 8 + usize::from(iv_len) + 64 + usize::from(icv_len)];
        let mut counter = SequenceCounter::new(1, u64::MAX, true);
        let info = measure(|| {
            for key in &keys {
                let mut ops = ArrayVec::<SealOp<'_>, 1>::new();
                let sequence = counter.reserve().unwrap();
                ops.push(SealOp { key: key.into(), sequence, esn: true, packet: &mut packet });
                assert_eq!(engine.seal(ops)[..], [SealOutcome::Sealed]);
                let op = OpenOp {
                    key: key.into(),
                    sequence: counter.last(),
                    esn: true,
                    packet: &mut packet,
                    outcome: Outcome::Pending,
                };
                let mut ops = [op];
                engine.open(&mut ops);
                assert_eq!(ops[0].outcome, Outcome::Opened);
            }
            keys.iter().filter_map(EspKey::serial).for_each(|serial| engine.forget(serial));
        });
        assert_eq!((info.count_total, info.bytes_total), (0, 0), "{suite:?}");
    }
}

/// DP-2, DP-8: packets that other workers seal and open, with the worker that helps counted as well; and a helper that
/// keeps a job until it is passed over.
#[test]
fn dp_2_fan_out() {
    let options = Options { workers: 2, frames: 4096, ..Options::default() };
    let mut pair = Pair::with(Suites::Gcm128, options, |operations, _| {
        for id in [A_IN, A_OUT] {
            (sa(operations, id).worker, sa(operations, id).fan_out) = (Some(0), FanOut::Always);
        }
    });
    let packet = datagram(false, true, &[1; 200]);
    let sealed = frames(OUTSIDE_MAC, 120 * 64, || pair.protect(&packet).remove(0));
    for bed in [&pair.a, &pair.b] {
        // Until the other worker counts as one with nothing to do.
        turns(bed, 64);
    }
    let helped = |bed: &Testbed| bed.workers.borrow()[1].core.cells.helped.get();
    let (before_a, before_b) = (helped(&pair.a), helped(&pair.b));
    pair.a.inside[0].repeat(frames(INSIDE_MAC, 3, || packet.clone()));
    steady(&pair.a, "fan out, seal");
    pair.b.outside[0].repeat(sealed);
    steady(&pair.b, "fan out, open");
    assert!(helped(&pair.a) > before_a + 1000 && helped(&pair.b) > before_b + 1000);
    assert_eq!(pair.a.all_drops() + pair.b.all_drops(), 0);

    let exchange = pair.a.workers.borrow()[0].core.fan.exchange().clone();
    let now = *pair.a.now.borrow();
    let mut stalled = None;
    let info = measure(|| {
        for worker in pair.a.workers.borrow_mut().iter_mut() {
            worker.turn(now);
            stalled = stalled.take().or_else(|| exchange.take_job(0));
        }
        for turn in 0..40 {
            for worker in pair.a.workers.borrow_mut().iter_mut() {
                worker.turn(now + PATIENCE * turn / 10);
            }
        }
    });
    assert!(stalled.is_some());
    assert_eq!((info.count_total, info.bytes_total), (0, 0), "a helper that stalls");
    exchange.put_back(stalled.unwrap());
    pair.a.inside[0].repeat(Vec::new());
    pair.a.settle();
    assert_eq!(pair.a.missing_frames(), 0);
}
