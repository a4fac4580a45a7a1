//! The answers of the management protocol as text for people.

mod ike;
mod recovery;

use core::fmt::Write;
use std::collections::BTreeMap;

use crate::admin::{
    Answer, DatapathReport, DropsReport, PolicyRow, RelayRow, ReloadReport, SaRow, Side, StatusReport,
};
use crate::table::{Table, bytes, count, duration};
use postern_contract::request::{Latency, SteerStatus};

pub use ike::event;
pub use recovery::burst_line;

/// Any answer.
pub fn answer(answer: &Answer) -> String {
    match answer {
        Answer::Status(report) => status(report),
        Answer::Sas(rows) => sas(rows),
        Answer::Policies(rows) => policies(rows),
        Answer::Relays(rows) => relays(rows),
        Answer::Drops(report) => drops(report),
        Answer::Latency(report) => latency(report),
        Answer::Reload(report) => reload(report),
        Answer::Stopping => "postern-control is stopping\n".to_owned(),
        Answer::Connections(rows) => ike::connections(rows),
        Answer::Explanation(facts) => ike::explanation(facts),
        Answer::Outcome(outcome) => ike::outcome(outcome),
        Answer::Recovery(report) => recovery::whole(report),
        Answer::Log => String::new(),
    }
}

/// Paragraphs with an empty line between.
fn join(parts: impl IntoIterator<Item = String>) -> String {
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
}

fn status(report: &StatusReport) -> String {
    let StatusReport { control, datapath, tunnels, ike, recovery, events, problems } = report;
    let mut head = format!(
        "control   up {}, pid {}, version {}, configuration {}\n",
        duration(control.uptime_seconds),
        control.pid,
        control.version,
        control.config
    );
    head.push_str(&datapath_line(datapath));
    if let Some(ike) = ike {
        head.push_str(&ike::glance(ike));
    }
    if let Some(recovery) = recovery.as_ref().filter(|report| report.is_of_interest()) {
        head.push_str(&recovery::glance(recovery));
    }

    let mut table = Table::new(&[
        "TUNNEL",
        "STATE",
        "MODE",
        "SUITE",
        "LOCAL",
        "REMOTE",
        "#IN PKTS",
        "#IN",
        "#OUT PKTS",
        "#OUT",
        "#DROPS",
        "IDLE",
    ]);
    for row in tunnels {
        table.row([
            row.name.clone(),
            row.state.word().to_owned(),
            row.mode.clone(),
            row.suite.clone(),
            row.local.clone(),
            row.remote.clone(),
            count(row.in_packets),
            bytes(row.in_bytes),
            count(row.out_packets),
            bytes(row.out_bytes),
            count(row.drops),
            row.idle_seconds.map(duration).unwrap_or_default(),
        ]);
    }
    let tunnels = if table.is_empty() { "no tunnel is configured\n".to_owned() } else { table.to_string() };

    let mut ports = Table::new(&[
        "WORKER",
        "CORE",
        "PORT",
        "ROLE",
        "ATTACHMENT",
        "#QUEUE",
        "#RECEIVED",
        "#SENT",
        "#DROPPED",
    ]);
    for (index, worker) in datapath.workers.iter().enumerate() {
        for port in &worker.ports {
            ports.row([
                index.to_string(),
                worker.core.map_or_else(|| "-".to_owned(), |core| core.to_string()),
                port.interface.clone(),
                format!("{:?}", port.role).to_lowercase(),
                port.attachment.clone(),
                port.queue.to_string(),
                count(port.counters.received),
                count(port.counters.transmitted),
                count(port.counters.drops.iter().map(|(_, packets)| packets).sum()),
            ]);
        }
    }
    let ports = if ports.is_empty() { String::new() } else { ports.to_string() };

    let mut rest = String::new();
    if !events.is_empty() {
        let _ = writeln!(rest, "events    {}", pairs(events));
    }
    for problem in problems {
        let _ = writeln!(rest, "problem   {problem}");
    }
    join([head, tunnels, ports, rest])
}

fn datapath_line(datapath: &DatapathReport) -> String {
    if !datapath.up {
        let why = datapath.problem.as_deref().unwrap_or("no reason is known");
        return format!("datapath  DOWN for {}: {why}\n", duration(datapath.since_seconds));
    }
    format!(
        "datapath  up {}, pid {}, version {}, {} workers, {}; {} SAs, {} policies, {} relay entries{}\n",
        duration(datapath.uptime_seconds.unwrap_or_default()),
        datapath.pid.unwrap_or_default(),
        datapath.version.as_deref().unwrap_or("?"),
        datapath.workers.len(),
        datapath.crypto_backend.as_deref().unwrap_or("?"),
        datapath.sas,
        datapath.policies,
        datapath.relays,
        match datapath.relays_in_xdp {
            Some(count) if datapath.relays > 0 => format!(" ({count} in XDP)"),
            _ => String::new(),
        }
    )
}

fn sas(rows: &[SaRow]) -> String {
    if rows.is_empty() {
        return "no SA is configured\n".to_owned();
    }
    let mut table = Table::new(&[
        "TUNNEL",
        "DIR",
        "PROTO",
        "SPI",
        "SEEN AS",
        "STATE",
        "SUITE",
        "LOCAL",
        "REMOTE",
        "UDP",
        "#WORKER",
        "#PACKETS",
        "#BYTES",
        "#SEQUENCE",
        "#DROPS",
        "IDLE",
        "KEY CHECK",
    ]);
    let mut problems = String::new();
    for row in rows {
        table.row([
            row.tunnel.clone(),
            row.direction.clone(),
            row.protocol.clone(),
            row.spi.clone(),
            row.seen_spi.clone().unwrap_or_default(),
            row.state.word().to_owned(),
            row.suite.clone(),
            row.local.clone(),
            row.remote.clone(),
            row.encap.clone().unwrap_or_default(),
            row.worker.map(|worker| worker.to_string()).unwrap_or_default(),
            count(row.packets),
            bytes(row.bytes),
            row.sequence.to_string(),
            count(row.drops.values().sum()),
            row.idle_seconds.map(duration).unwrap_or_default(),
            row.key_check.clone().unwrap_or_default(),
        ]);
        if let Some(problem) = &row.problem {
            let _ = writeln!(problems, "{} {} {}: {problem}", row.tunnel, row.direction, row.spi);
        }
    }
    join([table.to_string(), problems])
}

fn policies(rows: &[PolicyRow]) -> String {
    if rows.is_empty() {
        return "no policy is configured\n".to_owned();
    }
    let mut table = Table::new(&["#PRIORITY", "NAME", "ACTION", "STATE", "LOCAL > REMOTE"]);
    for row in rows {
        let mut selectors = row.selectors.iter();
        table.row([
            row.priority.to_string(),
            row.name.clone(),
            row.action.clone(),
            row.state.word().to_owned(),
            selectors.next().cloned().unwrap_or_default(),
        ]);
        for selector in selectors {
            table.row(["", "", "", "", selector].map(str::to_owned));
        }
    }
    table.to_string()
}

fn relays(rows: &[RelayRow]) -> String {
    if rows.is_empty() {
        return "no relay entry is configured\n".to_owned();
    }
    let mut table = Table::new(&[
        "RELAY",
        "STATE",
        "SIDE",
        "PEER",
        "OWN ADDRESS",
        "SPI IN > OUT",
        "UDP",
        "#PACKETS",
        "#BYTES",
        "#WRONG PEER",
    ]);
    for row in rows {
        let mut side = |name: &str,
                        state: &str,
                        side_name: &str,
                        side: &Side,
                        packets: u64,
                        octets: u64,
                        wrong: &str| {
            table.row([
                name.to_owned(),
                state.to_owned(),
                side_name.to_owned(),
                side.peer.clone(),
                side.relay.clone(),
                side.spis.join(", "),
                side.encap.clone().unwrap_or_default(),
                count(packets),
                bytes(octets),
                wrong.to_owned(),
            ]);
        };
        let wrong = count(row.wrong_peer);
        side(
            &row.name,
            row.state.word(),
            "client",
            &row.client,
            row.to_gateway_packets,
            row.to_gateway_bytes,
            &wrong,
        );
        side("", "", "gateway", &row.gateway, row.to_client_packets, row.to_client_bytes, "");
    }
    format!("{table}\nPACKETS and BYTES are those received from that side and sent on to the other.\n")
}

fn drops(report: &DropsReport) -> String {
    let DropsReport { reasons, ports, sas, steer } = report;
    let mut by_reason = Table::new(&["#PACKETS", "REASON", "MEANING"]);
    for row in reasons {
        by_reason.row([count(row.packets), row.reason.clone(), row.help.clone()]);
    }
    let by_reason =
        if reasons.is_empty() { "nothing was dropped\n".to_owned() } else { by_reason.to_string() };
    let mut by_port = Table::new(&["WORKER", "PORT", "#QUEUE", "DROPPED"]);
    for row in ports {
        by_port.row([
            row.worker.to_string(),
            row.interface.clone(),
            row.queue.to_string(),
            pairs(&row.drops),
        ]);
    }
    let mut by_sa = Table::new(&["TUNNEL", "DIR", "PROTO", "SPI", "DROPPED"]);
    for row in sas {
        by_sa.row([
            row.tunnel.clone(),
            row.direction.clone(),
            row.protocol.clone(),
            row.spi.clone(),
            pairs(&row.drops),
        ]);
    }
    let shown = |table: Table| if table.is_empty() { String::new() } else { table.to_string() };
    join([by_reason, shown(by_port), shown(by_sa), steering(steer)])
}

fn steering(steer: &[SteerStatus]) -> String {
    let mut table = Table::new(&["INTERFACE", "XDP VERDICT", "#PACKETS"]);
    for SteerStatus { interface, verdicts } in steer {
        for (verdict, packets) in verdicts.iter().filter(|(_, packets)| *packets > 0) {
            table.row([interface.clone(), verdict.clone(), count(*packets)]);
        }
    }
    if table.is_empty() { String::new() } else { table.to_string() }
}

fn latency(report: &Latency) -> String {
    let Latency { samples, min, p50, p90, p99, p999, max } = *report;
    if samples == 0 {
        return "no packet was sampled yet\n".to_owned();
    }
    let mut table = Table::new(&["#SAMPLES", "#MIN", "#P50", "#P90", "#P99", "#P99.9", "#MAX"]);
    let micro = |nanos: u64| format!("{}.{:01} µs", nanos / 1000, nanos % 1000 / 100);
    table.row([count(samples), micro(min), micro(p50), micro(p90), micro(p99), micro(p999), micro(max)]);
    format!("from receive to transmit of sampled packets\n{table}")
}

fn reload(report: &ReloadReport) -> String {
    let ReloadReport { dry_run, waiting, changes, refused, notes, warnings } = report;
    let mut text = String::new();
    for warning in warnings {
        let _ = writeln!(text, "{warning}");
    }
    for note in notes {
        let _ = writeln!(text, "note: {note}");
    }
    if *waiting {
        let _ = writeln!(text, "the datapath is down: the changes take effect when it is back");
        return text;
    }
    for change in changes {
        let _ = writeln!(text, "{change}");
    }
    for refusal in refused {
        let _ = writeln!(text, "REFUSED {refusal}");
    }
    let _ = match (changes.is_empty(), dry_run) {
        (true, _) => writeln!(text, "nothing differs"),
        (false, true) => writeln!(text, "{} changes would be made (dry run)", changes.len()),
        (false, false) => writeln!(text, "{} changes, {} refused", changes.len(), refused.len()),
    };
    text
}

fn pairs(map: &BTreeMap<String, u64>) -> String {
    map.iter().map(|(name, packets)| format!("{name} {}", count(*packets))).collect::<Vec<_>>().join(", ")
}
