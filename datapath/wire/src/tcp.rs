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
    if bytes::u16_at(segment, at)? <= max {
        return None;
    }
    let mut check = bytes::u16_at(segment, 16)?;
    // An option may start at an odd offset: update the one or two words of the header that hold its bytes.
    let first = at & !1;
    let words = [first, first + 2];
    let before = words.map(|at| bytes::u16_at(segment, at).unwrap_or(0));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::hex;

    /// Made by scapy 2.8: `IP(src='10.1.2.3', dst='10.4.5.6') / TCP(sport=40000, dport=80, seq=7, flags='S',
    /// window=64240, options=[('NOP', None), ('SAckOK', b''), ('MSS', 8960), ('WScale', 7)])`: the option's value is
    /// at an odd offset.
    const SYN_8960: &str = "9c40005000000007000000008002faf0c30d0000010402020423000303070000";
    /// The same with an MSS of 1360.
    const SYN_1360: &str = "9c40005000000007000000008002faf0732b0000010402020405500303070000";

    /// DP-5: the clamped segment is the one that scapy builds.
    #[test]
    fn dp_5_clamps_to_what_scapy_builds() {
        let mut segment = hex(SYN_8960);
        assert_eq!(mss(&segment), Some(8960));
        assert!(clamp_mss(&mut segment, 1360));
        assert_eq!(segment, hex(SYN_1360));
        assert!(!clamp_mss(&mut segment, 1360));
        assert!(!clamp_mss(&mut segment, 1361));
        assert_eq!(segment, hex(SYN_1360));
    }

    /// DP-5: only SYN segments are touched.
    #[test]
    fn dp_5_leaves_other_segments() {
        let mut segment = hex(SYN_8960);
        segment[13] = 0x10;
        let before = segment.clone();
        assert!(!clamp_mss(&mut segment, 536));
        assert_eq!(segment, before);
        segment[13] = 0x12;
        assert!(clamp_mss(&mut segment, 536), "SYN-ACK");
    }

    #[test]
    fn malformed_options_end_the_walk() {
        let cut = [
            (12, 0x40, "header below its minimum"),
            (12, 0xf0, "header beyond the segment"),
            (12, 0x60, "option beyond the header"),
            (22, 0, "option of length 0"),
            (22, 1, "option of length 1"),
            (22, 40, "option beyond the header"),
            (20, 0, "end of options"),
            (24, 3, "MSS of another length"),
        ];
        for (at, value, why) in cut {
            let mut segment = hex(SYN_8960);
            segment[at] = value;
            assert_eq!(mss(&segment), None, "{why}");
            assert!(!clamp_mss(&mut segment, 536), "{why}");
        }
        assert_eq!(mss(&hex(SYN_8960)[..31]), None);
    }
}
