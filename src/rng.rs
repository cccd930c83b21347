//! Counter-based random numbers: every draw is a function of what it is for, never of who draws it or when.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The same function stands in
//! `shaders/shared/philox.wgsl`, so that CPU and GPU draw the same bits.

/// What a draw is for; part of the counter, so that two purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Dropout between layers.
    Dropout = 1,
    /// Initial parameters; the layer is the tensor's index in the table.
    Init = 2,
    /// The order of samples in an epoch.
    Shuffle = 3,
    /// Sampling of generated text.
    Sample = 4,
    /// Random splits of a data set.
    Split = 5,
    /// Data made for tests and benches.
    Test = 6,
    /// Zoneout of h and of c.
    ZoneoutH = 7,
    ZoneoutC = 8,
    /// Recurrent dropout: masks over h.
    RecurrentDropout = 9,
    /// Masks over recurrent weights.
    WeightDrop = 10,
    /// Factors that low-rank sums of gradients begin with; the layer is the tensor's index in the table.
    Factor = 11,
}

/// One block of Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.
#[inline]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let (mut c, mut k) = (counter, key);
    for _ in 0..10 {
        let p0 = M0 * u64::from(c[0]);
        let p1 = M1 * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// The key of one step: seed and global step folded into 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKey(pub [u32; 2]);

impl StepKey {
    /// The key for `seed` at `step` (0 for what happens before the first step).
    pub fn new(seed: u64, step: u64) -> Self {
        let words = philox([step as u32, (step >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
        Self([words[0], words[1]])
    }

    /// Four words for units `4 * block .. 4 * block + 4` of `stream` at `time` in `layer`.
    #[inline]
    pub fn draw(self, purpose: Purpose, layer: u32, stream: u32, time: u32, block: u32) -> [u32; 4] {
        philox([block, time, stream, tag(purpose, layer)], self.0)
    }
}

/// The counter's fourth word: purpose in the low byte, layer above it.
pub const fn tag(purpose: Purpose, layer: u32) -> u32 {
    (layer << 8) | purpose as u32
}

/// A stream of numbers for sequential uses (initial values, shuffles, sampling).
#[derive(Clone, Debug)]
pub struct Stream {
    key: StepKey,
    tag: u32,
    stream: u32,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// Numbers for one purpose; `index` tells apart tensors, epochs or the like, `stream` what is drawn within.
    pub fn new(key: StepKey, purpose: Purpose, index: u32, stream: u32) -> Self {
        Self { key, tag: tag(purpose, index), stream, block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox([self.block as u32, (self.block >> 32) as u32, self.stream, self.tag], self.key.0);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform in `[0, 1)`, 24 bits.
    pub fn uniform(&mut self) -> f32 {
        unit_f32(self.next_u32())
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform_f64(&mut self) -> f64 {
        let bits = (u64::from(self.next_u32()) << 32) | u64::from(self.next_u32());
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n` without bias (Lemire's rejection); `n` must not be 0.
    pub fn below(&mut self, n: u32) -> u32 {
        assert!(n > 0, "below(0) has no value to return");
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(n);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// Standard normal by Box and Muller's method.
    pub fn normal(&mut self) -> f64 {
        let u = 1.0 - self.uniform_f64();
        let v = self.uniform_f64();
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    }

    /// Fisher and Yates's shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j =
                if i < u32::MAX as usize { self.below(i as u32 + 1) as usize } else { (self.uniform_f64() * (i as f64 + 1.0)) as usize };
            items.swap(i, j);
        }
    }
}

/// A word as a number in `[0, 1)`: its upper 24 bits.
#[inline]
pub fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // Known-answer tests of Random123 for philox4x32-10.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn below_reaches_every_value_and_no_other() {
        let mut stream = Stream::new(StepKey::new(1, 0), Purpose::Test, 0, 0);
        let mut seen = [0; 7];
        for _ in 0..7000 {
            seen[stream.below(7) as usize] += 1;
        }
        assert!(seen.iter().all(|&n| (800..1200).contains(&n)), "{seen:?}");
    }
}
