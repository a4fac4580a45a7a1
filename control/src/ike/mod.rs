//! IKE in the daemon: the endpoint of the crate `postern-ike` runs as one task beside the datapath's supervisor and takes
//! its orders by [`api`].

pub mod api;
pub mod jobs;
pub mod sockets;
pub mod spis;
