//! The loaded object: programs in the kernel, maps that are pinned or adopted.

use std::{collections::BTreeSet, fs, io, path::Path};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapInfo},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use aya_obj::{Object as Elf, generated::bpf_map_type};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::{InterfaceFlags, if_indextoname},
};
use tracing::{debug, warn};

use super::{
    cgroup::{self, SocketHooks},
    family::Wired,
    image::Hook,
    pins::Pins,
};
use crate::{
    dataplane::Drift,
    family::{V4, V6},
};

/// The programs as this build made them.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("NETDP_EBPF_OBJECT"));

/// Their sizes are the operator's to choose.
const SIZED: [&str; 4] = [V4::MAPS.flow, V6::MAPS.flow, V4::MAPS.pending, V6::MAPS.pending];

impl Hook {
    fn attach_type(self) -> TcAttachType {
        match self {
            Self::FromContainer | Self::FromUplink => TcAttachType::Ingress,
            Self::IntoNetwork | Self::ToUplink => TcAttachType::Egress,
        }
    }
}

/// Programs and maps in the kernel.
pub(super) struct Object {
    ebpf: Ebpf,
    pins: Pins,
    /// What is attached and pinned.
    pub(super) attached: BTreeSet<(Hook, u32)>,
    /// `None` where the host can't have them.
    sockets: Option<SocketHooks>,
}

impl Object {
    /// Loads all programs, adopting pinned maps and moving pinned links over to the new programs,
    /// each in one step.
    ///
    /// `flows` is the size of a new flow table; one that is there keeps its size. Without a
    /// `cgroup`, or where the kernel does not have them, there are no socket hooks.
    ///
    /// # Errors
    /// A pinned map has another layout; the kernel refuses a map or a program.
    pub(super) fn load(pins: Pins, flows: u32, cgroup: Option<&Path>) -> Result<Self> {
        let elf = Elf::parse(OBJECT).context("parse the eBPF object")?;
        let names: Vec<&str> = elf.maps.keys().map(String::as_str).collect();
        let mut loader = EbpfLoader::new();
        for name in names {
            // The compiler's own sections are no maps of ours, and a per-CPU array is scratch of
            // one program run: it may look different in every version.
            let scratch = bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32;
            if name.starts_with('.') || elf.maps[name].map_type() == scratch {
                continue;
            }
            let path = pins.map(name);
            if path.exists() {
                check_layout(name, &path, &elf.maps[name], flows)?;
            }
            loader.map_pin_path(name, path);
        }
        for family in [&V4::MAPS, &V6::MAPS] {
            loader.map_max_entries(family.flow, 2 * flows);
            loader.map_max_entries(family.pending, flows);
        }
        let mut ebpf = loader.load(OBJECT).context("create the maps")?;
        for hook in Hook::ALL {
            classifier(&mut ebpf, hook)?.load().map_err(|error| refusal(hook.program(), error))?;
        }
        for name in [V4::MAPS.collector, V6::MAPS.collector] {
            program(&mut ebpf, name)?.load().map_err(|error| refusal(name, error))?;
        }
        let hooks = cgroup.map(|cgroup| SocketHooks::load(&mut ebpf, cgroup, &pins)).transpose();
        let sockets = hooks.unwrap_or_else(|error| {
            cgroup::warn_unavailable(&error);
            None
        });
        if sockets.is_none() {
            // Of an agent that could have them: nobody would look after them.
            cgroup::remove_pins(&pins)?;
        }
        let mut object = Self { ebpf, pins, attached: BTreeSet::new(), sockets };
        object.adopt_links()?;
        Ok(object)
    }

    /// The kernel's name of the host's network namespace; 0 where no socket is the host's.
    pub(super) fn netns_cookie(&self) -> u64 {
        self.sockets.as_ref().map_or(0, |hooks| hooks.netns_cookie)
    }

    /// Attaches the socket hooks that are not, as far as the host can have them; returns how many.
    pub(super) fn attach_sockets(&mut self) -> usize {
        let Some(hooks) = &mut self.sockets else { return 0 };
        match hooks.attach(&mut self.ebpf) {
            Ok(writes) => writes,
            Err(error) => {
                cgroup::warn_unavailable(&error);
                // It would fail again: not before the next agent. Some are worse than none.
                if let Err(error) = hooks.detach() {
                    warn!("detach the socket hooks: {error:#}");
                }
                self.sockets = None;
                0
            }
        }
    }

    /// Detaches the socket hooks; returns how many there were.
    ///
    /// # Errors
    /// A pin can't be removed.
    pub(super) fn detach_sockets(&mut self) -> Result<usize> {
        self.sockets.as_mut().map_or(Ok(0), SocketHooks::detach)
    }

    /// The socket hooks that should be attached and are not.
    pub(super) fn missing_sockets(&mut self) -> Vec<Drift> {
        self.sockets.as_mut().map_or_else(Vec::new, |hooks| hooks.missing(&mut self.ebpf))
    }

    /// Takes a map out, to be used typed.
    pub(super) fn take_map(&mut self, name: &str) -> Result<Map> {
        self.ebpf.take_map(name).with_context(|| format!("find map {name} in the eBPF object"))
    }

    /// The program that collects a family's flows.
    pub(super) fn collector<F: Wired>(&mut self) -> Result<&SchedClassifier> {
        program(&mut self.ebpf, F::MAPS.collector).map(|program| &*program)
    }

    fn adopt_links(&mut self) -> Result<()> {
        for (hook, ifindex) in self.pins.attachments()? {
            let path = self.pins.link(hook, ifindex);
            let pinned = PinnedLink::from_pin(&path)
                .with_context(|| format!("open the pinned link {}", path.display()))?;
            let link = SchedClassifierLink::try_from(FdLink::from(pinned))
                .with_context(|| format!("recognise the pinned link {}", path.display()))?;
            match classifier(&mut self.ebpf, hook)?.attach_to_link(link) {
                Ok(id) => {
                    // Still pinned: our descriptor may go.
                    classifier(&mut self.ebpf, hook)?.take_link(id)?;
                    self.attached.insert((hook, ifindex));
                }
                Err(error) => {
                    // The interface has gone, and the kernel detached the link.
                    debug!(path = %path.display(), %error, "dropping a pin without an interface");
                    remove_pin(&path)?;
                }
            }
        }
        Ok(())
    }

    /// Attaches a program and pins the link, behind the programs of others at the hook.
    ///
    /// # Errors
    /// The interface has gone, or the kernel has no tcx (before Linux 6.6).
    pub(super) fn attach(&mut self, hook: Hook, ifindex: u32) -> Result<()> {
        let name = if_indextoname(ifindex)
            .with_context(|| format!("find the interface with ifindex {ifindex}"))?;
        let name = name.to_string_lossy().into_owned();
        let action = || format!("attach {} to {name} (ifindex {ifindex})", hook.program());
        let program = classifier(&mut self.ebpf, hook)?;
        let order = TcAttachOptions::TcxOrder(LinkOrder::last());
        let id = program
            .attach_with_options(&name, hook.attach_type(), order)
            .with_context(|| format!("{}: netdp needs tcx, Linux 6.6 or later", action()))?;
        let link: FdLink = program.take_link(id)?.try_into().with_context(action)?;
        let path = self.pins.link(hook, ifindex);
        // A pin of an interface that had this ifindex before.
        remove_pin(&path)?;
        link.pin(&path).with_context(|| format!("pin the link {}", path.display()))?;
        self.attached.insert((hook, ifindex));
        Ok(())
    }

    /// Detaches a program, unless packets of a container could then pass its interface: without
    /// its entries in the maps the program drops them all.
    ///
    /// # Errors
    /// The pin can't be removed.
    pub(super) fn detach(&mut self, hook: Hook, ifindex: u32) -> Result<()> {
        if hook.guards() && is_up(ifindex) {
            warn!(ifindex, program = hook.program(), "staying attached: the interface is up");
            return Ok(());
        }
        remove_pin(&self.pins.link(hook, ifindex))?;
        self.attached.remove(&(hook, ifindex));
        Ok(())
    }

    /// Whether the kernel runs our program at the hook: someone may have detached it, or removed
    /// the pin.
    pub(super) fn is_attached(&mut self, hook: Hook, ifindex: u32) -> bool {
        if !self.pins.link(hook, ifindex).exists() {
            return false;
        }
        let ours = classifier(&mut self.ebpf, hook)
            .ok()
            .and_then(|program| program.info().ok())
            .map(|info| info.id());
        let Ok(name) = if_indextoname(ifindex) else { return false };
        SchedClassifier::query_tcx(&name.to_string_lossy(), hook.attach_type())
            .is_ok_and(|(_, programs)| programs.iter().any(|info| Some(info.id()) == ours))
    }
}

fn is_up(ifindex: u32) -> bool {
    let Ok(name) = if_indextoname(ifindex) else { return false };
    getifaddrs().is_ok_and(|mut interfaces| {
        interfaces.any(|interface| {
            interface.interface_name.as_bytes() == name.as_bytes()
                && interface.flags.contains(InterfaceFlags::IFF_UP)
        })
    })
}

fn classifier(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier> {
    program(ebpf, hook.program())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    ebpf.program_mut(name)
        .with_context(|| format!("find program {name} in the eBPF object"))?
        .try_into()
        .with_context(|| format!("program {name} is a tc program"))
}

/// The kernel's refusal in one line; the verifier's whole log on request.
pub(super) fn refusal(name: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return anyhow::Error::from(error).context(format!("load program {name}"));
    };
    let log = verifier_log.to_string();
    debug!(program = name, %log, "the verifier's log");
    // The verifier closes with statistics; what it objects to stands before them.
    let is_statistics = |line: &str| {
        ["processed ", "stack depth ", "verification time "]
            .iter()
            .any(|start| line.starts_with(start))
    };
    let cause = log
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty() && !is_statistics(line))
        .unwrap_or("the kernel gave no reason");
    anyhow::anyhow!(
        "load program {name}: {io_error}: {cause} (NETDP_LOG=debug prints the verifier's log)"
    )
}

/// aya adopts a pinned map without a look at it, so we look.
fn check_layout(name: &str, path: &Path, expected: &aya_obj::Map, flows: u32) -> Result<()> {
    let pinned = MapInfo::from_pin(path)
        .with_context(|| format!("read the pinned map {}", path.display()))?;
    let found = (pinned.key_size(), pinned.value_size(), pinned.map_flags());
    let wanted = (expected.key_size(), expected.value_size(), expected.map_flags());
    let kind = pinned.map_type().context("read the type of a pinned map")? as u32;
    let mut same = found == wanted && kind == expected.map_type();
    if SIZED.contains(&name) {
        let entries = if name.starts_with("FLOW") { 2 * flows } else { flows };
        if pinned.max_entries() != entries {
            warn!(
                map = name,
                entries = pinned.max_entries(),
                wanted = entries,
                "the flow table keeps its size: a table in use can't be resized"
            );
        }
    } else {
        same &= pinned.max_entries() == expected.max_entries();
    }
    if !same {
        bail!(
            "the pinned map {} has another layout than this version's: run `netdp purge`, then \
             start the agent again",
            path.display()
        );
    }
    Ok(())
}

pub(super) fn remove_pin(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the pin {}", path.display()))
        }
        _ => Ok(()),
    }
}
