//! postern-control.
fn main() {}
