//! postern-datapath.
fn main() {}
