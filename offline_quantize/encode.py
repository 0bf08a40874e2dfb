"""One weight matrix to packed tensors: balance, find the salient weights, code, pack.

Rows are independent once the column scale and λ' are known, so a matrix is taken in blocks of
rows that fit the second-level cache, and memory beyond the source and the result stays small.
"""

import dataclasses

import torch
from torch import Tensor

from offline_quantize import grids, salience
from offline_quantize.balance import column_scale
from offline_quantize.recipes import Recipe
from offline_quantize.statistics import Statistics
from offline_quantize.trellis import trellis_codes
from precalib_kernels import reference
from precalib_kernels.errors import SourceError
from precalib_kernels.layout import Layout, pack_bits
from precalib_kernels.salient import pack_salient

BLOCK_WEIGHTS = 1 << 18  # 1 MiB of float32


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packed tensors of one weight and what was measured while packing it."""

    tensors: dict[str, Tensor]
    statistics: Statistics


def encode(weight: Tensor, recipe: Recipe, where: str) -> Encoded:
    """Quantize and pack one weight.

    weight: [N, K], bfloat16, float16 or float32.
    where:  file and tensor, for errors.

    Raises SourceError for NaN or infinite weights, and for weights too large for float16 scales.
    """
    layout = recipe.layout
    rows, columns = weight.shape
    refuse_non_finite(weight, where)
    scale = column_scale(weight, recipe.balance) if layout.column_scale else None
    penalty = 0.0
    if layout.salient_count and recipe.rule == "tensor":
        penalty = salience.penalty_for_share(weight, recipe.alpha)

    specs = layout.tensors(rows, columns)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    if scale is not None:
        tensors["column_scale"].copy_(scale)
    statistics = Statistics(float(weight.abs().max()) if rows else 0.0)
    step = max(1, BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].float()
        packed, values, counts = encode_rows(block, recipe, scale, penalty)
        for name, part in packed.items():
            tensors[name][start : start + step] = part
        statistics.add(block, values, *counts)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
            raise SourceError(
                f"{where}: weights are too large for float16 '{name}'; keep this tensor with --keep"
            )
    return Encoded(tensors, statistics)


def encode_rows(
    block: Tensor, recipe: Recipe, scale: Tensor | None, penalty: float
) -> tuple[dict[str, Tensor], Tensor, tuple[int, int]]:
    """Quantize rows [R, K] of a weight.

    scale:   column scale [1, K] as stored, or None.
    penalty: λ' of the tensor, for recipes with one λ' per tensor.
    returns: packed tensors but for the column scale, the values they stand for [R, K], and how
             many weights are salient and how many should have been but found no place.
    """
    layout = recipe.layout
    rows, columns = block.shape
    groups = layout.groups(columns)
    padding = groups * layout.group_size - columns
    grouped = torch.nn.functional.pad(block if scale is None else block / scale, (0, padding))
    grouped = grouped.view(rows, groups, layout.group_size)
    ordinary = torch.ones_like(grouped)
    if padding:
        ordinary[:, -1, -padding:] = 0

    chosen, wanted = _choose(grouped, recipe, penalty)
    if chosen is not None:
        ordinary = chosen.put(ordinary, torch.zeros(()))
    if layout.uniform:
        packed, codes = grids.min_max(grouped, ordinary, recipe)
        if chosen is not None:
            chosen.encode(grouped, packed, layout)
            codes = chosen.put(codes, chosen.codes & (2**layout.bits - 1))
    else:
        packed, codes = _fit(grouped, ordinary, chosen, recipe)

    packed["qweight"] = pack_bits(codes.view(rows, -1)[:, :columns], layout.bits)
    values = reference.base_values(packed, layout, columns)
    found = 0
    if chosen is not None:
        high = torch.where(chosen.used, chosen.codes >> layout.bits, 0).to(torch.uint8)
        packed["salient"] = pack_salient(chosen.positions, high, layout)
        values = torch.nn.functional.pad(values, (0, padding)).view_as(grouped)
        values = chosen.put(values, grids.salient_values(chosen.codes, packed, layout))
        values = values.view(rows, -1)[:, :columns]
        found = int(chosen.used.sum())
    return packed, values if scale is None else values * scale, (found, max(wanted - found, 0))


@dataclasses.dataclass
class _Salient:
    """The salient weights of a block: where they are and, once encoded, their codes.

    positions: int16 [R, G, m], -1 in unused slots;  codes: uint8 [R, G, m].
    """

    positions: Tensor
    codes: Tensor

    @property
    def used(self) -> Tensor:
        return self.positions >= 0

    def put(self, grouped: Tensor, values: Tensor) -> Tensor:
        """A copy of `grouped` with `values` at the salient places."""
        size = grouped.shape[-1]
        slots = torch.where(self.used, self.positions, size).long()
        padded = torch.nn.functional.pad(grouped, (0, 1))  # unused slots point there
        padded.scatter_(2, slots, values.to(grouped.dtype).expand(slots.shape))
        return padded[..., :size].contiguous()

    def encode(self, grouped: Tensor, packed: dict[str, Tensor], layout: Layout) -> None:
        """Find the codes, given the side tensors of the base; adds those of the salient grid."""
        weights = grouped.gather(2, self.positions.clamp(min=0).long())
        own, self.codes = grids.salient_codes(weights, self.used, layout, packed)
        packed.update(own)


def _choose(grouped: Tensor, recipe: Recipe, penalty: float) -> tuple[_Salient | None, int]:
    """The salient weights, and how many a threshold per tensor would have made salient."""
    count = recipe.layout.salient_count
    if not count:
        return None, 0
    score, wanted = grouped.abs(), 0
    if recipe.rule == "tensor":
        score = salience.soft_threshold(grouped, penalty).abs()
        wanted = int((score > 0).sum())
    positions = salience.largest_positions(score, count)
    return _Salient(positions, torch.zeros_like(positions, dtype=torch.uint8)), wanted


def _fit(
    grouped: Tensor, ordinary: Tensor, chosen: _Salient | None, recipe: Recipe
) -> tuple[dict[str, Tensor], Tensor]:
    """Scales and codes for non-uniform levels: from the spread, then from the codes found."""
    layout = recipe.layout
    wanted = grids.spread_scales(grouped, ordinary, recipe)
    packed, codes = _fit_once(grouped, ordinary, chosen, layout, wanted)
    for _ in range(1, recipe.fits):
        wanted = grids.fitted_scales(grouped, ordinary, codes, layout)
        packed, codes = _fit_once(grouped, ordinary, chosen, layout, wanted)
    return packed, codes


def _fit_once(
    grouped: Tensor, ordinary: Tensor, chosen: _Salient | None, layout: Layout, wanted: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    packed = grids.store_scales(wanted, layout, grouped)
    scale = reference.group_scales(packed, layout)
    if chosen is not None:
        chosen.encode(grouped, packed, layout)
    if layout.trellis:
        forced = torch.where(ordinary > 0, 2, 0).to(torch.uint8)
        if chosen is not None:
            forced = chosen.put(forced, chosen.codes & 1)
        codes = trellis_codes(grouped, scale, layout, forced)
    else:
        codes = grids.nearest_codes(grouped, scale, layout)
    if chosen is not None:  # the low bits of their codes take part in the trellis
        codes = chosen.put(codes, chosen.codes & (2**layout.bits - 1))
    return packed, codes


def refuse_non_finite(weight: Tensor, where: str) -> None:
    """Raise SourceError that names the first NaN or infinite weight."""
    for start in range(0, weight.shape[0], 256):
        bad = ~weight[start : start + 256].isfinite()
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            value = float(weight[start + row, column])
            raise SourceError(
                f"{where}: weight [{start + row}, {column}] is {value}; "
                "the checkpoint is damaged, or keep this tensor with --keep"
            )
