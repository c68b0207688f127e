//! Plots for the README, as SVG.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use crate::metric::{Metric, Numbers, PORTS};
use crate::system::System;

const SIZE: (u32, u32) = (760, 420);
const FONT: (&str, u32) = ("sans-serif", 14);

/// Draws into a file.
type Plot = fn(&Path, &Numbers) -> Result<()>;

/// Draws what there are numbers for into a directory.
pub(crate) fn draw(directory: &Path, numbers: &Numbers) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let plots: [(&str, Plot); 2] =
        [("connections-by-ports.svg", connections), ("packets-by-system.svg", packets)];
    for (name, plot) in plots {
        let path = directory.join(name);
        plot(&path, numbers).with_context(|| format!("draw {}", path.display()))?;
    }
    Ok(())
}

const fn colour(system: System) -> RGBColor {
    match system {
        System::VethDirect => RGBColor(0xbb, 0xbb, 0xbb),
        System::Routed => RGBColor(0x66, 0x66, 0x66),
        System::IptablesLegacy => RGBColor(0xee, 0x66, 0x77),
        System::IptablesNft => RGBColor(0xaa, 0x33, 0x77),
        System::NftMap => RGBColor(0xcc, 0xbb, 0x44),
        System::Docker => RGBColor(0x44, 0x77, 0xaa),
        System::Netavark => RGBColor(0x99, 0x77, 0xcc),
        System::CniBridge => RGBColor(0xdd, 0x99, 0x66),
        System::NetdpEbpf => RGBColor(0x22, 0x88, 0x33),
        System::NetdpIptables => RGBColor(0x66, 0xcc, 0xee),
    }
}

/// The medians of a system by number of published ports.
fn by_ports(numbers: &Numbers, system: System) -> Vec<(f64, f64)> {
    let median = |ports: &u16| {
        let figure = numbers.get(&format!("crr_{ports}"))?.figure(system)?;
        Some((f64::from(*ports), figure.median))
    };
    PORTS.iter().filter_map(median).collect()
}

/// Connections a second against the number of published ports.
fn connections(path: &Path, numbers: &Numbers) -> Result<()> {
    let lines = System::ALL.map(|system| (system, by_ports(numbers, system)));
    let points = || lines.iter().flat_map(|(_, line)| line);
    let most = points().map(|(_, rate)| *rate).fold(0.0, f64::max);
    if most == 0.0 {
        return Ok(());
    }
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("Connections a second, by number of published ports", FONT)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d((1.0..40_000.0).log_scale(), 0.0..most * 1.1)
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .x_desc("published ports; the last one is dialled")
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .disable_x_mesh()
        .light_line_style(WHITE)
        .draw()
        .map_err(drawing)?;
    for (system, line) in lines.into_iter().filter(|(_, line)| !line.is_empty()) {
        let colour = colour(system);
        let width = if system == System::NetdpEbpf { 3 } else { 2 };
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(width)).point_size(3))
            .map_err(drawing)?
            .label(system.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.8))
        .draw()
        .map_err(drawing)?;
    area.present().map_err(drawing)
}

/// Small packets a second by system.
fn packets(path: &Path, numbers: &Numbers) -> Result<()> {
    let metrics: Vec<&Metric> =
        ["udp64_pps_out", "udp64_pps_in"].iter().filter_map(|name| numbers.get(name)).collect();
    let bars: Vec<_> = System::ALL
        .iter()
        .flat_map(|system| metrics.iter().map(|metric| (*system, metric.figure(*system))))
        .filter_map(|(system, figure)| Some((system, figure?)))
        .collect();
    let most = bars.iter().map(|(_, figure)| figure.median).fold(0.0, f64::max);
    if most == 0.0 {
        return Ok(());
    }
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let rows = bars.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption("64-byte UDP packets a second through one CPU", FONT)
        .margin(12)
        .x_label_area_size(24)
        .y_label_area_size(150)
        .build_cartesian_2d(0.0..most * 1.05, 0.0..rows)
        .map_err(drawing)?;
    let names: Vec<_> = bars
        .iter()
        .map(|(system, figure)| {
            let way = figure.metric.rsplit('_').next().unwrap_or_default();
            format!("{} {way}", system.name())
        })
        .collect();
    let mut mesh = chart.configure_mesh();
    mesh.disable_mesh().disable_y_axis().x_label_formatter(&whole).draw().map_err(drawing)?;
    for (row, ((system, figure), name)) in bars.iter().zip(names).enumerate() {
        let (low, high) = (rows - row as f64 - 0.85, rows - row as f64 - 0.15);
        chart
            .draw_series([Rectangle::new(
                [(0.0, low), (figure.median, high)],
                colour(*system).filled(),
            )])
            .map_err(drawing)?;
        let style = FONT.into_font().into_text_style(&area);
        let at = chart.backend_coord(&(0.0, (low + high) / 2.0));
        area.draw(&Text::new(name, (at.0 - 150, at.1 - 7), style)).map_err(drawing)?;
    }
    area.present().map_err(drawing)
}

/// A label of an axis.
fn whole(value: &f64) -> String {
    format!("{value:.0}")
}

/// Errors of the drawing crate borrow what is drawn.
fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}
