//! The only `unsafe` of the tests: system calls that no safe wrapper covers.
//!
//! Each function is one call and knows nothing of its purpose.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

/// `ETH_P_ALL` in network byte order, as packet sockets want it.
const EVERY_PROTOCOL_BE16: u16 = (libc::ETH_P_ALL as u16).to_be();

/// What becomes of a child when the thread that started it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is killed, so that a killed test run leaves no process.
    DiesWithParent,
    /// It lives on, in a session of its own.
    Detached,
}

/// Makes `command` run in the network namespace `netns`.
pub(crate) fn enter_before_exec(command: &mut Command, netns: OwnedFd, fate: Fate) {
    let prepare = move || {
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        match fate {
            Fate::DiesWithParent => nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?,
            Fate::Detached => {
                nix::unistd::setsid()?;
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor locks.
    unsafe { command.pre_exec(prepare) };
}

/// Opens a packet socket that sends on one interface and sees all of its frames, in both directions.
pub(crate) fn packet_socket(ifindex: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // Protocol 0 sees nothing until bind names the interface: no stray frame from before.
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_ll is integers and arrays of them, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = EVERY_PROTOCOL_BE16;
    address.sll_ifindex = i32::try_from(ifindex).map_err(io::Error::other)?;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointer and length describe the local address, which outlives the call.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Sets an integer option of a socket.
pub(crate) fn set_socket_option(
    socket: &impl AsFd,
    level: i32,
    name: i32,
    value: i32,
) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the pointer and length describe the local value, which outlives the call.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives one ethtool command with one value (`struct ethtool_value`) to a link.
pub(crate) fn ethtool_set(
    socket: &impl AsFd,
    interface: &str,
    command: u32,
    value: u32,
) -> io::Result<()> {
    let mut order = [command, value];
    // SAFETY: ifreq is integers, arrays and unions of them, for which zero is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *slot = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = order.as_mut_ptr().cast();
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the request and the order that it points to outlive the call.
    let result = unsafe { libc::ioctl(fd, libc::SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
