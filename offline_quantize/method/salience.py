"""Which weights are salient: the adaptive-LASSO soft threshold and its two ways to set λ'."""

import torch
from torch import Tensor


def soft_threshold(weight: Tensor, penalty: float) -> Tensor:
    """Adaptive-LASSO shrinkage sign(w)·max(|w| − λ'/|w|, 0)  (arXiv 2501.09107, Eq. 5).

    weight:  any shape, float32; zeros stay zero.
    penalty: λ', in squared weight units.

    What stays non-zero is salient: |w| > √λ'.
    """
    magnitude = weight.abs()
    shrunk = magnitude - penalty / magnitude.clamp_min(torch.finfo(weight.dtype).tiny)
    return weight.sign() * shrunk.clamp_min(0)


def penalty_for_share(weight: Tensor, share: float) -> float:
    """The λ' at which at most `share` of a tensor's weights is salient, found exactly.

    The paper searches for λ'. But the salient weights are those above √λ', so λ' lies between
    the squares of two neighbours among the sorted magnitudes; their product is returned.

    weight: bfloat16, float16 or float32, finite.
    """
    allowed = int(share * weight.numel())
    ordinary, salient = _neighbours(weight, allowed)
    return max(ordinary, salient / 2) * salient  # salient / 2: all weights may be salient


def _neighbours(weight: Tensor, allowed: int) -> tuple[float, float]:
    """The largest ordinary and the smallest salient magnitude, when `allowed` may be salient."""
    if weight.dtype == torch.float32:
        magnitude = weight.abs().flatten()
        if allowed >= len(magnitude):
            return 0.0, float(magnitude.min())
        largest = float(magnitude.kthvalue(len(magnitude) - allowed).values)
        above = magnitude[magnitude > largest]
        return largest, float(above.min()) if len(above) else 2 * largest
    # magnitudes of 16-bit floats sort like their bits, so a histogram of the bits sorts them all
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for piece in weight.view(torch.int16).flatten().split(1 << 22):
        counts += torch.bincount(piece & 0x7FFF, minlength=1 << 15)
    values = torch.arange(1 << 15, dtype=torch.int16).view(weight.dtype).float()
    values, counts = values[counts > 0], counts[counts > 0]
    at_least = counts.flip(0).cumsum(0).flip(0)
    first = int((at_least > allowed).sum())  # index of the smallest salient magnitude
    ordinary = float(values[first - 1]) if first else 0.0
    return ordinary, float(values[first]) if first < len(values) else 2 * ordinary


def largest_positions(score: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores of every group, ascending.

    score:   [..., group_size]; a score of 0 or less marks a weight that must not be chosen.
    returns: int16 [..., count], unused slots -1 at the end.
    """
    size = score.shape[-1]
    values, index = score.topk(min(count, size), -1, sorted=False)
    order = torch.where(values > 0, index, size).sort(-1).values
    positions = torch.where(order < size, order, -1)
    return torch.nn.functional.pad(positions, (0, count - positions.shape[-1]), value=-1).short()
