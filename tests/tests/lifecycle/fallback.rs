//! Hosts on which eBPF does not work, for one reason or another: the agent takes iptables as a whole,
//! says why, and refuses where it was told to use eBPF.

use std::env;

use anyhow::{Context, Result, ensure};
use netdp_tests::agent::Forbidden;
use netdp_tests::backend::Backend;
use netdp_tests::lab::Lab;
use netdp_tests::net::Family;
use netdp_tests::probe::expect_same;

/// What is wrong with the host, and what the agent has to say of it.
const HOSTS: &[(Option<Forbidden>, &str)] = &[
    // As seccomp profiles of containers, or kernel lockdown.
    (Some(Forbidden::Everything), "BPF is forbidden here"),
    // As a kernel whose verifier refuses what it is given.
    (Some(Forbidden::Loading), "no tc-programs"),
    // As a security module that lets programs be loaded and not used.
    (Some(Forbidden::Attaching), "attach a program"),
];
/// The same where the kernel itself is to blame.
const POOR_KERNEL: &[(Option<Forbidden>, &str)] = &[(None, "attach a program")];
/// Set where it is (`cargo xtask vm --without-ebpf`).
const POOR_KERNEL_VARIABLE: &str = "NETDP_WITHOUT_EBPF";

pub(crate) fn without_ebpf_the_agent_takes_iptables(family: Family) -> Result<()> {
    let net = family.net();
    let is_poor = env::var_os(POOR_KERNEL_VARIABLE).is_some();
    for &(forbidden, reason) in if is_poor { POOR_KERNEL } else { HOSTS } {
        let lab = Lab::builder().family(family).agent_stopped().build()?;
        lab.explain((|| {
            let agent = lab.agent()?;
            if let Some(forbidden) = forbidden {
                agent.forbid(forbidden);
            }
            agent.use_backend(Backend::Ebpf);
            let refusal = agent.start().err().context("start with eBPF: it succeeded")?;
            let said = format!("{refusal:#}");
            ensure!(said.contains(reason), "say {reason:?}: {said}");
            lab.expect_no_netfilter()?;

            agent.use_any_backend();
            agent.start()?;
            let status = lab.json(&["status"])?;
            expect_same("the dataplane", &status["dataplane"], &"iptables".into())?;
            let why = status["dataplane_reason"].as_str().context("read the reason")?;
            ensure!(why.contains(reason), "say {reason:?} in status: {why}");
            ensure!(agent.log_tail().contains(reason), "say {reason:?} in the log");
            let doctor = String::from_utf8(agent.run(&["doctor"])?.stdout)?;
            ensure!(doctor.contains("iptables"), "name the dataplane: {doctor}");

            lab.create_network("net-a", net.subnet_a, &[])?;
            let a1 = lab.attach("net-a", "a1", net.a1, &["8080:80"])?;
            let _server = a1.tcp_server("a1", (net.a1, 80))?;
            let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
            lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
            a1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
            lab.outside().tcp((net.a1, 80)).dropped()?;
            let programs = lab.host().output("bpftool", &["net", "list"])?;
            let programs = String::from_utf8_lossy(&programs.stdout).into_owned();
            ensure!(!programs.contains("nd-1"), "half of each backend: {programs}");
            Ok(())
        })())
        .with_context(|| format!("{forbidden:?}"))?;
    }
    Ok(())
}

pub(crate) fn with_ebpf_the_agent_takes_it(family: Family) -> Result<()> {
    let lab = Lab::builder().family(family).agent_stopped().build()?;
    lab.explain((|| {
        lab.agent()?.use_any_backend();
        lab.agent()?.start()?;
        let status = lab.json(&["status"])?;
        expect_same("the dataplane", &status["dataplane"], &"ebpf".into())?;
        lab.expect_no_netfilter()
    })())
}
