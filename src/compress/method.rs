//! The methods by name, what they make smaller, and by how much.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::codec::Codec;

/// How gradients are made smaller on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Method {
    /// Not at all.
    #[default]
    None,
    Fp16,
    Bf16,
    Int8,
    Onebit,
    /// The share of each tensor that is sent.
    Topk {
        ratio: f64,
    },
    /// The rank of the approximation.
    Powersgd {
        rank: usize,
    },
}

/// Tensors of fewer values are not worth it.
const LEAST_VALUES: usize = 1024;
/// The largest share that is worth its places.
pub const MOST_RATIO: f64 = 0.25;
/// Far above what is of use.
pub const MOST_RANK: usize = 256;
/// The share that is sent at the start of the warm-up, and the steps in which it falls to a quarter of itself.
const FIRST_RATIO: f64 = 0.25;
const WARM_UP_QUARTER: f64 = 64.0;

impl Method {
    /// Whether a matrix of rows and columns is made smaller; what is not goes whole.
    pub fn takes(self, [rows, cols]: [usize; 2]) -> bool {
        let n = rows * cols;
        let is_matrix = rows > 1 && cols > 1 && n >= LEAST_VALUES;
        match self {
            Self::None => false,
            Self::Powersgd { rank } => is_matrix && rank * (rows + cols) < n,
            _ => is_matrix,
        }
    }

    /// Whether it takes the method a few steps to get as small as it is to be.
    pub fn warm_up_steps(self) -> u64 {
        match self {
            Self::Topk { ratio } => (WARM_UP_QUARTER * (FIRST_RATIO / ratio).log(4.0)).ceil().max(0.0) as u64,
            _ => 0,
        }
    }

    /// The share of each tensor that `topk` sends in a step, counted from 1: it falls by a constant factor from a quarter to what was asked for.
    pub fn density(self, step: u64) -> f64 {
        match self {
            Self::Topk { ratio } if step > self.warm_up_steps() => ratio,
            Self::Topk { ratio } => (FIRST_RATIO * 4f64.powf(-(step.saturating_sub(1) as f64) / WARM_UP_QUARTER)).max(ratio),
            _ => 1.0,
        }
    }

    pub(super) fn codec(self) -> Option<Codec> {
        Some(match self {
            Self::Fp16 => Codec::Fp16,
            Self::Bf16 => Codec::Bf16,
            Self::Int8 => Codec::Int8,
            Self::Onebit => Codec::Onebit,
            _ => return None,
        })
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Fp16 => f.write_str("fp16"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Int8 => f.write_str("int8"),
            Self::Onebit => f.write_str("onebit"),
            Self::Topk { ratio } => write!(f, "topk:{ratio}"),
            Self::Powersgd { rank } => write!(f, "powersgd:{rank}"),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, number) = text.split_once(':').map_or((text, None), |(name, number)| (name, Some(number)));
        let method = match (name, number) {
            ("none", None) => Self::None,
            ("fp16", None) => Self::Fp16,
            ("bf16", None) => Self::Bf16,
            ("int8", None) => Self::Int8,
            ("onebit", None) => Self::Onebit,
            ("topk", Some(number)) => {
                let ratio = number.parse().ok().filter(|ratio| *ratio > 0.0 && *ratio <= MOST_RATIO);
                let ratio = ratio
                    .ok_or_else(|| format!("'{number}' is no share to send: give one above 0 and at most {MOST_RATIO}, as in topk:0.01"))?;
                Self::Topk { ratio }
            }
            ("powersgd", Some(number)) => {
                let rank = number.parse().ok().filter(|rank| (1..=MOST_RANK).contains(rank));
                let rank = rank.ok_or_else(|| format!("'{number}' is no rank: give one from 1 to {MOST_RANK}, as in powersgd:4"))?;
                Self::Powersgd { rank }
            }
            ("topk", None) => return Err("topk needs the share to send, as in topk:0.01".to_owned()),
            ("powersgd", None) => return Err("powersgd needs the rank, as in powersgd:4".to_owned()),
            _ => {
                return Err(format!("'{text}' is not one of none, fp16, bf16, int8, onebit, topk:RATIO, powersgd:RANK"));
            }
        };
        Ok(method)
    }
}

impl TryFrom<String> for Method {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Method> for String {
    fn from(method: Method) -> Self {
        method.to_string()
    }
}
