//! Unix `SOCK_SEQPACKET` sockets on which the messages of [`crate::codec`] travel, one a packet.
//!
//! The kernel keeps message borders and order, says when the other end is gone, and names the other end's user:
//! each side refuses a peer that is neither root nor of its own user, because keys cross here (OPS-4).
//! All descriptors are non-blocking; the calls that wait do so with `poll`, bounded by
//! [`Connection::set_timeout`]. A message that cannot be read ([`TransportError::Codec`]) does not end the connection.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use serde::{Serialize, de::DeserializeOwned};

use crate::codec::{self, Buffer, CodecError, MAX_MESSAGE};

/// Socket buffers in bytes that are asked for, so that many messages can be in flight. Without `CAP_NET_ADMIN`
/// the kernel may grant less (`net.core.wmem_max`), but its default already takes the longest message.
const SOCKET_BUFFER: usize = 8 << 20;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why a message did not pass.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The message could not be read or written; the connection is still good.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The other end closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The other end belongs to a user who has no business here.
    #[error("refused: the other side runs as user {0}, only root and this program's own user may connect")]
    Refused(u32),
    /// Nothing happened within [`Connection::set_timeout`].
    #[error("the other side did not answer in time")]
    TimedOut,
    /// The system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for TransportError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

/// What [`Connection::wait`] waits for, and what it found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// A message, or the end of the connection, can be received.
    pub receive: bool,
    /// There is room to send.
    pub send: bool,
}

/// The listening socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file, so that another program's successor at the same path stays.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path` with mode 0600; makes the directory (mode 0700) if it is not there. A file that a dead
    /// program left behind is replaced; while somebody answers on it this is an `AddrInUse`.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        remove_stale(path, SocketType::SEQPACKET)?;
        let socket = new_socket()?;
        // The file takes its mode from the socket at `bind`, so that it is at no time open to others.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let metadata = fs::symlink_metadata(path)?;
        let listener = Self { socket, path: path.to_owned(), file: (metadata.dev(), metadata.ino()) };
        rustix::net::listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }

    /// Waits for the next connection. [`TransportError::Refused`] concerns that one connection, which is closed.
    pub fn accept(&self) -> Result<Connection, TransportError> {
        loop {
            if let Some(connection) = self.try_accept()? {
                return Ok(connection);
            }
            poll_one(self.socket.as_fd(), PollFlags::IN, None)?;
        }
    }

    /// The next connection, or `None` while there is none.
    pub fn try_accept(&self) -> Result<Option<Connection>, TransportError> {
        match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Connection::checked(socket).map(Some),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file) {
            // Nobody is left to tell if this fails; the next start replaces the file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    timeout: Option<Duration>,
    /// Messages pass through here and are wiped at once: they may hold keys.
    buffer: WipedBuffer,
}

impl Connection {
    /// Connects to the program that listens at `path`. `ConnectionRefused` and `NotFound` mean that there is none.
    pub fn connect(path: &Path) -> Result<Self, TransportError> {
        let socket = new_socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::checked(socket)
    }

    /// Two ends that are connected to each other, for tests.
    pub fn pair() -> Result<(Self, Self), TransportError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self::checked(a)?, Self::checked(b)?))
    }

    /// Bounds how long [`send`](Self::send) and [`receive`](Self::receive) wait; `None`, the default, is for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// Sends `message`, waiting for room.
    pub fn send<T: Serialize>(&mut self, message: &T) -> Result<(), TransportError> {
        let deadline = self.deadline();
        codec::encode(message, &mut self.buffer.0)?;
        let outcome = loop {
            match self.transmit() {
                Ok(true) => break Ok(()),
                Ok(false) => {}
                Err(error) => break Err(error),
            }
            if let Err(error) = poll_one(self.socket.as_fd(), PollFlags::OUT, deadline) {
                break Err(error);
            }
        };
        codec::wipe(&mut self.buffer.0);
        outcome
    }

    /// Sends `message` if there is room; `false` if there is none now.
    pub fn try_send<T: Serialize>(&mut self, message: &T) -> Result<bool, TransportError> {
        codec::encode(message, &mut self.buffer.0)?;
        let outcome = self.transmit();
        codec::wipe(&mut self.buffer.0);
        outcome
    }

    /// Waits for the next message. [`TransportError::Closed`] when the other end is gone.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<T, TransportError> {
        let deadline = self.deadline();
        loop {
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            poll_one(self.socket.as_fd(), PollFlags::IN, deadline)?;
        }
    }

    /// The next message, or `None` while there is none.
    pub fn try_receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, TransportError> {
        self.buffer.0.resize(MAX_MESSAGE, 0);
        // With TRUNC the kernel tells the true length of a message that was longer than the buffer.
        let received = loop {
            match rustix::net::recv(&self.socket, self.buffer.0.as_mut_slice(), RecvFlags::TRUNC) {
                Err(Errno::INTR) => {}
                outcome => break outcome.map(|(_, length)| length),
            }
        };
        match received {
            Ok(0) => Err(TransportError::Closed),
            Ok(length) => {
                let message = match self.buffer.0.get(..length) {
                    Some(bytes) => codec::decode(bytes),
                    None => Err(CodecError::TooLong),
                };
                // Only what arrived can hold a key: wiping the rest would cost more than the message itself.
                self.buffer.0.truncate(length);
                codec::wipe(&mut self.buffer.0);
                Ok(Some(message?))
            }
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until one of the things in `interest` is there or `timeout` is over (`None`: for ever).
    pub fn wait(&self, interest: Ready, timeout: Option<Duration>) -> Result<Ready, TransportError> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.receive);
        flags.set(PollFlags::OUT, interest.send);
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let found = match poll_one(self.socket.as_fd(), flags, deadline) {
            Err(TransportError::TimedOut) => return Ok(Ready::default()),
            found => found?,
        };
        let ended = found.intersects(PollFlags::HUP | PollFlags::ERR);
        Ok(Ready {
            receive: interest.receive && (ended || found.contains(PollFlags::IN)),
            send: interest.send && (ended || found.contains(PollFlags::OUT)),
        })
    }

    /// Takes over a connected socket if its other end may be spoken to.
    fn checked(socket: OwnedFd) -> Result<Self, TransportError> {
        let uid = sockopt::socket_peercred(&socket)?.uid;
        if !uid.is_root() && uid != rustix::process::geteuid() {
            return Err(TransportError::Refused(uid.as_raw()));
        }
        raise_buffers(&socket);
        Ok(Self { socket, timeout: None, buffer: WipedBuffer(codec::buffer()) })
    }

    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| Instant::now() + timeout)
    }

    /// Sends what is in the buffer; `false` if there is no room now.
    fn transmit(&self) -> Result<bool, TransportError> {
        loop {
            match rustix::net::send(&self.socket, &self.buffer.0, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(true),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Removes the socket file at `path` if nobody answers on it; `AddrInUse` if somebody does. What is no socket stays.
pub fn remove_stale(path: &Path, kind: SocketType) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        Err(Errno::NOENT) => Ok(()),
        // Connected, its queue full, or of another type: somebody is there.
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another program answers on this socket")),
    }
}

/// A [`Buffer`] whose `Debug` shows no byte.
struct WipedBuffer(Buffer);

impl core::fmt::Debug for WipedBuffer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Buffer(..)")
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok(socket)
}

/// Raises both buffers as far as the kernel lets this process; less only means fewer messages in flight.
fn raise_buffers(socket: &OwnedFd) {
    if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER);
    }
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER);
    }
}

/// Waits for `flags` on `fd` until `deadline`.
fn poll_one(
    fd: BorrowedFd<'_>,
    flags: PollFlags,
    deadline: Option<Instant>,
) -> Result<PollFlags, TransportError> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Err(TransportError::TimedOut),
            Ok(_) => {
                let [found] = &fds;
                return Ok(found.revents());
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::request::{Operation, Reply, Request};
    use crate::sa::SaId;

    /// A directory of this test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pt-contract-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn messages_pass_both_ways_and_the_end_is_seen() {
        let scratch = Scratch::new("pass");
        let path = scratch.0.join("sub/datapath.sock");
        let listener = Listener::bind(&path).unwrap();
        assert!(listener.try_accept().unwrap().is_none());
        let mut client = Connection::connect(&path).unwrap();
        let mut server = listener.accept().unwrap();
        client.send(&Request::Status).unwrap();
        assert_eq!(server.receive::<Request>().unwrap(), Request::Status);
        assert!(server.try_receive::<Request>().unwrap().is_none());
        server.send(&Reply::Rejected("no".into())).unwrap();
        assert_eq!(client.receive::<Reply>().unwrap(), Reply::Rejected("no".into()));
        drop(server);
        assert!(matches!(client.receive::<Reply>(), Err(TransportError::Closed)));
        assert!(matches!(client.send(&Request::Status), Err(TransportError::Closed)));
    }

    /// OPS-4: the socket and its directory are private, and the file goes with the listener.
    #[test]
    fn ops_4_files_are_private_and_go_away() {
        let scratch = Scratch::new("private");
        let path = scratch.0.join("sub/datapath.sock");
        let listener = Listener::bind(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
    }

    /// After kill -9 the file stays; the next start must not fail on it.
    #[test]
    fn stale_socket_is_replaced_and_other_files_are_not() {
        let scratch = Scratch::new("stale");
        let path = scratch.0.join("datapath.sock");
        let mut dead = Listener::bind(&path).unwrap();
        dead.path = PathBuf::new(); // so that its drop leaves the file, as a killed process does
        drop(dead);
        assert!(path.exists());
        let listener = Listener::bind(&path).unwrap();
        drop(listener);

        fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn longest_messages_pass_with_many_in_flight() {
        let (mut a, mut b) = Connection::pair().unwrap();
        let long = Reply::Rejected("x".repeat(MAX_MESSAGE - 16));
        let mut sent = 0_u32;
        while sent < 100 && a.try_send(&long).unwrap() {
            sent += 1;
        }
        assert!(sent >= 1);
        for _ in 0..sent {
            assert_eq!(b.receive::<Reply>().unwrap(), long);
        }
    }

    #[test]
    fn unreadable_message_leaves_the_connection_open() {
        let (mut a, mut b) = Connection::pair().unwrap();
        rustix::net::send(&a.socket, b"garbage", SendFlags::empty()).unwrap();
        a.send(&Request::Apply { token: 7, operations: vec![Operation::RemoveSa(SaId(1))] }).unwrap();
        assert!(matches!(b.receive::<Request>(), Err(TransportError::Codec(CodecError::NotContract))));
        assert!(matches!(b.receive::<Request>(), Ok(Request::Apply { token: 7, .. })));
    }

    #[test]
    fn oversized_message_is_refused_not_cut() {
        let (a, mut b) = Connection::pair().unwrap();
        rustix::net::send(&a.socket, &vec![0; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert!(matches!(b.receive::<Request>(), Err(TransportError::Codec(CodecError::TooLong))));
    }

    #[test]
    fn waiting_ends_in_time() {
        let (mut a, _b) = Connection::pair().unwrap();
        a.set_timeout(Some(Duration::from_millis(20)));
        assert!(matches!(a.receive::<Reply>(), Err(TransportError::TimedOut)));
        let ready = a.wait(Ready { receive: true, send: true }, Some(Duration::from_secs(5))).unwrap();
        assert_eq!(ready, Ready { receive: false, send: true });
    }
}
