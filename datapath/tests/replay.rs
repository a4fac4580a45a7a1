//! Sequence numbers: the window, extended numbers, the end of the space, and what outlives a restart (DP-4).
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
use postern_contract::request::{Operation, Refusal};
use postern_contract::sa::{KeyOrigin, SaId};
use postern_datapath::testbed::{Layout, OUTSIDE, Testbed};
use postern_wire::{ah, esp};

/// The sequence number on the wire of an ESP or AH packet over IPv4.
fn number(sealed: &[u8]) -> u32 {
    match sealed[9] {
        50 => esp::Header::parse(&sealed[20..]).unwrap().sequence,
        _ => ah::Header::parse(&sealed[20..]).unwrap().sequence,
    }
}

fn packet() -> Vec<u8> {
    datagram(false, true, b"number")
}

/// `count` sealed packets in order.
fn sealed(pair: &mut Pair, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|_| pair.protect(&packet()).remove(0)).collect()
}

/// Pushes packets into one batch of B and gives how many came through.
fn batch(bed: &mut Testbed, packets: &[&[u8]]) -> usize {
    for packet in packets {
        bed.push(OUTSIDE, packet);
    }
    bed.departed().1.len()
}

/// DP-4: a packet passes once, whether the copy comes later or in the same batch; a forged copy before it changes
/// nothing.
#[test]
fn dp_4_duplicates() {
    for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::AhSha256] {
        for esn in [false, true] {
            let mut pair = Pair::new(suite, Options { esn, ..Options::default() });
            let packets = sealed(&mut pair, 3);
            assert_eq!(pair.open_b(&packets[0]).len(), 1);
            assert_eq!(pair.open_b(&packets[0]).len(), 0);
            dropped(&pair.b, DropReason::ReplayDuplicate, 1);
            // Five copies in one batch, another packet between them.
            let (two, three) = (&*packets[1], &*packets[2]);
            assert_eq!(batch(&mut pair.b, &[two, two, three, two, three, two]), 2, "{suite:?} {esn}");
            dropped(&pair.b, DropReason::ReplayDuplicate, 5);
            let report = pair.b.publisher.sa(A_IN).unwrap();
            assert_eq!(report.counters.drops, [(DropReason::ReplayDuplicate, 5)]);
            assert_eq!(report.counters.packets, 3);
        }
    }
}

/// DP-4: packets out of order pass up to the exact edge of the window, and not beyond.
#[test]
fn dp_4_window_edges() {
    for window in [64, 1024, 4096] {
        for esn in [false, true] {
            let mut pair = Pair::new(Suites::Gcm128, Options { window, esn, ..Options::default() });
            let size = usize::from(window);
            let packets = sealed(&mut pair, size + 2);
            // The newest first: its number is size + 2, so the window spans 3 to size + 2.
            assert_eq!(pair.open_b(&packets[size + 1]).len(), 1);
            assert_eq!(pair.open_b(&packets[1]).len(), 0, "number 2 is one left of {window}");
            // RFC 4303 appendix A2.2: with ESN what is left of the window is taken for a number of the next subspace,
            // which the ICV contradicts.
            let reason = if esn { DropReason::BadIcv } else { DropReason::ReplayTooOld };
            dropped(&pair.b, reason, 1);
            assert_eq!(pair.open_b(&packets[2]).len(), 1, "number 3 is the edge of {window}");
            assert_eq!(pair.open_b(&packets[2]).len(), 0);
            assert_eq!(pair.b.drops(DropReason::ReplayDuplicate), 1);
            for packet in packets[3..=size].iter().rev() {
                assert_eq!(pair.open_b(packet).len(), 1);
            }
            conserved(&pair.b);
        }
    }
}

/// DP-4: window 0 checks nothing, as configured.
#[test]
fn dp_4_window_off() {
    let mut pair = Pair::new(Suites::Gcm128, Options { window: 0, esn: false, ..Options::default() });
    let packets = sealed(&mut pair, 2);
    for packet in [&packets[1], &packets[0], &packets[0]] {
        assert_eq!(pair.open_b(packet).len(), 1);
    }
    pair.clean();
}

/// DP-4: number zero, sealed with the right key, is refused.
#[test]
fn dp_4_zero() {
    let mut pair = Pair::new(Suites::NullSha256, Options { esn: false, ..Options::default() });
    let (from, to) = outer(false);
    // A counter never gives zero, so the packet is sealed with 2^32 of an extended one: its low half is zero.
    let inner = with_trailer(&packet(), postern_wire::ids::Protocol::IPV4, 4);
    let esp = seal(&Suites::NullSha256.suite(0x11), SPI_AB, 1 << 32, false, &inner);
    let zero = ip_packet(from, to, postern_wire::ids::Protocol::ESP, 0, &esp);
    assert_eq!(number(&zero), 0);
    assert!(pair.open_b(&zero).is_empty());
    dropped(&pair.b, DropReason::ReplayZero, 1);
}

/// DP-4: extended numbers pass 2^32 in both directions, out of order across it as well.
#[test]
fn dp_4_extended_numbers_roll_over() {
    for suite in [Suites::Gcm128, Suites::ChaCha, Suites::CbcSha512, Suites::Gmac, Suites::AhSha256] {
        let sequence = (1 << 32) - 3;
        let mut pair = Pair::new(suite, Options { sequence, ..Options::default() });
        let packets = sealed(&mut pair, 8);
        let numbers: Vec<u32> = packets.iter().map(|packet| number(packet)).collect();
        assert_eq!(numbers, [u32::MAX - 2, u32::MAX - 1, u32::MAX, 0, 1, 2, 3, 4]);
        for place in [1, 5, 0, 3, 2, 7, 4, 6] {
            assert_eq!(pair.open_b(&packets[place]).len(), 1, "{suite:?} {place}");
        }
        for packet in &packets {
            assert_eq!(pair.open_b(packet).len(), 0, "{suite:?}");
        }
        dropped(&pair.b, DropReason::ReplayDuplicate, 8);
        assert_eq!(pair.b.publisher.sa(A_IN).unwrap().counters.sequence, sequence + 7);
        for _ in 0..8 {
            let back = datagram(false, false, b"back");
            assert_eq!(pair.b_to_a(&back), [routed(&back, 2)]);
        }
        assert_eq!(pair.a.publisher.sa(A_IN).unwrap().counters.sequence, sequence + 7);
    }
}

/// DP-4: the high half that the packet does not carry is authenticated: a receiver in another subspace refuses.
#[test]
fn dp_4_high_half_is_authenticated() {
    for suite in [Suites::Gcm128, Suites::CbcSha256, Suites::Gmac, Suites::NullSha256, Suites::AhSha1] {
        let mut pair = Pair::with(suite, Options::default(), |operations, a| {
            if a {
                sa(operations, A_OUT).sequence = (1 << 32) + 5;
            }
        });
        let packets = sealed(&mut pair, 1);
        assert_eq!(number(&packets[0]), 5);
        assert!(pair.open_b(&packets[0]).is_empty());
        dropped(&pair.b, DropReason::BadIcv, 1);
    }
}

/// DP-4: "sequence counter overflow stops the SA and raises an event": 2^32 - 1 is sent, nothing after it.
#[test]
fn dp_4_exhaustion() {
    for suite in [Suites::Gcm128, Suites::AhSha256] {
        let sequence = u64::from(u32::MAX) - 1;
        let mut pair = Pair::new(suite, Options { esn: false, sequence, ..Options::default() });
        let packets = sealed(&mut pair, 2);
        assert_eq!(packets.iter().map(|packet| number(packet)).collect::<Vec<_>>(), [u32::MAX - 1, u32::MAX]);
        assert!(pair.a.events().is_empty());
        for _ in 0..3 {
            assert!(pair.protect(&packet()).is_empty());
        }
        dropped(&pair.a, DropReason::SequenceExhausted, 3);
        assert_eq!(pair.a.events(), [Event::SequenceExhausted { sa: A_OUT }], "once");
        assert!(pair.a.publisher.sa(A_OUT).unwrap().stopped);
        for packet in &packets {
            assert_eq!(pair.open_b(packet).len(), 1);
        }
    }
}

/// DP-4, DP-7: a datapath that comes back with the same ledger repeats no number of keys that came back; with keys
/// that never come back its predecessor's numbers do not matter.
#[test]
fn dp_7_no_number_is_repeated_after_a_restart() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let first: Vec<u32> = sealed(&mut pair, 5).iter().map(|packet| number(packet)).collect();
    assert_eq!(first, [1, 2, 3, 4, 5]);
    let mut highest = 5;
    for _ in 0..3 {
        pair.restart_a(side(Suites::Gcm128, &Options::default(), true));
        let packets = sealed(&mut pair, 2);
        assert!(number(&packets[0]) > highest, "{} after {highest}", number(&packets[0]));
        highest = number(&packets[1]);
        for packet in packets {
            assert_eq!(pair.open_b(&packet).len(), 1);
        }
    }
    // The same keys for another SA, or for the same one removed and installed in one message.
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    sa(&mut operations, A_OUT).id = SaId(77);
    operations.retain(|operation| matches!(operation, Operation::InstallSa(config) if config.id == SaId(77)));
    operations.insert(0, Operation::RemoveSa(A_OUT));
    sa(&mut operations, SaId(77)).pair = None;
    install(&mut pair.a, operations);
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    operations.retain(|operation| matches!(operation, Operation::InstallSa(config) if config.id == A_OUT));
    operations.insert(0, Operation::RemoveSa(SaId(77)));
    install(&mut pair.a, operations);
    let packets = sealed(&mut pair, 1);
    assert!(number(&packets[0]) > highest);
}

/// DP-4: a datapath that comes back with the same ledger takes nothing that it took before, with keys that came back. What is
/// lost is bounded: twice of what came in a second, and not less than 8 packets.
#[test]
fn dp_4_no_packet_is_taken_again_after_a_restart() {
    for (burst, most) in [(2, 8), (100, 200)] {
        let mut pair = Pair::new(Suites::Gcm128, Options::default());
        let packet = datagram(false, false, b"once");
        let mut taken = Vec::new();
        for _ in 0..3 {
            for _ in 0..burst {
                let sealed = pair.protect_b(&packet).remove(0);
                assert_eq!(pair.open_a(&sealed).len(), 1);
                taken.push(sealed);
            }
            pair.a.advance(Duration::from_secs(1));
        }
        for _ in 0..2 {
            pair.restart_a(side(Suites::Gcm128, &Options::default(), true));
            for sealed in &taken {
                assert!(pair.open_a(sealed).is_empty(), "taken twice");
            }
            let replayed = pair.a.drops(DropReason::ReplayTooOld) + pair.a.drops(DropReason::ReplayDuplicate);
            assert_eq!(usize::try_from(replayed).unwrap(), taken.len());
            let lost = (0..=most).take_while(|_| pair.b_to_a(&packet).is_empty()).count();
            assert!(lost <= most, "{lost} of {most}");
            pair.a.advance(Duration::from_secs(1));
        }
    }
}

/// DP-4: keys that never come back leave no trace in the ledger.
#[test]
fn dp_4_windows_of_other_keys_begin_as_described() {
    let fleeting = |operations: &mut Vec<Operation>| {
        for id in [A_IN, A_OUT] {
            sa(operations, id).origin = KeyOrigin::Negotiated;
        }
    };
    let mut pair = Pair::with(Suites::Gcm128, Options::default(), |operations, _| fleeting(operations));
    let packet = datagram(false, false, b"once");
    let sealed = pair.protect_b(&packet).remove(0);
    assert_eq!(pair.open_a(&sealed).len(), 1);
    pair.a.advance(Duration::from_secs(1));
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    fleeting(&mut operations);
    pair.restart_a(operations);
    assert_eq!(pair.open_a(&sealed).len(), 1, "control must not install such keys again");
}

/// RST-9, DP-4: keys that were saved for the time after a reset come back with higher numbers and a window that takes
/// nothing twice; once their SA was removed, or where the ledger is not the one that they were used with, they are refused.
#[test]
fn rst_9_saved_keys_come_back_once() {
    let with = |origin| {
        let mut operations = side(Suites::Gcm128, &Options::default(), true);
        for id in [A_IN, A_OUT] {
            sa(&mut operations, id).origin = origin;
        }
        operations
    };
    let refused = |bed: &mut Testbed, operations| {
        let results = bed.apply(operations);
        assert!(matches!(results[1], Err(Refusal::Storage(_))), "{results:?}");
    };
    let mut pair = Pair::with(Suites::Gcm128, Options::default(), |operations, is_a| {
        if is_a {
            *operations = with(KeyOrigin::Saved);
        }
    });
    let packet = datagram(false, false, b"once");
    let taken = pair.protect_b(&packet).remove(0);
    assert_eq!(pair.open_a(&taken).len(), 1);
    let mut highest = number(&sealed(&mut pair, 1)[0]);
    pair.a.advance(Duration::from_secs(1));
    for _ in 0..2 {
        pair.restart_a(with(KeyOrigin::Restored));
        assert!(pair.open_a(&taken).is_empty(), "taken twice");
        let next = number(&sealed(&mut pair, 1)[0]);
        assert!(next > highest);
        highest = next;
        pair.a.advance(Duration::from_secs(1));
    }
    for result in pair.a.apply([A_IN, A_OUT].map(Operation::RemoveSa).into()) {
        result.unwrap();
    }
    refused(&mut pair.a, with(KeyOrigin::Restored));
    let elsewhere = tempfile::TempDir::new().unwrap();
    let mut other = Testbed::new(&Layout::default(), elsewhere.path()).unwrap();
    refused(&mut other, with(KeyOrigin::Restored));
}

/// DP-4: an SA is removed and installed again, with the same id, in one message.
#[test]
fn dp_4_replaced_in_one_message() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let before = number(&sealed(&mut pair, 1)[0]);
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    operations.insert(0, Operation::RemoveSa(A_OUT));
    operations.insert(0, Operation::RemoveSa(A_IN));
    for result in pair.a.apply(operations) {
        result.unwrap();
    }
    assert!(number(&sealed(&mut pair, 1)[0]) > before);
    conserved(&pair.a);
}
