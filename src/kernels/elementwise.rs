//! What is done to each element: y *= a.

use bytemuck::{Pod, Zeroable};

use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d, kernel_basics,
    operand, read_write,
};
use crate::pool::{CpuContext, Rows};

/// The shader of [`Scale`].
pub static SCALE: Shader = Shader { name: "scale", source: include_str!("../../shaders/scale.wgsl"), fragments: &[] };

/// Floats that one workgroup of an element-wise shader covers: 64 invocations, 4 floats each.
pub const ELEMENTS: u32 = 256;
/// Floats below which an element-wise kernel stays on one thread.
pub(crate) const MIN_PART: usize = 1 << 15;

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
