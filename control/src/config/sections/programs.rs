//! `[datapath]` and `[control]`: settings of the two programs.

use std::net::SocketAddr;
use std::path::PathBuf;

use postern_contract::settings::DatapathSettings;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::ControlSettings;
use crate::config::diagnostic::{Report, nearest};
use crate::config::reader::Table;

pub(super) fn datapath(
    report: &Report<'_>,
    section: Option<Spanned<DeValue<'_>>>,
) -> Option<DatapathSettings> {
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

pub(super) fn control(section: Option<Table<'_, '_>>, report: &Report<'_>) -> Option<ControlSettings> {
    let mut settings = ControlSettings {
        socket: "/run/postern/control.sock".into(),
        state: "/var/lib/postern/control".into(),
        log: "info".to_owned(),
        datapath_program: None,
        metrics: None,
        metrics_of_tunnels: false,
    };
    let Some(mut table) = section else { return Some(settings) };
    settings.socket = table.get::<PathBuf>("socket").map_or(settings.socket, |found| found.value);
    settings.state = table.get::<PathBuf>("state").map_or(settings.state, |found| found.value);
    settings.datapath_program = table.get::<PathBuf>("datapath_program").map(|found| found.value);
    if let Some(metrics) = table.get::<SocketAddr>("metrics") {
        if !metrics.value.ip().is_loopback() {
            table.warn(
                metrics.span,
                "metrics",
                "not a loopback address: whoever reaches it reads the counters, there is no password",
            );
        }
        settings.metrics = Some(metrics.value);
    }
    settings.metrics_of_tunnels = table.get::<bool>("metrics_of_tunnels").is_some_and(|found| found.value);
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
