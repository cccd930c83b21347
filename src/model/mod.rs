//! The network: embedding, stacked LSTM layers, head, loss; written once, over `dyn Backend`.
//!
//! A [`Model`] is one replica: parameters and gradients by bucket, and a workspace that grows with the largest share. A pass takes a [`Share`] of
//! a batch; whether gradients are wanted, and the dropout key, are in [`Pass`]. Nothing here knows workers, files or texts.

pub mod config;
pub mod init;
pub mod state;

use anyhow::{Context, Result, ensure};

use self::config::{Input, LayerParams, ModelConfig, ModelParams, Output};
use crate::backend::{Backend, BufferId, Limits, Span};
use crate::kernels::MAX_LOOP_TRIPS;
use crate::kernels::dropout::Dropout;
use crate::kernels::embedding::{EmbeddingGather, EmbeddingGradient, TokenIndex};
use crate::kernels::gemm::{Gemm, Matrix};
use crate::kernels::loss::{SoftmaxCrossEntropy, SquaredError};
use crate::kernels::lstm::{FLAG_NON_FINITE, Lane, LaneGradients, LaneTensors, NONE, SweepArgs};
use crate::kernels::reduce::{ColumnSums, Sum};
use crate::params::ParamTable;
use crate::rng::StepKey;
use crate::shape::{ALIGN, GATES, pad_inner, pad_units, round_up};
use crate::usage::UsageError;

/// Tokens or numbers, time-major.
#[derive(Clone, Copy, Debug)]
pub enum Words<'a> {
    /// `[T, B]`.
    Tokens(&'a [u32]),
    /// Inputs `[T, B, I]`, targets `[B, O]`.
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
    /// Of each term: `[T, B]` for classes, `[B, O]` for values.
    pub weights: &'a [f32],
    /// Global stream or sample number of each row `[B]`: what dropout is drawn by.
    pub streams: &'a [u32],
    /// Carried state `[L, 2, B, H]`, h before c, H padded; none: zero.
    pub state: Option<&'a [f32]>,
    /// Multiplies the gradient: 1 over the global weight.
    pub scale: f32,
}

/// What a pass is for.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The step's key: dropout is on.
    pub dropout: Option<StepKey>,
    /// Gradients are computed, and added to those of this step's earlier parts if this is not the first.
    pub gradients: bool,
    /// Number of the part of the share: its loss goes to this word of [`Model::loss`].
    pub part: usize,
}

/// Parts a share may be cut into.
pub const MAX_PARTS: usize = 64;

/// The buffers of one layer for the largest share so far.
struct LayerBuffers {
    gates: BufferId,
    h: BufferId,
    c: BufferId,
    /// The dropped outputs, which the layer above reads.
    dropped: Option<BufferId>,
}

struct Workspace {
    n_steps: usize,
    n_rows: usize,
    input: BufferId,
    embedded: Option<BufferId>,
    index: Option<BufferId>,
    streams: BufferId,
    targets: BufferId,
    weights: BufferId,
    layers: Vec<LayerBuffers>,
    outputs: BufferId,
    row_loss: BufferId,
    /// Gradients on their way down: of outputs and of inputs, in turn.
    flow: Option<[BufferId; 2]>,
    carry: Option<BufferId>,
}

/// One replica of a network on one backend.
pub struct Model {
    config: ModelConfig,
    table: ParamTable,
    at: ModelParams,
    params: Vec<BufferId>,
    grads: Vec<BufferId>,
    flags: BufferId,
    loss: BufferId,
    workspace: Option<Workspace>,
    token_index: TokenIndex,
    padded: Vec<f32>,
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
        let token_index = TokenIndex::default();
        Ok(Self { config, table, at, params, grads, flags, loss, workspace: None, token_index, padded: Vec::new() })
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

    /// Floats of the carried state of one row: `[L, 2, H]`, H padded.
    pub fn state_len(&self) -> usize {
        self.config.n_layers * 2 * self.hidden()
    }

    fn hidden(&self) -> usize {
        pad_units(self.config.hidden)
    }

    /// The final state's spans after a pass over this many steps and rows, in the order of [`Share::state`].
    pub fn final_state(&self, n_steps: usize, n_rows: usize) -> Vec<Span> {
        let Some(w) = &self.workspace else { return Vec::new() };
        let len = n_rows * self.hidden();
        w.layers.iter().flat_map(|l| [l.h, l.c]).map(|buffer| Span { buffer, offset: n_steps * len, len }).collect()
    }

    /// Outputs after a forward pass without targets: `[rows, columns]`, and the floats from row to row. Rows are `T x B` for classes, `B` for values.
    pub fn outputs(&self, n_steps: usize, n_rows: usize) -> (Span, usize) {
        let stride = pad_inner(self.config.n_outputs());
        let rows = self.output_rows(n_steps, n_rows);
        let buffer = self.workspace.as_ref().map_or(self.loss, |w| w.outputs);
        (Span { buffer, offset: 0, len: rows * stride }, stride)
    }

    fn output_rows(&self, n_steps: usize, n_rows: usize) -> usize {
        match self.config.output {
            Output::Classes { .. } => n_steps * n_rows,
            Output::Values { .. } => n_rows,
        }
    }

    /// Makes room for shares up to this size; what there is stays if it is large enough.
    ///
    /// # Errors
    /// A buffer beyond the device's limits or memory.
    pub fn reserve(&mut self, backend: &mut dyn Backend, n_steps: usize, n_rows: usize, gradients: bool) -> Result<()> {
        if let Some(w) = &self.workspace {
            // Layouts are made for each pass, so only the product counts, for every buffer that has no further row.
            if w.n_steps >= n_steps && w.n_rows >= n_rows && (w.flow.is_some() || !gradients) {
                return Ok(());
            }
        }
        let (mut t, mut b, mut gradients) = (n_steps, n_rows, gradients);
        if let Some(old) = self.workspace.take() {
            (t, b, gradients) = (t.max(old.n_steps), b.max(old.n_rows), gradients || old.flow.is_some());
            let layers = old.layers.iter().flat_map(|l| [Some(l.gates), Some(l.h), Some(l.c), l.dropped]).flatten();
            let others = [
                Some(old.input),
                old.embedded,
                old.index,
                Some(old.streams),
                Some(old.targets),
                Some(old.weights),
                Some(old.outputs),
                Some(old.row_loss),
            ];
            layers
                .chain(others.into_iter().flatten())
                .chain(old.flow.into_iter().flatten())
                .chain(old.carry)
                .for_each(|id| backend.free(id));
        }
        let limits = backend.limits();
        let mut alloc = |label: &str, len: usize| -> Result<BufferId> {
            fits(limits, label, len, "--batch-size, --seq-len or --hidden, or give more parts with --accumulate")?;
            backend.alloc(label, round_up(len.max(1), ALIGN))
        };
        let (hidden, tb) = (self.hidden(), t * b);
        let out_stride = pad_inner(self.config.n_outputs());
        let rows = self.output_rows(t, b);
        let (input, embedded, index) = match self.config.input {
            Input::Tokens { vocabulary, width } => (
                alloc("tokens", tb)?,
                Some(alloc("embedded tokens", tb * pad_units(width))?),
                gradients.then(|| alloc("token index", TokenIndex::max_words(tb, vocabulary))).transpose()?,
            ),
            Input::Values { n_features } => (alloc("inputs", tb * pad_inner(n_features))?, None, None),
        };
        let (n_targets, n_weights) = match self.config.output {
            Output::Classes { .. } => (rows, rows),
            Output::Values { n_outputs } => (rows * n_outputs, rows * n_outputs),
        };
        let layers = (0..self.config.n_layers)
            .map(|l| {
                Ok(LayerBuffers {
                    gates: alloc("gates", tb * hidden * GATES)?,
                    h: alloc("hidden states", (t + 1) * b * hidden)?,
                    c: alloc("cell states", (t + 1) * b * hidden)?,
                    dropped: (self.config.dropout > 0.0 && l + 1 < self.config.n_layers)
                        .then(|| alloc("dropped states", tb * hidden))
                        .transpose()?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let widest = (0..self.config.n_layers).map(|l| self.config.layer_input(l).padded_len()).max().unwrap_or(0).max(hidden);
        let flow =
            if gradients { Some([alloc("gradients of states", tb * widest)?, alloc("gradients of states", tb * widest)?]) } else { None };
        let carry = gradients.then(|| alloc("carried gradients", 2 * b * hidden)).transpose()?;
        self.workspace = Some(Workspace {
            n_steps: t,
            n_rows: b,
            input,
            embedded,
            index,
            streams: alloc("stream numbers", b)?,
            targets: alloc("targets", n_targets)?,
            weights: alloc("weights", n_weights)?,
            layers,
            outputs: alloc("outputs", rows * out_stride)?,
            row_loss: alloc("losses", rows)?,
            flow,
            carry,
        });
        Ok(())
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
        self.upload(backend, share, pass)?;
        let workspace = self.workspace.take().context("the workspace was just reserved")?;
        let lanes = self.forward(backend, &workspace, share, pass);
        let done = lanes.and_then(|mut lanes| {
            if share.targets.is_some() {
                self.loss_of(backend, &workspace, share, pass)?;
            }
            if pass.gradients { self.backward(backend, &workspace, share, pass, &mut lanes, ready) } else { Ok(()) }
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
        let (t, b, hidden) = (share.n_steps, share.n_rows, pad_units(self.config.hidden));
        let at = front;
        match (self.config.input, share.input) {
            (Input::Tokens { vocabulary, .. }, Words::Tokens(tokens)) => {
                ensure!(tokens.len() == t * b, "{} tokens for {t} steps of {b} rows", tokens.len());
                if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
                    anyhow::bail!("token {token} is outside the vocabulary of {vocabulary}");
                }
                backend.write(at(w.input, t * b), bytemuck::cast_slice(tokens))?;
                if let (true, Some(index)) = (pass.gradients, w.index) {
                    self.token_index.rebuild(tokens, vocabulary);
                    let words = self.token_index.words();
                    backend.write(at(index, words.len()), bytemuck::cast_slice(words))?;
                }
            }
            (Input::Values { n_features }, Words::Values(values)) => {
                ensure!(values.len() == t * b * n_features, "{} numbers for {t} steps of {b} rows of {n_features}", values.len());
                let padded = pad_inner(n_features);
                self.padded.clear();
                for row in values.chunks_exact(n_features) {
                    self.padded.extend_from_slice(row);
                    self.padded.resize(self.padded.len() + padded - n_features, 0.0);
                }
                backend.write(at(w.input, self.padded.len()), &self.padded)?;
            }
            _ => anyhow::bail!("the share's inputs are not of the kind that the model reads"),
        }
        backend.write(at(w.streams, b), bytemuck::cast_slice(share.streams))?;
        if let Some(targets) = share.targets {
            let words: &[f32] = match (self.config.output, targets) {
                (Output::Classes { n_classes }, Words::Tokens(targets)) => {
                    if let Some(&class) = targets.iter().find(|&&class| class as usize >= n_classes) {
                        anyhow::bail!("target {class} is outside the {n_classes} classes");
                    }
                    bytemuck::cast_slice(targets)
                }
                (Output::Values { .. }, Words::Values(targets)) => targets,
                _ => anyhow::bail!("the share's targets are not of the kind that the model gives"),
            };
            ensure!(words.len() == share.weights.len(), "{} targets with {} weights", words.len(), share.weights.len());
            backend.write(at(w.targets, words.len()), words)?;
            backend.write(at(w.weights, words.len()), share.weights)?;
        }
        let len = b * hidden;
        for (i, buffer) in w.layers.iter().flat_map(|l| [l.h, l.c]).enumerate() {
            match share.state {
                Some(state) => backend.write(at(buffer, len), &state[i * len..(i + 1) * len])?,
                None => backend.clear(at(buffer, len))?,
            }
        }
        Ok(())
    }

    fn lane(&self, backend: &dyn Backend, w: &Workspace, l: usize, share: &Share<'_>, x: (Span, u32)) -> Lane {
        let (t, b, hidden) = (share.n_steps, share.n_rows, self.hidden());
        let buffers = &w.layers[l];
        Lane {
            inputs: self.config.layer_input(l).padded_len() as u32,
            hidden: hidden as u32,
            reverse: false,
            tensors: self.lane_tensors(backend, l, &self.params),
            x,
            gates: front(buffers.gates, t * b * hidden * GATES),
            h: front(buffers.h, (t + 1) * b * hidden),
            c: front(buffers.c, (t + 1) * b * hidden),
            range: 0..t as u32,
            lengths: None,
            backward: None,
        }
    }

    fn lane_tensors(&self, backend: &dyn Backend, l: usize, buckets: &[BufferId]) -> LaneTensors {
        let LayerParams { weight_ih, weight_hh, biases } = self.at.layers[l];
        let at = |tensor: usize| self.place(backend, buckets, tensor);
        let biases = biases.map(|(ih, hh)| (at(ih).0, at(ih).1, at(hh).1));
        LaneTensors { weight_ih: at(weight_ih), weight_hh: at(weight_hh), biases }
    }

    /// The bucket that a tensor lies in and where it starts there.
    fn place(&self, backend: &dyn Backend, buckets: &[BufferId], tensor: usize) -> (Span, u32) {
        let tensor = &self.table.tensors()[tensor];
        (backend.whole(buckets[tensor.bucket]), tensor.offset as u32)
    }

    fn forward(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, pass: Pass) -> Result<Vec<Lane>> {
        let (t, b, hidden) = (share.n_steps, share.n_rows, self.hidden());
        let mut x = (front(w.input, t * b * self.config.layer_input(0).padded_len()), 0);
        if let (Input::Tokens { vocabulary, width }, Some(embedded), Some(table)) = (self.config.input, w.embedded, self.at.embedding) {
            let width = pad_units(width);
            let (span, offset) = self.place(backend, &self.params, table);
            let out = front(embedded, t * b * width);
            let kernel =
                EmbeddingGather { n_tokens: (t * b) as u32, width: width as u32, n_classes: vocabulary as u32, table: offset, out: 0 };
            backend.launch(&kernel, &[front(w.input, t * b), span, out])?;
            x = (out, 0);
        }
        let mut lanes = Vec::with_capacity(self.config.n_layers);
        for l in 0..self.config.n_layers {
            let lane = self.lane(backend, w, l, share, x);
            let flags = front(self.flags, ALIGN);
            backend.sweep(&SweepArgs { n_rows: b as u32, lanes: std::slice::from_ref(&lane), flags, gradients: false })?;
            // Outputs are the states after the first.
            x = (lane.h, (b * hidden) as u32);
            if let (Some(key), Some(dropped)) = (pass.dropout, w.layers[l].dropped) {
                let out = front(dropped, t * b * hidden);
                let kernel = Dropout::new(self.config.dropout, key, l as u32, [t as u32, b as u32, hidden as u32], x.1, 0);
                backend.launch(&kernel, &[front(w.streams, b), x.0, out])?;
                x = (out, 0);
            }
            lanes.push(lane);
        }
        let (rows, first) = self.head_rows(share);
        let (weight, weight_at) = self.place(backend, &self.params, self.at.head_weight);
        let (bias, bias_at) = self.place(backend, &self.params, self.at.head_bias);
        let stride = pad_inner(self.config.n_outputs());
        let product = Gemm {
            m: rows as u32,
            n: stride as u32,
            k: hidden as u32,
            trans_a: 0,
            trans_b: 1,
            accumulate: 0,
            use_bias: 1,
            bias_offset: bias_at,
            a: Matrix::row_major(first, hidden),
            b: Matrix::row_major(weight_at as usize, hidden),
            c: Matrix::row_major(0, stride),
        };
        backend.launch(&product, &[x.0, weight, bias, front(w.outputs, rows * stride)])?;
        Ok(lanes)
    }

    /// Rows that the head reads of the top layer's h, and where they start: all outputs, or those of the last step.
    fn head_rows(&self, share: &Share<'_>) -> (usize, usize) {
        let (t, b, hidden) = (share.n_steps, share.n_rows, self.hidden());
        match self.config.output {
            Output::Classes { .. } => (t * b, b * hidden),
            Output::Values { .. } => (b, t * b * hidden),
        }
    }

    fn loss_of(&self, backend: &mut dyn Backend, w: &Workspace, share: &Share<'_>, pass: Pass) -> Result<()> {
        let rows = self.output_rows(share.n_steps, share.n_rows);
        let stride = pad_inner(self.config.n_outputs());
        let (n_rows, row_stride, gradient, scale) = (rows as u32, stride as u32, u32::from(pass.gradients), share.scale);
        let (outputs, row_loss, flags) = (front(w.outputs, rows * stride), front(w.row_loss, rows), front(self.flags, ALIGN));
        match self.config.output {
            Output::Classes { n_classes } => {
                let kernel = SoftmaxCrossEntropy { n_rows, n_classes: n_classes as u32, row_stride, scale, gradient };
                backend.launch(&kernel, &[outputs, front(w.targets, rows), front(w.weights, rows), row_loss, flags])?;
            }
            Output::Values { n_outputs } => {
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
        lanes: &mut [Lane],
        ready: &mut dyn FnMut(&mut dyn Backend, usize, Span) -> Result<()>,
    ) -> Result<()> {
        let (t, b, hidden) = (share.n_steps, share.n_rows, self.hidden());
        let ([mut above, mut below], carry) = w.flow.zip(w.carry).context("a workspace for gradients is reserved first")?;
        let carry = front(carry, 2 * b * hidden);
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
        if let (false, Some(embedding)) = (accumulate, self.at.embedding) {
            let (span, offset) = self.place(backend, &self.grads, embedding);
            backend.clear(span.part(offset as usize, self.table.tensors()[embedding].range.len()))?;
        }
        self.head_backward(backend, w, share, accumulate, above, carry)?;
        all_down_to(first_bucket(if self.config.tied { self.at.head_bias } else { self.at.head_weight }), backend)?;
        for l in (0..self.config.n_layers).rev() {
            let from_head = matches!(self.config.output, Output::Values { .. }) && l + 1 == self.config.n_layers;
            let inputs = self.config.layer_input(l).padded_len();
            let dx = (l > 0 || self.at.embedding.is_some()).then(|| front(below, t * b * inputs));
            if !from_head {
                backend.clear(carry)?;
            }
            lanes[l].backward = Some(LaneGradients {
                dh_out: (!from_head).then(|| (front(above, t * b * hidden), 0)),
                carry,
                tensors: self.lane_tensors(backend, l, &self.grads),
                accumulate,
                dx,
            });
            backend.sweep(&SweepArgs { n_rows: b as u32, lanes: &lanes[l..=l], flags: front(self.flags, ALIGN), gradients: true })?;
            all_down_to(first_bucket(self.at.layers[l].weight_ih), backend)?;
            match (pass.dropout, l.checked_sub(1).and_then(|under| w.layers[under].dropped)) {
                (Some(key), Some(_)) => {
                    let kernel = Dropout::new(self.config.dropout, key, l as u32 - 1, [t as u32, b as u32, hidden as u32], 0, 0);
                    backend.launch(&kernel, &[front(w.streams, b), front(below, t * b * hidden), front(above, t * b * hidden)])?;
                }
                _ => std::mem::swap(&mut above, &mut below),
            }
        }
        if let (Input::Tokens { vocabulary, width }, Some(index), Some(embedding)) = (self.config.input, w.index, self.at.embedding) {
            let (grads, grad) = self.place(backend, &self.grads, embedding);
            let width = pad_units(width);
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
                backend.launch(&kernel, &[front(index, words), front(above, t * b * width), grads])?;
            }
        }
        all_down_to(0, backend)
    }

    /// Gradients of the head, and of the top layer's outputs: into `above` for classes, into the carry for values.
    fn head_backward(
        &self,
        backend: &mut dyn Backend,
        w: &Workspace,
        share: &Share<'_>,
        accumulate: bool,
        above: BufferId,
        carry: Span,
    ) -> Result<()> {
        let hidden = self.hidden();
        let (rows, first) = self.head_rows(share);
        let stride = pad_inner(self.config.n_outputs());
        let top = w.layers.last().context("a model has a layer")?;
        let (h, outputs) = (front(top.h, (share.n_steps + 1) * share.n_rows * hidden), front(w.outputs, rows * stride));
        let (weight, weight_at) = self.place(backend, &self.params, self.at.head_weight);
        let (to_weight, to_weight_at) = self.place(backend, &self.grads, self.at.head_weight);
        let (to_bias, to_bias_at) = self.place(backend, &self.grads, self.at.head_bias);
        // Sums over T x B in pieces that one invocation's loop can run.
        let piece = MAX_LOOP_TRIPS as usize / 2;
        for (i, start) in (0..rows).step_by(piece).enumerate() {
            let k = piece.min(rows - start);
            let accumulate = u32::from(accumulate || i > 0);
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
                c: Matrix::row_major(to_weight_at as usize, hidden),
            };
            backend.launch(&product, &[outputs, h, h, to_weight])?;
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
        let to = match self.config.output {
            Output::Classes { .. } => front(above, rows * hidden),
            Output::Values { .. } => {
                backend.clear(carry)?;
                carry
            }
        };
        let product = Gemm {
            m: rows as u32,
            n: hidden as u32,
            k: stride as u32,
            trans_a: 0,
            trans_b: 0,
            accumulate: 0,
            use_bias: 0,
            bias_offset: 0,
            a: Matrix::row_major(0, stride),
            b: Matrix::row_major(weight_at as usize, hidden),
            c: Matrix::row_major(0, hidden),
        };
        backend.launch(&product, &[outputs, weight, weight, to])
    }
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
    ensure!(values.len() == table.tensors().len(), "{} tensors for a table of {}", values.len(), table.tensors().len());
    for (bucket, &buffer) in table.buckets().iter().zip(buckets) {
        let mut words = vec![0.0; bucket.range.len()];
        for idx in bucket.tensors.clone() {
            let tensor = &table.tensors()[idx];
            ensure!(values[idx].len() == tensor.layout.torch_len(), "{} values for {} {:?}", values[idx].len(), tensor.name, tensor.shape);
            tensor.pack(&values[idx], &mut words[tensor.in_bucket()]);
        }
        backend.write(front(buffer, words.len()), &words)?;
    }
    Ok(())
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
        for tensor in &table.tensors()[bucket.tensors.clone()] {
            let mut torch = vec![0.0; tensor.layout.torch_len()];
            tensor.unpack(&words[tensor.in_bucket()], &mut torch);
            values.push(torch);
        }
    }
    Ok(values)
}
