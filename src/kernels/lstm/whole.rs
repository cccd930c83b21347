//! All steps of the sweep in one launch: a workgroup owns some rows of the batch from the first step to the last, so that no step waits for a launch.
//! For the plain cell of few units, whose weights stay in a GPU's caches; [`carries`] tells which lanes it is for.
//!
//! The order of operations is that of the step kernels, so that both leave the same bits.

use anyhow::Result;
use bytemuck::{Pod, Zeroable};

use super::plan::recurrence;
use super::{
    ACTIVATIONS, Cell, GATE_INDEX, Lane, LaneGradients, LaneShape, LaneStarts, LaneTensors, Launch, LstmStepBackward, LstmStepForward,
    NONE, SUM_REASON, SweepArgs, case_rows,
};
use crate::kernels::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Kernel, MAX_LOOP_TRIPS, MAX_WORKGROUPS, ODD, Operand, Shader, ShapeError,
    SizeClass, Span, Tolerance, kernel_basics, multiple_of, operand, read, read_write,
};
use crate::pool::CpuContext;
use crate::shape::{ALIGN, GATES, PANEL_UNITS, pad_units, round_up};

/// The shader of [`LstmSweepForward`].
pub static SWEEP_FORWARD: Shader = Shader {
    name: "lstm_sweep_forward",
    source: include_str!("../../../shaders/lstm_sweep_forward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX],
};
/// The shader of [`LstmSweepBackward`].
pub static SWEEP_BACKWARD: Shader = Shader {
    name: "lstm_sweep_backward",
    source: include_str!("../../../shaders/lstm_sweep_backward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX],
};

/// The most units, padded, that a workgroup takes.
pub const MAX_SWEEP_HIDDEN: u32 = 128;
/// Rows of the batch that a workgroup may own.
pub const SWEEP_ROWS: [u32; 3] = [2, 4, 8];
/// Invocations and bytes of a workgroup that every adapter has.
const MAX_INVOCATIONS: u32 = 256;
const MAX_WORKGROUP_BYTES: u32 = 16 << 10;
/// Panels of the most units.
const N_PANELS: usize = MAX_SWEEP_HIDDEN as usize / PANEL_UNITS;

/// What makes a variant for so many units and rows.
type Overrides = [(&'static str, f64); 2];

static OVERRIDES: [[Overrides; SWEEP_ROWS.len()]; N_PANELS] = {
    let mut table = [[[("QUADS", 0.0), ("ROWS", 0.0)]; SWEEP_ROWS.len()]; N_PANELS];
    let mut panel = 0;
    while panel < N_PANELS {
        let mut tile = 0;
        while tile < SWEEP_ROWS.len() {
            table[panel][tile][0].1 = ((panel + 1) * PANEL_UNITS / 4) as f64;
            table[panel][tile][1].1 = SWEEP_ROWS[tile] as f64;
            tile += 1;
        }
        panel += 1;
    }
    table
};

/// Whether a workgroup can own so many rows of so many units: two states of dz `[rows, 4H]` in its memory, an invocation for each four units.
pub fn fits(hidden: u32, tile_rows: u32) -> bool {
    let is_known = hidden > 0 && hidden <= MAX_SWEEP_HIDDEN && hidden.is_multiple_of(PANEL_UNITS as u32) && SWEEP_ROWS.contains(&tile_rows);
    is_known && hidden / 4 * tile_rows <= MAX_INVOCATIONS && 2 * tile_rows * 4 * hidden * 4 <= MAX_WORKGROUP_BYTES
}

/// Whether these kernels do all that the lane asks for: the plain cell without a projection, norms, recurrent dropout, or outputs that are not h.
pub fn carries(lane: &Lane) -> bool {
    let shape = lane.shape;
    let is_plain = !(shape.projects || shape.norms || shape.peepholes || shape.masks || shape.outputs) && shape.width == shape.hidden;
    is_plain && lane.cell.is_plain() && !lane.cell.drops() && lane.residual.is_none() && SWEEP_ROWS.iter().any(|&n| fits(shape.hidden, n))
}

/// Steps that a launch may take, forward or backward, so that no invocation's loops run longer than drivers allow. What ends a loop counts as a trip, and
/// drivers count more than is written: llvmpipe ended a backward launch of 16 units after 21 trips a step where 20 are, so there is room to spare.
pub fn most_steps(hidden: u32, gradients: bool) -> u32 {
    if gradients { (MAX_LOOP_TRIPS - 6) / (hidden + hidden / 4 + 6) - 1 } else { (MAX_LOOP_TRIPS - 1) / (hidden / 4 + 4) }
}

fn in_tiles(shader: &'static Shader, hidden: u32, n_rows: u32, tile_rows: u32) -> Dispatch {
    let panel = (hidden as usize / PANEL_UNITS).clamp(1, N_PANELS) - 1;
    let tile = SWEEP_ROWS.iter().position(|&rows| rows == tile_rows).unwrap_or(0);
    Dispatch { shader, overrides: &OVERRIDES[panel][tile], grid: [n_rows.div_ceil(SWEEP_ROWS[tile]).max(1), 1, 1] }
}

fn check_tiles(kernel: &'static str, hidden: u32, n_rows: u32, tile_rows: u32, n_steps: u32, gradients: bool) -> Result<(), ShapeError> {
    let wrong =
        |what: &str, got: u32, needed: u32| Err(ShapeError { kernel, what: what.into(), got: got as usize, needed: needed as usize });
    multiple_of(kernel, "hidden", hidden, PANEL_UNITS)?;
    if !fits(hidden, tile_rows) {
        return wrong("hidden x rows of a workgroup (at most)", hidden * tile_rows, MAX_WORKGROUP_BYTES / 32);
    }
    if n_rows == 0 || n_rows > tile_rows * MAX_WORKGROUPS {
        return wrong("rows (at least 1, at most)", n_rows, tile_rows * MAX_WORKGROUPS);
    }
    let most = most_steps(hidden, gradients);
    if n_steps == 0 || n_steps > most { wrong("steps (at least 1, at most)", n_steps, most) } else { Ok(()) }
}

/// Steps forward, each as [`LstmStepForward`] of the plain cell. What belongs to the step after lies `*_next` further on, wrapping, since time may run
/// backwards.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LstmSweepForward {
    /// B.
    pub n_rows: u32,
    /// H, padded.
    pub hidden: u32,
    pub weight_hh: u32,
    pub bias_ih: u32,
    pub bias_hh: u32,
    /// Offset of the first step's `[B, 4H]`.
    pub gates: u32,
    pub gates_next: u32,
    /// Offsets of the state before the first step `[B, H]`.
    pub h: u32,
    pub h_next: u32,
    pub c: u32,
    pub c_next: u32,
    pub t: u32,
    pub t_next: u32,
    pub n_steps: u32,
    pub use_lengths: u32,
    /// Rows of a workgroup, of [`SWEEP_ROWS`].
    pub tile_rows: u32,
}

const FORWARD_BINDINGS: &[Binding] =
    &[read("params"), read_write("gates"), read_write("h"), read_write("c"), read("rows"), read_write("flags"), read("bias")];

/// `at` after so many steps.
fn after(at: u32, next: u32, n_steps: u32) -> u32 {
    at.wrapping_add(next.wrapping_mul(n_steps))
}

impl LstmSweepForward {
    fn step(&self, step: u32) -> LstmStepForward {
        LstmStepForward {
            cell: Cell::PLAIN,
            n_rows: self.n_rows,
            hidden: self.hidden,
            width: self.hidden,
            weight_hh: self.weight_hh,
            bias_ih: self.bias_ih,
            bias_hh: self.bias_hh,
            gates: after(self.gates, self.gates_next, step),
            h_prev: after(self.h, self.h_next, step),
            h: after(self.h, self.h_next, step + 1),
            masked_prev: NONE,
            masked: NONE,
            output: NONE,
            input: NONE,
            c_prev: after(self.c, self.c_next, step),
            c: after(self.c, self.c_next, step + 1),
            m: NONE,
            t: after(self.t, self.t_next, step),
            use_lengths: self.use_lengths,
            initial: 0,
        }
    }
}

impl Kernel for LstmSweepForward {
    kernel_basics!("lstm_sweep_forward", FORWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_sweep_forward";
        check_tiles(NAME, self.hidden, self.n_rows, self.tile_rows, self.n_steps, false)?;
        let lens = [lens[0], lens[1], lens[2], lens[3], lens[4], lens[5], lens[6], 0];
        // What lies between the first and the last step lies between their operands.
        [0, self.n_steps - 1].iter().try_for_each(|&i| self.step(i).check(&lens).map_err(|e| ShapeError { kernel: NAME, ..e }))
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        in_tiles(&SWEEP_FORWARD, self.hidden, self.n_rows, self.tile_rows)
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, h, c, rows, flags, bias] = operands else { unreachable!("seven operands") };
        for i in 0..self.n_steps {
            let again = [&mut *params, gates, h, c, rows, flags, bias].map(Operand::again);
            let mut of_step: Vec<Operand<'_>> = again.into_iter().chain([Operand::Read(&[])]).collect();
            self.step(i).run(ctx, &mut of_step);
        }
    }
}

/// Steps backward, from the last in time to the first, each as [`LstmStepBackward`] of the plain cell. What belongs to the step after (in this order) lies
/// `*_next` further on, wrapping.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LstmSweepBackward {
    pub n_rows: u32,
    pub hidden: u32,
    pub weight_hh: u32,
    /// Offset of the first step's `[B, 4H]`.
    pub gates: u32,
    pub gates_next: u32,
    /// Of the dz that comes before the first step's; [`NONE`] where the sweep begins here.
    pub dz_after: u32,
    /// Offset of the state before the first step.
    pub c_prev: u32,
    pub c_next: u32,
    /// Offset of the first step's `[B, H]`, or [`NONE`].
    pub dh_out: u32,
    pub dh_out_next: u32,
    pub carry: u32,
    pub t: u32,
    pub t_next: u32,
    pub n_steps: u32,
    pub use_lengths: u32,
    /// 1: the sweep ends here, and what the last step hands to the initial h is added to `carry`.
    pub initial: u32,
    /// Rows of a workgroup, of [`SWEEP_ROWS`].
    pub tile_rows: u32,
}

const BACKWARD_BINDINGS: &[Binding] = &[read("params"), read_write("gates"), read("c"), read("dh_out"), read_write("carry"), read("rows")];

impl LstmSweepBackward {
    fn step(&self, step: u32) -> LstmStepBackward {
        let gates = after(self.gates, self.gates_next, step);
        LstmStepBackward {
            cell: Cell::PLAIN,
            n_rows: self.n_rows,
            hidden: self.hidden,
            width: self.hidden,
            weight: self.weight_hh,
            gates,
            dz_after: match (step, self.dz_after) {
                (0, NONE) => 0,
                (0, dz_after) => dz_after,
                _ => gates.wrapping_sub(self.gates_next),
            },
            c_prev: after(self.c_prev, self.c_next, step),
            dh_out: if self.dh_out == NONE { NONE } else { after(self.dh_out, self.dh_out_next, step) },
            dx: NONE,
            carry: self.carry,
            t: after(self.t, self.t_next, step),
            last: u32::from(step == 0 && self.dz_after == NONE),
            use_lengths: self.use_lengths,
            initial: 0,
            projected: 0,
        }
    }

    /// What comes after the last step.
    fn end(&self) -> LstmStepBackward {
        let last = self.step(self.n_steps - 1);
        LstmStepBackward { dz_after: last.gates, last: 0, initial: 1, ..last }
    }
}

impl Kernel for LstmSweepBackward {
    kernel_basics!("lstm_sweep_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_sweep_backward";
        check_tiles(NAME, self.hidden, self.n_rows, self.tile_rows, self.n_steps, true)?;
        let lens = [lens[0], lens[1], lens[2], lens[3], lens[4], lens[5], 0, 0];
        [0, self.n_steps - 1].iter().try_for_each(|&i| self.step(i).check(&lens).map_err(|e| ShapeError { kernel: NAME, ..e }))
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        in_tiles(&SWEEP_BACKWARD, self.hidden, self.n_rows, self.tile_rows)
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, c, dh_out, carry, rows] = operands else { unreachable!("six operands") };
        let end = (self.initial == 1).then(|| self.end());
        for step in (0..self.n_steps).map(|i| self.step(i)).chain(end) {
            let again = [&mut *params, gates, c, dh_out, carry, rows].map(Operand::again);
            let mut of_step: Vec<Operand<'_>> = again.into_iter().chain([Operand::Read(&[]), Operand::ReadWrite(&mut [])]).collect();
            step.run(ctx, &mut of_step);
        }
    }
}

/// How the steps of a sweep may be launched: a launch each, or all in one with workgroups of so many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SweepWay {
    Steps,
    Whole { tile_rows: u32 },
}

impl SweepWay {
    /// The ways that are there for a sweep, step by step the first.
    pub fn all(args: &SweepArgs<'_>) -> Vec<Self> {
        match args.lanes {
            [lane, others @ ..] if args.n_rows > 0 && args.lanes.iter().all(carries) => {
                let alike = others.iter().all(|other| other.shape == lane.shape);
                if alike { Self::of_units(lane.shape.hidden) } else { vec![Self::Steps] }
            }
            _ => vec![Self::Steps],
        }
    }

    /// The ways that are there for plain lanes of so many units.
    fn of_units(hidden: u32) -> Vec<Self> {
        let whole = SWEEP_ROWS.into_iter().filter(|&tile_rows| fits(hidden, tile_rows)).map(|tile_rows| Self::Whole { tile_rows });
        std::iter::once(Self::Steps).chain(whole).collect()
    }

    /// What it is recorded by.
    pub fn name(self) -> String {
        match self {
            Self::Steps => "steps".to_owned(),
            Self::Whole { tile_rows } => format!("whole {tile_rows} rows"),
        }
    }

    /// The way where nothing was measured: step by step, whose launches every adapter has been seen to run.
    pub fn fixed(_: AdapterClass) -> Self {
        Self::Steps
    }
}

/// A sweep of some size, to measure its ways with, on operands of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SweepTrial {
    n_rows: u32,
    hidden: u32,
    n_steps: u32,
    n_lanes: u32,
    gradients: bool,
}

/// Steps that are measured at most; more take as long each.
const TRIAL_STEPS: u32 = 64;

impl SweepTrial {
    /// The size class of a sweep whose lanes are alike, and what stands for it.
    pub fn of(args: &SweepArgs<'_>) -> Option<(SizeClass, Self)> {
        let lane = args.lanes.first()?;
        let (n_rows, hidden, n_lanes) = (args.n_rows, lane.shape.hidden, args.lanes.len() as u32);
        let n_steps = lane.range.len() as u32;
        let form = match (args.gradients, n_lanes) {
            (false, 1) => "forward",
            (true, 1) => "backward",
            (false, _) => "forward, lanes together",
            (true, _) => "backward, lanes together",
        };
        let size = [SizeClass::rounded(n_rows), hidden, SizeClass::rounded(n_steps)];
        let trial = Self { n_rows, hidden, n_steps: n_steps.min(TRIAL_STEPS), n_lanes: n_lanes.min(2), gradients: args.gradients };
        Some((SizeClass { kernel: "lstm_sweep", size, form }, trial))
    }

    /// The ways to do it, as [`SweepWay::all`] has them.
    pub fn ways(self) -> Vec<SweepWay> {
        SweepWay::of_units(self.hidden)
    }

    /// Floating-point operations.
    pub fn flop(self) -> u64 {
        let product = 2 * u64::from(self.n_rows) * u64::from(self.hidden) * u64::from(self.hidden) * GATES as u64;
        product * u64::from(self.n_steps) * u64::from(self.n_lanes)
    }

    fn shape(self) -> LaneShape {
        LaneShape::plain(self.hidden, self.hidden)
    }

    /// Floats of a lane's arenas: gates, h, c, carry.
    fn arenas(self) -> [usize; 4] {
        let (rows, places) = (self.n_rows as usize, (self.n_rows * self.n_steps) as usize);
        let shape = self.shape();
        [shape.gates_len(places), shape.h_len(places, rows), shape.c_len(places, rows), shape.carry_len(rows)].map(|n| round_up(n, ALIGN))
    }

    /// Floats of the operands: gates, h, c and carry of all lanes, weights, gradients of the outputs, flags.
    pub fn lens(self) -> [usize; 7] {
        let [gates, h, c, carry] = self.arenas().map(|n| n * self.n_lanes as usize);
        let hidden = self.hidden as usize;
        [gates, h, c, carry, hidden * hidden * GATES, (self.n_rows * self.n_steps) as usize * hidden, ALIGN]
    }

    /// Launches the steps once in one of the ways.
    ///
    /// # Errors
    /// The launch's.
    pub fn run(self, way: SweepWay, operands: &[Span; 7], launch: Launch<'_>) -> Result<()> {
        let [gates, h, c, carry, weights, dh_out, flags] = *operands;
        let arenas = self.arenas();
        let tensors = LaneTensors { weight_ih: (weights, 0), weight_hh: (weights, 0), weight_hr: None, vectors: None };
        let lane = |i: u32| {
            let [gates_at, h_at, c_at, carry_at] = arenas.map(|n| n as u32 * i);
            let grads = LaneGradients {
                dh_out: Some((dh_out, 0)),
                carry,
                dh: None,
                tensors,
                accumulate: false,
                dx: [None; 2],
                accumulate_dx: false,
            };
            Lane {
                shape: self.shape(),
                starts: LaneStarts { gates: gates_at, h: h_at, c: c_at, carry: carry_at, dh: 0 },
                n_steps: self.n_steps,
                reverse: i == 1,
                tensors,
                x: [None; 2],
                gates,
                residual: None,
                h,
                c,
                range: 0..self.n_steps,
                rows: None,
                use_lengths: false,
                cell: Cell::PLAIN,
                backward: Some(grads),
            }
        };
        let lanes: Vec<Lane> = (0..self.n_lanes).map(lane).collect();
        recurrence(&SweepArgs { n_rows: self.n_rows, lanes: &lanes, flags, gradients: self.gradients }, way, launch)
    }
}

const TOLERANCE: Tolerance = Tolerance { absolute: 2e-5, relative: 2e-5, reason: SUM_REASON };

/// The catalogue's line for the sweep forward.
pub const SWEEP_FORWARD_ENTRY: Entry = Entry {
    name: "lstm_sweep_forward",
    tolerance: TOLERANCE,
    cases: || sizes().map(|(i, b, h, rows)| forward_case([b, h, 1 + i % 5], i % 2 == 0, i % 3 == 0, rows)).collect(),
    bench_cases: || [[64, 64, 48], [50, 128, 100]].map(|size| forward_case(size, false, false, 4)).into(),
    sized: |s| {
        if fits(s.padded_hidden(), 4) { vec![forward_case([s.n_rows, s.padded_hidden(), s.n_steps], false, false, 4)] } else { vec![] }
    },
    shaders: &[&SWEEP_FORWARD],
};

/// The catalogue's line for the sweep backward.
pub const SWEEP_BACKWARD_ENTRY: Entry = Entry {
    name: "lstm_sweep_backward",
    tolerance: TOLERANCE,
    cases: || sizes().map(|(i, b, h, rows)| backward_case([b, h, 1 + i % 5], i % 2 == 0, i % 3 == 0, i % 4 == 1, rows)).collect(),
    bench_cases: || [[64, 64, 48], [50, 128, 100]].map(|size| backward_case(size, false, false, false, 4)).into(),
    sized: |s| {
        let size = [s.n_rows, s.padded_hidden(), s.n_steps.min(most_steps(MAX_SWEEP_HIDDEN, true))];
        if fits(size[1], 4) { vec![backward_case(size, false, false, false, 4)] } else { vec![] }
    },
    shaders: &[&SWEEP_BACKWARD],
};

/// A number, rows of the batch, units and rows of a workgroup: every odd size, every tile.
fn sizes() -> impl Iterator<Item = (u32, u32, u32, u32)> {
    let odd = ODD.into_iter().flat_map(|b| [1, 17, 33, 65, 113].map(|h| (b, h)));
    (0..).zip(odd).map(|(i, (b, h))| {
        let fitting: Vec<u32> = SWEEP_ROWS.into_iter().filter(|&rows| fits(pad_units(h as usize) as u32, rows)).collect();
        (i, b, h, fitting[i as usize % fitting.len()])
    })
}

/// From step to step, where time runs on or back.
pub(super) fn step_by(n: u32, falls: bool) -> u32 {
    if falls { n.wrapping_neg() } else { n }
}

fn forward_case([n_rows, hidden, n_steps]: [u32; 3], reverse: bool, with_lengths: bool, tile_rows: u32) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = (n_rows * h, h * 4);
    let last = n_steps - 1;
    let kernel = LstmSweepForward {
        n_rows,
        hidden: h,
        weight_hh: 4,
        bias_ih: 4,
        bias_hh: if with_lengths { 4 + width } else { NONE },
        gates: 4 + if reverse { last * n_rows * width } else { 0 },
        gates_next: step_by(n_rows * width, reverse),
        h: if reverse { n_steps * state } else { 0 },
        h_next: step_by(state, reverse),
        c: 8 + if reverse { n_steps * state } else { 0 },
        c_next: step_by(state, reverse),
        t: if reverse { last } else { 0 },
        t_next: step_by(1, reverse),
        n_steps,
        use_lengths: u32::from(with_lengths),
        tile_rows,
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    let states = ((n_steps + 1) * state) as usize;
    Case {
        label: format!("B{n_rows} H{h} T{n_steps} reverse {reverse} lengths {with_lengths} rows {tile_rows}"),
        operands: vec![
            operand((4 + h * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand((4 + n_steps * n_rows * width) as usize, random.clone()),
            operand(states, random.clone()),
            operand(8 + states, random.clone()),
            case_rows(n_rows, &Cell::PLAIN),
            operand(1, Fill::Zeros),
            operand((4 + 2 * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
        ],
        flop: 2 * u64::from(n_steps) * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}

fn backward_case([n_rows, hidden, n_steps]: [u32; 3], reverse: bool, with_lengths: bool, goes_on: bool, tile_rows: u32) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = (n_rows * h, h * 4);
    // Where it goes on, the step after the first one here has been done, and steps before the last one here are left.
    let (falls, n_all) = (!reverse, n_steps + u32::from(goes_on));
    let first = if falls { n_steps - 1 } else { u32::from(goes_on) };
    let after = if falls { n_all - 1 } else { 0 };
    let kernel = LstmSweepBackward {
        n_rows,
        hidden: h,
        weight_hh: 4,
        gates: 4 + first * n_rows * width,
        gates_next: step_by(n_rows * width, falls),
        dz_after: if goes_on { 4 + after * n_rows * width } else { NONE },
        c_prev: (first + u32::from(reverse)) * state,
        c_next: step_by(state, falls),
        dh_out: if with_lengths { 4 + first * state } else { NONE },
        dh_out_next: step_by(state, falls),
        carry: 8,
        t: first,
        t_next: step_by(1, falls),
        n_steps,
        use_lengths: u32::from(with_lengths),
        initial: u32::from(!goes_on),
        tile_rows,
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} T{n_steps} reverse {reverse} lengths {with_lengths} goes on {goes_on} rows {tile_rows}"),
        operands: vec![
            operand((4 + h * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand((4 + n_all * n_rows * width) as usize, Fill::Uniform { low: 0.0, high: 0.5 }),
            operand(((n_all + 1) * state) as usize, random.clone()),
            operand((4 + n_all * state) as usize, random.clone()),
            operand((8 + 2 * state) as usize, random),
            case_rows(n_rows, &Cell::PLAIN),
        ],
        flop: 2 * u64::from(n_steps) * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}
