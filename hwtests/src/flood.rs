//! A flood of IKE_SA_INIT requests from addresses that do not exist, at an even pace.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::impair::Lottery;
use crate::netns::Netns;
use crate::packet::{ETHERNET, ethernet, fix_ip_checksum, udp};
use crate::tap::Tap;

/// A running flood.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

/// What a [`Flood`] sent.
#[derive(Clone, Copy, Debug)]
pub struct Flooded {
    /// Requests that went out.
    pub sent: u64,
    /// In this time.
    pub time: Duration,
}

impl Flooded {
    /// Requests a second.
    pub fn rate(&self) -> f64 {
        let sent = u32::try_from(self.sent).unwrap_or(u32::MAX);
        f64::from(sent) / self.time.as_secs_f64()
    }
}

impl Flood {
    /// Sends `rate` requests a second from the segment `bridge` of `namespace` to the gateway with this address and
    /// hardware address, from random sources in 198.18.0.0/15 (RFC 2544).
    pub fn start(namespace: &Netns, bridge: &str, to: Ipv4Addr, mac: [u8; 6], rate: u32) -> Result<Self> {
        let tap = Tap::plug(namespace, "tap-flood", bridge)?;
        let mut frame = request(to, mac)?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (start, mut random, mut sent, mut tried) = (Instant::now(), Lottery::new(7), 0, 0_u32);
            while !until.load(Ordering::Relaxed) {
                let due = f64::from(rate) * start.elapsed().as_secs_f64();
                while f64::from(tried) < due {
                    vary(&mut frame, &mut random);
                    tried += 1;
                    sent += u64::from(tap.send(&frame).is_ok());
                }
                std::thread::sleep(Duration::from_micros(500));
            }
            (sent, start.elapsed())
        });
        Ok(Self { stop, thread })
    }

    /// Ends it.
    pub fn finish(self) -> Result<Flooded> {
        self.stop.store(true, Ordering::Relaxed);
        let (sent, time) = self.thread.join().map_err(|_| anyhow!("the flood panicked"))?;
        Ok(Flooded { sent, time })
    }
}

/// Offsets in the frame.
const IP: usize = ETHERNET;
const UDP: usize = IP + 20;
const IKE: usize = UDP + 8;
const PUBLIC: usize = IKE + 28 + 40 + 8;
const NONCE: usize = PUBLIC + 32 + 4;
const END: usize = NONCE + 32;

/// A frame with an acceptable IKE_SA_INIT request (RFC 7296 section 1.2): AES-GCM-128, PRF-HMAC-SHA2-256, Curve25519.
fn request(to: Ipv4Addr, mac: [u8; 6]) -> Result<Vec<u8>> {
    // SPIs are filled in for each request, like public value and nonce.
    let mut message = vec![0; 16];
    message.extend([33, 0x20, 34, 0x08, 0, 0, 0, 0, 0, 0, 0, u8::try_from(END - IKE)?]);
    // SA: one proposal, three transforms.
    message.extend([34, 0, 0, 40, 0, 0, 0, 36, 1, 1, 0, 3]);
    message.extend([3, 0, 0, 12, 1, 0, 0, 20, 0x80, 14, 0, 128]);
    message.extend([3, 0, 0, 8, 2, 0, 0, 5, 0, 0, 0, 8, 4, 0, 0, 31]);
    // KE and Nonce.
    message.extend([40, 0, 0, 40, 0, 31, 0, 0]);
    message.resize(NONCE - IKE - 4, 0);
    message.extend([0, 0, 0, 36]);
    message.resize(END - IKE, 0);
    let packet = udp((Ipv4Addr::new(198, 18, 0, 0).into(), 500), (to.into(), 500), &message)?;
    Ok(ethernet(mac, [2, 0, 0, 0, 0, 7], &packet))
}

/// Another source, SPI, public value and nonce; no UDP checksum.
fn vary(frame: &mut [u8], random: &mut Lottery) {
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = frame.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let [high, low, a, b, c, ..] = random.draw().to_be_bytes();
    put(IP + 12, &[198, 18 + (a & 1), b, c]);
    put(UDP, &[high | 4, low]);
    put(UDP + 6, &[0, 0]);
    put(IKE, &random.draw().to_be_bytes());
    for at in (PUBLIC..PUBLIC + 32).chain(NONCE..END).step_by(8) {
        put(at, &random.draw().to_be_bytes());
    }
    fix_ip_checksum(frame.get_mut(IP..).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{fields, write_pcap};

    /// tshark reads what is sent, and finds nothing wrong.
    #[test]
    fn requests_are_well_formed() {
        let mut frame = request(Ipv4Addr::new(192, 0, 2, 1), [2, 0, 0, 0, 0, 1]).unwrap();
        let mut random = Lottery::new(1);
        let mut packets = Vec::new();
        for _ in 0..3 {
            vary(&mut frame, &mut random);
            packets.push(frame[IP..].to_vec());
        }
        let file = std::env::temp_dir().join(crate::netns::unique_prefix() + "-flood.pcap");
        write_pcap(&file, &packets).unwrap();
        let filter = "isakmp && !_ws.malformed && !_ws.expert.severity == error";
        let seen = fields(&file, filter, &["isakmp.ispi", "isakmp.key_exchange.dh_group", "isakmp.nonce"]);
        std::fs::remove_file(&file).unwrap();
        let seen = seen.unwrap();
        assert_eq!(seen.len(), 3);
        assert!(seen.iter().all(|row| row[1] == "31" && row[2].len() == 64), "{seen:?}");
        assert_ne!(seen[0], seen[1]);
        assert!(crate::packet::is_ike(&frame));
    }
}
