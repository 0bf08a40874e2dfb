"""An output head that a model shares with its packed embeddings."""

from typing import Any

import torch
from torch import Tensor

from precalib_kernels.errors import ServingError
from vllm_precalib.compat import vllm_names
from vllm_precalib.linear_method import PrecalibLinearMethod

with vllm_names():
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class TiedHeadMethod(QuantizeMethodBase):
    """An output head without tensors of its own: vLLM ties it to the packed embeddings.

    prefix:     the head's name in vLLM.
    embeddings: name of the embeddings that it uses.
    """

    def __init__(self, prefix: str, embeddings: str) -> None:
        self.prefix = prefix
        self.embeddings = embeddings

    def create_weights(self, layer: torch.nn.Module, *_: Any, **__: Any) -> None:
        """Nothing is stored for it."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The embeddings, which stand for the head from then on.

        Raises ServingError for a head with a bias and for embeddings that are not packed.
        """
        packed = isinstance(getattr(embed_tokens, "quant_method", None), PrecalibLinearMethod)
        if not packed or getattr(layer, "bias", None) is not None:
            raise self._error()
        return embed_tokens

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:  # noqa: ARG002
        """Refuse, with ServingError: a tied head is no layer of the model."""
        raise self._error()

    def apply(self, *_: Any, **__: Any) -> Tensor:
        """Refuse, as `process_weights_after_loading`."""
        raise self._error()

    def _error(self) -> ServingError:
        return ServingError(
            f"{self.prefix} uses the packed tensors of {self.embeddings}, but vLLM does not tie "
            "the two in this model; quantize the model again without --embeddings"
        )
