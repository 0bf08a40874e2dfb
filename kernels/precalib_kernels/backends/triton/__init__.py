"""Triton kernels for packed weights on NVIDIA and AMD GPUs; `docs/gpu.md` pictures the layouts."""
