//! What the main thread tells a worker, and what comes back.
//!
//! A worker applies commands at the start of a turn, where it holds no reference into its tables (DESIGN: publication
//! by quiescent state). Whatever it stops using goes back through its outbox and is dropped, and its keys wiped, on
//! the main thread.

use std::net::IpAddr;
use std::sync::Arc;

use postern_contract::counters::{DropReason, RelayCounters};
use postern_contract::event::Event;
use postern_contract::relay::{RelayEntry, RelayId};
use postern_contract::sa::{IpsecProtocol, Policy, PolicyId, SaId};
use postern_wire::ids::Spi;

use crate::fib::Fib;
use crate::relay::Entry;
use crate::sad::config::SaShared;
use crate::sad::lookup::Handle;
use crate::sad::runtime::{Inbound, Outbound, Rest};

/// Commands that one message carries at most.
pub const COMMANDS_PER_BATCH: usize = 256;

/// Which of a worker's two SA tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Inbound SAs.
    Inbound,
    /// Outbound SAs.
    Outbound,
}

/// One change to a worker's tables.
#[derive(Debug)]
pub enum Command {
    /// Nothing: the worker took what was here.
    Applied,
    /// A new inbound SA at an index that is free.
    PutInbound(u32, Inbound, Rest),
    /// A new outbound SA at an index that is free.
    PutOutbound(u32, Outbound, Rest),
    /// Another configuration half for an SA; the runtime half stays. `move_peer`: the peer's address changed in the description, so what MOB-2 learnt is void.
    Reconfigure {
        /// Which table.
        table: Table,
        /// Index of the SA.
        index: u32,
        /// The new half.
        config: Arc<SaShared>,
        /// Forget the learnt address and take the described one.
        move_peer: bool,
    },
    /// Takes an SA out; it comes back as [`Returned`].
    Take(Table, u32),
    /// Links an SA to its pair and bundle ([`crate::sad::runtime::NO_LINK`] for none).
    Link {
        /// Which table.
        table: Table,
        /// Index of the SA.
        index: u32,
        /// Index of the SA of the other direction; inbound only.
        pair: u32,
        /// Index of the AH SA of the bundle.
        bundle: u32,
    },
    /// An inbound SPI leads to this worker or another one (`None`: nowhere).
    Route(IpsecProtocol, Spi, Option<Handle>),
    /// Sequence numbers up to the ceiling are reserved on stable storage.
    Raise {
        /// Index of the outbound SA.
        index: u32,
        /// The SA meant, in case the index was reused.
        id: SaId,
        /// The ceiling.
        ceiling: u64,
    },
    /// A hard limit in seconds was reached: stop the SA.
    Stop(Table, u32, SaId),
    /// A policy with its resolved SA.
    PutPolicy(Arc<Policy>, Option<Handle>),
    /// Another SA for a policy (rekey).
    SetPolicyHandle(PolicyId, Option<Handle>),
    /// A policy is gone.
    RemovePolicy(PolicyId),
    /// A translation entry, new or replacing the one with the same id.
    PutRelay(RelayEntry),
    /// A translation entry is gone.
    RemoveRelay(RelayId),
    /// Routes and neighbours.
    Fib(Arc<Fib>),
    /// Report these SAs.
    ReportSas(Vec<(Table, u32)>),
    /// Report the tops of the windows of inbound SAs: id, index, and place for the top.
    ReportTops(Vec<(SaId, u32, u64)>),
    /// Report the counters of the translation entries.
    ReportRelays,
    /// Report the latency histogram.
    ReportLatency,
}

/// Counters of one SA, as its worker sees them.
#[derive(Clone, Debug)]
pub struct SaSnapshot {
    /// The configuration half.
    pub config: Arc<SaShared>,
    /// Packets.
    pub packets: u64,
    /// Bytes of inner packets.
    pub bytes: u64,
    /// Last sequence number sent or highest accepted.
    pub sequence: u64,
    /// The peer's address and port as last seen.
    pub peer: (IpAddr, u16),
    /// Seconds since the last packet.
    pub idle_seconds: Option<u64>,
    /// Stopped by a hard limit.
    pub stopped: bool,
    /// Drops by reason.
    pub drops: Vec<(DropReason, u64)>,
}

/// What a worker gives back.
#[derive(Debug)]
pub enum Returned {
    /// An SA that was taken out.
    Inbound(u32, Box<(Inbound, Rest)>),
    /// An SA that was taken out.
    Outbound(u32, Box<(Outbound, Rest)>),
    /// A configuration half no longer used.
    Config(Arc<SaShared>),
    /// A table of routes no longer used.
    Fib(Arc<Fib>),
    /// A translation entry no longer used.
    Relay(Box<Entry>),
    /// Answer to [`Command::ReportSas`].
    Sas(Vec<SaSnapshot>),
    /// Answer to [`Command::ReportTops`], without the SAs that are gone.
    Tops(Vec<(SaId, u32, u64)>),
    /// Answer to [`Command::ReportRelays`].
    Relays(Vec<(RelayId, RelayCounters)>),
    /// Answer to [`Command::ReportLatency`].
    Latency(Box<hdrhistogram::Histogram<u64>>),
    /// A batch of commands, all applied; its memory is to be freed.
    Commands(Vec<Command>),
    /// Something happened.
    Event(Event),
    /// An outbound SA comes near its ceiling: it used the numbers up to `last`.
    Reserve {
        /// Index of the SA.
        index: u32,
        /// The SA.
        id: SaId,
        /// The last number used.
        last: u64,
        /// The current ceiling.
        ceiling: u64,
    },
}
