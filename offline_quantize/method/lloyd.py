"""Codebooks for the trellis: Lloyd's iteration on a normal whose largest weights are salient.

`precalib_kernels/format/codebooks.py` holds its results as plain numbers;
`python -m offline_quantize.method.lloyd` prints them again. The normal stands for weights whose
column scale has been taken off, and is no model's own: nothing is tuned to data.
"""

import torch
from torch import Tensor

from offline_quantize.method.trellis import FREE, search
from precalib_kernels.format.layout import Layout

GROUPS = 2048
ITERATIONS = 120
CPU = torch.device("cpu")


def trained_codebook(bits: int, group_size: int, salient_count: int) -> tuple[int, ...]:
    """The 2**(bits+1) int8 entries of least squared error in the trellis, symmetric and odd.

    Samples are groups of a normal, without their `salient_count` largest members, divided by the
    largest that is left, as `encode` sees them. Odd entries are 2β − 127 with the β of −entry being
    the bitwise complement of β: kernels negate four packed entries by one exclusive or.
    """
    generator = torch.Generator(CPU).manual_seed(0)
    normal = torch.randn((GROUPS, group_size), generator=generator, device=CPU)
    order = normal.abs().sort(-1, descending=True)
    non_salient = torch.ones_like(normal).scatter_(1, order.indices[:, :salient_count], 0)
    samples = normal / order.values[:, salient_count, None]
    coins = torch.randint(0, 2, normal.shape, generator=generator, device=CPU)
    low_bits = torch.where(non_salient > 0, FREE, coins).to(torch.uint8)
    unit = torch.full((1, GROUPS), 127.0, device=CPU)
    codebook = _start(2 ** (bits + 1))
    for _ in range(ITERATIONS):
        chosen = search(samples, unit, low_bits, _layout(bits, group_size, codebook)).entries
        mean = _centroids(codebook.round(), chosen, 127 * samples, non_salient)
        step = 2 * (mean - codebook)  # shorter steps get stuck on the whole numbers
        codebook = (codebook + step).clamp(-127, 127)
    return tuple(int(entry) for entry in 2 * ((codebook - 1) / 2).round() + 1)


def _start(count: int) -> Tensor:
    """Middle quantiles of a normal, stretched to the whole range: a little denser in the middle."""
    quantile = 0.1 + 0.8 * (torch.arange(count, device=CPU) + 0.5) / count
    codebook: Tensor = torch.special.ndtri(quantile)
    return 120 * codebook / codebook.max()


def _layout(bits: int, group_size: int, codebook: Tensor) -> Layout:
    whole = tuple(int(entry) for entry in codebook.round())
    return Layout(bits=bits, group_size=group_size, codebook=whole, trellis=True)


def _centroids(codebook: Tensor, chosen: Tensor, samples: Tensor, non_salient: Tensor) -> Tensor:
    """Means of the samples that chose each entry, made symmetric."""
    index = torch.searchsorted(codebook, chosen.flatten())
    weight = non_salient.flatten().double()
    count = torch.zeros(len(codebook), dtype=torch.float64, device=CPU)
    count.index_add_(0, index, weight)
    total = torch.zeros_like(count).index_add_(0, index, samples.flatten().double() * weight)
    mean = torch.where(count > 0, total / count.clamp_min(1), codebook.double())
    return ((mean - mean.flip(0)) / 2).float()


if __name__ == "__main__":
    for case in ((5, 128, 2), (4, 128, 2), (3, 128, 4), (2, 128, 4)):
        print(case, trained_codebook(*case))
