"""Linear layers that config.json does not list under vLLM's name: unquantized, or packed anyhow."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from vllm_precalib.compat import vllm_names
from vllm_precalib.late_binding import Arrival, PackedTensorReceiver
from vllm_precalib.linear_method import PrecalibLinearMethod

with vllm_names():
    from vllm.model_executor.layers.linear import (
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )


@register_weight_loader_v2_supported_method
class CheckedLinearMethod(UnquantizedLinearMethod):
    """An unquantized layer with a guard: vLLM has none in a quantized model.

    A weight that is still not-a-number in the whole first row of a shard was never loaded: unlike a
    wrapped loader, that mark works for every loader of vLLM's, and a weight of numbers cannot carry
    it.

    prefix: the layer's name in vLLM.
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
        """As vLLM does, with not-a-number in the first row of every shard."""
        sizes = input_size_per_partition, output_partition_sizes
        super().create_weights(layer, *sizes, *args, **kwargs)
        self.shard_sizes = output_partition_sizes
        for shard in self._shards(layer):
            shard[0] = torch.nan

    def process_weights_after_loading(self, layer: Any) -> None:
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
        return torch.split(layer.get_parameter("weight").data, self.shard_sizes)


@register_weight_loader_v2_supported_method
class UndecidedLinearMethod(CheckedLinearMethod):
    """An unquantized layer, unless packed tensors arrive; then it becomes a packed one.

    prefix:     the layer's name in vLLM.
    checkpoint: the layouts there are.
    registry:   backends to choose from, None for the plugin's own.
    choices:    gets the choice under `prefix` if the layer turns out to be packed.
    """

    def __init__(
        self,
        prefix: str,
        checkpoint: CheckpointConfig,
        registry: BackendRegistry | None = None,
        choices: MutableMapping[str, BackendChoice] | None = None,
    ) -> None:
        super().__init__(prefix)
        self.receiver = PackedTensorReceiver(prefix, checkpoint)
        self.registry = registry
        self.choices = {} if choices is None else choices

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As for a layer that is not packed, and a place for what may arrive."""
        self.arguments = (input_size_per_partition, output_partition_sizes, *args), kwargs
        super().create_weights(layer, *self.arguments[0], **kwargs)
        self.receiver.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As vLLM does, or as for a packed layer.

        Raises ServingError if a shard was never loaded.
        """
        self.receiver.unregister(layer)
        if arrived := self.receiver.take():
            self._bind(layer, arrived)
        else:
            super().process_weights_after_loading(layer)

    def _bind(self, layer: Any, arrived: Sequence[Arrival]) -> None:
        module = self.receiver.module_of(arrived, layer.input_size)
        method = LateBoundLinearMethod(self, module, self.registry, self.choices)
        del layer.weight
        positional, named = self.arguments
        method.create_weights(layer, *positional, **named)
        layer.update_param_tp_status()
        for name, tensor, shard in arrived:
            param = getattr(layer, name)
            param.weight_loader(param, tensor, *(() if shard is None else (shard,)))
        layer.quant_method = method
        method.process_packed(layer)


@register_weight_loader_v2_supported_method
class LateBoundLinearMethod(PrecalibLinearMethod):
    """A layer that turned out to be packed; `undecided` decides anew after each reload."""

    def __init__(self, undecided: UndecidedLinearMethod, *module_and_choice: Any) -> None:
        super().__init__(undecided.prefix, *module_and_choice)
        self.undecided = undecided

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """For a reload vLLM has brought back the parameters of the undecided layer."""
        self.undecided.process_weights_after_loading(layer)

    def process_packed(self, layer: torch.nn.Module) -> None:
        """As for every packed layer."""
        super().process_weights_after_loading(layer)
