//! Times, counted by powers of the fourth root of two: small, and a quantile is at most a fifth too high.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Steps to twice the time.
const STEPS: u32 = 4;

/// The histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    counts: Vec<u64>,
    most: Duration,
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, time: Duration) {
        let index = step(time);
        if self.counts.len() <= index {
            self.counts.resize(index + 1, 0);
        }
        if let Some(count) = self.counts.get_mut(index) {
            *count += 1;
        }
        self.most = self.most.max(time);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The longest.
    pub const fn most(&self) -> Duration {
        self.most
    }

    /// The time that so many in a thousand did not exceed.
    pub fn quantile(&self, per_thousand: u64) -> Option<Duration> {
        let wanted = (self.count() * per_thousand).div_ceil(1000).max(1);
        let mut seen = 0;
        let index = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Some(end_of(index).min(self.most))
    }
}

/// Microseconds below 8 are a step each; then four steps to each power of two.
fn step(time: Duration) -> usize {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let power = micros.max(1).ilog2();
    let steps = if power < 2 { micros } else { u64::from(power * STEPS) + ((micros >> (power - 2)) & 3) - 4 };
    usize::try_from(steps).unwrap_or(usize::MAX)
}

/// The first time that is beyond a step.
fn end_of(index: usize) -> Duration {
    let index = u64::try_from(index).unwrap_or(u64::MAX);
    let micros = if index < 4 {
        index + 1
    } else {
        let (power, part) = ((index + 4) / 4, (index + 4) % 4);
        (5 + part).checked_shl(u32::try_from(power - 2).unwrap_or(63)).unwrap_or(u64::MAX)
    };
    Duration::from_micros(micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps are in order, without gaps, and none is wider than a quarter.
    #[test]
    fn steps_are_in_order() {
        let mut before = 0;
        for micros in 0..100_000 {
            let time = Duration::from_micros(micros);
            let index = step(time);
            assert!(index == before || index == before + 1, "{micros}: {before} to {index}");
            before = index;
            assert!(end_of(index) > time && end_of(index) <= time + time / 4 + Duration::from_micros(1));
        }
    }

    #[test]
    fn quantiles() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(990), None);
        for micros in 1..=1000 {
            histogram.add(Duration::from_micros(micros));
        }
        assert_eq!((histogram.count(), histogram.most()), (1000, Duration::from_millis(1)));
        let p99 = histogram.quantile(990).unwrap();
        assert!((Duration::from_micros(990)..=Duration::from_millis(1)).contains(&p99), "{p99:?}");
        assert!(histogram.quantile(500).unwrap() <= Duration::from_micros(640));
    }
}
