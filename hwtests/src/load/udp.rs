//! The clients on a network: their addresses on one pair of sockets, ports 500 and 4500, and a loop that keeps so many of
//! them under way.
//!
//! The addresses need not be on an interface: `ip route add local RANGE dev lo` in the namespace makes the whole range
//! this host's own.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};
use postern_ike::endpoint::Endpoint;
use postern_ike::job::Job;
use postern_ike::output::Path;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Event, Outgoing, Plan, System, begin, now, pump};

/// Ports, and whether messages have a marker there (RFC 3948 section 2.2).
const PORTS: [(u16, bool); 2] = [(500, false), (4500, true)];
const NON_ESP_MARKER: [u8; 4] = [0; 4];
/// Receive buffer that is asked for: all answers of those under way.
const BUFFER: usize = 8 << 20;
/// Longest wait for a datagram before timers are looked at.
const NAP: Duration = Duration::from_millis(20);

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Address of the first client; the others have those after it.
    pub first: Ipv4Addr,
    /// Clients.
    pub count: u32,
    /// So many are brought up at a time.
    pub in_flight: u32,
    /// All is over after this long.
    pub limit: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// From the first client's begin to the last one's end.
    pub took: Duration,
    /// Set-up times of those that came up, sorted.
    pub times: Vec<Duration>,
    /// Why others did not, the first few.
    pub failures: Vec<String>,
    /// How many did not.
    pub failed: u32,
    /// Requests sent again.
    pub retransmitted: u64,
}

impl Outcome {
    /// The set-up time that this share of the clients kept below.
    pub fn quantile(&self, share: (usize, usize)) -> Duration {
        let index = (self.times.len() * share.0 / share.1).min(self.times.len().saturating_sub(1));
        self.times.get(index).copied().unwrap_or_default()
    }

    /// Clients that came up in a second.
    pub fn rate(&self) -> f64 {
        let count = u32::try_from(self.times.len()).unwrap_or(u32::MAX);
        f64::from(count) / self.took.as_secs_f64().max(1e-9)
    }
}

/// A client, once it has begun.
struct Client {
    endpoint: Endpoint,
    begun: Instant,
    /// When its next timer is due, as long as it is under way.
    due: Option<Instant>,
    under_way: bool,
}

/// The clients and their sockets.
pub struct Crowd {
    sockets: Vec<(UdpSocket, u16, bool)>,
    random: System,
    first: u32,
    clients: Vec<Client>,
    outcome: Outcome,
}

impl Crowd {
    /// Opens the sockets in the namespace that the calling thread is in.
    pub fn open() -> Result<Self> {
        let mut sockets = Vec::new();
        for (port, natt) in PORTS {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
                .with_context(|| format!("UDP port {port} (root, and no other IKE in this namespace?)"))?;
            socket.set_nonblocking(true)?;
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
            sockets.push((socket, port, natt));
        }
        let outcome = Outcome::default();
        Ok(Self { sockets, random: System::default(), first: 0, clients: Vec::new(), outcome })
    }

    /// Brings all clients up, `in_flight` at a time.
    pub fn run(&mut self, plan: &Plan, task: &Task) -> Result<Outcome> {
        self.first = task.first.to_bits();
        self.clients = Vec::new();
        self.outcome = Outcome::default();
        let start = Instant::now();
        // Those whose timers are looked at, in the order in which they began.
        let mut under_way: VecDeque<usize> = VecDeque::new();
        let mut buffer = vec![0; 65_536];
        while start.elapsed() < task.limit {
            let begun = u32::try_from(self.clients.len())?;
            let room = task.in_flight.saturating_sub(u32::try_from(under_way.len())?);
            for number in begun..task.count.min(begun.saturating_add(room)) {
                under_way.push_back(self.clients.len());
                self.begin(plan, number)?;
            }
            if under_way.is_empty() {
                break;
            }
            self.wait()?;
            self.receive(&mut buffer)?;
            let now = Instant::now();
            for &index in &under_way {
                self.due(index, now);
            }
            under_way.retain(|&index| self.clients.get(index).is_some_and(|client| client.under_way));
        }
        self.outcome.took = start.elapsed();
        self.outcome.failed += u32::try_from(under_way.len())?;
        self.outcome.times.sort_unstable();
        self.outcome.retransmitted =
            self.clients.iter().map(|client| client.endpoint.counters().retransmitted).sum();
        Ok(self.outcome.clone())
    }

    fn begin(&mut self, plan: &Plan, number: u32) -> Result<()> {
        let now = now();
        let address = IpAddr::V4(Ipv4Addr::from_bits(self.first.wrapping_add(number)));
        let mut endpoint = plan.client(now, number, address)?;
        begin(&mut endpoint, now)?;
        let index = self.clients.len();
        self.clients.push(Client { endpoint, begun: now.monotonic, due: None, under_way: true });
        self.go_on(index);
        Ok(())
    }

    /// Does what a client wants done.
    fn go_on(&mut self, index: usize) {
        let Self { clients, random, outcome, sockets, .. } = self;
        let Some(client) = clients.get_mut(index) else { return };
        let mut outgoing = Outgoing::new();
        let mut run = |job: Job| job.run(random);
        let (under_way, begun) = (&mut client.under_way, client.begun);
        pump(&mut client.endpoint, now(), &mut run, &mut outgoing, |event| {
            if !std::mem::take(under_way) {
                return;
            }
            match event {
                Event::Up => outcome.times.push(begun.elapsed()),
                Event::Down(why) => {
                    outcome.failed += 1;
                    if outcome.failures.len() < 5 {
                        outcome.failures.push(why);
                    }
                }
            }
        });
        client.due = client.endpoint.poll_timeout();
        for (path, datagram) in outgoing {
            if let Some((socket, ..)) = sockets.iter().find(|(.., natt)| *natt == path.natt) {
                // What is lost is sent again in time.
                let _ = send(socket, &path, &datagram);
            }
        }
    }

    fn due(&mut self, index: usize, at: Instant) {
        let Some(client) = self.clients.get_mut(index) else { return };
        if client.due.is_some_and(|due| due <= at) {
            client.endpoint.handle_timeout(now());
            self.go_on(index);
        }
    }

    fn wait(&self) -> Result<()> {
        let mut fds: Vec<PollFd<'_>> =
            self.sockets.iter().map(|(socket, ..)| PollFd::new(socket, PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec::try_from(NAP)?))?;
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<()> {
        for number in 0..self.sockets.len() {
            while let Some((path, length)) = self
                .sockets
                .get(number)
                .and_then(|(socket, port, natt)| receive(socket, *port, *natt, buffer))
            {
                let datagram = buffer.get(..length).unwrap_or_default();
                let message = if path.natt { datagram.strip_prefix(&NON_ESP_MARKER) } else { Some(datagram) };
                let IpAddr::V4(local) = path.local.ip() else { continue };
                let index = usize::try_from(local.to_bits().wrapping_sub(self.first))?;
                if let (Some(message), Some(client)) = (message, self.clients.get_mut(index)) {
                    client.endpoint.handle_datagram(now(), path, message);
                    self.go_on(index);
                }
            }
        }
        Ok(())
    }
}

fn receive(socket: &UdpSocket, port: u16, natt: bool, buffer: &mut [u8]) -> Option<(Path, usize)> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags).ok()?;
    let remote = SocketAddr::V4(SocketAddrV4::from(message.address?));
    let local = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))),
        _ => None,
    })?;
    Some((Path { local: SocketAddr::from((local, port)), remote, natt }, message.bytes))
}

fn send(socket: &UdpSocket, path: &Path, message: &[u8]) -> nix::Result<()> {
    let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (path.local, path.remote) else { return Ok(()) };
    let source = libc::in_addr { s_addr: u32::from(*local.ip()).to_be() };
    let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: source };
    let marker: &[u8] = if path.natt { &NON_ESP_MARKER } else { &[] };
    let parts = [IoSlice::new(marker), IoSlice::new(message)];
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&SockaddrIn::from(remote)))?;
    Ok(())
}
