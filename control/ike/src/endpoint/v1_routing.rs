//! The endpoint's part of IKEv1: routing by cookies, admission of first messages, succession of IKE SAs.

use super::{Endpoint, Now};
use crate::admission::Verdict;
use crate::ignored::Ignored;
use crate::message::IkeSpi;
use crate::output::{Effect, Output, Path, SaId};
use crate::report::Report;
use crate::sa::Sa;
use crate::v1::delete::DeleteContext;
use crate::v1::{self, IkeSa};

impl Endpoint {
    /// A message of version 1.
    pub(super) fn handle_v1(&mut self, now: Now, path: Path, datagram: &[u8]) {
        let (cookie_i, cookie_r) = match v1::cookies(datagram) {
            Ok(cookies) => cookies,
            Err(reason) => return self.core.ignore(now, None, path, reason),
        };
        // Nothing says which side has sent it: one of the cookies is this side's, and an SA of version 1 that has it.
        let mut own = [(cookie_r, false), (cookie_i, true)].into_iter().filter_map(|(cookie, initiator)| {
            let id = self.core.by_spi.get(&cookie).copied()?;
            let found = matches!(self.sas.get(&id), Some(Sa::V1(sa)) if sa.is_initiator() == initiator);
            found.then_some(id)
        });
        match own.next() {
            Some(id) => self.with_v1(now, id, |sa, core| sa.receive(core, now, path, datagram)),
            None if cookie_r == IkeSpi::NONE => self.first_of_v1(now, path, datagram, cookie_i),
            None => self.core.ignore(now, None, path, Ignored::UnknownSpi),
        }
    }

    /// Message 1 of phase 1, if it is one.
    fn first_of_v1(&mut self, now: Now, path: Path, datagram: &[u8], cookie_i: IkeSpi) {
        let key = (path.remote.ip(), path.remote.port(), cookie_i);
        if let Some(id) = self.core.half_open.get(&key).copied()
            && self.sas.get(&id).is_some_and(|sa| sa.was_begun_by(datagram))
        {
            return self.with(now, id, |sa, core| sa.repeat_init(core, now, path));
        }
        // IKEv1 has no cookie to ask for; but in main mode nothing is computed before message 3, which brings this side's
        // own. Where a cookie would be asked for, aggressive mode is not answered.
        let source = path.remote.ip();
        let verdict =
            self.core.admission.judge(now.monotonic, source, cookie_i, &[], None, &mut *self.core.random);
        if let Verdict::Refuse(reason) = verdict {
            return self.core.ignore(now, None, path, reason);
        }
        let busy = !matches!(verdict, Verdict::Admit);
        match IkeSa::respond(&mut self.core, now, path, datagram, busy) {
            Ok(sa) => {
                self.core.half_open.insert(key, sa.id());
                self.admit(now, sa);
            }
            Err(refusal) => {
                if let Some(answer) = refusal.answer
                    && self.core.may_answer(now)
                {
                    self.core.reply(path, answer);
                }
                if let Some(failure) = refusal.failure {
                    self.core.counters.failed += 1;
                    let report = Report::Failed { sa: SaId(0), connection: None, path, failure };
                    self.core.outputs.push_back(Output { sa: None, effect: Effect::Report(report) });
                }
                if let Some(reason) = refusal.ignored {
                    self.core.ignore(now, None, path, reason);
                }
            }
        }
    }

    /// Begins a new IKE SA where this one is, to take its place.
    pub(super) fn renew(&mut self, now: Now, sa: SaId) {
        let Some(view) = self.sas.get(&sa).map(|sa| sa.view(now)) else { return };
        let connection = view.connection.and_then(|name| self.core.connections.named(&name).cloned());
        let Some(connection) = connection.filter(|connection| connection.v1.is_some()) else { return };
        let ends = (view.path.local.ip(), view.path.remote.ip());
        let new = IkeSa::initiate(&mut self.core, now, connection, ends, Some(view.path), Vec::new());
        self.admit(now, new);
    }

    /// One IKE SA takes over the children of another.
    pub(super) fn succeed(&mut self, now: Now, from: SaId, to: SaId, mine: bool) {
        if !self.sas.contains_key(&to) {
            return;
        }
        let mut estate = None;
        self.with_v1(now, from, |sa, _| estate = sa.hand_over(now, to, mine));
        if let Some(estate) = estate {
            self.with_v1(now, to, |sa, core| sa.inherit(core, now, estate));
        }
    }

    /// RST-5: what a Delete of an established IKE SA of version 1 is built from.
    pub fn delete_context(&self, sa: SaId) -> Option<DeleteContext> {
        match self.sas.get(&sa)? {
            Sa::V1(sa) => sa.saved(),
            Sa::V2(_) => None,
        }
    }

    /// Lets a handler of one SA of version 1 work; another one is left alone.
    pub(super) fn with_v1(&mut self, now: Now, id: SaId, handler: impl FnOnce(&mut IkeSa, &mut super::Core)) {
        self.with(now, id, |sa, core| {
            if let Some(sa) = sa.v1() {
                handler(sa, core);
            }
        });
    }
}
