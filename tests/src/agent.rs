//! Runs the agent as a process, well or badly, and speaks to it through the command line.
//!
//! Knows where its files are, and nothing of what they say.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::backend::Backend;
use crate::kept::Kept;
use crate::namespace::{Fate, Namespace};
use crate::probe::locked;
use crate::runtime::{cgroup2_mount, patient, poll_until, slowness};
use crate::sys::forbid_bpf_before_exec;

/// Loading every program through the verifier is most of this.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// A stop touches no packet path, so it is short.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How long the API may take to refuse.
const API_PATIENCE: Duration = Duration::from_secs(10);
/// Room in the flow tables where everything takes longer: to make and to scan those of a real host
/// would be most of what an emulated one does.
pub(crate) const SMALL_FLOWS: u32 = 32_768;
/// How much of the log a failure shows, in bytes.
const LOG_TAIL_BYTES: u64 = 8 << 10;
/// Exit code of a command that was refused or failed.
const EXIT_REFUSED: i32 = 1;

/// What a process may not do with bpf(2).
pub use crate::sys::Forbidden;

/// How the next process is started.
#[derive(Clone, Copy, Debug)]
struct Circumstances {
    dataplane: &'static str,
    arguments: &'static [&'static str],
    environment: Option<(&'static str, &'static str)>,
    forbidden: Option<Forbidden>,
}

/// One agent in one namespace, running or not.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    namespace: Namespace,
    circumstances: Mutex<Circumstances>,
    directory: PathBuf,
    uplinks: Vec<String>,
    flows: Option<u32>,
    timeouts: Vec<(&'static str, u32)>,
    docker_socket: Option<PathBuf>,
    fate: Fate,
    child: Mutex<Option<Kept>>,
}

impl Agent {
    /// Prepares an agent that keeps everything below `directory`, where `bpf` is a bpffs.
    ///
    /// # Errors
    /// When the `netdp` program can't be found.
    pub fn new(
        namespace: &Namespace,
        directory: &Path,
        uplinks: Vec<String>,
        fate: Fate,
    ) -> Result<Self> {
        Ok(Self {
            program: find_program()?,
            namespace: namespace.clone(),
            circumstances: Mutex::new(Circumstances {
                dataplane: Backend::Ebpf.name(),
                arguments: Backend::Ebpf.arguments(),
                environment: None,
                forbidden: None,
            }),
            directory: directory.to_owned(),
            uplinks,
            flows: None,
            timeouts: Vec::new(),
            docker_socket: None,
            fate,
            child: Mutex::new(None),
        })
    }

    /// Has another backend from the next start on.
    pub fn use_backend(&self, backend: Backend) {
        let mut circumstances = locked(&self.circumstances);
        circumstances.dataplane = backend.name();
        circumstances.arguments = backend.arguments();
        circumstances.environment = backend.environment();
    }

    /// Lets the agent choose its backend from the next start on.
    pub fn use_any_backend(&self) {
        locked(&self.circumstances).dataplane = "auto";
    }

    /// Forbids the agent some of bpf(2) from the next start on.
    pub fn forbid(&self, forbidden: Forbidden) {
        locked(&self.circumstances).forbidden = Some(forbidden);
    }

    /// Gives the flow table room for `flows` flows instead of the default.
    #[must_use]
    pub fn with_flows(mut self, flows: u32) -> Self {
        self.flows = Some(flows);
        self
    }

    /// Keeps idle flows of these kinds for as many seconds instead of the default.
    #[must_use]
    pub fn with_timeouts(mut self, timeouts: Vec<(&'static str, u32)>) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// Serves Docker at this path.
    #[must_use]
    pub fn with_docker_socket(mut self, path: Option<PathBuf>) -> Self {
        self.docker_socket = path;
        self
    }

    /// The program under test.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The socket of the API.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("run/netdp.sock")
    }

    /// The agent's standard output and standard error.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// The process, while there is one.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        locked(&self.child).as_ref().map(|child| child.id())
    }

    /// Starts the process and waits until it answers.
    ///
    /// It dies with this process unless it was made to be detached.
    ///
    /// # Errors
    /// With the end of its log when it does not come up.
    pub fn start(&self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .context("open the agent's log")?;
        let mut command = self.namespace.command(&self.program, self.fate)?;
        let circumstances = *locked(&self.circumstances);
        command.args(["agent", "--dataplane", circumstances.dataplane]);
        command.args(circumstances.arguments);
        command.envs(circumstances.environment);
        if let Some(forbidden) = circumstances.forbidden {
            forbid_bpf_before_exec(&mut command, forbidden);
        }
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--bpffs", "bpf")] {
            command.arg(flag).arg(self.directory.join(name));
        }
        if let Some(cgroup) = cgroup2_mount()? {
            command.args(["--cgroup", &cgroup]);
        }
        let small = (slowness() > 1).then_some(SMALL_FLOWS);
        if let Some(flows) = self.flows.or(small) {
            command.args(["--flows", &flows.to_string()]);
        }
        for (kind, seconds) in &self.timeouts {
            command.args(["--timeout", &format!("{kind}={seconds}")]);
        }
        if let Some(socket) = &self.docker_socket {
            command.arg("--docker-socket").arg(socket);
        }
        for uplink in &self.uplinks {
            command.args(["--uplink", uplink]);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("clone the agent's log")?)
            .stderr(log);
        let child =
            Kept::spawn(command).with_context(|| format!("start {}", self.program.display()))?;
        *locked(&self.child) = Some(child);
        poll_until(START_DEADLINE, "the agent's first answer", || {
            if let Some(child) = locked(&self.child).as_mut()
                && let Some(status) = child.try_wait().context("ask for the agent's state")?
            {
                bail!("start the agent: it ended with {status}");
            }
            Ok(self.json(&["status"]).ok().map(drop))
        })
        .with_context(|| format!("the agent's log ends with:\n{}", self.log_tail()))
    }

    /// Ends the process as a crash would.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill9(&self) -> Result<()> {
        let mut child = locked(&self.child).take().context("kill the agent: it is not running")?;
        child.kill().context("kill the agent")?;
        child.wait().context("wait for the agent")?;
        Ok(())
    }

    /// Asks the process to end and waits until it has.
    ///
    /// # Errors
    /// When there is none, it fails, or it does not end.
    pub fn stop(&self) -> Result<()> {
        let mut child = locked(&self.child).take().context("stop the agent: it is not running")?;
        let pid = i32::try_from(child.id()).context("name the agent's process")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("stop the agent")?;
        let ended = poll_until(STOP_DEADLINE, "the agent's end", || {
            child.try_wait().context("wait for the agent")
        });
        match ended {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => bail!("stop the agent: it ended with {status}\n{}", self.log_tail()),
            Err(error) => {
                child.kill().context("kill the agent")?;
                child.wait().context("wait for the agent")?;
                Err(error.context(self.log_tail()))
            }
        }
    }

    /// Runs one `netdp` command.
    ///
    /// # Errors
    /// When it can't be started; its exit code is the caller's to judge.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Output> {
        self.namespace
            .command(&self.program, Fate::DiesWithParent)?
            .args(arguments)
            .env("NETDP_SOCKET", self.socket())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {}", title(arguments)))
    }

    /// Runs one `netdp` command that should succeed and returns what it printed.
    ///
    /// # Errors
    /// With what it said when it fails.
    pub fn netdp<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let output = self.run(arguments)?;
        ensure!(
            output.status.success(),
            "{}: {}: {}",
            title(arguments),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        String::from_utf8(output.stdout).context("read the output of netdp")
    }

    /// Runs one `netdp` command with `--json`.
    ///
    /// # Errors
    /// When it fails or prints anything but JSON.
    pub fn json<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Value> {
        let arguments: Vec<&OsStr> =
            arguments.iter().map(AsRef::as_ref).chain([OsStr::new("--json")]).collect();
        let text = self.netdp(&arguments)?;
        serde_json::from_str(&text)
            .with_context(|| format!("parse the output of {}: {text}", title(&arguments)))
    }

    /// Runs one `netdp` command that should be refused and returns the line that says why.
    ///
    /// # Errors
    /// When it succeeds, exits with another code than 1, or gives no reason in one line.
    pub fn netdp_fails<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let output = self.run(arguments)?;
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        ensure!(
            output.status.code() == Some(EXIT_REFUSED),
            "{}: expected exit code {EXIT_REFUSED}: {}: {reason}",
            title(arguments),
            output.status
        );
        ensure!(
            !reason.is_empty() && !reason.contains('\n'),
            "{}: expected one line that says why: {reason:?}",
            title(arguments)
        );
        Ok(reason)
    }

    /// Sends bytes as the body of an API request; returns status code and answer.
    ///
    /// # Errors
    /// When the socket does not answer in HTTP.
    pub fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<(u16, String)> {
        let title = || format!("{method} {path}");
        let mut stream = UnixStream::connect(self.socket()).with_context(title)?;
        stream.set_read_timeout(Some(patient(API_PATIENCE))).with_context(title)?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: netdp\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).with_context(title)?;
        // A server may well refuse before it has read everything.
        stream.write_all(body).ok();
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if answer.is_empty() => return Err(error).with_context(title),
            _ => {}
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
        Ok((status.with_context(|| format!("{}: read {answer:?}", title()))?, answer))
    }

    /// The end of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        read_tail(&self.log_path()).unwrap_or_else(|error| format!("(no log: {error})"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.fate == Fate::Detached {
            return;
        }
        if let Some(mut child) = locked(&self.child).take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

fn read_tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn title<S: AsRef<OsStr>>(arguments: &[S]) -> String {
    let words: Vec<_> =
        arguments.iter().map(|word| word.as_ref().to_string_lossy().into_owned()).collect();
    format!("netdp {}", words.join(" "))
}

/// `$NETDP_BIN`, else `netdp` in the build directory that this test comes from.
fn find_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("NETDP_BIN") {
        return fs::canonicalize(&path)
            .with_context(|| format!("find NETDP_BIN={}", path.display()));
    }
    let this = std::env::current_exe().context("find this program")?;
    // Tests are in target/<profile>/deps, binaries one level above.
    this.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("netdp"))
        .find(|path| path.is_file())
        .context("find the netdp program: build it with `cargo build -p netdp` or set NETDP_BIN")
}
