//! The road warrior's end.

use core::fmt;

use subtle::ConstantTimeEq;

use super::{
    Code, Kind, Mschap, OpCode, Packet, RESPONSE_SIZE, ROUND_LIMIT, Shown, mschap, packet, without_domain,
};
use crate::crypto::mschap::{Challenge, PasswordHash};
use crate::{Random, Secret};

/// Authenticates one user at a gateway. `Debug` shows no secret.
pub struct Client {
    user: String,
    password: Secret,
    rounds: u8,
    state: State,
}

enum State {
    Waiting,
    /// The proof that the gateway has to bring, and the key that then counts.
    Responded {
        proof: String,
        msk: Secret,
    },
    /// The gateway knows the password as well.
    Verified(Secret),
    /// It said why not.
    Refused(String),
    Done,
}

/// What comes of a gateway's message.
#[derive(Debug)]
pub enum ClientStep {
    /// Go on.
    Send(Vec<u8>),
    /// Both have proven that they know the password.
    Success {
        /// Master session key.
        msk: Secret,
    },
    /// It failed.
    Failure {
        /// Why, for people.
        why: String,
    },
}

impl Client {
    /// For one authentication; the password is UTF-8.
    pub fn new(user: impl Into<String>, password: Secret) -> Self {
        Self { user: user.into(), password, rounds: 0, state: State::Waiting }
    }

    /// Takes the gateway's message.
    pub fn handle(&mut self, bytes: &[u8], random: &mut dyn Random) -> ClientStep {
        self.rounds = self.rounds.saturating_add(1);
        let state = core::mem::replace(&mut self.state, State::Done);
        if self.rounds > ROUND_LIMIT {
            return failure("the gateway does not come to an end");
        }
        let Some(request) = Packet::read(bytes) else {
            return failure("the gateway's EAP message cannot be read");
        };
        match (request.code, request.kind) {
            (Code::REQUEST, Some(Kind::IDENTITY)) if matches!(state, State::Waiting) => {
                self.state = State::Waiting;
                let data = [self.user.as_bytes()];
                ClientStep::Send(packet(Code::RESPONSE, request.id, Some(Kind::IDENTITY), &data))
            }
            // RFC 3748 section 5.2: to be answered at any time.
            (Code::REQUEST, Some(Kind::NOTIFICATION)) => {
                self.state = state;
                ClientStep::Send(packet(Code::RESPONSE, request.id, Some(Kind::NOTIFICATION), &[]))
            }
            (Code::REQUEST, Some(Kind::MSCHAPV2)) => self.mschap(state, &request, random),
            // RFC 3748 section 5.3.1: what this end would have instead.
            (Code::REQUEST, Some(_)) if matches!(state, State::Waiting) => {
                self.state = State::Waiting;
                ClientStep::Send(packet(Code::RESPONSE, request.id, Some(Kind::NAK), &[&[Kind::MSCHAPV2.0]]))
            }
            (Code::SUCCESS, _) => match state {
                State::Verified(msk) => ClientStep::Success { msk },
                _ => failure(
                    "the gateway ends the authentication without having proven that it knows the password",
                ),
            },
            (Code::FAILURE, _) => match state {
                State::Refused(why) => ClientStep::Failure { why },
                _ => failure("the gateway refuses the user"),
            },
            _ => failure("the gateway's EAP message does not fit"),
        }
    }

    fn mschap(&mut self, state: State, request: &Packet<'_>, random: &mut dyn Random) -> ClientStep {
        match (state, request.mschap()) {
            (State::Waiting, Some(Mschap::Challenge { id, challenge })) => {
                self.respond(request.id, id, challenge, random)
            }
            (State::Responded { proof, msk }, Some(Mschap::Success { message, .. })) => {
                let shown = message.get(..proof.len()).unwrap_or_default().to_ascii_uppercase();
                if !bool::from(proof.as_bytes().ct_eq(&shown)) {
                    return failure("the gateway does not know the user's password");
                }
                self.state = State::Verified(msk);
                let data: [&[u8]; 1] = [&[OpCode::SUCCESS.0]];
                ClientStep::Send(packet(Code::RESPONSE, request.id, Some(Kind::MSCHAPV2), &data))
            }
            (State::Responded { .. }, Some(Mschap::Failure { message, .. })) => {
                self.state = State::Refused(refusal(message));
                let data: [&[u8]; 1] = [&[OpCode::FAILURE.0]];
                ClientStep::Send(packet(Code::RESPONSE, request.id, Some(Kind::MSCHAPV2), &data))
            }
            _ => failure("the gateway's MSCHAPv2 message does not fit"),
        }
    }

    fn respond(
        &mut self,
        id: u8,
        mschap_id: u8,
        challenge: &Challenge,
        random: &mut dyn Random,
    ) -> ClientStep {
        let Ok(password) = core::str::from_utf8(self.password.expose()) else {
            return failure("the configured password is not UTF-8");
        };
        let mut peer_challenge = Challenge::default();
        random.fill(&mut peer_challenge);
        let hash = PasswordHash::of(password);
        let name = without_domain(self.user.as_bytes());
        let response = hash.nt_response(challenge, &peer_challenge, name);
        self.state = State::Responded {
            proof: hash.authenticator_response(&response, challenge, &peer_challenge, name),
            msk: hash.master_session_key(&response),
        };
        let parts: [&[u8]; 6] =
            [&[RESPONSE_SIZE], &peer_challenge, &[0; 8], &response, &[0], self.user.as_bytes()];
        ClientStep::Send(mschap(Code::RESPONSE, id, OpCode::RESPONSE, mschap_id, &parts))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Waiting => "Waiting",
            State::Responded { .. } => "Responded",
            State::Verified(_) => "Verified",
            State::Refused(_) => "Refused",
            State::Done => "Done",
        };
        f.debug_struct("Client").field("user", &self.user).field("state", &state).finish_non_exhaustive()
    }
}

fn failure(why: &str) -> ClientStep {
    ClientStep::Failure { why: why.to_owned() }
}

/// What a Failure request says: `E=691 R=1 C=… V=3 M=text` (RFC 2759 section 6).
fn refusal(message: &[u8]) -> String {
    let code = message
        .split(|byte| *byte == b' ')
        .find_map(|word| word.strip_prefix(b"E="))
        .and_then(|digits| core::str::from_utf8(digits).ok());
    match code {
        Some("646") => "the gateway refuses the user: not at this time of day".to_owned(),
        Some("647") => "the gateway refuses the user: the account is disabled".to_owned(),
        Some("648") => "the gateway refuses the user: the password has expired".to_owned(),
        Some("649") => "the gateway refuses the user: no permission to connect".to_owned(),
        Some("691") => "the gateway refuses the user: wrong name or password".to_owned(),
        _ => format!("the gateway refuses the user: {}", Shown(message)),
    }
}
