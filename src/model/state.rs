//! The carried state of all streams, on the host, keyed by global stream.

/// h and c of every layer and stream, `[L, 2, streams, H]`, H padded; what [`super::Share::state`] is cut from.
#[derive(Clone, Debug, PartialEq)]
pub struct Carried {
    n_blocks: usize,
    n_streams: usize,
    hidden: usize,
    data: Vec<f32>,
}

impl Carried {
    /// Zero for `n_streams` streams; `state_len` is [`super::Model::state_len`] of `n_layers` layers (times directions).
    pub fn new(n_layers: usize, state_len: usize, n_streams: usize) -> Self {
        let n_blocks = 2 * n_layers;
        Self { n_blocks, n_streams, hidden: state_len / n_blocks, data: vec![0.0; state_len * n_streams] }
    }

    /// The state of a share's rows, as [`Self::rows`] gives them.
    pub fn from_rows(n_layers: usize, n_streams: usize, data: Vec<f32>) -> Self {
        let n_blocks = 2 * n_layers;
        Self { n_blocks, n_streams, hidden: data.len() / (n_blocks * n_streams).max(1), data }
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

    /// The rows of these streams, as a share takes them.
    pub fn rows(&self, streams: std::ops::Range<usize>) -> Vec<f32> {
        let mut rows = Vec::with_capacity(self.n_blocks * streams.len() * self.hidden);
        for block in self.data.chunks_exact((self.n_streams * self.hidden).max(1)) {
            rows.extend_from_slice(&block[streams.start * self.hidden..streams.end * self.hidden]);
        }
        rows
    }

    /// Takes the rows of these streams back.
    pub fn put(&mut self, streams: std::ops::Range<usize>, rows: &[f32]) {
        let len = streams.len() * self.hidden;
        assert_eq!(rows.len(), self.n_blocks * len, "state of {} streams", streams.len());
        for (block, rows) in self.data.chunks_exact_mut((self.n_streams * self.hidden).max(1)).zip(rows.chunks_exact(len.max(1))) {
            block[streams.start * self.hidden..streams.end * self.hidden].copy_from_slice(rows);
        }
    }

    /// h (`which` 0) or c (1) as `[L, streams, units]` without padding, for a checkpoint.
    pub fn unpadded(&self, which: usize, units: usize) -> Vec<f32> {
        let blocks = self.data.chunks_exact(self.n_streams * self.hidden).skip(which).step_by(2);
        blocks.flat_map(|block| block.chunks_exact(self.hidden).flat_map(|row| row[..units].iter().copied())).collect()
    }

    /// The reverse of [`Self::unpadded`].
    pub fn set_unpadded(&mut self, which: usize, units: usize, values: &[f32]) {
        let (n_streams, hidden) = (self.n_streams, self.hidden);
        let blocks = self.data.chunks_exact_mut(n_streams * hidden).skip(which).step_by(2);
        for (row, values) in blocks.flat_map(|block| block.chunks_exact_mut(hidden)).zip(values.chunks_exact(units)) {
            row[..units].copy_from_slice(values);
            row[units..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_put_back_are_the_rows_taken_out() {
        let mut carried = Carried::new(2, 2 * 2 * 16, 5);
        for range in [0..2, 2..5] {
            let rows: Vec<f32> = (0..4 * range.len() * 16).map(|i| (i + 1000 * range.start) as f32).collect();
            carried.put(range.clone(), &rows);
            assert_eq!(carried.rows(range), rows);
        }
        let mut other = Carried::new(2, 2 * 2 * 16, 5);
        for which in 0..2 {
            other.set_unpadded(which, 16, &carried.unpadded(which, 16));
        }
        assert_eq!(carried, other);
    }
}
