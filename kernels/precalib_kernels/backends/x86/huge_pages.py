"""Memory in huge pages, where the system gives them.

Weights are read once per step, so with pages of 4 KiB each page costs a walk through the page
tables. Most packed weights are smaller than a page of 2 MiB; so they share regions.
"""

import contextlib
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
REGION = 16 * PAGE
LINE = 64  # tensors begin on one


class HugePageArena:
    """Tensors that lie one after another in regions of huge pages; threads may share an arena.

    A region is freed with the last tensor in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)  # of the newest region

    def zeros(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], at a multiple of 64 bytes."""
        size = -(-nbytes // LINE) * LINE
        with self._lock:
            if size > self._rest.numel():
                self._rest = _new_region(max(size, REGION))
            result, self._rest = self._rest[:nbytes], self._rest[size:]
        return result


WEIGHTS = HugePageArena()  # of all repacked weights of the process


def _new_region(size: int) -> Tensor:
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not on this system
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:pages]
