"""What a backend is: one way to compute with packed weights.

A backend is one class. It says whether it can run a layer, turns the packed tensors of the file
into its own tensors in memory once, and multiplies. Nothing here knows an inference engine: an
engine makes the layers and loads the tensors, and asks `registry` which backend to use.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from precalib_kernels.backends.routes import Grouping
from precalib_kernels.format.layout import Layout


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """Everything that a backend is told about one linear layer on one rank.

    layout:      how the weight is packed.
    input_size:  K of this rank.
    shard_sizes: rows of the matrices fused into the layer on this rank, in order; their sum is N.
    dtype:       type of the activations and of the result.
    device:      torch's name for the kind of device, "cpu" or "cuda".
    experts:     of a mixture of experts, its matrices of this shape on this rank; 0 for all else.
    int8_activations: whether products are to round activations to 8 bits.
    embedding:   whether rows of the weight are looked up, too.
    """

    layout: Layout
    input_size: int
    shard_sizes: tuple[int, ...]
    dtype: torch.dtype
    device: str
    experts: int = 0
    int8_activations: bool = False
    embedding: bool = False

    @property
    def output_size(self) -> int:
        """N of this rank."""
        return sum(self.shard_sizes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "layout": self.layout.to_dict(),
            "input_size": self.input_size,
            "shard_sizes": list(self.shard_sizes),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "experts": self.experts,
            "int8_activations": self.int8_activations,
            "embedding": self.embedding,
        }


class Backend(ABC):
    """How one layer computes. What it keeps between calls are parameters of that layer.

    name:             what users call it.
    int8_activations: whether it can round activations to 8 bits.
    experts:          whether it can compute a layer of several experts.
    grouped:          whether it multiplies with all of them in one product, `apply_grouped`.

    An engine calls `prepare` once the packed tensors are loaded, makes parameters of what it
    returns, calls `finish`, and then `apply` for every product.
    """

    name: ClassVar[str]
    int8_activations: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    grouped: ClassVar[bool] = False

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    @classmethod
    def can_run(cls, spec: LinearSpec) -> str | None:
        """None, or the reason why this backend cannot compute such a layer on this machine.

        A subclass with limits of its own asks this one first. The reason reads well after
        "NAME: ".
        """
        if spec.experts and not cls.experts:
            return f"computes one matrix per layer, not {spec.experts} experts"
        if spec.int8_activations and not cls.int8_activations:
            return "has no 8-bit activations"
        return cls.can_embed(spec) if spec.embedding else None

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """None, or the reason why this backend cannot look rows of such a weight up.

        The reason reads well after "NAME: ".
        """
        del spec
        return "cannot look up rows of packed embeddings"

    @classmethod
    def expectation(cls, spec: LinearSpec) -> str | None:
        """A sentence about the speed or the memory to expect on this machine, None for nothing.

        It is asked of a backend that can run the layer, and reads well at the end of a list.
        """
        del spec
        return None

    @abstractmethod
    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The tensors to keep, which become parameters of the layer under these names.

        tensors: the packed tensors as named by `Layout.tensors`, each with N rows; column_scale
                 has a row per shard. They may be changed or returned, and are not used after.
        where:   the layer's name, for errors.

        Raises FormatError for positions out of range. It is called again after a reload, and
        must then return the same names, shapes and types.
        """

    def finish(self, layer: torch.nn.Module) -> None:  # noqa: B027
        """Do what has to be done once the parameters are in place; by default nothing."""

    @abstractmethod
    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Ŵᵀ + bias, traceable by torch.compile.

        layer: holds the parameters that `prepare` returned.
        x:     [..., K] in the spec's type, which is also that of the result [..., N].
        bias:  [N] in the same type, or None.
        """

    def apply_grouped(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None, grouping: Grouping
    ) -> Tensor:
        """factors · (x·Ŵₑᵀ + biasₑ), every row with the weight of the expert it is routed to.

        layer: holds what `prepare` returned for each expert, stacked.
        x:     [tokens, K] in the spec's type, which is also that of the result [routes, N].
        bias:  [experts, N] in the same type, or None.

        Raises NotImplementedError where the backend is not `grouped`.
        """
        del layer, x, bias, grouping
        raise NotImplementedError(f"{self.name} has no grouped products")

    def route_block(self, rows: int) -> int:
        """Places of a block of routes where an expert gets about so many rows."""
        del rows
        raise NotImplementedError(f"{self.name} has no grouped products")

    def row_limits(self) -> tuple[int, ...]:
        """The largest numbers of rows per expert that each kernel is for."""
        raise NotImplementedError(f"{self.name} has no grouped products")

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """Rows of Ŵ, [..., K] in the spec's type, traceable by torch.compile.

        ids: [...] int64, all of them at least 0 and below N.

        Raises NotImplementedError where `can_embed` gives a reason.
        """
        del layer, ids
        raise NotImplementedError(f"{self.name}: {self.can_embed(self.spec)}")
