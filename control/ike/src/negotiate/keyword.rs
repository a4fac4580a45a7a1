//! Proposals in strongSwan's words: `aes128gcm16-prfsha256-x25519`, `aes128-sha256-modp2048`.
//!
//! One text is one proposal. It may have several words of a type, the preferred one first. A proposal is either all AEAD
//! or has an integrity algorithm for its encryption: section 3.3 of RFC 7296 wants the two kinds apart. What is left
//! out is filled in:
//!
//! - the pseudorandom functions of an IKE proposal are those of its integrity algorithms; next to an AEAD, `sha256` means
//!   `prfsha256`;
//! - an ESP or AH proposal has sequence numbers of 32 bits (`noesn`); `esn` alone demands 64, `esn-noesn` prefers them.
//!
//! [`Proposal`]'s `Display` is the inverse.

use core::fmt;

use crate::message::registry::{EncrId, EsnId, IntegId, KeMethod, PrfId, ProtocolId, TransformType};
use crate::message::{Proposal, Transform};

use super::is_aead;
use super::proposal::ADDKE;

/// What is wrong with the text of a proposal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeywordError {
    /// A word that is none.
    #[error("`{word}` is no algorithm of {protocol} known here; known are {known}")]
    Unknown {
        /// The word.
        word: String,
        /// For what it stands.
        protocol: ProtocolId,
        /// All words that there are.
        known: String,
    },
    /// A word that other implementations know, for what is not secure any more.
    #[error("`{word}` is refused: {why}")]
    Weak {
        /// The word.
        word: String,
        /// Why.
        why: &'static str,
    },
    /// The same twice.
    #[error("`{0}` stands twice")]
    Twice(String),
    /// A word that does not go with the others.
    #[error("`{word}` {why}")]
    Misplaced {
        /// The word.
        word: String,
        /// Why not.
        why: &'static str,
    },
    /// Something is left out that has no default.
    #[error("{0}")]
    Missing(&'static str),
}

const ENCRYPTION: &[(&str, EncrId, Option<u16>)] = &[
    ("aes128gcm16", EncrId::AES_GCM_16, Some(128)),
    ("aes192gcm16", EncrId::AES_GCM_16, Some(192)),
    ("aes256gcm16", EncrId::AES_GCM_16, Some(256)),
    ("chacha20poly1305", EncrId::CHACHA20_POLY1305, None),
    ("aes128", EncrId::AES_CBC, Some(128)),
    ("aes192", EncrId::AES_CBC, Some(192)),
    ("aes256", EncrId::AES_CBC, Some(256)),
    ("aes128gmac", EncrId::NULL_AUTH_AES_GMAC, Some(128)),
    ("aes192gmac", EncrId::NULL_AUTH_AES_GMAC, Some(192)),
    ("aes256gmac", EncrId::NULL_AUTH_AES_GMAC, Some(256)),
    ("null", EncrId::NULL, None),
];

const INTEGRITY: &[(&str, IntegId, PrfId)] = &[
    ("sha256", IntegId::HMAC_SHA2_256_128, PrfId::HMAC_SHA2_256),
    ("sha384", IntegId::HMAC_SHA2_384_192, PrfId::HMAC_SHA2_384),
    ("sha512", IntegId::HMAC_SHA2_512_256, PrfId::HMAC_SHA2_512),
    ("sha1", IntegId::HMAC_SHA1_96, PrfId::HMAC_SHA1),
];

const PRF: &[(&str, PrfId)] = &[
    ("prfsha256", PrfId::HMAC_SHA2_256),
    ("prfsha384", PrfId::HMAC_SHA2_384),
    ("prfsha512", PrfId::HMAC_SHA2_512),
    ("prfsha1", PrfId::HMAC_SHA1),
];

/// Also with `ke1_` to `ke7_` before them.
const EXCHANGE: &[(&str, KeMethod)] = &[
    ("x25519", KeMethod::CURVE25519),
    ("ecp256", KeMethod::ECP_256),
    ("ecp384", KeMethod::ECP_384),
    ("modp2048", KeMethod::MODP_2048),
    ("modp3072", KeMethod::MODP_3072),
    ("modp4096", KeMethod::MODP_4096),
    ("mlkem768", KeMethod::ML_KEM_768),
    ("none", KeMethod::NONE),
];

const SEQUENCE: &[(&str, EsnId)] = &[("noesn", EsnId::NO_ESN), ("esn", EsnId::ESN)];

/// What is refused with a reason (RFC 8247, RFC 8221).
const WEAK: &[(&str, &str)] = &[
    ("3des", "3DES has blocks of 64 bits (Sweet32); use aes128"),
    ("des", "DES keys are found in hours; use aes128"),
    ("md5", "MD5 is broken; use sha256"),
    ("prfmd5", "MD5 is broken; use prfsha256"),
    ("modp768", "the group is too small (Logjam), at least modp2048 is needed"),
    ("modp1024", "the group is too small (Logjam), at least modp2048 is needed"),
    ("modp1536", "the group is too small, at least modp2048 is needed"),
];

/// Other spellings that strongSwan knows.
const ALIASES: &[(&str, &str)] = &[
    ("aes128gcm128", "aes128gcm16"),
    ("aes192gcm128", "aes192gcm16"),
    ("aes256gcm128", "aes256gcm16"),
    ("sha2_256", "sha256"),
    ("sha2_384", "sha384"),
    ("sha2_512", "sha512"),
    ("curve25519", "x25519"),
    ("modpnone", "none"),
];

/// Reads a proposal for an IKE SA.
///
/// # Errors
/// If a word is not known, or the words do not make a proposal.
pub fn ike(text: &str) -> Result<Proposal, KeywordError> {
    let mut words = Words::read(ProtocolId::IKE, text)?;
    words.kept_apart()?;
    if words.of(TransformType::ENCR).next().is_none() {
        return Err(KeywordError::Missing("there is no encryption algorithm, such as `aes128gcm16`"));
    }
    if words.of(TransformType::PRF).next().is_none() {
        let implied: Vec<_> =
            words.of(TransformType::INTEG).filter_map(|integ| implied_prf(IntegId(integ.id))).collect();
        if implied.is_empty() {
            return Err(KeywordError::Missing("there is no pseudorandom function, such as `prfsha256`"));
        }
        words.transforms.extend(implied.into_iter().map(|prf| transform(TransformType::PRF, prf.0, None)));
        if words.aead() {
            words.transforms.retain(|transform| transform.kind != TransformType::INTEG);
        }
    }
    words.integrity_fits()?;
    let methods: Vec<_> = words.of(TransformType::KE).collect();
    if methods.is_empty() {
        return Err(KeywordError::Missing("there is no key exchange method, such as `x25519`"));
    }
    if methods.iter().any(|method| method.id == KeMethod::NONE.0) {
        return Err(misplaced("none", "is no key exchange for IKE"));
    }
    Ok(words.proposal())
}

/// Reads a proposal for an ESP SA.
///
/// # Errors
/// If a word is not known, or the words do not make a proposal.
pub fn esp(text: &str) -> Result<Proposal, KeywordError> {
    let words = Words::read(ProtocolId::ESP, text)?;
    words.kept_apart()?;
    if words.of(TransformType::ENCR).next().is_none() {
        return Err(KeywordError::Missing("there is no encryption algorithm, such as `aes128gcm16`"));
    }
    words.integrity_fits()?;
    Ok(words.child())
}

/// Reads a proposal for an AH SA.
///
/// # Errors
/// If a word is not known, or the words do not make a proposal.
pub fn ah(text: &str) -> Result<Proposal, KeywordError> {
    let words = Words::read(ProtocolId::AH, text)?;
    if words.of(TransformType::INTEG).next().is_none() {
        return Err(KeywordError::Missing("there is no integrity algorithm, such as `sha256`"));
    }
    Ok(words.child())
}

/// What is proposed for an IKE SA if nothing is configured.
pub fn default_ike() -> Vec<Proposal> {
    defaults(
        ike,
        &[
            "aes128gcm16-aes256gcm16-chacha20poly1305-prfsha256-prfsha384-prfsha512-x25519-ecp256-ecp384-modp2048-modp3072-modp4096",
            "aes128-aes256-sha256-sha384-sha512-x25519-ecp256-ecp384-modp2048-modp3072-modp4096",
        ],
    )
}

/// What is proposed for an ESP SA if nothing is configured.
pub fn default_esp() -> Vec<Proposal> {
    defaults(
        esp,
        &[
            "aes128gcm16-aes256gcm16-chacha20poly1305-esn-noesn",
            "aes128-aes256-sha256-sha384-sha512-esn-noesn",
        ],
    )
}

/// What is proposed for an AH SA if nothing is configured but that it is AH.
pub fn default_ah() -> Vec<Proposal> {
    defaults(ah, &["sha256-sha384-sha512-esn-noesn"])
}

/// None of them fails, which a test shows.
fn defaults(read: fn(&str) -> Result<Proposal, KeywordError>, texts: &[&str]) -> Vec<Proposal> {
    texts.iter().filter_map(|text| read(text).ok()).collect()
}

/// The words of a text as transforms, in their order.
struct Words {
    protocol: ProtocolId,
    transforms: Vec<Transform>,
}

impl Words {
    fn read(protocol: ProtocolId, text: &str) -> Result<Self, KeywordError> {
        let mut transforms: Vec<Transform> = Vec::new();
        for word in text.split('-') {
            if let Some((_, why)) = WEAK.iter().find(|(weak, _)| *weak == word) {
                return Err(KeywordError::Weak { word: word.to_owned(), why });
            }
            let transform = lookup(protocol, word).ok_or_else(|| KeywordError::Unknown {
                word: word.to_owned(),
                protocol,
                known: known(protocol),
            })?;
            if transforms.contains(&transform) {
                return Err(KeywordError::Twice(word.to_owned()));
            }
            transforms.push(transform);
        }
        let words = Self { protocol, transforms };
        let first = |kind: &TransformType| words.of(*kind).find(|transform| transform.id != KeMethod::NONE.0);
        if let Some(additional) = ADDKE.iter().find_map(first)
            && !words.of(TransformType::KE).any(|transform| transform.id != KeMethod::NONE.0)
        {
            return Err(misplaced(&word_of(additional), "is an additional key exchange without a first one"));
        }
        Ok(words)
    }

    fn of(&self, kind: TransformType) -> impl Iterator<Item = Transform> {
        self.transforms.iter().copied().filter(move |transform| transform.kind == kind)
    }

    fn aead(&self) -> bool {
        self.of(TransformType::ENCR).any(|encr| is_aead(EncrId(encr.id)))
    }

    /// AEADs and other encryption are not in one proposal.
    fn kept_apart(&self) -> Result<(), KeywordError> {
        let first = self.of(TransformType::ENCR).next().is_some_and(|encr| is_aead(EncrId(encr.id)));
        match self.of(TransformType::ENCR).find(|encr| is_aead(EncrId(encr.id)) != first) {
            None => Ok(()),
            Some(other) => Err(misplaced(
                &word_of(other),
                "belongs into a proposal of its own: only one of the two kinds of encryption needs an integrity algorithm",
            )),
        }
    }

    fn integrity_fits(&self) -> Result<(), KeywordError> {
        match (self.aead(), self.of(TransformType::INTEG).next()) {
            (true, Some(integ)) => {
                Err(misplaced(&word_of(integ), "has nothing to do: the encryption brings its own integrity"))
            }
            (false, None) => {
                Err(KeywordError::Missing("the encryption needs an integrity algorithm, such as `sha256`"))
            }
            _ => Ok(()),
        }
    }

    fn child(mut self) -> Proposal {
        if self.of(TransformType::ESN).next().is_none() {
            self.transforms.push(transform(TransformType::ESN, EsnId::NO_ESN.0, None));
        }
        self.proposal()
    }

    /// Transforms in the order of their types.
    fn proposal(mut self) -> Proposal {
        self.transforms.sort_by_key(|transform| transform.kind);
        Proposal { number: 1, protocol: self.protocol, spi: Vec::new(), transforms: self.transforms }
    }
}

fn transform(kind: TransformType, id: u16, key_length: Option<u16>) -> Transform {
    Transform { kind, id, key_length, unknown_attribute: false }
}

fn misplaced(word: &str, why: &'static str) -> KeywordError {
    KeywordError::Misplaced { word: word.to_owned(), why }
}

fn implied_prf(integ: IntegId) -> Option<PrfId> {
    INTEGRITY.iter().find(|(_, id, _)| *id == integ).map(|(_, _, prf)| *prf)
}

/// All words of a protocol with their transforms, additional key exchanges aside.
fn vocabulary(protocol: ProtocolId) -> impl Iterator<Item = (&'static str, Transform)> {
    let is_ike = protocol == ProtocolId::IKE;
    let encryption = ENCRYPTION.iter().filter(move |(_, id, _)| match *id {
        EncrId::NULL | EncrId::NULL_AUTH_AES_GMAC => protocol == ProtocolId::ESP,
        _ => protocol != ProtocolId::AH,
    });
    let encryption = encryption.map(|(word, id, bits)| (*word, transform(TransformType::ENCR, id.0, *bits)));
    let prf = PRF
        .iter()
        .filter(move |_| is_ike)
        .map(|(word, id)| (*word, transform(TransformType::PRF, id.0, None)));
    let integrity =
        INTEGRITY.iter().map(|(word, id, _)| (*word, transform(TransformType::INTEG, id.0, None)));
    let exchange = EXCHANGE.iter().map(|(word, id)| (*word, transform(TransformType::KE, id.0, None)));
    let sequence = SEQUENCE.iter().filter(move |_| !is_ike);
    let sequence = sequence.map(|(word, id)| (*word, transform(TransformType::ESN, id.0, None)));
    encryption.chain(prf).chain(integrity).chain(exchange).chain(sequence)
}

fn lookup(protocol: ProtocolId, word: &str) -> Option<Transform> {
    let plain = |word: &str| {
        let word = ALIASES.iter().find(|(alias, _)| *alias == word).map_or(word, |(_, word)| *word);
        vocabulary(protocol).find(|(known, _)| *known == word).map(|(_, transform)| transform)
    };
    let Some((slot, method)) = word.strip_prefix("ke").and_then(|rest| rest.split_once('_')) else {
        return plain(word);
    };
    let (_, kind) = ('1'..).zip(ADDKE).find(|(digit, _)| slot.chars().eq([*digit]))?;
    let transform = plain(method)?;
    (transform.kind == TransformType::KE).then_some(Transform { kind, ..transform })
}

fn known(protocol: ProtocolId) -> String {
    let words: Vec<_> = vocabulary(protocol).map(|(word, _)| word).collect();
    format!("{}, and additional key exchanges as in ke1_mlkem768", words.join(", "))
}

/// The word for a transform; for one that has none, its registry's numbers.
fn word_of(transform: Transform) -> String {
    let slot = (1..).zip(ADDKE).find(|(_, kind)| *kind == transform.kind).map(|(slot, _): (u8, _)| slot);
    let plain =
        Transform { kind: if slot.is_some() { TransformType::KE } else { transform.kind }, ..transform };
    let everything = vocabulary(ProtocolId::IKE).chain(vocabulary(ProtocolId::ESP));
    let word = everything.into_iter().find(|(_, known)| *known == plain).map(|(word, _)| word);
    match (word, slot, transform.key_length) {
        (Some(word), None, _) => word.to_owned(),
        (Some(word), Some(slot), _) => format!("ke{slot}_{word}"),
        (None, _, None) => format!("{}:{}", transform.kind, transform.id),
        (None, _, Some(bits)) => format!("{}:{}_{bits}", transform.kind, transform.id),
    }
}

/// The words that make this proposal, each type in its order. What is implied is left out if it is `noesn`, and written if
/// it is a pseudorandom function. What has no word is written with its numbers and cannot be read back.
impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let only_noesn =
            self.transforms.iter().filter(|transform| transform.kind == TransformType::ESN).count() == 1;
        let implied = |transform: &Transform| {
            // No integrity next to an AEAD may be said or left out (section 3.3).
            (transform.kind == TransformType::ESN && transform.id == EsnId::NO_ESN.0 && only_noesn)
                || (transform.kind == TransformType::INTEG && transform.id == IntegId::NONE.0)
        };
        let mut between = "";
        for transform in self.transforms.iter().filter(|transform| !implied(transform)) {
            write!(f, "{between}{}", word_of(*transform))?;
            between = "-";
        }
        Ok(())
    }
}

/// Several proposals, for a message that says what was offered and what is configured. Cut short, since a peer says how
/// many there are.
#[derive(Clone, Copy, Debug)]
pub struct List<'a>(pub &'a [Proposal]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const PROPOSALS: usize = 8;
        const CHARACTERS: usize = 200;
        let mut between = "";
        for proposal in self.0.iter().take(PROPOSALS) {
            let text = proposal.to_string();
            match text.char_indices().nth(CHARACTERS).and_then(|(end, _)| text.get(..end)) {
                None => write!(f, "{between}{text}")?,
                Some(cut) => write!(f, "{between}{cut}…")?,
            }
            between = ", ";
        }
        if self.0.len() > PROPOSALS { write!(f, " and {} more", self.0.len() - PROPOSALS) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds(proposal: &Proposal, kind: TransformType) -> Vec<u16> {
        proposal
            .transforms
            .iter()
            .filter(|transform| transform.kind == kind)
            .map(|transform| transform.id)
            .collect()
    }

    /// IKE-1: the words of the README, and what they are in the registries (numbers written out here).
    #[test]
    fn ike_1_words() {
        let proposal = ike("aes128gcm16-prfsha256-x25519").unwrap();
        assert_eq!(proposal.protocol, ProtocolId(1));
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(all, [(1, 20, Some(128)), (2, 5, None), (4, 31, None)]);

        let proposal = ike("aes256-sha384-modp2048").unwrap();
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(all, [(1, 12, Some(256)), (2, 6, None), (3, 13, None), (4, 14, None)]);

        let proposal = ike("aes256gcm16-prfsha384-x25519-ke1_mlkem768").unwrap();
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(all, [(1, 20, Some(256)), (2, 6, None), (4, 31, None), (6, 36, None)]);

        let proposal = ike("chacha20poly1305-sha512-curve25519-ecp384-ke7_modp3072-ke7_none").unwrap();
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(
            all,
            [(1, 28, None), (2, 7, None), (4, 31, None), (4, 20, None), (12, 15, None), (12, 0, None)]
        );

        let proposal = esp("aes128gcm16-x25519").unwrap();
        assert_eq!(proposal.protocol, ProtocolId(3));
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(all, [(1, 20, Some(128)), (4, 31, None), (5, 0, None)]);

        let proposal = esp("null-sha1-sha256-esn-noesn-x25519-modpnone").unwrap();
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(
            all,
            [
                (1, 11, None),
                (3, 2, None),
                (3, 12, None),
                (4, 31, None),
                (4, 0, None),
                (5, 1, None),
                (5, 0, None)
            ]
        );

        let proposal = ah("sha512-esn").unwrap();
        assert_eq!(proposal.protocol, ProtocolId(2));
        let all: Vec<_> = proposal.transforms.iter().map(|t| (t.kind.0, t.id, t.key_length)).collect();
        assert_eq!(all, [(3, 14, None), (5, 1, None)]);
    }

    /// Texts that are no proposal, and that the message says why.
    #[test]
    fn wrong_words() {
        for (read, text, message) in [
            (
                ike as fn(&str) -> _,
                "aes129-sha256-x25519",
                "`aes129` is no algorithm of IKE known here; known are aes128gcm16",
            ),
            (ike, "", "`` is no algorithm"),
            (ike, "aes128--sha256-x25519", "`` is no algorithm"),
            (ike, "null-sha256-x25519", "`null` is no algorithm of IKE"),
            (ike, "aes128-sha256-x25519-esn", "`esn` is no algorithm of IKE"),
            (ike, "aes128-sha256-x25519-aes128", "`aes128` stands twice"),
            (ike, "aes128-sha256-x25519-curve25519", "`curve25519` stands twice"),
            (ike, "aes128-aes128gcm16-sha256-x25519", "`aes128gcm16` belongs into a proposal of its own"),
            (ike, "aes128gcm16-sha256-prfsha256-x25519", "`sha256` has nothing to do"),
            (ike, "aes128gcm16-x25519", "no pseudorandom function, such as `prfsha256`"),
            (ike, "sha256-x25519", "no encryption algorithm"),
            (ike, "aes128-sha256", "no key exchange method, such as `x25519`"),
            (ike, "aes128-sha256-none", "no key exchange for IKE"),
            (ike, "aes128-prfsha256-x25519", "needs an integrity algorithm"),
            (
                ike,
                "aes128-sha256-ke1_mlkem768",
                "`ke1_mlkem768` is an additional key exchange without a first one",
            ),
            (ike, "aes128-sha256-x25519-ke8_mlkem768", "`ke8_mlkem768` is no algorithm"),
            (ike, "aes128-sha256-x25519-ke0_mlkem768", "`ke0_mlkem768` is no algorithm"),
            (ike, "aes128-sha256-x25519-ke1_sha256", "`ke1_sha256` is no algorithm"),
            (esp, "aes128", "needs an integrity algorithm"),
            (esp, "aes128gcm16-sha256", "`sha256` has nothing to do"),
            (esp, "aes128gcm16-prfsha256", "`prfsha256` is no algorithm of ESP"),
            (esp, "esn", "no encryption algorithm"),
            (esp, "aes128gcm16-none-ke1_mlkem768", "without a first one"),
            (ah, "aes128-sha256", "`aes128` is no algorithm of AH"),
            (ah, "esn", "no integrity algorithm"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    /// The texts of the default proposals are right, and every algorithm of IKE-4 but ML-KEM is in them.
    #[test]
    fn defaults_are_whole() {
        let ike = default_ike();
        assert_eq!(ike.len(), 2);
        for proposal in &ike {
            assert_eq!(kinds(proposal, TransformType::KE), [31, 19, 20, 14, 15, 16]);
        }
        assert_eq!((default_esp().len(), default_ah().len()), (2, 1));
    }

    /// A peer decides how much it offers, not how much is logged.
    #[test]
    fn list_is_cut_short() {
        let strange = transform(TransformType(200), 60_000, Some(9));
        let proposal = Proposal {
            number: 1,
            protocol: ProtocolId::IKE,
            spi: Vec::new(),
            transforms: vec![strange; 255],
        };
        let text = List(&vec![proposal; 64]).to_string();
        assert!(text.len() < 2000 && text.ends_with("… and 56 more"), "{text}");
        let two = [ike("aes128-sha256-x25519").unwrap(), esp("aes128gcm16").unwrap()];
        assert_eq!(List(&two).to_string(), "aes128-prfsha256-sha256-x25519, aes128gcm16");
    }

    fn some(
        words: Vec<&'static str>,
        count: core::ops::RangeInclusive<usize>,
    ) -> impl Strategy<Value = Vec<&'static str>> {
        prop::sample::subsequence(words, count).prop_shuffle()
    }

    proptest! {
        /// IKE-1: a proposal as text reads as the same proposal.
        #[test]
        fn ike_1_text_round_trip(
            aeads in some(vec!["aes128gcm16", "aes256gcm16", "chacha20poly1305"], 1..=3),
            ciphers in some(vec!["aes128", "aes192", "aes256"], 1..=3),
            macs in some(vec!["sha1", "sha256", "sha384", "sha512"], 1..=4),
            prfs in some(vec!["prfsha1", "prfsha256", "prfsha384", "prfsha512"], 1..=4),
            methods in some(vec!["x25519", "ecp256", "modp4096"], 1..=3),
            additional in some(vec!["ke1_mlkem768", "ke1_none", "ke2_ecp384", "ke7_x25519"], 0..=4),
            esn in some(vec!["esn", "noesn"], 0..=2),
        ) {
            let with_aead = [&aeads[..], &prfs, &methods, &additional].concat().join("-");
            let without = [&methods[..], &ciphers, &additional, &macs].concat().join("-");
            for text in [with_aead, without] {
                let proposal = ike(&text).unwrap();
                prop_assert_eq!(&ike(&proposal.to_string()).unwrap(), &proposal);
            }
            let with_aead = [&aeads[..], &esn].concat().join("-");
            let without = [&methods[..], &esn, &ciphers, &additional, &macs].concat().join("-");
            for text in [with_aead, without] {
                let proposal = esp(&text).unwrap();
                prop_assert_eq!(&esp(&proposal.to_string()).unwrap(), &proposal);
            }
            let proposal = ah(&[&macs[..], &esn, &methods].concat().join("-")).unwrap();
            prop_assert_eq!(&ah(&proposal.to_string()).unwrap(), &proposal);
        }

        /// Any text gives a proposal or an error.
        #[test]
        fn any_text(text in "[ -~]{0,40}", word in prop::sample::subsequence(vec!["aes128", "sha256", "x25519", "ke1_", "none"], 0..=5)) {
            for text in [text, word.join("-")] {
                for read in [ike, esp, ah] {
                    if let Err(error) = read(&text) {
                        prop_assert!(!error.to_string().is_empty());
                    }
                }
            }
        }
    }
}
