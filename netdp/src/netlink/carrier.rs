//! When a veth pair that was set up begins to carry packets.
//!
//! Up is not yet able to send. A link that gets a carrier is given its queue, and becomes a forwarding
//! port of its bridge, by work that the kernel does later (net/core/link_watch.c); until then packets are
//! dropped without a word. Who is told that a container is connected would lose its first one.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::TryStreamExt;
use rtnetlink::packet_route::{
    AddressFamily,
    link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage, State},
};
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Netlink, kernel_error};

/// Patience with the kernel. Its work is done at once, unless there is much of it.
const AT_MOST: Duration = Duration::from_secs(1);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

impl Netlink {
    /// Waits until the pairs with these host's ends carry packets, both ways, and so do their bridges. A
    /// pair that has no carrier, for an end of it is down, is not waited for, nor is one that has gone. A
    /// kernel that takes longer than a second, or does not answer, is not waited for either: that is
    /// logged, for the pair is as it should be.
    pub async fn await_carrier(&self, host_ends: &[u32]) {
        let deadline = Instant::now() + AT_MOST;
        for &ifindex in host_ends {
            if let Err(error) = self.await_one(ifindex, deadline).await {
                warn!(ifindex, "see whether an interface carries packets: {error:#}");
            }
        }
    }

    async fn await_one(&self, host_end: u32, deadline: Instant) -> Result<()> {
        while !self.carries_packets(host_end).await? {
            ensure!(Instant::now() < deadline, "the kernel takes long to let them through");
            sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Whether a pair's ends and its bridge are as ready as they are going to be. Since Linux 6.8 a kernel
    /// that is asked for one link does the work for it first. The bridge comes last: it has its carrier
    /// from its ports.
    async fn carries_packets(&self, host_end: u32) -> Result<bool> {
        let Some(link) = self.single_link(host_end, None).await? else { return Ok(true) };
        let (mut container_end, mut namespace, mut bridge) = (None, None, None);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Link(ifindex) => container_end = Some(*ifindex),
                LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
                LinkAttribute::Controller(ifindex) => bridge = Some(*ifindex),
                _ => {}
            }
        }
        let mut is_whole = is_ready(&link);
        for (ifindex, namespace) in [(container_end, namespace), (bridge, None)] {
            let Some(ifindex) = ifindex else { continue };
            let link = self.single_link(ifindex, namespace).await?;
            is_whole &= link.is_none_or(|link| is_ready(&link));
        }
        Ok(is_whole)
    }

    /// A link of this namespace, or of another one by the number that ours has for it (Linux 4.15); `None` if
    /// it has gone.
    async fn single_link(
        &self,
        ifindex: u32,
        namespace: Option<i32>,
    ) -> Result<Option<LinkMessage>> {
        let mut request = self
            .handle
            .link()
            .get()
            .match_index(ifindex)
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        if let Some(id) = namespace {
            request.message_mut().attributes.push(LinkAttribute::IfNetnsId(id));
        }
        match request.execute().try_next().await {
            Err(rtnetlink::Error::NetlinkError(message)) if is_gone(&message.to_io()) => Ok(None),
            found => found.map_err(kernel_error),
        }
    }
}

/// Whether a link sends, or has nobody to send to.
fn is_ready(link: &LinkMessage) -> bool {
    let is_sending = link.attributes.contains(&LinkAttribute::OperState(State::Up));
    is_sending || !link.header.flags.contains(LinkFlags::LowerUp)
}

/// ENODEV says so of the link, EINVAL of the namespace.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd, thread};

    use nix::sched::{CloneFlags, unshare};
    use rtnetlink::{
        LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth,
        packet_route::link::{InfoData, InfoVeth},
    };
    use tokio::runtime;

    use super::*;

    /// Pairs that are tried: the kernel is often done before anybody could look.
    const ROUNDS: u32 = 100;

    /// As all links are listed, which has the kernel do nothing first.
    async fn is_listed_ready(netlink: &Netlink, ifindex: u32) -> bool {
        let links: Vec<_> = netlink.handle.link().get().execute().try_collect().await.unwrap();
        let link = links.iter().find(|link| link.header.index == ifindex).unwrap();
        link.header.flags.contains(LinkFlags::LowerUp) && is_ready(link)
    }

    async fn index_of(netlink: &Netlink, name: &str) -> u32 {
        let links = netlink.links().await.unwrap();
        links.iter().find(|(_, link)| link.name == name).map(|(&ifindex, _)| ifindex).unwrap()
    }

    /// A namespace of its own, which the calling thread is in afterwards.
    fn enter_another() -> (Netlink, File) {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        (Netlink::open().unwrap(), File::open("/proc/thread-self/ns/net").unwrap())
    }

    async fn open_pairs() {
        let (inside, namespace) = enter_another();
        let (outside, _) = enter_another();
        // As ours are made. Without an address it would have a carrier from the start.
        let address = vec![2, 0, 0, 0, 0, 1];
        let bridge = LinkMessageBuilder::<LinkBridge>::new("bridge").address(address).up();
        outside.add(bridge).await.unwrap();
        let bridge = index_of(&outside, "bridge").await;
        for round in 0..ROUNDS {
            let peer = LinkMessageBuilder::<LinkUnspec>::new()
                .name("peer")
                .setns_by_fd(namespace.as_raw_fd())
                .build();
            let pair = LinkMessageBuilder::<LinkVeth>::new("veth", "peer")
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
            outside.add(pair).await.unwrap();
            let veth = index_of(&outside, "veth").await;
            let is_waited_for = async || !outside.carries_packets(veth).await.unwrap();
            assert!(!is_waited_for().await, "round {round}: without a carrier");
            let peer = index_of(&inside, "peer").await;
            inside.change(LinkUnspec::new_with_index(peer).up()).await.unwrap();
            outside.change(LinkUnspec::new_with_index(veth).controller(bridge).up()).await.unwrap();
            outside.await_carrier(&[veth]).await;
            assert!(is_listed_ready(&outside, bridge).await, "round {round}: the bridge");
            assert!(is_listed_ready(&outside, veth).await, "round {round}: the host's end");
            assert!(is_listed_ready(&inside, peer).await, "round {round}: the container's end");
            outside.handle.link().del(veth).execute().await.unwrap();
            assert!(!is_waited_for().await, "round {round}: gone");
        }
    }

    #[test]
    fn a_pair_that_was_set_up_carries_packets_when_it_was_waited_for() {
        let alone = || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(open_pairs());
        };
        thread::spawn(alone).join().unwrap();
    }
}
