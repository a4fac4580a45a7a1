//! Small datagrams at an even pace, counted where they arrive.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use postern_hwtests::netns::Netns;

/// Bytes of data in an IPv4 packet of 64.
const DATA: usize = 36;
/// Between two bursts.
const TICK: Duration = Duration::from_millis(1);

/// What arrived.
pub struct Arrived {
    pub packets: f64,
    /// A second.
    pub rate: f64,
}

/// Offers so many datagrams a second for a time. They are counted at the far host's interface: a program that read them
/// would be slower than what is measured.
pub fn send(from: &Netns, to: &Netns, address: IpAddr, rate: u32, lasting: Duration) -> Result<Arrived> {
    // Somebody has the port, so that nobody answers that it is closed; what is not read is dropped there.
    let sink = to.enter(|| Ok(UdpSocket::bind((address, 0))?))?;
    let socket = from.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    socket.connect(sink.local_addr()?)?;
    let before = received(to)?;
    let (start, mut sent) = (Instant::now(), 0_u32);
    while start.elapsed() < lasting {
        let due = f64::from(rate) * start.elapsed().as_secs_f64();
        while f64::from(sent) < due && start.elapsed() < lasting {
            // A full queue on the way: the packet is lost like any other.
            let _ = socket.send(&[0x5a; DATA]);
            sent += 1;
        }
        std::thread::sleep(TICK);
    }
    let spent = start.elapsed();
    // What is still on its way belongs to it, but not what waits behind a full queue for long.
    std::thread::sleep(Duration::from_millis(50));
    let packets = f64::from(u32::try_from(received(to)? - before)?);
    Ok(Arrived { packets, rate: packets / spent.as_secs_f64() })
}

fn received(namespace: &Netns) -> Result<u64> {
    Ok(namespace.sh("cat /sys/class/net/eth0/statistics/rx_packets")?.trim().parse()?)
}
