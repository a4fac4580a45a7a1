//! Several workers: packets find the worker that owns their SA, in order, and no frame is lost (DP-2, DP-8).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use common::*;
use postern_contract::Translation;
use postern_contract::counters::DropReason;
use postern_contract::request::Operation;
use postern_contract::sa::{Action, Policy, PolicyId, SaId};
use postern_datapath::testbed::{INSIDE_MAC, OUTSIDE_MAC, frame};
use postern_wire::esp;
use postern_wire::ids::Spi;

const TUNNELS: u16 = 12;

/// Tunnels between A and B, one for each inner network 10.1.n.0/24 ↔ 10.2.n.0/24, on both sides.
fn tunnels(a: bool, workers: usize) -> Vec<Operation> {
    let mut operations = Vec::new();
    for n in 0..TUNNELS {
        let mut all = side(Suites::Gcm128, &Options::default(), a);
        let (net_a, net_b) = (format!("10.1.{n}.0/24"), format!("10.2.{n}.0/24"));
        let selectors = vec![if a { selector(&net_a, &net_b) } else { selector(&net_b, &net_a) }];
        let (out, inn) = (SaId(100 + u64::from(n)), SaId(200 + u64::from(n)));
        for (id, new, pair) in [(A_OUT, out, inn), (A_IN, inn, out)] {
            let config = sa(&mut all, id);
            (config.id, config.pair) = (new, Some(pair));
            let base = config.spi.on_wire.0 * 0x100;
            config.spi = Translation::same(Spi(base + u32::from(n)));
            let from_a = (id == A_OUT) == a;
            config.suite = Suites::Gcm128.suite(u8::try_from(n).unwrap() + if from_a { 0x20 } else { 0x60 });
            config.selectors.clone_from(&selectors);
            config.worker = Some(n % u16::try_from(workers).unwrap());
        }
        all.truncate(2);
        operations.extend(all);
        operations.push(Operation::InstallPolicy(Policy {
            id: PolicyId(u64::from(n)),
            generation: postern_contract::Generation(1),
            priority: 1,
            selectors,
            action: Action::Protect(Some(out)),
        }));
    }
    operations
}

fn pair(workers: usize) -> Pair {
    let options = Options { workers, frames: 4096, ..Options::default() };
    Pair::with(Suites::Gcm128, options, |operations, a| {
        *operations = tunnels(a, workers);
    })
}

/// A packet of tunnel `n` with a running number in its payload.
fn packet(n: u16, number: u32) -> Vec<u8> {
    udp4(&format!("10.1.{n}.2"), &format!("10.2.{n}.2"), 1, 2, &number.to_be_bytes())
}

/// DP-2: every packet comes in at some worker and is opened by the owner of its SA, once, in the order in which it came.
#[test]
fn dp_2_hand_off() {
    for workers in [2, 3] {
        let mut pair = pair(workers);
        // B's hosts 10.2.n.2 have no neighbour entries: the far side is looked at on the counters and on A's wire.
        let mut numbers = vec![0u32; usize::from(TUNNELS)];
        let mut sealed = Vec::new();
        for round in 0..50u32 {
            for n in 0..TUNNELS {
                // All of one tunnel's packets come in at one queue, as a NIC's hash sees to; not its owner's as a rule.
                let queue = usize::from(n / 2) % workers;
                pair.a.inside[queue].push(&frame(INSIDE_MAC, &packet(n, round)));
            }
            if round % 7 == 0 {
                sealed.extend(pair.a.departed().0);
            }
        }
        sealed.extend(pair.a.departed().0);
        assert_eq!(sealed.len(), 50 * usize::from(TUNNELS));
        pair.clean();
        for packet in &sealed {
            let header = esp::Header::parse(&packet[20..]).unwrap();
            let n = usize::try_from(header.spi.0 & 0xff).unwrap();
            numbers[n] += 1;
            assert_eq!(header.sequence, numbers[n], "the order of tunnel {n}");
        }
        let handed: u64 =
            pair.a.workers.borrow().iter().map(|worker| worker.core.cells.handed_off.get()).sum();
        assert!(handed > 100, "{handed}");

        // Inbound, spread without regard to the SA.
        for (place, packet) in sealed.iter().enumerate() {
            pair.b.outside[place % workers].push(&frame(OUTSIDE_MAC, packet));
        }
        pair.b.settle();
        for n in 0..TUNNELS {
            let report = pair.b.publisher.sa(SaId(200 + u64::from(n))).unwrap();
            assert_eq!((report.counters.packets, report.counters.sequence), (50, 50), "tunnel {n}");
            assert_eq!(report.worker, n % u16::try_from(workers).unwrap());
        }
        // A replay is one wherever it comes in.
        for worker in 0..workers {
            pair.b.outside[worker].push(&frame(OUTSIDE_MAC, &sealed[0]));
        }
        pair.b.settle();
        assert_eq!(pair.b.drops(DropReason::ReplayDuplicate), workers as u64);
        assert_eq!(pair.b.missing_frames(), 0);
        // Two directions at once for A.
        assert_eq!(pair.a.missing_frames(), 0);
    }
}

/// DP-2: a full ring between workers drops by name and loses no frame.
#[test]
fn dp_2_full_hand_off_ring() {
    let mut pair = pair(2);
    // Worker 0 gets packets of tunnel 1, which worker 1 owns, and worker 1 does not turn.
    let now = *pair.a.now.borrow();
    for round in 0..2000 {
        pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(1, round)));
        if round % 64 == 63 {
            pair.a.workers.borrow_mut()[0].turn(now);
        }
    }
    pair.a.workers.borrow_mut()[0].turn(now);
    let full = pair.a.drops(DropReason::HandoffFull);
    assert!(full > 500, "{full}");
    let sealed = pair.a.departed().0;
    assert_eq!(sealed.len() as u64 + full, 2000);
    conserved(&pair.a);
}

/// DP-2: under load from all sides, in and out, forged and good, with changes of the tables between turns.
#[test]
fn dp_2_everything_at_once() {
    let mut pair = pair(3);
    let mut good = Vec::new();
    for round in 0..20 {
        for n in 0..TUNNELS {
            pair.a.inside[usize::from(n) % 3].push(&frame(INSIDE_MAC, &packet(n, round)));
        }
    }
    good.extend(pair.a.departed().0);
    for (place, packet) in good.iter().enumerate() {
        let mut packet = packet.clone();
        if place % 3 == 0 {
            *packet.last_mut().unwrap() ^= 1;
        }
        pair.b.outside[(place + 1) % 3].push(&frame(OUTSIDE_MAC, &packet));
        if place % 40 == 0 {
            let n = u16::try_from(place / 40).unwrap() % TUNNELS;
            let ids = [SaId(100 + u64::from(n)), SaId(200 + u64::from(n))];
            install(&mut pair.b, ids.map(Operation::RemoveSa).into());
        }
    }
    pair.b.settle();
    let received: u64 = {
        let workers = pair.b.workers.borrow();
        workers.iter().map(|worker| worker.core.cells.ports[0].received.get()).sum()
    };
    assert_eq!(received, good.len() as u64);
    let page = pair.b.publisher.page(None);
    let opened: u64 = page.sas.iter().map(|report| report.counters.packets).sum();
    assert!(opened > 0 && opened < received);
    assert_eq!(pair.b.missing_frames(), 0);
    assert!(pair.b.drops(DropReason::BadIcv) > 0 && pair.b.drops(DropReason::UnknownSpi) > 0);
}
