//! ISAKMP messages (RFC 2408 section 3) as IKEv1 uses them: the header, the chain of payloads, each payload as a value.
//!
//! `parse::chain` reads any bytes without a panic; `emit::chain` is its inverse. What HASH payloads cover are the bytes
//! that arrived, of which [`parse::Chain`] keeps where each payload begins.

pub(crate) mod emit;
pub(crate) mod parse;

use crate::message::IkeSpi;
use crate::message::registry::{CertEncoding, ProtocolId};

/// What the fixed header says, the length aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) cookie_i: IkeSpi,
    pub(crate) cookie_r: IkeSpi,
    pub(crate) exchange: Exchange,
    /// Flag E: what follows the header is encrypted.
    pub(crate) encrypted: bool,
    /// 0 in phase 1.
    pub(crate) message_id: u32,
}

macro_rules! numbers {
    ($( $(#[$doc:meta])* $name:ident($int:ty) { $( $constant:ident = $value:literal ),+ $(,)? } )+) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) struct $name(pub(crate) $int);

        impl $name {
            $( pub(crate) const $constant: Self = Self($value); )+
        }
    )+ };
}

numbers! {
    /// Exchange types.
    Exchange(u8) {
        IDENTITY_PROTECTION = 2,
        AGGRESSIVE = 4,
        INFORMATIONAL = 5,
        TRANSACTION = 6,
        QUICK_MODE = 32,
    }
    /// Payload types; NAT-D and NAT-OA are those of RFC 3947.
    Kind(u8) {
        NONE = 0,
        SA = 1,
        KE = 4,
        ID = 5,
        CERT = 6,
        CERTREQ = 7,
        HASH = 8,
        SIG = 9,
        NONCE = 10,
        NOTIFY = 11,
        DELETE = 12,
        VENDOR_ID = 13,
        ATTRIBUTES = 14,
        NAT_D = 20,
        NAT_OA = 21,
        FRAGMENT = 132,
    }
    /// Notify message types (RFC 2408 section 3.14.1, RFC 2407 section 4.6.3, RFC 3706).
    NotifyKind(u16) {
        NO_PROPOSAL_CHOSEN = 14,
        INVALID_ID_INFORMATION = 18,
        INITIAL_CONTACT = 24578,
        R_U_THERE = 36136,
        R_U_THERE_ACK = 36137,
    }
    /// Kinds of an Attributes payload (mode-config).
    Cfg(u8) {
        REQUEST = 1,
        REPLY = 2,
        SET = 3,
        ACK = 4,
    }
}

/// One payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Payload {
    Sa(Vec<Proposal>),
    Ke(Vec<u8>),
    Id(Id),
    Cert {
        encoding: CertEncoding,
        data: Vec<u8>,
    },
    CertReq {
        encoding: CertEncoding,
        authority: Vec<u8>,
    },
    Hash(Vec<u8>),
    Sig(Vec<u8>),
    Nonce(Vec<u8>),
    Notify(Notify),
    Delete {
        protocol: ProtocolId,
        spis: Vec<Vec<u8>>,
    },
    VendorId(Vec<u8>),
    Attributes {
        kind: Cfg,
        id: u16,
        attributes: Vec<Attribute>,
    },
    NatD(Vec<u8>),
    /// The peer's own address; not acted on.
    NatOa(Vec<u8>),
    /// A type that is not known here, which is passed over.
    Unknown(Kind),
}

/// Body of an Identification payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Id {
    pub(crate) kind: u8,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
    pub(crate) data: Vec<u8>,
}

/// Body of a Notification payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notify {
    pub(crate) protocol: ProtocolId,
    pub(crate) spi: Vec<u8>,
    pub(crate) kind: NotifyKind,
    pub(crate) data: Vec<u8>,
}

/// One proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub(crate) number: u8,
    pub(crate) protocol: ProtocolId,
    pub(crate) spi: Vec<u8>,
    pub(crate) transforms: Vec<Transform>,
}

/// One transform: in IKEv1 a whole suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transform {
    pub(crate) number: u8,
    pub(crate) id: u8,
    pub(crate) attributes: Vec<Attribute>,
}

/// A data attribute (RFC 2408 section 3.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attribute {
    pub(crate) kind: u16,
    pub(crate) value: Value,
}

/// Its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Two bytes, without a length.
    Basic(u16),
    /// Any number of bytes.
    Variable(Vec<u8>),
}

impl Attribute {
    pub(crate) const fn basic(kind: u16, value: u16) -> Self {
        Self { kind, value: Value::Basic(value) }
    }

    pub(crate) fn variable(kind: u16, value: impl Into<Vec<u8>>) -> Self {
        Self { kind, value: Value::Variable(value.into()) }
    }

    /// As a number, however it is written; `None` if it is longer than 8 bytes.
    pub(crate) fn number(&self) -> Option<u64> {
        match &self.value {
            Value::Basic(value) => Some(u64::from(*value)),
            Value::Variable(bytes) if bytes.len() <= 8 => {
                Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
            }
            Value::Variable(_) => None,
        }
    }

    /// As bytes, however it is written.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match &self.value {
            Value::Basic(value) => value.to_be_bytes().to_vec(),
            Value::Variable(bytes) => bytes.clone(),
        }
    }
}

impl Payload {
    pub(crate) const fn kind(&self) -> Kind {
        match self {
            Self::Sa(_) => Kind::SA,
            Self::Ke(_) => Kind::KE,
            Self::Id(_) => Kind::ID,
            Self::Cert { .. } => Kind::CERT,
            Self::CertReq { .. } => Kind::CERTREQ,
            Self::Hash(_) => Kind::HASH,
            Self::Sig(_) => Kind::SIG,
            Self::Nonce(_) => Kind::NONCE,
            Self::Notify(_) => Kind::NOTIFY,
            Self::Delete { .. } => Kind::DELETE,
            Self::VendorId(_) => Kind::VENDOR_ID,
            Self::Attributes { .. } => Kind::ATTRIBUTES,
            Self::NatD(_) => Kind::NAT_D,
            Self::NatOa(_) => Kind::NAT_OA,
            Self::Unknown(kind) => *kind,
        }
    }
}

/// What can be asked of the payloads of a message; each gives the first of its kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payloads<'a>(pub(crate) &'a [Payload]);

macro_rules! first {
    ($( $name:ident: $variant:ident => $type:ty ),+ $(,)?) => { $(
        pub(crate) fn $name(self) -> Option<&'a $type> {
            self.0.iter().find_map(|payload| match payload {
                Payload::$variant(found) => Some(found),
                _ => None,
            })
        }
    )+ };
}

impl<'a> Payloads<'a> {
    first! { sa: Sa => Vec<Proposal>, ke: Ke => Vec<u8>, id: Id => Id, sig: Sig => Vec<u8>, hash: Hash => Vec<u8> }

    /// A nonce of a length that RFC 2409 section 5 allows, "between 8 and 256 bytes inclusive".
    pub(crate) fn nonce(self) -> Option<&'a Vec<u8>> {
        self.0.iter().find_map(|payload| match payload {
            Payload::Nonce(nonce) if (8..=256).contains(&nonce.len()) => Some(nonce),
            _ => None,
        })
    }

    pub(crate) fn ids(self) -> impl Iterator<Item = &'a Id> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Id(id) => Some(id),
            _ => None,
        })
    }

    pub(crate) fn nat_ds(self) -> impl Iterator<Item = &'a Vec<u8>> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::NatD(hash) => Some(hash),
            _ => None,
        })
    }

    pub(crate) fn notifies(self) -> impl Iterator<Item = &'a Notify> {
        self.0.iter().filter_map(|payload| match payload {
            Payload::Notify(notify) => Some(notify),
            _ => None,
        })
    }

    pub(crate) fn has_notify(self, kind: NotifyKind) -> bool {
        self.notifies().any(|notify| notify.kind == kind)
    }

    /// A notification of an error (types 1 to 16383).
    pub(crate) fn error(self) -> Option<&'a Notify> {
        self.notifies().find(|notify| (1..16384).contains(&notify.kind.0))
    }

    pub(crate) fn has_vendor(self, id: &[u8]) -> bool {
        self.0.iter().any(|payload| matches!(payload, Payload::VendorId(found) if found.starts_with(id)))
    }
}

/// What the fuzz target `ike1_message` and the property tests call: reading any bytes never panics, and what was read is
/// written so that it reads the same again.
///
/// # Panics
/// When that does not hold.
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok((head, first, body)) = parse::message(bytes) else { return };
    let Ok(chain) = parse::chain(first, body) else { return };
    let payloads: Vec<Payload> =
        chain.payloads.into_iter().filter(|payload| !matches!(payload, Payload::Unknown(_))).collect();
    let head = Head { encrypted: false, ..head };
    let written = emit::plain(&head, &payloads);
    let again = parse::message(&written);
    assert_eq!(again.as_ref().map(|(head, ..)| *head), Ok(head));
    let read = again.and_then(|(_, first, body)| parse::chain(first, body));
    assert_eq!(read.map(|chain| chain.payloads).as_ref(), Ok(&payloads));
    super::proposal::fuzz(Payloads(&payloads));
}

#[cfg(test)]
mod tests;
