//! IKE_AUTH as initiator (RFC 7296 sections 1.2, 2.15, 2.16).

use core::net::IpAddr;
use std::sync::Arc;

use super::channel::Received;
use super::child::{self, Ends, Proposed};
use super::established::Established;
use super::half_open::Keyed;
use super::leaving::Leaving;
use super::{Common, Failed, Next, State};
use crate::Secret;
use crate::auth::certificate::Presented;
use crate::auth::eap::{Client, ClientStep};
use crate::auth::identity::Identity;
use crate::auth::signature::Signature;
use crate::config::{Connection, LocalAuth, RemoteAuth, Unique};
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::legality::{self, Payloads, Phase};
use crate::message::parse::Parsed;
use crate::message::registry::{
    AuthMethod, CertEncoding, CfgAttribute, CfgType, ExchangeType, NotifyType, ProtocolId,
};
use crate::message::{Configuration, IdData, Notify, Payload};
use crate::output::{Effect, Path, VirtualConfiguration};
use crate::qcd;
use crate::report::{CloseReason, Failure};

const EXCHANGE: ExchangeType = ExchangeType::IKE_AUTH;

/// IKE_AUTH is going on.
pub(super) struct Authenticating {
    pub(super) wanted: Vec<usize>,
    pub(super) keyed: Keyed,
    connection: Arc<Connection>,
    own_id: IdData,
    proposed: Option<Proposed>,
    stage: Stage,
    /// The peer, once it has authenticated.
    remote_id: Option<(Identity, IdData)>,
    eap: Option<Client>,
    msk: Option<Secret>,
    /// It is to be closed; the peer, which may believe in it already, is told once it is established.
    cancelled: Option<CloseReason>,
}

enum Stage {
    /// This side's signature is being made.
    Signing,
    /// A request is out.
    Waiting,
    /// The peer's signature is being checked; its message waits.
    Verifying(Vec<Payload>),
}

/// Sends the first IKE_AUTH request, once its AUTH payload is there.
pub(super) fn begin(
    common: &mut Common,
    core: &mut Core,
    now: Now,
    wanted: Vec<usize>,
    keyed: Keyed,
) -> Next {
    let Some(connection) = common.connection.clone() else { return Err(Failure::Reconfigured.into()) };
    let own_id = connection.local_id.to_data();
    let mut state = Authenticating {
        wanted,
        keyed,
        own_id,
        proposed: None,
        stage: Stage::Waiting,
        remote_id: None,
        eap: None,
        msk: None,
        cancelled: None,
        connection: Arc::clone(&connection),
    };
    match &connection.local_auth {
        LocalAuth::Psk(secret) => {
            let data = state.keyed.psk(true, &state.own_id, secret);
            let auth = Payload::Auth { method: AuthMethod::SHARED_KEY, data: data.expose().to_vec() };
            state.request(common, core, now, Some(auth));
        }
        LocalAuth::Certificate { key, .. } => {
            let octets = state.keyed.octets(true, &state.own_id);
            let hashes = common.peer.hashes.clone();
            core.compute(common.id, Job::Sign { key: Arc::clone(key), hashes, octets });
            state.stage = Stage::Signing;
        }
        LocalAuth::EapMschapv2 { user, password } => {
            state.eap = Some(Client::new(user.clone(), password.duplicate()));
            // "An initiator indicates a desire to use EAP by leaving out the AUTH payload".
            state.request(common, core, now, None);
        }
    }
    Ok(State::Authenticating(Box::new(state)))
}

impl Authenticating {
    /// The first request.
    fn request(&mut self, common: &Common, core: &mut Core, now: Now, auth: Option<Payload>) {
        let connection = Arc::clone(&self.connection);
        let mut payloads = vec![Payload::IdI(self.own_id.clone())];
        if let LocalAuth::Certificate { chain, .. } = &connection.local_auth {
            payloads.extend(
                chain
                    .iter()
                    .map(|data| Payload::Cert { encoding: CertEncoding::X509_SIGNATURE, data: data.clone() }),
            );
        }
        if is_first_contact(core, &connection) {
            payloads.push(Payload::Notify(Notify::new(NotifyType::INITIAL_CONTACT, [])));
        }
        if let RemoteAuth::Certificate(trust) = &connection.remote_auth {
            payloads.push(Payload::CertReq {
                encoding: CertEncoding::X509_SIGNATURE,
                authorities: trust.authorities(),
            });
        }
        if let Some(expected) = connection.remote_id.exact() {
            payloads.push(Payload::IdR(expected.to_data()));
        }
        let proves = auth.is_some();
        payloads.extend(auth);
        payloads.extend(token(common, core).filter(|_| proves));
        let asking = connection.request_address;
        if asking != (false, false) {
            payloads.push(Payload::Cp(address_request(asking)));
        }
        let childless = common.peer.childless && (connection.childless || self.wanted.is_empty());
        let first = self.wanted.first().copied().or(Some(0)).filter(|_| !childless);
        if let Some((index, config)) = first.and_then(|index| Some((index, connection.children.get(index)?)))
        {
            let ends =
                Ends { local: (common.path.local.ip(), &[]), remote: (common.path.remote.ip(), &[]), asking };
            let (proposed, more) = child::propose(core, config, index, ends, false);
            payloads.extend(more);
            self.proposed = Some(proposed);
            self.wanted.retain(|wanted| *wanted != index);
        }
        if connection.mobike {
            payloads.push(Payload::Notify(Notify::new(NotifyType::MOBIKE_SUPPORTED, [])));
        }
        self.send(common, core, now, &payloads);
    }

    fn send(&mut self, common: &Common, core: &mut Core, now: Now, payloads: &[Payload]) {
        let datagrams = self.keyed.channel.request(now.monotonic, EXCHANGE, payloads, &mut *core.random);
        common.send(core, &datagrams);
        self.stage = Stage::Waiting;
    }

    pub(super) fn timeout(mut self: Box<Self>, common: &Common, core: &mut Core, now: Now) -> Next {
        if common.repeats(core, now, &mut self.keyed.channel) {
            return Ok(State::Authenticating(self));
        }
        self.give_up(core);
        match self.cancelled {
            Some(reason) => Err(Failure::of_closing(reason).into()),
            None => Err(Failure::NoAnswer(common.path.remote.ip()).into()),
        }
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
        if !matches!(self.stage, Stage::Waiting) {
            core.ignore(now, Some(common.id), path, Ignored::Busy);
            return Ok(State::Authenticating(self));
        }
        match self.keyed.channel.receive(now.monotonic, parsed, datagram) {
            Received::Response { exchange: EXCHANGE, payloads, .. } => {
                self.response(common, core, now, payloads)
            }
            Received::MalformedResponse { exchange, .. } => {
                self.give_up(core);
                Err(Failure::Protocol(exchange, "cannot be read").into())
            }
            received => {
                common.other(core, now, path, received);
                Ok(State::Authenticating(self))
            }
        }
    }

    fn response(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        all: Vec<Payload>,
    ) -> Next {
        let payloads = Payloads(&all);
        let fatal = payloads.auth().is_none() && payloads.eap().is_none();
        if fatal && let Some(notify) = payloads.error_notify() {
            self.give_up(core);
            return Err(Failure::Notified(notify.kind).into());
        }
        if legality::check(EXCHANGE, true, Phase::Later, payloads.0).is_err() {
            return self.refuse(
                common,
                core,
                now,
                Failure::Protocol(EXCHANGE, "has not the payloads it needs"),
            );
        }
        if self.remote_id.is_none() {
            return self.verify(common, core, now, all);
        }
        if let Some(msk) = self.msk.take() {
            // Section 2.16: after EAP both sides prove that they know its key.
            let (Some((_, id)), Some((method, data))) = (&self.remote_id, payloads.auth()) else {
                return self.refuse(common, core, now, Failure::Protocol(EXCHANGE, "has no AUTH payload"));
            };
            let right = self.keyed.psk(false, id, &msk);
            if method != AuthMethod::SHARED_KEY || Secret::new(data) != right {
                let failure = Failure::Eap("the gateway does not know the key that EAP gave".to_owned());
                return self.refuse(common, core, now, failure);
            }
            return self.establish(common, core, now, &all);
        }
        self.eap(common, core, now, &payloads)
    }

    /// Checks who the peer is.
    fn verify(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        all: Vec<Payload>,
    ) -> Next {
        let payloads = Payloads(&all);
        let connection = Arc::clone(&self.connection);
        let (Some(id), Some((method, data))) = (payloads.id_r(), payloads.auth()) else {
            let failure = Failure::Protocol(EXCHANGE, "has no IDr or AUTH payload");
            return self.refuse(common, core, now, failure);
        };
        let identity = Identity::from_data(id);
        if !connection.remote_id.matches(&identity) {
            let expected = connection.remote_id.to_string();
            let failure = Failure::Identity { found: identity.to_string(), expected };
            return self.refuse(common, core, now, failure);
        }
        match &connection.remote_auth {
            RemoteAuth::Psk(secret) if method == AuthMethod::SHARED_KEY => {
                if self.keyed.psk(false, id, secret) != Secret::new(data) {
                    let failure = Failure::SharedSecret(identity.to_string());
                    return self.refuse(common, core, now, failure);
                }
                self.remote_id = Some((identity, id.clone()));
                self.verified(common, core, now, &all)
            }
            RemoteAuth::Certificate(trust) if method != AuthMethod::SHARED_KEY => {
                let job = Job::Verify {
                    trust: Arc::clone(trust),
                    presented: presented(&payloads),
                    identity,
                    signature: Signature { method, data: data.to_vec() },
                    octets: self.keyed.octets(false, id),
                    at: now.wall,
                };
                core.compute(common.id, job);
                self.stage = Stage::Verifying(all);
                Ok(State::Authenticating(self))
            }
            expected => {
                let failure = Failure::Method { found: method.to_string(), expected: expected.method() };
                self.refuse(common, core, now, failure)
            }
        }
    }

    pub(super) fn computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        match (std::mem::replace(&mut self.stage, Stage::Waiting), done) {
            (Stage::Signing, Done::Signed(result)) => {
                let Signature { method, data } =
                    result.map_err(|error| Failure::Signing(error.to_string()))?;
                self.request(common, core, now, Some(Payload::Auth { method, data }));
                Ok(State::Authenticating(self))
            }
            (Stage::Verifying(all), Done::Verified(result)) => {
                if let Err(error) = result {
                    return self.refuse(common, core, now, error.into());
                }
                let Some(id) = Payloads(&all).id_r().cloned() else {
                    return Ok(State::Authenticating(self));
                };
                self.remote_id = Some((Identity::from_data(&id), id));
                self.verified(common, core, now, &all)
            }
            (stage, _) => {
                self.stage = stage;
                Ok(State::Authenticating(self))
            }
        }
    }

    /// The peer is who it says.
    fn verified(self: Box<Self>, common: &mut Common, core: &mut Core, now: Now, all: &[Payload]) -> Next {
        if self.eap.is_some() {
            return self.eap(common, core, now, &Payloads(all));
        }
        self.establish(common, core, now, all)
    }

    /// One step of EAP.
    fn eap(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        payloads: &Payloads<'_>,
    ) -> Next {
        let Some(message) = payloads.eap() else {
            let failure = Failure::Eap("the gateway does not ask for a password".to_owned());
            return self.refuse(common, core, now, failure);
        };
        let Some(client) = &mut self.eap else {
            return self.refuse(common, core, now, Failure::Protocol(EXCHANGE, "has EAP unasked"));
        };
        match client.handle(message, &mut *core.random) {
            ClientStep::Send(reply) => {
                self.send(common, core, now, &[Payload::Eap(reply)]);
                Ok(State::Authenticating(self))
            }
            ClientStep::Success { msk } => {
                let data = self.keyed.psk(true, &self.own_id, &msk);
                self.msk = Some(msk);
                let auth = Payload::Auth { method: AuthMethod::SHARED_KEY, data: data.expose().to_vec() };
                let payloads: Vec<_> = [auth].into_iter().chain(token(common, core)).collect();
                self.send(common, core, now, &payloads);
                Ok(State::Authenticating(self))
            }
            ClientStep::Failure { why } => {
                self.give_up(core);
                Err(Failure::Eap(why).into())
            }
        }
    }

    /// Both sides have authenticated.
    fn establish(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        all: &[Payload],
    ) -> Next {
        let payloads = Payloads(all);
        let Some((remote_id, _)) = self.remote_id.take() else {
            return self.refuse(common, core, now, Failure::Protocol(EXCHANGE, "has no identity"));
        };
        common.peer.mobike =
            self.connection.mobike && payloads.notify(NotifyType::MOBIKE_SUPPORTED).is_some();
        let assigned = assigned(payloads.cp());
        if !assigned.addresses.is_empty() {
            core.emit(common.id, Effect::Configure(assigned.clone()));
        }
        let Self { wanted, keyed, connection, proposed, cancelled, .. } = *self;
        let (ni, nr) = (keyed.ni.clone(), keyed.nr.clone());
        let asked = connection.request_address != (false, false);
        let mut established =
            Established::new(common, core, now, &connection, keyed, remote_id, assigned.addresses, None);
        established.token = qcd::given(&payloads);
        if let Some(proposed) = proposed {
            let child = connection.children.get(proposed.index);
            let outcome = match child {
                Some(_) if asked && established.addresses().is_empty() && payloads.sa().is_some() => {
                    Err(Failure::NoAddress)
                }
                Some(child) => proposed.answered(child, &payloads),
                None => Err(Failure::Reconfigured),
            };
            let made = payloads.sa().is_some();
            established.first_child(common, core, now, &proposed, made, outcome, (&ni, &nr));
        }
        // The peer's packets come already: the child does not wait for the record.
        established.persist(common, core);
        if let Some(reason) = cancelled {
            established.close(common, core, now, reason);
        }
        for index in wanted.into_iter().filter(|_| cancelled.is_none()) {
            established.enqueue(common, core, now, super::Task::CreateChild(index));
        }
        established.pump(common, core, now);
        Ok(State::Established(Box::new(established)))
    }

    /// The peer believes that the SA is up, and it is not to be: it is told (section 2.21.2).
    fn refuse(mut self: Box<Self>, _common: &Common, core: &mut Core, now: Now, failure: Failure) -> Next {
        let payloads = [
            Payload::Notify(Notify::new(NotifyType::AUTHENTICATION_FAILED, [])),
            Payload::Delete { protocol: ProtocolId::IKE, spis: Vec::new() },
        ];
        let exchange = ExchangeType::INFORMATIONAL;
        let answer = self.keyed.channel.request(now.monotonic, exchange, &payloads, &mut *core.random);
        self.give_up(core);
        let leaving = Some(Box::new(Leaving { channel: self.keyed.channel }));
        Err(Failed { failure, answer: Some(answer), leaving })
    }

    /// It is to be closed. Whether it has to wait for the peer's answer.
    pub(super) fn cancel(&mut self, core: &mut Core, reason: CloseReason) -> bool {
        if matches!(self.stage, Stage::Signing) {
            self.give_up(core);
            return false;
        }
        self.cancelled.get_or_insert(reason);
        true
    }

    /// Whether it is to be closed.
    pub(super) const fn is_cancelled(&self) -> bool {
        self.cancelled.is_some()
    }

    fn give_up(&mut self, core: &mut Core) {
        if let Some(proposed) = self.proposed.take() {
            core.host.release_spi(proposed.spi_in);
        }
    }
}

/// RFC 6290 section 4.2: it goes with the last AUTH payload of this side.
fn token(common: &Common, core: &Core) -> Option<Payload> {
    core.tokens.as_ref().map(|tokens| tokens.notify(common.spi_i, common.spi_r))
}

/// Section 2.4: "INITIAL_CONTACT ... asserts that this IKE SA is the only IKE SA currently active".
fn is_first_contact(core: &Core, connection: &Connection) -> bool {
    connection.unique != Unique::Never
        && connection.remote_id.exact().is_some_and(|identity| {
            !core.peers.contains_key(&(Arc::clone(&connection.name), identity.clone()))
        })
}

fn address_request((v4, v6): (bool, bool)) -> Configuration {
    let mut attributes = Vec::new();
    if v4 {
        attributes.push((CfgAttribute::INTERNAL_IP4_ADDRESS, Vec::new()));
        attributes.push((CfgAttribute::INTERNAL_IP4_DNS, Vec::new()));
    }
    if v6 {
        attributes.push((CfgAttribute::INTERNAL_IP6_ADDRESS, Vec::new()));
        attributes.push((CfgAttribute::INTERNAL_IP6_DNS, Vec::new()));
    }
    Configuration { kind: CfgType::REQUEST, attributes }
}

/// What the reply assigns.
fn assigned(reply: Option<&Configuration>) -> VirtualConfiguration {
    let mut all = VirtualConfiguration::default();
    let reply = reply.filter(|reply| reply.kind == CfgType::REPLY);
    for (kind, value) in reply.into_iter().flat_map(|reply| &reply.attributes) {
        // An IPv6 address has its prefix length behind it.
        let v4 = || value.as_slice().try_into().ok().map(|bytes: [u8; 4]| IpAddr::from(bytes));
        let v6 = || value.first_chunk::<16>().map(|bytes| IpAddr::from(*bytes));
        match *kind {
            CfgAttribute::INTERNAL_IP4_ADDRESS => all.addresses.extend(v4()),
            CfgAttribute::INTERNAL_IP6_ADDRESS => all.addresses.extend(v6()),
            CfgAttribute::INTERNAL_IP4_DNS => all.dns.extend(v4()),
            CfgAttribute::INTERNAL_IP6_DNS => all.dns.extend(v6()),
            _ => {}
        }
    }
    all.addresses.truncate(8);
    all.dns.truncate(8);
    all
}

/// The certificates and CRLs that a peer sent.
pub(super) fn presented(payloads: &Payloads<'_>) -> Presented {
    let mut presented = Presented::default();
    for (encoding, data) in payloads.certs() {
        match encoding {
            CertEncoding::X509_SIGNATURE => presented.certificates.push(data.to_vec()),
            CertEncoding::CRL => presented.crls.push(data.to_vec()),
            _ => {}
        }
    }
    presented
}
