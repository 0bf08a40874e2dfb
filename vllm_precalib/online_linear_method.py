"""Linear layers of an ordinary checkpoint, quantized while it is loaded."""

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import Recipe
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import PrecalibError, ServingError, UnfitError
from vllm_precalib.compat import vllm_names
from vllm_precalib.encoder_pool import EncoderPool, Result, own_copy
from vllm_precalib.linear_method import PrecalibLinearMethod
from vllm_precalib.online_plan import OnlineModule

with vllm_names():
    from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
    from vllm.model_executor.parameter import ModelWeightParameter
    from vllm.model_executor.utils import set_weight_attrs


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A weight of the checkpoint, packed.

    shard:   vLLM's id of the part of the layer that it is; None for all of it.
    shards:  how many shards of the layer that is.
    tensors: taken out when they are loaded, so that their memory is released.
    """

    shard: Any
    shards: int
    tensors: dict[str, Tensor]


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(PrecalibLinearMethod):
    """A packed layer whose packed tensors are made from the weights that vLLM loads.

    A weight of the checkpoint is encoded as soon as it arrives, whole, in another thread. So every
    rank of several encodes all of it and takes its slice, as it would of a packed checkpoint. On
    CPUs the thread that is the last to encode a weight of the layer also hands it to its backend.

    The layer has a parameter "weight" without memory for vLLM's loader to find.
    """

    def __init__(
        self,
        prefix: str,
        planned: OnlineModule,
        registry: BackendRegistry | None,
        choices: MutableMapping[str, BackendChoice],
        pool: EncoderPool,
        rows: bool = False,
    ) -> None:
        super().__init__(prefix, planned.module, registry, choices, rows)
        self.recipe: Recipe = planned.recipe
        self.pool = pool
        self.arrived: set[int] = set()  # shards
        self.encoding: list[Future[None]] = []
        self.encoded: list[Encoded] = []
        self.prepared: dict[str, Tensor] | None = None
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
        """As of a packed layer, with what was encoded.

        Raises ServingError for a weight that did not arrive or that the recipe cannot hold.
        """
        if self.dummy:
            super().process_weights_after_loading(layer)
            return
        self._check_whole()
        for future in self.encoding:
            self._result(future)
        prepared = self._prepare(layer) if self.prepared is None else self.prepared
        self.arrived, self.encoding, self.encoded, self.prepared = set(), [], [], None
        self.loaded = True
        del layer.weight
        self._install(layer, prepared)

    def tie_weights(self, *_: torch.nn.Module) -> torch.nn.Module:
        """Refuse, with ServingError: there is no weight to make a packed head of."""
        raise ServingError(
            f"{self.prefix}: this model's head is a copy of its embeddings, so it cannot be packed "
            'alone while it is loaded; give "embeddings" in place of "head", which packs both, or '
            "quantize the model first: precalib quantize SRC DST --head RECIPE"
        )

    def _check_whole(self) -> None:
        """Raise ServingError naming the first weight that did not arrive."""
        for shard in range(len(self.spec.shard_sizes)):
            if shard not in self.arrived:
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
            if not self.arrived.isdisjoint(shards):
                raise ServingError(f"{where} is in the checkpoint twice; copy the checkpoint again")
            self.arrived.update(shards)
            self.encoding.append(
                self.pool.submit(
                    self._encode, layer, own_copy(loaded_weight), loaded_shard_id, shards, where
                )
            )

        return MethodType(receive, layer)

    def _encode(
        self, layer: torch.nn.Module, weight: Tensor, shard: Any, shards: Sequence[int], where: str
    ) -> None:
        tensors = encode(weight, self.recipe, where, histograms=False).tensors
        with self.pool.lock:
            self.encoded.append(Encoded(shard, len(shards), tensors))
            last = sum(one.shards for one in self.encoded) == len(self.spec.shard_sizes)
        if last and self.spec.device == "cpu":
            self.prepared = self._prepare(layer)

    def _prepare(self, layer: torch.nn.Module) -> dict[str, Tensor]:
        """What the backend makes of this rank's slices; the packed tensors are released."""
        for one in self.encoded:
            while one.tensors:
                name, tensor = one.tensors.popitem()
                param: Any = layer.get_parameter(name)
                param.weight_loader(param, tensor, *(() if one.shard is None else (one.shard,)))
        prepared = self.backend.prepare(self._loaded(layer), self.prefix)
        for name in self.names:
            parameter = layer.get_parameter(name)
            parameter.data = parameter.data.new_empty(0)
        return prepared

    def _result(self, future: "Future[Result]") -> Result:
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
