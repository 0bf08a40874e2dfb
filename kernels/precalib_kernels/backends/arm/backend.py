"""Backend `arm`: compiled kernels for 64-bit Arm processors, straight from packed weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.backends.arm import library
from precalib_kernels.backends.arm.memory_layout import ArmLayout, repack
from precalib_kernels.backends.base import Backend, LinearSpec
from precalib_kernels.backends.x86 import op
from precalib_kernels.toolchain.compile import BuildError


class ArmBackend(Backend):
    """About the memory of the file; the operator and the struct of the layout are those of x86."""

    name = "arm"
    int8_activations = True

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.layout = ArmLayout(
            spec.layout, spec.input_size, spec.shard_sizes, int8_inputs=spec.int8_activations
        )
        self.outputs = spec.output_size

    @classmethod
    def can_run(cls, spec: LinearSpec) -> str | None:
        """It needs dot product instructions, and the compiled kernels or a compiler."""
        if reason := super().can_run(spec):
            return reason
        if spec.device != "cpu":
            return f"computes on CPUs, not on {spec.device}"
        try:
            isas = library.supported_isas()
        except BuildError as error:
            return str(error)
        return None if isas else "needs the dot product instructions of Armv8.2 (asimddp)"

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Two tensors of bytes, one under a name by which vLLM's LoRA layers know a weight."""
        packed = repack(tensors, self.layout, where)
        return {"qweight": packed, "arm_layout": op.layout_tensor(self.layout, library.load)}

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::cpu_linear`."""
        packed: Any = layer.qweight  # get_parameter takes as long as a small product
        layout: Any = layer.arm_layout
        return op.linear(x, packed, layout, bias, self.outputs, isa=-1)

    @classmethod
    def can_embed(cls, spec: LinearSpec) -> str | None:
        """It can whatever it can run."""
        del spec
        return None

    def embedding(self, layer: torch.nn.Module, ids: Tensor) -> Tensor:
        """One call of `precalib::cpu_gather_rows`."""
        packed: Any = layer.qweight
        layout: Any = layer.arm_layout
        spec = self.spec
        return op.gather_rows(ids, packed, layout, self.outputs, spec.dtype, spec.input_size)
