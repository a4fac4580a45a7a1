//! What happened, for people: logged, kept for `postern log` and `postern explain`, and told to followers.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use postern_ike::output::SaId;
use postern_ike::report::{CloseReason, Report};
use tokio::sync::mpsc::{self, error::TrySendError};
use tracing::{info, warn};

use super::api::{EventKind, IkeEvent, PastEvent};

/// Events that are kept.
const KEPT: usize = 1000;

/// Followers at a time; more are turned away by dropping their channel.
const FOLLOWERS: usize = 64;

/// Past and present.
#[derive(Debug, Default)]
pub struct Events {
    ring: VecDeque<IkeEvent>,
    followers: Vec<Follower>,
    facts: HashMap<Arc<str>, Facts>,
    /// Connections of established IKE SAs, for reports that do not name them.
    names: HashMap<SaId, Arc<str>>,
}

#[derive(Debug)]
struct Follower {
    events: mpsc::Sender<IkeEvent>,
    missed: u64,
}

/// What is remembered of a connection.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The last failure.
    pub failure: Option<(Instant, String)>,
    /// Failures since it last was up.
    pub failures: u64,
    /// When it was last established.
    pub established: Option<(Instant, String)>,
    /// When and why its last IKE SA ended.
    pub closed: Option<(Instant, String)>,
}

/// An event before it has a time.
#[derive(Debug)]
pub struct Happened {
    /// What kind.
    pub kind: EventKind,
    /// The connection.
    pub connection: Option<Arc<str>>,
    /// The child.
    pub child: Option<Arc<str>>,
    /// The IKE SA.
    pub sa: Option<u64>,
    /// In words.
    pub text: String,
}

impl Events {
    /// What is remembered of a connection.
    pub fn facts(&self, connection: &str) -> Facts {
        self.facts.get(connection).cloned().unwrap_or_default()
    }

    /// Forgets connections that are not configured any more.
    pub fn retain(&mut self, is_configured: impl Fn(&str) -> bool) {
        self.facts.retain(|name, _| is_configured(name));
    }

    /// Somebody wants to know. Gives nothing back: the channel is dropped if there are too many.
    pub fn follow(&mut self, backlog: usize, events: mpsc::Sender<IkeEvent>) {
        self.followers.retain(|follower| !follower.events.is_closed());
        if self.followers.len() == FOLLOWERS {
            return;
        }
        let mut follower = Follower { events, missed: 0 };
        for event in self.ring.iter().skip(self.ring.len().saturating_sub(backlog)) {
            follower.tell(event);
        }
        self.followers.push(follower);
    }

    /// The endpoint reports.
    pub fn report(&mut self, now: Instant, report: &Report) {
        let mut happened = from_report(report);
        match report {
            Report::Established { sa, connection, .. } | Report::Restored { sa, connection, .. } => {
                self.names.insert(*sa, Arc::clone(connection));
            }
            Report::Rekeyed { old, new } => {
                happened.connection = self.names.get(old).cloned();
                self.names.extend(happened.connection.clone().map(|name| (*new, name)));
            }
            Report::Moved { sa, .. } => happened.connection = self.names.get(sa).cloned(),
            Report::Closed { sa, .. } | Report::Failed { sa, .. } => {
                self.names.remove(sa);
            }
            _ => {}
        }
        self.happened(now, happened);
    }

    /// Something happened.
    pub fn happened(&mut self, now: Instant, happened: Happened) {
        let Happened { kind, connection, child, sa, text } = happened;
        log(kind, connection.as_deref(), child.as_deref(), sa, &text);
        if let Some(name) = &connection {
            let facts = self.facts.entry(Arc::clone(name)).or_default();
            match kind {
                EventKind::Failed | EventKind::ChildFailed => {
                    facts.failure = Some((now, text.clone()));
                    facts.failures += 1;
                }
                EventKind::Established => {
                    facts.established = Some((now, text.clone()));
                    facts.failures = 0;
                }
                EventKind::Closed => facts.closed = Some((now, text.clone())),
                _ => {}
            }
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = IkeEvent {
            unix_ms: u64::try_from(since.as_millis()).unwrap_or_default(),
            kind,
            connection: connection.map(|name| name.to_string()),
            child: child.map(|name| name.to_string()),
            sa,
            text,
        };
        for follower in &mut self.followers {
            follower.tell(&event);
        }
        self.followers.retain(|follower| !follower.events.is_closed());
        if self.ring.len() == KEPT {
            self.ring.pop_front();
        }
        self.ring.push_back(event);
    }
}

impl Follower {
    fn tell(&mut self, event: &IkeEvent) {
        if self.missed > 0 {
            let text = format!("{} events are missing here: the reader was too slow", self.missed);
            let missed = IkeEvent {
                unix_ms: event.unix_ms,
                kind: EventKind::Missed,
                connection: None,
                child: None,
                sa: None,
                text,
            };
            if self.events.try_send(missed).is_ok() {
                self.missed = 0;
            }
        }
        if self.missed > 0 {
            self.missed += 1;
        } else if let Err(TrySendError::Full(_)) = self.events.try_send(event.clone()) {
            self.missed = 1;
        }
    }
}

fn log(kind: EventKind, connection: Option<&str>, child: Option<&str>, sa: Option<u64>, text: &str) {
    let connection = connection.unwrap_or("-");
    let (child, sa) = (child.unwrap_or("-"), sa.unwrap_or_default());
    match kind {
        EventKind::Failed | EventKind::ChildFailed => warn!(connection, child, sa, "{text}"),
        // A peer's doing, at its pace: followers see it, and the counters.
        EventKind::Ignored => tracing::debug!("{text}"),
        _ => info!(connection, child, sa, "{text}"),
    }
}

/// A fact as it is shown.
pub fn past(now: Instant, fact: Option<(Instant, String)>) -> Option<PastEvent> {
    fact.map(|(when, text)| PastEvent { seconds_ago: now.saturating_duration_since(when).as_secs(), text })
}

fn from_report(report: &Report) -> Happened {
    match report {
        Report::Established { sa, connection, remote_id, path, suite } => Happened {
            kind: EventKind::Established,
            connection: Some(Arc::clone(connection)),
            child: None,
            sa: Some(sa.0),
            text: format!("IKE SA established with {remote_id} at {}, {suite}", path.remote),
        },
        Report::Restored { sa, connection, remote_id, path, children } => Happened {
            kind: EventKind::Established,
            connection: Some(Arc::clone(connection)),
            child: None,
            sa: Some(sa.0),
            text: format!(
                "IKE SA with {remote_id} at {} goes on after the reset, with {children} CHILD_SAs",
                path.remote
            ),
        },
        Report::Rekeyed { old, new } => Happened {
            kind: EventKind::Rekeyed,
            connection: None,
            child: None,
            sa: Some(new.0),
            text: format!("IKE SA rekeyed, in place of {}", old.0),
        },
        Report::Closed { sa, connection, reason } => Happened {
            kind: EventKind::Closed,
            connection: connection.clone(),
            child: None,
            sa: Some(sa.0),
            text: format!("IKE SA closed: {}", reason_text(*reason)),
        },
        Report::Failed { sa, connection, path, failure } => Happened {
            kind: EventKind::Failed,
            connection: connection.clone(),
            child: None,
            sa: (sa.0 != 0).then_some(sa.0),
            text: format!("IKE with {} failed: {failure}", path.remote),
        },
        Report::ChildUp { sa, child: _, connection, name, replaces, suite } => Happened {
            kind: if replaces.is_some() { EventKind::ChildRekeyed } else { EventKind::ChildUp },
            connection: Some(Arc::clone(connection)),
            child: Some(Arc::clone(name)),
            sa: Some(sa.0),
            text: match replaces {
                Some(_) => format!("CHILD_SA rekeyed, {suite}"),
                None => format!("CHILD_SA up, {suite}"),
            },
        },
        Report::ChildDown { sa, child: _, connection, name, reason } => Happened {
            kind: EventKind::ChildDown,
            connection: Some(Arc::clone(connection)),
            child: Some(Arc::clone(name)),
            sa: Some(sa.0),
            text: format!("CHILD_SA gone: {}", reason_text(*reason)),
        },
        Report::ChildFailed { sa, connection, name, failure } => Happened {
            kind: EventKind::ChildFailed,
            connection: Some(Arc::clone(connection)),
            child: Some(Arc::clone(name)),
            sa: Some(sa.0),
            text: format!("CHILD_SA failed: {failure}"),
        },
        Report::Moved { sa, path } => Happened {
            kind: EventKind::Moved,
            connection: None,
            child: None,
            sa: Some(sa.0),
            text: format!("now from {} to {}", path.local, path.remote),
        },
        Report::Ignored { path, reason } => Happened {
            kind: EventKind::Ignored,
            connection: None,
            child: None,
            sa: None,
            text: format!("a message from {} was ignored: {}", path.remote, reason.text()),
        },
    }
}

const fn reason_text(reason: CloseReason) -> &'static str {
    match reason {
        CloseReason::Peer => "the peer deleted it",
        CloseReason::Command => "told to",
        CloseReason::Dead => "the peer does not answer any more",
        CloseReason::Forgotten => "the peer has lost it in a reset",
        CloseReason::Replaced => "replaced by a rekey",
        CloseReason::Expired => "its lifetime ended before it was rekeyed",
        CloseReason::Superseded => "the peer came back with a new IKE SA",
        CloseReason::Reconfigured => "the configuration changed",
        CloseReason::Failed => "something failed in it",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize) -> Happened {
        let connection = Some(Arc::from("a"));
        Happened {
            kind: EventKind::Failed,
            connection,
            child: None,
            sa: None,
            text: format!("event {number}"),
        }
    }

    /// OPS-3: a slow reader is told how much it missed, and never waited for; the past is bounded.
    #[test]
    fn ops_3_slow_followers_miss_events() {
        let mut events = Events::default();
        let now = Instant::now();
        for number in 0..KEPT + 5 {
            events.happened(now, event(number));
        }
        assert_eq!(events.ring.len(), KEPT);
        assert_eq!(events.facts("a").failures, u64::try_from(KEPT + 5).unwrap());
        let (sender, mut receiver) = mpsc::channel(3);
        events.follow(2, sender);
        for number in 0..10 {
            events.happened(now, event(number));
        }
        let mut read = || receiver.try_recv().map(|event| (event.kind, event.text)).unwrap();
        assert_eq!(read().1, format!("event {}", KEPT + 3));
        assert_eq!(read().1, format!("event {}", KEPT + 4));
        assert_eq!(read().1, "event 0");
        events.happened(now, event(10));
        let (kind, text) = receiver.try_recv().map(|event| (event.kind, event.text)).unwrap();
        assert_eq!(kind, EventKind::Missed);
        assert!(text.starts_with("9 "), "{text}");
        assert_eq!(receiver.try_recv().unwrap().text, "event 10");
        drop(receiver);
        events.happened(now, event(11));
        assert!(events.followers.is_empty());
    }
}
