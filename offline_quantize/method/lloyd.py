"""Levels for the trellis: Lloyd's iteration on a Gaussian whose largest weights are salient.

The recipes hold its results as plain numbers; `python -m offline_quantize.method.lloyd` prints them
again. The Gaussian is a model of balanced weights and no model's own: nothing is tuned to data.
"""

import torch
from torch import Tensor

from offline_quantize.method.trellis import search
from precalib_kernels.format.layout import Layout

GROUPS = 2048
ITERATIONS = 120


def trained_codebook(bits: int, group_size: int, salient_count: int) -> tuple[int, ...]:
    """The 2**(bits+1) int8 levels of least squared error in the trellis, symmetric and odd.

    Samples are groups of a normal, without their `salient_count` largest members, divided by the
    largest that is left, as `encode` sees them. Odd levels are 2β − 127 with −level's β being the
    bitwise complement of β: kernels negate four packed levels by one exclusive or.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((GROUPS, group_size), generator=generator)
    order = normal.abs().sort(-1, descending=True)
    ordinary = torch.ones_like(normal).scatter_(1, order.indices[:, :salient_count], 0)
    samples = normal / order.values[:, salient_count, None]
    forced = torch.where(ordinary > 0, 2, torch.randint(0, 2, normal.shape, generator=generator))
    levels = _start(2 ** (bits + 1))
    for _ in range(ITERATIONS):
        layout = _layout(bits, group_size, levels)
        _, level = search(samples, torch.full((GROUPS,), 127.0), forced.to(torch.uint8), layout)
        mean = _centroids(levels.round(), level, 127 * samples, ordinary)
        step = 2 * (mean - levels)  # shorter steps get stuck on the whole numbers
        levels = (levels + step).clamp(-127, 127)
    return tuple(int(level) for level in 2 * ((levels - 1) / 2).round() + 1)


def _start(count: int) -> Tensor:
    """Middle quantiles of a normal, stretched to the whole range: a little denser in the middle."""
    levels = torch.special.ndtri(0.1 + 0.8 * (torch.arange(count) + 0.5) / count)
    return 120 * levels / levels.max()


def _layout(bits: int, group_size: int, levels: Tensor) -> Layout:
    whole = tuple(int(level) for level in levels.round())
    return Layout(bits=bits, group_size=group_size, codebook=whole, trellis=True)


def _centroids(levels: Tensor, chosen: Tensor, samples: Tensor, ordinary: Tensor) -> Tensor:
    """Means of the samples that chose each level, made symmetric."""
    index = torch.searchsorted(levels, chosen.flatten())
    weight = ordinary.flatten().double()
    count = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, index, weight)
    total = torch.zeros_like(count).index_add_(0, index, samples.flatten().double() * weight)
    mean = torch.where(count > 0, total / count.clamp_min(1), levels.double())
    return ((mean - mean.flip(0)) / 2).float()


if __name__ == "__main__":
    for case in ((5, 128, 2), (4, 128, 2), (3, 128, 4), (2, 128, 4)):
        print(case, trained_codebook(*case))
