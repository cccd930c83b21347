//! What `--compress` and the optimizer mean to each other: what is done before gradients are sent and no longer after, and which suits which.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use crate::compress::{Held, Kind, Method, Settings};
use crate::optim::{OptimizerConfig, Rule};
use crate::params::{ParamTable, Tensor};
use crate::store::checkpoint::{Checkpoint, NamedTensor};

/// Whether the rule divides by the size that gradients had.
fn is_adaptive(rule: Rule) -> bool {
    rule != Rule::Sgd
}

/// Whether the gradient that the ranks agree on is made of what several steps left over, so that its norm says nothing of one step's: it is clipped before.
fn is_delayed(method: Method) -> bool {
    matches!(method, Method::Topk { .. } | Method::Powersgd { .. } | Method::Onebit)
}

/// Whether momentum is taken before values are chosen (momentum correction).
fn corrects_momentum(method: Method, optimizer: &OptimizerConfig) -> bool {
    matches!(method, Method::Topk { .. }) && optimizer.rule == Rule::Sgd && optimizer.momentum > 0.0
}

/// Whether what is left out of a step is added to the next. Errors fed back, which come in bursts, and a rate that falls with every burst fight; the signs
/// of one bit do better without.
fn feeds_back(method: Method, optimizer: &OptimizerConfig) -> bool {
    method != Method::None && !(method == Method::Onebit && is_adaptive(optimizer.rule))
}

/// What a rank does to its gradient before it is sent.
pub fn settings(method: Method, optimizer: &OptimizerConfig) -> Settings {
    let feeds_back = feeds_back(method, optimizer);
    Settings {
        method,
        feeds_back,
        momentum: corrects_momentum(method, optimizer).then_some((optimizer.momentum as f32, optimizer.nesterov)),
        clip_norm: if is_delayed(method) && feeds_back { optimizer.clip_norm } else { 0.0 },
    }
}

/// What is left for the update to do.
pub fn update_rule(method: Method, optimizer: &OptimizerConfig) -> OptimizerConfig {
    let mut rule = *optimizer;
    let before = settings(method, optimizer);
    if before.clip_norm > 0.0 {
        rule.clip_norm = 0.0;
    }
    if before.momentum.is_some() {
        // Decay does not go through the ranks' momentum, which would have made it so much larger.
        let sum = 1.0 / (1.0 - rule.momentum);
        (rule.weight_decay, rule.l1) = (rule.weight_decay * sum, rule.l1 * sum);
        (rule.momentum, rule.nesterov) = (0.0, false);
    }
    rule
}

/// Why the method does not suit the optimizer, where it does not.
pub fn unsuited(method: Method, optimizer: &OptimizerConfig) -> Option<String> {
    let is_adaptive = is_adaptive(optimizer.rule);
    match method {
        Method::Topk { .. } | Method::Powersgd { .. } if is_adaptive => Some(format!(
            "--compress {method} suits --optimizer sgd: what it leaves out of one step comes back in another, which rates that follow the size of \
             gradients take for noise"
        )),
        Method::Onebit if !is_adaptive => Some(
            "--compress onebit suits an optimizer with rates of its own for each parameter, as adam: signs say nothing of sizes".to_owned(),
        ),
        _ => None,
    }
}

/// How the pieces of a rank, or of all, are named in a checkpoint.
fn name(kind: Kind, rank: usize, tensor: &Tensor) -> String {
    match kind {
        Kind::Residual | Kind::Momentum => format!("{PREFIX}{}.{rank}.{}", kind.name(), tensor.name),
        Kind::Owner | Kind::Factor => format!("{PREFIX}{}.{}", kind.name(), tensor.name),
    }
}

const PREFIX: &str = "compress.";

/// What all ranks hold, as tensors of a checkpoint: residuals and momenta a rank, what owners hold put together, factors once.
pub fn named(of_ranks: &[Vec<Held>], table: &ParamTable) -> Vec<NamedTensor> {
    let mut named: BTreeMap<String, NamedTensor> = BTreeMap::new();
    for (rank, pieces) in of_ranks.iter().enumerate() {
        for piece in pieces {
            let Some(tensor) = table.tensors().get(piece.tensor) else { continue };
            let n = tensor.layout.torch_len();
            let shape = match (piece.kind, tensor.shape.last()) {
                (Kind::Factor, Some(&cols)) => vec![cols, piece.values.len() / cols.max(1)],
                _ => tensor.shape.clone(),
            };
            let name = name(piece.kind, rank, tensor);
            let entry = named.entry(name.clone()).or_insert_with(|| {
                let n = if piece.kind == Kind::Factor { piece.values.len() } else { n };
                NamedTensor { name, shape, data: vec![0.0; n] }
            });
            if let Some(room) = entry.data.get_mut(piece.start..piece.start + piece.values.len()) {
                room.copy_from_slice(&piece.values);
            }
        }
    }
    named.into_values().collect()
}

/// What each of `world` ranks is to hold, from a checkpoint of `n_saved`. Where the devices are not the same ones, all that was held of a sum goes to rank 0,
/// and factors begin anew.
///
/// # Errors
/// A tensor of another shape than its parameter.
pub fn taken(checkpoint: &mut Checkpoint, table: &ParamTable, n_saved: usize, world: usize, is_same: bool) -> Result<Vec<Vec<Held>>> {
    let mut of_ranks: Vec<Vec<Held>> = vec![Vec::new(); world];
    let present: BTreeSet<String> = checkpoint.tensors.iter().map(|t| t.name.clone()).filter(|name| name.starts_with(PREFIX)).collect();
    for (idx, tensor) in table.tensors().iter().enumerate() {
        let mut added: BTreeMap<Kind, Vec<f32>> = BTreeMap::new();
        for kind in Kind::ALL {
            let is_common = matches!(kind, Kind::Owner | Kind::Factor);
            for rank in 0..if is_common { 1 } else { n_saved } {
                let name = name(kind, rank, tensor);
                if !present.contains(&name) {
                    continue;
                }
                let factor_shape = || checkpoint.tensors.iter().find(|t| t.name == name).map(|t| t.shape.clone());
                let shape = if kind == Kind::Factor { factor_shape().unwrap_or_default() } else { tensor.shape.clone() };
                let values = checkpoint.take(&name, &shape)?;
                if is_same {
                    let piece = Held { kind, tensor: idx, start: 0, values };
                    let holders = if is_common { 0..world } else { rank..rank + 1 };
                    of_ranks[holders].iter_mut().for_each(|held| held.push(piece.clone()));
                } else if kind != Kind::Factor {
                    let kind = if kind == Kind::Owner { Kind::Residual } else { kind };
                    match added.entry(kind) {
                        Entry::Vacant(empty) => drop(empty.insert(values)),
                        Entry::Occupied(mut sum) => sum.get_mut().iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                    }
                }
            }
        }
        let first = of_ranks.iter_mut().take(1);
        first
            .for_each(|held| held.extend(added.iter().map(|(&kind, values)| Held { kind, tensor: idx, start: 0, values: values.clone() })));
    }
    Ok(of_ranks)
}
