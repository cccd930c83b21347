//! Which variants of kernels are launched: measured between steps, kept for the next run, recorded for a resumed one. A software adapter, which has nothing
//! to choose among by itself, is told to choose as hardware does, and a stopwatch says what takes how long.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use carrousel::backend::gpu::{GpuBackend, GpuOptions, Stopwatch, adapters};
use carrousel::backend::tuning::Choices;
use carrousel::backend::{Backend, Span, read_now};
use carrousel::kernels::gemm::{Gemm, Matrix};
use carrousel::kernels::gemm_half::HalfGemm;
use carrousel::kernels::{AdapterClass, Kernel, SizeClass};
use carrousel::observe::{Bus, Event, Level, Sink};
use carrousel::store::config::{RunConfig, Task};
use carrousel::store::{RunFolder, Which};
use carrousel::train::group::{KindChoices, Wrap};
use carrousel::train::run::VARIANTS;
use carrousel::train::tuning::{Autotune, Cache};
use carrousel::train::{RunOptions, run_tuned};
use carrousel::usage::UsageError;

use crate::adapters::{DEADLINE, gpus};
use crate::runs;

/// C `[48, 64]` = A `[48, 32]` B `[32, 64]`.
const PRODUCT: Gemm = Gemm {
    m: 48,
    n: 64,
    k: 32,
    trans_a: 0,
    trans_b: 0,
    accumulate: 0,
    use_bias: 0,
    bias_offset: 0,
    a: Matrix::row_major(0, 32),
    b: Matrix::row_major(0, 64),
    c: Matrix::row_major(0, 64),
};

/// The first adapter as if it were hardware.
fn as_hardware(stopwatch: Option<Stopwatch>) -> Option<GpuBackend> {
    let index = *gpus().first()?;
    let options = GpuOptions { class: Some(AdapterClass::Hardware), stopwatch, cooperative: false };
    Some(GpuBackend::with(index, options).expect("a backend"))
}

/// Says that one variant is twice as fast as any other, and counts how often it is asked.
fn prefers(name: &'static str, asked: &Arc<AtomicUsize>) -> Stopwatch {
    let asked = Arc::clone(asked);
    Box::new(move |_: &SizeClass, variant: &str| {
        asked.fetch_add(1, Ordering::Relaxed);
        if variant == name { 1e-3 } else { 2e-3 }
    })
}

/// Multiplies numbers on the device.
fn product(backend: &mut dyn Backend) -> Vec<f32> {
    let mut numbers = |label: &str, len: usize| -> Span {
        let buffer = backend.alloc(label, len).expect("memory");
        let words: Vec<f32> = (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
        let span = Span { buffer, offset: 0, len };
        backend.write(span, &words).expect("a write");
        span
    };
    let spans = [numbers("a", 48 * 32), numbers("b", 32 * 64), numbers("bias", 4), numbers("c", 48 * 64)];
    backend.launch(&PRODUCT, &spans).expect("a launch");
    let words = read_now(backend, spans[3], DEADLINE).expect("a readback");
    spans.iter().for_each(|span| backend.free(span.buffer));
    words
}

#[test]
fn measuring_picks_the_faster_variant_which_is_launched_from_then_on_to_the_same_bits() {
    let asked = Arc::default();
    let Some(mut backend) = as_hardware(Some(prefers("gemm_tiled", &asked))) else { return };
    assert!(!backend.wants_tuning());
    let (fixed, before) = (backend.variant(&PRODUCT), product(&mut backend));
    assert_eq!(fixed, "gemm_blocked tile_32x64 TRANS_A=0 TRANS_B=0");
    assert!(backend.wants_tuning());
    let choices = backend.tune(Duration::from_secs(2)).expect("a measurement");
    let [choice] = &choices[..] else { panic!("{choices:?}") };
    assert_eq!((choice.class.as_str(), choice.variant.as_str()), ("gemm 48x64x32 NN", "gemm_tiled"));
    assert_eq!((choice.times.len(), asked.load(Ordering::Relaxed)), (5, 5), "{choice:?}");
    assert_eq!(backend.variant(&PRODUCT), "gemm_tiled TRANS_A=0 TRANS_B=0");
    assert!(before.iter().any(|value| value.abs() > 1.0));
    assert_eq!(before, product(&mut backend));
    assert!(!backend.wants_tuning());
    // Of the same class of sizes, but for a hair.
    assert_eq!(backend.variant(&Gemm { m: 45, ..PRODUCT }), "gemm_tiled TRANS_A=0 TRANS_B=0");
    assert_eq!(backend.variant(&Gemm { m: 200, ..PRODUCT }), "gemm_blocked tile_32x64 TRANS_A=0 TRANS_B=0");
}

#[test]
fn a_real_measurement_times_every_variant_and_without_time_all_stays_as_it_is() {
    let Some(mut backend) = as_hardware(None) else { return };
    let fixed = backend.variant(&PRODUCT);
    let before = product(&mut backend);
    let choices = backend.tune(Duration::ZERO).expect("no measurement");
    assert!(!choices[0].is_measured() && fixed.starts_with(&choices[0].variant), "{choices:?}");
    assert_eq!(backend.variant(&PRODUCT), fixed);
    let Some(mut backend) = as_hardware(None) else { return };
    product(&mut backend);
    // As long as even a cold driver takes to compile them.
    let choices = backend.tune(Duration::from_secs(600)).expect("a measurement");
    let [choice] = &choices[..] else { panic!("{choices:?}") };
    assert!(choice.times.len() == 5 && choice.times.iter().all(|(_, seconds)| *seconds > 0.0 && seconds.is_finite()), "{choice:?}");
    let least = choice.times.iter().map(|(_, seconds)| *seconds).fold(f64::INFINITY, f64::min);
    let chosen = choice.times.iter().find(|(name, _)| *name == choice.variant).expect("among the candidates").1;
    assert!(chosen <= least / (1.0 - carrousel::backend::tuning::MARGIN), "{choice:?}");
    assert_eq!(before, product(&mut backend));
}

#[test]
fn a_software_adapter_has_one_fixed_choice_and_measures_nothing() {
    for index in gpus() {
        let mut backend = GpuBackend::new(index).expect("a backend");
        if !backend.info().is_software {
            continue;
        }
        product(&mut backend);
        assert!(!backend.wants_tuning() && backend.tune(Duration::from_secs(2)).expect("nothing to do").is_empty());
        backend.choose(&Choices::from([("gemm 48x64x32 NN".to_owned(), "gemm_tiled".to_owned())]));
        assert_eq!(backend.variant(&PRODUCT), "gemm_direct TRANS_A=0 TRANS_B=0");
    }
}

#[test]
fn every_launch_that_has_candidates_has_a_trial_of_its_own_size_class() {
    for entry in carrousel::kernels::ALL {
        for case in (entry.cases)().iter().chain(&(entry.bench_cases)()) {
            let Some(class) = case.kernel.size_class() else {
                assert_eq!(case.kernel.candidates(AdapterClass::Hardware).len(), 1, "{}: nobody can choose", entry.name);
                continue;
            };
            let trial = case.kernel.trial().unwrap_or_else(|| panic!("{class} cannot be measured"));
            let names = |kernel: &dyn Kernel| -> Vec<String> {
                kernel.candidates(AdapterClass::Hardware).iter().map(|c| format!("{} {:?}", c.shader.variant(), c.overrides)).collect()
            };
            assert_eq!(trial.kernel.size_class(), Some(class));
            assert_eq!(names(&*trial.kernel), names(&*case.kernel), "{class}");
            assert_eq!(trial.kernel.check(&trial.lens), Ok(()), "{class}");
        }
    }
}

#[test]
fn a_kernel_that_an_adapter_cannot_run_is_not_offered_there_and_says_what_it_needs() {
    for adapter in adapters::list().expect("a list").iter().filter(|adapter| gpus().contains(&adapter.index)) {
        let has = |feature: &str| adapter.features.iter().any(|known| known == feature);
        let mut backend = GpuBackend::new(adapter.index).expect("a backend");
        for (cooperative, needed) in [(false, has("shader-f16")), (true, false)] {
            // Without being asked for cooperative matrices, a device never has them.
            let kernel = HalfGemm { gemm: PRODUCT, cooperative };
            assert_eq!(backend.offers(&kernel), needed, "gpu:{} {cooperative}", adapter.index);
            let spans = [48 * 32, 32 * 64, 4, 48 * 64].map(|len| {
                let buffer = backend.alloc("operand", len).expect("memory");
                backend.whole(buffer)
            });
            let launched = backend.launch(&kernel, &spans);
            match launched {
                Ok(()) => assert!(needed),
                Err(error) => {
                    let what = if cooperative { "cooperative matrices" } else { "half floats" };
                    assert!(!needed && error.is::<UsageError>() && format!("{error:#}").contains(what), "{error:#}");
                }
            }
        }
        assert!(backend.offers(&PRODUCT));
    }
}

/// Keeps what is told, and stops after a step.
struct Keep(Arc<Mutex<Vec<String>>>, Option<(u64, Arc<AtomicBool>)>);

impl Sink for Keep {
    fn name(&self) -> String {
        "test".into()
    }
    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        self.0.lock().unwrap().push(format!("{event:?}"));
        if let (Event::Step { step, .. }, Some((last, stop))) = (event, &self.1) {
            stop.store(step >= last, Ordering::Relaxed);
        }
        Ok(())
    }
    fn log(&mut self, level: Level, text: &str) -> anyhow::Result<()> {
        self.0.lock().unwrap().push(format!("{level:?}: {text}"));
        Ok(())
    }
}

/// Trains on the first adapter as if it were hardware. What was told, and how often a stopwatch was asked.
fn train(
    config: &RunConfig,
    out: &Path,
    resume: bool,
    cache: &Cache,
    fastest: &'static str,
    stop_after: Option<u64>,
) -> (Vec<String>, usize) {
    let asked: Arc<AtomicUsize> = Arc::default();
    let of_wrap = Arc::clone(&asked);
    let wrap: Wrap = Arc::new(move |_, _| Box::new(as_hardware(Some(prefers(fastest, &of_wrap))).expect("an adapter")));
    let (events, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
    let stop_after = stop_after.map(|step| (step, Arc::clone(&stop)));
    let mut bus = Bus::new(vec![Box::new(Keep(Arc::clone(&events), stop_after))]);
    let options = RunOptions { out: out.to_owned(), resume, wrap: Some(wrap) };
    let autotune = |is_on| Autotune::new(is_on, Some(cache.clone()));
    run_tuned(config.clone(), options, &autotune, &mut bus, &stop).unwrap_or_else(|e| panic!("{e:#}"));
    drop(bus);
    let events = std::mem::take(&mut *events.lock().unwrap());
    (events, asked.load(Ordering::Relaxed))
}

fn recorded(out: &Path) -> KindChoices {
    std::fs::read(out.join(VARIANTS)).map_or_else(|_| KindChoices::new(), |bytes| serde_json::from_slice(&bytes).unwrap())
}

fn parameters(out: &Path) -> Vec<(String, Vec<f32>)> {
    let tensors = RunFolder::read(out).unwrap().load(Which::Last).unwrap().tensors;
    tensors.into_iter().map(|tensor| (tensor.name, tensor.data)).collect()
}

#[test]
fn a_run_measures_once_keeps_it_for_the_next_one_and_a_resumed_run_launches_what_was_recorded() {
    if gpus().is_empty() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.txt");
    std::fs::write(&file, runs::text(2000)).unwrap();
    let mut config = runs::config(Task::Lm, &[&file]);
    (config.devices, config.max_steps, config.checkpoint_every) = (format!("gpu:{}", gpus()[0]), Some(4), 2);
    let out = |name: &str| dir.path().join(name);
    let [cache, other] = ["cache", "other"].map(|name| Cache::at(out(name)));

    let (events, n_asked) = train(&config, &out("first"), false, &cache, "gemm_tiled", None);
    assert!(n_asked > 0);
    let all = recorded(&out("first"));
    let of_kind: Vec<(&String, &String)> = all.values().flatten().filter(|(class, _)| class.starts_with("gemm ")).collect();
    assert!(all.len() == 1 && of_kind.len() >= 4 && of_kind.iter().all(|(_, variant)| *variant == "gemm_tiled"), "{all:?}");
    // Nobody said that a whole sweep is faster.
    assert_eq!(
        all.values().flatten().filter(|(class, variant)| class.starts_with("lstm_sweep ") && *variant == "steps").count(),
        2,
        "{all:?}"
    );
    let told = events.iter().filter(|text| text.starts_with("Detail: gpu:") && text.contains(" as gemm_tiled, 1000 us (")).count();
    assert_eq!(told, of_kind.len(), "each is told once");

    // The cache is read: nobody is asked again, also where another would be faster now.
    let (_, n_asked) = train(&config, &out("second"), false, &cache, "gemm_blocked tile_32x64", None);
    assert_eq!((n_asked, recorded(&out("second"))), (0, all.clone()));
    // Variants change no bit.
    let (_, n_asked) = train(&config, &out("third"), false, &other, "gemm_blocked tile_32x64", None);
    assert!(n_asked > 0 && recorded(&out("third")) != all);
    assert_eq!(parameters(&out("first")), parameters(&out("third")));

    // Stopped, and resumed where nothing is in the cache and another variant would be faster.
    let nothing = Cache::at(out("nothing"));
    train(&config, &out("stopped"), false, &nothing, "gemm_tiled", Some(2));
    let of_stopped = recorded(&out("stopped"));
    assert!(!of_stopped.is_empty());
    let empty = Cache::at(out("empty"));
    train(&config, &out("stopped"), true, &empty, "gemm_blocked tile_32x64", None);
    let now = recorded(&out("stopped"));
    let kept = |(kind, of_kind): (&String, &Choices)| of_kind.iter().all(|(class, variant)| now[kind].get(class) == Some(variant));
    assert!(of_stopped.iter().all(kept), "{of_stopped:?} became {now:?}");
    assert_eq!(parameters(&out("stopped")), parameters(&out("first")));

    // A damaged file is told and left alone; without measuring nothing is read, chosen or written.
    let kept = std::fs::read_dir(cache.folder()).unwrap().map(|entry| entry.unwrap().path());
    let path = kept.into_iter().find(|path| path.extension().is_some_and(|e| e == "json")).unwrap();
    std::fs::write(&path, "{").unwrap();
    config.no_autotune = true;
    let (events, n_asked) = train(&config, &out("fixed"), false, &cache, "gemm_tiled", None);
    assert_eq!((n_asked, recorded(&out("fixed")), std::fs::read_to_string(&path).unwrap()), (0, KindChoices::new(), "{".to_owned()));
    assert!(!events.iter().any(|text| text.starts_with("Warning")), "{events:?}");
    config.no_autotune = false;
    let (events, n_asked) = train(&config, &out("damaged"), false, &cache, "gemm_tiled", None);
    let warned = events.iter().any(|text| text.starts_with("Warning") && text.contains("damaged"));
    assert!(warned && n_asked > 0 && recorded(&out("damaged")) == all, "{events:?}");
    assert_eq!(parameters(&out("fixed")), parameters(&out("first")));
}
