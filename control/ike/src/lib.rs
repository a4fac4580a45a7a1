//! IKE (RFC 7296) without I/O: no clock, no random source and no socket is in here; time, randomness and datagrams are
//! arguments, and what is to be done comes out as an ordered queue of outputs (DESIGN decision 10).
//!
//! ```text
//! datagram ─► Endpoint ─► SA by SPIs, else admission ─► Channel (window, fragments, open) ─► v2 (verify, then commit)
//!    timeouts, commands ──────────────────────────────────────────────────────────────────┘        │
//!                                        Output: Transmit, Compute, Install, Retire, Report ◄──────┘
//! ```
//!
//! What takes long (key exchange, signatures, certificate paths) is a job: a value that anyone can run on any
//! thread and whose result is handed back.
#![forbid(unsafe_code)]

pub mod admission;
pub mod auth;
pub mod config;
mod connections;
pub mod counters;
pub mod crypto;
pub mod endpoint;
#[cfg(any(test, feature = "exercise"))]
pub mod exercise;
pub mod ignored;
pub mod job;
pub mod message;
pub mod negotiate;
pub mod output;
pub mod pool;
mod pools;
pub mod qcd;
pub mod random;
pub mod record;
pub mod recovery;
pub mod report;
mod sa;
pub mod secret;
pub mod settings;
pub mod timers;
pub mod v1;
mod v2;

pub use endpoint::Endpoint;
pub use random::Random;
pub use secret::Secret;
