//! RST-3: what is on disk and in the memory of the process that writes holds no record in the clear, and no private half.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use base64ct::{Base64, Encoding};
use postern_nvram::{Change, Key, NoCounter, Options, PublicKey, Store, generate};
use zeroize::Zeroizing;

/// Set in the process that is looked at.
const DIRECTORY: &str = "POSTERN_NVRAM_SECRETS_DIRECTORY";
const RECORDS: u8 = 60;

/// A record that is easy to make and appears nowhere by chance.
fn fill(number: u8, record: &mut [u8]) {
    let mut state = 0x9e37_79b9_u32.wrapping_mul(u32::from(number) + 1);
    for byte in record {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        *byte = state.to_be_bytes()[0];
    }
}

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
    let mut needles: Vec<(String, Vec<u8>)> =
        vec![("private half".into(), halves(&private.to_text())[..32].to_vec())];
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

/// Which of the needles are in the writable memory of a process.
fn search_memory(process: u32, needles: &[(String, Vec<u8>)]) -> BTreeSet<String> {
    let memory = File::open(format!("/proc/{process}/mem")).unwrap();
    let mut found = BTreeSet::new();
    let mut searched = 0;
    for line in fs::read_to_string(format!("/proc/{process}/maps")).unwrap().lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // Some ranges cannot be read (vvar); those of heap and stacks can.
        if memory.read_exact_at(&mut bytes, start).is_ok() {
            searched += bytes.len();
            found.extend(search(&bytes, needles));
        }
    }
    assert!(searched > 100_000, "only {searched} bytes could be read");
    found
}

fn search(bytes: &[u8], needles: &[(String, Vec<u8>)]) -> BTreeSet<String> {
    let mut first = [const { Vec::new() }; 256];
    for needle in needles {
        first[usize::from(needle.1[0])].push(needle);
    }
    let mut found = BTreeSet::new();
    for (at, byte) in bytes.iter().enumerate() {
        for (name, needle) in &first[usize::from(*byte)] {
            if bytes[at..].starts_with(needle) {
                found.insert(name.clone());
            }
        }
    }
    found
}
