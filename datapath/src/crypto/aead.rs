//! AES-GCM and ChaCha20-Poly1305 on bytes, without the packet around them.
//!
//! An SA keeps its key as it was derived. Here ring serves all but AES-192 and takes the expanded key from the worker's
//! [`KeyCache`]. AES-192, which ring's maintainers left out, stands on the `aes-gcm` crate and is expanded once for each
//! run of packets. AES-GCM on a processor with VAES does not come here but goes to [`super::vector`].

use aes_gcm::aead::AeadInOut;
use aes_gcm::aead::consts::U12;
use aes_gcm::{AesGcm, KeyInit};
use postern_contract::sa::Encryption;
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use zeroize::{Zeroize, Zeroizing};

use super::cache::{KeyCache, Serial};

type Aes192Gcm = AesGcm<aes::Aes192, U12>;

/// Length of a tag.
pub(super) const TAG: usize = 16;

/// A key and its salt, as they were derived.
pub(super) struct AeadKey {
    serial: Serial,
    /// As many bytes of it as the transform has.
    key: Zeroizing<[u8; 32]>,
    salt: Zeroizing<[u8; 4]>,
    transform: Transform,
    /// Authenticates the whole packet and encrypts nothing.
    gmac: bool,
}

#[derive(Clone, Copy)]
enum Transform {
    Aes128Gcm,
    Aes192Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
}

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
        let (bytes, salt) = material.split_last_chunk::<4>()?;
        let gmac = encryption == Encryption::NullAuthAesGmac;
        let transform = match (encryption, bytes.len()) {
            (Encryption::ChaCha20Poly1305, 32) => Transform::ChaCha20Poly1305,
            (Encryption::AesGcm16 | Encryption::NullAuthAesGmac, 16) => Transform::Aes128Gcm,
            (Encryption::AesGcm16 | Encryption::NullAuthAesGmac, 24) => Transform::Aes192Gcm,
            (Encryption::AesGcm16 | Encryption::NullAuthAesGmac, 32) => Transform::Aes256Gcm,
            _ => return None,
        };
        let mut key = Zeroizing::new([0; 32]);
        key.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { serial: Serial::next(), key, salt: Zeroizing::new(*salt), transform, gmac })
    }

    /// Names the key where it stands expanded.
    pub(super) fn serial(&self) -> Serial {
        self.serial
    }

    /// Whether the key is one of GMAC.
    pub(super) fn is_gmac(&self) -> bool {
        self.gmac
    }

    /// The key of AES-GCM that encrypts, for a vector kernel.
    #[inline]
    pub(super) fn gcm(&self) -> Option<Gcm<'_>> {
        let len = match self.transform {
            _ if self.gmac => return None,
            Transform::Aes128Gcm => 16,
            Transform::Aes192Gcm => 24,
            Transform::Aes256Gcm => 32,
            Transform::ChaCha20Poly1305 => return None,
        };
        Some(Gcm { serial: self.serial, key: self.key.get(..len)?, salt: *self.salt })
    }

    /// Makes the key ready for a run of packets. `None` when ring refuses the key, which it does for its length alone.
    #[inline]
    pub(super) fn expand<'a>(&self, keys: &'a mut KeyCache<LessSafeKey>) -> Option<Aead<'a>> {
        let cipher = match self.transform {
            Transform::Aes128Gcm => ring(keys, self.serial, &AES_128_GCM, &*self.key)?,
            Transform::Aes256Gcm => ring(keys, self.serial, &AES_256_GCM, &*self.key)?,
            Transform::ChaCha20Poly1305 => ring(keys, self.serial, &CHACHA20_POLY1305, &*self.key)?,
            Transform::Aes192Gcm => Cipher::Aes192(Aes192Gcm::new(self.key.first_chunk::<24>()?.into())),
        };
        Some(Aead { cipher, salt: *self.salt })
    }
}

/// ring's cipher of a key, which begins with as many bytes as the algorithm has.
#[inline]
fn ring<'a>(
    keys: &'a mut KeyCache<LessSafeKey>,
    serial: Serial,
    algorithm: &'static Algorithm,
    key: &[u8],
) -> Option<Cipher<'a>> {
    let expand = |to: &mut LessSafeKey| {
        *to = LessSafeKey::new(UnboundKey::new(algorithm, key.get(..algorithm.key_len())?).ok()?);
        Some(())
    };
    keys.get(serial, expand).map(Cipher::Ring)
}

/// What a vector kernel needs of a key.
#[derive(Clone, Copy)]
pub(super) struct Gcm<'a> {
    /// Names the key.
    pub(super) serial: Serial,
    /// AES's key.
    pub(super) key: &'a [u8],
    pub(super) salt: [u8; 4],
}

/// A copy of the key of AES-128-GCM, by far the most common one, small enough to lie beside what else its packets need;
/// or nothing yet. Made and overwritten in place, so that no move leaves a copy behind (OPS-4).
#[repr(C)]
pub struct ShortKey {
    /// A [`Serial`], in halves so that 28 bytes are enough.
    serial: [u32; 2],
    key: [u8; 16],
    salt: [u8; 4],
}

impl ShortKey {
    /// Nothing yet.
    pub const VACANT: Self = Self { serial: [0; 2], key: [0; 16], salt: [0; 4] };

    /// Becomes the same key, with the same name, if it is one of AES-128-GCM.
    pub(super) fn copy_from(&mut self, other: &AeadKey) {
        if let Some(Gcm { serial, key, salt }) = other.gcm()
            && key.len() == self.key.len()
        {
            self.key.copy_from_slice(key);
            self.salt = salt;
            self.serial = serial.halves();
        } else {
            self.vacate();
        }
    }

    /// Overwrites it.
    pub fn vacate(&mut self) {
        self.serial = [0; 2];
        self.key.zeroize();
        self.salt.zeroize();
    }

    /// Whether there is nothing.
    #[inline]
    pub fn is_vacant(&self) -> bool {
        self.serial == [0; 2]
    }

    #[inline]
    pub(super) fn gcm(&self) -> Gcm<'_> {
        Gcm { serial: Serial::of_halves(self.serial), key: &self.key, salt: self.salt }
    }

    /// As [`AeadKey::expand`].
    pub(super) fn expand<'a>(&self, keys: &'a mut KeyCache<LessSafeKey>) -> Option<Aead<'a>> {
        let cipher = ring(keys, Serial::of_halves(self.serial), &AES_128_GCM, &self.key)?;
        Some(Aead { cipher, salt: self.salt })
    }
}

impl Drop for ShortKey {
    fn drop(&mut self) {
        self.vacate();
    }
}

impl core::fmt::Debug for ShortKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("ShortKey(..)")
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
