//! The initiator up to IKE_AUTH: IKE_SA_INIT with its retries (RFC 7296 sections 1.2, 2.6, 2.7), the additional key
//! exchanges of RFC 9370 in IKE_INTERMEDIATE (RFC 9242).

use core::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use super::auth_initiator;
use super::channel::{Expired, Received, Retransmission};
use super::half_open::Keyed;
use super::nat::{self, Nat};
use super::{Abilities, Common, IkeSa, Next, State, agree};
use crate::auth::signature;
use crate::config::Connection;
use crate::crypto::ke::KeyExchange;
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::legality::{self, Payloads};
use crate::message::parse::{Body, Parsed};
use crate::message::registry::{ExchangeType, HashId, KeMethod, NotifyType, ProtocolId, TransformType};
use crate::message::{Head, IkeSpi, KeyExchangeData, Notify, Payload, Proposal, emit};
use crate::negotiate::IkeSuite;
use crate::negotiate::proposal::offer;
use crate::output::Path;
use crate::report::Failure;

/// How often another key exchange method or a cookie is accepted before the peer is given up.
const RETRIES: u8 = 4;

/// Length of the nonces: "at least half the key size of the negotiated PRF" (section 2.10).
pub(super) const NONCE: usize = 32;

/// IKE_SA_INIT is being sent.
pub(super) struct Opening {
    pub(super) wanted: Vec<usize>,
    nonce: Vec<u8>,
    method: KeMethod,
    own: Option<(KeyExchange, Vec<u8>)>,
    cookie: Option<Vec<u8>>,
    request: Vec<u8>,
    retransmission: Option<Retransmission>,
    /// What an unprotected error says may be an attacker's word: it counts when nothing better comes in time.
    refusal: Option<(NotifyType, Instant)>,
    retries: u8,
}

/// The secret is being computed.
pub(super) struct Agreeing {
    pub(super) wanted: Vec<usize>,
    suite: IkeSuite,
    ni: Vec<u8>,
    nr: Vec<u8>,
    request: Vec<u8>,
    response: Vec<u8>,
}

/// An additional key exchange.
pub(super) struct Exchanging {
    pub(super) wanted: Vec<usize>,
    pub(super) keyed: Keyed,
    own: Option<KeyExchange>,
}

impl IkeSa {
    /// Begins an IKE SA; `wanted` are the children to make in it.
    pub(crate) fn initiate(
        core: &mut Core,
        now: Now,
        connection: Arc<Connection>,
        local: IpAddr,
        remote: IpAddr,
        wanted: Vec<usize>,
    ) -> Self {
        let (id, spi_i) = core.new_sa();
        core.counters.initiated += 1;
        let path = Path {
            local: SocketAddr::new(local, core.settings.port),
            remote: SocketAddr::new(remote, connection.remote_port),
            natt: false,
        };
        let method = agree::first_method(&connection.proposals).unwrap_or(KeMethod::CURVE25519);
        let common = Common {
            id,
            initiator: true,
            spi_i,
            spi_r: IkeSpi::NONE,
            path,
            connection: Some(connection),
            nat: Nat::default(),
            peer: Abilities::default(),
            born: now.monotonic,
            admitted: None,
        };
        core.compute(id, Job::Generate(method));
        let opening = Opening {
            wanted,
            nonce: core.random.bytes(NONCE),
            method,
            own: None,
            cookie: None,
            request: Vec::new(),
            retransmission: None,
            refusal: None,
            retries: 0,
        };
        Self { common, state: State::Opening(Box::new(opening)) }
    }
}

impl Opening {
    /// The key pair is there.
    pub(super) fn computed(
        mut self: Box<Self>,
        common: &Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        if let Done::Generated(result) = done {
            self.own = Some(result.map_err(|_| Failure::KeyExchange(self.method))?);
            self.send(common, core, now);
        }
        Ok(State::Opening(self))
    }

    /// (Re)makes the request and sends it.
    fn send(&mut self, common: &Common, core: &mut Core, now: Now) {
        let (Some((_, public)), Some(connection)) = (&self.own, &common.connection) else { return };
        let mut payloads = Vec::new();
        if let Some(cookie) = &self.cookie {
            payloads.push(Payload::Notify(Notify::new(NotifyType::COOKIE, cookie.clone())));
        }
        payloads.push(Payload::Sa(offer(&connection.proposals, &[])));
        payloads.push(Payload::Ke(KeyExchangeData { method: self.method, data: public.clone() }));
        payloads.push(Payload::Nonce(self.nonce.clone()));
        let head = Head {
            spi_i: common.spi_i,
            spi_r: IkeSpi::NONE,
            exchange: ExchangeType::IKE_SA_INIT,
            from_initiator: true,
            response: false,
            message_id: 0,
        };
        payloads.extend(nat::notifications(head.spi_i, head.spi_r, common.path, connection.force_encap));
        payloads.extend(abilities(connection));
        self.request = emit::plain(&head, &payloads);
        let retransmission = Retransmission::new(
            now.monotonic,
            vec![self.request.clone()].into(),
            core.settings.retransmit,
            &mut *core.random,
        );
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
            return Err(Failure::Notified(kind).into());
        }
        if let Some(retransmission) = &mut self.retransmission
            && retransmission.deadline() <= now.monotonic
        {
            match retransmission.expire(now.monotonic, &mut *core.random) {
                Expired::Resend(datagrams) => {
                    core.counters.retransmitted += 1;
                    common.send(core, &datagrams);
                }
                Expired::Dead => return Err(Failure::NoAnswer(common.path.remote.ip()).into()),
            }
        }
        Ok(State::Opening(self))
    }

    pub(super) fn receive(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        parsed: &Parsed<'_>,
    ) -> Next {
        let Head { exchange, response, message_id, spi_r, .. } = parsed.head;
        let (Body::Plain(payloads), true) =
            (&parsed.body, response && exchange == ExchangeType::IKE_SA_INIT && message_id == 0)
        else {
            core.ignore(now, Some(common.id), path, Ignored::Exchange);
            return Ok(State::Opening(self));
        };
        if self.retransmission.is_none() {
            core.ignore(now, Some(common.id), path, Ignored::Busy);
            return Ok(State::Opening(self));
        }
        let payloads = Payloads(payloads);
        if let Some(cookie) = payloads.notify(NotifyType::COOKIE) {
            // "the initiator MUST ... retry the IKE_SA_INIT request, and include the COOKIE notification"
            if cookie.data.is_empty() || cookie.data.len() > 64 || self.retries >= RETRIES {
                core.ignore(now, Some(common.id), path, Ignored::CookieWrong);
                return Ok(State::Opening(self));
            }
            self.retries += 1;
            self.cookie = Some(cookie.data.clone());
            self.send(common, core, now);
            return Ok(State::Opening(self));
        }
        if let Some(notify) = payloads.notify(NotifyType::INVALID_KE_PAYLOAD) {
            return self.other_method(common, core, now, path, &notify.data);
        }
        if let Some(notify) = payloads.error_notify() {
            if self.refusal.is_none() {
                self.refusal = Some((notify.kind, now.monotonic + core.settings.retransmit.first));
            }
            return Ok(State::Opening(self));
        }
        let refuse = |core: &mut Core, state: Box<Self>, reason| {
            core.ignore(now, Some(common.id), path, reason);
            Ok(State::Opening(state))
        };
        if legality::check(exchange, true, legality::Phase::First, payloads.0).is_err()
            || spi_r == IkeSpi::NONE
        {
            return refuse(core, self, Ignored::Legality);
        }
        let (Some(answer), Some(ke), Some(nonce), Some(connection)) =
            (payloads.sa(), payloads.ke(), payloads.nonce(), common.connection.clone())
        else {
            return refuse(core, self, Ignored::Legality);
        };
        let Some(suite) = agree::accepts_ike(&offer(&connection.proposals, &[]), answer) else {
            return Err(Failure::BadChoice.into());
        };
        if suite.ke != self.method || ke.method != self.method {
            return Err(Failure::BadChoice.into());
        }
        let Some((own, _)) = self.own.take() else { return refuse(core, self, Ignored::Busy) };
        common.spi_r = spi_r;
        common.peer = peer_abilities(&payloads);
        common.nat = Nat::detect(&payloads, common.spi_i, spi_r, path);
        float(common, core, &connection);
        core.compute(common.id, Job::Agree { own, public: ke.data.clone() });
        Ok(State::Agreeing(Box::new(Agreeing {
            wanted: self.wanted,
            suite,
            ni: self.nonce,
            nr: nonce.to_vec(),
            request: self.request,
            response: datagram.to_vec(),
        })))
    }

    /// "the responder ... indicates its preferred ... method": section 1.3, if it is among those proposed.
    fn other_method(
        mut self: Box<Self>,
        common: &Common,
        core: &mut Core,
        now: Now,
        path: Path,
        data: &[u8],
    ) -> Next {
        let wanted = data.first_chunk().map(|bytes| KeMethod(u16::from_be_bytes(*bytes)));
        let Some(method) = wanted.filter(|method| *method != self.method && self.retries < RETRIES) else {
            core.ignore(now, Some(common.id), path, Ignored::Legality);
            return Ok(State::Opening(self));
        };
        let connection = common.connection.as_ref();
        if !connection.is_some_and(|connection| agree::proposes(&connection.proposals, method)) {
            return Err(Failure::KeyExchange(method).into());
        }
        self.retries += 1;
        self.method = method;
        self.own = None;
        self.retransmission = None;
        core.compute(common.id, Job::Generate(method));
        Ok(State::Opening(self))
    }
}

impl Agreeing {
    /// The secret is there: from now on everything is protected.
    pub(super) fn computed(
        self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        let Done::Agreed(result) = done else { return Ok(State::Agreeing(self)) };
        let secret = result.map_err(|_| Failure::PublicValue)?;
        let Self { wanted, suite, ni, nr, request, response } = *self;
        let keyed = Keyed::new(common, core, suite, &secret, (ni, nr), (request, response))?;
        let exchanging = Exchanging { wanted, keyed, own: None };
        exchanging.next(common, core, now)
    }
}

impl Exchanging {
    /// The next additional key exchange, or IKE_AUTH.
    fn next(self, common: &mut Common, core: &mut Core, now: Now) -> Next {
        match self.keyed.next_method() {
            Some(method) => {
                core.compute(common.id, Job::Generate(method));
                Ok(State::Exchanging(Box::new(self)))
            }
            None => auth_initiator::begin(common, core, now, self.wanted, self.keyed),
        }
    }

    pub(super) fn computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        match done {
            Done::Generated(result) => {
                let method = self.keyed.next_method().unwrap_or(KeMethod::NONE);
                let (own, public) = result.map_err(|_| Failure::KeyExchange(method))?;
                self.own = Some(own);
                let payloads = [Payload::Ke(KeyExchangeData { method, data: public })];
                let datagrams = self.keyed.request_intermediate(core, now, &payloads);
                common.send(core, &datagrams);
                Ok(State::Exchanging(self))
            }
            Done::Agreed(result) => {
                let secret = result.map_err(|_| Failure::PublicValue)?;
                self.keyed.advance(core, &secret);
                self.next(common, core, now)
            }
            _ => Ok(State::Exchanging(self)),
        }
    }

    pub(super) fn timeout(mut self: Box<Self>, common: &Common, core: &mut Core, now: Now) -> Next {
        if common.repeats(core, now, &mut self.keyed.channel) {
            return Ok(State::Exchanging(self));
        }
        Err(Failure::NoAnswer(common.path.remote.ip()).into())
    }

    pub(super) fn receive(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        parsed: &Parsed<'_>,
    ) -> Next {
        match self.keyed.channel.receive(now.monotonic, parsed, datagram) {
            Received::Response { exchange, payloads, plain, first, .. } => {
                let payloads = Payloads(&payloads);
                if let Some(notify) = payloads.error_notify() {
                    return Err(Failure::Notified(notify.kind).into());
                }
                let bad = |text| Failure::Protocol(exchange, text);
                let ke = payloads.ke().ok_or(bad("has no KE payload"))?;
                let method = self.keyed.next_method();
                let own = self.own.take().ok_or(bad("comes unasked"))?;
                if Some(ke.method) != method {
                    return Err(bad("has another key exchange method").into());
                }
                self.keyed.cover(parsed.head, first, &plain);
                core.compute(common.id, Job::Agree { own, public: ke.data.clone() });
                Ok(State::Exchanging(self))
            }
            Received::MalformedResponse { exchange, .. } => {
                Err(Failure::Protocol(exchange, "cannot be read").into())
            }
            received => {
                common.other(core, now, path, received);
                Ok(State::Exchanging(self))
            }
        }
    }
}

impl Common {
    /// What every state does with what it was not waiting for.
    pub(super) fn other(&self, core: &mut Core, now: Now, path: Path, received: Received) {
        match received {
            Received::Duplicate(datagrams) => {
                core.ignore(now, Some(self.id), path, Ignored::Duplicate);
                // The answer goes where the request came from: the peer may have moved (RFC 7296 section 2.11).
                self.send_to(core, path, &datagrams);
            }
            Received::Pending => {}
            Received::Ignored(reason) => core.ignore(now, Some(self.id), path, reason),
            Received::Malformed { .. } | Received::MalformedResponse { .. } => {
                core.ignore(now, Some(self.id), path, Ignored::Syntax);
            }
            Received::Request { .. } | Received::Response { .. } => {
                core.ignore(now, Some(self.id), path, Ignored::Exchange);
            }
        }
    }
}

/// What this side says that it can, in IKE_SA_INIT.
pub(super) fn abilities(connection: &Connection) -> Vec<Payload> {
    let mut payloads = Vec::new();
    if connection.fragmentation {
        payloads.push(Payload::Notify(Notify::new(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, [])));
    }
    let hashes: Vec<u8> = signature::hashes().iter().flat_map(|hash| hash.0.to_be_bytes()).collect();
    payloads.push(Payload::Notify(Notify::new(NotifyType::SIGNATURE_HASH_ALGORITHMS, hashes)));
    let additional = |proposal: &Proposal| {
        proposal.protocol == ProtocolId::IKE
            && proposal.transforms.iter().any(|transform| transform.kind >= TransformType::ADDKE1)
    };
    if connection.proposals.iter().any(additional) {
        payloads.push(Payload::Notify(Notify::new(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED, [])));
    }
    payloads
}

/// What the peer says that it can, in IKE_SA_INIT.
pub(super) fn peer_abilities(payloads: &Payloads<'_>) -> Abilities {
    let hashes = payloads.notify(NotifyType::SIGNATURE_HASH_ALGORITHMS).map(|notify| {
        let numbers = notify.data.as_chunks::<2>().0.iter();
        numbers.map(|bytes| HashId(u16::from_be_bytes(*bytes))).take(16).collect()
    });
    Abilities {
        fragmentation: payloads.notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED).is_some(),
        hashes: hashes.unwrap_or_default(),
        childless: payloads.notify(NotifyType::CHILDLESS_IKEV2_SUPPORTED).is_some(),
        mobike: false,
    }
}

/// RFC 7296 section 2.23: behind a NAT "the initiator ... MUST tunnel all future IKE packets ... over UDP port 4500";
/// RFC 4555 section 3.3: with MOBIKE also where there is none.
fn float(common: &mut Common, core: &Core, connection: &Connection) {
    let Nat { supported, .. } = common.nat;
    if supported && (common.nat.any() || connection.mobike || connection.force_encap) {
        common.path.natt = true;
        common.path.local.set_port(core.settings.nat_port);
        common.path.remote.set_port(NAT_PORT);
    }
}

/// The peer's port once both have floated.
const NAT_PORT: u16 = 4500;
