//! NAT detection and traversal (RFC 3947).

use core::net::{IpAddr, SocketAddr};

use super::hash::Hash;
use super::message::{Payload, Payloads};
use crate::message::IkeSpi;
use crate::output::Path;

/// Who is behind a NAT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nat {
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

    /// What the peer's NAT-D payloads say about the path that they came by: the first is about where they were sent to, the
    /// others about where they may have been sent from (section 3.2). `None` if there are none.
    pub(crate) fn detect(
        hash: Hash,
        cookies: (IkeSpi, IkeSpi),
        payloads: Payloads<'_>,
        path: Path,
    ) -> Option<Self> {
        let mut all = payloads.nat_ds();
        let destination = all.next()?;
        let local = *destination != digest(hash, cookies, path.local);
        let from = digest(hash, cookies, path.remote);
        let remote = !all.any(|source| *source == from);
        Some(Self { local, remote })
    }
}

/// The NAT-D payloads about `path`. With `pretend` the source is nobody's, so that the peer sees a NAT.
pub(crate) fn payloads(hash: Hash, cookies: (IkeSpi, IkeSpi), path: Path, pretend: bool) -> [Payload; 2] {
    let source = if pretend { SocketAddr::from(([0, 0, 0, 0], 0)) } else { path.local };
    [path.remote, source].map(|address| Payload::NatD(digest(hash, cookies, address)))
}

/// "HASH = HASH(CKY-I | CKY-R | IP | Port)", by the negotiated hash.
fn digest(hash: Hash, (cookie_i, cookie_r): (IkeSpi, IkeSpi), address: SocketAddr) -> Vec<u8> {
    let (cookie_i, cookie_r) = (cookie_i.0.to_be_bytes(), cookie_r.0.to_be_bytes());
    let port = address.port().to_be_bytes();
    match address.ip() {
        IpAddr::V4(ip) => hash.digest(&[&cookie_i, &cookie_r, &ip.octets(), &port]),
        IpAddr::V6(ip) => hash.digest(&[&cookie_i, &cookie_r, &ip.octets(), &port]),
    }
}
