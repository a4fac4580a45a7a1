//! The administrator's side of the backup that outlives a reset: its keys, and what is in a file (`postern key`,
//! `postern snapshot`), and what the preflight check says of it. Needs no daemon. Never shows a key.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use postern_nvram::{
    Backup, Blocks, COUNTER_INDEX, FileReport, Inspection, KeyError, KeyRing, MonotonicCounter, NoCounter,
    Protection, ReadError, Report, SMALLEST, Tpm2Counter, generate, read_public, write_public,
};
use serde_json::{Value, json};
use thiserror::Error;

use crate::check::{Finding, Level};
use crate::table::{Table, bytes, duration};

/// The public half's file.
pub const PUBLIC: &str = "public.key";
/// The private half's file.
pub const PRIVATE: &str = "private.key";
/// The directory of the backup itself.
pub const BACKUP: &str = "backup";

/// Where the keys are, and what opens the private half.
#[derive(Clone, Debug, Args)]
pub struct Keys {
    /// Directory of the keys
    #[arg(long, value_name = "DIR", default_value = "/var/lib/postern/control/recovery")]
    pub directory: PathBuf,
    /// File with the passphrase of the private half
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// How the TPM is reached, as tpm2-tools word it
    #[arg(long, value_name = "TCTI", env = "TPM2TOOLS_TCTI")]
    pub tcti: Option<String>,
}

/// How the private half is to be kept.
#[derive(Clone, Debug, Args)]
pub struct Sealing {
    /// Seal it with the passphrase in this file
    #[arg(long, value_name = "FILE", conflicts_with = "tpm2")]
    pub with_passphrase_file: Option<PathBuf>,
    /// Let the TPM seal it
    #[arg(long)]
    pub tpm2: bool,
    /// Only while these PCRs are as they are now, such as sha256:7
    #[arg(long, value_name = "LIST", requires = "tpm2")]
    pub pcrs: Option<String>,
}

/// `postern key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make the pair of keys of the backup, if there is none
    Init {
        /// Where they are.
        #[command(flatten)]
        keys: Keys,
        /// How the private half is kept.
        #[command(flatten)]
        sealing: Sealing,
    },
    /// Make a new pair; the one before still opens the backup that is there
    Rotate {
        /// Where they are.
        #[command(flatten)]
        keys: Keys,
    },
    /// Keep the private half another way: in the clear, or as said
    Seal {
        /// Where they are.
        #[command(flatten)]
        keys: Keys,
        /// How the private half is kept.
        #[command(flatten)]
        sealing: Sealing,
    },
}

/// `postern snapshot inspect` and `verify`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// What a backup says about itself: counts, ages, sizes; needs no key
    Inspect {
        /// A file, the directory with the backup, or the device
        path: PathBuf,
    },
    /// Decrypt a backup and say what of it would be used after a reset
    Verify {
        /// A file, the directory with the backup, or the device
        path: PathBuf,
        /// Where they are.
        #[command(flatten)]
        keys: Keys,
        /// Compare with the counter in the TPM
        #[arg(long)]
        counter: bool,
    },
}

/// Why a command did nothing.
#[derive(Debug, Error)]
pub enum Refusal {
    /// There are keys.
    #[error("{0} is there; `postern key rotate` makes new keys and keeps the way to the old backup")]
    Exists(PathBuf),
    /// The private half.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The backup.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file or directory.
    #[error("{path}: {error}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// What a command has to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: Value,
    /// Nothing is wrong.
    pub good: bool,
}

impl Keys {
    fn public(&self) -> PathBuf {
        self.directory.join(PUBLIC)
    }

    fn private(&self) -> PathBuf {
        self.directory.join(PRIVATE)
    }

    fn tcti(&self) -> Option<&str> {
        self.tcti.as_deref()
    }

    /// The private keys, and how they are kept.
    fn open(&self) -> Result<(KeyRing, Protection), KeyError> {
        let protection = Protection::of(&self.private())?;
        let holder = protection.holder(&self.private(), self.passphrase_file.as_deref(), self.tcti());
        Ok((holder.unseal()?, protection))
    }

    fn outcome(&self, done: &str, ring: &KeyRing, protection: &Protection) -> Outcome {
        let ids: Vec<_> = ring.0.iter().map(|key| key.id().to_string()).collect();
        let (public, private) = (self.public(), self.private());
        let key = ids.first().cloned().unwrap_or_default();
        let advice = match protection {
            Protection::Clear => "its mode is all that protects it; `postern key seal` can do better\n",
            Protection::Passphrase | Protection::Tpm2 { .. } => "",
        };
        let text = format!(
            "{done}: key {key}\npublic half   {}\nprivate half  {}, {protection}\n{advice}",
            public.display(),
            private.display()
        );
        let older: Vec<_> = ids.iter().skip(1).collect();
        let json = json!({
            "key": key, "older": older, "public": public, "private": private, "protection": protection.to_string(),
        });
        Outcome { text, json, good: true }
    }
}

impl Sealing {
    fn protection(&self) -> Protection {
        match (&self.with_passphrase_file, self.tpm2) {
            (Some(_), _) => Protection::Passphrase,
            (None, true) => Protection::Tpm2 { pcrs: self.pcrs.clone() },
            (None, false) => Protection::Clear,
        }
    }
}

/// Does what `postern key` was asked for.
///
/// # Errors
/// Nothing was changed then.
pub fn key(command: &KeyCommand) -> Result<Outcome, Refusal> {
    match command {
        KeyCommand::Init { keys, sealing } => {
            for path in [keys.public(), keys.private()] {
                if path.exists() {
                    return Err(Refusal::Exists(path));
                }
            }
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&keys.directory);
            made.map_err(|error| Refusal::Io { path: keys.directory.clone(), error })?;
            let (public, private) = generate();
            let (ring, protection) = (KeyRing(vec![private]), sealing.protection());
            protection.write(&keys.private(), &ring, sealing.with_passphrase_file.as_deref(), keys.tcti())?;
            write_public(&keys.public(), &public)?;
            Ok(keys.outcome("made", &ring, &protection))
        }
        KeyCommand::Rotate { keys } => {
            let (mut ring, protection) = keys.open()?;
            let (public, private) = generate();
            ring.0.insert(0, private);
            // The one before is what the backup that is there is for; those before that have none any more.
            ring.0.truncate(2);
            protection.write(&keys.private(), &ring, keys.passphrase_file.as_deref(), keys.tcti())?;
            write_public(&keys.public(), &public)?;
            let mut outcome = keys.outcome("made", &ring, &protection);
            outcome.text.push_str("postern-control uses it from its next start on\n");
            Ok(outcome)
        }
        KeyCommand::Seal { keys, sealing } => {
            let (ring, _) = keys.open()?;
            let protection = sealing.protection();
            protection.write(&keys.private(), &ring, sealing.with_passphrase_file.as_deref(), keys.tcti())?;
            Ok(keys.outcome("sealed", &ring, &protection))
        }
    }
}

/// Does what `postern snapshot` was asked for.
///
/// # Errors
/// There is nothing to be read, or no key to read it with.
pub fn snapshot(command: &SnapshotCommand, now: SystemTime) -> Result<Outcome, Refusal> {
    match command {
        SnapshotCommand::Inspect { path } => {
            if !path.exists() {
                return Err(Refusal::Io { path: path.clone(), error: io::ErrorKind::NotFound.into() });
            }
            let inspected = Backup::inspect(path)?.into_iter().map(|(name, inspection)| {
                let file = if path.is_dir() { path.join(name) } else { path.clone() };
                Ok((file, inspection?))
            });
            Ok(inspected_outcome(&inspected.collect::<Result<Vec<_>, Refusal>>()?, now))
        }
        SnapshotCommand::Verify { path, keys, counter } => {
            if !path.exists() {
                return Err(Refusal::Io { path: path.clone(), error: io::ErrorKind::NotFound.into() });
            }
            let protection = Protection::of(&keys.private())?;
            let holder = protection.holder(&keys.private(), keys.passphrase_file.as_deref(), keys.tcti());
            let mut counter: Box<dyn MonotonicCounter> = if *counter {
                Box::new(Tpm2Counter { index: COUNTER_INDEX, tcti: keys.tcti.clone() })
            } else {
                Box::new(NoCounter)
            };
            let backup = Backup::read(path, holder.as_ref(), counter.as_mut())?;
            Ok(verified_outcome(&backup.report))
        }
    }
}

fn age(inspection: &Inspection, now: SystemTime) -> u64 {
    now.duration_since(inspection.created).as_ref().map_or(0, Duration::as_secs)
}

fn inspected_outcome(files: &[(PathBuf, Inspection)], now: SystemTime) -> Outcome {
    let headings = ["file", "#age", "#size", "#checkpoint", "#batches", "#put", "#removed", "counter", "key"];
    let mut table = Table::new(&headings);
    for (path, file) in files {
        table.row([
            path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            duration(age(file, now)),
            bytes(file.bytes),
            file.checkpoint_records.to_string(),
            file.batches.to_string(),
            file.puts.to_string(),
            file.removes.to_string(),
            file.counter.map_or_else(|| "none".to_owned(), |value| value.to_string()),
            file.recipient.to_string(),
        ]);
    }
    let rows: Vec<_> = files.iter().map(|(path, file)| inspection_json(path, file, now)).collect();
    let text = if files.is_empty() { "no backup is there\n".to_owned() } else { table.to_string() };
    Outcome { text, json: Value::Array(rows), good: true }
}

fn inspection_json(path: &Path, inspection: &Inspection, now: SystemTime) -> Value {
    // Exhaustive: what a file shows is shown.
    let age = age(inspection, now);
    let Inspection { bytes, generation, epoch, floor, counter, created: _, recipient, .. } = inspection;
    let Inspection { checkpoint_records, checkpoint_bytes, batches, puts, removes, .. } = inspection;
    let Inspection { journal_bytes, trailing_bytes, payload_bytes, .. } = inspection;
    json!({
        "file": path, "bytes": bytes, "generation": generation, "checkpoint": epoch, "floor": floor,
        "counter": counter, "age_seconds": age, "key": recipient.to_string(),
        "checkpoint_records": checkpoint_records, "checkpoint_bytes": checkpoint_bytes, "batches": batches,
        "puts": puts, "removes": removes, "journal_bytes": journal_bytes, "trailing_bytes": trailing_bytes,
        "payload_bytes": payload_bytes,
    })
}

fn verified_outcome(report: &Report) -> Outcome {
    let mut lines: Vec<_> = report.files.iter().map(verified_line).collect();
    let good = report.is_clean();
    let counter = report.counter.map_or_else(
        || "not compared with a counter".to_owned(),
        |value| format!("compared with counter value {value}"),
    );
    lines.push(format!("{} records would be used; {counter}\n", report.records));
    let files: Vec<_> = report
        .files
        .iter()
        .map(|file| {
            json!({
                "file": file.name, "status": file.status.to_string(), "clean": file.is_clean(),
                "checkpoint_records": file.checkpoint_records, "missing": file.missing, "changes": file.changes,
                "damaged": file.damaged, "uncommitted": file.uncommitted, "torn_bytes": file.torn_bytes,
            })
        })
        .collect();
    let json = json!({ "records": report.records, "clean": good, "counter": report.counter, "files": files });
    Outcome { text: lines.concat(), json, good }
}

fn verified_line(file: &FileReport) -> String {
    let FileReport { name, status, inspection: _, checkpoint_records, missing, changes, .. } = file;
    let FileReport { damaged, uncommitted, torn_bytes, .. } = file;
    let wrong = [
        (missing, "records of the checkpoint missing or damaged"),
        (damaged, "damaged places in the journal"),
        (uncommitted, "changes of a batch that was under way"),
        (torn_bytes, "bytes torn at the end"),
    ];
    let wrong = wrong.iter().filter(|(count, _)| **count > 0);
    let wrong: String =
        wrong.flat_map(|(count, what)| ["; ".to_owned(), count.to_string(), format!(" {what}")]).collect();
    format!("{name}: {status}; {checkpoint_records} records, {changes} changes{wrong}\n")
}

/// What the preflight check says of the backup whose keys are in `directory`, and which is there too unless there is a
/// `device`.
pub fn check(directory: &Path, device: Option<&Path>) -> Vec<Finding> {
    const SUBJECT: &str = "backup";
    let finding = |level, text: String, fix: Option<&str>| Finding {
        level,
        subject: SUBJECT.into(),
        text,
        fix: fix.map(str::to_owned),
    };
    let shown = directory.display();
    let mut findings: Vec<_> = device
        .and_then(device_problem)
        .map(|text| finding(Level::Fail, text, Some("without it no peer is told after a reset")))
        .into_iter()
        .collect();
    match fs::metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            findings.push(finding(Level::Ok, format!("{shown} is made at the first start"), None));
            return findings;
        }
        Err(error) => {
            findings.push(finding(Level::Fail, format!("{shown}: {error}"), Some("run this check as root")));
            return findings;
        }
        Ok(metadata) if !metadata.is_dir() => {
            findings.push(finding(Level::Fail, format!("{shown} is no directory"), Some("move it away")));
            return findings;
        }
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => {
            findings.push(finding(
                Level::Warn,
                format!("others can look into {shown}"),
                Some("`chmod 700` it"),
            ));
        }
        Ok(_) => {}
    }
    if let Err(error) = tempfile::tempfile_in(directory) {
        let fix = "put it on storage that can be written: without it no peer is told after a reset";
        findings.push(finding(Level::Fail, format!("{shown} cannot be written: {error}"), Some(fix)));
    }
    let private = directory.join(PRIVATE);
    match Protection::of(&private) {
        Ok(Protection::Clear) => {
            let text = format!("the private half is in the clear in {}", private.display());
            let fix = "`postern key seal` keeps it with a passphrase or in a TPM";
            findings.push(finding(Level::Warn, text, Some(fix)));
        }
        Ok(protection) => {
            findings.push(finding(Level::Ok, format!("the private half is {protection}"), None));
        }
        Err(KeyError::Io { .. }) if !private.exists() => {
            findings.push(finding(Level::Ok, "keys are made at the first start".into(), None));
        }
        Err(error) => {
            findings.push(finding(
                Level::Fail,
                error.to_string(),
                Some("`chmod 600`, or `postern key seal`"),
            ));
        }
    }
    if directory.join(PUBLIC).exists()
        && let Err(error) = read_public(&directory.join(PUBLIC))
    {
        findings.push(finding(Level::Fail, error.to_string(), Some("`chmod 600`, or `postern key rotate`")));
    }
    let beside = directory.join(BACKUP);
    let newest = Backup::inspect(device.unwrap_or(&beside)).ok().and_then(|mut files| files.pop());
    if let Some((_, Ok(inspection))) = newest
        && inspection.counter.is_none()
    {
        let text = "nothing shows when an older backup is put back: it is written without a counter".into();
        findings.push(finding(Level::Warn, text, Some("storage that others can write should not hold it")));
    }
    findings
}

/// Why a backup cannot be on this device, without writing to it.
fn device_problem(device: &Path) -> Option<String> {
    let shown = device.display();
    let opened = fs::OpenOptions::new().read(true).write(true).open(device);
    let Ok(file) = opened.as_ref() else { return opened.err().map(|error| format!("{shown}: {error}")) };
    match file.size() {
        Ok(size) if size < SMALLEST => {
            Some(format!("{shown} has {}; {} is the least", bytes(size), bytes(SMALLEST)))
        }
        Ok(_) => Backup::inspect(device).err().map(|error| format!("{shown}: {error}")),
        Err(error) => Some(format!("{shown}: {error}")),
    }
}

#[cfg(test)]
mod tests;
