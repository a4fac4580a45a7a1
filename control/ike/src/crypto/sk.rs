//! The Encrypted payload (RFC 7296 section 3.14, with an AEAD RFC 5282 and RFC 7634; fragments RFC 7383 section 2.5).
//!
//! ```text
//! header | payloads in the clear | generic header of SK [| fragment number | total] | IV | chain, padding, pad length | ICV
//! └──────────────── "aad" ─────────────────────────────────────────────────────────┘ └─────────── "sealed" ──────────────┘
//! ```
//!
//! A [`Sealer`] and an [`Opener`] hold one direction's keys as they came out of prf+ and nothing that is computed from
//! them: an IKE SA is silent most of its life, and 100,000 of them should be small. Expanding the keys costs well
//! below a microsecond a message.

use core::fmt;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{
    self, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey,
};
use aws_lc_rs::hmac;
use aws_lc_rs::iv::FixedLength;
use subtle::ConstantTimeEq;

use super::stack;
use crate::message::registry::{EncrId, IntegId};
use crate::negotiate::{IkeSuite, is_aead};
use crate::{Random, Secret};

/// How messages of an IKE SA are protected; every value is one that is implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    encr: EncrId,
    key_bits: u16,
    integ: IntegId,
}

/// Length of an AEAD's IV (RFC 5282 section 3.1, RFC 7634 section 2) and tag ("an ICV of 16 octets").
const AEAD_IV: usize = 8;
const AEAD_ICV: usize = 16;
/// AES's block, and so the length of the IV in CBC mode.
const BLOCK: usize = 16;

impl Protection {
    /// That of a suite; `None` if it is not implemented or no protection: an encryption without integrity, or no encryption
    /// (section 5: ENCR_NULL is not for IKE).
    pub fn of(suite: &IkeSuite) -> Option<Self> {
        Self::from_numbers(suite.encr, suite.key_bits, suite.integ)
    }

    /// Numbers of the algorithms and the length of the key, to be saved.
    pub const fn numbers(self) -> (EncrId, u16, IntegId) {
        (self.encr, self.key_bits, self.integ)
    }

    /// Back from [`numbers`](Self::numbers); `None` if it is not implemented or no protection.
    pub fn from_numbers(encr: EncrId, key_bits: u16, integ: IntegId) -> Option<Self> {
        let protection = Self { encr, key_bits, integ };
        if is_aead(encr) {
            protection.aead()?;
            (integ == IntegId::NONE).then_some(protection)
        } else {
            protection.cbc()?;
            protection.hmac()?;
            Some(protection)
        }
    }

    /// Length of SK_ei and SK_er.
    pub fn encr_length(self) -> usize {
        super::keys::encr_key_length(self.encr, self.key_bits).unwrap_or(0)
    }

    /// Length of SK_ai and SK_ar; 0 with an AEAD.
    pub fn integ_length(self) -> usize {
        super::keys::integ_key_length(self.integ).unwrap_or(0)
    }

    /// Length of `sealed` for a chain of that length.
    pub fn sealed_length(self, chain: usize) -> usize {
        match self.hmac() {
            None => AEAD_IV + chain + 1 + AEAD_ICV,
            Some((_, icv)) => BLOCK + (chain + 1).next_multiple_of(BLOCK) + icv,
        }
    }

    /// Length of the longest chain (or piece of one, for a fragment) whose `sealed` is at most so long.
    pub fn longest_chain(self, sealed: usize) -> usize {
        match self.hmac() {
            None => sealed.saturating_sub(AEAD_IV + 1 + AEAD_ICV),
            Some((_, icv)) => (sealed.saturating_sub(BLOCK + icv) / BLOCK * BLOCK).saturating_sub(1),
        }
    }

    fn aead(self) -> Option<&'static aead::Algorithm> {
        match (self.encr, self.key_bits) {
            (EncrId::AES_GCM_16, 128) => Some(&aead::AES_128_GCM),
            (EncrId::AES_GCM_16, 192) => Some(&aead::AES_192_GCM),
            (EncrId::AES_GCM_16, 256) => Some(&aead::AES_256_GCM),
            (EncrId::CHACHA20_POLY1305, 256) => Some(&aead::CHACHA20_POLY1305),
            _ => None,
        }
    }

    fn cbc(self) -> Option<&'static cipher::Algorithm> {
        match (self.encr, self.key_bits) {
            (EncrId::AES_CBC, 128) => Some(&cipher::AES_128),
            (EncrId::AES_CBC, 192) => Some(&cipher::AES_192),
            (EncrId::AES_CBC, 256) => Some(&cipher::AES_256),
            _ => None,
        }
    }

    /// The HMAC and the length to which its output is cut.
    fn hmac(self) -> Option<(hmac::Algorithm, usize)> {
        match self.integ {
            IntegId::HMAC_SHA1_96 => Some((hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, 12)),
            IntegId::HMAC_SHA2_256_128 => Some((hmac::HMAC_SHA256, 16)),
            IntegId::HMAC_SHA2_384_192 => Some((hmac::HMAC_SHA384, 24)),
            IntegId::HMAC_SHA2_512_256 => Some((hmac::HMAC_SHA512, 32)),
            _ => None,
        }
    }
}

/// One direction's keys.
struct Keys {
    protection: Protection,
    /// SK_e, then SK_a.
    bytes: Secret,
}

/// What the keys are once they are expanded.
enum Expanded<'a> {
    Aead(LessSafeKey, /* salt */ [u8; 4]),
    Cbc(UnboundCipherKey, Mac<'a>),
}

struct Mac<'a> {
    algorithm: hmac::Algorithm,
    key: &'a [u8],
    icv: usize,
}

impl Keys {
    fn new(protection: Protection, sk_e: &Secret, sk_a: &Secret) -> Option<Self> {
        let fits = sk_e.len() == protection.encr_length() && sk_a.len() == protection.integ_length();
        let keys = Self { protection, bytes: Secret::new([sk_e.expose(), sk_a.expose()].concat()) };
        (fits && stack::wiped(|| keys.expand().is_some())).then_some(keys)
    }

    fn from_saved(protection: Protection, keys: &Secret) -> Option<Self> {
        let fits = keys.len() == protection.encr_length() + protection.integ_length();
        let keys = Self { protection, bytes: keys.duplicate() };
        (fits && stack::wiped(|| keys.expand().is_some())).then_some(keys)
    }

    /// Never `None` after `new`.
    fn expand(&self) -> Option<Expanded<'_>> {
        let (sk_e, sk_a) = self.bytes.expose().split_at_checked(self.protection.encr_length())?;
        if let Some(algorithm) = self.protection.aead() {
            let (key, salt) = sk_e.split_last_chunk()?;
            let key = UnboundKey::new(algorithm, key).ok()?;
            Some(Expanded::Aead(LessSafeKey::new(key), *salt))
        } else {
            let (algorithm, icv) = self.protection.hmac()?;
            let key = UnboundCipherKey::new(self.protection.cbc()?, sk_e).ok()?;
            Some(Expanded::Cbc(key, Mac { algorithm, key: sk_a, icv }))
        }
    }
}

impl Mac<'_> {
    /// Section 3.14: the integrity checksum is over the whole message "starting with the Fixed IKE header through the
    /// Pad Length".
    fn tag(&self, parts: [&[u8]; 2]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&hmac::Key::new(self.algorithm, self.key));
        for part in parts {
            context.update(part);
        }
        context.sign()
    }
}

/// Protects messages of one direction.
pub struct Sealer {
    keys: Keys,
    /// The next IV of an AEAD. In one life of an IKE SA fewer than [`LIFE`] are used: it has at most 2^32 messages each way,
    /// each of at most 2^16 fragments, and what is sent again is not sealed again.
    iv: u64,
}

/// IVs of an AEAD from so many times the life's number on are for that life: an IKE SA that goes on after a reset knows
/// which messages it had sent, but not how often it had sealed.
const LIFE: u64 = 1 << 50;

/// IVs of an AEAD from here on are for what is sealed after a reset: a message is sealed there under this and its message
/// ID, and always the same message under the same ID, so that neither a second reset nor a message that was built before
/// the first uses an IV twice with different content.
const AFTERLIFE: u64 = 1 << 63;

/// What the IV of a message with CBC is made from after a reset, when it has to be the same each time.
const AFTERLIFE_LABEL: &[u8] = b"postern recovery iv";

impl Sealer {
    /// From SK_ei and SK_ai or SK_er and SK_ar; `None` if their lengths are wrong.
    pub fn new(protection: Protection, sk_e: &Secret, sk_a: &Secret) -> Option<Self> {
        Some(Self { keys: Keys::new(protection, sk_e, sk_a)?, iv: 0 })
    }

    /// From SK_e and SK_a in one; `None` if their length is wrong.
    pub fn from_saved(protection: Protection, keys: &Secret) -> Option<Self> {
        Some(Self { keys: Keys::from_saved(protection, keys)?, iv: 0 })
    }

    /// The same, in a later life: IVs are above those of the lives before, and below those after. `None` also if there are
    /// no more lives.
    pub fn restored(protection: Protection, keys: &Secret, life: u16) -> Option<Self> {
        let iv = LIFE.checked_mul(life.into()).filter(|iv| *iv < AFTERLIFE)?;
        Some(Self { keys: Keys::from_saved(protection, keys)?, iv })
    }

    /// The life's number, from 0.
    pub fn life(&self) -> u16 {
        u16::try_from(self.iv / LIFE).unwrap_or(u16::MAX)
    }

    /// The algorithms and the keys, SK_e and SK_a in one.
    pub const fn saved(&self) -> (Protection, &Secret) {
        (self.keys.protection, &self.keys.bytes)
    }

    /// Length of what comes after the generic header, for the lengths that are written in the header and there.
    pub fn sealed_length(&self, chain: usize) -> usize {
        self.keys.protection.sealed_length(chain)
    }

    /// Length of the longest piece of a chain for which [`sealed_length`](Self::sealed_length) is at most `sealed`.
    pub fn longest_chain(&self, sealed: usize) -> usize {
        self.keys.protection.longest_chain(sealed)
    }

    /// Protects `chain`. `message` is all of the message that comes before: from its header, in which the length is already
    /// right, through the generic header of the Encrypted payload. Empty if the library failed, which it does not unless
    /// there is no memory; nothing is ever given out unprotected.
    pub fn seal(&mut self, random: &mut dyn Random, message: Vec<u8>, chain: &[u8]) -> Vec<u8> {
        self.try_seal(random, message, chain).unwrap_or_default()
    }

    /// Protects a message of which this side, after a reset, knows only the keys. The same message and message ID give the
    /// same bytes, whenever this is called; for one message ID it must never be another message.
    pub fn seal_after_reset(&self, message_id: u32, message: Vec<u8>, chain: &[u8]) -> Vec<u8> {
        let iv = match self.keys.protection.hmac() {
            None => Iv::Aead((AFTERLIFE | u64::from(message_id)).to_be_bytes()),
            Some(_) => Iv::Cbc(self.keys.derived_iv(message_id)),
        };
        self.keys.seal(iv, message, chain).unwrap_or_default()
    }

    fn try_seal(&mut self, random: &mut dyn Random, message: Vec<u8>, chain: &[u8]) -> Option<Vec<u8>> {
        let iv = if self.keys.protection.hmac().is_none() {
            let iv = self.iv.to_be_bytes();
            self.iv = self.iv.wrapping_add(1);
            Iv::Aead(iv)
        } else {
            // "The Initialization Vector … MUST be unpredictable" (RFC 3602 section 3).
            let mut iv = [0; BLOCK];
            random.fill(&mut iv);
            Iv::Cbc(iv)
        };
        self.keys.seal(iv, message, chain)
    }
}

/// An initialization vector that was not used with the same keys before.
enum Iv {
    Aead([u8; AEAD_IV]),
    Cbc([u8; BLOCK]),
}

impl Keys {
    fn seal(&self, iv: Iv, message: Vec<u8>, chain: &[u8]) -> Option<Vec<u8>> {
        stack::wiped(|| self.expand_and_seal(iv, message, chain))
    }

    fn expand_and_seal(&self, iv: Iv, mut message: Vec<u8>, chain: &[u8]) -> Option<Vec<u8>> {
        let aad_length = message.len();
        message.reserve_exact(self.protection.sealed_length(chain.len()));
        match (self.expand()?, iv) {
            (Expanded::Aead(key, salt), Iv::Aead(iv)) => {
                message.extend_from_slice(&iv);
                message.extend_from_slice(chain);
                // RFC 5282 section 3: "need not be padded": the pad length is 0.
                message.push(0);
                let (aad, sealed) = message.split_at_mut_checked(aad_length)?;
                let (_, text) = sealed.split_first_chunk_mut::<AEAD_IV>()?;
                let tag = key.seal_in_place_separate_tag(nonce(salt, iv), Aad::from(&*aad), text).ok()?;
                message.extend_from_slice(tag.as_ref());
            }
            (Expanded::Cbc(key, mac), Iv::Cbc(iv)) => {
                message.extend_from_slice(&iv);
                message.extend_from_slice(chain);
                let padding = (chain.len() + 1).next_multiple_of(BLOCK) - (chain.len() + 1);
                message.resize(message.len() + padding, 0);
                message.push(u8::try_from(padding).ok()?);
                let (_, sealed) = message.split_at_mut_checked(aad_length)?;
                let (_, text) = sealed.split_first_chunk_mut::<BLOCK>()?;
                let context = EncryptionContext::Iv128(FixedLength::from(iv));
                EncryptingKey::cbc(key).ok()?.less_safe_encrypt(text, context).ok()?;
                let tag = mac.tag([&message, &[]]);
                message.extend_from_slice(tag.as_ref().get(..mac.icv)?);
            }
            _ => return None,
        }
        Some(message)
    }

    /// Unpredictable to whoever has not the keys (RFC 3602 section 3), and always the same.
    fn derived_iv(&self, message_id: u32) -> [u8; BLOCK] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.bytes.expose());
        let mut context = hmac::Context::with_key(&key);
        context.update(AFTERLIFE_LABEL);
        context.update(&message_id.to_be_bytes());
        let tag = context.sign();
        tag.as_ref().first_chunk().copied().unwrap_or_default()
    }
}

/// Checks and reveals messages of one direction.
pub struct Opener(Keys);

impl Opener {
    /// From SK_ei and SK_ai or SK_er and SK_ar; `None` if their lengths are wrong.
    pub fn new(protection: Protection, sk_e: &Secret, sk_a: &Secret) -> Option<Self> {
        Keys::new(protection, sk_e, sk_a).map(Self)
    }

    /// From SK_e and SK_a in one; `None` if their length is wrong.
    pub fn from_saved(protection: Protection, keys: &Secret) -> Option<Self> {
        Keys::from_saved(protection, keys).map(Self)
    }

    /// The keys, SK_e and SK_a in one.
    pub const fn saved(&self) -> &Secret {
        &self.0.bytes
    }

    /// The chain of payloads, if the message is genuine; the padding is taken off. `None` also if a genuine message has a
    /// pad length that is longer than its text.
    pub fn open(&self, aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        stack::wiped(|| self.expand_and_open(aad, sealed))
    }

    fn expand_and_open(&self, aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let mut text = match self.0.expand()? {
            Expanded::Aead(key, salt) => {
                let (iv, text) = sealed.split_first_chunk::<AEAD_IV>()?;
                let (text, tag) = text.split_at_checked(text.len().checked_sub(AEAD_ICV)?)?;
                let mut text = text.to_vec();
                key.open_in_place_separate_tag(nonce(salt, *iv), Aad::from(aad), tag, &mut text).ok()?;
                text
            }
            Expanded::Cbc(key, mac) => {
                let (covered, icv) = sealed.split_at_checked(sealed.len().checked_sub(mac.icv)?)?;
                let (iv, text) = covered.split_first_chunk::<BLOCK>()?;
                let tag = mac.tag([aad, covered]);
                if !bool::from(tag.as_ref().get(..mac.icv)?.ct_eq(icv)) {
                    return None;
                }
                let mut text = text.to_vec();
                let context = DecryptionContext::Iv128(FixedLength::from(*iv));
                DecryptingKey::cbc(key).ok()?.decrypt(&mut text, context).ok()?;
                text
            }
        };
        // What the padding holds is of no interest: section 3.14 "Padding MAY contain any value chosen by the sender".
        let padding = usize::from(text.pop()?);
        text.truncate(text.len().checked_sub(padding)?);
        Some(text)
    }
}

/// RFC 5282 section 4 and RFC 7634 section 2: the salt, then the IV.
fn nonce(salt: [u8; 4], iv: [u8; AEAD_IV]) -> Nonce {
    let mut nonce = [0; 12];
    let (first, last) = nonce.split_at_mut(salt.len());
    first.copy_from_slice(&salt);
    last.copy_from_slice(&iv);
    Nonce::assume_unique_for_key(nonce)
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealer({:?}, ..)", self.keys.protection)
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opener({:?}, ..)", self.0.protection)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::testing::{Seeded, hex};

    pub(super) const ALL: [Protection; 16] = {
        const fn aead(encr: EncrId, key_bits: u16) -> Protection {
            Protection { encr, key_bits, integ: IntegId::NONE }
        }
        const fn cbc(key_bits: u16, integ: IntegId) -> Protection {
            Protection { encr: EncrId::AES_CBC, key_bits, integ }
        }
        [
            aead(EncrId::AES_GCM_16, 128),
            aead(EncrId::AES_GCM_16, 192),
            aead(EncrId::AES_GCM_16, 256),
            aead(EncrId::CHACHA20_POLY1305, 256),
            cbc(128, IntegId::HMAC_SHA1_96),
            cbc(192, IntegId::HMAC_SHA1_96),
            cbc(256, IntegId::HMAC_SHA1_96),
            cbc(128, IntegId::HMAC_SHA2_256_128),
            cbc(192, IntegId::HMAC_SHA2_256_128),
            cbc(256, IntegId::HMAC_SHA2_256_128),
            cbc(128, IntegId::HMAC_SHA2_384_192),
            cbc(192, IntegId::HMAC_SHA2_384_192),
            cbc(256, IntegId::HMAC_SHA2_384_192),
            cbc(128, IntegId::HMAC_SHA2_512_256),
            cbc(192, IntegId::HMAC_SHA2_512_256),
            cbc(256, IntegId::HMAC_SHA2_512_256),
        ]
    };

    fn suite(encr: EncrId, key_bits: u16, integ: IntegId) -> IkeSuite {
        IkeSuite {
            encr,
            key_bits,
            integ,
            prf: crate::message::registry::PrfId::HMAC_SHA2_256,
            ke: crate::message::registry::KeMethod::CURVE25519,
            additional: crate::negotiate::Additional::new(),
        }
    }

    fn pair(protection: Protection) -> (Sealer, Opener) {
        let sk_e = Secret::new(vec![0xe1; protection.encr_length()]);
        let sk_a = Secret::new(vec![0xa1; protection.integ_length()]);
        (Sealer::new(protection, &sk_e, &sk_a).unwrap(), Opener::new(protection, &sk_e, &sk_a).unwrap())
    }

    /// IKE-1: RFC 7634 appendix B, an INFORMATIONAL request.
    #[test]
    fn ike_1_chacha20_poly1305_of_rfc_7634() {
        let protection = ALL[3];
        let key = hex("80 81 82 83 84 85 86 87 88 89 8a 8b 8c 8d 8e 8f 90 91 92 93 94 95 96 97
                       98 99 9a 9b 9c 9d 9e 9f a0 a1 a2 a3");
        let aad = hex("c0 c1 c2 c3 c4 c5 c6 c7 d0 d1 d2 d3 d4 d5 d6 d7 2e 20 25 00 00 00 00 09
                       00 00 00 45 29 00 00 29");
        let chain = hex("00 00 00 0c 00 00 40 01 00 00 00 0a");
        let sealed = hex("10 11 12 13 14 15 16 17
                          61 03 94 70 1f 8d 01 7f 7c 12 92 48 89
                          6b 71 bf e2 52 36 ef d7 cd c6 70 66 90 63 15 b2");
        let key = Secret::new(key);
        let opener = Opener::new(protection, &key, &Secret::default()).unwrap();
        assert_eq!(opener.open(&aad, &sealed).unwrap(), chain);
        let mut sealer = Sealer::new(protection, &key, &Secret::default()).unwrap();
        sealer.iv = 0x1011_1213_1415_1617;
        assert_eq!(sealer.sealed_length(chain.len()), sealed.len());
        assert_eq!(sealer.seal(&mut Seeded(1), aad.clone(), &chain), [aad, sealed].concat());
    }

    /// IKE-1: what opens again, and has the length that was announced, in one allocation.
    #[test]
    fn ike_1_every_suite_opens_what_it_sealed() {
        for protection in ALL {
            let (mut sealer, opener) = pair(protection);
            for length in 0..70 {
                let chain: Vec<u8> = (0..length).collect();
                let message = sealer.seal(&mut Seeded(u64::from(length)), vec![0xa5; 32], &chain);
                assert_eq!(message.len(), 32 + sealer.sealed_length(chain.len()));
                assert_eq!(message.capacity(), message.len());
                let (aad, sealed) = message.split_at(32);
                assert_eq!(aad, [0xa5; 32]);
                assert_eq!(opener.open(aad, sealed).unwrap(), chain);
            }
        }
    }

    /// IKE-1: one bit changed anywhere in the message, or bytes taken from its end.
    #[test]
    fn ike_1_no_changed_message_opens() {
        for protection in ALL {
            let (mut sealer, opener) = pair(protection);
            let message = sealer.seal(&mut Seeded(5), vec![0x11; 32], b"payloads");
            for position in 0..message.len() {
                let mut changed = message.clone();
                changed[position] ^= 1 << (position % 8);
                assert_eq!(opener.open(&changed[..32], &changed[32..]), None, "{protection:?} {position}");
            }
            for end in 32..message.len() {
                assert_eq!(opener.open(&message[..32], &message[32..end]), None);
            }
        }
    }

    /// IKE-1: an IV is never used twice (RFC 5282 section 3.1), nor is CBC's foreseeable.
    #[test]
    fn ike_1_ivs_differ() {
        for protection in ALL {
            let (mut sealer, _) = pair(protection);
            let mut random = Seeded(77);
            let length = if protection.integ == IntegId::NONE { AEAD_IV } else { BLOCK };
            let ivs: std::collections::HashSet<Vec<u8>> =
                (0..100).map(|_| sealer.seal(&mut random, Vec::new(), b"")[..length].to_vec()).collect();
            assert_eq!(ivs.len(), 100);
        }
    }

    /// IKE-1: what a peer pads with does not matter, unless there is more of it than text.
    #[test]
    fn ike_1_padding_of_any_kind_is_taken_off() {
        for protection in ALL {
            let (mut sealer, opener) = pair(protection);
            // Seal something that ends in a pad length, which one more of 0 (AEAD) or 15 (CBC) is put behind.
            for (length, pad_length, left) in
                [(16, 15, Some(0)), (32, 20, Some(11)), (16, 16, None), (16, 255, None)]
            {
                let mut text = vec![0xee; length];
                text[length - 1] = pad_length;
                let message = reseal(&mut sealer, &text);
                assert_eq!(
                    opener.open(b"aad", &message[3..]).map(|chain| chain.len()),
                    left,
                    "{protection:?}"
                );
            }
        }
    }

    /// Seals `text`, a multiple of a block, without any padding being added.
    fn reseal(sealer: &mut Sealer, text: &[u8]) -> Vec<u8> {
        let mut message = b"aad".to_vec();
        match sealer.keys.expand().unwrap() {
            Expanded::Aead(key, salt) => {
                let mut text = text.to_vec();
                let tag = key
                    .seal_in_place_separate_tag(nonce(salt, [9; 8]), Aad::from(b"aad"), &mut text)
                    .unwrap();
                message.extend([&[9; 8], text.as_slice(), tag.as_ref()].concat());
            }
            Expanded::Cbc(key, mac) => {
                let mut text = text.to_vec();
                let context = EncryptionContext::Iv128(FixedLength::from([9; BLOCK]));
                EncryptingKey::cbc(key).unwrap().less_safe_encrypt(&mut text, context).unwrap();
                message.extend([&[9; BLOCK], text.as_slice()].concat());
                let tag = mac.tag([&message, &[]]);
                message.extend(&tag.as_ref()[..mac.icv]);
            }
        }
        message
    }

    /// IKE-1: combinations that protect nothing, or that are not there, are refused.
    #[test]
    fn ike_1_no_protection_is_refused() {
        for (encr, bits, integ) in [
            (EncrId::NULL, 0, IntegId::HMAC_SHA2_256_128),
            (EncrId::NULL_AUTH_AES_GMAC, 128, IntegId::NONE),
            (EncrId::AES_CBC, 128, IntegId::NONE),
            (EncrId::AES_CBC, 64, IntegId::HMAC_SHA2_256_128),
            (EncrId::AES_GCM_16, 128, IntegId::HMAC_SHA2_256_128),
            (EncrId::AES_GCM_16, 0, IntegId::NONE),
            (EncrId::CHACHA20_POLY1305, 128, IntegId::NONE),
            (EncrId(3), 192, IntegId::HMAC_SHA1_96),
        ] {
            assert_eq!(Protection::of(&suite(encr, bits, integ)), None, "{encr} {bits} {integ}");
        }
        for protection in ALL {
            let Protection { encr, key_bits, integ } = protection;
            assert_eq!(Protection::of(&suite(encr, key_bits, integ)), Some(protection));
            let short = Secret::new(vec![1; protection.encr_length() - 1]);
            let sk_a = Secret::new(vec![1; protection.integ_length()]);
            assert!(Sealer::new(protection, &short, &sk_a).is_none());
        }
    }

    /// OPS-4: no key byte is shown.
    #[test]
    fn ops_4_debug_shows_no_key() {
        for protection in ALL {
            let (sealer, opener) = pair(protection);
            let shown = format!("{sealer:?} {opener:?}").to_lowercase();
            assert!(
                !shown.contains("e1e1") && !shown.contains("225, ") && !shown.contains("161, "),
                "{shown}"
            );
        }
    }

    proptest! {
        /// IKE-1: no bytes make opening panic, and none that were not sealed open.
        #[test]
        fn ike_1_any_bytes_do_not_open(
            which in 0..ALL.len(),
            aad in prop::collection::vec(any::<u8>(), 0..40),
            sealed in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            prop_assert_eq!(pair(ALL[which]).1.open(&aad, &sealed), None);
        }

        /// IKE-1: a piece of the longest length fits, one that is longer by one does not.
        #[test]
        fn ike_1_longest_chain_is_longest(which in 0..ALL.len(), room in 80_usize..2000) {
            let protection = ALL[which];
            let longest = protection.longest_chain(room);
            prop_assert!(protection.sealed_length(longest) <= room);
            prop_assert!(protection.sealed_length(longest + 1) > room);
        }
    }
}
