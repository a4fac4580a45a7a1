//! IKE_FOLLOWUP_KE: the additional key exchanges of a CREATE_CHILD_SA exchange (RFC 9370 section 2.2.4), each in an
//! exchange of its own, tied to the first by a link that the responder chose.

use super::Common;
use super::child::Agreed;
use super::create_child::{ChildRequest, NewChild};
use super::established::{Established, Ours, Theirs};
use super::rekey_ike::{Answered, IkeRequest, NewIke};
use crate::Secret;
use crate::crypto::ke::KeyExchange;
use crate::endpoint::{Core, Now};
use crate::job::{Done, Job, JobId};
use crate::message::legality::Payloads;
use crate::message::registry::{ExchangeType, KeMethod, NotifyType};
use crate::message::{KeyExchangeData, Notify, Payload};
use crate::negotiate::Additional;
use crate::report::Failure;

const EXCHANGE: ExchangeType = ExchangeType::IKE_FOLLOWUP_KE;

/// Length of the links that this side chooses.
const LINK: usize = 8;

/// This side's key exchanges.
pub(super) struct OwnFollowup {
    what: OwnWork,
    methods: Additional,
    /// Secrets so far, that of CREATE_CHILD_SA first.
    secrets: Vec<Secret>,
    link: Vec<u8>,
    job: Option<JobId>,
    own: Option<KeyExchange>,
}

/// What they are for.
pub(super) enum OwnWork {
    /// A CHILD_SA: the exchange, what was agreed, and Nr.
    Child(Box<NewChild>, Box<Agreed>, Vec<u8>),
    /// The IKE SA itself.
    Ike(Box<NewIke>, Answered),
}

/// The peer's key exchanges.
pub(super) struct PeerFollowup {
    work: PeerWork,
    methods: Additional,
    secrets: Vec<Secret>,
    link: Vec<u8>,
}

/// What they are for.
pub(super) enum PeerWork {
    /// A CHILD_SA, and Nr.
    Child(Box<ChildRequest>, Vec<u8>),
    /// The IKE SA itself, and Nr.
    Ike(Box<IkeRequest>, Vec<u8>),
}

/// A key exchange of the peer whose secret is being computed.
pub(super) struct FollowupRequest {
    pub(super) job: JobId,
    id: u32,
    followup: Box<PeerFollowup>,
}

impl PeerFollowup {
    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        match &self.work {
            PeerWork::Child(request, _) => request.abandon(core),
            PeerWork::Ike(request, _) => request.abandon(core),
        }
    }
}

impl FollowupRequest {
    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        self.followup.abandon(core);
    }
}

/// The link in a message of the peer.
pub(super) fn link(payloads: &Payloads<'_>) -> Option<Vec<u8>> {
    payloads.notify(NotifyType::ADDITIONAL_KEY_EXCHANGE).map(|notify| notify.data.clone())
}

fn link_payload(link: &[u8]) -> Payload {
    Payload::Notify(Notify::new(NotifyType::ADDITIONAL_KEY_EXCHANGE, link))
}

impl OwnFollowup {
    /// The job that it waits for.
    pub(super) const fn job(&self) -> Option<JobId> {
        self.job
    }

    /// The configured child, if it is about one.
    pub(super) fn child(&self) -> Option<usize> {
        match &self.what {
            OwnWork::Child(new, ..) => Some(new.index()),
            OwnWork::Ike(..) => None,
        }
    }

    /// It comes to nothing.
    pub(super) fn abandon(&self, core: &mut Core) {
        match &self.what {
            OwnWork::Child(new, ..) => new.abandon(core),
            OwnWork::Ike(new, _) => new.abandon(core),
        }
    }
}

impl Established {
    /// The first secret is there and more are to come.
    pub(super) fn follow_up(
        &mut self,
        common: &Common,
        core: &mut Core,
        what: OwnWork,
        methods: &Additional,
        secret: Secret,
        link: Vec<u8>,
    ) {
        let followup =
            OwnFollowup { what, methods: methods.clone(), secrets: vec![secret], link, job: None, own: None };
        self.next_method(common, core, followup);
    }

    fn next_method(&mut self, common: &Common, core: &mut Core, mut followup: OwnFollowup) {
        if let Some(method) = followup.methods.first() {
            followup.job = Some(core.compute(common.id, Job::Generate(*method)));
            self.ours = Some(Ours::Followup(Box::new(followup)));
        }
    }

    /// A job of this side's is done.
    pub(super) fn own_followup_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut followup: OwnFollowup,
        done: Done,
    ) {
        followup.job = None;
        match done {
            Done::Generated(Ok((own, data))) => {
                let method = followup.methods.first().copied().unwrap_or(KeMethod::NONE);
                let payloads = [Payload::Ke(KeyExchangeData { method, data }), link_payload(&followup.link)];
                self.request(common, core, now, EXCHANGE, &payloads);
                followup.own = Some(own);
                self.ours = Some(Ours::Followup(Box::new(followup)));
            }
            Done::Agreed(Ok(secret)) => {
                followup.secrets.push(secret);
                followup.methods.remove(0);
                if !followup.methods.is_empty() {
                    return self.next_method(common, core, followup);
                }
                let secrets: Vec<&Secret> = followup.secrets.iter().collect();
                match followup.what {
                    OwnWork::Child(new, agreed, nr) => {
                        self.finish_own(common, core, now, &new, *agreed, &nr, &secrets);
                    }
                    OwnWork::Ike(new, answered) => {
                        self.finish_own_ike(common, core, now, &new, answered, &secrets);
                    }
                }
            }
            _ => self.followup_failed(common, core, now, followup, Failure::PublicValue),
        }
    }

    /// The peer has answered.
    pub(super) fn followup_answered(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        mut followup: OwnFollowup,
        payloads: &Payloads<'_>,
    ) {
        let method = followup.methods.first().copied();
        let ke = payloads.ke().filter(|ke| Some(ke.method) == method);
        let (Some(ke), Some(own)) = (ke, followup.own.take()) else {
            let failure = payloads
                .error_notify()
                .map_or(Failure::Protocol(EXCHANGE, "has not the key exchange"), |notify| {
                    Failure::Notified(notify.kind)
                });
            return self.followup_failed(common, core, now, followup, failure);
        };
        if followup.methods.len() > 1 {
            followup.link = link(payloads).unwrap_or_default();
        }
        followup.job = Some(core.compute(common.id, Job::Agree { own, public: ke.data.clone() }));
        self.ours = Some(Ours::Followup(Box::new(followup)));
    }

    fn followup_failed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        followup: OwnFollowup,
        failure: Failure,
    ) {
        match followup.what {
            OwnWork::Child(new, ..) => {
                self.child_failed(common, core, new.index(), failure);
                new.abandon(core);
            }
            OwnWork::Ike(new, _) => self.ike_failed(common, core, now, &new),
        }
    }

    /// The answer to CREATE_CHILD_SA says that more key exchanges are to come.
    pub(super) fn expect_followup(
        &mut self,
        core: &mut Core,
        work: PeerWork,
        methods: &Additional,
        secret: Secret,
    ) -> Payload {
        let link = core.random.bytes(LINK);
        let payload = link_payload(&link);
        let methods = methods.clone();
        if let Some(older) = self.expected.take() {
            older.abandon(core);
        }
        self.expected = Some(Box::new(PeerFollowup { work, methods, secrets: vec![secret], link }));
        payload
    }

    /// An IKE_FOLLOWUP_KE request.
    pub(super) fn followup_request(
        &mut self,
        common: &Common,
        core: &mut Core,
        id: u32,
        payloads: &Payloads<'_>,
    ) {
        let refuse = |this: &mut Self, core: &mut Core, kind| {
            let notify = [Payload::Notify(Notify::new(kind, []))];
            let answer = this.respond(common, core, EXCHANGE, id, &notify);
            common.send(core, &answer);
        };
        let link = link(payloads);
        let Some(followup) = self.expected.take_if(|expected| Some(&expected.link) == link.as_ref()) else {
            return refuse(self, core, NotifyType::STATE_NOT_FOUND);
        };
        match payloads.ke() {
            Some(ke) if Some(&ke.method) == followup.methods.first() => {
                let job = Job::Respond { method: ke.method, public: ke.data.clone() };
                let job = core.compute(common.id, job);
                self.theirs = Some(Theirs::Followup(Box::new(FollowupRequest { job, id, followup })));
            }
            _ => refuse(self, core, NotifyType::INVALID_SYNTAX),
        }
    }

    /// The secret for it is there.
    pub(super) fn followup_computed(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        request: FollowupRequest,
        done: Done,
    ) {
        let FollowupRequest { id, mut followup, .. } = request;
        let Done::Responded(Ok((data, secret))) = done else {
            let notify = [Payload::Notify(Notify::new(NotifyType::INVALID_SYNTAX, []))];
            let answer = self.respond(common, core, EXCHANGE, id, &notify);
            return common.send(core, &answer);
        };
        let method = followup.methods.first().copied().unwrap_or(KeMethod::NONE);
        let mut answer = vec![Payload::Ke(KeyExchangeData { method, data })];
        followup.secrets.push(secret);
        followup.methods.remove(0);
        if followup.methods.is_empty() {
            let secrets: Vec<&Secret> = followup.secrets.iter().collect();
            let made = match followup.work {
                PeerWork::Child(request, nr) => {
                    self.commit_theirs(common, core, now, *request, &nr, &secrets)
                }
                PeerWork::Ike(request, nr) => {
                    self.commit_their_ike(common, core, now, *request, &nr, &secrets)
                }
            };
            if !made {
                answer = vec![Payload::Notify(Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, []))];
            }
        } else {
            followup.link = core.random.bytes(LINK);
            answer.push(link_payload(&followup.link));
            self.expected = Some(followup);
        }
        let datagrams = self.respond(common, core, EXCHANGE, id, &answer);
        common.send(core, &datagrams);
    }
}
