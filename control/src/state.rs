//! What control remembers over a restart: the generation of every object it described to the datapath.
//!
//! A description that is the same as before keeps its generation, so that nothing is sent for it (DP-7); a changed one
//! gets a number above all that were ever given. The file holds digests, no keys. It is written and synced before a
//! new number is used, and replaced as a whole. If it is lost or damaged, numbers go on from the clock, and objects
//! are described anew, which does not touch what the datapath already runs.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use postern_contract::codec::{self, Buffer};
use postern_contract::request::Operation;
use postern_contract::{Generation, codec::CodecError};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::datapath::reconcile::Installed;
use crate::desired::{Desired, duplicate};
use crate::digest;

/// First bytes of the file; the last is the layout's version.
const MAGIC: [u8; 4] = *b"PnG\x01";

/// Name of the file in the state directory.
const FILE: &str = "generations";

/// Kind and id of an object.
type Key = (u8, u64);

const SA: u8 = 0;
const POLICY: u8 = 1;
const RELAY: u8 = 2;

/// The saved form.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    counter: u64,
    objects: BTreeMap<Key, (Digest, u64)>,
}

/// Digest of a description, its generation left out.
type Digest = [u8; 16];

/// The state directory, locked for this process.
#[derive(Debug)]
pub struct Generations {
    directory: PathBuf,
    saved: Saved,
    /// Held for the lock on it.
    _lock: File,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another control process uses it.
    #[error("{0}: another postern-control uses this state directory")]
    Taken(PathBuf),
    /// It cannot be made, read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl Generations {
    /// Opens the directory, making it (mode 0700) if it is not there. The text says what was lost, if anything was.
    pub fn open(directory: &Path) -> Result<(Self, Option<String>), StateError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| StateError::Io { path, error }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed(directory))?;
        let path = directory.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = lock.map_err(failed(&path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| StateError::Taken(directory.to_owned()))?;
        let path = directory.join(FILE);
        let (saved, lost) = match fs::read(&path) {
            Ok(bytes) => match parse(&bytes) {
                Some(saved) => (saved, None),
                None => (Saved::fresh(), Some(format!("{} is damaged: beginning anew", path.display()))),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Saved::fresh(), None),
            Err(error) => return Err(failed(&path)(error)),
        };
        Ok((Self { directory: directory.to_owned(), saved, _lock: lock }, lost))
    }

    /// Gives every object of `desired` its generation, given what is `installed`, and writes down the new ones.
    pub fn settle(&mut self, desired: &mut Desired, installed: &Installed) -> Result<(), StateError> {
        let next = self.saved.settled(desired, installed);
        if next != self.saved {
            self.write(&next)?;
            self.saved = next;
        }
        Ok(())
    }

    /// As [`settle`](Self::settle), but nothing is kept: to see what would change.
    pub fn preview(&self, desired: &mut Desired, installed: &Installed) {
        self.saved.settled(desired, installed);
    }

    fn write(&self, saved: &Saved) -> Result<(), StateError> {
        let path = self.directory.join(FILE);
        let temporary = self.directory.join(format!("{FILE}.new"));
        let written = (|| {
            let bytes = serialize(saved)?;
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.directory)?.sync_all()
        })();
        written.map_err(|error| StateError::Io { path, error })
    }
}

impl Saved {
    /// Nothing is known: numbers begin at the clock, in microseconds, above what an earlier life can have given.
    fn fresh() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { counter: u64::try_from(now.as_micros()).unwrap_or_default(), objects: BTreeMap::new() }
    }

    /// The state after `desired` got its generations.
    fn settled(&self, desired: &mut Desired, installed: &Installed) -> Self {
        let mut next = Self { counter: self.counter.max(installed.newest().0), objects: BTreeMap::new() };
        let mut buffer = codec::buffer();
        let mut assign = |key: Key, digest: Digest, installed: Option<Generation>, same: bool| {
            let known =
                self.objects.get(&key).filter(|(known, _)| *known == digest).map(|(_, number)| *number);
            let number = match (known, installed) {
                // What is installed can be seen to be the same: adopt its number, whatever we remember.
                (_, Some(Generation(installed))) if same => installed,
                // It is newer than what we remember, so it is not what we described.
                (Some(number), Some(Generation(installed))) if installed > number => {
                    next.counter += 1;
                    next.counter
                }
                (Some(number), _) => number,
                (None, _) => {
                    next.counter += 1;
                    next.counter
                }
            };
            next.objects.insert(key, (digest, number));
            Generation(number)
        };
        for (id, wanted) in &mut desired.sas {
            wanted.config.generation = Generation(0);
            let digest =
                operation_digest(&Operation::InstallSa(Box::new(duplicate(&wanted.config))), &mut buffer);
            let report = installed.sas.get(id).map(|report| report.generation);
            wanted.config.generation = assign((SA, id.0), digest, report, false);
        }
        for (id, wanted) in &mut desired.policies {
            wanted.policy.generation = Generation(0);
            let digest = operation_digest(&Operation::InstallPolicy(wanted.policy.clone()), &mut buffer);
            let found = installed.policies.get(id);
            let same = found.is_some_and(|found| {
                wanted.policy.generation = found.generation;
                *found == wanted.policy
            });
            wanted.policy.generation =
                assign((POLICY, id.0), digest, found.map(|found| found.generation), same);
        }
        for (id, wanted) in &mut desired.relays {
            wanted.entry.generation = Generation(0);
            let digest = operation_digest(&Operation::InstallRelay(wanted.entry), &mut buffer);
            let found = installed.relays.get(id).map(|report| report.entry);
            let same = found.is_some_and(|found| {
                wanted.entry.generation = found.generation;
                found == wanted.entry
            });
            wanted.entry.generation =
                assign((RELAY, id.0), digest, found.map(|found| found.generation), same);
        }
        next
    }
}

/// Digest of a description. The buffer holds its keys and wipes itself.
fn operation_digest(operation: &Operation, buffer: &mut Buffer) -> Digest {
    match codec::encode(operation, buffer) {
        Ok(()) => digest::half(&[b"description", buffer]),
        // Too long for a message: it will be refused when it is sent, so any value serves.
        Err(CodecError::TooLong | _) => Digest::default(),
    }
}

fn serialize(saved: &Saved) -> io::Result<Vec<u8>> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(postcard::to_allocvec(saved).map_err(io::Error::other)?);
    let check = digest::sha256(&[b"generations", &bytes]);
    bytes.extend(check);
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Option<Saved> {
    let (content, check) = bytes.split_last_chunk::<32>()?;
    if digest::sha256(&[b"generations", content]) != *check {
        return None;
    }
    let body = content.strip_prefix(&MAGIC)?;
    match postcard::take_from_bytes(body) {
        Ok((saved, [])) => Some(saved),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NoKeyFiles, parse as parse_config};

    fn desired(mtu: u16) -> Desired {
        let text = format!(
            "[[tunnel]]\nname = \"a\"\nlocal = \"192.0.2.1\"\nremote = \"192.0.2.2\"\nesp = \"null-sha1\"\nmtu = {mtu}\n\
             mode = \"transport\"\n\
             out = {{ spi = 0x1001, integrity_key = \"1111111111111111111111111111111111111111\" }}\n\
             in = {{ spi = 0x2001, integrity_key = \"2222222222222222222222222222222222222222\" }}\n"
        );
        Desired::new(parse_config("t", &text, &NoKeyFiles).unwrap())
    }

    fn generations(desired: &Desired) -> Vec<u64> {
        let sas = desired.sas.values().map(|sa| sa.config.generation.0);
        sas.chain(desired.policies.values().map(|policy| policy.policy.generation.0)).collect()
    }

    /// DP-7: the same description has the same generation after a restart, a changed one a newer one.
    #[test]
    fn dp_7_generations_survive_a_restart() {
        let directory = std::env::temp_dir().join(format!("pt-control-state-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let none = Installed::default();
        let (mut state, lost) = Generations::open(&directory).unwrap();
        assert_eq!(lost, None);
        assert!(matches!(Generations::open(&directory), Err(StateError::Taken(_))));
        let mut first = desired(1400);
        state.settle(&mut first, &none).unwrap();
        drop(state);

        let (mut state, _) = Generations::open(&directory).unwrap();
        let mut again = desired(1400);
        state.settle(&mut again, &none).unwrap();
        assert_eq!(generations(&again), generations(&first));
        let mut changed = desired(1300);
        state.preview(&mut changed, &none);
        let mut previewed = desired(1400);
        state.settle(&mut previewed, &none).unwrap();
        assert_eq!(generations(&previewed), generations(&first), "a preview leaves nothing behind");
        let newest = generations(&first).into_iter().max();
        for (id, sa) in &changed.sas {
            assert!(Some(sa.config.generation.0) > newest, "{id:?}");
        }
        let policies = |d: &Desired| d.policies.values().map(|p| p.policy.generation).collect::<Vec<_>>();
        assert_eq!(policies(&changed), policies(&first), "the policy did not change");
        drop(state);

        let path = directory.join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[10] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (mut state, lost) = Generations::open(&directory).unwrap();
        assert!(lost.unwrap().contains("damaged"));
        let mut anew = desired(1400);
        state.settle(&mut anew, &none).unwrap();
        assert!(generations(&anew).into_iter().min() > newest, "numbers go on above the lost ones");
        drop(state);
        fs::remove_dir_all(&directory).unwrap();
    }
}
