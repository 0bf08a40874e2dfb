"""A packed checkpoint on disk, read module by module."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import JOB, MANIFEST, read_json
from offline_quantize.checkpoint.safetensors_file import Entry, read_tensor
from offline_quantize.checkpoint.source import CONFIG, Checkpoint, open_checkpoint
from precalib_kernels.errors import FormatError, SourceError
from precalib_kernels.format import reference
from precalib_kernels.format.checkpoint_config import QUANT_METHOD, CheckpointConfig
from precalib_kernels.format.layout import Layout

REQUANTIZE_REMEDY = "quantize the model again"


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
            raise FormatError(f"{self.root}: tensor '{name}' is missing; {REQUANTIZE_REMEDY}")
        shape = self.locations[name][1].shape
        if len(shape) != 2 or (8 * shape[1]) % self.layout(module).bits:
            raise FormatError(f"{self.root}: tensor '{name}' has the impossible shape {shape}")
        return shape[0], 8 * shape[1] // self.layout(module).bits

    @property
    def bits_per_weight(self) -> float:
        """True size: stored bits of everything that replaces a weight, per packed weight."""
        shapes = {module: self.shape(module) for module in self.config.modules}
        stored = sum(self.layout(module).stored_bytes(*shapes[module]) for module in shapes)
        return 8 * stored / sum(rows * columns for rows, columns in shapes.values())

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
                    + REQUANTIZE_REMEDY
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
            f"{directory}: writing it was interrupted; finish it with the same command "
            "('precalib quantize' needs --resume)"
        )
    files = open_checkpoint(directory)
    quantization = files.config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise SourceError(
            f"{directory / CONFIG}: not a packed checkpoint (no quantization_config with "
            "quant_method 'precalib'); make one with 'precalib quantize'"
        )
    try:
        config = CheckpointConfig.from_dict(quantization)
    except FormatError as error:
        raise FormatError(f"{directory / CONFIG}: {error}") from error
    except (TypeError, ValueError) as error:  # a value of another type than the format has
        raise FormatError(
            f"{directory / CONFIG}: quantization_config is damaged ({error}); {REQUANTIZE_REMEDY}"
        ) from error
    locations = {
        name: (file, entry)
        for file, entries in files.shards.items()
        for name, entry in entries.items()
    }
    return PackedCheckpoint(files, config, locations)


# numbers that the manifest has in all, and for each packed weight
TOTALS = (
    "weights",
    "source_bytes",
    "stored_bytes",
    "kept_bytes",
    "bits_per_weight",
    "eq13_bits_per_weight",
    "mean_relative_error",
    "salient_overflow",
)
MEASURES = (
    "bits_per_weight",
    "relative_error",
    "kl",
    "entropy_before",
    "entropy_after",
    "salient_share",
    "salient_overflow",
)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a packed checkpoint. Raises FormatError when missing or damaged."""
    path = directory / MANIFEST
    manifest = read_json(path, FormatError, REQUANTIZE_REMEDY)

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise FormatError(f"{path}: {what} is missing or damaged; {REQUANTIZE_REMEDY}")

    def has_numbers(fields: Any, names: Iterable[str]) -> bool:
        return isinstance(fields, dict) and all(_is_number(fields.get(name)) for name in names)

    require(isinstance(manifest.get("precalib"), str), "'precalib'")
    for key in ("job", "totals", "files", "tensors", "kept"):
        require(isinstance(manifest.get(key), dict), f"'{key}'")
    require(has_numbers(manifest["totals"], TOTALS), "'totals'")
    for name, file in manifest["files"].items():
        whole = has_numbers(file, ["size"]) and isinstance(file.get("sha256"), str)
        require(whole, f"the entry of file '{name}'")
    for module, tensor in manifest["tensors"].items():
        whole = has_numbers(tensor, MEASURES) and isinstance(tensor.get("origin", ""), str)
        shape = tensor.get("shape") if whole else None
        whole = isinstance(shape, list) and len(shape) == 2 and all(map(_is_number, shape))
        require(whole, f"the entry of module '{module}'")
    require(all(isinstance(reason, str) for reason in manifest["kept"].values()), "'kept'")
    left_out = manifest.get("left_out")
    whole = isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)
    require(whole, "'left_out'")
    return manifest


def origin_of(manifest: Mapping[str, Any], module: str) -> str:
    """The tensor of the source that a packed module was made from."""
    name: str = manifest["tensors"].get(module, {}).get("origin", f"{module}.weight")
    return name


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
