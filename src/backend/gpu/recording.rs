//! Commands collected until a submit: launches with their parameters, copies, clears.
//!
//! Parameters of all launches of a submit lie in one uniform buffer, a slot of 512 bytes each, and a submit holds at most [`MAX_LAUNCHES`] commands,
//! so the buffer is 2 MiB for good. Consecutive launches share a compute pass.

use std::collections::HashMap;

use anyhow::Result;

use super::clock::{Clock, Timed};
use super::health::Health;
use super::pipelines::{Pipelines, SLOT_BYTES};
use crate::kernels::{BufferId, Span};

/// Commands of one submit at most; what comes after goes into the next one.
pub(super) const MAX_LAUNCHES: usize = 4096;
/// Operands of one launch at most: WebGPU's default limit.
pub(super) const MAX_OPERANDS: usize = 8;
/// Bind groups kept at most; when there are more, all are made anew.
const MAX_GROUPS: usize = 1024;

/// Words of a buffer on the device.
#[derive(Clone)]
pub(super) struct Words {
    pub(super) buffer: wgpu::Buffer,
    pub(super) offset: usize,
    pub(super) len: usize,
}

enum Command {
    /// `within` is the span that it was recorded in, where a clock asks for that.
    Launch {
        pipeline: usize,
        group: wgpu::BindGroup,
        slot: u32,
        grid: [u32; 3],
        within: &'static str,
    },
    Copy {
        from: Words,
        to: Words,
    },
    Clear {
        words: Words,
    },
}

/// What a bind group was made for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct GroupKey {
    layout: usize,
    spans: [Option<Span>; MAX_OPERANDS],
}

/// Commands on their way to the device.
pub(super) struct Recording {
    commands: Vec<Command>,
    params: Vec<u8>,
    uniforms: wgpu::Buffer,
    groups: HashMap<GroupKey, wgpu::BindGroup>,
    /// For each buffer, the submit whose commands touched it last.
    touched: Vec<u64>,
    submit: u64,
}

impl Recording {
    pub(super) fn new(device: &wgpu::Device) -> Self {
        let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size: MAX_LAUNCHES as u64 * SLOT_BYTES,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Self { commands: Vec::new(), params: Vec::new(), uniforms, groups: HashMap::new(), touched: Vec::new(), submit: 1 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    /// Whether a command that is not yet submitted uses the buffer.
    pub(super) fn touches(&self, buffer: BufferId) -> bool {
        self.touched.get(buffer.0 as usize) == Some(&self.submit)
    }

    fn touch(&mut self, buffer: BufferId) {
        let i = buffer.0 as usize;
        if self.touched.len() <= i {
            self.touched.resize(i + 1, 0);
        }
        self.touched[i] = self.submit;
    }

    /// Adds a launch; `words` are the places of `operands`, `params` at most [`SLOT_BYTES`].
    #[expect(clippy::too_many_arguments, reason = "one call site; the parts belong to different owners")]
    pub(super) fn launch(
        &mut self,
        device: &wgpu::Device,
        health: &Health,
        pipelines: &Pipelines,
        pipeline: usize,
        operands: &[Span],
        words: &[Words],
        params: &[u8],
        grid: [u32; 3],
        within: &'static str,
    ) -> Result<()> {
        let (layout, group_layout) = pipelines.layout_of(pipeline);
        let mut key = GroupKey { layout, spans: [None; MAX_OPERANDS] };
        key.spans.iter_mut().zip(operands).for_each(|(to, span)| *to = Some(*span));
        let group = match self.groups.get(&key) {
            Some(group) => group.clone(),
            None => {
                let group = self.make_group(device, group_layout, words);
                health.check()?;
                if self.groups.len() >= MAX_GROUPS {
                    self.groups.clear();
                }
                self.groups.insert(key, group.clone());
                group
            }
        };
        let slot = self.params.len();
        self.params.extend_from_slice(params);
        self.params.resize(slot + SLOT_BYTES as usize, 0);
        operands.iter().for_each(|span| self.touch(span.buffer));
        self.commands.push(Command::Launch { pipeline, group, slot: slot as u32, grid, within });
        Ok(())
    }

    fn make_group(&self, device: &wgpu::Device, layout: &wgpu::BindGroupLayout, words: &[Words]) -> wgpu::BindGroup {
        let params = wgpu::BufferBinding { buffer: &self.uniforms, offset: 0, size: wgpu::BufferSize::new(SLOT_BYTES) };
        let operands = words.iter().map(|w| wgpu::BufferBinding {
            buffer: &w.buffer,
            offset: w.offset as u64 * 4,
            // Whole vectors of four, and at least one: shaders declare such arrays, and buffers are padded to 64 words.
            size: wgpu::BufferSize::new((w.len.max(1).next_multiple_of(4) * 4) as u64),
        });
        let entries: Vec<_> = std::iter::once(params)
            .chain(operands)
            .zip(0..)
            .map(|(buffer, binding)| wgpu::BindGroupEntry { binding, resource: wgpu::BindingResource::Buffer(buffer) })
            .collect();
        device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
    }

    /// Adds a copy.
    pub(super) fn copy(&mut self, spans: [BufferId; 2], from: Words, to: Words) {
        spans.into_iter().for_each(|b| self.touch(b));
        self.commands.push(Command::Copy { from, to });
    }

    /// Adds a clear.
    pub(super) fn clear(&mut self, buffer: BufferId, words: Words) {
        self.touch(buffer);
        self.commands.push(Command::Clear { words });
    }

    /// Forgets the bind groups of a buffer, so that its memory can go.
    pub(super) fn forget(&mut self, buffer: BufferId) {
        self.groups.retain(|key, _| key.spans.iter().flatten().all(|span| span.buffer != buffer));
    }

    /// Empties the recording into an encoder; the parameters travel by the queue, ahead of the next submit.
    /// With a clock launches of different spans are passes of their own.
    pub(super) fn encode(
        &mut self,
        queue: &wgpu::Queue,
        pipelines: &Pipelines,
        encoder: &mut wgpu::CommandEncoder,
        mut clock: Option<&mut Clock>,
    ) {
        if !self.params.is_empty() {
            queue.write_buffer(&self.uniforms, 0, &self.params);
            self.params.clear();
        }
        let is_launch = |command: &Command, of: &str| matches!(command, Command::Launch { within, .. } if *within == of);
        let counts: Vec<u32> = if clock.is_some() { runs(&self.commands) } else { Vec::new() };
        let mut counts = counts.into_iter();
        let mut commands = self.commands.drain(..).peekable();
        while let Some(command) = commands.next() {
            match command {
                Command::Copy { from, to } => {
                    encoder.copy_buffer_to_buffer(
                        &from.buffer,
                        from.offset as u64 * 4,
                        &to.buffer,
                        to.offset as u64 * 4,
                        from.len as u64 * 4,
                    );
                }
                Command::Clear { words } => {
                    encoder.clear_buffer(&words.buffer, words.offset as u64 * 4, Some(words.len as u64 * 4));
                }
                Command::Launch { pipeline, group, slot, grid, within } => {
                    let mut pass = match &mut clock {
                        Some(clock) => clock.begin(encoder, Timed { name: within, launches: counts.next().unwrap_or(0) }),
                        None => encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()),
                    };
                    let (mut next, mut bound) = (Some((pipeline, group, slot, grid)), None);
                    while let Some((pipeline, group, slot, [x, y, z])) = next {
                        if bound != Some(pipeline) {
                            pass.set_pipeline(pipelines.get(pipeline));
                            bound = Some(pipeline);
                        }
                        pass.set_bind_group(0, &group, &[slot]);
                        pass.dispatch_workgroups(x, y, z);
                        next = match commands.next_if(|command| is_launch(command, within)) {
                            Some(Command::Launch { pipeline, group, slot, grid, .. }) => Some((pipeline, group, slot, grid)),
                            _ => None,
                        };
                    }
                }
            }
        }
        drop(commands);
        self.submit += 1;
    }
}

/// Lengths of the runs of launches that were recorded in one span.
fn runs(commands: &[Command]) -> Vec<u32> {
    let names = commands.iter().map(|command| match command {
        Command::Launch { within, .. } => Some(*within),
        _ => None,
    });
    let (mut lengths, mut last) = (Vec::new(), None);
    for name in names {
        match (name, lengths.last_mut()) {
            (Some(_), Some(length)) if name == last => *length += 1,
            (Some(_), _) => lengths.push(1),
            (None, _) => {}
        }
        last = name;
    }
    lengths
}
