//! Postern.

pub mod sad;
pub mod spd;
