//! What the management socket asks of the IKE task, and what it is told: one channel of [`IkeCommand`]s, answers in rows
//! that are shown as they are (`--json`) or as tables.
//!
//! A command that begins something ([`IkeCommand::Up`], [`Down`](IkeCommand::Down), [`Rekey`](IkeCommand::Rekey)) is
//! answered at once, with what it began. How it ends is told by the [`IkeEvent`]s; whoever wants to know asks for them
//! ([`IkeCommand::Follow`]) before. Names, addresses, identities and suites are texts; SPIs are `0x…`; no secret is in
//! any of these types.

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::admin::Failure;
use crate::config::ike::Ike;
use crate::desired::Outline;
use crate::metrics::IkeTotals;
use crate::recovery;

/// Where an answer goes. A failure's kind decides the exit code of `postern`: what is not configured is
/// [`NotFound`](crate::admin::FailureKind::NotFound).
pub type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// What the IKE task is asked.
#[derive(Debug)]
pub enum IkeCommand {
    /// Establish a connection, or one of its children.
    Up {
        /// The connection.
        connection: String,
        /// The child; `None`: those with `start` other than `none`, or the first.
        child: Option<String>,
        /// What was begun.
        reply: Reply<Begun>,
    },
    /// Delete what is established or being established.
    Down {
        /// What.
        target: Target,
        /// What was begun.
        reply: Reply<Begun>,
    },
    /// Replace keys now.
    Rekey {
        /// What.
        target: Target,
        /// What was begun.
        reply: Reply<Begun>,
    },
    /// Connections and their SAs, in the order of the file; SAs whose connection is not known (yet) come last, under a
    /// row without a name.
    List {
        /// Only this connection.
        connection: Option<String>,
        /// The rows.
        reply: Reply<Vec<ConnectionRow>>,
    },
    /// Everything that is known about why a connection is up or not.
    Explain {
        /// The connection.
        connection: String,
        /// The facts.
        reply: Reply<Explanation>,
    },
    /// The latest `backlog` events, then each as it happens, until the receiver is dropped. The task never waits for a
    /// receiver: one that is full misses events and is told how many by an [`EventKind::Missed`].
    Follow {
        /// How many of the past.
        backlog: usize,
        /// Where they go.
        events: mpsc::Sender<IkeEvent>,
    },
    /// Take over another configuration: SAs of connections that are gone or changed are closed, others stay.
    Configure {
        /// The new configuration.
        ike: Box<Ike>,
        /// Only say what would change.
        dry_run: bool,
        /// A line for each change, of [`Ike::changes`].
        reply: oneshot::Sender<Vec<String>>,
    },
    /// Numbers of SAs, and counters of messages that were not acted on, of handshakes and of failures.
    Totals(oneshot::Sender<IkeTotals>),
    /// What this start was, how telling peers goes, and how the backup is.
    Recovery(oneshot::Sender<recovery::Report>),
    /// Write the backup anew.
    Snapshot(oneshot::Sender<Result<(), String>>),
    /// What negotiated objects the datapath should hold, for showing them with what it holds.
    Outline(oneshot::Sender<Outline>),
}

/// What [`IkeCommand::Down`] and [`IkeCommand::Rekey`] are about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The connection.
    pub connection: String,
    /// One of its children; `None`: its IKE SAs (down: with all their children).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub child: Option<String>,
    /// Only in this IKE SA ([`IkeSaRow::id`]); `None`: in all of the connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sa: Option<u64>,
}

/// What a command began. Its end shows in events of the same connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// IKE SAs that are being established ([`IkeCommand::Up`]), deleted or rekeyed. Empty for an `up` that goes by an
    /// established one.
    pub sas: Vec<u64>,
    /// Children, by name, that are being established, deleted or rekeyed. Empty for an `up` whose children are all up,
    /// and for commands about IKE SAs alone.
    pub children: Vec<String>,
}

/// A configured connection and what there is of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRow {
    /// Its name; empty for SAs of no known connection.
    pub name: String,
    /// State.
    pub state: ConnectionState,
    /// This side's configured addresses; empty: any.
    pub local: Vec<String>,
    /// The configured peer: its address, or the networks it may come from; empty: any.
    pub remote: Vec<String>,
    /// This side's identity.
    pub local_id: String,
    /// The peer's identity, which may be a pattern.
    pub remote_id: String,
    /// How both authenticate, this side first: `shared secret / certificate`.
    pub auth: String,
    /// Its children as configured.
    pub children: Vec<ChildRow>,
    /// Its IKE SAs.
    pub sas: Vec<IkeSaRow>,
}

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnectionState {
    /// An IKE SA is established, with a child installed if there are any configured.
    Up,
    /// An IKE SA is established without a child.
    NoChild,
    /// It is being established.
    Connecting,
    /// It begins with the first packet for it.
    Trapped,
    /// It waits for the peer or a command.
    Idle,
    /// It should be up and is not: the last attempt failed.
    Failed,
}

impl ConnectionState {
    /// As shown.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::NoChild => "no child",
            Self::Connecting => "connecting",
            Self::Trapped => "on traffic",
            Self::Idle => "idle",
            Self::Failed => "FAILED",
        }
    }
}

/// A child as configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildRow {
    /// Its name.
    pub name: String,
    /// `tunnel` or `transport`.
    pub mode: String,
    /// `none`, `start` or `trap`.
    pub start: String,
    /// This side's selectors.
    pub local: Vec<String>,
    /// The peer's.
    pub remote: Vec<String>,
}

/// One IKE SA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeSaRow {
    /// Names it for the life of the daemon.
    pub id: u64,
    /// `connecting`, `established`, `rekeying`, `deleting`.
    pub state: String,
    /// Whether this side began it.
    pub initiator: bool,
    /// This side's address and port.
    pub local: String,
    /// The peer's.
    pub remote: String,
    /// Whether it goes by port 4500 (RFC 3948).
    pub natt: bool,
    /// This side's identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_id: Option<String>,
    /// The peer's, once it is authenticated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_id: Option<String>,
    /// The proposal, in strongSwan's words.
    pub suite: String,
    /// SPIs, the initiator's first, 16 digits each.
    pub spis: (String, String),
    /// Seconds since it is established (or began).
    pub age_seconds: u64,
    /// Seconds to the next rekey.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rekey_seconds: Option<u64>,
    /// Addresses assigned to the peer, or to this side as client.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Its CHILD_SAs.
    pub children: Vec<ChildSaRow>,
}

/// One CHILD_SA: both directions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildSaRow {
    /// Names it for the life of the daemon.
    pub id: u64,
    /// Its name in the configuration.
    pub name: String,
    /// `installing`, `installed`, `rekeying`, `replaced`, `deleting`.
    pub state: String,
    /// SPI of packets to this side.
    pub spi_in: String,
    /// SPI of packets to the peer.
    pub spi_out: String,
    /// The proposal, in strongSwan's words.
    pub suite: String,
    /// Traffic selectors of this side.
    pub local: Vec<String>,
    /// Traffic selectors of the peer's side.
    pub remote: Vec<String>,
    /// In UDP.
    pub encap: bool,
    /// Seconds since it is installed.
    pub age_seconds: u64,
}

/// Why a connection is up or not: facts, from which `postern explain` makes sentences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The connection as it is listed.
    pub connection: ConnectionRow,
    /// Whether control is connected to the datapath, without which no child can be installed.
    pub datapath_up: bool,
    /// What is in the way of listening on the IKE ports, if anything is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<String>,
    /// Seconds since anything that could be its peer was heard: a message in one of its IKE SAs, or one from an address
    /// that fits it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard_seconds: Option<u64>,
    /// The last failure of the connection or one of its children, even if it is up now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<PastEvent>,
    /// How often it failed since it last was up.
    pub failures: u64,
    /// When an IKE SA of it was last established.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub established: Option<PastEvent>,
    /// When and why its last IKE SA ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<PastEvent>,
    /// Seconds until the next attempt by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_seconds: Option<u64>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastEvent {
    /// Seconds ago.
    pub seconds_ago: u64,
    /// In words.
    pub text: String,
}

/// Something that happened, told to followers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeEvent {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What kind.
    pub kind: EventKind,
    /// The connection, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<String>,
    /// The child's name, where it is about a child.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub child: Option<String>,
    /// The IKE SA ([`IkeSaRow::id`]), where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sa: Option<u64>,
    /// What happened, in words that say what to do about it where that is known.
    pub text: String,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// This side began an IKE SA.
    Connecting,
    /// An IKE SA is established.
    Established,
    /// An IKE SA was replaced by a rekey.
    Rekeyed,
    /// An IKE SA is gone.
    Closed,
    /// An attempt to establish an IKE SA failed.
    Failed,
    /// A CHILD_SA is in use.
    ChildUp,
    /// A CHILD_SA was replaced by a rekey, and the new one is in use.
    ChildRekeyed,
    /// A CHILD_SA is gone.
    ChildDown,
    /// A CHILD_SA could not be made; its IKE SA stays.
    ChildFailed,
    /// The peer or this side is at another address.
    Moved,
    /// A message was not acted on (rate-limited; the counters have them all).
    Ignored,
    /// A packet asked for a connection that begins on traffic.
    Acquired,
    /// The receiver was too slow: so many events are missing here.
    Missed,
}
