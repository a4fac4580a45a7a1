//! The durable ledger of reserved sequence numbers (DESIGN decision 8, DP-7).
//!
//! A sequence number is part of the nonce of counter-mode ciphers, so none may be used twice with one key, not even
//! when the datapath is killed or the power fails in between. Before numbers are used, a *ceiling* above them is
//! [raised](Ledger::raise) and is on stable storage when that returns; after a restart an SA with the same key (found
//! by a fingerprint of it) goes on at the ceiling.
//!
//! The same promise is kept for inbound SAs whose keys come back, of the numbers that their windows accepted
//! ([`crate::publish`]).
//!
//! # What is guaranteed
//! - **Crash, kill, power loss at any instant:** [`Ledger::ceiling`] is never below a ceiling whose `raise` returned
//!   `Ok`. A write that was under way may be there in whole, in part or not at all, in any order of its blocks.
//! - **Damage (a flipped bit, a lost sector, an edit):** a record that does not carry its check value is not believed,
//!   so no ceiling is ever made up; all intact records still count. If the damaged record was acknowledged, a ceiling
//!   may be lost, and [`Ledger::damaged`] is not 0 from then on, also after restarts: SAs with keys that come back must
//!   then be refused until they have new keys. Damage to the *last* write of a file cannot be told from a write that
//!   was under way; each start that finds one of those, and each compaction, begins a file whose first write can.
//! - **Not guaranteed:** that an older copy of the whole file, put back, is noticed (a virtual machine set back to a
//!   snapshot), nor anything against someone who can write to the directory and compute check values: there is no
//!   secret here, and who can write here can read the keys elsewhere.
//!
//! # The file
//! Slots of 32 bytes: key (16), value (8, little-endian), kind (2), check (6). The first slot names the file by a random
//! number; check values cover that name and the slot's position, so that neither a stale disk block nor a moved
//! record is believed. Each write is a *batch*: a slot that tells its number and length, then its records. Another file
//! takes its place (written, synchronised, renamed, directory synchronised) when three quarters of it are out of date.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{FlockOperation, flock};

/// Why the ledger cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Another process has it.
    #[error("{}: another datapath uses this state directory", .0.display())]
    InUse(PathBuf),
    /// The file is not a ledger of this version, or its first slot is damaged.
    #[error(
        "{}: not a ledger of this version, or damaged at its beginning; move it away only if the keys of all SAs \
         with static keys are changed",
        .0.display()
    )]
    Unreadable(PathBuf),
    /// An operation on the directory or a file failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The open ledger. It belongs to this process until it is dropped.
#[derive(Debug)]
pub struct Ledger {
    directory: PathBuf,
    ceilings: HashMap<Key, u64>,
    /// Keys that were forgotten since the last write.
    forgotten: Vec<Key>,
    contents: Written,
    /// Number of the next batch.
    batch: u64,
    damaged: u16,
    /// A write failed, so what the file holds at its end is unknown: it has to be replaced before the next one.
    broken: bool,
    _lock: File,
}

/// A key's fingerprint, or a file's name.
type Key = [u8; 16];

const SLOT: usize = 32;
const SLOT_U64: u64 = 32;
const MAGIC: u64 = u64::from_le_bytes(*b"postern1");
const CEILING: u16 = 1;
const FORGOTTEN: u16 = 2;
const BATCH: u16 = 3;
/// Beyond this the file is not ours: 100 million SAs.
const LARGEST: u64 = 1 << 32;
/// Forgotten keys wait for the next raise, but no more than these.
const FORGOTTEN_MAX: usize = 4096;
/// A file smaller than this is not worth replacing.
const SMALL: u64 = 4096;

impl Ledger {
    /// Opens the ledger in `directory`, or begins one; the directory is made if need be, readable by its owner only.
    pub fn open(directory: &Path) -> Result<Self, LedgerError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| LedgerError::Io { action, path, source }
        };
        make_directory(directory).map_err(failed("make the directory", directory))?;
        let path = directory.join("ledger.lock");
        let lock = private().create(true).truncate(false).open(&path).map_err(failed("open", &path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(LedgerError::InUse(path)),
            Err(error) => return Err(failed("lock", &path)(error.into())),
        }
        let path = directory.join("ledger");
        let (contents, existing) = match private().open(&path) {
            Ok(file) => (read(&file, &path)?, Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Contents::default(), None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let Contents { name, ceilings, slots, batch, damaged, newly_damaged, clean } = contents;
        if let Some(offset) = newly_damaged {
            tracing::error!(path = %path.display(), offset, records = damaged, "the ledger of sequence numbers is damaged");
        }
        let (contents, batch) = match existing {
            Some(file) if clean => (Written { file, name, slots }, batch),
            _ => {
                let written = write_new(directory, &ceilings, damaged).map_err(failed("write", &path))?;
                sync_directory(directory).map_err(failed("synchronise", directory))?;
                (written, 1)
            }
        };
        let directory = directory.to_owned();
        Ok(Self {
            directory,
            ceilings,
            forgotten: Vec::new(),
            contents,
            batch,
            damaged,
            broken: false,
            _lock: lock,
        })
    }

    /// The highest ceiling that was acknowledged for a key, `None` if there is none: numbers below it may have been used.
    pub fn ceiling(&self, key: &[u8; 16]) -> Option<u64> {
        self.ceilings.get(key).copied()
    }

    /// Acknowledged records that were lost to damage, now or in the past; see the module's text.
    pub const fn damaged(&self) -> u16 {
        self.damaged
    }

    /// Number of keys that have a ceiling.
    pub fn len(&self) -> usize {
        self.ceilings.len()
    }

    /// Whether no key has one.
    pub fn is_empty(&self) -> bool {
        self.ceilings.is_empty()
    }

    /// Raises ceilings. They are on stable storage when this returns `Ok`; until then no number below them may be used.
    /// One write and one synchronisation for all; a ceiling that is not above the present one costs nothing.
    pub fn raise(&mut self, ceilings: &[([u8; 16], u64)]) -> io::Result<()> {
        let raised: Vec<_> = ceilings
            .iter()
            .filter(|(key, ceiling)| self.ceiling(key).is_none_or(|now| now < *ceiling))
            .collect();
        if raised.is_empty() {
            return Ok(());
        }
        if self.broken {
            self.replace()?;
        }
        let forgotten = self.forgotten.iter().map(|key| (*key, 0, FORGOTTEN));
        let records: Vec<_> =
            forgotten.chain(raised.iter().map(|(key, ceiling)| (*key, *ceiling, CEILING))).collect();
        self.append(&records)?;
        self.forgotten.clear();
        for (key, ceiling) in raised {
            let now = self.ceilings.entry(*key).or_default();
            *now = (*now).max(*ceiling);
        }
        self.tidy();
        Ok(())
    }

    /// Takes keys out that never come back. Not durable until the next raise: what comes back is only a ceiling.
    pub fn forget(&mut self, keys: &[[u8; 16]]) -> io::Result<()> {
        for key in keys {
            if self.ceilings.remove(key).is_some() {
                self.forgotten.push(*key);
            }
        }
        if self.forgotten.len() < FORGOTTEN_MAX {
            return Ok(());
        }
        // The new file has only what is left.
        self.replace()
    }

    fn append(&mut self, records: &[(Key, u64, u16)]) -> io::Result<()> {
        let Written { file, name, slots } = &mut self.contents;
        let bytes = encode_batch(name, *slots, self.batch, records)?;
        // After a failed write, and more so after a failed synchronisation, the kernel may have forgotten dirty pages:
        // trying again on the same file would prove nothing.
        self.broken = true;
        file.write_all_at(&bytes, slots.saturating_mul(SLOT_U64))?;
        file.sync_data()?;
        self.broken = false;
        *slots += u64::try_from(bytes.len() / SLOT).map_err(io::Error::other)?;
        self.batch += 1;
        Ok(())
    }

    /// Replaces the file when most of it is out of date. The old one is as good, so a failure is none of the caller's.
    fn tidy(&mut self) {
        let live = u64::try_from(self.ceilings.len()).unwrap_or(u64::MAX);
        if self.contents.slots > SMALL.max(live.saturating_mul(4))
            && let Err(error) = self.replace()
        {
            tracing::warn!(%error, "cannot replace the ledger of sequence numbers by a shorter one");
        }
    }

    /// Puts a new file with what is live in the place of the old one.
    fn replace(&mut self) -> io::Result<()> {
        // Once the new file has its name all further writes go there, even if the directory cannot be synchronised;
        // until it is, either file may be found after a power cut, so nothing is acknowledged.
        let written = write_new(&self.directory, &self.ceilings, self.damaged)?;
        self.contents = written;
        self.batch = 1;
        self.broken = true;
        sync_directory(&self.directory)?;
        self.broken = false;
        self.forgotten.clear();
        Ok(())
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if !self.forgotten.is_empty()
            && let Err(error) = self.replace()
        {
            tracing::debug!(%error, "forgotten keys stay in the ledger of sequence numbers");
        }
    }
}

/// The file in use.
#[derive(Debug)]
struct Written {
    file: File,
    name: Key,
    /// Slots in it.
    slots: u64,
}

/// Writes a file with these ceilings and gives it the ledger's name; the directory is yet to be synchronised.
fn write_new(directory: &Path, ceilings: &HashMap<Key, u64>, damaged: u16) -> io::Result<Written> {
    let mut name = Key::default();
    SystemRandom::new().fill(&mut name).map_err(|_| io::Error::other("no random number from the kernel"))?;
    let records: Vec<_> = ceilings.iter().map(|(key, ceiling)| (*key, *ceiling, CEILING)).collect();
    let mut bytes = encode(&name, 0, name, MAGIC, damaged).to_vec();
    bytes.extend(encode_batch(&name, 1, 0, &records)?);
    let path = directory.join("ledger.new");
    let file = private().create(true).truncate(true).open(&path)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()?;
    std::fs::rename(&path, directory.join("ledger"))?;
    let slots = u64::try_from(bytes.len() / SLOT).map_err(io::Error::other)?;
    Ok(Written { file, name, slots })
}

/// Makes the directory and sees to it that a power cut does not take it away again.
fn make_directory(directory: &Path) -> io::Result<()> {
    let missing: Vec<_> = directory.ancestors().take_while(|path| !path.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    for made in missing {
        if let Some(parent) = made.parent() {
            sync_directory(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
        }
    }
    Ok(())
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// What a file holds.
#[derive(Debug, Default)]
struct Contents {
    name: Key,
    ceilings: HashMap<Key, u64>,
    slots: u64,
    batch: u64,
    damaged: u16,
    /// Offset of the first damage that was not known before.
    newly_damaged: Option<u64>,
    /// Whether more can be appended.
    clean: bool,
}

fn read(mut file: &File, path: &Path) -> Result<Contents, LedgerError> {
    let failed = |source| LedgerError::Io { action: "read", path: path.to_owned(), source };
    if file.metadata().map_err(failed)?.len() > LARGEST {
        return Err(LedgerError::Unreadable(path.to_owned()));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    decode_file(&bytes).ok_or_else(|| LedgerError::Unreadable(path.to_owned()))
}

/// `None` if the first slot is not that of a ledger.
fn decode_file(bytes: &[u8]) -> Option<Contents> {
    let (slots, rest) = bytes.as_chunks::<SLOT>();
    let (first, slots) = slots.split_first()?;
    let (name, _) = first.split_first_chunk::<16>()?;
    let Some((_, MAGIC, damaged)) = decode(name, 0, first) else { return None };
    let mut contents =
        Contents { name: *name, damaged, clean: rest.is_empty(), slots: 1, ..Contents::default() };
    let mut damage = Damage::default();
    for slot in slots {
        let record = decode(name, contents.slots, slot);
        damage.see(contents.slots, record);
        match record {
            Some((key, ceiling, CEILING)) => {
                let now = contents.ceilings.entry(key).or_default();
                *now = (*now).max(ceiling);
            }
            Some((key, _, FORGOTTEN)) => {
                contents.ceilings.remove(&key);
            }
            Some((key, _, BATCH)) => {
                let number = key.first_chunk().map_or(0, |number| u64::from_le_bytes(*number));
                contents.batch = number.saturating_add(1);
            }
            _ => {}
        }
        contents.slots += 1;
    }
    let (lost, offset, complete) = damage.finish(contents.slots);
    contents.damaged = contents.damaged.saturating_add(u16::try_from(lost).unwrap_or(u16::MAX));
    contents.newly_damaged = offset;
    contents.clean &= complete;
    Some(contents)
}

/// Tells damage from a write that was under way. A batch was acknowledged if it is the file's first (the file got its
/// place only then) or if any slot behind it is valid (the next batch is begun only then).
#[derive(Debug, Default)]
struct Damage {
    lost: u64,
    first: Option<u64>,
    /// Invalid slots of which it is not known yet whether they were acknowledged.
    open: u64,
    open_first: Option<u64>,
    /// First slot behind the present batch, and the number of that batch.
    end: u64,
    number: Option<u64>,
}

impl Damage {
    fn see(&mut self, position: u64, record: Option<(Key, u64, u16)>) {
        match record {
            None => {
                self.open += 1;
                self.open_first = self.open_first.or(Some(position));
            }
            Some((key, count, BATCH)) => {
                self.acknowledged();
                self.number = key.first_chunk().map(|number| u64::from_le_bytes(*number));
                self.end = position.saturating_add(1).saturating_add(count);
            }
            // Of a batch whose own slot is not valid.
            Some(_) if position >= self.end => {
                let within = self.open_first.is_some_and(|first| first < self.end) || self.number.is_none();
                if within {
                    self.acknowledged();
                }
            }
            Some(_) => {}
        }
    }

    fn acknowledged(&mut self) {
        self.lost += self.open;
        self.first = self.first.or(self.open_first);
        self.open = 0;
        self.open_first = None;
    }

    /// Slots lost, the offset of the first of them, and whether the file ends with a whole batch.
    fn finish(mut self, slots: u64) -> (u64, Option<u64>, bool) {
        let missing = self.end.saturating_sub(slots);
        let complete = self.open == 0 && missing == 0 && self.end == slots;
        // Without any batch the first one is lost.
        if matches!(self.number, None | Some(0))
            && (self.number.is_none() || missing != 0 || self.open_within())
        {
            self.open += missing.max(u64::from(self.number.is_none() && self.open == 0));
            self.open_first = self.open_first.or(Some(slots));
            self.acknowledged();
        }
        (self.lost, self.first.map(|slot| slot.saturating_mul(SLOT_U64)), complete && self.lost == 0)
    }

    fn open_within(&self) -> bool {
        self.open_first.is_some_and(|first| first < self.end)
    }
}

fn encode_batch(name: &Key, position: u64, batch: u64, records: &[(Key, u64, u16)]) -> io::Result<Vec<u8>> {
    let mut number = Key::default();
    if let Some(low) = number.first_chunk_mut() {
        *low = batch.to_le_bytes();
    }
    let count = u64::try_from(records.len()).map_err(io::Error::other)?;
    let header = (number, count, BATCH);
    let mut bytes = Vec::with_capacity((records.len() + 1) * SLOT);
    for ((key, value, kind), position) in [&header].into_iter().chain(records).zip(position..) {
        bytes.extend(encode(name, position, *key, *value, *kind));
    }
    Ok(bytes)
}

fn encode(name: &Key, position: u64, key: Key, value: u64, kind: u16) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    let check = check(name, position, key, value, kind);
    let fields = key.into_iter().chain(value.to_le_bytes()).chain(kind.to_le_bytes()).chain(check);
    for (to, from) in slot.iter_mut().zip(fields) {
        *to = from;
    }
    slot
}

/// Key, value and kind of a slot, if it is intact.
fn decode(name: &Key, position: u64, slot: &[u8; SLOT]) -> Option<(Key, u64, u16)> {
    let (key, rest) = slot.split_first_chunk::<16>()?;
    let (value, rest) = rest.split_first_chunk::<8>()?;
    let (kind, found) = rest.split_first_chunk::<2>()?;
    let (value, kind) = (u64::from_le_bytes(*value), u16::from_le_bytes(*kind));
    (check(name, position, *key, value, kind) == found).then_some((*key, value, kind))
}

fn check(name: &Key, position: u64, key: Key, value: u64, kind: u16) -> [u8; 6] {
    let mut context = Context::new(&SHA256);
    context.update(name);
    context.update(&position.to_le_bytes());
    context.update(&key);
    context.update(&value.to_le_bytes());
    context.update(&kind.to_le_bytes());
    context.finish().as_ref().first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    /// A directory of its own, gone with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("postern-ledger-{}-{number}", std::process::id()));
            Self(path)
        }

        fn file(&self) -> PathBuf {
            self.0.join("ledger")
        }

        fn with(bytes: &[u8]) -> Self {
            let scratch = Self::new();
            fs::create_dir_all(&scratch.0).unwrap();
            fs::write(scratch.file(), bytes).unwrap();
            scratch
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn key(n: u8) -> Key {
        [n; 16]
    }

    /// Decision 8: what was acknowledged is there again, whatever the order and however often it was raised.
    #[test]
    fn ceilings_survive_and_never_fall() {
        let scratch = Scratch::new();
        let mut ledger = Ledger::open(&scratch.0).unwrap();
        assert_eq!(ledger.ceiling(&key(1)), None);
        ledger.raise(&[(key(1), 100), (key(2), 7)]).unwrap();
        ledger.raise(&[(key(1), 50), (key(2), 9), (key(2), 8)]).unwrap();
        assert_eq!((ledger.ceiling(&key(1)), ledger.ceiling(&key(2))), (Some(100), Some(9)));
        drop(ledger);
        let mut ledger = Ledger::open(&scratch.0).unwrap();
        assert_eq!((ledger.ceiling(&key(1)), ledger.ceiling(&key(2))), (Some(100), Some(9)));
        ledger.raise(&[(key(3), u64::MAX)]).unwrap();
        ledger.forget(&[key(1), key(9)]).unwrap();
        assert_eq!((ledger.ceiling(&key(1)), ledger.len()), (None, 2));
        ledger.raise(&[(key(2), 10)]).unwrap();
        std::mem::forget(ledger.forgotten.split_off(0));
        drop(ledger);
        let ledger = Ledger::open(&scratch.0).unwrap();
        let ceilings = [1, 2, 3].map(|n| ledger.ceiling(&key(n)));
        assert_eq!((ceilings, ledger.damaged()), ([None, Some(10), Some(u64::MAX)], 0));
    }

    /// Two datapaths must not hand out the same numbers.
    #[test]
    fn one_process_at_a_time() {
        let scratch = Scratch::new();
        let ledger = Ledger::open(&scratch.0).unwrap();
        assert!(matches!(Ledger::open(&scratch.0), Err(LedgerError::InUse(_))));
        drop(ledger);
        Ledger::open(&scratch.0).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&scratch.0), mode(&scratch.file())), (0o700, 0o600));
    }

    /// The file does not grow with the number of raises.
    #[test]
    fn compaction_keeps_the_file_short() {
        let scratch = Scratch::new();
        let mut ledger = Ledger::open(&scratch.0).unwrap();
        for round in 1..=60_u64 {
            let batch: Vec<_> = (0..200).map(|n| (key(n), round * 10 + u64::from(n))).collect();
            ledger.raise(&batch).unwrap();
        }
        assert!(fs::metadata(scratch.file()).unwrap().len() <= (SMALL + 201) * SLOT_U64);
        ledger.forget(&(0..100).map(key).collect::<Vec<_>>()).unwrap();
        drop(ledger);
        let ledger = Ledger::open(&scratch.0).unwrap();
        assert_eq!(
            (ledger.len(), ledger.ceiling(&key(150)), ledger.ceiling(&key(50))),
            (100, Some(750), None)
        );
    }

    /// Where a batch ends, and the ceilings after it.
    type After = (usize, HashMap<Key, u64>);

    /// The bytes of a file and its batches.
    fn example() -> (Vec<u8>, Vec<After>) {
        let scratch = Scratch::new();
        let mut ledger = Ledger::open(&scratch.0).unwrap();
        ledger.raise(&[(key(1), 10), (key(2), 20)]).unwrap();
        ledger.replace().unwrap();
        let size = || usize::try_from(fs::metadata(scratch.file()).unwrap().len()).unwrap();
        let mut batches = vec![(size(), ledger.ceilings.clone())];
        for batch in
            [&[(key(1), 11), (key(3), 30)][..], &[(key(2), 22)], &[(key(4), 40), (key(1), 12), (key(5), 1)]]
        {
            ledger.raise(batch).unwrap();
            batches.push((size(), ledger.ceilings.clone()));
        }
        (fs::read(scratch.file()).unwrap(), batches)
    }

    fn at_least(contents: &HashMap<Key, u64>, expected: &HashMap<Key, u64>) -> bool {
        expected.iter().all(|(key, ceiling)| contents.get(key).is_some_and(|found| found >= ceiling))
    }

    /// Decision 8: a power cut leaves any part of the last write; all before it holds.
    #[test]
    fn torn_at_every_offset() {
        let (bytes, batches) = example();
        let (first, _) = batches[0];
        for length in 0..=bytes.len() {
            let Some(contents) = decode_file(&bytes[..length]) else {
                assert!(length < SLOT);
                continue;
            };
            for (end, expected) in &batches {
                assert!(*end > length || at_least(&contents.ceilings, expected), "cut at {length}");
            }
            // The first batch was there before the file was: a cut inside it is damage, one behind it is not.
            assert_eq!(contents.damaged == 0, length >= first, "cut at {length}");
            assert_eq!(contents.clean, batches.iter().any(|(end, _)| *end == length), "cut at {length}");
        }
    }

    /// Decision 8: blocks of the last write may be there out of order, or hold what was there before.
    #[test]
    fn torn_in_any_order() {
        let (bytes, batches) = example();
        let [.., (start, before), (end, _)] = batches.as_slice() else { panic!() };
        let slots = (end - start) / SLOT;
        for present in 0..1_u32 << slots {
            for filler in [0, 0xff] {
                let mut torn = bytes.clone();
                for slot in (0..slots).filter(|slot| present & (1 << slot) == 0) {
                    torn[start + slot * SLOT..][..SLOT].fill(filler);
                }
                let contents = decode_file(&torn).unwrap();
                assert!(at_least(&contents.ceilings, before));
                assert_eq!((contents.damaged, contents.newly_damaged), (0, None), "{present:b}");
            }
        }
    }

    /// Any flipped bit: nothing is made up, what is intact counts, and damage to what was acknowledged is told,
    /// for good. Only the last batch may be mistaken for a torn one.
    #[test]
    fn every_bit_flipped() {
        let (bytes, batches) = example();
        let [.., (last, before), (_, all)] = batches.as_slice() else { panic!() };
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let Some(contents) = decode_file(&flipped) else {
                assert!(bit / 8 < SLOT);
                continue;
            };
            assert!(bit / 8 >= SLOT);
            assert!(contents.ceilings.iter().all(|(key, ceiling)| all[key] >= *ceiling), "bit {bit}");
            let slot = bit / 8 / SLOT;
            for (index, intact) in
                bytes.as_chunks::<SLOT>().0.iter().enumerate().filter(|(index, _)| *index != slot)
            {
                let name = bytes.first_chunk().unwrap();
                if let Some((key, ceiling, CEILING)) = decode(name, index as u64, intact) {
                    assert!(contents.ceilings[&key] >= ceiling, "bit {bit}");
                }
            }
            if bit / 8 < *last {
                assert_eq!(
                    (contents.damaged, contents.newly_damaged),
                    (1, Some((slot * SLOT) as u64)),
                    "bit {bit}"
                );
            } else {
                assert_eq!(contents.damaged, 0);
                assert!(at_least(&contents.ceilings, before));
            }
            assert!(!contents.clean);
        }
    }

    /// Damage is remembered by the file that takes the place of the damaged one.
    #[test]
    fn damage_is_remembered() {
        let (mut bytes, batches) = example();
        bytes[batches[0].0 + 40] ^= 1;
        let scratch = Scratch::with(&bytes);
        for _ in 0..3 {
            let mut ledger = Ledger::open(&scratch.0).unwrap();
            assert_eq!(ledger.damaged(), 1);
            let ceiling = ledger.ceiling(&key(2)).unwrap();
            ledger.raise(&[(key(2), ceiling + 1)]).unwrap();
        }
        fs::write(scratch.file(), b"something else").unwrap();
        assert!(matches!(Ledger::open(&scratch.0), Err(LedgerError::Unreadable(_))));
    }

    /// A stale block of another life of the file, or a record in another place, is not believed.
    #[test]
    fn records_are_bound_to_file_and_place() {
        let (bytes, _) = example();
        let (other, _) = example();
        let mut mixed = bytes.clone();
        let end = mixed.len();
        mixed[end - SLOT..].copy_from_slice(&other[end - SLOT..]);
        assert_eq!(decode_file(&mixed).unwrap().ceilings.get(&key(5)), None);
        let mut moved = bytes.clone();
        moved.extend_from_slice(&bytes[end - SLOT..]);
        assert!(!decode_file(&moved).unwrap().clean);
    }

    /// After a torn write the next raise is found again.
    #[test]
    fn goes_on_after_a_torn_write() {
        let (bytes, batches) = example();
        let scratch = Scratch::with(&bytes[..bytes.len() - 50]);
        let mut ledger = Ledger::open(&scratch.0).unwrap();
        assert!(at_least(&ledger.ceilings, &batches[batches.len() - 2].1));
        ledger.raise(&[(key(9), 99)]).unwrap();
        drop(ledger);
        let ledger = Ledger::open(&scratch.0).unwrap();
        assert_eq!((ledger.ceiling(&key(9)), ledger.damaged()), (Some(99), 0));
    }

    /// 100,000 SAs are installed in under two seconds; the ledger must be a small part of that.
    #[test]
    fn many_at_once() {
        let scratch = Scratch::new();
        let mut ledger = Ledger::open(&scratch.0).unwrap();
        let batch: Vec<_> = (0..100_000_u64)
            .map(|n| {
                let mut key = Key::default();
                key[..8].copy_from_slice(&n.to_le_bytes());
                (key, n + 1)
            })
            .collect();
        let before = Instant::now();
        ledger.raise(&batch).unwrap();
        println!("100,000 ceilings raised in {} ms", before.elapsed().as_millis());
        drop(ledger);
        let before = Instant::now();
        let ledger = Ledger::open(&scratch.0).unwrap();
        println!("and read in {} ms", before.elapsed().as_millis());
        assert_eq!((ledger.len(), ledger.ceiling(&batch[77].0)), (100_000, Some(78)));
    }

    proptest! {
        /// No bytes make the reader panic.
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..400), noise in any::<bool>()) {
            let mut file = if noise { Vec::new() } else { encode(&key(7), 0, key(7), MAGIC, 0).to_vec() };
            file.extend(&bytes);
            let contents = decode_file(&file);
            prop_assert_eq!(contents.is_some(), !noise);
            prop_assert!(contents.is_none_or(|contents| contents.ceilings.is_empty()));
        }
    }
}
