//! A callback of one's own: after each epoch it looks at held-out data, halves the rate on a stall, and stops after the third.

use std::ops::ControlFlow;
use std::sync::Arc;

use carrousel::data::series::{Order, Part, Series, SeriesBatches, SeriesOptions};
use carrousel::model::config::{Input, ModelConfig, Output, Pooling};
use carrousel::train::{Trainer, TrainerOptions};

fn main() -> anyhow::Result<()> {
    let csv: String = (0..400).map(|i| format!("{}\n", (f64::from(i) / 5.0).sin())).collect();
    let series = Arc::new(Series::from_csv("sine.csv", format!("x\n{csv}").as_bytes(), &SeriesOptions::new(20, 5))?);
    let train = SeriesBatches::new(Arc::clone(&series), Part::Train, 16, Order::Shuffled { seed: 1 })?;
    let valid = SeriesBatches::new(series, Part::Valid, 16, Order::InTime)?;
    let model = ModelConfig::new(Input::Values { n_features: 1 }, Output::Values { n_outputs: 5, pooling: Pooling::Last }, 16);
    let mut trainer = Trainer::new(&model, TrainerOptions::default())?;
    let (mut best, mut stalls, mut lr) = (f64::INFINITY, 0, 2e-3);
    trainer.fit_with(&train, 100, |trainer, stepped| {
        if !stepped.ends_epoch {
            return Ok(ControlFlow::Continue(()));
        }
        let loss = trainer.evaluate(&valid)?;
        println!("epoch {}, step {}: {loss:.5} at a rate of {lr}", stepped.epoch, stepped.step);
        if loss >= best {
            (stalls, lr) = (stalls + 1, lr / 2.0);
            trainer.set_lr(lr);
        }
        best = best.min(loss);
        Ok(if stalls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    anyhow::ensure!(best < 0.1, "nothing was learnt");
    Ok(())
}
