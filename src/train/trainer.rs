//! Training as a library: a model, batches, and what happens after each step, without a run folder, events or a command line.
//!
//! Under it lies the same [`Group`] of workers that whole runs use, so that devices, shares and carried state work alike. What a run keeps beside
//! (checkpoints, metrics, pictures, resume) is [`crate::train::run()`]'s.

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Result;

use super::balance::Balance;
use super::group::{Group, GroupSpec, KindChoices, StepNumbers, Tensors};
use super::run::settle;
use super::tuning::Autotune;
use crate::compress::Method;
use crate::data::{Batch, Batches};
use crate::model::Loss;
use crate::model::config::ModelConfig;
use crate::model::init::{Init, initial};
use crate::model::state::Carried;
use crate::optim::OptimizerConfig;
use crate::rng::StepKey;
use crate::store::checkpoint::NamedTensor;
use crate::usage::UsageError;

/// How a [`Trainer`] trains.
#[derive(Clone, Debug)]
pub struct TrainerOptions {
    /// As `--devices` has them: `cpu`, `cpu:2`, `gpu:0,cpu:2`, `auto`.
    pub devices: String,
    /// As `--balance` has it; empty: equal shares for equal devices, else by measured speed.
    pub balance: String,
    pub optimizer: OptimizerConfig,
    /// Parts that each device's share is cut into, to save memory.
    pub accumulate: usize,
    /// How gradients are made smaller on their way between devices.
    pub compress: Method,
    /// Each device keeps its part of the optimizer's state only.
    pub shard_optimizer: bool,
    pub init: Init,
    /// Of the weights and of what is dropped.
    pub seed: u64,
    /// Variants of kernels on GPUs are measured where a size is new, and the fastest kept in the user's cache folder; no bit of a result depends on it.
    pub autotune: bool,
}

impl Default for TrainerOptions {
    fn default() -> Self {
        let (devices, balance) = ("cpu".to_string(), String::new());
        let (optimizer, compress) = (OptimizerConfig::default(), Method::None);
        Self { devices, balance, optimizer, accumulate: 1, compress, shard_optimizer: false, init: Init::Torch, seed: 1, autotune: true }
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// Steps so far, and the epoch, both from 1.
    pub step: u64,
    pub epoch: u64,
    /// Whether it was the last of its epoch.
    pub ends_epoch: bool,
    /// The mean over the batch's terms, before the update.
    pub loss: f64,
    /// Of the gradient, before clipping.
    pub grad_norm: f64,
}

/// A model on its devices, ready to learn.
pub struct Trainer {
    group: Group,
    balance: Balance,
    options: TrainerOptions,
    autotune: Autotune,
    step: u64,
    epoch: u64,
}

impl Trainer {
    /// Opens the devices and puts a fresh model on each.
    ///
    /// # Errors
    /// A model that makes no sense; a device that does not exist or that the model does not fit.
    pub fn new(model: &ModelConfig, options: TrainerOptions) -> Result<Self> {
        model.check()?;
        let (devices, balance, _) = settle(&options.devices, &options.balance)?;
        let accumulate = options.accumulate.max(1);
        let (optimizer, compress, shard_optimizer) = (options.optimizer, options.compress, options.shard_optimizer);
        let spec = GroupSpec { model: model.clone(), optimizer, accumulate, compress, shard_optimizer };
        let mut group = Group::start(spec, &devices, None)?;
        let params = initial(model, group.table(), options.init, None, options.seed);
        let zeros: Tensors = params.iter().map(|values| vec![0.0; values.len()]).collect();
        group.load(params, vec![zeros; options.optimizer.states().len()])?;
        let mut autotune = Autotune::of_user(options.autotune);
        autotune.begin(&mut group, &KindChoices::new())?;
        Ok(Self { group, balance, options, autotune, step: 0, epoch: 0 })
    }

    /// Trains against a loss of one's own from now on, and evaluates by it.
    ///
    /// # Errors
    /// A worker's.
    pub fn with_loss(mut self, loss: impl Loss + 'static) -> Result<Self> {
        let loss: Arc<dyn Loss> = Arc::new(loss);
        self.group.set_loss(&loss)?;
        Ok(self)
    }

    /// The learning rate from the next step on.
    pub fn set_lr(&mut self, lr: f64) {
        self.options.optimizer.lr = lr;
    }

    /// Trains for so many epochs, the mean loss over the last one's terms.
    ///
    /// # Errors
    /// As [`Trainer::fit_with`].
    pub fn fit(&mut self, batches: &dyn Batches, n_epochs: u64) -> Result<f64> {
        self.fit_with(batches, n_epochs, |_, _| Ok(ControlFlow::Continue(())))
    }

    /// As [`Trainer::fit`]; `after` is called after each step and may look at the trainer, evaluate, change the rate, or end the training.
    ///
    /// # Errors
    /// A batch that cannot be made or does not fit the model; a loss or gradient that is not finite, after which the model stands as before that
    /// step; what `after` says.
    pub fn fit_with(
        &mut self,
        batches: &dyn Batches,
        n_epochs: u64,
        mut after: impl FnMut(&mut Self, &Stepped) -> Result<ControlFlow<()>>,
    ) -> Result<f64> {
        let n_batches = batches.n_batches();
        UsageError::unless(n_batches > 0 || n_epochs == 0, || "there is no batch to train on: give the source some".to_owned())?;
        let mut mean = f64::NAN;
        for _ in 0..n_epochs {
            let (mut carried, mut loss, mut weight) = (None, 0.0, 0.0);
            for idx in 0..n_batches {
                let batch = Arc::new(batches.batch(self.epoch, idx)?);
                let sum = self.step(&batch, &mut carried)?;
                (loss, weight) = (loss + sum.0, weight + batch.weight);
                let ends_epoch = idx + 1 == n_batches;
                let stepped = Stepped {
                    step: self.step,
                    epoch: self.epoch + 1,
                    ends_epoch,
                    loss: sum.0 / batch.weight.max(f64::MIN_POSITIVE),
                    grad_norm: sum.1,
                };
                mean = loss / f64::max(weight, f64::MIN_POSITIVE);
                if after(self, &stepped)?.is_break() {
                    return Ok(mean);
                }
            }
            self.epoch += 1;
        }
        Ok(mean)
    }

    /// Loss, summed, and the gradient's norm.
    fn step(&mut self, batch: &Arc<Batch>, carried: &mut Option<Carried>) -> Result<(f64, f64)> {
        self.check(batch)?;
        let state = self.state_for(batch, carried);
        self.step += 1;
        let key = StepKey::new(self.options.seed, self.step);
        let divisor = if batch.weight > 0.0 { batch.weight } else { 1.0 };
        let numbers = StepNumbers { step: self.step, lr: self.options.optimizer.lr, key, divisor };
        let shares = self.balance.shares_of(batch);
        let stepped = self.group.step(batch, &shares, state, numbers)?;
        let times: Vec<_> = stepped.ranks.iter().map(|rank| rank.compute).collect();
        self.balance.observe(batch, &shares, &times);
        self.autotune.after_step(&mut self.group)?;
        Ok((stepped.loss, stepped.norm))
    }

    /// The state that rows carry from batch to batch, where they do.
    fn state_for<'c>(&self, batch: &Batch, carried: &'c mut Option<Carried>) -> Option<&'c mut Carried> {
        if !batch.carries {
            return None;
        }
        let state = carried.get_or_insert_with(|| Carried::new(&self.group.spec().model, batch.n_rows));
        if batch.resets {
            state.reset();
        }
        Some(state)
    }

    /// A batch that would go wrong within a worker is refused before.
    fn check(&self, batch: &Batch) -> Result<(), UsageError> {
        UsageError::unless(batch.n_rows > 0 && batch.n_steps > 0, || "a batch has neither rows nor steps: leave it out".to_owned())
    }

    /// The mean loss over the terms of all batches of epoch 0, forward only.
    ///
    /// # Errors
    /// As [`Trainer::fit_with`].
    pub fn evaluate(&mut self, batches: &dyn Batches) -> Result<f64> {
        let (mut carried, mut loss, mut weight) = (None, 0.0, 0.0);
        for idx in 0..batches.n_batches() {
            let batch = Arc::new(batches.batch(0, idx)?);
            self.check(&batch)?;
            let shares = self.balance.shares_of(&batch);
            let state = self.state_for(&batch, &mut carried);
            loss += self.group.evaluate(&batch, &shares, state, false)?.0;
            weight += batch.weight;
        }
        Ok(loss / f64::max(weight, f64::MIN_POSITIVE))
    }

    /// What the model says about a batch: `[B, O]`, or `[T, B, V]` where it gives a class at every step. On one device.
    ///
    /// # Errors
    /// As [`Trainer::fit_with`].
    pub fn predict(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        self.check(batch)?;
        // Outputs of steps of several ranks would stand rank after rank.
        let mut shares = vec![0..0; self.group.world()];
        shares[0] = 0..batch.n_rows;
        Ok(self.group.evaluate(&Arc::new(batch.clone()), &shares, None, true)?.1)
    }

    /// The parameters under PyTorch's names, in its shapes and order.
    ///
    /// # Errors
    /// A worker's.
    pub fn parameters(&mut self) -> Result<Vec<NamedTensor>> {
        let values = self.group.params_of(0)?;
        let tensors = self.group.table().tensors().iter().zip(values);
        Ok(tensors.map(|(tensor, data)| NamedTensor { name: tensor.name.clone(), shape: tensor.shape.clone(), data }).collect())
    }
}
