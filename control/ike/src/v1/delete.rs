//! The Delete of an IKEv1 SA (RST-5): an Informational exchange of one message that the peer authenticates, acts on and
//! does not answer (RFC 2408 section 3.15, RFC 2409 section 5.7).
//!
//! ```text
//! cookies | 8 (Hash) | 1.0 | 5 (Informational) | encrypted | message ID | length | AES-CBC of:
//!     12 (Delete) | 0 | length | HASH(1)
//!      0          | 0 | 28     | DOI 1 | protocol 1 | SPI size 16 | 1 | both cookies | zeros
//! ```
//!
//! One zero at least, then up to the block, as strongSwan pads: what a peer gets to see is what it has always seen. RFC
//! 2409 appendix B asks for as many as fill the last block; whoever reads it goes by the payloads' lengths.
//!
//! A live SA and a node that comes back from a reset (RST-5, RST-8) build it by the same function. What it takes is all
//! in [`DeleteContext`]: no counter is among it, and the same message ID always gives the same bytes.

use super::cipher::{Cipher, Iv, exchange_iv};
use super::hash::Hash;
use crate::Secret;
use crate::message::IkeSpi;

/// What a Delete of an IKE SA is made from. It does not open or forge anything but this SA's own messages: SKEYID_d,
/// from which the keys of ESP come, is not in it.
#[derive(Debug)]
pub struct DeleteContext {
    /// The initiator's cookie and the responder's, as on the wire.
    pub cookies: (IkeSpi, IkeSpi),
    /// SKEYID_a, which authenticates later exchanges.
    pub skeyid_a: Secret,
    /// Ka, the AES key for both directions: 16, 24 or 32 bytes.
    pub ka: Secret,
    /// The last ciphertext block of phase 1, from which the IVs of later exchanges are derived.
    pub last_block: Iv,
    /// The negotiated hash.
    pub hash: Hash,
}

/// Why no Delete can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    /// Message ID 0 is phase 1's.
    #[error("message ID 0 belongs to phase 1")]
    MessageId,
    /// The key is none of AES's.
    #[error("the key has a length that AES does not have")]
    Key,
}

/// DOI, protocol ISAKMP, SPI size, number of SPIs (RFC 2408 section 3.15).
const DELETE_ISAKMP: [u8; 8] = [0, 0, 0, 1, 1, 16, 0, 1];

/// Bytes of the ISAKMP header.
const HEADER: usize = 28;

/// Builds the Delete of the IKE SA. `message_id` is random and not 0, and new for each Delete that is not a copy of
/// another.
pub fn delete_message(context: &DeleteContext, message_id: u32) -> Result<Vec<u8>, DeleteError> {
    let DeleteContext { cookies: (cookie_i, cookie_r), skeyid_a, ka, last_block, hash } = context;
    if message_id == 0 {
        return Err(DeleteError::MessageId);
    }
    let cookies = [cookie_i.0.to_be_bytes(), cookie_r.0.to_be_bytes()].concat();
    let delete = [&[0, 0, 0, 28], DELETE_ISAKMP.as_slice(), &cookies].concat();
    // "HASH(1) = prf(SKEYID_a, M-ID | N/D)", the padding not included.
    let hash_1 = hash.prf(skeyid_a.expose(), &[&message_id.to_be_bytes(), &delete]);
    // No hash is longer than 64 bytes.
    let hash_length = u8::try_from(4 + hash_1.len()).unwrap_or(u8::MAX);
    let text = [&[12, 0, 0, hash_length], hash_1.expose(), &delete, &[0]].concat();

    let iv = exchange_iv(*hash, last_block, message_id);
    let cipher = Cipher::new(ka.duplicate()).ok_or(DeleteError::Key)?;
    let (sealed, _) = cipher.encrypt(iv, text).ok_or(DeleteError::Key)?;

    let length = u32::try_from(HEADER + sealed.len()).unwrap_or(u32::MAX);
    let mut message = cookies;
    message.extend([8, 0x10, 5, 0x01]);
    message.extend(message_id.to_be_bytes());
    message.extend(length.to_be_bytes());
    message.extend(sealed);
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::testing::hex;

    fn counted(start: u8, length: usize) -> Vec<u8> {
        (start..).take(length).collect()
    }

    fn context(hash: Hash, key: usize) -> DeleteContext {
        DeleteContext {
            cookies: (IkeSpi(0xc1c2_c3c4_c5c6_c7c8), IkeSpi(0xd1d2_d3d4_d5d6_d7d8)),
            skeyid_a: Secret::new(counted(0x40, hash.len())),
            ka: Secret::new(counted(0x10, key)),
            last_block: counted(0x80, 16).try_into().unwrap(),
            hash,
        }
    }

    /// RST-5: as computed by Python's hmac and hashlib and `openssl enc -nopad`, from the layout of RFC 2408 and RFC 2409.
    #[test]
    fn rst_5_delete_as_others_compute_it() {
        for (hash, key, expected) in [
            (
                Hash::Sha1,
                16,
                "c1c2c3c4c5c6c7c8d1d2d3d4d5d6d7d808100501123456780000005cc17acbaedd6dc2d461038896d7b4f4fb5747966b
                 a68038f7a1a8c905ebf17a56e2709ad7c6a2c4d4ff954a957d17811eb897041d8d4910713fc4c3869f1aa12a",
            ),
            (
                Hash::Sha256,
                16,
                "c1c2c3c4c5c6c7c8d1d2d3d4d5d6d7d808100501123456780000006c02b4ef4dc734331af1aa705ccf20109dab9b435b
                 e1965f4005612f1740bb34167a79d81c016aab5a8c9022ed05e4625e1a5d9c2fb5ba5329f6ca4bb97a4c5d76a622a52f
                 a5667194d7683faa40c8f6d2",
            ),
            (
                Hash::Sha384,
                32,
                "c1c2c3c4c5c6c7c8d1d2d3d4d5d6d7d808100501123456780000007c033be16ef1c5cfb80fa3bc9a2d0fcf8f44a0ef49
                 a5859023d153c2c584ee64da0d72cc88db0b3337ca0a3f53b85d14dc4fc1d6a15d8e944ffe48b3d4661fd3a503ceedf0
                 505e2f8cb2f418a90f604b9581e01fc2a515165b71f93ddd381dd124",
            ),
            (
                Hash::Sha512,
                32,
                "c1c2c3c4c5c6c7c8d1d2d3d4d5d6d7d808100501123456780000008cb781b1c42892422acf400960c6ba960682f1bf1b
                 36b2c332b4ec69e9f408a279c60d7fc1307f77e8e62b45648829b6f7e2cf2fa67e2287ae8bf16f52a38823e7980c146d
                 ff7d2303d630ea76f5130ead1527a5433c2f52fc486f39b0e669b0a2b14facb335e93ead1e6957d62d63b68f",
            ),
        ] {
            let message = delete_message(&context(hash, key), 0x1234_5678).unwrap();
            assert_eq!(message, hex(expected), "{hash}");
        }
    }

    /// RST-5, RST-8: the same message ID gives the same bytes, another one others; 0 is refused.
    #[test]
    fn rst_5_message_ids() {
        let context = context(Hash::Sha256, 16);
        assert_eq!(delete_message(&context, 7), delete_message(&context, 7));
        assert_ne!(delete_message(&context, 7), delete_message(&context, 8));
        assert_eq!(delete_message(&context, 0), Err(DeleteError::MessageId));
        let short = DeleteContext { ka: Secret::new([0; 15]), ..context };
        assert_eq!(delete_message(&short, 7), Err(DeleteError::Key));
    }

    /// OPS-4: what is formatted shows no key.
    #[test]
    fn ops_4_debug_shows_no_key() {
        let shown = format!("{:?}", context(Hash::Sha1, 16));
        assert!(
            shown.contains("Secret(..)") && !shown.contains("64, 65") && !shown.contains("16, 17"),
            "{shown}"
        );
    }
}
