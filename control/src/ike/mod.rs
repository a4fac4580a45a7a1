//! IKE in the daemon: the endpoint of the crate `postern-ike` runs as one task beside the datapath's supervisor and takes
//! its orders by [`api`].
//!
//! ```text
//! api ─► driver ─► Endpoint (postern-ike)      sockets  jobs  address      with the network, threads and the kernel
//!          │                                   events  keeper  rows        for people, and what is tried again
//!          └─► datapath (describe, spis) ◄──► datapath::supervisor         with the datapath
//! ```

mod address;
pub mod api;
mod command;
pub mod datapath;
mod describe;
pub mod driver;
pub mod events;
mod host;
pub mod jobs;
mod keeper;
pub mod keylog;
mod reset;
pub mod resolv;
mod rows;
pub mod sockets;
pub mod spis;

use std::io;
use std::thread::{Builder, JoinHandle};

use postern_contract::settings::{DatapathSettings, PortKind};
use tracing::error;

/// Starts the task on a thread of its own.
pub fn spawn(parts: driver::Parts) -> io::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Builder::new().name("ike".to_owned()).spawn(move || {
        if let Err(error) = runtime.block_on(driver::Driver::run(parts)) {
            error!("IKE has ended: {error}");
        }
    })
}

/// Whether the datapath reads ESP in UDP beside the sockets of IKE.
pub fn shares_natt(settings: &DatapathSettings) -> bool {
    settings.interfaces.iter().any(|interface| interface.port == PortKind::Socket)
}

/// Where virtual addresses are set: on the TUN device that this host's own packets take into tunnels, else on loopback.
pub fn virtual_interface(settings: &DatapathSettings) -> String {
    let tun = settings.interfaces.iter().find(|interface| interface.port == PortKind::Tun);
    tun.map_or_else(|| "lo".to_owned(), |interface| interface.name.clone())
}
