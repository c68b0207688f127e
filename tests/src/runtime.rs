//! What a test process needs before its first test: isolation from the machine, and patience.
//!
//! Knows nothing of networks or of netdp.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Where `ip netns` and netdp look for namespaces by name.
pub const NETNS_DIRECTORY: &str = "/run/netns";

/// How long a poll rests between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Moves this process to a mount namespace of its own with an empty `/run/netns`.
///
/// Namespaces and mounts that follow are invisible to the machine and end with the process, even
/// when it is killed. Only the calling thread moves, and threads inherit its place: call this
/// before the first thread starts.
///
/// # Errors
/// When the process is not root, or the kernel refuses the namespace or a mount.
pub fn isolate() -> Result<()> {
    ensure_root()?;
    unshare(CloneFlags::CLONE_NEWNS).context("create a mount namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make mounts private")?;
    fs::create_dir_all(NETNS_DIRECTORY).with_context(|| format!("create {NETNS_DIRECTORY}"))?;
    mount(Some("netdp-tests"), NETNS_DIRECTORY, Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount a tmpfs on {NETNS_DIRECTORY}"))
}

/// Fails unless the process is root.
///
/// # Errors
/// When it is not, with what to do.
pub fn ensure_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "create network namespaces: this needs root; run it with sudo"
    );
    Ok(())
}

/// The mount point of the whole cgroup v2 hierarchy, if there is one.
///
/// # Errors
/// When the mount table can't be read.
pub fn cgroup2_mount() -> Result<Option<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    Ok(table.lines().find_map(|line| {
        // proc(5): what is mounted is field 4, and where field 5; the type follows a lone dash.
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (filesystem.starts_with("cgroup2 ") && root == "/").then(|| point.to_owned())
    }))
}

/// Names how many times as long everything takes where tests run: emulated machines set it.
const SLOWNESS_VARIABLE: &str = "NETDP_SLOWNESS";

/// A limit on the time that something may take, made longer where everything takes longer.
///
/// For whoever waits for what should come. What should not come is waited for as long as anywhere.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    limit * slowness()
}

/// How many times as long everything takes here as on real hardware: 1 unless
/// `NETDP_SLOWNESS` says another.
#[must_use]
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| {
        let value = std::env::var(SLOWNESS_VARIABLE);
        value.ok().and_then(|value| value.parse().ok()).unwrap_or(1)
    })
}

/// Looks until `look` finds something, or fails with what was awaited when `deadline` has passed: a
/// deadline that [`patient`] makes longer.
///
/// # Errors
/// When the deadline passes, or `look` fails.
pub fn poll_until<T>(
    deadline: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = patient(deadline);
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("wait for {what}: not within {deadline:?}");
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// What random numbers start from: `NETDP_SEED`, or the time. Printed, so that a run can be repeated.
///
/// # Errors
/// When `NETDP_SEED` is no number.
pub fn seed() -> Result<u64> {
    let seed = match std::env::var("NETDP_SEED") {
        Ok(text) => text.parse().with_context(|| format!("read NETDP_SEED {text}"))?,
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?;
            now.as_nanos() as u64
        }
    };
    println!("seed {seed}: NETDP_SEED={seed} repeats this run");
    Ok(seed)
}

/// Finds a program on `PATH`.
#[must_use]
pub fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .any(|directory: std::path::PathBuf| Path::new(&directory).join(program).is_file())
    })
}
