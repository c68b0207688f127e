//! Records of earlier schemas, brought to the shape of the present one.
//!
//! Works on JSON, so that shapes that are gone need no types. Knows what changed from one schema
//! to the next and nothing else.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// A network of schema 1, which knew IPv4 only.
pub(super) fn network_of_schema_1(record: &mut Map<String, Value>) -> Result<()> {
    let mut side = Map::new();
    for field in ["subnet", "gateway", "range", "next_address", "host_binding", "snat_ip"] {
        let value = record.remove(field).with_context(|| format!("{field} is missing"))?;
        side.insert(field.to_owned(), value);
    }
    record.insert("ipv4".to_owned(), side.into());
    record.insert("ipv6".to_owned(), Value::Null);
    let rules = record.get_mut("policy").and_then(Value::as_array_mut);
    for rule in rules.context("policy is missing")? {
        let rule = rule.as_object_mut().context("a rule is no object")?;
        let first = rule.remove("first").context("first is missing")?;
        let last = rule.remove("last").context("last is missing")?;
        // "any" was written like this.
        let is_any = first == "0.0.0.0" && last == "255.255.255.255";
        let range = if is_any { Value::Null } else { json!([first, last]) };
        rule.insert("range".to_owned(), range);
    }
    Ok(())
}

/// An endpoint of schema 1.
pub(super) fn endpoint_of_schema_1(record: &mut Map<String, Value>) -> Result<()> {
    let address = record.remove("address").context("address is missing")?;
    record.insert("ipv4".to_owned(), address);
    record.insert("ipv6".to_owned(), Value::Null);
    Ok(())
}
