//! A package of its own, so that the bench `packet` is built without what the others need; the soak, and the parts that all
//! benches here are made of.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    reason = "what measures says what it sees"
)]

pub mod parts;
pub mod soak;
