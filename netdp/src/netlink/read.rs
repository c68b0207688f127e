//! Reading the host's namespace into [`HostFacts`].

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{
            AfSpecInet, AfSpecInet6, AfSpecUnspec, Inet6DevConf, InfoBridge, InfoBridgePort,
            InfoData, InfoPortData, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
            LinkLayerType, LinkMessage,
        },
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use super::{Netlink, kernel_error, link::UNFINISHED_GROUP, sysctl, watch::Watch, xfrm};
use crate::{
    facts::{HostFacts, Ipv6Mode, Link, LinkAddress, Links, Route},
    model::MacAddress,
    plan::{IPV6_ROUTER_SYSCTL, force_forwarding_sysctl},
};

impl Netlink {
    /// Reads links, addresses, routes, and what the kernel does with ports, of this socket's namespace,
    /// which has to be the calling thread's.
    ///
    /// # Errors
    /// Fails where the kernel refuses a dump.
    pub async fn read_facts(&self) -> Result<HostFacts> {
        let links = self.known_links().await?;
        // The loopback interface goes with its namespace.
        let loopback = links.values().find(|link| link.loopback);
        let can_force_forwarding = match loopback {
            Some(link) => sysctl::read(&force_forwarding_sysctl(&link.name))?.is_some(),
            None => false,
        };
        let routes = self.known_routes().await?;
        let is_on = |value: Option<String>| value.as_deref() == Some("1");
        Ok(HostFacts {
            links,
            routes,
            is_router: is_on(sysctl::read("net/ipv4/ip_forward")?),
            is_ipv6_router: is_on(sysctl::read(IPV6_ROUTER_SYSCTL)?),
            has_ipv6: Path::new("/proc/sys/net/ipv6").exists(),
            can_force_forwarding,
            has_ipsec: xfrm::has_policies()?,
            ephemeral_ports: sysctl::ephemeral_ports()?,
            reserved_ports: sysctl::reserved_ports()?,
            ports_in_use: BTreeSet::new(),
        })
    }

    /// Has everything read anew next time, whether the kernel has said that it changed or not.
    pub fn forget_facts(&self) {
        if let Some(watch) = &self.watch {
            watch.forget();
        }
    }

    async fn known_links(&self) -> Result<Links> {
        if let Some(links) = self.watch.as_ref().and_then(Watch::links) {
            return Ok(links);
        }
        let links = self.links_with_addresses().await?;
        if let Some(watch) = &self.watch {
            watch.note_links(&links);
        }
        Ok(links)
    }

    async fn known_routes(&self) -> Result<Vec<Route>> {
        if let Some(routes) = self.watch.as_ref().and_then(Watch::routes) {
            return Ok(routes);
        }
        let mut routes = Vec::new();
        for found in [self.routes::<Ipv4Addr>().await?, self.routes::<Ipv6Addr>().await?] {
            routes.extend(found.iter().filter_map(route));
        }
        if let Some(watch) = &self.watch {
            watch.note_routes(&routes);
        }
        Ok(routes)
    }

    /// Every link. Opens no file: one below `/proc/sys/net` takes longer to find the more namespaces
    /// there are.
    pub(super) async fn links_with_addresses(&self) -> Result<Links> {
        let mut links = self.links().await?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in self.addresses(family).await? {
                let Some(link) = links.get_mut(message.header.index) else { continue };
                link.addresses.extend(address(&message));
            }
        }
        Ok(links)
    }

    /// Every link without its addresses.
    pub(super) async fn links(&self) -> Result<Links> {
        // What they counted is much of what there is to say, and nobody asks for it.
        let request = self
            .handle
            .link()
            .get()
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let links = request.execute().map_ok(link);
        let links: Vec<_> =
            links.try_collect().await.map_err(kernel_error).context("read the links")?;
        Ok(links.into_iter().collect())
    }

    async fn addresses(&self, family: AddressFamily) -> Result<Vec<AddressMessage>> {
        let mut request = self.handle.address().get();
        request.message_mut().header.family = family;
        request.execute().try_collect().await.map_err(kernel_error).context("read the addresses")
    }

    /// The routes of all tables of one family.
    pub(super) async fn routes<A>(&self) -> Result<Vec<RouteMessage>>
    where
        RouteMessageBuilder<A>: AllRoutes,
    {
        let routes = self.handle.route().get(RouteMessageBuilder::<A>::all()).execute();
        routes.try_collect().await.map_err(kernel_error).context("read the routes")
    }
}

/// A request for all routes of a family.
pub(super) trait AllRoutes {
    fn all() -> RouteMessage;
}

impl AllRoutes for RouteMessageBuilder<Ipv4Addr> {
    fn all() -> RouteMessage {
        Self::new().build()
    }
}

impl AllRoutes for RouteMessageBuilder<Ipv6Addr> {
    fn all() -> RouteMessage {
        Self::new().build()
    }
}

fn link(message: LinkMessage) -> (u32, Link) {
    let LinkMessage { header, attributes, .. } = message;
    let mut link = Link {
        name: String::new(),
        alias: None,
        kind: None,
        master: None,
        mac: None,
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up),
        loopback: header.flags.contains(LinkFlags::Loopback),
        addresses: Vec::new(),
        forwarding: false,
        forces_forwarding: false,
        is_filtered: false,
        ipv6: Ipv6Mode::default(),
    };
    let mut unfinished = false;
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Controller(ifindex) => link.master = Some(ifindex),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Group(group) => unfinished = group == UNFINISHED_GROUP,
            LinkAttribute::Address(bytes) if header.link_layer_type == LinkLayerType::Ether => {
                link.mac = bytes.try_into().ok().map(MacAddress);
            }
            LinkAttribute::LinkInfo(infos) => {
                link.is_filtered = is_filtered(&infos);
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::AfSpecUnspec(families) => {
                link.forwarding = forwards(&families);
                link.forces_forwarding =
                    ipv6(&families).is_some_and(|settings| settings.force_forwarding != 0);
                link.ipv6 = ipv6(&families).map(ipv6_mode).unwrap_or_default();
            }
            _ => {}
        }
    }
    // We died between making it and giving it its alias.
    if unfinished && link.alias.is_none() {
        link.alias = Some(format!("{}unfinished", Link::ALIAS_PREFIX));
    }
    (header.index, link)
}

/// Whether a bridge shows its packets to iptables, both families, or a port sends packets back.
fn is_filtered(infos: &[LinkInfo]) -> bool {
    infos.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Bridge(settings)) => {
            settings.contains(&InfoBridge::NfCallIpTables(true))
                && settings.contains(&InfoBridge::NfCallIp6Tables(true))
        }
        LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
            settings.contains(&InfoBridgePort::HairpinMode(true))
        }
        _ => false,
    })
}

fn forwards(families: &[AfSpecUnspec]) -> bool {
    families.iter().any(|family| {
        let AfSpecUnspec::Inet(settings) = family else { return false };
        settings.iter().any(
            |setting| matches!(setting, AfSpecInet::DevConf(settings) if settings.forwarding != 0),
        )
    })
}

/// The settings of IPv6; those that the kernel does not know yet are 0.
fn ipv6(families: &[AfSpecUnspec]) -> Option<&Inet6DevConf> {
    families.iter().find_map(|family| {
        let AfSpecUnspec::Inet6(settings) = family else { return None };
        settings.iter().find_map(|setting| match setting {
            AfSpecInet6::DevConf(settings) => Some(settings),
            _ => None,
        })
    })
}

/// What [`super::link::ensure_ipv6`] and [`super::link::refuse_ipv6`] make of an interface.
fn ipv6_mode(settings: &Inet6DevConf) -> Ipv6Mode {
    let Inet6DevConf { accept_ra, autoconf, addr_gen_mode, accept_dad, dad_transmits, .. } =
        *settings;
    if settings.disable_ipv6 != 0 {
        Ipv6Mode::Off
    } else if [accept_ra, autoconf, addr_gen_mode, accept_dad, dad_transmits] == [0; 5] {
        Ipv6Mode::Quiet
    } else {
        Ipv6Mode::Other
    }
}

fn address(message: &AddressMessage) -> Option<LinkAddress> {
    let mut address = None;
    let mut local = None;
    // The header has room for the first eight flags only.
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(found) => address = Some(*found),
            AddressAttribute::Local(found) => local = Some(*found),
            AddressAttribute::Flags(found) => flags = *found,
            _ => {}
        }
    }
    // On point-to-point links IFA_ADDRESS is the other end. IPv6 has IFA_LOCAL only there.
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    if flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    // For IPv6 this bit is IFA_F_TEMPORARY (include/uapi/linux/if_addr.h).
    let passing = AddressFlags::Secondary | AddressFlags::Deprecated | AddressFlags::Tentative;
    let is_steady = net.addr().is_ipv4() || !flags.intersects(passing);
    Some(LinkAddress { net, is_steady })
}

/// A unicast route of the main table that is not the default.
fn route(message: &RouteMessage) -> Option<Route> {
    let wanted = message.header.table == RouteHeader::RT_TABLE_MAIN
        && message.header.kind == RouteType::Unicast;
    if !wanted {
        return None;
    }
    let mut destination = None;
    let mut ifindex = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                destination = Some(IpAddr::V4(*address));
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                destination = Some(IpAddr::V6(*address));
            }
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            // The destination is what matters; one of its interfaces stands for all.
            RouteAttribute::MultiPath(hops) => {
                ifindex = ifindex.or(hops.first().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let destination = IpNet::new(destination?, message.header.destination_prefix_length).ok()?;
    (destination.prefix_len() > 0).then_some(Route { destination, ifindex: ifindex? })
}
