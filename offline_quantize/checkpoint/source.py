"""A source checkpoint: its files, its tensors, and whether it can be quantized at all."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import json_bytes, read_json
from offline_quantize.checkpoint.file_patterns import PICKLED_WEIGHTS, is_skipped
from offline_quantize.checkpoint.safetensors_file import (
    Entry,
    FileLayout,
    TensorLocation,
    read_header,
)
from precalib_kernels.errors import SourceError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# GPT-2's Conv1D stores [inputs, outputs], which no tensor name tells
TRANSPOSED_MODELS = ("gpt2", "gpt-sw3", "imagegpt", "decision_transformer", "openai-gpt")
# names that quantizers give to packed weights
PACKED_SUFFIXES = (".qweight", ".weight_packed")
# where models of several kinds of input keep the configuration of their language model
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
DOWNLOAD_REMEDY = "download the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An unpacked checkpoint on disk; nothing but headers is held in memory.

    shards:        entries of every weight file, by file name, in the order of their bytes.
    metadata:      metadata of every weight file.
    index:         the parsed index file, None for a single unsharded file.
    config:        the parsed config.json.
    sidecar_files: files to copy unchanged, relative to `root`.
    skipped_files: files that are not copied (`file_patterns`), relative to `root`.
    """

    root: Path
    shards: Mapping[str, Mapping[str, Entry]]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    sidecar_files: tuple[str, ...]
    skipped_files: tuple[str, ...]

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


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises SourceError for a directory without safetensors weights, with missing, damaged or
    contradictory shards, or without a config.json.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; give the folder of a checkpoint")
    config = read_json(directory / CONFIG, SourceError, "give the folder of a whole checkpoint")
    index = _read_index(directory / INDEX) if (directory / INDEX).exists() else None
    files = _weight_files(directory) if index is None else sorted(set(index["weight_map"].values()))
    shards: dict[str, dict[str, Entry]] = {}
    metadata: dict[str, dict[str, str]] = {}
    owner: dict[str, str] = {}
    for name in files:
        shards[name], metadata[name] = read_header(directory / name)
        for tensor in shards[name]:
            if tensor in owner:
                raise SourceError(
                    f"{directory}: tensor '{tensor}' is both in {owner[tensor]} and in {name}; "
                    "remove the file that does not belong to the checkpoint"
                )
            owner[tensor] = name
    for tensor, name in index["weight_map"].items() if index else ():
        if owner.get(tensor) != name:
            raise SourceError(
                f"{directory / name}: tensor '{tensor}' is named by {INDEX} but is not in the "
                f"file; {DOWNLOAD_REMEDY}"
            )
    sidecar_files, skipped_files = _other_files(directory, set(files))
    return Checkpoint(directory, shards, metadata, index, config, sidecar_files, skipped_files)


def index_of(shards: Mapping[str, FileLayout], source: Mapping[str, Any]) -> dict[str, Any]:
    """The index file of the given shards; other metadata of the source's index stays."""
    weight_map = {name: file for file, layout in shards.items() for name in layout.entries}
    size = sum(entry.nbytes for layout in shards.values() for entry in layout.entries.values())
    metadata = source.get("metadata")
    return {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }


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


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path, SourceError, DOWNLOAD_REMEDY)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no weight_map; {DOWNLOAD_REMEDY}")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or name in ("", ".."):
            raise SourceError(
                f"{path}: tensor '{tensor}' is said to be in {name!r}, which is not a file of this "
                f"folder; {DOWNLOAD_REMEDY}"
            )
        if not name.endswith(".safetensors"):
            raise SourceError(f"{path.parent / name}: {_NOT_SAFETENSORS}")
    return index


def _weight_files(directory: Path) -> list[str]:
    """Names of the weight files where there is no index: the usual one, else all there are."""
    if (directory / SINGLE).exists():
        return [SINGLE]
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if found:
        return found
    for pattern in PICKLED_WEIGHTS:
        if pickled := sorted(directory.glob(pattern)):
            raise SourceError(f"{pickled[0]}: {_NOT_SAFETENSORS}")
    raise SourceError(
        f"{directory}: holds no *.safetensors weights; download or convert the checkpoint to them"
    )


_NOT_SAFETENSORS = (
    "weights in a pickle format can run code when they are read and are refused; convert the "
    "checkpoint to safetensors (save_pretrained does)"
)


def _other_files(directory: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    sidecar_files: list[str] = []
    skipped_files: list[str] = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if hidden or path.is_dir() or name in weights or name in (CONFIG, INDEX):
            continue
        if is_skipped(path.name):
            skipped_files.append(name)
        elif path.is_file():
            sidecar_files.append(name)
        else:
            raise SourceError(f"{path}: not a file (a broken link?); repair or remove it")
    return tuple(sidecar_files), tuple(skipped_files)


def _is_filled(value: object) -> bool:
    return isinstance(value, dict) and bool(value)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
