"""Backend `native`: compiled kernels for x86 processors, straight from packed weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from precalib_kernels.cpu import library, op
from precalib_kernels.cpu.pack import pack
from precalib_kernels.native.build import BuildError
from vllm_precalib.backend import Backend, Task


class NativeBackend(Backend):
    """About the memory of the file, and faster than dense weights where memory is the limit."""

    name = "native"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.part_sizes = list(task.part_sizes)
        self.layout_text = task.layout.to_text()
        self.level = library.machine_levels()[-1]
        self.product = op.product(self.layout_text, task.input_size, task.part_sizes, self.level)

    @staticmethod
    def can_run(task: Task) -> str | None:
        """It needs an x86 processor with AVX2, and the compiled kernels or a compiler."""
        if task.device != "cpu":
            return f"computes on CPUs, not on {task.device}"
        try:
            levels = library.machine_levels()
        except BuildError as error:
            return str(error)
        return None if levels else "needs AVX2, FMA and F16C"

    def prepare(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """One tensor of bytes, under a name by which vLLM's LoRA layers know a weight."""
        return {"qweight": pack(tensors, self.product.plan, where)}

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """One call of `precalib::cpu_linear`."""
        packed: Any = layer.qweight
        if not torch.compiler.is_compiling():
            # The dispatcher takes about as long as the product of a small layer.
            return self.product(x, packed, bias)
        return torch.ops.precalib.cpu_linear(
            x, packed, bias, self.part_sizes, self.layout_text, self.level
        )
