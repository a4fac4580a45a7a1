//! The walk on arbitrary input, with what must hold of it asserted.
//!
//! The fuzz target and the replay of its seeds call [`walk`]: gateway A seals genuine packets, the input damages,
//! repeats and invents others, and all of it arrives at gateway B, which has a valid SA of every kind. It is compiled
//! for tests and under the feature `exercise` only; a contradiction panics, which is what its callers look for.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a contradiction must stop the caller")]

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use arrayvec::ArrayVec;
use ipnet::IpNet;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::request::Operation;
use postern_contract::sa::{
    Action, AddressRange, Direction, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Mode,
    PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite, UdpEncap,
};
use postern_contract::secret::Secret;
use postern_contract::{Generation, Translation};
use postern_wire::ids::{Protocol, Spi};
use postern_wire::{esp, ip4, ip6, udp};
use tempfile::TempDir;

use crate::crypto::{Engine, EspKey, SealOp, SealOutcome, SequenceCounter};
use crate::frame::MAX_RECEIVE;
use crate::testbed::{INSIDE, INSIDE_MAC, Layout, OUTSIDE, OUTSIDE_MAC, Testbed, frame};

/// Steps taken of one input; what follows is ignored.
const STEPS: usize = 48;
const NATT: UdpEncap = UdpEncap { local_port: 4500, remote_port: 4500 };

/// One tunnel from A to B.
#[derive(Clone, Copy)]
struct Kind {
    encryption: (Encryption, usize),
    integrity: (Integrity, usize),
    protocol: IpsecProtocol,
    outer_v6: bool,
    esn: bool,
    encap: bool,
    window: u16,
    /// An AH SA around it.
    bundle: bool,
}

const GCM: Kind = Kind {
    encryption: (Encryption::AesGcm16, 20),
    integrity: (Integrity::None, 0),
    protocol: IpsecProtocol::Esp,
    outer_v6: false,
    esn: true,
    encap: false,
    window: 64,
    bundle: false,
};

const SHA256: (Integrity, usize) = (Integrity::HmacSha2_256_128, 32);

const KINDS: [Kind; 8] = [
    GCM,
    Kind { outer_v6: true, esn: false, ..GCM },
    Kind { encap: true, window: 4096, ..GCM },
    Kind { encryption: (Encryption::ChaCha20Poly1305, 36), ..GCM },
    Kind { encryption: (Encryption::AesCbc, 16), integrity: (Integrity::HmacSha1_96, 20), ..GCM },
    Kind { encryption: (Encryption::Null, 0), integrity: SHA256, outer_v6: true, encap: true, ..GCM },
    Kind { encryption: (Encryption::Null, 0), integrity: SHA256, protocol: IpsecProtocol::Ah, ..GCM },
    Kind { bundle: true, window: 1024, ..GCM },
];

fn outer(v6: bool) -> (IpAddr, IpAddr) {
    if v6 {
        let address = |high| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, high, 0, 0, 0, 0, 1));
        (address(0), address(1))
    } else {
        (IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)))
    }
}

fn range(first: u8, kind: usize) -> AddressRange {
    let third = u8::try_from(kind).unwrap();
    let address = |last| IpAddr::V4(Ipv4Addr::new(10, first, third, last));
    AddressRange { start: address(0), end: address(255) }
}

fn key(len: usize, seed: usize) -> Secret {
    Secret::new((0..len).map(|n| u8::try_from((n * 13 + seed * 57 + 5) % 256).unwrap()).collect::<Vec<u8>>())
}

fn spi(kind: usize, ah: bool) -> Spi {
    Spi(0x1000 + u32::try_from(kind).unwrap() + if ah { 0x100 } else { 0 })
}

impl Kind {
    fn suite(&self, seed: usize) -> Suite {
        Suite {
            encryption: self.encryption.0,
            encryption_key: key(self.encryption.1, seed),
            integrity: self.integrity.0,
            integrity_key: key(self.integrity.1, seed + 100),
        }
    }

    /// The SAs of tunnel `index` on A (outbound) or B (inbound, with `sequence` accepted already).
    fn sas(&self, index: usize, direction: Direction, sequence: u64) -> Vec<Operation> {
        let (a, b) = outer(self.outer_v6);
        let outbound = direction == Direction::Outbound;
        let (local, remote) = if outbound { (a, b) } else { (b, a) };
        let (local_net, remote_net) = if outbound { (1, 2) } else { (2, 1) };
        let id = SaId(10 + index as u64);
        let ah_id = SaId(110 + index as u64);
        let config = |id, protocol, suite, bundle, ah| {
            Operation::InstallSa(Box::new(SaConfig {
                id,
                generation: Generation(1),
                direction,
                protocol,
                mode: Mode::Tunnel,
                spi: Translation::same(spi(index, ah)),
                local: Translation::same(local),
                remote: Translation::same(remote),
                encap: (self.encap && !ah).then_some(NATT),
                suite,
                esn: self.esn,
                replay_window: self.window,
                sequence: if outbound { 1 } else { sequence },
                selectors: vec![Selector {
                    local: range(local_net, index),
                    remote: range(remote_net, index),
                    protocol: None,
                    local_ports: 0..=u16::MAX,
                    remote_ports: 0..=u16::MAX,
                }],
                lifetime: Lifetime::default(),
                path: PathPolicy::default(),
                follow_peer: true,
                pair: None,
                bundle,
                origin: KeyOrigin::Negotiated,
                worker: None,
                fan_out: FanOut::ByLoad,
            }))
        };
        let mut operations = Vec::new();
        if self.bundle {
            let ah = Kind { encryption: (Encryption::Null, 0), integrity: SHA256, ..GCM };
            operations.push(config(ah_id, IpsecProtocol::Ah, ah.suite(index + 50), None, true));
        }
        let bundle = self.bundle.then_some(ah_id);
        operations.push(config(id, self.protocol, self.suite(index), bundle, false));
        operations
    }
}

/// Both gateways, made once a thread; B's SAs are made anew for each input.
struct World {
    a: Testbed,
    b: Testbed,
    /// Sequence numbers that hand-made packets take: far above A's.
    next: u64,
    _state: TempDir,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

impl World {
    fn new() -> Self {
        let state = TempDir::new().unwrap();
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let bed = |name: &str, host: u8, outside| {
            let layout = Layout {
                outside,
                inside: vec![net(&format!("10.{host}.0.1/16"))],
                inside_hosts: (0..KINDS.len()).map(|kind| address(&format!("10.{host}.{kind}.2"))).collect(),
                frames: 512,
                ..Layout::default()
            };
            Testbed::new(&layout, &state.path().join(name)).unwrap()
        };
        let mut a = bed("a", 1, Layout::default().outside);
        let b = bed(
            "b",
            2,
            vec![
                (net("198.51.100.1/24"), address("198.51.100.254")),
                (net("2001:db8:1::1/64"), address("2001:db8:1::fe")),
            ],
        );
        let mut operations = Vec::new();
        for (index, kind) in KINDS.iter().enumerate() {
            operations.extend(kind.sas(index, Direction::Outbound, 0));
            operations.push(Operation::InstallPolicy(Policy {
                id: PolicyId(index as u64),
                generation: Generation(1),
                priority: 1,
                selectors: vec![Selector {
                    local: range(1, index),
                    remote: range(2, index),
                    protocol: None,
                    local_ports: 0..=u16::MAX,
                    remote_ports: 0..=u16::MAX,
                }],
                action: Action::Protect(Some(SaId(10 + index as u64))),
            }));
        }
        a.apply(operations).into_iter().for_each(|result| assert!(result.is_ok(), "{result:?}"));
        Self { a, b, next: 1 << 20, _state: state }
    }

    /// B's SAs and its relay entry, as new.
    fn reset(&mut self) {
        let mut operations = vec![Operation::RemoveRelay(RelayId(1))];
        for (index, kind) in KINDS.iter().enumerate() {
            let id = SaId(10 + index as u64);
            let sequence = self.a.publisher.sa(id).unwrap().counters.sequence;
            operations.push(Operation::RemoveSa(id));
            operations.push(Operation::RemoveSa(SaId(110 + index as u64)));
            operations.extend(kind.sas(index, Direction::Inbound, sequence));
        }
        let partition = |peer, to_relay, encap| Partition {
            relay: outer(false).1,
            peer: IpAddr::V4(Ipv4Addr::new(192, 0, 2, peer)),
            encap,
            esp: Some(SpiPair { to_relay: Spi(to_relay), from_relay: Spi(to_relay + 8) }),
            ah: None,
        };
        operations.push(Operation::InstallRelay(RelayEntry {
            id: RelayId(1),
            generation: Generation(1),
            client: partition(1, 0x3000, None),
            gateway: partition(3, 0x3001, Some(NATT)),
        }));
        self.b.apply(operations).into_iter().for_each(|result| assert!(result.is_ok(), "{result:?}"));
        self.b.departed();
    }

    /// Packets that B's SAs took as authentic, fresh and theirs.
    fn accepted(&self) -> u64 {
        let workers = self.b.workers.borrow();
        // Indices are used again, so none is above twice the number of SAs.
        let places = 0..4 * u32::try_from(KINDS.len()).unwrap();
        let inbound = workers
            .iter()
            .flat_map(|worker| places.clone().filter_map(|index| worker.core.inbound.get(index)));
        inbound.filter(|sa| sa.config.id.0 < 110).map(|sa| sa.traffic.packets).sum()
    }
}

/// Bytes of the input that are left.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn u8(&mut self) -> usize {
        self.take(1).first().copied().unwrap_or(0).into()
    }

    fn u16(&mut self) -> usize {
        self.u8() << 8 | self.u8()
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// Runs the input's steps; panics when something that must hold does not.
pub fn walk(bytes: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        world.reset();
        let mut input = Input(bytes);
        let mut run = Run { genuine: 0, sealed: Vec::new(), waiting: 0 };
        for _ in 0..STEPS {
            if input.0.is_empty() {
                break;
            }
            run.step(world, &mut input);
        }
        run.settle(world);
    });
}

/// One input's run.
struct Run {
    /// Packets so far that B may accept.
    genuine: u64,
    /// Genuine packets, to be sent again.
    sealed: Vec<Vec<u8>>,
    /// Packets that wait in B's rings.
    waiting: usize,
}

impl Run {
    fn step(&mut self, world: &mut World, input: &mut Input<'_>) {
        let op = input.u8();
        let before = world.accepted();
        let genuine = match op % 8 {
            0 => {
                let len = input.u16() % (MAX_RECEIVE + 64);
                world.b.outside.iter().for_each(|wire| wire.push(input.take(len)));
                0
            }
            1 => {
                let len = input.u16() % 2048;
                world.b.inside.iter().for_each(|wire| wire.push(input.take(len)));
                0
            }
            2 => {
                let packets = seal(&mut world.a, input);
                for packet in &packets {
                    world.b.push(OUTSIDE, packet);
                }
                let count = packets.len();
                self.sealed.extend(packets);
                count
            }
            3 => {
                let mut packets = seal(&mut world.a, input);
                packets.iter_mut().map(|packet| damage(world, packet, input)).sum()
            }
            4 => {
                world.next += 1;
                let packet = by_hand(world.next, input);
                world.b.push(OUTSIDE, &packet);
                1
            }
            5 => {
                let (protocol, v6) = (input.u8(), input.u8() % 2 == 1);
                let protocol = match protocol % 4 {
                    0 => Protocol::ESP,
                    1 => Protocol::AH,
                    2 => Protocol::UDP,
                    _ => Protocol(u8::try_from(protocol).unwrap_or(0)),
                };
                let len = input.u16() % 512;
                let packet = in_outer(v6, protocol, input.take(len));
                world.b.push(OUTSIDE, &packet);
                0
            }
            6 => {
                let which = input.u8();
                if let Some(packet) = self.sealed.get(which % self.sealed.len().max(1)) {
                    world.b.push(OUTSIDE, packet);
                }
                0
            }
            _ => {
                let len = input.u16() % 512;
                let packet = input.take(len);
                world.b.push(INSIDE, packet);
                0
            }
        };
        self.genuine += genuine as u64;
        self.waiting += 1;
        // The top bit keeps packets for one batch.
        if op < 128 || self.waiting > 40 {
            let alone = self.waiting == 1;
            self.settle(world);
            if alone {
                let accepted = world.accepted() - before;
                assert!(accepted <= genuine as u64, "{accepted} packets accepted of {genuine} genuine ones");
            }
        }
    }

    fn settle(&mut self, world: &mut World) {
        self.waiting = 0;
        world.b.departed();
        assert_eq!(world.b.missing_frames(), 0, "a frame was lost");
        let (came, left) = world.b.balance();
        assert_eq!(came, left, "a packet went without a name");
        let accepted = world.accepted();
        assert!(accepted <= self.genuine, "{accepted} accepted of {}", self.genuine);
    }
}

/// What A makes of a datagram of the input's.
fn seal(a: &mut Testbed, input: &mut Input<'_>) -> Vec<Vec<u8>> {
    let kind = u8::try_from(input.u8() % KINDS.len()).unwrap();
    let (ttl, tos) = (u8::try_from(input.u8()).unwrap(), u8::try_from(input.u8()).unwrap());
    let len = input.u16() % 2048;
    let payload = input.take(len);
    let header = ip4::Header {
        source: Ipv4Addr::new(10, 1, kind, 2),
        destination: Ipv4Addr::new(10, 2, kind, 2),
        protocol: Protocol(if tos & 4 == 0 { 17 } else { 6 }),
        ttl,
        tos,
        id: 7,
        dont_fragment: tos & 8 == 0,
    };
    let mut packet = vec![0; ip4::MIN_LEN + payload.len()];
    header.emit(&mut packet, payload.len()).unwrap();
    packet.splice(ip4::MIN_LEN.., payload.iter().copied());
    a.inside.iter().for_each(|wire| wire.push(&frame(INSIDE_MAC, &packet)));
    let (outside, _) = a.departed();
    outside
}

/// Changes some bytes of a packet and sends it to B. Gives 1 if it may still be accepted, as nothing that is
/// authenticated changed.
fn damage(world: &World, packet: &mut [u8], input: &mut Input<'_>) -> usize {
    // Outer header and, with UDP encapsulation, UDP header; AH covers part of them, so this is generous.
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let (header, protocol) = if v6 { (ip6::LEN, packet.get(6)) } else { (ip4::MIN_LEN, packet.get(9)) };
    let covered = header + if protocol == Some(&Protocol::UDP.0) { udp::LEN } else { 0 };
    let original = packet.to_vec();
    for _ in 0..=input.u8() % 3 {
        let (at, with) = (input.u16() % packet.len().max(1), u8::try_from(input.u8()).unwrap());
        if let Some(byte) = packet.get_mut(at) {
            *byte ^= with;
        }
    }
    // A cut as well, with or without a length field that knows of it.
    let cut = input.u8();
    let len = if cut % 4 == 1 { packet.len().saturating_sub(cut / 4) } else { packet.len() };
    let mut packet = packet.get(..len).unwrap_or_default().to_vec();
    if cut % 8 == 5 && !v6 {
        let _ = ip4::set_total_len(&mut packet, len);
    }
    world.b.outside.iter().for_each(|wire| wire.push(&frame(OUTSIDE_MAC, &packet)));
    usize::from(original.get(covered..) == packet.get(covered..))
}

/// An ESP packet that is authentic, whatever is in it: the input is the plaintext, with its trailer.
fn by_hand(sequence: u64, input: &mut Input<'_>) -> Vec<u8> {
    let index = input.u8() % 6;
    let kind = KINDS.get(index).unwrap();
    let len = input.u16() % 512;
    let plaintext = input.take(len);
    let mut engine = Engine::select(crate::testbed::backend(), 1).expect("known answers");
    let key = EspKey::new(&kind.suite(index)).unwrap();
    let layout = key.layout();
    let start = esp::HEADER_LEN + usize::from(layout.iv_len);
    let text = plaintext.len().max(2).next_multiple_of(usize::from(layout.block));
    let mut packet = vec![0; start + text + usize::from(layout.icv_len)];
    esp::Header { spi: spi(index, false), sequence: 0 }.emit(&mut packet).unwrap();
    // At the end of the text, so that the input decides on the trailer.
    let at = start + text - plaintext.len();
    packet.get_mut(at..start + text).unwrap().copy_from_slice(plaintext);
    let reserved = SequenceCounter::new(sequence, sequence + 1, true).reserve().unwrap();
    let mut ops = ArrayVec::<SealOp<'_>, 1>::new();
    ops.push(SealOp { key: (&key).into(), sequence: reserved, esn: kind.esn, packet: &mut packet });
    assert!(engine.seal(ops).iter().all(|outcome| *outcome == SealOutcome::Sealed));
    if !kind.encap {
        return in_outer(kind.outer_v6, Protocol::ESP, &packet);
    }
    let mut datagram = vec![0; udp::LEN];
    let header = udp::Header {
        source_port: 4500,
        destination_port: 4500,
        length: u16::try_from(udp::LEN + packet.len()).unwrap(),
        checksum: 0,
    };
    header.emit(&mut datagram).unwrap();
    datagram.extend(packet);
    in_outer(kind.outer_v6, Protocol::UDP, &datagram)
}

/// `payload` in an outer header from A to B.
fn in_outer(v6: bool, protocol: Protocol, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; if v6 { ip6::LEN } else { ip4::MIN_LEN }];
    let written = match outer(v6) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ip4::Header { source, destination, protocol, ttl: 64, tos: 0, id: 0, dont_fragment: true }
                .emit(&mut packet, payload.len())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => ip6::Header {
            source,
            destination,
            next_header: protocol,
            hop_limit: 64,
            traffic_class: 0,
            flow_label: 0,
        }
        .emit(&mut packet, payload.len()),
        _ => None,
    };
    written.unwrap();
    packet.extend_from_slice(payload);
    packet
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// DP-6: the seeds of the fuzz target.
    #[test]
    fn dp_6_fuzz_seeds_hold() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../hwtests/fuzz/seeds/walk");
        let mut replayed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            walk(&std::fs::read(entry.unwrap().path()).unwrap());
            replayed += 1;
        }
        assert!(replayed >= 10, "{replayed} seeds in {folder}");
    }

    /// The seeds do what they are there for: genuine packets of every kind are accepted.
    #[test]
    fn genuine_packets_are_accepted() {
        WORLD.with_borrow_mut(|world| {
            let world = world.get_or_insert_with(World::new);
            world.reset();
            let mut run = Run { genuine: 0, sealed: Vec::new(), waiting: 0 };
            for kind in 0..8 {
                run.step(world, &mut Input(&[2, kind, 64, 0, 0, 3, 1, 2, 3]));
                assert_eq!(world.accepted(), u64::from(kind) + 1);
            }
            run.step(world, &mut Input(&[6, 3]));
            run.step(world, &mut Input(&[4, 0, 0, 2, 0, 4]));
            assert_eq!(
                world.accepted(),
                9,
                "an empty inner packet is authentic, and counted before it is looked at"
            );
        });
    }

    proptest! {
        /// DP-6: arbitrary steps.
        #[test]
        fn dp_6_arbitrary_steps(
            steps in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..80)), 0..30)
        ) {
            let bytes: Vec<u8> = steps.into_iter().flat_map(|(op, rest)| std::iter::once(op).chain(rest)).collect();
            walk(&bytes);
        }
    }
}
