//! The gateway's end.

use core::fmt;
use std::collections::HashMap;
use std::sync::Arc;

use subtle::ConstantTimeEq;

use super::{
    CHALLENGE_SIZE, Code, Kind, Mschap, NAME_LIMIT, OpCode, Packet, ROUND_LIMIT, Shown, mschap, packet,
    without_domain,
};
use crate::crypto::mschap::{Challenge, NtResponse, PasswordHash};
use crate::{Random, Secret};

/// Authenticates one client. `Debug` shows no secret.
pub struct Server {
    users: Arc<HashMap<String, Secret>>,
    name: String,
    /// Identifier of the request that waits for an answer.
    id: u8,
    rounds: u8,
    state: State,
}

enum State {
    Identity,
    Challenged(Challenge),
    /// The client has proven who it is, and has yet to say that it believes this end.
    Proven {
        user: String,
        msk: Secret,
    },
    /// A Failure request was sent.
    Refused(String),
    Done,
}

/// What comes of a client's message.
#[derive(Debug)]
pub enum ServerStep {
    /// Go on.
    Send(Vec<u8>),
    /// It is who it says.
    Success {
        /// EAP Success.
        send: Vec<u8>,
        /// Master session key.
        msk: Secret,
        /// The user, as in the configuration.
        user: String,
    },
    /// It is not.
    Failure {
        /// EAP Failure.
        send: Vec<u8>,
        /// Why, for people.
        why: String,
    },
}

impl Server {
    /// For one client; `users` are passwords (UTF-8) by name, `name` is what this end calls itself.
    pub fn new(users: Arc<HashMap<String, Secret>>, name: impl Into<String>) -> Self {
        let mut name = name.into();
        while name.len() > NAME_LIMIT {
            name.pop();
        }
        Self { users, name, id: 0, rounds: 0, state: State::Identity }
    }

    /// The first message: an Identity request.
    pub fn start(&mut self, random: &mut dyn Random) -> Vec<u8> {
        let mut id = [0];
        random.fill(&mut id);
        [self.id] = id;
        self.state = State::Identity;
        packet(Code::REQUEST, self.id, Some(Kind::IDENTITY), &[])
    }

    /// Takes the client's message.
    pub fn handle(&mut self, bytes: &[u8], random: &mut dyn Random) -> ServerStep {
        self.rounds = self.rounds.saturating_add(1);
        let state = core::mem::replace(&mut self.state, State::Done);
        if self.rounds > ROUND_LIMIT {
            return self.fail("the client does not come to an end".to_owned());
        }
        let Some(packet) = Packet::read(bytes) else {
            return self.fail("the client's EAP message cannot be read".to_owned());
        };
        if packet.code != Code::RESPONSE {
            return self
                .fail(format!("the client sends an EAP message of code {}, not a response", packet.code.0));
        }
        if packet.id != self.id {
            return self.fail("the client answers another EAP request than the last one".to_owned());
        }
        match (state, packet.kind) {
            (State::Identity, Some(Kind::IDENTITY)) => self.challenge(random),
            (State::Challenged(challenge), Some(Kind::MSCHAPV2)) => self.response(&challenge, &packet),
            (State::Proven { user, msk }, Some(Kind::MSCHAPV2)) => match packet.mschap() {
                Some(Mschap::Bare(OpCode::SUCCESS) | Mschap::Success { .. }) => {
                    ServerStep::Success { send: super::packet(Code::SUCCESS, self.id, None, &[]), msk, user }
                }
                // It found that this end does not know its password.
                _ => self.fail(format!(
                    "the client of user {} does not accept this gateway",
                    Shown(user.as_bytes())
                )),
            },
            (State::Refused(why), _) => self.fail(why),
            (State::Challenged(_), Some(Kind::NAK)) => {
                let wanted: Vec<String> = packet.data.iter().take(8).map(u8::to_string).collect();
                self.fail(format!(
                    "the client does not want MSCHAPv2 but EAP method {}; nothing else is supported",
                    if wanted.is_empty() { "0".to_owned() } else { wanted.join(" or ") }
                ))
            }
            _ => self.fail("the client's EAP message does not fit the one that it answers".to_owned()),
        }
    }

    fn challenge(&mut self, random: &mut dyn Random) -> ServerStep {
        let mut challenge = Challenge::default();
        random.fill(&mut challenge);
        self.id = self.id.wrapping_add(1);
        let parts: [&[u8]; 3] = [&[CHALLENGE_SIZE], &challenge, self.name.as_bytes()];
        let send = mschap(Code::REQUEST, self.id, OpCode::CHALLENGE, self.id, &parts);
        self.state = State::Challenged(challenge);
        ServerStep::Send(send)
    }

    fn response(&mut self, challenge: &Challenge, packet: &Packet<'_>) -> ServerStep {
        let Some(Mschap::Response { id, peer_challenge, response, name }) = packet.mschap() else {
            return self.fail("the client's answer to the challenge cannot be read".to_owned());
        };
        if id != self.id || name.len() > NAME_LIMIT {
            return self.fail("the client's answer to the challenge does not fit it".to_owned());
        }
        // A user that is not known takes as long as one with a wrong password, and is told the same.
        let known = self.user(name);
        let nobody = Secret::default();
        let (user, password) = known.unwrap_or(("", &nobody));
        let Ok(password) = core::str::from_utf8(password.expose()) else {
            return self.fail(format!("the configured password of user {} is not UTF-8", Shown(name)));
        };
        let hash = PasswordHash::of(password);
        let hashed_name = without_domain(name);
        let expected: NtResponse = hash.nt_response(challenge, peer_challenge, hashed_name);
        let right = bool::from(expected.ct_eq(response));
        let proof = hash.authenticator_response(response, challenge, peer_challenge, hashed_name);
        let msk = hash.master_session_key(response);
        let user = user.to_owned();
        let why = match (known.is_some(), right) {
            (true, true) => {
                self.id = self.id.wrapping_add(1);
                self.state = State::Proven { user, msk };
                let parts: [&[u8]; 2] = [proof.as_bytes(), b" M=OK"];
                return ServerStep::Send(mschap(Code::REQUEST, self.id, OpCode::SUCCESS, id, &parts));
            }
            (true, false) => format!("the password of user {} is wrong", Shown(name)),
            (false, _) => format!("there is no user {}", Shown(name)),
        };
        // RFC 2759 section 6: ERROR_AUTHENTICATION_FAILURE, no retry. The challenge would be for one.
        self.id = self.id.wrapping_add(1);
        self.state = State::Refused(why);
        let message = b"E=691 R=0 C=00000000000000000000000000000000 V=3 M=Authentication failed";
        ServerStep::Send(mschap(Code::REQUEST, self.id, OpCode::FAILURE, id, &[message]))
    }

    /// The configured user of this name, with or without its domain.
    fn user(&self, name: &[u8]) -> Option<(&str, &Secret)> {
        [name, without_domain(name)]
            .into_iter()
            .filter_map(|name| core::str::from_utf8(name).ok())
            .find_map(|name| self.users.get_key_value(name))
            .map(|(name, password)| (name.as_str(), password))
    }

    fn fail(&mut self, why: String) -> ServerStep {
        self.state = State::Done;
        ServerStep::Failure { send: packet(Code::FAILURE, self.id, None, &[]), why }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("users", &self.users.len())
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Identity => "Identity",
            Self::Challenged(_) => "Challenged",
            Self::Proven { .. } => "Proven",
            Self::Refused(_) => "Refused",
            Self::Done => "Done",
        })
    }
}
