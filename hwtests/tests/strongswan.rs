//! DP-3 against a real peer, and groundwork of IKE-5: Postern's datapath takes over one side of a strongSwan
//! CHILD_SA, with its keys and with sequence numbers far ahead of those used.

use anyhow::{Context, Result};
use postern_hwtests::config::ike::Link;
use postern_hwtests::config::{AES128GCM, ESP_SUITES, Pair, Suite};
use postern_hwtests::peer::{ChildKeys, Options, Peer, Version};
use postern_hwtests::topology::{Family, Kind, Topology, gateway_config, inside, inside_net};
use postern_hwtests::traffic::{IperfServer, Ping};

/// Two strongSwans carry traffic; then Postern takes the place of the initiator or of the responder.
fn take_over(suite: Suite, initiator: bool) -> Result<()> {
    let mut topology = Topology::build(Kind::Pair)?;
    let nets = (inside_net(Family::V4, 1), inside_net(Family::V4, 2));
    let mut link = Link::new("net", topology.outer(Family::V4), nets);
    suite.name.clone_into(&mut link.esp);
    let options = Options { log: "chd = 4".to_owned(), ..Options::new(Version::V5) };
    let a = Peer::start(topology.ns("g1")?, "swan-a", topology.dir(), &options)?;
    let b = Peer::start(topology.ns("g2")?, "swan-b", topology.dir(), &options)?;
    a.load(&[link.left()], &[])?;
    b.load(&[link.right()], &[])?;
    a.initiate("net", "net").with_context(|| b.log())?;
    let (near, far) = (inside(Family::V4, 1, 10), inside(Family::V4, 2, 10));
    Ping::default().all(topology.ns("h1")?, far).context("between two strongSwans")?;
    let keys = a.child_keys("net")?;
    let (role, survivor) = if initiator {
        a.kill()?;
        ("g1", b)
    } else {
        b.kill()?;
        ("g2", a)
    };
    // From now on nothing in this namespace forwards but the datapath.
    topology.ns(role)?.sh("sysctl -qw net.ipv4.ip_forward=0")?;
    let pair = pair(&topology, suite, keys)?;
    let mut tunnel = if initiator { pair.left() } else { pair.right() };
    tunnel.out.begin_at(1_000_000);
    topology.start_node(role, gateway_config(vec![tunnel]))?;
    let outcome = topology.check(|topology| {
        Ping { count: 20, ..Ping::default() }.all(topology.ns("h1")?, far).context("from h1")?;
        Ping { count: 20, ..Ping::default() }.all(topology.ns("h2")?, near).context("from h2")?;
        let server = IperfServer::start(topology.ns("h2")?, far, topology.dir())?;
        server.tcp_bytes(topology.ns("h1")?, 1_000_000)?;
        Ok(())
    });
    outcome.with_context(|| survivor.log())
}

/// The CHILD_SA as a pair of tunnels: left is the initiator.
fn pair(topology: &Topology, suite: Suite, keys: ChildKeys) -> Result<Pair> {
    let mut pair = topology.tunnel(0, Some(suite), None, Family::V4, Family::V4)?;
    pair.natt = true;
    pair.esn = Some(false);
    pair.spis = (keys.to_responder_spi, keys.to_initiator_spi);
    pair.keys = [[keys.initiator.0, keys.initiator.1, vec![]], [keys.responder.0, keys.responder.1, vec![]]];
    Ok(pair)
}

/// DP-3: the responder's place, AES-128-GCM.
#[test]
fn dp_3_takes_over_the_responder() -> Result<()> {
    take_over(AES128GCM, false)
}

/// DP-3: the initiator's place, AES-128-GCM.
#[test]
fn dp_3_takes_over_the_initiator() -> Result<()> {
    take_over(AES128GCM, true)
}

/// DP-3: other suites that strongSwan's userspace ESP has.
#[test]
fn dp_3_takes_over_other_suites() -> Result<()> {
    for name in ["aes256gcm16", "chacha20poly1305", "aes128-sha256", "aes256-sha512", "null-sha256"] {
        let suite = ESP_SUITES.into_iter().find(|suite| suite.name == name).context("no such suite")?;
        take_over(suite, false).context(name)?;
    }
    Ok(())
}
