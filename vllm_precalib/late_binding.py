"""Linear layers that no name tells to be packed: what vLLM's loader brings to them decides.

vLLM's name of a layer need not be that of its parameters: some models build layers under another
name than they load them, or without any, and their loaders rename what the checkpoint holds. So
every layer that is not recognized offers a place for each packed tensor beside its weight, and is
bound to the layout whose tensors arrive.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.layout import COLUMN_UNIT, Layout
from vllm_precalib.compat import vllm_names
from vllm_precalib.packed_module import PackedModule

with vllm_names():
    from vllm.model_executor.utils import set_weight_attrs

Arrival = tuple[str, Tensor, Any]  # name of the packed tensor, the tensor, vLLM's shard id


class PackedTensorPlace(Parameter):
    """Stands for one packed tensor of a layer of which it is not known whether it has one."""

    receiver: "PackedTensorReceiver"

    @property
    def weight_loader_numel(self) -> int:
        """Elements that vLLM waits for in a reload: none at a layer without packed tensors."""
        return int(self.receiver.bound)


class PackedTensorReceiver:
    """Takes the packed tensors that arrive at one layer, and tells which layout they are of.

    prefix:     the layer's name in vLLM, for messages.
    checkpoint: has the layouts that are possible.
    """

    def __init__(self, prefix: str, checkpoint: CheckpointConfig) -> None:
        self.prefix = prefix
        self.layouts = checkpoint.layouts
        self.arrived: list[Arrival] = []
        self.bound = False  # whether packed tensors have ever arrived

    def register(self, layer: torch.nn.Module) -> None:
        """Give `layer` a parameter of one element for each packed tensor that there can be."""
        for name, dtype in self._dtypes().items():
            place = PackedTensorPlace(torch.zeros(1, dtype=dtype), requires_grad=False)
            place.receiver = self
            set_weight_attrs(place, {"weight_loader": self._loader(name, layer)})
            if name != "column_scale":
                set_weight_attrs(place, {"output_dim": 0})  # some loaders reorder rows along it
            layer.register_parameter(name, place)

    def unregister(self, layer: torch.nn.Module) -> None:
        """Take the parameters away again."""
        for name in self._dtypes():
            layer.register_parameter(name, None)
            delattr(layer, name)

    def take(self) -> list[Arrival]:
        """All that arrived; then start anew, for a reload brings everything again."""
        arrived, self.arrived = self.arrived, []
        self.bound = self.bound or bool(arrived)
        return arrived

    def module_of(self, arrived: Sequence[Arrival], input_size: int) -> PackedModule:
        """How the layer is stored. Raises ServingError if no layout, or more than one, fits.

        input_size: K of the whole layer.
        """
        shards: dict[Any, dict[str, tuple[tuple[int, ...], torch.dtype]]] = defaultdict(dict)
        for name, tensor, shard in arrived:
            shards[shard][name] = tuple(tensor.shape), tensor.dtype
        fitting = [
            name
            for name, layout in self.layouts.items()
            if all(_fits(layout, stored, input_size) for stored in shards.values())
        ]
        if len({self.layouts[name] for name in fitting}) == 1:
            return PackedModule(self.layouts[fitting[0]], fitting[0], (self.prefix or "a layer",))
        shapes = {name: list(shape) for name, (shape, _) in next(iter(shards.values())).items()}
        reason = f"are of more than one layout ({', '.join(fitting)})" if fitting else "of none"
        raise ServingError(
            f"{self.prefix or 'a layer without a name'}: vLLM's name for this layer is not the "
            f"checkpoint's, and the tensors that it brings, {shapes}, could be {reason}; quantize "
            "the model again with one recipe for all its layers, or --keep this one"
        )

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {
            name: spec.dtype
            for layout in self.layouts.values()
            for name, spec in layout.tensors(1, COLUMN_UNIT).items()
        }

    def _loader(self, name: str, layer: torch.nn.Module) -> Callable[..., None]:
        def receive(
            _layer: torch.nn.Module,
            param: Tensor,
            loaded_weight: Tensor,
            loaded_shard_id: Any = None,
        ) -> None:
            if not param.is_meta:  # vLLM loads twice for a reload: on meta it only counts
                self.arrived.append((name, loaded_weight, loaded_shard_id))
            param.data.copy_(torch.ones_like(param.data))  # vLLM counts the elements that it copies

        return MethodType(receive, layer)  # see WeightLoadGuard.watch


def _fits(
    layout: Layout, stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]], input_size: int
) -> bool:
    if "qweight" not in stored:
        return False
    specs = layout.tensors(stored["qweight"][0][0], input_size)
    return {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == stored
