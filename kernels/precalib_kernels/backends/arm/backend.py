"""Backend `arm`: compiled kernels for 64-bit Arm processors, straight from packed weights."""

from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

from torch import Tensor

from precalib_kernels.backends.arm import library
from precalib_kernels.backends.arm.memory_layout import ArmLayout, repack
from precalib_kernels.backends.cpu import CpuBackend


class ArmBackend(CpuBackend):
    """About the memory of the file; the operator and the struct of the layout are those of x86."""

    name = "arm"
    library: ClassVar[ModuleType] = library
    layout_type = ArmLayout
    layout: ArmLayout
    needs = "needs the dot product instructions of Armv8.2 (asimddp)"

    def repack(self, tensors: Mapping[str, Tensor], where: str) -> Tensor:
        """As `memory_layout.py` describes it."""
        return repack(tensors, self.layout, where)
