"""vLLM's methods for a layer of packed experts.

There are two. Experts that stay packed are computed in one product if their backend has such
products, else one after the other, only those that have rows. Experts that are unpacked at load are
computed by vLLM's own kernels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from precalib_kernels.backends.base import Backend
from precalib_kernels.backends.routes import Grouping
from precalib_kernels.backends.triton.backend import WARM_UPS
from precalib_kernels.backends.x86.huge_pages import WEIGHTS
from vllm_precalib.compat import vllm_names
from vllm_precalib.dense_backend import DenseBackend
from vllm_precalib.experts import op
from vllm_precalib.experts.activation import activation_of
from vllm_precalib.experts.expert_view import ALL, bias_of, view
from vllm_precalib.experts.grouped import Sorting, grouped_mixture, warm_up_tokens
from vllm_precalib.experts.mixture import mixture
from vllm_precalib.experts.parameters import ExpertLoader, MatrixParameters

with vllm_names():
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.utils import set_weight_attrs


def grouped(backends: Sequence[type[Backend]]) -> bool:
    """Whether both matrices have grouped products, with blocks of the same sizes."""
    return backends[0].grouped and backends[0] is backends[1]


class PackedExpertsMethod(FusedMoEMethodBase):
    """Experts that stay in a backend's form; made anew for each layer.

    loader:   of the packed tensors.
    dummy:    whether vLLM fills them with random bytes.
    backends: for the two matrices.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        loader: ExpertLoader,
        dummy: bool,
        backends: list[type[Backend]],
    ) -> None:
        super().__init__(layer.moe_config)
        self.loader = loader
        self.dummy = dummy
        self.backends = [
            (PlainDenseBackend if backend is DenseBackend else backend)(matrix.spec)
            for backend, matrix in zip(backends, loader.matrices, strict=True)
        ]
        self.grouped = grouped(backends)
        self.activation = activation_of(layer, loader.packed.prefix)

    def maybe_roundup_sizes(self, *sizes: Any) -> tuple[int, int]:
        """Sizes as they are, whatever communication vLLM uses."""
        return sizes[0], sizes[1]

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an unfilled parameter for every packed tensor and every bias."""
        del hidden_size, intermediate_size_per_partition  # the loader knows them
        self.loader.register(layer, num_experts)
        if self.moe.has_bias:
            for matrix in self.loader.matrices:
                bias = torch.zeros(num_experts, matrix.spec.output_size, dtype=params_dtype)
                parameter = Parameter(bias, requires_grad=False)
                layer.register_parameter(f"{matrix.name}_bias", parameter)
                set_weight_attrs(parameter, extra_weight_attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and hand it to the backends; runs again after a reload.

        Raises ServingError for missing or non-finite tensors, FormatError for bad positions.
        """
        self.install(layer, self.prepare(layer))

    def prepare(self, layer: Any) -> dict[str, Tensor]:
        """What the backends make of the packed tensors, by the names of their parameters.

        Raises ServingError for missing or non-finite tensors, FormatError for bad positions.
        """
        self.loader.finish(layer, self.dummy)
        prepared = {}
        for matrix, backend in zip(self.loader.matrices, self.backends, strict=True):
            for name, tensor in _prepared(layer, matrix, backend, self.loader).items():
                prepared[matrix.parameter_name(name)] = tensor
            matrix.release(layer)
        return prepared

    def install(self, layer: Any, prepared: Mapping[str, Tensor]) -> None:
        """Put what `prepare` returned in the place of the packed tensors."""
        for matrix in self.loader.matrices:
            matrix.remove(layer)
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        if self.grouped and _device(layer).type == "cuda":
            self._warm_up(layer)

    def _warm_up(self, layer: Any) -> None:
        """Compile every kernel that serving can reach, for the first layer of its kind."""
        kind = tuple(backend.spec for backend in self.backends), self.moe.has_bias
        if not WARM_UPS.first(kind):
            return
        chosen, count = self.moe.experts_per_token, self.moe.num_experts
        limits, device = self.backends[0].row_limits(), _device(layer)
        for tokens in warm_up_tokens(limits, count, chosen):
            x = torch.zeros(tokens, self.moe.hidden_dim, dtype=self.moe.in_dtype, device=device)
            ids = torch.arange(tokens * chosen, dtype=torch.int32, device=device) % count
            ids = ids.view(tokens, chosen)
            self.compute(layer, x, torch.zeros(ids.shape, device=device), ids)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's computes these experts."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The routed experts' sum; vLLM's runner itself computes and adds shared experts."""
        del shared_experts, shared_experts_input
        return op.experts(x, topk_weights, topk_ids, layer.layer_name)

    def compute(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Σ over the chosen experts of this rank.

        x: [tokens, hidden];  weights, ids: [tokens, chosen], numbers being those of the model.
        """
        if self.grouped:
            return self._compute_grouped(layer, x, weights, ids)
        local = ids if layer.expert_map is None else layer.expert_map[ids.long()]
        first, second = self.backends
        columns = self.loader.matrices[1].columns

        def of_expert(expert: int, rows: Tensor) -> Tensor:
            inner = first.apply(view(layer, "w13", expert), rows, bias_of(layer, "w13", expert))
            inner = columns.widen(self.activation(inner).to(rows.dtype))
            return second.apply(view(layer, "w2", expert), inner, bias_of(layer, "w2", expert))

        count = self.moe.num_local_experts
        return mixture(x, weights, local, count, of_expert, layer.apply_router_weight_on_input)

    def _compute_grouped(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The same without waiting for the device."""
        first, second = self.backends
        columns = self.loader.matrices[1].columns

        def gate_up(rows: Tensor, grouping: Grouping) -> Tensor:
            matrix, bias = view(layer, "w13", ALL), bias_of(layer, "w13", ALL)
            return first.apply_grouped(matrix, rows, bias, grouping)

        def down(rows: Tensor, grouping: Grouping) -> Tensor:
            matrix, bias = view(layer, "w2", ALL), bias_of(layer, "w2", ALL)
            return second.apply_grouped(matrix, columns.widen(rows), bias, grouping)

        sorting = Sorting(self.moe.num_experts, layer.expert_map, first.route_block)
        return grouped_mixture(
            x,
            weights,
            ids,
            sorting,
            (gate_up, down),
            self.activation,
            layer.apply_router_weight_on_input,
        )


class DenseExpertsMethod(UnquantizedFusedMoEMethod):
    """Experts that are unpacked at load and then are those of an ordinary model."""

    def __init__(self, layer: Any, loader: ExpertLoader, dummy: bool) -> None:
        super().__init__(layer.moe_config)
        self.loader = loader
        self.dummy = dummy

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an unfilled parameter for every packed tensor and every bias."""
        self.sizes = num_experts, hidden_size, intermediate_size_per_partition
        super().create_weights(
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        )
        del layer.w13_weight, layer.w2_weight
        self.loader.register(layer, num_experts)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check and unpack what was loaded, for vLLM's own method; runs again after a reload."""
        self.install(layer, self.prepare(layer))

    def prepare(self, layer: Any) -> dict[str, Tensor]:
        """The weights, by the names of their parameters; raises as `PackedExpertsMethod`."""
        self.loader.finish(layer, self.dummy)
        experts, hidden, inner = self.sizes  # which vLLM may have rounded up
        first, second = self.loader.matrices
        rows = (2 if self.moe.is_act_and_mul else 1) * inner
        prepared = {}
        for matrix, shape in ((first, (rows, hidden)), (second, (hidden, inner))):
            weight = torch.zeros(experts, *shape, dtype=matrix.spec.dtype, device=_device(layer))
            _unpack(layer, matrix, weight, self.loader)
            matrix.release(layer)
            prepared[f"{matrix.name}_weight"] = weight
        return prepared

    def install(self, layer: Any, prepared: Mapping[str, Tensor]) -> None:
        """Put what `prepare` returned in the place of the packed tensors, for vLLM's kernels."""
        for matrix in self.loader.matrices:
            matrix.remove(layer)
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        super().process_weights_after_loading(layer)


class PlainDenseBackend(DenseBackend):
    """As `dense`, for a matrix that is one of many: without vLLM's own layout of weights."""

    def finish(self, layer: torch.nn.Module) -> None:
        """Nothing."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One product by torch."""
        return torch.nn.functional.linear(x, layer.get_parameter("weight"), bias)


def _prepared(
    layer: RoutedExperts, matrix: MatrixParameters, backend: Backend, loader: ExpertLoader
) -> dict[str, Tensor]:
    """What the backend makes of every expert, stacked."""
    stacked: dict[str, Tensor] = {}
    for expert in range(loader.experts):
        where = f"{loader.packed.prefix}, expert {expert} of this rank"
        prepared = backend.prepare(matrix.of_expert(layer, expert), where)
        for name, tensor in prepared.items():
            if name not in stacked:
                stacked[name] = _room(tensor, loader.experts)
            stacked[name][expert] = tensor
    return stacked


def _room(tensor: Tensor, count: int) -> Tensor:
    """Memory for so many tensors like this one, of the kind that weights of its device lie in."""
    shape = (count, *tensor.shape)
    if tensor.device.type != "cpu":
        return tensor.new_empty(shape)
    return WEIGHTS.zeros(count * tensor.nbytes).view(tensor.dtype).view(shape)


def _unpack(
    layer: RoutedExperts, matrix: MatrixParameters, weight: Tensor, loader: ExpertLoader
) -> None:
    """Unpack every expert into `weight` [experts, rows, columns], shard by shard.

    The shards divide the rows of `weight`, which may be larger than those of the checkpoint.
    """
    backend = DenseBackend(matrix.spec)
    sizes = matrix.spec.shard_sizes
    room = weight.shape[1] // len(sizes)
    for expert in range(loader.experts):
        where = f"{loader.packed.prefix}, expert {expert} of this rank"
        found = backend.prepare(matrix.of_expert(layer, expert), where)["weight"]
        found = matrix.columns.crop(found)
        for shard, rows in enumerate(found.split(sizes)):
            start = shard * room
            weight[expert, start : start + rows.shape[0], : rows.shape[1]] = rows


def _device(layer: RoutedExperts) -> torch.device:
    return next(layer.parameters()).device
