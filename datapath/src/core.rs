//! What a worker owns besides its ports: tables, frames, counters, and where packets leave to.
//!
//! The stages in [`crate::inbound`], [`crate::outbound`] and [`crate::relay`] are functions over this and a batch.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use postern_contract::counters::DropReason;
use postern_contract::event::Event;
use postern_contract::settings::Role;
use postern_wire::ether::Mac;

use crate::command::{Returned, Table};
use crate::counters::{SaDrops, WorkerCells};
use crate::crypto::Engine;
use crate::egress::{Egress, Parking};
use crate::fanout::Fan;
use crate::fib::{CachedFib, PortIndex, Resolver};
use crate::flows::Flows;
use crate::frame::{Arena, Frame, Pool};
use crate::handoff::{Doorbell, Parcel};
use crate::outbound::OutboundBatch;
use crate::port::LinkKind;
use crate::relay::RelayTable;
use crate::sad::lookup::{Handle, SpiTable};
use crate::sad::runtime::{Inbound, Outbound, Rest};
use crate::sad::slab::Slab;
use crate::spd::Spd;

/// What the stages need to know of an interface. The same list, in the same order, in every worker.
#[derive(Clone, Debug)]
pub struct PortInfo {
    /// Interface name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// What its frames begin with.
    pub link: LinkKind,
    /// Its own link-layer address.
    pub mac: Mac,
    /// Takes what this host itself should receive (a TUN device).
    pub host: bool,
    /// Takes outer packets without asking the routes (raw and UDP sockets: the kernel routes them).
    pub socket: bool,
}

/// The way from a worker to the main thread.
#[derive(Clone, Debug)]
pub struct Outbox {
    /// Objects and answers, with the number of the worker.
    pub queue: Arc<ArrayQueue<(u8, Returned)>>,
    /// Wakes the main thread.
    pub bell: Arc<Doorbell>,
}

/// State of one worker.
pub struct Core {
    /// Number of this worker.
    pub id: u8,
    /// Memory of all frames.
    pub arena: Arena,
    /// Free frames.
    pub pool: Pool,
    /// Cryptography and expanded keys.
    pub crypto: Engine,
    /// SPIs of all workers' inbound SAs.
    pub spis: SpiTable,
    /// Inbound SAs of this worker.
    pub inbound: Slab<Inbound, Rest>,
    /// Outbound SAs of this worker.
    pub outbound: Slab<Outbound, Rest>,
    /// Outbound policies.
    pub spd: Spd<Handle>,
    /// What the policies said of flows lately.
    pub flows: Flows,
    /// Translation entries.
    pub relays: RelayTable,
    /// Routes and neighbours.
    pub fib: CachedFib,
    /// Asks the kernel for neighbours.
    pub resolver: Resolver,
    /// All interfaces.
    pub ports: Arc<[PortInfo]>,
    /// The port that takes what this host itself should receive.
    pub host_port: Option<PortIndex>,
    /// The port that takes outer packets without a route.
    pub socket_port: Option<PortIndex>,
    /// ICMP errors to hosts behind tunnels, which go through the outbound stages.
    pub own: OutboundBatch,
    /// Packets that wait for a neighbour's link-layer address.
    pub parking: Parking,
    /// Packets on their way out.
    pub egress: Egress,
    /// Counters.
    pub cells: Arc<WorkerCells>,
    /// Drops by SA.
    pub sa_drops: SaDrops,
    /// To the main thread.
    pub outbox: Outbox,
    /// What other workers do for this one, and it for them.
    pub fan: Fan,
    /// Inboxes of all workers, by number.
    pub inboxes: Arc<[crate::handoff::Inbox]>,
    /// Seconds since the start of the datapath, read once a turn.
    pub now: u32,
    /// ICMP errors that may still be sent in this second.
    pub icmp_tokens: u32,
    /// `Acquire` events that may still be raised in this second.
    pub acquire_tokens: u32,
}

/// ICMP errors that a worker sends in a second (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4 (f)).
pub const ICMP_PER_SECOND: u32 = 1000;
/// `Acquire` events that a worker raises in a second: anyone inside can cause one with any packet.
pub const ACQUIRES_PER_SECOND: u32 = 1000;

impl Core {
    /// Gives a dropped frame back and counts why.
    pub fn discard(&mut self, frame: Frame, port: PortIndex, reason: DropReason) {
        self.count(port, reason);
        self.pool.give(frame);
    }

    /// Counts a drop on the port where the frame came in.
    pub fn count(&self, port: PortIndex, reason: DropReason) {
        self.cells.count_drop(port, reason);
    }

    /// The same, and on the SA.
    pub fn discard_of_sa(
        &mut self,
        frame: Frame,
        port: PortIndex,
        reason: DropReason,
        table: Table,
        index: u32,
    ) {
        self.sa_drops.add(table, index, reason);
        self.discard(frame, port, reason);
    }

    /// Sends something to the main thread. Objects are never lost: events leave half of the outbox to them, which is
    /// more than all that can be under way (see [`crate::worker::OUTBOX`]).
    pub fn send(&self, returned: Returned) {
        if self.outbox.queue.push((self.id, returned)).is_err() {
            self.cells.lost_events.add(1);
        }
        self.outbox.bell.ring();
    }

    /// Raises an event, or counts it as lost when the main thread does not keep up.
    pub fn event(&self, event: Event) {
        if self.outbox.queue.len() < self.outbox.queue.capacity() / 2 {
            self.send(Returned::Event(event));
        } else {
            self.cells.lost_events.add(1);
        }
    }

    /// Tells that a policy wants an SA, but not for every packet that waits for it.
    pub fn acquire(&mut self, event: Event) {
        if self.acquire_tokens > 0 {
            self.acquire_tokens -= 1;
            self.event(event);
        } else {
            self.cells.lost_events.add(1);
        }
    }

    /// Hands a frame to another worker.
    pub fn hand_off(&mut self, to: u8, port: PortIndex, parcel: Parcel) {
        if let Err((parcel, reason)) = hand_off(&self.cells, &self.inboxes, to, parcel) {
            self.discard(parcel.into_frame(), port, reason);
        }
    }

    /// Whether one more ICMP error may be sent in this second.
    pub fn icmp_allowed(&mut self) -> bool {
        let allowed = self.icmp_tokens > 0;
        self.icmp_tokens = self.icmp_tokens.saturating_sub(1);
        allowed
    }
}

/// Hands a parcel to worker `to`. Gives it back, and the reason, if there is no room or no such worker.
pub fn hand_off(
    cells: &WorkerCells,
    inboxes: &[crate::handoff::Inbox],
    to: u8,
    parcel: Parcel,
) -> Result<(), (Parcel, DropReason)> {
    let Some(inbox) = inboxes.get(usize::from(to)) else { return Err((parcel, DropReason::SaMissing)) };
    inbox.push(parcel).map_err(|parcel| (parcel, DropReason::HandoffFull))?;
    cells.handed_off.add(1);
    Ok(())
}
