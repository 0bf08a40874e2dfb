"""The parameters that packed tensors are loaded into, each knowing how it is sharded."""

from collections.abc import Callable

import torch
from torch import Tensor

from precalib_kernels.format.layout import TensorSpec
from vllm_precalib.compat import vllm_names

with vllm_names():
    from vllm.model_executor.parameter import (
        BasevLLMParameter,
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        ModelWeightParameter,
        PerTensorScaleParameter,
    )


class ColumnScaleParameter(PerTensorScaleParameter):
    """column_scale of a layer: one row per fused shard, [shards, input size of this rank].

    vLLM already puts what belongs to a shard into that shard's row; what is new is that a layer
    sharded along its input takes a slice of the columns.
    """

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take this rank's columns of the stored [1, K]."""
        width = self.data.shape[1]
        super().load_row_parallel_weight(loaded_weight.narrow(1, self.tp_rank * width, width))


def packed_parameter(
    name: str, spec: TensorSpec, shard_count: int, loader: Callable[..., None]
) -> BasevLLMParameter:
    """An unfilled parameter: the packed tensor `name` of a layer fused from `shard_count` shards.

    spec: shape and type on this rank, as `Layout.tensors` gives them for the whole layer.
    """
    if name == "column_scale":
        data = torch.empty(shard_count, spec.shape[1], dtype=spec.dtype)
        return ColumnScaleParameter(data=data, weight_loader=loader)
    data = torch.empty(spec.shape, dtype=spec.dtype)
    if name in ("row_scale", "salient_scale", "salient_offset"):  # [N, 1]
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    # qweight stays a weight to vLLM; the others are per group. Both are cut along N and along K.
    kind = ModelWeightParameter if name == "qweight" else GroupQuantScaleParameter
    return kind(data=data, input_dim=1, output_dim=0, weight_loader=loader)
