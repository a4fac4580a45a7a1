//! IKE SAs that are saved whole, and go on after a reset (strategy `restore`). What is saved, and why no counter goes
//! back, is told in [`record::whole`](crate::record::whole).
//!
//! What goes on is as it was, but for this:
//! - A request of this side that was not answered is repeated in the same words, once.
//! - Children that were replaced or deleted are not installed again; the peer is told (once more) to delete them.
//! - Everything gets new keys soon. A child's window begins where the datapath had promised that nothing above was
//!   accepted, so packets that the peer sends below that are lost until then; and a burst of the last second before the
//!   reset could be accepted a second time until then (`postern_datapath::publish::windows`).

use core::time::Duration;
use std::sync::Arc;

use super::channel::{Channel, ChannelConfig};
use super::child::{Child, ChildState, Kept};
use super::established::{CROSSED, Established, Ours};
use super::half_open::fragment_size;
use super::nat::Nat;
use super::saving::{beginning, duplicate};
use super::{Abilities, Common, IkeSa, State, Task};
use crate::auth::identity::Identity;
use crate::config::Connection;
use crate::crypto::keys::Derivation;
use crate::endpoint::{Core, Now};
use crate::message::registry::ProtocolId;
use crate::output::{ChildId, ChildSa, Effect, Origin, VirtualConfiguration};
use crate::record::whole::{SavedChild, Traits, Whole};
use crate::record::{SavedBody, SavedIke, Strategy};
use crate::report::Report;

/// The IKE SA is rekeyed so long after its children.
const CHILDREN_FIRST: Duration = Duration::from_secs(1);

/// The peer has so long to finish a rekey of its own.
const PEERS_TURN: Duration = Duration::from_secs(30);

impl IkeSa {
    /// Goes on with what was saved. New keys come after `delay`. Gives the record back if it cannot go on.
    pub(crate) fn restore(
        core: &mut Core,
        now: Now,
        saved: SavedIke,
        connection: &Arc<Connection>,
        delay: Duration,
    ) -> Result<Self, Box<SavedIke>> {
        let SavedBody::Whole(whole) = &saved.body else { return Err(Box::new(saved)) };
        let fits = connection.reset == Strategy::Restore && whole.fingerprint == beginning(connection);
        let configured = |child: &SavedChild| connection.children.get(usize::from(child.index)).is_some();
        let prepared = prepare(core, now, &saved, whole, connection);
        let (Some((channel, keys)), true, true) = (prepared, fits, whole.children.iter().all(configured))
        else {
            return Err(Box::new(saved));
        };
        let identity = Identity::from_data(&whole.identity);
        if !claim(core, whole, connection, &identity) {
            return Err(Box::new(saved));
        }
        let own = if saved.initiator { saved.spis.0 } else { saved.spis.1 };
        let Some(id) = core.known_sa(own) else {
            release(core, whole, connection);
            return Err(Box::new(saved));
        };
        let Traits { nat_detection, nat_local, nat_remote, fragmentation, childless, mobike } = whole.traits;
        let mut common = Common {
            id,
            initiator: saved.initiator,
            spi_i: saved.spis.0,
            spi_r: saved.spis.1,
            path: saved.path,
            connection: Some(Arc::clone(connection)),
            nat: Nat { supported: nat_detection, local: nat_local, remote: nat_remote },
            peer: Abilities { fragmentation, hashes: Vec::new(), childless, mobike },
            born: now.monotonic,
            admitted: None,
        };
        let mut this = Established::begin(
            core,
            now,
            Arc::clone(connection),
            channel,
            keys,
            whole.suite(),
            identity,
            whole.addresses.clone(),
        );
        this.ends = saved.expires;
        let left = saved.expires.duration_since(now.wall).unwrap_or_default();
        this.expires_at = this.expires_at.map(|_| now.monotonic + left);
        this.rekey_at = Some(now.monotonic + delay + CHILDREN_FIRST);
        if !this.addresses.is_empty() && this.leases().is_empty() {
            let addresses = this.addresses.clone();
            core.emit(id, Effect::Configure(VirtualConfiguration { addresses, dns: Vec::new() }));
        }
        this.go_on_with(&common, core, now, &whole.children, delay);
        // In its new life it says nothing before that is saved.
        this.persist(&common, core);
        let key = (Arc::clone(&connection.name), this.remote_id.clone());
        // It is no new one, which the peer's could have crossed on the way.
        let since = now.monotonic.checked_sub(CROSSED).unwrap_or(now.monotonic);
        core.peers.entry(key).or_default().push((id, common.initiator, common.spi_i, since));
        this.schedule_keepalive(&common, core, now);
        core.report(
            id,
            Report::Restored {
                sa: id,
                connection: Arc::clone(&connection.name),
                remote_id: this.remote_id.to_string(),
                path: common.path,
                children: this.children.iter().filter(|child| child.is_current()).count(),
            },
        );
        if let Some(request) = this.channel.resend(now.monotonic, &mut *core.random) {
            common.send(core, &request);
            this.ours = Some(Ours::Resumed);
        }
        let leaving: Vec<ChildId> =
            this.children.iter().filter(|child| !child.is_current()).map(|child| child.id).collect();
        for child in leaving {
            this.enqueue(&mut common, core, now, Task::DeleteChild(child));
        }
        Ok(Self { common, state: State::Established(Box::new(this)) })
    }
}

/// Channel and SK_d; `None` if they cannot be used any more.
fn prepare(
    core: &mut Core,
    now: Now,
    saved: &SavedIke,
    whole: &Whole,
    connection: &Connection,
) -> Option<(Channel, Derivation)> {
    let fragmentation = whole.traits.fragmentation && connection.fragmentation;
    let config = ChannelConfig {
        initiator: saved.initiator,
        spi_i: saved.spis.0,
        spi_r: saved.spis.1,
        fragment_size: fragmentation.then(|| fragment_size(core.settings.fragment_size, saved.path)),
        retransmit: core.settings.retransmit,
        next_request: whole.context.next_request,
        expected_request: whole.expected_request,
    };
    let channel = Channel::restore(&config, now.monotonic, whole, &mut *core.random)?;
    Some((channel, Derivation::from_saved(whole.prf, &whole.sk_d)?))
}

/// Takes what nobody else may have: inbound SPIs, and addresses of pools.
fn claim(core: &mut Core, whole: &Whole, connection: &Connection, identity: &Identity) -> bool {
    for (at, child) in whole.children.iter().enumerate() {
        if !core.host.claim_spi(child.spi_in) {
            for child in whole.children.iter().take(at) {
                core.host.release_spi(child.spi_in);
            }
            return false;
        }
    }
    if connection.request_address != (false, false) {
        return true;
    }
    for (at, address) in whole.addresses.iter().enumerate() {
        let leased = core.pools.lease(&connection.pools, address.is_ipv4(), identity, Some(*address));
        let leased = leased.ok().flatten();
        if leased != Some(*address) {
            let before = whole.addresses.iter().take(at).copied();
            for address in before.chain(leased) {
                core.pools.release(address);
            }
            for child in &whole.children {
                core.host.release_spi(child.spi_in);
            }
            return false;
        }
    }
    true
}

/// Gives back what [`claim`] took.
fn release(core: &mut Core, whole: &Whole, connection: &Connection) {
    for child in &whole.children {
        core.host.release_spi(child.spi_in);
    }
    if connection.request_address == (false, false) {
        for address in &whole.addresses {
            core.pools.release(*address);
        }
    }
}

impl Established {
    /// Has the children installed; those that do not go on are listed, to be deleted at the peer.
    fn go_on_with(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        saved: &[SavedChild],
        delay: Duration,
    ) {
        let leases = self.leases().to_vec();
        let mut ids: Vec<ChildId> = Vec::with_capacity(saved.len());
        for _ in saved {
            ids.push(core.new_child(common.id));
        }
        for (child, id) in saved.iter().zip(&ids) {
            let replaces = child.replaces.and_then(|at| ids.get(usize::from(at)).copied());
            let replaces = replaces.filter(|old| old != id);
            // The peer is about to replace it by its own rekey.
            let replaced =
                saved.iter().any(|next| next.replaces.and_then(|at| ids.get(usize::from(at))) == Some(id));
            let wait = if replaces.is_some() { delay + PEERS_TURN } else { delay };
            let life_at =
                child.ends.map(|ends| now.monotonic + ends.duration_since(now.wall).unwrap_or_default());
            if child.current {
                core.emit(
                    common.id,
                    Effect::Install(Box::new(ChildSa {
                        id: *id,
                        connection: Arc::clone(&self.connection),
                        child: usize::from(child.index),
                        protocol: child.suite.protocol,
                        mode: child.mode,
                        spi_in: child.spi_in,
                        spi_out: child.spi_out,
                        encr: child.suite.encr,
                        integ: child.suite.integ,
                        esn: child.suite.esn,
                        keys_in: duplicate(&child.keys_in),
                        keys_out: duplicate(&child.keys_out),
                        local_ts: child.local_ts.clone(),
                        remote_ts: child.remote_ts.clone(),
                        local: common.path.local.ip(),
                        remote: common.path.remote.ip(),
                        encap: common.encap().filter(|_| child.suite.protocol == ProtocolId::ESP),
                        replaces,
                        // The peer says by its Delete of the old one when it listens to the new one.
                        in_use: replaces.is_none(),
                        leases: leases.clone(),
                        origin: Origin::Restored,
                    })),
                );
            }
            self.children.push(Child {
                id: *id,
                index: usize::from(child.index),
                spi_in: child.spi_in,
                spi_out: child.spi_out,
                suite: child.suite.clone(),
                local_ts: child.local_ts.clone(),
                remote_ts: child.remote_ts.clone(),
                state: if child.current { ChildState::Installing } else { ChildState::Refused },
                since: now.monotonic,
                rekey_at: Some(now.monotonic + wait).filter(|_| child.current && !replaced),
                life_at: life_at.filter(|_| child.current),
                retire_at: None,
                replaces,
                nonce: (!child.nonce.is_empty()).then(|| child.nonce.as_slice().into()),
                kept: Some(Box::new(Kept {
                    mode: child.mode,
                    keys_in: duplicate(&child.keys_in),
                    keys_out: duplicate(&child.keys_out),
                    ends: child.ends,
                })),
            });
        }
    }
}
