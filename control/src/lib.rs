//! Postern's control process: configuration, reconciliation with the datapath, the management socket; and what the
//! `postern` command shares with it.
//!
//! ```text
//! file ─► config ─► desired ─► datapath::{supervisor, reconcile, client} ─► contract socket
//!                      ▲ state (ids' generations)        ▲ admin::server ─► management socket ◄─ postern
//! ```
#![forbid(unsafe_code)]

pub mod admin;
pub mod check;
pub mod config;
pub mod datapath;
pub mod desired;
mod digest;
pub mod ike;
pub mod metrics;
pub mod nvram;
pub mod recovery;
pub mod show;
pub mod state;
pub mod table;
