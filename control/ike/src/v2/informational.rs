//! INFORMATIONAL exchanges (RFC 7296 section 1.4): deletes, liveness, address updates, errors; and what becomes of
//! children that are deleted.

use std::sync::Arc;

use super::child::{Child, ChildState};
use super::established::{Alive, Established, Ours};
use super::{Common, Task};
use crate::config::Start;
use crate::endpoint::{Core, Now};
use crate::message::Payload;
use crate::message::legality::Payloads;
use crate::message::registry::{ExchangeType, NotifyType, ProtocolId};
use crate::output::{ChildId, Effect, Path};
use crate::qcd;
use crate::report::{CloseReason, Report};

const EXCHANGE: ExchangeType = ExchangeType::INFORMATIONAL;

/// Deletes of unknown children that are remembered for one exchange.
const UNHEARD: usize = 64;

impl Established {
    /// A request of the peer.
    pub(super) fn informational(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        id: u32,
        payloads: &Payloads<'_>,
    ) -> Alive {
        let mut answer = Vec::new();
        let mut ends = false;
        for (protocol, spis) in payloads.deletes() {
            if protocol == ProtocolId::IKE {
                ends = true;
            } else {
                let own = self.deleted_by_peer(common, core, now, protocol, spis);
                if !own.is_empty() {
                    answer.push(Payload::Delete { protocol, spis: own });
                }
            }
        }
        // Section 2.21.2: the initiator refuses our authentication; without a Delete it means the same.
        if payloads.notify(NotifyType::AUTHENTICATION_FAILED).is_some() {
            ends = true;
        }
        if let Some(token) = qcd::given(payloads) {
            self.token = Some(token);
        }
        if !ends {
            answer.extend(self.mobike_request(common, core, now, path, payloads));
        }
        if ends {
            // What is saved of it goes, whether the answer arrives or not.
            let datagrams = self.channel.respond(EXCHANGE, id, &answer, &mut *core.random);
            common.send_to(core, path, &datagrams);
            return self.deleted(common, core, now);
        }
        let datagrams = self.respond(common, core, EXCHANGE, id, &answer);
        common.send_to(core, path, &datagrams);
        self.pump(common, core, now);
        Alive::Yes
    }

    /// The peer deletes the halves of children that it receives with; the answer names ours of them.
    fn deleted_by_peer(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        protocol: ProtocolId,
        spis: &[u32],
    ) -> Vec<u32> {
        let mut own = Vec::new();
        for spi in spis {
            let found = self.children.iter_mut().find(|child| {
                child.spi_out == *spi && child.suite.protocol == protocol && child.state != ChildState::Gone
            });
            let Some(child) = found else {
                if self.is_making_child() && self.unheard.len() < UNHEARD {
                    self.unheard.push(*spi);
                }
                continue;
            };
            let (id, state) = (child.id, child.state);
            // Section 1.4.1: where both delete at once, "the response ... MUST NOT" name it again.
            if state != ChildState::Deleting {
                own.push(child.spi_in);
            }
            let successor = self.children.iter().find(|next| next.replaces == Some(id));
            if let Some(successor) = successor {
                // The peer sends through the new one from now on, and so does this side.
                if successor.state != ChildState::Refused {
                    core.emit(common.id, Effect::Use(successor.id));
                }
                self.drain(core, now, id);
            } else {
                self.close_child(common, core, id, CloseReason::Peer);
            }
        }
        own
    }

    /// It is replaced and deleted: it stays a little, so that packets that are under way can arrive.
    pub(super) fn drain(&mut self, core: &Core, now: Now, id: ChildId) {
        let at = now.monotonic + core.settings.drain;
        if let Some(child) = self.child(id) {
            child.state = ChildState::Gone;
            child.retire_at = Some(at);
        }
    }

    /// It goes at once.
    pub(super) fn close_child(&mut self, common: &Common, core: &mut Core, id: ChildId, reason: CloseReason) {
        if let Some(at) = self.children.iter().position(|child| child.id == id) {
            let mut child = self.children.swap_remove(at);
            // To those who ask it was up until now, whoever had sent a Delete.
            if child.state == ChildState::Deleting {
                child.state = ChildState::Installed;
            }
            self.remove_child(common, core, &child, reason);
        }
    }

    /// What was drained long enough goes.
    pub(super) fn retire_children(&mut self, common: &Common, core: &mut Core, now: Now) {
        let due = |child: &Child| child.retire_at.is_some_and(|at| at <= now.monotonic);
        while let Some(at) = self.children.iter().position(due) {
            let child = self.children.swap_remove(at);
            self.remove_child(common, core, &child, CloseReason::Replaced);
        }
    }

    /// Sends a Delete for children.
    pub(super) fn delete_children(&mut self, common: &Common, core: &mut Core, now: Now, ids: &[ChildId]) {
        let mut deleted = Vec::new();
        let mut payloads = Vec::new();
        for id in ids {
            let Some(child) = self.child(*id) else { continue };
            if matches!(child.state, ChildState::Deleting | ChildState::Gone) {
                continue;
            }
            // A replaced child goes on receiving until the peer has answered.
            if !matches!(child.state, ChildState::Replaced | ChildState::Refused) {
                child.state = ChildState::Deleting;
            }
            deleted.push(*id);
            payloads.push(Payload::Delete { protocol: child.suite.protocol, spis: vec![child.spi_in] });
        }
        if !deleted.is_empty() {
            self.request(common, core, now, EXCHANGE, &payloads);
            self.ours = Some(Ours::DeleteChildren(deleted));
        }
    }

    /// The peer has answered the Delete.
    pub(super) fn children_deleted(&mut self, common: &Common, core: &mut Core, now: Now, ids: &[ChildId]) {
        for id in ids {
            match self.child(*id).map(|child| child.state) {
                Some(ChildState::Replaced) => self.drain(core, now, *id),
                Some(ChildState::Gone) | None => {}
                Some(_) => self.close_child(common, core, *id, CloseReason::Command),
            }
        }
    }

    /// Sends a Delete for the IKE SA.
    pub(super) fn delete_ike(&mut self, common: &Common, core: &mut Core, now: Now, reason: CloseReason) {
        let payloads = [Payload::Delete { protocol: ProtocolId::IKE, spis: Vec::new() }];
        // First, because an SA that is being deleted is saved as such.
        self.ours = Some(Ours::DeleteIke(reason));
        self.request(common, core, now, EXCHANGE, &payloads);
    }

    /// Closes the IKE SA: at once if nothing is under way, else next.
    pub(super) fn close(&mut self, common: &mut Common, core: &mut Core, now: Now, reason: CloseReason) {
        self.not_before = None;
        let _ = self.take_tasks();
        self.enqueue(common, core, now, Task::DeleteIke(reason));
    }

    /// The datapath has answered.
    pub(super) fn installed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        id: ChildId,
        result: Result<(), String>,
    ) {
        let connection = Arc::clone(&self.connection.name);
        let sa = common.id;
        let Some(child) = self.child(id) else { return };
        let (index, replaces) = (child.index, child.replaces);
        let suite = child.suite.to_string();
        match result {
            Ok(()) => {
                if child.state == ChildState::Installing {
                    child.state = ChildState::Installed;
                }
                let name = self.child_name(index);
                core.counters.children += 1;
                core.report(sa, Report::ChildUp { sa, child: id, connection, name, replaces, suite });
            }
            Err(text) => {
                child.state = ChildState::Refused;
                self.child_failed(common, core, index, crate::report::Failure::Datapath(text));
                self.enqueue(common, core, now, Task::DeleteChild(id));
            }
        }
    }

    /// It stopped at a hard limit: another one takes its place, and it goes.
    pub(super) fn expired(&mut self, common: &mut Common, core: &mut Core, now: Now, id: ChildId) {
        let Some(index) = self.child(id).filter(|child| child.is_current()).map(|child| child.index) else {
            return;
        };
        self.enqueue(common, core, now, Task::DeleteChild(id));
        if self.connection.children.get(index).is_some_and(|child| child.start == Start::Start) {
            self.enqueue(common, core, now, Task::CreateChild(index));
        }
    }

    /// The datapath does not have it any more, so nothing can come through it.
    pub(super) fn lost(&mut self, common: &mut Common, core: &mut Core, now: Now, id: ChildId) {
        let Some(child) = self.child(id) else { return };
        if child.is_current() {
            // A rekey makes a new one with new numbers, and the peer keeps its side of traffic flowing meanwhile.
            child.state = ChildState::Installed;
            self.enqueue(common, core, now, Task::RekeyChild(id));
        } else {
            self.close_child(common, core, id, CloseReason::Replaced);
        }
    }
}
