//! Who the peer is and how it shows it: identities (RFC 7296 section 3.5), certificates (RFC 4945), signatures
//! (RFC 7427) and EAP (RFC 3748).
//!
//! Shared keys need nothing of this: `crypto::keys` has the AUTH value of a secret.

pub mod certificate;
pub mod eap;
pub mod files;
#[doc(hidden)]
pub mod fuzz;
pub mod identity;
pub mod name;
pub mod own;
mod raw_rsa;
mod reason;
pub mod signature;
