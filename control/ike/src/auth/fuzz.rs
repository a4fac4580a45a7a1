//! Everything that reads certificates and identities, on arbitrary bytes. The fuzz target `ike_certificate`, the property
//! tests and the replay of its seeds call the same function.

use core::time::Duration;
use std::time::SystemTime;

use super::certificate::{Policy, Presented, Trust};
use super::files;
use super::identity::{Identity, IdentityPattern};
use super::signature::Signature;
use crate::message::IdData;
use crate::message::registry::{AuthMethod, CertEncoding, IdType};

/// What a part of an input is: its first byte; two bytes with the length follow, and as many bytes.
pub mod part {
    /// A CA certificate that is configured.
    pub const ANCHOR: u8 = 0;
    /// A CRL that is configured.
    pub const CONFIGURED_CRL: u8 = 1;
    /// A certificate that the peer sends.
    pub const CERTIFICATE: u8 = 2;
    /// A CRL that the peer sends.
    pub const CRL: u8 = 3;
    /// Its Identification payload: type and data.
    pub const IDENTITY: u8 = 4;
    /// Its AUTH payload: method and data.
    pub const SIGNATURE: u8 = 5;
    /// What was signed.
    pub const OCTETS: u8 = 6;
    /// A file, or text for an identity.
    pub const FILE: u8 = 7;
}

/// Nothing panics; what is shown has no control characters and is bounded; identities keep their bytes.
pub fn certificate(bytes: &[u8]) {
    let mut anchors = Vec::new();
    let mut crls = Vec::new();
    let mut presented = Presented::default();
    let mut identity = Identity::KeyId(Vec::new());
    let mut signature = Signature { method: AuthMethod::DIGITAL_SIGNATURE, data: Vec::new() };
    let mut octets: &[u8] = &[];
    let mut rest = bytes;
    while let Some(([kind, high, low], tail)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (data, tail) = tail.split_at(tail.len().min(length));
        rest = tail;
        let (first, body) = data.split_first().map_or((0, data), |(first, body)| (*first, body));
        match *kind {
            part::ANCHOR => anchors.push(data.to_vec()),
            part::CONFIGURED_CRL => crls.push(data.to_vec()),
            part::CERTIFICATE => presented.add(CertEncoding::X509_SIGNATURE, data),
            part::CRL => presented.add(CertEncoding::CRL, data),
            part::IDENTITY => identity = identified(&IdData { kind: IdType(first), data: body.to_vec() }),
            part::SIGNATURE => signature = Signature { method: AuthMethod(first), data: body.to_vec() },
            part::OCTETS => octets = data,
            _ => file(data),
        }
    }
    for require_crl in [false, true] {
        let policy = Policy { require_crl, allow_sha1: !require_crl };
        // Whatever cannot be configured is left out, so that the rest is still looked at.
        let readable = |der: &&Vec<u8>| Trust::new(core::slice::from_ref(*der), &[], policy).is_ok();
        let anchors: Vec<_> = anchors.iter().filter(readable).cloned().collect();
        let trust = Trust::new(&anchors, &crls, policy).or_else(|_| Trust::new(&anchors, &[], policy));
        let Ok(trust) = trust else { continue };
        assert_eq!(trust.authorities().len(), 20 * anchors.len());
        for hours in [0, 525_960] {
            let at = SystemTime::UNIX_EPOCH + Duration::from_hours(hours);
            match trust.verify(&presented, &identity, &signature, octets, at) {
                Ok(peer) => {
                    assert!(at <= peer.not_after && !presented.certificates.is_empty());
                    harmless(&format!("{} {}", peer.subject, peer.issuer));
                }
                Err(error) => harmless(&error.to_string()),
            }
        }
    }
}

fn identified(data: &IdData) -> Identity {
    let identity = Identity::from_data(data);
    assert_eq!(identity.to_data(), *data);
    harmless(&identity.to_string());
    assert!(IdentityPattern::Exact(identity.clone()).matches(&identity));
    identity
}

fn file(contents: &[u8]) {
    if let Err(error) = files::certificates(contents) {
        harmless(&error.to_string());
    }
    if let Err(error) = files::crls(contents) {
        harmless(&error.to_string());
    }
    if let Err(error) = files::private_key(contents) {
        harmless(&error.to_string());
    }
    if let Ok(pattern) = core::str::from_utf8(contents).unwrap_or_default().parse::<IdentityPattern>() {
        harmless(&pattern.to_string());
        // Long ones are not shown in full.
        if let Ok(again) = pattern.to_string().parse::<IdentityPattern>() {
            assert_eq!(again, pattern);
        }
    }
}

fn harmless(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
    assert!(text.len() < 64 * 1024, "{} bytes of text", text.len());
}
