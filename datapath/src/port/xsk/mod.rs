//! AF_XDP sockets: frames straight from and to a queue of a network interface.
//!
//! The rings are our own, over the kernel's interface (Documentation/networking/af_xdp), and not those of the `xsk-rs` crate.
//! Read in its version 0.11: a `FrameDesc` has the data address it was made with or received with, `pub(crate)` and without a
//! way to move it, and transmission begins there. So an outer header could not be put before a packet in its headroom, which is
//! what encapsulation does with each one; it would cost a copy. Besides, it builds libxdp, which wants clang and libelf on every
//! machine that compiles, and its descriptors pass through calls that are not inlined. What is needed here is small: four rings
//! ([`ring`]), one registration ([`Umem`]), the book of what the kernel holds (`umem::Ledger`), and the socket ([`XskSocket`]).
//!
//! Contract: `unsafe` stays within this directory and `frame.rs`. Frames lent to the kernel are not frames any more; they come
//! back only through the ledger of the socket that lent them, so no descriptor of the kernel's can make two frames of a chunk.

mod ring;
mod socket;
mod umem;

pub use socket::{BusyPoll, XskError, XskOptions, XskSocket, XskStatistics};
pub use umem::Umem;
