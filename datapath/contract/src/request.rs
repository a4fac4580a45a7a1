//! What control asks of the datapath, and the answers.

use core::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::counters::{DropReason, PortCounters, RelayCounters, SaCounters};
use crate::event::Event;
use crate::relay::{RelayEntry, RelayError, RelayId};
use crate::sa::{Direction, IpsecProtocol, Mode, Policy, PolicyId, SaConfig, SaId, SuiteError, UdpEncap};
use crate::settings::Role;
use crate::{Generation, Translation};
use postern_wire::ids::Spi;

/// One change. Each is idempotent: repeating it is acknowledged as [`Done::Already`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Installs an SA, or replaces the configuration half of the installed one (same SPI and keys) without touching its runtime half.
    InstallSa(Box<SaConfig>),
    /// Removes an SA; its keys are wiped.
    RemoveSa(SaId),
    /// Installs or replaces a policy.
    InstallPolicy(Policy),
    /// Removes a policy.
    RemovePolicy(PolicyId),
    /// Installs or replaces a translation entry.
    InstallRelay(RelayEntry),
    /// Removes a translation entry.
    RemoveRelay(RelayId),
}

/// How an operation ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// It took effect.
    Applied,
    /// It had taken effect before; removing what is not there counts as this.
    Already,
}

/// Why an operation was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// A newer generation is installed.
    #[error("generation {0:?} is installed, which is newer")]
    Stale(Generation),
    /// The suite is not valid.
    #[error(transparent)]
    Suite(#[from] SuiteError),
    /// The translation entry is not valid.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// A field is out of range; the text names it and what is allowed.
    #[error("{0}")]
    Invalid(String),
    /// Another SA or entry has this inbound SPI.
    #[error("the inbound SPI {0} is taken")]
    SpiTaken(Spi),
    /// An installed SA cannot change its SPI, keys or direction: install a new SA instead.
    #[error("an installed SA cannot change its {0}: install a new one")]
    Immutable(String),
    /// The reserved sequence numbers could not be written to stable storage.
    #[error("cannot reserve sequence numbers in the state directory: {0}")]
    Storage(String),
    /// The table is full or memory ran out.
    #[error("the table is full")]
    Full,
}

/// A message from control to the datapath.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First message on a connection; answered by [`Reply::Hello`]. UDP port 4500 is the sender's from now on: a datapath
    /// that held it, so that no peer is told that nobody receives there, has left it when it answers.
    Hello {
        /// [`crate::VERSION`] of the sender.
        version: u16,
    },
    /// All installed SAs, policies and entries, a page at a time; answered by [`Reply::Inventory`].
    Inventory {
        /// `None` to begin, then what the last page gave.
        after: Option<Cursor>,
    },
    /// Applies the operations in order; answered by [`Reply::Applied`] once all workers use them.
    Apply {
        /// Returned in the answer.
        token: u64,
        /// The changes.
        operations: Vec<Operation>,
    },
    /// One SA with its counters; answered by [`Reply::Sa`].
    Sa(SaId),
    /// Workers and ports with their counters; answered by [`Reply::Status`].
    Status,
    /// The latency histogram; answered by [`Reply::Latency`].
    Latency,
    /// From now on send [`Reply::Events`] on this connection.
    Subscribe,
}

/// A place in the inventory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cursor {
    /// SAs with an id above this one come next.
    Sa(SaId),
    /// All SAs were listed; policies with an id above this one come next (`None`: from the first).
    Policy(Option<PolicyId>),
    /// All policies were listed; entries with an id above this one come next.
    Relay(Option<RelayId>),
}

/// What the inventory tells of an SA: no key ever leaves the datapath.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaReport {
    /// Control's name for it.
    pub id: SaId,
    /// State of the installed description.
    pub generation: Generation,
    /// Inbound or outbound.
    pub direction: Direction,
    /// ESP or AH.
    pub protocol: IpsecProtocol,
    /// Tunnel or transport.
    pub mode: Mode,
    /// The SPI.
    pub spi: Translation<Spi>,
    /// This node's outer address.
    pub local: Translation<IpAddr>,
    /// The peer's outer address; after MOB-2 another than was installed.
    pub remote: Translation<IpAddr>,
    /// UDP encapsulation; after MOB-2 with another port than was installed.
    pub encap: Option<UdpEncap>,
    /// Worker that owns it.
    pub worker: u16,
    /// Whether a hard limit or the end of the sequence space stopped it.
    pub stopped: bool,
    /// SHA-256 of the keying material, cut to 8 bytes, so that control sees whether it is the SA it means.
    pub key_check: [u8; 8],
    /// Counters.
    pub counters: SaCounters,
}

/// What the inventory tells of a translation entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayReport {
    /// The entry.
    pub entry: RelayEntry,
    /// Counters.
    pub counters: RelayCounters,
}

/// One page of the inventory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// SAs in the order of their ids.
    pub sas: Vec<SaReport>,
    /// Policies in the order of their ids.
    pub policies: Vec<Policy>,
    /// Entries in the order of their ids.
    pub relays: Vec<RelayReport>,
    /// Where to go on; `None` at the end.
    pub next: Option<Cursor>,
}

/// One port of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// Interface name.
    pub interface: String,
    /// What it is for.
    pub role: Role,
    /// How it is attached, for people: `xsk native copy`, `tun`, …
    pub attachment: String,
    /// Queue of the interface; 0 where there is none.
    pub queue: u32,
    /// Counters.
    pub counters: PortCounters,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its processor, if pinned.
    pub core: Option<u16>,
    /// Turns that found work.
    pub busy_turns: u64,
    /// Frames free for use.
    pub free_frames: u64,
    /// Inbound SAs it owns.
    pub inbound_sas: u64,
    /// Outbound SAs it owns.
    pub outbound_sas: u64,
    /// Packets of its SAs that other workers sealed or opened (DP-8).
    pub fanned_out: u64,
    /// Packets that it sealed or opened for other workers.
    pub helped: u64,
    /// Its ports.
    pub ports: Vec<PortStatus>,
}

/// Verdicts of the XDP program on one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteerStatus {
    /// Interface name.
    pub interface: String,
    /// Verdict names and packets.
    pub verdicts: Vec<(String, u64)>,
}

/// The datapath as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// Name of the AEAD backend in use.
    pub crypto_backend: String,
    /// Number of SAs.
    pub sas: u64,
    /// Number of policies.
    pub policies: u64,
    /// Number of translation entries.
    pub relays: u64,
    /// Of these, how many the XDP programs execute; `None` if only workers do.
    pub relays_in_xdp: Option<u64>,
    /// Workers in the order of their numbers.
    pub workers: Vec<WorkerStatus>,
    /// Interfaces with an XDP program.
    pub steer: Vec<SteerStatus>,
}

impl Status {
    /// Sum over all ports of the packets dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        let ports = self.workers.iter().flat_map(|worker| &worker.ports);
        ports.flat_map(|port| &port.counters.drops).filter(|(r, _)| *r == reason).map(|(_, n)| n).sum()
    }
}

/// Quantiles of the time from receive to transmit of sampled packets, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Packets sampled.
    pub samples: u64,
    /// Smallest.
    pub min: u64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Largest.
    pub max: u64,
}

/// A message from the datapath to control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Answer to [`Request::Hello`].
    Hello {
        /// [`crate::VERSION`] of the datapath. Another than control's: control goes no further.
        version: u16,
        /// Random at each start of the datapath: another value means that all SAs are gone.
        instance: u64,
        /// Process id.
        pid: u32,
    },
    /// Answer to [`Request::Inventory`].
    Inventory(Page),
    /// Answer to [`Request::Apply`], an outcome for each operation in order.
    Applied {
        /// The request's.
        token: u64,
        /// Outcomes.
        results: Vec<Result<Done, Refusal>>,
    },
    /// Answer to [`Request::Sa`].
    Sa(Option<SaReport>),
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Answer to [`Request::Latency`].
    Latency(Latency),
    /// Unasked, after [`Request::Subscribe`].
    Events(Vec<Event>),
    /// The request could not be read or came out of turn; the text says why. The connection stays open.
    Rejected(String),
}
