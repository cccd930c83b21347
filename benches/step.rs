//! One training step, forward to update, through a group of workers as a run makes it.

use std::sync::Arc;
use std::time::Duration;

use carrousel::comm::Tap;
use carrousel::compress::Method;
use carrousel::data::Batch;
use carrousel::model::config::Input;
use carrousel::model::init::{Init, initial};
use carrousel::model::state::Carried;
use carrousel::rng::StepKey;
use carrousel::train::group::{Group, GroupSpec, Safety, StepNumbers, Stepped};
use carrousel::train::profile::Workload;
use carrousel::train::ring::RingTimes;
use carrousel::train::run::settle;
use criterion::{BenchmarkId, Criterion, Throughput};

/// The workloads of `carrousel profile step` with their T and B cut down: the sizes of the kernels stay, the steps become few.
const WORKLOADS: [(&str, &str, usize, usize); 4] =
    [("A", "series", 48, 16), ("B", "char-lm", 20, 10), ("C", "ptb-small", 10, 20), ("D", "large", 4, 8)];
/// By how much the loss of the first step may differ between devices, relatively.
const TOLERANCE: f64 = 1e-4;

/// A group of workers in the middle of its training.
pub struct Training {
    group: Group,
    batch: Arc<Batch>,
    shares: Vec<std::ops::Range<usize>>,
    carried: Option<Carried>,
    lr: f64,
    step: u64,
}

impl Training {
    pub fn start(workload: &Workload, devices: &str) -> Self {
        Self::linked(workload, devices, None)
    }

    /// With links that a tap makes slow.
    fn linked(workload: &Workload, devices: &str, tap: Option<Tap>) -> Self {
        let (devices, balance, _) = settle(devices, "equal").expect("devices that exist");
        let spec = GroupSpec {
            model: workload.model.clone(),
            optimizer: workload.optimizer,
            accumulate: 1,
            compress: Method::None,
            shard_optimizer: false,
        };
        let safety = Safety { tap, ..Safety::default() };
        let mut group = Group::start_safe(spec, &devices, safety, None).expect("workers that start");
        let model = &workload.model;
        let params = initial(model, group.table(), Init::Uniform(0.1), None, 1);
        let zeros: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
        group.load(params, vec![zeros; workload.optimizer.states().len()]).expect("parameters that fit");
        let batch = Arc::new(workload.batch(1));
        let carried = workload.carries.then(|| Carried::new(model, batch.n_rows));
        let shares = balance.shares(batch.n_rows);
        Self { group, batch, shares, carried, lr: workload.optimizer.lr, step: 0 }
    }

    /// Trains one step; returns the mean loss before it.
    pub fn step(&mut self) -> f64 {
        let divisor = self.batch.weight;
        self.stepped().loss / divisor
    }

    fn stepped(&mut self) -> Stepped {
        self.step += 1;
        let divisor = self.batch.weight;
        let numbers = StepNumbers { step: self.step, lr: self.lr, key: StepKey::new(1, self.step), divisor };
        self.group.step(&self.batch, &self.shares, self.carried.as_mut(), numbers).expect("a step")
    }
}

/// The workload at bench size.
fn workload(name: &str, n_steps: usize, n_rows: usize) -> Workload {
    let mut workload = Workload::named(name).expect("a workload of this name");
    (workload.n_steps, workload.n_rows) = (n_steps, n_rows);
    if crate::is_small() {
        let model = &mut workload.model;
        (workload.n_steps, workload.n_rows, model.hidden) = (4, 6, 32.into());
        if let Input::Tokens { width, .. } = &mut model.input {
            *width = 16;
        }
    }
    workload
}

/// Two workers on links of their own memory's speed and of 1 GB/s: how long a step takes, and after the samples how much of the ring's time the step had to
/// wait for; the rest was hidden behind the backward pass.
fn overlap(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step/overlap");
    for (name, label, n_steps, n_rows) in WORKLOADS {
        let workload = workload(name, n_steps, n_rows);
        for (link, tap) in [("memory", None), ("1 GB/s", Some(Tap::slowed(1e9)))] {
            let mut training: Option<Training> = None;
            let (mut ring, mut n) = (RingTimes::default(), 0);
            group.bench_function(BenchmarkId::new(label, link), |bencher| {
                let training = training.get_or_insert_with(|| {
                    let mut training = Training::linked(&workload, "cpu:1*2", tap.clone());
                    let want = Training::start(&workload, "cpu:1").step();
                    let loss = training.step();
                    assert!((loss - want).abs() <= TOLERANCE * want.abs(), "{label}: the loss is {loss}, on one worker {want}");
                    training
                });
                bencher.iter(|| {
                    let stepped = training.stepped();
                    stepped.ranks.iter().for_each(|rank| ring += rank.ring);
                    n += stepped.ranks.len() as u32;
                });
            });
            if n > 0 {
                let ms = |time: Duration| 1e3 * time.as_secs_f64() / f64::from(n);
                println!(
                    "{label}, {link}: {:.2} ms in the ring, {:.2} ms of waiting for it ({:.2}), of which {:.2} could not be avoided ({:.2} times that)",
                    ms(ring.total),
                    ms(ring.waited),
                    ring.waited.as_secs_f64() / ring.total.as_secs_f64().max(1e-12),
                    ms(ring.unavoidable),
                    ring.waited.as_secs_f64() / ring.unavoidable.as_secs_f64().max(1e-12)
                );
            }
        }
    }
    group.finish();
}

/// Measures a step of each workload on each list of devices.
pub fn bench(criterion: &mut Criterion) {
    let mut lists = vec!["cpu:1".to_owned(), "cpu:2".to_owned(), "cpu:1*2".to_owned()];
    lists.extend(crate::gpus().iter().flat_map(|index| [format!("gpu:{index}"), format!("gpu:{index},cpu:1")]));
    let mut group = criterion.benchmark_group("step");
    for (name, label, n_steps, n_rows) in WORKLOADS {
        let workload = workload(name, n_steps, n_rows);
        group.throughput(Throughput::Elements((workload.n_steps * workload.n_rows) as u64));
        let mut want: Option<f64> = None;
        for devices in &lists {
            let mut training: Option<Training> = None;
            group.bench_function(BenchmarkId::new(label, devices), |bencher| {
                let training = training.get_or_insert_with(|| {
                    let mut training = Training::start(&workload, devices);
                    let loss = training.step();
                    assert!(loss.is_finite(), "{label}: the loss on {devices} is {loss}");
                    let want =
                        *want.get_or_insert_with(|| if devices == "cpu:1" { loss } else { Training::start(&workload, "cpu:1").step() });
                    assert!((loss - want).abs() <= TOLERANCE * want.abs(), "{label}: the loss on {devices} is {loss}, on cpu:1 {want}");
                    training
                });
                bencher.iter(|| training.step());
            });
        }
    }
    group.finish();
    overlap(criterion);
}
