"""What the backends of compiled CPU kernels have in common: one operator, one struct of layouts."""

from abc import abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.x86 import op
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.toolchain.compile import BuildError


class CpuBackend(Backend):
    """Compiled kernels for one family of processors, straight from packed weights.

    library:     module that compiles and loads the kernels.
    layout_type: describes a weight in memory.
    needs:       what a processor without any of the library's ISAs lacks, "needs …".
    isa:         of `library.supported_isas()`, by default the last; measurements set others.
    """

    int8_activations = True
    library: ClassVar[ModuleType]
    layout_type: ClassVar[type[X86Layout]]
    needs: ClassVar[str]
    isa: ClassVar[int] = -1

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.layout = self.memory_layout(spec)
        self.layout_name = f"{self.name}_layout"
        self.outputs = spec.output_size

    @classmethod
    def can_run(cls, spec: LinearSpec) -> str | None:
        """It needs one of the ISAs, and the compiled kernels or a compiler."""
        if reason := super().can_run(spec):
            return reason
        if spec.device != "cpu":
            return f"computes on CPUs, not on {spec.device}"
        try:
            isas = cls.library.supported_isas()
        except BuildError as error:
            return str(error)
        return None if isas else cls.needs

    @classmethod
    def memory_layout(cls, spec: LinearSpec) -> X86Layout:
        """Describes a weight in memory."""
        return cls.layout_type(
            spec.layout, spec.input_size, spec.shard_sizes, int8_inputs=spec.int8_activations
        )

    @abstractmethod
    def repack(self, tensors: Mapping[str, Tensor], where: str) -> Tensor:
        """The packed tensors as one tensor of bytes; arguments as of `prepare`."""

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Two tensors of bytes, one under a name by which vLLM's LoRA layers know a weight."""
        packed = self.repack(tensors, where)
        return {
            "qweight": packed,
            self.layout_name: op.layout_tensor(self.layout, self.library.load),
        }

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::cpu_linear`."""
        packed: Any = layer.qweight  # get_parameter takes as long as a small product
        layout: Any = getattr(layer, self.layout_name)
        return op.linear(x, packed, layout, bias, self.outputs, self.isa)

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It can whatever it can run."""
        del spec
        return None

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """One call of `precalib::cpu_gather_rows`."""
        packed: Any = layer.qweight
        layout: Any = getattr(layer, self.layout_name)
        spec = self.spec
        return op.gather_rows(ids, packed, layout, self.outputs, spec.dtype, spec.input_size)
