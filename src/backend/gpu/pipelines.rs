//! Compute pipelines, made when a kernel is first launched, and kept by shader and overrides.
//!
//! Group 0 is everything: the parameters at binding 0, with a dynamic offset, and the operands at 1, 2, ... in the order of `Kernel::bindings`.

use std::num::NonZeroU64;

use anyhow::{Context, Result, bail, ensure};
use wgpu::naga;

use super::health::Health;
use crate::kernels::{Access, Binding, Dispatch, Extension, Shader};
use crate::usage::UsageError;

/// Bytes of one launch's parameters: every adapter accepts offsets that are multiples of this.
pub(super) const SLOT_BYTES: u64 = 512;

/// Bind group layouts are shared by kernels that use their operands alike.
struct Layout {
    access: Vec<Access>,
    group: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

struct Pipeline {
    shader: &'static Shader,
    overrides: &'static [(&'static str, f64)],
    layout: usize,
    pipeline: wgpu::ComputePipeline,
}

/// The pipelines of one device.
#[derive(Default)]
pub(super) struct Pipelines {
    layouts: Vec<Layout>,
    // A few dozen at most: a scan is as fast as a hash.
    pipelines: Vec<Pipeline>,
}

impl Pipelines {
    /// The number of the pipeline for a dispatch, made if it is new.
    ///
    /// # Errors
    /// The shader is not valid or does not fit the device's limits.
    pub(super) fn find_or_make(
        &mut self,
        device: &wgpu::Device,
        health: &Health,
        dispatch: &Dispatch,
        bindings: &[Binding],
        params_bytes: usize,
    ) -> Result<usize> {
        let known = self.pipelines.iter().position(|p| std::ptr::eq(p.shader, dispatch.shader) && p.overrides == dispatch.overrides);
        if let Some(known) = known {
            return Ok(known);
        }
        let name = dispatch.shader.name;
        UsageError::unless(has(device.features(), dispatch.shader), || {
            let needed =
                if dispatch.shader.extension() == Some(Extension::Half) { "half floats (shader-f16)" } else { "cooperative matrices" };
            format!("the adapter offers no {needed}, which shader {name} needs; `carrousel devices` tells what adapters have")
        })?;
        let _span = tracing::debug_span!("pipeline", shader = name).entered();
        let text = dispatch.shader.text();
        check(&device.limits(), dispatch, &text, params_bytes).with_context(|| format!("shader {name}"))?;
        let most = device.limits().max_storage_buffers_per_shader_stage as usize;
        ensure!(bindings.len() <= most, "shader {name} binds {} buffers, max_storage_buffers_per_shader_stage is {most}", bindings.len());
        let layout = self.layout(device, bindings);
        let module =
            device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(name), source: wgpu::ShaderSource::Wgsl(text.into()) });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&self.layouts[layout].pipeline),
            module: &module,
            entry_point: Some(name),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: dispatch.overrides,
                // Every shader writes workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        health.check().with_context(|| format!("shader {name}"))?;
        self.pipelines.push(Pipeline { shader: dispatch.shader, overrides: dispatch.overrides, layout, pipeline });
        Ok(self.pipelines.len() - 1)
    }

    /// A pipeline by number.
    pub(super) fn get(&self, number: usize) -> &wgpu::ComputePipeline {
        &self.pipelines[number].pipeline
    }

    /// The number of a pipeline's bind group layout, and the layout.
    pub(super) fn layout_of(&self, number: usize) -> (usize, &wgpu::BindGroupLayout) {
        let layout = self.pipelines[number].layout;
        (layout, &self.layouts[layout].group)
    }

    fn layout(&mut self, device: &wgpu::Device, bindings: &[Binding]) -> usize {
        let same = |l: &Layout| l.access.iter().eq(bindings.iter().map(|b| &b.access));
        if let Some(known) = self.layouts.iter().position(same) {
            return known;
        }
        let params = wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Uniform,
            has_dynamic_offset: true,
            min_binding_size: NonZeroU64::new(SLOT_BYTES),
        };
        let operand = |binding: &Binding| wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: binding.access == Access::Read },
            has_dynamic_offset: false,
            min_binding_size: None,
        };
        let entries: Vec<_> = std::iter::once(params)
            .chain(bindings.iter().map(operand))
            .zip(0..)
            .map(|(ty, binding)| wgpu::BindGroupLayoutEntry { binding, visibility: wgpu::ShaderStages::COMPUTE, ty, count: None })
            .collect();
        let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&group)],
            immediate_size: 0,
        });
        self.layouts.push(Layout { access: bindings.iter().map(|b| b.access).collect(), group, pipeline });
        self.layouts.len() - 1
    }
}

/// Whether a device with these features can run a shader.
pub(super) fn has(features: wgpu::Features, shader: &Shader) -> bool {
    match shader.extension() {
        None => true,
        Some(Extension::Half) => features.contains(wgpu::Features::SHADER_F16),
        Some(Extension::Cooperative) => features.contains(wgpu::Features::SHADER_F16 | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
    }
}

/// Compares what a shader asks of a workgroup with the limits, which wgpu does not where overrides decide, and the size of its parameters with ours.
fn check(limits: &wgpu::Limits, dispatch: &Dispatch, text: &str, params_bytes: usize) -> Result<()> {
    let module = naga::front::wgsl::parse_str(text).map_err(|e| anyhow::anyhow!(e.emit_to_string(text)))?;
    let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
    let info = validator.validate(&module).map_err(|e| anyhow::anyhow!(e.emit_to_string(text)))?;
    let values = dispatch.overrides.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let entry = Some((naga::ShaderStage::Compute, dispatch.shader.name));
    let (module, info) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &values)?;
    let Some((number, entry)) = module.entry_points.iter().enumerate().find(|(_, e)| e.name == dispatch.shader.name) else {
        bail!("no entry point of that name");
    };
    let [x, y, z] = entry.workgroup_size;
    let sides = [limits.max_compute_workgroup_size_x, limits.max_compute_workgroup_size_y, limits.max_compute_workgroup_size_z];
    for ((name, size), limit) in [("x", x), ("y", y), ("z", z)].into_iter().zip(sides) {
        ensure!(size <= limit, "a workgroup of {size} invocations along {name}, max_compute_workgroup_size_{name} is {limit}");
    }
    let (n, limit) = (u64::from(x) * u64::from(y) * u64::from(z), limits.max_compute_invocations_per_workgroup);
    ensure!(n <= u64::from(limit), "a workgroup of {n} invocations, max_compute_invocations_per_workgroup is {limit}");
    let used = info.get_entry_point(number);
    let bytes: u64 = module
        .global_variables
        .iter()
        .filter(|(handle, v)| v.space == naga::AddressSpace::WorkGroup && !used[*handle].is_empty())
        .map(|(_, v)| u64::from(module.types[v.ty].inner.size(module.to_ctx())))
        .sum();
    let params = module.global_variables.iter().find(|(_, v)| v.space == naga::AddressSpace::Uniform);
    // An array of them where both directions of a layer may share a launch: one struct or both.
    let (declared, fits) = params.map_or((0, params_bytes == 0), |(_, v)| match module.types[v.ty].inner {
        naga::TypeInner::Array { stride, .. } => (stride as usize, params_bytes.next_multiple_of(16).is_multiple_of(stride as usize)),
        ref inner => (inner.size(module.to_ctx()) as usize, inner.size(module.to_ctx()) as usize == params_bytes),
    });
    ensure!(fits, "its Params have {declared} bytes, the kernel's struct has {params_bytes}");
    let limit = limits.max_compute_workgroup_storage_size;
    ensure!(bytes <= u64::from(limit), "{bytes} bytes of workgroup memory, max_compute_workgroup_storage_size is {limit}");
    Ok(())
}
