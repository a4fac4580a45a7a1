//! A message in one line, for the log: `IKE_AUTH request 1 [IDi N(INITIAL_CONTACT) AUTH SA TSi TSr]`.
//!
//! Types and counts only. Identities, addresses and keys are not in it, nor anything that a peer words itself, and a long
//! message is cut short.

use core::fmt;

use super::registry::{NotifyType, PayloadType};
use super::{Head, Payload};

/// Most payloads that are named.
const MOST: usize = 32;

/// A message with its header, to be written out.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a> {
    /// The header.
    pub head: &'a Head,
    /// All payloads, those of an Encrypted payload as if they stood in the clear.
    pub payloads: &'a [Payload],
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.head.response { "response" } else { "request" };
        write!(f, "{} {kind} {} [", self.head.exchange, self.head.message_id)?;
        let mut between = "";
        for payload in self.payloads.iter().take(MOST) {
            f.write_str(between)?;
            write_payload(f, payload)?;
            between = " ";
        }
        if self.payloads.len() > MOST {
            write!(f, " and {} more", self.payloads.len() - MOST)?;
        }
        f.write_str("]")
    }
}

fn write_payload(f: &mut fmt::Formatter<'_>, payload: &Payload) -> fmt::Result {
    match payload {
        Payload::Sa(_) => f.write_str("SA"),
        Payload::Ke(ke) => write!(f, "KE({})", ke.method),
        Payload::IdI(_) => f.write_str("IDi"),
        Payload::IdR(_) => f.write_str("IDr"),
        Payload::Cert { .. } => f.write_str("CERT"),
        Payload::CertReq { .. } => f.write_str("CERTREQ"),
        Payload::Auth { method, .. } => write!(f, "AUTH({method})"),
        Payload::Nonce(_) => f.write_str("No"),
        Payload::Notify(notify) => write_notify(f, notify.kind),
        Payload::Delete { protocol, spis } if spis.is_empty() => write!(f, "D({protocol})"),
        Payload::Delete { protocol, spis } => write!(f, "D({} of {protocol})", spis.len()),
        Payload::VendorId(_) => f.write_str("V"),
        Payload::TsI(selectors) => write!(f, "TSi({})", selectors.len()),
        Payload::TsR(selectors) => write!(f, "TSr({})", selectors.len()),
        Payload::Cp(configuration) => write!(f, "CP({})", configuration.kind),
        Payload::Eap(message) => write_eap(f, message),
        Payload::Unknown { kind: PayloadType(kind), .. } => write!(f, "?({kind})"),
    }
}

fn write_notify(f: &mut fmt::Formatter<'_>, kind: NotifyType) -> fmt::Result {
    match kind.name() {
        Some(name) => write!(f, "N({name})"),
        None => write!(f, "N({})", kind.0),
    }
}

/// RFC 3748 section 4: the code, and a request's or response's type.
fn write_eap(f: &mut fmt::Formatter<'_>, message: &[u8]) -> fmt::Result {
    match message {
        [1, _, _, _, kind, ..] => write!(f, "EAP(request {kind})"),
        [2, _, _, _, kind, ..] => write!(f, "EAP(response {kind})"),
        [3, ..] => f.write_str("EAP(success)"),
        [4, ..] => f.write_str("EAP(failure)"),
        _ => f.write_str("EAP"),
    }
}
