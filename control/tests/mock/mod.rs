//! A datapath without packets: the contract's server with tables of its own, which remembers what it was asked.

#![allow(dead_code, missing_docs, reason = "each test program uses a part of it")]

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postern_contract::VERSION;
use postern_contract::counters::{DropReason, PortCounters, RelayCounters, SaCounters};
use postern_contract::event::Event;
use postern_contract::relay::{RelayEntry, RelayId};
use postern_contract::request::{
    Cursor, Done, Operation, Page, PortStatus, Refusal, RelayReport, Reply, Request, SaReport, Status,
    WorkerStatus,
};
use postern_contract::sa::{Direction, IpsecProtocol, Policy, PolicyId, SaConfig, SaId};
use postern_contract::settings::Role;
use postern_contract::transport::{Connection, Listener, TransportError};
use postern_wire::ids::Spi;

/// What the mock holds and what happened to it.
#[derive(Default)]
pub struct Tables {
    pub version: u16,
    pub instance: u64,
    pub sas: BTreeMap<SaId, SaConfig>,
    pub policies: BTreeMap<PolicyId, Policy>,
    pub relays: BTreeMap<RelayId, RelayEntry>,
    /// A word for each operation, in order.
    pub log: Vec<String>,
    /// `Apply` messages.
    pub applies: usize,
    /// Connections that said Hello.
    pub hellos: usize,
    /// SPIs that are refused.
    pub refuse: HashSet<Spi>,
    /// Sent to whoever subscribed.
    pub events: Vec<Event>,
    /// SAs on one page of the inventory.
    pub page: usize,
}

/// The running server; ends when dropped.
pub struct Mock {
    pub tables: Arc<Mutex<Tables>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Mock {
    pub fn start(socket: &Path, instance: u64) -> Self {
        Self::with(socket, Tables { version: VERSION, instance, page: 3, ..Tables::default() })
    }

    pub fn with(socket: &Path, tables: Tables) -> Self {
        let listener = Listener::bind(socket).unwrap();
        let tables = Arc::new(Mutex::new(tables));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (tables, stop) = (Arc::clone(&tables), Arc::clone(&stop));
            move || serve(&listener, &tables, &stop)
        });
        Self { tables, stop, thread: Some(thread) }
    }

    /// Ends the server and gives its tables, for a "restart" that keeps or loses them.
    pub fn end(mut self) -> Tables {
        self.halt();
        std::mem::take(&mut self.tables.lock().unwrap())
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.halt();
    }
}

fn serve(listener: &Listener, tables: &Mutex<Tables>, stop: &AtomicBool) {
    let mut clients: Vec<(Connection, bool)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok(Some(connection)) = listener.try_accept() {
            clients.push((connection, false));
        }
        let mut busy = false;
        clients.retain_mut(|(connection, subscribed)| {
            loop {
                match connection.try_receive::<Request>() {
                    Ok(Some(request)) => {
                        busy = true;
                        let mut tables = tables.lock().unwrap();
                        if let Some(reply) = tables.answer(request, subscribed)
                            && connection.send(&reply).is_err()
                        {
                            return false;
                        }
                    }
                    Ok(None) => break,
                    Err(TransportError::Codec(error)) => {
                        let _ = connection.send(&Reply::Rejected(error.to_string()));
                    }
                    Err(_) => return false,
                }
            }
            let mut tables = tables.lock().unwrap();
            if *subscribed && !tables.events.is_empty() {
                let events = std::mem::take(&mut tables.events);
                return connection.send(&Reply::Events(events)).is_ok();
            }
            true
        });
        if !busy {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Tables {
    fn answer(&mut self, request: Request, subscribed: &mut bool) -> Option<Reply> {
        Some(match request {
            Request::Hello { .. } => {
                self.hellos += 1;
                Reply::Hello { version: self.version, instance: self.instance, pid: std::process::id() }
            }
            Request::Inventory { after } => Reply::Inventory(self.page(after)),
            Request::Apply { token, operations } => {
                self.applies += 1;
                Reply::Applied { token, results: operations.into_iter().map(|op| self.apply(op)).collect() }
            }
            Request::Sa(id) => Reply::Sa(self.sas.get(&id).map(report)),
            Request::Status => Reply::Status(self.status()),
            Request::Latency => Reply::Latency(postern_contract::request::Latency {
                samples: 100,
                min: 1000,
                p50: 2000,
                p90: 3000,
                p99: 4000,
                p999: 5000,
                max: 6000,
            }),
            Request::Subscribe => {
                *subscribed = true;
                return None;
            }
        })
    }

    fn apply(&mut self, operation: Operation) -> Result<Done, Refusal> {
        match operation {
            Operation::InstallSa(config) => {
                if self.refuse.contains(&config.spi.on_wire) {
                    return Err(Refusal::Full);
                }
                let taken = |other: &SaConfig| {
                    other.id != config.id
                        && other.direction == Direction::Inbound
                        && config.direction == Direction::Inbound
                        && (other.protocol, other.spi.on_wire) == (config.protocol, config.spi.on_wire)
                };
                if self.sas.values().any(taken) {
                    return Err(Refusal::SpiTaken(config.spi.on_wire));
                }
                let same_keys = |other: &SaConfig| {
                    other.id != config.id
                        && other.direction == Direction::Outbound
                        && config.direction == Direction::Outbound
                        && other.suite == config.suite
                };
                if self.sas.values().any(same_keys) {
                    return Err(Refusal::Invalid("another outbound SA uses these keys".to_owned()));
                }
                if let Some(old) = self.sas.get(&config.id) {
                    if old.generation > config.generation {
                        return Err(Refusal::Stale(old.generation));
                    }
                    if old.replay_window != config.replay_window {
                        return Err(Refusal::Immutable("replay_window".to_owned()));
                    }
                }
                self.log.push(format!("install {}", name(&config)));
                self.sas.insert(config.id, *config);
            }
            Operation::RemoveSa(id) => match self.sas.remove(&id) {
                Some(config) => self.log.push(format!("remove {}", name(&config))),
                None => return Ok(Done::Already),
            },
            Operation::InstallPolicy(policy) => {
                self.log.push(format!("policy {}", policy.priority));
                self.policies.insert(policy.id, policy);
            }
            Operation::RemovePolicy(id) => {
                if let Some(policy) = self.policies.remove(&id) {
                    self.log.push(format!("no policy {}", policy.priority));
                }
            }
            Operation::InstallRelay(entry) => {
                self.log.push("relay".to_owned());
                self.relays.insert(entry.id, entry);
            }
            Operation::RemoveRelay(id) => {
                self.log.push("no relay".to_owned());
                self.relays.remove(&id);
            }
        }
        Ok(Done::Applied)
    }

    fn page(&self, after: Option<Cursor>) -> Page {
        let from = match after {
            None => Some(None),
            Some(Cursor::Sa(id)) => Some(Some(id)),
            Some(_) => None,
        };
        if let Some(from) = from {
            let rest = self.sas.values().filter(|sa| from.is_none_or(|from| sa.id > from));
            let sas: Vec<_> = rest.take(self.page).map(report).collect();
            let next = match sas.last() {
                Some(last) if sas.len() == self.page => Cursor::Sa(last.id),
                _ => Cursor::Policy(None),
            };
            return Page { sas, next: Some(next), ..Page::default() };
        }
        if matches!(after, Some(Cursor::Policy(_))) {
            let policies = self.policies.values().cloned().collect();
            return Page { policies, next: Some(Cursor::Relay(None)), ..Page::default() };
        }
        let relays = self
            .relays
            .values()
            .map(|entry| RelayReport { entry: *entry, counters: RelayCounters::default() });
        Page { relays: relays.collect(), ..Page::default() }
    }

    fn status(&self) -> Status {
        let mut port = PortStatus {
            interface: "eth0".to_owned(),
            role: Role::Outside,
            attachment: "mock".to_owned(),
            queue: 0,
            counters: PortCounters::default(),
        };
        port.counters.received = 12_345;
        port.counters.drops = vec![(DropReason::BadIcv, 7)];
        Status {
            version: "mock".to_owned(),
            pid: std::process::id(),
            uptime_seconds: 61,
            crypto_backend: "none".to_owned(),
            sas: self.sas.len() as u64,
            policies: self.policies.len() as u64,
            relays: self.relays.len() as u64,
            relays_in_xdp: None,
            workers: vec![WorkerStatus {
                core: Some(1),
                busy_turns: 1,
                free_frames: 1,
                inbound_sas: 1,
                outbound_sas: 1,
                fanned_out: 0,
                helped: 0,
                ports: vec![port],
            }],
            steer: Vec::new(),
        }
    }
}

fn name(config: &SaConfig) -> String {
    let protocol = match config.protocol {
        IpsecProtocol::Esp => "esp",
        IpsecProtocol::Ah => "ah",
    };
    let direction = match config.direction {
        Direction::Inbound => "in",
        Direction::Outbound => "out",
    };
    format!("{protocol} {direction} {:x} seq {}", config.spi.on_wire.0, config.sequence)
}

fn report(config: &SaConfig) -> SaReport {
    SaReport {
        id: config.id,
        generation: config.generation,
        direction: config.direction,
        protocol: config.protocol,
        mode: config.mode,
        spi: config.spi,
        local: config.local,
        remote: config.remote,
        encap: config.encap,
        worker: 0,
        stopped: false,
        key_check: config.suite.key_check(),
        counters: SaCounters {
            packets: 42,
            bytes: 4200,
            sequence: 1234,
            drops: Vec::new(),
            idle_seconds: Some(3),
        },
    }
}

/// A directory of one test's own, removed at its end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pt-control-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Waits, with a bound, until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(20), "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One tunnel's section; `key` is two digits that its keys are made of.
pub fn tunnel(name: &str, number: u32, key: &str) -> String {
    let out = key.repeat(20);
    let inward = format!("f{}", &out[1..]);
    let (x, y) = (number / 250, number % 250);
    format!(
        "[[tunnel]]\nname = \"{name}\"\nlocal = \"192.0.2.1\"\nremote = \"192.0.2.2\"\nesp = \"aes128gcm16\"\n\
         out = {{ spi = {}, key = \"{out}\" }}\nin = {{ spi = {}, key = \"{inward}\" }}\n\
         local_net = [\"10.1.0.0/24\"]\nremote_net = [\"172.16.{x}.{y}/32\"]\npriority = {number}\n",
        0x1000 + number,
        0x2_0000 + number
    )
}
