//! The daemon's side of the management socket.
//!
//! Few connections at a time, each with bounded lines; a peer that is neither root nor the daemon's own user is turned
//! away before it is read.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use postern_contract::transport::remove_stale;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};
use tracing::{info, warn};

use super::watch::Order;
use super::{
    Answer, ControlReport, Failure, FailureKind, IkeReport, REQUEST_LIMIT, ReloadReport, Request, Response,
    report,
};
use crate::config::ike::Ike;
use crate::config::{self, Config, ControlSettings};
use crate::datapath::supervisor::{Command, View};
use crate::desired::Desired;
use crate::ike::api::{ConnectionState, IkeCommand};
use crate::metrics::Snapshot;
use crate::recovery;
use postern_contract::settings::DatapathSettings;

/// Connections that are served at a time; more wait.
const CONNECTIONS: usize = 32;

/// Of these, those that wait for IKE's events; more are turned away.
pub const WATCHERS: usize = 16;

/// How long a connection may say nothing.
const IDLE: Duration = Duration::from_mins(1);

/// The socket, private and removed at the end.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens at `path` with mode 0600, making its directory (0700); a socket that nobody answers on is replaced.
    pub fn bind(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        remove_stale(path, SocketType::STREAM)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 64)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nobody is left to tell if this fails; the next start replaces the file.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What answering takes.
#[derive(Debug)]
pub struct Daemon {
    /// The configuration file.
    pub config: PathBuf,
    /// Orders to the supervisor.
    pub commands: mpsc::Sender<Command>,
    /// Orders to IKE.
    pub ike: mpsc::Sender<IkeCommand>,
    /// A slot for each connection that waits for IKE's events.
    pub watchers: Semaphore,
    /// When the daemon began.
    pub started: Instant,
    /// The settings that only a start can change, as they are in force.
    pub in_force: (DatapathSettings, ControlSettings, recovery::Settings),
    /// Warnings about the file that is in force.
    pub warnings: Mutex<Vec<config::Diagnostic>>,
    /// Told once when the daemon is to end, with whether the datapath ends too.
    pub stop: mpsc::Sender<bool>,
}

/// Serves connections until the task is dropped.
pub async fn serve(socket: Socket, daemon: Arc<Daemon>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match socket.listener.accept().await {
            Ok((stream, _)) => {
                let daemon = Arc::clone(&daemon);
                tokio::spawn(async move {
                    let _slot = slot;
                    if let Err(error) = converse(stream, &daemon).await {
                        warn!("management connection: {error}");
                    }
                });
            }
            Err(error) => {
                warn!("management socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, daemon: &Daemon) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {uid} was turned away")));
    }
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(REQUEST_LIMIT);
        let read = tokio::time::timeout(IDLE, limited.read_until(b'\n', &mut line)).await;
        let Ok(read) = read else { return Ok(()) };
        if read? == 0 {
            return Ok(());
        }
        let whole = line.ends_with(b"\n") || u64::try_from(line.len()).is_ok_and(|len| len < REQUEST_LIMIT);
        let outcome = match serde_json::from_slice::<Request>(&line) {
            Ok(request) if whole => match daemon.attend(request, &mut reader, &mut writer).await? {
                Some(outcome) => outcome,
                None => return Ok(()),
            },
            Ok(_) => Err(failure(FailureKind::Request, "the request is too long")),
            Err(error) => Err(failure(FailureKind::Request, format!("not a request: {error}"))),
        };
        let response = match outcome {
            Ok(answer) => Response::Ok(answer),
            Err(failure) => Response::Error(failure),
        };
        send(&mut writer, &response).await?;
        if !whole {
            return Ok(());
        }
    }
}

/// Writes one line.
pub(super) async fn send(writer: &mut (impl AsyncWrite + Unpin), response: &Response) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(response).map_err(io::Error::other)?;
    bytes.push(b'\n');
    writer.write_all(&bytes).await
}

impl Daemon {
    /// Carries out one request, telling meanwhile what happens. `Ok(None)`: the one who asked is gone.
    async fn attend(
        &self,
        request: Request,
        reader: &mut (impl AsyncBufRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<Option<Result<Answer, Failure>>> {
        let (order, wait) = match request {
            Request::Up { connection, child, wait_seconds } => {
                (Order::Up { connection, child }, wait_seconds)
            }
            Request::Down { target, wait_seconds } => (Order::Down(target), wait_seconds),
            Request::Rekey { target, wait_seconds } => (Order::Rekey(target), wait_seconds),
            Request::Log { backlog, follow, connection } => {
                return self.log(backlog, follow, connection.as_deref(), reader, writer).await;
            }
            request => return Ok(Some(self.answer(request).await)),
        };
        let wait = wait.map(|seconds| Duration::from_secs(u64::from(seconds)));
        self.carry_out(&order, wait, reader, writer).await
    }

    /// Carries out a request that is answered at once.
    async fn answer(&self, request: Request) -> Result<Answer, Failure> {
        match request {
            Request::Status => {
                let view = self.look().await?;
                let mut status = report::status(&view, self.about());
                status.ike = self.ike_report(&mut status.problems).await;
                status.recovery = self.ask_ike(IkeCommand::Recovery).await.ok();
                status.problems.extend(status.recovery.iter().flat_map(|report| report.problems.clone()));
                let warnings = self.warnings.lock().await;
                status.problems.extend(warnings.iter().map(ToString::to_string));
                Ok(Answer::Status(Box::new(status)))
            }
            Request::Sa { name } => {
                let view = self.look().await?;
                if let Some(name) = &name
                    && !view.desired.tunnels.iter().any(|tunnel| report::is_named(&tunnel.name, name))
                {
                    return Err(failure(
                        FailureKind::NotFound,
                        format!("no tunnel is named {name:?}, and no connection of that name is up"),
                    ));
                }
                Ok(Answer::Sas(report::sas(&view, name.as_deref())))
            }
            Request::Policy => Ok(Answer::Policies(report::policies(&self.look().await?))),
            Request::Relay => Ok(Answer::Relays(report::relays(&self.look().await?))),
            Request::Drops => {
                let view = self.look().await?;
                match view.problem {
                    Some(problem) if view.connected.is_none() => {
                        Err(failure(FailureKind::DatapathDown, problem))
                    }
                    _ => Ok(Answer::Drops(report::drops(&view))),
                }
            }
            Request::Latency => {
                let latency = self.ask(Command::Latency).await?;
                latency.map(Answer::Latency).map_err(|problem| failure(FailureKind::DatapathDown, problem))
            }
            Request::Recovery => Ok(Answer::Recovery(Box::new(self.ask_ike(IkeCommand::Recovery).await?))),
            Request::Snapshot => {
                let done = self.ask_ike(IkeCommand::Snapshot).await?;
                done.map_err(|problem| failure(FailureKind::Internal, problem))?;
                Ok(Answer::Recovery(Box::new(self.ask_ike(IkeCommand::Recovery).await?)))
            }
            Request::Connections { name } => {
                let rows = self.ask_ike(|reply| IkeCommand::List { connection: name, reply }).await?;
                rows.map(Answer::Connections)
            }
            Request::Explain { name } => {
                let facts = self.ask_ike(|reply| IkeCommand::Explain { connection: name, reply }).await?;
                facts.map(|facts| Answer::Explanation(Box::new(facts)))
            }
            // These take time, so `attend` has them.
            Request::Up { .. } | Request::Down { .. } | Request::Rekey { .. } | Request::Log { .. } => {
                Err(failure(FailureKind::Request, "has to be asked on a connection of its own"))
            }
            Request::Reload { dry_run } => self.reload(dry_run).await.map(Answer::Reload),
            Request::Shutdown { datapath } => {
                info!(datapath, "told to stop through the management socket");
                let _ = self.stop.send(datapath).await;
                Ok(Answer::Stopping)
            }
        }
    }

    /// Reads the file again and brings the datapath in step with it. With an error in the file nothing changes.
    pub async fn reload(&self, dry_run: bool) -> Result<ReloadReport, Failure> {
        let path = self.config.clone();
        let config = tokio::task::spawn_blocking(move || config::load(&path)).await;
        let config = config.map_err(|error| failure(FailureKind::Internal, error.to_string()))?;
        let Config { datapath, control, tunnels, policies, relays, ike, recovery, holds_keys, warnings } =
            config.map_err(|error| Failure {
                kind: FailureKind::Configuration,
                message: "the configuration file has errors; nothing was changed".to_owned(),
                findings: error.0,
            })?;
        let mut notes = Vec::new();
        if datapath != self.in_force.0 {
            notes.push(
                "[datapath] changed: takes effect when the datapath and postern-control are started again"
                    .to_owned(),
            );
        }
        if control != self.in_force.1 {
            notes.push("[control] changed: takes effect when postern-control is started again".to_owned());
        }
        if recovery != self.in_force.2 {
            notes.push("[recovery] changed: takes effect when postern-control is started again".to_owned());
        }
        let kept = Config {
            datapath,
            control,
            tunnels,
            policies,
            relays,
            ike: Ike::default(),
            recovery,
            holds_keys,
            warnings: Vec::new(),
        };
        let desired = Desired::new(kept);
        let changes = self.ask(|done| Command::Replace { desired, dry_run, done }).await?;
        let mut changes = changes.map_err(|problem| failure(FailureKind::DatapathDown, problem))?;
        // Without connections at the start and now, there is nothing that could be told.
        if !(self.ike.is_closed() && ike.connections.is_empty()) {
            let ike = Box::new(ike);
            changes.steps.extend(self.ask_ike(|reply| IkeCommand::Configure { ike, dry_run, reply }).await?);
        }
        if !dry_run {
            info!("the configuration was read again: {changes}");
            self.warnings.lock().await.clone_from(&warnings);
        }
        Ok(ReloadReport {
            dry_run,
            waiting: changes.waiting,
            changes: changes.steps,
            refused: changes.refused,
            notes,
            warnings,
        })
    }

    async fn look(&self) -> Result<View, Failure> {
        let mut view = self.ask(Command::Look).await?;
        // Where IKE does not run, nothing is negotiated.
        if let Ok(negotiated) = self.ask_ike(IkeCommand::Outline).await {
            view.desired.extend(negotiated);
        }
        Ok(view)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let ended = || failure(FailureKind::Internal, "postern-control is stopping");
        self.commands.send(command(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }

    /// What the metrics show.
    pub async fn snapshot(&self) -> Result<Snapshot, Failure> {
        let datapath = self.ask(Command::Glance).await?;
        let ike = self.ask_ike(IkeCommand::Totals).await.ok();
        let tunnels = if self.in_force.1.metrics_of_tunnels {
            report::status(&self.look().await?, self.about()).tunnels
        } else {
            Vec::new()
        };
        let recovery = self.ask_ike(IkeCommand::Recovery).await.ok();
        Ok(Snapshot { uptime_seconds: self.started.elapsed().as_secs(), datapath, tunnels, ike, recovery })
    }

    /// IKE at a glance; connections that failed are problems.
    async fn ike_report(&self, problems: &mut Vec<String>) -> Option<IkeReport> {
        let rows = self.ask_ike(|reply| IkeCommand::List { connection: None, reply }).await.ok()?.ok()?;
        let counters = self.ask_ike(IkeCommand::Totals).await.ok()?.counters;
        for row in rows.iter().filter(|row| row.state == ConnectionState::Failed) {
            problems.push(format!(
                "connection {} should be up and is not; see `postern explain {}`",
                row.name, row.name
            ));
        }
        Some(report::ike(&rows, counters))
    }

    pub(super) async fn ask_ike<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> IkeCommand,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let ended = || failure(FailureKind::Internal, "IKE is stopping");
        self.ike.send(command(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }

    fn about(&self) -> ControlReport {
        ControlReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            config: self.config.display().to_string(),
        }
    }
}

pub(super) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into(), findings: Vec::new() }
}
