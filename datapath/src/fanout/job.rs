//! A job: packets that any worker may do, and how they are done.
//!
//! Here is all that touches the packets of a job between the owner's laying it out and its coming back.

use std::sync::Arc;

use arrayvec::ArrayVec;
use postern_wire::ether;

use crate::command::Table;
use crate::core::Core;
use crate::crypto::{Engine, OpenOp, Outcome, Reserved, SealOp, SealOutcome};
use crate::fib::{CachedFib, PortIndex, Resolver, Route};
use crate::frame::{Arena, BATCH, Frame};
use crate::header;
use crate::inbound::{self, Arrival};
use crate::outbound;
use crate::prefetch;
use crate::sad::config::{SaKey, SaShared};
use crate::sad::runtime::{Expected, Template};

/// Packets of one job: as many as an outbound batch can grow to.
pub const PACKETS: usize = 2 * BATCH;
/// Bytes of the longest packet that is asked for as a whole before it is sealed or opened; of others, those at the front and
/// those at the back.
const WHOLE: usize = 640;
const FRONT: usize = 192;
const BACK: usize = 32;

/// Packets that are to be sealed or opened, by any worker.
pub struct Job {
    pub(super) owner: u8,
    pub(super) ticket: u64,
    /// Whose the packets are.
    pub(crate) runs: ArrayVec<Run, PACKETS>,
    /// To be sealed.
    pub(crate) outbound: ArrayVec<Outgoing, PACKETS>,
    /// To be opened.
    pub(crate) inbound: ArrayVec<Incoming, BATCH>,
    /// Usual packets.
    pub(super) usual: Usual,
}

/// Usual packets of a job, in columns by who writes and who reads them: what the owner will read again stays in its cache
/// meanwhile, and few lines come back. The helper does all that has no order, headers too, so that the owner never touches
/// what the helper wrote in a packet.
#[derive(Default)]
pub(super) struct Usual {
    /// To be given headers and sealed.
    pub(super) plain: ArrayVec<Plain, BATCH>,
    /// Their numbers, until they are sealed.
    pub(super) numbers: ArrayVec<Reserved, BATCH>,
    /// What the helper says of them.
    pub(super) ends: ArrayVec<SealOutcome, BATCH>,
    /// To be opened and taken out of their ESP.
    pub(super) sealed: ArrayVec<Sealed, BATCH>,
    /// What their headers say; for the owner alone.
    pub(super) heads: ArrayVec<inbound::quick::Head, BATCH>,
    /// What the helper says of them.
    pub(super) opened: ArrayVec<Opened, BATCH>,
}

/// A usual packet that has a number and the room for its headers. Its frame notes where it came in.
pub(super) struct Plain {
    pub(super) frame: Frame,
    pub(super) shape: outbound::quick::Shape,
    pub(super) run: u8,
}

/// A usual packet that the window would take now. Its frame notes where it came in.
pub(super) struct Sealed {
    pub(super) frame: Frame,
    /// Its full number.
    pub(super) sequence: u64,
    /// Offset of the ESP header.
    pub(super) at: u8,
    /// The outer TOS.
    pub(super) tos: u8,
    pub(super) run: u8,
}

/// What became of a [`Sealed`].
#[derive(Clone, Copy)]
pub(super) enum Opened {
    /// It is ready to be sent.
    Bare(inbound::quick::Bare),
    /// It is opened, and no usual one.
    Unusual,
    BadIcv,
    BadLength,
}

const _: () = assert!(size_of::<Plain>() == 24 && size_of::<Sealed>() == 32 && size_of::<Opened>() <= 10);

/// An SA of a job's packets.
pub struct Run {
    pub(super) table: Table,
    pub(super) sa: u32,
    pub(super) config: Arc<SaShared>,
    pub(super) way: Way,
    pub(super) packets: u32,
}

/// What becomes of the packets of an SA.
#[derive(Clone, Copy)]
pub(super) enum Way {
    /// Outbound packets, usual or not, have their headers, and go there.
    Route(Route),
    /// Usual packets get these headers, and leave through the port.
    Write(Template, [u8; ether::LEN], PortIndex),
    /// Usual packets are held against that.
    Strip(Expected),
}

/// A packet to be sealed: headers, plaintext and trailer are there.
pub struct Outgoing {
    /// The packet, from its IP header, or its link header if there is one.
    pub frame: Frame,
    /// Where it came in.
    pub from: PortIndex,
    /// Offset of the ESP header.
    pub at: u16,
    /// Its number, until it is sealed.
    pub number: Option<Reserved>,
    pub(super) run: u8,
    outcome: SealOutcome,
}

/// A packet to be opened.
pub struct Incoming {
    /// The packet, from its IP header.
    pub frame: Frame,
    /// What its headers say.
    pub arrival: Arrival,
    /// Its full number.
    pub sequence: u64,
    pub(super) run: u8,
    outcome: Outcome,
}

impl Outgoing {
    /// A packet that the owner has made ready.
    pub fn new(frame: Frame, from: PortIndex, at: u16, number: Option<Reserved>) -> Self {
        Self { frame, from, at, number, run: 0, outcome: SealOutcome::BadLength }
    }

    pub(crate) fn run(&self) -> u8 {
        self.run
    }

    /// Whether it may be sent.
    pub fn is_sealed(&self) -> bool {
        self.outcome == SealOutcome::Sealed
    }
}

impl Incoming {
    /// A packet that the window would take now.
    pub(crate) fn new(frame: Frame, arrival: Arrival, sequence: u64) -> Self {
        Self { frame, arrival, sequence, run: 0, outcome: Outcome::Pending }
    }

    pub(crate) fn run(&self) -> u8 {
        self.run
    }

    /// What opening it came to.
    pub fn outcome(&self) -> Outcome {
        self.outcome
    }
}

/// What a job tells of the SA of one of its packets, once it is back.
pub struct Place {
    /// Index of the SA; `None` when it is gone.
    pub sa: Option<u32>,
    /// Where outbound packets go.
    pub route: Route,
}

impl Job {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            owner: 0,
            ticket: 0,
            runs: ArrayVec::new(),
            outbound: ArrayVec::new(),
            inbound: ArrayVec::new(),
            usual: Usual::default(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.outbound.len() + self.inbound.len() + self.usual.plain.len() + self.usual.sealed.len()
    }

    /// The run of the SA; neighbours of one SA share one. `None` when there is no room for another.
    #[inline]
    pub(super) fn run(
        &mut self,
        table: Table,
        sa: u32,
        config: &Arc<SaShared>,
        way: impl FnOnce() -> Way,
    ) -> Option<u8> {
        if self.runs.last().is_none_or(|last| last.sa != sa || last.table != table) {
            let run = Run { table, sa, config: Arc::clone(config), way: way(), packets: 0 };
            self.runs.try_push(run).ok()?;
        }
        u8::try_from(self.runs.len() - 1).ok()
    }

    /// Counts the packets of each run.
    pub(super) fn count(&mut self) {
        let all = self.len();
        let Self { runs, outbound, inbound, usual: Usual { plain, sealed, .. }, .. } = self;
        if let [run] = runs.as_mut_slice() {
            run.packets = u32::try_from(all).unwrap_or(u32::MAX);
            return;
        }
        let of_outbound = outbound.iter().map(|packet| packet.run);
        let of_inbound = inbound.iter().map(|packet| packet.run);
        let of_usual = plain.iter().map(|packet| packet.run).chain(sealed.iter().map(|packet| packet.run));
        for run in of_outbound.chain(of_inbound).chain(of_usual) {
            if let Some(run) = runs.get_mut(usize::from(run)) {
                run.packets += 1;
            }
        }
    }

    /// Seals and opens.
    pub fn work(&mut self, tools: Tools<'_>) {
        let Tools { arena, engine, fib, resolver, now } = tools;
        let Self { runs, outbound, inbound, usual, .. } = self;
        if !usual.plain.is_empty() {
            write_and_seal(arena, engine, runs, usual);
        }
        if !usual.sealed.is_empty() {
            open_and_strip(arena, engine, runs, usual, |bytes, at, tos, expected| {
                let (bare, exit) = inbound::quick::strip(bytes, at, tos, expected, fib)?;
                exit.tell(resolver, now);
                Some(bare)
            });
        }
        if !outbound.is_empty() {
            seal(arena, engine, runs, outbound);
        }
        if !inbound.is_empty() {
            open(arena, engine, runs, inbound);
        }
    }
}

/// What a job is done with, by whoever does it.
pub struct Tools<'a> {
    pub(super) arena: &'a Arena,
    pub(super) engine: &'a mut Engine,
    pub(super) fib: &'a mut CachedFib,
    pub(super) resolver: &'a mut Resolver,
    pub(super) now: u32,
}

impl<'a> Tools<'a> {
    /// A worker's, with an engine for the owner's keys.
    pub fn of(core: &'a mut Core, engine: &'a mut Engine) -> Self {
        let Core { arena, fib, resolver, now, .. } = core;
        Self { arena, engine, fib, resolver, now: *now }
    }
}

/// Where a packet that is back belongs.
pub(crate) fn place(runs: &[Run], core: &Core, run: u8) -> Place {
    let found = runs.get(usize::from(run));
    let sa = found.filter(|run| run.stands(core)).map(|run| run.sa);
    let route = match found.map(|run| run.way) {
        Some(Way::Route(route)) => route,
        _ => Route::Unreachable,
    };
    Place { sa, route }
}

impl Run {
    pub(super) fn current<'a>(&self, core: &'a Core) -> Option<&'a Arc<SaShared>> {
        match self.table {
            Table::Inbound => core.inbound.get(self.sa).map(|state| &state.config),
            Table::Outbound => core.outbound.get(self.sa).map(|state| &state.config),
        }
    }

    /// Whether the SA is still the one that the packets were given to: a slot, and an id, may be used again.
    fn stands(&self, core: &Core) -> bool {
        self.current(core).is_some_and(|now| {
            Arc::ptr_eq(now, &self.config)
                || now.id == self.config.id && now.key_check == self.config.key_check
        })
    }
}

/// Asks for a packet that will be written, from wherever it is.
#[inline]
fn warm(arena: &Arena, frame: &mut Frame) {
    let bytes = arena.bytes_mut(frame);
    if bytes.len() <= WHOLE {
        prefetch::to_write(bytes);
    } else if let Some((front, rest)) = bytes.split_at_mut_checked(FRONT) {
        // What is between, the processor fetches ahead by itself.
        prefetch::to_write(front);
        let back = rest.len().saturating_sub(BACK);
        prefetch::to_write(rest.get_mut(back..).unwrap_or_default());
    }
}

/// Gives usual packets headers and seals them.
fn write_and_seal(arena: &Arena, engine: &mut Engine, runs: &[Run], usual: &mut Usual) {
    let Usual { plain, numbers, ends, .. } = usual;
    prefetch::list(plain);
    prefetch::list(numbers);
    for Plain { frame, .. } in plain.iter_mut() {
        warm(arena, frame);
    }
    let mut sealing = engine.sealing();
    for (Plain { frame, shape, run }, sequence) in plain.iter_mut().zip(numbers.drain(..)) {
        let run = runs.get(usize::from(*run));
        let Some((Way::Write(template, link, _), SaKey::Esp(key))) =
            run.map(|run| (&run.way, &run.config.key))
        else {
            // Not reached: `put_plain` saw to it. What has no outcome is not sent.
            break;
        };
        let bytes = arena.bytes_mut(frame);
        outbound::quick::write(template, &template.stencil(), link, *shape, &sequence, bytes);
        let packet = bytes.get_mut(ether::LEN + usize::from(template.at())..).unwrap_or_default();
        sealing.push(SealOp { key: key.into(), sequence, esn: template.is.esn(), packet });
    }
    *ends = sealing.finish();
}

/// Opens usual packets and makes them ready to be sent.
fn open_and_strip(
    arena: &Arena,
    engine: &mut Engine,
    runs: &[Run],
    usual: &mut Usual,
    mut strip: impl FnMut(&mut [u8], u8, u8, &Expected) -> Option<inbound::quick::Bare>,
) {
    let Usual { sealed, opened, .. } = usual;
    let expected = |run: u8| match runs.get(usize::from(run)).map(|run| &run.way) {
        Some(Way::Strip(expected)) => Some(expected),
        _ => None,
    };
    prefetch::list(sealed);
    for Sealed { frame, .. } in sealed.iter_mut() {
        warm(arena, frame);
    }
    let mut opening = engine.opening::<BATCH>();
    for Sealed { frame, sequence, at, run, .. } in sealed.iter_mut() {
        let found = runs.get(usize::from(*run)).map(|run| &run.config.key);
        let Some((SaKey::Esp(key), expected)) = found.zip(expected(*run)) else {
            // Not reached: `put_sealed` saw to it. What has no outcome goes no further.
            break;
        };
        let packet = arena.bytes_mut(frame).get_mut(usize::from(*at)..).unwrap_or_default();
        let (sequence, esn, outcome) = (*sequence, expected.is.esn(), Outcome::Pending);
        opening.push(OpenOp { key: key.into(), sequence, esn, packet, outcome });
    }
    let outcomes = opening.finish();
    drop(opening);
    opened.clear();
    for (Sealed { frame, at, tos, run, .. }, outcome) in sealed.iter_mut().zip(outcomes) {
        opened.push(match outcome {
            Outcome::Opened => {
                // The frame is left as it is: the owner has it in its cache.
                let bare =
                    expected(*run).and_then(|expected| strip(arena.bytes_mut(frame), *at, *tos, expected));
                bare.map_or(Opened::Unusual, Opened::Bare)
            }
            Outcome::BadLength => Opened::BadLength,
            Outcome::BadIcv | Outcome::Pending => Opened::BadIcv,
        });
    }
}

fn seal(arena: &Arena, engine: &mut Engine, runs: &[Run], packets: &mut [Outgoing]) {
    let mut ops = ArrayVec::<SealOp<'_>, PACKETS>::new();
    // Which of the packets are in `ops`; as a rule all.
    let mut asked = ArrayVec::<bool, PACKETS>::new();
    for Outgoing { frame, at, number, run, .. } in packets.iter_mut() {
        let config = runs.get(usize::from(*run)).map(|run| &run.config);
        let key = config.and_then(|config| match &config.key {
            SaKey::Esp(key) => Some((key, config.esn)),
            SaKey::Ah(_) => None,
        });
        let op = key.zip(number.take());
        asked.push(op.is_some());
        if let Some(((key, esn), sequence)) = op {
            let packet = arena.bytes_mut(frame).get_mut(usize::from(*at)..).unwrap_or_default();
            ops.push(SealOp { key: key.into(), sequence, esn, packet });
        }
    }
    let mut outcomes = engine.seal(ops).into_iter();
    for (packet, _) in packets.iter_mut().zip(asked).filter(|(_, asked)| *asked) {
        packet.outcome = outcomes.next().unwrap_or(SealOutcome::BadLength);
    }
}

fn open(arena: &Arena, engine: &mut Engine, runs: &[Run], packets: &mut [Incoming]) {
    let mut ops = ArrayVec::<OpenOp<'_>, BATCH>::new();
    let mut asked = ArrayVec::<bool, BATCH>::new();
    for Incoming { frame, arrival, sequence, run, .. } in packets.iter_mut() {
        let config = runs.get(usize::from(*run)).map(|run| &*run.config);
        let Some((config, SaKey::Esp(key))) = config.map(|config| (config, &config.key)) else {
            asked.push(false);
            continue;
        };
        let packet = arena.bytes_mut(frame).get_mut(usize::from(arrival.transport)..).unwrap_or_default();
        if config.spi.is_translated() {
            header::put(packet, 0, config.spi.authenticated.0.to_be_bytes());
        }
        asked.push(true);
        ops.push(OpenOp {
            key: key.into(),
            sequence: *sequence,
            esn: config.esn,
            packet,
            outcome: Outcome::Pending,
        });
    }
    engine.open(&mut ops);
    let outcomes: ArrayVec<Outcome, BATCH> = ops.iter().map(|op| op.outcome).collect();
    drop(ops);
    let mut outcomes = outcomes.into_iter();
    for (packet, _) in packets.iter_mut().zip(asked).filter(|(_, asked)| *asked) {
        packet.outcome = outcomes.next().unwrap_or(Outcome::Pending);
    }
}
