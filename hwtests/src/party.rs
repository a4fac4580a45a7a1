//! One end of a negotiated connection, Postern or strongSwan, under the same few verbs.
//!
//! A scenario is written once for two parties. Between two strongSwans it shows that the scenario itself is right.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::config::Config;
use crate::config::ike::{Connection, Pool};
use crate::netns::Netns;
use crate::node::Node;
use crate::peer::{Options, Peer, Sa};
use crate::process::wait_for;

/// What a party is to be.
#[derive(Clone, Debug)]
pub enum Make {
    /// Postern with this configuration, to which connections are added.
    Postern(Box<Config>),
    /// strongSwan.
    Swan(Options),
}

/// A running party.
#[derive(Debug)]
pub enum Party {
    /// Postern.
    Postern {
        /// The node.
        node: Node,
        /// Its configuration without connections.
        base: Box<Config>,
    },
    /// strongSwan.
    Swan(Peer),
}

/// What a party knows of one connection that is up: one IKE SA with one child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// SPIs of the IKE SA, the initiator's first, 16 digits each.
    pub ike: (String, String),
    /// Whether this end began it.
    pub initiator: bool,
    /// SPI of packets to this end.
    pub spi_in: u32,
    /// SPI of packets to the other end.
    pub spi_out: u32,
    /// Where the other end is.
    pub remote: String,
    /// Whether ESP is in UDP.
    pub encap: bool,
    /// Addresses assigned to the client.
    pub addresses: Vec<String>,
}

/// How long an exchange may take to show at both ends: rekeys of strongSwan begin with a random delay of up to 1 s.
pub const SETTLE: Duration = Duration::from_secs(6);

impl Party {
    /// Starts it without connections.
    pub fn start(make: &Make, namespace: &Netns, name: &str, dir: &Path) -> Result<Self> {
        Ok(match make {
            Make::Postern(config) => {
                // A gateway whose kernel forwards would hide what the datapath does not.
                namespace.sh("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0")?;
                let node = Node::start(namespace, name, dir, Config::clone(config))?;
                Self::Postern { node, base: config.clone() }
            }
            Make::Swan(options) => Self::Swan(Peer::start(namespace, name, dir, options)?),
        })
    }

    /// From now on it has these connections and pools, and no others.
    pub fn load(&self, connections: Vec<Connection>, pools: Vec<Pool>) -> Result<()> {
        match self {
            Self::Postern { node, base } => node.reload(Config { pools, connections, ..Config::clone(base) }),
            Self::Swan(peer) => peer.load(&connections, &pools),
        }
    }

    /// Negotiates a connection and its child of the same name; does not wait for the end.
    pub fn initiate(&self, connection: &str) -> Result<()> {
        match self {
            Self::Postern { node, .. } => node.cli(&["up", connection, "--no-wait"]).map(drop),
            Self::Swan(peer) => peer.initiate_only(connection, connection),
        }
    }

    /// Closes a connection; does not wait for the end.
    pub fn terminate(&self, connection: &str) -> Result<()> {
        match self {
            Self::Postern { node, .. } => node.cli(&["down", connection, "--no-wait"]).map(drop),
            Self::Swan(peer) => {
                peer.swanctl(&["--terminate", "--ike", connection, "--timeout", "-1"]).map(drop)
            }
        }
    }

    /// Begins to rekey the child that has the connection's name.
    pub fn rekey_child(&self, connection: &str) -> Result<()> {
        match self {
            Self::Postern { node, .. } => {
                node.cli(&["rekey", connection, "--child", connection, "--no-wait"]).map(drop)
            }
            Self::Swan(peer) => peer.rekey_child(connection),
        }
    }

    /// Begins to rekey the IKE SA.
    pub fn rekey_ike(&self, connection: &str) -> Result<()> {
        match self {
            Self::Postern { node, .. } => node.cli(&["rekey", connection, "--no-wait"]).map(drop),
            Self::Swan(peer) => peer.rekey_ike(connection),
        }
    }

    /// What it knows of a connection that has exactly one established IKE SA with exactly one installed child; `None`
    /// while it has not.
    pub fn state(&self, connection: &str) -> Result<Option<Settled>> {
        match self {
            Self::Postern { node, .. } => postern_state(node, connection),
            Self::Swan(peer) => {
                let gone = ["REKEYED", "DELETING"];
                let relevant = |sa: &Sa| sa.name == connection && !gone.contains(&sa.state.as_str());
                let sas: Vec<_> = peer.sas()?.into_iter().filter(relevant).collect();
                Ok(if let [sa] = sas.as_slice() { swan_state(sa) } else { None })
            }
        }
    }

    /// Waits for [`Party::state`].
    pub fn settled(&self, connection: &str) -> Result<Settled> {
        let what = format!("one IKE SA of {connection} with one child at {}", self.name());
        wait_for(&what, SETTLE, || self.state(connection))
    }

    /// The number of IKE SAs that are not just waiting for their end after a rekey.
    pub fn sas(&self) -> Result<usize> {
        match self {
            Self::Postern { node, .. } => {
                let rows = node.json(&["connections"])?;
                let rows = rows.as_array().context("no rows")?;
                Ok(rows.iter().filter_map(|row| row.get("sas")?.as_array()).map(Vec::len).sum())
            }
            // It keeps what a rekey replaced until its Delete was answered, for a long time if that is lost.
            Self::Swan(peer) => Ok(peer.sas()?.iter().filter(|sa| sa.state != "REKEYED").count()),
        }
    }

    /// Waits until there is no IKE SA.
    pub fn quiet(&self) -> Result<()> {
        wait_for(&format!("no IKE SA at {}", self.name()), SETTLE, || Ok((self.sas()? == 0).then_some(())))
    }

    /// The node; an error if it is strongSwan.
    pub fn node(&self) -> Result<&Node> {
        match self {
            Self::Postern { node, .. } => Ok(node),
            Self::Swan(_) => anyhow::bail!("this party is strongSwan"),
        }
    }

    /// The same, to stop and start its parts.
    pub fn node_mut(&mut self) -> Result<&mut Node> {
        match self {
            Self::Postern { node, .. } => Ok(node),
            Self::Swan(_) => anyhow::bail!("this party is strongSwan"),
        }
    }

    /// The strongSwan; an error if it is Postern.
    pub fn swan(&self) -> Result<&Peer> {
        match self {
            Self::Swan(peer) => Ok(peer),
            Self::Postern { .. } => anyhow::bail!("this party is Postern"),
        }
    }

    /// SIGKILL to all of it, as by a loss of power: nobody is told anything.
    pub fn crash(&mut self) -> Result<()> {
        match self {
            Self::Postern { node, .. } => {
                // Control first: it would start another datapath.
                node.kill_control()?;
                let datapath = node.kill_datapath()?;
                wait_for("the end of the datapath", Duration::from_secs(5), || {
                    Ok((!crate::process::is_alive(datapath)).then_some(()))
                })
            }
            Self::Swan(peer) => peer.crash(),
        }
    }

    /// Its log as it stands in the file.
    pub fn log_text(&self) -> String {
        match self {
            Self::Postern { node, .. } => node.log(),
            Self::Swan(peer) => peer.log_text(),
        }
    }

    /// Everything that helps to find out why something failed.
    pub fn report(&self) -> String {
        match self {
            Self::Postern { node, .. } => {
                let mut text = String::new();
                for table in ["connections", "sa", "drops"] {
                    let shown = node.cli(&[table]).unwrap_or_else(|error| format!("{error:#}\n"));
                    text.extend([node.name(), " ", table, ":\n", &shown]);
                }
                text + &node.log()
            }
            Self::Swan(peer) => format!("{}\n{}", peer.show(), peer.log()),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Postern { node, .. } => node.name(),
            Self::Swan(peer) => peer.name(),
        }
    }
}

/// Demands that both ends mean the same IKE SA and the same CHILD_SA.
pub fn agree(left: &Settled, right: &Settled) -> Result<()> {
    ensure!(
        left.ike == right.ike
            && left.initiator != right.initiator
            && (left.spi_in, left.spi_out) == (right.spi_out, right.spi_in),
        "the ends do not agree:\n{left:?}\n{right:?}"
    );
    Ok(())
}

fn swan_state(sa: &Sa) -> Option<Settled> {
    // What a rekey replaced stays a while for packets under way.
    let gone = ["REKEYED", "DELETING", "DELETED"];
    let mut children = sa.children.iter().filter(|child| !gone.contains(&child.state.as_str()));
    let (Some(child), None) = (children.next(), children.next()) else { return None };
    if sa.state != "ESTABLISHED" || child.state != "INSTALLED" {
        return None;
    }
    let addresses = ["local-vips", "remote-vips"].into_iter().filter_map(|key| sa.all.get(key)?.as_array());
    let addresses = addresses.flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    Some(Settled {
        ike: sa.spis.clone(),
        initiator: sa.initiator,
        spi_in: child.spi_in,
        spi_out: child.spi_out,
        remote: sa.remote.0.clone(),
        encap: child.encap,
        addresses,
    })
}

fn postern_state(node: &Node, connection: &str) -> Result<Option<Settled>> {
    let rows = node.json(&["connections"])?;
    let rows = rows.as_array().context("`postern connections` gave no rows")?;
    let row = rows.iter().find(|row| word(row, "name") == connection);
    let sas = row.and_then(|row| row.get("sas")?.as_array()).context("no such connection")?;
    let mut sas = sas.iter().filter(|sa| word(sa, "state") != "deleting");
    let (Some(sa), None) = (sas.next(), sas.next()) else { return Ok(None) };
    let children = sa.get("children").and_then(Value::as_array).context("no children")?;
    // What a rekey replaced stays a while for packets under way.
    let gone = ["draining", "replaced", "deleting"];
    let mut children = children.iter().filter(|child| !gone.contains(&word(child, "state")));
    let (Some(child), None) = (children.next(), children.next()) else { return Ok(None) };
    if word(sa, "state") != "established" || word(child, "state") != "installed" {
        return Ok(None);
    }
    let spi = |key: &str| u32::from_str_radix(word(child, key).trim_start_matches("0x"), 16);
    let spis: (String, String) = serde_json::from_value(sa.get("spis").cloned().unwrap_or_default())?;
    let plain = |spi: String| spi.trim_start_matches("0x").to_owned();
    let remote = word(sa, "remote").parse::<std::net::SocketAddr>()?;
    let addresses = sa.get("addresses").and_then(Value::as_array).into_iter().flatten();
    Ok(Some(Settled {
        ike: (plain(spis.0), plain(spis.1)),
        initiator: sa.get("initiator").and_then(Value::as_bool).unwrap_or(false),
        spi_in: spi("spi_in")?,
        spi_out: spi("spi_out")?,
        remote: remote.ip().to_string(),
        encap: child.get("encap").and_then(Value::as_bool).unwrap_or(false),
        addresses: addresses.filter_map(Value::as_str).map(str::to_owned).collect(),
    }))
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}
