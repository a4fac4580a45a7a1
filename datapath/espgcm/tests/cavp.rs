//! DP-3: every kernel against the GCM vectors of NIST's CAVP that ESP can have.
//!
//! They are in the Python package `cryptography_vectors`, which `hwtests/setup` installs into the oracle's environment;
//! they are not committed here. `POSTERN_CAVP` names another directory with `gcmEncryptExtIV128.rsp` and so on.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

mod common;

use std::collections::HashMap;
use std::path::PathBuf;

use common::{expand, kernels, open, packet, seal};
use postern_espgcm::{HEADER, TAG, Verdict};

/// Where the vectors are, if they are installed.
fn directory() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("POSTERN_CAVP") {
        return Some(named.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let lib = cache.join("postern-hwtests/venv/lib");
    let versions = std::fs::read_dir(lib).ok()?.filter_map(Result::ok);
    versions
        .map(|version| version.path().join("site-packages/cryptography_vectors/ciphers/AES/GCM"))
        .find(|directory| directory.is_dir())
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// The blocks of `Name = value` lines; `FAIL` stands alone.
fn vectors(text: &str) -> Vec<HashMap<String, Vec<u8>>> {
    let mut all: Vec<HashMap<String, Vec<u8>>> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with("Count") {
            all.push(HashMap::new());
        } else if let Some(vector) = all.last_mut() {
            if line == "FAIL" {
                vector.insert(line.to_owned(), Vec::new());
            } else if let Some((name, value)) = line.split_once('=')
                && !line.starts_with('[')
            {
                vector.insert(name.trim().to_owned(), unhex(value.trim()));
            }
        }
    }
    all
}

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn dp_3_cavp() {
    let Some(directory) = directory() else {
        eprintln!("NOT CHECKED: cryptography_vectors is not installed (hwtests/setup installs it)");
        return;
    };
    for (file, sealing) in [("gcmEncryptExtIV", true), ("gcmDecrypt", false)] {
        for bits in [128, 192, 256] {
            let path = directory.join(format!("{file}{bits}.rsp"));
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
            let (mut run, mut failing, mut other) = (0, 0, 0);
            for vector in vectors(&text) {
                let field = |name: &str| vector.get(name).cloned().unwrap_or_default();
                let (text, sealed, aad) = (field("PT"), field("CT"), field("AAD"));
                let (Ok(nonce), Ok(tag)) =
                    (<[u8; 12]>::try_from(field("IV")), <[u8; TAG]>::try_from(field("Tag")))
                else {
                    other += 1;
                    continue;
                };
                if aad.len() > 16 {
                    other += 1;
                    continue;
                }
                let fails = vector.contains_key("FAIL");
                for kernel in kernels() {
                    let key = expand(kernel, &field("Key"));
                    if sealing {
                        let mut packet = packet(&text);
                        assert_eq!(seal(kernel, &key, nonce, &aad, &mut packet), Verdict::Done);
                        assert_eq!(packet[HEADER..], [&sealed[..], &tag].concat(), "{path:?} {run}");
                    }
                    let mut packet = [&[0; HEADER], &sealed[..], &tag].concat();
                    let verdict = open(kernel, &key, nonce, &aad, &mut packet);
                    assert_eq!(
                        verdict,
                        if fails { Verdict::BadTag } else { Verdict::Done },
                        "{path:?} {run}"
                    );
                    if !fails {
                        assert_eq!(packet[HEADER..HEADER + text.len()], text, "{path:?} {run}");
                    }
                }
                run += 1;
                failing += usize::from(fails);
            }
            println!("{file}{bits}: {run} run, {failing} of them forged; {other} that ESP cannot have");
            assert!(run >= 150, "{path:?}: {run}");
        }
    }
}
