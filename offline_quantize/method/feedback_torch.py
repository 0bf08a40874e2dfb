"""Error feedback in torch, on any device: all rows at once, column by column.

It does the arithmetic of csrc/feedback.cpp in the same order, so both give the same codes. The
order of sums: the errors of BLOCK neighbouring columns are summed up from the first to the last,
and that sum is added to the target, block by block.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from offline_quantize.method.feedback import FeedbackTask, SalientSteps

BLOCK = 16  # csrc/feedback.cpp has the same number


def encode_torch(task: "FeedbackTask") -> tuple[Tensor, Tensor]:
    """Whole codes (uint8) and values (float32) [R, G * group_size]."""
    size, columns = task.layout.group_size, task.columns
    weight = task.target.T[:columns].contiguous()  # [K, R]
    target = weight.clone()
    codes = torch.zeros_like(task.mask.T)
    values = torch.zeros_like(task.target.T)
    for group in range(task.unit.shape[1]):
        start, end = group * size, min((group + 1) * size, columns)
        part = slice(start, end)
        codes[part], values[part] = _Group(task, group, start, end).search(
            target[part], weight[part]
        )
        error = weight[part] - values[part]
        for first in range(0, end - start, BLOCK):
            total = torch.zeros_like(target[end:])
            for j in range(first, min(first + BLOCK, end - start)):
                total += error[j] * task.factor.effects[start + j, end:, None]
            target[end:] += total
    return codes.T.contiguous(), values.T.contiguous()


class _Group:
    """One group of all rows. With a trellis there are four states, 2 * u[k] + u[k-1], else one."""

    def __init__(self, task: "FeedbackTask", group: int, start: int, end: int) -> None:
        self.layout, self.grid = task.layout, task.grid
        self.effects = task.factor.effects[start:end, start:end]
        self.importance = task.factor.importance[start:end]
        self.unit, self.step = task.unit[:, group], task.step[:, group]
        self.zero = None if task.zero is None else task.zero[:, group]
        self.mask = task.mask[:, start:end].T.bool()
        self.any_salient = self.mask.any(1).tolist()
        device = task.target.device
        if not task.layout.uniform:
            limit, subsets = task.layout.codebook_limit, 4 if task.layout.trellis else 1
            codebook = torch.tensor(task.layout.codebook_values, device=device)
            points = torch.arange(-limit, limit + 1, device=device)[:, None]
            parts = [codebook[s::subsets] for s in range(subsets)]
            self.rank = torch.stack([(points - part).abs().argmin(1) for part in parts])
            pairs = zip(parts, self.rank, strict=True)
            self.value = torch.stack([part[rank] for part, rank in pairs]).float()

    def search(self, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values [columns, R] for targets and weights [columns, R]."""
        size, rows = weight.shape
        states, device = 4 if self.layout.trellis else 1, weight.device
        moved = target.expand(states, size, rows).clone()  # by all finished blocks
        total = torch.zeros_like(moved)  # what the unfinished block adds
        cost = torch.full((states, rows), torch.inf, device=device)
        cost[0] = 0
        codes = torch.empty((size, states, rows), dtype=torch.int64, device=device)
        values = torch.empty((size, states, rows), device=device)
        before = torch.zeros((size, states, rows), dtype=torch.int64, device=device)
        for k in range(size):
            if k % BLOCK == 0:
                moved += total
                total.zero_()
            here = moved[:, k] + total[:, k]
            if self.layout.trellis:
                cost, codes[k], values[k], origin = self._advance(here, k, cost)
                before[k] = origin & 1
                index = origin[:, None].expand(-1, size - k, -1)
                moved[:, k:], total[:, k:] = (
                    part[:, k:].gather(0, index) for part in (moved, total)
                )
            else:
                codes[k], values[k] = self._choose(here, k)
            total += (weight[k] - values[k])[:, None] * self.effects[k][:, None]
        state = cost.argmin(0)
        for k in range(size - 1, -1, -1):
            index, previous = state[None], before[k].gather(0, state[None])[0]
            codes[k, 0], values[k, 0] = codes[k].gather(0, index), values[k].gather(0, index)
            state = 2 * (state & 1) + previous
        return codes[:, 0].to(torch.uint8), values[:, 0]

    def _choose(self, target: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Code and value [1, R] nearest to the targets [1, R]."""
        scaled = (target * self.unit).nan_to_num(0.0, torch.inf, -torch.inf)
        if self.zero is None:
            point = self._points(scaled)
            code, value = self.rank[0][point], self.value[0][point]
        else:
            limit = self.layout.codebook_limit
            rounded = (self.zero + scaled).round_().clamp_(0, limit)
            code, value = rounded.long(), rounded - self.zero
        value = value * self.step
        if self.any_salient[k]:
            wide, wide_value = self._salient(target)
            code = torch.where(self.mask[k], wide, code)
            value = torch.where(self.mask[k], wide_value, value)
        return code, value

    def _advance(
        self, target: Tensor, k: int, cost: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Costs, codes, values and states before, all [4, R], of the best path to each state.

        target: of each state before;  cost: of the best path to it.
        """
        device = target.device
        scaled = (target * self.unit).nan_to_num(0.0, torch.inf, -torch.inf)
        point = self._points(scaled)
        old = torch.arange(4, device=device)
        low = torch.arange(2, device=device)[:, None]
        subset = (2 * (low ^ (old & 1)) + (old >> 1))[..., None]  # [u[k], state before, 1]
        code = 2 * self.rank[subset, point] + low[..., None]
        value = self.value[subset, point]
        metric = (scaled - value).square_() * self.importance[k]
        value = value * self.step
        if self.any_salient[k]:
            wide, wide_value = self._salient(target)
            extra = ((target - wide_value) * self.unit).square_() * self.importance[k]
            extra = (extra - extra.amin(0)).nan_to_num(0.0, torch.inf)
            fits = torch.where((wide & 1) == low[..., None], extra, torch.inf)
            metric = torch.where(self.mask[k], fits, metric)
            code = torch.where(self.mask[k], wide, code)
            value = torch.where(self.mask[k], wide_value, value)
        ways = (cost + metric).view(2, 2, 2, -1)  # [u[k], u[k-1], u[k-2]]
        better = (ways[:, :, 1] < ways[:, :, 0]).view(4, -1)
        cost = torch.where(better, ways[:, :, 1].reshape(4, -1), ways[:, :, 0].reshape(4, -1))
        code, value = (
            torch.where(better, part[:, :, 1].reshape(4, -1), part[:, :, 0].reshape(4, -1))
            for part in (code.view(2, 2, 2, -1), value.view(2, 2, 2, -1))
        )
        return cost, code, value, 2 * (old & 1)[:, None] + better

    def _points(self, scaled: Tensor) -> Tensor:
        limit = self.layout.codebook_limit
        return scaled.round().clamp_(-limit, limit).add_(limit).long()

    def _salient(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Code and value of the nearest salient value of each row's grid."""
        assert self.grid is not None
        grid: SalientSteps = self.grid
        size = target.abs() if grid.sign else target
        steps = ((size - grid.offset) * grid.inverse).round_()
        steps = steps.nan_to_num(0.0, torch.inf, -torch.inf).clamp_(grid.low, grid.high)
        value, code = grid.offset + grid.scale * steps, steps.long() + grid.bias
        if not grid.sign:
            return code, value
        negative = target < 0
        return code + negative * grid.sign, torch.where(negative, -value, value)
