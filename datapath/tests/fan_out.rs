//! One SA on several workers: order, losses, and tables that change while packets are out (DP-8).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use postern_contract::Generation;
use postern_contract::counters::DropReason;
use postern_contract::request::Operation;
use postern_contract::sa::{FanOut, Mode};
use postern_contract::settings::Idle;
use postern_datapath::crypto::Engine;
use postern_datapath::fanout::{Job, PATIENCE, Tools};
use postern_datapath::testbed::{INSIDE_MAC, OUTSIDE_MAC, Testbed, frame};
use postern_datapath::worker::Clock;
use postern_wire::ids::Protocol;
use postern_wire::{esp, ip4};

/// Enough turns without packets that a worker counts as idle.
const QUIET: usize = 64;

fn pair_with(suite: Suites, options: Options, fan_out: FanOut) -> Pair {
    let pair = Pair::with(suite, options, |operations, _| {
        for id in [A_IN, A_OUT] {
            let config = sa(operations, id);
            (config.worker, config.fan_out) = (Some(0), fan_out);
        }
    });
    for bed in [&pair.a, &pair.b] {
        turns(bed, QUIET, |n| n % 2);
    }
    pair
}

fn pair(fan_out: FanOut) -> Pair {
    pair_with(Suites::Gcm128, Options { workers: 2, frames: 8192, ..Options::default() }, fan_out)
}

/// Turns one worker after the other, as `which` says.
fn turns(bed: &Testbed, count: usize, mut which: impl FnMut(usize) -> usize) {
    let now = *bed.now.borrow();
    for n in 0..count {
        let mut workers = bed.workers.borrow_mut();
        let worker = which(n) % workers.len();
        workers[worker].turn(now);
    }
}

/// A small generator of numbers.
fn random(mut state: u64) -> impl FnMut(usize) -> usize {
    move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 40).unwrap()
    }
}

fn packet(number: u32) -> Vec<u8> {
    let mut payload = [0x33; 90];
    payload[..4].copy_from_slice(&number.to_be_bytes());
    udp4("10.1.0.2", "10.2.0.2", 1, 2, &payload[..4 + number as usize % 80])
}

fn number_in(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[28..32].try_into().unwrap())
}

fn sequence(packet: &[u8]) -> u32 {
    esp::Header::parse(&packet[20..]).unwrap().sequence
}

/// What left, without link headers.
fn left(handles: &[postern_datapath::port::memory::MemoryHandle]) -> Vec<Vec<u8>> {
    let all = handles.iter().flat_map(postern_datapath::port::memory::MemoryHandle::take_all);
    all.map(|frame| frame[14..].to_vec()).collect()
}

fn helped(bed: &Testbed, worker: usize) -> u64 {
    bed.workers.borrow()[worker].core.cells.helped.get()
}

#[track_caller]
fn balanced(bed: &Testbed) {
    let (came, left) = bed.balance();
    assert_eq!(came, left, "packets that came or were made, and that left or were dropped");
    assert_eq!(bed.missing_frames(), 0);
}

/// DP-8: whoever turns when, packets leave in the order of their numbers and none is lost; and what they carry is accepted
/// and delivered in that order at the other end.
#[test]
fn dp_8_order_in_both_directions() {
    for suite in [Suites::Gcm128, Suites::ChaCha, Suites::CbcSha256, Suites::NullSha256] {
        let options = Options { workers: 2, frames: 8192, ..Options::default() };
        let mut pair = pair_with(suite, options, FanOut::Always);
        let mut dice = random(7);
        let (mut pushed, mut sealed) = (0, Vec::new());
        for round in 0..60 {
            for _ in 0..dice(0) % 150 {
                pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(pushed)));
                pushed += 1;
            }
            turns(&pair.a, round % 7, &mut dice);
        }
        sealed.extend(pair.a.departed().0);
        assert_eq!(sealed.len(), usize::try_from(pushed).unwrap(), "{suite:?}");
        for (place, packet) in sealed.iter().enumerate() {
            assert_eq!(sequence(packet) as usize, place + 1, "{suite:?}");
        }
        assert!(helped(&pair.a, 1) > 100, "{suite:?}: {}", helped(&pair.a, 1));
        balanced(&pair.a);

        for (round, some) in sealed.chunks(100).enumerate() {
            for packet in some {
                pair.b.outside[0].push(&frame(OUTSIDE_MAC, packet));
            }
            turns(&pair.b, round % 5, &mut dice);
        }
        let inner = pair.b.departed().1;
        let numbers: Vec<u32> = inner.iter().map(|packet| number_in(packet)).collect();
        assert_eq!(numbers, (0..pushed).collect::<Vec<u32>>(), "{suite:?}");
        assert!(helped(&pair.b, 1) > 100, "{suite:?}: {}", helped(&pair.b, 1));
        assert_eq!(pair.a.all_drops() + pair.b.all_drops(), 0);
        balanced(&pair.b);
    }
}

/// DP-8: the same on threads of their own, with pauses in which workers fall asleep.
#[test]
fn dp_8_order_on_threads() {
    let mut pair = pair(FanOut::Always);
    let mut dice = random(3);
    let sealed = on_threads(&pair.a, |bed| {
        let mut pushed = 0;
        for round in 0..40 {
            for _ in 0..dice(0) % 300 {
                bed.inside[0].push(&frame(INSIDE_MAC, &packet(pushed)));
                pushed += 1;
            }
            wake(bed);
            wait_until(|| bed.outside[0].transmitted().0 == u64::from(pushed));
            if round % 10 == 9 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        left(&bed.outside)
    });
    assert!(sealed.len() > 1000);
    for (place, packet) in sealed.iter().enumerate() {
        assert_eq!(sequence(packet) as usize, place + 1);
    }
    balanced(&pair.a);
    let inner = on_threads(&pair.b, |bed| {
        for (round, some) in sealed.chunks(200).enumerate() {
            for packet in some {
                bed.outside[0].push(&frame(OUTSIDE_MAC, packet));
            }
            wake(bed);
            wait_until(|| bed.inside[0].transmitted().0 == (200 * (round + 1)).min(sealed.len()) as u64);
        }
        left(&bed.inside)
    });
    let numbers: Vec<u32> = inner.iter().map(|packet| number_in(packet)).collect();
    assert_eq!(numbers, (0..u32::try_from(sealed.len()).unwrap()).collect::<Vec<u32>>());
    balanced(&pair.b);
    assert_eq!(pair.a.all_drops() + pair.b.all_drops(), 0);
    pair.a.settle();
}

/// A port in memory wakes nobody. The owner alone is woken: whom it wants to help it, it wakes itself.
fn wake(bed: &Testbed) {
    bed.publisher.workers()[0].inbox.bell().ring();
}

#[track_caller]
fn wait_until(condition: impl Fn() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < end, "nothing more comes");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Runs the workers of a bed on threads while `body` goes on.
fn on_threads<R>(bed: &Testbed, body: impl FnOnce(&Testbed) -> R) -> R {
    let mut workers = std::mem::take(&mut *bed.workers.borrow_mut());
    let (stop, clock) = (AtomicBool::new(false), Clock::start());
    let result = std::thread::scope(|scope| {
        for worker in &mut workers {
            let stop = &stop;
            scope.spawn(move || worker.run(clock, Idle::Poll, stop));
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(bed)));
        stop.store(true, Ordering::Relaxed);
        for worker in bed.publisher.workers() {
            worker.inbox.bell().wake();
        }
        result
    });
    *bed.workers.borrow_mut() = workers;
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// DP-8, DP-4: a packet and its copy that are out in two jobs at once: the window takes one of them.
#[test]
fn dp_8_replays_in_different_jobs() {
    let mut pair = pair(FanOut::Always);
    for n in 0..64 {
        pair.a.push(postern_datapath::testbed::INSIDE, &packet(n));
    }
    let sealed = pair.a.departed().0;
    for _ in 0..3 {
        for packet in &sealed {
            pair.b.outside[0].push(&frame(OUTSIDE_MAC, packet));
        }
    }
    // No turn of the others, so that all three batches are laid out before one of them is back.
    let exchange = pair.b.workers.borrow()[0].core.fan.exchange().clone();
    let mut jobs = Vec::new();
    for _ in 0..3 {
        // The owner would begin with what lies there.
        turns(&pair.b, 1, |_| 0);
        jobs.extend(exchange.take_job(0));
    }
    assert_eq!(jobs.len(), 3, "three jobs");
    let mut engine = engine();
    // They come back in another order.
    for mut job in jobs.into_iter().rev() {
        work(&pair.b, &mut job, &mut engine);
        exchange.put_back(job);
    }
    let inner = pair.b.departed().1;
    let numbers: Vec<u32> = inner.iter().map(|packet| number_in(packet)).collect();
    assert_eq!(numbers, (0..64).collect::<Vec<u32>>());
    assert_eq!(pair.b.drops(DropReason::ReplayDuplicate), 2 * 64);
    balanced(&pair.b);
}

fn engine() -> Engine {
    Engine::select(postern_datapath::testbed::backend(), 4).unwrap()
}

/// Does a job as a helper does.
fn work(bed: &Testbed, job: &mut Job, engine: &mut Engine) {
    job.work(Tools::of(&mut bed.workers.borrow_mut()[1].core, engine));
}

/// DP-8: a helper that stalls holds up its own packets for a while, and no others for good.
#[test]
fn dp_8_stalled_helper() {
    let mut pair = pair(FanOut::Always);
    let exchange = pair.a.workers.borrow()[0].core.fan.exchange().clone();
    let batch = |pair: &Pair, first: u32| {
        for n in first..first + 64 {
            pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
        }
    };
    batch(&pair, 0);
    turns(&pair.a, 1, |_| 0);
    let mut stalled = exchange.take_job(0).unwrap();
    batch(&pair, 64);
    turns(&pair.a, 20, |n| n % 2);
    assert_eq!(left(&pair.a.outside).len(), 0, "what came later waits");
    *pair.a.now.borrow_mut() += PATIENCE * 2;
    turns(&pair.a, 20, |n| n % 2);
    let later = left(&pair.a.outside);
    assert_eq!((later.len(), sequence(&later[0])), (64, 65));
    // And the owner is never without boxes for good.
    for round in 0..20 {
        batch(&pair, 128 + 64 * round);
        turns(&pair.a, 4, |n| n % 2);
    }
    pair.a.settle();
    assert_eq!(left(&pair.a.outside).len(), 20 * 64);
    // It wakes up.
    work(&pair.a, &mut stalled, &mut engine());
    exchange.put_back(stalled);
    pair.a.settle();
    let late = left(&pair.a.outside);
    assert_eq!((late.len(), sequence(&late[0])), (64, 1));
    assert_eq!(pair.a.all_drops(), 0);
    balanced(&pair.a);
}

/// DP-8: while a helper holds the oldest job, the owner takes in no more than its boxes hold, and loses none of it.
#[test]
fn dp_8_full_desk_is_back_pressure() {
    let mut pair = pair(FanOut::Always);
    let exchange = pair.a.workers.borrow()[0].core.fan.exchange().clone();
    for n in 0..64 * 40 {
        pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
    }
    turns(&pair.a, 1, |_| 0);
    let mut stalled = exchange.take_job(0).unwrap();
    turns(&pair.a, 200, |n| n % 2);
    assert!(pair.a.inside[0].waiting() > 64 * 20, "{}", pair.a.inside[0].waiting());
    assert_eq!(left(&pair.a.outside).len(), 0);
    work(&pair.a, &mut stalled, &mut engine());
    exchange.put_back(stalled);
    pair.a.settle();
    let sealed = left(&pair.a.outside);
    assert_eq!(sealed.len(), 64 * 40);
    assert!(sealed.iter().enumerate().all(|(place, packet)| sequence(packet) as usize == place + 1));
    assert_eq!(pair.a.all_drops(), 0);
    balanced(&pair.a);
}

/// DP-8: an SA that is removed, or replaced by another of the same name, while its packets are out: they are dropped by
/// name, in both directions, and its keys stay with nobody (OPS-4).
#[test]
fn dp_8_removed_while_out() {
    for again in [false, true] {
        let mut pair = pair(FanOut::Always);
        for n in 0..64 {
            pair.a.push(postern_datapath::testbed::INSIDE, &packet(n));
        }
        let sealed = pair.a.departed().0;
        for (bed, is_a) in [(&mut pair.a, true), (&mut pair.b, false)] {
            // Helpers have its keys by now.
            if is_a {
                (0..64).for_each(|n| bed.push(postern_datapath::testbed::INSIDE, &packet(n)));
            } else {
                for packet in &sealed {
                    bed.push(postern_datapath::testbed::OUTSIDE, packet);
                }
            }
            let exchange = bed.workers.borrow()[0].core.fan.exchange().clone();
            turns(bed, 1, |_| 0);
            let mut job = exchange.take_job(0).unwrap();
            install(bed, [A_IN, A_OUT].map(Operation::RemoveSa).into());
            if again {
                let mut operations = side(Suites::Gcm128, &Options::default(), is_a);
                operations.truncate(2);
                for id in [A_IN, A_OUT] {
                    sa(&mut operations, id).suite = Suites::Gcm128.suite(0x70 + u8::from(id == A_IN));
                    sa(&mut operations, id).worker = Some(0);
                }
                install(bed, operations);
            }
            work(bed, &mut job, &mut engine());
            exchange.put_back(job);
            bed.settle();
            assert_eq!(bed.drops(DropReason::SaGone), 64, "{again}");
            balanced(bed);
            turns(bed, 4, |n| n % 2);
            for worker in &*bed.workers.borrow() {
                assert_eq!(worker.core.fan.expanded(), 0, "keys of others");
                assert_eq!(worker.core.crypto.expanded(), 0, "own keys");
            }
        }
    }
}

/// DP-8: a move or another description while packets are out changes nothing for them.
#[test]
fn dp_8_replaced_while_out() {
    let mut pair = pair(FanOut::Always);
    let exchange = pair.a.workers.borrow()[0].core.fan.exchange().clone();
    for fan_out in [FanOut::Always, FanOut::Never] {
        for n in 0..64 {
            pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
        }
        turns(&pair.a, 1, |_| 0);
        let mut job = exchange.take_job(0).unwrap();
        let mut operations = side(Suites::Gcm128, &Options::default(), true);
        operations.truncate(2);
        for id in [A_IN, A_OUT] {
            let config = sa(&mut operations, id);
            (config.worker, config.fan_out) = (Some(0), fan_out);
            config.generation = Generation(if fan_out == FanOut::Always { 2 } else { 3 });
            config.remote = postern_contract::Translation::same(ip("198.51.100.77"));
        }
        install(&mut pair.a, operations);
        for n in 64..128 {
            pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
        }
        turns(&pair.a, 6, |n| n % 2);
        assert_eq!(
            left(&pair.a.outside).len(),
            0,
            "{fan_out:?}: what came later waits, whatever the SA says now"
        );
        work(&pair.a, &mut job, &mut engine());
        exchange.put_back(job);
        pair.a.settle();
        let sealed = left(&pair.a.outside);
        assert_eq!(sealed.len(), 128);
        assert!(sealed.windows(2).all(|two| sequence(&two[0]) + 1 == sequence(&two[1])));
        assert_eq!(sealed[127][16..20], [198, 51, 100, 77]);
    }
    assert_eq!(pair.a.all_drops(), 0);
    balanced(&pair.a);
    // By then it is the owner's alone.
    let before = helped(&pair.a, 1);
    for n in 0..640 {
        pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
    }
    pair.a.settle();
    assert_eq!(helped(&pair.a, 1), before);
}

/// DP-8, DP-6: what is wrong with a packet is found and counted as it would be at home.
#[test]
fn dp_8_drops_keep_their_names() {
    let mut pair = pair(FanOut::Always);
    for n in 0..64 {
        pair.a.push(postern_datapath::testbed::INSIDE, &packet(n));
    }
    let sealed = pair.a.departed().0;
    for (place, packet) in sealed.iter().enumerate() {
        let mut packet = packet.clone();
        if place % 4 == 0 {
            *packet.last_mut().unwrap() ^= 1;
        }
        pair.b.outside[0].push(&frame(OUTSIDE_MAC, &packet));
    }
    let inner = pair.b.departed().1;
    assert_eq!((inner.len(), pair.b.drops(DropReason::BadIcv)), (48, 16));
    let report = pair.b.publisher.sa(A_IN).unwrap();
    assert_eq!(report.counters.drops, [(DropReason::BadIcv, 16)]);
    assert_eq!(report.counters.packets, 48);
    balanced(&pair.b);
}

/// DP-8: what others open is delivered, counted and refused as at home, usual or not: TCP's first packet, ICMP, fragments,
/// the last hop.
#[test]
fn dp_8_opened_elsewhere_as_at_home() {
    let inner = |n: u32| {
        let mut packet = packet(n);
        let header = ip4::Header {
            source: "10.1.0.2".parse().unwrap(),
            destination: "10.2.0.2".parse().unwrap(),
            protocol: [Protocol::UDP, Protocol::TCP, Protocol::ICMP, Protocol::UDP][n as usize % 4],
            ttl: if n.is_multiple_of(5) { 2 } else { 64 },
            tos: if n.is_multiple_of(7) { 0b11 } else { 0 },
            id: 1,
            dont_fragment: n.is_multiple_of(2),
        };
        let payload = packet.len() - ip4::MIN_LEN;
        header.emit(&mut packet, payload).unwrap();
        if n.is_multiple_of(11) {
            ip4::set_fragment(&mut packet, None, 0, true).unwrap();
        }
        packet
    };
    let mut outcomes = Vec::new();
    for fan_out in [FanOut::Never, FanOut::Always] {
        let mut pair = pair(fan_out);
        (0..500).for_each(|n| pair.a.inside[0].push(&frame(INSIDE_MAC, &inner(n))));
        let sealed = pair.a.departed().0;
        assert!(sealed.len() > 300, "{}", sealed.len());
        for (n, packet) in sealed.iter().enumerate() {
            let mut packet = packet.clone();
            // A hop on the way says that there is congestion.
            if n % 13 == 0 {
                ip4::set_tos(&mut packet, 0b11).unwrap();
            }
            pair.b.outside[0].push(&frame(OUTSIDE_MAC, &packet));
        }
        let inside = pair.b.departed().1;
        let counters = pair.b.publisher.sa(A_IN).unwrap().counters;
        outcomes.push((sealed, inside, counters.packets, counters.bytes, counters.drops));
        assert_eq!(helped(&pair.b, 1) > 0, fan_out == FanOut::Always);
        balanced(&pair.b);
    }
    assert_eq!(outcomes[0], outcomes[1]);
    assert!(outcomes[0].1.len() > 300, "{}", outcomes[0].1.len());
}

/// DP-8: with one worker, and where it is forbidden, every packet is what it would have been.
#[test]
fn dp_8_nobody_to_help() {
    let mut outputs = Vec::new();
    for (workers, fan_out) in
        [(1, FanOut::Always), (1, FanOut::ByLoad), (2, FanOut::Never), (2, FanOut::Always)]
    {
        let options = Options { workers, frames: 4096, ..Options::default() };
        let mut pair = pair_with(Suites::Gcm128, options, fan_out);
        for n in 0..500 {
            pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
        }
        outputs.push(pair.a.departed().0);
        let given: u64 =
            pair.a.workers.borrow().iter().map(|worker| worker.core.cells.fanned_out.get()).sum();
        assert_eq!(given > 0, (workers, fan_out) == (2, FanOut::Always));
        balanced(&pair.a);
    }
    assert!(outputs.windows(2).all(|two| two[0] == two[1]));
    assert_eq!(outputs[0].len(), 500);
}

/// DP-8: by load: once its owner has more than it can take and another worker has nothing to do, and not before.
#[test]
fn dp_8_by_load() {
    let mut pair = pair(FanOut::ByLoad);
    for n in 0..500 {
        pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
        if n % 50 == 49 {
            pair.a.settle();
        }
    }
    assert_eq!(helped(&pair.a, 1), 0, "no load");
    for n in 0..6000 {
        pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
    }
    turns(&pair.a, 40, |_| 0);
    turns(&pair.a, QUIET, |_| 1);
    pair.a.settle();
    assert!(helped(&pair.a, 1) > 500, "{}", helped(&pair.a, 1));
    let sealed = left(&pair.a.outside);
    assert_eq!(sealed.len(), 6500);
    assert!(sealed.iter().enumerate().all(|(place, packet)| sequence(packet) as usize == place + 1));
    // A helper with a full ring of its own does nothing for others.
    for handle in &pair.a.inside {
        handle.repeat(vec![frame(INSIDE_MAC, &packet(1))]);
    }
    let before = helped(&pair.a, 1);
    turns(&pair.a, 200, |n| n % 2);
    assert!(helped(&pair.a, 1) - before < 64 * 40, "{}", helped(&pair.a, 1) - before);
    pair.a.inside.iter().for_each(|handle| handle.repeat(Vec::new()));
    pair.a.settle();
    balanced(&pair.a);
}

/// DP-8: by load, small packets stay at home, but for usual outbound ones: handing them over would cost more than it gains.
#[test]
fn dp_8_small_packets_stay() {
    for outer_v6 in [true, false] {
        let options = Options { workers: 2, frames: 8192, outer_v6, ..Options::default() };
        let mut pair = pair_with(Suites::Gcm128, options, FanOut::ByLoad);
        for (len, large) in [(100, false), (600, true)] {
            for n in 0..6000_u32 {
                let mut payload = vec![0x33; len];
                payload[..4].copy_from_slice(&n.to_be_bytes());
                pair.a.inside[0].push(&frame(INSIDE_MAC, &udp4("10.1.0.2", "10.2.0.2", 1, 2, &payload)));
            }
            let helped_a = under_load(&mut pair.a);
            assert_eq!(helped_a > 500, large || !outer_v6, "{outer_v6} {len}: {helped_a}");
            assert_eq!(helped_a > 0, large || !outer_v6, "{outer_v6} {len}");
            let sealed = pair.a.departed().0;
            assert_eq!(sealed.len(), 6000);
            for packet in &sealed {
                pair.b.outside[0].push(&frame(OUTSIDE_MAC, packet));
            }
            let helped_b = under_load(&mut pair.b);
            assert_eq!(helped_b > 500, large, "{outer_v6} {len}: {helped_b}");
            assert_eq!(helped_b > 0, large, "{outer_v6} {len}");
            let numbers: Vec<u32> = pair.b.departed().1.iter().map(|packet| number_in(packet)).collect();
            assert_eq!(numbers, (0..6000).collect::<Vec<u32>>());
        }
        balanced(&pair.a);
        balanced(&pair.b);
    }
}

/// Turns until everything has left; the first worker is busy before the other one has anything to do. How many packets that
/// one did.
fn under_load(bed: &mut Testbed) -> u64 {
    let before = helped(bed, 1);
    turns(bed, 40, |_| 0);
    turns(bed, QUIET, |_| 1);
    bed.settle();
    helped(bed, 1) - before
}

/// DP-8: what is not usual goes out as well: fragments, IPv6 outside, UDP, transport mode.
#[test]
fn dp_8_every_shape() {
    use postern_contract::sa::UdpEncap;
    let encap = Some(UdpEncap { local_port: 4500, remote_port: 4500 });
    for (outer_v6, encap, mode) in [
        (true, None, Mode::Tunnel),
        (true, encap, Mode::Tunnel),
        (false, encap, Mode::Tunnel),
        (false, None, Mode::Transport),
    ] {
        let options = Options { workers: 2, frames: 8192, outer_v6, encap, mode, ..Options::default() };
        let mut pair = pair_with(Suites::Gcm128, options, FanOut::Always);
        for n in 0..300_u32 {
            if mode == Mode::Transport {
                pair.a.host[0].push(&udp4("192.0.2.1", "198.51.100.1", 1, 2, &n.to_be_bytes()));
            } else {
                pair.a.inside[0].push(&frame(INSIDE_MAC, &packet(n)));
            }
        }
        let sealed = pair.a.departed().0;
        assert_eq!(sealed.len(), 300);
        assert!(helped(&pair.a, 1) > 0);
        for packet in &sealed {
            pair.b.outside[0].push(&frame(OUTSIDE_MAC, packet));
        }
        let (_, inside) = pair.b.departed();
        let inner = if mode == Mode::Transport { pair.b.to_host() } else { inside };
        let numbers: Vec<u32> = inner.iter().map(|packet| number_in(packet)).collect();
        assert_eq!(numbers, (0..300).collect::<Vec<u32>>(), "{outer_v6} {encap:?} {mode:?}");
        assert!(helped(&pair.b, 1) > 0);
        balanced(&pair.b);
    }
}
