//! An established IKE SA of version 1: its exchanges, its children, its timers.

use core::net::IpAddr;
use core::time::Duration;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::child::{Child, ChildState, jittered};
use super::cipher::{Cipher, Iv, exchange_iv};
use super::delete::DeleteContext;
use super::hash::Hash;
use super::message::parse::{self, Chain};
use super::message::{Exchange, Head, Kind, Payload, Payloads, emit};
use super::phase1::Keyed;
use super::proposal::Phase1;
use super::quick::{Ours, Theirs};
use super::recent::Recent;
use super::transaction::Gate;
use super::{Arrived, Common};
use crate::Secret;
use crate::auth::identity::Identity;
use crate::config::{Connection, Start, Xauth};
use crate::endpoint::{Core, Errand, Now};
use crate::ignored::Ignored;
use crate::job::{Done, JobId};
use crate::message::IkeSpi;
use crate::output::{ChildId, Effect, IkeSaView, Persist, SaId};
use crate::record::{PeerTag, SavedBody, SavedIke, Strategy, UNLIMITED, V1Context, whole_seconds};
use crate::report::{CloseReason, Failure, Report};
use crate::v2::Task;
use crate::v2::channel::{Datagrams, Expired, Retransmission};

/// Most exchanges that the peer may have under way.
const EXCHANGES: usize = 16;

/// How long the last message of an exchange is repeated when the peer asks for it.
pub(super) const LINGER: Duration = Duration::from_secs(90);

/// An established IKE SA.
pub(super) struct Established {
    pub(super) hash: Hash,
    pub(super) skeyid_a: Secret,
    pub(super) skeyid_d: Secret,
    pub(super) cipher: Cipher,
    last_block: Iv,
    pub(super) suite: Phase1,
    pub(super) connection: Arc<Connection>,
    pub(super) remote_id: Identity,
    pub(super) since: Instant,
    /// When an authenticated message of the peer last came.
    pub(super) heard: Instant,
    pub(super) rekey_at: Option<Instant>,
    pub(super) expires_at: Option<Instant>,
    pub(super) keepalive_at: Option<Instant>,
    pub(super) children: Vec<Child>,
    pub(super) exchanges: Vec<PhaseTwo>,
    pub(super) recent: Recent,
    pub(super) dpd: Option<Dpd>,
    pub(super) dpd_sequence: u32,
    /// What has to be done before children are made.
    pub(super) gate: Gate,
    /// It is given up if the gate is not open by then.
    pub(super) gate_until: Option<Instant>,
    /// The peer said INITIAL_CONTACT.
    pub(super) first_contact: bool,
    /// Children to make once the gate is open.
    pub(super) wanted: Vec<usize>,
    /// Virtual addresses: assigned to the peer by this side, or to this side by the peer.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) half_open_key: Option<(IpAddr, u16, IkeSpi)>,
    /// The IKE SA that has taken over its children.
    pub(super) successor: Option<SaId>,
    /// When it was to be renewed and to expire, had it not been replaced.
    pub(super) planned: (Option<Instant>, Option<Instant>),
    /// The peer has deleted it.
    pub(super) deleted: bool,
    /// When it ends at the latest, for who finds it saved.
    pub(super) ends: SystemTime,
}

/// What a finished phase 1 gives.
pub(super) struct Proven {
    pub(super) keyed: Keyed,
    pub(super) connection: Arc<Connection>,
    pub(super) remote_id: Identity,
    /// The peer said INITIAL_CONTACT.
    pub(super) first_contact: bool,
    pub(super) half_open_key: Option<(IpAddr, u16, IkeSpi)>,
    /// The lifetime that the peer offered.
    pub(super) life: Option<Duration>,
    pub(super) recent: Recent,
    /// Message 6, which goes out once what it makes the peer believe in is saved.
    pub(super) last: Option<Vec<u8>>,
}

/// One exchange of phase 2.
pub(super) struct PhaseTwo {
    pub(super) id: u32,
    pub(super) iv: Iv,
    pub(super) doing: Doing,
    /// The last message, while it is to be repeated.
    pub(super) retransmission: Option<Retransmission>,
    /// It is forgotten then.
    pub(super) deadline: Instant,
}

/// What it is about.
pub(super) enum Doing {
    /// Quick Mode that this side began.
    Ours(Box<Ours>),
    /// Quick Mode that the peer began.
    Theirs(Box<Theirs>),
    /// A request or a SET of this side's Transaction exchange.
    Transaction,
    /// It is done; copies of the peer's last message get the answer again.
    Over,
}

/// The peer is asked whether it is alive.
pub(super) struct Dpd {
    pub(super) sequence: u32,
    pub(super) tries: u8,
    pub(super) wait: Duration,
    pub(super) due: Instant,
}

/// Whether it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alive {
    Yes,
    No(CloseReason),
}

/// A message of phase 2 whose HASH payload is right.
pub(super) struct Opened {
    pub(super) chain: Chain,
    pub(super) iv: Iv,
}

impl Established {
    /// Phase 1 is done.
    pub(super) fn new(
        common: &mut Common,
        core: &mut Core,
        now: Now,
        proven: Proven,
        wanted: Vec<usize>,
    ) -> Self {
        let Proven { keyed, connection, remote_id, first_contact, half_open_key, life, recent, last } =
            proven;
        let Keyed { suite, keys, iv, .. } = keyed;
        let server = common.v1().is_some_and(|v1| matches!(v1.xauth, Xauth::Server(_)));
        let rekey = connection.rekey.filter(|_| !server || common.initiator);
        let rekey = rekey.map(|after| life.map_or(after, |life| after.min(life.mul_f32(0.85))));
        let rekey_at =
            rekey.map(|after| now.monotonic + jittered(core, after, connection.rekey_jitter.min(after / 5)));
        let expires = connection.rekey.map(|after| after + connection.over_time);
        let expires_at = expires.into_iter().chain(life).min().map(|after| now.monotonic + after);
        let mut this = Self {
            hash: keys.hash,
            skeyid_a: keys.skeyid_a,
            skeyid_d: keys.skeyid_d,
            cipher: keys.cipher,
            last_block: iv,
            suite,
            remote_id,
            since: now.monotonic,
            heard: now.monotonic,
            rekey_at,
            expires_at,
            keepalive_at: None,
            children: Vec::new(),
            exchanges: Vec::new(),
            recent,
            dpd: None,
            dpd_sequence: core.random.u32() >> 1,
            gate: Gate::Open,
            gate_until: None,
            first_contact,
            wanted,
            addresses: Vec::new(),
            half_open_key,
            successor: None,
            planned: (rekey_at, expires_at),
            deleted: false,
            ends: whole_seconds(now.wall + expires.into_iter().chain(life).min().unwrap_or(UNLIMITED)),
            connection,
        };
        this.persist(common, core);
        if let Some(message) = last {
            common.send(core, &Datagrams::from(vec![message]));
        }
        core.counters.established += 1;
        core.report(
            common.id,
            Report::Established {
                sa: common.id,
                connection: Arc::clone(&this.connection.name),
                remote_id: this.remote_id.to_string(),
                path: common.path,
                suite: this.suite.suite().to_string(),
            },
        );
        this.schedule_keepalive(common, core, now);
        this.begin_gate(common, core, now);
        this
    }

    /// RST-1: what comes after this waits until it is saved.
    pub(super) fn persist(&self, common: &Common, core: &mut Core) {
        let DeleteContext { cookies, skeyid_a, ka, last_block, hash } = self.saved(common);
        let saved = SavedIke {
            spis: cookies,
            initiator: common.initiator,
            connection: Arc::clone(&self.connection.name),
            peer: PeerTag::of(&self.remote_id.to_string()),
            path: common.path,
            expires: self.ends,
            body: SavedBody::V1Context(V1Context { skeyid_a, ka, last_block, hash }),
        };
        let saved = match self.connection.reset {
            // IKEv1 has no whole records: its quick modes are begun anew.
            Strategy::Delete | Strategy::Restore => saved,
            Strategy::Prebuilt => saved.into_prebuilt(),
            Strategy::None => return,
        };
        core.emit(common.id, Effect::Persist(Persist::Put(Box::new(saved))));
    }

    /// RST-5: what a Delete of it is built from.
    pub(super) fn saved(&self, common: &Common) -> DeleteContext {
        DeleteContext {
            cookies: (common.cookie_i, common.cookie_r),
            skeyid_a: self.skeyid_a.duplicate(),
            ka: self.cipher.ka().duplicate(),
            last_block: self.last_block,
            hash: self.hash,
        }
    }

    /// A message ID that no exchange of it has.
    pub(super) fn new_id(&self, core: &mut Core) -> u32 {
        loop {
            let id = core.random.u32();
            if id != 0 && !self.recent.has_id(id) && self.exchanges.iter().all(|other| other.id != id) {
                return id;
            }
        }
    }

    pub(super) fn first_iv(&self, id: u32) -> Iv {
        exchange_iv(self.hash, &self.last_block, id)
    }

    /// An encrypted message: `hash` covers `before`, the message ID of a first message for example, and the payloads behind
    /// it. Gives it with the next IV.
    pub(super) fn seal(
        &self,
        common: &Common,
        exchange: Exchange,
        (id, iv): (u32, Iv),
        before: &[&[u8]],
        payloads: &[Payload],
    ) -> Option<(Vec<u8>, Iv)> {
        let mut rest = Vec::new();
        let first = emit::chain(payloads, &mut rest);
        let covered: Vec<&[u8]> = before.iter().copied().chain([rest.as_slice()]).collect();
        let hash = self.hash.prf(self.skeyid_a.expose(), &covered);
        let mut text = Vec::new();
        emit::chain(&[Payload::Hash(hash.expose().to_vec())], &mut text);
        if let Some(next) = text.first_mut() {
            *next = first.0;
        }
        text.extend_from_slice(&rest);
        let (sealed, next) = self.cipher.encrypt(iv, text)?;
        let head = Head {
            cookie_i: common.cookie_i,
            cookie_r: common.cookie_r,
            exchange,
            encrypted: true,
            message_id: id,
        };
        Some((emit::with_body(&head, Kind::HASH, &sealed), next))
    }

    /// Opens a message that begins with a HASH payload over `before` and the payloads behind it.
    pub(super) fn open(&self, arrived: &Arrived<'_>, iv: Iv, before: &[&[u8]]) -> Result<Opened, Ignored> {
        if !arrived.head.encrypted || arrived.first != Kind::HASH {
            return Err(Ignored::Unprotected);
        }
        let (text, next) = self.cipher.decrypt(iv, arrived.body).ok_or(Ignored::Integrity)?;
        let mut chain = parse::chain(arrived.first, &text).map_err(|_| Ignored::Integrity)?;
        let from = chain.starts.get(1).copied().unwrap_or(chain.length);
        let rest = text.get(from..chain.length).unwrap_or_default();
        let covered: Vec<&[u8]> = before.iter().copied().chain([rest]).collect();
        let expected = self.hash.prf(self.skeyid_a.expose(), &covered);
        match Payloads(&chain.payloads).hash() {
            Some(hash) if expected == Secret::new(hash.as_slice()) => {
                chain.payloads.remove(0);
                Ok(Opened { chain, iv: next })
            }
            _ => Err(Ignored::Integrity),
        }
    }

    pub(super) fn receive(
        &mut self,
        common: &mut Common,
        core: &mut Core,
        now: Now,
        arrived: &Arrived<'_>,
    ) -> Alive {
        if let Some(answer) = self.recent.answer(arrived.datagram) {
            common.send_to(core, arrived.path, answer);
            common.ignore(core, now, arrived.path, Ignored::Duplicate);
            return Alive::Yes;
        }
        let outcome = match arrived.head.exchange {
            _ if arrived.head.message_id == 0 => Err(Ignored::Exchange),
            Exchange::INFORMATIONAL => self.informational(common, core, now, arrived),
            Exchange::QUICK_MODE => self.quick_mode(common, core, now, arrived).map(|()| Alive::Yes),
            Exchange::TRANSACTION => self.transaction(common, core, now, arrived),
            _ => Err(Ignored::Exchange),
        };
        match outcome {
            Ok(alive) => alive,
            Err(reason) => {
                common.ignore(core, now, arrived.path, reason);
                Alive::Yes
            }
        }
    }

    /// An authentic message of the peer came.
    pub(super) fn heard(&mut self, common: &mut Common, core: &mut Core, now: Now, arrived: &Arrived<'_>) {
        self.heard = now.monotonic;
        self.dpd = None;
        if let Some(key) = self.half_open_key.take() {
            core.forget_first_message(key);
        }
        // RFC 3947 section 4: the other end of a NAT's mapping may change.
        if common.path != arrived.path && common.nat.remote && arrived.path.natt {
            common.path = arrived.path;
            self.persist(common, core);
            core.report(common.id, Report::Moved { sa: common.id, path: common.path });
        }
    }

    /// Whether the peer may begin one more exchange.
    pub(super) fn has_room(&self) -> bool {
        self.exchanges.len() < EXCHANGES
    }

    /// Sends one message and forgets it.
    pub(super) fn send_once(
        &mut self,
        common: &Common,
        core: &mut Core,
        exchange: Exchange,
        payload: Payload,
    ) {
        let id = self.new_id(core);
        let before = id.to_be_bytes();
        if let Some((message, _)) =
            self.seal(common, exchange, (id, self.first_iv(id)), &[&before], &[payload])
        {
            self.recent.over(id);
            common.send(core, &Datagrams::from(vec![message]));
        }
    }

    /// Does something.
    pub(super) fn perform(&mut self, common: &mut Common, core: &mut Core, now: Now, task: &Task) {
        match task {
            Task::CreateChild(index) => self.want_child(common, core, now, *index),
            Task::RekeyChild(id) => {
                let current = self.children.iter().find(|child| child.id == *id && child.is_current());
                let current = current.filter(|child| !self.is_being_replaced(child.id));
                if let Some(index) = current.map(|child| child.index) {
                    self.begin_quick_mode(common, core, now, index, Some(*id));
                }
            }
            Task::DeleteChild(id) => self.delete_child(common, core, now, *id, CloseReason::Command),
            Task::RekeyIke => {
                if self.successor.is_none() {
                    core.errands.push(Errand::Renew { sa: common.id });
                }
            }
            Task::CheckPeer => self.check_peer(common, core, now),
            // IKEv1 has none of them.
            Task::DeleteIke(_) | Task::UpdateAddresses | Task::GiveToken => {}
        }
    }

    /// Makes a child, unless there is one, once the gate is open.
    pub(super) fn want_child(&mut self, common: &mut Common, core: &mut Core, now: Now, index: usize) {
        let there = self.children.iter().any(|child| child.index == index && child.is_current())
            || self
                .exchanges
                .iter()
                .any(|exchange| matches!(&exchange.doing, Doing::Ours(ours) if ours.index == index));
        if there {
            return;
        }
        if self.gate == Gate::Open {
            self.begin_quick_mode(common, core, now, index, None);
        } else if !self.wanted.contains(&index) {
            self.wanted.push(index);
        }
    }

    pub(super) fn computed(&mut self, common: &mut Common, core: &mut Core, now: Now, id: JobId, done: Done) {
        let place = self.exchanges.iter().position(|exchange| match &exchange.doing {
            Doing::Ours(ours) => ours.job == Some(id),
            Doing::Theirs(theirs) => theirs.job == Some(id),
            _ => false,
        });
        let Some(exchange) = place.map(|place| self.exchanges.remove(place)) else { return };
        match exchange.doing {
            Doing::Ours(_) => self.own_computed(common, core, now, exchange, done),
            Doing::Theirs(_) => self.their_computed(common, core, now, exchange, done),
            _ => {}
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let dpd = match &self.dpd {
            Some(dpd) => Some(dpd.due),
            None => self.connection.dpd.map(|after| self.heard + after),
        };
        let own = [
            self.rekey_at,
            self.expires_at,
            self.gate_until,
            self.keepalive_at,
            dpd.filter(|_| self.successor.is_none()),
        ];
        let exchanges = self.exchanges.iter().map(|exchange| {
            let repeated = exchange.retransmission.as_ref().map(Retransmission::deadline);
            Some(repeated.map_or(exchange.deadline, |at| at.min(exchange.deadline)))
        });
        let children = self.children.iter().map(Child::deadline);
        own.into_iter().chain(exchanges).chain(children).flatten().min()
    }

    pub(super) fn timeout(&mut self, common: &mut Common, core: &mut Core, now: Now) -> Alive {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now.monotonic);
        if due(self.gate_until) {
            self.say_goodbye(common, core, now);
            return Alive::No(CloseReason::Failed);
        }
        if due(self.expires_at) {
            self.say_goodbye(common, core, now);
            let replaced = self.successor.is_some();
            return Alive::No(if replaced { CloseReason::Replaced } else { CloseReason::Expired });
        }
        if due(self.rekey_at) {
            self.rekey_at = None;
            self.perform(common, core, now, &Task::RekeyIke);
        }
        if due(self.keepalive_at) {
            core.emit(common.id, Effect::Keepalive(common.path));
            self.schedule_keepalive(common, core, now);
        }
        if !self.exchanges_due(common, core, now) || !self.still_there(common, core, now) {
            core.counters.dead += 1;
            return Alive::No(CloseReason::Dead);
        }
        self.children_due(common, core, now);
        Alive::Yes
    }

    /// Repeats what is not answered; `false` if the peer does not answer at all.
    fn exchanges_due(&mut self, common: &Common, core: &mut Core, now: Now) -> bool {
        let mut alive = true;
        for mut exchange in std::mem::take(&mut self.exchanges) {
            let repeat = exchange.retransmission.as_mut().filter(|found| found.deadline() <= now.monotonic);
            match repeat.map(|found| found.expire(now.monotonic, &mut *core.random)) {
                Some(Expired::Resend(datagrams)) => {
                    core.counters.retransmitted += 1;
                    common.send(core, &datagrams);
                }
                Some(Expired::Dead) => {
                    alive &= matches!(exchange.doing, Doing::Theirs(_)) || self.successor.is_some();
                    self.forget(common, core, exchange, Failure::NoAnswer(common.path.remote.ip()));
                    continue;
                }
                None => {}
            }
            if exchange.deadline <= now.monotonic {
                self.forget(common, core, exchange, Failure::Timeout);
            } else {
                self.exchanges.push(exchange);
            }
        }
        alive
    }

    /// An exchange leads to nothing more.
    pub(super) fn forget(&mut self, common: &Common, core: &mut Core, exchange: PhaseTwo, why: Failure) {
        self.recent.over(exchange.id);
        match exchange.doing {
            Doing::Ours(ours) => {
                core.host.release_spi(ours.spi_in);
                self.child_failed(common, core, ours.index, why);
            }
            Doing::Theirs(theirs) => self.give_up(common, core, &theirs),
            Doing::Transaction | Doing::Over => {}
        }
    }

    /// RFC 3948 section 4: the one behind the NAT keeps its mapping alive.
    pub(super) fn schedule_keepalive(&mut self, common: &Common, core: &Core, now: Now) {
        let needed = common.nat.local && common.path.natt && self.successor.is_none();
        self.keepalive_at = needed.then(|| now.monotonic + core.settings.nat_keepalive);
    }

    /// A child was installed, or could not be.
    pub(super) fn installed(
        &mut self,
        common: &Common,
        core: &mut Core,
        now: Now,
        id: ChildId,
        result: Result<(), String>,
    ) {
        let Some(child) = self.children.iter_mut().find(|child| child.id == id) else { return };
        let (index, replaces, suite) = (child.index, child.replaces, child.suite.to_string());
        match result {
            Ok(()) => {
                if child.state == ChildState::Installing {
                    child.state = ChildState::Installed;
                }
                core.counters.children += 1;
                if replaces.is_some() {
                    core.counters.children_rekeyed += 1;
                }
                let (connection, name) = (Arc::clone(&self.connection.name), self.child_name(index));
                let report = Report::ChildUp { sa: common.id, child: id, connection, name, replaces, suite };
                core.report(common.id, report);
            }
            Err(text) => {
                child.use_at = None;
                // The one that it was to replace goes on.
                if let Some(old) =
                    replaces.and_then(|old| self.children.iter_mut().find(|child| child.id == old))
                    && old.state != ChildState::Gone
                {
                    old.delete_at = None;
                    old.state = ChildState::Installed;
                    old.rekey_at = Some(now.monotonic + Duration::from_secs(30));
                }
                self.child_failed(common, core, index, Failure::Datapath(text));
                self.delete_child(common, core, now, id, CloseReason::Failed);
            }
        }
    }

    /// A child could not be made.
    pub(super) fn child_failed(&self, common: &Common, core: &mut Core, index: usize, failure: Failure) {
        core.counters.children_failed += 1;
        let (connection, name) = (Arc::clone(&self.connection.name), self.child_name(index));
        core.report(common.id, Report::ChildFailed { sa: common.id, connection, name, failure });
    }

    pub(super) fn child_name(&self, index: usize) -> Arc<str> {
        let child = self.connection.children.get(index);
        child.map_or_else(|| Arc::from(""), |child| Arc::clone(&child.name))
    }

    pub(super) fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = ChildId> + 'a {
        let matches = move |child: &&Child| &*self.child_name(child.index) == name && child.is_current();
        self.children.iter().filter(matches).map(|child| child.id)
    }

    /// Whether this side is the client.
    pub(super) fn is_client(&self) -> bool {
        self.connection.request_address != (false, false)
    }

    /// Addresses that this side assigned.
    pub(super) fn leases(&self) -> &[IpAddr] {
        if self.is_client() { &[] } else { &self.addresses }
    }

    /// The end: children go, addresses are free, and what is to be up again is begun again.
    pub(super) fn end(mut self: Box<Self>, common: &Common, core: &mut Core, reason: CloseReason) {
        for exchange in std::mem::take(&mut self.exchanges) {
            match exchange.doing {
                Doing::Ours(ours) => core.host.release_spi(ours.spi_in),
                Doing::Theirs(theirs) if theirs.child.is_none() => core.host.release_spi(theirs.spi_in()),
                _ => {}
            }
        }
        for child in std::mem::take(&mut self.children) {
            self.remove_child(common, core, &child, reason);
        }
        if let Some(key) = self.half_open_key.take() {
            core.forget_first_message(key);
        }
        if self.successor.is_none() {
            if self.is_client() {
                if !self.addresses.is_empty() {
                    core.emit(common.id, Effect::Unconfigure);
                }
            } else {
                self.addresses.iter().for_each(|address| core.pools.release(*address));
            }
        }
        core.forget_peer(&self.connection, &self.remote_id, common.id);
        if self.connection.reset != Strategy::None {
            core.emit(common.id, Effect::Persist(Persist::Remove((common.cookie_i, common.cookie_r))));
        }
        let connection = Some(Arc::clone(&self.connection.name));
        let reason = if self.successor.is_some() { CloseReason::Replaced } else { reason };
        core.report(common.id, Report::Closed { sa: common.id, connection, reason });
    }

    /// Takes a child out of the datapath; begins it again if the configuration says so.
    pub(super) fn remove_child(&self, common: &Common, core: &mut Core, child: &Child, reason: CloseReason) {
        core.emit(common.id, Effect::Retire(child.id));
        core.children.remove(&child.id);
        core.host.release_spi(child.spi_in);
        if !child.is_current() && reason != CloseReason::Dead {
            return;
        }
        let (connection, name) = (Arc::clone(&self.connection.name), self.child_name(child.index));
        let again = match (self.connection.children.get(child.index), reason) {
            (Some(config), CloseReason::Peer) => config.on_close == Start::Start,
            (Some(config), CloseReason::Dead) => config.on_dpd == Start::Start,
            (Some(config), CloseReason::Expired | CloseReason::Failed) => config.start == Start::Start,
            _ => false,
        };
        if again {
            let (connection, child) = (Arc::clone(&connection), Arc::clone(&name));
            core.errands.push(Errand::Restart { connection, child });
        }
        let (sa, child) = (common.id, child.id);
        core.report(common.id, Report::ChildDown { sa, child, connection, name, reason });
    }

    /// For showing.
    pub(super) fn show(&self, _: &Common, now: Now, view: &mut IkeSaView) {
        view.state = if self.successor.is_some() { "deleting" } else { "established" };
        view.remote_id = Some(self.remote_id.to_string());
        view.suite = format!("IKEv1 {}", self.suite.suite());
        view.age = now.monotonic.saturating_duration_since(self.since);
        view.rekey_in = self.rekey_at.map(|at| at.saturating_duration_since(now.monotonic));
        view.addresses.clone_from(&self.addresses);
        view.children = self.children.iter().map(|child| child.view(&self.connection, now)).collect();
    }
}

/// A message of this side that is sent until it is answered.
pub(super) fn repeat(core: &mut Core, now: Now, message: Vec<u8>) -> Retransmission {
    let policy = core.settings.retransmit;
    Retransmission::new(now.monotonic, vec![message].into(), policy, &mut *core.random)
}
