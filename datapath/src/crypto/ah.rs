//! ICVs of AH (RFC 4302): HMAC, and `AUTH_AES_GMAC` (RFC 4543 section 4).
//!
//! The caller hands over `covered`: the packet from its IP header on with mutable fields zeroed (RFC 4302 section
//! 3.3.3) and with extended sequence numbers the high 32 bits behind the packet; and where the ICV field starts in it.
//! Its contents are this module's business, the padding behind it (which is covered as it is) the caller's.
//!
//! With GMAC the field holds the 8-byte IV and the 16-byte ICV, so `icv_len` is 24. The nonce is salt and IV, the AAD
//! is `covered` with the 16 bytes zero but the IV in its place: RFC 4543 section 7, "In AUTH_AES_GMAC, the IV is
//! included in the additional authenticated data." Erratum 3643 adds that over IPv6 the AH header needs 4 bytes of
//! padding (12 + 24 is no multiple of 8). No free peer is known to implement this transform.

use core::fmt;

use postern_contract::sa::{Encryption, Integrity, IpsecProtocol, Suite, SuiteError};

use super::Engine;
use super::aead::AeadKey;
use super::cache::Serial;
use super::mac::{MAX_ICV, MacKey, copy};
use super::sequence::Reserved;

/// Length of the ICV field of `AUTH_AES_GMAC`: IV and tag.
const GMAC_ICV: u8 = 24;

/// The key of one AH SA.
pub struct AhKey(Kind);

enum Kind {
    Hmac(MacKey),
    Gmac(AeadKey),
}

impl AhKey {
    /// Takes the key of `suite`, which has to be one of AH.
    pub fn new(suite: &Suite) -> Result<Self, SuiteError> {
        suite.validate(IpsecProtocol::Ah)?;
        let Suite { encryption, encryption_key: _, integrity, integrity_key } = suite;
        let key = integrity_key.expose();
        let kind = match integrity {
            // ESP's and AH's GMAC take the same keying material.
            Integrity::AesGmac => AeadKey::new(Encryption::NullAuthAesGmac, key).map(Kind::Gmac),
            integrity => MacKey::new(*integrity, key).map(Kind::Hmac),
        };
        // Not reached: `validate` admits only what the constructors take.
        kind.map(Self).ok_or(SuiteError::Combination(*encryption, *integrity, IpsecProtocol::Ah))
    }

    /// Names the key where it stands expanded; `None` of a transform that is not.
    pub fn serial(&self) -> Option<Serial> {
        match &self.0 {
            Kind::Hmac(_) => None,
            Kind::Gmac(key) => Some(key.serial()),
        }
    }

    /// Length of the ICV field's contents in bytes, without the padding that aligns the AH header.
    pub fn icv_len(&self) -> u8 {
        match &self.0 {
            Kind::Hmac(mac) => mac.icv_len(),
            Kind::Gmac(_) => GMAC_ICV,
        }
    }

    /// Writes the ICV field at `icv_at` of `covered` (see the module's doc), whatever was there. Consumes the number
    /// that the AH header carries: with GMAC it is the nonce as well. `None` when `covered` does not reach so far.
    #[expect(clippy::needless_pass_by_value, reason = "consumed, so that one number signs once")]
    pub fn sign(
        &self,
        engine: &mut Engine,
        sequence: Reserved,
        covered: &mut [u8],
        icv_at: usize,
    ) -> Option<()> {
        let range = icv_at..icv_at.checked_add(self.icv_len().into())?;
        let field = covered.get_mut(range.clone())?;
        field.fill(0);
        match &self.0 {
            Kind::Hmac(mac) => {
                let tag = mac.tag(covered, None);
                copy(covered.get_mut(range)?, tag.as_ref());
            }
            Kind::Gmac(key) => {
                let iv = sequence.value().to_be_bytes();
                *field.first_chunk_mut()? = iv;
                let tag = key.expand(&mut engine.keys)?.seal(iv, covered, &mut [])?;
                *covered.get_mut(range)?.last_chunk_mut()? = tag;
            }
        }
        Some(())
    }

    /// Whether the ICV field at `icv_at` of `covered`, which is as it was received, is right; false as well when
    /// `covered` does not reach so far. Compares in constant time and leaves zeros where the ICV was.
    pub fn verify(&self, engine: &mut Engine, covered: &mut [u8], icv_at: usize) -> bool {
        self.check(engine, covered, icv_at).unwrap_or(false)
    }

    fn check(&self, engine: &mut Engine, covered: &mut [u8], icv_at: usize) -> Option<bool> {
        let field = covered.get_mut(icv_at..)?.get_mut(..self.icv_len().into())?;
        match &self.0 {
            Kind::Hmac(mac) => {
                let mut received = [0; MAX_ICV];
                let received = received.get_mut(..field.len())?;
                received.copy_from_slice(field);
                field.fill(0);
                Some(mac.verify(covered, None, received))
            }
            Kind::Gmac(key) => {
                let (iv, tag) = field.split_first_chunk_mut::<8>()?;
                let (iv, received) = (*iv, *tag.first_chunk()?);
                tag.fill(0);
                Some(key.expand(&mut engine.keys)?.open(iv, covered, &mut [], received))
            }
        }
    }
}

impl fmt::Debug for AhKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AhKey(..)")
    }
}
