"""The option --device."""

import re

import torch

from precalib_kernels.errors import UsageError


def check_device(device: str) -> None:
    """Raises UsageError for a device that has no such name or cannot be used here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: give cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {device}: cannot be used here ({reason}); use --device cpu"
        ) from error
