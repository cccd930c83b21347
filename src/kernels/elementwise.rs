//! Element-wise helpers: y += a x, and y *= a.

use bytemuck::{Pod, Zeroable};

use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d, kernel_basics,
    operand, read, read_write,
};
use crate::pool::{CpuContext, Rows};

/// The shader of [`Add`].
pub static ADD: Shader = Shader { name: "add", source: include_str!("../../shaders/add.wgsl"), fragments: &[] };
/// The shader of [`Scale`].
pub static SCALE: Shader = Shader { name: "scale", source: include_str!("../../shaders/scale.wgsl"), fragments: &[] };

/// Floats that one workgroup of an element-wise shader covers: 64 invocations, 4 floats each.
pub const ELEMENTS: u32 = 256;
/// Floats below which an element-wise kernel stays on one thread.
pub(crate) const MIN_PART: usize = 1 << 15;

/// y += a x over `len` floats.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Add {
    pub len: u32,
    pub x_offset: u32,
    pub y_offset: u32,
    pub a: f32,
}

impl Kernel for Add {
    kernel_basics!("add", const { &[read("x"), read_write("y")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("add", "x", lens[0], (self.x_offset + self.len) as usize)?;
        at_least("add", "y", lens[1], (self.y_offset + self.len) as usize)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &ADD, overrides: &[], grid: grid_1d(u64::from(self.len.div_ceil(ELEMENTS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [x, y] = operands else { unreachable!("two operands") };
        let (x, len) = (&x.as_slice()[self.x_offset as usize..], self.len as usize);
        let y = &mut y.as_mut_slice()[self.y_offset as usize..][..len];
        ctx.pool.run(Rows { data: y, width: 1 }, len, MIN_PART, &|part: Rows<'_>, range: std::ops::Range<usize>| {
            part.data.iter_mut().zip(&x[range]).for_each(|(y, x)| *y += self.a * x);
        });
    }
}

/// y *= a over `len` floats.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Scale {
    pub len: u32,
    pub offset: u32,
    pub a: f32,
}

impl Kernel for Scale {
    kernel_basics!("scale", const { &[read_write("y")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("scale", "y", lens[0], (self.offset + self.len) as usize)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &SCALE, overrides: &[], grid: grid_1d(u64::from(self.len.div_ceil(ELEMENTS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [y] = operands else { unreachable!("one operand") };
        let len = self.len as usize;
        let y = &mut y.as_mut_slice()[self.offset as usize..][..len];
        ctx.pool.run(Rows { data: y, width: 1 }, len, MIN_PART, &|part: Rows<'_>, _| part.data.iter_mut().for_each(|y| *y *= self.a));
    }
}

/// The lengths at which element-wise kernels are tested: odd ones, and one that needs more than 65,535 workgroups.
pub(crate) fn lengths() -> impl Iterator<Item = u32> {
    ODD.into_iter().chain([ELEMENTS * 65_536 + 3])
}

const REASON: &str = "one product and one sum, fused or not";

/// The catalogue's line.
pub const ADD_ENTRY: Entry = Entry {
    name: "add",
    tolerance: Tolerance { absolute: 2e-7, relative: 2e-7, reason: REASON },
    cases: || lengths().map(add_case).collect(),
    bench_cases: || vec![add_case(1 << 20)],
    sized: |s| vec![add_case(s.places() * s.padded_hidden())],
    shaders: &[&ADD],
};

fn add_case(len: u32) -> Case {
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("{len}"),
        kernel: Box::new(Add { len, x_offset: 3, y_offset: 1, a: -0.75 }),
        operands: vec![operand(len as usize + 3, random.clone()), operand(len as usize + 2, random)],
        flop: 0,
    }
}

/// The catalogue's line.
pub const SCALE_ENTRY: Entry = Entry {
    name: "scale",
    tolerance: Tolerance { absolute: 0.0, relative: 2e-7, reason: "one product, rounded once" },
    cases: || lengths().map(scale_case).collect(),
    bench_cases: || vec![scale_case(1 << 20)],
    sized: |s| vec![scale_case(s.n_parameters())],
    shaders: &[&SCALE],
};

fn scale_case(len: u32) -> Case {
    Case {
        label: format!("{len}"),
        kernel: Box::new(Scale { len, offset: 1, a: 0.3 }),
        operands: vec![operand(len as usize + 2, Fill::Uniform { low: -1.0, high: 1.0 })],
        flop: 0,
    }
}
