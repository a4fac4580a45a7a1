//! Reading files that hold keys, and hexadecimal keys.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base64ct::{Base64, Encoding};
use postern_contract::secret::Secret;
use zeroize::Zeroizing;

use super::WipedText;

/// Longest configuration file in bytes.
pub(super) const CONFIG_LIMIT: u64 = 256 << 20;

/// Longest file with secrets in bytes: keys, or the passwords of many users.
const SECRET_LIMIT: u64 = 4 << 20;

/// Longest file without secrets in bytes: certificates, or the CRL of a large CA.
const PUBLIC_LIMIT: u64 = 64 << 20;

/// Where the contents of files that a configuration names come from, and the time at which it is judged.
pub trait KeyFiles {
    /// The contents of a file that holds a secret, or what is wrong with it.
    fn secret(&self, path: &Path) -> Result<Zeroizing<Vec<u8>>, String>;

    /// The contents of a file that anyone may read, or what is wrong with it.
    fn public(&self, path: &Path) -> Result<Vec<u8>, String>;

    /// When certificates are looked at.
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// Reads no file: for checking a text alone.
#[derive(Clone, Copy, Debug)]
pub struct NoKeyFiles;

impl KeyFiles for NoKeyFiles {
    fn secret(&self, _: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
        Err("key files are not read here".to_owned())
    }

    fn public(&self, _: &Path) -> Result<Vec<u8>, String> {
        Err("files are not read here".to_owned())
    }
}

/// Reads files; secret ones only of mode 0600 or stricter. Relative paths begin at this directory.
#[derive(Clone, Debug)]
pub(super) struct Beside(pub(super) PathBuf);

impl KeyFiles for Beside {
    fn secret(&self, path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
        let path = self.0.join(path);
        let shown = path.display();
        if is_open_to_others(&path) == Some(true) {
            return Err(format!(
                "{shown} can be used by others than its owner; `chmod 600` makes it private"
            ));
        }
        read(&path, SECRET_LIMIT).map_err(|error| format!("{shown} cannot be read: {error}"))
    }

    fn public(&self, path: &Path) -> Result<Vec<u8>, String> {
        let path = self.0.join(path);
        read(&path, PUBLIC_LIMIT)
            .map(|mut bytes| core::mem::take(&mut *bytes))
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))
    }
}

/// The text of a file.
pub(super) fn text(mut bytes: Zeroizing<Vec<u8>>) -> Result<WipedText, String> {
    match String::from_utf8(core::mem::take(&mut *bytes)) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(error) => {
            drop(Zeroizing::new(error.into_bytes()));
            Err("not UTF-8 text".to_owned())
        }
    }
}

/// Whether group or others have any right to the file.
pub(super) fn is_open_to_others(path: &Path) -> Option<bool> {
    std::fs::metadata(path).ok().map(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

/// Reads a whole text file into memory that does not move and is wiped.
pub(super) fn read_text(path: &Path, limit: u64) -> io::Result<WipedText> {
    text(read(path, limit)?).map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))
}

fn read(path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let too_long = || io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {limit} bytes"));
    if length > limit {
        return Err(too_long());
    }
    let capacity = usize::try_from(length).unwrap_or(0).saturating_add(1);
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if u64::try_from(read).is_ok_and(|read| read <= limit) { Ok(bytes) } else { Err(too_long()) }
}

/// Reads a key of hexadecimal digits, with or without `0x` before them.
pub(super) fn from_hex(text: &str) -> Result<Secret, &'static str> {
    let digits = text.strip_prefix("0x").unwrap_or(text).as_bytes();
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("an odd number of hexadecimal digits");
    }
    let mut key = Zeroizing::new(Vec::with_capacity(pairs.len()));
    for [high, low] in pairs {
        let byte = nibble(*high).zip(nibble(*low)).map(|(high, low)| high << 4 | low);
        key.push(byte.ok_or("a character that is no hexadecimal digit")?);
    }
    // Exactly sized, so that turning it into a box does not move it.
    Ok(Secret::new(core::mem::take(&mut *key)))
}

/// Reads base64, in constant time as far as the contents go.
pub(super) fn from_base64(digits: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; digits.len()]);
    let length = Base64::decode(digits, &mut bytes).ok()?.len();
    bytes.truncate(length);
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal() {
        assert_eq!(from_hex("00ffA1").unwrap().expose(), [0x00, 0xff, 0xa1]);
        assert_eq!(from_hex("0x10").unwrap().expose(), [0x10]);
        assert!(from_hex("").unwrap().is_empty());
        assert!(from_hex("0").is_err() && from_hex("0g").is_err() && from_hex("öö").is_err());
    }
}
