//! The load generator's clients in memory: all come up, and what the gateway keeps of each is bounded.

use std::net::{IpAddr, Ipv4Addr};

use allocation_counter::measure;
use postern_hwtests::load::{self, Plan, System};

/// Clients.
const COUNT: u32 = 100;

/// What a gateway may keep of an established IKE SA with a child; the answer to its last request is part of that.
const BYTES_PER_SA: i64 = 4096;

/// IKE-1: 100 clients come up at one gateway, and take at most 4 KiB of its memory each.
#[test]
fn ike_1_a_hundred_clients_in_bounded_memory() {
    let gateway_at = IpAddr::from([192, 0, 2, 1]);
    for ike in ["aes128gcm16-prfsha256-x25519", "aes256-sha384-prfsha384-ecp256"] {
        let plan = Plan::new(gateway_at, "10.99.0.0/16", ike, "aes128gcm16", "a secret").unwrap();
        let now = load::now();
        let mut random = System::default();
        let mut gateway = plan.gateway(now).unwrap();
        let empty = measure(|| drop(plan.gateway(now).unwrap())).bytes_max;
        for number in 1..=COUNT {
            let address = IpAddr::V4(Ipv4Addr::from_bits(0x0a80_0000 + number));
            let mut client = plan.client(now, number, address).unwrap();
            let mut run = |job: postern_ike::job::Job| job.run(&mut random);
            load::handshake(&mut gateway, &mut client, now, &mut run, |_, step| step()).unwrap();
        }
        assert_eq!(gateway.len(), 100);
        assert_eq!(gateway.sas(now).filter(|sa| sa.children.len() == 1).count(), 100);
        let held = -measure(|| drop(gateway)).bytes_current - i64::try_from(empty).unwrap();
        let each = held / i64::from(COUNT);
        assert!((500..=BYTES_PER_SA).contains(&each), "{ike}: {each} bytes for an IKE SA with a child");
    }
}
