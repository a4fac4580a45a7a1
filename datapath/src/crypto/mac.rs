//! HMAC as integrity transform: RFC 2404 (SHA-1-96) and RFC 4868 (SHA-2, cut to half).
//!
//! The inner and outer states are computed once a key. ICVs are compared in constant time.

use core::hint::black_box;

use ::hmac::{Hmac, KeyInit, Mac};
use postern_contract::sa::Integrity;
use ring::hmac;
use sha1::Sha1;
use subtle::ConstantTimeEq;

/// Longest ICV of any transform, HMAC-SHA2-512-256.
pub(super) const MAX_ICV: usize = 32;

/// A key of an HMAC transform.
pub(super) struct MacKey {
    state: State,
    icv_len: u8,
}

/// The inner and outer states.
enum State {
    Ring(hmac::Key),
    /// ring computes SHA-1 without the processor's instructions for it, which the crate `sha1` uses.
    Sha1(Hmac<Sha1>),
}

/// A whole tag.
pub(super) struct Tag {
    bytes: [u8; 64],
    len: usize,
}

impl AsRef<[u8]> for Tag {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Tag {
    fn new(tag: &[u8]) -> Self {
        let mut bytes = [0; 64];
        copy(&mut bytes, tag);
        Self { bytes, len: tag.len().min(bytes.len()) }
    }
}

impl MacKey {
    /// `None` when `integrity` is no HMAC. The length of `key` was checked by `Suite::validate`.
    pub(super) fn new(integrity: Integrity, key: &[u8]) -> Option<Self> {
        let ring = |algorithm| Some(State::Ring(hmac::Key::new(algorithm, key)));
        let (state, icv_len) = match integrity {
            Integrity::None | Integrity::AesGmac => return None,
            Integrity::HmacSha1_96 => (State::sha1(key), 12),
            Integrity::HmacSha2_256_128 => (ring(hmac::HMAC_SHA256), 16),
            Integrity::HmacSha2_384_192 => (ring(hmac::HMAC_SHA384), 24),
            Integrity::HmacSha2_512_256 => (ring(hmac::HMAC_SHA512), 32),
        };
        Some(Self { state: state?, icv_len })
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
    pub(super) fn tag(&self, covered: &[u8], high: Option<u32>) -> Tag {
        let high = high.map(u32::to_be_bytes);
        let high = high.as_ref().map_or(&[][..], |high| high);
        match &self.state {
            State::Ring(key) => {
                let mut context = hmac::Context::with_key(key);
                context.update(covered);
                context.update(high);
                Tag::new(context.sign().as_ref())
            }
            State::Sha1(key) => {
                let mut context = key.clone();
                context.update(covered);
                context.update(high);
                Tag::new(&context.finalize().into_bytes())
            }
        }
    }
}

impl State {
    /// `None` never: HMAC takes keys of every length.
    fn sha1(key: &[u8]) -> Option<Self> {
        Hmac::new_from_slice(key).ok().map(Self::Sha1)
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
        let blank = match &self.state {
            State::Ring(key) => Some(State::Ring(hmac::Key::new(key.algorithm(), &[]))),
            State::Sha1(_) => State::sha1(&[]),
        };
        if let Some(blank) = blank {
            self.state = blank;
        }
        // Without this the compiler may drop the write as dead.
        black_box(&mut self.state);
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
        for (integrity, algorithm) in [
            (Integrity::HmacSha2_256_128, hmac::HMAC_SHA256),
            (Integrity::HmacSha1_96, hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY),
        ] {
            let mut key = MacKey::new(integrity, &[7; 32]).unwrap();
            let before = key.tag(b"covered", None);
            key.wipe();
            let after = key.tag(b"covered", None);
            assert_ne!(before.as_ref(), after.as_ref());
            let empty = hmac::sign(&hmac::Key::new(algorithm, &[]), b"covered");
            assert_eq!(after.as_ref(), empty.as_ref());
        }
    }

    /// DP-3: HMAC-SHA1 of the crate `sha1` is ring's, for keys and texts on both sides of a block.
    #[test]
    fn dp_3_sha1_is_that_of_ring() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1600).collect();
        for key in [0, 1, 20, 63, 64, 65, 200].map(|len| &bytes[..len]) {
            let ours = MacKey::new(Integrity::HmacSha1_96, key).unwrap();
            let rings = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key);
            for len in (0..200).chain([1424, 1600]) {
                let mut covered = bytes[..len].to_vec();
                assert_eq!(ours.tag(&covered, None).as_ref(), hmac::sign(&rings, &covered).as_ref());
                let tag = ours.tag(&covered, Some(7));
                covered.extend(7_u32.to_be_bytes());
                assert_eq!(tag.as_ref(), hmac::sign(&rings, &covered).as_ref());
            }
        }
    }
}
