//! The IKE task's part in recovery from resets: it hands records over and lets those who wait for them go on, and after a
//! reset it tells the peers, while new handshakes go on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use postern_ike::output::{Path, Persist, SaId};
use postern_ike::record::{PeerTag, SavedIke};
use postern_ike::recovery::Recovery;
use postern_nvram::{Change, Key};
use tokio::sync::oneshot;
use tracing::{debug, info};

use super::driver::{Driver, now_is};
use super::jobs::System;
use crate::recovery::{Beginning, BurstReport, Cause, Journal, Report, Settings};

/// Messages in one call of the system.
const BATCH: usize = 64;

/// Messages of the burst before something else has its turn: fewer than are read in a turn, or answers wait until their
/// questions are repeated.
const TURN: usize = BATCH;

/// Until the system is asked again whether it takes more.
const FULL: Duration = Duration::from_millis(1);

/// What outlives resets, and what is done after one.
#[derive(Debug)]
pub(super) struct Memory {
    cause: Cause,
    journal: Option<Journal>,
    changes: Vec<Change>,
    waiting: Vec<SaId>,
    /// IKE SAs whose peers are to be told.
    tell: Vec<SavedIke>,
    burst: Option<Burst>,
    /// IKE SAs that go on after the reset.
    restored: u64,
    /// When they were there.
    restored_at: Option<Instant>,
    /// IKE SAs of a process before this one whose CHILD_SAs go on, by connection and peer.
    adopted: HashMap<(Arc<str>, PeerTag), Vec<[u8; 16]>>,
    problems: Vec<String>,
}

/// Peers that are told.
struct Burst {
    recovery: Recovery,
    /// What the system did not take yet.
    unsent: Vec<(Path, Vec<u8>)>,
    first: Option<Instant>,
    last: Option<Instant>,
    done: Option<Instant>,
}

impl std::fmt::Debug for Burst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Burst({:?})", self.recovery.progress())
    }
}

impl Memory {
    /// After [`begin`](crate::recovery::begin).
    pub(super) fn new(beginning: Beginning) -> Self {
        let Beginning { cause, tell, restore: _, adopted, journal, tokens: _, problems } = beginning;
        let mut known: HashMap<_, Vec<_>> = HashMap::new();
        for saved in adopted {
            let key = saved.key();
            let SavedIke { connection, peer, .. } = saved;
            known.entry((connection, peer)).or_default().push(key);
        }
        Self {
            cause,
            journal,
            changes: Vec::new(),
            waiting: Vec::new(),
            tell,
            burst: None,
            restored: 0,
            restored_at: None,
            adopted: known,
            problems,
        }
    }

    /// So many go on; from now on the peers of all others are told.
    fn begin(&mut self, restored: usize, refused: Vec<SavedIke>, settings: &Settings) {
        self.restored = u64::try_from(restored).unwrap_or(u64::MAX);
        self.restored_at = (restored > 0).then(Instant::now);
        let mut tell = std::mem::take(&mut self.tell);
        tell.extend(refused);
        self.burst = (!tell.is_empty()).then(|| Burst {
            recovery: Recovery::new(tell, settings.pace, now_is(), Box::new(System::default())),
            unsent: Vec::new(),
            first: None,
            last: None,
            done: None,
        });
    }

    /// Whether peers are being told.
    pub(super) fn is_telling(&self) -> bool {
        self.burst.as_ref().is_some_and(|burst| burst.done.is_none())
    }

    /// When [`Driver::tell`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let burst = self.burst.as_ref().filter(|burst| burst.done.is_none())?;
        if burst.unsent.is_empty() { burst.recovery.poll_timeout() } else { Some(Instant::now() + FULL) }
    }

    /// Takes a change; gives whether the IKE SA has to wait for it.
    pub(super) fn persist(&mut self, sa: Option<SaId>, persist: Persist) -> bool {
        if self.journal.is_none() {
            return false;
        }
        match persist {
            Persist::Put(saved) => {
                self.changes.push(Change::Put { key: Key(saved.key()), record: saved.encode() });
                self.waiting.extend(sa);
                sa.is_some()
            }
            Persist::Remove((spi_i, spi_r)) => {
                let mut key = [0; 16];
                let (first, second) = key.split_at_mut(8);
                first.copy_from_slice(&spi_i.0.to_be_bytes());
                second.copy_from_slice(&spi_r.0.to_be_bytes());
                self.remove(key);
                false
            }
        }
    }

    fn remove(&mut self, key: [u8; 16]) {
        self.changes.push(Change::Remove { key: Key(key) });
    }

    /// Hands over what was taken since the last time.
    pub(super) fn flush(&mut self) {
        if let Some(journal) = &self.journal
            && !self.changes.is_empty()
        {
            journal.commit(std::mem::take(&mut self.changes), std::mem::take(&mut self.waiting));
        }
    }

    /// A peer has a new IKE SA.
    pub(super) fn established(&mut self, connection: &Arc<str>, remote_id: &str) {
        if self.adopted.is_empty() && self.burst.is_none() {
            return;
        }
        let peer = PeerTag::of(remote_id);
        for key in self.adopted.remove(&(Arc::clone(connection), peer)).into_iter().flatten() {
            self.remove(key);
        }
        if let Some(burst) = &mut self.burst {
            burst.recovery.superseded(connection, peer);
        }
    }

    /// Something that arrived. Whether it was about an IKE SA of before a reset.
    pub(super) fn receive(&mut self, path: Path, message: &[u8]) -> bool {
        let Some(burst) = self.burst.as_mut().filter(|burst| burst.done.is_none()) else { return false };
        let told = burst.recovery.progress().told;
        let taken = burst.recovery.handle_datagram(path, message);
        if burst.recovery.progress().told != told {
            burst.last = Some(Instant::now());
        }
        taken
    }

    /// Writes the backup anew.
    pub(super) fn checkpoint(&mut self, done: oneshot::Sender<Result<(), String>>) {
        self.flush();
        if let Some(journal) = &self.journal {
            journal.checkpoint(done);
        } else {
            let problem = self.problems.last().cloned();
            let _ = done.send(Err(problem.unwrap_or_else(|| "recovery is not enabled".to_owned())));
        }
    }

    /// Writes down what was handed over; nothing is saved any more.
    pub(super) fn close(&mut self) {
        self.flush();
        self.journal = None;
    }

    /// How it stands. `began`: when the process began.
    pub(super) fn report(&self, began: Instant) -> Report {
        let backup = self.journal.as_ref().map(Journal::stats);
        let mut problems = self.problems.clone();
        problems.extend(backup.iter().filter_map(|stats| stats.problem.clone()));
        Report {
            cause: self.cause,
            cause_text: self.cause.text().to_owned(),
            burst: self.burst.as_ref().map(|burst| burst.report(began)),
            restored: self.restored,
            restored_us: since(began, self.restored_at),
            adopted: u64::try_from(self.adopted.values().map(Vec::len).sum::<usize>()).unwrap_or(u64::MAX),
            backup,
            problems,
        }
    }
}

/// Microseconds.
fn since(began: Instant, at: Option<Instant>) -> Option<u64> {
    at.map(|at| u64::try_from(at.saturating_duration_since(began).as_micros()).unwrap_or(u64::MAX))
}

impl Burst {
    fn report(&self, began: Instant) -> BurstReport {
        let progress = self.recovery.progress();
        let since = |at| since(began, at);
        BurstReport {
            done: self.done.is_some(),
            total: progress.total,
            expired: progress.expired,
            told: progress.told,
            sent: progress.sent,
            unanswered: progress.unanswered,
            superseded: progress.superseded,
            waiting: progress.waiting,
            under_way: progress.under_way,
            messages: progress.messages,
            forged: progress.forged,
            first_message_us: since(self.first),
            last_answer_us: since(self.last),
            done_us: since(self.done),
        }
    }
}

impl Driver {
    /// After a reset, with the configuration: what was saved whole goes on, if it can; the peers of the rest are told.
    pub(super) fn go_on(&mut self, whole: Vec<SavedIke>, settings: &Settings) {
        let all = whole.len();
        let refused = self.endpoint.restore(now_is(), whole);
        let restored = all - refused.len();
        if all > 0 {
            info!(restored, refused = refused.len(), "IKE SAs of before the reset go on");
        }
        self.memory.begin(restored, refused, settings);
        self.listen();
    }

    /// Sends what is due of the burst, and forgets what is done with.
    pub(super) fn tell(&mut self) {
        let (Some(sockets), Some(burst)) = (&mut self.sockets, &mut self.memory.burst) else { return };
        if burst.done.is_some() {
            return;
        }
        let now = Instant::now();
        let mut sent = 0;
        while sent < TURN {
            while burst.unsent.len() < BATCH
                && let Some(message) = burst.recovery.poll(now)
            {
                burst.unsent.push(message);
            }
            if burst.unsent.is_empty() {
                break;
            }
            let done = sockets.send_many(&burst.unsent);
            if burst.first.is_none() && done > 0 {
                burst.first = Some(Instant::now());
            }
            burst.unsent.drain(..done);
            if done == 0 {
                break;
            }
            sent += done;
        }
        let mut removed = Vec::new();
        while let Some(ended) = burst.recovery.poll_ended() {
            debug!(connection = %ended.connection, remote = %ended.path.remote, how = ?ended.how, "recovery");
            removed.push(ended.key);
        }
        let progress = burst.recovery.progress();
        if progress.is_done() && burst.unsent.is_empty() {
            burst.done = Some(Instant::now());
            info!(
                total = progress.total,
                told = progress.told,
                sent = progress.sent,
                expired = progress.expired,
                unanswered = progress.unanswered,
                superseded = progress.superseded,
                "the peers of the IKE SAs of before the reset have been told"
            );
        }
        for key in removed {
            self.memory.remove(key);
        }
        self.memory.flush();
    }
}
