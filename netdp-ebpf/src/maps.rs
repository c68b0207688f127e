//! Every map, and the only code that follows pointers into them.
//!
//! The agent pins them by name and writes all but FLOW4, FRAGMENT4 and the numbers in COUNTERS. The
//! per-CPU arrays are scratch of one program run: not pinned, and read by nobody else.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, lpm_trie::Key},
};
use netdp_common::{
    addr::Be32,
    config::Config,
    counter::{Counter, CounterKey, Reason},
    endpoint::Endpoint4,
    flow::{FLOWS_DEFAULT, Flow4, FlowKey4},
    fragment::{FragmentKey4, Ports},
    interface::Interface,
    network::{NETWORKS_MAX, Network},
    policy::{PREFIX_BASE, PolicyKey4, PolicyVerdict},
    publish::{Published4, PublishedKey4},
};

use crate::{flow::NewFlow, packet::Headers, rewrite::Rewrite};

/// Halves of flows. Written by the programs, collected by the agent. Full: new flows are refused.
#[map]
static FLOW4: HashMap<FlowKey4, Flow4> = HashMap::with_max_entries(2 * FLOWS_DEFAULT, 0);

/// Ports of datagrams in fragments. Full: the oldest datagram is forgotten.
#[map]
static FRAGMENT4: LruHashMap<FragmentKey4, Ports> = LruHashMap::with_max_entries(8192, 0);

/// Published ports. Full: the agent refuses to publish.
#[map]
static PUBLISHED4: HashMap<PublishedKey4, Published4> =
    HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);

/// Container addresses. Full: the agent refuses to connect.
#[map]
static ENDPOINT4: HashMap<Be32, Endpoint4> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Interfaces with a program, by ifindex. Full: the agent refuses to connect.
#[map]
static INTERFACE: HashMap<u32, Interface> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Networks by id.
#[map]
static NETWORK: Array<Network> = Array::with_max_entries(NETWORKS_MAX, 0);

/// Subnets of all networks → network id. Full: the agent refuses to create.
#[map]
static SUBNET4: LpmTrie<Be32, u32> = LpmTrie::with_max_entries(NETWORKS_MAX, BPF_F_NO_PREALLOC);

/// The host's own addresses → 1. Full: the agent says so; the rest is not published on.
#[map]
static LOCAL4: HashMap<Be32, u32> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Compiled policies. Full: the agent refuses the policy.
#[map]
static POLICY4: LpmTrie<PolicyKey4, PolicyVerdict> =
    LpmTrie::with_max_entries(1_048_576, BPF_F_NO_PREALLOC);

/// The one [`Config`].
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Counters; the agent makes the rows of a network with the network.
#[map]
static COUNTERS: PerCpuHashMap<CounterKey, Counter> =
    PerCpuHashMap::with_max_entries(NETWORKS_MAX * 32, BPF_F_NO_PREALLOC);

/// Room for the headers of the packet at hand.
#[map]
static HEADERS: PerCpuArray<Headers> = PerCpuArray::with_max_entries(1, 0);

/// Room for a copy of the half that the packet at hand follows.
#[map]
static HALF: PerCpuArray<Flow4> = PerCpuArray::with_max_entries(1, 0);

/// Room for the one rewrite that a CPU may be at.
#[map]
static REWRITE: PerCpuArray<Rewrite> = PerCpuArray::with_max_entries(1, 0);

/// Room for the one flow that a CPU may be opening.
#[map]
static NEW_FLOW: PerCpuArray<NewFlow> = PerCpuArray::with_max_entries(1, 0);

/// A half in the map. Its slot may be reused for another flow at any time after a removal: what
/// is written through it must be harmless there.
#[derive(Clone, Copy)]
pub(crate) struct FlowRef(*mut Flow4);

impl FlowRef {
    /// A copy of the half.
    #[inline(always)]
    pub(crate) fn load(self) -> Flow4 {
        // SAFETY: the pointer comes from a map lookup and was checked for null.
        unsafe { *self.0 }
    }

    /// Copies the half.
    #[inline(always)]
    pub(crate) fn copy_to(self, copy: &mut Flow4) {
        // SAFETY: as in `load`.
        *copy = unsafe { *self.0 };
    }

    /// Whether it leads where `half` would lead, for the same container.
    #[inline(always)]
    pub(crate) fn leads_where(self, half: &Flow4) -> bool {
        // SAFETY: as in `load`.
        let found = unsafe { &*self.0 };
        found.to.src == half.to.src
            && found.to.dst == half.to.dst
            && found.to.sport == half.to.sport
            && found.to.dport == half.to.dport
            && found.reply_zone == half.reply_zone
            && found.generation == half.generation
    }

    /// Notes a packet. Writes only what is new: an idle cache line stays shared.
    #[inline(always)]
    pub(crate) fn touch(self, half: &Flow4, seen: u8, now: u32) {
        if half.last_seen != now {
            // SAFETY: as in `load`; an aligned word.
            unsafe { (*self.0).last_seen = now };
        }
        if half.seen | seen != half.seen {
            // SAFETY: as in `load`; one byte.
            unsafe { (*self.0).seen = half.seen | seen };
        }
    }

    /// Forgets what was seen, for a new connection between the same ports.
    #[inline(always)]
    pub(crate) fn restart(self) {
        // SAFETY: as in `load`; one byte.
        unsafe { (*self.0).seen = 0 };
    }

    /// Notes that the policy of this generation lets the flow pass.
    #[inline(always)]
    pub(crate) fn approve(self, policy_generation: u32) {
        // SAFETY: as in `load`; an aligned word.
        unsafe { (*self.0).policy_generation = policy_generation };
    }
}

/// Finds a half.
#[inline(always)]
pub(crate) fn flow(key: &FlowKey4) -> Option<FlowRef> {
    FLOW4.get_ptr_mut(key).map(FlowRef)
}

/// Inserts a half unless there is one. Errors: the kernel's, -EEXIST or -E2BIG.
#[inline(always)]
pub(crate) fn insert_flow(key: &FlowKey4, half: &Flow4) -> Result<(), i32> {
    FLOW4.insert(key, half, u64::from(BPF_NOEXIST))
}

/// Removes a half; it may be gone already.
#[inline(always)]
pub(crate) fn remove_flow(key: &FlowKey4) {
    let _ = FLOW4.remove(key);
}

/// Remembers the ports of a datagram whose first fragment this is.
#[inline(always)]
pub(crate) fn remember_fragment(key: &FragmentKey4, ports: &Ports) {
    let _ = FRAGMENT4.insert(key, ports, 0);
}

/// The ports of a later fragment's datagram.
#[inline(always)]
pub(crate) fn fragment(key: &FragmentKey4) -> Option<Ports> {
    // SAFETY: entries are only ever written whole by updates of the map.
    unsafe { FRAGMENT4.get(key) }.copied()
}

/// The target of a published port.
#[inline(always)]
pub(crate) fn published(key: &PublishedKey4) -> Option<Published4> {
    // SAFETY: entries are only ever written whole by updates of the map.
    unsafe { PUBLISHED4.get(key) }.copied()
}

/// The container with this address.
#[inline(always)]
pub(crate) fn endpoint(address: Be32) -> Option<&'static Endpoint4> {
    // SAFETY: entries are only ever written whole by updates of the map.
    unsafe { ENDPOINT4.get(address) }
}

/// What an interface is to us.
#[inline(always)]
pub(crate) fn interface(ifindex: u32) -> Option<&'static Interface> {
    // SAFETY: entries are only ever written whole by updates of the map.
    unsafe { INTERFACE.get(ifindex) }
}

/// A network that is in use.
#[inline(always)]
pub(crate) fn network(id: u32) -> Option<&'static Network> {
    NETWORK.get(id).filter(|network| network.has(netdp_common::network::flag::PRESENT))
}

/// The network whose subnet the address lies in.
#[inline(always)]
pub(crate) fn subnet(address: Be32) -> Option<u32> {
    SUBNET4.get(Key::new(32, address)).copied()
}

/// Whether the host itself has the address.
#[inline(always)]
pub(crate) fn is_local(address: Be32) -> bool {
    LOCAL4.get_ptr(address).is_some()
}

/// What the policy says of a source; `None` where no rule matches.
#[inline(always)]
pub(crate) fn policy(key: PolicyKey4) -> Option<PolicyVerdict> {
    POLICY4.get(Key::new(PREFIX_BASE + 32, key)).copied()
}

/// Room for a packet's headers; holds what was there before.
#[inline(always)]
pub(crate) fn headers() -> Option<&'static mut Headers> {
    let room = HEADERS.get_ptr_mut(0)?;
    // SAFETY: as in `rewrite`.
    Some(unsafe { &mut *room })
}

/// Room for a copy of a half; holds what was there before.
#[inline(always)]
pub(crate) fn half() -> Option<&'static mut Flow4> {
    let room = HALF.get_ptr_mut(0)?;
    // SAFETY: as in `rewrite`.
    Some(unsafe { &mut *room })
}

/// Room for what is to be rewritten; holds what was there before.
#[inline(always)]
pub(crate) fn rewrite() -> Option<&'static mut Rewrite> {
    let room = REWRITE.get_ptr_mut(0)?;
    // SAFETY: this CPU's own, checked for null by the lookup. A hook is done with it before the
    // packet reaches the next one.
    Some(unsafe { &mut *room })
}

/// Room for a flow that is to be opened; holds what was there before.
#[inline(always)]
pub(crate) fn new_flow() -> Option<&'static mut NewFlow> {
    let room = NEW_FLOW.get_ptr_mut(0)?;
    // SAFETY: as in `rewrite`.
    Some(unsafe { &mut *room })
}

/// The host's port ranges.
#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Counts a packet; a row that the agent has not made is not counted.
#[inline(always)]
pub(crate) fn count(network: u32, reason: Reason, bytes: u32) {
    let key = CounterKey { network, reason: reason as u32 };
    if let Some(counter) = COUNTERS.get_ptr_mut(key) {
        // SAFETY: this CPU's own copy, checked for null by the lookup.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}
