//! Joining the fragments of a message (RFC 7383 section 2.6).
//!
//! Every fragment is authenticated by itself before it comes here, so only the peer can make this grow, and by no more
//! than one message of [`MAX_BYTES`] in [`MAX_FRAGMENTS`] parts. [`Reassembly::wants`] tells before a fragment is opened
//! whether opening it could be of any use.

use crate::ignored::Ignored;
use crate::message::registry::PayloadType;

/// Most fragments of a message.
pub const MAX_FRAGMENTS: u16 = 128;
/// Most bytes of the payloads of a message in fragments.
pub const MAX_BYTES: usize = 65_536;

/// A message of which some fragments have arrived.
#[derive(Debug)]
pub(super) struct Reassembly {
    parts: Vec<Option<Box<[u8]>>>,
    total: u16,
    missing: u16,
    bytes: usize,
    first: PayloadType,
    digest: u64,
}

/// One authenticated fragment.
#[derive(Debug)]
pub(super) struct Fragment {
    /// From 1, at most `total`.
    pub(super) number: u16,
    /// Fragments in all.
    pub(super) total: u16,
    /// Type of the first payload of the whole, in fragment 1.
    pub(super) first: PayloadType,
    /// Part of the payloads.
    pub(super) plain: Vec<u8>,
    /// Of the datagram.
    pub(super) digest: u64,
}

/// All fragments of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Whole {
    /// Type of the first payload.
    pub(super) first: PayloadType,
    /// The payloads.
    pub(super) plain: Vec<u8>,
    /// Digest of the datagram with fragment 1, by which a retransmission is known.
    pub(super) digest: u64,
}

impl Reassembly {
    /// Whether a fragment with these numbers can be of use, if it turns out to be authentic.
    pub(super) fn wants(state: Option<&Self>, number: u16, total: u16) -> Result<(), Ignored> {
        if number == 0 || number > total {
            return Err(Ignored::Fragment);
        }
        if total > MAX_FRAGMENTS {
            return Err(Ignored::Oversized);
        }
        let Some(state) = state else { return Ok(()) };
        let known = || state.parts.get(usize::from(number) - 1).is_some_and(Option::is_some);
        // "If ... Total Fragments ... is smaller ... the receiver MUST discard this fragment"; and a replayed one.
        if total < state.total || (total == state.total && known()) {
            return Err(Ignored::Fragment);
        }
        Ok(())
    }

    /// Takes an authenticated fragment that is [wanted](Self::wants). When it was the last one, gives the message and
    /// leaves nothing behind.
    pub(super) fn add(state: &mut Option<Box<Self>>, fragment: Fragment) -> Result<Option<Whole>, Ignored> {
        let Fragment { number, total, first, plain, digest } = fragment;
        // "If ... greater than in the fragments already received, the receiver MUST discard all those": the sender uses
        // smaller fragments now.
        let mut joining =
            state.take().filter(|state| state.total >= total).unwrap_or_else(|| Box::new(Self::new(total)));
        if joining.bytes.saturating_add(plain.len()) > MAX_BYTES {
            return Err(Ignored::Oversized);
        }
        if number == 1 {
            (joining.first, joining.digest) = (first, digest);
        }
        if let Some(part @ None) = joining.parts.get_mut(usize::from(number).wrapping_sub(1)) {
            joining.bytes += plain.len();
            joining.missing = joining.missing.saturating_sub(1);
            *part = Some(plain.into_boxed_slice());
        }
        if joining.missing > 0 {
            *state = Some(joining);
            return Ok(None);
        }
        let mut plain = Vec::with_capacity(joining.bytes);
        joining.parts.iter().flatten().for_each(|part| plain.extend_from_slice(part));
        Ok(Some(Whole { first: joining.first, plain, digest: joining.digest }))
    }

    fn new(total: u16) -> Self {
        Self {
            parts: vec![None; usize::from(total)],
            total,
            missing: total,
            bytes: 0,
            first: PayloadType::NONE,
            digest: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fragment(number: u16, total: u16, plain: &[u8]) -> Fragment {
        let first = if number == 1 { PayloadType::ID_I } else { PayloadType::NONE };
        Fragment { number, total, first, plain: plain.to_vec(), digest: u64::from(number) }
    }

    fn feed(state: &mut Option<Box<Reassembly>>, fragment: Fragment) -> Result<Option<Vec<u8>>, Ignored> {
        Reassembly::wants(state.as_deref(), fragment.number, fragment.total)?;
        let whole = Reassembly::add(state, fragment)?;
        Ok(whole.map(|whole| {
            assert_eq!((whole.first, whole.digest), (PayloadType::ID_I, 1));
            assert!(state.is_none());
            whole.plain
        }))
    }

    #[test]
    fn replayed_smaller_and_impossible_fragments_are_refused() {
        let mut state = None;
        assert_eq!(feed(&mut state, fragment(2, 3, b"b")), Ok(None));
        assert_eq!(feed(&mut state, fragment(2, 3, b"x")), Err(Ignored::Fragment));
        assert_eq!(feed(&mut state, fragment(1, 2, b"x")), Err(Ignored::Fragment));
        assert_eq!(feed(&mut state, fragment(0, 3, b"x")), Err(Ignored::Fragment));
        assert_eq!(feed(&mut state, fragment(4, 3, b"x")), Err(Ignored::Fragment));
        assert_eq!(feed(&mut state, fragment(1, 129, b"x")), Err(Ignored::Oversized));
        assert_eq!(feed(&mut state, fragment(3, 3, b"c")), Ok(None));
        assert_eq!(feed(&mut state, fragment(1, 3, b"a")), Ok(Some(b"abc".to_vec())));
    }

    /// RFC 7383 section 2.6: a greater total starts anew, for the sender has gone to smaller fragments.
    #[test]
    fn a_greater_total_starts_anew() {
        let mut state = None;
        assert_eq!(feed(&mut state, fragment(1, 2, b"aaa")), Ok(None));
        assert_eq!(feed(&mut state, fragment(3, 3, b"c")), Ok(None));
        assert_eq!(feed(&mut state, fragment(1, 3, b"a")), Ok(None));
        assert_eq!(feed(&mut state, fragment(2, 3, b"b")), Ok(Some(b"abc".to_vec())));
    }

    #[test]
    fn memory_is_bounded() {
        let mut state = None;
        let big = vec![0; 40_000];
        assert_eq!(feed(&mut state, fragment(1, 3, &big)), Ok(None));
        assert_eq!(feed(&mut state, fragment(2, 3, &big)), Err(Ignored::Oversized));
        assert!(state.is_none());
    }

    proptest! {
        /// In whatever order they come, and however often, they are joined once.
        #[test]
        fn any_order_joins(plain in prop::collection::vec(any::<u8>(), 1..400), size in 4..100_usize, seed: u64) {
            let parts: Vec<&[u8]> = plain.chunks(size).collect();
            let total = u16::try_from(parts.len()).unwrap();
            let mut order: Vec<usize> = (0..parts.len()).flat_map(|index| [index, index]).collect();
            let mut random = seed;
            for index in (1..order.len()).rev() {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                order.swap(index, usize::try_from(random >> 33).unwrap() % (index + 1));
            }
            let mut state = None;
            let mut joined = Vec::new();
            for index in order {
                let number = u16::try_from(index).unwrap() + 1;
                if joined.is_empty() && let Ok(Some(whole)) = feed(&mut state, fragment(number, total, parts[index])) {
                    joined.push(whole);
                }
            }
            prop_assert_eq!(joined, vec![plain]);
        }
    }
}
