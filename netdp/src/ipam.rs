//! Address management: which subnet and which address comes next.
//!
//! Owns the order of choice. Knows neither the model nor the host: callers say what is taken.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{family::Family, model::Subnet};

/// Docker's default address pools, in Docker's order.
pub fn default_pools() -> impl Iterator<Item = Ipv4Net> {
    const LARGE: u8 = 16;
    const SMALL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16);

    let large = (17..=31)
        .map(|second| Ipv4Net::new(Ipv4Addr::new(172, second, 0, 0), LARGE))
        .filter_map(Result::ok);
    large.chain(SMALL.subnets(20).into_iter().flatten())
}

/// The subnets of a host's own unique local prefix, in order.
pub fn unique_local_subnets(prefix: Ipv6Net) -> impl Iterator<Item = Ipv6Net> {
    prefix.subnets(64).into_iter().flatten()
}

/// Whether two nets share an address.
pub fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// Whether all of `part` is in `whole`.
pub fn covers<F: Family>(whole: F::Net, part: F::Net) -> bool {
    F::first(whole) <= F::first(part) && F::last(part) <= F::last(whole)
}

/// Whether an interface in the subnet can have this address. The first one is the network's own,
/// or means any router of it (RFC 4291, section 2.6.1); the last one of IPv4 is for broadcasts.
pub fn is_host_address<F: Family>(subnet: F::Net, address: F::Address) -> bool {
    (F::next(F::first(subnet))..=last_host::<F>(subnet)).contains(&address)
}

/// The last address that an interface in the subnet can have.
pub fn last_host<F: Family>(subnet: F::Net) -> F::Address {
    F::address(F::bits(F::last(subnet)) - u128::from(F::HAS_BROADCAST))
}

/// The next free address of the range: from the subnet's mark on, round to the range's beginning,
/// the gateway and `used` left out. `None` when all are taken.
pub fn choose_address<F: Family>(
    side: &Subnet<F>,
    used: &BTreeSet<F::Address>,
) -> Option<F::Address> {
    let (first, last) = (F::bits(F::first(side.range)), F::bits(F::last(side.range)));
    let mark = F::bits(side.next_address);
    let start = if (first..=last).contains(&mark) { mark } else { first };
    (start..=last).chain(first..start).map(F::address).find(|&address| is_free(side, address, used))
}

fn is_free<F: Family>(side: &Subnet<F>, address: F::Address, used: &BTreeSet<F::Address>) -> bool {
    is_host_address::<F>(side.subnet, address)
        && address != side.gateway
        && !used.contains(&address)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::family::{V4, V6};

    fn side<F: Family<Address: FromStrDebug, Net: FromStrDebug>>(
        subnet: &str,
        range: &str,
    ) -> Subnet<F> {
        let subnet: F::Net = parse(subnet);
        let range: F::Net = parse(range);
        Subnet {
            subnet,
            gateway: F::next(F::first(subnet)),
            range,
            next_address: F::first(range),
            host_binding: None,
            snat_ip: None,
        }
    }

    trait FromStrDebug: std::str::FromStr<Err: std::fmt::Debug> {}
    impl<T: std::str::FromStr<Err: std::fmt::Debug>> FromStrDebug for T {}

    fn parse<T: FromStrDebug>(text: &str) -> T {
        text.parse().unwrap()
    }

    /// All addresses in the order in which they are given.
    fn given<F: Family>(mut side: Subnet<F>) -> Vec<String> {
        let mut used = BTreeSet::new();
        let mut given = Vec::new();
        while let Some(address) = choose_address(&side, &used) {
            used.insert(address);
            given.push(address.to_string());
            side.next_address = F::next(address);
        }
        given
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
    fn unique_local_subnets_come_in_order() {
        let subnets: Vec<_> = unique_local_subnets(parse("fd12:3456:789a::/48")).collect();
        assert_eq!(subnets.len(), 65_536);
        assert_eq!(subnets[0], parse("fd12:3456:789a::/64"));
        assert_eq!(subnets[1], parse("fd12:3456:789a:1::/64"));
        assert_eq!(subnets[65_535], parse("fd12:3456:789a:ffff::/64"));
    }

    #[test]
    fn addresses_run_round_the_range() {
        let expected = [2, 3, 4, 5, 6].map(|last| format!("10.1.0.{last}"));
        assert_eq!(given(side::<V4>("10.1.0.0/29", "10.1.0.0/29")), expected);
        // No broadcast; but the first address is the routers'.
        assert_eq!(given(side::<V6>("fd00::/126", "fd00::/126")), ["fd00::2", "fd00::3"]);

        let ipv4 = Subnet {
            next_address: Ipv4Addr::new(10, 1, 0, 6),
            ..side::<V4>("10.1.0.0/29", "10.1.0.0/29")
        };
        let used = [2, 4, 6].map(|last| Ipv4Addr::new(10, 1, 0, last)).into();
        let next = choose_address(&ipv4, &used);
        assert_eq!(next, Some(Ipv4Addr::new(10, 1, 0, 3)), "wraps to the lowest free one");
    }

    #[test]
    fn the_size_of_a_subnet_costs_nothing() {
        let mut ipv6 = side::<V6>("fd00::/48", "fd00::/48");
        let used = (1..1000u128).map(|host| V6::address(V6::bits(ipv6.gateway) + host)).collect();
        assert_eq!(choose_address(&ipv6, &used), Some(parse("fd00::3e9")));
        ipv6.next_address = parse("fd00:0:0:ffff:ffff:ffff:ffff:ffff");
        assert_eq!(choose_address(&ipv6, &used), Some(ipv6.next_address));
    }

    #[test]
    fn the_end_of_the_address_space_is_no_end_of_the_search() {
        let ipv4 = Subnet {
            next_address: Ipv4Addr::BROADCAST,
            ..side::<V4>("255.255.255.248/29", "255.255.255.248/29")
        };
        let choice = choose_address(&ipv4, &BTreeSet::new());
        assert_eq!(choice, Some(Ipv4Addr::new(255, 255, 255, 250)));
    }

    /// A subnet of `room` bits, a range in it, a mark, and which of its addresses are used.
    #[derive(Clone, Debug)]
    struct Case {
        base: u128,
        room: u8,
        narrower: u8,
        pick: u128,
        mark: u128,
        holes: BTreeSet<u16>,
        dense: bool,
    }

    prop_compose! {
        fn case()(
            base in any::<u128>(),
            room in 2u8..=10,
            narrower in 0u8..=6,
            pick in any::<u128>(),
            mark in any::<u128>(),
            holes in proptest::collection::btree_set(any::<u16>(), 0..8),
            dense in any::<bool>(),
        ) -> Case {
            Case { base, room, narrower, pick, mark, holes, dense }
        }
    }

    fn check<F: Family>(case: &Case, bits: u8, net: impl Fn(F::Address, u8) -> F::Net) {
        let mask = (1u128 << case.room) - 1;
        let subnet = net(F::address(case.base & !mask), bits - case.room);
        let first = F::bits(F::first(subnet));
        let narrower = case.narrower.min(case.room);
        let range_mask = mask >> narrower;
        let inside = first | (case.pick & mask & !range_mask);
        let range = net(F::address(inside), bits - case.room + narrower);
        let side: Subnet<F> = Subnet {
            subnet,
            gateway: F::next(F::first(subnet)),
            range,
            next_address: F::address(first | (case.mark & mask)),
            host_binding: None,
            snat_ip: None,
        };
        let holes: BTreeSet<u128> =
            case.holes.iter().map(|hole| first | (u128::from(*hole) & mask)).collect();
        let used: BTreeSet<F::Address> = (first..=first + mask)
            .filter(|address| holes.contains(address) != case.dense)
            .map(F::address)
            .collect();

        let is_usable = |address: u128| {
            address & !range_mask == inside
                && address != first
                && address != first + 1
                && (bits == 128 || address != first + mask)
                && !used.contains(&F::address(address))
        };
        match choose_address(&side, &used) {
            Some(address) => assert!(is_usable(F::bits(address)), "{address} is not usable"),
            None => assert_eq!((first..=first + mask).find(|&address| is_usable(address)), None),
        }
    }

    proptest! {
        #[test]
        fn a_choice_is_valid_and_none_means_full(case in case()) {
            check::<V4>(&case, 32, |address, length| Ipv4Net::new(address, length).unwrap());
            check::<V6>(&case, 128, |address, length| Ipv6Net::new(address, length).unwrap());
        }
    }
}
