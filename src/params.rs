//! The one flat address space of all parameters: names, shapes, layouts, buckets.
//!
//! Inside, tensors lie as the kernels and the ring like them: gate matrices in panels of 16 units x 4 gates, sizes padded with entries that
//! stay exactly zero. PyTorch's order exists at the border only, through [`Tensor::pack`] and [`Tensor::unpack`].
//! Nothing here knows a device or a model; it is arithmetic on names and ranges.

use std::ops::Range;

use crate::shape::{ALIGN, GATES, PANEL, PANEL_UNITS, pad_inner, pad_units, round_up};

/// Buckets hold consecutive tensors of one layer up to this many floats (4 MiB), unless one tensor is larger.
pub const BUCKET_FLOATS: usize = 1 << 20;

/// What every adapter can bind at once: WebGPU's default limit of 128 MiB.
pub const BOUND_FLOATS: usize = 1 << 25;

/// One dimension of a tensor and its padding: `groups` runs of `size` entries, each padded to `padded` (two groups for both directions).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    pub groups: usize,
    pub size: usize,
    pub padded: usize,
}

impl Axis {
    /// Hidden units or embedding columns, padded to 16.
    pub const fn units(size: usize) -> Self {
        Self { groups: 1, size, padded: pad_units(size) }
    }

    /// Features, classes or outputs, padded to 4.
    pub const fn inner(size: usize) -> Self {
        Self { groups: 1, size, padded: pad_inner(size) }
    }

    /// No padding.
    pub const fn exact(size: usize) -> Self {
        Self { groups: 1, size, padded: size }
    }

    /// Entries without padding.
    pub const fn len(self) -> usize {
        self.groups * self.size
    }

    /// Whether there is no entry at all.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Entries with padding.
    pub const fn padded_len(self) -> usize {
        self.groups * self.padded
    }

    /// Where entry `i` lies among the padded ones.
    pub const fn place(self, i: usize) -> usize {
        i / self.size * self.padded + i % self.size
    }
}

/// How a tensor lies in the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// PyTorch's `[4H, K]` as `[H / 16][K][64]`: element (gate g, unit u, input k) at `((u / 16) * K + k) * 64 + g * 16 + u % 16`, sizes padded.
    /// A bias `[4H]` is the case K = 1.
    Panels { hidden: usize, inputs: Axis },
    /// Row-major `[rows, cols]`, sizes padded. A vector has one row.
    Matrix { rows: Axis, cols: Axis },
}

impl Layout {
    /// The layout of a bias of four gates.
    pub const fn gate_bias(hidden: usize) -> Self {
        Self::Panels { hidden, inputs: Axis::exact(1) }
    }

    /// Entries of the tensor as PyTorch has it.
    pub const fn torch_len(self) -> usize {
        match self {
            Self::Panels { hidden, inputs } => GATES * hidden * inputs.len(),
            Self::Matrix { rows, cols } => rows.len() * cols.len(),
        }
    }

    /// Floats in the address space.
    pub const fn packed_len(self) -> usize {
        match self {
            Self::Panels { hidden, inputs } => GATES * pad_units(hidden) * inputs.padded_len(),
            Self::Matrix { rows, cols } => rows.padded_len() * cols.padded_len(),
        }
    }

    /// Calls `f(torch index, packed index)` for every entry, in PyTorch's order.
    pub fn for_each(self, mut f: impl FnMut(usize, usize)) {
        match self {
            Self::Panels { hidden, inputs } => {
                let k_padded = inputs.padded_len();
                for row in 0..GATES * hidden {
                    let (gate, unit) = (row / hidden, row % hidden);
                    let base = unit / PANEL_UNITS * k_padded * PANEL + gate * PANEL_UNITS + unit % PANEL_UNITS;
                    for k in 0..inputs.len() {
                        f(row * inputs.len() + k, base + inputs.place(k) * PANEL);
                    }
                }
            }
            Self::Matrix { rows, cols } => {
                for row in 0..rows.len() {
                    let base = rows.place(row) * cols.padded_len();
                    for col in 0..cols.len() {
                        f(row * cols.len() + col, base + cols.place(col));
                    }
                }
            }
        }
    }
}

/// One parameter: its name and shape as PyTorch has them, and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub layout: Layout,
    /// Which layer it belongs to; tensors of two layers never share a bucket.
    pub layer: usize,
    /// Floats in the address space, without the gap behind.
    pub range: Range<usize>,
    pub bucket: usize,
    /// Where it starts within its bucket.
    pub offset: usize,
}

impl Tensor {
    /// Writes values in PyTorch's order into the packed tensor, whose padding it sets to zero.
    pub fn pack(&self, torch: &[f32], packed: &mut [f32]) {
        assert_eq!(torch.len(), self.layout.torch_len(), "values of {}", self.name);
        assert_eq!(packed.len(), self.layout.packed_len(), "room for {}", self.name);
        packed.fill(0.0);
        self.layout.for_each(|from, to| packed[to] = torch[from]);
    }

    /// Reads the packed tensor into PyTorch's order.
    pub fn unpack(&self, packed: &[f32], torch: &mut [f32]) {
        assert_eq!(torch.len(), self.layout.torch_len(), "room for {}", self.name);
        assert_eq!(packed.len(), self.layout.packed_len(), "values of {}", self.name);
        self.layout.for_each(|to, from| torch[to] = packed[from]);
    }

    /// Its floats within its bucket.
    pub fn in_bucket(&self) -> Range<usize> {
        self.offset..self.offset + self.range.len()
    }
}

/// Consecutive whole tensors of one layer, at most 4 MiB unless one tensor, or several that a kernel binds together, are larger; one allocation each for parameters, gradients and optimizer state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub layer: usize,
    pub tensors: Range<usize>,
    /// Floats in the address space, gaps included; both ends are multiples of 64.
    pub range: Range<usize>,
}

/// All parameters of a model, in order of first use in the forward pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParamTable {
    tensors: Vec<Tensor>,
    buckets: Vec<Bucket>,
}

impl ParamTable {
    /// An empty table; [`Self::push`] adds tensors in order of first use.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor of `layer` behind the ones there are and returns its index.
    pub fn push(&mut self, name: impl Into<String>, layer: usize, shape: Vec<usize>, layout: Layout) -> usize {
        let end = round_up(self.len() + layout.packed_len(), ALIGN);
        let joins = self.buckets.last().is_some_and(|b| b.layer == layer && end - b.range.start <= BUCKET_FLOATS);
        self.place(name.into(), layer, shape, layout, joins)
    }

    /// As [`Self::push`], but into one bucket, since a kernel binds them together; the bucket may become larger than others. Only beyond
    /// [`BOUND_FLOATS`], which no adapter need bind at once, each tensor is for itself. Returns the index of the first.
    pub fn push_together(&mut self, layer: usize, tensors: Vec<(String, Vec<usize>, Layout)>) -> usize {
        let first = self.tensors.len();
        let len: usize = tensors.iter().map(|(_, _, layout)| round_up(layout.packed_len(), ALIGN)).sum();
        let is_whole = len <= BOUND_FLOATS;
        let mut joins = self.buckets.last().is_some_and(|b| b.layer == layer && b.range.len() + len <= BUCKET_FLOATS);
        for (name, shape, layout) in tensors {
            if is_whole {
                self.place(name, layer, shape, layout, joins);
                joins = true;
            } else {
                self.push(name, layer, shape, layout);
            }
        }
        first
    }

    fn place(&mut self, name: String, layer: usize, shape: Vec<usize>, layout: Layout, joins_last_bucket: bool) -> usize {
        assert_eq!(shape.iter().product::<usize>(), layout.torch_len(), "shape {shape:?} of {name} against its layout");
        let start = self.len();
        let range = start..start + layout.packed_len();
        let end = round_up(range.end, ALIGN);
        let idx = self.tensors.len();
        match self.buckets.last_mut().filter(|_| joins_last_bucket) {
            Some(bucket) => {
                bucket.tensors.end = idx + 1;
                bucket.range.end = end;
            }
            None => self.buckets.push(Bucket { layer, tensors: idx..idx + 1, range: start..end }),
        }
        let bucket = self.buckets.len() - 1;
        let offset = start - self.buckets[bucket].range.start;
        self.tensors.push(Tensor { name, shape, layout, layer, range, bucket, offset });
        idx
    }

    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Floats of the whole address space, gaps included.
    pub fn len(&self) -> usize {
        self.buckets.last().map_or(0, |b| b.range.end)
    }

    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Parameters as PyTorch counts them.
    pub fn n_parameters(&self) -> usize {
        self.tensors.iter().map(|t| t.layout.torch_len()).sum()
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ParamTable {
        let mut table = ParamTable::new();
        table.push("embedding.weight", 0, vec![65, 5], Layout::Matrix { rows: Axis::inner(65), cols: Axis::units(5) });
        table.push("lstm.weight_ih_l0", 1, vec![4 * 17, 5], Layout::Panels { hidden: 17, inputs: Axis::units(5) });
        table.push("lstm.bias_ih_l0", 1, vec![4 * 17], Layout::gate_bias(17));
        table.push("lstm.weight_ih_l1", 2, vec![4 * 3, 34], Layout::Panels { hidden: 3, inputs: Axis { groups: 2, size: 17, padded: 32 } });
        table
    }

    #[test]
    fn packing_and_unpacking_gives_the_values_back_and_zero_padding() {
        for tensor in sample().tensors() {
            let torch: Vec<f32> = (0..tensor.layout.torch_len()).map(|i| i as f32 + 1.0).collect();
            let mut packed = vec![f32::NAN; tensor.layout.packed_len()];
            tensor.pack(&torch, &mut packed);
            assert_eq!(packed.iter().filter(|&&v| v == 0.0).count(), packed.len() - torch.len(), "{}", tensor.name);
            let mut back = vec![0.0; torch.len()];
            tensor.unpack(&packed, &mut back);
            assert_eq!(torch, back);
        }
    }

    #[test]
    fn tensors_are_aligned_and_layers_do_not_share_buckets() {
        let table = sample();
        assert!(table.tensors().iter().all(|t| t.range.start % ALIGN == 0 && t.offset % ALIGN == 0));
        assert_eq!(table.buckets().iter().map(|b| b.tensors.clone()).collect::<Vec<_>>(), vec![0..1, 1..3, 3..4]);
        assert!(table.buckets().windows(2).all(|w| w[0].range.end == w[1].range.start));
    }

    #[test]
    fn tensors_that_are_bound_together_share_a_bucket_as_long_as_every_adapter_can_bind_it() {
        let vectors = |n: usize, len: usize| -> Vec<_> {
            (0..n).map(|i| (format!("v{i}"), vec![len], Layout::Matrix { rows: Axis::exact(1), cols: Axis::exact(len) })).collect()
        };
        let mut table = ParamTable::new();
        table.push("w", 1, vec![1000], Layout::Matrix { rows: Axis::exact(1), cols: Axis::exact(1000) });
        // They join what is there if all of them fit; else they open a bucket of their own, however large.
        table.push_together(1, vectors(2, 1000));
        table.push_together(1, vectors(2, BUCKET_FLOATS - 100));
        // Beyond what can be bound each is for itself.
        assert_eq!(table.push_together(1, vectors(2, BOUND_FLOATS / 2 + ALIGN)), 5);
        table.push_together(2, vectors(2, BOUND_FLOATS / 2));
        assert_eq!(table.buckets().iter().map(|b| b.tensors.clone()).collect::<Vec<_>>(), vec![0..3, 3..5, 5..6, 6..7, 7..9]);
    }

    #[test]
    fn a_bucket_is_closed_at_four_mebibytes() {
        let mut table = ParamTable::new();
        for i in 0..3 {
            table.push(format!("w{i}"), 0, vec![700, 1000], Layout::Matrix { rows: Axis::exact(700), cols: Axis::exact(1000) });
        }
        assert_eq!(table.buckets().len(), 3);
    }
}
