//! Network namespaces of containers: which one a path means, and work inside of them.
//!
//! Owns the thread that enters a namespace. The agent itself never leaves the host's.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{fd::AsFd, linux::fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use rtnetlink::{
    LinkUnspec, RouteMessageBuilder,
    packet_route::route::{RouteHeader, RouteMessage, RouteType},
};
use tokio::{runtime::Handle, sync::oneshot};

use super::{
    Netlink, kernel_error,
    link::{ensure_ipv6, refuse_ipv6},
};
use crate::{
    facts::Link,
    model::{Netns, NetnsIdentity},
    plan::VethPlan,
};

/// An open network namespace.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    path: PathBuf,
    identity: NetnsIdentity,
}

/// What there is inside a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Which namespace it is.
    pub identity: NetnsIdentity,
    /// Names of all its interfaces.
    pub interfaces: BTreeSet<String>,
}

/// What a container could use, by its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interior {
    /// Its interfaces with their addresses.
    pub links: Vec<Link>,
    /// Whether there is a default route for IPv4.
    pub has_ipv4_route: bool,
    /// Whether there is a default route for IPv6.
    pub has_ipv6_route: bool,
}

/// Whether a path still means this namespace. Cheap: one `stat`.
pub fn is_still(path: &Path, identity: NetnsIdentity) -> bool {
    fs::metadata(path).is_ok_and(|metadata| identity_of(&metadata) == identity)
}

/// Opens the namespace at a path, says which one it is, and lists its interfaces.
///
/// # Errors
/// Fails where there is nothing at the path or something else than a network namespace.
pub async fn survey(path: &Path) -> Result<Survey> {
    let namespace = Namespace::open(path)?;
    let links = namespace.within(async |netlink| netlink.links().await).await?;
    let interfaces = links.values().map(|link| link.name.clone()).collect();
    Ok(Survey { identity: namespace.identity, interfaces })
}

/// Opens the namespace at a path and says what is in it.
///
/// # Errors
/// Fails where there is nothing at the path or something else than a network namespace.
pub async fn look_inside(path: &Path) -> Result<Interior> {
    let look = async |netlink: Netlink| {
        Ok(Interior {
            links: netlink.links_with_addresses().await?.values().cloned().collect(),
            has_ipv4_route: has_default_route(&netlink.routes::<Ipv4Addr>().await?),
            has_ipv6_route: has_default_route(&netlink.routes::<Ipv6Addr>().await?),
        })
    };
    Namespace::open(path)?.within(look).await
}

impl Namespace {
    /// Opens the namespace at a path.
    ///
    /// # Errors
    /// Fails where there is nothing at the path or something else than a namespace.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)
            .with_context(|| format!("open network namespace {}", path.display()))?;
        let kind = fstatfs(&file)
            .with_context(|| format!("look at network namespace {}", path.display()))?;
        ensure!(
            kind.filesystem_type() == NSFS_MAGIC,
            "{} is not a network namespace: give a path like /run/netns/NAME or /proc/PID/ns/net",
            path.display()
        );
        let metadata = file
            .metadata()
            .with_context(|| format!("look at network namespace {}", path.display()))?;
        Ok(Self { file, path: path.into(), identity: identity_of(&metadata) })
    }

    /// Opens a namespace, if its path still means it.
    ///
    /// # Errors
    /// As [`Namespace::open`], and where another namespace took the path.
    pub fn open_same(netns: &Netns) -> Result<Self> {
        let namespace = Self::open(&netns.path)?;
        ensure!(
            namespace.identity == netns.identity,
            "{} is another network namespace by now",
            netns.path.display()
        );
        Ok(namespace)
    }

    /// Makes the container's end of a veth pair agree with the plan: MTU, addresses, IPv6 only where
    /// it is wanted, up, and default routes unless the container has them.
    ///
    /// # Errors
    /// Fails where the interface is not there, and names what the kernel refused.
    pub async fn ensure_interface(&self, plan: &VethPlan) -> Result<()> {
        let plan = plan.clone();
        self.within(async move |netlink| netlink.ensure_container_end(&plan).await).await
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` on a thread of its own inside the namespace, with a socket of it. Files under
    /// `/proc/sys/net` are the namespace's there, as long as `work` itself opens them.
    async fn within<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce(Netlink) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let file = self.file.try_clone().context("duplicate a namespace's descriptor")?;
        let runtime = Handle::current();
        let (sender, receiver) = oneshot::channel();
        thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                let result = setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .context("enter")
                    .and_then(|()| runtime.block_on(async { work(Netlink::open()?).await }));
                // The receiver is gone only if nobody wants to know any more.
                let _unwanted = sender.send(result);
            })
            .context("start a thread for a namespace")?;
        receiver
            .await
            .context("the thread ended early")
            .flatten()
            .with_context(|| format!("in network namespace {}", self.path.display()))
    }
}

impl Netlink {
    async fn ensure_container_end(&self, plan: &VethPlan) -> Result<()> {
        let links = self.links_with_addresses().await?;
        // By MAC: the container may have renamed it.
        let found = links
            .iter()
            .find(|(_, link)| link.mac == Some(plan.mac) && link.kind.as_deref() == Some("veth"));
        let Some((&ifindex, link)) = found else {
            bail!("find interface {} with MAC {}: it is gone", plan.interface, plan.mac);
        };
        if link.mtu != plan.mtu {
            self.change(LinkUnspec::new_with_index(ifindex).mtu(plan.mtu))
                .await
                .with_context(|| format!("set the MTU of {}", link.name))?;
        }
        match plan.ipv6 {
            Some(_) => ensure_ipv6(&link.name, Some(link))?,
            None => refuse_ipv6(&link.name, Some(link))?,
        }
        let ipv4 = plan.ipv4.map(|side| IpNet::V4(side.address));
        let ipv6 = plan.ipv6.map(|side| IpNet::V6(side.address));
        for net in [ipv4, ipv6].into_iter().flatten().filter(|&net| !link.has_address(net)) {
            self.add_address(ifindex, net).await?;
        }
        // Without a loopback that is up a container can't even reach its own address.
        let down =
            links.iter().filter(|&(&index, link)| !link.up && (link.loopback || index == ifindex));
        for (&index, link) in down {
            self.change(LinkUnspec::new_with_index(index).up())
                .await
                .with_context(|| format!("set up {}", link.name))?;
        }
        let gateway4 = plan.ipv4.and_then(|side| side.gateway).map(IpAddr::V4);
        let gateway6 = plan.ipv6.and_then(|side| side.gateway).map(IpAddr::V6);
        for gateway in [gateway4, gateway6].into_iter().flatten() {
            self.ensure_default_route(ifindex, gateway).await?;
        }
        Ok(())
    }

    async fn ensure_default_route(&self, ifindex: u32, gateway: IpAddr) -> Result<()> {
        let routes = match gateway {
            IpAddr::V4(_) => self.routes::<Ipv4Addr>().await?,
            IpAddr::V6(_) => self.routes::<Ipv6Addr>().await?,
        };
        if has_default_route(&routes) {
            return Ok(());
        }
        let route = match gateway {
            IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
                .gateway(gateway)
                .output_interface(ifindex)
                .build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
                .gateway(gateway)
                .output_interface(ifindex)
                .build(),
        };
        self.handle
            .route()
            .add(route)
            .execute()
            .await
            .map_err(kernel_error)
            .with_context(|| format!("add a default route by {gateway}"))
    }
}

fn has_default_route(routes: &[RouteMessage]) -> bool {
    routes.iter().any(|route| {
        route.header.table == RouteHeader::RT_TABLE_MAIN
            && route.header.kind == RouteType::Unicast
            && route.header.destination_prefix_length == 0
    })
}

fn identity_of(metadata: &fs::Metadata) -> NetnsIdentity {
    NetnsIdentity { device: metadata.st_dev(), inode: metadata.st_ino() }
}
