//! A layer alone, there and back: the gradient of its outputs' sum by its weights and by its input. No head, no update, one device.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tracing::debug_span;

use crate::backend::{Backend, BufferId, Span, read_now};
use crate::infer::session::DEADLINE;
use crate::kernels::lstm::{
    Cell, FLAG_NON_FINITE, Lane, LaneGradients, LanePart, LaneShape, LaneStarts, LaneTensors, LaneVectors, SweepArgs,
};
use crate::rng::{Purpose, StepKey, Stream};
use crate::shape::{ALIGN, GATES, pad_inner, pad_units, round_up};

/// The sizes of a layer's work: T, B, I and H.
#[derive(Clone, Copy, Debug)]
pub struct LayerSizes {
    pub n_steps: usize,
    pub n_rows: usize,
    pub n_inputs: usize,
    pub hidden: usize,
}

/// The layer with its operands on a device.
pub struct LayerAlone {
    sizes: LayerSizes,
    backend: Box<dyn Backend>,
    lane: Lane,
    flags: Span,
    weight_gradients: BufferId,
}

/// What is in a layer's one bucket: the weights of the input and of h, and both biases.
struct Places {
    weight_hh: usize,
    biases: [usize; 2],
    len: usize,
}

impl Places {
    fn of(inputs: usize, hidden: usize) -> Self {
        let gates = GATES * hidden;
        let weight_hh = round_up(inputs * gates, ALIGN);
        let bias_ih = round_up(weight_hh + hidden * gates, ALIGN);
        let bias_hh = round_up(bias_ih + gates, ALIGN);
        Self { weight_hh, biases: [bias_ih, bias_hh], len: round_up(bias_hh + gates, ALIGN) }
    }

    fn tensors(&self, span: Span) -> LaneTensors {
        let [bias_ih, bias_hh] = self.biases.map(|at| at as u32);
        let vectors = LaneVectors { bias_ih, bias_hh, ..LaneVectors::none(span) };
        LaneTensors { weight_ih: (span, 0), weight_hh: (span, self.weight_hh as u32), weight_hr: None, vectors: Some(vectors) }
    }
}

impl LayerAlone {
    /// Random weights within 1 / sqrt(H), a random input within 1.
    ///
    /// # Errors
    /// A buffer beyond the device's limits or memory.
    pub fn new(sizes: LayerSizes, mut backend: Box<dyn Backend>) -> Result<Self> {
        let LayerSizes { n_steps, n_rows, n_inputs, hidden: units } = sizes;
        let (inputs, hidden, places) = (pad_inner(n_inputs), pad_units(units), n_steps * n_rows);
        let at = Places::of(inputs, hidden);
        let mut random = Stream::new(StepKey::new(1, 0), Purpose::Test, 2, 0);
        let mut numbers = |n: usize, most: f32| -> Vec<f32> { (0..n).map(|_| (2.0 * random.uniform() - 1.0) * most).collect() };
        let on = backend.as_mut();
        let mut alloc = |label: &str, len: usize| -> Result<Span> {
            let buffer = on.alloc(label, round_up(len, ALIGN))?;
            Ok(Span { buffer, offset: 0, len })
        };
        let shape = LaneShape::plain(hidden as u32, units as u32);
        let (params, grads) = (alloc("parameters", at.len)?, alloc("gradients", at.len)?);
        let (x, dx) = (alloc("inputs", places * inputs)?, alloc("gradients of inputs", places * inputs)?);
        let (gates, dh_out) = (alloc("gates", shape.gates_len(places))?, alloc("gradients of outputs", places * hidden)?);
        let (h, c) = (alloc("hidden states", shape.h_len(places, n_rows))?, alloc("cell states", shape.c_len(places, n_rows))?);
        let (carry, flags) = (alloc("carried gradients", shape.carry_len(n_rows))?, alloc("flags", ALIGN)?);
        // Padded inputs and units are zero times whatever weights: their columns of the input and of the gradient stay zero.
        let spread = |rows: usize, values: Vec<f32>, n: usize, padded: usize| -> Vec<f32> {
            let mut words = vec![0.0; rows * padded];
            words.chunks_exact_mut(padded).zip(values.chunks_exact(n)).for_each(|(to, from)| to[..n].copy_from_slice(from));
            words
        };
        let values = numbers(places * n_inputs, 1.0);
        on.write(x, &spread(places, values, n_inputs, inputs))?;
        on.write(dh_out, &spread(places, vec![1.0; places * units], units, hidden))?;
        on.write(params, &numbers(at.len, 1.0 / (units as f32).sqrt()))?;
        let part = |span| LanePart { span, offset: 0, width: inputs as u32 };
        let lane = Lane {
            starts: LaneStarts::default(),
            residual: None,
            shape,
            n_steps: n_steps as u32,
            reverse: false,
            tensors: at.tensors(params),
            x: [Some(part(x)), None],
            gates,
            h,
            c,
            range: 0..n_steps as u32,
            rows: None,
            use_lengths: false,
            cell: Cell::PLAIN,
            backward: Some(LaneGradients {
                dh_out: Some((dh_out, 0)),
                carry,
                dh: None,
                tensors: at.tensors(grads),
                accumulate: false,
                dx: [Some(part(dx)), None],
                accumulate_dx: false,
            }),
        };
        Ok(Self { sizes, backend, lane, flags, weight_gradients: grads.buffer })
    }

    /// What drives the device.
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub fn backend_mut(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    /// Weights and biases, without padding.
    pub fn n_parameters(&self) -> usize {
        let LayerSizes { n_inputs, hidden, .. } = self.sizes;
        GATES * hidden * (n_inputs + hidden + 2)
    }

    /// All steps there and back; the time until the device has done them.
    ///
    /// # Errors
    /// The device's.
    pub fn step(&mut self) -> Result<Duration> {
        let _span = debug_span!("compute").entered();
        let start = Instant::now();
        let (backend, lanes) = (self.backend.as_mut(), std::slice::from_ref(&self.lane));
        if let Some(backward) = &self.lane.backward {
            backend.clear(backward.carry)?;
        }
        let args = SweepArgs { n_rows: self.sizes.n_rows as u32, lanes, flags: self.flags, gradients: false };
        debug_span!("forward").in_scope(|| backend.sweep(&args))?;
        debug_span!("backward").in_scope(|| backend.sweep(&SweepArgs { gradients: true, ..args }))?;
        debug_span!("wait").in_scope(|| backend.wait(DEADLINE))?;
        Ok(start.elapsed())
    }

    /// The sum of all outputs of the last step, which is what its gradients are of.
    ///
    /// # Errors
    /// Something was not finite; the device's.
    pub fn total(&mut self) -> Result<f64> {
        let LayerSizes { n_steps, n_rows, hidden, .. } = self.sizes;
        let width = pad_units(hidden);
        let raised = read_now(self.backend.as_mut(), self.flags, DEADLINE)?[FLAG_NON_FINITE];
        ensure!(raised.to_bits() == 0, "a pre-activation of the layer is not finite");
        let outputs = self.lane.h.part(n_rows * width, n_steps * n_rows * width);
        let words = read_now(self.backend.as_mut(), outputs, DEADLINE)?;
        Ok(words.chunks_exact(width).flat_map(|row| &row[..hidden]).map(|&h| f64::from(h)).sum())
    }

    /// Gradients of the last step: of the bias of the input product `[4H]` in panels, and of the input `[T, B, I]`.
    ///
    /// # Errors
    /// The device's.
    pub fn gradients(&mut self) -> Result<[Vec<f32>; 2]> {
        let inputs = pad_inner(self.sizes.n_inputs);
        let at = Places::of(inputs, self.lane.shape.hidden as usize);
        let biases = self.backend.whole(self.weight_gradients).part(at.biases[0], GATES * self.lane.shape.hidden as usize);
        let of_bias = read_now(self.backend.as_mut(), biases, DEADLINE)?;
        let Some(dx) = self.lane.backward.as_ref().and_then(|backward| backward.dx[0]) else { return Ok([of_bias, Vec::new()]) };
        let of_input = read_now(self.backend.as_mut(), dx.span, DEADLINE)?;
        Ok([of_bias, of_input.chunks_exact(inputs).flat_map(|row| row[..self.sizes.n_inputs].iter().copied()).collect()])
    }

    /// Adds `by` to a number of the input `[T, B, I]`, so that a test can see what its gradient says.
    ///
    /// # Errors
    /// The device's.
    #[doc(hidden)]
    pub fn nudge(&mut self, place: usize, by: f32) -> Result<()> {
        let inputs = pad_inner(self.sizes.n_inputs);
        let Some(x) = self.lane.x[0] else { return Ok(()) };
        let n = self.sizes.n_inputs;
        let at = x.span.part(place / n * inputs + place % n, 1);
        let value = read_now(self.backend.as_mut(), at, DEADLINE)?[0];
        self.backend.write(at, &[value + by])
    }
}
