//! Cryptography of IKE. Randomness is an argument (but for ML-KEM's, see [`ke`]), and nothing is chosen or remembered here
//! but a [`Sealer`](sk::Sealer)'s next IV.
//!
//! [`prf`] and [`keys`] derive (RFC 7296 sections 2.13 to 2.18), [`ke`] exchanges keys, [`sk`] seals and opens what is in
//! an Encrypted payload, [`mschap`] is what EAP-MSCHAPv2 is made of. What is secret is wiped, compared in constant time
//! and never formatted.

pub mod digest;
pub mod ke;
pub mod keys;
mod modp;
pub mod mschap;
pub mod prf;
pub mod sk;
pub(crate) mod stack;

#[cfg(test)]
mod vectors;

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of this crate share.

    use crate::Random;

    /// Bytes of hexadecimal digits; white space is skipped.
    pub(crate) fn hex(digits: &str) -> Vec<u8> {
        let digits: Vec<u8> = digits.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let nibble =
            |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok()).unwrap();
        digits.chunks_exact(2).map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])).collect()
    }

    /// Gives out the bytes it was made of, in order, and panics when there are no more.
    pub(crate) struct Fixed(pub Vec<u8>);

    impl Random for Fixed {
        fn fill(&mut self, out: &mut [u8]) {
            let rest = self.0.split_off(out.len());
            out.copy_from_slice(&self.0);
            self.0 = rest;
        }
    }

    /// A small generator (SplitMix64) for what may be anything.
    pub(crate) struct Seeded(pub u64);

    impl Random for Seeded {
        fn fill(&mut self, out: &mut [u8]) {
            for byte in out {
                self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                *byte = mixed.to_be_bytes()[0];
            }
        }
    }
}
