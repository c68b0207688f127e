//! One virtual machine in QEMU: with KVM where it works, emulated where not, and ended when it
//! takes too long. Knows nothing of what runs inside.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::find_program;

/// The only emulator that is asked for.
const QEMU: &str = "qemu-system-x86_64";
/// A kernel that runs says its first word in a moment; one that hangs never does.
const FIRST_WORD: Duration = Duration::from_secs(4);
/// Lines of the console that a failure shows.
const LAST_WORDS: usize = 30;
/// What every kernel is told: to speak, and to end the machine when it can't go on.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 oops=panic random.trust_cpu=on";
/// Enough for the flow tables of a few labs.
const MEMORY: &str = "3G";

/// What makes a machine run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acceleration {
    Kvm,
    /// No hardware for it: slow, and everywhere.
    Emulation,
}

impl Acceleration {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Emulation => "emulation",
        }
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // Fast strings are emulated byte by byte: without them kernels clear and copy pages by
            // words.
            Self::Emulation => ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"],
        }
    }

    /// What the kernel is told beside what every machine's is.
    fn kernel_arguments(self) -> &'static str {
        match self {
            Self::Kvm => "",
            // Code is translated once for each address that it runs at: at the same in every
            // process, that is once and not thousands of times. Each look at the default clock
            // leaves the emulated processor. What guards real processors guards nothing here.
            Self::Emulation => " norandmaps nokaslr clocksource=tsc tsc=reliable mitigations=off",
        }
    }

    /// How many times as long everything takes as on this machine, at most.
    pub(crate) fn slowness(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Emulation => 8,
        }
    }
}

/// A machine to be run.
pub(crate) struct Machine<'a> {
    pub(crate) image: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// Where the kernel's messages go.
    pub(crate) console: PathBuf,
}

impl Machine<'_> {
    /// Runs it to its end, and shows each line of its second serial port to `listen`.
    ///
    /// # Errors
    /// With the last words of its console where it says nothing more and is not over in `limit`.
    pub(crate) fn run(
        &self,
        acceleration: Acceleration,
        limit: Duration,
        mut listen: impl FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let mut command = qemu(acceleration, self.image)?;
        command
            .args(["-smp", "2", "-m", MEMORY, "-initrd"])
            .arg(self.initramfs)
            .args(["-append", &format!("{KERNEL_ARGUMENTS}{}", acceleration.kernel_arguments())])
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()))
            .args(["-serial", "stdio"]);
        let mut running = Running::start(&mut command)?;
        let lines = running.lines()?;
        let end = Instant::now() + limit;
        loop {
            match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => listen(&line)?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    let last_words = self.last_words();
                    bail!(
                        "not over after {} s; the console ends with:\n{last_words}",
                        limit.as_secs()
                    )
                }
            }
        }
    }

    /// The end of what its kernel said.
    pub(crate) fn last_words(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n")
    }
}

/// What works on this machine. `/dev/kvm` may be there and yet not run a guest, as in some virtual
/// machines, so a guest is tried: `image` is any kernel.
pub(crate) fn acceleration(image: &Path) -> Result<Acceleration> {
    static FOUND: OnceLock<Acceleration> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let works = Path::new("/dev/kvm").exists() && says_something(image)?;
    let found = if works { Acceleration::Kvm } else { Acceleration::Emulation };
    Ok(*FOUND.get_or_init(|| found))
}

/// Whether a kernel without a file system gets far enough under KVM to say something.
fn says_something(image: &Path) -> Result<bool> {
    let mut command = qemu(Acceleration::Kvm, image)?;
    command.args(["-m", "512", "-serial", "stdio"]);
    command.args(["-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"]);
    let mut running = Running::start(command.stderr(Stdio::null()))?;
    Ok(running.lines()?.recv_timeout(FIRST_WORD).is_ok())
}

fn qemu(acceleration: Acceleration, image: &Path) -> Result<Command> {
    let program = find_program(QEMU).with_context(|| {
        format!("find {QEMU}: run `cargo xtask setup`, or install this distribution's QEMU for x86")
    })?;
    let mut command = Command::new(program);
    command
        .args(acceleration.arguments())
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-kernel"])
        .arg(image);
    Ok(command)
}

/// A QEMU that ends with its owner.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Self(command.spawn().with_context(|| format!("run {QEMU}"))?))
    }

    /// What it writes, line by line, until its end.
    fn lines(&mut self) -> Result<mpsc::Receiver<String>> {
        let stdout = self.0.stdout.take().context("read QEMU's output")?;
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || send_lines(stdout, &sender));
        Ok(receiver)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn send_lines(source: impl Read, sender: &Sender<String>) {
    let mut source = BufReader::new(source);
    let mut line = Vec::new();
    while let Ok(1..) = source.read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line);
        if sender.send(text.trim_end_matches(['\r', '\n']).to_owned()).is_err() {
            return;
        }
        line.clear();
    }
}
