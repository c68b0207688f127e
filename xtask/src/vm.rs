//! Suites on other kernels than this machine's, in virtual machines that have nothing but them.
//!
//! Owns what goes into a machine and what comes out of it. The suites are the same executables that
//! run on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use self::initramfs::Initramfs;
use self::kernel::Kernel;
pub(crate) use self::kernel::Line;
use self::machine::{Acceleration, Machine};
use self::record::Record;
use crate::process::find_program;
use crate::test::{self, Counts, Suite};
use crate::{cargo, demo, setup};

mod initramfs;
mod kernel;
mod machine;
mod record;

/// For a question to a program of this machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The first program in a machine.
const INIT: &str = include_str!("vm/init.sh");

/// Programs of this machine that suites run.
const PROGRAMS: [&str; 7] = ["ip", "nft", "tcpdump", "bpftool", "ping", "modprobe", "tc"];

/// What names of rows contain that need iptables.
const IPTABLES_ROWS: &str = "/iptables/";
/// What names of rows contain that need eBPF.
const EBPF_ROWS: &str = "/ebpf/";

/// Modules that netdp or a suite needs; in some kernels they are built in. None of iptables: old
/// kernels give every namespace its tables at once, and suites prove that there are none.
///
/// A machine without eBPF lacks [`TC_MODULES`] of them.
const MODULES: [&str; 22] = [
    "veth",
    "bridge",
    "macvlan",
    "tun",
    "dummy",
    "vxlan",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "sctp",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_masq",
    "nft_nat",
    "nft_redir",
    "nf_conntrack",
    "nf_nat",
    "af_packet_diag",
    "xfrm_user",
];

/// Without these, a kernel before 6.6 has no hook of tc that runs a program.
const TC_MODULES: [&str; 2] = ["sch_ingress", "cls_bpf"];

/// What iptables needs of a kernel, which loads it when a rule asks for it.
const IPTABLES_MODULES: [&str; 15] = [
    "br_netfilter",
    "ip_tables",
    "ip6_tables",
    "nf_conntrack_netlink",
    "nft_compat",
    "nft_counter",
    "xt_addrtype",
    "xt_comment",
    "xt_connlimit",
    "xt_conntrack",
    "xt_iprange",
    "xt_mac",
    "xt_nat",
    "xt_physdev",
    "xt_tcpudp",
];

/// Programs of iptables.
const IPTABLES_PROGRAMS: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

/// Where they find what they know of matches and targets, in Debian's packages.
const IPTABLES_EXTENSIONS: &str = "/usr/lib/x86_64-linux-gnu/xtables";

/// A kernel to run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// Debian 11's, the oldest that netdp works on
    #[value(name = "5.10")]
    V5_10,
    /// Debian 12's
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's
    #[value(name = "6.12")]
    V6_12,
    /// Debian unstable's
    #[value(name = "7.2")]
    V7_2,
    /// One after the other
    All,
}

impl Choice {
    fn lines(self) -> Vec<Line> {
        match self {
            Self::V5_10 => vec![Line::V5_10],
            Self::V6_1 => vec![Line::V6_1],
            Self::V6_12 => vec![Line::V6_12],
            Self::V7_2 => vec![Line::V7_2],
            Self::All => Line::value_variants().to_vec(),
        }
    }
}

/// The kernels whose gate every change has to pass: those of Debian's releases.
pub(crate) const GATE: [Line; 3] = [Line::V5_10, Line::V6_1, Line::V6_12];

/// How a run in machines is to be.
pub(crate) struct Options<'a> {
    pub(crate) suites: &'a [Suite],
    /// Only tests whose names contain it are run.
    pub(crate) filter: Option<&'a str>,
    /// Tests whose names contain one of them are not run.
    pub(crate) skipped: &'a [String],
    /// What has passed on the kernel since the last whole run began is not run again.
    pub(crate) resume: bool,
    pub(crate) limit: Option<Duration>,
    /// The machine has iptables, and a kernel without hooks for eBPF.
    pub(crate) without_ebpf: bool,
}

impl<'a> Options<'a> {
    /// All tests of `suites`.
    pub(crate) fn all(suites: &'a [Suite]) -> Self {
        Self { suites, filter: None, skipped: &[], resume: false, limit: None, without_ebpf: false }
    }

    /// The agent on a kernel on which eBPF does not work.
    pub(crate) fn fallback() -> Self {
        let filter = Some("without_ebpf_the_agent_takes_iptables");
        Self { filter, without_ebpf: true, ..Self::all(&[Suite::Lifecycle]) }
    }

    /// Whether every change waits for it.
    fn is_gate(&self) -> bool {
        matches!(self.suites, [Suite::Load | Suite::Lifecycle])
    }

    fn modules(&self) -> Vec<&'static str> {
        let is_there = |name: &&str| !self.without_ebpf || !TC_MODULES.contains(name);
        MODULES.into_iter().filter(is_there).collect()
    }
}

/// Runs suites on the kernels chosen. Succeeds when every suite ran on each and none failed.
pub(crate) fn run(choice: Choice, options: &Options) -> Result<ExitCode> {
    setup::run(setup::Scope::Machines)?;
    let mut all_well = true;
    let mut summary = String::new();
    for line in choice.lines() {
        let name = line.name();
        match run_on(line, options) {
            Ok(counts) => {
                all_well &= counts.is_well();
                summary.push_str(&format!("{name}: {counts}\n"));
            }
            Err(error) => {
                eprintln!("{name}: {error:#}");
                all_well = false;
                summary.push_str(&format!("{name}: did not end\n"));
            }
        }
    }
    print!("{summary}");
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs suites on one kernel and shows what they say, each line behind the kernel's name.
pub(crate) fn run_on(line: Line, options: &Options) -> Result<Counts> {
    let name = line.name();
    ensure!(
        !options.without_ebpf || line < Line::V6_12,
        "Linux {name} attaches eBPF without a module: 5.10 and 6.1 can be without it"
    );
    let directory = cargo::side_target_dir("vm");
    let kernel = Kernel::get(line, &directory)?;
    let acceleration = machine::acceleration(&kernel.image)?;
    let mut record = Record::open(directory.join(format!("{name}.passed")));
    if !options.resume && options.filter.is_none() {
        record.clear()?;
    }
    let scratch = tempfile::tempdir_in(&directory).context("create a directory")?;
    let initramfs = scratch.path().join("initramfs");
    contents(&kernel, acceleration, options, &record, scratch.path())?.write(&initramfs)?;
    let console = directory.join(format!("{name}.console"));
    // What an earlier machine said must not pass for this one's last words.
    fs::write(&console, "").with_context(|| format!("empty {}", console.display()))?;
    let machine = Machine { image: &kernel.image, initramfs: &initramfs, console };
    println!("{name}: Linux {} with {}", kernel.release, acceleration.name());

    let started = Instant::now();
    let mut report = Report::default();
    if options.resume {
        for suite in options.suites {
            let before = record.passed(&suite.name()).count();
            println!("{name}: {before} tests of {} passed before", suite.name());
            report.counts = report.counts + Counts::of_passed(before);
        }
    }
    let limit = options.limit.unwrap_or_else(|| limit(options, acceleration));
    machine.run(acceleration, limit, |text| {
        if let Some(shown) = report.hear(text) {
            println!("{name}: {shown}");
        }
        match passed_test(text) {
            Some(test) => record.add(&report.suite, test),
            None => Ok(()),
        }
    })?;
    println!("{name}: over after {:.1} s", started.elapsed().as_secs_f32());
    report.counts(options.suites).with_context(|| {
        format!("the machine ended too early; its console ends with:\n{}", machine.last_words())
    })
}

/// How long a machine may take, starting included.
fn limit(options: &Options, acceleration: Acceleration) -> Duration {
    Duration::from_secs(match (options.is_gate(), acceleration) {
        (true, _) => 240,
        (false, Acceleration::Kvm) => 1800,
        (false, Acceleration::Emulation) => 7200,
    })
}

/// How what runs in a machine is built. The gate is what every change waits for, and short: it
/// takes what is built already.
fn profile(options: &Options, acceleration: Acceleration) -> &'static str {
    match acceleration {
        Acceleration::Emulation if !options.is_gate() => "guest",
        Acceleration::Emulation | Acceleration::Kvm => "dev",
    }
}

fn contents(
    kernel: &Kernel,
    acceleration: Acceleration,
    options: &Options,
    record: &Record,
    scratch: &Path,
) -> Result<Initramfs> {
    let mut archive = Initramfs::new();
    archive.add("/init", INIT.as_bytes());
    let program = |name: &str| {
        find_program(name).with_context(|| format!("find {name}: run `cargo xtask setup`"))
    };
    archive.add_program("/usr/bin/busybox", &program("busybox")?)?;
    for name in PROGRAMS {
        archive.add_program(Path::new("/usr/sbin").join(name), &program(name)?)?;
    }
    let profile = profile(options, acceleration);
    archive.add_stripped("/netdp", &demo::netdp_built_as(profile)?, scratch)?;
    let mut arguments = options.filter.unwrap_or_default().to_owned();
    let unfit = if options.without_ebpf { EBPF_ROWS } else { IPTABLES_ROWS };
    for word in options.skipped.iter().map(String::as_str).chain([unfit]) {
        arguments.push_str(&format!(" --skip {word}"));
    }
    let mut list = String::new();
    for suite in options.suites {
        let name = suite.name();
        ensure!(suite.is_executable(), "{name} is no suite for a machine of its own");
        let executable = test::executable_built_as(*suite, profile)?;
        archive.add_stripped(format!("/suites/{name}"), &executable, scratch)?;
        let passed = record.passed(&name).filter(|_| options.resume);
        let passed = passed.map(|test| format!("{test}\n")).collect::<String>();
        archive.add(format!("/suites/{name}.skip"), passed.as_bytes());
        list.push_str(&format!("{name} {arguments}\n"));
    }
    archive.add("/suites/list", list.as_bytes());
    let mut environment = format!("NETDP_SLOWNESS={}\n", acceleration.slowness());
    let mut modules = options.modules();
    archive.add("/modules", modules.join("\n").as_bytes());
    if options.without_ebpf {
        environment.push_str("NETDP_WITHOUT_EBPF=1\n");
        modules.extend(IPTABLES_MODULES);
        add_iptables(&mut archive)?;
    }
    archive.add("/suites/environment", environment.as_bytes());
    for file in kernel.module_files(&modules)? {
        archive.add_file(PathBuf::from("/").join(&file), &kernel.path(&file))?;
    }
    Ok(archive)
}

fn add_iptables(archive: &mut Initramfs) -> Result<()> {
    for name in IPTABLES_PROGRAMS {
        let program = find_program(name);
        let program = program.with_context(|| format!("find {name}: run `cargo xtask setup`"))?;
        archive.add_program(Path::new("/usr/sbin").join(name), &program)?;
    }
    let listed = fs::read_dir(IPTABLES_EXTENSIONS);
    for entry in listed.with_context(|| format!("list {IPTABLES_EXTENSIONS}"))? {
        let path = entry.with_context(|| format!("list {IPTABLES_EXTENSIONS}"))?.path();
        archive.add_file(&path, &path)?;
    }
    Ok(())
}

/// The name in `test NAME ... ok`.
fn passed_test(text: &str) -> Option<&str> {
    Some(text.strip_prefix("test ")?.strip_suffix("... ok")?.trim())
}

/// What a machine has said so far.
#[derive(Default)]
struct Report {
    counts: Counts,
    /// The suite at hand.
    suite: String,
    /// Suites that ended, and how.
    ended: Vec<(String, i32)>,
    /// Failed tests before the suite at hand.
    failed_before: usize,
}

impl Report {
    /// Takes a line of the machine and returns what is to be shown of it.
    fn hear<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let Some(word) = text.strip_prefix("netdp-vm ") else {
            if let Some(counts) = test::result_line(text) {
                self.counts = self.counts + counts;
            }
            return Some(text);
        };
        if let Some(suite) = word.strip_prefix("suite ") {
            suite.clone_into(&mut self.suite);
        }
        if let Some((suite, code)) = word.strip_prefix("exit ").and_then(|end| end.split_once(' '))
        {
            let code = code.parse().unwrap_or(i32::MAX);
            if code != 0 && self.counts.failed == self.failed_before {
                // It crashed: there is no result line.
                self.counts = self.counts + Counts::of_one(false);
            }
            self.failed_before = self.counts.failed;
            self.ended.push((suite.to_owned(), code));
            return None;
        }
        Some(word)
    }

    /// The counts, if every suite has ended.
    fn counts(self, suites: &[Suite]) -> Result<Counts> {
        for suite in suites {
            if !self.ended.iter().any(|(name, _)| *name == suite.name()) {
                bail!("{} did not end", suite.name());
            }
        }
        Ok(self.counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_heard_line_by_line() {
        let mut report = Report::default();
        assert_eq!(report.hear("netdp-vm suite load"), Some("suite load"));
        assert_eq!(report.suite, "load");
        assert_eq!(report.hear("test a ... ok"), Some("test a ... ok"));
        report.hear("test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        assert_eq!(report.hear("netdp-vm exit load 0"), None);
        let counts = report.counts(&[Suite::Load]).unwrap();
        assert!(counts.is_well());
    }

    #[test]
    fn tests_that_passed_are_told_from_others() {
        assert_eq!(passed_test("test PUB-01/ebpf/ipv4 ... ok"), Some("PUB-01/ebpf/ipv4"));
        assert_eq!(passed_test("test PUB-01/ebpf/ipv4 ... FAILED"), None);
        assert_eq!(passed_test("test a/b           ... ignored"), None);
    }

    #[test]
    fn crashes_and_silence_are_failures() {
        let mut report = Report::default();
        report.hear("netdp-vm exit load 139");
        assert!(!report.counts(&[Suite::Load]).unwrap().is_well());
        assert!(Report::default().counts(&[Suite::Load]).is_err());
    }
}
