//! A demo that stays: where it is, how to enter it, how to remove it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::runtime::NETNS_DIRECTORY;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::NAME;
use crate::screen::Screen;

pub(crate) fn directory() -> PathBuf {
    Path::new("/run").join(NAME)
}

/// Makes room, or says what is in the way.
pub(crate) fn prepare(directory: &Path) -> Result<()> {
    if directory.exists() {
        bail!("keep the demo: one is kept already; remove it with `{}`", remove_command()?);
    }
    fs::create_dir(directory).with_context(|| format!("create {}", directory.display()))
}

pub(crate) fn explain(lab: &Lab, screen: &mut Screen) -> Result<()> {
    let agent = lab.agent()?;
    let host = lab.host().name();
    screen.step("It stays");
    let namespaces: Vec<_> = lab.namespaces().iter().map(|one| one.name().to_owned()).collect();
    screen.saw("enter", &format!("ip netns exec {host} bash"));
    screen.saw("look", &format!("export NETDP_SOCKET={}", agent.socket().display()));
    screen.saw("", &format!("{} status", agent.program().display()));
    screen.saw("others", &namespaces[1..].join(" "));
    screen.saw("log", &agent.log_path().display().to_string());
    screen.saw("remove", &remove_command()?);
    Ok(())
}

fn remove_command() -> Result<String> {
    let this = std::env::current_exe().context("find this program")?;
    Ok(format!("{} --remove", this.display()))
}

/// Removes a demo that was kept: whatever runs in its namespaces, the namespaces, the files.
pub(crate) fn remove() -> Result<()> {
    let directory = directory();
    ensure!(directory.exists(), "remove the demo: none is kept");
    // Each step is tried although an earlier one failed.
    let mut failures = Vec::new();
    for entry in fs::read_dir(NETNS_DIRECTORY).context("list namespaces")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{NAME}-")) {
            let namespace = Namespace::existing(&name);
            failures.extend(end_processes(&namespace).err());
            failures.extend(namespace.remove().err());
        }
    }
    failures.extend(umount2(&directory.join("bpf"), MntFlags::MNT_DETACH).err().map(Into::into));
    failures.extend(fs::remove_dir_all(&directory).err().map(Into::into));
    match failures.into_iter().next() {
        Some(error) => Err(error.context(format!("remove {}", directory.display()))),
        None => {
            println!("the demo is removed");
            Ok(())
        }
    }
}

/// Kills every process inside a namespace.
fn end_processes(namespace: &Namespace) -> Result<()> {
    let inode = fs::metadata(namespace.path()).context("look at a namespace")?.ino();
    for entry in fs::read_dir("/proc").context("list processes")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // A process that has just ended has no namespace any more.
        let is_inside = fs::metadata(entry.path().join("ns/net")).is_ok_and(|ns| ns.ino() == inode);
        if is_inside {
            kill(Pid::from_raw(pid), Signal::SIGKILL)
                .with_context(|| format!("end process {pid}"))?;
        }
    }
    Ok(())
}
