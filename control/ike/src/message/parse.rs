//! Bytes to messages. Nothing here panics on any bytes, and what is allocated is bounded by the length of the datagram
//! and by the counts below.
//!
//! [`message`] reads a datagram: the header, and either its payloads or the envelope of the Encrypted payload, whose inside
//! is read by [`chain`] once it has been opened. The bytes of `aad` and `sealed` are those that arrived, so that what is
//! authenticated is never what was merely understood.
//!
//! Lenient where RFC 7296 says that a receiver ignores: reserved fields, minor versions, flags, the critical bit of known
//! payloads, unknown payloads, attributes and traffic selector types. Strict in all lengths and counts.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::registry::{
    AuthMethod, CertEncoding, CfgAttribute, CfgType, ExchangeType, IdType, KeMethod, NotifyType, PayloadType,
    ProtocolId, TransformType, TsType,
};
use super::{
    Configuration, Head, IdData, IkeSpi, KeyExchangeData, Notify, Payload, Proposal, TrafficSelector,
    Transform,
};

/// Length of the IKE header.
pub const HEADER_LEN: usize = 28;
/// Most payloads in a chain.
pub const MAX_PAYLOADS: usize = 128;
/// Most proposals in an SA payload.
pub const MAX_PROPOSALS: usize = 64;
/// Most selectors in a traffic selector payload.
pub const MAX_SELECTORS: usize = 64;
/// Most attributes in a Configuration payload.
pub const MAX_ATTRIBUTES: usize = 128;

/// Why bytes are no message. The answer, if there is one, is INVALID_SYNTAX for all but [`ParseError::Version`] and
/// [`ParseError::UnsupportedCritical`], which have their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It ends before a length in it says so.
    #[error("the message is truncated")]
    Truncated,
    /// Not major version 2. The byte as it stands, major version in the upper half.
    #[error("IKE version {}.{} is not spoken here", .0 >> 4, .0 & 15)]
    Version(u8),
    /// A field that contradicts another or the RFC.
    #[error("the message is malformed: {0}")]
    Syntax(&'static str),
    /// A payload of unknown type with the critical bit (section 2.5).
    #[error("critical payload of unknown type {}", .0.0)]
    UnsupportedCritical(PayloadType),
    /// More of something than is ever needed.
    #[error("the message holds more payloads, proposals, selectors or attributes than are accepted")]
    Oversized,
}

/// A message of which nothing but the outside has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed<'a> {
    /// Its header.
    pub head: Head,
    /// What follows.
    pub body: Body<'a>,
}

/// What follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    /// Payloads in the clear, as in IKE_SA_INIT.
    Plain(Vec<Payload>),
    /// One Encrypted payload (section 3.14).
    Encrypted {
        /// Type of the first payload inside.
        first_inner: PayloadType,
        /// The message up to and with the generic header of the Encrypted payload.
        aad: &'a [u8],
        /// The rest: initialization vector, ciphertext and ICV.
        sealed: &'a [u8],
    },
    /// One Encrypted Fragment payload (RFC 7383 section 2.5).
    Fragment {
        /// Number of the fragment, from 1, at most `total`.
        number: u16,
        /// Fragments in all.
        total: u16,
        /// Type of the first payload inside the reassembled whole, in fragment 1; NONE in all others.
        first_inner: PayloadType,
        /// The message up to and with the total number of fragments.
        aad: &'a [u8],
        /// The rest: initialization vector, ciphertext and ICV.
        sealed: &'a [u8],
    },
}

/// What the first 28 bytes say, believed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Version, major in the upper half.
    pub version: u8,
    /// The header's fields. Of another major version they are no more than a guess.
    pub head: Head,
    /// Type of the first payload.
    pub first: PayloadType,
    /// Length that the header claims.
    pub length: u32,
}

/// Reads the header and checks nothing: enough to find the SA, and to answer INVALID_MAJOR_VERSION (section 2.5) or
/// INVALID_IKE_SPI.
pub fn peek(bytes: &[u8]) -> Option<Peek> {
    let mut reader = Reader(bytes);
    let spi_i = IkeSpi(u64::from_be_bytes(reader.array().ok()?));
    let spi_r = IkeSpi(u64::from_be_bytes(reader.array().ok()?));
    let [first, version, exchange, flags] = reader.array().ok()?;
    let message_id = reader.u32().ok()?;
    let length = reader.u32().ok()?;
    let head = Head {
        spi_i,
        spi_r,
        exchange: ExchangeType(exchange),
        from_initiator: flags & 0x08 != 0,
        response: flags & 0x20 != 0,
        message_id,
    };
    Some(Peek { version, head, first: PayloadType(first), length })
}

/// What a cookie is made of and whether one is there, of an IKE_SA_INIT request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First<'a> {
    /// The header.
    pub head: Head,
    /// The nonce, of a legal length.
    pub nonce: &'a [u8],
    /// Whether it has a COOKIE notification.
    pub has_cookie: bool,
}

/// Reads of a datagram what decides whether it is answered with a cookie (RFC 7296 section 2.6), and allocates nothing: in
/// a flood nothing else is done with it. `None` if it is not an IKE_SA_INIT request of a new IKE SA, or anything is wrong
/// with it; [`message`] then tells what.
pub fn first_request(bytes: &[u8]) -> Option<First<'_>> {
    let (head, mut kind, payloads) = head(bytes).ok()?;
    let new = head.exchange == ExchangeType::IKE_SA_INIT && head.from_initiator && !head.response;
    if !new || head.message_id != 0 || head.spi_i == IkeSpi::NONE || head.spi_r != IkeSpi::NONE {
        return None;
    }
    let (mut reader, mut nonce, mut has_cookie) = (Reader(payloads), None, false);
    for _ in 0..MAX_PAYLOADS {
        if kind == PayloadType::NONE {
            break;
        }
        let [next, _] = reader.array().ok()?;
        let mut body = reader.counted(4).ok()?;
        match kind {
            PayloadType::NONCE if !(16..=256).contains(&body.0.len()) => return None,
            PayloadType::NONCE => nonce = nonce.or(Some(body.0)),
            PayloadType::NOTIFY => {
                let [_, _] = body.array().ok()?;
                has_cookie |= NotifyType(body.u16().ok()?) == NotifyType::COOKIE;
            }
            _ => {}
        }
        kind = PayloadType(next);
    }
    (kind == PayloadType::NONE && reader.0.is_empty()).then_some(First { head, nonce: nonce?, has_cookie })
}

/// Reads the header of a datagram: its fields, the type of the first payload, and the payloads' bytes.
///
/// # Errors
/// If it is shorter than a header or than the header says, has bytes after the end, or is not of major version 2.
pub fn head(bytes: &[u8]) -> Result<(Head, PayloadType, &[u8]), ParseError> {
    let peek = peek(bytes).ok_or(ParseError::Truncated)?;
    if peek.version >> 4 != 2 {
        return Err(ParseError::Version(peek.version));
    }
    let length = usize::try_from(peek.length).unwrap_or(usize::MAX);
    if length > bytes.len() {
        return Err(ParseError::Truncated);
    }
    if length < bytes.len() {
        return Err(ParseError::Syntax("bytes after the end of the message"));
    }
    let payloads = bytes.get(HEADER_LEN..).ok_or(ParseError::Truncated)?;
    Ok((peek.head, peek.first, payloads))
}

/// Reads a datagram: its header, and its payloads or the envelope of what is encrypted.
///
/// # Errors
/// As [`head`] and [`chain`]; also for payloads before or after an Encrypted payload, which nobody sends.
pub fn message(bytes: &[u8]) -> Result<Parsed<'_>, ParseError> {
    let (head, first, payloads) = head(bytes)?;
    let body = match first {
        PayloadType::ENCRYPTED => {
            let (first_inner, _) = envelope(payloads)?;
            let (aad, sealed) = bytes.split_at_checked(HEADER_LEN + 4).ok_or(ParseError::Truncated)?;
            Body::Encrypted { first_inner, aad, sealed }
        }
        PayloadType::ENCRYPTED_FRAGMENT => {
            let (first_inner, mut body) = envelope(payloads)?;
            let (number, total) = (body.u16()?, body.u16()?);
            if number == 0 || number > total {
                return Err(ParseError::Syntax("fragment number"));
            }
            let (aad, sealed) = bytes.split_at_checked(HEADER_LEN + 8).ok_or(ParseError::Truncated)?;
            Body::Fragment { number, total, first_inner, aad, sealed }
        }
        _ => Body::Plain(chain(first, payloads)?),
    };
    Ok(Parsed { head, body })
}

/// Reads a chain of payloads that begins with one of type `first` and fills `bytes`.
///
/// # Errors
/// Of the first payload in which something is wrong. An Encrypted payload is: it stands first or not at all.
pub fn chain(first: PayloadType, bytes: &[u8]) -> Result<Vec<Payload>, ParseError> {
    let mut reader = Reader(bytes);
    let mut payloads = Vec::new();
    let mut kind = first;
    while kind != PayloadType::NONE {
        if payloads.len() == MAX_PAYLOADS {
            return Err(ParseError::Oversized);
        }
        let [next, flags] = reader.array()?;
        let body = reader.counted(4)?;
        payloads.push(payload(kind, flags & 0x80 != 0, body)?);
        kind = PayloadType(next);
    }
    reader.end("bytes after the last payload")?;
    Ok(payloads)
}

/// The generic header of a payload that has to be the only one: type of the first payload inside, and its body.
fn envelope(payloads: &[u8]) -> Result<(PayloadType, Reader<'_>), ParseError> {
    let mut reader = Reader(payloads);
    let [first_inner, _] = reader.array()?;
    let body = reader.counted(4)?;
    reader.end("bytes after the Encrypted payload")?;
    Ok((PayloadType(first_inner), body))
}

fn payload(kind: PayloadType, critical: bool, mut body: Reader<'_>) -> Result<Payload, ParseError> {
    Ok(match kind {
        PayloadType::SA => Payload::Sa(proposals(body)?),
        PayloadType::KE => {
            let method = KeMethod(body.u16()?);
            body.u16()?;
            Payload::Ke(KeyExchangeData { method, data: body.rest() })
        }
        PayloadType::ID_I => Payload::IdI(identification(body)?),
        PayloadType::ID_R => Payload::IdR(identification(body)?),
        PayloadType::CERT => Payload::Cert { encoding: CertEncoding(body.u8()?), data: body.rest() },
        PayloadType::CERTREQ => {
            Payload::CertReq { encoding: CertEncoding(body.u8()?), authorities: body.rest() }
        }
        PayloadType::AUTH => {
            let [method, _, _, _] = body.array()?;
            Payload::Auth { method: AuthMethod(method), data: body.rest() }
        }
        // Section 3.9: "the size of the Nonce Data MUST be between 16 and 256 octets, inclusive."
        PayloadType::NONCE if (16..=256).contains(&body.0.len()) => Payload::Nonce(body.rest()),
        PayloadType::NONCE => return Err(ParseError::Syntax("length of the nonce")),
        PayloadType::NOTIFY => {
            let [protocol, spi_size] = body.array()?;
            let kind = NotifyType(body.u16()?);
            let spi = body.take(spi_size.into())?.to_vec();
            Payload::Notify(Notify { protocol: ProtocolId(protocol), spi, kind, data: body.rest() })
        }
        PayloadType::DELETE => delete(body)?,
        PayloadType::VENDOR_ID => Payload::VendorId(body.rest()),
        PayloadType::TS_I => Payload::TsI(selectors(body)?),
        PayloadType::TS_R => Payload::TsR(selectors(body)?),
        PayloadType::CONFIGURATION => Payload::Cp(configuration(body)?),
        // RFC 3748 section 4: code, identifier, length.
        PayloadType::EAP if body.0.len() < 4 => return Err(ParseError::Truncated),
        PayloadType::EAP => Payload::Eap(body.rest()),
        PayloadType::ENCRYPTED | PayloadType::ENCRYPTED_FRAGMENT => {
            return Err(ParseError::Syntax("an Encrypted payload that is not the first"));
        }
        kind if critical => return Err(ParseError::UnsupportedCritical(kind)),
        kind => Payload::Unknown { kind, critical },
    })
}

fn proposals(mut body: Reader<'_>) -> Result<Vec<Proposal>, ParseError> {
    let mut proposals = Vec::new();
    loop {
        if proposals.len() == MAX_PROPOSALS {
            return Err(ParseError::Oversized);
        }
        let [more, _] = body.array()?;
        let mut inside = body.counted(4)?;
        let [number, protocol, spi_size, count] = inside.array()?;
        let spi = inside.take(spi_size.into())?.to_vec();
        let transforms = transforms(inside, count)?;
        proposals.push(Proposal { number, protocol: ProtocolId(protocol), spi, transforms });
        match more {
            0 => break,
            2 => (),
            _ => return Err(ParseError::Syntax("neither a last nor another proposal")),
        }
    }
    body.end("bytes after the last proposal")?;
    Ok(proposals)
}

fn transforms(mut body: Reader<'_>, count: u8) -> Result<Vec<Transform>, ParseError> {
    let mut transforms = Vec::with_capacity(count.into());
    for left in (0..count).rev() {
        let [more, _] = body.array()?;
        if more != if left == 0 { 0 } else { 3 } {
            return Err(ParseError::Syntax("number of transforms"));
        }
        let inside = body.counted(4)?;
        transforms.push(transform(inside)?);
    }
    body.end("bytes after the last transform")?;
    Ok(transforms)
}

fn transform(mut body: Reader<'_>) -> Result<Transform, ParseError> {
    const FIXED: u16 = 0x8000;
    const KEY_LENGTH: u16 = FIXED | 0x0e;
    let [kind, _] = body.array()?;
    let mut transform =
        Transform { kind: TransformType(kind), id: body.u16()?, key_length: None, unknown_attribute: false };
    while !body.0.is_empty() {
        let (attribute, value) = (body.u16()?, body.u16()?);
        if attribute == KEY_LENGTH && transform.key_length.is_none() {
            transform.key_length = Some(value);
        } else {
            // A second key length is as little understood as an attribute that is not known.
            transform.unknown_attribute = true;
            if attribute & FIXED == 0 {
                body.take(value.into())?;
            }
        }
    }
    Ok(transform)
}

fn identification(mut body: Reader<'_>) -> Result<IdData, ParseError> {
    let [kind, _, _, _] = body.array()?;
    Ok(IdData { kind: IdType(kind), data: body.rest() })
}

fn delete(mut body: Reader<'_>) -> Result<Payload, ParseError> {
    let [protocol, spi_size] = body.array()?;
    let count = body.u16()?;
    let protocol = ProtocolId(protocol);
    let spis = match (protocol, spi_size) {
        (ProtocolId::IKE, 0) => Vec::new(),
        (ProtocolId::IKE, _) => return Err(ParseError::Syntax("SPI in a Delete payload of an IKE SA")),
        (_, 4) => (0..count).map(|_| body.u32()).collect::<Result<_, _>>()?,
        _ => return Err(ParseError::Syntax("SPI size in a Delete payload")),
    };
    body.end("bytes after the last SPI")?;
    Ok(Payload::Delete { protocol, spis })
}

fn selectors(mut body: Reader<'_>) -> Result<Vec<TrafficSelector>, ParseError> {
    let [count, _, _, _] = body.array()?;
    if usize::from(count) > MAX_SELECTORS {
        return Err(ParseError::Oversized);
    }
    let mut selectors = Vec::with_capacity(count.into());
    for _ in 0..count {
        let [kind, protocol] = body.array()?;
        let mut inside = body.counted(4)?;
        let (start, end, ports): (IpAddr, IpAddr, _) = match TsType(kind) {
            TsType::IPV4_ADDR_RANGE => {
                let ports = inside.u16()?..=inside.u16()?;
                (
                    Ipv4Addr::from_octets(inside.array()?).into(),
                    Ipv4Addr::from_octets(inside.array()?).into(),
                    ports,
                )
            }
            TsType::IPV6_ADDR_RANGE => {
                let ports = inside.u16()?..=inside.u16()?;
                (
                    Ipv6Addr::from_octets(inside.array()?).into(),
                    Ipv6Addr::from_octets(inside.array()?).into(),
                    ports,
                )
            }
            _ => continue,
        };
        inside.end("length of a traffic selector")?;
        if start > end {
            return Err(ParseError::Syntax("traffic selector that ends before it starts"));
        }
        selectors.push(TrafficSelector { start, end, protocol, ports });
    }
    body.end("bytes after the last traffic selector")?;
    Ok(selectors)
}

fn configuration(mut body: Reader<'_>) -> Result<Configuration, ParseError> {
    let [kind, _, _, _] = body.array()?;
    let mut attributes = Vec::new();
    while !body.0.is_empty() {
        if attributes.len() == MAX_ATTRIBUTES {
            return Err(ParseError::Oversized);
        }
        let kind = CfgAttribute(body.u16()? & 0x7fff);
        let length = body.u16()?;
        attributes.push((kind, body.take(length.into())?.to_vec()));
    }
    Ok(Configuration { kind: CfgType(kind), attributes })
}

/// What has not been read yet.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], ParseError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(ParseError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(ParseError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, ParseError> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, ParseError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, ParseError> {
        self.array().map(u32::from_be_bytes)
    }

    /// Reads a length of two bytes, which counts `before` bytes up to its own end too, and takes what it says.
    fn counted(&mut self, before: usize) -> Result<Self, ParseError> {
        let length = usize::from(self.u16()?);
        let inside =
            length.checked_sub(before).ok_or(ParseError::Syntax("a length below that of its own header"))?;
        self.take(inside).map(Self)
    }

    fn rest(self) -> Vec<u8> {
        self.0.to_vec()
    }

    fn end(&self, otherwise: &'static str) -> Result<(), ParseError> {
        if self.0.is_empty() { Ok(()) } else { Err(ParseError::Syntax(otherwise)) }
    }
}
