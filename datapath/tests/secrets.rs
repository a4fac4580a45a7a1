//! OPS-4: what a process has in memory of the keys of SAs that are gone.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod common;
mod memory;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use common::*;
use memory::{fill, search_memory};
use postern_contract::request::Operation;
use postern_contract::sa::FanOut;
use postern_contract::secret::Secret;

/// Set in the process that is looked at, to the number of what it does.
const LOOKED_AT: &str = "POSTERN_DATAPATH_SECRETS";
/// A key that is there in the end, and one that is not.
const NEEDED: u8 = 0;
const GONE: u8 = 1;
/// Suites, and whether another worker helps.
const CASES: [(Suites, bool); 6] = [
    (Suites::CbcSha256, false),
    (Suites::CbcSha1, false),
    (Suites::CbcSha384, false),
    (Suites::CbcSha256, true),
    (Suites::Gcm128, false),
    (Suites::Gcm128, true),
];

fn key(number: u8, len: usize) -> Secret {
    // Filled where it stays.
    let mut key = vec![0; len];
    fill(number, &mut key);
    Secret::new(key)
}

/// The process that is looked at: a gateway has an SA, and then has it no more.
#[test]
fn looked_at() {
    let Ok(case) = std::env::var(LOOKED_AT) else { return };
    let (suite, shared) = CASES[case.parse::<usize>().unwrap()];
    let needed = key(NEEDED, 16);
    let options = Options { workers: if shared { 2 } else { 1 }, frames: 4096, ..Options::default() };
    let mut pair = Pair::with(suite, options, |operations, is_a| {
        for id in [A_IN, A_OUT] {
            let config = sa(operations, id);
            (config.worker, config.fan_out) = (Some(0), if shared { FanOut::Always } else { FanOut::Never });
            if (id == A_OUT) == is_a {
                config.suite.encryption_key = key(GONE, config.suite.encryption_key.expose().len());
            }
        }
    });
    for len in [1, 40, 1000] {
        let packet = udp4("10.1.0.2", "10.2.0.2", 1, 2, &vec![0x33; len]);
        assert_eq!(pair.a_to_b(&packet).len(), 1);
    }
    for bed in [&mut pair.a, &mut pair.b] {
        install(bed, [A_IN, A_OUT].map(Operation::RemoveSa).into());
        bed.settle();
    }
    println!("used");
    std::io::stdout().flush().unwrap();
    // Until the other one has looked.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    assert_eq!(needed.expose().len(), 16);
    drop(pair);
}

/// OPS-4: neither tables nor stacks keep the key of an SA that is gone; its first bytes stand in what is expanded of it,
/// too.
#[test]
fn ops_4_keys_of_removed_sas_are_gone() {
    for (case, what) in CASES.iter().enumerate() {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "looked_at", "--nocapture"])
            .env(LOOKED_AT, case.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Kept open to the end: the other one has something to say then, too.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.by_ref().map_while(Result::ok).any(|line| line.contains("used")), "{what:?}");
        let is_there = |number| {
            let mut key = vec![0; 16];
            fill(number, &mut key);
            !search_memory(child.id(), &[("key".into(), key)]).is_empty()
        };
        // What is there for certain shows that what is there is found.
        assert_eq!((is_there(NEEDED), is_there(GONE)), (true, false), "{what:?}");
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
        drop(lines);
    }
}
