//! HMAC as integrity transform: RFC 2404 (SHA-1-96) and RFC 4868 (SHA-2, cut to half).
//!
//! The inner and outer states are computed once a key. ICVs are compared in constant time.

use core::hint::black_box;

use postern_contract::sa::Integrity;
use ring::hmac;
use subtle::ConstantTimeEq;

/// Longest ICV of any transform, HMAC-SHA2-512-256.
pub(super) const MAX_ICV: usize = 32;

/// A key of an HMAC transform.
pub(super) struct MacKey {
    key: hmac::Key,
    icv_len: u8,
}

impl MacKey {
    /// `None` when `integrity` is no HMAC. The length of `key` was checked by `Suite::validate`.
    pub(super) fn new(integrity: Integrity, key: &[u8]) -> Option<Self> {
        let (algorithm, icv_len) = match integrity {
            Integrity::None | Integrity::AesGmac => return None,
            Integrity::HmacSha1_96 => (hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, 12),
            Integrity::HmacSha2_256_128 => (hmac::HMAC_SHA256, 16),
            Integrity::HmacSha2_384_192 => (hmac::HMAC_SHA384, 24),
            Integrity::HmacSha2_512_256 => (hmac::HMAC_SHA512, 32),
        };
        Some(Self { key: hmac::Key::new(algorithm, key), icv_len })
    }

    /// Length of the ICV in bytes.
    pub(super) fn icv_len(&self) -> u8 {
        self.icv_len
    }

    /// Writes the ICV over `covered`, and over `high` behind it when there are extended sequence numbers
    /// (RFC 4303 section 3.3.2.1), to `icv`, which has the ICV's length.
    pub(super) fn sign(&self, covered: &[u8], high: Option<u32>, icv: &mut [u8]) {
        copy(icv, self.tag(covered, high).as_ref());
    }

    /// Whether `icv` is the ICV of `covered`.
    pub(super) fn verify(&self, covered: &[u8], high: Option<u32>, icv: &[u8]) -> bool {
        let tag = self.tag(covered, high);
        match tag.as_ref().get(..usize::from(self.icv_len)) {
            Some(expected) => expected.ct_eq(icv).into(),
            None => false,
        }
    }

    /// The whole tag, of which the ICV is the start.
    pub(super) fn tag(&self, covered: &[u8], high: Option<u32>) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(covered);
        if let Some(high) = high {
            context.update(&high.to_be_bytes());
        }
        context.sign()
    }
}

/// Fills `to` with the start of `from`.
pub(super) fn copy(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

impl MacKey {
    /// ring does not wipe its keys, so the states of another key are written over them.
    fn wipe(&mut self) {
        self.key = hmac::Key::new(self.key.algorithm(), &[]);
        // Without this the compiler may drop the write as dead.
        black_box(&mut self.key);
    }
}

impl Drop for MacKey {
    fn drop(&mut self) {
        self.wipe();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OPS-4: after the wipe the key is another, known one: that of no bytes.
    #[test]
    fn ops_4_wiped_key_is_the_empty_key() {
        let mut key = MacKey::new(Integrity::HmacSha2_256_128, &[7; 32]).unwrap();
        let before = key.tag(b"covered", None);
        key.wipe();
        let after = key.tag(b"covered", None);
        assert_ne!(before.as_ref(), after.as_ref());
        let empty = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &[]), b"covered");
        assert_eq!(after.as_ref(), empty.as_ref());
    }
}
