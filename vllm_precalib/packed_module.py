"""`PackedModule`: how one packed layer is stored."""

import dataclasses

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
