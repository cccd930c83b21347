//! A loss of one's own: the absolute error, which a few wild values in the data do not lead astray.

use carrousel::data::series::{Order, Part, Series, SeriesBatches, SeriesOptions};
use carrousel::model::config::{Input, ModelConfig, Output, Pooling};
use carrousel::model::{Loss, Scored, Words};
use carrousel::train::{Trainer, TrainerOptions};

struct Absolute;

impl Loss for Absolute {
    fn loss(&self, scored: Scored<'_>, gradient: &mut [f32]) -> f64 {
        let Words::Values(targets) = scored.targets else { return f64::NAN };
        let terms = scored.outputs.iter().zip(targets).zip(scored.weights);
        terms
            .zip(gradient)
            .map(|(((output, target), weight), gradient)| {
                *gradient = weight * (output - target).signum();
                f64::from(weight * (output - target).abs())
            })
            .sum()
    }
}

fn main() -> anyhow::Result<()> {
    let value = |i: i32| if i % 37 == 0 { 30.0 } else { (f64::from(i) / 5.0).sin() };
    let csv: String = (0..600).map(|i| format!("{}\n", value(i))).collect();
    let series = Series::from_csv("sine.csv", format!("x\n{csv}").as_bytes(), &SeriesOptions::new(20, 1))?;
    let batches = SeriesBatches::new(series.into(), Part::Train, 16, Order::Shuffled { seed: 1 })?;
    let model = ModelConfig::new(Input::Values { n_features: 1 }, Output::Values { n_outputs: 1, pooling: Pooling::Last }, 16);
    let mut trainer = Trainer::new(&model, TrainerOptions::default())?.with_loss(Absolute)?;
    let before = trainer.evaluate(&batches)?;
    let after = trainer.fit(&batches, 10)?;
    println!("absolute error {before:.4}, then {after:.4}");
    anyhow::ensure!(after < before, "nothing was learnt");
    Ok(())
}
