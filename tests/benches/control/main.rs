//! What changes cost: publishing, starting, and the memory that the agent takes.
//!
//! A port counts as published when a connection to it stands: the request's answer comes before.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netdp_tests::backend::{Backend, Variant};
use netdp_tests::bench::{Options, exit_code, obstacle};
use netdp_tests::figures::{self, Figure};
use netdp_tests::lab::Lab;
use netdp_tests::net::IPV4;
use netdp_tests::runtime::isolate;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

const NETWORK: &str = "bench";
const CONTAINER: &str = "a1";
/// What the container listens at.
const PORT: u16 = 80;
/// Ports of the host that are published in numbers, and one by one.
const MANY: (u16, u16) = (1001, 31_000);
const ONE: u16 = 40_000;
/// As many as somebody once waited a minute for (moby#53466).
const SOME: (u16, u16) = (41_000, 41_205);
/// Ports of each endpoint of a large host.
const EACH: usize = 30;
/// A subnet for a large host.
const LARGE_SUBNET: &str = "172.24.0.0/16";
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often, and how large.
struct Plan {
    /// Single ports.
    ones: usize,
    /// Whole ranges, and starts.
    rounds: usize,
    endpoints: usize,
}

const WHOLE: Plan = Plan { ones: 100, rounds: 7, endpoints: 1000 };
const QUICK: Plan = Plan { ones: 5, rounds: 1, endpoints: 20 };

fn main() -> ExitCode {
    exit_code(run())
}

fn run() -> Result<()> {
    let options = Options::read()?;
    let plan = if options.is_quick { QUICK } else { WHOLE };
    isolate()?;
    let mut figures = Vec::new();
    let backends = [Backend::Ebpf, Backend::Iptables(Variant::Nft)];
    if options.wants("publish") {
        for backend in backends {
            match backend.missing_program() {
                Some(program) => eprintln!("without {backend:?}: {program} is not installed"),
                None => figures.extend(publishing(backend, &plan)?),
            }
        }
    }
    if options.wants("start") {
        figures.extend(starting(&plan)?);
    }
    print(&figures);
    match &options.json {
        Some(path) => figures::write(path, &figures),
        None => Ok(()),
    }
}

fn print(figures: &[Figure]) {
    let row = |cells: [&str; 7]| {
        let [metric, system, unit, median, p99, interval, rounds] = cells;
        println!(
            "{metric:<26}{system:<16}{median:>10}{p99:>10}{interval:>18} {unit:<4}{rounds:>7}"
        );
    };
    row(["", "", "", "median", "p99", "95 %", "rounds"]);
    for Figure { metric, system, unit, median, p99, ci95: [low, high], rounds, .. } in figures {
        let interval = format!("{low:.1}–{high:.1}");
        let (median, p99) = (format!("{median:.1}"), format!("{p99:.1}"));
        row([metric, system, unit, &median, &p99, &interval, &rounds.to_string()]);
    }
}

/// Name of what is measured.
fn system(backend: Backend) -> String {
    format!("netdp-{}", backend.name())
}

/// A lab with one container that listens.
fn lab(backend: Backend) -> Result<Lab> {
    let lab = Lab::builder().backend(backend).build()?;
    lab.create_network(NETWORK, IPV4.subnet_a, &[])?;
    lab.attach(NETWORK, CONTAINER, IPV4.a1, &[])?;
    Ok(lab)
}

/// How long ports take to be published: one beside none and beside many, some at once, all at once.
fn publishing(backend: Backend, plan: &Plan) -> Result<Vec<Figure>> {
    let (lab, system) = (lab(backend)?, system(backend));
    let container = lab.namespaces().into_iter().find(|one| one.name().ends_with("-a1"));
    let container = container.context("find the container")?;
    let listener = container.run(|| {
        TcpListener::bind(SocketAddr::new(IPV4.a1, PORT)).context("listen in the container")
    })?;
    thread::spawn(move || {
        // Ends with the process.
        while listener.accept().is_ok() {}
    });
    let one = format!("{ONE}:{PORT}");
    let mut figures = Vec::new();
    let mut measure = |metric: &str, rounds, (count, ports): (u32, &str), dialled| -> Result<()> {
        if let Some(reason) = obstacle(backend, count)? {
            eprintln!("{metric} without {system}: {reason}");
            return Ok(());
        }
        let took = times(rounds, || timed_publish(&lab, ports, dialled))?;
        figures.push(Figure::of(metric, &system, "ms", &took, took.len() as u64));
        Ok(())
    };
    let range = |(first, last): (u16, u16)| format!("{first}-{last}:{first}-{last}");
    measure("publish_one_at_0_p99", plan.ones, (1, &one), ONE)?;
    measure("publish_206", plan.rounds, (206, &range(SOME)), 0)?;
    measure("publish_65535", plan.rounds, (65_535, &range((1, u16::MAX))), PORT)?;
    let many = range(MANY);
    if obstacle(backend, 30_000)?.is_none() {
        change(&lab, "publish", &many)?;
    }
    measure("publish_one_at_30000_p99", plan.ones, (30_000, &one), ONE)?;
    Ok(figures)
}

fn times(rounds: usize, mut one: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    (0..rounds).map(|_| one()).collect()
}

/// Milliseconds from the request until a connection to the port stands (or, to port 0, the answer);
/// then it is taken back.
fn timed_publish(lab: &Lab, ports: &str, dialled: u16) -> Result<f64> {
    let connect = || -> Result<()> {
        let to = SocketAddr::new(IPV4.host, dialled);
        TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connect to {to}"))?;
        Ok(())
    };
    let took = lab.outside().run(|| {
        let begun = Instant::now();
        change(lab, "publish", ports)?;
        if dialled != 0 {
            connect()?;
        }
        Ok(begun.elapsed())
    })?;
    change(lab, "unpublish", ports)?;
    Ok(took.as_secs_f64() * 1e3)
}

fn change(lab: &Lab, verb: &str, ports: &str) -> Result<()> {
    ask(lab, &format!("/v1/{verb}"), &json!({ "name": CONTAINER, "ports": [ports] }))
}

fn ask(lab: &Lab, path: &str, body: &Value) -> Result<()> {
    let (code, answer) = lab.agent()?.request("POST", path, body.to_string().as_bytes())?;
    ensure!((200..300).contains(&code), "POST {path}: {answer}");
    Ok(())
}

/// How long a large host's agent takes to start, with nothing in the kernel and beside what the one
/// before has left; and what memory it has.
fn starting(plan: &Plan) -> Result<Vec<Figure>> {
    let lab = Lab::builder().build()?;
    let agent = lab.agent()?;
    let system = system(Backend::Ebpf);
    let memory = || -> Result<f64> { resident(agent.pid().context("find the agent")?) };
    let single = |metric: &str, unit, value| Figure::of(metric, &system, unit, &[value], 1);
    let mut figures = vec![single("rss_idle", "MB", memory()?)];
    lab.create_network(NETWORK, LARGE_SUBNET, &[])?;
    for number in 0..plan.endpoints {
        attach(&lab, number).with_context(|| format!("endpoint {number}"))?;
    }
    let size = plan.endpoints;
    figures.push(single(&format!("rss_{size}"), "MB", memory()?));
    let request = attachment(&lab, size)?;
    let another = times(plan.rounds, || timed_attach(&lab, &name(size), &request))?;
    let rounds = another.len() as u64;
    figures.push(Figure::of(&format!("connect_one_at_{size}"), &system, "ms", &another, rounds));
    let restart = |prepare: &dyn Fn() -> Result<()>| -> Result<f64> {
        agent.stop()?;
        prepare()?;
        let begun = Instant::now();
        agent.start()?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    let adopted = times(plan.rounds, || restart(&|| Ok(())))?;
    let cold = times(plan.rounds, || restart(&|| forget_pins(&lab)))?;
    for (metric, took) in [("adopt", adopted), ("cold_start", cold)] {
        let n = took.len() as u64;
        figures.push(Figure::of(&format!("{metric}_{size}"), &system, "ms", &took, n));
    }
    Ok(figures)
}

/// One of many containers, with ports of its own.
fn attach(lab: &Lab, number: usize) -> Result<()> {
    ask(lab, &endpoints(), &attachment(lab, number)?)
}

fn endpoints() -> String {
    format!("/v1/networks/{NETWORK}/endpoints")
}

fn name(number: usize) -> String {
    format!("c{number}")
}

/// A container, and the request that connects it.
fn attachment(lab: &Lab, number: usize) -> Result<Value> {
    let name = name(number);
    let container = lab.container(&name)?;
    let address = IpAddr::from([172, 24, 1 + (number / 250) as u8, 1 + (number % 250) as u8]);
    let first = 1001 + number * EACH;
    let ports = format!("{first}-{}:{PORT}-{}", first + EACH - 1, usize::from(PORT) + EACH - 1);
    Ok(json!({
        "netns": container.name(),
        "name": name,
        "addresses": [address.to_string()],
        "publish": [ports],
    }))
}

/// Milliseconds that one more container takes to be connected; it goes again.
fn timed_attach(lab: &Lab, name: &str, request: &Value) -> Result<f64> {
    let begun = Instant::now();
    ask(lab, &endpoints(), request)?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    lab.disconnect(NETWORK, name)?;
    Ok(took)
}

/// As after a start of the host, but for the containers: no map, no program.
fn forget_pins(lab: &Lab) -> Result<()> {
    let bpffs = lab.bpffs();
    umount2(&bpffs, MntFlags::MNT_DETACH).context("unmount the bpffs")?;
    mount(Some("bpffs"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
        .context("mount a bpffs")
}

/// Megabytes that a process has in memory.
fn resident(pid: u32) -> Result<f64> {
    let file = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kilobytes: f64 = kilobytes
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("read {file}: {line:?}"))?;
    Ok(kilobytes * 1024.0 / 1e6)
}
