//! The peer was told that an IKE SA which it believes in is not to be: the Delete is repeated until it is answered.

use super::channel::{Channel, Received};
use super::{Common, State};
use crate::endpoint::{Core, Now};
use crate::message::parse::Parsed;
use crate::output::Path;

/// Only the answer to a Delete is still to come.
pub(super) struct Leaving {
    pub(super) channel: Channel,
}

impl Leaving {
    pub(super) fn receive(
        mut self: Box<Self>,
        common: &Common,
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        parsed: &Parsed<'_>,
    ) -> State {
        match self.channel.receive(now.monotonic, parsed, datagram) {
            Received::Response { .. } | Received::MalformedResponse { .. } => State::Dead,
            received => {
                common.other(core, now, path, received);
                State::Leaving(self)
            }
        }
    }

    pub(super) fn timeout(mut self: Box<Self>, common: &Common, core: &mut Core, now: Now) -> State {
        if common.repeats(core, now, &mut self.channel) { State::Leaving(self) } else { State::Dead }
    }
}
