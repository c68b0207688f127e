//! What was measured, and what it says: medians with intervals, ratios of systems that took turns, and
//! the JSON file that benchmarks write.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// With fewer rounds there is no interval that holds the median with 95 %.
pub const INTERVAL_ROUNDS: usize = 6;

/// Numbers of several rounds, and what they say. Percentiles are those of the rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What was measured.
    pub metric: String,
    /// Of what.
    pub system: String,
    /// In what.
    pub unit: &'static str,
    /// The smallest.
    pub min: f64,
    /// As `p50`.
    pub median: f64,
    /// The smallest number that half of the rounds do not exceed.
    pub p50: f64,
    /// The smallest number that 99 of 100 rounds do not exceed.
    pub p99: f64,
    /// An interval that holds the median with a probability of at least 95 %; with less than
    /// [`INTERVAL_ROUNDS`] all that was seen.
    pub ci95: [f64; 2],
    /// How many rounds there were.
    pub rounds: usize,
    /// How many packets, connections or calls they had together.
    pub n: u64,
}

impl Figure {
    /// What numbers of rounds say, of which there is at least one.
    #[must_use]
    pub fn of(metric: &str, system: &str, unit: &'static str, rounds: &[f64], n: u64) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let p50 = percentile(&sorted, 0.5);
        let (low, high) = median_interval(sorted.len());
        Self {
            metric: metric.to_owned(),
            system: system.to_owned(),
            unit,
            min: percentile(&sorted, 0.0),
            median: p50,
            p50,
            p99: percentile(&sorted, 0.99),
            ci95: [sorted[low], sorted[high]],
            rounds: sorted.len(),
            n,
        }
    }

    /// The ratio of two systems that took turns: of each round, and of those the median.
    #[must_use]
    pub fn ratio(metric: &str, system: &str, rounds: &[f64], others: &[f64]) -> Self {
        let ratios: Vec<_> = rounds.iter().zip(others).map(|(one, other)| one / other).collect();
        Self::of(metric, system, "ratio", &ratios, ratios.len() as u64)
    }
}

/// The smallest value that is not below the share of values, which are sorted and at least one.
#[must_use]
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Ranks, from 0, between which the median of the distribution lies with 95 %: each value is on
/// either side of it like a coin, so the ranks are those of the binomial distribution.
fn median_interval(count: usize) -> (usize, usize) {
    let mut probability = 0.5_f64.powi(count as i32);
    let mut below = probability;
    let mut low = 0;
    while below + probability * (count - low) as f64 / (low + 1) as f64 <= 0.025 {
        probability *= (count - low) as f64 / (low + 1) as f64;
        below += probability;
        low += 1;
    }
    (low, count - 1 - low)
}

/// Writes figures as a list.
///
/// # Errors
/// When the file can't be written.
pub fn write(path: &Path, figures: &[Figure]) -> Result<()> {
    let text = serde_json::to_string_pretty(figures).context("encode the figures")?;
    fs::write(path, text).with_context(|| format!("write the figures to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_interval_are_values_that_were_seen() {
        let rounds: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        let figure = Figure::of("m", "s", "ns", &rounds, 10);
        assert_eq!((figure.min, figure.median, figure.p99), (1.0, 5.0, 10.0));
        // Ranks 2 and 9 of 10: the probability to lie outside is 2 × 11/1024.
        assert_eq!(figure.ci95, [2.0, 9.0]);
    }

    #[test]
    fn few_rounds_say_no_more_than_what_was_seen() {
        assert_eq!(Figure::of("m", "s", "ns", &[7.0], 1).ci95, [7.0, 7.0]);
        assert_eq!(Figure::of("m", "s", "ns", &[1.0, 2.0, 3.0, 4.0, 5.0], 5).ci95, [1.0, 5.0]);
        assert_eq!(Figure::of("m", "s", "ns", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 6).ci95, [1.0, 6.0]);
    }

    #[test]
    fn a_ratio_is_of_rounds_that_belong_together() {
        // The machine became twice as slow in between, and the ratio stays.
        let figure = Figure::ratio("m", "s", &[30.0, 15.0, 30.0], &[20.0, 10.0, 20.0]);
        assert_eq!((figure.median, figure.ci95), (1.5, [1.5, 1.5]));
    }
}
