//! All integration tests, in one binary so that wgpu links once.

mod data;
