//! Phase 1 as responder; main mode (RFC 2409 sections 5.1 and 5.4).
//!
//! Nothing is computed before message 3 has shown, with this side's cookie in it, that the initiator is where it says. Which
//! shared secret is meant is known only from the identity in message 5, which is encrypted with it: all that the
//! address allows are tried.

use core::net::IpAddr;
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use super::aggressive::Answering;
use super::established::{Established, Proven};
use super::fragments::Fragments;
use super::keys::Exchanged;
use super::message::parse;
use super::message::{Exchange, Head, Kind, Notify, NotifyKind, Payload, Payloads, Proposal, emit};
use super::phase1::{self, Judged, Keyed, NONCE};
use super::proposal::{self, Phase1};
use super::recent::Recent;
use super::{Arrived, Common, IkeSa, Nat, Next, State, nat};
use crate::Secret;
use crate::auth::identity::Identity;
use crate::config::{Connection, LocalAuth, RemoteAuth};
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::IkeSpi;
use crate::message::registry::ProtocolId;
use crate::output::{Effect, Path};
use crate::report::Failure;

const MAIN: Exchange = Exchange::IDENTITY_PROTECTION;

/// Most shared secrets that are tried on one message.
const SECRETS: usize = 32;

/// Phase 1 is going on.
pub(super) struct Responding {
    pub(super) key: (IpAddr, u16, IkeSpi),
    pub(super) deadline: Instant,
    /// Message 1, whose copies get message 2 again.
    pub(super) request: Vec<u8>,
    /// Message 2; empty until it is out.
    pub(super) response: Vec<u8>,
    pub(super) suite: Phase1,
    /// The lifetime that the initiator offered.
    pub(super) life: Option<Duration>,
    pub(super) sa_i: Vec<u8>,
    pub(super) recent: Recent,
    pub(super) step: Step,
}

/// Where it is.
pub(super) enum Step {
    /// Aggressive mode.
    Aggressive(Answering),
    /// Message 2 is out.
    Answered,
    /// The secret is being computed; the peer's public value and nonce.
    Agreeing { datagram: Vec<u8>, public: Vec<u8>, nonce: Vec<u8> },
    /// Message 4 is out.
    Exchanged(Box<Exchanged>),
    /// The peer's signature is being checked.
    Verifying(Box<Identified>),
    /// This side's signature is being made.
    Signing(Box<Identified>),
}

/// Message 5 has been read.
pub(super) struct Identified {
    keyed: Keyed,
    remote_id: Identity,
    first_contact: bool,
    datagram: Vec<u8>,
}

/// A first message leads to nothing.
#[derive(Debug, Default)]
pub(crate) struct Refusal {
    /// The answer, unprotected.
    pub(crate) answer: Option<Vec<u8>>,
    /// For people.
    pub(crate) failure: Option<Failure>,
    /// The counter.
    pub(crate) ignored: Option<Ignored>,
}

impl From<Ignored> for Refusal {
    fn from(reason: Ignored) -> Self {
        Self { ignored: Some(reason), ..Self::default() }
    }
}

impl IkeSa {
    /// Answers message 1, which admission let in; `busy`: only if nothing is to be computed for it.
    pub(crate) fn respond(
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        busy: bool,
    ) -> Result<Self, Refusal> {
        let (head, first, body) = parse::message(datagram)?;
        if head.encrypted || head.message_id != 0 || first != Kind::SA || head.cookie_i == IkeSpi::NONE {
            return Err(Ignored::Legality.into());
        }
        if head.exchange == Exchange::AGGRESSIVE {
            return Self::respond_aggressively(core, now, path, (head, datagram, body), busy);
        }
        if head.exchange != MAIN {
            return Err(Ignored::Exchange.into());
        }
        let chain = parse::chain(first, body)?;
        let payloads = Payloads(&chain.payloads);
        let Some(offered) = payloads.sa() else { return Err(Ignored::Legality.into()) };
        let candidates = core.connections.candidates(path.local.ip(), path.remote.ip(), true);
        if candidates.is_empty() {
            return Err(Ignored::NoConnection.into());
        }
        let mut suites = Vec::new();
        for connection in &candidates {
            if let Some(method) = phase1::method(connection) {
                suites.extend(proposal::configured_phase_1(&connection.proposals, method));
            }
        }
        let Some((suite, answer, life)) = proposal::choose_phase_1(&suites, offered) else {
            return Err(no_proposal(head, offered, &suites));
        };
        let (id, cookie_r) = core.new_sa();
        core.counters.responded += 1;
        core.admission.opened(path.remote.ip());
        let common = Common {
            id,
            initiator: false,
            cookie_i: head.cookie_i,
            cookie_r,
            path,
            connection: None,
            nat: Nat::default(),
            peer: phase1::abilities(payloads),
            born: now.monotonic,
            admitted: Some(path.remote.ip()),
            fragments: Fragments::default(),
        };
        let mut more = vec![Payload::Sa(answer)];
        more.extend(phase1::vendor_ids(suite.method != suite.method.base()));
        let response = phase1::clear(&common, MAIN, &more);
        core.emit(id, Effect::Transmit { path, datagram: response.clone() });
        let state = Responding {
            key: (path.remote.ip(), path.remote.port(), head.cookie_i),
            deadline: now.monotonic + core.settings.half_open_timeout,
            request: datagram.to_vec(),
            response,
            suite,
            life,
            sa_i: first_body(&chain, body),
            recent: Recent::default(),
            step: Step::Answered,
        };
        Ok(Self { common, state: State::Responding(Box::new(state)) })
    }

    /// Whether this very message began it.
    pub(crate) fn was_begun_by(&self, request: &[u8]) -> bool {
        matches!(&self.state, State::Responding(state) if state.request == request)
    }

    /// The first message came again: so does the answer.
    pub(crate) fn repeat_init(&mut self, core: &mut Core, now: Now, path: Path) {
        if let State::Responding(state) = &self.state
            && !state.response.is_empty()
        {
            self.common.send_to(core, path, &vec![state.response.clone()].into());
        }
        core.ignore(now, Some(self.common.id), path, Ignored::Duplicate);
    }
}

/// Nothing of what is offered is configured.
pub(super) fn no_proposal(head: Head, offered: &[Proposal], suites: &[Phase1]) -> Refusal {
    let (protocol, kind) = (ProtocolId::IKE, NotifyKind::NO_PROPOSAL_CHOSEN);
    let notify = Notify { protocol, spi: Vec::new(), kind, data: Vec::new() };
    let head = Head { exchange: Exchange::INFORMATIONAL, ..head };
    Refusal {
        answer: Some(emit::plain(&head, &[Payload::Notify(notify)])),
        failure: Some(Failure::NoProposal {
            offered: proposal::describe_phase_1(offered),
            configured: proposal::describe_suites(suites.iter().copied().map(Phase1::suite)),
        }),
        ignored: None,
    }
}

/// The SA payload's body, as it came: it is the first payload, behind its generic header.
pub(super) fn first_body(chain: &parse::Chain, body: &[u8]) -> Vec<u8> {
    let end = chain.starts.get(1).copied().unwrap_or(chain.length);
    body.get(4..end).unwrap_or_default().to_vec()
}

impl Responding {
    pub(super) fn receive(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Next {
        if let Some(answer) = self.recent.answer(arrived.datagram) {
            common.send_to(core, arrived.path, answer);
            common.ignore(core, now, arrived.path, Ignored::Duplicate);
            return Ok(State::Responding(self));
        }
        match std::mem::replace(&mut self.step, Step::Answered) {
            Step::Aggressive(answering) => self.aggressively_proved(common, core, now, arrived, answering),
            Step::Answered => Ok(self.key_exchange(common, core, now, arrived)),
            Step::Exchanged(with) => self.identified(common, core, now, arrived, with),
            busy => {
                self.step = busy;
                common.ignore(core, now, arrived.path, Ignored::Busy);
                Ok(State::Responding(self))
            }
        }
    }

    /// Message 3.
    fn key_exchange(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> State {
        let payloads = phase1::read_clear(arrived, MAIN, Kind::KE).unwrap_or_default();
        let payloads = Payloads(&payloads);
        let (Some(public), Some(nonce)) = (payloads.ke(), payloads.nonce()) else {
            common.ignore(core, now, arrived.path, Ignored::Legality);
            return State::Responding(self);
        };
        let cookies = (common.cookie_i, common.cookie_r);
        if let Some(nat) = Nat::detect(self.suite.hash, cookies, payloads, arrived.path) {
            common.nat = nat;
            common.peer.nat_t = true;
        } else {
            common.peer.nat_t = false;
        }
        common.path = arrived.path;
        self.deadline = now.monotonic + core.settings.half_open_timeout;
        core.compute(common.id, Job::Respond { method: self.suite.group, public: public.clone() });
        self.step = Step::Agreeing {
            datagram: arrived.datagram.to_vec(),
            public: public.clone(),
            nonce: nonce.clone(),
        };
        State::Responding(self)
    }

    pub(super) fn computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        match (std::mem::replace(&mut self.step, Step::Answered), done) {
            (Step::Aggressive(answering), done) => {
                self.aggressively_computed(common, core, now, (answering, done))
            }
            (Step::Agreeing { datagram, public, nonce }, Done::Responded(result)) => {
                let (own, shared) = result.map_err(|_| Failure::PublicValue)?;
                let own_nonce = core.random.bytes(NONCE);
                let mut payloads = vec![Payload::Ke(own.clone()), Payload::Nonce(own_nonce.clone())];
                let cookies = (common.cookie_i, common.cookie_r);
                let candidates =
                    core.connections.candidates(common.path.local.ip(), common.path.remote.ip(), true);
                let signed = |connection: &&Arc<Connection>| {
                    matches!(connection.remote_auth, RemoteAuth::Certificate(_))
                };
                if let Some(connection) = candidates.iter().find(signed) {
                    payloads.extend(phase1::certificate_requests(connection));
                }
                if common.peer.nat_t {
                    let pretend = candidates.first().is_some_and(|connection| connection.force_encap);
                    payloads.extend(nat::payloads(self.suite.hash, cookies, common.path, pretend));
                }
                let message = phase1::clear(common, MAIN, &payloads);
                self.recent.answered(&datagram, vec![message.clone()].into());
                common.send(core, &vec![message].into());
                let sa_i = std::mem::take(&mut self.sa_i);
                let with =
                    Exchanged { cookies, public: (public, own), nonces: (nonce, own_nonce), shared, sa_i };
                self.step = Step::Exchanged(Box::new(with));
                Ok(State::Responding(self))
            }
            (Step::Verifying(identified), Done::Verified(result)) => {
                result?;
                self.prove(common, core, now, identified)
            }
            (Step::Signing(identified), Done::Signed(result)) => {
                let signature = result.map_err(|error| Failure::Signing(error.to_string()))?;
                self.answer(common, core, now, *identified, Payload::Sig(signature.data))
            }
            (step, _) => {
                self.step = step;
                Ok(State::Responding(self))
            }
        }
    }

    /// Message 5: which connection is it, and is it the peer it says?
    fn identified(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
        with: Box<Exchanged>,
    ) -> Next {
        if !arrived.head.encrypted || arrived.head.exchange != MAIN || arrived.first != Kind::ID {
            common.ignore(core, now, arrived.path, Ignored::Legality);
            self.step = Step::Exchanged(with);
            return Ok(State::Responding(self));
        }
        let candidates = core.connections.candidates(arrived.path.local.ip(), arrived.path.remote.ip(), true);
        let fits = |connection: &&Arc<Connection>| phase1::method(connection) == Some(self.suite.method);
        let candidates: Vec<_> = candidates.iter().filter(fits).cloned().collect();
        let (found, mut with) = open(&candidates, self.suite, *with, arrived);
        let Some((keyed, chain, iv)) = found else {
            // With a wrong secret there is nothing to be read, and nobody to be told.
            common.ignore(core, now, arrived.path, Ignored::Integrity);
            if let Some(with) = with.take() {
                self.step = Step::Exchanged(Box::new(with));
            }
            return Ok(State::Responding(self));
        };
        let payloads = Payloads(&chain.payloads);
        let remote_id = payloads.id().map(phase1::identity);
        let Some(remote_id) = remote_id else {
            return Err(Failure::V1Protocol("phase 1", "has no identity"));
        };
        let opener = candidates.get(keyed.1);
        let connection = candidates
            .iter()
            .filter(|connection| connection.remote_id.matches(&remote_id) && same_secret(connection, opener))
            .reduce(
                |best, other| {
                    if other.remote_id.specificity() > best.remote_id.specificity() { other } else { best }
                },
            );
        let Some(connection) = connection.cloned() else {
            let address = arrived.path.remote.ip();
            return Err(Failure::NoConnection { identity: remote_id.to_string(), address });
        };
        common.connection = Some(Arc::clone(&connection));
        let judged = phase1::judge(common, core, now, &keyed.0, &connection, payloads)?;
        common.path = arrived.path;
        let first_contact = payloads.has_notify(NotifyKind::INITIAL_CONTACT);
        let mut keyed = keyed.0;
        keyed.iv = iv;
        let datagram = arrived.datagram.to_vec();
        let identified = Box::new(Identified { keyed, remote_id, first_contact, datagram });
        match judged {
            Judged::Good(_) => self.prove(common, core, now, identified),
            Judged::Checking(_) => {
                self.step = Step::Verifying(identified);
                Ok(State::Responding(self))
            }
        }
    }

    /// The peer is who it says: now this side proves who it is.
    fn prove(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        identified: Box<Identified>,
    ) -> Next {
        let Some(connection) = common.connection.clone() else { return Err(Failure::Reconfigured) };
        if let Some(proof) = phase1::prove(common, core, &identified.keyed, &connection)? {
            return self.answer(common, core, now, *identified, proof);
        }
        self.step = Step::Signing(identified);
        Ok(State::Responding(self))
    }

    /// Message 6.
    fn answer(
        self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        identified: Identified,
        proof: Payload,
    ) -> Next {
        let Some(connection) = common.connection.clone() else { return Err(Failure::Reconfigured) };
        let Identified { mut keyed, remote_id, first_contact, datagram } = identified;
        let payloads = phase1::identified(&connection, proof);
        let message = keyed.seal(MAIN, &payloads).ok_or(Failure::BadChoice)?;
        let Self { key, life, mut recent, .. } = *self;
        recent.answered(&datagram, vec![message.clone()].into());
        let half_open_key = Some(key);
        let proven = Proven {
            keyed,
            connection,
            remote_id,
            first_contact,
            half_open_key,
            life,
            recent,
            last: Some(message),
        };
        Ok(State::Established(Box::new(Established::new(common, core, now, proven, Vec::new()))))
    }
}

/// The keys that open a message, with the index of the candidate whose shared secret they come from.
type Opened = ((Keyed, usize), parse::Chain, super::cipher::Iv);

/// Opens message 5 with each secret that may be meant. Gives what was exchanged back if none does.
fn open(
    candidates: &[Arc<Connection>],
    suite: Phase1,
    with: Exchanged,
    arrived: &Arrived<'_>,
) -> (Option<Opened>, Option<Exchanged>) {
    let mut tried: Vec<Option<&Secret>> = Vec::new();
    let mut with = with;
    for (index, connection) in candidates.iter().enumerate() {
        let psk = match &connection.local_auth {
            LocalAuth::Psk(secret) => Some(secret),
            _ => None,
        };
        if tried.contains(&psk) || tried.len() == SECRETS {
            continue;
        }
        tried.push(psk);
        let shared = with.shared.duplicate();
        let again = Exchanged {
            cookies: with.cookies,
            public: with.public.clone(),
            nonces: with.nonces.clone(),
            shared,
            sa_i: with.sa_i.clone(),
        };
        let Some(keyed) = Keyed::new(suite, psk, with) else { return (None, Some(again)) };
        // What is opened with a wrong key is noise, which only rarely reads as a chain, and then has a wrong hash.
        if let Some((chain, iv)) = keyed.open(arrived) {
            let payloads = Payloads(&chain.payloads);
            let right = psk.is_none()
                || payloads
                    .id()
                    .zip(payloads.hash())
                    .is_some_and(|(id, hash)| keyed.proof(true, id) == Secret::new(hash.as_slice()));
            if right {
                return (Some(((keyed, index), chain, iv)), None);
            }
        }
        with = again;
    }
    (None, Some(with))
}

/// Whether a connection has the secret that opened the message; with signatures there is none.
fn same_secret(connection: &Connection, opener: Option<&Arc<Connection>>) -> bool {
    match (&connection.local_auth, opener.map(|opener| &opener.local_auth)) {
        (LocalAuth::Psk(own), Some(LocalAuth::Psk(other))) => own == other,
        (LocalAuth::Certificate { .. }, Some(LocalAuth::Certificate { .. })) => true,
        _ => false,
    }
}
