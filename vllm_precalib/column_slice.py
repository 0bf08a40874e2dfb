"""The columns of a packed weight that a tensor-parallel rank multiplies by.

A group of weights means something only as a whole: a trellis runs through it, and its salient
weights are one number. A rank therefore keeps the groups that its columns lie in, whole, and
multiplies what it does not have of their inputs by zero. So every rank has exactly the values of
the file, whatever the number of ranks.
"""

import dataclasses

from torch import Tensor
from torch.nn.functional import pad

from precalib_kernels.format.layout import Layout

PER_ROW = ("row_scale", "salient_scale", "salient_offset")  # [N, 1]: no columns to cut


@dataclasses.dataclass(frozen=True)
class ColumnSlice:
    """Columns [first, first + width) of a weight with `whole` columns."""

    layout: Layout
    whole: int
    first: int
    width: int

    @classmethod
    def of_rank(cls, layout: Layout, whole: int, width: int, rank: int) -> "ColumnSlice":
        """Those of a rank where each has `width` columns; all of them if that is the whole."""
        return cls(layout, whole, 0 if width == whole else rank * width, width)

    @property
    def begin(self) -> int:
        """First column of the groups."""
        return self.first - self.first % self.layout.group_size

    @property
    def columns(self) -> int:
        """Number of columns of the groups: the input size of what is kept."""
        end = self.first + self.width
        return min(end + -end % self.layout.group_size, self.whole) - self.begin

    def cut(self, name: str, stored: Tensor) -> Tensor:
        """What is kept of the packed tensor `name` [any, …] of the checkpoint."""
        if name in PER_ROW or self.columns == self.whole:
            return stored
        before = self.layout.tensors(1, self.begin)[name].shape[1] if self.begin else 0
        return stored.narrow(1, before, self.layout.tensors(1, self.columns)[name].shape[1])

    def widen(self, x: Tensor) -> Tensor:
        """Inputs [..., width] between zeros, [..., columns]."""
        if self.columns == self.width:
            return x
        before = self.first - self.begin
        return pad(x, (before, self.columns - self.width - before))

    def crop(self, weight: Tensor) -> Tensor:
        """The rank's own columns [N, width] of what is kept, unpacked [N, columns]."""
        return weight.narrow(1, self.first - self.begin, self.width)
