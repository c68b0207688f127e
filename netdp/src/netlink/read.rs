//! Reading the host's namespace into [`HostFacts`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        link::{
            AfSpecInet, AfSpecUnspec, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
            LinkMessage,
        },
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};

use super::{Netlink, kernel_error, link::UNFINISHED_GROUP, sysctl};
use crate::{
    facts::{HostFacts, Link, Route},
    model::MacAddress,
};

impl Netlink {
    /// Reads links, addresses, routes and the ephemeral port range of this socket's namespace,
    /// which has to be the calling thread's.
    ///
    /// # Errors
    /// Fails where the kernel refuses a dump.
    pub async fn read_facts(&self) -> Result<HostFacts> {
        let mut links = self.links().await?;
        for message in self.addresses().await? {
            let Some(link) = links.get_mut(&message.header.index) else { continue };
            link.addresses.extend(address(&message));
        }
        let routes = self.routes().await?.iter().filter_map(route).collect();
        let ephemeral_ports = sysctl::ephemeral_ports()?;
        let is_router = sysctl::read("net/ipv4/ip_forward")?.as_deref() == Some("1");
        Ok(HostFacts { links, routes, is_router, ephemeral_ports, ports_in_use: BTreeSet::new() })
    }

    /// Every link without its addresses.
    pub(super) async fn links(&self) -> Result<BTreeMap<u32, Link>> {
        self.handle
            .link()
            .get()
            .execute()
            .map_ok(link)
            .try_collect()
            .await
            .map_err(kernel_error)
            .context("read the links")
    }

    async fn addresses(&self) -> Result<Vec<AddressMessage>> {
        let mut request = self.handle.address().get();
        request.message_mut().header.family = AddressFamily::Inet;
        request.execute().try_collect().await.map_err(kernel_error).context("read the addresses")
    }

    /// The IPv4 routes of all tables.
    pub(super) async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.handle.route().get(all).execute();
        routes.try_collect().await.map_err(kernel_error).context("read the routes")
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
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::AfSpecUnspec(families) => link.forwarding = forwards(&families),
            _ => {}
        }
    }
    // We died between making it and giving it its alias.
    if unfinished && link.alias.is_none() {
        link.alias = Some(format!("{}unfinished", Link::ALIAS_PREFIX));
    }
    (header.index, link)
}

fn forwards(families: &[AfSpecUnspec]) -> bool {
    families.iter().any(|family| {
        let AfSpecUnspec::Inet(settings) = family else { return false };
        settings.iter().any(
            |setting| matches!(setting, AfSpecInet::DevConf(settings) if settings.forwarding != 0),
        )
    })
}

fn address(message: &AddressMessage) -> Option<Ipv4Net> {
    // On point-to-point links IFA_ADDRESS is the other end.
    let local = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
        _ => None,
    };
    let address = message.attributes.iter().find_map(local)?;
    Ipv4Net::new(address, message.header.prefix_len).ok()
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
                destination = Some(*address);
            }
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            // The destination is what matters; one of its interfaces stands for all.
            RouteAttribute::MultiPath(hops) => {
                ifindex = ifindex.or(hops.first().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let destination = Ipv4Net::new(destination?, message.header.destination_prefix_length).ok()?;
    (destination.prefix_len() > 0).then_some(Route { destination, ifindex: ifindex? })
}
