"""The sum over a token's experts: rows are sorted by expert, and only experts with rows compute."""

from collections.abc import Callable

import torch
from torch import Tensor

NOWHERE = -1  # in place of the number of an expert that another rank holds


def mixture(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    count: int,
    compute: Callable[[int, Tensor], Tensor],
    weight_inputs: bool = False,
) -> Tensor:
    """Σ_j weights[t, j] · f_e(x[t]) with e = experts[t, j], summed in float32.

    x:       [tokens, K], which is also the shape and type of the result.
    weights: [tokens, chosen], of any float type.
    experts: [tokens, chosen] whole numbers below `count`, or NOWHERE. One may appear twice in a
             row, and then counts twice.
    compute: f of an expert: its number and inputs [any, K] to outputs [any, K]. It is called for
             experts that have rows, in their order.
    weight_inputs: f_e(weights · x) instead, for models that weigh inputs.
    """
    flat = experts.flatten().long()
    order = flat.argsort(stable=True)
    rows = torch.bincount(flat - NOWHERE, minlength=count + 1).tolist()
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    factors = weights.flatten().float()[:, None]
    start = rows[0]
    for expert, number in enumerate(rows[1:]):
        if number:
            slots = order[start : start + number]
            tokens = slots // experts.shape[1]
            inputs = x[tokens]
            if weight_inputs:
                result.index_add_(0, tokens, compute(expert, inputs * factors[slots].to(x)).float())
            else:
                result.index_add_(0, tokens, compute(expert, inputs).float() * factors[slots])
        start += number
    return result.to(x.dtype)
