//! The pair of keys of the backup (RST-3). The public half is a file that this process reads; the private half is in a file
//! of its own that is read only after a reset. Both are made at the first start, unless an administrator did that before.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use postern_ike::{Random, Secret};
use postern_nvram::{
    COUNTER_INDEX, CounterError, KeyError, KeyHolder, KeyRing, KeyText, MonotonicCounter, NoCounter,
    Protection, PublicKey, SealedFile, SystemdCredential, Tpm2Counter, generate,
};
use rustix::fs::{Mode, OFlags};

/// Names of the files.
const PUBLIC: &str = "public.key";
const PRIVATE: &str = "private.key";
const TOKENS: &str = "tokens.secret";

/// Bytes of the secret of tokens.
const TOKEN_SECRET: usize = 32;

/// How the private half is got at, where its file does not say all, and what guards the backup against roll-back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// File with the passphrase that the private half is kept under.
    pub passphrase_file: Option<PathBuf>,
    /// The private half is the systemd credential of this name, in place of a file.
    pub credential: Option<String>,
    /// Where the TPM is, in the words of tpm2-tools; `None`: where these find it.
    pub tcti: Option<String>,
    /// The TPM counts generations, so that an older backup that was put back is refused.
    pub tpm_counter: bool,
    /// Least time between two steps of that counter but those of starts: within it an older backup is not known.
    pub counter_interval: Duration,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            passphrase_file: None,
            credential: None,
            tcti: None,
            tpm_counter: false,
            counter_interval: Duration::from_hours(1),
        }
    }
}

impl Access {
    /// What gives the private half out. `private` says itself how it is kept.
    ///
    /// # Errors
    /// The file cannot be read, or is no key.
    pub fn holder(&self, private: &Path) -> Result<Box<dyn KeyHolder>, KeyError> {
        match &self.credential {
            Some(name) => Ok(Box::new(SystemdCredential::new(name.as_str()))),
            None => Ok(Protection::of(private)?.holder(
                private,
                self.passphrase_file.as_deref(),
                self.tcti.as_deref(),
            )),
        }
    }

    /// What guards against roll-back.
    pub fn counter(&self) -> Box<dyn MonotonicCounter> {
        if self.tpm_counter {
            Box::new(MadeIfMissing(Tpm2Counter { index: COUNTER_INDEX, tcti: self.tcti.clone() }))
        } else {
            Box::new(NoCounter)
        }
    }
}

/// The counter in the TPM, which the first one who wants its value makes. Made again it goes on above its last value.
struct MadeIfMissing(Tpm2Counter);

impl MonotonicCounter for MadeIfMissing {
    fn read(&mut self) -> Result<Option<u64>, CounterError> {
        self.0.read().or_else(|_| {
            self.0.define()?;
            self.0.read()
        })
    }

    fn advance(&mut self) -> Result<u64, CounterError> {
        self.0.advance()
    }
}

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
    /// A credential is to hold the private half, and there is no public one.
    #[error(
        "{0} is not there, and the private half is to be a credential: make both with `postern key init`"
    )]
    NoPublic(PathBuf),
    /// The secret of tokens is not one.
    #[error("{}: not {TOKEN_SECRET} bytes; without it another is made, and tokens that peers have are worth nothing", .0.display())]
    Tokens(PathBuf),
    /// The private half cannot be kept.
    #[error(transparent)]
    Holder(#[from] KeyError),
}

/// The public half and where the private half is; made if there is none.
pub fn prepare(directory: &Path, access: &Access) -> Result<(PublicKey, PathBuf), KeysError> {
    let (public, private) = (directory.join(PUBLIC), directory.join(PRIVATE));
    let failed = |error| KeysError::Io { path: public.clone(), error };
    match fs::read_to_string(&public) {
        Ok(text) => {
            let key = PublicKey::from_text(text.trim());
            let key = key.map_err(|error| KeysError::Text { path: public.clone(), error })?;
            Ok((key, private))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && access.credential.is_some() => {
            Err(KeysError::NoPublic(public))
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

/// The secret that tokens are made from (RFC 6290), which outlives resets; made if there is none. Who reads it can end IKE
/// SAs that this node has lost, and none that it has.
pub fn token_secret(directory: &Path, random: &mut dyn Random) -> Result<Secret, KeysError> {
    let path = directory.join(TOKENS);
    match fs::read(&path) {
        Ok(bytes) if bytes.len() == TOKEN_SECRET => Ok(Secret::new(bytes)),
        Ok(_) => Err(KeysError::Tokens(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = Secret::new(random.bytes(TOKEN_SECRET));
            write_private(&path, secret.expose()).map_err(|error| KeysError::Io { path, error })?;
            Ok(secret)
        }
        Err(error) => Err(KeysError::Io { path, error }),
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = fs::File::from(file);
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6290: the secret of tokens is made once, for this process alone, and one that was cut short is not taken.
    #[test]
    fn rst_4_the_secret_of_tokens_stays() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let mut random = crate::ike::jobs::System::default();
        let secret = token_secret(directory.path(), &mut random).unwrap();
        assert_eq!(token_secret(directory.path(), &mut random).unwrap(), secret);
        let path = directory.path().join(TOKENS);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, [7; 31]).unwrap();
        assert!(matches!(token_secret(directory.path(), &mut random), Err(KeysError::Tokens(_))));
    }

    /// RST-3: a private half that was put under a passphrase after it was made is got at with the passphrase alone; where a
    /// credential is to hold it, none is made.
    #[test]
    fn rst_3_access() {
        let dir = tempfile::tempdir().unwrap();
        let (public, private) = prepare(dir.path(), &Access::default()).unwrap();
        let ring = Access::default().holder(&private).unwrap().unseal().unwrap();

        let passphrase = dir.path().join("passphrase");
        write_private(&passphrase, b"correct horse\n").unwrap();
        Protection::Passphrase.write(&private, &ring, Some(&passphrase), None).unwrap();
        let without = Access::default().holder(&private).unwrap().unseal();
        assert!(matches!(without, Err(KeyError::NoPassphrase(_))), "{:?}", without.err());
        let with = Access { passphrase_file: Some(passphrase.clone()), ..Access::default() };
        assert!(with.holder(&private).unwrap().unseal().is_ok());
        write_private(&passphrase, b"wrong horse\n").unwrap();
        assert!(with.holder(&private).unwrap().unseal().is_err());
        assert_eq!(prepare(dir.path(), &with).unwrap().0.to_text(), public.to_text());

        let empty = tempfile::tempdir().unwrap();
        let credential = Access { credential: Some("backup-key".to_owned()), ..Access::default() };
        assert!(matches!(prepare(empty.path(), &credential), Err(KeysError::NoPublic(_))));
        assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
    }
}
