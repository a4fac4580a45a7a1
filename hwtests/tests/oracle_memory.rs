//! Packets against an independent implementation (scapy, `hwtests/oracle/oracle.py`) and tshark, through workers on
//! memory ports: every suite, mode, pair of families, with and without encapsulation and ESN, and every AH bundle.
//!
//! What a worker makes, the oracle opens and, given the same IV and sequence number, makes again byte for byte; where
//! tshark can it says that the ICV is good. What the oracle makes, a worker opens. The same over real wires, with
//! fewer combinations, is in `oracle.rs`.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use postern_contract::counters::DropReason;
use postern_contract::request::Operation;
use postern_contract::sa::{
    Action, Direction, Encryption, FanOut, Integrity, IpsecProtocol, KeyOrigin, Lifetime, Mode, PathPolicy,
    Policy, PolicyId, SaConfig, SaId, Selector, UdpEncap,
};
use postern_contract::secret::Secret;
use postern_contract::{Generation, Translation, sa};
use postern_datapath::testbed::{Layout, Testbed};
use postern_hwtests::capture::{EspSa, fields_with_keys, write_pcap};
use postern_hwtests::config::{AES128GCM, AH_SPI_OFFSET, AH_SUITES, ESP_SUITES, Pair, Suite};
use postern_hwtests::netns::{janitor, scratch_dir, unique_prefix};
use postern_hwtests::oracle::{Oracle, hex};
use postern_hwtests::packet::{forwarded, ip_header, protected, udp};
use postern_hwtests::topology::Family;
use postern_wire::ids::Spi;

/// Packets each way through every SA.
const COUNT: u64 = 3;

/// One pair of SAs under test.
struct Case {
    pair: Pair,
    esn: bool,
    hosts: (IpAddr, IpAddr),
    /// The first sequence number in either direction.
    first: u64,
}

impl Case {
    fn describe(&self) -> String {
        let Pair { esp, ah, mode, natt, outer, .. } = &self.pair;
        let name = |suite: &Option<Suite>| suite.map_or("none", |suite| suite.name);
        let inside = self.hosts.0;
        format!(
            "ESP {}, AH {}, {mode} mode, {inside} between {} and {}, natt {natt}, ESN {}",
            name(esp),
            name(ah),
            outer.0,
            outer.1,
            self.esn
        )
    }

    fn inner(&self, to_right: bool, number: u64) -> Result<Vec<u8>> {
        let (from, to) = if to_right { self.hosts } else { (self.hosts.1, self.hosts.0) };
        // Over all cases, all sizes modulo the block size of a cipher.
        let size = (u64::from(self.pair.spis.0) / 16 * 7 + number * 5) % 1200;
        udp((from, 7), (to, 9), &vec![u8::try_from(number)?; usize::try_from(size)?])
    }
}

fn cases() -> Result<Vec<Case>> {
    let mut algorithms: Vec<(Option<Suite>, Option<Suite>)> = Vec::new();
    algorithms.extend(ESP_SUITES.map(|suite| (Some(suite), None)));
    algorithms.extend(AH_SUITES.map(|suite| (None, Some(suite))));
    let last = ESP_SUITES.into_iter().next_back();
    algorithms.extend(AH_SUITES.into_iter().flat_map(|ah| [(Some(AES128GCM), Some(ah)), (last, Some(ah))]));
    let mut cases = Vec::new();
    for (esp, ah) in algorithms {
        for (mode, outer, inner) in [
            ("tunnel", Family::V4, Family::V4),
            ("tunnel", Family::V4, Family::V6),
            ("tunnel", Family::V6, Family::V4),
            ("tunnel", Family::V6, Family::V6),
            ("transport", Family::V4, Family::V4),
            ("transport", Family::V6, Family::V6),
        ] {
            for (natt, esn) in [(false, false), (false, true), (true, false), (true, true)] {
                if natt && ah.is_some() {
                    continue;
                }
                let number = u32::try_from(cases.len())?;
                let hosts = hosts(inner, number)?;
                let outer = match (mode, outer) {
                    ("transport", _) => hosts,
                    (_, Family::V4) => ("192.0.2.1".parse()?, "203.0.113.2".parse()?),
                    (_, Family::V6) => ("2001:db8::1".parse()?, "2001:db8:99::2".parse()?),
                };
                let mut pair =
                    Pair::new(number, esp, ah, outer, (&hosts.0.to_string(), &hosts.1.to_string()))?;
                (pair.mode, pair.natt, pair.esn) = (mode, natt, Some(esn));
                // ESN: the second packet's number is the last of the low half (RFC 4303 section 2.2.1).
                let first = if esn { u64::from(u32::MAX) - 1 } else { 1 };
                cases.push(Case { pair, esn, hosts, first });
            }
        }
    }
    Ok(cases)
}

/// The testbed's inside host, and a far one that only this case has.
fn hosts(family: Family, number: u32) -> Result<(IpAddr, IpAddr)> {
    let [_, _, high, low] = number.to_be_bytes();
    Ok(match family {
        Family::V4 => ("10.1.0.2".parse()?, IpAddr::from([10, 200, high, low])),
        Family::V6 => {
            ("fd01::2".parse()?, IpAddr::from([0xfd02, 0, 0, 0, 0, 0, 0, u16::from_be_bytes([high, low])]))
        }
    })
}

/// The operations that install a case on the left gateway. SA ids: 4 a case.
fn operations(case: &Case, number: u64) -> Vec<Operation> {
    let pair = &case.pair;
    let id = |offset: u64| SaId(1 + number * 4 + offset);
    let net = |address: IpAddr| sa::AddressRange::from(IpNet::from(address));
    let selector = Selector {
        local: net(case.hosts.0),
        remote: net(case.hosts.1),
        protocol: None,
        local_ports: 0..=u16::MAX,
        remote_ports: 0..=u16::MAX,
    };
    let [right, left] = &pair.keys;
    let mut operations = Vec::new();
    for (direction, offset, spi, [key, integrity_key, ah_key]) in
        [(Direction::Outbound, 0, pair.spis.0, right), (Direction::Inbound, 2, pair.spis.1, left)]
    {
        let make = |id: SaId, protocol: IpsecProtocol, spi: u32, mode: Mode, suite: sa::Suite| SaConfig {
            id,
            generation: Generation(1),
            direction,
            protocol,
            mode,
            spi: Translation::same(Spi(spi)),
            local: Translation::same(pair.outer.0),
            remote: Translation::same(pair.outer.1),
            encap: pair.natt.then_some(UdpEncap { local_port: 4500, remote_port: 4500 }),
            suite,
            esn: case.esn,
            replay_window: 64,
            sequence: if direction == Direction::Outbound { case.first } else { case.first - 1 },
            selectors: vec![selector.clone()],
            lifetime: Lifetime::default(),
            path: PathPolicy::default(),
            follow_peer: false,
            pair: None,
            bundle: None,
            origin: KeyOrigin::Negotiated,
            worker: None,
            fan_out: FanOut::ByLoad,
        };
        let mode = if pair.mode == "tunnel" { Mode::Tunnel } else { Mode::Transport };
        let bundle = pair.ah.zip(pair.esp).map(|_| id(offset + 1));
        if let Some(ah) = pair.ah {
            let mode = if pair.esp.is_some() { Mode::Transport } else { mode };
            let suite = contract_suite(&ah, &[], ah_key);
            let id = if pair.esp.is_some() { id(offset + 1) } else { id(offset) };
            let ah = make(id, IpsecProtocol::Ah, spi + AH_SPI_OFFSET, mode, suite);
            operations.push(Operation::InstallSa(Box::new(ah)));
        }
        if let Some(esp) = pair.esp {
            let esp =
                make(id(offset), IpsecProtocol::Esp, spi, mode, contract_suite(&esp, key, integrity_key));
            operations.push(Operation::InstallSa(Box::new(SaConfig { bundle, ..esp })));
        }
    }
    operations.push(Operation::InstallPolicy(Policy {
        id: PolicyId(number + 1),
        generation: Generation(1),
        priority: 1000,
        selectors: vec![selector],
        action: Action::Protect(Some(id(0))),
    }));
    operations
}

fn contract_suite(suite: &Suite, key: &[u8], integrity_key: &[u8]) -> sa::Suite {
    sa::Suite {
        encryption: match suite.encryption {
            "aes-gcm" => Encryption::AesGcm16,
            "chacha20-poly1305" => Encryption::ChaCha20Poly1305,
            "aes-gmac" => Encryption::NullAuthAesGmac,
            "aes-cbc" => Encryption::AesCbc,
            _ => Encryption::Null,
        },
        encryption_key: Secret::new(key),
        integrity: match suite.integrity {
            "hmac-sha1-96" => Integrity::HmacSha1_96,
            "hmac-sha2-256-128" => Integrity::HmacSha2_256_128,
            "hmac-sha2-384-192" => Integrity::HmacSha2_384_192,
            "hmac-sha2-512-256" => Integrity::HmacSha2_512_256,
            "aes-gmac" => Integrity::AesGmac,
            _ => Integrity::None,
        },
        integrity_key: Secret::new(integrity_key),
    }
}

/// DP-3, DP-4: every combination, both ways.
#[test]
fn dp_3_every_combination_agrees_with_scapy_and_tshark() -> Result<()> {
    janitor();
    let dir = scratch_dir(&unique_prefix())?;
    let outcome = every_combination(&dir);
    std::fs::remove_dir_all(&dir)?;
    outcome
}

fn every_combination(dir: &std::path::Path) -> Result<()> {
    let state = dir.join("state");
    std::fs::create_dir_all(&state)?;
    let mut bed = Testbed::new(&Layout::default(), &state)?;
    let mut oracle = Oracle::start()?;
    let cases = cases()?;
    let (mut made, mut keys, mut checkable) = (Vec::new(), Vec::new(), 0);
    for (number, case) in (0..).zip(&cases) {
        for outcome in bed.apply(operations(case, number)) {
            outcome.with_context(|| case.describe())?;
        }
        let packets = made_by_a_worker(&mut bed, &mut oracle, case).with_context(|| case.describe())?;
        made_by_the_oracle(&mut bed, &mut oracle, case).with_context(|| case.describe())?;
        // tshark 4.0 knows neither ESN nor every suite, and does not look at AH.
        let tshark =
            case.pair.esp.and_then(|suite| suite.tshark).filter(|_| !case.esn && case.pair.ah.is_none());
        if let Some((encryption, authentication)) = tshark {
            let [[key, integrity_key, _], _] = &case.pair.keys;
            keys.push(EspSa {
                v6: case.pair.outer.0.is_ipv6(),
                spi: case.pair.spis.0,
                encryption,
                key: hex(key),
                authentication,
                authentication_key: hex(integrity_key),
            });
            checkable += packets.len();
            made.extend(packets);
        }
    }
    ensure!(bed.all_drops() == 0 && bed.missing_frames() == 0, "packets or frames were lost");
    let file = dir.join("made.pcap");
    write_pcap(&file, &made)?;
    let verdicts = fields_with_keys(&file, &keys, "esp", &["esp.spi", "esp.icv_good"])?;
    let good =
        verdicts.iter().filter(|row| row.get(1).is_some_and(|good| good == "1" || good == "True")).count();
    ensure!(good == checkable && good > 390, "tshark finds {good} of {checkable} ICVs good");
    Ok(())
}

fn made_by_a_worker(bed: &mut Testbed, oracle: &mut Oracle, case: &Case) -> Result<Vec<Vec<u8>>> {
    let sa = case.pair.oracle_sa(true, case.esn).context("no algorithms")?;
    let mut made = Vec::new();
    for number in 0..COUNT {
        let sequence = case.first + number;
        let sent = case.inner(true, number)?;
        let (mut outside, inside) = bed.from_inside(&sent);
        ensure!(
            outside.len() == 1 && inside.is_empty(),
            "{} outside, {} inside",
            outside.len(),
            inside.len()
        );
        let packet = outside.pop().context("nothing")?;
        let shown = || format!("sequence number {sequence}: {}", hex(&packet));
        let expected = protected(&sent, case.pair.mode);
        let opened = oracle.open(&sa, sequence, &packet).with_context(shown)?;
        ensure!(opened == expected, "{}\nopens to\n{}\nnot\n{}", shown(), hex(&opened), hex(&expected));
        // Made again from the same parts it is the same, byte for byte.
        let again = oracle.rebuild(&sa, sequence, &expected, &packet).with_context(shown)?;
        ensure!(again == packet, "{}\nscapy makes\n{}", shown(), hex(&again));
        made.push(packet);
    }
    Ok(made)
}

/// Everything that was dropped.
fn drops(bed: &Testbed) -> Vec<(&'static str, u64)> {
    let counted = DropReason::ALL.iter().map(|reason| (reason.label(), bed.drops(*reason)));
    counted.filter(|(_, count)| *count > 0).collect()
}

fn made_by_the_oracle(bed: &mut Testbed, oracle: &mut Oracle, case: &Case) -> Result<()> {
    let sa = case.pair.oracle_sa(false, case.esn).context("no algorithms")?;
    let header = ip_header(case.pair.outer.1, case.pair.outer.0, 50, 0)?;
    for number in 0..COUNT {
        let sequence = case.first + number;
        let inner = case.inner(false, number)?;
        let sealed = oracle.seal(&sa, sequence, &inner, &header, (4500, 4500))?;
        let (outside, inside) = bed.from_outside(&sealed);
        let shown = || format!("sequence number {sequence}: {}\n{:?}", hex(&sealed), drops(bed));
        ensure!(
            outside.is_empty() && inside.len() == 1,
            "{}: {} outside, {} inside",
            shown(),
            outside.len(),
            inside.len()
        );
        let (got, wanted) = (inside.first().map(|packet| hex(packet)), hex(&forwarded(&inner)));
        ensure!(got.as_deref() == Some(wanted.as_str()), "{}\nopens to\n{got:?}\nnot\n{wanted}", shown());
    }
    Ok(())
}
