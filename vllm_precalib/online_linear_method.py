"""Linear layers of an ordinary checkpoint, quantized while it is loaded."""

from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from offline_quantize.method.recipes import Recipe
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import PrecalibError, ServingError, UnfitError
from vllm_precalib.compat import vllm_names
from vllm_precalib.encoder_pool import EncoderPool
from vllm_precalib.linear_method import PrecalibLinearMethod
from vllm_precalib.online_plan import OnlineModule

with vllm_names():
    from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
    from vllm.model_executor.parameter import ModelWeightParameter
    from vllm.model_executor.utils import set_weight_attrs


Arrival = tuple[Any, "Future[dict[str, Tensor]]"]  # vLLM's shard id, and what it becomes


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(PrecalibLinearMethod):
    """A packed layer whose packed tensors are made from the weights that vLLM loads.

    A weight of the checkpoint is encoded as soon as it arrives, whole, in another thread. So every
    rank of several encodes all of it and takes its slice, as it would of a packed checkpoint.

    The layer has a parameter "weight" without memory for vLLM's loader to find.
    """

    def __init__(
        self,
        prefix: str,
        planned: OnlineModule,
        registry: BackendRegistry | None,
        choices: MutableMapping[str, BackendChoice],
        pool: EncoderPool,
    ) -> None:
        super().__init__(prefix, planned.module, registry, choices)
        self.recipe: Recipe = planned.recipe
        self.pool = pool
        self.arrived: list[Arrival] = []
        self.loaded = False

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As of a packed layer, and a parameter for the weight."""
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, *args, **kwargs
        )
        if self.dummy:
            return
        self.guard.heads = {}  # vLLM reorders the rows of unquantized weights itself
        for name in self.names:  # vLLM waits for the weight alone when it reloads
            set_weight_attrs(layer.get_parameter(name), {"weight_loader_numel": 0})
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = ModelWeightParameter(
            data=torch.empty(shape, dtype=self.spec.dtype, device="meta"),
            input_dim=1,
            output_dim=0,
            weight_loader=self._receiver(layer, kwargs["weight_loader"]),
        )
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Load what was encoded, then as of a packed layer.

        Raises ServingError for a weight that did not arrive or that the recipe cannot hold.
        """
        if not self.dummy:
            arrived, self.arrived, self.loaded = self.arrived, [], True
            self._check_whole(arrived)
            for shard, future in arrived:
                for name, tensor in self._result(future).items():
                    param: Any = layer.get_parameter(name)
                    param.weight_loader(param, tensor, *(() if shard is None else (shard,)))
            del layer.weight
        super().process_weights_after_loading(layer)

    def tie_weights(self, *_: torch.nn.Module) -> torch.nn.Module:
        """Refuse, with ServingError: there is no weight to make a packed head of."""
        raise ServingError(
            f"{self.prefix}: this model's head is a copy of its embeddings, which cannot be packed "
            'while it is loaded; leave out "head", or quantize the model first: precalib quantize '
            "SRC DST --head RECIPE"
        )

    def _check_whole(self, arrived: Sequence[Arrival]) -> None:
        """Raise ServingError naming the first weight that did not arrive."""
        there = {i for shard, _ in arrived for i in self.guard.shards_of("weight", shard)}
        for shard in range(len(self.spec.shard_sizes)):
            if shard not in there:
                raise ServingError(
                    f"{self.guard.label('weight', shard)} was not in the checkpoint; "
                    "copy the checkpoint again"
                )

    def _receiver(self, layer: torch.nn.Module, loader: Callable[..., None]) -> Callable[..., None]:
        """What vLLM calls with each weight.

        For a reload vLLM calls it twice: once with a parameter on the meta device, to count the
        elements that arrive, and again when all of the layer's have.
        """
        count = loader.__func__ if isinstance(loader, MethodType) else loader

        def receive(
            layer: torch.nn.Module,
            param: Tensor,
            loaded_weight: Tensor,
            loaded_shard_id: Any = None,
        ) -> None:
            shard = () if loaded_shard_id is None else (loaded_shard_id,)
            if self.loaded and param.is_meta:
                count(layer, param, loaded_weight, *shard)
                return
            shards = self.guard.shards_of("weight", loaded_shard_id)
            where = self.guard.label("weight", shards[0] if len(shards) == 1 else None)
            weight = loaded_weight.to("cpu", copy=True)  # its owner may use its memory again
            self.arrived.append((loaded_shard_id, self.pool.submit(weight, self.recipe, where)))

        return MethodType(receive, layer)

    def _result(self, future: "Future[dict[str, Tensor]]") -> dict[str, Tensor]:
        try:
            return self.pool.result(future)
        except UnfitError as error:
            name = self.prefix.rpartition(".")[2]
            raise ServingError(
                f'{error}; leave it unquantized: --additional-config \'{{"precalib": {{"keep": '
                f'["{name}$"]}}}}\''
            ) from error
        except PrecalibError as error:
            raise ServingError(str(error)) from error
