//! How long iptables takes for many endpoints and ports. Prints what it measured; the limits are wide
//! enough for a busy machine, and mean that something has gone wrong.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netdp::dataplane::iptables::{Iptables, Variant};
use netdp::dataplane::{
    Dataplane, EndpointProgram, NetworkProgram, Program, PublishedKey, PublishedTarget,
    SubnetProgram, Uplink,
};
use netdp::model::{EndpointId, GatewayMode, MacAddress, NatBehaviour, NetworkId, Protocol};
use netdp_tests::lab::Lab;

/// Networks, endpoints of each, published ports of each endpoint.
const NETWORKS: u8 = 10;
const ENDPOINTS: u8 = 100;
const PORTS: u16 = 10;

/// Longest that all of it may take, and one port.
const ALL: Duration = Duration::from_secs(60);
const ONE: Duration = Duration::from_secs(10);

pub(crate) fn many_ports_are_one_transaction_and_one_port_is_a_short_one() -> Result<()> {
    let lab = Lab::builder().without_agent().build()?;
    for variant in Variant::ALL {
        let (all, same, one) = lab.host().run(|| measure(variant))?;
        let ports = usize::from(NETWORKS) * usize::from(ENDPOINTS) * usize::from(PORTS);
        println!(
            "iptables ({}): {ports} ports of {} endpoints in {all:.1?}, the same again in \
             {same:.1?}, one port more in {one:.1?}",
            variant.name(),
            usize::from(NETWORKS) * usize::from(ENDPOINTS)
        );
        ensure!(all < ALL && one < ONE, "{all:?} for all of it, {one:?} for one port");
    }
    Ok(())
}

fn measure(variant: Variant) -> Result<(Duration, Duration, Duration)> {
    let mut backend = Iptables::open_as(variant)?;
    let mut program = program();
    let mut timed = |program: &Program| -> Result<Duration> {
        let started = Instant::now();
        backend.apply(program)?;
        Ok(started.elapsed())
    };
    let all = timed(&program)?;
    let same = timed(&program)?;
    let (key, target) = published(1, 2, 60_000);
    program.published.insert(key, target);
    let one = timed(&program)?;
    let drift = backend.check(&program)?;
    ensure!(drift.is_empty(), "what was written differs: {drift:?}");
    backend.purge()?;
    Ok((all, same, one))
}

fn address(network: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 20, network, host)
}

fn endpoint_id(network: u8, host: u8) -> EndpointId {
    EndpointId(u32::from(network) * 256 + u32::from(host))
}

fn published(network: u8, host: u8, port: u16) -> (PublishedKey, PublishedTarget) {
    let any: IpAddr = Ipv4Addr::UNSPECIFIED.into();
    let key = PublishedKey { address: any, port, protocol: Protocol::Tcp };
    let (endpoint, address) = (endpoint_id(network, host), address(network, host).into());
    (key, PublishedTarget { endpoint, address, port: 80 })
}

fn program() -> Program {
    let mut program = Program::default();
    let mut ports = 10_000..;
    for network in 0..NETWORKS {
        let bridge_ifindex = 1000 + u32::from(network);
        let id = NetworkId(u32::from(network) + 1);
        program.names.insert(bridge_ifindex, format!("nd-{}", id.0));
        program.networks.insert(id, network_program(network, bridge_ifindex));
        for host in 2..ENDPOINTS + 2 {
            let id_there = endpoint_id(network, host);
            let ifindex = 10_000 + id_there.0;
            program.names.insert(ifindex, format!("ndv{}", id_there.0));
            let endpoint = EndpointProgram {
                network: id,
                ifindex,
                ipv4: Some(address(network, host)),
                ipv6: None,
                mac: MacAddress([2, 0x42, 172, 20, network, host]),
            };
            program.endpoints.insert(id_there, endpoint);
            let chosen = ports.by_ref().take(PORTS.into());
            program.published.extend(chosen.map(|port| published(network, host, port)));
        }
    }
    let uplink = Uplink {
        masquerade4: Some(Ipv4Addr::new(10, 0, 0, 2)),
        masquerade6: None,
        ethernet: true,
        mtu: 1500,
        forwarded_before4: false,
        forwarded_before6: false,
    };
    program.names.insert(1, "up0".to_owned());
    program.uplinks = BTreeMap::from([(1, uplink)]);
    program
}

fn network_program(network: u8, bridge_ifindex: u32) -> NetworkProgram {
    let subnet = ipnet::Ipv4Net::new_assert(address(network, 0), 24);
    NetworkProgram {
        bridge_ifindex,
        bridge_mac: MacAddress([2, 0x42, 172, 20, network, 1]),
        mtu: 1500,
        ipv4: Some(SubnetProgram { subnet, gateway: address(network, 1), snat_ip: None }),
        ipv6: None,
        gateway_mode: GatewayMode::Nat,
        internal: false,
        icc: true,
        masquerade: true,
        nat: NatBehaviour::EndpointDependent,
        endpoint_flows: 0,
        policy: Vec::new(),
        policy_generation: 0,
    }
}
