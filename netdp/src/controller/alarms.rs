//! What the operator should know of and the agent can't repair: flow tables that fill, names and
//! addresses that the host does not have.
//!
//! Pure, but for the log of the caller. Where something could not be done, it is a trouble instead.

use std::collections::BTreeSet;

use crate::{
    dataplane::FlowTable,
    facts::HostFacts,
    family::{Family, V4, V6},
    model::{Model, Network, NetworkId},
    plan::Setting,
};

/// Filled to this many hundredths, a table is worth a word ...
const HIGH: u64 = 90;
/// ... and it is worth another one only after it was emptier than this.
const LOW: u64 = 80;

/// One thing to know of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alarm {
    about: About,
    /// One line: what, and what to do.
    pub(super) text: String,
}

/// What an alarm is about: it is logged once for each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum About {
    /// By the name of the family.
    FlowTable(&'static str),
    Uplink(String),
    Ipsec,
    /// The network, and the name of the family.
    SourceAddress(NetworkId, &'static str),
}

/// All that there is to know at present.
pub(super) fn alarms(
    model: &Model,
    facts: &HostFacts,
    setting: &Setting,
    tables: &[FlowTable],
) -> Vec<Alarm> {
    let full = tables.iter().filter(|table| percent(table) >= HIGH).map(|table| Alarm {
        about: About::FlowTable(table.family),
        text: format!(
            "the {} flow table is {} % full ({} of {}): idle flows end early, and new ones are \
             refused when it is full; see --flows, --timeout and netdp.endpoint_flows",
            table.family,
            percent(table),
            table.flows,
            table.capacity
        ),
    });
    // Before there is a network, uplinks are of no use.
    let uplinks = setting.uplinks.iter().filter(|_| !model.networks.is_empty());
    let missing = uplinks.filter(|name| facts.link(name).is_none()).map(|name| Alarm {
        about: About::Uplink(name.clone()),
        text: format!(
            "uplink {name}: this host has no such interface; nothing leaves by it until it comes, \
             or --uplink names another"
        ),
    });
    let foreign = model.networks.values().flat_map(|network| {
        [
            foreign_source::<V4>(network, network.ipv4.and_then(|side| side.snat_ip), facts),
            foreign_source::<V6>(network, network.ipv6.and_then(|side| side.snat_ip), facts),
        ]
    });
    // A host without networks is left as it is.
    let has_ipsec = facts.has_ipsec && !model.networks.is_empty();
    let ipsec = has_ipsec.then(|| Alarm {
        about: About::Ipsec,
        text: "this host has IPsec policies, so nothing of a container goes past its stack: they \
               would not see it"
            .to_owned(),
    });
    full.chain(missing).chain(foreign.flatten()).chain(ipsec).collect()
}

/// Of a network that leaves with a source address that the host does not have.
fn foreign_source<F: Family>(
    network: &Network,
    address: Option<F::Address>,
    facts: &HostFacts,
) -> Option<Alarm> {
    let address = address.filter(|&address| !facts.is_local(address.into()))?;
    Some(Alarm {
        about: About::SourceAddress(network.id, F::NAME),
        text: format!(
            "network {:?} leaves as {address}, which no interface of this host has: add it to one, \
             or see that the world routes it here",
            network.name
        ),
    })
}

/// The alarms that were not heard before, in `heard` from now on.
pub(super) fn unheard<'a>(
    alarms: &'a [Alarm],
    tables: &[FlowTable],
    heard: &mut BTreeSet<About>,
) -> Vec<&'a Alarm> {
    heard.retain(|about| match about {
        About::FlowTable(family) => {
            tables.iter().any(|table| table.family == *family && percent(table) >= LOW)
        }
        _ => alarms.iter().any(|alarm| alarm.about == *about),
    });
    alarms.iter().filter(|alarm| heard.insert(alarm.about.clone())).collect()
}

fn percent(table: &FlowTable) -> u64 {
    u64::from(table.flows) * 100 / u64::from(table.capacity.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests as fixture;

    fn table(flows: u32) -> [FlowTable; 1] {
        [FlowTable { family: V4::NAME, flows, capacity: 1000 }]
    }

    fn texts(model: &Model, setting: &Setting, tables: &[FlowTable]) -> Vec<String> {
        let alarms = alarms(model, &fixture::host(), setting, tables);
        alarms.into_iter().map(|alarm| alarm.text).collect()
    }

    #[test]
    fn a_filling_table_is_told_once_until_it_has_emptied() {
        let mut heard = BTreeSet::new();
        let mut logged = |flows| {
            let tables = table(flows);
            let (model, setting) = (Model::default(), Setting::default());
            let alarms = alarms(&model, &fixture::host(), &setting, &tables);
            unheard(&alarms, &tables, &mut heard).len()
        };
        let story = [899, 900, 950, 899, 901, 799, 899, 1000];
        assert_eq!(story.map(&mut logged), [0, 1, 0, 0, 0, 0, 0, 1]);

        let texts = texts(&Model::default(), &Setting::default(), &table(930));
        assert!(
            texts[0].starts_with("the IPv4 flow table is 93 % full (930 of 1000)"),
            "{texts:?}"
        );
    }

    #[test]
    fn an_uplink_that_is_not_there_is_named() {
        let uplinks = ["eth0".to_owned(), "eth9".to_owned()].into();
        let setting = Setting { uplinks, ..Setting::default() };
        let told = texts(&fixture::model_with_network("a"), &setting, &[]);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with("uplink eth9: this host has no such interface"), "{told:?}");
        assert_eq!(texts(&Model::default(), &setting, &[]), [""; 0], "nobody needs it yet");
    }

    #[test]
    fn a_source_address_that_the_host_lacks_is_named() {
        let mut model = Model::default();
        for (name, subnet, sources) in [
            ("a", "172.20.0.0/24", ["10.0.0.4", "fd00::2"]),
            ("b", "172.21.0.0/24", ["10.0.0.9", "fd00::9"]),
        ] {
            let mut spec = fixture::network_spec(name, subnet);
            spec.enable_ipv6 = Some(true);
            spec.snat_ips = sources.map(|address| address.parse().unwrap()).into();
            model.create_network(spec, &fixture::host()).unwrap();
        }
        let told = texts(&model, &Setting::default(), &[]);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("network \"b\" leaves as 10.0.0.9, which"), "{told:?}");
        assert!(told[1].starts_with("network \"b\" leaves as fd00::9, which"), "{told:?}");
    }
}
