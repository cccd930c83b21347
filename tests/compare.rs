//! The comparer, and its own tests with planted faults.
//!
//! It refuses to compare a result with itself or with nothing, then checks lengths, then NaN and infinity, then the tolerance.

use std::fmt;

use carrousel::kernels::Tolerance;

use crate::adapters::Device;

/// Who computed a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Oracle,
    Device(Device),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Oracle => f.write_str("oracle"),
            Self::Device(device) => device.fmt(f),
        }
    }
}

/// In an oracle's values: this element must keep the bits it had. A NaN that no arithmetic makes.
const KEEP_BITS: u64 = 0x7ffc_dead_beef_0001;

/// `len` elements that must keep their bits, for an oracle to write over.
pub fn kept(len: usize) -> Vec<f64> {
    vec![f64::from_bits(KEEP_BITS); len]
}

/// Whether an oracle's element says that nothing is written there.
pub fn is_kept(value: f64) -> bool {
    value.to_bits() == KEEP_BITS
}

/// A result with the name of who computed it.
#[derive(Clone, Debug)]
pub struct Outcome<V> {
    pub source: Source,
    pub values: V,
}

impl<V> Outcome<V> {
    pub fn new(source: Source, values: V) -> Self {
        Self { source, values }
    }
}

/// What is compared, for the message.
#[derive(Clone, Copy, Debug)]
pub struct What<'a> {
    pub kernel: &'a str,
    pub case: &'a str,
    pub seed: u64,
    pub operand: &'a str,
}

impl fmt::Display for What<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, case {}, seed {}: {}", self.kernel, self.case, self.seed, self.operand)
    }
}

/// A number that a result may hold.
pub trait Number: Copy {
    fn exact(self) -> f64;
}

impl Number for f32 {
    fn exact(self) -> f64 {
        f64::from(self)
    }
}

impl Number for f64 {
    fn exact(self) -> f64 {
        self
    }
}

fn presentable(what: &What<'_>, sources: [Source; 2], lens: [usize; 2]) -> Result<(), String> {
    let [want, got] = sources;
    if want == got {
        return Err(format!("{what}: {want} is compared with itself"));
    }
    if lens[0] != lens[1] {
        return Err(format!("{what}: {want} has {} elements, {got} has {}", lens[0], lens[1]));
    }
    if lens[0] == 0 {
        return Err(format!("{what}: nothing to compare, {want} and {got} are empty"));
    }
    Ok(())
}

/// Compares floats; elements that `want` says are kept are left to [`unchanged`]. Returns how many were compared.
///
/// # Errors
/// Says what differs first, where, both values, the difference and what was allowed, and how many differ.
pub fn compare<W: Number, G: Number>(
    what: &What<'_>,
    want: &Outcome<Vec<W>>,
    got: &Outcome<Vec<G>>,
    tolerance: &Tolerance,
) -> Result<usize, String> {
    presentable(what, [want.source, got.source], [want.values.len(), got.values.len()])?;
    let pairs = || want.values.iter().zip(&got.values).map(|(w, g)| (w.exact(), g.exact())).enumerate().filter(|(_, (w, _))| !is_kept(*w));
    let (from, to) = (want.source, got.source);
    let special = |w: f64, g: f64| w.is_nan() != g.is_nan() || ((w.is_infinite() || g.is_infinite()) && w != g);
    if let Some((i, (w, g))) = pairs().find(|&(_, (w, g))| special(w, g)) {
        let n = pairs().filter(|&(_, (w, g))| special(w, g)).count();
        return Err(format!("{what}[{i}] of {}: {from} {w:e}, {to} {g:e}: not both finite; {n} such elements", want.values.len()));
    }
    // What is left is finite, or not a number or infinite on both sides alike.
    let allowed = |w: f64| tolerance.absolute + tolerance.relative * w.abs();
    let off = |w: f64, g: f64| w.is_finite() && ((w - g).abs() > allowed(w) || (w - g).is_nan());
    if let Some((i, (w, g))) = pairs().find(|&(_, (w, g))| off(w, g)) {
        let n = pairs().filter(|&(_, (w, g))| off(w, g)).count();
        let worst = pairs().filter(|&(_, (w, g))| off(w, g)).map(|(_, (w, g))| (w - g).abs()).fold(0.0, f64::max);
        return Err(format!(
            "{what}[{i}] of {}: {from} {w:e}, {to} {g:e}, difference {:e}, tolerance {:e} ({}); {n} elements are off, by {worst:e} at most",
            want.values.len(),
            (w - g).abs(),
            allowed(w),
            tolerance.reason
        ));
    }
    Ok(pairs().count())
}

/// Compares integers, all of them, exactly.
///
/// # Errors
/// As [`compare`].
pub fn compare_words(what: &What<'_>, want: &Outcome<Vec<u32>>, got: &Outcome<Vec<u32>>) -> Result<usize, String> {
    presentable(what, [want.source, got.source], [want.values.len(), got.values.len()])?;
    match want.values.iter().zip(&got.values).position(|(w, g)| w != g) {
        None => Ok(want.values.len()),
        Some(i) => Err(format!("{what}[{i}]: {} {}, {} {}", want.source, want.values[i], got.source, got.values[i])),
    }
}

/// Checks that elements which nothing may write kept their bits: those for which `keeps` says so.
///
/// # Errors
/// Says where the first one changed, its bits before and after, and how many did.
pub fn unchanged(what: &What<'_>, device: Device, before: &[u32], after: &[u32], keeps: impl Fn(usize) -> bool) -> Result<(), String> {
    if before.len() != after.len() {
        return Err(format!("{what}: {} words before the launch, {} after it on {device}", before.len(), after.len()));
    }
    let changed = || (0..before.len()).filter(|&i| keeps(i) && before[i] != after[i]);
    match changed().next() {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}[{i}] of {} must not be written: {:#010x} became {:#010x} on {device}; {} such words",
            before.len(),
            before[i],
            after[i],
            changed().count()
        )),
    }
}

mod planted {
    use super::*;

    const WHAT: What<'static> = What { kernel: "gemm", case: "3x3", seed: 7, operand: "c" };
    const TOLERANCE: Tolerance = Tolerance { absolute: 1e-6, relative: 1e-6, reason: "planted" };
    const CPU: Source = Source::Device(Device::Cpu(1));
    const GPU: Source = Source::Device(Device::Gpu(0));

    fn judge(want: &[f64], got: &[f32]) -> Result<usize, String> {
        compare(&WHAT, &Outcome::new(Source::Oracle, want.to_vec()), &Outcome::new(CPU, got.to_vec()), &TOLERANCE)
    }

    #[test]
    fn equal_results_of_two_sources_pass() {
        assert_eq!(judge(&[1.0, -2.0, 0.0], &[1.0, -2.0, -0.0]), Ok(3));
        assert_eq!(judge(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY], &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]), Ok(3));
    }

    #[test]
    fn a_result_is_not_compared_with_itself() {
        for source in [Source::Oracle, CPU, GPU] {
            let one = Outcome::new(source, vec![1.0f32]);
            assert!(compare(&WHAT, &one, &one.clone(), &TOLERANCE).unwrap_err().contains("itself"));
            let words = Outcome::new(source, vec![1u32]);
            assert!(compare_words(&WHAT, &words, &words.clone()).unwrap_err().contains("itself"));
        }
        let (cpu, gpu) = (Outcome::new(CPU, vec![1.0f32]), Outcome::new(GPU, vec![1.0f32]));
        assert_eq!(compare(&WHAT, &cpu, &gpu, &TOLERANCE), Ok(1));
    }

    #[test]
    fn not_a_number_on_one_side_fails_whatever_the_tolerance() {
        let lax = Tolerance { absolute: f64::INFINITY, relative: 1.0, reason: "planted" };
        for (want, got) in
            [(1.0, f32::NAN), (f64::NAN, 1.0), (1.0, f32::INFINITY), (f64::INFINITY, 1.0), (f64::INFINITY, f32::NEG_INFINITY)]
        {
            let want = Outcome::new(Source::Oracle, vec![0.0, want]);
            let got = Outcome::new(CPU, vec![0.0, got]);
            for tolerance in [&TOLERANCE, &lax] {
                let fault = compare(&WHAT, &want, &got, tolerance).unwrap_err();
                assert!(fault.contains("c[1]") && fault.contains("finite"), "{fault}");
            }
        }
    }

    #[test]
    fn swapped_or_missing_lengths_fail() {
        assert!(judge(&[1.0, 2.0], &[1.0]).unwrap_err().contains("2 elements, cpu:1 has 1"));
        assert!(judge(&[0.0], &[0.0, 0.0]).is_err());
        assert!(judge(&[0.0; 4], &[]).is_err(), "zeros are not the same as nothing");
        assert!(judge(&[], &[]).unwrap_err().contains("nothing to compare"));
    }

    #[test]
    fn one_element_off_among_many_fails_and_is_named() {
        let want = vec![0.5; 1000];
        let mut got = vec![0.5f32; 1000];
        got[617] = 0.500_01;
        let fault = judge(&want, &got).unwrap_err();
        for part in ["gemm", "3x3", "seed 7", "c[617]", "oracle 5e-1", "cpu:1 5.0001", "tolerance", "1 elements"] {
            assert!(fault.contains(part), "{part} is missing in: {fault}");
        }
    }

    #[test]
    fn a_difference_from_zero_is_measured_by_the_absolute_tolerance() {
        assert!(judge(&[0.0], &[2e-6]).is_err());
        assert!(judge(&[0.0], &[5e-7]).is_ok());
        let exact = Tolerance { absolute: 0.0, relative: 1e-3, reason: "planted" };
        let (zero, denormal) = (Outcome::new(Source::Oracle, vec![0.0]), Outcome::new(CPU, vec![f32::from_bits(1)]));
        assert!(compare(&WHAT, &zero, &denormal, &exact).is_err());
    }

    #[test]
    fn a_written_element_that_had_to_stay_fails() {
        let mut want = kept(3);
        want[1] = 1.0;
        assert_eq!(judge(&want, &[9.0, 1.0, f32::NAN]), Ok(1), "what is kept is not the comparer's");
        let (before, after) = ([1u32, 2, 3], [1u32, 5, 4]);
        let fault = unchanged(&WHAT, Device::Cpu(1), &before, &after, |i| is_kept(want[i])).unwrap_err();
        assert!(fault.contains("c[2]") && fault.contains("0x00000003 became 0x00000004"), "{fault}");
        assert!(unchanged(&WHAT, Device::Cpu(1), &before, &after[..2], |_| true).is_err());
        assert!(unchanged(&WHAT, Device::Cpu(1), &before, &[1, 9, 3], |i| is_kept(want[i])).is_ok());
    }

    #[test]
    fn integers_are_compared_exactly() {
        let want = Outcome::new(Source::Oracle, vec![7u32, 5]);
        assert!(compare_words(&WHAT, &want, &Outcome::new(CPU, vec![7, 6])).unwrap_err().contains("c[1]: oracle 5, cpu:1 6"));
        assert!(compare_words(&WHAT, &want, &Outcome::new(CPU, vec![7])).is_err());
        assert_eq!(compare_words(&WHAT, &want, &Outcome::new(CPU, vec![7, 5])), Ok(2));
    }
}
