//! RSA signatures of IKEv1: PKCS#1 v1.5 padding around a bare hash (RFC 2409 section 5.1: "the hash … is signed …
//! PKCS #1 encoded"; RFC 8017 section 9.2 without a DigestInfo). Cryptographic libraries do not offer that, so the power
//! is computed here.
//!
//! Signing is in constant time, blinded, and checked before the signature leaves: a fault in it would give the key away.
//! Verifying makes the one encoding that is right and compares all of it.

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd, Resize};
use x509_cert::der::asn1::{AnyRef, OctetStringRef, UintRef};
use x509_cert::der::{Decode, SliceReader};
use x509_cert::spki::SubjectPublicKeyInfoRef;
use zeroize::{Zeroize, Zeroizing};

/// An RSA key, for this alone; wiped on drop.
pub(super) struct RawKey {
    public: Public,
    d: BoxedUint,
}

struct Public {
    params: BoxedMontyParams,
    /// Bytes of the modulus.
    length: usize,
    e: BoxedUint,
}

/// Lengths of moduli in bytes, as the library takes them.
const LENGTHS: core::ops::RangeInclusive<usize> = 256..=1024;

impl RawKey {
    /// Reads PKCS#8 or PKCS#1, whose consistency the library has checked.
    pub(super) fn from_der(der: &[u8]) -> Option<Self> {
        let outer = AnyRef::from_der(der).ok()?;
        let pkcs1 = |value: &[u8]| -> Result<Option<Self>, x509_cert::der::Error> {
            let mut reader = SliceReader::new(value)?;
            let [_version, n, e, d] = [
                UintRef::decode(&mut reader)?,
                UintRef::decode(&mut reader)?,
                UintRef::decode(&mut reader)?,
                UintRef::decode(&mut reader)?,
            ];
            let public = Public::new(n.as_bytes(), e.as_bytes());
            Ok(public.and_then(|public| Some(Self { d: number(d.as_bytes(), public.bits())?, public })))
        };
        if let Ok(key) = pkcs1(outer.value()) {
            return key;
        }
        let mut reader = SliceReader::new(outer.value()).ok()?;
        UintRef::decode(&mut reader).ok()?;
        AnyRef::decode(&mut reader).ok()?;
        let inner = <&OctetStringRef>::decode(&mut reader).ok()?;
        pkcs1(AnyRef::from_der(inner.as_bytes()).ok()?.value()).ok().flatten()
    }

    /// The signature of a hash, as long as the modulus.
    pub(super) fn sign(&self, hash: &[u8]) -> Option<Vec<u8>> {
        let Public { params, length, e } = &self.public;
        let bits = self.public.bits();
        let message = BoxedMontyForm::new(number(&encode(hash, *length)?, bits)?, params);
        // Its first byte is 0, and so it is below the modulus.
        let mut random = Zeroizing::new(vec![0; *length]);
        SystemRandom::new().fill(random.get_mut(1..)?).ok()?;
        let blind = BoxedMontyForm::new(number(&random, bits)?, params);
        let back = Option::<BoxedMontyForm>::from(blind.invert())?;
        let power = message.mul(&blind.pow(e)).pow(&self.d);
        let signature = power.mul(&back);
        if signature.pow(e).retrieve() != message.retrieve() {
            return None;
        }
        Some(signature.retrieve().to_be_bytes().to_vec())
    }
}

impl Drop for RawKey {
    fn drop(&mut self) {
        self.d.zeroize();
    }
}

impl Public {
    fn new(n: &[u8], e: &[u8]) -> Option<Self> {
        if !LENGTHS.contains(&n.len()) || e.is_empty() || e.len() > 8 {
            return None;
        }
        let bits = u32::try_from(n.len() * 8).ok()?;
        let modulus = Option::<Odd<BoxedUint>>::from(Odd::new(number(n, bits)?))?;
        Some(Self { params: BoxedMontyParams::new_vartime(modulus), length: n.len(), e: number(e, 64)? })
    }

    fn bits(&self) -> u32 {
        self.params.bits_precision()
    }
}

/// A number of so many bits, big endian.
fn number(bytes: &[u8], bits: u32) -> Option<BoxedUint> {
    BoxedUint::from_be_slice(bytes, bits).ok().map(|number| number.resize(bits))
}

/// RFC 8017 section 9.2 with the hash for T: "EM = 0x00 || 0x01 || PS || 0x00 || T".
fn encode(hash: &[u8], length: usize) -> Option<Vec<u8>> {
    let padding = length.checked_sub(hash.len() + 3).filter(|padding| *padding >= 8)?;
    Some([&[0, 1], vec![0xff; padding].as_slice(), &[0], hash].concat())
}

/// Whether `signature` is one of `hash` by the RSA key of `spki` (Subject Public Key Info, DER).
pub(super) fn verify(spki: &[u8], hash: &[u8], signature: &[u8]) -> bool {
    try_verify(spki, hash, signature).unwrap_or(false)
}

fn try_verify(spki: &[u8], hash: &[u8], signature: &[u8]) -> Option<bool> {
    let info = SubjectPublicKeyInfoRef::from_der(spki).ok()?;
    if info.algorithm.oid != super::signature::RSA_ENCRYPTION {
        return None;
    }
    let key = AnyRef::from_der(info.subject_public_key.as_bytes()?).ok()?;
    let mut reader = SliceReader::new(key.value()).ok()?;
    let (n, e) = (UintRef::decode(&mut reader).ok()?, UintRef::decode(&mut reader).ok()?);
    let public = Public::new(n.as_bytes(), e.as_bytes())?;
    let signature = (signature.len() == public.length).then(|| number(signature, public.bits()))??;
    if signature >= *public.params.modulus().as_ref() {
        return None;
    }
    let power = BoxedMontyForm::new(signature, &public.params).pow(&public.e);
    Some(power.retrieve() == number(&encode(hash, public.length)?, public.bits())?)
}
