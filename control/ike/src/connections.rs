//! The configured connections, and which of them may be meant by a peer.

use core::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::config::Connection;

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    all: Vec<Arc<Connection>>,
    by_name: HashMap<Arc<str>, usize>,
    /// Those with a peer at one known address and nowhere else.
    by_remote: HashMap<IpAddr, Vec<usize>>,
    /// Those whose peer may be at several addresses.
    open: Vec<usize>,
}

impl Connections {
    pub(crate) fn new(all: Vec<Arc<Connection>>) -> Self {
        let mut this = Self::default();
        for (index, connection) in all.iter().enumerate() {
            this.by_name.insert(Arc::clone(&connection.name), index);
            match connection.remote {
                // A peer that may move or is behind NAT comes from elsewhere, but then its networks say so.
                Some(remote) if connection.remote_nets.is_empty() => {
                    this.by_remote.entry(remote).or_default().push(index);
                }
                _ => this.open.push(index),
            }
        }
        this.all = all;
        this
    }

    /// The connection of this name.
    pub(crate) fn named(&self, name: &str) -> Option<&Arc<Connection>> {
        self.all.get(*self.by_name.get(name)?)
    }

    /// Those of IKEv1 (`v1`), or else of IKEv2, that a peer at `remote` which talks to `local` may mean, in the order of the
    /// file; those for exactly this peer first.
    pub(crate) fn candidates(&self, local: IpAddr, remote: IpAddr, v1: bool) -> Vec<Arc<Connection>> {
        let exact = self.by_remote.get(&remote).into_iter().flatten();
        let open = self.open.iter().filter(|index| {
            self.all.get(**index).is_some_and(|connection| {
                connection.remote == Some(remote)
                    || connection.remote_nets.iter().any(|net| net.contains(&remote))
                    || (connection.remote_nets.is_empty() && connection.remote.is_none())
            })
        });
        let found = exact.chain(open).filter_map(|index| self.all.get(*index));
        found
            .filter(|connection| connection.v1.is_some() == v1)
            .filter(|connection| connection.local.is_empty() || connection.local.contains(&local))
            .cloned()
            .collect()
    }
}
