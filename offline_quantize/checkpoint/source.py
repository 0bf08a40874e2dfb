"""A source checkpoint: its files, its tensors, and whether it can be quantized at all."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint import adapters
from offline_quantize.checkpoint.atomic_files import json_bytes, read_json
from offline_quantize.checkpoint.file_patterns import is_carried, is_carried_in_module
from offline_quantize.checkpoint.modules import module_folders
from offline_quantize.checkpoint.safetensors_file import Entry, FileLayout, TensorLocation
from offline_quantize.checkpoint.weight_files import DOWNLOAD_REMEDY as DOWNLOAD_REMEDY
from offline_quantize.checkpoint.weight_files import INDEX as INDEX
from offline_quantize.checkpoint.weight_files import WeightFiles, read_weight_files
from precalib_kernels.errors import SourceError

CONFIG = "config.json"
# GPT-2's Conv1D stores [inputs, outputs], which no tensor name tells
TRANSPOSED_MODELS = ("gpt2", "gpt-sw3", "imagegpt", "decision_transformer", "openai-gpt")
# names that quantizers give to packed weights
PACKED_SUFFIXES = (".qweight", ".weight_packed")
# where models of several kinds of input keep the configuration of their language model
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An unpacked checkpoint on disk; nothing but headers is held in memory.

    shards:        entries of every weight file, by file name, in the order of their bytes.
    metadata:      metadata of every weight file.
    index:         the parsed index file, None where none is used.
    config:        the parsed config.json.
    sidecar_files: files to copy unchanged, relative to `root`.
    skipped_files: files that are not copied (`file_patterns`), relative to `root`.
    notes:         what was decided where files contradict each other, a sentence each.
    """

    root: Path
    shards: Mapping[str, Mapping[str, Entry]]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    sidecar_files: tuple[str, ...]
    skipped_files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for shard in self.shards.values() for entry in shard.values())

    @functools.cached_property
    def locations(self) -> Mapping[str, TensorLocation]:
        """Where every tensor is, by name."""
        return {
            name: TensorLocation(self.root / file, name, entry)
            for file, entries in self.shards.items()
            for name, entry in entries.items()
        }

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the language model, which may lie inside that of a larger model."""
        config = self.config
        while nested := next((config[k] for k in TEXT_CONFIGS if _is_filled(config.get(k))), None):
            config = nested
        return config

    @property
    def tied(self) -> bool:
        """Whether config.json lets the output head be a copy of the embeddings.

        transformers writes a field only where it differs from the class's default, which is mostly
        that it is one; without the tensor of a head there is no other way.
        """
        return bool(
            self.config.get(
                "tie_word_embeddings", self.text_config.get("tie_word_embeddings", True)
            )
        )

    def fingerprint(self, *, times: bool = True) -> dict[str, Any]:
        """What tells this checkpoint from another: its configuration, and of every weight file its
        size, its header and (with `times`) when it was modified, in nanoseconds.
        """
        marks: dict[str, Any] = {CONFIG: _digest(json_bytes(self.config))}
        for name, entries in self.shards.items():
            status = (self.root / name).stat()
            marks[name] = {
                "size": status.st_size,
                "header": _digest(repr(list(entries.items())).encode()),
            }
            if times:
                marks[name]["modified"] = status.st_mtime_ns
        return marks


def check_unchanged(source: Checkpoint, before: Mapping[str, Any]) -> None:
    """Raise SourceError if a file is not as it was.

    before: an earlier `Checkpoint.fingerprint`, with times.
    """
    try:
        now = source.fingerprint()
    except OSError as error:
        raise SourceError(f"{error.filename}: went away while it was read; run again") from None
    for name, mark in now.items():
        if before.get(name) != mark:
            raise SourceError(
                f"{source.root / name}: changed while it was read, so nothing was written; run the "
                "command again when nothing else writes there"
            )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises SourceError for a directory without safetensors weights, with missing, damaged or
    contradictory shards, or without a config.json; and for the folder of an adapter.
    """
    if directory.is_file():
        raise SourceError(f"{directory}: is a file; give the folder of the checkpoint it is in")
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; give the folder of a checkpoint")
    if adapters.holds_only_adapter(directory):
        raise adapters.refusal(directory)
    config = read_json(directory / CONFIG, SourceError, "give the folder of a whole checkpoint")
    _check_names(directory / CONFIG, config)
    weights = read_weight_files(directory)
    if adapters.are_adapter_tensors(name for shard in weights.shards.values() for name in shard):
        raise adapters.refusal(directory)
    sidecar_files, skipped_files = _other_files(directory, weights)
    return Checkpoint(
        directory,
        weights.shards,
        weights.metadata,
        weights.index,
        config,
        sidecar_files,
        skipped_files,
        weights.notes,
    )


def index_of(shards: Mapping[str, FileLayout], source: Mapping[str, Any]) -> dict[str, Any]:
    """The index file of the given shards; other metadata of the source's index stays."""
    weight_map = {name: file for file, layout in shards.items() for name in layout.entries}
    size = sum(entry.nbytes for layout in shards.values() for entry in layout.entries.values())
    metadata = source.get("metadata")
    return {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }


def whole_number(config: Mapping[str, Any], field: str) -> int | None:
    """A number of layers, heads or the like; None where there is none, or one for each layer."""
    value = config.get(field)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    return value if fits else None


def architecture(config: Mapping[str, Any]) -> str:
    """Name of the model's class, or its type where it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type"))


def check_suitable(source: Checkpoint) -> None:
    """Raise SourceError for a checkpoint whose weights are not plain [outputs, inputs] floats."""
    for config in (source.config, source.text_config):
        quantized = config.get("quantization_config") or config.get("compression_config")
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            back = " with 'precalib dequantize'" if method == "precalib" else ""
            raise SourceError(
                f"{source.root / CONFIG}: already quantized ({method or 'unnamed method'}); "
                f"quantize the original checkpoint, or bring this one back to bfloat16 first{back}"
            )
    for file, entries in source.shards.items():
        for name in entries:
            if name.endswith(PACKED_SUFFIXES):
                raise SourceError(
                    f"{source.root / file}: tensor '{name}' is already quantized; "
                    "quantize the original checkpoint"
                )
    if (kind := source.text_config.get("model_type")) in TRANSPOSED_MODELS:
        raise SourceError(
            f"{source.root / CONFIG}: models of type '{kind}' store linear weights transposed, "
            "which the packed format does not cover; use a model with ordinary linear layers"
        )


def _other_files(directory: Path, weights: WeightFiles) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files to copy beside the weights, and those that are left out."""
    folders = module_folders(directory)
    used = {*weights.shards, CONFIG, *((INDEX,) if weights.index is not None else ())}
    sidecar_files: list[str] = []
    skipped_files: list[str] = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        name = relative.as_posix()
        if any(part.startswith(".") for part in relative.parts) or path.is_dir() or name in used:
            continue
        if any(name.startswith(f"{folder}/") for folder in folders):
            carried = is_carried_in_module(name)
        else:
            carried = is_carried(name)
        if not carried:
            skipped_files.append(name)
        elif path.is_file():
            sidecar_files.append(name)
        else:
            raise SourceError(f"{path}: not a file (a broken link?); repair or remove it")
    return tuple(sidecar_files), tuple(skipped_files)


def _check_names(path: Path, config: Mapping[str, Any]) -> None:
    """Raise SourceError where a type or class of model is no name."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str | None):
        raise _no_name(path, "model_type", kind, "a name")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise _no_name(path, "architectures", classes, "a list of names")
    for key in TEXT_CONFIGS:
        if isinstance(inner := config.get(key), dict):
            _check_names(path, inner)


def _no_name(path: Path, field: str, value: object, expected: str) -> SourceError:
    return SourceError(
        f"{path}: '{field}' is {json.dumps(value)[:80]}, not {expected}; download the "
        "configuration again"
    )


def _is_filled(value: object) -> bool:
    return isinstance(value, dict) and bool(value)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
