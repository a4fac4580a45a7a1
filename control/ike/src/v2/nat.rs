//! NAT detection (RFC 7296 section 2.23).

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY};

use crate::message::legality::Payloads;
use crate::message::registry::NotifyType;
use crate::message::{IkeSpi, Notify, Payload};
use crate::output::Path;
use core::net::{IpAddr, SocketAddr};

/// Who is behind a NAT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nat {
    /// The peer took part in the detection.
    pub(crate) supported: bool,
    /// This side.
    pub(crate) local: bool,
    /// The peer.
    pub(crate) remote: bool,
}

impl Nat {
    /// Whether there is any on the way.
    pub(crate) const fn any(self) -> bool {
        self.local || self.remote
    }

    /// What the peer's notifications say about the path that they came by.
    pub(crate) fn detect(payloads: &Payloads<'_>, spi_i: IkeSpi, spi_r: IkeSpi, path: Path) -> Self {
        let mut sources = payloads.notifies(NotifyType::NAT_DETECTION_SOURCE_IP).peekable();
        let mut destinations = payloads.notifies(NotifyType::NAT_DETECTION_DESTINATION_IP).peekable();
        if sources.peek().is_none() || destinations.peek().is_none() {
            return Self::default();
        }
        // "There MAY be multiple NAT_DETECTION_SOURCE_IP payloads" of a sender that does not know which address it
        // will use: one that fits is enough.
        let remote = hash(spi_i, spi_r, path.remote);
        let local = hash(spi_i, spi_r, path.local);
        Self {
            supported: true,
            remote: !sources.any(|notify| notify.data == remote),
            local: !destinations.any(|notify| notify.data == local),
        }
    }
}

/// The two notifications about `path`. With `pretend` the source is nobody's, so that the peer sees a NAT.
pub(crate) fn notifications(spi_i: IkeSpi, spi_r: IkeSpi, path: Path, pretend: bool) -> [Payload; 2] {
    let source = if pretend { SocketAddr::from(([0, 0, 0, 0], 0)) } else { path.local };
    [(NotifyType::NAT_DETECTION_SOURCE_IP, source), (NotifyType::NAT_DETECTION_DESTINATION_IP, path.remote)]
        .map(|(kind, address)| Payload::Notify(Notify::new(kind, hash(spi_i, spi_r, address))))
}

/// "a SHA-1 digest of the SPIs (in the order they appear in the header), IP address, and port"
fn hash(spi_i: IkeSpi, spi_r: IkeSpi, address: SocketAddr) -> Vec<u8> {
    let mut context = digest::Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    context.update(&spi_i.0.to_be_bytes());
    context.update(&spi_r.0.to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => context.update(&ip.octets()),
        IpAddr::V6(ip) => context.update(&ip.octets()),
    }
    context.update(&address.port().to_be_bytes());
    context.finish().as_ref().to_vec()
}
