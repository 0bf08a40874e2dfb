"""Other data-free methods, each as a function: weight [N, K] -> (dequantized weight, stored bits).

Only what a file would have to hold is counted; where a method's usual storage is wider than needed
(zero points in 16 bits, scales in 32) the smaller one is counted, in the method's favour.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offline_quantize.method.sinkhorn import column_scale

Peer = Callable[[Tensor], tuple[Tensor, int]]
FLOAT16 = 16


def rtn(weight: Tensor, bits: int, group_size: int, balance: bool = False) -> tuple[Tensor, int]:
    """Round to nearest on a min-max grid; balance: on W / column scale (Sinkhorn, as in SINQ).

    Stored: codes, per group a float16 scale and a zero point of `bits` bits, column scale float16.
    """
    rows, columns = weight.shape
    scale = column_scale(weight, 16) if balance else torch.ones(1, columns)
    grouped = to_groups(weight / scale, group_size)
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    limit = 2**bits - 1
    step = ((high - low) / limit).clamp(min=2**-24).half().float()
    zero = (-low / step).round().clamp(0, limit)
    values = ((grouped / step + zero).round().clamp(0, limit) - zero) * step
    stored = rows * columns * bits + grouped.shape[:2].numel() * (FLOAT16 + bits)
    return values.flatten(1)[:, :columns] * scale, stored + FLOAT16 * columns * balance


def hqq(weight: Tensor, bits: int, group_size: int = 64) -> tuple[Tensor, int]:
    """Half-quadratic quantization (Badri & Shaji 2023), as the package hqq 0.2.8 does it:
    p = 0.7, beta = 10, at most 20 steps while the error falls; at 4 bits from rounded zero points.

    Stored: codes, per group a scale and a zero point in float16, as hqq does.
    """
    columns = weight.shape[1]
    grouped = to_groups(weight, group_size)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    limit = 2**bits - 1
    scale = (limit / (high - low).clamp(min=1e-10)).clamp(max=2e4)
    zero = (-low * scale).round() if bits == 4 else -low * scale
    best = math.inf
    for _ in range(20):
        codes = (grouped * scale + zero).round().clamp(0, limit)
        error = grouped - (codes - zero) / scale
        size = error.abs()
        mean = float(size.mean())
        shrunk = error.sign() * (size - size.pow(-0.3) / 10).clamp(min=0)
        zero = (codes - (grouped - shrunk) * scale).mean(-1, keepdim=True)
        if mean >= best:
            break
        best = mean
    step, zero = (1 / scale).half().float(), zero.half().float()
    codes = (grouped * scale + zero).round().clamp(0, limit)
    stored = weight.numel() * bits + grouped.shape[:2].numel() * 2 * FLOAT16
    return ((codes - zero) * step).flatten(1)[:, :columns], stored


def nf4(weight: Tensor, group_size: int = 64) -> tuple[Tensor, int]:
    """4-bit NormalFloat (Dettmers et al. 2023, QLoRA), scaled by each group's largest magnitude.

    Stored: codes and a float16 scale per group (bitsandbytes has float32, or 8 bits and a second
    level with its double quantization).
    """
    columns = weight.shape[1]
    grouped = to_groups(weight, group_size)
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=2**-24).half().float()
    levels = normal_float_levels()
    codes = torch.bucketize(grouped / scale, (levels[1:] + levels[:-1]) / 2)
    stored = weight.numel() * 4 + grouped.shape[:2].numel() * FLOAT16
    return (levels[codes] * scale).flatten(1)[:, :columns], stored


@functools.cache
def normal_float_levels() -> Tensor:
    """The 16 levels of NF4, float32 [16], ascending from -1 to 1 with an exact zero.

    Quantiles of the normal distribution, evenly spaced in probability on each side of zero: 8
    above and 7 below, out to the probability that is the mean of 1 - 1/30 and 1 - 1/32.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.linspace(0.5, outermost, 9, dtype=torch.float64)[1:]
    below = 1 - torch.linspace(0.5, outermost, 8, dtype=torch.float64)[1:].flip(0)
    quantiles: Tensor = torch.special.ndtri(torch.cat((below, torch.tensor([0.5]).double(), above)))
    return (quantiles / quantiles.max()).float()


def sinq(weight: Tensor, bits: int, group_size: int = 64) -> tuple[Tensor, int]:
    """SINQ (Müller et al. 2025) by the authors' own package `sinq`, tiled along the inputs.

    Stored: codes, per group a float16 scale and a zero point (`bits` bits, 8 if one does not fit),
    a float16 column scale.
    """
    from sinq.dual_shift import tiled_quant_rectangle

    rows, columns = weight.shape
    limit = 2**bits - 1
    codes, scale, column, zero = tiled_quant_rectangle(
        weight, [0, limit], group_size, method="sinq"
    )
    values = (codes - zero) * scale.half().float()
    fits = bool((zero == zero.round()).all() and (zero >= 0).all() and (zero <= limit).all())
    stored = rows * columns * bits + len(codes) * (FLOAT16 + (bits if fits else 8))
    return values.view(rows, columns) * column.half().float(), stored + FLOAT16 * columns


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] to [N, G, group_size], the last group filled up with zeros."""
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -columns % group_size))
    return padded.view(weight.shape[0], -1, group_size)


def peers() -> Mapping[tuple[str, str], Peer]:
    """All peers that can run here, by method and variant."""
    found: dict[tuple[str, str], Peer] = {}
    for method, balance in (("RTN", False), ("RTN + column scale", True)):
        for bits in (3, 4, 5):
            for group_size in (128, 64):
                found[method, f"{bits} bits, g {group_size}"] = functools.partial(
                    rtn, bits=bits, group_size=group_size, balance=balance
                )
    for bits in (3, 4):
        found["HQQ", f"{bits} bits, g 64"] = functools.partial(hqq, bits=bits)
    found["NF4", "g 64"] = nf4
    if importlib.util.find_spec("sinq"):
        for bits in (3, 4):
            found["SINQ", f"{bits} bits, g 64"] = functools.partial(sinq, bits=bits)
    return found
