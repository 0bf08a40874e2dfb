"""How an error in one column of a weight is made good in later columns: a factor of the Hessian."""

import dataclasses

import torch
from torch import Tensor

DAMPING = 1.0  # of the mean diagonal: what a Hessian of a few thousand tokens wants
LEAST_DAMPING = 1e-6  # added where a factorization fails, then doubled until it does not
ROWS = 256  # of the factor that are converted at once


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
    scale = None if column_scale is None else column_scale.double().view(-1)
    added = damping
    step = max(damping, LEAST_DAMPING)
    while True:
        matrix = _reversed(hessian, scale)
        mean = float(matrix.diagonal().mean())
        if not mean > 0:
            return _factored(matrix.zero_().fill_diagonal_(1))
        matrix.div_(mean).diagonal().add_(added)
        if _factorize(matrix):
            return _factored(matrix.mT)
        added += step
        step *= 2


def feedback_bytes(columns: int) -> int:
    """Memory that a weight of K columns takes at its peak: its Hessian, and making the factor.

    The Hessian and `effects` are float32, and the matrix that is factorized in between is float64.
    """
    return 16 * columns**2


def _reversed(hessian: Tensor, scale: Tensor | None) -> Tensor:
    """diag(s)·H·diag(s) in float64, rows and columns from the last to the first."""
    matrix = hessian.flip(0, 1).double()
    if scale is not None:
        reverse = scale.flip(0)
        matrix.mul_(reverse[:, None]).mul_(reverse)
    return matrix


def _factorize(matrix: Tensor) -> bool:
    """Put the transpose of a symmetric matrix's Cholesky factor in its place, if it has one."""
    lower = matrix.mT  # LAPACK's own order of elements, so nothing is copied
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return not int(info)


def _factored(lower: Tensor) -> FeedbackFactor:
    """The factor, from that of the reversed matrix: column by column from the last."""
    diagonal = lower.diagonal().flip(0)
    count = len(diagonal)
    effects = torch.empty(count, count, device=lower.device)
    for first in range(0, count, ROWS):  # in pieces, as memory is what large weights lack
        part = lower[max(0, count - first - ROWS) : count - first].flip(0, 1)
        effects[first : first + ROWS] = part / diagonal
    importance = diagonal.square()
    return FeedbackFactor(effects, (importance / importance.mean()).float())
