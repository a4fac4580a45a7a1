//! Where frames come from and go to: AF_XDP sockets on an appliance, a TUN device and ordinary sockets on a host that is none,
//! memory in tests and benches.
//!
//! Contract of [`Port`]: every frame that goes in comes out again. `receive` pays for the frames it hands out with frames of
//! the pool, `flush` gives transmitted ones back to it, and `drain` all the rest. Ports belong to one worker; none locks,
//! allocates or logs. What a port refuses by itself it counts in [`PortStats`].

use std::os::fd::BorrowedFd;

use arrayvec::ArrayVec;

use crate::frame::{Arena, BATCH, Frame, Pool};

pub mod memory;
pub mod netdev;
pub mod socket;
pub mod tun;
pub mod xsk;

/// What the frames of a port begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// An Ethernet header.
    Ethernet,
    /// The IPv4 or IPv6 header.
    Ip,
}

/// A source and sink of frames, owned by one worker.
pub trait Port: Send {
    /// Moves received frames to the end of `out`, as many as it has room for, and replaces them from the pool.
    fn receive(&mut self, arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>);

    /// Takes as many frames off the front of `frames` as there is room for, and tells how many. The rest stays: the caller
    /// counts it as dropped and gives it back.
    fn transmit(&mut self, arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize;

    /// Ends a turn: wakes the kernel if it asked for that, and gives the frames it is done with back to the pool.
    fn flush(&mut self, arena: &Arena, pool: &mut Pool);

    /// Ends the port's service: gives every frame that can be had to the pool. The port is of no use afterwards.
    fn drain(&mut self, arena: &Arena, pool: &mut Pool);

    /// A descriptor that becomes readable when frames may have come; `None` if the port must be asked.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>>;

    /// What this port's frames begin with, received and transmitted ones.
    fn link(&self) -> LinkKind;

    /// What the port is, in words for an operator: `xsk zero-copy eth0 queue 3`, `tun pt0`.
    fn describe(&self) -> String;

    /// Whether [`Port::flush`] must be called again soon although no frame may come: the kernel has frames to send, or too few
    /// to receive into. A worker that sleeps without looking at this leaves packets in the transmit ring.
    fn busy(&self) -> bool {
        false
    }

    /// Asks the kernel what it dropped on the way to or from this port, for [`Port::stats`]: a system call, so not for every
    /// turn. A port that sees all of that by itself has nothing to ask.
    fn ask_kernel(&mut self) {}

    /// What the port refused by itself, since it was made.
    fn stats(&self) -> PortStats {
        PortStats::default()
    }
}

/// Frames that never got to a worker or never got out, by cause. Ports count; the worker maps these to its drop reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Received, but no frame was free for it.
    pub no_frame: u64,
    /// Received, but larger than a frame, or (transmit) larger than the interface takes.
    pub too_big: u64,
    /// Received, but not ours: IKE on port 4500, or a protocol not asked for.
    pub not_ours: u64,
    /// Received: the one byte 0xFF on port 4500 (RFC 3948 section 2.3).
    pub keepalive: u64,
    /// Received on port 4500, but too short for what it should be.
    pub malformed_received: u64,
    /// Handed to the port for transmission, but not a packet that can be sent.
    pub malformed: u64,
    /// Handed to the port for transmission and refused by the kernel.
    pub refused: u64,
    /// Dropped by the kernel, because the worker had not emptied the receive ring.
    pub receive_ring_full: u64,
    /// Dropped by the kernel, because no frame was lent to it.
    pub fill_ring_empty: u64,
    /// A descriptor of the kernel's that names no frame it was lent. It is ignored; its frame stays lost.
    pub bad_descriptor: u64,
}

impl PortStats {
    /// All of them.
    pub fn total(&self) -> u64 {
        let Self {
            no_frame,
            too_big,
            not_ours,
            keepalive,
            malformed_received,
            malformed,
            refused,
            receive_ring_full,
            fill_ring_empty,
            bad_descriptor,
        } = self;
        let received = no_frame + too_big + not_ours + keepalive + malformed_received;
        let by_kernel = receive_ring_full + fill_ring_empty;
        received + by_kernel + malformed + refused + bad_descriptor
    }
}
