"""One weight matrix to packed tensors: balance, find the salient weights, code, pack.

Rows are independent once the column scale and λ' are known, so a matrix is taken in blocks of
rows that fit the second-level cache, and memory beyond the source and the result stays small.
"""

import dataclasses
import math

import torch
from torch import Tensor

from offline_quantize.method import grids, salience
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.sinkhorn import column_scale
from offline_quantize.method.trellis import trellis_search
from offline_quantize.method.weight_statistics import Statistics, power_of_two
from precalib_kernels.errors import SourceError, UnfitError
from precalib_kernels.format import reference
from precalib_kernels.format.bitstream import pack_bits
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.salient_index import pack_salient

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

    Raises SourceError for NaN or infinite weights, and UnfitError for weights too large for float16
    scales or whose error is far above what the recipe gives (`expected_if_ruined`).
    """
    encoded = _encode(weight, recipe, where)
    error, largest = encoded.statistics.relative_error, encoded.statistics.largest
    expected = expected_if_ruined(weight, recipe, error)
    if expected is not None:
        small = f"; its largest weight, {largest:.2g}, is too small for float16 scales"
        raise UnfitError(
            f"{where}: quantizing it leaves a relative error of {error:.2g} where its recipe gives "
            f"{expected:.2g} and zeros 1{small if largest < 2**-14 else ''}"
        )
    return encoded


def expected_if_ruined(weight: Tensor, recipe: Recipe, error: float) -> float | None:
    """The relative error that the recipe should leave in a weight, if `error` is far above it.

    Expected is what the recipe leaves in the same weight times the power of two that brings it to
    size 1. That changes no relative error unless scales leave float16's range, so a shape that
    suits a recipe badly is no fault: 4-bit codes leave .004 - .03 in normal, Laplace and Student-t
    weights, but up to .44 without salient weights where 99 % are zero. Far above is three times
    that and more than 4 * 4**-bits (normal weights get 1.0 - 1.3 * 4**-bits, rounded to nearest
    2.6 - 4); and 1 always, since zeros would be as good.

    weight: [N, K], finite;  error: relative, squared.
    """
    floor = 4 * 4.0**-recipe.layout.bits  # below it no weight is encoded twice
    if error <= floor:
        return None
    low, high = (float(bound) for bound in weight.aminmax())
    weight = weight.float() * power_of_two(max(high, -low))
    expected = _encode(weight, recipe, "size 1").statistics.relative_error
    return None if error <= max(3 * expected, floor) and error < 1 else expected


def _encode(weight: Tensor, recipe: Recipe, where: str) -> Encoded:
    layout = recipe.layout
    rows, columns = weight.shape
    low, high = (float(bound) for bound in weight.aminmax()) if weight.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise non_finite(weight, where)
    scale = column_scale(weight, recipe.balance) if layout.column_scale else None
    if max(high, -low) >= 2**14:
        reach = float((weight if scale is None else weight / scale).abs().max())
        if reach >= 2**24:  # no scale holds it, and products of it would leave float32
            name = "row_scale" if layout.scale == "log8" else "scales"
            raise UnfitError(f"{where}: weights are too large for float16 '{name}'")
    penalty = 0.0
    if layout.salient_count and recipe.rule == "tensor":
        penalty = salience.penalty_for_share(weight, recipe.alpha)

    specs = layout.tensors(rows, columns)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    if scale is not None:
        tensors["column_scale"].copy_(scale)
    statistics = Statistics(max(high, -low))
    step = max(1, BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].float()
        packed, values, counts = encode_rows(block, recipe, scale, penalty)
        for name, part in packed.items():
            if part.dtype == torch.float16 and not bool(part.isfinite().all()):
                raise UnfitError(f"{where}: weights are too large for float16 '{name}'")
            tensors[name][start : start + step] = part
        statistics.add(block, values, *counts)
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
    grouped = block if scale is None else block / scale
    grouped = torch.nn.functional.pad(grouped, (0, padding)) if padding else grouped
    grouped = grouped.reshape(rows, groups, layout.group_size)
    chosen, wanted = _choose(grouped, recipe, penalty)
    ordinary = grouped.clone()  # zero in the place of salient weights and of padding
    if chosen is not None:
        chosen.put(ordinary, torch.zeros(()))
    if layout.uniform:
        packed, codes, level = grids.min_max(grouped, ordinary, recipe)
        if chosen is not None:
            chosen.encode(grouped, packed, layout)
    else:
        scales = ordinary.abs_().amax(-1)  # see docs/method.md for why it is not a fitted scale
        packed = grids.store_scales(scales, layout, grouped)
        if chosen is not None:
            chosen.encode(grouped, packed, layout)
        codes, level = _codebook_codes(grouped, padding, chosen, packed, layout)

    step = reference.group_scales(packed, layout) / layout.codebook_limit
    values, found = level.mul_(step[..., None]), 0
    if chosen is not None:
        chosen.put(codes, chosen.codes & (2**layout.bits - 1))
        chosen.put(values, grids.salient_values(chosen.codes, packed, layout))
        high = torch.where(chosen.used, chosen.codes >> layout.bits, 0).to(torch.uint8)
        packed["salient"] = pack_salient(chosen.positions, high, layout)
        found = int(chosen.used.sum())
    packed["qweight"] = pack_bits(codes.view(rows, -1)[:, :columns], layout.bits)
    values = values.view(rows, -1)[:, :columns]
    return packed, values if scale is None else values * scale, (found, max(wanted - found, 0))


@dataclasses.dataclass
class _Salient:
    """The salient weights of a block: where they are and, once encoded, their codes.

    positions: int16 [R, G, m], -1 in unused slots;  codes: uint8 [R, G, m].
    """

    positions: Tensor
    codes: Tensor
    group_size: int

    def __post_init__(self) -> None:
        rows, groups, _ = self.positions.shape
        start = torch.arange(rows * groups).view(rows, groups, 1) * self.group_size
        self.used = self.positions >= 0
        self.flat = (self.positions + start)[self.used]  # index into the whole block

    def put(self, grouped: Tensor, values: Tensor) -> None:
        """Set `grouped` to `values` at the salient places, in place."""
        grouped.view(-1)[self.flat] = values.to(grouped.dtype).expand(self.used.shape)[self.used]

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
    codes = torch.zeros_like(positions, dtype=torch.uint8)
    return _Salient(positions, codes, recipe.layout.group_size), wanted


def _codebook_codes(
    grouped: Tensor,
    padding: int,
    chosen: _Salient | None,
    packed: dict[str, Tensor],
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Codes and level values for non-uniform levels; those at salient places mean nothing."""
    scale = reference.group_scales(packed, layout)
    if not layout.trellis:
        return grids.nearest_entries(grouped, scale, layout)
    forced = torch.full(grouped.shape, 2, dtype=torch.uint8)
    if padding:
        forced[:, -1, -padding:] = 0
    if chosen is not None:  # the low bits of salient codes take part in the trellis
        chosen.put(forced, chosen.codes & 1)
    return trellis_search(grouped, scale, layout, forced)


def non_finite(weight: Tensor, where: str) -> SourceError:
    """The error that names the first NaN or infinite weight."""
    row = next(r for r in range(weight.shape[0]) if not bool(weight[r].isfinite().all()))
    column = int((~weight[row].isfinite()).nonzero()[0])
    return SourceError(
        f"{where}: weight [{row}, {column}] is {float(weight[row, column])}; "
        "the checkpoint is damaged, or keep this tensor with --keep"
    )
