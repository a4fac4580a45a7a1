//! What is not to be found (RST-2, RST-3): the private half in the processes' memory, also after it was used; keys of
//! CHILD_SAs in what is saved; any key on disk in the clear.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use postern_hwtests::party::Make;
use postern_hwtests::peer::Version;
use postern_hwtests::stage::{Stage, postern, swan};
use postern_ike::record::{SavedBody, SavedIke};
use postern_nvram::{Backup, NoCounter, SealedFile};

use super::{DARK, NAME, crash_and_restart, in_version, views};

/// What is looked for, and how it is called.
type Needles = Vec<(String, Vec<u8>)>;

fn search(bytes: &[u8], needles: &Needles, found: &mut BTreeSet<String>) {
    let mut first = [const { Vec::new() }; 256];
    for needle in needles {
        if let Some(byte) = needle.1.first() {
            first.get_mut(usize::from(*byte)).into_iter().for_each(|list| list.push(needle));
        }
    }
    for (at, byte) in bytes.iter().enumerate() {
        for (name, needle) in first.get(usize::from(*byte)).into_iter().flatten() {
            if bytes.get(at..).is_some_and(|rest| rest.starts_with(needle)) {
                found.insert(name.clone());
            }
        }
    }
}

/// Which of them are in the writable memory of a process.
fn in_memory(pid: i32, needles: &Needles) -> Result<BTreeSet<String>> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let (mut found, mut searched) = (BTreeSet::new(), 0_usize);
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        // Rings and frames are shared with the kernel: packets, and larger than all the rest.
        if !rights.starts_with("rw") || rights.ends_with('s') {
            continue;
        }
        let (start, end) = range.split_once('-').context("a range")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let mut bytes = vec![0; usize::try_from(end - start)?.min(256 << 20)];
        if memory.read_exact_at(&mut bytes, start).is_ok() {
            searched += bytes.len();
            search(&bytes, needles, &mut found);
        }
    }
    ensure!(searched > 1_000_000, "only {searched} bytes could be read");
    Ok(found)
}

/// All files below a directory but those that are `skipped`.
fn on_disk(below: &Path, skipped: &[PathBuf], needles: &Needles) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(below)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        if skipped.contains(&path) {
            continue;
        }
        if metadata.is_dir() {
            found.extend(on_disk(&path, skipped, needles)?);
        } else if metadata.is_file() {
            let mut here = BTreeSet::new();
            search(&fs::read(&path)?, needles, &mut here);
            found.extend(here.into_iter().map(|what| format!("{what} in {}", path.display())));
        }
    }
    Ok(found)
}

/// A file of the keys: both parts of its only line.
fn halves(path: &Path) -> Result<(Vec<u8>, Vec<u8>)> {
    use postern_nvram::{KeyRing, PublicKey};
    let text = fs::read_to_string(path)?;
    // Read, so that a file of another kind is an error; the bytes are not to be had otherwise than as text.
    ensure!(PublicKey::from_text(text.trim()).is_ok() || KeyRing::from_text(&text).is_ok(), "not keys");
    let encoded = text.split_whitespace().nth(1).context("two words")?;
    let bytes = decode(encoded)?;
    let (half, origin) = bytes.split_at_checked(32).context("64 bytes")?;
    Ok((half.to_vec(), origin.to_vec()))
}

/// Base64.
fn decode(text: &str) -> Result<Vec<u8>> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter(|byte| *byte != b'=');
    let mut bits = Vec::new();
    for digit in digits {
        let value = alphabet.iter().position(|known| *known == digit).context("not base64")?;
        bits.extend((0..6).rev().map(|bit| value >> bit & 1 == 1));
    }
    let whole = bits.chunks_exact(8);
    Ok(whole.map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect())
}

/// Keys of the CHILD_SAs, from the table that the debugging aid writes.
fn child_keys(table: &Path) -> Result<Needles> {
    let mut needles = Needles::new();
    for line in fs::read_to_string(table)?.lines() {
        let fields: Vec<&str> = line.split("\",\"").collect();
        for field in fields.iter().filter_map(|field| field.strip_prefix("0x")).filter(|key| key.len() > 16) {
            let digits = field.trim_matches('"');
            let bytes = (0..digits.len()).step_by(2).map(|at| {
                u8::from_str_radix(digits.get(at..at + 2).unwrap_or_default(), 16).context("not hexadecimal")
            });
            needles.push((format!("a key of a CHILD_SA, {}", needles.len()), bytes.collect::<Result<_>>()?));
        }
    }
    ensure!(needles.len() >= 2, "{} keys in {}", needles.len(), table.display());
    Ok(needles)
}

/// The records of the left party in the clear, and the keys of IKE SAs in them.
fn records(stage: &Stage) -> Result<(Vec<u8>, Needles)> {
    let directory = stage.left.node()?.dir().join("state/recovery");
    let holder = SealedFile { path: directory.join("private.key"), passphrase_file: None };
    let backup = Backup::read(&directory.join("backup"), &holder, &mut NoCounter)?;
    let (mut clear, mut keys) = (Vec::new(), Needles::new());
    for (_, record) in &backup.records {
        clear.extend_from_slice(record);
        let mut add = |name: &str, key: &[u8]| {
            keys.push((format!("{name} of an IKE SA, {}", keys.len()), key.to_vec()));
        };
        match SavedIke::decode(record)?.body {
            SavedBody::V2Context(context) => {
                add("SK of this side", context.own.expose());
                add("SK of the peer", context.peer.expose());
            }
            SavedBody::V1Context(context) => {
                add("SKEYID_a", context.skeyid_a.expose());
                add("Ka", context.ka.expose());
            }
            SavedBody::Whole(whole) => {
                add("SK of this side", whole.context.own.expose());
                add("SK_d", whole.sk_d.expose());
            }
            SavedBody::Prebuilt(_) => {}
        }
    }
    ensure!(!clear.is_empty(), "nothing is saved: {:?}", backup.report);
    Ok((clear, keys))
}

/// RST-2, RST-3: with each kind of record and both versions of IKE, before and after a reset in which the private half was
/// needed. That the search finds anything is shown by what has to be there.
#[test]
fn rst_3_what_is_not_to_be_found() -> Result<()> {
    for (ike, kind) in [(2, "delete"), (2, "prebuilt"), (2, "restore"), (1, "delete"), (1, "prebuilt")] {
        looked_at(ike, kind).with_context(|| format!("IKEv{ike}, {kind}"))?;
    }
    Ok(())
}

fn looked_at(ike: u8, kind: &'static str) -> Result<()> {
    let tables = std::env::temp_dir().join(postern_hwtests::netns::unique_prefix() + "-tables");
    let mut make = postern();
    if let Make::Postern(config) = &mut make
        && let Some(section) = &mut config.ike
    {
        section.keylog = Some(tables.clone());
    }
    let mut stage = Stage::pair(&make, &swan(Version::V6))?;
    let (mut near, mut far) = views(&stage);
    near.reset = Some(kind);
    in_version(ike, &mut near, &mut far);
    stage.left.load(vec![near], vec![])?;
    stage.right.load(vec![far], vec![])?;
    stage.establish(NAME, false)?;
    for after_reset in [false, true] {
        if after_reset {
            let before = stage.agreed(NAME)?;
            crash_and_restart(&mut stage, &make, DARK)?;
            stage.check(|stage| stage.agreed_where(NAME, "new keys", |now| now.ike != before.ike))?;
        }
        stage.carry()?;
        let node = stage.left.node()?;
        let directory = node.dir().join("state/recovery");
        let ((private, _), (public, origin)) =
            (halves(&directory.join("private.key"))?, halves(&directory.join("public.key"))?);
        let phase_2 = child_keys(&tables.join("esp_sa"))?;
        let (clear, phase_1) = records(&stage)?;

        let mut found = BTreeSet::new();
        search(&clear, &phase_2, &mut found);
        ensure!(
            found.is_empty() == (kind != "restore"),
            "after a reset: {after_reset}: in the records: {found:?}"
        );
        ensure!(phase_1.is_empty() == (kind == "prebuilt"), "keys of IKE SAs in the records: {phase_1:?}");

        let text = fs::read_to_string(directory.join("private.key"))?;
        let word = text.split_whitespace().nth(1).and_then(|word| word.get(..40)).context("a word")?;
        let halves = vec![
            ("the private half".to_owned(), private.clone()),
            ("the private half as text".to_owned(), word.as_bytes().to_vec()),
            // To see that it is looked at the right place.
            ("the public half".to_owned(), public.clone()),
        ];
        let found = in_memory(node.control_pid()?, &halves)?;
        let expected = BTreeSet::from(["the public half".to_owned()]);
        ensure!(found == expected, "after a reset: {after_reset}: in control's memory: {found:?}");
        let found = in_memory(node.datapath_pid()?, &halves)?;
        ensure!(found.is_empty(), "after a reset: {after_reset}: in the datapath's memory: {found:?}");

        let mut keys = halves;
        keys.retain(|(name, _)| name != "the public half");
        keys.extend(phase_1);
        keys.extend(phase_2);
        keys.push(("the secret of both halves".to_owned(), origin));
        let own = [directory.join("private.key"), directory.join("public.key")];
        let found = on_disk(node.dir(), &own, &keys)?;
        ensure!(found.is_empty(), "after a reset: {after_reset}: on disk: {found:?}");
    }
    fs::remove_dir_all(&tables)?;
    Ok(())
}
