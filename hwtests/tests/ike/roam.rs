//! Road warriors: a password, a virtual address, a NAT in between, and moves from network to network.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use postern_hwtests::config::Config;
use postern_hwtests::config::ike::{Connection, Credential, Ike, Link, Pool};
use postern_hwtests::party::{Make, Party};
use postern_hwtests::peer::{Options, Version};
use postern_hwtests::pki::{Authority, Key};
use postern_hwtests::process::wait_for;
use postern_hwtests::stage::{Stage, postern, swan};
use postern_hwtests::topology::{host_config, roaming};
use postern_hwtests::traffic::{Ping, Stream};

/// Where clients' addresses come from.
const POOL: &str = "10.99.0.10-10.99.0.250";
const NAME: &str = "home";

/// The client's and the gateway's view: the gateway has a certificate, the client the given credential.
fn views(stage: &Stage, client: Credential) -> Result<(Connection, Connection)> {
    let dir = stage.topology().dir().join("pki");
    let root = Authority::root(&dir, "home root", Key::P256)?;
    let gateway = root.issue("right.example", Key::P256)?;
    let link = Link {
        nets: ("dynamic".to_owned(), "10.2.0.0/24".to_owned()),
        auth: (client, gateway),
        ..stage.link(NAME)
    };
    let (mut client, mut gateway) = (link.left(), link.right());
    client.local.clear();
    client.request_address = vec!["v4"];
    client.mobike = Some(true);
    gateway.remote = None;
    gateway.mobike = Some(true);
    gateway.pools = vec!["pool".to_owned()];
    gateway.dns = vec![[10, 2, 0, 53].into()];
    Ok((client, gateway))
}

fn pools() -> Vec<Pool> {
    vec![Pool { name: "pool".to_owned(), range: POOL.to_owned() }]
}

/// The client's virtual address once both ends agree.
fn assigned(stage: &Stage) -> Result<IpAddr> {
    let settled = stage.agreed(NAME)?;
    let [address] = settled.addresses.as_slice() else { anyhow::bail!("{settled:?}") };
    Ok(address.parse()?)
}

/// What the client sends goes through the tunnel, and what the gateway's host sends to the client's address.
fn carry(stage: &Stage, address: IpAddr) -> Result<()> {
    let (client, _, host, far) = stage.hosts()?;
    Ping::default().all(client, far)?;
    Ping::default().all(host, address)?;
    stage.tcp()
}

/// A client behind the NAT connects twice and gets the same address again.
pub fn road_warrior(client: &Make, gateway: &Make) -> Result<()> {
    let stage = Stage::roam(client, gateway)?;
    let (mut left, right) = views(&stage, Credential::eap())?;
    stage.right.load(vec![right], pools())?;
    stage.left.load(vec![left.clone()], vec![])?;
    stage.check(|stage| {
        let seen = stage.establish(NAME, true)?;
        ensure!(seen.encap, "no UDP encapsulation behind a NAT: {seen:?}");
        let address = assigned(stage)?;
        ensure!(address.to_string().starts_with("10.99.0."), "assigned {address}");
        carry(stage, address)?;
        let name_servers = |expected: &str| match &stage.left {
            Party::Postern { node, .. } => {
                let found = std::fs::read_to_string(node.dir().join("state/resolv.conf")).unwrap_or_default();
                ensure!(found == expected, "name servers: {found:?}, not {expected:?}");
                Ok(())
            }
            Party::Swan(_) => Ok(()),
        };
        name_servers("nameserver 10.2.0.53\n")?;
        stage.close(NAME, true)?;
        name_servers("")?;
        stage.establish(NAME, true)?;
        ensure!(assigned(stage)? == address, "another address the second time");
        carry(stage, address)?;
        stage.close(NAME, true)?;
        // A wrong password: the client gives up. strongSwan as the gateway waits half a minute for more.
        left.local_auth.password = Some("guessed".to_owned());
        stage.left.load(vec![left], vec![])?;
        stage.left.initiate(NAME)?;
        std::thread::sleep(Duration::from_millis(500));
        stage.left.quiet()?;
        ensure!(stage.right.state(NAME)?.is_none(), "a wrong password was good enough");
        Ok(())
    })
}

/// From network to network, under traffic: the same IKE SA, the same address, and only what was under way is lost.
pub fn moves(client: &Make, gateway: &Make) -> Result<()> {
    let stage = Stage::roam(client, gateway)?;
    let (left, right) = views(&stage, Credential::psk("left.example"))?;
    stage.right.load(vec![right], pools())?;
    stage.left.load(vec![left], vec![])?;
    stage.check(|stage| {
        let first = stage.establish(NAME, true)?;
        let address = assigned(stage)?;
        carry(stage, address)?;
        let (client, _, host, far) = stage.hosts()?;
        let stream = Stream::start(client, host, far, 200, 200)?;
        // Out of the NAT, on to the third network, and back behind the NAT.
        for (from, to) in [(0, 1), (1, 2)] {
            client.sh(&format!("ip addr del {}/24 dev up{from}", roaming(from)))?;
            arrives(stage, to)?;
            carry(stage, address)?;
        }
        client.sh(&format!("ip addr add {}/24 dev up0", roaming(0)))?;
        client.sh("ip route add default via 172.16.0.254 dev up0 metric 100")?;
        client.sh(&format!("ip addr del {}/24 dev up2", roaming(2)))?;
        arrives(stage, 0)?;
        carry(stage, address)?;
        let tally = stream.finish()?;
        println!("moved three times: {tally:?}");
        let last = stage.agreed(NAME)?;
        ensure!(last.ike == first.ike, "the client connected anew instead of moving");
        ensure!(assigned(stage)? == address, "another address");
        ensure!(tally.longest_gap < Duration::from_secs(4), "a long silence: {tally:?}");
        stage.close(NAME, true)
    })
}

/// Waits until the gateway has the client in its network `number`.
fn arrives(stage: &Stage, number: u8) -> Result<()> {
    let outside = if number == 0 { IpAddr::from([192, 0, 2, 254]) } else { roaming(number) };
    let there = || Ok(stage.right.state(NAME)?.filter(|state| state.remote == outside.to_string()).map(drop));
    wait_for(&format!("the client in network {number}"), Duration::from_secs(10), there)
}

/// strongSwan as a client: it sets the address that it is assigned.
pub fn swan_client(version: Version) -> Make {
    Make::Swan(Options { virtual_address: true, ..Options::new(version) })
}

/// Postern as a client on a laptop: its own traffic, a TUN device and sockets.
fn postern_client() -> Make {
    let config = Config { ike: Some(Ike::fast()), ..host_config(vec![]) };
    Make::Postern(Box::new(config))
}

/// IKE-3, IKE-7: EAP-MSCHAPv2 with a virtual address behind a NAT, Postern as the gateway.
#[test]
fn ike_3_road_warriors_come() -> Result<()> {
    for version in Version::ALL {
        road_warrior(&swan_client(version), &postern()).context(version.name())?;
    }
    Ok(())
}

/// The same with Postern as the client.
#[test]
fn ike_3_as_road_warrior() -> Result<()> {
    for version in Version::ALL {
        road_warrior(&postern_client(), &swan(version)).context(version.name())?;
    }
    Ok(())
}

/// MOB-1: strongSwan moves, Postern is the gateway (RFC 4555).
#[test]
fn mob_1_clients_move() -> Result<()> {
    for version in Version::ALL {
        moves(&swan_client(version), &postern()).context(version.name())?;
    }
    Ok(())
}

/// MOB-1: Postern moves, strongSwan is the gateway.
#[test]
fn mob_1_moves() -> Result<()> {
    for version in Version::ALL {
        moves(&postern_client(), &swan(version)).context(version.name())?;
    }
    Ok(())
}
