//! The LSTM cell and its sweep over time (Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000), with PyTorch's equations:
//!
//! ```text
//! z_t = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh           split into z_i, z_f, z_g, z_o
//! i = sigmoid(z_i)   f = sigmoid(z_f)   g = tanh(z_g)   o = sigmoid(z_o)
//! c_t = f * c_{t-1} + i * g          h_t = o * tanh(c_t)
//! ```
//! and backwards, with dh_t = (gradient of the output) + dz_{t+1} W_hh:
//! ```text
//! do = dh * tanh(c)          dc = dc_{t+1} * f_{t+1} + dh * o * (1 - tanh(c)^2)
//! di = dc * g    df = dc * c_{t-1}    dg = dc * i
//! dz_i = di * i * (1 - i)   dz_f = df * f * (1 - f)   dz_g = dg * (1 - g^2)   dz_o = do * o * (1 - o)
//! ```
//! [`Cell`] adds what papers have added since, each where it stands in the equations (r: the old h, c': the candidate, hats: before zoneout):
//! ```text
//! recurrent dropout   r = m * h_{t-1}, with one m for all steps of a sequence     (Gal and Ghahramani 2016)
//! peepholes           z_i += p_i c_{t-1}   z_f += p_f c_{t-1}   z_o += p_o c'     (Gers, Schraudolph and Schmidhuber 2002)
//! coupled gates       f = 1 - i                                                  (Greff et al. 2017)
//! cell clip           c' = clip(f * c_{t-1} + i * g), with no gradient where clipped
//! zoneout             c_t = d_c c_{t-1} + (1 - d_c) c'    h_t = d_h h_{t-1} + (1 - d_h) o tanh(c')     (Krueger et al. 2017)
//! gradient clip       dz = clip(dz)                                              (Graves 2013)
//! projection          h_t = W_hr (o tanh(c'))                                    (Sak, Senior and Beaufays 2014)
//! layer normalisation z = a_x n(W_ih x) + a_h n(W_hh r) + b_ih + b_hh    h_t = o tanh(a_c n(c') + b_c)    (Ba, Kiros and Hinton 2016)
//! ```
//! What a layer hands up is h itself, or where there is dropout between layers (Srivastava et al. 2014, inverted: kept values are divided by the
//! probability of keeping them; Zaremba, Sutskever and Vinyals 2014) or a residual connection `y_t = drop(h_t) + x_t`, written and read by the same
//! kernels that make h and take its gradient. Whether a value is kept is a function of (seed, step, layer, global stream, time, unit), so that every
//! device, and any split of the batch, drops the same ones.
//!
//! Above, n(v) = (v - mean(v)) / sqrt(variance(v) + 1e-5) over the hidden units (of all four gates, where there are four); zoneout of h comes after the projection.
//! Without training, zoneout's d is its probability. A row that has ended keeps its state, so that the last state is that of each row's own end.
//!
//! The order of operations: z starts as the input product, the recurrent product is added, then `b_ih + b_hh`.
//!
//! Layouts, H padded to a multiple of 16: weights `[H / 16][K][64]`, gates `[T, B, 4H]` with column `unit / 16 * 64 + gate * 16 + unit % 16`,
//! c `[T + 1, B, H]`, h `[T + 1, B, R]` (R = H without a projection; [`LaneShape`] tells what else lies in these arenas). A forward lane reads state t and writes state t + 1 at step t, so that state 0 is the initial and state T the final one;
//! a reverse lane reads t + 1 and writes t. The gates buffer holds z, then the activated gates (a tap on them may read it after the
//! forward sweep), then dz: each step overwrites what the one before left.

mod backward;
mod forward;
mod gradients_cpu;
mod norm;
mod plan;
mod rows;
mod state;
pub mod sweep_cpu;
mod whole;

pub use backward::{BACKWARD_ENTRY, LstmStepBackward};
use bytemuck::{Pod, Zeroable};
pub use forward::{FORWARD_ENTRY, LstmStepForward};
pub use norm::{LstmNormBackward, LstmNormForward, LstmNormInput, NORM_BACKWARD_ENTRY, NORM_FORWARD_ENTRY, NORM_INPUT_ENTRY};
pub use plan::{
    Lane, LaneGradients, LanePart, LaneShape, LaneStarts, LaneTensors, LaneVectors, Launch, SweepArgs, sweep_plan, whole_sweep_plan,
};
pub use state::{LstmProject, LstmStateGradient, PROJECT_ENTRY, STATE_GRADIENT_ENTRY};
pub use whole::{
    LstmSweepBackward, LstmSweepForward, MAX_SWEEP_HIDDEN, SWEEP_BACKWARD_ENTRY, SWEEP_FORWARD_ENTRY, SWEEP_ROWS, SweepTrial, SweepWay,
    carries, fits, most_steps,
};

use super::weight_drop::PHILOX;
use super::{
    AdapterClass, Binding, CaseOperand, Dispatch, Fill, Fragment, Kernel, MAX_WORKGROUPS, Operand, ShapeError, at_least, multiple_of,
    operand,
};
use crate::pool::CpuContext;
use crate::rng::{Purpose, philox, tag};
use crate::shape::PANEL_UNITS;

/// An offset that says: there is no such tensor.
pub const NONE: u32 = u32::MAX;

/// Sigmoid and tanh that keep NaN, and the test for non-finite bits.
pub static ACTIVATIONS: Fragment = Fragment { name: "activations", source: include_str!("../../../shaders/shared/activations.wgsl") };
/// Where a unit's gates lie.
pub static GATE_INDEX: Fragment = Fragment { name: "gates", source: include_str!("../../../shaders/shared/gates.wgsl") };

/// What makes a cell differ, and its draws; [`PHILOX`] stands before it.
pub static CELL: Fragment = Fragment { name: "cell", source: include_str!("../../../shaders/shared/cell.wgsl") };

/// What every kernel of a cell is made of.
const CELL_FRAGMENTS: &[&Fragment] = &[&ACTIVATIONS, &GATE_INDEX, &PHILOX, &CELL];

/// Added to the variance that layer normalisation divides by; as PyTorch's `LayerNorm`.
pub const NORM_EPS: f32 = 1e-5;

/// The word of `flags` that counts as raised when not 0: a pre-activation, a logit or a prediction was not finite.
pub const FLAG_NON_FINITE: usize = 0;

/// Batch rows that one workgroup of a step kernel covers; beside them it covers one panel of 16 units.
pub const STEP_ROWS: u32 = 32;

/// How a cell differs from the plain one; a part of both step kernels' parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Cell {
    /// Offset in `bias` of the peephole weights `[3, H]` of i, f and o, or [`NONE`].
    pub peephole: u32,
    /// 1: f = 1 - i; z_f is unused and its gradient zero.
    pub coupled: u32,
    /// Largest absolute value of the cell state, 0 for any.
    pub cell_clip: f32,
    /// Largest absolute value of dz, 0 for any.
    pub grad_clip: f32,
    /// Probabilities in `0..1` that h and c keep their old values.
    pub zoneout_h: f32,
    pub zoneout_c: f32,
    /// 1: zoneout draws (training); 0: it takes the probabilities.
    pub draws: u32,
    /// Recurrent dropout: an entry of the mask is 0 where the random word is below `mask_threshold`, else `mask_scale`; a scale of 0: no mask.
    pub mask_threshold: u32,
    pub mask_scale: f32,
    /// The step's key, for draws.
    pub key0: u32,
    pub key1: u32,
    /// Which lane draws: twice the layer, and one more in reverse.
    pub lane: u32,
    /// Offset in `rows` of the rows' global stream numbers `[B]`; used by draws.
    pub streams: u32,
    /// Dropout of what the layer hands up: 0 where the random word is below `drop_threshold`, else times `drop_scale`; a scale of 0: none.
    pub drop_threshold: u32,
    pub drop_scale: f32,
    /// Purpose and layer of those draws.
    pub drop_tag: u32,
}

impl Cell {
    /// The plain cell.
    pub const PLAIN: Self = Self {
        peephole: NONE,
        coupled: 0,
        cell_clip: 0.0,
        grad_clip: 0.0,
        zoneout_h: 0.0,
        zoneout_c: 0.0,
        draws: 0,
        mask_threshold: 0,
        mask_scale: 0.0,
        key0: 0,
        key1: 0,
        lane: 0,
        streams: 0,
        drop_threshold: 0,
        drop_scale: 0.0,
        drop_tag: 0,
    };

    /// Whether nothing differs from the plain cell until its h is handed up.
    pub fn is_plain(&self) -> bool {
        let Self { drop_threshold, drop_scale, drop_tag, .. } = Self::PLAIN;
        Self { key0: 0, key1: 0, lane: 0, streams: 0, draws: 0, drop_threshold, drop_scale, drop_tag, ..*self } == Self::PLAIN
    }

    /// Whether h is masked on its way into the recurrent product.
    pub fn is_masked(&self) -> bool {
        self.mask_scale != 0.0
    }

    /// Whether entries of what the layer hands up are dropped.
    pub fn drops(&self) -> bool {
        self.drop_scale != 0.0
    }

    fn has_zoneout(&self) -> bool {
        self.zoneout_h > 0.0 || self.zoneout_c > 0.0
    }

    fn is_random(&self) -> bool {
        self.is_masked() || self.drops() || (self.has_zoneout() && self.draws == 1)
    }

    fn check(&self, kernel: &'static str, lens: (usize, usize), rows: usize, hidden: usize) -> Result<(), ShapeError> {
        if self.peephole != NONE {
            multiple_of(kernel, "an offset", self.peephole, 4)?;
            at_least(kernel, "bias", lens.0, self.peephole as usize + PEEPHOLES * hidden)?;
        }
        if self.is_random() { at_least(kernel, "rows", lens.1, self.streams as usize + rows) } else { Ok(()) }
    }

    fn words(&self, purpose: Purpose, stream: u32, t: u32, block: usize) -> [u32; 4] {
        philox([block as u32, t, stream, tag(purpose, self.lane)], [self.key0, self.key1])
    }

    /// The mask of recurrent dropout for units `4 * block ..`; the same at every step.
    fn mask(&self, stream: u32, block: usize) -> [f32; 4] {
        self.words(Purpose::RecurrentDropout, stream, 0, block).map(|word| if word >= self.mask_threshold { self.mask_scale } else { 0.0 })
    }

    /// What units `4 * block ..` are multiplied by on their way up at step `t`.
    #[inline(always)]
    fn drop_mask(&self, stream: u32, t: u32, block: usize) -> [f32; 4] {
        let words = philox([block as u32, t, stream, self.drop_tag], [self.key0, self.key1]);
        words.map(|word| if word >= self.drop_threshold { self.drop_scale } else { 0.0 })
    }

    /// How much of the old value a unit keeps: 0 or 1 where zoneout draws, else the probability.
    fn kept(&self, purpose: Purpose, p: f32, stream: u32, t: u32, panel: usize) -> [f32; PANEL_UNITS] {
        let mut kept = [p; PANEL_UNITS];
        if self.draws == 1 && p > 0.0 {
            let threshold = (p * 4_294_967_296.0) as u32;
            for (block, kept) in kept.chunks_exact_mut(4).enumerate() {
                let words = self.words(purpose, stream, t, panel * PANEL_UNITS / 4 + block);
                kept.iter_mut().zip(words).for_each(|(kept, word)| *kept = f32::from(u8::from(word < threshold)));
            }
        }
        kept
    }
}

/// Rows of peephole weights: of i, f and o.
pub const PEEPHOLES: usize = 3;

/// Of one lane; both directions of a layer are one above the other.
fn step_grid(n_rows: u32, hidden: u32) -> [u32; 3] {
    [hidden / PANEL_UNITS as u32, n_rows.div_ceil(STEP_ROWS).max(1), 1]
}

/// Fails where a batch has more rows than the grid has workgroups for.
fn step_rows(kernel: &'static str, n_rows: u32) -> Result<(), ShapeError> {
    let most = STEP_ROWS * MAX_WORKGROUPS;
    if n_rows <= most {
        return Ok(());
    }
    Err(ShapeError { kernel, what: "rows (at most)".to_owned(), got: n_rows as usize, needed: most as usize })
}

/// A step kernel of two lanes in one launch: both directions of a layer, whose operands are the same spans at other offsets.
struct BothLanes<K> {
    lanes: [K; 2],
    /// An array of two structs as WGSL lays it out.
    params: Vec<u8>,
}

impl<K: Kernel + Pod> BothLanes<K> {
    fn new(lanes: [K; 2]) -> Self {
        let stride = size_of::<K>().next_multiple_of(16);
        let mut params = vec![0; 2 * stride];
        for (to, lane) in params.chunks_exact_mut(stride).zip(&lanes) {
            to[..size_of::<K>()].copy_from_slice(bytemuck::bytes_of(lane));
        }
        Self { lanes, params }
    }
}

impl<K: Kernel + Pod> Kernel for BothLanes<K> {
    fn name(&self) -> &'static str {
        self.lanes[0].name()
    }

    fn bindings(&self) -> &'static [Binding] {
        self.lanes[0].bindings()
    }

    fn params(&self) -> &[u8] {
        &self.params
    }

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        self.lanes.iter().try_for_each(|lane| lane.check(lens))
    }

    fn dispatch(&self, class: AdapterClass) -> Dispatch {
        let one = self.lanes[0].dispatch(class);
        Dispatch { grid: [one.grid[0], one.grid[1], 2], ..one }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        self.lanes.iter().for_each(|lane| lane.run(ctx, operands));
    }
}

/// Fails where what a layer hands up, or what it adds to that, leaves its operand.
fn check_output(kernel: &'static str, h_len: usize, output: u32, input_len: usize, input: u32, len: usize) -> Result<(), ShapeError> {
    for (name, operand_len, offset) in [("h", h_len, output), ("input", input_len, input)] {
        if offset != NONE {
            multiple_of(kernel, "an offset", offset, 4)?;
            at_least(kernel, name, operand_len, offset as usize + len)?;
        }
    }
    Ok(())
}

/// Row `row` of what lies at an offset, nothing where nothing does.
fn row_of(data: &[f32], offset: u32, row: usize, width: usize) -> &[f32] {
    if offset == NONE { &[] } else { &data[offset as usize + row * width..][..width] }
}

/// The gradient that a residual layer passes on to its input: that of its output, or none where a row has ended.
fn pass_on(has_ended: bool, dh_out: &[f32], dx: &mut [f32]) {
    if has_ended || dh_out.is_empty() {
        dx.fill(0.0);
    } else {
        dx.copy_from_slice(dh_out);
    }
}

/// The shader's variant: what the plain cell does not need is compiled in only where it is.
fn variant(is_plain: bool) -> &'static [(&'static str, f64)] {
    if is_plain { &[] } else { &[("OPTIONS", 1.0)] }
}

/// `(read, write)` parts of one buffer that do not overlap.
fn two_parts(data: &mut [f32], from: usize, to: usize, len: usize) -> (&mut [f32], &mut [f32]) {
    if from < to {
        let (a, b) = data.split_at_mut(to);
        (&mut a[from..from + len], &mut b[..len])
    } else {
        let (a, b) = data.split_at_mut(from);
        (&mut b[..len], &mut a[to..to + len])
    }
}

/// Parts of one buffer that do not overlap, in whatever order they lie: `(offset, length)` each.
fn parts<const N: usize>(data: &mut [f32], places: [(usize, usize); N]) -> [&mut [f32]; N] {
    data.get_disjoint_mut(places.map(|(at, len)| at..at + len)).expect("the plan lays what a step uses out apart")
}

const SUM_REASON: &str = "sums of up to 80 products of numbers below 1, then functions with errors of a few ulp";

/// Cells of the catalogue's cases: the plain one, each option alone, and all of them.
fn cells(hidden: u32) -> [(&'static str, Cell); 9] {
    let mask = Cell { mask_threshold: 1 << 30, mask_scale: 4.0 / 3.0, ..Cell::PLAIN };
    let peephole = Cell { peephole: 4, ..Cell::PLAIN };
    let zoneout = Cell { zoneout_h: 0.3, zoneout_c: 0.6, draws: 1, ..Cell::PLAIN };
    let drop = Cell { drop_threshold: 1 << 31, drop_scale: 2.0, drop_tag: 0x305, ..Cell::PLAIN };
    let all =
        Cell { coupled: 0, cell_clip: 0.4, grad_clip: 0.1, drop_threshold: 1 << 30, drop_scale: 4.0 / 3.0, drop_tag: 0x105, ..zoneout };
    let cells = [
        ("plain", Cell::PLAIN),
        ("peephole", peephole),
        ("coupled", Cell { coupled: 1, ..Cell::PLAIN }),
        ("clips", Cell { cell_clip: 0.5, grad_clip: 0.05, ..Cell::PLAIN }),
        ("zoneout", zoneout),
        ("expected zoneout", Cell { draws: 0, ..zoneout }),
        ("mask", mask),
        ("all", Cell { peephole: 4, mask_threshold: mask.mask_threshold, mask_scale: mask.mask_scale, ..all }),
        ("dropped output", drop),
    ];
    // Stream numbers behind as many lengths as any odd case has rows.
    cells.map(|(name, cell)| (name, Cell { key0: 17, key1: 23, lane: 3 + hidden, streams: 65, ..cell }))
}

/// Lengths of 0 to 4 and the stream numbers that the cell draws for.
fn case_rows(n_rows: u32, cell: &Cell) -> CaseOperand {
    let lengths = (0..n_rows.max(cell.streams)).map(|b| b * 7 % 5);
    let words: Vec<u32> = lengths.take(cell.streams.max(n_rows) as usize).chain((0..n_rows).map(|b| b * 1009 + 5)).collect();
    operand(words.len(), Fill::Words(words))
}
