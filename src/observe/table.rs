//! The short table at the end of a run: plain text, aligned, for a terminal or a log.

use std::fmt;

/// A title and sections of rows.
#[derive(Clone, Debug, Default)]
pub struct Table {
    title: String,
    sections: Vec<Section>,
}

#[derive(Clone, Debug)]
enum Section {
    Pairs { heading: String, rows: Vec<(String, String)> },
    Columns { heading: String, header: Vec<String>, rows: Vec<Vec<String>> },
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), sections: Vec::new() }
    }

    /// Adds a section of names and values, for instance losses; a section without rows is left out.
    pub fn pairs<K: Into<String>, V: Into<String>>(mut self, heading: impl Into<String>, rows: impl IntoIterator<Item = (K, V)>) -> Self {
        let rows: Vec<_> = rows.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        if !rows.is_empty() {
            self.sections.push(Section::Pairs { heading: heading.into(), rows });
        }
        self
    }

    /// Adds a section with a header, for instance one row a device; a section without rows is left out. Columns whose cells are all numbers
    /// (or a dash, or empty) stand to the right. A row may be shorter than the header.
    pub fn columns(mut self, heading: impl Into<String>, header: &[&str], rows: Vec<Vec<String>>) -> Self {
        if !rows.is_empty() {
            let header = header.iter().map(|&name| name.to_owned()).collect();
            self.sections.push(Section::Columns { heading: heading.into(), header, rows });
        }
        self
    }
}

impl fmt::Display for Table {
    /// Lines without trailing blanks, the last one ended too.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.title.is_empty() {
            writeln!(f, "{}", clean(&self.title))?;
        }
        // One width for the names of all sections, so that their values stand in one column.
        let name_width = self
            .sections
            .iter()
            .flat_map(|section| match section {
                Section::Pairs { rows, .. } => rows.as_slice(),
                Section::Columns { .. } => &[],
            })
            .map(|(name, _)| width(name))
            .max()
            .unwrap_or(0);
        for section in &self.sections {
            match section {
                Section::Pairs { heading, rows } => {
                    writeln!(f, "\n{}", clean(heading))?;
                    for (name, value) in rows {
                        line(f, &[pad(name, name_width, false), clean(value)])?;
                    }
                }
                Section::Columns { heading, header, rows } => {
                    writeln!(f, "\n{}", clean(heading))?;
                    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0).max(header.len());
                    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
                    let widths: Vec<usize> = (0..n_columns)
                        .map(|column| rows.iter().chain([header]).map(|row| width(&cell(row, column))).max().unwrap_or(0))
                        .collect();
                    let right: Vec<bool> = (0..n_columns).map(|column| rows.iter().all(|row| is_numeric(&cell(row, column)))).collect();
                    for row in [header].into_iter().chain(rows) {
                        let cells: Vec<String> =
                            (0..n_columns).map(|column| pad(&cell(row, column), widths[column], right[column])).collect();
                        line(f, &cells)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, cells: &[String]) -> fmt::Result {
    writeln!(f, "{}", format!("  {}", cells.join("  ")).trim_end())
}

/// Text without control characters, which could move the cursor: names come from files and drivers.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Characters, which is the width on a terminal for all but East Asian and combining ones.
fn width(text: &str) -> usize {
    text.chars().count()
}

fn pad(text: &str, to: usize, right: bool) -> String {
    let blanks = " ".repeat(to.saturating_sub(width(text)));
    if right { blanks + &clean(text) } else { clean(text) + &blanks }
}

/// Whether a cell is a number, with or without a unit behind it: `41.2k`, `12.3 s`, `1:2` is none.
fn is_numeric(cell: &str) -> bool {
    let text = cell.trim();
    if text.is_empty() || ["-", "nan", "inf", "-inf"].contains(&text) {
        return true;
    }
    let end = text.find(|c: char| !"+-.,0123456789e".contains(c)).unwrap_or(text.len());
    text[..end].replace(',', "").trim_end_matches('e').parse::<f64>().is_ok()
        && ["", "%", "s", "ms", "k", "M", "G", "B", "KiB", "MiB", "GiB", "TiB"].contains(&text[end..].trim())
}
