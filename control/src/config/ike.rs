//! What the file says about IKE: `[ike]`, `[[pool]]` and `[[connection]]`.
//!
//! Most of a connection is in the terms of `postern-ike`, which gets it as it is; what its CHILD_SAs are to look like in
//! the datapath stands beside it, in the contract's terms.

use core::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use postern_contract::sa::{FanOut, Lifetime, PathPolicy};
use postern_ike::config::{Connection as IkeConnection, PoolConfig, Settings};

/// Everything about IKE.
#[derive(Debug, Default)]
pub struct Ike {
    /// Sockets.
    pub listen: Listen,
    /// Settings of the endpoint.
    pub settings: Settings,
    /// Threads for key exchanges and signatures.
    pub threads: usize,
    /// Directory of the key tables for Wireshark. To be refused unless control was started with `--allow-keylog`.
    pub keylog: Option<PathBuf>,
    /// Each `[[pool]]`.
    pub pools: Vec<PoolConfig>,
    /// Each `[[connection]]`, in the order of the file.
    pub connections: Vec<Connection>,
}

/// Where IKE listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Own addresses; empty: all.
    pub addresses: Vec<IpAddr>,
    /// As a rule 500.
    pub port: u16,
    /// As a rule 4500: with NAT (RFC 3948).
    pub nat_port: u16,
}

impl Ike {
    /// What differs in `new`, a line each: connections (told by their fingerprints) and pools. What only a start of the
    /// daemon can change ([`Listen`], threads, key tables) is not among them.
    pub fn changes(&self, new: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let named = |ike: &Self, name: &str| {
            let found = ike.connections.iter().find(|other| *other.ike.name == *name);
            found.map(|other| (other.ike.fingerprint, other.refreshable))
        };
        for connection in &self.connections {
            if named(new, &connection.ike.name).is_none() {
                lines.push(format!("remove connection {}: its SAs are closed", connection.ike.name));
            }
        }
        for connection in &new.connections {
            match named(self, &connection.ike.name) {
                None => lines.push(format!("add connection {}", connection.ike.name)),
                Some((before, _)) if before != connection.ike.fingerprint => {
                    lines.push(format!("change connection {}: its SAs are closed", connection.ike.name));
                }
                Some((_, before)) if before != connection.refreshable => {
                    lines.push(format!(
                        "refresh connection {}: its users or CRLs; its SAs stay",
                        connection.ike.name
                    ));
                }
                Some(_) => {}
            }
        }
        for pool in &self.pools {
            if new.pools.iter().all(|other| other.name != pool.name) {
                lines.push(format!("remove pool {}", pool.name));
            }
        }
        for pool in &new.pools {
            match self.pools.iter().find(|other| other.name == pool.name) {
                None => lines.push(format!("add pool {}", pool.name)),
                Some(before) if before != pool => lines.push(format!("change pool {}", pool.name)),
                Some(_) => {}
            }
        }
        if self.settings != new.settings {
            lines.push("change the settings of [ike]".to_owned());
        }
        lines
    }
}

impl Default for Listen {
    fn default() -> Self {
        Self { addresses: Vec::new(), port: 500, nat_port: 4500 }
    }
}

/// One `[[connection]]`.
#[derive(Debug)]
pub struct Connection {
    /// What IKE does. Its fingerprint covers [`children`](Self::children) too.
    pub ike: Arc<IkeConnection>,
    /// What is not IKE's about each of [`ike.children`](IkeConnection::children), in the same order.
    pub children: Vec<ChildSettings>,
    /// Digest of what changes under running SAs without closing them: users' passwords and CRLs. It is in force for those
    /// who come; who is in stays in.
    pub refreshable: [u8; 32],
}

/// How the SAs of a child are to be in the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSettings {
    /// Sizes and header fields.
    pub path: PathPolicy,
    /// Anti-replay window in packets.
    pub replay_window: u16,
    /// MOB-2.
    pub follow_peer: bool,
    /// Priority of the policy.
    pub priority: u32,
    /// Worker that owns the SAs.
    pub worker: Option<u16>,
    /// Whether other workers may help it (DP-8).
    pub fan_out: FanOut,
    /// Limits by bytes and packets: at the soft one the child is rekeyed, at the hard one it is deleted. No seconds: IKE
    /// itself keeps time.
    pub limits: Lifetime,
}
