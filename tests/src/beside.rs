//! Docker beside the behaviour catalogue: which rows it keeps in another way, and which can't be asked of
//! it. Knows nothing of how rows are tested.

use anyhow::Result;

use crate::backend::Firewall;
use crate::docker::Installation;
use crate::harness::{Outcome, brief};
use crate::net::{FAMILIES, Family, Net};

/// The version that the list of differences was made with.
const LISTED: (u32, Firewall) = (28, Firewall::Iptables);

/// A row that Docker keeps in another way, or not.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Its id in the catalogue.
    pub id: &'static str,
    /// In which families.
    pub families: &'static [Family],
    /// What the row says when it meets what Docker does, one of these, with places of the lab in braces.
    pub seen: &'static [&'static str],
    /// What Docker does.
    pub docker: &'static str,
    /// Why netdp does not.
    pub reason: &'static str,
}

/// Every difference there is. A row that is listed and passes fails the suite, as does one that fails
/// in another way than the list says, or is not listed.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        id: "PUB-02",
        families: FAMILIES,
        seen: &["address as the server saw it: expected {gateway_a}, saw {host}"],
        docker: "A1 sees the address that the host has dialled, for it has been chosen as the source",
        reason: "a connection of the host's is one to the container from the start, so both ends know \
                 each other by addresses of the network",
    },
    Difference {
        id: "PUB-03",
        families: FAMILIES,
        seen: &["docker-proxy"],
        docker: "a process for each published port and family",
        reason: "nothing is needed for it but programs in the kernel, or the agent",
    },
    Difference {
        id: "PUB-04",
        families: FAMILIES,
        seen: &["address as the server saw it: expected {a2}, saw {gateway_a}"],
        docker: "A1 sees the gateway: neighbours are served by the proxy",
        reason: "who is served should know whom it serves",
    },
    Difference {
        id: "PUB-06",
        families: FAMILIES,
        seen: &["address as the server saw it: expected {b1}, saw {gateway_a}"],
        docker: "A1 sees its own gateway: other networks are served by the proxy",
        reason: "as PUB-04; and a policy of the network can judge who comes from another one",
    },
    Difference {
        id: "PUB-15",
        families: FAMILIES,
        seen: &["address as the server saw it: expected {a2}, saw {gateway_a}"],
        docker: "whole, and from outside by itself; from containers by the proxy, as in PUB-04",
        reason: "as PUB-04",
    },
    Difference {
        id: "OUT-03",
        families: FAMILIES,
        seen: &["7: timed out"],
        docker: "no answer arrives: all that is for a container's address and comes in by another \
                 interface than its bridge is dropped",
        reason: "whoever is dialled may answer; what nobody has asked for is dropped all the same (ISO-04)",
    },
    Difference {
        id: "OUT-06",
        families: FAMILIES,
        seen: &["8081: expected refused: timed out"],
        docker: "errors between containers end at the proxy; the others are translated",
        reason: "without a proxy there is nowhere for them to end",
    },
    Difference {
        id: "OUT-11",
        families: FAMILIES,
        seen: &["the source of a host's connection"],
        docker: "the host's own connection gets another port where a container has come first",
        reason: "containers have ports of their own (50000–60999), and the host's are the host's",
    },
    Difference {
        id: "OUT-14",
        families: FAMILIES,
        seen: &["frames that left un-NATed"],
        docker: "the end of a connection whose uplink was down in between leaves with the container's \
                 address",
        reason: "no packet leaves with a container's address",
    },
    Difference {
        id: "ISO-02",
        families: &[Family::Ipv4],
        seen: &["address as the server saw it: expected {a2}, saw {gateway_a}"],
        docker: "neighbours are parted; by the published port A1 sees the gateway, as in PUB-04",
        reason: "as PUB-04",
    },
    Difference {
        id: "ISO-02",
        families: &[Family::Ipv6],
        // Who finds nobody hears nothing, or is told so by its own stack.
        seen: &["neighbours did not find each other", "kind: 1, code: 3", "unreachable"],
        docker: "neighbours are parted, for they do not even find each other",
        reason: "as over IPv4: who knocks is dropped and counted, and the reason says why",
    },
    Difference {
        id: "ISO-03",
        families: FAMILIES,
        seen: &["address as the server saw it: expected {b1}, saw {gateway_a}"],
        docker: "walls are the same; by the published port A1 sees its gateway, as in PUB-06",
        reason: "as PUB-06",
    },
    Difference {
        id: "ISO-09",
        families: FAMILIES,
        seen: &["80: expected timed out: tcp"],
        docker: "the host has no address in the network, so its clients are told at once",
        reason: "the bridge is the same for all modes, and who knocks is counted",
    },
    Difference {
        id: "ISO-10",
        families: FAMILIES,
        seen: &["8080: timed out"],
        docker: "what another chain drops is dropped",
        reason: "eBPF does without netfilter",
    },
    Difference {
        id: "ISO-11",
        families: FAMILIES,
        seen: &["frames of the other family at the neighbour"],
        docker: "neighbours may speak what they like",
        reason: "what no rule of a network speaks of should not be a way around its rules",
    },
    Difference {
        id: "ISO-12",
        families: FAMILIES,
        seen: &["frames for a1 that a2 saw"],
        docker: "all is reached; a bridge that has forgotten where a container is shows its packets to all",
        reason: "a bridge of netdp's need not learn: it is told who is where",
    },
    Difference {
        id: "SEC-01",
        families: FAMILIES,
        seen: &["the gateway's hardware address at a2"],
        docker: "a container may pretend to be its gateway, and its neighbours believe it",
        reason: "a container's addresses are known, so nothing else need pass",
    },
    Difference {
        id: "SEC-02",
        families: FAMILIES,
        seen: &["rogue frames at the neighbour"],
        docker: "a container may pretend to be a router or a DHCP server",
        reason: "containers of netdp are neither",
    },
    Difference {
        id: "SEC-03",
        families: &[Family::Ipv6],
        seen: &["its source: expected [{outside}]:5000, saw [{a2}]:5000"],
        docker: "from outside, who pretends to be A1's neighbour reaches its published port",
        reason: "no container is outside",
    },
    Difference {
        id: "SEC-04",
        families: FAMILIES,
        seen: &["the container got the host's port"],
        docker: "a container keeps its port, though a program of the host listens there",
        reason: "what comes to that port is the host's",
    },
    Difference {
        id: "SEC-06",
        families: FAMILIES,
        seen: &["packets that left un-NATed"],
        docker: "what netfilter can't make sense of is not translated, and leaves as it is",
        reason: "no packet leaves with a container's address",
    },
    Difference {
        id: "SEC-09",
        families: FAMILIES,
        seen: &["{gateway_b}: expected timed out, it succeeded with Reply { source: {gateway_b} }"],
        docker: "by a forced route the gateway of another network is reached, an address of the host; its \
                 containers and the outside are not",
        reason: "the gateway of the network is all of the host that its containers may know",
    },
];

/// Rows that can't be asked of Docker, and why.
pub const UNASKED: &[(&str, &str)] = &[
    ("PUB-11", "65,535 published ports are as many processes"),
    ("PUB-17", "ports belong to a container, whatever networks it is in"),
    ("PUB-18", "its proxy listens by the kernel's SCTP, and the row does without"),
    ("OUT-12", "the row is about a count, and netfilter drops such a packet uncounted"),
    ("OUT-15", "it has no list of uplinks: every interface is one"),
    ("OUT-18", "the row is about counts, and netfilter drops uncounted what would collide"),
    ("OUT-19", "it has no such option"),
    ("POL-11", "rules are the user's own, and iptables' to refuse"),
    ("LIF-02", "the row reads the maps of eBPF"),
    ("LIF-05", "it has no flow table of its own"),
    ("LIF-07", "it makes the namespaces itself, and nobody else takes them away"),
    ("LIF-10", "it has no such command; its rules and bridges stay when it ends"),
    ("LIF-11", "the row is about netdp's backends"),
    ("LIF-13", "what others wipe stays away until its daemon starts anew"),
    ("SEC-08", "the row is about netdp's command line and API"),
];

/// How Docker met a row.
#[derive(Clone, Copy, Debug)]
pub enum Meeting {
    /// As netdp does.
    Same,
    /// As the list says.
    Differs(&'static Difference),
}

impl Difference {
    /// The one for a row in a family.
    #[must_use]
    pub fn find(id: &str, family: Family) -> Option<&'static Self> {
        DIFFERENCES.iter().find(|known| known.id == id && known.families.contains(&family))
    }

    /// Whether this is what a row says.
    fn is_seen_in(&self, said: &str, net: &Net) -> bool {
        let places = [
            ("{host}", net.host),
            ("{outside}", net.outside),
            ("{gateway_a}", net.gateway_a),
            ("{gateway_b}", net.gateway_b),
            ("{a2}", net.a2),
            ("{b1}", net.b1),
        ];
        self.seen.iter().any(|seen| {
            let seen = places.iter().fold((*seen).to_owned(), |seen, (place, address)| {
                seen.replace(place, &address.to_string())
            });
            said.contains(&seen)
        })
    }
}

/// Whether the list of differences speaks of this Docker.
#[must_use]
pub fn is_listed(installed: &Installation, firewall: Firewall) -> bool {
    (installed.major(), firewall) == (Some(LISTED.0), LISTED.1)
}

/// Compares what became of a row with what the list says.
///
/// # Errors
/// With what is wrong with the list.
pub fn judge(id: &str, family: Family, outcome: &Result<Outcome>) -> Result<Meeting, String> {
    match (Difference::find(id, family), outcome) {
        (None, Ok(_)) => Ok(Meeting::Same),
        (None, Err(error)) => {
            Err(format!("Docker differs, and it is not listed: {}", brief(error)))
        }
        (Some(known), Ok(_)) => {
            Err(format!("Docker does as netdp does, although it is listed: {}", known.docker))
        }
        (Some(known), Err(error)) => {
            let said = brief(error);
            if known.is_seen_in(&said, family.net()) {
                return Ok(Meeting::Differs(known));
            }
            Err(format!("Docker differs, but not as listed ({}): {said}", known.docker))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use anyhow::anyhow;

    use super::*;
    use crate::page::expect_part;

    /// The part of docs/behaviour.md that follows from the lists.
    fn tables() -> String {
        let mut text = format!("| row | family | Docker {} | why netdp does not |\n", LISTED.0);
        text.push_str("|---|---|---|---|\n");
        for Difference { id, families, docker, reason, .. } in DIFFERENCES {
            let families: Vec<_> = families.iter().map(|family| family.name()).collect();
            writeln!(text, "| `{id}` | {} | {docker} | {reason} |", families.join(", ")).unwrap();
        }
        text.push_str("\n| row | why Docker is not asked |\n|---|---|\n");
        for (id, reason) in UNASKED {
            writeln!(text, "| `{id}` | {reason} |").unwrap();
        }
        text
    }

    #[test]
    fn the_page_of_behaviour_says_what_docker_does_otherwise() {
        expect_part("behaviour.md", "docker", &tables());
    }

    #[test]
    fn list_has_to_be_right_both_ways() {
        let neighbour = "the client's address as the server saw it: \
                         expected 172.20.0.3, saw 172.20.0.1";
        let meet = |id, outcome| judge(id, Family::Ipv4, &outcome);
        let failed = |said: &'static str| Err(anyhow!(said));
        assert!(matches!(meet("PUB-01", Ok(Outcome::Pass)), Ok(Meeting::Same)));
        assert!(matches!(meet("PUB-04", failed(neighbour)), Ok(Meeting::Differs(_))));
        // New, gone, another one.
        assert!(meet("PUB-01", failed(neighbour)).is_err());
        assert!(meet("PUB-04", Ok(Outcome::Pass)).is_err());
        assert!(meet("PUB-04", failed("timed out")).is_err());
    }
}
