//! UDP sockets of IKE: ports 500 and 4500, IPv4 and IPv6.
//!
//! - Of each datagram the local address is known, and chosen when one is sent (`IP_PKTINFO`, `IPV6_RECVPKTINFO`), so one
//!   socket a family and port serves all addresses, those that come later included. With configured addresses each has
//!   its own.
//! - On port 4500 the non-ESP marker is added and removed here (RFC 3948 section 2.2). The datapath takes ESP in UDP
//!   before it comes here; what it missed is counted and dropped, as are keepalives (section 2.3). The kernel has no part
//!   in ESP, so the sockets are ordinary ones, without `UDP_ENCAP`.
//! - Path MTU discovery is off: IKE fragments its messages by itself (RFC 7383), and what is still too large for some
//!   link the network may fragment (RFC 7296 section 2).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::task::Poll;

use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrIn, SockaddrIn6, SockaddrStorage,
    recvmsg, sendmmsg, sendmsg, setsockopt, sockopt as options,
};
use postern_ike::output::Path;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::config::ike::Listen;

/// Largest datagram that is read. IKE messages are far shorter; longer ones arrive cut and fail the length check.
pub const LARGEST: usize = 65_535;

/// RFC 3948 section 2.2: "four zero bytes aligning with the SPI field of an ESP packet".
const NON_ESP_MARKER: [u8; 4] = [0; 4];

/// RFC 3948 section 2.3.
const KEEPALIVE: [u8; 1] = [0xff];

/// Receive buffer that is asked for: some thousands of first messages may arrive while a signature is made elsewhere.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Why IKE cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another program has the port.
    #[error("UDP port {port} of {address} is taken; does another IKE daemon run here?")]
    Taken {
        /// Address.
        address: IpAddr,
        /// Port.
        port: u16,
    },
    /// Ports below 1024 are for root.
    #[error("no permission to listen on UDP port {0}: run as root or with CAP_NET_BIND_SERVICE")]
    Permission(u16),
    /// Something else.
    #[error("UDP port {port} of {address}: {error}")]
    Io {
        /// Address.
        address: IpAddr,
        /// Port.
        port: u16,
        /// What the system said.
        error: io::Error,
    },
}

/// What the sockets count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketCounters {
    /// Datagrams received, those below included.
    pub received: u64,
    /// Keepalives.
    pub keepalives: u64,
    /// ESP in UDP that the datapath missed.
    pub esp: u64,
    /// Datagrams on port 4500 too short for a marker.
    pub short: u64,
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that could not be sent: no route, no such local address, a firewall, a full buffer.
    pub unsent: u64,
}

/// All sockets.
#[derive(Debug)]
pub struct Sockets {
    all: Vec<IkeSocket>,
    counters: SocketCounters,
    /// The last reason why something could not be sent, until it is [asked for](Self::trouble).
    trouble: Option<(SocketAddr, io::Error)>,
}

#[derive(Debug)]
struct IkeSocket {
    socket: UdpSocket,
    /// Bound to; unspecified for all addresses of the family.
    address: IpAddr,
    port: u16,
    natt: bool,
}

/// A datagram that was read.
#[derive(Debug)]
pub enum Received<'b> {
    /// An IKE message without marker.
    Message(Path, &'b [u8]),
    /// Something else, which was counted.
    Other,
    /// Nothing is left.
    Nothing,
}

impl Sockets {
    /// Opens them; needs a tokio runtime. A machine without IPv6 is no error, unless an IPv6 address is configured.
    pub fn open(listen: &Listen) -> Result<Self, SocketError> {
        let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        let addresses = if listen.addresses.is_empty() { &all[..] } else { &listen.addresses };
        let mut sockets = Vec::new();
        for address in addresses {
            for (port, natt) in [(listen.port, false), (listen.nat_port, true)] {
                let socket = match open(*address, port) {
                    Ok(socket) => socket,
                    Err(error) if address.is_ipv6() && address.is_unspecified() && lacks_ipv6(&error) => {
                        continue;
                    }
                    Err(error) => return Err(explain(*address, port, error)),
                };
                sockets.push(IkeSocket { socket, address: *address, port, natt });
            }
        }
        Ok(Self { all: sockets, counters: SocketCounters::default(), trouble: None })
    }

    /// What was counted.
    pub const fn counters(&self) -> SocketCounters {
        self.counters
    }

    /// Why something could not be sent, if that happened since the last question.
    pub fn trouble(&mut self) -> Option<(SocketAddr, io::Error)> {
        self.trouble.take()
    }

    /// Waits until one of them can be read, and tells which. May be abandoned.
    pub async fn ready(&self) -> usize {
        core::future::poll_fn(|context| {
            for (index, socket) in self.all.iter().enumerate() {
                // An error would be told by the read as well.
                if socket.socket.poll_recv_ready(context).is_ready() {
                    return Poll::Ready(index);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Reads one datagram of socket `index`, if there is one.
    pub fn receive<'b>(&mut self, index: usize, buffer: &'b mut [u8]) -> Received<'b> {
        let Some(IkeSocket { socket, port, natt, .. }) = self.all.get(index) else {
            return Received::Nothing;
        };
        let read = socket.try_io(Interest::READABLE, || read(socket, *port, buffer));
        let (local, remote, length) = match read {
            Ok(Some(found)) => found,
            Ok(None) => return Received::Other,
            // Anything but "nothing there" is about an earlier datagram of ours, which is sent again in time.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Received::Other,
            Err(_) => return Received::Nothing,
        };
        self.counters.received += 1;
        let datagram = buffer.get(..length).unwrap_or_default();
        let path = Path { local, remote, natt: *natt };
        if !natt {
            return Received::Message(path, datagram);
        }
        match datagram.split_first_chunk::<4>() {
            Some((&NON_ESP_MARKER, message)) => return Received::Message(path, message),
            Some(_) => self.counters.esp += 1,
            None if datagram == KEEPALIVE => self.counters.keepalives += 1,
            None => self.counters.short += 1,
        }
        Received::Other
    }

    /// Sends an IKE message. What cannot be sent is counted: whoever needs it to arrive sends it again.
    pub fn send(&mut self, path: &Path, message: &[u8]) {
        let marker: &[u8] = if path.natt { &NON_ESP_MARKER } else { &[] };
        self.transmit(path, [marker, message]);
    }

    /// Sends a keepalive (RFC 3948 section 2.3).
    pub fn keepalive(&mut self, path: &Path) {
        self.transmit(path, [&KEEPALIVE, &[]]);
    }

    /// Sends many IKE messages with few calls of the system. Gives how many are done with, sent or not: fewer than all if
    /// the system takes no more for now.
    pub fn send_many(&mut self, messages: &[(Path, Vec<u8>)]) -> usize {
        let mut rest = messages;
        while let Some(((path, message), others)) = rest.split_first() {
            let alike = |(other, _): &&(Path, Vec<u8>)| {
                (other.natt, other.local.ip()) == (path.natt, path.local.ip()) && other.remote.is_ipv4()
            };
            let group = rest.iter().take_while(alike).count();
            if group < 2 {
                self.send(path, message);
                rest = others;
                continue;
            }
            let (group, _) = rest.split_at(group);
            match self.transmit_many(path, group) {
                Ok(sent) => {
                    self.counters.sent += u64::try_from(sent).unwrap_or(u64::MAX);
                    rest = rest.get(sent.max(1)..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It is about the first; without it the others can go.
                Err(error) => {
                    self.counters.unsent += 1;
                    self.trouble = Some((path.remote, error));
                    rest = others;
                }
            }
        }
        messages.len() - rest.len()
    }

    /// Messages that leave from the same address and port, IPv4.
    fn transmit_many(&self, path: &Path, messages: &[(Path, Vec<u8>)]) -> io::Result<usize> {
        let socket = self.socket_for(path).ok_or_else(no_socket)?;
        let IpAddr::V4(local) = path.local.ip() else { return Err(no_socket()) };
        let marker: &[u8] = if path.natt { &NON_ESP_MARKER } else { &[] };
        let slices: Vec<[IoSlice<'_>; 2]> =
            messages.iter().map(|(_, message)| [IoSlice::new(marker), IoSlice::new(message)]).collect();
        let to = |(path, _): &(Path, Vec<u8>)| match path.remote {
            SocketAddr::V4(remote) => Some(SockaddrIn::from(remote)),
            SocketAddr::V6(_) => None,
        };
        let addresses: Vec<Option<SockaddrIn>> = messages.iter().map(to).collect();
        let source = libc::in_addr { s_addr: u32::from(local).to_be() };
        let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: source };
        let control = [ControlMessage::Ipv4PacketInfo(&info)];
        let (control, space) = if local.is_unspecified() {
            (&[][..], None)
        } else {
            (&control[..], Some(nix::cmsg_space!(libc::in_pktinfo)))
        };
        let mut headers = MultiHeaders::preallocate(messages.len(), space);
        let fd = socket.socket.as_fd().as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let sent = sendmmsg(fd, &mut headers, &slices, &addresses, control, flags)?;
        Ok(sent.count())
    }

    /// The socket that a message leaves from.
    fn socket_for(&self, path: &Path) -> Option<&IkeSocket> {
        let (local, family) = (path.local.ip(), path.remote.is_ipv4());
        self.all.iter().find(|socket| {
            socket.natt == path.natt
                && socket.address.is_ipv4() == family
                && (socket.address.is_unspecified() || socket.address == local)
        })
    }

    fn transmit(&mut self, path: &Path, parts: [&[u8]; 2]) {
        let local = path.local.ip();
        let sent = match self.socket_for(path) {
            Some(IkeSocket { socket, .. }) => {
                let attempt = || write(socket, local, path.remote, parts);
                match socket.try_io(Interest::WRITABLE, attempt) {
                    // tokio has not seen the socket writable yet; it mostly is.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => attempt(),
                    result => result,
                }
            }
            None => Err(no_socket()),
        };
        match sent {
            Ok(()) => self.counters.sent += 1,
            Err(error) => {
                self.counters.unsent += 1;
                self.trouble = Some((path.remote, error));
            }
        }
    }
}

fn open(address: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address((address, port).into()), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv4() {
        setsockopt(&socket, options::Ipv4PacketInfo, &true)?;
        sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?;
        // A configured address may appear later (DHCP, a standby address).
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        setsockopt(&socket, options::Ipv6RecvPacketInfo, &true)?;
        sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DONT)?;
        socket.set_freebind_v6(true)?;
    }
    if setsockopt(&socket, options::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        // Without CAP_NET_ADMIN the kernel's own limit holds.
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    socket.bind(&SocketAddr::new(address, port).into())?;
    UdpSocket::from_std(socket.into())
}

fn no_socket() -> io::Error {
    io::Error::new(io::ErrorKind::AddrNotAvailable, "no socket listens on the local address")
}

fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

fn explain(address: IpAddr, port: u16, error: io::Error) -> SocketError {
    match error.kind() {
        io::ErrorKind::AddrInUse => SocketError::Taken { address, port },
        io::ErrorKind::PermissionDenied => SocketError::Permission(port),
        _ => SocketError::Io { address, port, error },
    }
}

/// One datagram: where it went to, where it came from, its length. `None`: the kernel did not say where it went to.
fn read(
    socket: &UdpSocket,
    port: u16,
    buffer: &mut [u8],
) -> io::Result<Option<(SocketAddr, SocketAddr, usize)>> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_fd().as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let remote = message.address.and_then(|address| from_storage(&address));
    let local = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr))),
        _ => None,
    });
    Ok(local.zip(remote).map(|(local, remote)| (SocketAddr::new(local, port), remote, message.bytes)))
}

fn write(socket: &UdpSocket, local: IpAddr, remote: SocketAddr, parts: [&[u8]; 2]) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    let [first, second] = parts;
    let parts = [IoSlice::new(first), IoSlice::new(second)];
    let flags = MsgFlags::MSG_DONTWAIT;
    match (local, remote) {
        (IpAddr::V4(local), SocketAddr::V4(remote)) => {
            let source = libc::in_addr { s_addr: u32::from(local).to_be() };
            let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: source };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            let control = if local.is_unspecified() { &[][..] } else { &control[..] };
            sendmsg(fd, &parts, control, flags, Some(&SockaddrIn::from(remote)))?;
        }
        (IpAddr::V6(local), SocketAddr::V6(remote)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: local.octets() },
                ipi6_ifindex: remote.scope_id(),
            };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            let control = if local.is_unspecified() { &[][..] } else { &control[..] };
            sendmsg(fd, &parts, control, flags, Some(&SockaddrIn6::from(remote)))?;
        }
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "addresses of two families")),
    }
    Ok(())
}

fn from_storage(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddr::V4(SocketAddrV4::from(*address)));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::V6(SocketAddrV6::from(*address))))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket as Plain;
    use std::time::Duration;

    use super::*;

    /// Sockets on ports that nothing else has.
    fn sockets(addresses: &[&str]) -> (Sockets, u16, u16) {
        for attempt in 0..50_u16 {
            let port =
                20_000 + (u16::try_from(std::process::id() % 10_000).unwrap() + attempt * 101) * 2 % 20_000;
            let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
            let listen = Listen { addresses, port, nat_port: port + 1 };
            if let Ok(sockets) = Sockets::open(&listen) {
                return (sockets, port, port + 1);
            }
        }
        panic!("no free ports");
    }

    async fn next(sockets: &mut Sockets) -> Option<(Path, Vec<u8>)> {
        let mut buffer = vec![0xa5; LARGEST];
        loop {
            let index = tokio::time::timeout(Duration::from_secs(5), sockets.ready()).await.unwrap();
            match sockets.receive(index, &mut buffer) {
                Received::Message(path, message) => return Some((path, message.to_vec())),
                Received::Other => return None,
                Received::Nothing => {}
            }
        }
    }

    /// IKE-1: RFC 3948 section 2.2; the address that a datagram came to is the one that the answer leaves from.
    #[tokio::test]
    async fn ike_1_addresses_and_markers() {
        let (mut sockets, port, nat_port) = sockets(&[]);
        let peer = Plain::bind("127.0.0.9:0").unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = [0xa5; 64];

        peer.send_to(b"hello", ("127.0.0.5", port)).unwrap();
        let (path, message) = next(&mut sockets).await.unwrap();
        assert_eq!(message, b"hello");
        assert_eq!((path.local, path.natt), (SocketAddr::from(([127, 0, 0, 5], port)), false));
        assert_eq!(path.remote, peer.local_addr().unwrap());
        sockets.send(&path, b"there");
        let (length, from) = peer.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from), (&b"there"[..], path.local));

        peer.send_to(b"\0\0\0\0natt", ("127.0.0.6", nat_port)).unwrap();
        let (path, message) = next(&mut sockets).await.unwrap();
        assert_eq!(message, b"natt");
        assert_eq!((path.local, path.natt), (SocketAddr::from(([127, 0, 0, 6], nat_port)), true));
        sockets.send(&path, b"yes");
        let (length, from) = peer.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from), (&b"\0\0\0\0yes"[..], path.local));
        sockets.keepalive(&path);
        let (length, _) = peer.recv_from(&mut answer).unwrap();
        assert_eq!(&answer[..length], b"\xff");

        for other in [&b"\xff"[..], b"\0\0\x10\x01esp", b"\0\0"] {
            peer.send_to(other, ("127.0.0.6", nat_port)).unwrap();
            assert_eq!(next(&mut sockets).await, None);
        }
        let SocketCounters { received, keepalives, esp, short, sent, unsent } = sockets.counters();
        assert_eq!((received, keepalives, esp, short, sent, unsent), (5, 1, 1, 1, 3, 0));
    }

    /// RST-9: many messages in one call, each to its own peer, with markers; one that cannot be sent holds up no other.
    #[tokio::test]
    async fn rst_9_many_at_once() {
        let (mut sockets, port, nat_port) = sockets(&[]);
        let peers: Vec<Plain> = (0..20).map(|_| Plain::bind("127.0.0.9:0").unwrap()).collect();
        for natt in [false, true] {
            let local = SocketAddr::from(([127, 0, 0, 5], if natt { nat_port } else { port }));
            let mut batch: Vec<(Path, Vec<u8>)> = peers
                .iter()
                .map(|peer| (Path { local, remote: peer.local_addr().unwrap(), natt }, vec![b'x'; 30]))
                .collect();
            // Port 0 is nobody's.
            batch.insert(5, (Path { local, remote: ([127, 0, 0, 9], 0).into(), natt }, vec![1]));
            batch.insert(0, (Path { local, remote: ([127, 0, 0, 9], 0).into(), natt }, vec![1]));
            let before = sockets.counters();
            assert_eq!(sockets.send_many(&batch), batch.len());
            let after = sockets.counters();
            assert_eq!((after.sent - before.sent, after.unsent - before.unsent), (20, 2));
            for peer in &peers {
                peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut buffer = [0xa5; 64];
                let (length, from) = peer.recv_from(&mut buffer).unwrap();
                assert_eq!((length, from), (if natt { 34 } else { 30 }, local));
                assert_eq!(natt, buffer.starts_with(&NON_ESP_MARKER));
            }
        }
    }

    /// IKE-1: the same over IPv6.
    #[tokio::test]
    async fn ike_1_ipv6() {
        let Ok(peer) = Plain::bind("[::1]:0") else { return };
        let (mut sockets, port, _) = sockets(&[]);
        peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        peer.send_to(b"hello", ("::1", port)).unwrap();
        let (path, message) = next(&mut sockets).await.unwrap();
        assert_eq!((message, path.local), (b"hello".to_vec(), SocketAddr::from((Ipv6Addr::LOCALHOST, port))));
        sockets.send(&path, b"there");
        let mut answer = [0xa5; 64];
        let (length, from) = peer.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from), (&b"there"[..], path.local));
    }

    /// IKE-1: only configured addresses are listened on; what cannot be sent is counted and said, and a taken port explained.
    #[tokio::test]
    async fn ike_1_configured_addresses() {
        let (mut sockets, port, nat_port) = sockets(&["127.0.0.7"]);
        let second = Sockets::open(&Listen { addresses: vec![[127, 0, 0, 7].into()], port, nat_port });
        let error = second.unwrap_err().to_string();
        assert!(error.contains("another IKE daemon"), "{error}");
        let other = Sockets::open(&Listen { addresses: vec![[127, 0, 0, 8].into()], port, nat_port });
        assert!(other.is_ok());
        let local = SocketAddr::from(([127, 0, 0, 8], port));
        sockets.send(&Path { local, remote: local, natt: false }, b"x");
        assert_eq!(sockets.counters().unsent, 1);
        assert_eq!(sockets.trouble().unwrap().0, local);
        assert!(sockets.trouble().is_none());
    }
}
