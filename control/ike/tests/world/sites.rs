//! Connections for the simulated world: two sites, and a road warrior with its gateway.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use postern_ike::Secret;
use postern_ike::config::{
    Child, Connection, LocalAuth, Mode, PoolConfig, RemoteAuth, Retransmit, Selector, Settings, Start,
    Strategy, Unique,
};
use postern_ike::message::TrafficSelector;
use postern_ike::negotiate::keyword;

use crate::sim::World;

pub const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
pub const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));
pub const CONNECTION: &str = "site";

/// Settings for a network that may be bad.
pub fn settings() -> Settings {
    Settings {
        retransmit: Retransmit { first: Duration::from_secs(2), ..Retransmit::default() },
        ..Settings::default()
    }
}

pub fn network(text: &str) -> TrafficSelector {
    let net: ipnet::IpNet = text.parse().unwrap();
    TrafficSelector { start: net.network(), end: net.broadcast(), protocol: 0, ports: 0..=u16::MAX }
}

pub fn psk(secret: &str) -> Secret {
    Secret::new(secret.as_bytes())
}

/// A connection of `local` with `remote` by a shared secret, with one child between two networks.
pub fn connection(local: &str, remote: &str, address: Option<IpAddr>) -> Connection {
    Connection {
        name: CONNECTION.into(),
        local: Vec::new(),
        remote_nets: Vec::new(),
        remote: address,
        remote_port: 500,
        proposals: vec![keyword::ike("aes128gcm16-prfsha256-x25519").unwrap()],
        local_id: local.parse().unwrap(),
        remote_id: remote.parse().unwrap(),
        local_auth: LocalAuth::Psk(psk("a secret")),
        remote_auth: RemoteAuth::Psk(psk("a secret")),
        children: vec![child("net")],
        pools: Vec::new(),
        dns: Vec::new(),
        request_address: (false, false),
        mobike: false,
        fragmentation: true,
        childless: false,
        force_encap: false,
        rekey: None,
        rekey_jitter: Duration::ZERO,
        over_time: Duration::from_mins(10),
        dpd: Some(Duration::from_secs(30)),
        unique: Unique::Replace,
        reset: Strategy::Delete,
        v1: None,
        fingerprint: [0; 32],
    }
}

pub fn child(name: &str) -> Child {
    Child {
        name: name.into(),
        proposals: vec![keyword::esp("aes128gcm16").unwrap()],
        local_ts: Vec::new(),
        remote_ts: Vec::new(),
        mode: Mode::Tunnel,
        start: Start::None,
        on_close: Start::None,
        on_dpd: Start::None,
        rekey: None,
        rekey_jitter: Duration::ZERO,
        life: None,
    }
}

/// Connections of both sites.
pub fn sites() -> (Connection, Connection) {
    let mut a = connection("a.example.org", "b.example.org", Some(B));
    let mut b = connection("b.example.org", "a.example.org", Some(A));
    let nets = [Selector::Fixed(network("10.1.0.0/24")), Selector::Fixed(network("10.2.0.0/24"))];
    for (connection, [local, remote]) in
        [(&mut a, nets.clone()), (&mut b, [nets[1].clone(), nets[0].clone()])]
    {
        connection.children[0].local_ts = vec![local];
        connection.children[0].remote_ts = vec![remote];
    }
    (a, b)
}

/// Two sites, numbers 0 and 1, configured but not connected.
pub fn world(seed: u64, change: impl FnOnce(&mut Connection, &mut Connection)) -> World {
    world_with(seed, &settings(), change)
}

pub fn world_with(
    seed: u64,
    settings: &Settings,
    change: impl FnOnce(&mut Connection, &mut Connection),
) -> World {
    let mut world = World::new(seed);
    world.node("a", &[A], settings.clone());
    world.node("b", &[B], settings.clone());
    let (mut a, mut b) = sites();
    change(&mut a, &mut b);
    world.configure(0, vec![Arc::new(a)], &[]);
    world.configure(1, vec![Arc::new(b)], &[]);
    world
}

/// The same, connected.
pub fn connected(seed: u64, change: impl FnOnce(&mut Connection, &mut Connection)) -> World {
    let mut world = world(seed, change);
    world.initiate(0, CONNECTION);
    assert!(world.run_until(Duration::from_secs(20), is_up), "{:?}", world.failures(0));
    world.run(Duration::from_millis(100));
    world
}

/// Both have an IKE SA and a child, and nothing is going on.
pub fn is_up(world: &World) -> bool {
    let up = |node: usize| {
        world.established(node).len() == 1
            && !world.nodes[node].children.is_empty()
            && world.nodes[node].children.values().all(|child| child.in_use)
    };
    up(0) && up(1)
}

/// A client with EAP or a shared secret, and its gateway, which gives it an address.
pub fn road_warrior(
    client_auth: (LocalAuth, RemoteAuth),
    users: RemoteAuth,
) -> (Connection, Connection, PoolConfig) {
    let (local_auth, remote_auth) = client_auth;
    let dynamic = || Selector::Dynamic { protocol: 0, ports: 0..=u16::MAX };
    let mut client = connection("joe@example.org", "gateway.example.org", Some(B));
    client.local_auth = local_auth;
    client.remote_auth = remote_auth;
    client.request_address = (true, false);
    client.mobike = true;
    client.children[0].local_ts = vec![dynamic()];
    client.children[0].remote_ts = vec![Selector::Fixed(network("10.2.0.0/24"))];
    let mut gateway = connection("gateway.example.org", "%any", None);
    gateway.remote_auth = users;
    gateway.mobike = true;
    gateway.pools = vec!["rw".into()];
    gateway.dns = vec!["10.2.0.53".parse().unwrap()];
    gateway.children[0].local_ts = vec![Selector::Fixed(network("10.2.0.0/24"))];
    gateway.children[0].remote_ts = vec![dynamic()];
    let (first, last) = ("10.3.0.10".parse().unwrap(), "10.3.0.99".parse().unwrap());
    (client, gateway, PoolConfig { name: "rw".into(), first, last })
}

pub fn users(list: &[(&str, &str)]) -> RemoteAuth {
    let users: HashMap<String, Secret> =
        list.iter().map(|(name, password)| ((*name).to_owned(), psk(password))).collect();
    RemoteAuth::EapMschapv2(Arc::new(users))
}
