//! A message in memory that ranks of one process can read without copying it.
//!
//! Never here: plans, channels, who the peers are.

use std::ops::Range;
use std::sync::Arc;

use super::sum::{Handle, accumulate, sum_range};
use crate::pool::Isa;

/// A message of floats, held in parts that are handed to other ranks as they are: nobody copies, the writer waits its turn.
///
/// Fill it, call a collective of the [`Communicator`](super::Communicator) that made it, read the result in place. Peers may still read
/// what this rank handed out when the call returns; whoever writes then writes to a second buffer. By the time that the first is needed
/// again, all peers have been in the call between and it is free: where each call follows a [`Self::fill`], none allocates.
pub struct Shared {
    len: usize,
    rank: usize,
    world: usize,
    parts: Vec<Part>,
}

struct Part {
    range: Range<usize>,
    own: Handle,
    /// The second buffer. Made at once, so that whether it is needed early or late allocates nothing; the system gives a large one real
    /// memory when it is first written.
    spare: Handle,
    /// What came from another rank in place of `own`.
    taken: Option<Handle>,
}

impl Shared {
    pub(super) fn new(world: usize, rank: usize, len: usize, cuts: &[Range<usize>]) -> Self {
        Self { len, rank, world, parts: cuts.iter().map(Part::new).collect() }
    }

    /// Floats of the message.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parts with where they lie in the message, in order: this rank's values before a collective, its result afterwards.
    pub fn parts(&self) -> impl Iterator<Item = (Range<usize>, &[f32])> {
        self.parts.iter().map(|part| (part.range.clone(), part.values()))
    }

    /// The parts to be written; what they hold is of no use.
    pub fn parts_mut(&mut self) -> impl Iterator<Item = (Range<usize>, &mut [f32])> {
        self.parts.iter_mut().map(|part| (part.range.clone(), part.overwrite()))
    }

    /// Copies a message in.
    ///
    /// # Panics
    /// If `values` has another length.
    pub fn fill(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.len, "a message must be filled with as many floats as it has");
        self.parts_mut().for_each(|(range, part)| part.copy_from_slice(&values[range]));
    }

    /// Copies the message out.
    ///
    /// # Panics
    /// If `values` has another length.
    pub fn copy_to(&self, values: &mut [f32]) {
        assert_eq!(values.len(), self.len, "a message can be copied only to as many floats as it has");
        self.parts().for_each(|(range, part)| values[range].copy_from_slice(part));
    }

    /// This rank's own segment, as [`plan::owned_segment`](super::plan::owned_segment) has it.
    pub fn own_segment(&self) -> Range<usize> {
        super::plan::owned_segment(self.world, self.rank, self.len)
    }

    /// Writes this rank's own segment, for an all-gather; the rest stays.
    ///
    /// # Panics
    /// If `values` is not as long as [`Self::own_segment`].
    pub fn fill_own(&mut self, values: &[f32]) {
        let own = self.own_segment();
        assert_eq!(values.len(), own.len(), "a segment must be filled with as many floats as it has");
        for part in &mut self.parts {
            let both = own.start.max(part.range.start)..own.end.min(part.range.end);
            if both.is_empty() {
                continue;
            }
            let start = part.range.start;
            let memory = if both == part.range { part.overwrite() } else { part.keep() };
            memory[both.start - start..both.end - start].copy_from_slice(&values[both.start - own.start..both.end - own.start]);
        }
    }

    /// Values of a range that lies within one part; none if it is cut.
    pub fn get(&self, range: Range<usize>) -> Option<&[f32]> {
        let part = self.parts.iter().find(|part| part.range.start <= range.start && range.end <= part.range.end)?;
        part.values().get(range.start - part.range.start..range.end - part.range.start)
    }

    /// Cuts the message in these parts and keeps its values; nothing happens if it is cut so already.
    pub(super) fn cut(&mut self, cuts: &[Range<usize>]) {
        if self.parts.iter().map(|part| &part.range).eq(cuts) {
            return;
        }
        let mut values = vec![0.0; self.len];
        self.copy_to(&mut values);
        self.parts = cuts.iter().map(Part::new).collect();
        self.fill(&values);
    }

    /// Something to read `segment` by, for another rank.
    pub(super) fn handle(&self, segment: &Range<usize>) -> Option<Handle> {
        self.parts.iter().find(|part| part.range == *segment).map(Part::handle)
    }

    /// Reads `segment` from now on where another rank has it.
    pub(super) fn take(&mut self, segment: &Range<usize>, theirs: Handle) {
        if let Some(part) = self.parts.iter_mut().find(|part| part.range == *segment && !part.range.is_empty()) {
            part.taken = Some(theirs);
        }
    }

    /// Adds others' values to `segment`, in their order, the own ones last.
    pub(super) fn accumulate(&mut self, isa: Isa, segment: &Range<usize>, theirs: &[Handle]) {
        if let Some(part) = self.parts.iter_mut().find(|part| part.range == *segment && !part.range.is_empty()) {
            accumulate(isa, part.keep(), theirs);
        }
    }

    /// Adds up all ranks' values of the whole message, of which this rank has its own and `theirs` has the next ranks', in ring order:
    /// each of `segments` begins with the rank after its owner's.
    pub(super) fn sum_all(&mut self, isa: Isa, segments: &[Range<usize>], theirs: &[Handle]) {
        let (rank, world) = (self.rank, self.world);
        let Some(part) = self.parts.first_mut() else { return };
        let Part { own, spare, taken, .. } = part;
        let mine = taken.as_ref().unwrap_or(own);
        let of = |of: usize| match (of + world - rank) % world {
            0 => mine.as_slice(),
            distance => theirs[distance - 1].as_slice(),
        };
        let out = writable(spare, mine.len());
        for (owner, segment) in segments.iter().enumerate().filter(|(_, segment)| !segment.is_empty()) {
            sum_range(isa, &mut out[segment.clone()], world, segment, |idx| of((owner + 1 + idx) % world));
        }
        *taken = None;
        std::mem::swap(own, spare);
    }
}

impl Part {
    fn new(range: &Range<usize>) -> Self {
        let memory = || Arc::new(vec![0.0; range.len()]);
        Self { range: range.clone(), own: memory(), spare: memory(), taken: None }
    }

    fn handle(&self) -> Handle {
        Arc::clone(self.taken.as_ref().unwrap_or(&self.own))
    }

    fn values(&self) -> &[f32] {
        self.taken.as_ref().unwrap_or(&self.own)
    }

    /// Memory that nobody else reads, whatever lies in it.
    fn overwrite(&mut self) -> &mut [f32] {
        self.taken = None;
        if Arc::get_mut(&mut self.own).is_none() {
            std::mem::swap(&mut self.own, &mut self.spare);
        }
        writable(&mut self.own, self.range.len())
    }

    /// Memory that nobody else reads, with the part's values in it.
    fn keep(&mut self) -> &mut [f32] {
        let read = match self.taken.take() {
            // It may be the own memory, come back round the ring.
            Some(taken) if Arc::ptr_eq(&taken, &self.own) => None,
            taken => taken,
        };
        match read {
            None if Arc::get_mut(&mut self.own).is_some() => {}
            None => {
                std::mem::swap(&mut self.own, &mut self.spare);
                writable(&mut self.own, self.range.len()).copy_from_slice(&self.spare);
            }
            Some(read) => {
                let own = self.overwrite();
                own.copy_from_slice(&read);
            }
        }
        writable(&mut self.own, self.range.len())
    }
}

/// The memory behind a handle; other memory where someone still reads it.
fn writable(handle: &mut Handle, len: usize) -> &mut [f32] {
    if Arc::get_mut(handle).is_none_or(|memory| memory.len() != len) {
        *handle = Arc::new(vec![0.0; len]);
    }
    Arc::make_mut(handle).as_mut_slice()
}
