// What makes a cell differ from the plain one, and its random draws. The twin is Cell in src/kernels/lstm/mod.rs.

// Compiled in only where a cell differs: registers that the plain cell does not need cost it occupancy.
override OPTIONS: bool = false;

const NONE: u32 = 0xffffffffu;
// Purposes of src/rng.rs.
const ZONEOUT_H: u32 = 7u;
const ZONEOUT_C: u32 = 8u;
const RECURRENT_DROPOUT: u32 = 9u;

struct Cell {
    peephole: u32,       // offset of [3, H] in bias, or NONE
    coupled: u32,
    cell_clip: f32,
    grad_clip: f32,
    zoneout_h: f32,
    zoneout_c: f32,
    draws: u32,
    mask_threshold: u32,
    mask_scale: f32,
    key0: u32,
    key1: u32,
    lane: u32,
    streams: u32,        // offset of [B] in rows
    drop_threshold: u32,
    drop_scale: f32,     // 0: what the layer hands up is not dropped
    drop_tag: u32,
}

// Whether anything is drawn by stream number.
fn is_random(cell: Cell) -> bool {
    return cell.draws == 1u || cell.mask_scale != 0.0 || cell.drop_scale != 0.0;
}

fn draw(cell: Cell, purpose: u32, stream: u32, t: u32, block: u32) -> vec4<u32> {
    return philox(vec4<u32>(block, t, stream, (cell.lane << 8u) | purpose), vec2<u32>(cell.key0, cell.key1));
}

// The mask of recurrent dropout for four units of a sequence; the same at every step.
fn recurrent_mask(cell: Cell, stream: u32, block: u32) -> vec4<f32> {
    let kept = draw(cell, RECURRENT_DROPOUT, stream, 0u, block) >= vec4<u32>(cell.mask_threshold);
    return select(vec4<f32>(), vec4<f32>(cell.mask_scale), kept);
}

// What four units are multiplied by on their way up from step t.
fn drop_mask(cell: Cell, stream: u32, t: u32, block: u32) -> vec4<f32> {
    if (cell.drop_scale == 0.0) {
        return vec4<f32>(1.0);
    }
    let kept = philox(vec4<u32>(block, t, stream, cell.drop_tag), vec2<u32>(cell.key0, cell.key1)) >= vec4<u32>(cell.drop_threshold);
    return select(vec4<f32>(), vec4<f32>(cell.drop_scale), kept);
}

// How much of the old value four units keep: 0 or 1 where zoneout draws, else the probability.
fn zoneout_kept(cell: Cell, purpose: u32, probability: f32, stream: u32, t: u32, block: u32) -> vec4<f32> {
    if (cell.draws == 0u || probability == 0.0) {
        return vec4<f32>(probability);
    }
    return vec4<f32>(draw(cell, purpose, stream, t, block) < vec4<u32>(u32(probability * 4294967296.0)));
}

// The limit of a clip; 0 stands for none.
fn limit_of(clip: f32) -> f32 {
    return select(3.4028234e38, clip, clip > 0.0);
}

// Within -limit..=limit; keeps NaN, which clamp does not.
fn clip4(v: vec4<f32>, limit: f32) -> vec4<f32> {
    return select(select(v, vec4<f32>(limit), v > vec4<f32>(limit)), vec4<f32>(-limit), v < vec4<f32>(-limit));
}
