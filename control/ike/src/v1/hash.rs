//! The hash algorithm that an IKEv1 SA negotiates: by itself for IVs and NAT detection, as an HMAC its pseudorandom
//! function (RFC 2409 section 4).

use core::fmt;

use aws_lc_rs::digest::{Algorithm, Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA384, SHA512};

use crate::Secret;
use crate::crypto::prf::Prf;
use crate::message::registry::PrfId;

/// A hash algorithm. MD5 and Tiger are not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hash {
    /// SHA-1: in HMACs and for IVs its collisions do no harm.
    Sha1,
    /// SHA2-256.
    Sha256,
    /// SHA2-384.
    Sha384,
    /// SHA2-512.
    Sha512,
}

impl Hash {
    /// All.
    pub const ALL: [Self; 4] = [Self::Sha256, Self::Sha384, Self::Sha512, Self::Sha1];

    /// The value of the Hash Algorithm attribute (IANA "Internet Key Exchange (IKE) Attributes").
    pub const fn number(self) -> u16 {
        match self {
            Self::Sha1 => 2,
            Self::Sha256 => 4,
            Self::Sha384 => 5,
            Self::Sha512 => 6,
        }
    }

    /// The algorithm of that number, if it is one of these.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.number() == number)
    }

    /// The algorithm whose HMAC is this pseudorandom function of IKEv2: proposals of both versions are written in the same
    /// words.
    pub fn of_prf(prf: PrfId) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.prf_id() == prf)
    }

    /// The HMAC as a pseudorandom function of IKEv2.
    pub const fn prf_id(self) -> PrfId {
        match self {
            Self::Sha1 => PrfId::HMAC_SHA1,
            Self::Sha256 => PrfId::HMAC_SHA2_256,
            Self::Sha384 => PrfId::HMAC_SHA2_384,
            Self::Sha512 => PrfId::HMAC_SHA2_512,
        }
    }

    /// Bytes of its output.
    #[expect(clippy::len_without_is_empty, reason = "an output is never empty")]
    pub fn len(self) -> usize {
        self.algorithm().output_len()
    }

    /// `hash(parts[0] | parts[1] | …)`.
    pub fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        let mut context = Context::new(self.algorithm());
        for part in parts {
            context.update(part);
        }
        context.finish().as_ref().to_vec()
    }

    /// `prf(key, parts[0] | parts[1] | …)`: the HMAC.
    pub fn prf(self, key: &[u8], parts: &[&[u8]]) -> Secret {
        // Each of the four is one of `Prf`'s, which a test shows; without one nothing verifies and nothing is keyed.
        Prf::new(self.prf_id()).map_or_else(Secret::default, |prf| prf.compute(key, parts))
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Sha1 => &SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &SHA256,
            Self::Sha384 => &SHA384,
            Self::Sha512 => &SHA512,
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha1 => "HMAC_SHA1",
            Self::Sha256 => "HMAC_SHA2_256",
            Self::Sha384 => "HMAC_SHA2_384",
            Self::Sha512 => "HMAC_SHA2_512",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IKE-2: every algorithm has a number, a digest and a pseudorandom function of the same length.
    #[test]
    fn ike_2_each_hash_is_complete() {
        for hash in Hash::ALL {
            assert_eq!(Hash::from_number(hash.number()), Some(hash));
            assert_eq!(Hash::of_prf(hash.prf_id()), Some(hash));
            assert_eq!(hash.digest(&[b"a", b"bc"]), hash.digest(&[b"abc"]));
            assert_eq!(hash.digest(&[]).len(), hash.len());
            assert_eq!(hash.prf(b"key", &[b"data"]).len(), hash.len());
        }
        assert_eq!(Hash::from_number(1), None, "MD5");
    }
}
