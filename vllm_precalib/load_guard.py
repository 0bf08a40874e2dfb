"""The load guard: no packed layer is served unless all of its tensors arrived, whole and sane.

vLLM itself does not notice when a tensor of a quantized layer is missing from the checkpoint, and
its loaders cut what is too large down to size; both would be served as fluent garbage.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.errors import ServingError
from vllm_precalib.column_slice import ColumnSlice
from vllm_precalib.packed_module import PackedModule
from vllm_precalib.row_order import halves_apart

QKV_SHARDS = {"q": 0, "k": 1, "v": 2}


class WeightLoadGuard:
    """Watches the loading of one layer.

    prefix:      the layer's name in vLLM.
    module:      how it is stored.
    columns:     those of this rank.
    output_size: N of the whole layer, as vLLM gives it to create_weights.
    shard_sizes: rows of every fused shard on this rank.
    heads:       in each shard whose rows have to be reordered, see `row_order`.
    """

    def __init__(
        self,
        prefix: str,
        module: PackedModule,
        columns: ColumnSlice,
        output_size: int,
        shard_sizes: Sequence[int],
        heads: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.prefix = prefix
        self.module = module
        self.columns = columns
        self.heads = heads
        self.shard_sizes = shard_sizes
        self.ranks = output_size // sum(shard_sizes)  # that share the rows
        self.filled: dict[str, set[int]] = defaultdict(set)

    def watch(
        self, name: str, layer: torch.nn.Module, loader: Callable[..., None]
    ) -> Callable[..., None]:
        """`loader` for this rank's columns of tensor `name`, with checks around it.

        The result is a method of `layer` like `loader` itself, see below.
        """
        load_shard = loader.__func__ if isinstance(loader, MethodType) else _ignore_self(loader)

        def load(
            layer: torch.nn.Module,
            param: Tensor,
            loaded_weight: Tensor,
            loaded_shard_id: Any = None,
        ) -> None:
            shards = self.shards_of(name, loaded_shard_id)
            self._check_stored(name, loaded_weight, shards, layer)
            shard_id = () if loaded_shard_id is None else (loaded_shard_id,)
            if name != "column_scale" and loaded_shard_id in self.heads:
                loaded_weight = halves_apart(loaded_weight, self.heads[loaded_shard_id])
            loaded_weight = self.columns.cut(name, loaded_weight)
            load_shard(layer, param, loaded_weight, *shard_id)
            self.filled[name].update(shards)

        # Not a closure over `layer`: for reloading vLLM keeps copies of parameters, and it only
        # finds the references to the layer that have to be cut for that in bound methods.
        return MethodType(load, layer)

    def finish(self, names: Sequence[str]) -> None:
        """Raise ServingError naming the first of `names` that did not arrive; then start anew.

        Starting anew is for a reload, which has to bring everything again.
        """
        filled, self.filled = self.filled, defaultdict(set)
        for name, shard in itertools.product(names, range(len(self.shard_sizes))):
            if shard not in filled[name]:
                raise ServingError(
                    f"{self.label(name, shard)} was not in the checkpoint; "
                    "copy the checkpoint again or quantize the model again"
                )

    def label(self, name: str, shard: int | None) -> str:
        """Tensor `name` of a fused shard, the way the checkpoint calls it."""
        shards = self.module.shards
        if len(shards) == 1:
            return f"{shards[0]}.{name}"
        if shard is None or len(shards) != len(self.shard_sizes):
            return f"{self.prefix}.{name}"
        return f"{shards[shard]}.{name}"

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ServingError naming the first scale or offset that is not a finite number."""
        ends = list(itertools.accumulate(self.shard_sizes))
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            row = int((~tensor.isfinite()).any(1).nonzero()[0])
            shard = row if name == "column_scale" else bisect.bisect_right(ends, row)
            raise ServingError(
                f"{self.label(name, shard)} is not finite everywhere; "
                "the checkpoint is damaged, quantize the model again"
            )

    def shards_of(self, name: str, shard_id: Any) -> list[int]:
        """Indices of the fused shards that vLLM's shard id stands for.

        name: of the tensor, for the ServingError that an unknown id raises.
        """
        if shard_id is None:
            return list(range(len(self.shard_sizes)))
        if isinstance(shard_id, tuple):
            return list(shard_id)
        shard = QKV_SHARDS.get(shard_id) if isinstance(shard_id, str) else shard_id
        if shard is None:
            raise ServingError(
                f"{self.label(name, None)}: precalib cannot place the part '{shard_id}' of this "
                "layer; --keep it when quantizing"
            )
        return [shard]

    def _check_stored(
        self, name: str, stored: Tensor, shards: Sequence[int], layer: torch.nn.Module
    ) -> None:
        """Compare a tensor of the checkpoint with what the format says about its whole."""
        rows = self._stored_rows(shards, layer)
        expected = self.module.layout.tensors(rows, self.columns.whole).get(name)
        if expected != (tuple(stored.shape), stored.dtype):
            assert expected is not None
            raise ServingError(
                f"{self.label(name, shards[0] if len(shards) == 1 else None)} is "
                f"{list(stored.shape)} {stored.dtype} in the checkpoint, expected "
                f"{list(expected.shape)} {expected.dtype}; "
                "copy the checkpoint again or quantize the model again"
            )

    def _stored_rows(self, shards: Sequence[int], layer: torch.nn.Module) -> int:
        """Rows that `shards` have in the checkpoint."""
        if vocabulary := getattr(layer, "org_vocab_size", None):
            return int(vocabulary)  # vLLM pads an output head
        # ranks beyond the number of key-value heads hold copies
        copies = getattr(layer, "num_kv_head_replicas", 1)
        return sum(self.shard_sizes[p] * self.ranks // (copies if p else 1) for p in shards)


def _ignore_self(loader: Callable[..., None]) -> Callable[..., None]:
    return lambda _layer, *args: loader(*args)
