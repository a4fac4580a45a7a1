//! Packet bytes: one protocol a file, no allocation, no unsafe, no panic on what a peer sends.
//!
//! Every view is made by a `parse` that checks the lengths which its accessors rely on; after `parse` returned
//! `Ok`, no accessor can fail. Writers take slices that the caller sized and return `None` where they do not fit.
//!
//! [`steer::classify`] is the one parser that the XDP program and the workers both run (DP-1).
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod ah;
mod bytes;
pub mod checksum;
pub mod esp;
pub mod ether;
#[cfg(any(test, feature = "exercise"))]
#[doc(hidden)]
pub mod exercise;
pub mod flow;
pub mod icmp;
pub mod ids;
pub mod ike_header;
pub mod ip4;
pub mod ip6;
pub mod natt;
pub mod steer;
pub mod tcp;
pub mod translate;
pub mod udp;

/// Why bytes are not the packet they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Malformed {
    /// The bytes end before a header, or before the length that a header tells.
    Truncated,
    /// Another IP version than the one asked for, or none.
    Version,
    /// A header's length field is below its minimum or beyond the packet.
    HeaderLength,
    /// The total length is below the header's, or too large to handle.
    TotalLength,
    /// An extension header where none may be.
    NextHeader,
    /// More extension headers than are walked.
    TooManyHeaders,
    /// An IPv4 option whose length is wrong.
    Options,
}
