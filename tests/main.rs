//! All integration tests.

mod store;
