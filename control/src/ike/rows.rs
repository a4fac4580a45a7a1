//! The state of IKE in the rows of [`api`](super::api).

use std::net::IpAddr;
use std::time::Duration;

use postern_ike::config::{Child, Connection, Mode, Selector, Start};
use postern_ike::message::TrafficSelector;
use postern_ike::output::{ChildView, IkeSaView};

use super::api::{ChildRow, ChildSaRow, ConnectionRow, ConnectionState, IkeSaRow};

/// A configured connection with its IKE SAs. `failing`: the last attempt failed, and it should be up.
pub fn connection(connection: &Connection, sas: Vec<IkeSaView>, failing: bool) -> ConnectionRow {
    let established = |sa: &IkeSaView| matches!(sa.state, "established" | "rekeying");
    let installed = |child: &ChildView| child.state != "installing";
    let any = |start| connection.children.iter().any(|child| child.start == start);
    let state = if sas.iter().any(|sa| established(sa) && sa.children.iter().any(installed)) {
        ConnectionState::Up
    } else if sas.iter().any(established) {
        if connection.children.is_empty() { ConnectionState::Up } else { ConnectionState::NoChild }
    } else if sas.iter().any(|sa| sa.state == "connecting") {
        ConnectionState::Connecting
    } else if failing {
        ConnectionState::Failed
    } else if any(Start::Trap) {
        ConnectionState::Trapped
    } else {
        ConnectionState::Idle
    };
    let remote = match connection.remote {
        Some(remote) => vec![remote.to_string()],
        None => connection.remote_nets.iter().map(ToString::to_string).collect(),
    };
    let auth = format!("{} / {}", connection.local_auth.method(), connection.remote_auth.method());
    ConnectionRow {
        name: connection.name.to_string(),
        state,
        local: addresses(&connection.local),
        remote,
        local_id: connection.local_id.to_string(),
        remote_id: connection.remote_id.to_string(),
        auth,
        children: connection.children.iter().map(child).collect(),
        sas: sas.into_iter().map(ike_sa).collect(),
    }
}

/// IKE SAs whose connection is not known (yet).
pub fn unknown(sas: Vec<IkeSaView>) -> ConnectionRow {
    ConnectionRow {
        name: String::new(),
        state: ConnectionState::Connecting,
        local: Vec::new(),
        remote: Vec::new(),
        local_id: String::new(),
        remote_id: String::new(),
        auth: String::new(),
        children: Vec::new(),
        sas: sas.into_iter().map(ike_sa).collect(),
    }
}

fn child(child: &Child) -> ChildRow {
    let mode = match child.mode {
        Mode::Tunnel => "tunnel",
        Mode::Transport => "transport",
    };
    let start = match child.start {
        Start::None => "none",
        Start::Start => "start",
        Start::Trap => "trap",
    };
    ChildRow {
        name: child.name.to_string(),
        mode: mode.to_owned(),
        start: start.to_owned(),
        local: child.local_ts.iter().map(configured).collect(),
        remote: child.remote_ts.iter().map(configured).collect(),
    }
}

fn configured(selector: &Selector) -> String {
    match selector {
        Selector::Fixed(selector) => selector.to_string(),
        Selector::Dynamic { .. } => "dynamic".to_owned(),
    }
}

fn ike_sa(view: IkeSaView) -> IkeSaRow {
    let (spi_i, spi_r) = view.spis;
    IkeSaRow {
        id: view.id.0,
        state: view.state.to_owned(),
        initiator: view.initiator,
        local: view.path.local.to_string(),
        remote: view.path.remote.to_string(),
        natt: view.path.natt,
        local_id: view.local_id,
        remote_id: view.remote_id,
        suite: view.suite,
        spis: (spi_i.to_string(), spi_r.to_string()),
        age_seconds: view.age.as_secs(),
        rekey_seconds: view.rekey_in.as_ref().map(Duration::as_secs),
        addresses: addresses(&view.addresses),
        children: view.children.into_iter().map(child_sa).collect(),
    }
}

fn child_sa(view: ChildView) -> ChildSaRow {
    let (spi_in, spi_out) = view.spis;
    ChildSaRow {
        id: view.id.0,
        name: view.name.to_string(),
        state: view.state.to_owned(),
        spi_in: format!("0x{spi_in:08x}"),
        spi_out: format!("0x{spi_out:08x}"),
        suite: view.suite,
        local: selectors(&view.local_ts),
        remote: selectors(&view.remote_ts),
        encap: view.encap,
        age_seconds: view.age.as_secs(),
    }
}

fn selectors(selectors: &[TrafficSelector]) -> Vec<String> {
    selectors.iter().map(ToString::to_string).collect()
}

fn addresses(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}
