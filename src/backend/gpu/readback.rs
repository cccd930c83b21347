//! Words on their way from a GPU to the host: a staging buffer that the device fills and the host maps.
//!
//! Staging buffers are reused. A handle owns what it needs, so another thread may wait for it, and may drop it without waiting.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};

use super::health::{Deadline, Health};
use super::recording::Words;
use crate::backend::{DeviceError, Readback};

/// Staging buffers kept at most.
const MAX_FREE: usize = 32;

/// Staging buffers that nobody uses.
#[derive(Default)]
pub(super) struct Staging {
    free: Mutex<Vec<wgpu::Buffer>>,
}

impl Staging {
    /// The smallest free buffer that holds `bytes`, or a new one.
    fn take(&self, device: &wgpu::Device, bytes: u64) -> wgpu::Buffer {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let best = free.iter().enumerate().filter(|(_, b)| b.size() >= bytes).min_by_key(|(_, b)| b.size()).map(|(i, _)| i);
        if let Some(best) = best {
            return free.swap_remove(best);
        }
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("staging"),
            // Lengths that differ a little from read to read share a buffer.
            size: bytes.next_multiple_of(4096),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }

    fn give(&self, buffer: wgpu::Buffer) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() >= MAX_FREE {
            // The smallest goes: it is the cheapest to make anew.
            if let Some(smallest) = free.iter().enumerate().min_by_key(|(_, b)| b.size()).map(|(i, _)| i) {
                free.swap_remove(smallest);
            }
        }
        free.push(buffer);
    }
}

/// Copies to a staging buffer, encoded but not yet submitted.
pub(super) struct Pending {
    staging: Arc<Staging>,
    buffer: wgpu::Buffer,
    bytes: u64,
}

impl Pending {
    /// Encodes the copy of `parts`, one behind another.
    pub(super) fn encode(staging: &Arc<Staging>, device: &wgpu::Device, parts: &[Words], encoder: &mut wgpu::CommandEncoder) -> Self {
        let bytes = parts.iter().map(|p| p.len as u64 * 4).sum();
        let buffer = staging.take(device, bytes);
        let mut at = 0;
        for part in parts.iter().filter(|p| p.len > 0) {
            let size = part.len as u64 * 4;
            encoder.copy_buffer_to_buffer(&part.buffer, part.offset as u64 * 4, &buffer, at, size);
            at += size;
        }
        Self { staging: Arc::clone(staging), buffer, bytes }
    }

    /// Asks for the mapping, after the submit.
    pub(super) fn submitted(
        self,
        device: &wgpu::Device,
        health: &Arc<Health>,
        index: wgpu::SubmissionIndex,
        memory: Vec<f32>,
    ) -> GpuReadback {
        let (tell, told) = bounded(1);
        self.buffer.map_async(wgpu::MapMode::Read, 0..self.bytes, move |mapped| {
            // Nobody listens where the handle was dropped.
            let _ = tell.send(mapped.is_ok());
        });
        GpuReadback { pending: self, device: device.clone(), health: Arc::clone(health), index, told, memory }
    }
}

/// A readback that was submitted.
pub(super) struct GpuReadback {
    pending: Pending,
    device: wgpu::Device,
    health: Arc<Health>,
    index: wgpu::SubmissionIndex,
    told: Receiver<bool>,
    memory: Vec<f32>,
}

impl Readback for GpuReadback {
    fn wait(self: Box<Self>, deadline: Duration) -> Result<Vec<f32>> {
        let Self { pending, device, health, index, told, mut memory } = *self;
        let refused = |message: String| DeviceError::Refused { device: health.device(), message };
        let end = Deadline::after(deadline);
        health.wait_for(&device, &index, end)?;
        // Another thread's poll may be the one that runs the callback, a moment later.
        match told.recv_timeout(end.left().max(Duration::from_millis(10))) {
            Ok(true) => {}
            Ok(false) | Err(RecvTimeoutError::Disconnected) => {
                health.check()?;
                return Err(refused("a readback could not be mapped".to_owned()).into());
            }
            Err(RecvTimeoutError::Timeout) => return Err(health.late(end).into()),
        }
        memory.clear();
        {
            let view = pending.buffer.get_mapped_range(0..pending.bytes).map_err(|e| refused(e.to_string()))?;
            memory.extend_from_slice(bytemuck::cast_slice(&view));
        }
        pending.buffer.unmap();
        pending.staging.give(pending.buffer);
        Ok(memory)
    }
}
