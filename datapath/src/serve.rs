//! The contract's server, on the main thread: reads requests, publishes changes, answers, and passes events on.
//!
//! Requests of one round are applied together, so that a pipelined installation of many SAs costs one write to stable
//! storage a round (DESIGN decision 7). A client that breaks the contract is told and goes on; one that does not read
//! is disconnected.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postern_contract::VERSION;
use postern_contract::event::Event;
use postern_contract::request::{
    Latency, Operation, PortStatus, Reply, Request, Status, SteerStatus, WorkerStatus,
};
use postern_contract::settings::Backend;
use postern_contract::transport::{Connection, Listener, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::appliance::Appliance;

/// Requests of one client that are read before the next client's turn.
const ROUND: usize = 256;
/// Operations applied before the answers are sent.
const OPERATIONS: usize = 1 << 12;
/// Events kept for a control process that is away.
const BACKLOG: usize = 4096;
/// Events in one message.
const EVENTS: usize = 128;
/// How long a client may leave its socket full.
const PATIENCE: Duration = Duration::from_secs(5);
/// Seconds between attempts to have port 4500 while control is away.
const HOLD_AGAIN: u32 = 5;
/// Longest wait: the clock is looked at this often.
const WAIT: Duration = Duration::from_millis(500);

struct Client {
    connection: Connection,
    greeted: bool,
    subscribed: bool,
    gone: bool,
}

impl Client {
    fn send(&mut self, reply: &Reply) {
        if let Err(error) = self.connection.send(reply) {
            if !matches!(error, TransportError::Closed) {
                tracing::warn!(%error, "cannot answer control: disconnecting it");
            }
            self.gone = true;
        }
    }
}

/// The server.
pub struct Server {
    appliance: Appliance,
    listener: Listener,
    clients: Vec<Client>,
    events: VecDeque<Event>,
    lost: u64,
    instance: u64,
    backend: &'static str,
    cores: Vec<u16>,
    /// When port 4500 is tried next, in the tables' seconds.
    hold_next: u32,
}

impl Server {
    /// Listens on `socket`. `instance`: random at each start.
    pub fn bind(
        appliance: Appliance,
        socket: &Path,
        instance: u64,
        cores: Vec<u16>,
        backend: Backend,
    ) -> std::io::Result<Self> {
        let listener = Listener::bind(socket)?;
        let backend = crate::crypto::Engine::select(backend, 1).map_or("none", |engine| engine.name());
        tracing::info!(backend, "AES-GCM");
        Ok(Self {
            appliance,
            listener,
            clients: Vec::new(),
            events: VecDeque::new(),
            lost: 0,
            instance,
            backend,
            cores,
            hold_next: 0,
        })
    }

    /// Serves until `stop` becomes readable. Fails when a worker died: the process should then end and be started anew.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> Result<(), WorkerDied> {
        loop {
            if self.wait(stop) {
                self.appliance.stop();
                return Ok(());
            }
            if !self.appliance.is_alive() {
                return Err(WorkerDied);
            }
            self.accept();
            self.requests();
            self.follow_routes();
            let now = self.now();
            let Appliance { shortcut, steers, .. } = &mut self.appliance;
            shortcut.tick(steers, now);
            self.appliance.publisher.collect();
            self.appliance.publisher.tick(now);
            self.pass_events();
            self.clients.retain(|client| !client.gone);
            self.hold_natt(now);
        }
    }

    /// Someone has to have UDP port 4500: control while there is one, else this process.
    fn hold_natt(&mut self, now: u32) {
        if now >= self.hold_next && !self.clients.iter().any(|client| client.greeted) {
            self.appliance.hold_natt();
            self.hold_next = now.saturating_add(HOLD_AGAIN);
        }
    }

    /// Seconds since start, as the tables count them.
    fn now(&self) -> u32 {
        u32::try_from(self.appliance.clock.now().as_secs()).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Sleeps until something happens; says whether to stop.
    fn wait(&self, stop: BorrowedFd<'_>) -> bool {
        let bell = &self.appliance.bell;
        bell.lie_down();
        let mut timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(WAIT.subsec_nanos()) };
        if self.appliance.publisher.has_returned() || !self.appliance.fibs.is_empty() {
            timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
        }
        let mut fds = vec![
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::new(bell.as_ref(), PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
        ];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.connection, PollFlags::IN)));
        // A failed poll is a signal; the next round looks at everything again.
        let _ = poll(&mut fds, Some(&timeout));
        let stopped = fds.first().is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        bell.get_up();
        stopped
    }

    fn accept(&mut self) {
        loop {
            match self.listener.try_accept() {
                Ok(Some(mut connection)) => {
                    connection.set_timeout(Some(PATIENCE));
                    self.clients.push(Client { connection, greeted: false, subscribed: false, gone: false });
                }
                Ok(None) => return,
                Err(error @ TransportError::Refused(_)) => tracing::warn!(%error, "connection refused"),
                Err(error) => {
                    tracing::error!(%error, "cannot accept connections");
                    return;
                }
            }
        }
    }

    fn requests(&mut self) {
        let mut clients = std::mem::take(&mut self.clients);
        for client in &mut clients {
            let mut applies: Vec<(u64, Vec<Operation>)> = Vec::new();
            let mut operations = 0;
            for _ in 0..ROUND {
                match client.connection.try_receive::<Request>() {
                    Ok(Some(Request::Apply { token, operations: batch })) if client.greeted => {
                        operations += batch.len();
                        applies.push((token, batch));
                        if operations >= OPERATIONS {
                            self.apply(client, std::mem::take(&mut applies));
                            operations = 0;
                        }
                    }
                    Ok(Some(request)) => {
                        // Answers come in the order of the requests.
                        self.apply(client, std::mem::take(&mut applies));
                        operations = 0;
                        let reply = self.answer(client, &request);
                        if let Some(reply) = reply {
                            client.send(&reply);
                        }
                    }
                    Ok(None) => break,
                    Err(TransportError::Codec(error)) => client.send(&Reply::Rejected(error.to_string())),
                    Err(_) => {
                        client.gone = true;
                        break;
                    }
                }
                if client.gone {
                    break;
                }
            }
            self.apply(client, applies);
        }
        clients.append(&mut self.clients);
        self.clients = clients;
    }

    fn apply(&mut self, client: &mut Client, applies: Vec<(u64, Vec<Operation>)>) {
        if applies.is_empty() {
            return;
        }
        let (tokens, batches): (Vec<u64>, Vec<Vec<Operation>>) = applies.into_iter().unzip();
        let now = self.now();
        let results = self.appliance.publisher.apply(&batches, now);
        self.steer();
        for (token, results) in tokens.into_iter().zip(results) {
            client.send(&Reply::Applied { token, results });
        }
    }

    /// Tells the XDP programs of inside interfaces which destinations are protected now.
    fn steer(&mut self) {
        let now = self.now();
        let Appliance { publisher, shortcut, steers, .. } = &mut self.appliance;
        shortcut.follow_entries(&publisher.relay_changes(), steers, now);
        let changes = self.appliance.publisher.steer_changes();
        for (steer, role) in &mut self.appliance.steers {
            if !role.is_inside() {
                continue;
            }
            for prefix in &changes.added {
                if let Err(error) = steer.protect(*prefix, None) {
                    tracing::error!(%prefix, interface = steer.interface(), %error, "cannot steer");
                }
            }
            for prefix in &changes.removed {
                if let Err(error) = steer.unprotect(*prefix, None) {
                    tracing::error!(%prefix, interface = steer.interface(), %error, "cannot stop steering");
                }
            }
        }
    }

    fn answer(&mut self, client: &mut Client, request: &Request) -> Option<Reply> {
        if !client.greeted && !matches!(request, Request::Hello { .. }) {
            return Some(Reply::Rejected("the first message has to be Hello".to_owned()));
        }
        Some(match request {
            Request::Hello { version } => {
                client.greeted = *version == VERSION;
                if client.greeted {
                    self.appliance.release_natt();
                    self.hold_next = 0;
                } else {
                    tracing::warn!(ours = VERSION, theirs = version, "control speaks another version");
                }
                Reply::Hello { version: VERSION, instance: self.instance, pid: std::process::id() }
            }
            Request::Inventory { after } => {
                let mut page = self.appliance.publisher.page(*after);
                for report in &mut page.relays {
                    self.appliance.shortcut.count(report, &self.appliance.steers);
                }
                Reply::Inventory(page)
            }
            Request::Sa(id) => Reply::Sa(self.appliance.publisher.sa(*id)),
            Request::Status => Reply::Status(self.status()),
            Request::Latency => Reply::Latency(self.latency()),
            Request::Subscribe => {
                client.subscribed = true;
                return None;
            }
            // Taken by the caller.
            Request::Apply { token, .. } => Reply::Applied { token: *token, results: Vec::new() },
        })
    }

    fn status(&mut self) -> Status {
        let appliance = &mut self.appliance;
        let (sas, policies, relays) = appliance.publisher.counts();
        let attachments = &appliance.attachments;
        let mut in_xdp: Vec<_> =
            (0..attachments.len()).map(|port| appliance.shortcut.of_port(port, &appliance.steers)).collect();
        let workers = appliance.publisher.workers().iter().enumerate().map(|(number, link)| {
            let cells = &link.cells;
            let ports = attachments.iter().zip(cells.ports.iter()).zip(&mut in_xdp);
            let ports = ports.filter_map(|((attachment, cells), in_xdp)| {
                let attached = attachment.by_worker.get(number).cloned().flatten();
                let mut counters = cells.snapshot();
                if attached.is_some() {
                    // The first queue's row has what XDP translated, on whatever queue.
                    std::mem::take(in_xdp).add_to(&mut counters);
                }
                // A worker without a queue still counts frames that it got from others.
                if attached.is_none() && counters == postern_contract::counters::PortCounters::default() {
                    return None;
                }
                Some(PortStatus {
                    interface: attachment.name.clone(),
                    role: attachment.role,
                    attachment: attached.unwrap_or_else(|| "no queue".to_owned()),
                    queue: u32::try_from(number).unwrap_or(u32::MAX),
                    counters,
                })
            });
            WorkerStatus {
                core: self.cores.get(number).copied(),
                busy_turns: cells.busy_turns.get(),
                free_frames: cells.free_frames.get(),
                inbound_sas: cells.inbound.get(),
                outbound_sas: cells.outbound.get(),
                fanned_out: cells.fanned_out.get(),
                helped: cells.helped.get(),
                ports: ports.collect(),
            }
        });
        let steer = appliance.steers.iter().map(|(steer, _)| SteerStatus {
            interface: steer.interface().to_owned(),
            verdicts: steer.counters().unwrap_or_default(),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: appliance.clock.now().as_secs(),
            crypto_backend: self.backend.to_owned(),
            sas,
            policies,
            relays,
            relays_in_xdp: appliance.shortcut.placed(),
            workers: workers.collect(),
            steer: steer.collect(),
        }
    }

    fn latency(&mut self) -> Latency {
        let Some(histogram) = self.appliance.publisher.latency().filter(|histogram| !histogram.is_empty())
        else {
            return Latency::default();
        };
        Latency {
            samples: histogram.len(),
            min: histogram.min(),
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        }
    }

    fn follow_routes(&mut self) {
        let Some(fib) = self.appliance.fibs.try_iter().last() else { return };
        for (steer, _) in &mut self.appliance.steers {
            if let Err(error) = steer.set_local(fib.local_addresses()) {
                tracing::error!(interface = steer.interface(), %error, "cannot tell XDP this host's addresses");
            }
        }
        let now = self.now();
        let Appliance { shortcut, steers, .. } = &mut self.appliance;
        shortcut.follow_routes(Arc::clone(&fib), steers, now);
        self.appliance.publisher.set_fib(&fib);
    }

    fn pass_events(&mut self) {
        for event in self.appliance.publisher.take_events() {
            if self.events.len() >= BACKLOG {
                self.events.pop_front();
                self.lost += 1;
            }
            self.events.push_back(event);
        }
        if self.events.is_empty() || !self.clients.iter().any(|client| client.subscribed && !client.gone) {
            return;
        }
        if self.lost > 0 {
            self.events.push_front(Event::Lost { count: std::mem::take(&mut self.lost) });
        }
        while !self.events.is_empty() {
            let count = self.events.len().min(EVENTS);
            let message = Reply::Events(self.events.drain(..count).collect());
            for client in self.clients.iter_mut().filter(|client| client.subscribed && !client.gone) {
                client.send(&message);
            }
        }
    }
}

/// A worker thread ended though nobody asked it to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("a worker died; the datapath ends so that it can be started anew")]
pub struct WorkerDied;
