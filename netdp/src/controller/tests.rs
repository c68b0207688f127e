//! The controller against a real kernel, in network namespaces of its own, with the fake backend.
//! Skipped, saying so, where namespaces can't be made.

use std::{
    collections::BTreeMap,
    fs, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Instant,
};

use clap::{Args, FromArgMatches};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};
use tempfile::TempDir;
use tokio::{runtime, time::sleep};

use super::*;
use crate::{
    dataplane::fake::Fake,
    facts::Ipv6Mode,
    model::{ConnectSpec, NetworkSpec, RefusalKind},
    netlink::{namespace::survey, sysctl},
    plan::{RESERVED_PORTS_SYSCTL, force_forwarding_sysctl},
};

mod engine;

/// A network namespace and the thread that lives in it and runs what it is told to.
struct Namespace {
    path: PathBuf,
    jobs: Option<mpsc::Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    fn new() -> nix::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            ready.send(unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid())).unwrap();
            queue.into_iter().for_each(|job| job());
        });
        let tid = is_ready.recv().unwrap()?;
        let path = format!("/proc/{}/task/{tid}/ns/net", std::process::id()).into();
        Ok(Self { path, jobs: Some(jobs), thread: Some(thread) })
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || done.send(job()).unwrap());
        self.jobs.as_ref().unwrap().send(job).unwrap();
        result.recv().expect("the job panicked, see above")
    }

    /// A UDP server that answers packets with the address it saw, until none has come for a moment: an
    /// answer may be lost where the kernel is not done with an address that was put back.
    fn serve(&self, port: u16) {
        let bind = move || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).ok();
        let server = self.run(move || poll_for(Duration::from_secs(5), bind)).expect("a port");
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, client)) = server.recv_from(&mut buffer) {
                let seen = client.ip().to_canonical().to_string();
                server.send_to(seen.as_bytes(), client).unwrap();
                server.set_read_timeout(Some(Duration::from_millis(600))).unwrap();
            }
        });
    }

    /// What the server saw, `None` where nothing came back.
    fn ask(&self, address: impl Into<IpAddr>, port: u16) -> Option<String> {
        let address = address.into();
        self.run(move || ask(address, port))
    }
}

fn ask(address: impl Into<IpAddr>, port: u16) -> Option<String> {
    let address = address.into();
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let client = UdpSocket::bind((any, 0)).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut buffer = [0; 64];
    poll_for(Duration::from_secs(10), || {
        client.send_to(b"who am I?", (address, port)).ok()?;
        let length = client.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    })
}

/// Looks until there is something, or for so long.
fn poll_for<T>(patience: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        let found = look();
        if found.is_some() || Instant::now() > deadline {
            return found;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // It panicked if a job did, which the test has noticed already.
            let _panicked = thread.join();
        }
    }
}

/// Runs a test in a host of its own, with one uplink `up0`, 10.0.0.2/24.
fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce(Host) -> F + Send + 'static) {
    on_a_bare_host(|host| new_runtime().block_on(test(host)));
}

fn new_runtime() -> runtime::Runtime {
    runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// As [`on_a_host`], for tests that start and stop runtimes themselves.
fn on_a_bare_host(test: impl FnOnce(Host) + Send + 'static) {
    let host = match Namespace::new() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("skipped: network namespaces need root ({error})");
            return;
        }
    };
    host.run(|| {
        // Or the uplinks' addresses go on changing from tentative to valid for a while.
        fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
        ip("link set lo up");
        ip("link add up0 type veth peer name out0");
        ip("addr add 10.0.0.2/24 dev up0");
        ip("link set up0 up");
        ip("link set out0 up");
        // The kernel settles the state of a new link in the background.
        while ip("link").matches("state UP").count() < 2 {
            thread::yield_now();
        }
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        fs::write("/proc/sys/net/ipv4/ip_local_reserved_ports", RESERVED_BEFORE).unwrap();
        let state = TempDir::new().unwrap();
        test(Host { state, dataplane: Fake::default() });
    });
}

/// What the host has reserved before us: more than a reader of files asks for at first.
const RESERVED_BEFORE: &str = "7000,7100-7109,7200-7209,7300-7309,7400-7409,55000-55010";

struct Host {
    state: TempDir,
    dataplane: Fake,
}

impl Host {
    async fn start(&self, flags: &[&str]) -> Result<Controller> {
        let deadline = Instant::now() + Duration::from_secs(4);
        let store = loop {
            match Store::open(self.state.path()) {
                Ok(store) => break store,
                // Tasks of the one before may hold the store for a moment yet.
                Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(1)).await,
                Err(error) => return Err(error),
            }
        };
        let command = Config::augment_args(clap::Command::new("agent").no_binary_name(true));
        let config = Config::from_arg_matches(&command.get_matches_from(flags)).unwrap();
        Controller::open(&config, store, Box::new(self.dataplane.clone())).await
    }

    fn program(&self) -> Program {
        self.dataplane.applied().pop().unwrap()
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The host as it is once the kernel has done what it does by and by: it looks for duplicates of an
/// address, and makes the routes to it, some time after it was given.
fn settled() -> BTreeMap<String, String> {
    let mut last = dump();
    let settled = poll_for(Duration::from_secs(5), || {
        let before = mem::replace(&mut last, dump());
        let is_tentative = last.values().any(|text| text.contains("tentative"));
        (before == last && !is_tentative).then_some(before)
    });
    settled.unwrap_or(last)
}

/// Everything of the host that netdp could have left a trace in.
fn dump() -> BTreeMap<String, String> {
    let mut dump: BTreeMap<String, String> = [
        "-d -j link",
        "-j addr",
        "-j route show table all",
        "-j rule",
        "-j neigh show nud permanent",
    ]
    .map(|arguments| {
        let output = ip(arguments);
        let fields = output.split(',').filter(|field| !field.contains("_timer\""));
        (format!("ip {arguments}"), fields.collect::<Vec<_>>().join(",\n"))
    })
    .into();
    let mut directories = vec![PathBuf::from("/proc/sys/net")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            } else if let Ok(value) = fs::read_to_string(entry.path()) {
                dump.insert(entry.path().display().to_string(), value);
            }
        }
    }
    // Counts what goes on, on the whole machine.
    dump.retain(|name, _| !name.contains("/nf_conntrack_count"));
    dump
}

fn assert_same(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) {
    let names = before.keys().chain(after.keys());
    for name in names.collect::<BTreeSet<_>>() {
        let [left, right] = [before, after].map(|dump| dump.get(name).map_or("", String::as_str));
        let gone: Vec<_> = left.lines().filter(|line| !right.contains(line)).collect();
        let new: Vec<_> = right.lines().filter(|line| !left.contains(line)).collect();
        assert!(left == right, "{name}: gone {gone:?}, new {new:?}\n{left}\n{right}");
    }
}

async fn create(controller: &Controller, name: &str, subnet: &str) {
    let spec = NetworkSpec {
        name: name.into(),
        subnets: vec![subnet.parse().unwrap()],
        ..NetworkSpec::default()
    };
    controller.change(|model, facts| model.create_network(spec.clone(), facts)).await.unwrap();
}

async fn connect(
    controller: &Controller,
    network: &str,
    name: &str,
    netns: &Path,
) -> Result<Ipv4Addr, ChangeError> {
    let inside = survey(netns).await?;
    let mut spec = connect_spec(network, name, netns);
    spec.netns_identity = inside.identity;
    spec.netns_interfaces = inside.interfaces;
    publish_and_connect(controller, spec).await
}

fn connect_spec(network: &str, name: &str, netns: &Path) -> ConnectSpec {
    ConnectSpec {
        network: network.into(),
        netns: netns.into(),
        netns_identity: crate::model::NetnsIdentity { device: 0, inode: 0 },
        netns_interfaces: BTreeSet::new(),
        name: Some(name.into()),
        addresses: Vec::new(),
        mac: None,
        interface: None,
        publish: Vec::new(),
    }
}

async fn publish_and_connect(
    controller: &Controller,
    spec: ConnectSpec,
) -> Result<Ipv4Addr, ChangeError> {
    let id = controller.change(|model, facts| model.connect(spec.clone(), facts)).await?;
    let endpoint = &controller.model().await.endpoints[&id];
    Ok(endpoint.ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED))
}

/// Waits for what an event brings about.
async fn eventually(what: &str, is_so: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + TICK + Duration::from_secs(2);
    while !is_so().await {
        assert!(Instant::now() < deadline, "in vain: {what}\n{}", ip("-d addr"));
        sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn networks_carry_traffic_and_purge_leaves_the_host_byte_for_byte_as_it_was() {
    on_a_host(async |host| {
        let before = settled();
        let controller = host.start(&[]).await.unwrap();
        assert_same(&before, &dump());

        let [a1, a2, b1] = [(); 3].map(|()| Namespace::new().unwrap());
        create(&controller, "a", "172.20.0.0/24").await;
        create(&controller, "b", "172.21.0.0/24").await;
        let a1_address = connect(&controller, "a", "A1", &a1.path).await.unwrap();
        let a2_address = connect(&controller, "a", "A2", &a2.path).await.unwrap();
        connect(&controller, "b", "B1", &b1.path).await.unwrap();
        assert_eq!(controller.check().await.unwrap(), []);

        a1.serve(7);
        assert_eq!(a2.ask(a1_address, 7), Some(a2_address.to_string()));
        a1.serve(8);
        assert_eq!(ask(a1_address, 8).as_deref(), Some("172.20.0.1"));
        // The fake enforces nothing: forwarding between bridges is up to the sysctls alone.
        a1.serve(9);
        assert_eq!(b1.ask(a1_address, 9).as_deref(), Some("172.21.0.2"));

        let program = host.program();
        assert_eq!((program.networks.len(), program.endpoints.len()), (2, 3));
        assert!(!program.uplinks.values().any(|uplink| uplink.forwarded_before4));
        assert_eq!(program.uplinks.len(), 2);
        let reserved = sysctl::read(RESERVED_PORTS_SYSCTL).unwrap().unwrap();
        assert_eq!(reserved, RESERVED_BEFORE.replace("55000-55010", "50000-60999"));
        assert_eq!(host.dataplane.forgotten_ports(), 1, "who had one before may have it still");
        let neighbours = ip("neigh show dev nd-1 nud permanent");
        assert!(neighbours.contains("172.20.0.3 lladdr 02:42:ac:14:00:03"), "{neighbours}");
        let inside = a1.run(|| ip("addr") + &ip("route"));
        assert!(inside.contains("inet 172.20.0.2/24 brd 172.20.0.255"), "{inside}");
        assert!(inside.contains("default via 172.20.0.1 dev eth0"), "{inside}");
        assert!(!inside.contains("inet6 fe80"), "{inside}");

        controller.change(|model, _| model.disconnect("a", "A2")).await.unwrap();
        assert!(!a2.run(|| ip("link")).contains("eth0"));
        assert!(!ip("neigh show dev nd-1 nud permanent").contains("172.20.0.3"));
        assert_eq!(host.program().endpoints.len(), 2);
        controller.change(|model, _| model.disconnect("b", "B1")).await.unwrap();
        controller.change(|model, _| model.remove_network("b")).await.unwrap();
        assert!(!ip("link").contains("nd-2"));

        controller.purge().await.unwrap();
        assert_same(&before, &dump());
        assert_eq!(*controller.model().await, Model::default());
        assert_eq!(host.dataplane.purges(), 1);
    });
}

#[test]
fn the_first_packets_of_a_container_that_was_connected_arrive() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        let patience = Some(Duration::from_secs(1));
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.set_read_timeout(patience).unwrap();
        // The kernel is often ready before anybody could ask.
        for round in 0..30 {
            let container = Namespace::new().unwrap();
            let server = container.run(|| UdpSocket::bind("0.0.0.0:7").unwrap());
            server.set_read_timeout(patience).unwrap();
            let address = connect(&controller, "a", "A1", &container.path).await.unwrap();
            client.send_to(b"there?", (address, 7)).unwrap();
            let (_, peer) = server.recv_from(&mut [0; 6]).unwrap_or_else(|error| {
                panic!("round {round}, to the container: {error}\n{}", ip("link"))
            });
            server.send_to(b"here!!", peer).unwrap();
            client.recv(&mut [0; 6]).unwrap_or_else(|error| {
                panic!("round {round}, from the container: {error}\n{}", ip("link"))
            });
            controller.change(|model, _| model.disconnect("a", "A1")).await.unwrap();
        }
    });
}

/// Makes a network of both families.
async fn create_dual(controller: &Controller, name: &str, ipv4: &str, ipv6: &str) {
    let spec = NetworkSpec {
        name: name.into(),
        subnets: vec![ipv4.parse().unwrap(), ipv6.parse().unwrap()],
        ..NetworkSpec::default()
    };
    controller.change(|model, facts| model.create_network(spec.clone(), facts)).await.unwrap();
}

#[test]
fn ipv6_networks_carry_traffic_and_purge_leaves_no_trace_either() {
    on_a_host(async |host| {
        // Nothing of what a host has by default may be relied on.
        for (name, value) in [("disable_ipv6", "1"), ("accept_ra", "2"), ("addr_gen_mode", "1")] {
            fs::write(format!("/proc/sys/net/ipv6/conf/default/{name}"), value).unwrap();
        }
        ip("addr add 2001:db8::2/64 dev up0 nodad");
        let before = settled();
        let controller = host.start(&[]).await.unwrap();
        let [a1, a2, s1] = [(); 3].map(|()| Namespace::new().unwrap());
        create_dual(&controller, "a", "172.20.0.0/24", "fd00:20::/64").await;
        let spec = NetworkSpec {
            name: "s".into(),
            enable_ipv4: Some(false),
            subnets: vec!["fd00:21::/64".parse().unwrap()],
            ..NetworkSpec::default()
        };
        controller.change(|model, facts| model.create_network(spec.clone(), facts)).await.unwrap();
        connect(&controller, "a", "A1", &a1.path).await.unwrap();
        connect(&controller, "a", "A2", &a2.path).await.unwrap();
        connect(&controller, "s", "S1", &s1.path).await.unwrap();
        assert_eq!(controller.check().await.unwrap(), []);

        // The kernel tells with each link what else is in a file of its own.
        let facts = controller.facts().await;
        let seen = |name| facts.link(name).map(|(_, link)| (link.ipv6, link.forces_forwarding));
        let forces = sysctl::read(&force_forwarding_sysctl("nd-1")).unwrap();
        assert_eq!(seen("nd-1"), Some((Ipv6Mode::Quiet, forces.as_deref() == Some("1"))));
        assert_eq!(seen("ndv1"), Some((Ipv6Mode::Off, false)));

        let a1_address: Ipv6Addr = "fd00:20::2".parse().unwrap();
        a1.serve(7);
        assert_eq!(a2.ask(a1_address, 7).as_deref(), Some("fd00:20::3"));
        a1.serve(8);
        assert_eq!(ask(a1_address, 8).as_deref(), Some("fd00:20::1"));
        // The fake enforces nothing: forwarding between bridges is up to the sysctls alone.
        a1.serve(9);
        assert_eq!(s1.ask(a1_address, 9).as_deref(), Some("fd00:21::2"));

        let inside = a1.run(|| ip("addr show eth0") + &ip("-6 route"));
        assert!(inside.contains("inet6 fd00:20::2/64 scope global"), "{inside}");
        assert!(inside.contains("inet6 fe80::42:acff:fe14:2/64 scope link"), "{inside}");
        assert!(!inside.contains("tentative"), "{inside}");
        assert!(inside.contains("default via fd00:20::1 dev eth0"), "{inside}");
        let inside = s1.run(|| ip("addr show eth0") + &ip("route"));
        assert!(!inside.contains("inet 1") && inside.contains("inet6 fd00:21::2/64"), "{inside}");
        let neighbours = ip("-6 neigh show dev nd-1 nud permanent");
        assert!(neighbours.contains("fd00:20::3 lladdr 02:42:ac:14:00:03"), "{neighbours}");
        let program = host.program();
        let up0: Ipv6Addr = "2001:db8::2".parse().unwrap();
        let seen: Vec<_> = program.uplinks.values().filter_map(|up| up.masquerade6).collect();
        assert_eq!(seen, [up0]);
        assert!(!program.uplinks.values().any(|uplink| uplink.forwarded_before6));
        assert!(program.local.contains(&IpAddr::V6(up0)));

        controller.purge().await.unwrap();
        assert_same(&before, &dump());
    });
}

#[test]
fn a_kernel_that_forwards_by_router_gets_its_switches_back() {
    on_a_host(async |host| {
        let read = |path: &str| fs::read_to_string(Path::new("/proc/sys").join(path)).unwrap();
        // One interface that says something else than all of them.
        fs::write("/proc/sys/net/ipv6/conf/out0/forwarding", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/out0/accept_ra", "0").unwrap();
        let before = settled();
        let controller = host.start(&[]).await.unwrap();
        let mut model = Model::default();
        let spec =
            NetworkSpec { name: "a".into(), enable_ipv6: Some(true), ..NetworkSpec::default() };
        let facts = HostFacts { can_force_forwarding: false, ..controller.facts().await };
        model.create_network(spec, &facts).unwrap();
        let wanted = plan(&model, &facts, &Setting::default()).sysctls;

        let mut state = controller.lock().await;
        for _ in 0..2 {
            // Twice: what is remembered must not be what we wrote.
            let results = state.ensure_sysctls(&wanted).await;
            results.into_iter().collect::<Result<Vec<()>>>().unwrap();
            let results = state.give_back_sysctls(&wanted).await;
            results.into_iter().collect::<Result<Vec<()>>>().unwrap();
            assert_eq!(read("net/ipv6/conf/all/forwarding"), "1\n");
            assert_eq!(read("net/ipv6/conf/up0/accept_ra"), "2\n", "the host's own routes stay");
            assert_eq!(read("net/ipv6/conf/out0/accept_ra"), "0\n", "switched off it stays");
        }
        let results = state.give_back_sysctls(&BTreeMap::new()).await;
        results.into_iter().collect::<Result<Vec<()>>>().unwrap();
        assert_same(&before, &dump());
        assert_eq!(state.setting.originals, BTreeMap::new());
    });
}

#[test]
fn removing_the_last_network_gives_the_sysctls_back() {
    on_a_host(async |host| {
        let before = settled();
        let controller = host.start(&[]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        controller.change(|model, _| model.remove_network("a")).await.unwrap();
        assert_same(&before, &dump());
    });
}

#[test]
fn a_change_that_fails_half_way_leaves_everything_as_it_was() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        let [a1, a2] = [(); 2].map(|()| Namespace::new().unwrap());
        connect(&controller, "a", "A1", &a1.path).await.unwrap();
        a2.run(|| ip("link add taken type bridge"));
        let model = controller.model().await;
        let dump_before = settled();
        let inside = [a1.run(dump), a2.run(dump)];
        let check = async |what: &str, a2: &Namespace| {
            eprintln!("{what}");
            assert_same(&dump_before, &dump());
            // The loopback stays up, as in any container.
            let loopback_aside = |dump: BTreeMap<String, String>| -> Vec<_> {
                dump.into_iter().filter(|(name, _)| name.contains("/eth0/")).collect()
            };
            assert_eq!(loopback_aside(a2.run(dump)), loopback_aside(inside[1].clone()));
            assert_same(&inside[0], &a1.run(dump));
            assert_eq!(controller.model().await, model);
            assert_eq!(controller.check().await.unwrap(), []);
        };

        host.dataplane.fail_next(1);
        let error = connect(&controller, "a", "A2", &a2.path).await.unwrap_err().to_string();
        let expected =
            "apply the program to the dataplane: apply failed because the test wanted it";
        assert_eq!(error, expected);
        check("connect", &a2).await;

        host.dataplane.fail_next(1);
        controller.change(|model, _| model.disconnect("a", "A1")).await.unwrap_err();
        check("disconnect", &a2).await;

        // Going back fails as well: what was shut opens again at the next attempt.
        host.dataplane.fail_next(2);
        let error = connect(&controller, "a", "A2", &a2.path).await.unwrap_err().to_string();
        assert!(error.starts_with("undo the change: apply the program"), "{error}");
        assert_eq!(controller.snapshot().troubles.len(), 1);
        check("connect, and go back", &a2).await;
        eventually("no trouble any more", async || controller.snapshot().troubles.is_empty()).await;

        let file = host.state.path().join("not-a-namespace");
        fs::write(&file, "").unwrap();
        let spec = connect_spec("a", "A2", &file);
        let error = publish_and_connect(&controller, spec).await.unwrap_err().to_string();
        assert!(error.contains("is not a network namespace"), "{error}");
        check("not a namespace", &a2).await;

        let mut spec = connect_spec("a", "A2", &a2.path);
        spec.netns_identity = survey(&a2.path).await.unwrap().identity;
        spec.interface = Some("taken".into());
        let error = publish_and_connect(&controller, spec).await.unwrap_err().to_string();
        assert!(error.contains("File exists"), "{error}");
        check("a taken interface name", &a2).await;
    });
}

#[test]
fn a_port_that_another_program_has_is_refused_by_its_name() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        let a1 = Namespace::new().unwrap();
        let squatter = std::net::TcpListener::bind("10.0.0.2:8080").unwrap();
        let connect = async || {
            let inside = survey(&a1.path).await.unwrap();
            let mut spec = connect_spec("a", "A1", &a1.path);
            spec.netns_identity = inside.identity;
            spec.publish = vec!["8080:80".parse().unwrap()];
            publish_and_connect(&controller, spec).await
        };
        let before = settled();
        let Err(ChangeError::Refused(refusal)) = connect().await else { panic!("not refused") };
        assert_eq!(refusal.kind, RefusalKind::Conflict);
        assert!(refusal.message.starts_with("tcp 0.0.0.0:8080 is in use by "), "{refusal}");
        assert_same(&before, &dump());
        drop(squatter);

        // Other tests fork, and a child has a copy of our sockets until it is `ip`.
        eventually("the squatter's port", async || connect().await.is_ok()).await;
        assert_eq!(host.program().published.len(), 1);
        std::net::TcpListener::bind("10.0.0.2:8080").unwrap_err();
        controller.change(|model, _| model.disconnect("a", "A1")).await.unwrap();
        eventually("our port", async || std::net::TcpListener::bind("10.0.0.2:8080").is_ok()).await;
    });
}

#[test]
fn a_start_after_a_kill_repairs_what_is_missing_and_sweeps_what_nothing_names() {
    on_a_host(async |host| {
        let before = settled();
        let [a1, a2, gone] = [(); 3].map(|()| Namespace::new().unwrap());
        let controller = host.start(&[]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        create(&controller, "b", "172.21.0.0/24").await;
        let a1_address = connect(&controller, "a", "A1", &a1.path).await.unwrap();
        connect(&controller, "a", "A2", &a2.path).await.unwrap();
        connect(&controller, "b", "gone", &gone.path).await.unwrap();
        let program = host.program();
        drop(controller);

        ip("link del nd-1");
        ip("link del ndv2");
        drop(gone);
        // A link whose change was never stored, and one that never got its alias (group "nd").
        ip("link add ndv77 type veth peer name x");
        Command::new("ip")
            .args(["link", "set", "ndv77", "alias", "netdp endpoint a/lost"])
            .status()
            .unwrap();
        ip("link add nd-2x type bridge");
        ip("link add ndv2 group 1852047360 type veth peer name y");
        ip("link add nd-foreign type bridge");

        let controller = host.start(&[]).await.unwrap();
        let links = ip("link");
        assert!(!links.contains("ndv77") && !links.contains("ndv3:"), "{links}");
        assert!(links.contains("nd-foreign") && links.contains("nd-2x"), "{links}");
        // The peers of swept links looked like uplinks at first.
        eventually("no drift", async || controller.check().await.unwrap().is_empty()).await;
        assert_eq!(controller.model().await.endpoints.len(), 2);
        assert_eq!(host.program().endpoints.len(), 2);
        assert_eq!(host.program().published, program.published);
        a1.serve(7);
        assert_eq!(a2.ask(a1_address, 7).as_deref(), Some("172.20.0.3"));

        ip("link del nd-foreign");
        ip("link del nd-2x");
        controller.purge().await.unwrap();
        assert_same(&before, &dump());
    });
}

#[test]
fn killed_at_any_moment_the_next_start_completes_or_undoes() {
    on_a_bare_host(|host| {
        let before = settled();
        let a1 = Namespace::new().unwrap();
        let inside = a1.run(|| ip("link"));
        for step in 0..40u64 {
            let doomed = new_runtime();
            let path = a1.path.clone();
            let (started, is_started) = mpsc::channel();
            doomed.block_on(async {
                let controller = host.start(&[]).await.unwrap();
                tokio::spawn(async move {
                    started.send(()).unwrap();
                    create(&controller, "a", "172.20.0.0/24").await;
                    let _killed = connect(&controller, "a", "A1", &path).await;
                    let _killed = controller.change(|model, _| model.disconnect("a", "A1")).await;
                    let _killed = controller.change(|model, _| model.remove_network("a")).await;
                });
            });
            is_started.recv().unwrap();
            // At another moment each time, at the latest when all is done.
            let _done = is_started.recv_timeout(Duration::from_millis(2 * step));
            doomed.shutdown_background();

            new_runtime().block_on(async {
                let controller = host.start(&[]).await.unwrap();
                assert_eq!(controller.check().await.unwrap(), [], "step {step}");
                let model = controller.model().await;
                let links = ip("link");
                for (name, is_wanted) in
                    [("nd-", !model.networks.is_empty()), ("ndv", !model.endpoints.is_empty())]
                {
                    assert_eq!(links.contains(name), is_wanted, "step {step}, {model:?}: {links}");
                }
                if model.networks.is_empty() {
                    assert_same(&before, &dump());
                }
                controller.purge().await.unwrap();
            });
            assert_same(&before, &dump());
            assert_eq!(a1.run(|| ip("link")).contains("eth0"), inside.contains("eth0"));
        }
    });
}

#[test]
fn meddling_and_vanished_namespaces_are_noticed_from_events() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        let [a1, a2] = [(); 2].map(|()| Namespace::new().unwrap());
        create_dual(&controller, "a", "172.20.0.0/24", "fd00:20::/64").await;
        let a1_address = connect(&controller, "a", "A1", &a1.path).await.unwrap();
        connect(&controller, "a", "A2", &a2.path).await.unwrap();

        let is_repaired = async || controller.check().await.unwrap().is_empty();
        for meddling in [
            "link del nd-1",
            "addr flush dev nd-1",
            "-6 addr flush dev nd-1",
            "link set nd-1 down",
            "link del ndv1",
        ] {
            ip(meddling);
            eventually(meddling, is_repaired).await;
            a1.serve(7);
            assert_eq!(a2.ask(a1_address, 7).as_deref(), Some("172.20.0.3"), "{meddling}");
            a1.serve(8);
            let ipv6: Ipv6Addr = "fd00:20::2".parse().unwrap();
            assert_eq!(a2.ask(ipv6, 8).as_deref(), Some("fd00:20::3"), "{meddling}");
            a1.serve(9);
            let answer = ask(ipv6, 9);
            let state = ["-6 addr", "-6 route show table all", "-6 neigh"].map(ip).join("\n");
            assert_eq!(answer.as_deref(), Some("fd00:20::1"), "{meddling}:\n{state}");
        }

        drop(a1);
        eventually("the endpoint is released", async || {
            controller.model().await.endpoints.len() == 1
        })
        .await;
        eventually("the backend knows", async || host.program().endpoints.len() == 1).await;
    });
}

#[test]
fn uplinks_and_local_addresses_follow_the_host() {
    on_a_host(async |host| {
        let controller = host.start(&["--uplink", "up0", "--uplink", "wan0"]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        assert_eq!(host.program().uplinks.len(), 1);
        let alarms = controller.snapshot().alarms;
        assert!(alarms.len() == 1 && alarms[0].starts_with("uplink wan0: "), "{alarms:?}");

        ip("addr add 10.0.0.7/24 dev up0");
        ip("link add wan0 type veth peer name far0");
        ip("addr add 192.0.2.1/24 dev wan0");
        let address = Ipv4Addr::new(192, 0, 2, 1);
        eventually("the new uplink and addresses", async || {
            let program = host.program();
            program.local.contains(&IpAddr::from([10, 0, 0, 7]))
                && program.uplinks.values().any(|uplink| uplink.masquerade4 == Some(address))
        })
        .await;
        eventually("no alarm", async || controller.snapshot().alarms.is_empty()).await;
        assert!(!host.program().uplinks.values().any(|uplink| uplink.forwarded_before4));
        controller.purge().await.unwrap();
        for uplink in ["up0", "wan0"] {
            let forwarding =
                fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{uplink}/forwarding"));
            assert_eq!(forwarding.unwrap(), "0\n");
        }
    });
}

#[test]
fn a_renamed_uplink_gets_its_own_sysctl_back() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        create(&controller, "a", "172.20.0.0/24").await;
        ip("link set up0 name up1");
        eventually("the new name", async || controller.facts().await.link("up1").is_some()).await;
        assert!(!host.program().uplinks.values().any(|uplink| uplink.forwarded_before4));
        controller.purge().await.unwrap();
        assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/conf/up1/forwarding").unwrap(), "0\n");
    });
}

#[test]
fn a_full_flow_table_shows() {
    on_a_host(async |host| {
        let table = FlowTable { family: "IPv6", flows: 95, capacity: 100 };
        host.dataplane.set_flow_tables(vec![table]);
        let controller = host.start(&[]).await.unwrap();
        eventually("the table", async || controller.snapshot().flow_tables == [table]).await;
        let alarms = controller.snapshot().alarms;
        assert!(alarms[0].starts_with("the IPv6 flow table is 95 % full"), "{alarms:?}");
    });
}

#[test]
fn a_dropped_request_is_finished_all_the_same() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        let impatient = tokio::time::timeout(
            Duration::from_millis(1),
            create(&controller, "a", "172.20.0.0/24"),
        );
        let _late = impatient.await;
        // Waits for whatever is under way.
        let drift = controller.check().await.unwrap();
        assert_eq!(drift, []);
        let is_there = ip("link").contains("nd-1");
        assert_eq!(controller.model().await.networks.len(), usize::from(is_there));
    });
}
