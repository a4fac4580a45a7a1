//! Cleartext on its way out: what a router does with a packet (RFC 1812), and the ICMP errors it owes.

use std::net::IpAddr;

use postern_contract::counters::DropReason;
use postern_wire::flow::{Flow, Fragment};
use postern_wire::ids::Protocol;
use postern_wire::{icmp, ip4, ip6};

use crate::core::Core;
use crate::egress;
use crate::fib::{PortIndex, Route};
use crate::frame::Frame;
use crate::header;
use crate::outbound::{Came, Cleartext};

/// The highest offset that a fragment can have (RFC 791 section 3.1).
const LAST_OFFSET: usize = 0x1fff * 8;

/// How an ICMP error gets back to the packet's sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The sender is on this side: by the routes.
    Inside,
    /// The sender is behind a tunnel: through the policies.
    Tunnel,
}

/// Why an ICMP error is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// Larger than this many bytes, and may not be fragmented (RFC 1191, RFC 8201).
    TooBig(usize),
    /// TTL or hop limit ran out.
    TimeExceeded,
}

/// Forwards a packet that came out of a tunnel, whose `flow` was read there. `clamp`: the inbound SA, if it clamps the
/// MSS.
pub fn deliver(core: &mut Core, mut frame: Frame, from: PortIndex, flow: &Flow, clamp: Option<u32>) {
    if let Some(sa) = clamp
        && flow.protocol == Protocol::TCP
        && flow.fragment == Fragment::No
        && let Some(mtu) = tunnel_mtu(core, sa)
    {
        header::clamp_mss(core.arena.bytes_mut(&mut frame), usize::from(flow.header_len), mtu);
    }
    route(core, frame, from, flow, Origin::Tunnel, true);
}

/// Largest inner packet that the way back through the tunnel takes: a peer should not send more either.
fn tunnel_mtu(core: &mut Core, sa: u32) -> Option<usize> {
    let pair = core.inbound.rest(sa)?.pair;
    let mtu = match core.fib.lookup(core.outbound.peer(pair)?) {
        Route::Via { mtu, .. } => usize::from(mtu),
        _ => 1500,
    };
    let outbound = core.outbound.get(pair)?;
    let mtu = outbound.config.path.mtu.map_or(mtu, |limit| mtu.min(usize::from(limit)));
    let header_len = if outbound.config.remote.is_ipv6() { ip6::LEN } else { ip4::MIN_LEN };
    Some(crate::outbound::max_inner(core, outbound, mtu, header_len))
}

/// Forwards a packet that is not to be protected. `hop`: this node is a router on its way, not its source.
pub fn route(core: &mut Core, mut frame: Frame, from: PortIndex, flow: &Flow, origin: Origin, hop: bool) {
    let route = core.fib.lookup(flow.destination);
    let Route::Via { mtu, .. } = route else {
        return egress::send(core, frame, from, route);
    };
    if hop && header::decrement_ttl(core.arena.bytes_mut(&mut frame)).is_none() {
        complain(core, &frame, from, origin, Complaint::TimeExceeded);
        return core.discard(frame, from, DropReason::TtlExpired);
    }
    let mtu = usize::from(mtu);
    if frame.len() <= mtu {
        return egress::send(core, frame, from, route);
    }
    if flow.dont_fragment {
        complain(core, &frame, from, origin, Complaint::TooBig(mtu));
        return core.discard(frame, from, DropReason::TooBig);
    }
    send_in_pieces(core, frame, from, mtu, route);
}

/// Sends an IPv4 packet without DF in as many fragments as it takes.
pub fn send_in_pieces(core: &mut Core, mut frame: Frame, from: PortIndex, mtu: usize, route: Route) {
    loop {
        match split(core, &mut frame, mtu) {
            Ok(Some(piece)) => egress::send(core, piece, from, route),
            Ok(None) => return egress::send(core, frame, from, route),
            Err(reason) => return core.discard(frame, from, reason),
        }
    }
}

/// Cuts the first fragment of at most `mtu` bytes off an IPv4 packet (RFC 791 section 3.2). `frame` keeps the rest as a
/// packet of its own. `None` when the rest fits; a packet that cannot be cut is left as it is.
pub fn split(core: &mut Core, frame: &mut Frame, mtu: usize) -> Result<Option<Frame>, DropReason> {
    if frame.len() <= mtu {
        return Ok(None);
    }
    let mut first = core.pool.take().ok_or(DropReason::NoFrame)?;
    if split_into(core, frame, &mut first, mtu).is_none() {
        core.pool.give(first);
        return Err(DropReason::Unfragmentable);
    }
    core.cells.made.add(1);
    Ok(Some(first))
}

fn split_into(core: &Core, frame: &mut Frame, first: &mut Frame, mtu: usize) -> Option<()> {
    let arena = &core.arena;
    // A later fragment may have a shorter header than the first, so it is read each time.
    let (header_len, offset, more) = {
        let view = ip4::View::parse(arena.bytes(frame)).ok()?;
        (view.header_len(), usize::from(view.fragment_offset()), view.more_fragments())
    };
    let payload = ip4::fragment_payload_len(header_len, mtu)?;
    // Everything that can fail comes before the first change to `frame`.
    let mut options = [0u8; ip4::MAX_LEN];
    let kept = ip4::copied_options(arena.bytes(frame).get(ip4::MIN_LEN..header_len)?, &mut options)?;
    if offset + payload > LAST_OFFSET {
        return None;
    }
    first.grow_back(header_len + payload)?;
    let bytes = arena.bytes_mut(first);
    bytes.copy_from_slice(arena.bytes(frame).get(..header_len + payload)?);
    ip4::set_total_len(bytes, header_len + payload)?;
    ip4::set_fragment(bytes, None, offset, true)?;
    // The rest: its header moves up to what is left of the payload, with the options that fragments carry.
    let mut head = [0u8; ip4::MAX_LEN];
    head.get_mut(..header_len)?.copy_from_slice(arena.bytes(frame).get(..header_len)?);
    let rest_header = ip4::MIN_LEN + kept;
    frame.shrink_front(header_len + payload)?;
    frame.grow_front(rest_header)?;
    let bytes = arena.bytes_mut(frame);
    let total = bytes.len();
    let (to, _) = bytes.split_at_mut_checked(rest_header)?;
    to.get_mut(..ip4::MIN_LEN)?.copy_from_slice(head.get(..ip4::MIN_LEN)?);
    to.get_mut(ip4::MIN_LEN..)?.copy_from_slice(options.get(..kept)?);
    if rest_header != header_len {
        // Another header length: written whole, so the checksum is made from what is there.
        let [first_byte, ..] = to else { return None };
        *first_byte = 0x40 | u8::try_from(rest_header / 4).ok()?;
        header::put(to, 10, [0, 0]);
        let check = postern_wire::checksum::finish(postern_wire::checksum::sum(to));
        header::put(to, 10, check.to_be_bytes());
    }
    ip4::set_total_len(bytes, total)?;
    ip4::set_fragment(bytes, None, offset + payload, more)
}

/// Sends an ICMP error about `frame`, within the limit per second.
#[cold]
pub fn complain(core: &mut Core, frame: &Frame, from: PortIndex, origin: Origin, complaint: Complaint) {
    let Some(v6) = header::is_v6(core.arena.bytes(frame)) else { return };
    let Some(address) = sender_address(core, frame, from, origin, v6) else { return };
    if !core.icmp_allowed() {
        return;
    }
    let Some(mut reply) = core.pool.take() else { return };
    let room = if v6 { icmp::MAX_V6 } else { icmp::MAX_V4 };
    let written = reply.grow_back(room).and_then(|()| {
        let original = core.arena.bytes(frame);
        let out = core.arena.bytes_mut(&mut reply);
        match (address, complaint) {
            (IpAddr::V4(from), Complaint::TooBig(mtu)) => {
                icmp::too_big_v4(original, u16::try_from(mtu).ok()?, from, out)
            }
            (IpAddr::V4(from), Complaint::TimeExceeded) => icmp::time_exceeded_v4(original, from, out),
            (IpAddr::V6(from), Complaint::TooBig(mtu)) => {
                icmp::too_big_v6(original, u32::try_from(mtu).ok()?, from, out)
            }
            (IpAddr::V6(from), Complaint::TimeExceeded) => icmp::time_exceeded_v6(original, from, out),
        }
    });
    let Some(len) = written else { return core.pool.give(reply) };
    reply.truncate(len);
    core.cells.made.add(1);
    match origin {
        Origin::Inside => {
            let Some(destination) = header::destination(core.arena.bytes(&reply)) else {
                return core.discard(reply, from, DropReason::Malformed);
            };
            let route = core.fib.lookup(destination);
            egress::send(core, reply, from, route);
        }
        Origin::Tunnel => {
            if let Err(reply) = core.own.push(reply, Cleartext { port: from, came: Came::Own }) {
                core.discard(reply, from, DropReason::NoFrame);
            }
        }
    }
}

/// An address of this node that the packet's sender can know: the one on the interface where the packet came in; for
/// what came through a tunnel one on the inside, as the policies let nothing else back through it.
fn sender_address(core: &Core, frame: &Frame, from: PortIndex, origin: Origin, v6: bool) -> Option<IpAddr> {
    let all = || (0..core.ports.len()).filter_map(|index| u16::try_from(index).ok()).map(PortIndex);
    let inside =
        |port: &PortIndex| core.ports.get(usize::from(port.0)).is_some_and(|info| info.role.is_inside());
    let first = match origin {
        Origin::Inside => core.fib.view().address_of(from, v6),
        Origin::Tunnel => all().filter(inside).find_map(|port| core.fib.view().address_of(port, v6)),
    };
    first
        .or_else(|| all().find_map(|port| core.fib.view().address_of(port, v6)))
        // A node without any address of that family answers in the name of the destination, as a transparent firewall
        // does: the sender learns the MTU all the same.
        .or_else(|| header::destination(core.arena.bytes(frame)))
}
