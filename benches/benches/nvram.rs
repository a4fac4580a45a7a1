//! What the NVRAM costs (RST-1, RST-2): commits by batch size, a checkpoint, reading back, bytes on disk.
//!
//! `cargo bench -p postern-benches --bench nvram`; the directory is made in `$TMPDIR`, which should be on the storage in
//! question and not in memory. A flush takes as long as that storage needs; the time without one is shown beside it.
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::path::Path;
use std::time::{Duration, Instant};

use postern_nvram::{
    Backup, Change, Key, KeyRing, NoCounter, Options, PublicKey, SealedFile, Store, exercise::Medium,
    generate,
};
use zeroize::Zeroizing;

/// Bytes of a record: what a `delete` record takes.
const RECORD: usize = 300;

fn main() {
    // `cargo bench` says so; `cargo test` does not, and wants to see that it works.
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (many, time) =
        if measured { (100_000, Duration::from_secs(2)) } else { (1000, Duration::from_millis(50)) };
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let keys = directory.path().join("private.key");
    SealedFile::write(&keys, &KeyRing(vec![private]), None).unwrap();
    let holder = SealedFile { path: keys, passphrase_file: None };
    println!("records of {RECORD} bytes; directory {}", directory.path().display());
    println!(
        "{:>8} {:>14} {:>14} {:>12} {:>16}",
        "batch", "commits/s", "records/s", "p99 commit", "records/s no disk"
    );
    for batch in [1, 16, 256, 4096] {
        let mut store = open(&directory.path().join(format!("batch-{batch}")), &public);
        let (commits, mut times) = commit_for(&mut store, batch, time);
        times.sort_unstable();
        let p99 = times.get(times.len() * 99 / 100).copied().unwrap_or_default();
        let storage = Box::new(Medium::default());
        let mut memory =
            Store::open_in(storage, options(Path::new("")), &public, Box::new(NoCounter)).unwrap();
        let (without, _) = commit_for(&mut memory, batch, time / 4);
        println!(
            "{batch:>8} {commits:>14.0} {:>14.0} {:>9.2} ms {:>16.0}",
            commits * f64::from(batch),
            p99.as_secs_f64() * 1e3,
            without * f64::from(batch)
        );
    }

    let path = directory.path().join("many");
    let mut store = open(&path, &public);
    for first in (0..many).step_by(1000) {
        store.commit(&(first..first + 1000).map(put).collect::<Vec<_>>()).unwrap();
    }
    for _ in 0..3 {
        let written = store.checkpoint().unwrap();
        println!(
            "checkpoint of {} records: {:.1} ms, {} bytes, {:.1} bytes a record beside its own {RECORD}",
            written.records,
            written.took.as_secs_f64() * 1e3,
            written.bytes,
            per_record(written.bytes, written.records)
        );
    }
    drop(store);
    for _ in 0..3 {
        let began = Instant::now();
        let backup = Backup::read(&path, &holder, &mut NoCounter).unwrap();
        let took = began.elapsed();
        assert_eq!(backup.records.len(), usize::try_from(many).unwrap());
        println!("reading {many} records back: {:.1} ms", took.as_secs_f64() * 1e3);
    }
}

fn per_record(bytes: u64, records: usize) -> f64 {
    let records = f64::from(u32::try_from(records).unwrap());
    f64::from(u32::try_from(bytes).unwrap()) / records - f64::from(u32::try_from(RECORD).unwrap())
}

fn options(path: &Path) -> Options {
    Options { checkpoint: Duration::MAX, journal_limit: u64::MAX, ..Options::new(path) }
}

fn open(path: &Path, public: &PublicKey) -> Store {
    Store::open(options(path), public, Box::new(NoCounter)).unwrap()
}

fn put(number: u32) -> Change {
    let mut key = [0; 16];
    key[..4].copy_from_slice(&number.to_be_bytes());
    Change::Put { key: Key(key), record: Zeroizing::new(vec![0x5a; RECORD]) }
}

/// Commits for about this long; how many a second, and how long each took. A gateway's keys come again: 20,000 of them.
fn commit_for(store: &mut Store, batch: u32, time: Duration) -> (f64, Vec<Duration>) {
    let mut number = 0_u32;
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed() < time {
        let changes: Vec<_> = (0..batch).map(|index| put((number + index) % 20_000)).collect();
        number = (number + batch) % 20_000;
        let began = Instant::now();
        store.commit(&changes).unwrap();
        times.push(began.elapsed());
    }
    let spent: Duration = times.iter().sum();
    (f64::from(u32::try_from(times.len()).unwrap()) / spent.as_secs_f64(), times)
}
