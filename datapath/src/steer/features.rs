//! What a driver can do with XDP, as the kernel tells it (the generic netlink family `netdev`, Linux 6.3).

use std::io;

use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

/// `GENL_ID_CTRL`: the family that knows the numbers of the others.
const CONTROLLER: u16 = 0x10;
/// `CTRL_CMD_GETFAMILY`.
const GET_FAMILY: u8 = 3;
/// `CTRL_ATTR_FAMILY_ID`.
const FAMILY_ID: u16 = 1;
/// `CTRL_ATTR_FAMILY_NAME`.
const FAMILY_NAME: u16 = 2;
/// `NETDEV_CMD_DEV_GET`.
const DEV_GET: u8 = 1;
/// `NETDEV_A_DEV_IFINDEX`.
const DEV_IFINDEX: u16 = 1;
/// `NETDEV_A_DEV_XDP_FEATURES`.
const DEV_XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`: frames of other interfaces can be sent.
const NDO_XMIT: u64 = 4;

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// Length of the headers of netlink and generic netlink.
const HEADERS: usize = 20;

/// Whether the interface sends frames that an XDP program redirects to it. Fails where the kernel cannot tell.
pub(super) fn takes_redirects(interface: u32) -> io::Result<bool> {
    let socket = Socket::new(NETLINK_GENERIC)?;
    let answer = ask(&socket, CONTROLLER, GET_FAMILY, FAMILY_NAME, b"netdev\0")?;
    let family = attribute(&answer, FAMILY_ID).and_then(|value| value.first_chunk());
    let family = u16::from_ne_bytes(*family.ok_or_else(nonsense)?);
    let answer = ask(&socket, family, DEV_GET, DEV_IFINDEX, &interface.to_ne_bytes())?;
    let features = attribute(&answer, DEV_XDP_FEATURES).and_then(|value| value.first_chunk());
    Ok(u64::from_ne_bytes(*features.ok_or_else(nonsense)?) & NDO_XMIT != 0)
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer has not what was asked for")
}

/// Sends a request with one attribute and gives the attributes of the answer.
fn ask(socket: &Socket, family: u16, command: u8, kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    let attribute = u16::try_from(4 + value.len()).map_err(|_| nonsense())?;
    let padded = value.len().next_multiple_of(4);
    let length = u32::try_from(HEADERS + 4 + padded).map_err(|_| nonsense())?;
    let mut request = Vec::new();
    request.extend(length.to_ne_bytes());
    request.extend(family.to_ne_bytes());
    request.extend(REQUEST.to_ne_bytes());
    // Sequence number and sender: the socket is asked one thing at a time.
    request.extend([0; 8]);
    request.extend([command, 1, 0, 0]);
    request.extend(attribute.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(value);
    request.resize(HEADERS + 4 + padded, 0);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let kind = answer.get(4..).and_then(<[u8]>::first_chunk).map(|bytes| u16::from_ne_bytes(*bytes));
    if kind == Some(ERROR) {
        let code = answer.get(16..).and_then(<[u8]>::first_chunk).map(|bytes| i32::from_ne_bytes(*bytes));
        return Err(io::Error::from_raw_os_error(code.unwrap_or(0).wrapping_neg()));
    }
    answer.get(HEADERS..).map(<[u8]>::to_vec).ok_or_else(nonsense)
}

/// The value of an attribute, padding included.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let [a, b, c, d] = *attributes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        // The two highest bits are flags.
        let kind = u16::from_ne_bytes([c, d]) & 0x3fff;
        if kind == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attributes are walked by their lengths, and lengths that are none end the walk.
    #[test]
    fn attributes_by_their_lengths() {
        let mut bytes = Vec::new();
        for (length, kind, value) in [(6u16, 1u16, [9, 9, 0, 0]), (8, 2 | 0x8000, [1, 2, 3, 4])] {
            bytes.extend(length.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
        }
        assert_eq!(attribute(&bytes, 1), Some(&[9, 9][..]));
        assert_eq!(attribute(&bytes, 2), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(&bytes, 3), None);
        assert_eq!(attribute(&[0, 0, 1, 0], 1), None);
        assert_eq!(attribute(&[], 1), None);
    }

    /// The loopback interface takes no redirected frames, and the kernel says so.
    #[test]
    fn loopback_takes_none() {
        assert!(!takes_redirects(1).unwrap());
    }
}
