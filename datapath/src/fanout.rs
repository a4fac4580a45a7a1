//! One SA on several workers (DP-8).
//!
//! The worker that owns an SA does all that has an order: it draws numbers, moves the window, and sends. The rest has none:
//! sealing and opening, and of usual packets the headers as well, those of the tunnel and those of the link. So the owner
//! may lay batches of packets out as [`Job`]s on its [`Desk`]; any worker with nothing better to do takes one, does its
//! packets, and puts it back. Each job has a ticket, and the owner goes on with jobs in the order of their tickets, so
//! packets leave in the order of their numbers and are accepted in the order in which they came.
//!
//! What holds:
//! - An SA of which packets are out (it is *open*) gets no packet past them: all its packets go by tickets until the last
//!   one is back.
//! - The owner never waits. What nobody took it does itself, also when all others are busy, asleep or gone. A job that a
//!   worker took and does not bring back is passed over after [`PATIENCE`]; its packets go on when they come, out of order.
//!   While too many jobs are out the owner receives nothing, so that packets wait in the ring of the port.
//! - Boxes, rings and lists are made at the start. A ring has room for all boxes, so that nothing is lost in between.
//! - A job holds the configuration halves, so keys stay while it is out. When it is back, the SA must still be there with
//!   the same keys, or the packets are dropped as [`DropReason::SaGone`]. Halves that are used no more go to the main
//!   thread.
//! - Helpers expand keys of others in an engine of their own. When an SA that was open is gone, all of them wipe it (OPS-4).

mod job;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;
use postern_contract::counters::DropReason;

use self::job::{Opened, Plain, Sealed, Usual, Way};
use crate::command::{Returned, Table};
use crate::core::Core;
use crate::crypto::{Engine, Reserved, SealOutcome};
use crate::egress;
use crate::fib::{Exit, PortIndex, Route};
use crate::frame::{Arena, BATCH, Frame};
use crate::inbound::{self, InboundBatch};
use crate::outbound;
use crate::prefetch;
use crate::sad::config::{SaKey, SaShared};
use crate::sad::runtime::{Inbound, Outbound};

pub(crate) use self::job::place;
pub use self::job::{Incoming, Job, Outgoing, PACKETS, Place, Run, Tools};

/// How long the owner waits for a job that another worker took.
pub const PATIENCE: Duration = Duration::from_millis(100);
/// SAs that can be open at once; others stay with their owner meanwhile.
const OPEN: usize = 64;
/// Boxes that one turn at one port may need: inbound and outbound, usual packets and others, and ICMP errors.
const ROOM: usize = 5;
/// Full turns after which a worker has more than it can take, and others after which it has little to do.
const TREND: u32 = 32;
/// Packets of one SA in a batch that make it worth a job.
const ELEPHANT: usize = BATCH / 4;
/// Bytes of the stack that a batch may have stood on.
const BELOW: usize = 64 << 10;
/// No run has this number.
const NO_RUN: u16 = u16::MAX;
/// Bytes that inbound packets have on average, at least, where load decides: at 64 bytes handing them over now and then cost
/// more than it gained, at 512 it always gained. Usual outbound ones gain at every length.
pub const WORTH: usize = 256;
/// Packets with which the owner goes on in one turn before it looks at its ports again.
const BUDGET: usize = 4 * BATCH;
/// Jobs that a worker without packets of its own does for others in one turn.
const HELP: usize = 4;
/// Expanded keys of others' SAs.
const FOREIGN_KEYS: usize = 64;

/// Where one worker lays out its jobs and gets them back.
struct Desk {
    jobs: ArrayQueue<Box<Job>>,
    done: ArrayQueue<Box<Job>>,
    /// Its worker could do something for others.
    idle: CachePadded<AtomicBool>,
    /// Its worker has expanded keys of others.
    holds_keys: CachePadded<AtomicBool>,
}

/// The desks of all workers.
pub struct Exchange {
    desks: Box<[Desk]>,
    /// Grows when keys that helpers may have expanded are to be wiped.
    wipes: AtomicU64,
}

/// Boxes of a worker: enough for each of the others to have one, and some to wait for them.
fn boxes(workers: usize) -> usize {
    if workers > 1 { (4 * workers).clamp(16, 64) } else { 0 }
}

impl Exchange {
    /// For so many workers.
    pub fn new(workers: usize) -> Arc<Self> {
        let room = boxes(workers).max(1);
        let desk = || Desk {
            jobs: ArrayQueue::new(room),
            done: ArrayQueue::new(room),
            idle: CachePadded::new(AtomicBool::new(false)),
            holds_keys: CachePadded::new(AtomicBool::new(false)),
        };
        Arc::new(Self { desks: (0..workers).map(|_| desk()).collect(), wipes: AtomicU64::new(0) })
    }

    fn others(&self, id: u8) -> impl Iterator<Item = &Desk> {
        let id = usize::from(id);
        // Each begins with its neighbour, so that helpers spread.
        self.desks.iter().skip(id + 1).chain(self.desks.iter().take(id))
    }

    /// Takes the oldest job that nobody has begun, as a helper does.
    pub fn take_job(&self, owner: usize) -> Option<Box<Job>> {
        self.desks.get(owner)?.jobs.pop()
    }

    /// Gives it back to its owner, as a helper does. Packets of a job that was not done are dropped.
    pub fn put_back(&self, job: Box<Job>) {
        if let Some(desk) = self.desks.get(usize::from(job.owner)) {
            let _ = desk.done.push(job);
        }
    }
}

enum Slot {
    /// Not in use, or passed over.
    Empty,
    /// Since this time.
    Out(Duration),
    Back(Box<Job>),
}

/// A worker's part in all this.
pub struct Fan {
    id: u8,
    exchange: Arc<Exchange>,
    /// For others' packets; `None` with one worker.
    foreign: Option<Engine>,
    /// [`Exchange::wipes`] that were heeded.
    wiped: u64,
    free: Vec<Box<Job>>,
    filling: Option<Box<Job>>,
    /// By ticket, round and round.
    slots: Box<[Slot]>,
    /// The oldest ticket that is not done with, and the next one.
    head: u64,
    tail: u64,
    /// Open SAs, with the number of their packets that are out.
    open: ArrayVec<(Table, u32, u32), OPEN>,
    scratch: Option<Box<InboundBatch>>,
    now: Duration,
    budget: usize,
    /// Full turns (above zero) or others (below) in a row.
    trend: i64,
    /// This worker has more than it can take, and another one little to do.
    by_load: bool,
    /// There was an SA that always fans out.
    always: bool,
    /// There was an open SA.
    used: bool,
    /// Keys were forgotten, and may have left something on the stack.
    forgot: bool,
}

impl Fan {
    /// Of worker `id`; `foreign` is what it helps others with, if there are others.
    pub fn new(id: u8, exchange: Arc<Exchange>, foreign: Option<Engine>) -> Self {
        let count = if foreign.is_some() { boxes(exchange.desks.len()) } else { 0 };
        Self {
            id,
            wiped: 0,
            free: (0..count).map(|_| Job::new()).collect(),
            filling: None,
            slots: (0..count.max(1)).map(|_| Slot::Empty).collect(),
            head: 0,
            tail: 0,
            open: ArrayVec::new(),
            scratch: Some(Box::default()),
            now: Duration::ZERO,
            budget: BUDGET,
            trend: 0,
            by_load: false,
            always: false,
            used: false,
            forgot: false,
            exchange,
            foreign,
        }
    }

    /// Number of others' keys that stand expanded here.
    pub fn expanded(&self) -> usize {
        self.foreign.as_ref().map_or(0, Engine::expanded)
    }

    /// What helpers' engines have room for.
    pub const KEYS: usize = FOREIGN_KEYS;

    /// The desks.
    pub fn exchange(&self) -> &Arc<Exchange> {
        &self.exchange
    }

    /// Whether any packet might have to go out: if not, nothing more is asked.
    #[inline]
    pub fn wants(&self) -> bool {
        self.foreign.is_some() && (self.by_load || self.always || !self.open.is_empty())
    }

    /// Whether a turn finds room for the jobs that it may make.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.foreign.is_none() || self.free.len() >= ROOM
    }

    /// Packets of this SA are to be fanned out whatever the load.
    pub fn note(&mut self, config: &SaShared) {
        self.always |= config.always_fans_out();
    }

    fn is_open(&self, table: Table, sa: u32) -> bool {
        self.open.iter().any(|(t, s, _)| (*t, *s) == (table, sa))
    }

    /// The SA that most of a batch belongs to, if this worker has more than it can take and its packets have `worth` bytes
    /// on average.
    pub fn elephant(&self, packets: impl Iterator<Item = (u32, usize)> + Clone, worth: usize) -> Option<u32> {
        if !self.by_load {
            return None;
        }
        let all = packets.clone().count();
        let (first, _) = packets.clone().next()?;
        let lengths = packets.filter(|(sa, _)| *sa == first).map(|(_, len)| len);
        let (of_first, bytes) = lengths.fold((0, 0), |(count, bytes), len| (count + 1, bytes + len));
        (of_first >= ELEPHANT && 2 * of_first >= all && bytes >= worth * of_first).then_some(first)
    }

    /// Whether packets of this SA go to the desk now. `elephant`: the SA is one.
    pub fn takes(&self, table: Table, sa: u32, config: &SaShared, elephant: bool) -> bool {
        if self.is_open(table, sa) {
            // Also if it no longer may: nothing overtakes what is out. Of AH and bundles nothing ever is, so this is another
            // SA in the same slot.
            return matches!(config.key, SaKey::Esp(_)) && !config.is_bundled();
        }
        let wanted = config.always_fans_out() || elephant && config.may_fan_out();
        wanted && self.open.len() < OPEN
    }

    fn fill(&mut self) -> Option<&mut Job> {
        if self.filling.is_none() {
            self.filling = self.free.pop();
        }
        self.filling.as_deref_mut()
    }

    /// Adds a packet to the job that is being filled. Gives the frame back when there is no room.
    pub fn put_outbound(
        &mut self,
        mut packet: Outgoing,
        sa: u32,
        config: Option<&Arc<SaShared>>,
        route: Route,
    ) -> Result<(), Frame> {
        let run = config.zip(self.fill()).and_then(|(config, job)| {
            if job.outbound.is_full() {
                return None;
            }
            Some((job.run(Table::Outbound, sa, config, || Way::Route(route))?, job))
        });
        let Some((run, job)) = run else { return Err(packet.frame) };
        packet.run = run;
        job.outbound.push(packet);
        Ok(())
    }

    /// The same with a packet to be opened.
    pub fn put_inbound(
        &mut self,
        mut packet: Incoming,
        sa: u32,
        config: Option<&Arc<SaShared>>,
    ) -> Result<(), Frame> {
        let run = config.zip(self.fill()).and_then(|(config, job)| {
            if job.inbound.is_full() {
                return None;
            }
            Some((job.run(Table::Inbound, sa, config, || Way::Route(Route::Unreachable))?, job))
        });
        let Some((run, job)) = run else { return Err(packet.frame) };
        packet.run = run;
        job.inbound.push(packet);
        Ok(())
    }

    /// Takes the number of a usual packet that is to leave through `exit`, and tells the run; [`Self::put_plain`] takes
    /// the packets in the same order.
    #[inline]
    pub(crate) fn number_plain(&mut self, number: Reserved, sa: u32, state: &Outbound, exit: &Exit) -> u16 {
        let Some(job) = self.fill().filter(|job| !job.usual.numbers.is_full()) else { return NO_RUN };
        let way = || Way::Write(state.template, exit.link, exit.port);
        let Some(run) = job.run(Table::Outbound, sa, &state.config, way) else { return NO_RUN };
        if job.usual.numbers.is_empty() {
            prefetch::room_for(job.usual.plain.as_ptr(), BATCH);
            prefetch::room_for(job.usual.numbers.as_ptr(), BATCH);
        }
        job.usual.numbers.push(number);
        run.into()
    }

    /// Adds a usual packet to the job that is being filled. Gives the frame back when there was no room for its number.
    #[inline]
    pub(crate) fn put_plain(
        &mut self,
        frame: Frame,
        from: PortIndex,
        shape: outbound::quick::Shape,
        run: u16,
    ) -> Result<(), Frame> {
        let run = u8::try_from(run).ok();
        let (Some(run), Some(job)) = (run, &mut self.filling) else { return Err(frame) };
        job.usual.plain.push(Plain { frame, shape, run });
        if let Some(plain) = job.usual.plain.last_mut() {
            plain.frame.set_note(from.0.into());
        }
        Ok(())
    }

    /// The same with a usual packet to be opened.
    #[inline]
    pub(crate) fn put_sealed(
        &mut self,
        frame: Frame,
        from: PortIndex,
        head: inbound::quick::Head,
        sequence: u64,
        sa: u32,
        state: Option<&Inbound>,
    ) -> Result<(), Frame> {
        let filling = self.fill().filter(|job| !job.usual.sealed.is_full());
        let Some((job, state)) = filling.zip(state) else { return Err(frame) };
        let way = || Way::Strip(state.expected);
        let Some(run) = job.run(Table::Inbound, sa, &state.config, way) else { return Err(frame) };
        if job.usual.sealed.is_empty() {
            prefetch::room_for(job.usual.sealed.as_ptr(), BATCH);
        }
        job.usual.sealed.push(Sealed { frame, sequence, at: head.at, tos: head.tos, run });
        // In its place: see `egress::put_part`.
        if let Some(sealed) = job.usual.sealed.last_mut() {
            sealed.frame.set_note(from.0.into());
        }
        job.usual.heads.push(head);
        Ok(())
    }

    fn slot(&mut self, ticket: u64) -> Option<&mut Slot> {
        let count = self.slots.len() as u64;
        self.slots.get_mut(usize::try_from(ticket % count).ok()?)
    }

    fn desk(&self) -> Option<&Desk> {
        self.exchange.desks.get(usize::from(self.id))
    }

    fn opened(&mut self, run: &Run) {
        self.used = true;
        let known = self.open.iter_mut().find(|(table, sa, _)| (*table, *sa) == (run.table, run.sa));
        match known {
            Some((.., packets)) => *packets += run.packets,
            // `takes` saw to the room.
            None => drop(self.open.try_push((run.table, run.sa, run.packets))),
        }
    }

    fn closed(&mut self, run: &Run) {
        let place = self.open.iter().position(|(table, sa, _)| (*table, *sa) == (run.table, run.sa));
        if let Some(place) = place
            && let Some((.., packets)) = self.open.get_mut(place)
        {
            *packets = packets.saturating_sub(run.packets);
            if *packets == 0 {
                self.open.swap_remove(place);
            }
        }
    }

    /// Helpers that have little to do.
    fn idle_others(&self) -> usize {
        self.exchange.others(self.id).filter(|desk| desk.idle.load(Ordering::Relaxed)).count()
    }

    /// Keeps count of how busy this worker is. `full`: a port or the inbox had a whole batch.
    fn observe(&mut self, full: bool) {
        self.trend = match (full, self.trend) {
            (true, trend) => trend.max(0).saturating_add(1),
            (false, trend) => trend.min(0).saturating_sub(1),
        };
        let long = i64::from(TREND);
        if let Some(desk) = self.desk() {
            let idle = self.trend <= -long;
            if desk.idle.load(Ordering::Relaxed) != idle {
                desk.idle.store(idle, Ordering::Relaxed);
            }
        }
        self.by_load = self.trend >= long && self.idle_others() > 0;
    }

    /// Whether nothing is left to do here. Called once more after the worker lay down.
    pub fn may_sleep(&self) -> bool {
        self.foreign.is_none()
            || self.head == self.tail
                && self.desk().is_none_or(|desk| desk.done.is_empty())
                && self.exchange.others(self.id).all(|desk| desk.jobs.is_empty())
                && self.wiped == self.exchange.wipes.load(Ordering::SeqCst)
    }

    /// Whether jobs are out or wait to be gone on with.
    pub fn is_waiting(&self) -> bool {
        self.head != self.tail
    }

    /// A job is back.
    fn file(&mut self, job: Box<Job>) -> Option<Box<Job>> {
        if job.ticket < self.head {
            // It was passed over.
            return Some(job);
        }
        let ticket = job.ticket;
        if let Some(slot) = self.slot(ticket) {
            *slot = Slot::Back(job);
        }
        None
    }

    /// Takes the next job that is to be gone on with, or passes over one that was out for too long.
    fn next(&mut self) -> Option<Box<Job>> {
        let now = self.now;
        while self.head != self.tail {
            let slot = self.slot(self.head)?;
            match std::mem::replace(slot, Slot::Empty) {
                Slot::Back(job) => {
                    self.head += 1;
                    return Some(job);
                }
                Slot::Out(since) if now.saturating_sub(since) <= PATIENCE => {
                    *slot = Slot::Out(since);
                    return None;
                }
                Slot::Out(_) | Slot::Empty => self.head += 1,
            }
        }
        None
    }
}

/// Begins a turn: heeds wipes, and goes on with the jobs that are back.
pub fn begin(core: &mut Core, now: Duration) -> bool {
    if std::mem::take(&mut core.fan.forgot) {
        overwrite_stack();
    }
    if core.fan.foreign.is_none() {
        return false;
    }
    core.fan.now = now;
    core.fan.budget = BUDGET;
    let wipes = core.fan.exchange.wipes.load(Ordering::Acquire);
    if core.fan.wiped != wipes {
        core.fan.wiped = wipes;
        if let Some(engine) = &mut core.fan.foreign {
            engine.forget_all();
        }
        overwrite_stack();
        if let Some(desk) = core.fan.desk() {
            desk.holds_keys.store(false, Ordering::Relaxed);
        }
    }
    collect(core)
}

/// Goes on with the jobs that are back, in the order of their tickets.
fn collect(core: &mut Core) -> bool {
    let mut busy = false;
    while let Some(job) = core.fan.desk().and_then(|desk| desk.done.pop()) {
        busy = true;
        core.cells.fanned_out.add(job.len() as u64);
        if let Some(late) = core.fan.file(job) {
            complete(core, late);
        }
    }
    while core.fan.budget > 0 {
        let Some(job) = core.fan.next() else { break };
        busy = true;
        core.fan.budget = core.fan.budget.saturating_sub(job.len());
        complete(core, job);
    }
    busy
}

fn complete(core: &mut Core, mut job: Box<Job>) {
    fetch(&core.arena, &mut job);
    if !job.inbound.is_empty()
        && let Some(mut batch) = core.fan.scratch.take()
    {
        inbound::resume(core, &mut batch, &mut job);
        core.fan.scratch = Some(batch);
    }
    if !job.outbound.is_empty() {
        outbound::resume(core, &mut job);
    }
    send(core, &mut job);
    deliver(core, &mut job);
    for run in job.runs.drain(..) {
        core.fan.closed(&run);
        let same = run.current(core).is_some_and(|now| Arc::ptr_eq(now, &run.config));
        if !same {
            // Its keys were forgotten before this job was done: once more.
            forget(core, &run.config);
            core.send(Returned::Config(run.config));
        }
    }
    core.fan.free.push(job);
}

/// Sends the usual packets that were sealed.
fn send(core: &mut Core, job: &mut Job) {
    let Job { runs, usual: Usual { plain, ends, .. }, .. } = job;
    let mut last = None;
    for (index, Plain { frame, run, .. }) in plain.drain(..).enumerate() {
        let (sa, out) = match last {
            Some((same, sa, out)) if same == run => (sa, out),
            _ => {
                let out = match runs.get(usize::from(run)).map(|run| &run.way) {
                    Some(Way::Write(_, _, out)) => Some(*out),
                    _ => None,
                };
                (place(runs, core, run).sa, out)
            }
        };
        last = Some((run, sa, out));
        let from = origin(&frame);
        match (sa, out, ends.get(index)) {
            (Some(_), Some(out), Some(SealOutcome::Sealed)) => egress::enqueue(core, frame, from, out),
            (Some(sa), ..) => core.discard_of_sa(frame, from, DropReason::BadLength, Table::Outbound, sa),
            (None, ..) => core.discard(frame, from, DropReason::SaGone),
        }
    }
    ends.clear();
}

/// Where a usual packet came in.
fn origin(frame: &Frame) -> PortIndex {
    PortIndex(u16::try_from(frame.note()).unwrap_or(u16::MAX))
}

/// Accepts and delivers the usual packets that were opened.
fn deliver(core: &mut Core, job: &mut Job) {
    let Job { runs, usual: Usual { sealed, heads, opened, .. }, .. } = job;
    prefetch::list(opened);
    let mut last = None;
    for (index, Sealed { frame, sequence, run, .. }) in sealed.drain(..).enumerate() {
        let sa = match last {
            Some((same, sa)) if same == run => sa,
            _ => place(runs, core, run).sa,
        };
        last = Some((run, sa));
        let from = origin(&frame);
        let Some(sa) = sa else {
            core.discard(frame, from, DropReason::SaGone);
            continue;
        };
        let bare = match (heads.get(index), opened.get(index)) {
            (Some(head), Some(Opened::Bare(bare))) => Ok((head, Some(bare))),
            (Some(head), Some(Opened::Unusual)) => Ok((head, None)),
            (_, Some(Opened::BadLength)) => Err(DropReason::BadLength),
            _ => Err(DropReason::BadIcv),
        };
        match bare {
            Ok((head, bare)) => inbound::quick::resume(core, frame, head, sa, sequence, bare),
            Err(reason) => core.discard_of_sa(frame, from, reason, Table::Inbound, sa),
        }
    }
    heads.clear();
    opened.clear();
}

/// Gets the lines that will be read and written back from the helper's cache, of all packets at once. What will be written
/// is written now, as it is: reading alone would leave a copy over there, and each packet would wait for it to go.
fn fetch(arena: &Arena, job: &mut Job) {
    let own = |byte: &mut u8| *byte = black_box(*byte);
    for packet in &mut job.inbound {
        // Behind the headers of an AEAD's packet is the inner one.
        let inner = usize::from(packet.arrival.transport) + 16;
        let bytes = arena.bytes_mut(&mut packet.frame);
        // The last bytes before the ICV.
        let ends = [bytes.first(), bytes.get(bytes.len().saturating_sub(18))];
        ends.into_iter().flatten().for_each(prefetch::object);
        bytes.get_mut(inner).into_iter().for_each(own);
    }
    for packet in &mut job.outbound {
        arena.bytes_mut(&mut packet.frame).first_mut().into_iter().for_each(own);
    }
}

/// Lays out the job that was filled.
pub fn hand_out(core: &mut Core) {
    let Some(mut job) = core.fan.filling.take() else { return };
    job.count();
    let fan = &mut core.fan;
    (job.owner, job.ticket) = (fan.id, fan.tail);
    fan.tail += 1;
    for run in &job.runs {
        fan.opened(run);
    }
    let (ticket, now) = (job.ticket, fan.now);
    if let Some(slot) = fan.slot(ticket) {
        *slot = Slot::Out(now);
    }
    let pushed = fan.desk().map_or(Ok(()), |desk| desk.jobs.push(job));
    if let Err(job) = pushed {
        // Not reached: there is room for all boxes.
        return do_it(core, job);
    }
    let first = usize::from(core.id) + 1;
    let inboxes = core.inboxes.iter().skip(first).chain(core.inboxes.iter().take(first - 1));
    for inbox in inboxes {
        // One that was asleep is enough for one job.
        if inbox.bell().ring() {
            break;
        }
    }
}

/// The owner does one of its jobs itself.
fn do_it(core: &mut Core, mut job: Box<Job>) {
    let Core { arena, crypto: engine, fib, resolver, now, .. } = core;
    job.work(Tools { arena, engine, fib, resolver, now: *now });
    if let Some(late) = core.fan.file(job) {
        complete(core, late);
    }
}

/// Ends a turn: does its share of what lies on the desks. `full`: a port or the inbox had a whole batch; `received`: it had
/// anything.
pub fn share(core: &mut Core, full: bool, received: bool) -> bool {
    if core.fan.foreign.is_none() {
        return false;
    }
    core.fan.observe(full);
    if core.fan.is_waiting() {
        // So many may wait that no helper ever finds nothing. Without new packets there is nothing better to do.
        let wait = if received { 2 * core.fan.idle_others() } else { 0 };
        while let Some(job) = core.fan.desk().filter(|desk| desk.jobs.len() > wait).and_then(|d| d.jobs.pop())
        {
            do_it(core, job);
            if !received {
                break;
            }
        }
        collect(core);
    }
    let helped = !full && help(core, if received { 1 } else { HELP });
    helped || core.fan.is_waiting()
}

/// Does jobs of others.
fn help(core: &mut Core, most: usize) -> bool {
    let Core { fan, arena, inboxes, cells, fib, resolver, now, .. } = core;
    let Some(engine) = &mut fan.foreign else { return false };
    let mut done = 0;
    for desk in fan.exchange.others(fan.id) {
        while done < most
            && let Some(mut job) = desk.jobs.pop()
        {
            done += 1;
            job.work(Tools { arena, engine, fib, resolver, now: *now });
            cells.helped.add(job.len() as u64);
            if let Some(own) = fan.exchange.desks.get(usize::from(fan.id)) {
                // Only this worker writes it.
                if !own.holds_keys.load(Ordering::Relaxed) {
                    own.holds_keys.store(true, Ordering::SeqCst);
                }
            }
            let owner = usize::from(job.owner);
            // There is room for all boxes.
            let _ = desk.done.push(job);
            if let Some(inbox) = inboxes.get(owner) {
                inbox.bell().ring();
            }
        }
    }
    done > 0
}

/// Overwrites the stack below the turn: keys that are expanded for a batch are wiped where they end up, but not where they
/// were before they were moved there.
#[inline(never)]
#[expect(clippy::large_stack_arrays, reason = "the stack is what is meant")]
fn overwrite_stack() {
    black_box(&mut [0_u8; BELOW]);
}

/// OPS-4: the SA is gone, or its keys stand elsewhere now; nobody keeps them expanded.
pub fn forget(core: &mut Core, config: &SaShared) {
    core.fan.forgot = true;
    if let Some(serial) = config.key.serial() {
        core.crypto.forget(serial);
    }
    if core.fan.used {
        core.fan.exchange.wipes.fetch_add(1, Ordering::SeqCst);
        for (desk, inbox) in core.fan.exchange.desks.iter().zip(&*core.inboxes) {
            if desk.holds_keys.load(Ordering::SeqCst) {
                inbox.bell().ring();
            }
        }
    }
}

/// Ends the worker's service: gets its packets back, as far as others still turn.
pub fn leave(core: &mut Core) {
    for _ in 0..1 << 16 {
        core.fan.budget = BUDGET;
        if !share(core, false, false) {
            break;
        }
        std::hint::spin_loop();
    }
}

/// Of a frame for which there was no room.
pub const FULL: DropReason = DropReason::FanOutFull;
