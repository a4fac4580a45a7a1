//! Key tables for Wireshark and tshark (`ike.keylog`): with them captures of IKE and ESP are decrypted. A debugging aid
//! that gives all secrecy away; the daemon refuses it without a flag and warns while it is on.
//!
//! The directory serves as `WIRESHARK_CONFIG_DIR`: `ikev2_decryption_table` and `esp_sa`, a line an SA, newest last, in
//! files that only their owner can read. Both programs skip algorithms they do not know.

use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use postern_ike::Secret;
use postern_ike::crypto::keys::IkeKeys;
use postern_ike::message::IkeSpi;
use postern_ike::message::registry::{EncrId, IntegId, ProtocolId};
use postern_ike::negotiate::IkeSuite;
use postern_ike::output::ChildSa;
use tracing::warn;
use zeroize::Zeroizing;

/// The open tables.
#[derive(Debug)]
pub struct KeyLog {
    ike: File,
    esp: File,
}

impl KeyLog {
    /// Opens the tables in `directory`, which is made if need be.
    pub fn open(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let open =
            |name: &str| OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join(name));
        Ok(Self { ike: open("ikev2_decryption_table")?, esp: open("esp_sa")? })
    }

    /// Notes the keys of an IKE SA.
    pub fn ike(&self, suite: &IkeSuite, (spi_i, spi_r): (IkeSpi, IkeSpi), keys: &IkeKeys) {
        let encr = match suite.encr {
            EncrId::AES_GCM_16 => format!("AES-GCM-{} with 16 octet ICV [RFC5282]", suite.key_bits),
            EncrId::AES_CBC => format!("AES-CBC-{} [RFC3602]", suite.key_bits),
            other => other.to_string(),
        };
        let integ = match suite.integ {
            IntegId::NONE => "NONE [RFC4306]",
            IntegId::HMAC_SHA1_96 => "HMAC_SHA1_96 [RFC2404]",
            IntegId::HMAC_SHA2_256_128 => "HMAC_SHA2_256_128 [RFC4868]",
            IntegId::HMAC_SHA2_384_192 => "HMAC_SHA2_384_192 [RFC4868]",
            IntegId::HMAC_SHA2_512_256 => "HMAC_SHA2_512_256 [RFC4868]",
            _ => "unknown",
        };
        let [ei, er, ai, ar] = [&keys.sk_ei, &keys.sk_er, &keys.sk_ai, &keys.sk_ar].map(hex);
        let [ei, er, ai, ar] = [&ei, &er, &ai, &ar].map(|key| key.as_str());
        let line = format!("{spi_i},{spi_r},{ei},{er},\"{encr}\",{ai},{ar},\"{integ}\"\n");
        write(&self.ike, line);
    }

    /// Notes the keys of a CHILD_SA of ESP.
    pub fn child(&self, child: &ChildSa) {
        if child.protocol != ProtocolId::ESP {
            return;
        }
        let encr = match child.encr {
            EncrId::AES_GCM_16 => "AES-GCM with 16 octet ICV [RFC4106]",
            EncrId::AES_CBC => "AES-CBC [RFC3602]",
            EncrId::CHACHA20_POLY1305 => "ChaCha20 with Poly1305 [RFC7634]",
            _ => "NULL",
        };
        let integ = match child.integ {
            IntegId::HMAC_SHA1_96 => "HMAC-SHA-1-96 [RFC2404]",
            IntegId::HMAC_SHA2_256_128 => "HMAC-SHA-256-128 [RFC4868]",
            IntegId::HMAC_SHA2_384_192 => "HMAC-SHA-384-192 [RFC4868]",
            IntegId::HMAC_SHA2_512_256 => "HMAC-SHA-512-256 [RFC4868]",
            _ => "NULL",
        };
        let directions = [
            (child.remote, child.local, child.spi_in, &child.keys_in),
            (child.local, child.remote, child.spi_out, &child.keys_out),
        ];
        for (from, to, spi, (encryption, integrity)) in directions {
            let family = if matches!(from, IpAddr::V4(_)) { "IPv4" } else { "IPv6" };
            let [key, auth] = [encryption, integrity].map(|secret| {
                let digits = hex(secret);
                Zeroizing::new(if digits.is_empty() { String::new() } else { format!("0x{}", *digits) })
            });
            let (key, auth) = (key.as_str(), auth.as_str());
            let line = format!(
                "\"{family}\",\"{from}\",\"{to}\",\"0x{spi:08x}\",\"{encr}\",\"{key}\",\"{integ}\",\"{auth}\"\n"
            );
            write(&self.esp, line);
        }
    }
}

fn hex(secret: &Secret) -> Zeroizing<String> {
    let mut digits = Zeroizing::new(String::with_capacity(2 * secret.len()));
    for byte in secret.expose() {
        // Writing to a string does not fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

fn write(mut file: &File, line: String) {
    let line = Zeroizing::new(line);
    if let Err(error) = file.write_all(line.as_bytes()) {
        warn!("the key table cannot be written: {error}");
    }
}
