//! What the dataplane asks of the kernel beyond aya: the only `unsafe` code of the agent.

use std::{
    ffi::CString,
    io,
    mem::zeroed,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info, bpf_map_type};
use bytemuck::Pod;

/// Entries read in one system call at first.
const BATCH: usize = 4096;

/// A key or value of a map, for aya.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Wire<T>(pub(super) T);

// SAFETY: `bytemuck::Pod` is the stronger promise: any bit pattern is valid and nothing is padding.
unsafe impl<T: Pod> aya::Pod for Wire<T> {}

/// Waits until every packet that is being handled now has been handled: programs run under RCU,
/// and `MEMBARRIER_CMD_GLOBAL` (Linux 4.3) waits for a grace period of it.
///
/// # Errors
/// The kernel's: without membarrier (`nohz_full` hosts) EINVAL.
pub(super) fn wait_for_packets_in_flight() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes numbers only.
    let outcome = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads some entries of a hash map into `keys` and `values`, which are equally long, from `place`
/// on; the kernel reads whole buckets. Returns how many it read, and the place to go on from, if
/// that was not all (Linux 5.6).
///
/// # Errors
/// The kernel's; ENOSPC where a bucket holds more entries than there is room for.
pub(super) fn lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    place: Option<u32>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, Option<u32>)> {
    let mut next = 0_u32;
    let mut attributes = no_attributes();
    attributes.batch.in_batch = place.as_ref().map_or(0, |place| (&raw const *place) as u64);
    attributes.batch.out_batch = (&raw mut next) as u64;
    attributes.batch.keys = keys.as_mut_ptr() as u64;
    attributes.batch.values = values.as_mut_ptr() as u64;
    attributes.batch.count = keys.len().min(values.len()) as u32;
    attributes.batch.map_fd = map.as_raw_fd() as u32;
    let outcome = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attributes);
    // SAFETY: an integer, which the kernel has filled in.
    let count = unsafe { attributes.batch.count } as usize;
    match outcome {
        Ok(_) => Ok((count, Some(next))),
        Err(end) if end.raw_os_error() == Some(libc::ENOENT) => Ok((count, None)),
        Err(error) => Err(error),
    }
}

/// Shows all entries of a hash map to `visit`, some at a time. One that moves within the map meanwhile
/// may be missed, or shown twice.
///
/// # Errors
/// The kernel's; within, those of `visit`, which end it.
pub(super) fn for_each_batch<K: Pod, V: Pod, E>(
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(&[K], &[V]) -> Result<(), E>,
) -> io::Result<Result<(), E>> {
    let (mut keys, mut values) = (vec![K::zeroed(); BATCH], vec![V::zeroed(); BATCH]);
    let mut place = None;
    loop {
        match lookup_batch(map, place, &mut keys, &mut values) {
            Ok((count, next)) => {
                if let Err(error) = visit(&keys[..count], &values[..count]) {
                    return Ok(Err(error));
                }
                place = next;
                if place.is_none() {
                    return Ok(Ok(()));
                }
            }
            // A bucket has more.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                keys.resize(keys.len() * 2, K::zeroed());
                values.resize(values.len() * 2, V::zeroed());
            }
            Err(error) => return Err(error),
        }
    }
}

/// Writes entries to a hash map, whose keys and values are equally many, in their order (Linux 5.6).
/// Returns how many were written, and why not all.
pub(super) fn update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> (usize, io::Result<()>) {
    let mut attributes = batch(map, keys);
    attributes.batch.values = values.as_ptr() as u64;
    attributes.batch.count = keys.len().min(values.len()) as u32;
    in_batches(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attributes)
}

/// Deletes entries from a hash map, in their order (Linux 5.6). Returns how many were deleted, and why
/// not all: ENOENT where the next one is not there.
pub(super) fn delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> (usize, io::Result<()>) {
    in_batches(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut batch(map, keys))
}

fn batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> bpf_attr {
    let mut attributes = no_attributes();
    attributes.batch.keys = keys.as_ptr() as u64;
    attributes.batch.count = keys.len() as u32;
    attributes.batch.map_fd = map.as_raw_fd() as u32;
    attributes
}

fn in_batches(command: bpf_cmd, attributes: &mut bpf_attr) -> (usize, io::Result<()>) {
    // SAFETY: an integer.
    let asked = unsafe { attributes.batch.count };
    if asked == 0 {
        return (0, Ok(()));
    }
    let outcome = bpf(command, attributes).map(drop);
    // SAFETY: as above; the kernel says how many it came to.
    let done = unsafe { attributes.batch.count };
    match outcome {
        Ok(()) => (done as usize, Ok(())),
        // Refused before the first, it leaves what it was asked.
        Err(error) => (if done < asked { done as usize } else { 0 }, Err(error)),
    }
}

/// A hash map from u32 to u32 with one row, to try things on.
///
/// # Errors
/// The kernel's: EPERM where BPF is forbidden, ENOSYS where there is none.
pub(super) fn trial_map() -> io::Result<OwnedFd> {
    let mut attributes = no_attributes();
    attributes.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_HASH as u32;
    attributes.__bindgen_anon_1.key_size = size_of::<u32>() as u32;
    attributes.__bindgen_anon_1.value_size = size_of::<u32>() as u32;
    attributes.__bindgen_anon_1.max_entries = 1;
    let descriptor = bpf(bpf_cmd::BPF_MAP_CREATE, &mut attributes)?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The kernel's name of the network namespace that the calling thread is in (Linux 5.14).
///
/// # Errors
/// The kernel's: older ones say ENOPROTOOPT.
pub(super) fn network_namespace() -> io::Result<u64> {
    // asm-generic/socket.h; libc lacks it for some targets.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    socket_option(&std::os::unix::net::UnixDatagram::unbound()?, SO_NETNS_COOKIE)
}

/// The kernel's name of a socket (Linux 4.12).
///
/// # Errors
/// The kernel's.
pub(super) fn socket_cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    // asm-generic/socket.h; libc lacks it for some targets.
    const SO_COOKIE: libc::c_int = 57;
    socket_option(socket, SO_COOKIE)
}

fn socket_option(socket: &impl AsRawFd, option: libc::c_int) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: pointer and length describe local values, which outlive the call.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// What holds a program on a cgroup. aya has no way to move one to another program.
pub(super) struct CgroupLink(OwnedFd);

/// What a [`CgroupLink`] holds where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    /// Id of the program.
    pub(super) program: u32,
    /// Id of the cgroup, which is the inode number of its directory; 0 where it was detached.
    pub(super) cgroup: u64,
}

impl CgroupLink {
    /// Opens the link that is pinned at a path.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attributes = no_attributes();
        attributes.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        let descriptor = bpf(bpf_cmd::BPF_OBJ_GET, &mut attributes)?;
        // SAFETY: the kernel has just made the descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// What it holds.
    ///
    /// # Errors
    /// The kernel's; of anything but a link, EINVAL.
    pub(super) fn attachment(&self) -> io::Result<Attachment> {
        // SAFETY: integers, and unions and arrays of them, for which zero is valid.
        let mut info: bpf_link_info = unsafe { zeroed() };
        let mut attributes = no_attributes();
        attributes.info.bpf_fd = self.0.as_raw_fd() as u32;
        attributes.info.info_len = size_of_val(&info) as u32;
        attributes.info.info = (&raw mut info) as u64;
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
        // SAFETY: the kernel fills in what its kind of link has; of others it is zero or a number.
        let cgroup = unsafe { info.__bindgen_anon_1.cgroup.cgroup_id };
        Ok(Attachment { program: info.prog_id, cgroup })
    }

    /// Puts another program of the same kind in the place of the one it holds, in one step (Linux
    /// 5.7).
    ///
    /// # Errors
    /// The kernel's; ENOLINK where the cgroup has gone.
    pub(super) fn update(&self, program: impl AsFd) -> io::Result<()> {
        let mut attributes = no_attributes();
        attributes.link_update.link_fd = self.0.as_raw_fd() as u32;
        attributes.link_update.__bindgen_anon_1.new_prog_fd = program.as_fd().as_raw_fd() as u32;
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes).map(drop)
    }
}

/// Gives memory that is free back to the kernel: parsing types and programs takes tens of megabytes,
/// once. Where the allocator is not glibc's, that is its own business.
pub(super) fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn no_attributes() -> bpf_attr {
    // SAFETY: integers, and unions and arrays of them, for which zero is valid.
    unsafe { zeroed() }
}

/// bpf(2). Every pointer in `attributes` has to be valid for what the command does with it.
fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<libc::c_int> {
    let size = size_of_val(attributes);
    // SAFETY: the attributes outlive the call, and so do, by their makers' word, their pointers.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome as libc::c_int) }
}
