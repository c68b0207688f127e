//! Runs Podman on the lab's host: real containers, whose networks are made by a plugin of netdp's.
//!
//! It has a root directory, mounts and processes of its own: whatever becomes of the test, they end
//! together, and with them the containers. Only names of network namespaces are shared, for whoever
//! makes a container's network needs them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};

use crate::lab::Lab;
use crate::namespace::{Fate, Namespace};
use crate::runtime::{NETNS_DIRECTORY, poll_until};

/// Where Podman's programs are.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the lab's files are, as Podman sees them.
const FILES: &str = "/run/lab";
/// Making mounts takes no time where nothing else runs.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Makes the root and sees to what Podman expects there, then waits for its end: `$1` is Podman's root
/// directory, `$2` where to have it, `$3` the lab's files, `$4` the directory of netdp's program, `$5`
/// that of the agent's socket. The socket has to be where plugins look for it by themselves: what cleans
/// up behind a container is started without an environment.
const BECOME_ROOT: &str = r#"
set -e
read -r pid rest < /proc/self/stat
root=$2 files=$3
mount --bind "$1" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
# Where both hierarchies have controllers, crun wants neither: it gets the old one alone.
unified=$root/sys/fs/cgroup/unified
if grep -q . "$unified/cgroup.controllers" 2>/dev/null; then mount -t tmpfs tmpfs "$unified"; fi
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mkdir "$root/run/lab" "$root/run/program" "$root/run/netdp" "$root/run/netns"
mount --bind "$files" "$root/run/lab"
mount --bind "$files/containers.conf.d" "$root/etc/containers/containers.conf.d"
mount --bind "$4" "$root/run/program"
mount --bind "$5" "$root/run/netdp"
mount --bind /run/netns "$root/run/netns"
# As whoever is outside knows this process.
echo "$pid" > "$files/pid"
exec chroot "$root" /bin/busybox sleep 100000
"#;

/// What the lab needs otherwise than a host.
const SETTINGS: &str = r#"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "crun"

[network]
cni_plugin_dirs = ["/run/lab/plugins", "/usr/lib/cni"]
netavark_plugin_dirs = ["/run/lab/plugins"]
network_config_dir = "/run/lab/networks"

[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
pids_limit = 0
"#;

/// Podman on one lab's host.
#[derive(Debug)]
pub struct Podman {
    namespace: Namespace,
    /// The process that ends all others when it ends.
    guard: Child,
    pid: String,
    files: PathBuf,
}

/// Finds the root directory that has Podman, which a variable names.
///
/// # Errors
/// When there is none.
pub fn find(variable: &str) -> Result<PathBuf> {
    let root = std::env::var_os(variable)
        .with_context(|| format!("find Podman: {variable} names no root directory that has it"))?;
    fs::canonicalize(&root).with_context(|| format!("find {variable}={}", root.display()))
}

impl Podman {
    /// Prepares Podman of this root directory, with `settings` in a `containers.conf` and netdp's plugins
    /// where it looks for plugins.
    ///
    /// # Errors
    /// When there are no such mounts to be made.
    pub fn start(lab: &Lab, root: &Path, settings: &str) -> Result<Self> {
        let (own_root, files) =
            (lab.directory().join("podman/root"), lab.directory().join("podman/files"));
        let inner = ["containers.conf.d", "networks", "plugins", "rootfs/bin", "store"];
        for directory in [&own_root].into_iter().chain(&inner.map(|name| files.join(name))) {
            fs::create_dir_all(directory).context("create a directory")?;
        }
        for (name, text) in [("10-guide.conf", settings), ("90-lab.conf", SETTINGS)] {
            fs::write(files.join("containers.conf.d").join(name), text)
                .context("write settings")?;
        }
        for plugin in ["netdp-cni", "netdp-netavark"] {
            symlink("/run/program/netdp", files.join("plugins").join(plugin))
                .context("link a plugin")?;
        }
        fs::copy(root.join("bin/busybox"), files.join("rootfs/bin/busybox"))
            .context("make a container's root")?;
        // Podman makes namespaces behind a mount of its own, and the agent has to see them.
        mount(None::<&str>, NETNS_DIRECTORY, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .with_context(|| format!("share {NETNS_DIRECTORY}"))?;
        let agent = lab.agent()?;
        let program = agent.program().parent().context("find the program's directory")?;
        let socket = agent.socket();
        let guard = lab
            .host()
            .command("unshare", Fate::DiesWithParent)?
            .args(["--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child=KILL"])
            .args(["sh", "-c", BECOME_ROOT, "sh"])
            .args([root, &own_root, &files, program])
            .arg(socket.parent().context("find the socket's directory")?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("run unshare; install util-linux")?;
        // From here on Drop ends it after a step that fails.
        let mut podman = Self { namespace: lab.host().clone(), guard, pid: String::new(), files };
        podman.pid = poll_until(START_DEADLINE, "Podman's root", || {
            if let Some(status) = podman.guard.try_wait().context("ask for its state")? {
                bail!("make Podman's root: it ended with {status}");
            }
            let pid = fs::read_to_string(podman.files.join("pid")).unwrap_or_default();
            let pid = pid.trim().to_owned();
            // Its last step is to leave the old root.
            let is_ready = Path::new("/proc").join(&pid).join("root/run/program/netdp").exists();
            Ok((!pid.is_empty() && is_ready).then_some(pid))
        })?;
        Ok(podman)
    }

    /// Where network configurations are.
    #[must_use]
    pub fn networks(&self) -> PathBuf {
        self.files.join("networks")
    }

    /// Runs one `podman` command.
    ///
    /// # Errors
    /// When it can't be started; its exit code is the caller's to judge.
    pub fn output<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Output> {
        self.command()?
            .args(arguments.iter().map(AsRef::as_ref))
            .stdin(Stdio::null())
            .output()
            .context("run nsenter")
    }

    /// Runs one `podman` command that should succeed and returns what it printed.
    ///
    /// # Errors
    /// With what it said when it fails.
    pub fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Result<String> {
        let output = self.output(arguments)?;
        let error = String::from_utf8_lossy(&output.stderr);
        let words: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        ensure!(output.status.success(), "podman {}: {}", words.join(" "), error.trim());
        Ok(String::from_utf8(output.stdout).context("read the output of podman")?.trim().to_owned())
    }

    /// What to run a container with in place of an image.
    #[must_use]
    pub fn container(&self) -> Vec<String> {
        ["--rootfs", "/run/lab/rootfs", "/bin/busybox", "sleep", "100000"].map(String::from).into()
    }

    /// Makes `namespace` the network of a container that runs.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn enter(&self, container: &str, namespace: &Namespace) -> Result<()> {
        let format = "{{.NetworkSettings.SandboxKey}}";
        let path = self.run(&["inspect", "--format", format, container])?;
        namespace.become_another(Path::new(&path))
    }

    fn command(&self) -> Result<Command> {
        let mut command = self.namespace.command("nsenter", Fate::DiesWithParent)?;
        command
            .args(["--target", &self.pid, "--mount", "--pid", "--root", "--wd", "podman"])
            .args(["--root", &format!("{FILES}/store"), "--runroot", "/run/podman"])
            .args(["--storage-driver", "vfs"])
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", "/tmp")
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1");
        Ok(command)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // The kernel ends the containers with their guard.
        self.guard.kill().ok();
        self.guard.wait().ok();
    }
}
