"""The method and the backends for a layer of packed experts."""

import dataclasses
from collections.abc import MutableMapping
from typing import Any

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.registry import BackendChoice, BackendRegistry
from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from vllm_precalib.backends import Options, choose, plugin_registry
from vllm_precalib.column_slice import ColumnSlice
from vllm_precalib.compat import vllm_names
from vllm_precalib.dense_backend import DenseBackend
from vllm_precalib.experts.method import DenseExpertsMethod, PackedExpertsMethod, grouped
from vllm_precalib.experts.packed_experts import (
    GATE_UP,
    ExpertMatrix,
    PackedExperts,
    find_packed_experts,
)
from vllm_precalib.experts.parameters import ExpertLoader, MatrixParameters

with vllm_names():
    from vllm.config import VllmConfig, get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
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
    chosen = choose_backends(layer, packed, registry, choices)
    arguments = layer, chosen.loader, chosen.dummy
    if chosen.dense:
        return DenseExpertsMethod(*arguments)
    return PackedExpertsMethod(*arguments, chosen.backends)


@dataclasses.dataclass(frozen=True)
class ExpertBackends:
    """What is needed to make the method of a layer of experts.

    loader:   of the packed tensors.
    dummy:    whether vLLM fills them with random bytes.
    backends: for the two matrices.
    dense:    whether vLLM's own kernels compute them, unpacked.
    """

    loader: ExpertLoader
    dummy: bool
    backends: list[type[Backend]]
    dense: bool


def choose_backends(
    layer: Any,
    packed: PackedExperts,
    registry: BackendRegistry | None,
    choices: MutableMapping[str, BackendChoice],
) -> ExpertBackends:
    """The backends of both matrices of `layer`; arguments and errors as of `experts_method`."""
    prefix = packed.prefix
    config = get_current_vllm_config()
    options = Options.parse(config.additional_config)
    matrices = matrices_of(layer, packed, options)
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
    _check_options(layer, prefix, config, dense, grouped(backends))
    # vLLM's kernels for CPUs take every expert for one of this rank's
    of_vllm = dense and not (current_platform.is_cpu() and layer._expert_map is not None)
    return ExpertBackends(loader, dummy, backends, of_vllm)


def stay_packed(layer: Any, packed: PackedExperts, registry: BackendRegistry | None) -> bool:
    """Whether a backend computes one of the matrices packed, or the user asked for none that does.

    Raises ServingError if no backend can run.
    """
    options = Options.parse(get_current_vllm_config().additional_config)
    if options.backend is not None:
        return True
    known = registry or plugin_registry()
    matrices = matrices_of(layer, packed, options)
    return any(known.choose(matrix.spec).backend is not DenseBackend for matrix in matrices)


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
    all_columns = ColumnSlice.of_rank(gate_up.layout, hidden, hidden, 0)
    columns = ColumnSlice.of_rank(down.layout, inner * moe.tp_size, inner, moe.tp_rank)
    first, second = spec(gate_up, hidden, shards), spec(down, columns.columns, (hidden,))
    return (
        MatrixParameters("w13", gate_up, first, all_columns, True, *place),
        MatrixParameters("w2", down, second, columns, False, *place),
    )


def _check_options(
    layer: RoutedExperts, prefix: str, config: VllmConfig, dense: bool, grouped: bool
) -> None:
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
    if gpu and not dense and not grouped and not config.model_config.enforce_eager:
        raise ServingError(
            f"{prefix}: this backend computes experts that stay packed one after the other, which "
            'no CUDA graph can record; use the backend "dense", or --enforce-eager'
        )
