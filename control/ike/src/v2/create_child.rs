//! CREATE_CHILD_SA for CHILD_SAs: new ones and rekeys, by either side, also both at once (RFC 7296 sections 1.3.1, 1.3.3,
//! 2.8, 2.25.1).

use std::sync::Arc;

use super::agree;
use super::child::{self, Agreed, ChildState, Keying, Proposed};
use super::established::{Established, Ours, Theirs};
use super::followup::{OwnWork, PeerWork, link};
use super::opening::NONCE;
use super::{Common, Task};
use crate::Secret;
use crate::crypto::ke::KeyExchange;
use crate::endpoint::{Core, Now};
use crate::job::{Done, Job, JobId};
use crate::message::legality::{self, Payloads, Phase};
use crate::message::registry::{ExchangeType, KeMethod, NotifyType, ProtocolId};
use crate::message::{KeyExchangeData, Notify, Payload};
use crate::output::ChildId;
use crate::report::Failure;

const EXCHANGE: ExchangeType = ExchangeType::CREATE_CHILD_SA;

/// How often the peer may ask for another key exchange method.
const RETRIES: u8 = 2;

/// This side's exchange.
pub(super) struct NewChild {
    index: usize,
    replaces: Option<ChildId>,
    nonce: Vec<u8>,
    /// Key exchange method, if there is to be one.
    method: Option<KeMethod>,
    own: Option<KeyExchange>,
    proposed: Option<Proposed>,
    phase: ChildPhase,
    retries: u8,
}

enum ChildPhase {
    /// The key pair is being made.
    Generating(JobId),
    /// The request is out.
    Sent,
    /// The secret is being computed: what was agreed, Nr, and the link to further key exchanges.
    Agreeing(JobId, Box<Agreed>, Vec<u8>, Option<Vec<u8>>),
}

/// The peer's exchange, whose secret is being computed.
pub(super) struct ChildRequest {
    pub(super) job: JobId,
    id: u32,
    agreed: Agreed,
    answer: Vec<Payload>,
    ni: Vec<u8>,
    replaces: Option<ChildId>,
}

impl ChildRequest {
    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        core.host.release_spi(self.agreed.spi_in);
    }
}

impl NewChild {
    pub(super) const fn index(&self) -> usize {
        self.index
    }

    /// The job that it waits for.
    pub(super) const fn job(&self) -> Option<JobId> {
        match self.phase {
            ChildPhase::Generating(job) | ChildPhase::Agreeing(job, ..) => Some(job),
            ChildPhase::Sent => None,
        }
    }

    fn task(&self) -> Task {
        self.replaces.map_or(Task::CreateChild(self.index), Task::RekeyChild)
    }

    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        if let Some(proposed) = &self.proposed {
            core.host.release_spi(proposed.spi_in);
        }
    }
}

impl Established {
    /// Whether this side's exchange for a child is under way.
    pub(super) fn is_making_child(&self) -> bool {
        match &self.ours {
            Some(Ours::Child(_)) => true,
            Some(Ours::Followup(followup)) => followup.child().is_some(),
            _ => false,
        }
    }

    /// Begins a CREATE_CHILD_SA exchange.
    pub(super) fn create_child(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        index: usize,
        replaces: Option<ChildId>,
    ) {
        let Some(config) = self.connection.children.get(index) else { return };
        self.unheard.clear();
        let method = agree::first_method(&config.proposals);
        let new = NewChild {
            index,
            replaces,
            nonce: core.random.bytes(NONCE),
            method,
            own: None,
            proposed: None,
            phase: ChildPhase::Sent,
            retries: 0,
        };
        match method {
            Some(method) => self.generate(common, core, new, method),
            None => self.send_child(common, core, now, new, None),
        }
    }

    fn generate(&mut self, common: &Common, core: &mut Core, mut new: NewChild, method: KeMethod) {
        new.method = Some(method);
        new.phase = ChildPhase::Generating(core.compute(common.id, Job::Generate(method)));
        self.ours = Some(Ours::Child(Box::new(new)));
    }

    fn send_child(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        mut new: NewChild,
        public: Option<Vec<u8>>,
    ) {
        let connection = Arc::clone(&self.connection);
        let Some(config) = connection.children.get(new.index) else { return };
        let mut payloads = Vec::new();
        if let Some(id) = new.replaces {
            let Some(old) = self.child(id).filter(|old| old.is_current()) else { return };
            payloads.push(Payload::Notify(Notify {
                protocol: old.suite.protocol,
                spi: old.spi_in.to_be_bytes().to_vec(),
                kind: NotifyType::REKEY_SA,
                data: Vec::new(),
            }));
        }
        new.abandon(core);
        let ends = self.ends(common);
        let (proposed, mut more) = child::propose(core, config, new.index, ends, public.is_some());
        // SA, Ni, [KEi], TSi, TSr
        let selectors = more.split_off(1);
        payloads.append(&mut more);
        payloads.push(Payload::Nonce(new.nonce.clone()));
        if let (Some(data), Some(method)) = (public, new.method) {
            payloads.push(Payload::Ke(KeyExchangeData { method, data }));
        }
        payloads.extend(selectors);
        new.proposed = Some(proposed);
        new.phase = ChildPhase::Sent;
        self.request(common, core, now, EXCHANGE, &payloads);
        self.ours = Some(Ours::Child(Box::new(new)));
    }

    /// A job of this side's exchange is done.
    pub(super) fn own_child_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut new: NewChild,
        done: Done,
    ) {
        match (std::mem::replace(&mut new.phase, ChildPhase::Sent), done) {
            (ChildPhase::Generating(_), Done::Generated(Ok((own, public)))) => {
                new.own = Some(own);
                self.send_child(common, core, now, new, Some(public));
            }
            (ChildPhase::Agreeing(_, agreed, nr, link), Done::Agreed(Ok(secret))) => {
                let methods = agreed.suite.additional.clone();
                match link {
                    Some(link) if !methods.is_empty() => {
                        let what = OwnWork::Child(Box::new(new), agreed, nr);
                        self.follow_up(common, core, what, &methods, secret, link);
                    }
                    _ => self.finish_own(common, core, now, &new, *agreed, &nr, &[&secret]),
                }
            }
            (ChildPhase::Agreeing(..), _) => {
                self.unwanted(common, core, now, &new, Failure::PublicValue);
            }
            _ => {
                let method = new.method.unwrap_or(KeMethod::NONE);
                self.child_failed(common, core, new.index, Failure::KeyExchange(method));
                new.abandon(core);
            }
        }
    }

    /// The peer has answered.
    pub(super) fn child_answered(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut new: NewChild,
        payloads: &Payloads<'_>,
    ) {
        if payloads.sa().is_none()
            && let Some(notify) = payloads.error_notify()
        {
            return self.child_refused(common, core, now, new, notify.kind, &notify.data);
        }
        let connection = Arc::clone(&self.connection);
        let (Some(config), Some(proposed)) = (connection.children.get(new.index), &new.proposed) else {
            return;
        };
        let outcome = proposed.answered(config, payloads);
        let legal = legality::check(EXCHANGE, true, Phase::Later, payloads.0).is_ok();
        let (agreed, nr) = match (outcome, payloads.nonce()) {
            (Ok(agreed), Some(nr)) if legal => (agreed, nr.to_vec()),
            (Err(failure), _) => return self.unwanted(common, core, now, &new, failure),
            (Ok(_), _) => {
                let failure = Failure::Protocol(EXCHANGE, "has not the payloads it needs");
                return self.unwanted(common, core, now, &new, failure);
            }
        };
        if agreed.suite.ke == KeMethod::NONE {
            return self.finish_own(common, core, now, &new, agreed, &nr, &[]);
        }
        let ke = payloads.ke().filter(|ke| ke.method == agreed.suite.ke && new.method == Some(ke.method));
        let link = link(payloads);
        let complete = agreed.suite.additional.is_empty() || link.is_some();
        let (Some(ke), Some(own), true) = (ke, new.own.take(), complete) else {
            return self.unwanted(common, core, now, &new, Failure::BadChoice);
        };
        let job = core.compute(common.id, Job::Agree { own, public: ke.data.clone() });
        new.phase = ChildPhase::Agreeing(job, Box::new(agreed), nr, link);
        self.ours = Some(Ours::Child(Box::new(new)));
    }

    /// The peer refuses.
    fn child_refused(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut new: NewChild,
        kind: NotifyType,
        data: &[u8],
    ) {
        match kind {
            NotifyType::INVALID_KE_PAYLOAD if new.retries < RETRIES => {
                let wanted = data.first_chunk().map(|bytes| KeMethod(u16::from_be_bytes(*bytes)));
                let config = self.connection.children.get(new.index);
                let proposes = |method| config.is_some_and(|child| agree::proposes(&child.proposals, method));
                match wanted {
                    Some(method) if proposes(method) => {
                        new.retries += 1;
                        return self.generate(common, core, new, method);
                    }
                    _ => {
                        let failure = Failure::KeyExchange(wanted.unwrap_or(KeMethod::NONE));
                        self.child_failed(common, core, new.index, failure);
                    }
                }
            }
            NotifyType::TEMPORARY_FAILURE => self.retry(core, now, new.task()),
            NotifyType::CHILD_SA_NOT_FOUND if new.replaces.is_some() => {
                // The peer has it no more. If it did not replace it itself, a new one takes its place.
                if let Some(old) = new.replaces
                    && self.child(old).is_some_and(|old| old.is_current())
                    && !self.children.iter().any(|child| child.replaces == Some(old))
                {
                    self.close_child(common, core, old, crate::report::CloseReason::Replaced);
                    self.enqueue(common, core, now, Task::CreateChild(new.index));
                }
            }
            _ => self.child_failed(common, core, new.index, Failure::Notified(kind)),
        }
        new.abandon(core);
    }

    /// The peer has made what this side does not take: it is told to delete it.
    fn unwanted(&mut self, common: &Common, core: &mut Core, now: Now, new: &NewChild, failure: Failure) {
        if let Some(proposed) = &new.proposed {
            self.delete_unwanted(common, core, now, proposed);
        }
        self.child_failed(common, core, new.index, failure);
        new.abandon(core);
    }

    /// Tells the peer to delete what it has made of a proposal.
    pub(super) fn delete_unwanted(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        proposed: &Proposed,
    ) {
        let payloads = [Payload::Delete { protocol: proposed.protocol(), spis: vec![proposed.spi_in] }];
        self.request(common, core, now, ExchangeType::INFORMATIONAL, &payloads);
        self.ours = Some(Ours::DeleteChildren(Vec::new()));
    }

    /// Both sides have it.
    #[expect(clippy::too_many_arguments, reason = "what an exchange agreed on")]
    pub(super) fn finish_own(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        new: &NewChild,
        agreed: Agreed,
        nr: &[u8],
        secrets: &[&Secret],
    ) {
        if self.unheard.contains(&agreed.spi_out) {
            // The peer's Delete was faster than its answer.
            self.child_failed(common, core, new.index, Failure::Cancelled);
            return new.abandon(core);
        }
        let ours = lower(&new.nonce, nr);
        // Section 2.8.1: both sides rekeyed the same child. "the SA created with the lowest of the four nonces SHOULD be
        // closed by the endpoint that created it".
        let rival = self.children.iter().find(|child| {
            child.replaces.is_some() && child.replaces == new.replaces && child.nonce.is_some()
        });
        let rival = rival.map(|child| (child.id, child.nonce.as_deref() > Some(ours)));
        let redundant = rival.is_some_and(|(_, lost)| lost);
        let keying = Keying { derivation: &self.keys, secrets, ni: &new.nonce, nr, initiator: true };
        let leases = self.leases().to_vec();
        let replaces = new.replaces.filter(|_| !redundant);
        let made = child::install(
            common,
            core,
            now,
            &self.connection,
            agreed,
            &keying,
            replaces,
            !redundant,
            &leases,
        );
        let Some(mut made) = made else { return };
        let id = made.id;
        if redundant {
            made.state = ChildState::Replaced;
            made.rekey_at = None;
        }
        self.children.push(made);
        if redundant {
            self.enqueue(common, core, now, Task::DeleteChild(id));
            return;
        }
        if let Some((rival, _)) = rival
            && let Some(rival) = self.child(rival)
        {
            // The peer deletes it.
            rival.state = ChildState::Replaced;
            rival.replaces = None;
            rival.rekey_at = None;
        }
        if let Some(old) = new.replaces {
            core.counters.children_rekeyed += 1;
            if let Some(old) = self.child(old).filter(|old| old.state != ChildState::Gone) {
                old.state = ChildState::Replaced;
                old.rekey_at = None;
                self.enqueue(common, core, now, Task::DeleteChild(new.replaces.unwrap_or(id)));
            }
        }
    }

    /// A CREATE_CHILD_SA request of the peer.
    pub(super) fn create_child_request(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        id: u32,
        payloads: &Payloads<'_>,
    ) {
        if legality::check(EXCHANGE, false, Phase::Later, payloads.0).is_err() {
            return self.refuse_request(common, core, id, Notify::new(NotifyType::INVALID_SYNTAX, []));
        }
        let of_ike = payloads.sa().and_then(|offered| offered.first());
        if of_ike.is_some_and(|proposal| proposal.protocol == ProtocolId::IKE) {
            return self.rekey_ike_request(common, core, id, payloads);
        }
        // Section 2.25.2: while the IKE SA itself is rekeyed or closed.
        if self.is_closing() || self.peer_rekey.is_some() || self.is_rekeying() {
            return self.refuse_request(common, core, id, Notify::new(NotifyType::TEMPORARY_FAILURE, []));
        }
        let mut replaces = None;
        let mut only = None;
        if let Some(rekey) = payloads.notify(NotifyType::REKEY_SA) {
            let spi = rekey.spi.as_slice().try_into().ok().map(u32::from_be_bytes);
            let found = self
                .children
                .iter()
                .find(|child| Some(child.spi_out) == spi && child.suite.protocol == rekey.protocol);
            match found.map(|child| (child.id, child.index, child.state)) {
                Some((id, index, ChildState::Installed | ChildState::Installing)) => {
                    replaces = Some(id);
                    only = Some(index);
                }
                Some((.., ChildState::Deleting | ChildState::Replaced | ChildState::Refused)) => {
                    let notify = Notify::new(NotifyType::TEMPORARY_FAILURE, []);
                    return self.refuse_request(common, core, id, notify);
                }
                // It may be what the answer on its way to this side has made.
                None if self.is_making_child() => {
                    let notify = Notify::new(NotifyType::TEMPORARY_FAILURE, []);
                    return self.refuse_request(common, core, id, notify);
                }
                Some((.., ChildState::Gone)) | None => {
                    let notify =
                        Notify { kind: NotifyType::CHILD_SA_NOT_FOUND, data: Vec::new(), ..rekey.clone() };
                    return self.refuse_request(common, core, id, notify);
                }
            }
        }
        let connection = Arc::clone(&self.connection);
        let answered = child::answer(core, &connection, payloads, self.ends(common), only, true);
        let (agreed, answer) = match answered {
            Ok(found) => found,
            Err(refused) => {
                self.child_failed(common, core, only.unwrap_or(0), refused.failure);
                return self.refuse_request(common, core, id, refused.notify);
            }
        };
        let Some(ni) = payloads.nonce().map(<[u8]>::to_vec) else { return };
        let method = agreed.suite.ke;
        if method == KeMethod::NONE {
            let request = ChildRequest { job: JobId(0), id, agreed, answer, ni, replaces };
            return self.finish_theirs(common, core, now, request, None);
        }
        match payloads.ke() {
            Some(ke) if ke.method == method => {
                let job = core.compute(common.id, Job::Respond { method, public: ke.data.clone() });
                let request = ChildRequest { job, id, agreed, answer, ni, replaces };
                self.theirs = Some(Theirs::Child(Box::new(request)));
            }
            _ => {
                core.host.release_spi(agreed.spi_in);
                let notify = Notify::new(NotifyType::INVALID_KE_PAYLOAD, method.0.to_be_bytes());
                self.refuse_request(common, core, id, notify);
            }
        }
    }

    /// The secret for the peer's exchange is there.
    pub(super) fn child_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        request: ChildRequest,
        done: Done,
    ) {
        if let Done::Responded(Ok(exchanged)) = done {
            self.finish_theirs(common, core, now, request, Some(exchanged));
        } else {
            core.host.release_spi(request.agreed.spi_in);
            self.child_failed(common, core, request.agreed.index, Failure::PublicValue);
            let notify = Notify::new(NotifyType::INVALID_SYNTAX, []);
            self.refuse_request(common, core, request.id, notify);
        }
    }

    fn finish_theirs(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut request: ChildRequest,
        exchanged: Option<(Vec<u8>, Secret)>,
    ) {
        let id = request.id;
        // Section 2.25.1: this side's own rekey was faster, and the old one is being closed.
        let gone = |id| self.children.iter().all(|child| child.id != id || !child.is_current());
        if request.replaces.is_some_and(gone) {
            core.host.release_spi(request.agreed.spi_in);
            return self.refuse_request(common, core, id, Notify::new(NotifyType::TEMPORARY_FAILURE, []));
        }
        let nr = core.random.bytes(NONCE);
        let (method, additional) = (request.agreed.suite.ke, request.agreed.suite.additional.clone());
        let mut answer = std::mem::take(&mut request.answer);
        let selectors = answer.split_off(1);
        answer.push(Payload::Nonce(nr.clone()));
        let (public, secret) = exchanged.unzip();
        if let Some(data) = public {
            answer.push(Payload::Ke(KeyExchangeData { method, data }));
        }
        answer.extend(selectors);
        match secret {
            Some(secret) if !additional.is_empty() => {
                let work = PeerWork::Child(Box::new(request), nr);
                answer.push(self.expect_followup(core, work, &additional, secret));
            }
            secret => {
                let secrets: Vec<&Secret> = secret.iter().collect();
                if !self.commit_theirs(common, core, now, request, &nr, &secrets) {
                    let notify = Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, []);
                    return self.refuse_request(common, core, id, notify);
                }
            }
        }
        let datagrams = self.respond(common, core, EXCHANGE, id, &answer);
        common.send(core, &datagrams);
    }

    /// Installs what the peer's exchange made. Whether its suite is implemented.
    pub(super) fn commit_theirs(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        request: ChildRequest,
        nr: &[u8],
        secrets: &[&Secret],
    ) -> bool {
        let ChildRequest { agreed, ni, replaces, .. } = request;
        let keying = Keying { derivation: &self.keys, secrets, ni: &ni, nr, initiator: false };
        let leases = self.leases().to_vec();
        // A new one is used at once; of a rekeyed one the peer says by its Delete when it listens to the new one.
        let in_use = replaces.is_none();
        let made =
            child::install(common, core, now, &self.connection, agreed, &keying, replaces, in_use, &leases);
        let Some(mut made) = made else { return false };
        if let Some(old) = replaces {
            core.counters.children_rekeyed += 1;
            made.nonce = Some(lower(&ni, nr).into());
            if let Some(old) = self.child(old) {
                old.rekey_at = None;
            }
        }
        self.children.push(made);
        true
    }

    /// Answers a CREATE_CHILD_SA request with an error.
    pub(super) fn refuse_request(&mut self, common: &Common, core: &mut Core, id: u32, notify: Notify) {
        let datagrams = self.respond(common, core, EXCHANGE, id, &[Payload::Notify(notify)]);
        common.send(core, &datagrams);
    }
}

/// The lower of two nonces, octet by octet.
pub(super) fn lower<'a>(a: &'a [u8], b: &'a [u8]) -> &'a [u8] {
    if a < b { a } else { b }
}
