//! AES-GCM and ChaCha20-Poly1305 on bytes, without the packet around them.
//!
//! ring serves all but AES-192, which its maintainers left out; that one stands on the `aes-gcm` crate. Its
//! expanded key is larger than ring's, so an SA keeps the 24 bytes and expands them once for each run of packets.

use core::hint::black_box;

use aes_gcm::aead::AeadInOut;
use aes_gcm::aead::consts::U12;
use aes_gcm::{AesGcm, KeyInit};
use postern_contract::sa::Encryption;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

type Aes192Gcm = AesGcm<aes::Aes192, U12>;

/// Length of a tag.
pub(super) const TAG: usize = 16;

/// A key and its salt.
pub(super) struct AeadKey {
    kind: Kind,
    salt: [u8; 4],
    /// Authenticates the whole packet and encrypts nothing.
    gmac: bool,
}

#[expect(
    clippy::large_enum_variant,
    reason = "in the SA's own allocation; a box would cost a cache miss a packet"
)]
enum Kind {
    Ring(RingKey),
    Aes192(Zeroizing<[u8; 24]>),
}

/// ring's key, with a `Drop`.
struct RingKey(LessSafeKey);

/// A key ready for packets.
pub(super) struct Aead<'a> {
    cipher: Cipher<'a>,
    salt: [u8; 4],
}

#[expect(
    clippy::large_enum_variant,
    reason = "lives on the stack for one run of packets, where nothing may allocate"
)]
enum Cipher<'a> {
    Ring(&'a LessSafeKey),
    Aes192(Aes192Gcm),
}

impl AeadKey {
    /// `material` is the key with 4 bytes of salt behind it, as IKE derives it (RFC 4106 section 8.1, RFC 7634
    /// section 2). `None` when the transform has no such length.
    pub(super) fn new(encryption: Encryption, material: &[u8]) -> Option<Self> {
        let (key, salt) = material.split_last_chunk::<4>()?;
        let gmac = encryption == Encryption::NullAuthAesGmac;
        let algorithm = match (encryption, key.len()) {
            (Encryption::ChaCha20Poly1305, 32) => &CHACHA20_POLY1305,
            (Encryption::AesGcm16 | Encryption::NullAuthAesGmac, 16) => &AES_128_GCM,
            (Encryption::AesGcm16 | Encryption::NullAuthAesGmac, 32) => &AES_256_GCM,
            (Encryption::AesGcm16 | Encryption::NullAuthAesGmac, 24) => {
                let mut kept = Zeroizing::new([0; 24]);
                kept.copy_from_slice(key);
                return Some(Self { kind: Kind::Aes192(kept), salt: *salt, gmac });
            }
            _ => return None,
        };
        let key = UnboundKey::new(algorithm, key).ok()?;
        Some(Self { kind: Kind::Ring(RingKey(LessSafeKey::new(key))), salt: *salt, gmac })
    }

    /// Whether the key is one of GMAC.
    pub(super) fn is_gmac(&self) -> bool {
        self.gmac
    }

    /// Makes the key ready for a run of packets.
    pub(super) fn expand(&self) -> Aead<'_> {
        let cipher = match &self.kind {
            Kind::Ring(key) => Cipher::Ring(&key.0),
            Kind::Aes192(key) => Cipher::Aes192(Aes192Gcm::new((&**key).into())),
        };
        Aead { cipher, salt: self.salt }
    }
}

impl Drop for AeadKey {
    fn drop(&mut self) {
        self.salt = [0; 4];
        black_box(&mut self.salt);
    }
}

impl Drop for RingKey {
    fn drop(&mut self) {
        self.wipe();
    }
}

impl RingKey {
    /// ring does not wipe its keys, so the schedule of another key is written over this one's.
    fn wipe(&mut self) {
        let blank = [0; 32];
        if let Some(blank) = blank.get(..self.0.algorithm().key_len())
            && let Ok(blank) = UnboundKey::new(self.0.algorithm(), blank)
        {
            self.0 = LessSafeKey::new(blank);
            // Without this the compiler may drop the write as dead.
            black_box(&mut self.0);
        }
    }
}

impl Aead<'_> {
    /// Encrypts `text` in place and gives the tag. `None` when `text` is longer than the algorithm takes, which no
    /// packet is.
    pub(super) fn seal(&self, iv: [u8; 8], aad: &[u8], text: &mut [u8]) -> Option<[u8; TAG]> {
        let nonce = self.nonce(iv);
        match &self.cipher {
            Cipher::Ring(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::from(aad), text).ok()?;
                tag.as_ref().first_chunk().copied()
            }
            Cipher::Aes192(key) => {
                let tag = key.encrypt_inout_detached(&nonce.into(), aad, text.into()).ok()?;
                Some(tag.into())
            }
        }
    }

    /// Decrypts `text` in place when `tag` is right. When it is not, no plaintext stays in `text`.
    pub(super) fn open(&self, iv: [u8; 8], aad: &[u8], text: &mut [u8], tag: [u8; TAG]) -> bool {
        let nonce = self.nonce(iv);
        match &self.cipher {
            // Decrypts and authenticates in one pass and zeroes `text` on a wrong tag.
            Cipher::Ring(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                key.open_in_place_separate_tag(nonce, Aad::from(aad), tag.into(), text, 0..).is_ok()
            }
            // Authenticates first and leaves the ciphertext on a wrong tag.
            Cipher::Aes192(key) => {
                key.decrypt_inout_detached(&nonce.into(), aad, text.into(), &tag.into()).is_ok()
            }
        }
    }

    /// RFC 4106 section 4, RFC 7634 section 2: the nonce is the salt followed by the IV.
    fn nonce(&self, iv: [u8; 8]) -> [u8; 12] {
        let [s0, s1, s2, s3] = self.salt;
        let [i0, i1, i2, i3, i4, i5, i6, i7] = iv;
        [s0, s1, s2, s3, i0, i1, i2, i3, i4, i5, i6, i7]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OPS-4: after the wipe the key is another, known one: that of zeros.
    #[test]
    fn ops_4_wiped_key_is_the_zero_key() {
        for (encryption, len) in
            [(Encryption::AesGcm16, 16), (Encryption::AesGcm16, 32), (Encryption::ChaCha20Poly1305, 32)]
        {
            let material = |byte| [vec![byte; len], vec![9; 4]].concat();
            let mut key = AeadKey::new(encryption, &material(7)).unwrap();
            let zero = AeadKey::new(encryption, &material(0)).unwrap();
            let tag = |key: &AeadKey| key.expand().seal([1; 8], b"aad", &mut []).unwrap();
            assert_ne!(tag(&key), tag(&zero));
            match &mut key.kind {
                Kind::Ring(key) => key.wipe(),
                Kind::Aes192(_) => panic!("served by ring"),
            }
            assert_eq!(tag(&key), tag(&zero));
        }
    }
}
