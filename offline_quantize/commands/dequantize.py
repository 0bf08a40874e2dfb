"""`precalib dequantize`: a packed checkpoint back to an ordinary one."""

import functools
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import CARD, json_bytes
from offline_quantize.checkpoint.manifest import REQUANTIZE_REMEDY, read_manifest
from offline_quantize.checkpoint.packed import PackedCheckpoint, open_packed
from offline_quantize.checkpoint.progress import Progress
from offline_quantize.checkpoint.run import OutputFiles, Run, State
from offline_quantize.checkpoint.safetensors_file import NAMES, FileLayout, lay_out
from offline_quantize.checkpoint.source import CONFIG, INDEX, check_unchanged, index_of
from offline_quantize.checkpoint.worker_pool import worker_pool
from offline_quantize.checkpoint.write_job import WriteJob
from offline_quantize.checkpoint.writer import by_file, write_shards
from offline_quantize.commands.verify import check_files
from offline_quantize.report.card_metadata import is_ours
from precalib_kernels.errors import FormatError, SourceError


def dequantize(
    directory: Path, target: Path, dtype: torch.dtype, jobs: int, progress: Progress
) -> int:
    """Write the checkpoint that the packed one stands for; returns the size of its weight files.

    Every packed weight becomes `….weight` in `dtype`; all else is copied. A run that was broken
    off is continued.

    jobs: tensors worked on at once.

    Raises PrecalibError, also for what `verify` finds without the source; the target is then not a
    checkpoint (it has no config.json).
    """
    packed = open_packed(directory)
    check_files(packed, read_manifest(directory), progress)
    owner = _owners(packed)
    shards = {file: _lay_out(packed, file, owner, dtype) for file in packed.files.shards}
    fingerprint: dict[str, Any] = {
        "dequantize": packed.files.fingerprint(),
        "dtype": str(dtype),
        "precalib": version("vllm-precalib"),
    }
    names = set(packed.files.sidecar_files)
    if is_ours(directory / CARD):
        names.discard(CARD)  # a card of the packed checkpoint says nothing true of this one
    sidecar_files = {name: directory / name for name in sorted(names)}
    files = OutputFiles(shards, sidecar_files, _metadata_files(packed, shards))
    run = Run(target, directory, fingerprint, files)
    if run.state(resume=True) is State.FINISHED:
        run.clean_up()
    else:
        with run.begin():
            jobs_by_file = by_file(run, _write_jobs(packed, owner, dtype))
            write_shards(run, jobs_by_file, worker_pool(jobs), progress)
            try:
                check_unchanged(packed.files, fingerprint["dequantize"])
            except SourceError:
                run.discard()
                raise
            run.finish(progress)
    return sum(layout.size for layout in shards.values())


def workload(directory: Path) -> int:
    """Bytes that `dequantize` reports progress on. Raises PrecalibError as it does."""
    stored = open_packed(directory).files.nbytes
    return stored + sum(file.size for file in read_manifest(directory).files.values())


def _metadata_files(packed: PackedCheckpoint, shards: Mapping[str, FileLayout]) -> dict[str, bytes]:
    """The generated files; config.json comes last."""
    files: dict[str, bytes] = {}
    if packed.files.index is not None:
        files[INDEX] = json_bytes(index_of(shards, packed.files.index))
    config = {k: v for k, v in packed.files.config.items() if k != "quantization_config"}
    files[CONFIG] = json_bytes(config)
    return files


def _owners(packed: PackedCheckpoint) -> dict[str, str]:
    """Packed module of every packed tensor, by the tensor's name."""
    owner = {}
    for module in packed.config.modules:
        for name in packed.stored_names(module):
            if name not in packed.locations:
                raise FormatError(f"{packed.root}: tensor '{name}' is missing; {REQUANTIZE_REMEDY}")
            owner[name] = module
    return owner


def _lay_out(
    packed: PackedCheckpoint, file: str, owner: dict[str, str], dtype: torch.dtype
) -> FileLayout:
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, entry in packed.files.shards[file].items():
        if name not in owner:
            tensors[name] = (entry.dtype, entry.shape, entry.nbytes)
        elif name.endswith(".qweight") and (made := _made_with(packed, owner[name])):
            shape: tuple[int, ...] = packed.shape(owner[name])
            if made in packed.config.expert_tensors:
                shape = packed.config.expert_tensors[made].shape
            tensors[made] = (NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)
    return lay_out(tensors, packed.files.metadata[file])


def _write_jobs(
    packed: PackedCheckpoint, owner: dict[str, str], dtype: torch.dtype
) -> Iterator[WriteJob]:
    for name, location in packed.locations.items():
        file = location.path.name
        if name not in owner:
            yield WriteJob.copy(file, location)
        elif name.endswith(".qweight") and (made := _made_with(packed, owner[name])):
            module = owner[name]
            make = functools.partial(_unpack, packed, module, made, dtype)
            yield WriteJob(module, file, [made], location.entry.nbytes, make)


def _made_with(packed: PackedCheckpoint, module: str) -> str | None:
    """The tensor that is made with a packed module: its weight, or that of all experts together.

    None for the later modules of such a tensor, which is made with the first.
    """
    whole = packed.in_expert_tensors.get(module)
    if whole is None:
        return f"{module}.weight"
    first = next(packed.config.expert_tensors[whole].parts())
    return whole if module == first.module else None


def _unpack(
    packed: PackedCheckpoint, module: str, made: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if made in packed.config.expert_tensors:
        return {made: packed.expert_tensor(made, dtype)}, {}
    return {made: packed.weight(module).to(dtype)}, {}
