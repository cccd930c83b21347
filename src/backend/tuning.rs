//! Choosing among the candidates of kernels: what a backend has met, what was chosen, and how the fastest is found. Knows neither devices nor files:
//! a backend times, whoever drives it says when, and keeps what came of it.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;

use crate::kernels::SizeClass;

/// What was chosen: by size class ([`SizeClass`] as text) the variant's name.
pub type Choices = BTreeMap<String, String>;

/// One choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub class: String,
    pub variant: String,
    /// Seconds of a launch by candidate, in their order; empty where there was no time or no memory to measure.
    pub times: Vec<(String, f64)>,
}

impl Choice {
    /// Whether it rests on a measurement.
    pub fn is_measured(&self) -> bool {
        !self.times.is_empty()
    }
}

/// By so much must another candidate be faster than the usual one to take its place: less than that is chance.
pub const MARGIN: f64 = 0.03;

/// Classes that wait for a measurement at most; what comes beyond is launched as usual.
const MOST_WANTED: usize = 64;

/// Finds the fastest of `n` candidates: each is timed in turn, round by round, and its shortest time counts. The usual one stays unless another is faster
/// by more than [`MARGIN`]. `time` gives the seconds of one launch; a candidate that cannot be launched has infinitely many. Once `is_over` says so
/// no other launch is timed; none where that is before each candidate was timed once.
///
/// # Errors
/// What `time` reports.
pub fn fastest(
    n: usize,
    usual: usize,
    n_rounds: usize,
    time: &mut dyn FnMut(usize) -> Result<f64>,
    is_over: &mut dyn FnMut() -> bool,
) -> Result<Option<(usize, Vec<f64>)>> {
    let mut best = vec![f64::INFINITY; n];
    'rounds: for round in 0..n_rounds.max(1) {
        for (candidate, best) in best.iter_mut().enumerate() {
            if is_over() {
                if round == 0 {
                    return Ok(None);
                }
                break 'rounds;
            }
            *best = best.min(time(candidate)?);
        }
    }
    let Some(fastest) = (0..n).min_by(|&a, &b| best[a].total_cmp(&best[b])) else { return Ok(None) };
    let stays = best.get(usual).is_some_and(|usual| best[fastest] >= usual * (1.0 - MARGIN));
    Ok(Some((if stays { usual } else { fastest }, best)))
}

/// The choices of one backend. `W` is what a measurement will need.
#[derive(Debug)]
pub struct Tuner<W> {
    choices: Choices,
    /// The candidate's number in each class that was met.
    numbers: HashMap<SizeClass, usize>,
    wanted: Vec<(SizeClass, W)>,
}

impl<W> Default for Tuner<W> {
    fn default() -> Self {
        Self { choices: Choices::new(), numbers: HashMap::new(), wanted: Vec::new() }
    }
}

impl<W> Tuner<W> {
    /// The number of the candidate to launch. In a class that is met for the first time that is the one chosen of `variants`, else the usual one, and
    /// `trial` is kept for a measurement.
    pub fn number(
        &mut self,
        class: SizeClass,
        usual: usize,
        variants: impl FnOnce() -> Vec<String>,
        trial: impl FnOnce() -> Option<W>,
    ) -> usize {
        if let Some(&number) = self.numbers.get(&class) {
            return number;
        }
        let chosen = self.chosen(class, &variants());
        let is_new = self.wanted.iter().all(|(known, _)| *known != class);
        if chosen.is_none() && is_new && self.wanted.len() < MOST_WANTED {
            self.wanted.extend(trial().map(|trial| (class, trial)));
        }
        let number = chosen.unwrap_or(usual);
        self.numbers.insert(class, number);
        number
    }

    /// The number that was chosen of these variants, if one was that is among them.
    pub fn chosen(&self, class: SizeClass, variants: &[String]) -> Option<usize> {
        let name = self.choices.get(&class.to_string())?;
        variants.iter().position(|variant| variant == name)
    }

    /// Takes choices over; what contradicts earlier ones replaces them.
    pub fn choose(&mut self, choices: &Choices) {
        self.choices.extend(choices.iter().map(|(class, variant)| (class.clone(), variant.clone())));
        // A choice that is none of the candidates is found out when the class is met again.
        self.numbers.clear();
        self.wanted.retain(|(class, _)| !choices.contains_key(&class.to_string()));
    }

    /// Whether classes wait for a measurement.
    pub fn wants(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// The classes that wait for a measurement.
    pub fn take_wanted(&mut self) -> Vec<(SizeClass, W)> {
        std::mem::take(&mut self.wanted)
    }

    /// Writes a choice down.
    pub fn settle(&mut self, class: SizeClass, number: usize, variant: String) {
        self.numbers.insert(class, number);
        self.choices.insert(class.to_string(), variant);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASS: SizeClass = SizeClass { kernel: "k", size: [16, 32, 64], form: "NN" };

    fn names() -> Vec<String> {
        ["a", "b", "c"].map(String::from).to_vec()
    }

    #[test]
    fn the_fastest_is_chosen_by_its_shortest_time_and_the_usual_one_stays_within_the_margin() {
        let pick = |times: [[f64; 2]; 3], usual: usize| {
            let mut calls = [0; 3];
            let mut time = |candidate: usize| {
                calls[candidate] += 1;
                Ok(times[candidate][calls[candidate] - 1])
            };
            fastest(3, usual, 2, &mut time, &mut || false).unwrap().unwrap()
        };
        assert_eq!(pick([[2.0, 2.0], [5.0, 1.0], [3.0, 3.0]], 0), (1, vec![2.0, 1.0, 3.0]));
        assert_eq!(pick([[1.0, 1.0], [0.98, 1.5], [3.0, 3.0]], 0).0, 0, "2 % are chance");
        assert_eq!(pick([[1.0, 1.0], [0.98, 1.5], [3.0, 3.0]], 2).0, 1);
        assert_eq!(pick([[f64::INFINITY; 2], [9.0, 9.0], [f64::INFINITY; 2]], 0).0, 1, "the usual one cannot be launched");
    }

    #[test]
    fn when_time_is_up_what_was_measured_counts_if_each_was_measured_once() {
        for (n_allowed, expected) in [(2, None), (3, Some(2)), (4, Some(2))] {
            let mut left = n_allowed;
            let mut is_over = || {
                left -= 1;
                left < 0
            };
            let mut n_timed = 0;
            let mut time = |candidate: usize| {
                n_timed += 1;
                Ok([3.0, 2.0, 1.0][candidate])
            };
            let found = fastest(3, 0, 9, &mut time, &mut is_over).unwrap().map(|found| found.0);
            assert_eq!((found, n_timed), (expected, n_allowed));
        }
        let failed = fastest(2, 0, 1, &mut |_| anyhow::bail!("lost"), &mut || false);
        assert!(failed.is_err());
    }

    #[test]
    fn a_class_is_launched_as_usual_and_waits_for_its_measurement_until_something_is_chosen() {
        let mut tuner: Tuner<&str> = Tuner::default();
        let trial = || Some("trial");
        assert_eq!((tuner.number(CLASS, 1, names, trial), tuner.wants()), (1, true));
        assert_eq!(tuner.number(CLASS, 1, || unreachable!("met before"), trial), 1);
        assert_eq!(tuner.take_wanted(), [(CLASS, "trial")]);
        tuner.settle(CLASS, 2, "c".to_owned());
        assert_eq!((tuner.number(CLASS, 1, names, trial), tuner.wants()), (2, false));
        // Chosen elsewhere, before it was measured here.
        let mut other: Tuner<&str> = Tuner::default();
        other.number(CLASS, 1, names, trial);
        other.choose(&Choices::from([(CLASS.to_string(), "a".to_owned())]));
        assert_eq!((other.number(CLASS, 1, names, trial), other.wants()), (0, false));
        // Of another version of the program, maybe: no candidate has that name.
        let mut odd: Tuner<&str> = Tuner::default();
        odd.choose(&Choices::from([(CLASS.to_string(), "z".to_owned())]));
        assert_eq!((odd.number(CLASS, 1, names, trial), odd.wants()), (1, true));
    }

    #[test]
    fn sizes_fall_into_four_classes_an_octave() {
        let rounded: Vec<u32> = [0, 1, 16, 17, 20, 21, 32, 33, 100, 1000, 5000, u32::MAX].map(SizeClass::rounded).to_vec();
        assert_eq!(rounded, [16, 16, 16, 20, 20, 24, 32, 40, 112, 1024, 5120, u32::MAX]);
        assert_eq!(CLASS.to_string(), "k 16x32x64 NN");
    }
}
