//! The command line: verbs, their flags, and what they print.
//!
//! Owns words for people. What verbs do is asked of the agent over its socket; nothing is decided
//! here.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::{
    api::client::{Client, wait_for},
    config::{Config, Paths},
};

mod agent;
mod doctor;
mod endpoint;
mod generate;
mod network;
mod observe;
mod policy;
mod publish;
mod purge;
mod room;
mod run;
mod table;

/// Container networks without iptables in the packet path.
#[derive(Debug, Parser)]
#[command(name = "netdp", version, arg_required_else_help = true)]
struct Cli {
    /// Socket of the agent [default: /run/netdp/netdp.sock]
    #[arg(long, global = true, env = "NETDP_SOCKET", hide_env_values = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent: build networks and keep them as they should be
    Agent(Box<Config>),
    /// Make, show and remove networks
    #[command(subcommand)]
    Network(Box<network::Verb>),
    /// Attach a container's network namespace to a network
    Connect(endpoint::Connect),
    /// Detach an endpoint from a network
    Disconnect(endpoint::Disconnect),
    /// Run a command in a network, for as long as it runs
    Run(run::Run),
    /// Become a command that ends with the process that started it
    #[command(hide = true)]
    Become(run::Become),
    /// Publish ports of an endpoint on the host
    Publish(publish::Publish),
    /// Take published ports back
    Unpublish(publish::Unpublish),
    /// Set who may open connections into a network
    #[command(subcommand)]
    Policy(policy::Verb),
    /// List tracked connections
    Flows(observe::Flows),
    /// Show how the agent is, and what was counted
    Status(observe::Status),
    /// Check the host, and what the agent finds wrong
    Doctor(doctor::Doctor),
    /// Remove everything of netdp from this host and stop the agent
    Purge(purge::Purge),
    /// Write shell completions to standard output
    Completions(generate::Completions),
    /// Write manual pages into a directory
    #[command(hide = true)]
    Man(generate::Man),
}

/// Runs the command line that this process was given. 0: done, 1: refused or failed, with one
/// line on standard error, 2: not understood. `netdp run` ends as its command does, and with 125
/// where it was not the command that failed.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let failed = match cli.verb {
        Verb::Run(_) | Verb::Become(_) => run::FAILED,
        _ => 1,
    };
    match execute(cli) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            failed.into()
        }
    }
}

/// Says what went wrong in one line, whatever an error from below brought along.
fn complain(error: &anyhow::Error) {
    let line = format!("{error:#}").split('\n').map(str::trim).collect::<Vec<_>>().join(" ");
    eprintln!("netdp: {line}");
}

fn execute(cli: Cli) -> Result<ExitCode> {
    let socket = |paths: &Paths| cli.socket.clone().unwrap_or_else(|| paths.socket());
    let client = || Client::new(&socket(&Paths::default()));
    let done = match cli.verb {
        Verb::Run(verb) => return wait_for(verb.run(&client())),
        Verb::Become(verb) => return verb.run(),
        Verb::Agent(config) => agent::run(&config, &socket(&config.paths)),
        Verb::Network(verb) => wait_for(verb.run(&client())),
        Verb::Connect(verb) => wait_for(verb.run(&client())),
        Verb::Disconnect(verb) => wait_for(verb.run(&client())),
        Verb::Publish(verb) => wait_for(verb.run(&client())),
        Verb::Unpublish(verb) => wait_for(verb.run(&client())),
        Verb::Policy(verb) => wait_for(verb.run(&client())),
        Verb::Flows(verb) => wait_for(verb.run(&client())),
        Verb::Status(verb) => wait_for(verb.run(&client())),
        Verb::Doctor(verb) => wait_for(verb.run(&Client::new(&socket(verb.paths())))),
        Verb::Purge(verb) => {
            let socket = socket(verb.paths());
            wait_for(verb.run(&Client::new(&socket), &socket))
        }
        Verb::Completions(verb) => verb.run(),
        Verb::Man(verb) => verb.run(),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Writes to standard output.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

fn print_json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).context("encode JSON")?;
    text.push('\n');
    print(&text)
}

/// `netdp flows | head`: whoever reads has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_command_contract_is_understood() {
        for line in [
            "agent --dataplane auto --uplink eth0 --uplink tun0 --state-dir D --run-dir D \
             --bpffs D --cgroup D --flows 1024 --docker-socket off",
            "network create a --subnet 172.20.0.0/24 --gateway 172.20.0.1 --ip-range 172.20.0.0/25 \
             --internal --icc false --mtu 1400 --masquerade=false --gateway-mode routed \
             --host-binding 127.0.0.1 --snat-ip 10.0.0.4 --opt com.docker.network.driver.mtu=1400 \
             --json",
            "network ls --json",
            "network inspect a b --json",
            "network rm a b",
            "connect a web --name A1 --ip 172.20.0.2 --mac 02:42:ac:14:00:02 --interface eth0 \
             -p 8080:80 -p 53:53/udp --json",
            "disconnect a A1",
            "run --network a --name A1 --ip 172.20.0.2 --mac 02:42:ac:14:00:02 -p 8080:80 \
             --dns 192.0.2.1 ls -l /tmp",
            "run --network a -- ls",
            "publish A1 -p 8080:80 -p 80 --network a --json",
            "unpublish A1 -p 8080:80",
            "policy set a rules.txt",
            "policy show a --json",
            "policy add a 'allow_from_any'",
            "policy rm a 1",
            "flows --network a --json",
            "status --json",
            "doctor --json",
            "purge",
            "completions bash",
            "man D",
            "--socket /tmp/s status",
            "status --socket /tmp/s",
        ] {
            let words = ["netdp"].into_iter().chain(line.split_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
        for line in [
            "",
            "network",
            "network create",
            "publish A1",
            "connect a",
            "policy add a",
            "run ls",
            "run --network a",
        ] {
            let words = ["netdp"].into_iter().chain(line.split_whitespace());
            let error = Cli::try_parse_from(words).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
