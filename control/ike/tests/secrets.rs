//! OPS-4: what a process has in memory of keys that it does not need any more.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "../../../datapath/tests/memory/mod.rs"]
mod memory;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use memory::{fill, search_memory};
use postern_ike::crypto::sk::{Opener, Protection, Sealer};
use postern_ike::message::registry::{EncrId, IntegId};
use postern_ike::v1::cipher::Cipher;
use postern_ike::{Random, Secret};

/// Set in the process that is looked at, to the number of the key that it uses last.
const LOOKED_AT: &str = "POSTERN_IKE_SECRETS";

fn key(number: u8, len: usize) -> Secret {
    // Filled where it stays.
    let mut key = vec![0; len].into_boxed_slice();
    fill(number, &mut key);
    Secret::new(key)
}

struct Zeros;

impl Random for Zeros {
    fn fill(&mut self, out: &mut [u8]) {
        out.fill(0);
    }
}

/// A key that is still needed in the end.
const NEEDED: u8 = 0;
/// Others, by number, with their lengths; the last one is IKEv1's.
const KEYS: [(u8, usize); 4] = [(1, 16), (2, 24), (3, 32), (4, 32)];

fn use_v2(number: u8, len: usize) -> Sealer {
    let bits = u16::try_from(8 * len).unwrap();
    let protection = Protection::from_numbers(EncrId::AES_CBC, bits, IntegId::HMAC_SHA2_256_128).unwrap();
    let (sk_e, sk_a) = (key(number, len), key(100 + number, 32));
    let mut sealer = Sealer::new(protection, &sk_e, &sk_a).unwrap();
    let opener = Opener::new(protection, &sk_e, &sk_a).unwrap();
    let message = sealer.seal(&mut Zeros, vec![1; 32], &[2; 200]);
    let (aad, sealed) = message.split_at(32);
    assert_eq!(opener.open(aad, sealed).unwrap(), [2; 200]);
    sealer
}

fn use_v1(number: u8, len: usize) {
    let cipher = Cipher::new(key(number, len)).unwrap();
    let (sealed, _) = cipher.encrypt([0; 16], vec![2; 200]).unwrap();
    assert_eq!(cipher.decrypt([0; 16], &sealed).unwrap().0[..200], [2; 200]);
}

/// The process that is looked at. The key in question is used last, so that nothing comes over it by chance.
#[test]
fn looked_at() {
    let Ok(last) = std::env::var(LOOKED_AT) else { return };
    let kept = use_v2(NEEDED, 16);
    let (number, len) = KEYS.into_iter().find(|(number, _)| number.to_string() == last).unwrap();
    if number == 4 {
        use_v1(number, len);
    } else {
        drop(use_v2(number, len));
    }
    println!("used");
    std::io::stdout().flush().unwrap();
    // Until the other one has looked.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    assert_eq!(kept.life(), 0);
}

/// OPS-4: neither the stack nor anything else keeps AES's keys, whose first bytes stand in what is expanded of them too.
#[test]
fn ops_4_cbc_keys_are_gone() {
    for (number, len) in KEYS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "looked_at", "--nocapture"])
            .env(LOOKED_AT, number.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Kept open to the end: the other one has something to say then, too.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.by_ref().map_while(Result::ok).any(|line| line.contains("used")));
        let is_there = |number, len| {
            let mut key = vec![0; len];
            fill(number, &mut key);
            key.truncate(16);
            !search_memory(child.id(), &[("key".into(), key)]).is_empty()
        };
        // What is there for certain shows that what is there is found.
        assert!(is_there(NEEDED, 16));
        assert!(!is_there(number, len), "key {number} of {len} bytes");
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
        drop(lines);
    }
}
