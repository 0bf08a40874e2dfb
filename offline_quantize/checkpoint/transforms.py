"""Value–output transforms of a packed checkpoint: its file of matrices, and what they make of
source tensors.

The file is in the safetensors format, under a name that no loader of models takes for weights. It
is there only if the run had a transform. What was quantized is then M·W_v and W_o·M⁻¹, so whoever
compares with the source needs the matrices; who computes with the model does not.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from offline_quantize.checkpoint.atomic_files import TRANSFORMS
from offline_quantize.checkpoint.safetensors_file import (
    Entry,
    TensorLocation,
    read_header,
    read_tensor,
)
from offline_quantize.method.value_output import (
    transform_bias,
    transform_output,
    transform_value,
)
from precalib_kernels.errors import SourceError

APPLY = {
    "v_proj.weight": transform_value,
    "v_proj.bias": transform_bias,
    "o_proj.weight": transform_output,
}


@dataclasses.dataclass(frozen=True)
class Transforms:
    """The matrices of a packed checkpoint.

    path: of the file that holds them; None for a checkpoint without transforms.
    """

    path: Path | None

    @classmethod
    def of(cls, directory: Path, transform: str | None) -> "Transforms":
        """Those of a run into `directory`; transform: as its record names it."""
        return cls(directory / TRANSFORMS if transform else None)

    def check(self) -> None:
        """Raise SourceError if the file is missing or damaged."""
        _ = self._entries

    def changes(self, name: str) -> bool:
        """Whether a source tensor is transformed."""
        attention, part = split(name)
        return part in APPLY and matrices_name(attention) in self._entries

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """What is quantized or stored in place of a source tensor; itself if nothing is.

        Weights become float32, a bias keeps its type. Raises SourceError as `check` does.
        """
        if self.path is None or not self.changes(name):
            return tensor
        attention, part = split(name)
        key = matrices_name(attention)
        matrices = read_tensor(self.path, key, self._entries[key])
        if self._fits(part, tensor, matrices):
            with contextlib.suppress(RuntimeError):  # of a matrix without an inverse
                return APPLY[part](tensor, matrices.to(tensor.device))
        raise SourceError(
            f"{self.path}: matrices '{key}' of shape {list(matrices.shape)} are damaged or not "
            f"those of '{name}'; copy the checkpoint again"
        )

    @staticmethod
    def _fits(part: str, tensor: Tensor, matrices: Tensor) -> bool:
        """Whether there are square matrices of numbers for a tensor of this shape."""
        square = matrices.ndim == 3 and matrices.shape[1] == matrices.shape[2] > 0
        if not square or not matrices.is_floating_point() or not bool(matrices.isfinite().all()):
            return False
        heads, size = matrices.shape[:2]
        if part == "v_proj.bias":
            return tensor.shape == (heads * size,)
        if tensor.ndim != 2 or not heads:
            return False
        rows, columns = tensor.shape
        return columns % (heads * size) == 0 if part.startswith("o_") else rows == heads * size

    @functools.cached_property
    def _entries(self) -> Mapping[str, Entry]:
        return read_header(self.path)[0] if self.path else {}


NO_TRANSFORMS = Transforms(None)


@dataclasses.dataclass(frozen=True)
class Original:
    """A source tensor as it was quantized."""

    location: TensorLocation
    transforms: Transforms

    def read(self) -> Tensor:
        """The tensor. Raises SourceError if it or its transform cannot be read."""
        return self.transforms.apply(self.location.name, self.location.read())


def split(name: str) -> tuple[str, str]:
    """ "….self_attn.v_proj.weight" as ("….self_attn", "v_proj.weight")."""
    module, _, kind = name.rpartition(".")
    attention, _, projection = module.rpartition(".")
    return attention, f"{projection}.{kind}"


def matrices_name(attention: str) -> str:
    """Name of the matrices of an attention module."""
    return f"{attention}.value_output"
