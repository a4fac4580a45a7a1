//! What the endpoint asks of this machine, and is answered at once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use postern_ike::Random;
use postern_ike::crypto::keys::IkeKeys;
use postern_ike::endpoint::Host;
use postern_ike::message::IkeSpi;
use postern_ike::negotiate::IkeSuite;

use super::keylog::KeyLog;
use super::spis::Spis;

/// This machine, as the endpoint asks it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Inbound SPIs.
    pub spis: Arc<Mutex<Spis>>,
    /// Where keys are noted, if they are.
    pub keylog: Option<Arc<KeyLog>>,
}

impl Host for Machine {
    fn allocate_spi(&mut self, random: &mut dyn Random) -> u32 {
        self.spis.lock().unwrap_or_else(PoisonError::into_inner).allocate(random)
    }

    fn claim_spi(&mut self, spi: u32) -> bool {
        let mut spis = self.spis.lock().unwrap_or_else(PoisonError::into_inner);
        let free = !spis.is_taken(spi);
        spis.reserve(spi);
        free
    }

    fn release_spi(&mut self, spi: u32) {
        self.spis.lock().unwrap_or_else(PoisonError::into_inner).release(spi);
    }

    fn note_keys(&self, suite: &IkeSuite, spis: (IkeSpi, IkeSpi), keys: &IkeKeys) {
        if let Some(keylog) = &self.keylog {
            keylog.ike(suite, spis, keys);
        }
    }

    fn source_address(&mut self, remote: IpAddr) -> Option<IpAddr> {
        source_address(remote)
    }
}

/// The address from which packets to `remote` leave: the kernel's own choice, asked for by connecting a socket, which
/// sends nothing.
pub fn source_address(remote: IpAddr) -> Option<IpAddr> {
    let any = match remote {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((remote, 500)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_unspecified())
}
