//! Tables as typed columns, from CSV and from records: delimiter, header and time column are recognised, every cell that is wrong is named. What is predicted from what
//! is not known here.

use std::cmp::Ordering;

use super::error::DataError;
use super::records;
use super::source::Source;
use super::time::{Clock, DateOrder, Style, parse_compact, parse_day_first, parse_decimal, parse_iso, parse_month_first};

/// The columns of one file, or of several with the same columns, one after the other.
pub struct Table {
    /// The file's name for messages; of several, the first one.
    pub name: String,
    /// Name of each column.
    pub columns: Vec<String>,
    /// Rows of each file, in order.
    pub file_rows: Vec<usize>,
    files: Vec<String>,
    rows: Vec<Row>,
}

struct Row {
    file: usize,
    line: u64,
    cells: csv::StringRecord,
}

/// What the cells of a column are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Numbers; a few cells may be wrong.
    Numbers,
    /// `true` and `false` in any case.
    Flags,
    /// Words.
    Text,
    /// Nothing.
    Blank,
}

/// The column of times.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// Which column.
    pub column: usize,
    /// How they are written.
    pub style: Style,
    /// One for each row, strictly increasing.
    pub ticks: Vec<i64>,
}

/// Reads a cell as a time: how it is written, and its ticks.
type Parse = fn(&str) -> Option<(Style, i64)>;

const SAME_WAY: &str = "write every date in the same way, such as 2001-12-29";
const SORTED: &str = "sort the rows by time and keep one row for each time (where clocks are put back, write UTC)";

/// Whether a cell is a date in whatever order.
fn is_date(cell: &str) -> bool {
    [parse_iso, parse_day_first, parse_month_first].into_iter().any(|parse| parse(cell).is_some())
}

const DELIMITERS: [u8; 4] = [b';', b'\t', b'|', b','];

impl Table {
    /// Reads CSV and TSV files, and those of [`records`]. A header is recognised by a first line without any number or date; without one the columns are called
    /// `column1`, `column2` and so on. Lines that start with `#` are comments. Between semicolons decimals may have a comma.
    ///
    /// # Errors
    /// A file that is empty or not UTF-8, a line with more or fewer cells than the first, files with different columns.
    pub fn read(sources: &[Source]) -> Result<Self, DataError> {
        let mut table: Option<Self> = None;
        for source in sources {
            let one = Self::read_one(source)?;
            match &mut table {
                None => table = Some(one),
                Some(all) => all.append(one)?,
            }
        }
        table.ok_or_else(|| DataError::Empty { file: "--data".to_string(), wanted: "a header and rows of numbers".to_string() })
    }

    fn read_one(source: &Source) -> Result<Self, DataError> {
        if records::holds_records(source)? {
            return Self::of_records(source);
        }
        let file = source.name.clone();
        let stored = source.read()?;
        let bytes = stored.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&stored);
        let text = std::str::from_utf8(bytes).map_err(|e| {
            let at = e.valid_up_to();
            let line = 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count();
            DataError::Encoding {
                file: file.clone(),
                place: format!("line {line}, byte {}", at + stored.len() - bytes.len()),
                value: bytes[at],
                remedy: if bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF") {
                    "it looks like UTF-16: save the file as UTF-8 (iconv -f UTF-16 -t UTF-8)".to_string()
                } else {
                    "save the file as UTF-8 (iconv -f latin1 -t UTF-8)".to_string()
                },
            }
        })?;
        let empty = || DataError::Empty { file: file.clone(), wanted: "a header and rows of numbers".to_string() };
        if text.starts_with("PAR1") {
            let problem = "it is a Parquet file by its first bytes, but not by its name";
            return Err(super::source::refuse(&file, problem, "rename it to end in .parquet"));
        }
        if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
            let line = 1 + bytes[..at].iter().filter(|&&b| b == b'\n').count() as u64;
            let problem = format!("byte {at} is zero, so this is no table of text");
            let remedy = "give CSV, TSV, JSON lines or Parquet (a workbook can be saved as CSV)".to_string();
            return Err(DataError::Line { file, line, problem, remedy });
        }
        let delimiter = if source.is_named(&[".tsv"]) { b'\t' } else { sniff(text) };
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(delimiter)
            .trim(csv::Trim::All)
            .comment(Some(b'#'))
            .from_reader(bytes);
        let mut records = Vec::new();
        let (mut counted, mut line) = (0, 1);
        let mut record = csv::StringRecord::new();
        while reader.read_record(&mut record).map_err(|e| DataError::Read { file: file.clone(), source: std::io::Error::other(e) })? {
            // The reader's position may lie before blank lines and comments that it skipped.
            let mut start = record.position().map_or(0, |p| p.byte() as usize).min(bytes.len());
            while start < bytes.len() && matches!(bytes[start], b'\n' | b'\r' | b'#') {
                start = if bytes[start] == b'#' {
                    bytes[start..].iter().position(|&b| b == b'\n').map_or(bytes.len(), |n| start + n)
                } else {
                    start + 1
                };
            }
            line += bytes[counted..start].iter().filter(|&&b| b == b'\n').count() as u64;
            counted = start;
            if record.iter().any(|cell| !cell.is_empty()) || (record.len() > 1 && !records.is_empty()) {
                records.push((line, record.clone()));
            }
        }
        if delimiter == b';' {
            point_decimals(&mut records);
        }
        let (first_line, first) = records.first().ok_or_else(empty)?;
        let (first_line, width) = (*first_line, first.len());
        for (line, record) in &records {
            if record.len() != width {
                let hint = if record.iter().any(|cell| cell.contains('\n')) {
                    " (does a quote lack its second one?)"
                } else if record.len() > width && delimiter == b',' {
                    " (a comma inside a cell needs quotes, decimals need a point)"
                } else if record.len() < width {
                    " (is the line cut off?)"
                } else {
                    ""
                };
                return Err(DataError::Ragged { file, line: *line, has: record.len(), expected: width, hint: hint.to_string() });
            }
        }
        let speaks = |cell: &str| !is_missing(cell) && number(cell).is_none() && !is_date(cell);
        let is_header = first.iter().any(speaks) && first.iter().all(|cell| cell.is_empty() || speaks(cell));
        let columns = (0..width)
            .map(|c| match first.get(c) {
                Some(name) if is_header && !name.is_empty() => name.to_string(),
                _ => format!("column{}", c + 1),
            })
            .collect();
        let rows: Vec<Row> = records.into_iter().skip(usize::from(is_header)).map(|(line, cells)| Row { file: 0, line, cells }).collect();
        if rows.is_empty() {
            return Err(DataError::Empty {
                file: format!("{file}, after the header in line {first_line},"),
                wanted: "rows of numbers".to_string(),
            });
        }
        Ok(Self { name: file.clone(), columns, file_rows: vec![rows.len()], files: vec![file], rows })
    }

    fn of_records(source: &Source) -> Result<Self, DataError> {
        let (columns, rows) = records::table(source)?;
        let rows: Vec<Row> = rows.into_iter().map(|(line, cells)| Row { file: 0, line, cells: cells.into() }).collect();
        let file = source.name.clone();
        if columns.is_empty() {
            return Err(DataError::Empty { file, wanted: "records with a key for each column".to_string() });
        }
        Ok(Self { name: file.clone(), columns, file_rows: vec![rows.len()], files: vec![file], rows })
    }

    /// Puts the columns in this order, if they are the same ones.
    fn arrange_as(&mut self, columns: &[String]) {
        let places: Option<Vec<usize>> = columns.iter().map(|name| self.columns.iter().position(|own| own == name)).collect();
        let Some(places) = places.filter(|places| places.len() == self.columns.len() && self.columns != columns) else { return };
        for row in &mut self.rows {
            row.cells = places.iter().map(|&c| row.cells.get(c).unwrap_or_default()).collect();
        }
        self.columns = columns.to_vec();
    }

    fn append(&mut self, other: Self) -> Result<(), DataError> {
        let mut other = other;
        other.arrange_as(&self.columns);
        if self.columns != other.columns {
            return Err(DataError::Column {
                file: other.name,
                column: other.columns.join(", "),
                problem: format!("{} has the columns {}", self.name, self.columns.join(", ")),
                remedy: "files that are read together need the same columns".to_string(),
            });
        }
        let file = self.files.len();
        self.files.extend(other.files);
        self.file_rows.extend(other.file_rows);
        self.rows.extend(other.rows.into_iter().map(|row| Row { file, ..row }));
        Ok(())
    }

    /// How many rows there are, without the header.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// The column of this name; case matters only where it tells columns apart.
    ///
    /// # Errors
    /// [`DataError::UnknownColumn`] with the nearest name and all columns; `flag` is what named it.
    pub fn find(&self, flag: &'static str, name: &str) -> Result<usize, DataError> {
        if let Some(c) = self.columns.iter().position(|column| column == name) {
            return Ok(c);
        }
        let lower = name.to_lowercase();
        let mut same = self.columns.iter().enumerate().filter(|(_, column)| column.to_lowercase() == lower);
        if let (Some((c, _)), None) = (same.next(), same.next()) {
            return Ok(c);
        }
        // A part of the name is near, however much is left out.
        let within = |column: &&String| lower.chars().count() > 2 && column.to_lowercase().contains(&lower);
        let nearest = self
            .columns
            .iter()
            .map(|column| (strsim::damerau_levenshtein(&column.to_lowercase(), &lower), column))
            .min_by_key(|(distance, _)| *distance)
            .filter(|(distance, _)| *distance <= 2.max(lower.chars().count() / 2))
            .map(|(_, column)| column)
            .or_else(|| self.columns.iter().find(within));
        Err(DataError::UnknownColumn {
            flag,
            name: name.to_string(),
            file: self.name.clone(),
            nearest: nearest.map_or(String::new(), |column| format!(" (did you mean '{column}'?)")),
            columns: self.columns.join(", "),
        })
    }

    /// What the cells of column `c` are.
    pub fn kind(&self, c: usize) -> Kind {
        let (mut numbers, mut flags, mut text) = (0, 0, 0);
        for cell in self.cells(c).filter(|cell| !is_missing(cell)) {
            if number(cell).is_some() {
                numbers += 1;
            } else if flag(cell).is_some() {
                flags += 1;
            } else {
                text += 1;
            }
        }
        match (numbers, flags, text) {
            (0, 0, 0) => Kind::Blank,
            (0, _, 0) => Kind::Flags,
            _ if numbers > text + flags => Kind::Numbers,
            _ => Kind::Text,
        }
    }

    /// The numbers of column `c`; blanks, `NA`, `NaN` and the like are `None`; true and false are 1 and 0.
    ///
    /// # Errors
    /// [`DataError::Cell`] for a cell that is none of these, [`DataError::Column`] if all cells are blank.
    pub fn numbers(&self, c: usize) -> Result<Vec<Option<f64>>, DataError> {
        let flags = self.kind(c) == Kind::Flags;
        let mut values = Vec::with_capacity(self.rows.len());
        for (row, cell) in self.cells(c).enumerate() {
            values.push(if is_missing(cell) {
                None
            } else if let Some(value) = if flags { flag(cell) } else { number(cell) } {
                Some(value)
            } else {
                let remedy = if number(&cell.replace(',', ".")).is_some() {
                    "write decimals with a point"
                } else if number(&cell.replace([',', '.', ' ', '\''], "")).is_some() {
                    "write numbers without signs between thousands, and decimals with a point"
                } else {
                    "correct the cell, leave it blank, or leave the column out with --features"
                };
                return Err(self.cell_error(row, c, format!("'{}' is not a number", shorten(cell)), remedy));
            });
        }
        if values.iter().all(Option::is_none) {
            return Err(DataError::Column {
                file: self.name.clone(),
                column: self.columns[c].clone(),
                problem: format!("all {} cells are blank", values.len()),
                remedy: "leave it out: name the columns to use with --features".to_string(),
            });
        }
        Ok(values)
    }

    /// Whether column `c` only numbers the rows: 0, 1, 2 ... or 1, 2, 3 ...
    pub fn is_index(&self, c: usize) -> bool {
        let mut expected = None;
        for cell in self.cells(c) {
            let Ok(value) = cell.parse::<u64>() else { return false };
            if expected.map_or(value > 1, |expected| value != expected) {
                return false;
            }
            expected = Some(value + 1);
        }
        self.rows.len() > 1
    }

    /// Whether column `c` has a name that times have.
    pub fn is_named_after_time(&self, c: usize) -> bool {
        let name = self.columns[c].to_lowercase();
        ["date", "time", "year", "month", "week", "day", "period"].iter().any(|word| name.contains(word)) || name == "ds"
    }

    /// The column of times, if there is one: dates, months or date-times in any column; YYYYMMDD and decimal years in a column that is
    /// named after a time (or, without such a name, among the first two), increasing. Where numbers below 13 leave open which is the day and which
    /// the month, `order` says it, else all cells of the column together.
    ///
    /// # Errors
    /// [`DataError::Cell`] where a cell of that column is not a time like the others, does not come after the one before, or may be two days.
    pub fn times(&self, order: Option<DateOrder>) -> Result<Option<Times>, DataError> {
        let mut found = None;
        for at in 0..3 {
            for c in 0..self.columns.len() {
                let parse: Parse = match at {
                    0 => self.date_order(c, order)?,
                    1 => parse_compact,
                    _ => parse_decimal,
                };
                let hits = self.cells(c).filter(|cell| parse(cell).is_some()).count();
                let named = self.is_named_after_time(c);
                let increasing = || {
                    hits == self.rows.len()
                        && self.cells(c).filter_map(parse).zip(self.cells(c).filter_map(parse).skip(1)).all(|(a, b)| a.1 < b.1)
                };
                let is = match at {
                    0 => hits > self.rows.len() / 2,
                    1 => (named && hits > self.rows.len() / 2) || (c < 2 && increasing()),
                    // Whole years that repeat stand beside a column of months or days: no times by themselves.
                    _ => {
                        let whole = self.cells(c).filter_map(parse).all(|(style, _)| matches!(style, Style::Decimal { digits: 0, .. }));
                        let others =
                            (0..self.columns.len()).any(|o| o != c && self.kind(o) == Kind::Numbers && (named || !self.is_index(o)));
                        others
                            && if named && !whole {
                                hits > self.rows.len() / 2
                            } else {
                                (named || c < 2) && increasing() && self.is_steady(c)
                            }
                    }
                };
                if is {
                    found = Some((c, parse));
                    break;
                }
            }
            if found.is_some() {
                break;
            }
        }
        let Some((column, parse)) = found else { return Ok(None) };
        let mut ticks: Vec<i64> = Vec::with_capacity(self.rows.len());
        let mut style: Option<Style> = None;
        let (mut most, mut unequal, mut short) = (0, false, false);
        for (row, cell) in self.cells(column).enumerate() {
            let (this, tick) = match parse(cell) {
                Some((this, tick)) if style.as_ref().is_none_or(|first| this.is_like(first)) => (this, tick),
                _ => {
                    let first = self.cells(column).find(|cell| parse(cell).is_some()).unwrap_or_default();
                    let problem = if cell.is_empty() {
                        "a blank date".to_string()
                    } else {
                        format!("'{}' is not a date like '{first}'", shorten(cell))
                    };
                    return Err(self.cell_error(row, column, problem, SAME_WAY));
                }
            };
            if let Some(&before) = ticks.last().filter(|&&before| before >= tick) {
                let problem = format!(
                    "{} {} {} of the row before",
                    cell,
                    if before == tick { "repeats" } else { "comes before" },
                    self.rows[row - 1].cells.get(column).unwrap_or_default()
                );
                return Err(self.cell_error(row, column, problem, SORTED));
            }
            if let Style::Decimal { digits, .. } = this {
                unequal |= row > 0 && digits != most;
                most = most.max(digits);
            }
            short |= this.date().is_some_and(|date| date.short);
            ticks.push(tick);
            // The last row's way: its zone is the one in which the times go on.
            style = Some(this);
        }
        let style = match style {
            Some(Style::Decimal { .. }) => Style::Decimal { digits: most, trims: unequal },
            Some(mut style) => {
                // A row after the ninth does not show it.
                style.date_mut().into_iter().for_each(|date| date.short = short);
                style
            }
            None => return Ok(None),
        };
        Ok(Some(Times { column, style, ticks }))
    }

    /// How to read the dates of column `c`, if it holds some.
    fn date_order(&self, c: usize, order: Option<DateOrder>) -> Result<Parse, DataError> {
        let known = order.map(|order| -> Parse {
            match order {
                DateOrder::YearFirst => parse_iso,
                DateOrder::DayFirst => parse_day_first,
                DateOrder::MonthFirst => parse_month_first,
            }
        });
        let hits = |parse: Parse| self.cells(c).filter(|cell| parse(cell).is_some()).count();
        let (iso, day, month) = (hits(parse_iso), hits(parse_day_first), hits(parse_month_first));
        if let Some(known) = known.filter(|&known| hits(known) > 0 && hits(known) == iso.max(day).max(month)) {
            return Ok(known);
        }
        if iso >= day.max(month) || day.max(month) <= self.rows.len() / 2 {
            return Ok(parse_iso);
        }
        if day != month {
            return Ok(if day > month { parse_day_first } else { parse_month_first });
        }
        // Rows of the even grid that the times lie on, if they rise: read the wrong way, hours jump from month to month at midnight.
        let grid = |parse: Parse| {
            let times: Vec<(Style, i64)> = self.cells(c).filter_map(parse).collect();
            let ticks: Vec<i64> = times.iter().map(|(_, tick)| *tick).collect();
            let rises = ticks.windows(2).all(|w| w[0] < w[1]);
            let style = times.into_iter().next().map_or(Style::Rows, |(style, _)| style);
            if rises {
                Clock::infer(style, &ticks).1.and_then(|offsets| offsets.last().copied()).unwrap_or(usize::MAX - 1)
            } else {
                usize::MAX
            }
        };
        match grid(parse_day_first).cmp(&grid(parse_month_first)) {
            Ordering::Less => Ok(parse_day_first),
            Ordering::Greater => Ok(parse_month_first),
            Ordering::Equal => {
                let is_open = |cell: &str| parse_day_first(cell).map(|(_, tick)| tick) != parse_month_first(cell).map(|(_, tick)| tick);
                let row = self.cells(c).position(is_open).unwrap_or(0);
                let cell = self.cells(c).nth(row).unwrap_or_default();
                let problem = format!("'{}' may begin with the day or with the month, and no row tells which", shorten(cell));
                Err(self.cell_error(row, c, problem, "write dates as 2001-12-29"))
            }
        }
    }

    /// An error about the cell of `row` and column `c`.
    pub fn cell_error(&self, row: usize, c: usize, problem: String, remedy: &str) -> DataError {
        let Row { file, line, .. } = self.rows[row];
        DataError::Cell { file: self.files[file].clone(), line, column: self.columns[c].clone(), problem, remedy: remedy.to_string() }
    }

    /// The line of its file in which `row` stands.
    pub fn line(&self, row: usize) -> u64 {
        self.rows[row].line
    }

    /// The cells of column `c`.
    pub fn cells(&self, c: usize) -> impl Iterator<Item = &str> {
        self.rows.iter().map(move |row| row.cells.get(c).unwrap_or_default())
    }

    /// Whether no step of a column of numbers is more than twice another.
    fn is_steady(&self, c: usize) -> bool {
        let values: Vec<f64> = self.cells(c).filter_map(number).collect();
        let steps = || values.windows(2).map(|w| w[1] - w[0]);
        steps().fold(0.0, f64::max) <= 2.0 * steps().fold(f64::INFINITY, f64::min)
    }
}

/// Turns decimal commas into points, where the file has no number with a point: one that has both may mean thousands by one of them.
fn point_decimals(records: &mut [(u64, csv::StringRecord)]) {
    let pointed = |cell: &str| {
        let as_point = cell.replacen(',', ".", 1);
        (as_point != cell && number(cell).is_none() && number(&as_point).is_some()).then_some(as_point)
    };
    if records.iter().any(|(_, cells)| cells.iter().any(|cell| cell.contains('.') && number(cell).is_some())) {
        return;
    }
    for (_, cells) in records {
        if cells.iter().any(|cell| pointed(cell).is_some()) {
            *cells = cells.iter().map(|cell| pointed(cell).unwrap_or_else(|| cell.to_owned())).collect();
        }
    }
}

/// The delimiter that cuts the first lines most evenly; among equals the one that is less likely to be part of a number or a text.
fn sniff(text: &str) -> u8 {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).take(20).collect();
    let count = |line: &str, delimiter: u8| {
        let mut quoted = false;
        line.bytes()
            .filter(|&byte| {
                quoted ^= byte == b'"';
                byte == delimiter && !quoted
            })
            .count()
    };
    let mut best = (0, b',');
    for delimiter in DELIMITERS {
        let Some(first) = lines.first().map(|line| count(line, delimiter)).filter(|&n| n > 0) else { continue };
        let even = lines.iter().filter(|line| count(line, delimiter) == first).count();
        if even > best.0 {
            best = (even, delimiter);
        }
    }
    best.1
}

fn is_missing(cell: &str) -> bool {
    matches!(cell, "" | "NA" | "N/A" | "n/a" | "na" | "#N/A" | "NaN" | "nan" | "NAN" | "null" | "NULL" | "Null" | "None" | "-" | "?" | ".")
}

/// A finite number with a decimal point.
fn number(cell: &str) -> Option<f64> {
    cell.parse::<f64>().ok().filter(|value| value.is_finite())
}

fn flag(cell: &str) -> Option<f64> {
    if cell.eq_ignore_ascii_case("true") {
        Some(1.0)
    } else if cell.eq_ignore_ascii_case("false") {
        Some(0.0)
    } else {
        None
    }
}

fn shorten(cell: &str) -> String {
    if cell.chars().count() <= 40 { cell.to_string() } else { cell.chars().take(40).chain("...".chars()).collect() }
}
