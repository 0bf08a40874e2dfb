"""How the experts of one layer are stored: vLLM's names against those of the checkpoint."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from precalib_kernels.errors import ServingError
from precalib_kernels.format.checkpoint_config import CheckpointConfig
from precalib_kernels.format.layout import Layout

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

GATE_UP = "gate_up_proj"  # gate and up in one matrix, as gpt-oss has them
LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ExpertMatrix:
    """One of the two matrices that vLLM keeps of every expert.

    layout, layout_name: how it is stored, and what the checkpoint calls that.
    shards: names of the modules it is fused from: gate and up of the first matrix.
    """

    layout: Layout
    layout_name: str
    shards: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """What the checkpoint says about the experts of one layer.

    prefix:  the layer's name in vLLM.
    count:   number of experts.
    gate_up: the matrix before the activation;  down: the one after it.
    """

    prefix: str
    count: int
    gate_up: ExpertMatrix
    down: ExpertMatrix

    def label(self, expert: int, shard: str, tensor: str) -> str:
        """A packed tensor, the way the checkpoint calls it."""
        return f"{self.prefix}.{expert}.{shard}.{tensor}"


def find_packed_experts(
    checkpoint: CheckpointConfig,
    prefix: str,
    count: int,
    gate: str,
    up: str | None,
    down: str,
) -> PackedExperts | None:
    """How the experts of vLLM's layer `prefix` are stored; None if they are not packed.

    count:          number of experts in the checkpoint.
    gate, up, down: what the model calls an expert's modules; up is None without a gate.

    Raises ServingError unless all experts are packed, and stored alike, or if there are packed ones
    of this layer under another name.
    """
    stored = _by_expert(checkpoint.modules, prefix)
    if not stored:
        _check_names(checkpoint.modules, prefix)
        return None
    first = stored.get(0, {})
    split = (gate,) if up is None else (gate, up)
    gate_up = (GATE_UP,) if GATE_UP in first else split
    for expert in range(count):
        for leaf in (*gate_up, down):
            if leaf not in stored.get(expert, {}):
                raise ServingError(
                    f"{prefix}: expert {expert} has no packed '{leaf}' in config.json, but others "
                    "are packed, and vLLM computes all experts of a layer alike; "
                    r"quantize the model again, or keep all of them with --keep '\.experts\.'"
                )
    if extra := sorted(set(stored) - set(range(count))):
        raise ServingError(
            f"{prefix}: the checkpoint has a packed expert {extra[0]}, but the model's "
            f"configuration tells of {count}; copy the checkpoint again"
        )
    matrices = [_matrix(checkpoint, prefix, stored, shards) for shards in (gate_up, (down,))]
    return PackedExperts(prefix, count, *matrices)


def expert_names(checkpoint: CheckpointConfig) -> "WeightsMapper":
    """New names for packed tensors of experts whose gate and up are one matrix.

    "….experts.3.gate_up_proj.scales" lies in vLLM's module "….experts.routed_experts".
    """
    from vllm.model_executor.models.utils import WeightsMapper

    end = f".{GATE_UP}"
    if not any(EXPERT.search(module) and module.endswith(end) for module in checkpoint.modules):
        return WeightsMapper()
    return WeightsMapper(orig_to_new_regex={EXPERT: r".experts.routed_experts.\1."})


def _by_expert(modules: Mapping[str, str], prefix: str) -> dict[int, dict[str, str]]:
    """Layout name of each module of each expert below `prefix`."""
    found: dict[int, dict[str, str]] = {}
    start = f"{prefix}."
    for module, layout_name in modules.items():
        if module.startswith(start):
            number, _, leaf = module.removeprefix(start).partition(".")
            if number.isdecimal():
                found.setdefault(int(number), {})[leaf] = layout_name
    return found


def _check_names(modules: Iterable[str], prefix: str) -> None:
    """Raise ServingError if experts of this layer are packed, but vLLM calls them otherwise."""
    layer = LAYER.search(prefix)
    for module in modules:
        found = LAYER.search(module)
        if layer and found and found[0] == layer[0] and EXPERT.search(module):
            raise ServingError(
                f"{prefix}: the checkpoint has packed experts of this layer under another name, "
                f"{module}, which precalib cannot serve; "
                r"quantize the model again with --keep '\.experts\.'"
            )


def _matrix(
    checkpoint: CheckpointConfig,
    prefix: str,
    stored: Mapping[int, Mapping[str, str]],
    shards: Sequence[str],
) -> ExpertMatrix:
    layouts = checkpoint.layouts
    layout_name = stored[0][shards[0]]
    for expert, leaves in stored.items():
        for shard in shards:
            if layouts[leaves[shard]] != layouts[layout_name]:
                raise ServingError(
                    f"{prefix}: vLLM computes all experts of a layer alike, so they must be "
                    f"stored alike, but 0.{shards[0]} ({layout_name}) and {expert}.{shard} "
                    f"({leaves[shard]}) are not; quantize the model again with one recipe for them"
                )
    return ExpertMatrix(layouts[layout_name], layout_name, tuple(shards))
