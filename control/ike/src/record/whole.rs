//! All of an IKEv2 SA and its CHILD_SAs, so that they go on after a reset (strategy `restore`).
//!
//! No counter goes back:
//! - *Message IDs of this side*: [`V2Context::next_request`] is above every one that was used, as with the other
//!   strategies. A short request that was not answered is repeated byte for byte.
//! - *Message IDs of the peer*: the record is durable before an answer is sent, so [`Whole::expected_request`] is the ID
//!   of the peer's next request, or of one whose answer was never sent. The last answer is kept, for a peer that did not
//!   get it.
//! - *IVs of the IKE SA*: with each restoration the sealer begins a new [`life`](Whole::life), whose IVs are above all of
//!   the lives before; the record with that life is durable before anything is sent in it.
//! - *ESP*: not in here. The datapath reserves sequence numbers, and what its windows accepted, in a ledger of its own by
//!   the name of the keys (`postern_datapath::reserve`), and goes on above what was reserved. Keys that it does not
//!   remember are refused.

use core::net::IpAddr;
use core::time::Duration;
use std::time::{SystemTime, UNIX_EPOCH};

use super::bytes::{Reader, Writer};
use super::{RecordError, V2Context, read_v2, write_v2};
use crate::Secret;
use crate::config::Mode;
use crate::crypto::keys::{encr_key_length, integ_key_length};
use crate::crypto::prf::Prf;
use crate::message::registry::{EncrId, IdType, IntegId, KeMethod, PrfId, ProtocolId};
use crate::message::{IdData, TrafficSelector};
use crate::negotiate::{Additional, ChildSuite, IkeSuite};

/// Longest answer that is kept.
pub(crate) const LONGEST_ANSWER: usize = 1024;

/// An IKE SA that is to go on.
#[derive(Debug, PartialEq, Eq)]
pub struct Whole {
    /// What a Delete would be made from, if it cannot go on.
    pub context: V2Context,
    /// Message ID of the peer's next request.
    pub expected_request: u32,
    /// The answer to the request before that one.
    pub answer: Option<Vec<u8>>,
    /// How often it was restored.
    pub life: u16,
    /// Pseudorandom function.
    pub prf: PrfId,
    /// Key exchange of the IKE SA.
    pub ke: KeMethod,
    /// Its additional key exchanges.
    pub additional: Additional,
    /// SK_d.
    pub sk_d: Secret,
    /// The beginning of the connection's fingerprint: with another configuration it cannot go on.
    pub fingerprint: [u8; 8],
    /// The peer's identity.
    pub identity: IdData,
    /// Virtual addresses that were assigned, to whichever side.
    pub addresses: Vec<IpAddr>,
    /// What is known of the peer and the path.
    pub traits: Traits,
    /// CHILD_SAs.
    pub children: Vec<SavedChild>,
}

/// What is known of the peer and the path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// The peer took part in NAT detection.
    pub nat_detection: bool,
    /// This side is behind a NAT.
    pub nat_local: bool,
    /// The peer is behind a NAT.
    pub nat_remote: bool,
    /// The peer takes fragments.
    pub fragmentation: bool,
    /// The peer knows RFC 6023.
    pub childless: bool,
    /// The peer knows MOBIKE.
    pub mobike: bool,
}

/// A CHILD_SA that is to go on, or of which the peer has still to be told that it does not.
#[derive(Debug, PartialEq, Eq)]
pub struct SavedChild {
    /// Index in the connection's children.
    pub index: u16,
    /// Traffic is sent through it. If not, it was replaced or deleted, and the peer may not know.
    pub current: bool,
    /// The one among the saved that it is to replace.
    pub replaces: Option<u8>,
    /// The smaller nonce of the peer's rekey that made it; empty if it was not made so.
    pub nonce: Vec<u8>,
    /// Tunnel or transport.
    pub mode: Mode,
    /// SPI of packets to this side.
    pub spi_in: u32,
    /// SPI of packets to the peer.
    pub spi_out: u32,
    /// Algorithms.
    pub suite: ChildSuite,
    /// Keys of packets to this side.
    pub keys_in: (Secret, Secret),
    /// Keys of packets to the peer.
    pub keys_out: (Secret, Secret),
    /// This side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer's.
    pub remote_ts: Vec<TrafficSelector>,
    /// When it ends, if it is not rekeyed; to the second.
    pub ends: Option<SystemTime>,
}

const CURRENT: u8 = 1;
const TRANSPORT: u8 = 2;
const ESN: u8 = 4;
const ENDS: u8 = 8;

/// Replaces none.
const NONE: u8 = u8::MAX;

impl Traits {
    fn bits(self) -> u8 {
        let Self { nat_detection, nat_local, nat_remote, fragmentation, childless, mobike } = self;
        let flags = [nat_detection, nat_local, nat_remote, fragmentation, childless, mobike];
        (0_u8..).zip(flags).map(|(bit, flag)| u8::from(flag) << bit).sum()
    }

    fn of(bits: u8) -> Option<Self> {
        let bit = |number: u8| bits >> number & 1 == 1;
        let (nat_detection, nat_local, nat_remote) = (bit(0), bit(1), bit(2));
        let (fragmentation, childless, mobike) = (bit(3), bit(4), bit(5));
        let traits = Self { nat_detection, nat_local, nat_remote, fragmentation, childless, mobike };
        (traits.bits() == bits).then_some(traits)
    }
}

impl Whole {
    /// The algorithms.
    pub fn suite(&self) -> IkeSuite {
        let (encr, key_bits, integ) = self.context.protection.numbers();
        IkeSuite { encr, key_bits, prf: self.prf, integ, ke: self.ke, additional: self.additional.clone() }
    }

    /// What a Delete is made from; all else is wiped.
    pub fn into_context(self) -> V2Context {
        self.context
    }

    pub(super) fn write(&self, writer: &mut Writer) {
        let Self {
            context,
            expected_request,
            answer,
            life,
            prf,
            ke,
            additional,
            sk_d,
            fingerprint,
            identity: IdData { kind, data },
            addresses,
            traits,
            children,
        } = self;
        write_v2(writer, context);
        writer.bytes(&expected_request.to_be_bytes());
        writer.long(answer.as_deref().unwrap_or_default());
        writer.bytes(&life.to_be_bytes());
        writer.bytes(&prf.0.to_be_bytes());
        writer.bytes(&ke.0.to_be_bytes());
        write_methods(writer, additional);
        writer.short(sk_d.expose());
        writer.bytes(fingerprint);
        writer.bytes(&[kind.0]);
        writer.long(data);
        writer.count(addresses.len());
        for address in addresses {
            write_ip(writer, *address);
        }
        writer.bytes(&[traits.bits()]);
        writer.count(children.len());
        for child in children {
            child.write(writer);
        }
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, RecordError> {
        let context = read_v2(reader)?;
        let expected_request = reader.u32()?;
        let answer = Some(reader.long()?.to_vec()).filter(|answer| !answer.is_empty());
        let life = reader.u16()?;
        let prf = PrfId(reader.u16()?);
        let ke = KeMethod(reader.u16()?);
        let additional = read_methods(reader)?;
        let sk_d = Secret::new(reader.short()?);
        let length = Prf::new(prf).ok_or(RecordError::Malformed("an unknown function"))?.len();
        if sk_d.len() != length {
            return Err(RecordError::Malformed("keys of a wrong length"));
        }
        let fingerprint = reader.array()?;
        let identity = IdData { kind: IdType(reader.u8()?), data: reader.long()?.to_vec() };
        let addresses = (0..reader.u8()?).map(|_| read_ip(reader)).collect::<Result<_, _>>()?;
        let traits = Traits::of(reader.u8()?).ok_or(RecordError::Malformed("unknown flags"))?;
        let count = reader.u8()?;
        let children: Vec<SavedChild> =
            (0..count).map(|_| SavedChild::read(reader, count)).collect::<Result<_, _>>()?;
        Ok(Self {
            context,
            expected_request,
            answer,
            life,
            prf,
            ke,
            additional,
            sk_d,
            fingerprint,
            identity,
            addresses,
            traits,
            children,
        })
    }
}

impl SavedChild {
    fn write(&self, writer: &mut Writer) {
        let Self {
            index,
            current,
            replaces,
            nonce,
            mode,
            spi_in,
            spi_out,
            suite: ChildSuite { protocol, encr, key_bits, integ, ke, additional, esn },
            keys_in,
            keys_out,
            local_ts,
            remote_ts,
            ends,
        } = self;
        let transport = match mode {
            Mode::Tunnel => 0,
            Mode::Transport => TRANSPORT,
        };
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let flags = flag(*current, CURRENT) | transport | flag(*esn, ESN) | flag(ends.is_some(), ENDS);
        writer.bytes(&[flags, replaces.unwrap_or(NONE), protocol.0]);
        writer.long(nonce);
        writer.bytes(&index.to_be_bytes());
        writer.bytes(&spi_in.to_be_bytes());
        writer.bytes(&spi_out.to_be_bytes());
        for number in [encr.0, *key_bits, integ.0, ke.0] {
            writer.bytes(&number.to_be_bytes());
        }
        write_methods(writer, additional);
        for (encryption, integrity) in [keys_in, keys_out] {
            writer.bytes(encryption.expose());
            writer.bytes(integrity.expose());
        }
        for selectors in [local_ts, remote_ts] {
            writer.count(selectors.len());
            for selector in selectors {
                write_selector(writer, selector);
            }
        }
        if let Some(ends) = ends {
            let seconds = ends.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            writer.bytes(&seconds.to_be_bytes());
        }
    }

    /// One of `count`.
    fn read(reader: &mut Reader<'_>, count: u8) -> Result<Self, RecordError> {
        let [flags, replaces, protocol] = reader.array()?;
        let protocol = ProtocolId(protocol);
        if flags > (CURRENT | TRANSPORT | ESN | ENDS)
            || ![ProtocolId::ESP, ProtocolId::AH].contains(&protocol)
        {
            return Err(RecordError::Malformed("a child of an unknown kind"));
        }
        let replaces = Some(replaces).filter(|replaces| *replaces != NONE);
        if replaces.is_some_and(|replaces| replaces >= count) {
            return Err(RecordError::Malformed("a child replaces one that is not there"));
        }
        let nonce = reader.long()?.to_vec();
        let (index, spi_in, spi_out) = (reader.u16()?, reader.u32()?, reader.u32()?);
        let (encr, key_bits) = (EncrId(reader.u16()?), reader.u16()?);
        let (integ, ke) = (IntegId(reader.u16()?), KeMethod(reader.u16()?));
        let additional = read_methods(reader)?;
        let lengths = encr_key_length(encr, key_bits).zip(integ_key_length(integ));
        let (encryption, integrity) =
            lengths.ok_or(RecordError::Malformed("algorithms that are not known here"))?;
        let mut keys = || -> Result<_, RecordError> {
            Ok((Secret::new(reader.take(encryption)?), Secret::new(reader.take(integrity)?)))
        };
        let (keys_in, keys_out) = (keys()?, keys()?);
        let local_ts = (0..reader.u8()?).map(|_| read_selector(reader)).collect::<Result<_, _>>()?;
        let remote_ts = (0..reader.u8()?).map(|_| read_selector(reader)).collect::<Result<_, _>>()?;
        let ends = if flags & ENDS == 0 {
            None
        } else {
            let time = UNIX_EPOCH.checked_add(Duration::from_secs(reader.u64()?));
            Some(time.ok_or(RecordError::Malformed("a time"))?)
        };
        let esn = flags & ESN != 0;
        let suite = ChildSuite { protocol, encr, key_bits, integ, ke, additional, esn };
        let mode = if flags & TRANSPORT == 0 { Mode::Tunnel } else { Mode::Transport };
        let current = flags & CURRENT != 0;
        Ok(Self {
            index,
            current,
            replaces,
            nonce,
            mode,
            spi_in,
            spi_out,
            suite,
            keys_in,
            keys_out,
            local_ts,
            remote_ts,
            ends,
        })
    }
}

fn write_methods(writer: &mut Writer, methods: &Additional) {
    writer.count(methods.len());
    for method in methods {
        writer.bytes(&method.0.to_be_bytes());
    }
}

fn read_methods(reader: &mut Reader<'_>) -> Result<Additional, RecordError> {
    let mut methods = Additional::new();
    for _ in 0..reader.u8()? {
        let method = KeMethod(reader.u16()?);
        methods.try_push(method).map_err(|_| RecordError::Malformed("too many key exchanges"))?;
    }
    Ok(methods)
}

fn write_ip(writer: &mut Writer, address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            writer.bytes(&[4]);
            writer.bytes(&address.octets());
        }
        IpAddr::V6(address) => {
            writer.bytes(&[6]);
            writer.bytes(&address.octets());
        }
    }
}

fn read_ip(reader: &mut Reader<'_>) -> Result<IpAddr, RecordError> {
    match reader.u8()? {
        4 => Ok(IpAddr::from(reader.array::<4>()?)),
        6 => Ok(IpAddr::from(reader.array::<16>()?)),
        _ => Err(RecordError::Malformed("an address of an unknown family")),
    }
}

fn write_selector(writer: &mut Writer, selector: &TrafficSelector) {
    let TrafficSelector { start, end, protocol, ports } = selector;
    write_ip(writer, *start);
    write_ip(writer, *end);
    writer.bytes(&[*protocol]);
    writer.bytes(&ports.start().to_be_bytes());
    writer.bytes(&ports.end().to_be_bytes());
}

fn read_selector(reader: &mut Reader<'_>) -> Result<TrafficSelector, RecordError> {
    let (start, end) = (read_ip(reader)?, read_ip(reader)?);
    if start.is_ipv4() != end.is_ipv4() || start > end {
        return Err(RecordError::Malformed("a range of addresses"));
    }
    let protocol = reader.u8()?;
    let (first, last) = (reader.u16()?, reader.u16()?);
    Ok(TrafficSelector { start, end, protocol, ports: first..=last })
}

#[cfg(test)]
pub(crate) mod tests;
