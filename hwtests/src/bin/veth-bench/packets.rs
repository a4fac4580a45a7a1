//! The frames that the generator sends.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use arrayvec::ArrayVec;
use postern_contract::sa::{Encryption, Integrity, Suite};
use postern_contract::secret::Secret;
use postern_contract::settings::Backend;
use postern_datapath::crypto::{ESP_HEADER, Engine, EspKey, SealOp, SealOutcome, SequenceCounter};
use postern_hwtests::packet::{ETHERNET, ethernet, ip_header, udp};
use postern_wire::esp;
use postern_wire::ids::{Protocol, Spi};

use crate::wires::{FAR_HOST, NEAR_HOST, NOBODY, OUTSIDE, PEER};

const IP: usize = 20;
const UDP: usize = 8;
/// Where a cleartext frame has its number.
pub const NUMBER: usize = ETHERNET + IP + UDP;
/// Where an ESP frame has its sequence number.
pub const SEQUENCE: usize = ETHERNET + IP + 4;

/// A UDP datagram of `size` bytes with its IP header, without checksum, so that its number can be changed.
fn datagram(from: [u8; 4], to: [u8; 4], size: usize) -> Result<Vec<u8>> {
    let data = vec![0x5a; size.checked_sub(IP + UDP).context("too small")?];
    let mut packet = udp((IpAddr::from(from), 1000), (IpAddr::from(to), 2000), &data)?;
    packet.get_mut(IP + 6..IP + 8).context("too small")?.fill(0);
    Ok(packet)
}

/// To the far side, as it comes to the gateway from inside.
pub fn clear(gateway: [u8; 6], size: usize) -> Result<Vec<u8>> {
    Ok(ethernet(gateway, NOBODY, &datagram(NEAR_HOST, FAR_HOST, size)?))
}

/// Makes ESP frames to the gateway, numbered in the protected packet.
pub struct Sealer {
    engine: Engine,
    key: EspKey,
    spi: Spi,
    sequence: SequenceCounter,
}

impl Sealer {
    /// With the key of an AES-128-GCM SA and its salt.
    pub fn new(spi: u32, key: &[u8]) -> Result<Self> {
        let suite = Suite {
            encryption: Encryption::AesGcm16,
            encryption_key: Secret::new(key.to_vec()),
            integrity: Integrity::None,
            integrity_key: Secret::empty(),
        };
        let key = EspKey::new(&suite)?;
        let engine = Engine::select(Backend::Auto, 16)?;
        Ok(Self { engine, key, spi: Spi(spi), sequence: SequenceCounter::new(1, u64::MAX, true) })
    }

    /// So many frames with packets of `size` bytes.
    pub fn frames(&mut self, gateway: [u8; 6], size: usize, count: u32) -> Result<Vec<Vec<u8>>> {
        (0..count).map(|number| self.frame(gateway, size, number)).collect()
    }

    fn frame(&mut self, gateway: [u8; 6], size: usize, number: u32) -> Result<Vec<u8>> {
        let layout = self.key.layout();
        let pad = usize::from(esp::padding(size, usize::from(layout.block)));
        let front = ESP_HEADER + usize::from(layout.iv_len);
        let end = front + size + pad + esp::TRAILER_LEN;
        let mut packet = vec![0; end + usize::from(layout.icv_len)];
        esp::Header { spi: self.spi, sequence: 0 }.emit(&mut packet).context("no room")?;
        let mut inner = datagram(FAR_HOST, NEAR_HOST, size)?;
        inner.get_mut(IP + UDP..IP + UDP + 4).context("too small")?.copy_from_slice(&number.to_be_bytes());
        packet.get_mut(front..front + size).context("no room")?.copy_from_slice(&inner);
        let text = packet.get_mut(front + size..end).context("no room")?;
        esp::write_trailer(text, Protocol::IPV4).context("no room")?;
        let sequence = self.sequence.reserve()?;
        let mut ops = ArrayVec::<_, 1>::new();
        ops.push(SealOp { key: (&self.key).into(), sequence, esn: true, packet: &mut packet });
        let sealed = self.engine.seal(ops);
        ensure!(matches!(sealed.as_slice(), [SealOutcome::Sealed]), "not sealed");
        let header = ip_header(PEER.into(), OUTSIDE.into(), 50, packet.len())?;
        Ok(ethernet(gateway, NOBODY, &[header, packet].concat()))
    }
}
