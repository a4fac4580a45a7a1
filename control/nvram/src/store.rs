//! The writing half: what the running process holds. It can encrypt and not decrypt what it wrote.
//!
//! The live records are kept in memory, because a checkpoint writes them all again under a new key; they are kept
//! encrypted, under a key that is never written anywhere, so that a store's memory shows no record in the clear. That key
//! being in the same process, this guards against stray copies in dumps and logs, not against who reads the process.

use core::fmt;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::counter::{CounterError, MonotonicCounter};
use crate::format::{
    self, DataKey, FRAME_OVERHEAD, Fields, FrameHeader, HEADER_LEN, KEY_LEN, Kind, MAX_PLAINTEXT, MAX_RECORD,
};
use crate::keys::{KeyId, PublicKey};
use crate::storage::{Place, SUFFIX, Storage, StorageFile, UNFINISHED, is_ours, is_unfinished};

/// What a record is found by: for an IKE SA its two SPIs (cookies).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub [u8; KEY_LEN]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A change of the set of records.
pub enum Change {
    /// The record under this key is now this one.
    Put {
        /// What it is found by.
        key: Key,
        /// At most [`MAX_RECORD`] bytes.
        record: Zeroizing<Vec<u8>>,
    },
    /// There is no record under this key any more.
    Remove {
        /// What it was found by.
        key: Key,
    },
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { key, record } => write!(f, "Put({key:?}, {} bytes)", record.len()),
            Self::Remove { key } => write!(f, "Remove({key:?})"),
        }
    }
}

/// Where a store is and how often it is written anew.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the backup is.
    pub place: Place,
    /// Longest time between two checkpoints, and with it the life of a data key.
    pub checkpoint: Duration,
    /// Bytes of journal that make a checkpoint due before that.
    pub journal_limit: u64,
    /// Least time between two advances of the counter by checkpoints: what is put back from within it is not detected.
    /// Counters in TPMs wear out after 10^5 to 10^6 advances.
    pub counter_interval: Duration,
}

impl Options {
    /// The defaults, in a directory: 300 s (three times in fifteen minutes, RST-1), 64 MiB, one hour.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self::at(Place::Directory(directory.into()))
    }

    /// The defaults.
    pub fn at(place: Place) -> Self {
        Self {
            place,
            checkpoint: Duration::from_mins(5),
            journal_limit: 64 << 20,
            counter_interval: Duration::from_hours(1),
        }
    }
}

/// Why something is not in the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The storage failed. The changes are kept in memory; the next commit or checkpoint that succeeds writes them.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the storage said.
        source: io::Error,
    },
    /// A record is longer than [`MAX_RECORD`]. Nothing of the batch was taken.
    #[error("a record of {0} bytes; {MAX_RECORD} is the most")]
    TooLong(usize),
    /// The counter that guards against roll-back failed.
    #[error(transparent)]
    Counter(#[from] CounterError),
    /// The cryptographic library refused, which it has no reason to.
    #[error("the data key could not be made or used")]
    Crypto,
}

/// What a checkpoint wrote.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Records in it.
    pub records: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// How long it took, flushes included.
    pub took: Duration,
    /// The counter was to be advanced and could not be; it is tried again at the next checkpoint.
    pub counter_error: Option<CounterError>,
}

/// The store of one running process.
pub struct Store {
    storage: Box<dyn Storage>,
    counter: Box<dyn MonotonicCounter>,
    recipient: PublicKey,
    options: Options,
    live: HashMap<Key, Held>,
    /// Bytes of all live records.
    live_bytes: u64,
    memory: MemoryKey,
    /// `None` after a failure: what is in the file is not known, and it is not appended to.
    journal: Option<Journal>,
    generation: u64,
    epoch: u64,
    floor: u64,
    /// Generations of earlier processes are still there.
    older: bool,
    /// What files state, once it was read; `None` without a counter.
    protected: Option<Protected>,
    checkpointed: Instant,
    /// The frames of a batch, kept for its capacity. Ciphertext only.
    buffer: Vec<u8>,
}

/// A live record, encrypted.
struct Held {
    number: u64,
    sealed: Box<[u8]>,
}

/// The key of the records in memory, and the next nonce under it.
struct MemoryKey {
    key: DataKey,
    next: u64,
}

struct Journal {
    file: Box<dyn StorageFile>,
    key: DataKey,
    /// Where the next frame goes.
    at: u64,
    /// Where the first one went.
    began: u64,
}

struct Protected {
    /// The value in the newest file's header.
    stated: u64,
    /// The counter's own value as last seen.
    device: u64,
    advanced: Option<Instant>,
}

impl Store {
    /// Begins a new generation in `options.place`, beside older ones if there are any, and writes its first, empty
    /// checkpoint. See the crate's documentation for the order of things after a reset.
    ///
    /// # Errors
    /// The place cannot be made, written or is in use by another process; the counter cannot be read.
    pub fn open(
        options: Options,
        recipient: &PublicKey,
        counter: Box<dyn MonotonicCounter>,
    ) -> Result<Self, StoreError> {
        let storage = options.place.open().map_err(io_error("opening the NVRAM"))?;
        Self::open_in(storage, options, recipient, counter)
    }

    /// [`Store::open`] in any storage.
    ///
    /// # Errors
    /// As there.
    pub fn open_in(
        storage: Box<dyn Storage>,
        options: Options,
        recipient: &PublicKey,
        counter: Box<dyn MonotonicCounter>,
    ) -> Result<Self, StoreError> {
        let mut store = Self::begin(storage, options, recipient, counter)?;
        // Its checkpoints need one more.
        if store.storage.free().map_err(io_error("looking for room"))? < 2 {
            let source = io::Error::new(io::ErrorKind::StorageFull, "there is no room for one more backup");
            return Err(StoreError::Io { doing: "beginning a backup beside older ones", source });
        }
        store.checkpoint()?;
        Ok(store)
    }

    /// Begins a new generation in place of older ones, with what is still wanted of them: it is durable, with its first
    /// checkpoint, before they are removed (RST-7), and a reset at any point finds the old or the new one whole. The
    /// counter is advanced.
    ///
    /// # Errors
    /// As [`Store::open`], and [`StoreError::TooLong`]. The older generations may still be there and count.
    pub fn take_over(
        options: Options,
        recipient: &PublicKey,
        counter: Box<dyn MonotonicCounter>,
        wanted: &[(Key, Zeroizing<Vec<u8>>)],
    ) -> Result<(Self, Checkpoint), StoreError> {
        let storage = options.place.open().map_err(io_error("opening the NVRAM"))?;
        Self::take_over_in(storage, options, recipient, counter, wanted)
    }

    /// [`Store::take_over`] in any storage.
    ///
    /// # Errors
    /// As there.
    pub fn take_over_in(
        storage: Box<dyn Storage>,
        options: Options,
        recipient: &PublicKey,
        counter: Box<dyn MonotonicCounter>,
        wanted: &[(Key, Zeroizing<Vec<u8>>)],
    ) -> Result<(Self, Checkpoint), StoreError> {
        let mut store = Self::begin(storage, options, recipient, counter)?;
        for (key, record) in wanted {
            if record.len() > MAX_RECORD {
                return Err(StoreError::TooLong(record.len()));
            }
            store.put(*key, record)?;
        }
        let checkpoint = store.erase_older()?;
        Ok((store, checkpoint))
    }

    /// A new generation of which nothing is written.
    fn begin(
        mut storage: Box<dyn Storage>,
        options: Options,
        recipient: &PublicKey,
        mut counter: Box<dyn MonotonicCounter>,
    ) -> Result<Self, StoreError> {
        let mut newest = 0;
        let mut older = false;
        for name in storage.list().map_err(io_error("listing the NVRAM"))? {
            if is_unfinished(&name) {
                storage.remove(&name).map_err(io_error("removing an unfinished checkpoint"))?;
            } else if is_ours(&name) {
                older = true;
                newest = newest.max(generation_of(&name).unwrap_or(0));
            }
        }
        // Not from 1 again where everything was erased: a file put back from before that must not be the newest.
        let generation = newest.saturating_add(1).max(seconds_now());
        let protected = counter.read()?.map(|device| Protected { stated: device, device, advanced: None });
        let (key, _) = DataKey::generate().ok_or(StoreError::Crypto)?;
        Ok(Self {
            storage,
            counter,
            recipient: recipient.clone(),
            options,
            live: HashMap::new(),
            live_bytes: 0,
            memory: MemoryKey { key, next: 0 },
            journal: None,
            generation,
            epoch: 0,
            floor: if older { 0 } else { generation },
            older,
            protected,
            checkpointed: Instant::now(),
            buffer: Vec::new(),
        })
    }

    /// Makes `changes` durable, all in one write and one flush: it is so when this returns. Later changes of a key win
    /// over earlier ones. Writes a checkpoint instead where the journal is full or a write before failed.
    ///
    /// # Errors
    /// [`StoreError::TooLong`] takes none of the changes. After any other error they are in memory but perhaps not
    /// durable; the next commit or checkpoint that succeeds makes them so.
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let records = changes.iter().map(|change| match change {
            Change::Put { record, .. } => record.len(),
            Change::Remove { .. } => 0,
        });
        let mut bytes = 0;
        for record in records {
            if record > MAX_RECORD {
                return Err(StoreError::TooLong(record));
            }
            bytes += u64_of(FRAME_OVERHEAD + record);
        }
        let Some(last) = changes.len().checked_sub(1) else { return Ok(()) };
        let fits = |journal: &Journal| {
            journal.at - journal.began + bytes <= self.options.journal_limit && bytes <= journal.file.room()
        };
        let mut journal = self.journal.take_if(|journal| fits(journal));
        self.buffer.clear();
        for (index, change) in changes.iter().enumerate() {
            let (kind, key, record) = match change {
                Change::Put { key, record } => (Kind::Put, key, record.as_slice()),
                Change::Remove { key } => (Kind::Remove, key, [].as_slice()),
            };
            if let Some(journal) = &mut journal {
                let header = FrameHeader { kind, last: index == last, record: u16_of(record.len())? };
                let at = journal.at + u64_of(self.buffer.len());
                let sealed = journal.key.seal_frame(at, header, &key.0, record, &mut self.buffer);
                sealed.ok_or(StoreError::Crypto)?;
            }
            self.apply(change)?;
        }
        let Some(mut journal) = journal else {
            let done = self.checkpoint();
            if done.is_err() {
                // These changes are not in the file: one with later changes only is not what is in memory.
                self.journal = None;
            }
            return done.map(drop);
        };
        // On an error the journal is dropped with its key: what follows is a new file.
        journal.file.append(&self.buffer).map_err(io_error("appending to the journal"))?;
        journal.file.sync().map_err(io_error("flushing the journal"))?;
        journal.at += u64_of(self.buffer.len());
        self.journal = Some(journal);
        Ok(())
    }

    /// Whether [`Store::checkpoint`] should be called at `now`: the interval is over, a write failed, or the journal is
    /// three quarters full.
    pub fn checkpoint_due(&self, now: Instant) -> bool {
        let full = self.journal.as_ref().is_none_or(|journal| {
            let used = journal.at - journal.began;
            let limit = self.options.journal_limit.min(used.saturating_add(journal.file.room()));
            used > 0 && used >= limit / 4 * 3
        });
        full || now.saturating_duration_since(self.checkpointed) >= self.options.checkpoint
    }

    /// When [`Store::checkpoint_due`] becomes true if nothing is committed.
    pub fn next_checkpoint(&self) -> Instant {
        self.checkpointed + self.options.checkpoint
    }

    /// Writes all live records to a new file, under a new data key, in place of the old one, whose key is destroyed.
    ///
    /// # Errors
    /// The old file still counts then, and is still appended to if it was before.
    pub fn checkpoint(&mut self) -> Result<Checkpoint, StoreError> {
        let began = Instant::now();
        let name = file_name(self.generation);
        let unfinished = format!("{name}{UNFINISHED}");
        let advance = self.wants_advance();
        let written = self.write(&name, &unfinished, advance);
        // No two files have the same number, whatever became of the first.
        self.epoch = self.epoch.saturating_add(1);
        let journal = match written {
            Ok(journal) => journal,
            Err(error) => {
                // Nothing refers to it. What cannot be removed now is at the next start.
                let _ = self.storage.remove(&unfinished);
                return Err(error);
            }
        };
        let bytes = journal.at;
        if let Some(mut replaced) = self.journal.replace(journal) {
            // It has no name any more; a reset before this leaves nothing but the blocks of a removed file.
            let _ = replaced.file.destroy_key();
        }
        self.checkpointed = Instant::now();
        let counter_error = if advance { self.advance().err() } else { None };
        Ok(Checkpoint { records: self.live.len(), bytes, took: began.elapsed(), counter_error })
    }

    /// Makes everything that older generations hold not count any more, then removes it and advances the counter: what
    /// is still wanted of it has been committed to this store before (RST-7).
    ///
    /// # Errors
    /// The older generations may still be there, whole or in part.
    pub fn erase_older(&mut self) -> Result<Checkpoint, StoreError> {
        let before = (self.floor, self.older);
        (self.floor, self.older) = (self.generation, false);
        let done = self.checkpoint().inspect_err(|_| (self.floor, self.older) = before)?;
        let own = file_name(self.generation);
        for name in self.storage.list().map_err(io_error("listing the NVRAM"))? {
            if is_ours(&name) && name != own {
                self.storage.remove(&name).map_err(io_error("removing an older backup"))?;
            }
        }
        self.storage.sync().map_err(io_error("flushing the NVRAM"))?;
        Ok(done)
    }

    /// From the next checkpoint on, encrypts for another key (`postern key rotate`).
    pub fn set_recipient(&mut self, recipient: &PublicKey) {
        self.recipient = recipient.clone();
    }

    /// Whom it encrypts for.
    pub fn recipient(&self) -> KeyId {
        self.recipient.id()
    }

    /// Live records.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Whether there is a record under `key`.
    pub fn contains(&self, key: &Key) -> bool {
        self.live.contains_key(key)
    }

    /// Which generation this is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a counter guards against roll-back.
    pub fn is_protected(&self) -> bool {
        self.protected.is_some()
    }

    /// Bytes of the file now: checkpoint and journal. `None` after a failed write.
    pub fn file_bytes(&self) -> Option<u64> {
        self.journal.as_ref().map(|journal| journal.at)
    }

    /// Changes the set in memory.
    fn apply(&mut self, change: &Change) -> Result<(), StoreError> {
        match change {
            Change::Put { key, record } => self.put(*key, record)?,
            Change::Remove { key } => {
                let removed = self.live.remove(key);
                self.live_bytes -= removed.as_ref().map_or(0, Held::record_len);
            }
        }
        Ok(())
    }

    fn put(&mut self, key: Key, record: &[u8]) -> Result<(), StoreError> {
        let held = self.memory.seal(&key, record)?;
        self.live_bytes += held.record_len();
        let replaced = self.live.insert(key, held);
        self.live_bytes -= replaced.as_ref().map_or(0, Held::record_len);
        Ok(())
    }

    /// Writes and publishes a file with all live records.
    fn write(&mut self, name: &str, unfinished: &str, advance: bool) -> Result<Journal, StoreError> {
        /// Large enough for few calls, small enough not to matter beside the records.
        const CHUNK: usize = 1 << 20;
        let (key, bytes) = DataKey::generate().ok_or(StoreError::Crypto)?;
        let records = u64_of(self.live.len());
        let journal_at = u64_of(HEADER_LEN) + records * u64_of(FRAME_OVERHEAD) + self.live_bytes;
        let bound = Fields {
            generation: self.generation,
            epoch: self.epoch,
            floor: self.floor,
            counter: self.protected.as_ref().map(|protected| {
                if advance {
                    protected.stated.max(protected.device.saturating_add(1))
                } else {
                    protected.stated
                }
            }),
            created: seconds_now(),
            recipient: self.recipient.id(),
            records,
            journal_at,
        };
        let stated = bound.counter;
        let bound = bound.bound();
        let sealed = self.recipient.seal(&bytes, &bound).ok_or(StoreError::Crypto)?;
        drop(bytes);

        let mut file = self.storage.create(unfinished).map_err(io_error("creating a checkpoint"))?;
        let mut chunk = format::header_bytes(&bound, &sealed);
        chunk.reserve(CHUNK + MAX_PLAINTEXT + FRAME_OVERHEAD);
        let mut at = 0;
        let mut plain = Zeroizing::new([0; MAX_RECORD]);
        for (key_of_record, held) in &self.live {
            let record = self.memory.open(key_of_record, held, plain.as_mut())?;
            let header = FrameHeader { kind: Kind::Put, last: false, record: u16_of(record.len())? };
            let sealed =
                key.seal_frame(at + u64_of(chunk.len()), header, &key_of_record.0, record, &mut chunk);
            sealed.ok_or(StoreError::Crypto)?;
            if chunk.len() >= CHUNK {
                file.append(&chunk).map_err(io_error("writing a checkpoint"))?;
                at += u64_of(chunk.len());
                chunk.clear();
            }
        }
        file.append(&chunk).map_err(io_error("writing a checkpoint"))?;
        at += u64_of(chunk.len());
        debug_assert_eq!(at, journal_at);
        file.sync().map_err(io_error("flushing a checkpoint"))?;
        let renamed = self.storage.rename(unfinished, name).map_err(io_error("renaming a checkpoint"));
        let published = renamed.and_then(|()| self.storage.sync().map_err(io_error("flushing the NVRAM")));
        if let Err(error) = published {
            // Which of the two files a reset finds is not known; neither is appended to.
            self.journal = None;
            return Err(error);
        }
        if let (Some(protected), Some(stated)) = (&mut self.protected, stated) {
            protected.stated = stated;
        }
        Ok(Journal { file, key, at, began: at })
    }

    /// Whether the file about to be written is to make all before it worthless. Not while older generations are still
    /// to be read after a second reset.
    fn wants_advance(&self) -> bool {
        let due = |protected: &Protected| {
            protected.stated > protected.device
                || protected.advanced.is_none_or(|at| at.elapsed() >= self.options.counter_interval)
        };
        !self.older && self.protected.as_ref().is_some_and(due)
    }

    /// Advances the counter to what the file states.
    fn advance(&mut self) -> Result<(), CounterError> {
        let Some(protected) = &mut self.protected else { return Ok(()) };
        while protected.device < protected.stated {
            let before = protected.device;
            protected.device = self.counter.advance()?;
            if protected.device <= before {
                return Err(CounterError("it did not go up".into()));
            }
        }
        protected.advanced = Some(Instant::now());
        if protected.device == protected.stated {
            return Ok(());
        }
        // The file just written needs a lower value than the counter has: the next one states the right one.
        protected.stated = protected.device;
        self.journal = None;
        Err(CounterError("someone else advances it".into()))
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("generation", &self.generation)
            .field("epoch", &self.epoch)
            .field("records", &self.live.len())
            .field("bytes", &self.file_bytes())
            .field("recipient", &self.recipient)
            .finish_non_exhaustive()
    }
}

impl Held {
    fn record_len(&self) -> u64 {
        u64_of(self.sealed.len().saturating_sub(format::TAG_LEN))
    }
}

impl MemoryKey {
    fn seal(&mut self, key: &Key, record: &[u8]) -> Result<Held, StoreError> {
        let number = self.next;
        self.next = number.checked_add(1).ok_or(StoreError::Crypto)?;
        let mut sealed = Vec::with_capacity(record.len() + format::TAG_LEN);
        self.key.seal(number, &key.0, &[record], &mut sealed).ok_or(StoreError::Crypto)?;
        Ok(Held { number, sealed: sealed.into_boxed_slice() })
    }

    fn open<'p>(&self, key: &Key, held: &Held, plain: &'p mut [u8]) -> Result<&'p [u8], StoreError> {
        self.key.open(held.number, &key.0, &held.sealed, plain).ok_or(StoreError::Crypto)
    }
}

/// The file of a generation.
pub(crate) fn file_name(generation: u64) -> String {
    format!("generation-{generation:016x}{SUFFIX}")
}

/// The generation of a file, by its name.
fn generation_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("generation-")?.strip_suffix(SUFFIX)?;
    u64::from_str_radix(digits, 16).ok()
}

/// Seconds since 1970.
fn seconds_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn io_error(doing: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io { doing, source }
}

fn u16_of(length: usize) -> Result<u16, StoreError> {
    u16::try_from(length).map_err(|_| StoreError::TooLong(length))
}

/// A `usize` has at most 64 bits wherever this builds.
fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
