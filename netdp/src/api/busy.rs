//! Which host ports have sockets at the moment, so that a port that is chosen is a free one.
//!
//! A hint only: whether a port can be had is found out when it is reserved.

use std::{collections::BTreeSet, fs};

use crate::model::Protocol;

/// Ports that sockets of this thread's network namespace have, on whatever address. A table that
/// can't be read counts as empty.
pub(super) fn busy_ports() -> BTreeSet<(Protocol, u16)> {
    let tables = [
        ("tcp", Protocol::Tcp),
        ("tcp6", Protocol::Tcp),
        ("udp", Protocol::Udp),
        ("udp6", Protocol::Udp),
    ];
    tables
        .into_iter()
        .flat_map(|(table, protocol)| {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
            let ports: Vec<u16> = text.unwrap_or_default().lines().filter_map(local_port).collect();
            ports.into_iter().map(move |port| (protocol, port))
        })
        .collect()
}

/// The local port in a line of such a table (net/ipv4/tcp_ipv4.c, `get_tcp4_sock`).
fn local_port(line: &str) -> Option<u16> {
    let (_, port) = line.split_whitespace().nth(1)?.split_once(':')?;
    u16::from_str_radix(port, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn sockets_make_their_ports_busy() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        let busy = busy_ports();
        assert!(busy.contains(&(Protocol::Tcp, tcp.local_addr().unwrap().port())));
        assert!(busy.contains(&(Protocol::Udp, udp.local_addr().unwrap().port())));
    }

    #[test]
    fn titles_are_no_sockets() {
        assert_eq!(local_port("  sl  local_address rem_address   st tx_queue rx_queue"), None);
        assert_eq!(
            local_port("   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000"),
            Some(8080)
        );
    }
}
