"""The linear layers of a precalib checkpoint: packed ones and unquantized ones."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.reference import unpacked_weight
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import ServingError
from vllm_precalib.backends import Options, choose, plugin_registry
from vllm_precalib.column_slice import ColumnSlice
from vllm_precalib.compat import vllm_names
from vllm_precalib.load_guard import WeightLoadGuard
from vllm_precalib.packed_module import PackedModule
from vllm_precalib.parameters import packed_parameter
from vllm_precalib.row_order import rotary_heads

with vllm_names():
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
    from vllm.model_executor.model_loader import get_model_architecture
    from vllm.platforms import current_platform


def layer_kind(
    layer: torch.nn.Module,
) -> Literal["experts", "linear", "head", "embedding"] | None:
    """What vLLM's `layer` is to a quantization method; None if nothing."""
    if isinstance(layer, RoutedExperts):
        return "experts"
    if isinstance(layer, LinearBase):
        return "linear"
    if isinstance(layer, ParallelLMHead):  # a kind of embedding to vLLM
        return "head"
    return "embedding" if isinstance(layer, VocabParallelEmbedding) else None


@register_weight_loader_v2_supported_method
class PrecalibLinearMethod(LinearMethodBase):
    """One packed linear layer, or the output head; made anew for each.

    prefix:   the layer's name in vLLM.
    module:   how it is stored.
    registry: backends to choose from, None for the plugin's own.
    choices:  gets the choice under `prefix`.
    rows:     whether rows are looked up in it: embeddings, with or without a head that uses them.
    """

    def __init__(
        self,
        prefix: str,
        module: PackedModule,
        registry: BackendRegistry | None,
        choices: MutableMapping[str, BackendChoice],
        rows: bool = False,
    ) -> None:
        self.rows = rows
        self.prefix = prefix
        self.module = module
        self.registry = registry or plugin_registry()
        self.choices = choices
        config = get_current_vllm_config()
        self.options = Options.parse(config.additional_config)
        self.dummy = config.load_config.load_format == "dummy"
        self.heads = rotary_heads(getattr(config.model_config, "hf_text_config", None))

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an unfilled parameter for every packed tensor.

        Raises ServingError if no backend can run.
        """
        self.columns = ColumnSlice.of_rank(
            self.module.layout, input_size, input_size_per_partition, getattr(layer, "tp_rank", 0)
        )
        self.spec = LinearSpec(
            self.module.layout,
            self.columns.columns,
            tuple(output_partition_sizes),
            params_dtype,
            current_platform.device_type,
            int8_activations=self.options.int8_activations,
            embedding=self.rows,
        )
        self._register_packed(layer, output_size, extra_weight_attrs["weight_loader"])
        choice = choose(
            self.spec, self.options, self.registry, self.prefix, self.module.layout_name
        )
        self.choices[self.prefix] = choice
        if isinstance(layer, VocabParallelEmbedding) and choice.backend.name != "dense":
            self._check_adapters()
        self.backend = choice.make()

    def _check_adapters(self) -> None:
        """Raise ServingError where vLLM would look for a weight to add LoRA adapters to."""
        config = get_current_vllm_config()
        if config.lora_config is None:
            return
        model, _ = get_model_architecture(config.model_config)
        if getattr(model, "embedding_modules", None):
            raise ServingError(
                f"{self.prefix}: vLLM adds LoRA adapters to heads and embeddings of this model, "
                "which needs their unquantized weight; serve without --enable-lora, or with "
                '--additional-config \'{"precalib": {"backend": "dense"}}\''
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was loaded and hand it to the backend; runs again after a reload.

        Raises ServingError for missing or non-finite tensors, FormatError for bad positions.
        """
        self._install(layer, self.backend.prepare(self._loaded(layer), self.prefix))

    def _install(self, layer: torch.nn.Module, prepared: Mapping[str, Tensor]) -> None:
        """What the backend made of the packed tensors, in their place."""
        for name in self.names:
            delattr(layer, name)
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.backend.finish(layer)

    def dequantize_weight(self, layer: torch.nn.Module) -> Tensor:
        """Ŵ [N, K] of this rank in the type of the activations; the packed tensors stay.

        vLLM asks for it in place of `process_weights_after_loading` where it is to quantize the
        layer again, into a format of its own.

        Raises ServingError if tensors are missing, not finite or already given to a backend,
        FormatError for bad positions.
        """
        if not all(hasattr(layer, name) for name in self.names):
            raise ServingError(
                f"{self.prefix} cannot be quantized again by vLLM: its packed tensors were given "
                "to a backend and are gone; load the model anew"
            )
        weight = self.columns.crop(unpacked_weight(self._loaded(layer), self.spec, self.prefix))
        self.choices.pop(self.prefix, None)  # no backend of ours computes the layer
        return weight

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Ŵᵀ + bias by the chosen backend: x [..., K of this rank] to [..., N of this rank]."""
        return self.backend.apply(layer, self.columns.widen(x), bias)

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Rows of Ŵ by the chosen backend: input_ [...] int64 to [..., K]."""
        return self.backend.embedding(layer, input_)

    def tie_weights(self, *_: torch.nn.Module) -> torch.nn.Module:
        """Refuse, with ServingError: a packed output head has no weight to share."""
        raise ServingError(
            f"{self.prefix} is packed, but this model shares it with its embeddings; "
            f"quantize the model again with --keep '{self.prefix.rpartition('.')[2]}'"
        )

    def _loaded(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """The packed tensors by name, once all of them are known to be there and finite."""
        tensors = {name: getattr(layer, name).data for name in self.names}
        if self.dummy and not self.guard.filled:
            # random bytes may be no salient weights at all, and no 4-bit zero points
            for name in tensors.keys() & {"salient", "zeros"}:
                tensors[name].zero_()
        else:
            self.guard.finish(self.names)
            self.guard.check_finite(tensors)
        return tensors

    def _register_packed(
        self,
        layer: torch.nn.Module,
        output_size: int,
        loader: Callable[..., None],
    ) -> None:
        """A parameter for every packed tensor, whose loading the guard watches."""
        shard_sizes = self.spec.shard_sizes
        self.guard = WeightLoadGuard(
            self.prefix, self.module, self.columns, output_size, shard_sizes, self.heads
        )
        specs = self.module.layout.tensors(self.spec.output_size, self.spec.input_size)
        self.names = tuple(specs)
        for name, spec in specs.items():
            watched = self.guard.watch(name, layer, loader)
            param = packed_parameter(name, spec, len(shard_sizes), watched)
            layer.register_parameter(name, param)
