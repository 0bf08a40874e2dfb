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
from precalib_kernels.errors import SourceError
from precalib_kernels.layout import pack_bits
from precalib_kernels.positions import pack_positions

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
    balanced = block if scale is None else block / scale
    padding = groups * layout.group_size - columns
    grouped = torch.nn.functional.pad(balanced, (0, padding))
    grouped = grouped.view(rows, groups, layout.group_size)
    ordinary = torch.ones_like(grouped)  # 1 for weights of the base class, 0 for all others
    if padding:
        ordinary[:, -1, -padding:] = 0

    found, wanted = 0, 0
    positions = None
    if layout.salient_count:
        score = grouped.abs()
        if recipe.rule == "tensor":
            score = salience.soft_threshold(grouped, penalty).abs()
            wanted = int((score > 0).sum())
        positions = salience.largest_positions(score, layout.salient_count)
        slots = torch.where(positions < 0, layout.group_size, positions).long()
        found = int((positions >= 0).sum())
        ordinary = torch.nn.functional.pad(ordinary, (0, 1)).scatter_(2, slots, 0)[..., :-1]

    if layout.uniform:
        base = grids.min_max(grouped, ordinary, recipe)
    else:
        base = grids.fit_levels(grouped, ordinary, layout)
    packed, codes, values = base.packed, base.codes, base.values
    if positions is not None:
        values = torch.nn.functional.pad(values, (0, 1))
        codes = torch.nn.functional.pad(codes, (0, 1))
        salient = torch.nn.functional.pad(grouped, (0, 1)).gather(2, slots)
        used = positions >= 0
        grid = grids.salient_codes(salient, used, layout, packed)
        packed |= grid.packed
        values.scatter_(2, slots, grid.values)
        codes.scatter_(2, slots, grid.codes & (2**layout.bits - 1))
        values, codes = values[..., :-1], codes[..., :-1]
        packed["salient_positions"] = pack_positions(positions, layout)
        if layout.salient_code_bytes:
            high = torch.where(used, grid.codes >> layout.bits, 0).to(torch.uint8)
            planes = pack_bits(high, layout.salient_bits - layout.bits)
            packed["salient_codes"] = planes.flatten(1)
    flat = codes.reshape(rows, -1)[:, :columns]
    packed["qweight"] = pack_bits(flat, layout.bits)
    values = values.reshape(rows, -1)[:, :columns]
    return packed, values if scale is None else values * scale, (found, max(wanted - found, 0))


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
