"""The parameters that the packed tensors of all experts of a layer are loaded into.

Each is the packed tensor of a matrix with a leading dimension of this rank's experts. vLLM's own
loader of experts guesses from names what a tensor is; here each parameter knows, and refuses what
does not fit or did not arrive.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.errors import ServingError
from vllm_precalib.column_slice import ColumnSlice
from vllm_precalib.compat import vllm_names
from vllm_precalib.experts.packed_experts import GATE_UP, ExpertMatrix, PackedExperts

with vllm_names():
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.utils import set_weight_attrs

SHARDS = {"w1": 0, "w3": 1, "w2": 0}  # vLLM's names of gate, up and down
AGAIN = "copy the checkpoint again or quantize the model again"


@dataclasses.dataclass(frozen=True)
class MatrixParameters:
    """The parameters of one matrix of all experts.

    name:    "w13" or "w2", with which vLLM begins their names.
    stored:  how the checkpoint has it.
    spec:    the matrix on this rank.
    columns: those of this rank.
    by_rows: whether ranks share its rows, or else its columns.
    rank, ranks: of tensor parallelism within an expert.
    """

    name: str
    stored: ExpertMatrix
    spec: LinearSpec
    columns: ColumnSlice
    by_rows: bool
    rank: int
    ranks: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the packed tensors."""
        return tuple(self.spec.layout.tensors(self.spec.output_size, self.spec.input_size))

    def parameter_name(self, tensor: str) -> str:
        """Name of the parameter of a packed tensor."""
        return f"{self.name}_{tensor}"

    def register(self, layer: RoutedExperts, experts: int) -> None:
        """Make an unfilled parameter [experts, …] for every packed tensor."""
        specs = self.spec.layout.tensors(self.spec.output_size, self.spec.input_size)
        for tensor, spec in specs.items():
            shape = spec.shape
            if tensor == "column_scale":
                shape = len(self.spec.shard_sizes), spec.shape[1]
            data = torch.empty(experts, *shape, dtype=spec.dtype)
            layer.register_parameter(
                self.parameter_name(tensor), Parameter(data, requires_grad=False)
            )

    def of_expert(self, layer: RoutedExperts, expert: int) -> dict[str, Tensor]:
        """The packed tensors of one of this rank's experts, as a backend prepares them."""
        return {t: getattr(layer, self.parameter_name(t)).data[expert] for t in self.tensors}

    def release(self, layer: RoutedExperts) -> None:
        """Free the memory of all parameters, which stay."""
        for tensor in self.tensors:
            parameter = layer.get_parameter(self.parameter_name(tensor))
            parameter.data = parameter.data.new_empty(0)

    def remove(self, layer: RoutedExperts) -> None:
        """Remove all parameters."""
        for tensor in self.tensors:
            delattr(layer, self.parameter_name(tensor))

    def fill(self, data: Tensor, tensor: str, shard: int, loaded: Tensor, where: str) -> None:
        """Put this rank's slice of a packed tensor of the checkpoint into that of an expert.

        data: what there is for the expert. Raises ServingError for another shape or type.
        """
        layout, rows = self.spec.layout, self.spec.shard_sizes[shard]
        stored_rows = rows * self.ranks if self.by_rows else rows
        expected = layout.tensors(stored_rows, self.columns.whole)[tensor]
        if expected != (tuple(loaded.shape), loaded.dtype):
            raise ServingError(
                f"{where} is {list(loaded.shape)} {loaded.dtype} in the checkpoint, expected "
                f"{list(expected.shape)} {expected.dtype}; {AGAIN}"
            )
        if tensor == "column_scale":
            rows_of_data = slice(shard, shard + 1)
        else:
            start = sum(self.spec.shard_sizes[:shard])
            rows_of_data = slice(start, start + rows)
        if self.by_rows and tensor != "column_scale":
            loaded = loaded.narrow(0, self.rank * rows, rows)
        data[rows_of_data].copy_(self.columns.cut(tensor, loaded))


class ExpertLoader:
    """Registers and loads the packed tensors of all experts of a layer, and sees that all come.

    packed:   how they are stored.
    matrices: their two matrices.
    by_name:  whether vLLM may look for tensors of a single expert by the checkpoint's names.
    """

    by_name = True

    def __init__(self, packed: PackedExperts, matrices: Iterable[MatrixParameters]) -> None:
        self.packed = packed
        self.matrices = tuple(matrices)
        self.filled: set[tuple[str, str, int, int]] = set()

    def register(self, layer: RoutedExperts, experts: int) -> None:
        """Make all parameters; experts: number of this rank's."""
        self.experts = experts
        for matrix in self.matrices:
            matrix.register(layer, experts)
            for tensor in matrix.tensors:
                parameter = layer.get_parameter(matrix.parameter_name(tensor))
                set_weight_attrs(parameter, {"weight_loader": self._loader(layer, matrix, tensor)})
        if self.by_name and self.packed.gate_up.shards == (GATE_UP,):
            self._register_names(layer)

    def fill(
        self,
        param: Tensor,
        matrix: MatrixParameters,
        tensor: str,
        local: int,
        number: int,
        shard: int,
        loaded: Tensor,
    ) -> None:
        """Put this rank's slice of a packed tensor into its parameter.

        local, number: of the expert on this rank, and in the checkpoint.

        Raises ServingError for another shape or type than expected.
        """
        where = self.label(matrix, number, shard, tensor)
        matrix.fill(param.data[local], tensor, shard, loaded, where)
        self.filled.add((matrix.name, tensor, local, shard))

    def finish(self, layer: RoutedExperts, dummy: bool) -> None:
        """See that everything came and is finite; then start anew, for a reload.

        dummy: whether vLLM fills parameters with random bytes, of which nothing has come.

        Raises ServingError naming the first tensor that did not come or is not finite.
        """
        self._remove_names(layer)
        filled, self.filled = self.filled, set()
        if dummy and not filled:
            for matrix in self.matrices:
                for tensor in {"salient", "zeros"}.intersection(matrix.tensors):
                    getattr(layer, matrix.parameter_name(tensor)).data.zero_()
            return
        numbers = global_numbers(layer, self.experts)
        for matrix in self.matrices:
            shards = range(len(matrix.spec.shard_sizes))
            for tensor, expert, shard in itertools.product(
                matrix.tensors, range(self.experts), shards
            ):
                if (matrix.name, tensor, expert, shard) not in filled:
                    label = self.label(matrix, numbers[expert], shard, tensor)
                    raise ServingError(f"{label} was not in the checkpoint; {AGAIN}")
            self._check_finite(layer, matrix, numbers)

    def _register_names(self, layer: RoutedExperts) -> None:
        """Empty parameters under the checkpoint's names, whose loaders fill the others.

        vLLM's gpt-oss looks its tensors up by name, and skips those that no parameter has.
        """
        for local, number in global_numbers(layer, self.experts).items():
            expert = torch.nn.Module()
            layer.add_module(str(number), expert)
            for matrix in self.matrices:
                holder = torch.nn.Module()
                expert.add_module(matrix.stored.shards[0], holder)
                for tensor in matrix.tensors:
                    empty = Parameter(torch.empty(0), requires_grad=False)
                    loader = self._named_loader(layer, matrix, tensor, local, number)
                    set_weight_attrs(empty, {"weight_loader": loader})
                    holder.register_parameter(tensor, empty)

    def _remove_names(self, layer: RoutedExperts) -> None:
        for name in [name for name, _ in layer.named_children() if name.isdecimal()]:
            delattr(layer, name)

    def _check_finite(
        self, layer: RoutedExperts, matrix: MatrixParameters, numbers: Mapping[int, int]
    ) -> None:
        for tensor in matrix.tensors:
            data = getattr(layer, matrix.parameter_name(tensor)).data
            if data.is_floating_point() and not bool(data.isfinite().all()):
                expert, row = map(int, (~data.isfinite()).any(2).nonzero()[0])
                ends = list(itertools.accumulate(matrix.spec.shard_sizes))
                shard = row if tensor == "column_scale" else sum(row >= end for end in ends)
                label = self.label(matrix, numbers[expert], shard, tensor)
                raise ServingError(
                    f"{label} is not finite everywhere; the checkpoint is damaged, quantize the "
                    "model again"
                )

    def label(self, matrix: MatrixParameters, expert: int, shard: int, tensor: str) -> str:
        """A tensor of a shard of an expert, the way the checkpoint calls it."""
        return self.packed.label(expert, matrix.stored.shards[shard], tensor)

    def _loader(self, layer: RoutedExperts, matrix: MatrixParameters, tensor: str) -> MethodType:
        """What vLLM calls for a tensor of the checkpoint, with the arguments of its own loader."""

        def load(
            layer: RoutedExperts,
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            del weight_name
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local == -1:
                return False if return_success else None
            place = tensor, local, expert_id, SHARDS[shard_id]
            self.fill(param, matrix, *place, loaded_weight)
            return True if return_success else None

        # not a closure over the layer, see `WeightLoadGuard.watch`
        return MethodType(load, layer)

    def _named_loader(
        self, layer: RoutedExperts, matrix: MatrixParameters, tensor: str, local: int, number: int
    ) -> MethodType:
        """What vLLM calls for a tensor that it found by its name."""

        def load(layer: RoutedExperts, param: Tensor, loaded_weight: Tensor) -> None:
            param = getattr(layer, matrix.parameter_name(tensor))
            self.fill(param, matrix, tensor, local, number, 0, loaded_weight)

        return MethodType(load, layer)


def global_numbers(layer: RoutedExperts, experts: int) -> dict[int, int]:
    """The checkpoint's number of each of this rank's experts."""
    expert_map: Any = layer._expert_map
    if expert_map is None:
        return {expert: expert for expert in range(experts)}
    return {int(local): number for number, local in enumerate(expert_map) if local >= 0}
