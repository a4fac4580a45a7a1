//! A simulated world: nodes with an [`Endpoint`] each, the network between them, and a clock that only moves when nothing
//! is left to be done.
//!
//! Everything that happens follows from the seed. Each node is driven the way the daemon drives an endpoint: outputs in
//! order, those of one IKE SA waiting while an `Install` of it is not acknowledged. Its datapath is a table of installed
//! CHILD_SAs, through which probes can be sent to see whether packets would arrive.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use postern_ike::Random;
use postern_ike::config::{Connection, PoolConfig, Settings};
use postern_ike::endpoint::{Endpoint, Host, Now};
use postern_ike::ignored::Ignored;
use postern_ike::job::{Done, JobId};
use postern_ike::message::registry::ExchangeType;
use postern_ike::message::{Head, parse};
use postern_ike::output::{
    ChildId, ChildSa, Effect, IkeSaView, Output, Path, Persist, SaId, VirtualConfiguration,
};
use postern_ike::record::{SavedBody, SavedIke};
use postern_ike::recovery::{self, Recovery};
use postern_ike::report::{Failure, Report};

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.next() % end }
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn up_to(&mut self, most: Duration) -> Duration {
        let nanoseconds = u64::try_from(most.as_nanos()).unwrap();
        Duration::from_nanos(self.below(nanoseconds + 1))
    }
}

impl Random for Seeded {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next().to_be_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// What the network does to IKE messages.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Per cent that are lost.
    pub loss: u64,
    /// Per cent that arrive twice.
    pub duplicate: u64,
    /// Per cent of which one byte is changed.
    pub corrupt: u64,
    /// Every message takes this long,
    pub delay: Duration,
    /// and up to this much longer, so that messages overtake each other.
    pub jitter: Duration,
}

impl Link {
    pub const GOOD: Self =
        Self { loss: 0, duplicate: 0, corrupt: 0, delay: Duration::from_millis(10), jitter: Duration::ZERO };

    pub const BAD: Self = Self {
        loss: 20,
        duplicate: 10,
        corrupt: 2,
        delay: Duration::from_millis(5),
        jitter: Duration::from_millis(1_500),
    };
}

/// A NAT with one public address.
#[derive(Clone, Debug)]
pub struct Nat {
    pub public: IpAddr,
    next_port: u16,
    /// Inner address and port to outer port.
    mappings: BTreeMap<SocketAddr, u16>,
}

/// A datagram on the network.
#[derive(Clone, Debug)]
pub struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

/// What stands between sender and network; may change, swallow (`None`) or record.
pub type Tap = Box<dyn FnMut(&mut Seeded, usize, Datagram) -> Option<Datagram>>;
/// Answers an `Install`.
pub type Installer = Box<dyn FnMut(&ChildSa) -> Result<(), String>>;
type Action = Box<dyn FnOnce(&mut World)>;

/// What a node's machine has.
#[derive(Debug, Default)]
struct Machine {
    spis: BTreeSet<u32>,
    next_spi: u32,
    addresses: Vec<IpAddr>,
}

struct Handle(Arc<Mutex<Machine>>);

impl Host for Handle {
    fn allocate_spi(&mut self, _: &mut dyn Random) -> u32 {
        let mut machine = self.0.lock().unwrap();
        machine.next_spi += 1;
        let spi = 0x1000 + machine.next_spi;
        machine.spis.insert(spi);
        spi
    }

    fn claim_spi(&mut self, spi: u32) -> bool {
        self.0.lock().unwrap().spis.insert(spi)
    }

    fn release_spi(&mut self, spi: u32) {
        assert!(self.0.lock().unwrap().spis.remove(&spi), "SPI {spi:x} released twice");
    }

    fn source_address(&mut self, remote: IpAddr) -> Option<IpAddr> {
        let machine = self.0.lock().unwrap();
        machine.addresses.iter().copied().find(|address| address.is_ipv4() == remote.is_ipv4())
    }
}

/// A CHILD_SA in the datapath.
#[derive(Debug)]
pub struct Installed {
    pub sa: ChildSa,
    pub in_use: bool,
}

/// One machine.
pub struct Node {
    pub name: &'static str,
    pub endpoint: Endpoint,
    configured: Vec<Arc<Connection>>,
    machine: Arc<Mutex<Machine>>,
    random: Seeded,
    pub behind: Option<usize>,
    pub children: BTreeMap<ChildId, Installed>,
    /// In the order of their `Use`, so that the last is what packets take.
    used: Vec<ChildId>,
    pub reports: Vec<(Duration, Report)>,
    pub keepalives: usize,
    pub transmitted: usize,
    pub virtual_configuration: Option<VirtualConfiguration>,
    /// Jobs take up to this long.
    pub job_time: Duration,
    /// Installing takes up to this long.
    pub install_time: Duration,
    pub installer: Installer,
    installing: BTreeSet<ChildId>,
    /// What was not installed: a `Retire` may have been on its way when that became known.
    refused: BTreeSet<ChildId>,
    /// Outputs of an IKE SA that wait for its `Install`.
    held: HashMap<SaId, (ChildId, VecDeque<Effect>)>,
    pub probes: Probes,
    /// What is saved for the time after a reset; it outlives the node.
    pub store: BTreeMap<[u8; 16], Vec<u8>>,
    /// How often something was saved.
    pub saved: usize,
    pub recovery: Option<Recovery>,
    pub ended: Vec<recovery::Ended>,
}

/// Packets sent through CHILD_SAs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probes {
    pub sent: usize,
    pub arrived: usize,
    pub without_sa: usize,
    pub lost: Vec<String>,
}

enum Event {
    Deliver(Datagram),
    Probe { from: usize, source: IpAddr, remote: IpAddr, encap: Option<(u16, u16)>, spi: u32, keys: Vec<u8> },
    Computed(usize, JobId, Done),
    Installed(usize, SaId, ChildId, Result<(), String>),
    Action(Action),
}

struct Scheduled {
    at: Duration,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Everything.
pub struct World {
    pub nodes: Vec<Node>,
    pub nats: Vec<Nat>,
    pub link: Link,
    pub random: Seeded,
    pub tap: Option<Tap>,
    /// Since the beginning.
    pub clock: Duration,
    origin: Instant,
    wall: SystemTime,
    events: BinaryHeap<Scheduled>,
    order: u64,
    /// Addresses that no node has any more, or that are cut off.
    pub unreachable: BTreeSet<IpAddr>,
    /// Everything that happens is printed: with TRACE in the environment.
    trace: bool,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            nodes: Vec::new(),
            nats: Vec::new(),
            link: Link::GOOD,
            random: Seeded::new(seed),
            tap: None,
            clock: Duration::ZERO,
            origin: Instant::now(),
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_000_000),
            events: BinaryHeap::new(),
            order: 0,
            unreachable: BTreeSet::new(),
            trace: std::env::var_os("TRACE").is_some(),
        }
    }

    /// A node with these addresses; gives its number.
    pub fn node(&mut self, name: &'static str, addresses: &[IpAddr], settings: Settings) -> usize {
        let random = Seeded::new(self.random.next());
        let machine = Machine { addresses: addresses.to_vec(), ..Machine::default() };
        let machine = Arc::new(Mutex::new(machine));
        let host = Box::new(Handle(Arc::clone(&machine)));
        self.nodes.push(Node {
            name,
            endpoint: Endpoint::new(settings, host, Box::new(random.clone())),
            configured: Vec::new(),
            machine,
            random: Seeded::new(self.random.next()),
            behind: None,
            children: BTreeMap::new(),
            used: Vec::new(),
            reports: Vec::new(),
            keepalives: 0,
            transmitted: 0,
            virtual_configuration: None,
            job_time: Duration::ZERO,
            install_time: Duration::ZERO,
            installer: Box::new(|_| Ok(())),
            installing: BTreeSet::new(),
            refused: BTreeSet::new(),
            held: HashMap::new(),
            probes: Probes::default(),
            store: BTreeMap::new(),
            saved: 0,
            recovery: None,
            ended: Vec::new(),
        });
        self.nodes.len() - 1
    }

    /// Puts a node behind a new NAT.
    pub fn nat(&mut self, node: usize, public: IpAddr) -> usize {
        self.nats.push(Nat { public, next_port: 20_000, mappings: BTreeMap::new() });
        self.nodes[node].behind = Some(self.nats.len() - 1);
        self.nats.len() - 1
    }

    /// The NAT forgets what it knows: the next packets from inside leave from other ports.
    pub fn reboot_nat(&mut self, nat: usize) {
        self.nats[nat].mappings.clear();
        self.nats[nat].next_port += 1_000;
    }

    pub fn configure(&mut self, node: usize, connections: Vec<Arc<Connection>>, pools: &[PoolConfig]) {
        self.nodes[node].configured.clone_from(&connections);
        self.with(node, |endpoint, now| endpoint.configure(now, connections, pools));
    }

    /// The same connections as before a restart.
    pub fn reconfigure(&mut self, node: usize) {
        let connections = self.nodes[node].configured.clone();
        self.with(node, |endpoint, now| endpoint.configure(now, connections, &[]));
    }

    pub fn initiate(&mut self, node: usize, connection: &str) {
        self.with(node, |endpoint, now| endpoint.initiate(now, connection, None).unwrap());
    }

    /// The node loses everything that it knows; its machine's SPIs are free again.
    pub fn restart(&mut self, node: usize, settings: Settings) {
        let random = Seeded::new(self.random.next());
        let Node { endpoint, machine, children, used, installing, held, .. } = &mut self.nodes[node];
        *endpoint = Endpoint::new(settings, Box::new(Handle(Arc::clone(machine))), Box::new(random));
        machine.lock().unwrap().spis.clear();
        children.clear();
        used.clear();
        installing.clear();
        held.clear();
        self.events.retain(|scheduled| match scheduled.event {
            Event::Computed(of, ..) | Event::Installed(of, ..) => of != node,
            _ => true,
        });
    }

    /// The node comes back from a reset: it knows what was saved and tells the peers.
    pub fn recover(&mut self, node: usize, settings: Settings, pace: recovery::Settings) {
        self.restart(node, settings);
        let random = Box::new(Seeded::new(self.random.next()));
        let records: Vec<SavedIke> =
            self.nodes[node].store.values().map(|bytes| SavedIke::decode(bytes).unwrap()).collect();
        self.nodes[node].recovery = Some(Recovery::new(records, pace, self.now(), random));
        self.pump_recovery(node);
    }

    /// The same, with its configuration: what was saved whole goes on, and only the peers of the rest are told.
    pub fn resume(
        &mut self,
        node: usize,
        settings: Settings,
        connections: Vec<Arc<Connection>>,
        pools: &[PoolConfig],
    ) {
        self.restart(node, settings);
        self.configure(node, connections, pools);
        let records: Vec<SavedIke> =
            self.nodes[node].store.values().map(|bytes| SavedIke::decode(bytes).unwrap()).collect();
        let refused = self.with(node, |endpoint, now| endpoint.restore(now, records));
        let random = Box::new(Seeded::new(self.random.next()));
        let pace = recovery::Settings::default();
        self.nodes[node].recovery = Some(Recovery::new(refused, pace, self.now(), random));
        self.pump_recovery(node);
    }

    fn pump_recovery(&mut self, node: usize) {
        let now = self.now().monotonic;
        loop {
            let Node { recovery: Some(recovery), store, ended, .. } = &mut self.nodes[node] else { return };
            let message = recovery.poll(now);
            while let Some(one) = recovery.poll_ended() {
                store.remove(&one.key);
                ended.push(one);
            }
            let Some((path, bytes)) = message else { return };
            self.note(|| format!("{} tells {}", self.nodes[node].name, summary(path.remote, &bytes)));
            self.transmit(node, Datagram { from: path.local, to: path.remote, bytes });
        }
    }

    /// No request of this side goes out before its message ID is saved as used (RST-1).
    fn check_saved(&self, node: usize, datagram: &[u8]) {
        let Ok((head, ..)) = parse::head(datagram) else { return };
        let key = [head.spi_i.0.to_be_bytes(), head.spi_r.0.to_be_bytes()].concat();
        let negotiating = [ExchangeType::IKE_SA_INIT, ExchangeType::IKE_AUTH].contains(&head.exchange);
        let Some(bytes) = self.nodes[node].store.get(key.as_slice()) else { return };
        let saved = SavedIke::decode(bytes).unwrap();
        let own = head.from_initiator == saved.initiator;
        if negotiating || !own {
            return;
        }
        let (next_request, expected_request) = match saved.body {
            SavedBody::V2Context(context) => (context.next_request, u32::MAX),
            SavedBody::Whole(whole) => (whole.context.next_request, whole.expected_request),
            SavedBody::V1Context(_) | SavedBody::Prebuilt(_) => return,
        };
        let next = if head.response { expected_request } else { next_request };
        assert!(next > head.message_id, "message ID {} is not saved", head.message_id);
    }

    /// The node has these addresses from now on.
    pub fn readdress(&mut self, node: usize, addresses: &[IpAddr]) {
        let old =
            std::mem::replace(&mut self.nodes[node].machine.lock().unwrap().addresses, addresses.to_vec());
        self.unreachable.extend(old);
        for address in addresses {
            self.unreachable.remove(address);
        }
        self.with(node, |endpoint, now| endpoint.addresses_changed(now, addresses));
    }

    pub fn now(&self) -> Now {
        Now { monotonic: self.origin + self.clock, wall: self.wall + self.clock }
    }

    /// Calls a node's endpoint and does what it wants done.
    pub fn with<T>(&mut self, node: usize, call: impl FnOnce(&mut Endpoint, Now) -> T) -> T {
        let now = self.now();
        let result = call(&mut self.nodes[node].endpoint, now);
        self.pump(node);
        result
    }

    pub fn after(&mut self, delay: Duration, action: impl FnOnce(&mut Self) + 'static) {
        self.schedule(delay, Event::Action(Box::new(action)));
    }

    fn schedule(&mut self, delay: Duration, event: Event) {
        self.order += 1;
        self.events.push(Scheduled { at: self.clock + delay, order: self.order, event });
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        let end = self.clock + time;
        while self.step(end) {}
        self.clock = end;
    }

    /// Lets time pass until `done`; whether it came to that.
    pub fn run_until(&mut self, time: Duration, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = self.clock + time;
        loop {
            if done(self) {
                return true;
            }
            if !self.step(end) {
                self.clock = end;
                return done(self);
            }
        }
    }

    /// Does what comes next, if that is before `end`.
    fn step(&mut self, end: Duration) -> bool {
        let timer = (0..self.nodes.len())
            .filter_map(|node| {
                let Node { endpoint, recovery, .. } = &self.nodes[node];
                let recovery = recovery.as_ref().and_then(Recovery::poll_timeout);
                let at = endpoint.poll_timeout().into_iter().chain(recovery).min()?;
                Some((at.saturating_duration_since(self.origin).max(self.clock), node))
            })
            .min();
        let event = self.events.peek().map(|event| event.at);
        match (timer, event) {
            (Some((at, node)), event) if at <= end && event.is_none_or(|event| at <= event) => {
                self.clock = at;
                self.pump_recovery(node);
                self.with(node, Endpoint::handle_timeout);
                let again = self.nodes[node].endpoint.poll_timeout();
                assert!(
                    again.is_none_or(|again| again > self.origin + at),
                    "a timer of {} stands still: {:?}",
                    self.nodes[node].name,
                    self.nodes[node].endpoint.sas(self.now()).collect::<Vec<_>>()
                );
                true
            }
            (_, Some(at)) if at <= end => {
                self.clock = at;
                let event = self.events.pop().unwrap().event;
                self.happen(event);
                true
            }
            _ => false,
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Action(action) => action(self),
            Event::Computed(node, id, done) => {
                self.with(node, |endpoint, now| endpoint.computed(now, id, done));
            }
            Event::Installed(node, sa, child, result) => {
                if result.is_err() {
                    self.nodes[node].children.remove(&child);
                    self.nodes[node].refused.insert(child);
                }
                self.nodes[node].installing.remove(&child);
                self.with(node, |endpoint, now| endpoint.installed(now, child, result));
                let held = self.nodes[node].held.remove(&sa);
                let mut rest = held.map(|(_, effects)| effects).unwrap_or_default();
                while let Some(effect) = rest.pop_front() {
                    self.apply(node, Some(sa), effect);
                    if let Some((_, held)) = self.nodes[node].held.get_mut(&sa) {
                        held.extend(rest);
                        break;
                    }
                }
            }
            Event::Deliver(datagram) => self.deliver(&datagram),
            Event::Probe { from, source, remote, encap, spi, keys } => {
                self.probe_arrives(from, source, remote, encap, spi, &keys);
            }
        }
    }

    fn pump(&mut self, node: usize) {
        while let Some(Output { sa, effect }) = self.nodes[node].endpoint.poll_output() {
            match sa.and_then(|sa| self.nodes[node].held.get_mut(&sa)) {
                Some((_, held)) => held.push_back(effect),
                None => self.apply(node, sa, effect),
            }
        }
    }

    fn apply(&mut self, node: usize, sa: Option<SaId>, effect: Effect) {
        self.note(|| {
            let (name, sa) = (self.nodes[node].name, sa.map_or(0, |sa| sa.0));
            match &effect {
                Effect::Transmit { path, datagram } => {
                    format!("{name} {sa} sends {}", summary(path.remote, datagram))
                }
                Effect::Compute { id, .. } => format!("{name} {sa} computes {id:?}"),
                Effect::Install(child) => format!(
                    "{name} {sa} installs {:?} {:x}/{:x} replaces {:?} in_use {}",
                    child.id, child.spi_in, child.spi_out, child.replaces, child.in_use
                ),
                _ => format!("{name} {sa} {effect:?}"),
            }
        });
        match effect {
            Effect::Persist(Persist::Put(record)) => {
                let bytes = record.encode().to_vec();
                assert_eq!(SavedIke::decode(&bytes).unwrap(), *record);
                self.nodes[node].store.insert(record.key(), bytes);
                self.nodes[node].saved += 1;
            }
            Effect::Persist(Persist::Remove((spi_i, spi_r))) => {
                let key = [spi_i.0.to_be_bytes(), spi_r.0.to_be_bytes()].concat();
                let found = self.nodes[node].store.remove(key.as_slice());
                assert!(found.is_some(), "{spi_i}/{spi_r} was never saved");
            }
            Effect::Transmit { path, datagram } => {
                self.check_saved(node, &datagram);
                assert_eq!(path.natt, path.local.port() == 4500, "marker on port 4500 only: {path:?}");
                self.nodes[node].transmitted += 1;
                self.transmit(node, Datagram { from: path.local, to: path.remote, bytes: datagram });
            }
            Effect::Keepalive(path) => {
                self.nodes[node].keepalives += 1;
                self.translate_out(node, path.local);
            }
            Effect::Compute { id, job } => {
                let done = job.run(&mut self.nodes[node].random);
                let time = self.random.up_to(self.nodes[node].job_time);
                self.schedule(time, Event::Computed(node, id, done));
            }
            Effect::Install(child) => {
                let sa = sa.expect("a child belongs to an IKE SA");
                let result = (self.nodes[node].installer)(&child);
                let id = child.id;
                let Node { children, used, installing, held, machine, .. } = &mut self.nodes[node];
                assert!(
                    machine.lock().unwrap().spis.contains(&child.spi_in),
                    "an SPI that was not allocated"
                );
                assert!(
                    children.values().all(|other| other.sa.spi_in != child.spi_in),
                    "SPI {:x} installed twice",
                    child.spi_in
                );
                if child.in_use && result.is_ok() {
                    used.push(id);
                }
                let installed = Installed { in_use: child.in_use, sa: *child };
                assert!(children.insert(id, installed).is_none(), "{id:?} installed twice");
                installing.insert(id);
                held.insert(sa, (id, VecDeque::new()));
                let time = self.random.up_to(self.nodes[node].install_time);
                self.schedule(time, Event::Installed(node, sa, id, result));
            }
            Effect::Use(child) => {
                let Node { children, used, .. } = &mut self.nodes[node];
                children.get_mut(&child).expect("used, but not installed").in_use = true;
                used.retain(|other| *other != child);
                used.push(child);
            }
            Effect::Move { child, local, remote, encap } => {
                let child = self.nodes[node].children.get_mut(&child).expect("moved, but not installed");
                (child.sa.local, child.sa.remote, child.sa.encap) = (local, remote, encap);
            }
            Effect::Retire(child) => {
                let Node { children, used, refused, .. } = &mut self.nodes[node];
                let found = children.remove(&child).is_some() || refused.remove(&child);
                assert!(found, "{child:?} retired, but not installed");
                used.retain(|other| *other != child);
            }
            Effect::Configure(configuration) => {
                self.nodes[node].virtual_configuration = Some(configuration);
            }
            Effect::Unconfigure => self.nodes[node].virtual_configuration = None,
            Effect::Report(report) => {
                let clock = self.clock;
                self.nodes[node].reports.push((clock, report));
            }
        }
    }

    /// Source address as the network sees it.
    fn translate_out(&mut self, node: usize, from: SocketAddr) -> SocketAddr {
        let Some(nat) = self.nodes[node].behind else { return from };
        let Nat { public, next_port, mappings } = &mut self.nats[nat];
        let port = *mappings.entry(from).or_insert_with(|| {
            *next_port += 1;
            *next_port
        });
        SocketAddr::new(*public, port)
    }

    /// Which node gets what is sent to `to`, and at which of its addresses.
    fn translate_in(&self, to: SocketAddr) -> Option<(usize, SocketAddr)> {
        if self.unreachable.contains(&to.ip()) {
            return None;
        }
        for (index, nat) in self.nats.iter().enumerate() {
            if nat.public == to.ip() {
                let inner = *nat.mappings.iter().find(|(_, port)| **port == to.port())?.0;
                let node = self.nodes.iter().position(|node| {
                    node.behind == Some(index) && node.machine.lock().unwrap().addresses.contains(&inner.ip())
                })?;
                return Some((node, inner));
            }
        }
        let node = self.nodes.iter().position(|node| {
            node.behind.is_none() && node.machine.lock().unwrap().addresses.contains(&to.ip())
        })?;
        Some((node, to))
    }

    fn transmit(&mut self, node: usize, datagram: Datagram) {
        let Some(mut datagram) = (match &mut self.tap {
            Some(tap) => tap(&mut self.random, node, datagram),
            None => Some(datagram),
        }) else {
            return;
        };
        if self.unreachable.contains(&datagram.from.ip()) {
            return;
        }
        datagram.from = self.translate_out(node, datagram.from);
        self.inject(datagram);
    }

    /// Puts a datagram into the network.
    pub fn inject(&mut self, mut datagram: Datagram) {
        let Link { loss, duplicate, corrupt, delay, jitter } = self.link;
        if self.random.chance(loss) {
            return self.note(|| "  lost".to_owned());
        }
        if self.random.chance(duplicate) {
            let time = delay + self.random.up_to(jitter);
            self.schedule(time, Event::Deliver(datagram.clone()));
        }
        if self.random.chance(corrupt) {
            let length = u64::try_from(datagram.bytes.len()).unwrap();
            let at = usize::try_from(self.random.below(length)).unwrap();
            let bit = self.random.below(8);
            datagram.bytes[at] ^= 1 << bit;
        }
        let time = delay + self.random.up_to(jitter);
        self.schedule(time, Event::Deliver(datagram));
    }

    fn deliver(&mut self, datagram: &Datagram) {
        let Some((node, local)) = self.translate_in(datagram.to) else { return };
        let natt = local.port() == 4500;
        // As the daemon's socket does it: elsewhere nobody listens.
        if !natt && local.port() != 500 {
            return;
        }
        let path = Path { local, remote: datagram.from, natt };
        self.note(|| format!("{} gets {}", self.nodes[node].name, summary(local, &datagram.bytes)));
        if let Some(recovery) = &mut self.nodes[node].recovery
            && recovery.handle_datagram(path, &datagram.bytes)
        {
            return self.pump_recovery(node);
        }
        self.with(node, |endpoint, now| endpoint.handle_datagram(now, path, &datagram.bytes));
    }

    /// Every `interval` one packet through the CHILD_SA that packets would take now, for `time`.
    pub fn probe_regularly(&mut self, node: usize, interval: Duration, time: Duration) {
        let end = self.clock + time;
        self.probe(node);
        self.after(interval, move |world| {
            if world.clock < end {
                world.probe_regularly(node, interval, end.saturating_sub(world.clock));
            }
        });
    }

    /// One packet, which the network neither loses nor overtakes with another.
    pub fn probe(&mut self, node: usize) {
        let Node { children, used, probes, .. } = &mut self.nodes[node];
        let Some(child) = used.last().and_then(|id| children.get(id)) else {
            probes.without_sa += 1;
            return;
        };
        probes.sent += 1;
        let ChildSa { spi_out, local, remote, encap, .. } = child.sa;
        let keys = child.sa.keys_out.0.expose().to_vec();
        let delay = self.link.delay;
        let event = Event::Probe { from: node, source: local, remote, encap, spi: spi_out, keys };
        self.schedule(delay, event);
    }

    fn probe_arrives(
        &mut self,
        from: usize,
        source: IpAddr,
        remote: IpAddr,
        encap: Option<(u16, u16)>,
        spi: u32,
        keys: &[u8],
    ) {
        let (from_port, to_port) = encap.unwrap_or_default();
        let seen = match encap {
            Some(_) => self.translate_out(from, SocketAddr::new(source, from_port)),
            None => SocketAddr::new(source, 0),
        };
        let arrives = self.translate_in(SocketAddr::new(remote, to_port));
        let problem = match arrives {
            None => Some(format!("nobody at {remote}:{to_port}")),
            Some((node, _)) => {
                let node = &self.nodes[node];
                match node.children.values().find(|child| child.sa.spi_in == spi) {
                    None => Some(format!("{} has no SPI {spi:x}", node.name)),
                    Some(child) if child.sa.keys_in.0.expose() != keys => {
                        Some(format!("other keys for {spi:x}"))
                    }
                    Some(child) if child.sa.encap.is_some() != encap.is_some() => {
                        Some(format!("encapsulation differs: {encap:?}, {:?}", child.sa.encap))
                    }
                    Some(_) => None,
                }
            }
        };
        let clock = self.clock;
        match problem {
            None => {
                self.nodes[from].probes.arrived += 1;
                // The datapath follows an authenticated packet from elsewhere, and tells of it.
                let (node, _) = arrives.unwrap();
                let mut children = self.nodes[node].children.values_mut();
                let sa = &mut children.find(|child| child.sa.spi_in == spi).unwrap().sa;
                let known = SocketAddr::new(sa.remote, sa.encap.map_or(0, |(_, port)| port));
                if known != seen {
                    let (id, port) = (sa.id, encap.map(|_| seen.port()));
                    sa.remote = seen.ip();
                    sa.encap = sa.encap.map(|(local, _)| (local, seen.port()));
                    self.with(node, |endpoint, now| endpoint.peer_moved(now, id, seen.ip(), port));
                }
            }
            Some(problem) => {
                self.note(|| format!("probe lost: {problem}"));
                self.nodes[from].probes.lost.push(format!("{clock:?}: {problem}"));
            }
        }
    }

    /// IKE SAs that a node believes to be established, oldest first.
    pub fn established(&self, node: usize) -> Vec<IkeSaView> {
        let mut views: Vec<IkeSaView> = self.nodes[node]
            .endpoint
            .sas(self.now())
            .filter(|view| view.state != "connecting" && view.state != "deleting")
            .collect();
        views.sort_by_key(|view| view.id);
        views
    }

    /// Whether both have exactly the same: IKE SAs by SPIs, and children that fit each other.
    pub fn agree(&self, a: usize, b: usize) -> Result<(), String> {
        let spis = |node: usize| -> BTreeSet<_> {
            self.established(node).iter().map(|view| (view.spis.0.0, view.spis.1.0)).collect()
        };
        if spis(a) != spis(b) {
            return Err(format!("IKE SAs differ: {:x?}, {:x?}", spis(a), spis(b)));
        }
        for (here, there) in [(a, b), (b, a)] {
            for child in self.nodes[here].children.values() {
                let ChildSa { spi_in, spi_out, .. } = child.sa;
                let other = self.nodes[there].children.values().find(|other| {
                    other.sa.spi_in == spi_out
                        && other.sa.spi_out == spi_in
                        && other.sa.keys_in == child.sa.keys_out
                        && other.sa.keys_out == child.sa.keys_in
                        && other.sa.local_ts == child.sa.remote_ts
                        && other.sa.remote_ts == child.sa.local_ts
                });
                if other.is_none() {
                    let (here, there) = (self.nodes[here].name, self.nodes[there].name);
                    return Err(format!("child {spi_in:x}/{spi_out:x} of {here} is unknown to {there}"));
                }
            }
        }
        Ok(())
    }

    /// Nothing is left of anything: no IKE SA, no CHILD_SA, no SPI.
    pub fn is_clean(&self, node: usize) -> Result<(), String> {
        let Node { endpoint, children, machine, .. } = &self.nodes[node];
        if !endpoint.is_empty() {
            return Err(format!("IKE SAs are left: {:?}", endpoint.sas(self.now()).collect::<Vec<_>>()));
        }
        if !children.is_empty() {
            return Err(format!("children are left: {children:?}"));
        }
        let spis = &machine.lock().unwrap().spis;
        if spis.is_empty() { Ok(()) } else { Err(format!("SPIs are left: {spis:x?}")) }
    }

    /// SPIs that are allocated are those of installed children.
    pub fn no_leak(&self, node: usize) -> Result<(), String> {
        let Node { children, machine, name, .. } = &self.nodes[node];
        let used: BTreeSet<u32> = children.values().map(|child| child.sa.spi_in).collect();
        let spis = &machine.lock().unwrap().spis;
        if &used == spis { Ok(()) } else { Err(format!("{name}: SPIs {spis:x?}, in use {used:x?}")) }
    }

    pub fn failures(&self, node: usize) -> Vec<&Failure> {
        let reports = self.nodes[node].reports.iter();
        reports
            .filter_map(|(_, report)| match report {
                Report::Failed { failure, .. } | Report::ChildFailed { failure, .. } => Some(failure),
                _ => None,
            })
            .collect()
    }

    pub fn ignored(&self, node: usize, reason: Ignored) -> u64 {
        let mut all = self.nodes[node].endpoint.counters().ignored_by_reason();
        all.find(|(found, _)| *found == reason).map_or(0, |(_, count)| count)
    }

    fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            let line = format!("{:?} {}", self.clock, text());
            println!("{}", &line[..line.floor_char_boundary(300)]);
        }
    }
}

fn summary(to: SocketAddr, bytes: &[u8]) -> String {
    let Some(peek) = parse::peek(bytes) else { return format!("{} bytes to {to}", bytes.len()) };
    let Head { spi_i, spi_r, exchange, response, message_id, .. } = peek.head;
    let what = if response { "response" } else { "request" };
    format!("{exchange} {what} {message_id} of {spi_i}/{spi_r} to {to}, {} bytes", bytes.len())
}
