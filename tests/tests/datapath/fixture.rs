//! A host of real interfaces in a network namespace of its own, the real backend with a real
//! program on it, and packets that are run through the loaded programs with `BPF_PROG_TEST_RUN`.
//!
//! Owns the layout of the host and the checking of one step. Knows nothing of what is promised.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::BTreeMap,
    fs, hint, iter,
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    maps::{Array, HashMap, Map, MapData},
    programs::{SchedClassifier, TcAttachType},
};
use bytemuck::{bytes_of, pod_read_unaligned};
use netdp::{
    dataplane::{
        Count, Dataplane, Drift, Program,
        ebpf::{Ebpf, EbpfOptions, Features, can_know_ports, cgroup2_mount},
    },
    model::{EndpointId, NetworkId},
};
use netdp_common::{
    addr::{Address, Be16, Be32, Be128, Tuple},
    aging::Collection,
    config::{Config, Timeouts},
    counter::Reason,
    flow::{FlowKey, IPPROTO_UDP, ZONE_WORLD},
    fragment::{FragmentKey, Ports},
    network::Network,
    socket::claim,
};
use netdp_tests::{
    bpf::{self, Checksum, SkbContext},
    packet::ETHERNET_BYTES,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    datagram::{Datagram, Wire, verify},
    family::{Family, ipv6},
    halves::{Collector, Fate, Half, Table, Table4, Table6},
    host::build_host,
    standard::standard_program,
};

/// An ordinary network: a1, a2.
pub(crate) const A: NetworkId = NetworkId(1);
/// Another one: b1.
pub(crate) const B: NetworkId = NetworkId(2);
/// Members may not talk to each other: c1, c2.
pub(crate) const ICC_OFF: NetworkId = NetworkId(3);
/// No way out or in: i1, i2.
pub(crate) const INTERNAL: NetworkId = NetworkId(4);
/// The host is out of reach, too: x1, x2.
pub(crate) const ISOLATED: NetworkId = NetworkId(5);
/// Gateway mode nat-unprotected: u1.
pub(crate) const UNPROTECTED: NetworkId = NetworkId(6);
/// Gateway mode routed: r1.
pub(crate) const ROUTED: NetworkId = NetworkId(7);
/// Masquerade off: m1.
pub(crate) const UNMASQUERADED: NetworkId = NetworkId(8);
/// Masquerade with [`SNAT`]: s1.
pub(crate) const FIXED_SOURCE: NetworkId = NetworkId(9);

/// The host on up0.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// Its second address there.
pub(crate) const HOST_SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
/// Its address for the network with a fixed source.
pub(crate) const SNAT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
/// Somebody outside, by the default route through up0.
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
/// The host on up1.
pub(crate) const HOST_UP1: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
/// Somebody behind up1.
pub(crate) const OUTSIDE_UP1: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 3);
/// The host on tun0, an uplink without Ethernet.
pub(crate) const HOST_TUN: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
/// Somebody behind tun0.
pub(crate) const OUTSIDE_TUN: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 3);
/// Somebody behind other0, which is nobody's uplink.
pub(crate) const OUTSIDE_UNKNOWN: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 3);

/// Somebody whom no route leads to.
pub(crate) const UNREACHABLE: Ipv4Addr = Ipv4Addr::new(11, 9, 0, 3);

/// The host's own MAC on every uplink.
pub(crate) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 1, 0, 0];
/// The next router's on every uplink.
pub(crate) const ROUTER_MAC: [u8; 6] = [2, 0, 0, 2, 0, 0];

/// tc verdicts (linux/bpf.h and linux/pkt_cls.h).
pub(crate) const TCX_NEXT: i32 = -1;
/// See [`TCX_NEXT`].
pub(crate) const TCX_DROP: i32 = 2;
/// See [`TCX_NEXT`].
pub(crate) const TCX_REDIRECT: i32 = 7;

/// Size of the shared flow table, in flows.
pub(crate) const FLOWS: u32 = 4096;

/// Endpoints, by the name of the host's end of their veth, and their networks. The n-th member of
/// a network has address .1 + n.
pub(crate) const MEMBERS: [(&str, NetworkId); 14] = [
    ("a1", A),
    ("a2", A),
    ("b1", B),
    ("c1", ICC_OFF),
    ("c2", ICC_OFF),
    ("i1", INTERNAL),
    ("i2", INTERNAL),
    ("x1", ISOLATED),
    ("x2", ISOLATED),
    ("u1", UNPROTECTED),
    ("r1", ROUTED),
    ("m1", UNMASQUERADED),
    ("s1", FIXED_SOURCE),
    ("s2", FIXED_SOURCE),
];
pub(crate) const BRIDGES: [(&str, NetworkId); 9] = [
    ("br-a", A),
    ("br-b", B),
    ("br-c", ICC_OFF),
    ("br-i", INTERNAL),
    ("br-x", ISOLATED),
    ("br-u", UNPROTECTED),
    ("br-r", ROUTED),
    ("br-m", UNMASQUERADED),
    ("br-s", FIXED_SOURCE),
];
pub(crate) const UPLINKS: [(&str, Ipv4Addr); 4] =
    [("up0", HOST), ("up1", HOST_UP1), ("tun0", HOST_TUN), ("other0", Ipv4Addr::new(10, 3, 0, 2))];
/// Without an Ethernet header.
pub(crate) const TUN: &str = "tun0";
/// Not in the program.
pub(crate) const UNKNOWN: &str = "other0";

/// Address of an endpoint.
pub(crate) fn address(endpoint: &str) -> Ipv4Addr {
    let network = network_of(endpoint);
    let before = MEMBERS.iter().take_while(|(name, _)| *name != endpoint);
    let place = before.filter(|(_, other)| *other == network).count() as u8;
    host_in(network, 2 + place)
}

/// Address and port of an endpoint.
pub(crate) fn socket(endpoint: &str, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address(endpoint), port)
}

/// MAC of an endpoint.
pub(crate) fn mac(endpoint: &str) -> [u8; 6] {
    let [a, b, c, d] = address(endpoint).octets();
    [2, 0x42, a, b, c, d]
}

/// Network of an endpoint.
pub(crate) fn network_of(endpoint: &str) -> NetworkId {
    MEMBERS.iter().find(|(name, _)| *name == endpoint).expect("an endpoint of the fixture").1
}

/// Id of an endpoint.
pub(crate) fn id_of(endpoint: &str) -> EndpointId {
    let place = MEMBERS.iter().position(|(name, _)| *name == endpoint);
    EndpointId(100 + place.expect("an endpoint of the fixture") as u32)
}

/// The n-th address of a network.
pub(crate) fn host_in(network: NetworkId, n: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 19 + network.0 as u8, 0, n)
}

/// Address of a network's bridge.
pub(crate) fn gateway(network: NetworkId) -> Ipv4Addr {
    host_in(network, 1)
}

/// MAC of a network's bridge.
pub(crate) fn bridge_mac(network: NetworkId) -> [u8; 6] {
    [2, 0, 0, 0, network.0 as u8, 1]
}

/// Name of a network's bridge.
pub(crate) fn bridge(network: NetworkId) -> &'static str {
    BRIDGES.iter().find(|(_, id)| *id == network).expect("a network of the fixture").0
}

/// A packet that a container sends to its gateway.
pub(crate) fn from_container_wire(endpoint: &str, port: u16, to: SocketAddrV4) -> Wire {
    Wire {
        source_mac: mac(endpoint),
        destination_mac: bridge_mac(network_of(endpoint)),
        source: socket(endpoint, port),
        destination: to,
    }
}

/// A packet that comes in at an uplink.
pub(crate) fn from_outside_wire(source: SocketAddrV4, destination: SocketAddrV4) -> Wire {
    Wire { source_mac: ROUTER_MAC, destination_mac: UPLINK_MAC, source, destination }
}

/// The programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hook {
    FromContainer,
    IntoNetwork,
    FromUplink,
    ToUplink,
}

impl Hook {
    pub(crate) const ALL: [Self; 4] =
        [Self::FromContainer, Self::IntoNetwork, Self::FromUplink, Self::ToUplink];

    /// An interface where the program is, the direction, the program's name.
    fn place(self) -> (&'static str, TcAttachType, &'static str) {
        match self {
            Self::FromContainer => ("a1", TcAttachType::Ingress, "from_container"),
            Self::IntoNetwork => ("br-a", TcAttachType::Egress, "into_network"),
            Self::FromUplink => ("up0", TcAttachType::Ingress, "from_uplink"),
            Self::ToUplink => ("up0", TcAttachType::Egress, "to_uplink"),
        }
    }
}

/// Where a packet meets a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    hook: Hook,
    interface: &'static str,
    /// Where the packet came into the host; `None` = the host sends it.
    arrived: Option<&'static str>,
}

impl At {
    /// Whether packets there are on their way from or to the outside.
    pub(crate) fn is_at_uplink(self) -> bool {
        UPLINKS.iter().any(|(name, _)| *name == self.interface)
    }

    /// Whether packets there have no Ethernet header.
    pub(crate) fn is_at_tun(self) -> bool {
        self.interface == TUN
    }
}

/// What a container sends.
pub(crate) const fn from_container(endpoint: &'static str) -> At {
    At { hook: Hook::FromContainer, interface: endpoint, arrived: Some(endpoint) }
}

/// What the host's stack sends into a network.
pub(crate) fn into_network(network: NetworkId, arrived: Option<&'static str>) -> At {
    At { hook: Hook::IntoNetwork, interface: bridge(network), arrived }
}

/// What comes in from outside.
pub(crate) const fn from_uplink(uplink: &'static str) -> At {
    At { hook: Hook::FromUplink, interface: uplink, arrived: Some(uplink) }
}

/// What leaves the host.
pub(crate) fn to_uplink(uplink: &'static str, arrived: Option<&'static str>) -> At {
    At { hook: Hook::ToUplink, interface: uplink, arrived }
}

/// What should become of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Want {
    verdict: i32,
    /// `None` = as it came.
    wire: Option<Wire>,
    /// Hops that it loses: nothing of what else a hook does costs one.
    hops: u8,
    /// What is counted for the first frame; drops count every frame.
    counted: Option<(Option<NetworkId>, Reason)>,
}

/// Passes as it came.
pub(crate) fn pass() -> Want {
    Want { verdict: TCX_NEXT, wire: None, hops: 0, counted: None }
}

/// Passes, rewritten.
pub(crate) fn pass_as(wire: Wire) -> Want {
    Want { verdict: TCX_NEXT, wire: Some(wire), hops: 0, counted: None }
}

/// Goes back out of the interface it came from, rewritten.
pub(crate) fn turn_around_as(wire: Wire) -> Want {
    Want { verdict: TCX_REDIRECT, wire: Some(wire), hops: 0, counted: None }
}

/// Sent past the host's stack, rewritten.
pub(crate) fn sent_as(wire: Wire, hops: u8) -> Want {
    Want { verdict: TCX_REDIRECT, wire: Some(wire), hops, counted: None }
}

/// Dropped and counted for a network.
pub(crate) fn dropped(network: NetworkId, reason: Reason) -> Want {
    Want { verdict: TCX_DROP, wire: None, hops: 0, counted: Some((Some(network), reason)) }
}

/// Dropped and counted for none.
pub(crate) fn dropped_for_nobody(reason: Reason) -> Want {
    Want { verdict: TCX_DROP, wire: None, hops: 0, counted: Some((None, reason)) }
}

impl Want {
    /// And opens a flow.
    pub(crate) fn opening(self, network: NetworkId, kind: Reason) -> Self {
        Self { counted: Some((Some(network), kind)), ..self }
    }
}

/// What became of one frame.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) verdict: i32,
    pub(crate) frame: Vec<u8>,
}

/// A flow as the table shows it, between parties.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SeenFlow {
    pub(crate) protocol: u8,
    pub(crate) network: NetworkId,
    pub(crate) source: SocketAddrV4,
    pub(crate) destination: SocketAddrV4,
    pub(crate) translated_source: SocketAddrV4,
    pub(crate) translated_destination: SocketAddrV4,
    pub(crate) state: &'static str,
}

/// The host under test.
pub(crate) struct Fixture {
    /// Of the packets that are run.
    pub(crate) family: Family,
    /// What is said of their checksums.
    checksum: Checksum,
    /// `None` only while it is being reopened: two can't have the same pins.
    backend: Option<Ebpf>,
    /// What was applied last.
    pub(crate) program: Program,
    programs: BTreeMap<Hook, SchedClassifier>,
    /// IPv4's and IPv6's.
    collectors: [Collector; 2],
    ifindexes: BTreeMap<&'static str, u32>,
    bpffs: Bpffs,
}

impl Fixture {
    /// The standard host and program with a flow table of `flows`.
    pub(crate) fn new(flows: u32) -> Result<Self> {
        let ifindexes = HOST_INTERFACES.with(|built| match built.get() {
            Some(ifindexes) => Ok(ifindexes.clone()),
            None => build_host().map(|ifindexes| built.get_or_init(|| ifindexes).clone()),
        })?;
        let bpffs = Bpffs::mount()?;
        let mut backend = Ebpf::open(options(bpffs.path(), flows)?)?;
        let program = standard_program(&ifindexes);
        backend.apply(&program)?;
        Ok(Self {
            family: Family::V4,
            checksum: Checksum::Unknown,
            backend: Some(backend),
            program,
            programs: attached_programs()?,
            collectors: Collector::both(|name| map(&bpffs, name))?,
            ifindexes,
            bpffs,
        })
    }

    /// Runs a test on a fixture that tests share, the standard program on it and no flow in it:
    /// loading the programs takes a second. A test that fails takes the fixture with it.
    pub(crate) fn share(
        family: Family,
        checksum: Checksum,
        test: fn(&mut Self) -> Result<()>,
    ) -> Result<()> {
        thread_local! {
            static SHARED: RefCell<Option<Fixture>> = const { RefCell::new(None) };
            static HOPELESS: Cell<bool> = const { Cell::new(false) };
        }
        let mut fixture = match SHARED.with(RefCell::take) {
            Some(fixture) => fixture,
            None => {
                // What the kernel has refused once it refuses every time, and takes its time.
                if HOPELESS.get() {
                    bail!("build the fixture: failed before, see the first failure");
                }
                HOPELESS.set(true);
                let fixture = Self::new(FLOWS)?;
                HOPELESS.set(false);
                fixture
            }
        };
        fixture.reset()?;
        (fixture.family, fixture.checksum) = (family, checksum);
        test(&mut fixture)?;
        SHARED.set(Some(fixture));
        Ok(())
    }

    fn reset(&mut self) -> Result<()> {
        self.program = standard_program(&self.ifindexes);
        let program = self.program.clone();
        self.backend().apply(&program)?;
        self.set_fast_path(false)?;
        self.remove_flows()?;
        self.forget_fragments::<{ size_of::<FragmentKey<Be32>>() }>("FRAGMENT4")?;
        self.forget_fragments::<{ size_of::<FragmentKey<Be128>>() }>("FRAGMENT6")?;
        let mut usage = self.usage()?;
        for endpoint in usage.keys().collect::<Result<Vec<_>, _>>()? {
            usage.insert(endpoint, 0, 0)?;
        }
        self.set_collection(Timeouts::RFC, true)
    }

    /// Flows that each endpoint has opened, by its generation.
    pub(crate) fn usage(&self) -> Result<HashMap<MapData, u32, u64>> {
        Ok(Map::HashMap(self.map("USAGE")?).try_into()?)
    }

    /// Flows on an endpoint's account.
    pub(crate) fn used_by(&self, endpoint: &str) -> Result<u64> {
        Ok(self.usage()?.get(&id_of(endpoint).0, 0)?)
    }

    /// Says how long idle flows are kept, and whether an agent collects them.
    pub(crate) fn set_collection(&self, timeouts: Timeouts, is_agent_there: bool) -> Result<()> {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).context("read the boot clock")?;
        let at = if is_agent_there { u32::try_from(now.tv_sec())? } else { 0 };
        let mut map: Array<_, [u8; size_of::<Collection>()]> =
            Map::Array(self.map("COLLECTION")?).try_into()?;
        let value =
            <[u8; size_of::<Collection>()]>::try_from(bytes_of(&Collection { timeouts, at }))?;
        Ok(map.set(0, value, 0)?)
    }

    /// Has the backend find out that no socket of the host has a port that source NAT chooses, where the
    /// kernel lets it.
    pub(crate) fn settle_claims(&mut self) -> Result<()> {
        // Once to see what there is, twice to see that it stays.
        for _ in 0..3 {
            self.backend().collect()?;
        }
        let is_unknown = !knows_claims()? || !self.are_ports_claimed()?;
        ensure!(is_unknown, "a socket has a port that source NAT chooses");
        Ok(())
    }

    /// Says in the backend's place that no socket has such a port.
    pub(crate) fn pretend_nobody_claims(&self) -> Result<()> {
        let mut map: Array<_, u64> = Map::Array(self.map("PORT_CLAIMS")?).try_into()?;
        let asked = map.get(&claim::ASKED, 0)?;
        Ok(map.set(claim::SETTLED, claim::settled(asked), 0)?)
    }

    /// Whether a socket of the host may have a port that source NAT chooses.
    pub(crate) fn are_ports_claimed(&self) -> Result<bool> {
        let map: Array<_, u64> = Map::Array(self.map("PORT_CLAIMS")?).try_into()?;
        Ok(map.get(&claim::SETTLED, 0)? != claim::settled(map.get(&claim::ASKED, 0)?))
    }

    /// Says how many flows an endpoint of a network may have opened; 0 = any number.
    pub(crate) fn limit_endpoints(&self, network: NetworkId, flows: u32) -> Result<()> {
        const SIZE: usize = size_of::<Network>();
        let mut map: Array<_, [u8; SIZE]> = Map::Array(self.map("NETWORK")?).try_into()?;
        let mut value: Network = pod_read_unaligned(&map.get(&network.0, 0)?);
        value.endpoint_flows = flows;
        Ok(map.set(network.0, <[u8; SIZE]>::try_from(bytes_of(&value))?, 0)?)
    }

    /// Opens or closes the way past the host's stack.
    pub(crate) fn set_fast_path(&self, is_open: bool) -> Result<()> {
        const SIZE: usize = size_of::<Config>();
        let mut map: Array<_, [u8; SIZE]> = Map::Array(self.map("CONFIG")?).try_into()?;
        let mut value: Config = pod_read_unaligned(&map.get(&0, 0)?);
        value.fast_path = is_open.into();
        Ok(map.set(0, <[u8; SIZE]>::try_from(bytes_of(&value))?, 0)?)
    }

    fn forget_fragments<const KEY: usize>(&self, map: &str) -> Result<()> {
        let data = self.map(map)?;
        let mut fragments: HashMap<_, [u8; KEY], [u8; size_of::<Ports>()]> =
            Map::LruHashMap(data).try_into()?;
        for key in fragments.keys().collect::<Result<Vec<_>, _>>()? {
            fragments.remove(&key)?;
        }
        Ok(())
    }

    /// A fixture for the same packets on a flow table of its own, with room for `flows`.
    pub(crate) fn with_room_for(&self, flows: u32) -> Result<Self> {
        Ok(Self { family: self.family, checksum: self.checksum, ..Self::new(flows)? })
    }

    /// Changes the program and applies it; returns the number of writes.
    pub(crate) fn apply(&mut self, change: impl FnOnce(&mut Program)) -> Result<usize> {
        change(&mut self.program);
        let program = self.program.clone();
        Ok(self.backend().apply(&program)?.writes)
    }

    /// The backend under test.
    pub(crate) fn backend(&mut self) -> &mut Ebpf {
        self.backend.as_mut().expect("open but for the moment of reopening")
    }

    /// How the kernel differs from what was applied last.
    pub(crate) fn drift(&mut self) -> Result<Vec<Drift>> {
        let program = self.program.clone();
        self.backend().check(&program)
    }

    /// Closes the backend as the end of the agent would, and opens it again.
    pub(crate) fn reopen(&mut self) -> Result<()> {
        let options = options(self.bpffs.path(), FLOWS)?;
        self.backend = None;
        self.backend = Some(Ebpf::open(options)?);
        self.programs = attached_programs()?;
        self.collectors = Collector::both(|name| self.map(name))?;
        Ok(())
    }

    /// ifindex of an interface of the fixture.
    pub(crate) fn ifindex(&self, interface: &str) -> u32 {
        self.ifindexes[interface]
    }

    /// Runs one frame through a program, whatever becomes of it.
    pub(crate) fn run(&self, at: At, frame: &[u8]) -> Result<Outcome> {
        // The kernel takes the sum from behind an Ethernet header, which tun0 has not.
        let checksum = if at.interface == TUN { Checksum::Unknown } else { self.checksum };
        let ran = bpf::run(self.loaded(at)?, frame, &self.context(at), checksum)
            .with_context(|| format!("run {} bytes through {at:?}", frame.len()))?;
        Ok(Outcome { verdict: ran.verdict, frame: ran.frame })
    }

    /// Runs a frame on two CPUs at once, where there are two.
    pub(crate) fn run_twice(&self, at: At, frame: &[u8]) -> Result<[Outcome; 2]> {
        /// Looks at the other CPU before giving it ours.
        const LOOKS: usize = 10_000;
        let (program, context) = (self.loaded(at)?, self.context(at));
        let ready = AtomicUsize::new(0);
        let run = |cpu| -> Result<Outcome> {
            let mut here = CpuSet::new();
            here.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &here).context("move to a CPU")?;
            ready.fetch_add(1, Ordering::Relaxed);
            // Whoever waits on a lock comes too late: a run takes a microsecond.
            let mut looks = 0_usize;
            while ready.load(Ordering::Relaxed) < 2 {
                looks += 1;
                if looks.is_multiple_of(LOOKS) {
                    thread::yield_now();
                }
                hint::spin_loop();
            }
            let ran = bpf::run(program, frame, &context, self.checksum)?;
            Ok(Outcome { verdict: ran.verdict, frame: ran.frame })
        };
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask for CPUs")?;
        let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let first = cpus.next().context("find a CPU")?;
        let second = cpus.next().unwrap_or(first);
        thread::scope(|scope| {
            let other = scope.spawn(|| run(second));
            let one = scope.spawn(|| run(first)).join();
            let [one, other] = [one, other.join()].map(|ran| ran.expect("no panic"));
            Ok([one?, other?])
        })
    }

    /// The program that the kernel runs there.
    pub(crate) fn loaded(&self, at: At) -> Result<BorrowedFd<'_>> {
        Ok(self.programs[&at.hook].fd()?.as_fd())
    }

    /// What the kernel says of a packet there.
    pub(crate) fn context(&self, at: At) -> SkbContext {
        SkbContext::new(self.ifindex(at.interface), at.arrived.map_or(0, |name| self.ifindex(name)))
    }

    /// Runs a datagram, frame by frame, and compares verdict, bytes and every counter with what
    /// is wanted. Returns the datagram as it left.
    pub(crate) fn expect(
        &mut self,
        name: &str,
        at: At,
        datagram: &Datagram,
        want: Want,
    ) -> Result<Datagram> {
        self.try_expect(at, datagram, want)
            .with_context(|| format!("{name}: {datagram:?} at {at:?}, wanted {want:?}"))
    }

    fn try_expect(&mut self, at: At, datagram: &Datagram, want: Want) -> Result<Datagram> {
        let wanted = datagram.with_wire(want.wire.unwrap_or(datagram.wire));
        let wanted = wanted.with_ttl(datagram.ttl - want.hops);
        let mut left = Vec::new();
        let frames = datagram.frames(self.family).into_iter().zip(wanted.frames(self.family));
        for (index, (frame, wanted)) in frames.enumerate() {
            // A device without Ethernet sees the packet only; the oracle wants a frame.
            let hidden = if at.interface == TUN { ETHERNET_BYTES } else { 0 };
            let counted = want.counted.filter(|_| index == 0 || want.verdict == TCX_DROP).map(
                |(network, reason)| Count {
                    network,
                    reason,
                    packets: 1,
                    bytes: (frame.len() - hidden) as u64,
                },
            );
            let out = self.expect_frame(at, &frame[hidden..], want.verdict, counted)?;
            if want.verdict == TCX_DROP {
                continue;
            }
            ensure!(
                out == wanted[hidden..],
                "frame {index}: wanted {}\n        seen {}",
                hex(&wanted[hidden..]),
                hex(&out)
            );
            left.push([&wanted[..hidden], &out].concat());
        }
        verify(&left)?;
        Ok(wanted)
    }

    /// Runs a frame and compares verdict and every counter; returns what came out.
    pub(crate) fn expect_frame(
        &mut self,
        at: At,
        frame: &[u8],
        verdict: i32,
        counted: impl IntoIterator<Item = Count>,
    ) -> Result<Vec<u8>> {
        let counted = Vec::from_iter(counted);
        let before = self.backend().counters()?;
        let outcome = self.run(at, frame)?;
        let moved = moved(&before, &self.backend().counters()?);
        ensure!(
            outcome.verdict == verdict && moved == counted,
            "verdict: wanted {verdict}, seen {}; counted: wanted {counted:?}, seen {moved:?}",
            outcome.verdict
        );
        Ok(outcome.frame)
    }

    /// All flows, in order.
    pub(crate) fn flows(&mut self) -> Result<Vec<SeenFlow>> {
        let family = self.family;
        let records = self.backend().flows()?;
        let seen = records.into_iter().map(|record| {
            Ok(SeenFlow {
                protocol: record.protocol,
                network: record.network,
                source: party(family, record.source)?,
                destination: party(family, record.destination)?,
                translated_source: party(family, record.translated_source)?,
                translated_destination: party(family, record.translated_destination)?,
                state: record.state,
            })
        });
        let mut seen = seen.collect::<Result<Vec<_>>>()?;
        seen.sort();
        Ok(seen)
    }

    /// Fails unless these are all flows.
    pub(crate) fn expect_flows(&mut self, wanted: &[SeenFlow]) -> Result<()> {
        let seen = self.flows()?;
        let mut wanted = wanted.to_vec();
        wanted.sort();
        ensure!(seen == wanted, "flows: wanted {wanted:#?}, seen {seen:#?}");
        Ok(())
    }

    /// Shows every half of both tables to `visit`, which says what becomes of it; returns how many
    /// were not kept as they were.
    pub(crate) fn visit_halves(&self, mut visit: impl FnMut(&mut Half) -> Fate) -> Result<usize> {
        let address4 = |address| IpAddr::V4(Be32::into(address));
        let address6 = |address| IpAddr::V6(Be128::into(address));
        let changed = self.table4()?.visit(address4, &mut visit)?;
        Ok(changed + self.table6()?.visit(address6, &mut visit)?)
    }

    /// Numbers of the flows that were looked at last by those who opened others, the latest first.
    pub(crate) fn looked_at(&self) -> Result<impl Iterator<Item = u32>> {
        let table = match self.family {
            Family::V4 => self.table4()?.table()?,
            Family::V6 => self.table6()?.table()?,
        };
        let last = table.top.saturating_sub(1);
        let before = move |number: &u32| Some(number.checked_sub(1).unwrap_or(last));
        Ok(iter::successors(Some(table.hand), before))
    }

    fn table4(&self) -> Result<Table4> {
        Table::open(|name| self.map(name), '4')
    }

    fn table6(&self) -> Result<Table6> {
        Table::open(|name| self.map(name), '6')
    }

    /// The set of the index that UDP from outside belongs in.
    pub(crate) fn set_of(&self, wire: Wire) -> Result<u32> {
        let Wire { source, destination, .. } = wire;
        match self.family {
            Family::V4 => self.table4()?.set_of(&from_world(source, destination, Be32::from)),
            Family::V6 => {
                let address = |party| Be128::from(ipv6(party));
                self.table6()?.set_of(&from_world(source, destination, address))
            }
        }
    }

    /// Has the agent's programs remove all flows; returns how many.
    pub(crate) fn remove_flows(&self) -> Result<usize> {
        let [four, six] = &self.collectors;
        Ok(four.remove(&self.table4()?.keys::<Be32>()?)?
            + six.remove(&self.table6()?.keys::<Be128>()?)?)
    }

    /// Leaves flow tables without flows as they are before they may be used.
    pub(crate) fn unfinish_tables(&self) -> Result<()> {
        self.table4()?.unfinish()?;
        self.table6()?.unfinish()
    }

    /// Makes every half look as if it had been idle for so many seconds more.
    pub(crate) fn age(&self, seconds: u32) -> Result<()> {
        self.visit_halves(|half| {
            half.last_seen = half.last_seen.saturating_sub(seconds);
            Fate::Changed
        })?;
        Ok(())
    }

    /// Number of halves in the flow tables.
    pub(crate) fn halves(&self) -> Result<usize> {
        let mut halves = 0;
        self.visit_halves(|_| {
            halves += 1;
            Fate::Kept
        })?;
        Ok(halves)
    }

    /// A pinned map.
    pub(crate) fn map(&self, name: &str) -> Result<MapData> {
        map(&self.bpffs, name)
    }

    /// Bytes of kernel memory that a map takes.
    pub(crate) fn map_bytes(&self, name: &str) -> Result<u64> {
        let map = self.map(name)?;
        let fd = map.fd().as_fd().as_raw_fd();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))
            .with_context(|| format!("ask for the size of {name}"))?;
        let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        Ok(bytes.context("find its size")?.trim().parse()?)
    }
}

/// Key of UDP from outside.
fn from_world<A: Address>(
    source: SocketAddrV4,
    destination: SocketAddrV4,
    address: impl Fn(Ipv4Addr) -> A,
) -> FlowKey<A> {
    let tuple = Tuple {
        src: address(*source.ip()),
        dst: address(*destination.ip()),
        sport: Be16::new(source.port()),
        dport: Be16::new(destination.port()),
    };
    FlowKey::new(ZONE_WORLD, tuple, IPPROTO_UDP)
}

/// A map by its pin.
fn map(bpffs: &Bpffs, name: &str) -> Result<MapData> {
    let path = bpffs.path().join(format!("netdp/v{}/maps", netdp_common::abi::ABI)).join(name);
    MapData::from_pin(path).with_context(|| format!("open the pin of {name}"))
}

/// Who is at one end of a flow.
fn party(family: Family, (address, port): (impl Into<IpAddr>, u16)) -> Result<SocketAddrV4> {
    let address = address.into();
    let party = family.party(address);
    Ok(SocketAddrV4::new(party.with_context(|| format!("find out who {address} is"))?, port))
}

/// The programs that the kernel runs, found where they are attached.
fn attached_programs() -> Result<BTreeMap<Hook, SchedClassifier>> {
    let mut programs = BTreeMap::new();
    for hook in Hook::ALL {
        let (interface, direction, name) = hook.place();
        let (_, infos) = SchedClassifier::query_tcx(interface, direction)
            .with_context(|| format!("look for {name} on {interface}"))?;
        // A backend attaches behind what is there, so the last is the newest one's.
        let info = infos
            .into_iter()
            .rfind(|info| info.name_as_str().is_some_and(|found| name.starts_with(found)))
            .with_context(|| format!("find {name} on {interface}"))?;
        programs.insert(hook, SchedClassifier::from_program_info(info, name.into())?);
    }
    Ok(programs)
}

/// Whether a backend can know here what ports sockets of the host have.
pub(crate) fn knows_claims() -> Result<bool> {
    Ok(can_know_ports(&Features::probe(), cgroup2_mount()?.as_deref()))
}

/// How the backend is opened.
fn options(bpffs: &Path, flows: u32) -> Result<EbpfOptions> {
    Ok(EbpfOptions {
        bpffs: bpffs.to_owned(),
        flows,
        timeouts: Timeouts::RFC,
        cgroup: cgroup2_mount()?,
        fast_path: false,
    })
}

/// A bpffs of the test's own.
struct Bpffs(TempDir);

impl Bpffs {
    fn mount() -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory for bpffs")?;
        mount(Some("bpffs"), directory.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount a bpffs")?;
        Ok(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // Nobody is left to complain to; the mount namespace ends with the process.
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

/// Counters that moved, and by how much.
fn moved(before: &[Count], after: &[Count]) -> Vec<Count> {
    let old = |count: &Count| {
        before
            .iter()
            .find(|old| (old.network, old.reason) == (count.network, count.reason))
            .map_or((0, 0), |old| (old.packets, old.bytes))
    };
    after
        .iter()
        .filter(|count| (count.packets, count.bytes) != old(count))
        .map(|count| {
            let (packets, bytes) = old(count);
            Count { packets: count.packets - packets, bytes: count.bytes - bytes, ..*count }
        })
        .collect()
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

thread_local! {
    /// Interfaces of the host by name, once it is built: no test changes them, and a namespace
    /// takes the kernel half a second to clear away.
    static HOST_INTERFACES: OnceCell<BTreeMap<&'static str, u32>> = const { OnceCell::new() };
}
