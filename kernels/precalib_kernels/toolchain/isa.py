"""Instruction sets that the CPU kernels are compiled for.

The build imports this module, so it needs the standard library only.
"""

import ctypes
import dataclasses
from abc import ABC, abstractmethod

_COMPILED, _MACHINE_HAS = 1, 2  # bits of `precalib_isa_state`


@dataclasses.dataclass(frozen=True)
class Isa(ABC):
    """An instruction set that the kernels are compiled for.

    requires: features of the processor, as /proc/cpuinfo names them.
    flags:    of the compiler.
    """

    name: str
    requires: tuple[str, ...]
    flags: tuple[str, ...]

    @abstractmethod
    def library(self) -> ctypes.CDLL:
        """The library of kernels. Raises BuildError."""

    def supported(self) -> bool:
        """Whether this machine has it and the library was compiled for it. Raises BuildError."""
        return self._state() == _COMPILED | _MACHINE_HAS

    def missing(self) -> bool:
        """Whether this machine has it, but the library is without it. Raises BuildError."""
        return self._state() == _MACHINE_HAS

    def _state(self) -> int:
        library = self.library()
        return int(library.precalib_isa_state(library.precalib_isa_index(self.name.encode())))
