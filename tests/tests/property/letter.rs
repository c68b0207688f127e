//! A packet on its way: a datagram, or an error about one.

use std::net::{Ipv4Addr, SocketAddrV4};

use netdp_common::flow::seen;

use crate::{
    datagram::{Datagram, Kind, SEQUENCE, Wire},
    event::kind_along,
    family::Family,
    icmp_error::{Error, Fault},
    model::{Ends, Packet, Shows},
};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Letter {
    /// Its ends. Those of an error are the ones that an answer to what it quotes would have.
    pub(crate) wire: Wire,
    /// What it carries, or what the answer would carry.
    pub(crate) kind: Kind,
    /// Whether its sequence number is one that nobody awaits.
    pub(crate) forged: bool,
    /// Who complains, where it is an error.
    pub(crate) complainer: Option<Ipv4Addr>,
}

impl Letter {
    /// Its bytes.
    pub(crate) fn frame(&self, family: Family) -> Vec<u8> {
        if let Some(source) = self.complainer {
            let error = Error {
                macs: (self.wire.source_mac, self.wire.destination_mac),
                source,
                destination: *self.wire.destination.ip(),
                fault: Fault::TimeExceeded,
                quoted_bytes: usize::MAX,
            };
            let quoted = self.wire.answer();
            let protocol = self.kind.protocol(family).0;
            let kind = kind_along(protocol, quoted.destination.port() == 0, Kind::Segment);
            return error.about(family, kind, quoted);
        }
        let distance = if self.forged { 1 << 31 } else { 0 };
        let sequence = SEQUENCE.wrapping_add(distance);
        Datagram { sequence, ..Datagram::new(self.kind, self.wire) }.frame(family)
    }

    /// The same with other ends. A router keeps its address; the receiver of the quoted packet has
    /// the one that the packet was sent to.
    pub(crate) fn translated(self, to: Ends) -> Self {
        let is_router = self.complainer != Some(*self.wire.source.ip());
        let complainer = if is_router { self.complainer } else { Some(*to.source.ip()) };
        Self { wire: self.wire.from(to.source).to(to.destination), complainer, ..self }
    }

    /// The same on another link.
    pub(crate) fn on_link(self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Self {
        Self { wire: self.wire.on_link(source_mac, destination_mac), ..self }
    }

    /// Who is said to have sent the packet itself.
    pub(crate) fn sender(&self) -> Ipv4Addr {
        self.complainer.unwrap_or(*self.wire.source.ip())
    }

    /// Who gets it.
    pub(crate) fn receiver(&self) -> SocketAddrV4 {
        self.wire.destination
    }

    /// What the flow table makes of it.
    pub(crate) fn packet(&self, family: Family) -> Packet {
        let ends = Ends { source: self.wire.source, destination: self.wire.destination };
        let shows = self.complainer.is_none().then(|| self.shows());
        Packet { protocol: self.kind.protocol(family).0, ends, shows }
    }

    fn shows(&self) -> Shows {
        let (opens, may_open, more) = match self.kind {
            Kind::Syn => (true, true, 0),
            Kind::SynAck | Kind::Segment => (false, true, seen::DATA | seen::ACK),
            Kind::Fin => (false, true, seen::DATA | seen::ACK | seen::FIN),
            Kind::Reset => (false, false, seen::DATA | seen::RST),
            Kind::Reply => (false, false, seen::DATA),
            _ => (false, true, seen::DATA),
        };
        Shows { bits: seen::ANY | more, opens, may_open, is_in_window: !self.forged }
    }
}
