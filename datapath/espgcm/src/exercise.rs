//! Every kernel that the processor has, and the portable ones, on arbitrary input against the `aes-gcm` crate: for the
//! fuzz target `espgcm` and for the property tests.

extern crate std;

use std::vec::Vec;

use aes_gcm::aead::consts::U12;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes128Gcm, Aes256Gcm, AesGcm};

use crate::{Aad, HEADER, Kernel, Key, Level, Packet, TAG, Verdict};

type Aes192Gcm = AesGcm<aes_gcm::aes::Aes192, U12>;

/// Takes a key, nonce, AAD, place to forge, number of packets and texts from `bytes` and compares all kernels.
///
/// # Panics
/// When a kernel gives another answer than the `aes-gcm` crate, opens a forgery, or leaves plaintext of one.
pub fn all(bytes: &[u8]) {
    let Some(([kind, forged_packet, place @ .., seed], rest)) = bytes.split_first_chunk::<5>() else {
        return;
    };
    let key_len = [16, 24, 32][usize::from(kind % 3)];
    let aad_len = usize::from(kind / 3 % 17);
    let count = usize::from(kind / 51) + 1;
    let mut material: Vec<u8> = rest.iter().copied().take(key_len + aad_len + 12).collect();
    material.resize(key_len + aad_len + 12, *seed);
    let (key, material) = material.split_at(key_len);
    let (aad, nonce) = material.split_at(aad_len);
    let nonce: [u8; 12] = nonce.try_into().expect("12 bytes");
    let text = rest.get(key_len + aad_len + 12..).unwrap_or_default();
    // Texts of different lengths, two of each: all of it, then without its first third, and so on.
    let texts: Vec<&[u8]> = (0..count).map(|n| text.split_at(text.len() * (n / 2) / 3).1).collect();
    let expected: Vec<Vec<u8>> = texts
        .iter()
        .map(|text| match key_len {
            16 => reference::<Aes128Gcm>(key, nonce, aad, text),
            24 => reference::<Aes192Gcm>(key, nonce, aad, text),
            _ => reference::<Aes256Gcm>(key, nonce, aad, text),
        })
        .collect();
    for level in [Level::Vaes512, Level::Vaes256, Level::Portable2, Level::Portable4] {
        let Ok(kernel) = Kernel::new(level) else { continue };
        let mut expanded = Key::blank();
        kernel.expand(key, &mut expanded).expect("a length of AES");
        let mut buffers: Vec<Vec<u8>> =
            texts.iter().map(|text| [&[0xa5; HEADER], *text, &[0xa5; TAG]].concat()).collect();
        let batch = |buffers: &mut [Vec<u8>], open: bool| {
            let aad = Aad::new(aad).expect("at most a block");
            let packet = |bytes| Packet { key: &expanded, nonce, aad, bytes, verdict: Verdict::Pending };
            let mut batch: Vec<Packet<'_>> = buffers.iter_mut().map(|bytes| packet(&mut bytes[..])).collect();
            if open {
                kernel.open(&mut batch);
            } else {
                kernel.seal(&mut batch);
            }
            batch.iter().map(|packet| packet.verdict).collect::<Vec<_>>()
        };
        assert!(batch(&mut buffers, false).iter().all(|verdict| *verdict == Verdict::Done));
        for (buffer, expected) in buffers.iter().zip(&expected) {
            assert!(buffer[..HEADER] == [0xa5; HEADER] && buffer[HEADER..] == *expected, "{level:?} seals");
        }
        let forged = usize::from(*forged_packet) % count;
        let [high, low] = *place;
        let bits = 8 * (buffers[forged].len() - HEADER);
        let bit = usize::from(u16::from_be_bytes([high, low])) % bits;
        buffers[forged][HEADER + bit / 8] ^= 1 << (bit % 8);
        let verdicts = batch(&mut buffers, true);
        for (at, (verdict, buffer)) in verdicts.iter().zip(&buffers).enumerate() {
            let text = &buffer[HEADER..buffer.len() - TAG];
            if at == forged {
                assert!(
                    *verdict == Verdict::BadTag && text.iter().all(|byte| *byte == 0),
                    "{level:?} forgery"
                );
            } else {
                assert!(*verdict == Verdict::Done && text == texts[at], "{level:?} opens");
            }
        }
    }
}

/// Ciphertext and tag.
fn reference<C: AeadInOut<NonceSize = U12> + KeyInit>(
    key: &[u8],
    nonce: [u8; 12],
    aad: &[u8],
    text: &[u8],
) -> Vec<u8> {
    let cipher = C::new_from_slice(key).expect("a length of AES");
    let mut sealed = text.to_vec();
    let tag = cipher.encrypt_inout_detached(&nonce.into(), aad, sealed.as_mut_slice().into());
    sealed.extend_from_slice(&tag.expect("a short text"));
    sealed
}
