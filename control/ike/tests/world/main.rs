//! Endpoints in a simulated world (DESIGN decision 10): seeded loss, reordering, duplication and corruption, jobs and
//! installations that take their time, NATs, moves; all in virtual time, and the same for the same seed.
//!
//! A failing test names its seed; with `SEED=` that one and `TRACE=1` in the environment and `--nocapture`, everything that
//! happened is printed.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test program: what should not happen is to end it"
)]

mod failures;
mod impairment;
mod life;
mod mobility;
mod rekey;
mod reset;
mod restore;
mod sim;
mod sites;
mod tokens;
mod v1;
