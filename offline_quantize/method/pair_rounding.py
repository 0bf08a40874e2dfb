"""Alternating rounding of a value–output pair: each of the two makes up for the other's error.

What matters of W_v and W_o is their product, per query head. So W_v is quantized, W_o is quantized
as the matrix that comes closest to the product with that Ŵ_v, then W_v as the one that comes
closest with that Ŵ_o, and so on (CafeQ, arXiv 2511.19705, Algorithm 1). The closest matrices are
least-squares solutions by pseudo-inverse. Shapes are those of `value_output.py`.
"""

import dataclasses

import torch
from torch import Tensor

from offline_quantize.method.encode import Encoded, encode_unchecked
from offline_quantize.method.recipes import Recipe
from offline_quantize.method.value_output import from_output_heads, output_heads, value_heads
from precalib_kernels.format.reference import dequantize

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class RoundedPair:
    """A quantized pair.

    value, output:     packed, with statistics against what they were rounded from.
    errors:            of the product, relative and squared: of both rounded on their own, and after
                       each half of each round. The pair kept is that of the least.
    """

    value: Encoded
    output: Encoded
    errors: tuple[float, ...]


def round_pair(
    value: Tensor,
    output: Tensor,
    heads: int,
    value_recipe: Recipe,
    output_recipe: Recipe,
    inputs: Tensor | None = None,
    rounds: int = ROUNDS,
    damping: float = 0.0,
) -> RoundedPair:
    """Quantize W_v [G·d, K] and W_o [N, G·q·d] of `heads` = G KV heads to keep their product.

    inputs:  mean square [K] of each input of W_v, or E[x·xᵀ] [K, K]; None if they are alike.
    damping: pulls the least-squares targets towards the original weights, in mean squares of what
             they are solved from; 0 for the plain pseudo-inverse.

    Raises what `encode` raises for weights that are not finite or too large.
    """
    value, output = value.float(), output.float()
    first = encode_unchecked(value, value_recipe, "W_v")
    second = encode_unchecked(output, output_recipe, "W_o")
    rounded_value, rounded_output = unpacked(first, value), unpacked(second, output)

    def error() -> float:
        return product_error((value, output), (rounded_value, rounded_output), heads, inputs)

    errors = [error()]
    best = first, second
    for half in range(2 * rounds):
        if half % 2 == 0:
            target = output_target(value, output, rounded_value, heads, inputs, damping)
            second = encode_unchecked(target, output_recipe, "W_o")
            rounded_output = unpacked(second, output)
        else:
            target = value_target(value, output, rounded_output, heads, damping)
            first = encode_unchecked(target, value_recipe, "W_v")
            rounded_value = unpacked(first, value)
        errors.append(error())
        if errors[-1] == min(errors):
            best = first, second
    return RoundedPair(*best, tuple(errors))


def output_target(
    value: Tensor,
    output: Tensor,
    rounded_value: Tensor,
    heads: int,
    inputs: Tensor | None = None,
    damping: float = 0.0,
) -> Tensor:
    """The W [N, G·q·d], float32, for which W·Ŵ_v comes closest to W_o·W_v in each query head."""
    original = value_heads(value.double(), heads)
    rounded = value_heads(rounded_value.double(), heads)
    weighted = _weighted(rounded, inputs).mT  # [G, K, d]
    gram, cross = _damped(rounded @ weighted, original @ weighted, damping)
    parts = output_heads(output.double(), heads, original.shape[1])
    fitted = parts @ (cross @ torch.linalg.pinv(gram, hermitian=True))
    return from_output_heads(fitted, len(output)).float()


def value_target(
    value: Tensor, output: Tensor, rounded_output: Tensor, heads: int, damping: float = 0.0
) -> Tensor:
    """The W [G·d, K], float32, for which Ŵ_o·W comes closest to W_o·W_v, all query heads counted.

    It is the same for all inputs, as each input column has a problem of its own.
    """
    parts = value_heads(value.double(), heads)
    size = parts.shape[1]
    original = output_heads(output.double(), heads, size)
    rounded = output_heads(rounded_output.double(), heads, size)
    gram, cross = _damped(rounded.mT @ rounded, rounded.mT @ original, damping)
    fitted: Tensor = torch.linalg.pinv(gram, hermitian=True) @ cross @ parts
    return fitted.flatten(0, 1).float()


def product_error(
    pair: tuple[Tensor, Tensor],
    rounded: tuple[Tensor, Tensor],
    heads: int,
    inputs: Tensor | None = None,
) -> float:
    """‖W_o·W_v − Ŵ_o·Ŵ_v‖² / ‖W_o·W_v‖², summed over query heads; `inputs` as in `round_pair`.

    From matrices of a head's size; the products [N, K] are never formed.
    """

    def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        values = [value_heads(value.double(), heads) for value, _ in (one, other)]
        size = values[0].shape[1]
        outputs = [output_heads(output.double(), heads, size) for _, output in (one, other)]
        across = values[0] @ _weighted(values[1], inputs).mT  # [G, d, d]
        return float((outputs[0].mT @ outputs[1] * across).sum())

    signal = inner(pair, pair)
    noise = signal - 2 * inner(pair, rounded) + inner(rounded, rounded)
    return noise / signal if signal else 0.0


def unpacked(encoded: Encoded, like: Tensor) -> Tensor:
    """What packed tensors stand for, in the shape of `like`."""
    return dequantize(encoded.tensors, encoded.layout, like.shape[1])


def _weighted(value: Tensor, inputs: Tensor | None) -> Tensor:
    """W_v·E[x·xᵀ] of [G, d, K]."""
    if inputs is None:
        return value
    inputs = inputs.double()
    weighted: Tensor = value * inputs if inputs.dim() == 1 else value @ inputs
    return weighted


def _damped(gram: Tensor, cross: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Both sides of normal equations [G, d, d] with the same multiple of the identity added."""
    if not damping:
        return gram, cross
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = damping * torch.diag_embed(mean[:, None].expand(gram.shape[:2]))
    return gram + ridge, cross + ridge
