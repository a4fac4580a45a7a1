//! ICVs of AH (RFC 4302): HMAC, and `AUTH_AES_GMAC` (RFC 4543 section 4).
//!
//! The caller hands over `covered`: the packet from its IP header on with mutable fields zeroed, the ICV field and
//! its padding zero (RFC 4302 section 3.3.3), and with extended sequence numbers the high 32 bits behind the packet.
//!
//! With GMAC the ICV field holds the 8-byte IV and the 16-byte tag, so `icv_len` is 24; RFC 4543 erratum 3643 adds
//! that over IPv6 the AH header then needs 4 bytes of padding (12 + 24 is no multiple of 8), which is the caller's.
//! The nonce is salt and IV, the AAD is `covered`; the IV is in the nonce and, like the tag, zero in the AAD.

use core::fmt;

use postern_contract::sa::{Encryption, Integrity, IpsecProtocol, Suite, SuiteError};

use super::aead::AeadKey;
use super::mac::{MAX_ICV, MacKey};
use super::sequence::Reserved;

/// Length of the ICV field of `AUTH_AES_GMAC`: IV and tag.
const GMAC_ICV: u8 = 24;

/// The key of one AH SA.
pub struct AhKey(Kind);

#[expect(
    clippy::large_enum_variant,
    reason = "in the SA's own allocation; a box would cost a cache miss a packet"
)]
enum Kind {
    Hmac(MacKey),
    Gmac(AeadKey),
}

/// The contents of an ICV field, without padding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Icv {
    bytes: [u8; MAX_ICV],
    len: u8,
}

impl AhKey {
    /// Expands the key of `suite`, which has to be one of AH.
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

    /// Length of the ICV field's contents in bytes, without the padding that aligns the AH header.
    pub fn icv_len(&self) -> u8 {
        match &self.0 {
            Kind::Hmac(mac) => mac.icv_len(),
            Kind::Gmac(_) => GMAC_ICV,
        }
    }

    /// The ICV over `covered` (see the module's doc). Consumes the number that the AH header carries: with GMAC it is
    /// the nonce as well.
    #[expect(clippy::needless_pass_by_value, reason = "consumed, so that one number signs once")]
    pub fn sign(&self, sequence: Reserved, covered: &[u8]) -> Icv {
        let mut icv = Icv { bytes: [0; MAX_ICV], len: self.icv_len() };
        match &self.0 {
            Kind::Hmac(mac) => mac.sign(covered, None, icv.as_mut()),
            Kind::Gmac(key) => {
                let iv = sequence.value().to_be_bytes();
                // A packet is far below GCM's limit of 2^61 bytes, the only error there is; the zero tag that an
                // error would leave opens nowhere.
                let tag = key.expand().seal(iv, covered, &mut []).unwrap_or_default();
                for (to, from) in icv.bytes.iter_mut().zip(iv.into_iter().chain(tag)) {
                    *to = from;
                }
            }
        }
        icv
    }

    /// Whether `icv`, as received and without padding, is the ICV of `covered`. Compares in constant time.
    pub fn verify(&self, covered: &[u8], icv: &[u8]) -> bool {
        match &self.0 {
            Kind::Hmac(mac) => mac.verify(covered, None, icv),
            Kind::Gmac(key) => match icv.split_first_chunk::<8>() {
                Some((iv, tag)) => {
                    tag.try_into().is_ok_and(|tag| key.expand().open(*iv, covered, &mut [], tag))
                }
                None => false,
            },
        }
    }
}

impl fmt::Debug for AhKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AhKey(..)")
    }
}

impl Icv {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..usize::from(self.len)).unwrap_or_default()
    }
}

impl AsRef<[u8]> for Icv {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

impl fmt::Debug for Icv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Icv({} bytes)", self.len)
    }
}
