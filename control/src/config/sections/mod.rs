//! The sections of the file, each read by functions of its own module, and what they have to agree on: names, SPIs and
//! selectors that only one of them may have.

mod child;
mod common;
mod connection;
mod credentials;
mod ike;
mod policy;
mod programs;
mod recovery;
mod relay;
mod tunnel;
mod v1;
mod values;

use core::cell::{Cell, RefCell};
use core::net::IpAddr;
use core::ops::Range;
use std::collections::{HashMap, HashSet};

use postern_contract::sa::{IpsecProtocol, Selector};
use postern_contract::settings::DatapathSettings;
use postern_wire::ids::Spi;
use toml::Spanned;
use toml::de::DeTable;

use super::diagnostic::Report;
use super::keys::KeyFiles;
use super::reader::{Located, Table};
use super::{Config, ConfigError};
use programs::{control, datapath};

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
    let mut ike = Context::ike(root.table("ike"));
    ike.pools = root.tables("pool").into_iter().filter_map(|table| context.pool(table)).collect();
    let connections = root.tables("connection").into_iter();
    ike.connections = connections.filter_map(|table| context.connection(table, &ike.listen)).collect();
    let recovery = recovery::recovery(root.table("recovery"));
    root.finish();
    Some(Config {
        datapath: datapath?,
        control: control?,
        tunnels,
        policies,
        relays,
        ike,
        recovery,
        holds_keys: context.holds_keys.get(),
        warnings: Vec::new(),
    })
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
    /// Pools that could be read.
    pools: Vec<(String, IpAddr, IpAddr)>,
    /// Children, by connection and name.
    children: HashSet<(String, String)>,
    /// Addresses and identities of connections.
    peers: HashMap<String, String>,
}

/// Who receives with an SPI: a tunnel at any address, a relay at one.
struct Receiver {
    address: Option<IpAddr>,
    who: String,
}

impl Context<'_> {
    /// The `name` of a section, unique among its kind.
    fn name(&self, table: &mut Table<'_, '_>, kind: &'static str) -> Option<String> {
        let name = Self::plain_name(table)?;
        if !self.seen.borrow_mut().names.insert((kind, name.value.clone())) {
            table.error(name.span, "name", format!("another {kind} has this name"));
            return None;
        }
        Some(name.value)
    }

    /// A `name` of plain characters.
    fn plain_name(table: &mut Table<'_, '_>) -> Option<Located<String>> {
        let name = table.need::<String>("name")?;
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':');
        if name.value.is_empty() || name.value.len() > 64 || !name.value.chars().all(plain) {
            table.error(name.span, "name", "expected 1 to 64 letters, digits or any of - _ . @ :");
            return None;
        }
        Some(name)
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
}
