//! The soak, for some seconds.

use std::time::Duration;

use postern_benches_packet::soak::{Settings, run};

/// DP-6, DP-8: whatever changes under them, packets are delivered once and as they were, or dropped under a name.
#[test]
fn dp_6_soak() {
    for seed in [1, 2] {
        let settings = Settings { packets: 1_500_000, limit: Duration::from_secs(20), seed, progress: false };
        let report = run(&settings).expect("two gateways");
        assert_eq!(report.complaints(), Vec::<String>::new(), "{report}");
        assert!(report.made > 10_000 && report.delivered > report.made / 2, "{report}");
    }
}
