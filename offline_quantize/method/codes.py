"""Codes: the number that is stored for each weight, and the value that it stands for.

Salient weights come first: the low bits of their codes lie in the base plane, where a trellis
reads them like any others.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import reciprocal
from offline_quantize.method.salience import SalientWeights
from offline_quantize.method.salient_steps import SalientSteps
from offline_quantize.method.scales import GroupScales, RowScales, choose_scales
from offline_quantize.method.trellis import FREE, trellis_search
from precalib_kernels.format.layout import Layout
from precalib_kernels.format.reference import salient_grid_values


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the codes of a group are to make small: Σₖ importance[k] · (target[k] − value[k])².

    importance: float32, not negative, one for each weight, [R, G, group_size], or for each column
                of the groups at hand, [G, group_size]; None for plain squared error. Only a trellis
                weighs columns against each other.
    """

    importance: Tensor | None = None


SQUARED_ERROR = Objective()


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of a block of rows.

    base:    uint8 [R, G, group_size], the base plane: low bits of the code at salient places.
    salient: uint8 [R, G, m], whole codes of salient weights; unused slots mean nothing.
    values:  float32 [R, G, group_size], what the codes stand for, but for the column scale.
    """

    base: Tensor
    salient: Tensor
    values: Tensor


def find_codes(
    target: Tensor,
    salient: SalientWeights,
    rows: RowScales,
    candidates: Sequence[GroupScales],
    layout: Layout,
    *,
    padding: int = 0,
    objective: Objective = SQUARED_ERROR,
) -> tuple[Codes, GroupScales]:
    """The codes of a block of rows that come closest to `target`.

    target:     float32 [R, G, group_size], what the codes are to stand for.
    candidates: scales that each group may have; several for a trellis alone. Of equally good ones
                it gets the first.
    padding:    number of columns at the end of the last group that are none.
    returns:    the codes, and the scales that they are for.
    """
    groups = candidates[0]
    wide = _salient_codes(target, salient, rows, layout)
    if layout.uniform:
        base, values = _uniform_codes(target, groups, layout)
    elif layout.trellis:
        low_bits = torch.full(target.shape, FREE, dtype=torch.uint8, device=target.device)
        if padding:
            low_bits[:, -1, -padding:] = 0
        salient.scatter(low_bits, wide & 1)
        scales = torch.stack([each.scale for each in candidates])
        base, values, chosen = trellis_search(
            target, scales, layout, low_bits, objective.importance
        )
        if len(candidates) > 1:
            groups = choose_scales(candidates, chosen)
    else:
        base, values = _nearest_entries(target, groups.scale, layout)
    values = values.mul_(groups.step[..., None])
    if layout.salient_count:
        salient.scatter(base, wide & (2**layout.bits - 1))
        wide_values = salient_grid_values(wide.flatten(1), rows.tensors, layout)
        salient.scatter(values, wide_values.view(wide.shape))
    return Codes(base, wide, values), groups


def _salient_codes(
    target: Tensor, salient: SalientWeights, rows: RowScales, layout: Layout
) -> Tensor:
    """Codes, uint8 [R, G, m], of the salient weights on their row's grid."""
    if not layout.salient_count:
        return torch.empty(salient.positions.shape, dtype=torch.uint8, device=target.device)
    values = salient.gather(target).flatten(1)
    codes, _ = SalientSteps.of(rows, layout).nearest(values.T)
    return codes.T.to(torch.uint8).reshape(salient.positions.shape)


def _uniform_codes(target: Tensor, groups: GroupScales, layout: Layout) -> tuple[Tensor, Tensor]:
    """Code (uint8) of each weight by rounding, and the code less the zero point (float32)."""
    assert groups.zero is not None
    zero, inverse = groups.zero[..., None], reciprocal(groups.step)[..., None]
    codes = torch.addcmul(zero, target, inverse).round_().clamp_(0, layout.codebook_limit)
    return codes.to(torch.uint8), codes.sub_(zero)


def _nearest_entries(target: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Code (uint8) and value (float32) of the codebook entry nearest to each weight."""
    limit, device = layout.codebook_limit, target.device
    entries = torch.tensor(layout.codebook_values, device=device)
    points = torch.arange(-limit, limit + 1, device=device)
    nearest = (points[:, None] - entries).abs().argmin(1)
    point = target * (limit * reciprocal(scale))[..., None]
    index = point.round_().clamp_(-limit, limit).add_(limit).int()
    return nearest.to(torch.uint8)[index], entries[nearest].float()[index]
