mod gpu_gemm_lstm;
mod gpu_smoke; // the GPU backend itself: order, readbacks, loss, limits // products and LSTM steps on the GPU against the CPU, at the edges of dispatches and loops
mod shaders; // the WGSL as text: valid, writable for every driver, constants equal to those in Rust
