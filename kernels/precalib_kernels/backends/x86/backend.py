"""Backend `x86`: compiled kernels for x86 processors, straight from packed weights."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

from torch import Tensor

from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.cpu import CpuBackend
from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.expectation import expectation
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.backends.x86.repack import repack


class X86Backend(CpuBackend):
    """About the memory of the file, and faster than dense weights where memory is the limit."""

    name = "x86"
    experts = True
    library: ClassVar[ModuleType] = library
    layout_type = X86Layout
    needs = "needs AVX2, FMA and F16C"

    @classmethod
    def memory_layout(cls, spec: LinearSpec) -> X86Layout:
        """With codes in the order of the ISA's kernels."""
        isa = library.supported_isas()[cls.isa]
        nibbles = library.takes_nibbles(isa)
        return dataclasses.replace(super().memory_layout(spec), nibbles=nibbles)

    @classmethod
    def expectation(cls, spec: LinearSpec) -> str | None:
        """The time of products on this machine, from measurements of its ISA."""
        return expectation(library.supported_isas()[cls.isa], spec.dtype)

    def repack(self, tensors: Mapping[str, Tensor], where: str) -> Tensor:
        """As `repack.py` describes it."""
        return repack(tensors, self.layout, where)
