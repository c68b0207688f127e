//! Programs of the host dial published ports: who answers, what both ends see, and what the
//! agent's end, a purge or another host leaves of it.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netdp::dataplane::ebpf::{Features, can_know_ports, cgroup2_mount};
use netdp_common::{abi::ABI, socket::claim};
use netdp_tests::bpf::PinnedMap;
use netdp_tests::harness::run_tests;
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{Family, IPV6, Net};
use netdp_tests::probe::{Failure, PATIENCE, TcpServer, UdpServer, expect_failure, expect_same};
use netdp_tests::runtime::poll_until;
use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

/// Payload of an exchange, each way.
const BYTES: usize = 100_000;

/// How long the agent may take to notice what no event tells it.
const NOTICED: Duration = Duration::from_secs(40);

/// Each promise in each family.
macro_rules! promises {
    ($($test:ident,)+) => {
        run_tests(&[$(
            (concat!(stringify!($test), "/ipv4"), || in_scene(Family::Ipv4, $test)),
            (concat!(stringify!($test), "/ipv6"), || in_scene(Family::Ipv6, $test)),
        )+])
    };
}

fn main() -> ExitCode {
    promises![
        every_local_address_leads_to_the_container,
        datagrams_are_answered_by_whom_they_were_sent_to,
        ipv6_sockets_reach_ipv4_ports,
        a_port_of_one_address_is_no_port_of_another,
        servers_of_the_host_stay_the_hosts,
        a_socket_on_a_loopback_address_is_refused,
        a_published_port_is_taken_where_it_is_published,
        who_asks_for_a_port_of_source_nats_is_noted,
        other_namespaces_are_left_alone,
        agents_on_one_hierarchy_do_not_meet,
        sockets_outlive_the_agent,
        unpublishing_ends_what_was_dialled,
        disconnecting_ends_every_socket,
        a_purge_leaves_no_hook,
        a_removed_hook_is_put_back,
    ]
}

/// A lab whose A1 publishes its port 80.
struct Scene {
    tcp: TcpServer,
    udp: UdpServer,
    a1: Namespace,
    a2: Namespace,
    net: &'static Net,
    lab: Lab,
}

fn in_scene(family: Family, test: fn(&Scene) -> Result<()>) -> Result<()> {
    let lab = Lab::builder().family(family).build()?;
    let net = lab.net();
    lab.create_network("net-a", net.subnet_a, &[])?;
    let here = Net::publish_on(net.loopback, "8090:80");
    let there = Net::publish_on(net.host, "8070:80");
    let ports = ["8080:80", "8081:80", "8080:80/udp", &here, &there];
    let a1 = lab.attach("net-a", "a1", net.a1, &ports)?;
    let a2 = lab.attach("net-a", "a2", net.a2, &[])?;
    let tcp = a1.tcp_server("a1", (net.any, 80))?;
    let udp = a1.udp_server("a1", (net.a1, 80))?;
    let scene = Scene { tcp, udp, a1, a2, net, lab };
    scene.lab.explain(test(&scene).and_then(|()| scene.lab.expect_no_netfilter()))
}

impl Scene {
    fn host(&self) -> &Namespace {
        self.lab.host()
    }

    /// The loopback address and the published port.
    fn loopback(&self) -> (IpAddr, u16) {
        (self.net.loopback, 8080)
    }

    /// A connection of the host that A1 answers, and that looks to the host as it was dialled.
    fn expect_reached(&self, dialled: (IpAddr, u16)) -> Result<()> {
        let seen = self.host().tcp(dialled).bytes(BYTES).exchange()?;
        seen.by("a1")?.saw_client_at(self.net.gateway_a)?;
        expect_same("whom the host talks to", &seen.client_peer, &dialled.into())
    }

    /// As [`Scene::expect_reached`], with datagrams of an unconnected socket.
    fn expect_answered(&self, dialled: (IpAddr, u16)) -> Result<()> {
        let seen = self.host().udp(dialled).exchange()?;
        seen.by("a1")?.saw_client_at(self.net.gateway_a)?;
        expect_same("who answers the host", &seen.reply_from, &dialled.into())
    }
}

fn every_local_address_leads_to_the_container(scene: &Scene) -> Result<()> {
    let net = scene.net;
    for local in [net.loopback, net.host, net.host_second, net.gateway_a] {
        scene.expect_reached((local, 8080))?;
    }
    if net.is_ipv4() {
        scene.expect_reached(([127, 0, 0, 53].into(), 8080))?;
    }
    // What the kernel makes of it without us.
    let seen = scene.host().tcp((net.any, 8080)).bytes(BYTES).exchange()?;
    seen.by("a1")?.saw_client_at(net.gateway_a)?;
    expect_same("whom the host talks to", &seen.client_peer, &scene.loopback().into())?;
    // A source that the route allows stays.
    let probe = scene.host().tcp(scene.loopback()).from((net.host_second, 0));
    probe.bytes(BYTES).exchange()?.by("a1")?.saw_client_at(net.host_second)?;
    // The container's own port is as it was, and called by its name.
    scene.expect_reached((net.a1, 80))
}

fn datagrams_are_answered_by_whom_they_were_sent_to(scene: &Scene) -> Result<()> {
    let net = scene.net;
    for local in [net.loopback, net.host, net.host_second, net.gateway_a] {
        scene.expect_answered((local, 8080))?;
    }
    scene.expect_answered((net.a1, 80))?;
    let received = scene.udp.received().len();
    let (local, peer, answered) = scene.host().run(|| {
        let socket = UdpSocket::bind((net.any, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        // One socket, several peers: each answer has the name that its question had.
        let peers = [(net.loopback, 8080), (net.host, 8080), (net.a1, 80), (net.loopback, 8080)];
        for dialled in peers {
            socket.send_to(b"unconnected", dialled)?;
            let (_, from) = socket.recv_from(&mut [0; 1500])?;
            expect_same("who answers", &from, &dialled.into())?;
        }
        socket.connect(scene.loopback())?;
        socket.send(b"connected")?;
        let (_, from) = socket.recv_from(&mut [0; 1500])?;
        Ok((socket.local_addr()?, socket.peer_addr()?, from))
    })?;
    expect_same("the peer of a connected socket", &peer, &scene.loopback().into())?;
    expect_same("who answers a connected socket", &answered, &peer)?;
    expect_same("its own address", &local.ip(), &net.gateway_a)?;
    expect_same("datagrams", &scene.udp.received().len(), &(received + 5))
}

fn ipv6_sockets_reach_ipv4_ports(scene: &Scene) -> Result<()> {
    for dialled in ["[::ffff:127.0.0.1]:8080", "[::ffff:10.0.0.2]:8080"] {
        let dialled: SocketAddr = dialled.parse()?;
        let before = scene.tcp.accepted().len();
        let peer = scene.host().run(|| Ok(TcpStream::connect(dialled)?.peer_addr()?))?;
        expect_same("the peer of a connection", &peer, &dialled)?;
        poll_until(PATIENCE, "the connection at a1", || {
            Ok((scene.tcp.accepted().len() > before).then_some(()))
        })?;
        if scene.net.is_ipv4() {
            let from = scene.host().run(|| {
                let socket = UdpSocket::bind("[::]:0")?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.send_to(b"mapped", dialled)?;
                Ok(socket.recv_from(&mut [0; 1500])?.1)
            })?;
            expect_same("who answers a datagram", &from, &dialled)?;
        }
    }
    Ok(())
}

fn a_port_of_one_address_is_no_port_of_another(scene: &Scene) -> Result<()> {
    let net = scene.net;
    scene.expect_reached((net.loopback, 8090))?;
    scene.host().tcp((net.host, 8090)).refused()?;
    if net.is_ipv4() {
        scene.host().tcp("127.0.0.2:8090").refused()?;
    }
    scene.expect_reached((net.host, 8070))?;
    for other in [net.loopback, net.host_second] {
        scene.host().tcp((other, 8070)).refused()?;
    }
    // TCP's port is not UDP's.
    scene.host().udp((net.loopback, 8081)).refused()
}

fn servers_of_the_host_stay_the_hosts(scene: &Scene) -> Result<()> {
    let net = scene.net;
    let _loopback = scene.host().tcp_server("loopback", (net.loopback, 8070))?;
    let seen = scene.host().tcp((net.loopback, 8070)).bytes(BYTES).exchange()?;
    seen.by("loopback")?.saw_client_at(net.loopback)?;
    let _outside = scene.lab.outside().tcp_server("outside", (net.outside, 8080))?;
    let seen = scene.host().tcp((net.outside, 8080)).bytes(BYTES).exchange()?;
    seen.by("outside")?.saw_client_at(net.host)?;
    Ok(())
}

fn a_socket_on_a_loopback_address_is_refused(scene: &Scene) -> Result<()> {
    let denied = Failure::from(io::Error::from(Errno::EPERM));
    let bound = (scene.net.loopback, 0);
    let tcp = scene.host().tcp(scene.loopback()).from(bound).open();
    expect_failure(tcp, &denied, "dial from a loopback address")?;
    let udp = scene.host().udp(scene.loopback()).from(bound).exchange();
    expect_failure(udp, &denied, "send from a loopback address")
}

/// Binds a TCP and a UDP socket of the host; what the kernel says of both.
fn bind_both(scene: &Scene, address: IpAddr, port: u16, only_ipv6: bool) -> Result<Option<Errno>> {
    scene.host().run(|| {
        let bind = |kind| -> io::Result<()> {
            let domain = Domain::for_address((address, port).into());
            let socket = Socket::new(domain, kind, None)?;
            if address.is_ipv6() {
                socket.set_only_v6(only_ipv6)?;
            }
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(address, port).into())
        };
        let said = [Type::STREAM, Type::DGRAM].map(|kind| match bind(kind) {
            Ok(()) => None,
            Err(error) => error.raw_os_error().map(Errno::from_raw),
        });
        expect_same("what TCP and UDP say", &said[0], &said[1])?;
        Ok(said[0])
    })
}

fn a_published_port_is_taken_where_it_is_published(scene: &Scene) -> Result<()> {
    let net = scene.net;
    let there = Net::publish_on(net.host, "8070:80/udp");
    scene.lab.netdp(&["publish", "a1", "-p", &there])?;
    let expect = |address, port, only_ipv6, wanted: Option<Errno>| {
        let said = bind_both(scene, address, port, only_ipv6)?;
        expect_same(&format!("bind {address} {port}, IPv6 only: {only_ipv6}"), &said, &wanted)
    };
    let taken = Some(Errno::EADDRINUSE);
    // 8080 on every address, 8070 on one, 8060 on none.
    let everywhere = [net.any, net.host, net.host_second, net.loopback];
    for address in everywhere {
        expect(address, 8080, true, taken)?;
        expect(address, 8060, true, None)?;
    }
    expect(net.host, 8070, true, taken)?;
    expect(net.any, 8070, true, taken)?;
    expect(net.host_second, 8070, true, None)?;
    expect(net.loopback, 8070, true, None)?;
    // A wildcard of IPv6 is one of IPv4 as well, unless it says otherwise.
    expect(IPV6.any, 8080, false, taken)?;
    expect(IPV6.any, 8070, false, taken)?;
    expect(IPV6.any, 8080, true, if net.is_ipv4() { None } else { taken })?;
    if let IpAddr::V4(host) = net.host {
        let mapped = IpAddr::V6(host.to_ipv6_mapped());
        expect(mapped, 8070, false, taken)?;
    }
    // Nobody asks for a particular port, or it is another host's.
    expect(net.any, 0, true, None)?;
    let _server = scene.a2.tcp_server("a2", (net.any, 8080))?;
    // The agent is not needed for it.
    scene.lab.agent()?.kill9()?;
    for address in everywhere {
        expect(address, 8080, true, taken)?;
    }
    scene.lab.agent()?.start()?;
    scene.expect_reached((net.host, 8080))?;
    scene.lab.netdp(&["unpublish", "a1", "-p", "8080:80", "-p", "8080:80/udp", "-p", &there])?;
    expect(net.any, 8080, true, None)
}

/// What is chosen then is a matter of the suite `datapath`, as ports are chosen by chance.
fn who_asks_for_a_port_of_source_nats_is_noted(scene: &Scene) -> Result<()> {
    let pins = scene.lab.bpffs().join(format!("netdp/v{ABI}"));
    let claims = PinnedMap::open(&pins.join("maps/PORT_CLAIMS"), 4, 8)?;
    let read = |place: u32| -> Result<u64> {
        Ok(u64::from_ne_bytes(claims.get(&place.to_ne_bytes())?[..].try_into()?))
    };
    let expect_unknown = |why| expect_same(why, &read(claim::SETTLED)?, &0);
    if !can_know_ports(&Features::probe(), cgroup2_mount()?.as_deref()) {
        return expect_unknown("what is known of sockets");
    }
    // A host that has just come up has no such socket.
    let settled = || {
        poll_until(NOTICED, "that nobody has such a port", || {
            let asked = read(claim::ASKED)?;
            Ok((read(claim::SETTLED)? == claim::settled(asked)).then_some(asked))
        })
    };
    let any = scene.net.any;
    let before = settled()?;
    let container = scene.a1.run(|| Ok(UdpSocket::bind((any, 51_820))?))?;
    bind_both(scene, any, 0, true)?;
    bind_both(scene, any, 49_999, true)?;
    bind_both(scene, any, 61_000, true)?;
    expect_same("requests, none of them for such a port", &read(claim::ASKED)?, &before)?;
    bind_both(scene, any, 51_820, true)?;
    expect_same("requests for such a port", &read(claim::ASKED)?, &(before + 2))?;
    drop(container);
    expect_same("requests when nobody has the port", &settled()?, &(before + 2))?;
    // Ports that were anybody's for a moment.
    let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
    scene.host().run(|| Ok(fs::write(reserved, "7\n")?))?;
    poll_until(NOTICED, "that the ports are anybody's", || {
        Ok((read(claim::SETTLED)? == 0).then_some(()))
    })?;
    settled()?;
    // Requests that nobody has seen.
    let pin = pins.join(if scene.net.is_ipv4() { "links/bind4" } else { "links/bind6" });
    fs::remove_file(&pin).context("remove the pin of a hook")?;
    poll_until(NOTICED, "the hook", || Ok(pin.exists().then_some(())))?;
    expect_unknown("what is known after a hook was gone")
}

fn other_namespaces_are_left_alone(scene: &Scene) -> Result<()> {
    for container in [&scene.a1, &scene.a2] {
        container.tcp(scene.loopback()).refused()?;
        let _own = container.tcp_server("own", scene.loopback())?;
        container.tcp(scene.loopback()).bytes(BYTES).exchange()?.by("own")?;
    }
    scene.lab.outside().tcp(scene.loopback()).refused()
}

fn agents_on_one_hierarchy_do_not_meet(scene: &Scene) -> Result<()> {
    let other = Lab::builder().family(scene.net.family).build()?;
    let net = scene.net;
    other.explain((|| {
        other.create_network("net-a", net.subnet_a, &[])?;
        other.host().tcp(scene.loopback()).refused()?;
        let b1 = other.attach("net-a", "b1", net.a1, &["8080:90"])?;
        let _server = b1.tcp_server("b1", (net.a1, 90))?;
        other.host().tcp(scene.loopback()).bytes(BYTES).exchange()?.by("b1")?;
        scene.expect_reached(scene.loopback())?;
        other.netdp(&["purge"])?;
        scene.expect_reached(scene.loopback())
    })())
}

fn sockets_outlive_the_agent(scene: &Scene) -> Result<()> {
    let mut session = scene.host().tcp(scene.loopback()).open()?;
    let dialled = scene.loopback().into();
    let agent = scene.lab.agent()?;
    for round in 1..=2 {
        session.exchange(BYTES)?.by("a1")?;
        agent.kill9()?;
        expect_same("the peer", &session.exchange(BYTES)?.client_peer, &dialled)?;
        scene.expect_reached((scene.net.host, 8080)).with_context(|| format!("death {round}"))?;
        agent.start()?;
        expect_same("the peer", &session.exchange(BYTES)?.client_peer, &dialled)?;
        scene.expect_reached(scene.loopback()).with_context(|| format!("return {round}"))?;
        scene.expect_answered(scene.loopback())?;
    }
    let drift = scene.lab.json(&["doctor"])?;
    let failed = drift.as_array().context("read doctor's list")?.iter();
    let failed: Vec<_> = failed.filter(|check| check["verdict"] == "fail").collect();
    ensure!(failed.is_empty(), "doctor fails {failed:?}");
    Ok(())
}

fn unpublishing_ends_what_was_dialled(scene: &Scene) -> Result<()> {
    let mut dialled = scene.host().tcp(scene.loopback()).open()?;
    let mut sibling = scene.host().tcp((scene.net.loopback, 8081)).open()?;
    let mut direct = scene.host().tcp((scene.net.a1, 80)).open()?;
    for session in [&mut dialled, &mut sibling, &mut direct] {
        session.exchange(BYTES)?.by("a1")?;
    }
    scene.lab.netdp(&["unpublish", "a1", "-p", "8080:80"])?;
    expect_failure(dialled.exchange(BYTES), &Failure::Reset, "an unpublished port")?;
    scene.host().tcp(scene.loopback()).refused()?;
    // Neither the same number of the other protocol nor another port of the same server.
    scene.expect_answered(scene.loopback())?;
    for session in [&mut sibling, &mut direct] {
        session.exchange(BYTES)?.by("a1")?;
    }
    Ok(())
}

fn disconnecting_ends_every_socket(scene: &Scene) -> Result<()> {
    let mut dialled = scene.host().tcp(scene.loopback()).open()?;
    let mut direct = scene.host().tcp((scene.net.a1, 80)).open()?;
    let other = scene.host().tcp((scene.net.a2, 80));
    let _server = scene.a2.tcp_server("a2", (scene.net.a2, 80))?;
    let mut other = other.open()?;
    let datagrams = scene.host().run(|| {
        let socket = UdpSocket::bind((scene.net.any, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(scene.loopback())?;
        Ok(socket)
    })?;
    for session in [&mut dialled, &mut direct, &mut other] {
        session.exchange(BYTES)?;
    }
    scene.lab.netdp(&["disconnect", "net-a", "a1"])?;
    for (what, session) in [("dialled", &mut dialled), ("direct", &mut direct)] {
        expect_failure(session.exchange(BYTES), &Failure::Reset, what)?;
    }
    let ended = datagrams.recv(&mut [0; 16]).map_err(Failure::from);
    expect_same("a connected UDP socket", &ended, &Err(Failure::Reset))?;
    other.exchange(BYTES)?.by("a2")?;
    Ok(())
}

fn a_purge_leaves_no_hook(scene: &Scene) -> Result<()> {
    scene.expect_reached(scene.loopback())?;
    scene.lab.netdp(&["purge"])?;
    scene.host().tcp(scene.loopback()).refused()?;
    let _server = scene.host().tcp_server("host", scene.loopback())?;
    scene.host().tcp(scene.loopback()).bytes(BYTES).exchange()?.by("host")?;
    ensure!(!scene.lab.bpffs().join("netdp").exists(), "pins are left");
    Ok(())
}

fn a_removed_hook_is_put_back(scene: &Scene) -> Result<()> {
    let dialled = scene.loopback();
    let hook = if scene.net.is_ipv4() { "connect4" } else { "connect6" };
    let missing = format!("socket hook {hook} is missing");
    let pin = scene.lab.bpffs().join(format!("netdp/v{ABI}/links/{hook}"));
    fs::remove_file(&pin).context("remove the pin of a hook")?;
    // The kernel lets go of the program a moment after the pin.
    poll_until(PATIENCE, "the hook's end", || Ok(scene.host().tcp(dialled).refused().ok()))?;
    let checks = scene.lab.agent()?.run(&["doctor"])?;
    let text = String::from_utf8_lossy(&checks.stdout).into_owned();
    ensure!(text.contains(&missing), "doctor says:\n{text}");
    poll_until(NOTICED, "the hook", || Ok(pin.exists().then_some(())))?;
    scene.expect_reached(dialled)
}
