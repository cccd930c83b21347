//! Training as a library: what is promised of `Trainer`, of losses and of batches of one's own. The examples in `tests/examples` are its short form.

use std::ops::ControlFlow;

use carrousel::data::series::{Order, Part, Series, SeriesBatches, SeriesOptions};
use carrousel::data::text::TextBatches;
use carrousel::data::{Batch, Batches};
use carrousel::model::config::{Input, ModelConfig, Output, Pooling};
use carrousel::model::{Loss, Scored, Words};
use carrousel::train::{Stepped, Trainer, TrainerOptions};

/// The squared error again, by hand.
struct Squared;

impl Loss for Squared {
    fn loss(&self, scored: Scored<'_>, gradient: &mut [f32]) -> f64 {
        let Words::Values(targets) = scored.targets else { return f64::NAN };
        assert_eq!((scored.n_outputs, scored.outputs.len()), (3, targets.len()));
        let mut sum = 0.0;
        for (i, gradient) in gradient.iter_mut().enumerate() {
            let off = scored.outputs[i] - targets[i];
            *gradient = 2.0 * scored.weights[i] * off;
            sum += f64::from(scored.weights[i] * off * off);
        }
        sum
    }
}

fn sine() -> SeriesBatches {
    let csv: String = (0..200).map(|i| format!("{}\n", (f64::from(i) / 4.0).sin())).collect();
    let series = Series::from_csv("sine.csv", format!("x\n{csv}").as_bytes(), &SeriesOptions::new(12, 3)).expect("a series");
    SeriesBatches::new(series.into(), Part::Train, 10, Order::Shuffled { seed: 3 }).expect("batches")
}

fn model() -> ModelConfig {
    ModelConfig::new(Input::Values { n_features: 1 }, Output::Values { n_outputs: 3, pooling: Pooling::Last }, 8)
}

fn losses(mut trainer: Trainer) -> Vec<f64> {
    let mut losses = Vec::new();
    let batches = sine();
    let keep = |_: &mut Trainer, stepped: &Stepped| {
        losses.push(stepped.loss);
        Ok(ControlFlow::Continue(()))
    };
    trainer.fit_with(&batches, 2, keep).expect("training");
    losses.push(trainer.evaluate(&batches).expect("an evaluation"));
    losses
}

#[test]
fn a_loss_of_ones_own_that_is_the_squared_error_trains_as_the_built_in_one() {
    for (devices, accumulate) in [("cpu:1", 1), ("cpu:1*2", 1), ("cpu:1", 3)] {
        let options = || TrainerOptions { devices: devices.into(), accumulate, ..TrainerOptions::default() };
        let built_in = losses(Trainer::new(&model(), options()).expect("a trainer"));
        let own = losses(Trainer::new(&model(), options()).and_then(|trainer| trainer.with_loss(Squared)).expect("a trainer"));
        assert!(built_in.len() > 20 && built_in.last() < built_in.first(), "{built_in:?}");
        for (own, built_in) in own.iter().zip(&built_in) {
            assert!((own - built_in).abs() < 1e-4 * built_in, "{devices}, {accumulate}: {own} against {built_in}");
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_ends_the_training_and_leaves_the_model() {
    struct Broken;
    impl Loss for Broken {
        fn loss(&self, _: Scored<'_>, _: &mut [f32]) -> f64 {
            f64::NAN
        }
    }
    let mut trainer = Trainer::new(&model(), TrainerOptions::default()).and_then(|trainer| trainer.with_loss(Broken)).expect("a trainer");
    let before = trainer.parameters().expect("parameters");
    let error = trainer.fit(&sine(), 1).expect_err("nothing to learn");
    assert!(error.to_string().contains("not finite"), "{error}");
    let after = trainer.parameters().expect("parameters");
    assert!(before.iter().zip(&after).all(|(before, after)| before.name == after.name && before.data == after.data));
}

#[test]
fn a_callback_sees_every_step_and_can_end_the_training() {
    let mut trainer = Trainer::new(&model(), TrainerOptions::default()).expect("a trainer");
    let batches = sine();
    let n = batches.n_batches();
    let mut seen = Vec::new();
    let end_at = n + 3;
    trainer
        .fit_with(&batches, 10, |_, stepped| {
            seen.push((stepped.step, stepped.epoch, stepped.ends_epoch));
            Ok(if stepped.step == end_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
        .expect("training");
    let expected: Vec<_> = (1..=end_at).map(|step| (step, 1 + (step - 1) / n, step % n == 0)).collect();
    assert_eq!(seen, expected);
}

#[test]
fn what_a_batch_is_made_of_must_fit() {
    let batch = Batch::of_numbers(2, vec![1.0, 2.0, 3.0, 4.0], vec![0.0; 6], 0..2).expect("a batch");
    assert_eq!((batch.n_rows, batch.n_tokens, batch.weight), (2, 4, 6.0));
    let mut trainer = Trainer::new(&model(), TrainerOptions::default()).expect("a trainer");
    assert_eq!(trainer.predict(&batch).expect("outputs").len(), 6);
    for (inputs, targets, rows) in [(5, 6, 2), (4, 5, 2), (4, 6, 0), (0, 6, 2)] {
        let error = Batch::of_numbers(2, vec![0.0; inputs], vec![0.0; targets], 0..rows).expect_err("it does not fit");
        assert!(error.to_string().contains("[T, B, I]"), "{error}");
    }
}

#[test]
fn streams_of_a_text_carry_their_state() {
    let tokens: Vec<u32> = (0..600).map(|i| i * i % 7).collect();
    let batches = TextBatches::new("squares", tokens, 4, 10).expect("batches");
    let model = ModelConfig::new(Input::Tokens { vocabulary: 7, width: 8 }, Output::Classes { n_classes: 7 }, [16]);
    let mut trainer = Trainer::new(&model, TrainerOptions { devices: "cpu:1*2".into(), ..TrainerOptions::default() }).expect("a trainer");
    trainer.set_lr(1e-2);
    let before = trainer.evaluate(&batches).expect("an evaluation");
    trainer.fit(&batches, 20).expect("training");
    assert!(trainer.evaluate(&batches).expect("an evaluation") < before / 4.0);
}
