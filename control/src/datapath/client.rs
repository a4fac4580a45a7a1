//! One connection to the datapath: requests, answers and events over [`postern_contract::transport`].
//!
//! [`Client::connect`] has said Hello and checked the version when it returns. [`Client::apply`] splits what it sends by
//! size, keeps many messages in flight and matches their acknowledgements by token. Events that arrive between answers
//! wait for [`Client::events`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use postern_contract::VERSION;
use postern_contract::codec::encoded_len;
use postern_contract::event::Event;
use postern_contract::request::{Cursor, Done, Latency, Operation, Refusal, Reply, Request, Status};
use postern_contract::transport::{Connection, TransportError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::reconcile::Installed;

/// Largest message of operations in bytes, well below what the contract takes.
const MESSAGE: usize = 60 * 1024;

/// Messages that may await their acknowledgement.
const IN_FLIGHT: usize = 32;

/// How long the datapath may be silent while an answer is due.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the datapath cannot be spoken with.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed or ended.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The datapath is of another version.
    #[error(
        "the datapath speaks version {0} of the contract, this program version {VERSION}: use programs of one build"
    )]
    Version(u16),
    /// It would not do what was asked.
    #[error("the datapath refused: {0}")]
    Rejected(String),
    /// It answered something else.
    #[error("the datapath gave an answer that does not fit the request")]
    Unexpected,
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Transport(error.into())
    }
}

impl ClientError {
    /// Nobody listens: the datapath is not running.
    pub fn is_absent(&self) -> bool {
        let Self::Transport(TransportError::Io(error)) = self else { return false };
        matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    }
}

/// A connection on which Hello was said.
#[derive(Debug)]
pub struct Client {
    socket: AsyncFd<Connection>,
    events: VecDeque<Event>,
    token: u64,
    instance: u64,
    pid: u32,
}

/// How an operation ended.
pub type Outcome = Result<Done, Refusal>;

impl Client {
    /// Connects to the datapath at `path`.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let connection = Connection::connect(path)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe and asks what holds here: a `Connection` owns its descriptor and never replaces it"
        )]
        let socket = AsyncFd::with_interest(connection, Interest::READABLE | Interest::WRITABLE)?;
        let mut client = Self { socket, events: VecDeque::new(), token: 0, instance: 0, pid: 0 };
        match client.ask(&Request::Hello { version: VERSION }).await? {
            Reply::Hello { version: VERSION, instance, pid } => Ok(Self { instance, pid, ..client }),
            Reply::Hello { version, .. } => Err(ClientError::Version(version)),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Random number of this life of the datapath.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// Process id of the datapath.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Everything that is installed.
    pub async fn inventory(&mut self) -> Result<Installed, ClientError> {
        let mut installed = Installed::default();
        let mut after: Option<Cursor> = None;
        loop {
            let Reply::Inventory(page) = self.ask(&Request::Inventory { after }).await? else {
                return Err(ClientError::Unexpected);
            };
            let next = page.next;
            installed.add(page);
            if next.is_none() {
                return Ok(installed);
            }
            // A cursor that stands still would keep us here for ever.
            if next == after {
                return Err(ClientError::Unexpected);
            }
            after = next;
        }
    }

    /// Workers, ports and counters.
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        match self.ask(&Request::Status).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// The latency histogram.
    pub async fn latency(&mut self) -> Result<Latency, ClientError> {
        match self.ask(&Request::Latency).await? {
            Reply::Latency(latency) => Ok(latency),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Asks for events. There is no answer to it but the events themselves.
    pub async fn subscribe(&mut self) -> Result<(), ClientError> {
        while !self.step(Some(&Request::Subscribe)).await?.sent {}
        Ok(())
    }

    /// The next events. May be abandoned while it waits: nothing is lost.
    pub async fn events(&mut self) -> Result<Vec<Event>, ClientError> {
        while self.events.is_empty() {
            match self.step(None).await?.reply {
                Some(Reply::Rejected(text)) => return Err(ClientError::Rejected(text)),
                Some(_) => return Err(ClientError::Unexpected),
                None => {}
            }
        }
        Ok(self.events.drain(..).collect())
    }

    /// Applies the operations in order and gives their outcomes in the same order, all acknowledged.
    pub async fn apply(
        &mut self,
        operations: &mut (dyn Iterator<Item = Operation> + Send),
    ) -> Result<Vec<Outcome>, ClientError> {
        let mut operations = operations.peekable();
        let mut outcomes: Vec<Option<Outcome>> = Vec::new();
        let mut in_flight: HashMap<u64, Range<usize>> = HashMap::new();
        let mut message: Option<(u64, Range<usize>, Request)> = None;
        loop {
            if message.is_none() && in_flight.len() < IN_FLIGHT {
                let batch = take_batch(&mut operations);
                if !batch.is_empty() {
                    let begin = outcomes.len();
                    outcomes.resize(begin + batch.len(), None);
                    self.token += 1;
                    let request = Request::Apply { token: self.token, operations: batch };
                    message = Some((self.token, begin..outcomes.len(), request));
                }
            }
            if message.is_none() && in_flight.is_empty() {
                return outcomes.into_iter().map(|outcome| outcome.ok_or(ClientError::Unexpected)).collect();
            }
            let step = self.patient_step(message.as_ref().map(|(_, _, request)| request)).await?;
            if step.sent
                && let Some((token, range, _)) = message.take()
            {
                in_flight.insert(token, range);
            }
            match step.reply {
                None => {}
                Some(Reply::Applied { token, results }) => {
                    let range = in_flight.remove(&token).ok_or(ClientError::Unexpected)?;
                    let slots = outcomes.get_mut(range).ok_or(ClientError::Unexpected)?;
                    if slots.len() != results.len() {
                        return Err(ClientError::Unexpected);
                    }
                    for (slot, result) in slots.iter_mut().zip(results) {
                        *slot = Some(result);
                    }
                }
                Some(Reply::Rejected(text)) => return Err(ClientError::Rejected(text)),
                Some(_) => return Err(ClientError::Unexpected),
            }
        }
    }

    /// Sends `request` and waits for its answer.
    async fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let mut outgoing = Some(request);
        loop {
            let step = self.patient_step(outgoing).await?;
            if step.sent {
                outgoing = None;
            }
            match step.reply {
                Some(Reply::Rejected(text)) => return Err(ClientError::Rejected(text)),
                Some(reply) => return Ok(reply),
                None => {}
            }
        }
    }

    async fn patient_step(&mut self, outgoing: Option<&Request>) -> Result<Step, ClientError> {
        timeout(PATIENCE, self.step(outgoing)).await.map_err(|_| TransportError::TimedOut)?
    }

    /// Waits until `outgoing` can be sent or a message has come, and does what can be done. Events are put aside.
    async fn step(&mut self, outgoing: Option<&Request>) -> Result<Step, ClientError> {
        let interest = match outgoing {
            Some(_) => Interest::READABLE | Interest::WRITABLE,
            None => Interest::READABLE,
        };
        loop {
            let mut guard = self.socket.ready_mut(interest).await?;
            let connection = guard.get_inner_mut();
            let sent = match outgoing {
                Some(request) => connection.try_send(request)?,
                None => false,
            };
            let received: Option<Reply> = connection.try_receive()?;
            if !sent && received.is_none() {
                guard.clear_ready();
                continue;
            }
            let reply = match received {
                Some(Reply::Events(events)) => {
                    self.events.extend(events);
                    None
                }
                reply => reply,
            };
            return Ok(Step { sent, reply });
        }
    }
}

/// What [`Client::step`] did.
struct Step {
    sent: bool,
    reply: Option<Reply>,
}

/// As many operations as fit a message; at least one, if there is one.
fn take_batch(
    operations: &mut core::iter::Peekable<&mut (dyn Iterator<Item = Operation> + Send)>,
) -> Vec<Operation> {
    let mut batch = Vec::new();
    let mut room = MESSAGE;
    while let Some(operation) = operations.peek() {
        let length = encoded_len(operation);
        if length > room && !batch.is_empty() {
            break;
        }
        room = room.saturating_sub(length);
        batch.extend(operations.next());
    }
    batch
}
