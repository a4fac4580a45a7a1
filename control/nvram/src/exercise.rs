//! A storage medium in memory that loses power, fills up and fails on demand: what the tests and the fuzz target use.
//!
//! What was not flushed is, after a power cut, there or not, sector by sector, in any combination, one of them torn at any
//! byte, and what is missing below the end reads as zeros or as noise. Names change in the order in which they were
//! changed, but only some of the changes since the last flush of the directory are there.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use zeroize::Zeroizing;

use crate::backup::{Backup, inspect_bytes};
use crate::counter::NoCounter;
use crate::device::Blocks;
use crate::format::HEADER_LEN;
use crate::holder::{KeyError, KeyHolder};
use crate::keys::{KeyRing, PrivateKey, generate};
use crate::storage::{Storage, StorageFile};
use crate::store::{Change, Key, Options, Store};

const SECTOR: usize = 512;

/// The name of the only file of a medium that is a device.
const DEVICE: &str = "device";

/// A medium; clones are the same one.
#[derive(Clone, Default)]
pub struct Medium(Arc<Mutex<State>>);

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The power goes after so many units: a byte written is one, and so is every flush and change of a name.
    pub power: Option<u64>,
    /// Bytes that still fit; writes behind that are cut short and fail.
    pub room: Option<u64>,
    /// Every change fails.
    pub read_only: bool,
    /// Every flush fails, and what was to be flushed is lost without another word, as Linux does it.
    pub flush_fails: bool,
}

/// How the unflushed part survives a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Nothing of it.
    Nothing,
    /// All of it.
    Everything,
    /// What this seed decides, as the module says.
    Mixed(u64),
}

#[derive(Default)]
struct State {
    faults: Faults,
    off: bool,
    spent: u64,
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// The directory after each change since its last flush.
    name_changes: Vec<BTreeMap<String, usize>>,
}

#[derive(Clone, Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Written since the last flush: where, and what.
    writes: Vec<(usize, Vec<u8>)>,
}

impl Medium {
    /// Sets what goes wrong from now on; power is counted from now.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        state.spent = 0;
    }

    /// Units of work done since the faults were set.
    pub fn spent(&self) -> u64 {
        self.state().spent
    }

    /// The medium as the next start finds it, without faults.
    #[must_use]
    pub fn after_power_cut(&self, survival: Survival) -> Self {
        let state = self.state();
        let mut dice = Dice(match survival {
            Survival::Mixed(seed) => seed,
            Survival::Nothing | Survival::Everything => 0,
        });
        let files: Vec<_> = state
            .files
            .iter()
            .map(|file| {
                let bytes = match survival {
                    Survival::Nothing => file.durable.clone(),
                    Survival::Everything => file.now.clone(),
                    Survival::Mixed(_) => file.survivor(&mut dice),
                };
                Content { now: bytes.clone(), durable: bytes, writes: Vec::new() }
            })
            .collect();
        let names = match survival {
            Survival::Nothing => &state.durable_names,
            Survival::Everything => &state.names,
            Survival::Mixed(_) => {
                let kept = dice.below(state.name_changes.len() + 1);
                kept.checked_sub(1)
                    .and_then(|kept| state.name_changes.get(kept))
                    .unwrap_or(&state.durable_names)
            }
        };
        let names = names.clone();
        let state = State { files, durable_names: names.clone(), names, ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    /// All files by name.
    pub fn snapshot(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        let bytes = |index: &usize| state.files.get(*index).map_or_else(Vec::new, |file| file.now.clone());
        state.names.iter().map(|(name, index)| (name.clone(), bytes(index))).collect()
    }

    /// A medium with these files, all durable.
    pub fn of(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let medium = Self::default();
        {
            let mut state = medium.state();
            for (name, bytes) in files {
                let index = state.files.len();
                state.files.push(Content { now: bytes.clone(), durable: bytes, writes: Vec::new() });
                state.names.insert(name, index);
            }
            state.durable_names = state.names.clone();
        }
        medium
    }

    /// A medium that is one device of so many bytes, all zeros; its [`Blocks`] are that device's.
    pub fn device(size: usize) -> Self {
        Self::of([(DEVICE.to_owned(), vec![0; size])])
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Spends what a change costs; how much of it is still done.
    fn spend(&mut self, units: usize) -> io::Result<usize> {
        if self.off {
            return Err(io::Error::other("no power"));
        }
        if self.faults.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let left = self.faults.power.map_or(u64::MAX, |power| power.saturating_sub(self.spent));
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        self.spent += u64::try_from(units.min(left)).unwrap_or(u64::MAX);
        self.off = units > left;
        Ok(units.min(left))
    }

    /// A change that is done or not.
    fn whole(&mut self) -> io::Result<()> {
        if self.spend(1)? == 1 { Ok(()) } else { Err(io::Error::other("the power went")) }
    }

    fn flush(&mut self, index: usize) -> io::Result<()> {
        self.whole()?;
        let fails = self.faults.flush_fails;
        let Some(file) = self.files.get_mut(index) else { return Ok(()) };
        if fails {
            // The pages are marked clean and never written: what a reset finds is what was durable before.
            file.writes.clear();
            return Err(io::Error::other("flush failed"));
        }
        // Not `now`: after a failed flush that is more than what is on the medium.
        for (at, bytes) in mem::take(&mut file.writes) {
            write_at(&mut file.durable, at, &bytes);
        }
        Ok(())
    }

    fn write(&mut self, index: usize, at: usize, bytes: &[u8]) -> io::Result<()> {
        let room = self.faults.room.map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX));
        let fits = bytes.len().min(room);
        let done = self.spend(fits)?;
        if let Some(room) = &mut self.faults.room {
            *room -= u64::try_from(done).unwrap_or(0);
        }
        let written = bytes.get(..done).unwrap_or_default();
        if let Some(file) = self.files.get_mut(index) {
            write_at(&mut file.now, at, written);
            file.writes.push((at, written.to_vec()));
        }
        match () {
            () if done < fits => Err(io::Error::other("the power went")),
            () if fits < bytes.len() => Err(io::ErrorKind::StorageFull.into()),
            () => Ok(()),
        }
    }

    fn changed_names(&mut self) {
        self.name_changes.push(self.names.clone());
    }
}

impl Content {
    fn survivor(&self, dice: &mut Dice) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let noise = dice.below(2) == 0;
        for (at, written) in &self.writes {
            for (number, sector) in written.chunks(SECTOR).enumerate() {
                let at = at + number * SECTOR;
                let kept = match dice.below(3) {
                    0 => 0,
                    1 => sector.len(),
                    _ => dice.below(sector.len() + 1),
                };
                // Whether the end of the file moved is decided apart from whether the data came.
                let grew = dice.below(2) == 0;
                if grew && at + sector.len() > bytes.len() {
                    bytes.resize_with(at + sector.len(), || if noise { dice.byte() } else { 0 });
                }
                write_at(&mut bytes, at, sector.get(..kept).unwrap_or_default());
            }
        }
        bytes
    }
}

fn write_at(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if !bytes.is_empty() && end > file.len() {
        file.resize(end, 0);
    }
    if let Some(to) = file.get_mut(at..end) {
        to.copy_from_slice(bytes);
    }
}

/// Of the first file: see [`Medium::device`].
impl Blocks for Medium {
    fn size(&self) -> io::Result<u64> {
        let state = self.state();
        Ok(state.files.first().map_or(0, |file| u64::try_from(file.now.len()).unwrap_or(u64::MAX)))
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<usize> {
        let state = self.state();
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let from = state.files.first().and_then(|file| file.now.get(at..)).unwrap_or_default();
        into.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        Ok(from.len().min(into.len()))
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.state().write(0, usize::try_from(at).unwrap_or(usize::MAX), bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.state().flush(0)
    }
}

impl Storage for Medium {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.state().names.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let state = self.state();
        let file = state.names.get(name).and_then(|index| state.files.get(*index));
        file.map(|file| file.now.clone()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        let mut state = self.state();
        state.whole()?;
        let index = state.files.len();
        state.files.push(Content::default());
        state.names.insert(name.to_owned(), index);
        state.changed_names();
        Ok(Box::new(Open { medium: self.clone(), index, at: 0 }))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.whole()?;
        let index = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), index);
        state.changed_names();
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let index = *self.state().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Open { medium: self.clone(), index, at: 0 }.destroy_key()?;
        let mut state = self.state();
        state.whole()?;
        state.names.remove(name);
        state.changed_names();
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.state();
        state.whole()?;
        if state.faults.flush_fails {
            return Err(io::Error::other("flush failed"));
        }
        state.durable_names = state.names.clone();
        state.name_changes.clear();
        Ok(())
    }
}

/// A file that is being written.
struct Open {
    medium: Medium,
    index: usize,
    at: usize,
}

impl StorageFile for Open {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let done = self.medium.state().write(self.index, self.at, bytes);
        self.at += bytes.len();
        done
    }

    fn sync(&mut self) -> io::Result<()> {
        self.medium.state().flush(self.index)
    }

    fn destroy_key(&mut self) -> io::Result<()> {
        let mut state = self.medium.state();
        let length = state.files.get(self.index).map_or(0, |file| file.now.len()).min(HEADER_LEN);
        state.write(self.index, 0, [0; HEADER_LEN].get(..length).unwrap_or_default())?;
        state.flush(self.index)
    }
}

/// What the fuzz target and the property test call: any bytes as a file, and a real file that is mangled as they say, are
/// read without a panic, and give no record that was not put.
///
/// # Panics
/// When that does not hold.
pub fn read_mangled(bytes: &[u8]) {
    static REAL: OnceLock<Option<(Vec<u8>, Zeroizing<String>)>> = OnceLock::new();
    let Some((real, key)) = REAL.get_or_init(real_file) else { return };
    let _ = inspect_bytes(bytes);
    let read = |file: Vec<u8>| {
        let medium = Medium::of([("generation-0000000000000001.nvram".to_owned(), file)]);
        Backup::read_from(&medium, &Holder(key), &mut NoCounter)
    };
    let _ = read(bytes.to_vec());
    // Five bytes a change: what, where (two), how much, with what.
    let mut file = real.clone();
    for change in bytes.chunks_exact(5) {
        let [what, high, low, length, with] = *change else { continue };
        let at = usize::from(u16::from_be_bytes([high, low])) % file.len().max(1);
        let end = (at + usize::from(length)).min(file.len());
        match what % 5 {
            0 => file.iter_mut().skip(at).take(usize::from(length)).for_each(|byte| *byte ^= with),
            1 => file.truncate(at),
            2 => drop(file.drain(at..end)),
            3 => drop(file.splice(at..at, core::iter::repeat_n(with, usize::from(length)))),
            _ => {
                let to = usize::from(with) * 16 % file.len().max(1);
                let moved: Vec<_> = file.iter().skip(at).take(usize::from(length)).copied().collect();
                file.iter_mut().skip(to).zip(moved).for_each(|(to, from)| *to = from);
            }
        }
    }
    let Ok(backup) = read(file) else { return };
    for (key, record) in &backup.records {
        let [number, ..] = key.0;
        let generations = [record_of(number, 0), record_of(number, 1)];
        assert!(
            key.0 == [number; 16] && generations.contains(record),
            "a record that was never put: {key:?}"
        );
    }
}

/// A file with a checkpoint and a journal, and its private key.
fn real_file() -> Option<(Vec<u8>, Zeroizing<String>)> {
    let (public, private) = generate();
    let medium = Medium::default();
    let storage = Box::new(medium.clone());
    let mut store = Store::open_in(storage, Options::new(""), &public, Box::new(NoCounter)).ok()?;
    let put =
        |number, generation| Change::Put { key: Key([number; 16]), record: record_of(number, generation) };
    store.commit(&(0..8).map(|number| put(number, 0)).collect::<Vec<_>>()).ok()?;
    store.checkpoint().ok()?;
    for number in 4..12 {
        store
            .commit(&[put(number, 1), put(number + 8, 0), Change::Remove { key: Key([number - 4; 16]) }])
            .ok()?;
    }
    let (_, file) = medium.snapshot().pop_first()?;
    Some((file, PrivateKey::to_text(&private)))
}

fn record_of(number: u8, generation: u8) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(vec![number ^ generation.wrapping_mul(0x55); 8 + usize::from(number) * 7])
}

struct Holder<'a>(&'a str);

impl KeyHolder for Holder<'_> {
    fn unseal(&self) -> Result<KeyRing, KeyError> {
        KeyRing::from_text(self.0).map_err(|reason| KeyError::Text { what: self.describe(), reason })
    }

    fn describe(&self) -> String {
        "memory".into()
    }
}

/// splitmix64: the same decisions for the same seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }
}
