//! Sequence numbers that cannot be reserved on stable storage are not used (DP-4, DESIGN decision 8).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::inconsistent_struct_constructor,
    reason = "helpers of tests stop a test like the test itself"
)]

mod common;

use std::process::Command;
use std::time::Duration;

use common::*;
use postern_contract::Translation;
use postern_contract::counters::DropReason;
use postern_contract::request::{Operation, Refusal};
use postern_contract::sa::SaId;
use postern_datapath::testbed::{INSIDE_MAC, frame};
use postern_wire::esp;
use postern_wire::ids::Spi;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Numbers that are reserved at once.
const BLOCK: u64 = 1 << 20;

/// Set in the process whose files are limited.
const INNER: &str = "POSTERN_TEST_FULL_DISK";

/// DP-4: on a full disk new SAs are refused, and installed ones stop before a number that was not reserved. It runs in
/// a process of its own, in which a write that is too long fails instead of killing it.
#[test]
fn dp_4_numbers_that_cannot_be_reserved() {
    if std::env::var_os(INNER).is_some() {
        return full_disk();
    }
    let program = std::env::current_exe().unwrap();
    let script = "trap '' XFSZ; exec \"$0\" --exact dp_4_numbers_that_cannot_be_reserved --nocapture";
    let output = Command::new("sh").args(["-c", script]).arg(program).env(INNER, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{error}");
}

/// From now on no file of this process can grow, or any can.
fn limit_files(limited: bool) {
    let current = limited.then_some(0);
    setrlimit(Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
}

fn full_disk() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    let packet = datagram(false, true, b"");
    assert_eq!(pair.a_to_b(&packet).len(), 1);
    limit_files(true);

    // A new SA is refused: its first numbers are not reserved.
    let mut operations = side(Suites::Gcm128, &Options::default(), true);
    let config = sa(&mut operations, A_OUT);
    (config.id, config.pair, config.suite) = (SaId(50), None, Suites::Gcm128.suite(0x50));
    config.spi = Translation::same(Spi(0x5050));
    let results = pair.a.apply(vec![operations.remove(1)]);
    assert!(matches!(&results[..], [Err(Refusal::Storage(_))]), "{results:?}");

    // An installed one uses what it has, and not one number more.
    pair.a.outside[0].discard(true);
    pair.a.inside[0].repeat(vec![frame(INSIDE_MAC, &packet)]);
    let now = *pair.a.now.borrow();
    while pair.a.drops(DropReason::SequenceNotReserved) == 0 {
        pair.a.workers.borrow_mut()[0].turn(now);
        pair.a.publisher.collect();
    }
    pair.a.inside[0].repeat(Vec::new());
    pair.a.settle();
    let report = pair.a.publisher.sa(A_OUT).unwrap();
    assert_eq!((report.counters.packets, report.counters.sequence, report.stopped), (BLOCK, BLOCK, false));
    assert_eq!(pair.a.outside[0].transmitted().0, BLOCK);
    pair.a.advance(Duration::from_secs(1));
    assert!(pair.protect(&packet).is_empty());
    assert_eq!(pair.a.events(), []);
    conserved(&pair.a);

    // There is room again: the next tick reserves, and the numbers go on where they ended.
    limit_files(false);
    pair.a.advance(Duration::from_secs(1));
    pair.a.outside[0].discard(false);
    let sealed = pair.protect(&packet).remove(0);
    assert_eq!(u64::from(esp::Header::parse(&sealed[20..]).unwrap().sequence), BLOCK + 1);
    assert_eq!(pair.open_b(&sealed).len(), 1);
    // After a restart as well: nothing that was promised while the disk was full counts.
    pair.restart_a(side(Suites::Gcm128, &Options::default(), true));
    let sealed = pair.protect(&packet).remove(0);
    assert!(u64::from(esp::Header::parse(&sealed[20..]).unwrap().sequence) > BLOCK + 1);
    let removed = pair.a.apply(vec![Operation::RemoveSa(A_OUT)]);
    assert!(removed[0].is_ok());
}
