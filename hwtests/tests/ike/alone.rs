//! The scenarios with strongSwan at both ends.

use anyhow::Result;
use postern_hwtests::peer::Version;
use postern_hwtests::stage::swan;

use crate::{hard, negotiate, rekey, roam};

/// Negotiation.
#[test]
fn alone_negotiates() -> Result<()> {
    negotiate::all(&swan(Version::V5), &swan(Version::V6), true)
}

/// Rekeys by either side.
#[test]
fn alone_rekeys() -> Result<()> {
    rekey::each_side(&swan(Version::V6), &swan(Version::V6))
}

/// Rekeys by both.
#[test]
fn alone_rekeys_at_once() -> Result<()> {
    rekey::both_sides(&swan(Version::V6), &swan(Version::V6))
}

/// Rekeys by limits.
#[test]
fn alone_rekeys_by_limits() -> Result<()> {
    rekey::by_limits(&swan(Version::V6), &swan(Version::V6))
}

/// Fragments and cookies.
#[test]
fn alone_fragments_and_cookies() -> Result<()> {
    negotiate::fragmented(&swan(Version::V5), &swan(Version::V6))?;
    for version in Version::ALL {
        negotiate::challenged(&swan(version), &negotiate::wary_swan(version))?;
    }
    Ok(())
}

/// Road warriors.
#[test]
fn alone_road_warrior() -> Result<()> {
    roam::road_warrior(&roam::swan_client(Version::V6), &swan(Version::V5))
}

/// Moves.
#[test]
fn alone_moves() -> Result<()> {
    roam::moves(&roam::swan_client(Version::V6), &swan(Version::V6))
}

/// A bad network.
#[test]
fn alone_on_a_bad_network() -> Result<()> {
    hard::impaired(&swan(Version::V5), &swan(Version::V6))
}
