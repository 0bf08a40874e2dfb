"""The fill guard: no packed layer is served unless all of its tensors arrived, whole and sane.

vLLM itself does not notice when a tensor of a quantized layer is missing from the checkpoint, and
its loaders cut what is too large down to size; both would be served as fluent garbage.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.errors import ServingError
from vllm_precalib.config import PackedModule

QKV_PARTS = {"q": 0, "k": 1, "v": 2}


class FillGuard:
    """Watches the loading of one layer.

    prefix:      the layer's name in vLLM.
    module:      how it is stored.
    input_size:  K of the whole layer.
    output_size: N of the whole layer, as vLLM gives it to create_weights.
    part_sizes:  rows of every fused part on this rank.
    """

    def __init__(
        self,
        prefix: str,
        module: PackedModule,
        input_size: int,
        output_size: int,
        part_sizes: Sequence[int],
    ) -> None:
        self.prefix = prefix
        self.module = module
        self.input_size = input_size
        self.part_sizes = part_sizes
        self.ranks = output_size // sum(part_sizes)  # that share the rows
        self.filled: dict[str, set[int]] = defaultdict(set)

    def watch(
        self, name: str, layer: torch.nn.Module, loader: Callable[..., None]
    ) -> Callable[..., None]:
        """`loader` with the checks of tensor `name` around it.

        The result is a method of `layer`, not a closure over it: vLLM keeps parameters for
        reloading and cuts their references to the layer where it finds them in methods.
        """
        load_part = loader.__func__ if isinstance(loader, MethodType) else _ignore_self(loader)

        def load(
            layer: torch.nn.Module,
            param: Tensor,
            loaded_weight: Tensor,
            loaded_shard_id: Any = None,
        ) -> None:
            parts = self._parts(name, loaded_shard_id)
            self._check_stored(name, loaded_weight, parts, layer)
            shard = () if loaded_shard_id is None else (loaded_shard_id,)
            load_part(layer, param, loaded_weight, *shard)
            self.filled[name].update(parts)

        return MethodType(load, layer)

    def finish(self, names: Sequence[str]) -> None:
        """Raise ServingError naming the first of `names` that did not arrive; then start anew.

        Starting anew is for a reload, which has to bring everything again.
        """
        filled, self.filled = self.filled, defaultdict(set)
        for name, part in itertools.product(names, range(len(self.part_sizes))):
            if part not in filled[name]:
                raise ServingError(
                    f"{self.label(name, part)} was not in the checkpoint; "
                    "copy the checkpoint again or quantize the model again"
                )

    def label(self, name: str, part: int | None) -> str:
        """Tensor `name` of a fused part, the way the checkpoint calls it."""
        parts = self.module.parts
        if len(parts) == 1:
            return f"{parts[0]}.{name}"
        if part is None or len(parts) != len(self.part_sizes):
            return f"{self.prefix}.{name}"
        return f"{parts[part]}.{name}"

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ServingError naming the first scale or offset that is not a finite number."""
        ends = list(itertools.accumulate(self.part_sizes))
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            row = int((~tensor.isfinite()).any(1).nonzero()[0])
            part = row if name == "column_scale" else bisect.bisect_right(ends, row)
            raise ServingError(
                f"{self.label(name, part)} is not finite everywhere; "
                "the checkpoint is damaged, quantize the model again"
            )

    def _parts(self, name: str, shard: Any) -> list[int]:
        """Indices of the fused parts that vLLM's shard id stands for."""
        if shard is None:
            return list(range(len(self.part_sizes)))
        if isinstance(shard, tuple):
            return list(shard)
        part = QKV_PARTS.get(shard) if isinstance(shard, str) else shard
        if part is None:
            raise ServingError(
                f"{self.label(name, None)}: precalib cannot place the part '{shard}' of this "
                "layer; --keep it when quantizing"
            )
        return [part]

    def _check_stored(
        self, name: str, stored: Tensor, parts: Sequence[int], layer: torch.nn.Module
    ) -> None:
        """Compare a tensor of the checkpoint with what the format says about its whole."""
        rows = self._stored_rows(parts, layer)
        expected = self.module.layout.tensors(rows, self.input_size).get(name)
        if expected != (tuple(stored.shape), stored.dtype):
            assert expected is not None
            raise ServingError(
                f"{self.label(name, parts[0] if len(parts) == 1 else None)} is "
                f"{list(stored.shape)} {stored.dtype} in the checkpoint, expected "
                f"{list(expected.shape)} {expected.dtype}; "
                "copy the checkpoint again or quantize the model again"
            )

    def _stored_rows(self, parts: Sequence[int], layer: torch.nn.Module) -> int:
        """Rows that `parts` have in the checkpoint."""
        if vocabulary := getattr(layer, "org_vocab_size", None):
            return vocabulary  # vLLM pads an output head
        # ranks beyond the number of key-value heads hold copies
        copies = getattr(layer, "num_kv_head_replicas", 1)
        return sum(self.part_sizes[p] * self.ranks // (copies if p else 1) for p in parts)


def _ignore_self(loader: Callable[..., None]) -> Callable[..., None]:
    return lambda _layer, *args: loader(*args)
