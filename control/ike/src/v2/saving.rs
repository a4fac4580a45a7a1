//! What is saved of an established IKE SA, by the strategy of its connection, and when (RST-1, RST-2).

use std::sync::Arc;

use super::child::{Child, ChildState};
use super::established::Established;
use super::nat::Nat;
use super::{Abilities, Common};
use crate::Secret;
use crate::config::Connection;
use crate::endpoint::Core;
use crate::output::{Effect, Persist, SaId};
use crate::record::whole::{SavedChild, Traits, Whole};
use crate::record::{PeerTag, SavedBody, SavedIke, Strategy};

impl Established {
    /// Has saved what is needed after a reset, as it is now; what is done for this SA after this waits for it.
    pub(super) fn persist(&self, common: &Common, core: &mut Core) {
        self.persist_for(common.id, common, core, &self.children);
    }

    /// The same, of an SA that is to go on after a reset: something that matters only for that has changed.
    pub(super) fn persist_whole(&self, common: &Common, core: &mut Core) {
        if self.connection.reset == Strategy::Restore {
            self.persist(common, core);
        }
    }

    /// The same, when it is what is done for another SA that has to wait, and with the children that this one takes over.
    pub(super) fn persist_for(&self, id: SaId, common: &Common, core: &mut Core, children: &[Child]) {
        let Common { initiator, spi_i, spi_r, path, .. } = *common;
        let saved = SavedIke {
            spis: (spi_i, spi_r),
            initiator,
            connection: Arc::clone(&self.connection.name),
            peer: PeerTag::of(&self.remote_id.to_string()),
            path,
            expires: self.ends,
            body: SavedBody::V2Context(self.channel.saved()),
        };
        let saved = match self.connection.reset {
            Strategy::Delete => saved,
            Strategy::Prebuilt => saved.into_prebuilt(),
            Strategy::Restore => self.whole(common, saved, children),
            Strategy::None => return,
        };
        core.emit(id, Effect::Persist(Persist::Put(Box::new(saved))));
    }

    /// An exchange of this side may have come to its end, and then nothing of it has to be repeated after a reset.
    pub(super) fn note_end(&self, common: &Common, core: &mut Core) {
        if self.ours.is_none() && !self.replaced && !self.lost {
            self.persist_whole(common, core);
        }
    }

    /// `saved` with everything that is needed to go on. An SA that is on its way out does not go on.
    pub(super) fn whole(&self, common: &Common, saved: SavedIke, children: &[Child]) -> SavedIke {
        let SavedBody::V2Context(context) = saved.body else { return saved };
        let children = if self.is_closing() || self.lost { None } else { save_children(children) };
        let body = match children {
            None => SavedBody::V2Context(context),
            Some(children) => {
                let (expected_request, answer, life) = self.channel.saved_window();
                let Nat { supported, local, remote } = common.nat;
                let Abilities { fragmentation, hashes: _, childless, mobike } = common.peer;
                SavedBody::Whole(Box::new(Whole {
                    context,
                    expected_request,
                    answer,
                    life,
                    prf: self.suite.prf,
                    ke: self.suite.ke,
                    additional: self.suite.additional.clone(),
                    sk_d: self.keys.sk_d().duplicate(),
                    fingerprint: beginning(&self.connection),
                    identity: self.remote_id.to_data(),
                    addresses: self.addresses().to_vec(),
                    traits: Traits {
                        nat_detection: supported,
                        nat_local: local,
                        nat_remote: remote,
                        fragmentation,
                        childless,
                        mobike,
                    },
                    children,
                }))
            }
        };
        SavedIke { body, ..saved }.into_fitting()
    }
}

/// Those that the peer may still have. `None` if something about one is not known, and then the IKE SA cannot go on.
fn save_children(children: &[Child]) -> Option<Vec<SavedChild>> {
    let living = || children.iter().filter(|child| child.state != ChildState::Gone);
    living()
        .map(|child| {
            let kept = child.kept.as_deref()?;
            let replaces = living().position(|old| Some(old.id) == child.replaces && old.is_current());
            Some(SavedChild {
                index: u16::try_from(child.index).ok()?,
                current: child.is_current(),
                replaces: replaces.map(u8::try_from).transpose().ok()?,
                // Once the other is gone there is nothing to be compared.
                nonce: child.nonce.as_deref().filter(|_| replaces.is_some()).unwrap_or_default().to_vec(),
                mode: kept.mode,
                spi_in: child.spi_in,
                spi_out: child.spi_out,
                suite: child.suite.clone(),
                keys_in: duplicate(&kept.keys_in),
                keys_out: duplicate(&kept.keys_out),
                local_ts: child.local_ts.clone(),
                remote_ts: child.remote_ts.clone(),
                ends: kept.ends,
            })
        })
        .collect()
}

/// The beginning of a fingerprint.
pub(super) fn beginning(connection: &Connection) -> [u8; 8] {
    connection.fingerprint.first_chunk().copied().unwrap_or_default()
}

pub(super) fn duplicate((encryption, integrity): &(Secret, Secret)) -> (Secret, Secret) {
    (encryption.duplicate(), integrity.duplicate())
}
