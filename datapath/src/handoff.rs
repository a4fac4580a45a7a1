//! Between workers: a packet of an SA that another worker owns goes to that worker (DESIGN decision 5).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::ArrayQueue;
use rustix::event::{EventfdFlags, eventfd};

use crate::fib::PortIndex;
use crate::frame::Frame;
use crate::outbound::Came;

/// Parcels that a worker can leave unopened.
const INBOX: usize = 1024;

/// A frame under way to another worker. It begins with the IP header unless it is ready to be sent.
#[derive(Debug)]
pub enum Parcel {
    /// An IPsec packet that came in on `port`.
    Inbound {
        /// The packet.
        frame: Frame,
        /// Where it came in.
        port: PortIndex,
    },
    /// A cleartext packet whose outbound SA the other worker owns.
    Outbound {
        /// The packet.
        frame: Frame,
        /// Where it came in.
        port: PortIndex,
        /// From whom.
        came: Came,
    },
    /// A frame with its link header, for a port of which only the other worker has a queue.
    Transmit {
        /// The frame.
        frame: Frame,
        /// Where it goes out.
        port: PortIndex,
        /// Where it came in.
        from: PortIndex,
    },
}

impl Parcel {
    /// The frame alone, to give it back.
    pub fn into_frame(self) -> Frame {
        match self {
            Self::Inbound { frame, .. } | Self::Outbound { frame, .. } | Self::Transmit { frame, .. } => {
                frame
            }
        }
    }
}

/// Wakes a thread that sleeps in `poll`, and costs nothing while it is awake.
#[derive(Debug)]
pub struct Doorbell {
    fd: OwnedFd,
    asleep: AtomicBool,
}

impl Doorbell {
    /// A new one, its thread awake.
    pub fn new() -> std::io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, asleep: AtomicBool::new(false) })
    }

    /// Called after something was put where the thread looks. Says whether it slept.
    pub fn ring(&self) -> bool {
        // The fence of the pair in `lie_down`: either we see that it sleeps, or it sees what was put.
        std::sync::atomic::fence(Ordering::SeqCst);
        let asleep = self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::SeqCst);
        if asleep {
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
        asleep
    }

    /// Wakes the thread, asleep or about to be.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Called before the thread looks one last time and then sleeps.
    pub fn lie_down(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Called when the thread is awake again.
    pub fn get_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What other threads leave for a worker.
#[derive(Clone, Debug)]
pub struct Inbox {
    parcels: Arc<ArrayQueue<Parcel>>,
    bell: Arc<Doorbell>,
}

impl Inbox {
    /// An empty one.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { parcels: Arc::new(ArrayQueue::new(INBOX)), bell: Arc::new(Doorbell::new()?) })
    }

    /// Leaves a parcel; gives it back when there is no room.
    pub fn push(&self, parcel: Parcel) -> Result<(), Parcel> {
        self.parcels.push(parcel)?;
        self.bell.ring();
        Ok(())
    }

    /// Takes the oldest parcel.
    pub fn pop(&self) -> Option<Parcel> {
        self.parcels.pop()
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.parcels.is_empty()
    }

    /// The worker's bell, also rung for commands.
    pub fn bell(&self) -> &Arc<Doorbell> {
        &self.bell
    }
}
