//! Postern's datapath: moves, protects and translates packets. Knows no IKE.
//!
//! The walk of a packet is [`worker::Worker::turn`]; the stages are in [`inbound`], [`outbound`], [`relay`] and
//! [`egress`]. Workers own their tables; the main thread changes them through [`publish`] by [`command`]s only.

pub mod appliance;
pub mod assembly;
pub mod command;
pub mod core;
pub mod counters;
pub mod crypto;
pub mod egress;
#[cfg(any(test, feature = "exercise"))]
pub mod exercise;
pub mod fanout;
pub mod fib;
pub mod flows;
pub mod forward;
pub mod frame;
pub mod handoff;
pub mod header;
pub mod inbound;
pub mod numa;
pub mod outbound;
pub mod port;
mod prefetch;
pub mod publish;
pub mod relay;
pub mod reserve;
pub mod sad;
pub mod selectors;
pub mod serve;
pub mod shortcut;
pub mod spd;
pub mod steer;
pub mod testbed;
pub mod worker;
