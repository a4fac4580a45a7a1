//! proptest strategies for the contract's types. Values are well-formed, not always valid: `validate` may refuse them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::ops::RangeInclusive;

use postern_wire::ids::{Protocol, Spi};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::counters::{DropReason, PortCounters, RelayCounters, SaCounters};
use crate::event::{Event, LimitKind};
use crate::relay::{Partition, RelayEntry, RelayError, RelayId, SpiPair};
use crate::request::{
    Cursor, Done, Latency, Operation, Page, PortStatus, Refusal, RelayReport, Reply, Request, SaReport,
    Status, SteerStatus, WorkerStatus,
};
use crate::sa::{
    Action, AddressRange, DfPolicy, Direction, DscpPolicy, Encryption, FanOut, Integrity, IpsecProtocol,
    KeyOrigin, Lifetime, Limits, Mode, PathPolicy, Policy, PolicyId, SaConfig, SaId, Selector, Suite,
    SuiteError, UdpEncap,
};
use crate::secret::Secret;
use crate::settings::Role;
use crate::{Generation, Translation};

/// Any address of either family.
pub fn address() -> impl Strategy<Value = IpAddr> + Clone {
    prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from(bits))),
        any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from(bits))),
    ]
}

/// Any SPI.
pub fn spi() -> impl Strategy<Value = Spi> + Clone {
    any::<u32>().prop_map(Spi)
}

/// The same value on both sides, or two.
pub fn translation<T: Copy + core::fmt::Debug>(
    value: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = Translation<T>> {
    (value.clone(), option::of(value))
        .prop_map(|(on_wire, other)| Translation { on_wire, authenticated: other.unwrap_or(on_wire) })
}

/// UDP encapsulation.
pub fn encap() -> impl Strategy<Value = UdpEncap> {
    any::<(u16, u16)>().prop_map(|(local_port, remote_port)| UdpEncap { local_port, remote_port })
}

/// An ordered range of one family.
pub fn range() -> impl Strategy<Value = AddressRange> {
    prop_oneof![
        any::<[u32; 2]>().prop_map(|mut ends| {
            ends.sort_unstable();
            let [start, end] = ends.map(|bits| IpAddr::V4(Ipv4Addr::from(bits)));
            AddressRange { start, end }
        }),
        any::<[u128; 2]>().prop_map(|mut ends| {
            ends.sort_unstable();
            let [start, end] = ends.map(|bits| IpAddr::V6(Ipv6Addr::from(bits)));
            AddressRange { start, end }
        }),
    ]
}

fn ports() -> impl Strategy<Value = RangeInclusive<u16>> {
    prop_oneof![Just(0..=u16::MAX), any::<(u16, u16)>().prop_map(|(a, b)| a.min(b)..=a.max(b))]
}

/// A selector pair.
pub fn selector() -> impl Strategy<Value = Selector> {
    (range(), range(), option::of(any::<u8>().prop_map(Protocol)), ports(), ports()).prop_map(
        |(local, remote, protocol, local_ports, remote_ports)| Selector {
            local,
            remote,
            protocol,
            local_ports,
            remote_ports,
        },
    )
}

fn key(len: usize) -> impl Strategy<Value = Secret> {
    vec(any::<u8>(), len).prop_map(Secret::new)
}

fn suite_of(
    encryption: Encryption,
    key_len: usize,
    integrity: Integrity,
    len: usize,
) -> BoxedStrategy<Suite> {
    (key(key_len), key(len))
        .prop_map(move |(encryption_key, integrity_key)| Suite {
            encryption,
            encryption_key,
            integrity,
            integrity_key,
        })
        .boxed()
}

/// A valid protocol and suite.
pub fn suite() -> impl Strategy<Value = (IpsecProtocol, Suite)> {
    let esp = prop_oneof![
        suite_of(Encryption::AesGcm16, 20, Integrity::None, 0),
        suite_of(Encryption::AesGcm16, 36, Integrity::None, 0),
        suite_of(Encryption::ChaCha20Poly1305, 36, Integrity::None, 0),
        suite_of(Encryption::NullAuthAesGmac, 20, Integrity::None, 0),
        suite_of(Encryption::AesCbc, 16, Integrity::HmacSha1_96, 20),
        suite_of(Encryption::AesCbc, 32, Integrity::HmacSha2_256_128, 32),
        suite_of(Encryption::AesCbc, 24, Integrity::HmacSha2_384_192, 48),
        suite_of(Encryption::Null, 0, Integrity::HmacSha2_512_256, 64),
    ];
    let ah = prop_oneof![
        suite_of(Encryption::Null, 0, Integrity::HmacSha2_256_128, 32),
        suite_of(Encryption::Null, 0, Integrity::AesGmac, 20),
    ];
    prop_oneof![
        3 => esp.prop_map(|suite| (IpsecProtocol::Esp, suite)),
        1 => ah.prop_map(|suite| (IpsecProtocol::Ah, suite)),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    any::<(Option<u64>, Option<u64>, Option<u64>)>().prop_map(|(seconds, bytes, packets)| Limits {
        seconds,
        bytes,
        packets,
    })
}

fn path() -> impl Strategy<Value = PathPolicy> {
    let df = prop_oneof![Just(DfPolicy::Copy), Just(DfPolicy::Set), Just(DfPolicy::Clear)];
    let dscp = prop_oneof![Just(DscpPolicy::Copy), (0_u8..64).prop_map(DscpPolicy::Fixed)];
    (df, dscp, any::<(bool, bool, Option<u16>)>()).prop_map(|(df, dscp, (ecn, mss_clamp, mtu))| PathPolicy {
        df,
        dscp,
        ecn,
        mtu,
        mss_clamp,
    })
}

fn direction() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(Direction::Inbound), Just(Direction::Outbound)]
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Tunnel), Just(Mode::Transport)]
}

/// An SA with a valid suite.
pub fn sa() -> impl Strategy<Value = SaConfig> {
    (
        any::<(u64, u64, u64, u16, bool, bool, u8)>(),
        (direction(), mode(), suite(), option::of(encap()), limits(), limits(), path()),
        (translation(spi()), translation(address()), translation(address()), vec(selector(), 0..4)),
        any::<(Option<u64>, Option<u64>, Option<u16>, u8)>(),
    )
        .prop_map(
            |(
                (id, generation, sequence, window, esn, follow_peer, origin),
                (direction, mode, (protocol, suite), encap, soft, hard, path),
                (spi, local, remote, selectors),
                (pair, bundle, worker, fan_out),
            )| SaConfig {
                id: SaId(id),
                generation: Generation(generation),
                direction,
                protocol,
                mode,
                spi,
                local,
                remote,
                encap,
                suite,
                esn,
                replay_window: window % 65 * 64,
                sequence,
                selectors,
                lifetime: Lifetime { soft, hard },
                path,
                follow_peer,
                pair: pair.map(SaId),
                bundle: bundle.map(SaId),
                origin: [KeyOrigin::Negotiated, KeyOrigin::Saved, KeyOrigin::Restored, KeyOrigin::Static]
                    .get(usize::from(origin % 4))
                    .copied()
                    .unwrap_or(KeyOrigin::Negotiated),
                worker,
                fan_out: [FanOut::ByLoad, FanOut::Always, FanOut::Never]
                    .get(usize::from(fan_out % 3))
                    .copied()
                    .unwrap_or_default(),
            },
        )
}

/// A policy.
pub fn policy() -> impl Strategy<Value = Policy> {
    let action = prop_oneof![
        any::<Option<u64>>().prop_map(|sa| Action::Protect(sa.map(SaId))),
        Just(Action::Bypass),
        Just(Action::Discard),
    ];
    (any::<(u64, u64, u32)>(), vec(selector(), 0..4), action).prop_map(
        |((id, generation, priority), selectors, action)| Policy {
            id: PolicyId(id),
            generation: Generation(generation),
            priority,
            selectors,
            action,
        },
    )
}

fn spi_pair() -> impl Strategy<Value = SpiPair> {
    (spi(), spi()).prop_map(|(to_relay, from_relay)| SpiPair { to_relay, from_relay })
}

fn partition() -> impl Strategy<Value = Partition> {
    (address(), address(), option::of(encap()), option::of(spi_pair()), option::of(spi_pair()))
        .prop_map(|(relay, peer, encap, esp, ah)| Partition { relay, peer, encap, esp, ah })
}

/// A translation entry.
pub fn relay() -> impl Strategy<Value = RelayEntry> {
    (any::<(u64, u64)>(), partition(), partition()).prop_map(|((id, generation), client, gateway)| {
        RelayEntry { id: RelayId(id), generation: Generation(generation), client, gateway }
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => sa().prop_map(|sa| Operation::InstallSa(Box::new(sa))),
        1 => any::<u64>().prop_map(|id| Operation::RemoveSa(SaId(id))),
        2 => policy().prop_map(Operation::InstallPolicy),
        1 => any::<u64>().prop_map(|id| Operation::RemovePolicy(PolicyId(id))),
        2 => relay().prop_map(Operation::InstallRelay),
        1 => any::<u64>().prop_map(|id| Operation::RemoveRelay(RelayId(id))),
    ]
}

fn cursor() -> impl Strategy<Value = Cursor> {
    prop_oneof![
        any::<u64>().prop_map(|id| Cursor::Sa(SaId(id))),
        any::<Option<u64>>().prop_map(|id| Cursor::Policy(id.map(PolicyId))),
        any::<Option<u64>>().prop_map(|id| Cursor::Relay(id.map(RelayId))),
    ]
}

/// Any request.
pub fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        1 => any::<u16>().prop_map(|version| Request::Hello { version }),
        1 => option::of(cursor()).prop_map(|after| Request::Inventory { after }),
        6 => (any::<u64>(), vec(operation(), 0..12))
            .prop_map(|(token, operations)| Request::Apply { token, operations }),
        1 => any::<u64>().prop_map(|id| Request::Sa(SaId(id))),
        1 => Just(()).prop_map(|()| Request::Status),
        1 => Just(()).prop_map(|()| Request::Latency),
        1 => Just(()).prop_map(|()| Request::Subscribe),
    ]
}

fn drops() -> impl Strategy<Value = Vec<(DropReason, u64)>> {
    vec((prop::sample::select(DropReason::ALL), any::<u64>()), 0..4)
}

fn sa_report() -> impl Strategy<Value = SaReport> {
    let counters = (any::<(u64, u64, u64, Option<u64>)>(), drops()).prop_map(
        |((packets, bytes, sequence, idle_seconds), drops)| SaCounters {
            packets,
            bytes,
            sequence,
            drops,
            idle_seconds,
        },
    );
    let fixed = any::<(u64, u64, u16, bool, bool, [u8; 8])>();
    let addresses = (translation(spi()), translation(address()), translation(address()), option::of(encap()));
    (fixed, direction(), mode(), addresses, counters).prop_map(
        |(
            (id, generation, worker, stopped, ah, key_check),
            direction,
            mode,
            (spi, local, remote, encap),
            counters,
        )| SaReport {
            id: SaId(id),
            generation: Generation(generation),
            direction,
            protocol: if ah { IpsecProtocol::Ah } else { IpsecProtocol::Esp },
            mode,
            spi,
            local,
            remote,
            encap,
            worker,
            stopped,
            key_check,
            counters,
        },
    )
}

fn relay_report() -> impl Strategy<Value = RelayReport> {
    (relay(), any::<[u64; 5]>()).prop_map(|(entry, counts)| {
        let [to_gateway_packets, to_gateway_bytes, to_client_packets, to_client_bytes, wrong_peer] = counts;
        RelayReport {
            entry,
            counters: RelayCounters {
                to_gateway_packets,
                to_gateway_bytes,
                to_client_packets,
                to_client_bytes,
                wrong_peer,
            },
        }
    })
}

fn status() -> impl Strategy<Value = Status> {
    let port = ("[a-z0-9]{1,15}", "[ -~]{0,20}", any::<(u32, u64, u64, u64, u64)>(), drops()).prop_map(
        |(
            interface,
            attachment,
            (queue, received, received_bytes, transmitted, transmitted_bytes),
            drops,
        )| {
            PortStatus {
                interface,
                role: Role::Outside,
                attachment,
                queue,
                counters: PortCounters { received, received_bytes, transmitted, transmitted_bytes, drops },
            }
        },
    );
    let worker = (any::<(Option<u16>, u64, u64, u64, u64, (u64, u64))>(), vec(port, 0..3)).prop_map(
        |((core, busy_turns, free_frames, inbound_sas, outbound_sas, (fanned_out, helped)), ports)| {
            WorkerStatus {
                core,
                busy_turns,
                free_frames,
                inbound_sas,
                outbound_sas,
                fanned_out,
                helped,
                ports,
            }
        },
    );
    let steer = ("[a-z0-9]{1,15}", vec(("[a-z_]{1,20}", any::<u64>()), 0..5))
        .prop_map(|(interface, verdicts)| SteerStatus { interface, verdicts });
    let counts = any::<(u32, u64, u64, u64, u64, Option<u64>)>();
    (counts, "[ -~]{0,12}", "[ -~]{0,12}", vec(worker, 0..3), vec(steer, 0..3)).prop_map(
        |(
            (pid, uptime_seconds, sas, policies, relays, relays_in_xdp),
            version,
            crypto_backend,
            workers,
            steer,
        )| {
            Status {
                version,
                pid,
                uptime_seconds,
                crypto_backend,
                sas,
                policies,
                relays,
                relays_in_xdp,
                workers,
                steer,
            }
        },
    )
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        any::<u64>().prop_map(|generation| Refusal::Stale(Generation(generation))),
        any::<u16>().prop_map(|len| SuiteError::EncryptionKeyLength(Encryption::AesGcm16, len).into()),
        any::<u16>().prop_map(|len| SuiteError::IntegrityKeyLength(Integrity::AesGmac, len).into()),
        Just(SuiteError::Combination(Encryption::Null, Integrity::None, IpsecProtocol::Ah).into()),
        Just(RelayError::Family.into()),
        "[ -~]{0,30}".prop_map(Refusal::Invalid),
        spi().prop_map(Refusal::SpiTaken),
        "[ -~]{0,30}".prop_map(Refusal::Immutable),
        "[ -~]{0,30}".prop_map(Refusal::Storage),
        Just(Refusal::Full),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let kind = || prop_oneof![Just(LimitKind::Seconds), Just(LimitKind::Bytes), Just(LimitKind::Packets)];
    prop_oneof![
        (any::<u64>(), kind()).prop_map(|(sa, kind)| Event::SoftLimit { sa: SaId(sa), kind }),
        (any::<u64>(), kind()).prop_map(|(sa, kind)| Event::HardLimit { sa: SaId(sa), kind }),
        any::<u64>().prop_map(|sa| Event::SequenceExhausted { sa: SaId(sa) }),
        (any::<(u64, Option<u16>)>(), address()).prop_map(|((sa, port), remote)| Event::NewPath {
            sa: SaId(sa),
            remote,
            port
        }),
        (any::<(u64, u8, (u16, u16))>(), address(), address()).prop_map(
            |((policy, protocol, ports), source, destination)| Event::Acquire {
                policy: PolicyId(policy),
                source,
                destination,
                protocol: Protocol(protocol),
                ports,
            }
        ),
        any::<u64>().prop_map(|count| Event::Lost { count }),
    ]
}

/// Any reply.
pub fn reply() -> impl Strategy<Value = Reply> {
    let page = (vec(sa_report(), 0..4), vec(policy(), 0..4), vec(relay_report(), 0..4), option::of(cursor()))
        .prop_map(|(sas, policies, relays, next)| Page { sas, policies, relays, next });
    let done = prop_oneof![Just(Done::Applied), Just(Done::Already)];
    let result = prop_oneof![done.prop_map(Ok), refusal().prop_map(Err)];
    prop_oneof![
        any::<(u16, u64, u32)>().prop_map(|(version, instance, pid)| Reply::Hello { version, instance, pid }),
        page.prop_map(Reply::Inventory),
        (any::<u64>(), vec(result, 0..20)).prop_map(|(token, results)| Reply::Applied { token, results }),
        option::of(sa_report()).prop_map(Reply::Sa),
        status().prop_map(Reply::Status),
        any::<[u64; 7]>().prop_map(|[samples, min, p50, p90, p99, p999, max]| {
            Reply::Latency(Latency { samples, min, p50, p90, p99, p999, max })
        }),
        vec(event(), 0..8).prop_map(Reply::Events),
        "[ -~]{0,60}".prop_map(Reply::Rejected),
    ]
}
