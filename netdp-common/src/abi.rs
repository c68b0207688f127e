//! The contract between an object in the kernel and the agent of tomorrow: the version that names
//! the pin directory, the names of programs and maps, and the one macro that makes wire layouts.

/// Version of every layout in this crate. Pins live under `<bpffs>/netdp/v<ABI>/`, so an agent
/// with other layouts can't adopt them by mistake.
pub const ABI: u32 = 1;

/// Defines a key or value of a map: C layout, no padding the compiler could leave uninitialised
/// (`bytemuck::Pod` refuses it at compile time), equal iff the bytes are equal.
macro_rules! wire {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[derive(bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)+
        }
    };
}
pub(crate) use wire;

#[cfg(test)]
mod tests {
    use crate::{
        addr::Tuple4,
        config::Config,
        counter::{Counter, CounterKey},
        endpoint::Endpoint4,
        flow::{Flow4, FlowKey4},
        fragment::{FragmentKey4, Ports},
        interface::Interface,
        network::Network,
        policy::{PolicyKey4, PolicyVerdict},
        publish::{Published4, PublishedKey4},
    };

    /// Pinned maps outlive the agent: whoever changes a size here changes [`super::ABI`] too.
    #[test]
    fn layouts_of_abi_1() {
        let sizes = [
            ("Config", size_of::<Config>(), 8),
            ("Counter", size_of::<Counter>(), 16),
            ("CounterKey", size_of::<CounterKey>(), 8),
            ("Endpoint4", size_of::<Endpoint4>(), 20),
            ("Flow4", size_of::<Flow4>(), 36),
            ("FlowKey4", size_of::<FlowKey4>(), 20),
            ("FragmentKey4", size_of::<FragmentKey4>(), 16),
            ("Interface", size_of::<Interface>(), 20),
            ("Network", size_of::<Network>(), 36),
            ("PolicyKey4", size_of::<PolicyKey4>(), 12),
            ("PolicyVerdict", size_of::<PolicyVerdict>(), 8),
            ("Ports", size_of::<Ports>(), 4),
            ("Published4", size_of::<Published4>(), 12),
            ("PublishedKey4", size_of::<PublishedKey4>(), 8),
            ("Tuple4", size_of::<Tuple4>(), 12),
        ];
        for (name, size, expected) in sizes {
            assert_eq!(size, expected, "{name}");
        }
        assert_eq!(super::ABI, 1);
    }
}
