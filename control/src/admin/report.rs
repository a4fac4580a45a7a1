//! Turns what the supervisor sees into what the management protocol shows. Pure: a [`View`] in, rows out.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use postern_contract::Translation;
use postern_contract::counters::{DropReason, SaCounters};
use postern_contract::relay::{Partition, RelayEntry};
use postern_contract::request::{SaReport, Status};
use postern_contract::sa::{
    Action, AddressRange, Direction, IpsecProtocol, Mode, Policy, SaId, Selector, UdpEncap,
};
use postern_wire::ids::{Protocol, Spi};

use super::{
    ControlReport, DatapathReport, DropRow, DropsReport, IkeReport, PolicyRow, PortDrops, RelayRow, SaDrops,
    SaRow, Side, State, StatusReport, TunnelRow,
};
use crate::datapath::supervisor::View;
use crate::desired::SaOutline;
use crate::ike::api::ConnectionRow;

/// The answer to `status`.
pub fn status(view: &View, control: ControlReport) -> StatusReport {
    let mut problems: Vec<String> = view.problem.clone().into_iter().collect();
    problems.extend(view.refused.iter().map(|(step, why)| format!("{step}: {why}")));
    problems.sort();
    let tunnels: Vec<_> = tunnels(view);
    StatusReport {
        control,
        datapath: datapath(view),
        tunnels,
        ike: None,
        recovery: None,
        events: view.events.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect(),
        problems,
    }
}

/// IKE at a glance.
pub fn ike(rows: &[ConnectionRow], counters: Vec<(String, u64)>) -> IkeReport {
    let mut connections = BTreeMap::new();
    for row in rows.iter().filter(|row| !row.name.is_empty()) {
        *connections.entry(row.state.word().to_owned()).or_default() += 1;
    }
    let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
    let sas = || rows.iter().flat_map(|row| &row.sas);
    IkeReport {
        connections,
        ike_sas: count(sas().count()),
        child_sas: sas().map(|sa| count(sa.children.len())).sum(),
        counters: counters.into_iter().filter(|(_, count)| *count > 0).collect(),
    }
}

fn datapath(view: &View) -> DatapathReport {
    let mut report = DatapathReport {
        up: view.connected.is_some(),
        since_seconds: view.since_seconds,
        problem: view.problem.clone(),
        starts: view.starts,
        pid: view.connected.map(|(pid, _)| pid),
        ..DatapathReport::default()
    };
    if let Some(status) = &view.status {
        let Status {
            version,
            pid: _,
            uptime_seconds,
            crypto_backend,
            sas,
            policies,
            relays,
            relays_in_xdp,
            workers,
            steer,
        } = status;
        report.version = Some(version.clone());
        report.uptime_seconds = Some(*uptime_seconds);
        report.crypto_backend = Some(crypto_backend.clone());
        (report.sas, report.policies, report.relays) = (*sas, *policies, *relays);
        report.relays_in_xdp = *relays_in_xdp;
        report.workers.clone_from(workers);
        report.steer.clone_from(steer);
    }
    report
}

fn tunnels(view: &View) -> Vec<TunnelRow> {
    let desired = &view.desired;
    let row = |tunnel: &crate::desired::TunnelSummary| {
        let reports: Vec<_> = tunnel.sas.iter().filter_map(|id| view.installed.sas.get(id)).collect();
        // In a bundle each packet passes both SAs: count the one that carries the payload.
        let payload = |direction| {
            let mut all: Vec<_> = reports.iter().filter(|report| report.direction == direction).collect();
            all.sort_by_key(|report| report.protocol == IpsecProtocol::Ah);
            all.first().map(|report| &report.counters)
        };
        let (inbound, outbound) = (payload(Direction::Inbound), payload(Direction::Outbound));
        let counted = |counters: Option<&SaCounters>| counters.map_or((0, 0), |c| (c.packets, c.bytes));
        let ((in_packets, in_bytes), (out_packets, out_bytes)) = (counted(inbound), counted(outbound));
        let outline = tunnel.sas.iter().find_map(|id| desired.sas.get(id));
        // MOB-2: where the peer is now is known to the datapath alone.
        let remote =
            reports.iter().find(|report| report.direction == Direction::Inbound).map(|report| report.remote);
        TunnelRow {
            name: tunnel.name.clone(),
            state: tunnel_state(view, tunnel),
            mode: mode_word(tunnel.mode).to_owned(),
            suite: tunnel.suite.clone(),
            local: outline.map(|sa| sa.local.on_wire.to_string()).unwrap_or_default(),
            remote: remote.or(outline.map(|sa| sa.remote)).map(|r| r.on_wire.to_string()).unwrap_or_default(),
            in_packets,
            in_bytes,
            out_packets,
            out_bytes,
            drops: reports.iter().flat_map(|report| &report.counters.drops).map(|(_, count)| count).sum(),
            idle_seconds: reports.iter().filter_map(|report| report.counters.idle_seconds).min(),
        }
    };
    desired.tunnels.iter().map(row).collect()
}

fn tunnel_state(view: &View, tunnel: &crate::desired::TunnelSummary) -> State {
    if view.connected.is_none() {
        return State::Down;
    }
    let found = |id: &SaId| view.installed.sas.get(id);
    let present = tunnel.sas.iter().filter(|id| found(id).is_some()).count();
    let policy = view.installed.policies.contains_key(&tunnel.policy);
    if present == 0 {
        State::Missing
    } else if present < tunnel.sas.len() || !policy {
        State::Partial
    } else if tunnel.sas.iter().filter_map(found).any(|report| report.stopped) {
        State::Stopped
    } else {
        State::Installed
    }
}

/// Whether `name` means `tunnel`: by its own name, or as the connection whose child it is (`connection/child`).
pub fn is_named(tunnel: &str, name: &str) -> bool {
    tunnel.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The answer to `sa`.
pub fn sas(view: &View, name: Option<&str>) -> Vec<SaRow> {
    let desired = &view.desired;
    let wanted = |tunnel: &str| name.is_none_or(|name| is_named(tunnel, name));
    let mut rows = Vec::new();
    for tunnel in desired.tunnels.iter().filter(|tunnel| wanted(&tunnel.name)) {
        for id in &tunnel.sas {
            let outline = desired.sas.get(id);
            let mut row = sa_row(*id, outline, view.installed.sas.get(id), view.connected.is_some());
            row.problem =
                view.refused.iter().find(|(step, _)| step.contains(&row.spi)).map(|(_, why)| why.clone());
            rows.push(row);
        }
    }
    let foreign = view.installed.sas.iter().filter(|(id, _)| name.is_none() && !desired.sas.contains_key(id));
    rows.extend(foreign.map(|(id, report)| sa_row(*id, None, Some(report), true)));
    rows
}

fn sa_row(id: SaId, outline: Option<&SaOutline>, report: Option<&SaReport>, up: bool) -> SaRow {
    let state = match (outline, report) {
        _ if !up => State::Down,
        (None, _) => State::Foreign,
        (Some(_), None) => State::Missing,
        (Some(_), Some(report)) if report.stopped => State::Stopped,
        (Some(_), Some(_)) => State::Installed,
    };
    let unknown = || Translation::same(core::net::IpAddr::V4(core::net::Ipv4Addr::UNSPECIFIED));
    let direction = report.map(|r| r.direction).or(outline.map(|o| o.direction));
    let protocol = report.map(|r| r.protocol).or(outline.map(|o| o.protocol));
    let mode = report.map(|r| r.mode).or(outline.map(|o| o.mode));
    let spi = report.map(|r| r.spi).or(outline.map(|o| o.spi)).unwrap_or(Translation::same(Spi(0)));
    let local = report.map(|r| r.local).or(outline.map(|o| o.local)).unwrap_or_else(unknown);
    let remote = report.map(|r| r.remote).or(outline.map(|o| o.remote)).unwrap_or_else(unknown);
    let encap = report.map_or(outline.and_then(|o| o.encap), |r| r.encap);
    let counters = report.map(|report| report.counters.clone()).unwrap_or_default();
    let inbound = direction == Some(Direction::Inbound);
    SaRow {
        tunnel: outline.map_or_else(|| "-".to_owned(), |outline| outline.tunnel.clone()),
        id: format!("{:016x}", id.0),
        state,
        problem: None,
        direction: direction.map_or("?", direction_word).to_owned(),
        protocol: protocol.map_or("?", protocol_word).to_owned(),
        mode: mode.map_or("?", mode_word).to_owned(),
        suite: outline.map_or_else(|| "-".to_owned(), |outline| outline.suite.clone()),
        spi: spi.on_wire.to_string(),
        seen_spi: spi.is_translated().then(|| spi.authenticated.to_string()),
        local: local.on_wire.to_string(),
        remote: remote.on_wire.to_string(),
        encap: encap.map(encap_text),
        esn: outline.map(|outline| outline.esn),
        replay_window: outline.filter(|_| inbound).map(|outline| outline.replay_window),
        worker: report.map(|report| report.worker),
        packets: counters.packets,
        bytes: counters.bytes,
        sequence: counters.sequence,
        drops: drop_map(&counters.drops),
        idle_seconds: counters.idle_seconds,
        key_check: report.map(|report| format!("{:016x}", u64::from_be_bytes(report.key_check))),
    }
}

/// The answer to `policy`: in the order in which they are looked at.
pub fn policies(view: &View) -> Vec<PolicyRow> {
    let mut all: BTreeMap<_, (Option<&str>, &Policy)> = view
        .desired
        .policies
        .iter()
        .map(|(id, (name, policy))| (*id, (Some(name.as_str()), policy)))
        .collect();
    for (id, policy) in &view.installed.policies {
        if let Entry::Vacant(entry) = all.entry(*id) {
            entry.insert((None, policy));
        }
    }
    let mut rows: Vec<_> = all.into_iter().collect();
    rows.sort_by_key(|(id, (_, policy))| (policy.priority, *id));
    rows.into_iter()
        .map(|(id, (name, policy))| PolicyRow {
            name: name.unwrap_or("-").to_owned(),
            state: state(view, name.is_some(), view.installed.policies.contains_key(&id)),
            priority: policy.priority,
            action: match policy.action {
                Action::Protect(_) => "protect",
                Action::Bypass => "bypass",
                Action::Discard => "discard",
            }
            .to_owned(),
            selectors: policy.selectors.iter().map(selector_text).collect(),
        })
        .collect()
}

/// The answer to `relay`.
pub fn relays(view: &View) -> Vec<RelayRow> {
    let mut all: BTreeMap<_, (Option<&str>, RelayEntry)> =
        view.desired.relays.iter().map(|(id, (name, entry))| (*id, (Some(name.as_str()), *entry))).collect();
    for (id, report) in &view.installed.relays {
        // What is installed is what is in force: after a registration (RLY-10) the client is elsewhere.
        all.entry(*id).or_insert((None, report.entry)).1 = report.entry;
    }
    let row = |(id, (name, entry)): (_, (Option<&str>, RelayEntry))| {
        let counters =
            view.installed.relays.get(&id).map(|report| report.counters.clone()).unwrap_or_default();
        RelayRow {
            name: name.unwrap_or("-").to_owned(),
            state: state(view, name.is_some(), view.installed.relays.contains_key(&id)),
            client: side(&entry.client),
            gateway: side(&entry.gateway),
            to_gateway_packets: counters.to_gateway_packets,
            to_gateway_bytes: counters.to_gateway_bytes,
            to_client_packets: counters.to_client_packets,
            to_client_bytes: counters.to_client_bytes,
            wrong_peer: counters.wrong_peer,
        }
    };
    let mut rows: Vec<_> = all.into_iter().map(row).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

/// The answer to `drops` (DP-6).
pub fn drops(view: &View) -> DropsReport {
    let status = view.status.clone().unwrap_or_default();
    let mut reasons: Vec<_> = DropReason::ALL
        .iter()
        .map(|reason| DropRow {
            reason: reason.label().to_owned(),
            help: reason.help().trim().to_owned(),
            packets: status.drops(*reason),
        })
        .filter(|row| row.packets > 0)
        .collect();
    reasons.sort_by(|a, b| b.packets.cmp(&a.packets).then_with(|| a.reason.cmp(&b.reason)));
    let ports = status.workers.iter().enumerate().flat_map(|(worker, status)| {
        status.ports.iter().filter(|port| !port.counters.drops.is_empty()).map(move |port| PortDrops {
            worker,
            interface: port.interface.clone(),
            queue: port.queue,
            drops: drop_map(&port.counters.drops),
        })
    });
    let sas = sas(view, None).into_iter().filter(|row| !row.drops.is_empty()).map(|row| SaDrops {
        tunnel: row.tunnel,
        direction: row.direction,
        protocol: row.protocol,
        spi: row.spi,
        drops: row.drops,
    });
    DropsReport { reasons, ports: ports.collect(), sas: sas.collect(), steer: status.steer.clone() }
}

fn state(view: &View, configured: bool, installed: bool) -> State {
    match (view.connected.is_some(), configured, installed) {
        (false, ..) => State::Down,
        (true, false, _) => State::Foreign,
        (true, true, true) => State::Installed,
        (true, true, false) => State::Missing,
    }
}

fn side(partition: &Partition) -> Side {
    let pairs = [("esp", partition.esp), ("ah", partition.ah)];
    let text = |(name, pair): (&str, Option<postern_contract::relay::SpiPair>)| {
        pair.map(|pair| format!("{name} {} > {}", pair.to_relay, pair.from_relay))
    };
    Side {
        relay: partition.relay.to_string(),
        peer: partition.peer.to_string(),
        spis: pairs.into_iter().filter_map(text).collect(),
        encap: partition.encap.map(encap_text),
    }
}

fn drop_map(drops: &[(DropReason, u64)]) -> BTreeMap<String, u64> {
    drops.iter().map(|(reason, count)| (reason.label().to_owned(), *count)).collect()
}

fn encap_text(encap: UdpEncap) -> String {
    format!("{}:{}", encap.local_port, encap.remote_port)
}

const fn direction_word(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "in",
        Direction::Outbound => "out",
    }
}

const fn protocol_word(protocol: IpsecProtocol) -> &'static str {
    match protocol {
        IpsecProtocol::Esp => "esp",
        IpsecProtocol::Ah => "ah",
    }
}

const fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Tunnel => "tunnel",
        Mode::Transport => "transport",
    }
}

/// `10.1.0.0/24 > 10.2.0.0/24 tcp 1000-2000 > 443`.
fn selector_text(selector: &Selector) -> String {
    let Selector { local, remote, protocol, local_ports, remote_ports } = selector;
    let mut text = format!("{} > {}", range_text(*local), range_text(*remote));
    if let Some(protocol) = protocol {
        let name = match *protocol {
            Protocol::TCP => "tcp".to_owned(),
            Protocol::UDP => "udp".to_owned(),
            Protocol::ICMP => "icmp".to_owned(),
            Protocol::ICMPV6 => "icmpv6".to_owned(),
            Protocol(number) => format!("proto {number}"),
        };
        text = format!("{text} {name}");
    }
    let any = 0..=u16::MAX;
    if *local_ports != any || *remote_ports != any {
        let ports = |ports: &core::ops::RangeInclusive<u16>| match (ports.start(), ports.end()) {
            (0, &u16::MAX) => "any".to_owned(),
            (start, end) if start == end => start.to_string(),
            (start, end) => format!("{start}-{end}"),
        };
        text = format!("{text} {} > {}", ports(local_ports), ports(remote_ports));
    }
    text
}

/// As a network where it is one.
fn range_text(range: AddressRange) -> String {
    let AddressRange { start, end } = range;
    if start == end {
        return start.to_string();
    }
    let full = if start.is_ipv4() { 32 } else { 128 };
    let net = (0..=full)
        .filter_map(|prefix| ipnet::IpNet::new(start, prefix).ok())
        .find(|net| AddressRange::from(*net) == range);
    net.map_or_else(|| format!("{start}-{end}"), |net| net.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_in_words() {
        let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap().into();
        let mut selector = Selector {
            local: net("10.1.0.0/24"),
            remote: net("0.0.0.0/0"),
            protocol: Some(Protocol::TCP),
            local_ports: 0..=65535,
            remote_ports: 443..=443,
        };
        assert_eq!(selector_text(&selector), "10.1.0.0/24 > 0.0.0.0/0 tcp any > 443");
        selector.local.end = "10.1.0.9".parse().unwrap();
        selector.protocol = None;
        selector.remote_ports = 0..=65535;
        assert_eq!(selector_text(&selector), "10.1.0.0-10.1.0.9 > 0.0.0.0/0");
    }
}
