"""Grids for the two classes: values of a block of rows to scales and codes as they are stored.

Weights come grouped, [R, G, group_size]; `ordinary` is the same with zeros in the place of salient
weights and of the padding of a ragged group.
"""

import torch
from torch import Tensor

from offline_quantize.method.recipes import Recipe
from precalib_kernels.format.layout import LOG_STEPS, LOG_ZERO, Layout
from precalib_kernels.format.reference import group_scales, salient_grid_values


def min_max(
    grouped: Tensor, ordinary: Tensor, recipe: Recipe
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Uniform grid with a zero point from the least to the largest ordinary weight of a group.

    returns: side tensors `scales` and `zeros` (and `row_scale`); codes, uint8 like `grouped`; and
             their levels less the zero point, float32.
    """
    layout = recipe.layout
    top = 2**layout.bits - 1
    low = ordinary.amin(-1).clamp_max(0) * recipe.clip  # zero is in the range: it can be a code
    high = ordinary.amax(-1).clamp_min(0) * recipe.clip
    sides = store_scales(high - low, layout, grouped)
    inverse = _inverse(group_scales(sides, layout) / layout.codebook_limit)
    zero = (-low * inverse).round_().clamp_(0, top)
    codes = torch.addcmul(zero[..., None], grouped, inverse[..., None]).round_().clamp_(0, top)
    coded = codes.to(torch.uint8)
    return sides | {"zeros": zero.to(torch.uint8)}, coded, codes.sub_(zero[..., None])


def nearest_entries(grouped: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Code (uint8) and value (float32) of the level nearest to each weight; no trellis."""
    limit = layout.codebook_limit
    levels = torch.tensor(layout.codebook_values)
    nearest = (torch.arange(-limit, limit + 1)[:, None] - levels).abs().argmin(1)
    point = grouped * (limit * _inverse(scale))[..., None]
    index = point.round_().clamp_(-limit, limit).add_(limit).int()
    return nearest.to(torch.uint8)[index], levels[nearest].float()[index]


def store_scales(scale: Tensor, layout: Layout, grouped: Tensor) -> dict[str, Tensor]:
    """Group scales [R, G] as the layout stores them: `scales`, and `row_scale` for "log8".

    The "row" salient grid ends at row_scale, which must then reach the row's largest weight.
    """
    if layout.scale == "float16":
        return {"scales": scale.half()}
    row = scale.amax(-1)
    if layout.salient_count and layout.salient_grid == "row":
        row = torch.maximum(row, grouped.abs().amax((1, 2)))
    row_scale = row.half()[:, None]
    ratio = scale * _inverse(row_scale.float())
    steps = (-LOG_STEPS * ratio.clamp_min(2**-20).log2()).round_().clamp_(0, LOG_ZERO - 1)
    codes = torch.where(scale > 0, steps, LOG_ZERO).to(torch.uint8)
    return {"scales": codes, "row_scale": row_scale}


def salient_codes(
    salient: Tensor, used: Tensor, layout: Layout, sides: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Codes of the salient weights on their row's grid.

    salient: values [R, G, m];  used: which slots hold one;  sides: side tensors of the base.
    returns: side tensors of the salient grid, and codes uint8 [R, G, m].
    """
    flat, top = salient.flatten(1), 2**layout.salient_bits - 1
    own: dict[str, Tensor] = {}
    if layout.salient_grid == "row":
        inverse = (top // 2) * _inverse(sides["row_scale"].float())
        codes = (flat * inverse).round_().clamp_(-(top // 2), top // 2) + (top // 2 + 1)
    elif layout.salient_grid == "min-max":
        own = _affine(flat, used.flatten(1), top)
        codes = _steps(flat, own).clamp_(0, top)
    else:
        own = _affine(flat.abs(), used.flatten(1), top // 2)
        magnitude = _steps(flat.abs(), own).clamp_(0, top // 2)
        codes = torch.where(flat < 0, magnitude + top // 2 + 1, magnitude)
    return own, codes.to(torch.uint8).view_as(salient)


def salient_values(codes: Tensor, sides: dict[str, Tensor], layout: Layout) -> Tensor:
    """Values [R, G, m] of salient codes."""
    return salient_grid_values(codes.flatten(1), sides, layout).view(codes.shape)


def _affine(values: Tensor, used: Tensor, top: int) -> dict[str, Tensor]:
    """salient_offset and salient_scale of each row: codes 0 … top from the least to the largest."""
    low = torch.where(used, values, float("inf")).amin(-1, keepdim=True)
    high = torch.where(used, values, float("-inf")).amax(-1, keepdim=True)
    none = ~used.any(-1, keepdim=True)
    low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
    offset = low.half()
    return {"salient_offset": offset, "salient_scale": ((high - offset.float()) / top).half()}


def _steps(values: Tensor, sides: dict[str, Tensor]) -> Tensor:
    inverse = _inverse(sides["salient_scale"].float())
    return ((values - sides["salient_offset"].float()) * inverse).round_()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)
