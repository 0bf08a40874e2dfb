"""Triton kernels for packed weights on NVIDIA and AMD; `docs/gpu-kernels.md` has the layouts."""
