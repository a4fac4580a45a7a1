//! The TPM 2 of the machine, through Debian's tpm2-tools: a holder of the private half, and a counter in its NV memory.
//!
//! A TPM seals at most 128 bytes, so what it seals is a random key, and the file holds the private keys encrypted with
//! it. Stolen with the storage, the file is worth nothing without this TPM; with PCRs named, nothing without what was
//! booted either. Keys go through pipes, never through files or arguments; the files of the tools hold what only the TPM
//! can use, in a directory of mode 0700 that is removed.
//!
//! The owner hierarchy is used without a password, as it is on a machine whose TPM nobody has taken.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64ct::{Base64, Encoding};
use tempfile::TempDir;
use zeroize::Zeroizing;

use crate::counter::{CounterError, MonotonicCounter};
use crate::holder::{KeyError, KeyHolder, read_secret, write_secret};
use crate::keys::{KeyRing, KeyText, random};

/// Where the counter is unless said otherwise: in the range that owners use freely.
pub const COUNTER_INDEX: u32 = 0x0150_0f57;

/// What its file begins with.
pub(crate) const WORD: &str = "postern-nvram-tpm2-1";
/// No PCRs.
const NONE: &str = "-";
const NONCE_LEN: usize = 12;

/// A private half that only this machine's TPM gives out.
#[derive(Clone, Debug)]
pub struct Tpm2 {
    /// The file that [`Tpm2::write`] made.
    pub path: PathBuf,
    /// How the TPM is reached, as tpm2-tools word it (`device:/dev/tpmrm0`); `None`: as they find it.
    pub tcti: Option<String>,
}

/// A counter in the TPM's NV memory.
#[derive(Clone, Debug)]
pub struct Tpm2Counter {
    /// Its NV index.
    pub index: u32,
    /// As in [`Tpm2`].
    pub tcti: Option<String>,
}

impl Tpm2 {
    /// Seals `ring` into a file with mode 0600. `pcrs` (such as `sha256:7`): only while these are as they are now.
    ///
    /// # Errors
    /// The TPM or its tools refuse, or the file cannot be written.
    pub fn write(&self, ring: &KeyRing, pcrs: Option<&str>) -> Result<(), KeyError> {
        let tools = Tools::new(self.tcti.as_deref()).map_err(KeyError::Holder)?;
        let (public, private, policy) = (tools.file("public"), tools.file("private"), tools.file("policy"));
        let mut key = Zeroizing::new([0; 32]);
        random(key.as_mut());
        let primary = tools.primary().map_err(KeyError::Holder)?;
        let mut create = arguments(["-C".as_ref(), primary.as_ref(), "-i".as_ref(), "-".as_ref()]);
        create.extend(arguments(["-u".as_ref(), public.as_ref(), "-r".as_ref(), private.as_ref()]));
        if let Some(pcrs) = pcrs {
            let make =
                ["--policy-pcr".as_ref(), "-l".as_ref(), pcrs.as_ref(), "-L".as_ref(), policy.as_ref()];
            tools.run("tpm2_createpolicy", &arguments(make), &[]).map_err(KeyError::Holder)?;
            create.extend(arguments(["-L".as_ref(), policy.as_ref()]));
        }
        tools.run("tpm2_create", &create, key.as_ref()).map_err(KeyError::Holder)?;
        let blob = |path: &Path| {
            fs::read(path)
                .map(|bytes| Base64::encode_string(&bytes))
                .map_err(|source| KeyError::Io { what: path.display().to_string(), source })
        };
        let readable = format!("{WORD} {} {} {}", pcrs.unwrap_or(NONE), blob(&public)?, blob(&private)?);
        let mut nonce = [0; NONCE_LEN];
        random(&mut nonce);
        let text = ring.to_text();
        let mut sealed = Zeroizing::new(text.as_bytes().to_vec());
        let tag = cipher(&key)
            .and_then(|cipher| {
                let nonce = Nonce::assume_unique_for_key(nonce);
                cipher.seal_in_place_separate_tag(nonce, Aad::from(readable.as_bytes()), &mut sealed).ok()
            })
            .ok_or_else(|| KeyError::Holder("encrypting the keys failed".into()))?;
        let bytes: Vec<u8> = nonce.iter().chain(sealed.iter()).chain(tag.as_ref()).copied().collect();
        write_secret(&self.path, &format!("{readable} {}\n", Base64::encode_string(&bytes)))
    }
}

impl KeyHolder for Tpm2 {
    fn unseal(&self) -> Result<KeyRing, KeyError> {
        let malformed =
            || KeyError::Text { what: self.path.display().to_string(), reason: KeyText::Malformed };
        let text = read_secret(&self.path, false)?;
        let (readable, sealed) = text.trim_end().rsplit_once(' ').ok_or_else(malformed)?;
        let words: Vec<_> = readable.split(' ').collect();
        let [WORD, pcrs, public, private] = words[..] else { return Err(malformed()) };
        let decode = |text: &str| Base64::decode_vec(text).map_err(|_| malformed());
        let (public, private, sealed) = (decode(public)?, decode(private)?, decode(sealed)?);
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>().ok_or_else(malformed)?;

        let tools = Tools::new(self.tcti.as_deref()).map_err(KeyError::Holder)?;
        let at = |name: &str, bytes: &[u8]| {
            let path = tools.file(name);
            let written = fs::write(&path, bytes);
            written.map(|()| path).map_err(|source| KeyError::Io { what: name.to_owned(), source })
        };
        let (public, private) = (at("public", &public)?, at("private", &private)?);
        let object = tools.file("object");
        let primary = tools.primary().map_err(KeyError::Holder)?;
        let mut load = arguments(["-C".as_ref(), primary.as_ref(), "-c".as_ref(), object.as_ref()]);
        load.extend(arguments(["-u".as_ref(), public.as_ref(), "-r".as_ref(), private.as_ref()]));
        tools.run("tpm2_load", &load, &[]).map_err(KeyError::Holder)?;
        let mut unseal = arguments(["-c".as_ref(), object.as_ref()]);
        if pcrs != NONE {
            unseal.extend(arguments(["-p".as_ref(), format!("pcr:{pcrs}").as_ref()]));
        }
        let key = tools.run("tpm2_unseal", &unseal, &[]).map_err(KeyError::Holder)?;
        let key = key.first_chunk().map(|key: &[u8; 32]| Zeroizing::new(*key)).ok_or_else(malformed)?;
        let mut plain = Zeroizing::new(sealed.to_vec());
        let cipher = cipher(&key).ok_or_else(malformed)?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = cipher
            .open_in_place(nonce, Aad::from(readable.as_bytes()), &mut plain)
            .map_err(|_| malformed())?;
        let opened = core::str::from_utf8(opened).map_err(|_| malformed())?;
        KeyRing::from_text(opened)
            .map_err(|reason| KeyError::Text { what: self.path.display().to_string(), reason })
    }

    fn describe(&self) -> String {
        format!("TPM 2, with {}", self.path.display())
    }
}

impl Tpm2Counter {
    /// Makes the counter if it is not there. One that was removed and made again goes on above its last value (TPM 2.0
    /// part 1, 37.2.4): it cannot be rewound that way.
    ///
    /// # Errors
    /// The TPM or its tools refuse.
    pub fn define(&self) -> Result<(), CounterError> {
        if self.value().is_ok() {
            return Ok(());
        }
        let attributes = "nt=counter|ownerread|ownerwrite|authread|authwrite|no_da";
        self.run("tpm2_nvdefine", &["-C", "o", "-s", "8", "-a", attributes])?;
        // It has no value before it was advanced once.
        self.run("tpm2_nvincrement", &["-C", "o"]).map(drop)
    }

    fn value(&self) -> Result<u64, CounterError> {
        let bytes = self.run("tpm2_nvread", &["-C", "o", "-s", "8"])?;
        let value = <[u8; 8]>::try_from(bytes.as_slice());
        value.map(u64::from_be_bytes).map_err(|_| CounterError("the TPM's answer is not a counter".into()))
    }

    fn run(&self, tool: &str, before: &[&str]) -> Result<Zeroizing<Vec<u8>>, CounterError> {
        let tools = Tools::new(self.tcti.as_deref()).map_err(CounterError)?;
        let mut arguments: Vec<_> = before.iter().map(OsString::from).collect();
        arguments.push(format!("{:#x}", self.index).into());
        tools.run(tool, &arguments, &[]).map_err(CounterError)
    }
}

impl MonotonicCounter for Tpm2Counter {
    fn read(&mut self) -> Result<Option<u64>, CounterError> {
        self.value().map(Some)
    }

    fn advance(&mut self) -> Result<u64, CounterError> {
        self.run("tpm2_nvincrement", &["-C", "o"])?;
        self.value()
    }
}

/// tpm2-tools, with a directory for what they pass to each other.
struct Tools<'a> {
    directory: TempDir,
    tcti: Option<&'a str>,
}

impl<'a> Tools<'a> {
    fn new(tcti: Option<&'a str>) -> Result<Self, String> {
        // Made with mode 0700.
        let directory =
            TempDir::with_prefix("postern-tpm2-").map_err(|error| format!("a directory: {error}"))?;
        Ok(Self { directory, tcti })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The storage key under the owner hierarchy, which the TPM derives from its seed: the same each time.
    fn primary(&self) -> Result<PathBuf, String> {
        let context = self.file("primary");
        self.run(
            "tpm2_createprimary",
            &arguments(["-C".as_ref(), "o".as_ref(), "-c".as_ref(), context.as_ref()]),
            &[],
        )?;
        Ok(context)
    }

    /// Runs one tool; what it wrote to standard output.
    fn run(&self, tool: &str, arguments: &[OsString], input: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
        let output = self.call(tool, arguments, input).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("{tool} is not installed (Debian package tpm2-tools)"),
            _ => format!("{tool}: {error}"),
        })?;
        // Without a resource manager what a tool loaded stays loaded, and there is room for three objects.
        let _ = self.call("tpm2_flushcontext", &["-t".into()], &[]);
        output
    }

    fn call(
        &self,
        tool: &str,
        arguments: &[OsString],
        input: &[u8],
    ) -> io::Result<Result<Zeroizing<Vec<u8>>, String>> {
        let mut command = Command::new(tool);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(tcti) = self.tcti {
            command.env("TPM2TOOLS_TCTI", tcti);
        }
        let mut child = command.spawn()?;
        if let Some(mut pipe) = child.stdin.take()
            && !input.is_empty()
        {
            pipe.write_all(input)?;
        }
        let output = child.wait_with_output()?;
        let stdout = Zeroizing::new(output.stdout);
        if output.status.success() {
            return Ok(Ok(stdout));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let line = said.lines().find(|line| line.contains("ERROR")).unwrap_or("it said nothing").trim();
        Ok(Err(format!("{tool}: {line}")))
    }
}

fn arguments<const N: usize>(words: [&OsStr; N]) -> Vec<OsString> {
    words.map(OsString::from).into()
}

/// The PCRs that a file names.
pub(crate) fn pcrs(text: &str) -> Option<String> {
    text.split(' ').nth(1).filter(|pcrs| *pcrs != NONE).map(str::to_owned)
}

fn cipher(key: &[u8; 32]) -> Option<LessSafeKey> {
    Some(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).ok()?))
}
