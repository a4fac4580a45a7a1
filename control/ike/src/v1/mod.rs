//! IKEv1 (RFC 2407, 2408 and 2409) beside IKEv2: an IKE SA of version 1 in its states, and what it is built from.

pub mod cipher;
pub mod delete;
pub mod hash;
