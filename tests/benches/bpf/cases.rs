//! The packets that are measured: established flows on their whole way, and flows that open.
//!
//! Each case checks that the programs did what it is about: verdict, last packet, counters, flows.

use std::{
    fmt::{self, Display, Formatter},
    hint,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::{Result, ensure};
use netdp::dataplane::{Count, Dataplane};
use netdp_common::config::Timeouts;
use netdp_tests::{bpf::Rotation, packet::ETHERNET_BYTES};

use crate::{
    datagram::{Datagram, Kind, Wire},
    family::{FAMILIES, Family},
    fixture::{
        A, At, Fixture, HOST, ROUTER_MAC, TCX_NEXT, TCX_REDIRECT, UPLINK_MAC, bridge_mac,
        from_container, from_container_wire, from_outside_wire, from_uplink, hex, into_network,
        mac, socket, to_uplink,
    },
};

/// Established flows that take turns.
const ESTABLISHED: u32 = 4096;
/// Packets of a measurement of established flows. Few, and many rounds: most measurements then
/// end before the scheduler gives the CPU to somebody else.
const RUNS: u32 = 2 * ESTABLISHED;
/// Flows that a measurement of new ones opens.
pub(crate) const NEW: u32 = 4096;
/// Flows of a small table.
pub(crate) const SMALL: u32 = 2 * NEW;

/// What a packet finds in the flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Age {
    /// Its flow.
    Established,
    /// No flow, so that it opens one, where others were opened and ended a moment ago: what a host
    /// has whose connections come and go.
    New,
    /// The same where other memory has passed through the caches since.
    NewInCold,
    /// The same as [`Self::New`] in a table of [`SMALL`] flows, whose index fits into a CPU's cache.
    NewInSmall,
}

impl Age {
    /// Whether the packet opens its flow.
    pub(crate) fn is_new(self) -> bool {
        self != Self::Established
    }

    /// Name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::New => "new",
            Self::NewInCold => "cold new",
            Self::NewInSmall => "small new",
        }
    }
}

/// Where a figure was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) age: Age,
    /// What the packet is on its way to.
    pub(crate) way: &'static str,
    /// Name of the family.
    pub(crate) family: &'static str,
    /// "tcp", "udp".
    pub(crate) protocol: &'static str,
    /// Name of the program.
    pub(crate) program: &'static str,
}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { age, way, family, protocol, program } = self;
        write!(f, "{} {way}, {protocol} over {family}, {program}", age.name())
    }
}

/// One program and the packets it is measured with.
pub(crate) struct Case {
    place: Place,
    at: At,
    packets: Rotation,
    /// The last packet of a measurement as it should leave.
    leaves: Vec<u8>,
    /// Whether packets go past the host's stack.
    is_fast: bool,
}

impl Case {
    /// Where it measures.
    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Packets of a measurement.
    pub(crate) fn runs(&self) -> u32 {
        if self.place.age.is_new() { NEW } else { RUNS }
    }

    /// Nanoseconds for one packet.
    pub(crate) fn measure(&self, fixture: &mut Fixture) -> Result<f64> {
        // Whoever opens a flow would otherwise have an absent agent's work to do.
        fixture.set_collection(Timeouts::RFC, true)?;
        fixture.set_fast_path(self.is_fast)?;
        let before = fixture.backend().counters()?;
        let there = fixture.backend().flows()?.len();
        let context = fixture.context(self.at);
        let mut flows = 0;
        match self.place.age {
            Age::Established => {
                // What the cases before have left in the caches is not what is measured.
                self.packets.run(fixture.loaded(self.at)?, &context, ESTABLISHED)?;
            }
            Age::New | Age::NewInSmall => {
                self.packets.run(fixture.loaded(self.at)?, &context, NEW)?;
                let ended = fixture.remove_flows()?;
                ensure!(ended == NEW as usize, "{ended} of {NEW} flows to be ended");
                flows += NEW;
            }
            Age::NewInCold => pass_through_caches(),
        }
        let ran = self.packets.run(fixture.loaded(self.at)?, &context, self.runs())?;
        let nothing = self.packets.run_nothing(&context, self.runs())?;
        let verdict = if self.is_fast { TCX_REDIRECT } else { TCX_NEXT };
        ensure!(ran.verdict == verdict, "verdict {}", ran.verdict);
        let (wanted, seen) = (hex(&self.leaves), hex(&ran.frame));
        ensure!(seen == wanted, "the last packet left as {seen}, wanted {wanted}");
        let left = if self.place.age.is_new() { NEW } else { 0 };
        flows += left;
        let after = fixture.backend().counters()?;
        let dropped = after.iter().find(|count| count.reason.is_drop() && !before.contains(count));
        ensure!(dropped.is_none(), "packets dropped, in all {dropped:?}");
        ensure!(opened(&after) == opened(&before) + u64::from(flows), "not as many flows opened");
        let left = there + left as usize;
        ensure!(fixture.backend().flows()?.len() == left, "not as many flows in the table");
        if self.place.age.is_new() {
            fixture.remove_flows()?;
        }
        Ok(f64::from(ran.nanos) - f64::from(nothing.nanos))
    }
}

/// Flows opened since the programs were loaded.
fn opened(counts: &[Count]) -> u64 {
    counts.iter().filter(|count| !count.reason.is_drop()).map(|count| count.packets).sum()
}

/// A transport, and what a packet of an established flow and of a new one carries.
const PROTOCOLS: [(&str, Kind, Kind); 2] =
    [("tcp", Kind::Segment, Kind::Syn), ("udp", Kind::Udp, Kind::Udp)];

/// One hook on a way: what arrives there of flow number n, and how that leaves.
struct Step {
    way: &'static str,
    program: &'static str,
    at: At,
    /// Whether the flow begins here.
    opens: bool,
    /// Hops that the packet loses, where it goes past the host's stack from here.
    sent: Option<u8>,
    wires: fn(u32) -> (Wire, Wire),
}

/// An address outside, and a port that source translation keeps.
fn outside(n: u32) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(0x0b00_0001 + n % 61), 1024 + n as u16)
}

/// From a1 to the world.
fn out(n: u32) -> Wire {
    from_container_wire("a1", 1024 + n as u16, SocketAddrV4::new(*outside(n).ip(), 443))
}

/// The same as it leaves.
fn out_translated(n: u32) -> Wire {
    let inside = out(n);
    let source = SocketAddrV4::new(HOST, inside.source.port());
    inside.on_link(UPLINK_MAC, ROUTER_MAC).from(source)
}

/// From the world to a1's published port.
fn into(n: u32) -> Wire {
    from_outside_wire(outside(n), SocketAddrV4::new(HOST, 8080))
}

/// From a2 to a1's published port.
fn across(n: u32) -> Wire {
    from_container_wire("a2", 1024 + n as u16, SocketAddrV4::new(HOST, 8080))
}

/// The same as a1 gets it.
fn across_translated(n: u32) -> Wire {
    across(n).to(socket("a1", 80)).on_link(mac("a2"), mac("a1"))
}

fn into_a1(wire: Wire) -> Wire {
    wire.on_link(bridge_mac(A), mac("a1"))
}

fn from_a1(wire: Wire) -> Wire {
    wire.on_link(mac("a1"), bridge_mac(A))
}

/// The ways of packets of established flows.
fn ways() -> [Step; 16] {
    let step = |way, program, at, wires| Step { way, program, at, opens: false, sent: None, wires };
    let first = |way, program, at, wires| Step { opens: true, ..step(way, program, at, wires) };
    let fast =
        |hops, way, program, at, wires| Step { sent: Some(hops), ..step(way, program, at, wires) };
    let a1 = from_container("a1");
    let leaves = to_uplink("up0", Some("br-a"));
    let enters = into_network(A, Some("up0"));
    [
        first("out", "from_container", a1, |n| (out(n), out(n))),
        step("out", "to_uplink", leaves, |n| {
            (out(n).on_link(UPLINK_MAC, ROUTER_MAC), out_translated(n))
        }),
        step("answer to out", "from_uplink", from_uplink("up0"), |n| {
            let arrives = out_translated(n).answer();
            (arrives, arrives.to(out(n).source))
        }),
        step("answer to out", "into_network", enters, |n| {
            let arrives = into_a1(out_translated(n).answer().to(out(n).source));
            (arrives, arrives)
        }),
        first("in", "from_uplink", from_uplink("up0"), |n| (into(n), into(n).to(socket("a1", 80)))),
        step("in", "into_network", enters, |n| {
            let arrives = into_a1(into(n).to(socket("a1", 80)));
            (arrives, arrives)
        }),
        step("answer to in", "from_container", a1, |n| {
            let arrives = from_a1(into(n).answer().from(socket("a1", 80)));
            (arrives, arrives)
        }),
        step("answer to in", "to_uplink", leaves, |n| {
            let arrives = into(n).answer();
            (arrives.from(socket("a1", 80)), arrives)
        }),
        first("switch", "from_container", from_container("a2"), |n| {
            (across(n), across_translated(n))
        }),
        step("answer to switch", "from_container", a1, |n| {
            let arrives = across_translated(n).answer();
            (arrives, arrives.from(across(n).destination))
        }),
        // The MAC addresses of the next link are the kernel's to find.
        fast(1, "fast out", "from_container", a1, |n| {
            (out(n), out(n).from(out_translated(n).source))
        }),
        fast(1, "fast answer to out", "from_uplink", from_uplink("up0"), |n| {
            let arrives = out_translated(n).answer();
            (arrives, into_a1(arrives.to(out(n).source)))
        }),
        fast(1, "fast in", "from_uplink", from_uplink("up0"), |n| {
            (into(n), into_a1(into(n).to(socket("a1", 80))))
        }),
        fast(1, "fast answer to in", "from_container", a1, |n| {
            let answer = from_a1(into(n).answer());
            (answer.from(socket("a1", 80)), answer)
        }),
        fast(0, "fast switch", "from_container", from_container("a2"), |n| {
            (across(n), across_translated(n))
        }),
        fast(0, "fast answer to switch", "from_container", a1, |n| {
            let arrives = across_translated(n).answer();
            (arrives, arrives.from(across(n).destination))
        }),
    ]
}

/// Flows that open. A client's port is in its kernel's own range, which for what goes out means
/// that another one is chosen.
fn openings() -> [Step; 5] {
    fn spread(n: u32, wire: fn(u32) -> Wire) -> Wire {
        let wire = wire(n % 128);
        wire.from(SocketAddrV4::new(*wire.source.ip(), 32_768 + (n / 128) as u16))
    }
    let step = |sent, way, program, at, wires| Step { way, program, at, opens: true, sent, wires };
    let first = |way, program, at, wires| step(None, way, program, at, wires);
    [
        first("out", "from_container", from_container("a1"), |n| {
            let wire = spread(n, out);
            let server = SocketAddrV4::new(Ipv4Addr::from(0x0b00_0001 + n % 128), 443);
            (wire.to(server), wire.to(server))
        }),
        first("in", "from_uplink", from_uplink("up0"), |n| {
            let wire = into(0).from(SocketAddrV4::new(
                Ipv4Addr::from(0x0b00_0001 + n % 128),
                32_768 + (n / 128) as u16,
            ));
            (wire, wire.to(socket("a1", 80)))
        }),
        first("switch", "from_container", from_container("a2"), |n| {
            let source = socket("a2", 1024 + n as u16);
            (across(n).from(source), across_translated(n).from(source))
        }),
        step(Some(1), "fast in", "from_uplink", from_uplink("up0"), |n| {
            let wire = into(0).from(SocketAddrV4::new(
                Ipv4Addr::from(0x0b00_0001 + n % 128),
                32_768 + (n / 128) as u16,
            ));
            (wire, into_a1(wire.to(socket("a1", 80))))
        }),
        step(Some(0), "fast switch", "from_container", from_container("a2"), |n| {
            let source = socket("a2", 1024 + n as u16);
            (across(n).from(source), across_translated(n).from(source))
        }),
    ]
}

/// A family, a transport, and what a packet of an established flow and of a new one carries.
fn carriers() -> impl Iterator<Item = (Family, &'static str, Kind, Kind)> {
    FAMILIES.iter().flat_map(|&family| {
        PROTOCOLS.map(|(protocol, established, new)| (family, protocol, established, new))
    })
}

impl Step {
    /// How flow number n arrives.
    fn arrives(&self, family: Family, kind: Kind, n: u32) -> Vec<u8> {
        Datagram::new(kind, (self.wires)(n).0).frame(family)
    }

    fn case(
        &self,
        age: Age,
        (family, protocol, kind): (Family, &'static str, Kind),
        (flows, runs): (u32, u32),
    ) -> Result<Case> {
        let frames: Vec<_> = (0..flows).map(|n| self.arrives(family, kind, n)).collect();
        // What lies behind the longest headers is the same in all packets.
        let headers = ETHERNET_BYTES + if family == Family::V4 { 20 } else { 40 } + 20;
        let leaves = Datagram::new(kind, (self.wires)((runs - 1) % flows).1);
        let ttl = leaves.ttl;
        Ok(Case {
            place: Place {
                age,
                way: self.way,
                family: family.name(),
                protocol,
                program: self.program,
            },
            at: self.at,
            packets: Rotation::new(&frames, headers)?,
            leaves: leaves.with_ttl(ttl - self.sent.unwrap_or(0)).frame(family),
            is_fast: self.sent.is_some(),
        })
    }
}

/// Writes more memory than caches hold.
fn pass_through_caches() {
    hint::black_box(vec![1_u8; 128 << 20]);
}

/// Opens the established flows and returns the cases about them that are `wanted`.
pub(crate) fn established(
    fixture: &mut Fixture,
    wanted: impl Fn(&Place) -> bool,
) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let mut flows = 0;
    for (family, protocol, kind, _) in carriers() {
        let carried: Vec<_> = ways()
            .iter()
            .map(|step| step.case(Age::Established, (family, protocol, kind), (ESTABLISHED, RUNS)))
            .collect::<Result<_>>()?;
        if !carried.iter().any(|case| wanted(&case.place)) {
            continue;
        }
        for step in ways() {
            if step.opens {
                for n in 0..ESTABLISHED {
                    fixture.run(step.at, &step.arrives(family, kind, n))?;
                }
                flows += ESTABLISHED as usize;
            }
        }
        cases.extend(carried.into_iter().filter(|case| wanted(&case.place)));
    }
    let there = fixture.backend().flows()?.len();
    ensure!(there == flows, "{there} of {flows} flows are open");
    Ok(cases)
}

/// The cases about flows that open, of these ages, that are `wanted`; the table must be empty.
pub(crate) fn new(ages: &[Age], wanted: impl Fn(&Place) -> bool) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (family, protocol, _, kind) in carriers() {
        for step in openings() {
            for &age in ages {
                cases.push(step.case(age, (family, protocol, kind), (NEW, NEW))?);
            }
        }
    }
    cases.retain(|case| wanted(&case.place));
    Ok(cases)
}
