//! Framing of contract messages: a header of four bytes, then one value in postcard's encoding.
//!
//! [`encode`] writes into a buffer that never grows after the first call, so that key bytes are not left behind
//! by a reallocation; [`decode`] takes exactly one value and refuses what is left over. Whoever owns a buffer
//! that carried keys wipes it ([`Buffer`] does so by itself). [`decode`] never panics and its allocations are
//! bounded by the message's own length times the size of the largest element.
//!
//! ```text
//! 0      1      2            4
//! +------+------+------------+---------------
//! | 'P'  | 'n'  | VERSION LE | postcard value
//! +------+------+------------+---------------
//! ```

use postcard::ser_flavors::{Flavor, Size};
use serde::{Serialize, de::DeserializeOwned};
use zeroize::{Zeroize, Zeroizing};

use crate::VERSION;

/// Largest message in bytes, header included. A sender splits what is larger.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Length of the header in bytes.
pub const HEADER: usize = 4;

/// First bytes of every message.
const MAGIC: [u8; 2] = *b"Pn";

/// Why bytes are not a message, or a value does not fit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Shorter than the header, or another protocol.
    #[error("not a message of the datapath contract")]
    NotContract,
    /// The sender was built with another version of the contract.
    #[error("the other side speaks version {0} of the datapath contract, this program version {VERSION}")]
    Version(u16),
    /// The value ends early or has a field out of its range.
    #[error("the message is malformed")]
    Malformed,
    /// Bytes are left after the value.
    #[error("{0} bytes are left over after the message")]
    Trailing(usize),
    /// Longer than [`MAX_MESSAGE`].
    #[error("the message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
}

/// A buffer for [`encode`] and for receiving, wiped when dropped.
pub type Buffer = Zeroizing<Vec<u8>>;

/// An empty [`Buffer`] that holds any message without growing.
pub fn buffer() -> Buffer {
    Zeroizing::new(Vec::with_capacity(MAX_MESSAGE))
}

/// Replaces the contents of `out` by the message for `value`. On an error `out` is empty.
pub fn encode<T: Serialize>(value: &T, out: &mut Vec<u8>) -> Result<(), CodecError> {
    wipe(out);
    out.reserve_exact(MAX_MESSAGE);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    postcard::serialize_with_flavor(value, Bounded(out)).map_err(|_| {
        wipe(out);
        CodecError::TooLong
    })
}

/// Wipes what is in `buffer` and empties it. Unlike `Vec::zeroize` this leaves the unused capacity alone, which nothing was
/// written to since it was last wiped: 128 KiB for each short message would cost more than the message.
pub fn wipe(buffer: &mut Vec<u8>) {
    buffer.as_mut_slice().zeroize();
    buffer.clear();
}

/// Bytes that `value` takes inside a message, without the header.
pub fn encoded_len<T: Serialize>(value: &T) -> usize {
    // `Size` only counts, and the contract's types have no serializer that can fail.
    postcard::serialize_with_flavor(value, Size::default()).unwrap_or(usize::MAX)
}

/// Reads the one value that `bytes` must hold.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError::TooLong);
    }
    let Some((&[magic0, magic1, version0, version1], body)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(CodecError::NotContract);
    };
    if [magic0, magic1] != MAGIC {
        return Err(CodecError::NotContract);
    }
    let version = u16::from_le_bytes([version0, version1]);
    if version != VERSION {
        return Err(CodecError::Version(version));
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(CodecError::Trailing(rest.len())),
        Err(_) => Err(CodecError::Malformed),
    }
}

/// What the fuzz target, the property tests and the corpus replay all call: `bytes` are read as both kinds of
/// message; what can be read must be written and read again as the same value.
///
/// # Panics
/// When that does not hold.
pub fn fuzz(bytes: &[u8]) {
    fn check<T: Serialize + DeserializeOwned + PartialEq + core::fmt::Debug>(bytes: &[u8]) {
        let Ok(value) = decode::<T>(bytes) else { return };
        let mut again = buffer();
        // Postcard accepts integers in more bytes than they need, so `again` may differ from `bytes`, but is never longer.
        assert!(encode(&value, &mut again).is_ok(), "does not fit after decoding");
        assert!(again.len() <= bytes.len(), "grew");
        assert!(decode::<T>(&again).as_ref() == Ok(&value), "changed: {value:?}");
    }
    check::<crate::request::Request>(bytes);
    check::<crate::request::Reply>(bytes);
}

/// Appends to a vector up to [`MAX_MESSAGE`], within the capacity that [`encode`] reserved.
struct Bounded<'a>(&'a mut Vec<u8>);

impl Flavor for Bounded<'_> {
    type Output = ();

    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        if MAX_MESSAGE - self.0.len() < data.len() {
            return Err(postcard::Error::SerializeBufferFull);
        }
        self.0.extend_from_slice(data);
        Ok(())
    }

    fn try_push(&mut self, data: u8) -> postcard::Result<()> {
        self.try_extend(&[data])
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arbitrary;
    use crate::request::{Operation, Reply, Request};
    use crate::sa::SaId;

    fn header() -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes
    }

    #[test]
    fn header_is_checked() {
        assert_eq!(decode::<Request>(b"Pn"), Err(CodecError::NotContract));
        assert_eq!(decode::<Request>(b"Px\x01\x00\x00"), Err(CodecError::NotContract));
        assert_eq!(decode::<Request>(b"Pn\xff\x00\x04"), Err(CodecError::Version(255)));
        assert_eq!(decode::<Request>(&header()), Err(CodecError::Malformed));
        assert_eq!(decode::<Request>(&vec![0; MAX_MESSAGE + 1]), Err(CodecError::TooLong));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut message = buffer();
        encode(&Request::Status, &mut message).unwrap();
        message.push(0);
        assert_eq!(decode::<Request>(&message), Err(CodecError::Trailing(1)));
    }

    #[test]
    fn the_longest_message_passes_and_one_byte_more_does_not() {
        let text = |len| Reply::Rejected("x".repeat(len));
        let overhead = encoded_len(&text(MAX_MESSAGE)) - MAX_MESSAGE + HEADER;
        let mut out = buffer();
        let longest = text(MAX_MESSAGE - overhead);
        encode(&longest, &mut out).unwrap();
        assert_eq!((out.len(), decode(&out)), (MAX_MESSAGE, Ok(longest)));
        assert_eq!(encode(&text(MAX_MESSAGE - overhead + 1), &mut out), Err(CodecError::TooLong));
        assert!(out.is_empty());
    }

    /// OPS-4: the buffer does not move while keys are written to it, and is wiped before its next use.
    #[test]
    fn ops_4_buffer_stays_in_place() {
        let mut out = buffer();
        let place = out.as_ptr();
        for count in [1, 5000, 3] {
            let operations = (0..count).map(|id| Operation::RemoveSa(SaId(id))).collect();
            encode(&Request::Apply { token: 1, operations }, &mut out).unwrap();
            assert_eq!(out.as_ptr(), place);
        }
    }

    /// A length field that promises more elements than there are bytes allocates nothing to speak of.
    #[test]
    fn claimed_lengths_do_not_allocate() {
        let mut bytes = header();
        bytes.extend([2, 1]); // Request::Apply, token 1
        bytes.extend([0xff, 0xff, 0xff, 0xff, 0x0f]); // 2^32 - 1 operations
        assert_eq!(decode::<Request>(&bytes), Err(CodecError::Malformed));
    }

    /// The seeds of the fuzz target `codec` go through the same function. With `POSTERN_WRITE_SEEDS` set they are made
    /// anew first, as the contract's version demands.
    #[test]
    fn fuzz_seeds_hold() {
        use proptest::strategy::{Strategy as _, ValueTree as _};
        use proptest::test_runner::TestRunner;
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/codec");
        if std::env::var_os("POSTERN_WRITE_SEEDS").is_some() {
            let mut runner = TestRunner::deterministic();
            for number in 0..32 {
                let mut message = buffer();
                encode(&arbitrary::request().new_tree(&mut runner).unwrap().current(), &mut message).unwrap();
                std::fs::write(format!("{folder}/request-{number}"), &*message).unwrap();
                message.clear();
                encode(&arbitrary::reply().new_tree(&mut runner).unwrap().current(), &mut message).unwrap();
                std::fs::write(format!("{folder}/reply-{number}"), &*message).unwrap();
            }
        }
        let mut replayed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let seed = std::fs::read(&path).unwrap();
            assert!(std::panic::catch_unwind(|| fuzz(&seed)).is_ok(), "{}", path.display());
            replayed += 1;
        }
        assert!(replayed >= 64, "{replayed} seeds in {folder}");
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            fuzz(&bytes);
            let mut framed = header();
            framed.extend(&bytes);
            fuzz(&framed);
        }

        #[test]
        fn damaged_requests(
            request in arbitrary::request(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut message = buffer();
            encode(&request, &mut message).unwrap();
            for (place, byte) in damage {
                let at = place.index(message.len());
                message[at] = byte;
            }
            fuzz(&message);
            let left = cut.index(message.len());
            message.truncate(left);
            fuzz(&message);
        }

        #[test]
        fn requests_round_trip(request in arbitrary::request()) {
            let mut message = buffer();
            encode(&request, &mut message).unwrap();
            prop_assert_eq!(message.len(), HEADER + encoded_len(&request));
            prop_assert_eq!(decode::<Request>(&message), Ok(request));
            fuzz(&message);
        }

        #[test]
        fn replies_round_trip(reply in arbitrary::reply()) {
            let mut message = buffer();
            encode(&reply, &mut message).unwrap();
            prop_assert_eq!(decode::<Reply>(&message), Ok(reply));
            fuzz(&message);
        }
    }
}
