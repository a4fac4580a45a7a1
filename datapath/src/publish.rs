//! The main thread's half of the tables: checks what control asks, decides where it goes, and tells the workers.
//!
//! Nothing here is touched by a packet. Indices, workers and links are decided here, so that a worker only puts,
//! takes and looks up; an index is used again only after its object came back.

mod inventory;
mod link;
mod policies;
mod relays;
mod windows;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};
use postern_contract::counters::RelayCounters;
use postern_contract::event::{Event, LimitKind};
use postern_contract::relay::{RelayEntry, RelayId};
use postern_contract::request::{Done, Operation, Refusal};
use postern_contract::sa::{Direction, IpsecProtocol, KeyOrigin, PolicyId, SaConfig, SaId};
use postern_wire::ids::Spi;

use crate::command::{Command, Returned, SaSnapshot, Table};
use crate::core::Outbox;
use crate::crypto::{fingerprint, window_name};
use crate::fib::Fib;
use crate::outbound::RESERVE_LOW;
use crate::reserve::Ledger;
use crate::sad::config::SaShared;
use crate::sad::lookup::Handle;
use crate::sad::runtime::{Inbound, NO_LINK, Outbound, Rest};
use crate::worker::place;

pub use self::link::WorkerLink;
pub use self::policies::SteerChanges;

use self::policies::PolicyRecord;
use self::windows::Windows;

/// Sequence numbers reserved at once: twice the low-water mark, so that a worker asks when half is used.
const RESERVE_BLOCK: u64 = 2 * RESERVE_LOW;
/// SAs whose windows are asked for at once.
const TOPS: usize = 1024;

/// First sequence number and ceiling of new outbound SAs.
type Reservations = HashMap<SaId, (u64, u64)>;

/// SAs found by something that their descriptions say, without another copy of it. Its hash is kept: a table that grows
/// would have to look at every SA for it.
#[derive(Default)]
struct Index {
    ids: HashTable<(u64, SaId)>,
    hash: DefaultHashBuilder,
}

impl Index {
    /// The SA that has the value of `key` that `wanted` is.
    fn find<K: Hash + Eq>(
        &self,
        sas: &Sas,
        key: impl Fn(&SaShared) -> Option<K>,
        wanted: &K,
    ) -> Option<SaId> {
        let wanted_hash = self.hash.hash_one(wanted);
        let is_it = |(hash, id): &(u64, SaId)| {
            *hash == wanted_hash && sas.get(id).and_then(|config| key(config)).as_ref() == Some(wanted)
        };
        self.ids.find(wanted_hash, is_it).map(|(_, id)| *id)
    }

    /// Enters an installed SA.
    fn insert<K: Hash>(&mut self, value: &K, id: SaId) {
        let hash = self.hash.hash_one(value);
        self.ids.insert_unique(hash, (hash, id), |(hash, _)| *hash);
    }

    /// Forgets an SA by the value that it has.
    fn remove<K: Hash>(&mut self, wanted: &K, id: SaId) {
        if let Ok(entry) = self.ids.find_entry(self.hash.hash_one(wanted), |(_, other)| *other == id) {
            entry.remove();
        }
    }
}

/// Installed SAs.
type Sas = BTreeMap<SaId, Arc<SaShared>>;

type SpiKey = (IpsecProtocol, Spi);

/// What packets of an inbound SA are found by.
fn spi_key(config: &SaShared) -> Option<SpiKey> {
    (config.direction() == Direction::Inbound).then_some((config.protocol(), config.spi.on_wire))
}

fn key_name(config: &SaShared) -> Option<[u8; 16]> {
    config.fingerprint().copied()
}

/// All tables as the main thread sees them.
pub struct Publisher {
    workers: Vec<WorkerLink>,
    outbox: Outbox,
    ledger: Ledger,
    sas: Sas,
    inbound_spis: Index,
    /// Outbound SAs by their keys: two with the same keys would use the same nonces.
    outbound_keys: Index,
    /// Bundles: AH SA and ESP SA, whether the AH SA is installed or not.
    bundles: BTreeSet<(SaId, SaId)>,
    policies: BTreeMap<PolicyId, Box<PolicyRecord>>,
    /// Policies by the SA that they name, installed or not.
    users: BTreeSet<(SaId, PolicyId)>,
    relays: BTreeMap<RelayId, RelayEntry>,
    relay_keys: HashMap<(IpsecProtocol, Spi, std::net::IpAddr), RelayId>,
    /// Entries that were put or removed since the XDP programs were told.
    relays_changed: BTreeSet<RelayId>,
    /// How many entries take packets with an SPI, at whatever address: SAs are found without one.
    relay_spis: HashMap<(IpsecProtocol, Spi), u32>,
    /// Seconds at which time limits are reached, also of SAs that are gone or have other limits by now.
    deadlines: BTreeSet<(u64, SaId, bool)>,
    windows: Windows,
    steer: SteerChanges,
    events: Vec<Event>,
    /// Reservations that could not be written and will be tried again.
    unreserved: Vec<(SaId, u32, u64, u64)>,
    snapshots: Vec<SaSnapshot>,
    relay_counters: Vec<(RelayId, RelayCounters)>,
    latency: Option<hdrhistogram::Histogram<u64>>,
    wait: Box<dyn FnMut()>,
}

const fn table_of(direction: Direction) -> Table {
    match direction {
        Direction::Inbound => Table::Inbound,
        Direction::Outbound => Table::Outbound,
    }
}

impl Publisher {
    /// Empty tables over running workers.
    pub fn new(workers: Vec<WorkerLink>, outbox: Outbox, ledger: Ledger) -> Self {
        Self {
            workers,
            outbox,
            ledger,
            sas: BTreeMap::new(),
            inbound_spis: Index::default(),
            outbound_keys: Index::default(),
            bundles: BTreeSet::new(),
            policies: BTreeMap::new(),
            users: BTreeSet::new(),
            relays: BTreeMap::new(),
            relay_keys: HashMap::new(),
            relays_changed: BTreeSet::new(),
            relay_spis: HashMap::new(),
            deadlines: BTreeSet::new(),
            windows: Windows::default(),
            steer: SteerChanges::default(),
            events: Vec::new(),
            unreserved: Vec::new(),
            snapshots: Vec::new(),
            relay_counters: Vec::new(),
            latency: None,
            wait: Box::new(std::thread::yield_now),
        }
    }

    /// What to do while workers have not applied what was sent; where nobody else turns them, this must.
    pub fn wait_with(&mut self, wait: Box<dyn FnMut()>) {
        self.wait = wait;
    }

    /// Number of SAs, policies and entries.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.sas.len() as u64, self.policies.len() as u64, self.relays.len() as u64)
    }

    /// The workers.
    pub fn workers(&self) -> &[WorkerLink] {
        &self.workers
    }

    /// What changed for the XDP program since the last call.
    pub fn steer_changes(&mut self) -> SteerChanges {
        std::mem::take(&mut self.steer)
    }

    /// Relay entries that are others since the last call, and those that are gone (`None`).
    pub fn relay_changes(&mut self) -> Vec<(RelayId, Option<RelayEntry>)> {
        let changed = std::mem::take(&mut self.relays_changed);
        changed.into_iter().map(|id| (id, self.relays.get(&id).copied())).collect()
    }

    /// Events since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Applies the operations in order, and returns when all workers use them. `now`: seconds since the start.
    pub fn apply(&mut self, batches: &[Vec<Operation>], now: u32) -> Vec<Vec<Result<Done, Refusal>>> {
        let reserved = self.reserve(batches).map_err(|error| Refusal::Storage(error.to_string()));
        let results = batches
            .iter()
            .map(|operations| {
                operations.iter().map(|operation| self.one(operation, &reserved, now)).collect()
            })
            .collect();
        self.settle();
        results
    }

    fn one(
        &mut self,
        operation: &Operation,
        reserved: &Result<Reservations, Refusal>,
        now: u32,
    ) -> Result<Done, Refusal> {
        match operation {
            Operation::InstallSa(config) => self.install_sa(config, reserved, now),
            Operation::RemoveSa(id) => Ok(self.remove_sa(*id)),
            Operation::InstallPolicy(policy) => self.install_policy(policy),
            Operation::RemovePolicy(id) => Ok(self.remove_policy(*id)),
            Operation::InstallRelay(entry) => self.install_relay(entry),
            Operation::RemoveRelay(id) => Ok(self.remove_relay(*id)),
        }
    }

    /// Reserves sequence numbers for all new outbound SAs with one write to stable storage (DESIGN decision 8).
    ///
    /// Gives the first number and the ceiling of each.
    fn reserve(&mut self, batches: &[Vec<Operation>]) -> std::io::Result<Reservations> {
        let mut raises = Vec::new();
        let mut reservations = Reservations::new();
        let mut removed = HashSet::new();
        for operation in batches.iter().flatten() {
            if let Operation::RemoveSa(id) = operation {
                removed.insert(*id);
            }
            if let Operation::InstallSa(config) = operation
                && config.direction == Direction::Outbound
                && (removed.contains(&config.id) || !self.sas.contains_key(&config.id))
                && config.suite.validate(config.protocol).is_ok()
            {
                let print = fingerprint(&config.suite);
                let known = self.ledger.ceiling(&print);
                if config.origin == KeyOrigin::Restored && known.is_none() {
                    // Refused when it is its turn.
                    continue;
                }
                let first = known.unwrap_or(0).max(config.sequence);
                let ceiling = first.saturating_add(RESERVE_BLOCK);
                raises.push((print, ceiling));
                reservations.insert(config.id, (first, ceiling));
            }
        }
        if !raises.is_empty() {
            self.ledger.raise(&raises)?;
        }
        Ok(reservations)
    }

    fn install_sa(
        &mut self,
        config: &SaConfig,
        reserved: &Result<Reservations, Refusal>,
        now: u32,
    ) -> Result<Done, Refusal> {
        if let Some(config_now) = self.sas.get(&config.id) {
            let installed = config_now.generation;
            return match config.generation.cmp(&installed) {
                std::cmp::Ordering::Less => Err(Refusal::Stale(installed)),
                std::cmp::Ordering::Equal => Ok(Done::Already),
                std::cmp::Ordering::Greater => self.replace_sa(config),
            };
        }
        let mut shared = SaShared::build(config)?;
        let (direction, protocol, spi) = (config.direction, config.protocol, config.spi.on_wire);
        let taken = self.inbound_spis.find(&self.sas, spi_key, &(protocol, spi)).is_some()
            || self.relay_spis.contains_key(&(protocol, spi));
        if direction == Direction::Inbound && taken {
            return Err(Refusal::SpiTaken(spi));
        }
        let worker = self.worker_for(config)?;
        let table = table_of(direction);
        let mut numbers = (config.sequence, 0);
        let damaged = self.ledger.damaged();
        if matches!(config.origin, KeyOrigin::Static | KeyOrigin::Restored) && damaged > 0 {
            // A lost ceiling cannot be told from one that never was.
            return Err(Refusal::Storage(format!(
                "{damaged} records of sequence numbers are damaged, so keys that were used before could be used twice with \
                 one number, or take a packet twice; give the tunnels new keys, then remove the ledger from the state \
                 directory"
            )));
        }
        // Without a window nothing is refused, so there is nothing to keep.
        let comes_back = config.origin != KeyOrigin::Negotiated;
        let kept = direction == Direction::Inbound && comes_back && config.replay_window > 0;
        let window = kept.then(|| window_name(&config.suite));
        if let Some(name) = &window {
            numbers.0 = Windows::begin(&self.ledger, name, config.sequence);
        }
        if direction == Direction::Outbound {
            let print = fingerprint(&config.suite);
            if self.outbound_keys.find(&self.sas, key_name, &print).is_some() {
                let text = "suite: another outbound SA uses these keys; each SA needs keys of its own";
                return Err(Refusal::Invalid(text.to_owned()));
            }
            let reserved = reserved.as_ref().map_err(Clone::clone)?;
            numbers = *reserved.get(&config.id).ok_or_else(|| match config.origin {
                KeyOrigin::Restored => Refusal::Storage(
                    "nothing is known of the sequence numbers that were used with these keys before"
                        .to_owned(),
                ),
                _ => Refusal::Full,
            })?;
        }
        let link = self.workers.get_mut(usize::from(worker)).ok_or(Refusal::Full)?;
        let index = link.indices(table).take().ok_or(Refusal::Full)?;
        let handle = Handle::new(worker, index).ok_or(Refusal::Full)?;
        (shared.handle, shared.installed) = (handle, now);
        let shared = Arc::new(shared);
        let rest = Rest::new(&shared, now);
        let command = match direction {
            Direction::Inbound => {
                Command::PutInbound(index, Inbound::new(Arc::clone(&shared), numbers.0), rest)
            }
            Direction::Outbound => {
                let (first, ceiling) = numbers;
                Command::PutOutbound(index, Outbound::new(Arc::clone(&shared), first, ceiling), rest)
            }
        };
        link.push(command);
        if let (Some(bundle), IpsecProtocol::Esp) = (shared.bundle(), protocol) {
            self.bundles.insert((bundle, config.id));
        }
        self.note_deadlines(&shared);
        if let Some(name) = window {
            let last = if config.esn { u64::MAX } else { u32::MAX.into() };
            self.windows.insert(config.id, name, numbers.0, last);
        }
        let pair = shared.pair();
        if let Some(key) = spi_key(&shared) {
            self.inbound_spis.insert(&key, config.id);
        }
        if let Some(print) = key_name(&shared) {
            self.outbound_keys.insert(&print, config.id);
        }
        self.sas.insert(config.id, shared);
        self.link(config.id);
        if let Some(pair) = pair {
            self.link(pair);
        }
        self.link_bundles(config.id);
        if direction == Direction::Inbound {
            // Only now does a packet find it: links stand and the SA is whole.
            for link in &mut self.workers {
                link.push(Command::Route(protocol, spi, Some(handle)));
            }
        }
        if direction == Direction::Outbound {
            self.point_users(config.id, Some(handle));
        }
        Ok(Done::Applied)
    }

    /// The worker for a new SA: as described, else with its bundle, else with its pair, else by a hash of both ids.
    fn worker_for(&self, config: &SaConfig) -> Result<u8, Refusal> {
        let bundle = match config.bundle {
            Some(id) => {
                let found = self.sas.get(&id).filter(|other| {
                    other.protocol() == IpsecProtocol::Ah && other.direction() == config.direction
                });
                let missing = "bundle: install the AH SA of the same direction first".to_owned();
                Some(found.ok_or(Refusal::Invalid(missing))?.handle.worker())
            }
            None => None,
        };
        let pair = config.pair.and_then(|id| self.sas.get(&id)).map(|other| other.handle.worker());
        let explicit = match config.worker {
            Some(worker) => {
                let known =
                    u8::try_from(worker).ok().filter(|worker| usize::from(*worker) < self.workers.len());
                let count = self.workers.len();
                Some(known.ok_or(Refusal::Invalid(format!("worker: there are {count}, numbered from 0")))?)
            }
            None => None,
        };
        let anchor = config.pair.map_or(config.id, |pair| pair.min(config.id));
        let chosen = explicit.or(bundle).or(pair).unwrap_or_else(|| place(anchor.0, self.workers.len()));
        if bundle.is_some_and(|worker| worker != chosen) || pair.is_some_and(|worker| worker != chosen) {
            return Err(Refusal::Invalid(
                "worker: an SA, its pair and its bundle share one worker".to_owned(),
            ));
        }
        Ok(chosen)
    }

    /// Tells the worker of an inbound or bundled SA where its linked SAs are.
    fn link(&mut self, id: SaId) {
        let Some(config) = self.sas.get(&id) else { return };
        let linked = |other: Option<SaId>| {
            let other = self.sas.get(&other?)?;
            (other.handle.worker() == config.handle.worker()).then(|| other.handle.index())
        };
        // A pair is one only if both name each other: otherwise one end would move the other's tunnel.
        let mutual = config.pair().filter(|pair| {
            self.sas
                .get(pair)
                .is_some_and(|other| other.pair() == Some(id) && other.direction() != config.direction())
        });
        let command = Command::Link {
            table: table_of(config.direction()),
            index: config.handle.index(),
            pair: linked(mutual).unwrap_or(NO_LINK),
            bundle: linked(config.bundle()).unwrap_or(NO_LINK),
        };
        let worker = config.handle.worker();
        self.send(worker, command);
    }

    /// Tells the ESP SAs of a bundle where its AH SA is, or that it is gone.
    fn link_bundles(&mut self, ah: SaId) {
        let bundled = self.bundles.range((ah, SaId(0))..=(ah, SaId(u64::MAX)));
        for esp in bundled.map(|(_, esp)| *esp).collect::<Vec<_>>() {
            self.link(esp);
        }
    }

    fn send(&mut self, worker: u8, command: Command) {
        if let Some(link) = self.workers.get_mut(usize::from(worker)) {
            link.push(command);
        }
    }

    fn replace_sa(&mut self, config: &SaConfig) -> Result<Done, Refusal> {
        let mut new = SaShared::build(config)?;
        let current = self.sas.get_mut(&config.id).ok_or(Refusal::Full)?;
        if let Some(field) = current.immutable_difference(&new) {
            return Err(Refusal::Immutable(field.to_owned()));
        }
        if current.bundle() != new.bundle() {
            return Err(Refusal::Immutable("bundle".to_owned()));
        }
        (new.handle, new.installed) = (current.handle, current.installed);
        let new = Arc::new(new);
        let old = std::mem::replace(current, Arc::clone(&new));
        let command = Command::Reconfigure {
            table: table_of(new.direction()),
            index: new.handle.index(),
            config: Arc::clone(&new),
            move_peer: old.remote != new.remote || old.encap != new.encap,
        };
        if old.lifetime() != new.lifetime() {
            self.note_deadlines(&new);
        }
        self.send(new.handle.worker(), command);
        self.link(config.id);
        for pair in old.pair().into_iter().chain(config.pair) {
            self.link(pair);
        }
        Ok(Done::Applied)
    }

    fn remove_sa(&mut self, id: SaId) -> Done {
        let Some(config) = self.sas.remove(&id) else { return Done::Already };
        let window = self.windows.remove(id);
        self.point_users(id, None);
        if let Some(key) = spi_key(&config) {
            self.inbound_spis.remove(&key, id);
            for link in &mut self.workers {
                link.push(Command::Route(key.0, key.1, None));
            }
        }
        if let Some(pair) = config.pair() {
            self.link(pair);
        }
        self.link_bundles(id);
        if let Some(bundle) = config.bundle() {
            self.bundles.remove(&(bundle, id));
        }
        let (table, handle) = (table_of(config.direction()), config.handle);
        self.send(handle.worker(), Command::Take(table, handle.index()));
        let print = key_name(&config);
        if let Some(print) = &print {
            self.outbound_keys.remove(print, id);
        }
        if !config.has_static_keys()
            && let Some(name) = print.or(window)
        {
            // These keys never come back, so neither can their numbers. A failed write leaves a record too many.
            let _ = self.ledger.forget(&[name]);
        }
        Done::Applied
    }

    /// Gives workers other routes and neighbours.
    pub fn set_fib(&mut self, fib: &Arc<Fib>) {
        for link in &mut self.workers {
            link.push(Command::Fib(Arc::clone(fib)));
            link.flush();
        }
    }

    fn note_deadlines(&mut self, config: &SaShared) {
        for hard in [false, true] {
            if let Some(due) = deadline(config, hard) {
                self.deadlines.insert((due, config.id, hard));
            }
        }
    }

    /// What is due by the clock: time limits (DP-4) and reservations that failed before. `now`: seconds since start.
    pub fn tick(&mut self, now: u32) {
        while let Some((due, id, hard)) = self.deadlines.first().copied() {
            if due > u64::from(now) {
                break;
            }
            self.deadlines.pop_first();
            let Some(config) = self.sas.get(&id) else { continue };
            if deadline(config, hard) != Some(due) {
                continue;
            }
            let (table, handle) = (table_of(config.direction()), config.handle);
            if hard {
                self.send(handle.worker(), Command::Stop(table, handle.index(), id));
                self.events.push(Event::HardLimit { sa: id, kind: LimitKind::Seconds });
            } else {
                self.events.push(Event::SoftLimit { sa: id, kind: LimitKind::Seconds });
            }
        }
        self.grant();
        self.look_at_windows(now);
        self.flush();
    }

    /// Asks the workers for the tops of windows that have to outlive the process.
    fn look_at_windows(&mut self, now: u32) {
        for id in self.windows.due(now) {
            let Some(handle) = self.sas.get(&id).map(|config| config.handle) else { continue };
            let Some(link) = self.workers.get_mut(usize::from(handle.worker())) else { continue };
            match link.pending.last_mut() {
                Some(Command::ReportTops(tops)) if tops.len() < TOPS => tops.push((id, handle.index(), 0)),
                _ => link.push(Command::ReportTops(vec![(id, handle.index(), 0)])),
            }
        }
    }

    /// Seconds since start at which [`Self::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadlines.first().map(|(due, ..)| *due)
    }

    fn flush(&mut self) {
        for link in &mut self.workers {
            link.flush();
        }
    }

    /// Sends what is pending and waits until every worker has applied it.
    fn settle(&mut self) {
        self.flush();
        while !self.workers.iter().all(WorkerLink::is_idle) {
            self.collect();
            (self.wait)();
        }
        self.collect();
    }

    /// Whether workers have returned something.
    pub fn has_returned(&self) -> bool {
        !self.outbox.queue.is_empty()
    }

    /// Takes back what workers returned: frees indices, wipes keys, notes events, and writes the reservations asked for.
    pub fn collect(&mut self) {
        let failed = self.unreserved.len();
        let queue = Arc::clone(&self.outbox.queue);
        while let Some((worker, returned)) = queue.pop() {
            match returned {
                Returned::Inbound(index, _) => self.free(worker, Table::Inbound, index),
                Returned::Outbound(index, _) => self.free(worker, Table::Outbound, index),
                Returned::Config(_) | Returned::Fib(_) | Returned::Relay(_) | Returned::Commands(_) => {}
                Returned::Sas(mut snapshots) => self.snapshots.append(&mut snapshots),
                Returned::Tops(tops) => {
                    let tops: Vec<_> = tops.into_iter().map(|(id, _, top)| (id, top)).collect();
                    if let Err(error) = self.windows.look(&tops, &mut self.ledger) {
                        tracing::error!(%error, "cannot keep the tops of anti-replay windows; trying again");
                    }
                }
                Returned::Relays(counters) => self.relay_counters.extend(counters),
                Returned::Latency(histogram) => match &mut self.latency {
                    Some(sum) => drop(sum.add(&*histogram)),
                    None => self.latency = Some(*histogram),
                },
                Returned::Event(event) => self.events.push(event),
                Returned::Reserve { index, id, last, ceiling } => {
                    self.unreserved.push((id, index, last, ceiling));
                }
            }
        }
        // What failed before waits for the next tick: a full disk is not written to for every packet.
        if self.unreserved.len() > failed {
            self.grant();
        }
    }

    /// Writes higher ceilings and tells the workers. What cannot be written is tried again with the next tick.
    fn grant(&mut self) {
        if self.unreserved.is_empty() {
            return;
        }
        let mut raises = Vec::new();
        let mut grants = Vec::new();
        for (id, index, last, ceiling) in &self.unreserved {
            let Some(config) = self.sas.get(id) else { continue };
            if let Some(print) = key_name(config) {
                let raised = ceiling.max(last).saturating_add(RESERVE_BLOCK);
                raises.push((print, raised));
                grants.push((
                    config.handle.worker(),
                    Command::Raise { index: *index, id: *id, ceiling: raised },
                ));
            }
        }
        match self.ledger.raise(&raises) {
            Ok(()) => {
                self.unreserved.clear();
                for (worker, command) in grants {
                    self.send(worker, command);
                }
                self.flush();
            }
            Err(error) => {
                tracing::error!(%error, sas = raises.len(), "cannot reserve sequence numbers; trying again");
            }
        }
    }

    fn free(&mut self, worker: u8, table: Table, index: u32) {
        if let Some(link) = self.workers.get_mut(usize::from(worker)) {
            link.indices(table).free.push(index);
        }
    }
}

/// Second since the start at which an SA reaches its soft or hard limit in seconds.
fn deadline(config: &SaShared, hard: bool) -> Option<u64> {
    let lifetime = config.lifetime()?;
    let limits = if hard { &lifetime.hard } else { &lifetime.soft };
    limits.seconds.map(|seconds| u64::from(config.installed).saturating_add(seconds))
}
