//! Where files are kept: a trait, so that tests can cut the power at every byte, and a directory of a file system. The
//! other place is a [`Device`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::device::{self, Device};
use crate::format::HEADER_LEN;

/// What a backup file's name ends with.
pub(crate) const SUFFIX: &str = ".nvram";
/// What is added to it while the file is not complete.
pub(crate) const UNFINISHED: &str = ".new";

/// Most bytes of a file that is read: a million records of the largest size.
pub(crate) const MAX_FILE: u64 = 4 << 30;

/// Files by name. Nothing is durable before the `sync` that the crate's documentation names.
pub trait Storage: Send {
    /// All names.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A whole file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// A new, empty file; what was under this name is gone.
    fn create(&mut self, name: &str) -> io::Result<Box<dyn StorageFile>>;
    /// Gives a file another name, in place of the file that has it.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    /// Destroys a file's key, durably, then removes its name.
    fn remove(&mut self, name: &str) -> io::Result<()>;
    /// Makes creations, renames and removals durable.
    fn sync(&mut self) -> io::Result<()>;
    /// Files that can still be created, as far as that is limited.
    fn free(&mut self) -> io::Result<usize> {
        Ok(usize::MAX)
    }
}

/// A file that is being written.
pub trait StorageFile: Send {
    /// Adds to the end. After an error, how much of it is in the file is unknown.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was appended durable.
    fn sync(&mut self) -> io::Result<()>;
    /// Overwrites the header, and with it the sealed data key, with zeros, durably.
    fn destroy_key(&mut self) -> io::Result<()>;
    /// Bytes that can still be appended, as far as that is known.
    fn room(&self) -> u64 {
        u64::MAX
    }
}

/// Where a backup is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a directory, made if it is not there.
    Directory(PathBuf),
    /// On a block device, or in a file of a fixed size.
    Device(PathBuf),
}

impl Place {
    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Device(path) => path,
        }
    }

    /// Opens it for writing.
    ///
    /// # Errors
    /// It is not there and cannot be made, cannot be written, or another process has it.
    pub fn open(&self) -> io::Result<Box<dyn Storage>> {
        Ok(match self {
            Self::Directory(path) => Box::new(Directory::open(path)?),
            Self::Device(path) => Box::new(Device::open(path)?),
        })
    }
}

/// The backups at `path`, a directory, a device or one file, by name; none if nothing is there.
pub(crate) fn read_all(path: &Path) -> io::Result<Vec<(String, io::Result<Vec<u8>>)>> {
    if device::is_device(path) {
        return Device::read_files(&File::open(path)?);
    }
    if path.is_file() {
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        return Ok(vec![(name, read(path))]);
    }
    if !path.try_exists()? {
        return Ok(Vec::new());
    }
    let mut names: Vec<_> = list(path)?.into_iter().filter(|name| name.ends_with(SUFFIX)).collect();
    names.sort();
    Ok(names.into_iter().map(|name| (name.clone(), read(&path.join(name)))).collect())
}

/// A directory of a file system, owned by one process at a time.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Open for its flush, and for the lock that lasts as long as this.
    handle: File,
}

impl Directory {
    /// Opens `path` for writing, making it (mode 0700) if it is not there. Fails if another process has it.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let handle = File::open(path)?;
        lock(&handle)?;
        Ok(Self { path: path.to_owned(), handle })
    }
}

/// Keeps other processes away for as long as `file` is open.
pub(crate) fn lock(file: &File) -> io::Result<()> {
    flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => {
            io::Error::new(io::ErrorKind::ResourceBusy, "in use by another process")
        }
        other => other.into(),
    })
}

impl Storage for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        list(&self.path)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        read(&self.path.join(name))
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        Ok(Box::new(options.open(self.path.join(name))?))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let path = self.path.join(name);
        OpenOptions::new().write(true).open(&path)?.destroy_key()?;
        fs::remove_file(path)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.handle.sync_all()
    }
}

impl StorageFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn destroy_key(&mut self) -> io::Result<()> {
        let length = usize::try_from(self.metadata()?.len()).unwrap_or(HEADER_LEN).min(HEADER_LEN);
        self.write_all_at([0; HEADER_LEN].get(..length).unwrap_or_default(), 0)?;
        self.sync_data()
    }
}

/// Removes every backup of a place, keys first (RST-7). The place itself stays; a directory need not be there.
/// Fails if a process has it open.
pub fn erase(place: &Place) -> io::Result<()> {
    if !place.path().try_exists()? {
        return Ok(());
    }
    let mut storage = place.open()?;
    for name in storage.list()? {
        if is_ours(&name) {
            storage.remove(&name)?;
        }
    }
    storage.sync()
}

/// Whether this is a backup, finished or not.
pub(crate) fn is_ours(name: &str) -> bool {
    name.ends_with(SUFFIX) || is_unfinished(name)
}

/// Whether this is a backup that was never finished.
pub(crate) fn is_unfinished(name: &str) -> bool {
    name.strip_suffix(UNFINISHED).is_some_and(|name| name.ends_with(SUFFIX))
}

/// The names in a directory, those that are text.
pub(crate) fn list(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

/// A whole file, up to the limit.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}
