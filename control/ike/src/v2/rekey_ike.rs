//! Rekeying the IKE SA itself (RFC 7296 sections 1.3.2, 2.18, 2.8.2, 2.25.2).
//!
//! The successor takes over the children as soon as it is certain which one that is: where both sides rekey at once, the
//! IKE SA that was made with the lowest of the four nonces is deleted by the side that began it.

use core::time::Duration;
use std::sync::Arc;

use super::agree;
use super::channel::{Channel, ChannelConfig};
use super::create_child::lower;
use super::established::{Alive, Established, Ours, Theirs};
use super::followup::{OwnWork, PeerWork, link};
use super::half_open::fragment_size;
use super::opening::NONCE;
use super::{Common, IkeSa, State, Task};
use crate::Secret;
use crate::crypto::ke::KeyExchange;
use crate::crypto::keys::Seed;
use crate::endpoint::{Core, Errand, Now};
use crate::job::{Done, Job, JobId};
use crate::message::legality::Payloads;
use crate::message::registry::{ExchangeType, KeMethod, NotifyType, ProtocolId};
use crate::message::{IkeSpi, KeyExchangeData, Notify, Payload, Proposal};
use crate::negotiate::IkeSuite;
use crate::negotiate::proposal::offer;
use crate::output::SaId;
use crate::report::{CloseReason, Report};

const EXCHANGE: ExchangeType = ExchangeType::CREATE_CHILD_SA;

/// An IKE SA whose peer has deleted it waits this long for the end of its own rekey.
const LOST: Duration = Duration::from_secs(10);

/// An IKE SA that was replaced stays this long, if the peer does not delete it.
const REPLACED: Duration = Duration::from_mins(5);

/// An IKE SA that was made by a rekey and is not to be stays this long, if the peer does not delete it.
const REDUNDANT: Duration = Duration::from_secs(30);

/// How often the peer may ask for another key exchange method.
const RETRIES: u8 = 2;

/// This side's exchange.
pub(super) struct NewIke {
    /// The successor: its name and the SPI of this side.
    successor: (SaId, IkeSpi),
    nonce: Vec<u8>,
    method: KeMethod,
    own: Option<KeyExchange>,
    phase: Phase,
    retries: u8,
}

enum Phase {
    Generating(JobId),
    Sent,
    Agreeing { job: JobId, answered: Answered, link: Option<Vec<u8>> },
}

/// What the peer agreed to.
pub(super) struct Answered {
    suite: IkeSuite,
    spi_r: IkeSpi,
    nr: Vec<u8>,
}

/// The peer's exchange, whose secret is being computed.
pub(super) struct IkeRequest {
    pub(super) job: JobId,
    id: u32,
    suite: IkeSuite,
    answer: Proposal,
    spi_i: IkeSpi,
    ni: Vec<u8>,
    /// The successor: its name and the SPI of this side.
    successor: (SaId, IkeSpi),
}

/// The peer has rekeyed while this side's exchange was under way.
pub(super) struct PeerRekey {
    successor: SaId,
    nonce: Vec<u8>,
}

impl IkeRequest {
    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        core.release_sa(self.successor);
    }
}

impl NewIke {
    /// The job that it waits for.
    pub(super) const fn job(&self) -> Option<JobId> {
        match &self.phase {
            Phase::Generating(job) | Phase::Agreeing { job, .. } => Some(*job),
            Phase::Sent => None,
        }
    }

    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        core.release_sa(self.successor);
    }
}

impl Established {
    /// Begins the exchange.
    pub(super) fn rekey_ike(&mut self, common: &Common, core: &mut Core) {
        let successor = core.new_sa();
        let nonce = core.random.bytes(NONCE);
        let method = agree::first_method(&self.connection.proposals).unwrap_or(self.suite.ke);
        self.generate_ike(common, core, successor, nonce, method, 0);
    }

    fn generate_ike(
        &mut self,
        common: &Common,
        core: &mut Core,
        successor: (SaId, IkeSpi),
        nonce: Vec<u8>,
        method: KeMethod,
        retries: u8,
    ) {
        let phase = Phase::Generating(core.compute(common.id, Job::Generate(method)));
        let new = NewIke { successor, nonce, method, own: None, phase, retries };
        self.ours = Some(Ours::Ike(Box::new(new)));
    }

    /// A job of this side's exchange is done.
    pub(super) fn own_ike_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut new: NewIke,
        done: Done,
    ) {
        match (std::mem::replace(&mut new.phase, Phase::Sent), done) {
            (Phase::Generating(_), Done::Generated(Ok((own, public)))) => {
                new.own = Some(own);
                let spi = new.successor.1.0.to_be_bytes();
                let payloads = [
                    Payload::Sa(offer(&self.connection.proposals, &spi)),
                    Payload::Nonce(new.nonce.clone()),
                    Payload::Ke(KeyExchangeData { method: new.method, data: public }),
                ];
                self.request(common, core, now, EXCHANGE, &payloads);
                self.ours = Some(Ours::Ike(Box::new(new)));
            }
            (Phase::Agreeing { answered, link, .. }, Done::Agreed(Ok(secret))) => {
                let methods = answered.suite.additional.clone();
                match link {
                    Some(link) if !methods.is_empty() => {
                        let what = OwnWork::Ike(Box::new(new), answered);
                        self.follow_up(common, core, what, &methods, secret, link);
                    }
                    _ => self.finish_own_ike(common, core, now, &new, answered, &[&secret]),
                }
            }
            _ => self.ike_failed(common, core, now, &new),
        }
    }

    /// It did not work; it is tried again before the IKE SA expires.
    pub(super) fn ike_failed(&mut self, common: &mut Common, core: &mut Core, now: Now, new: &NewIke) {
        new.abandon(core);
        if self.lost {
            return;
        }
        if let Some(rekeyed) = self.peer_rekey.take() {
            // The peer's rekey stands.
            self.hand_over_to(common, core, now, rekeyed.successor);
            return;
        }
        if self.expires_at.is_some() {
            self.rekey_at = Some(now.monotonic + Duration::from_secs(10));
        }
    }

    fn hand_over_to(&mut self, common: &Common, core: &mut Core, now: Now, successor: SaId) {
        core.counters.ike_rekeyed += 1;
        core.report(common.id, Report::Rekeyed { old: common.id, new: successor });
        let estate = self.hand_over(common);
        // The side that began the rekey deletes it, and has as long for that as an answer may take to arrive.
        self.expires_at = Some(now.monotonic + REPLACED);
        core.errands.push(Errand::Inherit { sa: successor, estate: Box::new(estate) });
    }

    /// The peer has answered.
    pub(super) fn ike_answered(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut new: NewIke,
        payloads: &Payloads<'_>,
    ) {
        if payloads.sa().is_none()
            && let Some(notify) = payloads.error_notify()
        {
            let wanted = notify.data.first_chunk().map(|bytes| KeMethod(u16::from_be_bytes(*bytes)));
            match (notify.kind, wanted) {
                (NotifyType::INVALID_KE_PAYLOAD, Some(method)) if new.retries < RETRIES && !self.lost => {
                    let retries = new.retries + 1;
                    self.generate_ike(common, core, new.successor, new.nonce, method, retries);
                }
                (NotifyType::TEMPORARY_FAILURE, _) if self.peer_rekey.is_none() => {
                    new.abandon(core);
                    self.retry(core, now, Task::RekeyIke);
                }
                _ => self.ike_failed(common, core, now, &new),
            }
            return;
        }
        let proposals = offer(&self.connection.proposals, &[]);
        let chosen = payloads.sa().and_then(|answer| {
            let spi = answer.first()?.spi.as_slice().try_into().ok().map(u64::from_be_bytes)?;
            Some((agree::accepts_ike(&proposals, answer)?, IkeSpi(spi)))
        });
        let own = new.own.take();
        let link = link(payloads);
        match (chosen, payloads.ke(), payloads.nonce(), own) {
            (Some((suite, spi_r)), Some(ke), Some(nr), Some(own))
                if ke.method == suite.ke
                    && suite.ke == new.method
                    && spi_r != IkeSpi::NONE
                    && (suite.additional.is_empty() || link.is_some()) =>
            {
                let job = core.compute(common.id, Job::Agree { own, public: ke.data.clone() });
                new.phase =
                    Phase::Agreeing { job, answered: Answered { suite, spi_r, nr: nr.to_vec() }, link };
                self.ours = Some(Ours::Ike(Box::new(new)));
            }
            _ => self.ike_failed(common, core, now, &new),
        }
    }

    /// Both sides have it.
    pub(super) fn finish_own_ike(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        new: &NewIke,
        answered: Answered,
        secrets: &[&Secret],
    ) {
        let Answered { suite, spi_r, nr } = answered;
        let (id, spi_i) = new.successor;
        let spis = (spi_i, spi_r);
        let Some(made) = self.successor(common, core, now, id, true, spis, suite, secrets, (&new.nonce, &nr))
        else {
            return self.ike_failed(common, core, now, new);
        };
        core.born.push(made.into());
        let ours = lower(&new.nonce, &nr);
        match self.peer_rekey.take() {
            // The peer's took over already.
            _ if self.lost => core.errands.push(Errand::Supersede { sa: id, silently: false }),
            // Ours has the lowest nonce: it goes, and the peer's takes over. The peer deletes this one.
            Some(rekeyed) if ours < rekeyed.nonce.as_slice() => {
                core.errands.push(Errand::Supersede { sa: id, silently: false });
                self.hand_over_to(common, core, now, rekeyed.successor);
            }
            rekeyed => {
                // The peer deletes the one that it began.
                core.errands.extend(rekeyed.map(|rekeyed| Errand::Redundant { sa: rekeyed.successor }));
                self.hand_over_to(common, core, now, id);
                self.enqueue(common, core, now, Task::DeleteIke(CloseReason::Replaced));
            }
        }
    }

    /// The peer has deleted the IKE SA.
    pub(super) fn deleted(&mut self, common: &Common, core: &mut Core, now: Now) -> Alive {
        if let Some(rekeyed) = self.peer_rekey.take() {
            // Both sides have rekeyed, and the peer, which has both answers, knows that its own is the one that stays.
            self.hand_over_to(common, core, now, rekeyed.successor);
            let begun =
                !matches!(&self.ours, Some(Ours::Ike(new)) if matches!(new.phase, Phase::Generating(_)));
            if begun {
                // What the peer has made for this side's exchange has to be deleted, once it is known here.
                self.lost = true;
                self.expires_at = Some(now.monotonic + LOST);
                return Alive::Yes;
            }
        }
        Alive::No(if self.replaced { CloseReason::Replaced } else { CloseReason::Peer })
    }

    /// The peer wants to rekey the IKE SA.
    pub(super) fn rekey_ike_request(
        &mut self,
        common: &Common,
        core: &mut Core,
        id: u32,
        payloads: &Payloads<'_>,
    ) {
        // Section 2.25.2: not while children are being made or deleted, or this SA is on its way out.
        let busy = matches!(self.ours, Some(Ours::Child(_) | Ours::DeleteChildren(_) | Ours::DeleteIke(_)))
            || matches!(&self.ours, Some(Ours::Followup(followup)) if followup.child().is_some());
        if busy || self.replaced || self.peer_rekey.is_some() {
            return self.refuse_request(common, core, id, Notify::new(NotifyType::TEMPORARY_FAILURE, []));
        }
        let (Some(offered), Some(ke), Some(ni)) = (payloads.sa(), payloads.ke(), payloads.nonce()) else {
            return self.refuse_request(common, core, id, Notify::new(NotifyType::INVALID_SYNTAX, []));
        };
        let Some((suite, answer)) = agree::choose_ike(&self.connection.proposals, offered) else {
            return self.refuse_request(common, core, id, Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, []));
        };
        let spi_i = answer.spi.as_slice().try_into().ok().map(u64::from_be_bytes).map(IkeSpi);
        let Some(spi_i) = spi_i.filter(|spi| *spi != IkeSpi::NONE) else {
            return self.refuse_request(common, core, id, Notify::new(NotifyType::INVALID_SYNTAX, []));
        };
        if ke.method != suite.ke {
            let notify = Notify::new(NotifyType::INVALID_KE_PAYLOAD, suite.ke.0.to_be_bytes());
            return self.refuse_request(common, core, id, notify);
        }
        let job = core.compute(common.id, Job::Respond { method: suite.ke, public: ke.data.clone() });
        let successor = core.new_sa();
        let request = IkeRequest { job, id, suite, answer, spi_i, ni: ni.to_vec(), successor };
        self.theirs = Some(Theirs::Ike(Box::new(request)));
    }

    /// The secret for the peer's exchange is there.
    pub(super) fn ike_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        request: IkeRequest,
        done: Done,
    ) {
        let message_id = request.id;
        let Done::Responded(Ok((public, secret))) = done else {
            core.release_sa(request.successor);
            let notify = Notify::new(NotifyType::INVALID_SYNTAX, []);
            return self.refuse_request(common, core, message_id, notify);
        };
        if self.replaced {
            // This side's own rekey was faster, and the old one is being closed (section 2.25.2).
            core.release_sa(request.successor);
            let notify = Notify::new(NotifyType::TEMPORARY_FAILURE, []);
            return self.refuse_request(common, core, message_id, notify);
        }
        let nr = core.random.bytes(NONCE);
        let spi = request.successor.1.0.to_be_bytes().to_vec();
        let (method, additional) = (request.suite.ke, request.suite.additional.clone());
        let mut payloads = vec![
            Payload::Sa(vec![Proposal { spi, protocol: ProtocolId::IKE, ..request.answer.clone() }]),
            Payload::Nonce(nr.clone()),
            Payload::Ke(KeyExchangeData { method, data: public }),
        ];
        if additional.is_empty() {
            if !self.commit_their_ike(common, core, now, request, &nr, &[&secret]) {
                let notify = Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, []);
                return self.refuse_request(common, core, message_id, notify);
            }
        } else {
            let work = PeerWork::Ike(Box::new(request), nr);
            payloads.push(self.expect_followup(core, work, &additional, secret));
        }
        let datagrams = self.respond(common, core, EXCHANGE, message_id, &payloads);
        common.send(core, &datagrams);
    }

    /// Makes the successor that the peer wants. Whether its suite is implemented.
    pub(super) fn commit_their_ike(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        request: IkeRequest,
        nr: &[u8],
        secrets: &[&Secret],
    ) -> bool {
        let IkeRequest { suite, spi_i, ni, successor, .. } = request;
        let (id, spi_r) = successor;
        if self.replaced {
            core.release_sa(successor);
            return false;
        }
        let made = self.successor(common, core, now, id, false, (spi_i, spi_r), suite, secrets, (&ni, nr));
        let Some(made) = made else {
            core.release_sa(successor);
            return false;
        };
        core.born.push(made.into());
        if self.is_rekeying() {
            // Which of the two stays is known when the peer has answered ours.
            self.peer_rekey = Some(PeerRekey { successor: id, nonce: lower(&ni, nr).to_vec() });
        } else {
            self.hand_over_to(common, core, now, id);
        }
        true
    }

    /// Whether this side's own rekey of the IKE SA is under way.
    pub(super) fn is_rekeying(&self) -> bool {
        match &self.ours {
            Some(Ours::Ike(_)) => true,
            Some(Ours::Followup(followup)) => followup.child().is_none(),
            _ => false,
        }
    }

    /// The new IKE SA, without children yet.
    #[expect(clippy::too_many_arguments, reason = "all that an IKE SA is made of")]
    fn successor(
        &self,
        common: &Common,
        core: &mut Core,
        now: Now,
        id: SaId,
        initiator: bool,
        (spi_i, spi_r): (IkeSpi, IkeSpi),
        suite: IkeSuite,
        secrets: &[&Secret],
        (ni, nr): (&[u8], &[u8]),
    ) -> Option<IkeSa> {
        let keys = self.keys.rekey(&suite, secrets, &Seed { nonce_i: ni, nonce_r: nr, spi_i, spi_r })?;
        core.host.note_keys(&suite, (spi_i, spi_r), &keys);
        let fragmentation = common.peer.fragmentation && self.connection.fragmentation;
        let config = ChannelConfig {
            initiator,
            spi_i,
            spi_r,
            fragment_size: fragmentation.then(|| fragment_size(core.settings.fragment_size, common.path)),
            retransmit: core.settings.retransmit,
            next_request: 0,
            expected_request: 0,
        };
        let channel = Channel::new(&config, &keys)?;
        let old = common.id;
        let common = Common {
            id,
            initiator,
            spi_i,
            spi_r,
            path: common.path,
            connection: common.connection.clone(),
            nat: common.nat,
            peer: common.peer.clone(),
            born: now.monotonic,
            admitted: None,
        };
        let mut established = Self::begin(
            core,
            now,
            Arc::clone(&self.connection),
            channel,
            keys.derivation,
            suite,
            self.remote_id.clone(),
            Vec::new(),
        );
        established.schedule_keepalive(&common, core, now);
        // The peer has it, or has it when the answer that the old one sends next arrives there.
        established.persist_for(old, &common, core, &self.children);
        Some(IkeSa { common, state: State::Established(Box::new(established)) })
    }
}

impl IkeSa {
    /// It is not to be; the peer has a little time to say so itself.
    pub(crate) fn expire_soon(&mut self, now: Now) {
        if let State::Established(state) = &mut self.state {
            state.rekey_at = None;
            state.expires_at = Some(now.monotonic + REDUNDANT);
        }
    }

    /// Takes over the children of the SA that it replaces.
    pub(crate) fn inherit(&mut self, core: &mut Core, now: Now, estate: super::established::Estate) {
        if let State::Established(state) = &mut self.state {
            state.inherit(&mut self.common, core, now, estate);
            state.pump(&mut self.common, core, now);
        }
    }
}
