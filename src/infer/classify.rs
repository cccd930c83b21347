//! The classes of sequences that a run did not train on, or of their steps.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::evaluate::{Judged, evaluate_watched, likeliest, places};
use super::predictions::{Predictions, log_softmax};
use super::session::Session;
use super::task::{Corpus, DataSpec, Truth};
use crate::data::sequences::{LabelSpec, Labelled};

/// Says of each sequence of `data`, or of each of its steps, which class it is: `labels` (`sequence`, `step` where steps have classes, `class`,
/// `probability`), in the order of the files; and how right that is (`accuracy`, `macro_f1`, `scored`), where the data have labels that the run
/// knows. With `output` the probabilities of all classes go to a CSV file.
///
/// # Errors
/// Data that cannot be read; a run without classes; a file that cannot be written; the device's.
pub fn classify(session: &mut Session, data: &[String], output: Option<&Path>) -> Result<Map<String, Value>> {
    let other = Corpus::load_other(&session.config, data, &session.spec, Labelled::Some)?;
    let set = other.eval_set(&session.config)?;
    let (Truth::Sequences(sequences, _), DataSpec::Sequences(spec)) = (&set.truth, session.spec.clone()) else {
        anyhow::bail!("a run of --task {} has no classes to tell", session.config.task.name());
    };
    let (LabelSpec::Classes(classes) | LabelSpec::Tags(classes)) = &spec.label else {
        anyhow::bail!("a run of --task {} has no classes to tell", session.config.task.name());
    };
    let mut predictions = output.map(|path| Predictions::new(path, &session.spec)).transpose()?;
    let mut said: Vec<(usize, usize, usize, f64)> = Vec::new();
    let mut watch = |batch: &crate::data::Batch, outputs: &[f32]| {
        let rows = outputs.chunks_exact(classes.len());
        let mut say = |(i, t): (usize, usize), row: &[f32]| {
            let class = likeliest(row);
            said.push((i, t, class, log_softmax(row, class as u32).exp()));
        };
        if batch.is_of_steps() {
            places(batch).zip(rows).for_each(|(place, row)| say(place, row));
        } else {
            batch.streams.iter().zip(rows).for_each(|(&i, row)| say((i as usize, 0), row));
        }
        if let Some(predictions) = &mut predictions {
            predictions.add(batch, outputs);
        }
    };
    let evaluation = evaluate_watched(&set, session, Some(&mut watch)).context("the data to classify")?;
    if let Some(predictions) = predictions {
        predictions.write(&set)?;
    }
    said.sort_by_key(|&(i, t, ..)| (i, t));
    let of_steps = matches!(spec.label, LabelSpec::Tags(_));
    let labels = said.into_iter().map(|(i, t, class, probability)| {
        let mut label = Map::from_iter([("sequence".to_owned(), json!(sequences.sequence_name(i)))]);
        if of_steps {
            label.insert("step".to_owned(), json!(t + 1));
        }
        label.insert("class".to_owned(), json!(classes[class].name));
        label.insert("probability".to_owned(), json!(probability));
        Value::Object(label)
    });
    let mut found = Map::from_iter([("labels".to_owned(), labels.collect())]);
    if let Judged::Classes(scores) = &evaluation.judged {
        let n: u64 = scores.confusion.iter().flatten().sum();
        found.insert("scored".to_owned(), json!(n));
        if n > 0 {
            found.insert("accuracy".to_owned(), json!(scores.accuracy()));
            found.insert("macro_f1".to_owned(), json!(scores.macro_f1()));
        }
    }
    Ok(found)
}
