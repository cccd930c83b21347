//! The CPU as a backend: buffers are vectors, launches run at once on the worker's own threads.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Backend, BufferId, DeviceError, DeviceInfo, Limits, Readback, Span, SweepPlan};
use crate::kernels::lstm::sweep_cpu;
use crate::kernels::{Access, Kernel, Operand};
use crate::pool::{CpuContext, LINE, line_start};

/// The backend `cpu:THREADS`.
pub struct CpuBackend {
    info: DeviceInfo,
    ctx: CpuContext,
    buffers: Vec<Option<Buffer>>,
}

/// Words from the start of a cache line on: a vector across two lines costs two accesses, and every row of a tile would have one.
struct Buffer {
    data: Vec<f32>,
    skip: usize,
    len: usize,
}

impl Buffer {
    /// None where there is no memory.
    fn zeroed(len: usize) -> Option<Self> {
        let mut data = Vec::new();
        data.try_reserve_exact(len + LINE).ok()?;
        data.resize(len + LINE, 0.0);
        let skip = line_start(&data);
        Some(Self { data, skip, len })
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.skip..self.skip + self.len]
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.skip..self.skip + self.len]
    }
}

impl CpuBackend {
    /// A backend with `n_threads` threads of its own.
    ///
    /// # Errors
    /// When the operating system starts no more threads.
    pub fn new(n_threads: usize) -> Result<Self> {
        let ctx = CpuContext::new(n_threads)?;
        let info = DeviceInfo {
            spec: format!("cpu:{n_threads}"),
            name: processor_name(),
            kind: format!("cpu {}", ctx.isa.name()),
            driver: ctx.isa.name().to_owned(),
            is_software: false,
            is_gpu: false,
        };
        Ok(Self { info, ctx, buffers: Vec::new() })
    }

    fn get(&self, span: Span) -> Result<&[f32]> {
        let buffer = self.buffers.get(span.buffer.0 as usize).and_then(Option::as_ref).context("a buffer that was freed is used")?;
        buffer
            .get(span.offset..span.offset + span.len)
            .with_context(|| format!("span {}+{} of a buffer of {} words", span.offset, span.len, buffer.len()))
    }

    fn get_mut(&mut self, span: Span) -> Result<&mut [f32]> {
        let buffer = self.buffers.get_mut(span.buffer.0 as usize).and_then(Option::as_mut).context("a buffer that was freed is used")?;
        let len = buffer.len();
        buffer
            .get_mut(span.offset..span.offset + span.len)
            .with_context(|| format!("span {}+{} of a buffer of {len} words", span.offset, span.len))
    }
}

/// The processor's name as the system tells it.
fn processor_name() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").ok();
    let line = told.as_deref().and_then(|text| text.lines().find(|l| l.starts_with("model name")));
    line.and_then(|l| l.split_once(':')).map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Words that lie on the host already.
struct Ready(Vec<f32>);

impl Readback for Ready {
    fn wait(self: Box<Self>, _: Duration) -> Result<Vec<f32>> {
        Ok(self.0)
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn limits(&self) -> Limits {
        Limits { max_buffer_bytes: u64::from(u32::MAX) * 4, max_binding_bytes: u64::from(u32::MAX) * 4 }
    }

    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        let buffer = Buffer::zeroed(len).ok_or_else(|| DeviceError::OutOfMemory {
            device: self.info.spec.clone(),
            what: format!("there is none for {label}, {} MiB", (len * 4) >> 20),
        })?;
        self.buffers.push(Some(buffer));
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    fn free(&mut self, buffer: BufferId) {
        if let Some(slot) = self.buffers.get_mut(buffer.0 as usize) {
            *slot = None;
        }
    }

    fn len(&self, buffer: BufferId) -> usize {
        self.buffers.get(buffer.0 as usize).and_then(Option::as_ref).map_or(0, |buffer| buffer.len)
    }

    fn write(&mut self, to: Span, words: &[f32]) -> Result<()> {
        ensure!(to.len == words.len(), "{} words written to a span of {}", words.len(), to.len);
        self.get_mut(to)?.copy_from_slice(words);
        Ok(())
    }

    fn copy(&mut self, from: Span, to: Span) -> Result<()> {
        ensure!(
            from.len == to.len && from.buffer != to.buffer,
            "a copy needs two buffers and equal lengths, not {} and {}",
            from.len,
            to.len
        );
        self.get(from)?;
        let mut target = self.buffers[to.buffer.0 as usize].take().context("a buffer that was freed is used")?;
        let room = target.get_mut(to.offset..to.offset + to.len).context("a copy beyond the end of a buffer");
        let done = room.and_then(|room| self.get(from).map(|words| room.copy_from_slice(words)));
        self.buffers[to.buffer.0 as usize] = Some(target);
        done
    }

    fn clear(&mut self, span: Span) -> Result<()> {
        self.get_mut(span)?.fill(0.0);
        Ok(())
    }

    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        let _span = tracing::debug_span!("launch", kernel = kernel.name()).entered();
        let bindings = kernel.bindings();
        ensure!(bindings.len() == operands.len(), "{} takes {} operands, not {}", kernel.name(), bindings.len(), operands.len());
        const MOST: usize = 13;
        let mut lens = [0; MOST];
        lens.iter_mut().zip(operands).for_each(|(len, span)| *len = span.len);
        kernel.check(&lens[..operands.len()])?;
        // Written buffers leave the table for the launch, so that the borrow checker sees that no other operand is one of them.
        let mut written: [Option<Buffer>; MOST] = Default::default();
        // Another written part of the same buffer, as the gradients of both directions are.
        let mut beside = [None; MOST];
        for (i, (binding, span)) in bindings.iter().zip(operands).enumerate() {
            if binding.access == Access::ReadWrite && span.len > 0 {
                written[i] = self.buffers.get_mut(span.buffer.0 as usize).and_then(Option::take);
                let owner = (0..i).find(|&owner| written[owner].is_some() && operands[owner].buffer == span.buffer);
                if let (None, Some(owner)) = (&written[i], owner.filter(|&owner| beside[owner].is_none())) {
                    beside[owner] = Some(i);
                } else if written[i].is_none() {
                    give_back(&mut self.buffers, &mut written, operands);
                    anyhow::bail!("{}: the buffer of {} is freed or written twice", kernel.name(), binding.name);
                }
            }
        }
        let mut bound: [Operand<'_>; MOST] = std::array::from_fn(|_| Operand::Read(&[]));
        let mut fault = None;
        let range_of = |span: &Span| span.offset..span.offset + span.len;
        for (i, ((binding, span), own)) in bindings.iter().zip(operands).zip(written.iter_mut()).enumerate() {
            if beside.contains(&Some(i)) {
                // Bound with its owner.
                continue;
            }
            let range = range_of(span);
            let words = match (own, beside[i]) {
                (Some(own), Some(second)) => own.get_disjoint_mut([range, range_of(&operands[second])]).ok().map(|[here, there]| {
                    bound[second] = Operand::ReadWrite(there);
                    Operand::ReadWrite(here)
                }),
                (Some(own), None) => own.get_mut(range).map(Operand::ReadWrite),
                // What is not there has no words and no buffer.
                (None, _) if span.len == 0 && binding.access == Access::ReadWrite => Some(Operand::ReadWrite(&mut [])),
                (None, _) => {
                    self.buffers.get(span.buffer.0 as usize).and_then(Option::as_ref).and_then(|b| b.get(range)).map(Operand::Read)
                }
            };
            match words {
                Some(words) => bound[i] = words,
                None => fault = Some(binding.name),
            }
        }
        if fault.is_none() {
            kernel.run(&mut self.ctx, &mut bound[..operands.len()]);
        }
        give_back(&mut self.buffers, &mut written, operands);
        match fault {
            None => Ok(()),
            Some(name) => anyhow::bail!("{}: {name} is also written in part, freed, or shorter than its span", kernel.name()),
        }
    }

    fn plan(&self) -> SweepPlan {
        sweep_cpu::sweep
    }

    fn read(&mut self, spans: &[Span], mut memory: Vec<f32>) -> Result<Box<dyn Readback>> {
        memory.clear();
        for &span in spans {
            memory.extend_from_slice(self.get(span)?);
        }
        Ok(Box::new(Ready(memory)))
    }

    fn submit(&mut self) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, _: Duration) -> Result<()> {
        Ok(())
    }
}

fn give_back(buffers: &mut [Option<Buffer>], written: &mut [Option<Buffer>], operands: &[Span]) {
    for (own, span) in written.iter_mut().zip(operands) {
        if let Some(own) = own.take() {
            buffers[span.buffer.0 as usize] = Some(own);
        }
    }
}
