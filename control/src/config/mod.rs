//! The configuration file (OPS-2): one TOML file, read completely and checked before anything is done with it.
//!
//! [`load`] reads a file with the key files it names, [`parse`] a text. Both give a [`Config`] in the contract's terms or
//! all findings at once, each with file, line, column, key and what is allowed. Nothing here prints a key, and the text
//! of the file is wiped after reading. `hwtests/` and the README show the layout; [`sections`] reads it.

mod diagnostic;
pub mod ike;
mod keys;
mod reader;
mod sections;
mod suite;

use core::fmt;
use core::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use postern_contract::Translation;
use postern_contract::relay::Partition;
use postern_contract::sa::{Action, FanOut, Lifetime, Mode, PathPolicy, Selector, Suite, UdpEncap};
use postern_contract::settings::DatapathSettings;
use postern_wire::ids::Spi;
use zeroize::Zeroizing;

pub use diagnostic::{Diagnostic, Severity};
pub use keys::{KeyFiles, NoKeyFiles};
pub use suite::{Cipher, EspSuite, Mac};

/// Default priority of a tunnel's policy.
pub const DEFAULT_PRIORITY: u32 = 1000;

/// A file that was read without an error.
#[derive(Debug)]
pub struct Config {
    /// The `[datapath]` section.
    pub datapath: DatapathSettings,
    /// The `[control]` section.
    pub control: ControlSettings,
    /// Each `[[tunnel]]`.
    pub tunnels: Vec<Tunnel>,
    /// Each `[[policy]]`.
    pub policies: Vec<PlainPolicy>,
    /// Each `[[relay]]`.
    pub relays: Vec<Relay>,
    /// `[ike]`, each `[[pool]]` and each `[[connection]]`.
    pub ike: ike::Ike,
    /// `[recovery]`.
    pub recovery: crate::recovery::Settings,
    /// The file itself holds keys, not only the names of key files.
    pub holds_keys: bool,
    /// What may not be as it was meant.
    pub warnings: Vec<Diagnostic>,
}

/// The `[control]` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSettings {
    /// The management socket.
    pub socket: PathBuf,
    /// Directory of control's own state.
    pub state: PathBuf,
    /// What is logged, in the syntax of `tracing`'s filters.
    pub log: String,
    /// The datapath's program, where it is not beside the own one or in PATH.
    pub datapath_program: Option<PathBuf>,
    /// Where Prometheus finds the metrics, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Whether they have series of each tunnel.
    pub metrics_of_tunnels: bool,
}

/// One `[[tunnel]]`: SAs of both directions with static keys, and a policy.
#[derive(Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// Tunnel or transport.
    pub mode: Mode,
    /// The ESP algorithms, if there is ESP.
    pub esp: Option<EspSuite>,
    /// The AH algorithm, if there is AH. With ESP: an SA bundle, AH outside.
    pub ah: Option<Mac>,
    /// This node's outer address.
    pub local: Translation<IpAddr>,
    /// The peer's outer address.
    pub remote: Translation<IpAddr>,
    /// SAs that this node sends with.
    pub outbound: Half,
    /// SAs that this node receives with.
    pub inbound: Half,
    /// What the tunnel carries.
    pub selectors: Vec<Selector>,
    /// UDP encapsulation.
    pub encap: Option<UdpEncap>,
    /// Extended sequence numbers.
    pub esn: bool,
    /// Anti-replay window in packets.
    pub replay_window: u16,
    /// MOB-2.
    pub follow_peer: bool,
    /// Sizes and header fields.
    pub path: PathPolicy,
    /// Limits.
    pub lifetime: Lifetime,
    /// Priority of the policy.
    pub priority: u32,
    /// Worker that owns the SAs.
    pub worker: Option<u16>,
    /// Whether other workers may help it (DP-8).
    pub fan_out: FanOut,
}

/// The SAs of one direction; at least one of the two is there.
#[derive(Debug, PartialEq, Eq)]
pub struct Half {
    /// The ESP SA.
    pub esp: Option<Keyed>,
    /// The AH SA.
    pub ah: Option<Keyed>,
}

/// One SA's own part.
#[derive(Debug, PartialEq, Eq)]
pub struct Keyed {
    /// The SPI.
    pub spi: Translation<Spi>,
    /// Algorithms and keys.
    pub suite: Suite,
    /// Where its sequence numbers begin.
    pub sequence: u64,
}

/// One `[[policy]]`: traffic that no tunnel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainPolicy {
    /// Its name.
    pub name: String,
    /// Lower comes first.
    pub priority: u32,
    /// [`Action::Bypass`] or [`Action::Discard`].
    pub action: Action,
    /// What it matches.
    pub selectors: Vec<Selector>,
}

/// One `[[relay]]` entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relay {
    /// Its name.
    pub name: String,
    /// Towards the client.
    pub client: Partition,
    /// Towards the gateway.
    pub gateway: Partition,
}

/// Everything that was found in a file that cannot be used: at least one error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(pub Vec<Diagnostic>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{finding}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Reads and checks the file at `path`. Relative key files are looked for beside it.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let file = path.display().to_string();
    let text = keys::read_text(path, keys::CONFIG_LIMIT).map_err(|error| {
        ConfigError(vec![Diagnostic {
            severity: Severity::Error,
            file: file.clone(),
            line: 0,
            column: 0,
            key: String::new(),
            message: format!("cannot be read: {error}"),
        }])
    })?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let mut config = parse(&file, &text, &keys::Beside(directory.to_owned()))?;
    let open_to_others = keys::is_open_to_others(path) == Some(true);
    if open_to_others && config.holds_keys {
        config.warnings.push(Diagnostic {
            severity: Severity::Warning,
            file,
            line: 0,
            column: 0,
            key: String::new(),
            message: "holds keys and others than its owner can read it; `chmod 600` makes it private"
                .to_owned(),
        });
    }
    Ok(config)
}

/// Reads and checks `text`, which is called `file` in findings; `keys` reads the key files that it names.
pub fn parse(file: &str, text: &str, keys: &dyn KeyFiles) -> Result<Config, ConfigError> {
    sections::read(file, text, keys)
}

/// What the fuzz target, the property tests and the corpus replay all call: reading any bytes never panics, every
/// finding points into the text, and what was read passes the contract's own checks.
///
/// # Panics
/// When that does not hold.
pub fn fuzz(bytes: &[u8]) {
    let Ok(text) = core::str::from_utf8(bytes) else { return };
    let lines = text.split('\n').count();
    match parse("fuzz", text, &NoKeyFiles) {
        Ok(config) => {
            assert!(config.datapath.validate().is_ok());
            for ike::Connection { ike, children, .. } in &config.ike.connections {
                assert!(!ike.proposals.is_empty() && ike.children.len() == children.len());
                assert!(ike.children.iter().all(|child| !child.proposals.is_empty()));
                assert!(ike.rekey.is_none_or(|rekey| ike.rekey_jitter <= rekey));
            }
            let desired = crate::desired::Desired::new(config);
            for sa in desired.sas.values() {
                assert!(sa.config.suite.validate(sa.config.protocol).is_ok());
            }
            for relay in desired.relays.values() {
                assert!(relay.entry.validate().is_ok());
            }
        }
        Err(ConfigError(findings)) => {
            assert!(findings.iter().any(|finding| finding.severity == Severity::Error));
            assert!(findings.iter().all(|finding| (1..=lines).contains(&finding.line) && finding.column > 0));
        }
    }
}

/// A text that held keys, wiped on drop.
pub(crate) type WipedText = Zeroizing<String>;

#[cfg(test)]
mod tests;
