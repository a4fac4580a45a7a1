//! AES in CBC mode on whole blocks (RFC 3602).
//!
//! Encryption and decryption need different schedules of 256 bytes, and a key does not know its direction. So an SA
//! keeps the key's bytes and expands them once for each run of packets.

use aes::cipher::{Array, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt};
use aes::cipher::{InnerIvInit, KeyInit};
use aes::{Aes128Dec, Aes128Enc, Aes192Dec, Aes192Enc, Aes256Dec, Aes256Enc, Block};
use arrayvec::ArrayVec;
use zeroize::Zeroizing;

/// Length of a block and of the IV.
pub(super) const BLOCK: usize = 16;

/// Texts that are encrypted at once: enough to keep the processor busy, and no more than a set of the first cache has lines,
/// because packets begin at the same place of their frames.
pub(super) const TOGETHER: usize = 8;

/// A key, by its length. It stays where it was written first: a key that is moved leaves a copy behind.
pub(super) enum CbcKey {
    Aes128(Box<Zeroizing<[u8; 16]>>),
    Aes192(Box<Zeroizing<[u8; 24]>>),
    Aes256(Box<Zeroizing<[u8; 32]>>),
}

/// A key ready to encrypt.
pub(super) enum Encryptor {
    Aes128(Aes128Enc),
    Aes192(Aes192Enc),
    Aes256(Aes256Enc),
}

/// A key ready to decrypt.
pub(super) enum Decryptor {
    Aes128(Aes128Dec),
    Aes192(Aes192Dec),
    Aes256(Aes256Dec),
}

impl CbcKey {
    /// `None` when AES has no such key length.
    pub(super) fn new(key: &[u8]) -> Option<Self> {
        #[expect(clippy::unnecessary_box_returns, reason = "not to be moved")]
        fn keep<const N: usize>(key: &[u8]) -> Box<Zeroizing<[u8; N]>> {
            let mut kept = Box::new(Zeroizing::new([0; N]));
            kept.copy_from_slice(key);
            kept
        }
        match key.len() {
            16 => Some(Self::Aes128(keep(key))),
            24 => Some(Self::Aes192(keep(key))),
            32 => Some(Self::Aes256(keep(key))),
            _ => None,
        }
    }

    /// Expands the key to encrypt a run of packets.
    pub(super) fn encryptor(&self) -> Encryptor {
        match self {
            Self::Aes128(key) => Encryptor::Aes128(Aes128Enc::new((&***key).into())),
            Self::Aes192(key) => Encryptor::Aes192(Aes192Enc::new((&***key).into())),
            Self::Aes256(key) => Encryptor::Aes256(Aes256Enc::new((&***key).into())),
        }
    }

    /// Expands the key to decrypt a run of packets.
    pub(super) fn decryptor(&self) -> Decryptor {
        match self {
            Self::Aes128(key) => Decryptor::Aes128(Aes128Dec::new((&***key).into())),
            Self::Aes192(key) => Decryptor::Aes192(Aes192Dec::new((&***key).into())),
            Self::Aes256(key) => Decryptor::Aes256(Aes256Dec::new((&***key).into())),
        }
    }
}

impl Encryptor {
    /// The IV for a sequence number. RFC 3602 section 3: the IV must be unpredictable, and a counter is none of that;
    /// NIST SP 800-38A appendix C, first method: a nonce encrypted under the key of the data. Unpredictable without
    /// the key, and different for each number.
    pub(super) fn iv(&self, sequence: u64) -> [u8; BLOCK] {
        let mut block = Array(u128::from(sequence).to_be_bytes());
        match self {
            Self::Aes128(key) => key.encrypt_block(&mut block),
            Self::Aes192(key) => key.encrypt_block(&mut block),
            Self::Aes256(key) => key.encrypt_block(&mut block),
        }
        block.0
    }

    /// Encrypts the whole blocks of `text` in place.
    pub(super) fn encrypt(&self, iv: [u8; BLOCK], text: &mut [u8]) {
        let iv = Array(iv);
        let (blocks, _) = Array::slice_as_chunks_mut(text);
        match self {
            Self::Aes128(key) => cbc::Encryptor::inner_iv_init(key, &iv).encrypt_blocks(blocks),
            Self::Aes192(key) => cbc::Encryptor::inner_iv_init(key, &iv).encrypt_blocks(blocks),
            Self::Aes256(key) => cbc::Encryptor::inner_iv_init(key, &iv).encrypt_blocks(blocks),
        }
    }
}

impl Encryptor {
    /// Encrypts the whole blocks of several texts in place, each with its IV. In CBC a block waits for the one before it, so
    /// that a single text leaves the processor idle most of the time: here a block of each text goes in at a time.
    pub(super) fn encrypt_together(&self, texts: &mut ArrayVec<([u8; BLOCK], &mut [u8]), TOGETHER>) {
        let mut last: ArrayVec<Block, TOGETHER> = texts.iter().map(|(iv, _)| Array(*iv)).collect();
        let mut texts: ArrayVec<&mut [Block], TOGETHER> =
            texts.iter_mut().map(|(_, text)| Array::slice_as_chunks_mut(text).0).collect();
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        for at in 0..longest {
            for (last, text) in last.iter_mut().zip(&texts) {
                if let Some(block) = text.get(at) {
                    *last = Array((u128::from_ne_bytes(last.0) ^ u128::from_ne_bytes(block.0)).to_ne_bytes());
                }
            }
            // Where a text has ended, what comes out is for nobody.
            match self {
                Self::Aes128(key) => key.encrypt_blocks(&mut last),
                Self::Aes192(key) => key.encrypt_blocks(&mut last),
                Self::Aes256(key) => key.encrypt_blocks(&mut last),
            }
            for (last, text) in last.iter().zip(&mut texts) {
                if let Some(block) = text.get_mut(at) {
                    *block = *last;
                }
            }
        }
    }
}

impl Decryptor {
    /// Decrypts the whole blocks of `text` in place.
    pub(super) fn decrypt(&self, iv: [u8; BLOCK], text: &mut [u8]) {
        let iv = Array(iv);
        let (blocks, _) = Array::slice_as_chunks_mut(text);
        match self {
            Self::Aes128(key) => cbc::Decryptor::inner_iv_init(key, &iv).decrypt_blocks(blocks),
            Self::Aes192(key) => cbc::Decryptor::inner_iv_init(key, &iv).decrypt_blocks(blocks),
            Self::Aes256(key) => cbc::Decryptor::inner_iv_init(key, &iv).decrypt_blocks(blocks),
        }
    }
}
