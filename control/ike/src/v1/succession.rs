//! A new IKE SA in place of an old one. IKEv1 cannot rekey an IKE SA: a new main mode with the same peer takes over the
//! children, whose keys are independent of it, and the old IKE SA is deleted by the side that began the new one.

use core::net::IpAddr;
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use super::Common;
use super::child::Child;
use super::established::{Alive, Established};
use crate::config::Unique;
use crate::endpoint::{Core, Errand, Now};
use crate::output::SaId;
use crate::report::{CloseReason, Report};

/// How long a replaced IKE SA stays, until the side that began its successor deletes it.
const LAST: Duration = Duration::from_secs(5);

/// What an IKE SA leaves to its successor.
pub(crate) struct Estate {
    children: Vec<Child>,
    addresses: Vec<IpAddr>,
    from: SaId,
    /// It was handed over before, and this is what came later.
    again: bool,
}

impl Established {
    /// Older IKE SAs of the same peer give way.
    pub(super) fn succeed(&mut self, common: &Common, core: &mut Core, now: Now) {
        let key = (Arc::clone(&self.connection.name), self.remote_id.clone());
        let others = core.peers.entry(key).or_default();
        let older = others.clone();
        others.reserve_exact(1);
        others.push((common.id, common.initiator, common.cookie_i, now.monotonic));
        if self.first_contact {
            return self.forget_others(common, core);
        }
        if self.connection.unique == Unique::Never {
            return;
        }
        // One begun by each side before it knew of the other's: of these both keep the one with the larger cookie, and the
        // others are deleted by who began them. All go to the one that is kept: it may not be replaced in turn.
        let crossed = |initiator: bool, since: Instant| initiator != common.initiator && since >= common.born;
        let mut kept = (common.cookie_i, common.id, common.initiator);
        for (id, initiator, cookie_i, since) in &older {
            if crossed(*initiator, *since) && *cookie_i > kept.0 {
                kept = (*cookie_i, *id, *initiator);
            }
        }
        let (_, to, began) = kept;
        let own = (common.id, common.initiator, common.cookie_i, now.monotonic);
        for (from, initiator, _, since) in older.into_iter().chain([own]).filter(|(id, ..)| *id != to) {
            let other = from == common.id || crossed(initiator, since);
            core.errands.push(Errand::Succeed { from, to, mine: if other { initiator } else { began } });
        }
    }

    /// RFC 2407 section 4.6.3.3: the peer has no other SA with this side.
    pub(super) fn forget_others(&self, common: &Common, core: &mut Core) {
        if self.connection.unique == Unique::Never {
            return;
        }
        let key = (Arc::clone(&self.connection.name), self.remote_id.clone());
        for (sa, ..) in core.peers.get(&key).into_iter().flatten().copied() {
            if sa != common.id {
                core.errands.push(Errand::Supersede { sa, silently: true });
            }
        }
    }

    /// The peer has deleted it; but if there is another one with this peer, its children go on in that: what one side has
    /// replaced may be what the other keeps.
    pub(super) fn deleted_by_peer(&mut self, common: &Common, core: &mut Core) -> Alive {
        let key = (Arc::clone(&self.connection.name), self.remote_id.clone());
        let others = core.peers.get(&key).into_iter().flatten();
        let heir = others.filter(|(sa, ..)| *sa != common.id).max_by_key(|(.., since)| *since);
        match heir.map(|(sa, ..)| *sa).filter(|_| !self.children.is_empty()) {
            Some(to) => {
                self.deleted = true;
                core.errands.push(Errand::Succeed { from: common.id, to, mine: false });
                Alive::Yes
            }
            None => Alive::No(CloseReason::Peer),
        }
    }

    /// Everything that a successor takes over. `mine`: this side began that one.
    pub(super) fn hand_over(&mut self, common: &Common, now: Now, successor: SaId, mine: bool) -> Estate {
        let again = self.successor.replace(successor).is_some();
        self.rekey_at = None;
        self.keepalive_at = None;
        self.dpd = None;
        let wait = if mine { LAST } else { 6 * LAST };
        self.expires_at = Some(if self.deleted { now.monotonic } else { now.monotonic + wait });
        Estate {
            children: std::mem::take(&mut self.children),
            addresses: std::mem::take(&mut self.addresses),
            from: common.id,
            again,
        }
    }

    /// Takes over what a predecessor had.
    pub(super) fn inherit(&mut self, common: &mut Common, core: &mut Core, now: Now, estate: Estate) {
        let Estate { children, addresses, from, again } = estate;
        // It may have been replaced itself, and is needed after all.
        if self.successor.take().is_some() {
            (self.rekey_at, self.expires_at) = self.planned;
            self.schedule_keepalive(common, core, now);
        }
        if !again {
            core.counters.ike_rekeyed += 1;
            core.report(common.id, Report::Rekeyed { old: from, new: common.id });
        }
        for child in &children {
            core.children.insert(child.id, common.id);
        }
        self.children.extend(children);
        for address in addresses {
            // The same address was leased twice: once each is given back.
            if self.addresses.contains(&address) && !self.is_client() {
                core.pools.release(address);
            } else if !self.addresses.contains(&address) {
                self.addresses.push(address);
            }
        }
        // What was begun in the old one goes on there; what was not is begun here.
        let wanted = std::mem::take(&mut self.wanted);
        for index in wanted {
            self.want_child(common, core, now, index);
        }
    }
}
