//! Traffic that measures: ping, iperf3, and a stream of numbered UDP datagrams whose loss is known to the packet.

use std::collections::HashSet;
use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use serde_json::Value;

use crate::netns::Netns;
use crate::process::{Background, run, wait_for};

/// What ping said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pings {
    /// Requests sent.
    pub sent: u32,
    /// Replies received.
    pub received: u32,
}

/// Requests after those that count. Once a reply came, ping waits for the rest only twice the longest round trip: on a
/// busy machine it gives up on the last one while that is still on its way.
pub const STRAGGLERS: u32 = 5;

/// The number of the request that a line of ping reports the reply to.
fn answered(line: &str) -> Option<u32> {
    let (_, rest) = line.split_once(" bytes from ")?.1.split_once("icmp_seq=")?;
    rest.split(' ').next()?.parse().ok()
}

/// Options of [`ping`].
#[derive(Clone, Copy, Debug)]
pub struct Ping {
    /// Requests.
    pub count: u32,
    /// Bytes of ICMP data.
    pub size: u16,
    /// Do not fragment: never here (`true`), or as the path says (`false`).
    pub prohibit_fragmentation: bool,
}

impl Default for Ping {
    fn default() -> Self {
        Self { count: 5, size: 56, prohibit_fragmentation: false }
    }
}

impl Ping {
    /// Pings `to` from `namespace`; replies may be missing, that is for the caller to judge.
    pub fn run(self, namespace: &Netns, to: IpAddr) -> Result<(Pings, String)> {
        let mut command = namespace.command("ping");
        let sent = self.count + STRAGGLERS;
        command.args(["-n", "-i", "0.02", "-W", "1", "-c", &sent.to_string()]);
        command.args([
            "-s",
            &self.size.to_string(),
            "-M",
            if self.prohibit_fragmentation { "do" } else { "want" },
        ]);
        // ping ends with 1 when replies are missing, and still says how many came.
        let output = command.arg(to.to_string()).output()?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(text.contains("packets transmitted"), "ping said: {text}");
        let answered: HashSet<u32> = text.lines().filter_map(answered).collect();
        let received = u32::try_from(answered.iter().filter(|number| **number <= self.count).count())?;
        let sent = self.count;
        Ok((Pings { sent, received }, text))
    }

    /// Pings until a reply comes (neighbours are being resolved meanwhile), then demands every reply.
    pub fn all(self, namespace: &Netns, to: IpAddr) -> Result<()> {
        wait_for(
            &format!("a first reply from {to} to {}", namespace.name()),
            Duration::from_secs(5),
            || {
                let (pings, _) = Self { count: 1, ..self }.run(namespace, to)?;
                Ok((pings.received == 1).then_some(()))
            },
        )?;
        let (pings, text) = self.run(namespace, to)?;
        ensure!(pings.sent == pings.received, "ping from {} to {to}: {pings:?}\n{text}", namespace.name());
        Ok(())
    }
}

/// An iperf3 measurement.
#[derive(Clone, Copy, Debug)]
pub struct Iperf {
    /// Bits a second, at the receiver.
    pub bits_per_second: f64,
    /// TCP: segments sent again.
    pub retransmits: u64,
    /// UDP: percent lost.
    pub lost_percent: f64,
}

/// An iperf3 server inside a namespace, ended when dropped.
#[derive(Debug)]
pub struct IperfServer {
    address: IpAddr,
    _process: Background,
}

impl IperfServer {
    /// Starts it; its log goes to `dir`.
    pub fn start(namespace: &Netns, address: IpAddr, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("iperf3-{}.log", if address.is_ipv4() { 4 } else { 6 }));
        // An earlier server's log would say that this one listens.
        File::create(&log)?;
        let mut command = namespace.command("iperf3");
        command.args(["-s", "--forceflush", "-B", &address.to_string()]);
        let process = Background::start(&mut command, &log)?;
        wait_for("the iperf3 server", Duration::from_secs(5), || {
            Ok(std::fs::read_to_string(&log)?.contains("listening").then_some(()))
        })?;
        Ok(Self { address, _process: process })
    }

    /// Sends TCP from `namespace` for `seconds`.
    pub fn tcp(&self, namespace: &Netns, seconds: u32) -> Result<Iperf> {
        self.run(namespace, seconds, &[])
    }

    /// Sends this many bytes over TCP from `namespace`.
    pub fn tcp_bytes(&self, namespace: &Netns, bytes: u32) -> Result<Iperf> {
        self.run(namespace, 10, &["-n", &bytes.to_string()])
    }

    /// Sends TCP the other way, from the server to `namespace`.
    pub fn tcp_reverse(&self, namespace: &Netns, seconds: u32) -> Result<Iperf> {
        self.run(namespace, seconds, &["-R"])
    }

    /// Sends UDP at `rate`, as iperf3 writes it (`20M`).
    pub fn udp(&self, namespace: &Netns, seconds: u32, rate: &str) -> Result<Iperf> {
        self.run(namespace, seconds, &["-u", "-l", "1200", "-b", rate, "-w", "2M"])
    }

    fn run(&self, namespace: &Netns, seconds: u32, more: &[&str]) -> Result<Iperf> {
        let mut command = namespace.command("timeout");
        command.args([&(seconds + 10).to_string(), "iperf3", "-J", "--connect-timeout", "3000"]);
        let seconds = seconds.to_string();
        command.args(["-c", &self.address.to_string()]);
        if !more.contains(&"-n") {
            command.args(["-t", &seconds]);
        }
        command.args(more);
        let report: Value = serde_json::from_str(&run(&mut command)?)?;
        if let Some(error) = report.get("error").and_then(Value::as_str) {
            bail!("iperf3: {error}");
        }
        let end = |name: &str| report.pointer(&format!("/end/{name}"));
        let udp = end("sum/lost_percent").is_some();
        let rate = if udp { end("sum/bits_per_second") } else { end("sum_received/bits_per_second") };
        Ok(Iperf {
            bits_per_second: rate.and_then(Value::as_f64).context("iperf3 gave no rate")?,
            retransmits: end("sum_sent/retransmits").and_then(Value::as_u64).unwrap_or(0),
            lost_percent: end("sum/lost_percent").and_then(Value::as_f64).unwrap_or(0.0),
        })
    }
}

/// What became of a [`Stream`]'s datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sent.
    pub sent: u64,
    /// Received, each number once.
    pub received: u64,
    /// Received more than once.
    pub duplicates: u64,
    /// Received after a later one.
    pub reordered: u64,
    /// The longest time without a datagram.
    pub longest_gap: Duration,
}

impl Tally {
    /// Datagrams that never came.
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }
}

/// Numbered UDP datagrams at an even pace from one namespace to another, counted exactly.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<std::io::Result<u64>>,
    receiver: JoinHandle<Tally>,
}

impl Stream {
    /// Starts sending `rate` datagrams of `size` bytes a second from `from` to `address` in `to`.
    pub fn start(from: &Netns, to: &Netns, address: IpAddr, rate: u32, size: usize) -> Result<Self> {
        let receiver_socket = to.enter(|| Ok(UdpSocket::bind((address, 0))?))?;
        // Datagrams wait here while a busy machine runs something else: what the network did not lose, the count must not.
        set_socket_recv_buffer_size_force(&receiver_socket, 8 << 20)?;
        receiver_socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let target = receiver_socket.local_addr()?;
        let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
        let sender_socket = from.enter(|| Ok(UdpSocket::bind(any)?))?;
        sender_socket.connect(target)?;
        let stop = Arc::new(AtomicBool::new(false));
        let pace = Duration::from_secs(1) / rate.max(1);
        let (sender_stop, receiver_stop) = (Arc::clone(&stop), Arc::clone(&stop));
        let receiver = std::thread::spawn(move || count(&receiver_socket, &receiver_stop));
        let sender = std::thread::spawn(move || send(&sender_socket, &sender_stop, pace, size));
        Ok(Self { stop, sender, receiver })
    }

    /// Stops sending, waits for what is under way, and counts.
    pub fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        let tally = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
        Ok(Tally { sent, ..tally })
    }
}

fn send(socket: &UdpSocket, stop: &AtomicBool, pace: Duration, size: usize) -> std::io::Result<u64> {
    let mut datagram = vec![0x5a; size.max(8)];
    let (mut number, mut due) = (0_u64, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        if let Some(head) = datagram.first_chunk_mut::<8>() {
            *head = number.to_be_bytes();
        }
        match socket.send(&datagram) {
            Ok(_) => number += 1,
            // An ICMP error about an earlier datagram; this one was not sent, so its number goes again.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
        due += pace;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(number)
}

fn count(socket: &UdpSocket, stop: &AtomicBool) -> Tally {
    let (mut seen, mut tally, mut highest) = (Vec::<bool>::new(), Tally::default(), None);
    let (mut last, mut stopped, mut datagram) = (None::<Instant>, None::<Instant>, [0_u8; 2048]);
    loop {
        // Half a second for what is still under way once sending stopped.
        if stop.load(Ordering::Relaxed)
            && stopped.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(500)
        {
            return tally;
        }
        let Ok(size) = socket.recv(&mut datagram) else { continue };
        let Some(number) = datagram.get(..size).and_then(|bytes| bytes.first_chunk()) else { continue };
        let number = u64::from_be_bytes(*number);
        let now = Instant::now();
        if let Some(last) = last.replace(now) {
            tally.longest_gap = tally.longest_gap.max(now - last);
        }
        let Ok(index) = usize::try_from(number) else { continue };
        if seen.len() <= index {
            seen.resize(index + 1, false);
        }
        match seen.get_mut(index) {
            Some(true) => tally.duplicates += 1,
            Some(fresh) => {
                *fresh = true;
                tally.received += 1;
                tally.reordered += u64::from(highest.is_some_and(|highest| number < highest));
                highest = highest.max(Some(number));
            }
            None => {}
        }
    }
}
