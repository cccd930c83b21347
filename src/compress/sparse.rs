//! The largest values of each tensor with their places; the others wait (Lin, Han, Mao, Wang and Dally, "Deep gradient compression", ICLR 2018).
//!
//! Places are told in pages of 65,536: the number of values on each page as `u32`, then for each its place on the page as `u16` and itself as `f32`.
//! Of equal magnitudes those in front go first. Where momentum is taken before, that of a value that goes is forgotten with it (momentum factor
//! masking), so that a stale direction is not followed again.

use anyhow::{Context, Result, ensure};

use super::sums::sum_and_tell;
use super::{Bucket, State};
use crate::comm::Communicator;

const PAGE: usize = 1 << 16;

/// How many of `n` values a share comes to: at least one.
pub(super) fn n_sent(n: usize, density: f64) -> usize {
    ((n as f64 * density).ceil() as usize).clamp(1, n.max(1))
}

/// Bytes that `n` values take.
pub(super) fn message_bytes(n: usize, density: f64) -> usize {
    4 * n.div_ceil(PAGE) + 6 * n_sent(n, density)
}

/// Appends the `n_sent` largest values, and sets them to zero; `chosen` is called for the place of each.
fn take_largest(values: &mut [f32], n_sent: usize, bytes: &mut Vec<u8>, mut chosen: impl FnMut(usize)) {
    let magnitude = |value: f32| value.to_bits() & 0x7fff_ffff;
    let mut magnitudes: Vec<u32> = values.iter().map(|&value| magnitude(value)).collect();
    let (_, &mut least, above) = magnitudes.select_nth_unstable(values.len() - n_sent);
    let mut n_equal = n_sent - above.iter().filter(|&&magnitude| magnitude > least).count();
    for (page, values) in values.chunks_mut(PAGE).enumerate() {
        let count_at = bytes.len();
        bytes.extend_from_slice(&[0; 4]);
        let mut count = 0u32;
        for (place, value) in values.iter_mut().enumerate() {
            let goes = match magnitude(*value).cmp(&least) {
                std::cmp::Ordering::Greater => true,
                std::cmp::Ordering::Equal if n_equal > 0 => {
                    n_equal -= 1;
                    true
                }
                _ => false,
            };
            if goes {
                bytes.extend_from_slice(&(place as u16).to_le_bytes());
                bytes.extend_from_slice(&value.to_le_bytes());
                *value = 0.0;
                count += 1;
                chosen(page * PAGE + place);
            }
        }
        bytes[count_at..count_at + 4].copy_from_slice(&count.to_le_bytes());
    }
}

/// Adds what [`take_largest`] wrote to `values`; the bytes behind.
fn add<'b>(bytes: &'b [u8], values: &mut [f32]) -> Result<&'b [u8]> {
    let mut rest = bytes;
    let mut next = |n: usize| {
        let (head, tail) = rest.split_at_checked(n).context("a page of values ends early")?;
        rest = tail;
        Ok::<_, anyhow::Error>(head)
    };
    for page in values.chunks_mut(PAGE) {
        let count = next(4)?;
        let count = u32::from_le_bytes([count[0], count[1], count[2], count[3]]) as usize;
        ensure!(count <= page.len(), "{count} values on a page of {}", page.len());
        for entry in next(6 * count)?.chunks_exact(6) {
            let place = usize::from(u16::from_le_bytes([entry[0], entry[1]]));
            let value = f32::from_le_bytes([entry[2], entry[3], entry[4], entry[5]]);
            *page.get_mut(place).context("a place beyond its page")? += value;
        }
    }
    Ok(rest)
}

/// Replaces a bucket's values by the sum of the largest of each rank.
pub(super) fn sum(
    comm: &mut Communicator,
    bucket: &Bucket,
    density: f64,
    whole: &mut [f32],
    values: &mut [f32],
    next: &mut State,
) -> Result<()> {
    let told = sum_and_tell(comm, whole, |bytes| {
        for member in &bucket.made_small {
            let tensor = &mut values[member.values.clone()];
            let behind = bucket.n_whole + member.values.start..bucket.n_whole + member.values.end;
            let momentum = next.momentum.get_mut(behind);
            let n = n_sent(tensor.len(), density);
            match momentum {
                Some(momentum) => take_largest(tensor, n, bytes, |place| momentum[place] = 0.0),
                None => take_largest(tensor, n, bytes, |_| ()),
            }
        }
    })?;
    if next.residual.len() == values.len() {
        next.residual.copy_from_slice(values);
    }
    values.fill(0.0);
    for rank in 0..comm.world() {
        let mut bytes = told.of(rank);
        for member in &bucket.made_small {
            bytes = add(bytes, &mut values[member.values.clone()])?;
        }
        ensure!(bytes.is_empty(), "{} bytes behind the values of rank {rank}", bytes.len());
    }
    Ok(())
}
