//! What others would write for one network with published ports: Docker to iptables, and whoever knows
//! nftables' maps.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// A network with one container that has published ports.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) bridge: &'static str,
    pub(crate) subnet: &'static str,
    pub(crate) container: IpAddr,
    /// Ports of the host that lead to the same ones of the container: by TCP, ...
    pub(crate) tcp: Vec<RangeInclusive<u16>>,
    /// ... and by UDP.
    pub(crate) udp: Vec<u16>,
}

impl Published {
    /// Protocol and number of each, in the order in which they were published.
    fn ports(&self) -> impl Iterator<Item = (&'static str, u16)> {
        let udp = self.udp.iter().map(|port| ("udp", *port));
        udp.chain(self.tcp.iter().cloned().flatten().map(|port| ("tcp", port)))
    }

    /// The rules that Docker 28 writes, as `iptables-restore` wants them.
    pub(crate) fn iptables(&self) -> String {
        let Self { bridge, subnet, container, .. } = self;
        let (mut accept, mut translate) = (String::new(), String::new());
        for (protocol, port) in self.ports() {
            // Writing to a string can't fail.
            _ = writeln!(
                accept,
                "-A DOCKER -d {container}/32 ! -i {bridge} -o {bridge} -p {protocol} \
                 -m {protocol} --dport {port} -j ACCEPT"
            );
            _ = writeln!(
                translate,
                "-A DOCKER ! -i {bridge} -p {protocol} -m {protocol} --dport {port} -j DNAT \
                 --to-destination {container}:{port}"
            );
        }
        format!(
            "*raw
:PREROUTING ACCEPT
-A PREROUTING -d {container}/32 ! -i {bridge} -j DROP
COMMIT
*filter
:FORWARD DROP
:DOCKER -
:DOCKER-BRIDGE -
:DOCKER-CT -
:DOCKER-FORWARD -
:DOCKER-ISOLATION-STAGE-1 -
:DOCKER-ISOLATION-STAGE-2 -
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i {bridge} -j ACCEPT
-A DOCKER-CT -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-BRIDGE -o {bridge} -j DOCKER
-A DOCKER-ISOLATION-STAGE-1 -i {bridge} ! -o {bridge} -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o {bridge} -j DROP
{accept}-A DOCKER ! -i {bridge} -o {bridge} -j DROP
COMMIT
*nat
:PREROUTING ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:DOCKER -
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {subnet} ! -o {bridge} -j MASQUERADE
{translate}COMMIT
"
        )
    }

    /// The same in nftables, a published port being an element of a map.
    pub(crate) fn nftables(&self) -> String {
        let Self { bridge, subnet, container, .. } = self;
        let elements: Vec<_> = self
            .ports()
            .map(|(protocol, port)| format!("{protocol} . {port} : {container} . {port}"))
            .collect();
        format!(
            "table ip published
delete table ip published
table ip published {{
  map ports {{
    type inet_proto . inet_service : ipv4_addr . inet_service
    elements = {{ {} }}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat
    fib daddr type local iifname != \"{bridge}\" dnat ip to meta l4proto . th dport map @ports
  }}
  chain output {{
    type nat hook output priority -100
    ip daddr != 127.0.0.0/8 fib daddr type local dnat ip to meta l4proto . th dport map @ports
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    ip saddr {subnet} oifname != \"{bridge}\" masquerade
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop
    ct state established,related accept
    iifname \"{bridge}\" accept
    oifname \"{bridge}\" ct status dnat accept
  }}
}}
",
            elements.join(", ")
        )
    }
}
