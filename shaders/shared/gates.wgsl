// Where a unit's gates lie: hidden units in panels of 16, in each panel the columns of gate i, then f, g, o.
// All numbers are in vectors of four floats, which is how the step kernels read; a `quad` is four units of one panel.

const PANEL_UNITS: u32 = 16u;
// Vectors of one row of a panel (16 units x 4 gates), and of one gate in it.
const PANEL_VECTORS: u32 = 16u;
const GATE_VECTORS: u32 = 4u;

// Gate i of a quad in row `row` of gates [B, 4H] that start at float `offset`; f, g and o follow GATE_VECTORS apart.
fn gates_of(offset: u32, row: u32, hidden: u32, panel: u32, quad: u32) -> u32 {
    return offset / 4u + row * hidden + panel * PANEL_VECTORS + quad;
}

// A quad in row `row` of a state [B, H] that starts at float `offset`.
fn units_of(offset: u32, row: u32, hidden: u32, panel: u32, quad: u32) -> u32 {
    return offset / 4u + row * (hidden / 4u) + panel * (PANEL_UNITS / 4u) + quad;
}
