//! Postern's datapath: moves, protects and translates packets. Knows no IKE.

pub mod crypto;
pub mod fib;
pub mod frame;
pub mod port;
pub mod reserve;
pub mod sad;
pub mod spd;
pub mod steer;
