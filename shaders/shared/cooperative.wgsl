// Half floats, and matrices that the invocations of a subgroup multiply together. Directives stand before everything else, so whoever needs them lists this
// fragment first.
enable f16;
enable wgpu_cooperative_matrix;
