"""The column scale: one factor per input column that evens out rows and columns of a weight."""

import math

import torch
from torch import Tensor

from offline_quantize.method.arithmetic import power_of_two

# Mean squares below which a row or column counts as zeros, and gets the factor 1: its inverse
# would leave float32, or outweigh all others.
LEAST_ROW = 2.0**-100  # of a weight whose largest magnitude is about 1
LEAST_COLUMN = 2.0**-40  # of a weight whose rows have mean square 1; factors end at 2**-10 anyway
INPUT_EXPONENT = 1 / 8  # of E[x²], docs/method.md; the column spread keeps the rest
LEAST_INPUT = 2.0**-20  # of the mean of E[x²]: inputs below it, dead ones among them, count as this
SMALL = 2.0**-16  # what row scales in float16 hold to 9 bits; below that they lose precision


def column_scale(weight: Tensor, iterations: int, mean_square: Tensor | None = None) -> Tensor:
    """Column factors t by Sinkhorn normalisation, so that W / t has columns of even spread.

    Rows and columns are divided by their root mean square in turn; only the column factors are
    kept, the row factors being what group scales are for. A column's spread also tells how large
    its inputs are, so quantizing W / t spends precision where activations are large
    (SINQ, arXiv 2509.22944).

    Where the size of the inputs is known, the factor is t^(1 - 2a) · E[x²]^(-a) with
    a = INPUT_EXPONENT. If the codes' error is the same in all columns of W / s, the error of x·Wᵀ
    is (Σ c s²) (Σ E[x²] / s²), where c is the columns' energy. It is least at s = (c / E[x²])^¼,
    which is a = ¼ (turbopress 0.5.2 found these exponents). A smaller a does as well or better
    (docs/method.md).

    weight:  [N, K], any float type, finite.
    mean_square: E[x²] of each input, float32 [K]; None if unknown.
    returns: float32 [1, K] on the float16 grid, above zero, geometric mean 1; columns of zeros get
             1. For a weight too small for row scales in float16 they are a power of two smaller:
             column and row scales then share the exponent evenly.
    """
    rows, columns = weight.shape
    peak = torch.maximum(weight.amax(0), -weight.amin(0)).float()  # of each column
    unit = power_of_two(float(peak.max()))
    device = weight.device
    row, column = (
        torch.ones(n, dtype=torch.float32, device=device) for n in (rows, columns)
    )  # 1 / factor²
    for _ in range(iterations):
        spread = torch.zeros(columns, dtype=torch.float32, device=device)
        for start in range(0, rows, 256):
            block = (weight[start : start + 256].float() * unit).square()
            part = slice(start, start + 256)
            row[part] = _inverse(block @ column / columns, LEAST_ROW)
            spread += row[part] @ block
        column = _inverse(spread / rows, LEAST_COLUMN)
    factor = column.rsqrt()
    if mean_square is not None:
        size = input_sizes(mean_square.to(device))
        factor = factor ** (1 - 2 * INPUT_EXPONENT) * size ** (-INPUT_EXPONENT)
    factor /= factor.log().mean().exp()
    factor = factor.clamp(2**-10, 2**10)
    largest = float((peak / factor).max())
    if 0 < largest < SMALL:
        factor *= 2.0 ** (math.frexp(largest)[1] // 2)
    return factor.half().clamp_min(2.0**-24).float().unsqueeze(0)


def input_sizes(mean_square: Tensor) -> Tensor:
    """E[x²] of inputs [K], those far below the mean raised to a bound above zero."""
    least = max(LEAST_INPUT * float(mean_square.mean()), torch.finfo(torch.float32).tiny)
    return mean_square.clamp_min(least)


def _inverse(mean_square: Tensor, least: float) -> Tensor:
    """1 / x, and 1 where x is below `least`."""
    return torch.where(mean_square >= least, 1 / mean_square, 1)
