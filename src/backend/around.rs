//! A backend around another: it does itself what it names, the inner one does the rest. For what weighs, limits, watches, or in tests disturbs a device.

use std::time::Duration;

use anyhow::Result;

use super::tuning::{Choice, Choices};
use super::{Backend, BufferId, DeviceInfo, Limits, Readback, Span, SweepPlan};
use crate::kernels::Kernel;
use crate::kernels::lstm::SweepArgs;

/// The methods of [`Backend`], each of which asks the inner one unless it is written anew.
pub trait Around {
    fn inner(&self) -> &dyn Backend;
    fn inner_mut(&mut self) -> &mut dyn Backend;

    fn info(&self) -> &DeviceInfo {
        self.inner().info()
    }
    fn limits(&self) -> Limits {
        self.inner().limits()
    }
    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        self.inner_mut().alloc(label, len)
    }
    fn free(&mut self, buffer: BufferId) {
        self.inner_mut().free(buffer);
    }
    fn write(&mut self, to: Span, words: &[f32]) -> Result<()> {
        self.inner_mut().write(to, words)
    }
    fn copy(&mut self, from: Span, to: Span) -> Result<()> {
        self.inner_mut().copy(from, to)
    }
    fn clear(&mut self, span: Span) -> Result<()> {
        self.inner_mut().clear(span)
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        self.inner_mut().launch(kernel, operands)
    }
    fn plan(&self) -> SweepPlan {
        self.inner().plan()
    }
    fn read(&mut self, spans: &[Span], memory: Vec<f32>) -> Result<Box<dyn Readback>> {
        self.inner_mut().read(spans, memory)
    }
    fn submit(&mut self) -> Result<()> {
        self.inner_mut().submit()
    }
    fn wait(&mut self, deadline: Duration) -> Result<()> {
        self.inner_mut().wait(deadline)
    }
}

impl<A: Around> Backend for A {
    fn info(&self) -> &DeviceInfo {
        Around::info(self)
    }
    fn limits(&self) -> Limits {
        Around::limits(self)
    }
    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        Around::alloc(self, label, len)
    }
    fn free(&mut self, buffer: BufferId) {
        Around::free(self, buffer);
    }
    fn len(&self, buffer: BufferId) -> usize {
        self.inner().len(buffer)
    }
    fn write(&mut self, to: Span, words: &[f32]) -> Result<()> {
        Around::write(self, to, words)
    }
    fn copy(&mut self, from: Span, to: Span) -> Result<()> {
        Around::copy(self, from, to)
    }
    fn clear(&mut self, span: Span) -> Result<()> {
        Around::clear(self, span)
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        Around::launch(self, kernel, operands)
    }
    fn variant(&self, kernel: &dyn Kernel) -> String {
        self.inner().variant(kernel)
    }
    fn offers(&self, kernel: &dyn Kernel) -> bool {
        self.inner().offers(kernel)
    }
    fn wants_tuning(&self) -> bool {
        self.inner().wants_tuning()
    }
    fn tune(&mut self, budget: Duration) -> Result<Vec<Choice>> {
        self.inner_mut().tune(budget)
    }
    fn choose(&mut self, choices: &Choices) {
        self.inner_mut().choose(choices);
    }
    fn plan(&self) -> SweepPlan {
        Around::plan(self)
    }
    fn plan_for(&mut self, args: &SweepArgs<'_>) -> SweepPlan {
        // A plan of its own goes before the inner one's.
        let own = Around::plan(self);
        if std::ptr::fn_addr_eq(own, self.inner().plan()) { self.inner_mut().plan_for(args) } else { own }
    }
    fn read(&mut self, spans: &[Span], memory: Vec<f32>) -> Result<Box<dyn Readback>> {
        Around::read(self, spans, memory)
    }
    fn submit(&mut self) -> Result<()> {
        Around::submit(self)
    }
    fn wait(&mut self, deadline: Duration) -> Result<()> {
        Around::wait(self, deadline)
    }
}
