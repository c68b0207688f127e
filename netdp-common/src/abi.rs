//! The contract between an object in the kernel and the agent of tomorrow: the version that names
//! the pin directory, the names of programs and maps, and the one macro that makes wire layouts.

/// Version of every layout in this crate. Pins live under `<bpffs>/netdp/v<ABI>/`, so an agent
/// with other layouts can't adopt them by mistake.
pub const ABI: u32 = 5;

/// Defines a key or value of a map: C layout, no padding the compiler could leave uninitialised,
/// equal iff the bytes are equal. With `<A>` the shape exists for each family of addresses.
///
/// That nothing is padded is proven where it can be: `bytemuck` does it for shapes without a
/// parameter, and a constant that every use evaluates does it for the others.
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
    ($(#[$meta:meta])* pub struct $name:ident<A> { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name<A> {
            $($(#[$field_meta])* pub $field: $type,)+
        }

        impl<A: $crate::addr::Address> $name<A> {
            /// Fails to compile where a field is not `Pod` or the compiler would pad.
            const IS_POD: () = {
                const fn is_pod<T: bytemuck::Pod>() {}
                $(is_pod::<$type>();)+
                assert!(size_of::<Self>() == 0 $(+ size_of::<$type>())+, "padded");
            };
        }

        // SAFETY: `IS_POD` proves, for every address there is, that each field is `Pod` and that
        // nothing lies between them in this C layout.
        unsafe impl<A: $crate::addr::Address> bytemuck::Zeroable for $name<A> {}
        // SAFETY: as above.
        unsafe impl<A: $crate::addr::Address> bytemuck::Pod for $name<A> {}

        const _: () = $name::<$crate::addr::Be32>::IS_POD;
        const _: () = $name::<$crate::addr::Be128>::IS_POD;
    };
}
pub(crate) use wire;

#[cfg(test)]
mod tests {
    use bytemuck::Pod;

    use crate::{
        addr::{Address, Be32, Be128, Tuple},
        aging::Collection,
        config::Config,
        counter::{Counter, CounterKey},
        endpoint::Endpoint,
        flow::{Flow, FlowKey, FlowTable, IndexSet, Place},
        fragment::{FragmentKey, Ports},
        interface::{Interface, Slot},
        network::Network,
        policy::{PolicyKey, PolicyVerdict},
        publish::{Published, PublishedKey, PublishedPort},
        socket::{SocketAddress, SocketPeer},
    };

    fn sizes_of_family<A: Address>() -> [usize; 8] {
        fn size<T: Pod>() -> usize {
            size_of::<T>()
        }
        [
            size::<Flow<A>>(),
            size::<FlowKey<A>>(),
            size::<FragmentKey<A>>(),
            size::<Place<A>>(),
            size::<PolicyKey<A>>(),
            size::<Published<A>>(),
            size::<PublishedKey<A>>(),
            size::<Tuple<A>>(),
        ]
    }

    /// Pinned maps outlive the agent: whoever changes a size here changes [`super::ABI`] too.
    #[test]
    fn layouts_of_abi_5() {
        assert_eq!(sizes_of_family::<Be32>(), [40, 16, 20, 64, 12, 12, 8, 12]);
        assert_eq!(sizes_of_family::<Be128>(), [64, 40, 44, 112, 24, 24, 20, 36]);
        let sizes = [
            ("Collection", size_of::<Collection>(), 28),
            ("Config", size_of::<Config>(), 24),
            ("Counter", size_of::<Counter>(), 16),
            ("CounterKey", size_of::<CounterKey>(), 8),
            ("Endpoint", size_of::<Endpoint>(), 20),
            ("FlowTable", size_of::<FlowTable>(), 32),
            ("IndexSet", size_of::<IndexSet>(), 64),
            ("Interface", size_of::<Interface>(), 40),
            ("Network", size_of::<Network>(), 104),
            ("PolicyVerdict", size_of::<PolicyVerdict>(), 8),
            ("PublishedPort", size_of::<PublishedPort>(), 4),
            ("Ports", size_of::<Ports>(), 8),
            ("Slot", size_of::<Slot>(), 44),
            ("SocketAddress", size_of::<SocketAddress>(), 20),
            ("SocketPeer", size_of::<SocketPeer>(), 32),
        ];
        for (name, size, expected) in sizes {
            assert_eq!(size, expected, "{name}");
        }
        assert_eq!(super::ABI, 5);
    }
}
