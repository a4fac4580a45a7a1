//! The words for algorithms, as strongSwan writes them, and the keys they take.

use postern_contract::sa::{Encryption, Integrity, Suite};
use postern_contract::secret::Secret;

use super::diagnostic::nearest;

/// An encryption transform with the key length its keyword names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cipher {
    /// The keyword.
    pub keyword: &'static str,
    /// The transform.
    pub encryption: Encryption,
    /// Bytes of key proper.
    pub key: usize,
    /// Bytes of salt that follow it.
    pub salt: usize,
}

/// An integrity transform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac {
    /// The keyword.
    pub keyword: &'static str,
    /// The transform.
    pub integrity: Integrity,
    /// Bytes of key proper.
    pub key: usize,
    /// Bytes of salt that follow it.
    pub salt: usize,
}

/// What an ESP SA does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EspSuite {
    /// Encryption.
    pub cipher: Cipher,
    /// Integrity, where the cipher is no AEAD.
    pub mac: Option<Mac>,
}

const fn cipher(keyword: &'static str, encryption: Encryption, key: usize, salt: usize) -> Cipher {
    Cipher { keyword, encryption, key, salt }
}

const fn mac(keyword: &'static str, integrity: Integrity, key: usize, salt: usize) -> Mac {
    Mac { keyword, integrity, key, salt }
}

/// Ciphers that bring their own integrity. The first word of each transform is the one that is shown.
const AEADS: &[Cipher] = &[
    cipher("aes128gcm16", Encryption::AesGcm16, 16, 4),
    cipher("aes192gcm16", Encryption::AesGcm16, 24, 4),
    cipher("aes256gcm16", Encryption::AesGcm16, 32, 4),
    cipher("chacha20poly1305", Encryption::ChaCha20Poly1305, 32, 4),
    cipher("aes128gmac", Encryption::NullAuthAesGmac, 16, 4),
    cipher("aes192gmac", Encryption::NullAuthAesGmac, 24, 4),
    cipher("aes256gmac", Encryption::NullAuthAesGmac, 32, 4),
];

/// Ciphers that need an integrity transform.
const CIPHERS: &[Cipher] = &[
    cipher("aes128", Encryption::AesCbc, 16, 0),
    cipher("aes192", Encryption::AesCbc, 24, 0),
    cipher("aes256", Encryption::AesCbc, 32, 0),
    cipher("null", Encryption::Null, 0, 0),
];

/// Integrity transforms of ESP and AH.
const MACS: &[Mac] = &[
    mac("sha256", Integrity::HmacSha2_256_128, 32, 0),
    mac("sha384", Integrity::HmacSha2_384_192, 48, 0),
    mac("sha512", Integrity::HmacSha2_512_256, 64, 0),
    mac("sha1", Integrity::HmacSha1_96, 20, 0),
];

/// Integrity transforms of AH alone.
const AH_MACS: &[Mac] = &[
    mac("aes128gmac", Integrity::AesGmac, 16, 4),
    mac("aes192gmac", Integrity::AesGmac, 24, 4),
    mac("aes256gmac", Integrity::AesGmac, 32, 4),
];

impl EspSuite {
    /// Reads a proposal such as `aes128gcm16` or `aes256-sha256`; the error says what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(aead) = AEADS.iter().find(|aead| aead.keyword == text) {
            return Ok(Self { cipher: *aead, mac: None });
        }
        let (first, second) = text.split_once('-').unwrap_or((text, ""));
        if AEADS.iter().any(|aead| aead.keyword == first) {
            return Err(format!("`{first}` brings its own integrity: nothing may follow it"));
        }
        match (CIPHERS.iter().find(|c| c.keyword == first), MACS.iter().find(|m| m.keyword == second)) {
            (Some(cipher), Some(mac)) => Ok(Self { cipher: *cipher, mac: Some(*mac) }),
            (Some(cipher), None) => Err(format!(
                "`{0}` needs an integrity algorithm: `{0}-` and one of {1} (no group: the keys are static)",
                cipher.keyword,
                words(MACS.iter().map(|m| m.keyword))
            )),
            (None, _) => {
                let all = || AEADS.iter().chain(CIPHERS).map(|cipher| cipher.keyword);
                let hint = nearest(first, all()).map(|word| format!("did you mean `{word}`? "));
                Err(format!(
                    "{}allowed: {}, or {} with -{}",
                    hint.unwrap_or_default(),
                    words(AEADS.iter().map(|c| c.keyword)),
                    words(CIPHERS.iter().map(|c| c.keyword)),
                    MACS.iter().map(|m| m.keyword).collect::<Vec<_>>().join(", -")
                ))
            }
        }
    }

    /// The proposal as it is written.
    pub fn keyword(&self) -> String {
        match self.mac {
            Some(mac) => format!("{}-{}", self.cipher.keyword, mac.keyword),
            None => self.cipher.keyword.to_owned(),
        }
    }

    /// The suite with its keys, whose lengths the caller has checked.
    pub fn with_keys(&self, encryption_key: Secret, integrity_key: Secret) -> Suite {
        let integrity = self.mac.map_or(Integrity::None, |mac| mac.integrity);
        Suite { encryption: self.cipher.encryption, encryption_key, integrity, integrity_key }
    }
}

impl Mac {
    /// Reads the algorithm of an AH SA; the error says what is allowed.
    pub fn parse_ah(text: &str) -> Result<Self, String> {
        let all = || MACS.iter().chain(AH_MACS);
        all().find(|mac| mac.keyword == text).copied().ok_or_else(|| {
            let hint =
                nearest(text, all().map(|mac| mac.keyword)).map(|word| format!("did you mean `{word}`? "));
            format!("{}allowed: {}", hint.unwrap_or_default(), words(all().map(|mac| mac.keyword)))
        })
    }

    /// The AH suite with its key, whose length the caller has checked.
    pub fn with_key(&self, key: Secret) -> Suite {
        Suite {
            encryption: Encryption::Null,
            encryption_key: Secret::empty(),
            integrity: self.integrity,
            integrity_key: key,
        }
    }
}

/// What a key of `key` bytes and `salt` bytes behind it looks like, for people.
pub(super) fn describe_key(keyword: &str, key: usize, salt: usize) -> String {
    let digits = 2 * (key + salt);
    match salt {
        0 => format!("`{keyword}` takes {key} bytes, {digits} hexadecimal digits"),
        _ => format!(
            "`{keyword}` takes {} bytes, {digits} hexadecimal digits: {key} of key followed by {salt} of salt",
            key + salt
        ),
    }
}

fn words<'k>(all: impl Iterator<Item = &'k str>) -> String {
    all.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use postern_contract::sa::IpsecProtocol;

    use super::*;

    fn key(len: usize) -> Secret {
        Secret::new(vec![1; len])
    }

    /// DP-3: every keyword gives a suite that the contract accepts with the lengths that the keyword names.
    #[test]
    fn dp_3_keywords_fit_the_contract() {
        for aead in AEADS {
            let suite = EspSuite::parse(aead.keyword).unwrap();
            assert_eq!(suite.keyword(), aead.keyword);
            let keys = suite.with_keys(key(aead.key + aead.salt), Secret::empty());
            assert_eq!(keys.validate(IpsecProtocol::Esp), Ok(()), "{}", aead.keyword);
        }
        for cipher in CIPHERS {
            for mac in MACS {
                let text = format!("{}-{}", cipher.keyword, mac.keyword);
                let suite = EspSuite::parse(&text).unwrap();
                assert_eq!(suite.keyword(), text);
                let keys = suite.with_keys(key(cipher.key), key(mac.key));
                assert_eq!(keys.validate(IpsecProtocol::Esp), Ok(()), "{text}");
            }
        }
        for mac in MACS.iter().chain(AH_MACS) {
            let suite = Mac::parse_ah(mac.keyword).unwrap().with_key(key(mac.key + mac.salt));
            assert_eq!(suite.validate(IpsecProtocol::Ah), Ok(()), "{}", mac.keyword);
        }
    }

    #[test]
    fn wrong_words_are_answered_with_the_right_ones() {
        for (text, expected) in [
            ("aes128gcm", "did you mean `aes128gcm16`?"),
            ("aes128", "needs an integrity algorithm"),
            ("aes128-sha256-modp2048", "no group"),
            ("aes128gcm16-sha256", "brings its own integrity"),
            ("3des-sha1", "allowed: aes128gcm16"),
            ("", "allowed"),
        ] {
            let error = EspSuite::parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(Mac::parse_ah("sha255").unwrap_err().contains("did you mean `sha256`?"));
    }
}
