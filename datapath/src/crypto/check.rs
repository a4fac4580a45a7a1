//! Short values that name keying material without showing it.

use postern_contract::sa::Suite;
use ring::digest::{Context, SHA256};

/// A value that two operators compare to see whether both ends have the same algorithms and keys.
pub fn key_check(suite: &Suite) -> [u8; 8] {
    suite.key_check()
}

/// The name of keying material in the ledger of reserved sequence numbers (DESIGN decision 8).
///
/// 128 bits of SHA-256 over the key bytes alone, whatever transform and protocol they serve: AES-GCM and AES-GMAC
/// under one key and salt share the nonces, so they have to share the numbers too.
pub fn fingerprint(suite: &Suite) -> [u8; 16] {
    let Suite { encryption: _, encryption_key, integrity: _, integrity_key } = suite;
    digest(&[b"postern sequence ledger 1\0", encryption_key.expose(), integrity_key.expose()])
}

/// The name of keying material in the ledger, for the top of an anti-replay window.
///
/// Apart from [`fingerprint`]: whoever gives both directions of a tunnel the same keys has one number of each kind.
pub fn window_name(suite: &Suite) -> [u8; 16] {
    let Suite { encryption: _, encryption_key, integrity: _, integrity_key } = suite;
    digest(&[b"postern replay ledger 1\0", encryption_key.expose(), integrity_key.expose()])
}

fn digest<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let mut cut = [0; N];
    for (to, from) in cut.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    cut
}

#[cfg(test)]
mod tests {
    use postern_contract::sa::{Encryption, Integrity};

    use super::*;
    use postern_contract::secret::Secret;

    fn suite(encryption: Encryption, key: &[u8], integrity: Integrity, integrity_key: &[u8]) -> Suite {
        Suite {
            encryption,
            encryption_key: Secret::new(key),
            integrity,
            integrity_key: Secret::new(integrity_key),
        }
    }

    /// Both values are shown to operators or kept on disk, so they must not change. Computed with Python's `hashlib`.
    #[test]
    fn values_are_stable() {
        let gcm = suite(Encryption::AesGcm16, &[7; 20], Integrity::None, &[]);
        assert_eq!(key_check(&gcm), [0xcf, 0x3d, 0x99, 0x0f, 0xac, 0xc1, 0xd7, 0xf3]);
        assert_eq!(
            fingerprint(&gcm),
            [0xd7, 0x19, 0xf0, 0xae, 0xbf, 0x9b, 0x71, 0x73, 0xf2, 0x0b, 0x1b, 0x24, 0x6a, 0x52, 0x10, 0xdd]
        );
    }

    #[test]
    fn key_check_tells_suites_apart() {
        let gcm = suite(Encryption::AesGcm16, &[7; 20], Integrity::None, &[]);
        let gmac = suite(Encryption::NullAuthAesGmac, &[7; 20], Integrity::None, &[]);
        let other = suite(Encryption::AesGcm16, &[8; 20], Integrity::None, &[]);
        assert_eq!(key_check(&gcm), key_check(&suite(Encryption::AesGcm16, &[7; 20], Integrity::None, &[])));
        assert_ne!(key_check(&gcm), key_check(&gmac));
        assert_ne!(key_check(&gcm), key_check(&other));
        // Where the encryption key ends is part of the value.
        let long = suite(Encryption::AesCbc, &[7; 24], Integrity::HmacSha2_256_128, &[7; 32]);
        let short = suite(Encryption::AesCbc, &[7; 16], Integrity::HmacSha2_256_128, &[7; 40]);
        assert_ne!(key_check(&long), key_check(&short));
    }

    /// DP-4: one key under two transforms is one ledger entry.
    #[test]
    fn fingerprint_is_of_the_key_alone() {
        let gcm = suite(Encryption::AesGcm16, &[7; 20], Integrity::None, &[]);
        let gmac = suite(Encryption::NullAuthAesGmac, &[7; 20], Integrity::None, &[]);
        let ah = suite(Encryption::Null, &[], Integrity::AesGmac, &[7; 20]);
        assert_eq!(fingerprint(&gcm), fingerprint(&gmac));
        assert_eq!(fingerprint(&gcm), fingerprint(&ah));
        let salt = suite(Encryption::AesGcm16, &[[7; 19].as_slice(), &[8]].concat(), Integrity::None, &[]);
        assert_ne!(fingerprint(&gcm), fingerprint(&salt), "another salt has other nonces");
        assert_ne!(fingerprint(&gcm), window_name(&gcm));
        assert_ne!(fingerprint(&gcm)[..8], key_check(&gcm), "the two values do not give each other away");
    }
}
