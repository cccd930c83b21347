//! Initial parameters, in PyTorch's order: functions of (seed, tensor) alone.

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use crate::params::{ParamTable, Tensor};
use crate::rng::{Purpose, StepKey, Stream};
use crate::shape::GATES;

/// How weights start. Biases start at zero except with [`Init::Torch`] and [`Init::Uniform`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Init {
    /// U(-a, a) for everything, as in older papers.
    Uniform(f64),
    /// As `torch.nn`: LSTM and linear layers U(-1/sqrt(n), 1/sqrt(n)), n = H or inputs; embedding N(0, 1), when tied U(-1/sqrt(E), 1/sqrt(E)) instead.
    Torch,
    /// U(-a, a), a = sqrt(6 / (inputs + outputs)), each gate for itself (Glorot and Bengio 2010).
    Xavier,
    /// N(0, 2 / inputs) (He et al. 2015).
    He,
    /// Recurrent matrices orthogonal, each gate for itself (Saxe et al. 2014), the others as [`Init::Xavier`].
    Orthogonal,
}

impl std::str::FromStr for Init {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (name, number) = s.split_once(':').map_or((s, None), |(name, number)| (name, Some(number)));
        match (name, number) {
            ("uniform", number) => {
                let a = number.unwrap_or("0.1").parse::<f64>().ok().filter(|a| a.is_finite() && *a > 0.0);
                a.map(Self::Uniform).ok_or_else(|| format!("{s:?}: uniform:A needs a positive number A, as in uniform:0.1"))
            }
            ("torch", None) => Ok(Self::Torch),
            ("xavier", None) => Ok(Self::Xavier),
            ("he", None) => Ok(Self::He),
            ("orthogonal", None) => Ok(Self::Orthogonal),
            _ => Err(format!("{s:?} is not one of uniform:A, torch, xavier, he, orthogonal")),
        }
    }
}

impl TryFrom<String> for Init {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Init> for String {
    fn from(init: Init) -> Self {
        init.to_string()
    }
}

impl std::fmt::Display for Init {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uniform(a) => write!(f, "uniform:{a}"),
            Self::Torch => f.write_str("torch"),
            Self::Xavier => f.write_str("xavier"),
            Self::He => f.write_str("he"),
            Self::Orthogonal => f.write_str("orthogonal"),
        }
    }
}

/// Initial values of every tensor of `table`, in its order, each in PyTorch's order. `gate_bias` are starting biases of i, f, g, o: they replace
/// `bias_ih`, and `bias_hh` starts at zero.
pub fn initial(config: &ModelConfig, table: &ParamTable, init: Init, gate_bias: Option<[f64; 4]>, seed: u64) -> Vec<Vec<f32>> {
    let key = StepKey::new(seed, 0);
    // A tensor's number is its place among PyTorch's, which has a layer's forward direction before the reverse; how the table lays them out is another matter.
    let of_torch = |tensor: &Tensor| (tensor.layer, tensor.name.ends_with("_reverse"));
    let mut order: Vec<usize> = (0..table.tensors().len()).collect();
    order.sort_by_key(|&idx| of_torch(&table.tensors()[idx]));
    let mut drawn = vec![Vec::new(); order.len()];
    for (number, idx) in order.into_iter().enumerate() {
        drawn[idx] = values(config, &table.tensors()[idx], init, gate_bias, &mut Stream::new(key, Purpose::Init, number as u32, 0));
    }
    drawn
}

fn values(config: &ModelConfig, tensor: &Tensor, init: Init, gate_bias: Option<[f64; 4]>, random: &mut Stream) -> Vec<f32> {
    let n: usize = tensor.shape.iter().product();
    let mut uniform = |a: f64, n: usize| -> Vec<f32> { (0..n).map(|_| ((2.0 * random.uniform_f64() - 1.0) * a) as f32).collect() };
    let (is_lstm, is_bias) = (tensor.name.starts_with("lstm."), tensor.shape.len() == 1);
    if tensor.name.contains(".initial_") {
        return vec![0.0; n];
    }
    // Gains start at 1; behind that of the cell state stands its bias.
    if tensor.name.contains(".norm_c") {
        return (0..n).map(|i| if i < n / 2 { 1.0 } else { 0.0 }).collect();
    }
    if tensor.name.contains(".norm_") {
        return vec![1.0; n];
    }
    let hidden = if is_lstm { config.hidden.of(tensor.layer - 1) } else { config.layer_units(config.n_layers - 1) };
    if let (Some(biases), true, true) = (gate_bias, is_lstm, is_bias) {
        let first = tensor.name.contains("bias_ih");
        return (0..n).map(|i| if first { biases[i / hidden] as f32 } else { 0.0 }).collect();
    }
    let inputs = *tensor.shape.last().unwrap_or(&1);
    let outputs = if is_lstm { hidden } else { tensor.shape[0] };
    let is_embedding = tensor.name == "embedding.weight";
    match init {
        Init::Uniform(a) => uniform(a, n),
        Init::Torch if is_embedding && !config.tied => (0..n).map(|_| random.normal() as f32).collect(),
        Init::Torch => {
            let fan = match tensor.name.as_str() {
                _ if is_lstm => hidden,
                "head.bias" => hidden * config.n_directions(),
                _ => inputs,
            };
            uniform(1.0 / (fan as f64).sqrt(), n)
        }
        _ if is_bias => vec![0.0; n],
        Init::He => (0..n).map(|_| (random.normal() * (2.0 / inputs as f64).sqrt()) as f32).collect(),
        // A projection makes it no square; then Xavier's bound serves.
        Init::Orthogonal if tensor.name.contains("weight_hh") && inputs == hidden => {
            (0..GATES).flat_map(|_| orthogonal(hidden, random)).collect()
        }
        Init::Xavier | Init::Orthogonal => uniform((6.0 / (inputs + outputs) as f64).sqrt(), n),
    }
}

/// A random orthogonal matrix `[n, n]`: normal rows, made orthonormal one after another (modified Gram-Schmidt, twice for accuracy).
fn orthogonal(n: usize, random: &mut Stream) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(n);
    while rows.len() < n {
        let mut row: Vec<f64> = (0..n).map(|_| random.normal()).collect();
        for _ in 0..2 {
            for other in &rows {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        if norm > 1e-6 {
            row.iter_mut().for_each(|v| *v /= norm);
            rows.push(row);
        }
    }
    rows.into_iter().flatten().map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::super::config::{Input, Output};
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            input: Input::Tokens { vocabulary: 50, width: 20 },
            output: Output::Classes { n_classes: 50 },
            n_layers: 2,
            hidden: 24.into(),
            dropout: 0.0,
            bias: true,
            tied: false,
            lstm: Default::default(),
        }
    }

    fn tensor(init: Init, gate_bias: Option<[f64; 4]>, name: &str) -> Vec<f32> {
        let table = config().table();
        let at = table.tensors().iter().position(|t| t.name == name).unwrap();
        initial(&config(), &table, init, gate_bias, 3).swap_remove(at)
    }

    #[test]
    fn orthogonal_gates_have_orthonormal_rows() {
        let values = tensor(Init::Orthogonal, None, "lstm.weight_hh_l1");
        for gate in values.chunks(24 * 24) {
            for (i, a) in gate.chunks(24).enumerate() {
                for (j, b) in gate.chunks(24).enumerate() {
                    let dot: f32 = a.iter().zip(b).map(|(x, y)| x * y).sum();
                    assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-5, "rows {i} and {j}: {dot}");
                }
            }
        }
    }

    #[test]
    fn bounds_and_spreads_are_those_of_the_papers() {
        let bound = |v: &[f32]| v.iter().fold(0f32, |a, b| a.max(b.abs()));
        let spread = |v: &[f32]| (v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / v.len() as f64).sqrt();
        assert!((0.19..=0.2042).contains(&bound(&tensor(Init::Torch, None, "lstm.weight_ih_l0"))));
        assert!((0.9..1.1).contains(&spread(&tensor(Init::Torch, None, "embedding.weight"))));
        assert!((0.09..=0.1).contains(&bound(&tensor(Init::Uniform(0.1), None, "head.weight"))));
        assert!((0.34..=0.3693).contains(&bound(&tensor(Init::Xavier, None, "lstm.weight_ih_l0"))));
        assert!((0.3..0.34).contains(&spread(&tensor(Init::He, None, "lstm.weight_ih_l0"))));
        assert_eq!(bound(&tensor(Init::Xavier, None, "head.bias")), 0.0);
    }

    #[test]
    fn gate_biases_stand_in_bias_ih_alone() {
        let biases = tensor(Init::Torch, Some([0.0, 1.0, 0.5, -1.0]), "lstm.bias_ih_l0");
        assert_eq!((biases[23], biases[24], biases[48], biases[95]), (0.0, 1.0, 0.5, -1.0));
        assert!(tensor(Init::Torch, Some([1.0; 4]), "lstm.bias_hh_l0").iter().all(|&b| b == 0.0));
    }

    #[test]
    fn names_are_read_and_written_alike() {
        for name in ["uniform:0.05", "torch", "xavier", "he", "orthogonal"] {
            assert_eq!(name.parse::<Init>().unwrap().to_string(), name);
        }
        assert!("uniform:-1".parse::<Init>().is_err() && "glorot".parse::<Init>().is_err());
    }
}
