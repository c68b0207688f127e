//! Container engines as clients: their protocols, and how what they ask for becomes netdp's terms.
//!
//! Owns no decision. What Docker asks of the agent itself becomes changes of the model; a plugin is this
//! binary under another name, and what it is asked becomes requests to the agent.

use std::{ffi::OsStr, path::Path, process::ExitCode};

mod cni;
pub mod docker;
mod netavark;
mod network;

/// The plugin that this process was started as, by the name of the program that was called.
pub fn plugin(called: &OsStr) -> Option<fn() -> ExitCode> {
    match Path::new(called).file_name()?.to_str()? {
        "netdp-cni" => Some(cni::run),
        "netdp-netavark" => Some(netavark::run),
        _ => None,
    }
}

/// Writes a published port as `-p` takes it.
fn port_argument(host_ip: &str, host_ports: &str, container_ports: &str, protocol: &str) -> String {
    let host_ip = match host_ip {
        "" => String::new(),
        ip if ip.contains(':') => format!("[{ip}]:"),
        ip => format!("{ip}:"),
    };
    format!("{host_ip}{host_ports}:{container_ports}/{protocol}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_known_by_the_name_that_it_is_called_by() {
        assert!(plugin(OsStr::new("/opt/cni/bin/netdp-cni")).is_some());
        assert!(plugin(OsStr::new("netdp-netavark")).is_some());
        for name in ["netdp", "/usr/bin/netdp", "", "/", "cni"] {
            assert!(plugin(OsStr::new(name)).is_none(), "{name}");
        }
    }

    #[test]
    fn ports_are_written_as_arguments() {
        assert_eq!(port_argument("", "8080", "80", "tcp"), "8080:80/tcp");
        assert_eq!(port_argument("10.0.0.2", "1-2", "3-4", "udp"), "10.0.0.2:1-2:3-4/udp");
        assert_eq!(port_argument("::1", "8080", "80", "tcp"), "[::1]:8080:80/tcp");
    }
}
