//! Embedding: rows of a table by token, and the table's gradient without float atomics.
//!
//! The gradient needs to know where each token occurs: [`TokenIndex`], made on the host. One workgroup column owns a row of the table and adds its
//! occurrences in order, so the sum has the same bits every time.

use bytemuck::{Pod, Zeroable};

use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, MAX_LOOP_TRIPS, ODD, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d,
    kernel_basics, loop_trips, multiple_of, operand, read, read_write,
};
use crate::pool::{CpuContext, Rows};
use crate::shape::pad_units;

/// The shader of [`EmbeddingGather`].
pub static GATHER: Shader =
    Shader { name: "embedding_gather", source: include_str!("../../shaders/embedding_gather.wgsl"), fragments: &[] };
/// The shader of [`EmbeddingGradient`].
pub static GRADIENT: Shader =
    Shader { name: "embedding_gradient", source: include_str!("../../shaders/embedding_gradient.wgsl"), fragments: &[] };

/// Vectors of four floats that one workgroup covers.
pub const EMBEDDING_VECTORS: u32 = 64;

/// `out[n, :] = table[tokens[n], :]` for `n_tokens` tokens; a token outside the table gives zeros (the host has checked them).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct EmbeddingGather {
    pub n_tokens: u32,
    /// Columns, a multiple of 4.
    pub width: u32,
    /// Rows of the table.
    pub n_classes: u32,
    /// Offset of the table in its binding.
    pub table: u32,
    pub out: u32,
}

impl Kernel for EmbeddingGather {
    kernel_basics!("embedding_gather", const { &[read("tokens"), read("table"), read_write("out")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "embedding_gather";
        multiple_of(NAME, "width", self.width, 4)?;
        multiple_of(NAME, "an offset", self.table, 4)?;
        multiple_of(NAME, "an offset", self.out, 4)?;
        at_least(NAME, "tokens", lens[0], self.n_tokens as usize)?;
        at_least(NAME, "table", lens[1], self.table as usize + self.n_classes as usize * self.width as usize)?;
        at_least(NAME, "out", lens[2], self.out as usize + self.n_tokens as usize * self.width as usize)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let vectors = u64::from(self.n_tokens) * u64::from(self.width / 4);
        Dispatch { shader: &GATHER, overrides: &[], grid: grid_1d(vectors.div_ceil(u64::from(EMBEDDING_VECTORS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [tokens, table, out] = operands else { unreachable!("three operands") };
        let (n, width) = (self.n_tokens as usize, self.width as usize);
        let (tokens, table) = (tokens.as_indices(), &table.as_slice()[self.table as usize..][..self.n_classes as usize * width]);
        let out = &mut out.as_mut_slice()[self.out as usize..][..n * width];
        ctx.pool.run(Rows { data: out, width }, n, 512, &|part: Rows<'_>, range: std::ops::Range<usize>| {
            for (n, out) in range.zip(part.data.chunks_exact_mut(width)) {
                match table.get(tokens[n] as usize * width..(tokens[n] as usize + 1) * width) {
                    Some(row) => out.copy_from_slice(row),
                    None => out.fill(0.0),
                }
            }
        });
    }
}

/// Where each token of a batch occurs, as the words that [`EmbeddingGradient`] reads:
/// `[distinct tokens][start of each one's places, and the end][places in rising order]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenIndex {
    words: Vec<u32>,
    counts: Vec<u32>,
    pub n_distinct: u32,
    /// Occurrences of the most frequent token.
    pub max_count: u32,
}

impl TokenIndex {
    /// Words that the index of `n_tokens` tokens can need at most.
    pub const fn max_words(n_tokens: usize, n_classes: usize) -> usize {
        let distinct = if n_tokens < n_classes { n_tokens } else { n_classes };
        2 * distinct + 1 + n_tokens
    }

    /// Rebuilds the index for `tokens`, all below `n_classes`, in time O(tokens + classes); allocates only when it grows.
    pub fn rebuild(&mut self, tokens: &[u32], n_classes: usize) {
        self.counts.clear();
        self.counts.resize(n_classes, 0);
        tokens.iter().for_each(|&t| self.counts[t as usize] += 1);
        self.words.clear();
        self.words.extend((0..n_classes as u32).filter(|&t| self.counts[t as usize] > 0));
        let n_distinct = self.words.len();
        self.max_count = self.counts.iter().copied().max().unwrap_or(0);
        let mut start = 0;
        for i in 0..n_distinct {
            self.words.push(start);
            let count = &mut self.counts[self.words[i] as usize];
            // From here on, `counts` holds where the token's next place goes.
            (*count, start) = (start, start + *count);
        }
        self.words.push(start);
        let places = self.words.len();
        self.words.resize(places + tokens.len(), 0);
        for (n, &token) in tokens.iter().enumerate() {
            let next = &mut self.counts[token as usize];
            self.words[places + *next as usize] = n as u32;
            *next += 1;
        }
        self.n_distinct = n_distinct as u32;
    }

    /// The distinct tokens, rising.
    pub fn tokens(&self) -> &[u32] {
        &self.words[..self.n_distinct as usize]
    }

    /// The words, for upload.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

/// `grad[token, :] += sum of dx[place, :]` over the token's places `first .. first + limit` (in the order of the index).
/// Tokens with more than [`EmbeddingGradient::LIMIT`] places take several launches.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct EmbeddingGradient {
    pub n_distinct: u32,
    pub width: u32,
    pub n_places: u32,
    pub n_classes: u32,
    /// Offset of the table's gradient in its binding.
    pub grad: u32,
    pub dx: u32,
    pub first: u32,
    pub limit: u32,
}

impl EmbeddingGradient {
    /// Places of one token that one launch adds: below the loop trips that every driver runs.
    pub const LIMIT: u32 = 32_768;
}

impl Kernel for EmbeddingGradient {
    kernel_basics!("embedding_gradient", const { &[read("index"), read("dx"), read_write("grad")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "embedding_gradient";
        multiple_of(NAME, "width", self.width, 4)?;
        multiple_of(NAME, "an offset", self.grad, 4)?;
        multiple_of(NAME, "an offset", self.dx, 4)?;
        at_least(NAME, "index", lens[0], 2 * self.n_distinct as usize + 1 + self.n_places as usize)?;
        at_least(NAME, "dx", lens[1], self.dx as usize + self.n_places as usize * self.width as usize)?;
        at_least(NAME, "grad", lens[2], self.grad as usize + self.n_classes as usize * self.width as usize)?;
        loop_trips(NAME, "limit", self.limit)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let vectors = u64::from(self.n_distinct) * u64::from(self.width / 4);
        Dispatch { shader: &GRADIENT, overrides: &[], grid: grid_1d(vectors.div_ceil(u64::from(EMBEDDING_VECTORS))) }
    }

    fn run(&self, _: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [index, dx, grad] = operands else { unreachable!("three operands") };
        let (index, width, n) = (index.as_indices(), self.width as usize, self.n_distinct as usize);
        let (dx, grad) = (&dx.as_slice()[self.dx as usize..], &mut grad.as_mut_slice()[self.grad as usize..]);
        let (tokens, rest) = index.split_at(n);
        let (starts, places) = rest.split_at(n + 1);
        for (i, &token) in tokens.iter().enumerate() {
            let first = starts[i].saturating_add(self.first);
            let end = starts[i + 1].min(first.saturating_add(self.limit));
            let row = &mut grad[token as usize * width..][..width];
            for &place in places.get(first as usize..end as usize).unwrap_or_default() {
                row.iter_mut().zip(&dx[place as usize * width..][..width]).for_each(|(g, d)| *g += d);
            }
        }
    }
}

/// The catalogue's line.
pub const GATHER_ENTRY: Entry = Entry {
    name: "embedding_gather",
    tolerance: Tolerance { absolute: 0.0, relative: 0.0, reason: "a copy" },
    cases: || {
        ODD.iter()
            .enumerate()
            .map(|(i, &n)| gather_case(n, ODD[(i + 2) % 5], 7 + i as u32))
            .chain([gather_case(1_100_000, 16, 5)])
            .collect()
    },
    bench_cases: || vec![gather_case(5000, 128, 96)],
    sized: |s| vec![gather_case(s.places(), s.padded_inputs(), s.n_classes)],
    shaders: &[&GATHER],
};

fn gather_case(n_tokens: u32, width: u32, n_classes: u32) -> Case {
    let width = pad_units(width as usize) as u32;
    Case {
        label: format!("{n_tokens} of {n_classes} E{width}"),
        kernel: Box::new(EmbeddingGather { n_tokens, width, n_classes, table: 4, out: 8 }),
        operands: vec![
            operand(n_tokens as usize, Fill::Indices { below: n_classes }),
            operand((4 + n_classes * width) as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand((8 + n_tokens * width) as usize, Fill::Poison),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const GRADIENT_ENTRY: Entry = Entry {
    name: "embedding_gradient",
    tolerance: Tolerance { absolute: 2e-3, relative: 2e-5, reason: "up to 32,768 numbers added one after another in f32" },
    cases: || {
        ODD.iter()
            .enumerate()
            .map(|(i, &n)| gradient_case(n, ODD[(i + 2) % 5], 4 + i as u32))
            .chain([gradient_case(MAX_LOOP_TRIPS + 5000, 3, 2)])
            .collect()
    },
    bench_cases: || vec![gradient_case(5000, 128, 96)],
    sized: |s| vec![gradient_case(s.places(), s.padded_inputs(), s.n_classes)],
    shaders: &[&GRADIENT],
};

fn gradient_case(n_tokens: u32, width: u32, n_classes: u32) -> Case {
    let width = pad_units(width as usize) as u32;
    let mut index = TokenIndex::default();
    // The last class stays without a token: its row must not change.
    let tokens: Vec<u32> = (0..n_tokens).map(|n| n.wrapping_mul(n).wrapping_add(n / 3) % n_classes.max(2).saturating_sub(1)).collect();
    index.rebuild(&tokens, n_classes as usize);
    let limit = EmbeddingGradient::LIMIT;
    let kernel = EmbeddingGradient {
        n_distinct: index.n_distinct,
        width,
        n_places: n_tokens,
        n_classes,
        grad: 4,
        dx: 8,
        first: u32::from(n_tokens == 17),
        limit,
    };
    Case {
        label: format!("{n_tokens} of {n_classes} E{width}"),
        kernel: Box::new(kernel),
        operands: vec![
            operand(index.words().len(), Fill::Words(index.words().to_vec())),
            operand((8 + n_tokens * width) as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand((4 + n_classes * width) as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
        ],
        flop: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_lists_every_place_once_under_its_token() {
        let tokens = [3, 1, 3, 3, 0, 1];
        let mut index = TokenIndex::default();
        for _ in 0..2 {
            index.rebuild(&tokens, 5);
            assert_eq!(index.words(), [0, 1, 3, 0, 1, 3, 6, 4, 1, 5, 0, 2, 3]);
            assert_eq!((index.n_distinct, index.max_count), (3, 3));
        }
    }
}
