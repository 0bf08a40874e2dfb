"""The value–output transform: a matrix per KV head between W_v and W_o that cancels out.

Attention mixes rows of values and hands them to the output projection with nothing but a weighted
sum between. So M·W_v and W_o·M⁻¹ compute what W_v and W_o do, for any invertible M of each KV head,
and may lose less when they are quantized (CafeQ, arXiv 2511.19705: paired matrices). All query
heads that read a KV head share its M.

W_v is [G·d, K] and W_o is [N, G·q·d], for G KV heads of size d with q query heads each; the query
heads of a KV head are neighbours. `matrices` is [G, d, d].
"""

import torch
from torch import Tensor


def transform_value(weight: Tensor, matrices: Tensor) -> Tensor:
    """M·W_v of every KV head, computed in float64.

    weight:  W_v [G·d, K], any float type.
    returns: float32 [G·d, K].
    """
    parts = value_heads(weight.double(), len(matrices))
    return (matrices.double() @ parts).flatten(0, 1).float()


def transform_bias(bias: Tensor, matrices: Tensor) -> Tensor:
    """M·b_v of every KV head, in the type of the bias [G·d]."""
    return transform_value(bias[:, None], matrices)[:, 0].to(bias.dtype)


def transform_output(weight: Tensor, matrices: Tensor) -> Tensor:
    """W_o·M⁻¹ of every query head, computed in float64.

    weight:  W_o [N, G·q·d], any float type.
    returns: float32 [N, G·q·d].
    """
    heads, size = matrices.shape[:2]
    parts = output_heads(weight.double(), heads, size)
    return from_output_heads(parts @ torch.linalg.inv(matrices.double()), len(weight)).float()


def value_heads(value: Tensor, heads: int) -> Tensor:
    """W_v [G·d, K] as [G, d, K]."""
    return value.reshape(heads, -1, value.shape[1])


def output_heads(output: Tensor, heads: int, size: int) -> Tensor:
    """W_o [N, G·q·d] as [G, N·q, d]: below each other, what reads a KV head."""
    return output.view(len(output), heads, -1, size).permute(1, 0, 2, 3).flatten(1, 2)


def from_output_heads(parts: Tensor, rows: int) -> Tensor:
    """Inverse of `output_heads`; rows: N."""
    heads, size = len(parts), parts.shape[2]
    return parts.reshape(heads, rows, -1, size).permute(1, 0, 2, 3).flatten(1)
