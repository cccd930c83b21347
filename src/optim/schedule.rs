//! Learning-rate schedules: pure functions of the step, and one small state for the plateau.

use serde::{Deserialize, Serialize};

/// How the learning rate changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    Constant,
    /// Times 0.1 after half and after three quarters of the horizon.
    Step,
    /// Down to a hundredth at the end, by the same factor each step.
    Exponential,
    /// Half a cosine from the full rate to zero (Loshchilov and Hutter 2017, without restarts).
    Cosine,
    /// Halved when the validation loss has not improved by 0.1 % in two evaluations in a row.
    Plateau,
}

/// A schedule with its horizon, which the first start of a run records.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    pub kind: ScheduleKind,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: u64,
    /// Steps after which the rate is at its last value.
    pub horizon: u64,
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
    /// Evaluations without improvement that are borne.
    pub const PATIENCE: u32 = 2;
    /// Improvements below this share of the best loss do not count.
    pub const THRESHOLD: f64 = 1e-3;

    /// Takes note of a validation loss.
    pub fn observe(&mut self, loss: f64) {
        if self.best.is_none_or(|best| loss < best * (1.0 - Self::THRESHOLD)) {
            self.best = Some(loss);
            self.n_bad = 0;
            return;
        }
        self.n_bad += 1;
        if self.n_bad >= Self::PATIENCE {
            self.factor *= 0.5;
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
            ScheduleKind::Step => 0.1f64.powi(i32::from(done >= 0.5) + i32::from(done >= 0.75)),
            ScheduleKind::Exponential => 0.01f64.powf(done),
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            ScheduleKind::Plateau => plateau.factor,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_starts_at_one_after_warmup_and_ends_where_it_says() {
        for (kind, end) in
            [(ScheduleKind::Constant, 1.0), (ScheduleKind::Step, 0.01), (ScheduleKind::Exponential, 0.01), (ScheduleKind::Cosine, 0.0)]
        {
            let schedule = Schedule { kind, warmup_steps: 10, horizon: 110 };
            let at = |step| schedule.factor(step, &Plateau::default());
            assert!((at(0) - 0.1).abs() < 1e-12 && (at(9) - 1.0).abs() < 1e-12 && (at(10) - 1.0).abs() < 1e-12, "{kind:?}");
            assert!((at(110) - end).abs() < 1e-12 && (at(1000) - end).abs() < 1e-12, "{kind:?}");
        }
    }

    #[test]
    fn a_plateau_halves_the_rate_after_two_bad_evaluations() {
        let mut plateau = Plateau::default();
        for loss in [2.0, 1.0, 1.0, 0.9995] {
            plateau.observe(loss);
        }
        assert_eq!(plateau.factor, 0.5);
        plateau.observe(0.5);
        plateau.observe(0.6);
        assert_eq!(plateau.factor, 0.5);
    }
}
