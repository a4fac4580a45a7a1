//! The datapath as control sees it: a program that may be running already, may die, and comes back empty.

pub mod client;
pub mod launch;
pub mod reconcile;
mod steps;
pub mod supervisor;
