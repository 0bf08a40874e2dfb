"""What a backend is: a way to compute with packed weights.

It is one class, which says whether it can run, turns the tensors of the file into its own in-memory
form once, and multiplies.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from precalib_kernels.format.layout import Layout


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """Everything the choice of a backend may depend on, for one layer on one rank.

    shard_sizes: rows of the matrices fused into the layer, in order.
    dtype:       type of the activations and of the result.
    device:      torch's name for the kind of device, "cpu" or "cuda".
    int8_activations: whether products are to round activations to 8 bits.
    """

    layout: Layout
    input_size: int
    shard_sizes: tuple[int, ...]
    dtype: torch.dtype
    device: str
    int8_activations: bool = False


class Backend(ABC):
    """How one layer computes. What it keeps between calls are parameters of the layer."""

    name: ClassVar[str]
    int8_activations: ClassVar[bool] = False  # whether it can round activations to 8 bits

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    @staticmethod
    @abstractmethod
    def can_run(spec: LinearSpec) -> str | None:
        """None, or the reason why this backend cannot take the layer."""

    @abstractmethod
    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The in-memory form, which becomes parameters of the layer under these names.

        tensors: as named by `Layout.tensors`; column_scale has a row per shard.
        where:   the layer's name, for errors.

        Raises FormatError for positions out of range. It is called again after a reload, and
        must then return the same names and shapes.
        """

    def finish(self, layer: torch.nn.Module) -> None:  # noqa: B027
        """Do what has to be done after the parameters are in place; by default nothing."""

    @abstractmethod
    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Ŵᵀ + bias, traceable by torch.compile: x [..., K] to [..., N]."""
