"""Experts of an ordinary checkpoint, quantized while it is loaded."""

import re
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from concurrent.futures import Future
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offline_quantize.method.encode import encode
from offline_quantize.method.recipes import Recipe
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import PrecalibError, ServingError
from vllm_precalib.compat import vllm_names
from vllm_precalib.encoder_pool import EncoderPool, own_copy
from vllm_precalib.experts.choice import choose_backends
from vllm_precalib.experts.method import DenseExpertsMethod, PackedExpertsMethod
from vllm_precalib.experts.packed_experts import GATE_UP, PackedExperts
from vllm_precalib.experts.parameters import (
    SHARDS,
    ExpertLoader,
    MatrixParameters,
    global_numbers,
)

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

with vllm_names():
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.utils import set_weight_attrs

WHOLE = "all_"  # begins the name of the parameter for a matrix of all experts
Place = tuple[str, int, int]  # "w13" or "w2", number of an expert on this rank, shard


class OnlineExperts:
    """What makes a method for packed experts one for experts that are packed as they are loaded.

    A weight is encoded as soon as it arrives, whole, in another thread, unless it is of another
    rank's expert; on CPUs the thread that is the last to encode one hands all to the backends.

    The layer has parameters without memory for vLLM's loader to find: "w13_weight" and "w2_weight",
    or, for a model whose loader would copy all experts of a tensor into these, `WHOLE` ones.

    recipes: of the matrices "w13" and "w2".
    """

    loader: ExpertLoader
    dummy: bool

    def start(self, recipes: dict[str, Recipe], pool: EncoderPool) -> None:
        """Set what the packed method has no place for."""
        self.recipes, self.pool = recipes, pool
        self.whole = self.loader.packed.gate_up.shards == (GATE_UP,)
        self.loader.by_name = False
        self.encoding: dict[Place, Future[None]] = {}
        self.encoded: dict[Place, dict[str, Tensor]] = {}
        self.prepared: dict[str, Tensor] | None = None
        self.loaded = False

    def create_weights(self, layer: Any, num_experts: int, *args: Any, **kwargs: Any) -> None:
        """As of packed experts, and parameters for the weights."""
        super().create_weights(layer, num_experts, *args, **kwargs)  # type: ignore[misc]
        if self.dummy:
            return
        self.numbers = global_numbers(layer, num_experts)
        for matrix in self.loader.matrices:
            for tensor in matrix.tensors:  # vLLM waits for the weights alone when it reloads
                parameter = layer.get_parameter(matrix.parameter_name(tensor))
                set_weight_attrs(parameter, {"weight_loader_numel": 0})
            shape = num_experts, matrix.spec.output_size, matrix.columns.width
            data = torch.empty(shape, dtype=matrix.spec.dtype, device="meta")
            weight = torch.nn.Parameter(data, requires_grad=False)
            if self.whole:
                loader = self._whole_receiver(layer, matrix)
            else:
                loader = self._receiver(layer, matrix, kwargs["weight_loader"])
            set_weight_attrs(weight, {"weight_loader": loader})
            layer.register_parameter(self._weight_name(matrix), weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As of packed experts, with what was encoded.

        Raises ServingError for a weight that did not arrive or that the recipe cannot hold.
        """
        if self.dummy:
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        for place in self._places():
            if place not in self.encoding:
                label = self._label(*place)
                raise ServingError(f"{label} was not in the checkpoint; copy the checkpoint again")
        for future in self.encoding.values():
            self._result(future)
        prepared = self._prepare(layer) if self.prepared is None else self.prepared
        self.encoding, self.encoded, self.prepared, self.loaded = {}, {}, None, True
        for matrix in self.loader.matrices:
            delattr(layer, self._weight_name(matrix))
        self.install(layer, prepared)  # type: ignore[attr-defined]

    def _weight_name(self, matrix: MatrixParameters) -> str:
        return WHOLE + matrix.stored.shards[0] if self.whole else f"{matrix.name}_weight"

    def _places(self) -> list[Place]:
        return [
            (matrix.name, expert, shard)
            for matrix in self.loader.matrices
            for expert in self.numbers
            for shard in range(len(matrix.spec.shard_sizes))
        ]

    def _label(self, name: str, expert: int, shard: int) -> str:
        matrix = next(matrix for matrix in self.loader.matrices if matrix.name == name)
        return self.loader.label(matrix, self.numbers[expert], shard, "weight")

    def _receiver(
        self, layer: Any, matrix: MatrixParameters, loader: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What vLLM calls with each weight; see `OnlineLinearMethod`."""
        count = loader.__func__ if isinstance(loader, MethodType) else loader

        def receive(
            layer: Any,
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if self.loaded and param.is_meta:
                found: bool | None = count(
                    layer, param, loaded_weight, weight_name, shard_id, expert_id, return_success
                )
                return found
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local == -1:
                return False if return_success else None
            if loaded_weight.dim() == 3:  # Llama 4: of all of this rank's experts
                weights = dict(enumerate(loaded_weight))
            else:
                weights = {local: loaded_weight}
            for number, weight in weights.items():
                self._take(layer, weight, (matrix.name, number, SHARDS[shard_id]))
            return True if return_success else None

        return MethodType(receive, layer)

    def _whole_receiver(self, layer: Any, matrix: MatrixParameters) -> Callable[..., Any]:
        """What vLLM calls with a matrix of all experts, [experts, inputs, outputs]."""

        def receive(layer: Any, param: Tensor, loaded_weight: Tensor) -> None:
            del param
            for local, number in self.numbers.items():
                self._take(layer, loaded_weight[number].T, (matrix.name, local, 0))

        return MethodType(receive, layer)

    def _take(self, layer: Any, weight: Tensor, place: Place) -> None:
        where = self._label(*place)
        if place in self.encoding:
            raise ServingError(f"{where} is in the checkpoint twice; copy the checkpoint again")
        task = self._encode, layer, own_copy(weight), place, where
        self.encoding[place] = self.pool.submit(*task)

    def _encode(self, layer: Any, weight: Tensor, place: Place, where: str) -> None:
        tensors = encode(weight, self.recipes[place[0]], where, histograms=False).tensors
        with self.pool.lock:
            self.encoded[place] = tensors
            last = len(self.encoded) == len(self._places())
        if last and self.loader.matrices[0].spec.device == "cpu":
            self.prepared = self._prepare(layer)

    def _prepare(self, layer: Any) -> dict[str, Tensor]:
        """What the backends make of all experts; the packed tensors are released."""
        matrices = {matrix.name: matrix for matrix in self.loader.matrices}
        for (name, expert, shard), tensors in self.encoded.items():
            matrix = matrices[name]
            while tensors:  # taken out so that their memory is released
                tensor, data = tensors.popitem()
                param = layer.get_parameter(matrix.parameter_name(tensor))
                number = self.numbers[expert]
                self.loader.fill(param, matrix, tensor, expert, number, shard, data)
        found: dict[str, Tensor] = self.prepare(layer)  # type: ignore[attr-defined]
        return found

    def _result(self, future: "Future[Any]") -> Any:
        try:
            return self.pool.result(future)
        except PrecalibError as error:
            raise ServingError(
                f"{error}; to leave experts unquantized: "
                r"""--additional-config '{"precalib": {"keep": ["\\.experts\\."]}}'"""
            ) from error


class OnlinePackedExpertsMethod(OnlineExperts, PackedExpertsMethod):
    """Experts that are packed as they are loaded, and stay in a backend's form."""


class OnlineDenseExpertsMethod(OnlineExperts, DenseExpertsMethod):
    """Experts that are packed as they are loaded, and unpacked again."""


def online_experts_method(
    layer: Any,
    packed: PackedExperts,
    recipes: Sequence[Recipe],
    registry: BackendRegistry | None,
    choices: MutableMapping[str, BackendChoice],
    pool: EncoderPool,
) -> FusedMoEMethodBase:
    """The method for experts that are to be packed as `packed` says.

    recipes: of the matrix of gate and up, and of the other one.

    Raises ServingError for experts that cannot be served.
    """
    chosen = choose_backends(layer, packed, registry, choices)
    arguments = layer, chosen.loader, chosen.dummy
    method: OnlineDenseExpertsMethod | OnlinePackedExpertsMethod
    if chosen.dense:
        method = OnlineDenseExpertsMethod(*arguments)
    else:
        method = OnlinePackedExpertsMethod(*arguments, chosen.backends)
    method.start(dict(zip(("w13", "w2"), recipes, strict=True)), pool)
    return method


def whole_expert_names(prefixes: Iterable[str]) -> "WeightsMapper":
    """New names for the tensors of all experts of the layers `prefixes`.

    Their loader in vLLM copies a tensor of that name, whatever the parameter's own loader is; under
    another name it asks that loader.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(
        orig_to_new_regex={
            re.compile(rf"^{re.escape(prefix)}\.(\w+_proj)$"): rf"{prefix}.routed_experts.{WHOLE}\1"
            for prefix in prefixes
        }
    )
