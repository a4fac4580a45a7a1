//! `[ike]` and `[[pool]]`: settings of IKE as a whole, and the addresses for clients.

use core::net::IpAddr;
use core::ops::RangeInclusive;
use core::time::Duration;
use std::path::PathBuf;
use std::sync::Arc;

use postern_ike::config::{PoolConfig, Retransmit, Settings};
use toml::de::DeValue;

use super::Context;
use crate::config::ike::{Ike, Listen};
use crate::config::reader::{Net, Read, Table, expected};

impl Context<'_> {
    /// The `[ike]` section; pools and connections are added to it.
    pub(super) fn ike(section: Option<Table<'_, '_>>) -> Ike {
        let default = Ike { threads: 2, ..Ike::default() };
        let Some(mut table) = section else { return default };
        let Listen { addresses: _, port, nat_port } = default.listen;
        let listen = Listen {
            addresses: table.or("addresses", Vec::new()),
            port: number(&mut table, "port", 1..=65_535, port),
            nat_port: number(&mut table, "nat_port", 1..=65_535, nat_port),
        };
        if listen.port == listen.nat_port {
            table.error(table.span.clone(), "nat_port", "`port` and `nat_port` must differ (RFC 3948)");
        }
        let keylog = table.get::<PathBuf>("keylog").map(|found| found.value);
        let Settings { retransmit, fragment_size, .. } = default.settings;
        let (cookie_threshold, half_open_limit, source_threshold) = (
            default.settings.cookie_threshold,
            default.settings.half_open_limit,
            default.settings.source_threshold,
        );
        let settings = Settings {
            retransmit: Retransmit {
                first: Duration::from_millis(u64::from(number(
                    &mut table,
                    "retransmit_first_ms",
                    10..=60_000,
                    u16::try_from(retransmit.first.as_millis()).unwrap_or(1000),
                ))),
                factor: table.or("retransmit_factor", Factor(retransmit.factor)).0,
                tries: u8::try_from(number(
                    &mut table,
                    "retransmit_tries",
                    1..=50,
                    u16::from(retransmit.tries),
                ))
                .unwrap_or(retransmit.tries),
            },
            cookie_threshold: table.or("cookie_threshold", cookie_threshold),
            half_open_limit: table.or("half_open_limit", half_open_limit),
            source_threshold: table.or("source_threshold", source_threshold),
            half_open_timeout: seconds(&mut table, "half_open_timeout_s", 1..=3600, 30),
            nat_keepalive: seconds(&mut table, "nat_keepalive_s", 1..=3600, 20),
            fragment_size: number(&mut table, "fragment_size", 576..=65_535, fragment_size),
            drain: default.settings.drain,
            port: listen.port,
            nat_port: listen.nat_port,
        };
        if settings.cookie_threshold > settings.half_open_limit {
            table.error(
                table.span.clone(),
                "cookie_threshold",
                "above `half_open_limit`: no cookie would ever be asked for",
            );
        }
        let threads = usize::from(number(&mut table, "threads", 1..=256, 2));
        table.finish();
        Ike { listen, settings, threads, keylog, ..default }
    }

    pub(super) fn pool(&self, mut table: Table<'_, '_>) -> Option<PoolConfig> {
        let name = self.name(&mut table, "pool");
        let range = table.need::<Net>("range");
        table.finish();
        let (name, range) = (name?, range?);
        // The address of the network itself and its broadcast address are of use in a pool: it is no network.
        let Net(postern_contract::sa::AddressRange { start: first, end: last }) = range.value;
        let mut seen = self.seen.borrow_mut();
        let overlaps = |(_, other_first, other_last): &&(String, IpAddr, IpAddr)| {
            first.is_ipv4() == other_first.is_ipv4() && first <= *other_last && *other_first <= last
        };
        if let Some((other, ..)) = seen.pools.iter().find(overlaps) {
            let message = format!("has addresses that pool {other:?} has too; give each address to one pool");
            self.report.error(range.span, &format!("pool[{name}].range"), message);
        }
        seen.pools.push((name.clone(), first, last));
        Some(PoolConfig { name: name.into(), first, last })
    }

    /// The pools that a connection names.
    pub(super) fn pools_of(&self, table: &mut Table<'_, '_>) -> Vec<Arc<str>> {
        let Some(found) = table.get::<Vec<String>>("pools") else { return Vec::new() };
        let seen = self.seen.borrow();
        for name in &found.value {
            if !seen.names.contains(&("pool", name.clone())) {
                let known: Vec<_> = seen.pools.iter().map(|(name, ..)| name.as_str()).collect();
                let message = match known.as_slice() {
                    [] => "there is no [[pool]]; add one with this name and a `range`".to_owned(),
                    known => format!("no pool has that name; there are: {}", known.join(", ")),
                };
                table.error(found.span.clone(), "pools", message);
            }
        }
        found.value.into_iter().map(Arc::from).collect()
    }
}

/// A number within bounds; `default` where it is not there or wrong.
pub(super) fn number(
    table: &mut Table<'_, '_>,
    key: &'static str,
    allowed: RangeInclusive<u16>,
    default: u16,
) -> u16 {
    let Some(found) = table.get::<u16>(key) else { return default };
    if allowed.contains(&found.value) {
        return found.value;
    }
    table.error(found.span, key, format!("expected a number from {} to {}", allowed.start(), allowed.end()));
    default
}

fn seconds(
    table: &mut Table<'_, '_>,
    key: &'static str,
    allowed: RangeInclusive<u16>,
    default: u16,
) -> Duration {
    Duration::from_secs(u64::from(number(table, key, allowed, default)))
}

/// Of each retransmission's wait to the one before.
struct Factor(f32);

impl Read for Factor {
    const EXPECTED: &'static str = "a number from 1.0 to 10.0";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let factor = match &value {
            DeValue::Float(number) => number.as_str().parse().ok(),
            DeValue::Integer(number) => number.as_str().parse().ok(),
            _ => None,
        };
        factor.filter(|factor| (1.0..=10.0).contains(factor)).map(Self).ok_or_else(expected::<Self>)
    }
}
