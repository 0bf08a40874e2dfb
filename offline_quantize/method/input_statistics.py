"""What is known of the inputs of a linear layer, from text that went through the model."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs x [K] of one linear layer y = x·Wᵀ.

    mean_square: E[x²], float32 [K], not negative.
    hessian:     E[x·xᵀ], or another matrix H for which E·H·Eᵀ is the loss of an error E in one row;
                 float32 [K, K], symmetric and positive semidefinite. None if unknown: codes then
                 do not take up each other's errors.
    """

    mean_square: Tensor
    hessian: Tensor | None = None
