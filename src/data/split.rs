//! How one source is cut into training, validation and test.

use serde::{Deserialize, Serialize};

use super::error::DataError;

/// Fractions of training, validation and test; they add up to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f64; 3]", into = "[f64; 3]")]
pub struct Split {
    /// Fraction for training, above 0.
    pub train: f64,
    /// Fraction for validation.
    pub valid: f64,
    /// Fraction for the test.
    pub test: f64,
}

impl From<[f64; 3]> for Split {
    fn from([train, valid, test]: [f64; 3]) -> Self {
        Self { train, valid, test }
    }
}

impl From<Split> for [f64; 3] {
    fn from(split: Split) -> Self {
        [split.train, split.valid, split.test]
    }
}

impl Default for Split {
    fn default() -> Self {
        Self { train: 0.85, valid: 0.05, test: 0.1 }
    }
}

impl Split {
    /// Three fractions that add up to 1, the first above 0.
    ///
    /// # Errors
    /// [`DataError::Option`] otherwise.
    pub fn new(train: f64, valid: f64, test: f64) -> Result<Self, DataError> {
        let sum = train + valid + test;
        let problem = if [train, valid, test].iter().any(|f| !f.is_finite() || *f < 0.0) {
            "a fraction must be a number from 0 to 1".to_string()
        } else if train == 0.0 {
            "nothing is left for training".to_string()
        } else if (sum - 1.0).abs() > 1e-6 {
            format!("the fractions add up to {}, not 1", (sum * 1e6).round() / 1e6)
        } else {
            return Ok(Self { train, valid, test });
        };
        Err(refuse(&format!("{train},{valid},{test}"), problem))
    }

    /// Where `n` items in the order training, validation, test are cut: the first of validation, the first of the test.
    /// An item belongs to the later part only if it lies wholly beyond the fraction.
    pub fn cuts(&self, n: usize) -> (usize, usize) {
        // The small number takes back what the sum of two decimal fractions is off by.
        let at = |fraction: f64| ((fraction * n as f64 - 1e-6).ceil().max(0.0) as usize).min(n);
        (at(self.train), at(self.train + self.valid))
    }

    /// The validation part of what is training and validation together.
    pub fn valid_of_rest(&self) -> f64 {
        self.valid / (self.train + self.valid)
    }
}

impl std::str::FromStr for Split {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        let &[train, valid, test] = parts.as_slice() else {
            let n = if text.trim().is_empty() { 0 } else { parts.len() };
            return Err(refuse(text, format!("3 fractions are needed, {n} given")));
        };
        let number = |part: &str| part.parse::<f64>().map_err(|_| refuse(text, format!("'{part}' is not a number")));
        Self::new(number(train)?, number(valid)?, number(test)?)
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{},{},{}", self.train, self.valid, self.test)
    }
}

fn refuse(value: &str, problem: String) -> DataError {
    DataError::Option {
        name: "--split",
        value: value.to_string(),
        problem,
        remedy: "write TRAIN,VALID,TEST as fractions that add up to 1, such as 0.85,0.05,0.1".to_string(),
    }
}
