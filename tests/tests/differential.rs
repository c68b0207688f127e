//! The same traffic through netdp and through netfilter, set up as container engines do it: both
//! give the same answers, but for the differences that are listed here with their reasons.
//!
//! A difference that is gone fails as well: the list says what is true.

use std::net::Ipv4Addr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use etherparse::ip_number;
use netdp_tests::harness::run_tests;
use netdp_tests::lab::{Lab, SUBNET_A, SUBNET_B};
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::{Envelope, summarise, verify_checksums};
use netdp_tests::probe::{Answer, Failure, PATIENCE, SHORT_PATIENCE, TcpServer, UdpServer};
use netdp_tests::runtime::poll_until;

/// Both labs look alike: E outside, A1 and A2 in one network, B1 in another. A1 publishes 8080→80
/// and, with nobody listening, 8081→81, for TCP and UDP.
struct World {
    lab: Lab,
    a1: Namespace,
    a2: Namespace,
    b1: Namespace,
    _tcp: Vec<TcpServer>,
    udp: UdpServer,
    _outside_udp: UdpServer,
}

/// What an observer can tell of one kind of traffic.
type Look = fn(&World) -> Result<String>;

/// What is expected of the two.
#[derive(Clone, Copy)]
enum Verdict {
    Same(&'static str),
    Differs { netdp: &'static str, netfilter: &'static str, why: &'static str },
}
use Verdict::{Differs, Same};

const LOOKS: &[(&str, Look, Verdict)] = &[
    ("tcp out", tcp_out, Same("E sees 10.0.0.2")),
    ("udp out", udp_out, Same("E sees 10.0.0.2; 10.0.0.3:7 answers")),
    ("ping out", ping_out, Same("10.0.0.3 answers")),
    ("a port outside the ephemeral range", low_port, Same("E sees 10.0.0.2:4000")),
    (
        "a port of the ephemeral range",
        ephemeral_port,
        Differs {
            netdp: "E sees 10.0.0.2, another port",
            netfilter: "E sees 10.0.0.2, the same port",
            why: "a socket of the host may be given that port later; netfilter would move the host's",
        },
    ),
    ("tcp in", tcp_in, Same("A1 sees 10.0.0.3")),
    ("udp in", udp_in, Same("A1 sees 10.0.0.3; 10.0.0.2:8080 answers")),
    ("a closed port outside", closed_outside, Same("tcp refused, udp refused")),
    ("a port of the host that is not published", unpublished, Same("tcp refused, udp refused")),
    ("a published port without server", no_server, Same("tcp refused, udp refused")),
    ("straight to a container", direct, Same("tcp timed out")),
    ("from one network into another", across, Same("tcp timed out")),
    (
        "a published port, from its own network",
        from_neighbour,
        Differs {
            netdp: "A1 sees 172.20.0.3",
            netfilter: "A1 sees 172.20.0.1",
            why: "the bridge would carry the answer past netfilter, so it has to hide the client",
        },
    ),
    ("a published port, from its own container", from_itself, Same("A1 sees 172.20.0.1")),
    (
        "a published port, from another network",
        from_other_network,
        Differs {
            netdp: "A1 sees 172.21.0.2",
            netfilter: "A1 sees 172.20.0.1",
            why: "masquerade hides whatever leaves its own bridge",
        },
    ),
    ("time to live", time_to_live, Same("E sees 63 of 64")),
    ("the first hop", first_hop, Same("172.20.0.1 says 11/0 about 10.0.0.3")),
    ("a packet too large", too_large, Same("172.20.0.1 says 3/4 about 10.0.0.3, MTU 1400")),
    (
        "an error about a packet out",
        error_in,
        Same("10.0.0.3 → 172.20.0.2: 3/3 about 172.20.0.2:4000 → 10.0.0.3:9"),
    ),
    (
        "an error about a packet in",
        error_out,
        Same("10.0.0.2 → 10.0.0.3: 3/3 about 10.0.0.3:4000 → 10.0.0.2:8081"),
    ),
    ("fragments in", fragments_in, Same("4000 bytes from 10.0.0.3")),
    ("fragments out", fragments_out, Same("E sees 10.0.0.2")),
    (
        "fragments in, the last one first",
        late_first_fragment,
        Differs {
            netdp: "nothing",
            netfilter: "24 bytes from 10.0.0.3",
            why: "netfilter holds and reassembles; netdp holds nothing, and counts the drop",
        },
    ),
];

fn saw(name: &str, peer: std::net::SocketAddr) -> String {
    format!("{name} sees {}", peer.ip())
}

/// How an attempt that should not succeed ended.
fn end<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => "reached".to_owned(),
        Err(error) => match error.downcast_ref::<Failure>() {
            Some(failure) => failure.to_string(),
            None => format!("{error:#}"),
        },
    }
}

fn is_refused(result: Result<()>) -> &'static str {
    if result.is_ok() { "refused" } else { "not refused" }
}

fn tcp_out(world: &World) -> Result<String> {
    Ok(saw("E", world.a1.tcp("10.0.0.3:7").exchange()?.peer))
}

fn udp_out(world: &World) -> Result<String> {
    let seen = world.a1.udp("10.0.0.3:7").exchange()?;
    Ok(format!("{}; {} answers", saw("E", seen.peer), seen.reply_from))
}

fn ping_out(world: &World) -> Result<String> {
    match world.a1.ping("10.0.0.3").send()? {
        Answer::Reply { source } => Ok(format!("{source} answers")),
        Answer::Error(error) => bail!("expected a reply, got {error:?}"),
    }
}

fn low_port(world: &World) -> Result<String> {
    let seen = world.a1.udp("10.0.0.3:7").from("172.20.0.2:4000").exchange()?;
    Ok(format!("E sees {}", seen.peer))
}

fn ephemeral_port(world: &World) -> Result<String> {
    let seen = world.a1.udp("10.0.0.3:7").from("172.20.0.2:40000").exchange()?;
    let port = if seen.peer.port() == 40_000 { "the same" } else { "another" };
    Ok(format!("{}, {port} port", saw("E", seen.peer)))
}

fn tcp_in(world: &World) -> Result<String> {
    Ok(saw("A1", world.lab.outside().tcp("10.0.0.2:8080").exchange()?.by("a1")?.peer))
}

fn udp_in(world: &World) -> Result<String> {
    let seen = world.lab.outside().udp("10.0.0.2:8080").exchange()?;
    Ok(format!("{}; {} answers", saw("A1", seen.by("a1")?.peer), seen.reply_from))
}

fn closed(from: &Namespace, to: &str) -> String {
    let (tcp, udp) = (from.tcp(to).refused(), from.udp(to).refused());
    format!("tcp {}, udp {}", is_refused(tcp), is_refused(udp))
}

fn closed_outside(world: &World) -> Result<String> {
    Ok(closed(&world.a1, "10.0.0.3:9"))
}

fn unpublished(world: &World) -> Result<String> {
    Ok(closed(world.lab.outside(), "10.0.0.2:9"))
}

fn no_server(world: &World) -> Result<String> {
    Ok(closed(world.lab.outside(), "10.0.0.2:8081"))
}

fn direct(world: &World) -> Result<String> {
    let probe = world.lab.outside().tcp("172.20.0.2:80").patience(SHORT_PATIENCE);
    Ok(format!("tcp {}", end(probe.exchange())))
}

fn across(world: &World) -> Result<String> {
    let probe = world.b1.tcp("172.20.0.2:80").patience(SHORT_PATIENCE);
    Ok(format!("tcp {}", end(probe.exchange())))
}

fn from_neighbour(world: &World) -> Result<String> {
    Ok(saw("A1", world.a2.tcp("10.0.0.2:8080").exchange()?.by("a1")?.peer))
}

fn from_itself(world: &World) -> Result<String> {
    Ok(saw("A1", world.a1.tcp("10.0.0.2:8080").exchange()?.by("a1")?.peer))
}

fn from_other_network(world: &World) -> Result<String> {
    Ok(saw("A1", world.b1.tcp("10.0.0.2:8080").exchange()?.by("a1")?.peer))
}

fn time_to_live(world: &World) -> Result<String> {
    let asked = world.lab.outside().sniff("out0", |frame| {
        summarise(frame).is_some_and(|packet| packet.ports.is_some_and(|(_, to)| to == 7))
    })?;
    world.a1.udp("10.0.0.3:7").exchange()?;
    let frame = asked.wait_for(PATIENCE, "a datagram at E", |_| true)?;
    let packet = summarise(&frame).context("read a datagram")?;
    Ok(format!("E sees {} of 64", packet.ttl))
}

fn icmp_error(answer: Answer) -> Result<String> {
    let Answer::Error(error) = answer else { bail!("expected an error, got {answer:?}") };
    let mtu = error.next_hop_mtu.filter(|_| error.code == 4);
    let mtu = mtu.map(|mtu| format!(", MTU {mtu}")).unwrap_or_default();
    let (source, about) = (error.source, error.quoted_destination);
    Ok(format!("{source} says {}/{} about {about}{mtu}", error.kind, error.code))
}

fn first_hop(world: &World) -> Result<String> {
    icmp_error(world.a1.ping("10.0.0.3").ttl(1).send()?)
}

fn too_large(world: &World) -> Result<String> {
    icmp_error(world.a1.ping("10.0.0.3").packet_bytes(1450).dont_fragment().send()?)
}

/// An error on a link, in words, with right checksums throughout.
fn describe(frame: &[u8]) -> Result<String> {
    verify_checksums(frame)?;
    let address = |at: usize| -> Result<Ipv4Addr> {
        let bytes: [u8; 4] = frame.get(at..at + 4).context("read an address")?.try_into()?;
        Ok(bytes.into())
    };
    let port = |at: usize| -> Result<u16> {
        let bytes: [u8; 2] = frame.get(at..at + 2).context("read a port")?.try_into()?;
        Ok(u16::from_be_bytes(bytes))
    };
    Ok(format!(
        "{} → {}: {}/{} about {}:{} → {}:{}",
        address(26)?,
        address(30)?,
        frame[34],
        frame[35],
        address(54)?,
        port(62)?,
        address(58)?,
        port(64)?
    ))
}

fn is_unreachable(frame: &[u8]) -> bool {
    summarise(frame).is_some_and(|packet| packet.protocol == 1) && frame.get(34) == Some(&3)
}

fn error_in(world: &World) -> Result<String> {
    let links = world.a1.links()?;
    let link = links.iter().find(|link| *link != "lo").context("find A1's link")?;
    let errors = world.a1.sniff(link, is_unreachable)?;
    world.a1.udp("10.0.0.3:9").from("172.20.0.2:4000").send()?;
    describe(&errors.wait_for(PATIENCE, "an error at A1", |_| true)?)
}

fn error_out(world: &World) -> Result<String> {
    let outside = world.lab.outside();
    let errors = outside.sniff("out0", is_unreachable)?;
    outside.udp("10.0.0.2:8081").from("10.0.0.3:4000").send()?;
    describe(&errors.wait_for(PATIENCE, "an error at E", |_| true)?)
}

fn fragments_in(world: &World) -> Result<String> {
    world.lab.outside().udp("10.0.0.2:8080").bytes(4000).send()?;
    let arrived = poll_until(PATIENCE, "a large datagram", || {
        Ok(world.udp.received().into_iter().find(|datagram| datagram.bytes == 4000))
    })?;
    Ok(format!("{} bytes from {}", arrived.bytes, arrived.peer.ip()))
}

fn fragments_out(world: &World) -> Result<String> {
    Ok(saw("E", world.a1.udp("10.0.0.3:7").bytes(4000).exchange()?.peer))
}

fn late_first_fragment(world: &World) -> Result<String> {
    let outside = world.lab.outside();
    let envelope = Envelope {
        source_mac: outside.mac("out0")?,
        destination_mac: world.lab.host().mac("up0")?,
        source: Ipv4Addr::new(10, 0, 0, 3).into(),
        destination: Ipv4Addr::new(10, 0, 0, 2).into(),
        ttl: 64,
    };
    let payload: Vec<u8> = (0..24).collect();
    let whole = envelope.udp(4001, 8080, &payload);
    let body = &whole[34..];
    let late = envelope.fragment(ip_number::UDP, 77, 16, false, &body[16..])?;
    let first = envelope.fragment(ip_number::UDP, 77, 0, true, &body[..16])?;
    outside.inject("out0", &late)?;
    outside.inject("out0", &first)?;
    let arrived = poll_until(SHORT_PATIENCE, "a reassembled datagram", || {
        Ok(world.udp.received().into_iter().find(|datagram| datagram.bytes == payload.len()))
    });
    Ok(arrived.map_or("nothing".to_owned(), |datagram| {
        format!("{} bytes from {}", datagram.bytes, datagram.peer.ip())
    }))
}

/// Rules as container engines write them: masquerade what leaves its bridge, redirect published
/// ports of local addresses, and let nothing into a network but answers and what was redirected.
const RULES: &str = r#"
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat
        fib daddr type local tcp dport 8080 dnat to 172.20.0.2:80
        fib daddr type local udp dport 8080 dnat to 172.20.0.2:80
        fib daddr type local tcp dport 8081 dnat to 172.20.0.2:81
        fib daddr type local udp dport 8081 dnat to 172.20.0.2:81
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 172.20.0.0/24 oifname != "br-a" masquerade
        ip saddr 172.21.0.0/24 oifname != "br-b" masquerade
        ip saddr 172.20.0.0/24 ip daddr 172.20.0.0/24 ct status dnat masquerade
    }
}
table ip filter {
    chain forward {
        type filter hook forward priority filter; policy drop
        ct state established,related accept
        ct status dnat accept
        iifname { "br-a", "br-b" } oifname "up0" accept
    }
}
"#;

fn with_netdp() -> Result<World> {
    let lab = Lab::builder().build()?;
    lab.create_network("net-a", SUBNET_A, &[])?;
    lab.create_network("net-b", SUBNET_B, &[])?;
    let published = ["8080:80", "8080:80/udp", "8081:81", "8081:81/udp"];
    let a1 = lab.attach("net-a", "a1", "172.20.0.2", &published)?;
    let a2 = lab.attach("net-a", "a2", "172.20.0.3", &[])?;
    let b1 = lab.attach("net-b", "b1", "172.21.0.2", &[])?;
    inhabit(lab, a1, a2, b1)
}

fn with_netfilter() -> Result<World> {
    let lab = Lab::builder().without_agent().build()?;
    let host = lab.host();
    for (bridge, gateway) in [("br-a", "172.20.0.1"), ("br-b", "172.21.0.1")] {
        host.ip(&format!(
            "link add {bridge} type bridge\naddress add {gateway}/24 dev {bridge}\n\
             link set {bridge} up\n"
        ))?;
    }
    let attach = |role: &str, bridge: &str, address: &str, gateway: &str| -> Result<Namespace> {
        let container = lab.container(role)?;
        host.ip(&format!(
            "link add {role} type veth peer name eth0 netns {}\n\
             link set {role} master {bridge} up\n\
             link set {role} type bridge_slave hairpin on\n",
            container.name()
        ))?;
        container.ip(&format!(
            "address add {address}/24 dev eth0\nlink set eth0 up\n\
             route add default via {gateway}\n"
        ))?;
        Ok(container)
    };
    let a1 = attach("a1", "br-a", "172.20.0.2", "172.20.0.1")?;
    let a2 = attach("a2", "br-a", "172.20.0.3", "172.20.0.1")?;
    let b1 = attach("b1", "br-b", "172.21.0.2", "172.21.0.1")?;
    host.set_sysctl("net.ipv4.ip_forward", "1")?;
    let loaded = host.output("nft", &[RULES])?;
    ensure!(
        loaded.status.success(),
        "load rules with nft: {}",
        String::from_utf8_lossy(&loaded.stderr)
    );
    inhabit(lab, a1, a2, b1)
}

/// Starts the servers and narrows the way out.
fn inhabit(lab: Lab, a1: Namespace, a2: Namespace, b1: Namespace) -> Result<World> {
    lab.host().ip("link set up0 mtu 1400\n")?;
    lab.outside().ip("link set out0 mtu 1400\n")?;
    let tcp = vec![
        a1.tcp_server("a1", "172.20.0.2:80")?,
        lab.outside().tcp_server("outside", "10.0.0.3:7")?,
    ];
    let udp = a1.udp_server("a1", "172.20.0.2:80")?;
    let outside_udp = lab.outside().udp_server("outside", "10.0.0.3:7")?;
    Ok(World { lab, a1, a2, b1, _tcp: tcp, udp, _outside_udp: outside_udp })
}

fn netdp_answers_as_netfilter_does() -> Result<()> {
    let (netdp, netfilter) = (with_netdp()?, with_netfilter().context("build it with nft")?);
    let mut wrong = Vec::new();
    for (name, look, verdict) in LOOKS {
        let seen = |world: &World| look(world).unwrap_or_else(|error| format!("failed: {error:#}"));
        let seen = (seen(&netdp), seen(&netfilter));
        let (wanted, why) = match *verdict {
            Same(both) => ((both, both), "the same"),
            Differs { netdp, netfilter, why } => ((netdp, netfilter), why),
        };
        println!("{name}: {} | {} ({why})", seen.0, seen.1);
        if (seen.0.as_str(), seen.1.as_str()) != wanted {
            wrong.push(format!("{name}: wanted {wanted:?}, seen {seen:?}"));
        }
    }
    ensure!(wrong.is_empty(), "netdp and netfilter:\n{}", wrong.join("\n"));
    Ok(())
}

fn main() -> ExitCode {
    run_tests(&[("netdp_answers_as_netfilter_does", netdp_answers_as_netfilter_does)])
}
