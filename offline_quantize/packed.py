"""A packed checkpoint on disk, read module by module."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quantize.assembly import JOB
from offline_quantize.source import CONFIG, Checkpoint, open_checkpoint
from offline_quantize.tensorfile import Entry, read_tensor
from precalib_kernels import reference
from precalib_kernels.config import QUANT_METHOD, CheckpointConfig
from precalib_kernels.errors import FormatError, SourceError
from precalib_kernels.layout import Layout


@dataclasses.dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint: its files and its quantization_config.

    locations: file and entry of every tensor, by name.
    """

    files: Checkpoint
    config: CheckpointConfig
    locations: Mapping[str, tuple[str, Entry]]

    @property
    def root(self) -> Path:
        """The checkpoint's directory."""
        return self.files.root

    def layout(self, module: str) -> Layout:
        """Layout of a packed module."""
        return self.config.layouts[self.config.modules[module]]

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of a packed module's weight, from the shape of its base plane.

        Raises FormatError when the base plane is missing or has an impossible shape.
        """
        name = f"{module}.qweight"
        if name not in self.locations:
            raise FormatError(f"{self.root}: tensor '{name}' is missing; quantize the model again")
        shape = self.locations[name][1].shape
        if len(shape) != 2 or (8 * shape[1]) % self.layout(module).bits:
            raise FormatError(f"{self.root}: tensor '{name}' has the impossible shape {shape}")
        return shape[0], 8 * shape[1] // self.layout(module).bits

    def stored_names(self, module: str) -> list[str]:
        """Names of the tensors that replace a packed module's weight, in format order."""
        return [f"{module}.{suffix}" for suffix in self.layout(module).tensors(*self.shape(module))]

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The packed tensors of a module, by suffix, compared with the format.

        Raises FormatError that names a missing or wrong tensor, or scales that are not finite.
        """
        layout, (rows, columns) = self.layout(module), self.shape(module)
        found = {}
        for suffix in layout.tensors(rows, columns):
            name = f"{module}.{suffix}"
            if name in self.locations:
                file, entry = self.locations[name]
                found[suffix] = read_tensor(self.root / file, name, entry)
        layout.check(found, columns, f"{self.root}: {module}")
        for suffix, tensor in found.items():
            if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
                raise FormatError(
                    f"{self.root}: tensor '{module}.{suffix}' holds a value that is not finite; "
                    "quantize the model again"
                )
        return found

    def weight(self, module: str) -> Tensor:
        """Ŵ [N, K] of a packed module in float32. Raises FormatError as `tensors` does."""
        where = f"{self.root}: {module}"
        tensors = self.tensors(module)
        _, columns = self.shape(module)
        return reference.dequantize(tensors, self.layout(module), columns, where=where)


def open_packed(directory: Path) -> PackedCheckpoint:
    """Read the headers and the configuration of a packed checkpoint.

    Raises SourceError or FormatError for anything that is not one.
    """
    if (directory / JOB).exists():
        raise SourceError(
            f"{directory}: quantizing it was interrupted; finish it with "
            "'precalib quantize … --resume'"
        )
    files = open_checkpoint(directory)
    quantization = files.config.get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise SourceError(
            f"{directory / CONFIG}: not a packed checkpoint (no quantization_config with "
            "quant_method 'precalib'); make one with 'precalib quantize'"
        )
    try:
        config = CheckpointConfig.from_dict(quantization)
    except FormatError as error:
        raise FormatError(f"{directory / CONFIG}: {error}") from error
    locations = {
        name: (file, entry)
        for file, entries in files.shards.items()
        for name, entry in entries.items()
    }
    return PackedCheckpoint(files, config, locations)


def read_manifest(packed: PackedCheckpoint) -> dict[str, Any]:
    """The manifest beside a packed checkpoint. Raises FormatError when missing or damaged."""
    path = packed.root / "precalib.json"
    try:
        manifest = json.loads(path.read_bytes())
        manifest["files"], manifest["tensors"], manifest["totals"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path}: missing or damaged ({error}); quantize the model again"
        ) from error
    return dict(manifest)
