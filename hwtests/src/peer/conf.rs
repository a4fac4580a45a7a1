//! strongSwan's configuration files, from the same [`Connection`] that Postern's are written from.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Options;
use crate::config::ike::{Auth, Child, Connection, Pool};

const PLUGINS: &str = "openssl random nonce aes sha1 sha2 md5 hmac kdf gcm ccm chapoly drbg gmp curve25519 ml pem pkcs1 \
    pkcs8 pkcs12 x509 pubkey constraints revocation mgf1 fips-prf eap-identity eap-mschapv2 xauth-generic socket-default \
    kernel-libipsec kernel-netlink vici attr";

/// The daemon's `strongswan.conf`.
pub fn daemon(dir: &Path, options: &Options) -> String {
    let dir = dir.display();
    let Options { charon, log, virtual_address, .. } = options;
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    let virtual_address = yes_no(*virtual_address);
    format!(
        "charon-systemd {{
  load = {PLUGINS}
  install_virtual_ip = {virtual_address}
  retransmit_timeout = 0.5
  retransmit_base = 1.5
  retransmit_tries = 4
  {charon}
  plugins {{
    vici {{ socket = unix://{dir}/vici }}
    kernel-libipsec {{ raw_esp = yes }}
  }}
  filelog {{ f {{
      path = {dir}/log
      time_format = %H:%M:%S
      time_add_ms = yes
      ike_name = yes
      flush_line = yes
      default = 1
      {log}
  }} }}
  journal {{ default = -1 }}
}}
swanctl {{ socket = unix://{dir}/vici }}
"
    )
}

/// Writes `swanctl.conf` and the credentials that it names into `dir`, in place of what was there.
pub fn connections(dir: &Path, connections: &[Connection], pools: &[Pool]) -> Result<()> {
    for folder in ["private", "x509ca"] {
        let folder = dir.join(folder);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
    }
    let (mut text, mut secrets) = (String::from("connections {\n"), String::new());
    for connection in connections {
        write_connection(&mut text, connection)?;
        write_secrets(&mut secrets, connection)?;
        keep_files(dir, connection)?;
    }
    text += "}\npools {\n";
    for Pool { name, range } in pools {
        let dns = connections.iter().flat_map(|connection| &connection.dns);
        let dns: Vec<_> = dns.map(ToString::to_string).collect();
        writeln!(text, "{name} {{ addrs = {range}")?;
        if !dns.is_empty() {
            writeln!(text, "  dns = {}", dns.join(", "))?;
        }
        text += "}\n";
    }
    write!(text, "}}\nsecrets {{\n{secrets}}}\n")?;
    Ok(fs::write(dir.join("swanctl.conf"), text)?)
}

fn write_connection(text: &mut String, connection: &Connection) -> Result<()> {
    let Connection { name, local, remote, remote_nets, local_auth, remote_auth, .. } = connection;
    let version = connection.version.unwrap_or(2);
    writeln!(text, "{name} {{\n  version = {version}\n  keyingtries = 1\n  rand_time = 0s")?;
    let mut set = |key: &str, value: &str| writeln!(text, "  {key} = {value}");
    set("local_addrs", &or_any(&strings(local)))?;
    let remotes: Vec<_> = remote.iter().map(ToString::to_string).chain(remote_nets.clone()).collect();
    set("remote_addrs", &or_any(&remotes))?;
    if !connection.proposals.is_empty() {
        set("proposals", &connection.proposals.join(", "))?;
    }
    set("rekey_time", &format!("{}s", connection.rekey_s))?;
    if connection.rekey_s > 0 {
        set("over_time", "60s")?;
    }
    set("dpd_delay", &format!("{}s", connection.dpd_s))?;
    if version == 1 {
        set("aggressive", yes_no(connection.aggressive.unwrap_or(false)))?;
    }
    set("mobike", yes_no(connection.mobike.unwrap_or(true)))?;
    set("fragmentation", yes_no(connection.fragmentation.unwrap_or(true)))?;
    set("encap", yes_no(connection.force_encap.unwrap_or(false)))?;
    if let Some(childless) = connection.childless {
        set("childless", if childless { "force" } else { "allow" })?;
    }
    set("unique", connection.unique.unwrap_or("replace"))?;
    if !connection.pools.is_empty() {
        set("pools", &connection.pools.join(", "))?;
    }
    if !connection.request_address.is_empty() {
        let any = |family: &&str| if *family == "v6" { "::" } else { "0.0.0.0" };
        let any: Vec<_> = connection.request_address.iter().map(any).collect();
        set("vips", &any.join(", "))?;
    }
    if remote_auth.method == "eap-mschapv2" {
        set("send_certreq", "no")?;
        set("send_cert", "always")?;
    }
    text.push_str("  local {\n");
    write_auth(text, local_auth)?;
    text.push_str("  }\n  remote {\n");
    write_auth(text, remote_auth)?;
    if remote_auth.method == "eap-mschapv2" {
        text.push_str("    eap_id = %any\n");
    }
    if let Some(xauth) = &connection.xauth {
        match &xauth.user {
            Some(user) => writeln!(text, "  }}\n  local-xauth {{\n    auth = xauth\n    xauth_id = {user}")?,
            None => text.push_str("  }\n  remote-xauth {\n    auth = xauth\n"),
        }
    }
    text.push_str("  }\n  children {\n");
    for child in &connection.children {
        write_child(text, child)?;
    }
    text.push_str("  }\n}\n");
    Ok(())
}

fn write_auth(text: &mut String, auth: &Auth) -> Result<()> {
    let method = if auth.method == "certificate" { "pubkey" } else { auth.method };
    writeln!(text, "    auth = {method}")?;
    if let Some(id) = &auth.id {
        writeln!(text, "    id = \"{id}\"")?;
    }
    if let Some(user) = &auth.user {
        writeln!(text, "    eap_id = \"{user}\"")?;
    }
    if let Some(certificate) = auth.certificate.first() {
        writeln!(text, "    certs = {}", certificate.display())?;
    }
    if !auth.ca.is_empty() {
        let paths: Vec<_> = auth.ca.iter().map(|path| path.display().to_string()).collect();
        writeln!(text, "    cacerts = {}", paths.join(", "))?;
    }
    Ok(())
}

fn write_child(text: &mut String, child: &Child) -> Result<()> {
    writeln!(text, "    {} {{\n      rand_time = 0s\n      rand_packets = 0", child.name)?;
    let mut set = |key: &str, value: &str| writeln!(text, "      {key} = {value}");
    set("local_ts", &child.local_net.join(", "))?;
    set("remote_ts", &child.remote_net.join(", "))?;
    if !child.esp.is_empty() {
        set("esp_proposals", &child.esp.join(", "))?;
    }
    set("mode", child.mode.unwrap_or("tunnel"))?;
    set("start_action", child.start.unwrap_or("none"))?;
    set("close_action", child.on_close.unwrap_or("none"))?;
    set(
        "dpd_action",
        match child.on_dpd {
            Some("start") => "restart",
            Some("trap") => "trap",
            _ => "clear",
        },
    )?;
    set("rekey_time", &format!("{}s", child.rekey_s))?;
    if child.rekey_s > 0 {
        set("life_time", &format!("{}s", child.rekey_s + 60))?;
    }
    if let Some(packets) = child.rekey_packets {
        set("rekey_packets", &packets.to_string())?;
    }
    text.push_str("    }\n");
    Ok(())
}

fn write_secrets(text: &mut String, connection: &Connection) -> Result<()> {
    let Connection { name, local_auth, remote_auth, .. } = connection;
    if let Some(secret) = local_auth.secret.as_ref().or(remote_auth.secret.as_ref()) {
        writeln!(text, "ike-{name} {{")?;
        for (key, auth) in [("id-local", local_auth), ("id-remote", remote_auth)] {
            if let Some(id) = auth.id.as_ref().filter(|id| *id != "%any") {
                writeln!(text, "  {key} = \"{id}\"")?;
            }
        }
        writeln!(text, "  secret = \"{secret}\"\n}}")?;
    }
    if let Some(xauth) = &connection.xauth {
        let own = xauth.user.iter().zip(&xauth.password);
        for (number, (user, password)) in own.chain(&xauth.users).enumerate() {
            writeln!(text, "xauth-{name}-{number} {{ id = \"{user}\"\n  secret = \"{password}\" }}")?;
        }
    }
    let own = local_auth.user.iter().zip(&local_auth.password);
    for (number, (user, password)) in own.chain(&remote_auth.users).enumerate() {
        writeln!(text, "eap-{name}-{number} {{ id = \"{user}\"\n  secret = \"{password}\" }}")?;
    }
    Ok(())
}

/// swanctl reads keys and intermediate CAs only from folders beside its configuration.
fn keep_files(dir: &Path, connection: &Connection) -> Result<()> {
    let Connection { name, local_auth, remote_auth, .. } = connection;
    let keep = |folder: &str, number: usize, from: &PathBuf| -> Result<()> {
        let to = dir.join(folder).join(format!("{name}-{number}.pem"));
        fs::copy(from, to).with_context(|| from.display().to_string())?;
        Ok(())
    };
    if let Some(key) = &local_auth.key {
        keep("private", 0, key)?;
    }
    for (number, certificate) in local_auth.certificate.iter().skip(1).chain(&remote_auth.ca).enumerate() {
        keep("x509ca", number, certificate)?;
    }
    Ok(())
}

fn strings<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn or_any(addresses: &[String]) -> String {
    if addresses.is_empty() { "%any".to_owned() } else { addresses.join(", ") }
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}
