//! The only `unsafe` of the tests: system calls that no safe wrapper covers.
//!
//! Each function is one call and knows nothing of its purpose.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
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

/// What a process may not do with bpf(2): it gets EPERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// Anything.
    Everything,
    /// Loading programs (`BPF_PROG_LOAD`).
    Loading,
    /// Attaching them (`BPF_LINK_CREATE`).
    Attaching,
}

/// Makes `command`, and all that it starts, fail where it does what is forbidden.
pub(crate) fn forbid_bpf_before_exec(command: &mut Command, forbidden: Forbidden) {
    // The offsets of linux/seccomp.h's seccomp_data: the system call, and the low half of its first
    // argument, which is bpf(2)'s command (linux/bpf.h).
    const NUMBER: u32 = 0;
    const COMMAND: u32 = if cfg!(target_endian = "little") { 16 } else { 20 };
    let forbidden = match forbidden {
        Forbidden::Everything => None,
        Forbidden::Loading => Some(5),
        Forbidden::Attaching => Some(28),
    };
    let statement = |code: u32, k| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let answer = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    // Goes on where it is equal, else to the last but one.
    let is_equal = |k, jf| libc::sock_filter {
        jf,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k)
    };
    let refuse = answer(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
    let allow = answer(libc::SECCOMP_RET_ALLOW);
    let bpf = libc::SYS_bpf as u32;
    let mut filter = match forbidden {
        None => vec![load(NUMBER), is_equal(bpf, 1), refuse, allow],
        Some(name) => {
            let (call, command) = (is_equal(bpf, 3), is_equal(name, 1));
            vec![load(NUMBER), call, load(COMMAND), command, refuse, allow]
        }
    };
    let prepare = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        nix::sys::prctl::set_no_new_privs()?;
        // SAFETY: the program and its filter outlive the call, and its length is the filter's.
        let result = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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

/// Opens a new tun device that carries bare IP packets; it goes with the descriptor.
pub(crate) fn open_tun(name: &str) -> io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is integers, arrays and unions of them, for which zero is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request outlives the call, which reads name and flags of it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}

/// Calls of `bpf(2)` (`enum bpf_cmd` in linux/bpf.h).
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;

/// What a BPF map is made of: `union bpf_attr` of `BPF_MAP_CREATE`, whose rest is zero.
#[repr(C)]
pub(crate) struct MapShape {
    /// One of `enum bpf_map_type`.
    pub(crate) kind: u32,
    /// Bytes of a key.
    pub(crate) key: u32,
    /// Bytes of a value.
    pub(crate) value: u32,
    /// Number of entries.
    pub(crate) entries: u32,
}

/// Makes a BPF map.
pub(crate) fn bpf_map(mut shape: MapShape) -> io::Result<OwnedFd> {
    let size = size_of_val(&shape);
    let attributes = (&raw mut shape).cast::<libc::c_void>();
    // SAFETY: pointer and size describe the local shape, which outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, attributes, size) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Opens what is pinned at a path.
pub(crate) fn bpf_pinned(path: &CStr) -> io::Result<OwnedFd> {
    let mut attributes = [path.as_ptr().addr() as u64, 0];
    let size = size_of_val(&attributes);
    let attributes = (&raw mut attributes).cast::<libc::c_void>();
    // SAFETY: the attributes and the path outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, attributes, size) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Writes entry `index` of an array map; `value` has as many bytes as the map's values.
pub(crate) fn bpf_array_set(map: &impl AsFd, index: u32, value: &[u8]) -> io::Result<()> {
    let (key, value) = ((&raw const index).addr() as u64, value.as_ptr().addr() as u64);
    bpf_element(BPF_MAP_UPDATE_ELEM, map, key, value)
}

/// Reads the entry of a map under `key` into `value`; both are as long as the map's.
pub(crate) fn bpf_lookup(map: &impl AsFd, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    let (key, value) = (key.as_ptr().addr() as u64, value.as_mut_ptr().addr() as u64);
    bpf_element(BPF_MAP_LOOKUP_ELEM, map, key, value)
}

/// Gives a command about one entry of a map. Pointers have to be valid for as many bytes as the
/// map's keys and values have.
fn bpf_element(command: libc::c_long, map: &impl AsFd, key: u64, value: u64) -> io::Result<()> {
    /// `union bpf_attr` of `BPF_MAP_*_ELEM`.
    #[repr(C)]
    struct Attributes {
        map: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let map = map.as_fd().as_raw_fd().cast_unsigned();
    let mut attributes = Attributes { map, pad: 0, key, value, flags: 0 };
    let size = size_of_val(&attributes);
    let attributes = (&raw mut attributes).cast::<libc::c_void>();
    // SAFETY: the attributes and what they point to outlive the call; key and value are as long
    // as those of the map, which is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Loads a tc program from instructions (`struct bpf_insn`). On failure `log` says why.
pub(crate) fn bpf_load(instructions: &[u64], log: &mut [u8]) -> io::Result<OwnedFd> {
    /// `union bpf_attr` of `BPF_PROG_LOAD`, whose rest is zero.
    #[repr(C)]
    struct Attributes {
        kind: u32,
        instructions: u32,
        first: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    let license = c"GPL";
    let mut attributes = Attributes {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        instructions: instructions.len() as u32,
        first: instructions.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log: log.as_mut_ptr().addr() as u64,
    };
    let size = size_of_val(&attributes);
    let attributes = (&raw mut attributes).cast::<libc::c_void>();
    // SAFETY: the attributes and what they point to outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attributes, size) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Runs a BPF program on a packet. `context` is a `struct __sk_buff`. Returns what the program
/// returned, nanoseconds for each of the `repeat` runs, and the bytes in `out`.
pub(crate) fn bpf_test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    context: &[u8],
    (repeat, flags): (u32, u32),
    out: &mut [u8],
) -> io::Result<(i32, u32, usize)> {
    /// `union bpf_attr` of `BPF_PROG_TEST_RUN`.
    #[repr(C)]
    struct Attributes {
        program: u32,
        returned: u32,
        packet_size: u32,
        out_size: u32,
        packet: u64,
        out: u64,
        repeat: u32,
        duration: u32,
        context_size: u32,
        context_out_size: u32,
        context: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }
    let mut attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        returned: 0,
        packet_size: packet.len() as u32,
        out_size: out.len() as u32,
        packet: packet.as_ptr().addr() as u64,
        out: out.as_mut_ptr().addr() as u64,
        repeat,
        duration: 0,
        context_size: context.len() as u32,
        context_out_size: 0,
        context: context.as_ptr().addr() as u64,
        context_out: 0,
        flags,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    let size = size_of_val(&attributes);
    let pointer = (&raw mut attributes).cast::<libc::c_void>();
    // SAFETY: the attributes and what they point to outlive the call, sizes included.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, pointer, size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let Attributes { returned, duration, out_size, .. } = attributes;
    Ok((returned.cast_signed(), duration, out_size as usize))
}
