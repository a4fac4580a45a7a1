//! The *IPsec translation table* of a blind relay (RLY-1, RLY-3). No type in this file can hold a key.

use core::net::IpAddr;

use postern_wire::ids::Spi;
use serde::{Deserialize, Serialize};

use crate::Generation;
use crate::sa::UdpEncap;

/// Control's name for one translation entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RelayId(pub u64);

/// The two SPIs of one IPsec protocol on one side of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SpiPair {
    /// Of packets that the relay receives from this side (c-SPI-2, s-SPI-2).
    pub to_relay: Spi,
    /// Of packets that the relay sends to this side (c-SPI-1, s-SPI-3).
    pub from_relay: Spi,
}

/// One partition of an entry: how the packets look between the relay and one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Partition {
    /// The relay's address on this side (c-addr-2, s-addr-2).
    pub relay: IpAddr,
    /// The client's or the gateway's address (c-addr-1, s-addr-3).
    pub peer: IpAddr,
    /// UDP encapsulation on this side only (RLY-11).
    pub encap: Option<UdpEncap>,
    /// SPIs of ESP, where the tunnel has ESP.
    pub esp: Option<SpiPair>,
    /// SPIs of AH, where the tunnel has AH. With both, AH is the outer header (SA bundle).
    pub ah: Option<SpiPair>,
}

/// One entry: a packet that matches one partition leaves with the values of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RelayEntry {
    /// Control's name for it.
    pub id: RelayId,
    /// State of this description.
    pub generation: Generation,
    /// Towards the client.
    pub client: Partition,
    /// Towards the gateway.
    pub gateway: Partition,
}

/// Why an entry is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum RelayError {
    /// One partition names an IPsec protocol that the other does not.
    #[error(
        "both partitions of a relay entry must name the same IPsec protocols, at least one of `esp` and `ah`"
    )]
    Protocols,
    /// AH covers addresses, so it cannot cross a NAT and RFC 3948 does not encapsulate it.
    #[error("AH cannot be encapsulated in UDP (RFC 3948)")]
    EncapsulatedAh,
    /// The four addresses are not of one family: translation adds no byte (RLY-1), so it cannot change the header.
    #[error("all four addresses of a relay entry must be of one family")]
    Family,
    /// An SPI from 0 to 255 cannot name an SA.
    #[error("SPIs 0 to 255 are reserved (RFC 4303 section 2.1)")]
    ReservedSpi,
}

impl RelayEntry {
    /// Checks what the types cannot say.
    pub fn validate(&self) -> Result<(), RelayError> {
        let Self { id: _, generation: _, client, gateway } = self;
        if client.esp.is_some() != gateway.esp.is_some()
            || client.ah.is_some() != gateway.ah.is_some()
            || (client.esp.is_none() && client.ah.is_none())
        {
            return Err(RelayError::Protocols);
        }
        for partition in [client, gateway] {
            if partition.encap.is_some() && partition.ah.is_some() {
                return Err(RelayError::EncapsulatedAh);
            }
            if [partition.relay, partition.peer].iter().any(|a| a.is_ipv4() != client.relay.is_ipv4()) {
                return Err(RelayError::Family);
            }
            let pairs = partition.esp.iter().chain(&partition.ah);
            if !pairs.flat_map(|pair| [pair.to_relay, pair.from_relay]).all(Spi::is_usable) {
                return Err(RelayError::ReservedSpi);
            }
        }
        Ok(())
    }
}
