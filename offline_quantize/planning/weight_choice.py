"""Which weights of a checkpoint are quantized, matrices in 3-D tensors of experts included."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from offline_quantize.checkpoint.expert_slices import slice_entries
from offline_quantize.checkpoint.safetensors_file import Entry
from offline_quantize.checkpoint.source import Checkpoint
from offline_quantize.planning import selection
from offline_quantize.planning.expert_tensors import (
    KEPT,
    find_expert_tensors,
    is_like_experts,
)
from precalib_kernels.errors import RecipeError
from precalib_kernels.format.expert_tensors import ExpertTensor


@dataclasses.dataclass
class WeightChoice:
    """What happens to each weight, the matrices in 3-D tensors of experts among them.

    wanted:      file and entry of each weight to quantize, by name.
    unquantized: why each other one stays as it is, by name.
    tensors:     what the 3-D tensors of experts are, by name.
    owner:       the tensor of the checkpoint that a weight is, or is a part of, by name.
    """

    wanted: dict[str, tuple[str, Entry]]
    unquantized: dict[str, str]
    tensors: Mapping[str, ExpertTensor]
    owner: Mapping[str, str]

    @property
    def unquantized_names(self) -> list[str]:
        """What patterns may match of what stays: weights, and 3-D tensors as if they were one."""
        like = {f"{name}.weight" for name in self.unquantized if not name.endswith(".weight")}
        return [*self.unquantized, *sorted(like)]

    def by_tensor(self) -> tuple[dict[str, str], dict[str, ExpertTensor]]:
        """Why tensors of the checkpoint stay, and the 3-D tensors that are packed, by name.

        All matrices of a 3-D tensor must be wanted, or none.
        """
        reasons: dict[str, str] = {}
        for name, reason in self.unquantized.items():
            reasons.setdefault(self.owner.get(name, name), reason)
        return reasons, {name: t for name, t in self.tensors.items() if name not in reasons}


def choose_weights(
    source: Checkpoint,
    keep: Sequence[re.Pattern[str]],
    head: bool,
    embeddings: bool,
    architectures: Collection[str],
) -> WeightChoice:
    """Decide about every tensor; arguments as those of `selection.classify`.

    Experts of one layer are quantized all or not at all, as vLLM computes them alike.

    Raises RecipeError if patterns keep some of them only.
    """
    depth = selection.decoder_depth(source.text_config, source.config)
    every = {name: location.entry for name, location in source.locations.items()}
    tensors = find_expert_tensors(every, source.text_config.get("model_type"))
    files: dict[str, tuple[str, Entry]] = {}
    owner: dict[str, str] = {}
    reasons: dict[str, str | None] = {}
    for file, entries in source.shards.items():
        for name, entry in entries.items():
            inside = slice_entries(entry, tensors[name]) if name in tensors else {name: entry}
            for weight, part in inside.items():
                files[weight], owner[weight] = (file, part), name
                reasons[weight] = selection.classify(
                    weight, part.shape, part.dtype, depth, keep, head, embeddings, architectures
                )
            if name not in tensors and is_like_experts(name, entry):
                kept = any(pattern.search(name) for pattern in keep)
                reasons[name] = "--keep" if kept else KEPT
    _treat_experts_alike(reasons)
    return WeightChoice(
        {weight: files[weight] for weight, reason in reasons.items() if reason is None},
        {weight: reason for weight, reason in reasons.items() if reason is not None},
        tensors,
        owner,
    )


def _treat_experts_alike(reasons: dict[str, str | None]) -> None:
    """Keep all experts of a layer of which one is kept. Raises RecipeError if a pattern keeps it.

    reasons: why each tensor is kept, None for one that is not, by name.
    """
    matrices = [name for name in reasons if not name.endswith(".bias")]
    for weights in selection.expert_layers(matrices).values():
        kept = {weight: reasons[weight] for weight in weights if reasons[weight] is not None}
        if not kept or len(kept) == len(weights):
            continue
        first, reason = next(iter(kept.items()))
        other = next(weight for weight in weights if reasons[weight] is None)
        if reason == "--keep":
            raise RecipeError(
                "vLLM computes all experts of a layer alike, so all of them are packed or none; "
                f"widen or narrow --keep, which takes {first} but not {other}"
            )
        for weight in weights:
            if reasons[weight] is None:
                reasons[weight] = f"beside an expert that stays: {reason}"


def unknown_experts(unquantized: Mapping[str, str]) -> list[str]:
    """Tensors that look as if they held experts, and stay as they are because of their form."""
    return [name for name, reason in unquantized.items() if reason == KEPT]
