//! Learning-rate schedules: pure functions of the step, and one small state for the plateau.

use serde::{Deserialize, Serialize};

/// How the learning rate changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    Constant,
    /// Times the decay at intervals.
    Step,
    /// By the same factor each step, the decay over an interval.
    Exponential,
    /// Half a cosine from the full rate to zero (Loshchilov and Hutter 2017, without restarts).
    Cosine,
    /// Times the decay when the validation loss has stalled.
    Plateau,
}

/// A schedule as asked for, in epochs, which later become steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleConfig {
    #[serde(rename = "schedule")]
    pub kind: ScheduleKind,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: u64,
    /// What the rate is multiplied by: at each cut, over each interval, at each stall. By default 0.1, 0.01, 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_decay: Option<f64>,
    /// Epochs before the decay begins: by default half of the run for `step`, none for `exponential`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_after: Option<f64>,
    /// Epochs of an interval: by default a quarter of the run for `step`, all of it for `exponential`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_every: Option<f64>,
    /// Evaluations without improvement that a plateau bears before it decays.
    pub patience: u32,
}

impl ScheduleConfig {
    /// The schedule of a run of `total` steps, if it has an end, with so many in an epoch.
    pub fn over(&self, epoch: u64, total: Option<u64>) -> Schedule {
        let horizon = total.unwrap_or(u64::MAX);
        let warm = self.warmup_steps as f64;
        let span = horizon.saturating_sub(self.warmup_steps).max(1) as f64;
        let (decay, after, every) = match self.kind {
            ScheduleKind::Step => (0.1, warm + span / 2.0, span / 4.0),
            ScheduleKind::Exponential => (0.01, warm, span),
            ScheduleKind::Plateau | ScheduleKind::Constant | ScheduleKind::Cosine => (0.5, 0.0, span),
        };
        let steps = |epochs: Option<f64>, otherwise: f64| epochs.map_or(otherwise, |epochs| epochs * epoch as f64);
        Schedule {
            kind: self.kind,
            warmup_steps: self.warmup_steps,
            // A decay by epochs goes on for as long as the run does.
            horizon: if self.decay_every.is_some() { u64::MAX } else { horizon },
            decay: self.lr_decay.unwrap_or(decay),
            after: steps(self.decay_after, after),
            every: steps(self.decay_every, every).max(1.0),
            patience: self.patience,
        }
    }
}

/// A schedule in steps, which the first start of a run records.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    pub kind: ScheduleKind,
    pub warmup_steps: u64,
    /// Steps after which the rate is at its last value.
    pub horizon: u64,
    pub decay: f64,
    /// Steps before the first decay.
    pub after: f64,
    /// Steps of an interval, at least one.
    pub every: f64,
    pub patience: u32,
}

/// What reduce-on-plateau remembers; in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    /// Lowest loss so far; none before the first evaluation.
    pub best: Option<f64>,
    pub n_bad: u32,
    pub factor: f64,
}

impl Default for Plateau {
    fn default() -> Self {
        Self { best: None, n_bad: 0, factor: 1.0 }
    }
}

impl Plateau {
    /// Improvements below this share of the best loss do not count.
    pub const THRESHOLD: f64 = 1e-3;

    /// Takes note of a validation loss, under a schedule of this kind.
    pub fn observe(&mut self, loss: f64, schedule: &Schedule) {
        if self.best.is_none_or(|best| loss < best * (1.0 - Self::THRESHOLD)) {
            self.best = Some(loss);
            self.n_bad = 0;
            return;
        }
        self.n_bad += 1;
        if self.n_bad >= schedule.patience {
            self.factor *= schedule.decay;
            self.n_bad = 0;
        }
    }
}

impl Schedule {
    /// The factor of the learning rate at `step`, counted from 0.
    pub fn factor(&self, step: u64, plateau: &Plateau) -> f64 {
        let warm = if step < self.warmup_steps { (step + 1) as f64 / self.warmup_steps as f64 } else { 1.0 };
        let span = self.horizon.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = (step.saturating_sub(self.warmup_steps) as f64 / span).min(1.0);
        warm * match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Step => {
                let at = step.min(self.horizon.saturating_sub(1)) as f64;
                if at < self.after { 1.0 } else { self.decay.powf(1.0 + ((at - self.after) / self.every).floor()) }
            }
            ScheduleKind::Exponential => self.decay.powf((step.min(self.horizon) as f64 - self.after).max(0.0) / self.every),
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            ScheduleKind::Plateau => plateau.factor,
        }
    }
}
