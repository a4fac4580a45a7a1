//! Protected messages of one IKE SA: sealing and opening, message IDs and the window, retransmission, the reply cache and
//! fragments.
//!
//! What [`Channel::receive`] gives as a request or a response is authentic and new. A request has to be answered by
//! [`Channel::respond`], under the ID it came with, before the next one is taken; until then its repetitions are ignored,
//! and after that they get the same answer again. One request of this side is outstanding at a time
//! ([`Channel::may_request`]); it is repeated until it is answered or [`Expired::Dead`].
//!
//! RFC 7296 section 2.1, 2.2 and 2.3: the window is 1 both ways, which is what there is without SET_WINDOW_SIZE. A peer
//! with a larger one is content with less.

use core::hash::{Hash, Hasher};
use core::time::Duration;
use std::hash::DefaultHasher;
use std::sync::Arc;
use std::time::Instant;

use super::reassembly::{Fragment, Reassembly, Whole};
use crate::Random;
use crate::crypto::keys::IkeKeys;
use crate::crypto::sk::{Opener, Sealer};
use crate::ignored::Ignored;
use crate::message::emit::{self, SK_PREFIX_LEN, SKF_PREFIX_LEN};
use crate::message::parse::{self, Body, ParseError, Parsed};
use crate::message::registry::{ExchangeType, NotifyType, PayloadType};
use crate::message::{Head, IkeSpi, Notify, Payload};
use crate::settings::Retransmit;

/// The protected messages of one IKE SA.
#[derive(Debug)]
pub struct Channel {
    initiator: bool,
    spi_i: IkeSpi,
    spi_r: IkeSpi,
    sealer: Sealer,
    opener: Opener,
    fragment_size: Option<u16>,
    retransmit: Retransmit,
    /// Message ID of this side's next request; [`EXHAUSTED`] when there is none.
    next_request: u32,
    /// Message ID of the peer's next request.
    expected_request: u32,
    outstanding: Option<Box<Outstanding>>,
    /// About the request before `expected_request`.
    last: Option<Box<Last>>,
    /// Fragments of the request `expected_request`.
    joining: Option<Box<Reassembly>>,
}

/// What a [`Channel`] begins with.
#[derive(Clone, Debug)]
pub struct ChannelConfig {
    /// This side is the original initiator of the IKE SA.
    pub initiator: bool,
    /// SPI of the original initiator.
    pub spi_i: IkeSpi,
    /// SPI of the original responder.
    pub spi_r: IkeSpi,
    /// Largest IKE message, from its header on; longer ones go in fragments. `None`: the peer does not take fragments.
    pub fragment_size: Option<u16>,
    /// Retransmission of requests.
    pub retransmit: Retransmit,
    /// Message ID of this side's next request.
    pub next_request: u32,
    /// Message ID of the peer's next request.
    pub expected_request: u32,
}

/// A message in one or several datagrams; a copy is a reference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datagrams(Arc<[Vec<u8>]>);

/// What became of a datagram.
#[derive(Debug)]
pub enum Received {
    /// A new request, which has to be answered.
    Request {
        /// Exchange.
        exchange: ExchangeType,
        /// To answer with.
        id: u32,
        /// Type of the first payload.
        first: PayloadType,
        /// The payloads.
        payloads: Vec<Payload>,
        /// The payloads as they came.
        plain: Vec<u8>,
    },
    /// The response to the outstanding request, which is outstanding no longer.
    Response {
        /// Exchange.
        exchange: ExchangeType,
        /// Type of the first payload.
        first: PayloadType,
        /// The payloads.
        payloads: Vec<Payload>,
        /// The payloads as they came.
        plain: Vec<u8>,
    },
    /// The last request came again: the same answer is to go to where it came from.
    Duplicate(Datagrams),
    /// A fragment, which is kept.
    Pending,
    /// Nothing to be acted on.
    Ignored(Ignored),
    /// A new request whose payloads cannot be read. It has to be answered with this notification.
    Malformed {
        /// Exchange.
        exchange: ExchangeType,
        /// To answer with.
        id: u32,
        /// INVALID_SYNTAX or UNSUPPORTED_CRITICAL_PAYLOAD.
        notify: Notify,
    },
    /// The response to the outstanding request, which is outstanding no longer, but its payloads cannot be read.
    MalformedResponse {
        /// Exchange.
        exchange: ExchangeType,
    },
}

/// A request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expired {
    /// It is to be sent again.
    Resend(Datagrams),
    /// It was sent as often as it may be.
    Dead,
}

/// A request that is sent until it is answered; of IKE_SA_INIT used by itself.
#[derive(Debug)]
pub struct Retransmission {
    datagrams: Datagrams,
    policy: Retransmit,
    wait: Duration,
    due: Instant,
    sent: u8,
}

#[derive(Debug)]
struct Outstanding {
    id: u32,
    exchange: ExchangeType,
    retransmission: Retransmission,
    /// Fragments of the response.
    joining: Option<Box<Reassembly>>,
}

/// The peer's last request.
#[derive(Debug)]
struct Last {
    /// Of the datagram it came in, or of its first fragment.
    digest: u64,
    /// `None` until it is answered.
    reply: Option<Datagrams>,
    forget: Instant,
}

/// What was sealed.
struct Opened {
    first: PayloadType,
    plain: Vec<u8>,
    digest: u64,
}

/// RFC 7296 section 2.1: "responders are allowed to forget the response after a timeout of several minutes."
const REPLY_LIFETIME: Duration = Duration::from_mins(3);
/// Section 2.2: message IDs do not wrap; this one is not used.
const EXHAUSTED: u32 = u32::MAX;
/// Longest wait before a retransmission.
const MAX_WAIT: Duration = Duration::from_mins(10);

impl Channel {
    /// With these keys. `None` if they are of an algorithm that is not known.
    pub fn new(config: &ChannelConfig, keys: &IkeKeys) -> Option<Self> {
        let &ChannelConfig {
            initiator,
            spi_i,
            spi_r,
            fragment_size,
            retransmit,
            next_request,
            expected_request,
        } = config;
        let (sealer, opener) = directions(initiator, keys)?;
        Some(Self {
            initiator,
            spi_i,
            spi_r,
            sealer,
            opener,
            fragment_size,
            retransmit,
            next_request,
            expected_request,
            outstanding: None,
            last: None,
            joining: None,
        })
    }

    /// Goes on with other keys (RFC 9370 section 2.2.2: after each IKE_INTERMEDIATE). Answers in the cache stay as they
    /// were sealed. Whether their algorithm is known.
    pub fn rekey(&mut self, keys: &IkeKeys) -> bool {
        let Some((sealer, opener)) = directions(self.initiator, keys) else { return false };
        (self.sealer, self.opener) = (sealer, opener);
        true
    }

    /// SPIs of the original initiator and of the original responder.
    pub const fn spis(&self) -> (IkeSpi, IkeSpi) {
        (self.spi_i, self.spi_r)
    }

    /// Header of a message of this side.
    pub const fn head(&self, exchange: ExchangeType, response: bool, message_id: u32) -> Head {
        let Self { spi_i, spi_r, initiator, .. } = *self;
        Head { spi_i, spi_r, exchange, from_initiator: initiator, response, message_id }
    }

    /// Message ID of this side's next request.
    pub const fn next_request_id(&self) -> u32 {
        self.next_request
    }

    /// Message ID of the peer's next request.
    #[cfg(test)]
    pub const fn expected_request_id(&self) -> u32 {
        self.expected_request
    }

    /// Whether a request of this side can be sent now: none is outstanding, and a message ID is left.
    pub const fn may_request(&self) -> bool {
        self.outstanding.is_none() && !self.is_exhausted()
    }

    /// Whether message IDs are used up, so that the IKE SA has to be replaced.
    pub const fn is_exhausted(&self) -> bool {
        self.next_request == EXHAUSTED || self.expected_request == EXHAUSTED
    }

    /// Whether a request of the peer waits for [`respond`](Self::respond).
    pub fn is_answering(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.reply.is_none())
    }

    /// Sends a request. Only while [`may_request`](Self::may_request); otherwise nothing is sent.
    pub fn request(
        &mut self,
        now: Instant,
        exchange: ExchangeType,
        payloads: &[Payload],
        random: &mut dyn Random,
    ) -> Datagrams {
        debug_assert!(self.may_request(), "one request at a time");
        if !self.may_request() {
            return Datagrams::default();
        }
        let id = self.next_request;
        self.next_request += 1;
        let datagrams = self.seal(&self.head(exchange, false, id), payloads, random);
        let retransmission = Retransmission::new(now, datagrams.clone(), self.retransmit, random);
        self.outstanding = Some(Box::new(Outstanding { id, exchange, retransmission, joining: None }));
        datagrams
    }

    /// Answers the peer's last request.
    pub fn respond(
        &mut self,
        exchange: ExchangeType,
        id: u32,
        payloads: &[Payload],
        random: &mut dyn Random,
    ) -> Datagrams {
        let datagrams = self.seal(&self.head(exchange, true, id), payloads, random);
        if id.checked_add(1) == Some(self.expected_request)
            && let Some(last) = &mut self.last
        {
            last.reply = Some(datagrams.clone());
        }
        datagrams
    }

    /// Takes a message with the SPIs of this IKE SA.
    pub fn receive(&mut self, now: Instant, parsed: &Parsed<'_>, datagram: &[u8]) -> Received {
        let Head { spi_i, spi_r, from_initiator, response, .. } = parsed.head;
        if from_initiator == self.initiator {
            return Received::Ignored(Ignored::Flags);
        }
        if (spi_i, spi_r) != (self.spi_i, self.spi_r) {
            return Received::Ignored(Ignored::UnknownSpi);
        }
        let received = if response {
            self.receive_response(parsed, datagram)
        } else {
            self.receive_request(now, parsed, datagram)
        };
        received.unwrap_or_else(Received::Ignored)
    }

    /// When [`expire`](Self::expire) is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        let resend = self.outstanding.as_ref().map(|outstanding| outstanding.retransmission.deadline());
        let forget = self.last.as_ref().filter(|last| last.reply.is_some()).map(|last| last.forget);
        resend.into_iter().chain(forget).min()
    }

    /// The [`deadline`](Self::deadline) has come, or not yet. Gives what is to be done about a request without an answer.
    pub fn expire(&mut self, now: Instant, random: &mut dyn Random) -> Option<Expired> {
        if self.last.as_ref().is_some_and(|last| last.reply.is_some() && last.forget <= now) {
            self.last = None;
        }
        let retransmission = &mut self.outstanding.as_mut()?.retransmission;
        (retransmission.deadline() <= now).then(|| retransmission.expire(now, random))
    }

    /// The outstanding request once more, at once and then as if it were new: the path has changed.
    pub fn resend(&mut self, now: Instant, random: &mut dyn Random) -> Option<Datagrams> {
        let retransmission = &mut self.outstanding.as_mut()?.retransmission;
        let datagrams = retransmission.datagrams.clone();
        *retransmission = Retransmission::new(now, datagrams.clone(), self.retransmit, random);
        Some(datagrams)
    }

    fn receive_request(
        &mut self,
        now: Instant,
        parsed: &Parsed<'_>,
        datagram: &[u8],
    ) -> Result<Received, Ignored> {
        let Head { exchange, message_id: id, .. } = parsed.head;
        if id.checked_add(1) == Some(self.expected_request) {
            return self.repeated(parsed, datagram);
        }
        if id != self.expected_request || id == EXHAUSTED || self.is_answering() {
            return Err(Ignored::MessageId);
        }
        let Some(Opened { first, plain, digest }) =
            open(&self.opener, &mut self.joining, &parsed.body, datagram)?
        else {
            return Ok(Received::Pending);
        };
        // Whatever arrived in fragments of it was another way to send the same.
        self.joining = None;
        self.expected_request = id + 1;
        self.last = Some(Box::new(Last { digest, reply: None, forget: now + REPLY_LIFETIME }));
        Ok(match parse::chain(first, &plain) {
            Ok(payloads) => Received::Request { exchange, id, first, payloads, plain },
            Err(error) => Received::Malformed { exchange, id, notify: notify(error) },
        })
    }

    /// The request before the expected one: answered again, if it is authentic.
    fn repeated(&self, parsed: &Parsed<'_>, datagram: &[u8]) -> Result<Received, Ignored> {
        let last = self.last.as_ref().ok_or(Ignored::MessageId)?;
        // RFC 7383 section 2.6.1: of a message in fragments, only fragment 1 makes the answer go out again.
        if matches!(parsed.body, Body::Fragment { number, .. } if number != 1) {
            return Err(Ignored::Fragment);
        }
        // RFC 7296 section 2.1: "A retransmission ... MUST be bitwise identical to the original", then it is as authentic
        // as that was. In other fragments it is not identical.
        if digest(datagram) != last.digest {
            match parsed.body {
                Body::Plain(_) => return Err(Ignored::Unprotected),
                Body::Encrypted { aad, sealed, .. } | Body::Fragment { aad, sealed, .. } => {
                    self.opener.open(aad, sealed).ok_or(Ignored::Integrity)?;
                }
            }
        }
        last.reply.clone().map(Received::Duplicate).ok_or(Ignored::Busy)
    }

    fn receive_response(&mut self, parsed: &Parsed<'_>, datagram: &[u8]) -> Result<Received, Ignored> {
        let Head { exchange, message_id: id, .. } = parsed.head;
        let outstanding = self.outstanding.as_mut().filter(|outstanding| outstanding.id == id);
        let outstanding = outstanding.ok_or(Ignored::MessageId)?;
        if exchange != outstanding.exchange {
            return Err(Ignored::Exchange);
        }
        let opened = open(&self.opener, &mut outstanding.joining, &parsed.body, datagram)?;
        let Some(Opened { first, plain, .. }) = opened else { return Ok(Received::Pending) };
        self.outstanding = None;
        Ok(match parse::chain(first, &plain) {
            Ok(payloads) => Received::Response { exchange, first, payloads, plain },
            Err(_) => Received::MalformedResponse { exchange },
        })
    }

    /// A message with any bytes inside, under the next message ID: what a peer that
    /// misbehaves could send.
    #[cfg(any(test, feature = "exercise"))]
    pub fn forge(
        &mut self,
        exchange: ExchangeType,
        response: bool,
        first: PayloadType,
        chain: &[u8],
        random: &mut dyn Random,
    ) -> Vec<Vec<u8>> {
        let id = if response { self.expected_request } else { self.next_request };
        self.next_request = self.next_request.saturating_add(u32::from(!response));
        self.seal_chain(&self.head(exchange, response, id), first, chain, random).0.to_vec()
    }

    fn seal(&mut self, head: &Head, payloads: &[Payload], random: &mut dyn Random) -> Datagrams {
        let mut plain = Vec::new();
        let first = emit::chain(payloads, &mut plain);
        self.seal_chain(head, first, &plain, random)
    }

    fn seal_chain(
        &mut self,
        head: &Head,
        first: PayloadType,
        plain: &[u8],
        random: &mut dyn Random,
    ) -> Datagrams {
        let sealed = self.sealer.sealed_length(plain.len());
        if let Some(limit) = self.fragment_size.map(usize::from)
            && SK_PREFIX_LEN + sealed > limit
        {
            let part = self.fragment_room(limit);
            if let Ok(total) = u16::try_from(plain.len().div_ceil(part)) {
                let fragments = (1..=total).zip(plain.chunks(part)).map(|(number, part)| {
                    let sealed = self.sealer.sealed_length(part.len());
                    let prefix = emit::skf_prefix(head, first, number, total, sealed);
                    self.sealer.seal(random, prefix, part)
                });
                return Datagrams::from(fragments.collect::<Vec<_>>());
            }
        }
        let prefix = emit::sk_prefix(head, first, sealed);
        Datagrams::from(vec![self.sealer.seal(random, prefix, plain)])
    }

    /// Most bytes of payloads in a fragment of `limit` bytes.
    fn fragment_room(&self, limit: usize) -> usize {
        self.sealer.longest_chain(limit.saturating_sub(SKF_PREFIX_LEN)).max(MIN_FRAGMENT)
    }
}

/// Least bytes of payloads in a fragment, however small a limit is configured.
const MIN_FRAGMENT: usize = 256;

/// Opens what is sealed; `None` if fragments are missing.
fn open(
    opener: &Opener,
    joining: &mut Option<Box<Reassembly>>,
    body: &Body<'_>,
    datagram: &[u8],
) -> Result<Option<Opened>, Ignored> {
    match *body {
        Body::Plain(_) => Err(Ignored::Unprotected),
        Body::Encrypted { first_inner: first, aad, sealed } => {
            let plain = opener.open(aad, sealed).ok_or(Ignored::Integrity)?;
            Ok(Some(Opened { first, plain, digest: digest(datagram) }))
        }
        Body::Fragment { number, total, first_inner: first, aad, sealed } => {
            Reassembly::wants(joining.as_deref(), number, total)?;
            let plain = opener.open(aad, sealed).ok_or(Ignored::Integrity)?;
            let fragment = Fragment { number, total, first, plain, digest: digest(datagram) };
            let whole = Reassembly::add(joining, fragment)?;
            Ok(whole.map(|Whole { first, plain, digest }| Opened { first, plain, digest }))
        }
    }
}

fn directions(initiator: bool, keys: &IkeKeys) -> Option<(Sealer, Opener)> {
    Some((keys.sealer(initiator)?, keys.opener(!initiator)?))
}

/// Tells whether a datagram is the one that was authenticated before. Whoever does not know that one cannot make another
/// with the same digest, and whoever knows it can send it.
fn digest(datagram: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    datagram.hash(&mut hasher);
    hasher.finish()
}

fn notify(error: ParseError) -> Notify {
    match error {
        ParseError::UnsupportedCritical(kind) => {
            Notify::new(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, [kind.0])
        }
        _ => Notify::new(NotifyType::INVALID_SYNTAX, []),
    }
}

impl Retransmission {
    /// A request that is being sent now for the first time.
    pub fn new(now: Instant, datagrams: Datagrams, policy: Retransmit, random: &mut dyn Random) -> Self {
        let wait = policy.first.min(MAX_WAIT);
        Self { datagrams, policy, wait, due: now + jittered(wait, random), sent: 1 }
    }

    /// The request.
    pub const fn datagrams(&self) -> &Datagrams {
        &self.datagrams
    }

    /// When [`expire`](Self::expire) is to be called.
    pub const fn deadline(&self) -> Instant {
        self.due
    }

    /// The deadline has come.
    pub fn expire(&mut self, now: Instant, random: &mut dyn Random) -> Expired {
        if self.sent >= self.policy.tries {
            return Expired::Dead;
        }
        self.sent += 1;
        let longer = Duration::try_from_secs_f32(self.wait.as_secs_f32() * self.policy.factor);
        self.wait = longer.unwrap_or(MAX_WAIT).min(MAX_WAIT);
        self.due = now + jittered(self.wait, random);
        Expired::Resend(self.datagrams.clone())
    }
}

/// A tenth more or less, so that peers that were cut off together do not come back together.
fn jittered(wait: Duration, random: &mut dyn Random) -> Duration {
    wait * 9 / 10 + (wait / 5 / 65_536) * (random.u32() >> 16)
}

impl Datagrams {
    /// Number of datagrams.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// They.
    pub fn iter(&self) -> core::slice::Iter<'_, Vec<u8>> {
        self.0.iter()
    }
}

impl From<Vec<Vec<u8>>> for Datagrams {
    fn from(mut datagrams: Vec<Vec<u8>>) -> Self {
        datagrams.iter_mut().for_each(Vec::shrink_to_fit);
        Self(datagrams.into())
    }
}

impl<'a> IntoIterator for &'a Datagrams {
    type Item = &'a Vec<u8>;
    type IntoIter = core::slice::Iter<'a, Vec<u8>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Secret;
    use crate::crypto::keys::Seed;
    use crate::message::registry::{EncrId, IntegId, KeMethod, PrfId, ProtocolId};
    use crate::negotiate::Additional;
    use crate::negotiate::IkeSuite;

    struct Zeros;

    impl Random for Zeros {
        fn fill(&mut self, out: &mut [u8]) {
            out.fill(0);
        }
    }

    const SPIS: (IkeSpi, IkeSpi) = (IkeSpi(1), IkeSpi(2));
    const INFORMATIONAL: ExchangeType = ExchangeType::INFORMATIONAL;

    fn suite() -> IkeSuite {
        IkeSuite {
            encr: EncrId::AES_GCM_16,
            key_bits: 128,
            prf: PrfId::HMAC_SHA2_256,
            integ: IntegId::NONE,
            ke: KeMethod::CURVE25519,
            additional: Additional::new(),
        }
    }

    fn keys(secret: u8) -> IkeKeys {
        let seed = Seed { nonce_i: &[1; 32], nonce_r: &[2; 32], spi_i: SPIS.0, spi_r: SPIS.1 };
        IkeKeys::initial(&suite(), &Secret::new([secret; 32]), &seed).unwrap()
    }

    fn channel(initiator: bool, change: impl FnOnce(&mut ChannelConfig)) -> Channel {
        let mut config = ChannelConfig {
            initiator,
            spi_i: SPIS.0,
            spi_r: SPIS.1,
            fragment_size: None,
            retransmit: Retransmit::default(),
            next_request: u32::from(initiator),
            expected_request: u32::from(!initiator),
        };
        change(&mut config);
        Channel::new(&config, &keys(7)).unwrap()
    }

    fn pair() -> (Channel, Channel) {
        (channel(true, |_| ()), channel(false, |_| ()))
    }

    fn fragmenting() -> (Channel, Channel) {
        let change = |config: &mut ChannelConfig| config.fragment_size = Some(500);
        (channel(true, change), channel(false, change))
    }

    fn payloads(length: usize) -> Vec<Payload> {
        vec![Payload::Notify(Notify::new(NotifyType::COOKIE2, vec![3; length]))]
    }

    fn give(channel: &mut Channel, now: Instant, datagram: &[u8]) -> Received {
        channel.receive(now, &parse::message(datagram).unwrap(), datagram)
    }

    /// Gives all datagrams; what the last one led to.
    fn give_all(channel: &mut Channel, now: Instant, datagrams: &Datagrams) -> Received {
        let received = datagrams.iter().map(|datagram| give(channel, now, datagram));
        received.last().unwrap()
    }

    #[track_caller]
    fn request(received: Received) -> (u32, Vec<Payload>) {
        match received {
            Received::Request { id, payloads, .. } => (id, payloads),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn response(received: Received) -> Vec<Payload> {
        match received {
            Received::Response { payloads, .. } => payloads,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn ignored(received: Received) -> Ignored {
        match received {
            Received::Ignored(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    /// IKE-1: requests and responses both ways, each direction with message IDs of its own.
    #[test]
    fn ike_1_exchanges_both_ways() {
        let now = Instant::now();
        let (mut a, mut b) = pair();
        for round in 0..3 {
            for (from, to, first) in [(0, 1, 1), (1, 0, 0)] {
                let ends = [&mut a, &mut b];
                let datagrams = ends[from].request(now, INFORMATIONAL, &payloads(round), &mut Zeros);
                assert!(!ends[from].may_request());
                let (id, asked) = request(give_all(ends[to], now, &datagrams));
                assert_eq!((usize::try_from(id).unwrap(), asked), (round + first, payloads(round)));
                assert!(ends[to].is_answering());
                let datagrams = ends[to].respond(INFORMATIONAL, id, &payloads(round + 9), &mut Zeros);
                assert_eq!(response(give_all(ends[from], now, &datagrams)), payloads(round + 9));
                assert!(ends[from].may_request() && !ends[to].is_answering());
                assert_eq!(ignored(give_all(ends[from], now, &datagrams)), Ignored::MessageId);
            }
        }
        assert_eq!((a.next_request_id(), a.expected_request_id()), (4, 3));
        assert_eq!((b.next_request_id(), b.expected_request_id()), (3, 4));
    }

    /// IKE-1: "the responder ... MUST ... retransmit the response" to a repeated request, and does not act on it again.
    #[test]
    fn ike_1_a_repeated_request_gets_the_same_answer() {
        let now = Instant::now();
        let (mut a, mut b) = pair();
        let asked = a.request(now, INFORMATIONAL, &payloads(1), &mut Zeros);
        let (id, _) = request(give_all(&mut b, now, &asked));
        assert_eq!(ignored(give_all(&mut b, now, &asked)), Ignored::Busy);
        let answer = b.respond(INFORMATIONAL, id, &payloads(2), &mut Zeros);
        for _ in 0..3 {
            match give_all(&mut b, now, &asked) {
                Received::Duplicate(again) => assert_eq!(again, answer),
                other => panic!("{other:?}"),
            }
        }
        // Somebody who only knows SPIs and message ID gets no answer.
        let mut forged = asked.iter().next().unwrap().clone();
        *forged.last_mut().unwrap() ^= 1;
        assert_eq!(ignored(give(&mut b, now, &forged)), Ignored::Integrity);
        // After the next request the answer before is gone.
        response(give_all(&mut a, now, &answer));
        let next = a.request(now, INFORMATIONAL, &payloads(3), &mut Zeros);
        request(give_all(&mut b, now, &next));
        assert_eq!(ignored(give_all(&mut b, now, &asked)), Ignored::MessageId);
    }

    #[test]
    fn an_answer_is_forgotten_after_minutes() {
        let now = Instant::now();
        let (mut a, mut b) = pair();
        let asked = a.request(now, INFORMATIONAL, &[], &mut Zeros);
        let (id, _) = request(give_all(&mut b, now, &asked));
        assert_eq!(b.deadline(), None);
        b.respond(INFORMATIONAL, id, &[], &mut Zeros);
        let forget = b.deadline().unwrap();
        assert_eq!(forget - now, REPLY_LIFETIME);
        assert_eq!(b.expire(forget, &mut Zeros), None);
        assert_eq!(b.deadline(), None);
        assert_eq!(ignored(give_all(&mut b, forget, &asked)), Ignored::MessageId);
    }

    #[test]
    fn a_request_is_repeated_with_growing_waits_and_then_given_up() {
        let start = Instant::now();
        let (mut a, _) = pair();
        let asked = a.request(start, INFORMATIONAL, &[], &mut Zeros);
        let mut waits = Vec::new();
        let mut before = start;
        loop {
            let due = a.deadline().unwrap();
            assert_eq!(a.expire(due.checked_sub(Duration::from_nanos(1)).unwrap(), &mut Zeros), None);
            waits.push((due - before).as_secs_f32());
            before = due;
            match a.expire(due, &mut Zeros).unwrap() {
                Expired::Resend(again) => assert_eq!(again, asked),
                Expired::Dead => break,
            }
        }
        // `Zeros` takes a tenth off each.
        let expected = [0.9, 1.62, 2.916, 5.249, 9.448, 17.006, 30.611];
        let close = |(wait, expected): (&f32, f32)| (wait - expected).abs() < 0.01;
        assert!(waits.len() == 7 && waits.iter().zip(expected).all(close), "{waits:?}");
    }

    #[test]
    fn a_moved_request_starts_over() {
        let start = Instant::now();
        let (mut a, mut b) = pair();
        assert_eq!(a.resend(start, &mut Zeros), None);
        let asked = a.request(start, INFORMATIONAL, &[], &mut Zeros);
        a.expire(a.deadline().unwrap(), &mut Zeros).unwrap();
        let later = a.deadline().unwrap();
        assert_eq!(a.resend(later, &mut Zeros), Some(asked.clone()));
        assert_eq!(a.deadline().unwrap() - later, Duration::from_millis(900));
        request(give_all(&mut b, later, &asked));
    }

    #[test]
    fn jitter_is_a_tenth_at_most() {
        struct Ones;
        impl Random for Ones {
            fn fill(&mut self, out: &mut [u8]) {
                out.fill(0xff);
            }
        }
        let wait = Duration::from_secs(10);
        assert_eq!(jittered(wait, &mut Zeros), Duration::from_secs(9));
        let most = jittered(wait, &mut Ones);
        assert!(most > Duration::from_millis(10_999) && most <= Duration::from_secs(11), "{most:?}");
    }

    #[test]
    fn what_does_not_fit_is_ignored_and_changes_nothing() {
        let now = Instant::now();
        let (mut a, mut b) = pair();
        let asked = a.request(now, INFORMATIONAL, &payloads(1), &mut Zeros);
        let asked = asked.iter().next().unwrap();
        // Reflected to the one who sent it.
        assert_eq!(ignored(give(&mut a, now, asked)), Ignored::Flags);
        let changed = |at: usize, to: u8| {
            let mut changed = asked.clone();
            changed[at] = to;
            changed
        };
        assert_eq!(ignored(give(&mut b, now, &changed(7, 9))), Ignored::UnknownSpi);
        for id in [2, 255] {
            assert_eq!(ignored(give(&mut b, now, &changed(23, id))), Ignored::MessageId);
        }
        assert_eq!(ignored(give(&mut b, now, &changed(18, 36))), Ignored::Integrity);
        assert_eq!(ignored(give(&mut b, now, &changed(19, 0x28))), Ignored::MessageId);
        let head = a.head(INFORMATIONAL, false, 1);
        let plain = emit::plain(&head, &payloads(1));
        assert_eq!(ignored(give(&mut b, now, &plain)), Ignored::Unprotected);
        let (id, _) = request(give(&mut b, now, asked));
        assert_eq!(ignored(give(&mut b, now, &plain)), Ignored::Unprotected);
        let head = b.head(ExchangeType::CREATE_CHILD_SA, true, id);
        let answer = b.seal(&head, &[], &mut Zeros);
        assert_eq!(ignored(give_all(&mut a, now, &answer)), Ignored::Exchange);
        let answer = b.respond(INFORMATIONAL, id, &[], &mut Zeros);
        assert_eq!(response(give_all(&mut a, now, &answer)), []);
    }

    /// IKE-1: unreadable but authentic payloads get INVALID_SYNTAX or UNSUPPORTED_CRITICAL_PAYLOAD under their ID.
    #[test]
    fn ike_1_authentic_but_unreadable() {
        let now = Instant::now();
        let (mut a, mut b) = pair();
        let unknown = Payload::Unknown { kind: PayloadType(200), critical: true };
        let asked = a.request(now, INFORMATIONAL, &[unknown], &mut Zeros);
        let answer = match give_all(&mut b, now, &asked) {
            Received::Malformed { exchange, id, notify } => {
                assert_eq!(notify, Notify::new(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD, [200]));
                b.respond(exchange, id, &[Payload::Notify(notify)], &mut Zeros)
            }
            other => panic!("{other:?}"),
        };
        response(give_all(&mut a, now, &answer));
        let asked = a.request(now, INFORMATIONAL, &[Payload::Nonce(vec![1])], &mut Zeros);
        let id = match give_all(&mut b, now, &asked) {
            Received::Malformed { id, notify, .. } if notify.kind == NotifyType::INVALID_SYNTAX => id,
            other => panic!("{other:?}"),
        };
        let answer = b.respond(INFORMATIONAL, id, &[Payload::Nonce(vec![1])], &mut Zeros);
        match give_all(&mut a, now, &answer) {
            Received::MalformedResponse { .. } => (),
            other => panic!("{other:?}"),
        }
        assert!(a.may_request());
    }

    /// IKE-6: RFC 7383 both ways, with loss, repetition and another order.
    #[test]
    fn ike_6_fragments_both_ways() {
        let now = Instant::now();
        let (mut a, mut b) = fragmenting();
        assert_eq!(a.request(now, INFORMATIONAL, &payloads(300), &mut Zeros).len(), 1);
        let (mut a, _) = fragmenting();
        let asked = a.request(now, INFORMATIONAL, &payloads(2_000), &mut Zeros);
        assert_eq!(asked.len(), 5);
        assert!(asked.iter().all(|datagram| datagram.len() <= 500));
        let at = |index: usize| asked.iter().nth(index).unwrap();
        for index in [4, 1, 2, 3] {
            assert!(matches!(give(&mut b, now, at(index)), Received::Pending));
            assert_eq!(ignored(give(&mut b, now, at(index))), Ignored::Fragment);
        }
        let mut forged = at(0).clone();
        forged[40] ^= 1;
        assert_eq!(ignored(give(&mut b, now, &forged)), Ignored::Integrity);
        let (id, payloads_of_request) = request(give(&mut b, now, at(0)));
        assert_eq!(payloads_of_request, payloads(2_000));
        let answer = b.respond(INFORMATIONAL, id, &payloads(3_000), &mut Zeros);
        assert!(answer.len() > 5);
        // RFC 7383 section 2.6.1: only fragment 1 brings the answer again.
        assert_eq!(ignored(give(&mut b, now, at(3))), Ignored::Fragment);
        assert!(matches!(give(&mut b, now, at(0)), Received::Duplicate(again) if again == answer));
        assert_eq!(response(give_all(&mut a, now, &answer)), payloads(3_000));
        assert_eq!(ignored(give(&mut a, now, answer.iter().next().unwrap())), Ignored::MessageId);
    }

    /// The peer sends the same request in smaller fragments: it is new until it is whole, and known afterwards.
    #[test]
    fn smaller_fragments_of_the_same_request() {
        let now = Instant::now();
        let (mut a, mut b) = fragmenting();
        let mut small = channel(true, |config| config.fragment_size = Some(400));
        let first = a.request(now, INFORMATIONAL, &payloads(2_000), &mut Zeros);
        assert!(matches!(give(&mut b, now, first.iter().next().unwrap()), Received::Pending));
        let second = small.request(now, INFORMATIONAL, &payloads(2_000), &mut Zeros);
        let (id, _) = request(give_all(&mut b, now, &second));
        let answer = b.respond(INFORMATIONAL, id, &[], &mut Zeros);
        match give(&mut b, now, first.iter().next().unwrap()) {
            Received::Duplicate(again) => assert_eq!(again, answer),
            other => panic!("{other:?}"),
        }
    }

    /// RFC 9370: answers sealed with the keys before stay answers to requests sealed with the keys before.
    #[test]
    fn keys_change_between_exchanges() {
        const INTERMEDIATE: ExchangeType = ExchangeType::IKE_INTERMEDIATE;
        let now = Instant::now();
        let (mut a, mut b) = pair();
        let asked = a.request(now, INTERMEDIATE, &payloads(1), &mut Zeros);
        let (id, _) = request(give_all(&mut b, now, &asked));
        let answer = b.respond(INTERMEDIATE, id, &[], &mut Zeros);
        assert!(b.rekey(&keys(8)));
        assert!(matches!(give_all(&mut b, now, &asked), Received::Duplicate(again) if again == answer));
        response(give_all(&mut a, now, &answer));
        assert!(a.rekey(&keys(8)));
        let asked = a.request(now, INFORMATIONAL, &payloads(1), &mut Zeros);
        request(give_all(&mut b, now, &asked));
        let mut old = channel(false, |_| ());
        assert_eq!(ignored(give_all(&mut old, now, &asked)), Ignored::MessageId);
    }

    /// RFC 7296 section 2.2: "the Message ID ... MUST NOT wrap".
    #[test]
    fn message_ids_do_not_wrap() {
        let now = Instant::now();
        let mut a = channel(true, |config| config.next_request = u32::MAX - 1);
        let mut b = channel(false, |config| config.expected_request = u32::MAX - 1);
        let asked = a.request(now, INFORMATIONAL, &[], &mut Zeros);
        let (id, _) = request(give_all(&mut b, now, &asked));
        let answer = b.respond(INFORMATIONAL, id, &[], &mut Zeros);
        response(give_all(&mut a, now, &answer));
        assert!(a.is_exhausted() && b.is_exhausted() && !a.may_request());
        assert!(matches!(give_all(&mut b, now, &asked), Received::Duplicate(_)));
        let head = a.head(INFORMATIONAL, false, u32::MAX);
        let beyond = a.seal(&head, &[], &mut Zeros);
        assert_eq!(ignored(give_all(&mut b, now, &beyond)), Ignored::MessageId);
    }

    /// 100,000 of them live at a time.
    #[test]
    fn a_channel_is_small() {
        assert!(size_of::<Channel>() <= 512, "{}", size_of::<Channel>());
        let delete = Payload::Delete { protocol: ProtocolId::IKE, spis: vec![] };
        let (mut a, _) = pair();
        let datagrams = a.request(Instant::now(), INFORMATIONAL, &[delete], &mut Zeros);
        assert!(datagrams.iter().all(|datagram| datagram.capacity() == datagram.len()));
    }
}
