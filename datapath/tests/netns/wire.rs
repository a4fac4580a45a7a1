//! The bare wire at the other end of a veth pair.

#![allow(dead_code, reason = "each test file uses a part")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A packet socket on an interface of the caller's namespace: the other end of the wire.
pub struct Wire(OwnedFd);

impl Wire {
    /// On this interface of the caller's namespace.
    pub fn open(interface: &str) -> Self {
        let protocol = 3_u16.to_be(); // ETH_P_ALL
        // JUSTIFICATION: packet socket addresses have no safe wrapper among our dependencies.
        // SAFETY: plain system calls on a new descriptor and a zero-filled address that lives through the call.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol));
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let socket = OwnedFd::from_raw_fd(fd);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
            address.sll_protocol = protocol;
            address.sll_ifindex = i32::try_from(index(interface)).unwrap();
            let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
            assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length), 0);
            rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 32 << 20).unwrap();
            Self(socket)
        }
    }

    /// Puts a packet on the wire.
    pub fn send(&self, packet: &[u8]) {
        assert_eq!(
            rustix::net::send(&self.0, packet, rustix::net::SendFlags::empty()).unwrap(),
            packet.len()
        );
    }

    /// The next packet, waiting up to a second.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        if poll(&mut fds, Some(&second)).unwrap() == 0 {
            return None;
        }
        let mut buffer = vec![0xa5; 4096];
        let (length, _) = rustix::net::recv(&self.0, &mut buffer, rustix::net::RecvFlags::empty()).unwrap();
        buffer.truncate(length);
        Some(buffer)
    }
}

/// Index of an interface of the caller's namespace.
pub fn index(interface: &str) -> u32 {
    let any =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).unwrap();
    rustix::net::netdevice::name_to_index(any, interface).unwrap()
}
