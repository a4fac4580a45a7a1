//! Recovery from resets, for people.

use core::fmt::Write;
use core::time::Duration;

use crate::recovery::{BurstReport, Report, Stats};
use crate::table::{bytes, count, timestamp};

/// The burst in one line.
pub fn burst_line(burst: &BurstReport) -> String {
    let BurstReport { total, expired, told, sent, unanswered, superseded, waiting, under_way, .. } = burst;
    let mut text = format!("{} of {} peers told", count(told + sent), count(total - expired));
    for (number, what) in [
        (*under_way, "under way"),
        (*waiting, "waiting"),
        (*unanswered, "have not answered"),
        (*superseded, "have a new IKE SA"),
        (*expired, "had expired"),
        (burst.forged, "forged answers"),
    ] {
        if number > 0 {
            let _ = write!(text, ", {} {what}", count(number));
        }
    }
    text + "\n"
}

/// The line in `status`.
pub(super) fn glance(report: &Report) -> String {
    let Report { cause_text, burst, restored, adopted, backup, .. } = report;
    let mut text = format!("recovery  {cause_text}");
    if let Some(burst) = burst {
        let _ = write!(text, "; {}", burst_line(burst).trim_end());
    }
    if *restored > 0 {
        let _ = write!(text, "; {} IKE SAs went on", count(*restored));
    }
    if *adopted > 0 {
        let _ = write!(text, "; {} IKE SAs of the control process before", count(*adopted));
    }
    match backup {
        Some(Stats { records, bytes: size, .. }) => {
            let _ = writeln!(text, "; {} IKE SAs saved, {}", count(*records), bytes(*size));
        }
        None => text.push_str("; nothing is saved\n"),
    }
    text
}

/// All of it.
pub(super) fn whole(report: &Report) -> String {
    let Report { cause: _, cause_text, burst, restored, restored_us, adopted, backup, problems } = report;
    let mut text = format!("start     {cause_text}\n");
    if let Some(burst) = burst {
        let _ = write!(text, "peers     {}", burst_line(burst));
        let at =
            |time: Option<u64>| time.map_or_else(|| "-".to_owned(), |us| millis(Duration::from_micros(us)));
        let _ = writeln!(
            text,
            "          first message {} after the start, last answer {}, done {}; {} messages",
            at(burst.first_message_us),
            at(burst.last_answer_us),
            at(burst.done_us),
            count(burst.messages)
        );
    }
    if *restored > 0 {
        let after = millis(Duration::from_micros(restored_us.unwrap_or_default()));
        let _ = writeln!(
            text,
            "restored  {} IKE SAs went on with their CHILD_SAs, {after} after the start",
            count(*restored)
        );
    }
    if *adopted > 0 {
        let _ = writeln!(text, "adopted   {} IKE SAs whose CHILD_SAs go on in the datapath", count(*adopted));
    }
    match backup {
        Some(stats) => text.push_str(&backup_lines(stats)),
        None => text.push_str("backup    nothing is saved\n"),
    }
    for problem in problems {
        let _ = writeln!(text, "problem   {problem}");
    }
    text
}

fn backup_lines(stats: &Stats) -> String {
    let Stats { records, bytes: size, generation, protected, recipient, commits, changes, .. } = stats;
    let guard = if *protected { "guarded" } else { "not guarded" };
    let mut text = format!(
        "backup    {} IKE SAs, {}; generation {generation}, for key {recipient}, {guard} against roll-back\n",
        count(*records),
        bytes(*size)
    );
    if let Some((when, records, took)) = stats.checkpoint {
        let when = timestamp(when.saturating_mul(1000));
        let _ =
            writeln!(text, "          written anew {when}: {} records in {}", count(records), millis(took));
    }
    if let (Some(half), Some(p99)) = (stats.latency.quantile(500), stats.latency.quantile(990)) {
        let _ = writeln!(
            text,
            "          {} changes in {} writes; durable after {} (median), {} (99 %), {} at most",
            count(*changes),
            count(*commits),
            millis(half),
            millis(p99),
            millis(stats.latency.most())
        );
    }
    text
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}
