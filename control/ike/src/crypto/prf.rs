//! Pseudorandom functions and prf+ (RFC 7296 section 2.13).
//!
//! All of them are HMACs, whose key may have any length (RFC 2104; section 2.14 of RFC 7296 asks for no more than that
//! of a "variable-length key" prf). A key that is used more than once is expanded once, as a [`PrfKey`].

use core::fmt;

use aws_lc_rs::digest::MAX_OUTPUT_LEN;
use aws_lc_rs::hmac;
use zeroize::Zeroizing;

use crate::Secret;
use crate::message::registry::PrfId;

/// A pseudorandom function.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Prf {
    id: PrfId,
    algorithm: hmac::Algorithm,
}

impl Prf {
    /// The function of that number; `None` if there is none here.
    pub fn new(id: PrfId) -> Option<Self> {
        let algorithm = match id {
            PrfId::HMAC_SHA1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            PrfId::HMAC_SHA2_256 => hmac::HMAC_SHA256,
            PrfId::HMAC_SHA2_384 => hmac::HMAC_SHA384,
            PrfId::HMAC_SHA2_512 => hmac::HMAC_SHA512,
            _ => return None,
        };
        Some(Self { id, algorithm })
    }

    /// Its number.
    pub fn id(self) -> PrfId {
        self.id
    }

    /// Length of its output in bytes, and the preferred length of its key (section 2.14).
    #[expect(clippy::len_without_is_empty, reason = "an output is never empty")]
    pub fn len(self) -> usize {
        self.algorithm.tag_len()
    }

    /// Expands `key` for any number of uses.
    pub fn key(self, key: &[u8]) -> PrfKey {
        PrfKey(hmac::Key::new(self.algorithm, key))
    }

    /// `prf(key, parts[0] | parts[1] | …)`.
    pub fn compute(self, key: &[u8], parts: &[&[u8]]) -> Secret {
        self.key(key).compute(parts)
    }

    /// The first `length` bytes of `prf+(key, seed[0] | seed[1] | …)`; see [`PrfKey::plus`].
    pub fn plus(self, key: &[u8], seed: &[&[u8]], length: usize) -> Secret {
        self.key(key).plus(seed, length)
    }
}

impl fmt::Debug for Prf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PRF_{}", self.id)
    }
}

/// A pseudorandom function with its key in it.
pub struct PrfKey(hmac::Key);

/// As long as the longest output; wiped, as are all buffers here.
type Block = Zeroizing<[u8; MAX_OUTPUT_LEN]>;

impl PrfKey {
    /// `prf(key, parts[0] | parts[1] | …)`.
    pub fn compute(&self, parts: &[&[u8]]) -> Secret {
        let mut data = Zeroizing::new(Vec::with_capacity(length_of(parts)));
        for part in parts {
            data.extend_from_slice(part);
        }
        let mut block = Block::new([0; MAX_OUTPUT_LEN]);
        Secret::new(self.output(&data, &mut block))
    }

    /// The first `length` bytes of `prf+(key, seed[0] | seed[1] | …)`.
    ///
    /// Section 2.13: "prf+ is not defined beyond 255 times the size of the prf output": what is asked for beyond that is
    /// not there, so that who cuts keys out of it finds none.
    pub fn plus(&self, seed: &[&[u8]], length: usize) -> Secret {
        let output = self.0.algorithm().tag_len();
        let mut out = vec![0; length.min(255 * output)];
        let mut data = Zeroizing::new(Vec::with_capacity(output + length_of(seed) + 1));
        let mut block = Block::new([0; MAX_OUTPUT_LEN]);
        // "prf+ (K,S) = T1 | T2 | T3 | T4 | ... where T1 = prf (K, S | 0x01), T2 = prf (K, T1 | S | 0x02) …"
        for (counter, chunk) in (1..=u8::MAX).zip(out.chunks_mut(output)) {
            for part in seed {
                data.extend_from_slice(part);
            }
            data.push(counter);
            let t = self.output(&data, &mut block);
            for (to, from) in chunk.iter_mut().zip(t) {
                *to = *from;
            }
            data.clear();
            data.extend_from_slice(t);
        }
        Secret::new(out)
    }

    /// Joined data and a caller's buffer, because the library would else leave a copy of the output on the stack.
    fn output<'a>(&self, data: &[u8], block: &'a mut Block) -> &'a [u8] {
        let output = hmac::sign_to_buffer(&self.0, data, block.as_mut_slice());
        // The buffer is long enough, and HMAC has no other way to fail; going on with a key of zeros were worse.
        assert!(output.is_ok(), "HMAC failed");
        output.map_or(&[], |output| output)
    }
}

fn length_of(parts: &[&[u8]]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

impl fmt::Debug for PrfKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrfKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::testing::hex;

    fn prf(id: PrfId) -> Prf {
        Prf::new(id).unwrap()
    }

    /// RFC 4231 sections 4.2, 4.3 and 4.7 (a key that is longer than a block), RFC 2202 section 3 case 2.
    #[test]
    fn hmac_of_the_rfcs() {
        let key = [0x0b; 20];
        let data: [&[u8]; 2] = [b"Hi ", b"There"];
        assert_eq!(
            prf(PrfId::HMAC_SHA2_256).compute(&key, &data).expose(),
            hex("b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7")
        );
        assert_eq!(
            prf(PrfId::HMAC_SHA2_384).compute(&key, &data).expose(),
            hex("afd03944d84895626b0825f4ab46907f15f9dadbe4101ec682aa034c7cebc59c
                 faea9ea9076ede7f4af152e8b2fa9cb6")
        );
        assert_eq!(
            prf(PrfId::HMAC_SHA2_512).compute(&key, &data).expose(),
            hex("87aa7cdea5ef619d4ff0b4241a1d6cb02379f4e2ce4ec2787ad0b30545e17cde
                 daa833b7d6b8a702038b274eaea3f4e4be9d914eeb61f1702e696c203a126854")
        );
        assert_eq!(
            prf(PrfId::HMAC_SHA1).compute(b"Jefe", &[b"what do ya want ", b"for nothing?"]).expose(),
            hex("effcdf6ae5eb2fa2d27416d5f184df9c259a7c79")
        );
        assert_eq!(
            prf(PrfId::HMAC_SHA2_256)
                .compute(&[0xaa; 131], &[b"Test Using Larger Than Block-Size Key - Hash Key First"])
                .expose(),
            hex("60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54")
        );
    }

    /// IKE-1: prf+ is what section 2.13 writes out, block by block, and ends where it is no longer defined.
    #[test]
    fn ike_1_prf_plus_as_written() {
        for id in [PrfId::HMAC_SHA1, PrfId::HMAC_SHA2_256, PrfId::HMAC_SHA2_384, PrfId::HMAC_SHA2_512] {
            let prf = prf(id);
            let t1 = prf.compute(b"key", &[b"seed", &[1]]);
            let t2 = prf.compute(b"key", &[t1.expose(), b"seed", &[2]]);
            let t3 = prf.compute(b"key", &[t2.expose(), b"seed", &[3]]);
            let all = [t1.expose(), t2.expose(), t3.expose()].concat();
            for length in 0..all.len() {
                assert_eq!(prf.plus(b"key", &[b"se", b"ed"], length).expose(), &all[..length]);
            }
            assert_eq!(prf.plus(b"key", &[b"seed"], usize::MAX).len(), 255 * prf.len());
        }
        assert_eq!(Prf::new(PrfId(4)), None, "AES-XCBC is not there");
    }
}
