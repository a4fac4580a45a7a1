//! The management socket's commands, carried out.

use std::time::Instant;

use postern_ike::config::Start;
use postern_ike::endpoint::{CommandError, Target as EndpointTarget};
use postern_ike::output::{IkeSaView, SaId};

use super::api::{Begun, ConnectionRow, EventKind, Explanation, IkeCommand, Target};
use super::driver::{Driver, now_is};
use super::events::{Facts, Happened, past};
use super::keeper::is_kept;
use super::rows;
use crate::admin::{Failure, FailureKind};
use crate::metrics::IkeTotals;

impl Driver {
    /// Carries out one command. Nobody is left to tell where a receiver is gone.
    pub(super) fn command(&mut self, command: IkeCommand) {
        match command {
            IkeCommand::Configure { ike, dry_run, reply } => {
                let changes = self.config.changes(&ike);
                if !dry_run {
                    self.configure(*ike);
                }
                let _ = reply.send(changes);
            }
            IkeCommand::Up { connection, child, reply } => {
                let _ = reply.send(self.up(&connection, child.as_deref()).map_err(|error| failure(&error)));
            }
            IkeCommand::Down { target, reply } => {
                let _ = reply.send(self.down(&target).map_err(|error| failure(&error)));
            }
            IkeCommand::Rekey { target, reply } => {
                let _ = reply.send(self.rekey(&target).map_err(|error| failure(&error)));
            }
            IkeCommand::List { connection, reply } => {
                let _ = reply.send(self.list(connection.as_deref()).map_err(|error| failure(&error)));
            }
            IkeCommand::Explain { connection, reply } => {
                let _ = reply.send(self.explain(&connection).map_err(|error| failure(&error)));
            }
            IkeCommand::Follow { backlog, events } => self.events.follow(backlog, events),
            IkeCommand::Totals(reply) => {
                let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
                let totals = IkeTotals {
                    ike_sas: count(self.endpoint.len()),
                    child_sas: count(self.datapath.children()),
                    counters: self.counters(),
                };
                let _ = reply.send(totals);
            }
            IkeCommand::Recovery(reply) => {
                let _ = reply.send(self.memory.report(self.began));
            }
            IkeCommand::Snapshot(done) => self.memory.checkpoint(done),
            IkeCommand::Outline(reply) => {
                let _ = reply.send(self.datapath.outline());
            }
        }
    }

    fn up(&mut self, name: &str, child: Option<&str>) -> Result<Begun, CommandError> {
        let attempt = self.endpoint.initiate(now_is(), name, child)?;
        self.keeper.command(name, true);
        let connection = self.connection(name).ok_or_else(|| CommandError::NoConnection(name.to_owned()))?;
        let up = |wanted: &str| {
            let installed = |view: IkeSaView| view.children.into_iter().any(|child| *child.name == *wanted);
            self.endpoint.sas(now_is()).filter(|view| view.id == attempt.sa).any(installed)
        };
        let started = |child: &&postern_ike::config::Child| child.start != Start::None;
        let names: Vec<&str> = if let Some(child) = child {
            vec![child]
        } else {
            let started: Vec<_> = connection.children.iter().filter(started).collect();
            let all = if started.is_empty() { connection.children.iter().take(1).collect() } else { started };
            all.into_iter().map(|child| &*child.name).collect()
        };
        let children = names.into_iter().filter(|name| !up(name)).map(ToOwned::to_owned).collect();
        let sas = if attempt.reused { Vec::new() } else { vec![attempt.sa.0] };
        if !attempt.reused {
            let connection = Some(std::sync::Arc::clone(&connection.name));
            let text = "connecting, by command".to_owned();
            let (kind, sa) = (EventKind::Connecting, Some(attempt.sa.0));
            self.events.happened(Instant::now(), Happened { kind, connection, child: None, sa, text });
        }
        Ok(Begun { sas, children })
    }

    fn down(&mut self, target: &Target) -> Result<Begun, CommandError> {
        if target.sa.is_none() && target.child.is_none() {
            // Also what is only tried again and again.
            let waiting = self.keeper.next(&target.connection).is_some();
            self.keeper.command(&target.connection, false);
            if waiting && self.targets(target).is_err() {
                return Ok(Begun::default());
            }
        }
        self.for_each(target, |driver, target| driver.endpoint.terminate(now_is(), target))
    }

    fn rekey(&mut self, target: &Target) -> Result<Begun, CommandError> {
        self.for_each(target, |driver, target| driver.endpoint.rekey(now_is(), target))
    }

    /// Does something to all that `target` names, and says what it was.
    fn for_each(
        &mut self,
        target: &Target,
        mut each: impl FnMut(&mut Self, &EndpointTarget) -> Result<usize, CommandError>,
    ) -> Result<Begun, CommandError> {
        let targets = self.targets(target)?;
        let mut begun = Begun::default();
        for (one, name) in targets {
            if each(self, &one).is_ok() {
                match one {
                    EndpointTarget::Ike(sa) => begun.sas.push(sa.0),
                    _ => begun.children.extend(name),
                }
            }
        }
        if begun == Begun::default() { Err(CommandError::NotUp) } else { Ok(begun) }
    }

    /// The single SAs that `target` names, with the names of children.
    fn targets(&self, target: &Target) -> Result<Vec<(EndpointTarget, Option<String>)>, CommandError> {
        let Target { connection, child, sa } = target;
        let found =
            self.connection(connection).ok_or_else(|| CommandError::NoConnection(connection.clone()))?;
        if let Some(child) = child
            && !found.children.iter().any(|found| *found.name == **child)
        {
            return Err(CommandError::NoChild(connection.clone(), child.clone()));
        }
        let views = self.endpoint.sas(now_is()).filter(|view| {
            view.connection.as_deref() == Some(connection) && sa.is_none_or(|sa| view.id == SaId(sa))
        });
        let mut targets = Vec::new();
        for view in views {
            match child {
                None => targets.push((EndpointTarget::Ike(view.id), None)),
                Some(child) => targets.extend(
                    view.children
                        .into_iter()
                        .filter(|found| *found.name == **child)
                        .map(|found| (EndpointTarget::Child(found.id), Some(found.name.to_string()))),
                ),
            }
        }
        if targets.is_empty() { Err(CommandError::NotUp) } else { Ok(targets) }
    }

    fn list(&self, only: Option<&str>) -> Result<Vec<ConnectionRow>, CommandError> {
        let mut by_name: std::collections::HashMap<_, Vec<IkeSaView>> = std::collections::HashMap::new();
        for view in self.endpoint.sas(now_is()) {
            by_name.entry(view.connection.clone()).or_default().push(view);
        }
        let mut rows = Vec::new();
        for connection in self.connections().filter(|found| only.is_none_or(|only| *found.name == *only)) {
            let mut sas = by_name.remove(&Some(std::sync::Arc::clone(&connection.name))).unwrap_or_default();
            sas.sort_by_key(|view| view.id);
            rows.push(rows::connection(connection, sas, self.keeper.is_failing(&connection.name)));
        }
        match only {
            Some(name) if rows.is_empty() => return Err(CommandError::NoConnection(name.to_owned())),
            Some(_) => {}
            None => {
                let rest: Vec<IkeSaView> = by_name.into_values().flatten().collect();
                if !rest.is_empty() {
                    rows.push(rows::unknown(rest));
                }
            }
        }
        Ok(rows)
    }

    fn explain(&self, name: &str) -> Result<Explanation, CommandError> {
        let now = Instant::now();
        let missing = || CommandError::NoConnection(name.to_owned());
        let connection = self.connection(name).ok_or_else(missing)?;
        let row = self.list(Some(name))?.pop().ok_or_else(missing)?;
        let views = self.endpoint.sas(now_is()).filter(|view| view.connection.as_deref() == Some(name));
        let peers: Vec<_> = views.map(|view| view.path.remote.ip()).collect();
        let fits = |address: &std::net::IpAddr| {
            peers.contains(address)
                || connection.remote == Some(*address)
                || connection.remote_nets.iter().any(|net| net.contains(address))
                || (connection.remote.is_none() && connection.remote_nets.is_empty())
        };
        let heard = self.heard.iter().filter(|(address, _)| fits(address)).map(|(_, when)| *when).max();
        let Facts { failure, failures, established, closed } = self.events.facts(name);
        let seconds_to = |when: Instant| when.saturating_duration_since(now).as_secs();
        Ok(Explanation {
            connection: row,
            datapath_up: self.datapath.is_connected(),
            sockets: self.listen_problem.clone(),
            heard_seconds: heard.map(|when| now.saturating_duration_since(when).as_secs()),
            failure: past(now, failure),
            failures,
            established: past(now, established),
            closed: past(now, closed),
            next_attempt_seconds: self.keeper.next(name).filter(|_| is_kept(connection)).map(seconds_to),
        })
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counters = self.endpoint.counters();
        let sockets = self.sockets.as_ref().map(super::sockets::Sockets::counters).unwrap_or_default();
        let named = [
            ("initiated", counters.initiated),
            ("responded", counters.responded),
            ("established", counters.established),
            ("failed", counters.failed),
            ("ike_rekeyed", counters.ike_rekeyed),
            ("children", counters.children),
            ("children_rekeyed", counters.children_rekeyed),
            ("children_failed", counters.children_failed),
            ("retransmitted", counters.retransmitted),
            ("dead", counters.dead),
            ("datagrams_received", sockets.received),
            ("datagrams_sent", sockets.sent),
            ("datagrams_unsent", sockets.unsent),
            ("keepalives", sockets.keepalives),
            ("esp_missed", sockets.esp),
            ("datagrams_short", sockets.short),
        ];
        let named = named.into_iter().map(|(name, count)| (name.to_owned(), count));
        let ignored = counters
            .ignored_by_reason()
            .map(|(reason, count)| (format!("ignored_{}", reason.label()), count));
        named.chain(ignored).collect()
    }
}

fn failure(error: &CommandError) -> Failure {
    let kind = match error {
        CommandError::NoConnection(_) | CommandError::NoChild(..) | CommandError::NotUp => {
            FailureKind::NotFound
        }
        CommandError::NoRemote(_) | CommandError::NoRoute(_) => FailureKind::Request,
    };
    Failure { kind, message: error.to_string(), findings: Vec::new() }
}
