//! Addresses and ports in network byte order, and the pair of both that a packet carries.

use core::net::Ipv4Addr;

use crate::abi::wire;

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

    /// `true` for 0.0.0.0.
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        self.raw == 0
    }

    /// `true` in 127.0.0.0/8 (RFC 1122, 3.2.1.3: never outside a host).
    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        self.get() >> 24 == 127
    }

    /// `true` in 224.0.0.0/4 and for 255.255.255.255.
    #[inline(always)]
    pub const fn is_multicast_or_broadcast(self) -> bool {
        self.get() >> 28 == 14 || self.raw == u32::MAX
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

wire! {
    /// Source and destination of an IPv4 packet. For an ICMP query the identifier stands where the
    /// asking side's port would stand and the other port is 0, so that a request and its reply are
    /// each other's reverse and a request is never taken for a reply.
    pub struct Tuple4 {
        /// Source address.
        pub src: Be32,
        /// Destination address.
        pub dst: Be32,
        /// Source port.
        pub sport: Be16,
        /// Destination port.
        pub dport: Be16,
    }
}

impl Tuple4 {
    /// The tuple of the answer to this packet.
    #[inline(always)]
    pub const fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport }
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
    }

    #[test]
    fn address_classes() {
        let class = |a, b, c, d| {
            let address = Be32::from(Ipv4Addr::new(a, b, c, d));
            (address.is_loopback(), address.is_multicast_or_broadcast())
        };
        assert_eq!(class(127, 0, 0, 1), (true, false));
        assert_eq!(class(128, 0, 0, 1), (false, false));
        assert_eq!(class(223, 255, 255, 255), (false, false));
        assert_eq!(class(224, 0, 0, 1), (false, true));
        assert_eq!(class(239, 255, 255, 255), (false, true));
        assert_eq!(class(240, 0, 0, 1), (false, false));
        assert_eq!(class(255, 255, 255, 255), (false, true));
    }
}
