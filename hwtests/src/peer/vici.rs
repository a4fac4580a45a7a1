//! What `swanctl --list-sas --pretty` prints, read back.

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// An IKE SA as strongSwan shows it.
#[derive(Clone, Debug)]
pub struct Sa {
    /// Name of the connection.
    pub name: String,
    /// `CONNECTING`, `ESTABLISHED`, `REKEYING`, `REKEYED`, `DELETING` …
    pub state: String,
    /// Whether it began it.
    pub initiator: bool,
    /// SPIs of the initiator and of the responder.
    pub spis: (String, String),
    /// The other end: address, port, identity.
    pub remote: (String, String, String),
    /// Key exchange method, by strongSwan's name.
    pub group: String,
    /// Its CHILD_SAs.
    pub children: Vec<Child>,
    /// Everything, by strongSwan's names.
    pub all: Map<String, Value>,
}

/// A CHILD_SA as strongSwan shows it.
#[derive(Clone, Debug)]
pub struct Child {
    /// Name of the child.
    pub name: String,
    /// `INSTALLED`, `REKEYING`, `REKEYED`, `DELETING` …
    pub state: String,
    /// SPI of packets to this strongSwan.
    pub spi_in: u32,
    /// SPI of packets to its peer.
    pub spi_out: u32,
    /// Packets received and sent.
    pub packets: (u64, u64),
    /// Whether ESP is UDP-encapsulated.
    pub encap: bool,
    /// Everything.
    pub all: Map<String, Value>,
}

/// The IKE SAs of the whole listing.
pub fn sas(text: &str) -> Result<Vec<Sa>> {
    let mut lines = text.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        if line.trim() == "list-sa event {" {
            for (name, value) in section(&mut lines)? {
                found.push(sa(name, value).with_context(|| text.to_owned())?);
            }
        }
    }
    Ok(found)
}

fn sa(name: String, value: Value) -> Result<Sa> {
    let Value::Object(all) = value else { anyhow::bail!("{name} is no section") };
    let word = |key: &str| all.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let children = all.get("child-sas").and_then(Value::as_object).into_iter().flat_map(Map::values);
    Ok(Sa {
        state: word("state"),
        initiator: word("initiator") == "yes",
        spis: (word("initiator-spi"), word("responder-spi")),
        remote: (word("remote-host"), word("remote-port"), word("remote-id")),
        group: word("dh-group"),
        children: children.map(child).collect::<Result<_>>()?,
        name,
        all,
    })
}

fn child(value: &Value) -> Result<Child> {
    let all = value.as_object().context("a child is no section")?;
    let word = |key: &str| all.get(key).and_then(Value::as_str).unwrap_or_default();
    // One that is being negotiated has no SPIs yet.
    let spi = |key: &str| u32::from_str_radix(word(key), 16).unwrap_or(0);
    Ok(Child {
        name: word("name").to_owned(),
        state: word("state").to_owned(),
        spi_in: spi("spi-in"),
        spi_out: spi("spi-out"),
        packets: (word("packets-in").parse().unwrap_or(0), word("packets-out").parse().unwrap_or(0)),
        encap: word("encap") == "yes",
        all: all.clone(),
    })
}

/// The lines up to the closing brace: `key = value`, `key = [` with a value a line, `name {`.
fn section<'a>(lines: &mut impl Iterator<Item = &'a str>) -> Result<Map<String, Value>> {
    let mut map = Map::new();
    loop {
        let line = lines.next().context("the listing ends within a section")?.trim();
        if line == "}" {
            return Ok(map);
        }
        if let Some(name) = line.strip_suffix(" {") {
            map.insert(name.to_owned(), Value::Object(section(lines)?));
        } else if let Some(name) = line.strip_suffix(" = [") {
            let items = lines.by_ref().map(str::trim).take_while(|line| *line != "]");
            map.insert(name.to_owned(), items.map(Value::from).collect());
        } else if let Some((name, value)) = line.split_once(" = ") {
            map.insert(name.to_owned(), Value::from(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read() {
        let text = "list-sa event {\n  ab {\n    state = ESTABLISHED\n    local-id = C=CH, CN=a b\n    initiator = yes\n    \
            child-sas {\n      net-1 {\n        name = net\n        state = INSTALLED\n        spi-in = ed410a0c\n        \
            packets-in = 3\n        local-ts = [\n          10.1.0.0/24\n          10.3.0.0/24\n        ]\n      }\n    }\n  \
            }\n}\nlist-sas reply {\n}\n";
        let found = sas(text).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].initiator), ("ab", true));
        assert_eq!(found[0].all["local-id"], "C=CH, CN=a b");
        let child = &found[0].children[0];
        assert_eq!((child.spi_in, child.packets, child.encap), (0xed41_0a0c, (3, 0), false));
        assert_eq!(child.all["local-ts"].as_array().unwrap().len(), 2);
        assert!(sas("list-sa event {\n ab {\n").is_err());
    }
}
