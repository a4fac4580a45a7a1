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

mod saved;

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
    /// Of the datagram it came in, or of its first fragment; `None` if it came before a reset.
    digest: Option<u64>,
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
        self.last = Some(Box::new(Last { digest: Some(digest), reply: None, forget: now + REPLY_LIFETIME }));
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
        if last.digest != Some(digest(datagram)) {
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
mod tests;
