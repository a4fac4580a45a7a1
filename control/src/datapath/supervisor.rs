//! Keeps the datapath running, connected and in step with the configuration.
//!
//! One task owns the connection, the desired state and the child process, and answers commands. Whenever a connection is
//! made the inventory decides what is sent: nothing if the datapath was running all the time (DP-7), everything if it
//! was started anew.
//!
//! Objects with negotiated ids ([`desired::is_negotiated`](crate::desired::is_negotiated)) belong to the negotiator: they
//! are neither compared nor removed here. Its [`Order`]s are passed on in their order, many in one message, and each is
//! answered by a [`Notice`]; it is told of connections, with what of its own is installed, and of events.

use core::fmt;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use postern_contract::event::{Event, LimitKind};
use postern_contract::request::{Latency, Operation, Refusal, Status};
use postern_contract::sa::{Action, SaId};
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use super::client::{Client, ClientError, Outcome};
use super::launch::Launch;
use super::reconcile::{Installed, Plan, Step};
use super::steps::{Describe, apply};
use crate::desired::{Desired, Outline, is_negotiated};
use crate::state::{Generations, StateError};

/// Between attempts to connect while a start is awaited.
const RETRY: Duration = Duration::from_millis(100);

/// Between attempts to connect while nothing is expected to change.
const RETRY_SLOWLY: Duration = Duration::from_secs(1);

/// First and longest pause before the datapath is started again after it died young.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// A life longer than this was not a failure to start.
const GROWN_UP: Duration = Duration::from_secs(10);

/// How long a datapath that was told to end may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// What the supervisor is asked.
#[derive(Debug)]
pub enum Command {
    /// What is there.
    Look(oneshot::Sender<View>),
    /// The latency histogram.
    Latency(oneshot::Sender<Result<Latency, String>>),
    /// What can be said without looking at each SA.
    Glance(oneshot::Sender<Glance>),
    /// Take over another desired state; or, dry, only say what that would change.
    Replace {
        /// The new state.
        desired: Desired,
        /// Change nothing.
        dry_run: bool,
        /// What was or would be done.
        done: oneshot::Sender<Result<Changes, String>>,
    },
    /// End; with `datapath`, end it as well.
    Stop {
        /// Whether the datapath is to end too.
        datapath: bool,
        /// Told when it is done.
        done: oneshot::Sender<()>,
    },
}

/// Operations on negotiated objects. They are applied after those of earlier orders, as long as there is a connection.
#[derive(Debug)]
pub struct Order {
    /// Returned in the answer.
    pub token: u64,
    /// The changes.
    pub operations: Vec<Operation>,
}

/// What the negotiator is told.
#[derive(Debug)]
pub enum Notice {
    /// There is a connection. Orders are applied from now on.
    Connected {
        /// Random number of this life of the datapath.
        instance: u64,
        /// What is installed of negotiated objects.
        installed: Installed,
    },
    /// There is no connection any more.
    Lost,
    /// Answer to an [`Order`]: an outcome for each operation, or why it could not be sent. In the second case some of it
    /// may have taken effect; the next [`Connected`](Self::Connected) tells.
    Applied {
        /// The order's.
        token: u64,
        /// Outcomes.
        outcomes: Result<Vec<Outcome>, String>,
    },
    /// Something happened to negotiated objects.
    Events(Vec<Event>),
}

/// The supervisor's ends of the negotiator's channels. What waits in them is bounded by the negotiator's SAs, which each
/// have few orders under way, and by the datapath's own limit of events.
#[derive(Debug)]
pub struct Negotiator {
    /// Orders come in here.
    pub orders: mpsc::UnboundedReceiver<Order>,
    /// Notices go out here.
    pub notices: mpsc::UnboundedSender<Notice>,
}

/// Operations of orders that are sent together.
const TOGETHER: usize = 512;

/// What was or would be changed, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The datapath could not be asked: everything waits until it is back.
    pub waiting: bool,
    /// A line for each step.
    pub steps: Vec<String>,
    /// A line for each step that the datapath refused.
    pub refused: Vec<String>,
}

/// Everything there is to show.
#[derive(Debug, Default)]
pub struct View {
    /// Process id and instance of the datapath that is connected.
    pub connected: Option<(u32, u64)>,
    /// Seconds since the connection was made or lost.
    pub since_seconds: u64,
    /// Why there is no connection.
    pub problem: Option<String>,
    /// How often the datapath was started by this process.
    pub starts: u64,
    /// The datapath's own words.
    pub status: Option<Status>,
    /// What is installed.
    pub installed: Installed,
    /// What should be.
    pub desired: Outline,
    /// Why SAs and others are not installed, by step.
    pub refused: HashMap<String, String>,
    /// Events since the start, by kind.
    pub events: BTreeMap<&'static str, u64>,
}

/// The datapath without its SAs: cheap, however many there are.
#[derive(Clone, Debug, Default)]
pub struct Glance {
    /// Whether it is connected.
    pub up: bool,
    /// Seconds since the connection was made or lost.
    pub since_seconds: u64,
    /// How often the datapath was started by this process.
    pub starts: u64,
    /// The datapath's own words.
    pub status: Option<Status>,
    /// The latency histogram.
    pub latency: Option<Latency>,
    /// Events since the start, by kind.
    pub events: BTreeMap<&'static str, u64>,
}

/// Settings of the supervisor.
#[derive(Clone, Debug)]
pub struct Options {
    /// The contract socket.
    pub socket: PathBuf,
    /// How to start the datapath, if control does that.
    pub launch: Option<Launch>,
}

/// The task.
#[derive(Debug)]
pub struct Supervisor {
    options: Options,
    generations: Generations,
    desired: Desired,
    negotiator: Option<Negotiator>,
    client: Option<Client>,
    instance: Option<u64>,
    changed: Instant,
    problem: Option<String>,
    child: Option<(Child, Instant)>,
    starts: u64,
    back_off: Duration,
    next_start: Instant,
    next_attempt: Instant,
    refused: HashMap<Step, Refusal>,
    events: BTreeMap<&'static str, u64>,
}

/// Why control and datapath are not in step.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    State(#[from] StateError),
}

impl Supervisor {
    /// Prepares the task; [`run`](Self::run) begins.
    pub fn new(options: Options, generations: Generations, desired: Desired) -> Self {
        let now = Instant::now();
        Self {
            options,
            generations,
            desired,
            negotiator: None,
            client: None,
            instance: None,
            changed: now,
            problem: Some("not connected yet".to_owned()),
            child: None,
            starts: 0,
            back_off: BACK_OFF.0,
            next_start: now,
            next_attempt: now,
            refused: HashMap::new(),
            events: BTreeMap::new(),
        }
    }

    /// With a negotiator. Without one, negotiated objects are unwanted like all that is not configured.
    #[must_use]
    pub fn with_negotiator(mut self, negotiator: Negotiator) -> Self {
        self.negotiator = Some(negotiator);
        self
    }

    /// Runs until [`Command::Stop`] or until nobody can give commands any more.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            if self.client.is_none() && Instant::now() >= self.next_attempt {
                self.attempt().await;
            }
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Stop { datapath, done }) => {
                        if datapath {
                            self.end_datapath().await;
                        }
                        let _ = done.send(());
                        return;
                    }
                    Some(command) => self.answer(command).await,
                    None => return,
                },
                order = next_order(&mut self.negotiator) => match order {
                    Some(order) => self.carry_out(order).await,
                    None => self.negotiator = None,
                },
                events = next_events(&mut self.client) => match events {
                    Ok(events) => self.note(events),
                    Err(error) => self.lost(&error.into()),
                },
                status = child_exit(&mut self.child) => self.buried(status),
                () = sleep_until(self.next_attempt), if self.client.is_none() => {}
            }
        }
    }

    /// Tries to connect and to get in step; starts the datapath if there is none.
    async fn attempt(&mut self) {
        match self.connect().await {
            Ok(()) => {}
            Err(Trouble::Client(error)) if error.is_absent() => {
                let now = Instant::now();
                if self.child.is_none() && now >= self.next_start {
                    self.start();
                }
                if self.problem.is_none() || self.options.launch.is_none() {
                    self.set_problem(format!("nothing answers on {}", self.options.socket.display()));
                }
                let pause = if self.options.launch.is_some() { RETRY } else { RETRY_SLOWLY };
                self.next_attempt = now + pause;
            }
            Err(trouble) => self.lost(&trouble),
        }
    }

    async fn connect(&mut self) -> Result<(), Trouble> {
        let mut client = Client::connect(&self.options.socket).await?;
        let (pid, instance) = (client.pid(), client.instance());
        match self.instance {
            Some(known) if known == instance => info!(pid, "connected to the datapath again"),
            Some(_) => warn!(pid, "connected to a datapath that was started anew: its SAs are gone"),
            None => info!(pid, "connected to the datapath"),
        }
        let (changes, negotiated) = self.get_in_step(&mut client).await?;
        client.subscribe().await?;
        if changes.steps.is_empty() {
            info!(pid, sas = self.desired.sas.len(), "adopted the datapath as it is: nothing differs");
        } else {
            info!(
                pid,
                steps = changes.steps.len(),
                refused = changes.refused.len(),
                "the datapath is in step"
            );
        }
        self.client = Some(client);
        self.instance = Some(instance);
        self.problem = None;
        self.changed = Instant::now();
        self.tell(Notice::Connected { instance, installed: negotiated });
        Ok(())
    }

    /// Reconciles the datapath at `client` with the desired state. Also gives what is installed of the negotiator's.
    async fn get_in_step(&mut self, client: &mut Client) -> Result<(Changes, Installed), Trouble> {
        let (installed, negotiated) = self.divide(client.inventory().await?);
        self.generations.settle(&mut self.desired, &installed)?;
        let plan = Plan::new(&self.desired, &installed);
        let names = Describe { desired: &self.desired, installed: &installed };
        let mut changes = Changes { steps: names.all(&plan), ..Changes::default() };
        self.refused.clear();
        let Plan { make, mut switch, mut clear } = plan;

        for (step, refusal) in apply(client, &self.desired, &installed, &make).await? {
            self.refused.insert(step, refusal);
        }
        if !self.refused.is_empty() {
            // What was there before goes on: its policy is not switched to an SA that is not there, and SAs between the
            // same addresses stay.
            let between = |step: &Step| match step {
                Step::InstallSa(id) => {
                    self.desired.sas.get(id).map(|wanted| (wanted.config.local, wanted.config.remote))
                }
                _ => None,
            };
            let kept: HashSet<_> = self.refused.keys().filter_map(between).collect();
            switch.retain(|step| {
                let Step::InstallPolicy(id) = step else { return true };
                let wanted = self.desired.policies.get(id).map(|wanted| wanted.policy.action);
                let Some(Action::Protect(Some(sa))) = wanted else { return true };
                !(self.refused.contains_key(&Step::InstallSa(sa)) && installed.policies.contains_key(id))
            });
            clear.retain(|step| {
                let Step::RemoveSa(id) = step else { return true };
                !installed.sas.get(id).is_some_and(|report| kept.contains(&(report.local, report.remote)))
            });
        }
        for steps in [&switch, &clear] {
            for (step, refusal) in apply(client, &self.desired, &installed, steps).await? {
                self.refused.insert(step, refusal);
            }
        }
        for (step, refusal) in &self.refused {
            let text = format!("{}: {refusal}", names.one(*step));
            error!("the datapath refused: {text}");
            changes.refused.push(text);
        }
        Ok((changes, negotiated))
    }

    /// What is ours to reconcile, and what is the negotiator's.
    fn divide(&self, installed: Installed) -> (Installed, Installed) {
        match self.negotiator {
            Some(_) => installed.divide(),
            None => (installed, Installed::default()),
        }
    }

    fn tell(&self, notice: Notice) {
        if let Some(negotiator) = &self.negotiator {
            // Nobody listens any more when the daemon ends.
            let _ = negotiator.notices.send(notice);
        }
    }

    /// Applies `first` and the orders that wait behind it, and answers each.
    async fn carry_out(&mut self, first: Order) {
        let mut tokens = vec![(first.token, first.operations.len())];
        let mut operations = first.operations;
        while operations.len() < TOGETHER
            && let Some(negotiator) = &mut self.negotiator
            && let Ok(next) = negotiator.orders.try_recv()
        {
            tokens.push((next.token, next.operations.len()));
            operations.extend(next.operations);
        }
        let outcomes = match &mut self.client {
            Some(client) => Some(client.apply(&mut operations.into_iter()).await.map_err(Trouble::from)),
            None => None,
        };
        let problem = match outcomes {
            Some(Ok(outcomes)) => {
                let mut outcomes = outcomes.into_iter();
                for (token, count) in tokens {
                    let outcomes = Ok(outcomes.by_ref().take(count).collect());
                    self.tell(Notice::Applied { token, outcomes });
                }
                return;
            }
            Some(Err(trouble)) => {
                self.lost(&trouble);
                trouble.to_string()
            }
            None => self.problem.clone().unwrap_or_default(),
        };
        for (token, _) in tokens {
            self.tell(Notice::Applied { token, outcomes: Err(problem.clone()) });
        }
    }

    async fn answer(&mut self, command: Command) {
        // Nobody is left to tell where a receiver is gone.
        match command {
            Command::Look(reply) => {
                let view = self.look().await;
                let _ = reply.send(view);
            }
            Command::Latency(reply) => {
                let Some(client) = &mut self.client else {
                    let _ = reply.send(Err(self.problem.clone().unwrap_or_default()));
                    return;
                };
                let latency = client.latency().await.map_err(Trouble::from);
                if let Err(trouble) = &latency {
                    self.lost(trouble);
                }
                let _ = reply.send(latency.map_err(|trouble| trouble.to_string()));
            }
            Command::Glance(reply) => {
                let glance = self.glance().await;
                let _ = reply.send(glance);
            }
            Command::Replace { desired, dry_run, done } => {
                let outcome = self.replace(desired, dry_run).await;
                if let Err(trouble) = &outcome {
                    self.lost(trouble);
                }
                let _ = done.send(outcome.map_err(|trouble| trouble.to_string()));
            }
            // `run` has taken these out.
            Command::Stop { .. } => {}
        }
    }

    async fn replace(&mut self, mut desired: Desired, dry_run: bool) -> Result<Changes, Trouble> {
        let Some(mut client) = self.client.take() else {
            if !dry_run {
                self.desired = desired;
            }
            return Ok(Changes { waiting: true, ..Changes::default() });
        };
        if dry_run {
            let (installed, _) = self.divide(client.inventory().await?);
            self.client = Some(client);
            self.generations.preview(&mut desired, &installed);
            let names = Describe { desired: &desired, installed: &installed };
            return Ok(Changes { steps: names.all(&Plan::new(&desired, &installed)), ..Changes::default() });
        }
        self.desired = desired;
        let (changes, _) = self.get_in_step(&mut client).await?;
        self.client = Some(client);
        Ok(changes)
    }

    async fn glance(&mut self) -> Glance {
        let mut glance = Glance { starts: self.starts, events: self.events.clone(), ..Glance::default() };
        if let Some(client) = &mut self.client {
            let found =
                async { Ok::<_, ClientError>((client.status().await?, client.latency().await?)) }.await;
            match found {
                Ok((status, latency)) => {
                    (glance.up, glance.status, glance.latency) = (true, Some(status), Some(latency));
                }
                Err(error) => self.lost(&error.into()),
            }
        }
        glance.since_seconds = self.changed.elapsed().as_secs();
        glance
    }

    async fn look(&mut self) -> View {
        let mut view = View {
            starts: self.starts,
            desired: self.desired.outline(),
            events: self.events.clone(),
            ..View::default()
        };
        if let Some(client) = &mut self.client {
            view.connected = Some((client.pid(), client.instance()));
            let found =
                async { Ok::<_, ClientError>((client.status().await?, client.inventory().await?)) }.await;
            match found {
                Ok((status, installed)) => {
                    view.status = Some(status);
                    view.installed = installed;
                }
                Err(error) => {
                    self.lost(&error.into());
                    view.connected = None;
                }
            }
        }
        let names = Describe { desired: &self.desired, installed: &view.installed };
        let refused = self.refused.iter();
        view.refused = refused.map(|(step, refusal)| (names.one(*step), refusal.to_string())).collect();
        view.problem.clone_from(&self.problem);
        view.since_seconds = self.changed.elapsed().as_secs();
        view
    }

    /// The connection is of no more use.
    fn lost(&mut self, trouble: &Trouble) {
        self.disconnect();
        self.set_problem(trouble.to_string());
        // A datapath that died can be replaced at once; one that misbehaves is not pressed.
        let ended = matches!(
            trouble,
            Trouble::Client(ClientError::Transport(postern_contract::transport::TransportError::Closed))
        );
        self.next_attempt = Instant::now() + if ended { RETRY } else { RETRY_SLOWLY };
    }

    fn disconnect(&mut self) {
        // `replace` takes the client out while it works, so it may be gone already.
        self.client = None;
        self.tell(Notice::Lost);
    }

    fn set_problem(&mut self, problem: String) {
        if self.problem.as_ref() != Some(&problem) {
            warn!("the datapath is out of reach: {problem}");
            if self.problem.is_none() {
                self.changed = Instant::now();
            }
            self.problem = Some(problem);
        }
    }

    fn start(&mut self) {
        let Some(launch) = &self.options.launch else { return };
        let program = launch.program.display().to_string();
        match launch.spawn() {
            Ok(child) => {
                self.starts += 1;
                info!(pid = child.id(), "started {program}");
                self.set_problem(format!("{program} was started and does not answer yet"));
                self.child = Some((child, Instant::now()));
            }
            Err(error) => {
                self.set_problem(format!("{program} cannot be started: {error}"));
                self.wait_longer();
            }
        }
    }

    /// The child is gone.
    fn buried(&mut self, status: std::io::Result<ExitStatus>) {
        let Some((_, born)) = self.child.take() else { return };
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        let age = born.elapsed();
        self.set_problem(format!("the datapath ended after {} s: {how}", age.as_secs()));
        if age >= GROWN_UP {
            self.back_off = BACK_OFF.0;
            self.next_start = Instant::now();
        } else {
            self.wait_longer();
        }
        self.disconnect();
        self.next_attempt = self.next_attempt.min(Instant::now() + RETRY);
    }

    fn wait_longer(&mut self) {
        self.next_start = Instant::now() + self.back_off;
        info!("the next start is tried in {} ms", self.back_off.as_millis());
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
    }

    /// Tells the datapath to end and waits until it has.
    async fn end_datapath(&mut self) {
        let Some(mut client) = self.client.take() else { return };
        let pid = i32::try_from(client.pid()).ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { return };
        if let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::TERM) {
            warn!("the datapath cannot be stopped: {error}");
            return;
        }
        let ended = async { while client.events().await.is_ok() {} };
        if tokio::time::timeout(FAREWELL, ended).await.is_err() {
            warn!("the datapath was told to stop and still runs");
        } else {
            info!("the datapath has stopped");
        }
        if let Some((mut child, _)) = self.child.take() {
            let _ = tokio::time::timeout(FAREWELL, child.wait()).await;
        }
    }

    fn note(&mut self, mut events: Vec<Event>) {
        for event in &events {
            self.log(event);
            let (kind, count) = kind(event);
            *self.events.entry(kind).or_default() += count;
        }
        events.retain(|event| subject(event) != Subject::Configured);
        if !events.is_empty() {
            self.tell(Notice::Events(events));
        }
    }

    /// Says what happened. What happens to negotiated objects is for the negotiator to tell.
    fn log(&self, event: &Event) {
        if self.negotiator.is_some() && subject(event) == Subject::Negotiated {
            return;
        }
        let tunnel =
            |sa: &SaId| self.desired.sas.get(sa).map_or("?", |wanted| wanted.tunnel.as_str()).to_owned();
        match event {
            Event::SoftLimit { sa, kind } => {
                info!(tunnel = tunnel(sa), limit = limit(*kind), "an SA reached its soft limit");
            }
            Event::HardLimit { sa, kind } => {
                warn!(tunnel = tunnel(sa), limit = limit(*kind), "an SA reached its hard limit and stopped");
            }
            Event::SequenceExhausted { sa } => {
                warn!(tunnel = tunnel(sa), "an SA used up its sequence numbers and stopped");
            }
            Event::NewPath { sa, remote, port } => {
                info!(tunnel = tunnel(sa), %remote, port, "the peer moved");
            }
            Event::Acquire { policy, source, destination, protocol, ports: _ } => {
                let policy = self.desired.policies.get(policy).map_or("?", |wanted| wanted.name.as_str());
                info!(policy, %source, %destination, protocol = protocol.0, "traffic waits for an SA");
            }
            Event::Lost { count } => warn!(count, "events were lost"),
        }
    }
}

/// The kind under which an event is counted, and how many it stands for.
const fn kind(event: &Event) -> (&'static str, u64) {
    match event {
        Event::SoftLimit { .. } => ("soft_limit", 1),
        Event::HardLimit { .. } => ("hard_limit", 1),
        Event::SequenceExhausted { .. } => ("sequence_exhausted", 1),
        Event::NewPath { .. } => ("new_path", 1),
        Event::Acquire { .. } => ("acquire", 1),
        Event::Lost { count } => ("lost", *count),
    }
}

/// Whose objects an event is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    Configured,
    Negotiated,
    Unknown,
}

const fn subject(event: &Event) -> Subject {
    let id = match event {
        Event::SoftLimit { sa, .. }
        | Event::HardLimit { sa, .. }
        | Event::SequenceExhausted { sa }
        | Event::NewPath { sa, .. } => sa.0,
        Event::Acquire { policy, .. } => policy.0,
        Event::Lost { .. } => return Subject::Unknown,
    };
    if is_negotiated(id) { Subject::Negotiated } else { Subject::Configured }
}

const fn limit(kind: LimitKind) -> &'static str {
    match kind {
        LimitKind::Seconds => "seconds",
        LimitKind::Bytes => "bytes",
        LimitKind::Packets => "packets",
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { waiting, steps, refused } = self;
        if *waiting {
            return f.write_str("the datapath is down; the changes wait until it is back");
        }
        write!(f, "{} changes, {} refused", steps.len(), refused.len())
    }
}

/// Events of the connection; never, while there is none.
async fn next_events(client: &mut Option<Client>) -> Result<Vec<Event>, ClientError> {
    match client {
        Some(client) => client.events().await,
        None => core::future::pending().await,
    }
}

/// The child's end; never, while there is none.
async fn child_exit(child: &mut Option<(Child, Instant)>) -> std::io::Result<ExitStatus> {
    match child {
        Some((child, _)) => child.wait().await,
        None => core::future::pending().await,
    }
}

/// The negotiator's next order; never, if there is no negotiator.
async fn next_order(negotiator: &mut Option<Negotiator>) -> Option<Order> {
    match negotiator {
        Some(negotiator) => negotiator.orders.recv().await,
        None => core::future::pending().await,
    }
}
