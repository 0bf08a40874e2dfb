"""Which weights a value–output transform takes: pairs with nothing but a weighted sum between them.

A name does not tell what a model computes between its values and its output projection, so only
architectures known to compute nothing there are taken, and only attention modules that hold no
tensor beside those of plain attention. Others are refused: models that normalize or clip values or
gate the output of attention would compute something else.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offline_quantize.checkpoint.atomic_files import TRANSFORMS
from offline_quantize.checkpoint.safetensors_file import FileLayout, lay_out
from offline_quantize.checkpoint.source import CONFIG, Checkpoint, whole_number
from offline_quantize.checkpoint.transforms import matrices_name, split
from precalib_kernels.errors import RecipeError

VALUE_OUTPUT = "value-output"
# tests/offline_quantize/planning/test_value_output.py transforms a model of each
LINEAR_MODELS = frozenset(
    {
        "arcee", "cohere", "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral",
        "mistral", "mixtral", "olmo2", "olmo3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
        "seed_oss", "smollm3", "starcoder2",
    }
)  # fmt: skip
PLAIN_PARTS = frozenset(
    f"{part}.{kind}"
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    for kind in ("weight", "bias")
)


@dataclasses.dataclass(frozen=True)
class ValueOutputPair:
    """The value and output projections of an attention module.

    attention: name of that module.
    heads:     number of KV heads;  size: of a head.
    bias:      name of the bias of its values, None if there is none.
    """

    attention: str
    heads: int
    size: int
    bias: str | None

    @property
    def value(self) -> str:
        """Name of W_v."""
        return f"{self.attention}.v_proj.weight"

    @property
    def output(self) -> str:
        """Name of W_o."""
        return f"{self.attention}.o_proj.weight"

    @property
    def matrices(self) -> str:
        """Name of the matrices, float32 [heads, size, size]."""
        return matrices_name(self.attention)


def chosen_pairs(
    transform: str | None, source: Checkpoint, quantized: Iterable[str]
) -> list[ValueOutputPair]:
    """What `find_pairs` finds if the user asked for it. Raises RecipeError for another name."""
    if transform is None:
        return []
    if transform != VALUE_OUTPUT:
        raise RecipeError(f"--transform {transform}: there is {VALUE_OUTPUT}")
    return find_pairs(source, quantized)


def find_pairs(source: Checkpoint, quantized: Iterable[str]) -> list[ValueOutputPair]:
    """The pairs of which both weights are quantized, in the order of the checkpoint.

    quantized: names of the tensors that are.

    Raises RecipeError if there is none, or if a transform would change what the model computes.
    """
    kind = source.text_config.get("model_type")
    if kind not in LINEAR_MODELS:
        raise RecipeError(
            f"{source.root / CONFIG}: models of type '{kind}' are not known to pass values "
            "unchanged to the output projection; leave out --transform value-output"
        )
    if source.text_config.get("clip_qkv") is not None:
        raise RecipeError(
            f"{source.root / CONFIG}: values are clipped (clip_qkv), so they cannot be "
            "transformed; leave out --transform value-output"
        )
    chosen = set(quantized)
    parts: dict[str, list[str]] = {}
    for name in source.locations:
        attention, part = split(name)
        if part == "v_proj.weight" and {name, f"{attention}.o_proj.weight"} <= chosen:
            parts[attention] = []
    if not parts:
        raise RecipeError(
            f"{source.root}: no attention module has both 'v_proj' and 'o_proj' quantized; "
            "leave out --transform value-output"
        )
    for name in source.locations:
        inside = name
        while inside := inside.rpartition(".")[0]:
            if inside in parts:
                parts[inside].append(name.removeprefix(f"{inside}."))
    return [_pair(source, attention, names) for attention, names in parts.items()]


def _pair(source: Checkpoint, attention: str, parts: Sequence[str]) -> ValueOutputPair:
    where = f"{source.root}: {attention}"
    if strange := sorted(set(parts) - PLAIN_PARTS):
        raise RecipeError(
            f"{where}: holds '{strange[0]}', so more than a weighted sum may lie between values "
            "and output; leave out --transform value-output"
        )
    heads, size = _geometry(source.text_config)
    locations = source.locations
    value = locations[f"{attention}.v_proj.weight"].entry.shape
    output = locations[f"{attention}.o_proj.weight"].entry.shape
    query = locations.get(f"{attention}.q_proj.weight")
    if (
        value[0] != heads * size
        or output[1] % value[0]
        or query is None
        or query.entry.shape[0] != output[1]
    ):
        queries = list(query.entry.shape) if query else "missing"
        raise RecipeError(
            f"{where}: q {queries}, v {list(value)} and o {list(output)} do not fit {heads} KV "
            f"heads of size {size}; leave out --transform value-output"
        )
    bias = f"{attention}.v_proj.bias"
    return ValueOutputPair(attention, heads, size, bias if bias in locations else None)


def _geometry(config: Mapping[str, Any]) -> tuple[int, int]:
    """Number of KV heads and size of a head; zeros if the configuration does not tell."""
    queries = whole_number(config, "num_attention_heads") or 0
    heads = whole_number(config, "num_key_value_heads") or queries
    size = whole_number(config, "head_dim")
    if size is None and queries:
        size = (whole_number(config, "hidden_size") or 0) // queries
    return heads, size or 0


def transform_files(pairs: Sequence[ValueOutputPair]) -> dict[str, FileLayout]:
    """The file of matrices, by name; nothing without pairs."""
    if not pairs:
        return {}
    tensors = {
        pair.matrices: ("F32", (pair.heads, pair.size, pair.size), 4 * pair.heads * pair.size**2)
        for pair in pairs
    }
    return {TRANSFORMS: lay_out(tensors, {})}
