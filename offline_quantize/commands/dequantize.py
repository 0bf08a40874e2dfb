"""`precalib dequantize`: a packed checkpoint back to an ordinary one."""

import functools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quantize.checkpoint import writer
from offline_quantize.checkpoint.atomic_files import json_bytes
from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.checkpoint.safetensors_file import NAMES, FileLayout, lay_out
from offline_quantize.checkpoint.source import CONFIG, INDEX
from offline_quantize.planning.plan import index_of
from precalib_kernels.errors import FormatError


def dequantize(
    directory: Path, target: Path, dtype: torch.dtype, jobs: int, progress: writer.Progress
) -> int:
    """Write the checkpoint that the packed one stands for; returns its size in bytes.

    Every packed weight becomes `….weight` in `dtype`; all else is carried over. A run that was
    broken off is continued.

    Raises PrecalibError; the target is then not a checkpoint (it has no config.json).
    """
    packed = open_packed(directory)
    owner = _owners(packed)
    shards = {file: _lay_out(packed, file, owner, dtype) for file in packed.files.shards}
    small: dict[str, bytes] = {}
    if packed.files.index is not None:
        small[INDEX] = json_bytes(index_of(shards, packed.files.index))
    config = {k: v for k, v in packed.files.config.items() if k != "quantization_config"}
    small[CONFIG] = json_bytes(config)
    size = sum(layout.size for layout in shards.values())
    carried = {name: directory / name for name in packed.files.others}
    needed = size + sum(path.stat().st_size for path in carried.values())
    fingerprint = {
        "dequantize": packed.files.fingerprint(),
        "dtype": str(dtype),
        "precalib": version("vllm-precalib"),
    }
    if writer.check_target(target, directory, fingerprint, needed, resume=True):
        writer.clean_up(target)
        return size
    with writer.lock_output(target, fingerprint):
        tasks = _tasks(packed, owner, dtype)
        writer.write_shards(target, shards, tasks, jobs, progress)
        writer.finish(target, carried, small, None, shards, progress)
    return size


def _owners(packed: PackedCheckpoint) -> dict[str, str]:
    """Packed module of every packed tensor, by the tensor's name."""
    owner = {}
    for module in packed.config.modules:
        for name in packed.stored_names(module):
            if name not in packed.locations:
                raise FormatError(
                    f"{packed.root}: tensor '{name}' is missing; quantize the model again"
                )
            owner[name] = module
    return owner


def _lay_out(
    packed: PackedCheckpoint, file: str, owner: dict[str, str], dtype: torch.dtype
) -> FileLayout:
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, entry in packed.files.shards[file].items():
        if name not in owner:
            tensors[name] = (entry.dtype, entry.shape, entry.nbytes)
        elif name.endswith(".qweight"):
            rows, columns = packed.shape(owner[name])
            nbytes = rows * columns * dtype.itemsize
            tensors[f"{owner[name]}.weight"] = (NAMES[dtype], (rows, columns), nbytes)
    return lay_out(tensors, packed.files.metadata[file])


def _tasks(
    packed: PackedCheckpoint, owner: dict[str, str], dtype: torch.dtype
) -> Iterator[writer.WriteJob]:
    for file, entries in packed.files.shards.items():
        for name, entry in entries.items():
            if name not in owner:
                origin = (packed.root / file, entry)
                yield writer.WriteJob(name, file, [name], entry.nbytes, origin=origin)
            elif name.endswith(".qweight"):
                module = owner[name]
                make = functools.partial(_unpack, packed, module, dtype)
                yield writer.WriteJob(module, file, [f"{module}.weight"], entry.nbytes, make)


def _unpack(
    packed: PackedCheckpoint, module: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {f"{module}.weight": packed.weight(module).to(dtype)}, {}
