"""The type to compute in where none is asked for."""

from pathlib import Path

import torch

from precalib_kernels.processor import CPU_INFORMATION, has_bfloat16


def default_dtype(device: str, information: Path = CPU_INFORMATION) -> torch.dtype:
    """bfloat16, or float32 on a processor that only emulates it, which is several times slower."""
    if not device.startswith("cpu") or has_bfloat16(information):
        return torch.bfloat16
    return torch.float32
