//! `netdp run`: one line to a service that is published, and nothing left when it ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netdp_tests::harness::Promise;
use netdp_tests::lab::{Lab, SUBNET_A};
use netdp_tests::namespace::Fate;
use netdp_tests::probe::expect_same;
use netdp_tests::runtime::poll_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a command may take to begin or to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the command says before it waits: the tests enter its namespace by that.
const SAY_PID: &str = "echo $$; exec sleep 1d";

pub(super) const TESTS: &[Promise] = &[
    ("run_publishes_a_service_for_as_long_as_it_runs", publishes_a_service),
    ("run_connects_before_the_command_starts", connects_first),
    ("run_ends_as_its_command_does", ends_as_the_command),
    ("run_passes_signals_on", passes_signals_on),
    ("run_killed_takes_its_command_along", killed_takes_the_command_along),
    ("run_gives_the_command_name_servers_of_its_own", gives_name_servers),
];

fn lab() -> Result<Lab> {
    let lab = Lab::builder().build()?;
    lab.create_network("web", SUBNET_A, &[])?;
    Ok(lab)
}

/// `netdp run --network web` with these words.
fn run(lab: &Lab, fate: Fate, words: &[&str]) -> Result<Command> {
    let agent = lab.agent()?;
    let mut command = lab.host().command(agent.program(), fate)?;
    command
        .args(["run", "--network", "web"])
        .args(words)
        .env("NETDP_SOCKET", agent.socket())
        .stdin(Stdio::null());
    Ok(command)
}

fn output(lab: &Lab, words: &[&str]) -> Result<Output> {
    run(lab, Fate::DiesWithParent, words)?.output().context("run netdp")
}

/// A `netdp run` under way, of a command that has said its process id.
struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    command: i32,
}

impl Running {
    fn start(lab: &Lab, fate: Fate, words: &[&str]) -> Result<Self> {
        let mut child = run(lab, fate, words)?.stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("take the command's output")?;
        let mut running = Self { child, stdout: BufReader::new(stdout), command: 0 };
        running.command = running.line()?.parse().context("read the command's process id")?;
        Ok(running)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).context("read what the command says")?;
        Ok(line.trim().to_owned())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("name the process")?;
        kill(Pid::from_raw(pid), signal).context("send a signal")
    }

    /// Waits for the end of `netdp run` and returns its exit code.
    fn exit_code(&mut self) -> Result<Option<i32>> {
        let child = &mut self.child;
        let status = poll_until(PATIENCE, "the end of netdp run", || Ok(child.try_wait()?))?;
        Ok(status.code())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// How many endpoints the network has.
fn endpoints(lab: &Lab) -> Result<usize> {
    let networks = lab.json(&["network", "inspect", "web"])?;
    Ok(networks[0]["endpoints"].as_array().context("read the endpoints")?.len())
}

fn publishes_a_service() -> Result<()> {
    let lab = lab()?;
    lab.explain((|| {
        let words = ["--name", "web1", "--ip", "172.20.0.9", "--mac", "02:42:ac:14:00:77"];
        let command = ["-p", "8080:80", "--", "sh", "-c", SAY_PID];
        let mut running =
            Running::start(&lab, Fate::DiesWithParent, &[&words[..], &command].concat())?;
        let container = lab.container("web1")?;
        container.become_another(Path::new(&format!("/proc/{}/ns/net", running.command)))?;
        expect_same("the MAC", &container.mac("eth0")?, &[0x02, 0x42, 0xac, 0x14, 0, 0x77])?;
        let server = container.tcp_server("web1", "172.20.0.9:80")?;
        let seen = lab.outside().tcp("10.0.0.2:8080").exchange()?;
        seen.by("web1")?.saw_client_at("10.0.0.3")?;
        drop(server);

        running.signal(Signal::SIGTERM)?;
        expect_same("the exit code", &running.exit_code()?, &Some(143))?;
        expect_same("endpoints", &endpoints(&lab)?, &0)?;
        lab.outside().tcp("10.0.0.2:8080").refused()?;
        lab.expect_no_netfilter()
    })())
}

fn connects_first() -> Result<()> {
    let lab = lab()?;
    lab.explain((|| {
        let said = output(&lab, &["ip", "-4", "-oneline", "address", "show", "dev", "eth0"])?;
        let text = String::from_utf8_lossy(&said.stdout);
        ensure!(text.contains("172.20.0.2/24"), "the command saw: {text}");
        expect_same("endpoints", &endpoints(&lab)?, &0)?;
        // What can't be connected is not started.
        let file = lab.directory().join("started");
        let refused = output(&lab, &["--ip", "192.0.2.1", "touch", &file.display().to_string()])?;
        expect_same("the exit code", &refused.status.code(), &Some(125))?;
        ensure!(!file.exists(), "the command ran without a network");
        Ok(())
    })())
}

fn ends_as_the_command() -> Result<()> {
    let lab = lab()?;
    lab.explain((|| {
        let cases: [(&[&str], i32); 7] = [
            (&["true"], 0),
            (&["sh", "-c", "exit 7"], 7),
            (&["sh", "-c", "kill -KILL $$"], 137),
            (&["no-such-command"], 127),
            (&["/etc/passwd"], 126),
            (&["-p", "none", "true"], 125),
            (&["--no-such-flag", "true"], 2),
        ];
        for (words, code) in cases {
            let said = output(&lab, words)?;
            let what = format!("the exit code of {words:?}");
            expect_same(&what, &said.status.code(), &Some(code))?;
            let stderr = String::from_utf8_lossy(&said.stderr);
            let lines = usize::from((125..=127).contains(&code));
            ensure!(code == 2 || stderr.lines().count() == lines, "{words:?} said: {stderr}");
            expect_same("endpoints", &endpoints(&lab)?, &0)?;
        }
        lab.agent()?.stop()?;
        let said = output(&lab, &["true"])?;
        expect_same("the exit code without an agent", &said.status.code(), &Some(125))
    })())
}

fn passes_signals_on() -> Result<()> {
    let lab = lab()?;
    lab.explain((|| {
        // A shell acts on a signal between two commands.
        let command = "trap 'echo told; exit 3' INT TERM; echo $$; while :; do sleep 0.05; done";
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            // Without a terminal of its own, whose Ctrl-C the command would get by itself.
            let mut running = Running::start(&lab, Fate::Detached, &["sh", "-c", command])?;
            running.signal(signal)?;
            expect_same("what the command says", &running.line()?.as_str(), &"told")?;
            expect_same("the exit code", &running.exit_code()?, &Some(3))?;
            expect_same("endpoints", &endpoints(&lab)?, &0)?;
        }
        Ok(())
    })())
}

fn killed_takes_the_command_along() -> Result<()> {
    let lab = lab()?;
    lab.explain((|| {
        let words = ["-p", "8080:80", "sh", "-c", SAY_PID];
        let mut running = Running::start(&lab, Fate::DiesWithParent, &words)?;
        running.signal(Signal::SIGKILL)?;
        running.exit_code()?;
        let process = format!("/proc/{}/ns/net", running.command);
        poll_until(PATIENCE, "the end of the command", || {
            // A process that nobody has waited for yet has no namespaces any more.
            Ok(std::fs::metadata(&process).is_err().then_some(()))
        })?;
        poll_until(PATIENCE, "the release of the endpoint", || {
            Ok((endpoints(&lab)? == 0).then_some(()))
        })?;
        lab.outside().tcp("10.0.0.2:8080").refused()
    })())
}

fn gives_name_servers() -> Result<()> {
    let lab = lab()?;
    lab.explain((|| {
        let before = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let said = output(&lab, &["--dns", "192.0.2.53", "cat", "/etc/resolv.conf"])?;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        ensure!(text.starts_with("nameserver 192.0.2.53\n"), "the command saw: {text}");
        let after = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        expect_same("the host's resolv.conf", &after, &before)
    })())
}
