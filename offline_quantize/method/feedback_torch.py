"""Error feedback in torch, on any device: all rows at once, column by column.

It does the arithmetic of csrc/feedback.cpp in the same order, so both give the same codes. The
order of sums: the errors of BLOCK neighbouring columns are summed up from the first to the last,
and that sum is added to the target, block by block.
"""

import torch
from torch import Tensor

from offline_quantize.method.feedback_task import FeedbackTask, Found

BLOCK = 16  # csrc/feedback_group.h has the same number
STATES = 4  # of a trellis: 2 * u[k] + u[k-1]; each keeps the best path to it


def encode_torch(task: FeedbackTask) -> Found:
    """The search in torch."""
    size, columns = task.layout.group_size, task.columns
    weight = task.target.T[:columns].contiguous()  # [K, R]
    target = weight.clone()
    codes = torch.zeros_like(task.mask.T)
    values = torch.zeros_like(task.target.T)
    chosen = torch.zeros_like(task.unit[0], dtype=torch.uint8)
    for group in range(chosen.shape[1]):
        start, end = group * size, min((group + 1) * size, columns)
        part = slice(start, end)
        codes[part], values[part], chosen[:, group] = _best_scale(
            task, group, target[part], weight[part]
        )
        error = weight[part] - values[part]
        for first in range(0, end - start, BLOCK):
            total = torch.zeros_like(target[end:])
            for j in range(first, min(first + BLOCK, end - start)):
                total += error[j] * task.factor.effects[start + j, end:, None]
            target[end:] += total
    return Found(codes.T.contiguous(), values.T.contiguous(), chosen)


def _best_scale(
    task: FeedbackTask, group: int, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and values [columns, R] of the candidate of least loss, and its number [R]."""
    codes, values, least = _Group(task, group, 0).search(target, weight)
    chosen = torch.zeros_like(least, dtype=torch.uint8)
    for candidate in range(1, len(task.unit)):
        found = _Group(task, group, candidate).search(target, weight)
        better = found[2] < least
        codes, values, least = (
            torch.where(better, new, old)
            for new, old in zip(found, (codes, values, least), strict=True)
        )
        chosen = torch.where(better, candidate, chosen).to(torch.uint8)
    return codes, values, chosen


class _Group:
    """One group of all rows with one of its scales."""

    def __init__(self, task: FeedbackTask, group: int, candidate: int) -> None:
        size = task.layout.group_size
        part = slice(group * size, min((group + 1) * size, task.columns))
        self.layout, self.grid = task.layout, task.grid
        self.effects = task.factor.effects[part, part]
        self.importance = task.factor.importance[part]
        self.unit, self.step = task.unit[candidate, :, group], task.step[candidate, :, group]
        self.zero = None if task.zero is None else task.zero[candidate, :, group]
        self.mask = task.mask[:, part].T.bool()
        self.any_salient = self.mask.any(1).tolist()
        device = task.target.device
        if not task.layout.uniform:
            limit, subsets = task.layout.codebook_limit, 4 if task.layout.trellis else 1
            codebook = torch.tensor(task.layout.codebook_values, device=device)
            points = torch.arange(-limit, limit + 1, device=device)[:, None]
            parts = [codebook[s::subsets] for s in range(subsets)]
            self.rank = torch.stack([(points - entries).abs().argmin(1) for entries in parts])
            pairs = zip(parts, self.rank, strict=True)
            self.value = torch.stack([entries[rank] for entries, rank in pairs]).float()
        states = torch.arange(STATES, device=device)
        self.last, self.before = states >> 1, states & 1  # u[k-1], u[k-2]
        self.way = 2 * self.before  # the first of the two states before each; the other is next

    def search(self, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and values [columns, R] for targets and weights [columns, R], and the loss [R]."""
        size, rows = weight.shape
        paths, device = STATES if self.layout.trellis else 1, weight.device
        moved = target.expand(paths, size, rows).clone()  # by all finished blocks
        total = torch.zeros_like(moved)  # what the unfinished block adds
        cost = torch.full((paths, rows), torch.inf, device=device)
        cost[0] = 0
        self.common = torch.zeros(rows, device=device)  # what all paths cost besides
        codes = torch.empty((size, paths, rows), dtype=torch.int64, device=device)
        values = torch.empty((size, paths, rows), device=device)
        before = torch.zeros((size, paths, rows), dtype=torch.int64, device=device)
        for k in range(size):
            if k % BLOCK == 0:
                moved += total
                total.zero_()
            here = moved[:, k] + total[:, k]
            if self.layout.trellis:
                cost, codes[k], values[k], before[k] = self._advance(here, k, cost)
                index = before[k][:, None].expand(-1, size - k, -1)
                moved[:, k:], total[:, k:] = (
                    part[:, k:].gather(0, index) for part in (moved, total)
                )
            else:
                codes[k], values[k], distance = self._choose(here, k)
                cost = cost + distance.square_() * self.importance[k]
            total += (weight[k] - values[k])[:, None] * self.effects[k][:, None]
        path = cost.argmin(0)
        loss = (cost.amin(0) + self.common) * self.step * self.step
        for k in range(size - 1, -1, -1):
            index = path[None]
            codes[k, 0], values[k, 0] = codes[k].gather(0, index), values[k].gather(0, index)
            path = before[k].gather(0, index)[0]
        return codes[:, 0].to(torch.uint8), values[:, 0], loss

    def _choose(self, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Code, value and error in codebook units, [1, R], nearest to the targets [1, R]."""
        scaled = (target * self.unit).nan_to_num(0.0, torch.inf, -torch.inf)
        if self.zero is None:
            point = self._points(scaled)
            code, value = self.rank[0][point], self.value[0][point]
        else:
            limit = self.layout.codebook_limit
            rounded = (self.zero + scaled).round_().clamp_(0, limit)
            code, value = rounded.long(), rounded - self.zero
        distance = scaled - value
        value = value * self.step
        if self.grid is not None and self.any_salient[k]:
            wide, wide_value = self.grid.nearest(target)
            distance = torch.where(self.mask[k], (target - wide_value) * self.unit, distance)
            code = torch.where(self.mask[k], wide, code)
            value = torch.where(self.mask[k], wide_value, value)
        return code, value, distance

    def _advance(
        self, target: Tensor, k: int, cost: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Costs, codes, values and paths before, all [paths, R], of the best paths to each state.

        target: of each path before;  cost: of that path.
        """
        scaled = (target * self.unit).nan_to_num(0.0, torch.inf, -torch.inf)
        point = self._points(scaled)
        low = torch.arange(2, device=target.device)[:, None]
        subset = (2 * (low ^ self.before) + self.last)[..., None]  # [u[k], path before, 1]
        code = 2 * self.rank[subset, point] + low[..., None]
        value = self.value[subset, point]
        metric = (scaled - value).square_() * self.importance[k]
        value = value * self.step
        if self.grid is not None and self.any_salient[k]:
            wide, wide_value = self.grid.nearest(target)
            extra = ((target - wide_value) * self.unit).square_() * self.importance[k]
            least = extra.amin(0)
            self.common += torch.where(self.mask[k], least, 0)
            extra = (extra - least).nan_to_num(0.0, torch.inf)
            fits = torch.where((wide & 1) == low[..., None], extra, torch.inf)
            metric = torch.where(self.mask[k], fits, metric)
            code = torch.where(self.mask[k], wide, code)
            value = torch.where(self.mask[k], wide_value, value)
        u, way = self.last, self.way  # of the new states, u[k] = state >> 1
        costs = cost + metric
        second = costs[u, way + 1] < costs[u, way]
        best, code, value = (
            torch.where(second, part[u, way + 1], part[u, way]) for part in (costs, code, value)
        )
        return best, code, value, way[:, None] + second

    def _points(self, scaled: Tensor) -> Tensor:
        limit = self.layout.codebook_limit
        return scaled.round().clamp_(-limit, limit).add_(limit).long()
