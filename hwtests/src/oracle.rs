//! The independent implementation of ESP and AH: a Python process with scapy (`hwtests/oracle/oracle.py`).

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::config::Suite;
use crate::netns::Netns;

/// An SA as the oracle takes it.
#[derive(Clone, Debug, Serialize)]
pub struct OracleSa {
    /// `esp` or `ah`.
    pub protocol: &'static str,
    /// `tunnel` or `transport`.
    pub mode: &'static str,
    /// SPI that the integrity check covers.
    pub spi: u32,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// UDP encapsulation.
    pub natt: bool,
    /// Encryption, by the oracle's name.
    pub encryption: &'static str,
    /// Key with salt, hexadecimal.
    pub key: String,
    /// Integrity, by the oracle's name.
    pub integrity: &'static str,
    /// Key, hexadecimal.
    pub integrity_key: String,
    /// The AH SA that a bundle applies after this ESP SA.
    pub ah: Option<Box<OracleSa>>,
}

impl OracleSa {
    /// An SA of `suite` with these keys; neither ESN nor encapsulation nor bundle.
    pub fn new(suite: &Suite, mode: &'static str, spi: u32, key: &[u8], integrity_key: &[u8]) -> Self {
        Self {
            protocol: suite.protocol,
            mode,
            spi,
            esn: false,
            natt: false,
            encryption: suite.encryption,
            key: hex(key),
            integrity: suite.integrity,
            integrity_key: hex(integrity_key),
            ah: None,
        }
    }
}

/// The running oracle.
#[derive(Debug)]
pub struct Oracle {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Oracle {
    /// Starts it outside any namespace.
    pub fn start() -> Result<Self> {
        Self::spawn(Command::new(python()?))
    }

    /// Starts it inside `namespace`, so that it can [`Oracle::send`] there.
    pub fn start_in(namespace: &Netns) -> Result<Self> {
        Self::spawn(namespace.command(python()?))
    }

    fn spawn(mut command: Command) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("oracle/oracle.py");
        command.arg(&script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the oracle")?;
        let (requests, answers) = (child.stdin.take(), child.stdout.take());
        let (Some(requests), Some(answers)) = (requests, answers) else { bail!("the oracle has no pipes") };
        Ok(Self { child, requests, answers: BufReader::new(answers) })
    }

    /// Protects `inner`; `outer` is the outer IP header in tunnel mode, else empty.
    pub fn seal(
        &mut self,
        sa: &OracleSa,
        sequence: u64,
        inner: &[u8],
        outer: &[u8],
        ports: (u16, u16),
    ) -> Result<Vec<u8>> {
        let request = json!({"op": "seal", "sa": sa, "sequence": sequence, "inner": hex(inner), "outer": hex(outer),
            "ports": [ports.0, ports.1], "ah_iv": format!("{sequence:016x}")});
        bytes(&self.ask(&request)?, "packet")
    }

    /// Protects `inner` again with the outer header, ports and IV of `packet`: must give `packet`.
    pub fn rebuild(&mut self, sa: &OracleSa, sequence: u64, inner: &[u8], packet: &[u8]) -> Result<Vec<u8>> {
        let request = json!({"op": "rebuild", "sa": sa, "sequence": sequence, "inner": hex(inner), "packet": hex(packet)});
        bytes(&self.ask(&request)?, "packet")
    }

    /// Verifies and opens `packet`; the high half of `sequence` is used with ESN.
    pub fn open(&mut self, sa: &OracleSa, sequence: u64, packet: &[u8]) -> Result<Vec<u8>> {
        let request = json!({"op": "open", "sa": sa, "sequence": sequence, "packet": hex(packet)});
        bytes(&self.ask(&request)?, "inner")
    }

    /// Puts an Ethernet frame on an interface of the namespace it was started in.
    pub fn send(&mut self, interface: &str, frame: &[u8]) -> Result<()> {
        self.ask(&json!({"op": "send", "interface": interface, "frame": hex(frame)}))?;
        Ok(())
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.requests, "{request}").context("the oracle ended")?;
        let mut line = String::new();
        ensure!(self.answers.read_line(&mut line)? > 0, "the oracle ended");
        let answer: Value = serde_json::from_str(&line)?;
        if let Some(error) = answer.get("error").and_then(Value::as_str) {
            bail!("the oracle refuses: {error}");
        }
        Ok(answer)
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // It holds nothing that would need an orderly end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Python with scapy, as `hwtests/setup` made it.
fn python() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = cache.or_else(home).context("neither XDG_CACHE_HOME nor HOME is set")?;
    let python = cache.join("postern-hwtests/venv/bin/python");
    ensure!(python.exists(), "{} is missing: run hwtests/setup", python.display());
    Ok(python)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Bytes of hexadecimal text.
pub fn unhex(text: &str) -> Result<Vec<u8>> {
    let digit = |at: usize| text.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    (0..text.len())
        .step_by(2)
        .map(|at| digit(at).with_context(|| format!("not hexadecimal: {text}")))
        .collect()
}

fn bytes(answer: &Value, name: &str) -> Result<Vec<u8>> {
    unhex(answer.get(name).and_then(Value::as_str).context("the oracle's answer lacks a field")?)
}
