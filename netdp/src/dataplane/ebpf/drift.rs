//! Differences between what the maps should hold and what they do, in words.

use std::{collections::BTreeMap, net::SocketAddr};

use netdp_common::policy::PREFIX_BASE;

use super::{
    family::{Wired, show},
    image::{Image, Side},
    tables::Contents,
};
use crate::{
    dataplane::{Drift, protocol_name},
    difference::Step,
    family::{V4, V6},
};

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
    compare.tables("slot of the interface", &wanted.slots, &found.slots, ToString::to_string);
    compare.tables(
        "entry of the published port",
        &wanted.published_ports,
        &found.published_ports,
        |port| format!("{} {}", protocol_name(port.proto), port.port.get()),
    );
    compare.sides::<V4>(&wanted.ipv4, &found.ipv4);
    compare.sides::<V6>(&wanted.ipv6, &found.ipv6);
    let hooks =
        |image: &Image| -> BTreeMap<_, _> { image.hooks.iter().map(|&hook| (hook, ())).collect() };
    compare.tables("program", &hooks(wanted), &hooks(found), |(hook, ifindex)| {
        format!("{} on ifindex {ifindex}", hook.program())
    });
    drifts
}

struct Comparison<'a> {
    drifts: &'a mut Vec<Drift>,
}

impl Comparison<'_> {
    fn sides<F: Wired>(&mut self, wanted: &Side<F::Wire>, found: &Side<F::Wire>) {
        self.tables("endpoint", &wanted.endpoints, &found.endpoints, |&address| {
            show::<F>(address).to_string()
        });
        self.tables("published port", &wanted.published, &found.published, |key| {
            let protocol = protocol_name(key.proto);
            format!("{protocol} {}", SocketAddr::new(show::<F>(key.address), key.port.get()))
        });
        self.tables("subnet", &wanted.subnets, &found.subnets, |&(length, address)| {
            format!("{}/{length}", show::<F>(address))
        });
        self.tables("local address", &wanted.local, &found.local, |&address| {
            show::<F>(address).to_string()
        });
        self.tables("policy entry", &wanted.policies, &found.policies, |&(length, key)| {
            let address = show::<F>(key.address);
            format!("{address}/{} of network {}", length.saturating_sub(PREFIX_BASE), key.network)
        });
    }

    fn tables<K: Copy, V: Copy, C: Contents<K, V>>(
        &mut self,
        noun: &str,
        wanted: &C,
        found: &C,
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
        for step in found.steps(wanted) {
            match step {
                Step::Put(key, _) if found.has(key) => report(&key, "differs"),
                Step::Put(key, _) => report(&key, "is missing"),
                Step::Remove(key) => report(&key, "should not be there"),
            }
        }
    }
}
