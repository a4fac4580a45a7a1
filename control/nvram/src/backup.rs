//! The reading half: what comes back after a reset. Everything here may be torn, changed, old or someone else's.
//!
//! Files are read into memory and walked frame by frame. Behind damage the walk looks at every byte for the next frame
//! that opens; since a frame opens only at its own offset of its own file, what is found is what was written there. No
//! input makes it panic, and the number of frames that may fail to open is bounded.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::counter::{CounterError, MonotonicCounter};
use crate::device::{Blocks, Device};
use crate::format::{DataKey, FrameHeader, HEADER_LEN, Header, HeaderError, Kind, MAX_PLAINTEXT, headers};
use crate::holder::{KeyError, KeyHolder};
use crate::keys::{KeyId, KeyRing};
use crate::storage::{self, SUFFIX, Storage};
use crate::store::Key;

/// Frames of one file that may fail to open before the rest is given up: a second of work for a hostile file.
const MAX_FAILURES: u32 = 1 << 18;

/// The records of all generations that count, and what was found on the way.
#[derive(Default)]
pub struct Backup {
    /// What was live, newest state of each key, ordered by key.
    pub records: Vec<(Key, Zeroizing<Vec<u8>>)>,
    /// What was used, and what was not and why.
    pub report: Report,
}

/// What a reader found. All zero and empty for a directory without backups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Each file, oldest generation first; those that are no backup at all come first.
    pub files: Vec<FileReport>,
    /// The counter's value, where there is one.
    pub counter: Option<u64>,
    /// Live records that are handed out.
    pub records: u64,
}

/// What became of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// Its name, without directory.
    pub name: String,
    /// Whether it was used.
    pub status: FileStatus,
    /// What it says about itself, if its header is intact.
    pub inspection: Option<Inspection>,
    /// Intact frames of the checkpoint.
    pub checkpoint_records: u64,
    /// Records of the checkpoint that are missing or damaged.
    pub missing: u64,
    /// Changes of the journal that were used.
    pub changes: u64,
    /// Places in the journal where frames are damaged, with intact ones behind.
    pub damaged: u64,
    /// Records of a batch whose end is missing: what was being written when the power went. They were used.
    pub uncommitted: u64,
    /// Bytes behind the last intact frame that are not zero.
    pub torn_bytes: u64,
}

/// Why a file was used or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileStatus {
    /// It was.
    Used,
    /// A newer generation says that this one does not count any more: a reset came before it was removed, or it was put
    /// back.
    Superseded,
    /// The counter is above what the file needs: it was put back.
    RolledBack {
        /// What it needs.
        stated: u64,
    },
    /// It was written without a counter and there is one now.
    Unprotected,
    /// No key of the holder is the one it is for.
    WrongKey(KeyId),
    /// It is for our key, but the data key does not open: changed, or not made by us.
    NotOurs,
    /// Both copies of its header are damaged.
    Damaged,
    /// A version of the format that this program does not know.
    Version(u16),
    /// It does not begin like a backup.
    NotABackup,
    /// It could not be read.
    Unreadable(String),
}

/// What a file shows without a key. None of it is authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Bytes of the file.
    pub bytes: u64,
    /// Larger for each open: seconds since 1970, or one more than the newest that was there.
    pub generation: u64,
    /// Counts the checkpoints of the generation, from 0.
    pub epoch: u64,
    /// Generations below this one do not count any more.
    pub floor: u64,
    /// The counter's value that it needs; `None` if nothing guards it against roll-back.
    pub counter: Option<u64>,
    /// When the checkpoint was written.
    pub created: SystemTime,
    /// Whom it is for.
    pub recipient: KeyId,
    /// Records that the checkpoint has.
    pub checkpoint_records: u64,
    /// Bytes of the checkpoint, header included.
    pub checkpoint_bytes: u64,
    /// Batches in the journal.
    pub batches: u64,
    /// Records put by the journal.
    pub puts: u64,
    /// Records removed by the journal.
    pub removes: u64,
    /// Bytes of the journal, as far as frames follow each other.
    pub journal_bytes: u64,
    /// Bytes behind them that are not zero.
    pub trailing_bytes: u64,
    /// Payload bytes of all records, put or in the checkpoint.
    pub payload_bytes: u64,
}

/// A file's name, and what it shows.
pub type Inspected = (String, Result<Inspection, ReadError>);

/// Why there is no backup to speak of.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The directory or file cannot be read.
    #[error("reading the backup: {0}")]
    Io(#[from] io::Error),
    /// The private half is not to be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The counter that guards against roll-back cannot be read.
    #[error(transparent)]
    Counter(#[from] CounterError),
    /// The file is not a backup, is damaged or of another version; only for a single file that is inspected.
    #[error("{0}")]
    File(FileStatus),
}

impl Backup {
    /// Reads all generations of a directory or a device, or one file, and merges them, the newest last. A place that is
    /// not there is an empty backup. The private half is asked for only if there is a file, and wiped before this returns.
    ///
    /// # Errors
    /// The directory cannot be listed, the holder or the counter fail. What is wrong with files is in the report.
    pub fn read(
        path: &Path,
        holder: &dyn KeyHolder,
        counter: &mut dyn MonotonicCounter,
    ) -> Result<Self, ReadError> {
        let files = storage::read_all(path)?;
        Self::read_files(files, holder, counter)
    }

    /// [`Backup::read`] from any storage.
    ///
    /// # Errors
    /// As there.
    pub fn read_from(
        storage: &dyn Storage,
        holder: &dyn KeyHolder,
        counter: &mut dyn MonotonicCounter,
    ) -> Result<Self, ReadError> {
        let names = storage.list()?.into_iter().filter(|name| name.ends_with(SUFFIX));
        let files = names.map(|name| (name.clone(), storage.read(&name))).collect();
        Self::read_files(files, holder, counter)
    }

    /// [`Backup::read`] of a device, which someone else may have open.
    ///
    /// # Errors
    /// As there, and if there is something else on it.
    pub fn read_device(
        blocks: &dyn Blocks,
        holder: &dyn KeyHolder,
        counter: &mut dyn MonotonicCounter,
    ) -> Result<Self, ReadError> {
        Self::read_files(Device::read_files(blocks)?, holder, counter)
    }

    fn read_files(
        files: Vec<(String, io::Result<Vec<u8>>)>,
        holder: &dyn KeyHolder,
        counter: &mut dyn MonotonicCounter,
    ) -> Result<Self, ReadError> {
        if files.is_empty() {
            return Ok(Self::default());
        }
        let counter = counter.read()?;
        let ring = holder.unseal()?;
        let mut found: Vec<_> =
            files.into_iter().map(|(name, bytes)| Found::open(name, bytes, &ring)).collect();
        drop(ring);
        found.sort_by_cached_key(Found::order);
        let floor =
            found.iter().filter_map(|file| Some(file.key.as_ref()?.0.fields.floor)).max().unwrap_or(0);
        let mut live = HashMap::new();
        let mut report = Report { counter, ..Report::default() };
        let mut newer = found.iter().skip(1).map(Found::order).collect::<Vec<_>>().into_iter();
        for mut file in found {
            let next = newer.next();
            if let Some((header, key)) = &file.key {
                file.report.status = match (counter, header.fields.counter) {
                    (Some(device), Some(stated)) if stated < device => FileStatus::RolledBack { stated },
                    (Some(_), None) => FileStatus::Unprotected,
                    _ if header.fields.generation < floor => FileStatus::Superseded,
                    // Two files of one generation are two copies of it: the later one counts.
                    _ if next.is_some_and(|(generation, _)| generation == Some(header.fields.generation)) => {
                        FileStatus::Superseded
                    }
                    _ => FileStatus::Used,
                };
                if file.report.status == FileStatus::Used {
                    Walk::new(&file.bytes, header, key, &mut file.report).run(&mut live);
                }
            }
            report.files.push(file.report);
        }
        let mut records: Vec<_> = live.into_iter().collect();
        records.sort_unstable_by_key(|(key, _)| *key);
        report.records = u64_of(records.len());
        Ok(Self { records, report })
    }

    /// What the files at `path`, a directory, a device or one file, show to someone without any key; the oldest
    /// generation of a directory first.
    ///
    /// # Errors
    /// It cannot be listed.
    pub fn inspect(path: &Path) -> Result<Vec<Inspected>, ReadError> {
        let inspect = |(name, bytes): (String, io::Result<Vec<u8>>)| {
            let inspection = bytes.map_err(ReadError::Io);
            (name, inspection.and_then(|bytes| inspect_bytes(&bytes).map_err(ReadError::File)))
        };
        Ok(storage::read_all(path)?.into_iter().map(inspect).collect())
    }
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backup").field("report", &self.report).finish_non_exhaustive()
    }
}

impl Report {
    /// Whether every file was whole, ours and the newest: nothing to tell anyone.
    pub fn is_clean(&self) -> bool {
        self.files.iter().all(FileReport::is_clean)
    }

    /// Files that a counter or a newer generation shows to be old.
    pub fn rolled_back(&self) -> usize {
        self.files
            .iter()
            .filter(|file| matches!(file.status, FileStatus::RolledBack { .. } | FileStatus::Unprotected))
            .count()
    }
}

impl FileReport {
    fn new(name: String, status: FileStatus) -> Self {
        Self {
            name,
            status,
            inspection: None,
            checkpoint_records: 0,
            missing: 0,
            changes: 0,
            damaged: 0,
            uncommitted: 0,
            torn_bytes: 0,
        }
    }

    /// Whether it was used and nothing in it was missing.
    pub fn is_clean(&self) -> bool {
        let Self { name: _, status, inspection: _, checkpoint_records: _, changes: _, .. } = self;
        let Self { missing, damaged, uncommitted, torn_bytes, .. } = self;
        *status == FileStatus::Used
            && [missing, damaged, uncommitted, torn_bytes].into_iter().all(|count| *count == 0)
    }
}

impl fmt::Display for FileStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Used => f.write_str("used"),
            Self::Superseded => f.write_str("superseded by a newer generation"),
            Self::RolledBack { stated } => write!(f, "rolled back: it needs counter value {stated}"),
            Self::Unprotected => f.write_str("written without the counter that there is now"),
            Self::WrongKey(id) => write!(f, "encrypted for another key, {id}"),
            Self::NotOurs => f.write_str("its data key does not open: changed, or not written by us"),
            Self::Damaged => f.write_str("both copies of its header are damaged"),
            Self::Version(version) => write!(f, "of version {version}, which this program does not know"),
            Self::NotABackup => f.write_str("not a backup"),
            Self::Unreadable(error) => write!(f, "cannot be read: {error}"),
        }
    }
}

/// What a file shows without a key, from its bytes.
pub(crate) fn inspect_bytes(file: &[u8]) -> Result<Inspection, FileStatus> {
    let headers = headers(file).map_err(status_of)?;
    headers.first().map(|header| inspect_frames(file, header)).ok_or(FileStatus::NotABackup)
}

fn inspect_frames(file: &[u8], header: &Header) -> Inspection {
    let fields = header.fields;
    let mut inspection = Inspection {
        bytes: u64_of(file.len()),
        generation: fields.generation,
        epoch: fields.epoch,
        floor: fields.floor,
        counter: fields.counter,
        // A time that cannot be is shown as 1970.
        created: SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(fields.created))
            .unwrap_or(SystemTime::UNIX_EPOCH),
        recipient: fields.recipient,
        checkpoint_records: fields.records,
        checkpoint_bytes: fields.journal_at,
        batches: 0,
        puts: 0,
        removes: 0,
        journal_bytes: 0,
        trailing_bytes: 0,
        payload_bytes: 0,
    };
    let mut at = HEADER_LEN;
    let mut end = at;
    while let Some(frame) = file.get(at..).and_then(FrameHeader::parse)
        && at + frame.frame_len() <= file.len()
    {
        let in_journal = u64_of(at) >= fields.journal_at;
        at += frame.frame_len();
        inspection.payload_bytes += u64::from(frame.record);
        if in_journal {
            inspection.batches += u64::from(frame.last);
            inspection.puts += u64::from(frame.kind == Kind::Put);
            inspection.removes += u64::from(frame.kind == Kind::Remove);
            inspection.journal_bytes += u64_of(frame.frame_len());
        }
        end = at;
    }
    inspection.trailing_bytes = not_zero(file, end);
    inspection
}

/// A file, as far as its header goes.
struct Found {
    bytes: Vec<u8>,
    key: Option<(Header, DataKey)>,
    report: FileReport,
}

impl Found {
    fn open(name: String, bytes: io::Result<Vec<u8>>, ring: &KeyRing) -> Self {
        let unusable =
            |name, status| Self { bytes: Vec::new(), key: None, report: FileReport::new(name, status) };
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => return unusable(name, FileStatus::Unreadable(error.to_string())),
        };
        let headers = match headers(&bytes) {
            Ok(headers) => headers,
            Err(reason) => return unusable(name, status_of(reason)),
        };
        let mut report = FileReport::new(name, FileStatus::Damaged);
        report.inspection = headers.first().map(|header| inspect_frames(&bytes, header));
        for header in headers {
            let Some(private) = ring.find(header.fields.recipient) else {
                report.status = FileStatus::WrongKey(header.fields.recipient);
                continue;
            };
            report.status = FileStatus::NotOurs;
            if let Some(data_key) =
                private.open(&header.sealed, &header.bound).and_then(|key| DataKey::new(&key))
            {
                report.status = FileStatus::Used;
                return Self { bytes, key: Some((header, data_key)), report };
            }
        }
        Self { bytes: Vec::new(), key: None, report }
    }

    /// Oldest first; what does not open comes before.
    fn order(&self) -> (Option<u64>, Option<u64>) {
        let fields = self.key.as_ref().map(|(header, _)| header.fields);
        (fields.map(|fields| fields.generation), fields.map(|fields| fields.epoch))
    }
}

type Live = HashMap<Key, Zeroizing<Vec<u8>>>;
/// A change as read: a record, or none where it was removed.
type Read = (Key, Option<Zeroizing<Vec<u8>>>);

/// The walk through the frames of one file.
struct Walk<'a> {
    file: &'a [u8],
    journal_at: u64,
    records: u64,
    key: &'a DataKey,
    report: &'a mut FileReport,
    /// Frames that did not open.
    failures: u32,
    /// The open batch: records, and removals.
    pending: Vec<Read>,
    /// Something in or before the open batch did not open.
    broken: bool,
    /// The open batch is broken and has its end: whether it was flushed is known when something follows.
    ended: bool,
}

impl<'a> Walk<'a> {
    fn new(file: &'a [u8], header: &Header, key: &'a DataKey, report: &'a mut FileReport) -> Self {
        Self {
            file,
            journal_at: header.fields.journal_at,
            records: header.fields.records,
            key,
            report,
            failures: 0,
            pending: Vec::new(),
            broken: false,
            ended: false,
        }
    }

    fn run(mut self, live: &mut Live) {
        let mut plain = Zeroizing::new([0; MAX_PLAINTEXT]);
        let mut at = HEADER_LEN;
        let mut end = HEADER_LEN;
        while at < self.file.len() && self.failures < MAX_FAILURES {
            let Some((frame, change)) = self.frame(at, &mut plain) else {
                at += 1;
                continue;
            };
            if u64_of(at) < self.journal_at {
                self.report.checkpoint_records += 1;
                apply(live, change);
            } else {
                // Damage that began in the checkpoint is counted there, by what is missing.
                let damaged = at != end && u64_of(at) != self.journal_at;
                self.journal(frame.last, damaged, change, live);
            }
            at += frame.frame_len();
            end = at;
        }
        self.report.missing = self.records.saturating_sub(self.report.checkpoint_records);
        self.report.torn_bytes = not_zero(self.file, end);
        // Of a batch that was under way the records are used and the removals are not.
        for (key, record) in self.pending.drain(..) {
            self.report.uncommitted += 1;
            if record.is_some() {
                apply(live, (key, record));
            }
        }
    }

    /// Takes an intact frame of the journal; `damaged`: what is before it is not.
    fn journal(
        &mut self,
        last: bool,
        damaged: bool,
        change: (Key, Option<Zeroizing<Vec<u8>>>),
        live: &mut Live,
    ) {
        if core::mem::take(&mut self.ended) {
            // A batch is written only when the one before had been flushed.
            self.settle(live);
        }
        if damaged {
            self.report.damaged += 1;
            self.broken = true;
        }
        self.pending.push(change);
        if last && self.broken {
            self.ended = true;
        } else if last {
            self.settle(live);
        }
    }

    /// The open batch was committed.
    fn settle(&mut self, live: &mut Live) {
        self.report.changes += u64_of(self.pending.len());
        self.pending.drain(..).for_each(|change| apply(live, change));
        self.broken = false;
    }

    /// The frame at `at`, if there is an intact one.
    fn frame(&mut self, at: usize, plain: &mut [u8; MAX_PLAINTEXT]) -> Option<(FrameHeader, Read)> {
        let bytes = self.file.get(at..)?;
        let frame = FrameHeader::parse(bytes).filter(|frame| frame.frame_len() <= bytes.len())?;
        let Some((key, record)) = self.key.open_frame(u64_of(at), frame, bytes, plain) else {
            self.failures += 1;
            return None;
        };
        let record = (frame.kind == Kind::Put).then(|| Zeroizing::new(record.to_vec()));
        Some((frame, (Key(*key), record)))
    }
}

fn apply(live: &mut Live, (key, record): Read) {
    match record {
        Some(record) => live.insert(key, record),
        None => live.remove(&key),
    };
}

fn status_of(reason: HeaderError) -> FileStatus {
    match reason {
        HeaderError::NotABackup => FileStatus::NotABackup,
        HeaderError::Version(version) => FileStatus::Version(version),
        HeaderError::Damaged => FileStatus::Damaged,
    }
}

/// Bytes from `end` up to the last one that is not zero.
fn not_zero(file: &[u8], end: usize) -> u64 {
    let behind = file.get(end..).unwrap_or_default();
    u64_of(behind.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1))
}

/// A `usize` has at most 64 bits wherever this builds.
fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
