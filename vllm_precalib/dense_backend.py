"""Backend `dense`: unpacked at load, then vLLM's own unquantized product."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.reference import unpacked_weight
from precalib_kernels.processor import has_bfloat16
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class DenseBackend(Backend):
    """Unpacks once, then is an ordinary linear layer of vLLM: as fast, and as large.

    On a processor that only emulates 16-bit arithmetic, several times slower than float32, weights
    and products of linear layers are float32.
    """

    name = "dense"
    experts = True

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        # that of embeddings leaves the weight in a form to look rows up in
        self.unquantized = (
            UnquantizedEmbeddingMethod() if spec.embedding else UnquantizedLinearMethod()
        )
        self.in_float32 = _in_float32(spec)

    @classmethod
    def expectation(cls, spec: LinearSpec) -> str | None:
        """What float32 products cost in memory."""
        if not _in_float32(spec):
            return None
        kind = str(spec.dtype).removeprefix("torch.")
        return (
            f"this processor has no {kind} arithmetic, so products are in float32 and weights "
            "take 4 bytes each"
        )

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The weight [N, K] in the type of the activations, or float32."""
        dtype = torch.float32 if self.in_float32 else self.spec.dtype
        spec = dataclasses.replace(self.spec, dtype=dtype)
        return {"weight": unpacked_weight(tensors, spec, where)}

    def finish(self, layer: torch.nn.Module) -> None:
        """Let vLLM lay the weight out for this machine."""
        if not self.in_float32:
            self.unquantized.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """vLLM's own product, or torch's in float32."""
        if not self.in_float32:
            return self.unquantized.apply(layer, x, bias)
        shift = None if bias is None else bias.float()
        weight: Any = layer.weight  # get_parameter takes as long as a small product
        return torch.nn.functional.linear(x.float(), weight, shift).to(x.dtype)

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It can."""
        del spec
        return None

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """Rows of the weight."""
        return torch.nn.functional.embedding(ids, layer.get_parameter("weight"))


def _in_float32(spec: LinearSpec) -> bool:
    """Whether a linear layer is; embeddings and experts have products of vLLM's that are not."""
    plain = not spec.experts and not spec.embedding
    emulated = spec.device == "cpu" and spec.dtype != torch.float32 and not has_bfloat16()
    return plain and emulated
