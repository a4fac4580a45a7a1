//! The thread that makes records durable: what the IKE task hands over while one write is under way goes out together with
//! the next one (group commit), so an SA waits for one flush and a burst of SAs for a few.
//!
//! The thread owns the store. If the storage fails, those who wait are let go on, because a gateway without a backup is
//! better than none; the problem is shown, and writing is tried again every few seconds, until one succeeds. What was to be
//! written meanwhile is then in the backup as well.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use postern_ike::output::SaId;
use postern_nvram::{Change, Checkpoint, Key, Options, Place, PublicKey, Store, StoreError};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc as channel, oneshot};
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::histogram::Histogram;
use super::keys::Access;

/// What it is opened with.
#[derive(Debug)]
pub struct Opening {
    /// Where the store is.
    pub place: Place,
    /// Between checkpoints.
    pub checkpoint: Duration,
    /// Whom records are encrypted for.
    pub recipient: PublicKey,
    /// Whether a counter guards it.
    pub access: Access,
    /// Records of the process before that are still of use.
    pub carried: Vec<(Key, Zeroizing<Vec<u8>>)>,
    /// What processes before have written could not be read, and is left for one that can.
    pub keep_older: bool,
}

/// A hand on the thread.
#[derive(Debug)]
pub struct Journal {
    jobs: Sender<Job>,
    stats: Arc<Mutex<Stats>>,
    thread: Option<JoinHandle<()>>,
}

/// IKE SAs whose records are durable, or as good as they get.
pub type Committed = Vec<SaId>;

/// How it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Live records.
    pub records: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// Which generation.
    pub generation: u64,
    /// Whether a counter guards it against roll-back.
    pub protected: bool,
    /// Whom it is encrypted for.
    pub recipient: String,
    /// Writes, each made durable.
    pub commits: u64,
    /// Records written by them.
    pub changes: u64,
    /// The last checkpoint: when, in seconds since 1970, with how many records, and how long it took.
    pub checkpoint: Option<(u64, u64, Duration)>,
    /// From the moment a record was handed over to when it was durable.
    pub latency: Histogram,
    /// What is wrong.
    pub problem: Option<String>,
}

enum Job {
    Commit { changes: Vec<Change>, waiting: Vec<SaId>, since: Instant },
    Checkpoint(oneshot::Sender<Result<(), String>>),
    IsOpen(oneshot::Sender<bool>),
    Stop,
}

/// Changes that one write takes.
const BATCH: usize = 8192;

/// After a failure, until the next attempt, if there is no reason for one before.
const AGAIN: Duration = Duration::from_secs(5);

impl Journal {
    /// Starts the thread, which opens the store first. Who waits is told by `committed`.
    pub fn start(opening: Opening, committed: channel::UnboundedSender<Committed>) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let stats =
            Arc::new(Mutex::new(Stats { recipient: opening.recipient.id().to_string(), ..Stats::default() }));
        let shared = Arc::clone(&stats);
        let thread = Builder::new().name("nvram".to_owned()).spawn(move || {
            let mut opening = opening;
            let unsaved = opening.carried.drain(..).collect();
            let next = Instant::now();
            let mut worker = Worker { store: None, opening, unsaved, stats: shared, committed, next };
            worker.run(&queue);
        })?;
        Ok(Self { jobs, stats, thread: Some(thread) })
    }

    /// Has changes made durable; then `waiting` is told.
    pub fn commit(&self, changes: Vec<Change>, waiting: Vec<SaId>) {
        // The thread ends only with this value.
        let _ = self.jobs.send(Job::Commit { changes, waiting, since: Instant::now() });
    }

    /// Writes all records anew under another data key.
    pub fn checkpoint(&self, done: oneshot::Sender<Result<(), String>>) {
        let _ = self.jobs.send(Job::Checkpoint(done));
    }

    /// Tells whether the store could be opened, and so what was carried over is durable.
    pub fn is_open(&self, done: oneshot::Sender<bool>) {
        let _ = self.jobs.send(Job::IsOpen(done));
    }

    /// How it is.
    pub fn stats(&self) -> Stats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Journal {
    /// What was handed over is written first.
    fn drop(&mut self) {
        let _ = self.jobs.send(Job::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    store: Option<Store>,
    opening: Opening,
    /// While there is no store: what is to be in it.
    unsaved: HashMap<Key, Zeroizing<Vec<u8>>>,
    stats: Arc<Mutex<Stats>>,
    committed: channel::UnboundedSender<Committed>,
    /// When what failed is tried again.
    next: Instant,
}

impl Worker {
    fn run(&mut self, queue: &Receiver<Job>) {
        self.open();
        loop {
            let works = self.store.as_ref().filter(|store| store.file_bytes().is_some());
            let until = works.map_or(self.next, Store::next_checkpoint);
            let wait = until.saturating_duration_since(Instant::now());
            let first = match queue.recv_timeout(wait.max(Duration::from_millis(10))) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if self.store.is_none() && self.next <= Instant::now() {
                self.open();
            }
            let (mut changes, mut waiting, mut handed) = (Vec::new(), Vec::new(), Vec::new());
            let (mut stop, mut asked) = (false, Vec::new());
            let mut job = first;
            while let Some(one) = job {
                match one {
                    Job::Commit { changes: more, waiting: sas, since } => {
                        changes.extend(more);
                        waiting.extend(sas);
                        handed.push(since);
                    }
                    Job::Checkpoint(done) => asked.push(done),
                    Job::IsOpen(done) => {
                        let _ = done.send(self.store.is_some());
                    }
                    Job::Stop => stop = true,
                }
                job = if changes.len() < BATCH { queue.try_recv().ok() } else { None };
            }
            if !handed.is_empty() {
                self.commit(&changes, &handed);
                let _ = self.committed.send(waiting);
            }
            if stop {
                return;
            }
            let due = self.store.as_ref().is_some_and(|store| store.checkpoint_due(Instant::now()));
            if due || !asked.is_empty() {
                let result = self.checkpoint();
                for done in asked {
                    let _ = done.send(result.clone());
                }
            }
        }
    }

    /// Opens the store, puts in what is carried over, and removes the older generations.
    fn open(&mut self) {
        self.next = Instant::now() + AGAIN;
        let Opening { place, checkpoint, recipient, access, carried: _, keep_older } = &self.opening;
        let options = Options {
            checkpoint: *checkpoint,
            counter_interval: access.counter_interval,
            ..Options::at(place.clone())
        };
        let wanted: Vec<_> = self.unsaved.drain().collect();
        let beside = || {
            let mut store = Store::open(options.clone(), recipient, access.counter())?;
            for (key, record) in &wanted {
                store.commit(&[Change::Put { key: *key, record: record.clone() }])?;
            }
            let checkpoint = store.checkpoint()?;
            Ok((store, checkpoint))
        };
        let alone = || Store::take_over(options.clone(), recipient, access.counter(), &wanted);
        // Where there is no room for both, this process's is worth more.
        let opened = if *keep_older { beside().or_else(|_: StoreError| alone()) } else { alone() };
        match opened {
            Ok((store, checkpoint)) => {
                info!(
                    generation = store.generation(),
                    records = store.len(),
                    "the backup of IKE SAs is open"
                );
                self.store = Some(store);
                self.note(&checkpoint);
            }
            Err(error) => {
                self.unsaved.extend(wanted);
                self.trouble(&error);
            }
        }
    }

    fn commit(&mut self, changes: &[Change], handed: &[Instant]) {
        let Some(store) = &mut self.store else {
            for change in changes {
                match change {
                    Change::Put { key, record } => self.unsaved.insert(*key, record.clone()),
                    Change::Remove { key } => self.unsaved.remove(key),
                };
            }
            return;
        };
        let result = store.commit(changes);
        let now = Instant::now();
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.commits += 1;
        stats.changes += u64::try_from(changes.len()).unwrap_or(u64::MAX);
        stats.records = u64::try_from(store.len()).unwrap_or(u64::MAX);
        stats.bytes = store.file_bytes().unwrap_or_default();
        for since in handed {
            stats.latency.add(now.duration_since(*since));
        }
        if result.is_ok() {
            stats.problem = None;
        }
        drop(stats);
        if let Err(error) = result {
            self.trouble(&error);
        }
    }

    fn checkpoint(&mut self) -> Result<(), String> {
        let Some(store) = &mut self.store else { return Err("the backup is not open".to_owned()) };
        match store.checkpoint() {
            Ok(checkpoint) => {
                self.note(&checkpoint);
                Ok(())
            }
            Err(error) => {
                self.trouble(&error);
                Err(error.to_string())
            }
        }
    }

    fn note(&self, checkpoint: &Checkpoint) {
        let Some(store) = &self.store else { return };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let records = u64::try_from(checkpoint.records).unwrap_or(u64::MAX);
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.problem = checkpoint.counter_error.as_ref().map(ToString::to_string);
        stats.checkpoint = Some((now, records, checkpoint.took));
        stats.generation = store.generation();
        stats.protected = store.is_protected();
        stats.records = records;
        stats.bytes = checkpoint.bytes;
    }

    fn trouble(&mut self, error: &StoreError) {
        self.next = Instant::now() + AGAIN;
        let problem = format!("the backup of IKE SAs cannot be written: {error}");
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        if stats.problem.as_ref() != Some(&problem) {
            warn!("{problem}");
        }
        stats.problem = Some(problem);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use postern_nvram::{Backup, NoCounter, SealedFile};

    use super::super::keys;
    use super::*;

    /// RST-1: what was committed is in the backup; those who waited are told; what is carried over is there as well and
    /// the older generation is gone.
    #[test]
    fn rst_1_durable_when_told() {
        let dir = std::env::temp_dir().join(format!("postern-journal-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let (recipient, private) = keys::prepare(&dir, &Access::default()).unwrap();
        let open = |carried| Opening {
            place: Place::Directory(dir.join("store")),
            checkpoint: Duration::from_mins(5),
            recipient: recipient.clone(),
            access: Access::default(),
            carried,
            keep_older: false,
        };
        let holder = SealedFile { path: private, passphrase_file: None };
        let (sender, mut told) = channel::unbounded_channel();
        let journal = Journal::start(open(Vec::new()), sender).unwrap();
        for number in 0..100_u8 {
            let record = Zeroizing::new(vec![number; 50]);
            journal.commit(vec![Change::Put { key: Key([number; 16]), record }], vec![SaId(number.into())]);
        }
        let mut waited = Vec::new();
        while waited.len() < 100 {
            waited.extend(told.blocking_recv().unwrap());
        }
        let backup = Backup::read(&dir.join("store"), &holder, &mut NoCounter).unwrap();
        assert_eq!(backup.records.len(), 100);
        let stats = journal.stats();
        assert!(stats.commits < 100 && stats.changes == 100 && stats.latency.count() == 100, "{stats:?}");
        journal.commit(vec![Change::Remove { key: Key([7; 16]) }], Vec::new());
        let (done, finished) = oneshot::channel();
        journal.checkpoint(done);
        finished.blocking_recv().unwrap().unwrap();
        drop(journal);

        let backup = Backup::read(&dir.join("store"), &holder, &mut NoCounter).unwrap();
        assert_eq!(backup.records.len(), 99);
        let (sender, mut told) = channel::unbounded_channel();
        let journal = Journal::start(open(backup.records), sender).unwrap();
        journal.commit(vec![Change::Remove { key: Key([8; 16]) }], vec![SaId(1)]);
        assert_eq!(told.blocking_recv().unwrap(), [SaId(1)]);
        drop(journal);
        let backup = Backup::read(&dir.join("store"), &holder, &mut NoCounter).unwrap();
        assert_eq!((backup.records.len(), backup.report.files.len()), (98, 1));
        fs::remove_dir_all(&dir).unwrap();
    }

    /// RST-11: where the backup cannot be written nobody waits, it is said, and what was to be written is in it as soon as
    /// it can be.
    #[test]
    fn rst_11_a_place_that_comes_late() {
        let dir = tempfile::tempdir().unwrap();
        let (recipient, private) = keys::prepare(dir.path(), &Access::default()).unwrap();
        let path = dir.path().join("store");
        fs::write(&path, b"in the way").unwrap();
        let opening = Opening {
            place: Place::Directory(path.clone()),
            checkpoint: Duration::from_mins(5),
            recipient,
            access: Access::default(),
            keep_older: false,
            carried: vec![(Key([1; 16]), vec![1].into()), (Key([2; 16]), vec![2].into())],
        };
        let (sender, mut told) = channel::unbounded_channel();
        let journal = Journal::start(opening, sender).unwrap();
        let put = Change::Put { key: Key([3; 16]), record: vec![3].into() };
        journal.commit(vec![put, Change::Remove { key: Key([1; 16]) }], vec![SaId(3)]);
        assert_eq!(told.blocking_recv().unwrap(), [SaId(3)]);
        assert!(journal.stats().problem.unwrap().contains("cannot be written"));
        fs::remove_file(&path).unwrap();
        let began = Instant::now();
        while journal.stats().problem.is_some() {
            assert!(began.elapsed() < AGAIN * 2, "{:?}", journal.stats());
            std::thread::sleep(Duration::from_millis(50));
        }
        let holder = SealedFile { path: private, passphrase_file: None };
        let backup = Backup::read(&path, &holder, &mut NoCounter).unwrap();
        let keys: Vec<_> = backup.records.iter().map(|(key, _)| key.0[0]).collect();
        assert_eq!(keys, [2, 3]);
    }

    /// RST-1: a device in place of a directory.
    #[test]
    fn rst_1_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let (recipient, private) = keys::prepare(dir.path(), &Access::default()).unwrap();
        let path = dir.path().join("device");
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let holder = SealedFile { path: private, passphrase_file: None };
        let read = || Backup::read(&path, &holder, &mut NoCounter).unwrap();
        for round in 0..3_u8 {
            let backup = read();
            assert!(backup.report.is_clean(), "{:?}", backup.report);
            let opening = Opening {
                place: Place::Device(path.clone()),
                checkpoint: Duration::from_mins(5),
                recipient: recipient.clone(),
                access: Access::default(),
                carried: backup.records,
                keep_older: false,
            };
            let (sender, mut told) = channel::unbounded_channel();
            let journal = Journal::start(opening, sender).unwrap();
            journal.commit(
                vec![Change::Put { key: Key([round; 16]), record: vec![round; 100].into() }],
                vec![SaId(1)],
            );
            told.blocking_recv().unwrap();
            assert_eq!(read().records.len(), usize::from(round) + 1);
            let second = Place::Device(path.clone()).open().err().map(|error| error.to_string());
            assert_eq!(second.as_deref(), Some("in use by another process"));
            let (done, finished) = oneshot::channel();
            journal.checkpoint(done);
            finished.blocking_recv().unwrap().unwrap();
        }
        assert_eq!(read().records.len(), 3);
    }
}
