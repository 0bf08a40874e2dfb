"""How an error in one column of a weight is made good in later columns: a factor of the Hessian."""

import dataclasses

import torch
from torch import Tensor

DAMPING = 1.0  # of the mean diagonal: what a Hessian of a few thousand tokens wants
LEAST_DAMPING = 1e-6  # added where a factorization fails, then doubled until it does not


@dataclasses.dataclass(frozen=True)
class FeedbackFactor:
    """H = V·Vᵀ with V upper triangular, taken apart into V = effects · sqrt(importance).

    With errors δ of a row, the loss δ·H·δᵀ is Σₖ importance[k] · (δ[k] + Σⱼ δ[j] · effects[j, k])²,
    j before k. So the errors before column k move its target by Σⱼ δ[j] · effects[j, k], and what
    remains there counts with importance[k]. GPTQ's U with Uᵀ·U = H⁻¹ is V⁻¹: its errors
    (target − value) / U[k, k] are V[k, k] · (target − value), and both recursions are one.

    effects:    float32 [K, K], unit upper triangular; below the diagonal are zeros.
    importance: float32 [K], above zero, mean 1.
    """

    effects: Tensor
    importance: Tensor


def feedback_factor(
    hessian: Tensor, column_scale: Tensor | None = None, damping: float = DAMPING
) -> FeedbackFactor:
    """Factor of diag(s)·H·diag(s) + damping · its mean diagonal · I, for codes of W / s.

    A matrix that still has no such factor, by rounding or because it is not positive, gets more
    damping until there is one. Zeros give the identity: codes are then found without feedback.

    hessian: [K, K], finite, symmetric;  column_scale: s, [1, K], or None for 1.
    """
    matrix = hessian.double()
    if column_scale is not None:
        scale = column_scale.double().view(-1)
        matrix = matrix * scale[:, None] * scale
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return _factored(torch.eye(len(matrix), dtype=torch.float64, device=matrix.device))
    # Column by column from the last: the Cholesky factor of the reversed matrix, reversed.
    matrix = (matrix / mean).flip(0, 1)
    matrix.diagonal().add_(damping)
    step = max(damping, LEAST_DAMPING)
    while True:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return _factored(lower.flip(0, 1))
        matrix.diagonal().add_(step)
        step *= 2


def _factored(upper: Tensor) -> FeedbackFactor:
    diagonal = upper.diagonal()
    importance = diagonal.square()
    return FeedbackFactor(
        (upper / diagonal).float().contiguous(), (importance / importance.mean()).float()
    )
