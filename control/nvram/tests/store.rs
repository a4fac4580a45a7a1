//! The store from outside: what is committed comes back, and what an operator or a broken machine does to it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant};

use common::InMemory;
use postern_nvram::{
    Backup, Change, FileStatus, Key, NoCounter, Options, Place, PrivateKey, PublicKey, Store, StoreError,
    generate,
};
use zeroize::Zeroizing;

fn put(key: u8, record: &[u8]) -> Change {
    Change::Put { key: Key([key; 16]), record: Zeroizing::new(record.to_vec()) }
}

fn remove(key: u8) -> Change {
    Change::Remove { key: Key([key; 16]) }
}

fn open(directory: &tempfile::TempDir, public: &PublicKey) -> Store {
    Store::open(Options::new(directory.path()), public, Box::new(NoCounter)).unwrap()
}

fn read(directory: &tempfile::TempDir, private: &PrivateKey) -> Backup {
    Backup::read(directory.path(), &InMemory::new(&[private]), &mut NoCounter).unwrap()
}

fn inspected(directory: &tempfile::TempDir) -> Vec<String> {
    Backup::inspect(directory.path()).unwrap().into_iter().map(|(name, _)| name).collect()
}

fn contents(backup: &Backup) -> Vec<(u8, &[u8])> {
    backup.records.iter().map(|(key, record)| (key.0[0], record.as_slice())).collect()
}

#[test]
fn rst_1_what_is_committed_comes_back_from_journal_and_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let mut store = open(&directory, &public);
    assert!(read(&directory, &private).records.is_empty());
    store.commit(&[put(1, b"one"), put(2, b"two")]).unwrap();
    store.commit(&[put(2, b"two again"), put(3, &[3; 2048])]).unwrap();
    store.commit(&[remove(1)]).unwrap();
    assert_eq!(contents(&read(&directory, &private)), [(2, b"two again".as_slice()), (3, &[3; 2048])]);
    let checkpoint = store.checkpoint().unwrap();
    assert_eq!((checkpoint.records, store.len()), (2, 2));
    store.commit(&[put(4, b"")]).unwrap();
    let backup = read(&directory, &private);
    assert_eq!(contents(&backup), [(2, b"two again".as_slice()), (3, &[3; 2048]), (4, b"")]);
    assert!(backup.report.is_clean(), "{:?}", backup.report);
    let file = &backup.report.files[0];
    assert_eq!((file.checkpoint_records, file.changes, backup.report.records), (2, 1, 3));
    let inspection = file.inspection.as_ref().unwrap();
    assert_eq!((inspection.checkpoint_records, inspection.batches, inspection.puts), (2, 1, 1));
    assert_eq!(inspection.bytes, store.file_bytes().unwrap());
    let name = &inspected(&directory)[0];
    let [(alone, shown)] = &Backup::inspect(&directory.path().join(name)).unwrap()[..] else { panic!("one") };
    assert_eq!((alone, shown.as_ref().unwrap()), (name, inspection));
    let alone =
        Backup::read(&directory.path().join(name), &InMemory::new(&[&private]), &mut NoCounter).unwrap();
    assert_eq!(alone.records.len(), 3);
}

#[test]
fn rst_7_a_new_generation_stands_beside_the_old_one_until_that_is_erased() {
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let mut store = open(&directory, &public);
    store.commit(&[put(1, b"old"), put(2, b"old")]).unwrap();
    drop(store);
    let mut store = open(&directory, &public);
    store.commit(&[put(2, b"new"), put(3, b"new")]).unwrap();
    let merged: &[(u8, &[u8])] = &[(1, b"old"), (2, b"new"), (3, b"new")];
    let backup = read(&directory, &private);
    assert_eq!(contents(&backup), merged);
    assert_eq!(backup.report.files.len(), 2);
    let old = directory.path().join(&backup.report.files[0].name);
    let kept = std::fs::read(&old).unwrap();
    store.erase_older().unwrap();
    assert!(!old.exists());
    assert_eq!(contents(&read(&directory, &private)), [(2, b"new".as_slice()), (3, b"new")]);
    // Put back, it is known to be superseded.
    std::fs::write(&old, kept).unwrap();
    let backup = read(&directory, &private);
    assert_eq!(backup.report.files[0].status, FileStatus::Superseded);
    assert_eq!(contents(&backup), [(2, b"new".as_slice()), (3, b"new")]);
    drop(store);
    postern_nvram::erase(&Place::Directory(directory.path().into())).unwrap();
    assert!(read(&directory, &private).report.files.is_empty());
}

#[test]
fn a_checkpoint_is_due_by_time_and_by_the_size_of_the_journal_and_made_when_it_is_full() {
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let mut options = Options::new(directory.path());
    options.journal_limit = 1000;
    let mut store = Store::open(options, &public, Box::new(NoCounter)).unwrap();
    let now = Instant::now();
    assert!(!store.checkpoint_due(now));
    assert!(store.checkpoint_due(now + Duration::from_secs(301)));
    for key in 0..5 {
        store.commit(&[put(key, &[key; 120])]).unwrap();
    }
    assert!(store.checkpoint_due(now));
    for key in 5..20 {
        store.commit(&[put(key, &[key; 120])]).unwrap();
    }
    let backup = read(&directory, &private);
    assert_eq!(backup.records.len(), 20);
    let inspection = backup.report.files[0].inspection.as_ref().unwrap();
    assert!(inspection.epoch > 1 && inspection.journal_bytes <= 1000, "{inspection:?}");
}

#[test]
fn rst_3_another_key_reads_nothing_and_a_rotated_one_does() {
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let (next_public, next_private) = generate();
    let mut store = open(&directory, &public);
    store.commit(&[put(1, b"one")]).unwrap();
    let backup = read(&directory, &next_private);
    assert!(backup.records.is_empty());
    assert_eq!(backup.report.files[0].status, FileStatus::WrongKey(public.id()));
    store.set_recipient(&next_public);
    store.commit(&[put(2, b"two")]).unwrap();
    assert_eq!(read(&directory, &private).records.len(), 2, "from the next checkpoint on");
    store.checkpoint().unwrap();
    assert_eq!(read(&directory, &next_private).records.len(), 2);
    assert!(read(&directory, &private).records.is_empty());
    let both = InMemory::new(&[&next_private, &private]);
    assert_eq!(Backup::read(directory.path(), &both, &mut NoCounter).unwrap().records.len(), 2);
}

#[test]
fn one_process_at_a_time_and_no_record_above_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let (public, _) = generate();
    let mut store = open(&directory, &public);
    let second = Store::open(Options::new(directory.path()), &public, Box::new(NoCounter));
    assert!(second.unwrap_err().to_string().contains("in use by another process"));
    assert!(postern_nvram::erase(&Place::Directory(directory.path().into())).is_err());
    let too_long = store.commit(&[put(1, b"fits"), put(2, &[0; 2049])]);
    assert!(matches!(too_long, Err(StoreError::TooLong(2049))));
    assert!(store.is_empty());
}

/// OPS-4: what is formatted shows neither records nor keys.
#[test]
fn ops_4_debug_shows_no_record() {
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    let mut store = open(&directory, &public);
    let change = put(1, b"Geheimnis");
    let before = format!("{change:?}");
    store.commit(&[change]).unwrap();
    let shown = format!("{before} {store:?} {:?}", read(&directory, &private));
    assert!(!shown.contains("Geheimnis") && !shown.contains("71, 101, 104"), "{shown}");
}
