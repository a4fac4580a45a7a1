//! IKE_AUTH as responder (RFC 7296 sections 1.2, 2.15, 2.16, 2.19).

use core::net::IpAddr;
use std::sync::Arc;

use super::auth_initiator::presented;
use super::child::{self, Ends};
use super::established::Established;
use super::half_open::{HalfOpen, Stage};
use super::{Common, Failed, Next, State, agree};
use crate::Secret;
use crate::auth::eap::{Server, ServerStep};
use crate::auth::identity::Identity;
use crate::auth::signature::Signature;
use crate::config::{Connection, LocalAuth, RemoteAuth};
use crate::endpoint::{Core, Now};
use crate::job::{Done, Job};
use crate::message::legality::{self, Payloads, Phase};
use crate::message::registry::{AuthMethod, CertEncoding, CfgAttribute, CfgType, ExchangeType, NotifyType};
use crate::message::{Configuration, IdData, Notify, Payload};
use crate::qcd;
use crate::report::Failure;

const EXCHANGE: ExchangeType = ExchangeType::IKE_AUTH;

/// IKE_AUTH is going on.
pub(super) struct Authentication {
    connection: Arc<Connection>,
    /// Who the peer is: by IDi, or by its EAP identity once it has proved that.
    remote_id: Identity,
    /// The peer's identity as AUTH covers it.
    id_i: IdData,
    /// The first request, which says what is wanted.
    request: Vec<Payload>,
    /// The message that is to be answered.
    message_id: u32,
    step: Step,
    eap: Option<Server>,
    msk: Option<Secret>,
}

enum Step {
    /// The peer's signature is being checked.
    Verifying,
    /// This side's signature is being made.
    Signing,
    /// The next message of EAP is awaited, or the AUTH payload that ends it.
    Eap,
}

impl Authentication {
    /// Whether a job is running.
    pub(super) const fn is_busy(&self) -> bool {
        matches!(self.step, Step::Verifying | Step::Signing)
    }
}

/// An IKE_AUTH request, opened.
pub(super) fn request(
    mut half: Box<HalfOpen>,
    common: &mut Common,
    core: &mut Core,
    now: Now,
    id: u32,
    payloads: Vec<Payload>,
) -> Next {
    match std::mem::replace(&mut half.stage, Stage::Idle) {
        Stage::Authenticating(mut authentication) => {
            authentication.message_id = id;
            further(half, authentication, common, core, now, &Payloads(&payloads))
        }
        _ => first(half, common, core, now, id, payloads),
    }
}

/// The first request: who is it, and how does it authenticate?
fn first(
    mut half: Box<HalfOpen>,
    common: &mut Common,
    core: &mut Core,
    now: Now,
    message_id: u32,
    request: Vec<Payload>,
) -> Next {
    let payloads = Payloads(&request);
    if half.keyed.next_method().is_some() {
        let failure = Failure::Protocol(EXCHANGE, "comes before the additional key exchanges are done");
        return refuse(half, core, message_id, NotifyType::INVALID_SYNTAX, failure);
    }
    let id_i = match payloads.id_i() {
        Some(id) if legality::check(EXCHANGE, false, Phase::First, payloads.0).is_ok() => id.clone(),
        _ => {
            let failure = Failure::Protocol(EXCHANGE, "has not the payloads it needs");
            return refuse(half, core, message_id, NotifyType::INVALID_SYNTAX, failure);
        }
    };
    let remote_id = Identity::from_data(&id_i);
    let auth = payloads.auth();
    let by_method = |connection: &Connection| match (&connection.remote_auth, auth) {
        (RemoteAuth::EapMschapv2(_), None) => true,
        (RemoteAuth::Psk(_), Some((method, _))) => method == AuthMethod::SHARED_KEY,
        (RemoteAuth::Certificate(_), Some((method, _))) => method != AuthMethod::SHARED_KEY,
        _ => false,
    };
    let id_r = payloads.id_r().map(Identity::from_data);
    let suite = &half.keyed.suite;
    let candidates = core.connections.candidates(common.path.local.ip(), common.path.remote.ip(), false);
    let fitting = candidates.into_iter().filter(|connection| {
        connection.remote_id.matches(&remote_id)
            && id_r.as_ref().is_none_or(|wanted| *wanted == connection.local_id)
            && agree::allows_ike(&connection.proposals, suite)
    });
    let mut other_method = None;
    let mut best: Option<Arc<Connection>> = None;
    for connection in fitting {
        if !by_method(&connection) {
            other_method = Some(connection.remote_auth.method());
        } else if best
            .as_ref()
            .is_none_or(|best| connection.remote_id.specificity() > best.remote_id.specificity())
        {
            best = Some(connection);
        }
    }
    let Some(connection) = best else {
        let failure = match other_method {
            Some(expected) => Failure::Method {
                found: auth.map_or("EAP".to_owned(), |(method, _)| method.to_string()),
                expected,
            },
            None => {
                Failure::NoConnection { identity: remote_id.to_string(), address: common.path.remote.ip() }
            }
        };
        return refuse(half, core, message_id, NotifyType::AUTHENTICATION_FAILED, failure);
    };
    common.connection = Some(Arc::clone(&connection));
    let mut authentication = Box::new(Authentication {
        connection: Arc::clone(&connection),
        remote_id,
        id_i,
        message_id,
        step: Step::Verifying,
        eap: None,
        msk: None,
        request: Vec::new(),
    });
    match (&connection.remote_auth, auth) {
        (RemoteAuth::Psk(secret), Some((_, data))) => {
            let right = half.keyed.psk(true, &authentication.id_i, secret);
            if right != Secret::new(data) {
                let failure = Failure::SharedSecret(authentication.remote_id.to_string());
                return refuse(half, core, message_id, NotifyType::AUTHENTICATION_FAILED, failure);
            }
            authentication.request = request;
            prove(half, authentication, common, core, now)
        }
        (RemoteAuth::Certificate(trust), Some((method, data))) => {
            let job = Job::Verify {
                trust: Arc::clone(trust),
                presented: presented(&payloads),
                identity: authentication.remote_id.clone(),
                signature: Signature { method, data: data.to_vec() },
                octets: half.keyed.octets(true, &authentication.id_i),
                at: now.wall,
            };
            core.compute(common.id, job);
            authentication.request = request;
            half.stage = Stage::Authenticating(authentication);
            Ok(State::HalfOpen(half))
        }
        (RemoteAuth::EapMschapv2(users), _) => {
            let name = connection.local_id.to_string();
            authentication.eap = Some(Server::new(Arc::clone(users), name));
            authentication.request = request;
            prove(half, authentication, common, core, now)
        }
        _ => Ok(State::HalfOpen(half)),
    }
}

/// The peer is who it says, or wants EAP: now this side proves who it is.
fn prove(
    mut half: Box<HalfOpen>,
    mut authentication: Box<Authentication>,
    common: &mut Common,
    core: &mut Core,
    now: Now,
) -> Next {
    let connection = Arc::clone(&authentication.connection);
    let own_id = connection.local_id.to_data();
    match &connection.local_auth {
        LocalAuth::Psk(secret) => {
            let data = half.keyed.psk(false, &own_id, secret).expose().to_vec();
            let auth = Payload::Auth { method: AuthMethod::SHARED_KEY, data };
            Ok(proved(half, authentication, common, core, now, auth))
        }
        LocalAuth::Certificate { key, .. } => {
            let octets = half.keyed.octets(false, &own_id);
            let hashes = common.peer.hashes.clone();
            core.compute(common.id, Job::Sign { key: Arc::clone(key), hashes, octets });
            authentication.step = Step::Signing;
            half.stage = Stage::Authenticating(authentication);
            Ok(State::HalfOpen(half))
        }
        LocalAuth::EapMschapv2 { .. } => {
            let failure = Failure::Signing("a gateway cannot authenticate by EAP".to_owned());
            let id = authentication.message_id;
            refuse(half, core, id, NotifyType::AUTHENTICATION_FAILED, failure)
        }
    }
}

/// This side's AUTH payload is there.
fn proved(
    mut half: Box<HalfOpen>,
    mut authentication: Box<Authentication>,
    common: &mut Common,
    core: &mut Core,
    now: Now,
    auth: Payload,
) -> State {
    let connection = Arc::clone(&authentication.connection);
    let mut payloads = vec![Payload::IdR(connection.local_id.to_data())];
    if let LocalAuth::Certificate { chain, .. } = &connection.local_auth {
        payloads.extend(
            chain
                .iter()
                .map(|data| Payload::Cert { encoding: CertEncoding::X509_SIGNATURE, data: data.clone() }),
        );
    }
    payloads.push(auth);
    if let Some(server) = &mut authentication.eap {
        payloads.push(Payload::Eap(server.start(&mut *core.random)));
        authentication.step = Step::Eap;
        answer(&mut half, common, core, authentication.message_id, &payloads);
        half.stage = Stage::Authenticating(authentication);
        return State::HalfOpen(half);
    }
    establish(half, *authentication, common, core, now, payloads)
}

/// A later request: EAP goes on, or ends.
fn further(
    mut half: Box<HalfOpen>,
    mut authentication: Box<Authentication>,
    common: &mut Common,
    core: &mut Core,
    now: Now,
    payloads: &Payloads<'_>,
) -> Next {
    let id = authentication.message_id;
    if let Some(msk) = &authentication.msk {
        let Some((AuthMethod::SHARED_KEY, data)) = payloads.auth() else {
            let failure = Failure::Protocol(EXCHANGE, "has no AUTH payload after EAP");
            return refuse(half, core, id, NotifyType::AUTHENTICATION_FAILED, failure);
        };
        if half.keyed.psk(true, &authentication.id_i, msk) != Secret::new(data) {
            let failure = Failure::Eap("the client does not know the key that EAP gave".to_owned());
            return refuse(half, core, id, NotifyType::AUTHENTICATION_FAILED, failure);
        }
        let own_id = authentication.connection.local_id.to_data();
        let data = half.keyed.psk(false, &own_id, msk).expose().to_vec();
        let auth = Payload::Auth { method: AuthMethod::SHARED_KEY, data };
        return Ok(establish(half, *authentication, common, core, now, vec![auth]));
    }
    let (Some(server), Some(message)) = (&mut authentication.eap, payloads.eap()) else {
        let failure = Failure::Protocol(EXCHANGE, "has no EAP payload");
        return refuse(half, core, id, NotifyType::INVALID_SYNTAX, failure);
    };
    let (send, failure) = match server.handle(message, &mut *core.random) {
        ServerStep::Send(send) => (send, None),
        ServerStep::Success { send, msk, user } => {
            authentication.msk = Some(msk);
            authentication.remote_id =
                user.parse().unwrap_or_else(|_| Identity::KeyId(user.clone().into_bytes()));
            (send, None)
        }
        ServerStep::Failure { send, why } => (send, Some(Failure::Eap(why))),
    };
    let payloads = [Payload::Eap(send)];
    if let Some(failure) = failure {
        let answer = half.keyed.channel.respond(EXCHANGE, id, &payloads, &mut *core.random);
        return Err(Failed { failure, answer: Some(answer), leaving: None });
    }
    answer(&mut half, common, core, id, &payloads);
    half.stage = Stage::Authenticating(authentication);
    Ok(State::HalfOpen(half))
}

/// A job is done.
pub(super) fn computed(
    mut half: Box<HalfOpen>,
    mut authentication: Box<Authentication>,
    common: &mut Common,
    core: &mut Core,
    now: Now,
    done: Done,
) -> Next {
    let id = authentication.message_id;
    match (&authentication.step, done) {
        (Step::Verifying, Done::Verified(Ok(_))) => prove(half, authentication, common, core, now),
        (Step::Verifying, Done::Verified(Err(error))) => {
            refuse(half, core, id, NotifyType::AUTHENTICATION_FAILED, error.into())
        }
        (Step::Signing, Done::Signed(Ok(Signature { method, data }))) => {
            authentication.step = Step::Verifying;
            Ok(proved(half, authentication, common, core, now, Payload::Auth { method, data }))
        }
        (Step::Signing, Done::Signed(Err(error))) => {
            let failure = Failure::Signing(error.to_string());
            refuse(half, core, id, NotifyType::AUTHENTICATION_FAILED, failure)
        }
        _ => {
            half.stage = Stage::Authenticating(authentication);
            Ok(State::HalfOpen(half))
        }
    }
}

/// Both sides have authenticated: the last answer, with the child if there is to be one.
fn establish(
    half: Box<HalfOpen>,
    authentication: Authentication,
    common: &mut Common,
    core: &mut Core,
    now: Now,
    mut answer: Vec<Payload>,
) -> State {
    let Authentication { connection, remote_id, request, message_id, .. } = authentication;
    let payloads = Payloads(&request);
    common.peer.mobike = connection.mobike && payloads.notify(NotifyType::MOBIKE_SUPPORTED).is_some();
    let leased = lease(core, &connection, &remote_id, payloads.cp());
    let first_contact = payloads.notify(NotifyType::INITIAL_CONTACT).is_some();
    let HalfOpen { key, keyed, .. } = *half;
    let (ni, nr) = (keyed.ni.clone(), keyed.nr.clone());
    let addresses = leased.as_ref().map(|(addresses, _)| addresses.clone()).unwrap_or_default();
    let mut established = Established::new(
        common,
        core,
        now,
        &connection,
        keyed,
        remote_id,
        addresses.clone(),
        Some((key, first_contact)),
    );
    established.token = qcd::given(&payloads);
    answer.extend(core.tokens.as_ref().map(|tokens| tokens.notify(common.spi_i, common.spi_r)));
    let mut problem = None;
    match leased {
        Ok((_, Some(reply))) => answer.push(Payload::Cp(reply)),
        Ok((_, None)) => {}
        Err(failure) => {
            answer.push(Payload::Notify(Notify::new(NotifyType::INTERNAL_ADDRESS_FAILURE, [])));
            problem = Some(failure);
        }
    }
    if payloads.sa().is_some() && problem.is_none() {
        let ends = Ends {
            local: (common.path.local.ip(), &[]),
            remote: (common.path.remote.ip(), &addresses),
            asking: (false, false),
        };
        match child::answer(core, &connection, &payloads, ends, None, false) {
            Ok((agreed, more)) => {
                answer.extend(more);
                established.first_answered(common, core, now, agreed, (&ni, &nr));
            }
            Err(refused) => {
                answer.push(Payload::Notify(refused.notify));
                problem = Some(refused.failure);
            }
        }
    }
    if let Some(failure) = problem {
        established.child_failed(common, core, 0, failure);
    }
    if common.peer.mobike {
        answer.push(Payload::Notify(Notify::new(NotifyType::MOBIKE_SUPPORTED, [])));
    }
    let datagrams = established.channel.respond(EXCHANGE, message_id, &answer, &mut *core.random);
    // The peer believes in it when it has the answer.
    established.persist(common, core);
    common.send(core, &datagrams);
    State::Established(Box::new(established))
}

/// Addresses for the client (section 2.19), and the reply that says so.
fn lease(
    core: &mut Core,
    connection: &Connection,
    identity: &Identity,
    asked: Option<&Configuration>,
) -> Result<(Vec<IpAddr>, Option<Configuration>), Failure> {
    let Some(asked) = asked.filter(|asked| asked.kind == CfgType::REQUEST) else {
        return Ok((Vec::new(), None));
    };
    let mut addresses = Vec::new();
    let mut attributes = Vec::new();
    for (kind, value) in &asked.attributes {
        let (v4, wish): (bool, Option<IpAddr>) = match *kind {
            CfgAttribute::INTERNAL_IP4_ADDRESS => {
                (true, value.first_chunk::<4>().map(|bytes| (*bytes).into()))
            }
            CfgAttribute::INTERNAL_IP6_ADDRESS => {
                (false, value.first_chunk::<16>().map(|bytes| (*bytes).into()))
            }
            _ => continue,
        };
        if addresses.iter().any(|address: &IpAddr| address.is_ipv4() == v4) {
            continue;
        }
        let Some(address) = core.pools.lease(&connection.pools, v4, identity, wish)? else { continue };
        addresses.push(address);
        match address {
            IpAddr::V4(address) => attributes.push((*kind, address.octets().to_vec())),
            IpAddr::V6(address) => attributes.push((*kind, [&address.octets()[..], &[128]].concat())),
        }
    }
    if addresses.is_empty() {
        return Ok((addresses, None));
    }
    for server in &connection.dns {
        attributes.push(match server {
            IpAddr::V4(address) => (CfgAttribute::INTERNAL_IP4_DNS, address.octets().to_vec()),
            IpAddr::V6(address) => (CfgAttribute::INTERNAL_IP6_DNS, address.octets().to_vec()),
        });
    }
    Ok((addresses, Some(Configuration { kind: CfgType::REPLY, attributes })))
}

fn answer(half: &mut HalfOpen, common: &Common, core: &mut Core, id: u32, payloads: &[Payload]) {
    let datagrams = half.keyed.channel.respond(EXCHANGE, id, payloads, &mut *core.random);
    common.send(core, &datagrams);
}

fn refuse(mut half: Box<HalfOpen>, core: &mut Core, id: u32, notify: NotifyType, failure: Failure) -> Next {
    let payloads = [Payload::Notify(Notify::new(notify, []))];
    let answer = half.keyed.channel.respond(EXCHANGE, id, &payloads, &mut *core.random);
    Err(Failed { failure, answer: Some(answer), leaving: None })
}
