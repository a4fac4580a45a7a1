//! The same for IKEv1: what the fuzz target `ike1_endpoint`, a property test and the replay of its seeds call.
//!
//! Two endpoints have an established IKE SA with a child. The input is a list of records: any datagram; any payloads in the
//! clear, in an exchange that someone begins; any payloads under the keys of the established IKE SA, with a hash that is
//! right (an authenticated peer that misbehaves) or without one (anyone who has Ka alone).

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::{Counting, EFFECTS, RECORDS, Side, address, connection, path, record};
use crate::auth::identity::Identity;
use crate::config::{Connection, PoolConfig, Settings, V1, Xauth};
use crate::endpoint::{Endpoint, Now, Target};
use crate::message::IkeSpi;
use crate::negotiate::keyword;
use crate::output::SaId;
use crate::record::{SavedBody, SavedIke};
use crate::v1::cipher::{Cipher, exchange_iv};

/// Exchange types that a record may name: those there are, and one there is not.
const EXCHANGES: [u8; 7] = [2, 4, 5, 32, 33, 6, 99];

fn connection_of_version_1(own: u8, peer: u8, aggressive: bool) -> Option<Connection> {
    let mut connection = connection(own, peer)?;
    connection.remote = Some(address(peer));
    connection.proposals = vec![keyword::ike("aes128-sha256-ecp256").ok()?];
    connection.remote_id = Identity::Ip(address(peer)).to_string().parse().ok()?;
    for child in &mut connection.children {
        child.remote_ts.truncate(1);
    }
    connection.v1 = Some(V1 { xauth: Xauth::None, aggressive });
    Some(connection)
}

fn side(own: u8, peer: u8, now: Now, aggressive: bool) -> Option<Side> {
    let random = Box::new(Counting(u64::from(own)));
    let machine = Box::new(super::Spis(u32::from(own) << 16));
    let mut endpoint = Endpoint::new(Settings::default(), machine, random);
    let pool = PoolConfig { name: "p".into(), first: [10, 9, 0, 1].into(), last: [10, 9, 0, 3].into() };
    endpoint.configure(now, vec![Arc::new(connection_of_version_1(own, peer, aggressive)?)], &[pool]);
    Some(Side { endpoint, saved: BTreeMap::new() })
}

struct Pair {
    a: Side,
    b: Side,
    sa: SaId,
    now: Now,
    random: Counting,
    /// What the responder has saved of the IKE SA.
    saved: Option<SavedIke>,
}

impl Pair {
    fn new(now: Now, aggressive: bool) -> Option<Self> {
        let (mut a, b) = (side(1, 2, now, aggressive)?, side(2, 1, now, aggressive)?);
        let sa = a.endpoint.initiate(now, "c", None).ok()?.sa;
        Some(Self { a, b, sa, now, random: Counting(7), saved: None })
    }

    fn carry(&mut self, rounds: usize) {
        for _ in 0..rounds {
            for datagram in self.a.settle(self.now, &mut self.random, None) {
                self.b.endpoint.handle_datagram(self.now, path(1, 2, false), &datagram);
            }
            for datagram in self.b.settle(self.now, &mut self.random, None) {
                self.a.endpoint.handle_datagram(self.now, path(2, 1, false), &datagram);
            }
        }
        // Kept when the record is removed: the keys of an SA that is gone may still be used.
        if let Some(record) = self.b.saved.values().next() {
            self.saved = SavedIke::decode(record).ok();
        }
    }

    /// A message under the keys of the IKE SA, its hash right or left out: these bytes as a chain that begins with `first`.
    fn sealed(&self, exchange: u8, id: u32, first: u8, chain: &[u8], hashed: bool) -> Option<Vec<u8>> {
        let SavedIke { spis: (cookie_i, cookie_r), body: SavedBody::V1Context(context), .. } =
            self.saved.as_ref()?
        else {
            return None;
        };
        let (text, outer) = if hashed {
            let hash = context.hash.prf(context.skeyid_a.expose(), &[&id.to_be_bytes(), chain]);
            let length = u8::try_from(4 + hash.len()).ok()?;
            ([&[first, 0, 0, length], hash.expose(), chain].concat(), 8)
        } else {
            (chain.to_vec(), first)
        };
        let iv = exchange_iv(context.hash, &context.last_block, id);
        let (sealed, _) = Cipher::new(context.ka.duplicate())?.encrypt(iv, text)?;
        Some(message((*cookie_i, *cookie_r), (outer, exchange, 1), id, &sealed))
    }
}

/// A message: first payload, exchange and flags, and what comes after the header.
fn message(
    (cookie_i, cookie_r): (IkeSpi, IkeSpi),
    (first, exchange, flags): (u8, u8, u8),
    id: u32,
    body: &[u8],
) -> Vec<u8> {
    let length = u32::try_from(28 + body.len()).unwrap_or(u32::MAX);
    let mut out = [cookie_i.0.to_be_bytes(), cookie_r.0.to_be_bytes()].concat();
    out.extend([first, 0x10, exchange, flags]);
    out.extend(id.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(body);
    out
}

/// Runs the input.
///
/// # Panics
/// When an endpoint panics, when a datagram has no end of effects, when the number of IKE SAs grows beyond its bounds, or
/// when what was sent without the keys of the established IKE SA did it harm.
pub fn endpoint_on(mut bytes: &[u8]) {
    let now = Now { monotonic: Instant::now(), wall: SystemTime::UNIX_EPOCH };
    let aggressive = bytes.first().is_some_and(|byte| byte & 0x80 != 0);
    let Some(mut pair) = Pair::new(now, aggressive) else { return };
    pair.carry(8);
    assert_eq!(pair.b.endpoint.counters().established, 1, "the pair is up");
    assert!(pair.saved.is_some(), "it is saved");
    let mut trusted = true;
    for _ in 0..RECORDS {
        let Some((kind, x, y, data)) = record(&mut bytes) else { break };
        let exchange = EXCHANGES.get(usize::from(x & 7)).copied().unwrap_or(5);
        let id = u32::from(x >> 3) + 1;
        let from = if x & 0x80 == 0 { 1 } else { x };
        let datagram = match kind & 3 {
            0 => Some(data.to_vec()),
            1 => {
                let cookies = (IkeSpi(u64::from(x) + 1), IkeSpi::NONE);
                let id = if exchange == 5 { id } else { 0 };
                Some(message(cookies, (y, exchange, kind >> 2 & 6), id, data))
            }
            hashed => {
                trusted = false;
                pair.sealed(exchange, id, y, data, hashed == 2)
            }
        };
        if let Some(datagram) = datagram {
            pair.b.endpoint.handle_datagram(now, path(from, 2, kind & 0x40 != 0), &datagram);
            pair.b.settle(now, &mut pair.random, Some(EFFECTS));
        }
        assert!(pair.b.endpoint.len() <= 2 + RECORDS, "{} IKE SAs", pair.b.endpoint.len());
    }
    if trusted {
        // Both still agree: another child comes up.
        let later = Now { monotonic: now.monotonic + Duration::from_secs(1), ..now };
        pair.now = later;
        assert!(pair.a.endpoint.rekey(later, &Target::Children("c".to_owned(), "net".to_owned())).is_ok());
        pair.carry(4);
        assert_eq!(pair.a.endpoint.counters().children_rekeyed, 1, "what nobody authenticated did harm");
        let established = pair.a.endpoint.sas(later).filter(|view| view.id == pair.sa).count();
        assert_eq!(established, 1, "the IKE SA is gone");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// IKE-2: no input makes an endpoint panic, grow, or do harm to what is there.
        #[test]
        fn ike_2_any_records(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            endpoint_on(&bytes);
        }
    }

    /// IKE-2: with the right hash a Delete does what it says: the exercise reaches what is behind it.
    #[test]
    fn ike_2_the_exercise_reaches_authenticated_payloads() {
        let now = Now { monotonic: Instant::now(), wall: SystemTime::UNIX_EPOCH };
        let mut pair = Pair::new(now, false).unwrap();
        pair.carry(8);
        let (cookie_i, cookie_r) = pair.saved.as_ref().unwrap().spis;
        let cookies = [cookie_i.0.to_be_bytes(), cookie_r.0.to_be_bytes()].concat();
        let delete = [&[0, 0, 0, 28, 0, 0, 0, 1, 1, 16, 0, 1][..], &cookies].concat();
        for (hashed, left) in [(false, 1), (true, 0)] {
            let sealed = pair.sealed(5, 77, 12, &delete, hashed).unwrap();
            pair.b.endpoint.handle_datagram(now, path(1, 2, false), &sealed);
            pair.b.settle(now, &mut pair.random, None);
            assert_eq!(pair.b.endpoint.sas(now).count(), left);
        }
    }

    /// The seeds of the fuzz target `ike1_endpoint` go through the same function.
    #[test]
    fn fuzz_seeds_hold() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../hwtests/fuzz/seeds/ike1_endpoint");
        let mut replayed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            endpoint_on(&std::fs::read(entry.unwrap().path()).unwrap());
            replayed += 1;
        }
        assert!(replayed >= 6, "{replayed} seeds in {folder}");
    }
}
