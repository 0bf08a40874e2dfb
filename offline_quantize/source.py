"""A source checkpoint: its files, its tensors, and whether it can be quantized at all."""

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_quantize.tensorfile import Entry, read_header
from precalib_kernels.errors import SourceError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# weights in other formats, which would otherwise be carried over as dead freight
LEFT_OUT = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.safetensors",
)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# GPT-2's Conv1D stores [inputs, outputs], which no tensor name tells
TRANSPOSED_MODELS = ("gpt2", "gpt-sw3", "imagegpt", "decision_transformer")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An unpacked checkpoint on disk; nothing but headers is held in memory.

    shards:   entries of every weight file, by file name, in the order of their bytes.
    metadata: metadata of every weight file.
    index:    the parsed index file, None for a single unsharded file.
    config:   the parsed config.json.
    others:   files to carry over unchanged, relative to `root`.
    left_out: weight files in other formats, relative to `root`.
    """

    root: Path
    shards: Mapping[str, Mapping[str, Entry]]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    def fingerprint(self) -> dict[str, str]:
        """What a resumed run compares: size, modification time and header of every weight file."""
        marks = {}
        for name, entries in self.shards.items():
            status = (self.root / name).stat()
            header = hashlib.sha256(repr(list(entries.items())).encode()).hexdigest()[:16]
            marks[name] = f"{status.st_size} bytes, {status.st_mtime_ns}, {header}"
        return marks


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises SourceError for a directory without safetensors weights, with missing, damaged or
    contradictory shards, or without a config.json.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory; give the folder of a checkpoint")
    config = _read_json(directory / CONFIG)
    files = _weight_files(directory)
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
    index = _read_json(directory / INDEX) if (directory / INDEX).exists() else None
    if index is not None:
        for tensor, name in index["weight_map"].items():
            if owner.get(tensor) != name:
                raise SourceError(
                    f"{directory / name}: tensor '{tensor}' is named by {INDEX} but is not in the "
                    "file; download the checkpoint again"
                )
    others, left_out = _other_files(directory, set(files))
    return Checkpoint(directory, shards, metadata, index, config, others, left_out)


def refuse_unsuitable(source: Checkpoint) -> None:
    """Raise SourceError for a checkpoint whose weights are not plain [outputs, inputs] floats."""
    quantized = source.config.get("quantization_config")
    if quantized is None:
        quantized = source.config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "an unnamed method")
        raise SourceError(
            f"{source.root}: already quantized ({method}); quantize the original checkpoint, or "
            "bring this one back to bfloat16 first"
            + (" with 'precalib dequantize'" if method == "precalib" else "")
        )
    if (kind := source.config.get("model_type")) in TRANSPOSED_MODELS:
        raise SourceError(
            f"{source.root}: models of type '{kind}' store linear weights transposed, which the "
            "packed format does not cover; use a model with ordinary linear layers"
        )


def _weight_files(directory: Path) -> list[str]:
    """Names of the weight files: those of the index, else the one file, else all that are there."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{directory / INDEX}: has no weight_map; download it again")
        for name in sorted(set(weight_map.values())):
            if not isinstance(name, str) or Path(name).name != name:
                raise SourceError(f"{directory / INDEX}: {name!r} is not a file of this folder")
            if not name.endswith(".safetensors"):
                raise SourceError(f"{directory / name}: {_NOT_SAFETENSORS}")
        return sorted(set(weight_map.values()))
    if (directory / SINGLE).exists():
        return [SINGLE]
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if found:
        return found
    for pattern in PICKLED:
        if pickled := sorted(directory.glob(pattern)):
            raise SourceError(f"{pickled[0]}: {_NOT_SAFETENSORS}")
    raise SourceError(f"{directory}: holds no *.safetensors weights")


_NOT_SAFETENSORS = (
    "weights in a pickle format can run code when they are read and are refused; convert the "
    "checkpoint to safetensors (save_pretrained does)"
)


def _other_files(directory: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    others: list[str] = []
    left_out: list[str] = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if hidden or not path.is_file() or name in weights or name in (CONFIG, INDEX):
            continue
        foreign = any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_OUT)
        (left_out if foreign else others).append(name)
    return tuple(others), tuple(left_out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SourceError(
            f"{path}: the file is missing; give the folder of a whole checkpoint"
        ) from None
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: not a JSON object; download it again")
    return value
