//! The machine's adapters: one list, one API a machine, the same order every time.
//!
//! wgpu lists one card once for each API that drives it, so only one API is asked: Vulkan on Linux and Windows, Metal on macOS, and DX12 where
//! Vulkan lists no hardware. Order: discrete, integrated, virtual, other, software; within a kind as the driver loader has them.
//! An adapter is found by its place in this list, since names repeat and bus addresses may be empty.

use anyhow::Result;
use serde::Serialize;

/// What stands behind an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    Discrete,
    Integrated,
    Virtual,
    Other,
    /// A CPU that plays a GPU.
    Software,
}

/// What fits on an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AdapterLimits {
    pub max_buffer_bytes: u64,
    pub max_binding_bytes: u64,
    pub max_workgroup_bytes: u32,
    pub max_workgroup_invocations: u32,
    pub max_storage_buffers: u32,
    pub subgroup_min: u32,
    pub subgroup_max: u32,
}

/// One adapter as `devices` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AdapterSummary {
    /// N of `gpu:N`.
    pub index: usize,
    pub name: String,
    pub maker: String,
    pub kind: AdapterKind,
    pub driver: String,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// Address on the bus, empty where the driver tells none.
    pub pci: String,
    pub limits: AdapterLimits,
    /// Of the features that kernels may use one day, those that the adapter has.
    pub features: Vec<String>,
}

/// An index that names no adapter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no adapter gpu:{index}; {}", existing(.names))]
pub struct NoSuchAdapter {
    pub index: usize,
    /// The names of those that exist, in order.
    pub names: Vec<String>,
}

fn existing(names: &[String]) -> String {
    if names.is_empty() {
        return "this machine has none: install a Vulkan driver, or use --devices cpu".to_owned();
    }
    let list: Vec<String> = names.iter().enumerate().map(|(i, name)| format!("gpu:{i} ({name})")).collect();
    format!("this machine has {}", list.join(", "))
}

/// All adapters, in order; none is no error.
///
/// # Errors
/// None at present; a driver that fails to load is not listed.
pub fn list() -> Result<Vec<AdapterSummary>> {
    Ok(enumerate().iter().enumerate().map(|(index, adapter)| summary(index, adapter)).collect())
}

/// The adapter at `index`.
///
/// # Errors
/// [`NoSuchAdapter`], which lists those that exist.
pub(super) fn open(index: usize) -> Result<(wgpu::Adapter, AdapterSummary), NoSuchAdapter> {
    let adapters = enumerate();
    match adapters.get(index) {
        Some(adapter) => Ok((adapter.clone(), summary(index, adapter))),
        None => Err(NoSuchAdapter { index, names: adapters.iter().map(|a| a.get_info().name).collect() }),
    }
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let mut adapters = of(wgpu::Backends::VULKAN | wgpu::Backends::METAL);
    if !adapters.iter().any(|a| a.get_info().device_type != wgpu::DeviceType::Cpu) {
        let more = of(wgpu::Backends::DX12);
        if more.iter().any(|a| a.get_info().device_type != wgpu::DeviceType::Cpu) || adapters.is_empty() {
            adapters = more;
        }
    }
    // The sort is stable: within a kind the loader's order stays.
    adapters.sort_by_key(|a| kind(a.get_info().device_type));
    adapters
}

fn of(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    // Debug builds would look for validation layers, which users do not have.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    // An adapter that executes nothing would give plausible zeros.
    adapters.retain(|a| a.get_info().backend != wgpu::Backend::Noop);
    adapters
}

/// The feature of cooperative matrices where the adapter has them of 16 x 16 x 16, of halves with sums in f32, for subgroups of 32; else none.
pub(super) fn cooperative(adapter: &wgpu::Adapter) -> wgpu::Features {
    use wgpu::CooperativeScalarType::{F16, F32};
    let feature = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let info = adapter.get_info();
    let fits =
        |p: &wgpu::CooperativeMatrixProperties| (p.m_size, p.n_size, p.k_size) == (16, 16, 16) && p.ab_type == F16 && p.cr_type == F32;
    let has_shape =
        adapter.features().contains(feature | wgpu::Features::SHADER_F16) && adapter.cooperative_matrix_properties().iter().any(fits);
    if has_shape && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32) { feature } else { wgpu::Features::empty() }
}

fn kind(device_type: wgpu::DeviceType) -> AdapterKind {
    match device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
        wgpu::DeviceType::VirtualGpu => AdapterKind::Virtual,
        wgpu::DeviceType::Other => AdapterKind::Other,
        wgpu::DeviceType::Cpu => AdapterKind::Software,
    }
}

fn summary(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    AdapterSummary {
        index,
        maker: maker(&info),
        kind: kind(info.device_type),
        driver: [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_owned(),
        backend: info.backend.to_str().to_owned(),
        pci: info.device_pci_bus_id.clone(),
        limits: AdapterLimits {
            max_buffer_bytes: limits.max_buffer_size,
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
            max_workgroup_invocations: limits.max_compute_invocations_per_workgroup,
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            subgroup_min: info.subgroup_min_size,
            subgroup_max: info.subgroup_max_size,
        },
        features: features(adapter.features()),
        name: info.name,
    }
}

/// The maker, from the PCI vendor number; Vulkan gives software and phones numbers of its own.
fn maker(info: &wgpu::AdapterInfo) -> String {
    let name = match info.vendor {
        0x10de => "NVIDIA",
        0x1002 | 0x1022 => "AMD",
        0x8086 => "Intel",
        0x106b => "Apple",
        0x1010 => "Imagination",
        0x13b5 => "Arm",
        0x5143 | 0x4d4f_4351 => "Qualcomm",
        0x1414 => "Microsoft",
        0x14e4 => "Broadcom",
        0x15ad => "VMware",
        0x1ae0 => "Google",
        0x1af4 => "Red Hat",
        0x1_0005 => "Mesa",
        0 if info.backend == wgpu::Backend::Metal => "Apple",
        other => return format!("vendor {other:#06x}"),
    };
    name.to_owned()
}

fn features(features: wgpu::Features) -> Vec<String> {
    const KNOWN: [(&str, wgpu::Features); 7] = [
        ("shader-f16", wgpu::Features::SHADER_F16),
        ("subgroup", wgpu::Features::SUBGROUP),
        ("timestamp-query", wgpu::Features::TIMESTAMP_QUERY),
        ("mappable-primary-buffers", wgpu::Features::MAPPABLE_PRIMARY_BUFFERS),
        ("shader-float32-atomic", wgpu::Features::SHADER_FLOAT32_ATOMIC),
        ("immediates", wgpu::Features::IMMEDIATES),
        ("cooperative-matrix", wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
    ];
    KNOWN.iter().filter(|(_, f)| features.contains(*f)).map(|(name, _)| (*name).to_owned()).collect()
}
