//! An IKE SA of either version: what the endpoint asks of any. The two have no trait in common; what one of them does not
//! have, it does not do.

use core::net::IpAddr;
use std::time::Instant;

use crate::connections::Connections;
use crate::endpoint::{Core, Now};
use crate::job::{Done, JobId};
use crate::message::IkeSpi;
use crate::output::{ChildId, IkeSaView, Path, SaId};
use crate::report::CloseReason;
use crate::v2::Task;
use crate::{v1, v2};

/// An IKE SA.
pub(crate) enum Sa {
    V1(v1::IkeSa),
    V2(v2::IkeSa),
}

impl From<v1::IkeSa> for Sa {
    fn from(sa: v1::IkeSa) -> Self {
        Self::V1(sa)
    }
}

impl From<v2::IkeSa> for Sa {
    fn from(sa: v2::IkeSa) -> Self {
        Self::V2(sa)
    }
}

/// Asks whichever it is.
macro_rules! either {
    ($this:expr, $sa:ident => $answer:expr) => {
        match $this {
            Sa::V1($sa) => $answer,
            Sa::V2($sa) => $answer,
        }
    };
}

impl Sa {
    pub(crate) const fn id(&self) -> SaId {
        either!(self, sa => sa.id())
    }

    pub(crate) const fn local_spi(&self) -> IkeSpi {
        either!(self, sa => sa.local_spi())
    }

    pub(crate) fn half_open_key(&self) -> Option<(IpAddr, u16, IkeSpi)> {
        either!(self, sa => sa.half_open_key())
    }

    pub(crate) const fn is_dead(&self) -> bool {
        either!(self, sa => sa.is_dead())
    }

    pub(crate) fn is_live(&self) -> bool {
        either!(self, sa => sa.is_live())
    }

    pub(crate) fn is_of(&self, connection: &str) -> bool {
        either!(self, sa => sa.is_of(connection))
    }

    pub(crate) fn is_usable_for(&self, connection: &str) -> bool {
        either!(self, sa => sa.is_usable_for(connection))
    }

    pub(crate) fn is_outdated(&self, connections: &Connections) -> bool {
        either!(self, sa => sa.is_outdated(connections))
    }

    pub(crate) fn adopt(&mut self, connections: &Connections) {
        either!(self, sa => sa.adopt(connections));
    }

    pub(crate) fn was_begun_by(&self, request: &[u8]) -> bool {
        either!(self, sa => sa.was_begun_by(request))
    }

    pub(crate) fn repeat_init(&mut self, core: &mut Core, now: Now, path: Path) {
        either!(self, sa => sa.repeat_init(core, now, path));
    }

    pub(crate) fn computed(&mut self, core: &mut Core, now: Now, id: JobId, done: Done) {
        either!(self, sa => sa.computed(core, now, id, done));
    }

    pub(crate) fn timeout(&mut self, core: &mut Core, now: Now) {
        either!(self, sa => sa.timeout(core, now));
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        either!(self, sa => sa.deadline())
    }

    pub(crate) fn drop_silently(&mut self, core: &mut Core, reason: CloseReason) {
        either!(self, sa => sa.drop_silently(core, reason));
    }

    pub(crate) fn close(&mut self, core: &mut Core, now: Now, reason: CloseReason) {
        either!(self, sa => sa.close(core, now, reason));
    }

    pub(crate) fn want_child(&mut self, core: &mut Core, now: Now, index: usize) {
        either!(self, sa => sa.want_child(core, now, index));
    }

    pub(crate) fn enqueue(&mut self, core: &mut Core, now: Now, task: Task) {
        match self {
            Self::V1(sa) => sa.enqueue(core, now, &task),
            Self::V2(sa) => sa.enqueue(core, now, task),
        }
    }

    pub(crate) fn installed(
        &mut self,
        core: &mut Core,
        now: Now,
        child: ChildId,
        result: Result<(), String>,
    ) {
        either!(self, sa => sa.installed(core, now, child, result));
    }

    pub(crate) fn expired(&mut self, core: &mut Core, now: Now, child: ChildId) {
        either!(self, sa => sa.expired(core, now, child));
    }

    pub(crate) fn lost(&mut self, core: &mut Core, now: Now, child: ChildId) {
        either!(self, sa => sa.lost(core, now, child));
    }

    pub(crate) fn peer_moved(&mut self, core: &mut Core, remote: IpAddr, port: Option<u16>) {
        either!(self, sa => sa.peer_moved(core, remote, port));
    }

    pub(crate) fn addresses_changed(&mut self, core: &mut Core, now: Now, addresses: &[IpAddr]) {
        // IKEv1 cannot move: what is wrong is found out by R-U-THERE, and a new IKE SA is begun.
        if let Self::V2(sa) = self {
            sa.addresses_changed(core, now, addresses);
        }
    }

    pub(crate) fn children_named<'a>(&'a self, name: &'a str) -> Box<dyn Iterator<Item = ChildId> + 'a> {
        match self {
            Self::V1(sa) => Box::new(sa.children_named(name)),
            Self::V2(sa) => Box::new(sa.children_named(name)),
        }
    }

    pub(crate) fn view(&self, now: Now) -> IkeSaView {
        either!(self, sa => sa.view(now))
    }

    /// The IKE SA, if it is of version 2.
    pub(crate) const fn v2(&mut self) -> Option<&mut v2::IkeSa> {
        match self {
            Self::V2(sa) => Some(sa),
            Self::V1(_) => None,
        }
    }

    /// The IKE SA, if it is of version 1.
    pub(crate) const fn v1(&mut self) -> Option<&mut v1::IkeSa> {
        match self {
            Self::V1(sa) => Some(sa),
            Self::V2(_) => None,
        }
    }
}
