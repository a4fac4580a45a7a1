//! Keys of IKE SAs and of CHILD_SAs, and what AUTH payloads are computed from (RFC 7296 sections 2.14 to 2.18, RFC 9242,
//! RFC 9370).
//!
//! [`IkeKeys`] live as long as an IKE SA is being authenticated. After that only [`IkeKeys::derivation`] is needed, for
//! children and the next IKE SA, together with the [`Sealer`] and the [`Opener`] made of the rest.

use core::fmt;

use super::prf::Prf;
use super::sk::{Opener, Protection, Sealer};
use crate::Secret;
use crate::message::IkeSpi;
use crate::message::registry::{EncrId, IntegId, PrfId};
use crate::negotiate::{ChildSuite, IkeSuite};

/// What goes into the keys of an IKE SA beside secrets: the nonces of the exchange and the SPIs of the SA that it makes.
#[derive(Clone, Copy, Debug)]
pub struct Seed<'a> {
    /// The initiator's nonce, Ni.
    pub nonce_i: &'a [u8],
    /// The responder's nonce, Nr.
    pub nonce_r: &'a [u8],
    /// SPIi.
    pub spi_i: IkeSpi,
    /// SPIr.
    pub spi_r: IkeSpi,
}

/// SK_d with the pseudorandom function that goes with it: whatever is derived later.
pub struct Derivation {
    prf: Prf,
    sk_d: Secret,
}

/// The keys of an IKE SA.
#[derive(Debug)]
pub struct IkeKeys {
    /// SK_d.
    pub derivation: Derivation,
    /// Which of the keys below there are.
    pub protection: Protection,
    /// Integrity of what the initiator sends; empty with an AEAD, as is `sk_ar`.
    pub sk_ai: Secret,
    /// Integrity of what the responder sends.
    pub sk_ar: Secret,
    /// Encryption of what the initiator sends, with its salt.
    pub sk_ei: Secret,
    /// Encryption of what the responder sends, with its salt.
    pub sk_er: Secret,
    /// For the initiator's AUTH payload.
    pub sk_pi: Secret,
    /// For the responder's AUTH payload.
    pub sk_pr: Secret,
}

/// Keys of a CHILD_SA; "initiator" is who began the exchange that makes it.
#[derive(Debug)]
pub struct ChildKeys {
    /// Encryption (with its salt) and integrity of what the initiator sends.
    pub initiator: (Secret, Secret),
    /// Encryption and integrity of what the responder sends.
    pub responder: (Secret, Secret),
}

/// Length of the key of an encryption algorithm as prf+ gives it, with the salt of those that have one (RFC 4106 section
/// 8.1, RFC 7634 section 2, RFC 4543 section 5.2); `None` if there is no such algorithm or no such length.
pub fn encr_key_length(encr: EncrId, key_bits: u16) -> Option<usize> {
    let salt = match encr {
        EncrId::NONE | EncrId::NULL => return Some(0),
        EncrId::AES_CBC => 0,
        EncrId::AES_GCM_16 | EncrId::NULL_AUTH_AES_GMAC => 4,
        EncrId::CHACHA20_POLY1305 if key_bits == 256 => 4,
        _ => return None,
    };
    match key_bits {
        128 | 192 | 256 => Some(usize::from(key_bits / 8) + salt),
        _ => None,
    }
}

/// Length of the key of an integrity algorithm.
pub fn integ_key_length(integ: IntegId) -> Option<usize> {
    match integ {
        IntegId::NONE => Some(0),
        IntegId::HMAC_SHA1_96 => Some(20),
        IntegId::HMAC_SHA2_256_128 => Some(32),
        IntegId::HMAC_SHA2_384_192 => Some(48),
        IntegId::HMAC_SHA2_512_256 => Some(64),
        _ => None,
    }
}

impl IkeKeys {
    /// Keys after IKE_SA_INIT (section 2.14): "SKEYSEED = prf(Ni | Nr, g^ir)". `None` if the suite is not implemented.
    pub fn initial(suite: &IkeSuite, shared: &Secret, seed: &Seed<'_>) -> Option<Self> {
        let prf = Prf::new(suite.prf)?;
        let nonces = [seed.nonce_i, seed.nonce_r].concat();
        Self::expand(suite, &prf.compute(&nonces, &[shared.expose()]), seed)
    }

    /// "{SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr} = prf+ (SKEYSEED, Ni | Nr | SPIi | SPIr)"
    fn expand(suite: &IkeSuite, skeyseed: &Secret, seed: &Seed<'_>) -> Option<Self> {
        let prf = Prf::new(suite.prf)?;
        let protection = Protection::of(suite)?;
        let (encr, integ) = (protection.encr_length(), protection.integ_length());
        let (spi_i, spi_r) = (seed.spi_i.0.to_be_bytes(), seed.spi_r.0.to_be_bytes());
        let seed = [seed.nonce_i, seed.nonce_r, spi_i.as_slice(), spi_r.as_slice()];
        let all = prf.plus(skeyseed.expose(), &seed, 3 * prf.len() + 2 * (encr + integ));
        let mut cut = Cut(all.expose());
        Some(Self {
            derivation: Derivation { prf, sk_d: cut.next(prf.len())? },
            protection,
            sk_ai: cut.next(integ)?,
            sk_ar: cut.next(integ)?,
            sk_ei: cut.next(encr)?,
            sk_er: cut.next(encr)?,
            sk_pi: cut.next(prf.len())?,
            sk_pr: cut.next(prf.len())?,
        })
    }

    /// Protects what the original initiator (or else the responder) sends.
    pub fn sealer(&self, initiator: bool) -> Option<Sealer> {
        let (sk_e, sk_a) = self.direction(initiator);
        Sealer::new(self.protection, sk_e, sk_a)
    }

    /// Opens what the original initiator (or else the responder) sends.
    pub fn opener(&self, initiator: bool) -> Option<Opener> {
        let (sk_e, sk_a) = self.direction(initiator);
        Opener::new(self.protection, sk_e, sk_a)
    }

    fn direction(&self, initiator: bool) -> (&Secret, &Secret) {
        if initiator { (&self.sk_ei, &self.sk_ai) } else { (&self.sk_er, &self.sk_ar) }
    }
}

impl Derivation {
    /// From what was saved; `None` if there is no such function, or SK_d has not its length.
    pub fn from_saved(prf: PrfId, sk_d: &Secret) -> Option<Self> {
        let prf = Prf::new(prf).filter(|prf| prf.len() == sk_d.len())?;
        Some(Self { prf, sk_d: sk_d.duplicate() })
    }

    /// The pseudorandom function.
    pub fn prf(&self) -> Prf {
        self.prf
    }

    /// SK_d itself.
    pub fn sk_d(&self) -> &Secret {
        &self.sk_d
    }

    /// Keys of an IKE SA that replaces this one (section 2.18): "SKEYSEED = prf(SK_d (old), g^ir (new) | Ni | Nr)", by the
    /// pseudorandom function of the old IKE SA; RFC 9370 section 2.2.4 puts the secrets of additional key exchanges behind
    /// the nonces. `secrets` has g^ir first.
    pub fn rekey(&self, suite: &IkeSuite, secrets: &[&Secret], seed: &Seed<'_>) -> Option<IkeKeys> {
        let parts = secrets_and_nonces(secrets, seed.nonce_i, seed.nonce_r);
        IkeKeys::expand(suite, &self.prf.compute(self.sk_d.expose(), &parts), seed)
    }

    /// Keys after an IKE_INTERMEDIATE exchange with a key exchange in it (RFC 9370 section 2.2.2): "SKEYSEED(n) =
    /// prf(SK_d(n-1), SK(n) | Ni | Nr)".
    pub fn intermediate(&self, suite: &IkeSuite, secret: &Secret, seed: &Seed<'_>) -> Option<IkeKeys> {
        self.rekey(suite, &[secret], seed)
    }

    /// Keys of a CHILD_SA (section 2.17): "KEYMAT = prf+(SK_d, g^ir (new) | Ni | Nr)", `secrets` being empty if there was no
    /// key exchange; with more than one as in RFC 9370 section 2.2.4. `None` if the suite is not implemented.
    pub fn child(
        &self,
        suite: &ChildSuite,
        secrets: &[&Secret],
        nonce_i: &[u8],
        nonce_r: &[u8],
    ) -> Option<ChildKeys> {
        let encr = encr_key_length(suite.encr, suite.key_bits)?;
        let integ = integ_key_length(suite.integ)?;
        let seed = secrets_and_nonces(secrets, nonce_i, nonce_r);
        let all = self.prf.plus(self.sk_d.expose(), &seed, 2 * (encr + integ));
        let mut cut = Cut(all.expose());
        // "All keys for SAs carrying data from the initiator to the responder are taken before SAs going from the
        // responder to the initiator", and "the encryption key MUST be taken from the first octets of the KEYMAT and the
        // integrity key MUST be taken from the next octets".
        Some(ChildKeys {
            initiator: (cut.next(encr)?, cut.next(integ)?),
            responder: (cut.next(encr)?, cut.next(integ)?),
        })
    }
}

impl fmt::Debug for Derivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Derivation({:?}, ..)", self.prf)
    }
}

/// `SK(0) | Ni | Nr | SK(1) | … | SK(n)`.
fn secrets_and_nonces<'a>(secrets: &[&'a Secret], nonce_i: &'a [u8], nonce_r: &'a [u8]) -> Vec<&'a [u8]> {
    let mut secrets = secrets.iter().map(|secret| secret.expose());
    let mut parts: Vec<&[u8]> = secrets.next().into_iter().collect();
    parts.extend([nonce_i, nonce_r]);
    parts.extend(secrets);
    parts
}

/// Takes keys off the front of what prf+ gave.
struct Cut<'a>(&'a [u8]);

impl Cut<'_> {
    fn next(&mut self, length: usize) -> Option<Secret> {
        let (key, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(Secret::new(key))
    }
}

/// What an AUTH payload covers (section 2.15): "the first message (IKE_SA_INIT request or response)", the other side's nonce
/// and "prf(SK_pi, RestOfInitIDPayload)", and behind that IntAuth (RFC 9242 section 3.3.2), which is empty if there was no
/// IKE_INTERMEDIATE exchange.
pub fn signed_octets(
    prf: Prf,
    sk_p: &Secret,
    first_message: &[u8],
    peer_nonce: &[u8],
    id_body: &[u8],
    int_auth: &[u8],
) -> Vec<u8> {
    let maced_id = prf.compute(sk_p.expose(), &[id_body]);
    [first_message, peer_nonce, maced_id.expose(), int_auth].concat()
}

/// AUTH by a shared secret (section 2.15): "AUTH = prf( prf(Shared Secret, "Key Pad for IKEv2"), <SignedOctets>)". After EAP the
/// secret is the master session key, or SK_pi or SK_pr if the method has none (section 2.16).
pub fn psk_auth(prf: Prf, shared: &[u8], signed_octets: &[u8]) -> Secret {
    let key = prf.compute(shared, &[b"Key Pad for IKEv2"]);
    prf.compute(key.expose(), &[signed_octets])
}

/// One direction of IntAuth, after one more IKE_INTERMEDIATE message (RFC 9242 section 3.3.2): "IntAuth_iN = prf(SK_piN,
/// IntAuth_i(N-1) | IntAuth_iNA | IntAuth_iNP)". `previous` is empty for the first; `a` is the message from its header
/// through the generic header of the Encrypted payload with lengths as if nothing was encrypted nor cut into fragments,
/// `p` the chain of payloads in it.
pub fn intermediate_auth(prf: Prf, sk_p: &Secret, previous: &[u8], a: &[u8], p: &[u8]) -> Secret {
    prf.compute(sk_p.expose(), &[previous, a, p])
}

/// What goes into [`signed_octets`]: "IntAuth = IntAuth_iN | IntAuth_rN | IKE_AUTH_MID", the last being the message ID of the
/// first IKE_AUTH exchange.
pub fn int_auth(initiator: &Secret, responder: &Secret, auth_message_id: u32) -> Vec<u8> {
    [initiator.expose(), responder.expose(), &auth_message_id.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::registry::{KeMethod, PrfId, ProtocolId};
    use crate::negotiate::Additional;

    const SEED: Seed<'static> =
        Seed { nonce_i: &[1; 32], nonce_r: &[2; 48], spi_i: IkeSpi(0x0102), spi_r: IkeSpi(0x0304) };

    fn suite() -> IkeSuite {
        IkeSuite {
            encr: EncrId::AES_GCM_16,
            key_bits: 128,
            prf: PrfId::HMAC_SHA2_256,
            integ: IntegId::NONE,
            ke: KeMethod::CURVE25519,
            additional: Additional::new(),
        }
    }

    fn keys() -> IkeKeys {
        IkeKeys::initial(&suite(), &Secret::new([7; 32]), &SEED).unwrap()
    }

    /// IKE-4: RFC 9370 sections 2.2.2 and 2.2.4, written out: a first additional secret in IKE_INTERMEDIATE, and two in one
    /// rekey, which go behind the nonces.
    #[test]
    fn ike_4_additional_secrets_go_where_rfc_9370_puts_them() {
        let keys = keys();
        let prf = keys.derivation.prf();
        let sk_d = keys.derivation.sk_d().expose();
        let secrets = [Secret::new([8; 32]), Secret::new([9; 32])];
        let expand = |skeyseed: &Secret| {
            let spis: [&[u8]; 2] = [&[0, 0, 0, 0, 0, 0, 1, 2], &[0, 0, 0, 0, 0, 0, 3, 4]];
            prf.plus(skeyseed.expose(), &[SEED.nonce_i, SEED.nonce_r, spis[0], spis[1]], 32)
        };

        let skeyseed = prf.compute(sk_d, &[&[8; 32], &[1; 32], &[2; 48]]);
        let updated = keys.derivation.intermediate(&suite(), &secrets[0], &SEED).unwrap();
        assert_eq!(updated.derivation.sk_d(), &expand(&skeyseed));

        let skeyseed = prf.compute(sk_d, &[&[8; 32], &[1; 32], &[2; 48], &[9; 32]]);
        let rekeyed = keys.derivation.rekey(&suite(), &[&secrets[0], &secrets[1]], &SEED).unwrap();
        assert_eq!(rekeyed.derivation.sk_d(), &expand(&skeyseed));
    }

    /// IKE-1: section 2.18: "it is the old IKE SA's PRF that is used to generate SKEYSEED".
    #[test]
    fn ike_1_rekey_with_another_prf() {
        let keys = keys();
        let new = IkeSuite { prf: PrfId::HMAC_SHA2_512, ..suite() };
        let rekeyed = keys.derivation.rekey(&new, &[&Secret::new([8; 32])], &SEED).unwrap();
        let skeyseed =
            keys.derivation.prf().compute(keys.derivation.sk_d().expose(), &[&[8; 32], &[1; 32], &[2; 48]]);
        assert_eq!(skeyseed.len(), 32);
        let expected = IkeKeys::expand(&new, &skeyseed, &SEED).unwrap();
        assert_eq!(rekeyed.derivation.sk_d(), expected.derivation.sk_d());
        assert_eq!(rekeyed.sk_pr, expected.sk_pr);
        assert_eq!(rekeyed.sk_pr.len(), 64);
    }

    /// IKE-1: children without encryption or without integrity have the keys that they need, and unknown ones none.
    #[test]
    fn ike_1_child_key_lengths() {
        for (protocol, encr, key_bits, integ, lengths) in [
            (ProtocolId::ESP, EncrId::AES_GCM_16, 192, IntegId::NONE, Some((28, 0))),
            (ProtocolId::ESP, EncrId::CHACHA20_POLY1305, 256, IntegId::NONE, Some((36, 0))),
            (ProtocolId::ESP, EncrId::NULL_AUTH_AES_GMAC, 256, IntegId::NONE, Some((36, 0))),
            (ProtocolId::ESP, EncrId::NULL, 0, IntegId::HMAC_SHA2_384_192, Some((0, 48))),
            (ProtocolId::ESP, EncrId::AES_CBC, 192, IntegId::HMAC_SHA2_512_256, Some((24, 64))),
            (ProtocolId::AH, EncrId::NONE, 0, IntegId::HMAC_SHA1_96, Some((0, 20))),
            (ProtocolId::ESP, EncrId::AES_CBC, 100, IntegId::HMAC_SHA1_96, None),
            (ProtocolId::ESP, EncrId(3), 192, IntegId::HMAC_SHA1_96, None),
            (ProtocolId::ESP, EncrId::AES_CBC, 128, IntegId(1), None),
        ] {
            let suite = ChildSuite {
                protocol,
                encr,
                key_bits,
                integ,
                ke: KeMethod::NONE,
                additional: Additional::new(),
                esn: false,
            };
            let made = keys().derivation.child(&suite, &[], &[1; 16], &[2; 16]);
            assert_eq!(made.map(|keys| (keys.responder.0.len(), keys.responder.1.len())), lengths);
        }
    }

    /// IKE-4: RFC 9242 section 3.3.2, written out.
    #[test]
    fn ike_4_intermediate_messages_are_authenticated() {
        let keys = keys();
        let prf = keys.derivation.prf();
        let first = intermediate_auth(prf, &keys.sk_pi, &[], b"header", b"payloads");
        assert_eq!(first, prf.compute(keys.sk_pi.expose(), &[b"headerpayloads"]));
        let second = intermediate_auth(prf, &keys.sk_pi, first.expose(), b"h", b"p");
        assert_eq!(second, prf.compute(keys.sk_pi.expose(), &[first.expose(), b"hp"]));
        let all = int_auth(&first, &second, 0x0102_0304);
        assert_eq!(all, [first.expose(), second.expose(), &[1, 2, 3, 4]].concat());
        let octets = signed_octets(prf, &keys.sk_pi, b"message", b"nonce", b"id", &all);
        let maced = prf.compute(keys.sk_pi.expose(), &[b"id"]);
        assert_eq!(octets, [b"messagenonce", maced.expose(), &all].concat());
    }

    /// OPS-4: no key byte is shown.
    #[test]
    fn ops_4_debug_shows_no_key() {
        let keys = keys();
        let shown = format!("{keys:?} {:?}", keys.derivation.prf().key(&[0xab; 32]));
        for secret in [keys.derivation.sk_d(), &keys.sk_ei, &keys.sk_er, &keys.sk_pi, &keys.sk_pr] {
            let [a, b, ..] = secret.expose() else { panic!("a key has bytes") };
            assert!(!shown.contains(&format!("{a}, {b}")) && !shown.contains(&format!("{a:02x}{b:02x}")));
        }
    }
}
