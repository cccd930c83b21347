//! Gradients made smaller: codecs against their definition, sums of several ranks against f64, and whole runs.

use std::path::Path;

use carrousel::comm::{Options, group};
use carrousel::compress::codec::{Codec, from_bf16, from_half, to_bf16, to_half};
use carrousel::compress::{Compressor, Held, Kind, Method, Settings};
use carrousel::model::config::{Input, ModelConfig, Output};
use carrousel::observe::Event;
use carrousel::optim::{OptimizerConfig, Rule};
use carrousel::params::{Axis, Layout, ParamTable};
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::store::checkpoint::Checkpoint;
use carrousel::store::config::{RunConfig, Task};
use carrousel::store::run_folder::{RunFolder, Which};
use carrousel::train::RunOptions;
use carrousel::train::compression::{named, settings, taken, unsuited, update_rule};

use crate::adapters;
use crate::losses::fails_at;
use crate::runs::{config, text, train, train_with};
use crate::training::{nothing, unlike};

fn random(seed: u64, idx: u32) -> Stream {
    Stream::new(StepKey::new(seed, 0), Purpose::Test, idx, 0)
}

// Codecs.

/// Of all numbers that `from` can make, the nearest in f64, of two the one with an even code.
fn nearest(codes: &[(f64, u16)], value: f32) -> u16 {
    let value = f64::from(value);
    let at = codes.partition_point(|(of, _)| *of < value);
    let around = &codes[at.saturating_sub(1)..(at + 1).min(codes.len())];
    let best = around.iter().min_by(|a, b| {
        let (da, db) = ((a.0 - value).abs(), (b.0 - value).abs());
        da.total_cmp(&db).then((a.1 & 1).cmp(&(b.1 & 1)))
    });
    best.expect("there are codes").1
}

#[test]
fn half_and_bf16_are_the_nearest_numbers_of_their_kind() {
    // By IEEE 754: 5 bits of exponent, biased by 15, and 10 of fraction; bf16 is 8 and 7, biased by 127.
    let by_definition = |code: u16, exponent_bits: u32, fraction_bits: u32| -> f64 {
        let (exponent, fraction) = (i32::from(code) >> fraction_bits, f64::from(u32::from(code) & ((1 << fraction_bits) - 1)));
        let (bias, scale) = ((1 << (exponent_bits - 1)) - 1, f64::from(1 << fraction_bits));
        if exponent == 0 { fraction / scale * 2f64.powi(1 - bias) } else { (1.0 + fraction / scale) * 2f64.powi(exponent - bias) }
    };
    // There, back, and bits of exponent and of fraction.
    type Kind16 = (fn(f32) -> u16, fn(u16) -> f32, u32, u32);
    let kinds: [Kind16; 2] = [(to_half, from_half, 5, 10), (to_bf16, from_bf16, 8, 7)];
    for (to, from, exponent_bits, fraction_bits) in kinds {
        let infinite = ((1 << exponent_bits) - 1) << fraction_bits;
        let codes: Vec<(f64, u16)> = (0..infinite).map(|code| (by_definition(code, exponent_bits, fraction_bits), code)).collect();
        for &(value, code) in &codes {
            assert_eq!(f64::from(from(code)), value, "{code:#x}");
            assert_eq!(f64::from(from(code | 0x8000)), -value, "{code:#x}");
            assert_eq!(to(value as f32), code, "{value}");
        }
        let mut random = random(1, fraction_bits);
        let largest = codes[codes.len() - 1].0 as f32;
        for i in 0..20_000 {
            // Bits at random, so that all sizes are met, and ties between two neighbours.
            let any = f32::from_bits(random.next_u32());
            let tie = {
                let at = 1 + random.below(codes.len() as u32 - 1) as usize;
                ((codes[at].0 + codes[at - 1].0) / 2.0) as f32
            };
            let value = if i % 2 == 0 { any } else { tie };
            if value.is_nan() || value.abs() > largest {
                continue;
            }
            let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
            assert_eq!(to(value), nearest(&codes, value.abs()) | sign, "{value:e}");
        }
        assert!(from(to(f32::NAN)).is_nan() && from(to(f32::INFINITY)) == f32::INFINITY);
    }
}

fn there_and_back(codec: Codec, values: &[f32]) -> Vec<f32> {
    let mut bytes = vec![7];
    codec.encode(values, &mut bytes);
    assert_eq!(bytes.len(), 1 + codec.encoded_len(values.len()), "{codec:?}");
    let mut back = vec![f32::NAN; values.len()];
    codec.decode(&bytes[1..], &mut back);
    back
}

#[test]
fn blocks_come_back_as_their_definition_says_whatever_their_size() {
    let mut random = random(2, 0);
    for n in [1, 7, 8, 9, 128, 300] {
        for scale in [1e-30f32, 1e-9, 1.0, 3e4, 1e30] {
            let values: Vec<f32> = (0..n).map(|_| (2.0 * random.uniform() - 1.0) * scale).collect();
            let most = values.iter().fold(0.0f64, |most, v| most.max(f64::from(v.abs())));
            let mean = values.iter().map(|v| f64::from(v.abs())).sum::<f64>() / n as f64;
            for (codec, back) in [Codec::Fp16, Codec::Bf16, Codec::Int8, Codec::Onebit].map(|codec| (codec, there_and_back(codec, &values)))
            {
                for (&value, &back) in values.iter().zip(&back) {
                    let (value, back) = (f64::from(value), f64::from(back));
                    let error = (back - value).abs();
                    match codec {
                        // Eleven bits of each value, and of values that are tiny beside the largest one at least as much as that leaves.
                        Codec::Fp16 => assert!(error <= (value.abs() / 2048.0).max(most * 2f64.powi(-38)), "{value:e}: {back:e}"),
                        Codec::Bf16 => assert!(error <= value.abs() / 256.0, "{value:e}: {back:e}"),
                        Codec::Int8 => assert!(error <= most / 127.0 * 0.5001, "{value:e}: {back:e} of {most:e}"),
                        Codec::Onebit => {
                            assert!((back.abs() - mean).abs() <= mean / 256.0, "{value:e}: {back:e} of {mean:e}");
                            assert_eq!(back < 0.0, value < 0.0, "{value:e}: {back:e}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn zeros_come_back_as_zeros_and_what_is_not_finite_is_found_out() {
    for codec in [Codec::Fp16, Codec::Bf16, Codec::Int8, Codec::Onebit] {
        assert!(there_and_back(codec, &[0.0; 40]).iter().all(|value| *value == 0.0), "{codec:?}");
        // The smallest that f32 can tell come back as something no larger than twice that.
        assert!(there_and_back(codec, &[1e-45; 40]).iter().all(|value| value.abs() <= 3e-45), "{codec:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; 40];
            values[17] = bad;
            assert!(!there_and_back(codec, &values)[17].is_finite(), "{codec:?}, {bad}");
        }
    }
}

#[test]
fn methods_are_read_as_they_are_written_and_what_makes_no_sense_is_refused() {
    for text in ["none", "fp16", "bf16", "int8", "onebit", "topk:0.01", "powersgd:4"] {
        assert_eq!(text.parse::<Method>().unwrap().to_string(), text);
    }
    for (text, part) in [
        ("fp8", "is not one of none, fp16"),
        ("fp16:2", "is not one of"),
        ("topk", "topk needs the share"),
        ("topk:0", "'0' is no share"),
        ("topk:0.3", "at most 0.25"),
        ("topk:nan", "'nan' is no share"),
        ("powersgd", "powersgd needs the rank"),
        ("powersgd:0", "'0' is no rank"),
        ("powersgd:-1", "'-1' is no rank"),
        ("powersgd:1000", "from 1 to 256"),
        ("", "is not one of"),
    ] {
        let error = text.parse::<Method>().unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}

// Sums of several ranks.

const METHODS: [Method; 6] =
    [Method::Fp16, Method::Bf16, Method::Int8, Method::Onebit, Method::Topk { ratio: 0.05 }, Method::Powersgd { rank: 2 }];

/// Sizes that are padded, rows narrow and wide, two buckets, and vectors.
fn table() -> ParamTable {
    let mut table = ParamTable::new();
    table.push("embedding.weight", 0, vec![301, 5], Layout::Matrix { rows: Axis::inner(301), cols: Axis::units(5) });
    table.push("lstm.weight_ih_l0", 1, vec![4 * 17, 50], Layout::Panels { hidden: 17, inputs: Axis::units(50) });
    table.push("lstm.bias_ih_l0", 1, vec![4 * 17], Layout::gate_bias(17));
    table.push("lstm.weight_hh_l0", 1, vec![4 * 17, 17], Layout::Panels { hidden: 17, inputs: Axis::units(17) });
    table
}

fn plain(method: Method) -> Settings {
    Settings { method, feeds_back: true, momentum: None, clip_norm: 0.0 }
}

/// A gradient by tensor, in PyTorch's order: sparse rows, sizes that differ by tensor.
fn gradient(table: &ParamTable, step: u64, rank: usize) -> Vec<Vec<f32>> {
    let of = |(idx, tensor): (usize, &carrousel::params::Tensor)| {
        let mut random = Stream::new(StepKey::new(7, step), Purpose::Test, idx as u32, rank as u32);
        let n = tensor.layout.torch_len();
        let cols = *tensor.shape.last().unwrap();
        (0..n).map(|i| if i / cols % 3 == rank % 3 { 0.0 } else { random.normal() as f32 * 1e-3 * (1 + idx) as f32 }).collect()
    };
    table.tensors().iter().enumerate().map(of).collect()
}

fn packed(table: &ParamTable, tensors: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut buckets: Vec<Vec<f32>> = table.buckets().iter().map(|bucket| vec![0.0; bucket.range.len()]).collect();
    for (tensor, values) in table.tensors().iter().zip(tensors) {
        tensor.pack(values, &mut buckets[tensor.bucket][tensor.in_bucket()]);
    }
    buckets
}

fn unpacked(table: &ParamTable, buckets: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let of = |tensor: &carrousel::params::Tensor| {
        let mut values = vec![0.0; tensor.layout.torch_len()];
        tensor.unpack(&buckets[tensor.bucket][tensor.in_bucket()], &mut values);
        values
    };
    table.tensors().iter().map(of).collect()
}

/// What ranks came to: by rank, by step, the buckets; what each holds at the end; bytes that each sent.
struct Summed {
    steps: Vec<Vec<Vec<Vec<f32>>>>,
    held: Vec<Vec<Held>>,
    sent: Vec<u64>,
}

/// Sums steps over ranks that are threads; `begin` readies each compressor, and steps that `commits` denies are forgotten.
fn summed(
    settings: Settings,
    world: usize,
    steps: std::ops::RangeInclusive<u64>,
    begin: impl Fn(usize, &mut Compressor) + Sync,
    commits: impl Fn(u64) -> bool + Sync,
) -> Summed {
    let table = table();
    let (table, begin, commits) = (&table, &begin, &commits);
    let of_ranks: Vec<_> = std::thread::scope(|scope| {
        let ranks = group(world, Options::default()).into_iter().enumerate().map(|(rank, mut comm)| {
            let steps = steps.clone();
            scope.spawn(move || {
                let mut compressor = Compressor::new(settings, table);
                compressor.join(rank, world);
                begin(rank, &mut compressor);
                let mut sums = Vec::new();
                for step in steps {
                    compressor.begin(step);
                    let mut buckets = packed(table, &gradient(table, step, rank));
                    // As the backward pass finishes them.
                    for (bucket, words) in buckets.iter_mut().enumerate().rev() {
                        compressor.sum(&mut comm, bucket, words, 1.0).expect("a sum");
                    }
                    if commits(step) {
                        compressor.commit();
                    }
                    sums.push(buckets);
                }
                (sums, compressor.held(), comm.bytes_sent())
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    });
    let mut summed = Summed { steps: Vec::new(), held: Vec::new(), sent: Vec::new() };
    for (steps, held, sent) in of_ranks {
        summed.steps.push(steps);
        summed.held.push(held);
        summed.sent.push(sent);
    }
    summed
}

fn bits(buckets: &[Vec<f32>]) -> Vec<u32> {
    buckets.iter().flatten().map(|value| value.to_bits()).collect()
}

/// By tensor: the sum of what ranks and owners hold.
fn held_in_all(table: &ParamTable, held: &[Vec<Held>], kinds: &[Kind]) -> Vec<Vec<f64>> {
    let mut all: Vec<Vec<f64>> = table.tensors().iter().map(|tensor| vec![0.0; tensor.layout.torch_len()]).collect();
    for piece in held.iter().flatten().filter(|piece| kinds.contains(&piece.kind)) {
        let to = &mut all[piece.tensor][piece.start..piece.start + piece.values.len()];
        to.iter_mut().zip(&piece.values).for_each(|(to, value)| *to += f64::from(*value));
    }
    all
}

#[test]
fn all_ranks_agree_to_the_bit_and_padding_stays_zero() {
    let table = table();
    for method in METHODS.into_iter().chain([Method::None]) {
        for world in [2, 3, 5] {
            let summed = summed(plain(method), world, 1..=3, |_, _| (), |_| true);
            for (step, of_first) in summed.steps[0].iter().enumerate() {
                for (rank, steps) in summed.steps.iter().enumerate() {
                    assert_eq!(bits(&steps[step]), bits(of_first), "{method}, world {world}, step {step}, rank {rank}");
                }
                let again = packed(&table, &unpacked(&table, of_first));
                assert_eq!(bits(&again), bits(of_first), "{method}, world {world}: something lies between the tensors");
            }
        }
    }
}

#[test]
fn what_was_agreed_on_and_what_is_held_add_up_to_all_gradients() {
    let table = table();
    let n_steps = 12;
    for method in METHODS {
        for world in [2, 4] {
            let summed = summed(plain(method), world, 1..=n_steps, |_, _| (), |_| true);
            let mut left = held_in_all(&table, &summed.held, &[Kind::Residual, Kind::Owner]);
            let is_lossless = left.iter().flatten().all(|value| *value == 0.0);
            assert!(!is_lossless, "{method}: nothing was left out");
            let mut size = vec![0.0f64; left.len()];
            for step in 1..=n_steps {
                let agreed = unpacked(&table, &summed.steps[0][step as usize - 1]);
                for (left, agreed) in left.iter_mut().zip(&agreed) {
                    left.iter_mut().zip(agreed).for_each(|(left, agreed)| *left += f64::from(*agreed));
                }
                for rank in 0..world {
                    for ((left, own), size) in left.iter_mut().zip(gradient(&table, step, rank)).zip(&mut size) {
                        left.iter_mut().zip(&own).for_each(|(left, own)| *left -= f64::from(*own));
                        *size = own.iter().fold(*size, |size, own| size.max(f64::from(own.abs())));
                    }
                }
            }
            for ((left, size), tensor) in left.iter().zip(&size).zip(table.tensors()) {
                let most = left.iter().fold(0.0f64, |most, left| most.max(left.abs()));
                assert!(most < 1e-5 * size, "{method}, world {world}, {}: {most:e} of gradients of {size:e} are lost", tensor.name);
            }
        }
    }
}

#[test]
fn whole_tensors_are_summed_as_they_are() {
    let table = table();
    for method in METHODS {
        let summed = summed(plain(method), 3, 1..=1, |_, _| (), |_| true);
        let agreed = unpacked(&table, &summed.steps[0][0]);
        let bias = table.tensors().iter().position(|tensor| tensor.name == "lstm.bias_ih_l0").unwrap();
        let own: Vec<_> = (0..3).map(|rank| gradient(&table, 1, rank)).collect();
        let expected: Vec<f32> = (0..agreed[bias].len()).map(|i| own[0][bias][i] + own[1][bias][i] + own[2][bias][i]).collect();
        assert_eq!(agreed[bias], expected, "{method}");
    }
}

#[test]
fn what_a_codec_loses_in_a_sum_is_bounded_by_its_steps() {
    let table = table();
    let world = 3;
    for (method, of_largest) in [(Method::Fp16, 1.0 / 1024.0), (Method::Bf16, 1.0 / 128.0), (Method::Int8, 1.0 / 64.0)] {
        let summed = summed(plain(method), world, 1..=1, |_, _| (), |_| true);
        let agreed = unpacked(&table, &summed.steps[0][0]);
        let own: Vec<_> = (0..world).map(|rank| gradient(&table, 1, rank)).collect();
        for (t, agreed) in agreed.iter().enumerate() {
            let exact: Vec<f64> = (0..agreed.len()).map(|i| own.iter().map(|own| f64::from(own[t][i])).sum()).collect();
            let most = own.iter().flat_map(|own| &own[t]).fold(0.0f64, |most, v| most.max(f64::from(v.abs())));
            let worst = agreed.iter().zip(&exact).fold(0.0f64, |worst, (a, e)| worst.max((f64::from(*a) - e).abs()));
            assert!(worst <= of_largest * most * world as f64, "{method}, {}: {worst:e} of {most:e}", table.tensors()[t].name);
        }
    }
}

#[test]
fn topk_sends_the_largest_of_each_rank_and_forgets_their_momentum() {
    let table = table();
    let (ratio, world, momentum) = (0.05, 3, 0.9f32);
    let method = Method::Topk { ratio };
    // After the warm-up, from zero.
    let first = method.warm_up_steps() + 1;
    assert!(method.density(first - 1) > ratio && method.density(first) == ratio && method.density(1) == 0.25);
    for nesterov in [false, true] {
        let settings = Settings { momentum: Some((momentum, nesterov)), ..plain(method) };
        let summed = summed(settings, world, first..=first + 4, |_, _| (), |_| true);
        let lens: Vec<usize> = table.tensors().iter().map(|tensor| tensor.layout.torch_len()).collect();
        let zeros = || -> Vec<Vec<f32>> { lens.iter().map(|&n| vec![0.0; n]).collect() };
        let (mut velocities, mut residuals) = (vec![zeros(); world], vec![zeros(); world]);
        for step in first..=first + 4 {
            let mut expected = zeros();
            for rank in 0..world {
                let own = gradient(&table, step, rank);
                for (t, tensor) in table.tensors().iter().enumerate() {
                    let (u, v) = (&mut velocities[rank][t], &mut residuals[rank][t]);
                    for i in 0..own[t].len() {
                        u[i] = momentum * u[i] + own[t][i];
                        let g = if nesterov { own[t][i] + momentum * u[i] } else { u[i] };
                        v[i] += g;
                    }
                    let is_whole = tensor.shape.len() == 1 || own[t].len() < 1024;
                    let n = if is_whole { own[t].len() } else { (ratio * own[t].len() as f64).ceil() as usize };
                    let mut order: Vec<usize> = (0..own[t].len()).collect();
                    order.sort_by(|&a, &b| v[b].abs().total_cmp(&v[a].abs()).then(a.cmp(&b)));
                    for &i in &order[..n] {
                        expected[t][i] += v[i];
                        v[i] = 0.0;
                        if !is_whole {
                            u[i] = 0.0;
                        }
                    }
                }
            }
            let agreed = unpacked(&table, &summed.steps[0][(step - first) as usize]);
            assert_eq!(agreed, expected, "step {step}, nesterov {nesterov}");
        }
    }
}

/// `[N, M]` as rows.
type Matrix = Vec<Vec<f64>>;

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    a.iter().map(|row| (0..b[0].len()).map(|j| row.iter().zip(b).map(|(x, b)| x * b[j]).sum()).collect()).collect()
}

fn transposed(a: &Matrix) -> Matrix {
    (0..a[0].len()).map(|j| a.iter().map(|row| row[j]).collect()).collect()
}

#[test]
fn powersgd_is_a_step_of_power_iteration_on_the_sum_begun_where_the_last_one_ended() {
    let table = table();
    let (rank, world, n_steps) = (2, 3, 4);
    // The factors that it begins with are its own affair.
    let no_step = std::ops::RangeInclusive::new(1, 0);
    let begun = summed(plain(Method::Powersgd { rank }), world, no_step, |_, _| (), |_| true).held;
    let summed = summed(plain(Method::Powersgd { rank }), world, 1..=n_steps, |_, _| (), |_| true);
    for (t, tensor) in table.tensors().iter().enumerate().filter(|(_, tensor)| tensor.shape.len() == 2) {
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let matrix = |values: &[f32]| -> Matrix { values.chunks(cols).map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect() };
        let start = begun[0].iter().find(|piece| piece.kind == Kind::Factor && piece.tensor == t).expect("a factor");
        let mut q: Matrix = start.values.chunks(rank).map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect();
        let mut left: Vec<Matrix> = vec![vec![vec![0.0; cols]; rows]; world];
        for step in 1..=n_steps {
            let mut sum: Matrix = vec![vec![0.0; cols]; rows];
            for (of_rank, left) in left.iter_mut().enumerate() {
                let own = matrix(&gradient(&table, step, of_rank)[t]);
                for (i, row) in left.iter_mut().enumerate() {
                    for (j, value) in row.iter_mut().enumerate() {
                        *value += own[i][j];
                        sum[i][j] += *value;
                    }
                }
            }
            // Gram and Schmidt, by columns.
            let mut columns = transposed(&product(&sum, &q));
            for i in 0..rank {
                for k in 0..i {
                    let along: f64 = (0..rows).map(|r| columns[i][r] * columns[k][r]).sum();
                    let other = columns[k].clone();
                    columns[i].iter_mut().zip(&other).for_each(|(value, other)| *value -= along * other);
                }
                let norm = columns[i].iter().map(|v| v * v).sum::<f64>().sqrt();
                columns[i].iter_mut().for_each(|v| *v /= norm);
            }
            let p = transposed(&columns);
            q = product(&transposed(&sum), &p);
            let expected = product(&p, &transposed(&q));
            for left in &mut left {
                let own = product(&p, &product(&columns, left));
                for (row, own) in left.iter_mut().zip(&own) {
                    row.iter_mut().zip(own).for_each(|(left, own)| *left -= own);
                }
            }
            let agreed = matrix(&unpacked(&table, &summed.steps[0][step as usize - 1])[t]);
            let most = sum.iter().flatten().fold(0.0f64, |most, v| most.max(v.abs()));
            for (agreed, expected) in agreed.iter().flatten().zip(expected.iter().flatten()) {
                assert!((agreed - expected).abs() < 1e-4 * most, "{}, step {step}: {agreed:e} for {expected:e}", tensor.name);
            }
        }
    }
}

#[test]
fn a_step_that_is_not_committed_leaves_nothing_behind() {
    for method in METHODS {
        let settings = Settings { momentum: Some((0.5, false)), ..plain(method) };
        // The second step is taken, forgotten, and taken again: steps 1, 2, 2, 3 of which the first 2 does not count.
        let undisturbed = summed(settings, 3, 1..=3, |_, _| (), |_| true);
        let forgotten = summed(settings, 3, 1..=2, |_, _| (), |step| step == 1);
        let held = forgotten.held;
        let again = summed(settings, 3, 2..=3, |rank, compressor| compressor.hold(&whole_of(&held, rank)).expect("it fits"), |_| true);
        assert_eq!(bits(&again.steps[1][0]), bits(&undisturbed.steps[1][1]), "{method}: the repeated step");
        assert_eq!(bits(&again.steps[1][1]), bits(&undisturbed.steps[1][2]), "{method}: the one after");
        assert_eq!(again.held, undisturbed.held, "{method}");
    }
}

/// What a checkpoint of what ranks hold gives back to a rank.
fn whole_of(held: &[Vec<Held>], rank: usize) -> Vec<Held> {
    let table = table();
    let mut checkpoint = Checkpoint { meta: serde_json::json!({ "step": 1 }), tensors: named(held, &table) };
    let mut of_ranks = taken(&mut checkpoint, &table, held.len(), held.len(), true).expect("it fits");
    assert!(checkpoint.tensors.is_empty(), "{} is left", checkpoint.tensors[0].name);
    of_ranks.swap_remove(rank)
}

#[test]
fn on_other_devices_all_that_was_held_goes_to_the_first() {
    let table = table();
    for method in METHODS {
        let settings = Settings { momentum: Some((0.5, false)), ..plain(method) };
        let held = summed(settings, 4, 1..=3, |_, _| (), |_| true).held;
        let mut checkpoint = Checkpoint { meta: serde_json::json!({ "step": 3 }), tensors: named(&held, &table) };
        let of_ranks = taken(&mut checkpoint, &table, 4, 2, false).expect("it fits");
        assert!(of_ranks[1].is_empty());
        for kinds in [&[Kind::Residual, Kind::Owner][..], &[Kind::Momentum]] {
            let (before, after) = (held_in_all(&table, &held, kinds), held_in_all(&table, &of_ranks, kinds));
            for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
                assert!((before - after).abs() <= 1e-8, "{method}, {kinds:?}: {before:e} became {after:e}");
            }
        }
    }
}

#[test]
fn in_another_ring_a_rank_keeps_what_it_held_as_an_owner() {
    let table = table();
    for method in METHODS {
        let held = summed(plain(method), 3, 1..=3, |_, _| (), |_| true).held;
        let moved: Vec<Vec<Held>> = (0..3)
            .map(|rank| {
                let mut compressor = Compressor::new(plain(method), &table);
                compressor.join(rank, 3);
                compressor.hold(&whole_of(&held, rank)).expect("it fits");
                // Rank 1 leaves, rank 2 moves up.
                compressor.join(if rank == 2 { 1 } else { rank }, 2);
                compressor.held()
            })
            .collect();
        let kinds = [Kind::Residual, Kind::Owner];
        for rank in [0, 2] {
            let before = held_in_all(&table, &held[rank..=rank], &kinds);
            let after = held_in_all(&table, &moved[rank..=rank], &kinds);
            for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
                assert!((before - after).abs() <= 1e-6 * before.abs(), "{method}, rank {rank}: {before:e} became {after:e}");
            }
        }
    }
}

#[test]
fn bytes_sent_are_those_of_the_message_between_two() {
    let table = table();
    for method in METHODS.into_iter().chain([Method::None]) {
        let first = method.warm_up_steps() + 1;
        let summed = summed(plain(method), 2, first..=first + 1, |_, _| (), |_| true);
        let message = Compressor::message_bytes(method, &table);
        // The segments of two ranks differ by a block at most, which is sent by the one and the other in turn.
        assert_eq!(summed.sent, [2 * message; 2], "{method}");
    }
}

#[test]
fn powersgd_sends_of_the_papers_model_what_the_paper_says() {
    let n_words = 28_869;
    let model = ModelConfig {
        input: Input::Tokens { vocabulary: n_words, width: 650 },
        output: Output::Classes { n_classes: n_words },
        n_layers: 3,
        hidden: 650.into(),
        dropout: 0.0,
        bias: true,
        tied: true,
        lstm: Default::default(),
    };
    let table = model.table();
    assert_eq!(table.n_parameters(), 28_949_319);
    let dense = Compressor::message_bytes(Method::None, &table);
    assert_eq!(dense, 4 * 28_949_319);
    for (rank, times) in [(1, 309.7), (2, 203.1), (4, 120.3)] {
        let sent = Compressor::message_bytes(Method::Powersgd { rank }, &table);
        let ratio = dense as f64 / sent as f64;
        assert!((ratio - times).abs() < 0.06, "rank {rank}: 1/{ratio:.2} instead of 1/{times}");
    }
    // 25 bits of exponent and fraction would be 1/2; a byte a row of 650 is 1/1300 of that, and biases go whole.
    for (method, least, most) in [
        (Method::Fp16, 1.99, 2.0),
        (Method::Bf16, 1.99, 2.0),
        (Method::Int8, 3.95, 4.0),
        (Method::Onebit, 25.0, 32.0),
        (Method::Topk { ratio: 0.01 }, 55.0, 67.0),
    ] {
        let ratio = dense as f64 / Compressor::message_bytes(method, &table) as f64;
        assert!((least..most).contains(&ratio), "{method}: 1/{ratio}");
    }
}

#[test]
fn a_gradient_is_clipped_before_it_is_sent_to_its_part_of_the_norm() {
    let table = table();
    let settings = Settings { clip_norm: 3.0, ..plain(Method::Powersgd { rank: 2 }) };
    let mut compressor = Compressor::new(settings, &table);
    compressor.join(1, 4);
    let of = |size: f32| compressor.clip_factor([&[3.0 * size, 0.0][..], &[4.0 * size]].into_iter());
    // Half of 3 over the root of 4 is left to each.
    assert!((f64::from(of(2.0)) - 1.5 / 10.0).abs() < 1e-6);
    assert_eq!(of(0.1), 1.0);
    assert_eq!(of(f32::NAN), 1.0);
}

#[test]
fn a_gradient_that_is_not_finite_spoils_the_sum_on_every_rank() {
    let table = table();
    for method in METHODS {
        for bad in [f32::NAN, f32::INFINITY] {
            let finite: Vec<bool> = std::thread::scope(|scope| {
                let table = &table;
                let ranks = group(3, Options::default()).into_iter().enumerate().map(|(rank, mut comm)| {
                    scope.spawn(move || {
                        let mut compressor = Compressor::new(plain(method), table);
                        compressor.join(rank, 3);
                        compressor.begin(1000);
                        let mut own = gradient(table, 1, rank);
                        if rank == 1 {
                            own[1][777] = bad;
                        }
                        let mut words = packed(table, &own).swap_remove(1);
                        compressor.sum(&mut comm, 1, &mut words, 1.0).expect("a sum");
                        words.iter().all(|word| word.is_finite())
                    })
                });
                let ranks: Vec<_> = ranks.collect();
                ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
            });
            assert_eq!(finite, [false; 3], "{method}, {bad}");
        }
    }
}

// What it means to the optimizer.

#[test]
fn momentum_and_clipping_happen_once() {
    let sgd = OptimizerConfig { rule: Rule::Sgd, momentum: 0.9, clip_norm: 1.0, weight_decay: 1e-4, ..OptimizerConfig::default() };
    let adam = OptimizerConfig::default();
    for method in METHODS.into_iter().chain([Method::None]) {
        for optimizer in [sgd, adam] {
            let (before, after) = (settings(method, &optimizer), update_rule(method, &optimizer));
            assert_eq!((before.clip_norm > 0.0) as u8 + (after.clip_norm > 0.0) as u8, 1, "{method}, {:?}", optimizer.rule);
            let moves = before.momentum.is_some() as u8 + (after.momentum > 0.0) as u8;
            assert_eq!(moves, (optimizer.momentum > 0.0) as u8, "{method}, {:?}", optimizer.rule);
        }
    }
    let corrected = update_rule(Method::Topk { ratio: 0.01 }, &sgd);
    assert!(
        (corrected.weight_decay - 1e-3).abs() < 1e-12,
        "decay acts as strongly as through a momentum of 0.9: {}",
        corrected.weight_decay
    );
    assert_eq!(update_rule(Method::Int8, &sgd), sgd);
}

#[test]
fn an_optimizer_that_a_method_does_not_suit_is_a_warning() {
    let sgd = OptimizerConfig { rule: Rule::Sgd, ..OptimizerConfig::default() };
    let adam = OptimizerConfig::default();
    for method in METHODS {
        let (with_sgd, with_adam) = match method {
            Method::Topk { .. } | Method::Powersgd { .. } => (false, true),
            Method::Onebit => (true, false),
            _ => (false, false),
        };
        assert_eq!(unsuited(method, &sgd).is_some(), with_sgd, "{method} with SGD");
        assert_eq!(unsuited(method, &adam).is_some(), with_adam, "{method} with Adam");
    }
}

// Whole runs.

fn small(dir: &Path, method: Method) -> RunConfig {
    let file = dir.join("text.txt");
    std::fs::write(&file, text(4000)).unwrap();
    let mut config = config(Task::Lm, &[&file]);
    (config.layers, config.batch_size, config.max_steps) = (2, 13, Some(12));
    (config.compress, config.devices, config.hash_every) = (method, "cpu:1*3".into(), 1);
    config
}

fn run_bits(run: &Path) -> Vec<(String, Vec<u32>)> {
    let tensors = RunFolder::read(run).unwrap().load(Which::Last).unwrap().tensors;
    tensors.into_iter().map(|t| (t.name, t.data.into_iter().map(f32::to_bits).collect())).collect()
}

fn warnings(events: &[Event]) -> Vec<&str> {
    events.iter().filter_map(|e| if let Event::Warning { message } = e { Some(message.as_str()) } else { None }).collect()
}

#[test]
fn replicas_stay_equal_to_the_bit_on_like_and_unlike_devices_and_learn() {
    let dir = tempfile::tempdir().unwrap();
    for method in METHODS {
        for (name, wrap) in [("alike", None), ("unlike", Some(unlike(nothing)))] {
            for rule in [Rule::Adam, Rule::Sgd] {
                let mut config = small(dir.path(), method);
                (config.optimizer.rule, config.max_steps) = (rule, Some(30));
                if rule == Rule::Sgd {
                    (config.optimizer.lr, config.optimizer.momentum) = (0.3, 0.9);
                }
                let options = RunOptions { out: dir.path().join(format!("{name}-{method}-{rule:?}")), resume: false, wrap: wrap.clone() };
                let ran = train_with(&config, options, None);
                let outcome = ran.outcome.unwrap_or_else(|e| panic!("{method}, {name}, {rule:?}: {e:#}"));
                let (first, last) = (ran.losses[0], ran.losses[29]);
                assert!(last < 0.95 * first, "{method}, {name}, {rule:?}: {first} -> {last}");
                assert!(outcome.summary["bytes_sent"].as_u64().unwrap() > 0);
            }
        }
        if !adapters::gpus().is_empty() {
            let mut config = small(dir.path(), method);
            (config.devices, config.balance) = ("gpu:0,cpu:1".into(), "equal".into());
            let ran = train(&config, &dir.path().join(format!("gpu-{method}")), false);
            ran.outcome.unwrap_or_else(|e| panic!("{method}, gpu: {e:#}"));
        }
    }
}

#[test]
fn fewer_bytes_are_sent_and_the_summary_and_the_table_tell_how_many() {
    let dir = tempfile::tempdir().unwrap();
    let run = |method: Method| {
        let mut config = small(dir.path(), method);
        config.devices = "cpu:1*2".into();
        let outcome = train(&config, &dir.path().join(method.to_string()), false).outcome.unwrap();
        let number = |key: &str| outcome.summary[key].as_u64().unwrap();
        let (all, step) = (number("bytes_sent"), number("bytes_sent_per_step"));
        let table = outcome.tables[0].to_string();
        assert!(table.contains("sent") && table.contains("a step"), "{table}");
        assert_eq!(outcome.summary["compress"], method.to_string());
        assert_eq!(table.contains("gradients sent as"), method != Method::None, "{table}");
        (all, step)
    };
    let (_, whole) = run(Method::None);
    let config = small(dir.path(), Method::None);
    let corpus = carrousel::infer::task::Corpus::load(&config, None).unwrap();
    let table = carrousel::infer::task::model_config(&config, &corpus.spec()).table();
    for method in METHODS.into_iter().filter(|method| !matches!(method, Method::Topk { .. })) {
        let (all, step) = run(method);
        // Beside the message nine bytes of header.
        let message = Compressor::message_bytes(method, &table) + 9;
        assert_eq!((all, step), (2 * 12 * message, message), "{method}");
        assert!(step < whole, "{method}: {step}, whole {whole}");
    }
}

#[test]
fn a_run_stopped_and_resumed_has_the_bits_of_an_undisturbed_one() {
    for method in METHODS {
        for (name, wrap) in [("alike", None), ("unlike", Some(unlike(nothing)))] {
            let dir = tempfile::tempdir().unwrap();
            let mut config = small(dir.path(), method);
            if matches!(method, Method::Topk { .. }) {
                (config.optimizer.rule, config.optimizer.lr, config.optimizer.momentum) = (Rule::Sgd, 0.3, 0.9);
            }
            let options = |out: &str, resume| RunOptions { out: dir.path().join(out), resume, wrap: wrap.clone() };
            let whole = train_with(&config, options("whole", false), None);
            whole.outcome.unwrap_or_else(|e| panic!("{method}: {e:#}"));
            let first = train_with(&config, options("stopped", false), Some(5));
            assert!(first.outcome.unwrap().interrupted);
            let rest = train_with(&config, options("stopped", true), None);
            assert!(!rest.outcome.unwrap_or_else(|e| panic!("{method}: {e:#}")).interrupted);
            assert_eq!([first.losses, rest.losses].concat(), whole.losses, "{method}, {name}");
            let (stopped, whole) = (run_bits(&dir.path().join("stopped")), run_bits(&dir.path().join("whole")));
            assert!(whole.iter().any(|(name, _)| name.starts_with("compress.residual.2.")) || method == Method::Onebit, "{method}");
            assert_eq!(stopped, whole, "{method}, {name}");
        }
    }
}

#[test]
fn one_worker_sends_nothing_says_so_and_has_the_bits_of_a_run_without() {
    let dir = tempfile::tempdir().unwrap();
    let run = |method: Method| {
        let mut config = small(dir.path(), method);
        (config.optimizer.rule, config.optimizer.lr, config.optimizer.momentum) = (Rule::Sgd, 0.3, 0.9);
        config.devices = "cpu:1".into();
        let out = dir.path().join(method.to_string());
        let ran = train(&config, &out, false);
        ran.outcome.unwrap();
        let is_told = warnings(&ran.events).iter().any(|w| w.contains("does nothing with one worker"));
        assert_eq!(is_told, method != Method::None, "{method}: {:?}", ran.events.first());
        run_bits(&out)
    };
    let without = run(Method::None);
    for method in [Method::Fp16, Method::Topk { ratio: 0.01 }, Method::Powersgd { rank: 2 }] {
        assert_eq!(run(method), without, "{method}");
    }
}

#[test]
fn a_run_goes_on_without_a_lost_device_and_says_what_it_had_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    for method in METHODS {
        let mut config = small(dir.path(), method);
        (config.max_steps, config.batch_size) = (Some(20), 12);
        let out = dir.path().join(method.to_string());
        let options = RunOptions { out: out.clone(), resume: false, wrap: Some(fails_at(1, vec![300])) };
        let ran = train_with(&config, options, None);
        let outcome = ran.outcome.unwrap_or_else(|e| panic!("{method}: {e:#}"));
        assert_eq!(outcome.summary["devices"].as_array().unwrap().len(), 2, "{method}");
        assert!(ran.losses[19] < ran.losses[0], "{method}: {:?}", ran.losses);
        let told = warnings(&ran.events).iter().any(|w| w.contains("is lost") && w.contains("had not sent yet of the lost"));
        assert_eq!(told, method != Method::Onebit, "{method}: {:?}", warnings(&ran.events));
        // What is recorded is that of the two who are left, and goes on with another number of devices.
        (config.max_steps, config.devices) = (Some(24), "cpu:1*4".into());
        let rest = train(&config, &out, true);
        rest.outcome.unwrap_or_else(|e| panic!("{method}, on four: {e:#}"));
        (config.max_steps, config.devices) = (Some(26), "cpu:1".into());
        let alone = train(&config, &out, true);
        alone.outcome.unwrap_or_else(|e| panic!("{method}, alone: {e:#}"));
        let told = warnings(&alone.events).iter().any(|w| w.contains("had not sent yet is left out"));
        assert_eq!(told, method != Method::Onebit, "{method}: {:?}", warnings(&alone.events));
    }
}

#[test]
fn a_method_that_makes_nothing_smaller_is_refused_and_one_that_does_not_suit_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path(), Method::Powersgd { rank: 200 });
    let error = format!("{:#}", train(&config, &dir.path().join("large"), false).outcome.err().unwrap());
    assert!(error.contains("--compress powersgd:200") && error.contains("lower its rank"), "{error}");
    assert!(!dir.path().join("large").exists());
    let ran = train(&small(dir.path(), Method::Powersgd { rank: 2 }), &dir.path().join("adam"), false);
    ran.outcome.unwrap();
    assert!(warnings(&ran.events).iter().any(|w| w.contains("suits --optimizer sgd")), "{:?}", warnings(&ran.events));
}
