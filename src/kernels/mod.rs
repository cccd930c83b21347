//! What is computed: one file a kernel family, with the mathematics, the shapes, the CPU code and the description of the shader.
//!
//! A kernel is a plain value, its [`Kernel::params`] are its bytes: the same struct that the shader reads as its uniform. It checks the
//! lengths of its operands, runs itself on slices, and names its shader and grid. No device and no wgpu here.

pub mod activations;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
pub mod gemm_half;
pub mod loss;
pub mod lstm;
pub mod microkernel;
pub mod pooling;
pub mod probe;
pub mod reduce;
pub mod update;
pub mod weight_drop;

use std::fmt;

use crate::pool::CpuContext;
use crate::rng::{Purpose, StepKey, Stream};
use crate::shape::{GATES, pad_units};

/// Workgroups of one dimension of a dispatch that every adapter accepts.
pub const MAX_WORKGROUPS: u32 = 65_535;
/// Loop trips of one invocation, all its loops together, that every driver runs (software drivers stop silently above).
pub const MAX_LOOP_TRIPS: u32 = 65_535;

/// A buffer of some backend; a name, no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u32);

/// Words `offset .. offset + len` of a buffer. Bound to a kernel, the offset must be a multiple of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    pub buffer: BufferId,
    pub offset: usize,
    pub len: usize,
}

impl Span {
    /// Words `offset .. offset + len` of this span.
    pub fn part(self, offset: usize, len: usize) -> Self {
        assert!(offset + len <= self.len, "part {offset}+{len} of a span of {}", self.len);
        Self { buffer: self.buffer, offset: self.offset + offset, len }
    }
}

/// How a kernel uses an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
}

/// An operand of a kernel: its name in the shader and its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    pub name: &'static str,
    pub access: Access,
}

/// A read-only operand.
pub const fn read(name: &'static str) -> Binding {
    Binding { name, access: Access::Read }
}

/// An operand that is read and written.
pub const fn read_write(name: &'static str) -> Binding {
    Binding { name, access: Access::ReadWrite }
}

/// An operand on the CPU: words of four bytes, floats unless the kernel says indices.
pub enum Operand<'a> {
    Read(&'a [f32]),
    ReadWrite(&'a mut [f32]),
}

impl<'a> Operand<'a> {
    /// The same operand, for as long as this one is lent.
    pub fn again(&mut self) -> Operand<'_> {
        match self {
            Self::Read(words) => Operand::Read(words),
            Self::ReadWrite(words) => Operand::ReadWrite(words),
        }
    }

    /// The words, for reading.
    pub fn as_slice(&self) -> &[f32] {
        match self {
            Self::Read(s) => s,
            Self::ReadWrite(s) => s,
        }
    }

    /// The words as unsigned integers.
    pub fn as_indices(&self) -> &[u32] {
        bytemuck::cast_slice(self.as_slice())
    }

    /// The words, for writing; the catalogue's access table guarantees that they may be.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        match self {
            Self::ReadWrite(s) => s,
            Self::Read(_) => unreachable!("the backend binds operands as the kernel's table of bindings says"),
        }
    }

    /// The words as unsigned integers, for writing.
    pub fn as_indices_mut(&mut self) -> &mut [u32] {
        bytemuck::cast_slice_mut(self.as_mut_slice())
    }
}

/// A fragment of WGSL that kernels share.
#[derive(Debug, PartialEq, Eq)]
pub struct Fragment {
    pub name: &'static str,
    pub source: &'static str,
}

/// A WGSL kernel: valid together with the fragments it lists, in this order, before it. Its entry point has its name.
#[derive(Debug, PartialEq, Eq)]
pub struct Shader {
    pub name: &'static str,
    pub source: &'static str,
    pub fragments: &'static [&'static Fragment],
}

/// What a shader needs that not every adapter has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extension {
    /// Half floats.
    Half,
    /// Matrices of 16 x 16 halves that a subgroup multiplies into sums in f32; half floats too.
    Cooperative,
}

/// The fragments that enable extensions, which stand before all others.
pub static HALF: Fragment = Fragment { name: "half", source: include_str!("../../shaders/shared/half.wgsl") };
pub static COOPERATIVE: Fragment = Fragment { name: "cooperative", source: include_str!("../../shaders/shared/cooperative.wgsl") };

impl Shader {
    /// The extension that it enables.
    pub fn extension(&self) -> Option<Extension> {
        match self.fragments.first().map(|fragment| fragment.name) {
            Some("half") => Some(Extension::Half),
            Some("cooperative") => Some(Extension::Cooperative),
            _ => None,
        }
    }

    /// What tells it from other shaders: its name, and the tile that it is made with, if any.
    pub fn variant(&self) -> String {
        let tile = self.fragments.iter().find(|fragment| fragment.name.starts_with("tile_"));
        tile.map_or_else(|| self.name.to_owned(), |tile| format!("{} {}", self.name, tile.name))
    }

    /// The whole module: the fragments in order, then the kernel.
    pub fn text(&self) -> String {
        self.fragments.iter().map(|f| f.source).chain([self.source]).collect()
    }
}

/// What kind of adapter a launch is for; kernels choose variants by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdapterClass {
    /// A CPU that plays a GPU: barriers are slow, invocations run one after another.
    Software,
    Hardware,
}

/// How one launch looks on a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dispatch {
    pub shader: &'static Shader,
    /// Values of `override` constants; part of the pipeline's key.
    pub overrides: &'static [(&'static str, f64)],
    /// Workgroups, each dimension at most [`MAX_WORKGROUPS`].
    pub grid: [u32; 3],
}

/// Launches of about one size and form, which share what is chosen among their candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SizeClass {
    pub kernel: &'static str,
    /// Each rounded up by [`SizeClass::rounded`].
    pub size: [u32; 3],
    /// What else tells launches apart.
    pub form: &'static str,
}

impl SizeClass {
    /// Rounds up to four sizes an octave, so that batches of about one length fall together; 16 at least.
    pub fn rounded(n: u32) -> u32 {
        let step = (n.max(16) - 1).ilog2().saturating_sub(2);
        n.max(16).checked_next_multiple_of(1 << step).unwrap_or(u32::MAX)
    }
}

/// `gemm 5120x1024x256 NN`.
impl fmt::Display for SizeClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.size;
        write!(f, "{} {x}x{y}x{z} {}", self.kernel, self.form)
    }
}

/// A launch that the candidates of a size class are measured with, on zeroed operands of its own.
pub struct Trial {
    pub kernel: Box<dyn Kernel>,
    /// Words of each operand.
    pub lens: Vec<usize>,
    /// Floating-point operations: what takes longest is measured first.
    pub flop: u64,
}

/// A grid of `n` workgroups in a row, folded into two dimensions where there are too many for one.
/// The shader finds its number as `wg.y * num_workgroups.x + wg.x` and returns where that is not below `n`.
pub fn grid_1d(n: u64) -> [u32; 3] {
    if n <= u64::from(MAX_WORKGROUPS) {
        return [n.max(1) as u32, 1, 1];
    }
    let y = n.div_ceil(u64::from(MAX_WORKGROUPS));
    [n.div_ceil(y) as u32, y as u32, 1]
}

/// Operands whose lengths or sizes do not fit a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kernel}: {what} is {got}, needed is {needed}")]
pub struct ShapeError {
    pub kernel: &'static str,
    pub what: String,
    pub got: usize,
    pub needed: usize,
}

/// Something to compute. The implementing struct is `#[repr(C)]` and equals the shader's `Params`.
pub trait Kernel: Send + Sync {
    /// One word chain for the kernel, its shader file, its entry point and its label in traces.
    fn name(&self) -> &'static str;
    /// The operands in order.
    fn bindings(&self) -> &'static [Binding];
    /// The bytes of the shader's uniform.
    fn params(&self) -> &[u8];
    /// Checks sizes and the operands' lengths in words; both backends call it before every launch.
    ///
    /// # Errors
    /// Names the operand or size, what it is and what it must be.
    fn check(&self, lens: &[usize]) -> Result<(), ShapeError>;
    /// The shader and grid for an adapter of this class.
    fn dispatch(&self, class: AdapterClass) -> Dispatch;
    /// Every way to launch it on an adapter of this class, the fixed choice among them. All of them compute the same bits on one adapter.
    fn candidates(&self, class: AdapterClass) -> Vec<Dispatch> {
        vec![self.dispatch(class)]
    }
    /// The class of sizes that this launch falls into, in which the same candidates are there in the same order; none where nothing is chosen.
    fn size_class(&self) -> Option<SizeClass> {
        None
    }
    /// A launch of this size to measure candidates with.
    fn trial(&self) -> Option<Trial> {
        None
    }
    /// Computes on the CPU. The backend has called [`Self::check`].
    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]);
}

/// A kernel launched in one of its ways, whatever it would choose itself.
pub struct As<'k> {
    pub kernel: &'k dyn Kernel,
    pub dispatch: Dispatch,
}

impl Kernel for As<'_> {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }
    fn bindings(&self) -> &'static [Binding] {
        self.kernel.bindings()
    }
    fn params(&self) -> &[u8] {
        self.kernel.params()
    }
    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        self.kernel.check(lens)
    }
    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        self.dispatch
    }
    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        self.kernel.run(ctx, operands);
    }
}

/// Fails unless `got >= needed`.
pub(crate) fn at_least(kernel: &'static str, what: &str, got: usize, needed: usize) -> Result<(), ShapeError> {
    if got >= needed { Ok(()) } else { Err(ShapeError { kernel, what: format!("length of {what}"), got, needed: needed.max(1) }) }
}

/// Fails unless `value` is a multiple of `of`.
pub(crate) fn multiple_of(kernel: &'static str, what: &str, value: u32, of: usize) -> Result<(), ShapeError> {
    let value = value as usize;
    if value.is_multiple_of(of) {
        Ok(())
    } else {
        Err(ShapeError {
            kernel,
            what: format!("{what}, which must be a multiple of {of},"),
            got: value,
            needed: crate::shape::round_up(value, of),
        })
    }
}

/// Fails where a size that drives a loop of one invocation is above what drivers run.
pub(crate) fn loop_trips(kernel: &'static str, what: &str, trips: u32) -> Result<(), ShapeError> {
    if trips <= MAX_LOOP_TRIPS {
        Ok(())
    } else {
        Err(ShapeError { kernel, what: format!("{what} (at most)"), got: trips as usize, needed: MAX_LOOP_TRIPS as usize })
    }
}

/// How far results may lie from the f64 oracle, and why.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub absolute: f64,
    pub relative: f64,
    pub reason: &'static str,
}

/// What an operand of a test case holds before the launch. Outputs start poisoned, so that what is not written shows.
#[derive(Clone, Debug)]
pub enum Fill {
    /// Uniform in `low..high`.
    Uniform {
        low: f32,
        high: f32,
    },
    /// Indices uniform in `0..below`.
    Indices {
        below: u32,
    },
    /// These words.
    Words(Vec<u32>),
    /// These floats.
    Floats(Vec<f32>),
    Zeros,
    /// Not a number: an output that is written in full, or a region that must not be read.
    Poison,
}

/// What an output holds before it is written: not a number, and none that anything computes.
pub const POISON_WORD: u32 = 0x7fc0_dead;

/// One operand of a case.
#[derive(Clone, Debug)]
pub struct CaseOperand {
    pub len: usize,
    pub fill: Fill,
}

impl CaseOperand {
    /// The words it holds before a launch; `idx` is its number among the operands, so that two of them differ.
    pub fn words(&self, seed: u64, idx: usize) -> Vec<u32> {
        let mut stream = Stream::new(StepKey::new(seed, 0), Purpose::Test, idx as u32, 0);
        let words: Vec<u32> = match &self.fill {
            Fill::Uniform { low, high } => (0..self.len).map(|_| (low + (high - low) * stream.uniform()).to_bits()).collect(),
            Fill::Indices { below } => (0..self.len).map(|_| stream.below(*below)).collect(),
            Fill::Words(words) => words.clone(),
            Fill::Floats(values) => values.iter().map(|v| v.to_bits()).collect(),
            Fill::Zeros => vec![0; self.len],
            Fill::Poison => vec![POISON_WORD; self.len],
        };
        assert_eq!(words.len(), self.len, "a fill that is not as long as its operand");
        words
    }
}

/// Shorthand for a [`CaseOperand`].
pub fn operand(len: usize, fill: Fill) -> CaseOperand {
    CaseOperand { len, fill }
}

/// A kernel with operands, for tests, benches and measurements.
pub struct Case {
    pub label: String,
    pub kernel: Box<dyn Kernel>,
    pub operands: Vec<CaseOperand>,
    /// Floating-point operations of a launch, 0 where bytes matter.
    pub flop: u64,
}

impl Case {
    /// Bytes that must move at least: what is read once, what is written once.
    pub fn bytes(&self) -> u64 {
        let words = self.kernel.bindings().iter().zip(&self.operands).map(|(binding, operand)| match (binding.access, &operand.fill) {
            (Access::Read, _) | (Access::ReadWrite, Fill::Poison) => operand.len,
            (Access::ReadWrite, _) => 2 * operand.len,
        });
        4 * words.sum::<usize>() as u64
    }

    /// Whether a launch goes on from what the one before left.
    pub fn is_in_place(&self) -> bool {
        let written =
            |(binding, operand): (&Binding, &CaseOperand)| binding.access == Access::ReadWrite && !matches!(operand.fill, Fill::Poison);
        self.kernel.bindings().iter().zip(&self.operands).any(written)
    }
}

/// The sizes of a layer and its batch, from which each kernel's own follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// T.
    pub n_steps: u32,
    /// B.
    pub n_rows: u32,
    /// I: numbers at each step, or columns of an embedding.
    pub inputs: u32,
    /// H.
    pub hidden: u32,
    /// V.
    pub n_classes: u32,
}

impl Sizes {
    /// T x B.
    pub fn places(self) -> u32 {
        self.n_steps * self.n_rows
    }

    /// H and I with padding.
    pub fn padded_hidden(self) -> u32 {
        pad_units(self.hidden as usize) as u32
    }

    pub fn padded_inputs(self) -> u32 {
        pad_units(self.inputs as usize) as u32
    }

    /// Floats of the layer's parameters.
    pub fn n_parameters(self) -> u32 {
        GATES as u32 * self.padded_hidden() * (self.padded_inputs() + self.padded_hidden() + 2)
    }
}

/// One line of the catalogue.
pub struct Entry {
    pub name: &'static str,
    pub tolerance: Tolerance,
    /// Odd and edge shapes.
    pub cases: fn() -> Vec<Case>,
    /// Sizes as in real models.
    pub bench_cases: fn() -> Vec<Case>,
    /// As a layer of these sizes launches it.
    pub sized: fn(Sizes) -> Vec<Case>,
    /// Every shader variant of the kernel.
    pub shaders: &'static [&'static Shader],
}

/// All kernels, in order of first use in a training step; the last two are used by measurements only.
pub const ALL: &[Entry] = &[
    embedding::GATHER_ENTRY,
    dropout::ENTRY,
    gemm::ENTRY,
    weight_drop::ENTRY,
    lstm::NORM_INPUT_ENTRY,
    lstm::FORWARD_ENTRY,
    lstm::NORM_FORWARD_ENTRY,
    lstm::PROJECT_ENTRY,
    lstm::SWEEP_FORWARD_ENTRY,
    pooling::ENTRY,
    loss::SOFTMAX_ENTRY,
    loss::BINARY_ENTRY,
    loss::MSE_ENTRY,
    loss::QUANTILE_ENTRY,
    pooling::GRADIENT_ENTRY,
    lstm::STATE_GRADIENT_ENTRY,
    lstm::BACKWARD_ENTRY,
    lstm::NORM_BACKWARD_ENTRY,
    lstm::SWEEP_BACKWARD_ENTRY,
    reduce::COLUMNS_ENTRY,
    embedding::GRADIENT_ENTRY,
    reduce::SUM_ENTRY,
    reduce::BLOCK_SQUARES_ENTRY,
    reduce::NON_FINITE_ENTRY,
    elementwise::SCALE_ENTRY,
    update::SGD_ENTRY,
    update::RMSPROP_ENTRY,
    update::ADAM_ENTRY,
    probe::MULTIPLY_ADD_ENTRY,
    gemm_half::ENTRY,
];

/// The sizes at which every kernel is tested: below, at and above the tile sizes.
pub const ODD: [u32; 5] = [1, 3, 17, 33, 65];

/// Implements the parts of [`Kernel`] that follow from the struct itself.
macro_rules! kernel_basics {
    ($name:literal, $bindings:expr) => {
        fn name(&self) -> &'static str {
            $name
        }
        fn bindings(&self) -> &'static [$crate::kernels::Binding] {
            $bindings
        }
        fn params(&self) -> &[u8] {
            bytemuck::bytes_of(self)
        }
    };
}
pub(crate) use kernel_basics;

/// A kernel that no adapter is asked to run.
macro_rules! cpu_only {
    ($name:literal, $bindings:expr) => {
        fn name(&self) -> &'static str {
            $name
        }
        fn bindings(&self) -> &'static [$crate::kernels::Binding] {
            $bindings
        }
        fn params(&self) -> &[u8] {
            &[]
        }
        fn dispatch(&self, _: $crate::kernels::AdapterClass) -> $crate::kernels::Dispatch {
            unreachable!("only the CPU backend launches it")
        }
    };
}
pub(crate) use cpu_only;
