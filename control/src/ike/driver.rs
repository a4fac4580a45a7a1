//! The task that owns the endpoint and its sockets: the only place where IKE meets a clock, the network and the datapath.
//!
//! ```text
//! sockets ─► handle_datagram ─┐                    ┌─► Transmit, Keepalive ─► sockets
//! timer ───► handle_timeout ──┤                    ├─► Compute ─► job threads ─► computed
//! commands ► initiate, … ─────┼─► Endpoint ─► Output ─► Install, Use, Move, Retire ─► Datapath ─► supervisor
//! notices ─► installed, … ────┘                    ├─► Configure ─► netlink
//!                                                  └─► Report ─► log, followers, Keeper
//! ```
//!
//! Outputs of one IKE SA are applied in their order. One that has to be acknowledged (`Install`, `Use`, `Move`) holds up
//! what comes after it for the same IKE SA, and nothing else. The task runs on a thread of its own, so that a burst of
//! handshakes does not keep the supervisor from the datapath.
//!
//! Where the datapath reads ESP in UDP beside whoever has port 4500 (a socket port), this task listens even without a
//! connection, and then discards what it receives. While control is away the datapath has the port; it leaves it when
//! control connects.
//!
//! Nothing is received before the first connection to the datapath: a peer that asks earlier repeats its request, which is
//! better than an SA that cannot be installed.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use postern_ike::config::{Connection, Start};
use postern_ike::endpoint::{Endpoint, Now, Target};
use postern_ike::job::{Done, JobId};
use postern_ike::output::{ChildId, Effect, Output, SaId};
use postern_ike::qcd::TokenMaker;
use postern_ike::report::Report;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tracing::{info, warn};

use super::address::{self, VirtualAddresses};
use super::api::{EventKind, IkeCommand};
use super::datapath::{Datapath, Told, Trap};
use super::describe::trap_selectors;
use super::events::{Events, Happened};
use super::host::{Machine, source_address};
use super::jobs::{Jobs, System};
use super::keeper::{Keeper, is_kept};
use super::keylog::KeyLog;
use super::reset::Memory;
use super::resolv::NameServers;
use super::sockets::{LARGEST, Received, Sockets};
use super::spis::Spis;
use crate::config::ike::{ChildSettings, Ike};
use crate::datapath::supervisor::{Notice, Order};
use crate::recovery::{self, Ending};

/// Datagrams that are read before anything else has its turn.
const BATCH: usize = 256;

/// How long peers have to answer a last Delete; those that have not are told again at the next start.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Housekeeping.
const TICK: Duration = Duration::from_secs(1);

/// Between attempts to open the sockets.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// Children that a restarted datapath lost are rekeyed so many at a tick.
const RENEWALS: usize = 256;

/// A lost child that could not be rekeyed in this time is deleted and, if it is kept, begun again.
const RENEWAL: Duration = Duration::from_secs(15);

/// Sources that are remembered as heard of.
const SOURCES: usize = 4096;

/// What the task is given.
#[derive(Debug)]
pub struct Parts {
    /// The configuration.
    pub config: Ike,
    /// `datapath.sa_slots`.
    pub slots: u32,
    /// Inbound SPIs that are configured for other things.
    pub taken: Vec<u32>,
    /// Interface of virtual addresses.
    pub interface: String,
    /// Whether to listen without connections too, for the datapath's sake.
    pub shares_natt: bool,
    /// Orders to the supervisor.
    pub orders: mpsc::UnboundedSender<Order>,
    /// Its notices.
    pub notices: mpsc::UnboundedReceiver<Notice>,
    /// What recovery from a reset needs to know.
    pub recovery: recovery::Start,
    /// When the process began.
    pub began: Instant,
    /// The management socket's commands.
    pub commands: mpsc::Receiver<IkeCommand>,
    /// Told once when the daemon ends.
    pub stop: oneshot::Receiver<Stop>,
}

/// How IKE ends.
#[derive(Debug)]
pub struct Stop {
    /// Whether the datapath ends too: then peers are told that their SAs are gone. If it goes on forwarding they are
    /// not, and the next control process replaces the SAs.
    pub delete: bool,
    /// Told when it is done.
    pub done: oneshot::Sender<()>,
}

/// The task.
pub struct Driver {
    pub(super) endpoint: Endpoint,
    pub(super) config: Ike,
    pub(super) datapath: Datapath,
    pub(super) events: Events,
    pub(super) keeper: Keeper,
    pub(super) sockets: Option<Sockets>,
    /// Why there are no sockets.
    pub(super) listen_problem: Option<String>,
    listen_next: Instant,
    jobs: Jobs,
    settings: HashMap<Arc<str>, Vec<ChildSettings>>,
    /// IKE SAs that wait for an acknowledgement, with what comes after it.
    blocked: HashMap<SaId, VecDeque<Effect>>,
    installing: HashMap<ChildId, SaId>,
    renewals: VecDeque<ChildId>,
    renewing: HashMap<ChildId, Instant>,
    addresses: VirtualAddresses,
    name_servers: NameServers,
    keylog: Option<Arc<KeyLog>>,
    pub(super) memory: Memory,
    /// When the process began.
    pub(super) began: Instant,
    /// Control's state directory.
    state: PathBuf,
    /// When something came from an address.
    pub(super) heard: HashMap<IpAddr, Instant>,
    /// The datapath was connected once.
    ready: bool,
    trouble_next: Instant,
    shares_natt: bool,
    /// It was told to end, and until then peers may answer.
    ending: Option<(Stop, Instant)>,
}

impl Driver {
    /// Runs until told to stop. Needs a runtime of one thread.
    pub async fn run(parts: Parts) -> std::io::Result<()> {
        let Parts {
            config,
            slots,
            taken,
            interface,
            shares_natt,
            orders,
            mut notices,
            recovery,
            began,
            mut commands,
            mut stop,
        } = parts;
        let (durable, mut committed) = mpsc::unbounded_channel();
        let mut beginning = recovery::begin(&recovery, durable).await;
        let tokens = beginning.tokens.take().map(TokenMaker::new);
        let whole = std::mem::take(&mut beginning.restore);
        let memory = Memory::new(beginning);
        let (sender, mut done) = mpsc::unbounded_channel();
        let threads = NonZero::new(config.threads).unwrap_or(NonZero::<usize>::MIN);
        let jobs = Jobs::start(threads, &sender)?;
        let (changes, mut addresses) = mpsc::unbounded_channel();
        // Kept, so that the channel stays open where addresses cannot be followed.
        let _changes = changes.clone();
        if let Err(error) = address::follow(changes) {
            warn!("this machine's addresses cannot be followed: {error}");
        }
        let mut spis = Spis::new(slots);
        for spi in taken {
            spis.reserve(spi);
        }
        let spis = Arc::new(Mutex::new(spis));
        let keylog = match &config.keylog {
            Some(directory) => {
                warn!("keys are written to {}: whoever reads them reads all traffic", directory.display());
                Some(Arc::new(KeyLog::open(directory)?))
            }
            None => None,
        };
        let machine = Box::new(Machine { spis: Arc::clone(&spis), keylog: keylog.clone() });
        let settings = config.settings.clone();
        let now = Instant::now();
        let mut endpoint = Endpoint::new(settings, machine, Box::new(System::default()));
        if let Some(tokens) = tokens {
            endpoint.make_tokens(tokens);
        }
        let mut this = Self {
            endpoint,
            config: Ike::default(),
            datapath: Datapath::new(orders, spis),
            events: Events::default(),
            keeper: Keeper::default(),
            sockets: None,
            listen_problem: None,
            listen_next: now,
            jobs,
            settings: HashMap::new(),
            blocked: HashMap::new(),
            installing: HashMap::new(),
            renewals: VecDeque::new(),
            renewing: HashMap::new(),
            addresses: VirtualAddresses::new(interface),
            name_servers: NameServers::new(&recovery.state),
            keylog,
            memory,
            began,
            state: recovery.state,
            heard: HashMap::new(),
            ready: false,
            trouble_next: now,
            shares_natt,
            ending: None,
        };
        this.configure(config);
        this.go_on(whole, &recovery.settings);
        let mut buffer = vec![0; LARGEST];
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut commanded = true;
        // One timer for all, which is set anew only when another time comes first.
        let mut due = Instant::now();
        let timer = sleep_until(due.into());
        tokio::pin!(timer);
        loop {
            this.pump();
            this.memory.flush();
            this.tell();
            if this.has_ended() {
                this.end();
                return Ok(());
            }
            let burst = this.memory.deadline();
            let timeout = this.endpoint.poll_timeout();
            let ending = this.ending.as_ref().map(|(_, until)| *until);
            let next = [burst, timeout, ending].into_iter().flatten().min();
            if let Some(next) = next.filter(|next| *next != due) {
                due = next;
                timer.as_mut().reset(due.into());
            }
            tokio::select! {
                biased;
                stopped = &mut stop, if ending.is_none() => {
                    let Ok(stop) = stopped else {
                        this.end();
                        return Ok(());
                    };
                    this.stop(stop);
                }
                notice = notices.recv() => {
                    // The supervisor is gone only when the daemon ends.
                    let Some(notice) = notice else { return Ok(()) };
                    this.notice(notice);
                    while let Ok(notice) = notices.try_recv() {
                        this.notice(notice);
                    }
                }
                result = done.recv() => {
                    if let Some((id, result)) = result {
                        this.computed(id, result);
                    }
                    while let Ok((id, result)) = done.try_recv() {
                        this.computed(id, result);
                    }
                }
                Some(sas) = committed.recv() => {
                    this.resume_all(sas);
                    while let Ok(sas) = committed.try_recv() {
                        this.resume_all(sas);
                    }
                }
                command = commands.recv(), if commanded && ending.is_none() => match command {
                    Some(command) => this.command(command),
                    None => commanded = false,
                },
                () = &mut timer, if next.is_some() => {
                    // It has fired: whatever comes next is another time.
                    due = Instant::now();
                    timer.as_mut().reset((due + TICK).into());
                    if timeout.is_some_and(|timeout| timeout <= due) {
                        this.endpoint.handle_timeout(now_is());
                    }
                }
                _ = tick.tick(), if ending.is_none() => this.tick(),
                Some(addresses) = addresses.recv() => this.addresses_changed(&addresses),
                index = readable(this.sockets.as_ref()), if this.ready || burst.is_some() => {
                    this.receive(index, &mut buffer);
                }
            }
        }
    }

    /// Takes over a configuration, at the start or later.
    pub(super) fn configure(&mut self, config: Ike) {
        let before: HashMap<Arc<str>, [u8; 32]> = self
            .config
            .connections
            .iter()
            .map(|connection| (Arc::clone(&connection.ike.name), connection.ike.fingerprint))
            .collect();
        self.settings = config
            .connections
            .iter()
            .map(|connection| (Arc::clone(&connection.ike.name), connection.children.clone()))
            .collect();
        let connections = config.connections.iter().map(|connection| Arc::clone(&connection.ike)).collect();
        self.endpoint.configure(now_is(), connections, &config.pools);
        self.config = config;
        let names: HashSet<Arc<str>> = self.settings.keys().cloned().collect();
        self.keeper.retain(|name| names.contains(name));
        self.events.retain(|name| names.contains(name));
        self.listen();
        self.set_traps();
        if self.ready {
            let new: Vec<Arc<Connection>> = self
                .connections()
                .filter(|connection| before.get(&connection.name) != Some(&connection.fingerprint))
                .cloned()
                .collect();
            self.start(&new, &HashSet::new());
        }
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = &Arc<Connection>> {
        self.config.connections.iter().map(|connection| &connection.ike)
    }

    pub(super) fn connection(&self, name: &str) -> Option<&Arc<Connection>> {
        self.connections().find(|connection| *connection.name == *name)
    }

    /// Whether there is anything to receive messages for.
    fn is_served(&self) -> bool {
        !self.config.connections.is_empty() || self.memory.is_telling()
    }

    /// Opens the sockets, once there is a connection to serve or a port to share.
    pub(super) fn listen(&mut self) {
        let needed = self.is_served();
        if self.sockets.is_some() || !(needed || self.shares_natt) {
            return;
        }
        match Sockets::open(&self.config.listen) {
            Ok(sockets) => {
                self.sockets = Some(sockets);
                self.listen_problem = None;
            }
            Err(error) => {
                let problem = error.to_string();
                // Before it is connected the datapath may have the port.
                if needed && self.ready && self.listen_problem.as_ref() != Some(&problem) {
                    warn!("IKE cannot listen: {problem}");
                }
                self.listen_problem = Some(problem);
                self.listen_next = Instant::now() + LISTEN_AGAIN;
            }
        }
    }

    /// Traffic for children that come up by themselves or on demand waits for them, in place of leaving in the clear.
    fn set_traps(&mut self) {
        let mut traps = Vec::new();
        for connection in &self.config.connections {
            for (child, settings) in connection.ike.children.iter().zip(&connection.children) {
                if child.start == Start::None {
                    continue;
                }
                match trap_selectors(&connection.ike, child, source_address) {
                    Ok(selectors) => traps.push(Trap {
                        connection: Arc::clone(&connection.ike.name),
                        child: Arc::clone(&child.name),
                        priority: settings.priority,
                        selectors,
                    }),
                    Err(problem) if child.start == Start::Trap => {
                        warn!(connection = %connection.ike.name, child = %child.name, "cannot start on traffic: {problem}");
                    }
                    Err(_) => {}
                }
            }
        }
        self.datapath.set_traps(traps);
    }

    /// Initiates those of `connections` that start by themselves, and those that were up in an earlier life of control.
    fn start(&mut self, connections: &[Arc<Connection>], leftovers: &HashSet<IpAddr>) {
        for connection in connections {
            let starts = connection.children.iter().any(|child| child.start == Start::Start);
            let was_up = connection.remote.is_some_and(|remote| leftovers.contains(&remote));
            if (starts && connection.remote.is_some()) || was_up {
                self.initiate(&connection.name, None);
            }
        }
    }

    fn initiate(&mut self, connection: &Arc<str>, child: Option<&Arc<str>>) {
        let now = now_is();
        match self.endpoint.initiate(now, connection, child.map(|child| &**child)) {
            Ok(attempt) if !attempt.reused => self.events.happened(
                now.monotonic,
                Happened {
                    kind: EventKind::Connecting,
                    connection: Some(Arc::clone(connection)),
                    child: child.cloned(),
                    sa: Some(attempt.sa.0),
                    text: "connecting".to_owned(),
                },
            ),
            Ok(_) => {}
            Err(error) => {
                self.events.happened(
                    now.monotonic,
                    Happened {
                        kind: EventKind::Failed,
                        connection: Some(Arc::clone(connection)),
                        child: child.cloned(),
                        sa: None,
                        text: error.to_string(),
                    },
                );
                if self.connection(connection).is_some_and(|connection| is_kept(connection)) {
                    self.keeper.failed(now.monotonic, (Arc::clone(connection), child.cloned()));
                }
            }
        }
    }

    /// Applies what the endpoint wants done.
    fn pump(&mut self) {
        while let Some(Output { sa, effect }) = self.endpoint.poll_output() {
            match sa.and_then(|sa| self.blocked.get_mut(&sa)) {
                Some(behind) => behind.push_back(effect),
                None => {
                    if let (Some(sa), true) = (sa, self.perform(sa, effect)) {
                        self.blocked.insert(sa, VecDeque::new());
                    }
                }
            }
        }
    }

    /// IKE SAs wait no longer.
    fn resume_all(&mut self, sas: Vec<SaId>) {
        for sa in sas {
            self.resume(sa);
        }
    }

    /// An IKE SA waits no longer.
    fn resume(&mut self, sa: SaId) {
        let Some(mut effects) = self.blocked.remove(&sa) else { return };
        while let Some(effect) = effects.pop_front() {
            if self.perform(Some(sa), effect) {
                self.blocked.insert(sa, effects);
                return;
            }
        }
    }

    /// Does one thing. Gives whether the IKE SA has to wait until [`resume`](Self::resume).
    fn perform(&mut self, sa: Option<SaId>, effect: Effect) -> bool {
        match effect {
            Effect::Transmit { path, datagram } => {
                if let Some(sockets) = &mut self.sockets {
                    sockets.send(&path, &datagram);
                }
            }
            Effect::Keepalive(path) => {
                if let Some(sockets) = &mut self.sockets {
                    sockets.keepalive(&path);
                }
            }
            Effect::Compute { id, job } => self.jobs.run(id, job),
            Effect::Install(child) => {
                let id = child.id;
                if let Some(keylog) = &self.keylog {
                    keylog.child(&child);
                }
                self.addresses.route(&child);
                let settings = self.settings.get(&child.connection.name);
                let settings = settings.and_then(|children| children.get(child.child)).cloned();
                let result = match settings {
                    Some(settings) => self.datapath.install(Instant::now(), child, settings),
                    None => Err("the connection is not configured any more".to_owned()),
                };
                return match (result, sa) {
                    (Ok(()), Some(sa)) => {
                        self.installing.insert(id, sa);
                        true
                    }
                    (result, _) => {
                        self.addresses.unroute(id);
                        self.endpoint.installed(now_is(), id, result);
                        false
                    }
                };
            }
            Effect::Use(child) => return sa.is_some_and(|sa| self.datapath.put_in_use(sa, child)),
            Effect::Move { child, local, remote, encap } => {
                return sa.is_some_and(|sa| self.datapath.move_to(sa, child, (local, remote), encap));
            }
            Effect::Retire(child) => {
                self.renewing.remove(&child);
                self.addresses.unroute(child);
                self.datapath.retire(child);
            }
            Effect::Configure(configuration) => {
                let sa = sa.unwrap_or(SaId(0));
                info!(addresses = ?configuration.addresses, dns = ?configuration.dns, "the peer assigned addresses");
                if let Err(problem) = self.addresses.add(sa, &configuration.addresses) {
                    warn!("{problem}");
                }
                self.name_servers.set(sa, &configuration.dns);
            }
            Effect::Unconfigure => {
                let sa = sa.unwrap_or(SaId(0));
                self.addresses.remove(sa);
                self.name_servers.set(sa, &[]);
            }
            Effect::Persist(persist) => return self.memory.persist(sa, persist),
            Effect::Report(report) => self.report(&report),
        }
        false
    }

    fn report(&mut self, report: &Report) {
        let now = Instant::now();
        self.events.report(now, report);
        let kept =
            |this: &Self, name: &str| this.connection(name).is_some_and(|connection| is_kept(connection));
        match report {
            Report::Established { connection, remote_id, .. } => {
                self.memory.established(connection, remote_id);
                self.keeper.succeeded(&(Arc::clone(connection), None));
            }
            Report::ChildUp { connection, name, .. } => {
                self.keeper.succeeded(&(Arc::clone(connection), Some(Arc::clone(name))));
            }
            Report::Failed { connection: Some(connection), .. } if kept(self, connection) => {
                self.keeper.failed(now, (Arc::clone(connection), None));
            }
            Report::ChildFailed { connection, name, .. } if kept(self, connection) => {
                self.keeper.failed(now, (Arc::clone(connection), Some(Arc::clone(name))));
            }
            Report::Rekeyed { old, new } => {
                self.addresses.rename(*old, *new);
                self.name_servers.rename(*old, *new);
            }
            _ => {}
        }
    }

    fn computed(&mut self, id: JobId, done: Done) {
        self.endpoint.computed(now_is(), id, done);
    }

    fn receive(&mut self, index: usize, buffer: &mut [u8]) {
        let served = self.is_served();
        for _ in 0..BATCH {
            let Some(sockets) = &mut self.sockets else { return };
            match sockets.receive(index, buffer) {
                Received::Message(..) if !served => {}
                Received::Message(path, message) => {
                    let now = now_is();
                    let source = path.remote.ip();
                    if self.heard.len() < SOURCES || self.heard.contains_key(&source) {
                        self.heard.insert(source, now.monotonic);
                    }
                    if self.memory.receive(path, message) {
                        continue;
                    }
                    if !self.ready {
                        // It is repeated.
                        continue;
                    }
                    self.endpoint.handle_datagram(now, path, message);
                    self.pump();
                }
                Received::Other => {}
                Received::Nothing => return,
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        for told in self.datapath.notice(Instant::now(), notice) {
            self.told(told);
        }
    }

    fn told(&mut self, told: Told) {
        let now = now_is();
        match told {
            Told::Installed(child, result) => {
                if result.is_err() {
                    self.addresses.unroute(child);
                }
                self.endpoint.installed(now, child, result);
                if let Some(sa) = self.installing.remove(&child) {
                    self.resume(sa);
                }
            }
            Told::Resume(sa) => self.resume(sa),
            Told::Connected { leftovers } => {
                let first = !self.ready;
                self.ready = true;
                self.listen();
                if first {
                    let all: Vec<Arc<Connection>> = self.connections().cloned().collect();
                    self.start(&all, &leftovers);
                }
            }
            Told::Lost(children) => {
                self.renewals.extend(children);
                self.renew();
            }
            Told::SoftLimit(child) => self.endpoint.soft_limit(now, child),
            Told::HardLimit(child) => self.endpoint.hard_limit(now, child),
            Told::Moved(child, remote, port) => self.endpoint.peer_moved(now, child, remote, port),
            Told::Acquire { connection, child, packet } => {
                if self.keeper.is_down(&connection) || self.ending.is_some() {
                    return;
                }
                let happened = Happened {
                    kind: EventKind::Acquired,
                    connection: Some(Arc::clone(&connection)),
                    child: Some(Arc::clone(&child)),
                    sa: None,
                    text: format!("traffic waits: {packet}"),
                };
                self.events.happened(now.monotonic, happened);
                self.initiate(&connection, Some(&child));
            }
        }
    }

    /// New keys for children that a restarted datapath lost.
    fn renew(&mut self) {
        for _ in 0..RENEWALS {
            let Some(child) = self.renewals.pop_front() else { return };
            let now = now_is();
            if self.endpoint.rekey(now, &Target::Child(child)).is_ok() {
                self.renewing.insert(child, now.monotonic + RENEWAL);
            }
        }
    }

    fn tick(&mut self) {
        let now = now_is();
        for told in self.datapath.tick(now.monotonic) {
            self.told(told);
        }
        self.renew();
        let late = self.renewing.iter().filter(|(_, until)| **until <= now.monotonic);
        for child in late.map(|(child, _)| *child).collect::<Vec<_>>() {
            self.renewing.remove(&child);
            self.endpoint.lost(now, child);
        }
        for (connection, child) in self.keeper.due(now.monotonic) {
            self.initiate(&connection, child.as_ref());
        }
        if self.sockets.is_none() && self.listen_next <= now.monotonic {
            self.listen();
        }
        if self.trouble_next <= now.monotonic
            && let Some(sockets) = &mut self.sockets
            && let Some((remote, error)) = sockets.trouble()
        {
            warn!(unsent = sockets.counters().unsent, "IKE cannot send to {remote}: {error}");
            self.trouble_next = now.monotonic + Duration::from_secs(10);
        }
        if self.heard.len() >= SOURCES {
            self.heard.retain(|_, when| now.monotonic.duration_since(*when) < Duration::from_mins(1));
        }
    }

    fn addresses_changed(&mut self, addresses: &[IpAddr]) {
        let real: Vec<IpAddr> =
            addresses.iter().copied().filter(|address| !self.addresses.contains(*address)).collect();
        let now = now_is();
        self.endpoint.addresses_changed(now, &real);
        self.set_traps();
        self.keeper.hurry(now.monotonic);
    }

    /// What has to be said to peers before the end is said; they have a moment to answer.
    fn stop(&mut self, stop: Stop) {
        if stop.delete {
            let all: Vec<SaId> = self.endpoint.sas(now_is()).map(|sa| sa.id).collect();
            for sa in all {
                // One that is just ending by itself is as good.
                let _ = self.endpoint.terminate(now_is(), &Target::Ike(sa));
            }
        }
        self.ending = Some((stop, Instant::now() + LAST_WORDS));
    }

    /// It was told to end, and there is nothing left to wait for.
    fn has_ended(&self) -> bool {
        self.ending.as_ref().is_some_and(|(stop, until)| {
            !stop.delete || *until <= Instant::now() || self.endpoint.sas(now_is()).next().is_none()
        })
    }

    fn end(&mut self) {
        // What waited for its record goes out with it.
        self.memory.close();
        let waiting: Vec<SaId> = self.blocked.keys().copied().collect();
        self.resume_all(waiting);
        self.addresses.clear();
        self.name_servers.clear();
        let stop = self.ending.take().map(|(stop, _)| stop);
        let delete = stop.as_ref().is_some_and(|stop| stop.delete);
        recovery::end(&self.state, if delete { Ending::Everything } else { Ending::ControlOnly });
        if let Some(Stop { done, .. }) = stop {
            let _ = done.send(());
        }
    }
}

/// What time it is.
pub(super) fn now_is() -> Now {
    Now { monotonic: Instant::now(), wall: SystemTime::now() }
}

async fn readable(sockets: Option<&Sockets>) -> usize {
    match sockets {
        Some(sockets) => sockets.ready().await,
        None => core::future::pending().await,
    }
}
