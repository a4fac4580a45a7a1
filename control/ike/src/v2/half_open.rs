//! From the shared secret to authentication: the keys, the additional key exchanges as responder (RFC 9370 in
//! IKE_INTERMEDIATE, RFC 9242), and what AUTH covers.

use core::net::IpAddr;
use std::time::Instant;

use super::auth_responder::{self, Authentication};
use super::channel::{Channel, ChannelConfig, Datagrams, Received};
use super::{Common, Failed, Next, State};
use crate::Secret;
use crate::crypto::keys::{self, IkeKeys, Seed};
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, Job};
use crate::message::legality::{self, Payloads, Phase};
use crate::message::parse::Parsed;
use crate::message::registry::{ExchangeType, KeMethod, NotifyType, PayloadType};
use crate::message::{Head, IdData, IkeSpi, KeyExchangeData, Notify, Payload, emit};
use crate::negotiate::IkeSuite;
use crate::output::Path;
use crate::report::Failure;

/// Keys are there, authentication is not.
pub(super) struct Keyed {
    pub(super) channel: Channel,
    pub(super) keys: IkeKeys,
    pub(super) suite: IkeSuite,
    pub(super) ni: Vec<u8>,
    pub(super) nr: Vec<u8>,
    pub(super) init_request: Vec<u8>,
    pub(super) init_response: Vec<u8>,
    /// Additional key exchanges done.
    steps: usize,
    /// RFC 9242 section 3.3.2: `IntAuth_i` and `IntAuth_r` so far.
    covered: (Secret, Secret),
}

/// The responder waits for IKE_INTERMEDIATE or IKE_AUTH.
pub(super) struct HalfOpen {
    pub(super) key: (IpAddr, u16, IkeSpi),
    pub(super) keyed: Keyed,
    pub(super) deadline: Instant,
    pub(super) stage: Stage,
}

/// What a half-open IKE SA is about.
pub(super) enum Stage {
    /// Waiting for a request.
    Idle,
    /// The secret of an additional key exchange is being computed for the answer to this message.
    Exchanging(u32),
    /// Authentication has begun.
    Authenticating(Box<Authentication>),
}

impl Keyed {
    /// Derives the keys (RFC 7296 section 2.14).
    pub(super) fn new(
        common: &Common,
        core: &Core,
        suite: IkeSuite,
        secret: &Secret,
        (ni, nr): (Vec<u8>, Vec<u8>),
        (init_request, init_response): (Vec<u8>, Vec<u8>),
    ) -> Result<Self, Failure> {
        let seed = Seed { nonce_i: &ni, nonce_r: &nr, spi_i: common.spi_i, spi_r: common.spi_r };
        let keys = IkeKeys::initial(&suite, secret, &seed).ok_or(Failure::BadChoice)?;
        core.host.note_keys(&suite, (common.spi_i, common.spi_r), &keys);
        let fragmentation = common.peer.fragmentation
            && common.connection.as_ref().is_none_or(|connection| connection.fragmentation);
        let channel = Channel::new(
            &ChannelConfig {
                initiator: common.initiator,
                spi_i: common.spi_i,
                spi_r: common.spi_r,
                fragment_size: fragmentation.then(|| fragment_size(core.settings.fragment_size, common.path)),
                retransmit: core.settings.retransmit,
                // IKE_SA_INIT had number 0.
                next_request: u32::from(common.initiator),
                expected_request: u32::from(!common.initiator),
            },
            &keys,
        );
        let channel = channel.ok_or(Failure::BadChoice)?;
        let covered = Default::default();
        Ok(Self { channel, keys, suite, ni, nr, init_request, init_response, steps: 0, covered })
    }

    /// The additional key exchange that comes next.
    pub(super) fn next_method(&self) -> Option<KeMethod> {
        self.suite.additional.get(self.steps).copied()
    }

    /// An additional key exchange is complete: "the keys ... are updated" (RFC 9370 section 2.2.2).
    pub(super) fn advance(&mut self, core: &Core, secret: &Secret) {
        self.steps += 1;
        let (spi_i, spi_r) = self.channel.spis();
        let seed = Seed { nonce_i: &self.ni, nonce_r: &self.nr, spi_i, spi_r };
        if let Some(keys) = self.keys.derivation.intermediate(&self.suite, secret, &seed) {
            core.host.note_keys(&self.suite, (spi_i, spi_r), &keys);
            self.channel.rekey(&keys);
            self.keys = keys;
        }
    }

    /// Sends an IKE_INTERMEDIATE request.
    pub(super) fn request_intermediate(
        &mut self,
        core: &mut Core,
        now: Now,
        payloads: &[Payload],
    ) -> Datagrams {
        let exchange = ExchangeType::IKE_INTERMEDIATE;
        let head = self.channel.head(exchange, false, self.channel.next_request_id());
        let mut plain = Vec::new();
        let first = emit::chain(payloads, &mut plain);
        self.cover(head, first, &plain);
        self.channel.request(now.monotonic, exchange, payloads, &mut *core.random)
    }

    /// An IKE_INTERMEDIATE message of the peer becomes part of what AUTH covers.
    ///
    /// RFC 9242 section 3.3.2: of the header and the Encrypted payload's own header lengths count as if neither IV, padding
    /// nor ICV were there.
    pub(super) fn cover(&mut self, head: Head, first: PayloadType, plain: &[u8]) {
        let message = emit::sk_prefix(&head, first, plain.len());
        let (key, so_far) = if head.from_initiator {
            (&self.keys.sk_pi, &mut self.covered.0)
        } else {
            (&self.keys.sk_pr, &mut self.covered.1)
        };
        let prf = self.keys.derivation.prf();
        *so_far = keys::intermediate_auth(prf, key, so_far.expose(), &message, plain);
    }

    /// What the AUTH payload of one side covers (RFC 7296 section 2.15; RFC 9242 section 3.3.2).
    pub(super) fn octets(&self, initiators: bool, id: &IdData) -> Vec<u8> {
        let (message, nonce, key) = if initiators {
            (&self.init_request, &self.nr, &self.keys.sk_pi)
        } else {
            (&self.init_response, &self.ni, &self.keys.sk_pr)
        };
        let mut intermediate = Vec::new();
        if self.steps > 0 {
            // The message ID of the first IKE_AUTH request.
            let id = u32::try_from(self.steps).unwrap_or(u32::MAX).saturating_add(1);
            intermediate = keys::int_auth(&self.covered.0, &self.covered.1, id);
        }
        keys::signed_octets(
            self.keys.derivation.prf(),
            key,
            message,
            nonce,
            &emit::id_body(id),
            &intermediate,
        )
    }

    /// The AUTH data of one side by a shared secret, or by the key that EAP gave (section 2.16).
    pub(super) fn psk(&self, initiators: bool, id: &IdData, secret: &Secret) -> Secret {
        keys::psk_auth(self.keys.derivation.prf(), secret.expose(), &self.octets(initiators, id))
    }
}

/// Largest IKE message that fits an IP packet of this size.
pub(super) fn fragment_size(packet: u16, path: Path) -> u16 {
    let headers = if path.remote.is_ipv4() { 20 + 8 } else { 40 + 8 };
    // The non-ESP marker.
    packet.saturating_sub(headers + 4)
}

impl HalfOpen {
    pub(super) fn receive(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        parsed: &Parsed<'_>,
    ) -> Next {
        let busy = match &self.stage {
            Stage::Idle => false,
            Stage::Exchanging(_) => true,
            Stage::Authenticating(authentication) => authentication.is_busy(),
        };
        if busy {
            core.ignore(now, Some(common.id), path, Ignored::Busy);
            return Ok(State::HalfOpen(self));
        }
        match self.keyed.channel.receive(now.monotonic, parsed, datagram) {
            Received::Request { exchange, id, first, payloads, plain } => {
                // It was authenticated with the keys of this exchange, so its source is where the initiator is.
                common.path = path;
                match exchange {
                    ExchangeType::IKE_INTERMEDIATE => {
                        self.intermediate(common, core, now, parsed.head, id, first, &payloads, &plain)
                    }
                    ExchangeType::IKE_AUTH => auth_responder::request(self, common, core, now, id, payloads),
                    _ => {
                        core.ignore(now, Some(common.id), path, Ignored::Exchange);
                        Ok(State::HalfOpen(self))
                    }
                }
            }
            Received::Malformed { exchange, id, notify } => {
                let payloads = [Payload::Notify(notify)];
                let answer = self.keyed.channel.respond(exchange, id, &payloads, &mut *core.random);
                let failure = Failure::Protocol(exchange, "cannot be read");
                Err(Failed { failure, answer: Some(answer), leaving: None })
            }
            received => {
                common.other(core, now, path, received);
                Ok(State::HalfOpen(self))
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a message and what it is about")]
    fn intermediate(
        mut self: Box<Self>,
        common: &Common,
        core: &mut Core,
        _now: Now,
        head: Head,
        id: u32,
        first: PayloadType,
        payloads: &[Payload],
        plain: &[u8],
    ) -> Next {
        let exchange = ExchangeType::IKE_INTERMEDIATE;
        let payloads = Payloads(payloads);
        let legal = legality::check(exchange, false, Phase::First, payloads.0).is_ok();
        let ke = payloads.ke().filter(|ke| legal && Some(ke.method) == self.keyed.next_method());
        let (Some(ke), Stage::Idle) = (ke, &self.stage) else {
            let notify = [Payload::Notify(Notify::new(NotifyType::INVALID_SYNTAX, []))];
            let answer = self.keyed.channel.respond(exchange, id, &notify, &mut *core.random);
            let failure = Failure::Protocol(exchange, "has not the key exchange that comes next");
            return Err(Failed { failure, answer: Some(answer), leaving: None });
        };
        self.keyed.cover(head, first, plain);
        core.compute(common.id, Job::Respond { method: ke.method, public: ke.data.clone() });
        self.stage = Stage::Exchanging(id);
        Ok(State::HalfOpen(self))
    }

    pub(super) fn computed(
        mut self: Box<Self>,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        done: Done,
    ) -> Next {
        match (std::mem::replace(&mut self.stage, Stage::Idle), done) {
            (Stage::Exchanging(id), Done::Responded(result)) => {
                let exchange = ExchangeType::IKE_INTERMEDIATE;
                let (public, secret) = result.map_err(|_| Failure::PublicValue)?;
                let method = self.keyed.next_method().unwrap_or(KeMethod::NONE);
                let payloads = [Payload::Ke(KeyExchangeData { method, data: public })];
                let head = self.keyed.channel.head(exchange, true, id);
                let mut plain = Vec::new();
                let first = emit::chain(&payloads, &mut plain);
                self.keyed.cover(head, first, &plain);
                let answer = self.keyed.channel.respond(exchange, id, &payloads, &mut *core.random);
                common.send(core, &answer);
                self.keyed.advance(core, &secret);
                Ok(State::HalfOpen(self))
            }
            (Stage::Authenticating(authentication), done) => {
                auth_responder::computed(self, authentication, common, core, now, done)
            }
            (stage, _) => {
                self.stage = stage;
                Ok(State::HalfOpen(self))
            }
        }
    }
}
