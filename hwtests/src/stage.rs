//! Where negotiated connections are tried: two parties on one segment, or a client that roams and a gateway, each with
//! a host or itself behind, and the traffic that shows what came of it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::config::Config;
use crate::config::ike::{Ike, Link};
use crate::netns::Netns;
use crate::party::{Make, Party, SETTLE, Settled, agree};
use crate::peer::{Options, Version};
use crate::process::wait_for;
use crate::topology::{Family, Kind, Topology, gateway_config, host_config, inside, inside_net};
use crate::traffic::{IperfServer, Ping, Stream};

/// Postern as a gateway of a pair, with retransmissions as fast as the peer's.
pub fn postern() -> Make {
    let config = Config { ike: Some(Ike::fast()), ..gateway_config(vec![]) };
    Make::Postern(Box::new(config))
}

/// A Postern that is a host: its own traffic, a TUN device and sockets.
pub fn host() -> Make {
    let config = Config { ike: Some(Ike::fast()), ..host_config(vec![]) };
    Make::Postern(Box::new(config))
}

/// strongSwan, nothing special.
pub fn swan(version: Version) -> Make {
    Make::Swan(Options::new(version))
}

/// Two parties and what is between and behind them.
#[derive(Debug)]
pub struct Stage {
    // Parties end before their namespaces go.
    /// The party in g1, or the client.
    pub left: Party,
    /// The party in g2.
    pub right: Party,
    server: IperfServer,
    topology: Topology,
}

impl Stage {
    /// Two gateways on one segment.
    pub fn pair(left: &Make, right: &Make) -> Result<Self> {
        Self::build(Kind::Pair, ("g1", left), ("g2", right))
    }

    /// A client and a gateway.
    pub fn roam(client: &Make, gateway: &Make) -> Result<Self> {
        Self::build(Kind::Roam, ("client", client), ("g2", gateway))
    }

    fn build(kind: Kind, left: (&str, &Make), right: (&str, &Make)) -> Result<Self> {
        let topology = Topology::build(kind)?;
        let server = IperfServer::start(topology.ns("h2")?, inside(Family::V4, 2, 10), topology.dir())?;
        let start = |(role, make): (&str, &Make), name: &str| {
            Party::start(make, topology.ns(role)?, name, topology.dir())
        };
        Ok(Self { left: start(left, "left")?, right: start(right, "right")?, server, topology })
    }

    /// Namespaces and files.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// A connection between the networks behind both, by shared secret.
    pub fn link(&self, name: &str) -> Link {
        let nets = (inside_net(Family::V4, 1), inside_net(Family::V4, 2));
        Link::new(name, self.topology.outer(Family::V4), nets)
    }

    /// Gives both ends this connection and no other.
    pub fn load(&self, link: &Link) -> Result<()> {
        self.left.load(vec![link.left()], vec![])?;
        self.right.load(vec![link.right()], vec![])
    }

    /// The party that begins.
    pub fn initiator(&self, left: bool) -> &Party {
        if left { &self.left } else { &self.right }
    }

    /// Negotiates and waits until both ends agree; gives the left end's view.
    pub fn establish(&self, name: &str, from_left: bool) -> Result<Settled> {
        self.initiator(from_left).initiate(name)?;
        let settled = self.agreed(name)?;
        ensure!(settled.initiator == from_left, "the other side began it: {settled:?}");
        Ok(settled)
    }

    /// Waits until both ends have one IKE SA with one child, the same ones.
    pub fn agreed(&self, name: &str) -> Result<Settled> {
        self.agreed_where(name, "both ends agree", |_| true)
    }

    /// Waits until both ends agree and `condition` is true of the left end's view.
    pub fn agreed_where(
        &self,
        name: &str,
        what: &str,
        mut condition: impl FnMut(&Settled) -> bool,
    ) -> Result<Settled> {
        wait_for(what, SETTLE, || {
            let (Some(left), Some(right)) = (self.left.state(name)?, self.right.state(name)?) else {
                return Ok(None);
            };
            agree(&left, &right)?;
            Ok(condition(&left).then_some(left))
        })
    }

    /// Closes the connection and waits until neither end has it.
    pub fn close(&self, name: &str, from_left: bool) -> Result<()> {
        self.initiator(from_left).terminate(name)?;
        self.left.quiet()?;
        self.right.quiet()
    }

    /// Addresses of what is behind both ends; the client itself is behind itself.
    pub fn hosts(&self) -> Result<(&Netns, IpAddr, &Netns, IpAddr)> {
        let near = if self.topology.kind() == Kind::Roam { "client" } else { "h1" };
        let hosts = (self.topology.ns(near)?, self.topology.ns("h2")?);
        Ok((hosts.0, inside(Family::V4, 1, 10), hosts.1, inside(Family::V4, 2, 10)))
    }

    /// Pings both ways and sends a megabyte by TCP.
    pub fn carry(&self) -> Result<()> {
        let (h1, near, h2, far) = self.hosts()?;
        Ping::default().all(h1, far)?;
        Ping::default().all(h2, near)?;
        self.tcp()
    }

    /// A megabyte by TCP from the left to the right.
    pub fn tcp(&self) -> Result<()> {
        let (h1, ..) = self.hosts()?;
        self.server.tcp_bytes(h1, 1_000_000).map(drop)
    }

    /// Runs `body` under two counted streams, one each way, and demands that every datagram arrives.
    pub fn without_loss<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let (h1, near, h2, far) = self.hosts()?;
        let forth = Stream::start(h1, h2, far, RATE, 200)?;
        let back = Stream::start(h2, h1, near, RATE, 200)?;
        std::thread::sleep(MARGIN);
        let outcome = body();
        std::thread::sleep(MARGIN);
        let (forth, back) = (forth.finish()?, back.finish()?);
        let outcome = outcome?;
        ensure!(forth.lost() == 0 && back.lost() == 0, "datagrams were lost: forth {forth:?}, back {back:?}");
        ensure!(forth.duplicates == 0 && back.duplicates == 0, "doubled: forth {forth:?}, back {back:?}");
        Ok(outcome)
    }

    /// Runs `body`; what both ends know and logged goes with its error.
    pub fn check<T>(&self, body: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        body(self).with_context(|| self.report())
    }

    /// What both ends know and logged.
    pub fn report(&self) -> String {
        format!("LEFT\n{}\nRIGHT\n{}", self.left.report(), self.right.report())
    }
}

/// Datagrams a second in each direction: more than the kernel's timers need to be hit in every gap of a rekey.
const RATE: u32 = 500;
const MARGIN: Duration = Duration::from_millis(200);
