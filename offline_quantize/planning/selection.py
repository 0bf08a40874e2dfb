"""Which tensors of a checkpoint are quantized: by name, shape and type, with no model class.

Nothing here needs files, so the same choice can be made from headers or from tensors in memory.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from offline_quantize.checkpoint.source import whole_number
from offline_quantize.planning.families import rewritten
from offline_quantize.planning.vllm_models import FUSED
from precalib_kernels.format.layout import COLUMN_UNIT

FLOAT_TYPES = ("BF16", "F16", "F32")  # as safetensors calls them
_HEADS = "lm_head|output_head|embed_out"
HEAD = re.compile(rf"(?:^|\.)(?:{_HEADS})$")
EMBEDDINGS = re.compile(r"^(?:model\.)?embed_tokens$")
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# (what it is, pattern searched in the module name), first match wins
UNQUANTIZED = (
    ("output head", re.compile(rf"(?:^|\.)(?:{_HEADS}|score)$")),
    ("embedding", re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)(?:$|\.)")),
    ("norm", re.compile(r"(?:^|\.)(?:\w*norm\w*|ln_?\w*)(?:$|\.)")),
    ("router or gate", re.compile(r"(?:^|\.)(?:gate|\w*router|\w*expert_gate)(?:$|\.)")),
    (
        "vision or audio tower",
        re.compile(
            r"(?:^|\.)(?:\w*vis(?:ion|ual)\w*|\w*image\w*|\w*audio\w*|\w*speech\w*|multi_modal\w*"
            r"|mm_\w+|\w*vit|vpm|apm|sam_model|siglip\w*|clip\w*)\."
        ),
    ),
    ("multi-token prediction head", re.compile(r"(?:^|\.)(?:mtp\w*|nextn\w*|eh_proj)(?:$|\.)")),
)
EXPERT_INDEX = re.compile(r"\.experts\.\d+\.")


def classify(
    name: str,
    shape: Sequence[int],
    dtype: str,
    depth: int | None,
    keep: Sequence[re.Pattern[str]] = (),
    head: bool = False,
    embeddings: bool = False,
    architectures: Collection[str] = (),
) -> str | None:
    """Why a tensor stays unquantized; None for a linear weight that is to be quantized.

    shape: [outputs, inputs] of a linear weight.
    dtype: as safetensors calls it. One that is not in FLOAT_TYPES is for the caller to refuse.
    depth: number of decoder layers (`decoder_depth`), None if unknown.
    keep:  the user's patterns, searched in the module name.
    head:  whether the output head is to be quantized; embeddings: whether those of the input are.
    architectures: of the model (`families.architectures_of`).
    """
    module = module_of(name)
    if not name.endswith(".weight") or len(shape) != 2:
        return "not a linear weight"
    if not all(shape):
        return "empty"
    wanted = (head and HEAD.search(module)) or (embeddings and EMBEDDINGS.search(module))
    if not wanted:
        for kind, pattern in UNQUANTIZED:
            if pattern.search(module):
                return kind
        layer = LAYER.search(name)
        if layer is None:
            return "outside the decoder layers"
        if depth is not None and int(layer[1]) >= depth:
            return "multi-token prediction head"  # DeepSeek stores it as a layer past the last
    if any(pattern.search(module) for pattern in keep):
        return "--keep"
    if what := rewritten(architectures, module):
        return f"vLLM {what}"
    if dtype in FLOAT_TYPES and shape[1] % COLUMN_UNIT:
        return f"input size {shape[1]} is not a multiple of {COLUMN_UNIT}"
    return None


def too_narrow(columns: int, group_size: int) -> str | None:
    """Why a weight with so many inputs stays unquantized under a recipe; None if it fits."""
    if columns < group_size:
        return f"its {columns} inputs are fewer than a group of {group_size}"
    return None


def decoder_depth(*configs: Mapping[str, Any]) -> int | None:
    """Number of decoder layers, from the first of the configurations that tells one."""
    for config in configs:
        if "num_hidden_layers" in config:
            return whole_number(config, "num_hidden_layers")
    return None


def within_decoder(name: str) -> str | None:
    """A name from its layer's number on, "3.mlp.up_proj.weight"; None outside of layers."""
    match = LAYER.search(name)
    return name[match.start(1) :] if match else None


def module_of(name: str) -> str:
    """Name of the module that owns a tensor."""
    return name.rpartition(".")[0]


def fused_siblings(modules: Iterable[str]) -> Iterator[list[str]]:
    """Sets of the given modules that vLLM fuses into one layer, so that they are stored alike.

    It does so with the same matrix of all experts, too.
    """
    by_parent: dict[str, dict[str, list[str]]] = {}
    for module in modules:
        parent, _, leaf = EXPERT_INDEX.sub(".experts.*.", module).rpartition(".")
        by_parent.setdefault(parent, {}).setdefault(leaf, []).append(module)
    for leaves in by_parent.values():
        sets: list[list[str]] = []
        for group in FUSED:
            present = [leaf for leaf in group if leaf in leaves]
            if len(present) < 2:
                continue
            for other in [known for known in sets if not set(known).isdisjoint(present)]:
                sets.remove(other)
                present = list(dict.fromkeys(other + present))
            sets.append(present)
        fused = {leaf for siblings in sets for leaf in siblings}
        sets += [[leaf] for leaf, same in leaves.items() if len(same) > 1 and leaf not in fused]
        for siblings in sets:
            yield [module for leaf in siblings for module in leaves[leaf]]


def expert_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Those of the given names that are of experts, by the layer whose experts they are."""
    layers: dict[str, list[str]] = {}
    for name in names:
        if match := EXPERT_INDEX.search(name):
            layers.setdefault(name[: match.start()], []).append(name)
    return layers
