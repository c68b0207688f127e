//! Making the blank pair, and giving it to an endpoint.
//!
//! Either may end half-way, with the agent: a pair that is not whole is told by its names and aliases,
//! and removed like any other leftover.

use anyhow::{Context, Result};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::link::{InfoData, InfoVeth, LinkAttribute},
};

use super::{
    Netlink,
    link::{UNFINISHED_GROUP, refuse_ipv6, unless_gone},
};
use crate::{
    facts::Link,
    plan::{
        VethPlan,
        blank::{ALIAS, Blank, CONTAINER_END, HOST_END},
    },
};

impl Netlink {
    /// Makes the blank, both ends on the host and down. Returns them.
    ///
    /// # Errors
    /// Names what the kernel refused.
    pub async fn make_blank(&self) -> Result<Vec<(u32, Link)>> {
        let unfinished = || LinkAttribute::Group(UNFINISHED_GROUP);
        let container_end = LinkMessageBuilder::<LinkUnspec>::new()
            .name(CONTAINER_END)
            .append_extra_attribute(unfinished());
        let link = LinkMessageBuilder::<LinkVeth>::new(HOST_END, CONTAINER_END)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(container_end.build())))
            .append_extra_attribute(unfinished());
        self.add(link)
            .await
            .with_context(|| format!("make veth {HOST_END} with {CONTAINER_END}"))?;
        refuse_ipv6(HOST_END, None)?;
        self.finish(CONTAINER_END, &Link::offer_alias(CONTAINER_END)).await?;
        self.finish(HOST_END, ALIAS).await?;
        let is_end = |link: &Link| [HOST_END, CONTAINER_END].contains(&link.name.as_str());
        let links = self.links().await?;
        let ends = links.iter().filter(|(_, link)| is_end(link));
        Ok(ends.map(|(&ifindex, link)| (ifindex, link.clone())).collect())
    }

    /// Deletes the blank, whatever has become of it.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn discard_blank(&self, blank: Blank) -> Result<()> {
        let deleted = self.handle.link().del(blank.host_end).execute().await;
        unless_gone(deleted).with_context(|| format!("delete {HOST_END}"))
    }

    /// Makes the blank the pair that a plan wants, to be taken by an engine. Each end is renamed and
    /// marked by one request.
    ///
    /// # Errors
    /// Names what the kernel refused.
    pub async fn give_blank(&self, blank: Blank, plan: &VethPlan) -> Result<()> {
        let container_end = LinkUnspec::new_with_index(blank.container_end)
            .address(plan.mac.0.to_vec())
            .mtu(plan.mtu)
            .name(&plan.interface)
            .alias(Link::offer_alias(&plan.interface));
        self.change(container_end)
            .await
            .with_context(|| format!("make {} of {CONTAINER_END}", plan.interface))?;
        let host_end = LinkUnspec::new_with_index(blank.host_end)
            .mtu(plan.mtu)
            .name(&plan.name)
            .alias(&plan.alias);
        self.change(host_end).await.with_context(|| format!("make {} of {HOST_END}", plan.name))
    }
}
