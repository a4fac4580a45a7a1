//! What negotiating anew costs a gateway: full handshakes with as many clients, by shared secret and X25519, each with a
//! first CHILD_SA, in one process and without a network.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::Result;
use postern_hwtests::load::{self, Plan, System};
use postern_ike::config::Strategy;
use rustix::time::{ClockId, clock_gettime};

use crate::Row;

/// Handshakes that are measured.
const MEASURED: u32 = 1000;

pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// A gateway with this strategy.
pub fn plan(reset: Strategy) -> Result<Plan> {
    let ike = "aes128gcm16-prfsha256-x25519";
    let mut plan = Plan::new(GATEWAY, "10.254.0.0/16", ike, "aes128gcm16", "a shared secret of some length")?;
    plan.reset = reset;
    Ok(plan)
}

/// Where the client of this number is.
pub fn address(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number))
}

/// CPU time that this thread has used.
pub fn used() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

pub fn measure(sas: u32) -> Result<Row> {
    let plan = plan(Strategy::None)?;
    let mut gateway = plan.gateway(load::now())?;
    let mut random = System::default();
    let mut spent = Duration::ZERO;
    let count = sas.min(MEASURED);
    for number in 1..=count {
        let now = load::now();
        let mut client = plan.client(now, number, address(number))?;
        let mut run = |job: postern_ike::job::Job| job.run(&mut random);
        load::handshake(&mut gateway, &mut client, now, &mut run, |at_gateway, step| {
            let before = used();
            step();
            if at_gateway {
                spent += used().saturating_sub(before);
            }
        })?;
    }
    let rate = f64::from(count) / spent.as_secs_f64();
    Ok(Row {
        kind: "negotiate".to_owned(),
        sas,
        bytes_a_sa: 0.0,
        builds: rate,
        first: f64::NAN,
        all: f64::from(sas) * 1e3 / rate,
        paced: f64::NAN,
        messages: u64::from(sas) * 2,
        answered: 0,
        deleted: 0,
        twice: 0,
    })
}
