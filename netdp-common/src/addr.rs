//! Addresses and ports in network byte order, and the pair of both that a packet carries.

use core::{
    cmp::Ordering,
    fmt::Debug,
    hash::{Hash, Hasher},
    net::{Ipv4Addr, Ipv6Addr},
};

use crate::{abi::wire, checksum::Difference};

wire! {
    /// A 16-bit number as it stands in a packet, big-endian in memory.
    pub struct Be16 {
        /// The bytes of the packet, read as a native integer.
        pub raw: u16,
    }
}

wire! {
    /// A 32-bit number or an IPv4 address as it stands in a packet, big-endian in memory.
    pub struct Be32 {
        /// The bytes of the packet, read as a native integer.
        pub raw: u32,
    }
}

/// An IPv6 address as it stands in a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Be128 {
    /// Its four words, each as in [`Be32::raw`].
    pub raw: [u32; 4],
}

// Not derived: a comparison of arrays is a call to memcmp, which eBPF does not have.
impl PartialEq for Be128 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        self.xor(*other) == 0
    }
}

impl Hash for Be128 {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.raw.hash(state);
    }
}

impl PartialOrd for Be128 {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Be128 {
    fn cmp(&self, other: &Self) -> Ordering {
        self.raw.cmp(&other.raw)
    }
}

/// The addresses of a family: [`Be32`] for IPv4, [`Be128`] for IPv6, and there are no others.
pub trait Address:
    Copy + Debug + Default + Eq + Ord + Hash + bytemuck::Pod + sealed::Sealed + 'static
{
    /// Bits of an address.
    const BITS: u32;

    /// `true` for 0.0.0.0 and ::.
    fn is_unspecified(self) -> bool;

    /// `true` in 127.0.0.0/8 (RFC 1122, 3.2.1.3) and for ::1 (RFC 4291, 2.5.3): never outside a
    /// host.
    fn is_loopback(self) -> bool;

    /// `true` for what more than one host takes: 224.0.0.0/4, 255.255.255.255, ff00::/8.
    fn is_multicast_or_broadcast(self) -> bool;

    /// `true` in fe80::/10 (RFC 4291, 2.5.6), which no router forwards. IPv4's 169.254.0.0/16 is
    /// routed like any other by Linux.
    fn is_link_local(self) -> bool;

    /// Bits in which the addresses differ, laid over each other: 0 iff they are equal. A
    /// comparison without a branch, of which the verifier would follow each.
    fn xor(self, other: Self) -> u32;

    /// Its words as they lie in a packet, each as in [`Be32::raw`].
    fn words(&self) -> &[u32];

    /// The part of the address that `mask` leaves.
    #[must_use]
    fn masked(self, mask: Self) -> Self;

    /// What checksums change by when this address becomes another.
    fn difference(self, new: Self) -> Difference;

    /// The last address of the subnet with this mask, where that is a broadcast address.
    fn broadcast(self, mask: Self) -> Option<Self>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Be32 {}
    impl Sealed for super::Be128 {}
}

impl Be16 {
    /// From host byte order.
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self { raw: value.to_be() }
    }

    /// To host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.raw)
    }
}

impl Be32 {
    /// From host byte order.
    #[inline(always)]
    pub const fn new(value: u32) -> Self {
        Self { raw: value.to_be() }
    }

    /// To host byte order.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be(self.raw)
    }
}

impl Address for Be32 {
    const BITS: u32 = 32;

    #[inline(always)]
    fn is_unspecified(self) -> bool {
        self.raw == 0
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.get() >> 24 == 127
    }

    #[inline(always)]
    fn is_multicast_or_broadcast(self) -> bool {
        self.get() >> 28 == 14 || self.raw == u32::MAX
    }

    #[inline(always)]
    fn is_link_local(self) -> bool {
        false
    }

    #[inline(always)]
    fn xor(self, other: Self) -> u32 {
        self.raw ^ other.raw
    }

    #[inline(always)]
    fn words(&self) -> &[u32] {
        core::slice::from_ref(&self.raw)
    }

    #[inline(always)]
    fn masked(self, mask: Self) -> Self {
        Self { raw: self.raw & mask.raw }
    }

    #[inline(always)]
    fn difference(self, new: Self) -> Difference {
        Difference::of(self.raw, new.raw)
    }

    #[inline(always)]
    fn broadcast(self, mask: Self) -> Option<Self> {
        Some(Self { raw: self.raw | !mask.raw })
    }
}

impl Be128 {
    /// The link-local address that follows from a MAC address (RFC 4291, appendix A).
    #[inline(always)]
    pub const fn link_local(mac: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = mac;
        let words = [0xfe80_0000, 0, word(a ^ 2, b, c, 0xff), word(0xfe, d, e, f)];
        Self { raw: [words[0].to_be(), words[1], words[2].to_be(), words[3].to_be()] }
    }

    /// The first word in host byte order.
    #[inline(always)]
    const fn head(self) -> u32 {
        u32::from_be(self.raw[0])
    }
}

#[inline(always)]
const fn word(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_be_bytes([a, b, c, d])
}

impl Address for Be128 {
    const BITS: u32 = 128;

    #[inline(always)]
    fn is_unspecified(self) -> bool {
        self == Self::default()
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self == Self { raw: [0, 0, 0, 1_u32.to_be()] }
    }

    #[inline(always)]
    fn is_multicast_or_broadcast(self) -> bool {
        self.head() >> 24 == 0xff
    }

    #[inline(always)]
    fn is_link_local(self) -> bool {
        self.head() >> 22 == 0xfe80 >> 6
    }

    #[inline(always)]
    fn xor(self, other: Self) -> u32 {
        let ([a, b, c, d], [e, f, g, h]) = (self.raw, other.raw);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h)
    }

    #[inline(always)]
    fn words(&self) -> &[u32] {
        &self.raw
    }

    #[inline(always)]
    fn masked(self, mask: Self) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (self.raw, mask.raw);
        Self { raw: [a & e, b & f, c & g, d & h] }
    }

    #[inline(always)]
    fn difference(self, new: Self) -> Difference {
        let ([a, b, c, d], [e, f, g, h]) = (self.raw, new.raw);
        Difference::of(a, e)
            .plus(Difference::of(b, f))
            .plus(Difference::of(c, g))
            .plus(Difference::of(d, h))
    }

    #[inline(always)]
    fn broadcast(self, _: Self) -> Option<Self> {
        None
    }
}

impl From<Ipv4Addr> for Be32 {
    fn from(address: Ipv4Addr) -> Self {
        Self::new(u32::from(address))
    }
}

impl From<Be32> for Ipv4Addr {
    fn from(address: Be32) -> Self {
        Self::from(address.get())
    }
}

impl From<Ipv6Addr> for Be128 {
    fn from(address: Ipv6Addr) -> Self {
        bytemuck::cast(address.octets())
    }
}

impl From<Be128> for Ipv6Addr {
    fn from(address: Be128) -> Self {
        Self::from(bytemuck::cast::<_, [u8; 16]>(address))
    }
}

wire! {
    /// Source and destination of a packet. For an ICMP query the identifier stands where the
    /// asking side's port would stand and the other port is 0, so that a request and its reply are
    /// each other's reverse and a request is never taken for a reply. A protocol without ports has
    /// 0 in both.
    pub struct Tuple<A> {
        /// Source address.
        pub src: A,
        /// Destination address.
        pub dst: A,
        /// Source port.
        pub sport: Be16,
        /// Destination port.
        pub dport: Be16,
    }
}

impl<A: Address> Tuple<A> {
    /// The tuple of the answer to this packet.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport }
    }

    /// As [`Address::xor`], of all of it.
    #[inline(always)]
    pub fn xor(self, other: Self) -> u32 {
        self.src.xor(other.src) | self.dst.xor(other.dst) | (self.ports() ^ other.ports())
    }

    /// Both ports as one word of the packet, source first.
    #[inline(always)]
    pub const fn ports(self) -> u32 {
        let ([a, b], [c, d]) = (self.sport.raw.to_ne_bytes(), self.dport.raw.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    }

    /// The identifier of an ICMP query: one of the ports holds it and the other is 0.
    #[inline(always)]
    pub const fn identifier(self) -> Be16 {
        Be16 { raw: self.sport.raw | self.dport.raw }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lie_big_endian_in_memory() {
        assert_eq!(bytemuck::bytes_of(&Be16::new(0x1234)), [0x12, 0x34]);
        assert_eq!(bytemuck::bytes_of(&Be32::from(Ipv4Addr::new(10, 1, 2, 3))), [10, 1, 2, 3]);
        assert_eq!(Be16::new(8080).get(), 8080);
        assert_eq!(Ipv4Addr::from(Be32::new(0x0a01_0203)), Ipv4Addr::new(10, 1, 2, 3));
        let address = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 3, 4, 5, 6);
        assert_eq!(bytemuck::bytes_of(&Be128::from(address)), address.octets());
        assert_eq!(Ipv6Addr::from(Be128::from(address)), address);
    }

    #[test]
    fn address_classes_of_ipv4() {
        let class = |a, b, c, d| {
            let address = Be32::from(Ipv4Addr::new(a, b, c, d));
            (address.is_loopback(), address.is_multicast_or_broadcast(), address.is_link_local())
        };
        assert_eq!(class(127, 0, 0, 1), (true, false, false));
        assert_eq!(class(128, 0, 0, 1), (false, false, false));
        assert_eq!(class(223, 255, 255, 255), (false, false, false));
        assert_eq!(class(224, 0, 0, 1), (false, true, false));
        assert_eq!(class(239, 255, 255, 255), (false, true, false));
        assert_eq!(class(240, 0, 0, 1), (false, false, false));
        assert_eq!(class(255, 255, 255, 255), (false, true, false));
    }

    #[test]
    fn address_classes_of_ipv6_are_those_of_the_standard_library() {
        for text in
            ["::", "::1", "::2", "fe80::1", "febf::1", "fec0::1", "fe7f::1", "ff02::1", "fd00::1"]
        {
            let address: Ipv6Addr = text.parse().unwrap();
            let ours = Be128::from(address);
            assert_eq!(ours.is_unspecified(), address.is_unspecified(), "{text}");
            assert_eq!(ours.is_loopback(), address.is_loopback(), "{text}");
            assert_eq!(ours.is_multicast_or_broadcast(), address.is_multicast(), "{text}");
            assert_eq!(ours.is_link_local(), address.is_unicast_link_local(), "{text}");
        }
    }

    #[test]
    fn a_link_local_address_follows_from_the_mac() {
        let address = Be128::link_local([0x02, 0x42, 0xac, 0x14, 0x00, 0x02]);
        assert_eq!(Ipv6Addr::from(address).to_string(), "fe80::42:acff:fe14:2");
    }

    #[test]
    fn masks_leave_the_prefix() {
        let mask = Be128::from(Ipv6Addr::new(0xffff, 0xffff, 0xffff, 0xff00, 0, 0, 0, 0));
        let address = Be128::from(Ipv6Addr::new(0xfd00, 1, 2, 0x1234, 5, 6, 7, 8));
        let subnet = Ipv6Addr::new(0xfd00, 1, 2, 0x1200, 0, 0, 0, 0);
        assert_eq!(Ipv6Addr::from(address.masked(mask)), subnet);
        assert_ne!(address, address.masked(mask));
    }
}
