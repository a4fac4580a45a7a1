//! What an endpoint counts.

use crate::ignored::Ignored;

/// Counters since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// IKE SAs that this side began.
    pub initiated: u64,
    /// IKE SAs that peers began.
    pub responded: u64,
    /// IKE SAs established.
    pub established: u64,
    /// IKE SAs that did not come up.
    pub failed: u64,
    /// IKE SAs replaced by a rekey.
    pub ike_rekeyed: u64,
    /// CHILD_SAs made, rekeys included.
    pub children: u64,
    /// CHILD_SAs replaced by a rekey.
    pub children_rekeyed: u64,
    /// CHILD_SAs that could not be made.
    pub children_failed: u64,
    /// Requests sent again.
    pub retransmitted: u64,
    /// Peers that did not answer any more.
    pub dead: u64,
    ignored: [u64; Ignored::ALL.len()],
}

impl Counters {
    pub(crate) fn ignored(&mut self, reason: Ignored) {
        let index = Ignored::ALL.iter().position(|found| *found == reason);
        if let Some(count) = index.and_then(|index| self.ignored.get_mut(index)) {
            *count += 1;
        }
    }

    /// Messages that were not acted on, by reason.
    pub fn ignored_by_reason(&self) -> impl Iterator<Item = (Ignored, u64)> + '_ {
        Ignored::ALL.iter().copied().zip(self.ignored)
    }
}
