//! Parameter updates, one pass over parameter, gradient and state, in place. The order of operations is `torch.optim`'s.
//!
//! Every update first makes the gradient that counts: `g = clamp(grad_scale * grad, +-clip_value) + weight_decay * p + l1 * sign(p)`
//! (no clamp where `clip_value` is 0; with decoupled decay the weight is shrunk instead). A padding entry has p = g = state = 0 and stays 0.

use bytemuck::{Pod, Zeroable};

use super::elementwise::{ELEMENTS, MIN_PART, lengths};
use super::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Fragment, Kernel, Operand, Shader, ShapeError, Tolerance, at_least, cpu_only,
    grid_1d, kernel_basics, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};

/// The gradient that counts.
pub static GRADIENT: Fragment = Fragment { name: "gradient", source: include_str!("../../shaders/shared/gradient.wgsl") };
/// The shader of [`Sgd`].
pub static SGD: Shader = Shader { name: "sgd", source: include_str!("../../shaders/sgd.wgsl"), fragments: &[&GRADIENT] };
/// The shader of [`Rmsprop`].
pub static RMSPROP: Shader = Shader { name: "rmsprop", source: include_str!("../../shaders/rmsprop.wgsl"), fragments: &[&GRADIENT] };
/// The shader of [`Adam`].
pub static ADAM: Shader = Shader { name: "adam", source: include_str!("../../shaders/adam.wgsl"), fragments: &[&GRADIENT] };

/// What all updates share: how the gradient that counts is made.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Regular {
    /// Clipping by norm and other factors of the whole gradient.
    pub grad_scale: f32,
    /// 0: no clipping by value.
    pub clip_value: f32,
    pub weight_decay: f32,
    pub l1: f32,
}

#[inline(always)]
fn counts(r: &Regular, grad: f32, p: f32) -> f32 {
    let mut g = grad * r.grad_scale;
    if r.clip_value > 0.0 {
        g = if g > r.clip_value { r.clip_value } else { g };
        g = if g < -r.clip_value { -r.clip_value } else { g };
    }
    let sign = if p > 0.0 {
        r.l1
    } else if p < 0.0 {
        -r.l1
    } else {
        0.0
    };
    g + r.weight_decay * p + sign
}

/// SGD: `v = momentum v + g` (v = g at the first step), `p -= lr v`; with Nesterov (Sutskever et al. 2013, as torch has it) `p -= lr (g + momentum v)`.
/// Without momentum, `v` is neither read nor written and may be any span.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Sgd {
    pub len: u32,
    pub nesterov: u32,
    pub lr: f32,
    pub momentum: f32,
    pub regular: Regular,
}

/// RMSprop (Tieleman and Hinton 2012): `s = alpha s + (1 - alpha) g^2`, `d = g / (sqrt(s) + eps)`; with momentum `v = momentum v + d`, `p -= lr v`, else `p -= lr d`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Rmsprop {
    pub len: u32,
    pub lr: f32,
    pub alpha: f32,
    pub eps: f32,
    pub momentum: f32,
    pub regular: Regular,
}

/// Adam (Kingma and Ba 2015): `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `p -= step_size m / (sqrt(v) / root2 + eps)`, where
/// `step_size = lr / (1 - b1^t)` and `root2 = sqrt(1 - b2^t)`. `shrink` is 1, or AdamW's `1 - lr weight_decay` (Loshchilov and Hutter 2019), which multiplies p first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Adam {
    pub len: u32,
    pub step_size: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub root2: f32,
    pub eps: f32,
    pub shrink: f32,
    pub regular: Regular,
}

const ONE_STATE: &[Binding] = &[read_write("p"), read("grad"), read_write("v")];
const TWO_STATES: &[Binding] = &[read_write("p"), read("grad"), read_write("m"), read_write("v")];

fn check_states(kernel: &'static str, len: u32, lens: &[usize], names: &[Binding], n_needed: usize) -> Result<(), ShapeError> {
    names.iter().zip(lens).take(n_needed).try_for_each(|(b, &got)| at_least(kernel, b.name, got, len as usize))
}

fn grid(len: u32) -> [u32; 3] {
    grid_1d(u64::from(len.div_ceil(ELEMENTS)))
}

impl Kernel for Sgd {
    kernel_basics!("sgd", ONE_STATE);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        check_states("sgd", self.len, lens, ONE_STATE, if self.momentum == 0.0 { 2 } else { 3 })
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &SGD, overrides: &[], grid: grid(self.len) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [p, grad, v] = operands else { unreachable!("three operands") };
        let len = self.len as usize;
        let (grad, isa, this) = (&grad.as_slice()[..len], ctx.isa, self);
        let v = if self.momentum == 0.0 { &mut [] } else { &mut v.as_mut_slice()[..len] };
        let work = (Rows { data: &mut p.as_mut_slice()[..len], width: 1 }, Rows { data: v, width: 1 });
        ctx.pool.run(work, len, MIN_PART, &|(p, v): (Rows<'_>, Rows<'_>), range: std::ops::Range<usize>| {
            let (p, grad, v) = (p.data, &grad[range], v.data);
            for_isa!(isa, sgd(this: &Sgd, p: &mut [f32], grad: &[f32], v: &mut [f32]));
        });
    }
}

#[inline(always)]
fn sgd(k: &Sgd, p: &mut [f32], grad: &[f32], v: &mut [f32]) {
    if k.momentum == 0.0 {
        p.iter_mut().zip(grad).for_each(|(p, g)| *p -= k.lr * counts(&k.regular, *g, *p));
        return;
    }
    for ((p, grad), v) in p.iter_mut().zip(grad).zip(v) {
        let g = counts(&k.regular, *grad, *p);
        *v = k.momentum * *v + g;
        *p -= k.lr * if k.nesterov == 1 { g + k.momentum * *v } else { *v };
    }
}

/// [`Sgd`] without momentum, weight decay and L1 on a matrix whose gradient is zero but for some rows, bit for bit: a gradient of zero changes
/// nothing, so only those rows are read and written. On the CPU only.
pub struct SgdRows {
    pub sgd: Sgd,
    /// Where row 0 starts, and floats of a row.
    pub rows: u32,
    pub width: u32,
    /// Rows that are not zero: the first words of `index`.
    pub n_distinct: u32,
}

impl Kernel for SgdRows {
    cpu_only!("sgd_rows", const { &[read("index"), read_write("param"), read("grad")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("sgd_rows", "index", lens[0], self.n_distinct as usize)?;
        at_least("sgd_rows", "param", lens[1], self.sgd.len as usize)?;
        at_least("sgd_rows", "grad", lens[2], self.sgd.len as usize)
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [index, param, grad] = operands else { unreachable!("three operands") };
        let (param, grad, isa, this) = (param.as_mut_slice(), grad.as_slice(), ctx.isa, &self.sgd);
        for &row in &index.as_indices()[..self.n_distinct as usize] {
            let start = self.rows as usize + row as usize * self.width as usize;
            let at = start..start + self.width as usize;
            let (Some(p), Some(grad)) = (param.get_mut(at.clone()), grad.get(at)) else { continue };
            let v: &mut [f32] = &mut [];
            for_isa!(isa, sgd(this: &Sgd, p: &mut [f32], grad: &[f32], v: &mut [f32]));
        }
    }
}

impl Kernel for Rmsprop {
    kernel_basics!("rmsprop", TWO_STATES);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        check_states(
            "rmsprop",
            self.len,
            &[lens[0], lens[1], lens[3], lens[2]],
            &[TWO_STATES[0], TWO_STATES[1], TWO_STATES[3], TWO_STATES[2]],
            if self.momentum == 0.0 { 3 } else { 4 },
        )
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &RMSPROP, overrides: &[], grid: grid(self.len) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [p, grad, m, v] = operands else { unreachable!("four operands") };
        let len = self.len as usize;
        let (grad, isa, this) = (&grad.as_slice()[..len], ctx.isa, self);
        let m = if self.momentum == 0.0 { &mut [] } else { &mut m.as_mut_slice()[..len] };
        let work = (
            Rows { data: &mut p.as_mut_slice()[..len], width: 1 },
            Rows { data: m, width: 1 },
            Rows { data: &mut v.as_mut_slice()[..len], width: 1 },
        );
        ctx.pool.run(work, len, MIN_PART, &|(p, m, v): (Rows<'_>, Rows<'_>, Rows<'_>), range: std::ops::Range<usize>| {
            let (p, grad, m, v) = (p.data, &grad[range], m.data, v.data);
            for_isa!(isa, rmsprop(this: &Rmsprop, p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]));
        });
    }
}

#[inline(always)]
fn rmsprop(k: &Rmsprop, p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (i, ((p, grad), v)) in p.iter_mut().zip(grad).zip(v).enumerate() {
        let g = counts(&k.regular, *grad, *p);
        *v = k.alpha * *v + (1.0 - k.alpha) * g * g;
        let d = g / (v.sqrt() + k.eps);
        match m.get_mut(i) {
            Some(m) => {
                *m = k.momentum * *m + d;
                *p -= k.lr * *m;
            }
            None => *p -= k.lr * d,
        }
    }
}

impl Kernel for Adam {
    kernel_basics!("adam", TWO_STATES);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        check_states("adam", self.len, lens, TWO_STATES, 4)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &ADAM, overrides: &[], grid: grid(self.len) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [p, grad, m, v] = operands else { unreachable!("four operands") };
        let len = self.len as usize;
        let (grad, isa, this) = (&grad.as_slice()[..len], ctx.isa, self);
        let work = (
            Rows { data: &mut p.as_mut_slice()[..len], width: 1 },
            Rows { data: &mut m.as_mut_slice()[..len], width: 1 },
            Rows { data: &mut v.as_mut_slice()[..len], width: 1 },
        );
        ctx.pool.run(work, len, MIN_PART, &|(p, m, v): (Rows<'_>, Rows<'_>, Rows<'_>), range: std::ops::Range<usize>| {
            let (p, grad, m, v) = (p.data, &grad[range], m.data, v.data);
            for_isa!(isa, adam(this: &Adam, p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]));
        });
    }
}

#[inline(always)]
fn adam(k: &Adam, p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, grad), m), v) in p.iter_mut().zip(grad).zip(m).zip(v) {
        let g = counts(&k.regular, *grad, *p);
        *m = k.beta1 * *m + (1.0 - k.beta1) * g;
        *v = k.beta2 * *v + (1.0 - k.beta2) * g * g;
        *p = *p * k.shrink - k.step_size * *m / (v.sqrt() / k.root2 + k.eps);
    }
}

const REASON: &str = "a handful of operations, each rounded once; square root and division within 3 ulp on GPUs";

/// Cases that differ in their flags, at every length.
fn each_length(make: impl Fn(u32, usize) -> Case) -> Vec<Case> {
    lengths().enumerate().map(|(i, len)| make(len, i)).collect()
}

fn state_case(label: String, kernel: Box<dyn Kernel>, len: u32, n_states: usize) -> Case {
    let (len, random) = (len as usize, Fill::Uniform { low: -1.0, high: 1.0 });
    // Second moments are not negative; parameters include exact zeros, which have no sign.
    let mut operands = vec![
        operand(len, random.clone()),
        operand(len, random.clone()),
        operand(len, random.clone()),
        operand(len, Fill::Uniform { low: 0.1, high: 1.0 }),
    ];
    operands.truncate(2 + n_states);
    Case { label, kernel, operands, flop: 0 }
}

fn regular(i: usize) -> Regular {
    Regular { grad_scale: 0.5, clip_value: [0.0, 0.2][i % 2], weight_decay: [0.0, 0.01, 0.1][i % 3], l1: [0.01, 0.0][i % 2] }
}

fn sgd_case(len: u32, i: usize) -> Case {
    let kernel = Sgd { len, nesterov: i as u32 % 2, lr: 0.1, momentum: [0.9, 0.9, 0.0][i % 3], regular: regular(i) };
    state_case(format!("{len} {kernel:?}"), Box::new(kernel), len, 1)
}

fn rmsprop_case(len: u32, i: usize) -> Case {
    let kernel = Rmsprop { len, lr: 0.01, alpha: 0.99, eps: 1e-8, momentum: [0.0, 0.9][i % 2], regular: regular(i) };
    state_case(format!("{len} {kernel:?}"), Box::new(kernel), len, 2)
}

fn adam_case(len: u32, i: usize) -> Case {
    let kernel =
        Adam { len, step_size: 0.01, beta1: 0.9, beta2: 0.999, root2: 0.1, eps: 1e-8, shrink: [1.0, 0.99][i % 2], regular: regular(i) };
    state_case(format!("{len} {kernel:?}"), Box::new(kernel), len, 2)
}

/// The catalogue's line.
pub const SGD_ENTRY: Entry = Entry {
    name: "sgd",
    tolerance: Tolerance { absolute: 5e-7, relative: 1e-6, reason: REASON },
    cases: || each_length(sgd_case),
    bench_cases: || vec![sgd_case(1 << 20, 0)],
    sized: |s| vec![sgd_case(s.n_parameters(), 0)],
    shaders: &[&SGD],
};

/// The catalogue's line.
pub const RMSPROP_ENTRY: Entry = Entry {
    name: "rmsprop",
    tolerance: Tolerance { absolute: 5e-7, relative: 2e-6, reason: REASON },
    cases: || each_length(rmsprop_case),
    bench_cases: || vec![rmsprop_case(1 << 20, 0)],
    sized: |s| vec![rmsprop_case(s.n_parameters(), 0)],
    shaders: &[&RMSPROP],
};

/// The catalogue's line.
pub const ADAM_ENTRY: Entry = Entry {
    name: "adam",
    tolerance: Tolerance { absolute: 5e-7, relative: 2e-6, reason: REASON },
    cases: || each_length(adam_case),
    bench_cases: || vec![adam_case(1 << 20, 0)],
    sized: |s| vec![adam_case(s.n_parameters(), 0)],
    shaders: &[&ADAM],
};
