//! What two peers agree on (RFC 7296 sections 2.7, 2.9 and 3.3): algorithms, and traffic selectors.
//!
//! `proposal` chooses among proposals and gives a [`Chosen`], `keyword` reads and writes them in strongSwan's words, and
//! `selector` narrows traffic selectors. Nothing here knows how an algorithm is computed.

pub mod keyword;
pub mod proposal;
pub mod selector;

use core::fmt;

use arrayvec::ArrayVec;

use crate::message::Proposal;
use crate::message::registry::{EncrId, IntegId, KeMethod, PrfId, ProtocolId};

/// Additional key exchanges of RFC 9370, in the order in which they are done; the slots that were agreed to be NONE
/// are left out.
pub type Additional = ArrayVec<KeMethod, 7>;

/// Outcome of a negotiation: one proposal with exactly one transform a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Number of the chosen proposal among those offered.
    pub number: u8,
    /// SPI in that proposal; empty in IKE_SA_INIT.
    pub spi: Vec<u8>,
    /// The algorithms.
    pub suite: Suite,
    /// What the answer says: the proposal as offered, with only the chosen transforms. Its SPI is the offerer's, and
    /// the answerer puts its own there.
    pub proposal: Proposal,
}

/// Algorithms of whichever SA was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Of an IKE SA.
    Ike(IkeSuite),
    /// Of an ESP or AH SA.
    Child(ChildSuite),
}

impl Chosen {
    /// The algorithms, if an IKE SA was negotiated.
    pub const fn ike(&self) -> Option<&IkeSuite> {
        match &self.suite {
            Suite::Ike(suite) => Some(suite),
            Suite::Child(_) => None,
        }
    }

    /// The algorithms, if a CHILD_SA was negotiated.
    pub const fn child(&self) -> Option<&ChildSuite> {
        match &self.suite {
            Suite::Child(suite) => Some(suite),
            Suite::Ike(_) => None,
        }
    }

    /// The SPI of a CHILD_SA proposal: 4 bytes and not among those that are reserved (RFC 4303 section 2.1).
    pub fn child_spi(&self) -> Option<u32> {
        let spi = u32::from_be_bytes(self.spi.as_slice().try_into().ok()?);
        (spi > 255).then_some(spi)
    }

    /// The SPI of a proposal for a rekeyed IKE SA: 8 bytes and not 0.
    pub fn ike_spi(&self) -> Option<u64> {
        let spi = u64::from_be_bytes(self.spi.as_slice().try_into().ok()?);
        (spi != 0).then_some(spi)
    }
}

/// Algorithms of an IKE SA.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IkeSuite {
    /// Encryption.
    pub encr: EncrId,
    /// Length of its key in bits; for ChaCha20-Poly1305, which has no choice of it, 256.
    pub key_bits: u16,
    /// Pseudorandom function.
    pub prf: PrfId,
    /// Integrity; NONE if the encryption is an AEAD.
    pub integ: IntegId,
    /// Key exchange of IKE_SA_INIT.
    pub ke: KeMethod,
    /// Additional key exchanges, done in IKE_INTERMEDIATE or IKE_FOLLOWUP_KE.
    pub additional: Additional,
}

/// Algorithms of an ESP or AH SA.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ChildSuite {
    /// ESP or AH.
    pub protocol: ProtocolId,
    /// Encryption; NONE for AH.
    pub encr: EncrId,
    /// Length of its key in bits: 256 for ChaCha20-Poly1305; 0 for NULL and for AH.
    pub key_bits: u16,
    /// Integrity; NONE if the encryption is an AEAD.
    pub integ: IntegId,
    /// Key exchange for perfect forward secrecy; NONE without.
    pub ke: KeMethod,
    /// Additional key exchanges; none if `ke` is NONE.
    pub additional: Additional,
    /// Extended sequence numbers.
    pub esn: bool,
}

/// Encryption and integrity in one (RFC 5282, RFC 4106, RFC 7634, RFC 4543), to be proposed without an integrity
/// transform.
pub const fn is_aead(encr: EncrId) -> bool {
    matches!(encr, EncrId::AES_GCM_16 | EncrId::CHACHA20_POLY1305 | EncrId::NULL_AUTH_AES_GMAC)
}

/// In strongSwan's words, as in `AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519`.
impl fmt::Display for IkeSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_encr(f, self.encr, self.key_bits)?;
        if self.integ != IntegId::NONE {
            write!(f, "/{}", self.integ)?;
        }
        write!(f, "/PRF_{}/{}", self.prf, ke_name(self.ke))?;
        write_additional(f, &self.additional)
    }
}

/// In strongSwan's words, as in `ESP:AES_GCM_16_128/NO_EXT_SEQ`.
impl fmt::Display for ChildSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.protocol)?;
        if self.encr != EncrId::NONE {
            write_encr(f, self.encr, self.key_bits)?;
        }
        if self.integ != IntegId::NONE {
            if self.encr != EncrId::NONE {
                f.write_str("/")?;
            }
            write!(f, "{}", self.integ)?;
        }
        if self.ke != KeMethod::NONE {
            write!(f, "/{}", ke_name(self.ke))?;
        }
        write_additional(f, &self.additional)?;
        f.write_str(if self.esn { "/EXT_SEQ" } else { "/NO_EXT_SEQ" })
    }
}

fn write_encr(f: &mut fmt::Formatter<'_>, encr: EncrId, key_bits: u16) -> fmt::Result {
    match encr {
        EncrId::NULL | EncrId::CHACHA20_POLY1305 => write!(f, "{encr}"),
        _ => write!(f, "{encr}_{key_bits}"),
    }
}

fn write_additional(f: &mut fmt::Formatter<'_>, additional: &Additional) -> fmt::Result {
    (1..).zip(additional).try_for_each(|(slot, &method)| write!(f, "/KE{slot}_{}", ke_name(method)))
}

fn ke_name(method: KeMethod) -> String {
    if method == KeMethod::CURVE25519 { "CURVE_25519".to_owned() } else { method.to_string() }
}
