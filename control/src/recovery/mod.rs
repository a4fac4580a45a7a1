//! Resets (RST-1 to RST-11): what is kept of IKE SAs while they live, and what is done with it after a reset.
//!
//! ```text
//! while it runs:  Endpoint ─ Persist ─► IKE task ─► journal (thread, group commit) ─► postern-nvram, encrypted
//! at the start:   life, boot id, datapath ─► Cause ─ a reset ─► Backup, private key ─► postern_ike::recovery ─► sockets
//!                                                  │                               └ saved whole ─► Endpoint, datapath: it goes on
//!                                                  ├ the datapath lives ─► records are kept, nobody is told anything
//!                                                  └ a clean stop ─► who did not answer the Delete then is told now
//! ```
//!
//! [`begin`] finds out what became of the process before, reads its backup if that is of use, and begins a new one; the
//! IKE task does the rest ([`ike::reset`](crate::ike)).

pub mod histogram;
mod journal;
pub mod keys;
mod life;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::ike::jobs::System;
use postern_ike::Secret;
use postern_ike::record::{SavedBody, SavedIke};
use postern_ike::recovery::Settings as Pace;
use postern_nvram::{Backup, Key, Place};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tracing::{info, warn};
use zeroize::Zeroizing;

pub use self::journal::{Committed, Journal, Opening, Stats};
pub use self::keys::Access;
pub use self::life::{Cause, Ending};
use crate::datapath::client::Client;

/// `[recovery]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Whether anything is saved and anybody told.
    pub enabled: bool,
    /// Directory of keys and backup; `None`: `recovery` in control's state directory.
    pub directory: Option<PathBuf>,
    /// Block device or file of a fixed size that the backup is written to; `None`: a directory beside the keys.
    pub device: Option<PathBuf>,
    /// Between checkpoints of the backup.
    pub checkpoint: Duration,
    /// How peers are told.
    pub pace: Pace,
    /// How the private half of the keys is got at.
    pub access: Access,
    /// Peers get tokens, by which they believe that an IKE SA was lost (RFC 6290).
    pub tokens: bool,
}

impl Settings {
    /// Where keys are, if control's state is in `state`.
    pub fn keys(&self, state: &Path) -> PathBuf {
        self.directory.clone().unwrap_or_else(|| state.join("recovery"))
    }

    /// Where the backup is, if control's state is in `state`.
    pub fn place(&self, state: &Path) -> Place {
        match &self.device {
            Some(device) => Place::Device(device.clone()),
            None => Place::Directory(self.keys(state).join("backup")),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            directory: None,
            device: None,
            checkpoint: Duration::from_mins(5),
            pace: Pace::default(),
            access: Access::default(),
            tokens: true,
        }
    }
}

/// What a start has to know.
#[derive(Clone, Debug)]
pub struct Start {
    /// `[recovery]`.
    pub settings: Settings,
    /// Control's state directory.
    pub state: PathBuf,
    /// Where a datapath would listen.
    pub datapath: PathBuf,
}

/// What a start finds.
#[derive(Debug)]
pub struct Beginning {
    /// What became of the process before.
    pub cause: Cause,
    /// IKE SAs whose peers are to be told.
    pub tell: Vec<SavedIke>,
    /// IKE SAs that were saved whole and may go on; that they do is durable.
    pub restore: Vec<SavedIke>,
    /// IKE SAs whose CHILD_SAs go on in the datapath.
    pub adopted: Vec<SavedIke>,
    /// The new backup; `None`: nothing is saved.
    pub journal: Option<Journal>,
    /// What tokens for peers are made from (RFC 6290).
    pub tokens: Option<Secret>,
    /// What is wrong.
    pub problems: Vec<String>,
}

/// Progress and state of all this, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What this start is.
    pub cause: Cause,
    /// In words.
    pub cause_text: String,
    /// The burst, if peers are or were to be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<BurstReport>,
    /// IKE SAs that went on after the reset.
    #[serde(default)]
    pub restored: u64,
    /// From the start of the process to when they were there, in microseconds; their CHILD_SAs follow when the datapath is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_us: Option<u64>,
    /// IKE SAs of a process before this one that are kept because their CHILD_SAs go on in the datapath.
    pub adopted: u64,
    /// The backup; absent: nothing is saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<Stats>,
    /// What is wrong.
    pub problems: Vec<String>,
}

impl Report {
    /// Whether there is more to say than that nothing has happened and nothing is saved.
    pub fn is_of_interest(&self) -> bool {
        let saved = self.backup.as_ref().is_some_and(|stats| stats.records > 0);
        self.burst.is_some() || self.restored > 0 || self.adopted > 0 || saved
    }
}

/// The burst.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BurstReport {
    /// Nothing is left to be done.
    pub done: bool,
    /// IKE SAs in the backup.
    pub total: u64,
    /// Past their end.
    pub expired: u64,
    /// Their peers have answered.
    pub told: u64,
    /// Said as often as it is to be said; no answer was to be expected (IKEv1).
    pub sent: u64,
    /// Their peers have not answered.
    pub unanswered: u64,
    /// The same, but they have a new IKE SA.
    pub superseded: u64,
    /// Not written to yet.
    pub waiting: u64,
    /// Written to, and neither answered nor given up.
    pub under_way: u64,
    /// Messages sent.
    pub messages: u64,
    /// Answers that were not authentic.
    pub forged: u64,
    /// From the start of the process to the first message, in microseconds.
    pub first_message_us: Option<u64>,
    /// From the start of the process to the last answer, in microseconds.
    pub last_answer_us: Option<u64>,
    /// From the start of the process to when nothing was left, in microseconds.
    pub done_us: Option<u64>,
}

/// Longest that a datapath may take to say what it has.
const ASKING: Duration = Duration::from_secs(2);

/// Finds out how it stands. Must be called once, before anything is negotiated.
pub async fn begin(start: &Start, committed: UnboundedSender<Committed>) -> Beginning {
    let Start { settings, state, datapath } = start;
    let mut problems = Vec::new();
    let living = living_peers(datapath).await;
    let cause = life::begin(state, living.is_some()).unwrap_or_else(|error| {
        problems.push(format!("{}: {error}; a reset cannot be told from a stop", state.display()));
        if living.is_some() { Cause::ControlDied } else { Cause::Crashed }
    });
    info!("{}", cause.text());
    let mut beginning = Beginning {
        cause,
        tell: Vec::new(),
        restore: Vec::new(),
        adopted: Vec::new(),
        journal: None,
        tokens: None,
        problems,
    };
    if !settings.enabled {
        return beginning;
    }
    let (directory, place) = (settings.keys(state), settings.place(state));
    let (recipient, private) = match keys::prepare(&directory, &settings.access) {
        Ok(found) => found,
        Err(error) => {
            beginning.problem(format!("no backup of IKE SAs is kept: {error}"));
            return beginning;
        }
    };
    if settings.tokens {
        match keys::token_secret(&directory, &mut System::default()) {
            Ok(secret) => beginning.tokens = Some(secret),
            Err(error) => beginning.problem(format!("peers get no tokens: {error}")),
        }
    }
    let mut carried = Vec::new();
    let mut keep_older = false;
    if cause != Cause::First {
        // After a stop nothing goes on; what is left are peers that did not answer then.
        let living = living.filter(|_| cause != Cause::Stopped).unwrap_or_default();
        let read = beginning.read(place.path(), (&private, &settings.access), &living, &mut carried);
        keep_older = !read;
    }
    let (checkpoint, access) = (settings.checkpoint, settings.access.clone());
    let opening = Opening { place, checkpoint, recipient, access, carried, keep_older };
    match Journal::start(opening, committed) {
        Ok(journal) => beginning.journal = Some(journal),
        Err(error) => beginning.problem(format!("no backup of IKE SAs is kept: {error}")),
    }
    if !beginning.restore.is_empty() && !beginning.is_durable().await {
        let restore = std::mem::take(&mut beginning.restore);
        beginning.tell.extend(restore);
        let text = "the backup cannot be written: IKE SAs that were to go on are ended";
        beginning.problem(text.to_owned());
    }
    beginning
}

/// Writes down that this process was told to end.
pub fn end(state: &Path, ending: Ending) {
    if let Err(error) = life::end(state, ending) {
        warn!("{}: {error}: the next start will look like one after a crash", state.display());
    }
}

impl Beginning {
    /// Whether the new backup, with what was carried over, is there.
    async fn is_durable(&self) -> bool {
        let Some(journal) = &self.journal else { return false };
        let (done, open) = oneshot::channel();
        journal.is_open(done);
        open.await.unwrap_or(false)
    }

    fn problem(&mut self, text: String) {
        warn!("{text}");
        self.problems.push(text);
    }

    /// Reads the backup. What is still of use goes to `carried` as well, for the new one. Whether it could be read.
    fn read(
        &mut self,
        store: &Path,
        (private, access): (&Path, &Access),
        living: &HashSet<IpAddr>,
        carried: &mut Vec<(Key, Zeroizing<Vec<u8>>)>,
    ) -> bool {
        let began = Instant::now();
        let read = access.holder(private).map_err(|error| error.to_string()).and_then(|holder| {
            Backup::read(store, holder.as_ref(), access.counter().as_mut()).map_err(|error| error.to_string())
        });
        let backup = match read {
            Ok(backup) => backup,
            Err(error) => {
                let kept = "it is kept for a start that can read it";
                self.problem(format!("the backup of IKE SAs cannot be used: {error}; {kept}"));
                return false;
            }
        };
        for file in backup.report.files.iter().filter(|file| !file.is_clean()) {
            self.problem(format!("backup {}: {}", file.name, describe(file)));
        }
        let mut unreadable = 0_usize;
        for (key, record) in backup.records {
            match SavedIke::decode(&record) {
                Ok(saved) if saved.key() == key.0 => {
                    if living.contains(&saved.path.remote.ip()) {
                        self.adopted.push(saved);
                        carried.push((key, record));
                    } else if self.cause.is_reset() && matches!(saved.body, SavedBody::Whole(_)) {
                        let next = SavedIke::decode(&record).map(SavedIke::into_next_life);
                        carried.push((key, next.map_or(record, |next| next.encode())));
                        self.restore.push(saved);
                    } else {
                        self.tell.push(saved);
                        carried.push((key, record));
                    }
                }
                _ => unreadable += 1,
            }
        }
        if unreadable > 0 {
            self.problem(format!(
                "{unreadable} records of the backup are not IKE SAs as this version saves them"
            ));
        }
        info!(
            tell = self.tell.len(),
            restore = self.restore.len(),
            adopted = self.adopted.len(),
            "the backup was read in {:.1} ms",
            began.elapsed().as_secs_f64() * 1000.0
        );
        true
    }
}

fn describe(file: &postern_nvram::FileReport) -> String {
    let counts = [
        (file.missing, "records missing"),
        (file.damaged, "places damaged"),
        (file.uncommitted, "records that were just being written"),
        (file.torn_bytes, "bytes torn"),
    ];
    let counts = counts.into_iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts.map(|(count, what)| format!("{count} {what}")).collect();
    [file.status.to_string()].into_iter().chain(counts).collect::<Vec<_>>().join(", ")
}

/// The peers of negotiated SAs in a datapath that runs; `None` if none runs.
async fn living_peers(socket: &Path) -> Option<HashSet<IpAddr>> {
    let ask = async {
        let mut client = Client::connect(socket).await.ok()?;
        let (_, negotiated) = client.inventory().await.ok()?.divide();
        Some(negotiated.sas.values().map(|report| report.remote.on_wire).collect::<HashSet<_>>())
    };
    tokio::time::timeout(ASKING, ask).await.ok().flatten()
}
