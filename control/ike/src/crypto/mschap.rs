//! What EAP-MSCHAPv2 is made of: RFC 2759 section 8 and, for the key that it leads to, RFC 3079 section 3.
//!
//! MD4, DES and SHA-1 are broken for most purposes and stay within this file; what protects the exchange is the IKE SA
//! around it, whose responder has proven who it is by a certificate.

use core::fmt::Write as _;

use des::Des;
use des::cipher::{Block, BlockCipherEncrypt, KeyInit};
use md4::{Digest, Md4};
use zeroize::Zeroizing;

use super::digest::sha1;
use crate::Secret;

/// A challenge of the authenticator or of the peer.
pub type Challenge = [u8; 16];

/// The peer's answer.
pub type NtResponse = [u8; 24];

/// The hash of a password that everything else is computed from; worth as much as the password. Wiped on drop.
pub struct PasswordHash(Zeroizing<[u8; 16]>);

impl PasswordHash {
    /// NtPasswordHash (section 8.3): MD4 of the password in UTF-16, little endian.
    pub fn of(password: &str) -> Self {
        let mut unicode = Zeroizing::new(Vec::with_capacity(2 * password.len()));
        for unit in password.encode_utf16() {
            unicode.extend_from_slice(&unit.to_le_bytes());
        }
        Self(md4(&unicode))
    }

    /// GenerateNTResponse (section 8.1). `user` is the name as sent, without what a Windows peer puts in front of a
    /// backslash.
    pub fn nt_response(&self, authenticator: &Challenge, peer: &Challenge, user: &[u8]) -> NtResponse {
        let challenge = challenge_hash(authenticator, peer, user);
        // ChallengeResponse (section 8.5): the hash, padded with zeros to 21 bytes, is three DES keys.
        let mut keys = Zeroizing::new([0; 21]);
        for (to, from) in keys.iter_mut().zip(self.0.iter()) {
            *to = *from;
        }
        let mut response = [0; 24];
        for (out, key) in response.as_chunks_mut::<8>().0.iter_mut().zip(keys.as_chunks::<7>().0) {
            *out = des(*key, challenge);
        }
        response
    }

    /// GenerateAuthenticatorResponse (section 8.7): "S=" and 40 hexadecimal digits.
    pub fn authenticator_response(
        &self,
        response: &NtResponse,
        authenticator: &Challenge,
        peer: &Challenge,
        user: &[u8],
    ) -> String {
        let hash = md4(&*self.0);
        let digest = sha1(&[&*hash, response, b"Magic server to client signing constant"]);
        let challenge = challenge_hash(authenticator, peer, user);
        let digest = sha1(&[&digest, &challenge, b"Pad to make it do more than one iteration"]);
        let mut text = String::with_capacity(42);
        text.push_str("S=");
        for byte in digest {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02X}");
        }
        text
    }

    /// The EAP master session key: MasterReceiveKey and MasterSendKey of the authenticator (RFC 3079 section 3.3), 16 bytes
    /// each, and zeros up to 64 bytes, as RFC 3748 section 7.10 wants at least.
    pub fn master_session_key(&self, response: &NtResponse) -> Secret {
        let hash = md4(&*self.0);
        let master = Zeroizing::new(sha1(&[&*hash, response, b"This is the MPPE Master Key"]));
        let (master, _) = master.split_at(16);
        let start_key = |magic: &[u8]| Zeroizing::new(sha1(&[master, &[0; 40], magic, &[0xf2; 40]]));
        let receive = start_key(SERVER_RECEIVES);
        let send = start_key(SERVER_SENDS);
        let mut out = vec![0; 64];
        for (to, from) in out.iter_mut().zip(receive.iter().take(16).chain(send.iter().take(16))) {
            *to = *from;
        }
        Secret::new(out)
    }
}

const SERVER_RECEIVES: &[u8] =
    b"On the client side, this is the send key; on the server side, it is the receive key.";
const SERVER_SENDS: &[u8] =
    b"On the client side, this is the receive key; on the server side, it is the send key.";

/// ChallengeHash (section 8.2).
fn challenge_hash(authenticator: &Challenge, peer: &Challenge, user: &[u8]) -> [u8; 8] {
    let mut out = [0; 8];
    for (to, from) in out.iter_mut().zip(sha1(&[peer, authenticator, user])) {
        *to = from;
    }
    out
}

fn md4(data: &[u8]) -> Zeroizing<[u8; 16]> {
    Zeroizing::new(Md4::digest(data).into())
}

/// DesEncrypt (section 8.6): 56 bits become a key of 8 bytes with 7 bits each, whose parity DES does not look at.
fn des(key: [u8; 7], clear: [u8; 8]) -> [u8; 8] {
    let bits = key.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
    let spread = (0..8).fold(0_u64, |spread, group| spread | (bits >> (7 * group) & 0x7f) << (8 * group + 1));
    let cipher = Des::new(&(*Zeroizing::new(spread.to_be_bytes())).into());
    let mut block = Block::<Des>::from(clear);
    cipher.encrypt_block(&mut block);
    block.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::testing::hex;

    const USER: &[u8] = b"User";

    fn challenges() -> (Challenge, Challenge) {
        (
            hex("5B 5D 7C 7D 7B 3F 2F 3E 3C 2C 60 21 32 26 26 28").try_into().unwrap(),
            hex("21 40 23 24 25 5E 26 2A 28 29 5F 2B 3A 33 7C 7E").try_into().unwrap(),
        )
    }

    /// IKE-3: RFC 2759 section 9.2.
    #[test]
    fn ike_3_responses_of_rfc_2759() {
        let (authenticator, peer) = challenges();
        let password = PasswordHash::of("clientPass");
        assert_eq!(password.0.as_slice(), hex("44 EB BA 8D 53 12 B8 D6 11 47 44 11 F5 69 89 AE"));
        assert_eq!(challenge_hash(&authenticator, &peer, USER).as_slice(), hex("D0 2E 43 86 BC E9 12 26"));
        let response = password.nt_response(&authenticator, &peer, USER);
        assert_eq!(
            response.as_slice(),
            hex("82 30 9E CD 8D 70 8B 5E A0 8F AA 39 81 CD 83 54 42 33 11 4A 3D 85 D6 DF")
        );
        assert_eq!(
            password.authenticator_response(&response, &authenticator, &peer, USER),
            "S=407A5589115FD0D6209F510FE9C04566932CDA56"
        );
    }

    /// IKE-3: RFC 3079 section 3.5.3 has the key that the server sends with.
    #[test]
    fn ike_3_master_session_key_of_rfc_3079() {
        let (authenticator, peer) = challenges();
        let password = PasswordHash::of("clientPass");
        let response = password.nt_response(&authenticator, &peer, USER);
        let msk = password.master_session_key(&response);
        assert_eq!(msk.len(), 64);
        assert_eq!(msk.expose()[16..32], hex("8B 7C DC 14 9B 99 3A 1B A1 18 CB 15 3F 56 DC CB"));
        assert_ne!(msk.expose()[16..32], msk.expose()[..16]);
        assert_eq!(msk.expose()[32..], [0; 32]);
    }

    /// IKE-3, IKE-5: an EAP-MSCHAPv2 exchange of two strongSwan 5.9.8, with the key that they logged.
    #[test]
    fn ike_3_strongswan_exchange() {
        let authenticator = hex("074509bf1daacc11e384ec20c22e4273").try_into().unwrap();
        let peer = hex("d6a17d8610eaff3edf1213bbc924b989").try_into().unwrap();
        let password = PasswordHash::of("päss word");
        let response = password.nt_response(&authenticator, &peer, b"joe");
        assert_eq!(response.as_slice(), hex("eede36ec1142e720e0cc5dfae36a9e3987a5431ddec49426"));
        assert_eq!(
            password.authenticator_response(&response, &authenticator, &peer, b"joe"),
            "S=250C11EF9093707DFB11B575F6C5B2E8B86494F9"
        );
        assert_eq!(
            password.master_session_key(&response).expose()[..32],
            hex("15f3a5b927876066c1e2fa934484ec2f1ebd9c6f242758b02232b2a0e79f394e")
        );
    }
}
