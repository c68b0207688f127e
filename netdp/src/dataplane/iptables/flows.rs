//! Connections that netfilter tracks: which are ours, and which lead to what is gone.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use ipnet::IpNet;

use crate::{
    dataplane::{FlowRecord, Program, PublishedKey},
    model::{NetworkId, Protocol},
    netlink::conntrack::{self, Tracked},
};

/// Whether connections may be left of what `before` had and `now` has not.
pub(super) fn may_be_stale(before: Option<&Program>, now: &Program) -> bool {
    let Some(before) = before else { return true };
    let ids = |program: &Program| -> BTreeSet<_> { program.endpoints.keys().copied().collect() };
    ids(before) != ids(now)
        || before.published != now.published
        || before.local != now.local
        || before.networks.len() != now.networks.len()
}

/// Ends the connections that `now` has no place for; returns how many.
pub(super) fn end_stale(before: Option<&Program>, now: &Program) -> Result<usize> {
    let tracked = conntrack::list()?;
    let judge = Judge::new(before, now);
    let stale = tracked.iter().filter(|tracked| judge.is_stale(tracked));
    conntrack::end(stale).context("end connections of what is gone")
}

/// Ends the translated connections of a program's networks; returns how many.
pub(super) fn end_translated(program: &Program) -> Result<usize> {
    let subnets: Vec<IpNet> = subnets(program).map(|(_, net)| net).collect();
    let is_ours = |address: IpAddr| subnets.iter().any(|net| net.contains(&address));
    let is_translated = |tracked: &&Tracked| {
        let ends = [tracked.original.source.0, tracked.reply.source.0];
        tracked.is_translated() && ends.into_iter().any(is_ours)
    };
    let tracked = conntrack::list()?;
    conntrack::end(tracked.iter().filter(is_translated)).context("end translated connections")
}

/// Knows what has gone.
struct Judge<'a> {
    now: &'a Program,
    /// Subnets of networks that there are or were.
    subnets: Vec<IpNet>,
    /// Addresses of endpoints that are the same as before.
    members: BTreeSet<IpAddr>,
}

impl<'a> Judge<'a> {
    fn new(before: Option<&'a Program>, now: &'a Program) -> Self {
        let programs = [Some(now), before];
        let subnets = programs.into_iter().flatten().flat_map(subnets).map(|(_, net)| net);
        // An endpoint that got the address of another one is not it.
        let is_same = |id| before.is_none_or(|before| before.endpoints.contains_key(id));
        let had_address = |address: &IpAddr| {
            before.is_some_and(|before| addresses(before).any(|(_, had)| had == *address))
        };
        let members = addresses(now)
            .filter(|(id, address)| is_same(id) || !had_address(address))
            .map(|(_, address)| address);
        Self { now, subnets: subnets.collect(), members: members.collect() }
    }

    fn is_stale(&self, tracked: &Tracked) -> bool {
        let (client, server) = (tracked.original.source.0, tracked.reply.source.0);
        if [client, server].into_iter().any(|end| self.is_gone(end)) {
            return true;
        }
        if self.is_of_network(server) && tracked.is_destination_translated() {
            return !self.is_published(tracked);
        }
        // What came to the host before the port was published would go on to come there.
        if !self.is_of_network(server) && self.now.local.contains(&server) {
            return self.key(tracked).is_some_and(|key| self.now.published.contains_key(key));
        }
        // A source that the host does not have any more.
        let seen_as = tracked.reply.destination.0;
        self.is_of_network(client)
            && seen_as != client
            && !self.is_of_network(seen_as)
            && !self.is_source(seen_as)
    }

    /// Whether it is an address in a network that no member has, nor the network itself.
    fn is_gone(&self, address: IpAddr) -> bool {
        self.is_of_network(address)
            && !self.members.contains(&address)
            && !self.now.local.contains(&address)
    }

    fn is_of_network(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|net| net.contains(&address))
    }

    /// Whether a translated connection leads where its published port leads now.
    fn is_published(&self, tracked: &Tracked) -> bool {
        let target = self.key(tracked).and_then(|key| self.now.published.get(key));
        target.is_some_and(|target| (target.address, target.port) == tracked.reply.source)
    }

    /// The published port that was dialled: on one address, or on all.
    fn key(&self, tracked: &Tracked) -> Option<PublishedKey> {
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .find(|protocol| protocol.number() == tracked.protocol)?;
        let (address, port) = tracked.original.destination;
        let own = PublishedKey { address, port, protocol };
        let any = SocketAddr::new(unspecified(address), port).ip();
        let on_all = PublishedKey { address: any, ..own };
        Some(if self.now.published.contains_key(own) { own } else { on_all })
    }

    fn is_source(&self, address: IpAddr) -> bool {
        let fixed = self.now.networks.values().any(|network| {
            let ipv4 = network.ipv4.and_then(|side| side.snat_ip).map(IpAddr::V4);
            let ipv6 = network.ipv6.and_then(|side| side.snat_ip).map(IpAddr::V6);
            [ipv4, ipv6].contains(&Some(address))
        });
        fixed || self.now.local.contains(&address)
    }
}

fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn subnets(program: &Program) -> impl Iterator<Item = (NetworkId, IpNet)> {
    program.networks.iter().flat_map(|(&id, network)| {
        let ipv4 = network.ipv4.map(|side| IpNet::V4(side.subnet));
        let ipv6 = network.ipv6.map(|side| IpNet::V6(side.subnet));
        [ipv4, ipv6].into_iter().flatten().map(move |net| (id, net))
    })
}

fn addresses(program: &Program) -> impl Iterator<Item = (&crate::model::EndpointId, IpAddr)> {
    program.endpoints.iter().flat_map(|(id, endpoint)| {
        let ipv4 = endpoint.ipv4.map(IpAddr::V4);
        let ipv6 = endpoint.ipv6.map(IpAddr::V6);
        [ipv4, ipv6].into_iter().flatten().map(move |address| (id, address))
    })
}

/// The connections of networks, for people.
pub(super) fn records(program: &Program, tracked: &[Tracked]) -> Vec<FlowRecord> {
    let subnets: Vec<_> = subnets(program).collect();
    let network_of =
        |address: IpAddr| subnets.iter().find(|(_, net)| net.contains(&address)).map(|(id, _)| *id);
    let record = |tracked: &Tracked| {
        let Tracked { original, reply, .. } = tracked;
        // Neighbours need no flow of ours, nor does the host.
        let (dialler, dialled) = (network_of(original.source.0), network_of(reply.source.0));
        let is_switched = dialler == dialled && !tracked.is_destination_translated();
        let network = dialled.or(dialler).filter(|_| !is_switched)?;
        Some(FlowRecord {
            protocol: tracked.protocol,
            network,
            source: original.source,
            destination: original.destination,
            translated_source: reply.destination,
            translated_destination: reply.source,
            state: tracked.state(),
            // Netfilter knows when it ends, not when it was last used.
            idle: Duration::ZERO,
            expires: tracked.expires,
        })
    };
    tracked.iter().filter_map(record).collect()
}
