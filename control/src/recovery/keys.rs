//! The pair of keys of the backup (RST-3). The public half is a file that this process reads; the private half is in a file
//! of its own that is read only after a reset. Both are made at the first start, unless an administrator did that before.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use postern_nvram::{KeyError, KeyRing, KeyText, PublicKey, SealedFile, generate};
use rustix::fs::{Mode, OFlags};

/// Names of the files.
const PUBLIC: &str = "public.key";
const PRIVATE: &str = "private.key";

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The public half is no key.
    #[error("{path}: {error}")]
    Text {
        /// The file.
        path: PathBuf,
        /// Why.
        error: KeyText,
    },
    /// The private half cannot be kept.
    #[error(transparent)]
    Holder(#[from] KeyError),
}

/// The public half and where the private half is; made if there is none.
pub fn prepare(directory: &Path) -> Result<(PublicKey, PathBuf), KeysError> {
    let (public, private) = (directory.join(PUBLIC), directory.join(PRIVATE));
    let failed = |error| KeysError::Io { path: public.clone(), error };
    match fs::read_to_string(&public) {
        Ok(text) => {
            let key = PublicKey::from_text(text.trim());
            let key = key.map_err(|error| KeysError::Text { path: public.clone(), error })?;
            Ok((key, private))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
            let (key, secret) = generate();
            SealedFile::write(&private, &KeyRing(vec![secret]), None)?;
            write_private(&public, key.to_text().as_bytes()).map_err(failed)?;
            Ok((key, private))
        }
        Err(error) => Err(failed(error)),
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = fs::File::from(file);
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()
}
