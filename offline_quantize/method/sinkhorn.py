"""The column scale: one factor per input column that evens out rows and columns of a weight."""

import math

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import power_of_two

# Mean squares below which a row or column counts as zeros, and gets the factor 1: its inverse
# would leave float32, or outweigh all others.
LEAST_ROW = 2.0**-100  # of a weight whose largest magnitude is about 1
LEAST_COLUMN = 2.0**-40  # of a weight whose rows have mean square 1; factors end at 2**-10 anyway
SMALL = 2.0**-16  # what row scales in float16 hold to 9 bits; below that they lose precision


def column_scale(weight: Tensor, iterations: int) -> Tensor:
    """Column factors t by Sinkhorn normalisation, so that W / t has columns of even spread.

    Rows and columns are divided by their root mean square in turn; only the column factors are
    kept, the row factors being what group scales are for. A column's spread also tells how large
    its inputs are, so quantizing W / t spends precision where activations are large
    (SINQ, arXiv 2509.22944).

    weight:  [N, K], any float type, finite.
    returns: float32 [1, K] on the float16 grid, above zero, geometric mean 1; columns of zeros get
             1. For a weight too small for row scales in float16 they are a power of two smaller:
             column and row scales then share the exponent evenly.
    """
    rows, columns = weight.shape
    peak = torch.maximum(weight.amax(0), -weight.amin(0)).float()  # of each column
    unit = power_of_two(float(peak.max()))
    device = weight.device
    row, column = (torch.ones(n, device=device) for n in (rows, columns))  # 1 / factor²
    for _ in range(iterations):
        mean_square = torch.zeros(columns, device=device)
        for start in range(0, rows, 256):
            block = (weight[start : start + 256].float() * unit).square()
            part = slice(start, start + 256)
            row[part] = _inverse(block @ column / columns, LEAST_ROW)
            mean_square += row[part] @ block
        column = _inverse(mean_square / rows, LEAST_COLUMN)
    factor = column.rsqrt()
    factor /= factor.log().mean().exp()
    factor = factor.clamp(2**-10, 2**10)
    largest = float((peak / factor).max())
    if 0 < largest < SMALL:
        factor *= 2.0 ** (math.frexp(largest)[1] // 2)
    return factor.half().clamp_min(2.0**-24).float().unsqueeze(0)


def _inverse(mean_square: Tensor, least: float) -> Tensor:
    """1 / x, and 1 where x is below `least`."""
    return torch.where(mean_square >= least, 1 / mean_square, 1)
