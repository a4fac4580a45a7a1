//! Postern.

pub mod sad;
