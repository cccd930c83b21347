//! The `.ts` files of the UEA and UCR archives (as sktime reads them): a header of `@` lines, then a sequence a line: for each dimension its values with
//! commas between, dimensions and the label separated by colons.

use super::error::DataError;
use super::sequences::{Cells, Labelled, Raw};
use super::source::Source;

/// A file, read.
pub struct TsFile {
    pub sequences: Vec<Raw>,
    /// Numbers of each step.
    pub n_features: usize,
    /// The classes that the header declares, in its order; none: labels are numbers.
    pub classes: Option<Vec<String>>,
}

/// Whether a source is such a file: by its name, or where it has none by its first character.
///
/// # Errors
/// The source's.
pub fn is_one(source: &Source) -> Result<bool, DataError> {
    if source.path().is_some() || source.name.contains('.') {
        return Ok(source.is_named(&[".ts"]));
    }
    let mut head = [0; 1];
    Ok(source.open()?.fill(&mut head)? == 1 && head[0] == b'@')
}

/// Reads a file.
///
/// # Errors
/// The file and the line, and what is wrong there.
pub fn read(source: &Source, labelled: Labelled) -> Result<TsFile, DataError> {
    let bytes = source.read()?;
    let text = String::from_utf8_lossy(&bytes);
    let wrong = |line: usize, problem: String, remedy: &str| DataError::Line {
        file: source.name.clone(),
        line: line as u64,
        problem,
        remedy: remedy.to_string(),
    };
    let (mut classes, mut numbers, mut in_data) = (None, false, false);
    let mut sequences: Vec<Raw> = Vec::new();
    let mut n_features = 0;
    for (idx, line) in text.lines().enumerate() {
        let (number, line) = (idx + 1, line.trim());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if !in_data {
            let Some(header) = line.strip_prefix('@') else {
                return Err(wrong(number, "values stand before @data".to_string(), "a .ts file has a header of @ lines and then @data"));
            };
            let mut words = header.split_whitespace();
            let key = words.next().unwrap_or_default().to_lowercase();
            let is_true = words.next().is_some_and(|word| word.eq_ignore_ascii_case("true"));
            match key.as_str() {
                "timestamps" if is_true => {
                    return Err(wrong(number, "values with time stamps are not read".to_string(), "write the values alone, evenly spaced"));
                }
                "classlabel" if is_true => classes = Some(words.map(str::to_string).collect::<Vec<_>>()),
                "targetlabel" if is_true => numbers = true,
                "data" => {
                    in_data = true;
                    if classes.is_none() && !numbers && labelled == Labelled::All {
                        return Err(wrong(
                            number,
                            "the header declares no labels".to_string(),
                            "give a file with @classLabel true and the classes, or @targetlabel true",
                        ));
                    }
                }
                _ => {}
            }
            continue;
        }
        let mut parts: Vec<&str> = line.split(':').collect();
        let is_bare = classes.is_none() && !numbers;
        let label = parts.pop().filter(|_| !is_bare).unwrap_or_default().trim().to_string();
        if is_bare {
            parts = line.split(':').collect();
        }
        if parts.is_empty() {
            return Err(wrong(number, "there is no colon between values and label".to_string(), "write VALUE,VALUE,...:LABEL"));
        }
        if n_features == 0 {
            n_features = parts.len();
        }
        if parts.len() != n_features {
            let problem = format!("{} dimensions, but the first sequence has {n_features}", parts.len());
            return Err(wrong(number, problem, "give every sequence the same dimensions"));
        }
        let mut columns = Vec::with_capacity(n_features);
        for (d, part) in parts.iter().enumerate() {
            let parse = |cell: &str| match cell.trim() {
                "?" | "" => Ok(None),
                cell if cell.eq_ignore_ascii_case("nan") => Ok(None),
                cell => cell.parse::<f64>().ok().filter(|value| value.is_finite()).map(Some).ok_or_else(|| {
                    wrong(number, format!("'{cell}' in dimension {} is not a number", d + 1), "correct it, or write ? for a blank")
                }),
            };
            columns.push(part.split(',').map(parse).collect::<Result<Vec<_>, _>>()?);
        }
        let n_steps = columns[0].len();
        if let Some(d) = columns.iter().position(|column| column.len() != n_steps) {
            let problem = format!("dimension {} has {} steps, the first has {n_steps}", d + 1, columns[d].len());
            return Err(wrong(number, problem, "dimensions of one sequence need the same steps; write ? for blanks"));
        }
        if let Some(classes) =
            classes.as_ref().filter(|classes| !classes.is_empty() && !classes.contains(&label) && labelled == Labelled::All)
        {
            let problem = format!("the label '{label}' is not among those of @classLabel, {}", classes.join(", "));
            return Err(wrong(number, problem, "correct the label or the header"));
        }
        let values = (0..n_steps).flat_map(|t| columns.iter().map(move |column| column[t])).collect();
        let name = (sequences.len() + 1).to_string();
        sequences.push(Raw { file: source.name.clone(), line: number as u64, name, label, tags: Vec::new(), cells: Cells::Values(values) });
    }
    if sequences.is_empty() {
        return Err(DataError::Empty { file: source.name.clone(), wanted: "a header, @data and a sequence a line".to_string() });
    }
    Ok(TsFile { sequences, n_features, classes: classes.filter(|_| !numbers) })
}
