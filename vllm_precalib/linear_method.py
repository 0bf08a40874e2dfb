"""The linear layers of a precalib checkpoint: packed ones and kept ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.errors import ServingError
from precalib_kernels.format.layout import COLUMN_UNIT
from vllm_precalib.backends import choose
from vllm_precalib.compat import vllm_names
from vllm_precalib.config import PrecalibConfig
from vllm_precalib.load_guard import WeightLoadGuard
from vllm_precalib.packed_module import PackedModule
from vllm_precalib.parameters import packed_parameter

with vllm_names():
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
    from vllm.platforms import current_platform


def quant_method(
    config: PrecalibConfig, layer: torch.nn.Module, prefix: str
) -> QuantizeMethodBase | None:
    """The method for the layer `prefix`, None where vLLM's own default is right.

    Raises ServingError for packed experts and packed embeddings, which cannot be served.
    """
    if isinstance(layer, RoutedExperts):
        if any(module.startswith(prefix + ".") for module in config.checkpoint.modules):
            raise ServingError(
                f"{prefix}: this precalib cannot serve packed experts; "
                r"quantize the model again with --keep '\.experts\.'"
            )
        return None
    if isinstance(layer, LinearBase | ParallelLMHead):
        if module := config.packed_module(prefix):
            return PrecalibLinearMethod(prefix, module)
        return CheckedUnquantizedLinearMethod(prefix) if isinstance(layer, LinearBase) else None
    if isinstance(layer, VocabParallelEmbedding) and config.packed_module(prefix):
        raise ServingError(
            f"{prefix}: this precalib cannot serve packed embeddings; "
            f"quantize the model again with --keep '{prefix.rpartition('.')[2]}'"
        )
    return None


@register_weight_loader_v2_supported_method
class PrecalibLinearMethod(LinearMethodBase):
    """One packed linear layer, or the output head; made anew for each."""

    def __init__(self, prefix: str, module: PackedModule) -> None:
        self.prefix = prefix
        self.module = module
        config = get_current_vllm_config()
        self.wanted_backend, self.int8_activations = _options(config.additional_config)
        self.dummy = config.load_config.load_format == "dummy"

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

        Raises ServingError if tensor parallelism cuts through a group or no backend can run.
        """
        layout = self.module.layout
        self._check_slices(input_size, input_size_per_partition)
        self.spec = LinearSpec(
            layout,
            input_size_per_partition,
            tuple(output_partition_sizes),
            params_dtype,
            current_platform.device_type,
            self.int8_activations,
        )
        self.backend = choose(self.spec, self.wanted_backend, self.prefix, self.module.layout_name)
        self.guard = WeightLoadGuard(
            self.prefix, self.module, input_size, output_size, output_partition_sizes
        )
        specs = layout.tensors(sum(output_partition_sizes), input_size_per_partition)
        self.names = tuple(specs)
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        for name, spec in specs.items():
            watched = self.guard.watch(name, layer, loader)
            param = packed_parameter(name, spec, len(output_partition_sizes), watched)
            layer.register_parameter(name, param)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was loaded and hand it to the backend; runs again after a reload.

        Raises ServingError for missing or non-finite tensors, FormatError for bad positions.
        """
        tensors = {name: getattr(layer, name).data for name in self.names}
        if self.dummy and not self.guard.filled:
            # random bytes may be no salient weights at all, and no 4-bit zero points
            for name in tensors.keys() & {"salient", "zeros"}:
                tensors[name].zero_()
        else:
            self.guard.finish(self.names)
            self.guard.check_finite(tensors)
        prepared = self.backend.prepare(tensors, self.prefix)
        for name in self.names:
            delattr(layer, name)
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.backend.finish(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Ŵᵀ + bias by the chosen backend: x [..., K] to [..., N of this rank]."""
        return self.backend.apply(layer, x, bias)

    def tie_weights(self, *_: torch.nn.Module) -> torch.nn.Module:
        """Refuse, with ServingError: a packed output head has no weight to share."""
        raise ServingError(
            f"{self.prefix} is packed, but this model shares it with its embeddings; "
            f"quantize the model again with --keep '{self.prefix.rpartition('.')[2]}'"
        )

    def _check_slices(self, input_size: int, slice_size: int) -> None:
        group = self.module.layout.group_size
        if slice_size == input_size or slice_size % group == 0:
            return
        whole = input_size // group if input_size % group == 0 else 1
        fitting = [str(ranks) for ranks in range(1, whole + 1) if whole % ranks == 0]
        finer = [size for size in range(COLUMN_UNIT, group, COLUMN_UNIT) if slice_size % size == 0]
        again = f", or quantize the model again with --group-size {finer[-1]}" if finer else ""
        raise ServingError(
            f"{self.prefix}: its {input_size} inputs in groups of {group} cannot be split into "
            f"{input_size // slice_size} slices of {slice_size}; use a tensor-parallel size of "
            f"{' or '.join(fitting)}{again}"
        )


@register_weight_loader_v2_supported_method
class CheckedUnquantizedLinearMethod(UnquantizedLinearMethod):
    """A linear layer that was not packed, with a guard: vLLM has none in a quantized model.

    It catches modules whose names vLLM and the checkpoint do not agree about.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As vLLM does, with not-a-number in the first row of every fused shard."""
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, *args, **kwargs
        )
        self.shard_sizes = output_partition_sizes
        for shard in self._shards(layer):
            shard[0] = torch.nan

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """As vLLM does. Raises ServingError if a shard was never loaded."""
        for shard in self._shards(layer):
            if bool(shard[0].isnan().all()):
                raise ServingError(
                    f"{self.prefix}.weight was not in the checkpoint, or only in part, and "
                    "config.json does not list the layer as packed; copy the checkpoint again or "
                    "quantize the model again"
                )
        super().process_weights_after_loading(layer)

    def _shards(self, layer: torch.nn.Module) -> tuple[Tensor, ...]:
        weight = layer.get_parameter("weight").data
        return weight.split(self.shard_sizes)


def _options(additional_config: Any) -> tuple[str | None, bool]:
    """Backend, and whether activations become 8 bits: "precalib" of --additional-config.

    vLLM hashes additional_config into the key of its compile cache, so two backends never share
    compiled code. Raises ServingError for anything else under "precalib".
    """
    ours = additional_config.get("precalib", {}) if isinstance(additional_config, dict) else {}
    known = isinstance(ours, dict) and not set(ours) - {"backend", "activations"}
    if not known or ours.get("activations", "int8") != "int8":
        raise ServingError(
            f'additional_config: "precalib" is {ours!r}, but only {{"backend": NAME, '
            '"activations": "int8"} is known'
        )
    return ours.get("backend"), "activations" in ours
