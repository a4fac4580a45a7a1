//! What takes long, as a value that can be run anywhere: key exchanges, signatures, certificate paths.
//!
//! The endpoint gives out a [`Job`] with an id, anyone runs it, and the [`Done`] is handed back under the same id. An IKE
//! SA that waits for a job keeps what arrives meanwhile out (its peer retransmits); all others go on.

use std::sync::Arc;
use std::time::SystemTime;

use crate::auth::certificate::{CertificateError, PeerKey, Presented, Trust};
use crate::auth::signature::{Signature, SignatureError, SigningKey};
use crate::crypto::ke::{KeError, KeyExchange};
use crate::message::registry::{HashId, KeMethod};
use crate::{Random, Secret};

/// Names a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// Work to be done.
#[derive(Debug)]
pub enum Job {
    /// Make a key pair.
    Generate(KeMethod),
    /// As the one who answers: from the peer's public value the own one and the secret.
    Respond {
        /// Method.
        method: KeMethod,
        /// The peer's public value.
        public: Vec<u8>,
    },
    /// As the one who asked: the secret from the peer's answer.
    Agree {
        /// The key pair of [`Job::Generate`].
        own: KeyExchange,
        /// The peer's public value.
        public: Vec<u8>,
    },
    /// Sign.
    Sign {
        /// The key.
        key: Arc<SigningKey>,
        /// Hash algorithms that the peer takes (RFC 7427); empty if it did not say.
        hashes: Vec<HashId>,
        /// What is signed.
        octets: Vec<u8>,
    },
    /// Sign HASH_I or HASH_R of IKEv1 (RFC 2409 section 5.1).
    SignV1 {
        /// The key.
        key: Arc<SigningKey>,
        /// What is signed, as it is.
        hash: Vec<u8>,
    },
    /// Check the peer's certificates and its signature of IKEv1.
    VerifyV1 {
        /// What to trust.
        trust: Arc<Trust>,
        /// The certificates and CRLs that the peer sent.
        presented: Presented,
        /// The identity that it claims, which the certificate has to hold.
        identity: crate::auth::identity::Identity,
        /// Its signature.
        signature: Vec<u8>,
        /// What it signed.
        hash: Vec<u8>,
        /// When to judge validity.
        at: SystemTime,
    },
    /// Check the peer's certificates and its signature.
    Verify {
        /// What to trust.
        trust: Arc<Trust>,
        /// The certificates and CRLs that the peer sent.
        presented: Presented,
        /// The identity that it claims, which the certificate has to hold.
        identity: crate::auth::identity::Identity,
        /// Its signature.
        signature: Signature,
        /// What it signed.
        octets: Vec<u8>,
        /// When to judge validity.
        at: SystemTime,
    },
}

/// Its result.
#[derive(Debug)]
pub enum Done {
    /// Of [`Job::Generate`]: key pair and public value.
    Generated(Result<(KeyExchange, Vec<u8>), KeError>),
    /// Of [`Job::Respond`]: public value and secret.
    Responded(Result<(Vec<u8>, Secret), KeError>),
    /// Of [`Job::Agree`].
    Agreed(Result<Secret, KeError>),
    /// Of [`Job::Sign`].
    Signed(Result<Signature, SignatureError>),
    /// Of [`Job::Verify`].
    Verified(Result<PeerKey, CertificateError>),
}

impl Job {
    /// Does the work.
    pub fn run(self, random: &mut dyn Random) -> Done {
        match self {
            Self::Generate(method) => Done::Generated(KeyExchange::generate(method, random)),
            Self::Respond { method, public } => {
                Done::Responded(KeyExchange::respond(method, &public, random))
            }
            Self::Agree { own, public } => Done::Agreed(own.agree(&public)),
            Self::Sign { key, hashes, octets } => Done::Signed(key.sign(&hashes, &octets)),
            Self::SignV1 { key, hash } => Done::Signed(key.sign_hash(&hash)),
            Self::VerifyV1 { trust, presented, identity, signature, hash, at } => {
                Done::Verified(trust.verify_hash(&presented, &identity, &signature, &hash, at))
            }
            Self::Verify { trust, presented, identity, signature, octets, at } => {
                Done::Verified(trust.verify(&presented, &identity, &signature, &octets, at))
            }
        }
    }
}
