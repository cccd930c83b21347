//! Update rules over several steps on every device against `torch.optim`'s rules in f64; clipping and schedules against their formulas.

use carrousel::backend::{Backend, Span, read_now};
use carrousel::optim::schedule::{Plateau, Schedule, ScheduleConfig, ScheduleKind};
use carrousel::optim::{BETAS, EPS, OptimizerConfig, RMSPROP_ALPHA, Rule};
use carrousel::rng::{Purpose, StepKey, Stream};

use crate::adapters::{DEADLINE, devices};

/// Neither a multiple of a vector nor of a workgroup.
const LEN: usize = 1037;
const N_STEPS: u64 = 7;

/// Plain gradient descent; tests change what they are about.
fn config(rule: Rule) -> OptimizerConfig {
    OptimizerConfig { rule, lr: 0.02, momentum: 0.0, nesterov: false, weight_decay: 0.0, l1: 0.0, clip_norm: 0.0, clip_value: 0.0 }
}

/// Every rule with every number that changes it.
fn configs() -> Vec<OptimizerConfig> {
    let momentum = |rule, nesterov| OptimizerConfig { momentum: 0.9, nesterov, ..config(rule) };
    let plain = [
        config(Rule::Sgd),
        momentum(Rule::Sgd, false),
        momentum(Rule::Sgd, true),
        config(Rule::Rmsprop),
        momentum(Rule::Rmsprop, false),
        config(Rule::Adam),
        config(Rule::Adamw),
    ];
    plain
        .into_iter()
        .flat_map(|c| {
            [
                c,
                OptimizerConfig { weight_decay: 0.1, ..c },
                OptimizerConfig { l1: 0.05, ..c },
                OptimizerConfig { clip_value: 0.3, ..c },
                OptimizerConfig { weight_decay: 0.2, l1: 0.01, clip_value: 0.5, ..c },
            ]
        })
        .collect()
}

/// One parameter with torch's state, element by element.
#[derive(Clone, Default)]
struct Element {
    p: f64,
    /// SGD's and RMSprop's momentum buffer, Adam's first moment.
    first: Option<f64>,
    second: f64,
}

/// One step of `torch.optim`'s rule, with L1 as one more gradient and after `clip_grad_value_`.
fn torch_step(c: &OptimizerConfig, e: &mut Element, grad: f64, step: u64, lr: f64) {
    let clipped = if c.clip_value > 0.0 { grad.clamp(-c.clip_value, c.clip_value) } else { grad };
    let sign = if e.p == 0.0 { 0.0 } else { e.p.signum() };
    let mut g = clipped + c.l1 * sign;
    if c.rule != Rule::Adamw {
        g += c.weight_decay * e.p;
    }
    match c.rule {
        Rule::Sgd if c.momentum == 0.0 => e.p -= lr * g,
        Rule::Sgd => {
            // torch starts the buffer with the first gradient.
            let buffer = e.first.map_or(g, |buffer| c.momentum * buffer + g);
            e.first = Some(buffer);
            e.p -= lr * if c.nesterov { g + c.momentum * buffer } else { buffer };
        }
        Rule::Rmsprop => {
            e.second = RMSPROP_ALPHA * e.second + (1.0 - RMSPROP_ALPHA) * g * g;
            let mut d = g / (e.second.sqrt() + EPS);
            if c.momentum > 0.0 {
                d += c.momentum * e.first.unwrap_or(0.0);
                e.first = Some(d);
            }
            e.p -= lr * d;
        }
        Rule::Adam | Rule::Adamw => {
            if c.rule == Rule::Adamw {
                e.p -= lr * c.weight_decay * e.p;
            }
            let (b1, b2) = BETAS;
            let first = b1 * e.first.unwrap_or(0.0) + (1.0 - b1) * g;
            e.first = Some(first);
            e.second = b2 * e.second + (1.0 - b2) * g * g;
            let corrected = [first / (1.0 - b1.powf(step as f64)), e.second / (1.0 - b2.powf(step as f64))];
            e.p -= lr * corrected[0] / (corrected[1].sqrt() + EPS);
        }
    }
}

fn draw(tensor: u32, size: f32) -> Vec<f32> {
    let mut stream = Stream::new(StepKey::new(3, 0), Purpose::Test, tensor, 0);
    (0..LEN).map(|_| (2.0 * stream.uniform() - 1.0) * size).collect()
}

fn upload(backend: &mut dyn Backend, values: &[f32]) -> Span {
    let buffer = backend.alloc("a tensor", values.len().next_multiple_of(64)).expect("memory");
    let span = backend.whole(buffer).part(0, values.len());
    backend.write(span, values).expect("an upload");
    span
}

/// The rate of a step: it changes, as schedules have it.
fn rate(c: &OptimizerConfig, step: u64) -> f64 {
    c.lr * (1.0 - 0.1 * (step - 1) as f64)
}

#[test]
fn every_rule_takes_torch_s_steps_on_every_device() {
    // As when the norm is clipped to a part of what it was.
    const GRAD_SCALE: f64 = 0.75;
    let mut start = draw(0, 1.0);
    // Exact zeros, which have no sign, and parameters without a gradient.
    start[..5].fill(0.0);
    let gradients: Vec<Vec<f32>> = (1..=N_STEPS).map(|step| draw(step as u32, 1.0)).collect();
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let mut worst = 0.0f64;
        for c in configs() {
            let param = upload(backend, &start);
            let states = [0; 2].map(|_| upload(backend, &[0.0; LEN]));
            let mut elements: Vec<Element> = start.iter().map(|&p| Element { p: f64::from(p), ..Element::default() }).collect();
            for (step, gradient) in (1..).zip(&gradients) {
                let grad = upload(backend, gradient);
                c.update(backend, param, grad, states, step, rate(&c, step), GRAD_SCALE).expect("an update");
                backend.free(grad.buffer);
                for (e, &g) in elements.iter_mut().zip(gradient) {
                    torch_step(&c, e, f64::from(g) * GRAD_SCALE, step, rate(&c, step));
                }
            }
            let got = read_now(backend, param, DEADLINE).expect("parameters");
            for (i, (e, &got)) in elements.iter().zip(&got).enumerate() {
                let error = (e.p - f64::from(got)).abs();
                // Each step rounds the parameter, and its own length by a few units.
                let allowed = N_STEPS as f64 * 1e-7 * (1.0 + e.p.abs());
                assert!(error <= allowed, "{device}, {c:?}, element {i}: torch's rule gives {}, got {got}, {error:.2e} off", e.p);
                worst = worst.max(error / allowed);
            }
            [param, states[0], states[1]].into_iter().for_each(|span| backend.free(span.buffer));
        }
        println!("[optim] {device}: largest error {worst:.2} of what is allowed");
    }
}

#[test]
fn adam_s_first_step_has_the_length_of_the_rate_to_a_millionth() {
    // The first step is lr * sign(g) whatever the gradient: an error in a decay or its correction shows at once.
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let param = upload(backend, &[0.0; 4]);
        let grad = upload(backend, &[3.0, -0.2, 1e-3, 0.0]);
        let states = [0; 2].map(|_| upload(backend, &[0.0; 4]));
        config(Rule::Adam).update(backend, param, grad, states, 1, 0.5, 1.0).expect("an update");
        let got = read_now(backend, param, DEADLINE).expect("parameters");
        for (got, want) in got.iter().zip([-0.5, 0.5, -0.5 / (1.0 + 1e-5), 0.0]) {
            assert!((f64::from(*got) - want).abs() <= 1e-6 * 0.5, "{device}: {got} and not {want}");
        }
    }
}

#[test]
fn padding_that_is_zero_stays_zero_under_every_rule() {
    let mut backend = crate::adapters::Device::Cpu(1).open();
    let backend = backend.as_mut();
    for c in configs() {
        let spans = [0; 4].map(|_| upload(backend, &[0.0; 64]));
        for step in 1..=3 {
            c.update(backend, spans[0], spans[1], [spans[2], spans[3]], step, c.lr, 0.5).expect("an update");
        }
        for span in spans {
            let words = read_now(backend, span, DEADLINE).expect("words");
            assert!(words.iter().all(|&w| w == 0.0), "{c:?}: {words:?}");
        }
    }
}

#[test]
fn rules_without_a_state_leave_the_spans_in_its_place_alone() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for rule in [Rule::Sgd, Rule::Rmsprop] {
            let c = config(rule);
            let n_missing = 2 - c.states().len();
            let [param, grad] = [1, 2].map(|i| upload(backend, &draw(i, 1.0)));
            let marker = vec![42.0; LEN];
            let states = [upload(backend, &marker), upload(backend, if n_missing == 2 { &marker } else { &[0.0; LEN] })];
            c.update(backend, param, grad, states, 1, c.lr, 1.0).expect("an update");
            for state in &states[..n_missing] {
                assert_eq!(read_now(backend, *state, DEADLINE).expect("a state"), marker, "{device}, {rule:?}");
            }
        }
    }
}

#[test]
fn the_norm_is_clipped_as_torch_clips_it() {
    let c = OptimizerConfig { clip_norm: 0.25, ..config(Rule::Sgd) };
    for norm in [0.0, 0.1, 0.2499, 0.25, 0.5, 1e6] {
        let torch = (0.25f64 / (norm + 1e-6)).min(1.0);
        assert!((c.clip_factor(norm) - torch).abs() < 1e-12, "{norm}");
    }
    assert_eq!(config(Rule::Sgd).clip_factor(1e9), 1.0);
}

fn schedule(kind: ScheduleKind, warmup_steps: u64, horizon: u64) -> Schedule {
    ScheduleConfig { kind, warmup_steps, lr_decay: None, decay_after: None, decay_every: None, patience: 2 }.over(10, Some(horizon))
}

#[test]
fn decays_come_when_they_are_asked_for() {
    let none = Plateau::default();
    // Four epochs at the full rate, then halved before each.
    let config = ScheduleConfig {
        kind: ScheduleKind::Step,
        warmup_steps: 0,
        lr_decay: Some(0.5),
        decay_after: Some(4.0),
        decay_every: Some(1.0),
        patience: 2,
    };
    let halved = config.over(10, Some(130));
    for step in 0..130 {
        let epoch = i32::try_from(step / 10).unwrap();
        assert!((halved.factor(step, &none) - 0.5f64.powi((epoch - 3).max(0))).abs() < 1e-12, "{step}");
    }
    // 5 % less each epoch, without an end.
    let config = ScheduleConfig { kind: ScheduleKind::Exponential, lr_decay: Some(0.95), decay_after: None, ..config };
    let falling = config.over(10, None);
    assert!((falling.factor(35, &none) - 0.95f64.powf(3.5)).abs() < 1e-12);
    let mut plateau = Plateau::default();
    let stalling = ScheduleConfig { kind: ScheduleKind::Plateau, lr_decay: Some(0.25), patience: 1, ..config }.over(10, None);
    let factors = [3.0, 2.0, 2.5, 1.9, 1.95].map(|loss| {
        plateau.observe(loss, &stalling);
        stalling.factor(7, &plateau)
    });
    assert_eq!(factors, [1.0, 1.0, 0.25, 0.25, 0.0625]);
}

#[test]
fn schedules_follow_their_formulas_between_their_ends() {
    let none = Plateau::default();
    let at = |kind, step| schedule(kind, 20, 220).factor(step, &none);
    for step in 0..20 {
        let warm = (step + 1) as f64 / 20.0;
        for kind in [ScheduleKind::Constant, ScheduleKind::Step, ScheduleKind::Exponential, ScheduleKind::Cosine, ScheduleKind::Plateau] {
            assert!((at(kind, step) - warm).abs() < 1e-12, "{kind:?} at {step}");
        }
    }
    for step in 20..220 {
        let done = (step - 20) as f64 / 200.0;
        assert_eq!(at(ScheduleKind::Constant, step), 1.0);
        assert!((at(ScheduleKind::Cosine, step) - (std::f64::consts::FRAC_PI_2 * done).cos().powi(2)).abs() < 1e-12);
        assert!((at(ScheduleKind::Exponential, step) - (-done * 100f64.ln()).exp()).abs() < 1e-12);
        let n_cuts = [120, 170].iter().filter(|&&cut| step >= cut).count() as i32;
        assert!((at(ScheduleKind::Step, step) - 10f64.powi(-n_cuts)).abs() < 1e-12, "{step}");
    }
    // What a longer run finds behind the horizon.
    for (kind, end) in
        [(ScheduleKind::Constant, 1.0), (ScheduleKind::Step, 0.01), (ScheduleKind::Exponential, 0.01), (ScheduleKind::Cosine, 0.0)]
    {
        assert!((at(kind, 220) - end).abs() < 1e-12 && (at(kind, 1000) - end).abs() < 1e-12, "{kind:?}");
    }
    // A horizon within the warm-up, or none at all, still gives rates that exist.
    for (warmup_steps, horizon) in [(0, 0), (10, 5), (0, 1)] {
        for kind in [ScheduleKind::Constant, ScheduleKind::Step, ScheduleKind::Exponential, ScheduleKind::Cosine] {
            let schedule = schedule(kind, warmup_steps, horizon);
            assert!((0..30).all(|step| (0.0..=1.0).contains(&schedule.factor(step, &none))), "{schedule:?}");
        }
    }
}

#[test]
fn a_plateau_is_left_only_by_a_real_improvement_and_halves_again_and_again() {
    let mut plateau = Plateau::default();
    let mut factors = Vec::new();
    for loss in [1.0, 0.9, 0.8999, 0.8998, 0.8997, 0.8996, 0.5, f64::NAN, 0.6, 0.7, 0.8] {
        plateau.observe(loss, &schedule(ScheduleKind::Plateau, 0, 100));
        factors.push(plateau.factor);
    }
    assert_eq!(factors, [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.0625]);
}
