"""3-D tensors that hold one matrix per expert, and the packed modules that replace them.

A checkpoint may store the experts of a layer as one tensor. It is packed as if every expert had
matrices of its own, under the names that other checkpoints use: `mlp.experts.gate_up_proj`
[E, 2·I, K] becomes modules `mlp.experts.0.gate_proj` [I, K], `mlp.experts.0.up_proj` and so on.
`quantization_config` keeps what is needed to make the tensor again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.errors import FormatError


@dataclasses.dataclass(frozen=True)
class ExpertPart:
    """One matrix [N, K] of a 3-D tensor.

    module: name of the packed module that it becomes.
    expert: its place in the first dimension.
    rows:   which rows of the expert's matrix it is.
    """

    module: str
    expert: int
    rows: slice


@dataclasses.dataclass(frozen=True)
class ExpertTensor:
    """A 3-D tensor as it was before it was packed.

    shape:      [experts, outputs, inputs], or with `transposed` [experts, inputs, outputs].
    prefix:     what names of the packed modules begin with, as "model.layers.0.mlp.experts".
    modules:    the last parts of their names, in the order of the rows that each has; all have as
                many.
    transposed: whether an expert's matrix is stored with its inputs first.

    Raises FormatError for sizes that do not fit together.
    """

    shape: tuple[int, int, int]
    prefix: str
    modules: tuple[str, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        sizes = len(self.shape) == 3 and all(type(n) is int and n > 0 for n in self.shape)
        names = bool(self.modules) and all(isinstance(name, str) for name in self.modules)
        if not sizes or not names or self.outputs % len(self.modules):
            raise FormatError(
                f"a tensor of shape {list(self.shape)} cannot be that of the modules "
                f"{list(self.modules)} of experts"
            )

    @property
    def outputs(self) -> int:
        """Rows of an expert's matrix."""
        return self.shape[2 if self.transposed else 1]

    @property
    def inputs(self) -> int:
        """Columns of an expert's matrix."""
        return self.shape[1 if self.transposed else 2]

    @property
    def part_shape(self) -> tuple[int, int]:
        """[N, K] of every part."""
        return self.outputs // len(self.modules), self.inputs

    def parts(self) -> Iterator[ExpertPart]:
        """All matrices, expert by expert."""
        rows = self.part_shape[0]
        for expert in range(self.shape[0]):
            for place, module in enumerate(self.modules):
                name = f"{self.prefix}.{expert}.{module}"
                yield ExpertPart(name, expert, slice(place * rows, (place + 1) * rows))

    def assemble(self, weight: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The 3-D tensor in `dtype`.

        weight: gives the weight [N, K] of a module.
        """
        result = torch.empty(self.shape, dtype=dtype)
        for part in self.parts():
            matrix = result[part.expert].T if self.transposed else result[part.expert]
            matrix[part.rows] = weight(part.module)
        return result

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "shape": list(self.shape),
            "prefix": self.prefix,
            "modules": list(self.modules),
            "transposed": self.transposed,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ExpertTensor":
        """Inverse of `to_dict`. Raises FormatError for unknown, missing or wrong fields."""
        known = {"shape": list, "prefix": str, "modules": list, "transposed": bool}
        if set(fields) != set(known) or any(type(fields[k]) is not t for k, t in known.items()):
            raise FormatError(f"{dict(fields)} does not describe a tensor of experts")
        shape, modules = tuple(fields["shape"]), tuple(fields["modules"])
        return cls(shape, fields["prefix"], modules, fields["transposed"])
