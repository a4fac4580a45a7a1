//! Messages of IKEv1 in fragments, as Cisco began it and others, strongSwan among them, do it too: below IP, so that
//! certificates get through where IP fragments do not. Both sides say by a vendor ID that they take them.
//!
//! ```text
//! the message's own header, in the clear, first payload 132, then one payload:
//! next (0) | 0 | length (2) | fragment ID (2) | number, from 1 | 1: the last one | a piece of the message, header and all
//! ```
//! Nothing in a fragment is authenticated, as nothing in the header of a message is. What is put together is read like any
//! datagram; until then it takes at most [`LONGEST`] bytes of an IKE SA.

use std::collections::BTreeMap;

use super::message::{Head, Kind, emit};
use crate::ignored::Ignored;

/// What says that fragments are taken.
pub(super) const VENDOR_ID: [u8; 20] = [
    0x40, 0x48, 0xb7, 0xd5, 0x6e, 0xbc, 0xe8, 0x85, 0x25, 0xe7, 0xde, 0x7f, 0x00, 0xd6, 0xc2, 0xd3, 0x80, 0,
    0, 0,
];
/// So much of it is the same everywhere.
pub(super) const VENDOR_ID_COMMON: usize = 16;

/// Longest message that is put together: room for a few certificates.
const LONGEST: usize = 16 * 1024;

/// Bytes of the fragment payload before the piece, its generic header included.
const OVERHEAD: usize = 8;
const HEADER: usize = 28;
const LAST: u8 = 1;

/// The fragments of one message that have come.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    id: u16,
    pieces: BTreeMap<u8, Vec<u8>>,
    /// Number of the last one.
    last: Option<u8>,
    bytes: usize,
}

impl Fragments {
    /// Takes one, the body of a message whose first payload is a fragment; gives the message when all are there. A new
    /// fragment ID, or a piece that contradicts one before, begins anew.
    pub(crate) fn take(&mut self, body: &[u8]) -> Result<Option<Vec<u8>>, Ignored> {
        let ([_, _, length @ .., id_high, id_low, number, flags], piece) =
            body.split_first_chunk::<OVERHEAD>().ok_or(Ignored::Truncated)?;
        let length = usize::from(u16::from_be_bytes(*length));
        let piece = length.checked_sub(OVERHEAD).and_then(|length| piece.get(..length));
        let piece = piece.filter(|piece| !piece.is_empty() && *number > 0).ok_or(Ignored::Fragment)?;
        let id = u16::from_be_bytes([*id_high, *id_low]);
        let known = self.pieces.get(number);
        if id != self.id || known.is_some_and(|known| known != piece) {
            *self = Self { id, ..Self::default() };
        } else if known.is_some() {
            return Ok(None);
        }
        if self.bytes + piece.len() > LONGEST {
            *self = Self::default();
            return Err(Ignored::Oversized);
        }
        self.bytes += piece.len();
        self.pieces.insert(*number, piece.to_vec());
        if flags & LAST != 0 {
            self.last = Some(*number);
        }
        let Some(last) = self.last else { return Ok(None) };
        // Numbers begin at 1 and are in order: as many as the last one's number are all, if none is above it.
        let complete =
            self.pieces.len() == usize::from(last) && self.pieces.keys().all(|number| *number <= last);
        Ok(complete.then(|| std::mem::take(self).pieces.into_values().flatten().collect()))
    }
}

/// Whether this is a fragment itself.
pub(super) fn is_one(message: &[u8]) -> bool {
    super::message::parse::message(message).is_ok_and(|(_, first, _)| first == Kind::FRAGMENT)
}

/// A message in pieces, each of at most `limit` bytes; as it is if it is no longer, or would be too many.
pub(super) fn split(message: &[u8], limit: usize) -> Vec<Vec<u8>> {
    let whole = || vec![message.to_vec()];
    let room = limit.saturating_sub(HEADER + OVERHEAD).max(1);
    let Ok((head, ..)) = super::message::parse::message(message) else { return whole() };
    let Ok(count) = u8::try_from(message.len().div_ceil(room)) else { return whole() };
    if message.len() <= limit {
        return whole();
    }
    let head = Head { encrypted: false, ..head };
    let pieces = (1..=count).zip(message.chunks(room)).map(|(number, piece)| {
        let length = u16::try_from(OVERHEAD + piece.len()).unwrap_or(u16::MAX).to_be_bytes();
        let last = if number == count { LAST } else { 0 };
        let fixed = [[0, 0], length, [0, 1], [number, last]].concat();
        emit::with_body(&head, Kind::FRAGMENT, &[&fixed, piece].concat())
    });
    pieces.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::IkeSpi;
    use crate::v1::message::{Exchange, parse};

    fn message(length: usize) -> Vec<u8> {
        let head = Head {
            cookie_i: IkeSpi(1),
            cookie_r: IkeSpi(2),
            exchange: Exchange::IDENTITY_PROTECTION,
            encrypted: true,
            message_id: 0,
        };
        let body: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
        emit::with_body(&head, Kind::ID, &body)
    }

    /// IKE-2: any order, any repetition; each fragment is a message of its own that says what it is in the clear.
    #[test]
    fn ike_2_fragments_are_put_together() {
        let whole = message(3000);
        let pieces = split(&whole, 500);
        assert_eq!(pieces.len(), 7);
        for backwards in [false, true] {
            let mut fragments = Fragments::default();
            let mut order: Vec<_> = pieces.iter().chain(&pieces[1..3]).collect();
            if backwards {
                order.reverse();
            }
            let mut found = Vec::new();
            for piece in order {
                assert!(piece.len() <= 500);
                let (head, first, body) = parse::message(piece).unwrap();
                assert!(
                    first == Kind::FRAGMENT
                        && !head.encrypted
                        && head.exchange == Exchange::IDENTITY_PROTECTION
                );
                found.extend(fragments.take(body).unwrap());
            }
            assert_eq!(found, std::slice::from_ref(&whole), "backwards {backwards}");
        }
        assert_eq!(split(&whole, 3028), [whole]);
    }

    /// IKE-2: what contradicts itself begins anew, and nobody fills the memory.
    #[test]
    fn ike_2_fragments_are_bounded() {
        let mut fragments = Fragments::default();
        let body = |id: u8, number: u8, last: u8, piece: &[u8]| {
            let length = u16::try_from(8 + piece.len()).unwrap().to_be_bytes();
            [&[0, 0], &length[..], &[0, id, number, last], piece].concat()
        };
        assert_eq!(fragments.take(&body(1, 1, 0, b"one")).unwrap(), None);
        // Another message.
        assert_eq!(fragments.take(&body(2, 2, 1, b"two")).unwrap(), None);
        assert_eq!(fragments.take(&body(2, 1, 0, b"one ")).unwrap().unwrap(), b"one two");
        // The same number with other content: the first one is forgotten.
        assert_eq!(fragments.take(&body(3, 1, 0, b"forged")).unwrap(), None);
        assert_eq!(fragments.take(&body(3, 1, 0, b"one ")).unwrap(), None);
        assert_eq!(fragments.take(&body(3, 2, 1, b"two")).unwrap().unwrap(), b"one two");
        for number in 1..=u8::MAX {
            let _ = fragments.take(&body(4, number, 0, &[number; 1000]));
            assert!(fragments.bytes <= LONGEST);
        }
        for wrong in [&body(1, 0, 0, b"zero")[..], &body(1, 1, 0, b""), &[0; 7], &body(1, 1, 1, b"long")[..9]]
        {
            assert!(Fragments::default().take(wrong).is_err());
        }
    }
}
