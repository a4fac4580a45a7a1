//! All that crosses between the control process and the datapath process.
//!
//! Both sides speak through a Unix `SOCK_SEQPACKET` socket: one [`request::Request`] or [`request::Reply`] or
//! [`event::Event`] batch a message, framed by [`codec`]. Requests are idempotent under a [`Generation`] and
//! each is acknowledged; on connect control says `Hello`, reads the inventory and reconciles (DP-7).
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "arbitrary"))]
pub mod arbitrary;
pub mod codec;
pub mod counters;
pub mod event;
pub mod relay;
pub mod request;
pub mod sa;
pub mod secret;
pub mod settings;
pub mod transport;

use serde::{Deserialize, Serialize};

/// Version of this contract; a `Hello` with another version is refused.
pub const VERSION: u16 = 3;

/// Orders the states of one object: a request with an older generation than the installed one is stale and
/// refused, an equal one is already done and acknowledged as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation(pub u64);

/// Whatever has a value on the wire and another one that the peer's integrity check covers.
///
/// Behind a relay (RLY-2) the client computes and checks ICVs over the gateway-side values and swaps them for
/// the wire values; everywhere else the two are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Translation<T> {
    /// The value in the packet as it travels between this node and the next one.
    pub on_wire: T,
    /// The value that the ICV covers: what the far end sees.
    pub authenticated: T,
}

impl<T: Copy + PartialEq> Translation<T> {
    /// No relay between the two ends.
    pub const fn same(value: T) -> Self {
        Self { on_wire: value, authenticated: value }
    }

    /// Whether the two values differ.
    pub fn is_translated(&self) -> bool {
        self.on_wire != self.authenticated
    }
}
