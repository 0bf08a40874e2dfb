"""The output head of a model that stores none: a copy of its embeddings, or these themselves."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from offline_quantize.checkpoint.safetensors_file import Entry
from offline_quantize.checkpoint.source import TEXT_CONFIGS, Checkpoint
from offline_quantize.method import recipes
from offline_quantize.planning import families, selection
from offline_quantize.planning.checks import check_type
from offline_quantize.planning.options import Options
from precalib_kernels.errors import SourceError
from precalib_kernels.format.layout import COLUMN_UNIT

EMBEDDINGS_RECIPE = "balanced-5"  # costs little (docs/method.md)


def tied_head(
    source: Checkpoint, unquantized: Mapping[str, str]
) -> tuple[str, str, tuple[str, Entry]]:
    """Names of the head and of the embeddings it is a copy of, and file and entry of these.

    Raises SourceError if there is no such copy.
    """
    root = source.root
    for other, reason in unquantized.items():
        own = other.endswith(".weight") and selection.HEAD.search(selection.module_of(other))
        if own or reason == "output head":
            raise SourceError(f"{root}: the head '{other}' is kept ({reason}); leave out --head")
    modules = [m for m in families.TIED_HEADS if f"{m}.weight" in source.locations]
    if len(modules) != 1 or not source.tied:
        raise SourceError(
            f"{root}: holds no output head, and no embeddings of a language model that could "
            "stand for it; leave out --head"
        )
    name = f"{modules[0]}.weight"
    location = source.locations[name]
    check_type(location.path, name, location.entry, "leave out --head")
    if location.entry.shape[1] % COLUMN_UNIT:
        raise SourceError(
            f"{location.path}: tensor '{name}' has input size {location.entry.shape[1]}, which is "
            f"not a multiple of {COLUMN_UNIT}; leave out --head"
        )
    head = f"{families.TIED_HEADS[modules[0]]}.weight"
    return head, name, (location.path.name, location.entry)


def tied_to_embeddings(
    source: Checkpoint, options: Options, wanted: Iterable[str]
) -> dict[str, str]:
    """Module of the head that uses packed embeddings, and theirs; empty if no head does.

    wanted: names of the weights that are to be quantized.

    Raises SourceError if the embeddings are not among them or vLLM would not take them packed.
    """
    root, config = source.root, source.config
    found = [
        module for module in map(selection.module_of, wanted) if selection.EMBEDDINGS.search(module)
    ]
    if not found:
        raise SourceError(
            f"{root}: holds no input embeddings 'model.embed_tokens.weight' that can be packed; "
            "leave out --embeddings"
        )
    if config.get("model_type") not in families.EMBEDDING_MODELS:
        raise SourceError(
            f"{root}: vLLM takes no packed embeddings for models of type "
            f"'{config.get('model_type')}'; leave out --embeddings"
        )
    own = any(selection.HEAD.search(selection.module_of(name)) for name in source.locations)
    other = options.head not in (None, options.embeddings)
    if own or other or not source.tied or found[0] not in families.TIED_HEADS:
        return {}
    return {families.TIED_HEADS[found[0]]: found[0]}


def saved_by_embeddings(source: Checkpoint, unquantized: Collection[str]) -> tuple[float, int]:
    """Share of all weights that unquantized embeddings hold, and the bytes that packing them saves.

    Both are 0 where they are packed already, or cannot be.
    """
    found = [
        location
        for name, location in source.locations.items()
        if selection.EMBEDDINGS.search(selection.module_of(name)) and name in unquantized
    ]
    known = source.config.get("model_type") in families.EMBEDDING_MODELS
    if not found or not known or found[0].entry.shape[1] % COLUMN_UNIT:
        return 0.0, 0
    entry = found[0].entry
    _, recipe = recipes.for_head(EMBEDDINGS_RECIPE)
    weights = sum(location.entry.weights for location in source.locations.values())
    return entry.weights / weights, entry.nbytes - recipe.layout.stored_bytes(*entry.shape)


def untie(config: dict[str, Any]) -> None:
    """Say, also of the language model inside, that the head is no copy of the embeddings."""
    config["tie_word_embeddings"] = False  # a packed head has tensors of its own
    for key in TEXT_CONFIGS:
        if isinstance(inner := config.get(key), dict):
            config[key] = dict(inner)
            untie(config[key])
