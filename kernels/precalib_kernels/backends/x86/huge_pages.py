"""Memory in huge pages, where the system gives them.

Weights are read once per step, so with pages of 4 KiB each page costs a walk through the page
tables. Most packed weights are smaller than a page of 2 MiB; so they share regions.
"""

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20
REGION = 16 * PAGE
LINE = 64  # tensors begin on one

_rest = torch.empty(0, dtype=torch.uint8)  # of the newest region, which lives while tensors do


def zeros(nbytes: int) -> Tensor:
    """uint8 [nbytes], at a multiple of 64 bytes."""
    global _rest
    size = -(-nbytes // LINE) * LINE
    if size > _rest.numel():
        _rest = _new_region(max(size, REGION))
    result, _rest = _rest[:nbytes], _rest[size:]
    return result


def _new_region(size: int) -> Tensor:
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not on this system
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:pages]
