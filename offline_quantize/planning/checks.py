"""What can be wrong with a plan: found from headers, before a byte is written."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offline_quantize.checkpoint.safetensors_file import Entry
from offline_quantize.checkpoint.source import CONFIG, Checkpoint
from offline_quantize.planning import families, selection
from precalib_kernels.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from offline_quantize.planning.plan import WeightPlan

MANY_SHARDS = 8  # of a fused layer, of which not all are named in an error


def check_type(path: Path, name: str, entry: Entry, remedy: str = "use --keep") -> None:
    """Raise SourceError for a weight of a type that cannot be quantized."""
    if entry.dtype not in selection.FLOAT_TYPES:
        raise SourceError(
            f"{path}: tensor '{name}' has type {entry.dtype}; only bfloat16, float16 and float32 "
            f"weights can be quantized, so start from the original checkpoint or {remedy}"
        )


def check_family(source: Checkpoint, architectures: Collection[str], head: bool) -> None:
    """Raise SourceError for what vLLM could not serve of a model of these architectures."""
    if reason := families.refused(architectures):
        raise SourceError(
            f"{source.root / CONFIG}: {reason}, which it cannot do with packed ones; "
            "merge the adapter into the model and quantize the result"
        )
    if head and (name := families.unpackable_head(architectures)):
        raise SourceError(
            f"{source.root / CONFIG}: vLLM serves {name} with an unquantized output head only; "
            "leave out --head"
        )


def check_fused(weight_plans: Mapping[str, "WeightPlan"], unquantized: Mapping[str, str]) -> None:
    """Raise RecipeError for shards of one fused layer that are not stored alike."""
    layouts = {plan.module: plan.recipe.layout for plan in weight_plans.values()}
    labels = {plan.module: plan.label for plan in weight_plans.values()}
    others = (selection.module_of(name) for name in unquantized if name.endswith(".weight"))
    for shards in selection.fused_siblings([*layouts, *others]):
        if len({layouts.get(shard) for shard in shards}) > 1:
            told: dict[object, str] = {}  # one for each layout if there are many, as of experts
            for shard in shards:
                key = shard if len(shards) <= MANY_SHARDS else layouts.get(shard)
                told.setdefault(key, f"{shard} ({labels.get(shard, 'kept')})")
            state = ", ".join(told.values())
            raise RecipeError(
                "vLLM computes these as one layer, so they need one recipe or must all be kept; "
                f"widen or narrow --override and --keep: {state}"
            )


def check_collisions(source: Checkpoint, weight_plans: Mapping[str, "WeightPlan"]) -> None:
    """Raise SourceError where a packed tensor would have the name of another tensor."""
    taken = {name for entries in source.shards.values() for name in entries}
    for plan in weight_plans.values():
        for name in plan.outputs():
            if name in taken:
                raise SourceError(
                    f"{source.root / plan.file}: packing '{plan.name}' would make a second "
                    f"tensor '{name}'; leave it with --keep '{re.escape(plan.module)}$'"
                )
