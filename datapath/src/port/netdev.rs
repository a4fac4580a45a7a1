//! What the kernel knows of a network interface, as far as it matters to a port: queues, addresses, driver, XDP abilities.
//!
//! Asked by netlink in the calling thread's network namespace (`/sys` shows that of whoever mounted it): the link itself by
//! rtnetlink, its queues by the `ethtool` family (Documentation/networking/ethtool-netlink), its XDP abilities by the `netdev`
//! family (Linux 6.3; Documentation/netlink/specs/netdev.yaml). An old kernel lacks the latter two; then the answer is a guess
//! or unknown, as the fields say.

use std::io;

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use postern_wire::ether::Mac;

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netdev {
    /// Its name.
    pub name: String,
    /// Its number in this network namespace.
    pub index: u32,
    /// Its link-layer address; `None` if it is no Ethernet interface.
    pub mac: Option<Mac>,
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// Whether it is set up (not whether it has a carrier).
    pub up: bool,
    /// Queues that both receive and send, which is how many sockets it takes. At least one; where the driver does not tell, the
    /// number that was allocated.
    pub queues: u32,
    /// Name of the driver, or kind of a virtual interface; empty if neither is known.
    pub driver: String,
    /// What it can do for XDP; `None` before Linux 6.3.
    pub xdp: Option<XdpAbilities>,
}

/// What a driver can do for XDP (`enum netdev_xdp_act`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpAbilities {
    /// Runs XDP programs itself, with redirect: native mode.
    pub native: bool,
    /// Has zero-copy AF_XDP.
    pub zero_copy: bool,
}

impl Netdev {
    /// Asks about the interface of this name.
    pub fn query(name: &str) -> io::Result<Self> {
        let route = Netlink::open(NETLINK_ROUTE)?;
        let mut body = vec![0; 16]; // struct ifinfomsg: any family, any index
        put(&mut body, IFLA_IFNAME, &zero_terminated(name));
        let answer = route.ask(RTM_GETLINK, &body).map_err(|error| {
            let what = if error.raw_os_error() == Some(libc::ENODEV) {
                "there is no such interface"
            } else {
                "cannot ask"
            };
            io::Error::new(error.kind(), format!("interface {name}: {what}: {error}"))
        })?;
        let mut device = Self::of_link(name, &answer).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("interface {name}: unexpected answer"))
        })?;
        if device.driver.is_empty() {
            device.driver = driver_in_sys(name);
        }
        // Both of these are more than every kernel and driver tells.
        if let Ok(generic) = Netlink::open(NETLINK_GENERIC) {
            if let Ok(Some(queues)) = generic.channels(device.index) {
                device.queues = queues.max(1);
            }
            device.xdp = generic.xdp_abilities(device.index).ok();
        }
        Ok(device)
    }

    /// Reads the answer to `RTM_GETLINK`, a `struct ifinfomsg` with attributes.
    fn of_link(name: &str, answer: &[u8]) -> Option<Self> {
        let (head, attributes) = answer.split_at_checked(16)?;
        let (ethernet, index, flags) =
            (number16(head.get(2..4)?)? == ARPHRD_ETHER, number32(head, 4)?, number32(head, 8)?);
        let find = |kind| find(attributes, kind);
        let count = |kind| find(kind).and_then(|value| number32(value, 0)).unwrap_or(1);
        let kind =
            find(IFLA_LINKINFO).and_then(|nested| self::find(nested, IFLA_INFO_KIND)).unwrap_or_default();
        let kind = kind.strip_suffix(&[0]).unwrap_or(kind);
        Some(Self {
            name: name.to_owned(),
            index,
            mac: find(IFLA_ADDRESS).and_then(|mac| mac.try_into().ok()).map(Mac).filter(|_| ethernet),
            mtu: find(IFLA_MTU).and_then(|mtu| number32(mtu, 0))?,
            up: flags & IFF_UP != 0,
            queues: count(IFLA_NUM_RX_QUEUES).min(count(IFLA_NUM_TX_QUEUES)).max(1),
            driver: String::from_utf8_lossy(kind).into_owned(),
            xdp: None,
        })
    }
}

/// The driver of a physical interface. In a namespace whose `/sys` is another's, nothing is found.
fn driver_in_sys(name: &str) -> String {
    std::fs::read_link(format!("/sys/class/net/{name}/device/driver"))
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_default()
}

struct Netlink(Socket);

impl Netlink {
    fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        Ok(Self(socket))
    }

    /// Asks one question (`nlmsghdr` is put before it); the body of the first message of the answer.
    fn ask(&self, kind: u16, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut request = Vec::with_capacity(HEADER + body.len());
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(NLM_F_REQUEST.to_ne_bytes());
        request.extend([0; 8]); // sequence number and port: there is one question at a time
        request.extend(body);
        self.0.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        read_answer(&answer)
    }

    /// Asks a generic netlink family; the attributes of the answer.
    fn ask_family(&self, family: &str, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let mut question = vec![CTRL_CMD_GETFAMILY, 1, 0, 0];
        put(&mut question, CTRL_ATTR_FAMILY_NAME, &zero_terminated(family));
        let answer = self.ask(GENL_ID_CTRL, &question)?;
        let id = answer
            .get(GENERIC_HEADER..)
            .and_then(|attributes| find(attributes, CTRL_ATTR_FAMILY_ID))
            .and_then(number16)
            .ok_or(io::ErrorKind::Unsupported)?;
        let mut body = vec![command, 1, 0, 0];
        body.extend(attributes);
        let answer = self.ask(id, &body)?;
        Ok(answer.get(GENERIC_HEADER..).unwrap_or_default().to_vec())
    }

    /// Queues that both receive and send; `None` if the driver does not say.
    fn channels(&self, index: u32) -> io::Result<Option<u32>> {
        let mut device = Vec::new();
        put(&mut device, ETHTOOL_A_HEADER_DEV_INDEX, &index.to_ne_bytes());
        let mut question = Vec::new();
        put(&mut question, ETHTOOL_A_CHANNELS_HEADER | NLA_F_NESTED, &device);
        let answer = self.ask_family("ethtool", ETHTOOL_MSG_CHANNELS_GET, &question)?;
        let count = |kind| find(&answer, kind).and_then(|value| number32(value, 0));
        let (combined, rx, tx) = (
            count(ETHTOOL_A_CHANNELS_COMBINED_COUNT),
            count(ETHTOOL_A_CHANNELS_RX_COUNT),
            count(ETHTOOL_A_CHANNELS_TX_COUNT),
        );
        if combined.or(rx).or(tx).is_none() {
            return Ok(None);
        }
        let separate = rx.unwrap_or(0).min(tx.unwrap_or(0));
        Ok(Some(combined.unwrap_or(0).saturating_add(separate)))
    }

    fn xdp_abilities(&self, index: u32) -> io::Result<XdpAbilities> {
        let mut question = Vec::new();
        put(&mut question, NETDEV_A_DEV_IFINDEX, &index.to_ne_bytes());
        let answer = self.ask_family("netdev", NETDEV_CMD_DEV_GET, &question)?;
        let features = find(&answer, NETDEV_A_DEV_XDP_FEATURES).and_then(|value| value.first_chunk());
        let features = u64::from_ne_bytes(*features.ok_or(io::ErrorKind::Unsupported)?);
        let native = XDP_ACT_BASIC | XDP_ACT_REDIRECT;
        Ok(XdpAbilities {
            native: features & native == native,
            zero_copy: features & XDP_ACT_XSK_ZEROCOPY != 0,
        })
    }
}

/// The body of the first message, or the error it tells.
fn read_answer(answer: &[u8]) -> io::Result<Vec<u8>> {
    let message = || {
        let length = usize::try_from(number32(answer, 0)?).ok()?;
        Some((number16(answer.get(4..6)?)?, answer.get(HEADER..length)?))
    };
    let Some((kind, body)) = message() else { return Err(io::ErrorKind::InvalidData.into()) };
    if kind == NLMSG_ERROR {
        let negative = number32(body, 0).unwrap_or_default().cast_signed();
        return Err(io::Error::from_raw_os_error(negative.wrapping_neg()));
    }
    Ok(body.to_vec())
}

/// Appends an attribute: length, kind, value, and padding to four bytes.
fn put(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The value of the first attribute of a kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(number16(attributes.get(..2)?)?);
        let kind = number16(attributes.get(2..4)?)? & NLA_TYPE_MASK;
        let value = attributes.get(ATTRIBUTE_HEADER..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn zero_terminated(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn number16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.first_chunk()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

// include/uapi/linux: netlink.h, rtnetlink.h, if_link.h, genetlink.h, ethtool_netlink.h, netdev.h
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const RTM_GETLINK: u16 = 18;
const ARPHRD_ETHER: u16 = 1;
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const ETHTOOL_MSG_CHANNELS_GET: u8 = 17;
const ETHTOOL_A_CHANNELS_HEADER: u16 = 1;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_CHANNELS_RX_COUNT: u16 = 6;
const ETHTOOL_A_CHANNELS_TX_COUNT: u16 = 7;
const ETHTOOL_A_CHANNELS_COMBINED_COUNT: u16 = 9;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const XDP_ACT_BASIC: u64 = 1;
const XDP_ACT_REDIRECT: u64 = 2;
const XDP_ACT_XSK_ZEROCOPY: u64 = 8;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_loopback_interface_is_known() {
        let device = Netdev::query("lo").unwrap();
        assert_eq!((device.index, device.mac, device.mtu), (1, None, 65536));
    }

    /// OPS-1: the name is told.
    #[test]
    fn ops_1_an_unknown_interface_is_told_by_name() {
        let error = Netdev::query("pt-none").unwrap_err();
        assert!(error.to_string().contains("interface pt-none: there is no such interface"), "{error}");
    }

    #[test]
    fn attributes_are_found_where_they_were_put() {
        let mut message = Vec::new();
        put(&mut message, 1, b"abc");
        put(&mut message, 2 | NLA_F_NESTED, &7_u32.to_ne_bytes());
        assert_eq!(find(&message, 1), Some(&b"abc"[..]));
        assert_eq!(find(&message, 2).and_then(|value| number32(value, 0)), Some(7));
        assert_eq!(find(&message, 3), None);
    }

    proptest! {
        /// No answer makes the reading panic or run forever.
        #[test]
        fn reading_never_panics(answer in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_answer(&answer);
            let _ = Netdev::of_link("x", &answer);
            let _ = find(&answer, 1);
        }
    }
}
