"""How a step runs: eagerly, compiled, or as a CUDA graph, and the buffers that stay between calls."""
