"""The grid of salient values of each row, as steps between a lowest and a highest one."""

import dataclasses

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import reciprocal
from offline_quantize.method.scales import RowScales
from precalib_kernels.format.layout import Layout


@dataclasses.dataclass(frozen=True)
class SalientSteps:
    """A row's grid of salient values: offset + scale * m, low <= m <= high, with code m + bias.

    If `sign` is not 0, m stands for the magnitude and `sign` is added to the code of a negative
    value.

    inverse, scale, offset: float32 [R]; inverse is steps per weight unit.
    """

    inverse: Tensor
    scale: Tensor
    offset: Tensor
    low: int
    high: int
    bias: int = 0
    sign: int = 0

    @classmethod
    def of(cls, rows: RowScales, layout: Layout) -> "SalientSteps":
        """The grids of rows, for a layout with salient weights."""
        top = 2**layout.salient_bits - 1
        if layout.salient_grid == "row":
            scale, half = rows.tensors["row_scale"].float().view(-1), top // 2
            inverse = half * reciprocal(scale)
            return cls(inverse, scale / half, torch.zeros_like(scale), -half, half, half + 1)
        scale = rows.tensors["salient_scale"].float().view(-1)
        offset = rows.tensors["salient_offset"].float().view(-1)
        if layout.salient_grid == "min-max":
            return cls(reciprocal(scale), scale, offset, 0, top)
        return cls(reciprocal(scale), scale, offset, 0, top // 2, sign=top // 2 + 1)

    def nearest(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Code (int64) and value of the point of each row's grid nearest to targets [any, R]."""
        size = target.abs() if self.sign else target
        steps = ((size - self.offset) * self.inverse).round_()
        steps = steps.nan_to_num(0.0, torch.inf, -torch.inf).clamp_(self.low, self.high)
        value, code = self.offset + self.scale * steps, steps.long() + self.bias
        if not self.sign:
            return code, value
        negative = target < 0
        return code + negative * self.sign, torch.where(negative, -value, value)
