//! Every shader of the catalogue, without a device: it parses and validates together with its fragments, its entry point has its name, its `Params`
//! and bindings are those of its Rust twin, and naga writes it for Vulkan, Metal and Direct3D.

use std::mem::{offset_of, size_of};

use carrousel::kernels::dropout::{DROPOUT_VECTORS, Dropout};
use carrousel::kernels::elementwise::{ELEMENTS, Scale};
use carrousel::kernels::embedding::{EMBEDDING_VECTORS, EmbeddingGather, EmbeddingGradient};
use carrousel::kernels::gemm::{DIRECT_BLOCK, Gemm, TILED_BLOCK, TILES};
use carrousel::kernels::gemm_half::{COOPERATIVE_BLOCK, HALF_BLOCK, MAX_COOPERATIVE_K};
use carrousel::kernels::loss::{BinaryCrossEntropy, QuantileLoss, SOFTMAX_WORKGROUP, SQUARED_ROWS, SoftmaxCrossEntropy, SquaredError};
use carrousel::kernels::lstm::{
    LstmNormBackward, LstmNormForward, LstmNormInput, LstmProject, LstmStateGradient, LstmStepBackward, LstmStepForward, LstmSweepBackward,
    LstmSweepForward, NONE, STEP_ROWS,
};
use carrousel::kernels::pooling::{POOL_VECTORS, PoolSteps};
use carrousel::kernels::probe::{MULTIPLY_ADD_WORKGROUP, MultiplyAdd};
use carrousel::kernels::reduce::{BlockSquares, ColumnSums, NON_FINITE_BLOCK, NonFinite, REDUCE_WORKGROUP, SUM_COLUMNS, Sum};
use carrousel::kernels::update::{Adam, Rmsprop, Sgd};
use carrousel::kernels::weight_drop::{DROP_VECTORS, WeightDrop};
use carrousel::kernels::{ALL, Access, AdapterClass, Entry, Extension, Fragment, MAX_LOOP_TRIPS, Shader};
use carrousel::shape::{BLOCK, PANEL, PANEL_UNITS};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, ArraySize, Expression, Handle, Literal, Module, ShaderStage, StorageAccess, Type, TypeInner};

/// A leaf of a parameter struct: its path and its offset in bytes.
type Field = (String, usize);

/// The leaves of a `#[repr(C)]` struct whose leaves all have four bytes, and its size.
macro_rules! layout {
    ($params:ty: $($($field:ident).+),+) => {
        (size_of::<$params>(), vec![$((stringify!($($field).+).replace(' ', ""), offset_of!($params, $($field).+))),+])
    };
}

/// Size and leaves of a kernel's parameters.
fn rust_layout(kernel: &str) -> (usize, Vec<Field>) {
    match kernel {
        "embedding_gather" => layout!(EmbeddingGather: n_tokens, width, n_classes, table, out),
        "gemm" | "gemm_half" => layout!(
            Gemm: m, n, k, trans_a, trans_b, accumulate, use_bias, bias_offset,
            a.offset, a.row_stride, a.panel, a.panel_stride, b.offset, b.row_stride, b.panel, b.panel_stride,
            c.offset, c.row_stride, c.panel, c.panel_stride
        ),
        "lstm_norm_input" => layout!(LstmNormInput: n_rows, hidden, units, x, factors),
        "lstm_step_forward" => layout!(
            LstmStepForward: cell.peephole, cell.coupled, cell.cell_clip, cell.grad_clip, cell.zoneout_h, cell.zoneout_c, cell.draws, cell.mask_threshold, cell.mask_scale, cell.key0, cell.key1, cell.lane, cell.streams, cell.drop_threshold, cell.drop_scale, cell.drop_tag,
            n_rows, hidden, width, weight_hh, bias_ih, bias_hh, gates, h_prev, h, masked_prev, masked, output, input, c_prev, c, m, t, use_lengths, initial
        ),
        "lstm_sweep_forward" => layout!(
            LstmSweepForward: n_rows, hidden, weight_hh, bias_ih, bias_hh, gates, gates_next, h, h_next, c, c_next, t, t_next, n_steps, use_lengths, tile_rows
        ),
        "lstm_sweep_backward" => layout!(
            LstmSweepBackward: n_rows, hidden, weight_hh, gates, gates_next, dz_after, c_prev, c_next, dh_out, dh_out_next, carry, t, t_next, n_steps, use_lengths, initial, tile_rows
        ),
        "lstm_norm_forward" => layout!(
            LstmNormForward: cell.peephole, cell.coupled, cell.cell_clip, cell.grad_clip, cell.zoneout_h, cell.zoneout_c, cell.draws, cell.mask_threshold, cell.mask_scale, cell.key0, cell.key1, cell.lane, cell.streams, cell.drop_threshold, cell.drop_scale, cell.drop_tag,
            n_rows, hidden, units, gates, x, y, factors, bias_ih, bias_hh, norm_ih, norm_hh, norm_c, h_prev, h, masked, output, input, c_prev, c, m, t, use_lengths
        ),
        "lstm_project" => layout!(
            LstmProject: cell.peephole, cell.coupled, cell.cell_clip, cell.grad_clip, cell.zoneout_h, cell.zoneout_c, cell.draws, cell.mask_threshold, cell.mask_scale, cell.key0, cell.key1, cell.lane, cell.streams, cell.drop_threshold, cell.drop_scale, cell.drop_tag,
            n_rows, hidden, width, weight_hr, m, h_prev, h, masked_prev, masked, output, input, t, use_lengths
        ),
        "lstm_state_gradient" => layout!(
            LstmStateGradient: cell.peephole, cell.coupled, cell.cell_clip, cell.grad_clip, cell.zoneout_h, cell.zoneout_c, cell.draws, cell.mask_threshold, cell.mask_scale, cell.key0, cell.key1, cell.lane, cell.streams, cell.drop_threshold, cell.drop_scale, cell.drop_tag,
            n_rows, hidden, width, weight_hh, dz_after, dh_out, dx, dh, carry, t, last, use_lengths, initial
        ),
        "lstm_step_backward" => layout!(
            LstmStepBackward: cell.peephole, cell.coupled, cell.cell_clip, cell.grad_clip, cell.zoneout_h, cell.zoneout_c, cell.draws, cell.mask_threshold, cell.mask_scale, cell.key0, cell.key1, cell.lane, cell.streams, cell.drop_threshold, cell.drop_scale, cell.drop_tag,
            n_rows, hidden, width, weight, gates, dz_after, c_prev, dh_out, dx, carry, t, last, use_lengths, initial, projected
        ),
        "lstm_norm_backward" => layout!(
            LstmNormBackward: cell.peephole, cell.coupled, cell.cell_clip, cell.grad_clip, cell.zoneout_h, cell.zoneout_c, cell.draws, cell.mask_threshold, cell.mask_scale, cell.key0, cell.key1, cell.lane, cell.streams, cell.drop_threshold, cell.drop_scale, cell.drop_tag,
            n_rows, hidden, units, width, gates, x, y, factors, norm_ih, norm_hh, norm_c, c_prev, dh, from_carry, carry, t, last, use_lengths
        ),
        "weight_drop" => layout!(WeightDrop: len, start, to, key0, key1, tag, threshold, scale),
        "dropout" => layout!(Dropout: n_steps, n_rows, width, start, to, key0, key1, tag, threshold, scale),
        "pool_steps" | "pool_steps_gradient" => layout!(PoolSteps: n_steps, n_rows, width, x, pooled, which, use_lengths),
        "softmax_cross_entropy" => layout!(SoftmaxCrossEntropy: n_rows, n_classes, row_stride, scale, gradient),
        "binary_cross_entropy" => layout!(BinaryCrossEntropy: n_rows, n_outputs, row_stride, scale, gradient),
        "squared_error" => layout!(SquaredError: n_rows, n_outputs, row_stride, scale, gradient),
        "quantile_loss" => layout!(QuantileLoss: n_rows, n_outputs, n_levels, row_stride, scale, gradient),
        "column_sums" => layout!(ColumnSums: n_rows, n_cols, row_stride, offset, out, second_out, accumulate),
        "embedding_gradient" => layout!(EmbeddingGradient: n_distinct, width, n_places, n_classes, grad, dx, first, limit),
        "sum" => layout!(Sum: len, offset, out),
        "block_squares" => layout!(BlockSquares: len, out),
        "non_finite" => layout!(NonFinite: len, offset, out),
        "scale" => layout!(Scale: len, offset, a),
        "sgd" => layout!(
            Sgd: len, nesterov, lr, momentum, regular.grad_scale, regular.clip_value, regular.weight_decay, regular.l1
        ),
        "rmsprop" => layout!(
            Rmsprop: len, lr, alpha, eps, momentum, regular.grad_scale, regular.clip_value, regular.weight_decay, regular.l1
        ),
        "adam" => layout!(
            Adam: len, step_size, beta1, beta2, root2, eps, shrink,
            regular.grad_scale, regular.clip_value, regular.weight_decay, regular.l1
        ),
        "multiply_add" => layout!(MultiplyAdd: len, trips, shrink, shift),
        other => panic!("{other} has no table of parameters here"),
    }
}

fn each_shader(mut f: impl FnMut(&Entry, &'static Shader)) {
    for entry in ALL {
        for shader in entry.shaders {
            f(entry, shader);
        }
    }
}

fn parse(name: &str, text: &str) -> Module {
    naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string_with_path(text, name)))
}

/// Validates for WebGPU without any extension but the one that the shader enables.
fn validate(name: &str, extension: Option<Extension>, module: &Module) -> ModuleInfo {
    let capabilities = match extension {
        None => Capabilities::empty(),
        Some(Extension::Half) => Capabilities::SHADER_FLOAT16,
        Some(Extension::Cooperative) => Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX,
    };
    Validator::new(ValidationFlags::all(), capabilities).validate(module).unwrap_or_else(|e| panic!("{name}: {}", e.into_inner()))
}

/// The leaves of a type in WGSL, with paths and offsets.
fn flatten(module: &Module, ty: Handle<Type>, path: &str, offset: usize, fields: &mut Vec<Field>) {
    match &module.types[ty].inner {
        TypeInner::Struct { members, .. } => {
            for member in members {
                let name = member.name.as_deref().expect("WGSL names its members");
                let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
                flatten(module, member.ty, &path, offset + member.offset as usize, fields);
            }
        }
        TypeInner::Scalar(scalar) if scalar.width == 4 => fields.push((path.to_owned(), offset)),
        other => panic!("{path} is {other:?}, parameters are numbers of four bytes"),
    }
}

#[test]
fn every_shader_parses_validates_and_is_entered_by_its_name() {
    each_shader(|_, shader| {
        let module = parse(shader.name, &shader.text());
        validate(shader.name, shader.extension(), &module);
        let entries: Vec<_> = module.entry_points.iter().map(|e| (e.stage, e.name.as_str())).collect();
        assert_eq!(entries, [(ShaderStage::Compute, shader.name)]);
    });
}

#[test]
fn every_fragment_is_valid_with_those_before_it_and_listed_once_by_who_lists_it() {
    let mut fragments: Vec<(&Fragment, Option<Extension>, String)> = Vec::new();
    each_shader(|_, shader| {
        for (i, fragment) in shader.fragments.iter().enumerate() {
            assert!(!shader.fragments[..i].contains(fragment), "{} lists {} twice", shader.name, fragment.name);
            let text = shader.fragments[..=i].iter().map(|fragment| fragment.source).collect();
            fragments.push((fragment, shader.extension(), text));
        }
    });
    for (fragment, extension, text) in fragments {
        let module = parse(fragment.name, &text);
        validate(fragment.name, extension, &module);
        assert!(module.entry_points.is_empty(), "{} has an entry point", fragment.name);
    }
}

#[test]
fn every_wgsl_file_belongs_to_the_catalogue() {
    let mut known = vec![];
    each_shader(|_, shader| {
        known.push(format!("{}.wgsl", shader.name));
        known.extend(shader.fragments.iter().map(|fragment| format!("shared/{}.wgsl", fragment.name)));
    });
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let list = |folder: &str| -> Vec<String> {
        let entries = std::fs::read_dir(root.join(folder)).expect("the folder of shaders");
        let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a plain name"));
        names.filter(|name| name.ends_with(".wgsl")).map(|name| format!("{folder}{name}")).collect()
    };
    for file in list("").into_iter().chain(list("shared/")) {
        assert!(known.contains(&file), "shaders/{file} is in no entry of the catalogue");
    }
}

#[test]
fn params_lie_in_wgsl_as_in_rust() {
    each_shader(|entry, shader| {
        let module = parse(shader.name, &shader.text());
        let uniforms: Vec<_> = module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::Uniform).collect();
        let [(_, params)] = uniforms[..] else { panic!("{} has {} uniforms, not one", shader.name, uniforms.len()) };
        // Where both directions of a layer may share a dispatch: one behind the other.
        let (params, lanes) = match module.types[params.ty].inner {
            TypeInner::Array { base, size: ArraySize::Constant(lanes), stride } => (base, Some((lanes.get(), stride as usize))),
            _ => (params.ty, None),
        };
        assert_eq!(module.types[params].name.as_deref(), Some("Params"), "{}", shader.name);
        let mut wgsl = Vec::new();
        flatten(&module, params, "", 0, &mut wgsl);
        let (size, rust) = rust_layout(entry.name);
        assert!(lanes.is_none_or(|lanes| lanes == (2, size.next_multiple_of(16))), "{}: {lanes:?}", shader.name);
        assert_eq!(size, 4 * rust.len(), "the table here misses fields of {}", entry.name);
        for (w, r) in wgsl.iter().zip(&rust) {
            // What Rust nests may lie flat in WGSL, where nested structs must start at multiples of 16 bytes.
            let is_same_name = w.0 == r.0 || r.0.rsplit_once('.').is_some_and(|(_, leaf)| leaf == w.0);
            assert!(is_same_name && w.1 == r.1, "{}: {w:?} in WGSL, {r:?} in Rust", shader.name);
        }
        assert_eq!(wgsl.len(), rust.len(), "{}: {wgsl:?} in WGSL, {rust:?} in Rust", shader.name);
        let wgsl_size = module.types[params].inner.size(module.to_ctx()) as usize;
        assert!(wgsl_size >= size && wgsl_size <= 256, "{}: {wgsl_size} bytes in WGSL, {size} in Rust", shader.name);
        for case in (entry.cases)() {
            assert_eq!(case.kernel.params().len(), size, "{}", entry.name);
        }
    });
}

#[test]
fn bindings_are_those_the_kernel_lists() {
    each_shader(|entry, shader| {
        let cases = (entry.cases)();
        let bindings = cases.first().expect("a case").kernel.bindings();
        let module = parse(shader.name, &shader.text());
        let mut found = Vec::new();
        for (_, variable) in module.global_variables.iter() {
            let Some(binding) = &variable.binding else { continue };
            assert_eq!(binding.group, 0, "{}", shader.name);
            let access = match variable.space {
                AddressSpace::Uniform => None,
                AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Some(Access::ReadWrite),
                AddressSpace::Storage { .. } => Some(Access::Read),
                other => panic!("{}: a binding in {other:?}", shader.name),
            };
            found.push((binding.binding, variable.name.clone().expect("WGSL names its variables"), access));
        }
        found.sort_by_key(|(binding, ..)| *binding);
        assert!(!found.is_empty(), "{} binds nothing", shader.name);
        let uniform = found.remove(0);
        assert_eq!((uniform.0, uniform.2), (0, None), "{}: parameters are not at binding 0", shader.name);
        let needed: Vec<_> = bindings.iter().zip(1..).map(|(b, i)| (i, b.name.to_owned(), Some(b.access))).collect();
        assert_eq!(found, needed, "{}", shader.name);
        assert!(bindings.len() <= 8, "{} binds more buffers than default limits allow", entry.name);
    });
}

/// A constant of a module as a number.
fn constant(module: &Module, name: &str) -> Option<u32> {
    let (_, constant) = module.constants.iter().find(|(_, c)| c.name.as_deref() == Some(name))?;
    match module.global_expressions[constant.init] {
        Expression::Literal(Literal::U32(value)) => Some(value),
        _ => None,
    }
}

/// The constants that a shader must share with Rust, and how many things one workgroup covers: in Rust, which makes the grid, and in WGSL.
#[test]
fn numbers_that_stand_in_wgsl_and_in_rust_are_the_same() {
    each_shader(|_, shader| {
        let module = parse(shader.name, &shader.text());
        let get = |name: &str| constant(&module, name).unwrap_or_else(|| panic!("{} has no constant {name}", shader.name));
        let [x, y, z] = module.entry_points.first().expect("an entry point").workgroup_size;
        let invocations = x * y * z;
        let same = |what: &str, wgsl: u32, rust: u32| assert_eq!(wgsl, rust, "{}: {what} in WGSL and in Rust", shader.name);
        if let Some(none) = constant(&module, "NONE") {
            same("NONE", none, NONE);
        }
        match shader.name {
            "scale" | "sgd" | "rmsprop" | "adam" => same("floats a workgroup", invocations * get("EACH"), ELEMENTS),
            "weight_drop" => same("vectors a workgroup", invocations, DROP_VECTORS),
            "embedding_gather" | "embedding_gradient" => same("vectors a workgroup", invocations, EMBEDDING_VECTORS),
            "dropout" => same("vectors a workgroup", invocations, DROPOUT_VECTORS),
            "pool_steps" | "pool_steps_gradient" => same("vectors a workgroup", invocations, POOL_VECTORS),
            "softmax_cross_entropy" | "binary_cross_entropy" => same("workgroup", invocations, SOFTMAX_WORKGROUP),
            "squared_error" | "quantile_loss" => same("rows a workgroup", invocations, SQUARED_ROWS),
            "column_sums" => same("columns a workgroup", get("COLUMNS"), SUM_COLUMNS),
            "sum" => same("workgroup", invocations, REDUCE_WORKGROUP),
            "block_squares" => same("floats a workgroup", get("BLOCK"), BLOCK as u32),
            "non_finite" => same("floats a workgroup", get("BLOCK"), NON_FINITE_BLOCK),
            "lstm_norm_input" | "lstm_norm_forward" | "lstm_norm_backward" => same("workgroup", invocations, get("ROW_WORKGROUP")),
            "lstm_step_forward" | "lstm_step_backward" | "lstm_project" | "lstm_state_gradient" => {
                same("rows a workgroup", get("STEP_ROWS"), STEP_ROWS);
                same("rows of its invocations", y * get("INVOCATION_ROWS"), STEP_ROWS);
                same("units of a panel", get("PANEL_UNITS"), PANEL_UNITS as u32);
                same("units of its invocations", 4 * x, PANEL_UNITS as u32);
                same("floats of a panel's row", 4 * get("PANEL_VECTORS"), PANEL as u32);
            }
            // The size of its workgroup is set by overrides.
            "lstm_sweep_forward" | "lstm_sweep_backward" => {
                same("units of a panel", get("PANEL_UNITS"), PANEL_UNITS as u32);
                same("floats of a panel's row", 4 * get("PANEL_VECTORS"), PANEL as u32);
            }
            "gemm_tiled" => {
                same("sides of a block", get("BLOCK"), TILED_BLOCK[0]);
                same("rows and columns", TILED_BLOCK[0], TILED_BLOCK[1]);
                same("sides of its invocations' tiles", 4 * get("SIDE"), get("BLOCK"));
                same("invocations", invocations, get("SIDE") * get("SIDE"));
            }
            "gemm_blocked" => {
                let tile = TILES.iter().find(|tile| std::ptr::eq(tile.shader, shader)).expect("a tile of the list");
                let [rows, cols] = tile.block;
                same("rows a workgroup", 4 * get("ROW_FOURS") * get("ROW_SIDE"), rows);
                same("columns a workgroup", 4 * get("COL_FOURS") * get("COL_SIDE"), cols);
                same("invocations", invocations, get("ROW_SIDE") * get("COL_SIDE"));
                // Each invocation carries one block of a slice, and of a k all fours are turned within themselves.
                assert!(rows + cols <= invocations, "{}: a slice has more blocks than carriers", shader.variant());
                assert!((rows / 4).is_multiple_of(8) && (cols / 4).is_multiple_of(8), "{}: fours leave their k", shader.variant());
                assert_eq!(shader.variant(), format!("gemm_blocked tile_{rows}x{cols}"));
            }
            "gemm_half" => {
                same("sides of a block", get("BLOCK"), HALF_BLOCK[0]);
                same("rows and columns", HALF_BLOCK[0], HALF_BLOCK[1]);
                same("sides of its invocations' tiles", 4 * get("SIDE"), get("BLOCK"));
                same("invocations", invocations, get("SIDE") * get("SIDE"));
            }
            "gemm_cooperative" => {
                same("sides of a block", get("BLOCK"), COOPERATIVE_BLOCK[0]);
                same("rows and columns", COOPERATIVE_BLOCK[0], COOPERATIVE_BLOCK[1]);
                same("invocations", invocations, get("SUBGROUP"));
                let trips = (MAX_COOPERATIVE_K.div_ceil(16)) * (2 + 512 / get("SUBGROUP")) + 1024 / get("SUBGROUP") + 2;
                assert!(trips <= MAX_LOOP_TRIPS, "{trips} loop trips");
            }
            "gemm_direct" => {
                same("rows a workgroup", get("TILE_ROWS"), DIRECT_BLOCK[0]);
                same("columns a workgroup", invocations * get("TILE_COLS"), DIRECT_BLOCK[1]);
            }
            "multiply_add" => same("outputs a workgroup", invocations, MULTIPLY_ADD_WORKGROUP),
            other => panic!("{other}: which numbers does it share with Rust?"),
        }
    });
}

#[test]
fn overrides_that_kernels_set_exist_and_have_defaults() {
    each_shader(|entry, shader| {
        let module = parse(shader.name, &shader.text());
        let known: Vec<_> = module.overrides.iter().map(|(_, o)| (o.name.clone().unwrap_or_default(), o.init.is_some())).collect();
        assert!(known.iter().all(|(_, has_default)| *has_default), "{}: {known:?}", shader.name);
        for case in (entry.cases)() {
            for class in [AdapterClass::Software, AdapterClass::Hardware] {
                for dispatch in case.kernel.candidates(class).into_iter().filter(|dispatch| dispatch.shader == shader) {
                    for (name, _) in dispatch.overrides {
                        assert!(known.iter().any(|(k, _)| k == name), "{} is given {name}, which it does not have", shader.name);
                    }
                }
            }
        }
    });
}

#[test]
fn every_shader_is_written_for_vulkan_metal_and_direct3d() {
    each_shader(|entry, shader| {
        let module = parse(shader.name, &shader.text());
        let info = validate(shader.name, shader.extension(), &module);
        let mut variants = vec![vec![]];
        for case in (entry.cases)() {
            for class in [AdapterClass::Software, AdapterClass::Hardware] {
                for dispatch in case.kernel.candidates(class).into_iter().filter(|dispatch| dispatch.shader == shader) {
                    if !variants.contains(&dispatch.overrides.to_vec()) {
                        variants.push(dispatch.overrides.to_vec());
                    }
                }
            }
        }
        for overrides in variants {
            let constants = overrides.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
            let stage = Some((ShaderStage::Compute, shader.name));
            let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, stage, &constants)
                .unwrap_or_else(|e| panic!("{} with {overrides:?}: {e}", shader.name));
            write_spirv(shader.name, &module, &info);
            write_metal(shader.name, &module, &info);
            // Direct3D has no matrices of subgroups.
            if shader.extension() != Some(Extension::Cooperative) {
                write_direct3d(shader.name, &module, &info);
            }
        }
    });
}

fn write_spirv(name: &str, module: &Module, info: &ModuleInfo) {
    let entry = naga::back::spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: name.to_owned() };
    let words = naga::back::spv::write_vec(module, info, &naga::back::spv::Options::default(), Some(&entry));
    assert!(!words.unwrap_or_else(|e| panic!("{name} in SPIR-V: {e}")).is_empty());
}

fn write_metal(name: &str, module: &Module, info: &ModuleInfo) {
    let options = naga::back::msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    let (text, written) = naga::back::msl::write_string(module, info, &options, &naga::back::msl::PipelineOptions::default())
        .unwrap_or_else(|e| panic!("{name} in MSL: {e}"));
    for entry in written.entry_point_names {
        let entry = entry.unwrap_or_else(|e| panic!("{name} in MSL: {e}"));
        assert!(text.contains(&entry), "{name}: no {entry} in MSL");
    }
}

fn write_direct3d(name: &str, module: &Module, info: &ModuleInfo) {
    let options = naga::back::hlsl::Options { shader_model: naga::back::hlsl::ShaderModel::V6_2, ..Default::default() };
    let (entry, mut text) = (naga::back::hlsl::PipelineOptions::default(), String::new());
    let written = naga::back::hlsl::Writer::new(&mut text, &options, &entry)
        .write(module, info, None)
        .unwrap_or_else(|e| panic!("{name} in HLSL: {e}"));
    for entry in written.entry_point_names {
        let entry = entry.unwrap_or_else(|e| panic!("{name} in HLSL: {e}"));
        assert!(text.contains(&entry), "{name}: no {entry} in HLSL");
    }
}
