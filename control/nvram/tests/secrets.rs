//! RST-3: what is on disk and in the memory of the process that writes holds no record in the clear, and no private half.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "../../../datapath/tests/memory/mod.rs"]
mod memory;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use base64ct::{Base64, Encoding};
use memory::{Needle, fill, search, search_memory};
use postern_nvram::{Change, Key, NoCounter, Options, PublicKey, Store, generate};
use zeroize::Zeroizing;

/// Set in the process that is looked at.
const DIRECTORY: &str = "POSTERN_NVRAM_SECRETS_DIRECTORY";
const RECORDS: u8 = 60;

/// The process that is looked at: what the gateway does with a store.
#[test]
fn writer() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let directory = Path::new(&directory);
    let public = PublicKey::from_text(&fs::read_to_string(directory.join("public.key")).unwrap()).unwrap();
    let mut store =
        Store::open(Options::new(directory.join("backup")), &public, Box::new(NoCounter)).unwrap();
    for number in 0..RECORDS {
        let mut record = Zeroizing::new(vec![0; 200]);
        fill(number, &mut record);
        store.commit(&[Change::Put { key: Key([number; 16]), record }]).unwrap();
        if number % 20 == 19 {
            store.checkpoint().unwrap();
        }
    }
    println!("written");
    std::io::stdout().flush().unwrap();
    // Until the other one has looked.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(store.len(), usize::from(RECORDS));
}

#[test]
fn rst_3_neither_disk_nor_memory_shows_a_record_or_the_private_half() {
    let directory = tempfile::tempdir().unwrap();
    let (public, private) = generate();
    fs::write(directory.path().join("public.key"), public.to_text().as_bytes()).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--nocapture"])
        .env(DIRECTORY, directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Kept open to the end: the other one has something to say then, too.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().map_while(Result::ok).any(|line| line.contains("written")));

    let halves = |text: &str| Base64::decode_vec(text.split(' ').nth(1).unwrap().trim()).unwrap();
    let mut needles: Vec<Needle> = vec![("private half".into(), halves(&private.to_text())[..32].to_vec())];
    for number in 0..RECORDS {
        let mut record = [0; 200];
        fill(number, &mut record);
        for at in [0, 92, 184] {
            needles.push((format!("record {number} from {at}"), record[at..at + 16].to_vec()));
        }
    }
    // What is there for certain: if this is not found, nothing else would be.
    needles.push(("public half".into(), halves(&public.to_text())[..16].to_vec()));

    let found = search_memory(child.id(), &needles);
    assert_eq!(found, BTreeSet::from(["public half".to_owned()]), "in memory");
    let mut on_disk = BTreeSet::new();
    for entry in fs::read_dir(directory.path().join("backup")).unwrap() {
        on_disk.extend(search(&fs::read(entry.unwrap().path()).unwrap(), &needles));
    }
    assert!(on_disk.is_empty(), "on disk: {on_disk:?}");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    drop(lines);
}
