//! One socket, bound to one queue of one interface.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, SocketAddrXdpWithSharedUmem, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING,
    XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpDesc, XdpDescOptions, XdpOptionsFlags,
    XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::ring::{Consumer, Producer};
use super::umem::{Ledger, Umem};
use crate::frame::{Arena, BATCH, FRAME_SIZE, Frame, Pool};
use crate::port::{LinkKind, Port, PortStats};

/// How a socket is bound.
#[derive(Clone, Copy, Debug)]
pub struct XskOptions {
    /// Use zero-copy if the driver has it; copy otherwise, as [`XskSocket::is_zero_copy`] tells.
    pub zero_copy: bool,
    /// Slots of each ring, a power of two.
    pub ring: u32,
    /// Frames kept lent to the kernel for reception, at most `ring`. All sockets' together should leave the pools some.
    pub fill: u32,
    /// The kernel says when it wants to be called; otherwise it is called in every turn that has something for it.
    pub need_wakeup: bool,
    /// The worker runs the driver's receive loop, in place of interrupts.
    pub busy_poll: Option<BusyPoll>,
}

/// How the driver's receive loop is run by whoever asks the socket for packets (Documentation/networking/napi, "busy
/// polling").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyPoll {
    /// For how long at most, `SO_BUSY_POLL`.
    pub microseconds: u32,
    /// For how many packets at most, `SO_BUSY_POLL_BUDGET`.
    pub budget: u16,
}

impl Default for XskOptions {
    fn default() -> Self {
        Self { zero_copy: true, ring: 2048, fill: 2048, need_wakeup: true, busy_poll: None }
    }
}

impl XskOptions {
    /// The default, with as few frames for reception as it takes to leave the pools half of `frames` when so many sockets
    /// share them.
    #[must_use]
    pub fn for_sockets(self, frames: u32, sockets: u32) -> Self {
        let share = (frames / 2) / sockets.max(1);
        Self { fill: self.fill.min(share.max(1)), ..self }
    }
}

/// Why a socket could not be bound, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    /// No interface has that name here.
    #[error("interface {0}: there is none of this name in this network namespace (see `ip link`)")]
    NoInterface(String),
    /// EBUSY.
    #[error(
        "interface {0} queue {1}: another AF_XDP socket has this queue; stop the program that holds it (see `ss --xdp`), or wait \
         for it to end"
    )]
    QueueBusy(String, u32),
    /// EINVAL on bind.
    #[error(
        "interface {0}: it has no queue {1}; `ethtool -l {0}` shows how many it has and `ethtool -L` sets them"
    )]
    NoQueue(String, u32),
    /// EPERM on making the socket.
    #[error(
        "no permission to make an AF_XDP socket: run as root or with CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF"
    )]
    Permission,
    /// ENOBUFS or ENOMEM on registering the memory.
    #[error(
        "the kernel refuses to lock {0} bytes of packet memory: raise the limit (LimitMEMLOCK=infinity in the service, \
         `ulimit -l unlimited` in a shell), grant CAP_IPC_LOCK, or configure fewer frames"
    )]
    LockedMemory(usize),
    /// EAFNOSUPPORT.
    #[error("this kernel has no AF_XDP: it needs CONFIG_XDP_SOCKETS=y (Linux 5.4 or later)")]
    NoKernelSupport,
    /// The interface is down or went away.
    #[error("interface {0} is down: `ip link set {0} up`")]
    Down(String),
    /// The options of busy polling.
    #[error(
        "interface {0}: the kernel refuses busy polling ({1}); it needs CONFIG_NET_RX_BUSY_POLL, Linux 5.11 and \
         CAP_NET_ADMIN: see to that, or set datapath.busy_poll_us = 0"
    )]
    BusyPoll(String, io::Error),
    /// Ring or fill sizes that cannot be.
    #[error("ring size {0} must be a power of two from 64 to 32768, and fill {1} from 1 to the ring size")]
    Sizes(u32, u32),
    /// Anything else.
    #[error("interface {interface} queue {queue}: {step}: {source}")]
    Other {
        /// Name of the interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// What was asked of the kernel.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// What the kernel counted on a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XskStatistics {
    /// Packets dropped because there was no frame to copy them into, or because they were larger than one.
    pub rx_dropped: u64,
    /// Packets dropped because the receive ring was full: the worker is too slow.
    pub rx_ring_full: u64,
    /// Times the kernel found no frame to receive into: frames are too few.
    pub fill_ring_empty: u64,
    /// Descriptors the kernel would not transmit.
    pub tx_invalid: u64,
}

/// An AF_XDP socket and its four rings.
#[derive(Debug)]
pub struct XskSocket {
    /// `None` once drained.
    open: Option<Open>,
    interface: String,
    queue: u32,
    zero_copy: bool,
    need_wakeup: bool,
    busy_poll: bool,
    /// There is a receive loop to run.
    polled: bool,
    fill_target: usize,
    /// Batches in a row that were full.
    full: u32,
    receiving: Ledger,
    sending: Ledger,
    stats: PortStats,
    /// What the kernel had counted when it was asked last.
    counted: XskStatistics,
}

/// What exists while the socket is open. The mapped rings refer to it in the kernel just as the descriptor does, so it is
/// closed only when all of these are gone.
#[derive(Debug)]
struct Open {
    rx: Consumer<XdpDesc>,
    tx: Producer<XdpDesc>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    socket: Arc<OwnedFd>,
}

/// Full batches after which a queue stands: twice the packets of the longest one.
const STANDING: u32 = 64;
/// Frames lent for reception while it does.
const FILL_STANDING: usize = 512;
/// Kicks in one flush: in copy mode the kernel sends at most 32 frames a kick, and ends each early with EAGAIN.
const KICKS: usize = 8;
/// How long [`XskSocket::drain`] waits for frames being transmitted, in steps of a millisecond.
const DRAIN_STEPS: usize = 100;

/// The kernel frees a queue some time after its socket was closed, when the last reference is collected: a start right after a
/// stop or a crash waits for that.
const BUSY_STEPS: usize = 20;
const BUSY_STEP: Duration = Duration::from_millis(20);

impl XskSocket {
    /// Binds a socket to a queue. Nothing is received before the first [`Port::flush`] (it lends the kernel frames) and before
    /// [`XskSocket::fd`] is in the XDP program's map.
    pub fn bind(umem: &Umem, interface: &str, queue: u32, options: XskOptions) -> Result<Self, XskError> {
        if !(64..=32768).contains(&options.ring)
            || !options.ring.is_power_of_two()
            || !(1..=options.ring).contains(&options.fill)
        {
            return Err(XskError::Sizes(options.ring, options.fill));
        }
        let bind = |zero_copy| Self::bind_in_mode(umem, interface, queue, options, zero_copy);
        for _ in 0..BUSY_STEPS {
            let result = match options.zero_copy.then(|| bind(true)) {
                Some(settled @ (Ok(_) | Err(XskError::QueueBusy(..)))) => settled,
                // What is wrong with the queue or the machine is told by the attempt that wants the least of them.
                Some(Err(_)) | None => bind(false),
            };
            match result {
                Err(XskError::QueueBusy(..)) => sleep(BUSY_STEP),
                settled => return settled,
            }
        }
        Err(XskError::QueueBusy(interface.to_owned(), queue))
    }

    /// The descriptor for the XDP program's map of sockets, and for waiting; `None` once drained. A duplicate of it would keep
    /// the socket alive, and the kernel writing into frames, after [`Port::drain`]: make none.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(|open| open.socket.as_fd())
    }

    /// The queue it is bound to.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Whether the device reads and writes the frames itself.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Whether the worker runs the driver's receive loop. If that was asked for, it does as soon as the kernel knows the
    /// loop: when the socket is bound, or (Linux before 6.14) within a second after the first packet; where the driver has
    /// told the kernel of none, never.
    pub fn is_busy_polled(&self) -> bool {
        self.polled
    }

    /// Frames that the kernel holds.
    pub fn lent(&self) -> usize {
        self.receiving.count() + self.sending.count()
    }

    /// What the kernel counted; `None` once drained.
    pub fn statistics(&self) -> Option<XskStatistics> {
        let counted = sockopt::xdp_statistics(self.fd()?).ok()?;
        Some(XskStatistics {
            rx_dropped: counted.rx_dropped,
            rx_ring_full: counted.rx_ring_full.unwrap_or(0),
            fill_ring_empty: counted.rx_fill_ring_empty_descs.unwrap_or(0),
            tx_invalid: counted.tx_invalid_descs,
        })
    }

    fn bind_in_mode(
        umem: &Umem,
        interface: &str,
        queue: u32,
        options: XskOptions,
        zero_copy: bool,
    ) -> Result<Self, XskError> {
        let other = |step| {
            move |source: io::Error| XskError::Other { interface: interface.to_owned(), queue, step, source }
        };
        let failed = |step| move |errno: Errno| other(step)(errno.into());

        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, flags, None).map_err(|errno| {
                match errno {
                    Errno::PERM | Errno::ACCESS => XskError::Permission,
                    Errno::AFNOSUPPORT => XskError::NoKernelSupport,
                    _ => failed("making the socket")(errno),
                }
            })?;
        // An AF_XDP socket does not answer questions about interfaces; any other does.
        let asked = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
            .map_err(failed("making a socket"))?;
        let index = rustix::net::netdevice::name_to_index(asked, interface)
            .map_err(|_| XskError::NoInterface(interface.to_owned()))?;

        let arena = umem.arena();
        let shared = umem.member(zero_copy, options.need_wakeup);
        if shared.is_none() {
            register(socket.as_fd(), arena).map_err(|errno| match errno {
                Errno::NOBUFS | Errno::NOMEM | Errno::PERM => XskError::LockedMemory(arena.size()),
                _ => failed("registering the packet memory")(errno),
            })?;
        }
        sockopt::set_xdp_umem_fill_ring_size(&socket, options.ring)
            .map_err(failed("making the fill ring"))?;
        sockopt::set_xdp_umem_completion_ring_size(&socket, options.ring)
            .map_err(failed("making the completion ring"))?;
        sockopt::set_xdp_rx_ring_size(&socket, options.ring).map_err(failed("making the receive ring"))?;
        sockopt::set_xdp_tx_ring_size(&socket, options.ring).map_err(failed("making the transmit ring"))?;
        // In copy mode each frame in flight counts against the send buffer, whose default holds fewer than a ring. Where this
        // is not allowed, transmission pauses sooner.
        let _ = sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER);

        if let Some(wanted) = options.busy_poll {
            busy_poll(socket.as_fd(), wanted)
                .map_err(|error| XskError::BusyPoll(interface.to_owned(), error))?;
        }

        // Rings are mapped before the bind: afterwards the kernel refuses.
        let offsets = sockopt::xdp_mmap_offsets(&socket).map_err(failed("asking for the rings' layout"))?;
        let (fd, ring) = (socket.as_fd(), options.ring);
        let mapped = other("mapping the rings");
        let rx = Consumer::map(fd, ring, offsets.rx, XDP_PGOFF_RX_RING).map_err(&mapped)?;
        let tx = Producer::map(fd, ring, offsets.tx, XDP_PGOFF_TX_RING).map_err(&mapped)?;
        let fill = Producer::map(fd, ring, offsets.fr, XDP_UMEM_PGOFF_FILL_RING).map_err(&mapped)?;
        let completion =
            Consumer::map(fd, ring, offsets.cr, XDP_UMEM_PGOFF_COMPLETION_RING).map_err(&mapped)?;

        bind(fd, index, queue, (zero_copy, options.need_wakeup), shared.as_deref()).map_err(|errno| {
            match errno {
                Errno::BUSY => XskError::QueueBusy(interface.to_owned(), queue),
                // Among the sockets of one registration a second one on a queue is EINVAL as well.
                Errno::INVAL if umem.holds(index, queue) => XskError::QueueBusy(interface.to_owned(), queue),
                Errno::INVAL => XskError::NoQueue(interface.to_owned(), queue),
                Errno::NETDOWN => XskError::Down(interface.to_owned()),
                Errno::NOBUFS | Errno::NOMEM => XskError::LockedMemory(arena.size()),
                _ => failed("binding to the queue")(errno),
            }
        })?;
        let granted = sockopt::xdp_options(fd).map_err(failed("asking for the mode"))?;

        let socket = Arc::new(socket);
        let busy_poll = options.busy_poll.is_some();
        umem.join(&socket, (index, queue), zero_copy, options.need_wakeup);
        Ok(Self {
            interface: interface.to_owned(),
            queue,
            zero_copy: granted.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY),
            need_wakeup: options.need_wakeup,
            busy_poll,
            polled: busy_poll && napi(socket.as_fd()).is_some(),
            fill_target: usize::try_from(options.fill).unwrap_or(usize::MAX),
            full: 0,
            receiving: Ledger::new(arena.clone()),
            sending: Ledger::new(arena.clone()),
            stats: PortStats::default(),
            counted: XskStatistics::default(),
            open: Some(Open { rx, tx, fill, completion, socket }),
        })
    }

    /// Frames to lend for reception. Many are there for a burst. Packets that have filled batch after batch are none: the
    /// queue stands, and a longer one makes them older and, as each frame waits for its turn in it, colder; in copy mode,
    /// where no device wants its own ring full as well, few are lent then.
    fn fill_now(&self) -> usize {
        let stands = self.full >= STANDING && !self.zero_copy;
        if stands { self.fill_target.min(FILL_STANDING) } else { self.fill_target }
    }

    /// Lends the kernel frames for reception until it has as many as it should, or the pool has no more.
    fn refill(&mut self, pool: &mut Pool) {
        let target = self.fill_now();
        let Some(Open { fill, socket, .. }) = &mut self.open else { return };
        let before = self.receiving.count();
        while self.receiving.count() < target && fill.free(1) > 0 {
            let Some(frame) = pool.take() else { break };
            match self.receiving.lend(frame) {
                // The kernel wants the chunk and chooses the place in it by itself.
                Ok(address) => _ = fill.push(address - address % (FRAME_SIZE as u64)),
                Err(foreign) => {
                    pool.give(foreign);
                    break;
                }
            }
        }
        if self.receiving.count() > before {
            fill.submit();
        }
        if fill.needs_wakeup() {
            // Receives nothing: it makes the driver look at the fill ring. It cannot fail in a way that matters here.
            let _ = rustix::net::recv(socket, &mut [0_u8; 0], RecvFlags::DONTWAIT);
        }
    }

    /// Makes the kernel send what is in the transmit ring.
    fn kick(&mut self) {
        let Some(Open { tx, socket, .. }) = &self.open else { return };
        let mut pending = tx.pending();
        for _ in 0..KICKS {
            if pending == 0 || (self.need_wakeup && !tx.needs_wakeup()) {
                return;
            }
            match rustix::net::send(socket, &[], SendFlags::DONTWAIT) {
                // EAGAIN: the share of this kick is used up, or there is no room further down. EBUSY, ENOBUFS: the device
                // refused one frame, which is lost; the rest is not.
                Err(Errno::AGAIN) => {}
                Err(Errno::BUSY | Errno::NOBUFS) => self.stats.refused += 1,
                // All is sent; or the interface is down or gone, and the frames wait in the ring until it is full.
                Ok(_) | Err(_) => return,
            }
            let left = tx.pending();
            if left == pending {
                return;
            }
            pending = left;
        }
    }

    /// Gives transmitted frames back to the pool.
    fn complete(&mut self, pool: &mut Pool) {
        let Some(Open { completion, .. }) = &mut self.open else { return };
        let mut any = false;
        while let Some(address) = completion.pop() {
            any = true;
            match self.sending.reclaim(address, 0) {
                Some(frame) => pool.give(frame),
                None => self.stats.bad_descriptor += 1,
            }
        }
        if any {
            completion.release();
        }
    }
}

/// Bytes for frames in flight in copy mode: a full ring of full frames with the kernel's own overhead.
const SEND_BUFFER: usize = 16 << 20;

/// Lets the socket run the driver's receive loop.
fn busy_poll(socket: BorrowedFd<'_>, wanted: BusyPoll) -> io::Result<()> {
    let microseconds = libc::c_int::try_from(wanted.microseconds).unwrap_or(libc::c_int::MAX);
    for (name, value) in [
        (libc::SO_PREFER_BUSY_POLL, 1),
        (libc::SO_BUSY_POLL, microseconds),
        (libc::SO_BUSY_POLL_BUDGET, wanted.budget.into()),
    ] {
        // JUSTIFICATION: rustix has none of these options.
        // SAFETY: the kernel reads one integer, which outlives the call, from the address.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                (&raw const value).cast(),
                SIZE_OF_INT,
            )
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The kernel's number of the receive loop that the socket's packets come from, if it knows it.
fn napi(socket: BorrowedFd<'_>) -> Option<u32> {
    let (mut number, mut len) = (0_u32, SIZE_OF_INT);
    // JUSTIFICATION: rustix does not have this option.
    // SAFETY: the kernel writes at most `len` bytes to the integer, and the length to `len`; both outlive the call.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_INCOMING_NAPI_ID,
            (&raw mut number).cast(),
            &raw mut len,
        )
    };
    (done == 0 && number > 0).then_some(number)
}

#[expect(clippy::cast_possible_truncation, reason = "4 fits")]
const SIZE_OF_INT: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

fn register(socket: BorrowedFd<'_>, arena: &Arena) -> Result<(), Errno> {
    let chunk_size = u32::try_from(FRAME_SIZE).map_err(|_| Errno::INVAL)?;
    let registration = XdpUmemReg {
        addr: u64::try_from(arena.base().as_ptr().addr()).map_err(|_| Errno::INVAL)?,
        len: u64::try_from(arena.size()).map_err(|_| Errno::INVAL)?,
        chunk_size,
        // The kernel leaves its own 256 bytes before a received packet, which is HEADROOM: none on top of that.
        headroom: 0,
        flags: XdpUmemRegFlags::empty(),
        tx_metadata_len: 0,
    };
    sockopt::set_xdp_umem_reg(socket, registration)
}

fn bind(
    socket: BorrowedFd<'_>,
    index: u32,
    queue: u32,
    (zero_copy, need_wakeup): (bool, bool),
    shared: Option<&OwnedFd>,
) -> Result<(), Errno> {
    if let Some(shared) = shared {
        // The mode and NEED_WAKEUP are those of the socket whose registration it is; the kernel wants them left out.
        let addr = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_SHARED_UMEM, index, queue);
        return rustix::net::bind(
            socket,
            &SocketAddrXdpWithSharedUmem { addr, shared_umem_fd: shared.as_fd() },
        );
    }
    let mode = if zero_copy { SocketAddrXdpFlags::XDP_ZEROCOPY } else { SocketAddrXdpFlags::XDP_COPY };
    let wakeup =
        if need_wakeup { SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP } else { SocketAddrXdpFlags::empty() };
    rustix::net::bind(socket, &SocketAddrXdp::new(mode | wakeup, index, queue))
}

impl Port for XskSocket {
    fn receive(&mut self, _arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        let Some(Open { rx, socket, .. }) = &mut self.open else { return };
        let mut any = false;
        // Runs the driver's receive loop, if nothing waits: then it puts into the ring what there is.
        let mut poll = self.polled;
        while !out.is_full() {
            let Some(desc) = rx.pop() else {
                if !std::mem::take(&mut poll) {
                    break;
                }
                let _ = rustix::net::recv(&*socket, &mut [0_u8; 0], RecvFlags::DONTWAIT);
                continue;
            };
            poll = false;
            any = true;
            match self.receiving.reclaim(desc.addr, desc.len) {
                // A packet in several frames is only received by sockets that ask for such.
                Some(frame) if desc.options.contains(XdpDescOptions::XDP_PKT_CONTD) => {
                    self.stats.too_big += 1;
                    pool.give(frame);
                }
                Some(frame) => out.extend(Some(frame)),
                None => self.stats.bad_descriptor += 1,
            }
        }
        self.full = if out.is_full() { self.full.saturating_add(1) } else { 0 };
        if any {
            rx.release();
            self.refill(pool);
        }
    }

    fn transmit(&mut self, _arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let Some(Open { tx, .. }) = &mut self.open else { return 0 };
        let wanted = u32::try_from(frames.len()).unwrap_or(u32::MAX);
        let room = usize::try_from(tx.free(wanted)).unwrap_or(usize::MAX);
        let count = frames.len().min(room);
        for frame in frames.drain(..count) {
            // The kernel would drop an empty descriptor without ever completing it.
            let Ok(len @ 1..) = u32::try_from(frame.len()) else {
                self.stats.malformed += 1;
                pool.give(frame);
                continue;
            };
            match self.sending.lend(frame) {
                Ok(addr) => _ = tx.push(XdpDesc { addr, len, options: XdpDescOptions::empty() }),
                Err(foreign) => {
                    self.stats.malformed += 1;
                    pool.give(foreign);
                }
            }
        }
        tx.submit();
        count
    }

    fn flush(&mut self, _arena: &Arena, pool: &mut Pool) {
        let Some(Open { fill, .. }) = &self.open else { return };
        let short = self.receiving.count() < self.fill_now() || fill.needs_wakeup();
        if self.sending.count() > 0 {
            self.kick();
            self.complete(pool);
        }
        if short {
            self.refill(pool);
        }
    }

    /// Waits up to a tenth of a second for frames being transmitted, then closes the socket. In copy mode every frame returns,
    /// but for those whose transmission the kernel never completed. In zero-copy mode the device may write into the frames for
    /// reception until the driver has let go of them, which nothing tells: they stay lent.
    fn drain(&mut self, arena: &Arena, pool: &mut Pool) {
        for step in 0..DRAIN_STEPS {
            self.kick();
            self.complete(pool);
            if self.sending.count() == 0 || self.open.is_none() {
                break;
            }
            if step + 1 < DRAIN_STEPS {
                sleep(Duration::from_millis(1));
            }
        }
        let mut received = ArrayVec::new();
        // Without a target nothing is lent again.
        self.fill_target = 0;
        loop {
            self.receive(arena, pool, &mut received);
            if received.is_empty() {
                break;
            }
            received.drain(..).for_each(|frame| pool.give(frame));
        }
        self.ask_kernel();
        // When the last owner has let go, the kernel has unbound the socket and waited for packets on their way before `close`
        // returns. Another owner can only be a socket that is being bound at this moment and shares the registration.
        let Some(Open { rx, tx, fill, completion, socket }) = self.open.take() else { return };
        drop((rx, tx, fill, completion));
        let closed = Arc::into_inner(socket).map(drop).is_some();
        if closed && !self.zero_copy {
            while let Some(frame) = self.receiving.reclaim_any() {
                pool.give(frame);
            }
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd()
    }

    fn link(&self) -> LinkKind {
        LinkKind::Ethernet
    }

    fn describe(&self) -> String {
        let mode = if self.zero_copy { "zero-copy" } else { "copy" };
        let busy = if self.busy_poll { ", busy poll" } else { "" };
        format!("xsk {mode} {} queue {}{busy}", self.interface, self.queue)
    }

    fn busy(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.tx.pending() > 0 || self.receiving.count() == 0)
    }

    fn ask_kernel(&mut self) {
        self.polled |= self.busy_poll && self.fd().and_then(napi).is_some();
        self.counted = self.statistics().unwrap_or(self.counted);
    }

    /// In copy mode the kernel counts a packet that finds no frame as dropped; in zero-copy mode the device drops it, uncounted
    /// here, and the kernel counts how often the device was refused a frame.
    fn stats(&self) -> PortStats {
        let XskStatistics { rx_dropped, rx_ring_full, fill_ring_empty, tx_invalid } = self.counted;
        let refusals = if self.zero_copy { fill_ring_empty } else { 0 };
        PortStats {
            refused: self.stats.refused + tx_invalid,
            receive_ring_full: rx_ring_full,
            fill_ring_empty: rx_dropped + refusals,
            ..self.stats
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_and_shared_out() {
        let (arena, _frames) = Arena::new(1, false).unwrap();
        let umem = Umem::new(arena);
        for (ring, fill) in [(0, 1), (100, 1), (32, 1), (2048, 0), (2048, 2049), (1 << 20, 1)] {
            let options = XskOptions { zero_copy: false, ring, fill, ..XskOptions::default() };
            assert!(matches!(XskSocket::bind(&umem, "lo", 0, options), Err(XskError::Sizes(..))));
        }
        assert_eq!(XskOptions::default().for_sockets(1024, 4).fill, 128);
        assert_eq!(XskOptions::default().for_sockets(1 << 20, 4).fill, 2048);
        assert_eq!(XskOptions::default().for_sockets(1, 9).fill, 1);
    }

    /// OPS-1: the message says what is wrong and what to do.
    #[test]
    fn ops_1_errors_name_the_remedy() {
        assert!(XskError::QueueBusy("eth0".into(), 3).to_string().contains("eth0 queue 3"));
        assert!(XskError::LockedMemory(4096).to_string().contains("LimitMEMLOCK"));
        assert!(XskError::NoQueue("eth0".into(), 9).to_string().contains("ethtool -L"));
    }
}
