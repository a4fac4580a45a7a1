//! `[[connection]]`: a peer, how both sides authenticate, and the children.

use core::net::IpAddr;
use core::ops::Range;
use core::time::Duration;
use std::sync::Arc;

use ipnet::IpNet;
use postern_ike::config::{Connection as IkeConnection, Selector, Strategy, Unique};
use postern_ike::negotiate::keyword;
use toml::de::DeValue;

use super::Context;
use super::child::{IkeProposal, listed};
use super::credentials::{Method, Side};
use super::ike::number;
use super::values::one_of;
use crate::config::ike::{Connection, Listen};
use crate::config::reader::{Located, Read, Table, expected};
use crate::digest::sha256;

impl Context<'_> {
    pub(super) fn connection(&self, mut table: Table<'_, '_>, listen: &Listen) -> Option<Connection> {
        let name = self.name(&mut table, "connection");
        let local = table.get::<Vec<IpAddr>>("local");
        let remote_given = table.has("remote");
        let remote = table.get::<IpAddr>("remote");
        let remote_nets = table.get::<Vec<Network>>("remote_nets");
        check_addresses(&table, listen, local.as_ref(), remote.as_ref(), remote_nets.as_ref());
        let local = local.map(|found| found.value).unwrap_or_default();
        let remote = remote.map(|found| found.value);
        let remote_nets: Vec<_> =
            remote_nets.into_iter().flat_map(|found| found.value).map(|Network(net)| net).collect();
        let remote_port = number(&mut table, "remote_port", 1..=65_535, 500);

        let given = table.has("proposals");
        let proposals = match table.get::<Vec<IkeProposal>>("proposals") {
            Some(found) => listed(&table, "proposals", found, |IkeProposal(proposal)| proposal),
            None => (!given).then(keyword::default_ike),
        };
        let own = <[IpAddr; 1]>::try_from(local.as_slice()).ok().map(|[own]| own);
        let local_auth = self.local_auth(&mut table, own);
        let remote_auth = self.remote_auth(&mut table, remote.filter(|_| remote_nets.is_empty()));
        let mobike = table.or("mobike", true);
        let fragmentation = table.or("fragmentation", true);
        let childless = table.or("childless", false);
        let force_encap = table.or("force_encap", false);
        let (rekey, rekey_jitter, over_time) = times(&mut table);
        let dpd = seconds(table.or("dpd_s", 30));
        let unique = table.or("unique", Unique::Replace);
        let reset = table.get::<Strategy>("reset");
        let (v1, v1_digest) = self.version(&mut table);
        if let Some(found) = reset.as_ref().filter(|found| v1.is_some() && found.value == Strategy::Restore) {
            let message =
                "IKEv1 connections do not go on after a reset: as with \"delete\" their peers are told";
            self.report.warn(found.span.clone(), &table.path_of("reset"), message);
        }
        let reset = reset.map(|found| found.value).unwrap_or_default();
        let pools = self.pools_of(&mut table);
        let dns = table.get::<Vec<IpAddr>>("dns");
        let request = table.get::<Vec<Family>>("request_address");
        if let Some(dns) = dns.as_ref().filter(|_| pools.is_empty() && !table.has("pools")) {
            table.error(
                dns.span.clone(),
                "dns",
                "is of use only with `pools`: name servers go to clients with their address",
            );
        }
        if let Some(request) = request.as_ref().filter(|_| table.has("pools")) {
            let message = "this side is either client or, with `pools`, the one that assigns addresses";
            table.error(request.span.clone(), "request_address", message);
        }
        let asked = |family| request.as_ref().is_some_and(|found| found.value.contains(&family));
        let request_address = (asked(Family::V4), asked(Family::V6));

        let read: Vec<_> = table
            .tables("child")
            .into_iter()
            .map(|child| self.child(child, name.as_deref(), remote_given))
            .collect();
        if read.is_empty() && !childless && !table.has("child") {
            let message = "missing; without a [[connection.child]] nothing is protected (childless = true if that is meant)";
            table.error(table.span.clone(), "child", message);
        }
        let starts = read.iter().flatten().any(|(child, _)| child.start != postern_ike::config::Start::None);
        self.check_methods(&table, local_auth.as_ref(), remote_auth.as_ref(), starts);
        let span = table.span.clone();
        table.finish();

        let complete = read.iter().all(Option::is_some);
        let (children, settings): (Vec<_>, Vec<_>) = read.into_iter().flatten().unzip();
        let (local_auth, remote_auth) = (local_auth?, remote_auth?);
        let (name, proposals) = (name?, proposals?);
        if !complete {
            return None;
        }
        let mut ike = IkeConnection {
            name: name.into(),
            fingerprint: [0; 32],
            local,
            remote_nets,
            remote,
            remote_port,
            proposals,
            local_id: local_auth.id,
            remote_id: remote_auth.id,
            local_auth: local_auth.auth,
            remote_auth: remote_auth.auth,
            children,
            pools,
            dns: dns.map(|found| found.value).unwrap_or_default(),
            request_address,
            mobike,
            fragmentation,
            childless,
            force_encap,
            rekey,
            rekey_jitter,
            over_time,
            dpd,
            unique,
            reset,
            v1,
        };
        // `Debug` has every field, those to come as well, but no secret and no certificate: their digests are beside it.
        let shown = format!("{ike:?} {settings:?}");
        ike.fingerprint =
            sha256(&[b"connection", shown.as_bytes(), &local_auth.digest, &remote_auth.digest, &v1_digest]);
        self.check_connection(&ike, &span);
        self.check_v1(&ike, &span);
        Some(Connection { ike: Arc::new(ike), children: settings, refreshable: remote_auth.refreshable })
    }

    /// RFC 7296 section 2.16: EAP is for clients, "in conjunction with a public-key-signature-based authentication of the
    /// responder to the initiator".
    fn check_methods<A, I, B, J>(
        &self,
        table: &Table<'_, '_>,
        local: Option<&Side<A, I>>,
        remote: Option<&Side<B, J>>,
        starts: bool,
    ) {
        let (Some(local), Some(remote)) = (local, remote) else { return };
        let error = |key: &str, message: &str| {
            let span = if key == "local_auth" { &local.span } else { &remote.span };
            self.report.error(span.clone(), &table.path_of(key), message);
        };
        match (local.method, remote.method) {
            (Method::EapMschapv2, Method::EapMschapv2) => {
                error(
                    "remote_auth",
                    "EAP is for clients; a gateway shows a certificate (method = \"certificate\", ca = …)",
                );
            }
            (Method::EapMschapv2, Method::Psk) => error(
                "remote_auth",
                "a gateway that authenticates clients by EAP has to show a certificate (RFC 7296 section 2.16); \
                 use method = \"certificate\", ca = …",
            ),
            (Method::Psk, Method::EapMschapv2) => error(
                "local_auth",
                "with EAP clients this side has to show a certificate (RFC 7296 section 2.16); \
                 use method = \"certificate\", certificate = …, key = …",
            ),
            (Method::Certificate, Method::EapMschapv2) if starts => {
                error("remote_auth", "with EAP the client begins: no child can have `start`");
            }
            _ => {}
        }
    }

    /// The checks against connections before it, and those that need all of it.
    fn check_connection(&self, ike: &IkeConnection, span: &Range<usize>) {
        let key = format!("connection[{}]", ike.name);
        let shown = format!(
            "{:?} {:?} {:?} {} {}",
            ike.local, ike.remote, ike.remote_nets, ike.local_id, ike.remote_id
        );
        let mut seen = self.seen.borrow_mut();
        if let Some(other) = seen.peers.get(&shown) {
            let message = format!(
                "has the same addresses and identities as connection {other:?}: a peer that comes always gets that one; \
                 make them one connection, or give them identities of their own"
            );
            self.report.warn(span.clone(), &key, message);
        } else {
            seen.peers.insert(shown, ike.name.to_string());
        }
        let dynamic = |sides: &[Selector]| sides.iter().any(|side| matches!(side, Selector::Dynamic { .. }));
        if !ike.pools.is_empty() && !ike.children.iter().any(|child| dynamic(&child.remote_ts)) {
            let message = "no child has remote_net = [\"dynamic\"]: packets to the assigned addresses are in no selector";
            self.report.warn(span.clone(), &format!("{key}.pools"), message);
        }
        if ike.request_address != (false, false) && !ike.children.iter().any(|child| dynamic(&child.local_ts))
        {
            let message = "no child has local_net = [\"dynamic\"]: packets from the assigned address are in no selector";
            self.report.warn(span.clone(), &format!("{key}.request_address"), message);
        }
    }
}

fn check_addresses(
    table: &Table<'_, '_>,
    listen: &Listen,
    local: Option<&Located<Vec<IpAddr>>>,
    remote: Option<&Located<IpAddr>>,
    remote_nets: Option<&Located<Vec<Network>>>,
) {
    if let Some(local) = local
        && !listen.addresses.is_empty()
        && let Some(other) = local.value.iter().find(|own| !listen.addresses.contains(own))
    {
        let message = format!("`ike.addresses` does not have {other}, so that nothing arrives there; add it");
        table.error(local.span.clone(), "local", message);
    }
    let Some(remote) = remote else { return };
    if remote.value.is_unspecified() || remote.value.is_multicast() {
        let message = "is no peer's address; leave it out if the peer comes from anywhere";
        table.error(remote.span.clone(), "remote", message);
    }
    if let Some(local) = local
        && !local.value.is_empty()
        && local.value.iter().all(|own| own.is_ipv4() != remote.value.is_ipv4())
    {
        table.error(
            remote.span.clone(),
            "remote",
            "`local` has no address of its family, so there is no way to it; add one, or leave `local` out",
        );
    }
    if let Some(nets) = remote_nets
        && !nets.value.iter().any(|Network(net)| net.contains(&remote.value))
    {
        let message = "does not hold `remote`; add it, or leave one of the two out";
        table.error(nets.span.clone(), "remote_nets", message);
    }
}

/// Rekey time, jitter and the time after it. A rekey time of 0 is never.
fn times(table: &mut Table<'_, '_>) -> (Option<Duration>, Duration, Duration) {
    let rekey = table.or("rekey_s", 14_400_u32);
    let jitter = table.or("rekey_jitter_s", rekey / 10);
    let over_time = table.or("over_time_s", rekey.div_ceil(10));
    if jitter > rekey {
        table.error(table.span.clone(), "rekey_jitter_s", "above `rekey_s`, from which it is taken off");
    }
    if rekey > 0 && over_time == 0 {
        table.error(table.span.clone(), "over_time_s", "expected a number above 0: a rekey takes some time");
    }
    (seconds(rekey), Duration::from_secs(u64::from(jitter)), Duration::from_secs(u64::from(over_time)))
}

fn seconds(seconds: u32) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)))
}

/// A network that a peer may come from.
struct Network(IpNet);

impl Read for Network {
    const EXPECTED: &'static str = "a network such as \"198.51.100.0/24\", or an address";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let DeValue::String(text) = value else { return Err(expected::<Self>()) };
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        match net {
            Ok(net) if net.addr() != net.network() => Err(format!(
                "expected a network without host bits: with this prefix length it is \"{}\"",
                net.trunc()
            )),
            Ok(net) => Ok(Self(net)),
            Err(_) => Err(expected::<Self>()),
        }
    }
}

/// What a client asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Read for Family {
    const EXPECTED: &'static str = "\"v4\" or \"v6\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        one_of(&value, &[("v4", Self::V4), ("v6", Self::V6)]).ok_or_else(expected::<Self>)
    }
}

impl Read for Unique {
    const EXPECTED: &'static str = "\"replace\", \"keep\" or \"never\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [("replace", Self::Replace), ("keep", Self::Keep), ("never", Self::Never)];
        one_of(&value, &words).ok_or_else(expected::<Self>)
    }
}

impl Read for Strategy {
    const EXPECTED: &'static str = "\"delete\", \"prebuilt\", \"restore\" or \"none\"";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let words = [
            ("delete", Self::Delete),
            ("prebuilt", Self::Prebuilt),
            ("restore", Self::Restore),
            ("none", Self::None),
        ];
        one_of(&value, &words).ok_or_else(expected::<Self>)
    }
}
