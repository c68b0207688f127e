//! Bridges, the host's ends of veth pairs, and the neighbour entries on the bridges.
//!
//! Everything here is idempotent and compares before it writes: a write makes an event, and an
//! event makes the agent look again. New links stay down, and no port of a bridge, until
//! [`Netlink::open_bridge`] and [`Netlink::open_veth`]: no packet passes before the backend knows
//! them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::IpAddr,
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags},
        link::{InfoData, InfoVeth, LinkAttribute},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
    },
};

use super::{Netlink, kernel_error, namespace::Namespace, sysctl, unless};
use crate::{
    facts::{HostFacts, Ipv6Mode, Link},
    model::MacAddress,
    plan::{BridgePlan, VethPlan, force_forwarding_sysctl, forwarding_sysctl, is_port_of},
};

/// Interface group ("nd" in the high half) of a link from its making to its alias, which are two
/// requests: whoever finds it knows that it is ours and was never finished.
pub(super) const UNFINISHED_GROUP: u32 = 0x6e64_0000;

/// The group that every link is in by default.
const DEFAULT_GROUP: u32 = 0;

/// Permanent neighbour entries to be on one bridge.
pub(crate) type Neighbours = BTreeMap<IpAddr, MacAddress>;

impl Netlink {
    /// Makes a bridge exist with its address, MAC, MTU and sysctls; a new one is left down.
    ///
    /// # Errors
    /// Fails where the name is taken by a link that is not this network's bridge, and names what
    /// the kernel refused.
    pub async fn ensure_bridge(&self, plan: &BridgePlan, facts: &HostFacts) -> Result<()> {
        let ifindex = match existing(&plan.name, &plan.alias, facts)? {
            Some((ifindex, _)) => ifindex,
            None => self.make_bridge(plan).await?,
        };
        let link = facts.links.get(&ifindex);
        if link.is_none_or(|link| link.mtu != plan.mtu || link.mac != Some(plan.mac)) {
            let change =
                LinkUnspec::new_with_index(ifindex).mtu(plan.mtu).address(plan.mac.0.to_vec());
            self.change(change)
                .await
                .with_context(|| format!("set MTU and MAC of bridge {}", plan.name))?;
        }
        if link.map_or(plan.is_filtered, |link| link.is_filtered != plan.is_filtered) {
            let change = LinkMessageBuilder::<LinkBridge>::new(&plan.name)
                .nf_call_iptables(plan.is_filtered)
                .nf_call_ip6tables(plan.is_filtered);
            self.change(change)
                .await
                .with_context(|| format!("show what {} switches to iptables", plan.name))?;
        }
        if plan.ipv4.is_some() {
            sysctl::ensure(&forwarding_sysctl(&plan.name), "1")?;
        }
        if plan.ipv6.is_some() {
            ensure_ipv6(&plan.name, link)?;
            // A router to its containers, which is what it says of itself in neighbour discovery.
            sysctl::ensure(&format!("net/ipv6/conf/{}/forwarding", plan.name), "1")?;
            sysctl::ensure(&force_forwarding_sysctl(&plan.name), "1")?;
        } else {
            // Or the bridge would answer on a link-local address.
            refuse_ipv6(&plan.name, link)?;
        }
        for net in plan.addresses() {
            if link.is_none_or(|link| !link.has_address(net)) {
                self.add_address(ifindex, net)
                    .await
                    .with_context(|| format!("give bridge {} its address", plan.name))?;
            }
        }
        Ok(())
    }

    /// Makes a veth pair exist, its container's end in the container's namespace, or on the host where
    /// there is none; the host's end of a new one is left down. Returns the ifindex of the host's end.
    ///
    /// # Errors
    /// Fails where a name is taken, and names what the kernel refused.
    pub async fn ensure_veth(
        &self,
        plan: &VethPlan,
        namespace: Option<&Namespace>,
        facts: &HostFacts,
    ) -> Result<u32> {
        let ifindex = match existing(&plan.name, &plan.alias, facts)? {
            Some((ifindex, _)) => ifindex,
            None => self.make_veth(plan, namespace).await?,
        };
        // The host's end is a port; nothing on the host talks through it directly.
        refuse_ipv6(&plan.name, facts.links.get(&ifindex))?;
        Ok(ifindex)
    }

    /// Lets packets through a bridge.
    ///
    /// # Errors
    /// Names what the kernel refused.
    pub async fn open_bridge(&self, plan: &BridgePlan, facts: &HostFacts) -> Result<()> {
        let Some((ifindex, link)) = facts.link(&plan.name) else {
            bail!("set up bridge {}: it is gone", plan.name);
        };
        if !link.up {
            self.change(LinkUnspec::new_with_index(ifindex).up())
                .await
                .with_context(|| format!("set up bridge {}", plan.name))?;
        }
        Ok(())
    }

    /// Makes the host's end of a veth pair a port of its bridge and lets packets through. Returns whether
    /// it was shut, which [`Netlink::await_carrier`] goes on from.
    ///
    /// # Errors
    /// Names what the kernel refused.
    pub async fn open_veth(&self, plan: &VethPlan, facts: &HostFacts) -> Result<bool> {
        let (Some((ifindex, link)), Some((bridge, _))) =
            (facts.link(&plan.name), facts.link(&plan.bridge))
        else {
            bail!("connect {} to bridge {}: one of them is gone", plan.name, plan.bridge);
        };
        let was_shut = !is_port_of(facts, link, &plan.bridge) || !link.up;
        if was_shut {
            self.change(LinkUnspec::new_with_index(ifindex).controller(bridge).up())
                .await
                .with_context(|| format!("connect {} to bridge {}", plan.name, plan.bridge))?;
            self.tell_bridge(ifindex, plan.mac)
                .await
                .with_context(|| format!("tell bridge {} who is at {}", plan.bridge, plan.name))?;
        }
        if link.is_filtered != plan.is_filtered {
            self.change(LinkBridgePort::new(ifindex).hairpin(plan.is_filtered))
                .await
                .with_context(|| format!("let packets turn around at {}", plan.name))?;
        }
        Ok(was_shut)
    }

    /// Tells a bridge the MAC address behind its port `ifindex`. It learns from what it forwards,
    /// and what goes past it teaches it nothing: it would flood what is for that station.
    async fn tell_bridge(&self, ifindex: u32, mac: MacAddress) -> Result<()> {
        self.handle
            .neighbours()
            .add_bridge(ifindex, &mac.0)
            // A permanent one would be an address of the bridge itself.
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller)
            .replace()
            .execute()
            .await
            .map_err(kernel_error)
    }

    /// Makes the permanent neighbour entries of some interfaces exactly these.
    ///
    /// # Errors
    /// Names the entry that the kernel refused.
    pub async fn ensure_neighbours(&self, wanted: &BTreeMap<u32, Neighbours>) -> Result<()> {
        let mut present = BTreeSet::new();
        let mut messages: Vec<NeighbourMessage> = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let dump = self.handle.neighbours().get().set_address_family(family).execute();
            let found: Vec<_> =
                dump.try_collect().await.map_err(kernel_error).context("read the neighbours")?;
            messages.extend(found);
        }
        for message in messages {
            let ifindex = message.header.ifindex;
            let Some((address, mac)) = permanent(&message) else { continue };
            let Some(entries) = wanted.get(&ifindex) else { continue };
            if entries.get(&address) == Some(&mac) {
                present.insert((ifindex, address));
            } else if !entries.contains_key(&address) {
                let removed = self.handle.neighbours().del(message).execute().await;
                unless(removed, &[ErrorKind::NotFound])
                    .with_context(|| format!("remove the neighbour entry of {address}"))?;
            }
        }
        for (&ifindex, entries) in wanted {
            for (&address, mac) in entries {
                if !present.contains(&(ifindex, address)) {
                    self.handle
                        .neighbours()
                        .add(ifindex, address)
                        .link_layer_address(&mac.0)
                        .replace()
                        .execute()
                        .await
                        .map_err(kernel_error)
                        .with_context(|| format!("make a neighbour entry for {address}"))?;
                }
            }
        }
        Ok(())
    }

    /// Stops all packets through a link; one that is gone already is fine.
    ///
    /// # Errors
    /// Names the link.
    pub async fn shut_link(&self, ifindex: u32, link: &Link) -> Result<()> {
        if !link.up {
            return Ok(());
        }
        let message = LinkUnspec::new_with_index(ifindex).down().build();
        let shut = self.handle.link().change(message).execute().await;
        unless_gone(shut).with_context(|| format!("set down interface {}", link.name))
    }

    /// Deletes a link, and with a host's end of a veth pair the container's; one that is gone
    /// already is fine.
    ///
    /// # Errors
    /// Names the link.
    pub async fn delete_link(&self, ifindex: u32, link: &Link) -> Result<()> {
        let deleted = self.handle.link().del(ifindex).execute().await;
        unless_gone(deleted).with_context(|| format!("delete interface {}", link.name))
    }

    pub(super) async fn add<T>(&self, link: LinkMessageBuilder<T>) -> Result<()> {
        self.handle.link().add(link.build()).execute().await.map_err(kernel_error)
    }

    pub(super) async fn change<T>(&self, change: LinkMessageBuilder<T>) -> Result<()> {
        self.handle.link().change(change.build()).execute().await.map_err(kernel_error)
    }

    pub(super) async fn add_address(&self, ifindex: u32, net: IpNet) -> Result<()> {
        let mut request = self.handle.address().add(ifindex, net.addr(), net.prefix_len());
        if net.addr().is_ipv6() {
            // We know that nobody else has it, and it has to work at once.
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        unless(request.execute().await, &[ErrorKind::AlreadyExists])
            .with_context(|| format!("add address {net}"))
    }

    async fn make_bridge(&self, plan: &BridgePlan) -> Result<u32> {
        let link = LinkMessageBuilder::<LinkBridge>::new(&plan.name)
            .address(plan.mac.0.to_vec())
            .append_extra_attribute(LinkAttribute::Group(UNFINISHED_GROUP));
        self.add(link).await.with_context(|| format!("make bridge {}", plan.name))?;
        self.finish(&plan.name, &plan.alias).await
    }

    async fn make_veth(&self, plan: &VethPlan, namespace: Option<&Namespace>) -> Result<u32> {
        let container_end = LinkMessageBuilder::<LinkUnspec>::new()
            .name(&plan.interface)
            .mtu(plan.mtu)
            .address(plan.mac.0.to_vec());
        let (container_end, place) = match namespace {
            // Made where it belongs, under its final name: it never shows up on the host.
            Some(namespace) => {
                let there = container_end.setns_by_fd(namespace.file().as_raw_fd());
                (there, namespace.path().display().to_string())
            }
            None => {
                let here = LinkAttribute::Group(UNFINISHED_GROUP);
                (container_end.append_extra_attribute(here), "the host".to_owned())
            }
        };
        let link = LinkMessageBuilder::<LinkVeth>::new(&plan.name, &plan.interface)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(container_end.build())))
            .mtu(plan.mtu)
            .append_extra_attribute(LinkAttribute::Group(UNFINISHED_GROUP));
        self.add(link).await.with_context(|| {
            format!("make veth {} with {} in {place}", plan.name, plan.interface)
        })?;
        if let Some(alias) = plan.offer_alias() {
            self.finish(&plan.interface, &alias).await?;
        }
        self.finish(&plan.name, &plan.alias).await
    }

    /// Gives a link that was just made its alias.
    pub(super) async fn finish(&self, name: &str, alias: &str) -> Result<u32> {
        let mut found = self.handle.link().get().match_name(name).execute();
        let link = found.try_next().await.map_err(kernel_error)?;
        let ifindex = link.with_context(|| format!("find interface {name}"))?.header.index;
        let change = LinkUnspec::new_with_index(ifindex).alias(alias).link_group(DEFAULT_GROUP);
        self.change(change).await.with_context(|| format!("set the alias of {name}"))?;
        Ok(ifindex)
    }
}

/// The link of this name, if there is one and it is what the alias says.
fn existing<'a>(name: &str, alias: &str, facts: &'a HostFacts) -> Result<Option<(u32, &'a Link)>> {
    match facts.link(name) {
        Some((_, link)) if link.alias.as_deref() != Some(alias) => bail!(
            "interface {name} exists and is not \"{alias}\" (its alias is \"{}\"): rename or \
             delete it",
            link.alias.as_deref().unwrap_or_default()
        ),
        found => Ok(found),
    }
}

pub(super) fn unless_gone(result: Result<(), rtnetlink::Error>) -> Result<()> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message))
            if message.to_io().raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(())
        }
        other => other.map_err(kernel_error),
    }
}

/// Switches IPv6 on at an interface: with addresses from us, a link-local one that follows from the
/// MAC address (RFC 4291, appendix A) and counts at once, and nothing that somebody advertises. `link` is
/// the interface as it was seen last, if it was.
pub(super) fn ensure_ipv6(interface: &str, link: Option<&Link>) -> Result<()> {
    const EUI64: &str = "0";

    if link.is_some_and(|link| link.ipv6 == Ipv6Mode::Quiet) {
        return Ok(());
    }

    for (name, value) in [
        ("accept_ra", "0"),
        ("autoconf", "0"),
        ("addr_gen_mode", EUI64),
        ("accept_dad", "0"),
        ("dad_transmits", "0"),
        // Last: an address that is made now is made as the others say.
        ("disable_ipv6", "0"),
    ] {
        sysctl::ensure(&format!("net/ipv6/conf/{interface}/{name}"), value)?;
    }
    Ok(())
}

/// Switches IPv6 off at an interface; `link` as above.
pub(super) fn refuse_ipv6(interface: &str, link: Option<&Link>) -> Result<()> {
    if link.is_some_and(|link| link.ipv6 == Ipv6Mode::Off) {
        return Ok(());
    }
    sysctl::ensure(&format!("net/ipv6/conf/{interface}/disable_ipv6"), "1")
}

fn permanent(message: &NeighbourMessage) -> Option<(IpAddr, MacAddress)> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(destination)) => {
                address = Some(IpAddr::V4(*destination));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(destination)) => {
                address = Some(IpAddr::V6(*destination));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(MacAddress);
            }
            _ => {}
        }
    }
    Some((address?, mac?))
}
