//! Hashes over several parts, without joining them first.

use aws_lc_rs::digest::{Algorithm, Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// SHA-1: NAT detection (RFC 7296 section 2.23), certification authorities (section 3.7), MSCHAPv2. Nothing here rests on
/// its collision resistance.
pub fn sha1(parts: &[&[u8]]) -> [u8; 20] {
    digest(&SHA1_FOR_LEGACY_USE_ONLY, parts)
}

/// SHA-256.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    digest(&SHA256, parts)
}

/// `N` is the algorithm's length.
fn digest<const N: usize>(algorithm: &'static Algorithm, parts: &[&[u8]]) -> [u8; N] {
    let mut context = Context::new(algorithm);
    for part in parts {
        context.update(part);
    }
    let mut out = [0; N];
    out.copy_from_slice(context.finish().as_ref());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::testing::hex;

    /// FIPS 180-4's example "abc".
    #[test]
    fn abc_in_two_parts() {
        assert_eq!(sha1(&[b"a", b"bc"]).as_slice(), hex("a9993e364706816aba3e25717850c26c9cd0d89d"));
        assert_eq!(
            sha256(&[b"ab", b"c"]).as_slice(),
            hex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        );
    }
}
