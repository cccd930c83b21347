//! The network: embedding, stacked LSTM layers, head, loss; written once, over `dyn Backend`.
//!
//! A [`Model`] is one replica: parameters and gradients by bucket, and a workspace that grows with the largest share. A pass takes a [`Share`] of
//! a batch; whether gradients are wanted, and the dropout key, are in [`Pass`]. Nothing here knows workers, files or texts.

pub mod config;
pub mod init;
pub mod state;

use anyhow::{Context, Result, ensure};
use tracing::debug_span;

use self::config::{Input, LayerParams, ModelConfig, ModelParams, Output, Pooling, Reading};
use crate::backend::{Backend, BufferId, Limits, Span, read_now};
use crate::kernels::MAX_LOOP_TRIPS;
use crate::kernels::dropout::Dropout;
use crate::kernels::embedding::{EmbeddingGather, EmbeddingGradient, TokenIndex};
use crate::kernels::gemm::{Gemm, Matrix};
use crate::kernels::loss::{BinaryCrossEntropy, QuantileLoss, SoftmaxCrossEntropy, SquaredError};
use crate::kernels::lstm::{
    Cell, FLAG_NON_FINITE, Lane, LaneGradients, LanePart, LaneShape, LaneStarts, LaneTensors, LaneVectors, NONE, SweepArgs,
};
use crate::kernels::pooling::{ALL_STEPS, FIRST_STEP, LAST_STEP, PoolSteps, PoolStepsGradient};
use crate::kernels::reduce::{ColumnSums, Sum};
use crate::kernels::weight_drop::{WeightDrop, drop_numbers};
use crate::params::{Bucket, ParamTable};
use crate::rng::{Purpose, StepKey, tag};
use crate::shape::{ALIGN, GATES, PANEL, PANEL_UNITS, pad_inner, pad_units, round_up};
use crate::usage::UsageError;

/// Tokens or numbers, time-major.
#[derive(Clone, Copy, Debug)]
pub enum Words<'a> {
    /// `[T, B]`; as the targets of whole sequences `[B]`.
    Tokens(&'a [u32]),
    /// Inputs `[T, B, I]`, targets `[B, O]`, of notes `[T, B, N]`.
    Values(&'a [f32]),
}

/// A rank's part of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Share<'a> {
    /// T.
    pub n_steps: usize,
    /// B.
    pub n_rows: usize,
    pub input: Words<'a>,
    /// None where only the outputs are wanted.
    pub targets: Option<Words<'a>>,
    /// Of each term: `[T, B]` for classes and notes of steps, `[B]` for classes of sequences, `[B, O]` for values.
    pub weights: &'a [f32],
    /// Valid steps of each row `[B]`, from 0 to T; none: all steps of all rows. Behind a row's end nothing counts, whatever inputs and weights hold
    /// there (tokens must be of the vocabulary); a row of length 0 only fills up the batch and must have weight 0.
    pub lengths: Option<&'a [u32]>,
    /// Global stream or sample number of each row `[B]`: what dropout is drawn by.
    pub streams: &'a [u32],
    /// Carried state as [`state::Carried::rows`] gives it, h before c for every lane; none: zero, or the learned one.
    pub state: Option<&'a [f32]>,
    /// Gradient that comes in for the final state, laid out as `state`; none: zero, as where back-propagation is truncated.
    pub final_gradient: Option<&'a [f32]>,
    /// Multiplies the gradient: 1 over the global weight.
    pub scale: f32,
}

/// What a pass is for.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The step's key in training; none: nothing is drawn or dropped.
    pub key: Option<StepKey>,
    /// Gradients are computed, and added to those of this step's earlier parts if this is not the first.
    pub gradients: bool,
    /// Number of the part of the share: its loss goes to this word of [`Model::loss`]. The memory that the parts of a step need is reserved before
    /// the first of them, since what they gather does not outlive the workspace.
    pub part: usize,
}

/// The layer as which dropout of the inputs draws: far above all others.
const INPUT_LAYER: u32 = 1 << 15;
/// What a loss of one's own is held against: the outputs of a share's rows, a row a step where the model gives a class at every step, else one a
/// sequence.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'a> {
    /// `[rows, O]`: logits or numbers.
    pub outputs: &'a [f32],
    /// O.
    pub n_outputs: usize,
    /// `[rows]` classes, or `[rows, O]` numbers.
    pub targets: Words<'a>,
    /// Of each target; 0: it does not count.
    pub weights: &'a [f32],
}

/// A loss of one's own, in place of cross-entropy or the squared error. It is computed on the host, for which the outputs come back from the device
/// within each step.
pub trait Loss: Send + Sync {
    /// The loss, summed over the terms, each times its weight; into `gradient` (`[rows, O]`, zeros) goes that of the sum with respect to the outputs.
    fn loss(&self, scored: Scored<'_>, gradient: &mut [f32]) -> f64;
}

/// How long outputs may take to come back for a [`Loss`].
const OUTPUTS_DEADLINE: std::time::Duration = std::time::Duration::from_secs(300);

/// Parts a share may be cut into.
pub const MAX_PARTS: usize = 64;

/// Memory of one direction of a layer. Both directions lie in one buffer where the device can bind so much, so that they can share launches.
#[derive(Clone, Copy)]
struct Arena {
    buffer: BufferId,
    /// Floats of the buffer.
    len: usize,
    at: usize,
}

impl Arena {
    /// All of the buffer, which `start` is an offset in.
    fn whole(self) -> Span {
        front(self.buffer, self.len)
    }

    fn start(self) -> u32 {
        self.at as u32
    }

    /// The first words of this direction.
    fn front(self, len: usize) -> Span {
        self.whole().part(self.at, len)
    }
}

/// The memory of one layer in one direction for the largest share so far.
struct LaneBuffers {
    gates: Arena,
    h: Arena,
    c: Arena,
    /// The recurrent weights that a step keeps, and their gradient.
    dropped_weight: Option<(Arena, Option<Arena>)>,
    carry: Option<Arena>,
    dh: Option<Arena>,
}

struct Workspace {
    /// T x B and B that there is room for; layouts are made for each pass.
    n_places: usize,
    n_rows: usize,
    input: BufferId,
    embedded: Option<BufferId>,
    /// What the first layer reads where some of it is dropped.
    dropped_input: Option<BufferId>,
    index: Option<BufferId>,
    /// Lengths, then from [`streams_at`] on stream numbers.
    rows: BufferId,
    targets: BufferId,
    weights: BufferId,
    lanes: Vec<LaneBuffers>,
    /// What the head reads of whole sequences where that is not a state, then its gradient, by direction.
    pooled: Vec<BufferId>,
    outputs: BufferId,
    row_loss: BufferId,
    /// Gradients on their way down, by direction: a set for what comes from above and one for what goes below.
    flow: Option<Vec<Arena>>,
}

impl Workspace {
    fn buffers(self) -> impl Iterator<Item = BufferId> {
        let of_lane = |l: LaneBuffers| {
            let weights = l.dropped_weight.map(|(weight, gradient)| [Some(weight), gradient]);
            [Some(l.gates), Some(l.h), Some(l.c), l.carry, l.dh].into_iter().chain(weights.into_iter().flatten()).flatten()
        };
        // A buffer is its first arena's.
        let buffer_of = |arena: Arena| (arena.at == 0).then_some(arena.buffer);
        let others = [self.input, self.rows, self.targets, self.weights, self.outputs, self.row_loss];
        let arenas = self.lanes.into_iter().flat_map(of_lane).chain(self.flow.into_iter().flatten()).filter_map(buffer_of);
        arenas.chain(others).chain(self.pooled).chain(self.dropped_input).chain(self.embedded).chain(self.index)
    }
}

/// What a layer reads or hands up: a part for each direction, `[T, B, width]`.
type Parts = [Option<LanePart>; 2];

/// One replica of a network on one backend.
pub struct Model {
    config: ModelConfig,
    table: ParamTable,
    at: ModelParams,
    params: Vec<BufferId>,
    grads: Vec<BufferId>,
    flags: BufferId,
    loss: BufferId,
    /// The levels of quantiles.
    levels: Option<BufferId>,
    workspace: Option<Workspace>,
    token_index: TokenIndex,
    padded: Vec<f32>,
    own_loss: Option<std::sync::Arc<dyn Loss>>,
    /// Memory for a pass.
    lanes: Vec<Lane>,
    /// The embedding's gradient is zero but for the rows of the last pass with gradients.
    sparse_embedding: bool,
}

/// Where the gradient of an embedding is not zero.
pub struct EmbeddingRows {
    pub bucket: usize,
    /// Where row 0 starts in the bucket, floats of a row, and how many rows there are.
    pub rows: u32,
    pub width: u32,
    pub n_distinct: u32,
    /// Their numbers, rising.
    pub index: Span,
}

/// Where stream numbers start behind the lengths of this many rows: a bound span begins at a multiple of 64.
const fn streams_at(n_rows: usize) -> usize {
    round_up(n_rows, ALIGN)
}

/// Refuses a buffer that the device cannot hold or bind.
fn fits(limits: Limits, label: &str, len: usize, lower: &str) -> Result<(), UsageError> {
    let bytes = len as u64 * 4;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    for (limit, name) in [(limits.max_binding_bytes, "storage buffer binding"), (limits.max_buffer_bytes, "buffer")] {
        UsageError::unless(bytes <= limit, || {
            format!("{label} needs {} MiB, above this device's largest {name} of {} MiB: lower {lower}", mib(bytes), mib(limit))
        })?;
    }
    Ok(())
}

impl Model {
    /// A replica with all parameters zero.
    ///
    /// # Errors
    /// Sizes that contradict each other; a tensor beyond the device's limits (both numbers, and what to lower).
    pub fn new(config: ModelConfig, backend: &mut dyn Backend) -> Result<Self> {
        config.check()?;
        let (table, at) = config.params();
        let limits = backend.limits();
        for bucket in table.buckets() {
            let name = &table.tensors()[bucket.tensors.start].name;
            fits(
                limits,
                name,
                bucket.range.len(),
                if name.starts_with("lstm.") { "--hidden" } else { "--vocab, --embedding or --hidden" },
            )?;
        }
        let mut alloc = |what: &str| -> Result<Vec<BufferId>> {
            table.buckets().iter().enumerate().map(|(i, b)| backend.alloc(&format!("{what} bucket {i}"), b.range.len())).collect()
        };
        let (params, grads) = (alloc("parameter")?, alloc("gradient")?);
        let flags = backend.alloc("flags", ALIGN)?;
        let loss = backend.alloc("loss", MAX_PARTS.max(ALIGN))?;
        let levels = match &config.output {
            Output::Quantiles { levels, .. } => {
                let buffer = backend.alloc("levels", ALIGN)?;
                let values: Vec<f32> = levels.values().map(|level| level as f32).collect();
                backend.write(front(buffer, values.len()), &values)?;
                Some(buffer)
            }
            _ => None,
        };
        let token_index = TokenIndex::default();
        Ok(Self {
            config,
            table,
            at,
            params,
            grads,
            flags,
            loss,
            levels,
            workspace: None,
            token_index,
            padded: Vec::new(),
            lanes: Vec::new(),
            sparse_embedding: false,
            own_loss: None,
        })
    }

    /// Puts a loss of one's own in the place of the output's.
    pub fn set_loss(&mut self, loss: std::sync::Arc<dyn Loss>) {
        self.own_loss = Some(loss);
    }

    /// Whether from now on only rows of the embedding's gradient are cleared that the last pass wrote, and [`Self::embedding_rows`] names those
    /// that are not zero. For the CPU, as long as nobody else has written to the gradients and a step is one pass; once it is not so, it must not
    /// be asked for again. Without an embedding of its own nothing changes.
    pub fn keep_embedding_sparse(&mut self, wanted: bool) {
        self.sparse_embedding = wanted && self.at.embedding.is_some() && !self.config.tied;
    }

    /// After a pass with gradients, if [`Self::keep_embedding_sparse`] holds.
    pub fn embedding_rows(&self) -> Option<EmbeddingRows> {
        let (embedding, index) = (self.at.embedding?, self.workspace.as_ref()?.index?);
        let (tensor, width) = (&self.table.tensors()[embedding], self.embedding_width()?);
        let n_distinct = self.token_index.n_distinct;
        self.sparse_embedding.then(|| EmbeddingRows {
            bucket: tensor.bucket,
            rows: tensor.offset as u32,
            width: width as u32,
            n_distinct,
            index: front(index, n_distinct as usize),
        })
    }

    /// Floats of a row of the embedding.
    fn embedding_width(&self) -> Option<usize> {
        match self.config.input {
            Input::Tokens { width, .. } => Some(pad_units(width)),
            Input::Values { .. } => None,
        }
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// The parameters' buffers, by bucket.
    pub fn params(&self) -> &[BufferId] {
        &self.params
    }

    /// The gradients' buffers, by bucket, laid out as the parameters'.
    pub fn grads(&self) -> &[BufferId] {
        &self.grads
    }

    /// Makes a gradient buffer, which holds new parameters, the parameters' buffer of that bucket, and the other way round.
    pub fn swap_bucket(&mut self, bucket: usize) {
        std::mem::swap(&mut self.params[bucket], &mut self.grads[bucket]);
    }

    /// The words where each part's loss, a sum over its terms, stands after a pass.
    pub fn loss(&self, n_parts: usize) -> Span {
        Span { buffer: self.loss, offset: 0, len: n_parts }
    }

    /// The word that is not 0 after something was not finite; [`Self::lower_flags`] sets it back.
    pub fn flag(&self) -> Span {
        Span { buffer: self.flags, offset: FLAG_NON_FINITE, len: 1 }
    }

    /// Clears the non-finite flag.
    ///
    /// # Errors
    /// The backend's.
    pub fn lower_flags(&self, backend: &mut dyn Backend) -> Result<()> {
        backend.clear(Span { buffer: self.flags, offset: 0, len: ALIGN })
    }

    /// Writes parameters, tensors in the table's order, each in PyTorch's.
    ///
    /// # Errors
    /// The backend's.
    pub fn write_params(&mut self, backend: &mut dyn Backend, values: &[Vec<f32>]) -> Result<()> {
        write_buckets(&self.table, backend, &self.params, values)
    }

    /// Reads parameters back, tensors in the table's order, each in PyTorch's.
    ///
    /// # Errors
    /// The backend's.
    pub fn read_params(&self, backend: &mut dyn Backend, deadline: std::time::Duration) -> Result<Vec<Vec<f32>>> {
        read_buckets(&self.table, backend, &self.params, deadline)
    }

    /// The sizes of a lane, a layer in one direction.
    fn shape(&self, lane: usize) -> LaneShape {
        self.config.lane_shape(lane / self.config.n_directions())
    }

    /// Floats of one direction's outputs of `layer`, padded.
    fn width_of(&self, layer: usize) -> usize {
        self.config.lane_shape(layer).width as usize
    }

    /// Floats of one direction of what the head reads, padded.
    fn top_width(&self) -> usize {
        self.width_of(self.config.n_layers - 1)
    }

    /// Whether a lane, a layer in one direction, runs backwards in time.
    fn is_reverse(&self, lane: usize) -> bool {
        lane % self.config.n_directions() == 1
    }

    /// The final state's spans after a pass over this many steps and rows, in the order of [`Share::state`].
    pub fn final_state(&self, n_steps: usize, n_rows: usize) -> Vec<Span> {
        let Some(w) = &self.workspace else { return Vec::new() };
        let last = |lane: usize| if self.is_reverse(lane) { 0 } else { n_steps };
        let spans = w.lanes.iter().enumerate().flat_map(|(i, lane)| {
            let shape = self.shape(i);
            [(lane.h, shape.width), (lane.c, shape.hidden)].map(|(arena, width)| {
                let len = n_rows * width as usize;
                arena.whole().part(arena.at + last(i) * len, len)
            })
        });
        spans.collect()
    }

    /// The activated gates that a forward pass over this many steps and rows has left, by lane, by gate: `[T, B, H]` without padding and without the
    /// steps of rows that had ended. A backward pass overwrites them.
    ///
    /// # Errors
    /// The backend's.
    pub fn read_gates(
        &self,
        backend: &mut dyn Backend,
        n_steps: usize,
        n_rows: usize,
        deadline: std::time::Duration,
    ) -> Result<Vec<[Vec<f32>; GATES]>> {
        let Some(workspace) = &self.workspace else { return Ok(Vec::new()) };
        let mut of_lanes = Vec::with_capacity(workspace.lanes.len());
        let mut words = Vec::new();
        for (idx, lane) in workspace.lanes.iter().enumerate() {
            let shape = self.config.lane_shape(idx / self.config.n_directions());
            let width = GATES * shape.hidden as usize;
            words = backend.read(&[lane.gates.front(n_steps * n_rows * width)], words)?.wait(deadline)?;
            let mut gates: [Vec<f32>; GATES] = Default::default();
            // A gate is zero only where there is none.
            for row in words.chunks_exact(width).filter(|row| row.iter().any(|&gate| gate != 0.0)) {
                for (gate, values) in gates.iter_mut().enumerate() {
                    let place = |unit: usize| unit / PANEL_UNITS * PANEL + gate * PANEL_UNITS + unit % PANEL_UNITS;
                    values.extend((0..shape.units as usize).map(|unit| row[place(unit)]));
                }
            }
            of_lanes.push(gates);
        }
        Ok(of_lanes)
    }

    /// The cell states that a forward pass over this many steps and rows has left, by lane: `[T, B, H]` without padding, after each step.
    ///
    /// # Errors
    /// The backend's.
    pub fn read_cells(
        &self,
        backend: &mut dyn Backend,
        n_steps: usize,
        n_rows: usize,
        deadline: std::time::Duration,
    ) -> Result<Vec<Vec<f32>>> {
        let Some(workspace) = &self.workspace else { return Ok(Vec::new()) };
        let mut of_lanes = Vec::with_capacity(workspace.lanes.len());
        for (idx, lane) in workspace.lanes.iter().enumerate() {
            let shape = self.shape(idx);
            let width = shape.hidden as usize;
            let len = n_steps * n_rows * width;
            // States follow on the initial one, in reverse they lie before it.
            let first = if self.is_reverse(idx) { 0 } else { n_rows * width };
            let words = backend.read(&[lane.c.front(first + len)], Vec::new())?.wait(deadline)?;
            let rows = words[first..].chunks_exact(width);
            of_lanes.push(rows.flat_map(|row| row[..shape.units as usize].iter().copied()).collect());
        }
        Ok(of_lanes)
    }

    /// Where the gradient of the initial state lies after a pass with gradients, in the order of [`Share::state`]: what
    /// [`Share::final_gradient`] of the window before takes.
    pub fn initial_gradient(&self, n_rows: usize) -> Vec<Span> {
        let Some(w) = &self.workspace else { return Vec::new() };
        let carries = w.lanes.iter().enumerate().filter_map(|(i, lane)| lane.carry.map(|carry| (self.shape(i), carry)));
        carries.map(|(shape, carry)| carry.front(n_rows * (shape.width + shape.hidden) as usize)).collect()
    }

    /// Outputs after a forward pass without targets: `[rows, columns]`, and the floats from row to row. Rows are `T x B` for classes and notes of steps, else `B`.
    pub fn outputs(&self, n_steps: usize, n_rows: usize) -> (Span, usize) {
        let stride = pad_inner(self.config.n_outputs());
        let rows = self.output_rows(n_steps, n_rows);
        let buffer = self.workspace.as_ref().map_or(self.loss, |w| w.outputs);
        (Span { buffer, offset: 0, len: rows * stride }, stride)
    }

    fn output_rows(&self, n_steps: usize, n_rows: usize) -> usize {
        if self.config.reading() == Reading::Steps { n_steps * n_rows } else { n_rows }
    }

    /// Makes room for shares up to this size; what there is stays if it is large enough.
    ///
    /// # Errors
    /// A buffer beyond the device's limits or memory.
    pub fn reserve(&mut self, backend: &mut dyn Backend, n_steps: usize, n_rows: usize, gradients: bool) -> Result<()> {
        let fits_in = |w: &Workspace| w.n_places >= n_steps * n_rows && w.n_rows >= n_rows && (w.flow.is_some() || !gradients);
        if self.workspace.as_ref().is_some_and(fits_in) {
            return Ok(());
        }
        let (mut tb, mut b, mut gradients) = (n_steps * n_rows, n_rows, gradients);
        if let Some(old) = self.workspace.take() {
            (tb, b, gradients) = (tb.max(old.n_places), b.max(old.n_rows), gradients || old.flow.is_some());
            old.buffers().for_each(|id| backend.free(id));
        }
        let mut taken = Vec::new();
        let workspace = self.workspace(backend, tb, b, gradients, &mut taken);
        if workspace.is_err() {
            // Of what does not fit as a whole nothing is kept.
            taken.into_iter().for_each(|id| backend.free(id));
        }
        self.workspace = Some(workspace?);
        Ok(())
    }

    /// Gives the memory of shares back, until the next one needs some.
    pub fn release(&mut self, backend: &mut dyn Backend) {
        self.workspace.take().into_iter().flat_map(Workspace::buffers).for_each(|id| backend.free(id));
    }

    /// The buffers for `tb` places in `b` rows; `taken` are those that are there, also where others could not be had.
    fn workspace(&self, backend: &mut dyn Backend, tb: usize, b: usize, gradients: bool, taken: &mut Vec<BufferId>) -> Result<Workspace> {
        let limits = backend.limits();
        let mut alloc = |label: &str, len: usize| -> Result<BufferId> {
            fits(limits, label, len, "--batch-size, --eval-batch-size, --seq-len or --hidden, or give more parts with --accumulate")?;
            let id = backend.alloc(label, round_up(len.max(1), ALIGN))?;
            taken.push(id);
            Ok(id)
        };
        let out_stride = pad_inner(self.config.n_outputs());
        let rows = if self.config.reading() == Reading::Steps { tb } else { b };
        let (input, embedded, index) = match self.config.input {
            Input::Tokens { vocabulary, width } => (
                alloc("tokens", tb)?,
                Some(alloc("embedded tokens", tb * pad_units(width))?),
                gradients.then(|| alloc("token index", TokenIndex::max_words(tb, vocabulary))).transpose()?,
            ),
            Input::Values { n_features } => (alloc("inputs", tb * pad_inner(n_features))?, None, None),
        };
        let input_width = self.config.layer_input(0).padded_len();
        let dropped_input = (self.config.lstm.input_dropout > 0.0).then(|| alloc("dropped inputs", tb * input_width)).transpose()?;
        let n_targets = rows * self.config.n_targets();
        let n_pooled = if matches!(self.config.reading(), Reading::Pooled(_)) { self.config.n_directions() } else { 0 };
        let n = self.config.n_directions();
        // Memory of both directions of a layer.
        let mut arenas = |label: &str, len: usize| -> Result<Vec<Arena>> {
            let each = round_up(len.max(1), ALIGN);
            if n * each * 4 <= limits.max_binding_bytes.min(limits.max_buffer_bytes) as usize {
                let buffer = alloc(label, n * each)?;
                return Ok((0..n).map(|direction| Arena { buffer, len: n * each, at: direction * each }).collect());
            }
            (0..n).map(|_| Ok(Arena { buffer: alloc(label, each)?, len: each, at: 0 })).collect()
        };
        let mut lanes = Vec::with_capacity(self.config.n_lanes());
        for layer in 0..self.config.n_layers {
            let shape = self.config.lane_shape(layer);
            let drops = self.config.lstm.weight_drop > 0.0;
            let mut wanted = |label: &str, is_wanted: bool, len: usize| if is_wanted { arenas(label, len) } else { Ok(Vec::new()) };
            let gates = wanted("gates", true, shape.gates_len(tb))?;
            let h = wanted("hidden states", true, shape.h_len(tb, b))?;
            let c = wanted("cell states", true, shape.c_len(tb, b))?;
            let kept = wanted("kept recurrent weights", drops, recurrent_len(shape))?;
            let kept_gradients = wanted("gradients of kept recurrent weights", drops && gradients, recurrent_len(shape))?;
            let carry = wanted("carried gradients", gradients, shape.carry_len(b))?;
            let dh = wanted("gradients of hidden states", gradients && shape.dh_len(tb) > 0, shape.dh_len(tb))?;
            lanes.extend((0..n).map(|direction| LaneBuffers {
                gates: gates[direction],
                h: h[direction],
                c: c[direction],
                dropped_weight: kept.get(direction).map(|&kept| (kept, kept_gradients.get(direction).copied())),
                carry: carry.get(direction).copied(),
                dh: dh.get(direction).copied(),
            }));
        }
        let of_layer = |l| {
            let input = self.config.layer_input(l);
            (input.padded_len() / input.groups).max(self.width_of(l))
        };
        let widest = (0..self.config.n_layers).map(of_layer).max().unwrap_or(0);
        let flow = gradients
            .then(|| -> Result<Vec<Arena>> {
                Ok([arenas("gradients of states", tb * widest)?, arenas("gradients of states", tb * widest)?].concat())
            })
            .transpose()?;
        Ok(Workspace {
            n_places: tb,
            n_rows: b,
            input,
            embedded,
            dropped_input,
            index,
            rows: alloc("lengths and stream numbers", streams_at(b) + b)?,
            targets: alloc("targets", n_targets)?,
            weights: alloc("weights", rows * self.config.n_terms())?,
            lanes,
            pooled: (0..n_pooled).map(|_| alloc("pooled outputs", b * self.top_width())).collect::<Result<_>>()?,
            outputs: alloc("outputs", rows * out_stride)?,
            row_loss: alloc("losses", rows)?,
            flow,
        })
    }

    /// Forward, and backward where the pass wants gradients. `ready(backend, bucket)` is called as each bucket's gradient is complete, last bucket first.
    ///
    /// # Errors
    /// The backend's; a share that contradicts the model (a bug of the caller's or a token outside the vocabulary).
    pub fn run(
        &mut self,
        backend: &mut dyn Backend,
        share: &Share<'_>,
        pass: Pass,
        ready: &mut dyn FnMut(&mut dyn Backend, usize, Span) -> Result<()>,
    ) -> Result<()> {
        ensure!(pass.part < MAX_PARTS, "a share is cut into at most {MAX_PARTS} parts, not {}", pass.part + 1);
        if share.n_rows == 0 || share.n_steps == 0 {
            return self.run_empty(backend, pass, ready);
        }
        self.reserve(backend, share.n_steps, share.n_rows, pass.gradients)?;
        debug_span!("upload").in_scope(|| self.upload(backend, share, pass))?;
        let workspace = self.workspace.take().context("the workspace was just reserved")?;
        let memory = std::mem::take(&mut self.lanes);
        let forward = debug_span!("forward").in_scope(|| self.forward(backend, &workspace, share, pass, memory));
        let done = forward.and_then(|mut forward| {
            if share.targets.is_some() {
                debug_span!("loss").in_scope(|| self.loss_of(backend, &workspace, share, pass))?;
            }
            if pass.gradients {
                debug_span!("backward").in_scope(|| self.backward(backend, &workspace, share, pass, &mut forward, ready))?;
            }
            self.lanes = forward.lanes;
            Ok(())
        });
        self.workspace = Some(workspace);
        done
    }

    /// A share without rows: a loss of zero, gradients of zero.
    fn run_empty(
        &mut self,
        backend: &mut dyn Backend,
        pass: Pass,
        ready: &mut dyn FnMut(&mut dyn Backend, usize, Span) -> Result<()>,
    ) -> Result<()> {
        backend.clear(Span { buffer: self.loss, offset: pass.part, len: 1 })?;
        if pass.gradients {
            for bucket in (0..self.grads.len()).rev() {
                let span = backend.whole(self.grads[bucket]);
                if pass.part == 0 {
                    backend.clear(span)?;
                }
                ready(backend, bucket, span)?;
            }
        }
        Ok(())
    }

    fn upload(&mut self, backend: &mut dyn Backend, share: &Share<'_>, pass: Pass) -> Result<()> {
        let w = self.workspace.as_ref().context("a workspace is reserved first")?;
        let (t, b) = (share.n_steps, share.n_rows);
        let at = front;
        match (self.config.input, share.input) {
            (Input::Tokens { vocabulary, .. }, Words::Tokens(tokens)) => {
                ensure!(tokens.len() == t * b, "{} tokens for {t} steps of {b} rows", tokens.len());
                if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
                    anyhow::bail!("token {token} is outside the vocabulary of {vocabulary}");
                }
                backend.write(at(w.input, t * b), bytemuck::cast_slice(tokens))?;
                if let (true, Some(index)) = (pass.gradients, w.index) {
                    if let (true, Some(embedding), Some(width)) = (self.sparse_embedding, self.at.embedding, self.embedding_width()) {
                        let (span, offset) = self.place(backend, &self.grads, embedding);
                        for &token in self.token_index.tokens() {
                            backend.clear(span.part(offset as usize + token as usize * width, width))?;
                        }
                    }
                    self.token_index.rebuild(tokens, vocabulary);
                    let words = self.token_index.words();
                    backend.write(at(index, words.len()), bytemuck::cast_slice(words))?;
                }
            }
            (Input::Values { n_features }, Words::Values(values)) => {
                ensure!(values.len() == t * b * n_features, "{} numbers for {t} steps of {b} rows of {n_features}", values.len());
                let padded = pad_inner(n_features);
                self.padded.clear();
                for (place, row) in values.chunks_exact(n_features).enumerate() {
                    if is_valid(share, place) {
                        self.padded.extend_from_slice(row);
                    }
                    self.padded.resize((place + 1) * padded, 0.0);
                }
                backend.write(at(w.input, self.padded.len()), &self.padded)?;
            }
            _ => anyhow::bail!("the share's inputs are not of the kind that the model reads"),
        }
        if let Some(lengths) = share.lengths {
            ensure!(lengths.len() == b, "{} lengths for {b} rows", lengths.len());
            if let Some(length) = lengths.iter().find(|&&length| length as usize > t) {
                anyhow::bail!("a row has {length} valid steps of {t}");
            }
            backend.write(at(w.rows, b), bytemuck::cast_slice(lengths))?;
        }
        backend.write(streams(w, b), bytemuck::cast_slice(share.streams))?;
        if let Some(targets) = share.targets {
            let words: &[f32] = match (self.config.output, targets) {
                (Output::Classes { n_classes } | Output::Label { n_classes, .. }, Words::Tokens(targets)) => {
                    if let Some(&class) = targets.iter().find(|&&class| class as usize >= n_classes) {
                        anyhow::bail!("target {class} is outside the {n_classes} classes");
                    }
                    bytemuck::cast_slice(targets)
                }
                (Output::Values { .. } | Output::Notes { .. } | Output::Quantiles { .. }, Words::Values(targets)) => targets,
                _ => anyhow::bail!("the share's targets are not of the kind that the model gives"),
            };
            let rows = self.output_rows(t, b);
            let (n_targets, n_terms) = (rows * self.config.n_targets(), rows * self.config.n_terms());
            ensure!(words.len() == n_targets, "{} targets instead of {n_targets}", words.len());
            ensure!(share.weights.len() == n_terms, "{} weights for {n_terms} terms", share.weights.len());
            backend.write(at(w.targets, words.len()), words)?;
            let mut weights = share.weights;
            if share.lengths.is_some() && self.config.reading() == Reading::Steps {
                self.padded.clear();
                self.padded.extend(weights.iter().enumerate().map(|(place, &weight)| if is_valid(share, place) { weight } else { 0.0 }));
                weights = &self.padded;
            }
            backend.write(at(w.weights, n_terms), weights)?;
        }
        let mut given = share.state;
        for (i, lane) in w.lanes.iter().enumerate() {
            let learned = self.at.lanes[i].initial.map(|(h, c)| [h, c]);
            let (first, shape) = (if self.is_reverse(i) { t } else { 0 }, self.shape(i));
            for (which, (arena, width)) in [(lane.h, shape.width), (lane.c, shape.hidden)].into_iter().enumerate() {
                let (width, len) = (width as usize, b * width as usize);
                let to = arena.whole().part(arena.at + first * len, len);
                match (&mut given, learned) {
                    (Some(given), _) => {
                        let (state, rest) = given.split_at_checked(len).context("the carried state ends before the model's layers do")?;
                        backend.write(to, state)?;
                        *given = rest;
                    }
                    (None, Some(learned)) => self.spread(backend, learned[which], arena.whole(), to.offset, [b, width])?,
                    (None, None) => backend.clear(to)?,
                }
            }
        }
        Ok(())
    }

    /// Copies a vector of units to every row of the state at `start`: a product without terms, and the vector as its bias.
    fn spread(&self, backend: &mut dyn Backend, tensor: usize, to: Span, start: usize, [n_rows, hidden]: [usize; 2]) -> Result<()> {
        let (span, offset) = self.place(backend, &self.params, tensor);
        let kernel = Gemm {
            m: n_rows as u32,
            n: hidden as u32,
            k: 0,
            trans_a: 0,
            trans_b: 0,
            accumulate: 0,
            use_bias: 1,
            bias_offset: offset,
            a: Matrix::row_major(0, hidden),
            b: Matrix::row_major(0, hidden),
            c: Matrix::row_major(start, hidden),
        };
        backend.launch(&kernel, &[span, span, span, to])
    }

    /// What makes the cell of a lane in this pass.
    fn cell(&self, lane: usize, pass: Pass) -> Cell {
        let c = &self.config.lstm;
        let plain = Cell {
            coupled: u32::from(c.coupled_gates),
            cell_clip: c.cell_clip as f32,
            grad_clip: c.recurrent_grad_clip as f32,
            zoneout_h: c.zoneout_h as f32,
            zoneout_c: c.zoneout_c as f32,
            lane: lane as u32,
            ..Cell::PLAIN
        };
        let Some(key) = pass.key else { return plain };
        let mut cell = Cell { draws: u32::from(c.zoneout_h > 0.0 || c.zoneout_c > 0.0), key0: key.0[0], key1: key.0[1], ..plain };
        if c.recurrent_dropout > 0.0 {
            (cell.mask_threshold, cell.mask_scale) = drop_numbers(c.recurrent_dropout);
        }
        let n = self.config.n_directions();
        let (layer, direction) = (lane / n, lane % n);
        let dropped = self.config.dropout_above(layer);
        if dropped > 0.0 {
            (cell.drop_threshold, cell.drop_scale) = drop_numbers(dropped);
            // The reverse direction draws as a layer far above all others.
            cell.drop_tag = tag(Purpose::Dropout, (layer | direction << 16) as u32);
        }
        cell
    }

    /// A lane over the whole share.
    fn lane(&self, backend: &dyn Backend, w: &Workspace, i: usize, share: &Share<'_>, pass: Pass, x: Parts) -> Lane {
        let (t, b) = (share.n_steps, share.n_rows);
        let buffers = &w.lanes[i];
        let cell = Cell { streams: streams_at(b) as u32, ..self.cell(i, pass) };
        let n = self.config.n_directions();
        let residual = self.config.is_residual(i / n).then_some(i % n);
        let shape = LaneShape { masks: cell.is_masked(), outputs: cell.drops() || residual.is_some(), ..self.shape(i) };
        let mut tensors = self.lane_tensors(backend, i, &self.params);
        if let (Some(_), Some((kept, _))) = (pass.key, buffers.dropped_weight) {
            tensors.weight_hh = (kept.whole(), kept.start());
        }
        Lane {
            shape,
            n_steps: t as u32,
            reverse: self.is_reverse(i),
            tensors,
            x,
            starts: LaneStarts {
                gates: buffers.gates.start(),
                h: buffers.h.start(),
                c: buffers.c.start(),
                carry: buffers.carry.map_or(0, Arena::start),
                dh: buffers.dh.map_or(0, Arena::start),
            },
            gates: buffers.gates.whole(),
            residual,
            h: buffers.h.whole(),
            c: buffers.c.whole(),
            range: 0..t as u32,
            rows: Some(front(w.rows, streams_at(b) + b)),
            use_lengths: share.lengths.is_some(),
            cell,
            backward: None,
        }
    }

    fn lane_tensors(&self, backend: &dyn Backend, lane: usize, buckets: &[BufferId]) -> LaneTensors {
        let LayerParams { weight_ih, weight_hh, weight_hr, biases, peephole, norms, .. } = self.at.lanes[lane];
        let at = |tensor: usize| self.place(backend, buckets, tensor);
        let vectors = biases.map(|(ih, _)| ih).or(peephole).or(norms.map(|[ih, ..]| ih)).map(|first| {
            let offset = |tensor: Option<usize>| tensor.map_or(NONE, |tensor| at(tensor).1);
            let [norm_ih, norm_hh, norm_c] = norms.map_or([None; 3], |norms| norms.map(Some)).map(offset);
            let (bias_ih, bias_hh) = (offset(biases.map(|(ih, _)| ih)), offset(biases.map(|(_, hh)| hh)));
            LaneVectors { span: at(first).0, bias_ih, bias_hh, peephole: offset(peephole), norm_ih, norm_hh, norm_c }
        });
        LaneTensors { weight_ih: at(weight_ih), weight_hh: at(weight_hh), weight_hr: weight_hr.map(at), vectors }
    }

    /// The bucket that a tensor lies in and where it starts there.
    fn place(&self, backend: &dyn Backend, buckets: &[BufferId], tensor: usize) -> (Span, u32) {
        let tensor = &self.table.tensors()[tensor];
        (backend.whole(buckets[tensor.bucket]), tensor.offset as u32)
    }

    /// Lanes of a layer.
    fn lanes_of(&self, layer: usize) -> std::ops::Range<usize> {
        let n = self.config.n_directions();
        layer * n..(layer + 1) * n
    }

    /// Keeps the recurrent weights that this step has, or the gradients of those.
    fn drop_weight(&self, backend: &mut dyn Backend, lane: usize, key: StepKey, (from, start): (Span, u32), to: (Span, u32)) -> Result<()> {
        let len = recurrent_len(self.shape(lane)) as u32;
        let kernel = WeightDrop::new(self.config.lstm.weight_drop, key, lane as u32, len, start, to.1);
        backend.launch(&kernel, &[from, to.0])
    }

    /// Dropout of what the first layer reads, or of its gradient.
    fn drop_input(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, key: StepKey, from: Span, to: Span) -> Result<()> {
        let sizes = [share.n_steps as u32, share.n_rows as u32, self.config.layer_input(0).padded_len() as u32];
        let kernel = Dropout::new(self.config.lstm.input_dropout, key, INPUT_LAYER, sizes, 0, 0);
        backend.launch(&kernel, &[streams(w, share.n_rows), from, to])
    }

    fn forward(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, pass: Pass, memory: Vec<Lane>) -> Result<Forward> {
        let (t, b) = (share.n_steps, share.n_rows);
        let inputs = self.config.layer_input(0).padded_len();
        let mut x: Parts = [Some(LanePart { span: front(w.input, t * b * inputs), offset: 0, width: inputs as u32 }), None];
        if let (Input::Tokens { vocabulary, width }, Some(embedded), Some(table)) = (self.config.input, w.embedded, self.at.embedding) {
            let width = pad_units(width);
            let (span, offset) = self.place(backend, &self.params, table);
            let out = front(embedded, t * b * width);
            let kernel =
                EmbeddingGather { n_tokens: (t * b) as u32, width: width as u32, n_classes: vocabulary as u32, table: offset, out: 0 };
            backend.launch(&kernel, &[front(w.input, t * b), span, out])?;
            x = [Some(LanePart { span: out, offset: 0, width: width as u32 }), None];
        }
        if let (Some(key), Some(buffer), Some(input)) = (pass.key, w.dropped_input, x[0]) {
            let out = front(buffer, t * b * inputs);
            self.drop_input(backend, w, share, key, input.span, out)?;
            x = [Some(LanePart { span: out, offset: 0, width: input.width }), None];
        }
        let mut lanes = memory;
        lanes.clear();
        for l in 0..self.config.n_layers {
            let of_layer = self.lanes_of(l);
            for i in of_layer.clone() {
                if let (Some(key), Some((kept, _))) = (pass.key, w.lanes[i].dropped_weight) {
                    let from = self.place(backend, &self.params, self.at.lanes[i].weight_hh);
                    self.drop_weight(backend, i, key, from, (kept.whole(), kept.start()))?;
                }
                lanes.push(self.lane(backend, w, i, share, pass, x));
            }
            let flags = front(self.flags, ALIGN);
            backend.sweep(&SweepArgs { n_rows: b as u32, lanes: &lanes[of_layer.clone()], flags, gradients: false })?;
            let mut above: Parts = [None; 2];
            let width = self.width_of(l);
            for (direction, i) in of_layer.enumerate() {
                // Where there is nothing else to hand up: the states after the first, in reverse those before the last.
                let offset = match lanes[i].shape {
                    shape if shape.outputs => shape.outputs_at(t * b, b),
                    _ if self.is_reverse(i) => 0,
                    _ => b * width,
                };
                above[direction] = Some(LanePart { span: lanes[i].h, offset: lanes[i].starts.h + offset as u32, width: width as u32 });
            }
            x = above;
        }
        if let Reading::Pooled(pooling) = self.config.reading() {
            x = self.pool(backend, w, share, pooling, x)?;
        }
        let (weight, weight_at) = self.place(backend, &self.params, self.at.head_weight);
        let (bias, bias_at) = self.place(backend, &self.params, self.at.head_bias);
        let stride = pad_inner(self.config.n_outputs());
        let (rows, width) = (self.output_rows(t, b), self.top_width());
        for (column, part) in x.iter().flatten().enumerate().map(|(direction, part)| (direction * width, part)) {
            let product = Gemm {
                m: rows as u32,
                n: stride as u32,
                k: width as u32,
                trans_a: 0,
                trans_b: 1,
                accumulate: u32::from(column > 0),
                use_bias: u32::from(column == 0),
                bias_offset: bias_at,
                a: Matrix::row_major(part.offset as usize + self.head_row(share, column > 0) * width, width),
                b: Matrix::row_major(weight_at as usize + column, width * self.config.n_directions()),
                c: Matrix::row_major(0, stride),
            };
            backend.launch(&product, &[part.span, weight, bias, front(w.outputs, rows * stride)])?;
        }
        Ok(Forward { lanes, top: x })
    }

    /// The first row of a direction's outputs that the head reads: all of them, or those of the step that has seen the whole sequence.
    fn head_row(&self, share: &Share<'_>, reverse: bool) -> usize {
        if self.config.reading() == Reading::FinalStates && !reverse { (share.n_steps - 1) * share.n_rows } else { 0 }
    }

    /// How the outputs of one direction's steps become a row a sequence.
    fn pool_steps(&self, share: &Share<'_>, pooling: Pooling, direction: usize, x: u32) -> PoolSteps {
        let which = match pooling {
            Pooling::Mean => ALL_STEPS,
            Pooling::Last if direction == 0 => LAST_STEP,
            Pooling::Last => FIRST_STEP,
        };
        let (n_steps, n_rows, width) = (share.n_steps as u32, share.n_rows as u32, self.top_width() as u32);
        PoolSteps { n_steps, n_rows, width, x, pooled: 0, which, use_lengths: u32::from(share.lengths.is_some()) }
    }

    /// A row a sequence, of what the last layer hands up.
    fn pool(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, pooling: Pooling, x: Parts) -> Result<Parts> {
        let (b, width) = (share.n_rows, self.top_width());
        let mut pooled: Parts = [None; 2];
        for (direction, (part, &buffer)) in x.iter().flatten().zip(&w.pooled).enumerate() {
            let span = front(buffer, b * width);
            let kernel = self.pool_steps(share, pooling, direction, part.offset);
            backend.launch(&kernel, &[part.span, front(w.rows, b), span])?;
            pooled[direction] = Some(LanePart { span, offset: 0, width: part.width });
        }
        Ok(pooled)
    }

    fn loss_of(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, pass: Pass) -> Result<()> {
        let rows = self.output_rows(share.n_steps, share.n_rows);
        let stride = pad_inner(self.config.n_outputs());
        let (n_rows, row_stride, gradient, scale) = (rows as u32, stride as u32, u32::from(pass.gradients), share.scale);
        let (outputs, row_loss, flags) = (front(w.outputs, rows * stride), front(w.row_loss, rows), front(self.flags, ALIGN));
        if let (Some(loss), Some(targets)) = (&self.own_loss, share.targets) {
            let n_outputs = self.config.n_outputs();
            let mut padded = read_now(backend, outputs, OUTPUTS_DEADLINE)?;
            let given: Vec<f32> = padded.chunks_exact(stride).flat_map(|row| &row[..n_outputs]).copied().collect();
            let mut gradients = vec![0.0; given.len()];
            let sum = loss.loss(Scored { outputs: &given, n_outputs, targets, weights: share.weights }, &mut gradients);
            if pass.gradients {
                padded.fill(0.0);
                for (row, gradients) in padded.chunks_exact_mut(stride).zip(gradients.chunks_exact(n_outputs)) {
                    row.iter_mut().zip(gradients).for_each(|(to, gradient)| *to = gradient * scale);
                }
                backend.write(outputs, &padded)?;
            }
            return backend.write(Span { buffer: self.loss, offset: pass.part, len: 1 }, &[sum as f32]);
        }
        match self.config.output {
            Output::Classes { n_classes } | Output::Label { n_classes, .. } => {
                let kernel = SoftmaxCrossEntropy { n_rows, n_classes: n_classes as u32, row_stride, scale, gradient };
                backend.launch(&kernel, &[outputs, front(w.targets, rows), front(w.weights, rows), row_loss, flags])?;
            }
            Output::Notes { n_notes } => {
                let kernel = BinaryCrossEntropy { n_rows, n_outputs: n_notes as u32, row_stride, scale, gradient };
                backend.launch(&kernel, &[outputs, front(w.targets, rows * n_notes), front(w.weights, rows), row_loss, flags])?;
            }
            Output::Quantiles { n_values, levels, .. } => {
                let (terms, n_levels) = (rows * n_values, levels.count());
                let kernel = QuantileLoss { n_rows, n_outputs: n_values as u32, n_levels: n_levels as u32, row_stride, scale, gradient };
                let levels = front(self.levels.context("levels are written with the model")?, n_levels);
                backend.launch(&kernel, &[outputs, front(w.targets, terms), front(w.weights, terms), levels, row_loss, flags])?;
            }
            Output::Values { n_outputs, .. } => {
                let terms = rows * n_outputs;
                let kernel = SquaredError { n_rows, n_outputs: n_outputs as u32, row_stride, scale, gradient };
                backend.launch(&kernel, &[outputs, front(w.targets, terms), front(w.weights, terms), row_loss, flags])?;
            }
        }
        backend.launch(&Sum { len: n_rows, offset: 0, out: pass.part as u32 }, &[row_loss, front(self.loss, MAX_PARTS.max(ALIGN))])
    }

    fn backward(
        &self,
        backend: &mut dyn Backend,
        w: &Workspace,
        share: &Share<'_>,
        pass: Pass,
        done: &mut Forward,
        ready: &mut dyn FnMut(&mut dyn Backend, usize, Span) -> Result<()>,
    ) -> Result<()> {
        let (t, b) = (share.n_steps, share.n_rows);
        let n = self.config.n_directions();
        let flow = w.flow.as_ref().context("a workspace for gradients is reserved first")?;
        let set = |i: usize| [flow[i * n], flow[i * n + n - 1]];
        let (mut above, mut below) = (set(0), set(1));
        let accumulate = pass.part > 0;
        let mut n_ready = self.grads.len();
        // Buckets become complete from the last to the first.
        let mut all_down_to = |first: usize, backend: &mut dyn Backend| -> Result<()> {
            while n_ready > first {
                n_ready -= 1;
                let span = backend.whole(self.grads[n_ready]);
                ready(backend, n_ready, span)?;
            }
            Ok(())
        };
        let first_bucket = |tensor: usize| self.table.tensors()[tensor].bucket;
        if let (false, Some(embedding)) = (accumulate || self.sparse_embedding, self.at.embedding) {
            let (span, offset) = self.place(backend, &self.grads, embedding);
            backend.clear(span.part(offset as usize, self.table.tensors()[embedding].range.len()))?;
        }
        let mut given = share.final_gradient;
        for (i, lane) in w.lanes.iter().enumerate() {
            let (carry, shape) = (lane.carry.context("a workspace for gradients is reserved first")?, self.shape(i));
            let of_state = carry.front(b * (shape.width + shape.hidden) as usize);
            match &mut given {
                None => backend.clear(of_state)?,
                Some(given) => {
                    let (gradient, rest) =
                        given.split_at_checked(of_state.len).context("the final state's gradient ends before the model's layers do")?;
                    backend.write(of_state, gradient)?;
                    *given = rest;
                }
            }
        }
        // Where the head reads only final states, their gradients go straight to the carries.
        let by_carry = self.config.reading() == Reading::FinalStates;
        self.head_backward(backend, w, share, accumulate, done, (!by_carry).then_some(above))?;
        all_down_to(first_bucket(if self.config.tied { self.at.head_bias } else { self.at.head_weight }), backend)?;
        for l in (0..self.config.n_layers).rev() {
            let from_head = by_carry && l + 1 == self.config.n_layers;
            let axis = self.config.layer_input(l);
            let (groups, width) = (axis.groups, axis.padded_len() / axis.groups);
            let wants_dx = l > 0 || self.at.embedding.is_some();
            let dx = |direction: usize| {
                let to = below[direction];
                (wants_dx && direction < groups).then_some(LanePart { span: to.whole(), offset: to.start(), width: width as u32 })
            };
            for (direction, i) in self.lanes_of(l).enumerate() {
                let mut tensors = self.lane_tensors(backend, i, &self.grads);
                if let (Some(_), Some((_, Some(gradient)))) = (pass.key, w.lanes[i].dropped_weight) {
                    tensors.weight_hh = (gradient.whole(), gradient.start());
                }
                done.lanes[i].backward = Some(LaneGradients {
                    dh_out: (!from_head).then(|| (above[direction].whole(), above[direction].start())),
                    carry: w.lanes[i].carry.context("a workspace for gradients is reserved first")?.whole(),
                    dh: w.lanes[i].dh.map(Arena::whole),
                    tensors,
                    accumulate,
                    dx: [dx(0), dx(1)],
                    accumulate_dx: direction > 0,
                });
            }
            let lanes = &done.lanes[self.lanes_of(l)];
            backend.sweep(&SweepArgs { n_rows: b as u32, lanes, flags: front(self.flags, ALIGN), gradients: true })?;
            for i in self.lanes_of(l) {
                self.finish_lane(backend, w, share, pass, i)?;
            }
            all_down_to(first_bucket(self.at.lanes[self.lanes_of(l).start].weight_ih), backend)?;
            // What went below comes from above now; the other set is free.
            (above, below) = (below, above);
        }
        if let (Input::Tokens { vocabulary, width }, Some(index), Some(embedding)) = (self.config.input, w.index, self.at.embedding) {
            let (grads, grad) = self.place(backend, &self.grads, embedding);
            let width = pad_units(width);
            if let (Some(key), Some(_)) = (pass.key, w.dropped_input) {
                self.drop_input(backend, w, share, key, above[0].front(t * b * width), below[0].front(t * b * width))?;
                above = below;
            }
            let words = self.token_index.words().len();
            for first in (0..self.token_index.max_count).step_by(EmbeddingGradient::LIMIT as usize) {
                let kernel = EmbeddingGradient {
                    n_distinct: self.token_index.n_distinct,
                    width: width as u32,
                    n_places: (t * b) as u32,
                    n_classes: vocabulary as u32,
                    grad,
                    dx: 0,
                    first,
                    limit: EmbeddingGradient::LIMIT,
                };
                backend.launch(&kernel, &[front(index, words), above[0].front(t * b * width), grads])?;
            }
        }
        all_down_to(0, backend)
    }

    /// What a lane's sweep leaves to be done: gradients of the weights that were kept, and of a learned initial state.
    fn finish_lane(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, pass: Pass, i: usize) -> Result<()> {
        let shape = self.shape(i);
        if let (Some(key), Some((_, Some(gradient)))) = (pass.key, w.lanes[i].dropped_weight) {
            let to = self.place(backend, &self.grads, self.at.lanes[i].weight_hh);
            self.drop_weight(backend, i, key, (gradient.whole(), gradient.start()), to)?;
        }
        let (Some((h, c)), Some(carry)) = (self.at.lanes[i].initial, w.lanes[i].carry) else { return Ok(()) };
        let of_h = share.n_rows as u32 * shape.width;
        for (tensor, width, offset) in [(h, shape.width, 0), (c, shape.hidden, of_h)] {
            let (span, out) = self.place(backend, &self.grads, tensor);
            if share.state.is_some() {
                // The sequences go on from a state of their own.
                if pass.part == 0 {
                    backend.clear(span.part(out as usize, width as usize))?;
                }
                continue;
            }
            let sums = ColumnSums {
                n_rows: share.n_rows as u32,
                n_cols: width,
                row_stride: width,
                offset,
                out,
                second_out: NONE,
                accumulate: u32::from(pass.part > 0),
            };
            backend.launch(&sums, &[carry.front(shape.carry_len(share.n_rows)), span])?;
        }
        Ok(())
    }

    /// Gradients of the head, and of what it reads: into `above`, or into the carries of the last layer.
    fn head_backward(
        &self,
        backend: &mut dyn Backend,
        w: &Workspace,
        share: &Share<'_>,
        accumulate: bool,
        done: &Forward,
        above: Option<[Arena; 2]>,
    ) -> Result<()> {
        let (t, b, hidden) = (share.n_steps, share.n_rows, self.top_width());
        let rows = self.output_rows(t, b);
        let stride = pad_inner(self.config.n_outputs());
        let row_len = hidden * self.config.n_directions();
        let outputs = front(w.outputs, rows * stride);
        let (weight, weight_at) = self.place(backend, &self.params, self.at.head_weight);
        let (to_weight, to_weight_at) = self.place(backend, &self.grads, self.at.head_weight);
        let (to_bias, to_bias_at) = self.place(backend, &self.grads, self.at.head_bias);
        // Sums over T x B in pieces that one invocation's loop can run.
        let piece = MAX_LOOP_TRIPS as usize / 2;
        for (i, start) in (0..rows).step_by(piece).enumerate() {
            let k = piece.min(rows - start);
            let accumulate = u32::from(accumulate || i > 0);
            for (direction, part) in done.top.iter().flatten().enumerate() {
                let first = part.offset as usize + self.head_row(share, direction > 0) * hidden;
                let product = Gemm {
                    m: stride as u32,
                    n: hidden as u32,
                    k: k as u32,
                    trans_a: 1,
                    trans_b: 0,
                    accumulate,
                    use_bias: 0,
                    bias_offset: 0,
                    a: Matrix::row_major(start * stride, stride),
                    b: Matrix::row_major(first + start * hidden, hidden),
                    c: Matrix::row_major(to_weight_at as usize + direction * hidden, row_len),
                };
                backend.launch(&product, &[outputs, part.span, part.span, to_weight])?;
            }
            let sums = ColumnSums {
                n_rows: k as u32,
                n_cols: stride as u32,
                row_stride: stride as u32,
                offset: (start * stride) as u32,
                out: to_bias_at,
                second_out: NONE,
                accumulate,
            };
            backend.launch(&sums, &[outputs, to_bias])?;
        }
        for (direction, i) in self.lanes_of(self.config.n_layers - 1).enumerate() {
            let to = match (above, w.pooled.get(direction)) {
                (_, Some(&pooled)) => front(pooled, b * hidden),
                (Some(above), None) => above[direction].front(t * b * hidden),
                (None, None) => w.lanes[i].carry.context("a workspace for gradients is reserved first")?.front(b * hidden),
            };
            let product = Gemm {
                m: rows as u32,
                n: hidden as u32,
                k: stride as u32,
                trans_a: 0,
                trans_b: 0,
                // A carry may hold the gradient that came in for the final state.
                accumulate: u32::from(above.is_none() && share.final_gradient.is_some()),
                use_bias: 0,
                bias_offset: 0,
                a: Matrix::row_major(0, stride),
                b: Matrix::row_major(weight_at as usize + direction * hidden, row_len),
                c: Matrix::row_major(0, hidden),
            };
            backend.launch(&product, &[outputs, weight, weight, to])?;
            if let (Reading::Pooled(pooling), Some(above)) = (self.config.reading(), above) {
                let kernel = PoolStepsGradient(self.pool_steps(share, pooling, direction, 0));
                backend.launch(&kernel, &[to, front(w.rows, b), above[direction].front(t * b * hidden)])?;
            }
        }
        Ok(())
    }
}

/// What a forward pass leaves to the backward one.
struct Forward {
    lanes: Vec<Lane>,
    /// What the head read.
    top: Parts,
}

/// Whether a place `[T, B]` lies before its row's end.
fn is_valid(share: &Share<'_>, place: usize) -> bool {
    share.lengths.is_none_or(|lengths| place / share.n_rows < lengths[place % share.n_rows] as usize)
}

/// Floats of a lane's recurrent weights.
fn recurrent_len(shape: LaneShape) -> usize {
    GATES * (shape.hidden * shape.width) as usize
}

/// The stream numbers of this many rows.
fn streams(w: &Workspace, n_rows: usize) -> Span {
    Span { buffer: w.rows, offset: streams_at(n_rows), len: n_rows }
}

/// The first `len` words of a buffer.
fn front(buffer: BufferId, len: usize) -> Span {
    Span { buffer, offset: 0, len }
}

/// Writes tensors in PyTorch's order into buckets laid out as the table says (parameters, optimizer state).
///
/// # Errors
/// The backend's; values that are not of the table's shapes.
pub fn write_buckets(table: &ParamTable, backend: &mut dyn Backend, buckets: &[BufferId], values: &[Vec<f32>]) -> Result<()> {
    for (words, &buffer) in packed(table, values)?.iter().zip(buckets) {
        backend.write(front(buffer, words.len()), words)?;
    }
    Ok(())
}

/// Tensors in PyTorch's order as the words of all buckets.
///
/// # Errors
/// Too few tensors, or one of another length.
pub fn packed(table: &ParamTable, values: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
    ensure!(values.len() == table.tensors().len(), "{} tensors for a table of {}", values.len(), table.tensors().len());
    let of_bucket = |bucket: &Bucket| {
        let mut words = vec![0.0; bucket.range.len()];
        for idx in bucket.tensors.clone() {
            let tensor = &table.tensors()[idx];
            ensure!(values[idx].len() == tensor.layout.torch_len(), "{} values for {} {:?}", values[idx].len(), tensor.name, tensor.shape);
            tensor.pack(&values[idx], &mut words[tensor.in_bucket()]);
        }
        Ok(words)
    };
    table.buckets().iter().map(of_bucket).collect()
}

/// Reads buckets back as tensors in PyTorch's order.
///
/// # Errors
/// The backend's.
pub fn read_buckets(
    table: &ParamTable,
    backend: &mut dyn Backend,
    buckets: &[BufferId],
    deadline: std::time::Duration,
) -> Result<Vec<Vec<f32>>> {
    let mut values = Vec::with_capacity(table.tensors().len());
    let mut words = Vec::new();
    for (bucket, &buffer) in table.buckets().iter().zip(buckets) {
        words = backend.read(&[front(buffer, bucket.range.len())], words)?.wait(deadline)?;
        unpack(table, bucket, &words, &mut values);
    }
    Ok(values)
}

/// Words of all buckets as tensors in PyTorch's order.
pub fn unpacked(table: &ParamTable, buckets: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut values = Vec::with_capacity(table.tensors().len());
    table.buckets().iter().zip(buckets).for_each(|(bucket, words)| unpack(table, bucket, words, &mut values));
    values
}

/// Adds the tensors of one bucket.
fn unpack(table: &ParamTable, bucket: &Bucket, words: &[f32], values: &mut Vec<Vec<f32>>) {
    for tensor in &table.tensors()[bucket.tensors.clone()] {
        let mut torch = vec![0.0; tensor.layout.torch_len()];
        tensor.unpack(&words[tensor.in_bucket()], &mut torch);
        values.push(torch);
    }
}
