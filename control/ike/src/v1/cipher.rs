//! Encryption of IKEv1 messages: AES in CBC mode, with IVs that hang together in chains (RFC 2409 appendix B).
//!
//! A chain is one exchange's: in phase 1 it begins with the hash of the public values, in any later exchange with
//! `hash(last block of phase 1 | message ID)`; each message's IV is the last block of the one before, whichever side
//! sent that. An IV moves only when a message is sent or has been authenticated.

use core::fmt;

use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, Algorithm, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext,
    UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;

use super::hash::Hash;
use crate::Secret;
use crate::crypto::stack;

/// AES's block.
pub const BLOCK: usize = 16;

/// An IV, which is the last block of the message before.
pub type Iv = [u8; BLOCK];

/// The key of an IKE SA, Ka of RFC 2409 appendix B, for both directions.
pub struct Cipher {
    algorithm: &'static Algorithm,
    ka: Secret,
}

impl Cipher {
    /// AES with this key; `None` if its length is none of AES's.
    pub fn new(ka: Secret) -> Option<Self> {
        let algorithm = match ka.len() {
            16 => &AES_128,
            24 => &AES_192,
            32 => &AES_256,
            _ => return None,
        };
        Some(Self { algorithm, ka })
    }

    /// The key.
    pub const fn ka(&self) -> &Secret {
        &self.ka
    }

    /// Encrypts `text`, which zeros fill up to whole blocks ("the message … is padded … with bytes of 0x00"), and gives it
    /// with the next IV. `None` if the library failed.
    pub fn encrypt(&self, iv: Iv, mut text: Vec<u8>) -> Option<(Vec<u8>, Iv)> {
        text.resize(text.len().next_multiple_of(BLOCK), 0);
        stack::wiped(|| {
            let key = UnboundCipherKey::new(self.algorithm, self.ka.expose()).ok()?;
            let context = EncryptionContext::Iv128(FixedLength::from(iv));
            EncryptingKey::cbc(key).ok()?.less_safe_encrypt(&mut text, context).ok()
        })?;
        let next = *text.last_chunk()?;
        Some((text, next))
    }

    /// Decrypts whole blocks, at least one; gives the text with its padding and the next IV.
    pub fn decrypt(&self, iv: Iv, sealed: &[u8]) -> Option<(Vec<u8>, Iv)> {
        if sealed.is_empty() || !sealed.len().is_multiple_of(BLOCK) {
            return None;
        }
        let next = *sealed.last_chunk()?;
        let mut text = sealed.to_vec();
        stack::wiped(|| {
            let key = UnboundCipherKey::new(self.algorithm, self.ka.expose()).ok()?;
            let context = DecryptionContext::Iv128(FixedLength::from(iv));
            DecryptingKey::cbc(key).ok()?.decrypt(&mut text, context).ok().map(drop)
        })?;
        Some((text, next))
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

/// First IV of phase 1: "derived from a hash of a concatenation of the initiator's public Diffie-Hellman value and the
/// responder's".
pub fn first_iv(hash: Hash, public_i: &[u8], public_r: &[u8]) -> Iv {
    cut(&hash.digest(&[public_i, public_r]))
}

/// First IV of a later exchange: "a hash of a concatenation of the last phase 1 CBC output block and the phase 2 message id".
pub fn exchange_iv(hash: Hash, last_block: &Iv, message_id: u32) -> Iv {
    cut(&hash.digest(&[last_block, &message_id.to_be_bytes()]))
}

/// Every hash is longer than a block.
fn cut(digest: &[u8]) -> Iv {
    digest.first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::testing::hex;

    /// IKE-2: AES-CBC of NIST SP 800-38A sections F.2.1 and F.2.5, and what is no whole number of blocks.
    #[test]
    fn ike_2_cbc_of_sp_800_38a() {
        let iv: Iv = hex("000102030405060708090a0b0c0d0e0f").try_into().unwrap();
        let text = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        for (key, sealed) in [
            (
                "2b7e151628aed2a6abf7158809cf4f3c",
                "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2",
            ),
            (
                "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d",
            ),
        ] {
            let cipher = Cipher::new(Secret::new(hex(key))).unwrap();
            let (out, next) = cipher.encrypt(iv, text.clone()).unwrap();
            assert_eq!(out, hex(sealed));
            assert_eq!(next.as_slice(), &out[16..]);
            assert_eq!(cipher.decrypt(iv, &out).unwrap(), (text.clone(), next));
            let (padded, _) = cipher.encrypt(iv, text[..20].to_vec()).unwrap();
            assert_eq!(cipher.decrypt(iv, &padded).unwrap().0, [&text[..20], &[0; 12]].concat());
            assert!(cipher.decrypt(iv, &out[..31]).is_none() && cipher.decrypt(iv, &[]).is_none());
        }
        assert!(Cipher::new(Secret::new([0; 20])).is_none());
    }

    /// OPS-4: formatting shows no key.
    #[test]
    fn ops_4_debug_shows_no_byte() {
        let shown = format!("{:?}", Cipher::new(Secret::new([0xab; 16])).unwrap());
        assert!(!shown.contains("171") && !shown.contains("ab"), "{shown}");
    }
}
