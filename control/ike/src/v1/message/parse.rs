//! Bytes to messages. Nothing here panics on any bytes; what is allocated is bounded by the length of the datagram and
//! by the counts below.

use super::{
    Attribute, Cfg, Exchange, Head, Id, Kind, Notify, NotifyKind, Payload, Proposal, Transform, Value,
};
use crate::ignored::Ignored;
use crate::message::IkeSpi;
use crate::message::registry::{CertEncoding, ProtocolId};

/// Length of the ISAKMP header.
pub(crate) const HEADER: usize = 28;
/// Most payloads in a chain.
const MAX_PAYLOADS: usize = 64;
/// Most proposals in an SA payload, and most transforms in it together.
const MAX_TRANSFORMS: usize = 512;
/// Most attributes of a transform or an Attributes payload.
const MAX_ATTRIBUTES: usize = 64;
/// Most SPIs in a Delete payload.
const MAX_SPIS: usize = 256;

/// A message that cannot be read: the counter says why.
type Read<T> = Result<T, Ignored>;

/// A chain of payloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) payloads: Vec<Payload>,
    /// Where each begins, its generic header included.
    pub(crate) starts: Vec<usize>,
    /// Where the last one ends; what follows is padding.
    pub(crate) length: usize,
}

/// The header, the type of the first payload, and what follows the header.
pub(crate) fn message(bytes: &[u8]) -> Read<(Head, Kind, &[u8])> {
    let mut reader = Reader(bytes);
    let cookie_i = IkeSpi(u64::from_be_bytes(reader.array()?));
    let cookie_r = IkeSpi(u64::from_be_bytes(reader.array()?));
    let [first, version, exchange, flags] = reader.array()?;
    let message_id = u32::from_be_bytes(reader.array()?);
    let length = u32::from_be_bytes(reader.array()?);
    if version >> 4 != 1 {
        return Err(Ignored::Version);
    }
    if usize::try_from(length).ok() != Some(bytes.len()) {
        return Err(Ignored::Truncated);
    }
    let encrypted = flags & 1 != 0;
    let head = Head { cookie_i, cookie_r, exchange: Exchange(exchange), encrypted, message_id };
    Ok((head, Kind(first), reader.0))
}

/// The payloads, the first of which is of this type.
pub(crate) fn chain(first: Kind, bytes: &[u8]) -> Read<Chain> {
    let mut chain = Chain { payloads: Vec::new(), starts: Vec::new(), length: 0 };
    let (mut kind, mut reader) = (first, Reader(bytes));
    while kind != Kind::NONE {
        if chain.payloads.len() == MAX_PAYLOADS {
            return Err(Ignored::Oversized);
        }
        let (next, body) = reader.generic()?;
        chain.payloads.push(payload(kind, body)?);
        chain.starts.push(chain.length);
        chain.length = bytes.len() - reader.0.len();
        kind = Kind(next);
    }
    Ok(chain)
}

fn payload(kind: Kind, body: &[u8]) -> Read<Payload> {
    let mut reader = Reader(body);
    Ok(match kind {
        Kind::SA => Payload::Sa(sa(body)?),
        Kind::KE => Payload::Ke(body.to_vec()),
        Kind::ID => {
            let [kind, protocol] = reader.array()?;
            let port = u16::from_be_bytes(reader.array()?);
            Payload::Id(Id { kind, protocol, port, data: reader.rest() })
        }
        Kind::CERT => {
            let [encoding] = reader.array()?;
            Payload::Cert { encoding: CertEncoding(encoding), data: reader.rest() }
        }
        Kind::CERTREQ => {
            let [encoding] = reader.array()?;
            Payload::CertReq { encoding: CertEncoding(encoding), authority: reader.rest() }
        }
        Kind::HASH => Payload::Hash(body.to_vec()),
        Kind::SIG => Payload::Sig(body.to_vec()),
        Kind::NONCE => Payload::Nonce(body.to_vec()),
        Kind::NOTIFY => {
            let _doi: [u8; 4] = reader.array()?;
            let [protocol, spi_size] = reader.array()?;
            let kind = NotifyKind(u16::from_be_bytes(reader.array()?));
            let spi = reader.take(usize::from(spi_size))?.to_vec();
            Payload::Notify(Notify { protocol: ProtocolId(protocol), spi, kind, data: reader.rest() })
        }
        Kind::DELETE => {
            let _doi: [u8; 4] = reader.array()?;
            let [protocol, size] = reader.array()?;
            let count = usize::from(u16::from_be_bytes(reader.array()?));
            let size = usize::from(size);
            if count > MAX_SPIS {
                return Err(Ignored::Oversized);
            }
            if size == 0 || count == 0 || reader.0.len() != size * count {
                return Err(Ignored::Syntax);
            }
            let spis = reader.0.chunks_exact(size).map(<[u8]>::to_vec).collect();
            Payload::Delete { protocol: ProtocolId(protocol), spis }
        }
        Kind::VENDOR_ID => Payload::VendorId(body.to_vec()),
        Kind::ATTRIBUTES => {
            let [kind, _reserved] = reader.array()?;
            let id = u16::from_be_bytes(reader.array()?);
            Payload::Attributes { kind: Cfg(kind), id, attributes: attributes(reader)? }
        }
        Kind::NAT_D => Payload::NatD(body.to_vec()),
        Kind::NAT_OA => Payload::NatOa(body.to_vec()),
        // 16 to 21 aside, what is unknown may be another's private payload.
        other => Payload::Unknown(other),
    })
}

/// Body of an SA payload: DOI, situation, proposals.
fn sa(body: &[u8]) -> Read<Vec<Proposal>> {
    let mut reader = Reader(body);
    let doi = u32::from_be_bytes(reader.array()?);
    let situation = u32::from_be_bytes(reader.array()?);
    // RFC 2407: the IPsec DOI, SIT_IDENTITY_ONLY. DOI 0 is what some send for phase 1.
    if doi > 1 || situation != 1 {
        return Err(Ignored::Syntax);
    }
    let (mut proposals, mut transforms) = (Vec::new(), 0);
    loop {
        let (next, body) = reader.generic()?;
        let mut inner = Reader(body);
        let [number, protocol, spi_size, count] = inner.array()?;
        let spi = inner.take(usize::from(spi_size))?.to_vec();
        let mut proposal = Proposal { number, protocol: ProtocolId(protocol), spi, transforms: Vec::new() };
        for _ in 0..count {
            transforms += 1;
            let (_, body) = inner.generic()?;
            let mut inner = Reader(body);
            let [number, id, _, _] = inner.array()?;
            proposal.transforms.push(Transform { number, id, attributes: attributes(inner)? });
        }
        if !inner.0.is_empty() {
            return Err(Ignored::Syntax);
        }
        proposals.push(proposal);
        if proposals.len() + transforms > MAX_TRANSFORMS {
            return Err(Ignored::Oversized);
        }
        match next {
            0 if reader.0.is_empty() => return Ok(proposals),
            2 => {}
            _ => return Err(Ignored::Syntax),
        }
    }
}

fn attributes(mut reader: Reader<'_>) -> Read<Vec<Attribute>> {
    let mut all = Vec::new();
    while !reader.0.is_empty() {
        if all.len() == MAX_ATTRIBUTES {
            return Err(Ignored::Oversized);
        }
        let kind = u16::from_be_bytes(reader.array()?);
        let value = u16::from_be_bytes(reader.array()?);
        all.push(if kind & 0x8000 != 0 {
            Attribute::basic(kind & 0x7fff, value)
        } else {
            Attribute { kind, value: Value::Variable(reader.take(usize::from(value))?.to_vec()) }
        });
    }
    Ok(all)
}

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Read<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Ignored::Syntax)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Ignored::Syntax)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn rest(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// A generic header and the body after it: next payload, reserved, length with the header.
    fn generic(&mut self) -> Read<(u8, &'a [u8])> {
        let [next, _, high, low] = self.array()?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        let body = self.take(length.checked_sub(4).ok_or(Ignored::Syntax)?)?;
        Ok((next, body))
    }
}
