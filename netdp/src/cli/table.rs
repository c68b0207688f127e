//! Aligned columns for people to read.

use std::fmt;

/// A table on its way to the terminal: as wide as its contents, two blanks between columns.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new<const N: usize>(titles: [&str; N]) -> Self {
        Self { rows: vec![titles.map(str::to_owned).into()] }
    }

    /// Adds a row; what is empty shows as a dash, so that columns can be counted.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let dashed = |cell: String| if cell.is_empty() { "-".to_owned() } else { cell };
        self.rows.push(cells.map(dashed).into());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_contents() {
        let mut table = Table::new(["NAME", "N", "LAST"]);
        table.row(["a".into(), "100".into(), "x".into()]);
        table.row(["größer".into(), "1".into(), String::new()]);
        assert_eq!(
            table.to_string(),
            "NAME    N    LAST\n\
             a       100  x\n\
             größer  1    -\n"
        );
    }
}
