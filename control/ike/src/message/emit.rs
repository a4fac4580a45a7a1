//! Messages to bytes, the inverse of `parse`.
//!
//! Nothing here fails: what does not fit its length field is cut off at the most that does (a body of 65,531 bytes, 255
//! transforms, selectors or proposals), which no configuration that passed its checks reaches.

use super::registry::{PayloadType, ProtocolId, TsType};
use super::{Configuration, Head, IdData, Notify, Payload, Proposal, TrafficSelector, Transform};
use core::net::IpAddr;

/// Length of the bytes before what is sealed in an Encrypted payload: IKE header and generic header.
pub const SK_PREFIX_LEN: usize = 32;
/// The same of an Encrypted Fragment payload, with the fragment's number and their total.
pub const SKF_PREFIX_LEN: usize = 36;

/// A whole message whose payloads are in the clear.
pub fn plain(head: &Head, payloads: &[Payload]) -> Vec<u8> {
    let mut inside = Vec::new();
    let first = chain(payloads, &mut inside);
    let mut out = Vec::with_capacity(super::parse::HEADER_LEN + inside.len());
    header(head, first, inside.len(), &mut out);
    out.extend_from_slice(&inside);
    out
}

/// A message with any bytes for its payloads.
#[cfg(any(test, feature = "exercise"))]
pub fn with_chain(head: &Head, first: PayloadType, payloads: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(super::parse::HEADER_LEN + payloads.len());
    header(head, first, payloads.len(), &mut out);
    out.extend_from_slice(payloads);
    out
}

/// Appends a chain of payloads and returns the type of the first one, NONE if there is none.
pub fn chain(payloads: &[Payload], out: &mut Vec<u8>) -> PayloadType {
    let mut rest = payloads;
    while let Some((payload, after)) = rest.split_first() {
        let next = after.first().map_or(PayloadType::NONE, Payload::kind);
        let critical = matches!(payload, Payload::Unknown { critical: true, .. });
        out.extend_from_slice(&[next.0, if critical { 0x80 } else { 0 }]);
        counted(out, 2, |out| body(payload, out));
        rest = after;
    }
    payloads.first().map_or(PayloadType::NONE, Payload::kind)
}

/// Body of an Identification payload without its generic header: what the AUTH payload covers as IDi' or IDr'
/// (section 2.15).
pub fn id_body(id: &IdData) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + id.data.len());
    identification(id, &mut out);
    out
}

/// Everything before the sealed bytes of a message with an Encrypted payload, which is also what an AEAD authenticates
/// with it (RFC 5282 section 5.1). `sealed_len` counts initialization vector, ciphertext and ICV.
pub fn sk_prefix(head: &Head, first_inner: PayloadType, sealed_len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(SK_PREFIX_LEN + sealed_len);
    header(head, PayloadType::ENCRYPTED, 4 + sealed_len, &mut out);
    out.extend_from_slice(&[first_inner.0, 0]);
    out.extend_from_slice(&short(4 + sealed_len).to_be_bytes());
    out
}

/// The same for fragment `number` of `total` (RFC 7383 section 2.5). `first_inner` is meant for the first fragment and left
/// out of the others.
pub fn skf_prefix(
    head: &Head,
    first_inner: PayloadType,
    number: u16,
    total: u16,
    sealed_len: usize,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(SKF_PREFIX_LEN + sealed_len);
    header(head, PayloadType::ENCRYPTED_FRAGMENT, 8 + sealed_len, &mut out);
    let first_inner = if number == 1 { first_inner } else { PayloadType::NONE };
    out.extend_from_slice(&[first_inner.0, 0]);
    out.extend_from_slice(&short(8 + sealed_len).to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&total.to_be_bytes());
    out
}

fn header(head: &Head, first: PayloadType, after: usize, out: &mut Vec<u8>) {
    const VERSION: u8 = 0x20;
    let flags = if head.from_initiator { 0x08 } else { 0 } | if head.response { 0x20 } else { 0 };
    let length = u32::try_from(super::parse::HEADER_LEN + after).unwrap_or(u32::MAX);
    out.extend_from_slice(&head.spi_i.0.to_be_bytes());
    out.extend_from_slice(&head.spi_r.0.to_be_bytes());
    out.extend_from_slice(&[first.0, VERSION, head.exchange.0, flags]);
    out.extend_from_slice(&head.message_id.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

fn body(payload: &Payload, out: &mut Vec<u8>) {
    match payload {
        Payload::Sa(proposals) => self::proposals(proposals, out),
        Payload::Ke(ke) => {
            out.extend_from_slice(&ke.method.0.to_be_bytes());
            out.extend_from_slice(&[0, 0]);
            out.extend_from_slice(&ke.data);
        }
        Payload::IdI(id) | Payload::IdR(id) => identification(id, out),
        Payload::Cert { encoding, data } | Payload::CertReq { encoding, authorities: data } => {
            out.push(encoding.0);
            out.extend_from_slice(data);
        }
        Payload::Auth { method, data } => {
            out.extend_from_slice(&[method.0, 0, 0, 0]);
            out.extend_from_slice(data);
        }
        Payload::Nonce(data) | Payload::VendorId(data) | Payload::Eap(data) => out.extend_from_slice(data),
        Payload::Notify(notify) => self::notify(notify, out),
        Payload::Delete { protocol: ProtocolId::IKE, .. } => {
            out.extend_from_slice(&[ProtocolId::IKE.0, 0, 0, 0]);
        }
        Payload::Delete { protocol, spis } => {
            out.extend_from_slice(&[protocol.0, 4]);
            out.extend_from_slice(&short(spis.len()).to_be_bytes());
            out.extend(spis.iter().flat_map(|spi| spi.to_be_bytes()));
        }
        Payload::TsI(selectors) | Payload::TsR(selectors) => self::selectors(selectors, out),
        Payload::Cp(configuration) => self::configuration(configuration, out),
        Payload::Unknown { .. } => (),
    }
}

fn proposals(proposals: &[Proposal], out: &mut Vec<u8>) {
    let last = proposals.len().saturating_sub(1);
    for (index, proposal) in proposals.iter().enumerate() {
        let (spi, transforms) = (most(&proposal.spi), most(&proposal.transforms));
        out.extend_from_slice(&[if index == last { 0 } else { 2 }, 0]);
        counted(out, 2, |out| {
            out.extend_from_slice(&[
                proposal.number,
                proposal.protocol.0,
                byte(spi.len()),
                byte(transforms.len()),
            ]);
            out.extend_from_slice(spi);
            let last = transforms.len().saturating_sub(1);
            for (index, transform) in transforms.iter().enumerate() {
                out.extend_from_slice(&[if index == last { 0 } else { 3 }, 0]);
                counted(out, 2, |out| self::transform(*transform, out));
            }
        });
    }
}

fn transform(transform: Transform, out: &mut Vec<u8>) {
    const KEY_LENGTH: u16 = 0x800e;
    out.extend_from_slice(&[transform.kind.0, 0]);
    out.extend_from_slice(&transform.id.to_be_bytes());
    if let Some(bits) = transform.key_length {
        out.extend_from_slice(&KEY_LENGTH.to_be_bytes());
        out.extend_from_slice(&bits.to_be_bytes());
    }
}

fn identification(id: &IdData, out: &mut Vec<u8>) {
    out.extend_from_slice(&[id.kind.0, 0, 0, 0]);
    out.extend_from_slice(&id.data);
}

fn notify(notify: &Notify, out: &mut Vec<u8>) {
    let spi = most(&notify.spi);
    out.extend_from_slice(&[notify.protocol.0, byte(spi.len())]);
    out.extend_from_slice(&notify.kind.0.to_be_bytes());
    out.extend_from_slice(spi);
    out.extend_from_slice(&notify.data);
}

fn selectors(selectors: &[TrafficSelector], out: &mut Vec<u8>) {
    let selectors = most(selectors);
    out.extend_from_slice(&[byte(selectors.len()), 0, 0, 0]);
    for selector in selectors {
        let kind = if selector.start.is_ipv4() { TsType::IPV4_ADDR_RANGE } else { TsType::IPV6_ADDR_RANGE };
        out.extend_from_slice(&[kind.0, selector.protocol]);
        counted(out, 2, |out| {
            out.extend_from_slice(&selector.ports.start().to_be_bytes());
            out.extend_from_slice(&selector.ports.end().to_be_bytes());
            for address in [selector.start, selector.end] {
                match address {
                    IpAddr::V4(address) => out.extend_from_slice(&address.octets()),
                    IpAddr::V6(address) => out.extend_from_slice(&address.octets()),
                }
            }
        });
    }
}

fn configuration(configuration: &Configuration, out: &mut Vec<u8>) {
    out.extend_from_slice(&[configuration.kind.0, 0, 0, 0]);
    for (kind, value) in &configuration.attributes {
        out.extend_from_slice(&(kind.0 & 0x7fff).to_be_bytes());
        let value = value.get(..usize::from(u16::MAX)).unwrap_or(value);
        out.extend_from_slice(&short(value.len()).to_be_bytes());
        out.extend_from_slice(value);
    }
}

/// Appends a length of two bytes and then what `inside` appends. The length counts itself, what is inside, and `before`
/// bytes that stand before it.
fn counted(out: &mut Vec<u8>, before: usize, inside: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0, 0]);
    inside(out);
    out.truncate(at + usize::from(u16::MAX) - before);
    let length = short(out.len() - at + before).to_be_bytes();
    if let Some(place) = out.get_mut(at..at + 2) {
        place.copy_from_slice(&length);
    }
}

fn most<T>(items: &[T]) -> &[T] {
    items.get(..usize::from(u8::MAX)).unwrap_or(items)
}

fn byte(count: usize) -> u8 {
    u8::try_from(count).unwrap_or(u8::MAX)
}

fn short(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}
