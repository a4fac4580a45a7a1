//! Messages that were acted on, and what they were answered with: IKEv1 has no window, so that a copy is known by its
//! bytes, and its answer is sent again.

use core::hash::{Hash, Hasher};
use std::collections::VecDeque;
use std::hash::DefaultHasher;

use crate::v2::channel::Datagrams;

/// The last few.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    answers: VecDeque<(u64, Datagrams)>,
    /// Message IDs of exchanges that are over.
    ids: VecDeque<u32>,
}

/// Answers that are kept.
const ANSWERS: usize = 8;
/// Message IDs that are kept.
const IDS: usize = 64;

impl Recent {
    /// What this very datagram was answered with.
    pub(crate) fn answer(&self, datagram: &[u8]) -> Option<&Datagrams> {
        let digest = digest(datagram);
        self.answers.iter().find(|(found, _)| *found == digest).map(|(_, answer)| answer)
    }

    /// This datagram was authentic, and answered with that, which may be nothing.
    pub(crate) fn answered(&mut self, datagram: &[u8], answer: Datagrams) {
        if self.answers.len() == ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back((digest(datagram), answer));
    }

    /// Whether an exchange of this message ID was there lately.
    pub(crate) fn has_id(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// The exchange of this message ID is over.
    pub(crate) fn over(&mut self, id: u32) {
        if self.ids.len() == IDS {
            self.ids.pop_front();
        }
        self.ids.push_back(id);
    }
}

/// Whoever does not know an authentic datagram cannot make another with the same digest.
fn digest(datagram: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    datagram.hash(&mut hasher);
    hasher.finish()
}
