//! Counters that storage cannot rewind: what tells the newest backup from an older one that was put back.

use thiserror::Error;

/// A counter that only goes up, kept where whoever can write to the storage cannot lower it.
///
/// A backup file states the value it needs. It is accepted while the counter is not above that value, so a file is
/// written first and the counter advanced after, and a reset in between costs nothing.
pub trait MonotonicCounter: Send {
    /// The value now; `None` where there is no counter, and old backups cannot be told from new ones.
    fn read(&mut self) -> Result<Option<u64>, CounterError>;

    /// Adds one and returns the new value. Only called where [`MonotonicCounter::read`] gave one.
    fn advance(&mut self) -> Result<u64, CounterError>;
}

/// No counter: an older backup that is put back is taken for the newest. `postern check` says so.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCounter;

impl MonotonicCounter for NoCounter {
    fn read(&mut self) -> Result<Option<u64>, CounterError> {
        Ok(None)
    }

    fn advance(&mut self) -> Result<u64, CounterError> {
        Err(CounterError("there is no counter".into()))
    }
}

/// The counter could not be read or advanced; the text says what its device answered.
#[derive(Clone, Debug, Error)]
#[error("monotonic counter: {0}")]
pub struct CounterError(pub String);
