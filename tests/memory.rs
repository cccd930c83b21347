//! Operands between guard bands, so that a write beside an operand shows, and a read beside it spoils the result.

use carrousel::backend::{Backend, BufferId, Span, read_now};
use carrousel::kernels::CaseOperand;
pub use carrousel::kernels::POISON_WORD;

use crate::adapters::{DEADLINE, Device};
use crate::compare::{What, unchanged};

/// Words before and behind each operand; spans start at multiples of it.
pub const GUARD: usize = 64;
/// What guard bands hold: a NaN with a payload that nothing computes, and as an index far outside of everything.
pub const GUARD_WORD: u32 = 0x7fc5_a5a5;
/// The words an operand holds before a launch.
pub fn words_of(operand: &CaseOperand, seed: u64, idx: usize) -> Vec<u32> {
    operand.words(seed, idx)
}

/// An operand in a buffer of its own.
pub struct Guarded {
    pub span: Span,
}

impl Guarded {
    /// Uploads `words` with guards around them.
    pub fn upload(backend: &mut dyn Backend, label: &str, words: &[u32]) -> Self {
        let mut all = vec![GUARD_WORD; words.len() + 2 * GUARD];
        all[GUARD..GUARD + words.len()].copy_from_slice(words);
        let buffer: BufferId = backend.alloc(label, all.len()).expect("memory for an operand");
        let whole = backend.whole(buffer);
        backend.write(whole, bytemuck::cast_slice(&all)).expect("an upload");
        Self { span: whole.part(GUARD, words.len()) }
    }

    /// Uploads floats with guards around them.
    pub fn upload_f32(backend: &mut dyn Backend, label: &str, values: &[f32]) -> Self {
        Self::upload(backend, label, bytemuck::cast_slice(values))
    }

    /// The operand's words as they are now, once the guards are seen to be untouched.
    pub fn download(&self, backend: &mut dyn Backend, device: Device, what: &What<'_>) -> Result<Vec<u32>, String> {
        let whole = backend.whole(self.span.buffer);
        let all = read_now(backend, whole, DEADLINE).map_err(|e| format!("{what}: reading back from {device}: {e:#}"))?;
        let mut words: Vec<u32> = bytemuck::cast_vec(all);
        check_guards(what, device, &words, self.span.len)?;
        words.copy_within(GUARD..GUARD + self.span.len, 0);
        words.truncate(self.span.len);
        Ok(words)
    }

    /// Gives the buffer back.
    pub fn free(self, backend: &mut dyn Backend) {
        backend.free(self.span.buffer);
    }
}

/// Checks the bands around `len` words.
fn check_guards(what: &What<'_>, device: Device, all: &[u32], len: usize) -> Result<(), String> {
    if all.len() != len + 2 * GUARD {
        return Err(format!("{what}: {} words came back from {device}, not {}", all.len(), len + 2 * GUARD));
    }
    let band = [GUARD_WORD; GUARD];
    unchanged(what, device, &band, &all[..GUARD], |_| true).map_err(|e| format!("guard band before {e}"))?;
    unchanged(what, device, &band, &all[GUARD + len..], |_| true).map_err(|e| format!("guard band behind {e}"))
}

/// Words as floats.
pub fn floats(words: Vec<u32>) -> Vec<f32> {
    bytemuck::cast_vec(words)
}

#[test]
fn a_touched_guard_band_is_reported() {
    let what = What { kernel: "planted", case: "guard", seed: 0, operand: "y" };
    let mut backend = Device::Cpu(1).open();
    for (at, side) in [(GUARD - 1, "before"), (GUARD + 3, "behind")] {
        let operand = Guarded::upload(&mut *backend, "y", &[1, 2, 3]);
        assert_eq!(operand.download(&mut *backend, Device::Cpu(1), &what), Ok(vec![1, 2, 3]));
        let whole = backend.whole(operand.span.buffer);
        backend.write(whole.part(at, 1), &[0.0]).expect("a write");
        let fault = operand.download(&mut *backend, Device::Cpu(1), &what).unwrap_err();
        assert!(fault.contains(&format!("guard band {side}")), "{fault}");
    }
}
