//! Whole walks over memory ports: two gateways, real tables, real cryptography, no devices.

mod common;

use common::*;

/// DP-3: a packet goes in at one gateway and comes out at the other as it was, but for its TTL.
#[test]
fn dp_3_tunnel_round_trip() {
    let mut pair = Pair::new(Suites::Gcm128, Options::default());
    for n in 1..=3u16 {
        let packet = udp4("10.1.0.2", "10.2.0.2", 1000 + n, 2000, &[0x5a; 100]);
        let got = pair.a_to_b(&packet);
        assert_eq!(got, [routed(&packet, 2)]);
    }
    assert_eq!(pair.a.all_drops() + pair.b.all_drops(), 0);
    assert_eq!((pair.a.missing_frames(), pair.b.missing_frames()), (0, 0));
}
