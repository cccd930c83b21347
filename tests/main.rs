//! All integration tests, as modules of one binary.

mod alloc_count;
mod collectives;
