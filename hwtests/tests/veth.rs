//! DP-2: the veth bench's short form: the generator within the kernel, a plain forwarder, ESP both ways through a real
//! datapath, and the latency of each packet. Of the figures nothing is asserted, but that no packet is lost at a low rate
//! and every packet has its time.

use anyhow::{Context, Result, ensure};
use postern_hwtests::netns::{janitor, scratch_dir, unique_prefix};
use postern_hwtests::node::binary;
use postern_hwtests::process::run;
use serde_json::Value;

#[test]
fn dp_2_the_veth_bench_counts_every_packet() -> Result<()> {
    janitor();
    let dir = scratch_dir(&unique_prefix())?;
    let file = dir.join("veth.json");
    // The program itself demands that all of its first thousand packets come, and fails otherwise.
    run(std::process::Command::new("timeout")
        .arg("60")
        .arg(binary("postern-veth-bench")?)
        .args(["--smoke", "--sizes", "64", "--json"])
        .arg(&file))?;
    let result: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    std::fs::remove_dir_all(&dir)?;
    let rows = |part: &str| result.pointer(&format!("/{part}/0")).and_then(Value::as_array).cloned();
    let (rates, latencies) = rows("rates").zip(rows("latencies")).context("no results")?;
    for way in ["plain", "encap", "decap"] {
        let of = |rows: &[Value]| rows.iter().find(|row| row["way"] == way).cloned();
        let (rate, latency) = of(&rates).zip(of(&latencies)).with_context(|| way.to_owned())?;
        ensure!(rate["pps"].as_f64() > Some(1000.0), "{rate}");
        let buckets = latency["histogram_ns"].as_array().context("no histogram")?;
        let timed: u64 = buckets.iter().filter_map(|bucket| bucket[1].as_u64()).sum();
        // After a loss encapsulated packets are not told apart, and are left out.
        let lost = latency["sent"].as_u64() > latency["received"].as_u64();
        ensure!(timed == latency["received"].as_u64().unwrap_or(0) || (lost && way == "encap"), "{latency}");
    }
    Ok(())
}
