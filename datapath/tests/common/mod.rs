//! Two gateways over memory ports, and packets to send through them.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::needless_pass_by_value,
    clippy::match_same_arms,
    reason = "helpers of tests stop a test like the test itself"
)]

use std::net::IpAddr;

use postern_contract::counters::DropReason;
use postern_contract::request::Operation;
use postern_contract::sa::*;
use postern_contract::secret::Secret;
use postern_contract::{Generation, Translation};
use postern_datapath::crypto::{Engine, EspKey, SealOp, SealOutcome, SequenceCounter};
use postern_datapath::testbed::{Layout, Testbed};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{esp, ip4, ip6, udp};
use tempfile::TempDir;

/// A suite by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suites {
    Gcm128,
    Gcm256,
    ChaCha,
    CbcSha1,
    CbcSha256,
    CbcSha384,
    CbcSha512,
    NullSha256,
    Gmac,
    AhSha1,
    AhSha256,
    AhSha512,
    AhGmac,
}

pub const ALL_SUITES: [Suites; 13] = [
    Suites::Gcm128,
    Suites::Gcm256,
    Suites::ChaCha,
    Suites::CbcSha1,
    Suites::CbcSha256,
    Suites::CbcSha384,
    Suites::CbcSha512,
    Suites::NullSha256,
    Suites::Gmac,
    Suites::AhSha1,
    Suites::AhSha256,
    Suites::AhSha512,
    Suites::AhGmac,
];

impl Suites {
    pub fn is_ah(self) -> bool {
        matches!(self, Self::AhSha1 | Self::AhSha256 | Self::AhSha512 | Self::AhGmac)
    }

    pub fn protocol(self) -> IpsecProtocol {
        if self.is_ah() { IpsecProtocol::Ah } else { IpsecProtocol::Esp }
    }

    /// Keys made from `seed`, so that both directions differ.
    pub fn suite(self, seed: u8) -> Suite {
        let (encryption, key, integrity, integrity_key) = match self {
            Self::Gcm128 => (Encryption::AesGcm16, 20, Integrity::None, 0),
            Self::Gcm256 => (Encryption::AesGcm16, 36, Integrity::None, 0),
            Self::ChaCha => (Encryption::ChaCha20Poly1305, 36, Integrity::None, 0),
            Self::CbcSha1 => (Encryption::AesCbc, 16, Integrity::HmacSha1_96, 20),
            Self::CbcSha256 => (Encryption::AesCbc, 32, Integrity::HmacSha2_256_128, 32),
            Self::CbcSha384 => (Encryption::AesCbc, 24, Integrity::HmacSha2_384_192, 48),
            Self::CbcSha512 => (Encryption::AesCbc, 32, Integrity::HmacSha2_512_256, 64),
            Self::NullSha256 => (Encryption::Null, 0, Integrity::HmacSha2_256_128, 32),
            Self::Gmac => (Encryption::NullAuthAesGmac, 20, Integrity::None, 0),
            Self::AhSha1 => (Encryption::Null, 0, Integrity::HmacSha1_96, 20),
            Self::AhSha256 => (Encryption::Null, 0, Integrity::HmacSha2_256_128, 32),
            Self::AhSha512 => (Encryption::Null, 0, Integrity::HmacSha2_512_256, 64),
            Self::AhGmac => (Encryption::Null, 0, Integrity::AesGmac, 20),
        };
        let bytes = |len: u8| Secret::new((0..len).map(|n| n.wrapping_mul(7) ^ seed).collect::<Vec<u8>>());
        Suite { encryption, encryption_key: bytes(key), integrity, integrity_key: bytes(integrity_key) }
    }
}

/// What the two gateways' tunnel is like.
#[derive(Clone, Debug)]
pub struct Options {
    pub outer_v6: bool,
    pub inner_v6: bool,
    pub mode: Mode,
    pub encap: Option<UdpEncap>,
    pub esn: bool,
    pub window: u16,
    pub follow: bool,
    pub sequence: u64,
    pub lifetime: Lifetime,
    pub path: PathPolicy,
    pub mtu: u16,
    /// ESP SAs get an AH SA around them.
    pub bundle: bool,
    pub workers: usize,
    pub frames: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            outer_v6: false,
            inner_v6: false,
            mode: Mode::Tunnel,
            encap: None,
            esn: true,
            window: 1024,
            follow: false,
            sequence: 1,
            lifetime: Lifetime::default(),
            path: PathPolicy::default(),
            mtu: 1500,
            bundle: false,
            workers: 1,
            frames: 1024,
        }
    }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn range(text: &str) -> AddressRange {
    AddressRange::from(text.parse::<ipnet::IpNet>().unwrap())
}

pub fn selector(local: &str, remote: &str) -> Selector {
    Selector {
        local: range(local),
        remote: range(remote),
        protocol: None,
        local_ports: 0..=u16::MAX,
        remote_ports: 0..=u16::MAX,
    }
}

/// Two gateways with a tunnel between them: host A behind gateway A, host B behind gateway B.
pub struct Pair {
    pub a: Testbed,
    pub b: Testbed,
    pub host: bool,
    pub state: TempDir,
}

pub const A_OUT: SaId = SaId(1);
pub const A_IN: SaId = SaId(2);
pub const A_AH_OUT: SaId = SaId(3);
pub const A_AH_IN: SaId = SaId(4);
pub const POLICY: PolicyId = PolicyId(1);
/// SPI of packets from A to B.
pub const SPI_AB: Spi = Spi(0x1001);
/// SPI of packets from B to A.
pub const SPI_BA: Spi = Spi(0x2002);
pub const AH_SPI_AB: Spi = Spi(0x3003);
pub const AH_SPI_BA: Spi = Spi(0x4004);

/// Addresses of a family on A's and B's sides.
pub fn outer(v6: bool) -> (IpAddr, IpAddr) {
    if v6 { (ip("2001:db8::1"), ip("2001:db8:1::1")) } else { (ip("192.0.2.1"), ip("198.51.100.1")) }
}

pub fn inner_nets(v6: bool) -> (&'static str, &'static str) {
    if v6 { ("fd01::/64", "fd02::/64") } else { ("10.1.0.0/24", "10.2.0.0/24") }
}

/// Side B's layout: the mirror of the default one.
pub fn layout_b() -> Layout {
    Layout {
        outside: vec![
            ("198.51.100.1/24".parse().unwrap(), ip("198.51.100.254")),
            ("2001:db8:1::1/64".parse().unwrap(), ip("2001:db8:1::fe")),
        ],
        inside: vec!["10.2.0.1/24".parse().unwrap(), "fd02::1/64".parse().unwrap()],
        inside_hosts: vec![ip("10.2.0.2"), ip("fd02::2")],
        ..Layout::default()
    }
}

/// The operations that make one side's half of the tunnel.
pub fn side(suite: Suites, options: &Options, a: bool) -> Vec<Operation> {
    let (addr_a, addr_b) = outer(options.outer_v6);
    let (local, remote) = if a { (addr_a, addr_b) } else { (addr_b, addr_a) };
    let (net_a, net_b) = match options.mode {
        Mode::Tunnel => inner_nets(options.inner_v6),
        Mode::Transport if options.outer_v6 => ("2001:db8::1/128", "2001:db8:1::1/128"),
        Mode::Transport => ("192.0.2.1/32", "198.51.100.1/32"),
    };
    let selectors = vec![if a { selector(net_a, net_b) } else { selector(net_b, net_a) }];
    let sa = |id, protocol, direction, spi, suite: Suite, pair, bundle| {
        let inbound = direction == Direction::Inbound;
        Operation::InstallSa(Box::new(SaConfig {
            id,
            generation: Generation(1),
            direction,
            protocol,
            mode: options.mode,
            spi: Translation::same(spi),
            local: Translation::same(local),
            remote: Translation::same(remote),
            encap: options.encap.filter(|_| protocol == IpsecProtocol::Esp),
            suite,
            esn: options.esn,
            replay_window: options.window,
            sequence: if inbound { options.sequence - 1 } else { options.sequence },
            selectors: selectors.clone(),
            lifetime: options.lifetime,
            path: options.path,
            follow_peer: options.follow && inbound,
            pair: Some(pair),
            bundle,
            origin: KeyOrigin::Static,
            worker: None,
            fan_out: FanOut::ByLoad,
        }))
    };
    let (spi_out, spi_in) = if a { (SPI_AB, SPI_BA) } else { (SPI_BA, SPI_AB) };
    let (ah_out, ah_in) = if a { (AH_SPI_AB, AH_SPI_BA) } else { (AH_SPI_BA, AH_SPI_AB) };
    let (seed_out, seed_in) = if a { (0x11, 0x22) } else { (0x22, 0x11) };
    let mut operations = Vec::new();
    let ah = Suites::AhSha256;
    if options.bundle {
        let (out, inn) = (Direction::Outbound, Direction::Inbound);
        let keys = |seed: u8| ah.suite(seed ^ 0x40);
        operations.push(sa(A_AH_IN, IpsecProtocol::Ah, inn, ah_in, keys(seed_in), A_AH_OUT, None));
        operations.push(sa(A_AH_OUT, IpsecProtocol::Ah, out, ah_out, keys(seed_out), A_AH_IN, None));
    }
    let bundle = |id| options.bundle.then_some(id);
    let protocol = suite.protocol();
    let (suite_in, suite_out) = (suite.suite(seed_in), suite.suite(seed_out));
    operations.push(sa(A_IN, protocol, Direction::Inbound, spi_in, suite_in, A_OUT, bundle(A_AH_IN)));
    operations.push(sa(A_OUT, protocol, Direction::Outbound, spi_out, suite_out, A_IN, bundle(A_AH_OUT)));
    operations.push(Operation::InstallPolicy(Policy {
        id: POLICY,
        generation: Generation(1),
        priority: 100,
        selectors,
        action: Action::Protect(Some(A_OUT)),
    }));
    operations
}

impl Pair {
    pub fn new(suite: Suites, options: Options) -> Self {
        Self::with(suite, options, |_, _| {})
    }

    /// A pair whose operations are changed before they are applied; `edit` is told whether they are A's.
    pub fn with(suite: Suites, options: Options, edit: impl Fn(&mut Vec<Operation>, bool)) -> Self {
        let state = TempDir::new().unwrap();
        // In transport mode the gateways are the hosts.
        let host = options.mode == Mode::Transport;
        let bed = |layout: Layout, name: &str| {
            let layout =
                Layout { mtu: options.mtu, workers: options.workers, frames: options.frames, host, ..layout };
            Testbed::new(&layout, &state.path().join(name)).unwrap()
        };
        let (mut a, mut b) = (bed(Layout::default(), "a"), bed(layout_b(), "b"));
        for (bed, is_a) in [(&mut a, true), (&mut b, false)] {
            let mut operations = side(suite, &options, is_a);
            edit(&mut operations, is_a);
            install(bed, operations);
        }
        Self { a, b, host, state }
    }

    /// Gateway A dies and comes back with its ledger; `operations` are installed anew.
    pub fn restart_a(&mut self, operations: Vec<Operation>) {
        let other = TempDir::new().unwrap();
        // The ledger is locked until its owner is gone.
        self.a = Testbed::new(&Layout::default(), other.path()).unwrap();
        self.a = Testbed::new(&Layout::default(), &self.state.path().join("a")).unwrap();
        install(&mut self.a, operations);
    }

    /// Frames of both are conserved and nothing was dropped.
    #[track_caller]
    pub fn clean(&self) {
        for bed in [&self.a, &self.b] {
            dropped(bed, DropReason::Malformed, 0);
        }
    }

    /// What gateway A sends to gateway B for a packet from host A.
    pub fn protect(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        if self.host { self.a.from_host(packet) } else { self.a.from_inside(packet).0 }
    }

    /// The same the other way.
    pub fn protect_b(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        if self.host { self.b.from_host(packet) } else { self.b.from_inside(packet).0 }
    }

    /// What arrives at host B when `packet` arrives at gateway B.
    pub fn open_b(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        let inside = self.b.from_outside(packet).1;
        if self.host { self.b.to_host() } else { inside }
    }

    /// What arrives at host A when `packet` arrives at gateway A.
    pub fn open_a(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        let inside = self.a.from_outside(packet).1;
        if self.host { self.a.to_host() } else { inside }
    }

    /// Sends a packet from host A; gives what arrives at host B.
    pub fn a_to_b(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        self.protect(packet).iter().flat_map(|sealed| self.open_b(sealed)).collect()
    }

    /// Sends a packet from host B; gives what arrives at host A.
    pub fn b_to_a(&mut self, packet: &[u8]) -> Vec<Vec<u8>> {
        self.protect_b(packet).iter().flat_map(|sealed| self.open_a(sealed)).collect()
    }
}

/// A UDP datagram over IPv4, DF set, with a right checksum.
pub fn udp4(source: &str, destination: &str, sport: u16, dport: u16, payload: &[u8]) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (ip(source), ip(destination)) else {
        panic!("family")
    };
    let mut packet = vec![0; 28 + payload.len()];
    packet[28..].copy_from_slice(payload);
    let length = u16::try_from(8 + payload.len()).unwrap();
    let header = udp::Header { source_port: sport, destination_port: dport, length, checksum: 0 };
    header.emit(&mut packet[20..]).unwrap();
    let check = udp::checksum_v4(source, destination, &packet[20..]);
    packet[26..28].copy_from_slice(&check.to_be_bytes());
    let header = ip4::Header {
        source,
        destination,
        protocol: Protocol::UDP,
        ttl: 64,
        tos: 0,
        id: 1,
        dont_fragment: true,
    };
    header.emit(&mut packet, 8 + payload.len()).unwrap();
    packet
}

/// A UDP datagram over IPv6 with a right checksum.
pub fn udp6(source: &str, destination: &str, sport: u16, dport: u16, payload: &[u8]) -> Vec<u8> {
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (ip(source), ip(destination)) else {
        panic!("family")
    };
    let mut packet = vec![0; 48 + payload.len()];
    packet[48..].copy_from_slice(payload);
    let length = u16::try_from(8 + payload.len()).unwrap();
    let header = udp::Header { source_port: sport, destination_port: dport, length, checksum: 0 };
    header.emit(&mut packet[40..]).unwrap();
    let check = udp::checksum_v6(source, destination, &packet[40..]);
    packet[46..48].copy_from_slice(&check.to_be_bytes());
    let header = ip6::Header {
        source,
        destination,
        next_header: Protocol::UDP,
        hop_limit: 64,
        traffic_class: 0,
        flow_label: 0,
    };
    header.emit(&mut packet, 8 + payload.len()).unwrap();
    packet
}

/// The packet after `hops` routers.
pub fn routed(packet: &[u8], hops: usize) -> Vec<u8> {
    let mut packet = packet.to_vec();
    for _ in 0..hops {
        postern_datapath::header::decrement_ttl(&mut packet).unwrap();
    }
    packet
}

/// One SA of an operation list.
pub fn sa(operations: &mut [Operation], id: SaId) -> &mut SaConfig {
    let found = operations.iter_mut().find_map(|operation| match operation {
        Operation::InstallSa(config) if config.id == id => Some(&mut **config),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no {id:?}"))
}

/// Installs operations that must all be taken.
pub fn install(bed: &mut Testbed, operations: Vec<Operation>) {
    for (place, result) in bed.apply(operations).into_iter().enumerate() {
        result.unwrap_or_else(|refusal| panic!("operation {place}: {refusal}"));
    }
}

/// DP-6: nothing was lost without a name.
#[track_caller]
pub fn conserved(bed: &Testbed) {
    assert_eq!(bed.missing_frames(), 0, "frames are missing");
    let (came, left) = bed.balance();
    assert_eq!(came, left, "came and made, left and dropped");
}

/// DP-6: `count` packets were dropped for `reason` and none for another.
#[track_caller]
pub fn dropped(bed: &Testbed, reason: DropReason, count: u64) {
    let drops: Vec<_> =
        DropReason::ALL.iter().map(|r| (r.label(), bed.drops(*r))).filter(|d| d.1 > 0).collect();
    let expected: Vec<_> = std::iter::once((reason.label(), count)).filter(|d| d.1 > 0).collect();
    assert_eq!(drops, expected);
    conserved(bed);
}

/// Seals `payload` as ESP by hand: padding, pad length and next header are the caller's, at the end of `plaintext`.
/// Gives the packet from the ESP header on.
pub fn seal(suite: &Suite, spi: Spi, sequence: u64, esn: bool, plaintext: &[u8]) -> Vec<u8> {
    let mut engine = Engine::select(postern_datapath::testbed::backend(), 1).unwrap();
    let key = EspKey::new(suite).unwrap();
    let layout = key.layout();
    let (head, tail) = (8 + usize::from(layout.iv_len), usize::from(layout.icv_len));
    let mut packet = vec![0; head + plaintext.len() + tail];
    packet[..4].copy_from_slice(&spi.0.to_be_bytes());
    packet[head..head + plaintext.len()].copy_from_slice(plaintext);
    // Always a 64-bit counter, so that a low half of zero can be had.
    let sequence = SequenceCounter::new(sequence, sequence + 1, true).reserve().unwrap();
    let mut ops = arrayvec::ArrayVec::<SealOp<'_>, 1>::new();
    ops.push(SealOp { key: (&key).into(), sequence, esn, packet: &mut packet });
    assert_eq!(engine.seal(ops)[..], [SealOutcome::Sealed]);
    packet
}

/// `payload` padded as a sender would (`extra` bytes before the padding are TFC padding), with pad length and next header.
pub fn with_trailer(payload: &[u8], next_header: Protocol, block: usize) -> Vec<u8> {
    let mut plaintext = payload.to_vec();
    let pad = esp::padding(payload.len(), block);
    plaintext.extend(1..=pad);
    plaintext.extend([pad, next_header.0]);
    plaintext
}

/// An IP packet of either family around `payload`; DF set.
pub fn ip_packet(
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    tos: u8,
    payload: &[u8],
) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = vec![0; 20];
            packet.extend_from_slice(payload);
            let header =
                ip4::Header { source, destination, protocol, ttl: 64, tos, id: 1, dont_fragment: true };
            header.emit(&mut packet, payload.len()).unwrap();
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = vec![0; 40];
            packet.extend_from_slice(payload);
            let header = ip6::Header {
                source,
                destination,
                next_header: protocol,
                hop_limit: 64,
                traffic_class: tos,
                flow_label: 0,
            };
            header.emit(&mut packet, payload.len()).unwrap();
            packet
        }
        _ => panic!("family"),
    }
}

/// `payload` in a UDP datagram without a checksum.
pub fn in_udp(source_port: u16, destination_port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = vec![0; 8];
    udp::Header { source_port, destination_port, length, checksum: 0 }.emit(&mut datagram).unwrap();
    datagram.extend_from_slice(payload);
    datagram
}

/// A UDP datagram between inside hosts of either family.
pub fn datagram(v6: bool, a_to_b: bool, payload: &[u8]) -> Vec<u8> {
    match (v6, a_to_b) {
        (false, true) => udp4("10.1.0.2", "10.2.0.2", 1000, 2000, payload),
        (false, false) => udp4("10.2.0.2", "10.1.0.2", 2000, 1000, payload),
        (true, true) => udp6("fd01::2", "fd02::2", 1000, 2000, payload),
        (true, false) => udp6("fd02::2", "fd01::2", 2000, 1000, payload),
    }
}

/// The IPv4 header checksum, or the absence of one, is right, and the lengths fit.
#[track_caller]
pub fn sound(packet: &[u8]) {
    if packet[0] >> 4 == 4 {
        let view = ip4::View::parse(packet).unwrap();
        assert!(view.checksum_ok(), "IPv4 header checksum");
        assert_eq!(view.total_len(), packet.len());
    } else {
        assert_eq!(ip6::View::parse(packet).unwrap().total_len(), packet.len());
    }
}
