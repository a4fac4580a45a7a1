//! Reading files that hold keys, and hexadecimal keys.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use postern_contract::secret::Secret;
use zeroize::Zeroizing;

use super::WipedText;

/// Longest configuration file in bytes.
pub(super) const CONFIG_LIMIT: u64 = 256 << 20;

/// Longest key file in bytes: the longest key takes 128 digits.
const KEY_LIMIT: u64 = 4096;

/// Where the contents of `key_file = "…"` come from.
pub trait KeyFiles {
    /// The text of the file, or what is wrong with it.
    fn read(&self, path: &Path) -> Result<Zeroizing<String>, String>;
}

/// Reads no file: for checking a text alone.
#[derive(Clone, Copy, Debug)]
pub struct NoKeyFiles;

impl KeyFiles for NoKeyFiles {
    fn read(&self, _: &Path) -> Result<Zeroizing<String>, String> {
        Err("key files are not read here".to_owned())
    }
}

/// Reads key files of mode 0600 or stricter; relative paths begin at this directory.
#[derive(Clone, Debug)]
pub(super) struct Beside(pub(super) PathBuf);

impl KeyFiles for Beside {
    fn read(&self, path: &Path) -> Result<Zeroizing<String>, String> {
        let path = self.0.join(path);
        let shown = path.display();
        if is_open_to_others(&path) == Some(true) {
            return Err(format!(
                "{shown} can be used by others than its owner; `chmod 600` makes it private"
            ));
        }
        read_text(&path, KEY_LIMIT).map_err(|error| format!("{shown} cannot be read: {error}"))
    }
}

/// Whether group or others have any right to the file.
pub(super) fn is_open_to_others(path: &Path) -> Option<bool> {
    std::fs::metadata(path).ok().map(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

/// Reads a whole text file into memory that does not move and is wiped.
pub(super) fn read_text(path: &Path, limit: u64) -> io::Result<WipedText> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    if length > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {limit} bytes")));
    }
    let capacity = usize::try_from(length).unwrap_or(0).saturating_add(1);
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    match String::from_utf8(core::mem::take(&mut *bytes)) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(error) => {
            drop(Zeroizing::new(error.into_bytes()));
            Err(io::Error::new(io::ErrorKind::InvalidData, "not UTF-8 text"))
        }
    }
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
