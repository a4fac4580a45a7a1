//! Key exchange methods (RFC 7296 sections 3.4 and 2.14; the groups of requirement IKE-4).
//!
//! One that asks generates a key pair and, with the answer, agrees; one that answers responds. With an elliptic curve or a
//! MODP group both do the same; ML-KEM (FIPS 203, draft-ietf-ipsecme-ikev2-mlkem) is not symmetric: what is sent first is an
//! encapsulation key, the answer is a ciphertext. Key pairs are used once.
//!
//! All randomness is the caller's, except for ML-KEM's: the library keeps that to itself.

use core::fmt;

use aws_lc_rs::agreement::{self, ECDH_P256, ECDH_P384, PrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::kem::{Ciphertext, DecapsulationKey, EncapsulationKey, ML_KEM_768};
use zeroize::{Zeroize, Zeroizing};

use super::modp;
use crate::message::registry::KeMethod;
use crate::{Random, Secret};

/// Why there is no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeError {
    /// The method is not known here.
    #[error("key exchange method {0} is not supported")]
    Unsupported(KeMethod),
    /// The peer's value cannot be one of that method, or leads to a secret that anyone knows.
    #[error("the peer's {0} public value is invalid")]
    Peer(KeMethod),
    /// The library failed.
    #[error("the computation of {0} failed")]
    Failed(KeMethod),
}

/// A key pair whose owner waits for the peer's answer. Wiped on drop.
pub struct KeyExchange {
    method: KeMethod,
    private: Private,
}

enum Private {
    Curve(Curve, PrivateKey),
    Modp(modp::Group, modp::Exponent),
    MlKem(Box<DecapsulationKey>),
}

/// Whether there is an implementation of `method`.
pub fn supported(method: KeMethod) -> bool {
    public_length(method).is_some()
}

/// Length in bytes of what the one who asks sends.
pub fn public_length(method: KeMethod) -> Option<usize> {
    Some(match method {
        KeMethod::CURVE25519 => 32,
        KeMethod::ECP_256 => 64,
        KeMethod::ECP_384 => 96,
        KeMethod::MODP_2048 => 256,
        KeMethod::MODP_3072 => 384,
        KeMethod::MODP_4096 => 512,
        KeMethod::ML_KEM_768 => 1184,
        _ => return None,
    })
}

impl KeyExchange {
    /// Makes a key pair: it, and the public value to send.
    pub fn generate(method: KeMethod, random: &mut dyn Random) -> Result<(Self, Vec<u8>), KeError> {
        let (private, public) = if let Some(curve) = Curve::of(method) {
            let private = curve.private(random).ok_or(KeError::Failed(method))?;
            let public = curve.public(&private).ok_or(KeError::Failed(method))?;
            (Private::Curve(curve, private), public)
        } else if let Some(group) = modp::Group::of(method) {
            let exponent = group.exponent(random);
            let public = group.public(&exponent);
            (Private::Modp(group, exponent), public)
        } else if method == KeMethod::ML_KEM_768 {
            let private = DecapsulationKey::generate(&ML_KEM_768).map_err(|_| KeError::Failed(method))?;
            let public = private
                .encapsulation_key()
                .and_then(|key| key.key_bytes())
                .map_err(|_| KeError::Failed(method))?;
            (Private::MlKem(Box::new(private)), public.as_ref().to_vec())
        } else {
            return Err(KeError::Unsupported(method));
        };
        Ok((Self { method, private }, public))
    }

    /// As the one who answers: the value to send, and the secret.
    pub fn respond(
        method: KeMethod,
        peer: &[u8],
        random: &mut dyn Random,
    ) -> Result<(Vec<u8>, Secret), KeError> {
        if method == KeMethod::ML_KEM_768 {
            // FIPS 203 section 7.2: the library checks the length and that every coefficient is below q.
            let key = EncapsulationKey::new(&ML_KEM_768, peer).map_err(|_| KeError::Peer(method))?;
            let (ciphertext, secret) = key.encapsulate().map_err(|_| KeError::Peer(method))?;
            return Ok((ciphertext.as_ref().to_vec(), Secret::new(secret.as_ref())));
        }
        let (own, public) = Self::generate(method, random)?;
        Ok((public, own.agree(peer)?))
    }

    /// The method.
    pub fn method(&self) -> KeMethod {
        self.method
    }

    /// As the one who asked: the secret, from the peer's answer.
    pub fn agree(self, peer: &[u8]) -> Result<Secret, KeError> {
        let invalid = KeError::Peer(self.method);
        match self.private {
            Private::Curve(curve, private) => curve.agree(&private, peer).ok_or(invalid),
            Private::Modp(group, exponent) => group.agree(&exponent, peer).ok_or(invalid),
            Private::MlKem(key) => {
                let secret = key.decapsulate(Ciphertext::from(peer)).map_err(|_| invalid)?;
                Ok(Secret::new(secret.as_ref()))
            }
        }
    }
}

impl fmt::Debug for KeyExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyExchange({}, ..)", self.method)
    }
}

/// Elliptic curves of the library.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Curve {
    X25519,
    P256,
    P384,
}

impl Curve {
    fn of(method: KeMethod) -> Option<Self> {
        match method {
            KeMethod::CURVE25519 => Some(Self::X25519),
            KeMethod::ECP_256 => Some(Self::P256),
            KeMethod::ECP_384 => Some(Self::P384),
            _ => None,
        }
    }

    fn algorithm(self) -> &'static agreement::Algorithm {
        match self {
            Self::X25519 => &X25519,
            Self::P256 => &ECDH_P256,
            Self::P384 => &ECDH_P384,
        }
    }

    /// A private key of random bytes. Those of a P-curve have to be in 1 to n - 1, which 8 in a row miss with a probability
    /// below 2^-256; only a source that is no source at all does.
    fn private(self, random: &mut dyn Random) -> Option<PrivateKey> {
        let mut scalar = Zeroizing::new([0; 48]);
        let (scalar, _) = scalar.split_at_mut_checked(if self == Self::P384 { 48 } else { 32 })?;
        (0..8).find_map(|_| {
            random.fill(scalar);
            let private = PrivateKey::from_private_key(self.algorithm(), scalar).ok();
            scalar.zeroize();
            private
        })
    }

    /// The public value: RFC 8031 section 3.1 the 32 bytes of X25519, RFC 5903 section 7 "the x value, then the y value".
    fn public(self, private: &PrivateKey) -> Option<Vec<u8>> {
        let public = private.compute_public_key().ok()?;
        match self {
            Self::X25519 => Some(public.as_ref().to_vec()),
            Self::P256 | Self::P384 => public.as_ref().strip_prefix(&[UNCOMPRESSED]).map(<[u8]>::to_vec),
        }
    }

    /// The secret: RFC 5903 section 7 "the x value of the Diffie-Hellman common value". The library refuses points that are
    /// not on the curve and, of X25519, a secret of zeros (RFC 8031 section 4).
    fn agree(self, private: &PrivateKey, peer: &[u8]) -> Option<Secret> {
        let mut buffer = [UNCOMPRESSED; 1 + 96];
        let point = match self {
            Self::X25519 if peer.len() == 32 => peer,
            Self::P256 if peer.len() == 64 => uncompressed(&mut buffer, peer)?,
            Self::P384 if peer.len() == 96 => uncompressed(&mut buffer, peer)?,
            _ => return None,
        };
        let point = UnparsedPublicKey::new(self.algorithm(), point);
        agreement::agree(private, point, (), |secret| Ok(Secret::new(secret))).ok()
    }
}

/// SEC 1 section 2.3.3: the first byte of a point with both coordinates.
const UNCOMPRESSED: u8 = 4;

/// Puts the coordinates behind the first byte of `buffer`.
fn uncompressed<'a>(buffer: &'a mut [u8; 97], coordinates: &[u8]) -> Option<&'a [u8]> {
    let point = buffer.get_mut(..=coordinates.len())?;
    point.get_mut(1..)?.copy_from_slice(coordinates);
    Some(point)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::digest::sha256;
    use crate::crypto::testing::{Fixed, Seeded, hex};

    const ALL: [KeMethod; 7] = [
        KeMethod::CURVE25519,
        KeMethod::ECP_256,
        KeMethod::ECP_384,
        KeMethod::MODP_2048,
        KeMethod::MODP_3072,
        KeMethod::MODP_4096,
        KeMethod::ML_KEM_768,
    ];

    /// Both key pairs from private values, their public values and the secret, found by both.
    fn both(method: KeMethod, i: Vec<u8>, r: Vec<u8>) -> (Vec<u8>, Vec<u8>, Secret) {
        let (own, public_i) = KeyExchange::generate(method, &mut Fixed(i)).unwrap();
        let (public_r, secret_r) = KeyExchange::respond(method, &public_i, &mut Fixed(r)).unwrap();
        assert_eq!(own.agree(&public_r).unwrap(), secret_r);
        (public_i, public_r, secret_r)
    }

    /// IKE-4: RFC 7748 section 6.1.
    #[test]
    fn ike_4_x25519_of_rfc_7748() {
        let (i, r, secret) = both(
            KeMethod::CURVE25519,
            hex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"),
            hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"),
        );
        assert_eq!(i, hex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"));
        assert_eq!(r, hex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"));
        assert_eq!(secret.expose(), hex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"));
    }

    /// IKE-4: RFC 5903 section 8.1.
    #[test]
    fn ike_4_ecp_256_of_rfc_5903() {
        let (i, r, secret) = both(
            KeMethod::ECP_256,
            hex("C88F01F5 10D9AC3F 70A292DA A2316DE5 44E9AAB8 AFE84049 C62A9C57 862D1433"),
            hex("C6EF9C5D 78AE012A 011164AC B397CE20 88685D8F 06BF9BE0 B283AB46 476BEE53"),
        );
        assert_eq!(
            i,
            hex("DAD0B653 94221CF9 B051E1FE CA5787D0 98DFE637 FC90B9EF 945D0C37 72581180
                 5271A046 1CDB8252 D61F1C45 6FA3E59A B1F45B33 ACCF5F58 389E0577 B8990BB3")
        );
        assert_eq!(
            r,
            hex("D12DFB52 89C8D4F8 1208B702 70398C34 2296970A 0BCCB74C 736FC755 4494BF63
                 56FBF3CA 366CC23E 8157854C 13C58D6A AC23F046 ADA30F83 53E74F33 039872AB")
        );
        assert_eq!(
            secret.expose(),
            hex("D6840F6B 42F6EDAF D13116E0 E1256520 2FEF8E9E CE7DCE03 812464D0 4B9442DE")
        );
    }

    /// IKE-4: RFC 5903 section 8.2.
    #[test]
    fn ike_4_ecp_384_of_rfc_5903() {
        let (i, r, secret) = both(
            KeMethod::ECP_384,
            hex("099F3C70 34D4A2C6 99884D73 A375A67F 7624EF7C 6B3C0F16 0647B674 14DCE655
                 E35B5380 41E649EE 3FAEF896 783AB194"),
            hex("41CB0779 B4BDB85D 47846725 FBEC3C94 30FAB46C C8DC5060 855CC9BD A0AA2942
                 E0308312 916B8ED2 960E4BD5 5A7448FC"),
        );
        assert_eq!(
            i,
            hex("667842D7 D180AC2C DE6F74F3 7551F557 55C7645C 20EF73E3 1634FE72 B4C55EE6
                 DE3AC808 ACB4BDB4 C88732AE E95F41AA 9482ED1F C0EEB9CA FC498462 5CCFC23F
                 65032149 E0E144AD A0241815 35A0F38E EB9FCFF3 C2C947DA E69B4C63 4573A81C")
        );
        assert_eq!(
            r,
            hex("E558DBEF 53EECDE3 D3FCCFC1 AEA08A89 A987475D 12FD950D 83CFA417 32BC509D
                 0D1AC43A 0336DEF9 6FDA41D0 774A3571 DCFBEC7A ACF31964 72169E83 8430367F
                 66EEBE3C 6E70C416 DD5F0C68 759DD1FF F83FA401 42209DFF 5EAAD96D B9E6386C")
        );
        assert_eq!(
            secret.expose(),
            hex("11187331 C279962D 93D60424 3FD592CB 9D0A926F 422E4718 7521287E 7156C5C4
                 D6031355 69B9E9D0 9CF5D4A2 70F59746")
        );
    }

    /// IKE-4: what Python's pow(2, x, p) gives for the exponents 00 01 02 … and 64 65 66 …, cut to their first 256, 320 and
    /// 384 bits: SHA-256 of both public values and of the secret.
    #[test]
    fn ike_4_modp_as_python_has_it() {
        for (method, length, digests) in [
            (
                KeMethod::MODP_2048,
                256,
                "0b9cb9036d2a594a7e3b43169bdf47ee9c7b64a2292203f1bb137b0b648d7e3c
                 4a01df5e55eb8980216e99e5dc2bae0d01f99f2cee35e88d04454358d208f03c
                 b47b4e1281da0a516c04f40f49407b684098d1b227852ee0827f747a9a3b353f",
            ),
            (
                KeMethod::MODP_3072,
                384,
                "71cd9b27251732586c6a41ac0f0a75656b6a8230b1ec2452d3bca7a4da036034
                 dbcb3d04d2005c7a9fb5ef8ceeb207ae27cca662e398fcc0422e3a9b972d2395
                 d31b56e3a3fbbd5b27c09c9a055cca245538846093e94b0f33a8be002af19142",
            ),
            (
                KeMethod::MODP_4096,
                512,
                "98c3085677538ebfdd402b16495acba6e957e790870ccdca22443050c2fe4768
                 73ab3e162e1e191bd53433e43888ab610c5dac341aaf7ac2e882554a9d6ac57a
                 fff4dd12284c3c42d4a770ace6144af763af505d0df2b5ad77043dbdd1d459e8",
            ),
        ] {
            let (i, r, secret) = both(method, (1..49).collect(), (101..149).collect());
            assert_eq!((i.len(), r.len(), secret.len()), (length, length, length));
            assert_eq!([sha256(&[&i]), sha256(&[&r]), sha256(&[secret.expose()])].concat(), hex(digests));
        }
    }

    /// IKE-4: every method agrees with itself, and its first value has the length that is announced.
    #[test]
    fn ike_4_all_methods_agree() {
        for (seed, method) in (1..).zip(ALL) {
            assert!(supported(method));
            let (own, public) = KeyExchange::generate(method, &mut Seeded(seed)).unwrap();
            assert_eq!(Some(public.len()), public_length(method));
            let (answer, secret) = KeyExchange::respond(method, &public, &mut Seeded(!seed)).unwrap();
            assert_eq!(own.agree(&answer).unwrap(), secret);
        }
        for method in [KeMethod::NONE, KeMethod(2), KeMethod(u16::MAX)] {
            assert!(!supported(method));
            assert_eq!(
                KeyExchange::respond(method, &[0; 32], &mut Seeded(0)).unwrap_err(),
                KeError::Unsupported(method)
            );
        }
    }

    /// IKE-4: values of a wrong length, off the curve, of small order, and 0, 1, p - 1, p and above are refused by both
    /// roles.
    #[test]
    fn ike_4_bad_public_values_are_refused() {
        let refused = |method: KeMethod, public: &[u8]| {
            let (own, _) = KeyExchange::generate(method, &mut Seeded(7)).unwrap();
            assert_eq!(own.agree(public).unwrap_err(), KeError::Peer(method), "{method}");
            let error = KeyExchange::respond(method, public, &mut Seeded(8)).unwrap_err();
            assert_eq!(error, KeError::Peer(method), "{method}");
        };
        for method in ALL {
            let (_, good) = KeyExchange::generate(method, &mut Seeded(9)).unwrap();
            refused(method, &[]);
            refused(method, &good[1..]);
            refused(method, &[good.as_slice(), &[0]].concat());
            refused(method, &vec![if method == KeMethod::ML_KEM_768 { 0xff } else { 0 }; good.len()]);
        }
        // RFC 7748 section 6.1's point of order 8, and 1.
        refused(
            KeMethod::CURVE25519,
            &hex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        );
        refused(KeMethod::CURVE25519, &[&[1][..], &[0; 31]].concat());
        for (method, length) in [(KeMethod::ECP_256, 64), (KeMethod::ECP_384, 96)] {
            refused(method, &vec![1; length]);
            refused(method, &vec![0xff; length]);
            // The library would take a compressed or a DER-encoded point.
            refused(method, &vec![2; length / 2 + 1]);
        }
        for (method, group) in [
            (KeMethod::MODP_2048, modp::Group::Modp2048),
            (KeMethod::MODP_3072, modp::Group::Modp3072),
            (KeMethod::MODP_4096, modp::Group::Modp4096),
        ] {
            let prime = group.prime();
            let with_last = |last: u8| [&prime[..prime.len() - 1], &[last]].concat();
            let mut one = vec![0; prime.len()];
            *one.last_mut().unwrap() = 1;
            refused(method, &one);
            refused(method, &with_last(0xfe));
            refused(method, &prime);
            refused(method, &vec![0xff; prime.len()]);
            // p - 2, that is -g^1: valid.
            assert!(KeyExchange::respond(method, &with_last(0xfd), &mut Seeded(1)).is_ok());
        }
    }

    /// IKE-4: powers of the generator by the table and by exponentiation, for any exponents.
    #[test]
    fn ike_4_modp_table_agrees_with_exponentiation() {
        for method in [KeMethod::MODP_2048, KeMethod::MODP_3072, KeMethod::MODP_4096] {
            let mut exponents: Vec<Vec<u8>> =
                (0..8).map(|seed| (&mut Seeded(seed) as &mut dyn Random).bytes(48)).collect();
            exponents.extend([vec![0xff; 48], vec![0x80; 48], [&[0; 31][..], &[1; 17]].concat()]);
            let mut two = vec![0; public_length(method).unwrap()];
            *two.last_mut().unwrap() = 2;
            for exponent in exponents {
                let (own, public) = KeyExchange::generate(method, &mut Fixed(exponent)).unwrap();
                assert_eq!(own.agree(&two).unwrap().expose(), public);
            }
        }
    }

    /// IKE-4: Project Wycheproof's vectors for X25519; where the secret is zero, RFC 8031 wants it refused.
    #[test]
    fn ike_4_x25519_of_wycheproof() {
        let set = wycheproof::xdh::TestSet::load(wycheproof::xdh::TestName::X25519).unwrap();
        for test in set.test_groups.iter().flat_map(|group| &group.tests) {
            let (own, _) =
                KeyExchange::generate(KeMethod::CURVE25519, &mut Fixed(test.private_key.to_vec())).unwrap();
            let secret = own.agree(&test.public_key);
            if test.shared_secret.iter().all(|byte| *byte == 0) {
                assert_eq!(secret.unwrap_err(), KeError::Peer(KeMethod::CURVE25519), "{}", test.tc_id);
            } else {
                assert_eq!(secret.unwrap().expose(), &test.shared_secret[..], "{}", test.tc_id);
            }
        }
    }

    /// IKE-4: Project Wycheproof's vectors for P-256 and P-384. IKE has no compressed points.
    #[test]
    fn ike_4_ecp_of_wycheproof() {
        use wycheproof::TestResult;
        use wycheproof::ecdh::{TestName, TestSet};
        for (method, name, length) in [
            (KeMethod::ECP_256, TestName::EcdhSecp256r1Ecpoint, 32),
            (KeMethod::ECP_384, TestName::EcdhSecp384r1Ecpoint, 48),
        ] {
            let set = TestSet::load(name).unwrap();
            for test in set.test_groups.iter().flat_map(|group| &group.tests) {
                let Some(point) = test.public_key.strip_prefix(&[UNCOMPRESSED]) else { continue };
                let mut scalar = [&[0; 48], &test.private_key[..]].concat();
                let scalar = scalar.split_off(scalar.len() - length);
                let (own, _) = KeyExchange::generate(method, &mut Fixed(scalar)).unwrap();
                match own.agree(point) {
                    Ok(secret) => {
                        assert_ne!(test.result, TestResult::Invalid, "{}", test.tc_id);
                        assert_eq!(secret.expose(), &test.shared_secret[..], "{}", test.tc_id);
                    }
                    Err(error) => {
                        assert_eq!(error, KeError::Peer(method));
                        assert_eq!(test.result, TestResult::Invalid, "{}", test.tc_id);
                    }
                }
            }
        }
    }

    /// IKE-4: Project Wycheproof's vectors for ML-KEM-768: encapsulation keys that FIPS 203 section 7.2 refuses, and
    /// decapsulation of given ciphertexts, changed ones (implicit rejection) among them.
    #[test]
    fn ike_4_ml_kem_of_wycheproof() {
        use wycheproof::TestResult;
        use wycheproof::mlkem::{TestName, TestSet};
        let method = KeMethod::ML_KEM_768;
        let set = TestSet::load(TestName::MlKem768Encaps).unwrap();
        for test in set.test_groups.iter().flat_map(|group| &group.tests) {
            let answer = KeyExchange::respond(method, test.encaps_key.as_ref().unwrap(), &mut Seeded(0));
            assert_eq!(answer.is_ok(), test.result == TestResult::Valid, "{}", test.tc_id);
        }
        let set = TestSet::load(TestName::MlKem768SemiExpandedDecaps).unwrap();
        let mut valid = 0;
        for test in set.test_groups.iter().flat_map(|group| &group.tests) {
            let Ok(key) = DecapsulationKey::new(&ML_KEM_768, test.decaps_key.as_ref().unwrap()) else {
                assert_eq!(test.result, TestResult::Invalid, "{}", test.tc_id);
                continue;
            };
            let own = KeyExchange { method, private: Private::MlKem(Box::new(key)) };
            match own.agree(test.ct.as_ref().unwrap()) {
                Ok(secret) if test.result == TestResult::Valid => {
                    assert_eq!(secret.expose(), &test.shared_secret.as_ref().unwrap()[..]);
                    valid += 1;
                }
                answer => assert!(answer.is_err(), "{}", test.tc_id),
            }
        }
        assert_eq!(valid, 3);
    }

    /// OPS-4: a key pair shows nothing but its method.
    #[test]
    fn ops_4_debug_shows_no_key() {
        for method in ALL {
            let (own, _) = KeyExchange::generate(method, &mut Seeded(3)).unwrap();
            assert_eq!(format!("{own:?}"), format!("KeyExchange({method}, ..)"));
        }
    }
}
