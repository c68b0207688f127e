//! Running other programs: captured with a progress line, or shown as they go, and as root
//! where a step needs it. Knows nothing of what the programs are for.

use std::ffi::OsStr;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs, io};

use anyhow::{Context, Result, bail, ensure};

/// Silence that a reader at a terminal accepts without asking whether anything happens.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between progress lines in a log, where they pile up.
const LOG_INTERVAL: Duration = Duration::from_secs(5);
/// Between looks at the clock while a program runs.
const TICK: Duration = Duration::from_millis(250);

/// What a program left behind.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    /// stdout and stderr in the order they arrived.
    pub(crate) transcript: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Echo {
    Off,
    On,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

/// Runs `command` to its end behind a progress line and returns its stdout. Its output is
/// shown only when it fails, which is an error.
pub(crate) fn run_quiet(title: &str, command: &mut Command) -> Result<String> {
    let finished = drive(title, command, Echo::Off, None)?;
    if !finished.status.success() {
        eprint!("{}", finished.transcript);
        bail!("{title}: {}", finished.status);
    }
    Ok(finished.stdout)
}

/// Like [`run_quiet`], but a failure is the caller's to judge: nothing is shown, and a
/// program that is still busy after `limit` is killed.
pub(crate) fn try_quiet(title: &str, command: &mut Command, limit: Duration) -> Result<String> {
    let finished = drive(title, command, Echo::Off, Some(limit))?;
    let cause = cause(&finished.transcript);
    ensure!(finished.status.success(), "{title}: {}: {cause}", finished.status);
    Ok(finished.stdout)
}

/// The line of a failed program's output that says most: its first error, or its last words.
fn cause(transcript: &str) -> &str {
    let is_error = |line: &&str| line.starts_with("E: ") || line.starts_with("error: ");
    let mut lines = transcript.lines();
    let last = transcript.trim_end().lines().next_back();
    lines.find(is_error).or(last).unwrap_or("no output")
}

/// Runs `command` and shows its output as it comes. Failing is part of the result.
pub(crate) fn run_shown(title: &str, command: &mut Command) -> Result<Finished> {
    drive(title, command, Echo::On, None)
}

/// The command line `program` as root: directly, or through sudo with `environment` carried
/// over, which sudo would drop.
pub(crate) fn as_root(program: &Path, environment: &[(&str, &OsStr)]) -> Result<Command> {
    let direct = is_root()?;
    let mut command = Command::new(if direct { program.as_os_str() } else { OsStr::new("sudo") });
    if direct {
        command.envs(environment.iter().copied());
    } else {
        command.arg("env");
        for (name, value) in environment {
            let mut assignment = OsStr::new(name).to_owned();
            assignment.push("=");
            assignment.push(value);
            command.arg(assignment);
        }
        command.arg(program);
    }
    Ok(command)
}

/// Makes sure that [`as_root`] will work, asking for sudo's password now, with the reason,
/// and not in the middle of a progress line.
pub(crate) fn ensure_root(reason: &str) -> Result<()> {
    if is_root()? {
        return Ok(());
    }
    ensure!(
        find_program("sudo").is_some(),
        "{reason} needs root: run this as root or install sudo"
    );
    eprintln!("sudo: {reason} needs root");
    let status = Command::new("sudo").arg("-v").status().context("run sudo")?;
    ensure!(status.success(), "{reason} needs root, and sudo refused: run this as root");
    Ok(())
}

/// Whether this process has root's effective user id.
pub(crate) fn is_root() -> Result<bool> {
    Ok(own_status("Uid:")?.split_whitespace().nth(1) == Some("0"))
}

/// A line of this process's `/proc` status, without its `name`.
pub(crate) fn own_status(name: &str) -> Result<String> {
    let path = "/proc/self/status";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.with_context(|| format!("find {name} in {path}"))?.trim().to_owned())
}

/// Where `program` is, looking also where root's programs live: an ordinary user's PATH
/// leaves those directories out on Debian.
pub(crate) fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

fn drive(
    title: &str,
    command: &mut Command,
    echo: Echo,
    limit: Option<Duration>,
) -> Result<Finished> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let program = command.get_program().to_owned();
    let mut child = command.spawn().with_context(|| format!("run {}", program.display()))?;
    let (sender, receiver) = mpsc::channel();
    forward(child.stdout.take(), Stream::Stdout, sender.clone());
    forward(child.stderr.take(), Stream::Stderr, sender);

    let mut progress = Progress::new(title);
    let (mut stdout, mut transcript) = (Vec::new(), Vec::new());
    loop {
        match receiver.recv_timeout(TICK) {
            Ok((stream, bytes)) => {
                if echo == Echo::On {
                    progress.interrupt();
                    show(stream, &bytes)?;
                    progress.at_line_start = bytes.ends_with(b"\n");
                }
                transcript.extend_from_slice(&bytes);
                if stream == Stream::Stdout {
                    stdout.extend(bytes);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        progress.tick();
        if let Some(limit) = limit.filter(|limit| progress.started.elapsed() > *limit) {
            progress.interrupt();
            kill(&mut child)?;
            bail!("{title}: not done after {} s", limit.as_secs());
        }
    }
    let status = child.wait().with_context(|| format!("wait for {}", program.display()))?;
    progress.interrupt();
    Ok(Finished { status, stdout: lossy(&stdout), transcript: lossy(&transcript) })
}

fn kill(child: &mut Child) -> Result<()> {
    child.kill().context("kill a program that takes too long")?;
    child.wait().context("wait for a killed program")?;
    Ok(())
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn show(stream: Stream, bytes: &[u8]) -> Result<()> {
    let shown = match stream {
        Stream::Stdout => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
        Stream::Stderr => io::stderr().write_all(bytes),
    };
    shown.context("write to the terminal")
}

/// Sends what `source` says to `sender` from a thread of its own, until its end.
fn forward<R: Read + Send + 'static>(
    source: Option<R>,
    stream: Stream,
    sender: Sender<(Stream, Vec<u8>)>,
) {
    let Some(mut source) = source else { return };
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = source.read(&mut buffer) {
            if sender.send((stream, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
}

/// One line on stderr that says what takes so long: rewritten in place at a terminal,
/// repeated now and then in a log.
struct Progress<'a> {
    title: &'a str,
    started: Instant,
    next: Instant,
    on_terminal: bool,
    drawn: bool,
    at_line_start: bool,
}

impl<'a> Progress<'a> {
    fn new(title: &'a str) -> Self {
        let started = Instant::now();
        let on_terminal = io::stderr().is_terminal();
        Self {
            title,
            started,
            next: started + PATIENCE,
            on_terminal,
            drawn: false,
            at_line_start: true,
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if now < self.next || !self.at_line_start {
            return;
        }
        let seconds = self.started.elapsed().as_secs();
        if self.on_terminal {
            eprint!("\r\x1b[K  … {} ({seconds} s)", self.title);
            self.next = now + TICK;
            self.drawn = true;
        } else {
            eprintln!("  … {} ({seconds} s)", self.title);
            self.next = now + LOG_INTERVAL;
        }
    }

    /// Takes the line away, because something else is about to be written.
    fn interrupt(&mut self) {
        if self.drawn {
            eprint!("\r\x1b[K");
            self.drawn = false;
        }
        self.next = self.next.max(Instant::now() + PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn quiet_run_returns_stdout_alone() {
        assert_eq!(run_quiet("echo", &mut shell("echo out; echo err >&2")).unwrap(), "out\n");
    }

    #[test]
    fn failure_names_the_step_and_its_last_words() {
        let limit = Duration::from_secs(10);
        let error = try_quiet("fetch", &mut shell("echo no route; exit 3"), limit).unwrap_err();
        assert_eq!(error.to_string(), "fetch: exit status: 3: no route");
    }

    #[test]
    fn program_past_its_limit_is_killed() {
        let started = Instant::now();
        let error = try_quiet("wait", Command::new("sleep").arg("60"), Duration::ZERO);
        assert_eq!(error.unwrap_err().to_string(), "wait: not done after 0 s");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn missing_program_is_an_error_that_names_it() {
        let error = run_quiet("nothing", &mut Command::new("no-such-program")).err().unwrap();
        assert_eq!(error.to_string(), "run no-such-program");
    }
}
