//! `[recovery]`: what is saved for the time after a reset, and how peers are told.

use core::time::Duration;
use std::path::PathBuf;

use super::ike::number;
use crate::config::reader::Table;
use crate::recovery::{Access, Settings};

/// The section.
pub(super) fn recovery(section: Option<Table<'_, '_>>) -> Settings {
    let mut settings = Settings::default();
    let Some(mut table) = section else { return settings };
    settings.enabled = table.or("enabled", settings.enabled);
    settings.directory = table.get::<PathBuf>("directory").map(|found| found.value);
    settings.device = table.get::<PathBuf>("device").map(|found| found.value);
    settings.checkpoint = Duration::from_secs(u64::from(number(&mut table, "checkpoint_s", 1..=65_535, 300)));
    settings.access = Access {
        passphrase_file: table.get::<PathBuf>("passphrase_file").map(|found| found.value),
        credential: table.get::<String>("credential").map(|found| found.value),
        tcti: table.get::<String>("tcti").map(|found| found.value),
        tpm_counter: table.or("tpm_counter", false),
        counter_interval: Duration::from_secs(u64::from(number(
            &mut table,
            "tpm_counter_s",
            0..=65_535,
            3600,
        ))),
    };
    settings.tokens = table.or("quick_crash_detection", settings.tokens);
    let pace = &mut settings.pace;
    pace.rate = table.or("rate", pace.rate);
    pace.in_flight = table.or("in_flight", pace.in_flight).max(1);
    let mut tries = |key, default: u8| {
        u8::try_from(number(&mut table, key, 1..=50, u16::from(default))).unwrap_or(default)
    };
    pace.tries = tries("tries", pace.tries);
    pace.silent_tries = tries("silent_tries", pace.silent_tries);
    let first = number(&mut table, "retransmit_first_ms", 10..=60_000, 500);
    pace.first = Duration::from_millis(u64::from(first));
    table.finish();
    settings
}
