//! The anti-replay window of one inbound SA and the recovery of extended sequence numbers (DP-4).
//!
//! RFC 4303 section 3.4.3 and appendix A2. The order of calls for a packet is
//! [`recover`](ReplayWindow::recover) → [`precheck`](ReplayWindow::precheck) → *open the packet* →
//! [`accept`](ReplayWindow::accept); only `accept` changes anything, and only a packet whose integrity check
//! succeeded may reach it:
//!
//! > "The receive window is updated only if the integrity verification succeeds." (RFC 4303 section 3.4.3)
//!
//! No call can panic, whatever its arguments are.

use crate::prefetch;

/// Why a sequence number is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayError {
    /// Zero, which no sender uses: "the first packet sent using a given SA will contain a sequence number of 1"
    /// (RFC 4303 section 3.3.3).
    Zero,
    /// Left of the window.
    TooOld,
    /// Received before.
    Duplicate,
}

/// Whether an accepted number is above all that were accepted before; MOB-2 believes an outer source only then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newest(pub bool);

/// The window: the highest number accepted and one bit for each of the `size` numbers up to it.
///
/// The bits are a ring of words in which the bit of number `n` is at `n` modulo the ring's bits (a power of two of at
/// least `size`), so sliding the window clears bits and moves none. The word in which the highest number is stands here;
/// the others, if there are any, on the heap, where 63 of 64 packets that come in order have nothing to look for.
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    top: u64,
    /// The ring's word at the index of `top`.
    word: u64,
    /// All words but that one, whose place is not looked at. `None` of a ring of one word.
    others: Option<Box<Words>>,
    size: u16,
    esn: bool,
}

/// Their number is a power of two.
#[derive(Clone, Debug)]
struct Words(Box<[u64]>);

// Part of what every inbound packet touches.
const _: () = assert!(size_of::<ReplayWindow>() == 32);

impl ReplayWindow {
    /// A window of `size` numbers (64 to 4096 by the contract; any value works) of which `top` is the highest one
    /// accepted so far, 0 if none.
    ///
    /// Nothing is known of the numbers below `top`, so all of them count as received: what was on its way while the
    /// SA was moved is lost once, nothing is accepted twice.
    ///
    /// With `size` 0 no number is refused. RFC 4303 section 3.3.3 advises against ESN then, because the high half
    /// still has to be followed; it is, with the number nearest to `top`.
    pub fn new(size: u16, top: u64, esn: bool) -> Self {
        let words = usize::from(size).div_ceil(64).next_power_of_two();
        let others = (words > 1).then(|| Box::new(Words(vec![u64::MAX; words].into())));
        Self { top, word: u64::MAX, others, size, esn }
    }

    /// The highest number accepted.
    pub const fn top(&self) -> u64 {
        self.top
    }

    /// Numbers that the window spans; 0 if nothing is checked.
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Asks for the memory of the other words when the next number is in one of them.
    #[inline]
    pub fn prefetch(&self) {
        if self.top % 64 == 63
            && let Some(others) = &self.others
        {
            prefetch::object(&**others);
        }
    }

    /// The full sequence number of a packet that carries `low`; without ESN that is `low` itself.
    ///
    /// RFC 4303 appendix A2 looks at two cases:
    ///
    /// > "Case A: Tl >= (W - 1). In this case, the window is within one sequence number subspace.
    /// > Case B: Tl < (W - 1). In this case, the window spans two sequence number subspaces."
    ///
    /// Both of its rules come to this: the one number with these low bits among the 2^32 that begin at the window's
    /// left edge. Written so, the first subspace needs no case of its own (there is none before it).
    #[inline]
    pub fn recover(&self, low: u32) -> u64 {
        if !self.esn {
            return u64::from(low);
        }
        let window = if self.size == 0 { 1 << 31 } else { u64::from(self.size) };
        let left = self.top.saturating_sub(window - 1);
        // Beyond the last subspace this wraps to a number far left of the window, which precheck refuses.
        left.wrapping_add(u64::from(low.wrapping_sub(low_half(left))))
    }

    /// Whether `seq` could be accepted; nothing is changed, so it is safe before the packet is authenticated.
    ///
    /// > "Duplicates are rejected through the use of a sliding receive window." (RFC 4303 section 3.4.3)
    #[inline]
    pub fn precheck(&self, seq: u64) -> Result<(), ReplayError> {
        if self.size == 0 {
            return Ok(());
        }
        if seq == 0 {
            return Err(ReplayError::Zero);
        }
        if seq > self.top {
            return Ok(());
        }
        if self.top - seq >= u64::from(self.size) {
            return Err(ReplayError::TooOld);
        }
        if self.word_of(seq) & bit(seq) == 0 { Ok(()) } else { Err(ReplayError::Duplicate) }
    }

    /// The word with the bit of `seq`.
    #[inline]
    fn word_of(&self, seq: u64) -> u64 {
        if seq / 64 == self.top / 64 { self.word } else { self.other_word(seq) }
    }

    fn other_word(&self, seq: u64) -> u64 {
        match &self.others {
            Some(others) if !others.shares(seq, self.top) => others.get(seq),
            _ => self.word,
        }
    }

    /// Takes the number of an authenticated packet: checks again, because the same number may have been accepted
    /// since the precheck, even in the same batch, then marks it and slides the window.
    #[inline]
    pub fn accept(&mut self, seq: u64) -> Result<Newest, ReplayError> {
        // The next number, as nearly always: nothing but its bit enters the window. It is not 0, and in the same word.
        if self.size != 0 && seq.wrapping_sub(self.top) == 1 && !seq.is_multiple_of(64) {
            self.word |= bit(seq);
            self.top = seq;
            return Ok(Newest(true));
        }
        self.accept_any(seq)
    }

    fn accept_any(&mut self, seq: u64) -> Result<Newest, ReplayError> {
        self.precheck(seq)?;
        let newest = seq > self.top;
        if self.size == 0 {
            self.top = self.top.max(seq);
            return Ok(Newest(newest));
        }
        if newest {
            self.slide_to(seq);
        }
        match &mut self.others {
            Some(others) if !others.shares(seq, self.top) => others.change(seq, |word| word | bit(seq)),
            _ => self.word |= bit(seq),
        }
        Ok(Newest(newest))
    }

    /// Makes `seq` the highest number. The numbers above the highest one so far and up to it enter the window unseen.
    fn slide_to(&mut self, seq: u64) {
        let Some(others) = &mut self.others else {
            forget_between(core::slice::from_mut(&mut self.word), self.top, seq);
            self.top = seq;
            return;
        };
        // With its word in its place the ring is whole.
        others.change(self.top, |_| self.word);
        forget_between(&mut others.0, self.top, seq);
        self.word = others.get(seq);
        self.top = seq;
    }
}

impl Words {
    /// Whether two numbers have one word.
    fn shares(&self, one: u64, other: u64) -> bool {
        word_index(one, self.0.len()) == word_index(other, self.0.len())
    }

    /// The word of a number.
    fn get(&self, seq: u64) -> u64 {
        // Not reached: `word_index` is below the length. All bits set is what refuses.
        self.0.get(word_index(seq, self.0.len())).copied().unwrap_or(u64::MAX)
    }

    fn change(&mut self, seq: u64, change: impl FnOnce(u64) -> u64) {
        let index = word_index(seq, self.0.len());
        if let Some(word) = self.0.get_mut(index) {
            *word = change(*word);
        }
    }
}

/// Clears the bits of the numbers above `top` and up to `seq` in a whole ring.
fn forget_between(words: &mut [u64], top: u64, seq: u64) {
    let mut next = top.wrapping_add(1);
    let length = words.len();
    // A jump over the whole ring; counted in words, rounded so that the loop below visits none twice.
    if (seq - top) / 64 >= u64::try_from(length).unwrap_or(u64::MAX) {
        words.fill(0);
        return;
    }
    while next <= seq {
        let first = next % 64;
        let count = (64 - first).min(seq - next + 1);
        if let Some(word) = words.get_mut(word_index(next, length)) {
            *word &= !((u64::MAX >> (64 - count)) << first);
        }
        match next.checked_add(count) {
            Some(after) => next = after,
            None => return,
        }
    }
}

const fn low_half(number: u64) -> u32 {
    let [a, b, c, d, ..] = number.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

const fn bit(seq: u64) -> u64 {
    1 << (seq % 64)
}

/// `length` is a power of two.
const fn word_index(seq: u64, length: usize) -> usize {
    (seq / 64) as usize & length.wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::ReplayError::{Duplicate, TooOld, Zero};
    use super::*;

    const WRAP: u64 = 1 << 32;

    /// What RFC 4303 section 3.4.3 says, with all numbers remembered.
    struct Oracle {
        size: u64,
        start: u64,
        top: u64,
        seen: HashSet<u64>,
    }

    impl Oracle {
        fn new(size: u16, top: u64) -> Self {
            Self { size: size.into(), start: top, top, seen: HashSet::new() }
        }

        fn check(&self, seq: u64) -> Result<(), ReplayError> {
            if self.size == 0 {
                Ok(())
            } else if seq == 0 {
                Err(Zero)
            } else if u128::from(seq) + u128::from(self.size) <= u128::from(self.top) {
                Err(TooOld)
            } else if seq <= self.start || self.seen.contains(&seq) {
                Err(Duplicate)
            } else {
                Ok(())
            }
        }

        fn accept(&mut self, seq: u64) -> Result<Newest, ReplayError> {
            self.check(seq)?;
            self.seen.insert(seq);
            let newest = seq > self.top;
            self.top = self.top.max(seq);
            Ok(Newest(newest))
        }
    }

    /// RFC 4303 appendix A2.1, case by case.
    fn appendix_a2(top: u64, window: u64, low: u32) -> Option<u64> {
        let (th, tl, w, seql) = (top >> 32, top % WRAP, window, u64::from(low));
        let seqh = if tl >= w - 1 {
            if seql >= tl + 1 - w { th } else { th + 1 }
        } else {
            let left = WRAP + tl + 1 - w;
            if seql >= left { th.checked_sub(1)? } else { th }
        };
        (seqh < WRAP).then_some((seqh << 32) | seql)
    }

    /// DP-4: the numbered cases, in order, on a window of 64.
    #[test]
    fn dp_4_numbered_table() {
        let mut window = ReplayWindow::new(64, 0, false);
        let table: &[(u64, Result<Newest, ReplayError>)] = &[
            (0, Err(Zero)),
            (1, Ok(Newest(true))),
            (1, Err(Duplicate)),
            (9, Ok(Newest(true))),
            (8, Ok(Newest(false))),
            (7, Ok(Newest(false))),
            (7, Err(Duplicate)),
            (64, Ok(Newest(true))),
            // The edge: 64 - 63 = 1 is the last number inside.
            (1, Err(Duplicate)),
            (2, Ok(Newest(false))),
            (66, Ok(Newest(true))),
            (2, Err(TooOld)),
            (3, Ok(Newest(false))),
            (65, Ok(Newest(false))),
            (65, Err(Duplicate)),
            // A jump of exactly the window, then of more, then of many.
            (130, Ok(Newest(true))),
            (67, Ok(Newest(false))),
            (66, Err(TooOld)),
            (300, Ok(Newest(true))),
            (237, Ok(Newest(false))),
            (236, Err(TooOld)),
            (299, Ok(Newest(false))),
            (300, Err(Duplicate)),
            (4_294_967_295, Ok(Newest(true))),
            (4_294_967_294, Ok(Newest(false))),
            (4_294_967_295, Err(Duplicate)),
            (0, Err(Zero)),
        ];
        for (line, (seq, expected)) in table.iter().enumerate() {
            assert_eq!(window.precheck(*seq), expected.map(|_| ()), "line {line}");
            assert_eq!(window.accept(*seq), *expected, "line {line}");
        }
    }

    /// DP-4: two packets of one batch pass the precheck with the same number; only one is accepted.
    #[test]
    fn dp_4_duplicate_inside_one_batch() {
        for size in [64, 128, 1024, 4096] {
            let mut window = ReplayWindow::new(size, 100, true);
            assert_eq!((window.precheck(105), window.precheck(105)), (Ok(()), Ok(())));
            assert_eq!(window.accept(105), Ok(Newest(true)));
            assert_eq!(window.accept(105), Err(Duplicate));
        }
    }

    /// DP-4: the roll-over at 2^32 with packets of both subspaces in the window.
    #[test]
    fn dp_4_esn_roll_over() {
        for size in [64_u16, 128, 1024, 4096] {
            let mut window = ReplayWindow::new(size, WRAP - 3, true);
            for (low, full, newest) in [
                (0xffff_fffe, WRAP - 2, true),
                (1, WRAP + 1, true),
                (0xffff_ffff, WRAP - 1, false),
                (0, WRAP, false),
                (2, WRAP + 2, true),
            ] {
                assert_eq!(window.recover(low), full);
                assert_eq!(window.accept(full), Ok(Newest(newest)));
                assert_eq!(window.accept(full), Err(Duplicate));
            }
            // A number just left of the window is taken for one of the next subspace, where its ICV fails.
            assert_eq!(
                window.recover(low_half(window.top() - u64::from(size))),
                2 * WRAP + 2 - u64::from(size)
            );
        }
    }

    /// The first and the last subspace have no neighbour.
    #[test]
    fn dp_4_esn_ends_of_the_space() {
        let window = ReplayWindow::new(64, 5, true);
        assert_eq!(window.recover(0xffff_fff0), 0xffff_fff0);
        assert_eq!(window.recover(0), 0);
        let mut window = ReplayWindow::new(64, u64::MAX - 1, true);
        assert_eq!(window.recover(u32::MAX), u64::MAX);
        assert!(window.precheck(window.recover(5)).is_err());
        assert_eq!(window.accept(u64::MAX), Ok(Newest(true)));
        assert_eq!(window.accept(u64::MAX), Err(Duplicate));
    }

    /// Without a check the top is followed all the same, and ESN is recovered nearest to it.
    #[test]
    fn dp_4_window_off() {
        let mut window = ReplayWindow::new(0, WRAP - 1, true);
        assert_eq!(window.recover(3), WRAP + 3);
        assert_eq!(window.accept(WRAP + 3), Ok(Newest(true)));
        assert_eq!(window.accept(WRAP + 3), Ok(Newest(false)));
        assert_eq!(window.recover(0xffff_0000), 0xffff_0000);
        assert_eq!(window.accept(0xffff_0000), Ok(Newest(false)));
        assert_eq!(window.top(), WRAP + 3);
    }

    /// A window that starts at `top` takes nothing at or below it.
    #[test]
    fn dp_4_restored_window_accepts_nothing_twice() {
        for size in [64, 128, 4096] {
            let mut window = ReplayWindow::new(size, 10_000, true);
            assert!((1..=10_000).all(|seq| window.accept(seq).is_err()));
            assert_eq!(window.accept(10_002), Ok(Newest(true)));
            assert_eq!(window.accept(10_001), Ok(Newest(false)));
        }
    }

    /// Numbers near the last one, near the window's edge, and far jumps.
    fn steps() -> impl Strategy<Value = Vec<(u8, i64)>> {
        proptest::collection::vec((0_u8..4, -5000_i64..5000), 1..300)
    }

    proptest! {
        /// DP-4: window and oracle agree on any sequence, for each size, also across 2^32.
        #[test]
        fn dp_4_agrees_with_the_oracle(
            size in prop::sample::select(vec![0_u16, 1, 64, 128, 192, 1000, 1024, 4096, 65535]),
            start in prop::sample::select(vec![0_u64, 1, 63, WRAP - 2000, WRAP - 1, 7 * WRAP - 100, u64::MAX - 9000]),
            steps in steps(),
        ) {
            let mut window = ReplayWindow::new(size, start, true);
            let mut oracle = Oracle::new(size, start);
            for (kind, offset) in steps {
                let edge = window.top().saturating_sub(size.into());
                let seq = match kind {
                    0 => window.top().saturating_add_signed(offset % 5),
                    1 => edge.saturating_add_signed(offset % 4),
                    2 => window.top().saturating_add_signed(offset),
                    _ => window.top().saturating_sub(offset.unsigned_abs() % u64::from(size.max(1))),
                };
                prop_assert_eq!(window.precheck(seq), oracle.check(seq));
                prop_assert_eq!(window.accept(seq), oracle.accept(seq));
                prop_assert_eq!(window.top(), oracle.top);
            }
        }

        /// RFC 4303 appendix A2.1, word for word, wherever it defines a number.
        #[test]
        fn dp_4_recovers_as_appendix_a2(
            size in prop::sample::select(vec![64_u16, 128, 1024, 4096]),
            high in prop::sample::select(vec![0_u64, 1, 2, 77, WRAP - 1]),
            near in -10_000_i64..10_000,
            distance in -10_000_i64..10_000,
            anywhere in any::<u32>(),
        ) {
            let top = (high << 32).saturating_add_signed(near);
            let window = ReplayWindow::new(size, top, true);
            for low in [anywhere, low_half(top.wrapping_add_signed(distance))] {
                if let Some(expected) = appendix_a2(top, size.into(), low) {
                    prop_assert_eq!(window.recover(low), expected);
                }
            }
        }

        /// Any number within reach of the window is recovered from its low half.
        #[test]
        fn dp_4_recovers_what_was_sent(top in 5000_u64..u64::MAX / 2, ahead in -63_i64..1_000_000) {
            let window = ReplayWindow::new(64, top, true);
            let sent = top.wrapping_add_signed(ahead);
            prop_assert_eq!(window.recover(low_half(sent)), sent);
        }
    }
}
