//! Requests whose answer takes time: what happens meanwhile is told line by line ([`Response::Event`]), then comes the
//! answer.
//!
//! IKE answers a command with what it began; its end is in the events. So this side asks for the events first, then
//! gives the command, then waits for the ends of what was begun ([`Waiting`]).

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::server::{Daemon, failure, send};
use super::{Answer, Failure, FailureKind, Outcome, Response};
use crate::ike::api::{Begun, EventKind, IkeCommand, IkeEvent, Reply, Target};

/// Events that may wait for a slow reader.
const BUFFER: usize = 1024;

/// A command whose end is waited for.
#[derive(Debug)]
pub(super) enum Order {
    Up { connection: String, child: Option<String> },
    Down(Target),
    Rekey(Target),
}

impl Order {
    fn connection(&self) -> &str {
        match self {
            Self::Up { connection, .. } => connection,
            Self::Down(target) | Self::Rekey(target) => &target.connection,
        }
    }

    fn command(&self, reply: Reply<Begun>) -> IkeCommand {
        match self {
            Self::Up { connection, child } => {
                IkeCommand::Up { connection: connection.clone(), child: child.clone(), reply }
            }
            Self::Down(target) => IkeCommand::Down { target: target.clone(), reply },
            Self::Rekey(target) => IkeCommand::Rekey { target: target.clone(), reply },
        }
    }
}

impl Daemon {
    /// Carries out `order`; with `wait`, tells what happens until it is done, failed, or `wait` is over. `Ok(None)`: the
    /// one who asked is gone.
    pub(super) async fn carry_out(
        &self,
        order: &Order,
        wait: Option<Duration>,
        reader: &mut (impl AsyncBufRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<Option<Result<Answer, Failure>>> {
        let Ok(_slot) = self.watchers.try_acquire() else { return Ok(Some(Err(too_many()))) };
        let mut events = match self.events(0).await {
            Ok(events) => events,
            Err(problem) => return Ok(Some(Err(problem))),
        };
        let begun = match self.ask_ike(|reply| order.command(reply)).await.and_then(|begun| begun) {
            Ok(begun) => begun,
            Err(problem) => return Ok(Some(Err(problem))),
        };
        let mut waiting = Waiting::new(order, &begun);
        let outcome = |done| Some(Ok(Answer::Outcome(Outcome { done, begun: begun.clone() })));
        let Some(wait) = wait else { return Ok(outcome(waiting.is_over())) };
        let end = Instant::now() + wait;
        while !waiting.is_over() {
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return Ok(Some(Err(too_many()))) };
                    if !waiting.concerns(&event) {
                        continue;
                    }
                    let problem = waiting.note(&event).err();
                    let is_missed = event.kind == EventKind::Missed;
                    send(writer, &Response::Event(Box::new(event))).await?;
                    if let Some(message) = problem {
                        return Ok(Some(Err(failure(FailureKind::Negotiation, message))));
                    }
                    if is_missed {
                        return Ok(outcome(false));
                    }
                }
                () = gone(reader) => return Ok(None),
                () = sleep_until(end) => {
                    let message = format!(
                        "{} within {} s; it goes on, see `postern explain {}`",
                        waiting.left(), wait.as_secs(), order.connection()
                    );
                    return Ok(Some(Err(failure(FailureKind::Timeout, message))));
                }
            }
        }
        Ok(outcome(true))
    }

    /// The latest `backlog` events, and with `follow` those to come, until the reader is gone.
    pub(super) async fn log(
        &self,
        backlog: usize,
        follow: bool,
        connection: Option<&str>,
        reader: &mut (impl AsyncBufRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<Option<Result<Answer, Failure>>> {
        let Ok(_slot) = self.watchers.try_acquire() else { return Ok(Some(Err(too_many()))) };
        let mut events = match self.events(backlog).await {
            Ok(events) => events,
            Err(problem) => return Ok(Some(Err(problem))),
        };
        // Commands are carried out in their order: when this one is answered, the past is in the channel.
        if let Err(problem) = self.ask_ike(IkeCommand::Totals).await {
            return Ok(Some(Err(problem)));
        }
        let wanted = |event: &IkeEvent| {
            connection.is_none_or(|name| {
                event.connection.as_deref().map_or(event.kind == EventKind::Missed, |found| found == name)
            })
        };
        while let Ok(event) = events.try_recv() {
            if wanted(&event) {
                send(writer, &Response::Event(Box::new(event))).await?;
            }
        }
        if !follow {
            return Ok(Some(Ok(Answer::Log)));
        }
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) if wanted(&event) => send(writer, &Response::Event(Box::new(event))).await?,
                    Some(_) => {}
                    None => return Ok(Some(Err(failure(FailureKind::Internal, "IKE is stopping")))),
                },
                () = gone(reader) => return Ok(None),
            }
        }
    }

    async fn events(&self, backlog: usize) -> Result<mpsc::Receiver<IkeEvent>, Failure> {
        let backlog = backlog.min(1 << 16);
        let (events, receiver) = mpsc::channel(BUFFER + backlog);
        let stopped = |_| failure(FailureKind::Internal, "IKE is not running");
        self.ike.send(IkeCommand::Follow { backlog, events }).await.map_err(stopped)?;
        Ok(receiver)
    }
}

fn too_many() -> Failure {
    failure(FailureKind::Internal, "too many others are waiting for IKE's events")
}

/// Returns when the other end is closed.
async fn gone(reader: &mut (impl AsyncBufRead + Unpin)) {
    match reader.fill_buf().await {
        Ok([]) | Err(_) => {}
        // It asks for more before it has its answer: nothing to be heard from it until then.
        Ok(_) => core::future::pending().await,
    }
}

/// What a command began and what has not ended of it.
#[derive(Debug)]
struct Waiting<'a> {
    order: &'a Order,
    sas: Vec<u64>,
    children: Vec<String>,
    /// IKE SAs that were begun, for an `up`.
    own: Vec<u64>,
}

impl<'a> Waiting<'a> {
    fn new(order: &'a Order, begun: &Begun) -> Self {
        let mut waiting =
            Self { order, sas: begun.sas.clone(), children: begun.children.clone(), own: begun.sas.clone() };
        if matches!(order, Order::Up { .. }) && !waiting.children.is_empty() {
            // Its IKE SA is up when its children are.
            waiting.sas.clear();
        }
        waiting
    }

    fn is_over(&self) -> bool {
        self.sas.is_empty() && self.children.is_empty()
    }

    fn concerns(&self, event: &IkeEvent) -> bool {
        match &event.connection {
            Some(name) => name == self.order.connection(),
            None => event.kind == EventKind::Missed || event.sa.is_some_and(|sa| self.own.contains(&sa)),
        }
    }

    /// What is not reached, for people.
    fn left(&self) -> String {
        let what = if self.children.is_empty() { "the IKE SA".to_owned() } else { self.children.join(", ") };
        match self.order {
            Order::Up { .. } => format!("{what} is not up"),
            Order::Down(_) => format!("{what} is not deleted"),
            Order::Rekey(_) => format!("{what} is not rekeyed"),
        }
    }

    /// Takes note of an event of the connection; the error is the reason why the order failed.
    fn note(&mut self, event: &IkeEvent) -> Result<(), String> {
        let mut sa_ended = || {
            let place = self.sas.iter().position(|sa| Some(*sa) == event.sa);
            place.map(|place| self.sas.swap_remove(place)).is_some()
        };
        let mut child_ended = || {
            let place = self.children.iter().position(|child| Some(child) == event.child.as_ref());
            place.map(|place| self.children.swap_remove(place)).is_some()
        };
        let is_ours = event.sa.is_none_or(|sa| self.own.is_empty() || self.own.contains(&sa));
        match (self.order, event.kind) {
            (Order::Up { .. }, EventKind::ChildUp | EventKind::ChildRekeyed)
            | (Order::Rekey(_), EventKind::ChildRekeyed)
            | (Order::Down(_), EventKind::ChildDown) => {
                child_ended();
            }
            (Order::Up { .. }, EventKind::Established)
            | (Order::Down(_), EventKind::Closed | EventKind::Failed) => {
                sa_ended();
            }
            // The event is about the new SA; those that are rekeyed by one command are not told apart.
            (Order::Rekey(_), EventKind::Rekeyed) => {
                self.sas.pop();
            }
            (Order::Up { .. } | Order::Rekey(_), EventKind::ChildFailed) if child_ended() => {
                return Err(event.text.clone());
            }
            (Order::Up { .. }, EventKind::Failed | EventKind::Closed) if is_ours => {
                return Err(event.text.clone());
            }
            (Order::Rekey(_), EventKind::Failed | EventKind::Closed) if sa_ended() => {
                return Err(event.text.clone());
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind, sa: Option<u64>, child: Option<&str>) -> IkeEvent {
        IkeEvent {
            unix_ms: 0,
            kind,
            connection: Some("b".to_owned()),
            child: child.map(str::to_owned),
            sa,
            text: "why".to_owned(),
        }
    }

    fn begun(sas: &[u64], children: &[&str]) -> Begun {
        Begun { sas: sas.to_vec(), children: children.iter().map(|name| (*name).to_owned()).collect() }
    }

    /// OPS-3: `up` ends when every child is up, or with the reason of the first failure of its own attempt.
    #[test]
    fn ops_3_up_waits_for_its_children() {
        let order = Order::Up { connection: "b".to_owned(), child: None };
        let mut waiting = Waiting::new(&order, &begun(&[7], &["x", "y"]));
        assert!(!waiting.is_over());
        assert_eq!(waiting.note(&event(EventKind::Failed, Some(6), None)), Ok(()), "of an earlier attempt");
        assert_eq!(waiting.note(&event(EventKind::Established, Some(7), None)), Ok(()));
        assert_eq!(waiting.note(&event(EventKind::ChildUp, Some(7), Some("y"))), Ok(()));
        assert_eq!(waiting.note(&event(EventKind::ChildUp, Some(7), Some("z"))), Ok(()));
        assert!(!waiting.is_over());
        assert_eq!(waiting.left(), "x is not up");
        let mut failing =
            Waiting { sas: Vec::new(), children: waiting.children.clone(), own: vec![7], order: &order };
        assert_eq!(failing.note(&event(EventKind::ChildFailed, Some(7), Some("z"))), Ok(()));
        assert_eq!(failing.note(&event(EventKind::ChildFailed, Some(7), Some("x"))), Err("why".to_owned()));
        assert_eq!(failing.note(&event(EventKind::Failed, Some(7), None)), Err("why".to_owned()));
        assert_eq!(waiting.note(&event(EventKind::ChildUp, Some(7), Some("x"))), Ok(()));
        assert!(waiting.is_over());

        assert!(Waiting::new(&order, &Begun::default()).is_over(), "all was up");
        let mut childless = Waiting::new(&order, &begun(&[7], &[]));
        assert!(!childless.is_over());
        assert_eq!(childless.note(&event(EventKind::Established, Some(7), None)), Ok(()));
        assert!(childless.is_over());
        let other = IkeEvent { connection: Some("c".to_owned()), ..event(EventKind::Failed, None, None) };
        assert!(!childless.concerns(&other));
    }

    #[test]
    fn ops_3_down_and_rekey_wait_for_all() {
        let target = || Target { connection: "b".to_owned(), child: None, sa: None };
        let order = Order::Down(target());
        let mut waiting = Waiting::new(&order, &begun(&[1, 2], &[]));
        for sa in [1, 1, 3] {
            assert_eq!(waiting.note(&event(EventKind::Closed, Some(sa), None)), Ok(()));
        }
        assert!(!waiting.is_over());
        assert_eq!(waiting.note(&event(EventKind::Closed, Some(2), None)), Ok(()));
        assert!(waiting.is_over());

        let order = Order::Rekey(target());
        let mut waiting = Waiting::new(&order, &begun(&[], &["x", "x"]));
        assert_eq!(waiting.note(&event(EventKind::ChildRekeyed, Some(1), Some("x"))), Ok(()));
        assert!(!waiting.is_over());
        assert_eq!(waiting.note(&event(EventKind::ChildFailed, Some(1), Some("x"))), Err("why".to_owned()));
        let mut waiting = Waiting::new(&order, &begun(&[1], &[]));
        assert_eq!(waiting.note(&event(EventKind::Rekeyed, Some(9), None)), Ok(()));
        assert!(waiting.is_over());
    }
}
