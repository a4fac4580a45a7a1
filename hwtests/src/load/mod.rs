//! Many IKE clients in one process, on the product's own engine, and a gateway for them: what a gateway under load talks
//! to, without a network ([`pump`], [`handshake`]) or with one ([`udp`]).
//!
//! Each client is an [`Endpoint`] with an address and an identity of its own (`client7@load`), so that a gateway sees what
//! it sees in life, and neither its limits per source nor its rule of one IKE SA a peer get in the way.

pub mod compare;
pub mod udp;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net};
use postern_ike::auth::identity::{Identity, IdentityPattern};
use postern_ike::config::{
    Child, Connection, LocalAuth, Mode, RemoteAuth, Selector, Settings, Start, Strategy, Unique,
};
use postern_ike::endpoint::{Endpoint, Host, Now};
use postern_ike::job::{Done, Job};
use postern_ike::message::{Proposal, TrafficSelector};
use postern_ike::negotiate::keyword;
use postern_ike::output::{Effect, Path};
use postern_ike::report::Report;
use postern_ike::{Random, Secret};
use ring::rand::{SecureRandom, SystemRandom};

/// Name of the only connection of a client, and of its gateway.
const CONNECTION: &str = "load";

/// The gateway's identity.
pub const GATEWAY_ID: &str = "gateway.load";

/// The identities of the clients.
pub const CLIENT_IDS: &str = "*@load";

/// Where the clients' addresses inside their tunnels are.
pub const INSIDE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12);

/// The system's random source, as the daemon has it.
#[derive(Debug)]
pub struct System(SystemRandom);

impl Default for System {
    fn default() -> Self {
        Self(SystemRandom::new())
    }
}

impl Random for System {
    fn fill(&mut self, out: &mut [u8]) {
        if self.0.fill(out).is_err() {
            std::process::abort();
        }
    }
}

/// SPIs one after the other. Clients have no datapath, so nothing else gives them out.
#[derive(Debug)]
struct Numbered {
    next: u32,
}

impl Host for Numbered {
    fn allocate_spi(&mut self, _: &mut dyn Random) -> u32 {
        self.next = self.next.wrapping_add(1).max(256);
        self.next
    }

    fn claim_spi(&mut self, _: u32) -> bool {
        true
    }

    fn release_spi(&mut self, _: u32) {}

    fn source_address(&mut self, _: IpAddr) -> Option<IpAddr> {
        None
    }
}

/// What all clients have in common, and the gateway with them.
#[derive(Debug)]
pub struct Plan {
    /// Where the gateway is.
    pub gateway: IpAddr,
    /// The gateway's identity.
    pub gateway_id: Identity,
    /// What clients reach through it.
    pub network: ipnet::IpNet,
    /// Shared secret.
    pub secret: Secret,
    /// What the gateway saves for the time after a reset.
    pub reset: Strategy,
    ike: Proposal,
    esp: Proposal,
    settings: Settings,
}

/// Something that an endpoint came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The IKE SA is established and a CHILD_SA installed.
    Up,
    /// It failed, or is gone; why.
    Down(String),
}

/// Datagrams with the path they take, as their sender sees it.
pub type Outgoing = Vec<(Path, Vec<u8>)>;

impl Plan {
    /// Proposals in strongSwan's words.
    pub fn new(gateway: IpAddr, network: &str, ike: &str, esp: &str, secret: &str) -> Result<Self> {
        Ok(Self {
            gateway,
            gateway_id: GATEWAY_ID.parse()?,
            network: network.parse().with_context(|| format!("{network} is no network"))?,
            secret: Secret::new(secret.as_bytes()),
            reset: Strategy::None,
            ike: keyword::ike(ike)?,
            esp: keyword::esp(esp)?,
            settings: Settings::default(),
        })
    }

    /// The client of this number, which has not begun yet.
    pub fn client(&self, now: Now, number: u32, address: IpAddr) -> Result<Endpoint> {
        let connection = Connection {
            local: vec![address],
            remote: Some(self.gateway),
            local_id: format!("client{number}@load").parse()?,
            remote_id: GATEWAY_ID.parse()?,
            ..self.connection(vec![fixed(inside(number).into())], vec![fixed(self.network)])
        };
        Ok(self.endpoint(now, number, connection))
    }

    /// A gateway that takes them all.
    pub fn gateway(&self, now: Now) -> Result<Endpoint> {
        let connection = Connection {
            local_id: self.gateway_id.clone(),
            remote_id: CLIENT_IDS.parse()?,
            reset: self.reset,
            ..self.connection(vec![fixed(self.network)], vec![fixed(INSIDE.into())])
        };
        Ok(self.endpoint(now, 0, connection))
    }

    fn endpoint(&self, now: Now, number: u32, connection: Connection) -> Endpoint {
        // Any will do, as long as no two SAs of one endpoint have the same.
        let host = Box::new(Numbered { next: number.wrapping_mul(0x9e37_79b1) });
        let mut endpoint = Endpoint::new(self.settings.clone(), host, Box::new(System::default()));
        endpoint.configure(now, vec![Arc::new(connection)], &[]);
        endpoint
    }

    /// What all have in common; the identities are to be put in.
    fn connection(&self, local_ts: Vec<Selector>, remote_ts: Vec<Selector>) -> Connection {
        let child = Child {
            name: "net".into(),
            proposals: vec![self.esp.clone()],
            local_ts,
            remote_ts,
            mode: Mode::Tunnel,
            start: Start::None,
            on_close: Start::None,
            on_dpd: Start::None,
            rekey: Some(Duration::from_hours(1)),
            rekey_jitter: Duration::from_mins(6),
            life: Some(Duration::from_mins(66)),
        };
        Connection {
            name: CONNECTION.into(),
            fingerprint: [0; 32],
            local: Vec::new(),
            remote_nets: Vec::new(),
            remote: None,
            remote_port: 500,
            proposals: vec![self.ike.clone()],
            local_id: self.gateway_id.clone(),
            remote_id: IdentityPattern::Any,
            local_auth: LocalAuth::Psk(self.secret.duplicate()),
            remote_auth: RemoteAuth::Psk(self.secret.duplicate()),
            children: vec![child],
            pools: Vec::new(),
            dns: Vec::new(),
            request_address: (false, false),
            mobike: false,
            fragmentation: true,
            childless: false,
            force_encap: false,
            rekey: Some(Duration::from_hours(4)),
            rekey_jitter: Duration::from_mins(24),
            over_time: Duration::from_mins(24),
            dpd: None,
            unique: Unique::Replace,
            reset: Strategy::None,
            v1: None,
        }
    }
}

/// The client's address inside the tunnel. The outer one would do for Postern, but not for strongSwan's userspace ESP, which
/// refuses selectors that hold the peer itself.
fn inside(number: u32) -> IpAddr {
    let hosts = u32::MAX >> INSIDE.prefix_len();
    IpAddr::V4(Ipv4Addr::from_bits(INSIDE.network().to_bits() | (number & hosts)))
}

fn fixed(net: IpNet) -> Selector {
    let (start, end) = (net.network(), net.broadcast());
    Selector::Fixed(TrafficSelector { start, end, protocol: 0, ports: 0..=u16::MAX })
}

/// Both clocks.
pub fn now() -> Now {
    Now { monotonic: Instant::now(), wall: SystemTime::now() }
}

/// Begins the only connection of a client.
pub fn begin(client: &mut Endpoint, now: Now) -> Result<()> {
    client.initiate(now, CONNECTION, None)?;
    Ok(())
}

/// Does what an endpoint wants done, with nothing behind it: its jobs are run by `run`, its children are as good as
/// installed, its datagrams go to `outgoing`.
pub fn pump(
    endpoint: &mut Endpoint,
    now: Now,
    run: &mut dyn FnMut(Job) -> Done,
    outgoing: &mut Outgoing,
    mut event: impl FnMut(Event),
) {
    while let Some(output) = endpoint.poll_output() {
        match output.effect {
            Effect::Transmit { path, datagram } => outgoing.push((path, datagram)),
            Effect::Compute { id, job } => {
                let done = run(job);
                endpoint.computed(now, id, done);
            }
            Effect::Install(child) => endpoint.installed(now, child.id, Ok(())),
            Effect::Report(Report::ChildUp { .. }) => event(Event::Up),
            Effect::Report(Report::Failed { failure, .. } | Report::ChildFailed { failure, .. }) => {
                event(Event::Down(failure.to_string()));
            }
            Effect::Report(Report::Closed { reason, .. }) => event(Event::Down(format!("{reason:?}"))),
            _ => {}
        }
    }
}

/// Takes datagrams that the other side sent and gives what goes back; whether a CHILD_SA came up.
///
/// Fails if the endpoint failed to bring it up.
pub fn step(
    endpoint: &mut Endpoint,
    now: Now,
    incoming: Outgoing,
    run: &mut dyn FnMut(Job) -> Done,
) -> Result<(Outgoing, bool)> {
    for (Path { local, remote, natt }, datagram) in incoming {
        endpoint.handle_datagram(now, Path { local: remote, remote: local, natt }, &datagram);
    }
    let (mut outgoing, mut up, mut down) = (Vec::new(), false, None);
    pump(endpoint, now, run, &mut outgoing, |event| match event {
        Event::Up => up = true,
        Event::Down(why) => down = Some(why),
    });
    ensure!(down.is_none(), "a handshake failed: {}", down.unwrap_or_default());
    Ok((outgoing, up))
}

/// One client and the gateway, face to face. `around` is called for each step of each side, the gateway's with `true`, and
/// calls what it is given: the place to measure.
pub fn handshake(
    gateway: &mut Endpoint,
    client: &mut Endpoint,
    now: Now,
    run: &mut dyn FnMut(Job) -> Done,
    mut around: impl FnMut(bool, &mut dyn FnMut()),
) -> Result<()> {
    let (mut under_way, mut ups) = (Outgoing::new(), 0);
    let mut begun = false;
    for turn in 0..MAX_STEPS {
        let at_gateway = turn % 2 == 1;
        let incoming = std::mem::take(&mut under_way);
        let mut result = None;
        let mut incoming = Some(incoming);
        around(at_gateway, &mut || {
            let incoming = incoming.take().unwrap_or_default();
            result = Some(if at_gateway {
                step(gateway, now, incoming, run)
            } else if begun {
                step(client, now, incoming, run)
            } else {
                begun = true;
                begin(client, now).and_then(|()| step(client, now, incoming, run))
            });
        });
        let (outgoing, up) = result.context("a step was not made")??;
        under_way = outgoing;
        ups += u8::from(up);
        if under_way.is_empty() {
            break;
        }
    }
    ensure!(ups == 2, "a handshake came to nothing");
    Ok(())
}

/// More than any handshake without loss takes, cookies and refused groups included.
const MAX_STEPS: usize = 16;
