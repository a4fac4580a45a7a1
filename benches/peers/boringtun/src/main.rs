//! boringtun beside the whole walk: WireGuard's data packets in process, from a cleartext packet to the datagram and back.
//!
//! A line "encap SIZE BATCHES" or "decap SIZE BATCHES" is answered with the nanoseconds of a packet: batches of 32 packets,
//! each in buffers of its own, copied as its interface demands; replay window as it always is.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::net::Ipv4Addr;
use std::time::Instant;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};

const BATCH: usize = 32;

/// Two ends that have shaken hands.
fn tunnel() -> (Tunn, Tunn) {
    let (a, b) = (StaticSecret::from([1; 32]), StaticSecret::from([2; 32]));
    let (a_public, b_public) = (PublicKey::from(&a), PublicKey::from(&b));
    let mut left = Tunn::new(a, b_public, None, None, 1, None);
    let mut right = Tunn::new(b, a_public, None, None, 2, None);
    let (mut one, mut two) = (vec![0; 2048], vec![0; 2048]);
    let TunnResult::WriteToNetwork(first) = left.format_handshake_initiation(&mut one, false) else {
        panic!("no initiation");
    };
    let TunnResult::WriteToNetwork(second) = right.decapsulate(None, first, &mut two) else {
        panic!("no response");
    };
    let second = second.to_vec();
    // The keepalive that confirms it.
    let TunnResult::WriteToNetwork(third) = left.decapsulate(None, &second, &mut one) else {
        panic!("no confirmation");
    };
    right.decapsulate(None, third, &mut two);
    (left, right)
}

/// An IPv4 packet with UDP inside.
fn packet(size: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; size];
    packet[..20].fill(0);
    (packet[0], packet[8], packet[9]) = (0x45, 64, 17);
    packet[2..4].copy_from_slice(&u16::try_from(size).expect("a packet's size").to_be_bytes());
    packet[12..16].copy_from_slice(&Ipv4Addr::new(10, 1, 0, 2).octets());
    packet[16..20].copy_from_slice(&Ipv4Addr::new(10, 2, 0, 2).octets());
    packet
}

fn measure(direction: &str, size: usize, batches: u32) -> f64 {
    let (mut left, mut right) = tunnel();
    let clear = vec![packet(size); BATCH];
    let mut sealed = vec![vec![0; size + 64 + 148]; BATCH];
    let mut opened = vec![vec![0; size + 64 + 148]; BATCH];
    let mut lengths = [0; BATCH];
    let mut spent = 0;
    for _ in 0..batches {
        let start = Instant::now();
        for ((clear, sealed), length) in clear.iter().zip(&mut sealed).zip(&mut lengths) {
            let TunnResult::WriteToNetwork(datagram) = left.encapsulate(black_box(clear), sealed) else {
                panic!("not sealed");
            };
            *length = datagram.len();
        }
        let encap = start.elapsed().as_nanos();
        black_box(&mut sealed);
        let start = Instant::now();
        for ((sealed, opened), length) in sealed.iter().zip(&mut opened).zip(lengths) {
            let result = right.decapsulate(None, &sealed[..length], opened);
            assert!(matches!(result, TunnResult::WriteToTunnelV4(..)), "not opened");
        }
        let decap = start.elapsed().as_nanos();
        black_box(&mut opened);
        spent += if direction == "encap" { encap } else { decap };
    }
    let packets = f64::from(batches) * BATCH as f64;
    u32::try_from(spent).map_or(f64::NAN, f64::from) / packets
}

fn main() {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [direction, size, batches] = words[..] else { break };
        let (Ok(size), Ok(batches)) = (size.parse(), batches.parse()) else { break };
        println!("{:.2}", measure(direction, size, batches));
        if std::io::stdout().flush().is_err() {
            break;
        }
    }
}
