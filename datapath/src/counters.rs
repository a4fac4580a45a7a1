//! Counter cells: written by one worker, read by the main thread.
//!
//! A cell has a single writer, so adding is a plain load and store; relaxed atomics only say that another thread reads.

use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::HashMap;
use postern_contract::counters::{DropReason, PortCounters};

use crate::command::Table;
use crate::fib::PortIndex;

/// One counter with a single writer.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds `n`. Only the owning worker may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets a gauge. Only the owning worker may call this.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value, perhaps a moment old.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one port of one worker.
#[derive(Debug)]
pub struct PortCells {
    /// Frames received.
    pub received: Cell,
    /// Bytes received.
    pub received_bytes: Cell,
    /// Frames given to the transmit ring.
    pub transmitted: Cell,
    /// Bytes given to the transmit ring.
    pub transmitted_bytes: Cell,
    drops: Box<[Cell]>,
}

impl Default for PortCells {
    fn default() -> Self {
        Self {
            received: Cell::default(),
            received_bytes: Cell::default(),
            transmitted: Cell::default(),
            transmitted_bytes: Cell::default(),
            drops: (0..DropReason::COUNT).map(|_| Cell::default()).collect(),
        }
    }
}

impl PortCells {
    /// Counts one dropped frame.
    #[inline]
    pub fn drop(&self, reason: DropReason) {
        if let Some(cell) = self.drops.get(reason.index()) {
            cell.add(1);
        }
    }

    /// Counts several dropped frames.
    pub fn drop_many(&self, reason: DropReason, count: u64) {
        if count > 0
            && let Some(cell) = self.drops.get(reason.index())
        {
            cell.add(count);
        }
    }

    /// Frames dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops.get(reason.index()).map_or(0, Cell::get)
    }

    /// All values.
    pub fn snapshot(&self) -> PortCounters {
        let drops = DropReason::ALL.iter().map(|reason| (*reason, self.drops(*reason)));
        PortCounters {
            received: self.received.get(),
            received_bytes: self.received_bytes.get(),
            transmitted: self.transmitted.get(),
            transmitted_bytes: self.transmitted_bytes.get(),
            drops: drops.filter(|(_, count)| *count > 0).collect(),
        }
    }
}

/// Counters of one worker.
#[derive(Debug, Default)]
pub struct WorkerCells {
    /// Turns that found work.
    pub busy_turns: Cell,
    /// Frames in the worker's own pool.
    pub free_frames: Cell,
    /// Commands applied; the main thread waits for this to reach what it sent.
    pub commands: AtomicU64,
    /// Inbound SAs.
    pub inbound: Cell,
    /// Outbound SAs.
    pub outbound: Cell,
    /// Frames that were handed to another worker.
    pub handed_off: Cell,
    /// Packets of this worker's SAs that others sealed or opened (DP-8).
    pub fanned_out: Cell,
    /// Packets that this worker sealed or opened for others.
    pub helped: Cell,
    /// Packets that the worker made: further fragments of one packet, and ICMP errors. What was received and made was
    /// either transmitted or dropped.
    pub made: Cell,
    /// Events lost because the outbox was full.
    pub lost_events: Cell,
    /// Ports, by index.
    pub ports: Box<[PortCells]>,
}

impl WorkerCells {
    /// Cells for `ports` ports.
    pub fn new(ports: usize) -> Self {
        Self { ports: (0..ports).map(|_| PortCells::default()).collect(), ..Self::default() }
    }

    /// Counts a frame that came in on `port` as dropped.
    pub fn count_drop(&self, port: PortIndex, reason: DropReason) {
        if let Some(cells) = self.ports.get(usize::from(port.0)) {
            cells.drop(reason);
        }
    }

    /// Sum over all ports of the frames dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.ports.iter().map(|port| port.drops(reason)).sum()
    }

    /// Sum over all ports and reasons.
    pub fn all_drops(&self) -> u64 {
        DropReason::ALL.iter().map(|reason| self.drops(*reason)).sum()
    }
}

/// Drops by SA and reason. Few SAs have any, so they share one map whose size is fixed at start: nothing is allocated
/// when a packet is dropped. SAs beyond its size are counted by port only.
#[derive(Debug)]
pub struct SaDrops {
    map: HashMap<(bool, u32, DropReason), u64>,
    limit: usize,
}

impl Default for SaDrops {
    fn default() -> Self {
        let map = HashMap::with_capacity(16_384);
        Self { limit: map.capacity(), map }
    }
}

impl SaDrops {
    /// Counts one dropped packet of an SA.
    pub fn add(&mut self, table: Table, index: u32, reason: DropReason) {
        let key = (table == Table::Inbound, index, reason);
        if let Some(count) = self.map.get_mut(&key) {
            *count += 1;
        } else if self.map.len() < self.limit {
            self.map.insert(key, 1);
        }
    }

    /// The drops of one SA.
    pub fn of(&self, table: Table, index: u32) -> Vec<(DropReason, u64)> {
        if self.map.is_empty() {
            return Vec::new();
        }
        let inbound = table == Table::Inbound;
        let all = DropReason::ALL.iter();
        all.filter_map(|reason| Some((*reason, *self.map.get(&(inbound, index, *reason))?))).collect()
    }

    /// Forgets an SA whose index will be used again.
    pub fn forget(&mut self, table: Table, index: u32) {
        if !self.map.is_empty() {
            for reason in DropReason::ALL {
                self.map.remove(&(table == Table::Inbound, index, *reason));
            }
        }
    }
}
