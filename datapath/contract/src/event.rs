//! What the datapath tells control unasked.

use core::net::IpAddr;

use postern_wire::ids::Protocol;
use serde::{Deserialize, Serialize};

use crate::sa::{PolicyId, SaId};

/// Which limit of an SA was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LimitKind {
    /// Seconds since installation.
    Seconds,
    /// Bytes of protected payload.
    Bytes,
    /// Packets.
    Packets,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A soft limit: the SA should be renewed (DP-4).
    SoftLimit {
        /// The SA.
        sa: SaId,
        /// The limit.
        kind: LimitKind,
    },
    /// A hard limit: the SA has stopped (DP-4).
    HardLimit {
        /// The SA.
        sa: SaId,
        /// The limit.
        kind: LimitKind,
    },
    /// The sequence counter came to its end: the SA has stopped (DP-4).
    SequenceExhausted {
        /// The SA.
        sa: SaId,
    },
    /// MOB-2: an authenticated, newest packet came from another outer source, and the path now leads there.
    NewPath {
        /// The inbound SA.
        sa: SaId,
        /// The peer's new outer address.
        remote: IpAddr,
        /// The peer's new UDP port, if encapsulated.
        port: Option<u16>,
    },
    /// A packet matched a policy that protects but has no SA.
    Acquire {
        /// The policy.
        policy: PolicyId,
        /// Source of the packet (the inside).
        source: IpAddr,
        /// Destination of the packet.
        destination: IpAddr,
        /// Its protocol.
        protocol: Protocol,
        /// Its ports, zero where it has none.
        ports: (u16, u16),
    },
    /// Events that were dropped because control read too slowly.
    Lost {
        /// How many.
        count: u64,
    },
}
