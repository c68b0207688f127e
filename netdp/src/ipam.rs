//! Address management: which subnet and which address comes next.
//!
//! Owns the order of choice. Knows neither the model nor the host: callers say what is taken.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

use crate::model::Subnet4;

/// Prefix lengths that a subnet may have: below, it would swallow the world; above, there is no
/// room for the gateway and one container.
pub const SUBNET_PREFIXES: std::ops::RangeInclusive<u8> = 8..=30;

/// Docker's default address pools, in Docker's order.
fn default_pools() -> impl Iterator<Item = Ipv4Net> {
    const LARGE: u8 = 16;
    const SMALL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16);

    let large = (17..=31)
        .map(|second| Ipv4Net::new(Ipv4Addr::new(172, second, 0, 0), LARGE))
        .filter_map(Result::ok);
    large.chain(SMALL.subnets(20).into_iter().flatten())
}

/// The first default pool that is not taken.
pub fn choose_subnet(taken: impl Fn(Ipv4Net) -> bool) -> Option<Ipv4Net> {
    default_pools().find(|&pool| !taken(pool))
}

/// Whether two subnets share an address.
pub fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// Whether an interface in the subnet can have this address: the network's own address and the
/// broadcast address are out.
pub fn is_host_address(subnet: Ipv4Net, address: Ipv4Addr) -> bool {
    subnet.contains(&address) && address != subnet.network() && address != subnet.broadcast()
}

/// The next free address of the range: from `start` on, round to the range's beginning, the
/// gateway and `used` left out. `None` when all are taken.
pub fn choose_address(
    ipv4: &Subnet4,
    start: Ipv4Addr,
    used: &BTreeSet<Ipv4Addr>,
) -> Option<Ipv4Addr> {
    let (first, last) = (u32::from(ipv4.range.network()), u32::from(ipv4.range.broadcast()));
    let start = if ipv4.range.contains(&start) { u32::from(start) } else { first };
    (start..=last)
        .chain(first..start)
        .map(Ipv4Addr::from)
        .find(|&address| is_free(ipv4, address, used))
}

fn is_free(ipv4: &Subnet4, address: Ipv4Addr, used: &BTreeSet<Ipv4Addr>) -> bool {
    is_host_address(ipv4.subnet, address) && address != ipv4.gateway && !used.contains(&address)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn subnet(subnet: &str, range: &str) -> Subnet4 {
        let gateway = net(subnet).hosts().next().unwrap();
        Subnet4 { subnet: net(subnet), gateway, range: net(range) }
    }

    #[test]
    fn pools_are_dockers() {
        let pools: Vec<_> = default_pools().map(|pool| pool.to_string()).collect();
        assert_eq!(pools.len(), 15 + 16);
        assert_eq!(pools[0], "172.17.0.0/16");
        assert_eq!(pools[14], "172.31.0.0/16");
        assert_eq!(pools[15], "192.168.0.0/20");
        assert_eq!(pools[30], "192.168.240.0/20");
    }

    #[test]
    fn subnet_choice_skips_what_is_taken() {
        let busy = net("172.16.0.0/14");
        assert_eq!(choose_subnet(|pool| overlap(pool, busy)), Some(net("172.20.0.0/16")));
        assert_eq!(choose_subnet(|_| true), None);
    }

    #[test]
    fn addresses_run_round_the_range() {
        let ipv4 = subnet("10.1.0.0/29", "10.1.0.0/29");
        let mut used = BTreeSet::new();
        let mut start = ipv4.subnet.network();
        let mut given = Vec::new();
        while let Some(address) = choose_address(&ipv4, start, &used) {
            used.insert(address);
            given.push(address.octets()[3]);
            start = Ipv4Addr::from(u32::from(address) + 1);
        }
        assert_eq!(given, [2, 3, 4, 5, 6]);

        used.remove(&Ipv4Addr::new(10, 1, 0, 3));
        used.remove(&Ipv4Addr::new(10, 1, 0, 5));
        let next = choose_address(&ipv4, Ipv4Addr::new(10, 1, 0, 6), &used);
        assert_eq!(next, Some(Ipv4Addr::new(10, 1, 0, 3)), "wraps to the lowest free one");
    }

    #[test]
    fn the_end_of_the_address_space_is_no_end_of_the_search() {
        let ipv4 = subnet("255.255.255.248/29", "255.255.255.248/29");
        let choice = choose_address(&ipv4, Ipv4Addr::BROADCAST, &BTreeSet::new());
        assert_eq!(choice, Some(Ipv4Addr::new(255, 255, 255, 250)));
    }

    proptest! {
        #[test]
        fn a_choice_is_valid_and_none_means_full(
            base in any::<u32>(),
            prefix in 22u8..=30,
            narrower in 0u8..=6,
            pick in any::<u32>(),
            start in any::<u32>(),
            holes in proptest::collection::btree_set(any::<u16>(), 0..8),
            dense in any::<bool>(),
        ) {
            let whole = Ipv4Net::new(Ipv4Addr::from(base), prefix).unwrap().trunc();
            let inside = u32::from(whole.network()) | (pick & u32::from(whole.hostmask()));
            let range = Ipv4Net::new(Ipv4Addr::from(inside), (prefix + narrower).min(32))
                .unwrap()
                .trunc();
            let gateway = whole.hosts().next().unwrap();
            let ipv4 = Subnet4 { subnet: whole, gateway, range };

            let holes: BTreeSet<u32> = holes
                .into_iter()
                .map(|hole| u32::from(whole.network()) | (u32::from(hole) & u32::from(whole.hostmask())))
                .collect();
            let used: BTreeSet<Ipv4Addr> = (u32::from(whole.network())..=u32::from(whole.broadcast()))
                .filter(|address| holes.contains(address) != dense)
                .map(Ipv4Addr::from)
                .collect();

            let usable = |address: &Ipv4Addr| {
                range.contains(address)
                    && *address != whole.network()
                    && *address != whole.broadcast()
                    && *address != gateway
                    && !used.contains(address)
            };
            let near = u32::from(whole.network()) | (start & u32::from(whole.hostmask()));
            match choose_address(&ipv4, Ipv4Addr::from(near), &used) {
                Some(address) => prop_assert!(usable(&address), "{address} is not usable"),
                None => {
                    let free = (u32::from(range.network())..=u32::from(range.broadcast()))
                        .map(Ipv4Addr::from)
                        .find(usable);
                    prop_assert_eq!(free, None);
                }
            }
        }
    }
}
