//! The main thread's ends of one worker: what is sent to it, and the indices of its tables.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam::queue::ArrayQueue;

use crate::command::{COMMANDS_PER_BATCH, Command, Table};
use crate::counters::WorkerCells;
use crate::handoff::Inbox;
use crate::sad::lookup::Handle;

/// The main thread's ends of one worker.
#[derive(Debug)]
pub struct WorkerLink {
    /// Batches of commands.
    pub commands: Arc<ArrayQueue<Vec<Command>>>,
    /// Rings its bell.
    pub inbox: Inbox,
    /// Its counters.
    pub cells: Arc<WorkerCells>,
    /// Batches sent so far.
    sent: u64,
    pub(super) pending: Vec<Command>,
    indices: [Indices; 2],
}

impl WorkerLink {
    /// Ends of a worker that has been sent nothing yet.
    pub fn new(commands: Arc<ArrayQueue<Vec<Command>>>, inbox: Inbox, cells: Arc<WorkerCells>) -> Self {
        Self {
            commands,
            inbox,
            cells,
            sent: 0,
            pending: Vec::new(),
            indices: [Indices::default(), Indices::default()],
        }
    }

    pub(super) fn push(&mut self, command: Command) {
        self.pending.push(command);
        if self.pending.len() >= COMMANDS_PER_BATCH {
            self.flush();
        }
    }

    pub(super) fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let mut batch = std::mem::replace(&mut self.pending, Vec::with_capacity(COMMANDS_PER_BATCH));
        while let Err(back) = self.commands.push(batch) {
            batch = back;
            self.inbox.bell().ring();
            std::thread::yield_now();
        }
        self.sent += 1;
        self.inbox.bell().ring();
    }

    pub(super) fn is_idle(&self) -> bool {
        self.cells.commands.load(Ordering::Acquire) >= self.sent
    }

    pub(super) fn indices(&mut self, table: Table) -> &mut Indices {
        let [inbound, outbound] = &mut self.indices;
        match table {
            Table::Inbound => inbound,
            Table::Outbound => outbound,
        }
    }
}

/// Free indices of one table.
#[derive(Debug, Default)]
pub(super) struct Indices {
    next: u32,
    pub(super) free: Vec<u32>,
}

impl Indices {
    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        let index = self.next;
        if index > Handle::MAX_INDEX {
            return None;
        }
        self.next += 1;
        Some(index)
    }
}
