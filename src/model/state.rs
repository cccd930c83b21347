//! The carried state of all streams, on the host, keyed by global stream.

use super::config::ModelConfig;
use crate::shape::pad_units;

/// h and c of every lane and stream: for each lane h, then c, `[streams, units]`, units padded; what [`super::Share::state`] is cut from.
#[derive(Clone, Debug, PartialEq)]
pub struct Carried {
    /// Units of the blocks h and c of every lane, without padding.
    units: Vec<usize>,
    n_streams: usize,
    data: Vec<f32>,
}

impl Carried {
    /// Zero for `n_streams` streams.
    pub fn new(model: &ModelConfig, n_streams: usize) -> Self {
        let units: Vec<usize> = model.state_units().into_iter().flatten().collect();
        let len = units.iter().map(|&units| pad_units(units) * n_streams).sum();
        Self { units, n_streams, data: vec![0.0; len] }
    }

    /// The state of a share's rows, as [`Self::rows`] gives them.
    pub fn from_rows(model: &ModelConfig, n_streams: usize, data: Vec<f32>) -> Self {
        let carried = Self { data, ..Self::new(model, 0) };
        let needed: usize = carried.units.iter().map(|&units| pad_units(units) * n_streams).sum();
        assert_eq!(carried.data.len(), needed, "state of {n_streams} streams");
        Self { n_streams, ..carried }
    }

    /// All rows.
    pub fn into_rows(self) -> Vec<f32> {
        self.data
    }

    /// Streams that it holds.
    pub fn n_streams(&self) -> usize {
        self.n_streams
    }

    /// Back to zero: the text begins again.
    pub fn reset(&mut self) {
        self.data.fill(0.0);
    }

    /// Where each block starts, and the floats of a row of it.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n_streams, mut next) = (self.n_streams, 0);
        self.units.clone().into_iter().map(pad_units).map(move |width| {
            let start = next;
            next += width * n_streams;
            (start, width)
        })
    }

    /// The rows of these streams, as a share takes them.
    pub fn rows(&self, streams: std::ops::Range<usize>) -> Vec<f32> {
        let mut rows = Vec::with_capacity(self.data.len() / self.n_streams.max(1) * streams.len());
        for (start, width) in self.blocks() {
            rows.extend_from_slice(&self.data[start + streams.start * width..start + streams.end * width]);
        }
        rows
    }

    /// Takes the rows of these streams back.
    pub fn put(&mut self, streams: std::ops::Range<usize>, rows: &[f32]) {
        let mut rest = rows;
        for (start, width) in self.blocks() {
            let (block, behind) = rest.split_at(streams.len() * width);
            self.data[start + streams.start * width..start + streams.end * width].copy_from_slice(block);
            rest = behind;
        }
        assert!(rest.is_empty(), "state of {} streams", streams.len());
    }

    /// For a checkpoint: h (`which` 0) or c (1) of all lanes, each `[streams, units]` without padding.
    pub fn unpadded(&self, which: usize) -> Vec<Vec<f32>> {
        let blocks = self.blocks().zip(&self.units).skip(which).step_by(2);
        let rows = |start: usize, width: usize| self.data[start..start + width * self.n_streams].chunks_exact(width);
        blocks.map(|((start, width), &units)| rows(start, width).flat_map(|row| row[..units].iter().copied()).collect()).collect()
    }

    /// The reverse of [`Self::unpadded`], of one lane.
    pub fn set_unpadded(&mut self, which: usize, lane: usize, values: &[f32]) {
        let Some((start, width)) = self.blocks().nth(2 * lane + which) else { return };
        let units = self.units[2 * lane + which];
        for (row, values) in self.data[start..start + width * self.n_streams].chunks_exact_mut(width).zip(values.chunks_exact(units)) {
            row[..units].copy_from_slice(values);
            row[units..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{Hidden, Input, ModelConfig, Output};
    use super::*;

    #[test]
    fn rows_put_back_are_the_rows_taken_out() {
        let model = ModelConfig {
            input: Input::Tokens { vocabulary: 3, width: 2 },
            output: Output::Classes { n_classes: 3 },
            n_layers: 2,
            hidden: Hidden::Each(vec![20, 7]),
            dropout: 0.0,
            bias: true,
            tied: false,
            lstm: super::super::config::LstmConfig { proj_size: 5, ..Default::default() },
        };
        let row_len = 16 + 32 + 16 + 16;
        let mut carried = Carried::new(&model, 5);
        for range in [0..2, 2..5] {
            let rows: Vec<f32> = (0..row_len * range.len()).map(|i| (i + 1000 * range.start) as f32).collect();
            carried.put(range.clone(), &rows);
            assert_eq!(carried.rows(range.clone()), rows);
            assert_eq!(Carried::from_rows(&model, range.len(), rows.clone()).into_rows(), rows);
        }
        let mut other = Carried::new(&model, 5);
        for which in 0..2 {
            for (lane, values) in carried.unpadded(which).into_iter().enumerate() {
                assert_eq!(values.len(), 5 * [[5, 20], [5, 7]][lane][which]);
                other.set_unpadded(which, lane, &values);
            }
        }
        assert_eq!(other.unpadded(0), carried.unpadded(0));
        assert_eq!(other.unpadded(1), carried.unpadded(1));
    }
}
