//! Informational exchanges (RFC 2409 section 5.7): deletes, notifications, and whether the peer is alive (RFC 3706).

use super::child::ChildState;
use super::delete::delete_message;
use super::established::{Alive, Dpd, Established};
use super::message::{Exchange, Notify, NotifyKind, Payload};
use super::{Arrived, Common};
use crate::endpoint::{Core, Errand, Now};
use crate::ignored::Ignored;
use crate::message::registry::ProtocolId;
use crate::output::ChildId;
use crate::report::CloseReason;
use crate::v2::channel::Datagrams;

const INFORMATIONAL: Exchange = Exchange::INFORMATIONAL;

impl Established {
    /// A message of the peer; nothing of it is answered but R-U-THERE.
    pub(super) fn informational(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Result<Alive, Ignored> {
        let id = arrived.head.message_id;
        if self.recent.has_id(id) {
            return Err(Ignored::MessageId);
        }
        let opened = self.open(arrived, self.first_iv(id), &[&id.to_be_bytes()])?;
        self.heard(common, core, now, arrived);
        self.recent.over(id);
        for payload in &opened.chain.payloads {
            match payload {
                Payload::Delete { protocol: ProtocolId::IKE, spis } if spis.contains(&common.cookies()) => {
                    return Ok(self.deleted_by_peer(common, core));
                }
                Payload::Delete { protocol: ProtocolId::IKE, .. } => {}
                Payload::Delete { spis, .. } => {
                    let number = |spi: &Vec<u8>| spi.as_slice().try_into().ok().map(u32::from_be_bytes);
                    let spis: Vec<u32> = spis.iter().filter_map(number).collect();
                    self.peer_deleted(common, core, now, &spis);
                }
                Payload::Notify(notify) => self.notified(common, core, notify),
                _ => {}
            }
        }
        Ok(Alive::Yes)
    }

    fn notified(&mut self, common: &Common, core: &mut Core, notify: &Notify) {
        match notify.kind {
            NotifyKind::R_U_THERE if notify.spi == common.cookies() => {
                let ack = Notify { kind: NotifyKind::R_U_THERE_ACK, ..notify.clone() };
                self.send_once(common, core, INFORMATIONAL, Payload::Notify(ack));
            }
            NotifyKind::INITIAL_CONTACT => {
                self.first_contact = true;
                self.forget_others(common, core);
            }
            kind if kind.0 < 16384 => self.refused(common, core, notify),
            // What is heard is enough of an answer to R-U-THERE; CONNECTED and lifetimes need none.
            _ => {}
        }
    }

    /// The peer does not have these children any more. Those that another IKE SA took over are that one's matter.
    pub(super) fn peer_deleted(&mut self, common: &Common, core: &mut Core, now: Now, spis: &[u32]) {
        let mut others = Vec::new();
        for spi in spis {
            let Some(place) = self.children.iter().position(|child| child.spi_out == *spi) else {
                others.push(*spi);
                continue;
            };
            let Some(child) = self.children.get_mut(place) else { continue };
            if child.is_current() {
                let child = self.children.remove(place);
                let reason = self.revive(common, core, now, &child);
                self.remove_child(common, core, &child, reason);
            } else if child.state == ChildState::Replaced {
                child.drain(core, now);
            }
        }
        if let Some(sa) = self.successor.filter(|_| !others.is_empty()) {
            core.errands.push(Errand::PeerDeleted { sa, spis: others });
        }
    }

    /// Takes a child out, and tells the peer if that does not know.
    pub(super) fn delete_child(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        id: ChildId,
        reason: CloseReason,
    ) {
        let Some(place) = self.children.iter().position(|child| child.id == id) else { return };
        let mut child = self.children.remove(place);
        if child.state != ChildState::Gone {
            let spis = vec![child.spi_in.to_be_bytes().to_vec()];
            let delete = Payload::Delete { protocol: child.suite.protocol, spis };
            self.send_once(common, core, INFORMATIONAL, delete);
        }
        if child.state == ChildState::Replaced && reason == CloseReason::Replaced {
            // The peer may have sent through it until now.
            child.drain(core, now);
            return self.children.push(child);
        }
        self.remove_child(common, core, &child, reason);
    }

    /// Tells the peer that the IKE SA and its children are gone; it does not answer.
    pub(super) fn say_goodbye(&mut self, common: &Common, core: &mut Core, _: Now) {
        if self.deleted {
            return;
        }
        let spis = |protocol| {
            let of = self
                .children
                .iter()
                .filter(move |child| child.suite.protocol == protocol && child.state != ChildState::Gone);
            of.map(|child| child.spi_in.to_be_bytes().to_vec()).collect::<Vec<_>>()
        };
        for (protocol, spis) in [ProtocolId::ESP, ProtocolId::AH].map(|protocol| (protocol, spis(protocol))) {
            if !spis.is_empty() {
                self.send_once(common, core, INFORMATIONAL, Payload::Delete { protocol, spis });
            }
        }
        let id = self.new_id(core);
        if let Ok(message) = delete_message(&self.saved(common), id) {
            common.send(core, &Datagrams::from(vec![message]));
        }
    }

    /// RFC 3706: asks whether the peer is alive, if it knows the question.
    pub(super) fn check_peer(&mut self, common: &Common, core: &mut Core, now: Now) {
        if !common.peer.dpd || self.dpd.is_some() {
            return;
        }
        self.dpd_sequence = self.dpd_sequence.wrapping_add(1);
        let wait = core.settings.retransmit.first;
        self.dpd = Some(Dpd { sequence: self.dpd_sequence, tries: 1, wait, due: now.monotonic + wait });
        self.ask(common, core);
    }

    fn ask(&mut self, common: &Common, core: &mut Core) {
        let Some(Dpd { sequence, .. }) = self.dpd else { return };
        let notify = Notify {
            protocol: ProtocolId::IKE,
            spi: common.cookies(),
            kind: NotifyKind::R_U_THERE,
            data: sequence.to_be_bytes().to_vec(),
        };
        self.send_once(common, core, INFORMATIONAL, Payload::Notify(notify));
    }

    /// Asks when nothing was heard for long, and asks again; `false` if the peer is dead. Each question is a message of its
    /// own: copies of one are not answered again.
    pub(super) fn still_there(&mut self, common: &Common, core: &mut Core, now: Now) -> bool {
        if self.successor.is_some() {
            return true;
        }
        match &mut self.dpd {
            Some(dpd) if dpd.due <= now.monotonic => {
                let policy = core.settings.retransmit;
                if dpd.tries >= policy.tries {
                    return false;
                }
                dpd.tries += 1;
                dpd.wait = dpd.wait.mul_f32(policy.factor);
                dpd.due = now.monotonic + dpd.wait;
                core.counters.retransmitted += 1;
                self.ask(common, core);
            }
            None if self.connection.dpd.is_some_and(|after| self.heard + after <= now.monotonic) => {
                if common.peer.dpd {
                    self.check_peer(common, core, now);
                } else {
                    // Nothing can be asked: the next time to look is as far away.
                    self.heard = now.monotonic;
                }
            }
            _ => {}
        }
        true
    }
}
