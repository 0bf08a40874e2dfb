"""Scales: how large one step of a code is, for each row and each group, as it is stored.

Blocks of weights are [R, G, group_size], column scale taken off, a ragged last group filled up with
zeros. A scale follows from the largest non-salient weights of a group and is not fitted to the
others (docs/method.md tells why). A trellis search, or error feedback, chooses it among a few.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import reciprocal
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.salience import SalientWeights
from precalib_kernels.format.layout import LOG_STEPS, LOG_ZERO, Layout
from precalib_kernels.format.reference import group_scales as stored_scales


@dataclasses.dataclass(frozen=True)
class RowScales:
    """What all groups of a row share.

    tensors: as stored, by name, float16 [R, 1]: `row_scale` for scale "log8"; `salient_offset`
             and `salient_scale` for a salient grid of its own.
    """

    tensors: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class GroupScales:
    """Scale and zero point of each group.

    tensors: as stored, by name, [R, G]: `scales`, and `zeros` for a uniform codebook.
    scale:   as a decoder finds it, float32 [R, G].
    step:    value of one unit of the codebook, float32 [R, G].
    zero:    zero point as a number of steps, float32 [R, G]; None unless the codebook is uniform.
    """

    tensors: dict[str, Tensor]
    scale: Tensor
    step: Tensor
    zero: Tensor | None


def row_scales(grouped: Tensor, salient: SalientWeights, recipe: Recipe) -> RowScales:
    """Find the scales of rows, for which all their groups are needed."""
    layout, tensors = recipe.layout, {}
    if layout.scale == "log8":
        _, spans = _ranges(grouped, salient, recipe)
        row = spans.amax(-1)
        if layout.salient_count and layout.salient_grid == "row":  # that grid ends at row_scale
            row = torch.maximum(row, grouped.abs().amax((1, 2)))
        tensors["row_scale"] = row.half()[:, None]
    if layout.salient_count and layout.salient_grid != "row":
        tensors |= _salient_range(salient.gather(grouped), salient.used, layout)
    return RowScales(tensors)


def group_scales(
    grouped: Tensor,
    salient: SalientWeights,
    rows: RowScales,
    recipe: Recipe,
    shrinks: Sequence[float] = (1.0,),
) -> list[GroupScales]:
    """Find scale and zero point of each group, given its row's, once for each of `shrinks`.

    shrinks: shares of the group's range that the codes span; weights beyond get the end code.
    """
    layout = recipe.layout
    least, whole = _ranges(grouped, salient, recipe)
    found = []
    for shrink in shrinks:
        spans = whole * shrink
        tensors = {"scales": spans.half() if layout.scale == "float16" else _log8(spans, rows)}
        scale = stored_scales(tensors | rows.tensors, layout)
        step, zero = scale / layout.codebook_limit, None
        if least is not None:
            zero = (-(least * shrink) * reciprocal(step)).round_().clamp_(0, layout.codebook_limit)
            tensors["zeros"] = zero.to(torch.uint8)
        found.append(GroupScales(tensors, scale, step, zero))
    return found


def choose_scales(candidates: Sequence[GroupScales], chosen: Tensor) -> GroupScales:
    """The scales of each group from one of several candidates; `chosen` [R, G] says which."""

    def choose(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).gather(0, chosen[None].long())[0]

    zeros = [each.zero for each in candidates if each.zero is not None]
    return GroupScales(
        {n: choose([each.tensors[n] for each in candidates]) for n in candidates[0].tensors},
        choose([each.scale for each in candidates]),
        choose([each.step for each in candidates]),
        choose(zeros) if zeros else None,
    )


def _ranges(
    grouped: Tensor, salient: SalientWeights, recipe: Recipe
) -> tuple[Tensor | None, Tensor]:
    """Lower end and span of the non-salient weights of each group, [R, G].

    A uniform codebook spans from the least to the largest, zero included so that it has a code. The
    others are symmetric: no lower end, and their span is the largest magnitude.
    """
    if not recipe.layout.uniform:
        magnitude = grouped.abs()
        salient.clear(magnitude)
        return None, magnitude.amax(-1)
    non_salient = grouped.clone()
    salient.clear(non_salient)
    lowest = non_salient.amin(-1).clamp_max(0) * recipe.clip
    highest = non_salient.amax(-1).clamp_min(0) * recipe.clip
    return lowest, highest - lowest


def _log8(spans: Tensor, rows: RowScales) -> Tensor:
    """Codes, uint8 [R, G], of group scales as powers of 2**(-1/16) of their row's scale."""
    ratio = spans * reciprocal(rows.tensors["row_scale"].float())
    steps = (-LOG_STEPS * ratio.clamp_min(2**-20).log2()).round_().clamp_(0, LOG_ZERO - 1)
    return torch.where(spans > 0, steps, LOG_ZERO).to(torch.uint8)


def _salient_range(values: Tensor, used: Tensor, layout: Layout) -> dict[str, Tensor]:
    """`salient_offset` and `salient_scale` of each row's own grid, float16 [R, 1].

    values, used: [R, G, m]. The grid goes from the least to the largest value, or magnitude.
    """
    top = 2**layout.salient_bits - 1
    values, used = values.flatten(1), used.flatten(1)
    if layout.salient_grid == "sign-magnitude":
        values, top = values.abs(), top // 2
    least = torch.where(used, values, float("inf")).amin(-1, keepdim=True)
    largest = torch.where(used, values, float("-inf")).amax(-1, keepdim=True)
    none = ~used.any(-1, keepdim=True)
    least, largest = least.masked_fill(none, 0), largest.masked_fill(none, 0)
    offset = least.half()
    scale = ((largest - offset.float()) / top).half()
    return {"salient_offset": offset, "salient_scale": scale}
