"""Which layers of a model are packed, and how: vLLM's names against those of the checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence

from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.layout import Layout


@dataclasses.dataclass(frozen=True)
class PackedModule:
    """What the checkpoint says about one packed layer.

    layout:      how it is stored.
    layout_name: what the checkpoint calls that layout.
    shards:      the modules it is stored as: one, or one for each matrix vLLM fuses into it.
    """

    layout: Layout
    layout_name: str
    shards: tuple[str, ...]


def find_packed_module(
    checkpoint: CheckpointConfig, fused: Mapping[str, Sequence[str]], prefix: str
) -> PackedModule | None:
    """How vLLM's layer `prefix` is stored; None if it is not packed.

    fused: what the model class fuses, as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.

    Raises ServingError if vLLM fuses the layer from shards that are not stored alike.
    """
    modules, layouts = checkpoint.modules, checkpoint.layouts
    if prefix in modules:
        return PackedModule(layouts[modules[prefix]], modules[prefix], (prefix,))
    parent, dot, name = prefix.rpartition(".")
    shards = tuple(parent + dot + shard for shard in fused.get(name, ()))
    packed = [shard for shard in shards if shard in modules]
    if not packed:
        return None
    layout_name = modules[packed[0]]
    layout = layouts[layout_name]
    if packed != list(shards) or any(layouts[modules[shard]] != layout for shard in shards):
        stored = ", ".join(f"{shard} ({modules.get(shard, 'kept')})" for shard in shards)
        raise ServingError(
            f"{prefix}: vLLM fuses its parts into one matrix, so they must be stored alike, "
            f"but they are not: {stored}; quantize the model again with one recipe for all "
            "of them, or --keep all of them"
        )
    return PackedModule(layout, layout_name, shards)
