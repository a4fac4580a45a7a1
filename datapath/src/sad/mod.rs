//! The security association database.

pub mod lifetime;
pub mod replay;
