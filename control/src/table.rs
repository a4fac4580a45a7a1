//! Tables for people: columns as wide as their widest cell, two blanks between, nothing at line ends.

use core::fmt;

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table in the making.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings; one that begins with `#` is of numbers, and shown without the `#`.
    pub fn new(headings: &[&'static str]) -> Self {
        let column = |heading: &&'static str| match heading.strip_prefix('#') {
            Some(heading) => (heading, Align::Right),
            None => (*heading, Align::Left),
        };
        Self { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, additional ones are left out.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().take(self.columns.len()).collect());
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(index, (heading, _))| {
                let cells = self.rows.iter().filter_map(|row| row.get(index));
                cells.map(|cell| width(cell)).chain([width(heading)]).max().unwrap_or_default()
            })
            .collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for ((_, align), width_wanted) in self.columns.iter().zip(&widths) {
                let cell = cells.next().unwrap_or_default();
                let blanks = " ".repeat(width_wanted.saturating_sub(width(cell)));
                let (before, after) = match align {
                    Align::Left => ("", blanks.as_str()),
                    Align::Right => (blanks.as_str(), ""),
                };
                text.extend([before, cell, after, "  "]);
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.columns.iter().map(|(heading, _)| *heading))?;
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str))?;
        }
        Ok(())
    }
}

/// `1234567` as `1.23 M`; below ten thousand as it is.
pub fn count(number: u64) -> String {
    scaled(number, 1000, &["", "k", "M", "G", "T", "P", "E"])
}

/// Bytes in binary units.
pub fn bytes(number: u64) -> String {
    scaled(number, 1024, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// Seconds as `3d 4h`, `5m 6s`, …
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// Milliseconds since 1970 as `2026-11-21 13:29:05.123Z`.
pub fn timestamp(unix_ms: u64) -> String {
    let (seconds, millis) = (unix_ms / 1000, unix_ms % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March have their leap day at the end; an era is 400 of them, 146097 days.
    let from_march = days + 719_468;
    let (era, day) = (from_march / 146_097, from_march % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day + 2) / 153;
    let day = day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

fn scaled(number: u64, base: u64, units: &[&str]) -> String {
    let mut whole = u128::from(number);
    let mut hundredths = whole * 100;
    let mut unit = units.first().copied().unwrap_or_default();
    for larger in units.iter().skip(1) {
        if whole < 10_000 {
            break;
        }
        hundredths /= u128::from(base);
        whole = hundredths / 100;
        unit = larger;
    }
    let text = match unit {
        _ if hundredths == u128::from(number) * 100 => number.to_string(),
        _ if whole < 10 => format!("{whole}.{:02}", hundredths % 100),
        _ if whole < 100 => format!("{whole}.{}", hundredths % 100 / 10),
        _ => whole.to_string(),
    };
    format!("{text} {unit}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["NAME", "#COUNT", "END"]);
        table.row(["ä".into(), "7".into(), "x".into()]);
        table.row(["longer".into(), "12345678".into()]);
        assert_eq!(table.to_string(), "NAME       COUNT  END\nä              7  x\nlonger  12345678\n");
    }

    /// Against `date -u -d @…`.
    #[test]
    fn times_of_day() {
        for (seconds, shown) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_799, "2000-02-29 23:59:59"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (1_735_689_599, "2024-12-31 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(timestamp(seconds * 1000 + 7), format!("{shown}.007Z"));
        }
    }

    #[test]
    fn numbers_for_people() {
        let shown = [0, 9999, 10_000, 123_456, 1_234_567, u64::MAX].map(count);
        assert_eq!(shown, ["0", "9999", "10.0 k", "123 k", "1234 k", "18.4 E"]);
        assert_eq!([bytes(1000), bytes(20 << 20)], ["1000 B", "20.0 MiB"]);
        assert_eq!([5, 65, 3700, 90_000].map(duration), ["5s", "1m 5s", "1h 1m", "1d 1h"]);
    }
}
