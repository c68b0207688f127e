//! The loaded object: programs in the kernel, maps that are pinned or adopted.

use std::{collections::BTreeSet, fs, io, path::Path, thread};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapInfo},
    programs::{Program, ProgramError, SchedClassifier},
};
use aya_obj::{Object as Elf, generated::bpf_map_type};
use netdp_common::{config::Config, flow::sets};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::{InterfaceFlags, if_indextoname},
};
use tracing::{debug, warn};

use super::{
    attach::{Place, TcHooks},
    cgroup::{self, SocketHooks},
    claims::Claims,
    family::Wired,
    flows::FlowMaps,
    image::Hook,
    pins::Pins,
    probe::{Feature, Features},
    sys,
};
use crate::{
    dataplane::Drift,
    family::{V4, V6},
};

/// The programs as this build made them.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("NETDP_EBPF_OBJECT"));

/// The size of a map where that is the operator's to choose, by the flows that there is to be room for.
fn size(name: &str, flows: u32) -> Option<u32> {
    for family in [&V4::MAPS, &V6::MAPS] {
        if name == family.flow {
            return Some(2 * flows);
        } else if name == family.index {
            return Some(sets(flows));
        } else if name == family.free {
            return Some(flows);
        }
    }
    None
}

/// Makes room for so many flows.
fn resize(loader: &mut EbpfLoader<'_>, flows: u32) {
    for family in [&V4::MAPS, &V6::MAPS] {
        for name in [family.flow, family.index, family.free] {
            if let Some(entries) = size(name, flows) {
                loader.map_max_entries(name, entries);
            }
        }
    }
}

/// Loads each program by itself, on maps that nobody else sees: what a kernel refuses is refused
/// by name. Returns what became of each; a refusal has the end of the verifier's log.
///
/// # Errors
/// The kernel refuses a map.
pub(super) fn load_each(features: &Features) -> Result<Vec<(&'static str, Result<()>)>> {
    let judge =
        |name, loaded: Result<(), ProgramError>| loaded.map_err(|error| explained(name, error));
    let coarse_clock = coarse_clock(features);
    let mut loader = loader();
    loader.override_global(COARSE_CLOCK, &coarse_clock, true);
    resize(&mut loader, 1);
    let mut ebpf = loader.load(OBJECT).context("create the maps")?;
    let mut results = Vec::new();
    for name in Hook::ALL.map(Hook::program).into_iter().chain(COLLECTORS) {
        results.push((name, judge(name, program(&mut ebpf, name)?.load())));
    }
    let bind_hooks = cgroup::BIND_HOOKS.into_iter();
    let bind_hooks = bind_hooks.filter(|_| features.has(Feature::BindRefusal));
    for name in cgroup::HOOKS.into_iter().chain([cgroup::NAMING]).chain(bind_hooks) {
        results.push((name, judge(name, cgroup::load(&mut ebpf, name)?)));
    }
    Ok(results)
}

/// A refusal with the end of the verifier's log, for whoever has to mend the program.
fn explained(name: &str, error: ProgramError) -> anyhow::Error {
    const LINES: usize = 60;
    let log = match &error {
        ProgramError::LoadError { verifier_log, .. } => verifier_log.to_string(),
        _ => String::new(),
    };
    let lines: Vec<_> = log.lines().collect();
    let end = lines[lines.len().saturating_sub(LINES)..].join("\n");
    refusal(name, error).context(format!("the verifier's log ends with:\n{end}\n"))
}

/// A loader that does not keep the kernel's own types: the programs ask for none of them.
fn loader<'a>() -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader
}

/// The constant of the programs that says whether they may ask for the coarse clock.
const COARSE_CLOCK: &str = "COARSE_CLOCK";

fn coarse_clock(features: &Features) -> u8 {
    u8::from(features.has(Feature::CoarseClock))
}

/// Loads what is on tc hooks, and the collectors. Beside each other, for the verifier takes a fifth of a
/// second for the largest, and as long for all the others.
fn load_classifiers(ebpf: &mut Ebpf) -> Result<()> {
    let names: Vec<_> = Hook::ALL.map(Hook::program).into_iter().chain(COLLECTORS).collect();
    let programs = ebpf.programs_mut().filter(|(name, _)| names.contains(name));
    thread::scope(|scope| {
        let loads: Vec<_> = programs
            .map(|(name, program)| {
                scope.spawn(move || -> Result<()> {
                    classifier_of(name, program)?.load().map_err(|error| refusal(name, error))
                })
            })
            .collect();
        loads.into_iter().try_for_each(|load| match load.join() {
            Ok(loaded) => loaded,
            Err(_) => bail!("a thread panicked that was to load a program"),
        })
    })
}

/// On no hook: the agent runs them.
const COLLECTORS: [&str; 2] = [V4::MAPS.collector, V6::MAPS.collector];

/// Programs and maps in the kernel.
pub(super) struct Object {
    ebpf: Ebpf,
    hooks: TcHooks,
    /// What is attached.
    pub(super) attached: BTreeSet<Place>,
    /// `None` where the host can't have them.
    sockets: Option<SocketHooks>,
    claims: Claims,
    /// See [`cgroup::can_know_ports`].
    can_know_ports: bool,
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
    pub(super) fn load(
        pins: Pins,
        features: &Features,
        flows: u32,
        cgroup: Option<&Path>,
    ) -> Result<Self> {
        let elf = Elf::parse(OBJECT).context("parse the eBPF object")?;
        let names: Vec<&str> = elf.maps.keys().map(String::as_str).collect();
        let coarse_clock = coarse_clock(features);
        let mut loader = loader();
        loader.override_global(COARSE_CLOCK, &coarse_clock, true);
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
        resize(&mut loader, flows);
        let mut ebpf = loader.load(OBJECT).context("create the maps")?;
        // It forgets, for what follows may leave hooks that are not attached.
        let claims = ebpf.take_map("PORT_CLAIMS").context("find map PORT_CLAIMS in the object")?;
        let claims = Claims::new(claims)?;
        load_classifiers(&mut ebpf)?;
        let hooks =
            cgroup.map(|cgroup| SocketHooks::load(&mut ebpf, cgroup, &pins, features)).transpose();
        let sockets = hooks.unwrap_or_else(|error| {
            cgroup::warn_unavailable(&error);
            None
        });
        if sockets.is_none() {
            // Of an agent that could have them: nobody would look after them.
            cgroup::remove_pins(&pins)?;
        }
        let mut hooks = TcHooks::new(pins, features);
        let attached = hooks.adopt(&mut ebpf)?;
        sys::return_free_memory();
        let can_know_ports = cgroup::can_know_ports(features, cgroup);
        Ok(Self { ebpf, hooks, attached, sockets, claims, can_know_ports })
    }

    /// Attaches a program to the loopback interface of a namespace that ends with it.
    pub(super) fn try_out(&mut self) -> Result<()> {
        self.hooks.try_out(classifier(&mut self.ebpf, Hook::FromUplink)?)
    }

    /// The kernel's name of the host's network namespace; 0 where no socket is the host's.
    pub(super) fn netns_cookie(&self) -> u64 {
        self.sockets.as_ref().map_or(0, |hooks| hooks.netns_cookie)
    }

    /// Whether programs of the host are kept from binding published ports.
    pub(super) fn keeps_ports(&self) -> bool {
        self.sockets.as_ref().is_some_and(SocketHooks::keep_ports)
    }

    /// Looks whether a socket of the host has a port that source NAT chooses, where that can be known: see
    /// [`Claims::look`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn look_for_claims(&mut self, config: Option<&Config>) -> Result<()> {
        let are_attached = self.sockets.as_ref().is_some_and(SocketHooks::are_attached);
        match config {
            Some(config) if are_attached && self.can_know_ports => self.claims.look(config),
            _ => self.claims.forget(),
        }
    }

    /// From now on any socket of the host may have a port that source NAT chooses.
    ///
    /// # Errors
    /// As [`Claims::forget`].
    pub(super) fn forget_claims(&mut self) -> Result<()> {
        self.claims.forget()
    }

    /// Attaches the socket hooks that are not, as far as the host can have them; returns how many.
    ///
    /// # Errors
    /// As [`Claims::forget`].
    pub(super) fn attach_sockets(&mut self) -> Result<usize> {
        let Some(hooks) = &mut self.sockets else { return Ok(0) };
        if hooks.are_attached() {
            return Ok(0);
        }
        // Nobody has seen what programs ask for since they were there.
        self.claims.forget()?;
        match hooks.attach(&mut self.ebpf) {
            Ok(writes) => Ok(writes),
            Err(error) => {
                cgroup::warn_unavailable(&error);
                // It would fail again: not before the next agent. Some are worse than none.
                if let Err(error) = hooks.detach() {
                    warn!("detach the socket hooks: {error:#}");
                }
                self.sockets = None;
                Ok(0)
            }
        }
    }

    /// Detaches the socket hooks; returns how many there were.
    ///
    /// # Errors
    /// A pin can't be removed, or as [`Claims::forget`].
    pub(super) fn detach_sockets(&mut self) -> Result<usize> {
        self.claims.forget()?;
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

    /// Takes out the maps of a family's flow table.
    pub(super) fn take_flow_maps<F: Wired>(&mut self) -> Result<FlowMaps> {
        Ok(FlowMaps {
            table: self.take_map(F::MAPS.table)?,
            places: self.take_map(F::MAPS.flow)?,
            index: self.take_map(F::MAPS.index)?,
            free: self.take_map(F::MAPS.free)?,
        })
    }

    /// The program that collects a family's flows.
    pub(super) fn collector<F: Wired>(&mut self) -> Result<&SchedClassifier> {
        program(&mut self.ebpf, F::MAPS.collector).map(|program| &*program)
    }

    /// Attaches a program, behind the programs of others at the hook.
    ///
    /// # Errors
    /// The interface has gone, or somebody else is in the place.
    pub(super) fn attach(&mut self, hook: Hook, ifindex: u32) -> Result<()> {
        self.hooks.attach(classifier(&mut self.ebpf, hook)?, hook, ifindex)?;
        self.attached.insert((hook, ifindex));
        Ok(())
    }

    /// Detaches a program, unless packets of a container could then pass its interface: without
    /// its entries in the maps the program drops them all.
    ///
    /// # Errors
    /// The program can't be detached.
    pub(super) fn detach(&mut self, hook: Hook, ifindex: u32) -> Result<()> {
        if hook.guards() && is_up(ifindex) {
            warn!(ifindex, program = hook.program(), "staying attached: the interface is up");
            return Ok(());
        }
        self.hooks.detach(hook, ifindex)?;
        self.attached.remove(&(hook, ifindex));
        Ok(())
    }

    /// Whether the kernel runs our program at the hook.
    pub(super) fn is_attached(&mut self, hook: Hook, ifindex: u32) -> bool {
        classifier(&mut self.ebpf, hook)
            .is_ok_and(|program| self.hooks.is_attached(program, hook, ifindex))
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

pub(super) fn classifier(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier> {
    program(ebpf, hook.program())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("find program {name} in the eBPF object"))?;
    classifier_of(name, program)
}

fn classifier_of<'a>(name: &str, program: &'a mut Program) -> Result<&'a mut SchedClassifier> {
    program.try_into().with_context(|| format!("program {name} is a tc program"))
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
    if let Some(entries) = size(name, flows) {
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
