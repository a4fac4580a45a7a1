//! Aggressive mode (RFC 2409 sections 5.1 and 5.4): phase 1 in three messages, where a connection switches it on.
//!
//! ```text
//! SA, KE, Ni, IDii ─►
//!                  ◄─ SA, KE, Nr, IDir, [CERT,] HASH_R or SIG_R, NAT-D
//! (NAT-D, [CERT,] HASH_I or SIG_I) ─►
//! ```
//!
//! Its price: both identities are in the clear; with a shared secret whoever begins learns HASH_R, and may try guesses of the
//! secret on it at leisure; and the responder computes before it has seen that the initiator is where it says, so that it
//! does not while many IKE SAs are half-open.

use std::sync::Arc;

use super::fragments::Fragments;
use super::keys::Exchanged;
use super::message::{Exchange, Head, Id, Kind, NotifyKind, Payload, Payloads, parse};
use super::phase1::{self, Judged, Keyed, NONCE};
use super::proposal;
use super::recent::Recent;
use super::responder::{self, Refusal, Responding};
use super::{Arrived, Common, IkeSa, Nat, Next, State, initiator, nat};
use crate::auth::identity::Identity;
use crate::config::{Connection, LocalAuth, RemoteAuth, Unique};
use crate::crypto::ke::KeyExchange;
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::IkeSpi;
use crate::output::Path;
use crate::report::Failure;
use crate::v1::established::{Established, Proven};
use crate::v1::initiator::Initiating;
use crate::v1::message::Proposal;
use crate::v1::proposal::Phase1;

const AGGRESSIVE: Exchange = Exchange::AGGRESSIVE;

/// Where the initiator is.
pub(super) enum Asking {
    /// The key pair is being made.
    Generating,
    /// Message 1 is out.
    Offered { own: KeyExchange, public: Vec<u8>, nonce: Vec<u8> },
    /// Message 2 has come, and the secret is being computed.
    Agreeing { answer: Answer, suite: Phase1, public: (Vec<u8>, Vec<u8>), nonces: (Vec<u8>, Vec<u8>) },
    /// The peer's signature is being checked.
    Verifying(Box<Proved>),
    /// This side's signature is being made.
    Signing(Box<Proved>),
}

/// Message 2.
pub(super) struct Answer {
    datagram: Vec<u8>,
    payloads: Vec<Payload>,
}

/// The peer is known, with the datagram that says so.
pub(super) struct Proved {
    keyed: Keyed,
    remote_id: Identity,
    datagram: Vec<u8>,
}

/// Where the responder is.
pub(super) enum Answering {
    /// The secret is being computed.
    Agreeing(Box<Asked>),
    /// This side's signature is being made.
    Signing(Box<Half>),
    /// Message 2 is out.
    Answered(Box<Half>),
    /// Message 3 has come, and the peer's signature is being checked.
    Verifying(Box<Half>, Identity),
}

/// Message 1.
pub(super) struct Asked {
    connection: Arc<Connection>,
    answer: Vec<Proposal>,
    id: Id,
    public: Vec<u8>,
    nonce: Vec<u8>,
}

/// What is known when message 2 goes out.
pub(super) struct Half {
    connection: Arc<Connection>,
    answer: Vec<Proposal>,
    /// The peer's identity.
    id: Id,
    keyed: Keyed,
    first_contact: bool,
}

/// Whether a connection has it switched on.
pub(super) fn is_on(connection: &Connection) -> bool {
    connection.v1.as_ref().is_some_and(|v1| v1.aggressive)
}

fn psk(connection: &Connection) -> Option<&crate::Secret> {
    match &connection.local_auth {
        LocalAuth::Psk(secret) => Some(secret),
        _ => None,
    }
}

impl Initiating {
    /// Message 2, if it is that.
    pub(super) fn aggressively_answered(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
        asking: Asking,
    ) -> Next {
        let Asking::Offered { own, public, nonce } = asking else {
            self.step = initiator::Step::Aggressive(asking);
            common.ignore(core, now, arrived.path, Ignored::Busy);
            return Ok(State::Initiating(self));
        };
        let payloads = phase1::read_clear(arrived, AGGRESSIVE, Kind::SA).unwrap_or_default();
        let found = Payloads(&payloads);
        let parts = found.sa().zip(found.ke()).zip(found.nonce());
        let Some(((answer, theirs), their_nonce)) = parts.filter(|_| arrived.head.cookie_r != IkeSpi::NONE)
        else {
            common.ignore(core, now, arrived.path, Ignored::Legality);
            self.step = initiator::Step::Aggressive(Asking::Offered { own, public, nonce });
            return Ok(State::Initiating(self));
        };
        let suite = proposal::accept_phase_1(&self.suites, answer).ok_or(Failure::BadChoice)?;
        common.cookie_r = arrived.head.cookie_r;
        common.peer = phase1::abilities(found);
        let cookies = (common.cookie_i, common.cookie_r);
        if let Some(nat) = Nat::detect(suite.hash, cookies, found, arrived.path) {
            initiator::found_nat(common, core, nat);
        }
        self.retransmission = None;
        self.refusal = None;
        core.compute(common.id, Job::Agree { own, public: theirs.clone() });
        let (public, nonces) = ((public, theirs.clone()), (nonce, their_nonce.clone()));
        let answer = Answer { datagram: arrived.datagram.to_vec(), payloads };
        self.step = initiator::Step::Aggressive(Asking::Agreeing { answer, suite, public, nonces });
        Ok(State::Initiating(self))
    }

    /// A job is done.
    pub(super) fn aggressively_computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        connection: Arc<Connection>,
        (asking, done): (Asking, Done),
    ) -> Next {
        match (asking, done) {
            (Asking::Generating, Done::Generated(result)) => {
                let group = self.suites.first().map(|suite| suite.group).ok_or(Failure::BadChoice)?;
                let (own, public) = result.map_err(|_| Failure::KeyExchange(group))?;
                let nonce = core.random.bytes(NONCE);
                let offer = proposal::offer_phase_1(&self.suites, initiator::life(&connection));
                let mut payloads = vec![
                    Payload::Sa(offer),
                    Payload::Ke(public.clone()),
                    Payload::Nonce(nonce.clone()),
                    Payload::Id(phase1::id_payload(&connection.local_id)),
                ];
                payloads.extend(phase1::certificate_requests(&connection));
                let xauth = phase1::method(&connection).is_some_and(|method| method != method.base());
                payloads.extend(phase1::vendor_ids(xauth));
                let message = phase1::clear(common, AGGRESSIVE, &payloads);
                self.send(common, core, now, message);
                self.step = initiator::Step::Aggressive(Asking::Offered { own, public, nonce });
                Ok(State::Initiating(self))
            }
            (Asking::Agreeing { answer, suite, public, nonces }, Done::Agreed(result)) => {
                let with = Exchanged {
                    cookies: (common.cookie_i, common.cookie_r),
                    public,
                    nonces,
                    shared: result.map_err(|_| Failure::PublicValue)?,
                    sa_i: std::mem::take(&mut self.sa_i),
                };
                let keyed = Keyed::new(suite, psk(&connection), with).ok_or(Failure::BadChoice)?;
                let Answer { datagram, payloads } = answer;
                match phase1::judge(common, core, now, &keyed, &connection, Payloads(&payloads))? {
                    Judged::Good(remote_id) => {
                        let proved = Box::new(Proved { keyed, remote_id, datagram });
                        self.prove_aggressively(common, core, now, connection, proved)
                    }
                    Judged::Checking(remote_id) => {
                        let proved = Box::new(Proved { keyed, remote_id, datagram });
                        self.step = initiator::Step::Aggressive(Asking::Verifying(proved));
                        Ok(State::Initiating(self))
                    }
                }
            }
            (Asking::Verifying(proved), Done::Verified(result)) => {
                result?;
                self.prove_aggressively(common, core, now, connection, proved)
            }
            (Asking::Signing(proved), Done::Signed(result)) => {
                let signature = result.map_err(|error| Failure::Signing(error.to_string()))?;
                let proof = Payload::Sig(signature.data);
                self.conclude(common, core, now, connection, *proved, proof)
            }
            (asking, _) => {
                self.step = initiator::Step::Aggressive(asking);
                Ok(State::Initiating(self))
            }
        }
    }

    fn prove_aggressively(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        connection: Arc<Connection>,
        proved: Box<Proved>,
    ) -> Next {
        if let Some(proof) = phase1::prove(common, core, &proved.keyed, &connection)? {
            return self.conclude(common, core, now, connection, *proved, proof);
        }
        self.step = initiator::Step::Aggressive(Asking::Signing(proved));
        Ok(State::Initiating(self))
    }

    /// Message 3, which nothing answers: a copy of message 2 gets it again.
    fn conclude(
        self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        connection: Arc<Connection>,
        proved: Proved,
        proof: Payload,
    ) -> Next {
        let Proved { mut keyed, remote_id, datagram } = proved;
        // All but the identity, which message 1 has.
        let mut payloads = phase1::identified(&connection, proof).split_off(1);
        let cookies = (common.cookie_i, common.cookie_r);
        if common.peer.nat_t {
            let pretend = connection.force_encap;
            payloads.extend(nat::payloads(keyed.suite.hash, cookies, common.path, pretend));
        }
        let known = core.peers.keys().any(|(name, _)| *name == connection.name);
        if connection.unique != Unique::Never && !known {
            payloads.push(phase1::initial_contact(cookies));
        }
        let message = keyed.seal(AGGRESSIVE, &payloads).ok_or(Failure::BadChoice)?;
        let mut recent = Recent::default();
        recent.answered(&datagram, vec![message.clone()].into());
        let proven = Proven {
            keyed,
            connection,
            remote_id,
            first_contact: false,
            half_open_key: None,
            life: None,
            recent,
            last: Some(message),
        };
        Ok(State::Established(Box::new(Established::new(common, core, now, proven, self.wanted))))
    }
}

impl IkeSa {
    /// Answers message 1, which admission let in; `busy`: so many are half-open that nothing may be computed for it.
    pub(super) fn respond_aggressively(
        core: &mut Core,
        now: Now,
        path: Path,
        (head, datagram, body): (Head, &[u8], &[u8]),
        busy: bool,
    ) -> Result<Self, Refusal> {
        let chain = parse::chain(Kind::SA, body)?;
        let payloads = Payloads(&chain.payloads);
        let parts = payloads.sa().zip(payloads.ke()).zip(payloads.nonce()).zip(payloads.id());
        let Some((((offered, public), nonce), id)) = parts else { return Err(Ignored::Legality.into()) };
        let candidates = core.connections.candidates(path.local.ip(), path.remote.ip(), true);
        if candidates.is_empty() {
            return Err(Ignored::NoConnection.into());
        }
        let identity = phase1::identity(id);
        let fits = candidates.iter().filter(|connection| connection.remote_id.matches(&identity));
        let connection = fits.filter(|connection| is_on(connection)).reduce(|best, other| {
            if other.remote_id.specificity() > best.remote_id.specificity() { other } else { best }
        });
        let Some(connection) = connection.cloned() else {
            let failure = if candidates.iter().any(|connection| is_on(connection)) {
                Failure::NoConnection { identity: identity.to_string(), address: path.remote.ip() }
            } else {
                Failure::V1Protocol(
                    "aggressive mode",
                    "is asked for, and not switched on (`aggressive = true`)",
                )
            };
            return Err(Refusal { failure: Some(failure), ..Refusal::default() });
        };
        if busy {
            return Err(Ignored::HalfOpen.into());
        }
        let method = phase1::method(&connection);
        let suites = method
            .map(|method| proposal::configured_phase_1(&connection.proposals, method))
            .unwrap_or_default();
        let Some((suite, answer, life)) = proposal::choose_phase_1(&suites, offered) else {
            return Err(responder::no_proposal(head, offered, &suites));
        };
        let (sa, cookie_r) = core.new_sa();
        core.counters.responded += 1;
        core.admission.opened(path.remote.ip());
        let common = Common {
            id: sa,
            initiator: false,
            cookie_i: head.cookie_i,
            cookie_r,
            path,
            // Its name would say that it is on its way up, which anyone can claim.
            connection: None,
            nat: Nat::default(),
            peer: phase1::abilities(payloads),
            born: now.monotonic,
            admitted: Some(path.remote.ip()),
            fragments: Fragments::default(),
        };
        core.compute(sa, Job::Respond { method: suite.group, public: public.clone() });
        let (id, public, nonce) = (id.clone(), public.clone(), nonce.clone());
        let asked = Asked { connection, answer, id, public, nonce };
        let state = Responding {
            key: (path.remote.ip(), path.remote.port(), head.cookie_i),
            deadline: now.monotonic + core.settings.half_open_timeout,
            request: datagram.to_vec(),
            response: Vec::new(),
            suite,
            life,
            sa_i: responder::first_body(&chain, body),
            recent: Recent::default(),
            step: responder::Step::Aggressive(Answering::Agreeing(Box::new(asked))),
        };
        Ok(Self { common, state: State::Responding(Box::new(state)) })
    }
}

impl Responding {
    /// A job is done.
    pub(super) fn aggressively_computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        (answering, done): (Answering, Done),
    ) -> Next {
        match (answering, done) {
            (Answering::Agreeing(asked), Done::Responded(result)) => {
                let Asked { connection, answer, id, public, nonce } = *asked;
                let (own, shared) = result.map_err(|_| Failure::PublicValue)?;
                let with = Exchanged {
                    cookies: (common.cookie_i, common.cookie_r),
                    public: (public, own),
                    nonces: (nonce, core.random.bytes(NONCE)),
                    shared,
                    sa_i: std::mem::take(&mut self.sa_i),
                };
                let keyed = Keyed::new(self.suite, psk(&connection), with).ok_or(Failure::BadChoice)?;
                let half = Box::new(Half { connection, answer, id, keyed, first_contact: false });
                match phase1::prove(common, core, &half.keyed, &half.connection)? {
                    Some(proof) => self.answer_aggressively(common, core, half, proof),
                    None => self.step = responder::Step::Aggressive(Answering::Signing(half)),
                }
                Ok(State::Responding(self))
            }
            (Answering::Signing(half), Done::Signed(result)) => {
                let signature = result.map_err(|error| Failure::Signing(error.to_string()))?;
                self.answer_aggressively(common, core, half, Payload::Sig(signature.data));
                Ok(State::Responding(self))
            }
            (Answering::Verifying(half, remote_id), Done::Verified(result)) => {
                result?;
                Ok(self.conclude(common, core, now, *half, remote_id))
            }
            (answering, _) => {
                self.step = responder::Step::Aggressive(answering);
                Ok(State::Responding(self))
            }
        }
    }

    /// Message 2.
    fn answer_aggressively(&mut self, common: &Common, core: &mut Core, half: Box<Half>, proof: Payload) {
        let Half { connection, answer, keyed, .. } = &*half;
        let Exchanged { public: (_, own), nonces: (_, nonce), cookies, .. } = &keyed.with;
        let mut payloads =
            vec![Payload::Sa(answer.clone()), Payload::Ke(own.clone()), Payload::Nonce(nonce.clone())];
        payloads.extend(phase1::identified(connection, proof));
        if matches!(connection.remote_auth, RemoteAuth::Certificate(_)) {
            payloads.extend(phase1::certificate_requests(connection));
        }
        if common.peer.nat_t {
            let pretend = connection.force_encap;
            payloads.extend(nat::payloads(keyed.suite.hash, *cookies, common.path, pretend));
        }
        payloads.extend(phase1::vendor_ids(keyed.suite.method != keyed.suite.method.base()));
        self.response = phase1::clear(common, AGGRESSIVE, &payloads);
        common.send(core, &vec![self.response.clone()].into());
        self.step = responder::Step::Aggressive(Answering::Answered(half));
    }

    /// Message 3, if it is that.
    pub(super) fn aggressively_proved(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
        answering: Answering,
    ) -> Next {
        let Answering::Answered(mut half) = answering else {
            self.step = responder::Step::Aggressive(answering);
            common.ignore(core, now, arrived.path, Ignored::Busy);
            return Ok(State::Responding(self));
        };
        let opened = half.keyed.open(arrived);
        let opened = opened.filter(|_| arrived.head.encrypted && arrived.head.exchange == AGGRESSIVE);
        let judged = opened.map(|(mut chain, iv)| {
            chain.payloads.retain(|payload| !matches!(payload, Payload::Id(_)));
            chain.payloads.push(Payload::Id(half.id.clone()));
            let payloads = Payloads(&chain.payloads);
            let judged = phase1::judge(common, core, now, &half.keyed, &half.connection, payloads);
            (judged, chain.payloads, iv)
        });
        let (judged, payloads, iv) = match judged {
            Some((Ok(judged), payloads, iv)) => (judged, payloads, iv),
            // With the wrong secret it is noise, which anyone can send.
            None | Some((Err(Failure::SharedSecret(_)), ..)) => {
                common.ignore(core, now, arrived.path, Ignored::Integrity);
                self.step = responder::Step::Aggressive(Answering::Answered(half));
                return Ok(State::Responding(self));
            }
            Some((Err(failure), ..)) => return Err(failure),
        };
        let payloads = Payloads(&payloads);
        half.keyed.iv = iv;
        half.first_contact = payloads.has_notify(NotifyKind::INITIAL_CONTACT);
        let cookies = (common.cookie_i, common.cookie_r);
        if let Some(nat) = Nat::detect(self.suite.hash, cookies, payloads, arrived.path) {
            common.nat = nat;
        }
        common.path = arrived.path;
        self.recent.answered(arrived.datagram, crate::v2::channel::Datagrams::default());
        match judged {
            Judged::Good(remote_id) => Ok(self.conclude(common, core, now, *half, remote_id)),
            Judged::Checking(remote_id) => {
                self.step = responder::Step::Aggressive(Answering::Verifying(half, remote_id));
                Ok(State::Responding(self))
            }
        }
    }

    fn conclude(
        self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        half: Half,
        remote_id: Identity,
    ) -> State {
        let Self { key, life, recent, .. } = *self;
        let Half { connection, keyed, first_contact, .. } = half;
        common.connection = Some(Arc::clone(&connection));
        let half_open_key = Some(key);
        let last = None;
        let proven =
            Proven { keyed, connection, remote_id, first_contact, half_open_key, life, recent, last };
        State::Established(Box::new(Established::new(common, core, now, proven, Vec::new())))
    }
}
