"""Grids for the two classes: values of a block of rows to codes and scales as they are stored."""

import dataclasses

import torch
from torch import Tensor

from offline_quantize.recipes import Recipe
from precalib_kernels.layout import LOG_STEPS, LOG_ZERO, Layout
from precalib_kernels.reference import group_scales, salient_grid_values

FIT_ROUNDS = 3
FIRST_TRY = 0.9  # of the largest ordinary magnitude: where the fit of non-uniform levels starts


@dataclasses.dataclass(frozen=True)
class Coded:
    """Side tensors by name, codes (uint8) and the values they stand for (float32)."""

    packed: dict[str, Tensor]
    codes: Tensor
    values: Tensor


def min_max(grouped: Tensor, ordinary: Tensor, recipe: Recipe) -> Coded:
    """Uniform grid with a zero point from the least to the largest ordinary weight of a group.

    grouped:  [R, G, group_size];  ordinary: the same shape, 1 or 0.
    """
    layout = recipe.layout
    top = 2**layout.bits - 1
    kept = grouped * ordinary  # zero is always within the range, so that it can be a code
    low = kept.amin(-1).clamp_max(0) * recipe.clip
    high = kept.amax(-1).clamp_min(0) * recipe.clip
    packed = store_scales(high - low, layout)
    step = group_scales(packed, layout) / layout.level_limit
    inverse = torch.where(step > 0, 1 / step, 0)
    zero = (-low * inverse).round_().clamp_(0, top)
    codes = torch.addcmul(zero[..., None], grouped, inverse[..., None]).round_().clamp_(0, top)
    values = (codes - zero[..., None]) * step[..., None]
    return Coded(packed | {"zeros": zero.to(torch.uint8)}, codes.to(torch.uint8), values)


def fit_levels(grouped: Tensor, ordinary: Tensor, layout: Layout) -> Coded:
    """Non-uniform levels with the group scale that fits the ordinary weights best.

    Alternates between the nearest level and the scale of least squared error.
    """
    nearest = _nearest_level(layout)
    levels = torch.tensor(layout.level_values, dtype=torch.float32)
    kept = grouped * ordinary
    scale = kept.abs().amax(-1) * FIRST_TRY
    for _ in range(FIT_ROUNDS):
        level = levels[_assign(kept, scale, layout, nearest)]
        power = (level.square() * ordinary).sum(-1)
        scale = layout.level_limit * ((kept * level).sum(-1) / power.clamp_min(1)).clamp_min(0)
    packed = store_scales(scale, layout, grouped.abs().amax((1, 2)))
    scale = group_scales(packed, layout)
    codes = _assign(grouped, scale, layout, nearest)
    values = levels[codes] * (scale / layout.level_limit)[..., None]
    return Coded(packed, codes.to(torch.uint8), values)


def store_scales(scale: Tensor, layout: Layout, largest: Tensor | None = None) -> dict[str, Tensor]:
    """Group scales [R, G] as the layout stores them.

    largest: largest magnitude of each row [R], which the "row" salient grid must reach.
    """
    if layout.scale == "float16":
        return {"scales": scale.half()}
    row = scale.amax(-1)
    if layout.salient_count and layout.salient_grid == "row" and largest is not None:
        row = torch.maximum(row, largest)
    row_scale = row.half()[:, None]
    ratio = scale / row_scale.float().clamp_min(torch.finfo(torch.float16).tiny)
    steps = (-LOG_STEPS * ratio.clamp_min(2**-20).log2()).round_().clamp_(0, LOG_ZERO - 1)
    codes = torch.where(scale > 0, steps, LOG_ZERO).to(torch.uint8)
    return {"scales": codes, "row_scale": row_scale}


def salient_codes(
    salient: Tensor, used: Tensor, layout: Layout, packed: dict[str, Tensor]
) -> Coded:
    """Codes of the salient weights on their row's grid.

    salient: values [R, G, m];  used: which slots hold one;  packed: side tensors of the base.
    """
    flat, flat_used = salient.flatten(1), used.flatten(1)
    sides: dict[str, Tensor] = {}
    top = 2**layout.salient_bits - 1
    if layout.salient_grid == "row":
        inverse = 127 / packed["row_scale"].float().clamp_min(torch.finfo(torch.float16).tiny)
        codes = (flat * inverse).round_().clamp_(-127, 127) + 128
    elif layout.salient_grid == "min-max":
        sides = _affine(flat, flat_used, top)
        codes = _steps(flat, sides).clamp_(0, top)
    else:
        sides = _affine(flat.abs(), flat_used, top // 2)
        magnitude = _steps(flat.abs(), sides).clamp_(0, top // 2)
        codes = torch.where(flat < 0, magnitude + top // 2 + 1, magnitude)
    coded = codes.to(torch.uint8)
    values = salient_grid_values(coded, packed | sides, layout)
    return Coded(sides, coded.view_as(salient), values.view_as(salient))


def _affine(values: Tensor, used: Tensor, top: int) -> dict[str, Tensor]:
    """salient_offset and salient_scale of each row: codes 0 … top from the least to the largest."""
    low = torch.where(used, values, float("inf")).amin(-1, keepdim=True)
    high = torch.where(used, values, float("-inf")).amax(-1, keepdim=True)
    none = ~used.any(-1, keepdim=True)
    low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
    offset = low.half()
    return {"salient_offset": offset, "salient_scale": ((high - offset.float()) / top).half()}


def _steps(values: Tensor, sides: dict[str, Tensor]) -> Tensor:
    scale = sides["salient_scale"].float()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((values - sides["salient_offset"].float()) * inverse).round_()


def _nearest_level(layout: Layout) -> Tensor:
    """Code of the level nearest to each whole number from -limit to limit."""
    limit = layout.level_limit
    points = torch.arange(-limit, limit + 1)[:, None]
    return (points - torch.tensor(layout.level_values)).abs().argmin(1).int()


def _assign(values: Tensor, scale: Tensor, layout: Layout, nearest: Tensor) -> Tensor:
    limit = layout.level_limit
    inverse = torch.where(scale > 0, limit / scale, 0)[..., None]
    point = (values * inverse).round_().clamp_(-limit, limit)
    return nearest[(point + limit).int()]
