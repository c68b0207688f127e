//! What a failure needs to be understood from its output alone.
//!
//! Looks, never changes; whatever can't be looked at is said and skipped.

use std::fmt::Write;
use std::process::{Command, Output};

use anyhow::Result;

use crate::lab::Lab;
use crate::runtime::is_installed;

/// Describes the lab's namespaces, the host's rules, BPF objects, and the agent.
#[must_use]
pub fn report(lab: &Lab) -> String {
    let mut text = String::new();
    for namespace in lab.namespaces() {
        for question in ["-br link", "-br address", "route show table all", "rule", "neighbour"] {
            let mut command = Command::new("ip");
            command.args(["-n", namespace.name()]).args(question.split(' '));
            section(&mut text, &format!("{}: ip {question}", namespace.name()), command.output());
        }
    }
    section(&mut text, "host: nft list ruleset", lab.host().output("nft", &["list", "ruleset"]));
    for family in ["iptables", "ip6tables"] {
        let program = format!("{family}-legacy-save");
        let output = lab.host().output(&program, &["--counters"]);
        section(&mut text, &format!("host: {program}"), output);
    }
    if is_installed("bpftool") {
        for question in [["prog", "list"], ["map", "list"], ["link", "list"], ["net", "list"]] {
            let output = lab.host().output("bpftool", &question);
            section(&mut text, &format!("host: bpftool {}", question.join(" ")), output);
        }
    }
    if let Ok(agent) = lab.agent() {
        for question in [&["status"][..], &["flows"], &["network", "ls"]] {
            section(&mut text, &format!("netdp {}", question.join(" ")), agent.run(question));
        }
        section_text(&mut text, "agent's log", &agent.log_tail());
    }
    if let Some(docker) = lab.docker() {
        for question in ["ps --all --no-trunc", "network ls"] {
            let words: Vec<_> = question.split(' ').collect();
            section(&mut text, &format!("docker {question}"), docker.output(&words));
        }
        section_text(&mut text, "Docker's log", &docker.log_tail());
    }
    text
}

fn section<E: std::fmt::Display>(text: &mut String, title: &str, output: Result<Output, E>) {
    match output {
        Ok(output) => {
            let all = [output.stdout, output.stderr].concat();
            section_text(text, title, &String::from_utf8_lossy(&all));
        }
        Err(error) => section_text(text, title, &format!("({error:#})")),
    }
}

fn section_text(text: &mut String, title: &str, body: &str) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "---- {title}\n{}", body.trim_end());
}
