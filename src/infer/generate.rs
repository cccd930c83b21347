//! Text from a language model, a token at a time.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::session::Session;
use super::task::DataSpec;
use crate::rng::{Purpose, StepKey, Stream};
use crate::usage::UsageError;

/// How text is drawn.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// What the text continues; it is part of the output. May be empty.
    pub prompt: String,
    /// Tokens to draw.
    pub length: usize,
    /// 0: always the likeliest token; 1: as the model says; above: more even.
    pub temperature: f64,
    /// Only that many likeliest tokens are drawn from; none: all.
    pub top_k: Option<usize>,
    pub seed: u64,
}

/// Draws text; `on_text` gets each piece as it comes, the prompt first.
///
/// # Errors
/// A run that is no language model, a prompt with unknown characters, numbers out of range, the device's.
pub fn generate(session: &mut Session, options: &GenerateOptions, on_text: &mut dyn FnMut(&str)) -> Result<Map<String, Value>> {
    let DataSpec::Text(vocab) = session.spec.clone() else {
        return Err(UsageError("this run forecasts a series and has no text to say: use `carrousel forecast`".to_owned()).into());
    };
    let temperature = options.temperature;
    UsageError::unless(temperature.is_finite() && temperature >= 0.0, || format!("--temperature {temperature} is not a number from 0"))?;
    UsageError::unless(options.top_k != Some(0), || "--top-k 0 leaves no token to draw: give a number from 1".to_owned())?;
    let mut random = Stream::new(StepKey::new(options.seed, 0), Purpose::Sample, 0, 0);
    let mut tokens = vocab.encode_prompt(&options.prompt)?;
    if tokens.is_empty() {
        // Without a prompt the text begins after a line's end, or anywhere.
        let newline = vocab.eos().or_else(|| vocab.encode_prompt("\n").ok().and_then(|t| t.first().copied()));
        tokens.push(newline.unwrap_or_else(|| random.below(vocab.size() as u32)));
    }
    let mut text = options.prompt.clone();
    on_text(&text);
    let mut decoder = vocab.decoder_after(&text);
    let mut state = Vec::new();
    let mut logits = session.feed(&tokens, &mut state)?;
    for drawn in 0..options.length {
        let next = draw(&logits, temperature, options.top_k, &mut random);
        let piece = decoder.push(next);
        on_text(&piece);
        text.push_str(&piece);
        if drawn + 1 < options.length {
            logits = session.feed(&[next], &mut state)?;
        }
    }
    let rest = decoder.finish();
    on_text(rest);
    text.push_str(rest);
    Ok(Map::from_iter([("text".to_owned(), json!(text)), ("tokens".to_owned(), json!(options.length))]))
}

/// Words of the prompt that the model does not know and reads as one and the same; empty for a run without text.
pub fn unknown_in_prompt<'a>(session: &Session, prompt: &'a str) -> Vec<&'a str> {
    match &session.spec {
        DataSpec::Text(vocab) if vocab.unk().is_some() => vocab.unknown_in(prompt),
        _ => Vec::new(),
    }
}

/// Draws a token by its logits, which are finite; of equal ones the first is the likelier.
fn draw(logits: &[f32], temperature: f64, top_k: Option<usize>, random: &mut Stream) -> u32 {
    let by_rank = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    let mut drawn_from: Vec<u32> = (0..logits.len() as u32).collect();
    let likeliest = drawn_from.iter().copied().min_by(by_rank).unwrap_or(0);
    if temperature == 0.0 {
        return likeliest;
    }
    if let Some(k) = top_k.filter(|&k| k < drawn_from.len()) {
        drawn_from.select_nth_unstable_by(k, by_rank);
        drawn_from.truncate(k);
    }
    let max = f64::from(logits[likeliest as usize]);
    let weights: Vec<f64> = drawn_from.iter().map(|&t| ((f64::from(logits[t as usize]) - max) / temperature).exp()).collect();
    let mut left = random.uniform_f64() * weights.iter().sum::<f64>();
    for (&token, weight) in drawn_from.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return token;
        }
    }
    likeliest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_softmax_and_top_k_cuts_the_rest() {
        let mut random = Stream::new(StepKey::new(1, 0), Purpose::Sample, 0, 0);
        let mut counts = [0; 3];
        for _ in 0..10_000 {
            counts[draw(&[0.0, 2f32.ln(), f32::MIN], 1.0, None, &mut random) as usize] += 1;
        }
        assert!((6400..6900).contains(&counts[1]) && counts[2] == 0, "{counts:?}");
        assert!((0..100).all(|_| draw(&[0.0, 0.1, 0.0], 5.0, Some(1), &mut random) == 1));
        assert_eq!(draw(&[0.0, 3.0, 3.0], 0.0, None, &mut random), 1);
        let mut counts = [0; 5];
        for _ in 0..1000 {
            counts[draw(&[1.0, 3.0, 2.0, 3.0, 0.0], 1.0, Some(3), &mut random) as usize] += 1;
        }
        assert!(counts[0] == 0 && counts[4] == 0 && counts[1].min(counts[2]).min(counts[3]) > 50, "{counts:?}");
    }
}
