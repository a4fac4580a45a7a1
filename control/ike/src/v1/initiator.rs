//! Phase 1 as initiator; main mode (RFC 2409 sections 5.1 and 5.4): SA; KE and nonce; identity and proof.

use core::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use super::aggressive::{self, Asking};
use super::established::{Established, Proven};
use super::fragments::Fragments;
use super::keys::Exchanged;
use super::message::parse;
use super::message::{Exchange, Kind, Payload, Payloads, emit};
use super::phase1::{self, Judged, Keyed, NONCE};
use super::proposal::{self, Method, Phase1};
use super::recent::Recent;
use super::{Abilities, Arrived, Common, IkeSa, Nat, Next, State, in_terms_of_v2, nat};
use crate::auth::identity::Identity;
use crate::config::{Connection, LocalAuth, Unique};
use crate::crypto::ke::KeyExchange;
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::IkeSpi;
use crate::message::registry::NotifyType;
use crate::output::Path;
use crate::report::Failure;
use crate::v2::channel::{Expired, Retransmission};

const MAIN: Exchange = Exchange::IDENTITY_PROTECTION;

/// The peer's port once both have floated.
const NAT_PORT: u16 = 4500;

/// Phase 1 is going on.
pub(super) struct Initiating {
    pub(super) wanted: Vec<usize>,
    pub(super) suites: Vec<Phase1>,
    pub(super) sa_i: Vec<u8>,
    pub(super) retransmission: Option<Retransmission>,
    /// What an unprotected error says may be an attacker's word: it counts when nothing better comes in time.
    pub(super) refusal: Option<(NotifyType, Instant)>,
    pub(super) step: Step,
}

/// Where it is.
pub(super) enum Step {
    /// Aggressive mode.
    Aggressive(Asking),
    /// Message 1 is out.
    Offered,
    /// The key pair is being made.
    Generating(Phase1),
    /// Message 3 is out.
    Exchanged { suite: Phase1, own: KeyExchange, public: Vec<u8>, nonce: Vec<u8> },
    /// The secret is being computed.
    Agreeing { suite: Phase1, public: (Vec<u8>, Vec<u8>), nonces: (Vec<u8>, Vec<u8>) },
    /// This side's signature is being made.
    Signing(Box<Keyed>),
    /// Message 5 is out.
    Proved(Box<Keyed>),
    /// The peer's signature is being checked.
    Verifying(Box<Keyed>, Identity),
}

impl IkeSa {
    /// Begins an IKE SA; `wanted` are the children to make in it. `along`: the path of the SA that it is to replace.
    pub(crate) fn initiate(
        core: &mut Core,
        now: Now,
        connection: Arc<Connection>,
        (local, remote): (IpAddr, IpAddr),
        along: Option<Path>,
        wanted: Vec<usize>,
    ) -> Self {
        let (id, cookie_i) = core.new_sa();
        core.counters.initiated += 1;
        let path = along.unwrap_or(Path {
            local: SocketAddr::new(local, core.settings.port),
            remote: SocketAddr::new(remote, connection.remote_port),
            natt: false,
        });
        let method = phase1::method(&connection).unwrap_or(Method::PSK);
        let suites = proposal::configured_phase_1(&connection.proposals, method);
        let offer = proposal::offer_phase_1(&suites, life(&connection));
        let group = suites.first().map(|suite| suite.group).filter(|_| aggressive::is_on(&connection));
        let common = Common {
            id,
            initiator: true,
            cookie_i,
            cookie_r: IkeSpi::NONE,
            path,
            connection: Some(connection),
            nat: Nat::default(),
            peer: Abilities::default(),
            born: now.monotonic,
            admitted: None,
            fragments: Fragments::default(),
        };
        let sa_i = emit::sa_body(&offer);
        let mut payloads = vec![Payload::Sa(offer)];
        payloads.extend(phase1::vendor_ids(method != method.base()));
        let message = phase1::clear(&common, MAIN, &payloads);
        let mut state =
            Initiating { wanted, suites, sa_i, retransmission: None, refusal: None, step: Step::Offered };
        if let Some(group) = group {
            core.compute(id, Job::Generate(group));
            state.step = Step::Aggressive(Asking::Generating);
            return Self { common, state: State::Initiating(Box::new(state)) };
        }
        state.send(&common, core, now, message);
        Self { common, state: State::Initiating(Box::new(state)) }
    }
}

/// The lifetime that is offered: as long as this side keeps an IKE SA at most.
pub(super) fn life(connection: &Connection) -> Option<core::time::Duration> {
    connection.rekey.map(|rekey| rekey + connection.over_time)
}

/// RFC 3947 section 4: "the initiator ... MUST change ports" to 4500 with its next message.
pub(super) fn found_nat(common: &mut Common, core: &Core, nat: Nat) {
    common.nat = nat;
    if nat.any() && !common.path.natt {
        common.path.natt = true;
        common.path.local.set_port(core.settings.nat_port);
        common.path.remote.set_port(NAT_PORT);
    }
}

impl Initiating {
    pub(super) fn send(&mut self, common: &Common, core: &mut Core, now: Now, message: Vec<u8>) {
        let policy = core.settings.retransmit;
        let datagrams = vec![message].into();
        let retransmission = Retransmission::new(now.monotonic, datagrams, policy, &mut *core.random);
        common.send(core, retransmission.datagrams());
        self.retransmission = Some(retransmission);
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let retransmission = self.retransmission.as_ref().map(Retransmission::deadline);
        retransmission.into_iter().chain(self.refusal.map(|(_, until)| until)).min()
    }

    pub(super) fn timeout(mut self: Box<Self>, common: &Common, core: &mut Core, now: Now) -> Next {
        if let Some((kind, until)) = self.refusal
            && until <= now.monotonic
        {
            return Err(Failure::Notified(kind));
        }
        if let Some(retransmission) = &mut self.retransmission
            && retransmission.deadline() <= now.monotonic
        {
            match retransmission.expire(now.monotonic, &mut *core.random) {
                Expired::Resend(datagrams) => {
                    core.counters.retransmitted += 1;
                    common.send(core, &datagrams);
                }
                Expired::Dead if matches!(self.step, Step::Proved(_)) => return Err(Failure::V1NoProof),
                Expired::Dead => return Err(Failure::NoAnswer(common.path.remote.ip())),
            }
        }
        Ok(State::Initiating(self))
    }

    pub(super) fn receive(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Next {
        if arrived.head.exchange == Exchange::INFORMATIONAL {
            return Ok(self.informed(common, core, now, arrived));
        }
        let step = std::mem::replace(&mut self.step, Step::Offered);
        match step {
            Step::Aggressive(asking) => self.aggressively_answered(common, core, now, arrived, asking),
            Step::Offered => self.offered(common, core, now, arrived),
            Step::Exchanged { suite, own, public, nonce } => {
                Ok(self.exchanged(common, core, now, arrived, (suite, own, public, nonce)))
            }
            Step::Proved(keyed) => self.proved(common, core, now, arrived, keyed),
            busy => {
                self.step = busy;
                common.ignore(core, now, arrived.path, Ignored::Busy);
                Ok(State::Initiating(self))
            }
        }
    }

    /// A notification in the clear, or one that cannot be told from anything: an error ends the attempt if nothing better
    /// comes.
    fn informed(
        mut self: Box<Self>,
        common: &Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> State {
        common.ignore(core, now, arrived.path, Ignored::Unprotected);
        let payloads = match parse::chain(arrived.first, arrived.body) {
            Ok(chain) if !arrived.head.encrypted => chain.payloads,
            _ => return State::Initiating(self),
        };
        if let (Some(error), None) = (Payloads(&payloads).error(), self.refusal) {
            self.refusal = Some((in_terms_of_v2(error.kind), now.monotonic + core.settings.retransmit.first));
        }
        State::Initiating(self)
    }

    /// Message 2: the suite.
    fn offered(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Next {
        let payloads = phase1::read_clear(arrived, MAIN, Kind::SA);
        let Some(payloads) = payloads.filter(|_| arrived.head.cookie_r != IkeSpi::NONE) else {
            common.ignore(core, now, arrived.path, Ignored::Legality);
            return Ok(State::Initiating(self));
        };
        let payloads = Payloads(&payloads);
        let answer = payloads.sa().map(Vec::as_slice).unwrap_or_default();
        let suite = proposal::accept_phase_1(&self.suites, answer).ok_or(Failure::BadChoice)?;
        common.cookie_r = arrived.head.cookie_r;
        common.peer = phase1::abilities(payloads);
        self.retransmission = None;
        self.refusal = None;
        core.compute(common.id, Job::Generate(suite.group));
        self.step = Step::Generating(suite);
        Ok(State::Initiating(self))
    }

    pub(super) fn computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        let Some(connection) = common.connection.clone() else { return Err(Failure::Reconfigured) };
        let step = std::mem::replace(&mut self.step, Step::Offered);
        match (step, done) {
            (Step::Aggressive(asking), done) => {
                self.aggressively_computed(common, core, now, connection, (asking, done))
            }
            (Step::Generating(suite), Done::Generated(result)) => {
                let (own, public) = result.map_err(|_| Failure::KeyExchange(suite.group))?;
                let nonce = core.random.bytes(NONCE);
                let mut payloads = vec![Payload::Ke(public.clone()), Payload::Nonce(nonce.clone())];
                payloads.extend(phase1::certificate_requests(&connection));
                if common.peer.nat_t {
                    let cookies = (common.cookie_i, common.cookie_r);
                    payloads.extend(nat::payloads(suite.hash, cookies, common.path, connection.force_encap));
                }
                let message = phase1::clear(common, MAIN, &payloads);
                self.send(common, core, now, message);
                self.step = Step::Exchanged { suite, own, public, nonce };
                Ok(State::Initiating(self))
            }
            (Step::Agreeing { suite, public, nonces }, Done::Agreed(result)) => {
                let with = Exchanged {
                    cookies: (common.cookie_i, common.cookie_r),
                    public,
                    nonces,
                    shared: result.map_err(|_| Failure::PublicValue)?,
                    sa_i: std::mem::take(&mut self.sa_i),
                };
                let psk = match &connection.local_auth {
                    LocalAuth::Psk(secret) => Some(secret),
                    _ => None,
                };
                let keyed = Box::new(Keyed::new(suite, psk, with).ok_or(Failure::BadChoice)?);
                if let Some(proof) = phase1::prove(common, core, &keyed, &connection)? {
                    return self.identify(common, core, now, keyed, &connection, proof);
                }
                self.step = Step::Signing(keyed);
                Ok(State::Initiating(self))
            }
            (Step::Signing(keyed), Done::Signed(result)) => {
                let signature = result.map_err(|error| Failure::Signing(error.to_string()))?;
                self.identify(common, core, now, keyed, &connection, Payload::Sig(signature.data))
            }
            (Step::Verifying(keyed, remote_id), Done::Verified(result)) => {
                if let Err(error) = result {
                    phase1::refuse(common, core, &keyed);
                    return Err(error.into());
                }
                Ok(self.establish(common, core, now, keyed, connection, remote_id))
            }
            (step, _) => {
                self.step = step;
                Ok(State::Initiating(self))
            }
        }
    }

    /// Message 4: the peer's public value and nonce.
    fn exchanged(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
        (suite, own, public, nonce): (Phase1, KeyExchange, Vec<u8>, Vec<u8>),
    ) -> State {
        let payloads = phase1::read_clear(arrived, MAIN, Kind::KE).unwrap_or_default();
        let payloads = Payloads(&payloads);
        let (Some(theirs), Some(their_nonce)) = (payloads.ke(), payloads.nonce()) else {
            // Copies of message 2 come here too.
            common.ignore(core, now, arrived.path, Ignored::Legality);
            self.step = Step::Exchanged { suite, own, public, nonce };
            return State::Initiating(self);
        };
        let cookies = (common.cookie_i, common.cookie_r);
        if let Some(nat) = Nat::detect(suite.hash, cookies, payloads, arrived.path) {
            found_nat(common, core, nat);
        }
        self.retransmission = None;
        core.compute(common.id, Job::Agree { own, public: theirs.clone() });
        let (public, nonces) = ((public, theirs.clone()), (nonce, their_nonce.clone()));
        self.step = Step::Agreeing { suite, public, nonces };
        State::Initiating(self)
    }

    /// Message 5: who this side is.
    fn identify(
        mut self: Box<Self>,
        common: &Common,
        core: &mut Core,
        now: Now,
        mut keyed: Box<Keyed>,
        connection: &Connection,
        proof: Payload,
    ) -> Next {
        let mut payloads = phase1::identified(connection, proof);
        let known = core.peers.keys().any(|(name, _)| *name == connection.name);
        if connection.unique != Unique::Never && !known {
            payloads.push(phase1::initial_contact(keyed.with.cookies));
        }
        let message = keyed.seal(MAIN, &payloads).ok_or(Failure::BadChoice)?;
        self.send(common, core, now, message);
        self.step = Step::Proved(keyed);
        Ok(State::Initiating(self))
    }

    /// Message 6: who the peer is.
    fn proved(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
        mut keyed: Box<Keyed>,
    ) -> Next {
        let Some(connection) = common.connection.clone() else { return Err(Failure::Reconfigured) };
        let opened = keyed
            .open(arrived)
            .filter(|_| arrived.head.encrypted && arrived.head.exchange == MAIN && arrived.first == Kind::ID);
        let Some((chain, iv)) = opened else {
            common.ignore(core, now, arrived.path, Ignored::Integrity);
            self.step = Step::Proved(keyed);
            return Ok(State::Initiating(self));
        };
        match phase1::judge(common, core, now, &keyed, &connection, Payloads(&chain.payloads)) {
            Ok(Judged::Good(remote_id)) => {
                keyed.iv = iv;
                Ok(self.establish(common, core, now, keyed, connection, remote_id))
            }
            Ok(Judged::Checking(remote_id)) => {
                keyed.iv = iv;
                self.retransmission = None;
                self.step = Step::Verifying(keyed, remote_id);
                Ok(State::Initiating(self))
            }
            Err(failure) => {
                keyed.iv = iv;
                phase1::refuse(common, core, &keyed);
                Err(failure)
            }
        }
    }

    fn establish(
        self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        keyed: Box<Keyed>,
        connection: Arc<Connection>,
        remote_id: Identity,
    ) -> State {
        let proven = Proven {
            keyed: *keyed,
            connection,
            remote_id,
            first_contact: false,
            half_open_key: None,
            life: None,
            recent: Recent::default(),
            last: None,
        };
        State::Established(Box::new(Established::new(common, core, now, proven, self.wanted)))
    }
}
