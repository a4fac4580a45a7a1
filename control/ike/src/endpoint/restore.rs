//! After a reset: what was saved whole goes on (strategy `restore`).

use core::time::Duration;

use hashbrown::HashMap;

use super::{Endpoint, Now};
use crate::record::{SavedBody, SavedIke};
use crate::v2::IkeSa;

/// IKE SAs that get new keys in one second after a reset: each costs key exchanges at both ends.
const RENEWALS: u32 = 200;

impl Endpoint {
    /// Lets saved IKE SAs go on, with their children: traffic flows as soon as these are installed, and peers notice
    /// nothing. Then all get new keys, children first, at a limited rate. To be called once, after
    /// [`configure`](Self::configure) and before anything else.
    ///
    /// Gives back those that cannot go on; their peers are to be told that they are gone
    /// ([`Recovery`](crate::recovery::Recovery)): records without everything in them; expired ones; those of a connection
    /// that is gone or another one now; those in the middle of a key exchange of this side; those that claim the same
    /// child, so that it is not known which IKE SA the peer has it in.
    pub fn restore(&mut self, now: Now, records: Vec<SavedIke>) -> Vec<SavedIke> {
        let mut claims: HashMap<u32, u32> = HashMap::new();
        for record in &records {
            for spi in spis(record) {
                *claims.entry(spi).or_default() += 1;
            }
        }
        let mut refused = Vec::new();
        let mut turn = 0_u32;
        for record in records {
            let doubtful = spis(&record).any(|spi| claims.get(&spi).is_some_and(|count| *count > 1));
            let connection = self.core.connections.named(&record.connection).cloned();
            let (Some(connection), false, true) = (connection, doubtful, record.expires > now.wall) else {
                refused.push(record);
                continue;
            };
            let delay = Duration::from_secs(1) * turn / RENEWALS;
            match IkeSa::restore(&mut self.core, now, record, &connection, delay) {
                Ok(sa) => {
                    turn = turn.saturating_add(1);
                    self.admit(now, sa);
                }
                Err(record) => refused.push(*record),
            }
        }
        refused
    }
}

/// Inbound SPIs of the children of a record.
fn spis(record: &SavedIke) -> impl Iterator<Item = u32> + '_ {
    let children = match &record.body {
        SavedBody::Whole(whole) => whole.children.as_slice(),
        _ => &[],
    };
    children.iter().map(|child| child.spi_in)
}
