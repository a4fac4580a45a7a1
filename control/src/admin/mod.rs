//! The management protocol: one JSON [`Request`] a line, one JSON [`Response`] a line, on a Unix stream socket that only
//! root and the daemon's own user may use (OPS-4).
//!
//! Before the response to a request that takes time, [`Response::Event`]s tell what happens meanwhile. Numbers are plain, SPIs are `0x…` texts, absent values are left out. [`call`] is the client's side; the daemon's is
//! [`server`], and [`report`] makes the answers.

pub mod report;
pub mod server;
mod watch;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use postern_contract::request::{Latency, SteerStatus, WorkerStatus};
use serde::{Deserialize, Serialize};

use crate::config::Diagnostic;
use crate::ike::api::{Begun, ConnectionRow, Explanation, IkeEvent, Target};
use crate::recovery;

/// Longest line of a request in bytes.
pub const REQUEST_LIMIT: u64 = 64 << 10;

/// How long a call waits for its answer. The daemon itself waits up to 30 s for the datapath.
const PATIENCE: Duration = Duration::from_secs(90);

/// Longest line of an answer in bytes.
const ANSWER_LIMIT: u64 = 1 << 30;

/// What the daemon is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything at a glance; answered by [`Answer::Status`].
    Status,
    /// SAs, of one tunnel or all; answered by [`Answer::Sas`].
    Sa {
        /// The tunnel.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Policies; answered by [`Answer::Policies`].
    Policy,
    /// Translation entries; answered by [`Answer::Relays`].
    Relay,
    /// Dropped packets; answered by [`Answer::Drops`].
    Drops,
    /// The latency histogram; answered by [`Answer::Latency`].
    Latency,
    /// IKE connections and their SAs; answered by [`Answer::Connections`].
    Connections {
        /// Only this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Why a connection is up or not; answered by [`Answer::Explanation`].
    Explain {
        /// The connection.
        name: String,
    },
    /// Establish a connection or one of its children; answered by [`Answer::Outcome`].
    Up {
        /// The connection.
        connection: String,
        /// The child.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        child: Option<String>,
        /// Wait so long for the end; absent: not at all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_seconds: Option<u32>,
    },
    /// Delete a connection's SAs; answered by [`Answer::Outcome`].
    Down {
        /// What.
        target: Target,
        /// Wait so long for the end; absent: not at all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_seconds: Option<u32>,
    },
    /// Replace a connection's keys now; answered by [`Answer::Outcome`].
    Rekey {
        /// What.
        target: Target,
        /// Wait so long for the end; absent: not at all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_seconds: Option<u32>,
    },
    /// IKE's events; answered by [`Answer::Log`], with `follow` not before the daemon ends.
    Log {
        /// How many of the past.
        #[serde(default)]
        backlog: usize,
        /// Also those to come.
        #[serde(default)]
        follow: bool,
        /// Only those of this connection.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        connection: Option<String>,
    },
    /// What this start was, and how telling peers after a reset goes; answered by [`Answer::Recovery`].
    Recovery,
    /// Write the backup of IKE SAs anew; answered by [`Answer::Recovery`].
    Snapshot,
    /// Read the configuration file again; answered by [`Answer::Reload`].
    Reload {
        /// Only say what would change.
        #[serde(default)]
        dry_run: bool,
    },
    /// End the daemon; answered by [`Answer::Stopping`].
    Shutdown {
        /// End the datapath as well.
        #[serde(default)]
        datapath: bool,
    },
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// It was done.
    Ok(Answer),
    /// It was not.
    Error(Failure),
    /// It is still being done: this happened.
    Event(Box<IkeEvent>),
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<StatusReport>),
    /// To [`Request::Sa`].
    Sas(Vec<SaRow>),
    /// To [`Request::Policy`].
    Policies(Vec<PolicyRow>),
    /// To [`Request::Relay`].
    Relays(Vec<RelayRow>),
    /// To [`Request::Drops`].
    Drops(DropsReport),
    /// To [`Request::Latency`].
    Latency(Latency),
    /// To [`Request::Reload`].
    Reload(ReloadReport),
    /// To [`Request::Shutdown`].
    Stopping,
    /// To [`Request::Connections`].
    Connections(Vec<ConnectionRow>),
    /// To [`Request::Explain`].
    Explanation(Box<Explanation>),
    /// To [`Request::Up`], [`Request::Down`] and [`Request::Rekey`].
    Outcome(Outcome),
    /// To [`Request::Recovery`] and [`Request::Snapshot`].
    Recovery(Box<recovery::Report>),
    /// To [`Request::Log`]: there are no more.
    Log,
}

/// Answer to a command that takes time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether it is done; otherwise nobody waited for it.
    pub done: bool,
    /// What was to be done.
    #[serde(flatten)]
    pub begun: Begun,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of trouble it is.
    pub kind: FailureKind,
    /// In words.
    pub message: String,
    /// Findings in the configuration file, if that is the trouble.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Diagnostic>,
}

/// Kinds of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request could not be understood.
    Request,
    /// The configuration file cannot be used.
    Configuration,
    /// The datapath is down.
    DatapathDown,
    /// What was named is not there.
    NotFound,
    /// The peer and this side did not come to an agreement.
    Negotiation,
    /// It takes longer than was to be waited.
    Timeout,
    /// Something else.
    Internal,
}

/// State of a configured object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Installed as configured.
    Installed,
    /// Installed, and stopped by a limit.
    Stopped,
    /// Only some of its SAs are installed.
    Partial,
    /// Configured and not installed.
    Missing,
    /// Installed and not configured.
    Foreign,
    /// The datapath is down, so nobody knows.
    Down,
}

impl State {
    /// As shown.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Installed => "installed",
            Self::Stopped => "stopped",
            Self::Partial => "partial",
            Self::Missing => "missing",
            Self::Foreign => "foreign",
            Self::Down => "down",
        }
    }
}

/// Answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The daemon itself.
    pub control: ControlReport,
    /// The datapath.
    pub datapath: DatapathReport,
    /// Every configured tunnel and every child of a connection, installed or not.
    pub tunnels: Vec<TunnelRow>,
    /// IKE, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ike: Option<IkeReport>,
    /// Recovery from resets, if IKE runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<recovery::Report>,
    /// Events since the daemon's start, by kind.
    pub events: BTreeMap<String, u64>,
    /// What is wrong, in words.
    pub problems: Vec<String>,
}

/// The daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlReport {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// The configuration file.
    pub config: String,
}

/// The datapath.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatapathReport {
    /// Whether control is connected to it.
    pub up: bool,
    /// Seconds since it is up or down.
    pub since_seconds: u64,
    /// Why it is down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// How often this control process started it.
    pub starts: u64,
    /// Process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Version of the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Seconds since its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime_seconds: Option<u64>,
    /// Name of the AEAD backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crypto_backend: Option<String>,
    /// Number of installed SAs.
    pub sas: u64,
    /// Number of installed policies.
    pub policies: u64,
    /// Number of installed translation entries.
    pub relays: u64,
    /// Of these, how many the XDP programs execute; absent where only workers do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relays_in_xdp: Option<u64>,
    /// Workers and their ports.
    pub workers: Vec<WorkerStatus>,
    /// Verdicts of the XDP programs.
    pub steer: Vec<SteerStatus>,
}

/// IKE at a glance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeReport {
    /// Configured connections by state.
    pub connections: BTreeMap<String, u64>,
    /// IKE SAs.
    pub ike_sas: u64,
    /// CHILD_SAs.
    pub child_sas: u64,
    /// Counters of messages, handshakes and failures that are not 0.
    pub counters: BTreeMap<String, u64>,
}

/// One tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelRow {
    /// Its name.
    pub name: String,
    /// The worst of its SAs and its policy.
    pub state: State,
    /// `tunnel` or `transport`.
    pub mode: String,
    /// Algorithms.
    pub suite: String,
    /// This node's outer address.
    pub local: String,
    /// The peer's outer address, as it is now.
    pub remote: String,
    /// Packets received.
    pub in_packets: u64,
    /// Bytes received.
    pub in_bytes: u64,
    /// Packets sent.
    pub out_packets: u64,
    /// Bytes sent.
    pub out_bytes: u64,
    /// Packets dropped.
    pub drops: u64,
    /// Seconds since a packet passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_seconds: Option<u64>,
}

/// One SA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaRow {
    /// The tunnel, `-` where it is not configured.
    pub tunnel: String,
    /// Control's name for it.
    pub id: String,
    /// State.
    pub state: State,
    /// Why it is not installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// `in` or `out`.
    pub direction: String,
    /// `esp` or `ah`.
    pub protocol: String,
    /// `tunnel` or `transport`.
    pub mode: String,
    /// Algorithms.
    pub suite: String,
    /// The SPI on the wire.
    pub spi: String,
    /// The SPI that the far end sees, where a relay translates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_spi: Option<String>,
    /// This node's outer address.
    pub local: String,
    /// The peer's outer address.
    pub remote: String,
    /// UDP ports of the encapsulation, `local:remote`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encap: Option<String>,
    /// Extended sequence numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub esn: Option<bool>,
    /// Anti-replay window in packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_window: Option<u16>,
    /// Worker that owns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<u16>,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Last sequence number sent, or highest accepted.
    pub sequence: u64,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Seconds since a packet passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_seconds: Option<u64>,
    /// Digest of the keys as the datapath has them: equal at both ends of a tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_check: Option<String>,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// Its name or its tunnel's.
    pub name: String,
    /// State.
    pub state: State,
    /// Lower comes first.
    pub priority: u32,
    /// `protect`, `bypass` or `discard`.
    pub action: String,
    /// What it matches.
    pub selectors: Vec<String>,
}

/// One translation entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRow {
    /// Its name.
    pub name: String,
    /// State.
    pub state: State,
    /// Towards the client.
    pub client: Side,
    /// Towards the gateway.
    pub gateway: Side,
    /// Packets from the client to the gateway.
    pub to_gateway_packets: u64,
    /// Bytes from the client to the gateway.
    pub to_gateway_bytes: u64,
    /// Packets from the gateway to the client.
    pub to_client_packets: u64,
    /// Bytes from the gateway to the client.
    pub to_client_bytes: u64,
    /// Packets refused because they came from another address or port.
    pub wrong_peer: u64,
}

/// One partition of a translation entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The relay's address.
    pub relay: String,
    /// The client's or gateway's address.
    pub peer: String,
    /// Each protocol with its SPIs: `esp 0x… > 0x…`, to the relay and from it.
    pub spis: Vec<String>,
    /// UDP ports of the encapsulation, `local:remote`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encap: Option<String>,
}

/// Answer to [`Request::Drops`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropsReport {
    /// Over all ports, most packets first.
    pub reasons: Vec<DropRow>,
    /// By port.
    pub ports: Vec<PortDrops>,
    /// By SA.
    pub sas: Vec<SaDrops>,
    /// Verdicts of the XDP programs.
    pub steer: Vec<SteerStatus>,
}

/// One reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropRow {
    /// Its name.
    pub reason: String,
    /// What it means.
    pub help: String,
    /// How many packets.
    pub packets: u64,
}

/// One port's drops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortDrops {
    /// Worker.
    pub worker: usize,
    /// Interface.
    pub interface: String,
    /// Queue.
    pub queue: u32,
    /// Packets by reason.
    pub drops: BTreeMap<String, u64>,
}

/// One SA's drops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaDrops {
    /// The tunnel.
    pub tunnel: String,
    /// `in` or `out`.
    pub direction: String,
    /// `esp` or `ah`.
    pub protocol: String,
    /// The SPI on the wire.
    pub spi: String,
    /// Packets by reason.
    pub drops: BTreeMap<String, u64>,
}

/// Answer to [`Request::Reload`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// The datapath is down: the changes wait until it is back.
    pub waiting: bool,
    /// A line for each change.
    pub changes: Vec<String>,
    /// A line for each change that the datapath refused.
    pub refused: Vec<String>,
    /// What changed in the file and takes effect only when a program is started again.
    pub notes: Vec<String>,
    /// Warnings about the file.
    pub warnings: Vec<Diagnostic>,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The daemon cannot be reached.
    #[error("cannot reach postern-control at {path}: {error}")]
    Unreachable {
        /// The socket.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// It answered something that is no answer.
    #[error("postern-control gave an unreadable answer: {0}")]
    Garbled(String),
    /// It refused.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Asks the daemon that listens at `path`.
pub fn call(path: &Path, request: &Request) -> Result<Answer, CallError> {
    converse(path, request, |_| {})
}

/// As [`call`], and `told` gets what happens until the answer comes.
pub fn converse(
    path: &Path,
    request: &Request,
    mut told: impl FnMut(&IkeEvent),
) -> Result<Answer, CallError> {
    let unreachable = |error| CallError::Unreachable { path: path.display().to_string(), error };
    let mut stream = UnixStream::connect(path).map_err(unreachable)?;
    stream.set_read_timeout(patience(request)).map_err(unreachable)?;
    let mut line = serde_json::to_vec(request).map_err(|error| CallError::Garbled(error.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(unreachable)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut answer = String::new();
        // Bounded, so that whoever listens there cannot fill this process' memory.
        reader.by_ref().take(ANSWER_LIMIT).read_line(&mut answer).map_err(unreachable)?;
        match serde_json::from_str(&answer) {
            Ok(Response::Ok(answer)) => return Ok(answer),
            Ok(Response::Error(failure)) => return Err(failure.into()),
            Ok(Response::Event(event)) => told(&event),
            Err(error) => return Err(CallError::Garbled(error.to_string())),
        }
    }
}

/// How long to wait for a line; `None`: for ever.
fn patience(request: &Request) -> Option<Duration> {
    match request {
        Request::Log { follow: true, .. } => None,
        Request::Up { wait_seconds, .. }
        | Request::Down { wait_seconds, .. }
        | Request::Rekey { wait_seconds, .. } => {
            Some(PATIENCE + Duration::from_secs(u64::from(wait_seconds.unwrap_or_default())))
        }
        _ => Some(PATIENCE),
    }
}
