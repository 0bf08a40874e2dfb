"""The parameters that packed tensors are loaded into, each knowing how it is sharded."""

from collections.abc import Callable

import torch

from precalib_kernels.format.layout import TensorSpec
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.parameter import (
        BasevLLMParameter,
        ChannelQuantScaleParameter,
        PerTensorScaleParameter,
    )


def packed_parameter(
    name: str, spec: TensorSpec, shard_count: int, loader: Callable[..., None]
) -> BasevLLMParameter:
    """An unfilled parameter: the packed tensor `name` of a layer fused from `shard_count` shards.

    spec: shape and type on this rank, as `Layout.tensors` gives them for the whole layer.
    """
    if name == "column_scale":
        data = torch.empty(shard_count, spec.shape[1], dtype=spec.dtype)
        # vLLM puts what belongs to a shard into that shard's row
        return PerTensorScaleParameter(data=data, weight_loader=loader)
    # vLLM cuts all others along N; columns are cut before it loads them
    data = torch.empty(spec.shape, dtype=spec.dtype)
    return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
