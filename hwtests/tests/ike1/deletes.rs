//! The Delete of an IKEv1 SA, RST-5, beside the one that strongSwan sends from the same state, and in tshark's eyes.

use anyhow::{Context, Result, ensure};
use postern_hwtests::capture::{Capture, fields_with_tables, frames};
use postern_hwtests::oracle::hex;
use postern_hwtests::party::Party;
use postern_hwtests::peer::Version;
use postern_hwtests::stage::{Stage, postern, swan};
use postern_ike::message::IkeSpi;
use postern_ike::record::{SavedBody, SavedIke, V1Context};
use postern_ike::v1::delete::{DeleteContext, delete_message};
use postern_nvram::{Backup, NoCounter, SealedFile};

use super::{NAME, link, load};

/// What Postern has saved of its only IKE SA.
fn saved(party: &Party) -> Result<DeleteContext> {
    let directory = party.node()?.dir().join("state/recovery");
    let holder = SealedFile { path: directory.join("private.key"), passphrase_file: None };
    let backup = Backup::read(&directory.join("backup"), &holder, &mut NoCounter)?;
    let [(_, record)] = backup.records.as_slice() else {
        anyhow::bail!("{} records: {:?}", backup.records.len(), backup.report)
    };
    let SavedIke { spis, body, .. } = SavedIke::decode(record)?;
    let SavedBody::V1Context(context) = body else { anyhow::bail!("not a context of IKEv1") };
    ensure!(is_prebuilt(&context, spis), "the prebuilt Delete is another one");
    let postern_ike::record::V1Context { skeyid_a, ka, last_block, hash } = context;
    Ok(DeleteContext { cookies: spis, skeyid_a, ka, last_block, hash })
}

/// The IKE message in a frame from `source`, if it is one.
fn message(frame: &[u8], source: [u8; 4]) -> Option<&[u8]> {
    let (ip, rest) = (frame.get(14..34)?, frame.get(34..)?);
    let (ports, datagram) = (rest.get(..4)?, rest.get(8..)?);
    let natt = ports.ends_with(&4500_u16.to_be_bytes());
    let datagram = if natt { datagram.strip_prefix(&[0; 4])? } else { datagram };
    (ip.get(9) == Some(&17) && ip.get(12..16) == Some(&source)).then_some(datagram)
}

/// Whether a message is, byte for byte, the Delete that is built from this context under its message ID.
fn is_delete(message: &[u8], context: &DeleteContext) -> bool {
    let id = message.get(20..24).and_then(|id| id.first_chunk()).map_or(0, |id| u32::from_be_bytes(*id));
    delete_message(context, id).is_ok_and(|built| built == message)
}

/// Whether the prebuilt kind is what is built later from the same context.
fn is_prebuilt(context: &V1Context, cookies: (IkeSpi, IkeSpi)) -> bool {
    let later = context.delete(cookies);
    later.is_some_and(|later| context.prebuilt(cookies).deletes == [later])
}

/// RST-5: byte for byte what strongSwan 5.9.8 and 6.0.1 send, with either side as the initiator and each hash and key
/// length; tshark decrypts both and finds the Delete.
#[test]
fn rst_5_the_delete_is_strongswans() -> Result<()> {
    for version in Version::ALL {
        let stage = Stage::pair(&postern(), &swan(version))?;
        for (round, ike) in
            ["aes128-sha256-ecp256", "aes256-sha1-modp2048", "aes192-sha384-ecp384", "aes256-sha512-ecp256"]
                .into_iter()
                .enumerate()
        {
            load(&stage, &link(&stage, ike, "aes128gcm16", None))?;
            let name = format!("delete-{round}");
            let file = stage.topology().dir().join(format!("{name}.pcap"));
            let filter = "udp port 500 or udp port 4500";
            let capture = Capture::start(stage.topology().ns("wire")?, "left", filter, &file)?;
            stage.check(|stage| {
                stage.establish(NAME, round % 2 == 0)?;
                let theirs = saved(&stage.left)?;
                stage.close(NAME, false)?;
                stage.establish(NAME, round % 2 == 1)?;
                let ours = saved(&stage.left)?;
                stage.close(NAME, true)?;
                let file = capture.finish()?;
                let frames = frames(&file)?;
                let sent = |source: [u8; 4], context: &DeleteContext| {
                    let messages = frames.iter().filter_map(|frame| message(frame, source));
                    messages.filter(|message| is_delete(message, context)).count()
                };
                ensure!(sent([192, 0, 2, 2], &theirs) == 1, "{ike}: strongSwan's Delete is another one");
                ensure!(sent([192, 0, 2, 1], &ours) == 1, "{ike}: this side's own Delete is another one");
                let profile = stage.topology().dir().join(format!("{name}.tshark"));
                std::fs::create_dir_all(&profile)?;
                let line = |context: &DeleteContext| {
                    format!("{:016x},{}\n", context.cookies.0.0, hex(context.ka.expose()))
                };
                std::fs::write(profile.join("ikev1_decryption_table"), line(&theirs) + &line(&ours))?;
                // tshark knows AES-CBC's IVs only with the hashes of its own list; protocol 1 is the IKE SA itself.
                let rows = fields_with_tables(
                    &file,
                    &profile,
                    "isakmp.delete.protoid == 1",
                    &["ip.src", "isakmp.delete.spi"],
                )?;
                for (source, context) in [("192.0.2.2", &theirs), ("192.0.2.1", &ours)] {
                    let (cookie_i, cookie_r) = context.cookies;
                    let spi = format!("{:016x}{:016x}", cookie_i.0, cookie_r.0);
                    let found = |row: &&Vec<String>| row.first().is_some_and(|ip| ip == source);
                    let row =
                        rows.iter().find(found).with_context(|| format!("{ike}: no Delete: {rows:?}"))?;
                    ensure!(
                        row.get(1).is_some_and(|found| found.replace(':', "") == spi),
                        "{row:?}, not {spi}"
                    );
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}
