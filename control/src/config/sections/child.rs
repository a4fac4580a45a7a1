//! `[[connection.child]]`: what is protected within a connection, and how.

use core::time::Duration;

use postern_contract::sa::{AddressRange, Lifetime, Limits};
use postern_ike::config::{Child, Mode, Selector, Start};
use postern_ike::message::{Proposal, TrafficSelector};
use postern_ike::negotiate::keyword::{self, KeywordError};
use toml::de::DeValue;

use super::Context;
use super::common::{Upper, fan_out, path, replay_window, upper_layer};
use super::values::one_of;
use crate::config::DEFAULT_PRIORITY;
use crate::config::ike::ChildSettings;
use crate::config::reader::{Located, Net, Read, Table, expected};

impl Context<'_> {
    /// A child of the connection `who`. `initiates` says whether the connection has a `remote` to initiate to.
    pub(super) fn child(
        &self,
        mut table: Table<'_, '_>,
        connection: Option<&str>,
        initiates: bool,
    ) -> Option<(Child, ChildSettings)> {
        let name = self.part_name(&mut table, connection.unwrap_or_default());
        let mode = table.or("mode", postern_contract::sa::Mode::Tunnel);
        let (esp_given, ah_given) = (table.has("esp"), table.has("ah"));
        let esp = table.get::<Vec<EspProposal>>("esp");
        let ah = table.get::<Vec<AhProposal>>("ah");
        if esp_given && ah_given {
            let message = "give `esp` or `ah`, not both: a child is one of them (a [[tunnel]] can be both)";
            table.error(table.span.clone(), "ah", message);
        }
        let proposals = match (esp, ah) {
            (Some(esp), _) => listed(&table, "esp", esp, |EspProposal(proposal)| proposal),
            (None, Some(ah)) => listed(&table, "ah", ah, |AhProposal(proposal)| proposal),
            (None, None) if esp_given || ah_given => None,
            (None, None) => Some(keyword::default_esp()),
        };
        let local = table.get::<Vec<Side>>("local_net");
        let remote = table.get::<Vec<Side>>("remote_net");
        let upper = upper_layer(&mut table);
        let starts = ["start", "on_close", "on_dpd"].map(|key| {
            let found = table.get::<Start>(key)?;
            if found.value != Start::None && !initiates {
                let message = "needs `remote` in the connection, the address to initiate to; \
                               without one, leave it out: the peer begins";
                table.error(found.span, key, message);
            }
            Some(found.value)
        });
        let [start, on_close, on_dpd] = starts;
        let (start, on_close) = (start.unwrap_or(Start::None), on_close.unwrap_or(Start::None));
        // What is to be up comes back when the peer does.
        let on_dpd = on_dpd.unwrap_or(start);
        let (rekey, rekey_jitter, life) = times(&mut table);
        let limits = limits(&mut table);
        let replay_window = replay_window(&mut table);
        let follow_peer = table.or("follow_peer", true);
        let path = path(&mut table);
        let priority = table.or("priority", DEFAULT_PRIORITY);
        let worker = self.worker(&mut table);
        let fan_out = fan_out(&mut table);
        let (local, remote) = (sides(local), sides(remote));
        self.check_families(&table, &local, &remote);
        let span = table.span.clone();
        let key = table.path_of("");
        table.finish();

        let (name, proposals) = (name?, proposals?);
        let fixed = |sides: &[Side]| {
            let fixed: Option<Vec<AddressRange>> =
                sides.iter().map(|side| side.0.map(|Net(range)| range)).collect();
            fixed
        };
        if let (Some(local), Some(remote)) = (fixed(&local), fixed(&remote)) {
            let selectors = super::common::pairs(&local, &remote, &upper);
            let who = format!("child {name:?} of connection {:?}", connection.unwrap_or_default());
            self.claim_selectors(&span, &key, &selectors, priority, &who);
        }
        let child = Child {
            name: name.into(),
            proposals,
            local_ts: local.into_iter().map(|side| side.selector(&upper, &upper.local_ports)).collect(),
            remote_ts: remote.into_iter().map(|side| side.selector(&upper, &upper.remote_ports)).collect(),
            mode: match mode {
                postern_contract::sa::Mode::Tunnel => Mode::Tunnel,
                postern_contract::sa::Mode::Transport => Mode::Transport,
            },
            start,
            on_close,
            on_dpd,
            rekey,
            rekey_jitter,
            life,
        };
        Some((child, ChildSettings { path, replay_window, follow_peer, priority, worker, fan_out, limits }))
    }

    /// A name that is unique within the connection.
    fn part_name(&self, table: &mut Table<'_, '_>, connection: &str) -> Option<String> {
        let name = Self::plain_name(table)?;
        if !self.seen.borrow_mut().children.insert((connection.to_owned(), name.value.clone())) {
            table.error(name.span, "name", "another child of this connection has this name");
            return None;
        }
        Some(name.value)
    }

    /// Both sides have to have a family in common; `dynamic` has either.
    fn check_families(&self, table: &Table<'_, '_>, local: &[Side], remote: &[Side]) {
        let has = |sides: &[Side], v4: bool| {
            sides.iter().any(|side| side.0.is_none_or(|Net(range)| range.start.is_ipv4() == v4))
        };
        if ![true, false].into_iter().any(|v4| has(local, v4) && has(remote, v4)) {
            self.report.error(
                table.span.clone(),
                &table.path_of("remote_net"),
                "the networks of the two sides have no address family in common, so nothing would ever match",
            );
        }
    }
}

/// An array of proposals, which must not be empty.
pub(super) fn listed<T>(
    table: &Table<'_, '_>,
    key: &str,
    found: Located<Vec<T>>,
    take: impl Fn(T) -> Proposal,
) -> Option<Vec<Proposal>> {
    if found.value.is_empty() {
        table.error(found.span, key, "expected at least one proposal; leave it out for the default list");
        return None;
    }
    let number =
        |(index, item)| Proposal { number: u8::try_from(index + 1).unwrap_or(u8::MAX), ..take(item) };
    Some(found.value.into_iter().enumerate().map(number).collect())
}

/// Rekey time, jitter and hard limit. A time of 0 is never.
fn times(table: &mut Table<'_, '_>) -> (Option<Duration>, Duration, Option<Duration>) {
    let rekey = table.or("rekey_s", 3600_u32);
    let jitter = table.or("rekey_jitter_s", rekey / 10);
    let life = table.get::<u32>("life_s");
    if jitter > rekey {
        table.error(table.span.clone(), "rekey_jitter_s", "above `rekey_s`, from which it is taken off");
    }
    if let Some(life) = &life
        && life.value != 0
        && (rekey == 0 || life.value <= rekey)
    {
        let message = if rekey == 0 {
            "with `rekey_s = 0` the child would end without a successor; 0 lets it live as long as its IKE SA"
        } else {
            "not above `rekey_s`: the child would end before it is replaced; a tenth more is a good value"
        };
        table.error(life.span.clone(), "life_s", message);
    }
    let some = |seconds: u32| (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)));
    let life = life.map_or(rekey.saturating_add(rekey.div_ceil(10)), |found| found.value);
    (some(rekey), Duration::from_secs(u64::from(jitter)), some(life))
}

/// Limits by bytes and packets.
fn limits(table: &mut Table<'_, '_>) -> Lifetime {
    let mut limit = |key| {
        let found = table.get::<u64>(key)?;
        if found.value == 0 {
            table.error(found.span, key, "expected a number above 0; leave it out for no limit");
        }
        Some(found.value)
    };
    let soft = Limits { seconds: None, bytes: limit("rekey_bytes"), packets: limit("rekey_packets") };
    let hard = Limits { seconds: None, bytes: limit("life_bytes"), packets: limit("life_packets") };
    for (key, what, soft, hard) in [
        ("life_bytes", "rekey_bytes", soft.bytes, hard.bytes),
        ("life_packets", "rekey_packets", soft.packets, hard.packets),
    ] {
        match (soft, hard) {
            (Some(soft), Some(hard)) if hard <= soft => {
                let message = format!("not above `{what}`: the child would end before it is replaced");
                table.error(table.span.clone(), key, message);
            }
            (None, Some(_)) => {
                let message =
                    format!("without `{what}` the child ends at this limit and nothing replaces it");
                table.error(table.span.clone(), key, message);
            }
            _ => {}
        }
    }
    Lifetime { soft, hard }
}

/// One entry of `local_net` or `remote_net`; `None` is `dynamic`.
#[derive(Clone, Copy)]
struct Side(Option<Net>);

impl Side {
    fn selector(self, upper: &Upper, ports: &core::ops::RangeInclusive<u16>) -> Selector {
        let protocol = upper.protocol.map_or(0, |protocol| protocol.0);
        match self.0 {
            Some(Net(AddressRange { start, end })) => {
                Selector::Fixed(TrafficSelector { start, end, protocol, ports: ports.clone() })
            }
            None => Selector::Dynamic { protocol, ports: ports.clone() },
        }
    }
}

fn sides(found: Option<Located<Vec<Side>>>) -> Vec<Side> {
    found.map(|found| found.value).filter(|sides| !sides.is_empty()).unwrap_or_else(|| vec![Side(None)])
}

impl Read for Side {
    const EXPECTED: &'static str = "a network such as \"10.1.0.0/24\" or \"2001:db8::/64\", an address, a range such as \
         \"10.1.0.1-10.1.0.9\", or \"dynamic\" for the outer or the assigned address";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        if matches!(&value, DeValue::String(text) if text == "dynamic") {
            return Ok(Self(None));
        }
        match Net::read(value) {
            Ok(net) => Ok(Self(Some(net))),
            // It says more than what is expected: which network was meant.
            Err(problem) if problem.contains("host bits") => Err(problem),
            Err(_) => Err(expected::<Self>()),
        }
    }
}

impl Read for Start {
    const EXPECTED: &'static str = "\"none\", \"start\" (at once) or \"trap\" (with the first packet)";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [("none", Self::None), ("start", Self::Start), ("trap", Self::Trap)];
        one_of(&value, &words).ok_or_else(expected::<Self>)
    }
}

/// A proposal of an IKE SA.
pub(super) struct IkeProposal(pub(super) Proposal);
struct EspProposal(Proposal);
struct AhProposal(Proposal);

macro_rules! read_proposal {
    ($($type:ident = $read:path, $expected:literal),+) => {$(
        impl Read for $type {
            const EXPECTED: &'static str = $expected;
            fn read(value: DeValue<'_>) -> Result<Self, String> {
                match value {
                    DeValue::String(text) => $read(&text).map(Self).map_err(|error| problem(&error)),
                    _ => Err(expected::<Self>()),
                }
            }
        }
    )+};
}
read_proposal!(
    IkeProposal = keyword::ike,
    "algorithms in quotes, such as \"aes128gcm16-prfsha256-x25519\"",
    EspProposal = keyword::esp,
    "algorithms in quotes, such as \"aes128gcm16\" or \"aes128-sha256-x25519\"",
    AhProposal = keyword::ah,
    "algorithms in quotes, such as \"sha256\""
);

/// What is wrong with a proposal, with the word that was probably meant.
fn problem(error: &KeywordError) -> String {
    if let KeywordError::Unknown { word, known, .. } = error
        && let Some(meant) = crate::config::diagnostic::nearest(word, known.split(", "))
    {
        return format!("{error}; did you mean `{}`?", meant.trim_matches('`'));
    }
    error.to_string()
}
