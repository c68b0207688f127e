//! PORT_CLAIMS, seen from the agent: when no socket of the host has a port that source NAT chooses.
//!
//! The ports are reserved, so the kernel gives none of them to a socket by itself; a program that asks
//! for one is seen by the hooks of `bind`. What is left are sockets that were there before, and those
//! whose programs asked: they are looked for until there are none. From then on a flow that gets
//! such a port need not be compared with all sockets, until a program asks again.

use anyhow::{Context, Result};
use aya::maps::{Array, Map, MapData};
use netdp_common::{config::Config, socket::claim};

use crate::{
    facts::PortRanges,
    netlink::{sockets, sysctl},
};

/// Lists without such a socket, one after the other, before it is taken for true: none shows a moment, and a
/// socket that begins to listen meanwhile may be in neither half of one.
const EMPTY_LISTS: u32 = 2;

/// Most looks that go by before all sockets are listed again, which takes the kernel its time.
const LONGEST_PAUSE: u32 = 59;

/// PORT_CLAIMS.
pub(super) struct Claims {
    map: Array<MapData, u64>,
    /// Requests that there had been when it was last looked.
    asked: Option<u64>,
    /// Lists without such a socket since then.
    empty: u32,
    /// Looks to go by before sockets are listed ...
    left: u32,
    /// ... and after that, if there are some.
    pause: u32,
}

impl Claims {
    /// Nothing is known before the first look: who wrote the map may have been away since.
    ///
    /// # Errors
    /// The map is another one, or can't be written.
    pub(super) fn new(map: Map) -> Result<Self> {
        let map = Array::try_from(map).context("open map PORT_CLAIMS")?;
        let mut claims = Self { map, asked: None, empty: 0, left: 0, pause: 1 };
        claims.forget()?;
        Ok(claims)
    }

    /// From now on any socket may have one of the ports.
    ///
    /// # Errors
    /// The map can't be read or written.
    pub(super) fn forget(&mut self) -> Result<()> {
        (self.asked, self.empty) = (None, 0);
        if self.get(claim::SETTLED)? != 0 { self.settle(0) } else { Ok(()) }
    }

    /// Looks whether a socket has one. To be called while the hooks of `bind` are attached, time and
    /// again: a request counts as carried out when it is as old as one call. May block for as long as
    /// the kernel takes to list its sockets.
    ///
    /// # Errors
    /// The map can't be read or written, or the kernel does not list sockets.
    pub(super) fn look(&mut self, config: &Config) -> Result<()> {
        let ports = config.nat_first..=config.nat_last;
        let is_reserved = |reserved: PortRanges| reserved.cover(*ports.start(), *ports.end());
        if !sysctl::reserved_ports()?.is_some_and(is_reserved) {
            // Whoever dials may be given one, and nobody is asked.
            return self.forget();
        }
        let asked = self.get(claim::ASKED)?;
        let settled = claim::settled(asked);
        if self.get(claim::SETTLED)? == settled {
            return Ok(());
        }
        let is_quiet = self.asked.replace(asked) == Some(asked);
        if !is_quiet && self.empty > 0 {
            // In vain: the next list waits as after one that was not empty.
            (self.empty, self.left) = (0, self.pause);
        }
        if self.left > 0 {
            self.left -= 1;
            return Ok(());
        }
        if !is_quiet {
            return Ok(());
        }
        // Until it is settled, each waits longer than the one before.
        self.left = self.pause;
        self.pause = LONGEST_PAUSE.min(2 * self.pause);
        if !sockets::have_none_of(&ports)? {
            self.empty = 0;
            return Ok(());
        }
        self.empty += 1;
        self.left = 0;
        if self.empty == EMPTY_LISTS {
            // A program that has asked meanwhile has made it another number.
            self.settle(settled)?;
            (self.empty, self.pause) = (0, 1);
        }
        Ok(())
    }

    fn get(&self, place: u32) -> Result<u64> {
        self.map.get(&place, 0).context("read map PORT_CLAIMS")
    }

    fn settle(&mut self, number: u64) -> Result<()> {
        self.map.set(claim::SETTLED, number, 0).context("write map PORT_CLAIMS")
    }
}
