//! Whether links, addresses or routes have changed since they were last read: with a thousand links, to
//! read them costs more than most changes do.
//!
//! Owns two multicast sockets and what was read last. The kernel puts its word into them before the
//! change that it is about is done, so who has found them empty has missed nothing that it tells of. It
//! does not tell of sysctls but those for forwarding, nor of alias, group and bridge options of a link
//! that is down: hence [`Watch::forget`], and nobody reads facts while a link of ours is being made.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::facts::{Links, Route};

/// Groups (`enum rtnetlink_groups`, linux/rtnetlink.h) for links, their addresses and whether they
/// forward.
const ABOUT_LINKS: [u32; 5] = [1, 5, 9, 24, 25];
/// Those for routes of IPv4 and IPv6, and for next hops (Linux 5.3), which take routes along.
const ABOUT_ROUTES: [u32; 3] = [7, 11, 32];

/// What was read last, and the kernel's word since.
pub(super) struct Watch {
    about_links: Socket,
    about_routes: Socket,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    links: Option<Links>,
    routes: Option<Vec<Route>>,
}

impl Watch {
    /// Listens in the calling thread's namespace.
    ///
    /// # Errors
    /// Fails where the kernel gives no socket.
    pub(super) fn open() -> Result<Self> {
        let listen = |groups| listen(groups).context("listen to changes of links and routes");
        Ok(Self {
            about_links: listen(&ABOUT_LINKS)?,
            about_routes: listen(&ABOUT_ROUTES)?,
            known: Mutex::default(),
        })
    }

    /// The links as they were last read, if they are still like that.
    pub(super) fn links(&self) -> Option<Links> {
        let mut known = self.known();
        if has_word(&self.about_links) {
            // Routes that go with an address or a link are not told of (IPv4).
            *known = Known::default();
        }
        known.links.clone()
    }

    /// The same for routes; to be asked after [`Self::links`].
    pub(super) fn routes(&self) -> Option<Vec<Route>> {
        let mut known = self.known();
        if has_word(&self.about_routes) {
            known.routes = None;
        }
        known.routes.clone()
    }

    /// Notes links that were read after [`Self::links`] had none.
    pub(super) fn note_links(&self, links: &Links) {
        self.known().links = Some(links.clone());
    }

    /// Notes routes that were read after [`Self::routes`] had none.
    pub(super) fn note_routes(&self, routes: &[Route]) {
        self.known().routes = Some(routes.to_vec());
    }

    /// Has everything read anew next time.
    pub(super) fn forget(&self) {
        *self.known() = Known::default();
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics half-way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.set_non_blocking(true)?;
    for &group in groups {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

/// Takes all that is there; whether there was anything.
fn has_word(socket: &Socket) -> bool {
    let mut was_there = false;
    loop {
        // What it says in detail is of no interest, so it may be cut off.
        match socket.recv(&mut &mut [0; 16][..], 0) {
            Ok(_) => was_there = true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return was_there,
            // Too much to be kept: something was lost, and the rest is there to be taken.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => was_there = true,
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::netlink::Netlink;

    /// Runs in a network namespace of its own.
    fn alone<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let there = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::spawn(there).join().unwrap()
    }

    #[test]
    fn what_was_read_is_good_until_the_kernel_has_something_to_say() {
        alone(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let watch = Watch::open().unwrap();
                let netlink = Netlink::open().unwrap();
                assert_eq!((watch.links(), watch.routes()), (None, None));
                let links = netlink.links_with_addresses().await.unwrap();
                watch.note_links(&links);
                watch.note_routes(&[]);
                assert_eq!(
                    (watch.links(), watch.routes()),
                    (Some(links.clone()), Some(Vec::new()))
                );

                let (index, _) = links.iter().find(|(_, link)| link.loopback).unwrap();
                let up = rtnetlink::LinkUnspec::new_with_index(*index).up().build();
                netlink.handle.link().set(up).execute().await.unwrap();
                assert_eq!((watch.links(), watch.routes()), (None, None));

                let links = netlink.links_with_addresses().await.unwrap();
                assert!(links[index].up);
                watch.note_links(&links);
                fs::write("/proc/sys/net/ipv4/conf/lo/forwarding", "1").unwrap();
                assert_eq!(watch.links(), None, "a sysctl for forwarding");
                watch.note_links(&links);
                watch.forget();
                assert_eq!(watch.links(), None, "told to forget");
            });
        });
    }
}
