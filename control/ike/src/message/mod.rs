//! IKEv2 messages (RFC 7296 section 3): the header, the chain of payloads, and each payload as a value.
//!
//! `parse::chain` reads any bytes without a panic and gives owned payloads;
//! `emit::chain` is its inverse. What is inside an Encrypted payload is a chain of its own, read once
//! it has been opened (`crypto::sk`).

pub mod describe;
pub mod emit;
pub mod legality;
pub mod parse;
pub mod registry;

use core::fmt;
use core::net::IpAddr;
use core::ops::RangeInclusive;

use registry::{
    AuthMethod, CertEncoding, CfgAttribute, CfgType, ExchangeType, IdType, KeMethod, NotifyType, PayloadType,
    ProtocolId, TransformType,
};

/// An IKE SA's SPI of one side; 0 while unknown.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct IkeSpi(pub u64);

impl IkeSpi {
    /// Not yet chosen.
    pub const NONE: Self = Self(0);
}

impl fmt::Debug for IkeSpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for IkeSpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the fixed header says (section 3.1), the length and the first payload's type aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// SPI of the original initiator.
    pub spi_i: IkeSpi,
    /// SPI of the original responder.
    pub spi_r: IkeSpi,
    /// Exchange.
    pub exchange: ExchangeType,
    /// Flag I: sent by the original initiator of the IKE SA.
    pub from_initiator: bool,
    /// Flag R: a response.
    pub response: bool,
    /// Message ID.
    pub message_id: u32,
}

/// One payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Security Association.
    Sa(Vec<Proposal>),
    /// Key Exchange.
    Ke(KeyExchangeData),
    /// Identification of the initiator.
    IdI(IdData),
    /// Identification of the responder.
    IdR(IdData),
    /// Certificate.
    Cert {
        /// Encoding of `data`.
        encoding: CertEncoding,
        /// The certificate.
        data: Vec<u8>,
    },
    /// Certificate Request.
    CertReq {
        /// Encoding that is asked for.
        encoding: CertEncoding,
        /// SHA-1 hashes, 20 bytes each, of the Subject Public Key Info of trusted CAs.
        authorities: Vec<u8>,
    },
    /// Authentication.
    Auth {
        /// Method.
        method: AuthMethod,
        /// Authentication data.
        data: Vec<u8>,
    },
    /// Nonce, 16 to 256 bytes.
    Nonce(Vec<u8>),
    /// Notify.
    Notify(Notify),
    /// Delete.
    Delete {
        /// Protocol of the SAs.
        protocol: ProtocolId,
        /// SPIs of 4 bytes; empty for the IKE SA.
        spis: Vec<u32>,
    },
    /// Vendor ID.
    VendorId(Vec<u8>),
    /// Traffic selectors of the initiator's side.
    TsI(Vec<TrafficSelector>),
    /// Traffic selectors of the responder's side.
    TsR(Vec<TrafficSelector>),
    /// Configuration.
    Cp(Configuration),
    /// An EAP message (RFC 3748), from its code on.
    Eap(Vec<u8>),
    /// A type that is not known here.
    Unknown {
        /// The type.
        kind: PayloadType,
        /// The critical bit.
        critical: bool,
    },
}

impl Payload {
    /// Its type.
    pub const fn kind(&self) -> PayloadType {
        match self {
            Self::Sa(_) => PayloadType::SA,
            Self::Ke(_) => PayloadType::KE,
            Self::IdI(_) => PayloadType::ID_I,
            Self::IdR(_) => PayloadType::ID_R,
            Self::Cert { .. } => PayloadType::CERT,
            Self::CertReq { .. } => PayloadType::CERTREQ,
            Self::Auth { .. } => PayloadType::AUTH,
            Self::Nonce(_) => PayloadType::NONCE,
            Self::Notify(_) => PayloadType::NOTIFY,
            Self::Delete { .. } => PayloadType::DELETE,
            Self::VendorId(_) => PayloadType::VENDOR_ID,
            Self::TsI(_) => PayloadType::TS_I,
            Self::TsR(_) => PayloadType::TS_R,
            Self::Cp(_) => PayloadType::CONFIGURATION,
            Self::Eap(_) => PayloadType::EAP,
            Self::Unknown { kind, .. } => *kind,
        }
    }
}

/// Body of a Key Exchange payload (section 3.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyExchangeData {
    /// Method.
    pub method: KeMethod,
    /// Public value.
    pub data: Vec<u8>,
}

/// Body of an Identification payload (section 3.5).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdData {
    /// Type.
    pub kind: IdType,
    /// Identification data.
    pub data: Vec<u8>,
}

/// Body of a Notify payload (section 3.10).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notify {
    /// Protocol of the SA that it is about; NONE if about none or about the IKE SA it comes in.
    pub protocol: ProtocolId,
    /// Its SPI, as a rule empty or 4 bytes.
    pub spi: Vec<u8>,
    /// Type.
    pub kind: NotifyType,
    /// Notification data.
    pub data: Vec<u8>,
}

impl Notify {
    /// One about no SA.
    pub fn new(kind: NotifyType, data: impl Into<Vec<u8>>) -> Self {
        Self { protocol: ProtocolId::NONE, spi: Vec::new(), kind, data: data.into() }
    }
}

/// One proposal (section 3.3.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Number, from 1.
    pub number: u8,
    /// Protocol.
    pub protocol: ProtocolId,
    /// The sender's SPI: none in IKE_SA_INIT, 8 bytes when an IKE SA is rekeyed, 4 for ESP and AH.
    pub spi: Vec<u8>,
    /// Transforms.
    pub transforms: Vec<Transform>,
}

/// One transform (section 3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transform {
    /// Type.
    pub kind: TransformType,
    /// ID within the type.
    pub id: u16,
    /// Key Length attribute in bits.
    pub key_length: Option<u16>,
    /// It has an attribute that is not known here, and cannot be chosen (section 3.3.6).
    pub unknown_attribute: bool,
}

/// One traffic selector (section 3.13.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TrafficSelector {
    /// First address.
    pub start: IpAddr,
    /// Last address, of the same family and not below `start`.
    pub end: IpAddr,
    /// Upper-layer protocol; 0 is any.
    pub protocol: u8,
    /// Ports; for ICMP type * 256 + code. The full range is any; 65535 to 0, "opaque", reads as an empty range.
    pub ports: RangeInclusive<u16>,
}

/// Body of a Configuration payload (section 3.15).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// Type.
    pub kind: CfgType,
    /// Attributes in order.
    pub attributes: Vec<(CfgAttribute, Vec<u8>)>,
}

/// What the fuzz target `ike_message`, the property tests and the replay of its seeds all call: reading any bytes never
/// panics, a message that was read is written so that it reads the same again, and what is made of it keeps its promises.
///
/// # Panics
/// When that does not hold.
pub fn fuzz(bytes: &[u8]) {
    let Ok(parsed) = parse::message(bytes) else { return };
    match parsed.body {
        parse::Body::Plain(payloads) => {
            let written = emit::plain(&parsed.head, &payloads);
            assert!(written.len() <= bytes.len(), "what is ignored is not written");
            let again: Vec<_> = payloads.iter().map(as_written).collect();
            assert_eq!(emit::plain(&parsed.head, &again), written);
            let body = parse::Body::Plain(again);
            assert_eq!(parse::message(&written), Ok(parse::Parsed { head: parsed.head, body }));
            fuzz_first(&parsed.head, &payloads, bytes);
            fuzz_payloads(&parsed.head, &payloads);
        }
        parse::Body::Encrypted { first_inner, aad, sealed } => {
            assert_eq!([aad, sealed].concat(), bytes);
            let prefix = emit::sk_prefix(&parsed.head, first_inner, sealed.len());
            assert_eq!(parse::message(&[&prefix, sealed].concat()).map(|again| again.head), Ok(parsed.head));
            // The inside of an envelope is whatever a peer says once it is authenticated.
            fuzz_chain(&parsed.head, first_inner, sealed);
        }
        parse::Body::Fragment { number, total, first_inner, aad, sealed } => {
            assert_eq!([aad, sealed].concat(), bytes);
            let prefix = emit::skf_prefix(&parsed.head, first_inner, number, total, sealed.len());
            assert_eq!(parse::message(&[&prefix, sealed].concat()).map(|again| again.head), Ok(parsed.head));
            fuzz_chain(&parsed.head, first_inner, sealed);
        }
    }
}

/// What decides on a cookie is read by another function, which has to see the same.
fn fuzz_first(head: &Head, payloads: &[Payload], bytes: &[u8]) {
    let view = legality::Payloads(payloads);
    let is_first = head.exchange == ExchangeType::IKE_SA_INIT
        && (head.from_initiator, head.response, head.message_id) == (true, false, 0)
        && (head.spi_i != IkeSpi::NONE, head.spi_r) == (true, IkeSpi::NONE);
    let has_cookie = view.notify(registry::NotifyType::COOKIE).is_some();
    let expected =
        view.nonce().filter(|_| is_first).map(|nonce| parse::First { head: *head, nonce, has_cookie });
    assert_eq!(parse::first_request(bytes), expected);
}

fn fuzz_chain(head: &Head, first: PayloadType, bytes: &[u8]) {
    let Ok(payloads) = parse::chain(first, bytes) else { return };
    let mut written = Vec::new();
    let first = emit::chain(&payloads, &mut written);
    assert_eq!(parse::chain(first, &written), Ok(payloads.iter().map(as_written).collect()));
    fuzz_payloads(head, &payloads);
}

/// What comes after reading: legality, the choice of a proposal, narrowing, and texts of a bounded length.
fn fuzz_payloads(head: &Head, payloads: &[Payload]) {
    use crate::negotiate::{keyword, proposal, selector};
    assert!(describe::Summary { head, payloads }.to_string().len() < 4096);
    let view = legality::Payloads(payloads);
    for phase in [legality::Phase::First, legality::Phase::Later] {
        if legality::check(head.exchange, head.response, phase, payloads).is_ok() {
            let lone =
                [PayloadType::SA, PayloadType::KE, PayloadType::NONCE, PayloadType::AUTH, PayloadType::EAP];
            for kind in lone {
                assert!(payloads.iter().filter(|payload| payload.kind() == kind).count() <= 1);
            }
        }
    }
    if let Some(offered) = view.sa() {
        assert!(keyword::List(offered).to_string().len() < 4096);
        for configured in [keyword::default_ike(), keyword::default_esp(), keyword::default_ah()] {
            if let Some(chosen) = proposal::choose(&configured, offered) {
                let answer = core::slice::from_ref(&chosen.proposal);
                assert_eq!(proposal::choose(&configured, answer).as_ref(), Some(&chosen));
            }
        }
    }
    if let Some((ours, theirs)) = view.ts() {
        let narrowed = selector::narrow(ours, theirs);
        assert!(selector::all_covered(ours, &narrowed) && selector::all_covered(theirs, &narrowed));
        assert!(narrowed.len() <= parse::MAX_SELECTORS && selector::List(&narrowed).to_string().len() < 4096);
    }
}

/// A payload without what is never written: attributes of transforms that are not known.
fn as_written(payload: &Payload) -> Payload {
    let mut payload = payload.clone();
    if let Payload::Sa(proposals) = &mut payload {
        for transform in proposals.iter_mut().flat_map(|proposal| &mut proposal.transforms) {
            transform.unknown_attribute = false;
        }
    }
    payload
}

#[cfg(test)]
mod tests;
