"""Backend `x86`: compiled kernels for x86 processors, straight from packed weights."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.x86 import library, op
from precalib_kernels.backends.x86.expectation import expectation
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.backends.x86.repack import repack
from precalib_kernels.toolchain.compile import BuildError


class X86Backend(Backend):
    """About the memory of the file, and faster than dense weights where memory is the limit."""

    name = "x86"
    int8_activations = True
    experts = True
    isa: ClassVar[int] = -1  # of `library.supported_isas()`: the last; measurements set others

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.layout = X86Layout(
            spec.layout, spec.input_size, spec.shard_sizes, int8_inputs=spec.int8_activations
        )
        self.outputs = spec.output_size

    @classmethod
    def can_run(cls, spec: LinearSpec) -> str | None:
        """It needs an x86 processor with AVX2, and the compiled kernels or a compiler."""
        if reason := super().can_run(spec):
            return reason
        if spec.device != "cpu":
            return f"computes on CPUs, not on {spec.device}"
        try:
            isas = library.supported_isas()
        except BuildError as error:
            return str(error)
        return None if isas else "needs AVX2, FMA and F16C"

    @classmethod
    def expectation(cls, spec: LinearSpec) -> str | None:
        """The time of products on this machine, from measurements of its ISA."""
        return expectation(library.supported_isas()[cls.isa], spec.dtype)

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Two tensors of bytes, one under a name by which vLLM's LoRA layers know a weight."""
        packed = repack(tensors, self.layout, where)
        return {"qweight": packed, "x86_layout": op.layout_tensor(self.layout)}

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::cpu_linear`."""
        packed: Any = layer.qweight  # get_parameter takes as long as a small product
        layout: Any = layer.x86_layout
        return op.linear(x, packed, layout, bias, self.outputs, self.isa)

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It can whatever it can run."""
        del spec
        return None

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """One call of `precalib::cpu_gather_rows`."""
        packed: Any = layer.qweight
        layout: Any = layer.x86_layout
        spec = self.spec
        return op.gather_rows(ids, packed, layout, self.outputs, spec.dtype, spec.input_size)
