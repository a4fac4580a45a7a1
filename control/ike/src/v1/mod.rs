//! IKEv1 (RFC 2407, 2408 and 2409) beside IKEv2: an IKE SA of version 1 in its states.
//!
//! ```text
//! initiator: Initiating (main mode 1, 3, 5) ─► Established ─► Dead
//! responder: Responding (main mode 2, 4, 6) ─► Established ─► Dead
//! ```
//!
//! Established, each exchange has a message ID and an IV of its own: Quick Mode for children, Transaction for XAuth and
//! mode-config, Informational for deletes, notifications and liveness. A message is believed when its HASH payload is
//! right; then the state, and the IV, change. IKEv1 cannot rekey an IKE SA: a new one is begun, and takes over the children
//! (`succession`).

mod aggressive;
mod child;
pub mod cipher;
mod crossing;
pub mod delete;
mod established;
mod fragments;
pub mod hash;
mod informational;
mod initiator;
mod keys;
mod message;
mod nat;
mod phase1;
mod proposal;
mod quick;
mod recent;
mod responder;
mod succession;
mod transaction;

use core::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use self::fragments::Fragments;
pub(crate) use self::succession::Estate;

use self::delete::DeleteContext;
use self::established::{Alive, Established};
use self::initiator::Initiating;
use self::message::parse;
use self::message::{Head, Kind};
use self::responder::Responding;
use crate::auth::signature::KeyKind;
use crate::config::{Connection, LocalAuth, V1};
use crate::connections::Connections;
use crate::endpoint::{Core, Now};
use crate::ignored::Ignored;
use crate::job::{Done, JobId};
use crate::message::IkeSpi;
use crate::message::registry::NotifyType;
use crate::output::{ChildId, Effect, IkeSaView, Path, SaId};
use crate::report::{CloseReason, Failure, Report};
use crate::v2::Task;
use crate::v2::channel::Datagrams;

pub(crate) use self::nat::Nat;

/// What the fuzz target `ike1_message` calls.
///
/// # Panics
/// When reading and writing a message do not agree.
pub fn fuzz_message(bytes: &[u8]) {
    message::fuzz(bytes);
}

/// Why a connection cannot be one of IKEv1, if so.
pub fn unusable(connection: &Connection) -> Option<&'static str> {
    let Some(method) = phase1::method(connection) else {
        return Some(
            "with version = 1 both sides authenticate alike: method = \"psk\" here and there, or \"certificate\"; \
             a password is `xauth`",
        );
    };
    if proposal::configured_phase_1(&connection.proposals, method).is_empty() {
        return Some(
            "no proposal is one of IKEv1, which has aes128, aes192 and aes256 with sha1, sha256, sha384 or sha512 and \
             modp2048, modp3072, modp4096, ecp256 or ecp384",
        );
    }
    if let LocalAuth::Certificate { key, .. } = &connection.local_auth
        && key.kind() != KeyKind::Rsa
    {
        return Some("with version = 1 a certificate needs an RSA key");
    }
    let lacks = |child: &crate::config::Child| proposal::configured_child(&child.proposals).is_empty();
    if connection.children.iter().any(lacks) {
        return Some("a child has no proposal for IKEv1, which has no ChaCha20-Poly1305 and no X25519");
    }
    let aggressive = connection.v1.as_ref().is_some_and(|v1| v1.aggressive);
    if aggressive && !proposal::is_of_one_group(&proposal::configured_phase_1(&connection.proposals, method))
    {
        return Some(
            "in aggressive mode all proposals have to be of one group, which the first message decides",
        );
    }
    if connection.children.iter().any(|child| child.local_ts.len() > 1 || child.remote_ts.len() > 1) {
        return Some(
            "with version = 1 a child has one network on each side; make them children of their own",
        );
    }
    None
}

/// The cookies of a message of version 1 whose header is whole: which IKE SA it belongs to.
pub(crate) fn cookies(datagram: &[u8]) -> Result<(IkeSpi, IkeSpi), Ignored> {
    parse::message(datagram).map(|(head, ..)| (head.cookie_i, head.cookie_r))
}

/// An IKE SA of version 1 in any state.
pub struct IkeSa {
    common: Common,
    state: State,
}

/// What every state has.
pub(crate) struct Common {
    pub(crate) id: SaId,
    pub(crate) initiator: bool,
    pub(crate) cookie_i: IkeSpi,
    pub(crate) cookie_r: IkeSpi,
    pub(crate) path: Path,
    /// Known to the initiator from the start, to the responder once the peer has said who it is.
    pub(crate) connection: Option<Arc<Connection>>,
    pub(crate) nat: Nat,
    pub(crate) peer: Abilities,
    pub(crate) born: Instant,
    /// It counts as half-open, of this source.
    pub(crate) admitted: Option<IpAddr>,
    /// Of a message that is coming in.
    pub(crate) fragments: Fragments,
}

/// What the peer's vendor IDs say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Abilities {
    /// RFC 3706.
    pub(crate) dpd: bool,
    /// RFC 3947.
    pub(crate) nat_t: bool,
    /// It takes messages in fragments.
    pub(crate) fragments: bool,
}

enum State {
    Initiating(Box<Initiating>),
    Responding(Box<Responding>),
    Established(Box<Established>),
    Dead,
}

/// What a handler makes of the state.
type Next = Result<State, Failure>;

impl Common {
    /// The cookie that this side chose.
    pub(crate) const fn own_cookie(&self) -> IkeSpi {
        if self.initiator { self.cookie_i } else { self.cookie_r }
    }

    /// Sends datagrams to where the peer is.
    pub(crate) fn send(&self, core: &mut Core, datagrams: &Datagrams) {
        self.send_to(core, self.path, datagrams);
    }

    /// Sends datagrams along another path.
    pub(crate) fn send_to(&self, core: &mut Core, path: Path, datagrams: &Datagrams) {
        let wanted = self.connection.as_ref().is_none_or(|connection| connection.fragmentation);
        // UDP and IP come before it, and on 4500 four zeros.
        let before = if path.remote.is_ipv4() { 28 } else { 48 } + if path.natt { 4 } else { 0 };
        let limit = usize::from(core.settings.fragment_size).saturating_sub(before);
        for datagram in datagrams {
            if self.peer.fragments && wanted {
                for datagram in fragments::split(datagram, limit) {
                    core.emit(self.id, Effect::Transmit { path, datagram });
                }
            } else {
                core.emit(self.id, Effect::Transmit { path, datagram: datagram.clone() });
            }
        }
    }

    /// Both cookies, as the SPI of an IKE SA.
    pub(crate) fn cookies(&self) -> Vec<u8> {
        [self.cookie_i.0.to_be_bytes(), self.cookie_r.0.to_be_bytes()].concat()
    }

    /// UDP encapsulation of children: ports of this side and of the peer.
    pub(crate) fn encap(&self) -> Option<(u16, u16)> {
        (self.path.natt && self.nat.any()).then(|| (self.path.local.port(), self.path.remote.port()))
    }

    /// What is configured of version 1.
    pub(crate) fn v1(&self) -> Option<&V1> {
        self.connection.as_ref().and_then(|connection| connection.v1.as_ref())
    }

    pub(crate) fn ignore(&self, core: &mut Core, now: Now, path: Path, reason: Ignored) {
        core.ignore(now, Some(self.id), path, reason);
    }
}

impl IkeSa {
    /// Its name.
    pub(crate) const fn id(&self) -> SaId {
        self.common.id
    }

    /// The cookie that this side chose.
    pub(crate) const fn local_spi(&self) -> IkeSpi {
        self.common.own_cookie()
    }

    /// Whether this side began it.
    pub(crate) const fn is_initiator(&self) -> bool {
        self.common.initiator
    }

    /// Under what its first message was found, as responder.
    pub(crate) fn half_open_key(&self) -> Option<(IpAddr, u16, IkeSpi)> {
        match &self.state {
            State::Responding(state) => Some(state.key),
            State::Established(state) => state.half_open_key,
            _ => None,
        }
    }

    /// Whether it can be removed.
    pub(crate) const fn is_dead(&self) -> bool {
        matches!(self.state, State::Dead)
    }

    /// Whether it is neither dead nor replaced.
    pub(crate) fn is_live(&self) -> bool {
        match &self.state {
            State::Dead => false,
            State::Established(state) => state.successor.is_none(),
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

    /// RST-5: what a Delete of it is built from, once it is established; what is saved for after a reset.
    pub fn saved(&self) -> Option<DeleteContext> {
        match &self.state {
            State::Established(state) => Some(state.saved(&self.common)),
            _ => None,
        }
    }

    /// A datagram with its cookies arrived.
    pub(crate) fn receive(&mut self, core: &mut Core, now: Now, path: Path, datagram: &[u8]) {
        let (head, first, body) = match parse::message(datagram) {
            Ok(read) => read,
            Err(reason) => return self.common.ignore(core, now, path, reason),
        };
        let known = self.common.cookie_r != IkeSpi::NONE && head.cookie_r != IkeSpi::NONE;
        if head.cookie_i != self.common.cookie_i || (known && head.cookie_r != self.common.cookie_r) {
            return self.common.ignore(core, now, path, Ignored::UnknownSpi);
        }
        if first == Kind::FRAGMENT {
            return match self.common.fragments.take(body) {
                Ok(Some(whole)) if !fragments::is_one(&whole) => self.receive(core, now, path, &whole),
                Ok(Some(_)) => self.common.ignore(core, now, path, Ignored::Fragment),
                Ok(None) => {}
                Err(reason) => self.common.ignore(core, now, path, reason),
            };
        }
        let arrived = Arrived { path, datagram, head, first, body };
        let common = &mut self.common;
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Initiating(state) => {
                let next = state.receive(common, core, now, &arrived);
                self.proceed(core, next);
            }
            State::Responding(state) => {
                let next = state.receive(common, core, now, &arrived);
                self.proceed(core, next);
            }
            State::Established(mut state) => {
                let alive = state.receive(common, core, now, &arrived);
                self.go_on(core, alive, state);
            }
            State::Dead => {}
        }
    }

    /// A job of this SA is done.
    pub(crate) fn computed(&mut self, core: &mut Core, now: Now, id: JobId, done: Done) {
        let common = &mut self.common;
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Initiating(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Responding(state) => {
                let next = state.computed(common, core, now, done);
                self.proceed(core, next);
            }
            State::Established(mut state) => {
                state.computed(common, core, now, id, done);
                self.state = State::Established(state);
            }
            State::Dead => {}
        }
    }

    /// Its deadline has come.
    pub(crate) fn timeout(&mut self, core: &mut Core, now: Now) {
        let common = &mut self.common;
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Initiating(state) => {
                let next = state.timeout(common, core, now);
                self.proceed(core, next);
            }
            State::Responding(state) if state.deadline <= now.monotonic => {
                drop(state);
                self.proceed(core, Err(Failure::Timeout));
            }
            State::Established(mut state) => {
                let alive = state.timeout(common, core, now);
                self.go_on(core, alive, state);
            }
            state => self.state = state,
        }
    }

    /// When [`timeout`](Self::timeout) is to be called.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Initiating(state) => state.deadline(),
            State::Responding(state) => Some(state.deadline),
            State::Established(state) => state.deadline(),
            State::Dead => None,
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
            Err(failure) => self.fail(core, failure),
        }
    }

    fn go_on(&mut self, core: &mut Core, alive: Alive, state: Box<Established>) {
        match alive {
            Alive::Yes => self.state = State::Established(state),
            Alive::No(reason) => state.end(&self.common, core, reason),
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

    /// Closes it: an established one says so to the peer, which does not answer; any other is dropped.
    pub(crate) fn close(&mut self, core: &mut Core, now: Now, reason: CloseReason) {
        match std::mem::replace(&mut self.state, State::Dead) {
            State::Established(mut state) => {
                state.say_goodbye(&self.common, core, now);
                state.end(&self.common, core, reason);
            }
            State::Dead => {}
            _ => self.fail(core, Failure::of_closing(reason)),
        }
    }

    /// Makes a child, now or when the IKE SA is established, unless there is one.
    pub(crate) fn want_child(&mut self, core: &mut Core, now: Now, index: usize) {
        match &mut self.state {
            State::Established(state) => state.want_child(&mut self.common, core, now, index),
            State::Initiating(state) => {
                if !state.wanted.contains(&index) {
                    state.wanted.push(index);
                }
            }
            State::Responding(_) | State::Dead => {}
        }
    }

    /// Does something at once: IKEv1 has no window.
    pub(crate) fn enqueue(&mut self, core: &mut Core, now: Now, task: &Task) {
        if let Task::DeleteIke(reason) = task {
            return self.close(core, now, *reason);
        }
        if let State::Established(state) = &mut self.state {
            state.perform(&mut self.common, core, now, task);
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
            state.installed(&self.common, core, now, child, result);
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
        self.enqueue(core, now, &Task::RekeyChild(child));
    }

    /// MOB-2: the peer's packets come from elsewhere.
    pub(crate) fn peer_moved(&mut self, core: &mut Core, remote: IpAddr, port: Option<u16>) {
        if let State::Established(state) = &self.state {
            let port = port.unwrap_or(self.common.path.remote.port());
            let path = Path { remote: core::net::SocketAddr::new(remote, port), ..self.common.path };
            if self.common.path != path && !self.common.initiator {
                self.common.path = path;
                state.persist(&self.common, core);
                core.report(self.common.id, Report::Moved { sa: self.common.id, path });
            }
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

    /// Gives up its children to a successor; `mine`: this side began that one, and deletes this one.
    pub(crate) fn hand_over(&mut self, now: Now, successor: SaId, mine: bool) -> Option<Estate> {
        match &mut self.state {
            State::Established(state) => Some(state.hand_over(&self.common, now, successor, mine)),
            _ => None,
        }
    }

    /// Takes over the children of a predecessor.
    pub(crate) fn inherit(&mut self, core: &mut Core, now: Now, estate: Estate) {
        if let State::Established(state) = &mut self.state {
            state.inherit(&mut self.common, core, now, estate);
        }
    }

    /// The peer said in another IKE SA, which this one replaced, that these children are gone.
    pub(crate) fn peer_deleted(&mut self, core: &mut Core, now: Now, spis: &[u32]) {
        if let State::Established(state) = &mut self.state {
            state.peer_deleted(&self.common, core, now, spis);
        }
    }

    /// For showing.
    pub(crate) fn view(&self, now: Now) -> IkeSaView {
        let Common { id, initiator, cookie_i, cookie_r, path, ref connection, born, .. } = self.common;
        let mut view = IkeSaView {
            id,
            connection: connection.as_ref().map(|connection| Arc::clone(&connection.name)),
            spis: (cookie_i, cookie_r),
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

/// A datagram, read as far as its header.
pub(crate) struct Arrived<'a> {
    pub(crate) path: Path,
    pub(crate) datagram: &'a [u8],
    pub(crate) head: Head,
    pub(crate) first: Kind,
    pub(crate) body: &'a [u8],
}

/// An error notification of IKEv1 in the terms of IKEv2, which people are told.
pub(crate) const fn in_terms_of_v2(kind: message::NotifyKind) -> NotifyType {
    match kind.0 {
        14 => NotifyType::NO_PROPOSAL_CHOSEN,
        18 => NotifyType::TS_UNACCEPTABLE,
        23..=25 => NotifyType::AUTHENTICATION_FAILED,
        other if other < 9 || other == 16 => NotifyType::INVALID_SYNTAX,
        other => NotifyType(other),
    }
}
