//! Derivation, protection and authentication against what two strongSwan daemons sent and logged: IKE_SA_INIT, IKE_AUTH with
//! a pre-shared key, a child rekeyed with a new key exchange by the initiator, the IKE SA rekeyed by the responder.

use std::collections::VecDeque;

use super::keys::{ChildKeys, IkeKeys, Seed, psk_auth, signed_octets};
use super::testing::{Seeded, hex};
use crate::Secret;
use crate::message::parse::{self, Body};
use crate::message::registry::ExchangeType;
use crate::message::{Head, IkeSpi, Payload, emit};
use crate::negotiate::{Chosen, keyword, proposal};

/// One file.
struct Transcript {
    lines: VecDeque<(&'static str, &'static str)>,
}

impl Transcript {
    fn new(text: &'static str) -> Self {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self { lines: lines.map(|line| line.split_once(' ').unwrap()).collect() }
    }

    /// The next line, which has that name.
    fn word(&mut self, name: &str) -> &'static str {
        let (found, value) = self.lines.pop_front().unwrap();
        assert_eq!(found, name);
        value
    }

    fn bytes(&mut self, name: &str) -> Vec<u8> {
        hex(self.word(name))
    }

    /// The same, empty if the suite has none.
    fn bytes_if_any(&mut self, name: &str) -> Vec<u8> {
        if self.lines.front().is_some_and(|line| line.0 == name) { self.bytes(name) } else { Vec::new() }
    }

    fn secret(&mut self, name: &str) -> Secret {
        Secret::new(self.bytes(name))
    }

    fn check_ike(&mut self, keys: &IkeKeys) {
        assert_eq!(keys.derivation.sk_d().expose(), self.bytes("SK_d"));
        assert_eq!(keys.sk_ai.expose(), self.bytes_if_any("SK_ai"));
        assert_eq!(keys.sk_ar.expose(), self.bytes_if_any("SK_ar"));
        assert_eq!(keys.sk_ei.expose(), self.bytes("SK_ei"));
        assert_eq!(keys.sk_er.expose(), self.bytes("SK_er"));
        assert_eq!(keys.sk_pi.expose(), self.bytes("SK_pi"));
        assert_eq!(keys.sk_pr.expose(), self.bytes("SK_pr"));
    }

    fn check_child(&mut self, keys: &ChildKeys) {
        assert_eq!(keys.initiator.0.expose(), self.bytes("ENCR_i"));
        assert_eq!(keys.responder.0.expose(), self.bytes("ENCR_r"));
        assert_eq!(keys.initiator.1.expose(), self.bytes_if_any("INTEG_i"));
        assert_eq!(keys.responder.1.expose(), self.bytes_if_any("INTEG_r"));
    }
}

/// A message, opened if it has to be.
struct Message {
    raw: Vec<u8>,
    head: Head,
    payloads: Vec<Payload>,
}

impl Message {
    fn read(raw: Vec<u8>, keys: Option<&IkeKeys>) -> Self {
        let parsed = parse::message(&raw).unwrap();
        let head = parsed.head;
        let payloads = match parsed.body {
            Body::Plain(payloads) => payloads,
            Body::Encrypted { first_inner, aad, sealed } => {
                let opener = keys.unwrap().opener(head.from_initiator).unwrap();
                let chain = opener.open(aad, sealed).expect("strongSwan's message opens");
                let other = keys.unwrap().opener(!head.from_initiator).unwrap();
                assert_eq!(other.open(aad, sealed), None, "the other direction has other keys");
                parse::chain(first_inner, &chain).unwrap()
            }
            Body::Fragment { .. } => panic!("no fragments here"),
        };
        Self { raw, head, payloads }
    }

    fn find<'a, T: 'a>(&'a self, of: impl Fn(&'a Payload) -> Option<T>) -> T {
        self.payloads.iter().find_map(of).unwrap()
    }

    fn nonce(&self) -> &[u8] {
        self.find(|payload| if let Payload::Nonce(nonce) = payload { Some(nonce.as_slice()) } else { None })
    }

    fn auth(&self) -> &[u8] {
        self.find(
            |payload| if let Payload::Auth { data, .. } = payload { Some(data.as_slice()) } else { None },
        )
    }

    fn id_body(&self) -> Vec<u8> {
        let initiator = self.head.from_initiator;
        self.find(|payload| match payload {
            Payload::IdI(id) if initiator => Some(emit::id_body(id)),
            Payload::IdR(id) if !initiator => Some(emit::id_body(id)),
            _ => None,
        })
    }

    /// What was chosen, from the answer's SA payload.
    fn chosen(&self, offer: &crate::message::Proposal) -> Chosen {
        let answer = self.find(|payload| if let Payload::Sa(answer) = payload { Some(answer) } else { None });
        proposal::choose(std::slice::from_ref(offer), answer).unwrap()
    }
}

fn replay(text: &'static str) {
    let mut file = Transcript::new(text);
    let ike = keyword::ike(file.word("ike")).unwrap();
    let esp = keyword::esp(file.word("esp")).unwrap();
    let psk = file.word("psk").as_bytes();
    let raw: Vec<Vec<u8>> = (0..8).map(|_| file.bytes("message")).collect();
    let mut raw = raw.into_iter();

    // IKE_SA_INIT.
    let init: [Message; 2] = [(); 2].map(|()| Message::read(raw.next().unwrap(), None));
    let suite = init[1].chosen(&ike).ike().unwrap().clone();
    let seed = Seed {
        nonce_i: init[0].nonce(),
        nonce_r: init[1].nonce(),
        spi_i: init[1].head.spi_i,
        spi_r: init[1].head.spi_r,
    };
    let shared = file.secret("g^ir");
    let keys = IkeKeys::initial(&suite, &shared, &seed).unwrap();
    let prf = keys.derivation.prf();
    let nonces = [seed.nonce_i, seed.nonce_r].concat();
    assert_eq!(prf.compute(&nonces, &[shared.expose()]).expose(), file.bytes("SKEYSEED"));
    file.check_ike(&keys);

    // IKE_AUTH.
    let auth: [Message; 2] = [(); 2].map(|()| Message::read(raw.next().unwrap(), Some(&keys)));
    for (side, sk_p) in [&keys.sk_pi, &keys.sk_pr].into_iter().enumerate() {
        let (first, peer_nonce) = (&init[side].raw, init[1 - side].nonce());
        let octets = signed_octets(prf, sk_p, first, peer_nonce, &auth[side].id_body(), &[]);
        let expected = psk_auth(prf, psk, &octets);
        assert_eq!(expected.expose(), file.bytes("AUTH"));
        assert_eq!(expected.expose(), auth[side].auth());
    }
    let child = auth[1].chosen(&proposal::without_key_exchange(std::slice::from_ref(&esp))[0]);
    let child = child.child().unwrap();
    let made = keys.derivation.child(child, &[], init[0].nonce(), init[1].nonce()).unwrap();
    file.check_child(&made);

    // CREATE_CHILD_SA, the child, with a key exchange.
    let rekey: [Message; 2] = [(); 2].map(|()| Message::read(raw.next().unwrap(), Some(&keys)));
    assert_eq!(rekey[0].head.exchange, ExchangeType::CREATE_CHILD_SA);
    let chosen = rekey[1].chosen(&esp);
    let shared = file.secret("g^ir");
    let made = keys
        .derivation
        .child(chosen.child().unwrap(), &[&shared], rekey[0].nonce(), rekey[1].nonce())
        .unwrap();
    file.check_child(&made);

    // CREATE_CHILD_SA, the IKE SA, begun by its responder, who is then the initiator of the new one.
    let rekey: [Message; 2] = [(); 2].map(|()| Message::read(raw.next().unwrap(), Some(&keys)));
    assert!(!rekey[0].head.from_initiator && !rekey[0].head.response);
    let spis = [0, 1].map(|side| IkeSpi(rekey[side].chosen(&ike).ike_spi().unwrap()));
    let shared = file.secret("g^ir");
    let seed = Seed { nonce_i: rekey[0].nonce(), nonce_r: rekey[1].nonce(), spi_i: spis[0], spi_r: spis[1] };
    let suite = rekey[1].chosen(&ike).ike().unwrap().clone();
    let parts = [shared.expose(), seed.nonce_i, seed.nonce_r];
    let skeyseed = prf.compute(keys.derivation.sk_d().expose(), &parts);
    assert_eq!(skeyseed.expose(), file.bytes("SKEYSEED"));
    file.check_ike(&keys.derivation.rekey(&suite, &[&shared], &seed).unwrap());
    assert!(file.lines.is_empty(), "all of it was looked at");

    // And what strongSwan sent, sealed here, is as long as it was and opens.
    let message = &auth[0];
    let mut chain = Vec::new();
    let first = emit::chain(&message.payloads, &mut chain);
    let mut sealer = keys.sealer(true).unwrap();
    let prefix = emit::sk_prefix(&message.head, first, sealer.sealed_length(chain.len()));
    let again = sealer.seal(&mut Seeded(1), prefix, &chain);
    assert_eq!(again.len(), message.raw.len());
    assert_eq!(Message::read(again, Some(&keys)).payloads, message.payloads);
}

/// IKE-1, IKE-5: AES-GCM-128, SHA2-256, X25519.
#[test]
fn ike_1_strongswan_gcm() {
    replay(include_str!("vectors/gcm.txt"));
}

/// IKE-1, IKE-5: AES-GCM-256, SHA2-384, MODP-3072.
#[test]
fn ike_1_strongswan_gcm_256() {
    replay(include_str!("vectors/gcm256.txt"));
}

/// IKE-1, IKE-5: ChaCha20-Poly1305, SHA2-512, ECP-256.
#[test]
fn ike_1_strongswan_chacha() {
    replay(include_str!("vectors/chacha.txt"));
}

/// IKE-1, IKE-5: AES-CBC-256 with HMAC-SHA2-384 (ESP: SHA2-256), MODP-2048.
#[test]
fn ike_1_strongswan_cbc_256() {
    replay(include_str!("vectors/cbc.txt"));
}

/// IKE-1, IKE-5: AES-CBC-128 with HMAC-SHA2-256 (ESP: SHA1), ECP-384.
#[test]
fn ike_1_strongswan_cbc_128() {
    replay(include_str!("vectors/cbc128.txt"));
}
