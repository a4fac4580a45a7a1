//! A TUN device: cleartext of this very host, for a client that is no appliance.
//!
//! Frames begin with the IP header, without any header of the device's own and without offloads. A TUN device has no rings:
//! each packet is a system call.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use arrayvec::ArrayVec;
use rustix::io::Errno;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::{LinkKind, Port, PortStats};
use crate::frame::{Arena, BATCH, Frame, MAX_RECEIVE, Pool};

/// The device, which is gone with it.
pub struct TunPort {
    device: SyncDevice,
    name: String,
    stats: PortStats,
}

/// The largest MTU: a frame must have room behind the packet for padding, trailer and ICV.
pub const MAX_MTU: u16 = 3584;
const _: () = assert!(MAX_MTU as usize <= MAX_RECEIVE - 256);

impl TunPort {
    /// Makes the device, with this MTU (1280 to [`MAX_MTU`]), and sets it up. Addresses and routes are the operator's.
    pub fn create(name: &str, mtu: u16) -> io::Result<Self> {
        if !(1280..=MAX_MTU).contains(&mtu) {
            let message = format!("tun device {name}: MTU {mtu} is not between 1280 and {MAX_MTU}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let device =
            DeviceBuilder::new().name(name).mtu(mtu).enable(true).build_sync().map_err(|source| {
                let hint = match source.kind() {
                    io::ErrorKind::PermissionDenied => " (run as root or with CAP_NET_ADMIN)",
                    io::ErrorKind::NotFound => " (no /dev/net/tun: load the kernel's `tun` module)",
                    io::ErrorKind::ResourceBusy => " (another program has a device of this name)",
                    _ => "",
                };
                io::Error::new(source.kind(), format!("tun device {name}: {source}{hint}"))
            })?;
        device.set_nonblocking(true)?;
        Ok(Self { device, name: name.to_owned(), stats: PortStats::default() })
    }

    /// Name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Port for TunPort {
    fn receive(&mut self, arena: &Arena, pool: &mut Pool, out: &mut ArrayVec<Frame, BATCH>) {
        while !out.is_full() {
            // Without a frame the packet stays in the device's queue.
            let Some(mut frame) = pool.take() else { return };
            _ = frame.grow_back(MAX_RECEIVE);
            let Ok(len @ 1..) = rustix::io::read(&self.device, arena.bytes_mut(&mut frame)) else {
                pool.give(frame);
                return;
            };
            frame.truncate(len);
            out.extend(Some(frame));
        }
    }

    fn transmit(&mut self, arena: &Arena, pool: &mut Pool, frames: &mut ArrayVec<Frame, BATCH>) -> usize {
        let count = frames.len();
        for frame in frames.drain(..) {
            match rustix::io::write(&self.device, arena.bytes(&frame)) {
                Ok(_) => {}
                Err(Errno::INVAL) => self.stats.malformed += 1,
                // The device is down, or out of memory.
                Err(_) => self.stats.refused += 1,
            }
            pool.give(frame);
        }
        count
    }

    fn flush(&mut self, _arena: &Arena, _pool: &mut Pool) {}

    fn drain(&mut self, _arena: &Arena, _pool: &mut Pool) {}

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }

    fn link(&self) -> LinkKind {
        LinkKind::Ip
    }

    fn describe(&self) -> String {
        format!("tun {}", self.name)
    }

    fn stats(&self) -> PortStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OPS-1: an MTU that leaves no room for what ESP adds is refused before there is a device.
    #[test]
    fn ops_1_impossible_mtus_are_refused() {
        for mtu in [0, 1279, MAX_MTU + 1, u16::MAX] {
            assert_eq!(TunPort::create("pt-none", mtu).err().unwrap().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
