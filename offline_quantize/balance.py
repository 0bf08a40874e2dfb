"""The column scale: one factor per input column that evens out rows and columns of a weight."""

import torch
from torch import Tensor


def column_scale(weight: Tensor, iterations: int) -> Tensor:
    """Column factors t by Sinkhorn normalisation, so that W / t has columns of even spread.

    Rows and columns are divided by their root mean square in turn; only the column factors are
    kept, the row factors being what group scales are for. A column's spread also tells how large
    its inputs are, so quantizing W / t spends precision where activations are large
    (SINQ, arXiv 2509.22944).

    weight:  [N, K], any float type.
    returns: float32 [1, K] on the float16 grid, geometric mean 1; columns of zeros get 1.
    """
    rows, columns = weight.shape
    row, column = torch.ones(rows), torch.ones(columns)  # inverse squared factors
    for _ in range(iterations):
        mean_square = torch.zeros(columns)
        for start in range(0, rows, 256):
            block = weight[start : start + 256].float().square()
            part = slice(start, start + 256)
            row[part] = _inverse(block @ column / columns)
            mean_square += row[part] @ block
        column = _inverse(mean_square / rows)
    factor = column.rsqrt()
    factor /= factor.log().mean().exp()
    return factor.clamp(2**-10, 2**10).half().float().unsqueeze(0)


def _inverse(mean_square: Tensor) -> Tensor:
    """1 / x, and 1 where x is zero."""
    return torch.where(mean_square > 0, 1 / mean_square, 1)
