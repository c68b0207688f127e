//! How long idle flows are kept: the fuller the table, the shorter.

use netdp_common::config::Timeouts;

/// Filled to this many hundredths, a table begins to shorten the timeouts ...
const START: u64 = 60;
/// ... and at this many, which it never reaches, they would be nothing: a full table keeps idle
/// flows for a third of their time. The numbers are those of OpenBSD's pf.conf(5).
const END: u64 = 120;
/// No idle flow is collected sooner, in seconds.
const LEAST: u32 = 30;

/// The timeouts for a table of `capacity` flows that holds `flows`.
pub(super) fn timeouts(configured: &Timeouts, flows: u32, capacity: u32) -> Timeouts {
    let (flows, capacity) = (u64::from(flows) * 100, u64::from(capacity.max(1)));
    if flows <= START * capacity {
        return *configured;
    }
    let left = (END * capacity).saturating_sub(flows);
    let scale = |seconds: u32| {
        let scaled = u64::from(seconds) * left / ((END - START) * capacity);
        u32::try_from(scaled).unwrap_or(seconds).max(LEAST).min(seconds)
    };
    Timeouts {
        tcp_established: scale(configured.tcp_established),
        tcp_transitory: scale(configured.tcp_transitory),
        udp_replied: scale(configured.udp_replied),
        udp_unreplied: scale(configured.udp_unreplied),
        icmp: scale(configured.icmp),
        other: scale(configured.other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_shrink_when_the_table_fills() {
        let at = |flows| timeouts(&Timeouts::RFC, flows, 1000);
        assert_eq!(at(0), Timeouts::RFC);
        assert_eq!(at(600), Timeouts::RFC);
        assert_eq!(at(900).tcp_established, Timeouts::RFC.tcp_established / 2);
        assert_eq!(at(1000).tcp_established, Timeouts::RFC.tcp_established / 3);
        assert_eq!(at(1000).icmp, LEAST);
        let shorter = Timeouts { icmp: 5, ..Timeouts::RFC };
        assert_eq!(timeouts(&shorter, 1000, 1000).icmp, 5, "what the operator wants even shorter");
        assert_eq!(timeouts(&Timeouts::RFC, 0, 0), Timeouts::RFC);
    }
}
