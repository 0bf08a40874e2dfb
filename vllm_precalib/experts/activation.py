"""The function between the two matrices of an expert, in plain torch."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from precalib_kernels.errors import ServingError
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

Activation = Callable[[Tensor], Tensor]
OAI_ALPHA, OAI_LIMIT = 1.702, 7.0  # of gpt-oss; vLLM's own kernels have no others


def activation_of(layer: RoutedExperts, prefix: str) -> Activation:
    """What `layer` computes from the outputs of its first matrix: [any, 2·I] to [any, I].

    Without a gate it is [any, I] to [any, I]. Raises ServingError for one that is not known.
    """
    kind, limit = layer.activation, layer.swiglu_limit
    tanh = functools.partial(gelu, approximate="tanh")
    gated: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
        MoEActivation.SILU: silu,
        MoEActivation.GELU: gelu,
        MoEActivation.GELU_TANH: tanh,
    }
    plain: dict[MoEActivation, Activation] = {
        MoEActivation.SILU_NO_MUL: silu,
        MoEActivation.GELU_NO_MUL: gelu,
        MoEActivation.GELU_TANH_NO_MUL: tanh,
        MoEActivation.RELU2_NO_MUL: lambda x: relu(x).square(),
    }
    if kind in plain:
        return plain[kind]
    if kind is MoEActivation.SWIGLUOAI:
        return lambda x: _clamped(x[..., ::2], x[..., 1::2], OAI_LIMIT, OAI_ALPHA, 1.0)
    clamps = {
        MoEActivation.SILU: (1.0, 0.0),
        MoEActivation.SWIGLUOAI_UNINTERLEAVE: (
            1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha,
            0.0 if layer.swiglu_beta is None else layer.swiglu_beta,
        ),
    }
    if kind in clamps and limit is not None:
        return lambda x: _clamped(*_halves(x), limit, *clamps[kind])
    if kind not in gated:
        raise ServingError(
            f"{prefix}: precalib cannot compute experts with the activation '{kind.value}'; "
            r"quantize the model again with --keep '\.experts\.'"
        )
    act = gated[kind]

    def multiplied(x: Tensor) -> Tensor:
        gate, up = _halves(x)
        return act(gate) * up

    return multiplied


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up."""
    gate, up = x.chunk(2, -1)
    return gate, up


def _clamped(gate: Tensor, up: Tensor, limit: float, alpha: float, beta: float) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + beta) of values that are clamped first."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta)
