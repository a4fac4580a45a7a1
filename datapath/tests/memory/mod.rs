//! Looking for secrets in a process's memory. The tests of `control/ike` and `control/nvram` include this file as well, so
//! that what is searched, and how it is known that it was, is the same for all.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// What is looked for, and how it is called.
pub type Needle = (String, Vec<u8>);

/// Bytes that are easy to make and appear nowhere by chance.
pub fn fill(number: u8, bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_u32.wrapping_mul(u32::from(number) + 1);
    for byte in bytes {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        *byte = state.to_be_bytes()[0];
    }
}

/// Which of the needles are in the writable memory of a process.
pub fn search_memory(process: u32, needles: &[Needle]) -> BTreeSet<String> {
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

/// Which of the needles are in these bytes.
pub fn search(bytes: &[u8], needles: &[Needle]) -> BTreeSet<String> {
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
