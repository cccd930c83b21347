mod gpu_smoke; // the GPU backend itself: order, readbacks, loss, limits
