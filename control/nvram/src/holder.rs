//! Where the private half is kept while the gateway runs: behind this seam, out of the process.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64ct::{Base64, Encoding};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::keys::{KeyRing, KeyText, PublicKey, random};
use crate::tpm::{self, Tpm2};

/// Most bytes of a file with keys.
const MAX_TEXT: u64 = 16 * 1024;
const SEALED_WORD: &str = "postern-nvram-sealed-1";
const SALT_LEN: usize = 16;
const NONCE_LEN: usize = 12;
/// RFC 9106 section 4, second recommended option: 64 MiB, 3 passes, 4 lanes.
const COST: Cost = Cost { memory_kib: 64 * 1024, passes: 3, lanes: 4 };
/// Above this a changed file could hold up a start: 1 GiB, 16 passes.
const MOST: Cost = Cost { memory_kib: 1024 * 1024, passes: 16, lanes: 16 };

/// What gives out the private half after a reset.
pub trait KeyHolder {
    /// The private keys, newest first.
    ///
    /// # Errors
    /// The holder does not give them out, or what it holds is not keys.
    fn unseal(&self) -> Result<KeyRing, KeyError>;

    /// What and where it is, for people. Shows no secret.
    fn describe(&self) -> String;
}

/// Why the private half is not to be had.
#[derive(Debug, Error)]
pub enum KeyError {
    /// A file or a program could not be used.
    #[error("{what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A key file that others can read.
    #[error(
        "{path} has mode {mode:04o}, which lets others use it; make it 0600, or seal it with a passphrase"
    )]
    Mode {
        /// Which.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to neither us nor root.
    #[error("{path} belongs to user {owner}, who is neither this one nor root")]
    Owner {
        /// Which.
        path: String,
        /// Whose it is.
        owner: u32,
    },
    /// The file is sealed and there is no passphrase.
    #[error("{0} is sealed with a passphrase, and none is given")]
    NoPassphrase(String),
    /// The passphrase is wrong, or the file was changed.
    #[error("{0}: wrong passphrase, or the file is damaged")]
    Passphrase(String),
    /// The content is not what it should be.
    #[error("{what}: {reason}")]
    Text {
        /// Which.
        what: String,
        /// Why.
        reason: KeyText,
    },
    /// A service manager passed no credentials, or the TPM refused.
    #[error("{0}")]
    Holder(String),
}

/// How the file with the private half keeps it; the file says so itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Not at all: its mode is all there is.
    Clear,
    /// [`SealedFile`] with a passphrase.
    Passphrase,
    /// [`Tpm2`], while these PCRs are as they were if there are any.
    Tpm2 {
        /// Such as `sha256:7`.
        pcrs: Option<String>,
    },
}

impl Protection {
    /// That of a file.
    ///
    /// # Errors
    /// It cannot be read, is in the clear and can be read by others, or is no key file.
    pub fn of(path: &Path) -> Result<Self, KeyError> {
        let text = read_key_file(path)?;
        match text.split(' ').next().unwrap_or_default() {
            SEALED_WORD => Ok(Self::Passphrase),
            tpm::WORD => Ok(Self::Tpm2 { pcrs: tpm::pcrs(&text) }),
            _ => Ok(Self::Clear),
        }
    }

    /// The holder for a file that is kept so.
    pub fn holder(
        &self,
        path: &Path,
        passphrase_file: Option<&Path>,
        tcti: Option<&str>,
    ) -> Box<dyn KeyHolder> {
        let path = path.to_owned();
        match self {
            Self::Clear => Box::new(SealedFile { path, passphrase_file: None }),
            Self::Passphrase => {
                Box::new(SealedFile { path, passphrase_file: passphrase_file.map(Path::to_owned) })
            }
            Self::Tpm2 { .. } => Box::new(Tpm2 { path, tcti: tcti.map(str::to_owned) }),
        }
    }

    /// Writes `ring` to a file that keeps it so, whole or not at all.
    ///
    /// # Errors
    /// There is no passphrase where one is needed, the TPM refuses, or the file cannot be written.
    pub fn write(
        &self,
        path: &Path,
        ring: &KeyRing,
        passphrase_file: Option<&Path>,
        tcti: Option<&str>,
    ) -> Result<(), KeyError> {
        match self {
            Self::Clear => SealedFile::write(path, ring, None),
            Self::Passphrase => {
                let file =
                    passphrase_file.ok_or_else(|| KeyError::NoPassphrase(path.display().to_string()))?;
                SealedFile::write(path, ring, Some(&Passphrase::from_file(file)?))
            }
            Self::Tpm2 { pcrs } => {
                let holder = Tpm2 { path: path.to_owned(), tcti: tcti.map(str::to_owned) };
                holder.write(ring, pcrs.as_deref())
            }
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clear => f.write_str("in the clear"),
            Self::Passphrase => f.write_str("sealed with a passphrase"),
            Self::Tpm2 { pcrs: None } => f.write_str("sealed by the TPM"),
            Self::Tpm2 { pcrs: Some(pcrs) } => write!(f, "sealed by the TPM to PCRs {pcrs}"),
        }
    }
}

/// Writes the public half's file, with mode 0600, whole or not at all.
///
/// # Errors
/// It cannot be written.
pub fn write_public(path: &Path, key: &PublicKey) -> Result<(), KeyError> {
    write_secret(path, &key.to_text())
}

/// Reads the public half's file.
///
/// # Errors
/// It cannot be read, others can read it, or it is not one.
pub fn read_public(path: &Path) -> Result<PublicKey, KeyError> {
    let text = read_secret(path, true)?;
    PublicKey::from_text(&text).map_err(|reason| KeyError::Text { what: path.display().to_string(), reason })
}

/// A passphrase: prints nothing, wiped when dropped.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes over the bytes as they are.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The first line of a file with mode 0600.
    ///
    /// # Errors
    /// It cannot be read, or others can read it, or it is empty.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let text = read_secret(path, true)?;
        match text.lines().next().unwrap_or_default() {
            "" => Err(KeyError::NoPassphrase(path.display().to_string())),
            line => Ok(Self::new(line.as_bytes().to_vec())),
        }
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// A file: sealed with a passphrase (argon2id and AES-256-GCM), or in the clear with mode 0600.
#[derive(Debug)]
pub struct SealedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Where the passphrase is, if there is one: another medium, or it adds nothing.
    pub passphrase_file: Option<PathBuf>,
}

impl SealedFile {
    /// Writes `ring`, with mode 0600, whole or not at all. Sealed if there is a passphrase.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(path: &Path, ring: &KeyRing, passphrase: Option<&Passphrase>) -> Result<(), KeyError> {
        let text = ring.to_text();
        match passphrase {
            Some(passphrase) => write_secret(path, &seal(&text, passphrase, path)?),
            None => write_secret(path, &text),
        }
    }

    /// Whether the file is in the clear.
    ///
    /// # Errors
    /// It cannot be read, or others can read it and it is in the clear.
    pub fn is_clear(path: &Path) -> Result<bool, KeyError> {
        Ok(!read_key_file(path)?.starts_with(SEALED_WORD))
    }

    /// Reads the keys with this passphrase, if any is needed.
    ///
    /// # Errors
    /// As [`KeyHolder::unseal`].
    pub fn read(path: &Path, passphrase: Option<&Passphrase>) -> Result<KeyRing, KeyError> {
        let shown = || path.display().to_string();
        let text = read_key_file(path)?;
        let text = match (text.starts_with(SEALED_WORD), passphrase) {
            (false, _) => text,
            (true, None) => return Err(KeyError::NoPassphrase(shown())),
            (true, Some(passphrase)) => unseal(&text, passphrase, path)?,
        };
        KeyRing::from_text(&text).map_err(|reason| KeyError::Text { what: shown(), reason })
    }
}

impl KeyHolder for SealedFile {
    fn unseal(&self) -> Result<KeyRing, KeyError> {
        let passphrase = self.passphrase_file.as_deref().map(Passphrase::from_file).transpose()?;
        Self::read(&self.path, passphrase.as_ref())
    }

    fn describe(&self) -> String {
        format!("file {}", self.path.display())
    }
}

/// A credential that systemd decrypted for this service (LoadCredentialEncrypted=): the key's text form.
#[derive(Debug)]
pub struct SystemdCredential {
    name: String,
    /// What `$CREDENTIALS_DIRECTORY` said.
    directory: Option<OsString>,
}

impl SystemdCredential {
    /// The credential of this name, of the service that this process is.
    pub fn new(name: impl Into<String>) -> Self {
        Self::in_directory(name, std::env::var_os("CREDENTIALS_DIRECTORY"))
    }

    /// The credential of this name in `directory`.
    pub fn in_directory(name: impl Into<String>, directory: Option<OsString>) -> Self {
        Self { name: name.into(), directory }
    }
}

impl KeyHolder for SystemdCredential {
    fn unseal(&self) -> Result<KeyRing, KeyError> {
        let plain =
            !self.name.is_empty() && !self.name.contains('/') && self.name != ".." && self.name != ".";
        let directory = self.directory.as_ref().filter(|_| plain).ok_or_else(|| {
            KeyError::Holder(format!(
                "there is no credential {}: systemd passes none to this process",
                self.name
            ))
        })?;
        // systemd's own modes: the directory keeps others out, and the file may be 0440.
        let text = read_secret(&Path::new(directory).join(&self.name), false)?;
        KeyRing::from_text(&text).map_err(|reason| KeyError::Text { what: self.describe(), reason })
    }

    fn describe(&self) -> String {
        format!("systemd credential {}", self.name)
    }
}

#[derive(Clone, Copy)]
struct Cost {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

impl Cost {
    fn derive(self, passphrase: &Passphrase, salt: &[u8]) -> Option<LessSafeKey> {
        let params = Params::new(self.memory_kib, self.passes, self.lanes, Some(32)).ok()?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(&passphrase.0, salt, key.as_mut())
            .ok()?;
        Some(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref()).ok()?))
    }

    fn is_bearable(self) -> bool {
        self.memory_kib <= MOST.memory_kib && self.passes <= MOST.passes && self.lanes <= MOST.lanes
    }
}

/// `postern-nvram-sealed-1 argon2id memory passes lanes salt nonce|ciphertext|tag`
fn seal(text: &str, passphrase: &Passphrase, path: &Path) -> Result<Zeroizing<String>, KeyError> {
    let failed = || KeyError::Holder(format!("{}: sealing it failed", path.display()));
    let mut salt = [0; SALT_LEN];
    random(&mut salt);
    let mut nonce = [0; NONCE_LEN];
    random(&mut nonce);
    let Cost { memory_kib, passes, lanes } = COST;
    let readable =
        format!("{SEALED_WORD} argon2id {memory_kib} {passes} {lanes} {}", Base64::encode_string(&salt));
    let key = COST.derive(passphrase, &salt).ok_or_else(failed)?;
    let mut sealed = Zeroizing::new(text.as_bytes().to_vec());
    let tag = key
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(readable.as_bytes()),
            &mut sealed,
        )
        .map_err(|_| failed())?;
    let bytes: Vec<u8> = nonce.iter().chain(sealed.iter()).chain(tag.as_ref()).copied().collect();
    Ok(Zeroizing::new(format!("{readable} {}\n", Base64::encode_string(&bytes))))
}

fn unseal(text: &str, passphrase: &Passphrase, path: &Path) -> Result<Zeroizing<String>, KeyError> {
    let shown = || path.display().to_string();
    let malformed = || KeyError::Text { what: shown(), reason: KeyText::Malformed };
    let (readable, sealed) = text.trim_end().rsplit_once(' ').ok_or_else(malformed)?;
    let mut words = readable.split(' ').skip(1);
    let mut word = || words.next().ok_or_else(malformed);
    if word()? != "argon2id" {
        return Err(malformed());
    }
    let mut number = || word()?.parse::<u32>().map_err(|_| malformed());
    let cost = Cost { memory_kib: number()?, passes: number()?, lanes: number()? };
    let salt = Base64::decode_vec(word()?).map_err(|_| malformed())?;
    if !cost.is_bearable() || salt.len() != SALT_LEN {
        return Err(malformed());
    }
    let bytes = Base64::decode_vec(sealed).map_err(|_| malformed())?;
    let (nonce, sealed) = bytes.split_first_chunk::<NONCE_LEN>().ok_or_else(malformed)?;
    let key = cost.derive(passphrase, &salt).ok_or_else(malformed)?;
    let mut plain = Zeroizing::new(sealed.to_vec());
    let opened = key
        .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(readable.as_bytes()), &mut plain)
        .map_err(|_| KeyError::Passphrase(shown()))?;
    Ok(Zeroizing::new(core::str::from_utf8(opened).map_err(|_| malformed())?.to_owned()))
}

/// A key file: sealed ones may be readable, those in the clear not.
fn read_key_file(path: &Path) -> Result<Zeroizing<String>, KeyError> {
    let text = read_secret(path, false)?;
    if text.starts_with(SEALED_WORD) || text.starts_with(tpm::WORD) {
        return Ok(text);
    }
    drop(text);
    read_secret(path, true)
}

/// A text file. `strict`: only the owner, who is us or root, may have access to it.
pub(crate) fn read_secret(path: &Path, strict: bool) -> Result<Zeroizing<String>, KeyError> {
    let shown = || path.display().to_string();
    let failed = |source| KeyError::Io { what: shown(), source };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if strict {
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode { path: shown(), mode });
        }
        let owner = metadata.uid();
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(KeyError::Owner { path: shown(), owner });
        }
    }
    // Reserved at once: a growing vector would leave copies behind.
    let length = usize::try_from(metadata.len().min(MAX_TEXT)).unwrap_or_default();
    let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
    file.take(MAX_TEXT).read_to_end(&mut bytes).map_err(failed)?;
    match core::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(KeyError::Text { what: shown(), reason: KeyText::Malformed }),
    }
}

/// Writes a text file with mode 0600, whole or not at all, and durably.
pub(crate) fn write_secret(path: &Path, text: &str) -> Result<(), KeyError> {
    let failed = |source| KeyError::Io { what: path.display().to_string(), source };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Made with mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}
