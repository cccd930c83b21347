//! The shaders as text: every one is valid, can be written for every kind of driver, and its tile constants are those that the grids are computed from.

use carrousel::kernels::gemm::{DIRECT_BLOCK, GEMM_DIRECT, GEMM_TILED, TILED_BLOCK};
use carrousel::kernels::lstm::{BACKWARD, FORWARD, STEP_ROWS};
use carrousel::kernels::{ALL, AdapterClass, Dispatch, MAX_WORKGROUPS, Shader};
use carrousel::shape::{PANEL, PANEL_UNITS};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{Expression, Literal, Module, ShaderStage};

fn parse(name: &str, text: &str) -> (Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(text)));
    let info = Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module);
    let info = info.unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(text)));
    (module, info)
}

/// Every dispatch of the catalogue's cases that differs in its shader or overrides.
fn dispatches() -> Vec<Dispatch> {
    let mut found: Vec<Dispatch> = Vec::new();
    for case in ALL.iter().flat_map(|entry| (entry.cases)()) {
        for class in [AdapterClass::Software, AdapterClass::Hardware] {
            let dispatch = case.kernel.dispatch(class);
            assert!(dispatch.grid.iter().all(|&n| (1..=MAX_WORKGROUPS).contains(&n)), "{} {}", case.kernel.name(), case.label);
            if !found.iter().any(|d| d.shader == dispatch.shader && d.overrides == dispatch.overrides) {
                found.push(dispatch);
            }
        }
    }
    found
}

#[test]
fn every_shader_is_valid_and_can_be_written_for_every_driver() {
    let dispatches = dispatches();
    for entry in ALL {
        for shader in entry.shaders {
            assert!(dispatches.iter().any(|d| d.shader == *shader), "no case of {} runs {}", entry.name, shader.name);
            shader.fragments.iter().for_each(|fragment| drop(parse(fragment.name, fragment.source)));
        }
    }
    for Dispatch { shader, overrides, .. } in dispatches {
        let name = shader.name;
        let (module, info) = parse(name, &shader.text());
        let values = overrides.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
        let entry = Some((ShaderStage::Compute, name));
        let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &values).unwrap();
        spv::write_vec(&module, &info, &spv::Options::default(), None).unwrap_or_else(|e| panic!("{name}: {e}"));
        let options = msl::Options { fake_missing_bindings: true, lang_version: (2, 4), ..Default::default() };
        msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let options = hlsl::Options::default();
        let pipeline = hlsl::PipelineOptions { entry_point: None };
        let mut text = String::new();
        hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(text.contains(name));
    }
}

fn constant(shader: &Shader, name: &str) -> u32 {
    let (module, _) = parse(shader.name, &shader.text());
    let constant = module.constants.iter().find(|(_, c)| c.name.as_deref() == Some(name));
    let (_, constant) = constant.unwrap_or_else(|| panic!("{} has no constant {name}", shader.name));
    match module.global_expressions[constant.init] {
        Expression::Literal(Literal::U32(value)) => value,
        ref other => panic!("{name} of {} is {other:?}", shader.name),
    }
}

#[test]
fn tiles_of_the_shaders_are_those_that_the_grids_cover() {
    assert_eq!(TILED_BLOCK, [constant(&GEMM_TILED, "BLOCK"); 2]);
    let cols = constant(&GEMM_DIRECT, "WORKGROUP") * constant(&GEMM_DIRECT, "TILE_COLS");
    assert_eq!(DIRECT_BLOCK, [constant(&GEMM_DIRECT, "TILE_ROWS"), cols]);
    for shader in [&GEMM_TILED, &GEMM_DIRECT] {
        assert_eq!(constant(shader, "PANEL") as usize, PANEL);
    }
    for shader in [&FORWARD, &BACKWARD] {
        assert_eq!(constant(shader, "STEP_ROWS"), STEP_ROWS);
        assert_eq!(constant(shader, "PANEL_UNITS") as usize, PANEL_UNITS);
        let (module, _) = parse(shader.name, &shader.text());
        let rows = module.entry_points[0].workgroup_size[1] * constant(shader, "INVOCATION_ROWS");
        assert_eq!(rows, STEP_ROWS, "{}", shader.name);
    }
}
