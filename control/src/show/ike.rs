//! IKE for people: tables of connections, sentences about one, lines of events.

use core::fmt::Write;

use super::join;
use crate::admin::{IkeReport, Outcome};
use crate::ike::api::{
    ChildRow, ChildSaRow, ConnectionRow, ConnectionState, Explanation, IkeEvent, IkeSaRow, PastEvent,
};
use crate::table::{Table, count, duration, timestamp};

/// One event in one line.
pub fn event(event: &IkeEvent) -> String {
    let IkeEvent { unix_ms, kind: _, connection, child, sa, text } = event;
    let mut who = connection.clone().unwrap_or_else(|| "-".to_owned());
    if let Some(child) = child {
        let _ = write!(who, "/{child}");
    }
    if let Some(sa) = sa {
        let _ = write!(who, " #{sa}");
    }
    format!("{}  {who}: {text}\n", timestamp(*unix_ms))
}

/// The line about IKE in `status`.
pub(super) fn glance(report: &IkeReport) -> String {
    let IkeReport { connections, ike_sas, child_sas, counters } = report;
    if connections.is_empty() && *ike_sas == 0 {
        return String::new();
    }
    let states: Vec<_> = connections.iter().map(|(state, number)| format!("{number} {state}")).collect();
    let total: u64 = connections.values().sum();
    let mut text = format!(
        "ike       {total} connections ({}); {} IKE SAs, {} CHILD_SAs\n",
        states.join(", "),
        count(*ike_sas),
        count(*child_sas)
    );
    let ignored: Vec<_> = counters
        .iter()
        .filter_map(|(name, number)| Some(format!("{} {}", name.strip_prefix("ignored_")?, count(*number))))
        .collect();
    if !ignored.is_empty() {
        let _ = writeln!(text, "          messages that were not acted on: {}", ignored.join(", "));
    }
    text
}

/// Connections, then children.
pub(super) fn connections(rows: &[ConnectionRow]) -> String {
    if rows.is_empty() {
        return "no connection is configured\n".to_owned();
    }
    let mut peers = Table::new(&[
        "CONNECTION",
        "STATE",
        "#IKE SA",
        "ROLE",
        "LOCAL",
        "REMOTE",
        "PEER",
        "SUITE",
        "AGE",
        "REKEY IN",
        "ASSIGNED",
    ]);
    let mut children = Table::new(&[
        "CHILD",
        "STATE",
        "#IKE SA",
        "SPI IN",
        "SPI OUT",
        "SUITE",
        "UDP",
        "AGE",
        "LOCAL > REMOTE",
    ]);
    for row in rows {
        let ConnectionRow { name, state, local, remote, remote_id, children: configured, sas, .. } = row;
        let name = if name.is_empty() { "-" } else { name };
        if sas.is_empty() {
            let any = |texts: &[String]| if texts.is_empty() { "any".to_owned() } else { texts.join(" ") };
            let cells = [name, state.word(), "", "", &any(local), &any(remote), remote_id].map(str::to_owned);
            peers.row(cells);
        }
        for sa in sas {
            peers.row(ike_sa(name, *state, sa));
            for child in &sa.children {
                children.row(child_sa(name, sa, child));
            }
        }
        for child in configured {
            if sas.iter().flat_map(|sa| &sa.children).all(|found| found.name != child.name) {
                let ChildRow { name: own, start, local, remote, .. } = child;
                let state = if start == "trap" { "on traffic" } else { "-" };
                let ends = format!("{} > {}", local.join(" "), remote.join(" "));
                let cells =
                    [&format!("{name}/{own}"), state, "", "", "", "", "", "", &ends].map(str::to_owned);
                children.row(cells);
            }
        }
    }
    let children = if children.is_empty() { String::new() } else { children.to_string() };
    join([peers.to_string(), children])
}

fn ike_sa(name: &str, state: ConnectionState, sa: &IkeSaRow) -> [String; 11] {
    let state = match (state, sa.state.as_str()) {
        (state, "established") => state.word(),
        (_, other) => other,
    };
    [
        name.to_owned(),
        state.to_owned(),
        sa.id.to_string(),
        if sa.initiator { "initiator" } else { "responder" }.to_owned(),
        sa.local.clone(),
        sa.remote.clone(),
        sa.remote_id.clone().unwrap_or_else(|| "?".to_owned()),
        sa.suite.clone(),
        duration(sa.age_seconds),
        sa.rekey_seconds.map(duration).unwrap_or_default(),
        sa.addresses.join(" "),
    ]
}

fn child_sa(name: &str, sa: &IkeSaRow, child: &ChildSaRow) -> [String; 9] {
    [
        format!("{name}/{}", child.name),
        child.state.clone(),
        sa.id.to_string(),
        child.spi_in.clone(),
        child.spi_out.clone(),
        child.suite.clone(),
        if child.encap { "yes" } else { "" }.to_owned(),
        duration(child.age_seconds),
        format!("{} > {}", child.local.join(" "), child.remote.join(" ")),
    ]
}

/// What became of a command.
pub(super) fn outcome(outcome: &Outcome) -> String {
    let Outcome { done, begun } = outcome;
    match (done, begun.sas.is_empty() && begun.children.is_empty()) {
        (true, true) => "nothing had to be done\n".to_owned(),
        (true, false) => "done\n".to_owned(),
        (false, _) => "begun; `postern connections` shows how it goes\n".to_owned(),
    }
}

/// Why a connection is up or not, in sentences, the most important first.
pub(super) fn explanation(facts: &Explanation) -> String {
    let Explanation { connection, datapath_up, sockets, heard_seconds, failure, failures, .. } = facts;
    let name = &connection.name;
    let is_up = matches!(connection.state, ConnectionState::Up | ConnectionState::NoChild);
    let mut lines = vec![state(connection)];
    for sa in &connection.sas {
        lines.push(ike_sa_sentence(sa));
        lines.extend(sa.children.iter().map(child_sentence));
    }
    if is_up {
        let missing = connection.children.iter().filter(|child| {
            connection.sas.iter().flat_map(|sa| &sa.children).all(|sa| sa.name != child.name)
        });
        lines.extend(missing.map(|child| missing_child(name, child)));
    }
    if let Some(problem) = sockets {
        lines.push(format!("IKE cannot listen: {problem}."));
    }
    if !datapath_up {
        lines.push(
            "The datapath is down, so that no child can be installed; `postern status` says why.".to_owned(),
        );
    }
    if let Some(PastEvent { seconds_ago, text }) = failure {
        let ago = duration(*seconds_ago);
        lines.push(match (is_up, failures) {
            (true, _) => format!("Before, {ago} ago, it failed: {text}."),
            (false, 0 | 1) => format!("It failed {ago} ago: {text}."),
            (false, failures) => format!("It failed {failures} times, last {ago} ago: {text}."),
        });
    }
    if !is_up {
        lines.extend(history(facts));
    }
    lines.push(match heard_seconds {
        Some(seconds) => format!("The peer was heard {} ago.", duration(*seconds)),
        None => "Nothing was heard from the peer since postern-control began; is it up, is its address right, does a \
                 firewall let UDP 500 and 4500 pass?"
            .to_owned(),
    });
    let mut text = lines.join("\n");
    text.push('\n');
    text
}

fn state(connection: &ConnectionRow) -> String {
    let ConnectionRow { name, state, remote, .. } = connection;
    match state {
        ConnectionState::Up => format!("{name} is up."),
        ConnectionState::NoChild => {
            format!("{name} has an IKE SA, but none of its children is up: nothing is protected.")
        }
        ConnectionState::Connecting => format!("{name} is connecting."),
        ConnectionState::Trapped => {
            format!("{name} is not up. It begins with the first packet that its children's selectors match.")
        }
        // A network is where a peer may come from, an address is where it can be reached.
        ConnectionState::Idle if remote.iter().all(|remote| remote.contains('/')) => {
            format!("{name} is not up. It has no `remote` to initiate to, so the peer has to begin.")
        }
        ConnectionState::Idle => {
            format!("{name} is not up. It waits for the peer, or for `postern up {name}`.")
        }
        ConnectionState::Failed => format!("{name} should be up and is not."),
    }
}

fn ike_sa_sentence(sa: &IkeSaRow) -> String {
    let IkeSaRow { id, state, local, remote, remote_id, suite, age_seconds, rekey_seconds, natt, .. } = sa;
    let who = remote_id.as_deref().unwrap_or("a peer not yet authenticated");
    let nat = if *natt { ", by port 4500" } else { "" };
    let rekey =
        rekey_seconds.map(|seconds| format!("; new keys in {}", duration(seconds))).unwrap_or_default();
    let suite = if suite.is_empty() { String::new() } else { format!(", {suite}") };
    format!(
        "IKE SA #{id} with {who} from {local} to {remote}{nat} is {state} for {}{suite}{rekey}.",
        duration(*age_seconds)
    )
}

fn child_sentence(child: &ChildSaRow) -> String {
    let ChildSaRow { name, state, suite, local, remote, age_seconds, .. } = child;
    format!(
        "Child {name} is {state} for {}, {suite}: {} > {}.",
        duration(*age_seconds),
        local.join(" "),
        remote.join(" ")
    )
}

fn missing_child(connection: &str, child: &ChildRow) -> String {
    let name = &child.name;
    match child.start.as_str() {
        "trap" => {
            format!("Child {name} is not up: it begins with the first packet that its selectors match.")
        }
        "start" => format!(
            "Child {name} should be up and is not; `postern log --connection {connection}` may say why."
        ),
        _ => format!(
            "Child {name} is not up: it waits for the peer, or for `postern up {connection} --child {name}`."
        ),
    }
}

/// What was before, and what comes.
fn history(facts: &Explanation) -> Vec<String> {
    let mut lines = Vec::new();
    match (&facts.established, &facts.closed) {
        (Some(established), Some(closed)) if closed.seconds_ago <= established.seconds_ago => {
            lines.push(format!("It was up until {} ago: {}.", duration(closed.seconds_ago), closed.text));
        }
        (Some(established), _) => {
            lines.push(format!("It was last established {} ago.", duration(established.seconds_ago)));
        }
        (None, _) => lines.push("It was never up since postern-control began.".to_owned()),
    }
    if let Some(seconds) = facts.next_attempt_seconds {
        lines.push(format!("The next attempt is in {}.", duration(seconds)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ike::api::EventKind;

    fn connection() -> ConnectionRow {
        ConnectionRow {
            name: "site-b".to_owned(),
            state: ConnectionState::Failed,
            local: Vec::new(),
            remote: vec!["192.0.2.2".to_owned()],
            local_id: "a".to_owned(),
            remote_id: "b".to_owned(),
            auth: "shared secret / shared secret".to_owned(),
            children: ["net", "voice"].map(child).to_vec(),
            sas: Vec::new(),
        }
    }

    fn child(name: &str) -> ChildRow {
        ChildRow {
            name: name.to_owned(),
            mode: "tunnel".to_owned(),
            start: "trap".to_owned(),
            local: vec!["10.1.0.0/24".to_owned()],
            remote: vec!["10.2.0.0/24".to_owned()],
        }
    }

    fn up() -> ConnectionRow {
        let child = ChildSaRow {
            id: 1,
            name: "net".to_owned(),
            state: "installed".to_owned(),
            spi_in: "0x00001001".to_owned(),
            spi_out: "0x00002001".to_owned(),
            suite: "AES_GCM_16_128".to_owned(),
            local: vec!["10.1.0.0/24".to_owned()],
            remote: vec!["10.2.0.0/24".to_owned()],
            encap: true,
            age_seconds: 65,
        };
        let sa = IkeSaRow {
            id: 3,
            state: "established".to_owned(),
            initiator: true,
            local: "192.0.2.1:4500".to_owned(),
            remote: "192.0.2.2:4500".to_owned(),
            natt: true,
            local_id: Some("a".to_owned()),
            remote_id: Some("b.example.org".to_owned()),
            suite: "AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519".to_owned(),
            spis: ("0000000000000001".to_owned(), "0000000000000002".to_owned()),
            age_seconds: 65,
            rekey_seconds: Some(7200),
            addresses: vec!["10.3.0.10".to_owned()],
            children: vec![child],
        };
        ConnectionRow { state: ConnectionState::Up, sas: vec![sa], ..connection() }
    }

    fn facts(connection: ConnectionRow) -> Explanation {
        let past = |seconds_ago, text: &str| Some(PastEvent { seconds_ago, text: text.to_owned() });
        Explanation {
            connection,
            datapath_up: true,
            sockets: None,
            heard_seconds: None,
            failure: past(5, "192.0.2.2 does not answer"),
            failures: 3,
            established: None,
            closed: None,
            next_attempt_seconds: Some(20),
        }
    }

    /// OPS-3: why a connection is up or not, in words.
    #[test]
    fn ops_3_explanations() {
        let text = explanation(&facts(connection()));
        assert_eq!(
            text,
            "site-b should be up and is not.\n\
             It failed 3 times, last 5s ago: 192.0.2.2 does not answer.\n\
             It was never up since postern-control began.\n\
             The next attempt is in 20s.\n\
             Nothing was heard from the peer since postern-control began; is it up, is its address right, does a firewall \
             let UDP 500 and 4500 pass?\n"
        );
        let text = explanation(&Explanation { heard_seconds: Some(2), datapath_up: false, ..facts(up()) });
        assert_eq!(
            text,
            "site-b is up.\n\
             IKE SA #3 with b.example.org from 192.0.2.1:4500 to 192.0.2.2:4500, by port 4500 is established for 1m 5s, \
             AES_GCM_16_128/PRF_HMAC_SHA2_256/CURVE_25519; new keys in 2h 0m.\n\
             Child net is installed for 1m 5s, AES_GCM_16_128: 10.1.0.0/24 > 10.2.0.0/24.\n\
             Child voice is not up: it begins with the first packet that its selectors match.\n\
             The datapath is down, so that no child can be installed; `postern status` says why.\n\
             Before, 5s ago, it failed: 192.0.2.2 does not answer.\n\
             The peer was heard 2s ago.\n"
        );
        let idle = ConnectionRow {
            state: ConnectionState::Idle,
            remote: vec!["10.0.0.0/8".to_owned()],
            ..connection()
        };
        assert!(explanation(&facts(idle)).starts_with("site-b is not up. It has no `remote`"));
    }

    #[test]
    fn ops_3_tables_and_lines() {
        let text = connections(&[up(), connection()]);
        for wanted in [
            "CONNECTION  STATE",
            "site-b      up",
            "10.3.0.10",
            "site-b      FAILED",
            "site-b/voice  on traffic",
            "0x00001001",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert_eq!(connections(&[]), "no connection is configured\n");
        let line = event(&IkeEvent {
            unix_ms: 1_795_267_745_123,
            kind: EventKind::ChildUp,
            connection: Some("site-b".to_owned()),
            child: Some("net".to_owned()),
            sa: Some(3),
            text: "CHILD_SA up".to_owned(),
        });
        assert_eq!(line, "2026-11-21 13:29:05.123Z  site-b/net #3: CHILD_SA up\n");
    }
}
