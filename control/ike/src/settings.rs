//! Settings of a whole endpoint; see `config` for those of a connection.

use core::time::Duration;

/// Settings of a whole endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// This side's port for first messages, as a rule 500.
    pub port: u16,
    /// This side's port behind NATs and for MOBIKE, as a rule 4500.
    pub nat_port: u16,
    /// Retransmission of requests.
    pub retransmit: Retransmit,
    /// Half-open IKE SAs above which a cookie is demanded (RFC 7296 section 2.6).
    pub cookie_threshold: u32,
    /// Half-open IKE SAs above which new ones are refused.
    pub half_open_limit: u32,
    /// Half-open IKE SAs of one source (IPv4 address, IPv6 /64) above which a cookie is demanded of that source. More
    /// are still admitted with a cookie: many users may share one address (RFC 8019).
    pub source_threshold: u32,
    /// A half-open IKE SA that is not established after this is given up.
    pub half_open_timeout: Duration,
    /// Between keepalives while this side is behind a NAT (RFC 3948 section 4).
    pub nat_keepalive: Duration,
    /// Largest IP packet of an IKE message; longer ones go in fragments (RFC 7383).
    pub fragment_size: u16,
    /// An inbound CHILD_SA that was replaced stays this long, so that packets under way still arrive.
    pub drain: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 500,
            nat_port: 4500,
            retransmit: Retransmit::default(),
            cookie_threshold: 256,
            half_open_limit: 65_536,
            source_threshold: 32,
            half_open_timeout: Duration::from_secs(30),
            nat_keepalive: Duration::from_secs(20),
            fragment_size: 1280,
            drain: Duration::from_secs(5),
        }
    }
}

/// When a request is sent again: after `first`, then after `factor` times as long, each time with up to a tenth more or
/// less, `tries` times in all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retransmit {
    /// Before the first retransmission.
    pub first: Duration,
    /// Of each wait to the one before.
    pub factor: f32,
    /// Transmissions in all, the first included.
    pub tries: u8,
}

impl Default for Retransmit {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), factor: 1.8, tries: 7 }
    }
}
