//! `version = 1` of a connection: IKEv1, and what only that has.

use std::collections::BTreeMap;
use std::sync::Arc;

use postern_ike::config::{Connection as IkeConnection, LocalAuth, V1, Xauth};
use postern_ike::v1::unusable;
use toml::de::DeValue;

use super::Context;
use super::values::one_of;
use crate::config::reader::{Read, Table, expected};
use crate::digest::sha256;

/// Major version of IKE.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

impl Context<'_> {
    /// `version`, `aggressive` and `xauth`; with a digest of the secrets in them.
    pub(super) fn version(&self, table: &mut Table<'_, '_>) -> (Option<V1>, [u8; 32]) {
        let version = table.or("version", Version::V2);
        let given = table.has("xauth");
        let aggressive = table.has("aggressive");
        let xauth = table.table("xauth");
        if version == Version::V2 {
            if given {
                let message = "is of IKEv1 alone (version = 1); with IKEv2 use method = \"eap-mschapv2\"";
                table.error(table.span.clone(), "xauth", message);
            }
            if aggressive {
                table.error(table.span.clone(), "aggressive", "is of IKEv1 alone (version = 1)");
            }
            return (None, [0; 32]);
        }
        let aggressive = table.or("aggressive", false);
        let none = [0; 32];
        let (xauth, digest) = xauth.map_or((Xauth::None, none), |mut xauth| {
            let read = self.xauth(&mut xauth);
            xauth.finish();
            read.unwrap_or((Xauth::None, none))
        });
        (Some(V1 { xauth, aggressive }), digest)
    }

    fn xauth(&self, table: &mut Table<'_, '_>) -> Option<(Xauth, [u8; 32])> {
        if table.has("user") {
            let user = table.need::<String>("user").map(|found| found.value);
            let (user, password) = user.zip(self.password(table))?;
            let digest = sha256(&[b"xauth", user.as_bytes(), password.expose()]);
            return Some((Xauth::Client { user, password }, digest));
        }
        let users = self.users(table)?;
        let sorted: BTreeMap<_, _> = users.iter().collect();
        let parts = sorted.iter().flat_map(|(user, password)| [user.as_bytes(), password.expose()]);
        let digest = sha256(&parts.collect::<Vec<_>>());
        Some((Xauth::Server(Arc::new(users)), digest))
    }

    /// What a connection of IKEv1 cannot be.
    pub(super) fn check_v1(&self, ike: &IkeConnection, span: &core::ops::Range<usize>) {
        let Some(V1 { xauth, aggressive }) = &ike.v1 else { return };
        let key = format!("connection[{}]", ike.name);
        if let Some(problem) = unusable(ike) {
            self.report.error(span.clone(), &key, problem);
        }
        if *aggressive {
            let message = match ike.local_auth {
                LocalAuth::Psk(_) => {
                    "switches aggressive mode on: identities are in the clear, and whoever begins may try guesses of the \
                     shared secret offline; use it only for a peer that has no main mode, with a long random secret"
                }
                _ => {
                    "switches aggressive mode on: identities are in the clear; use it only for a peer that has no main mode"
                }
            };
            self.report.warn(span.clone(), &format!("{key}.aggressive"), message);
        }
        if matches!(xauth, Xauth::Server(_)) && ike.remote.is_some() {
            let message =
                "has `remote`, but with xauth.users the clients begin: it is never used to initiate";
            self.report.warn(span.clone(), &key, message);
        }
    }
}

impl Read for Version {
    const EXPECTED: &'static str = "1 or 2";

    fn read(value: DeValue<'_>) -> Result<Self, String> {
        let found = match &value {
            DeValue::Integer(number) => match number.as_str() {
                "1" => Some(Self::V1),
                "2" => Some(Self::V2),
                _ => None,
            },
            _ => one_of(&value, &[("1", Self::V1), ("v1", Self::V1), ("2", Self::V2), ("v2", Self::V2)]),
        };
        found.ok_or_else(expected::<Self>)
    }
}
