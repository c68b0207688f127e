//! Every map, and, with `table.rs` for the flow tables, the only code that follows pointers into them.
//!
//! The agent pins them by name and writes all but the flow tables, which it only makes, the fragment
//! tables, SOCKET_ORIGIN, the requests in PORT_CLAIMS and the numbers in COUNTERS. The per-CPU arrays
//! are scratch of one program run: not pinned, and read by nobody else.

use core::{arch::asm, ptr::NonNull};

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    helpers::generated::bpf_map_pop_elem,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, Stack, lpm_trie::Key},
};
use netdp_common::{
    addr::{Address, Be32, Be128},
    aging::Collection,
    config::Config,
    counter::{Counter, CounterKey},
    endpoint::Endpoint,
    flow::{FLOWS_DEFAULT, Flow, FlowKey, FlowTable, IndexSet, Place, sets},
    fragment::{FragmentKey, Ports},
    interface::{Interface, SLOTS, Slot, slot},
    network::{NETWORKS_MAX, Network},
    policy::{PREFIX_BASE, PolicyKey, PolicyVerdict},
    publish::{Published, PublishedKey, PublishedPort},
    socket::{SocketAddress, SocketPeer, claim},
};

use crate::{
    aging::Suspect,
    family::{Family, V4, V6},
    flow::NewFlow,
    packet::Headers,
    refuse::Allowance,
    rewrite::Rewrite,
};

/// Interfaces with a program, by ifindex. Full: the agent refuses to connect.
#[map]
static INTERFACE: HashMap<u32, Interface> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// The entries of INTERFACE, found without a hash. One that is not here is there.
#[map]
static INTERFACE_SLOT: Array<Slot> = Array::with_max_entries(SLOTS, 0);

/// Packets of flows that went past the host's stack, and those that it was left.
#[map]
static LANES: PerCpuArray<u64> = PerCpuArray::with_max_entries(2, 0);

/// Networks by id.
#[map]
static NETWORK: Array<Network> = Array::with_max_entries(NETWORKS_MAX, 0);

/// What sockets of the host dialled. Written by the socket hooks, purged by the agent. Full: the
/// socket that was silent for the longest time is forgotten and sees the container's own address.
#[map]
static SOCKET_ORIGIN: LruHashMap<SocketPeer, SocketAddress> =
    LruHashMap::with_max_entries(32_768, 0);

/// Ports that are published on some addresses → 1. Full: the agent refuses to publish.
#[map]
static PUBLISHED_PORT: HashMap<PublishedPort, u32> =
    HashMap::with_max_entries(524_288, BPF_F_NO_PREALLOC);

/// Whether a socket of the host may have a port that source NAT chooses: see [`claim`].
#[map]
static PORT_CLAIMS: Array<u64> = Array::with_max_entries(2, 0);

/// The network namespaces of sockets that the agent names by their cookies, while it starts. Full:
/// the agent can't be asking twice.
#[map]
static NAMESPACE: HashMap<u64, u64> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// The one [`Config`].
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// The one [`Collection`].
#[map]
static COLLECTION: Array<Collection> = Array::with_max_entries(1, 0);

/// Flows that each endpoint has opened, by its generation; the agent makes the row with the
/// endpoint.
#[map]
static USAGE: HashMap<u32, u64> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// How often each endpoint was told of what is refused, by ifindex. Full: the one that was told
/// longest ago starts afresh.
#[map]
static ALLOWANCE: LruHashMap<u32, Allowance> = LruHashMap::with_max_entries(4096, 0);

/// Counters; the agent makes the rows of a network with the network.
#[map]
static COUNTERS: PerCpuHashMap<CounterKey, Counter> =
    PerCpuHashMap::with_max_entries(NETWORKS_MAX * 32, BPF_F_NO_PREALLOC);

/// The maps of a family.
pub(crate) trait Maps: Sized {
    /// Its addresses.
    type Address: Address;

    /// What holds for the whole flow table.
    fn flow_table() -> Option<NonNull<FlowTable>>;

    /// A set of the flow table's index.
    fn index_set(number: u32) -> Option<NonNull<IndexSet>>;

    /// A place of the flow table.
    fn place(number: u32) -> Option<NonNull<Place<Self::Address>>>;

    /// Takes a number that was given back. Returns whether there was one.
    fn take_number(number: &mut u32) -> bool;

    /// Gives back a number that was taken.
    fn give_number(number: &u32);

    /// Remembers the ports of a datagram whose first fragment this is.
    fn remember_fragment(key: &FragmentKey<Self::Address>, ports: &Ports);

    /// The ports of a later fragment's datagram.
    fn fragment(key: &FragmentKey<Self::Address>) -> Option<Ports>;

    /// The target of a published port.
    fn published(key: &PublishedKey<Self::Address>) -> Option<Published<Self::Address>>;

    /// The container with this address.
    fn endpoint(address: Self::Address) -> Option<&'static Endpoint>;

    /// The network whose subnet the address lies in.
    fn network_of(address: Self::Address) -> Option<u32>;

    /// Whether the host itself has the address.
    fn is_local(address: Self::Address) -> bool;

    /// What the policy says of a source; `None` where no rule matches.
    fn policy(key: PolicyKey<Self::Address>) -> Option<PolicyVerdict>;

    /// Room for a packet's headers; holds what was there before.
    fn headers() -> Option<&'static mut Headers<Self>>
    where
        Self: Family;

    /// Room for a copy of a half; holds what was there before.
    fn half() -> Option<&'static mut Flow<Self::Address>>;

    /// Room for the key of a half that is looked for; holds what was there before.
    fn wanted() -> Option<&'static mut FlowKey<Self::Address>>;

    /// Room for what is to be rewritten; holds what was there before.
    fn rewrite() -> Option<&'static mut Rewrite<Self>>
    where
        Self: Family;

    /// Room for a flow that is to be opened; holds what was there before.
    fn new_flow() -> Option<&'static mut NewFlow<Self>>
    where
        Self: Family;

    /// Room for a flow that may have to go; holds what was there before.
    fn suspect() -> Option<&'static mut Suspect<Self>>
    where
        Self: Family;
}

/// Of an array that may be mapped into a process, the values begin where a page does; of others they
/// begin somewhere in a cache line, and one that is as large as a line lies in two (Linux 5.5).
const IN_LINES: u32 = BPF_F_MMAPABLE;

/// The maps of one family, and the way to them.
macro_rules! maps {
    (
        $family:ident, $address:ident, $table:ident, $flow:ident, $index:ident, $free:ident, $fragment:ident, $published:ident,
        $endpoint:ident, $subnet:ident, $local:ident, $policy:ident, $headers:ident, $half:ident, $wanted:ident,
        $rewrite:ident, $new_flow:ident, $suspect:ident
    ) => {
        /// The one [`FlowTable`].
        #[map]
        static $table: Array<FlowTable> = Array::with_max_entries(1, 0);

        /// Halves of flows, by place. Written by the programs, collected by the agent. Full: new flows
        /// are refused.
        #[map]
        static $flow: Array<Place<$address>> = Array::with_max_entries(2 * FLOWS_DEFAULT, IN_LINES);

        /// Where halves lie, by the hash of their keys.
        #[map]
        static $index: Array<IndexSet> = Array::with_max_entries(sets(FLOWS_DEFAULT), IN_LINES);

        /// Numbers that flows had; the last that was given back is the first to be taken.
        #[map]
        static $free: Stack<u32> = Stack::with_max_entries(FLOWS_DEFAULT, 0);

        /// Ports of datagrams in fragments. Full: the oldest datagram is forgotten.
        #[map]
        static $fragment: LruHashMap<FragmentKey<$address>, Ports> =
            LruHashMap::with_max_entries(8192, 0);

        /// Published ports. Full: the agent refuses to publish.
        #[map]
        static $published: HashMap<PublishedKey<$address>, Published<$address>> =
            HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);

        /// Container addresses. Full: the agent refuses to connect.
        #[map]
        static $endpoint: HashMap<$address, Endpoint> =
            HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

        /// Subnets of all networks → network id. Full: the agent refuses to create.
        #[map]
        static $subnet: LpmTrie<$address, u32> =
            LpmTrie::with_max_entries(NETWORKS_MAX, BPF_F_NO_PREALLOC);

        /// The host's own addresses → 1. Full: the agent says so; the rest is not published on.
        #[map]
        static $local: HashMap<$address, u32> =
            HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

        /// Compiled policies. Full: the agent refuses the policy.
        #[map]
        static $policy: LpmTrie<PolicyKey<$address>, PolicyVerdict> =
            LpmTrie::with_max_entries(1_048_576, BPF_F_NO_PREALLOC);

        /// Room for the headers of the packet at hand.
        #[map]
        static $headers: PerCpuArray<Headers<$family>> = PerCpuArray::with_max_entries(1, 0);

        /// Room for a copy of the half that the packet at hand follows.
        #[map]
        static $half: PerCpuArray<Flow<$address>> = PerCpuArray::with_max_entries(1, 0);

        /// Room for the key of a half that is looked for.
        #[map]
        static $wanted: PerCpuArray<FlowKey<$address>> = PerCpuArray::with_max_entries(1, 0);

        /// Room for the one rewrite that a CPU may be at.
        #[map]
        static $rewrite: PerCpuArray<Rewrite<$family>> = PerCpuArray::with_max_entries(1, 0);

        /// Room for the one flow that a CPU may be opening.
        #[map]
        static $new_flow: PerCpuArray<NewFlow<$family>> = PerCpuArray::with_max_entries(1, 0);

        /// Room for the one flow that a CPU may be removing.
        #[map]
        static $suspect: PerCpuArray<Suspect<$family>> = PerCpuArray::with_max_entries(1, 0);

        impl Maps for $family {
            type Address = $address;

            #[inline(always)]
            fn flow_table() -> Option<NonNull<FlowTable>> {
                $table.get_ptr_mut(0).and_then(NonNull::new)
            }

            #[inline(always)]
            fn index_set(number: u32) -> Option<NonNull<IndexSet>> {
                $index.get_ptr_mut(number).and_then(NonNull::new)
            }

            #[inline(always)]
            fn place(number: u32) -> Option<NonNull<Place<$address>>> {
                $flow.get_ptr_mut(number).and_then(NonNull::new)
            }

            #[inline(always)]
            fn take_number(number: &mut u32) -> bool {
                let free = (&raw const $free).cast_mut().cast();
                // SAFETY: the map is a stack of such numbers. `Stack::pop` would take the detour
                // over the stack of the program.
                unsafe { bpf_map_pop_elem(free, (&raw mut *number).cast()) == 0 }
            }

            #[inline(always)]
            fn give_number(number: &u32) {
                // It has room for all numbers that there are.
                let _ = $free.push(number, 0);
            }

            #[inline(always)]
            fn remember_fragment(key: &FragmentKey<$address>, ports: &Ports) {
                let _ = $fragment.insert(key, ports, 0);
            }

            #[inline(always)]
            fn fragment(key: &FragmentKey<$address>) -> Option<Ports> {
                // SAFETY: entries are only ever written whole by updates of the map.
                unsafe { $fragment.get(key) }.copied()
            }

            #[inline(always)]
            fn published(key: &PublishedKey<$address>) -> Option<Published<$address>> {
                // SAFETY: entries are only ever written whole by updates of the map.
                unsafe { $published.get(key) }.copied()
            }

            #[inline(always)]
            fn endpoint(address: $address) -> Option<&'static Endpoint> {
                // SAFETY: entries are only ever written whole by updates of the map.
                unsafe { $endpoint.get(address) }
            }

            #[inline(always)]
            fn network_of(address: $address) -> Option<u32> {
                $subnet.get(Key::new($address::BITS, address)).copied()
            }

            #[inline(always)]
            fn is_local(address: $address) -> bool {
                $local.get_ptr(address).is_some()
            }

            #[inline(always)]
            fn policy(key: PolicyKey<$address>) -> Option<PolicyVerdict> {
                $policy.get(Key::new(PREFIX_BASE + $address::BITS, key)).copied()
            }

            #[inline(always)]
            fn headers() -> Option<&'static mut Headers<Self>> {
                scratch(&$headers)
            }

            #[inline(always)]
            fn half() -> Option<&'static mut Flow<$address>> {
                scratch(&$half)
            }

            #[inline(always)]
            fn wanted() -> Option<&'static mut FlowKey<$address>> {
                scratch(&$wanted)
            }

            #[inline(always)]
            fn rewrite() -> Option<&'static mut Rewrite<Self>> {
                scratch(&$rewrite)
            }

            #[inline(always)]
            fn new_flow() -> Option<&'static mut NewFlow<Self>> {
                scratch(&$new_flow)
            }

            #[inline(always)]
            fn suspect() -> Option<&'static mut Suspect<Self>> {
                scratch(&$suspect)
            }
        }
    };
}

maps!(
    V4, Be32, TABLE4, FLOW4, INDEX4, FREE4, FRAGMENT4, PUBLISHED4, ENDPOINT4, SUBNET4, LOCAL4,
    POLICY4, HEADERS4, HALF4, WANTED4, REWRITE4, NEW_FLOW4, SUSPECT4
);
maps!(
    V6, Be128, TABLE6, FLOW6, INDEX6, FREE6, FRAGMENT6, PUBLISHED6, ENDPOINT6, SUBNET6, LOCAL6,
    POLICY6, HEADERS6, HALF6, WANTED6, REWRITE6, NEW_FLOW6, SUSPECT6
);

/// An endpoint's allowance of errors.
#[inline(always)]
pub(crate) fn allowance(ifindex: u32) -> Option<&'static mut Allowance> {
    if ALLOWANCE.get_ptr(ifindex).is_none() {
        let _ = ALLOWANCE.insert(ifindex, Allowance::default(), 0);
    }
    let allowance = ALLOWANCE.get_ptr_mut(ifindex)?;
    // SAFETY: checked for null by the lookup. Numbers that two CPUs write at once are still
    // numbers, and a slot of the map keeps its size when it is reused.
    Some(unsafe { &mut *allowance })
}

/// This CPU's room.
#[expect(clippy::mut_from_ref, reason = "each CPU has a room of its own in the map")]
#[inline(always)]
fn scratch<T>(map: &'static PerCpuArray<T>) -> Option<&'static mut T> {
    let room = map.get_ptr_mut(0)?;
    // SAFETY: this CPU's own, checked for null by the lookup. A hook is done with it before the
    // packet reaches the next one.
    Some(unsafe { &mut *room })
}

/// Copies a half from and to a map.
#[inline(always)]
pub(crate) fn copy_half<A: Address>(from: &Flow<A>, to: &mut Flow<A>) {
    let (from, to): (*const u64, *mut u64) = ((&raw const *from).cast(), (&raw mut *to).cast());
    // Word by word: of a whole assignment the compiler would make a detour over the stack.
    for word in 0..size_of::<Flow<A>>() / size_of::<u64>() {
        // SAFETY: the kernel aligns values of maps to 8 bytes; a half is a whole number of words.
        let value = unsafe { from.wrapping_add(word).read_volatile() };
        // SAFETY: as above.
        unsafe { to.wrapping_add(word).write_volatile(value) };
    }
}

/// A way from one hook to the next: a place in LANES.
#[derive(Clone, Copy)]
pub(crate) enum Lane {
    /// Past the host's stack.
    Fast,
    /// By it.
    Stack,
}

/// Counts a packet of a flow.
#[inline(always)]
pub(crate) fn count_lane(lane: Lane) {
    if let Some(packets) = LANES.get_ptr_mut(lane as u32) {
        // SAFETY: this CPU's own, checked for null by the lookup.
        unsafe { *packets += 1 };
    }
}

/// What an interface is to us.
#[inline(always)]
pub(crate) fn interface(ifindex: u32) -> Option<&'static Interface> {
    near_interface(ifindex).or_else(|| far_interface(ifindex))
}

/// The same, where no hash is needed to find it.
#[inline(always)]
pub(crate) fn near_interface(ifindex: u32) -> Option<&'static Interface> {
    let found = INTERFACE_SLOT.get(slot(ifindex))?;
    (found.ifindex == ifindex).then_some(&found.interface)
}

#[inline(always)]
fn far_interface(ifindex: u32) -> Option<&'static Interface> {
    // SAFETY: entries are only ever written whole by updates of the map.
    unsafe { INTERFACE.get(ifindex) }
}

/// A network that is in use.
#[inline(always)]
pub(crate) fn network(id: u32) -> Option<&'static Network> {
    NETWORK.get(id).filter(|network| network.has(netdp_common::network::flag::PRESENT))
}

/// How flows end at present.
#[inline(always)]
pub(crate) fn collection() -> Option<&'static Collection> {
    COLLECTION.get(0)
}

/// The number of flows that an endpoint has opened.
#[derive(Clone, Copy)]
pub(crate) struct Usage(NonNull<u64>);

impl Usage {
    /// As it was a moment ago.
    #[inline(always)]
    pub(crate) fn get(self) -> u64 {
        // SAFETY: an aligned word of a map, checked for null by the lookup.
        unsafe { self.0.as_ptr().read_volatile() }
    }

    /// Adds to it; other CPUs do, too.
    #[inline(always)]
    pub(crate) fn add(self, number: i64) {
        add(self.0, number);
    }
}

/// Adds to an aligned word of a map, to which the programs write in no other way.
#[inline(always)]
fn add(word: NonNull<u64>, number: i64) {
    // The target has this instruction from its first version on, but none that returns a value
    // (Linux 5.12), so `core` offers no atomics for it.
    // SAFETY: checked for null by the lookup.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) word.as_ptr(), in(reg) number) };
}

/// As [`add`], to half a word.
#[inline(always)]
pub(crate) fn add_word(word: NonNull<u32>, number: i64) {
    // SAFETY: as in `add`.
    unsafe { asm!("lock *(u32 *)({0} + 0) += {1}", in(reg) word.as_ptr(), in(reg) number) };
}

/// See [`Usage`]; `None` where the agent counts for nobody, and for the world, whose generation is 0.
#[inline(always)]
pub(crate) fn usage(generation: u32) -> Option<Usage> {
    if generation == 0 {
        return None;
    }
    USAGE.get_ptr_mut(generation).and_then(NonNull::new).map(Usage)
}

/// Notes that a program of the host asks for a port that source NAT chooses.
#[inline(always)]
pub(crate) fn claim_port() {
    if let Some(asked) = PORT_CLAIMS.get_ptr_mut(claim::ASKED).and_then(NonNull::new) {
        add(asked, 1);
    }
}

/// Whether a socket of the host may have a port that source NAT chooses.
#[inline(always)]
pub(crate) fn are_ports_claimed() -> bool {
    let claims = |place| {
        // SAFETY: an aligned word of a map, checked for null by the lookup.
        PORT_CLAIMS.get_ptr(place).map(|word| unsafe { word.read_volatile() })
    };
    let (Some(asked), Some(settled)) = (claims(claim::ASKED), claims(claim::SETTLED)) else {
        return true;
    };
    settled != claim::settled(asked)
}

/// What a socket of the host dialled before it came to talk to this peer.
#[inline(always)]
pub(crate) fn socket_origin(peer: &SocketPeer) -> Option<SocketAddress> {
    // SAFETY: entries are only ever written whole by updates of the map.
    unsafe { SOCKET_ORIGIN.get(peer) }.copied()
}

/// Remembers what a socket dialled. Where there is no memory for it, the socket sees the
/// container's own address.
#[inline(always)]
pub(crate) fn remember_socket_origin(peer: &SocketPeer, dialled: &SocketAddress) {
    let _ = SOCKET_ORIGIN.insert(peer, dialled, 0);
}

/// Forgets what a socket dialled; it may be forgotten already.
#[inline(always)]
pub(crate) fn forget_socket_origin(peer: &SocketPeer) {
    let _ = SOCKET_ORIGIN.remove(peer);
}

/// Whether a port is published on some addresses; one that is published on all is not looked for.
#[inline(always)]
pub(crate) fn is_published_somewhere(port: &PublishedPort) -> bool {
    PUBLISHED_PORT.get_ptr(port).is_some()
}

/// Tells the agent the namespace of a socket that it asks about.
#[inline(always)]
pub(crate) fn name_namespace(socket: u64, namespace: u64) {
    if NAMESPACE.get_ptr(socket).is_some() {
        let _ = NAMESPACE.insert(socket, namespace, 0);
    }
}

/// The host's port ranges.
#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Counts a packet for a reason ([`netdp_common::counter::Reason`]), given by its number; a row that the agent has not made is not
/// counted.
#[inline(always)]
pub(crate) fn count(network: u32, reason: u32, bytes: u32) {
    let key = CounterKey { network, reason };
    if let Some(counter) = COUNTERS.get_ptr_mut(key) {
        // SAFETY: this CPU's own copy, checked for null by the lookup.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}
