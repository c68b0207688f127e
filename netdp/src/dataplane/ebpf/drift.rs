//! Differences between what the maps should hold and what they do, in words.

use std::{collections::BTreeMap, fmt::Debug, net::Ipv4Addr};

use netdp_common::flow::IPPROTO_UDP;

use super::image::Image;
use crate::dataplane::Drift;

/// Everything that is missing, extra or different in `found`.
pub(super) fn between(wanted: &Image, found: &Image) -> Vec<Drift> {
    let mut drifts = Vec::new();
    let mut compare = Comparison { drifts: &mut drifts };
    compare.tables("configuration", &wanted.config, &found.config, |_| String::new());
    compare.tables("network", &wanted.networks, &found.networks, ToString::to_string);
    compare.tables(
        "map entry of the interface",
        &wanted.interfaces,
        &found.interfaces,
        |ifindex| format!("with ifindex {ifindex}"),
    );
    compare.tables("endpoint", &wanted.endpoints, &found.endpoints, |&address| {
        Ipv4Addr::from(address).to_string()
    });
    compare.tables("published port", &wanted.published, &found.published, |key| {
        let address = Ipv4Addr::from(key.address);
        let protocol = if key.proto == IPPROTO_UDP { "udp" } else { "tcp" };
        format!("{protocol} {address}:{}", key.port.get())
    });
    compare.tables("subnet", &wanted.subnets, &found.subnets, |&(length, address)| {
        format!("{}/{length}", Ipv4Addr::from(address))
    });
    compare.tables("local address", &wanted.local, &found.local, |&address| {
        Ipv4Addr::from(address).to_string()
    });
    compare.tables("policy entry", &wanted.policies, &found.policies, |&(length, key)| {
        let address = Ipv4Addr::from(key.address);
        format!("{address}/{} of network {}", length.saturating_sub(64), key.network)
    });
    let hooks = |image: &Image| image.hooks.iter().map(|&hook| (hook, ())).collect();
    compare.tables("program", &hooks(wanted), &hooks(found), |(hook, ifindex)| {
        format!("{} on ifindex {ifindex}", hook.program())
    });
    drifts
}

struct Comparison<'a> {
    drifts: &'a mut Vec<Drift>,
}

impl Comparison<'_> {
    fn tables<K: Ord, V: PartialEq + Debug>(
        &mut self,
        noun: &str,
        wanted: &BTreeMap<K, V>,
        found: &BTreeMap<K, V>,
        describe: impl Fn(&K) -> String,
    ) {
        let mut report = |key: &K, what: &str| {
            let what = [noun, &describe(key), what].iter().filter(|word| !word.is_empty()).fold(
                String::new(),
                |sentence, word| {
                    if sentence.is_empty() {
                        (*word).to_owned()
                    } else {
                        format!("{sentence} {word}")
                    }
                },
            );
            self.drifts.push(Drift { what });
        };
        for (key, value) in wanted {
            match found.get(key) {
                None => report(key, "is missing"),
                Some(other) if other != value => report(key, "differs"),
                Some(_) => {}
            }
        }
        for key in found.keys().filter(|key| !wanted.contains_key(key)) {
            report(key, "should not be there");
        }
    }
}
