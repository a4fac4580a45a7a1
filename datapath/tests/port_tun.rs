//! The TUN port, with the kernel's own stack behind the device. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, which clippy does not take for tests"
)]

#[path = "netns/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod netns;

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use arrayvec::ArrayVec;
use netns::Netns;
use postern_datapath::frame::{Arena, BATCH, Frame, HEADROOM, Pool};
use postern_datapath::port::tun::TunPort;
use postern_datapath::port::{LinkKind, Port, PortStats};
use postern_wire::{ip4, udp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const OURS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const THEIRS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// DP-1: cleartext of the host itself comes as whole IP packets, and packets put in are delivered to its sockets.
#[test]
fn dp_1_packets_of_the_host_come_and_go() {
    let netns = Netns::new("tun");
    netns.exec("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    let mut port = netns.within(|| TunPort::create("pt0", 1400).unwrap());
    netns.ip("address add 10.9.0.1/24 dev pt0");
    assert!(netns.exec("ip link show pt0").contains("mtu 1400"));
    assert_eq!((port.link(), port.describe().as_str(), port.name()), (LinkKind::Ip, "tun pt0", "pt0"));

    let (arena, frames) = Arena::new(256, false).unwrap();
    let mut pool = Pool::split(frames, 1).pop().unwrap();
    let mut batch = ArrayVec::<Frame, BATCH>::new();
    let socket = netns.within(|| UdpSocket::bind((OURS, 1000)).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    for n in 0..100_u8 {
        socket.send_to(&[n; 1372], (THEIRS, 2000)).unwrap();
    }
    let mut fds = [PollFd::from_borrowed_fd(port.wait_fd().unwrap(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).unwrap(), 1);
    let mut answered = 0..100_u8;
    loop {
        port.receive(&arena, &mut pool, &mut batch);
        if batch.is_empty() {
            break;
        }
        for frame in &mut batch {
            assert_eq!(frame.headroom(), HEADROOM);
            let packet = arena.bytes_mut(frame);
            let view = ip4::View::parse(packet).unwrap();
            assert_eq!((view.source(), view.destination(), view.total_len()), (OURS, THEIRS, 1400));
            assert_eq!(udp::Header::parse(view.payload()).unwrap().destination_port, 2000);
            // Back to the sender. Addresses and ports change places, so the checksums stay right.
            packet[12..20].rotate_left(4);
            packet[20..24].rotate_left(2);
        }
        let count = batch.len();
        assert_eq!(port.transmit(&arena, &mut pool, &mut batch), count);
        port.flush(&arena, &mut pool);
        for n in answered.by_ref().take(count) {
            let mut buffer = [0xa5; 2000];
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((from, &buffer[..len]), ((THEIRS, 2000).into(), &[n; 1372][..]));
        }
    }
    assert_eq!(answered.next(), None);

    // DP-6: what is no packet, and what comes while the device is down, is counted and loses no frame.
    let mut garbage = pool.take().unwrap();
    garbage.grow_back(20).unwrap();
    arena.bytes_mut(&mut garbage).fill(0xff);
    batch.push(garbage);
    assert_eq!(port.transmit(&arena, &mut pool, &mut batch), 1);
    netns.ip("link set pt0 down");
    let mut frame = pool.take().unwrap();
    frame.grow_back(20).unwrap();
    arena.bytes_mut(&mut frame).copy_from_slice(&[0x45; 20]);
    batch.push(frame);
    assert_eq!(port.transmit(&arena, &mut pool, &mut batch), 1);
    assert_eq!(port.stats(), PortStats { malformed: 1, refused: 1, ..PortStats::default() });
    port.drain(&arena, &mut pool);
    assert_eq!(pool.available(), 256);
}

/// OPS-1: a name that is taken is told with the name.
#[test]
fn ops_1_a_taken_name_is_told() {
    let netns = Netns::new("tun");
    let _first = netns.within(|| TunPort::create("pt0", 1400).unwrap());
    let error = netns.within(|| TunPort::create("pt0", 1400).err().unwrap());
    assert!(error.to_string().contains("pt0"), "{error}");
}
