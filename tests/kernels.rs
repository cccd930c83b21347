//! Every kernel of the catalogue, every case, every device, judged by the oracle; and what the catalogue itself must keep to.

use carrousel::backend::Backend;
use carrousel::kernels::{ALL, Access, AdapterClass, As, Case, Dispatch, Entry, Fill, Kernel, MAX_WORKGROUPS, Operand, Sizes};
use carrousel::pool::{CpuContext, Isa};

use crate::adapters::{Device, devices};
use crate::compare::{Outcome, Source, What, compare, compare_words, is_kept, unchanged};
use crate::memory::{Guarded, POISON_WORD, floats, words_of};
use crate::oracle::{self, Want};

/// The launches with which a device must run a kernel: on a GPU all that adapters of either class may choose; any one on a CPU.
fn launches(device: Device, kernel: &dyn Kernel) -> Vec<Dispatch> {
    if let Device::Cpu(_) = device {
        return vec![kernel.dispatch(AdapterClass::Hardware)];
    }
    let mut launches = kernel.candidates(AdapterClass::Software);
    for candidate in kernel.candidates(AdapterClass::Hardware) {
        if !launches.contains(&candidate) {
            launches.push(candidate);
        }
    }
    launches
}

/// Launches a kernel and gives back each operand's words.
fn launch(
    backend: &mut dyn Backend,
    device: Device,
    kernel: &dyn Kernel,
    inputs: &[Vec<u32>],
    what: &What<'_>,
) -> Result<Vec<Vec<u32>>, String> {
    let bindings = kernel.bindings();
    let operands: Vec<Guarded> =
        bindings.iter().zip(inputs).map(|(binding, words)| Guarded::upload(backend, binding.name, words)).collect();
    let spans: Vec<_> = operands.iter().map(|operand| operand.span).collect();
    backend.launch(kernel, &spans).map_err(|e| format!("{what}: launch on {device}: {e:#}"))?;
    let results = bindings
        .iter()
        .zip(&operands)
        .map(|(binding, operand)| operand.download(backend, device, &What { operand: binding.name, ..*what }));
    let results: Result<Vec<_>, _> = results.collect();
    operands.into_iter().for_each(|operand| operand.free(backend));
    results
}

/// Judges what one device left in the operands. Returns how many elements were compared.
fn judge_device(
    entry: &Entry,
    case: &Case,
    what: &What<'_>,
    wants: &[Want],
    inputs: &[Vec<u32>],
    device: Device,
    results: &[Vec<u32>],
) -> Result<usize, String> {
    let mut n_compared = 0;
    for (((binding, want), before), after) in case.kernel.bindings().iter().zip(wants).zip(inputs).zip(results) {
        let what = What { operand: binding.name, ..*what };
        n_compared += match want {
            Want::Unchanged => unchanged(&what, device, before, after, |_| true).map(|()| 0)?,
            Want::Floats(values) => {
                unchanged(&what, device, before, after, |i| is_kept(values[i]))?;
                let want = Outcome::new(Source::Oracle, values.clone());
                compare(&what, &want, &Outcome::new(Source::Device(device), floats(after.clone())), &entry.tolerance)?
            }
            Want::Words(words) => {
                let want = Outcome::new(Source::Oracle, words.clone());
                compare_words(&what, &want, &Outcome::new(Source::Device(device), after.clone()))?
            }
        };
    }
    Ok(n_compared)
}

/// CPU against GPU, by the same tolerance.
fn judge_pair(
    entry: &Entry,
    case: &Case,
    what: &What<'_>,
    wants: &[Want],
    a: &Outcome<Vec<Vec<u32>>>,
    b: &Outcome<Vec<Vec<u32>>>,
) -> Result<(), String> {
    for (((binding, want), x), y) in case.kernel.bindings().iter().zip(wants).zip(&a.values).zip(&b.values) {
        if let Want::Floats(values) = want {
            let written = |words: &[u32]| -> Vec<f32> {
                words.iter().zip(values).filter(|(_, want)| !is_kept(**want)).map(|(word, _)| f32::from_bits(*word)).collect()
            };
            let (x, y) = (written(x), written(y));
            if !x.is_empty() {
                let what = What { operand: binding.name, ..*what };
                compare(&what, &Outcome::new(a.source, x), &Outcome::new(b.source, y), &entry.tolerance)?;
            }
        }
    }
    Ok(())
}

/// All cases of one kernel on all devices.
fn judge(name: &str) {
    let entry = ALL.iter().find(|entry| entry.name == name).unwrap_or_else(|| panic!("{name} is not in the catalogue"));
    let mut backends: Vec<(Device, Box<dyn Backend>)> = devices().into_iter().map(|device| (device, device.open())).collect();
    let mut faults = Vec::new();
    for (idx, case) in (entry.cases)().iter().enumerate() {
        let seed = 1000 + idx as u64;
        let what = What { kernel: name, case: &case.label, seed, operand: "" };
        let inputs: Vec<Vec<u32>> = case.operands.iter().enumerate().map(|(i, operand)| words_of(operand, seed, i)).collect();
        let wants = oracle::judge(name, case.kernel.params(), &inputs).unwrap_or_else(|| panic!("{name} has no oracle"));
        let mut first: Option<Outcome<Vec<Vec<u32>>>> = None;
        for (device, backend) in &mut backends {
            let runs = launches(*device, &*case.kernel);
            let judged = runs.into_iter().try_for_each(|dispatch| {
                let kernel = As { kernel: &*case.kernel, dispatch };
                if !backend.offers(&kernel) {
                    return Ok(());
                }
                let shader = dispatch.shader.variant();
                let label = format!("{} as {shader}", case.label);
                let what = What { case: &label, ..what };
                let results = launch(&mut **backend, *device, &kernel, &inputs, &what)?;
                if judge_device(entry, case, &what, &wants, &inputs, *device, &results)? == 0 {
                    return Err(format!("{what}: nothing was compared on {device}"));
                }
                let results = Outcome::new(Source::Device(*device), results);
                match &first {
                    None => first = Some(results),
                    Some(first) => judge_pair(entry, case, &what, &wants, first, &results)?,
                }
                Ok(())
            });
            faults.extend(judged.err());
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

/// One test a kernel, so that they run beside each other; another test compares the list with the catalogue.
macro_rules! judged {
    ($($name:ident)*) => {
        mod judged {
            $(#[test] fn $name() { super::judge(stringify!($name)); })*
        }
        const JUDGED: &[&str] = &[$(stringify!($name)),*];
    };
}

judged! {
    embedding_gather dropout gemm weight_drop lstm_norm_input lstm_step_forward lstm_norm_forward lstm_project lstm_sweep_forward pool_steps softmax_cross_entropy binary_cross_entropy squared_error quantile_loss pool_steps_gradient lstm_state_gradient lstm_step_backward lstm_norm_backward lstm_sweep_backward column_sums
    embedding_gradient sum block_squares non_finite scale sgd rmsprop adam multiply_add gemm_half
}

#[test]
fn every_kernel_of_the_catalogue_is_judged() {
    assert_eq!(JUDGED, ALL.iter().map(|entry| entry.name).collect::<Vec<_>>());
}

/// What a case leaves in its operands when the CPU uses one instruction set.
fn run_with(isa: Isa, case: &Case, inputs: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut ctx = CpuContext::new(1).expect("a context of one thread");
    ctx.isa = isa;
    let mut words = inputs.to_vec();
    let bound = case.kernel.bindings().iter().zip(&mut words).map(|(binding, words)| match binding.access {
        Access::Read => Operand::Read(bytemuck::cast_slice(words)),
        Access::ReadWrite => Operand::ReadWrite(bytemuck::cast_slice_mut(words)),
    });
    case.kernel.run(&mut ctx, &mut bound.collect::<Vec<_>>());
    words
}

#[test]
fn every_instruction_set_gives_the_same_bits_but_for_what_is_fused() {
    // Products and activations fuse multiplication and addition where the processor can; each set is judged against the oracle instead.
    let fuses = |name: &str| {
        let products = [
            "gemm",
            "gemm_half",
            "lstm_step_forward",
            "lstm_step_backward",
            "lstm_project",
            "lstm_state_gradient",
            "lstm_sweep_forward",
            "lstm_sweep_backward",
        ];
        let activations = ["lstm_norm_forward", "lstm_norm_backward", "softmax_cross_entropy", "binary_cross_entropy"];
        products.contains(&name) || activations.contains(&name)
    };
    for entry in ALL.iter().filter(|entry| !fuses(entry.name)) {
        for (idx, case) in (entry.cases)().iter().enumerate().filter(|(_, case)| case.operands.iter().all(|o| o.len < 1 << 20)) {
            let inputs: Vec<Vec<u32>> = case.operands.iter().enumerate().map(|(i, o)| words_of(o, 2000 + idx as u64, i)).collect();
            let plain = run_with(Isa::Baseline, case, &inputs);
            let widest = run_with(Isa::detect(), case, &inputs);
            assert!(plain == widest, "{}, case {}: {} and baseline differ", entry.name, case.label, Isa::detect().name());
            if Isa::detect() == Isa::Avx512 {
                assert!(plain == run_with(Isa::Avx2, case, &inputs), "{}, case {}: avx2 and baseline differ", entry.name, case.label);
            }
        }
    }
}

#[test]
fn weight_drop_drops_the_same_weights_everywhere_and_the_share_it_was_told() {
    let entry = ALL.iter().find(|entry| entry.name == "weight_drop").expect("weight_drop");
    let case = (entry.cases)().into_iter().max_by_key(|case| case.operands[1].len).expect("a case");
    let inputs: Vec<Vec<u32>> = case.operands.iter().enumerate().map(|(i, operand)| words_of(operand, 3000, i)).collect();
    let what = What { kernel: "weight_drop", case: &case.label, seed: 3000, operand: "" };
    let mut first: Option<Vec<bool>> = None;
    for device in devices() {
        let results = launch(&mut *device.open(), device, &*case.kernel, &inputs, &what).unwrap_or_else(|e| panic!("{e}"));
        let written = results[1].iter().filter(|word| **word != POISON_WORD);
        let is_zero: Vec<bool> = written.map(|word| *word == 0).collect();
        let share = is_zero.iter().filter(|zero| **zero).count() as f64 / is_zero.len() as f64;
        // Four standard deviations of a share of 0.3 among 18 million.
        assert!((share - 0.3).abs() < 5e-4, "{device} drops {share}");
        assert!(*first.get_or_insert_with(|| is_zero.clone()) == is_zero, "{device} drops others than the first device");
    }
}

/// A layer whose sizes are none of the tiles'.
const SIZES: Sizes = Sizes { n_steps: 5, n_rows: 7, inputs: 19, hidden: 33, n_classes: 11 };

/// Every entry with each of its cases.
fn each_case(mut f: impl FnMut(&Entry, &Case)) {
    for entry in ALL {
        for case in (entry.cases)().iter().chain(&(entry.bench_cases)()).chain(&(entry.sized)(SIZES)) {
            f(entry, case);
        }
    }
}

#[test]
fn catalogue_entries_and_their_cases_fit_together() {
    for entry in ALL {
        assert!((entry.cases)().len() >= 5, "{} is tested at fewer than five shapes", entry.name);
        assert!(!(entry.bench_cases)().is_empty(), "{} is not measured", entry.name);
        assert!(!entry.tolerance.reason.is_empty(), "the tolerance of {} has no reason", entry.name);
    }
    each_case(|entry, case| {
        let (kernel, label) = (&case.kernel, &case.label);
        assert_eq!(kernel.name(), entry.name);
        assert_eq!(kernel.bindings().len(), case.operands.len(), "{} {label}", entry.name);
        assert!(kernel.bindings().iter().any(|b| b.access == Access::ReadWrite), "{} writes nothing", entry.name);
        for (binding, operand) in kernel.bindings().iter().zip(&case.operands) {
            let is_poison = matches!(operand.fill, Fill::Poison);
            assert!(!is_poison || binding.access == Access::ReadWrite, "{} {label}: {} is read and poisoned", entry.name, binding.name);
        }
        let lens: Vec<usize> = case.operands.iter().map(|operand| operand.len).collect();
        assert_eq!(kernel.check(&lens), Ok(()), "{} {label}", entry.name);
    });
}

#[test]
fn grids_stay_within_what_every_adapter_dispatches() {
    let mut reached = Vec::new();
    each_case(|entry, case| {
        for class in [AdapterClass::Software, AdapterClass::Hardware] {
            let candidates = case.kernel.candidates(class);
            assert!(candidates.contains(&case.kernel.dispatch(class)), "{} {}: the fixed choice is no candidate", entry.name, case.label);
            for dispatch in candidates {
                assert!(
                    dispatch.grid.iter().all(|n| (1..=MAX_WORKGROUPS).contains(n)),
                    "{} {}: {:?}",
                    entry.name,
                    case.label,
                    dispatch.grid
                );
                assert!(
                    entry.shaders.contains(&dispatch.shader),
                    "{} launches {}, which its entry does not list",
                    entry.name,
                    dispatch.shader.name
                );
                reached.push(dispatch.shader.variant());
            }
        }
    });
    for shader in ALL.iter().flat_map(|entry| entry.shaders) {
        assert!(reached.contains(&shader.variant()), "no case launches {}", shader.variant());
    }
}

#[test]
fn every_candidate_of_a_product_leaves_the_same_bits() {
    let gpus: Vec<Device> = devices().into_iter().filter(|device| matches!(device, Device::Gpu(_))).collect();
    for device in gpus {
        let mut backend = device.open();
        for (idx, case) in (carrousel::kernels::gemm::ENTRY.cases)().iter().enumerate() {
            let what = What { kernel: "gemm", case: &case.label, seed: 5000, operand: "" };
            let inputs: Vec<Vec<u32>> = case.operands.iter().enumerate().map(|(i, o)| words_of(o, 5000 + idx as u64, i)).collect();
            let mut first: Option<Vec<Vec<u32>>> = None;
            for dispatch in case.kernel.candidates(AdapterClass::Hardware) {
                let kernel = As { kernel: &*case.kernel, dispatch };
                let results = launch(&mut *backend, device, &kernel, &inputs, &what).unwrap_or_else(|e| panic!("{e}"));
                let same = *first.get_or_insert_with(|| results.clone()) == results;
                assert!(same, "{} on {device}: {} leaves other bits than the first candidate", case.label, dispatch.shader.variant());
            }
        }
    }
}

#[test]
fn operands_that_are_too_short_are_refused_before_anything_is_written() {
    for device in devices() {
        let mut backend = device.open();
        let short = Guarded::upload(&mut *backend, "short", &[]);
        for entry in ALL {
            let cases = (entry.cases)();
            let case = cases.iter().find(|case| case.kernel.check(&vec![0; case.operands.len()]).is_err());
            let case = case.unwrap_or_else(|| panic!("{} accepts no operands at all", entry.name));
            let spans = vec![short.span; case.operands.len()];
            let refused = backend.launch(&*case.kernel, &spans).expect_err("operands of no length");
            assert!(format!("{refused:#}").contains(entry.name), "{refused:#}");
        }
    }
}
