//! Quick Mode (RFC 2409 section 5.5), with and without perfect forward secrecy.
//!
//! As responder a child is installed before message 2 goes out, and sent through once message 3 has come; as initiator it is
//! installed before message 3 goes out, and, if it replaces another, sent through a moment later: so no packet meets
//! a side that does not have its keys yet.

use core::time::Duration;
use std::time::Instant;

use super::child::{self, Agreed, Keying, expand, from_id, to_id};
use super::established::{Doing, Established, LINGER, Opened, PhaseTwo, repeat};
use super::message::{Exchange, Id, Notify, NotifyKind, Payload, Payloads, Proposal};
use super::phase1::NONCE;
use super::proposal::{self, ChosenChild, Encapsulation};
use super::transaction::Gate;
use super::{Arrived, Common, in_terms_of_v2};
use crate::Secret;
use crate::crypto::ke::KeyExchange;
use crate::endpoint::{Core, Errand, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job, JobId};
use crate::message::TrafficSelector;
use crate::message::registry::{KeMethod, ProtocolId};
use crate::negotiate::{ChildSuite, selector};
use crate::output::ChildId;
use crate::report::{CloseReason, Failure};
use crate::v2::channel::Datagrams;

const QUICK: Exchange = Exchange::QUICK_MODE;

/// How long a successor is installed before it is sent through: the peer installs it when message 3 arrives.
const SETTLE: Duration = Duration::from_millis(300);

/// When a rekey that came to nothing is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Quick Mode that this side began.
pub(super) struct Ours {
    pub(super) index: usize,
    /// The child that it is to replace.
    pub(super) rekey: Option<ChildId>,
    pub(super) spi_in: u32,
    pub(super) job: Option<JobId>,
    suites: Vec<ChildSuite>,
    encapsulation: Encapsulation,
    local_ts: TrafficSelector,
    remote_ts: TrafficSelector,
    ni: Vec<u8>,
    own: Option<KeyExchange>,
    /// Message 2 has come: what is agreed, the peer's nonce, and the message.
    answer: Option<(Agreed, Vec<u8>, Vec<u8>)>,
}

/// Quick Mode that the peer began.
pub(super) struct Theirs {
    pub(super) job: Option<JobId>,
    /// It is installed, and message 2 is out.
    pub(super) child: Option<ChildId>,
    agreed: Agreed,
    answer: Proposal,
    ids: Vec<Id>,
    ni: Vec<u8>,
    nr: Vec<u8>,
    request: Vec<u8>,
}

impl Theirs {
    pub(super) const fn spi_in(&self) -> u32 {
        self.agreed.spi_in
    }
}

impl Established {
    /// Begins Quick Mode for the child `index`; `rekey` is the one that it is to replace.
    pub(super) fn begin_quick_mode(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        index: usize,
        rekey: Option<ChildId>,
    ) {
        let Some(config) = self.connection.children.get(index) else { return };
        let suites = proposal::of_one_group(&proposal::configured_child(&config.proposals));
        let old = self.children.iter().find(|child| Some(child.id) == rekey);
        let selectors = if let Some(old) = old {
            Some((old.local_ts.clone(), old.remote_ts.clone()))
        } else {
            let (own, theirs): (&[_], &[_]) =
                if self.is_client() { (&self.addresses, &[]) } else { (&[], &self.addresses) };
            let local = expand(&config.local_ts, common.path.local.ip(), own).into_iter().next();
            local.zip(expand(&config.remote_ts, common.path.remote.ip(), theirs).into_iter().next())
        };
        let (Some((local_ts, remote_ts)), Some(first)) = (selectors, suites.first()) else {
            let failure = Failure::V1Protocol("configuration", "of the child has no proposal for IKEv1");
            return self.child_failed(common, core, index, failure);
        };
        let group = first.ke;
        let encapsulation = child::encapsulation(common, config);
        let spi_in = core.host.allocate_spi(&mut *core.random);
        let ni = core.random.bytes(NONCE);
        let (own, answer) = (None, None);
        let ours = Ours {
            index,
            rekey,
            spi_in,
            job: None,
            suites,
            encapsulation,
            local_ts,
            remote_ts,
            ni,
            own,
            answer,
        };
        let id = self.new_id(core);
        let mut exchange = PhaseTwo {
            id,
            iv: self.first_iv(id),
            doing: Doing::Over,
            retransmission: None,
            deadline: now.monotonic + 4 * LINGER,
        };
        if group == KeMethod::NONE {
            self.send_first(common, core, now, exchange, ours, None);
        } else {
            let job = Some(core.compute(common.id, Job::Generate(group)));
            exchange.doing = Doing::Ours(Box::new(Ours { job, ..ours }));
            self.exchanges.push(exchange);
        }
    }

    /// Message 1: SA, nonce, KE with perfect forward secrecy, the selectors as identities.
    fn send_first(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        mut exchange: PhaseTwo,
        ours: Ours,
        public: Option<Vec<u8>>,
    ) {
        let life = self.connection.children.get(ours.index).and_then(|child| child.life);
        let offer = proposal::offer_child(&ours.suites, ours.spi_in, ours.encapsulation, life);
        let mut payloads = vec![Payload::Sa(offer), Payload::Nonce(ours.ni.clone())];
        payloads.extend(public.map(Payload::Ke));
        payloads.extend([Payload::Id(to_id(&ours.local_ts)), Payload::Id(to_id(&ours.remote_ts))]);
        let id = exchange.id.to_be_bytes();
        if let Some((message, iv)) = self.seal(common, QUICK, (exchange.id, exchange.iv), &[&id], &payloads) {
            exchange.iv = iv;
            let retransmission = repeat(core, now, message);
            common.send(core, retransmission.datagrams());
            exchange.retransmission = Some(retransmission);
        }
        exchange.doing = Doing::Ours(Box::new(ours));
        self.exchanges.push(exchange);
    }

    pub(super) fn own_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut exchange: PhaseTwo,
        done: Done,
    ) {
        let Doing::Ours(mut ours) = std::mem::replace(&mut exchange.doing, Doing::Over) else { return };
        ours.job = None;
        let failure = match done {
            Done::Generated(Ok((own, public))) => {
                ours.own = Some(own);
                return self.send_first(common, core, now, exchange, *ours, Some(public));
            }
            Done::Agreed(Ok(shared)) => {
                return self.finish(common, core, now, exchange, *ours, Some(&shared));
            }
            _ => Failure::PublicValue,
        };
        exchange.doing = Doing::Ours(ours);
        self.forget(common, core, exchange, failure);
    }

    /// A message of Quick Mode.
    pub(super) fn quick_mode(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Result<(), Ignored> {
        let id = arrived.head.message_id;
        let Some(place) = self.exchanges.iter().position(|exchange| exchange.id == id) else {
            return self.asked(common, core, now, arrived);
        };
        let Some(exchange) = self.exchanges.get(place) else { return Err(Ignored::Exchange) };
        let before = id.to_be_bytes();
        match &exchange.doing {
            Doing::Ours(ours) if ours.job.is_none() && ours.answer.is_none() => {
                let opened = self.open(arrived, exchange.iv, &[&before, &ours.ni])?;
                let exchange = self.exchanges.remove(place);
                self.heard(common, core, now, arrived);
                self.answered(common, core, now, arrived, exchange, &opened);
                Ok(())
            }
            Doing::Theirs(theirs) if theirs.child.is_some() => {
                let covered: [&[u8]; 4] = [&[0], &before, &theirs.ni, &theirs.nr];
                self.open(arrived, exchange.iv, &covered)?;
                let child = theirs.child;
                self.exchanges.remove(place);
                self.heard(common, core, now, arrived);
                self.recent.answered(arrived.datagram, Datagrams::default());
                self.recent.over(id);
                if let Some(child) = child {
                    self.take_into_use(common, core, now, child);
                }
                Ok(())
            }
            _ => Err(Ignored::Busy),
        }
    }

    /// Message 2.
    fn answered(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
        mut exchange: PhaseTwo,
        opened: &Opened,
    ) {
        let Doing::Ours(mut ours) = std::mem::replace(&mut exchange.doing, Doing::Over) else { return };
        exchange.retransmission = None;
        exchange.iv = opened.iv;
        let payloads = Payloads(&opened.chain.payloads);
        let outcome = agree(&ours, payloads);
        match outcome {
            Ok((agreed, nr, public)) => {
                ours.answer = Some((agreed, nr, arrived.datagram.to_vec()));
                match (ours.own.take(), public) {
                    (Some(own), Some(public)) => {
                        ours.job = Some(core.compute(common.id, Job::Agree { own, public }));
                        exchange.doing = Doing::Ours(ours);
                        self.exchanges.push(exchange);
                    }
                    (None, None) => self.finish(common, core, now, exchange, *ours, None),
                    _ => {
                        exchange.doing = Doing::Ours(ours);
                        self.forget(common, core, exchange, Failure::BadChoice);
                    }
                }
            }
            Err(failure) => {
                exchange.doing = Doing::Ours(ours);
                self.forget(common, core, exchange, failure);
            }
        }
    }

    /// Installs the child, and sends message 3.
    fn finish(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        mut exchange: PhaseTwo,
        mut ours: Ours,
        shared: Option<&Secret>,
    ) {
        let Some((agreed, nr, datagram)) = ours.answer.take() else { return };
        let keying = Keying { shared, ni: &ours.ni, nr: &nr };
        let replaces = self.replaced_by_ours(&agreed, ours.rekey);
        let Some(child) = self.install(common, core, now, agreed, &keying, (true, replaces)) else {
            exchange.doing = Doing::Ours(Box::new(ours));
            return self.forget(common, core, exchange, Failure::BadChoice);
        };
        let (id, replaces) = (child.id, child.replaces);
        self.children.push(child);
        let before = exchange.id.to_be_bytes();
        let covered: [&[u8]; 4] = [&[0], &before, &ours.ni, &nr];
        if let Some((message, _)) = self.seal(common, QUICK, (exchange.id, exchange.iv), &covered, &[]) {
            let answer = Datagrams::from(vec![message]);
            common.send(core, &answer);
            self.recent.answered(&datagram, answer);
        }
        exchange.deadline = now.monotonic + LINGER;
        self.exchanges.push(exchange);
        if replaces.is_some()
            && let Some(child) = self.children.iter_mut().find(|child| child.id == id)
        {
            child.use_at = Some(now.monotonic + SETTLE);
        }
        self.pass_on(common, core);
    }

    /// What was made in an IKE SA that has been replaced meanwhile goes to its successor.
    fn pass_on(&self, common: &Common, core: &mut Core) {
        if let Some(to) = self.successor {
            core.errands.push(Errand::Succeed { from: common.id, to, mine: common.initiator });
        }
    }

    /// Message 1 of the peer.
    fn asked(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Result<(), Ignored> {
        let id = arrived.head.message_id;
        if self.recent.has_id(id) {
            return Err(Ignored::MessageId);
        }
        let opened = self.open(arrived, self.first_iv(id), &[&id.to_be_bytes()])?;
        let payloads = Payloads(&opened.chain.payloads);
        let (Some(offered), Some(ni)) = (payloads.sa(), payloads.nonce()) else {
            return Err(Ignored::Legality);
        };
        self.heard(common, core, now, arrived);
        if self.gate != Gate::Open || !self.has_room() {
            return Err(Ignored::Busy);
        }
        let spi = offered.first().map(|proposal| proposal.spi.clone()).unwrap_or_default();
        let (agreed, answer) = match self.choose(common, core, offered, payloads) {
            Ok(agreed) => agreed,
            Err((kind, failure)) => {
                self.recent.over(id);
                self.recent.answered(arrived.datagram, Datagrams::default());
                self.child_failed(common, core, 0, failure);
                let notify = Notify { protocol: ProtocolId::ESP, spi, kind, data: Vec::new() };
                self.send_once(common, core, Exchange::INFORMATIONAL, Payload::Notify(notify));
                return Ok(());
            }
        };
        let mut theirs = Theirs {
            job: None,
            child: None,
            ids: payloads.ids().cloned().collect(),
            ni: ni.clone(),
            nr: core.random.bytes(NONCE),
            request: arrived.datagram.to_vec(),
            answer,
            agreed,
        };
        let exchange = PhaseTwo {
            id,
            iv: opened.iv,
            doing: Doing::Over,
            retransmission: None,
            deadline: now.monotonic + LINGER,
        };
        match (theirs.agreed.suite.ke, payloads.ke()) {
            (KeMethod::NONE, _) => self.answer(common, core, now, exchange, theirs, None),
            (method, Some(public)) => {
                let job = Job::Respond { method, public: public.clone() };
                theirs.job = Some(core.compute(common.id, job));
                self.exchanges.push(PhaseTwo { doing: Doing::Theirs(Box::new(theirs)), ..exchange });
            }
            (_, None) => {
                core.host.release_spi(theirs.agreed.spi_in);
                return Err(Ignored::Legality);
            }
        }
        Ok(())
    }

    /// Which child is meant, and by which suite.
    fn choose(
        &self,
        common: &Common,
        core: &mut Core,
        offered: &[Proposal],
        payloads: Payloads<'_>,
    ) -> Result<(Agreed, Proposal), (NotifyKind, Failure)> {
        let (local, remote) = (common.path.local.ip(), common.path.remote.ip());
        let mut ids = payloads.ids();
        // "If ISAKMP is not acting on behalf of other parties … the identities are implicitly the peers' addresses."
        let (theirs, ours) = match (ids.next(), ids.next()) {
            (Some(theirs), Some(ours)) => (from_id(theirs), from_id(ours)),
            _ => (Some(TrafficSelector::from(remote)), Some(TrafficSelector::from(local))),
        };
        let invalid = |text: &'static str| {
            (NotifyKind::INVALID_ID_INFORMATION, Failure::V1Protocol("Quick Mode", text))
        };
        let (Some(theirs), Some(ours)) = (theirs, ours) else {
            return Err(invalid("has identities that are no addresses"));
        };
        let (own, assigned): (&[_], &[_]) =
            if self.is_client() { (&self.addresses, &[]) } else { (&[], &self.addresses) };
        let (mut fits, mut configured) = (false, Vec::new());
        for (index, config) in self.connection.children.iter().enumerate() {
            let local_ts = expand(&config.local_ts, local, own);
            let remote_ts = expand(&config.remote_ts, remote, assigned);
            let covers = |all: &[TrafficSelector], one| all.iter().any(|outer| selector::covers(outer, one));
            if !covers(&local_ts, &ours) || !covers(&remote_ts, &theirs) {
                configured.push(format!("{} and {}", selector::List(&remote_ts), selector::List(&local_ts)));
                continue;
            }
            fits = true;
            let suites = proposal::configured_child(&config.proposals);
            let wanted = child::encapsulation(common, config);
            let chosen = proposal::choose_child(&suites, offered);
            let Some(chosen) = chosen.filter(|chosen| chosen.encapsulation == wanted) else {
                configured.push(proposal::describe_suites(suites.iter()));
                continue;
            };
            let ChosenChild { suite, encapsulation, spi, life, mut proposal } = chosen;
            let spi_in = core.host.allocate_spi(&mut *core.random);
            proposal.spi = spi_in.to_be_bytes().to_vec();
            let (spi_out, local_ts, remote_ts) = (spi, ours, theirs);
            let agreed = Agreed { index, encapsulation, spi_in, spi_out, suite, local_ts, remote_ts, life };
            return Ok((agreed, proposal));
        }
        let configured = configured.join(", or ");
        Err(if fits {
            let offered = proposal::describe_child(offered);
            (NotifyKind::NO_PROPOSAL_CHOSEN, Failure::NoProposal { offered, configured })
        } else {
            let offered = format!("{theirs} and {ours}");
            (NotifyKind::INVALID_ID_INFORMATION, Failure::Selectors { offered, configured })
        })
    }

    pub(super) fn their_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut exchange: PhaseTwo,
        done: Done,
    ) {
        let Doing::Theirs(mut theirs) = std::mem::replace(&mut exchange.doing, Doing::Over) else { return };
        theirs.job = None;
        if let Done::Responded(Ok((public, shared))) = done {
            self.answer(common, core, now, exchange, *theirs, Some((public, shared)));
        } else {
            exchange.doing = Doing::Theirs(theirs);
            self.forget(common, core, exchange, Failure::PublicValue);
        }
    }

    /// Installs the child, and sends message 2.
    fn answer(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        mut exchange: PhaseTwo,
        mut theirs: Theirs,
        agreement: Option<(Vec<u8>, Secret)>,
    ) {
        let (public, shared) = agreement.unzip();
        let keying = Keying { shared: shared.as_ref(), ni: &theirs.ni, nr: &theirs.nr };
        let replaces = self.replaced_by_theirs(&theirs.agreed);
        let agreed = theirs.agreed.clone();
        let Some(child) = self.install(common, core, now, agreed, &keying, (false, replaces)) else {
            exchange.doing = Doing::Theirs(Box::new(theirs));
            return self.forget(common, core, exchange, Failure::BadChoice);
        };
        theirs.child = Some(child.id);
        self.children.push(child);
        let mut payloads = vec![Payload::Sa(vec![theirs.answer.clone()]), Payload::Nonce(theirs.nr.clone())];
        payloads.extend(public.map(Payload::Ke));
        payloads.extend(theirs.ids.iter().cloned().map(Payload::Id));
        // "HASH(2) = prf(SKEYID_a, M-ID | Ni_b | SA | Nr [ | KE ] [ | IDci | IDcr )"
        let before = exchange.id.to_be_bytes();
        let covered: [&[u8]; 2] = [&before, &theirs.ni];
        if let Some((message, iv)) = self.seal(common, QUICK, (exchange.id, exchange.iv), &covered, &payloads)
        {
            exchange.iv = iv;
            let retransmission = repeat(core, now, message);
            common.send(core, retransmission.datagrams());
            self.recent.answered(&theirs.request, retransmission.datagrams().clone());
            exchange.retransmission = Some(retransmission);
        }
        exchange.doing = Doing::Theirs(Box::new(theirs));
        self.exchanges.push(exchange);
        self.pass_on(common, core);
    }

    /// Message 3 does not come: the child is not to be.
    pub(super) fn give_up(&mut self, common: &Common, core: &mut Core, theirs: &Theirs) {
        match theirs.child {
            None => core.host.release_spi(theirs.agreed.spi_in),
            Some(id) => {
                if let Some(place) = self.children.iter().position(|child| child.id == id) {
                    let child = self.children.remove(place);
                    self.remove_child(common, core, &child, CloseReason::Replaced);
                }
            }
        }
    }

    /// The peer refuses what this side has proposed for a child.
    pub(super) fn refused(&mut self, common: &Common, core: &mut Core, notify: &Notify) {
        let of = |exchange: &PhaseTwo| match &exchange.doing {
            Doing::Ours(ours) => notify.spi.is_empty() || notify.spi == ours.spi_in.to_be_bytes(),
            _ => false,
        };
        let exact = self.exchanges.iter().position(of);
        let any = || self.exchanges.iter().position(|found| matches!(found.doing, Doing::Ours(_)));
        if let Some(place) = exact.or_else(any) {
            let exchange = self.exchanges.remove(place);
            self.forget(common, core, exchange, Failure::Notified(in_terms_of_v2(notify.kind)));
        }
    }

    /// What is due of the children.
    pub(super) fn children_due(&mut self, common: &mut Common, core: &mut Core, now: Now) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now.monotonic);
        let ids: Vec<ChildId> =
            self.children.iter().filter(|child| due(child.deadline())).map(|child| child.id).collect();
        for id in ids {
            let Some(child) = self.children.iter_mut().find(|child| child.id == id) else { continue };
            if due(child.use_at) {
                self.take_into_use(common, core, now, id);
                continue;
            }
            if due(child.rekey_at) && child.is_current() {
                let index = child.index;
                // Again if nothing comes of it; a successor clears it.
                child.rekey_at = Some(now.monotonic + AGAIN);
                if !self.is_being_replaced(id) {
                    self.begin_quick_mode(common, core, now, index, Some(id));
                }
                continue;
            }
            if due(child.retire_at) || due(child.delete_at) || due(child.life_at) {
                let reason = if child.is_current() { CloseReason::Expired } else { CloseReason::Replaced };
                self.delete_child(common, core, now, id, reason);
            }
        }
    }

    /// A child stopped at a hard limit: another one takes its place, and it goes.
    pub(super) fn expired(&mut self, common: &mut Common, core: &mut Core, now: Now, id: ChildId) {
        let child = self.children.iter().find(|child| child.id == id && child.is_current());
        let Some(index) = child.map(|child| child.index) else { return };
        self.delete_child(common, core, now, id, CloseReason::Expired);
        let start = self
            .connection
            .children
            .get(index)
            .is_some_and(|child| child.start == crate::config::Start::Start);
        if start {
            self.want_child(common, core, now, index);
        }
    }
}

/// What message 2 says: the agreement, the peer's nonce and, with PFS, its public value.
type Answer = (Agreed, Vec<u8>, Option<Vec<u8>>);

/// Checks message 2: one of the suites, in the mode that was offered, and selectors within those proposed.
fn agree(ours: &Ours, payloads: Payloads<'_>) -> Result<Answer, Failure> {
    if let Some(error) = payloads.error() {
        return Err(Failure::Notified(in_terms_of_v2(error.kind)));
    }
    let (Some(answer), Some(nr)) = (payloads.sa(), payloads.nonce()) else { return Err(Failure::BadChoice) };
    let chosen = proposal::accept_child(&ours.suites, answer).ok_or(Failure::BadChoice)?;
    if chosen.encapsulation != ours.encapsulation {
        return Err(Failure::BadChoice);
    }
    let mut ids = payloads.ids();
    let (local_ts, remote_ts) = match (ids.next(), ids.next()) {
        (Some(local), Some(remote)) => (from_id(local), from_id(remote)),
        _ => (Some(ours.local_ts.clone()), Some(ours.remote_ts.clone())),
    };
    let fits = |outer: &TrafficSelector, inner: Option<TrafficSelector>| {
        inner.filter(|inner| selector::covers(outer, inner))
    };
    let (Some(local_ts), Some(remote_ts)) =
        (fits(&ours.local_ts, local_ts), fits(&ours.remote_ts, remote_ts))
    else {
        return Err(Failure::V1Protocol("Quick Mode", "has identities that were not proposed"));
    };
    let agreed = Agreed {
        index: ours.index,
        encapsulation: chosen.encapsulation,
        spi_in: ours.spi_in,
        spi_out: chosen.spi,
        suite: chosen.suite,
        local_ts,
        remote_ts,
        life: chosen.life,
    };
    Ok((agreed, nr.clone(), payloads.ke().cloned()))
}
