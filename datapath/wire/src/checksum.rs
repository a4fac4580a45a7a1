//! The Internet checksum (RFC 1071): sums, pseudo-headers and incremental update (RFC 1624).
//!
//! A sum is a `u64` that is not yet folded; sums of pieces are added with `+`. It holds without overflow for any
//! slice below 2^33 bytes. A piece of odd length counts as padded with a zero byte (RFC 1071 section 4.1), so that
//! only the last of pieces added with `+` may be odd; [`sum_slices`] has no such limit.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::ids::Protocol;

/// Sum of `bytes` as 16-bit big-endian words, an odd last byte padded with zero.
#[inline]
pub fn sum(bytes: &[u8]) -> u64 {
    // RFC 1071 section 2 (C): the sum may be taken in wider words, as 2^16 is 1 modulo 2^16 - 1.
    let (words, tail) = bytes.as_chunks::<4>();
    let total = words.iter().fold(0_u64, |total, word| total + u64::from(u32::from_be_bytes(*word)));
    let tail = match *tail {
        [a] => [a, 0, 0, 0],
        [a, b] => [a, b, 0, 0],
        [a, b, c] => [a, b, c, 0],
        _ => [0; 4],
    };
    total + u64::from(u32::from_be_bytes(tail))
}

/// Whether the checksum of an IPv4 header without options is right.
#[inline]
pub fn is_right(header: &[u8; 20]) -> bool {
    // RFC 1071 section 2 (B): in whatever order the bytes of all words are, a right sum is all ones. Folding keeps what is left
    // of a sum divided by 2^16 - 1, and makes zero of zero alone.
    let (words, _) = header.as_chunks::<4>();
    let sum: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    sum != 0 && sum.is_multiple_of(0xffff)
}

/// [`fold`] of a sum of at most 2^16 words.
#[inline]
pub const fn fold_few(sum: u32) -> u16 {
    // At most 2^32 - 2^16, then 2^17 - 3 and 2^16 - 1.
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let [.., high, low] = sum.to_be_bytes();
    u16::from_be_bytes([high, low])
}

/// Sum of the concatenation of `pieces`, each of any length.
pub fn sum_slices(pieces: &[&[u8]]) -> u64 {
    let mut total = 0;
    let mut odd = false;
    for piece in pieces {
        let part = sum(piece);
        // RFC 1071 section 2 (B): a piece that starts at an odd offset adds its sum with the bytes swapped.
        total += if odd { u64::from(fold(part).swap_bytes()) } else { part };
        odd ^= piece.len() % 2 == 1;
    }
    total
}

/// Folds a sum into 16 bits with end-around carry. Zero only if the sum was zero.
#[inline]
pub const fn fold(sum: u64) -> u16 {
    // At most 2^33 - 2, then 2^17 + 2^16 - 2, 2^16 + 1 and 2^16 - 1: no loop, whose length sums of packets vary.
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let [.., high, low] = sum.to_be_bytes();
    u16::from_be_bytes([high, low])
}

/// The checksum of a sum: its folded complement (RFC 1071 section 1).
#[inline]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// Sum of the IPv4 pseudo-header (RFC 768, RFC 9293 section 3.1); `len` is the length of the upper layer in bytes.
pub fn pseudo_v4(source: Ipv4Addr, destination: Ipv4Addr, protocol: Protocol, len: u16) -> u64 {
    u64::from(source.to_bits()) + u64::from(destination.to_bits()) + u64::from(protocol.0) + u64::from(len)
}

/// Sum of the IPv6 pseudo-header (RFC 8200 section 8.1); `len` is the length of the upper layer in bytes and
/// `destination` the final one.
pub fn pseudo_v6(source: Ipv6Addr, destination: Ipv6Addr, protocol: Protocol, len: u32) -> u64 {
    sum(&source.octets()) + sum(&destination.octets()) + u64::from(protocol.0) + u64::from(len)
}

/// The checksum after one 16-bit word it covers changed from `old` to `new`.
///
/// RFC 1624 section 3, equation 3: HC' = ~(~HC + ~m + m'). A right checksum stays right, and a wrong one stays wrong.
pub const fn update_u16(check: u16, old: u16, new: u16) -> u16 {
    finish(widen(!check) + widen(!old) + widen(new))
}

/// As [`update_u16`] for a 32-bit value at an even offset.
pub const fn update_u32(check: u16, old: u32, new: u32) -> u16 {
    let [old_high, old_low] = words(!old);
    let [new_high, new_low] = words(new);
    finish(widen(!check) + widen(old_high) + widen(old_low) + widen(new_high) + widen(new_low))
}

/// The two 16-bit words of a value.
const fn words(value: u32) -> [u16; 2] {
    let [a, b, c, d] = value.to_be_bytes();
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
}

/// `u64::from` in a `const fn`.
const fn widen(word: u16) -> u64 {
    let [high, low] = word.to_be_bytes();
    u64::from_be_bytes([0, 0, 0, 0, 0, 0, high, low])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071 section 3, the numerical example: the sum is 2ddf0, folded ddf2.
    #[test]
    fn example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)), 0xddf2);
        assert_eq!(finish(sum(&bytes)), 0x220d);
    }

    /// RFC 1624 section 4, the example that RFC 1141 got wrong: HC = dd2f, m = 5555, m' = 3285 gives 0000.
    #[test]
    fn example_of_rfc_1624() {
        assert_eq!(update_u16(0xdd2f, 0x5555, 0x3285), 0x0000);
        assert_eq!(update_u32(0xdd2f, 0x5555_0000, 0x3285_0000), 0x0000);
        assert_eq!(update_u32(0xdd2f, 0x1234_5555, 0x1234_3285), 0x0000);
    }

    /// RFC 1071 section 2 (B): however the bytes are read, the same headers are right.
    #[test]
    fn right_headers_are_told_alike() {
        let mut header = [0_u8; 20];
        let mut right = 0;
        for step in 0..20_000_u32 {
            for (place, byte) in (0..20).zip(step.wrapping_mul(0x9e37_79b9).to_be_bytes().into_iter().cycle())
            {
                header[place] = header[place].wrapping_mul(5).wrapping_add(byte);
            }
            if step % 2 == 0 {
                header[10..12].fill(0);
                let check = finish(sum(&header));
                header[10..12].copy_from_slice(&check.to_be_bytes());
            }
            let told = finish(sum(&header)) == 0;
            assert_eq!(is_right(&header), told, "{header:02x?}");
            right += u32::from(told);
        }
        assert!((10_000..11_000).contains(&right), "{right}");
    }

    /// Few words fold as any number of them does.
    #[test]
    fn few_words_fold_alike() {
        let all = [0, 1, 0xfffe, 0xffff, 0x1_0000, 0x1_fffe, 0x1_ffff, 0xfffe_ffff, 0xffff_0000];
        let many = (0..100_000_u32).map(|step| step.wrapping_mul(0x9e37_79b9).min(0xffff_0000));
        for sum in all.into_iter().chain(many) {
            assert_eq!(fold_few(sum), fold(sum.into()), "{sum:x}");
        }
    }

    #[test]
    fn odd_pieces_join_as_their_bytes_do() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        for a in 0..bytes.len() {
            for b in a..bytes.len() {
                let pieces = [&bytes[..a], &bytes[a..b], &bytes[b..]];
                assert_eq!(fold(sum_slices(&pieces)), fold(sum(&bytes)), "{a} {b}");
            }
        }
    }

    #[test]
    fn zero_folds_from_zero_only() {
        assert_eq!((fold(0), fold(0xffff), fold(0x1_fffe), fold(u64::MAX)), (0, 0xffff, 0xffff, 0xffff));
    }
}
