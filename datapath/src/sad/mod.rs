//! The security association database: a configuration half shared with the main thread, a runtime half owned by one
//! worker (DESIGN decision 3), and the table that leads from an SPI to both.

pub mod config;
pub mod lifetime;
pub mod lookup;
pub mod replay;
pub mod runtime;
pub mod slab;
