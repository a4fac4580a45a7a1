//! Raw sockets: IPsec of a host that is no appliance, beside the kernel's own stack.
//!
//! Contract: frames begin with the IP header, both ways.
//! - Received are whole packets of protocol 50 (ESP) and 51 (AH), and of UDP to the NAT-T port when they carry ESP (RFC 3948).
//!   The kernel has checked the IP header and put fragments together. Over IPv4 the header is the one that came. Over IPv6 the
//!   kernel gives no header, so the fixed one is made again from what it tells: addresses, traffic class (with ECN) and hop
//!   limit. The flow label is lost and extension headers are left out; AH over a packet that had some does not verify.
//! - Transmitted is the packet as it is, outer addresses, DSCP, ECN and DF included: the kernel only chooses the route and the
//!   neighbour. It does not fragment: a packet larger than the interface takes is counted as too big.
//!
//! **UDP port 4500 is not bound by this port** but read beside whoever has it, so that IKE (control) and ESP share it without
//! knowing of each other: IKE's socket receives what has the non-ESP marker, and discards the rest (with `UDP_ENCAP_ESPINUDP`
//! set the kernel does so for it); this port takes the rest, and counts what has the marker as not its own. While no IKE
//! daemon runs, a [`HeldPort`] keeps the kernel from answering each packet with "port unreachable".
//!
//! Every raw socket gets every packet, so there is one such port in a datapath, and one worker has it. Each packet is a system
//! call, and packets arriving cost one more for asking which sockets have some.

use std::io;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use arrayvec::ArrayVec;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, setsockopt, sockopt};
use postern_wire::ids::Protocol;
use postern_wire::natt::{self, Natt};
use postern_wire::{ip4, ip6, udp};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, SockAddr, SockFilter, Socket, Type};

use super::{LinkKind, Port, PortStats};
use crate::frame::{Arena, BATCH, Frame, MAX_RECEIVE, Pool};

/// How the port is opened.
#[derive(Clone, Copy, Debug)]
pub struct SocketOptions {
    /// UDP port of ESP in UDP; 4500 but for tests and unusual peers.
    pub udp_port: u16,
    /// Firewall mark of transmitted packets, by which the operator keeps them from being routed into the tunnel again.
    pub mark: Option<u32>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self { udp_port: NATT_PORT, mark: None }
    }
}

/// Why the port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// EPERM.
    #[error(
        "no permission to open raw sockets: run as root or with CAP_NET_RAW (and CAP_NET_ADMIN for a mark)"
    )]
    Permission,
    /// EADDRINUSE.
    #[error("UDP port {0} is taken: an IKE daemon has it, so it need not be held")]
    PortTaken(u16),
    /// Anything else.
    #[error("raw sockets: {step}: {source}")]
    Other {
        /// What was asked of the kernel.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// The raw sockets of both families.
#[derive(Debug)]
pub struct SocketPort {
    receivers: ArrayVec<Receiver, RECEIVERS>,
    send_v4: Socket,
    /// `None` on a host without IPv6.
    send_v6: Option<Socket>,
    epoll: OwnedFd,
    control: Vec<u8>,
    udp_port: u16,
    stats: PortStats,
}

#[derive(Debug)]
struct Receiver {
    socket: Socket,
    v6: bool,
    protocol: Protocol,
}

/// What one attempt to receive gave.
enum Received {
    Packet,
    /// There is nothing more.
    Nothing,
    /// Something that is not for a worker; it was counted.
    Refused,
}

/// Two families, three protocols.
const RECEIVERS: usize = 6;
/// Bytes of packets that may wait for the worker, and that may be on their way out.
const BUFFER: usize = 4 << 20;

impl SocketPort {
    /// Opens the sockets in the calling thread's network namespace.
    pub fn open(options: SocketOptions) -> Result<Self, SocketError> {
        let with_v6 = match raw(Domain::IPV6, RAW) {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(failed("IPv6 socket for sending")(error)),
        };
        let send_v4 = raw(Domain::IPV4, RAW).map_err(failed("IPv4 socket for sending"))?;
        for socket in with_v6.iter().chain([&send_v4]) {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(socket, BUFFER);
            if let Some(mark) = options.mark {
                socket.set_mark(mark).map_err(failed("setting the mark"))?;
            }
        }

        let mut receivers = ArrayVec::new();
        let domains =
            [(Domain::IPV4, false)].into_iter().chain(with_v6.is_some().then_some((Domain::IPV6, true)));
        for (domain, v6) in domains {
            for protocol in [Protocol::ESP, Protocol::AH, Protocol::UDP] {
                receivers.extend(Some(Receiver::open(domain, v6, protocol, options.udp_port)?));
            }
        }
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|errno| failed("epoll")(errno.into()))?;
        for (at, receiver) in (0_u64..).zip(&receivers) {
            let data = epoll::EventData::new_u64(at);
            epoll::add(&epoll, &receiver.socket, data, epoll::EventFlags::IN)
                .map_err(|errno| failed("epoll")(errno.into()))?;
        }

        Ok(Self {
            receivers,
            send_v4,
            send_v6: with_v6,
            epoll,
            control: nix::cmsg_space!(libc::in6_pktinfo, libc::c_int, libc::c_int),
            udp_port: options.udp_port,
            stats: PortStats::default(),
        })
    }
}

/// UDP port 4500 (or another), bound by sockets that discard everything, for as long as this lives.
#[derive(Debug)]
pub struct HeldPort {
    _sockets: ArrayVec<Socket, 2>,
}

impl HeldPort {
    /// Binds the port in the calling thread's network namespace; fails with [`SocketError::PortTaken`] if someone has it.
    pub fn take(port: u16) -> Result<Self, SocketError> {
        let mut sockets = ArrayVec::new();
        sockets.extend(Some(hold(Domain::IPV4, port)?));
        match hold(Domain::IPV6, port) {
            Ok(socket) => sockets.extend(Some(socket)),
            // A host without IPv6.
            Err(SocketError::Other { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(Self { _sockets: sockets })
    }
}

/// UDP port of ESP in UDP, and of IKE with it (RFC 3948).
pub const NATT_PORT: u16 = 4500;

/// IPPROTO_RAW: such a socket sends packets that bring their IP header.
const RAW: Protocol = Protocol(255);

fn raw(domain: Domain, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(i32::from(protocol.0).into()))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> SocketError {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => SocketError::Permission,
        _ => SocketError::Other { step, source },
    }
}

/// A socket that has the port and takes nothing: its filter discards each packet before it is queued.
fn hold(domain: Domain, port: u16) -> Result<Socket, SocketError> {
    let socket = Socket::new(domain, Type::DGRAM, None).map_err(failed("UDP socket"))?;
    socket.attach_filter(&[RETURN_NONE]).map_err(failed("filter"))?;
    let address = if domain == Domain::IPV6 {
        socket.set_only_v6(true).map_err(failed("IPv6 only"))?;
        SockAddr::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0))
    } else {
        SockAddr::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))
    };
    socket.bind(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => SocketError::PortTaken(port),
        _ => failed("binding the UDP port")(error),
    })?;
    Ok(socket)
}

// Instructions of the classic packet filter (Documentation/networking/filter): code, jump if true, jump if false, operand.
const RETURN_ALL: SockFilter = SockFilter::new(0x06, 0, 0, u32::MAX);
const RETURN_NONE: SockFilter = SockFilter::new(0x06, 0, 0, 0);

impl Receiver {
    fn open(domain: Domain, v6: bool, protocol: Protocol, udp_port: u16) -> Result<Self, SocketError> {
        let socket = raw(domain, protocol).map_err(failed("socket for receiving"))?;
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER);
        if protocol == Protocol::UDP {
            // A raw UDP socket would get all UDP of the host. The filter sees the IPv4 header, but not the IPv6 one.
            let equal = SockFilter::new(0x15, 0, 1, udp_port.into());
            let filter: &[SockFilter] = if v6 {
                &[SockFilter::new(0x28, 0, 0, 2), equal, RETURN_ALL, RETURN_NONE]
            } else {
                &[
                    SockFilter::new(0xb1, 0, 0, 0),
                    SockFilter::new(0x48, 0, 0, 2),
                    equal,
                    RETURN_ALL,
                    RETURN_NONE,
                ]
            };
            socket.attach_filter(filter).map_err(failed("filter"))?;
        }
        if v6 {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)
                .and_then(|()| setsockopt(&socket, sockopt::Ipv6RecvTClass, &true))
                .and_then(|()| setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true))
                .map_err(|errno| failed("asking for the IPv6 header's fields")(errno.into()))?;
        }
        Ok(Self { socket, v6, protocol })
    }

    /// Receives one packet into an empty frame.
    fn receive(
        &self,
        arena: &Arena,
        frame: &mut Frame,
        control: &mut [u8],
        udp_port: u16,
        stats: &mut PortStats,
    ) -> Received {
        _ = frame.grow_back(MAX_RECEIVE);
        let result =
            if self.v6 { self.receive_v6(arena, frame, control) } else { self.receive_v4(arena, frame) };
        match result {
            Ok(Some(())) => {}
            Ok(None) => {
                stats.too_big += 1;
                return Received::Refused;
            }
            Err(Errno::AGAIN) => return Received::Nothing,
            // An error that an ICMP message left on the socket; the next call is about packets again.
            Err(_) => return Received::Refused,
        }
        if self.protocol != Protocol::UDP {
            return Received::Packet;
        }
        match sort(arena.bytes(frame), udp_port) {
            Some(Natt::Esp) => return Received::Packet,
            Some(Natt::Keepalive) => stats.keepalive += 1,
            Some(Natt::Ike) | None => stats.not_ours += 1,
            Some(Natt::Malformed) => stats.malformed_received += 1,
        }
        Received::Refused
    }

    /// `Ok(None)` if the packet is larger than the frame.
    fn receive_v4(&self, arena: &Arena, frame: &mut Frame) -> Result<Option<()>, Errno> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        let (len, whole) = rustix::net::recv(&self.socket, arena.bytes_mut(frame), flags)?;
        frame.truncate(len);
        Ok((len == whole).then_some(()))
    }

    /// As [`Receiver::receive_v4`], with the header made again.
    fn receive_v6(&self, arena: &Arena, frame: &mut Frame, control: &mut [u8]) -> Result<Option<()>, Errno> {
        _ = frame.shrink_front(ip6::LEN);
        let mut header = ip6::Header {
            source: Ipv6Addr::UNSPECIFIED,
            destination: Ipv6Addr::UNSPECIFIED,
            next_header: self.protocol,
            hop_limit: 0,
            traffic_class: 0,
            flow_label: 0,
        };
        let mut slices = [IoSliceMut::new(arena.bytes_mut(frame))];
        let message = recvmsg::<SockaddrIn6>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(control),
            MsgFlags::MSG_DONTWAIT,
        )
        .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
        if let Some(source) = message.address {
            header.source = source.ip();
        }
        let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
        let (len, whole) = (message.bytes, !message.flags.intersects(cut));
        for part in message.cmsgs().into_iter().flatten() {
            match part {
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    header.destination = info.ipi6_addr.s6_addr.into();
                }
                ControlMessageOwned::Ipv6TClass(class) => header.traffic_class = low_byte(class),
                ControlMessageOwned::Ipv6HopLimit(limit) => header.hop_limit = low_byte(limit),
                _ => {}
            }
        }
        frame.truncate(len);
        _ = frame.grow_front(ip6::LEN);
        Ok(header.emit(arena.bytes_mut(frame), len).filter(|()| whole))
    }
}

/// A header field of one byte, which the kernel tells as an int.
fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}

/// What a packet carries that came by the UDP socket; `None` if it is not to our port. (A few packets may have been queued
/// before the filter was in place.)
fn sort(packet: &[u8], udp_port: u16) -> Option<Natt> {
    let datagram = match packet.first()? >> 4 {
        4 => ip4::View::parse(packet).ok()?.payload(),
        _ => packet.get(ip6::LEN..)?,
    };
    let header = udp::Header::parse(datagram)?;
    (header.destination_port == udp_port)
        .then(|| natt::classify(datagram.get(udp::LEN..).unwrap_or_default()))
}

impl Port for SocketPort {
    fn receive(&mut self, arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        let mut events = [const { MaybeUninit::uninit() }; RECEIVERS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, Some(&now)) else { return };
        // Each socket that has something gets its share of the batch; what is left over is reported again next time.
        let share = out.remaining_capacity().div_ceil(events.len().max(1));
        for event in events {
            let Some(receiver) = usize::try_from(event.data.u64()).ok().and_then(|at| self.receivers.get(at))
            else {
                continue;
            };
            for _ in 0..share.min(out.remaining_capacity()) {
                // Without a frame the packet stays in the socket.
                let Some(mut frame) = pool.take() else { return };
                match receiver.receive(arena, &mut frame, &mut self.control, self.udp_port, &mut self.stats) {
                    Received::Packet => out.extend(Some(frame)),
                    Received::Refused => pool.give(frame),
                    Received::Nothing => {
                        pool.give(frame);
                        break;
                    }
                }
            }
        }
    }

    fn transmit(&mut self, arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let count = frames.len();
        for frame in frames.drain(..) {
            match self.send(arena.bytes(&frame)) {
                Ok(()) => {}
                Err(Errno::MSGSIZE) => self.stats.too_big += 1,
                Err(Errno::INVAL) => self.stats.malformed += 1,
                // No route, no neighbour, a firewall rule, or no memory.
                Err(_) => self.stats.refused += 1,
            }
            pool.give(frame);
        }
        count
    }

    fn flush(&mut self, _arena: &Arena, _pool: &mut Pool) {}

    fn drain(&mut self, _arena: &Arena, _pool: &mut Pool) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn link(&self) -> LinkKind {
        LinkKind::Ip
    }

    fn describe(&self) -> String {
        format!("socket (raw ESP, AH, UDP {})", self.udp_port)
    }

    fn stats(&self) -> PortStats {
        self.stats
    }
}

impl SocketPort {
    fn send(&self, packet: &[u8]) -> Result<(), Errno> {
        let flags = SendFlags::DONTWAIT;
        match packet.first().map(|first| first >> 4) {
            Some(4) => {
                let view = ip4::View::parse(packet).map_err(|_| Errno::INVAL)?;
                rustix::net::sendto(&self.send_v4, packet, flags, &SocketAddrV4::new(view.destination(), 0))?;
            }
            Some(6) => {
                let view = ip6::View::parse(packet).map_err(|_| Errno::INVAL)?;
                let socket = self.send_v6.as_ref().ok_or(Errno::AFNOSUPPORT)?;
                rustix::net::sendto(socket, packet, flags, &SocketAddrV6::new(view.destination(), 0, 0, 0))?;
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn over_udp(port: u16, payload: &[u8]) -> Vec<u8> {
        let header = ip4::Header {
            source: Ipv4Addr::LOCALHOST,
            destination: Ipv4Addr::LOCALHOST,
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0,
            id: 0,
            dont_fragment: true,
        };
        let length = udp::LEN + payload.len();
        let mut packet = vec![0xa5; ip4::MIN_LEN + length];
        header.emit(&mut packet, length).unwrap();
        let length = u16::try_from(length).unwrap();
        let header = udp::Header { source_port: 1, destination_port: port, length, checksum: 0 };
        header.emit(&mut packet[ip4::MIN_LEN..]).unwrap();
        packet[ip4::MIN_LEN + udp::LEN..].copy_from_slice(payload);
        packet
    }

    /// DP-1: ESP in UDP is taken; IKE and keepalives are not.
    #[test]
    fn dp_1_only_esp_is_ours() {
        assert_eq!(sort(&over_udp(4500, &[0, 0, 1, 0, 0, 0, 0, 1]), 4500), Some(Natt::Esp));
        assert_eq!(sort(&over_udp(4500, &[0; 28]), 4500), Some(Natt::Ike));
        assert_eq!(sort(&over_udp(4500, &[0xff]), 4500), Some(Natt::Keepalive));
        assert_eq!(sort(&over_udp(4501, &[0, 0, 1, 0, 0, 0, 0, 1]), 4500), None);
    }

    proptest! {
        /// No packet makes the sorting panic.
        #[test]
        fn sorting_never_panics(packet in prop::collection::vec(any::<u8>(), 0..100), port: u16) {
            let _ = sort(&packet, port);
        }
    }
}
