//! TCP (RFC 9293), as far as the maximum segment size option needs it (DP-5).

use crate::{bytes, checksum};

const MIN_LEN: usize = 20;
const SYN: u8 = 0x02;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// The maximum segment size that a SYN or SYN-ACK announces, in bytes; `None` for other segments and without option.
pub fn mss(segment: &[u8]) -> Option<u16> {
    bytes::u16_at(segment, mss_at(segment)?)
}

/// Lowers the announced maximum segment size of a SYN to `max` bytes and updates the checksum; says whether it did.
///
/// `segment` starts at the TCP header. The value never rises. The TCP checksum is updated incrementally
/// (RFC 1624), so the pseudo-header is not needed.
pub fn clamp_mss(segment: &mut [u8], max: u16) -> bool {
    clamp(segment, max).is_some()
}

fn clamp(segment: &mut [u8], max: u16) -> Option<()> {
    let at = mss_at(segment)?;
    let old = bytes::u16_at(segment, at).filter(|old| *old > max)?;
    let mut check = bytes::u16_at(segment, 16)?;
    // An option may start at an odd offset: update the one or two words of the header that hold its bytes.
    let first = at & !1;
    let words = [first, first + 2];
    let before = words.map(|at| bytes::u16_at(segment, at).unwrap_or(0));
    debug_assert_ne!(old, max);
    bytes::put_u16(segment, at, max)?;
    for (at, before) in words.into_iter().zip(before) {
        check = checksum::update_u16(check, before, bytes::u16_at(segment, at).unwrap_or(0));
    }
    bytes::put_u16(segment, 16, check)
}

/// Offset of the value of the MSS option of a SYN (RFC 9293 section 3.7.1).
fn mss_at(segment: &[u8]) -> Option<usize> {
    let head = segment.first_chunk::<MIN_LEN>()?;
    if head[13] & SYN == 0 {
        return None;
    }
    let header = segment.get(..usize::from(head[12] >> 4) * 4)?;
    let mut at = MIN_LEN;
    // At most 40 bytes of options, and each turn passes at least one.
    loop {
        match *header.get(at..)? {
            [OPTION_END, ..] | [] => return None,
            [OPTION_NOP, ..] => at += 1,
            [OPTION_MSS, 4, _, _, ..] => return Some(at + 2),
            [_, len, ..] if len >= 2 => at += usize::from(len),
            _ => return None,
        }
    }
}
