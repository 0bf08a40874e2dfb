"""Which tensors of a checkpoint are quantized: by name, shape and type, with no model class.

Nothing here needs files, so the same choice can be made from headers or from tensors in memory.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from precalib_kernels.format.layout import COLUMN_UNIT

FLOAT_TYPES = ("BF16", "F16", "F32")  # as safetensors calls them
_HEADS = "lm_head|output_head|embed_out"
HEAD = re.compile(rf"(?:^|\.)(?:{_HEADS})$")
EMBEDDINGS = re.compile(r"^(?:model\.)?embed_tokens$")
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Model types whose embeddings vLLM hands to a quantization method.
EMBEDDING_MODELS = frozenset(
    (
        *("llama", "mistral", "phi3", "granite", "exaone4"),
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma3_text", "stablelm", "deepseek_v2"),
        "deepseek_v3",
    )
)
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
) -> str | None:
    """Why a tensor stays unquantized; None for a linear weight that is to be quantized.

    shape: [outputs, inputs] of a linear weight.
    dtype: as safetensors calls it. One that is not in FLOAT_TYPES is for the caller to refuse.
    depth: number of decoder layers (`decoder_depth`), None if unknown.
    keep:  the user's patterns, searched in the module name.
    head:  whether the output head is to be quantized; embeddings: whether those of the input are.
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
    if dtype in FLOAT_TYPES and shape[1] % COLUMN_UNIT:
        return f"input size {shape[1]} is not a multiple of {COLUMN_UNIT}"
    return None


def decoder_depth(*configs: Mapping[str, Any]) -> int | None:
    """Number of decoder layers, from the first of the configurations that tells one."""
    for config in configs:
        if "num_hidden_layers" in config:
            depth = config["num_hidden_layers"]
            return depth if isinstance(depth, int) else None
    return None


def within_decoder(name: str) -> str | None:
    """A name from its layer's number on, "3.mlp.up_proj.weight"; None outside of layers."""
    match = LAYER.search(name)
    return name[match.start(1) :] if match else None


def module_of(name: str) -> str:
    """Name of the module that owns a tensor."""
    return name.rpartition(".")[0]


# Linear layers that vLLM computes as one: their shards must be stored alike.
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
