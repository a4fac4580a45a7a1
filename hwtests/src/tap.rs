//! A TAP device on a segment: Ethernet frames in and out of a network, read and written by the tests themselves.

use std::io;
use std::time::Duration;

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::netns::Netns;

/// The device, which is gone with it.
pub struct Tap {
    device: SyncDevice,
}

impl Tap {
    /// Makes a device of this name in `namespace` as a port of the bridge `bridge`.
    pub fn plug(namespace: &Netns, name: &str, bridge: &str) -> Result<Self> {
        let device = namespace.enter(|| {
            let device = DeviceBuilder::new().name(name).layer(Layer::L2).enable(false).build_sync()?;
            device.set_nonblocking(true)?;
            // Frames wait here while a busy machine runs something else.
            device.set_tx_queue_len(10_000)?;
            Ok(device)
        })?;
        namespace.sh(&format!("sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1"))?;
        namespace.sh(&format!("ip link set {name} master {bridge} up"))?;
        Ok(Self { device })
    }

    /// Puts a frame on the segment.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.device.send(frame).map(drop)
    }

    /// The next frame from the segment, if one comes within `limit`.
    pub fn receive<'a>(&self, buffer: &'a mut [u8], limit: Duration) -> io::Result<Option<&'a [u8]>> {
        let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&self.device, PollFlags::IN)], Some(&limit))? == 0 {
            return Ok(None);
        }
        match self.device.recv(buffer) {
            Ok(length) => Ok(buffer.get(..length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}
