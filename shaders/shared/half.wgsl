// Half floats. Directives stand before everything else, so whoever needs them lists this fragment first.
enable f16;
