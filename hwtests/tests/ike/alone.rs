//! The scenarios with strongSwan at both ends: what shows that they ask for nothing that cannot be had.

use anyhow::Result;
use postern_hwtests::peer::Version;
use postern_hwtests::stage::swan;

use crate::{hard, negotiate, rekey, roam};

/// Attempts at a scenario between two strongSwans.
const ATTEMPTS: usize = 3;

/// Passes when one of a few attempts does. That a scenario is fair is shown by one that succeeds; that it always
/// succeeds is asked of Postern alone. Two strongSwans that rekey a child at the same moment, as a move makes them do,
/// now and then end with one child each that the other one has not.
fn fair(mut scenario: impl FnMut() -> Result<()>) -> Result<()> {
    for attempt in 1..ATTEMPTS {
        match scenario() {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("attempt {attempt} of {ATTEMPTS}: {error:#}"),
        }
    }
    scenario()
}

/// Negotiation.
#[test]
fn alone_negotiates() -> Result<()> {
    fair(|| negotiate::all(&swan(Version::V5), &swan(Version::V6), true))
}

/// Rekeys by either side.
#[test]
fn alone_rekeys() -> Result<()> {
    fair(|| rekey::each_side(&swan(Version::V6), &swan(Version::V6)))
}

/// Rekeys by both.
#[test]
fn alone_rekeys_at_once() -> Result<()> {
    fair(|| rekey::both_sides(&swan(Version::V6), &swan(Version::V6)))
}

/// Rekeys by limits.
#[test]
fn alone_rekeys_by_limits() -> Result<()> {
    fair(|| rekey::by_limits(&swan(Version::V6), &swan(Version::V6)))
}

/// Fragments and cookies.
#[test]
fn alone_fragments_and_cookies() -> Result<()> {
    fair(|| negotiate::fragmented(&swan(Version::V5), &swan(Version::V6)))?;
    for version in Version::ALL {
        fair(|| negotiate::challenged(&swan(version), &negotiate::wary_swan(version)))?;
    }
    Ok(())
}

/// Road warriors.
#[test]
fn alone_road_warrior() -> Result<()> {
    fair(|| roam::road_warrior(&roam::swan_client(Version::V6), &swan(Version::V5)))
}

/// Moves.
#[test]
fn alone_moves() -> Result<()> {
    fair(|| roam::moves(&roam::swan_client(Version::V6), &swan(Version::V6)))
}

/// A bad network.
#[test]
fn alone_on_a_bad_network() -> Result<()> {
    fair(|| hard::impaired(&swan(Version::V5), &swan(Version::V6)))
}
