//! Tops of anti-replay windows that outlive the process (DP-4), of inbound SAs whose keys come back (from a file, or
//! saved for the time after a reset): after a crash the same keys are installed again, and what was captured before must
//! not be accepted once more.
//!
//! A *promise* is kept in the [`Ledger`] for each of these SAs: no number above it was accepted. A window that is
//! installed again begins at the promise. So the promise has to run ahead of the window, and it should not run far: what
//! the peer sends below it after a crash is dropped as replayed, though it is new.
//!
//! Tops are looked at once a second, off the packets' way. An SA's promise is raised when the numbers left are fewer
//! than came since the last look, to twice that many and at least [`MARGIN`]. Hence
//! - a crash costs such an SA at most the packets of about two seconds, or [`MARGIN`];
//! - what is accepted beyond a promise in a sudden burst may be accepted once more if the datapath dies within the same
//!   second. To close that gap such packets would have to be dropped whenever traffic speeds up, crash or not.
//!
//! With very many of these SAs each is looked at less often, and what was said of seconds holds of looks.

use std::collections::BTreeMap;
use std::ops::Bound;

use postern_contract::sa::SaId;

use crate::reserve::Ledger;

/// Numbers that are promised ahead of a window that hardly moves.
const MARGIN: u64 = 8;
/// SAs that are looked at in one second: the worker's caches miss once for each.
const LOOKS: usize = 16_384;

/// The SAs whose windows are kept.
#[derive(Debug, Default)]
pub(super) struct Windows {
    by_id: BTreeMap<SaId, Window>,
    /// Where the next look begins.
    cursor: Option<SaId>,
    /// Second of the last look.
    looked: u32,
}

#[derive(Debug)]
struct Window {
    /// Names the keys in the ledger.
    name: [u8; 16],
    /// The top when it was looked at last.
    seen: u64,
    promise: u64,
    /// The last number that there is.
    last: u64,
}

impl Windows {
    /// The number that the window of an SA with these keys begins at.
    pub(super) fn begin(ledger: &Ledger, name: &[u8; 16], top: u64) -> u64 {
        ledger.ceiling(name).unwrap_or(0).max(top)
    }

    /// An SA was installed with its window at `top`; `last` is the last number that there is.
    pub(super) fn insert(&mut self, id: SaId, name: [u8; 16], top: u64, last: u64) {
        self.by_id.insert(id, Window { name, seen: top, promise: top, last });
    }

    /// An SA was removed. Gives the name of its promise, which stays: its keys may come back.
    pub(super) fn remove(&mut self, id: SaId) -> Option<[u8; 16]> {
        self.by_id.remove(&id).map(|window| window.name)
    }

    /// The SAs to look at in this second; none if that was done.
    pub(super) fn due(&mut self, now: u32) -> Vec<SaId> {
        if self.looked == now || self.by_id.is_empty() {
            return Vec::new();
        }
        self.looked = now;
        let start = self.cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let due: Vec<SaId> =
            self.by_id.range((start, Bound::Unbounded)).take(LOOKS).map(|(id, _)| *id).collect();
        self.cursor = due.last().copied().filter(|_| due.len() == LOOKS);
        due
    }

    /// Takes the tops of windows and raises the promises that these come near to. A promise that cannot be written is tried
    /// again with the next look.
    pub(super) fn look(&mut self, tops: &[(SaId, u64)], ledger: &mut Ledger) -> std::io::Result<()> {
        let mut raises = Vec::new();
        let mut raised = Vec::new();
        for (id, top) in tops {
            let Some(window) = self.by_id.get_mut(id) else { continue };
            let moved = top.saturating_sub(window.seen);
            window.seen = (*top).max(window.seen);
            let margin = moved.saturating_mul(2).max(MARGIN);
            let needed = if moved == 0 { *top } else { top.saturating_add(margin / 2) };
            if window.promise < needed.min(window.last) {
                let promise = top.saturating_add(margin).min(window.last);
                raises.push((window.name, promise));
                raised.push((*id, promise));
            }
        }
        ledger.raise(&raises)?;
        for (id, promise) in raised {
            if let Some(window) = self.by_id.get_mut(&id) {
                window.promise = promise;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: SaId = SaId(1);
    const NAME: [u8; 16] = [7; 16];

    fn ledger(directory: &tempfile::TempDir) -> Ledger {
        Ledger::open(directory.path()).unwrap()
    }

    /// Nothing is written for a window that does not move, and little for one that moves evenly.
    #[test]
    fn dp_4_promises_are_few() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = ledger(&directory);
        let mut windows = Windows::default();
        windows.insert(ID, NAME, 0, u64::MAX);
        windows.look(&[(ID, 0)], &mut ledger).unwrap();
        assert_eq!(ledger.ceiling(&NAME), None);
        windows.look(&[(ID, 1)], &mut ledger).unwrap();
        assert_eq!(ledger.ceiling(&NAME), Some(9));
        for top in 2..=5 {
            windows.look(&[(ID, top)], &mut ledger).unwrap();
            assert_eq!(ledger.ceiling(&NAME), Some(9), "{top}");
        }
        windows.look(&[(ID, 6)], &mut ledger).unwrap();
        assert_eq!(ledger.ceiling(&NAME), Some(14));
        windows.look(&[(ID, 1006)], &mut ledger).unwrap();
        assert_eq!(ledger.ceiling(&NAME), Some(3006));
        windows.look(&[(ID, 2006)], &mut ledger).unwrap();
        assert_eq!(ledger.ceiling(&NAME), Some(3006));
    }

    /// Each SA gets its look, however many there are, one round a second.
    #[test]
    fn every_sa_gets_its_look() {
        let mut windows = Windows::default();
        for id in 0..40_000 {
            windows.insert(SaId(id), NAME, 0, u64::MAX);
        }
        let rounds: Vec<Vec<SaId>> = (1..=4).map(|now| windows.due(now)).collect();
        assert_eq!(rounds.iter().map(Vec::len).collect::<Vec<_>>(), [16_384, 16_384, 7232, 16_384]);
        assert_eq!(rounds[..3].concat(), (0..40_000).map(SaId).collect::<Vec<_>>());
        assert_eq!(rounds[3], rounds[0]);
        assert!(windows.due(4).is_empty());
    }

    proptest! {
        /// DP-4: after each look the promise is at the top or above, and no further than the module says; a window that
        /// begins again refuses everything that was accepted.
        #[test]
        fn dp_4_promise_covers_what_was_accepted(
            steps in prop::collection::vec(prop_oneof![0_u64..4, 0_u64..100_000, any::<u64>()], 1..20),
            esn in any::<bool>(),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let mut ledger = ledger(&directory);
            let last = if esn { u64::MAX } else { u32::MAX.into() };
            let mut windows = Windows::default();
            let (mut top, mut fastest) = (0_u64, 0);
            windows.insert(ID, NAME, 0, last);
            for step in steps {
                let now = top.saturating_add(step).min(last);
                fastest = (now - top).max(fastest);
                top = now;
                windows.look(&[(ID, top)], &mut ledger).unwrap();
                let begin = Windows::begin(&ledger, &NAME, 0);
                prop_assert!(begin >= top && begin <= last);
                prop_assert!(begin - top <= fastest.saturating_mul(2).max(MARGIN));
            }
        }
    }
}
