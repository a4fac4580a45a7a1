//! One IKE SA of version 2: a state a struct, each owned by its handler, and the exchanges of RFC 7296.
//!
//! ```text
//! initiator: Opening ─(IKE_SA_INIT)─► Agreeing ─► Exchanging* ─► Authenticating ─(IKE_AUTH)─► Established ─► Dead
//! responder: Answering ─► HalfOpen* ────────────────────────────(IKE_AUTH)─────────────────► Established ─► Dead
//! ```
//!
//! A handler verifies first and changes the SA afterwards; what a peer sends that does not fit leaves the SA as it was.

mod agree;
mod auth_initiator;
mod auth_responder;
pub mod channel;
mod child;
mod create_child;
mod established;
mod followup;
mod half_open;
mod informational;
mod init;
mod leaving;
mod mobike;
mod nat;
mod opening;
pub mod reassembly;
mod rekey_ike;
mod restore;
mod saving;

use core::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

pub(crate) use self::established::{Estate, PeerSa};

use self::auth_initiator::Authenticating;
use self::channel::{Channel, Datagrams, Expired};
use self::established::Established;
use self::half_open::HalfOpen;
use self::leaving::Leaving;
use self::nat::Nat;
use self::opening::{Agreeing, Exchanging, Opening};
use crate::config::Connection;
use crate::connections::Connections;
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, JobId};
use crate::message::parse::Parsed;
use crate::message::registry::HashId;
use crate::message::{Head, IkeSpi};
use crate::output::{ChildId, Effect, IkeSaView, Path, SaId};
use crate::report::{CloseReason, Failure, Report};

/// An IKE SA in any state.
pub struct IkeSa {
    common: Common,
    state: State,
}

/// What every state has.
pub(crate) struct Common {
    pub(crate) id: SaId,
    /// This side began it: the original initiator.
    pub(crate) initiator: bool,
    pub(crate) spi_i: IkeSpi,
    pub(crate) spi_r: IkeSpi,
    pub(crate) path: Path,
    /// Known to the initiator from the start, to the responder from IKE_AUTH on.
    pub(crate) connection: Option<Arc<Connection>>,
    pub(crate) nat: Nat,
    pub(crate) peer: Abilities,
    /// When it began.
    pub(crate) born: Instant,
    /// It counts as half-open, of this source.
    pub(crate) admitted: Option<IpAddr>,
}

/// What the peer said that it can.
#[derive(Clone, Debug, Default)]
pub(crate) struct Abilities {
    /// RFC 7383.
    pub(crate) fragmentation: bool,
    /// RFC 7427: it takes these hash algorithms.
    pub(crate) hashes: Vec<HashId>,
    /// RFC 6023.
    pub(crate) childless: bool,
    /// RFC 4555.
    pub(crate) mobike: bool,
}

enum State {
    Opening(Box<Opening>),
    Agreeing(Box<Agreeing>),
    Exchanging(Box<Exchanging>),
    Authenticating(Box<Authenticating>),
    Answering(Box<init::Answering>),
    HalfOpen(Box<HalfOpen>),
    Established(Box<Established>),
    Leaving(Box<Leaving>),
    Dead,
}

/// Something an established IKE SA is to do when it is its turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Make a CHILD_SA, by its index in the configuration.
    CreateChild(usize),
    /// Rekey a CHILD_SA.
    RekeyChild(ChildId),
    /// Delete a CHILD_SA.
    DeleteChild(ChildId),
    /// Rekey the IKE SA.
    RekeyIke,
    /// Delete the IKE SA.
    DeleteIke(CloseReason),
    /// See whether the peer is alive.
    CheckPeer,
    /// RFC 4555: tell the peer the addresses.
    UpdateAddresses,
    /// RFC 6290: the peer gets this side's token.
    GiveToken,
}

/// What a handler makes of the state.
type Next = Result<State, Failed>;

/// An IKE SA comes to its end before it is established.
struct Failed {
    failure: Failure,
    /// What goes to the peer first.
    answer: Option<Datagrams>,
    /// `answer` is a request, which is to be repeated until the peer has understood.
    leaving: Option<Box<Leaving>>,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { failure, answer: None, leaving: None }
    }
}

impl Common {
    /// The SPI that this side chose.
    pub(crate) const fn local_spi(&self) -> IkeSpi {
        if self.initiator { self.spi_i } else { self.spi_r }
    }

    /// Sends datagrams to where the peer is.
    pub(crate) fn send(&self, core: &mut Core, datagrams: &Datagrams) {
        self.send_to(core, self.path, datagrams);
    }

    /// Sends datagrams along another path.
    pub(crate) fn send_to(&self, core: &mut Core, path: Path, datagrams: &Datagrams) {
        for datagram in datagrams {
            core.emit(self.id, Effect::Transmit { path, datagram: datagram.clone() });
        }
    }

    /// Sends the channel's request again when it is time. False: it was sent as often as it may be, the peer is dead.
    fn repeats(&self, core: &mut Core, now: Now, channel: &mut Channel) -> bool {
        match channel.expire(now.monotonic, &mut *core.random) {
            Some(Expired::Resend(datagrams)) => {
                core.counters.retransmitted += 1;
                self.send(core, &datagrams);
                true
            }
            Some(Expired::Dead) => false,
            None => true,
        }
    }

    /// UDP encapsulation of children: ports of this side and of the peer.
    pub(crate) fn encap(&self) -> Option<(u16, u16)> {
        let forced = self.connection.as_ref().is_some_and(|connection| connection.force_encap);
        (self.path.natt && (self.nat.any() || forced))
            .then(|| (self.path.local.port(), self.path.remote.port()))
    }
}

impl IkeSa {
    /// Its name.
    pub(crate) const fn id(&self) -> SaId {
        self.common.id
    }

    /// The SPI that this side chose.
    pub(crate) const fn local_spi(&self) -> IkeSpi {
        self.common.local_spi()
    }

    /// Under what its first message was found, as responder.
    pub(crate) fn half_open_key(&self) -> Option<(IpAddr, u16, IkeSpi)> {
        match &self.state {
            State::Answering(state) => Some(state.key),
            State::HalfOpen(state) => Some(state.key),
            State::Established(state) => state.half_open_key,
            _ => None,
        }
    }

    /// Whether it can be removed.
    pub(crate) const fn is_dead(&self) -> bool {
        matches!(self.state, State::Dead)
    }

    /// Whether it is neither dead nor on its way there.
    pub(crate) fn is_live(&self) -> bool {
        match &self.state {
            State::Dead | State::Leaving(_) => false,
            State::Authenticating(state) => !state.is_cancelled(),
            State::Established(state) => !state.is_closing(),
            _ => true,
        }
    }

    /// Whether it belongs to this connection.
    pub(crate) fn is_of(&self, connection: &str) -> bool {
        self.common.connection.as_ref().is_some_and(|found| &*found.name == connection)
    }

    /// Whether children of this connection can be made in it, now or once it is established.
    pub(crate) fn is_usable_for(&self, connection: &str) -> bool {
        self.is_of(connection) && self.is_live()
    }

    /// Whether its connection is gone or is another one now.
    pub(crate) fn is_outdated(&self, connections: &Connections) -> bool {
        let Some(connection) = &self.common.connection else { return false };
        connections
            .named(&connection.name)
            .is_none_or(|current| current.fingerprint != connection.fingerprint)
    }

    /// Takes over the object of the same connection, so that the old one can go.
    pub(crate) fn adopt(&mut self, connections: &Connections) {
        if let Some(connection) = &mut self.common.connection
            && let Some(current) = connections.named(&connection.name)
            && current.fingerprint == connection.fingerprint
        {
            *connection = Arc::clone(current);
        }
    }

    /// Whether this very message began it.
    pub(crate) fn was_begun_by(&self, request: &[u8]) -> bool {
        match &self.state {
            State::Answering(state) => state.request == request,
            State::HalfOpen(state) => state.keyed.init_request == request,
            _ => false,
        }
    }

    /// The first message came again: so does the answer.
    pub(crate) fn repeat_init(&mut self, core: &mut Core, now: Now, path: Path) {
        match &self.state {
            State::HalfOpen(state) => {
                let datagram = state.keyed.init_response.clone();
                core.emit(self.common.id, Effect::Transmit { path, datagram });
                core.ignore(now, Some(self.common.id), path, Ignored::Duplicate);
            }
            _ => core.ignore(now, Some(self.common.id), path, Ignored::Busy),
        }
    }

    /// A datagram with this SA's SPI arrived.
    pub(crate) fn receive(
        &mut self,
        core: &mut Core,
        now: Now,
        path: Path,
        datagram: &[u8],
        parsed: &Parsed<'_>,
    ) {
        let Head { spi_i, spi_r, from_initiator, .. } = parsed.head;
        let ignore = |core: &mut Core, reason| core.ignore(now, Some(self.common.id), path, reason);
        if from_initiator == self.common.initiator {
            return ignore(core, Ignored::Flags);
        }
        // Until IKE_SA_INIT is answered, the responder's SPI is not known.
        let known = self.common.spi_r != IkeSpi::NONE;
        if spi_i != self.common.spi_i || (known && spi_r != self.common.spi_r) {
            return ignore(core, Ignored::UnknownSpi);
        }
        let common = &mut self.common;
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Opening(state) => {
                let next = state.receive(common, core, now, path, datagram, parsed);
                self.proceed(core, next);
            }
            State::Exchanging(state) => {
                let next = state.receive(common, core, now, path, datagram, parsed);
                self.proceed(core, next);
            }
            State::Authenticating(state) => {
                let next = state.receive(common, core, now, path, datagram, parsed);
                self.proceed(core, next);
            }
            State::HalfOpen(state) => {
                let next = state.receive(common, core, now, path, datagram, parsed);
                self.proceed(core, next);
            }
            State::Established(mut state) => {
                let alive = state.receive(common, core, now, path, datagram, parsed);
                self.go_on(core, alive, state);
            }
            State::Leaving(state) => {
                self.state = state.receive(common, core, now, path, datagram, parsed);
            }
            state @ (State::Agreeing(_) | State::Answering(_) | State::Dead) => {
                self.state = state;
                core.ignore(now, Some(self.common.id), path, Ignored::Busy);
            }
        }
    }

    /// A job of this SA is done.
    pub(crate) fn computed(&mut self, core: &mut Core, now: Now, id: JobId, done: Done) {
        let common = &mut self.common;
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Opening(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Agreeing(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Exchanging(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Authenticating(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Answering(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::HalfOpen(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Established(mut state) => {
                let alive = state.computed(common, core, now, id, done);
                self.go_on(core, alive, state);
            }
            state @ (State::Leaving(_) | State::Dead) => self.state = state,
        }
    }

    /// Its deadline has come.
    pub(crate) fn timeout(&mut self, core: &mut Core, now: Now) {
        let common = &mut self.common;
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Opening(state) => {
                let next = state.timeout(common, core, now);
                self.proceed(core, next);
            }
            State::Exchanging(state) => {
                let next = state.timeout(common, core, now);
                self.proceed(core, next);
            }
            State::Authenticating(state) => {
                let next = state.timeout(common, core, now);
                self.proceed(core, next);
            }
            State::HalfOpen(state) if state.deadline <= now.monotonic => {
                self.proceed(core, Err(Failure::Timeout.into()));
                drop(state);
            }
            State::Established(mut state) => {
                let alive = state.timeout(common, core, now);
                self.go_on(core, alive, state);
            }
            State::Leaving(state) => self.state = state.timeout(common, core, now),
            state => self.state = state,
        }
    }

    /// When [`timeout`](Self::timeout) is to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Opening(state) => state.deadline(),
            State::Exchanging(state) => state.keyed.channel.deadline(),
            State::Authenticating(state) => state.keyed.channel.deadline(),
            State::HalfOpen(state) => Some(state.deadline),
            State::Established(state) => state.deadline(),
            State::Leaving(state) => state.channel.deadline(),
            State::Agreeing(_) | State::Answering(_) | State::Dead => None,
        }
    }

    fn proceed(&mut self, core: &mut Core, next: Next) {
        match next {
            Ok(state) => {
                if let (State::Established(_), Some(source)) = (&state, self.common.admitted) {
                    core.admission.closed(source);
                    self.common.admitted = None;
                }
                self.state = state;
            }
            Err(Failed { failure, answer, leaving }) => {
                if let Some(answer) = &answer {
                    self.common.send(core, answer);
                }
                self.fail(core, failure);
                if let Some(leaving) = leaving {
                    self.state = State::Leaving(leaving);
                }
            }
        }
    }

    fn go_on(&mut self, core: &mut Core, alive: established::Alive, state: Box<Established>) {
        match alive {
            established::Alive::Yes => self.state = State::Established(state),
            established::Alive::No(reason) => state.end(&self.common, core, reason),
        }
    }

    /// It does not come up.
    fn fail(&mut self, core: &mut Core, failure: Failure) {
        self.state = State::Dead;
        core.counters.failed += 1;
        if let Some(source) = self.common.admitted.take() {
            core.admission.closed(source);
        }
        let Common { id, ref connection, path, .. } = self.common;
        let connection = connection.as_ref().map(|connection| Arc::clone(&connection.name));
        core.report(id, Report::Failed { sa: id, connection, path, failure });
    }

    /// Drops it without a word: the peer has forgotten it.
    pub(crate) fn drop_silently(&mut self, core: &mut Core, reason: CloseReason) {
        if let State::Established(state) = std::mem::replace(&mut self.state, State::Dead) {
            state.end(&self.common, core, reason);
        }
    }

    /// Closes it: an established one says so to the peer, any other is dropped.
    pub(crate) fn close(&mut self, core: &mut Core, now: Now, reason: CloseReason) {
        match &mut self.state {
            State::Established(state) => state.close(&mut self.common, core, now, reason),
            State::Leaving(_) | State::Dead => {}
            State::Authenticating(state) => {
                if !state.cancel(core, reason) {
                    self.fail(core, Failure::of_closing(reason));
                }
            }
            _ => self.fail(core, Failure::of_closing(reason)),
        }
    }

    /// Makes a child, now or when the IKE SA is established, unless there is one.
    pub(crate) fn want_child(&mut self, core: &mut Core, now: Now, index: usize) {
        match &mut self.state {
            State::Established(state) => {
                if !state.has_child(index) {
                    state.enqueue(&mut self.common, core, now, Task::CreateChild(index));
                }
            }
            State::Opening(state) => add(&mut state.wanted, index),
            State::Agreeing(state) => add(&mut state.wanted, index),
            State::Exchanging(state) => add(&mut state.wanted, index),
            State::Authenticating(state) => add(&mut state.wanted, index),
            State::Answering(_) | State::HalfOpen(_) | State::Leaving(_) | State::Dead => {}
        }
    }

    /// Does something when it is its turn.
    pub(crate) fn enqueue(&mut self, core: &mut Core, now: Now, task: Task) {
        if let State::Established(state) = &mut self.state {
            state.enqueue(&mut self.common, core, now, task);
        }
    }

    /// A child was installed, or could not be.
    pub(crate) fn installed(
        &mut self,
        core: &mut Core,
        now: Now,
        child: ChildId,
        result: Result<(), String>,
    ) {
        if let State::Established(state) = &mut self.state {
            state.installed(&mut self.common, core, now, child, result);
        }
    }

    /// A child stopped at a hard limit.
    pub(crate) fn expired(&mut self, core: &mut Core, now: Now, child: ChildId) {
        if let State::Established(state) = &mut self.state {
            state.expired(&mut self.common, core, now, child);
        }
    }

    /// The datapath has lost a child.
    pub(crate) fn lost(&mut self, core: &mut Core, now: Now, child: ChildId) {
        if let State::Established(state) = &mut self.state {
            state.lost(&mut self.common, core, now, child);
        }
    }

    /// MOB-2: the peer's packets come from elsewhere.
    pub(crate) fn peer_moved(&mut self, core: &mut Core, remote: IpAddr, port: Option<u16>) {
        if let State::Established(state) = &self.state {
            state.peer_moved(&mut self.common, core, remote, port);
        }
    }

    /// This machine's addresses changed.
    pub(crate) fn addresses_changed(&mut self, core: &mut Core, now: Now, addresses: &[IpAddr]) {
        if let State::Established(state) = &mut self.state {
            state.addresses_changed(&mut self.common, core, now, addresses);
        }
    }

    /// Its children of this name.
    pub(crate) fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = ChildId> + 'a {
        let state = match &self.state {
            State::Established(state) => Some(state),
            _ => None,
        };
        state.into_iter().flat_map(|state| state.children_named(name))
    }

    /// Its protected messages, if it has keys.
    #[cfg(any(test, feature = "exercise"))]
    pub(crate) fn channel(&mut self) -> Option<&mut channel::Channel> {
        match &mut self.state {
            State::Exchanging(state) => Some(&mut state.keyed.channel),
            State::Authenticating(state) => Some(&mut state.keyed.channel),
            State::HalfOpen(state) => Some(&mut state.keyed.channel),
            State::Established(state) => Some(&mut state.channel),
            State::Leaving(state) => Some(&mut state.channel),
            State::Opening(_) | State::Agreeing(_) | State::Answering(_) | State::Dead => None,
        }
    }

    /// For showing.
    pub(crate) fn view(&self, now: Now) -> IkeSaView {
        let Common { id, initiator, spi_i, spi_r, path, ref connection, born, .. } = self.common;
        let mut view = IkeSaView {
            id,
            connection: connection.as_ref().map(|connection| Arc::clone(&connection.name)),
            spis: (spi_i, spi_r),
            initiator,
            state: "connecting",
            path,
            local_id: connection.as_ref().map(|connection| connection.local_id.to_string()),
            remote_id: None,
            suite: String::new(),
            age: now.monotonic.saturating_duration_since(born),
            rekey_in: None,
            addresses: Vec::new(),
            children: Vec::new(),
        };
        if let State::Established(state) = &self.state {
            state.show(&self.common, now, &mut view);
        }
        view
    }
}

fn add(wanted: &mut Vec<usize>, index: usize) {
    if !wanted.contains(&index) {
        wanted.push(index);
    }
}
