//! A whole endpoint on arbitrary input: what the fuzz target `ike_endpoint`, the property test and the replay of its seeds
//! all call.
//!
//! Two endpoints have an established IKE SA with a child. The input is a list of records, each telling what reaches the
//! responder next: any datagram; any payloads in an IKE_SA_INIT; any payloads under the keys of the established IKE SA
//! (an authenticated peer that misbehaves) or of one that is half-open (one that has not authenticated); any payloads in
//! the clear about the established IKE SA, for its initiator; or a reset of one of them, which then goes on with what was
//! saved of it (RST-2), or has lost all and shows its token (RFC 6290).

pub mod v1;

use core::net::IpAddr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::auth::identity::{Identity, IdentityPattern};
use crate::config::{
    Child, Connection, LocalAuth, Mode, PoolConfig, RemoteAuth, Selector, Settings, Start, Strategy, Unique,
};
use crate::endpoint::{Endpoint, Host, Now};
use crate::message::registry::{ExchangeType, PayloadType};
use crate::message::{Head, IkeSpi, TrafficSelector, emit};
use crate::negotiate::keyword;
use crate::output::{Effect, Path, Persist, SaId};
use crate::qcd::TokenMaker;
use crate::record::SavedIke;
use crate::{Random, Secret};

/// Most records that are read from one input.
const RECORDS: usize = 32;

/// Most effects that one datagram may have.
const EFFECTS: usize = 64;

/// Repeats itself, so that an input always does the same.
struct Counting(u64);

impl Random for Counting {
    fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = self.0.to_be_bytes()[0];
        }
    }
}

struct Spis(u32);

impl Host for Spis {
    fn allocate_spi(&mut self, _: &mut dyn Random) -> u32 {
        self.0 = self.0.wrapping_add(1).max(256);
        self.0
    }

    fn claim_spi(&mut self, _: u32) -> bool {
        true
    }

    fn release_spi(&mut self, _: u32) {}

    fn source_address(&mut self, _: IpAddr) -> Option<IpAddr> {
        Some(address(1))
    }
}

fn address(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

fn path(from: u8, to: u8, natt: bool) -> Path {
    let port = if natt { 4500 } else { 500 };
    Path { local: (address(to), port).into(), remote: (address(from), port).into(), natt }
}

fn connection(own: u8, peer: u8) -> Option<Connection> {
    let net = |last: u8| {
        Selector::Fixed(TrafficSelector {
            start: IpAddr::from([10, last, 0, 0]),
            end: IpAddr::from([10, last, 0, 255]),
            protocol: 0,
            ports: 0..=u16::MAX,
        })
    };
    let id = |last: u8| Identity::Ip(address(last));
    Some(Connection {
        name: "c".into(),
        fingerprint: [0; 32],
        local: vec![address(own)],
        remote_nets: Vec::new(),
        remote: (own == 1).then(|| address(peer)),
        remote_port: 500,
        proposals: vec![keyword::ike("aes128gcm16-prfsha256-x25519").ok()?],
        local_id: id(own),
        remote_id: IdentityPattern::Any,
        local_auth: LocalAuth::Psk(Secret::new(*b"exercise")),
        remote_auth: RemoteAuth::Psk(Secret::new(*b"exercise")),
        children: vec![Child {
            name: "net".into(),
            proposals: vec![keyword::esp("aes128gcm16").ok()?],
            local_ts: vec![net(own)],
            remote_ts: vec![net(peer), Selector::Dynamic { protocol: 0, ports: 0..=u16::MAX }],
            mode: Mode::Tunnel,
            start: Start::None,
            on_close: Start::None,
            on_dpd: Start::None,
            rekey: Some(Duration::from_hours(1)),
            rekey_jitter: Duration::ZERO,
            life: None,
        }],
        pools: vec!["p".into()],
        dns: Vec::new(),
        request_address: (false, false),
        mobike: true,
        fragmentation: true,
        childless: false,
        force_encap: false,
        rekey: Some(Duration::from_hours(2)),
        rekey_jitter: Duration::ZERO,
        over_time: Duration::from_mins(1),
        dpd: None,
        unique: Unique::Keep,
        reset: Strategy::Restore,
        v1: None,
    })
}

fn endpoint(own: u8, peer: u8, now: Now) -> Option<Endpoint> {
    let random = Box::new(Counting(u64::from(own)));
    let mut endpoint = Endpoint::new(Settings::default(), Box::new(Spis(u32::from(own) << 16)), random);
    endpoint.make_tokens(TokenMaker::new(Secret::new([own; 32])));
    let pool = PoolConfig { name: "p".into(), first: [10, 9, 0, 1].into(), last: [10, 9, 0, 3].into() };
    endpoint.configure(now, vec![Arc::new(connection(own, peer)?)], &[pool]);
    Some(endpoint)
}

/// An endpoint and what it has saved for the time after a reset.
struct Side {
    endpoint: Endpoint,
    /// Encoded records by their key.
    saved: BTreeMap<[u8; 16], Vec<u8>>,
}

impl Side {
    fn new(own: u8, peer: u8, now: Now) -> Option<Self> {
        Some(Self { endpoint: endpoint(own, peer, now)?, saved: BTreeMap::new() })
    }

    /// Everything but what was saved is lost.
    fn restored(self, own: u8, peer: u8, now: Now) -> Option<Self> {
        let mut endpoint = endpoint(own, peer, now)?;
        let records = self.saved.values().map(|bytes| SavedIke::decode(bytes).ok()).collect::<Option<_>>();
        assert!(records.is_some(), "what was saved cannot be read");
        endpoint.restore(now, records?);
        endpoint.handle_timeout(now);
        Some(Self { endpoint, ..self })
    }

    /// Runs jobs and acknowledges installations; gives the datagrams that went out. With `limit` it is a claim that there
    /// are no more effects than that.
    fn settle(&mut self, now: Now, random: &mut Counting, limit: Option<usize>) -> Vec<Vec<u8>> {
        let Self { endpoint, saved } = self;
        let mut sent = Vec::new();
        let mut effects = 0;
        while let Some(output) = endpoint.poll_output() {
            effects += 1;
            assert!(limit.is_none_or(|limit| effects <= limit), "one datagram has no end of effects");
            match output.effect {
                Effect::Transmit { datagram, .. } => sent.push(datagram),
                Effect::Compute { id, job } => endpoint.computed(now, id, job.run(random)),
                Effect::Install(child) => endpoint.installed(now, child.id, Ok(())),
                Effect::Persist(Persist::Put(record)) => {
                    saved.insert(record.key(), record.encode().to_vec());
                }
                Effect::Persist(Persist::Remove((spi_i, spi_r))) => {
                    let mut key = [0; 16];
                    let (first, second) = key.split_at_mut(8);
                    first.copy_from_slice(&spi_i.0.to_be_bytes());
                    second.copy_from_slice(&spi_r.0.to_be_bytes());
                    saved.remove(&key);
                }
                _ => {}
            }
        }
        sent
    }
}

/// The pair of endpoints, and the initiator's SA.
struct Pair {
    a: Side,
    b: Side,
    sa: SaId,
    now: Now,
    random: Counting,
}

impl Pair {
    fn new(now: Now) -> Option<Self> {
        let (mut a, b) = (Side::new(1, 2, now)?, Side::new(2, 1, now)?);
        let sa = a.endpoint.initiate(now, "c", None).ok()?.sa;
        Some(Self { a, b, sa, now, random: Counting(7) })
    }

    /// Carries datagrams to and fro, `rounds` times.
    fn carry(&mut self, rounds: usize, natt_from: usize) {
        for round in 0..rounds {
            let natt = round >= natt_from;
            for datagram in self.a.settle(self.now, &mut self.random, None) {
                self.b.endpoint.handle_datagram(self.now, path(1, 2, natt), &datagram);
            }
            for datagram in self.b.settle(self.now, &mut self.random, None) {
                self.a.endpoint.handle_datagram(self.now, path(2, 1, natt), &datagram);
            }
        }
    }

    /// A datagram for the responder.
    fn reach_b(&mut self, path: Path, datagram: &[u8]) -> Vec<Vec<u8>> {
        self.b.endpoint.handle_datagram(self.now, path, datagram);
        self.b.settle(self.now, &mut self.random, Some(EFFECTS))
    }

    /// A datagram for the initiator.
    fn reach_a(&mut self, path: Path, datagram: &[u8]) {
        self.a.endpoint.handle_datagram(self.now, path, datagram);
        self.a.settle(self.now, &mut self.random, Some(EFFECTS));
    }

    /// SPIs of the IKE SA, as long as the initiator has it.
    fn spis(&self) -> Option<(IkeSpi, IkeSpi)> {
        self.a.endpoint.sas(self.now).find(|sa| sa.id == self.sa).map(|sa| sa.spis)
    }

    /// One of them loses everything but what it saved, and goes on.
    fn restore(mut self, initiator: bool) -> Option<Self> {
        if initiator {
            self.a = self.a.restored(1, 2, self.now)?;
            self.sa = self.a.endpoint.sas(self.now).map(|sa| sa.id).min().unwrap_or(SaId(0));
        } else {
            self.b = self.b.restored(2, 1, self.now)?;
        }
        self.carry(6, 0);
        Some(self)
    }

    /// What the initiator would send, sealed: these bytes as a chain that begins with `first`.
    fn sealed(
        &mut self,
        exchange: ExchangeType,
        response: bool,
        first: PayloadType,
        chain: &[u8],
    ) -> Vec<Vec<u8>> {
        let Self { a, sa, random, .. } = self;
        a.endpoint
            .channel(*sa)
            .map(|channel| channel.forge(exchange, response, first, chain, random))
            .unwrap_or_default()
    }
}

/// Reads one record: what it is, two bytes of its own, and its data.
fn record<'a>(bytes: &mut &'a [u8]) -> Option<(u8, u8, u8, &'a [u8])> {
    let ([kind, x, y, high, low], rest) = bytes.split_first_chunk::<5>()?;
    let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
    let (data, rest) = rest.split_at_checked(length)?;
    *bytes = rest;
    Some((*kind, *x, *y, data))
}

/// Runs the input.
///
/// # Panics
/// When an endpoint panics, when a datagram has no end of effects, when the number of IKE SAs grows beyond its bounds, or
/// when what was sent without the keys of the established IKE SA did it harm.
pub fn endpoint_on(mut bytes: &[u8]) {
    let now = Now { monotonic: Instant::now(), wall: SystemTime::UNIX_EPOCH };
    let (Some(mut pair), Some(mut half)) = (Pair::new(now), Pair::new(now)) else { return };
    pair.carry(4, 1);
    assert_eq!(pair.b.endpoint.counters().established, 1, "the pair is up");
    let mut trusted = true;
    for _ in 0..RECORDS {
        let Some((kind, x, y, data)) = record(&mut bytes) else { break };
        match kind % 6 {
            0 => {
                pair.reach_b(path(x, 2, y & 1 == 1), data);
            }
            1 => {
                let head = Head {
                    spi_i: IkeSpi(u64::from(x) + 1),
                    spi_r: IkeSpi::NONE,
                    exchange: ExchangeType::IKE_SA_INIT,
                    from_initiator: true,
                    response: false,
                    message_id: 0,
                };
                pair.reach_b(path(x, 2, false), &emit::with_chain(&head, PayloadType(y), data));
            }
            2 => {
                trusted = false;
                let exchange = ExchangeType(34 + (x & 0x0f));
                for message in pair.sealed(exchange, x & 0x80 != 0, PayloadType(y), data) {
                    pair.reach_b(path(1, 2, true), &message);
                }
            }
            3 => {
                // IKE_SA_INIT is done; the first IKE_AUTH is ours to write.
                half.carry(1, 1);
                let exchange = ExchangeType(35 + (x & 0x0f));
                half.a.settle(now, &mut half.random, None);
                for message in half.sealed(exchange, false, PayloadType(y), data) {
                    half.reach_b(path(1, 2, true), &message);
                }
                assert!(half.b.endpoint.counters().established == 0, "nobody is let in without the secret");
            }
            4 => {
                let Some((spi_i, spi_r)) = pair.spis() else { continue };
                let (exchange, response) = (ExchangeType(34 + (x & 0x0f)), x & 0x80 != 0);
                let message_id = u32::from(x >> 4 & 7);
                let head = Head { spi_i, spi_r, exchange, from_initiator: false, response, message_id };
                pair.reach_a(path(2, 1, true), &emit::with_chain(&head, PayloadType(y), data));
            }
            _ => {
                if x & 2 == 0 {
                    let Some(restored) = pair.restore(x & 1 == 1) else { return };
                    pair = restored;
                    let both = !pair.a.endpoint.is_empty() && !pair.b.endpoint.is_empty();
                    assert!(both || !trusted, "a reset was not survived");
                } else if let Some(fresh) = Side::new(2, 1, now) {
                    // Lost is lost: the token is all that it has to say.
                    pair.b = fresh;
                    let asked = pair.sealed(ExchangeType::INFORMATIONAL, false, PayloadType::NONE, &[]);
                    for message in asked {
                        for datagram in pair.reach_b(path(1, 2, true), &message) {
                            pair.reach_a(path(2, 1, true), &datagram);
                        }
                    }
                }
                // It is not as it was.
                trusted = false;
            }
        }
        assert!(pair.b.endpoint.len() <= 2 + RECORDS, "{} IKE SAs", pair.b.endpoint.len());
    }
    if trusted {
        // Both still agree: a liveness check is answered.
        let later = Now { monotonic: now.monotonic + Duration::from_secs(1), ..now };
        assert!(pair.a.endpoint.rekey(later, &crate::endpoint::Target::Ike(pair.sa)).is_ok());
        pair.carry(4, 0);
        assert_eq!(pair.a.endpoint.counters().ike_rekeyed, 1, "what nobody authenticated did harm");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// IKE-1: no input makes an endpoint panic, grow, or let anybody in.
        #[test]
        fn ike_1_any_records(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            endpoint_on(&bytes);
        }
    }

    /// The seeds of the fuzz target `ike_endpoint` go through the same function.
    #[test]
    fn fuzz_seeds_hold() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/ike_endpoint");
        let mut replayed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            endpoint_on(&std::fs::read(entry.unwrap().path()).unwrap());
            replayed += 1;
        }
        assert!(replayed >= 10, "{replayed} seeds in {folder}");
    }
}
