//! When a veth pair that was set up begins to carry packets.
//!
//! Up is not yet able to send. A link that gets a carrier is given its queue, and becomes a forwarding
//! port of its bridge, by work that the kernel does later (net/core/link_watch.c); until then packets are
//! dropped without a word. Who is told that a container is connected would lose its first one.

use std::time::Duration;

use anyhow::Result;
use futures::TryStreamExt;
use rtnetlink::{
    packet_core::DefaultNla,
    packet_route::{
        AddressFamily,
        link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage, State},
    },
};
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Netlink, kernel_error};

/// IFLA_TARGET_NETNSID (include/uapi/linux/if_link.h): the namespace to look into, by the number that
/// ours has for it (Linux 4.15).
const TARGET_NETNSID: u16 = 46;

/// Patience with the kernel. Its work is done at once, unless there is much of it.
const AT_MOST: Duration = Duration::from_secs(1);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

impl Netlink {
    /// Waits until the pairs with these host's ends carry packets, both ways. A pair that has no carrier,
    /// for an end of it is down, is not waited for, nor is one that has gone. A kernel that takes longer
    /// than a second is not waited for either: that is logged.
    ///
    /// # Errors
    /// The kernel refuses to show a link.
    pub async fn await_carrier(&self, host_ends: &[u32]) -> Result<()> {
        let deadline = Instant::now() + AT_MOST;
        for &ifindex in host_ends {
            while !self.carries_packets(ifindex).await? {
                if Instant::now() >= deadline {
                    warn!(ifindex, "the kernel takes long to let packets through an interface");
                    return Ok(());
                }
                sleep(PAUSE).await;
            }
        }
        Ok(())
    }

    /// Whether a pair's ends are as ready as they are going to be. Since Linux 6.8 a kernel that is asked
    /// for one link does the work for it first.
    async fn carries_packets(&self, host_end: u32) -> Result<bool> {
        let Some(link) = self.single_link(host_end, None).await? else { return Ok(true) };
        let mut container_end = None;
        let mut netnsid = None;
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Link(ifindex) => container_end = Some(*ifindex),
                LinkAttribute::LinkNetNsId(id) => netnsid = Some(*id),
                _ => {}
            }
        }
        let Some(container_end) = container_end else { return Ok(is_ready(&link)) };
        let peer = self.single_link(container_end, netnsid).await?;
        Ok(is_ready(&link) && peer.is_none_or(|peer| is_ready(&peer)))
    }

    /// A link of this namespace or another one, `None` if it has gone.
    async fn single_link(&self, ifindex: u32, netnsid: Option<i32>) -> Result<Option<LinkMessage>> {
        let mut request = self
            .handle
            .link()
            .get()
            .match_index(ifindex)
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        if let Some(id) = netnsid {
            let id = DefaultNla::new(TARGET_NETNSID, id.to_ne_bytes().to_vec());
            request.message_mut().attributes.push(LinkAttribute::Other(id));
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
        outside.add(LinkMessageBuilder::<LinkBridge>::new("bridge").up()).await.unwrap();
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
            // An end whose other end is down has no carrier to be waited for.
            outside.await_carrier(&[veth]).await.unwrap();
            let peer = index_of(&inside, "peer").await;
            inside.change(LinkUnspec::new_with_index(peer).up()).await.unwrap();
            outside.change(LinkUnspec::new_with_index(veth).controller(bridge).up()).await.unwrap();
            outside.await_carrier(&[veth]).await.unwrap();
            assert!(is_listed_ready(&outside, veth).await, "round {round}: the host's end");
            assert!(is_listed_ready(&inside, peer).await, "round {round}: the container's end");
            outside.handle.link().del(veth).execute().await.unwrap();
            outside.await_carrier(&[veth]).await.unwrap();
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
