//! Packet bytes: one protocol a file, no allocation, no unsafe, no panic on what a peer sends.
//!
//! Every view is made by a `parse` that checks the lengths which its accessors rely on; after `parse` returned
//! `Ok`, no accessor can fail. Writers take slices that the caller sized and return `None` where they do not fit.
//!
//! [`steer::classify`] is the one parser that the XDP program and the workers both run (DP-1).
#![no_std]
#![forbid(unsafe_code)]

pub mod ids;
pub mod steer;
