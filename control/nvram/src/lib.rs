//! The encrypted store that outlives a reset (RST-1, RST-2, RST-3, RST-11).
//!
//! Records are opaque bytes under a 16-byte [`Key`]; this crate knows nothing of IKE. A [`Store`] writes them, encrypted
//! for a public key, and can never read them back: the private half is somewhere else, behind a [`KeyHolder`], and is
//! asked for only after a reset, by [`Backup::read`].
//!
//! # One file a generation
//! A generation begins with [`Store::open`] and is one file: two copies of the header, the *checkpoint* (all records that
//! were live when it was written) and the *journal* (batches of changes since). See [`format`](mod@format) for the bytes.
//! A checkpoint writes the whole file anew under a new data key; nothing is ever written twice under the same key at the
//! same offset, which is what the nonces are made of.
//!
//! # What is flushed, and when (the fsync discipline)
//! 1. *Checkpoint*: write to a temporary name, `fsync` it, rename it over the generation's name, `fsync` the directory.
//!    Until the rename is durable the old file, journal and all, is what a reader finds; afterwards the new one. The key
//!    of the old one is then overwritten through the still open descriptor.
//! 2. *Commit*: one append with all frames of the batch, the last one marked, and one `fdatasync`. Records in it count
//!    as durable when that returned.
//! 3. *A failed write or flush* says nothing about what reached the medium (Linux drops the dirty pages and a second
//!    `fsync` succeeds). The file is not appended to again: the next commit or checkpoint writes a new file from memory.
//! 4. *Erase*: the checkpoint that says "nothing before me counts" is durable first, then the counter is advanced, then
//!    the older files lose their keys (overwritten, `fdatasync`) and their names, and the directory is flushed.
//!
//! The same on a block device, which has no names: see [`Device`] and the head of its file.
//!
//! A reset at any point leaves every batch whose commit returned. Of one that was under way, what is intact is used and
//! reported as uncommitted: its removals are not, because telling a peer twice does less harm than not telling it.
//!
//! # After a reset
//! ```text
//! let backup = Backup::read(path, holder, counter)?;                 // all generations that are there, merged
//! let (store, _) = Store::take_over(options, &public, counter, &records still to be dealt with)?;
//! store.commit(removal of each record as it is dealt with)?;         // a second reset goes on here
//! ```
//! [`Store::take_over`] writes a new generation with these records before it removes the old ones. Where both are to stand
//! beside each other for a while there are [`Store::open`] and [`Store::erase_older`]; whoever removes records between
//! them gets them back from the old file at the next reset.
//!
//! # Who can do what
//! Reading the storage yields ciphertext. Writing to it yields a backup that is missing records or is an old one; the
//! latter is detected if there is a [`MonotonicCounter`]. Records that the store did not write are not accepted: the seal
//! of the data key also covers a secret that both halves of the key share ([`PublicKey`]), which is therefore kept
//! out of others' sight as well, though it reads nothing.
#![forbid(unsafe_code)]

mod backup;
mod counter;
mod device;
#[cfg(any(test, feature = "exercise"))]
pub mod exercise;
mod format;
mod holder;
mod keys;
mod storage;
mod store;
mod tpm;

pub use backup::{Backup, FileReport, FileStatus, Inspected, Inspection, ReadError, Report};
pub use counter::{CounterError, MonotonicCounter, NoCounter};
pub use device::{Blocks, Device, REGIONS, SMALLEST};
pub use format::{FRAME_OVERHEAD, HEADER_LEN, MAX_RECORD};
pub use holder::{
    KeyError, KeyHolder, Passphrase, Protection, SealedFile, SystemdCredential, read_public, write_public,
};
pub use keys::{KeyId, KeyRing, KeyText, PrivateKey, PublicKey, generate};
pub use storage::{Directory, Place, Storage, StorageFile, erase};
pub use store::{Change, Checkpoint, Key, Options, Store, StoreError};
pub use tpm::{COUNTER_INDEX, Tpm2, Tpm2Counter};
