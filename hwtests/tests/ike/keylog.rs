//! Debugging aids that hand out keys: off unless asked for twice, and then good for tshark.

use anyhow::{Result, ensure};
use postern_hwtests::capture::{Capture, fields_with_tables};
use postern_hwtests::config::ike::Link;
use postern_hwtests::node::binary;
use postern_hwtests::party::Make;
use postern_hwtests::peer::Version;
use postern_hwtests::process::run;
use postern_hwtests::stage::{Stage, postern, swan};

/// IKE-9, OPS-5: tshark decrypts IKE and ESP with the keys that `ike.keylog` exports.
#[test]
fn ike_9_tshark_decrypts() -> Result<()> {
    for (ike, esp) in
        [("aes128gcm16-prfsha256-x25519", "aes128gcm16"), ("aes256-sha256-ecp256", "aes256-sha256")]
    {
        let keys = std::env::temp_dir().join(postern_hwtests::netns::unique_prefix() + "-keys");
        let mut make = postern();
        if let Make::Postern(config) = &mut make
            && let Some(section) = &mut config.ike
        {
            section.keylog = Some(keys.clone());
        }
        let stage = Stage::pair(&make, &swan(Version::V6))?;
        let link = Link { ike: ike.to_owned(), esp: esp.to_owned(), ..stage.link("shown") };
        stage.load(&link)?;
        stage.check(|stage| {
            let file = stage.topology().dir().join("shown.pcap");
            let capture = Capture::start(stage.topology().ns("wire")?, "left", "ip", &file)?;
            let first = stage.establish("shown", true)?;
            stage.left.rekey_child("shown")?;
            stage.agreed_where("shown", "a rekey", |now| now.spi_in != first.spi_in)?;
            stage.left.rekey_ike("shown")?;
            stage.agreed_where("shown", "a rekey", |now| now.ike != first.ike)?;
            stage.carry()?;
            stage.close("shown", false)?;
            let file = capture.finish()?;
            let table = |filter: &str| fields_with_tables(&file, &keys, filter, &["ip.src"]);
            let encrypted = table("isakmp.typepayload == 46")?.len();
            let opened = table("isakmp.enc.decrypted")?.len();
            ensure!(
                encrypted >= 8 && opened == encrypted,
                "{opened} of {encrypted} IKE messages were opened"
            );
            ensure!(!table("isakmp.auth.data")?.is_empty(), "no AUTH payload is shown");
            // Errors of the peer's kernel (it hears raw ESP too) quote a part of a packet, whose ICV says nothing.
            let packets = |filter: &str| -> Result<usize> {
                let rows = fields_with_tables(&file, &keys, filter, &["ip.proto"])?;
                let outer = |row: &&Vec<String>| row.first().is_some_and(|all| !all.starts_with("1,"));
                Ok(rows.iter().filter(outer).count())
            };
            let (all, good) = (packets("esp")?, packets("esp && (icmp || tcp)")?);
            ensure!(all > 10 && good == all, "{good} of {all} ESP packets were opened");
            let (right, wrong) = (packets("esp.icv_good == 1")?, packets("esp.icv_bad == 1")?);
            ensure!(
                right == all && wrong == 0,
                "of {all} ESP packets {right} have right ICVs and {wrong} wrong ones"
            );
            ensure!(stage.left.log_text().contains("keys are written to"), "no warning in the log");
            Ok(())
        })?;
        std::fs::remove_dir_all(&keys)?;
    }
    Ok(())
}

/// OPS-5: a configuration that exports keys is refused without `--allow-keylog`.
#[test]
fn ike_9_keys_are_not_exported_by_mistake() -> Result<()> {
    let keys = std::env::temp_dir().join(postern_hwtests::netns::unique_prefix() + "-no-keys");
    std::fs::create_dir_all(&keys)?;
    let file = keys.join("postern.toml");
    let dir = keys.display();
    std::fs::write(
        &file,
        format!(
            "[datapath]\nsocket = \"{dir}/d.sock\"\nstate = \"{dir}\"\nstart = false\n[control]\nsocket = \"{dir}/c.sock\"\n\
             state = \"{dir}\"\n[ike]\nkeylog = \"{dir}/keys\"\n"
        ),
    )?;
    let mut command = std::process::Command::new("timeout");
    command.arg("5").arg(binary("postern-control")?).arg("--config").arg(&file);
    let said = run(&mut command).expect_err("it started").to_string();
    ensure!(said.contains("--allow-keylog"), "{said}");
    std::fs::remove_dir_all(&keys)?;
    Ok(())
}
