"""Packed weights for the Triton kernels, and by how much what they compute may be off.

Errors are measured against Σ|x·w|: a float16 activation is off by at most 2**-12 of itself (2**-11
in tiny ones), a salient weight by 2**-11 of what it adds to its base weight, all sums are float32,
and the result is rounded once to its own type.
"""

import dataclasses
import itertools

import torch
from packed_tensors import random_packed
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.memory_layout import SUBNORMAL, triton_layout
from precalib_kernels.backends.triton.repack import LEAST_UNIT, repack
from precalib_kernels.format import reference
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout

ON_GPU = not op.interpreted() and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8 if ON_GPU else 2**-7}
# The interpreter cuts bfloat16 off instead of rounding it.
TABLES = {2: (-100, -30, 31, 100), 3: (-128, -90, -40, 0, 10, 50, 90, 127)}
TABLES[5] = (-128, *range(-111, 112, 8), -3, 103, 127)
TABLES[4] = (-128, -95, -70, -50, -36, -22, -12, -1, 0, 10, 21, 33, 47, 64, 88, 127)


def layout(bits: int, mode: str, group: int, slots: int, **others) -> Layout:
    base = Layout(bits=bits, group_size=group, salient_count=slots, **others)
    if mode == "uniform":
        return base
    levels = TRELLIS_CODEBOOKS[bits] if mode == "trellis" else TABLES[bits]
    trellis = mode == "trellis"
    return dataclasses.replace(
        base, codebook=levels, trellis=trellis, scale="log8", salient_grid="row", column_scale=True
    )


@dataclasses.dataclass
class Case:
    layout: Layout
    parts: list[int]
    columns: int
    tensors: dict[str, Tensor]

    @property
    def packed(self) -> list[Tensor]:
        tensors = {name: tensor.to(DEVICE) for name, tensor in self.tensors.items()}
        arrays = repack(tensors, self.layout, self.columns, self.parts)
        return [arrays[name] for name in ops.array_order(self.layout)]

    def weight(self) -> Tensor:
        return reference.dequantize(self.tensors, self.layout, self.columns, self.parts).double()


def make_case(chosen: Layout, parts: list[int], columns: int, seed: int = 0) -> Case:
    """A random weight of fused parts, with a column scale each where the layout has them."""
    packed = random_packed(chosen, sum(parts), columns, seed=sum(parts) + columns + seed)
    tensors = dict(packed.tensors)
    generator = torch.Generator().manual_seed(1 + seed)
    if chosen.column_scale:
        shape = (len(parts), columns)
        tensors["column_scale"] = (torch.rand(shape, generator=generator) + 0.5).half()
    return Case(chosen, parts, columns, tensors)


def product_bound(case: Case, x: Tensor, exact: Tensor, weight_error: float = 0) -> Tensor:
    """By how much x·Ŵᵀ may be off in the type of x.

    exact: what it is off from;  weight_error: that of weights, relative, where they are rounded.
    """
    base, added = (x.double().abs() @ part.T for part in sizes(case))
    allowed = (2**-11 + weight_error) * base + (2**-8 + weight_error) * added
    tiny = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    return allowed + EPS[x.dtype] * exact.abs() + tiny


def sizes(case: Case) -> tuple[Tensor, Tensor]:
    """|base weights| and |what salient weights add to them|."""
    base = reference.base_values(case.tensors, case.layout, case.columns)
    if case.layout.column_scale:
        base = base * reference.expand_shards(case.tensors["column_scale"].float(), case.parts)
    return base.double().abs(), (case.weight() - base.double()).abs()


def inline_slack(case: Case) -> tuple[Tensor, Tensor]:
    """By how much a weight may be off [N, K] where salient weights stay in place, and its size.

    Salient weights: slope and offset of their line over a code, and the half that they become,
    are rounded to float16. Base weights: only where the group's scale was raised. The size is that
    of a half, which holds more than the weight.
    """
    chosen, tensors = case.layout, {k: t.double() for k, t in case.tensors.items()}
    form, top = triton_layout(chosen), 2**chosen.bits - 1
    step, first = tensors["salient_scale"], tensors["salient_offset"]
    largest = torch.maximum(first.abs(), (first + top * step).abs()).maximum(16 * step)
    of_scale = form.entries_per_unit * SUBNORMAL / chosen.codebook_limit
    least = (largest * LEAST_UNIT).maximum(torch.tensor(SUBNORMAL * of_scale)) * 1.001
    own = tensors["scales"].abs() * of_scale
    raised = reference.expand_groups(own < least, chosen, case.columns)
    unit = reference.expand_groups(own.maximum(least), chosen, case.columns)
    level = unit / (form.entries_per_unit * SUBNORMAL)
    zero = unit * form.offset / SUBNORMAL
    if form.zero_points:
        zero = zero + level * reference.expand_groups(tensors["zeros"], chosen, case.columns)
    half = (case.weight() + zero).abs()
    column, _ = reference.salient_codes(case.tensors, chosen, case.columns, "")
    salient = torch.zeros(len(unit), case.columns + 1).scatter_(1, column, 1)[:, :-1].bool()
    line = 2**-11 * (step * top / 2 + (first + zero).abs() + half) + 1.01 * unit
    gap = max(b - a for a, b in itertools.pairwise(sorted(chosen.codebook_values)))
    base = torch.where(raised, gap * level / 2, 2**-20 * (zero + 256 * level))
    return torch.where(salient, line, base), zero + half


def inline_bound(case: Case, x: Tensor) -> Tensor:
    """By how much x·Ŵᵀ may be off in float32 where salient weights stay in place."""
    slack, size = inline_slack(case)
    allowed = slack + 2**-11 * (case.weight().abs() + 2 * slack) + 2**-20 * size
    return x.double().abs() @ allowed.T
