//! Metrics in the OpenMetrics text format that Prometheus reads (OPS-3): `GET /metrics` on `control.metrics`.
//!
//! Everything is read when it is asked for; nothing is counted here. What is asked is small whatever the number of SAs:
//! the datapath's status and the counters of IKE; the inventory is read only with `metrics_of_tunnels`. Labels are names from the configuration, of
//! interfaces and of reasons; no address, identity or key is shown.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use postern_contract::counters::DropReason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::admin::server::Daemon;
use crate::admin::{State, TunnelRow};
use crate::datapath::supervisor::Glance;
use crate::recovery::{BurstReport, Report};

/// A scrape that takes longer than this is given up: Prometheus itself waits 10 s.
const PATIENCE: Duration = Duration::from_secs(8);

/// What the answer says of itself.
const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is shown.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Seconds since control's start.
    pub uptime_seconds: u64,
    /// The datapath, as its supervisor sees it.
    pub datapath: Glance,
    /// Tunnels and children of connections, if they are to be shown.
    pub tunnels: Vec<TunnelRow>,
    /// IKE, if it runs.
    pub ike: Option<IkeTotals>,
    /// Recovery from resets, if IKE runs.
    pub recovery: Option<Report>,
}

/// IKE in numbers.
#[derive(Clone, Debug, Default)]
pub struct IkeTotals {
    /// IKE SAs, half-open ones included.
    pub ike_sas: u64,
    /// CHILD_SAs that are installed.
    pub child_sas: u64,
    /// Counters by label.
    pub counters: Vec<(String, u64)>,
}

/// Listens at `address`.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers until the task is dropped.
pub async fn serve(listener: TcpListener, daemon: Arc<Daemon>) -> std::io::Result<()> {
    let router = Router::new().route("/metrics", get(scrape)).with_state(daemon);
    axum::serve(listener, router).await
}

async fn scrape(extract::State(daemon): extract::State<Arc<Daemon>>) -> impl IntoResponse {
    let snapshot = tokio::time::timeout(PATIENCE, daemon.snapshot()).await;
    match snapshot.map(|snapshot| snapshot.map(render)) {
        Ok(Ok(Ok(text))) => ([(header::CONTENT_TYPE, FORMAT)], text).into_response(),
        Ok(Ok(Err(fmt::Error))) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Ok(Err(failure)) => (StatusCode::SERVICE_UNAVAILABLE, failure.message).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the datapath does not answer").into_response(),
    }
}

/// The text of a snapshot.
pub fn render(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("postern");
    registry.register_collector(Box::new(snapshot));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut page = Page(encoder);
        let Self { uptime_seconds, datapath, tunnels, ike, recovery } = self;
        page.gauge("control_uptime_seconds", "Time since the start of control", *uptime_seconds)?;
        page.datapath(datapath)?;
        page.tunnels(tunnels)?;
        if let Some(totals) = ike {
            page.ike(totals)?;
        }
        match recovery {
            Some(report) => page.recovery(report),
            None => Ok(()),
        }
    }
}

/// Label names and values of one series.
type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.gauges(name, help, [([], value)])
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, [([], value)])
    }

    fn gauges<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'l, N>, u64)>,
    ) -> fmt::Result {
        // The format has 64-bit floats; its encoder takes signed integers.
        let metric = |value| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        self.family(name, help, series.into_iter().map(|(labels, value)| (labels, metric(value))))
    }

    fn counters<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'l, N>, u64)>,
    ) -> fmt::Result {
        self.family(name, help, series.into_iter().map(|(labels, value)| (labels, ConstCounter::new(value))))
    }

    /// A name with its series; without any it is left out.
    fn family<'l, const N: usize, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels<'l, N>, M)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        let Some((_, first)) = series.peek() else { return Ok(()) };
        let mut family = self.0.encode_descriptor(name, help, None, first.metric_type())?;
        if N == 0 {
            return series.next().map_or(Ok(()), |(_, metric)| metric.encode(family));
        }
        for (labels, metric) in series {
            metric.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn datapath(&mut self, glance: &Glance) -> fmt::Result {
        let Glance { up, since_seconds, starts, status, latency, events } = glance;
        self.gauge("datapath_up", "1 while control is connected to the datapath", u64::from(*up))?;
        self.gauge(
            "datapath_state_seconds",
            "Time since the datapath is connected, or is not",
            *since_seconds,
        )?;
        self.counter("datapath_starts", "How often control started the datapath", *starts)?;
        let events = events.iter().map(|(kind, count)| ([("kind", *kind)], *count));
        self.counters("datapath_events", "Events of the datapath", events)?;
        let Some(status) = status else { return Ok(()) };
        self.gauge("datapath_uptime_seconds", "Time since the start of the datapath", status.uptime_seconds)?;
        self.gauge("sas", "Installed SAs, each direction one", status.sas)?;
        self.gauge("policies", "Installed policies", status.policies)?;
        self.gauge("relay_entries", "Installed translation entries", status.relays)?;
        let in_xdp = status.relays_in_xdp.unwrap_or_default();
        self.gauge("relay_entries_in_xdp", "Translation entries that the XDP programs execute", in_xdp)?;

        let numbers: Vec<_> = (0..status.workers.len()).map(|number| number.to_string()).collect();
        let workers = || numbers.iter().map(String::as_str).zip(&status.workers);
        let of_worker = |value: fn(&_) -> u64| workers().map(move |(n, w)| ([("worker", n)], value(w)));
        self.counters("worker_turns", "Turns that found work", of_worker(|worker| worker.busy_turns))?;
        let fanned = of_worker(|worker| worker.fanned_out);
        self.counters("worker_fanned_out", "Packets of its SAs that other workers sealed or opened", fanned)?;
        let helped = of_worker(|worker| worker.helped);
        self.counters("worker_helped", "Packets that it sealed or opened for other workers", helped)?;
        self.gauges("worker_free_frames", "Frames free for use", of_worker(|worker| worker.free_frames))?;

        let ports: Vec<_> = workers()
            .flat_map(|(number, worker)| worker.ports.iter().map(move |port| (number, port)))
            .map(|(number, port)| (number, port, port.queue.to_string()))
            .collect();
        let of_port = |value: fn(&_) -> u64| {
            ports.iter().map(move |(number, port, queue)| {
                let place = [("worker", *number), ("interface", &*port.interface), ("queue", &**queue)];
                (place, value(&port.counters))
            })
        };
        self.counters("port_received_packets", "Frames received", of_port(|port| port.received))?;
        self.counters("port_received_bytes", "Bytes received", of_port(|port| port.received_bytes))?;
        self.counters("port_transmitted_packets", "Frames sent", of_port(|port| port.transmitted))?;
        self.counters("port_transmitted_bytes", "Bytes sent", of_port(|port| port.transmitted_bytes))?;
        // Every reason, so that an alert can be written before it happens.
        let drops =
            DropReason::ALL.iter().map(|reason| ([("reason", reason.label())], status.drops(*reason)));
        self.counters("drops", "Packets dropped, by reason", drops)?;
        let verdicts = status.steer.iter().flat_map(|steer| {
            let of = |verdict| [("interface", steer.interface.as_str()), ("verdict", verdict)];
            steer.verdicts.iter().map(move |(verdict, packets)| (of(verdict.as_str()), *packets))
        });
        self.counters("xdp_packets", "Packets by verdict of the XDP program", verdicts)?;
        let Some(latency) = latency.filter(|latency| latency.samples > 0) else { return Ok(()) };
        let quantiles = [
            ("0", latency.min),
            ("0.5", latency.p50),
            ("0.9", latency.p90),
            ("0.99", latency.p99),
            ("0.999", latency.p999),
            ("1", latency.max),
        ];
        let quantiles = quantiles.map(|(quantile, value)| ([("quantile", quantile)], value));
        self.gauges("latency_nanoseconds", "Time from receive to transmit of sampled packets", quantiles)
    }

    fn tunnels(&mut self, tunnels: &[TunnelRow]) -> fmt::Result {
        let each = |value: fn(&TunnelRow) -> u64| {
            tunnels.iter().map(move |tunnel| ([("tunnel", tunnel.name.as_str())], value(tunnel)))
        };
        let up = |tunnel: &TunnelRow| u64::from(tunnel.state == State::Installed);
        self.gauges("tunnel_up", "1 while all SAs of the tunnel and its policy are installed", each(up))?;
        self.counters("tunnel_received_packets", "Packets out of the tunnel", each(|row| row.in_packets))?;
        self.counters("tunnel_received_bytes", "Bytes out of the tunnel", each(|row| row.in_bytes))?;
        self.counters("tunnel_sent_packets", "Packets into the tunnel", each(|row| row.out_packets))?;
        self.counters("tunnel_sent_bytes", "Bytes into the tunnel", each(|row| row.out_bytes))?;
        self.counters("tunnel_drops", "Packets dropped at the tunnel's SAs", each(|row| row.drops))
    }

    fn ike(&mut self, totals: &IkeTotals) -> fmt::Result {
        self.gauge("ike_sas", "IKE SAs, half-open ones included", totals.ike_sas)?;
        self.gauge("child_sas", "CHILD_SAs that are installed", totals.child_sas)?;
        let (ignored, happened): (Vec<_>, Vec<_>) =
            totals.counters.iter().partition(|(label, _)| label.starts_with(IGNORED));
        let happened = happened.into_iter().map(|(label, count)| ([("kind", label.as_str())], *count));
        self.counters("ike", "What IKE did and what happened to it, by kind", happened)?;
        let ignored = ignored
            .into_iter()
            .map(|(label, count)| ([("reason", label.strip_prefix(IGNORED).unwrap_or(label))], *count));
        self.counters("ike_ignored", "IKE messages that were not acted on, by reason", ignored)
    }
}

impl Page<'_> {
    fn recovery(&mut self, report: &Report) -> fmt::Result {
        if let Some(stats) = &report.backup {
            self.gauge("backup_records", "IKE SAs in the backup", stats.records)?;
            self.gauge("backup_bytes", "Size of the backup", stats.bytes)?;
            self.gauge(
                "backup_failing",
                "Whether the backup cannot be written",
                stats.problem.is_some().into(),
            )?;
            self.counter("backup_changes", "Records written to the backup", stats.changes)?;
            let nanoseconds = |per_thousand| {
                let time = stats.latency.quantile(per_thousand).unwrap_or_default();
                u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
            };
            let quantiles = [("0.5", 500), ("0.99", 990)];
            let series = quantiles.map(|(name, part)| ([("quantile", name)], nanoseconds(part)));
            self.gauges("backup_durable_nanoseconds", "Time until a record is durable", series)?;
        } else if !report.problems.is_empty() {
            // There should be one: no keys, or no thread.
            self.gauge("backup_failing", "Whether the backup cannot be written", 1)?;
        }
        let burst = match &report.burst {
            Some(burst) => burst,
            None if report.restored > 0 => &BurstReport::default(),
            None => return Ok(()),
        };
        let series = [
            ("restored", report.restored),
            ("told", burst.told),
            ("sent", burst.sent),
            ("expired", burst.expired),
            ("unanswered", burst.unanswered),
            ("superseded", burst.superseded),
            ("waiting", burst.waiting),
            ("under_way", burst.under_way),
        ];
        let series = series.map(|(state, count)| ([("state", state)], count));
        self.gauges("recovery_ike_sas", "IKE SAs of before the reset, by what became of them", series)
    }
}

/// Prefix of the counters of messages that were not acted on.
const IGNORED: &str = "ignored_";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use postern_contract::counters::PortCounters;
    use postern_contract::request::{Latency, PortStatus, Status, SteerStatus, WorkerStatus};
    use postern_contract::settings::Role;

    use super::*;
    use crate::recovery::{Cause, Stats};

    fn snapshot() -> Snapshot {
        let port = PortStatus {
            interface: "wan0".to_owned(),
            role: Role::Outside,
            attachment: "xsk native copy".to_owned(),
            queue: 1,
            counters: PortCounters {
                received: 7,
                received_bytes: 700,
                drops: vec![(DropReason::ReplayDuplicate, 3)],
                ..PortCounters::default()
            },
        };
        let worker = WorkerStatus {
            core: None,
            busy_turns: 5,
            free_frames: 9,
            fanned_out: 0,
            helped: 0,
            inbound_sas: 0,
            outbound_sas: 0,
            ports: vec![port],
        };
        let steer =
            SteerStatus { interface: "wan0".to_owned(), verdicts: vec![("redirected".to_owned(), 11)] };
        let status = Status { sas: 4, workers: vec![worker], steer: vec![steer], ..Status::default() };
        Snapshot {
            uptime_seconds: 60,
            datapath: Glance {
                up: true,
                status: Some(status),
                latency: Some(Latency { samples: 1, p99: 1200, ..Latency::default() }),
                events: BTreeMap::from([("acquire", 2)]),
                ..Glance::default()
            },
            tunnels: vec![TunnelRow {
                name: "site-b".to_owned(),
                state: State::Installed,
                mode: String::new(),
                suite: String::new(),
                local: String::new(),
                remote: String::new(),
                in_packets: 12,
                in_bytes: 0,
                out_packets: 0,
                out_bytes: 0,
                drops: 0,
                idle_seconds: None,
            }],
            ike: Some(IkeTotals {
                ike_sas: 2,
                child_sas: 1,
                counters: vec![("established".to_owned(), 8), ("ignored_spi".to_owned(), 6)],
            }),
            recovery: Some(Report {
                cause: Cause::Crashed,
                cause_text: String::new(),
                burst: Some(BurstReport { told: 5, waiting: 3, ..BurstReport::default() }),
                restored: 9,
                restored_us: None,
                adopted: 0,
                backup: Some(Stats { records: 2, ..Stats::default() }),
                problems: Vec::new(),
            }),
        }
    }

    /// OPS-3: numbers come with their names and labels, and the text ends as the format wants it.
    #[test]
    fn ops_3_metrics() {
        let text = render(snapshot()).unwrap();
        for line in [
            "postern_control_uptime_seconds 60",
            "postern_datapath_up 1",
            "postern_datapath_events_total{kind=\"acquire\"} 2",
            "postern_sas 4",
            "postern_worker_turns_total{worker=\"0\"} 5",
            "postern_port_received_packets_total{worker=\"0\",interface=\"wan0\",queue=\"1\"} 7",
            "postern_drops_total{reason=\"replay_duplicate\"} 3",
            "postern_xdp_packets_total{interface=\"wan0\",verdict=\"redirected\"} 11",
            "postern_latency_nanoseconds{quantile=\"0.99\"} 1200",
            "postern_tunnel_up{tunnel=\"site-b\"} 1",
            "postern_tunnel_received_packets_total{tunnel=\"site-b\"} 12",
            "postern_ike_sas 2",
            "postern_ike_total{kind=\"established\"} 8",
            "postern_ike_ignored_total{reason=\"spi\"} 6",
            "postern_backup_records 2",
            "postern_recovery_ike_sas{state=\"told\"} 5",
            "postern_recovery_ike_sas{state=\"restored\"} 9",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        for reason in DropReason::ALL {
            assert!(text.contains(&format!("reason=\"{}\"", reason.label())));
        }
    }

    /// OPS-3, RST-11: a backup that cannot be written is a number, whether it was ever opened or not.
    #[test]
    fn ops_3_metrics_of_a_backup_that_fails() {
        let failing = |edit: fn(&mut Report)| {
            let mut snapshot = snapshot();
            edit(snapshot.recovery.as_mut().unwrap());
            let text = render(snapshot).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("postern_backup_failing "));
            line.map(str::to_owned)
        };
        assert_eq!(failing(|_| {}).as_deref(), Some("0"));
        let full = |report: &mut Report| {
            report.backup = Some(Stats { problem: Some("full".to_owned()), ..Stats::default() });
        };
        assert_eq!(failing(full).as_deref(), Some("1"));
        let none = |report: &mut Report| {
            (report.backup, report.problems) = (None, vec!["no keys".to_owned()]);
        };
        assert_eq!(failing(none).as_deref(), Some("1"));
        assert_eq!(failing(|report| report.backup = None), None, "switched off");
    }

    /// A datapath that is down leaves its numbers out instead of showing zeros.
    #[test]
    fn ops_3_metrics_without_a_datapath() {
        let text = render(Snapshot::default()).unwrap();
        assert!(text.contains("postern_datapath_up 0\n"));
        assert!(!text.contains("postern_sas") && !text.contains("postern_drops"));
    }
}
