"""Salient choice: which weights of each group get wider codes than the others.

A recipe has one of two rules. "group": the m largest of each group. "tensor": all above one
threshold √λ' for the whole weight, which is the adaptive-LASSO soft threshold of arXiv 2501.09107,
but never more than m of a group.
"""

import dataclasses

import torch
from torch import Tensor

from offline_quantize.method.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class SalientWeights:
    """Which weights of a block of rows, [R, G, group_size], are salient.

    positions: int16 [R, G, m], ascending within each group; -1 in unused slots, which come last.
    used:      bool [R, G, m], which slots hold a weight.
    index:     int64 [number], where each salient weight is in the flattened block.
    overflow:  number of weights above the threshold that found no slot in their group.
    """

    positions: Tensor
    used: Tensor
    index: Tensor
    overflow: int = 0

    @classmethod
    def at(cls, positions: Tensor, group_size: int, above: int = 0) -> "SalientWeights":
        """The salient weights at these positions.

        above: number of weights above the threshold, 0 where there is no threshold.
        """
        rows, groups, _ = positions.shape
        first = torch.arange(rows * groups, device=positions.device) * group_size
        used = positions >= 0
        index = (positions + first.view(rows, groups, 1))[used]
        return cls(positions, used, index, max(above - len(index), 0))

    def gather(self, block: Tensor) -> Tensor:
        """Values of a block [R, G, group_size] in the slots [R, G, m]; unused ones mean nothing."""
        return block.gather(2, self.positions.clamp(min=0).long())

    def scatter(self, block: Tensor, slots: Tensor) -> None:
        """Write `slots` [R, G, m] to the salient places of a contiguous block, in place."""
        block.view(-1)[self.index] = slots.to(block.dtype)[self.used]

    def clear(self, block: Tensor) -> None:
        """Write zeros to the salient places of a contiguous block, in place."""
        block.view(-1).index_fill_(0, self.index, 0)


def penalty(weight: Tensor, recipe: Recipe) -> float:
    """λ' of the whole weight, for recipes whose rule has one; else 0.

    weight: [N, K], bfloat16, float16 or float32, finite.
    """
    if recipe.layout.salient_count and recipe.rule == "tensor":
        return penalty_for_share(weight, recipe.alpha)
    return 0.0


def choose_salient(grouped: Tensor, recipe: Recipe, penalty: float) -> SalientWeights:
    """The salient weights of a block of rows.

    grouped: float32 [R, G, group_size], column scale taken off.
    penalty: λ' of the weight; 0 for the rule "group".
    """
    count, above = recipe.layout.salient_count, 0
    if not count:
        none = torch.empty((*grouped.shape[:2], 0), dtype=torch.int16, device=grouped.device)
        return SalientWeights.at(none, recipe.layout.group_size)
    if recipe.rule == "tensor":
        score = soft_threshold(grouped, penalty).abs()
        above = int((score > 0).sum())
    else:
        score = grouped.abs()
    return SalientWeights.at(largest_positions(score, count), recipe.layout.group_size, above)


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
    below, above = _neighbours(weight, allowed)
    return max(below, above / 2) * above  # above / 2: all weights may be salient


def _neighbours(weight: Tensor, allowed: int) -> tuple[float, float]:
    """The largest non-salient and the smallest salient magnitude if `allowed` may be salient."""
    if weight.dtype == torch.float32:
        magnitude = weight.abs().flatten()
        if allowed >= len(magnitude):
            return 0.0, float(magnitude.min())
        largest = float(magnitude.kthvalue(len(magnitude) - allowed).values)
        above = magnitude[magnitude > largest]
        return largest, float(above.min()) if len(above) else 2 * largest
    # magnitudes of 16-bit floats sort like their bits, so a histogram of the bits sorts them all
    device = weight.device
    counts = torch.zeros(1 << 15, dtype=torch.int64, device=device)
    stored = weight.view(torch.int16).flatten()
    for start in range(0, len(stored), 1 << 22):
        piece = stored[start : start + (1 << 22)] & 0x7FFF
        counts += torch.bincount(piece, minlength=1 << 15)
    bits = torch.arange(1 << 15, dtype=torch.int16, device=device)
    values = bits.view(weight.dtype).float()
    values, counts = values[counts > 0], counts[counts > 0]
    at_least = counts.flip(0).cumsum(0).flip(0)
    first = int((at_least > allowed).sum())  # index of the smallest salient magnitude
    below = float(values[first - 1]) if first else 0.0
    return below, float(values[first]) if first < len(values) else 2 * below


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
