//! EAP inside IKE_AUTH (RFC 7296 section 2.16): the identity and the MSCHAPv2 method (RFC 2759 in the packets of
//! draft-kamath-pppext-eap-mschapv2), for both ends.
//!
//! ```text
//! Server                             Client
//!   Request  Identity          ─►
//!                              ◄─    Response Identity
//!   Request  MSCHAPv2 Challenge─►
//!                              ◄─    Response MSCHAPv2 Response      proves that the client knows the password
//!   Request  MSCHAPv2 Success  ─►                                    proves that the server knows it
//!                              ◄─    Response MSCHAPv2 Success
//!   Success                    ─►                                    both have the MSK, for the last AUTH payloads
//! ```
//!
//! IKE carries each message once, in order and authenticated. So nothing is retransmitted here, and a message that does
//! not fit ends the authentication instead of being passed over: nothing better would come.

mod client;
mod server;
#[cfg(test)]
mod tests;

use core::fmt;

pub use client::{Client, ClientStep};
pub use server::{Server, ServerStep};

use crate::crypto::mschap::{Challenge, NtResponse};

/// Messages that one authentication takes at most, in one direction.
const ROUND_LIMIT: u8 = 16;
/// Longest name of a user in bytes (RFC 2759 section 4: 0 to 256 characters).
const NAME_LIMIT: usize = 256;
/// Value-Size of a Challenge.
const CHALLENGE_SIZE: u8 = 16;
/// Value-Size of a Response.
const RESPONSE_SIZE: u8 = 49;

macro_rules! numbers {
    ($( $(#[$doc:meta])* $name:ident { $( $constant:ident = $value:literal ),+ $(,)? } )+) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        struct $name(u8);

        impl $name {
            $( const $constant: Self = Self($value); )+
        }
    )+ };
}

numbers! {
    /// RFC 3748 section 4.
    Code { REQUEST = 1, RESPONSE = 2, SUCCESS = 3, FAILURE = 4 }
    /// RFC 3748 section 5.
    Kind { IDENTITY = 1, NOTIFICATION = 2, NAK = 3, MSCHAPV2 = 26 }
    /// Section 2 of the draft.
    OpCode { CHALLENGE = 1, RESPONSE = 2, SUCCESS = 3, FAILURE = 4 }
}

/// A message as it is read. What comes after its length is padding (RFC 3748 section 4).
#[derive(Clone, Copy, Debug)]
struct Packet<'a> {
    code: Code,
    id: u8,
    /// Of a request or response.
    kind: Option<Kind>,
    data: &'a [u8],
}

impl<'a> Packet<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let ([code, id, high, low], _) = bytes.split_first_chunk()?;
        let body = bytes.get(4..usize::from(u16::from_be_bytes([*high, *low])))?;
        let code = Code(*code);
        match code {
            Code::REQUEST | Code::RESPONSE => {
                let (kind, data) = body.split_first()?;
                Some(Self { code, id: *id, kind: Some(Kind(*kind)), data })
            }
            Code::SUCCESS | Code::FAILURE => Some(Self { code, id: *id, kind: None, data: &[] }),
            _ => None,
        }
    }

    /// Reads what is in a message of the MSCHAPv2 method.
    fn mschap(&self) -> Option<Mschap<'a>> {
        let (op, rest) = self.data.split_first()?;
        // A client's answers to Success and Failure are the code alone.
        let Some(([id, _, _], body)) = rest.split_first_chunk() else {
            return Some(Mschap::Bare(OpCode(*op)));
        };
        let sized =
            |size: u8| body.split_first().filter(|(length, _)| **length == size).map(|(_, rest)| rest);
        Some(match OpCode(*op) {
            OpCode::CHALLENGE => {
                let (challenge, _name) = sized(CHALLENGE_SIZE)?.split_first_chunk()?;
                Mschap::Challenge { id: *id, challenge }
            }
            OpCode::RESPONSE => {
                let (peer_challenge, rest) = sized(RESPONSE_SIZE)?.split_first_chunk()?;
                let (_reserved, rest) = rest.split_first_chunk::<8>()?;
                let (response, rest) = rest.split_first_chunk()?;
                let (_flags, name) = rest.split_first()?;
                Mschap::Response { id: *id, peer_challenge, response, name }
            }
            OpCode::SUCCESS => Mschap::Success { message: body },
            OpCode::FAILURE => Mschap::Failure { message: body },
            op => Mschap::Bare(op),
        })
    }
}

/// A message of the MSCHAPv2 method.
#[derive(Clone, Copy, Debug)]
enum Mschap<'a> {
    Challenge { id: u8, challenge: &'a Challenge },
    Response { id: u8, peer_challenge: &'a Challenge, response: &'a NtResponse, name: &'a [u8] },
    Success { message: &'a [u8] },
    Failure { message: &'a [u8] },
    Bare(OpCode),
}

/// Writes a message. Parts that do not fit its length field are cut off; none is that long.
fn packet(code: Code, id: u8, kind: Option<Kind>, parts: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![code.0, id, 0, 0];
    out.extend(kind.map(|kind| kind.0));
    for part in parts {
        out.extend_from_slice(part);
    }
    let length = u16::try_from(out.len()).unwrap_or(u16::MAX);
    out.truncate(usize::from(length));
    if let Some(field) = out.get_mut(2..4) {
        field.copy_from_slice(&length.to_be_bytes());
    }
    out
}

/// Writes a message of the MSCHAPv2 method that has an identifier and a length of its own.
fn mschap(code: Code, id: u8, op: OpCode, mschap_id: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length = 4 + parts.iter().map(|part| part.len()).sum::<usize>();
    let [high, low] = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    let head = [op.0, mschap_id, high, low];
    let mut all: Vec<&[u8]> = vec![&head];
    all.extend(parts);
    packet(code, id, Some(Kind::MSCHAPV2), &all)
}

/// A user's name without what a Windows peer puts in front of a backslash; what is hashed has only this (RFC 2759
/// section 8.2).
fn without_domain(name: &[u8]) -> &[u8] {
    name.rsplit(|byte| *byte == b'\\').next().unwrap_or(name)
}

/// What the other end calls itself, safe to log.
struct Shown<'a>(&'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(self.0.get(..64).unwrap_or(self.0));
        write!(f, "{:?}", &*text)
    }
}

/// What the fuzz target, the property tests and the corpus replay all call: both machines take any messages without a
/// panic, and neither succeeds at the word of someone who does not know the password. Each message is a byte with its
/// length and that many bytes; a message that begins with 0xff is the other end's own last one with the rest laid over it.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    struct Zeros;
    impl crate::Random for Zeros {
        fn fill(&mut self, out: &mut [u8]) {
            out.fill(0);
        }
    }

    let users = [("joe".to_owned(), crate::Secret::new(b"secret".as_slice()))].into_iter().collect();
    let mut server = Server::new(std::sync::Arc::new(users), "gw");
    let mut client = Client::new("joe", crate::Secret::new(b"another".as_slice()));
    let mut to_client = server.start(&mut Zeros);
    let mut to_server = Vec::new();
    let mut rest = bytes;
    while let Some((length, tail)) = rest.split_first() {
        let (message, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = tail;
        let laid_over = |base: &[u8]| match message.split_first() {
            Some((0xff, over)) => {
                over.iter().chain(base.get(over.len()..).unwrap_or_default()).copied().collect::<Vec<u8>>()
            }
            _ => message.to_vec(),
        };
        match client.handle(&laid_over(&to_client), &mut Zeros) {
            ClientStep::Send(message) => to_server = message,
            ClientStep::Success { .. } => unreachable!("the gateway has not proven anything"),
            ClientStep::Failure { .. } => {}
        }
        match server.handle(&laid_over(&to_server), &mut Zeros) {
            ServerStep::Send(message) => to_client = message,
            ServerStep::Success { .. } => unreachable!("the client has not proven anything"),
            ServerStep::Failure { .. } => {}
        }
    }
}
