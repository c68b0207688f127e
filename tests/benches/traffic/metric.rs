//! What is measured of each system, and the numbers of all rounds.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use netdp_tests::figures::Figure;

use crate::load::{self, Seats};
use crate::system::{Stand, System};

/// A load on a system; some give more than one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    BulkOut,
    BulkIn,
    SmallOut,
    SmallIn,
    SmallSameBridge,
    ExchangesOut,
    /// Connections while so many ports are published, to the one that was published last.
    Connections(u16),
}

/// Loads that stay the same however many ports are published.
pub(crate) const STEADY: [Load; 6] = [
    Load::BulkOut,
    Load::BulkIn,
    Load::SmallOut,
    Load::SmallIn,
    Load::SmallSameBridge,
    Load::ExchangesOut,
];

/// Loads whose packets are larger than a wire takes where nothing cuts them.
pub(crate) const BULK: [Load; 2] = [Load::BulkOut, Load::BulkIn];

/// Numbers of published ports.
pub(crate) const PORTS: [u16; 5] = [1, 100, 1000, 10_000, 30_000];

/// How long, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conditions {
    pub(crate) seats: Seats,
    pub(crate) window: Duration,
}

impl Load {
    /// Its name, which that of each of its numbers begins with.
    pub(crate) fn name(self) -> String {
        match self {
            Self::BulkOut => "tcp_bulk_out".to_owned(),
            Self::BulkIn => "tcp_bulk_in".to_owned(),
            Self::SmallOut => "udp64_pps_out".to_owned(),
            Self::SmallIn => "udp64_pps_in".to_owned(),
            Self::SmallSameBridge => "udp64_pps_same_bridge".to_owned(),
            Self::ExchangesOut => "rr_out".to_owned(),
            Self::Connections(ports) => format!("crr_{ports}"),
        }
    }

    /// Whether it is one to put on a system like this.
    pub(crate) fn is_for(self, stand: &Stand) -> bool {
        match self {
            Self::Connections(ports) => stand.ports() == ports,
            Self::SmallSameBridge => stand.ports() == 1 && stand.system().has_bridge(),
            _ => stand.ports() == 1,
        }
    }

    /// Puts it on a system and adds the numbers.
    pub(crate) fn measure(
        self,
        stand: &Stand,
        Conditions { seats, window }: Conditions,
        numbers: &mut Numbers,
    ) -> Result<()> {
        let (suffix, system) = (stand.suffix(), stand.system());
        let name = self.name() + suffix;
        let mut add = |metric: String, unit, value, n| numbers.add(metric, system, unit, value, n);
        match self {
            Self::BulkOut | Self::BulkIn => {
                let way = if self == Self::BulkOut { stand.out() } else { stand.published() };
                let bulk = load::bulk(&way, seats, window)?;
                add(name, "Gbit/s", bulk.rate, 1);
                if self == Self::BulkOut {
                    add(format!("cpu_per_gbit{suffix}"), "CPU s/Gbit", bulk.cpu, 1);
                }
            }
            Self::SmallOut | Self::SmallIn | Self::SmallSameBridge => {
                let way = match self {
                    Self::SmallOut => stand.out(),
                    Self::SmallIn => stand.published(),
                    _ => stand.neighbour().context("find a neighbour")?,
                };
                let rate = load::small_packets(&way, seats, window)?;
                add(name, "packets/s", rate, (rate * window.as_secs_f64()) as u64);
            }
            Self::ExchangesOut => {
                let latency = load::exchanges(&stand.out(), seats, window)?;
                add("rr_p50_out".to_owned(), "µs", latency.p50, latency.count);
                add("rr_p99_out".to_owned(), "µs", latency.p99, latency.count);
            }
            Self::Connections(ports) => {
                let connections = load::connections(&stand.last_published(), seats, window)?;
                let first = connections.first_packet;
                add(name, "connections/s", connections.rate, first.count);
                add(format!("first_packet_p50_{ports}"), "µs", first.p50, first.count);
                add(format!("first_packet_p99_{ports}"), "µs", first.p99, first.count);
            }
        }
        Ok(())
    }
}

/// The numbers of one metric.
#[derive(Clone, Debug)]
pub(crate) struct Metric {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    systems: BTreeMap<usize, Rounds>,
}

/// The numbers of one system.
#[derive(Clone, Debug, Default)]
struct Rounds {
    values: Vec<f64>,
    n: u64,
}

impl Metric {
    /// The numbers of a system, one of each round.
    pub(crate) fn rounds(&self, system: System) -> Option<&[f64]> {
        self.systems.get(&(system as usize)).map(|rounds| &*rounds.values)
    }

    /// What they say.
    pub(crate) fn figure(&self, system: System) -> Option<Figure> {
        let rounds = self.systems.get(&(system as usize))?;
        Some(Figure::of(&self.name, system.name(), self.unit, &rounds.values, rounds.n))
    }
}

/// The numbers of all metrics, in the order in which they were first measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers(Vec<Metric>);

impl Numbers {
    fn add(&mut self, name: String, system: System, unit: &'static str, value: f64, n: u64) {
        let place = self.0.iter().position(|metric| metric.name == name);
        let place = place.unwrap_or_else(|| {
            self.0.push(Metric { name, unit, systems: BTreeMap::new() });
            self.0.len() - 1
        });
        let rounds = self.0[place].systems.entry(system as usize).or_default();
        rounds.values.push(value);
        rounds.n += n;
    }

    pub(crate) fn metrics(&self) -> &[Metric] {
        &self.0
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Metric> {
        self.0.iter().find(|metric| metric.name == name)
    }

    /// What all of them say.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        let of = |metric: &Metric| System::ALL.map(|system| metric.figure(system));
        self.0.iter().flat_map(of).flatten().collect()
    }
}
