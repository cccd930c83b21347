//! A training step on the CPU as its worker makes it: what it must not do (allocate, read rows of zeros) and what it must leave the same.

use carrousel::backend::cpu::CpuBackend;
use carrousel::backend::{Backend, BufferId, Span, read_now};
use carrousel::kernels::reduce::{BlockSquares, RowSquares};
use carrousel::model::config::{Input, LstmConfig, ModelConfig, Output, Pooling};
use carrousel::model::init::{Init, initial};
use carrousel::model::{EmbeddingRows, Model, Pass, Share, Words};
use carrousel::optim::{OptimizerConfig, Rule};
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::shape::BLOCK;

use crate::adapters::DEADLINE;
use crate::alloc_count::n_allocations;

const SGD: OptimizerConfig = OptimizerConfig {
    rule: Rule::Sgd,
    lr: 0.3,
    momentum: 0.0,
    nesterov: false,
    weight_decay: 0.0,
    l1: 0.0,
    clip_norm: 0.1,
    clip_value: 0.0,
};

fn words(vocabulary: usize, lstm: LstmConfig) -> ModelConfig {
    ModelConfig {
        input: Input::Tokens { vocabulary, width: 20 },
        output: Output::Classes { n_classes: vocabulary },
        n_layers: 2,
        hidden: 24.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm,
    }
}

/// A replica with its optimizer's state, as a worker without a ring has them.
struct Replica {
    backend: CpuBackend,
    model: Model,
    optimizer: OptimizerConfig,
    states: [Vec<BufferId>; 2],
    squares: Vec<BufferId>,
    step: u64,
}

impl Replica {
    fn new(config: &ModelConfig, optimizer: OptimizerConfig, n_threads: usize) -> Self {
        let mut backend = CpuBackend::new(n_threads).expect("threads");
        let mut model = Model::new(config.clone(), &mut backend).expect("a model");
        let params = initial(config, model.table(), Init::Uniform(0.2), None, 5);
        model.write_params(&mut backend, &params).expect("parameters");
        let lens: Vec<usize> = model.table().buckets().iter().map(|b| b.range.len()).collect();
        let mut of_buckets = |len: fn(usize) -> usize| -> Vec<BufferId> {
            lens.iter().map(|&n| backend.alloc("a test's", len(n)).expect("memory")).collect()
        };
        let (states, squares) = ([of_buckets(|n| n), of_buckets(|n| n)], of_buckets(|n| n.div_ceil(BLOCK)));
        Self { backend, model, optimizer, states, squares, step: 0 }
    }

    /// Forward, backward, squares of the gradients, update.
    fn step(&mut self, share: &Share<'_>, key: Option<StepKey>) {
        let backend = &mut self.backend;
        self.step += 1;
        self.model.lower_flags(backend).expect("flags");
        let pass = Pass { key, gradients: true, part: 0 };
        self.model.run(backend, share, pass, &mut |_, _, _| Ok(())).expect("a pass");
        let rows = self.model.embedding_rows();
        for (bucket, (&grads, &to)) in self.model.grads().iter().zip(&self.squares).enumerate() {
            let (grads, to) = (backend.whole(grads), backend.whole(to));
            let len = grads.len as u32;
            match rows.as_ref().filter(|rows| rows.bucket == bucket) {
                Some(&EmbeddingRows { rows, width, n_distinct, index, .. }) => {
                    backend.launch(&RowSquares { len, out: 0, rows, width, n_distinct }, &[index, grads, to]).expect("squares of rows");
                }
                None => backend.launch(&BlockSquares { len, out: 0 }, &[grads, to]).expect("squares"),
            }
        }
        let factor = 0.5;
        for bucket in 0..self.model.grads().len() {
            let [param, grad, m, v] =
                [self.model.params()[bucket], self.model.grads()[bucket], self.states[0][bucket], self.states[1][bucket]]
                    .map(|buffer| backend.whole(buffer));
            let lr = self.optimizer.lr;
            match rows.as_ref().filter(|rows| rows.bucket == bucket) {
                Some(r) => self.optimizer.update_rows(backend, [r.index, param, grad], [r.rows, r.width, r.n_distinct], lr, factor),
                None => self.optimizer.update(backend, param, grad, [m, v], self.step, lr, factor),
            }
            .expect("an update");
        }
    }

    fn read(&mut self, buffers: &[BufferId]) -> Vec<u32> {
        let spans: Vec<Span> = buffers.iter().map(|&buffer| self.backend.whole(buffer)).collect();
        spans.into_iter().flat_map(|span| read_now(&mut self.backend, span, DEADLINE).expect("words")).map(f32::to_bits).collect()
    }
}

fn tokens(n: usize, below: u32, seed: u64) -> Vec<u32> {
    let mut stream = Stream::new(StepKey::new(seed, 0), Purpose::Test, 77, 0);
    (0..n).map(|_| stream.below(below)).collect()
}

#[test]
fn rows_of_an_embedding_without_a_gradient_are_left_alone_and_every_bit_is_the_dense_one() {
    // Rows across blocks of squares, at both halves of their lanes.
    let config = words(700, LstmConfig::default());
    let (mut dense, mut sparse) = (Replica::new(&config, SGD, 1), Replica::new(&config, SGD, 2));
    sparse.model.keep_embedding_sparse(true);
    let (weights, streams) = (vec![1.0; 60], [0, 1, 2, 3, 4, 5]);
    for step in 0..4 {
        let (input, targets) = (tokens(60, if step == 1 { 3 } else { 700 }, step), tokens(60, 700, 100 + step));
        let share = Share {
            n_steps: 10,
            n_rows: 6,
            input: Words::Tokens(&input),
            targets: Some(Words::Tokens(&targets)),
            weights: &weights,
            lengths: None,
            streams: &streams,
            state: None,
            final_gradient: None,
            scale: 1.0 / 60.0,
        };
        dense.step(&share, None);
        sparse.step(&share, None);
        let rows = sparse.model.embedding_rows().expect("rows of an embedding");
        let mut distinct = input.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(rows.n_distinct as usize, distinct.len());
        for (name, of) in [
            ("gradients", (|r: &Replica| r.model.grads().to_vec()) as fn(&Replica) -> Vec<BufferId>),
            ("squares", |r| r.squares.clone()),
            ("parameters", |r| r.model.params().to_vec()),
        ] {
            let (of_dense, of_sparse) = (of(&dense), of(&sparse));
            assert!(dense.read(&of_dense) == sparse.read(&of_sparse), "{name} differ after step {step}");
        }
    }
    let params = sparse.model.params().to_vec();
    assert!(sparse.read(&params[..1]).iter().any(|&word| word != 0), "the embedding is not zero");
}

#[test]
fn an_optimizer_that_moves_what_has_no_gradient_does_not_spare_zeros() {
    assert!(SGD.spares_zeros());
    let moving = [
        ("momentum", OptimizerConfig { momentum: 0.9, ..SGD }),
        ("weight decay", OptimizerConfig { weight_decay: 0.1, ..SGD }),
        ("l1", OptimizerConfig { l1: 0.1, ..SGD }),
    ];
    for (name, optimizer) in moving.into_iter().chain([("adam", OptimizerConfig { rule: Rule::Adam, ..SGD })]) {
        assert!(!optimizer.spares_zeros(), "{name}");
    }
}

#[test]
fn a_training_step_on_the_cpu_allocates_nothing_after_the_first() {
    let options = LstmConfig { proj_size: 16, layer_norm: true, peephole: true, recurrent_dropout: 0.2, ..LstmConfig::default() };
    let series = ModelConfig {
        input: Input::Values { n_features: 5 },
        output: Output::Values { n_outputs: 1, pooling: Pooling::Last },
        ..words(2, LstmConfig::default())
    };
    let adam = OptimizerConfig { rule: Rule::Adam, ..SGD };
    for (name, config, optimizer) in [
        ("words with sgd", words(50, LstmConfig::default()), SGD),
        ("words with adam and options", words(50, options), adam),
        ("series", series, adam),
    ] {
        for n_threads in [1, 3] {
            let mut replica = Replica::new(&config, optimizer, n_threads);
            replica.model.keep_embedding_sparse(optimizer.spares_zeros());
            let (input, values) = (tokens(72, 50, 1), vec![0.5; 72 * 5]);
            let is_words = matches!(config.input, Input::Tokens { .. });
            let (targets, weights, streams) = (vec![0.25; 9], vec![1.0; if is_words { 72 } else { 9 }], [0, 1, 2, 3, 4, 5, 6, 7, 8]);
            let share = Share {
                n_steps: 8,
                n_rows: 9,
                input: if is_words { Words::Tokens(&input) } else { Words::Values(&values) },
                targets: Some(if is_words { Words::Tokens(&input) } else { Words::Values(&targets) }),
                weights: &weights,
                lengths: None,
                streams: &streams,
                state: None,
                final_gradient: None,
                scale: 0.1,
            };
            let mut counted = [0; 4];
            for (step, counted) in counted.iter_mut().enumerate() {
                let before = n_allocations();
                replica.step(&share, Some(StepKey::new(3, step as u64)));
                *counted = n_allocations() - before;
            }
            assert!(counted[0] > 0, "{name}: the first step takes its memory");
            assert_eq!(counted[1..], [0; 3], "{name}, {n_threads} threads");
        }
    }
}
