"""The memory layout of a packed weight on Arm: that of backend x86 with two differences.

`backends/x86/memory_layout.py` describes the sections and holds their sizes. A NEON vector is a
quarter of a 64-byte plane: four rows of a block by four columns. NEON shifts bytes where x86
shifts words, and can shift into part of another vector, so other places are cheap for the high
bits of a step; `decode.h` reads them. And salient slots without a weight have another position.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from precalib_kernels.backends.x86 import repack as x86_repack
from precalib_kernels.backends.x86.huge_pages import WEIGHTS, HugePageArena
from precalib_kernels.backends.x86.memory_layout import X86Layout

# Plane and lowest bit of the high bits of each of the eight steps. Steps 6 and 7 of 4 bits have
# the places of `_LEFT_OVER` instead.
_PLACES = {
    2: ((0, 3), (0, 2), (0, 1), (0, 0), (0, 7), (0, 6), (0, 5), (0, 4)),
    3: ((0, 2), (1, 2), (0, 0), (1, 0), (0, 6), (1, 6), (0, 4), (1, 4)),
    4: ((0, 5), (0, 2), (1, 5), (1, 2), (2, 5), (2, 2)),
    5: tuple((step // 2, 4 - step % 2 * 4) for step in range(8)),
}
_LEFT_OVER = (  # step, bit of its high bits, plane, bit of the plane
    *((7, 0, 0, 0), (7, 1, 0, 1), (7, 2, 1, 0)),
    *((6, 0, 1, 1), (6, 1, 2, 0), (6, 2, 2, 1)),
)


class ArmLayout(X86Layout):
    """Sizes and offsets of a weight in this layout."""

    @property
    def no_position(self) -> int:
        """Stands in salient slots that hold no weight: kernels keep a column of zeros there."""
        return self.layout.group_size


def high_planes(high: Tensor, bits: int) -> list[Tensor]:
    """The bits above the lowest, uint8 [8, ...] to bits - 1 planes."""
    planes = [torch.zeros_like(high[0]) for _ in range(bits - 1)]
    for step, (plane, lowest) in enumerate(_PLACES[bits]):
        planes[plane] |= high[step] << lowest
    if bits == 4:
        for step, bit, plane, place in _LEFT_OVER:
            planes[plane] |= (high[step] >> bit & 1) << place
    return planes


def repack(
    tensors: Mapping[str, Tensor], layout: ArmLayout, where: str, arena: HugePageArena = WEIGHTS
) -> Tensor:
    """The tensors of a weight as one tensor in the memory layout, uint8 [layout.nbytes].

    tensors: as named by `Layout.tensors`; column_scale has a row per shard.
    where:   begins the text of a FormatError about damaged positions.
    arena:   where its memory comes from.
    """
    return x86_repack.repack(tensors, layout, where, arena, high_planes)
