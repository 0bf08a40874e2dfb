"""Which tensors of a checkpoint are quantized: by name and shape, with no model class."""

import re
from collections.abc import Iterable, Iterator

from offline_quantize.checkpoint.safetensors_file import Entry
from offline_quantize.checkpoint.source import Checkpoint
from precalib_kernels.format.layout import COLUMN_UNIT

FLOAT_TYPES = ("BF16", "F16", "F32")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|output_head|embed_out)$")
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# (what it is, pattern searched in the module name), first match wins
KEPT = (
    ("output head", re.compile(r"(?:^|\.)(?:lm_head|output_head|embed_out|score)$")),
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
EXPERT = re.compile(r"\.experts\.")
EXPERT_INDEX = re.compile(r"\.experts\.\d+\.")


def why_kept(
    source: Checkpoint, name: str, entry: Entry, keep: list[re.Pattern[str]], head: bool = False
) -> str:
    """Why a tensor stays as it is, or "" if it is a linear weight to quantize.

    keep: the user's patterns, searched in the module name.
    head: whether the output head is to be quantized.
    """
    module = module_of(name)
    if not name.endswith(".weight") or len(entry.shape) != 2:
        return "not a linear weight"
    if not entry.weights:
        return "empty"
    if head and HEAD.search(module):
        return _why_unfit(module, entry, keep)
    for kind, pattern in KEPT:
        if pattern.search(module):
            return kind
    layer = LAYER.search(name)
    if layer is None:
        return "outside the decoder layers"
    depth = source.text_config.get("num_hidden_layers", source.config.get("num_hidden_layers"))
    if isinstance(depth, int) and int(layer[1]) >= depth:
        return "multi-token prediction head"  # DeepSeek stores it as a layer past the last
    return _why_unfit(module, entry, keep)


def _why_unfit(module: str, entry: Entry, keep: list[re.Pattern[str]]) -> str:
    if any(pattern.search(module) for pattern in keep):
        return "--keep"
    if entry.dtype in FLOAT_TYPES and entry.shape[1] % COLUMN_UNIT:
        return f"input size {entry.shape[1]} is not a multiple of {COLUMN_UNIT}"
    return ""


def module_of(name: str) -> str:
    """Name of the module that owns a tensor."""
    return name.rpartition(".")[0]


# Linear layers that vLLM computes as one: their parts must be stored alike.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)


def fused_siblings(modules: Iterable[str]) -> Iterator[list[str]]:
    """Sets of the given modules that vLLM fuses into one layer."""
    by_parent: dict[str, set[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        by_parent.setdefault(parent, set()).add(leaf)
    for parent, leaves in by_parent.items():
        for group in FUSED:
            if len(present := [leaf for leaf in group if leaf in leaves]) > 1:
                yield [f"{parent}.{leaf}" for leaf in present]
