"""A packed checkpoint on disk, read module by module."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from offline_quantize.checkpoint.atomic_files import JOB
from offline_quantize.checkpoint.manifest import REQUANTIZE_REMEDY, Manifest
from offline_quantize.checkpoint.model_size import ModelSize
from offline_quantize.checkpoint.safetensors_file import TensorLocation
from offline_quantize.checkpoint.source import CONFIG, Checkpoint, open_checkpoint
from precalib_kernels.errors import FormatError, SourceError
from precalib_kernels.format import reference
from precalib_kernels.format.checkpoint_config import QUANT_METHOD, CheckpointConfig
from precalib_kernels.format.layout import Layout


@dataclasses.dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint: its files and its quantization_config."""

    files: Checkpoint
    config: CheckpointConfig

    @property
    def root(self) -> Path:
        """The checkpoint's directory."""
        return self.files.root

    @property
    def locations(self) -> Mapping[str, TensorLocation]:
        """Where every tensor is, by name."""
        return self.files.locations

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
        shape = self.locations[name].entry.shape
        if len(shape) != 2 or (8 * shape[1]) % self.layout(module).bits:
            raise FormatError(f"{self.root}: tensor '{name}' has the impossible shape {shape}")
        return shape[0], 8 * shape[1] // self.layout(module).bits

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: all stored bits that replace the packed weights, per weight."""
        shapes = {module: self.shape(module) for module in self.config.modules}
        stored = sum(self.layout(module).stored_bytes(*shapes[module]) for module in shapes)
        return 8 * stored / sum(rows * columns for rows, columns in shapes.values())

    def stored_bytes(self, module: str) -> int:
        """Size of the tensors that replace a packed module's weight."""
        return sum(self.locations[name].entry.nbytes for name in self.stored_names(module))

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
                found[suffix] = self.locations[name].read()
        layout.check(found, columns, f"{self.root}: {module}")
        for suffix, tensor in found.items():
            if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
                raise FormatError(
                    f"{self.root}: tensor '{module}.{suffix}' holds a value that is not finite; "
                    + REQUANTIZE_REMEDY
                )
        return found

    @functools.cached_property
    def in_expert_tensors(self) -> Mapping[str, str]:
        """The 3-D tensor that a module was a part of, by module."""
        return {
            part.module: name
            for name, tensor in self.config.expert_tensors.items()
            for part in tensor.parts()
        }

    def expert_tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A 3-D tensor that was packed as modules. Raises FormatError as `tensors` does."""
        self.check_expert_tensor(name)
        return self.config.expert_tensors[name].assemble(self.weight, dtype)

    def check_expert_tensor(self, name: str) -> None:
        """Raise FormatError if a module of a 3-D tensor has another shape than its part."""
        tensor = self.config.expert_tensors[name]
        for part in tensor.parts():
            if (shape := self.shape(part.module)) != tensor.part_shape:
                raise FormatError(
                    f"{self.root}: {part.module} has shape {list(shape)}, but '{name}' is made of "
                    f"parts of shape {list(tensor.part_shape)}; {REQUANTIZE_REMEDY}"
                )

    def weight(self, module: str) -> Tensor:
        """Ŵ [N, K] of a packed module in float32. Raises FormatError as `tensors` does."""
        where = f"{self.root}: {module}"
        tensors = self.tensors(module)
        _, columns = self.shape(module)
        return reference.dequantize(tensors, self.layout(module), columns, where=where)


def model_size(packed: PackedCheckpoint, manifest: Manifest) -> ModelSize:
    """Of the whole model; tensors that are missing count for nothing."""
    locations = packed.locations
    others = [locations[name].entry for name in manifest.unquantized if name in locations]
    return ModelSize.of(manifest.totals.weights, manifest.totals.stored_bytes, others)


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
    if not config.modules:
        raise FormatError(f"{directory / CONFIG}: names no packed module; {REQUANTIZE_REMEDY}")
    return PackedCheckpoint(files, config)
