//! What several sections have: selectors, header fields, UDP encapsulation.

use core::ops::RangeInclusive;

use postern_contract::sa::{AddressRange, DfPolicy, DscpPolicy, FanOut, PathPolicy, Selector, UdpEncap};
use postern_wire::ids::{PORT_NATT, Protocol};

use super::Context;
use super::values::Ports;
use crate::config::reader::{Located, Net, Table};

impl Context<'_> {
    /// Every pair of one family.
    pub(super) fn selectors(
        &self,
        table: &Table<'_, '_>,
        local: &[AddressRange],
        remote: &[AddressRange],
        upper: &Upper,
    ) -> Vec<Selector> {
        let selectors = pairs(local, remote, upper);
        if selectors.is_empty() {
            self.report.error(
                table.span.clone(),
                &table.path_of(if table.has("local_net") { "local_net" } else { "local" }),
                "the networks of the two sides have no address family in common, so nothing would ever match",
            );
        }
        selectors
    }

    /// The worker that is to own SAs.
    pub(super) fn worker(&self, table: &mut Table<'_, '_>) -> Option<u16> {
        let found = table.get::<u16>("worker")?;
        if self.workers.is_some_and(|workers| usize::from(found.value) >= workers) {
            let workers = self.workers.unwrap_or_default();
            table.error(
                found.span,
                "worker",
                format!("there are {workers} workers (see datapath.cores), numbered from 0"),
            );
        }
        Some(found.value)
    }
}

/// Whether other workers may encrypt and decrypt for the owner of SAs; by load where nothing is said.
pub(super) fn fan_out(table: &mut Table<'_, '_>) -> FanOut {
    match table.get::<bool>("fan_out").map(|found| found.value) {
        None => FanOut::ByLoad,
        Some(true) => FanOut::Always,
        Some(false) => FanOut::Never,
    }
}

/// Upper-layer part of selectors.
pub(super) struct Upper {
    pub(super) protocol: Option<Protocol>,
    pub(super) local_ports: RangeInclusive<u16>,
    pub(super) remote_ports: RangeInclusive<u16>,
}

pub(super) fn encapsulation(mut table: Table<'_, '_>) -> UdpEncap {
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

pub(super) fn path(table: &mut Table<'_, '_>) -> PathPolicy {
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

pub(super) fn upper_layer(table: &mut Table<'_, '_>) -> Upper {
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

pub(super) fn ranges(nets: Vec<Net>) -> Vec<AddressRange> {
    nets.into_iter().map(|Net(range)| range).collect()
}

/// Packets of the anti-replay window.
pub(super) fn replay_window(table: &mut Table<'_, '_>) -> u16 {
    let Some(found) = table.get::<u16>("replay_window") else { return 1024 };
    if !found.value.is_multiple_of(64) || found.value > 4096 {
        table.error(
            found.span,
            "replay_window",
            "expected 64 to 4096 in multiples of 64, or 0 to turn the check off",
        );
    }
    found.value
}

/// A selector for every pair of one family.
pub(super) fn pairs(local: &[AddressRange], remote: &[AddressRange], upper: &Upper) -> Vec<Selector> {
    let pairs = local.iter().flat_map(|l| remote.iter().map(move |r| (*l, *r)));
    pairs
        .filter(|(local, remote)| local.start.is_ipv4() == remote.start.is_ipv4())
        .map(|(local, remote)| Selector {
            local,
            remote,
            protocol: upper.protocol,
            local_ports: upper.local_ports.clone(),
            remote_ports: upper.remote_ports.clone(),
        })
        .collect()
}
