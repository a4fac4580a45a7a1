//! `[[tunnel]]`: SAs with static keys and their policy.

use core::net::IpAddr;
use core::ops::Range;
use std::path::PathBuf;

use postern_contract::Translation;
use postern_contract::sa::{AddressRange, Encryption, IpsecProtocol, Lifetime, Limits, Mode};
use postern_contract::secret::Secret;
use postern_wire::ids::Spi;

use super::Context;
use super::common::{encapsulation, fan_out, path, ranges, replay_window, upper_layer};
use crate::config::keys::{from_hex, text};
use crate::config::reader::{Located, Net, Read, SecretText, Table};
use crate::config::suite::{EspSuite, Mac, describe_key};
use crate::config::{DEFAULT_PRIORITY, Half, Keyed, Tunnel};

impl Context<'_> {
    pub(super) fn tunnel(&self, mut table: Table<'_, '_>) -> Option<Tunnel> {
        let name = self.name(&mut table, "tunnel");
        let local = table.need::<IpAddr>("local");
        let remote = table.need::<IpAddr>("remote");
        let mode = table.or("mode", Mode::Tunnel);
        let esp_given = table.has("esp");
        let ah_given = table.has("ah");
        let esp = table.get::<EspSuite>("esp");
        let ah = table.get::<Mac>("ah");
        if !esp_given && !ah_given {
            table.error(
                table.span.clone(),
                "esp",
                "missing; a tunnel needs `esp`, `ah` or both, for example esp = \"aes128gcm16\"",
            );
        }
        let encap = table.table("encap").map(encapsulation);
        if encap.is_some() && ah_given {
            table.error(table.span.clone(), "encap", "AH cannot be encapsulated in UDP (RFC 3948)");
        }
        let esn = table.or("esn", true);
        let seen_as = table.table("seen_as").map(seen_as).unwrap_or_default();
        let algorithms =
            Algorithms { esp: Named::new(esp_given, esp.as_ref()), ah: Named::new(ah_given, ah.as_ref()) };
        let outbound =
            self.half(&mut table, "out", &algorithms, [seen_as.out_spi, seen_as.ah_out_spi], 1, esn);
        let inbound = self.half(&mut table, "in", &algorithms, [seen_as.in_spi, seen_as.ah_in_spi], 0, esn);

        let local_net = table.get::<Vec<Net>>("local_net");
        let remote_net = table.get::<Vec<Net>>("remote_net");
        let upper = upper_layer(&mut table);
        let replay_window = replay_window(&mut table);
        let follow_peer = table.or("follow_peer", true);
        let lifetime = table.table("lifetime").map(lifetime).unwrap_or_default();
        let path = path(&mut table);
        let priority = table.or("priority", DEFAULT_PRIORITY);
        let worker = self.worker(&mut table);
        let fan_out = fan_out(&mut table);

        if let (Some(local), Some(remote)) = (&local, &remote)
            && local.value.is_ipv4() != remote.value.is_ipv4()
        {
            table.error(remote.span.clone(), "remote", "`local` and `remote` must be of one address family");
        }
        let own = local.as_ref().map(|found| found.value).into_iter().chain(seen_as.local);
        let peers = remote.as_ref().map(|found| found.value).into_iter().chain(seen_as.remote);
        let mut addresses = own.chain(peers);
        if let Some(first) = addresses.next()
            && !addresses.all(|address| address.is_ipv4() == first.is_ipv4())
            && local
                .as_ref()
                .zip(remote.as_ref())
                .is_some_and(|(l, r)| l.value.is_ipv4() == r.value.is_ipv4())
        {
            table.error(
                table.span.clone(),
                "seen_as",
                "a relay adds no byte: all addresses must be of one family",
            );
        }
        let nets = self.nets(&table, mode, [local.as_ref(), remote.as_ref()], local_net, remote_net);
        let selectors = nets.map(|(local, remote)| self.selectors(&table, &local, &remote, &upper));
        let span = table.span.clone();
        table.finish();

        let tunnel = Tunnel {
            name: name?,
            mode,
            esp: algorithms.esp.known(),
            ah: algorithms.ah.known(),
            local: translated(local?.value, seen_as.local),
            remote: translated(remote?.value, seen_as.remote),
            outbound: outbound?,
            inbound: inbound?,
            selectors: selectors?,
            encap,
            esn,
            replay_window,
            follow_peer,
            path,
            lifetime,
            priority,
            worker,
            fan_out,
        };
        self.check_tunnel(&tunnel, &span);
        Some(tunnel)
    }

    /// The checks of a tunnel against those before it.
    fn check_tunnel(&self, tunnel: &Tunnel, span: &Range<usize>) {
        let who = format!("tunnel {:?}", tunnel.name);
        let key = format!("tunnel[{}]", tunnel.name);
        for (protocol, keyed) in
            [(IpsecProtocol::Esp, &tunnel.inbound.esp), (IpsecProtocol::Ah, &tunnel.inbound.ah)]
        {
            if let Some(keyed) = keyed {
                self.claim_spi(span, &format!("{key}.in"), protocol, keyed.spi.on_wire, None, &who);
            }
        }
        for (direction, half) in [("out", &tunnel.outbound), ("in", &tunnel.inbound)] {
            for (protocol, keyed) in [("ESP", &half.esp), ("AH", &half.ah)] {
                let Some(Keyed { suite, .. }) = keyed else { continue };
                // Two senders that count from 1 under one key and salt use the same nonces, which gives the key away.
                let counter_key = match suite.encryption {
                    Encryption::AesGcm16 | Encryption::ChaCha20Poly1305 | Encryption::NullAuthAesGmac => {
                        &suite.encryption_key
                    }
                    _ if suite.integrity == postern_contract::sa::Integrity::AesGmac => &suite.integrity_key,
                    _ => continue,
                };
                let digest = crate::digest::sha256(&[b"same key\0", counter_key.expose()]);
                let user = format!("{who}, `{direction}`, {protocol}");
                if let Some(other) = self.seen.borrow().keys.get(&digest) {
                    self.report.error(
                        span.clone(),
                        &format!("{key}.{direction}"),
                        format!(
                            "the same key as {other}: under one key and salt no two SAs may count, their nonces \
                             would repeat (RFC 4106 section 2); give each its own"
                        ),
                    );
                }
                self.seen.borrow_mut().keys.insert(digest, user);
            }
        }
        self.claim_selectors(span, &key, &tunnel.selectors, tunnel.priority, &who);
    }

    /// The `out` or `in` table of a tunnel.
    fn half(
        &self,
        tunnel: &mut Table<'_, '_>,
        key: &'static str,
        algorithms: &Algorithms,
        [esp_seen, ah_seen]: [Option<Spi>; 2],
        first: u64,
        esn: bool,
    ) -> Option<Half> {
        let Some(mut table) = tunnel.table(key) else {
            if !tunnel.has(key) {
                tunnel.error(tunnel.span.clone(), key, "missing; expected a table with `spi` and `key`");
            }
            return None;
        };
        let mut complete = true;
        let mut esp = None;
        if algorithms.esp.is_given() {
            esp = self.esp_half(&mut table, algorithms.esp.known(), esp_seen, first, esn);
            complete &= esp.is_some();
        } else {
            let keys = ["spi", "key", "key_file", "integrity_key", "integrity_key_file", "sequence"];
            refuse(&mut table, keys, "esp");
        }
        let mut ah = None;
        if algorithms.ah.is_given() {
            ah = self.ah_half(&mut table, algorithms.ah.known(), ah_seen, first, esn);
            complete &= ah.is_some();
        } else {
            refuse(&mut table, ["ah_spi", "ah_key", "ah_key_file", "ah_sequence"], "ah");
        }
        table.finish();
        complete.then_some(Half { esp, ah })
    }

    fn ah_half(
        &self,
        table: &mut Table<'_, '_>,
        mac: Option<Mac>,
        seen: Option<Spi>,
        first: u64,
        esn: bool,
    ) -> Option<Keyed> {
        let spi = table.need::<Spi>("ah_spi");
        let wanted = mac.map(|mac| (mac.keyword, mac.key, mac.salt));
        let key = self.secret(table, ["ah_key", "ah_key_file"], wanted);
        let sequence = sequence(table, "ah_sequence", first, esn);
        Some(Keyed { spi: translated(spi?.value, seen), suite: mac?.with_key(key?), sequence: sequence? })
    }

    fn esp_half(
        &self,
        table: &mut Table<'_, '_>,
        suite: Option<EspSuite>,
        seen: Option<Spi>,
        first: u64,
        esn: bool,
    ) -> Option<Keyed> {
        let spi = table.need::<Spi>("spi");
        let wanted = suite.map(|EspSuite { cipher, .. }| (cipher.keyword, cipher.key, cipher.salt));
        let encryption_key = self.secret(table, ["key", "key_file"], wanted);
        let wanted =
            suite.map(|EspSuite { mac, .. }| mac.map_or(("", 0, 0), |mac| (mac.keyword, mac.key, mac.salt)));
        let integrity_key = self.secret(table, ["integrity_key", "integrity_key_file"], wanted);
        let sequence = sequence(table, "sequence", first, esn);
        let spi = translated(spi?.value, seen);
        Some(Keyed { spi, suite: suite?.with_keys(encryption_key?, integrity_key?), sequence: sequence? })
    }

    /// A key given as digits or as a file. `wanted` is the algorithm's word, key and salt length; `None` where the
    /// algorithm could not be read, so that nothing can be said about the length.
    fn secret(
        &self,
        table: &mut Table<'_, '_>,
        [inline, file]: [&'static str; 2],
        wanted: Option<(&str, usize, usize)>,
    ) -> Option<Secret> {
        let given = table.has(inline);
        let (inline_text, path) = (table.get::<SecretText>(inline), table.get::<PathBuf>(file));
        let (keyword, key, salt) = wanted?;
        let located = match (inline_text, path) {
            (Some(text), Some(_)) => {
                table.error(text.span, inline, format!("give `{inline}` or `{file}`, not both"));
                return None;
            }
            (Some(text), None) => {
                self.holds_keys.set(true);
                Located { span: text.span, value: text.value.0 }
            }
            (None, Some(path)) => match self.keys.secret(&path.value).and_then(text) {
                Ok(text) => Located { span: path.span, value: text },
                Err(problem) => {
                    table.error(path.span, file, problem);
                    return None;
                }
            },
            (None, None) if key + salt == 0 => return Some(Secret::empty()),
            (None, None) => {
                if !given {
                    let what = describe_key(keyword, key, salt);
                    table.error(table.span.clone(), inline, format!("missing (or `{file}`); {what}"));
                }
                return None;
            }
        };
        if key + salt == 0 {
            table.error(located.span, inline, "the algorithms take no such key; leave it out");
            return None;
        }
        let what = describe_key(keyword, key, salt);
        match from_hex(located.value.trim()) {
            Ok(secret) if secret.len() == key + salt => Some(secret),
            Ok(secret) => {
                table.error(located.span, inline, format!("{what}; found {} bytes", secret.len()));
                None
            }
            Err(problem) => {
                table.error(located.span, inline, format!("{problem}; {what}"));
                None
            }
        }
    }

    /// The networks of a tunnel; in transport mode they may be left out, and are then its own addresses.
    fn nets(
        &self,
        table: &Table<'_, '_>,
        mode: Mode,
        ends: [Option<&Located<IpAddr>>; 2],
        local_net: Option<Located<Vec<Net>>>,
        remote_net: Option<Located<Vec<Net>>>,
    ) -> Option<(Vec<AddressRange>, Vec<AddressRange>)> {
        let [local, remote] = [("local_net", local_net, ends[0]), ("remote_net", remote_net, ends[1])].map(|(key, net, end)| match (net, mode) {
            (Some(net), Mode::Transport) => {
                if let Some(end) = end
                    && !net.value.iter().any(|Net(range)| range.contains(end.value))
                {
                    let message = "in transport mode packets keep their addresses, so this should hold the tunnel's own; leave it out";
                    self.report.warn(net.span, &table.path_of(key), message);
                }
                Some(ranges(net.value))
            }
            (Some(net), Mode::Tunnel) => Some(ranges(net.value)),
            (None, Mode::Transport) => end.map(|end| vec![AddressRange { start: end.value, end: end.value }]),
            (None, Mode::Tunnel) => {
                if !table.has(key) {
                    table.error(table.span.clone(), key, format!("missing; expected an array, each element {}", Net::EXPECTED));
                }
                None
            }
        });
        local.zip(remote)
    }
}

/// The algorithms of a tunnel.
struct Algorithms {
    esp: Named<EspSuite>,
    ah: Named<Mac>,
}

/// An algorithm that a tunnel may name.
#[derive(Clone, Copy)]
enum Named<T> {
    /// It does not.
    No,
    /// It does, with a word that was reported.
    Unreadable,
    /// It does.
    Is(T),
}

impl<T: Copy> Named<T> {
    fn new(given: bool, found: Option<&Located<T>>) -> Self {
        match found {
            Some(found) => Self::Is(found.value),
            None if given => Self::Unreadable,
            None => Self::No,
        }
    }

    fn is_given(&self) -> bool {
        !matches!(self, Self::No)
    }

    fn known(&self) -> Option<T> {
        match self {
            Self::Is(value) => Some(*value),
            Self::No | Self::Unreadable => None,
        }
    }
}

/// The `seen_as` table: values that the far end sees (RLY-2).
#[derive(Default)]
struct SeenAs {
    local: Option<IpAddr>,
    remote: Option<IpAddr>,
    out_spi: Option<Spi>,
    in_spi: Option<Spi>,
    ah_out_spi: Option<Spi>,
    ah_in_spi: Option<Spi>,
}

fn seen_as(mut table: Table<'_, '_>) -> SeenAs {
    let seen = SeenAs {
        local: table.get("local").map(|found| found.value),
        remote: table.get("remote").map(|found| found.value),
        out_spi: table.get("out_spi").map(|found| found.value),
        in_spi: table.get("in_spi").map(|found| found.value),
        ah_out_spi: table.get("ah_out_spi").map(|found| found.value),
        ah_in_spi: table.get("ah_in_spi").map(|found| found.value),
    };
    table.finish();
    seen
}

fn lifetime(mut table: Table<'_, '_>) -> Lifetime {
    let mut limits = |key| {
        let Some(mut table) = table.table(key) else { return Limits::default() };
        let mut limit = |key| {
            let found = table.get::<u64>(key)?;
            if found.value == 0 {
                table.error(found.span, key, "expected a number above 0; leave it out for no limit");
            }
            Some(found.value)
        };
        let limits = Limits { seconds: limit("seconds"), bytes: limit("bytes"), packets: limit("packets") };
        table.finish();
        limits
    };
    let lifetime = Lifetime { soft: limits("soft"), hard: limits("hard") };
    let Lifetime { soft, hard } = &lifetime;
    for (name, soft, hard) in [
        ("seconds", soft.seconds, hard.seconds),
        ("bytes", soft.bytes, hard.bytes),
        ("packets", soft.packets, hard.packets),
    ] {
        if soft.zip(hard).is_some_and(|(soft, hard)| soft > hard) {
            table.error(
                table.span.clone(),
                "soft",
                format!("{name}: the soft limit comes after the hard one"),
            );
        }
    }
    table.finish();
    lifetime
}

/// A sequence number at which an SA begins.
fn sequence(table: &mut Table<'_, '_>, key: &'static str, first: u64, esn: bool) -> Option<u64> {
    let had = table.has(key);
    let Some(found) = table.get::<u64>(key) else { return (!had).then_some(first) };
    if found.value < first {
        table.error(found.span, key, "an outbound SA begins at 1 or above (RFC 4303 section 3.3.3)");
        return None;
    }
    if !esn && found.value > u64::from(u32::MAX) {
        table.error(found.span, key, "above 4294967295, which needs esn = true");
        return None;
    }
    Some(found.value)
}

/// Reports keys that make sense only with another one.
fn refuse<const N: usize>(table: &mut Table<'_, '_>, keys: [&'static str; N], needs: &str) {
    for key in keys {
        if let Some(value) = table.take(key) {
            table.error(
                value.span(),
                key,
                format!("is of use only with `{needs}`, which this tunnel does not have"),
            );
        }
    }
}

fn translated<T: Copy>(on_wire: T, seen: Option<T>) -> Translation<T> {
    Translation { on_wire, authenticated: seen.unwrap_or(on_wire) }
}
