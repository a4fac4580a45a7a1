//! IKE_SA_INIT as responder (RFC 7296 section 1.2).

use core::net::IpAddr;
use std::sync::Arc;

use super::half_open::{HalfOpen, Keyed, Stage};
use super::nat::{self, Nat};
use super::opening::{NONCE, abilities, peer_abilities};
use super::{Common, IkeSa, Next, State, agree};
use crate::config::{Connection, RemoteAuth};
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::legality::{self, Payloads, Phase};
use crate::message::registry::{CertEncoding, ExchangeType, NotifyType, ProtocolId};
use crate::message::{Head, IkeSpi, KeyExchangeData, Notify, Payload, Proposal, emit};
use crate::negotiate::{IkeSuite, keyword};
use crate::output::{Effect, Path};
use crate::report::Failure;

/// A first message leads to nothing.
#[derive(Debug, Default)]
pub(crate) struct Refusal {
    /// The answer, unprotected.
    pub(crate) answer: Option<Notify>,
    /// For people.
    pub(crate) failure: Option<Failure>,
    /// The counter.
    pub(crate) ignored: Option<Ignored>,
}

/// The secret is being computed.
pub(super) struct Answering {
    pub(super) key: (IpAddr, u16, IkeSpi),
    pub(super) request: Vec<u8>,
    suite: IkeSuite,
    answer: Proposal,
    ni: Vec<u8>,
    payloads: Vec<Payload>,
}

impl IkeSa {
    /// Answers a first message that admission let in.
    pub(crate) fn respond(
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        head: Head,
        payloads: &Payloads<'_>,
    ) -> Result<Self, Refusal> {
        let illegal = || Refusal {
            answer: Some(Notify::new(NotifyType::INVALID_SYNTAX, [])),
            ignored: Some(Ignored::Legality),
            failure: None,
        };
        legality::check(ExchangeType::IKE_SA_INIT, false, Phase::First, payloads.0).map_err(|_| illegal())?;
        let (Some(offered), Some(ke), Some(ni)) = (payloads.sa(), payloads.ke(), payloads.nonce()) else {
            return Err(illegal());
        };
        let candidates = core.connections.candidates(path.local.ip(), path.remote.ip(), false);
        let Some(first) = candidates.first().cloned() else {
            return Err(Refusal {
                answer: Some(Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, [])),
                ignored: Some(Ignored::NoConnection),
                failure: None,
            });
        };
        let fits = |connection: &Arc<_>| {
            let connection: &crate::config::Connection = connection;
            Some((agree::choose_ike(&connection.proposals, offered)?, connection.fragmentation))
        };
        let Some(((suite, answer), _)) = candidates.iter().find_map(fits) else {
            return Err(Refusal {
                answer: Some(Notify::new(NotifyType::NO_PROPOSAL_CHOSEN, [])),
                failure: Some(Failure::NoProposal {
                    offered: keyword::List(offered).to_string(),
                    configured: keyword::List(&first.proposals).to_string(),
                }),
                ignored: None,
            });
        };
        if ke.method != suite.ke {
            // "the responder MUST reject the message and indicate its preferred Diffie-Hellman group"
            let preferred = suite.ke.0.to_be_bytes();
            return Err(Refusal {
                answer: Some(Notify::new(NotifyType::INVALID_KE_PAYLOAD, preferred)),
                ..Refusal::default()
            });
        }
        let (id, spi_r) = core.new_sa();
        core.counters.responded += 1;
        core.admission.opened(path.remote.ip());
        let nat = Nat::detect(payloads, head.spi_i, IkeSpi::NONE, path);
        let common = Common {
            id,
            initiator: false,
            spi_i: head.spi_i,
            spi_r,
            path,
            connection: None,
            nat,
            peer: peer_abilities(payloads),
            born: now.monotonic,
            admitted: Some(path.remote.ip()),
        };
        core.compute(id, Job::Respond { method: suite.ke, public: ke.data.clone() });
        let pretend = first.force_encap;
        let mut more = Vec::new();
        if nat.supported {
            more.extend(nat::notifications(common.spi_i, common.spi_r, path, pretend));
        }
        more.extend(abilities(&first).into_iter().filter(|payload| match payload {
            // "If the initiator ... the responder MUST NOT" announce what was not announced to it.
            Payload::Notify(notify) => payloads.notify(notify.kind).is_some(),
            _ => true,
        }));
        more.extend(certificate_request(&candidates));
        more.push(Payload::Notify(Notify::new(NotifyType::CHILDLESS_IKEV2_SUPPORTED, [])));
        let answering = Answering {
            key: (path.remote.ip(), path.remote.port(), head.spi_i),
            request: datagram.to_vec(),
            suite,
            answer,
            ni: ni.to_vec(),
            payloads: more,
        };
        Ok(Self { common, state: State::Answering(Box::new(answering)) })
    }
}

impl Answering {
    /// The secret is there: the answer goes out, and from then on everything is protected.
    pub(super) fn computed(self: Box<Self>, common: &Common, core: &mut Core, now: Now, done: Done) -> Next {
        let Done::Responded(result) = done else { return Ok(State::Answering(self)) };
        let (public, secret) = result.map_err(|_| Failure::PublicValue)?;
        let Self { key, request, suite, answer, ni, payloads } = *self;
        let nr = core.random.bytes(NONCE);
        let answer = Proposal { protocol: ProtocolId::IKE, spi: Vec::new(), ..answer };
        let mut all = vec![
            Payload::Sa(vec![answer]),
            Payload::Ke(KeyExchangeData { method: suite.ke, data: public }),
            Payload::Nonce(nr.clone()),
        ];
        all.extend(payloads);
        let head = Head {
            spi_i: common.spi_i,
            spi_r: common.spi_r,
            exchange: ExchangeType::IKE_SA_INIT,
            from_initiator: false,
            response: true,
            message_id: 0,
        };
        let response = emit::plain(&head, &all);
        let keyed = Keyed::new(common, core, suite, &secret, (ni, nr), (request, response.clone()))?;
        core.emit(common.id, Effect::Transmit { path: common.path, datagram: response });
        let deadline = now.monotonic + core.settings.half_open_timeout;
        Ok(State::HalfOpen(Box::new(HalfOpen { key, keyed, deadline, stage: Stage::Idle })))
    }
}

/// What makes an initiator send its certificate (RFC 7296 section 1.2): the CAs of all connections that may be meant, since
/// which one is meant is known only with the initiator's identity. Nothing if none of them wants a certificate.
fn certificate_request(candidates: &[Arc<Connection>]) -> Option<Payload> {
    let mut authorities = Vec::new();
    for connection in candidates {
        let RemoteAuth::Certificate(trust) = &connection.remote_auth else { continue };
        let all = trust.authorities();
        for hash in all.as_chunks::<AUTHORITY>().0 {
            if authorities.len() < MAX_AUTHORITIES && !authorities.contains(hash) {
                authorities.push(*hash);
            }
        }
    }
    let encoding = CertEncoding::X509_SIGNATURE;
    (!authorities.is_empty()).then(|| Payload::CertReq { encoding, authorities: authorities.concat() })
}

/// Bytes of a CA's hash.
const AUTHORITY: usize = 20;

/// As many as leave the answer in one packet of 1280 bytes. They are a hint only: initiators send their certificate when
/// asked for any.
const MAX_AUTHORITIES: usize = 20;
