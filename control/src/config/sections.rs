//! The sections of the file, each a function that reads its keys, and the checks between them.

use core::cell::{Cell, RefCell};
use core::net::IpAddr;
use core::ops::{Range, RangeInclusive};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use postern_contract::Generation;
use postern_contract::Translation;
use postern_contract::relay::{Partition, RelayEntry, RelayId, SpiPair};
use postern_contract::sa::{
    Action, AddressRange, DfPolicy, DscpPolicy, Encryption, IpsecProtocol, Lifetime, Limits, Mode,
    PathPolicy, Selector, UdpEncap,
};
use postern_contract::secret::Secret;
use postern_contract::settings::DatapathSettings;
use postern_wire::ids::{PORT_NATT, Protocol, Spi};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Report, nearest};
use super::keys::{KeyFiles, from_hex};
use super::reader::{Located, Net, Read, SecretText, Table, expected};
use super::suite::{EspSuite, Mac, describe_key};
use super::{
    Config, ConfigError, ControlSettings, DEFAULT_PRIORITY, Half, Keyed, PlainPolicy, Relay, Tunnel,
};

/// Reads the whole text.
pub(super) fn read(file: &str, text: &str, keys: &dyn KeyFiles) -> Result<Config, ConfigError> {
    let report = Report::new(file, text);
    let config = match DeTable::parse(text) {
        Ok(document) => document_sections(&report, document, keys),
        Err(error) => {
            // The error's own rendering quotes the line, which may hold a key; its message does not.
            report.error(error.span().unwrap_or(0..0), "", format!("not TOML: {}", error.message()));
            None
        }
    };
    let failed = report.failed();
    let findings = report.into_findings();
    match config {
        Some(config) if !failed => Ok(Config { warnings: findings, ..config }),
        _ => Err(ConfigError(findings)),
    }
}

fn document_sections(
    report: &Report<'_>,
    document: Spanned<DeTable<'_>>,
    keys: &dyn KeyFiles,
) -> Option<Config> {
    let mut root = Table::new(report, String::new(), document);
    let datapath = datapath(report, root.take("datapath"));
    let control = control(root.table("control"), report);
    let context = Context {
        report,
        keys,
        workers: datapath.as_ref().map(DatapathSettings::workers),
        seen: RefCell::default(),
        holds_keys: Cell::new(false),
    };
    let tunnels: Vec<_> =
        root.tables("tunnel").into_iter().filter_map(|table| context.tunnel(table)).collect();
    let policies: Vec<_> =
        root.tables("policy").into_iter().filter_map(|table| context.policy(table)).collect();
    let relays: Vec<_> = root.tables("relay").into_iter().filter_map(|table| context.relay(table)).collect();
    root.finish();
    Some(Config {
        datapath: datapath?,
        control: control?,
        tunnels,
        policies,
        relays,
        holds_keys: context.holds_keys.get(),
        warnings: Vec::new(),
    })
}

fn datapath(report: &Report<'_>, section: Option<Spanned<DeValue<'_>>>) -> Option<DatapathSettings> {
    let section = section.unwrap_or_else(|| Spanned::new(0..0, DeValue::Table(DeTable::new())));
    let span = section.span();
    let settings = match DatapathSettings::deserialize(section.into_deserializer()) {
        Ok(settings) => settings,
        Err(error) => {
            let mut message = error.message().to_owned();
            // serde lists the known keys in backquotes after the unknown one.
            let mut words = message.split('`').skip(1).step_by(2);
            if message.starts_with("unknown field")
                && let Some(word) = words.next()
                && let Some(known) = nearest(word, words)
            {
                message = format!("{message}; did you mean `{known}`?");
            }
            report.error(error.span().unwrap_or(span), "datapath", message);
            return None;
        }
    };
    if let Err(error) = settings.validate() {
        report.error(span, "datapath", error.to_string());
        return None;
    }
    Some(settings)
}

fn control(section: Option<Table<'_, '_>>, report: &Report<'_>) -> Option<ControlSettings> {
    let mut settings = ControlSettings {
        socket: "/run/postern/control.sock".into(),
        state: "/var/lib/postern/control".into(),
        log: "info".to_owned(),
        datapath_program: None,
    };
    let Some(mut table) = section else { return Some(settings) };
    settings.socket = table.get::<PathBuf>("socket").map_or(settings.socket, |found| found.value);
    settings.state = table.get::<PathBuf>("state").map_or(settings.state, |found| found.value);
    settings.datapath_program = table.get::<PathBuf>("datapath_program").map(|found| found.value);
    if let Some(log) = table.get::<String>("log") {
        if tracing_subscriber::EnvFilter::try_new(&log.value).is_ok() {
            settings.log = log.value;
        } else {
            table.error(
                log.span,
                "log",
                "expected error, warn, info, debug, trace, or a list such as \"info,postern_control=debug\"",
            );
        }
    }
    table.finish();
    (!report.failed()).then_some(settings)
}

/// What the sections have to agree on.
struct Context<'a> {
    report: &'a Report<'a>,
    keys: &'a dyn KeyFiles,
    /// Number of workers, if the datapath's section could be read.
    workers: Option<usize>,
    seen: RefCell<Seen>,
    /// A key was given as digits.
    holds_keys: Cell<bool>,
}

/// What was used before, and by whom.
#[derive(Default)]
struct Seen {
    names: HashSet<(&'static str, String)>,
    /// Inbound SPIs: of tunnels by protocol and SPI; of relays by their receiving address as well.
    spis: HashMap<(IpsecProtocol, Spi), Vec<Receiver>>,
    selectors: HashMap<Selector, (u32, String)>,
    /// Keys of counter-mode suites, by digest.
    keys: HashMap<[u8; 32], String>,
}

/// Who receives with an SPI: a tunnel at any address, a relay at one.
struct Receiver {
    address: Option<IpAddr>,
    who: String,
}

impl Context<'_> {
    fn tunnel(&self, mut table: Table<'_, '_>) -> Option<Tunnel> {
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
        let replay_window = table.get::<u16>("replay_window");
        let window = replay_window.as_ref().map_or(1024, |found| found.value);
        if let Some(found) = replay_window
            && (!window.is_multiple_of(64) || window > 4096)
        {
            table.error(
                found.span,
                "replay_window",
                "expected 64 to 4096 in multiples of 64, or 0 to turn the check off",
            );
        }
        let follow_peer = table.or("follow_peer", true);
        let lifetime = table.table("lifetime").map(lifetime).unwrap_or_default();
        let path = path(&mut table);
        let priority = table.or("priority", DEFAULT_PRIORITY);
        let worker = table.get::<u16>("worker");
        if let Some(found) = &worker
            && self.workers.is_some_and(|workers| usize::from(found.value) >= workers)
        {
            let workers = self.workers.unwrap_or_default();
            table.error(
                found.span.clone(),
                "worker",
                format!("there are {workers} workers (see datapath.cores), numbered from 0"),
            );
        }

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
            replay_window: window,
            follow_peer,
            path,
            lifetime,
            priority,
            worker: worker.map(|found| found.value),
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

    fn policy(&self, mut table: Table<'_, '_>) -> Option<PlainPolicy> {
        let name = self.name(&mut table, "policy");
        let priority = table.or("priority", DEFAULT_PRIORITY);
        let action = table.need::<PlainAction>("action");
        let local = table.need::<Vec<Net>>("local");
        let remote = table.need::<Vec<Net>>("remote");
        let upper = upper_layer(&mut table);
        let nets = local.zip(remote).map(|(local, remote)| (ranges(local.value), ranges(remote.value)));
        let selectors = nets.map(|(local, remote)| self.selectors(&table, &local, &remote, &upper));
        let span = table.span.clone();
        table.finish();
        let policy = PlainPolicy { name: name?, priority, action: action?.value.0, selectors: selectors? };
        let key = format!("policy[{}]", policy.name);
        self.claim_selectors(&span, &key, &policy.selectors, priority, &format!("policy {:?}", policy.name));
        Some(policy)
    }

    fn relay(&self, mut table: Table<'_, '_>) -> Option<Relay> {
        let name = self.name(&mut table, "relay");
        let client = Self::partition(&mut table, "client");
        let gateway = Self::partition(&mut table, "gateway");
        let span = table.span.clone();
        table.finish();
        let relay = Relay { name: name?, client: client?, gateway: gateway? };
        let key = format!("relay[{}]", relay.name);
        let entry = RelayEntry {
            id: RelayId(0),
            generation: Generation(0),
            client: relay.client,
            gateway: relay.gateway,
        };
        if let Err(error) = entry.validate() {
            self.report.error(span, &key, error.to_string());
            return None;
        }
        let who = format!("relay {:?}", relay.name);
        for (side, partition) in [("client", &relay.client), ("gateway", &relay.gateway)] {
            for (protocol, pair) in [(IpsecProtocol::Esp, partition.esp), (IpsecProtocol::Ah, partition.ah)] {
                if let Some(pair) = pair {
                    let key = format!("{key}.{side}");
                    self.claim_spi(&span, &key, protocol, pair.to_relay, Some(partition.relay), &who);
                }
            }
        }
        Some(relay)
    }

    /// The `name` of a section, unique among its kind.
    fn name(&self, table: &mut Table<'_, '_>, kind: &'static str) -> Option<String> {
        let name = table.need::<String>("name")?;
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':');
        if name.value.is_empty() || name.value.len() > 64 || !name.value.chars().all(plain) {
            table.error(name.span, "name", "expected 1 to 64 letters, digits or any of - _ . @ :");
            return None;
        }
        if !self.seen.borrow_mut().names.insert((kind, name.value.clone())) {
            table.error(name.span, "name", format!("another {kind} has this name"));
            return None;
        }
        Some(name.value)
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
            (None, Some(path)) => match self.keys.read(&path.value) {
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

    /// Every pair of one family.
    fn selectors(
        &self,
        table: &Table<'_, '_>,
        local: &[AddressRange],
        remote: &[AddressRange],
        upper: &Upper,
    ) -> Vec<Selector> {
        let pairs = local.iter().flat_map(|l| remote.iter().map(move |r| (*l, *r)));
        let selectors: Vec<Selector> = pairs
            .filter(|(local, remote)| local.start.is_ipv4() == remote.start.is_ipv4())
            .map(|(local, remote)| Selector {
                local,
                remote,
                protocol: upper.protocol,
                local_ports: upper.local_ports.clone(),
                remote_ports: upper.remote_ports.clone(),
            })
            .collect();
        if selectors.is_empty() {
            self.report.error(
                table.span.clone(),
                &table.path_of(if table.has("local_net") { "local_net" } else { "local" }),
                "the networks of the two sides have no address family in common, so nothing would ever match",
            );
        }
        selectors
    }

    fn claim_spi(
        &self,
        span: &Range<usize>,
        key: &str,
        protocol: IpsecProtocol,
        spi: Spi,
        address: Option<IpAddr>,
        who: &str,
    ) {
        let mut seen = self.seen.borrow_mut();
        let users = seen.spis.entry((protocol, spi)).or_default();
        let taken =
            users.iter().find(|user| user.address.is_none() || address.is_none() || user.address == address);
        if let Some(Receiver { who: other, .. }) = taken {
            let name = match protocol {
                IpsecProtocol::Esp => "ESP",
                IpsecProtocol::Ah => "AH",
            };
            self.report.error(span.clone(), key, format!("{other} already receives {name} with SPI {spi}"));
        }
        users.push(Receiver { address, who: who.to_owned() });
    }

    fn claim_selectors(
        &self,
        span: &Range<usize>,
        key: &str,
        selectors: &[Selector],
        priority: u32,
        who: &str,
    ) {
        let mut seen = self.seen.borrow_mut();
        for selector in selectors {
            if let Some((other_priority, other)) = seen.selectors.get(selector) {
                let winner = match priority.cmp(other_priority) {
                    core::cmp::Ordering::Less => "this one is used, its priority is lower".to_owned(),
                    core::cmp::Ordering::Equal => "one of the two is never used".to_owned(),
                    core::cmp::Ordering::Greater => "that one is used, its priority is lower".to_owned(),
                };
                self.report.warn(span.clone(), key, format!("has the same selectors as {other}: {winner}"));
                return;
            }
            seen.selectors.insert(selector.clone(), (priority, who.to_owned()));
        }
    }

    fn partition(relay: &mut Table<'_, '_>, key: &'static str) -> Option<Partition> {
        let Some(mut table) = relay.table(key) else {
            if !relay.has(key) {
                relay.error(
                    relay.span.clone(),
                    key,
                    "missing; expected a table with `relay`, `peer` and `esp` or `ah`",
                );
            }
            return None;
        };
        let relay_address = table.need::<IpAddr>("relay");
        let peer = table.need::<IpAddr>("peer");
        let (has_esp, has_ah) = (table.has("esp"), table.has("ah"));
        let esp = table.table("esp").and_then(spi_pair);
        let ah = table.table("ah").and_then(spi_pair);
        let encap = table.table("encap").map(encapsulation);
        table.finish();
        // An unreadable pair was reported; without it the partition would be judged for what it does not say.
        if esp.is_some() != has_esp || ah.is_some() != has_ah {
            return None;
        }
        Some(Partition { relay: relay_address?.value, peer: peer?.value, encap, esp, ah })
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

/// Upper-layer part of selectors.
struct Upper {
    protocol: Option<Protocol>,
    local_ports: RangeInclusive<u16>,
    remote_ports: RangeInclusive<u16>,
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

fn encapsulation(mut table: Table<'_, '_>) -> UdpEncap {
    let encap = UdpEncap {
        local_port: table.or("local_port", PORT_NATT),
        remote_port: table.or("remote_port", PORT_NATT),
    };
    if encap.local_port == 0 || encap.remote_port == 0 {
        table.error(table.span.clone(), "", "ports are 1 to 65535");
    }
    table.finish();
    encap
}

fn spi_pair(mut table: Table<'_, '_>) -> Option<SpiPair> {
    let to_relay = table.need::<Spi>("to_relay");
    let from_relay = table.need::<Spi>("from_relay");
    table.finish();
    Some(SpiPair { to_relay: to_relay?.value, from_relay: from_relay?.value })
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

fn path(table: &mut Table<'_, '_>) -> PathPolicy {
    let mtu = table.get::<u16>("mtu");
    if let Some(found) = &mtu
        && found.value < 296
    {
        table.error(found.span.clone(), "mtu", "expected at least 296 bytes");
    }
    PathPolicy {
        df: table.or("df", DfPolicy::Copy),
        dscp: table.or("dscp", DscpPolicy::Copy),
        ecn: table.or("ecn", true),
        mtu: mtu.map(|found| found.value),
        mss_clamp: table.or("mss_clamp", true),
    }
}

fn upper_layer(table: &mut Table<'_, '_>) -> Upper {
    let protocol = table.get::<Protocol>("protocol");
    let local_ports = table.get::<Ports>("local_ports");
    let remote_ports = table.get::<Ports>("remote_ports");
    let ports = local_ports.as_ref().map(|found| ("local_ports", found));
    if let Some((key, found)) = ports.or(remote_ports.as_ref().map(|found| ("remote_ports", found)))
        && protocol.is_none()
        && !table.has("protocol")
    {
        table.error(found.span.clone(), key, "ports need a `protocol`, for example protocol = \"tcp\"");
    }
    let range = |ports: Option<Located<Ports>>| ports.map_or(0..=u16::MAX, |found| found.value.0);
    Upper {
        protocol: protocol.map(|found| found.value),
        local_ports: range(local_ports),
        remote_ports: range(remote_ports),
    }
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

fn ranges(nets: Vec<Net>) -> Vec<AddressRange> {
    nets.into_iter().map(|Net(range)| range).collect()
}

fn translated<T: Copy>(on_wire: T, seen: Option<T>) -> Translation<T> {
    Translation { on_wire, authenticated: seen.unwrap_or(on_wire) }
}

/// `action` of a `[[policy]]`.
struct PlainAction(Action);

/// Ports of a selector.
struct Ports(RangeInclusive<u16>);

/// A value that is one of a few words.
fn one_of<T: Copy>(value: &DeValue<'_>, words: &[(&str, T)]) -> Option<T> {
    let DeValue::String(text) = value else { return None };
    words.iter().find(|(word, _)| word == text).map(|(_, value)| *value)
}

impl Read for PathBuf {
    const EXPECTED: &'static str = "a path in quotes";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match String::read(value) {
            Ok(text) if !text.is_empty() && !text.contains('\0') => Ok(Path::new(&text).to_owned()),
            _ => Err(expected::<Self>()),
        }
    }
}

impl Read for Mode {
    const EXPECTED: &'static str = "\"tunnel\" or \"transport\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        one_of(&value, &[("tunnel", Self::Tunnel), ("transport", Self::Transport)])
            .ok_or_else(expected::<Self>)
    }
}

impl Read for DfPolicy {
    const EXPECTED: &'static str = "\"copy\", \"set\" or \"clear\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [("copy", Self::Copy), ("set", Self::Set), ("clear", Self::Clear)];
        one_of(&value, &words).ok_or_else(expected::<Self>)
    }
}

impl Read for DscpPolicy {
    const EXPECTED: &'static str = "\"copy\" or a number from 0 to 63";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        if let Some(copy) = one_of(&value, &[("copy", Self::Copy)]) {
            return Ok(copy);
        }
        let number = u16::read(value).ok().and_then(|number| u8::try_from(number).ok());
        number.filter(|number| *number < 64).map(Self::Fixed).ok_or_else(expected::<Self>)
    }
}

impl Read for PlainAction {
    const EXPECTED: &'static str = "\"bypass\" or \"discard\" (a [[tunnel]] protects by itself)";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [("bypass", Action::Bypass), ("discard", Action::Discard)];
        one_of(&value, &words).map(Self).ok_or_else(expected::<Self>)
    }
}

impl Read for Spi {
    const EXPECTED: &'static str =
        "an SPI from 0x100 to 0xffffffff (0 to 255 are reserved, RFC 4303 section 2.1)";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        u32::read(value).ok().map(Self).filter(|spi| spi.is_usable()).ok_or_else(expected::<Self>)
    }
}

impl Read for Protocol {
    const EXPECTED: &'static str =
        "\"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"sctp\", \"gre\" or a number from 0 to 255";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [
            ("tcp", Self::TCP),
            ("udp", Self::UDP),
            ("icmp", Self::ICMP),
            ("icmpv6", Self::ICMPV6),
            ("sctp", Self(132)),
            ("gre", Self(47)),
        ];
        if let Some(protocol) = one_of(&value, &words) {
            return Ok(protocol);
        }
        let number = u16::read(value).ok().and_then(|number| u8::try_from(number).ok());
        number.map(Self).ok_or_else(expected::<Self>)
    }
}

impl Read for Ports {
    const EXPECTED: &'static str = "a port such as \"443\" or a range such as \"1000-2000\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let range = match value {
            DeValue::String(text) if text == "any" => Some(0..=u16::MAX),
            DeValue::String(text) => {
                let (start, end) = text.split_once('-').unwrap_or((&text, &text));
                start.trim().parse().ok().zip(end.trim().parse().ok()).map(|(start, end)| start..=end)
            }
            number => u16::read(number).ok().map(|port| port..=port),
        };
        range.filter(|range| !range.is_empty()).map(Self).ok_or_else(expected::<Self>)
    }
}

impl Read for EspSuite {
    const EXPECTED: &'static str = "algorithms in quotes, such as \"aes128gcm16\" or \"aes256-sha256\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::parse(&text),
            _ => Err(expected::<Self>()),
        }
    }
}

impl Read for Mac {
    const EXPECTED: &'static str = "an algorithm in quotes, such as \"sha256\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::parse_ah(&text),
            _ => Err(expected::<Self>()),
        }
    }
}
