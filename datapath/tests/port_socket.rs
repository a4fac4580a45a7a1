//! The raw socket port, with the kernel's own sockets and the bare wire at the other end. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, which clippy does not take for tests"
)]

#[path = "netns/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod netns;
#[path = "netns/wire.rs"]
mod wire;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use netns::Netns;
use postern_datapath::frame::{Arena, BATCH, Frame, HEADROOM, Pool};
use postern_datapath::port::socket::{HeldPort, SocketError, SocketOptions, SocketPort};
use postern_datapath::port::{LinkKind, Port, PortStats};
use postern_wire::ids::Protocol;
use postern_wire::{ip4, ip6, udp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use wire::Wire;

const NEAR4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const NEAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);

/// An ESP packet, as far as anyone here can tell.
const ESP: [u8; 44] = {
    let mut esp = [0x5a; 44];
    (esp[0], esp[1], esp[2], esp[3]) = (0xc0, 0, 1, 0);
    esp
};

struct World {
    near: Netns,
    far: Netns,
    arena: Arena,
    pool: Pool,
}

fn world() -> World {
    let (near, far) = (Netns::new("near"), Netns::new("far"));
    near.ip(&format!("link add name n0 type veth peer name f0 netns {}", far.name()));
    for (side, name, v4, v6) in [(&near, "n0", NEAR4, NEAR6), (&far, "f0", FAR4, FAR6)] {
        side.ip(&format!("address add {v4}/24 dev {name}"));
        side.ip(&format!("address add {v6}/64 dev {name} nodad"));
        side.ip(&format!("link set {name} up"));
        // A veth pair leaves checksums to a device that is not there.
        side.exec(&format!("ethtool -K {name} tx off"));
    }
    near.wait_until_up("n0");
    far.wait_until_up("f0");
    let (arena, frames) = Arena::new(256, false).unwrap();
    let pool = Pool::split(frames, 1).pop().unwrap();
    World { near, far, arena, pool }
}

impl World {
    fn port(&self, netns: &Netns) -> SocketPort {
        let port = netns.within(|| SocketPort::open(SocketOptions::default()).unwrap());
        assert_eq!(port.link(), LinkKind::Ip);
        assert!(port.describe().contains("4500"));
        assert_eq!(self.pool.available(), 256);
        port
    }

    /// Receives packets until there are so many, or none came for a second.
    fn receive(&mut self, port: &mut SocketPort, count: usize) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut batch = ArrayVec::<Frame, BATCH>::new();
        let until = Instant::now() + Duration::from_secs(1);
        while packets.len() < count && Instant::now() < until {
            let mut fds = [PollFd::from_borrowed_fd(port.wait_fd().unwrap(), PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })).unwrap();
            port.receive(&self.arena, &mut self.pool, &mut batch);
            for frame in batch.drain(..) {
                assert_eq!(frame.headroom(), HEADROOM);
                packets.push(self.arena.bytes(&frame).to_vec());
                self.pool.give(frame);
            }
        }
        packets
    }

    fn transmit(&mut self, port: &mut SocketPort, packet: &[u8]) {
        let mut batch = ArrayVec::<Frame, BATCH>::new();
        let mut frame = self.pool.take().unwrap();
        frame.grow_back(packet.len()).unwrap();
        self.arena.bytes_mut(&mut frame).copy_from_slice(packet);
        batch.push(frame);
        assert_eq!(port.transmit(&self.arena, &mut self.pool, &mut batch), 1);
        assert!(batch.is_empty());
    }
}

fn open_udp(netns: &Netns, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = address.into();
    let socket = netns.within(|| UdpSocket::bind((address, port)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

fn packet_v4(source: Ipv4Addr, destination: Ipv4Addr, protocol: Protocol, payload: &[u8]) -> Vec<u8> {
    let header =
        ip4::Header { source, destination, protocol, ttl: 61, tos: 0xb9, id: 0x1234, dont_fragment: true };
    let mut packet = vec![0xa5; ip4::MIN_LEN + payload.len()];
    header.emit(&mut packet, payload.len()).unwrap();
    packet[ip4::MIN_LEN..].copy_from_slice(payload);
    packet
}

fn packet_v6(source: Ipv6Addr, destination: Ipv6Addr, next_header: Protocol, payload: &[u8]) -> Vec<u8> {
    let header = ip6::Header {
        source,
        destination,
        next_header,
        hop_limit: 61,
        traffic_class: 0xb9,
        flow_label: 0x12345,
    };
    let mut packet = vec![0xa5; ip6::LEN + payload.len()];
    header.emit(&mut packet, payload.len()).unwrap();
    packet[ip6::LEN..].copy_from_slice(payload);
    packet
}

fn datagram(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(udp::LEN + payload.len()).unwrap();
    let mut datagram = vec![0xa5; udp::LEN];
    udp::Header { source_port: 4500, destination_port: 4500, length, checksum: 0 }
        .emit(&mut datagram)
        .unwrap();
    datagram.extend(payload);
    datagram
}

/// DP-1: of what comes to UDP port 4500 the port takes ESP, with the outer header's addresses and ECN, while an IKE daemon's
/// socket on the same port has the rest.
#[test]
fn dp_1_esp_in_udp_is_taken_beside_ike() {
    let mut world = world();
    let mut port = world.port(&world.near);
    for (near, far, overhead) in [
        (IpAddr::from(NEAR4), IpAddr::from(FAR4), ip4::MIN_LEN + udp::LEN),
        (IpAddr::from(NEAR6), IpAddr::from(FAR6), ip6::LEN + udp::LEN),
    ] {
        let before = port.stats();
        let ike = open_udp(&world.near, near, 4500);
        let peer = open_udp(&world.far, far, 4500);
        // CE, and a DSCP.
        if far.is_ipv4() {
            socket2::SockRef::from(&peer).set_tos_v4(0xbb).unwrap();
        } else {
            socket2::SockRef::from(&peer).set_tclass_v6(0xbb).unwrap();
        }
        peer.send_to(&[0xff], (near, 4500)).unwrap();
        peer.send_to(b"\0\0\0\0an IKE message", (near, 4500)).unwrap();
        peer.send_to(&[1, 2, 3], (near, 4500)).unwrap();
        peer.send_to(&ESP, (near, 4501)).unwrap();
        peer.send_to(&ESP, (near, 4500)).unwrap();
        let packets = world.receive(&mut port, 1);
        assert_eq!(packets.len(), 1);
        let packet = &packets[0];
        assert_eq!(packet[overhead..], ESP);
        let datagram = match near {
            IpAddr::V4(_) => {
                let view = ip4::View::parse(packet).unwrap();
                assert_eq!((view.source(), view.destination(), view.tos()), (FAR4, NEAR4, 0xbb));
                assert!(view.checksum_ok());
                view.payload()
            }
            IpAddr::V6(_) => {
                let view = ip6::View::parse(packet).unwrap();
                assert_eq!((view.source(), view.destination(), view.traffic_class()), (FAR6, NEAR6, 0xbb));
                assert_eq!((view.next_header(), view.hop_limit()), (Protocol::UDP, 64));
                // The datagram is the one that came: its checksum fits the header made again.
                assert_eq!(udp::checksum_v6(FAR6, NEAR6, view.payload()), 0xffff);
                view.payload()
            }
        };
        let header = udp::Header::parse(datagram).unwrap();
        assert_eq!((header.source_port, header.destination_port), (4500, 4500));
        let after = port.stats();
        assert_eq!(after.keepalive, before.keepalive + 1);
        assert_eq!(after.not_ours, before.not_ours + 1);
        assert_eq!(after.malformed_received, before.malformed_received + 1);
        let mut buffer = [0; 100];
        assert_eq!(ike.recv(&mut buffer).unwrap(), 1);
        assert_eq!(ike.recv(&mut buffer).unwrap(), 18);
        assert_eq!(&buffer[4..18], b"an IKE message");
    }
    assert!(world.receive(&mut port, 1).is_empty());
    assert_eq!(world.pool.available(), 256);
}

/// DP-5: outer addresses, DSCP, ECN, DF and identification leave as they were composed.
#[test]
fn dp_5_packets_leave_as_they_are() {
    let mut world = world();
    let mut port = world.port(&world.near);
    let wire = world.far.within(|| Wire::open("f0"));
    let mut expected = Vec::new();
    for payload in
        [(Protocol::ESP, ESP.to_vec()), (Protocol::AH, ESP.to_vec()), (Protocol::UDP, datagram(&ESP))]
    {
        expected.push(packet_v4(NEAR4, FAR4, payload.0, &payload.1));
        expected.push(packet_v6(NEAR6, FAR6, payload.0, &payload.1));
    }
    for packet in &expected {
        world.transmit(&mut port, packet);
    }
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        let Some(frame) = wire.receive() else { break };
        // What the kernels say to each other beside it (neighbour discovery) has no DSCP.
        let packet = &frame[14..];
        if packet.starts_with(&[0x45, 0xb9]) || packet.starts_with(&[0x6b, 0x91]) {
            seen.push(packet.to_vec());
        }
    }
    seen.sort();
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(port.stats(), PortStats::default());
}

/// DP-1: ESP and AH without UDP, over both families, from one such port to another.
#[test]
fn dp_1_esp_and_ah_are_taken() {
    let mut world = world();
    let (mut near, mut far) = (world.port(&world.near), world.port(&world.far));
    for protocol in [Protocol::ESP, Protocol::AH] {
        let packet = packet_v4(FAR4, NEAR4, protocol, &ESP);
        world.transmit(&mut far, &packet);
        assert_eq!(world.receive(&mut near, 1), [packet]);
        let mut packet = packet_v6(FAR6, NEAR6, protocol, &ESP);
        world.transmit(&mut far, &packet);
        // The flow label is lost, as the module says.
        packet[1] &= 0xf0;
        [packet[2], packet[3]] = [0, 0];
        assert_eq!(world.receive(&mut near, 1), [packet]);
    }
    // A batch's worth at once.
    for _ in 0..100 {
        let packet = packet_v4(FAR4, NEAR4, Protocol::ESP, &ESP);
        world.transmit(&mut far, &packet);
    }
    assert_eq!(world.receive(&mut near, 100).len(), 100);
    near.drain(&world.arena, &mut world.pool);
    assert_eq!(world.pool.available(), 256);
}

/// DP-6: what cannot be sent is counted, and its frame returns.
#[test]
fn dp_6_refusals_are_counted() {
    let mut world = world();
    let mut port = world.port(&world.near);
    world.transmit(&mut port, &packet_v4(NEAR4, FAR4, Protocol::ESP, &[0; 1481]));
    world.transmit(&mut port, &packet_v6(NEAR6, FAR6, Protocol::ESP, &[0; 1461]));
    assert_eq!(port.stats().too_big, 2);
    world.transmit(&mut port, &[]);
    world.transmit(&mut port, &[0x45; 19]);
    world.transmit(&mut port, &[0xff; 100]);
    assert_eq!(port.stats().malformed, 3);
    world.transmit(&mut port, &packet_v4(NEAR4, Ipv4Addr::new(198, 51, 100, 1), Protocol::ESP, &ESP));
    assert_eq!(port.stats().refused, 1);
    assert_eq!(world.pool.available(), 256);
}

/// Without an IKE daemon the port is held, so that the kernel does not refuse the peer's packets; with one, that is told.
#[test]
fn ops_1_the_udp_port_is_held_or_shared() {
    let mut world = world();
    let mut port = world.port(&world.near);
    let peer = open_udp(&world.far, FAR4, 4500);
    peer.connect((NEAR4, 4500)).unwrap();
    peer.send(&ESP).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(peer.recv(&mut buffer).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);

    let held = world.near.within(|| HeldPort::take(4500).unwrap());
    peer.send(&ESP).unwrap();
    assert_eq!(peer.recv(&mut buffer).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(world.receive(&mut port, 2).len(), 2);

    drop(held);
    let _ike = open_udp(&world.near, Ipv4Addr::UNSPECIFIED, 4500);
    let error = world.near.within(|| HeldPort::take(4500).err().unwrap());
    assert!(matches!(error, SocketError::PortTaken(4500)), "{error}");
}
