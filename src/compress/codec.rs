//! Blocks of values as bytes and back: half precision, `bf16`, eight bits, one bit.
//!
//! What is not finite makes its whole block NaN at the other end (of `bf16` the value alone), so that a step with it is found out everywhere. A block
//! of zeros comes back as zeros.

/// How a block is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// The exponent of a power of two that brings the largest value to 2^14 and more, as one byte, then IEEE binary16, to nearest even.
    Fp16,
    /// The upper half of an `f32`, to nearest even.
    Bf16,
    /// The largest magnitude over 127 as `f32`, then multiples of it from -127 to 127, to nearest even.
    Int8,
    /// The mean magnitude as `bf16`, then a bit a value, lowest first: whether it is negative.
    Onebit,
}

/// Blocks of narrow rows are of about this many values.
const BLOCK_VALUES: usize = 128;
/// The exponent byte of [`Codec::Fp16`] for a block that is not finite, and the least one: smaller blocks are scaled by as much as `f32` can say.
const NOT_FINITE: u8 = 255;
const LEAST_EXPONENT: u32 = 16;

/// Rows of so many columns that share a block.
pub fn rows_per_block(cols: usize) -> usize {
    (BLOCK_VALUES / cols.max(1)).max(1)
}

impl Codec {
    /// Bytes of a block of `n` values.
    pub fn encoded_len(self, n: usize) -> usize {
        match self {
            Self::Fp16 => 1 + 2 * n,
            Self::Bf16 => 2 * n,
            Self::Int8 => 4 + n,
            Self::Onebit => 2 + n.div_ceil(8),
        }
    }

    /// Writes a block behind what is there.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::Fp16 => {
                let exponent = exponent_of(values);
                out.push(exponent);
                let scale = power_of_two(141 + 127 - i32::from(exponent));
                values.iter().for_each(|value| out.extend_from_slice(&to_half(value * scale).to_le_bytes()));
            }
            Self::Bf16 => values.iter().for_each(|&value| out.extend_from_slice(&to_bf16(value).to_le_bytes())),
            Self::Int8 => {
                let scale = largest(values) / 127.0;
                out.extend_from_slice(&scale.to_le_bytes());
                // A scale so small that its inverse is not finite is as good as none.
                let inverse = Some(1.0 / scale).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
                out.extend(values.iter().map(|value| (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8));
            }
            Self::Onebit => {
                // In f64, so that the order of the additions does not show.
                let mean = values.iter().map(|value| f64::from(value.abs())).sum::<f64>() / values.len().max(1) as f64;
                out.extend_from_slice(&to_bf16(mean as f32).to_le_bytes());
                let bits = |eight: &[f32]| eight.iter().enumerate().fold(0, |bits, (i, value)| bits | u8::from(*value < 0.0) << i);
                out.extend(values.chunks(8).map(bits));
            }
        }
    }

    /// Reads a block of `out.len()` values; `bytes` are [`Self::encoded_len`] of them.
    ///
    /// # Panics
    /// If `bytes` are fewer.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert!(bytes.len() >= self.encoded_len(out.len()), "{} bytes for a block of {} values", bytes.len(), out.len());
        let half = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
        match self {
            Self::Fp16 if bytes[0] == NOT_FINITE => out.fill(f32::NAN),
            Self::Fp16 => {
                let scale = power_of_two(i32::from(bytes[0]) - 141 + 127);
                out.iter_mut().zip(bytes[1..].chunks_exact(2)).for_each(|(value, pair)| *value = from_half(half(pair)) * scale);
            }
            Self::Bf16 => out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(value, pair)| *value = from_bf16(half(pair))),
            Self::Int8 => {
                let scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                // An infinite one times zero is NaN; times another it would be infinite, which is as well.
                out.iter_mut().zip(&bytes[4..]).for_each(|(value, byte)| *value = f32::from(*byte as i8) * scale);
            }
            Self::Onebit => {
                let mean = from_bf16(half(bytes));
                for (eight, bits) in out.chunks_mut(8).zip(&bytes[2..]) {
                    eight.iter_mut().enumerate().for_each(|(i, value)| *value = if bits >> i & 1 == 1 { -mean } else { mean });
                }
            }
        }
    }
}

/// The largest magnitude; NaN if one is.
fn largest(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    // The bits of magnitudes rise with them, and those of NaN lie above all.
    f32::from_bits(bits)
}

/// The exponent of the largest magnitude, biased by 127, or [`NOT_FINITE`].
fn exponent_of(values: &[f32]) -> u8 {
    (largest(values).to_bits() >> 23).max(LEAST_EXPONENT) as u8
}

/// 2 to the power of `biased - 127`, for 1..=254; beyond, which is of no use, 0 or infinity.
fn power_of_two(biased: i32) -> f32 {
    f32::from_bits((biased.clamp(0, 255) as u32) << 23)
}

/// To the nearest `bf16`, ties to even; a NaN stays one.
pub fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

pub fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// To the nearest IEEE binary16, ties to even; a NaN stays one.
pub fn to_half(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 16 & 0x8000) as u16, bits & 0x7fff_ffff);
    sign | match magnitude {
        0x7f80_0001.. => 0x7e00,
        // From 65,536 on; what is rounded up to that carries into infinity by itself.
        0x4780_0000.. => 0x7c00,
        // Normal from 2^-14 on: the exponent's bias goes from 127 to 15.
        0x3880_0000.. => ((magnitude - 0x3800_0000 + 0xfff + (magnitude >> 13 & 1)) >> 13) as u16,
        // Multiples of 2^-24.
        _ => (f32::from_bits(magnitude) * 16_777_216.0).round_ties_even() as u16,
    }
}

pub fn from_half(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let value = match magnitude {
        0x7c00 => f32::INFINITY,
        0x7c01.. => f32::NAN,
        0x400.. => f32::from_bits((magnitude << 13) + 0x3800_0000),
        _ => magnitude as f32 / 16_777_216.0,
    };
    if bits & 0x8000 == 0 { value } else { -value }
}
