//! One GPU as a backend, through wgpu: the only place that names it.
//!
//! Launches, copies and clears are collected and handed over by `submit`, by a readback, by a write to a buffer that they use, or when there are so many
//! that they may take long (`pace`), at most 4,096. After a device is lost wgpu accepts and drops commands silently, so every method here asks first and returns `DeviceError::Lost`.

pub mod adapters;
mod clock;
mod health;
mod pace;
mod pipelines;
mod readback;
mod recording;

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::adapters::{AdapterKind, AdapterSummary};
use self::clock::Clock;
use self::health::{Deadline, Health};
use self::pace::Pace;
use self::pipelines::{Pipelines, SLOT_BYTES};
use self::readback::{Pending, Staging};
use self::recording::{MAX_OPERANDS, Recording, Words};
use super::tuning::{Choice, Choices, Tuner, fastest};
use super::{Backend, BufferId, DeviceError, DeviceInfo, Limits, Readback, Span, SweepPlan};
use crate::kernels::lstm::{SweepArgs, SweepTrial, SweepWay, sweep_plan, whole_sweep_plan};
use crate::kernels::{Access, AdapterClass, As, Dispatch, Kernel, SizeClass, Trial};
use crate::shape::{ALIGN, round_up};
use crate::usage::UsageError;

/// Changes whenever a shader computes other bits than before.
const SHADER_VARIANTS: u32 = 3;
/// Bytes written that make a submit of their own, so that staging memory stays bounded.
const MAX_WRITTEN_BYTES: u64 = 64 << 20;

/// How long the end of a backend waits for the times of its last passes.
const LAST_TIMES: Duration = Duration::from_secs(10);

/// Operands of one measurement take at most so much; larger launches stay as they are.
const MOST_TRIAL_BYTES: u64 = 1 << 30;
/// Rounds of a measurement, and seconds that the launches of one sample take at least.
const TRIAL_ROUNDS: usize = 4;
const TRIAL_SECONDS: f64 = 2e-3;
/// How long a measurement waits for a device.
const TRIAL_PATIENCE: Duration = Duration::from_secs(30);

/// What waits for a measurement.
enum Wanted {
    Kernel(Trial),
    Sweep(SweepTrial),
}

impl Wanted {
    /// Words of each operand.
    fn lens(&self) -> Vec<usize> {
        match self {
            Self::Kernel(trial) => trial.lens.clone(),
            Self::Sweep(trial) => trial.lens().to_vec(),
        }
    }

    fn flop(&self) -> u64 {
        match self {
            Self::Kernel(trial) => trial.flop,
            Self::Sweep(trial) => trial.flop(),
        }
    }
}

/// One of the ways to do it.
#[derive(Clone, Copy)]
enum Candidate {
    Launch(Dispatch),
    Sweep(SweepWay),
}

impl Candidate {
    fn name(&self) -> String {
        match self {
            Self::Launch(dispatch) => name_of(dispatch),
            Self::Sweep(way) => way.name(),
        }
    }
}

/// Tells the seconds that a launch of a size class takes as a variant, in the place of a measurement; for tests.
pub type Stopwatch = Box<dyn FnMut(&SizeClass, &str) -> f64 + Send>;

/// What a backend is made with.
#[derive(Default)]
pub struct GpuOptions {
    /// The class that kernels choose their variants by; by default the adapter's own. Software adapters have nothing to choose among as they are.
    pub class: Option<AdapterClass>,
    pub stopwatch: Option<Stopwatch>,
    /// Ask for cooperative matrices, which wgpu calls experimental, where the adapter has them.
    pub cooperative: bool,
}

struct Memory {
    buffer: wgpu::Buffer,
    len: usize,
}

/// The backend `gpu:INDEX`.
pub struct GpuBackend {
    info: DeviceInfo,
    adapter: AdapterSummary,
    class: AdapterClass,
    limits: Limits,
    health: Arc<Health>,
    device: wgpu::Device,
    queue: wgpu::Queue,
    buffers: Vec<Option<Memory>>,
    pipelines: Pipelines,
    recording: Recording,
    clock: Option<Clock>,
    pace: Pace,
    tuner: Tuner<Wanted>,
    stopwatch: Option<Stopwatch>,
    staging: Arc<Staging>,
    last: Option<wgpu::SubmissionIndex>,
    /// Bytes written since the last submit: they lie in staging memory of wgpu's until then.
    written_bytes: u64,
}

impl GpuBackend {
    /// A device of its own on the adapter at `index` of [`adapters::list`]; several backends may share an adapter.
    ///
    /// # Errors
    /// There is no such adapter, or it gives no device.
    pub fn new(index: usize) -> Result<Self> {
        Self::with(index, GpuOptions::default())
    }

    /// [`Self::new`] with a word on its variants.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(index: usize, options: GpuOptions) -> Result<Self> {
        let (adapter, summary) = adapters::open(index)?;
        let timing = if Clock::is_wanted() { adapter.features() & wgpu::Features::TIMESTAMP_QUERY } else { wgpu::Features::empty() };
        let half = adapter.features() & wgpu::Features::SHADER_F16;
        let cooperative = if options.cooperative { adapters::cooperative(&adapter) } else { wgpu::Features::empty() };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("carrousel"),
            required_features: timing | half | cooperative,
            required_limits: adapter.limits(),
            experimental_features: if cooperative.is_empty() {
                wgpu::ExperimentalFeatures::disabled()
            } else {
                // SAFETY: only cooperative matrices are asked for, which the adapter lists, and the shader that uses them keeps within the shapes listed,
                // within its arrays, and to uniform control flow.
                unsafe { wgpu::ExperimentalFeatures::enabled() }
            },
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .with_context(|| format!("gpu:{index} ({}) gives no device", summary.name))?;
        let health = Health::watch(&device, format!("gpu:{index} ({})", summary.name));
        let is_software = summary.kind == AdapterKind::Software;
        let info = DeviceInfo {
            spec: format!("gpu:{index}"),
            name: summary.name.clone(),
            kind: format!("{} {} shader variants {SHADER_VARIANTS}", summary.name, summary.driver),
            driver: summary.driver.clone(),
            is_software,
            is_gpu: true,
        };
        let recording = Recording::new(&device);
        let clock = if timing.is_empty() { None } else { Clock::new(&device, &queue, info.spec.clone()) };
        health.check()?;
        let own_class = if is_software { AdapterClass::Software } else { AdapterClass::Hardware };
        Ok(Self {
            info,
            class: options.class.unwrap_or(own_class),
            limits: Limits { max_buffer_bytes: summary.limits.max_buffer_bytes, max_binding_bytes: summary.limits.max_binding_bytes },
            adapter: summary,
            health,
            device,
            queue,
            buffers: Vec::new(),
            pipelines: Pipelines::default(),
            recording,
            clock,
            pace: Pace::new(is_software),
            tuner: Tuner::default(),
            stopwatch: options.stopwatch,
            staging: Arc::default(),
            last: None,
            written_bytes: 0,
        })
    }

    /// The adapter as listed.
    pub fn adapter(&self) -> &AdapterSummary {
        &self.adapter
    }

    /// Destroys the device as a driver's reset would; for tests of recovery.
    #[doc(hidden)]
    pub fn destroy_device(&self) {
        self.device.destroy();
        // wgpu tells of it once the queue is empty.
        let _ = self.device.poll(wgpu::PollType::Wait { submission_index: None, timeout: Some(Duration::from_secs(10)) });
    }

    fn words(&self, span: Span) -> Result<Words> {
        let memory = self.buffers.get(span.buffer.0 as usize).and_then(Option::as_ref).context("a buffer that was freed is used")?;
        let fits = span.offset.checked_add(span.len).is_some_and(|end| end <= memory.len);
        ensure!(fits, "span {}+{} of a buffer of {} words", span.offset, span.len, memory.len);
        Ok(Words { buffer: memory.buffer.clone(), offset: span.offset, len: span.len })
    }

    /// Makes room for one more command.
    fn make_room(&mut self) -> Result<()> {
        self.health.check()?;
        if self.recording.len() >= self.pace.most() { self.flush(None).map(drop) } else { Ok(()) }
    }

    /// Submits what was collected, and behind it the copies to a staging buffer.
    fn flush(&mut self, parts: Option<&[Words]>) -> Result<Option<Pending>> {
        self.health.check()?;
        if self.recording.is_empty() && self.written_bytes == 0 && parts.is_none() {
            return Ok(None);
        }
        let n_commands = self.recording.len();
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.recording.encode(&self.queue, &self.pipelines, &mut encoder, self.clock.as_mut());
        let pending = parts.map(|parts| Pending::encode(&self.staging, &self.device, parts, &mut encoder));
        let times = self.clock.as_mut().and_then(|clock| clock.resolve(&self.device, &mut encoder));
        self.last = Some(self.queue.submit([encoder.finish()]));
        if let Some(clock) = &mut self.clock {
            times.into_iter().for_each(|times| clock.submitted(times));
            clock.tell();
        }
        self.written_bytes = 0;
        if n_commands > 0 && self.class == AdapterClass::Hardware {
            self.pace.watch(&self.queue, n_commands);
        }
        self.health.check()?;
        Ok(pending)
    }
}

/// The name that a launch is chosen and recorded by.
fn name_of(Dispatch { shader, overrides, .. }: &Dispatch) -> String {
    // What an operand's order asks for is no choice, and stands in the size class.
    let is_choice = |(name, _): &&(&str, f64)| !name.starts_with("TRANS_");
    let constants = overrides.iter().filter(is_choice).map(|(name, value)| format!(" {name}={value}"));
    std::iter::once(shader.variant()).chain(constants).collect()
}

/// Whether the device itself is in trouble, not a single command.
fn is_of_device(error: &anyhow::Error) -> bool {
    error.downcast_ref::<DeviceError>().is_some_and(|error| !matches!(error, DeviceError::Refused { .. }))
}

impl GpuBackend {
    /// How to launch a kernel: as was chosen for launches of this size, else as it says itself.
    fn dispatch_of(&mut self, kernel: &dyn Kernel) -> Dispatch {
        let usual = kernel.dispatch(self.class);
        let Some(class) = kernel.size_class() else { return usual };
        let candidates = kernel.candidates(self.class);
        let Some(of_usual) = candidates.iter().position(|c| *c == usual).filter(|_| candidates.len() > 1) else { return usual };
        let names = || candidates.iter().map(name_of).collect();
        let number = self.tuner.number(class, of_usual, names, || kernel.trial().map(Wanted::Kernel));
        candidates.get(number).copied().unwrap_or(usual)
    }

    /// What can do it, and which of them does as long as nothing was chosen.
    fn candidates(&self, wanted: &Wanted) -> (Vec<Candidate>, usize) {
        match wanted {
            Wanted::Kernel(trial) => {
                let (launches, usual) = (trial.kernel.candidates(self.class), trial.kernel.dispatch(self.class));
                let usual = launches.iter().position(|launch| *launch == usual).unwrap_or(0);
                (launches.into_iter().map(Candidate::Launch).collect(), usual)
            }
            Wanted::Sweep(trial) => {
                let ways = trial.ways();
                let usual = ways.iter().position(|way| *way == SweepWay::fixed(self.class)).unwrap_or(0);
                (ways.into_iter().map(Candidate::Sweep).collect(), usual)
            }
        }
    }

    /// The fastest candidate of a size class and what each takes; none where time or memory are too short for a measurement.
    fn measure(
        &mut self,
        class: SizeClass,
        wanted: &Wanted,
        (candidates, usual): (&[Candidate], usize),
        is_over: &mut dyn FnMut() -> bool,
    ) -> Result<Option<(usize, Vec<f64>)>> {
        if let Some(stopwatch) = &mut self.stopwatch {
            return fastest(candidates.len(), usual, 1, &mut |i| Ok(stopwatch(&class, &candidates[i].name())), is_over);
        }
        let lens = wanted.lens();
        let bytes: u64 = lens.iter().map(|len| 4 * *len as u64).sum();
        if is_over() || bytes > MOST_TRIAL_BYTES || lens.iter().any(|len| 4 * *len as u64 > self.limits.max_binding_bytes) {
            return Ok(None);
        }
        let mut spans = Vec::with_capacity(lens.len());
        let measured = self.alloc_trial(&lens, &mut spans).and_then(|()| self.time_all(wanted, (candidates, usual), &spans, is_over));
        spans.iter().for_each(|span| self.free(span.buffer));
        match measured {
            Err(e) if matches!(e.downcast_ref(), Some(DeviceError::OutOfMemory { .. })) => Ok(None),
            measured => measured,
        }
    }

    fn alloc_trial(&mut self, lens: &[usize], spans: &mut Vec<Span>) -> Result<()> {
        for &len in lens {
            let buffer = self.alloc("a measurement", len)?;
            spans.push(Span { buffer, offset: 0, len });
        }
        Ok(())
    }

    /// Launches it once, as it was kept for a measurement.
    fn attempt(&mut self, wanted: &Wanted, candidate: Candidate, spans: &[Span]) -> Result<()> {
        match (wanted, candidate) {
            (Wanted::Kernel(trial), Candidate::Launch(dispatch)) => self.launch(&As { kernel: &*trial.kernel, dispatch }, spans),
            (Wanted::Sweep(trial), Candidate::Sweep(way)) => {
                let operands = spans.try_into().context("a sweep has seven operands")?;
                trial.run(way, operands, &mut |kernel, operands| self.launch(kernel, operands))
            }
            _ => Ok(()),
        }
    }

    fn time_all(
        &mut self,
        wanted: &Wanted,
        (candidates, usual): (&[Candidate], usize),
        spans: &[Span],
        is_over: &mut dyn FnMut() -> bool,
    ) -> Result<Option<(usize, Vec<f64>)>> {
        // Launches of a sample by candidate; 0: it is not built yet.
        let mut n_launches = vec![0_usize; candidates.len()];
        let mut time = |candidate: usize| -> Result<f64> {
            let mut sample = |n: usize| -> Result<f64> {
                let start = Instant::now();
                (0..n).try_for_each(|_| self.attempt(wanted, candidates[candidate], spans))?;
                self.wait(TRIAL_PATIENCE)?;
                Ok(start.elapsed().as_secs_f64() / n as f64)
            };
            let known = n_launches[candidate];
            if known > 0 {
                return sample(known);
            }
            match sample(1) {
                Ok(_) => {}
                // Its shader does not fit the adapter, or the driver refuses it: the others are there.
                Err(e) if !is_of_device(&e) => return Ok(f64::INFINITY),
                Err(e) => return Err(e),
            }
            let about = sample(1)?.min(sample(4)?);
            n_launches[candidate] = ((TRIAL_SECONDS / about.max(1e-9)) as usize).clamp(1, 1000);
            sample(n_launches[candidate])
        };
        fastest(candidates.len(), usual, TRIAL_ROUNDS, &mut time, is_over)
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Backend for GpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        self.health.check()?;
        let id = u32::try_from(self.buffers.len()).context("too many buffers")?;
        // Whole lines of 64 words: a binding may then be rounded up to a vector.
        let size = round_up(len.max(1), ALIGN) as u64 * 4;
        let most = self.limits.max_buffer_bytes;
        UsageError::unless(size <= most, || {
            format!(
                "{label} needs a buffer of {:.1} MiB, max_buffer_size of {} is {:.1} MiB; lower --batch-size, --seq-len or --hidden",
                mib(size),
                self.health.device(),
                mib(most)
            )
        })?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false });
        self.health.check().with_context(|| format!("no memory for {label}: {:.1} MiB", mib(size)))?;
        self.buffers.push(Some(Memory { buffer, len }));
        Ok(BufferId(id))
    }

    fn free(&mut self, buffer: BufferId) {
        if let Some(slot) = self.buffers.get_mut(buffer.0 as usize) {
            *slot = None;
            self.recording.forget(buffer);
        }
    }

    fn len(&self, buffer: BufferId) -> usize {
        self.buffers.get(buffer.0 as usize).and_then(Option::as_ref).map_or(0, |m| m.len)
    }

    fn write(&mut self, to: Span, words: &[f32]) -> Result<()> {
        self.health.check()?;
        ensure!(to.len == words.len(), "{} words written to a span of {}", words.len(), to.len);
        let place = self.words(to)?;
        // The queue's writes come before the next submit, so what was collected on this buffer must go first.
        if self.recording.touches(to.buffer) {
            self.flush(None)?;
        }
        if !words.is_empty() {
            self.queue.write_buffer(&place.buffer, place.offset as u64 * 4, bytemuck::cast_slice(words));
            self.written_bytes += words.len() as u64 * 4;
        }
        if self.written_bytes > MAX_WRITTEN_BYTES { self.flush(None).map(drop) } else { Ok(self.health.check()?) }
    }

    fn copy(&mut self, from: Span, to: Span) -> Result<()> {
        ensure!(
            from.len == to.len && from.buffer != to.buffer,
            "a copy needs two buffers and equal lengths, not {} and {}",
            from.len,
            to.len
        );
        self.make_room()?;
        let (source, target) = (self.words(from)?, self.words(to)?);
        if from.len > 0 {
            self.recording.copy([from.buffer, to.buffer], source, target);
        }
        Ok(())
    }

    fn clear(&mut self, span: Span) -> Result<()> {
        self.make_room()?;
        let words = self.words(span)?;
        if span.len > 0 {
            self.recording.clear(span.buffer, words);
        }
        Ok(())
    }

    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        let name = kernel.name();
        // Asked for before the launch has a span of its own.
        let within = if self.clock.is_some() { tracing::Span::current().metadata().map_or("launches", |span| span.name()) } else { "" };
        let _span = tracing::trace_span!("launch", kernel = name).entered();
        let bindings = kernel.bindings();
        ensure!(bindings.len() == operands.len(), "{name} takes {} operands, not {}", bindings.len(), operands.len());
        ensure!(bindings.len() <= MAX_OPERANDS, "{name} takes {} operands, the most is {MAX_OPERANDS}", bindings.len());
        let mut lens = [0; MAX_OPERANDS];
        lens.iter_mut().zip(operands).for_each(|(len, span)| *len = span.len);
        kernel.check(&lens[..operands.len()])?;
        self.make_room()?;
        let mut words = Vec::with_capacity(operands.len());
        for (i, (binding, span)) in bindings.iter().zip(operands).enumerate() {
            let place = self.words(*span).with_context(|| format!("{name}: {}", binding.name))?;
            ensure!(
                span.offset.is_multiple_of(ALIGN),
                "{name}: {} starts at word {}, not at a multiple of {ALIGN}",
                binding.name,
                span.offset
            );
            let (bytes, most) = (span.len as u64 * 4, self.limits.max_binding_bytes);
            UsageError::unless(bytes <= most, || {
                format!(
                    "{name}: {} binds {:.1} MiB, max_storage_buffer_binding_size of {} is {:.1} MiB; lower --batch-size, --seq-len or --hidden",
                    binding.name,
                    mib(bytes),
                    self.health.device(),
                    mib(most)
                )
            })?;
            // wgpu tracks use by whole buffers: one cannot be read and written in the same launch, even where the spans are apart.
            let other = bindings
                .iter()
                .zip(operands)
                .take(i)
                .find(|(b, s)| s.buffer == span.buffer && (b.access == Access::ReadWrite || binding.access == Access::ReadWrite));
            if let Some((other, _)) = other {
                anyhow::bail!(
                    "{name}: {} and {} lie in one buffer, and one of them is written; give them buffers of their own",
                    other.name,
                    binding.name
                );
            }
            words.push(place);
        }
        let dispatch = self.dispatch_of(kernel);
        let params = kernel.params();
        ensure!(params.len() as u64 <= SLOT_BYTES, "{name} has {} bytes of parameters, the most is {SLOT_BYTES}", params.len());
        let pipeline = self.pipelines.find_or_make(&self.device, &self.health, &dispatch, bindings, params.len())?;
        self.recording.launch(&self.device, &self.health, &self.pipelines, pipeline, operands, &words, params, dispatch.grid, within)
    }

    fn variant(&self, kernel: &dyn Kernel) -> String {
        let usual = kernel.dispatch(self.class);
        let candidates = kernel.candidates(self.class);
        let names: Vec<String> = candidates.iter().map(name_of).collect();
        let chosen = kernel.size_class().and_then(|class| self.tuner.chosen(class, &names));
        let Dispatch { shader, overrides, .. } = chosen.map_or(usual, |number| candidates[number]);
        let constants = overrides.iter().map(|(name, value)| format!(" {name}={value}"));
        std::iter::once(shader.variant()).chain(constants).collect()
    }

    fn plan_for(&mut self, args: &SweepArgs<'_>) -> SweepPlan {
        let ways = SweepWay::all(args);
        let fixed = SweepWay::fixed(self.class);
        let mut way = if ways.contains(&fixed) { fixed } else { SweepWay::Steps };
        if ways.len() > 1
            && self.class == AdapterClass::Hardware
            && let Some((class, trial)) = SweepTrial::of(args)
        {
            let usual = ways.iter().position(|known| *known == way).unwrap_or(0);
            let names = || ways.iter().map(|way| way.name()).collect();
            let number = self.tuner.number(class, usual, names, || Some(Wanted::Sweep(trial)));
            way = ways.get(number).copied().unwrap_or(way);
        }
        match way {
            SweepWay::Whole { tile_rows: 2 } => whole_sweep_plan::<2>,
            SweepWay::Whole { tile_rows: 4 } => whole_sweep_plan::<4>,
            SweepWay::Whole { .. } => whole_sweep_plan::<8>,
            SweepWay::Steps => sweep_plan,
        }
    }

    fn offers(&self, kernel: &dyn Kernel) -> bool {
        pipelines::has(self.device.features(), kernel.dispatch(self.class).shader)
    }

    fn wants_tuning(&self) -> bool {
        self.tuner.wants()
    }

    fn tune(&mut self, budget: Duration) -> Result<Vec<Choice>> {
        let start = Instant::now();
        let _span = tracing::debug_span!("tune").entered();
        let mut wanted = self.tuner.take_wanted();
        wanted.sort_by_key(|(_, wanted)| Reverse(wanted.flop()));
        // What is under way must not be measured along.
        self.wait(TRIAL_PATIENCE)?;
        let mut choices = Vec::with_capacity(wanted.len());
        for (class, wanted) in wanted {
            let (candidates, usual) = self.candidates(&wanted);
            let measured = self.measure(class, &wanted, (&candidates, usual), &mut || start.elapsed() >= budget)?;
            let (number, seconds) = measured.unwrap_or((usual, Vec::new()));
            let Some(variant) = candidates.get(number).map(Candidate::name) else { continue };
            self.tuner.settle(class, number, variant.clone());
            let times = candidates.iter().map(Candidate::name).zip(seconds).collect();
            choices.push(Choice { class: class.to_string(), variant, times });
        }
        Ok(choices)
    }

    fn choose(&mut self, choices: &Choices) {
        self.tuner.choose(choices);
    }

    fn read(&mut self, spans: &[Span], memory: Vec<f32>) -> Result<Box<dyn Readback>> {
        let parts = spans.iter().map(|&span| self.words(span)).collect::<Result<Vec<_>>>()?;
        if parts.iter().all(|p| p.len == 0) {
            self.flush(None)?;
            return Ok(Box::new(Nothing(memory)));
        }
        let pending = self.flush(Some(&parts))?.context("a readback that was not encoded")?;
        let index = self.last.clone().context("a readback that was not submitted")?;
        let readback = pending.submitted(&self.device, &self.health, index, memory);
        self.health.check()?;
        Ok(Box::new(readback))
    }

    fn submit(&mut self) -> Result<()> {
        self.flush(None).map(drop)
    }

    fn wait(&mut self, deadline: Duration) -> Result<()> {
        self.flush(None)?;
        if let Some(index) = &self.last {
            self.health.wait_for(&self.device, index, Deadline::after(deadline))?;
        }
        if let Some(clock) = &mut self.clock {
            clock.tell();
        }
        Ok(())
    }
}

impl Drop for GpuBackend {
    /// What was submitted last has times to tell, too.
    fn drop(&mut self) {
        if let (Some(clock), Some(index)) = (&mut self.clock, &self.last) {
            let _ = self.health.wait_for(&self.device, index, Deadline::after(LAST_TIMES));
            clock.tell();
        }
    }
}

/// A readback of no words.
struct Nothing(Vec<f32>);

impl Readback for Nothing {
    fn wait(mut self: Box<Self>, _: Duration) -> Result<Vec<f32>> {
        self.0.clear();
        Ok(self.0)
    }
}
