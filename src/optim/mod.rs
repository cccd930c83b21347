//! Optimizers, schedules, clipping and regularisation over the flat parameter buckets. The arithmetic is kernels; here is what is launched with which numbers.

pub mod schedule;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Span};
use crate::kernels::update::{Adam, Regular, Rmsprop, Sgd, SgdRows};

/// Update rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    Sgd,
    Rmsprop,
    Adam,
    /// Adam with decoupled weight decay.
    Adamw,
}

/// An optimizer with its numbers; `weight_decay` is L2 except for AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    #[serde(rename = "optimizer")]
    pub rule: Rule,
    pub lr: f64,
    /// Of SGD and RMSprop.
    pub momentum: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
    pub l1: f64,
    /// Largest global norm of the gradient; 0: any.
    pub clip_norm: f64,
    /// Largest absolute value of a gradient, after clipping by norm; 0: any.
    pub clip_value: f64,
}

/// RMSprop's decay of the mean square, as torch has it.
pub const RMSPROP_ALPHA: f64 = 0.99;
/// Adam's decays.
pub const BETAS: (f64, f64) = (0.9, 0.999);
/// Added to the root of the second moment.
pub const EPS: f64 = 1e-8;

impl Default for OptimizerConfig {
    /// Adam at 2e-3, gradients clipped to a norm of 5.
    fn default() -> Self {
        let (momentum, weight_decay, l1, clip_value) = (0.0, 0.0, 0.0, 0.0);
        Self { rule: Rule::Adam, lr: 2e-3, momentum, nesterov: false, weight_decay, l1, clip_norm: 5.0, clip_value }
    }
}

impl OptimizerConfig {
    /// The names of the state tensors, in the order of [`Self::update`]'s `states`.
    pub fn states(&self) -> &'static [&'static str] {
        match self.rule {
            Rule::Sgd if self.momentum == 0.0 => &[],
            Rule::Sgd => &["momentum"],
            Rule::Rmsprop if self.momentum == 0.0 => &["v"],
            Rule::Rmsprop => &["m", "v"],
            Rule::Adam | Rule::Adamw => &["m", "v"],
        }
    }

    /// The factor by which a gradient of this norm is multiplied: 1, or what brings it down to `clip_norm` (as torch: with 1e-6 added to the norm).
    pub fn clip_factor(&self, norm: f64) -> f64 {
        if self.clip_norm > 0.0 { (self.clip_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
    }

    /// Whether a parameter whose gradient is zero stays as it is to the last bit.
    pub fn spares_zeros(&self) -> bool {
        self.rule == Rule::Sgd && self.momentum == 0.0 && self.weight_decay == 0.0 && self.l1 == 0.0
    }

    /// [`Self::update`] where only the rows that `index` names have a gradient, if [`Self::spares_zeros`]; [`SgdRows`] tells what the numbers are.
    ///
    /// # Errors
    /// The launch's.
    pub fn update_rows(
        &self,
        backend: &mut dyn Backend,
        [index, param, grad]: [Span; 3],
        [rows, width, n_distinct]: [u32; 3],
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        let sgd = self.sgd(param.len as u32, lr, self.regular(grad_scale));
        backend.launch(&SgdRows { sgd, rows, width, n_distinct }, &[index, param, grad])
    }

    fn sgd(&self, len: u32, lr: f64, regular: Regular) -> Sgd {
        Sgd { len, nesterov: u32::from(self.nesterov), lr: lr as f32, momentum: self.momentum as f32, regular }
    }

    fn regular(&self, grad_scale: f64) -> Regular {
        Regular {
            grad_scale: grad_scale as f32,
            clip_value: self.clip_value as f32,
            weight_decay: if self.rule == Rule::Adamw { 0.0 } else { self.weight_decay as f32 },
            l1: self.l1 as f32,
        }
    }

    /// Updates `param` in place from `grad` and two spans of state, all of equal length; where the rule has fewer states, the spans in front are
    /// any others that may be written (they are not). `step` counts from 1; `lr` is the scheduled rate.
    ///
    /// # Errors
    /// The launch's.
    #[expect(clippy::too_many_arguments, reason = "two call sites; each part has another owner")]
    pub fn update(
        &self,
        backend: &mut dyn Backend,
        param: Span,
        grad: Span,
        states: [Span; 2],
        step: u64,
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        let len = param.len as u32;
        let decoupled = self.rule == Rule::Adamw;
        let regular = self.regular(grad_scale);
        let momentum = self.momentum as f32;
        match self.rule {
            Rule::Sgd => {
                let kernel = self.sgd(len, lr, regular);
                backend.launch(&kernel, &[param, grad, states[1]])
            }
            Rule::Rmsprop => {
                let kernel = Rmsprop { len, lr: lr as f32, alpha: RMSPROP_ALPHA as f32, eps: EPS as f32, momentum, regular };
                backend.launch(&kernel, &[param, grad, states[0], states[1]])
            }
            Rule::Adam | Rule::Adamw => {
                // The kernel's own decays, rounded to f32: 1 - b2 would be off by a part in 80,000 of what the moments gathered.
                let (b1, b2) = (f64::from(BETAS.0 as f32), f64::from(BETAS.1 as f32));
                let t = i32::try_from(step).unwrap_or(i32::MAX);
                let kernel = Adam {
                    len,
                    step_size: (lr / (1.0 - b1.powi(t))) as f32,
                    beta1: b1 as f32,
                    beta2: b2 as f32,
                    root2: (1.0 - b2.powi(t)).sqrt() as f32,
                    eps: EPS as f32,
                    shrink: if decoupled { (1.0 - lr * self.weight_decay) as f32 } else { 1.0 },
                    regular,
                };
                backend.launch(&kernel, &[param, grad, states[0], states[1]])
            }
        }
    }
}
