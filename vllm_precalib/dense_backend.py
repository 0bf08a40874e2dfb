"""Backend `dense`: unpacked at load, then vLLM's own unquantized product."""

from collections.abc import Mapping

import torch
from torch import Tensor

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.reference import unpacked_weight
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class DenseBackend(Backend):
    """Unpacks once, then is an ordinary linear layer of vLLM: as fast, and as large."""

    name = "dense"
    experts = True

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        # that of embeddings leaves the weight in a form to look rows up in
        self.unquantized = (
            UnquantizedEmbeddingMethod() if spec.embedding else UnquantizedLinearMethod()
        )

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The weight [N, K] in the type of the activations."""
        return {"weight": unpacked_weight(tensors, self.spec, where)}

    def finish(self, layer: torch.nn.Module) -> None:
        """Let vLLM lay the weight out for this machine."""
        self.unquantized.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """vLLM's own product."""
        return self.unquantized.apply(layer, x, bias)

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It can."""
        del spec
        return None

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """Rows of the weight."""
        return torch.nn.functional.embedding(ids, layer.get_parameter("weight"))
