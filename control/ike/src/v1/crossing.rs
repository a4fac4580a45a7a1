//! Which child takes the place of which. Both sides may replace the same child at once: then there are two new ones, of which
//! nothing in IKEv1 says which is to stay. Both sides of this implementation choose the same one, and whoever began the
//! other deletes it. A peer that chooses otherwise costs an SA for a while, never a packet: what the peer deletes last is
//! replaced by what it keeps.

use super::Common;
use super::child::{Agreed, Child, ChildState};
use super::established::{Doing, Established, PhaseTwo};
use crate::endpoint::{Core, Now};
use crate::output::{ChildId, Effect};
use crate::report::CloseReason;

/// How many times longer a replaced child stays if it is the peer's to delete.
const LATE: u32 = 12;

impl Child {
    fn protects(&self, agreed: &Agreed) -> bool {
        (&self.local_ts, &self.remote_ts) == (&agreed.local_ts, &agreed.remote_ts)
    }

    fn is_beside(&self, other: &Self) -> bool {
        self.id != other.id && (&self.local_ts, &self.remote_ts) == (&other.local_ts, &other.remote_ts)
    }

    /// The same number at both ends.
    fn rank(&self) -> (u32, u32) {
        (self.spi_in.min(self.spi_out), self.spi_in.max(self.spi_out))
    }
}

impl Established {
    /// What a child that this side began replaces: what it was begun for, if that is still there.
    pub(super) fn replaced_by_ours(&self, agreed: &Agreed, rekey: Option<ChildId>) -> Option<ChildId> {
        let meant = |child: &&Child| Some(child.id) == rekey && child.state != ChildState::Gone;
        let meant = self.children.iter().find(meant).filter(|child| child.protects(agreed));
        meant.map(|child| child.id).or_else(|| self.replaced_by_theirs(agreed))
    }

    /// What a child that the peer began replaces. The peer does not say; it is the oldest in use, since of two that were
    /// begun at once neither replaces the other.
    pub(super) fn replaced_by_theirs(&self, agreed: &Agreed) -> Option<ChildId> {
        self.children.iter().find(|child| child.is_current() && child.protects(agreed)).map(|child| child.id)
    }

    /// Whether a successor of it is being made, or it is one that is: then it needs no other.
    pub(super) fn is_being_replaced(&self, id: ChildId) -> bool {
        let is_current = |id: ChildId| self.children.iter().any(|child| child.id == id && child.is_current());
        let began =
            |exchange: &PhaseTwo| matches!(&exchange.doing, Doing::Ours(ours) if ours.rekey == Some(id));
        self.exchanges.iter().any(began)
            || self.children.iter().any(|child| {
                child.is_current()
                    && child.replaces.is_some_and(|old| old == id || child.id == id && is_current(old))
            })
    }

    /// Packets are sent through a child from now on; the one that it replaces is deleted by who began.
    pub(super) fn take_into_use(&mut self, common: &Common, core: &mut Core, now: Now, id: ChildId) {
        let Some(child) = self.children.iter_mut().find(|child| child.id == id) else {
            // A successor has taken it over meanwhile.
            if core.children.contains_key(&id) {
                core.emit(common.id, Effect::Use(id));
            }
            return;
        };
        child.use_at = None;
        let (mine, replaces) = (child.mine, child.replaces);
        core.emit(common.id, Effect::Use(id));
        // Whoever began says that the old one is gone. Some never do: then this side does in the end.
        let drain = core.settings.drain;
        let delete_at = |mine| now.monotonic + if mine { drain } else { LATE * drain };
        if let Some(old) = replaces.and_then(|old| self.children.iter_mut().find(|child| child.id == old)) {
            if old.is_current() {
                (old.state, old.rekey_at) = (ChildState::Replaced, None);
            }
            if old.state == ChildState::Replaced {
                let at = delete_at(mine);
                old.delete_at = Some(old.delete_at.map_or(at, |earlier| earlier.min(at)));
            }
        }
        let Some(child) = self.children.iter().find(|child| child.id == id) else { return };
        let twin = self.children.iter().find(|other| {
            other.state == ChildState::Installed
                && other.use_at.is_none()
                && other.is_beside(child)
                && other.replaces == replaces
                && replaces.is_some()
        });
        let Some(twin) = twin else { return };
        let (keep, lose) = if twin.rank() > child.rank() { (twin.id, id) } else { (id, twin.id) };
        core.emit(common.id, Effect::Use(keep));
        if let Some(lose) = self.children.iter_mut().find(|child| child.id == lose) {
            (lose.state, lose.rekey_at) = (ChildState::Replaced, None);
            lose.delete_at = Some(delete_at(lose.mine));
        }
    }

    /// The peer has deleted `gone`, which was in use. If there is one that this side had thought replaced, then the peer
    /// keeps that. Gives why `gone` is gone.
    pub(super) fn revive(&mut self, common: &Common, core: &mut Core, now: Now, gone: &Child) -> CloseReason {
        if self.children.iter().any(|other| other.is_current() && other.is_beside(gone)) {
            return CloseReason::Replaced;
        }
        let kept = |other: &&mut Child| other.state == ChildState::Replaced && other.is_beside(gone);
        let Some(kept) = self.children.iter_mut().rfind(kept) else { return CloseReason::Peer };
        kept.state = ChildState::Installed;
        kept.delete_at = None;
        // It may be old: a new one soon, but after what the peer does by itself.
        kept.rekey_at = Some(now.monotonic + 2 * core.settings.drain);
        core.emit(common.id, Effect::Use(kept.id));
        CloseReason::Replaced
    }
}
