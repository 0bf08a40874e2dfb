"""vLLM's method for a layer of packed experts.

There are two: experts that stay packed are computed one after the other, only those that have
rows; experts that are unpacked at load are computed by vLLM's own kernels.
"""

import dataclasses
from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from vllm_precalib.backends import Options, choose, plugin_registry
from vllm_precalib.compat import vllm_names
from vllm_precalib.dense_backend import DenseBackend
from vllm_precalib.experts import op
from vllm_precalib.experts.activation import activation_of
from vllm_precalib.experts.mixture import mixture
from vllm_precalib.experts.packed_experts import (
    GATE_UP,
    ExpertMatrix,
    PackedExperts,
    find_packed_experts,
)
from vllm_precalib.experts.parameters import ExpertLoader, MatrixParameters, check_columns

with vllm_names():
    from vllm.config import VllmConfig, get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.utils import set_weight_attrs
    from vllm.platforms import current_platform


def experts_method(
    checkpoint: CheckpointConfig,
    layer: Any,
    prefix: str,
    registry: BackendRegistry | None,
    choices: MutableMapping[str, BackendChoice],
) -> FusedMoEMethodBase | None:
    """The method for the experts `prefix`; None if they are not packed.

    registry: backends to choose from, None for the plugin's own.
    choices:  gets the choice for each of the two matrices, under "PREFIX.w13" and "PREFIX.w2".

    Raises ServingError for experts that cannot be served.
    """
    packed = find_packed_experts(
        checkpoint,
        prefix,
        layer.moe_config.num_logical_experts,
        layer.ckpt_gate_proj_name,
        layer.ckpt_up_proj_name,
        layer.ckpt_down_proj_name,
    )
    if packed is None:
        return None
    config = get_current_vllm_config()
    options = Options.parse(config.additional_config)
    matrices = matrices_of(layer, packed, options)
    check_columns(matrices[1].spec, matrices[1].ranks, prefix)
    backends: list[type[Backend]] = []
    for matrix in matrices:
        name = f"{prefix}.{matrix.name}"
        choice = choose(
            matrix.spec, options, registry or plugin_registry(), name, matrix.stored.layout_name
        )
        choices[name] = choice
        backends.append(choice.backend)
    loader = ExpertLoader(packed, matrices)
    dummy = config.load_config.load_format == "dummy"
    dense = all(backend is DenseBackend for backend in backends)
    _check_options(layer, prefix, config, dense)
    # vLLM's kernels for CPUs take every expert for one of this rank's
    if dense and not (current_platform.is_cpu() and layer._expert_map is not None):
        return DenseExpertsMethod(layer, loader, dummy)
    return PackedExpertsMethod(layer, loader, dummy, backends)


def matrices_of(
    layer: RoutedExperts, packed: PackedExperts, options: Options
) -> tuple[MatrixParameters, MatrixParameters]:
    """The two matrices of `layer` on this rank."""
    moe = layer.moe_config
    inner, hidden = moe.intermediate_size_per_partition, moe.hidden_dim

    def spec(stored: ExpertMatrix, inputs: int, shards: tuple[int, ...]) -> LinearSpec:
        return LinearSpec(
            stored.layout,
            inputs,
            shards,
            moe.in_dtype,
            current_platform.device_type,
            experts=moe.num_local_experts,
            int8_activations=options.int8_activations,
        )

    fused = packed.gate_up.shards == (GATE_UP,)
    shards = (2 * inner,) if fused else (inner,) * len(packed.gate_up.shards)
    gate_up, down = packed.gate_up, packed.down
    place = moe.tp_rank, moe.tp_size
    return (
        MatrixParameters("w13", gate_up, spec(gate_up, hidden, shards), True, *place),
        MatrixParameters("w2", down, spec(down, inner, (hidden,)), False, *place),
    )


def _check_options(layer: RoutedExperts, prefix: str, config: VllmConfig, dense: bool) -> None:
    """Raise ServingError for what vLLM was asked to do and cannot do with packed experts."""
    gpu = not current_platform.is_cpu()
    if layer.moe_config.is_lora_enabled and not (dense and gpu):
        raise ServingError(
            f"{prefix}: vLLM adds LoRA adapters to experts inside kernels of its own for GPUs, so "
            "packed experts cannot have adapters; serve without --enable-lora, or on a GPU with "
            'the backend "dense"'
        )
    if layer.moe_config.moe_parallel_config.enable_eplb and not dense:
        raise ServingError(
            f"{prefix}: packed experts cannot be moved between ranks; leave out --enable-eplb, or "
            'use the backend "dense"'
        )
    if layer.expert_map_manager.num_fused_shared_experts:
        raise ServingError(
            f"{prefix}: precalib cannot serve shared experts that vLLM fuses into the routed ones; "
            r"quantize the model again with --keep '\.experts\.'"
        )
    if gpu and not dense and not config.model_config.enforce_eager:
        raise ServingError(
            f"{prefix}: experts that stay packed are computed one after the other on a GPU, which "
            'no CUDA graph can record; use the backend "dense", or --enforce-eager'
        )


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
        self.loader.finish(layer, self.dummy)
        for matrix, backend in zip(self.loader.matrices, self.backends, strict=True):
            prepared = _prepared(layer, matrix, backend, self.loader)
            matrix.remove(layer)
            for name, tensor in prepared.items():
                parameter = Parameter(tensor, requires_grad=False)
                layer.register_parameter(matrix.parameter_name(name), parameter)

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
        local = ids if layer.expert_map is None else layer.expert_map[ids.long()]
        first, second = self.backends

        def of_expert(expert: int, rows: Tensor) -> Tensor:
            inner = first.apply(_view(layer, "w13", expert), rows, _bias(layer, "w13", expert))
            inner = self.activation(inner).to(rows.dtype)
            return second.apply(_view(layer, "w2", expert), inner, _bias(layer, "w2", expert))

        count = self.moe.num_local_experts
        return mixture(x, weights, local, count, of_expert, layer.apply_router_weight_on_input)


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
        self.loader.finish(layer, self.dummy)
        experts, hidden, inner = self.sizes  # which vLLM may have rounded up
        first, second = self.loader.matrices
        rows = (2 if self.moe.is_act_and_mul else 1) * inner
        for matrix, shape in ((first, (rows, hidden)), (second, (hidden, inner))):
            weight = torch.zeros(experts, *shape, dtype=matrix.spec.dtype, device=_device(layer))
            _unpack(layer, matrix, weight, self.loader)
            matrix.remove(layer)
            layer.register_parameter(
                f"{matrix.name}_weight", Parameter(weight, requires_grad=False)
            )
        super().process_weights_after_loading(layer)


class PlainDenseBackend(DenseBackend):
    """As `dense`, for a matrix that is one of many: without vLLM's own layout of weights."""

    def finish(self, layer: torch.nn.Module) -> None:
        """Nothing."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One product by torch."""
        return torch.nn.functional.linear(x, layer.get_parameter("weight"), bias)


@dataclasses.dataclass(frozen=True)
class ExpertView:
    """The parameters of one matrix of one expert, found as a backend finds them in a layer."""

    layer: RoutedExperts
    matrix: str
    expert: int

    def get_parameter(self, name: str) -> Tensor:
        """What `Backend.prepare` returned under this name."""
        return cast(Tensor, getattr(self.layer, f"{self.matrix}_{name}")[self.expert])

    __getattr__ = get_parameter


def _view(layer: RoutedExperts, matrix: str, expert: int) -> torch.nn.Module:
    return cast(torch.nn.Module, ExpertView(layer, matrix, expert))


def _bias(layer: RoutedExperts, matrix: str, expert: int) -> Tensor | None:
    biases = getattr(layer, f"{matrix}_bias", None)
    return None if biases is None else biases[expert]


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
                stacked[name] = tensor.new_empty((loader.experts, *tensor.shape))
            stacked[name][expert] = tensor
    return stacked


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
        for shard, rows in enumerate(found.split(sizes)):
            start = shard * room
            weight[expert, start : start + rows.shape[0], : rows.shape[1]] = rows


def _device(layer: RoutedExperts) -> torch.device:
    return next(layer.parameters()).device
