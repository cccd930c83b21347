//! Data of one's own, made up as they are asked for: two of 20 numbers are marked, and the network says their sum.

use carrousel::data::{Batch, Batches, DataError};
use carrousel::model::config::{Input, ModelConfig, Output, Pooling};
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::train::{Trainer, TrainerOptions};

struct Adding;

impl Batches for Adding {
    fn n_batches(&self) -> u64 {
        200
    }

    // The same batch for the same epoch and index, whoever asks. Inputs are time-major: step, row, feature.
    fn batch(&self, epoch: u64, idx: u64) -> Result<Batch, DataError> {
        let (steps, rows) = (20, 32);
        let mut random = Stream::new(StepKey::new(epoch, idx), Purpose::Test, 0, 0);
        let (mut inputs, mut sums) = (vec![0.0; steps * rows * 2], vec![0.0; rows]);
        for (row, sum) in sums.iter_mut().enumerate() {
            let marked = [random.below(10) as usize, 10 + random.below(10) as usize];
            for t in 0..steps {
                let at = (t * rows + row) * 2;
                inputs[at] = random.uniform();
                inputs[at + 1] = f32::from(u8::from(marked.contains(&t)));
                *sum += inputs[at] * inputs[at + 1];
            }
        }
        Batch::of_numbers(steps, inputs, sums, 0..rows as u32)
    }
}

fn main() -> anyhow::Result<()> {
    let model = ModelConfig::new(Input::Values { n_features: 2 }, Output::Values { n_outputs: 1, pooling: Pooling::Last }, 32);
    let loss = Trainer::new(&model, TrainerOptions::default())?.fit(&Adding, 10)?;
    println!("squared error {loss:.4}; always saying 1 would have 0.1667");
    Ok(())
}
