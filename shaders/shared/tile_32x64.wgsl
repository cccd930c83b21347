// Elements of C of one invocation, in fours of rows and of columns, and invocations of a workgroup along rows and columns.
const ROW_FOURS: u32 = 1u;
const COL_FOURS: u32 = 1u;
const ROW_SIDE: u32 = 8u;
const COL_SIDE: u32 = 16u;
