//! What each option of the LSTM costs beside the plain cell: a training step on one device, and the ratio, over that of the operations.

use std::collections::BTreeMap;
use std::time::Duration;

use carrousel::model::config::{Input, LstmConfig, ModelConfig, Output, Pooling};
use carrousel::train::profile::Workload;
use criterion::{BenchmarkId, Criterion};

use crate::step::Training;

/// Two layers of 256 over 256 numbers, with each option alone.
fn workloads() -> Vec<(&'static str, Workload)> {
    let plain = LstmConfig::default();
    let cells = [
        ("plain", plain),
        ("bidirectional", LstmConfig { bidirectional: true, ..plain }),
        ("residual", LstmConfig { residual: true, ..plain }),
        ("learned state", LstmConfig { learned_state: true, ..plain }),
        ("projection to half", LstmConfig { proj_size: 128, ..plain }),
        ("layer norm", LstmConfig { layer_norm: true, ..plain }),
        ("peephole", LstmConfig { peephole: true, ..plain }),
        ("coupled gates", LstmConfig { coupled_gates: true, ..plain }),
        ("cell clip", LstmConfig { cell_clip: 5.0, ..plain }),
        ("recurrent grad clip", LstmConfig { recurrent_grad_clip: 1.0, ..plain }),
        ("recurrent dropout", LstmConfig { recurrent_dropout: 0.2, ..plain }),
        ("weight drop", LstmConfig { weight_drop: 0.2, ..plain }),
        ("zoneout of h", LstmConfig { zoneout_h: 0.1, ..plain }),
        ("zoneout of c", LstmConfig { zoneout_c: 0.1, ..plain }),
        ("input dropout", LstmConfig { input_dropout: 0.2, ..plain }),
        ("output dropout", LstmConfig { output_dropout: 0.2, ..plain }),
    ];
    let mut all: Vec<(&'static str, Workload)> = cells.into_iter().map(|(name, lstm)| (name, workload(lstm))).collect();
    let mut dropped = workload(plain);
    dropped.model.dropout = 0.2;
    all.push(("dropout between", dropped));
    all
}

fn workload(lstm: LstmConfig) -> Workload {
    let small = crate::is_small();
    let (units, n_steps, n_rows) = if small { (160, 3, 4) } else { (256, 50, 50) };
    let base = Workload::named("D").expect("a workload of this name");
    let model = ModelConfig {
        input: Input::Values { n_features: units },
        output: Output::Values { n_outputs: 1, pooling: Pooling::Last },
        n_layers: 2,
        hidden: units.into(),
        lstm,
        ..base.model
    };
    Workload { model, n_steps, n_rows, ..base }
}

/// Multiplications of a time step of one row: the entries of the LSTM's matrices.
fn operations(model: &ModelConfig) -> f64 {
    let matrices = model.table();
    let of_lstm = matrices.tensors().iter().filter(|t| t.name.starts_with("lstm.weight_") && !t.name.contains("peephole"));
    of_lstm.map(|t| t.shape.iter().product::<usize>() as f64).sum()
}

/// Measures a step with each option, and prints the table of ratios.
pub fn bench(criterion: &mut Criterion) {
    let mut lists = vec!["cpu:1".to_owned()];
    lists.extend(crate::gpus().iter().map(|index| format!("gpu:{index}")));
    for devices in &lists {
        // The fastest step of each, which neighbours disturb least.
        let mut fastest: BTreeMap<&str, Duration> = BTreeMap::new();
        let mut group = criterion.benchmark_group("options");
        for (name, workload) in workloads() {
            let mut training: Option<Training> = None;
            group.bench_function(BenchmarkId::new(name, devices), |bencher| {
                let training = training.get_or_insert_with(|| {
                    let mut training = Training::start(&workload, devices);
                    let loss = training.step();
                    assert!(loss.is_finite(), "{name}: the loss on {devices} is {loss}");
                    training
                });
                bencher.iter_custom(|n| {
                    let mut whole = Duration::ZERO;
                    for _ in 0..n {
                        let start = std::time::Instant::now();
                        training.step();
                        let step = start.elapsed();
                        whole += step;
                        let least = fastest.entry(name).or_insert(step);
                        *least = step.min(*least);
                    }
                    whole
                });
            });
        }
        group.finish();
        let Some(&plain) = fastest.get("plain") else { continue };
        let plain_operations = operations(&workload(LstmConfig::default()).model);
        println!("options on {devices}: fastest step, beside the plain cell's; operations; cost of an operation\n");
        for (name, workload) in workloads() {
            if let Some(time) = fastest.get(name) {
                let (ratio, work) = (time.as_secs_f64() / plain.as_secs_f64(), operations(&workload.model) / plain_operations);
                println!("  {name:<20} {:>9.2} ms {ratio:>6.2} {work:>6.2} {:>6.2}", time.as_secs_f64() * 1e3, ratio / work);
            }
        }
        println!();
    }
}
