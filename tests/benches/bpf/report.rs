//! Figures of all rounds: the table, and the JSON file.

use std::path::Path;

use anyhow::Result;
use netdp_tests::figures::{self, Figure};

use crate::cases::{Age, Place};

/// What is measured here.
pub(crate) const SYSTEM: &str = "netdp-ebpf";

/// The figures of one case, one of each round.
pub(crate) struct Series {
    place: Place,
    nanos: Vec<f64>,
    /// Packets of all rounds.
    packets: u64,
}

impl Series {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, nanos: Vec::new(), packets: 0 }
    }

    /// Adds the figure of a round of so many packets.
    pub(crate) fn add(&mut self, nanos: f64, packets: u32) {
        self.nanos.push(nanos);
        self.packets += u64::from(packets);
    }

    /// The whole way of a packet: the sum of its programs in each round.
    fn whole_way(parts: &[&Self]) -> Option<Self> {
        let (first, rest) = parts.split_first()?;
        let mut whole = Self {
            place: Place { program: WHOLE_WAY, ..first.place },
            nanos: first.nanos.clone(),
            packets: first.packets,
        };
        for part in rest {
            for (sum, nanos) in whole.nanos.iter_mut().zip(&part.nanos) {
                *sum += nanos;
            }
        }
        Some(whole)
    }
}

const WHOLE_WAY: &str = "whole way";

fn metric(place: &Place) -> &'static str {
    match place.age {
        Age::Established => "bpf_established_ns",
        Age::New => "bpf_new_ns",
        Age::NewInCold => "bpf_cold_new_ns",
        Age::NewInSmall => "bpf_small_new_ns",
    }
}

/// Every figure with its place: programs, and whole ways where they have more than one program.
fn placed(series: &[Series]) -> Vec<(Place, Figure)> {
    let mut figures = Vec::new();
    let same_way = |a: &Place, b: &Place| {
        (a.age, a.way, a.family, a.protocol) == (b.age, b.way, b.family, b.protocol)
    };
    for (index, one) in series.iter().enumerate() {
        let parts: Vec<_> =
            series.iter().filter(|other| same_way(&other.place, &one.place)).collect();
        let mut add = |series: &Series| {
            let Place { way, family, protocol, program, .. } = series.place;
            let detail = [metric(&series.place), way, family, protocol, program].join(".");
            let metric = detail.replace(' ', "_");
            let figure = Figure::of(&metric, SYSTEM, "ns", &series.nanos, series.packets);
            figures.push((series.place, figure));
        };
        add(one);
        let is_last = !series[index + 1..].iter().any(|other| same_way(&other.place, &one.place));
        if is_last && let Some(whole) = Series::whole_way(&parts) {
            add(&whole);
        }
    }
    figures
}

/// The figure that stands for all: the dearest whole way.
fn headlines(figures: &[(Place, Figure)]) -> Vec<Figure> {
    [Age::Established, Age::New, Age::NewInCold, Age::NewInSmall]
        .into_iter()
        .filter_map(|age| {
            let whole =
                |(place, _): &&(Place, Figure)| place.age == age && place.program == WHOLE_WAY;
            let dearest = figures
                .iter()
                .filter(whole)
                .max_by(|(_, a), (_, b)| a.median.total_cmp(&b.median))?;
            Some(Figure { metric: metric(&dearest.0).to_owned(), ..dearest.1.clone() })
        })
        .collect()
}

/// Prints the table, and what stands for all of it.
pub(crate) fn print(series: &[Series]) {
    println!("nanoseconds for one packet; the 99th percentile is that of the rounds\n");
    let row = |words: [&str; 5], numbers: [&str; 6]| {
        let [flow, way, family, protocol, program] = words;
        let [min, median, p99, interval, rounds, packets] = numbers;
        println!(
            "{flow:<12}{way:<18}{family:<6}{protocol:<5}{program:<15}{min:>6}{median:>7}{p99:>7}{interval:>12}\
             {rounds:>7}{packets:>10}"
        );
    };
    row(
        ["flow", "way", "over", "", "program"],
        ["min", "median", "p99", "95 %", "rounds", "packets"],
    );
    let figures = placed(series);
    for (Place { age, way, family, protocol, program }, figure) in &figures {
        let Figure { min, median, p99, ci95: [low, high], rounds, n, .. } = figure;
        let numbers = [
            format!("{min:.0}"),
            format!("{median:.0}"),
            format!("{p99:.0}"),
            format!("{low:.0}–{high:.0}"),
            rounds.to_string(),
            n.to_string(),
        ];
        row([age.name(), way, family, protocol, program], numbers.each_ref().map(String::as_str));
    }
    println!();
    for Figure { metric, median, .. } in headlines(&figures) {
        println!("{metric} {median:.0} (the dearest whole way)");
    }
}

/// Writes all figures, those that stand for all first.
pub(crate) fn write(path: &Path, series: &[Series], others: Vec<Figure>) -> Result<()> {
    let places = placed(series);
    let mut list = headlines(&places);
    list.extend(others);
    list.extend(places.into_iter().map(|(_, figure)| figure));
    figures::write(path, &list)
}
