//! What sockets of the host dialled, seen from the agent: ending what rests on something gone.

use std::{collections::BTreeSet, mem, net::IpAddr};

use anyhow::{Context, Result};
use aya::maps::Map;
use netdp_common::socket::{SocketAddress, SocketPeer};

use super::{
    family::show,
    image::Image,
    sys::Wire,
    tables::{Hash, absent_is_fine},
};
use crate::{
    family::{V4, V6},
    netlink::sockets,
};

/// SOCKET_ORIGIN.
pub(super) struct Origins {
    map: Hash<SocketPeer, SocketAddress>,
    /// Addresses of containers that have gone, whose sockets are still to be ended.
    gone: BTreeSet<IpAddr>,
}

impl Origins {
    pub(super) fn new(map: Map) -> Result<Self> {
        let map = Hash::try_from(map).context("open map SOCKET_ORIGIN")?;
        Ok(Self { map, gone: BTreeSet::new() })
    }

    /// Notes the containers that the next image will not have, before anything is written.
    pub(super) fn note_gone(&mut self, current: &Image, wanted: &Image) {
        let ipv4 = current.ipv4.gone(&wanted.ipv4).map(show::<V4>);
        let ipv6 = current.ipv6.gone(&wanted.ipv6).map(show::<V6>);
        self.gone.extend(ipv4.chain(ipv6));
    }

    /// Forgets what rests on a published port or a container that `image` no longer has, and ends
    /// the host's sockets that are connected through it; returns how many.
    ///
    /// # Errors
    /// The map can't be read, or the kernel does not end sockets; the map is right either way.
    pub(super) fn purge_stale(&mut self, image: &Image) -> Result<usize> {
        let mut stale = Vec::new();
        for entry in self.map.iter() {
            let (Wire(peer), Wire(dialled)) = entry.context("read map SOCKET_ORIGIN")?;
            if !image.leads_to(&dialled, &peer) {
                stale.push(peer);
            }
        }
        for &peer in &stale {
            absent_is_fine(self.map.remove(&Wire(peer)))
                .context("delete from map SOCKET_ORIGIN")?;
        }
        let gone = mem::take(&mut self.gone);
        let cookies: BTreeSet<u64> = stale.iter().map(|peer| peer.cookie).collect();
        if gone.is_empty() && cookies.is_empty() {
            return Ok(0);
        }
        sockets::destroy(|socket| cookies.contains(&socket.cookie) || gone.contains(&socket.peer))
    }
}
