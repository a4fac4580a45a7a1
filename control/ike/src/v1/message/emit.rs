//! Messages to bytes, the inverse of `parse`. What does not fit its length field is cut off, which no configuration that
//! passed its checks reaches.

use super::parse::HEADER;
use super::{Attribute, Head, Id, Kind, Payload, Proposal, Value};

/// A message whose payloads are in the clear.
pub(crate) fn plain(head: &Head, payloads: &[Payload]) -> Vec<u8> {
    let mut body = Vec::new();
    let first = chain(payloads, &mut body);
    with_body(head, first, &body)
}

/// A message with these bytes after its header.
pub(crate) fn with_body(head: &Head, first: Kind, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend(head.cookie_i.0.to_be_bytes());
    out.extend(head.cookie_r.0.to_be_bytes());
    out.extend([first.0, 0x10, head.exchange.0, u8::from(head.encrypted)]);
    out.extend(head.message_id.to_be_bytes());
    out.extend(u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(body);
    out
}

/// Appends a chain of payloads and gives the type of the first.
pub(crate) fn chain(payloads: &[Payload], out: &mut Vec<u8>) -> Kind {
    let mut rest = payloads;
    while let Some((payload, after)) = rest.split_first() {
        let next = after.first().map_or(Kind::NONE, Payload::kind);
        generic(next.0, out, |out| body(payload, out));
        rest = after;
    }
    payloads.first().map_or(Kind::NONE, Payload::kind)
}

/// Body of the SA payload, which HASH_I and HASH_R cover as SAi_b.
pub(crate) fn sa_body(proposals: &[Proposal]) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 1, 0, 0, 0, 1];
    let mut rest = proposals;
    while let Some((proposal, after)) = rest.split_first() {
        generic(if after.is_empty() { 0 } else { 2 }, &mut out, |out| {
            let count = u8::try_from(proposal.transforms.len()).unwrap_or(u8::MAX);
            let spi_size = u8::try_from(proposal.spi.len()).unwrap_or(u8::MAX);
            out.extend([proposal.number, proposal.protocol.0, spi_size, count]);
            out.extend(proposal.spi.iter().take(usize::from(spi_size)));
            let mut transforms = proposal.transforms.iter().take(usize::from(count)).peekable();
            while let Some(transform) = transforms.next() {
                generic(if transforms.peek().is_some() { 3 } else { 0 }, out, |out| {
                    out.extend([transform.number, transform.id, 0, 0]);
                    attributes(&transform.attributes, out);
                });
            }
        });
        rest = after;
    }
    out
}

/// Body of an Identification payload, which HASH_I and HASH_R cover as IDii_b and IDir_b.
pub(crate) fn id_body(id: &Id) -> Vec<u8> {
    [[id.kind, id.protocol].as_slice(), &id.port.to_be_bytes(), &id.data].concat()
}

fn body(payload: &Payload, out: &mut Vec<u8>) {
    match payload {
        Payload::Sa(proposals) => out.extend(sa_body(proposals)),
        Payload::Id(id) => out.extend(id_body(id)),
        Payload::Ke(data)
        | Payload::Hash(data)
        | Payload::Sig(data)
        | Payload::Nonce(data)
        | Payload::VendorId(data)
        | Payload::NatD(data)
        | Payload::NatOa(data) => out.extend(data),
        Payload::Cert { encoding, data } | Payload::CertReq { encoding, authority: data } => {
            out.push(encoding.0);
            out.extend(data);
        }
        Payload::Notify(notify) => {
            let spi_size = u8::try_from(notify.spi.len()).unwrap_or(u8::MAX);
            out.extend([0, 0, 0, 1, notify.protocol.0, spi_size]);
            out.extend(notify.kind.0.to_be_bytes());
            out.extend(notify.spi.iter().take(usize::from(spi_size)));
            out.extend(&notify.data);
        }
        Payload::Delete { protocol, spis } => {
            let size = spis.first().and_then(|spi| u8::try_from(spi.len()).ok()).unwrap_or(0);
            let count = u16::try_from(spis.len()).unwrap_or(u16::MAX);
            out.extend([0, 0, 0, 1, protocol.0, size]);
            out.extend(count.to_be_bytes());
            out.extend(spis.iter().take(usize::from(count)).flatten());
        }
        Payload::Attributes { kind, id, attributes: all } => {
            out.extend([kind.0, 0]);
            out.extend(id.to_be_bytes());
            attributes(all, out);
        }
        Payload::Unknown(_) => {}
    }
}

fn attributes(all: &[Attribute], out: &mut Vec<u8>) {
    for attribute in all {
        match &attribute.value {
            Value::Basic(value) => {
                out.extend((attribute.kind | 0x8000).to_be_bytes());
                out.extend(value.to_be_bytes());
            }
            Value::Variable(bytes) => {
                let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
                out.extend(attribute.kind.to_be_bytes());
                out.extend(length.to_be_bytes());
                out.extend(bytes.iter().take(usize::from(length)));
            }
        }
    }
}

/// A generic header whose length is put in once the body is there.
fn generic(next: u8, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let mut inside = Vec::new();
    body(&mut inside);
    inside.truncate(usize::from(u16::MAX) - 4);
    out.extend([next, 0]);
    out.extend(u16::try_from(4 + inside.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend(inside);
}
