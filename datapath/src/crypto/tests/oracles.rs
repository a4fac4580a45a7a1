//! Packets made by other implementations: RustCrypto's AEAD, HMAC and block ciphers, put together here by hand.
//!
//! AES-192-GCM is served by RustCrypto itself; what is compared there is the packet's construction, and the self test
//! compares the cipher with OpenSSL.

use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use aes_gcm::aead::consts::U12;
use aes_gcm::aead::{AeadInOut, KeyInit as AeadKeyInit};
use chacha20poly1305::ChaCha20Poly1305;
use hmac::{Hmac, Mac};

use super::*;

/// The sealed packet as RFC 4106, 7634, 4543, 3602, 2410, 2404 and 4868 describe it.
fn expected(suite: &Suite, sequence: u64, esn: bool, text: &[u8]) -> Vec<u8> {
    let header = [&[1, 2, 3, 4], &sequence.to_be_bytes()[4..]].concat();
    let high = if esn { sequence.to_be_bytes()[..4].to_vec() } else { Vec::new() };
    let aad = [&header[..4], &high, &header[4..]].concat();
    let key = suite.encryption_key.expose();
    let iv = sequence.to_be_bytes();
    match suite.encryption {
        Encryption::AesGcm16 | Encryption::ChaCha20Poly1305 => {
            let (ciphertext, tag) = aead(suite.encryption, key, iv, &aad, text);
            [&header[..], &iv, &ciphertext, &tag].concat()
        }
        Encryption::NullAuthAesGmac => {
            let (_, tag) = aead(Encryption::AesGcm16, key, iv, &[&aad[..], &iv, text].concat(), &[]);
            [&header[..], &iv, text, &tag].concat()
        }
        Encryption::AesCbc => {
            let iv = block(key, u128::from(sequence).to_be_bytes());
            let mut covered = [&header[..], &iv].concat();
            let mut previous = iv;
            for plain in text.chunks(16) {
                let mixed: Vec<u8> = plain.iter().zip(previous).map(|(a, b)| a ^ b).collect();
                previous = block(key, mixed.try_into().unwrap());
                covered.extend(previous);
            }
            let icv = hmac(suite, &[&covered[..], &high].concat());
            [covered, icv].concat()
        }
        Encryption::Null => {
            let icv = hmac(suite, &[&header[..], text, &high].concat());
            [&header[..], text, &icv].concat()
        }
    }
}

fn aead(encryption: Encryption, key: &[u8], iv: [u8; 8], aad: &[u8], text: &[u8]) -> (Vec<u8>, Vec<u8>) {
    fn run<A: AeadInOut<NonceSize = U12> + AeadKeyInit>(
        key: &[u8],
        nonce: [u8; 12],
        aad: &[u8],
        text: &[u8],
    ) -> (Vec<u8>, Vec<u8>) {
        let mut text = text.to_vec();
        let cipher = A::new_from_slice(key).unwrap();
        let tag = cipher.encrypt_inout_detached(&nonce.into(), aad, text.as_mut_slice().into()).unwrap();
        (text, tag.to_vec())
    }
    let (key, salt) = key.split_at(key.len() - 4);
    let nonce = [salt, &iv].concat().try_into().unwrap();
    match (encryption, key.len()) {
        (Encryption::ChaCha20Poly1305, _) => run::<ChaCha20Poly1305>(key, nonce, aad, text),
        (_, 16) => run::<aes_gcm::Aes128Gcm>(key, nonce, aad, text),
        (_, 24) => run::<aes_gcm::AesGcm<aes::Aes192, U12>>(key, nonce, aad, text),
        _ => run::<aes_gcm::Aes256Gcm>(key, nonce, aad, text),
    }
}

fn block(key: &[u8], block: [u8; 16]) -> [u8; 16] {
    let mut block = Array(block);
    match key.len() {
        16 => aes::Aes128::new_from_slice(key).unwrap().encrypt_block(&mut block),
        24 => aes::Aes192::new_from_slice(key).unwrap().encrypt_block(&mut block),
        _ => aes::Aes256::new_from_slice(key).unwrap().encrypt_block(&mut block),
    }
    block.0
}

fn hmac(suite: &Suite, covered: &[u8]) -> Vec<u8> {
    fn run<M: Mac + KeyInit>(key: &[u8], covered: &[u8], len: usize) -> Vec<u8> {
        let mut mac = <M as KeyInit>::new_from_slice(key).unwrap();
        mac.update(covered);
        mac.finalize().into_bytes()[..len].to_vec()
    }
    let key = suite.integrity_key.expose();
    match suite.integrity {
        Integrity::HmacSha1_96 => run::<Hmac<sha1::Sha1>>(key, covered, 12),
        Integrity::HmacSha2_256_128 => run::<Hmac<sha2::Sha256>>(key, covered, 16),
        Integrity::HmacSha2_384_192 => run::<Hmac<sha2::Sha384>>(key, covered, 24),
        Integrity::HmacSha2_512_256 => run::<Hmac<sha2::Sha512>>(key, covered, 32),
        Integrity::None | Integrity::AesGmac => panic!("no HMAC"),
    }
}

/// DP-3: byte for byte what others make, at all lengths that a packet of up to 2 KiB can have.
#[test]
fn dp_3_packets_equal_those_of_rustcrypto() {
    for (name, suite) in suites() {
        let key = EspKey::new(&suite).unwrap();
        let block = usize::from(key.layout().block);
        let mut packets = 0;
        for len in (block..=2048).step_by(block) {
            // Every length up to 320 bytes, then every 13th.
            if len > 320 && len / block % 13 != 0 {
                continue;
            }
            let plain = bytes(len);
            for (sequence, esn) in
                [(1, false), (0xffff_ffff, false), (2, true), (0x0102_0304_0506_0708, true)]
            {
                let (outcome, packet) = seal(&key, sequence, esn, &plain);
                assert_eq!(outcome, SealOutcome::Sealed);
                assert_eq!(
                    packet,
                    expected(&suite, sequence, esn, &plain),
                    "{name} {len} {sequence:#x} {esn}"
                );
                let (outcome, packet) = open(&key, sequence, esn, &packet);
                assert_eq!(outcome, Outcome::Opened, "{name} {len} {sequence:#x} {esn}");
                assert_eq!(text(&key, &packet), plain, "{name} {len} {sequence:#x} {esn}");
                packets += 1;
            }
        }
        assert!(packets >= 100, "{name}: {packets}");
    }
}

/// DP-3: the ICV of AH over a packet with its ICV field at any place.
#[test]
fn dp_3_ah_equals_rustcrypto() {
    let keyed = |integrity, len: u8| Suite {
        encryption: Encryption::Null,
        encryption_key: Secret::empty(),
        integrity,
        integrity_key: Secret::new((1..=len).collect::<Vec<u8>>()),
    };
    for suite in [
        keyed(Integrity::HmacSha1_96, 20),
        keyed(Integrity::HmacSha2_256_128, 32),
        keyed(Integrity::HmacSha2_384_192, 48),
        keyed(Integrity::HmacSha2_512_256, 64),
        keyed(Integrity::AesGmac, 20),
        keyed(Integrity::AesGmac, 28),
        keyed(Integrity::AesGmac, 36),
    ] {
        let key = AhKey::new(&suite).unwrap();
        let icv_len = usize::from(key.icv_len());
        let sequence = 0x0102_0304_0506_0708_u64;
        for (len, at) in [(64, 0), (64, 64 - icv_len), (100, 32), (1500, 52)] {
            let name = format!("{:?} {len} {at}", suite.integrity);
            let field = at..at + icv_len;
            // Expected over the packet with the field zero, except for the IV of GMAC.
            let mut covered = bytes(len);
            covered[field.clone()].fill(0);
            let icv = if suite.integrity == Integrity::AesGmac {
                let iv = sequence.to_be_bytes();
                covered[at..at + 8].copy_from_slice(&iv);
                let (_, tag) = aead(Encryption::AesGcm16, suite.integrity_key.expose(), iv, &covered, &[]);
                [&iv[..], &tag].concat()
            } else {
                hmac(&suite, &covered)
            };
            let mut packet = bytes(len);
            packet[field.clone()].fill(0xa5);
            key.sign(&mut engine(), reserve(sequence), &mut packet, at).unwrap();
            assert_eq!(packet[field.clone()], icv, "{name}");
            let signed = packet.clone();
            assert!(key.verify(&mut engine(), &mut packet, at), "{name}");
            assert_eq!(packet, covered, "{name}: what was covered stays");
            for flipped in 0..len {
                let mut forged = signed.clone();
                forged[flipped] ^= 0x10;
                assert!(!key.verify(&mut engine(), &mut forged, at), "{name}: byte {flipped}");
            }
            assert!(!key.verify(&mut engine(), &mut signed[..len - 1].to_vec(), at), "{name}: cut");
        }
        for (len, at) in [(icv_len - 1, 0), (64, 65 - icv_len), (64, 64), (64, usize::MAX)] {
            assert!(key.sign(&mut engine(), reserve(1), &mut bytes(len), at).is_none());
            assert!(!key.verify(&mut engine(), &mut bytes(len), at));
        }
    }
}
