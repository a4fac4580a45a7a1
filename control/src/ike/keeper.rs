//! Which connections this side wants up by itself, and when it tries again what failed.
//!
//! A connection is *kept* if one of its children starts by itself (`start`, or `start` after a close or a dead peer) and
//! the peer's address is known. A kept connection whose attempt failed is tried again, after a pause that doubles, until
//! it is up or `postern down` is said; closing what is up is no failure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use postern_ike::config::{Connection, Start};

/// First and longest pause. An attempt that is not answered has taken a minute or more by itself.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(1));

/// Attempts that wait.
#[derive(Debug, Default)]
pub struct Keeper {
    waiting: HashMap<Goal, Waiting>,
    /// Taken down by command.
    down: HashSet<Arc<str>>,
}

/// A connection, or one child of it.
pub type Goal = (Arc<str>, Option<Arc<str>>);

#[derive(Debug)]
struct Waiting {
    /// `None`: under way.
    due: Option<Instant>,
    pause: Duration,
}

/// Whether this side brings the connection up by itself.
pub fn is_kept(connection: &Connection) -> bool {
    let starts = |child: &postern_ike::config::Child| {
        [child.start, child.on_close, child.on_dpd].contains(&Start::Start)
    };
    connection.remote.is_some() && connection.children.iter().any(starts)
}

impl Keeper {
    /// An attempt failed: when it is due again, unless it was taken down.
    pub fn failed(&mut self, now: Instant, goal: Goal) {
        if self.down.contains(&goal.0) {
            return;
        }
        let waiting = self.waiting.entry(goal).or_insert(Waiting { due: None, pause: PAUSE.0 });
        if waiting.due.is_none() {
            waiting.due = Some(now + waiting.pause);
            waiting.pause = (waiting.pause * 2).min(PAUSE.1);
        }
    }

    /// It is up.
    pub fn succeeded(&mut self, goal: &Goal) {
        self.waiting.remove(goal);
    }

    /// Taken down by command, or up again.
    pub fn command(&mut self, connection: &str, up: bool) {
        self.waiting.retain(|(name, _), _| **name != *connection);
        if up {
            self.down.remove(connection);
        } else {
            self.down.insert(connection.into());
        }
    }

    /// Whether it was taken down by command.
    pub fn is_down(&self, connection: &str) -> bool {
        self.down.contains(connection)
    }

    /// Forgets what is not configured any more.
    pub fn retain(&mut self, is_kept: impl Fn(&str) -> bool) {
        self.waiting.retain(|(name, _), _| is_kept(name));
        self.down.retain(|name| is_kept(name));
    }

    /// What is due; under way from now on.
    pub fn due(&mut self, now: Instant) -> Vec<Goal> {
        let due = self.waiting.iter_mut().filter(|(_, waiting)| waiting.due.is_some_and(|due| due <= now));
        due.map(|(goal, waiting)| {
            waiting.due = None;
            goal.clone()
        })
        .collect()
    }

    /// Everything that waits is due at once: the network changed.
    pub fn hurry(&mut self, now: Instant) {
        for waiting in self.waiting.values_mut().filter(|waiting| waiting.due.is_some()) {
            waiting.due = Some(now);
        }
    }

    /// When a connection or one of its children is tried again.
    pub fn next(&self, connection: &str) -> Option<Instant> {
        let of = self.waiting.iter().filter(|((name, _), _)| **name == *connection);
        of.filter_map(|(_, waiting)| waiting.due).min()
    }

    /// Whether its last attempt failed.
    pub fn is_failing(&self, connection: &str) -> bool {
        self.waiting.keys().any(|(name, child)| **name == *connection && child.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IKE-1: what failed is tried again after longer and longer pauses, until it is up or taken down.
    #[test]
    fn ike_1_pauses_grow() {
        let mut keeper = Keeper::default();
        let goal: Goal = ("a".into(), None);
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            keeper.failed(now, goal.clone());
            keeper.failed(now + Duration::from_secs(1), goal.clone());
            assert!(keeper.due(now).is_empty());
            let next = keeper.next("a").unwrap();
            pauses.push((next - now).as_secs());
            now = next;
            assert_eq!(keeper.due(now), core::slice::from_ref(&goal));
            assert!(keeper.due(now).is_empty(), "it is under way");
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60]);
        keeper.succeeded(&goal);
        keeper.failed(now, goal.clone());
        assert_eq!(keeper.next("a"), Some(now + Duration::from_secs(2)));
        keeper.hurry(now);
        assert_eq!(keeper.due(now), core::slice::from_ref(&goal));
        keeper.command("a", false);
        keeper.failed(now, goal.clone());
        assert!(keeper.is_down("a") && keeper.next("a").is_none());
        keeper.command("a", true);
        keeper.failed(now, goal);
        assert!(keeper.next("a").is_some());
    }
}
