//! What both sides of phase 1 have in common (RFC 2409 section 5): vendor IDs, encrypted messages, proofs of identity.

use std::sync::Arc;

use super::cipher::{Iv, first_iv};
use super::delete::{DeleteContext, delete_message};
use super::keys::{Exchanged, Keys};
use super::message::parse::{self, Chain};
use super::message::{Exchange, Head, Id, Kind, Notify, NotifyKind, Payload, Payloads, emit};
use super::proposal::{Method, Phase1};
use super::{Abilities, Arrived, Common, fragments};
use crate::Secret;
use crate::auth::certificate::Presented;
use crate::auth::identity::Identity;
use crate::config::{Connection, LocalAuth, RemoteAuth, V1, Xauth};
use crate::endpoint::{Core, Now};
use crate::job::Job;
use crate::message::registry::{CertEncoding, IdType, ProtocolId};
use crate::message::{IdData, IkeSpi};
use crate::report::Failure;
use crate::v2::channel::Datagrams;

/// Length of the nonces.
pub(super) const NONCE: usize = 32;

/// RFC 3947: "RFC 3947".
const NAT_T: [u8; 16] =
    [0x4a, 0x13, 0x1c, 0x81, 0x07, 0x03, 0x58, 0x45, 0x5c, 0x57, 0x28, 0xf2, 0x0e, 0x95, 0x45, 0x2f];
/// RFC 3706, whose last two bytes are a version.
const DPD: [u8; 16] =
    [0xaf, 0xca, 0xd7, 0x13, 0x68, 0xa1, 0xf1, 0xc9, 0x6b, 0x86, 0x96, 0xfc, 0x77, 0x57, 0x01, 0x00];
/// draft-beaulieu-ike-xauth.
const XAUTH: [u8; 8] = [0x09, 0x00, 0x26, 0x89, 0xdf, 0xd6, 0xb7, 0x12];

/// What this side says that it can.
pub(super) fn vendor_ids(xauth: bool) -> Vec<Payload> {
    let mut all: Vec<_> =
        [&NAT_T[..], &DPD, &fragments::VENDOR_ID].map(|id| Payload::VendorId(id.to_vec())).into();
    if xauth {
        all.push(Payload::VendorId(XAUTH.to_vec()));
    }
    all
}

/// What the peer says that it can.
pub(super) fn abilities(payloads: Payloads<'_>) -> Abilities {
    let dpd = DPD.first_chunk::<14>().is_some_and(|id| payloads.has_vendor(id));
    let common = fragments::VENDOR_ID.get(..fragments::VENDOR_ID_COMMON);
    let fragments = common.is_some_and(|id| payloads.has_vendor(id));
    Abilities { dpd, nat_t: payloads.has_vendor(&NAT_T), fragments }
}

/// How a connection authenticates in phase 1; `None` if IKEv1 cannot.
pub(super) fn method(connection: &Connection) -> Option<Method> {
    let base = match (&connection.local_auth, &connection.remote_auth) {
        (LocalAuth::Psk(_), RemoteAuth::Psk(_)) => Method::PSK,
        (LocalAuth::Certificate { .. }, RemoteAuth::Certificate(_)) => Method::RSA,
        _ => return None,
    };
    let V1 { xauth, .. } = connection.v1.as_ref()?;
    Some(if matches!(xauth, Xauth::None) { base } else { base.with_xauth() })
}

/// CERTREQ payloads for the CAs that are trusted.
pub(super) fn certificate_requests(connection: &Connection) -> Vec<Payload> {
    let RemoteAuth::Certificate(trust) = &connection.remote_auth else { return Vec::new() };
    let encoding = CertEncoding::X509_SIGNATURE;
    trust.subjects().into_iter().take(8).map(|authority| Payload::CertReq { encoding, authority }).collect()
}

/// Phase 1 with its keys: from here on messages are encrypted.
pub(super) struct Keyed {
    pub(super) suite: Phase1,
    pub(super) keys: Keys,
    pub(super) with: Exchanged,
    /// Of the next message.
    pub(super) iv: Iv,
}

impl Keyed {
    /// `psk`: none with signatures.
    pub(super) fn new(suite: Phase1, psk: Option<&Secret>, with: Exchanged) -> Option<Self> {
        let keys = Keys::derive(suite.hash, suite.key_bits, psk, &with)?;
        let iv = first_iv(suite.hash, &with.public.0, &with.public.1);
        Some(Self { suite, keys, with, iv })
    }

    /// An encrypted message of phase 1.
    pub(super) fn seal(&mut self, exchange: Exchange, payloads: &[Payload]) -> Option<Vec<u8>> {
        let mut text = Vec::new();
        let first = emit::chain(payloads, &mut text);
        let (sealed, next) = self.keys.cipher.encrypt(self.iv, text)?;
        self.iv = next;
        let (cookie_i, cookie_r) = self.with.cookies;
        let head = Head { cookie_i, cookie_r, exchange, encrypted: true, message_id: 0 };
        Some(emit::with_body(&head, first, &sealed))
    }

    /// The payloads of an encrypted message, and the IV after it, which counts once it is authenticated.
    pub(super) fn open(&self, arrived: &Arrived<'_>) -> Option<(Chain, Iv)> {
        let (text, next) = self.keys.cipher.decrypt(self.iv, arrived.body)?;
        Some((parse::chain(arrived.first, &text).ok()?, next))
    }

    /// HASH_I or HASH_R over an identity.
    pub(super) fn proof(&self, of_initiator: bool, id: &Id) -> Secret {
        self.keys.proof(of_initiator, &self.with, &emit::id_body(id))
    }
}

/// An identity as a payload of phase 1.
pub(super) fn id_payload(identity: &Identity) -> Id {
    let IdData { kind, data } = identity.to_data();
    Id { kind: kind.0, protocol: 0, port: 0, data }
}

/// The identity in a payload of phase 1.
pub(super) fn identity(id: &Id) -> Identity {
    Identity::from_data(&IdData { kind: IdType(id.kind), data: id.data.clone() })
}

/// This side's identity, certificates and proof. `None`: the proof is being signed.
pub(super) fn prove(
    common: &Common,
    core: &mut Core,
    keyed: &Keyed,
    connection: &Connection,
) -> Result<Option<Payload>, Failure> {
    let hash = keyed.proof(common.initiator, &id_payload(&connection.local_id));
    match &connection.local_auth {
        LocalAuth::Psk(_) => Ok(Some(Payload::Hash(hash.expose().to_vec()))),
        LocalAuth::Certificate { key, .. } => {
            core.compute(common.id, Job::SignV1 { key: Arc::clone(key), hash: hash.expose().to_vec() });
            Ok(None)
        }
        LocalAuth::EapMschapv2 { .. } => Err(Failure::Signing("IKEv1 has no EAP".to_owned())),
    }
}

/// The payloads around the proof.
pub(super) fn identified(connection: &Connection, proof: Payload) -> Vec<Payload> {
    let mut payloads = vec![Payload::Id(id_payload(&connection.local_id))];
    if let LocalAuth::Certificate { chain, .. } = &connection.local_auth {
        let encoding = CertEncoding::X509_SIGNATURE;
        payloads.extend(chain.iter().map(|data| Payload::Cert { encoding, data: data.clone() }));
    }
    payloads.push(proof);
    payloads
}

/// INITIAL_CONTACT about an IKE SA (RFC 2407 section 4.6.3.3).
pub(super) fn initial_contact((cookie_i, cookie_r): (IkeSpi, IkeSpi)) -> Payload {
    Payload::Notify(Notify {
        protocol: ProtocolId::IKE,
        spi: [cookie_i.0.to_be_bytes(), cookie_r.0.to_be_bytes()].concat(),
        kind: NotifyKind::INITIAL_CONTACT,
        data: Vec::new(),
    })
}

/// What came of looking at the peer's proof.
pub(super) enum Judged {
    /// It is the one it says.
    Good(Identity),
    /// Its signature is being checked.
    Checking(Identity),
}

/// Judges the peer's identity and proof against a connection.
pub(super) fn judge(
    common: &Common,
    core: &mut Core,
    now: Now,
    keyed: &Keyed,
    connection: &Connection,
    payloads: Payloads<'_>,
) -> Result<Judged, Failure> {
    let id = payloads.id().ok_or(Failure::V1Protocol("phase 1", "has no identity"))?;
    let remote_id = identity(id);
    if !connection.remote_id.matches(&remote_id) {
        let expected = connection.remote_id.to_string();
        return Err(Failure::Identity { found: remote_id.to_string(), expected });
    }
    let expected = keyed.proof(!common.initiator, id);
    match &connection.remote_auth {
        RemoteAuth::Psk(_) => match payloads.hash() {
            Some(hash) if expected == Secret::new(hash.as_slice()) => Ok(Judged::Good(remote_id)),
            _ => Err(Failure::SharedSecret(remote_id.to_string())),
        },
        RemoteAuth::Certificate(trust) => {
            let signature = payloads.sig().ok_or(Failure::V1Protocol("phase 1", "has no signature"))?;
            let job = Job::VerifyV1 {
                trust: Arc::clone(trust),
                presented: presented(payloads),
                identity: remote_id.clone(),
                signature: signature.clone(),
                hash: expected.expose().to_vec(),
                at: now.wall,
            };
            core.compute(common.id, job);
            Ok(Judged::Checking(remote_id))
        }
        RemoteAuth::EapMschapv2(_) => Err(Failure::Signing("IKEv1 has no EAP".to_owned())),
    }
}

fn presented(payloads: Payloads<'_>) -> Presented {
    let mut presented = Presented::default();
    for payload in payloads.0 {
        if let Payload::Cert { encoding, data } = payload {
            presented.add(*encoding, data);
        }
    }
    presented
}

/// The peer, which believes in the IKE SA, is told that it is not to be.
pub(super) fn refuse(common: &Common, core: &mut Core, keyed: &Keyed) {
    let context = DeleteContext {
        cookies: keyed.with.cookies,
        skeyid_a: keyed.keys.skeyid_a.duplicate(),
        ka: keyed.keys.cipher.ka().duplicate(),
        last_block: keyed.iv,
        hash: keyed.keys.hash,
    };
    let id = core.random.u32().max(1);
    if let Ok(message) = delete_message(&context, id) {
        common.send(core, &Datagrams::from(vec![message]));
    }
}

/// A first message of the first payloads of an SA, in the clear.
pub(super) fn clear(common: &Common, exchange: Exchange, payloads: &[Payload]) -> Vec<u8> {
    let (cookie_i, cookie_r) = (common.cookie_i, common.cookie_r);
    emit::plain(&Head { cookie_i, cookie_r, exchange, encrypted: false, message_id: 0 }, payloads)
}

/// The payloads of a message that is not encrypted; the first has to be `first`.
pub(super) fn read_clear(arrived: &Arrived<'_>, exchange: Exchange, first: Kind) -> Option<Vec<Payload>> {
    let Head { encrypted, message_id, exchange: found, .. } = arrived.head;
    if encrypted || message_id != 0 || found != exchange || arrived.first != first {
        return None;
    }
    parse::chain(arrived.first, arrived.body).ok().map(|chain| chain.payloads)
}
