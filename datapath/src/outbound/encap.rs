//! What is put around an outbound packet: outer IP, UDP, AH and ESP headers and the trailer, first with the values that the
//! ICV covers, then with those that go on the wire; and how many bytes that takes.

use std::net::IpAddr;

use itertools::izip;
use postern_contract::counters::DropReason;
use postern_contract::sa::{DfPolicy, DscpPolicy, IpsecProtocol, Mode};
use postern_wire::flow::Flow;
use postern_wire::ids::Protocol;
use postern_wire::{ah, esp, ip4, ip6, udp};

use super::{Came, Next, OutboundBatch};
use crate::core::Core;
use crate::crypto::{Engine, Reserved};
use crate::frame::{Arena, Frame};
use crate::header;
use crate::sad::config::{SaKey, SaShared};
use crate::sad::runtime::{OUTER_TTL, Outbound};

/// Bytes of the AH header that a bundle or an AH SA adds.
pub(super) fn ah_len(config: &SaShared, v6: bool) -> usize {
    match &config.key {
        SaKey::Ah(key) => ah::header_len(usize::from(key.icv_len()), v6),
        SaKey::Esp(_) => 0,
    }
}

/// Largest inner packet (in transport mode: packet, whose header has `header_len` bytes) that fits outer packets of
/// `mtu` bytes.
pub fn max_inner(core: &Core, state: &Outbound, mtu: usize, header_len: usize) -> usize {
    let v6 = state.config.remote.is_ipv6();
    let bundle = core.outbound.get(state.bundle).map_or(0, |bundle| ah_len(&bundle.config, v6));
    let (ip, kept) = match state.config.mode {
        Mode::Transport => (header_len, header_len),
        Mode::Tunnel if v6 => (ip6::LEN, 0),
        Mode::Tunnel => (ip4::MIN_LEN, 0),
    };
    match &state.config.key {
        SaKey::Ah(_) => (mtu + kept).saturating_sub(ip + ah_len(&state.config, v6)),
        SaKey::Esp(key) => {
            let layout = key.layout();
            let encap = if state.config.encap.is_some() { udp::LEN } else { 0 };
            let fixed = ip
                + encap
                + bundle
                + esp::HEADER_LEN
                + usize::from(layout.iv_len)
                + usize::from(layout.icv_len);
            // Blocks are powers of two, which a division would not know.
            let block = usize::from(layout.block).max(4);
            let room = mtu.saturating_sub(fixed) & block.wrapping_neg();
            room.saturating_sub(esp::TRAILER_LEN) + kept
        }
    }
}

/// Puts the headers in front of the packet, with the values that the ICV covers, and the trailer behind it.
pub(super) fn encap(core: &mut Core, batch: &mut OutboundBatch) {
    let columns = izip!(
        &mut batch.frames,
        &batch.cleartexts,
        &batch.flows,
        &batch.sas,
        &batch.numbers,
        &batch.ah_numbers,
        &mut batch.at,
        &mut batch.next
    );
    for (frame, cleartext, flow, sa, number, ah_number, at, next) in columns {
        if *next != Next::Continue {
            continue;
        }
        let (Some(flow), Some(number), Some(state), Some(peer)) =
            (flow, number, core.outbound.get(*sa), core.outbound.peer(*sa))
        else {
            continue;
        };
        let bundle = core.outbound.get(state.bundle).zip(ah_number.as_ref());
        let forwarded = cleartext.came == Came::Forwarded;
        let bundle = bundle.map(|(state, number)| (&*state.config, number));
        let headers = Headers { state, peer, bundle, number };
        let built = if state.config.is_plain() {
            headers.write_plain(&core.arena, frame, Inner::of(flow), forwarded)
        } else {
            headers.write(&core.arena, frame, flow, forwarded)
        };
        match built {
            Some(offset) => *at = offset,
            None => *next = Next::DropOfSa(DropReason::EgressMtu),
        }
    }
}

/// What the headers of one packet are made of.
struct Headers<'a> {
    state: &'a Outbound,
    peer: IpAddr,
    bundle: Option<(&'a SaShared, &'a Reserved)>,
    number: &'a Reserved,
}

/// What the outer header of tunnel mode is told of the inner packet.
#[derive(Clone, Copy)]
struct Inner {
    v6: bool,
    tos: u8,
    dont_fragment: bool,
}

impl Inner {
    fn of(flow: &Flow) -> Self {
        Self { v6: flow.source.is_ipv6(), tos: flow.tos, dont_fragment: flow.dont_fragment }
    }
}

impl Headers<'_> {
    /// [`Self::write`] of a plain SA: the usual case, in one pass.
    #[inline]
    fn write_plain(&self, arena: &Arena, frame: &mut Frame, inner: Inner, forwarded: bool) -> Option<u16> {
        let config = &*self.state.config;
        let SaKey::Esp(key) = &config.key else { return None };
        let layout = key.layout();
        let next_header = if inner.v6 { Protocol::IPV6 } else { Protocol::IPV4 };
        let ip_len = if self.peer.is_ipv6() { ip6::LEN } else { ip4::MIN_LEN };
        let (after_ip, at) = match config.encap {
            Some(_) => (Protocol::UDP, ip_len + udp::LEN),
            None => (Protocol::ESP, ip_len),
        };
        if forwarded {
            header::decrement_ttl(arena.bytes_mut(frame))?;
        }
        let payload = frame.len();
        let trailer = usize::from(esp::padding(payload, usize::from(layout.block))) + esp::TRAILER_LEN;
        let front = at + esp::HEADER_LEN + usize::from(layout.iv_len);
        frame.grow_front(front)?;
        frame.grow_back(trailer + usize::from(layout.icv_len))?;
        let bytes = arena.bytes_mut(frame);
        self.outer(bytes, inner, config.local, self.peer, after_ip)?;
        let (front, rest) = bytes.split_at_mut_checked(front)?;
        esp::write_trailer(rest.get_mut(payload..payload + trailer)?, next_header)?;
        let (ip, header) = front.split_at_mut_checked(at)?;
        esp::Header { spi: config.spi.on_wire, sequence: self.number.low() }.emit(header)?;
        if let Some(encap) = config.encap {
            let len = udp::LEN + header.len() + rest.len();
            udp::Header {
                source_port: encap.local_port,
                destination_port: self.state.peer_port,
                length: u16::try_from(len).ok()?,
                checksum: 0,
            }
            .emit(ip.get_mut(ip_len..)?)?;
        }
        u16::try_from(at).ok()
    }

    /// Gives the offset of the ESP header, or of the AH header of an SA without ESP. `None` when the frame has no room.
    fn write(&self, arena: &Arena, frame: &mut Frame, flow: &Flow, forwarded: bool) -> Option<u16> {
        let config = &self.state.config;
        let (local, remote) = config.authenticated_addresses(self.peer);
        let v6 = remote.is_ipv6();
        let tunnel = config.mode == Mode::Tunnel;
        // Transport mode: the packet's own header serves, with the addresses that the peer will see.
        let kept = if tunnel { 0 } else { usize::from(flow.header_len) };
        if tunnel {
            if forwarded {
                header::decrement_ttl(arena.bytes_mut(frame))?;
            }
        } else if config.authenticated().is_some() {
            let packet = arena.bytes_mut(frame);
            header::set_addresses(packet, local, remote)?;
            header::renew_upper_checksum(packet, kept);
        }
        let inner = match (tunnel, flow.source.is_ipv6()) {
            (true, false) => Protocol::IPV4,
            (true, true) => Protocol::IPV6,
            (false, _) => flow.protocol,
        };
        let ip_len = match (tunnel, v6) {
            (true, false) => ip4::MIN_LEN,
            (true, true) => ip6::LEN,
            (false, _) => kept,
        };
        let udp_len = if config.encap.is_some() { udp::LEN } else { 0 };
        let ah = match &config.key {
            SaKey::Ah(_) => Some((&**config, self.number)),
            SaKey::Esp(_) => self.bundle,
        };
        let ah_bytes = ah.map_or(0, |(config, _)| ah_len(config, v6));
        let saved = header::Saved::take(arena.bytes(frame).get(..kept)?)?;
        frame.shrink_front(kept)?;
        let esp = match &config.key {
            SaKey::Esp(key) => {
                let layout = key.layout();
                let pad = esp::padding(frame.len(), usize::from(layout.block));
                let trailer = usize::from(pad) + esp::TRAILER_LEN;
                let payload = frame.len();
                frame.grow_back(trailer + usize::from(layout.icv_len))?;
                let end = arena.bytes_mut(frame).get_mut(payload..payload + trailer)?;
                esp::write_trailer(end, inner)?;
                esp::HEADER_LEN + usize::from(layout.iv_len)
            }
            SaKey::Ah(_) => 0,
        };
        frame.grow_front(ip_len + udp_len + ah_bytes + esp)?;
        let total = frame.len();
        let bytes = arena.bytes_mut(frame);
        let after_ip = if ah_bytes > 0 {
            Protocol::AH
        } else if udp_len > 0 {
            Protocol::UDP
        } else {
            Protocol::ESP
        };
        if tunnel {
            self.outer(bytes, Inner::of(flow), local, remote, after_ip)?;
        } else {
            saved.restore(bytes);
            header::set_payload(bytes, usize::from(flow.next_header_at), after_ip)?;
        }
        let mut at = ip_len;
        if let Some(encap) = config.encap {
            let header = udp::Header {
                source_port: encap.local_port,
                destination_port: self.state.peer_port,
                length: u16::try_from(total.checked_sub(ip_len)?).ok()?,
                checksum: 0,
            };
            header.emit(bytes.get_mut(at..)?)?;
            at += udp::LEN;
        }
        if let Some((ah_config, number)) = ah {
            let SaKey::Ah(key) = &ah_config.key else { return None };
            let next_header = if esp > 0 { Protocol::ESP } else { inner };
            let header = ah::Header {
                next_header,
                spi: ah_config.spi.authenticated,
                sequence: number.low(),
                icv_len: usize::from(key.icv_len()),
            };
            header.emit(bytes.get_mut(at..)?, v6)?;
            if esp > 0 {
                at += ah_bytes;
            }
        }
        if esp > 0 {
            let header = esp::Header { spi: config.spi.authenticated, sequence: self.number.low() };
            header.emit(bytes.get_mut(at..)?)?;
        }
        u16::try_from(at).ok()
    }

    /// The outer header of tunnel mode (RFC 4301 section 5.1.2, RFC 6040).
    fn outer(
        &self,
        bytes: &mut [u8],
        inner: Inner,
        local: IpAddr,
        remote: IpAddr,
        protocol: Protocol,
    ) -> Option<()> {
        const ECN: u8 = 0b11;
        let path = &self.state.config.path;
        let dscp = match path.dscp {
            DscpPolicy::Copy => inner.tos & !ECN,
            DscpPolicy::Fixed(dscp) => dscp << 2,
        };
        // RFC 6040 section 4.1: normal mode copies, compatibility mode clears to Not-ECT.
        let tos = dscp | if path.ecn { inner.tos & ECN } else { 0 };
        let total = bytes.len();
        match (local, remote) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let dont_fragment = match path.df {
                    DfPolicy::Copy => inner.dont_fragment,
                    DfPolicy::Set => true,
                    DfPolicy::Clear => false,
                };
                // RFC 6864: an atomic datagram's ID has no meaning; others need one that does not come back soon.
                let id = if dont_fragment { 0 } else { u16::try_from(self.number.low() & 0xffff).ok()? };
                let header =
                    ip4::Header { source, destination, protocol, ttl: OUTER_TTL, tos, id, dont_fragment };
                header.emit(bytes, total.checked_sub(ip4::MIN_LEN)?)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let header = ip6::Header {
                    source,
                    destination,
                    next_header: protocol,
                    hop_limit: OUTER_TTL,
                    traffic_class: tos,
                    // RFC 6438: a label per flow lets routers spread tunnels over equal paths.
                    flow_label: self.state.config.spi.on_wire.0 & 0xf_ffff,
                };
                header.emit(bytes, total.checked_sub(ip6::LEN)?)
            }
            _ => None,
        }
    }
}

/// RFC 4302 section 3.3.3: the packet is muted in place, signed, and its IP header restored.
pub(super) fn sign_ah(
    arena: &Arena,
    crypto: &mut Engine,
    frame: &mut Frame,
    at: usize,
    config: &SaShared,
    number: Reserved,
) -> Option<()> {
    let SaKey::Ah(key) = &config.key else { return None };
    let (ip, _) = arena.bytes_mut(frame).split_at_mut_checked(at)?;
    let saved = header::Saved::take(ip)?;
    if header::is_v6(ip)? {
        ah::mute_v6(ip, at)?;
    } else {
        ah::mute_v4(ip)?;
    }
    let len = frame.len();
    if config.esn {
        let high = number.high().to_be_bytes();
        frame.grow_back(high.len())?;
        header::put(arena.bytes_mut(frame), len, high);
    }
    let signed = key.sign(crypto, number, arena.bytes_mut(frame), at + ah::FIXED_LEN);
    frame.truncate(len);
    let bytes = arena.bytes_mut(frame);
    saved.restore(bytes);
    signed?;
    if config.spi.is_translated() {
        header::put(bytes, at + 4, config.spi.on_wire.0.to_be_bytes());
    }
    Some(())
}

/// RLY-2: "swaps them on the wire": SPI and addresses of this side of the relay, once the ICV stands.
pub(super) fn to_wire(packet: &mut [u8], config: &SaShared, peer: IpAddr, at: usize) -> Option<()> {
    if config.protocol() == IpsecProtocol::Esp && config.spi.is_translated() {
        header::put(packet, at, config.spi.on_wire.0.to_be_bytes());
    }
    if config.authenticated().is_some() {
        header::set_addresses(packet, config.local, peer)?;
    }
    if config.encap.is_some()
        && let Some((IpAddr::V6(source), IpAddr::V6(destination))) =
            header::source(packet).zip(header::destination(packet))
    {
        // RFC 8200 section 8.1: unlike IPv4, UDP over IPv6 needs a checksum.
        let datagram = packet.get_mut(at.checked_sub(udp::LEN)?..)?;
        let check = udp::checksum_v6(source, destination, datagram);
        header::put(datagram, 6, check.to_be_bytes());
    }
    Some(())
}
