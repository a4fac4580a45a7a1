//! A day's changes in a quarter of an hour: `cargo bench -p postern-benches-packet --bench soak -- --packets 1000000000`
//!
//! Prints a line a second, then what came of it; ends with 1 if anything does not add up. See
//! `postern_benches_packet::soak`. `--minutes N` ends it earlier, `--seed N` changes the changes.
#![allow(clippy::print_stdout, reason = "a program's output")]

use std::process::ExitCode;
use std::time::Duration;

use postern_benches_packet::soak::{Settings, run};

fn main() -> ExitCode {
    // `cargo bench` says so; `cargo test` does not, and wants to see that it works.
    let (bench, arguments): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument == "--bench");
    let packets = if bench.is_empty() { 100_000 } else { 1_000_000_000 };
    let mut settings = Settings { packets, limit: Duration::from_hours(1), seed: 1, progress: true };
    for pair in arguments.chunks(2) {
        let parsed = match pair {
            [name, value] => match name.as_str() {
                "--packets" => value.parse().map(|packets| settings.packets = packets).is_ok(),
                "--minutes" => value
                    .parse()
                    .map(|minutes: u64| settings.limit = Duration::from_secs(60 * minutes))
                    .is_ok(),
                "--seed" => value.parse().map(|seed| settings.seed = seed).is_ok(),
                _ => false,
            },
            _ => false,
        };
        if !parsed {
            println!("[--packets 1000000000] [--minutes 60] [--seed 1]");
            return ExitCode::from(2);
        }
    }
    match run(&settings) {
        Ok(report) => {
            println!("{report}");
            let complaints = report.complaints();
            for complaint in &complaints {
                println!("WRONG: {complaint}");
            }
            println!(
                "{}",
                if complaints.is_empty() { "everything adds up" } else { "NOT everything adds up" }
            );
            ExitCode::from(u8::from(!complaints.is_empty()))
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}
