//! Keys of an IKEv1 SA and of its children (RFC 2409 sections 5 and 5.5, appendix B), and the HASH payloads.

use super::cipher::Cipher;
use super::hash::Hash;
use crate::Secret;
use crate::crypto::keys::{encr_key_length, integ_key_length};
use crate::message::IkeSpi;
use crate::negotiate::ChildSuite;

/// What both sides contributed to phase 1.
#[derive(Debug)]
pub(crate) struct Exchanged {
    pub(crate) cookies: (IkeSpi, IkeSpi),
    /// Public values, the initiator's first.
    pub(crate) public: (Vec<u8>, Vec<u8>),
    /// Nonces, the initiator's first.
    pub(crate) nonces: (Vec<u8>, Vec<u8>),
    /// g^xy.
    pub(crate) shared: Secret,
    /// Body of the initiator's SA payload, SAi_b.
    pub(crate) sa_i: Vec<u8>,
}

/// SKEYID and what is derived from it.
#[derive(Debug)]
pub(crate) struct Keys {
    pub(crate) hash: Hash,
    skeyid: Secret,
    pub(crate) skeyid_d: Secret,
    pub(crate) skeyid_a: Secret,
    pub(crate) cipher: Cipher,
}

impl Keys {
    /// By a shared secret: "SKEYID = prf(pre-shared-key, Ni_b | Nr_b)"; by signatures, without one: "SKEYID = prf(Ni_b |
    /// Nr_b, g^xy)". `None` if there is no cipher with keys of this length.
    pub(crate) fn derive(hash: Hash, key_bits: u16, psk: Option<&Secret>, with: &Exchanged) -> Option<Self> {
        let (ni, nr) = &with.nonces;
        let skeyid = match psk {
            Some(psk) => hash.prf(psk.expose(), &[ni, nr]),
            None => hash.prf(&[ni.as_slice(), nr].concat(), &[with.shared.expose()]),
        };
        let (cookie_i, cookie_r) = (with.cookies.0.0.to_be_bytes(), with.cookies.1.0.to_be_bytes());
        // "SKEYID_d = prf(SKEYID, g^xy | CKY-I | CKY-R | 0)", and the next two with the one before in front.
        let next = |before: &[u8], number: u8| {
            let parts: [&[u8]; 5] = [before, with.shared.expose(), &cookie_i, &cookie_r, &[number]];
            hash.prf(skeyid.expose(), &parts)
        };
        let skeyid_d = next(&[], 0);
        let skeyid_a = next(skeyid_d.expose(), 1);
        let skeyid_e = next(skeyid_a.expose(), 2);
        let cipher = Cipher::new(expand(hash, &skeyid_e, usize::from(key_bits / 8))?)?;
        Some(Self { hash, skeyid, skeyid_d, skeyid_a, cipher })
    }

    /// "HASH_I = prf(SKEYID, g^xi | g^xr | CKY-I | CKY-R | SAi_b | IDii_b)", or HASH_R, which has the responder's first.
    pub(crate) fn proof(&self, of_initiator: bool, with: &Exchanged, id_body: &[u8]) -> Secret {
        let (public_i, public_r) = (with.public.0.as_slice(), with.public.1.as_slice());
        let (cookie_i, cookie_r) = (with.cookies.0.0.to_be_bytes(), with.cookies.1.0.to_be_bytes());
        let parts: [&[u8]; 6] = if of_initiator {
            [public_i, public_r, &cookie_i, &cookie_r, &with.sa_i, id_body]
        } else {
            [public_r, public_i, &cookie_r, &cookie_i, &with.sa_i, id_body]
        };
        self.hash.prf(self.skeyid.expose(), &parts)
    }
}

/// Ka (appendix B): the front of SKEYID_e, or of "K1 | K2 | K3" with "K1 = prf(SKEYID_e, 0), K2 = prf(SKEYID_e, K1)".
fn expand(hash: Hash, skeyid_e: &Secret, length: usize) -> Option<Secret> {
    if let Some(front) = skeyid_e.expose().get(..length) {
        return Some(Secret::new(front));
    }
    let first = hash.prf(skeyid_e.expose(), &[&[0]]);
    let second = hash.prf(skeyid_e.expose(), &[first.expose()]);
    let all = zeroize::Zeroizing::new([first.expose(), second.expose()].concat());
    all.get(..length).map(Secret::new)
}

/// Keys of one direction of a CHILD_SA (section 5.5): encryption with its salt, integrity. `spi` is that of the direction:
/// whoever receives has chosen it.
///
/// "KEYMAT = prf(SKEYID_d, [g(qm)^xy |] protocol | SPI | Ni_b | Nr_b)", expanded with each block in front of the same.
pub(crate) fn child(
    hash: Hash,
    skeyid_d: &Secret,
    suite: &ChildSuite,
    shared: Option<&Secret>,
    spi: u32,
    ni: &[u8],
    nr: &[u8],
) -> Option<(Secret, Secret)> {
    let encr = encr_key_length(suite.encr, suite.key_bits)?;
    let integ = integ_key_length(suite.integ)?;
    let shared = shared.map_or(&[][..], Secret::expose);
    let spi = spi.to_be_bytes();
    let mut all = zeroize::Zeroizing::new(Vec::with_capacity(encr + integ + hash.len()));
    let mut block = Secret::default();
    while all.len() < encr + integ {
        let parts: [&[u8]; 6] = [block.expose(), shared, &[suite.protocol.0], &spi, ni, nr];
        block = hash.prf(skeyid_d.expose(), &parts);
        if block.is_empty() {
            return None;
        }
        all.extend_from_slice(block.expose());
    }
    let (encr, rest) = all.split_at_checked(encr)?;
    Some((Secret::new(encr), Secret::new(rest.get(..integ)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::registry::{EncrId, IntegId, KeMethod, ProtocolId};
    use crate::negotiate::Additional;

    fn exchanged() -> Exchanged {
        Exchanged {
            cookies: (IkeSpi(1), IkeSpi(2)),
            public: (vec![3; 256], vec![4; 256]),
            nonces: (vec![5; 32], vec![6; 32]),
            shared: Secret::new([7; 256]),
            sa_i: vec![8; 52],
        }
    }

    /// IKE-2: as Python's hmac computes it from sections 5 and 5.5 and appendix B of RFC 2409.
    #[test]
    fn ike_2_keys_as_python_has_them() {
        let hex = crate::crypto::testing::hex;
        let keys = Keys::derive(Hash::Sha1, 256, Some(&Secret::new(*b"secret")), &exchanged()).unwrap();
        assert_eq!(keys.skeyid_d.expose(), hex(SKEYID_D));
        assert_eq!(keys.skeyid_a.expose(), hex(SKEYID_A));
        assert_eq!(keys.cipher.ka().expose(), hex(KA), "SHA-1 is too short for AES-256: K1 | K2");
        assert_eq!(keys.proof(true, &exchanged(), b"id").expose(), hex(HASH_I));
        assert_eq!(keys.proof(false, &exchanged(), b"id").expose(), hex(HASH_R));
        let signed = Keys::derive(Hash::Sha256, 128, None, &exchanged()).unwrap();
        assert_eq!(signed.cipher.ka().expose(), hex(SIGNED_KA));
        let suite = ChildSuite {
            protocol: ProtocolId::ESP,
            encr: EncrId::AES_CBC,
            key_bits: 256,
            integ: IntegId::HMAC_SHA2_256_128,
            ke: KeMethod::NONE,
            additional: Additional::new(),
            esn: false,
        };
        let shared = Secret::new([9; 32]);
        let (encr, integ) =
            child(Hash::Sha1, &keys.skeyid_d, &suite, Some(&shared), 0x1234, &[10; 16], &[11; 16]).unwrap();
        assert_eq!([encr.expose(), integ.expose()].concat(), hex(KEYMAT));
    }

    const SKEYID_D: &str = "f22ff839b77d8ac195adf4a1146577f29c859d5b";
    const SKEYID_A: &str = "25322174a32b0237b3ee91c95a5e83c1f2fa009a";
    const KA: &str = "ad885e86f2b0ddab2717d8a19f66cda462a14acac11acccccf3662d539f0488a";
    const HASH_I: &str = "c393f519b2564548e31c3cd41ce71afe8ded8a3a";
    const HASH_R: &str = "d6737427049e80b4cab7480556b2e56199d4544f";
    const SIGNED_KA: &str = "a11f367bd6a83127279bd634da7533dd";
    const KEYMAT: &str = "15405266df2faccffa02cc060f6613e1e1b75be2eef9ada1013e297ab9ea4e98242721104acffa301f56483fc8d7169ca2c1cb3c52bc465edcb1f2be0a4d92a6";
}
