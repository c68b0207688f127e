//! What the numbers say: a table of every metric, and the goals, reached or not.

use std::fmt::{self, Display, Formatter};

use netdp_tests::figures::{Figure, INTERVAL_ROUNDS};

use crate::metric::Numbers;
use crate::system::System;

/// What others are compared with: a host with no firewall at all.
const BASE: System = System::Routed;

/// Prints every metric.
pub(crate) fn print(numbers: &Numbers) {
    for metric in numbers.metrics() {
        println!("\n{} ({})", metric.name, metric.unit);
        println!(
            "  {:<16}{:>10}{:>18}{:>12}{:>15}",
            "",
            "median",
            "95 %",
            format!("to {}", BASE.name()),
            "95 %"
        );
        for system in System::ALL {
            let Some(figure) = metric.figure(system) else { continue };
            let rounds = |system| metric.rounds(system);
            let ratio = match (rounds(system), rounds(BASE)) {
                (Some(own), Some(base)) if system != BASE => {
                    Some(Figure::ratio(&metric.name, system.name(), own, base))
                }
                _ => None,
            };
            let of_ratio =
                |text: fn(&Figure) -> String| ratio.as_ref().map(text).unwrap_or_default();
            println!(
                "  {:<16}{:>10}{:>18}{:>12}{:>15}",
                system.name(),
                number(figure.median),
                format!("{}–{}", number(figure.ci95[0]), number(figure.ci95[1])),
                of_ratio(|ratio| format!("{:.2}", ratio.median)),
                of_ratio(|ratio| format!("{:.2}–{:.2}", ratio.ci95[0], ratio.ci95[1])),
            );
        }
    }
}

/// Three digits that count, or all before the point.
fn number(value: f64) -> String {
    let decimals = if value < 1.0 {
        3
    } else if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.decimals$}")
}

/// What is measured against what.
#[derive(Clone, Copy, Debug)]
enum Against {
    /// The same of another system.
    System(System),
    /// Another metric of the same system.
    Metric(&'static str),
}

/// What a ratio should be.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// What netdp with eBPF should cost beside others.
struct Goal {
    metric: &'static str,
    against: Against,
    bound: Bound,
}

const fn at_least(metric: &'static str, factor: f64, system: System) -> Goal {
    Goal { metric, against: Against::System(system), bound: Bound::AtLeast(factor) }
}

const fn at_most(metric: &'static str, factor: f64, system: System) -> Goal {
    Goal { metric, against: Against::System(system), bound: Bound::AtMost(factor) }
}

/// Less than a host with no firewall at all, whatever is published.
const GOALS: [Goal; 19] = [
    at_least("tcp_bulk_out", 1.0, System::Routed),
    at_least("tcp_bulk_out", 0.95, System::VethDirect),
    at_least("tcp_bulk_in", 1.0, System::Routed),
    at_least("tcp_bulk_in", 0.95, System::VethDirect),
    at_least("udp64_pps_out", 1.15, System::Routed),
    at_least("udp64_pps_out", 1.7, System::IptablesNft),
    at_least("udp64_pps_out", 1.5, System::NftMap),
    at_least("udp64_pps_in", 1.15, System::Routed),
    at_least("udp64_pps_in", 1.7, System::IptablesNft),
    at_least("udp64_pps_in", 1.5, System::NftMap),
    at_least("udp64_pps_same_bridge", 1.1, System::Routed),
    at_most("rr_p50_out", 1.0, System::Routed),
    at_most("rr_p99_out", 1.0, System::Routed),
    at_least("crr_1", 1.0, System::Routed),
    at_least("crr_1", 1.15, System::IptablesNft),
    at_least("crr_1", 1.1, System::NftMap),
    at_least("crr_10000", 3.5, System::IptablesLegacy),
    at_least("crr_10000", 3.5, System::IptablesNft),
    Goal { metric: "crr_10000", against: Against::Metric("crr_1"), bound: Bound::AtLeast(0.97) },
];

/// How a goal was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Reached,
    /// The interval holds the goal, or there are too few rounds for one: the measurement does not tell.
    Undecided,
    Missed,
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reached => "reached",
            Self::Undecided => "within the interval",
            Self::Missed => "not reached",
        })
    }
}

impl Goal {
    fn ratio(&self, numbers: &Numbers) -> Option<Figure> {
        const OWN: System = System::NetdpEbpf;
        let metric = numbers.get(self.metric)?;
        let others = match self.against {
            Against::System(system) => metric.rounds(system),
            Against::Metric(name) => numbers.get(name)?.rounds(OWN),
        };
        Some(Figure::ratio(self.metric, OWN.name(), metric.rounds(OWN)?, others?))
    }

    fn verdict(&self, ratio: &Figure) -> Verdict {
        if ratio.rounds < INTERVAL_ROUNDS {
            return Verdict::Undecided;
        }
        let [low, high] = ratio.ci95;
        let (is_reached, is_missed) = match self.bound {
            Bound::AtLeast(factor) => (low >= factor, high < factor),
            Bound::AtMost(factor) => (high <= factor, low > factor),
        };
        match (is_reached, is_missed) {
            (true, _) => Verdict::Reached,
            (_, true) => Verdict::Missed,
            _ => Verdict::Undecided,
        }
    }
}

/// Prints every goal that there are numbers for.
pub(crate) fn print_goals(numbers: &Numbers) {
    println!("\n{:<24}{:<26}{:>8}{:>15}  ", "goal of netdp-ebpf", "", "ratio", "95 %");
    for goal in &GOALS {
        let Some(ratio) = goal.ratio(numbers) else { continue };
        let other = match goal.against {
            Against::System(system) => system.name(),
            Against::Metric(name) => name,
        };
        let wanted = match goal.bound {
            Bound::AtLeast(factor) => format!("≥ {factor:.2} × {other}"),
            Bound::AtMost(factor) => format!("≤ {factor:.2} × {other}"),
        };
        let [low, high] = ratio.ci95;
        println!(
            "{:<24}{wanted:<26}{:>8.2}{:>15}  {}",
            goal.metric,
            ratio.median,
            format!("{low:.2}–{high:.2}"),
            goal.verdict(&ratio)
        );
    }
}
