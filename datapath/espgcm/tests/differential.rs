//! DP-3: every kernel against ring, and with any input against the `aes-gcm` crate: all lengths, every AAD of ESP, every key length.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

mod common;

use common::{bytes, expand, kernels, open, packet, seal};
use postern_espgcm::{HEADER, Level, Verdict};
use proptest::prelude::*;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Ciphertext and tag, by ring.
fn ring(key: &[u8], nonce: [u8; 12], aad: &[u8], text: &[u8]) -> Vec<u8> {
    let algorithm = if key.len() == 16 { &AES_128_GCM } else { &AES_256_GCM };
    let key = LessSafeKey::new(UnboundKey::new(algorithm, key).unwrap());
    let mut sealed = text.to_vec();
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut sealed).unwrap();
    sealed
}

/// Seals and opens with every kernel; `expected` is ciphertext and tag.
fn check(key: &[u8], nonce: [u8; 12], aad: &[u8], text: &[u8], expected: &[u8]) {
    for kernel in kernels() {
        let slow = matches!(kernel.level(), Level::Portable2 | Level::Portable4);
        if slow && text.len() > 700 && !text.len().is_multiple_of(397) {
            continue;
        }
        let expanded = expand(kernel, key);
        let mut sealed = packet(text);
        assert_eq!(seal(kernel, &expanded, nonce, aad, &mut sealed), Verdict::Done);
        let name = kernel.level().name();
        assert!(sealed[..HEADER] == [0xa5; HEADER], "{name} {}: header", text.len());
        assert!(sealed[HEADER..] == *expected, "{name} {}: sealed", text.len());
        let mut opened = sealed.clone();
        assert_eq!(open(kernel, &expanded, nonce, aad, &mut opened), Verdict::Done, "{name} {}", text.len());
        assert!(opened[..HEADER] == [0xa5; HEADER], "{name} {}: header, opened", text.len());
        assert!(opened[HEADER..HEADER + text.len()] == *text, "{name} {}: opened", text.len());
        assert!(opened[HEADER + text.len()..] == expected[text.len()..], "{name} {}: tag", text.len());
    }
}

/// All lengths from 0 to 9,000 with AES-128 and AES-256, with and without extended sequence numbers, against ring.
#[test]
fn dp_3_every_length() {
    let longest = if cfg!(miri) { 300 } else { 9000 };
    for len in 0..=longest {
        let text = bytes(len, 0x3c);
        let nonce = [u8::try_from(len % 251).unwrap(); 12];
        let key = bytes(if len % 2 == 0 { 16 } else { 32 }, u8::try_from(len / 36).unwrap());
        let aad = bytes(if len / 2 % 2 == 0 { 8 } else { 12 }, 0x99);
        check(&key, nonce, &aad, &text, &ring(&key, nonce, &aad, &text));
    }
}

/// The counter's carry out of its last byte and out of its last two, in packets longer than any of IP's.
#[test]
#[cfg_attr(miri, ignore = "too long for it")]
fn dp_3_carries_of_the_counter() {
    let key = bytes(16, 1);
    for len in [65_519, 65_535, 1_048_544] {
        let text = bytes(len, 0x3c);
        check(&key, [7; 12], &[1; 8], &text, &ring(&key, [7; 12], &[1; 8], &text));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 300 }))]

    /// What the fuzz target calls: any key, nonce, AAD, batch and forgery, against the `aes-gcm` crate.
    #[test]
    fn dp_3_as_the_crate_aes_gcm(bytes in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..400),
        prop::collection::vec(any::<u8>(), 1000..(if cfg!(miri) { 1001 } else { 9000 })),
    ]) {
        postern_espgcm::exercise::all(&bytes);
    }

    /// A bit changed in nonce or AAD, or of the other end's AAD: the tag is wrong.
    #[test]
    fn dp_3_nonce_and_aad_are_authenticated(len in 0usize..300, place in 0usize..24, bit in 0u32..8) {
        for kernel in kernels() {
            let key = expand(kernel, &bytes(16, 5));
            let mut sealed = packet(&bytes(len, 0x3c));
            let (mut nonce, mut aad) = ([9; 12], [8; 12]);
            assert_eq!(seal(kernel, &key, nonce, &aad, &mut sealed), Verdict::Done);
            assert_eq!(open(kernel, &key, nonce, &aad[..8], &mut sealed.clone()), Verdict::BadTag);
            let at = if place < 12 { &mut nonce[place] } else { &mut aad[place - 12] };
            *at ^= 1 << bit;
            assert_eq!(open(kernel, &key, nonce, &aad, &mut sealed), Verdict::BadTag);
        }
    }
}
