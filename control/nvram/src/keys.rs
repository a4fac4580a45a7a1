//! The key pair that backups are encrypted to, and how a data key is sealed to it: HPKE (RFC 9180), mode_psk,
//! DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305.
//!
//! mode_psk rather than mode_base: a public key alone would let anyone who can write to the storage forge records, and a
//! forged record of strategy `restore` is a tunnel. The pre-shared secret is in both halves.

use core::fmt;

use aws_lc_rs::digest;
use base64ct::{Base64, Encoding};
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256 as X25519;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, PskBundle, Serializable};
use thiserror::Error;
use zeroize::Zeroizing;

/// A data key: AES-256.
pub(crate) const DATA_KEY_LEN: usize = 32;
/// Bytes of the encapsulated key.
pub(crate) const ENCAPSULATED_LEN: usize = 32;
/// Bytes of a sealed data key: with the tag.
pub(crate) const SEALED_LEN: usize = DATA_KEY_LEN + 16;

const HALF_LEN: usize = 32;
const PUBLIC_WORD: &str = "postern-nvram-public-1";
const PRIVATE_WORD: &str = "postern-nvram-private-1";

/// Names a key pair: the first 8 bytes of SHA-256 of the X25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// The half that the running process holds: encrypts, and cannot decrypt what it encrypted.
///
/// Holds the X25519 public key and the secret that shows a backup to be ours; a file with it has mode 0600.
#[derive(Clone)]
pub struct PublicKey {
    public: [u8; HALF_LEN],
    origin: Zeroizing<[u8; HALF_LEN]>,
}

/// The half that decrypts. In memory only while a backup is read; wiped when dropped.
pub struct PrivateKey {
    private: Zeroizing<[u8; HALF_LEN]>,
    origin: Zeroizing<[u8; HALF_LEN]>,
    public: [u8; HALF_LEN],
}

/// The private keys a holder keeps, newest first: after a rotation the last backup is still for the one before.
#[derive(Debug, Default)]
pub struct KeyRing(pub Vec<PrivateKey>);

/// A key's text form was not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum KeyText {
    /// Not the word, a space and base64 that are expected.
    #[error("not a key of postern's NVRAM, or damaged")]
    Malformed,
    /// A public key where a private one belongs, or the other way round.
    #[error("the other half of the key pair: {0} is needed here")]
    OtherHalf(&'static str),
}

/// Makes a key pair from the operating system's random numbers.
pub fn generate() -> (PublicKey, PrivateKey) {
    let (private, public) = X25519::gen_keypair();
    let mut origin = Zeroizing::new([0; HALF_LEN]);
    random(origin.as_mut());
    let private = PrivateKey {
        private: Zeroizing::new(private.to_bytes().into()),
        origin,
        public: public.to_bytes().into(),
    };
    (private.public_key(), private)
}

impl PublicKey {
    /// Which key pair it is.
    pub fn id(&self) -> KeyId {
        key_id(&self.public)
    }

    /// One line of text, for the file that the running process reads.
    pub fn to_text(&self) -> Zeroizing<String> {
        to_text(PUBLIC_WORD, &self.public, &self.origin)
    }

    /// Reads that line.
    pub fn from_text(text: &str) -> Result<Self, KeyText> {
        let (public, origin) = from_text(PUBLIC_WORD, text)?;
        Ok(Self { public: *public, origin })
    }

    /// Seals `data_key`; `bound` is authenticated with it. Returns the encapsulated key and the sealed data key.
    pub(crate) fn seal(&self, data_key: &[u8; DATA_KEY_LEN], bound: &[u8]) -> Option<Sealed> {
        let id = self.id();
        let mode = OpModeS::Psk(PskBundle::new(self.origin.as_ref(), &id.0).ok()?);
        let public = <X25519 as Kem>::PublicKey::from_bytes(&self.public).ok()?;
        let (encapsulated, sealed) = hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519>(
            &mode,
            &public,
            bound,
            data_key,
            &[],
        )
        .ok()?;
        Some(Sealed { encapsulated: encapsulated.to_bytes().into(), data_key: sealed.try_into().ok()? })
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id())
    }
}

/// A data key on disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sealed {
    pub(crate) encapsulated: [u8; ENCAPSULATED_LEN],
    pub(crate) data_key: [u8; SEALED_LEN],
}

impl PrivateKey {
    /// Which key pair it is.
    pub fn id(&self) -> KeyId {
        key_id(&self.public)
    }

    /// The other half.
    pub fn public_key(&self) -> PublicKey {
        PublicKey { public: self.public, origin: self.origin.clone() }
    }

    /// One line of text, for what a holder keeps.
    pub fn to_text(&self) -> Zeroizing<String> {
        to_text(PRIVATE_WORD, &self.private, &self.origin)
    }

    /// Reads that line.
    pub fn from_text(text: &str) -> Result<Self, KeyText> {
        let (private, origin) = from_text(PRIVATE_WORD, text)?;
        let secret =
            <X25519 as Kem>::PrivateKey::from_bytes(private.as_ref()).map_err(|_| KeyText::Malformed)?;
        let public = X25519::sk_to_pk(&secret).to_bytes().into();
        Ok(Self { private, origin, public })
    }

    /// Opens what [`PublicKey::seal`] made; `None` if it was for another key, by someone else, or changed.
    pub(crate) fn open(&self, sealed: &Sealed, bound: &[u8]) -> Option<Zeroizing<[u8; DATA_KEY_LEN]>> {
        let opened = open(
            &self.private,
            (&self.origin, &self.id().0),
            &sealed.encapsulated,
            bound,
            &sealed.data_key,
            &[],
        )?;
        let mut data_key = Zeroizing::new([0; DATA_KEY_LEN]);
        (opened.len() == DATA_KEY_LEN).then(|| data_key.copy_from_slice(&opened))?;
        Some(data_key)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({}, ..)", self.id())
    }
}

impl KeyRing {
    /// One line a key.
    pub fn to_text(&self) -> Zeroizing<String> {
        let lines: Vec<_> = self.0.iter().map(PrivateKey::to_text).collect();
        // Exactly sized: a growing string would leave copies behind.
        let mut text = Zeroizing::new(String::with_capacity(lines.iter().map(|line| line.len()).sum()));
        for line in &lines {
            text.push_str(line);
        }
        text
    }

    /// Reads those lines; empty ones and those that begin with `#` are skipped. At least one key.
    pub fn from_text(text: &str) -> Result<Self, KeyText> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys = lines.map(PrivateKey::from_text).collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(KeyText::Malformed) } else { Ok(Self(keys)) }
    }

    pub(crate) fn find(&self, id: KeyId) -> Option<&PrivateKey> {
        self.0.iter().find(|key| key.id() == id)
    }
}

/// Random bytes of the operating system's generator.
pub(crate) fn random(bytes: &mut [u8]) {
    // aws-lc aborts the process where there is no entropy, and reports no other error.
    let filled = aws_lc_rs::rand::fill(bytes);
    assert!(filled.is_ok(), "the operating system has no random numbers");
}

/// HPKE's OpenPSK (RFC 9180 section 6.1).
fn open(
    private: &[u8; HALF_LEN],
    (psk, psk_id): (&[u8; HALF_LEN], &[u8]),
    encapsulated: &[u8; ENCAPSULATED_LEN],
    info: &[u8],
    sealed: &[u8],
    aad: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let mode = OpModeR::Psk(PskBundle::new(psk, psk_id).ok()?);
    let private = <X25519 as Kem>::PrivateKey::from_bytes(private).ok()?;
    let encapsulated = <X25519 as Kem>::EncappedKey::from_bytes(encapsulated).ok()?;
    hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519>(
        &mode,
        &private,
        &encapsulated,
        info,
        sealed,
        aad,
    )
    .ok()
    .map(Zeroizing::new)
}

fn key_id(public: &[u8; HALF_LEN]) -> KeyId {
    let digest = digest::digest(&digest::SHA256, public);
    KeyId(digest.as_ref().first_chunk().copied().unwrap_or_default())
}

fn to_text(word: &str, half: &[u8; HALF_LEN], origin: &[u8; HALF_LEN]) -> Zeroizing<String> {
    let mut both = Zeroizing::new([0; 2 * HALF_LEN]);
    for (to, from) in both.iter_mut().zip(half.iter().chain(origin)) {
        *to = *from;
    }
    let encoded = Zeroizing::new(Base64::encode_string(both.as_ref()));
    let mut line = Zeroizing::new(String::with_capacity(word.len() + encoded.len() + 2));
    line.push_str(word);
    line.push(' ');
    line.push_str(&encoded);
    line.push('\n');
    line
}

type Halves = (Zeroizing<[u8; HALF_LEN]>, Zeroizing<[u8; HALF_LEN]>);

fn from_text(word: &str, text: &str) -> Result<Halves, KeyText> {
    let (found, encoded) = text.trim().split_once(' ').ok_or(KeyText::Malformed)?;
    match found {
        _ if found == word => {}
        PUBLIC_WORD => return Err(KeyText::OtherHalf("the private one")),
        PRIVATE_WORD => return Err(KeyText::OtherHalf("the public one")),
        _ => return Err(KeyText::Malformed),
    }
    let mut both = Zeroizing::new([0; 2 * HALF_LEN]);
    let decoded = Base64::decode(encoded.trim(), both.as_mut()).map_err(|_| KeyText::Malformed)?;
    let (half, origin) = decoded.split_first_chunk().ok_or(KeyText::Malformed)?;
    let origin = origin.try_into().map_err(|_| KeyText::Malformed)?;
    Ok((Zeroizing::new(*half), Zeroizing::new(origin)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        let bytes = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap());
        bytes.collect::<Vec<_>>().try_into().unwrap()
    }

    /// RFC 9180 A.2.2: mode_psk of DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305, sequence number 0.
    #[test]
    fn rst_3_the_seal_is_hpke_as_rfc_9180_shows_it() {
        let private = hex("77d114e0212be51cb1d76fa99dd41cfd4d0166b08caa09074430a6c59ef17879");
        let psk = hex("0247fd33b913760fa1fa51e1892d9f307fbe65eb171e8132c2af18555a738b82");
        let encapsulated = hex("2261299c3f40a9afc133b969a97f05e95be2c514e54f3de26cbe5644ac735b04");
        let sealed: [u8; 45] =
            hex("4a177f9c0d6f15cfdf533fb65bf84aecdc6ab16b8b85b4cf65a370e07fc1d78d28fb073214525276f4a89608ff");
        let id = b"Ennyn Durin aran Moria";
        let opened =
            open(&private, (&psk, id), &encapsulated, b"Ode on a Grecian Urn", &sealed, b"Count-0").unwrap();
        assert_eq!(opened.as_slice(), b"Beauty is truth, truth beauty");
        let secret = <X25519 as Kem>::PrivateKey::from_bytes(&private).unwrap();
        let public: [u8; 32] = X25519::sk_to_pk(&secret).to_bytes().into();
        assert_eq!(public, hex("13640af826b722fc04feaa4de2f28fbd5ecc03623b317834e7ff4120dbe73062"));
        assert!(
            open(&private, (&psk, id), &encapsulated, b"Ode on a Grecian Urn", &sealed, b"Count-1").is_none()
        );
    }

    #[test]
    fn rst_3_a_sealed_data_key_opens_only_for_its_key_and_what_it_was_bound_to() {
        let (public, private) = generate();
        let sealed = public.seal(&[7; 32], b"header").unwrap();
        assert_eq!(private.open(&sealed, b"header").unwrap().as_ref(), &[7; 32]);
        assert!(private.open(&sealed, b"another header").is_none());
        assert!(generate().1.open(&sealed, b"header").is_none());
        for flipped in 0..SEALED_LEN {
            let mut changed = sealed;
            changed.data_key[flipped] ^= 1;
            assert!(private.open(&changed, b"header").is_none());
        }
    }

    /// RST-11: whoever knows the X25519 public key but not the secret that both halves share cannot forge a backup.
    #[test]
    fn rst_11_a_forger_with_the_x25519_public_key_alone_is_refused() {
        let (public, private) = generate();
        let forger = PublicKey { public: public.public, origin: Zeroizing::new([0; 32]) };
        assert!(private.open(&forger.seal(&[7; 32], b"header").unwrap(), b"header").is_none());
    }

    #[test]
    fn text_forms_are_read_back_and_not_mixed_up() {
        let (public, private) = generate();
        assert_eq!(PublicKey::from_text(&public.to_text()).unwrap().id(), private.id());
        let again = PrivateKey::from_text(&private.to_text()).unwrap();
        assert_eq!(again.private.as_ref(), private.private.as_ref());
        assert_eq!(again.origin.as_ref(), public.origin.as_ref());
        assert!(matches!(
            PublicKey::from_text(&private.to_text()),
            Err(KeyText::OtherHalf("the public one"))
        ));
        assert!(matches!(
            PrivateKey::from_text(&public.to_text()),
            Err(KeyText::OtherHalf("the private one"))
        ));
        for text in
            ["", "postern-nvram-public-1", "postern-nvram-public-1 AAAA", "postern-nvram-public-9 AAAA"]
        {
            assert_eq!(PublicKey::from_text(text).unwrap_err(), KeyText::Malformed);
        }
        let ring = KeyRing(vec![generate().1, private]);
        let read = KeyRing::from_text(&format!("# newest first\n\n{}", *ring.to_text())).unwrap();
        assert_eq!(
            read.0.iter().map(PrivateKey::id).collect::<Vec<_>>(),
            ring.0.iter().map(PrivateKey::id).collect::<Vec<_>>()
        );
        assert!(KeyRing::from_text("# none").is_err());
    }

    /// OPS-4: formatting a key shows neither half's secret bytes.
    #[test]
    fn ops_4_debug_shows_no_secret() {
        let (public, private) = generate();
        let shown = format!(
            "{public:?} {private:?} {:?}",
            KeyRing(vec![PrivateKey::from_text(&private.to_text()).unwrap()])
        );
        for secret in [private.private.as_ref(), private.origin.as_ref()] {
            let hex = format!("{:08x}", u32::from_be_bytes(*secret.first_chunk().unwrap()));
            let list = format!("{:?}", &secret[..4]);
            assert!(!shown.contains(&hex) && !shown.contains(list.trim_matches(['[', ']'])), "{shown}");
        }
    }
}
