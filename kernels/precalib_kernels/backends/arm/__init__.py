"""Backend `arm`: compiled kernels for 64-bit Arm processors."""
